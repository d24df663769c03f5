"""The demo's model: 0.8 M parameters from scratch, 3 to 5 minutes on two cores.

The run ends after max_steps, so the loss curve depends on the seed alone, however slow the machine.
Validation loss after 1.9 M tokens: 0.561 with 3,900 steps of 512 tokens at lr 4e-3, 0.562 with
2,000 steps of 1,024 at 6e-3, which cost fewer updates.
"""

out_dir = 'out/demo/slm'
data = 'out/demo/units'
val_data = ''  # held-out stories of the same
init = 'scratch'
n_layer = 4
n_embd = 128
n_head = 4
n_kv_head = 2
n_ffn = 384
context = 512  # no story is as long: each is one chunk
row_tokens = 1024
batch_tokens = 1024  # about nine stories a step, in one pass
lr = 6e-3
min_lr = 1e-4
beta2 = 0.99
grad_clip = 1.0
max_steps = 2200  # a little over two epochs
train_hours = 0  # no limit: the same scores on every machine
eval_interval = 550
save_interval = 550
log_interval = 20
