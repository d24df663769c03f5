# The demo's preference tuning: under a minute on two CPU cores.   python dpo.py config/demo_dpo.py
init = 'out/demo/slm'
data = 'out/demo/units/pairs.jsonl'
out_dir = 'out/demo/dpo'
context = 512
batch_size = 2                # x 8 = 16 pairs a step
accumulation = 8
lr = 2e-4                     # a model of 4 M parameters bears more than one of 358 M
warmup_steps = 5
max_steps = 40
train_hours = 0.0
eval_interval = 20
val_pairs = 64
save_interval = 20
log_interval = 5
