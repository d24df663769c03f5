"""Slam (scaled), section 6: the same recipe on two A100 for 48 hours, the batch doubled, 16.7 B tokens.

torchrun --nproc_per_node=2 train.py config/slam_scaled.py
"""

out_dir = 'out/slam_scaled'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-0.5B'
batch_size = 32  # fills 80 GB with room; the global batch does not depend on it
global_batch = 256
max_steps = 63_700  # 16.7 B tokens at 262,144 a step
train_hours = 47.0  # the last hour is dpo.py's
eval_interval = save_interval = 1000
