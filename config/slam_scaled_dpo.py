# Slam (scaled), or Slam (large) with --init=out/slam_large: two passes over SpokenSwag, 9 M tokens
# (section 6 of the paper), on 2 x A100.
#   torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py
init = 'out/slam_scaled'
out_dir = 'out/slam_scaled-dpo'
beta = 0.1
context = 1024
rope_theta = 10000.0
batch_pairs = 64  # over all devices
row_tokens = 8192
lr = 5e-5
warmup_steps = 100
grad_clip = 0.5
max_steps = 0
epochs = 2.0
train_hours = 0.0  # no time limit: the run ends after the epochs
