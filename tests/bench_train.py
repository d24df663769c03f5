"""Useful tokens a second of train.py, in one run beside a plain loop: python tests/bench_train.py

CPU: against transformers' model of the same weights, padded batches, torch's AdamW, no packing. CUDA: the 358 M shape of Slam (or what
is given as flags to train.py), tokens/s, MFU, the hours that 1.4 B tokens take, and the five operations that cost most; under 5 minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import numpy as np
import torch

import train
from model import BOS, SLM, SLMConfig

GOAL = 1.4e9  # tokens, Table 4
PRODUCT = 790e12  # FLOP/s of a large bf16 product on an H200


def write_data(folder, n_tokens, low, high, units):
    """Random units, utterances of low to high tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, units + 2, n_tokens, dtype=np.uint16)
    borders = np.cumsum(rng.integers(low, high, n_tokens // low))
    borders = borders[borders < n_tokens - low]
    tokens[borders] = tokens[borders - 1] = tokens[0] = tokens[-1] = BOS
    tokens.tofile(os.path.join(folder, 'train.bin'))
    meta = dict(
        vocab_size=units + 2,
        n_units=units,
        offset=2,
        dtype='uint16',
        tokens=dict(train=n_tokens),
        dedup=True,
        frame_rate=25.0,
        encoder='mhubert25',
        vocoder='hifigan25',
    )
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    return np.split(tokens, borders)


def ours(data, *flags):
    """Median tokens/s of train.py's own log, all of them useful: there is no padding."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            'train.py',
            *flags,
            f'--data={data}',
            f'--out_dir={out}/run',
            '--eval_interval=0',
            '--save_interval=0',
        ]
        subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=None if torch.cuda.is_available() else subprocess.PIPE,
        )
        rows = [json.loads(line) for line in open(f'{out}/run/log.jsonl')]
        return float(np.median([row['tokens_per_s'] for row in rows[len(rows) // 3 :]]))


def side_by_side(data, utterances, config, rows, steps):
    """Useful tokens/s of train.py's step and of the loop that one would write (shuffle, pad, transformers' model, AdamW), in turns."""
    from transformers import AutoModelForCausalLM

    model = SLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        theirs = AutoModelForCausalLM.from_pretrained(folder).train()
    (optimizer,) = train.make_optimizers(model, 'adamw', 1e-3, (0.9, 0.999), 1e-8, 0.0)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    batches, order = (
        train.Loader(train.open_data(data), 1024, 0).batches(2, 2),
        np.random.default_rng(0).permutation(len(utterances)),
    )

    def packed(step):
        batch = next(batches)
        tokens, targets, doc = batch['micro'][0]
        model(tokens, targets, doc=doc).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        model.zero_grad()
        return tokens.numel()

    def padded(step):
        batch = [
            torch.from_numpy(utterances[i].astype(np.int64))
            for i in order[step * rows : (step + 1) * rows]
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(one) for one in batch], batch_first=True
        )
        theirs(
            input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        their_optimizer.step()
        their_optimizer.zero_grad()
        return int(mask.sum())

    speeds = {packed: [], padded: []}
    for step in range(steps):
        for way in speeds:
            begin = time.perf_counter()
            useful = way(step)
            speeds[way].append(useful / (time.perf_counter() - begin))
    return [float(np.median(speed[2:])) for speed in speeds.values()]


def profile(batch_size, context, data):
    """The five operations that take the GPU longest in three steps of the 358 M shape."""
    model = SLM.from_preset('qwen2.5-0.5b', context=context).cuda()
    (optimizer,) = train.make_optimizers(model, 'adamw', 1e-3, (0.9, 0.999), 1e-8, 0.0)
    batches = train.Loader(train.open_data(data), context, 0).batches(batch_size, batch_size)
    model.compile(dynamic=False)

    def step():
        tokens, targets, doc = next(batches)['micro'][0].cuda()
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(tokens, targets, doc=doc)
        loss.backward()
        optimizer.step()
        model.zero_grad()

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    for row in rows[:5]:
        print(f'{row.self_device_time_total / total:6.1%}  {row.key[:120]}')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as data:
        if torch.cuda.is_available():
            write_data(data, 6_000_000, 300, 1500, 500)
            flags = [
                'config/slam_h200.py',
                '--init=preset:qwen2.5-0.5b',
                '--max_steps=40',
                '--log_interval=5',
                *sys.argv[1:],
            ]
            begin, speed = time.time(), ours(data, *flags)
            flops = SLM.from_preset('qwen2.5-0.5b').flops_per_token(700)
            name = torch.cuda.get_device_name()
            peak = next(
                (1e12 * tflops for key, tflops in train.PEAK.items() if key in name), float('nan')
            )
            print(
                f'{name}: {speed:,.0f} tokens/s, MFU {speed * flops / peak:.1%} of the data sheet, '
                f'{speed * flops / PRODUCT:.1%} of {PRODUCT / 1e12:.0f} TFLOP/s; {GOAL / 1e9} B tokens in {GOAL / speed / 3600:.2f} h'
            )
            profile(64, 1024, data)
            print(f'{time.time() - begin:.0f} s in all')
        else:
            utterances = write_data(data, 400_000, 50, 600, 200)
            config = SLMConfig(
                vocab_size=202, n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024
            )
            a, b = side_by_side(
                data, utterances, config, 6, 24
            )  # 6 utterances are about as many tokens as 2 rows of 1,024
            print(
                f'packed {a:,.0f} useful tokens/s, plain loop {b:,.0f}, ratio {a / b:.2f} (medians of 22 steps in turns)'
            )
