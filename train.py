"""Pre-train a speech language model: the 24-hour recipe of Slam (arXiv 2502.15814) and every ablation of it.

Notable: rows packed without padding, in an order that no number of processes changes; a schedule by steps or hours, whichever end first;
fp32 weights under bf16 autocast (small updates survive, products are fast); no step waits for the GPU (its loss is read one step late).

    python train.py config/demo.py                                                     # minutes on a CPU
    python train.py config/slam_a5000.py --data=librilight,librispeech,stinystories    # 24 hours on one GPU
    torchrun --nproc_per_node=2 train.py config/slam_scaled.py                         # one node or many, the same global batch

out_dir becomes a checkpoint that transformers loads (config.json, model.safetensors, slam.json, and encoder/ and vocoder/ if the units have
their own) with train_state.pt to go on from, log.jsonl and (given matplotlib) curve.png; out_dir/best is the best by validation. Killed at any
moment, a run goes on exactly when the same command is given again.
"""

from config import configure, fail

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from model import BOS, OFFSET, SLM, InputError, SLMConfig, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# Table 4 of the paper, and from the public configuration what it leaves out
out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'  # folders of prepare_units.py, or names below data_dir; 'a:2,b' shows a twice an epoch
data_dir = 'data'
init = 'Qwen/Qwen2.5-0.5B'  # text LM (TWIST) or SLM: folder or hub name; 'preset:NAME': its shape alone (Table 7); 'scratch': this shape:
family = 'qwen2'  # qwen2, llama, opt, gpt_neox
n_layer = 4
n_embd = 256
n_head = 4
n_kv_head = 2
n_ffn = 1024
embed_init = (
    'first_rows'  # unit embeddings under TWIST: first_rows of the text embedding, random, mean
)
rope_theta = 10000.0  # lowered from the text LM's
context = 1024  # tokens in a row, and at most in a chunk of an utterance
dropout = 0.0
batch_size = 8  # rows in one pass of one device
global_batch = 128  # rows in a step, over passes and devices
optimizer = 'adamw'  # adamw, muon (matrices; AdamW the rest), ademamix, adalomo (both: pip install pytorch-optimizer)
lr = 1e-3
min_lr = 5e-5  # where cosine and wsd end
schedule = 'cosine'  # cosine, inverse_sqrt, wsd (warm up, stay, decay)
warmup_fraction = 0.01  # of the run, or
warmup_steps = 100  # so many steps, the longer of the two
decay_fraction = 0.2  # of the run, for wsd
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0  # on matrices
grad_clip = 0.5  # gradient norm; 0: off
max_steps = 17625  # the run ends at this many steps
train_hours = (
    23.5  # or hours, whichever is first; validation, checkpoints and compilation do not count
)
eval_interval = 500  # steps between validations; 0: none
eval_tokens = 1_000_000  # of the validation split, always the same; 0: all
save_interval = 500  # steps between checkpoints; 0: at the end alone
save_init = False  # also write the untrained model, beside out_dir, as untrained/
resume = True  # continue from out_dir/train_state.pt if there is one; False: start over
log_interval = 1  # steps between lines on the terminal
wandb = False  # also log to Weights & Biases (pip install wandb)
shard_model = False  # FSDP2 in place of DDP: for 1.5 B parameters and up
compile = None  # torch.compile; None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

FREE = (
    'out_dir',
    'data_dir',
    'batch_size',
    'max_steps',
    'train_hours',
    'eval_interval',
    'eval_tokens',
    'save_interval',
    'save_init',
    'resume',
    'log_interval',
    'wandb',
    'shard_model',
    'compile',
    'device',
)  # what may differ when a run is continued
PEAK = {
    'B200': 2250,
    'H200': 989,
    'H100 PCIe': 756,
    'H100': 989,
    'A100': 312,
    'L40S': 362,
    'A6000': 155,
    'A5000': 111,
    'A40': 150,
    'A10': 125,
    '4090': 165,
    '3090': 71,
}  # dense bf16 TFLOP/s by NVIDIA's data sheets


def learning_rate(
    step,
    progress,
    peak,
    low,
    schedule,
    warmup_steps,
    warmup_fraction,
    max_steps,
    decay_fraction=0.2,
):
    """The rate of a step (from 0) at `progress`, the share of the run that is done: step / max_steps, unless the clock is ahead of it."""
    warm = min(
        1,
        (step + 1) / max(1, warmup_steps),
        (progress + 1 / max_steps) / max(warmup_fraction, 1 / max_steps),
    )
    warmup = max(warmup_steps, warmup_fraction * max_steps)  # steps
    if schedule == 'cosine':
        done = min(1, max(0, progress - warmup / max_steps) / max(1e-9, 1 - warmup / max_steps))
        return min(peak * warm, low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == 'inverse_sqrt':
        timescale = warmup or 10_000
        return peak * min(warm, math.sqrt(timescale / (max(step, warmup) + timescale - warmup)))
    if schedule == 'wsd':
        return min(peak * warm, low + (peak - low) * min(1, max(0, 1 - progress) / decay_fraction))
    raise InputError(f'schedule {schedule!r} is unknown: use cosine, inverse_sqrt or wsd')


def open_data(names, data_dir='data'):
    """'a:2,b' -> list of (folder, weight, meta.json) whose units agree. Raises InputError naming what is missing or differs."""
    sets = []
    for name, _, weight in (part.strip().partition(':') for part in names.split(',')):
        folder = name if os.path.isdir(name) else os.path.join(data_dir, name)
        try:
            with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
                meta, weight = json.load(file), float(weight or 1)
            if (
                not 0 < weight < math.inf
                or min(
                    np.dtype(meta['dtype']).itemsize, meta['vocab_size'], meta['tokens']['train']
                )
                < 1
            ):
                raise ValueError(f'weight {weight:g}, or nothing to train on')
            for part in ('encoder', 'vocoder'):  # a checkpoint without them could not be heard
                if meta.get(part) == part and not os.path.isdir(os.path.join(folder, part)):
                    raise ValueError(f'no folder {part}, which meta.json names')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'data {name!r}: {type(error).__name__} {error}; name folders that prepare_units.py made, NAME or NAME:WEIGHT'
            ) from None
        sets.append((folder, weight, meta))
        for key in ('vocab_size', 'offset', 'dedup', 'frame_rate'):
            if sets[-1][2].get(key) != sets[0][2].get(key):
                raise InputError(
                    f'{folder} and {sets[0][0]} differ in {key}: units of one kind only can be mixed'
                )
    return sets


def find_utterances(tokens, block=1 << 22):
    """Where utterances begin, (n,) int64: at 0 and where two <S> meet. One pass in constant memory, a second a billion tokens: no cache needed."""
    found = [np.zeros(1, np.int64)]
    for at in range(0, len(tokens), block):
        border = tokens[at : at + block + 1] == BOS  # one more, for the pair that blocks would part
        found.append(np.flatnonzero(border[:-1] & border[1:]) + (at + 1))
    return np.concatenate(found)


def find_chunks(tokens, context):
    """Utterances cut into chunks of at most `context` tokens, the remainder kept: begins and lengths, (n,) int64 each."""
    starts = find_utterances(tokens)
    ends = np.append(starts[1:], len(tokens))
    pieces = -(-(ends - starts) // context)
    nth = np.arange(pieces.sum()) - np.repeat(
        np.cumsum(pieces) - pieces, pieces
    )  # chunk of its utterance
    begins = np.repeat(starts, pieces) + nth * context
    return begins, np.minimum(context, np.repeat(ends, pieces) - begins)


class Loader:
    """Rows of `context` tokens: chunks in a new random order each epoch, laid end to end, cut at every row's end. No padding.
    A cut chunk goes on in the next row as a document of its own, and its first token there is the target of its last token here: so an
    epoch shows each token once and predicts each once, but for the first of a chunk. A set of weight w gives w times its chunks to an
    epoch, in shuffled passes of its own: none comes twice before all have come. whole: chunks are not cut, rows are padded (validation).
    State: epoch, offset in the epoch's stream of tokens. Memory: 32 bytes a chunk."""

    def __init__(self, sets, context, seed, split='train', whole=False, at=(0, 0)):
        self.T, self.seed, self.sets, self.whole = context, seed, sets, whole
        self.tokens = []  # of each set, a read-only memory map (N,)
        for folder, _, meta in sets:
            path, kind = os.path.join(folder, split + '.bin'), np.dtype(meta['dtype'])
            if (
                not os.path.exists(path)
                or not 0 < os.path.getsize(path) == kind.itemsize * meta['tokens'][split]
            ):
                raise InputError(
                    f'{path} is missing, empty or truncated: run prepare_units.py again'
                )
            self.tokens.append(np.memmap(path, kind, 'r'))
            if (most := self.tokens[-1].max()) >= meta['vocab_size']:
                raise InputError(
                    f'{path} has token {most}, meta.json a vocabulary of {meta["vocab_size"]}: run prepare_units.py again'
                )
        tables = [find_chunks(tokens, context) for tokens in self.tokens]
        self.first = np.cumsum(
            [0] + [len(begins) for begins, _ in tables]
        )  # set s has the chunks first[s] to first[s + 1]
        self.begins, self.lengths = (np.concatenate(column) for column in zip(*tables))
        self.seek(*at)

    def seek(self, epoch, offset):
        """Go there. order (n,): the epoch's chunk numbers; ends (n,): where each ends in its stream."""
        picks = []
        for s, (_, weight, _) in enumerate(self.sets):
            n = self.first[s + 1] - self.first[s]
            at, stop = round(epoch * weight * n), round((epoch + 1) * weight * n)
            while at < stop:
                turn, into = divmod(at, n)
                picks.append(
                    self.first[s]
                    + np.random.default_rng((self.seed, s + 1, turn + 1)).permutation(n)[
                        into : into + stop - at
                    ]
                )
                at += len(picks[-1])
        if not picks:
            raise InputError('the weights of data leave nothing to an epoch: raise them')
        self.order = np.concatenate(picks)
        if len(picks) > 1:
            np.random.default_rng((self.seed, 0, epoch + 1)).shuffle(self.order)
        self.ends = np.cumsum(self.lengths[self.order])
        self.epoch, self.offset = epoch, offset

    def pieces(self, rows):
        """The next rows as (place among their tokens, set, begin in its file, length, whether its chunk ends with it). Moves on."""
        at, i = 0, int(np.searchsorted(self.ends, self.offset, 'right'))
        while at < rows * self.T:
            chunk, left, room = self.order[i], int(self.ends[i]) - self.offset, self.T - at % self.T
            if self.whole and left > room:
                at += room
                continue
            take = min(left, room)
            yield (
                at,
                int(np.searchsorted(self.first, chunk, 'right')) - 1,
                int(self.begins[chunk] + self.lengths[chunk]) - left,
                take,
                take == left,
            )
            at, self.offset, i = at + take, self.offset + take, i + (take == left)
            if i == len(self.ends):
                self.seek(self.epoch + 1, 0)
                if self.whole:
                    return
                i = 0

    def batches(self, batch_size, global_batch, rank=0, world=1, pin=False):
        """Endless steps, as dicts: micro, this rank's (passes, 3, batch_size, T) int64 of tokens, targets (-100 where a chunk ends), doc;
        total, the predictions in the whole global batch; at and after, the states around it."""
        share = global_batch // world * self.T
        while True:
            state, total = (self.epoch, self.offset), 0
            tokens, targets, doc = batch = np.tile(np.array([[0], [-100], [-1]]), share)
            for at, s, begin, length, last in self.pieces(global_batch):
                total, at = total + length - last, at - rank * share
                if 0 <= at < share:
                    piece = self.tokens[s][begin : begin + length + (not last)]
                    tokens[at : at + length], doc[at : at + length] = piece[:length], at
                    targets[at : at + len(piece) - 1] = piece[1:]
            micro = torch.from_numpy(batch.reshape(3, -1, batch_size, self.T).swapaxes(0, 1).copy())
            yield dict(
                micro=micro.pin_memory() if pin else micro,
                total=total,
                at=state,
                after=(self.epoch, self.offset),
            )

    def names(self, rows, places=()):
        """The utterances in the next rows (of the pieces at these places, or all), for messages: set, number and, where known, file."""
        names, pieces = (
            [],
            [piece for piece in self.pieces(rows) if not places or piece[0] in places],
        )
        for s in sorted({piece[1] for piece in pieces}):
            tokens, path = self.tokens[s], os.path.join(self.sets[s][0], 'units.jsonl')
            starts = np.append(find_utterances(tokens), len(tokens))
            numbers = np.unique(
                np.searchsorted(starts, [piece[2] for piece in pieces if piece[1] == s], 'right')
                - 1
            )
            wanted = {tuple(tokens[starts[i] + 1 : starts[i + 1] - 1].tolist()): i for i in numbers}
            lines = map(json.loads, open(path, encoding='utf-8')) if os.path.exists(path) else ()
            files = {
                wanted.get(tuple(unit + OFFSET for unit in line['units'])): line['file_name']
                for line in lines
            }
            names += [
                f'{self.sets[s][0]} utterance {i} {files.get(i, "")}'.strip() for i in numbers
            ]
        return names


def make_optimizers(model, name, lr, betas, eps, weight_decay):
    """List of optimizers over the model's parameters. Raises InputError for an unknown name or a missing package."""
    matrices, rest = (
        [p for p in model.parameters() if (p.ndim >= 2) == flag] for flag in (True, False)
    )
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    if name == 'adamw':
        return [torch.optim.AdamW(groups, lr, betas, eps, fused=True)]
    if (
        name == 'muon'
    ):  # the matrices between layers; embedding, head, norms and biases stay with AdamW
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith('blocks')]
        groups[0]['params'] = [p for p in matrices if not any(p is one for one in hidden)]
        return [
            torch.optim.Muon(hidden, lr, weight_decay, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW(groups, lr, betas, eps, fused=True),
        ]
    if name not in ('ademamix', 'adalomo'):
        raise InputError(f'optimizer {name!r} is unknown: use adamw, muon, ademamix or adalomo')
    if not importlib.util.find_spec('pytorch_optimizer'):
        raise InputError(f'optimizer {name} needs a package: pip install pytorch-optimizer')
    from pytorch_optimizer import AdaLOMO, AdEMAMix

    if name == 'ademamix':
        return [AdEMAMix(groups, lr, (*betas, 0.9999), eps=eps, weight_decouple=True)]
    model.requires_grad_(
        False
    )  # else it would update inside the backward pass, which rules out accumulation
    one = AdaLOMO(model, lr, weight_decay, loss_scale=0)
    model.requires_grad_(True)
    one.step = lambda: (
        setattr(one, 'lr', one.param_groups[0]['lr']),
        setattr(one, 'num_steps', one.num_steps + 1),
        one.grad_func(None),
    )
    return [one]


def from_now(seconds):
    return time.strftime('%a %H:%M', time.localtime(time.time() + seconds))


def duration(seconds):
    return (
        f'{seconds / 3600:.1f} h'
        if seconds >= 5400
        else f'{seconds / 60:.1f} min'
        if seconds >= 90
        else f'{seconds:.0f} s'
    )


if __name__ == '__main__':
    config = configure(globals())
    # --- processes and device: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE
    rank, local, world = (
        int(os.environ.get(key, default))
        for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
    )

    def say(text):
        try:
            _ = rank or print(text, flush=True)
        except BrokenPipeError:  # a reader that left (`| head`) ends the lines, not the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def hook(kind, error, trace, before=sys.excepthook):
        if issubclass(
            kind, (torch.OutOfMemoryError, MemoryError)
        ) or "can't allocate memory" in str(error):
            fail(
                f'out of memory: lower --batch_size={batch_size} (the global batch stays as it is), --context={context} or the size of the model'
            )
        before(kind, error, trace)

    sys.excepthook = hook

    if wandb and not importlib.util.find_spec('wandb'):
        fail('--wandb needs a package: pip install wandb')
    least = dict(
        context=2,
        batch_size=1,
        global_batch=1,
        max_steps=1,
        log_interval=1,
        lr=1e-9,
        rope_theta=1,
        train_hours=1e-9,
        decay_fraction=1e-9,
    )
    for key, value in config.items():
        low, high = (
            least.get(key, int(key.startswith('n_'))),
            1 if key in ('dropout', 'beta1', 'beta2', 'warmup_fraction') else math.inf,
        )
        if type(value) in (int, float) and not low <= value < high:
            fail(f'--{key}={value} is out of range: at least {low}, less than {high}')
    learning_rate(
        0, 0, lr, min_lr, schedule, warmup_steps, warmup_fraction, max_steps, decay_fraction
    )  # an unknown schedule fails here
    budget, device = 3600 * train_hours, pick_device(device)
    cuda, dtype = device.type == 'cuda', pick_dtype(dtype, device)
    if cuda:
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world > 1 or shard_model:
        dist.init_process_group(
            'nccl' if cuda else 'gloo',
            **({} if world > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)),
        )
    if global_batch % (batch_size * world):
        fail(
            f'global_batch {global_batch} must be a multiple of batch_size {batch_size} x {world} processes'
        )
    if shard_model and optimizer != 'adamw':
        fail(f'shard_model needs optimizer=adamw, not {optimizer}')

    # --- where this run stopped before
    state_path, log_path, state = (
        os.path.join(out_dir, 'train_state.pt'),
        os.path.join(out_dir, 'log.jsonl'),
        {},
    )
    if resume and os.path.exists(state_path):
        try:
            state = torch.load(state_path, map_location='cpu', mmap=True, weights_only=True)
            if missing := {'config', 'model', 'optimizers', 'step', 'position', 'tokens'} - set(
                state
            ):
                raise ValueError(f'it has no {", ".join(sorted(missing))}')
        except Exception as error:
            fail(f'{state_path} cannot be read ({str(error)[:100]}): --resume=False starts over')
        for key, value in state['config'].items():
            if key not in FREE and config.get(key) != value:
                fail(
                    f'{out_dir} is a run with {key}={value!r}, not {config.get(key)!r}: choose another --out_dir, or --resume=False'
                )
    start = (
        dict(
            step=0,
            elapsed=0.0,
            skipped=0,
            position=(0, 0),
            val_loss=None,
            best=math.inf,
            tokens=None,
        )
        | state
    )
    step, elapsed, skipped, position, val_loss, best = (
        start[key] for key in ('step', 'elapsed', 'skipped', 'position', 'val_loss', 'best')
    )
    if step >= max_steps or elapsed >= budget:
        say(
            f'{out_dir}: finished before, {step} steps in {duration(elapsed)}, val loss {val_loss}; nothing to do (--resume=False starts over)'
        )
        raise SystemExit

    # --- data and model
    sets = open_data(data, data_dir)
    (folder, _, meta), tokens_of_sets = sets[0], [one[2]['tokens'] for one in sets]
    if start['tokens'] not in (None, tokens_of_sets):
        fail(
            f'{data} holds other data than when {out_dir} began ({start["tokens"]} tokens): choose another --out_dir, or --resume=False'
        )
    loader, val_batches = Loader(sets, context, seed, at=position), []
    val_sets = [one for one in sets if eval_interval and one[2]['tokens'].get('val')]
    val = val_sets and Loader(val_sets, context, 0, 'val', whole=True)
    while val and not val.epoch and not 0 < eval_tokens <= val.offset:
        val_batches.append(next(val.batches(batch_size, batch_size))['micro'][0])
    shape = dict(
        vocab_size=meta['vocab_size'], context=context, rope_theta=rope_theta, dropout=dropout
    )
    if init.startswith('preset:'):
        raw = SLM.from_preset(init[7:], seed=seed, **shape)
    elif init == 'scratch':
        raw = SLM(
            SLMConfig(
                family,
                n_layer=n_layer,
                n_embd=n_embd,
                n_head=n_head,
                n_kv_head=n_kv_head,
                n_ffn=n_ffn,
                **shape,
            ),
            seed,
        )
    else:
        raw = SLM.from_pretrained(init, embed_init=embed_init, seed=seed, **shape)
    slam = {key: meta.get(key) for key in ('encoder', 'vocoder', 'n_units', 'frame_rate', 'dedup')}
    slam |= {
        key: os.path.join(folder, slam[key])
        for key in ('encoder', 'vocoder')
        if os.path.isdir(os.path.join(folder, str(slam[key])))
    }
    slam |= dict(
        recipe=config, git_commit=subprocess.getoutput('git rev-parse HEAD 2>/dev/null') or None
    )
    os.makedirs(out_dir, exist_ok=True)
    if save_init and not state and rank == 0:
        raw.save_pretrained(
            os.path.join(os.path.dirname(os.path.normpath(out_dir)), 'untrained'), slam
        )
    n_params, flops = raw.num_params(), raw.flops_per_token(float(loader.lengths.mean()))
    model = raw.to(device)
    if shard_model:
        from torch.distributed.checkpoint import state_dict as shards
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        whole = shards.StateDictOptions(full_state_dict=True, cpu_offload=True)
        for part in (*raw.blocks, raw):
            fully_shard(
                part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            )
    if compile or compile is None and cuda:
        torch._dynamo.config.optimize_ddp = (
            False  # it would split the graph, which flex attention does not survive
        )
        raw.compile(dynamic=False)
    optimizers = make_optimizers(raw, optimizer, lr, (beta1, beta2), eps, weight_decay)
    if state and shard_model:
        shards.set_state_dict(
            raw,
            optimizers,
            model_state_dict=state['model'],
            optim_state_dict=state['optimizers'],
            options=whole,
        )
    elif state:
        raw.load_state_dict(state['model'])
        for one, saved in zip(optimizers, state['optimizers']):
            one.load_state_dict(saved)
    if world > 1 and not shard_model:
        model = torch.nn.parallel.DistributedDataParallel(
            raw, device_ids=[local] if cuda else None, gradient_as_bucket_view=True
        )
    autocast = (
        torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    )
    peak = next(
        (
            1e12 * world * tflops
            for name, tflops in PEAK.items()
            if cuda and name in torch.cuda.get_device_name(device)
        ),
        None,
    )

    def save(folder, to_resume=True):
        """Write a checkpoint; last, in one file complete in itself, what a killed run goes on from: a run that calls itself finished is whole."""
        states = raw.state_dict(), [one.state_dict() for one in optimizers]
        if shard_model:
            states = shards.get_state_dict(raw, optimizers, options=whole)
        if rank:
            return
        try:
            raw.save_pretrained(
                folder,
                dict(
                    slam,
                    scores=dict(val_loss=val_loss, step=step, tokens=step * global_batch * context),
                ),
                states[0],
            )
            if to_resume:
                torch.save(
                    dict(
                        step=step,
                        elapsed=elapsed,
                        skipped=skipped,
                        best=best,
                        val_loss=val_loss,
                        position=position,
                        config=config,
                        tokens=tokens_of_sets,
                        model=states[0],
                        optimizers=states[1],
                    ),
                    state_path + '.tmp',
                )
                os.replace(state_path + '.tmp', state_path)
        except Exception as error:
            with contextlib.suppress(OSError):
                os.remove(state_path + '.tmp')
            fail(
                f'cannot write {folder} ({error}): the checkpoint before it is kept; make room and run the same command to continue'
            )

    def validate():
        """Mean loss in nats over the predictions of the validation batches. Every process goes through all of them."""
        model.eval()
        total = torch.zeros(2, device=device)
        for batch in val_batches:
            tokens, targets, doc = batch.to(device)
            with torch.no_grad(), autocast:
                loss, n = model(tokens, targets, doc=doc)[1], (targets >= 0).sum()
            total += torch.stack((torch.where(n > 0, loss * n, 0), n))
        model.train()
        return float(total[0] / total[1])

    def log(**record):
        log_file.write(json.dumps(record) + '\n')
        _ = run and run.log(record, step=record['step'])

    def report(past):
        """The line of a step whose numbers are there by now. Returns: training seconds and halt, as all the processes know them."""
        global in_a_row, skipped
        if cuda:
            past['event'].synchronize()
        loss, seconds, halt, norm, bad = past['stats'].tolist()
        in_a_row, skipped, speed = (
            (in_a_row + 1 if bad else 0),
            skipped + int(bad),
            global_batch * context / past['took'],
        )
        if (
            past['step'] == first_step + 10 < max_steps
        ):  # seconds: without the first of them, which compiles, and the last
            left = min(
                (max_steps - past['step']) * (seconds - start['elapsed']) / 8, budget - seconds
            )
            say(
                f'estimated finish {from_now(left)}, in {duration(left)}; validation and checkpoints come on top'
            )
        if bad:  # named are the utterances whose logits are not finite
            again, places = Loader(sets, context, seed, at=past['at']), set()
            for tokens, _, doc in next(again.batches(batch_size, global_batch))['micro'].to(device):
                with torch.no_grad(), autocast:
                    places |= set(doc[~raw(tokens, doc=doc).isfinite().all(-1)].tolist())
            names = Loader(sets, context, seed, at=past['at']).names(global_batch, places)
            message = (
                f'loss {loss}, gradient norm {norm} with {", ".join(names[:3])}'
                + f' and {len(names) - 3} more' * (len(names) > 3)
            )
            say(f'step {past["step"]} skipped: {message}')
        elif past['step'] % log_interval == 0:
            left = duration(
                max(0, min((max_steps - past['step']) * past['took'], budget - seconds))
            )
            say(
                f'step {past["step"]}/{max_steps} | loss {loss:.4f} | lr {past["lr"]:.2e} | norm {norm:.2f} | {speed:,.0f} tok/s'
                f'{f" | mfu {speed * flops / peak:.1%}" if peak else ""}{f" | val {val_loss:.4f}" if val_loss else ""} | {left} left'
            )
        log(
            step=past['step'],
            lr=past['lr'],
            tokens_per_s=round(speed),
            elapsed=round(seconds, 2),
            **(dict(loss=None, skipped=names) if bad else dict(loss=loss, norm=norm)),
        )
        if in_a_row == 10:
            save(out_dir)
            fail(f'10 steps in a row were not finite, the last with {message}')
        return seconds, halt

    # --- start
    if rank == 0:  # what a killed run logged past its checkpoint goes
        with open(log_path + '.tmp', 'w') as file:
            lines = open(log_path) if state and os.path.exists(log_path) else ()
            file.writelines(
                line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step
            )
        os.replace(log_path + '.tmp', log_path)
    log_file = open(log_path if rank == 0 else os.devnull, 'a', buffering=1)
    run = (
        wandb
        and rank == 0
        and __import__('wandb').init(project='slam', name=os.path.basename(out_dir), config=config)
    )
    say(
        f'{init}: {n_params:,} parameters, {world} x {device}, {dtype}; {data}: {loader.ends[-1]:,} tokens an epoch; {max_steps:,} steps '
        f'of {global_batch * context:,} or {train_hours:.3g} h, {from_now(budget - elapsed)} at the latest'
        + f'; going on at step {step}'
        * bool(step)
    )
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    batches, pool = (
        loader.batches(batch_size, global_batch, rank, world, pin=cuda),
        ThreadPoolExecutor(1),
    )  # makes a batch while the device works
    ahead = pool.submit(next, batches)
    agreed, halt, over, in_a_row, pending, clock, first_step = (
        elapsed,
        0,
        False,
        0,
        None,
        time.perf_counter(),
        step,
    )
    model.train()

    # --- the loop
    while not (over or halt):
        progress = max(step / max_steps, agreed / budget)
        rate = learning_rate(
            step,
            progress,
            lr,
            min_lr,
            schedule,
            warmup_steps,
            warmup_fraction,
            max_steps,
            decay_fraction,
        )
        batch, ahead = ahead.result(), pool.submit(next, batches)
        if dropout:
            torch.manual_seed(
                seed + step * world + rank
            )  # masks are a matter of the step: no generator's state to save
        loss = torch.zeros((), device=device)
        for i, micro in enumerate(batch['micro'], 1):
            tokens, targets, doc = micro.to(device, non_blocking=True)  # (batch_size, context) each
            weight = float((micro[1] >= 0).sum()) / max(
                1, batch['total']
            )  # a mean over the predictions of the global batch
            last = i == len(batch['micro'])
            raw.set_requires_gradient_sync(last) if shard_model else setattr(
                model, 'require_backward_grad_sync', last
            )  # the latter is DDP's
            with autocast:
                part = model(tokens, targets, doc=doc)[1] * weight
            (part * world).backward()  # of which DDP and FSDP take the mean over processes
            loss += part.detach()
        shared = torch.stack(
            (loss, loss.new_full((), elapsed * (rank == 0)), loss.new_full((), len(signals)))
        )
        if world > 1:
            dist.all_reduce(shared)
        norm = torch.nn.utils.get_total_norm([p.grad for p in raw.parameters()])
        norm = norm.full_tensor() if shard_model else norm
        bad = 1 - (shared[0].isfinite() & norm.isfinite()).float()
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(raw.parameters(), grad_clip, norm)
        for one in optimizers:
            for group in one.param_groups:
                group['lr'] = rate
            one.found_inf = bad  # fused AdamW reads it on the device and, where it is 1, leaves everything as it is
            if (
                optimizer == 'adamw' or not bad
            ):  # the others know no such switch, and zero gradients would still move them: the host waits
                one.step()
        raw.zero_grad()
        stats, event = torch.cat((shared, torch.stack((norm, bad)))), None
        if cuda:  # into pinned memory, read when the next step is under way
            stats, event = (
                torch.empty(5, pin_memory=True).copy_(stats, non_blocking=True),
                torch.cuda.Event(),
            )
            event.record()
        now = time.perf_counter()
        took, clock, step, position = now - clock, now, step + 1, batch['after']
        elapsed += took * (step > first_step + 1)  # the first step compiles
        previous, pending = (
            pending,
            dict(step=step, stats=stats, event=event, lr=rate, at=batch['at'], took=took),
        )
        if previous:
            agreed, halt = report(previous)
        evaluate, keep = (
            interval and step % interval == 0 for interval in (eval_interval, save_interval)
        )
        over = step >= max_steps or agreed >= budget
        if evaluate or keep or over or halt:
            (agreed, halt), pending = report(pending), None
            over = over or agreed >= budget
            if val_batches and (evaluate or over):
                val_loss = validate()
                log(step=step, val_loss=val_loss)
                if val_loss < best:
                    best = val_loss
                    save(os.path.join(out_dir, 'best'), to_resume=False)
            if keep or over or halt:
                save(out_dir)
            clock = time.perf_counter()

    # --- the end
    if rank == 0 and importlib.util.find_spec('matplotlib'):
        import matplotlib

        matplotlib.use('agg')
        from matplotlib import pyplot

        for key in ('loss', 'val_loss'):
            pyplot.plot(
                *np.array(
                    [
                        (row['step'], row[key])
                        for row in map(json.loads, open(log_path))
                        if row.get(key)
                    ]
                )
                .reshape(-1, 2)
                .T,
                label=key,
            )
        (
            pyplot.xlabel('step'),
            pyplot.ylabel('nats a token'),
            pyplot.legend(),
            pyplot.grid(),
            pyplot.savefig(os.path.join(out_dir, 'curve.png')),
        )
    if dist.is_initialized():
        dist.destroy_process_group()
    result = (
        f'{out_dir}: {step} steps, {step * global_batch * context:,} tokens, {duration(elapsed)}'
        + f', {skipped} steps skipped' * bool(skipped)
    )
    if not over:
        _ = rank or print(
            f'{result}; stopped and saved, the same command continues', file=sys.stderr
        )
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    say(
        result
        + (
            f', val loss {val_loss:.4f} (best {best:.4f}: {out_dir}/best)'
            if best < math.inf
            else ''
        )
    )
