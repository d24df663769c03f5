# Slam's preference tuning, Table 5 of the paper: half an hour on one A5000 (24 GB).
#   python dpo.py config/slam_dpo.py --data=data/spokenswag/pairs.jsonl
init = 'out/slam'
out_dir = 'out/slam-dpo'
beta = 0.1
context = 1024
rope_theta = 10000.0
batch_pairs = 64  # 4 x 16 in the paper; about 6,000 tokens, one row
row_tokens = 8192
lr = 5e-5  # inverse square root
warmup_steps = 100  # from the public configuration
grad_clip = 0.5
max_steps = 813
train_hours = 0.5  # the first limit ends the run: max_steps, epochs or train_hours
