"""TWIST-350M by its own recipe, in Slam's budget of one A5000 day: the baseline that Slam is compared with.

OPT-350M, context 512, inverse square root, 100 warmup steps, dropout as in OPT, no synthetic data.
"""

out_dir = 'out/twist_350m'
data = 'librilight,librispeech'
init = 'facebook/opt-350m'
context = 512
dropout = 0.1
batch_size = 16
global_batch = 256
lr = 1e-3
schedule = 'inverse_sqrt'
warmup_fraction = 0.0
warmup_steps = 100
max_steps = 17625
train_hours = 24.0  # no DPO
