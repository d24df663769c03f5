"""Pre-train a speech language model: the 24-hour recipe of Slam (arXiv 2502.15814) and every ablation of it.

Notable: packed rows without padding, whose order is the same for any number of processes; a schedule that follows steps or hours,
whichever end first; fp32 weights with bf16 autocast (the optimizer's small steps are not rounded away, the products run in bf16);
nothing in a step waits for the GPU (the loss is read one step late); a run that is killed, at any moment, goes on exactly.

    python train.py config/demo.py                                                     # minutes on a CPU
    python train.py config/slam_a5000.py --data=librilight,librispeech,stinystories    # 24 hours on one GPU
    torchrun --nproc_per_node=8 train.py config/slam_scaled.py                         # one node or many, the same global batch

out_dir becomes a checkpoint that transformers can load (model.safetensors, config.json, slam.json, encoder/ and vocoder/ where the units
have their own) with train_state.pt to go on from, log.jsonl and curve.png. out_dir/best is the best by validation. The same command
continues a run that was stopped and leaves a finished one alone.
"""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from config import configure, fail
from model import BOS, OFFSET, SLM, InputError, SLMConfig, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# Table 4 of the paper, and what it leaves out from the public configuration
out_dir = 'out/slam'
data = 'librilight,librispeech,stinystories'  # folders of prepare_units.py, or names below data_dir; 'a:2,b' shows a twice in an epoch
data_dir = 'data'
# the model
init = 'Qwen/Qwen2.5-0.5B'    # text LM (TWIST) or SLM: a folder or hub name; 'preset:NAME' the shape alone (Table 7); 'scratch' the shape below
embed_init = 'first_rows'     # unit embeddings under TWIST: first_rows of the text embedding, random, mean
family = 'qwen2'              # for init='scratch': qwen2, llama, opt, gpt_neox
n_layer = 4
n_embd = 256
n_head = 4
n_kv_head = 2
n_ffn = 1024
rope_theta = 10000.0          # lowered from the text LM's
context = 1024                # tokens in a row, and at most in a chunk of an utterance
dropout = 0.0
# the optimizer
batch_size = 8                # rows in one pass of one device
global_batch = 128            # rows in a step, over passes and devices
optimizer = 'adamw'           # adamw, muon (matrices; AdamW for the rest), ademamix, adalomo (pip install pytorch-optimizer)
lr = 1e-3
min_lr = 5e-5
schedule = 'cosine'           # cosine, inverse_sqrt, wsd (warm up, stay, decay)
warmup_fraction = 0.01        # the longer of the two
warmup_steps = 100
decay_fraction = 0.2          # of the run, for wsd
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0            # on matrices
grad_clip = 0.5               # norm; 0: none
max_steps = 17625             # the run ends at this many steps
train_hours = 23.5            # or hours of training, whichever is first; validation and compilation do not count
# validation, checkpoints, log
eval_interval = 500           # steps; 0: never
eval_tokens = 1_000_000       # of the validation split, always the same; 0: all
save_interval = 500           # steps; 0: at the end
save_init = False             # also keep the untrained model, in out_dir/../untrained
resume = True                 # go on from out_dir/train_state.pt; False: start over
log_interval = 1
wandb = False
wandb_project = 'slam'
# the machine
shard_model = False           # FSDP2 in place of DDP: for 1.5 B parameters and up
compile = None                # None: on CUDA
seed = 1234
device = 'auto'               # auto, cuda, mps, cpu
dtype = 'auto'                # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

FREE = ('out_dir data_dir max_steps train_hours eval_interval eval_tokens save_interval save_init resume log_interval wandb wandb_project '
        'compile device batch_size shard_model').split()  # knobs that may differ when a run is continued
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L40S': 362, 'L4': 121, 'A6000': 155, 'A5000': 111, 'A40': 150,
        'A10': 125, '4090': 165, '3090': 71}  # dense bf16 TFLOP/s, NVIDIA's data sheets


def learning_rate(step, progress, peak, low, schedule, warmup_steps, warmup_fraction, max_steps, decay_fraction=0.2):
    """The rate of step (from 0) when `progress` of the run, 0 to 1, is done. progress is step / max_steps unless the clock is ahead."""
    warm = min((step + 1) / max(1, warmup_steps), (progress + 1 / max_steps) / max(warmup_fraction, 1 / max_steps), 1)
    warmup = max(warmup_steps, warmup_fraction * max_steps)
    if schedule == 'cosine':
        done = min(1, max(0, (progress - warmup / max_steps) / max(1e-9, 1 - warmup / max_steps)))
        return min(peak * warm, low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == 'inverse_sqrt':
        timescale = warmup or 10_000
        return peak * min(warm, math.sqrt(timescale / (max(step, warmup) + timescale - warmup)))
    if schedule == 'wsd':
        return min(peak * warm, low + (peak - low) * min(1, (1 - progress) / decay_fraction))
    raise InputError(f'schedule {schedule!r} is unknown: use cosine, inverse_sqrt or wsd')


# -----------------------------------------------------------------------------
# The data: token files -> chunks -> packed rows


def open_data(names, data_dir='data'):
    """'a:2,b' -> list of (folder, weight, meta.json) whose units agree. Raises InputError naming what is missing or differs."""
    sets = []
    for name in names.split(','):
        name, _, weight = name.strip().partition(':')
        folder = name if os.path.isdir(name) else os.path.join(data_dir, name)
        try:
            meta = json.load(open(os.path.join(folder, 'meta.json'), encoding='utf-8'))
            sets.append((folder, float(weight or 1), meta))
        except FileNotFoundError:
            raise InputError(f'data {name!r}: no {folder}/meta.json; make it with prepare_units.py, or see --data and --data_dir') from None
        except ValueError:
            raise InputError(f'data {name!r}: the weight {weight!r} is no number, or {folder}/meta.json is broken') from None
        for key in ('vocab_size', 'offset', 'dedup', 'frame_rate'):
            if meta.get(key) != sets[0][2].get(key):
                raise InputError(f'{folder} has {key} {meta.get(key)!r}, {sets[0][0]} {sets[0][2].get(key)!r}: units of one kind only can be mixed')
    return sets


def open_tokens(folder, meta, split):
    """The tokens of a split as a read-only memory map, (N,), checked to be whole."""
    path, kind = os.path.join(folder, split + '.bin'), np.dtype(meta.get('dtype', 'uint16'))
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size == 0 or size % kind.itemsize or size // kind.itemsize != meta.get('tokens', {}).get(split, size // kind.itemsize):
        raise InputError(f'{path} is {"empty or missing" if not size else "truncated"}: run prepare_units.py again')
    tokens = np.memmap(path, kind, 'r')
    if tokens[0] != BOS or tokens[-1] != BOS:
        raise InputError(f'{path} does not begin and end with <S>: run prepare_units.py again')
    return tokens


def find_utterances(tokens, block=1 << 22):
    """Where utterances begin, (n,) int64: at 0 and wherever two <S> meet. One pass, constant memory, 1 to 2 s a billion tokens: no cache."""
    found = [np.zeros(1, np.int64)]
    for at in range(0, len(tokens), block):
        border = tokens[at:at + block + 1] == BOS  # one more, for a pair that the block would part
        found.append(np.flatnonzero(border[:-1] & border[1:]) + (at + 1))
    return np.concatenate(found)


def find_chunks(tokens, context):
    """Utterances cut into chunks of at most `context` tokens, the remainder kept: (n,) int64 begins, (n,) int64 lengths."""
    starts = find_utterances(tokens)
    ends = np.append(starts[1:], len(tokens))
    pieces = -(-(ends - starts) // context)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its utterance
    begins = np.repeat(starts, pieces) + nth * context
    return begins, np.minimum(context, np.repeat(ends, pieces) - begins)


class Loader:
    """Packed training rows: chunks in a new random order each epoch, laid end to end and cut every `context` tokens. No padding.

    A chunk that meets the end of its row goes on in the next row as a document of its own, and its first token there is the target
    of its last token here: so an epoch shows every token once and predicts every token once, but for the first of each chunk.
    A set of weight w gives w times its chunks to an epoch, in shuffled passes of its own: none comes again before all have come.
    State: epoch, offset (in tokens). Memory: 24 bytes a chunk.
    """

    def __init__(self, sets, context, seed):
        self.T, self.seed, self.sets = context, seed, sets
        self.tokens = [open_tokens(folder, meta, 'train') for folder, _, meta in sets]
        tables = [find_chunks(tokens, context) for tokens in self.tokens]
        self.first = np.cumsum([0] + [len(begins) for begins, _ in tables])  # chunk numbers of set s: first[s] to first[s + 1]
        self.begins, self.lengths = (np.concatenate(column) for column in zip(*tables))
        self.seek(0, 0)

    def seek(self, epoch, offset):
        """Go to a token of an epoch: order (n,) are its chunk numbers, ends (n,) where each ends in the epoch's stream of tokens."""
        picks = []
        for s, (_, weight, _) in enumerate(self.sets):
            n = self.first[s + 1] - self.first[s]
            at, stop = round(epoch * weight * n), round((epoch + 1) * weight * n)
            while at < stop:
                turn, into = divmod(at, n)
                picks.append(self.first[s] + np.random.default_rng((self.seed, s + 1, turn + 1)).permutation(n)[into:into + stop - at])
                at += len(picks[-1])
        self.order = np.concatenate(picks)
        if len(picks) > 1:
            np.random.default_rng((self.seed, 0, epoch + 1)).shuffle(self.order)
        self.ends = np.cumsum(self.lengths[self.order])
        self.epoch, self.offset = epoch, offset

    def pieces(self, rows):
        """What the next rows consist of: (set, begin in its file, length, whether it ends its chunk); none crosses a row. Moves on."""
        at, i = 0, int(np.searchsorted(self.ends, self.offset, 'right'))
        while at < rows * self.T:
            chunk, left = self.order[i], int(self.ends[i]) - self.offset
            take = min(left, self.T - at % self.T)
            yield int(np.searchsorted(self.first, chunk, 'right')) - 1, int(self.begins[chunk] + self.lengths[chunk]) - left, take, take == left
            at, self.offset, i = at + take, self.offset + take, i + (take == left)
            if i == len(self.ends):
                self.seek(self.epoch + 1, 0)
                i = 0

    def batches(self, batch_size, global_batch, rank=0, world=1, pin=False):
        """Endless steps, each a dict: `micro`, this rank's (3, batch_size, T) int64 tensors of tokens, targets (-100 where a chunk ends) and
        doc; `total`, the predictions in the global batch; `at` and `after`, the states around it."""
        share = global_batch // world * self.T
        while True:
            before, begin, ended = (self.epoch, self.offset), -rank * share, 0
            tokens, targets, doc = batch = np.empty((3, share), np.int64)
            for s, first, length, last in self.pieces(global_batch):
                if 0 <= begin < share:
                    piece, stop = self.tokens[s][first:first + length + (not last)], begin + length
                    tokens[begin:stop], doc[begin:stop] = piece[:length], begin
                    targets[begin:stop - 1], targets[stop - 1] = piece[1:length], -100 if last else piece[length]
                begin, ended = begin + length, ended + last
            micro = torch.from_numpy(batch.reshape(3, -1, batch_size, self.T)).transpose(0, 1).contiguous()
            yield dict(micro=micro.pin_memory() if pin else micro, total=global_batch * self.T - ended, at=before, after=(self.epoch, self.offset))

    def name(self, state, rows, only=None):
        """The utterances in the rows from a state on (`only`: in these of them), for messages: set, number and, where known, file."""
        self.seek(*state)
        names, at, found = [], 0, {}
        for s, begin, length, _ in self.pieces(rows):
            if only is None or at // self.T in only:
                found.setdefault(s, []).append(begin)
            at += length
        for s, begins in found.items():
            starts, tokens, folder = find_utterances(self.tokens[s]), self.tokens[s], self.sets[s][0]
            ends, files = np.append(starts[1:], len(tokens)), {}
            numbers = np.unique(np.searchsorted(starts, begins, 'right') - 1).tolist()
            wanted = {(tokens[starts[i] + 1:ends[i] - 1].astype(np.int64) - OFFSET).tobytes(): i for i in numbers}
            if os.path.exists(os.path.join(folder, 'units.jsonl')):
                for line in map(json.loads, open(os.path.join(folder, 'units.jsonl'), encoding='utf-8')):
                    files[wanted.get(np.asarray(line['units'], np.int64).tobytes())] = line['file_name']
            names += [f'{folder} utterance {i}' + (f' ({files[i]})' if i in files else '') for i in numbers]
        return names


def prefetch(batches):
    """The same batches, the next one made by a thread while the device works."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches)
        while True:
            batch, ahead = ahead.result(), pool.submit(next, batches)
            yield batch


def validation_batches(sets, context, batch_size, limit):
    """Whole chunks of the validation splits, in a fixed random order, next-fit into padded rows: [(3, batch_size, T)], at most `limit` tokens."""
    chunks = []
    for s, (folder, _, meta) in enumerate(sets):
        if os.path.exists(os.path.join(folder, 'val.bin')) and os.path.getsize(os.path.join(folder, 'val.bin')):
            tokens = open_tokens(folder, meta, 'val')
            chunks += [(tokens, begin, length) for begin, length in zip(*find_chunks(tokens, context)) if length > 1]
    batches, row, at, taken = [], 0, 0, 0
    for i in np.random.default_rng(0).permutation(len(chunks)):
        tokens, begin, length = chunks[i]
        if limit and taken + length > limit:
            break
        if at + length > context:
            row, at = row + 1, 0
        if row % batch_size == 0 and at == 0:
            batches.append(np.stack([np.zeros((batch_size, context), np.int64), np.full((batch_size, context), -100), np.full((batch_size, context), -1)]))
        batch = batches[-1][:, row % batch_size, at:at + length]
        batch[0], batch[1, :-1], batch[2] = tokens[begin:begin + length], tokens[begin + 1:begin + length], at
        at, taken = at + length, taken + length
    return [torch.from_numpy(batch) for batch in batches]


# -----------------------------------------------------------------------------
# The optimizer


def make_optimizers(model, name, lr, betas, eps, weight_decay, device):
    """List of optimizers over the model's parameters. Raises InputError for an unknown name or a missing package."""
    params = [p for p in model.parameters()]
    groups = [dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay), dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    adamw = dict(lr=lr, betas=betas, eps=eps, fused=device.type in ('cuda', 'cpu'))
    if name == 'adamw':
        return [torch.optim.AdamW(groups, **adamw)]
    if name == 'muon':  # for the matrices between layers; embedding, head, norms and biases stay with AdamW
        hidden = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(('embed', 'head'))}
        rest = [dict(g, params=[p for p in g['params'] if id(p) not in hidden]) for g in groups]
        return [torch.optim.Muon([p for p in params if id(p) in hidden], lr=lr, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'),
                torch.optim.AdamW(rest, **adamw)]
    if name not in ('ademamix', 'adalomo'):
        raise InputError(f'optimizer {name!r} is unknown: use adamw, muon, ademamix or adalomo')
    try:
        import pytorch_optimizer
    except ImportError:
        raise InputError(f'optimizer {name} needs a package: pip install pytorch-optimizer') from None
    if name == 'ademamix':
        return [pytorch_optimizer.AdEMAMix(groups, lr=lr, betas=(*betas, 0.9999), eps=eps, weight_decouple=True)]
    model.requires_grad_(False)  # or it updates inside the backward pass, which rules out accumulation and a global clip
    adalomo = pytorch_optimizer.AdaLOMO(model, lr=lr, weight_decay=weight_decay, loss_scale=0)
    model.requires_grad_(True)

    def step():
        adalomo.lr, adalomo.num_steps = adalomo.param_groups[0]['lr'], adalomo.num_steps + 1
        adalomo.grad_func(0)
    adalomo.step = step
    return [adalomo]


def explain_memory(before, remedy, kind, error, trace):
    """An excepthook that says what to do when memory is out; else as `before`."""
    if issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        fail(f'out of memory: {remedy}')
    before(kind, error, trace)


def draw(log_path, picture):
    """The curve of a log, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use('agg')
    from matplotlib import pyplot
    rows = [json.loads(line) for line in open(log_path)]
    for key in ('loss', 'val_loss'):
        pyplot.plot(*zip(*[(row['step'], row[key]) for row in rows if row.get(key)] or [(0, math.nan)]), label=key)
    pyplot.xlabel('step'), pyplot.ylabel('nats a token'), pyplot.legend(), pyplot.grid(True)
    pyplot.savefig(picture), pyplot.close()


def duration(seconds):
    return f'{seconds / 3600:.1f} h' if seconds >= 5400 else f'{seconds / 60:.1f} min' if seconds >= 90 else f'{seconds:.0f} s'


if __name__ == '__main__':
    config = configure(globals())
    # --- processes and device: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE
    rank, local, world = (int(os.environ.get(key, default)) for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = pick_device(device)
    dtype, cuda, compile = pick_dtype(dtype, device), device.type == 'cuda', device.type == 'cuda' if compile is None else compile
    if cuda:
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world > 1 or shard_model:
        dist.init_process_group('nccl' if cuda else 'gloo', **({} if world > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)))
    say = print if rank == 0 else lambda *_, **__: None
    if global_batch % (batch_size * world):
        fail(f'global_batch {global_batch} is not a multiple of batch_size {batch_size} x {world} processes')
    if shard_model and optimizer != 'adamw':
        fail(f'shard_model works with optimizer=adamw, not {optimizer}')
    sys.excepthook = partial(explain_memory, sys.excepthook, f'lower --batch_size (now {batch_size}; the global batch stays) or --context ({context})')

    # --- where a former run of this command stopped
    state_path, log_path, state = os.path.join(out_dir, 'train_state.pt'), os.path.join(out_dir, 'log.jsonl'), {}
    if resume and os.path.exists(state_path):
        state = torch.load(state_path, map_location='cpu', mmap=True, weights_only=True)
        for key, value in state['config'].items():
            if key in config and key not in FREE and config[key] != value:
                fail(f'{out_dir} holds a run with {key}={value!r}, now {config[key]!r}: choose another --out_dir, or --resume=False to start over')
    step, elapsed, skipped, position = (state.get(key, 0) for key in ('step', 'elapsed', 'skipped', 'position'))
    best, val_loss = state.get('best', math.inf), state.get('val_loss')
    if step >= max_steps or elapsed >= 3600 * train_hours:
        say(f'{out_dir}: finished before, {step} steps in {duration(elapsed)}, val loss {val_loss}; nothing to do (--resume=False starts over)')
        raise SystemExit

    # --- data and model
    sets = open_data(data, data_dir)
    home, meta = sets[0][0], sets[0][2]
    loader = Loader(sets, context, seed)
    loader.seek(*position or (0, 0))
    val_batches = validation_batches(sets, context, batch_size, eval_tokens) if eval_interval else []
    shape = dict(vocab_size=meta['vocab_size'], context=context, rope_theta=rope_theta, dropout=dropout)
    if init.startswith('preset:'):
        raw = SLM.from_preset(init[7:], seed=seed, **shape)
    elif init == 'scratch':
        raw = SLM(SLMConfig(family, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, n_ffn=n_ffn, **shape), seed)
    else:
        raw = SLM.from_pretrained(init, embed_init=embed_init, seed=seed, **shape)
    kin = {key: os.path.join(home, str(meta.get(key))) for key in ('encoder', 'vocoder')}  # folders beside the data, or public names
    slam = dict({key: path if os.path.isdir(path) else meta.get(key) for key, path in kin.items()}, n_units=meta['vocab_size'] - OFFSET,
                frame_rate=meta.get('frame_rate'), dedup=meta.get('dedup'), recipe=config, git_commit=subprocess.getoutput('git rev-parse HEAD'))
    if save_init and not state and rank == 0:
        raw.save_pretrained(os.path.join(os.path.dirname(os.path.normpath(out_dir)), 'untrained'), slam)
    n_params, flops = raw.num_params(), raw.flops_per_token(float(loader.lengths.mean()))
    raw.to(device)
    model = raw
    if shard_model:
        for part in [*raw.blocks, raw]:
            if compile and part is not raw:
                part.compile()
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    elif compile:
        torch._dynamo.config.optimize_ddp = False  # it splits the graph into DDP's buckets, which flex attention does not survive
        raw.compile(dynamic=False)
    optimizers = make_optimizers(raw, optimizer, lr, (beta1, beta2), eps, weight_decay, device)
    if state and shard_model:
        dcp.set_state_dict(raw, optimizers, model_state_dict=state['model'], optim_state_dict=state['optimizers'], options=WHOLE)
    elif state:
        raw.load_state_dict(state['model'])
        for one, saved in zip(optimizers, state['optimizers']):
            one.load_state_dict(saved)
    if world > 1 and not shard_model:
        model = torch.nn.parallel.DistributedDataParallel(raw, device_ids=[local] if cuda else None, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    peak = next((1e12 * tflops for name, tflops in PEAK.items() if cuda and name in torch.cuda.get_device_name(device)), None)

    def save(folder, to_resume=True):
        """A checkpoint folder; before its model, in one file complete in itself, what a killed run goes on from."""
        model_state, optimizer_state = dcp.get_state_dict(raw, optimizers, options=WHOLE) if shard_model else (
            raw.state_dict(), [one.state_dict() for one in optimizers])
        if rank:
            return
        try:
            os.makedirs(folder, exist_ok=True)
            if to_resume:
                torch.save(dict(step=step, elapsed=elapsed, skipped=skipped, best=best, val_loss=val_loss, position=position, config=config,
                                model=model_state, optimizers=optimizer_state), state_path + '.tmp')
                os.replace(state_path + '.tmp', state_path)
            raw.save_pretrained(folder, dict(slam, scores=dict(val_loss=val_loss, step=step, tokens=step * global_batch * context)), model_state)
        except Exception as error:
            for name in os.listdir(folder):
                if name.endswith('.tmp') and os.path.isfile(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            fail(f'cannot write {folder} ({error}): the checkpoint before it is kept; make room and run the same command to continue')

    def validate():
        """Mean loss in nats over the predictions of the validation batches, shared among the processes."""
        model.eval()
        total = torch.zeros(2, device=device)
        for i in range(rank, -(-len(val_batches) // world) * world, world):  # as many passes for each process: sharded models need it
            batch, counts = val_batches[i % len(val_batches)].to(device), i < len(val_batches)
            with torch.no_grad(), autocast:
                n = (batch[1] >= 0).sum() * counts
                total += torch.stack((model(batch[0], batch[1], doc=batch[2])[1] * n, n))
        if world > 1:
            dist.all_reduce(total)
        model.train()
        return float(total[0] / total[1])

    def culprits(at):
        """Names of the utterances at which a step that began at this position goes wrong; of all its utterances if the loss is finite."""
        again, docs = Loader(sets, context, seed), set()
        again.seek(*at)
        for tokens, targets, doc in next(again.batches(batch_size, global_batch))['micro'].to(device):
            with torch.no_grad(), autocast:
                docs |= set(doc[~model(tokens, targets, doc=doc)[0].isfinite().all(-1)].tolist())
        return again.name(at, global_batch, docs or None)

    def note(record):
        if rank == 0:
            log.write(json.dumps(record) + '\n')
            log.flush()
            if wandb:
                wandb_run.log(record, step=record['step'])

    def report(past):
        """The line of a step whose numbers have arrived. Returns: seconds and halt, which all processes take from here."""
        global in_a_row, skipped
        if cuda:
            past['event'].synchronize()
        loss, seconds, halt, norm, bad = past['stats'].tolist()
        in_a_row, skipped, speed = in_a_row + 1 if bad else 0, skipped + int(bad), global_batch * context / past['took']
        record = dict(step=past['step'], loss=loss, lr=past['lr'], norm=norm, tokens_per_s=round(speed), elapsed=round(seconds, 2))
        if bad:
            names = culprits(past['at'])
            record.update(loss=None, norm=None, skipped=names)
            message = f'loss {loss}, gradient norm {norm} at {", ".join(names[:3])}' + (f' and {len(names) - 3} more' if len(names) > 3 else '')
            say(f'step {past["step"]} skipped: {message}', flush=True)
            if in_a_row == 10:
                save(out_dir)
                fail(f'10 steps in a row were not finite; the last: {message}')
        elif past['step'] % log_interval == 0:
            left = min((max_steps - past['step']) * past['took'], 3600 * train_hours - seconds)
            say(f'step {past["step"]}/{max_steps} | loss {loss:.4f} | lr {past["lr"]:.2e} | norm {norm:.2f} | {speed:,.0f} tok/s'
                + (f' | mfu {speed * flops / peak / world:.1%}' if peak else '') + (f' | val {val_loss:.4f}' if val_loss else '')
                + f' | {duration(max(0, left))} left', flush=True)
        note(record)
        return seconds, halt

    # --- start
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        lines = [line for line in open(log_path) if json.loads(line)['step'] <= step] if state and os.path.exists(log_path) else []
        log = open(log_path, 'w')
        log.writelines(lines)
        if wandb:
            from wandb import init as wandb_init
            wandb_run = wandb_init(project=wandb_project, name=os.path.basename(out_dir), config=config, resume='allow')
    say(f'{init}: {n_params:,} parameters on {world} x {device}, {dtype}; {int(loader.ends[-1]):,} tokens an epoch from {data}, {global_batch * context:,} '
        f'a step; {max_steps:,} steps or {train_hours:.3g} h' + (f'; going on from step {step}' if step else ''))
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    batches = prefetch(loader.batches(batch_size, global_batch, rank, world, pin=cuda))
    agreed, halt, over, in_a_row, pending, clock, first_step = elapsed, 0, False, 0, None, time.perf_counter(), step
    model.train()

    # --- the loop
    while not (over or halt):
        rate = learning_rate(step, max(step / max_steps, agreed / 3600 / train_hours), lr, min_lr, schedule, warmup_steps, warmup_fraction,
                             max_steps, decay_fraction)
        batch = next(batches)
        if dropout:
            torch.manual_seed(seed + step * world + rank)  # so that the masks are the step's own and there is no state to save
        loss = torch.zeros((), device=device)
        for i, micro in enumerate(batch['micro']):
            tokens, targets, doc = micro.to(device, non_blocking=True)  # (batch_size, context)
            weight = float((micro[1] >= 0).sum()) / batch['total']  # the mean is over the predictions of the global batch
            if world > 1:
                sync = i == len(batch['micro']) - 1
                model.set_requires_gradient_sync(sync) if shard_model else setattr(model, 'require_backward_grad_sync', sync)
            with autocast:
                part = model(tokens, targets, doc=doc)[1] * weight
            (part * world).backward()  # DDP and FSDP take the mean over processes
            loss += part.detach()
        shared = torch.stack((loss, loss.new_full((), elapsed * (rank == 0)), loss.new_full((), len(stopping))))
        if world > 1:
            dist.all_reduce(shared)
        grads = [p.grad for p in raw.parameters()]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if shard_model else norm
        bad = 1 - (shared[0].isfinite() & norm.isfinite()).float()
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(raw.parameters(), grad_clip, norm)
        for one in optimizers:
            for group in one.param_groups:
                group['lr'] = rate
            if optimizer == 'adamw':
                one.found_inf = bad  # the fused kernel reads it on the device, and does nothing if it is 1
                one.step()
            elif not bad:  # here the host waits for it
                one.step()
        raw.zero_grad(set_to_none=True)
        stats = torch.cat((shared, torch.stack((norm, bad))))
        event = torch.cuda.Event() if cuda else None
        if cuda:  # to pinned memory, to be read when the next step is under way
            stats = torch.empty(5, pin_memory=True).copy_(stats, non_blocking=True)
            event.record()
        now = time.perf_counter()
        took, clock, step, position = now - clock, now, step + 1, batch['after']
        elapsed += took if step > first_step + 1 else 0  # the first step compiles
        previous, pending = pending, dict(step=step, stats=stats, event=event, lr=rate, at=batch['at'], took=took)
        if previous:
            agreed, halt = report(previous)
        evaluate, keep = (interval and step % interval == 0 for interval in (eval_interval, save_interval))
        over = step >= max_steps or agreed >= 3600 * train_hours
        if evaluate or keep or over or halt:
            (agreed, halt), pending = report(pending), None
            over = over or agreed >= 3600 * train_hours
            if val_batches and (evaluate or over):
                val_loss = validate()
                note(dict(step=step, val_loss=val_loss))
                if val_loss < best:
                    best = val_loss
                    save(os.path.join(out_dir, 'best'), to_resume=False)
            if keep or over or halt:
                save(out_dir)
            clock = time.perf_counter()

    # --- the end
    if rank == 0:
        draw(log_path, os.path.join(out_dir, 'curve.png'))
    if world > 1:
        dist.destroy_process_group()
    result = f'{step} steps, {step * global_batch * context:,} tokens, {duration(elapsed)}' + (f', {skipped} steps skipped' if skipped else '')
    if not over:
        say(f'{out_dir}: stopped and saved at {result}; run the same command to continue', file=sys.stderr)
        raise SystemExit(128 + int(stopping[0] if stopping else signal.SIGTERM))
    say(f'{out_dir}: {result}' + (f', val loss {val_loss:.4f} (best {best:.4f} in {out_dir}/best)' if val_loss else ''))
