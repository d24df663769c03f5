"""Pairs per second of preference tuning: ours against policy and reference on padded batches.

    python tests/bench_dpo.py      # a minute on a CPU; on CUDA the 358 M model, compiled, in bf16

The same pairs, weights, optimizer and steps; losses are compared first. Ours is given twice: its
steps alone, and charged with its reference pass over the same pairs, as in a first epoch. On a CPU
one thread and CPU seconds are counted, so that what else the machine does matters little.
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
from model import SLM, SLMConfig, pick_device, pick_dtype  # noqa: E402

MICRO = 4  # pairs in a pass of the plain loop: the paper's
ROUNDS = 4  # of all ways in turn, so that a busy machine is busy for all; the first warms up


def random_pairs(n, units):
    """Lengths like SpokenSwag's: a sentence as prompt, completions of 2 to 4 seconds."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(n):
        lengths = rng.integers((40, 25, 25), (140, 75, 75))
        pairs.append(dpo.make_pair(*(rng.integers(0, units, length) for length in lengths), 1024))
    return pairs


def padded_logps(logits_of, pairs, device):
    """Log-probabilities (n, 2) by two sequences a pair, padded on the right to the longest."""
    sequences = []
    for branch in (1, 2):
        for pair in pairs:
            sequences.append((pair.tokens[pair.branch != 3 - branch], sum(pair.branch == 0)))
    longest = max(len(tokens) for tokens, _ in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest)
    for i, (sequence, n_prompt) in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.from_numpy(sequence)
        mask[i, n_prompt : len(sequence)] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    logps = logits_of(tokens)[:, :-1].float().log_softmax(-1)
    logps = logps.gather(2, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    return logps.sum(1).view(2, -1).T


def finish_step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def plain(model, compiled, pairs, batches, device, autocast):
    """The usual trainer: a frozen reference beside the policy, pairs of a step in random order.

    Returns the loss of each step. (deal_batches leaves a lone batch sorted by length.)
    """
    batches = np.random.default_rng(1).permuted(batches, axis=1)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    calls = policy, reference
    if compiled:
        calls = [torch.compile(each, dynamic=True) for each in calls]

    def logits_of(call):
        def logits(tokens):
            out = call(tokens)
            return out if isinstance(out, torch.Tensor) else out.logits

        return logits

    losses = []
    for batch in batches:
        total = 0
        for start in range(0, len(batch), MICRO):
            chunk = [pairs[i] for i in batch[start : start + MICRO]]
            with autocast():
                ours = padded_logps(logits_of(calls[0]), chunk, device)
                with torch.no_grad():
                    theirs = padded_logps(logits_of(calls[1]), chunk, device)
            loss = dpo.dpo_loss(ours, theirs, None, 0.1)[0].sum() / len(batch)
            loss.backward()
            total = total + loss.detach()
        finish_step(policy, optimizer)
        losses.append(total)
    return torch.stack(losses).tolist()


class Packed:
    """The passes of dpo.py: rows of one width, the prompt shared."""

    def __init__(self, model, compiled, pairs, batches, device, autocast):
        self.model, self.device, self.autocast = model, device, autocast
        lengths = np.array([len(pair.tokens) for pair in pairs])
        # a GPU wants one long row, a CPU rows that its caches hold
        row_tokens, multiple = (8192, 128) if device.type == 'cuda' else (1024, 8)
        self.width = dpo.row_width(lengths, batches.shape[1], row_tokens, 1, multiple)
        self.pairs, self.batches, self.slots = pairs, batches, self.width // 5
        self.logps = torch.compile(model.logps, dynamic=False) if compiled else model.logps

    def row_logps(self, row, m):
        with self.autocast():
            row = dpo.to_device(row, self.device)
            return self.logps(*row, n=2 * self.slots).view(-1, 2)[:m]

    def reference_pass(self):
        return dpo.score(self.row_logps, self.pairs, self.width, self.device)

    def steps(self, known):
        """The losses of the steps from the model's first weights, which are put back after."""
        first = copy.deepcopy(self.model.state_dict())
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=5e-5, weight_decay=0.0, fused=True
        )
        losses = []
        for batch in self.batches:
            total = 0
            for row, indices in dpo.lay_out([self.pairs[i] for i in batch], self.width):
                policy = self.row_logps(row, len(indices))
                reference = dpo.to_device(known[batch[indices]], self.device)
                loss = dpo.dpo_loss(policy, reference, None, 0.1)[0].sum() / len(batch)
                loss.backward()
                total = total + loss.detach()
            finish_step(self.model, optimizer)
            losses.append(total)
        losses = torch.stack(losses).tolist()
        self.model.load_state_dict(first)
        return losses


def main():
    from transformers import AutoModelForCausalLM

    device = pick_device()
    cuda = device.type == 'cuda'
    dtype = pick_dtype('auto', device)
    if cuda:  # the paper's model and step
        model, n_steps, batch_pairs = SLM.from_preset('qwen2.5-0.5b'), 8, 64
        torch.set_float32_matmul_precision('high')
    else:
        shape = dict(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, n_ffn=1024, vocab_size=202)
        model, n_steps, batch_pairs = SLM(SLMConfig(**shape)), 1, 32
        torch.set_num_threads(1)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.to(device)
    pairs = random_pairs(n_steps * batch_pairs, model.config.vocab_size - 2)
    lengths = np.array([len(pair.tokens) for pair in pairs])
    batches = dpo.deal_batches(lengths, batch_pairs, 0, 0)
    packed = Packed(model, cuda, pairs, batches, device, autocast)
    known = packed.reference_pass()
    print(
        f'{n_steps} steps of {batch_pairs} pairs, {lengths.mean():.0f} tokens each; rows of '
        f'{packed.width}; {model.num_params():,} parameters on {device}, {dtype}'
    )

    ways = {
        'policy + reference, padded (transformers)': lambda: plain(
            theirs, cuda, pairs, batches, device, autocast
        ),
        'policy + reference, padded (our SLM)': lambda: plain(
            model, cuda, pairs, batches, device, autocast
        ),
        'dpo.py, reference known': lambda: packed.steps(known),
        'reference pass': packed.reference_pass,
    }
    clock = perf_counter if cuda else process_time
    seconds, results = {name: [] for name in ways}, {}
    for turn in range(ROUNDS):
        for name, way in ways.items():
            if cuda:
                torch.cuda.synchronize()
            begun = clock()
            results[name] = way()  # ends by reading its results, which waits for the device
            if turn:
                seconds[name].append(clock() - begun)

    expected, *others = list(results.values())[:3]
    for losses in others:
        assert np.allclose(expected, losses, atol=2e-2 if cuda else 1e-3), (expected, losses)
    best = {name: min(times) for name, times in seconds.items()}
    best['dpo.py, reference pass included'] = sum(list(best.values())[2:])
    del best['reference pass']
    slowest = next(iter(best.values()))
    for name, time in best.items():
        print(f'{name:42s} {len(pairs) / time:7.1f} pairs/s   x {slowest / time:.2f}')


if __name__ == '__main__':
    main()
