"""Pre-train a speech language model: the 24-hour recipe of Slam (arXiv 2502.15814), every ablation.

Notable: utterances stay whole (a chunk is never cut to fill a row, and sees itself alone), a batch
is counted in tokens, a run is as long as its steps or its hours, whichever end first, and goes on
exactly where it was killed, on any number of GPUs. No step waits for the device: its numbers are
read every log_interval steps. Weights are fp32, products bf16: small updates survive.

    python train.py config/demo.py                                    # minutes on a CPU
    python train.py config/slam_a5000.py --data=librilight,librispeech,stinystories
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py        # the same batch, shared

out_dir becomes a checkpoint that transformers loads (config.json, model.safetensors, slam.json,
and encoder/ and vocoder/ if the units have their own) with train_state.pt to go on from and
log.jsonl; out_dir/best is the best by validation. The same command continues a killed run.
"""

from config import configure, fail

import itertools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from model import (
    BOS,
    PAD,
    PARTS,
    SLM,
    InputError,
    SLMConfig,
    add_up,
    catch_signals,
    check_knobs,
    explain_memory,
    format_time,
    git_commit,
    load_run,
    open_log,
    pack_rows,
    pick_dtype,
    save_run,
    say,
    start_processes,
    start_wandb,
    stop_processes,
    sum_over_processes,
)

# -----------------------------------------------------------------------------
# Table 4 of the paper, and from the public configuration what it leaves out
out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'  # folders of prepare_units.py, or names below data_dir
#   'a:2,b:0.5' shows all of a twice and half of b in an epoch
balanced = False  # instead, weights are shares of the tokens of an epoch, whatever a set's size
val_data = 'librispeech,librilight'  # sets whose val split validates: real speech; '': data's own
data_dir = 'data'
init = 'Qwen/Qwen2.5-0.5B'  # a text LM (TWIST) or an SLM: a folder or a hub name;
#   'preset:NAME': the shape alone of a model of Table 7; 'scratch': this shape:
family = 'qwen2'  # a name in model.FAMILIES
n_layer = 4
n_embd = 256
n_head = 4
n_kv_head = 2
n_ffn = 1024
embed_init = 'first_rows'  # of the text LM's embedding, random, or its mean
rope_theta = 10000.0  # lowered from the text LM's
context = 1024  # tokens a chunk at most: longer utterances are cut, the remainder kept
row_tokens = 8192  # of whole chunks laid end to end in the row of one pass: what memory bears
batch_tokens = 81920  # a step, over passes and devices: 128 chunks of 620 tokens
dropout = 0.0
optimizer = 'adamw'  # adamw, ademamix, adalomo (Figure 4), adamw8bit, muon (on the matrices)
lr = 1e-3
min_lr = 5e-5  # where cosine and wsd end
schedule = 'cosine'  # cosine, inverse_sqrt, wsd (warm up, stay, decay)
warmup_fraction = 0.01  # the warm-up is this share of max_steps,
warmup_steps = 100  # or so many steps, whichever is longer
decay_fraction = 0.2  # of the run, for wsd
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0  # of matrices
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 17625  # the run ends at so many steps
train_hours = 23.5  # or hours, whichever is first (0: no limit); validation and saving do not count
eval_interval = 500  # steps between validations; 0: none
save_interval = 500  # steps between checkpoints; 0: at the end alone
save_init = False  # also write the untrained model, beside out_dir, as untrained/
resume = True  # continue from out_dir/train_state.pt if it is there; False: start over
log_interval = 10  # steps between lines on the terminal and in log.jsonl
wandb = False  # also log to Weights & Biases (pip install wandb)
compile = None  # torch.compile; None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

# What may differ when a run is continued: all else decides what the run computes.
FREE = set(
    'out_dir data_dir val_data max_steps train_hours eval_interval save_interval save_init resume '
    'log_interval wandb compile device'.split()
)
BLOCK_ROWS = 500  # of rows packed at a time: enough for best fit to fill over 99 % of them
VAL_TOKENS = 1_000_000  # of each validation set at most: enough to tell losses 0.002 nats apart
# dense bf16 TFLOP/s by NVIDIA's data sheets, for the model FLOP/s utilisation (mfu)
PEAK = {'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, 'A6000': 155, 'A5000': 111, '4090': 165}


def learning_rate(step, progress):
    """The rate of a step (from 0) at `progress`, the share of the run that is done.

    The warm-up is linear and counted in steps. After it cosine and wsd follow `progress`, so that
    a run which the clock will end decays all the same; inverse_sqrt knows no end and goes by steps
    (lr * sqrt(timescale / (step + timescale - warmup)), timescale = warmup or 10,000).
    """
    warmup = max(warmup_steps, warmup_fraction * max_steps)
    warm = min(1, (step + 1) / max(1, warmup))
    begin = min(1, warmup / max_steps)
    done = min(1, max(0, progress - begin) / max(1e-9, 1 - begin))  # of what follows the warm-up
    if schedule == 'inverse_sqrt':
        timescale = warmup or 10_000
        return lr * min(warm, math.sqrt(timescale / (max(step, warmup) + timescale - warmup)))
    if schedule == 'cosine':
        decay = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == 'wsd':
        decay = min(1, max(0, 1 - progress) / decay_fraction)
    else:
        raise InputError(f'schedule {schedule!r} is unknown: use cosine, inverse_sqrt or wsd')
    return min(lr * warm, min_lr + (lr - min_lr) * decay)


# -----------------------------------------------------------------------------
# Data: token files -> chunks -> rows -> steps


class DataSet(NamedTuple):
    folder: str
    weight: float  # how often an epoch shows the whole of it
    meta: dict  # meta.json


def read_meta(folder, split):
    """meta.json of a folder of prepare_units.py. Raises OSError, ValueError, KeyError or TypeError
    where it is none, has no such split, or lacks a part that it names."""
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
    np.dtype(meta['dtype'])  # an unknown one fails here
    if meta['vocab_size'] < 1:
        raise ValueError('no vocabulary')
    if meta['tokens'][split] < 2:
        raise ValueError(f'has nothing in its split {split}')
    for key in ('encoder', 'vocoder'):  # a checkpoint without them could not be heard
        if meta.get(key) == key and not os.path.isdir(os.path.join(folder, key)):
            raise ValueError(f'no folder {key}, which meta.json names')
    return meta


def open_data(names, data_dir='data', split='train', like=None):
    """'a:2,b' -> list of DataSet whose units agree with each other, and with those of `like`.
    Raises InputError naming what is missing or differs."""
    knob, remedy = 'data', 'name folders that prepare_units.py made, NAME or NAME:WEIGHT'
    if split == 'val':
        knob, remedy = 'val_data', "name folders with a val split; --val_data= takes data's own"
    sets = []
    for part in names.split(','):
        name, _, weight = part.strip().partition(':')
        folder = name if os.path.isdir(name) else os.path.join(data_dir, name)
        try:
            meta, weight = read_meta(folder, split), float(weight or 1)
            if not 0 < weight < math.inf:
                raise ValueError(f'weight {weight:g}')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f'{knob} {name!r}: {type(error).__name__} {error}; {remedy}') from None
        sets.append(DataSet(folder, weight, meta))
        like = like or sets[0]
        for key in ('vocab_size', 'offset', 'dedup', 'frame_rate', 'tokenizer_sha256'):
            if meta.get(key) != like.meta.get(key):
                raise InputError(f'{folder} and {like.folder} differ in {key}: only like units mix')
    return sets


def balance(sets):
    """The sets with weights under which an epoch, of as many tokens as all have together, holds
    tokens of each in proportion to the weights that they had."""
    tokens = [each.meta['tokens']['train'] for each in sets]
    unit = sum(tokens) / sum(each.weight for each in sets)
    return [
        each._replace(weight=each.weight * unit / size)
        for each, size in zip(sets, tokens, strict=True)
    ]


def open_tokens(folder, meta, split):
    """The token file of a split as a read-only memory map (N,). Raises InputError if it is not
    what meta.json says."""
    path, kind = os.path.join(folder, split + '.bin'), np.dtype(meta['dtype'])
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if not 0 < size == kind.itemsize * meta['tokens'][split]:
        raise InputError(f'{path} is missing, empty or truncated: run prepare_units.py again')
    tokens = np.memmap(path, kind, 'r')
    if tokens.max() >= meta['vocab_size']:
        raise InputError(
            f'{path} has token {tokens.max()}, meta.json a vocabulary of {meta["vocab_size"]}: '
            'run prepare_units.py again'
        )
    return tokens


def find_utterances(tokens, block=1 << 22, end=None):
    """Where utterances begin, (n,) int64: at 0 and where two <S> meet, or after each `end`, the
    token that closes a document of text and units.

    One pass in constant memory, a second a billion tokens, so that nothing need be cached.
    """
    found = [np.zeros(1, np.int64)]
    for at in range(0, len(tokens), block):
        piece = tokens[at : at + block + 1]  # one more, for a pair that blocks would part
        begins = piece[:-1] == end if end is not None else (piece[:-1] == BOS) & (piece[1:] == BOS)
        found.append(np.flatnonzero(begins) + (at + 1))
    return np.concatenate(found)


def find_chunks(tokens, context, end=None):
    """Where chunks begin and how many tokens they have: two arrays (n,) int64.

    An utterance of more than `context` tokens is cut into chunks of so many, without further <S>.
    The remainder is kept, unless it is one token, which would predict nothing.
    """
    starts = find_utterances(tokens, end=end)
    sizes = np.diff(starts, append=len(tokens))
    chunks = -(-sizes // context)  # of each utterance
    first = np.cumsum(chunks) - chunks  # the number of its first one
    nth = np.arange(chunks.sum()) - np.repeat(first, chunks)  # of a chunk in its utterance
    begins = np.repeat(starts, chunks) + nth * context
    lengths = np.minimum(context, np.repeat(sizes, chunks) - nth * context)
    return begins[lengths > 1], lengths[lengths > 1]


class Loader:
    """Rows of whole chunks, in an order that (seed, epoch, block) alone decides.

    An epoch is all chunks, shuffled; its blocks are packed into rows by best fit decreasing, and
    the rows of a block shuffled. A set of weight w gives w times its chunks to an epoch, in passes
    of its own: none comes twice before all have come. Memory: 24 bytes a chunk.

    place: three integers, epoch, block and row within it, of the row that comes next.
    """

    def __init__(self, sets, context, row_tokens, seed, split='train', place=(0, 0, 0)):
        self.context, self.row_tokens, self.seed, self.place = context, row_tokens, seed, place
        self.weights = [each.weight for each in sets]
        self.tokens, begins, lengths = [], [], []  # of each set
        for folder, _, meta in sets:
            self.tokens.append(open_tokens(folder, meta, split))
            found = find_chunks(self.tokens[-1], context, meta.get('end'))
            begins.append(found[0])
            lengths.append(found[1])
        self.begins, self.lengths = np.concatenate(begins), np.concatenate(lengths)
        # the chunks of set s are those from first[s] to first[s + 1]
        self.first = np.cumsum([0] + [len(each) for each in begins])

    def order(self, epoch):
        """The chunks of an epoch, (n,): each set's own, shuffled; whose turn it is, is chance."""
        queues = []
        for s, weight in enumerate(self.weights):
            # of the endless line of a set's shuffled passes, this epoch takes begin to end
            n = self.first[s + 1] - self.first[s]
            begin, end = round(epoch * weight * n), round((epoch + 1) * weight * n)
            line = [np.zeros(0, np.int64)]
            for number in range(begin // n, -(-end // n)):
                line.append(np.random.default_rng((self.seed, 1, s, number)).permutation(n))
            skip = begin % n
            queues.append(self.first[s] + np.concatenate(line)[skip : skip + end - begin])
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        if not len(turns):
            raise InputError('the weights of data leave nothing to an epoch: raise them')
        np.random.default_rng((self.seed, 2, epoch)).shuffle(turns)
        order = np.empty(len(turns), np.int64)
        for s, queue in enumerate(queues):
            order[turns == s] = queue
        return order

    def blocks(self, epoch):
        """The order of an epoch in blocks of about BLOCK_ROWS rows, equal in tokens."""
        order = self.order(epoch)
        ends = np.cumsum(self.lengths[order])
        n = max(1, round(ends[-1] / (BLOCK_ROWS * self.row_tokens)))
        return np.split(order, np.searchsorted(ends, ends[-1] * np.arange(1, n) / n))

    def rows(self):
        """Endless rows from `place` on: the chunks in it, and the place after it."""
        epoch, first_block, first_row = self.place
        while True:
            blocks = self.blocks(epoch)
            for block in range(first_block, len(blocks)):
                chunks = blocks[block]
                packed = pack_rows(self.lengths[chunks], self.row_tokens)
                rng = np.random.default_rng((self.seed, 3, epoch, block))
                shuffle = rng.permutation(len(packed))
                for row in range(first_row, len(packed)):
                    yield chunks[packed[shuffle[row]]], (epoch, block, row + 1)
                first_row = 0
            epoch, first_block = epoch + 1, 0

    def lay_out(self, chunks):
        """One row: tokens, targets and documents, (3, row_tokens) int64.

        The first token of a chunk is not predicted. What is left of the row is padding: targets of
        -100, and documents of its own no longer than the context, for models of learned positions.
        """
        row = np.empty((3, self.row_tokens), np.int64)
        tokens, targets, doc = row
        tokens[:], targets[:], doc[:] = PAD, -100, -1 - np.arange(self.row_tokens) // self.context
        start = 0
        for i in chunks:
            end, begin = start + self.lengths[i], self.begins[i]
            file = self.tokens[np.searchsorted(self.first, i, 'right') - 1]
            tokens[start:end] = file[begin : begin + self.lengths[i]]
            targets[start : end - 1] = tokens[start + 1 : end]
            doc[start:end] = start
            start = end
        return row

    def steps(self, rows_per_step, rank=0, world=1, pin=False):
        """Endless steps, as dicts. Rank r of n processes has rows r, r + n, ... of a step.

        passes: this process's rows, (rows, 3, row_tokens); predicted: predictions in each of them;
        total: predictions in the step, over all processes; tokens: likewise; place: after it.
        """
        rows = self.rows()
        while True:
            step, places = zip(*itertools.islice(rows, rows_per_step), strict=True)
            tokens = [int(self.lengths[chunks].sum()) for chunks in step]
            predicted = [n - len(chunks) for n, chunks in zip(tokens, step, strict=True)]
            passes = np.stack([self.lay_out(chunks) for chunks in step[rank::world]])
            passes = torch.from_numpy(passes)
            yield dict(
                passes=passes.pin_memory() if pin else passes,
                predicted=predicted[rank::world],
                total=sum(predicted),
                tokens=sum(tokens),
                place=places[-1],
            )


def describe(loader):
    """What the data mean for the run: a line for the banner, and a line for each warning."""
    chunks, tokens, before = 0, 0, 0  # in an epoch
    for s, weight in enumerate(loader.weights):
        lengths = loader.lengths[loader.first[s] : loader.first[s + 1]]
        chunks += weight * len(lengths)
        tokens += weight * int(lengths.sum())
        before += weight * int((lengths * (lengths - 1) // 2).sum())
    epochs = max_steps * batch_tokens / tokens
    lines = [
        f'{tokens:,.0f} tokens an epoch in chunks of {tokens / chunks:.0f}, '
        f'{before / (tokens - chunks):.0f} before a prediction; {batch_tokens:,} tokens a step, '
        f'{batch_tokens * chunks / tokens:.0f} chunks; {epochs:.3g} epochs in {max_steps:,} steps'
    ]
    if epochs > 10:
        ten = math.ceil(10 * tokens / batch_tokens)
        lines.append(
            f'WARNING: {epochs:,.0f} epochs are many: add speech, or end earlier '
            f'(--max_steps={ten} is 10 epochs)'
        )
    if warmup_steps > max_steps:
        lines.append(f'WARNING: a warm-up of {warmup_steps:,} steps is longer than the run')
    return lines


# -----------------------------------------------------------------------------
# Model, optimizer, validation


def make_model(meta):
    """The model that `init` and the knobs after it ask for, on the CPU, with a place for the units
    that meta.json tells of."""
    shape = dict(
        vocab_size=meta['vocab_size'], context=context, rope_theta=rope_theta, dropout=dropout
    )
    if init.startswith('preset:'):
        return SLM.from_preset(init.removeprefix('preset:'), seed=seed, **shape)
    if init == 'scratch':
        size = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, n_ffn=n_ffn)
        return SLM(SLMConfig(family, **size, **shape), seed)
    text = meta if meta.get('tokenizer') else None
    return SLM.from_pretrained(init, embed_init=embed_init, seed=seed, text=text, **shape)


def make_optimizers(model):
    """List of optimizers over the model's parameters, of which matrices alone decay.

    Raises InputError for an unknown name or a missing package.
    """
    betas = (beta1, beta2)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    try:
        if optimizer == 'adamw':
            return [torch.optim.AdamW(groups, lr, betas, eps, fused=True)]
        if optimizer == 'adalomo':
            # Lv et al. 2023: Adafactor's update; theirs, inside the backward pass, saves memory
            return [torch.optim.Adafactor(groups, lr, eps=(1e-15, 1e-3))]
        if optimizer == 'ademamix':
            from pytorch_optimizer import AdEMAMix

            return [AdEMAMix(groups, lr, (*betas, 0.9999), eps=eps, weight_decouple=True)]
        if optimizer == 'adamw8bit':
            from bitsandbytes.optim import AdamW8bit

            return [AdamW8bit(groups, lr, betas, eps)]
        if optimizer == 'muon':
            # the matrices between layers; embedding, head, norms and biases stay with AdamW
            hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
            inside = set(hidden)
            groups[0]['params'] = [p for p in matrices if p not in inside]
            return [
                torch.optim.Muon(hidden, lr, weight_decay, adjust_lr_fn='match_rms_adamw'),
                torch.optim.AdamW(groups, lr, betas, eps, fused=True),
            ]
    except ImportError as error:
        packages = 'pip install pytorch-optimizer (ademamix) or bitsandbytes (adamw8bit)'
        raise InputError(f'optimizer {optimizer}: {error}; {packages}') from None
    known = 'adamw, ademamix, adalomo, adamw8bit, muon'
    raise InputError(f'optimizer {optimizer!r} is unknown: use {known}')


def describe_run(folder, meta, config):
    """What slam.json keeps: how the units of this data set were made, and the recipe."""
    slam = {key: meta.get(key) for key in ('encoder', 'vocoder', 'n_units', 'frame_rate', 'dedup')}
    if meta.get('tokenizer'):
        slam |= {key: meta[key] for key in ('text_lm', 'tokenizer', 'offset', 'end')}
    for part in PARTS:  # a folder of the data's own is copied, a name stays
        own = os.path.join(folder, str(slam.get(part)))
        if os.path.isdir(own):
            slam[part] = own
    return slam | dict(stage='pretraining', recipe=config, git_commit=git_commit())


def open_validation(sets):
    """The rows to validate on, always the same, each set once whatever its weight:
    {name of the set: list of (row, predictions in it)}."""
    validation = {}
    for folder, _, meta in sets:
        loader = Loader([DataSet(folder, 1, meta)], context, row_tokens, seed=0, split='val')
        rows, tokens = [], 0
        for chunks, (epoch, _, _) in loader.rows():
            if epoch or tokens >= VAL_TOKENS:
                break
            size = int(loader.lengths[chunks].sum())
            rows.append((torch.from_numpy(loader.lay_out(chunks)), size - len(chunks)))
            tokens += size
        name = os.path.basename(os.path.normpath(folder))
        validation[folder if name in validation else name] = rows
    return validation


@torch.no_grad()
def validate(model, validation, device, autocast, rank=0, world=1):
    """{'val_loss': nats a predicted token over all sets, 'val_loss_NAME': of each alone}."""
    model.eval()
    sums = torch.zeros(len(validation), device=device)
    for s, rows in enumerate(validation.values()):
        for row, predicted in rows[rank::world]:
            tokens, targets, doc = row.to(device, non_blocking=True)[:, None]
            with autocast:
                sums[s] += model(tokens, targets, doc=doc) * predicted
    model.train()
    if world > 1:
        dist.all_reduce(sums)
    counts = [sum(predicted for _, predicted in rows) for rows in validation.values()]
    losses = dict(val_loss=float(sums.sum()) / sum(counts))
    for name, nats, count in zip(validation, sums.tolist(), counts, strict=True):
        losses[f'val_loss_{name}'] = nats / count
    return losses


def format_record(record, mfu):
    """The line on the terminal of a record of log.jsonl."""
    parts = [f'step {record["step"]}/{max_steps}']
    if record['loss'] is not None:
        parts += [f'loss {record["loss"]:.4f}', f'norm {record["norm"]:.2f}']
    if 'skipped' in record:
        parts.append(f'{record["skipped"]} not finite, skipped')
    parts += [f'lr {record["lr"]:.2e}', f'{record["tokens_per_s"]:,} tok/s']
    if mfu:
        parts.append(f'mfu {mfu:.1%}')
    parts += [f'{key} {value:.4f}' for key, value in record.items() if key.startswith('val_')]
    return ' | '.join(parts)


if __name__ == '__main__':
    config = configure(globals())

    # --- what the knobs say, held against what can be done, before anything is read or built
    least = dict.fromkeys(('n_layer', 'n_embd', 'n_head', 'n_kv_head', 'n_ffn', 'max_steps'), 1)
    least |= dict(context=2, row_tokens=2, batch_tokens=2, log_interval=1, rope_theta=1, lr=1e-9)
    least |= dict(decay_fraction=1e-9)
    check_knobs(config, least, dict(dropout=1, beta1=1, beta2=1, warmup_fraction=1))
    learning_rate(0, 0)  # an unknown schedule fails here
    explain_memory(
        f'lower --row_tokens={row_tokens} (the batch stays as it is), --context={context} or the '
        'size of the model'
    )
    torch_device, rank, world = start_processes(device)
    cuda, torch_dtype = torch_device.type == 'cuda', pick_dtype(dtype, torch_device)

    # a step is a whole number of rows for each process, and a row holds the longest chunk
    rows_per_step = batch_tokens // row_tokens  # over all processes
    if batch_tokens % (row_tokens * world):
        fits = [n for n in range(context, row_tokens) if batch_tokens % (n * world) == 0]
        fail(
            f'batch_tokens={batch_tokens} is no multiple of row_tokens={row_tokens} x {world} '
            f'processes: {f"--row_tokens={fits[-1]} would do" if fits else "change one of them"}'
        )
    if context > row_tokens:
        fail(f'row_tokens={row_tokens} cannot hold a chunk of context={context} tokens')

    # --- where a run of this command stopped before
    state = dict(step=0, elapsed=0.0, seen=0, skipped=0, place=(0, 0, 0), scores={}, best=math.inf)
    state |= dict(sizes=None, model=None, optimizers=None)
    if resume:
        state = load_run(out_dir, state, config, FREE)
    step, elapsed, seen = state['step'], state['elapsed'], state['seen']
    skipped, scores, best = state['skipped'], state['scores'], state['best']
    budget = 3600 * train_hours or math.inf  # seconds
    if step >= max_steps or (step and elapsed >= budget):
        done = f'finished before, {step} steps in {format_time(elapsed)}, {scores}'
        say(f'{out_dir}: {done}; nothing to do (--resume=False starts over)', rank)
        stop_processes(world)
        raise SystemExit

    # --- data: rows to train on from where the run stopped, and the rows to validate on
    sets = open_data(data, data_dir)
    if balanced:
        sets = balance(sets)
    sizes = [each.meta['tokens'] for each in sets]
    if state['sizes'] not in (None, sizes):
        fail(
            f'{data} has other tokens than when {out_dir} began ({state["sizes"]}): '
            'choose another --out_dir, or --resume=False to start over'
        )
    val_sets = []
    if eval_interval and val_data:
        val_sets = open_data(val_data, data_dir, 'val', like=sets[0])
    elif eval_interval:
        val_sets = [each for each in sets if each.meta['tokens'].get('val', 0) > 1]
    loader = Loader(sets, context, row_tokens, seed, place=state['place'])
    validation = open_validation(val_sets)

    # --- model and optimizers, and what the checkpoint says of itself
    raw = make_model(sets[0].meta)
    slam = describe_run(sets[0].folder, sets[0].meta, config)
    if save_init and step == 0 and rank == 0:
        beside = os.path.dirname(os.path.normpath(out_dir))
        save_run(os.path.join(beside, 'untrained'), raw, slam)
    raw.to(torch_device)
    optimizers = make_optimizers(raw)
    if state['model']:
        raw.load_state_dict(state['model'])
        for each, saved in zip(optimizers, state['optimizers'], strict=True):
            each.load_state_dict(saved)

    # compiled for the one shape that rows have; several processes take the mean of gradients
    compiled = cuda if compile is None else compile
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would split the graph at each bucket
        raw.compile(dynamic=False)
    model = raw
    if world > 1:
        ids = [torch_device.index] if cuda else None
        model = torch.nn.parallel.DistributedDataParallel(raw, ids, gradient_as_bucket_view=True)
    mixed = torch_dtype != torch.float32
    autocast = torch.autocast(torch_device.type, torch_dtype, enabled=mixed)

    # --- what will be done is said before it is
    n_params, flops = raw.num_params(), raw.flops_per_token(float(loader.lengths.mean()))
    machine = torch.cuda.get_device_name(torch_device) if cuda else torch_device.type
    # utilisation is told of cards whose peak is known
    known = [PEAK[name] for name in PEAK if name in machine]
    peak = 1e12 * world * known[0] if known else math.inf  # inf: no utilisation is told
    say(f'{init}: {n_params:,} parameters on {world} x {machine}, {torch_dtype}', rank)
    for line in describe(loader):
        say(line, rank)
    if step:
        say(f'going on at step {step}', rank)

    # the log, and the first signal that stops the run after its step
    log_file = open_log(out_dir, step, rank)
    tracker = start_wandb(config) if wandb and rank == 0 else None
    stopping = catch_signals(rank)

    # --- the loop; a thread lays out the next batch while the device works on this one
    steps = loader.steps(rows_per_step, rank, world, pin=cuda)
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(next, steps)
    totals = torch.zeros(5, device=torch_device)  # of loss and norm: model.add_up
    first_step, halt = step, 0
    seen_before, clock = seen, time.perf_counter()  # when the numbers were last read
    raw.train()

    over = False
    while step < max_steps and not over and not halt:
        # the rate follows the share of the run that is done, by steps or by the clock
        rate = learning_rate(step, max(step / max_steps, elapsed / budget))
        for each in optimizers:
            for group in each.param_groups:
                group['lr'] = rate
        batch, ahead = ahead.result(), thread.submit(next, steps)
        if dropout:  # masks are a matter of the step: no generator's state to save
            torch.manual_seed(seed + step * world + rank)

        # gradients of the mean loss over all predictions of the step, a row at a time
        loss = torch.zeros((), device=torch_device)
        for i, (row, predicted) in enumerate(zip(batch['passes'], batch['predicted'], strict=True)):
            row = row.to(torch_device, non_blocking=True)
            tokens, targets, doc = row[:, None]  # (1, row_tokens) each
            if world > 1:  # gradients travel between processes once a step, with the last row
                model.require_backward_grad_sync = i == len(batch['passes']) - 1
            with autocast:
                part = model(tokens, targets, doc=doc) * (predicted / batch['total'])
            (part * world).backward()  # of which DDP takes the mean over processes
            loss += part.detach()

        # clip, and step unless the gradient is not finite: fused AdamW reads that on the device
        # and leaves all as it is; the others know no such switch, so the host waits for the norm
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), grad_clip or math.inf)
        finite = norm.isfinite()
        if optimizer == 'adamw':
            optimizers[0].found_inf = 1 - finite.float()
        if optimizer == 'adamw' or finite:
            for each in optimizers:
                each.step()
        raw.zero_grad()

        # what is known adds up on the device: nothing above had to wait for it
        totals = add_up(totals, torch.stack((loss, norm)))
        step, seen, place = step + 1, seen + batch['tokens'], batch['place']
        if compiled and step == first_step + 1:  # compiling is not training
            totals.tolist()
            clock, seen_before = time.perf_counter(), seen
        evaluate = eval_interval and step % eval_interval == 0
        keep = save_interval and step % save_interval == 0
        alone = stopping and world == 1  # several processes must stop after the same step
        if not (evaluate or keep or alone or step == max_steps or step % log_interval == 0):
            continue

        # --- now and then: read the numbers, agree with the other processes on clock and end
        loss, norm, good, bad, in_a_row = totals.tolist()  # here the host waits for the device
        took = time.perf_counter() - clock
        clock_of_first = elapsed + took if rank == 0 else 0
        numbers = [loss, clock_of_first, len(stopping)]
        loss, elapsed, halt = sum_over_processes(numbers, torch_device)
        over = step >= max_steps or elapsed >= budget
        skipped += round(bad)
        speed = (seen - seen_before) / max(took, 1e-9)  # tokens a second

        # what is told of these steps: a line of log.jsonl, and one for people
        record = dict(step=step, lr=rate, tokens=seen, flops=6 * n_params * seen)
        record |= dict(tokens_per_s=round(speed), elapsed=round(elapsed, 2))
        for name, total in (('loss', loss), ('norm', norm)):
            record[name] = total / good if good else None
        if bad:
            record['skipped'] = round(bad)
        if validation and (evaluate or over):
            scores = validate(raw, validation, torch_device, autocast, rank, world)
            record |= scores
        log_file.write(json.dumps(record) + '\n')
        if tracker:
            tracker.log(record, step=step)
        left = min((max_steps - step) * batch_tokens / max(speed, 1e-9), budget - elapsed)
        line = format_record(record, speed * flops / peak)
        say(f'{line} | {format_time(max(0, left))} left', rank)
        if in_a_row >= 10 or over and in_a_row > step / 2:
            remedy = 'lower --lr, or look at the data and at the weights of --init'
            fail(f'{in_a_row:.0f} steps in a row were not finite: {remedy}')

        # checkpoints: the best by validation, and the one to go on from
        compute = dict(devices=world, device=machine, hours=elapsed / 3600, tokens=seen)
        slam |= dict(scores=dict(scores, step=step, tokens=seen), compute=compute)
        if record.get('val_loss', math.inf) < best:
            best = record['val_loss']
            if rank == 0:
                save_run(os.path.join(out_dir, 'best'), raw, slam)
        if rank == 0 and (keep or over or halt):
            state = dict(step=step, elapsed=elapsed, seen=seen, skipped=skipped, place=place)
            state |= dict(scores=scores, best=best, sizes=sizes, config=config)
            state |= dict(model=raw.state_dict(), optimizers=[o.state_dict() for o in optimizers])
            save_run(out_dir, raw, slam, state)
        totals[:4] = 0
        clock, seen_before = time.perf_counter(), seen

    # --- the end
    log_file.close()
    stop_processes(world)
    result = f'{out_dir}: {step} steps, {seen:,} tokens, {format_time(elapsed)}'
    if skipped:
        result += f', {skipped} steps skipped'
    if not over:
        if rank == 0:
            print(f'{result}; stopped and saved, the same command continues', file=sys.stderr)
        raise SystemExit(128 + (stopping or [signal.SIGTERM])[0])
    if scores:
        result += f', val loss {scores["val_loss"]:.4f}'
    if best < math.inf:
        result += f' (best {best:.4f}: {out_dir}/best)'
    say(result, rank)
