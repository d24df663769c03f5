"""The demo's model: 0.8 M parameters from scratch, 3 to 4 minutes on two cores.

On a quiet machine max_steps ends the run, and then the loss curve depends on the seed alone; train_hours bounds it on a slower one.
At equal CPU time small steps and a small model win: 128 wide beats 192, one row a step beats four, and Muon's products in bf16 are slow here.
"""
out_dir = 'out/demo/slm'
data = 'out/demo/units'
save_init = True       # out/demo/untrained, for the table
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
