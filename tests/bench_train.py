"""Useful tokens a second of train.py beside two plain loops: python tests/bench_train.py

CPU: our step on packed rows, against the loop one would write with transformers (shuffle, pad,
AdamW), and against fixed windows of a stream of all utterances (nanoGPT's way, where documents see
each other), all with the same weights, in turns. CUDA: the 358 M shape of Slam through train.py
itself (flags are handed on): tokens/s, MFU, the hours that Slam's 1.44 B tokens take.
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
from model import BOS, SLM, SLMConfig  # noqa: E402

SLAM = 17_625 * 81_920  # tokens of the recipe
REACHABLE = 790e12  # FLOP/s of a large bf16 product on an H200
UNITS = 200


def write_data(folder, n_tokens, low, high, units):
    """Random units, utterances of low to high tokens -> list of them, (n,) uint16 each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, units + 2, n_tokens, dtype=np.uint16)
    borders = np.cumsum(rng.integers(low, high, n_tokens // low))
    borders = borders[borders < n_tokens - low]
    tokens[borders] = tokens[borders - 1] = tokens[0] = tokens[-1] = BOS
    tokens.tofile(os.path.join(folder, 'train.bin'))
    meta = dict(vocab_size=units + 2, n_units=units, offset=2, dtype='uint16')
    meta |= dict(tokens=dict(train=n_tokens), dedup=True, frame_rate=25.0)
    meta |= dict(encoder='mhubert25', vocoder='hifigan25')
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    return np.split(tokens, borders)


def their_model(model):
    """transformers' model of the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        return AutoModelForCausalLM.from_pretrained(folder).train()


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    model.zero_grad()


def packed_steps(folder, config, row_tokens):
    """Ours: a row of whole chunks a step. Yields useful tokens, those of utterances."""
    model = SLM(config)
    [optimizer] = train.make_optimizers(model)
    for step in train.Loader(train.open_data(folder), 1024, row_tokens, 0).steps(1):
        tokens, targets, doc = step['passes'].transpose(0, 1)
        model(tokens, targets, doc=doc).backward()
        update(model, optimizer)
        yield step['tokens']


def padded_steps(utterances, config, row_tokens):
    """Utterances of about as many tokens, in order of a shuffle, padded to the longest."""
    model = their_model(SLM(config))
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


def window_steps(utterances, config, row_tokens):
    """Windows of 1,024 tokens at random places of the stream: no padding, documents mixed."""
    model = their_model(SLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream = torch.from_numpy(np.concatenate(utterances).astype(np.int64))
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(stream) - 1024, row_tokens // 1024)
        tokens = torch.stack([stream[start : start + 1024] for start in starts])
        model(input_ids=tokens, labels=tokens).loss.backward()
        update(model, optimizer)
        yield tokens.numel()


def in_turns(ways, turns):
    """Median useful tokens a second of each way, the first two turns left out."""
    speeds = [[] for _ in ways]
    for _ in range(turns):
        for way, speed in zip(ways, speeds, strict=True):
            begin = time.perf_counter()
            useful = next(way)
            speed.append(useful / (time.perf_counter() - begin))
    return [float(np.median(speed[2:])) for speed in speeds]


def on_cpu(folder):
    for low, high in ((300, 1500), (50, 600)):
        utterances = write_data(folder, 400_000, low, high, UNITS)
        size = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024)
        config = SLMConfig(vocab_size=UNITS + 2, **size)
        ways = packed_steps(folder, config, 4096), padded_steps(utterances, config, 4096)
        ours, padded, windows = in_turns([*ways, window_steps(utterances, config, 4096)], 14)
        print(
            f'utterances of {low} to {high} tokens: ours {ours:,.0f} useful tokens/s | padded '
            f'{padded:,.0f}, ratio {ours / padded:.2f} | fixed windows {windows:,.0f}, ratio '
            f'{ours / windows:.2f}'
        )


def on_cuda(folder):
    write_data(folder, 6_000_000, 300, 1500, 500)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, 'train.py', 'config/slam_h200.py', f'--data={folder}']
        command += [f'--out_dir={out}/run', '--val_data=', '--eval_interval=0', '--save_interval=0']
        command += ['--init=preset:qwen2.5-0.5b', '--max_steps=40', '--log_interval=5']
        subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, check=True)
        with open(f'{out}/run/log.jsonl') as file:
            rows = [json.loads(line) for line in file]
    speed = float(np.median([row['tokens_per_s'] for row in rows[len(rows) // 2 :]]))
    flops = SLM.from_preset('qwen2.5-0.5b').flops_per_token(700)
    name = torch.cuda.get_device_name()
    peak = 1e12 * next((train.PEAK[key] for key in train.PEAK if key in name), float('nan'))
    print(
        f'{name}: {speed:,.0f} tokens/s, MFU {speed * flops / peak:.1%} of the data sheet, '
        f'{speed * flops / REACHABLE:.1%} of {REACHABLE / 1e12:.0f} TFLOP/s; '
        f"Slam's {SLAM / 1e9:.2f} B tokens in {SLAM / speed / 3600:.2f} h"
    )


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as data:
        if torch.cuda.is_available():
            on_cuda(data)
        else:
            on_cpu(data)
