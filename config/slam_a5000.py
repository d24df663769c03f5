"""Slam on one A5000 (24 GB) in 24 hours: Table 4, train.py's defaults spelled out. 23.5 h here,
0.5 h for dpo.py."""

out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'
val_data = 'librispeech,librilight'
init = 'Qwen/Qwen2.5-0.5B'
rope_theta = 10000.0
context = 1024
# The paper's step is 128 chunks of at most 1,024 tokens. It saw 1.4 B tokens in 17,625 steps, which
# is 620 a chunk: 128 x 620 = 79,400 tokens a step, here 10 rows of 8,192; 17,625 x 81,920 = 1.44 B.
row_tokens = 8_192
batch_tokens = 81_920
max_steps = 17_625
train_hours = 23.5
lr = 1e-3
min_lr = 5e-5
schedule = 'cosine'
warmup_fraction = 0.01
warmup_steps = 100  # the longer one counts; this and the betas are from the public configuration
grad_clip = 0.5
optimizer = 'adamw'
beta1, beta2, eps, weight_decay = 0.9, 0.999, 1e-8, 0.0
dropout = 0.0
