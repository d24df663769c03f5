"""Pairs per second of preference tuning: ours against a loop that runs policy and reference at every step on padded batches.

    python tests/bench_dpo.py          # about a minute; the same pairs, model, optimizer and steps in one run

Ours is given twice: its steps alone, and charged with its reference pass over the same pairs, as in a first run of one epoch. On the
CPU one thread and CPU seconds are counted, so that what else the machine does matters little.
"""

import copy
import os
import sys
import tempfile
from time import perf_counter, process_time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dpo  # noqa: E402
from model import EOS, OFFSET, SLM, SLMConfig, pick_device, pick_dtype  # noqa: E402

STEPS, BATCH, ACCUMULATION, CONTEXT, UNITS = 1, 4, 8, 1024, 200


def random_pairs(n, rng):
    """Lengths like SpokenSwag's: a sentence as prompt, some 18 tokens a second, completions of 2 to 4 seconds."""
    draw = lambda low, high: rng.integers(OFFSET, UNITS + OFFSET, rng.integers(low, high))
    return [
        (np.append(EOS, draw(40, 140)), np.append(draw(25, 75), EOS), np.append(draw(25, 75), EOS))
        for _ in range(n)
    ]


def step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def padded_logps(logits_of, pairs, device):
    """Log-probabilities (n, 2) of a batch of chosen and rejected sequences, right-padded to the longest."""
    sequences = [np.concatenate((pair[0], pair[side])) for side in (1, 2) for pair in pairs]
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.float32)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.from_numpy(sequence)
        mask[i, len(pairs[i % len(pairs)][0]) : len(sequence)] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    logps = logits_of(tokens)[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (logps * mask[:, 1:]).sum(1).view(2, -1).T


def plain(model, logits_of, pairs, batches, device, autocast):
    """The usual trainer: the frozen reference beside the policy, padded micro-batches of BATCH pairs. Returns the loss of each step."""
    reference, optimizer, losses = (
        copy.deepcopy(model),
        torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0),
        [],
    )
    for batch in batches:
        total = 0.0
        for micro in np.split(batch, ACCUMULATION):
            chunk = [pairs[i] for i in micro]
            with autocast():
                policy = padded_logps(lambda tokens: logits_of(model, tokens), chunk, device)
                with torch.no_grad():
                    known = padded_logps(lambda tokens: logits_of(reference, tokens), chunk, device)
            loss = dpo.dpo_loss(*policy.T, *known.T)[0].sum() / len(batch)
            loss.backward()
            total += loss.item()
        step(model, optimizer)
        losses.append(total)
    return losses


def known_once(model, pairs, batches, width, device, autocast):
    """The reference pass of dpo.py: log-probabilities (n, 2) of each batch."""
    with torch.no_grad(), autocast():
        return [
            sum(
                model.logps(*one_pass.to(device), n=2 * len(batch))
                for one_pass in dpo.lay_out([pairs[i] for i in batch], width, 1)
            ).view(-1, 2)
            for batch in batches
        ]


def ours(model, known, pairs, batches, width, device, autocast):
    """The steps of dpo.py: packed rows, the prompt shared. Returns the loss of each step."""
    optimizer, losses = (
        torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True),
        [],
    )
    for batch, reference in zip(batches, known):
        total = 0.0
        for one_pass in dpo.lay_out([pairs[i] for i in batch], width, 1):
            with autocast():
                part = model.logps(*one_pass.to(device), n=2 * len(batch)).view(-1, 2)
            loss = torch.where(
                part[:, 0] != 0, dpo.dpo_loss(*part.T, *reference.T)[0], 0
            ).sum() / len(batch)
            loss.backward()
            total += loss.item()
        step(model, optimizer)
        losses.append(total)
    return losses


if __name__ == '__main__':
    from transformers import AutoModelForCausalLM

    device = pick_device()
    dtype = pick_dtype('auto', device)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    pairs, n = (
        random_pairs(STEPS * BATCH * ACCUMULATION, np.random.default_rng(0)),
        BATCH * ACCUMULATION,
    )
    lengths = np.array([sum(map(len, pair)) for pair in pairs])
    batches = dpo.deal(lengths, n, 0, 0)
    width, filled = dpo.choose_width(lengths, batches, CONTEXT // 2, 1)
    clock = perf_counter if device.type == 'cuda' else process_time
    if device.type == 'cpu':
        torch.set_num_threads(1)
    model = SLM(
        SLMConfig(
            n_layer=4,
            n_embd=256,
            n_head=4,
            n_kv_head=2,
            n_ffn=1024,
            vocab_size=UNITS + OFFSET,
            context=CONTEXT,
        )
    ).to(device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    twice = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    print(
        f'{len(pairs)} pairs, {twice:,} tokens as two sequences, {int(lengths.sum()):,} with the prompt once; rows of {width}, {filled:.1%} filled; '
        f'{model.num_params():,} parameters on {device}, {torch.get_num_threads()} threads'
    )
    known = known_once(model, pairs, batches, width, device, autocast)
    runs = {
        'policy + reference, padded (transformers)': lambda: plain(
            copy.deepcopy(hf), lambda m, t: m(t).logits, pairs, batches, device, autocast
        ),
        'policy + reference, padded (our SLM)': lambda: plain(
            copy.deepcopy(model), lambda m, t: m(t), pairs, batches, device, autocast
        ),
        'dpo.py, reference known': lambda: ours(
            copy.deepcopy(model), known, pairs, batches, width, device, autocast
        ),
        'reference pass': lambda: known_once(model, pairs, batches, width, device, autocast),
    }
    seconds, results = {name: [] for name in runs}, {}
    for turn in range(4):  # in turns, so that a busy machine is busy for all; the first warms up
        for name, one in runs.items():
            begun = clock()
            results[name] = one()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            seconds[name] += [clock() - begun] * (turn > 0)
    losses = list(results.values())[:3]
    assert all(
        np.allclose(losses[0], other, atol=1e-3 if dtype == torch.float32 else 2e-2)
        for other in losses
    ), losses
    best = {name: min(times) for name, times in seconds.items()}
    best['dpo.py, reference pass included'] = best['dpo.py, reference known'] + best.pop(
        'reference pass'
    )
    for name, time in best.items():
        print(
            f'{name:42s} {len(pairs) / time:7.1f} pairs/s   x {list(best.values())[0] / time:.2f}'
        )
