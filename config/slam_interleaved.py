"""Section 4.3 of the paper: text, speech and spans of both in one model, one A5000, 24 hours. The
text LM's vocabulary stays, so each step takes longer: about 11,000 steps instead of 17,625.

    python prepare_units.py --from_units=data/stinystories/units.jsonl --out=data/mixed \\
        --text_lm=Qwen/Qwen2.5-0.5B --texts=WEB_CORPUS.parquet,...
    python prepare_units.py --from_units=data/NAME/units.jsonl --out=data/mixed-NAME \\
        --text_lm=Qwen/Qwen2.5-0.5B                           for librilight and librispeech
"""

out_dir = 'out/slam_interleaved'
# one third of the tokens each: speech (in the proportions of the sets), text, and interleaved
data = (
    'mixed-librilight/speech:0.61,mixed-librispeech/speech:0.01,mixed/speech:0.38,'
    'mixed/text,mixed/interleaved'
)
balanced = True
val_data = 'mixed-librispeech/speech,mixed-librilight/speech,mixed/text,mixed/interleaved'
init = 'Qwen/Qwen2.5-0.5B'
rope_theta = 10000.0
context = 1024
row_tokens = 8_192
batch_tokens = 81_920
max_steps = 11_000
train_hours = 24
lr = 1e-3
min_lr = 5e-5
schedule = 'cosine'
warmup_fraction = 0.01
warmup_steps = 100
grad_clip = 0.5
optimizer = 'adamw'
beta1, beta2, eps, weight_decay = 0.9, 0.999, 1e-8, 0.0
dropout = 0.0
