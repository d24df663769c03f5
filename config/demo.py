"""The demo's model: 0.8 M parameters from scratch, 3 to 4 minutes on two cores."""

out_dir = 'out/demo/slm'
data = 'out/demo/units'
val_data = ''
save_init = True  # out/demo/untrained, for the table
init = 'scratch'
n_layer = 4
n_embd = 128
n_head = 4
n_kv_head = 2
n_ffn = 384
context = 512
row_tokens = 512
batch_tokens = 512
lr = 4e-3
min_lr = 1e-4
beta2 = 0.99
grad_clip = 1.0
max_steps = 3600
train_hours = 3.8 / 60
eval_interval = 600
save_interval = 600
log_interval = 20
