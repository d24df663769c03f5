"""Pre-train a speech language model: the 24-hour recipe of Slam (arXiv 2502.15814), every ablation.

A row packs several utterances, of which each attends to itself alone. Weights are float32, products
bfloat16. A killed run continues exactly where it was, by the same command, on any number of GPUs.

    python train.py config/demo.py                                    # minutes on a CPU
    python train.py config/slam_a5000.py --data=librilight,librispeech,stinystories
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py        # the same batch on two GPUs

out_dir becomes a checkpoint that transformers loads (config.json, model.safetensors, slam.json,
and encoder/ and vocoder/ if the units have their own), with train_state.pt and log.jsonl.
"""

from config import configure

import inspect
import itertools
import json
import math
import os
import signal
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
    InputError,
    catch_signals,
    check_encoder_ids,
    file_hash,
    format_time,
    git_commit,
    load_run,
    load_slm,
    log,
    open_log,
    pack_rows,
    pick_dtype,
    read_json,
    reading,
    save_run,
    start_processes,
    start_tracker,
    stop_processes,
    sum_over_processes,
)

# -----------------------------------------------------------------------------
# Table 4 of the paper; what the table leaves out is from the public configuration
out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'  # folders of prepare_units.py, or names below data_dir
#   'a:2,b:0.5': an epoch shows all of a twice and half of b
balanced = False  # True: the weights are shares of an epoch's tokens, whatever the size of a set
val_data = 'librispeech,librilight'  # validate on their val split: real speech; '': that of data
data_dir = 'data'
init = 'Qwen/Qwen2.5-0.5B'  # a text LM (TWIST) or an SLM: a folder or a hub name;
#   'preset:NAME': a fresh model with a shape of Table 7; 'scratch': a fresh one of this shape:
n_layer = 4
n_embd = 256
n_head = 4
n_kv_head = 2
n_ffn = 1024
embed_init = 'first_rows'  # new embedding under TWIST: first_rows of the text LM's, mean, random
rope_theta = 10000.0  # lowered from the text LM's
context = 1024  # tokens of a chunk at most; a longer utterance is cut, its remainder kept
row_tokens = 8192  # tokens of one forward pass; lower it if memory runs out: the batch stays
batch_tokens = 81920  # tokens of a step, over all passes and devices: 128 chunks of 620 tokens
dropout = 0.0
optimizer = 'adamw'  # adamw, adalomo; any other by its name in pytorch_optimizer: ademamix, lion
lr = 1e-3
min_lr = 5e-5  # where cosine ends
schedule = 'cosine'  # cosine, inverse_sqrt
warmup_fraction = 0.01  # warm up for this share of max_steps,
warmup_steps = 100  # or for this many steps, whichever is longer
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0  # of matrices
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 17625  # the run ends after this many steps,
train_hours = 23.5  # or hours without validation, if they end first (0: no limit; one step runs)
eval_interval = 500  # steps between validations; 0: none
save_interval = 500  # steps between checkpoints; 0: at the end only
resume = True  # continue from out_dir/train_state.pt if it exists; False: start over
log_interval = 10  # steps between reports: a line on the terminal and one in log.jsonl
tracker = ''  # also log to: wandb, trackio
compile = None  # torch.compile; None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

# These knobs may change when a run is continued; the others decide what it computes.
FREE = set(
    'out_dir data_dir val_data max_steps train_hours eval_interval save_interval resume '
    'log_interval tracker compile device'.split()
)
BLOCK_ROWS = 500  # rows that are packed together: best fit then fills over 99 % of them
VAL_TOKENS = 1_000_000  # of each validation set: enough to see differences of 0.002 nats


def learning_rate(step, progress):
    """The learning rate of a step (from 0), of which `progress`, 0 to 1, of the run is done.

    inverse_sqrt goes by steps, without end: lr * sqrt(timescale / (step + timescale - warmup)),
    timescale = warmup or 10,000. Raises InputError for an unknown schedule.
    """
    warmup = max(warmup_steps, warmup_fraction * max_steps)
    warm = lr * min(1, (step + 1) / max(1, warmup))
    if schedule == 'cosine':
        begin = min(1, warmup / max_steps)
        done = min(1, max(0, progress - begin) / max(1e-9, 1 - begin))
        return min(warm, min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == 'inverse_sqrt':
        timescale = warmup or 10_000
        return min(warm, lr * math.sqrt(timescale / (max(step, warmup) + timescale - warmup)))
    raise InputError(f'schedule {schedule!r} is unknown: use cosine or inverse_sqrt')


# Data: token files -> chunks -> rows -> batches


class DataSet(NamedTuple):
    folder: str
    weight: float  # how often an epoch shows the whole set
    meta: dict  # meta.json
    tokens: np.ndarray  # (n,) a memory map of the token file


def open_data(names, split='train'):
    """'a:2,b' -> list of DataSet. Raises InputError if one is missing, empty or damaged."""
    sets = []
    for part in names.split(','):
        name, _, weight = part.strip().partition(':')
        folder = name if os.path.isdir(name) else os.path.join(data_dir, name)
        meta = read_json(os.path.join(folder, 'meta.json'))
        path = os.path.join(folder, split + '.bin')
        with reading(f'{path} (of {part!r})'):
            weight = float(weight or 1)
            tokens = np.memmap(path, np.dtype(meta['dtype']), 'r')
            if len(tokens) != meta['tokens'][split] or tokens.max() >= meta['vocab_size']:
                raise ValueError('it does not fit its meta.json: run prepare_units.py again')
            if not weight > 0:
                raise ValueError('its weight must be above 0')
        sets.append(DataSet(folder, weight, meta, tokens))
    return sets


def balance(sets):
    """The sets with new weights: the old ones become shares of the tokens of an epoch, which has as
    many tokens as all sets together."""
    scale = sum(len(each.tokens) for each in sets) / sum(each.weight for each in sets)
    return [each._replace(weight=each.weight * scale / len(each.tokens)) for each in sets]


def check_alike(sets, init, init_encoder_id):
    """Raise InputError if the units of the sets and of the model `init` are of different kinds."""
    for key in ('vocab_size', 'offset', 'dedup', 'frame_rate', 'tokenizer_sha256'):
        if len({str(each.meta.get(key)) for each in sets}) > 1:
            raise InputError(f'{data} and {val_data} do not mix: they differ in {key}')
    encoder_ids = {each.folder: each.meta.get('encoder_id') for each in sets}
    check_encoder_ids(encoder_ids | {init: init_encoder_id})


def find_chunks(tokens, context, end=None, block=1 << 22):
    """Where chunks begin and how many tokens they have: two arrays (n,) int64.

    An utterance begins between two <S>; in data of text and units, after each token `end`. If it is
    longer than `context`, it is cut into chunks of `context` tokens and a remainder, without
    further <S>. A remainder of one token is dropped, since it predicts nothing.
    """
    starts = [np.zeros(1, np.int64)]
    for at in range(0, len(tokens), block):  # constant memory
        piece = tokens[at : at + block + 1]  # one more token, for a pair across two blocks
        begins = piece[:-1] == end if end is not None else (piece[:-1] == BOS) & (piece[1:] == BOS)
        starts.append(np.flatnonzero(begins) + (at + 1))
    starts = np.concatenate(starts)
    sizes = np.diff(starts, append=len(tokens))
    chunks = -(-sizes // context)  # of each utterance
    first = np.cumsum(chunks) - chunks  # the index of its first one
    nth = np.arange(chunks.sum()) - np.repeat(first, chunks)  # of a chunk in its utterance
    begins = np.repeat(starts, chunks) + nth * context
    lengths = np.minimum(context, np.repeat(sizes, chunks) - nth * context)
    return begins[lengths > 1], lengths[lengths > 1]


class Loader:
    """Packs chunks into rows, in an order that depends on (seed, epoch, block) alone.

    An epoch is all chunks, shuffled. It is split into blocks; each block is packed by best fit
    decreasing, and its rows are shuffled. A set of weight w gives w times its chunks to an epoch,
    and no chunk comes twice before all of its set have come once. Memory: 24 bytes a chunk.

    place: (epoch, block, row in the block) of the next row; a checkpoint needs nothing else.
    """

    def __init__(self, sets, context, row_tokens, seed, place=(0, 0, 0)):
        self.sets, self.context, self.row_tokens = sets, context, row_tokens
        self.seed, self.place = seed, place
        found = [find_chunks(each.tokens, context, each.meta.get('end')) for each in sets]
        self.begins, self.lengths = (np.concatenate(each) for each in zip(*found, strict=True))
        self.dropped = sum(len(each.tokens) for each in sets) - int(self.lengths.sum())
        # set s has the chunks first[s] to first[s + 1]
        self.first = np.cumsum([0] + [len(begins) for begins, _ in found])

    def order(self, epoch):
        """The chunks of an epoch, (n,) int64: each set shuffled, and the sets mixed at random."""
        queues = []
        for s, each in enumerate(self.sets):
            # a set is an endless line of shuffled passes; this epoch takes begin to end of it
            n = self.first[s + 1] - self.first[s]
            begin, end = round(epoch * each.weight * n), round((epoch + 1) * each.weight * n)
            line = [np.zeros(0, np.int64)]
            for number in range(begin // n, -(-end // n)):
                line.append(np.random.default_rng((self.seed, 1, s, number)).permutation(n))
            skip = begin % n
            queues.append(self.first[s] + np.concatenate(line)[skip : skip + end - begin])
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        np.random.default_rng((self.seed, 2, epoch)).shuffle(turns)
        order = np.empty(len(turns), np.int64)
        order[np.argsort(turns, kind='stable')] = np.concatenate(queues)
        return order

    def iter_rows(self):
        """Endless rows from `place` on: (the chunks in a row, the place after it)."""
        epoch, first_block, first_row = self.place
        while True:
            order = self.order(epoch)
            ends = np.cumsum(self.lengths[order])
            n = max(1, round(ends[-1] / (BLOCK_ROWS * self.row_tokens)))
            blocks = np.split(order, np.searchsorted(ends, ends[-1] * np.arange(1, n) / n))
            for block in range(first_block, n):
                packed = pack_rows(self.lengths[blocks[block]], self.row_tokens)
                rng = np.random.default_rng((self.seed, 3, epoch, block))
                shuffle = rng.permutation(len(packed))
                for row in range(first_row, len(packed)):
                    yield blocks[block][packed[shuffle[row]]], (epoch, block, row + 1)
                first_row = 0
            epoch, first_block = epoch + 1, 0

    def collate(self, chunks):
        """A row of chunks: tokens, targets and documents, (3, row_tokens) int64.

        The first token of a chunk is not predicted. Padding has targets of -100 and documents of
        its own, none longer than the context, which learned positions could not reach.
        """
        row = np.empty((3, self.row_tokens), np.int64)
        tokens, targets, doc = row
        tokens[:], targets[:], doc[:] = PAD, -100, -1 - np.arange(self.row_tokens) // self.context
        start = 0
        for i in chunks:
            end, begin = start + self.lengths[i], self.begins[i]
            source = self.sets[np.searchsorted(self.first, i, 'right') - 1].tokens
            tokens[start:end] = source[begin : begin + self.lengths[i]]
            targets[start : end - 1] = tokens[start + 1 : end]
            doc[start:end] = start
            start = end
        return row

    def iter_batches(self, rows_per_step, rank=0, world=1, pin=False):
        """Endless batches; process `rank` of `world` gets the rows rank, rank + world, ... of each.

        Yields: rows (n, 3, row_tokens) int64 as of collate, pinned if `pin`; the share of each row
        in the predicted tokens of the whole batch; tokens in the whole batch; the place after it.
        """
        rows = self.iter_rows()
        while True:
            batch, places = zip(*itertools.islice(rows, rows_per_step), strict=True)
            sizes = np.array([self.lengths[chunks].sum() for chunks in batch])
            predicted = sizes - [len(chunks) for chunks in batch]
            shares = (predicted / predicted.sum()).tolist()
            own = torch.from_numpy(np.stack([self.collate(row) for row in batch[rank::world]]))
            own = own.pin_memory() if pin else own
            yield own, shares[rank::world], int(sizes.sum()), places[-1]


def make_optimizer(model):
    """The optimizer over all parameters, of which only matrices decay. pytorch_optimizer's get the
    knobs that they have. Raises InputError for an unknown name."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    if optimizer == 'adamw':
        return torch.optim.AdamW(groups, lr, (beta1, beta2), eps, fused=True)
    if optimizer == 'adalomo':
        # Lv et al. 2023: the update of Adafactor. Theirs runs inside the backward pass, which saves
        # memory but cannot sum gradients over several passes.
        return torch.optim.Adafactor(groups, lr, eps=(1e-15, 1e-3))
    try:
        from pytorch_optimizer import load_optimizer

        kind = load_optimizer(optimizer)
    except (ImportError, NotImplementedError) as error:
        raise InputError(f'{error}: use adamw, adalomo or pip install pytorch-optimizer') from None
    known = inspect.signature(kind).parameters
    knobs = dict(lr=lr, eps=eps, weight_decouple=True)
    if 'betas' in known:  # AdEMAMix has a third one
        knobs['betas'] = (beta1, beta2, *known['betas'].default[2:])
    return kind(groups, **{name: knobs[name] for name in knobs if name in known})


def describe_run(folder, meta, config):
    """The content of slam.json: how the units of this data set were made, and the recipe."""
    keys = 'encoder vocoder encoder_id n_units frame_rate dedup text_lm tokenizer offset end'
    slam = {key: meta[key] for key in keys.split() if meta.get(key) is not None}
    for part in PARTS:  # a folder of the data set is copied into the checkpoint, a name stays
        own = os.path.join(folder, str(slam.get(part)))
        if os.path.isdir(own):
            slam[part] = own
        elif slam.get(part) == part:
            raise InputError(f'{folder} has no folder {part}/, which its meta.json names')
    return slam | dict(stage='pretraining', recipe=config, git_commit=git_commit())


def collate_validation(sets):
    """The rows to validate on, always the same: {name of the set: list of rows as of collate}."""
    validation = {}
    for each in sets:
        loader = Loader([each._replace(weight=1)], context, row_tokens, seed=0)
        rows = itertools.islice(loader.iter_rows(), 1 + VAL_TOKENS // row_tokens)
        rows = [torch.from_numpy(loader.collate(chunks)) for chunks, place in rows if not place[0]]
        name = os.path.basename(os.path.normpath(each.folder))
        validation[each.folder if name in validation else name] = rows
    return validation


@torch.no_grad()
def validate(model, validation, device, autocast, rank=0, world=1):
    """{'val_loss': nats a predicted token over all sets, 'val_loss_NAME': of each set}."""
    model.eval()
    sums = torch.zeros(len(validation), device=device)
    counts = [sum(int((row[1] >= 0).sum()) for row in rows) for rows in validation.values()]
    for s, rows in enumerate(validation.values()):
        for row in rows[rank::world]:
            tokens, targets, doc = row.to(device)[:, None]
            with autocast:
                sums[s] += model(tokens, targets, doc=doc) * (targets >= 0).sum()
    model.train()
    sums = sum_over_processes(sums.tolist(), device)
    losses = dict(val_loss=sum(sums) / sum(counts))
    for name, nats, count in zip(validation, sums, counts, strict=True):
        losses[f'val_loss_{name}'] = nats / count
    return losses


def format_record(record):
    """The line on the terminal for a record of log.jsonl."""
    left = (max_steps - record['step']) * batch_tokens / record['tokens_per_s']
    left = min(left, (3600 * train_hours or math.inf) - record['elapsed'])
    scores = [f' | {key} {value:.4f}' for key, value in record.items() if key.startswith('val_')]
    line = f'step {record["step"]}/{max_steps} | loss {record["loss"]:.4f}{"".join(scores)} | norm '
    line += f'{record["norm"]:.2f} | lr {record["lr"]:.2e} | {record["tokens_per_s"]:,} tokens/s'
    return f'{line} | {format_time(left)} left'


if __name__ == '__main__':
    config = configure(globals())
    torch_device, rank, world = start_processes(device)
    cuda, torch_dtype = torch_device.type == 'cuda', pick_dtype(dtype, torch_device)

    # A step is a whole number of rows for each process, and a row has room for the longest chunk.
    if batch_tokens % (row_tokens * world) or context > row_tokens or max_steps < 1:
        rows = f'batch_tokens={batch_tokens} is no multiple of {world} x row_tokens={row_tokens}'
        raise InputError(f'{rows}, or that is less than context={context}, or max_steps < 1')
    if os.path.abspath(init) == os.path.abspath(out_dir):
        raise InputError(f'init and out_dir are both {init}, which would be overwritten')

    # Data to train on and to validate on; their hash is part of the recipe.
    sets = open_data(data)
    names = val_data or ','.join(each.folder for each in sets if each.meta['tokens'].get('val'))
    val_sets = open_data(names, 'val') if eval_interval and names else []
    config['data_sha256'] = [file_hash(each.tokens.filename) for each in sets]
    sets = balance(sets) if balanced else sets

    # A run that stopped left its state here.
    state = dict(step=0, elapsed=0.0, seen=0, place=(0, 0, 0), scores={}, config=config)
    state = load_run(out_dir, state, config, FREE) if resume else state
    step, elapsed, seen, scores = (state[key] for key in ('step', 'elapsed', 'seen', 'scores'))
    log_file = open_log(out_dir, step, rank)  # it locks out_dir
    budget = 3600 * train_hours or math.inf  # seconds
    loader = Loader(sets, context, row_tokens, seed, state['place'])
    validation = collate_validation(val_sets)

    # The model, with a vocabulary for these units, and its optimizer.
    meta = sets[0].meta
    shape = {name: config[name] for name in ('n_layer', 'n_embd', 'n_head', 'n_kv_head', 'n_ffn')}
    options = dict(embed_init=embed_init, context=context, rope_theta=rope_theta, dropout=dropout)
    options['text'] = meta if meta.get('tokenizer') else None
    model = load_slm(init, vocab_size=meta['vocab_size'], sizes=shape, seed=seed, **options)
    check_alike(sets + val_sets, init, model.slam.get('encoder_id'))
    slam = describe_run(sets[0].folder, meta, config)
    model.to(torch_device)
    updater = make_optimizer(model)
    if step:
        model.load_state_dict(state['model'])
        updater.load_state_dict(state['optimizer'])

    # Compiled once, since all rows have one shape.
    if cuda if compile is None else compile:
        model.compile(dynamic=False)
    autocast = torch.autocast(torch_device.type, torch_dtype, enabled=torch_dtype != torch.float32)

    # Report what will be done. A run that is made longer changes its learning rate at once.
    machine = torch.cuda.get_device_name(torch_device) if cuda else torch_device.type
    log(f'{init}: {model.num_params():,} parameters on {world} x {machine}, {torch_dtype}', rank)
    n = loader.lengths[loader.order(0)].sum()
    epochs = f'{n:,} tokens an epoch, {max_steps * batch_tokens / n:.3g} epochs'
    log(f'{epochs}; {loader.dropped} tokens dropped (single ones behind a cut)', rank)
    if step:
        old = updater.param_groups[0]['lr']
        new = learning_rate(step, max(step / max_steps, elapsed / budget))
        log(f'going on at step {step}: the learning rate was {old:.2e}, it is {new:.2e}', rank)
    del state  # it holds a copy of the model

    # A thread collates the next batch while the device works on this one.
    run = start_tracker(tracker, config) if rank == 0 else None
    stopping = catch_signals(rank)
    batches = loader.iter_batches(batch_tokens // row_tokens, rank, world, pin=cuda)
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(next, batches)
    sums = torch.zeros(2, device=torch_device)  # of loss and gradient norm, since the last report
    last_step, last_seen, clock = step, seen, time.perf_counter()  # at the last report
    over, halt = step >= max_steps or elapsed >= budget, 0
    model.train()

    while not over and not halt:
        # The learning rate follows the steps, or the clock if that will end the run.
        rate = learning_rate(step, max(step / max_steps, elapsed / budget))
        for group in updater.param_groups:
            group['lr'] = rate
        (rows, shares, n_tokens, place), ahead = ahead.result(), thread.submit(next, batches)
        if dropout:  # its masks depend on the step, so that a resumed run draws the same
            torch.manual_seed(seed + step * world + rank)

        # Gradients of the mean loss over all predicted tokens of the batch, one row at a time.
        for row, share in zip(rows, shares, strict=True):
            tokens, targets, doc = row.to(torch_device, non_blocking=True)[:, None]
            with autocast:
                loss = model(tokens, targets, doc=doc) * share
            loss.backward()
            sums[0] += loss.detach()
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)

        # Clip and step. Until the next report nothing waits for the device.
        sums[1] += torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updater.step()
        updater.zero_grad()
        step, seen = step + 1, seen + n_tokens
        intervals = eval_interval, save_interval, log_interval
        evaluate, save, report = (each and step % each == 0 for each in intervals)
        alone = stopping and world == 1  # several processes stop at the same report
        if not (evaluate or save or report or alone or step == max_steps):
            continue

        # Read the numbers. The clock of the first process counts.
        mean_loss, norm = (sums / (step - last_step)).tolist()
        took = time.perf_counter() - clock
        numbers = [mean_loss, elapsed + took if rank == 0 else 0, len(stopping)]
        mean_loss, elapsed, halt = sum_over_processes(numbers, torch_device)
        if not math.isfinite(mean_loss + norm):
            raise InputError(
                f'the loss is not finite at step {step}: too high an --lr, too short a warm-up, or '
                'damaged weights in --init? The last checkpoint is kept'
            )
        over = step >= max_steps or elapsed >= budget
        record = dict(step=step, loss=mean_loss, norm=norm, lr=rate, tokens=seen)
        record |= dict(elapsed=round(elapsed, 2), tokens_per_s=round((seen - last_seen) / took))

        # Validate now and at the end, and log.
        if validation and (evaluate or over):
            scores = validate(model, validation, torch_device, autocast, rank, world)
            record |= (scores := scores | dict(step=step, tokens=seen))
        log_file.write(json.dumps(record) + '\n')
        if run:
            run.log({key: record[key] for key in record if key != 'step'}, step=step)
        log(format_record(record), rank)

        # The checkpoint, with all that an exact continuation needs.
        if rank == 0 and (save or over or halt):
            compute = dict(devices=world, device=machine, hours=elapsed / 3600, tokens=seen)
            slam |= dict(scores=scores, compute=compute)
            state = dict(step=step, elapsed=elapsed, seen=seen, place=place, scores=scores)
            state |= dict(model=model.state_dict(), optimizer=updater.state_dict(), config=config)
            save_run(out_dir, model, slam, state)
        sums.zero_()
        last_step, last_seen, clock = step, seen, time.perf_counter()

    log_file.close()
    stop_processes(world)
    result = f', val loss {scores["val_loss"]:.4f} at step {scores["step"]}' if scores else ''
    log(f'{out_dir}: {step} steps, {seen:,} tokens, {format_time(elapsed)}{result}', rank)
    if not over:
        log('stopped and saved; the same command continues', rank)
        raise SystemExit(128 + (stopping or [signal.SIGTERM])[0])
