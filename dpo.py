"""Preference tuning of a speech language model: the last half hour of Slam (arXiv 2502.15814).

The reference model is the policy before the first step. Its log-probabilities are computed once, so
no second model stays in memory. The same command resumes a killed run exactly.

    python dpo.py config/slam_dpo.py             # Table 5: half an hour on one GPU
    python dpo.py config/demo_dpo.py             # the offline demo, under a minute on a CPU
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py

data: JSON lines with prompt, chosen and rejected, each with `units` or, as in the public toolkit,
`audio_repr` ("<Un12><Un7>"). out_dir becomes a checkpoint that transformers can load.
"""

from config import configure

import hashlib
import json
import math
import os
import re
import signal
import time
from collections import Counter
from importlib import import_module
from operator import index

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import (
    BOS,
    EOS,
    OFFSET,
    InputError,
    auto_bleu,
    catch_signals,
    check_encoder_ids,
    content_hash,
    load_slm,
    open_run,
    pack_rows,
    pick_dtype,
    read_json,
    read_jsonl,
    reading,
    split_of,
    start_processes,
    write_atomic,
)

# -----------------------------------------------------------------------------
# Table 5 of the paper
init = 'out/slam'  # the pre-trained model: a folder by train.py, slprl/slam, any SLM of model.py
data = 'data/spokenswag/pairs.jsonl'  # preference pairs; several files are comma-separated
out_dir = 'out/slam-dpo'
loss = 'dpo'  # dpo, ipo, simpo (LOSSES below)
beta = 0.1  # dpo: weight of the KL penalty; ipo: tau, take 1; simpo: scale of the reward, take 2
max_auto_bleu = 0.3  # drop pairs whose text repeats at least this share of its bigrams; 0: keep all
context = 1024  # prompt + completion; prompts lose their beginning, completions their end
rope_theta = 10000.0  # as in pre-training; 0: the value of init
batch_pairs = 64  # pairs in a step, over all devices
row_tokens = 8192  # maximum tokens in one forward pass; lower it to save memory
lr = 5e-5  # peak of AdamW, for 358 M parameters; use 5e-4 for a 1 M model trained from scratch
warmup_steps = 100  # then inverse square root decay; 0: no warm-up, time scale 10,000 steps
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 813  # the run ends after this many steps (0: no limit),
epochs = 3.0  # or after this many passes over the pairs (0: no limit),
train_hours = 0.5  # or hours, including the reference's pass (0: no limit; at least one step runs)
eval_interval = 100  # steps between validations; 0: none
val_pairs = 512  # maximum held out: pairs of a val split, then others, up to a tenth of all pairs
save_interval = 200  # steps between checkpoints; 0: at the end only
resume = True  # continue from out_dir/train_state.pt if it exists; False: start over
log_interval = 10  # steps between reports: a line on the terminal and one in log.jsonl
tracker = ''  # also log to: wandb, trackio
compile = None  # torch.compile; None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of matrix products; auto: bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

# These knobs may change when a run resumes; the others determine its results.
FREE = set(
    'out_dir row_tokens max_steps epochs train_hours eval_interval save_interval resume '
    'log_interval tracker compile device'.split()
)


def dpo_loss(policy, reference, sizes, beta):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    -log sigmoid(beta [log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)])

    policy, reference: (n, 2) log-probabilities in nats of whole completions (chosen, rejected),
    with their final `<S>`, given the prompt. sizes: (n, 2) tokens of each completion.
    Returns: losses (n,) and rewards (n, 2). The margin is the difference of the two rewards.
    """
    rewards = beta * (policy - reference)
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
    return losses, rewards


def ipo_loss(policy, reference, sizes, beta):
    """Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    (h - 1 / (2 tau))^2, where h is the difference of the log-ratios to the reference, each averaged
    over the tokens of its completion, as in the authors' code (according to TRL). beta is tau: the
    target margin is 1 / (2 tau) nats per token. Arguments and results as in dpo_loss.
    """
    rewards = (policy - reference) / sizes
    losses = (rewards[:, 0] - rewards[:, 1] - 1 / (2 * beta)) ** 2
    return losses, rewards


def simpo_loss(policy, reference, sizes, beta, gamma_ratio=0.5):
    """Simple Preference Optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6): no reference.

    -log sigmoid(beta [mean log p of a chosen token - mean log p of a rejected token] - gamma), with
    gamma = gamma_ratio beta, as the authors recommend. Arguments and results as in dpo_loss.
    """
    rewards = beta * policy / sizes
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma_ratio * beta)
    return losses, rewards


LOSSES = dict(dpo=dpo_loss, ipo=ipo_loss, simpo=simpo_loss)


def make_pair(prompt, chosen, rejected, context):
    """The tokens of `<S>` + prompt, chosen + `<S>` and rejected + `<S>`: three int64 arrays.
    If they exceed the context, the prompt loses its beginning, down to half the context, and then
    the completions lose their ends."""
    prompt = np.append(BOS, prompt + OFFSET)
    chosen, rejected = np.append(chosen + OFFSET, EOS), np.append(rejected + OFFSET, EOS)
    longest = max(len(chosen), len(rejected))
    prompt = prompt[-max(context // 2, context - longest) :]
    room = context - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def read_units(part):
    """Units (n,) int64 of a list, of "<Un12><Un7>", or of a dict with either."""
    if isinstance(part, dict):
        part = part['units'] if 'units' in part else part['audio_repr']
    if isinstance(part, str):
        part = [int(unit) for unit in re.findall(r'<Un(\d+)>', part)]
    return np.array([index(unit) for unit in part], np.int64)  # index refuses 1.5


def read_pair(row, n_units):
    """Units of prompt, chosen and rejected; text of prompt + chosen ('' if unknown); split."""
    units = [read_units(row[key]) for key in ('prompt', 'chosen', 'rejected')]
    if any(((part < 0) | (part >= n_units)).any() for part in units):
        raise ValueError(f'its units must be from 0 to {n_units - 1}')
    texts = []
    for key in ('prompt', 'chosen'):
        inner = row[key].get('text') if isinstance(row[key], dict) else None
        texts.append(row.get(key + '_text') or inner or '')
    return units, ' '.join(texts) if texts[1] else '', split_of(row.get('split') or 'train')


def load_pairs(paths, n_units, context, max_auto_bleu, val_pairs):
    """The training pairs, the held-out pairs (both from make_pair), and a Counter of dropped pairs
    by reason and of cut pairs. The order of lines has no effect. InputError names a bad line."""
    found, count = dict(train=[], val=[]), Counter()
    for path in paths.split(','):
        for number, row in read_jsonl(path):
            with reading(f'{path}, line {number}'):
                units, text, split = read_pair(row, n_units)
            pair = make_pair(*units, context)
            if split == 'test':
                count['dropped: test split'] += 1
            elif 0 < max_auto_bleu <= auto_bleu(text):
                count['dropped: auto-BLEU'] += 1
            elif not len(units[1]) or not len(units[2]) or np.array_equal(*pair[1:]):
                count['dropped: empty or equal'] += 1
            else:
                count['cut to the context'] += sum(map(len, pair)) < sum(map(len, units)) + 3
                found[split].append(pair)

    # hold out more pairs if the val split has too few; no pair may be in both sets
    train, val = (sorted(pairs, key=pair_hash) for pairs in found.values())
    short = max(0, min(val_pairs, (len(train) + len(val)) // 10) - len(val))
    train, candidates = train[short:], val + train[:short]
    known = set(map(pair_hash, train))
    val = [pair for pair in candidates if pair_hash(pair) not in known]
    count['dropped from val: also in train'] = len(candidates) - len(val)
    count['dropped from val: beyond val_pairs'] = len(val[val_pairs:])
    return train, val[:val_pairs], count


def pair_hash(pair):
    return hashlib.sha256(np.concatenate(pair).tobytes()).digest()


def iter_batches(lengths, batch_pairs, seed, step):
    """Endless batches of (batch_pairs,) indices, from `step` on. The pairs are sorted by length and
    split into batch_pairs ranges; a batch takes one pair of each range, so all batches have about
    the same number of tokens. Pairs that do not fill a batch are skipped in that epoch."""
    per_epoch = len(lengths) // batch_pairs
    while True:
        rng = np.random.default_rng((seed, step // per_epoch))
        order = rng.permutation(len(lengths))[: per_epoch * batch_pairs]
        by_length = order[np.argsort(lengths[order], kind='stable')]
        batches = rng.permuted(by_length.reshape(batch_pairs, -1), axis=1).T
        yield from batches[step % per_epoch :]
        step += per_epoch - step % per_epoch


def row_width(lengths, batch_pairs, row_tokens, world, multiple=128):
    """The width of all rows: a batch of mean length should fill its rows, except for 2 % that
    packing leaves empty. The number of rows is a multiple of world. 128 suits flex attention."""
    batch_tokens = 1.02 * batch_pairs * float(np.mean(lengths))
    rows = world * math.ceil(batch_tokens / row_tokens / world)
    return math.ceil(max(batch_tokens / rows, *lengths) / multiple) * multiple


def collate(pairs, width):
    """Rows of `width` tokens packed with whole pairs; a row is one forward pass.

    Returns: list of (row, indices). indices: (m,) pairs in the row. row: (6, 1, width) int64: the
    tokens, mask, doc, positions, branch and segments of SLM.logps. Pair k of the row is document
    k + 1, with segments 2 k (chosen) and 2 k + 1 (rejected). Padding is document 0.
    """
    rows = []
    for indices in pack_rows([sum(map(len, pair)) for pair in pairs], width):
        row, end = np.zeros((6, 1, width), np.int64), 0
        for k, i in enumerate(indices):
            for branch, part in enumerate(pairs[i]):  # prompt, chosen, rejected
                start, end = end, end + len(part)
                first = len(pairs[i][0]) if branch else 0  # positions continue after the prompt
                row[0, 0, start:end] = part
                row[3, 0, start:end] = np.arange(first, first + len(part))
                fields = branch > 0, k + 1, branch, 2 * k + (branch == 2)
                row[[1, 2, 4, 5], 0, start:end] = np.array(fields)[:, None]
        rows.append((torch.from_numpy(row), np.array(indices)))
    return rows


def learning_rate(step):
    """The learning rate of a step (from 0): linear warm-up, then inverse_sqrt as in train.py."""
    timescale = warmup_steps or 10_000
    decay = math.sqrt(timescale / (max(step, warmup_steps) + timescale - warmup_steps))
    return lr * min((step + 1) / max(1, warmup_steps), decay)


def to_device(tensor, device):
    """A copy on the device; the copy does not block the CPU."""
    tensor = tensor.pin_memory() if device.type == 'cuda' else tensor
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def score_pairs(row_logps, pairs, width, device, rank=0, world=1):
    """Log-probabilities (len(pairs), 2) on the CPU. The rows are split over the processes."""
    found = torch.zeros(len(pairs), 2, device=device)
    for row, indices in collate(pairs, width)[rank::world]:
        found[to_device(torch.from_numpy(indices), device)] = row_logps(row, len(indices))
    if world > 1:
        dist.all_reduce(found)
    return found.cpu()


def measure(losses, rewards):
    """Sums over pairs, (3,): loss, pairs with a positive margin (a tie counts 1/2), margin."""
    margins = (rewards[:, 0] - rewards[:, 1]).detach()
    return torch.stack((losses.detach().sum(), (margins.sign() + 1).sum() / 2, margins.sum()))


def validate(policy, reference, sizes):
    """Scores of held-out pairs: mean loss, accuracy and margin, and the drift of the chosen
    completions in nats per token. Arguments as in dpo_loss."""
    means = measure(*LOSSES[loss](policy, reference, sizes, beta)) / len(policy)
    drift = (policy - reference)[:, 0].sum() / sizes[:, 0].sum()
    names = 'val_loss', 'val_accuracy', 'val_margin', 'val_drift'
    return dict(zip(names, [*means.tolist(), float(drift)], strict=True))


def format_record(record, last_step, n_val):
    """Format a record of log.jsonl as lines for the terminal."""
    left = (last_step - record['step']) * batch_pairs / record['pairs_per_s']
    line = (
        f'step {record["step"]}/{last_step} | loss {record["loss"]:.4f} | accuracy '
        f'{record["accuracy"]:.1%} | margin {record["margin"]:.3f} | norm {record["norm"]:.2f} | '
        f'lr {record["lr"]:.2e} | {record["pairs_per_s"]:.1f} pairs/s | {left / 60:.0f} min left'
    )
    scores = [f'{key[4:]} {value:.4f}' for key, value in record.items() if key.startswith('val_')]
    if scores:
        line += f'\n  {n_val} pairs held out: {", ".join(scores)} nats per token of the chosen'
    if record.get('val_drift', 0) < -0.3:  # seen to damage models
        line += '\n  WARNING: chosen completions become unlikely; lower --lr or --epochs'
    return line


if __name__ == '__main__':
    config = configure(globals())
    if loss not in LOSSES:
        raise InputError(f'loss {loss!r} is unknown: use {", ".join(LOSSES)}')
    if os.path.realpath(init) == os.path.realpath(out_dir):
        raise InputError(f'init and out_dir are both {init}, which would be overwritten')
    torch_device, rank, world = start_processes(device)
    cuda, torch_dtype = torch_device.type == 'cuda', pick_dtype(dtype, torch_device)

    # Load the model and the pairs. A meta.json beside the pairs names the encoder of their units.
    model = load_slm(init, rope_theta=rope_theta or None)
    if not model.slam or model.slam.get('tokenizer'):
        raise InputError(f'{init} is not a model of units only; pre-train one with train.py')
    beside = [os.path.join(os.path.dirname(path), 'meta.json') for path in data.split(',')]
    ids = {path: read_json(path).get('encoder_id') for path in beside if os.path.exists(path)}
    check_encoder_ids(ids | {init: model.slam.get('encoder_id')})
    limits = model.config.vocab_size - OFFSET, min(context, model.config.max_positions)
    train, val, count = load_pairs(data, *limits, max_auto_bleu, val_pairs)
    notes = [f'; {n} {reason}' for reason, n in count.items() if n]
    print(f'{data}: {len(train)} pairs to train on, {len(val)} held out{"".join(notes)}')
    if len(train) < batch_pairs:
        raise InputError(f'{len(train)} training pairs are fewer than one batch ({batch_pairs})')
    pairs = train + val
    lengths = np.array([sum(map(len, pair)) for pair in pairs])
    sizes = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])
    config['pairs_sha256'] = content_hash(sizes.tolist(), [pair_hash(pair).hex() for pair in pairs])

    # The run ends after the steps, the epochs or the hours, whichever comes first.
    last_step, budget = max_steps or math.inf, 3600 * train_hours or math.inf
    if epochs:
        last_step = min(last_step, max(1, round(epochs * (len(train) // batch_pairs))))

    # Load the state of a stopped run, if there is one.
    state = dict(step=0, elapsed=0.0, seen=0, scores={}, reference=None, config=config)
    state, log_file = open_run(out_dir, state, resume, FREE, rank)  # this locks out_dir
    step, elapsed, seen, scores = (state[key] for key in ('step', 'elapsed', 'seen', 'scores'))

    # All rows have the same width, so the model is compiled once.
    width = row_width(lengths, batch_pairs, row_tokens, world, multiple=128 if cuda else 8)
    slots = width // 5  # maximum pairs in a row: the shortest is 5 tokens, <S> and twice unit + <S>
    model.to(torch_device)
    compiled = cuda if compile is None else compile
    logps = torch.compile(model.logps, dynamic=False) if compiled else model.logps
    autocast = torch.autocast(torch_device.type, torch_dtype, enabled=torch_dtype != torch.float32)

    def row_logps(row, m):  # (m, 2): chosen and rejected of the m pairs in a row
        with autocast:
            return logps(*to_device(row, torch_device), n=2 * slots).view(slots, 2)[:m]

    # Report the plan.
    machine = torch.cuda.get_device_name(torch_device) if cuda else torch_device.type
    print(f'{init}: {model.num_params():,} parameters on {world} x {machine}, {torch_dtype}')
    print(f'steps {step} to {last_step} of {batch_pairs} pairs, rows of {width} tokens', flush=True)
    run = None
    if tracker and rank == 0:
        run = import_module(tracker).init(project='slam', config=config)

    # The reference is the policy before its first step; the checkpoint keeps its log-probabilities.
    reference, clock = state['reference'], time.perf_counter()
    if reference is None:
        reference = score_pairs(row_logps, pairs, width, torch_device, rank, world)
        elapsed = time.perf_counter() - clock
    adamw = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
    if step:
        model.load_state_dict(state['model'])
        adamw.load_state_dict(state['optimizer'])
    del state  # it holds a copy of the model
    for parameter in model.parameters():  # a process may have no row in a step
        parameter.grad = torch.zeros_like(parameter)
    slam = dict(model.slam, stage='dpo', recipe=dict(config, pretraining=model.slam.get('recipe')))

    stopping = catch_signals()
    batches = iter_batches(lengths[: len(train)], batch_pairs, seed, step)
    sums = torch.zeros(4, device=torch_device)  # of measure and norm, since the last report
    last_report, clock = step, time.perf_counter()
    over, halt = step >= last_step or (step > 0 and elapsed >= budget), 0

    while not over and not halt:
        # Accumulate the gradient of the mean loss per pair; the rows are split over the processes.
        batch = next(batches)
        for row, indices in collate([train[i] for i in batch], width)[rank::world]:
            policy = row_logps(row, len(indices))
            known = to_device(reference[batch[indices]], torch_device)
            tokens = to_device(sizes[batch[indices]], torch_device)
            losses, rewards = LOSSES[loss](policy, known, tokens, beta)
            (losses.sum() / batch_pairs).backward()
            sums[:3] += measure(losses, rewards) / batch_pairs
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)

        # Clip and step. The CPU does not wait for the device until the next report.
        sums[3] += torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        adamw.param_groups[0]['lr'] = rate = learning_rate(step)
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        step, seen = step + 1, seen + int(lengths[batch].sum())
        intervals = eval_interval, save_interval, log_interval
        evaluate, save, report = (each and step % each == 0 for each in intervals)
        alone = stopping and world == 1  # several processes stop at the same report
        if not (evaluate or save or report or alone or step == last_step):
            continue

        # Read the sums, which waits for the device. The clock of rank 0 counts.
        n, (*means, norm) = step - last_report, (sums / (step - last_report)).tolist()
        took = time.perf_counter() - clock
        numbers = [*means, elapsed + took if rank == 0 else 0, len(stopping)]
        if world > 1:
            numbers = torch.tensor(numbers, dtype=torch.float64, device=torch_device)
            dist.all_reduce(numbers)
        *means, elapsed, halt = map(float, numbers)
        if not math.isfinite(sum(means) + norm):
            known = f'the loss is not finite at step {step}; the last checkpoint is kept'
            raise InputError(f'{known}. Causes: a high --lr, a short warm-up, a damaged --init')
        over = step >= last_step or elapsed >= budget
        record = dict(step=step, **dict(zip(('loss', 'accuracy', 'margin'), means, strict=True)))
        record |= dict(norm=norm, lr=rate, tokens=seen, elapsed=round(elapsed, 2))
        record['pairs_per_s'] = round(batch_pairs * n / took, 2)

        # Validate at intervals and at the end, and log.
        if val and eval_interval and (evaluate or over):
            policy = score_pairs(row_logps, val, width, torch_device, rank, world)
            scores = validate(policy, reference[len(train) :], sizes[len(train) :])
            record |= (scores := scores | dict(step=step, tokens=seen))
        log_file.write(json.dumps(record) + '\n')
        if run:
            run.log({key: record[key] for key in record if key != 'step'}, step=step)
        print(format_record(record, last_step, len(val)), flush=True)

        # Save the checkpoint and the state for an exact resume.
        if rank == 0 and (save or over or halt):
            compute = dict(devices=world, device=machine, hours=elapsed / 3600, tokens=seen)
            compute['pretraining'] = model.slam.get('compute')
            slam |= dict(scores=scores, compute=compute)
            state = dict(step=step, elapsed=elapsed, seen=seen, scores=scores, reference=reference)
            state |= dict(model=model.state_dict(), optimizer=adamw.state_dict(), config=config)
            model.save_pretrained(out_dir, slam)
            with write_atomic(os.path.join(out_dir, 'train_state.pt'), 'wb') as file:
                torch.save(state, file)
        sums.zero_()
        last_report, clock = step, time.perf_counter()

    log_file.close()
    if world > 1:  # a process that ends alone can abort the others
        dist.barrier()
        dist.destroy_process_group()
    print(f'{out_dir}: {step} steps of {batch_pairs} pairs, {elapsed / 60:.1f} min')
    if not over:
        print('stopped and saved; run the same command to continue')
        raise SystemExit(128 + (stopping or [signal.SIGTERM])[0])
