"""Pairs a second of preference tuning against policy and reference on padded batches, on one CPU
thread: python tests/bench_dpo.py

The same pairs, weights, optimizer and steps, in turns; losses are compared first. Ours is given
twice: its steps alone, and with its reference pass over the same pairs, as in a first epoch.
"""

import copy
import os
import sys
import tempfile
from time import process_time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dpo  # noqa: E402
from model import load_slm  # noqa: E402

MICRO = 4  # pairs in a pass of the plain loop: the paper's
PAIRS, ROUNDS = 32, 4  # in turns, so that a busy machine is busy for all; the first round warms up
SIZES = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024)


def random_pairs(n, units):
    """Lengths like SpokenSwag's: a sentence as prompt, completions of 2 to 4 seconds."""
    rng = np.random.default_rng(0)
    lengths = rng.integers((40, 25, 25), (140, 75, 75), (n, 3))
    return [dpo.make_pair(*(rng.integers(0, units, size) for size in row), 1024) for row in lengths]


def padded_logps(model, pairs):
    """Log-probabilities (n, 2) by two sequences a pair, padded on the right to the longest."""
    whole = [np.append(pair[0], pair[branch]) for branch in (1, 2) for pair in pairs]
    tokens = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    mask = torch.zeros(tokens.shape)
    for i, sequence in enumerate(whole):
        tokens[i, : len(sequence)] = torch.from_numpy(sequence)
        mask[i, len(pairs[i % len(pairs)][0]) : len(sequence)] = 1
    logps = model(tokens).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(2, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    return logps.sum(1).view(2, -1).T


def update(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True).step()
    model.zero_grad()


def plain(policy, reference, pairs):
    """The usual trainer: a frozen reference beside the policy, pairs in random order."""
    total = 0
    for start in range(0, len(pairs), MICRO):
        ours = padded_logps(policy, pairs[start : start + MICRO])
        with torch.no_grad():
            theirs = padded_logps(reference, pairs[start : start + MICRO])
        loss = dpo.dpo_loss(ours, theirs, None, 0.1)[0].sum() / len(pairs)
        loss.backward()
        total += loss.item()
    update(policy)
    return total


def packed(model, known, pairs, width):
    """The passes of dpo.py: rows of one width, the prompt shared."""
    total = 0
    for row, indices in dpo.collate(pairs, width):
        policy = model.logps(*row, n=2 * len(indices)).view(-1, 2)
        loss = dpo.dpo_loss(policy, known[indices], None, 0.1)[0].sum() / len(pairs)
        loss.backward()
        total += loss.item()
    update(model)
    return total


def main():
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = load_slm('scratch', vocab_size=202, context=1024, sizes=SIZES)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs, reference = random_pairs(PAIRS, 200), copy.deepcopy(theirs)
    width = dpo.row_width([sum(map(len, pair)) for pair in pairs], PAIRS, 1024, 1, 8)

    def row_logps(row, m):
        return model.logps(*row, n=2 * m).view(m, 2)

    def score():
        return dpo.score_pairs(row_logps, pairs, width, torch.device('cpu'))

    known = score()
    ways = (
        lambda: plain(theirs, reference, pairs),
        lambda: packed(model, known, pairs, width),
        score,
    )
    seconds = np.zeros((ROUNDS, 3))
    for turn in range(ROUNDS):
        losses = []
        for i, way in enumerate(ways):
            begin = process_time()
            losses.append(way())
            seconds[turn, i] = process_time() - begin
        assert abs(losses[0] - losses[1]) < 1e-3, losses
    padded, steps, scores = seconds[1:].min(axis=0)
    for name, time in (('reference known', steps), ('with its reference pass', steps + scores)):
        print(f'dpo.py, {name}: {PAIRS / time:.1f} pairs/s, x {padded / time:.2f} of padded')


if __name__ == '__main__':
    main()
