"""Slam's recipe on one H200 (141 GB): the model, batch and steps of the A5000, in the hours that
this hardware needs. tests/bench_train.py measures the speed of this shape."""

out_dir = 'out/slam_h200'
data = 'librilight,librispeech,stinystories'
init = 'Qwen/Qwen2.5-0.5B'
row_tokens = 40_960  # two passes a step instead of ten
batch_tokens = 81_920
max_steps = 17_625
train_hours = 23.5
