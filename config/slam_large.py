"""Slam (large), section 6: Qwen2.5-1.5B (1.3 B parameters with 502 tokens) on two A100 for 48 hours, 6.1 B tokens.

torchrun --nproc_per_node=2 train.py config/slam_large.py
"""

out_dir = 'out/slam_large'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-1.5B'
batch_size = 16
global_batch = 256
max_steps = 23_300  # 6.1 B tokens at 262,144 a step
train_hours = 47.0
eval_interval = save_interval = 1000
shard_model = True
