"""Pairs scored a second: eval_slm's packed rows beside padded batches of 32 in file order. By hand: python tests/bench_eval.py

Lengths are log-normal, as spoken sentences are (median 70 tokens, sigma 0.7); the model has the demo's family and depth. Both ways give the same
likelihoods. On a busy machine the ratio of wall times says little: run it alone.
"""

import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval_slm import log_likelihoods  # noqa: E402
from model import SLM, SLMConfig  # noqa: E402

N = int(sys.argv[1]) if len(sys.argv) > 1 else 256  # pairs
device = 'cuda' if torch.cuda.is_available() else 'cpu'
slm = (
    SLM(
        SLMConfig(
            family='qwen2',
            n_layer=4,
            n_embd=256,
            n_head=4,
            n_kv_head=2,
            n_ffn=1024,
            vocab_size=502,
            context=1024,
        )
    )
    .eval()
    .to(device)
)


@torch.inference_mode()
def padded(utterances, batch=32):
    sums = []
    for start in range(0, len(utterances), batch):
        some = [torch.tensor([1, *(u + 2), 1]) for u in utterances[start : start + batch]]
        tokens = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(
            device
        )  # padding on the right: causal attention never sees it
        mask = (tokens != 0).long()
        mask[:, 0] = 0
        sums.append(slm.logps(tokens, mask))
    return torch.cat(sums).double().cpu().numpy()


def best(function, utterances, repeats=3):
    """Seconds of the fastest run, and what it gave."""
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function(utterances)
        runs.append(time.perf_counter() - began)
    return min(runs), result


rng = np.random.default_rng(0)
utterances = [
    rng.integers(0, 500, n)
    for n in np.clip(rng.lognormal(np.log(70), 0.7, 2 * N), 5, 900).astype(int)
]
ours, a = best(lambda x: log_likelihoods(slm, x)[0], utterances)
plain, b = best(padded, utterances)
print(
    f'packed {N / ours:.1f} pairs/s, padded batches of 32 {N / plain:.1f} pairs/s, ratio {plain / ours:.2f} '
    f'({device}, {torch.get_num_threads()} threads; largest difference {np.abs(a - b).max():.1e} nats)'
)
