"""Slam's recipe on one H200 (141 GB): the same model, batch and steps as on the A5000, in the hours the hardware needs.

Two passes a step instead of sixteen; max_steps ends the run. tests/bench_train.py measures the speed of this shape.
"""

out_dir = 'out/slam_h200'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-0.5B'
batch_size = 64
global_batch = 128
max_steps = 17625
train_hours = 23.5
