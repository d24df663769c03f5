"""Direct preference optimisation of a speech language model: the thirty minutes after pre-training (Slam, arXiv 2502.15814, Table 5).

Notable: no second model. Before the first step the policy is the reference, so its log-probabilities of the completions that the run will
meet are computed once and kept beside the pairs. Pairs are packed into rows of one fixed width, chosen and rejected sharing one computation
of their prompt, and dealt so that batches have about as many tokens. No step waits for the GPU; a run killed at any moment goes on exactly.

    python dpo.py --init=out/slam                        # Table 5, as config/slam_dpo.py spells it
    python dpo.py config/demo_dpo.py                     # the offline demo, under a minute on a CPU
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py

data: JSON lines of prepare_units.py or of the public toolkit: prompt, chosen and rejected, each with `units` or `audio_repr` ("<Un12><Un7>").
out_dir becomes a checkpoint that transformers can load, with train_state.pt to go on from, log.jsonl and (given matplotlib) curve.png;
out_dir/best is the best by held-out accuracy. The same command leaves a finished run alone.
"""

from config import configure, fail

import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import BOS, EOS, OFFSET, SLM, InputError, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# Table 5 of the paper
init = 'out/slam'  # the pre-trained model: a folder of train.py, slprl/slam, or any SLM that model.py opens
data = 'data/spokenswag/pairs.jsonl'  # preference pairs; several files with commas
out_dir = 'out/slam-dpo'
beta = 0.1  # how dearly leaving the reference is paid: reward = beta * log-ratio
label_smoothing = 0.0  # cDPO: the share of pairs believed to be labelled the wrong way round
sft_weight = 0.0  # of a next-token loss on the chosen completions, which holds their likelihood up
max_auto_bleu = 0.3  # pairs whose prompt + chosen repeat as much of their bigrams, or more, are dropped; 1.1: keep all
context = 1024  # tokens of prompt + completion: longer prompts lose their beginning, completions their end
rope_theta = 10000.0  # of the pre-training; 0: what init says
batch_size = 4  # rows of at most `context` tokens in one pass of one device
accumulation = 16  # a step takes batch_size x accumulation pairs over all devices; packed, they fit in fewer passes
lr = 5e-5  # of AdamW without weight decay; inverse square root after the warmup
warmup_steps = 100  # 0: none, and a time scale of 10,000 steps
grad_clip = 0.5  # norm; 0: none
max_steps = 813  # the run ends at this many steps (0: no limit),
epochs = 0.0  # or passes over the pairs (0: no limit),
train_hours = (
    0.5  # or hours, the reference pass included, validation not (0: no limit), whichever is first
)
eval_interval = 100  # steps; 0: never
val_pairs = 512  # held out at most: those with split 'val', or where none has, 5 % at most, by a hash of their tokens
save_interval = 200  # steps; 0: at the end
warn_drop = 0.5  # nats a token that held-out chosen completions may fall below the reference before a warning
resume = True  # go on from out_dir/train_state.pt; False: start over
log_interval = 10
wandb = False  # pip install wandb; WANDB_PROJECT and its other variables say where to
compile = None  # None: on CUDA
seed = 1234
device = 'auto'  # auto, cuda, mps, cpu
dtype = 'auto'  # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

FREE = 'out_dir max_steps epochs train_hours eval_interval save_interval warn_drop resume log_interval wandb compile device'  # may differ on resuming
VAL = (
    'val',
    'validation',
    'valid',
    'dev',
)  # what a split that is held out is called; test and the like are left alone
NAMES = 'loss accuracy margin chosen rejected drift preferred'.split()


def dpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0
):
    """The loss of Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), one value a pair:
    -log sigmoid(beta * [(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)])
    Each argument: (n,) log-probabilities in nats of whole completions with their EOS given the prompt, summed over tokens.
    label_smoothing: probability e < 0.5 that a label is wrong; the loss is (1 - e) of the above and e of that of the swapped pair
    (cDPO, Mitchell 2023). Returns: losses (n,), and the implicit rewards, beta * log-ratio, of chosen (n,) and rejected (n,)."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(
        chosen - rejected
    ) - label_smoothing * F.logsigmoid(rejected - chosen)
    return losses, chosen.detach(), rejected.detach()


def measure(policy, reference, sizes, beta, label_smoothing=0.0):
    """What NAMES lists, (7,), means over pairs. Arguments: (n, 2) for chosen and rejected, sizes in tokens.
    accuracy: pairs with a positive margin of rewards. preferred: pairs whose chosen has the higher log-probability per token, as the
    StoryCloze metrics count (ties are one half in both). drift: change of the chosen against the reference in nats a token."""
    losses, chosen, rejected = dpo_loss(*policy.T, *reference.T, beta, label_smoothing)
    won = (
        torch.stack((chosen - rejected, -(policy / sizes).diff()[:, 0]))
        .sign()
        .mul(0.5)
        .add(0.5)
        .mean(1)
    )
    drift = (policy - reference)[:, 0].sum() / sizes[:, 0].sum()
    return torch.stack(
        (losses.mean(), won[0], (chosen - rejected).mean(), *policy.mean(0), drift, won[1])
    )


def learning_rate(step, peak, warmup):
    """The rate of step (from 0): linear warmup, then peak * sqrt(timescale / (step + timescale - warmup)), timescale = warmup or 10,000."""
    timescale = warmup or 10_000
    return peak * min(
        (step + 1) / max(1, warmup), math.sqrt(timescale / (max(step, warmup) + timescale - warmup))
    )


def auto_bleu(words):
    """Share of the bigrams of a sequence that occur in it more than once (Lakhotia et al. 2021, auto-BLEU with n = 2)."""
    counts = Counter(zip(words, words[1:]))
    return sum(n for n in counts.values() if n > 1) / max(1, len(words) - 1)


def read_pairs(path):
    """Yield of each line: units of prompt, chosen, rejected (int64 arrays), split, and words and punctuation of prompt + chosen (None: no text).
    Raises InputError naming file and line."""
    if not os.path.isfile(path):
        raise InputError(
            f'no pairs file {path!r}: make_synthetic.py and prepare_units.py make preference pairs, see --data'
        )
    for number, line in enumerate(open(path, 'rb'), 1):
        try:
            row, units, texts = json.loads(line), [], []
            for key in ('prompt', 'chosen', 'rejected'):
                part = (
                    row[key]
                    if isinstance(row[key], dict)
                    else {'audio_repr' if isinstance(row[key], str) else 'units': row[key]}
                )
                units.append(
                    np.array(
                        part['units']
                        if 'units' in part
                        else [int(u) for u in re.findall(r'<Un(\d+)>', part['audio_repr'])]
                    )
                )
                if units[-1].size and units[-1].dtype.kind != 'i' or units[-1].ndim != 1:
                    raise TypeError(f'units of {key} are no list of whole numbers')
                units[-1] = units[-1].astype(np.int64)
                texts.append(row.get(key + '_text') or part.get('text') or '')
            words = re.findall(r"[\w']+|[^\w\s]", f'{texts[0]} {texts[1]}') if texts[1] else None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(
                f'{path} line {number} is no preference pair ({type(error).__name__}: {error}): it takes prompt, chosen and rejected, '
                f'each with "units" or "audio_repr"'
            ) from None
        yield *units, row.get('split'), words


def truncate(prompt, chosen, rejected, context):
    """Cut tokens so that prompt + either completion <= context: the prompt's beginning, down to half the context, then completions' ends."""
    prompt = prompt[-max(context // 2, context - max(len(chosen), len(rejected))) :]
    return prompt, chosen[: context - len(prompt)], rejected[: context - len(prompt)]


def load_pairs(paths, n_units, context, max_auto_bleu, val_pairs):
    """The pairs (prompt, chosen, rejected) of tokens to train on, those held out, and counts of what was met on the way."""
    train, val, count = [], [], Counter()
    for path in paths.split(','):
        for *units, split, words in read_pairs(path):
            count['read'] += 1
            count['without_text'] += words is None
            strange = [u for part in units for u in part.tolist() if not 0 <= u < n_units]
            if strange:
                raise InputError(
                    f'{path} has unit {strange[0]}, the model knows 0 to {n_units - 1}: encode the pairs with the encoder of the model'
                )
            if not len(units[1]) or not len(units[2]) or np.array_equal(units[1], units[2]):
                count['unusable'] += 1
            elif split not in (None, '', 'train', *VAL):
                count['others'] += 1
            elif (
                auto_bleu(np.concatenate(units[:2]).tolist() if words is None else words)
                >= max_auto_bleu
            ):
                count['repetitive'] += 1
            else:
                pair = (
                    np.append(BOS, units[0] + OFFSET),
                    np.append(units[1] + OFFSET, EOS),
                    np.append(units[2] + OFFSET, EOS),
                )
                cut = truncate(*pair, context)
                count['truncated'] += any(len(a) < len(b) for a, b in zip(cut, pair))
                if np.array_equal(*cut[1:]):
                    count['unusable'] += 1
                    continue
                (val if split in VAL else train).append(cut)

    for pairs in (train, val):
        pairs.sort(
            key=lambda pair: hashlib.sha256(b'|'.join(part.tobytes() for part in pair)).digest()
        )
    held = 0 if val else min(val_pairs, len(train) // 20)
    return train[held:], (val or train[:held])[:val_pairs], count


def deal(lengths, n, seed, epoch):
    """The batches of an epoch, (len(lengths) // n, n) indices: of the pairs sorted by length each batch gets one, at random, of every n-th part,
    so that all hold about as many tokens. The remainder sits this epoch out."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // n * n]
    return rng.permuted(order[np.argsort(lengths[order], kind='stable')].reshape(n, -1), axis=1).T


def pack(lengths, width):
    """Best fit decreasing: rows of indices into lengths (n,), each row with a sum <= width."""
    rows, room = [], []
    for i in np.argsort(-lengths, kind='stable').tolist():
        left, r = min(
            ((left, r) for r, left in enumerate(room) if left >= lengths[i]),
            default=(width, len(rows)),
        )
        if r == len(rows):
            rows.append([])
            room.append(width)
        rows[r].append(i)
        room[r] = left - int(lengths[i])
    return rows


def lay_out(pairs, width, batch_size):
    """The forward passes of a batch of pairs, rows of `width` tokens without padding between pairs.
    Returns: (passes, 6, batch_size, width) int64: tokens, mask, doc, positions, branch and segments of SLM.logps. A pair is one document:
    prompt (branch 0), then chosen (1) and rejected (2), both of which follow the prompt; pair i counts in segments 2 i and 2 i + 1. What is
    left of a row is filler: document 0, masked out."""
    rows = pack(np.array([sum(map(len, pair)) for pair in pairs]), width)
    laid = np.zeros((-(-len(rows) // batch_size), 6, batch_size, width), np.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            P, C, R = map(len, pairs[i])
            laid[r // batch_size, :, r % batch_size, at : at + P + C + R] = (
                np.concatenate(pairs[i]),
                np.repeat((0, 1), (P, C + R)),
                np.full(P + C + R, i + 1),
                np.r_[: P + C, P : P + R],
                np.repeat((0, 1, 2), (P, C, R)),
                np.repeat((0, 2 * i, 2 * i + 1), (P, C, R)),
            )
            at += P + C + R
    return torch.from_numpy(laid)


def choose_width(lengths, batches, context, batch_size):
    """The width of rows, at most context (more only if one pair of all needs it), whose passes these batches fill best, and the share they fill."""
    best, longest = (0.0, 0), -(-int(lengths.max()) // 8) * 8
    for width in range(longest, max(context, longest) + 1, 8):
        passes = sum(-(-len(pack(lengths[batch], width)) // batch_size) for batch in batches)
        best = max(best, (float(lengths[batches].sum()) / (passes * batch_size * width), width))
    return best[1], best[0]


if __name__ == '__main__':
    config = configure(globals())
    # --- processes and device: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE
    rank, local, world = (
        int(os.environ.get(key, default))
        for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
    )
    device = pick_device(device)
    dtype, cuda, compile = (
        pick_dtype(dtype, device),
        device.type == 'cuda',
        device.type == 'cuda' if compile is None else compile,
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
                f'out of memory: lower --batch_size={batch_size} (and raise --accumulation={accumulation} as much) or --context={context}'
            )
        if issubclass(kind, ImportError):
            fail(error)
        before(kind, error, trace)

    sys.excepthook = hook

    least = dict(
        context=4,
        batch_size=1,
        accumulation=1,
        log_interval=1,
        lr=1e-12,
        beta=1e-12,
        max_auto_bleu=1e-12,
        warn_drop=-math.inf,
    )
    for knob, value in config.items():
        if type(value) in (int, float) and not least.get(knob, 0) <= value < (
            0.5 if knob == 'label_smoothing' else math.inf
        ):
            fail(
                f'--{knob}={value} is out of range: it begins at {least.get(knob, 0)}'
                + ' and ends before 0.5' * (knob == 'label_smoothing')
            )
    if cuda:
        torch.cuda.set_device(device := torch.device('cuda', local))
        torch.set_float32_matmul_precision('high')
    if world > 1:
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if cuda else 'gloo'
        )  # gloo for the clock, so that no step waits for the device
    if os.path.abspath(init) == os.path.abspath(out_dir):
        fail(
            f'init and out_dir are both {init}: the pre-trained model would be overwritten, choose another --out_dir'
        )

    # --- model and data
    model = SLM.from_pretrained(init, rope_theta=rope_theta or None)
    if not model.slam:
        fail(f'{init} is no speech language model: pre-train one with train.py --init={init}')
    train, val, count = load_pairs(
        data, model.config.vocab_size - OFFSET, context, max_auto_bleu, val_pairs
    )
    n, per_epoch, pairs = (
        batch_size * accumulation,
        len(train) // (batch_size * accumulation),
        train + val,
    )
    say(
        f'{data}: {count["read"]} pairs; dropped {count["repetitive"]} by auto-BLEU >= {max_auto_bleu} ({count["without_text"]} of units) '
        f'and {count["unusable"]} empty or equal; {count["others"]} of other splits; {count["truncated"]} truncated; {len(val)} held out, '
        f'{len(train)} to train on'
    )
    if len(train) < n:
        fail(
            f'{data} leaves {len(train)} pairs to train on, fewer than a batch of {n}: lower --batch_size or --accumulation'
        )
    all_lengths = np.array([sum(map(len, pair)) for pair in pairs])
    lengths = all_lengths[: len(train)]
    sizes = torch.tensor(
        [[len(chosen), len(rejected)] for _, chosen, rejected in pairs]
    )  # (pairs, 2) tokens
    limits = [limit for limit in (max_steps, epochs and max(1, round(epochs * per_epoch))) if limit]
    total_steps = min(limits, default=0 if train_hours else per_epoch)
    width, filled = choose_width(all_lengths, deal(lengths, n, seed, 0)[:8], context, batch_size)
    digest = hashlib.sha256(json.dumps([model.config.to_hf(), str(dtype)], sort_keys=True).encode())
    for array in [p.detach().numpy() for p in model.parameters()] + [
        part for pair in pairs for part in pair
    ]:
        digest.update(str(array.shape).encode() + array.data)
    key = digest.hexdigest()

    # --- where a former run of this command stopped
    state_path, log_path, state = (
        os.path.join(out_dir, 'train_state.pt'),
        os.path.join(out_dir, 'log.jsonl'),
        {},
    )
    if resume and os.path.exists(state_path):
        try:
            state = torch.load(state_path, map_location='cpu', mmap=True, weights_only=True)
        except Exception as error:
            fail(f'{state_path} cannot be read ({str(error)[:100]}): --resume=False starts over')
        other = [
            f'{k}={v!r}, now {config[k]!r}'
            for k, v in state['config'].items()
            if k in config and k not in FREE.split() and config[k] != v
        ]
        if other or state.get('key') != key:
            fail(
                f'{out_dir} holds a run with {", ".join(other) or "other weights in init or other pairs"}: choose another --out_dir, or '
                f'--resume=False to start over'
            )
    step, elapsed, best, scores, warned = (
        state.get(k, v)
        for k, v in dict(step=0, elapsed=0.0, best=-1.0, scores={}, warned=None).items()
    )
    over = lambda: 0 < total_steps <= step or 0 < 3600 * train_hours <= elapsed
    if over():
        say(
            f'{out_dir}: finished before, {step} steps in {elapsed:.0f} s, {scores}; nothing to do (--resume=False starts over)'
        )
        raise SystemExit

    model.to(device)
    logps = torch.compile(model.logps, dynamic=False) if compile else model.logps

    def batch_of(pairs):
        """This process's share of the forward passes that lay_out gives, copied to the device while it works."""
        laid = lay_out(pairs, width, batch_size)[rank::world]
        return (laid.pin_memory() if cuda else laid).to(device, non_blocking=True)

    def policy_logps(one_pass):
        """Log-probabilities, (n, 2): of chosen and rejected of each pair of the batch, 0 for pairs that are not in this pass."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return logps(*one_pass, n=2 * n).view(n, 2)

    @torch.no_grad()
    def score(pairs, name=None):
        """Log-probabilities of all completions, (len(pairs), 2) on the device, the work shared among the processes."""
        from tqdm import tqdm

        found = torch.zeros(-(-len(pairs) // n), n, 2, device=device)
        for b in tqdm(range(len(found)), name, unit='batch', disable=not name or rank > 0):
            for one_pass in batch_of(pairs[b * n : (b + 1) * n]):
                found[b] += policy_logps(one_pass)
        if world > 1:
            dist.all_reduce(found)
        return found.view(-1, 2)[: len(pairs)]

    # --- the reference's log-probabilities: once, before the policy moves or takes up a former run
    os.makedirs(out_dir, exist_ok=True)
    beside = os.path.dirname(data.split(',')[0]) or '.'
    cache = os.path.join(
        beside if os.access(beside, os.W_OK) else out_dir, f'reference-{key[:16]}.npz'
    )
    try:
        file = (
            np.load(cache)
            if os.path.exists(cache)
            else dict(logps=np.full((len(pairs), 2), np.nan, np.float32), seconds=0.0)
        )
        known, seconds = file['logps'], float(file['seconds'])
    except Exception as error:
        fail(f'{cache} cannot be read ({error}): delete it')
    needed = np.ones(len(pairs), bool)
    if 0 < total_steps < per_epoch:  # pairs that no step will meet need none
        needed[: len(train)] = np.isin(
            np.arange(len(train)), deal(lengths, n, seed, 0)[:total_steps]
        )
    missing = np.flatnonzero(needed & np.isnan(known[:, 0]))
    if len(missing):
        begun = time.perf_counter()
        known[missing] = score([pairs[i] for i in missing], 'reference').cpu().numpy()
        seconds += time.perf_counter() - begun
        if not np.isfinite(known[missing]).all():
            fail(
                f'{init} gives some of the pairs no finite log-probability: are its weights whole?'
            )
        if rank == 0:
            with open(
                aside := f'{cache}.{os.getpid()}.tmp', 'wb'
            ) as file:  # other runs may write the same
                np.savez(file, logps=known, seconds=seconds)
            os.replace(aside, cache)
    say(
        f'reference: log-probabilities of {needed.sum()} pairs in {seconds:.1f} s, {len(missing)} of them now, kept in {cache}'
    )
    known, params = torch.from_numpy(known), list(model.parameters())  # known (pairs, 2)
    adamw = torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    if state:
        model.load_state_dict(state['model'])
        adamw.load_state_dict(state['optimizer'])
    elapsed = elapsed or seconds

    # --- what happens between steps
    def save(folder, to_resume=True):
        """A checkpoint folder; after its model, in one file complete in itself, what a killed run goes on from."""
        if rank:
            return
        slam = dict(
            model.slam,
            recipe=dict(config, pretraining=model.slam.get('recipe')),
            scores=dict(scores, step=step),
            git_commit=subprocess.getoutput('git rev-parse HEAD 2>/dev/null') or None,
        )
        try:
            model.save_pretrained(folder, slam)
            if to_resume:
                torch.save(
                    dict(
                        step=step,
                        elapsed=elapsed,
                        best=best,
                        scores=scores,
                        warned=warned,
                        key=key,
                        config=config,
                        model=model.state_dict(),
                        optimizer=adamw.state_dict(),
                    ),
                    state_path + '.tmp',
                )
                os.replace(state_path + '.tmp', state_path)
        except Exception as error:
            fail(
                f'cannot write {folder} ({error}): the checkpoint before it is kept; make room and run the same command to continue'
            )

    def note(record):
        if rank == 0:
            log.write(json.dumps(record) + '\n')
            _ = wandb_run and wandb_run.log(record, step=record['step'])

    def validate():
        """Score the held-out pairs, keep the best checkpoint (the loss decides between equals), warn when the chosen ones sink."""
        global best, scores, warned
        values = measure(
            score(pairs[len(train) :]),
            known[len(train) :].to(device),
            sizes[len(train) :].to(device),
            beta,
            label_smoothing,
        ).tolist()
        scores = {'val_' + name: round(value, 5) for name, value in zip(NAMES, values)}
        say(f'step {step} | ' + ' | '.join(f'{name} {value:.3f}' for name, value in scores.items()))
        if scores['val_drift'] < -warn_drop and not warned:
            warned = f'chosen completions lost {-scores["val_drift"]:.2f} nats a token: lower --lr, raise --beta, or add --sft_weight=0.1'
            say(f'WARNING: {warned} (the known failure of DPO)')
        note(dict(step=step, **scores, warning=warned))
        merit = scores['val_accuracy'] - 1e-4 * scores['val_loss']
        if step and merit > best:
            best = merit
            save(os.path.join(out_dir, 'best'), to_resume=False)

    # --- start
    if rank == 0:
        lines = open(log_path).readlines() if state and os.path.exists(log_path) else []
        with open(log_path + '.tmp', 'w') as file:
            file.writelines(
                line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step
            )
        os.replace(log_path + '.tmp', log_path)
        log = open(log_path, 'a', buffering=1)
        wandb_run = (
            __import__('wandb').init(name=os.path.basename(out_dir), config=config, resume='allow')
            if wandb
            else None
        )
    say(
        f'{init}: {model.num_params():,} parameters on {world} x {device}, {dtype}; {n} pairs a step, {per_epoch:,} steps an epoch, rows of {width}, '
        f'{filled:.1%} filled; '
        + ' or '.join(
            f'{x:,.4g} {what}' for x, what in ((total_steps, 'steps'), (train_hours, 'hours')) if x
        )
        + (f'; going on from step {step}' if step else '')
    )
    if val and eval_interval and not step:
        validate()
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    for p in params:
        p.grad = torch.zeros_like(p)
    totals, halt, in_a_row, first_step = torch.zeros(len(NAMES) + 3, device=device), 0, 0, step
    clock = began = time.perf_counter()

    # --- the loop
    while not over() and not halt:
        batch = deal(lengths, n, seed, step // per_epoch)[step % per_epoch]  # (n,) indices
        reference, batch_sizes = (
            x[batch].to(device, non_blocking=True) for x in (known, sizes)
        )  # (n, 2)
        policy = torch.zeros(n, 2, device=device)
        for one_pass in batch_of([train[i] for i in batch]):
            part = policy_logps(one_pass)
            losses = dpo_loss(*part.T, *reference.T, beta, label_smoothing)[0]
            loss = torch.where(part[:, 0] != 0, losses, 0).sum() / n  # of the pairs in this pass
            (loss - sft_weight * part[:, 0].sum() / batch_sizes[:, 0].sum()).backward()
            policy += part.detach()
        shared = torch.tensor([elapsed * (rank == 0), float(len(stopping))], dtype=torch.float64)
        if world > 1:  # sums over processes; all take the clock of the first
            for x in (shared, policy, *(p.grad for p in params)):
                dist.all_reduce(x)
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        adamw.found_inf = bad = (
            1 - norm.isfinite().float()
        )  # the fused kernel reads it on the device, and does nothing if it is 1
        for group in adamw.param_groups:
            group['lr'] = rate = learning_rate(step, lr, warmup_steps)
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        values = *measure(policy, reference, batch_sizes, beta, label_smoothing), norm
        totals += torch.stack(
            (*(torch.where(bad > 0, 0, value) for value in values), bad, torch.ones_like(bad))
        )
        (elapsed, halt), before, clock, step = shared.tolist(), clock, time.perf_counter(), step + 1
        elapsed += (
            0 if compile and step == first_step + 1 else clock - before
        )  # the first step compiles
        # --- now and then: read the numbers, validate, save
        evaluate, keep = (
            interval and step % interval == 0 for interval in (eval_interval, save_interval)
        )
        if evaluate or keep or halt or over() or step % log_interval == 0:
            *means, skipped, steps = totals.tolist()  # here the host waits for the device
            means = {
                name: round(total / (steps - skipped), 5)
                for name, total in zip(NAMES + ['norm'], means)
                if steps > skipped
            }
            totals.zero_()
            note(dict(step=step, **means, lr=rate, skipped=int(skipped), elapsed=round(elapsed, 2)))
            pace = (time.perf_counter() - began) / (step - first_step)
            left = min(
                ((total_steps or math.inf) - step) * pace,
                (3600 * train_hours or math.inf) - elapsed,
            )
            say(
                f'step {step}/{total_steps} | '
                + (' | '.join(f'{name} {mean:.3f}' for name, mean in means.items()) or 'skipped')
                + f' | lr {rate:.1e} | {n / pace:.1f} pairs/s | {max(0, left):.0f} s left'
                + f' | {skipped:.0f} not finite, skipped' * (skipped > 0)
            )
            in_a_row = in_a_row + steps if skipped == steps else 0
            if in_a_row >= 10:
                fail(
                    f'{in_a_row:.0f} steps in a row were not finite: lower --lr; {out_dir} keeps the last checkpoint'
                )
            if val and (evaluate or over()):
                validate()
            if keep or halt or over():
                save(out_dir)
            clock = time.perf_counter()

    # --- the end
    if rank == 0 and importlib.util.find_spec('matplotlib'):
        import matplotlib

        matplotlib.use('agg')
        from matplotlib import pyplot

        rows = [json.loads(line) for line in open(log_path)]
        for key in ('loss', 'val_loss', 'accuracy', 'val_accuracy'):
            pyplot.plot(
                *np.array([(row['step'], row[key]) for row in rows if row.get(key) is not None])
                .reshape(-1, 2)
                .T,
                label=key,
            )
        (
            pyplot.xlabel('step'),
            pyplot.legend(),
            pyplot.grid(),
            pyplot.savefig(os.path.join(out_dir, 'curve.png')),
        )
    if world > 1:
        dist.destroy_process_group()
    say(
        f'{out_dir}: {step} steps of {n} pairs in {elapsed:.0f} s'
        + ''.join(f', {name} {value:.3f}' for name, value in scores.items())
        + ('' if over() else '; stopped and saved, run the same command to continue')
    )
    raise SystemExit(0 if over() else 128 + int(stopping[0] if stopping else signal.SIGTERM))
