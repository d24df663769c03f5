"""Pairs scored a second: eval_slm's packed rows beside padded batches of 32 in file order.

    python tests/bench_eval.py [PAIRS]

Lengths are log-normal, as spoken sentences are (median 70 tokens, sigma 0.7), drawn anew for each
round; the model has the demo's depth. Both ways give the same likelihoods. Goal: ratio 3. Run it on
a quiet machine.
"""

import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval_slm import log_likelihoods  # noqa: E402
from model import load_slm  # noqa: E402

SIZES = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024)


def draw_utterances(rng, pairs):
    """Units of two utterances a pair."""
    lengths = np.clip(rng.lognormal(np.log(70), 0.7, 2 * pairs), 5, 900).astype(int)
    return [rng.integers(0, 500, n) for n in lengths]


@torch.inference_mode()
def score_padded(slm, utterances, batch=32):
    """The plain way: padding on the right, which causal attention never sees."""
    device = next(slm.parameters()).device
    sums = []
    for start in range(0, len(utterances), batch):
        part = [torch.tensor([1, *(u + 2), 1]) for u in utterances[start : start + batch]]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        mask = (tokens != 0).long()
        mask[:, 0] = 0
        sums.append(slm.logps(tokens, mask))
    return torch.cat(sums).double().cpu().numpy()


if __name__ == '__main__':
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    slm = load_slm('scratch', vocab_size=502, context=1024, sizes=SIZES).eval().to(device)
    rng = np.random.default_rng(0)
    ways = dict(packed=lambda x: log_likelihoods(slm, x)[0], padded=lambda x: score_padded(slm, x))
    seconds = {name: [] for name in ways}
    for turn in range(4):  # the first round is to warm up, on as many pairs
        utterances = draw_utterances(rng, pairs)
        results = []
        for name, way in ways.items():
            began = time.perf_counter()
            results.append(way(utterances))
            seconds[name] += [time.perf_counter() - began] if turn else []
        apart = np.abs(results[0] - results[1]).max()
    ours, plain = (pairs / min(spent) for spent in seconds.values())
    print(f'packed {ours:.1f} pairs/s, padded batches of 32 {plain:.1f}, ratio {ours / plain:.2f}')
    print(f'({device}, {torch.get_num_threads()} threads; at most {apart:.1e} nats apart)')
