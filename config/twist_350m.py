"""TWIST-350M by its own recipe, in Slam's budget of one A5000 day: the baseline of the paper.

OPT-350M, context 512, inverse square root, 100 warm-up steps, dropout as in OPT, no synthetic data.
"""

out_dir = 'out/twist_350m'
data = 'librilight,librispeech'
init = 'facebook/opt-350m'
context = 512
dropout = 0.1
# 256 chunks of at most 512 tokens: where chunks of at most 1,024 have 620 on average, these have
# about 385; 256 x 385 = 98,600, here 12 rows of 8,192
row_tokens = 8_192
batch_tokens = 98_304
lr = 1e-3
schedule = 'inverse_sqrt'
warmup_fraction = 0.0
warmup_steps = 100
max_steps = 17_625
train_hours = 24.0  # no DPO
