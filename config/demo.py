"""The demo's model: 2 M parameters from scratch, 3 to 4 minutes on two cores.

On a quiet machine max_steps ends the run, and then the loss curve depends on the seed alone; train_hours bounds it on a slower one.
"""
out_dir = 'out/demo/slm'
data = 'out/demo/units'
save_init = True       # out/demo/untrained, for the table
init = 'scratch'
n_layer = 4
n_embd = 192
n_head = 6
n_kv_head = 2
n_ffn = 512
context = 512
batch_size = 4
global_batch = 4
lr = 3e-3
min_lr = 1e-4
beta2 = 0.99
grad_clip = 1.0
max_steps = 700
train_hours = 3.8 / 60
eval_interval = 200
eval_tokens = 20_000
save_interval = 200
log_interval = 10
