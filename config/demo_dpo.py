# The demo's preference tuning: under a minute on two CPU cores.   python dpo.py config/demo_dpo.py
init = 'out/demo/slm'
data = 'out/demo/units/pairs.jsonl'
out_dir = 'out/demo/dpo'
context = 512
batch_pairs = 16
row_tokens = 1024  # such rows fit in the caches of a CPU
lr = 5e-4  # a model of 0.46 M parameters tolerates a higher rate than one of 358 M
warmup_steps = 10
max_steps = 80
train_hours = 0  # no limit: the same scores on every machine
eval_interval = 30
val_pairs = 64
save_interval = 30
log_interval = 5
