"""GSLM's recipe, a cold start: a transformer of 12 layers with random initial weights, trained on
Libri-Light and LibriSpeech only."""

out_dir = 'out/gslm'
data = 'librilight,librispeech'
init = 'preset:opt-125m'
context = 1024
dropout = 0.1
row_tokens = 8_192
batch_tokens = 81_920  # as Slam: 1.44 B tokens in 17,625 steps, where GSLM saw 1 B
schedule = 'inverse_sqrt'
warmup_fraction = 0.0
warmup_steps = 1000
lr = 5e-4
max_steps = 17_625
train_hours = 24.0
