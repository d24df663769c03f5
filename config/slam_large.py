"""Slam (large), section 6: Qwen2.5-1.5B (1.3 B parameters with 502 tokens) on two A100 for 48
hours, 6.1 B tokens.

torchrun --nproc_per_node=2 train.py config/slam_large.py
"""

out_dir = 'out/slam_large'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-1.5B'
row_tokens = 16_384  # on 80 GB, of which weights, gradients and moments take 21: five passes a step
batch_tokens = 163_840  # as Slam (scaled)
max_steps = 37_200  # x 163,840 = 6.1 B tokens
train_hours = 47.0  # the last hour is for dpo.py
eval_interval = save_interval = 1000
