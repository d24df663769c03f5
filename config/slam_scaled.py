"""Slam (scaled), section 6: the same recipe on two A100 for 48 hours, the batch doubled, 16.7 B
tokens.

torchrun --nproc_per_node=2 train.py config/slam_scaled.py
"""

out_dir = 'out/slam_scaled'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-0.5B'
row_tokens = 40_960  # on 80 GB: two passes a step on each of two GPUs
batch_tokens = 163_840  # twice Slam's 81,920
max_steps = 101_900  # x 163,840 = 16.7 B tokens
train_hours = 47.0  # the last hour is for dpo.py
eval_interval = save_interval = 1000
