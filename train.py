"""Pre-train a speech language model: Slam's 24-hour recipe and its ablations (arXiv 2502.15814).

Rows pack several utterances; attention stays within each utterance. Weights are float32, matrix
products bfloat16 on CUDA. The same command resumes a killed run exactly; the number of GPUs may
change (not with dropout).

    python train.py config/demo.py                                    # minutes on a CPU
    python train.py config/slam_a5000.py --data=librilight,librispeech,stinystories
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py        # the same batch on two GPUs

out_dir becomes a checkpoint that transformers can load: config.json, model.safetensors, slam.json,
and encoder/ and vocoder/ if the data set has them. It also holds train_state.pt and log.jsonl.
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
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import model as M
from model import BOS, PAD, InputError, read_json, reading

# -----------------------------------------------------------------------------
# Table 4 of the paper; values that it does not list come from the public configuration
out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'  # folders from prepare_units.py, or names in data_dir
#   'a:2,b:0.5': an epoch contains all of a twice and half of b
balanced = False  # True: weights are shares of an epoch's tokens, independent of the set sizes
val_data = 'librispeech,librilight'  # validate on these val splits (real speech); '': those of data
data_dir = 'data'
init = 'Qwen/Qwen2.5-0.5B'  # a text LM (TWIST) or an SLM: a folder or a hub name;
#   'preset:NAME': a new model with the sizes of Table 7; 'scratch': a new model of these sizes:
n_layer = 4
n_embd = 256
n_head = 4
n_kv_head = 2
n_ffn = 1024
embed_init = 'first_rows'  # new embedding under TWIST: first_rows or mean of the text LM, or random
rope_theta = 10000.0  # replaces the text LM's value
context = 1024  # maximum tokens in a chunk; longer utterances are split into several chunks
row_tokens = 8192  # tokens in one forward pass; lower it to save memory: the batch size stays
batch_tokens = 81920  # tokens in a step, over all passes and devices: 128 chunks of 620 tokens
dropout = 0.0
optimizer = 'adamw'  # adamw, adalomo, or a name from pytorch_optimizer such as ademamix or lion
lr = 1e-3
min_lr = 5e-5  # final value of the cosine schedule
schedule = 'cosine'  # cosine, inverse_sqrt
warmup_fraction = 0.01  # warm up for this share of max_steps,
warmup_steps = 100  # or for this many steps, whichever is longer
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0  # for matrices only
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 17625  # the run ends after this many steps,
train_hours = 23.5  # or this many hours, validation excluded (0: no limit; at least one step runs)
eval_interval = 500  # steps between validations; 0: none
save_interval = 500  # steps between checkpoints; 0: at the end only
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
    'out_dir data_dir val_data max_steps train_hours eval_interval save_interval resume '
    'log_interval tracker compile device'.split()
)
BLOCK_ROWS = 500  # rows that are packed together; best fit then fills over 99 % of their tokens
VAL_TOKENS = 1_000_000  # used of each validation set: enough to resolve 0.002 nats


def learning_rate(step, progress):
    """The learning rate of a step (from 0). `progress` is the completed share of the run, 0 to 1.

    inverse_sqrt depends on the step only: lr * sqrt(timescale / (step + timescale - warmup)), with
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
    weight: float  # how often an epoch contains the whole set
    meta: dict  # meta.json
    tokens: np.ndarray  # (n,) memory map of the token file


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
    """Turn weights from repetitions into shares of an epoch's tokens. An epoch keeps the total
    number of tokens of all sets."""
    scale = sum(len(each.tokens) for each in sets) / sum(each.weight for each in sets)
    return [each._replace(weight=each.weight * scale / len(each.tokens)) for each in sets]


def check_alike(sets, model):
    """Raise InputError if the data sets and the model use different units or tokens."""
    for key in ('vocab_size', 'offset', 'dedup', 'frame_rate', 'tokenizer_sha256'):
        if len({str(each.meta.get(key)) for each in sets}) > 1:
            raise InputError(f'{data} and {val_data} do not mix: they differ in {key}')
    encoder_ids = {each.folder: each.meta.get('encoder_id') for each in sets}
    M.check_encoder_ids(encoder_ids | {init: model.slam.get('encoder_id')})
    if context > model.config.max_positions:
        raise InputError(f'{init} has no more than {model.config.max_positions} positions')
    meta, size, tokenizer = sets[0].meta, model.config.vocab_size, model.slam.get('tokenizer')
    fits = meta['vocab_size'] == size if meta.get('tokenizer') else meta['vocab_size'] <= size
    if model.slam and (tokenizer or meta.get('tokenizer')):
        known = tokenizer and M.read_tokenizer(tokenizer)[2], model.offset
        fits = fits and known == (meta.get('tokenizer_sha256'), meta['offset'])
    if not fits:
        reason = f'{init} ({size} tokens) and {data} ({meta["vocab_size"]} tokens)'
        raise InputError(f'{reason} have different tokenizers or vocabularies')


def find_chunks(tokens, context, end=None, block=1 << 22):
    """The start and the length in tokens of each chunk: two arrays (n,) int64.

    An utterance begins between two <S>; in data with text, after each token `end`. An utterance
    longer than `context` is cut into chunks of `context` tokens and a remainder, with no extra <S>.
    A remainder of one token is dropped because it predicts nothing.
    """
    starts = [np.zeros(1, np.int64)]
    for at in range(0, len(tokens), block):  # constant memory
        piece = tokens[at : at + block + 1]  # one more token, for a pair across two blocks
        begins = piece[:-1] == end if end is not None else (piece[:-1] == BOS) & (piece[1:] == BOS)
        starts.append(np.flatnonzero(begins) + (at + 1))
    starts = np.concatenate(starts)
    sizes = np.diff(starts, append=len(tokens))
    chunks = -(-sizes // context)  # chunks in each utterance
    first = np.cumsum(chunks) - chunks  # index of each utterance's first chunk
    nth = np.arange(chunks.sum()) - np.repeat(first, chunks)  # position of a chunk in its utterance
    begins = np.repeat(starts, chunks) + nth * context
    lengths = np.minimum(context, np.repeat(sizes, chunks) - nth * context)
    return begins[lengths > 1], lengths[lengths > 1]


class Loader:
    """Packs chunks into rows, in an order determined by (seed, epoch, block) only.

    An epoch contains all chunks, shuffled. It is split into blocks; each block is packed by best
    fit decreasing, and its rows are shuffled. An epoch contains each set `weight` times; no chunk
    repeats before every chunk of its set has been used. Memory: 24 bytes per chunk.

    place: (epoch, block, row in the block) of the next row, all that a checkpoint has to store.
    """

    def __init__(self, sets, context, row_tokens, seed, place=(0, 0, 0)):
        self.sets, self.context, self.row_tokens = sets, context, row_tokens
        self.seed, self.place = seed, place
        found = [find_chunks(each.tokens, context, each.meta.get('end')) for each in sets]
        self.begins, self.lengths = (np.concatenate(each) for each in zip(*found, strict=True))
        self.dropped = sum(len(each.tokens) for each in sets) - int(self.lengths.sum())
        # set s holds the chunks first[s] to first[s + 1]
        self.first = np.cumsum([0] + [len(begins) for begins, _ in found])

    def order(self, epoch):
        """The chunks of an epoch, (n,) int64: each set shuffled, and the sets mixed at random."""
        queues = []
        for s, each in enumerate(self.sets):
            # a set is an endless sequence of shuffled passes; this epoch takes [begin, end) of it
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
                packed = M.pack_rows(self.lengths[blocks[block]], self.row_tokens)
                rng = np.random.default_rng((self.seed, 3, epoch, block))
                shuffle = rng.permutation(len(packed))
                for row in range(first_row, len(packed)):
                    yield blocks[block][packed[shuffle[row]]], (epoch, block, row + 1)
                first_row = 0
            epoch, first_block = epoch + 1, 0

    def collate(self, chunks):
        """A row of chunks: tokens, targets and documents, (3, row_tokens) int64.

        The first token of a chunk is not predicted. Padding has targets of -100 and its own
        documents, at most `context` tokens long so that learned positions cover them.
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
        """Endless batches; process `rank` of `world` gets rows rank, rank + world, ... of each.

        Yields: rows (n, 3, row_tokens) int64 from collate, pinned if `pin`; each row's share of the
        predicted tokens in the whole batch; tokens in the whole batch; the place after the batch.
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
    """The optimizer of all parameters, with weight decay on matrices only. One from
    pytorch_optimizer gets the knobs that it accepts. Raises InputError for an unknown name."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    if optimizer == 'adamw':
        return torch.optim.AdamW(groups, lr, (beta1, beta2), eps, fused=True)
    if optimizer == 'adalomo':
        # Lv et al. 2023 use this update inside the backward pass. That saves memory but does not
        # allow gradients to be accumulated over several passes.
        return torch.optim.Adafactor(groups, lr, eps=(1e-15, 1e-3))
    try:
        from pytorch_optimizer import load_optimizer

        kind = load_optimizer(optimizer)
    except (ImportError, NotImplementedError) as error:
        raise InputError(f'{error}: use adamw, adalomo or pip install pytorch-optimizer') from None
    known = inspect.signature(kind).parameters
    knobs = dict(lr=lr, eps=eps, weight_decouple=True)
    if 'betas' in known:  # AdEMAMix has a third beta
        knobs['betas'] = (beta1, beta2, *known['betas'].default[2:])
    return kind(groups, **{name: knobs[name] for name in knobs if name in known})


def describe_run(folder, meta, config):
    """The content of slam.json: how the units of this data set were made, and the recipe."""
    keys = 'encoder vocoder encoder_id n_units frame_rate dedup text_lm tokenizer offset end'
    slam = {key: meta[key] for key in keys.split() if meta.get(key) is not None}
    for part in M.PARTS:  # copy a folder into the checkpoint; keep a public name
        own = os.path.join(folder, str(slam.get(part)))
        if os.path.isdir(own):
            slam[part] = own
        elif slam.get(part) == part:
            raise InputError(f'{folder} has no folder {part}/, which its meta.json names')
    return slam | dict(stage='pretraining', recipe=config)


def collate_validation(sets):
    """The validation rows, the same in every run: {name of the set: list of rows from collate}."""
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
    """{'val_loss': nats per predicted token over all sets, 'val_loss_NAME': of each set alone}."""
    model.eval()
    sums = torch.zeros(len(validation), device=device)
    counts = [sum(int((row[1] >= 0).sum()) for row in rows) for rows in validation.values()]
    for s, rows in enumerate(validation.values()):
        for row in rows[rank::world]:
            tokens, targets, doc = row.to(device)[:, None]
            with autocast:
                sums[s] += model(tokens, targets, doc=doc) * (targets >= 0).sum()
    model.train()
    if world > 1:
        dist.all_reduce(sums)
    sums = sums.tolist()
    losses = dict(val_loss=sum(sums) / sum(counts))
    for name, nats, count in zip(validation, sums, counts, strict=True):
        losses[f'val_loss_{name}'] = nats / count
    return losses


def format_record(record):
    """Format a record of log.jsonl as a line for the terminal."""
    left = (max_steps - record['step']) * batch_tokens / record['tokens_per_s']
    left = min(left, (3600 * train_hours or math.inf) - record['elapsed'])
    scores = [f' | {key} {value:.4f}' for key, value in record.items() if key.startswith('val_')]
    line = f'step {record["step"]}/{max_steps} | loss {record["loss"]:.4f}{"".join(scores)} | norm '
    line += f'{record["norm"]:.2f} | lr {record["lr"]:.2e} | {record["tokens_per_s"]:,} tokens/s'
    return f'{line} | {left / 60:.0f} min left'


if __name__ == '__main__':
    config = configure(globals())
    torch_device, rank, world = M.start_processes(device)
    cuda, torch_dtype = torch_device.type == 'cuda', M.pick_dtype(dtype, torch_device)

    # Each process gets a whole number of rows in a step. A row must hold the longest chunk.
    if batch_tokens % (row_tokens * world) or context > row_tokens or max_steps < 1:
        rows = f'batch_tokens={batch_tokens} is no multiple of {world} x row_tokens={row_tokens}'
        raise InputError(f'{rows}, or row_tokens is below context={context}, or max_steps < 1')
    if os.path.realpath(init) == os.path.realpath(out_dir):
        raise InputError(f'init and out_dir are both {init}, which would be overwritten')

    # Open the training and validation data. The hash of the training data is part of the recipe.
    sets = open_data(data)
    names = val_data or ','.join(each.folder for each in sets if each.meta['tokens'].get('val'))
    val_sets = open_data(names, 'val') if eval_interval and names else []
    config['data_sha256'] = [M.file_hash(each.tokens.filename) for each in sets]
    sets = balance(sets) if balanced else sets

    # Load the state of a stopped run, if there is one.
    state = dict(step=0, elapsed=0.0, seen=0, place=(0, 0, 0), scores={}, config=config)
    state, log_file = M.open_run(out_dir, state, resume, FREE, rank)  # this locks out_dir
    step, elapsed, seen, scores = (state[key] for key in ('step', 'elapsed', 'seen', 'scores'))
    budget = 3600 * train_hours or math.inf  # seconds
    loader = Loader(sets, context, row_tokens, seed, state['place'])
    validation = collate_validation(val_sets)

    # Load the model with a vocabulary for these units, and make its optimizer.
    meta = sets[0].meta
    shape = {name: config[name] for name in ('n_layer', 'n_embd', 'n_head', 'n_kv_head', 'n_ffn')}
    options = dict(embed_init=embed_init, context=context, rope_theta=rope_theta, dropout=dropout)
    options['text'] = meta if meta.get('tokenizer') else None
    model = M.load_slm(init, vocab_size=meta['vocab_size'], sizes=shape, seed=seed, **options)
    check_alike(sets + val_sets, model)
    slam = describe_run(sets[0].folder, meta, config)
    # fail now if transformers' model lacks a tensor of ours (a changed Block): saving would fail
    list(M.matching(model, M.empty_model(model.hf_config).state_dict()))
    model.to(torch_device)
    updater = make_optimizer(model)
    if step:
        model.load_state_dict(state['model'])
        updater.load_state_dict(state['optimizer'])

    # All rows have the same shape, so the model is compiled once.
    if cuda if compile is None else compile:
        model.compile(dynamic=False)
    autocast = torch.autocast(torch_device.type, torch_dtype, enabled=torch_dtype != torch.float32)

    # Report the plan. If max_steps or train_hours has changed, the learning rate jumps here.
    machine = torch.cuda.get_device_name(torch_device) if cuda else torch_device.type
    print(f'{init}: {model.num_params():,} parameters on {world} x {machine}, {torch_dtype}')
    n = loader.lengths[loader.order(0)].sum()
    epochs = f'{n:,} tokens per epoch, {max_steps * batch_tokens / n:.3g} epochs'
    print(f'{epochs}; {loader.dropped} tokens dropped (remainders of one token)', flush=True)
    if step:
        old = updater.param_groups[0]['lr']
        new = learning_rate(step, max(step / max_steps, elapsed / budget))
        print(f'continuing at step {step}: the learning rate was {old:.2e}, now it is {new:.2e}')
    del state  # it holds a copy of the model

    # A thread collates the next batch while the device computes.
    run = None
    if tracker and rank == 0:
        run = import_module(tracker).init(project='slam', config=config)
    stopping = M.catch_signals()
    batches = loader.iter_batches(batch_tokens // row_tokens, rank, world, pin=cuda)
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(next, batches)
    sums = torch.zeros(2, device=torch_device)  # of loss and gradient norm, since the last report
    last_step, last_seen, clock = step, seen, time.perf_counter()  # at the last report
    over, halt = step >= max_steps or elapsed >= budget, 0
    model.train()

    while not over and not halt:
        # The learning rate follows the steps, or the hours if those are further along.
        rate = learning_rate(step, max(step / max_steps, elapsed / budget))
        for group in updater.param_groups:
            group['lr'] = rate
        (rows, shares, n_tokens, place), ahead = ahead.result(), thread.submit(next, batches)
        if dropout:  # seed by step, so that a resumed run draws the same masks
            torch.manual_seed(seed + step * world + rank)

        # Accumulate the gradient of the mean loss per predicted token, one row at a time.
        for row, share in zip(rows, shares, strict=True):
            tokens, targets, doc = row.to(torch_device, non_blocking=True)[:, None]
            with autocast:
                loss = model(tokens, targets, doc=doc) * share
            loss.backward()
            sums[0] += loss.detach()
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)

        # Clip and step. The CPU does not wait for the device until the next report.
        sums[1] += torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        updater.step()
        updater.zero_grad()
        step, seen = step + 1, seen + n_tokens
        intervals = eval_interval, save_interval, log_interval
        evaluate, save, report = (each and step % each == 0 for each in intervals)
        alone = stopping and world == 1  # several processes stop at the same report
        if not (evaluate or save or report or alone or step == max_steps):
            continue

        # Read the sums, which waits for the device. The clock of rank 0 counts.
        mean_loss, norm = (sums / (step - last_step)).tolist()
        took = time.perf_counter() - clock
        numbers = [mean_loss, elapsed + took if rank == 0 else 0, len(stopping)]
        if world > 1:
            numbers = torch.tensor(numbers, dtype=torch.float64, device=torch_device)
            dist.all_reduce(numbers)
        mean_loss, elapsed, halt = map(float, numbers)
        if not math.isfinite(mean_loss + norm):
            known = f'the loss is not finite at step {step}; the last checkpoint is kept'
            raise InputError(f'{known}. Causes: a high --lr, a short warm-up, a damaged --init')
        over = step >= max_steps or elapsed >= budget
        record = dict(step=step, loss=mean_loss, norm=norm, lr=rate, tokens=seen)
        record |= dict(elapsed=round(elapsed, 2), tokens_per_s=round((seen - last_seen) / took))

        # Validate at intervals and at the end, and log.
        if validation and (evaluate or over):
            scores = validate(model, validation, torch_device, autocast, rank, world)
            record |= (scores := scores | dict(step=step, tokens=seen))
        log_file.write(json.dumps(record) + '\n')
        if run:
            run.log({key: record[key] for key in record if key != 'step'}, step=step)
        print(format_record(record), flush=True)

        # Save the checkpoint and the state for an exact resume.
        if rank == 0 and (save or over or halt):
            compute = dict(devices=world, device=machine, hours=elapsed / 3600, tokens=seen)
            slam |= dict(scores=scores, compute=compute)
            state = dict(step=step, elapsed=elapsed, seen=seen, place=place, scores=scores)
            state |= dict(model=model.state_dict(), optimizer=updater.state_dict(), config=config)
            model.save_pretrained(out_dir, slam)
            with M.write_atomic(os.path.join(out_dir, 'train_state.pt'), 'wb') as file:
                torch.save(state, file)
        sums.zero_()
        last_step, last_seen, clock = step, seen, time.perf_counter()

    log_file.close()
    if world > 1:  # a process that ends alone can abort the others
        dist.barrier()
        dist.destroy_process_group()
    result = f', val loss {scores["val_loss"]:.4f} at step {scores["step"]}' if scores else ''
    print(f'{out_dir}: {step} steps, {seen:,} tokens, {elapsed / 60:.1f} min{result}')
    if not over:
        print('stopped and saved; run the same command to continue')
        raise SystemExit(128 + (stopping or [signal.SIGTERM])[0])
