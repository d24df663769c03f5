"""GSLM's way, a cold start: a transformer of 12 layers trained from random weights on Libri-Light and LibriSpeech alone."""

out_dir = 'out/gslm'
data = 'librilight,librispeech'
init = 'preset:opt-125m'
context = 1024
dropout = 0.1
schedule = 'inverse_sqrt'
warmup_steps = 1000
lr = 5e-4
max_steps = 17625
train_hours = 24.0
