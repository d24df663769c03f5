"""Preference tuning of a speech language model: the last half hour of Slam (arXiv 2502.15814).

Notable: no second model. Before the first step the policy is the reference, so its
log-probabilities are computed once and kept beside the pairs. A pair is one document in which
chosen and rejected follow the same prompt, computed once; rows are packed with whole pairs. No
step waits for the GPU; a run killed at any moment goes on exactly when the command is repeated.

    python dpo.py config/slam_dpo.py             # Table 5: half an hour on one GPU
    python dpo.py config/demo_dpo.py             # the offline demo, under a minute on a CPU
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py

data: JSON lines of prepare_units.py or of the public toolkit: prompt, chosen and rejected, each
with `units` or `audio_repr` ("<Un12><Un7>"). out_dir becomes a checkpoint that transformers loads:
always the best so far by held-out loss, the pre-trained model itself if nothing was better, and
no checkpoint that a warning was given for. train_state.pt goes on from the last step; log.jsonl.
"""

from config import configure, fail

import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import (
    BOS,
    EOS,
    OFFSET,
    SLM,
    InputError,
    add_up,
    auto_bleu,
    catch_signals,
    check_knobs,
    explain_memory,
    format_time,
    git_commit,
    load_run,
    open_log,
    pack_rows,
    pick_dtype,
    read_jsonl,
    save_run,
    say,
    start_processes,
    start_wandb,
    stop_processes,
    sum_over_processes,
    to_hf_config,
    tokenize_words,
    write_atomic,
)

# -----------------------------------------------------------------------------
# Table 5 of the paper
init = 'out/slam'  # the pre-trained model: a folder of train.py, slprl/slam, any SLM of model.py
data = 'data/spokenswag/pairs.jsonl'  # preference pairs; several files with commas
out_dir = 'out/slam-dpo'
loss = 'dpo'  # dpo, ipo, simpo (LOSSES below)
beta = 0.1  # dpo: the price of leaving the reference; ipo: tau, take 1; simpo: a scale, take 2
sft_weight = 0.0  # of a next-token loss on the chosen completions, which holds their likelihood up
max_auto_bleu = 0.3  # pairs whose words repeat such a share of their bigrams are dropped; 0: keep
max_unit_bleu = 0.0  # the same of units, for pairs without text; 0: keep
context = 1024  # tokens of prompt + completion: prompts lose their beginning, completions their end
rope_theta = 10000.0  # of the pre-training; 0: what init says
batch_pairs = 64  # pairs in a step, over all devices
row_tokens = 8192  # at most in a pass: as for train.py, what memory bears
lr = 5e-5  # peak, of AdamW, for 358 M parameters; a model of 1 M from scratch takes 5e-4
warmup_steps = 100  # then the inverse square root; 0: none, and a time scale of 10,000 steps
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 813  # the run ends at this many steps (0: no limit),
epochs = 3.0  # or passes over the pairs (0: no limit),
train_hours = (
    0.5  # or hours, the reference's pass counted once (0: no limit); at least one step runs
)
eval_interval = 100  # steps between validations; 0: none
val_pairs = 512  # held out at most: those with split 'val', and others up to a tenth of all
save_interval = 200  # steps between checkpoints; 0: at the end alone
resume = True  # continue from out_dir/train_state.pt if there is one; False: start over
log_interval = 10  # steps between lines on the terminal
wandb = False  # also log to Weights & Biases (pip install wandb)
compile = None  # torch.compile; None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

# What may differ when a run is continued: all else decides what the run computes.
FREE = set(
    'out_dir row_tokens max_steps epochs train_hours eval_interval save_interval resume '
    'log_interval wandb compile device'.split()
)
HELD_OUT = ('val', 'validation', 'valid', 'dev')  # names of a split; test and the like are unused
FEW = 50  # held-out pairs: below this a percentage means little
SINKING = 0.3  # nats a token: chosen completions that much less likely than before are damage
SAMPLES, SAMPLE_TOKENS = 32, 50  # drawn at each validation, always with the same seed
REPEATS = 0.005  # of the units sampled: so many more immediate repeats than before are damage


# -----------------------------------------------------------------------------
# The loss


def dpo_loss(policy, reference, sizes, beta):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    -log sigmoid(beta [log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)])

    policy, reference: (n, 2) log-probabilities in nats of whole completions, chosen and rejected,
    with their `<S>`, given the prompt. sizes: (n, 2) their tokens. The n pairs are those of one
    row, not of the batch: a loss is a function of its pair alone.
    Returns: losses (n,), rewards (n, 2) whose difference is the margin.
    """
    rewards = beta * (policy - reference)
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
    return losses, rewards


def ipo_loss(policy, reference, sizes, beta):
    """Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    (h - 1 / (2 tau))^2, h the difference of the log-ratios to the reference, each a mean over the
    tokens of its completion, as the authors computed it (says TRL). beta is their tau: the margin
    aimed at is 1 / (2 tau) nats a token. Arguments and results as in dpo_loss.
    """
    rewards = (policy - reference) / sizes
    losses = (rewards[:, 0] - rewards[:, 1] - 1 / (2 * beta)) ** 2
    return losses, rewards


def simpo_loss(policy, reference, sizes, beta, gamma_ratio=0.5):
    """Simple Preference Optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6): no reference.

    -log sigmoid(beta [mean log p of a chosen token - mean log p of a rejected one] - gamma), with
    gamma = gamma_ratio beta, as the authors advise. Arguments and results as in dpo_loss.
    """
    rewards = beta * policy / sizes
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma_ratio * beta)
    return losses, rewards


# name -> the function, and whether it reads `reference`; to add a loss, add both
LOSSES = {
    'dpo': (dpo_loss, True),
    'ipo': (ipo_loss, True),
    'simpo': (simpo_loss, False),
}


# -----------------------------------------------------------------------------
# Pairs


class Pair(NamedTuple):
    """A preference pair as one document, (T,) each: prompt (branch 0), chosen (1), rejected (2)."""

    tokens: np.ndarray
    branch: np.ndarray
    positions: np.ndarray  # chosen and rejected both go on where the prompt ends
    sizes: tuple  # tokens of chosen and of rejected, the log-probabilities of which count


def make_pair(prompt, chosen, rejected, context):
    """The Pair of three arrays of units, cut so that `<S>` + prompt + either + `<S>` <= context.

    The prompt loses its beginning, down to half the context, then completions lose their ends.
    """
    prompt = np.append(BOS, prompt + OFFSET)
    chosen, rejected = np.append(chosen + OFFSET, EOS), np.append(rejected + OFFSET, EOS)
    longest = max(len(chosen), len(rejected))
    prompt = prompt[-max(context // 2, context - longest) :]
    room = context - len(prompt)
    chosen, rejected = chosen[:room], rejected[:room]

    before, after = np.arange(len(prompt)), np.arange(len(prompt), context)  # positions
    return Pair(
        tokens=np.concatenate((prompt, chosen, rejected)),
        branch=np.repeat((0, 1, 2), (len(prompt), len(chosen), len(rejected))),
        positions=np.concatenate((before, after[: len(chosen)], after[: len(rejected)])),
        sizes=(len(chosen), len(rejected)),
    )


def read_units(part):
    """Units (n,) int64 of a list, of "<Un12><Un7>", or of a dict with either.

    Raises KeyError, TypeError or ValueError where it is none of these.
    """
    if isinstance(part, dict):
        part = part['units'] if 'units' in part else part['audio_repr']
    if isinstance(part, str):
        part = [int(unit) for unit in re.findall(r'<Un(\d+)>', part)]
    units = np.array(part)
    if units.ndim != 1 or units.size and units.dtype.kind != 'i':
        raise TypeError('units are no list of whole numbers')
    return units.astype(np.int64)


def read_pairs(path):
    """Yields (units of prompt, chosen, rejected; split; words of prompt + chosen) of each line.

    Without text there are no words: []. Raises InputError naming file and line.
    """
    if not os.path.isfile(path):
        raise InputError(f'no pairs {path!r}: prepare_units.py makes preference pairs, see --data')
    for number, row in read_jsonl(path):
        texts = []
        try:
            units = [read_units(row[key]) for key in ('prompt', 'chosen', 'rejected')]
            for key in ('prompt', 'chosen'):
                inner = row[key].get('text') if isinstance(row[key], dict) else None
                texts.append(row.get(key + '_text') or inner or '')
            words = tokenize_words(' '.join(texts)) if texts[1] else []
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f'{path}, line {number}: no preference pair ({type(error).__name__}: {error}): it '
                f'takes prompt, chosen and rejected, each with "units" or "audio_repr"'
            ) from None
        yield units, row.get('split'), words


def load_pairs(paths, n_units, context, max_auto_bleu, max_unit_bleu, val_pairs):
    """The pairs to train on, those held out, and a Counter of what was met on the way.

    Both lists are in an order of their own, by a hash of the tokens: the lines' order is nothing.
    """
    train, val, count = [], [], Counter()
    for path in paths.split(','):
        for units, split, words in read_pairs(path):
            count['read'] += 1
            prompt, chosen, rejected = units
            together = np.concatenate(units)
            strange = together[(together < 0) | (together >= n_units)]
            if len(strange):
                raise InputError(
                    f'{path} has unit {strange[0]}, the model knows 0 to {n_units - 1}: encode the '
                    f'pairs with the encoder of the model'
                )
            if split and split != 'train' and split not in HELD_OUT:
                count['others'] += 1
                continue
            said, limit = words, max_auto_bleu
            if not words:
                said, limit = np.append(prompt, chosen).tolist(), max_unit_bleu
            if 0 < limit <= auto_bleu(said):
                count['repetitive'] += 1
                continue
            pair = make_pair(prompt, chosen, rejected, context)
            completions = [pair.tokens[pair.branch == branch] for branch in (1, 2)]
            if not len(chosen) or not len(rejected) or np.array_equal(*completions):
                count['unusable'] += 1
                continue
            count['truncated'] += len(pair.tokens) < len(together) + 3
            if split in HELD_OUT:
                val.append(pair)
            else:
                train.append(pair)

    for pairs in (train, val):
        pairs.sort(key=lambda pair: hashlib.sha256(pair.tokens.tobytes()).digest())
    short = max(0, min(val_pairs, (len(train) + len(val)) // 10) - len(val))
    return train[short:], (val + train[:short])[:val_pairs], count


# -----------------------------------------------------------------------------
# Batches


def deal_batches(lengths, batch_pairs, seed, epoch):
    """The batches of an epoch, (len(lengths) // batch_pairs, batch_pairs) indices, all about even.

    Of the pairs sorted by length each batch gets one, at random, of every stretch. The pairs left
    over sit this epoch out.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // batch_pairs * batch_pairs]
    by_length = order[np.argsort(lengths[order], kind='stable')]
    return rng.permuted(by_length.reshape(batch_pairs, -1), axis=1).T


def row_width(lengths, batch_pairs, row_tokens, world, multiple=128):
    """The width of all rows: a batch of mean length fills so many, a multiple of the processes.

    2 % is kept free for what packing leaves. multiple: 128 is what flex attention wants.
    """
    batch_tokens = 1.02 * batch_pairs * float(np.mean(lengths))
    rows = world * math.ceil(batch_tokens / row_tokens / world)
    tokens = max(batch_tokens / rows, max(lengths))
    return math.ceil(tokens / multiple) * multiple


def lay_out(pairs, width):
    """Rows of `width` tokens packed with whole pairs; a row is one forward pass.

    Returns: list of (row, indices). indices: (m,) the pairs in this row. row: (6, 1, width) int64,
    the tokens, mask, doc, positions, branch and segments of SLM.logps: the k-th pair of the row is
    document k + 1 and counts in segments 2 k (chosen) and 2 k + 1 (rejected). What is left of a
    row is document 0, masked out.
    """
    passes = []
    for indices in pack_rows([len(pair.tokens) for pair in pairs], width):
        row = np.zeros((6, 1, width), np.int64)
        tokens, mask, doc, positions, branch, segments = row[:, 0]
        start = 0
        for k, i in enumerate(indices):
            end = start + len(pairs[i].tokens)
            tokens[start:end] = pairs[i].tokens
            mask[start:end] = pairs[i].branch > 0
            doc[start:end] = k + 1
            positions[start:end] = pairs[i].positions
            branch[start:end] = pairs[i].branch
            segments[start:end] = 2 * k + (pairs[i].branch == 2)
            start = end
        passes.append((torch.from_numpy(row), np.array(indices)))
    return passes


# -----------------------------------------------------------------------------
# Model and measures


def learning_rate(step, peak, warmup_steps):
    """The rate of a step (from 0): a linear warmup, then the inverse square root.

    peak * sqrt(timescale / (step + timescale - warmup)), timescale = warmup or 10,000.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    timescale = warmup_steps or 10_000
    return peak * math.sqrt(timescale / (step + timescale - warmup_steps))


def fingerprint(model, pairs, dtype):
    """What the reference's log-probabilities are a function of, as hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([to_hf_config(model.config), str(dtype)]).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().data)
    for pair in pairs:
        digest.update(pair.tokens.tobytes() + pair.branch.tobytes())
    return digest.hexdigest()


def to_device(tensor, device):
    """A copy on the device that is made while it works."""
    tensor = tensor.pin_memory() if device.type == 'cuda' else tensor
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def score(row_logps, pairs, width, device, rank=0, world=1, name=None):
    """Log-probabilities (len(pairs), 2) on the CPU; the processes share the rows."""
    found = torch.zeros(len(pairs), 2, device=device)
    passes = lay_out(pairs, width)[rank::world]
    for row, indices in tqdm(passes, name, unit='row', disable=not name or rank > 0):
        found[to_device(torch.from_numpy(indices), device)] = row_logps(row, len(indices))
    if world > 1:
        dist.all_reduce(found)
    return found.cpu()


def keep_reference(path, known, seconds, rank):
    """Write the reference's log-probabilities (pairs, 2), and the seconds that they took."""
    if not known.isfinite().all():
        fail(f'{init} gives some pairs no finite log-probability: are its weights whole?')
    if rank == 0:
        with write_atomic(path, 'wb') as file:
            torch.save((known, seconds), file)
    say(f'reference: {len(known)} pairs in {format_time(seconds)}, kept in {path}', rank)


def describe(lengths, n_val, last_step, width):
    """What the pairs mean for the run: a line for the banner, and a line for each warning.

    lengths: tokens of each pair to train on. n_val: pairs to validate on. last_step: or infinity.
    width: tokens of a row.
    """
    n_epochs = last_step / (len(lengths) // batch_pairs)
    filled = lengths.mean() * batch_pairs / width  # rows that a batch takes
    line = f'{last_step:,} steps of {batch_pairs} pairs, {n_epochs:.3g} epochs'
    if train_hours:
        line += f', or {format_time(3600 * train_hours)}'
    lines = [f'{line}; rows of {width} tokens, {filled / math.ceil(filled):.0%} filled']
    if 3 < n_epochs < math.inf:
        lines.append(
            f'WARNING: {n_epochs:.3g} epochs: few pairs are soon known by heart; --epochs=3'
        )
    if warmup_steps > last_step:
        lines.append(f'WARNING: a warm-up of {warmup_steps} steps never ends in {last_step}')
    if 0 < n_val < FEW:
        points = 98 / math.sqrt(n_val)  # 95 % of the time, at an accuracy of one half
        lines.append(f'WARNING: accuracy of {n_val} pairs means little: ± {points:.0f} points')
    return lines


def measure(losses, rewards):
    """Sums over pairs, (3,): loss, pairs won (a tie is half of one), margin of the rewards."""
    margins = (rewards[:, 0] - rewards[:, 1]).detach()
    return torch.stack((losses.detach().sum(), (margins.sign() + 1).sum() / 2, margins.sum()))


def measure_samples(model, prompts):
    """Of short continuations: dict of units, the share of immediate repeats, and auto-BLEU.

    The same draws every time, repeats allowed, by the model as it is. auto-BLEU: the mean over
    samples, of bigrams of units.
    """
    room = max(1, model.config.context - SAMPLE_TOKENS)
    prompts = [torch.from_numpy(prompt[:room]) for prompt in prompts]
    how = dict(repetition_penalty=1.0, seed=0, ban_repeats=False)
    samples = model.generate(prompts, SAMPLE_TOKENS, **how)
    units = sum(map(len, samples))
    repeats = 0
    for prompt, sample in zip(prompts, samples, strict=True):
        line = torch.cat((prompt[-1:], sample))
        repeats += int((line[1:] == line[:-1]).sum())
    bleu = sum(auto_bleu(sample.tolist()) for sample in samples) / len(samples)
    return dict(units=units, repeats=repeats / max(1, units), auto_bleu=bleu)


def format_record(record, last_step):
    """The line on the terminal of a record of log.jsonl."""
    parts = [f'step {record["step"]}/{last_step}']
    if record['loss'] is not None:
        parts += [f'loss {record["loss"]:.4f}', f'accuracy {record["accuracy"]:.1%}']
        parts += [f'margin {record["margin"]:.3f}', f'norm {record["norm"]:.2f}']
    if 'skipped' in record:
        parts.append(f'{record["skipped"]} not finite, skipped')
    parts += [f'lr {record["lr"]:.2e}', f'{record["pairs_per_s"]:.1f} pairs/s']
    return ' | '.join(parts)


def format_validation(scores, before, n_pairs):
    """The lines on the terminal of a validation, n beside every percentage."""
    return (
        f'  {n_pairs} pairs held out: loss {scores["val_loss"]:.4f}, accuracy '
        f'{scores["val_accuracy"]:.1%}, margin {scores["val_margin"]:.3f}, drift of the chosen '
        f'{scores["val_drift"]:+.3f} nats a token\n'
        f'  {scores["val_units"]:,} units sampled: immediate repeats {scores["val_repeats"]:.1%} '
        f'(before {before["val_repeats"]:.1%}), auto-BLEU {scores["val_auto_bleu"]:.1%} '
        f'(before {before["val_auto_bleu"]:.1%})'
    )


def find_damage(scores, before):
    """What a user must be told, each a line that names the remedy: none if all is well."""
    damage = []
    if scores['val_drift'] < -SINKING:
        damage.append(f'chosen completions lost {-scores["val_drift"]:.2f} nats a token')
    if scores['val_repeats'] > before['val_repeats'] + REPEATS:
        damage.append(f'immediate repeats are {scores["val_repeats"]:.1%} of the units sampled')
    return [f'{line}: lower --lr, fewer --epochs, or --sft_weight=0.1' for line in damage]


if __name__ == '__main__':
    config = configure(globals())

    # --- what the knobs say, held against what can be done, before anything is read or built
    least = dict(beta=1e-9, context=4, batch_pairs=1, row_tokens=1, lr=1e-12, log_interval=1)
    check_knobs(config, least, {})
    if loss not in LOSSES:
        fail(f'loss {loss!r} is unknown: use {", ".join(LOSSES)}')
    preference_loss, needs_reference = LOSSES[loss]
    explain_memory(f'lower --row_tokens={row_tokens} (the batch stays) or --context={context}')
    torch_device, rank, world = start_processes(device)
    cuda, torch_dtype = torch_device.type == 'cuda', pick_dtype(dtype, torch_device)

    # --- the model, which is its own reference until the first step, and the pairs
    model = SLM.from_pretrained(init, rope_theta=rope_theta or None)
    if not model.slam:
        fail(f'{init} is no speech language model: pre-train one with train.py --init={init}')
    if model.slam.get('tokenizer'):
        fail(f'{init} is an interleaved model: what is tuned here are models of units alone')
    n_units = model.config.vocab_size - OFFSET
    train, val, count = load_pairs(data, n_units, context, max_auto_bleu, max_unit_bleu, val_pairs)
    say(
        f'{data}: {count["read"]} pairs; dropped {count["repetitive"]} by auto-BLEU, '
        f'{count["unusable"]} empty or equal, {count["others"]} of other splits; '
        f'{count["truncated"]} truncated; {len(val)} held out, {len(train)} to train on',
        rank,
    )
    if len(train) < batch_pairs:
        fail(f'{data}: {len(train)} pairs to train on are no batch: lower --batch_pairs')
    pairs = train + val
    lengths = np.array([len(pair.tokens) for pair in pairs])
    sizes = torch.tensor([pair.sizes for pair in pairs])  # (pairs, 2)

    # --- how long the run is: steps, epochs or hours, whichever end first
    per_epoch = len(train) // batch_pairs
    budget = 3600 * train_hours or math.inf  # seconds
    last_step = max_steps or math.inf
    if epochs:
        last_step = min(last_step, max(1, round(epochs * per_epoch)))
    if last_step == budget == math.inf:
        fail('max_steps, epochs and train_hours are all 0: one of them must end the run')
    validating = bool(val and eval_interval)

    # --- where a run of this command stopped before
    key = fingerprint(model, pairs, torch_dtype)
    state = dict(step=0, elapsed=0.0, seen=0, skipped=0, scores={}, before={}, best=math.inf)
    state |= dict(best_step=0, key=key, model=None, optimizer=None)
    if resume:
        state = load_run(out_dir, state, config, FREE)
    if state['key'] != key:
        remedy = 'choose another --out_dir, or --resume=False to start over'
        fail(f'{out_dir} is a run with other weights in init or other pairs: {remedy}')
    step, elapsed, seen = state['step'], state['elapsed'], state['seen']
    skipped, scores, best = state['skipped'], state['scores'], state['best']
    before, best_step = state['before'], state['best_step']
    if step >= last_step or (step and elapsed >= budget):
        done = f'finished before, {step} steps in {format_time(elapsed)}, {scores}'
        say(f'{out_dir}: {done}; nothing to do (--resume=False starts over)', rank)
        stop_processes(world)
        raise SystemExit

    # --- how log-probabilities are computed: rows of one width, so that one compilation does
    width = row_width(lengths, batch_pairs, row_tokens, world, multiple=128 if cuda else 8)
    slots = width // 5  # for the pairs of a row: the shortest is <S>, then twice a unit and <S>
    compiled = cuda if compile is None else compile
    model.to(torch_device)
    logps = torch.compile(model.logps, dynamic=False) if compiled else model.logps

    mixed = torch_dtype != torch.float32
    autocast = torch.autocast(torch_device.type, torch_dtype, enabled=mixed)

    def row_logps(row, m):
        """Log-probabilities (m, 2) of chosen and rejected of the m pairs in a row."""
        with autocast:
            return logps(*to_device(row, torch_device), n=2 * slots).view(slots, 2)[:m]

    # --- the reference's log-probabilities, once, before the policy moves or takes up a former run
    os.makedirs(out_dir, exist_ok=True)
    beside = os.path.dirname(data.split(',')[0]) or '.'
    folder = beside if os.access(beside, os.W_OK) else out_dir
    cache = os.path.join(folder, f'reference-{key[:16]}.pt')
    clock = time.perf_counter()
    if not needs_reference:  # but those held out, to see how far the chosen drift
        known = torch.full((len(pairs), 2), math.nan)
        known[len(train) :] = score(row_logps, val, width, torch_device, rank, world)
    elif os.path.exists(cache):
        known, seconds = torch.load(cache, weights_only=True)
        say(f'reference: known from {cache}', rank)
    else:
        known = score(row_logps, pairs, width, torch_device, rank, world, 'reference')  # (pairs, 2)
        seconds = time.perf_counter() - clock
        keep_reference(cache, known, seconds, rank)
    elapsed = elapsed or time.perf_counter() - clock

    # --- the optimizer, and where the former run was
    params = list(model.parameters())
    adamw = torch.optim.AdamW(params, lr, weight_decay=0.0, fused=True)
    if state['model']:
        model.load_state_dict(state['model'])
        adamw.load_state_dict(state['optimizer'])
    del state  # its tensors are a copy of the file's
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)

    # --- what will be done is said before it is
    machine = torch.cuda.get_device_name(torch_device) if cuda else torch_device.type
    say(f'{init}: {model.num_params():,} parameters on {world} x {machine}, {torch_dtype}', rank)
    for line in describe(lengths[: len(train)], len(val) if validating else 0, last_step, width):
        say(line, rank)
    if step:
        say(f'going on at step {step}', rank)

    # what the checkpoint says of itself, the log, and the first signal that stops the run
    recipe = dict(config, pretraining=model.slam.get('recipe'))
    slam = model.slam | dict(stage='dpo', recipe=recipe, git_commit=git_commit())
    log_file = open_log(out_dir, step, rank)
    tracker = start_wandb(config) if wandb and rank == 0 else None
    stopping = catch_signals(rank)

    # --- validation: what is held out, and samples, against what they were
    def validate():
        """Scores by name; before the first step they are what later ones are held against."""
        policy = score(row_logps, val, width, torch_device, rank, world)
        reference, tokens = known[len(train) :], sizes[len(train) :]
        losses, rewards = preference_loss(policy, reference, tokens, beta)
        loss, accuracy, margin = (measure(losses, rewards) / len(val)).tolist()
        drift = float((policy - reference)[:, 0].sum() / tokens[:, 0].sum())
        scores = dict(val_loss=loss, val_accuracy=accuracy, val_margin=margin, val_drift=drift)
        prompts = [pair.tokens[pair.branch == 0] for pair in (val + train)[:SAMPLES]]
        for name, value in measure_samples(model, prompts).items():
            scores[f'val_{name}'] = value
        return scores

    # --- the loop
    totals = torch.zeros(7, device=torch_device)  # of measure and norm: model.add_up
    batches, first_step, clock, halt = None, step, time.perf_counter(), 0
    if validating and not step:
        scores = before = validate()
        best = before['val_loss']
        log_file.write(json.dumps(dict(step=0, **scores)) + '\n')
        say(format_validation(scores, before, len(val)), rank)
    over = False
    while step < last_step and not over and not halt:
        # the pairs of this step, in rows of which each process takes every world-th
        epoch, number = divmod(step, per_epoch)
        if batches is None or number == 0:
            batches = deal_batches(lengths[: len(train)], batch_pairs, seed, epoch)
        batch = batches[number]  # (batch_pairs,)
        n_chosen = int(sizes[batch, 0].sum())

        # gradients of the mean loss over the pairs, a row at a time
        values = torch.zeros(3, device=torch_device)
        for row, indices in lay_out([train[i] for i in batch], width)[rank::world]:
            members = batch[indices]
            policy = row_logps(row, len(members))  # (m, 2)
            reference = to_device(known[members], torch_device)
            tokens = to_device(sizes[members], torch_device)
            losses, rewards = preference_loss(policy, reference, tokens, beta)
            likelihood = policy[:, 0].sum() / n_chosen
            (losses.sum() / batch_pairs - sft_weight * likelihood).backward()
            values += measure(losses, rewards) / batch_pairs
        if world > 1:
            for tensor in (values, *(parameter.grad for parameter in params)):
                dist.all_reduce(tensor)

        # clip, and step unless the gradient is not finite: fused AdamW reads that on the device
        # and leaves all as it is
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        adamw.found_inf = 1 - norm.isfinite().float()
        adamw.param_groups[0]['lr'] = rate = learning_rate(step, lr, warmup_steps)
        adamw.step()
        adamw.zero_grad(set_to_none=False)

        # what is known adds up on the device: nothing above had to wait for it
        totals = add_up(totals, torch.cat((values, norm[None])))
        step, seen = step + 1, seen + int(lengths[batch].sum())
        if compiled and step == first_step + 1:  # compiling is not training
            totals.tolist()
            clock = time.perf_counter()
        evaluate = validating and step % eval_interval == 0
        keep = save_interval and step % save_interval == 0
        alone = stopping and world == 1  # several processes must stop after the same step
        if not (evaluate or keep or alone or step == last_step or step % log_interval == 0):
            continue

        # --- now and then: read the numbers, agree with the other processes on clock and end
        *sums, good, bad, in_a_row = totals.tolist()  # here the host waits for the device
        took = time.perf_counter() - clock
        clock_of_first = elapsed + took if rank == 0 else 0
        numbers = [clock_of_first, len(stopping)]
        elapsed, halt = sum_over_processes(numbers, torch_device)
        over = step >= last_step or elapsed >= budget
        skipped += round(bad)
        pace = took / max(1, good + bad)  # seconds a step
        record = dict(step=step, lr=rate, tokens=seen, elapsed=round(elapsed, 2))
        record |= dict(pairs_per_s=round(batch_pairs / pace, 2))
        for name, total in zip(('loss', 'accuracy', 'margin', 'norm'), sums, strict=True):
            record[name] = total / good if good else None
        if bad:
            record['skipped'] = round(bad)
        damage = []
        if validating and (evaluate or over):
            scores = validate()
            damage = find_damage(scores, before)
            record |= scores
            record |= dict(damage=damage)

        log_file.write(json.dumps(record) + '\n')
        if tracker:
            tracker.log(record, step=step)
        left = min((last_step - step) * pace, budget - elapsed)
        line = format_record(record, last_step)
        say(f'{line} | {format_time(max(0, left))} left', rank)
        if validating and (evaluate or over):
            say(format_validation(scores, before, len(val)), rank)
        for line in damage:
            say(f'WARNING: {line}', rank)
        if in_a_row >= 10 or over and in_a_row > step / 2:
            fail(f'{in_a_row:.0f} steps in a row were not finite: lower --lr')

        # checkpoints: the best by held-out loss, if nothing is wrong with it
        compute = dict(devices=world, device=machine, hours=elapsed / 3600, tokens=seen)
        compute['pretraining'] = model.slam.get('compute')
        slam |= dict(scores=dict(scores, step=step, tokens=seen), compute=compute)
        if record.get('val_loss', math.inf) < best and not damage:
            best, best_step = record['val_loss'], step
            if rank == 0:
                save_run(os.path.join(out_dir, 'best'), model, slam)

        # out_dir is the best so far, at first the pre-trained model; the state is where to go on
        if rank == 0 and (keep or over or halt):
            kept, kept_slam = model, slam
            if validating:
                where = os.path.join(out_dir, 'best') if best_step else init
                kept = SLM.from_pretrained(where, rope_theta=rope_theta or None)
                kept_slam = kept.slam
            state = dict(step=step, elapsed=elapsed, seen=seen, skipped=skipped, scores=scores)
            state |= dict(before=before, best=best, best_step=best_step, key=key, config=config)
            state |= dict(model=model.state_dict(), optimizer=adamw.state_dict())
            save_run(out_dir, kept, kept_slam, state)
        totals[:6] = 0
        clock = time.perf_counter()

    # --- the end
    log_file.close()
    stop_processes(world)
    result = f'{out_dir}: {step} steps of {batch_pairs} pairs, {format_time(elapsed)}'
    if skipped:
        result += f', {skipped} steps skipped'
    if not over:
        if rank == 0:
            print(f'{result}; stopped and saved, the same command continues', file=sys.stderr)
        raise SystemExit(128 + (stopping or [signal.SIGTERM])[0])
    if validating and best_step:
        result += f', of which step {best_step} is kept: held-out loss {best:.4f}'
    elif validating:
        result += f'; no step was better than {init}, which it holds unchanged'
    say(result, rank)
