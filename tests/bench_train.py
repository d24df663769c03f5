"""Useful tokens a second of train.py: python tests/bench_train.py

CPU: a step on packed rows against the loop one would write with transformers (shuffle, pad, AdamW),
with the same weights, in turns. CUDA: the 358 M shape of Slam through train.py itself (flags are
handed on): tokens/s and the hours that Slam's 1.44 B tokens take.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import train  # noqa: E402
from model import BOS, load_slm  # noqa: E402

SLAM = 17_625 * 81_920  # tokens of the recipe
SIZES = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024)


def write_data(folder, n_tokens, low, high, units):
    """Random units, utterances of low to high tokens -> list of them, (n,) uint16 each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, units + 2, n_tokens, dtype=np.uint16)
    borders = np.cumsum(rng.integers(low, high, n_tokens // low))
    borders = borders[borders < n_tokens - low]
    tokens[borders] = tokens[borders - 1] = tokens[0] = tokens[-1] = BOS
    tokens.tofile(os.path.join(folder, 'train.bin'))
    meta = dict(vocab_size=units + 2, n_units=units, offset=2, dtype='uint16', frame_rate=25.0)
    meta |= dict(tokens=dict(train=n_tokens), encoder='mhubert25', vocoder='hifigan25', dedup=True)
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    return np.split(tokens, borders)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    model.zero_grad()


def packed_steps(folder, model, row_tokens):
    """Ours: a row of whole chunks a step. Yields useful tokens, those of utterances."""
    optimizer = train.make_optimizer(model)
    for rows, _, n_tokens, _ in train.Loader(
        train.open_data(folder), 1024, row_tokens, 0
    ).iter_batches(1):
        tokens, targets, doc = rows.transpose(0, 1)
        model(tokens, targets, doc=doc).backward()
        update(model, optimizer)
        yield n_tokens


def padded_steps(utterances, model, row_tokens):
    """Utterances of about as many tokens, in order of a shuffle, padded to the longest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = round(row_tokens * len(utterances) / sum(map(len, utterances)))
    order = np.random.default_rng(0).permutation(len(utterances))
    for at in itertools.count(0, rows):
        batch = [torch.from_numpy(utterances[i].astype(np.int64)) for i in order[at : at + rows]]
        tokens = pad_sequence(batch, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        labels = tokens.masked_fill(mask == 0, -100)
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        update(model, optimizer)
        yield int(mask.sum())


def on_cpu(folder, turns=14):
    from transformers import AutoModelForCausalLM

    for low, high in ((300, 1500), (50, 600)):
        utterances = write_data(folder, 400_000, low, high, 200)
        ours = load_slm('scratch', vocab_size=202, context=1024, sizes=SIZES)
        with tempfile.TemporaryDirectory() as checkpoint:
            ours.save_pretrained(checkpoint, {})
            theirs = AutoModelForCausalLM.from_pretrained(checkpoint).train()
        ways = packed_steps(folder, ours, 4096), padded_steps(utterances, theirs, 4096)
        speeds = np.zeros((turns, 2))
        for turn, way in itertools.product(range(turns), range(2)):
            begin = time.process_time()
            speeds[turn, way] = next(ways[way]) / (time.process_time() - begin)
        packed, padded = np.median(speeds[2:], axis=0)
        print(
            f'utterances of {low} to {high} tokens: packed {packed:,.0f} useful tokens/s | '
            f'transformers, padded {padded:,.0f} | ratio {packed / padded:.2f}'
        )


def on_cuda(folder):
    write_data(folder, 6_000_000, 300, 1500, 500)
    command = [sys.executable, 'train.py', 'config/slam_h200.py', f'--data={folder}']
    command += [f'--out_dir={folder}/run', '--val_data=', '--eval_interval=0', '--save_interval=0']
    command += ['--init=preset:qwen2.5-0.5b', '--max_steps=40', '--log_interval=5']
    subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, check=True)
    with open(f'{folder}/run/log.jsonl') as file:
        rows = [json.loads(line) for line in file]
    speed = float(np.median([row['tokens_per_s'] for row in rows[len(rows) // 2 :]]))
    print(f'{torch.cuda.get_device_name()}: {speed:,.0f} tokens/s: {SLAM / speed / 3600:.2f} h')


if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as data:
        on_cuda(data) if torch.cuda.is_available() else on_cpu(data)
