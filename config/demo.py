"""The demo's model: 0.8 M parameters from scratch, 3 to 4 minutes on two cores.

On a quiet machine max_steps ends the run, and then the loss curve depends on the seed alone; train_hours bounds it on a slower one.
Validation loss after 60 s of one core on the demo's units: width 192, 4 rows a step 2.62, 2 rows 2.41; width 128, 4 rows 2.40, 1 row at
lr 4e-3 (the others 3e-3) 2.20. torch's Muon runs its products in bf16, which is slow on this CPU: 50 steps against 191.
"""

out_dir = 'out/demo/slm'
data = 'out/demo/units'
save_init = True  # out/demo/untrained, for the table
init = 'scratch'
n_layer = 4
n_embd = 128
n_head = 4
n_kv_head = 2
n_ffn = 384
context = 512
batch_size = 1
global_batch = 1
lr = 4e-3
min_lr = 1e-4
beta2 = 0.99
grad_clip = 1.0
max_steps = 3600
train_hours = 3.8 / 60
eval_interval = 600
eval_tokens = 0
save_interval = 600
log_interval = 20
