"""Direct preference optimisation of a speech language model: the thirty minutes after pre-training (Slam, arXiv 2502.15814, section 4.4).

Notable: the frozen reference is no second model. Before the first step the policy is the reference, so its log-probabilities of all the
completions that the run will meet are computed once and kept beside the pairs; a step then costs the policy alone. Pairs are packed without
padding into rows of one fixed width; chosen and rejected share one computation of their prompt. A batch is always the same number of
pairs, dealt so that all batches have about as many tokens. Nothing in a step waits for the GPU. A killed run goes on exactly.

    python dpo.py --init=out/slam                        # Table 5 of the paper, as config/slam_dpo.py spells it
    python dpo.py config/demo_dpo.py                     # the offline demo, under a minute on a CPU
    torchrun --nproc_per_node=2 dpo.py config/slam_scaled_dpo.py

data: JSON lines of prepare_units.py, or the public toolkit's: prompt, chosen and rejected, each with `units` or `audio_repr`
("<Un12><Un7>"); texts inside them or as prompt_text, chosen_text. out_dir becomes a checkpoint that transformers can load, with
train_state.pt to go on from and log.jsonl; out_dir/best is the best by held-out accuracy. The same command continues a run that was
stopped and leaves a finished one alone.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from config import configure, fail
from model import BOS, EOS, OFFSET, SLM, InputError, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# Table 5 of the paper
init = 'out/slam'             # the pre-trained model: a folder of train.py, slprl/slam, or any SLM that model.py opens
data = 'data/spokenswag/pairs.jsonl'  # preference pairs; several files with commas
out_dir = 'out/slam-dpo'
beta = 0.1                    # how dearly leaving the reference is paid: reward = beta * log-ratio
label_smoothing = 0.0         # cDPO: the share of pairs believed to be labelled the wrong way round
sft_weight = 0.0              # weight of a next-token loss on the chosen completion, holds its likelihood up
max_auto_bleu = 0.3           # pairs whose prompt + chosen repeat more of their bigrams than this are dropped; 1.1: keep all
context = 1024                # tokens of prompt + completion; prompts lose their beginning, then completions their end
rope_theta = 10000.0          # of the pre-training; 0: what init says
dropout = 0.0
# the optimizer: AdamW, inverse square root after the warmup
batch_size = 4                # rows of at most `context` tokens in one pass of one device
accumulation = 16             # a step takes batch_size x accumulation pairs, over all devices; packed, they fit in fewer passes
lr = 5e-5
warmup_steps = 100            # 0: none, and a time scale of 10,000 steps
beta1 = 0.9
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0
grad_clip = 0.5               # norm
max_steps = 813               # the run ends at this many steps (0: no limit),
epochs = 0.0                  # or passes over the pairs (0: no limit),
train_hours = 0.5             # or hours, the reference's included, validation and compilation not (0: no limit), whichever is first
# validation, checkpoints, log
eval_interval = 100           # steps; 0: never
val_pairs = 512               # held out at most: those with split 'val', or where none has, 5 % at most by a hash of their tokens
save_interval = 200           # steps; 0: at the end
warn_drop = 0.5               # nats a token that the held-out chosen completions may fall below the reference before a warning
resume = True                 # go on from out_dir/train_state.pt; False: start over
log_interval = 10
wandb = False
wandb_project = 'slam'
# the machine
compile = None                # None: on CUDA
seed = 1234
device = 'auto'               # auto, cuda, mps, cpu
dtype = 'auto'                # of the products: auto is bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

FREE = ('out_dir max_steps epochs train_hours eval_interval save_interval warn_drop resume log_interval wandb wandb_project compile '
        'device').split()  # knobs that may differ when a run is continued
NAMES = 'loss accuracy margin chosen rejected chosen_drift preferred'.split()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """The loss of Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), one value a pair.

    -log sigmoid(margin), margin = beta * [(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)]

    Each argument: (n,) log-probabilities in nats of whole completions with their EOS, given the prompt, summed over tokens.
    label_smoothing e in [0, 0.5): each label is wrong with probability e (cDPO, Mitchell 2023: (1 - e) and e weigh the two cases).
    Returns: losses (n,), and the implicit rewards of chosen (n,) and rejected (n,), without gradient.
    """
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach()


def measure(policy, reference, lengths):
    """Means over pairs of what NAMES lists, (7,): policy, reference, lengths (n, 2) for chosen and rejected; lengths in tokens.

    accuracy: share of pairs with a positive margin; preferred: with the higher mean log-probability per token, as the StoryCloze
    metrics count (in both, ties are one half). chosen_drift: mean change of the chosen log-probability, nats a token.
    """
    losses, chosen, rejected = dpo_loss(*policy.T, *reference.T, beta, label_smoothing)
    better = (policy / lengths).diff(dim=1)[:, 0]
    share = lambda x: (0.5 + 0.5 * x.sign()).mean()
    return torch.stack((losses.mean(), share(chosen - rejected), (chosen - rejected).mean(), policy[:, 0].mean(), policy[:, 1].mean(),
                        (policy - reference)[:, 0].sum() / lengths[:, 0].sum(), share(-better)))


def learning_rate(step):
    """The rate of step (from 0): linear warmup, then lr * sqrt(timescale / (step + timescale - warmup)), timescale = warmup or 10,000."""
    timescale = warmup_steps or 10_000
    return lr * min((step + 1) / max(1, warmup_steps), math.sqrt(timescale / (max(step, warmup_steps) + timescale - warmup_steps)))


# -----------------------------------------------------------------------------
# The data: pairs -> filtered, truncated, dealt to batches, packed into rows


def auto_bleu(words):
    """Share of the bigrams that occur more than once among them (Lakhotia et al. 2021, auto-BLEU with n = 2). words: any sequence."""
    bigrams = list(zip(words, words[1:]))
    counts = {}
    for bigram in bigrams:
        counts[bigram] = counts.get(bigram, 0) + 1
    return sum(n for n in counts.values() if n > 1) / max(1, len(bigrams))


def read_pairs(path):
    """Yield (prompt, chosen, rejected, split, words) of each line: int64 arrays of units, and what the filter looks at: the words of prompt
    and chosen with their punctuation, None where there is no text. Raises InputError naming file and line."""
    try:
        lines = open(path, encoding='utf-8')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}; make preference pairs with make_synthetic.py and prepare_units.py, or see --data') from None
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row, texts = json.loads(line), []
                for key in ('prompt', 'chosen', 'rejected'):
                    part = row[key] if isinstance(row[key], dict) else {'audio_repr' if isinstance(row[key], str) else 'units': row[key]}
                    units = part['units'] if 'units' in part else [int(u) for u in re.findall(r'<Un(\d+)>', part['audio_repr'])]
                    row[key] = np.array(units, np.int64).reshape(-1)
                    texts.append(row.get(key + '_text') or part.get('text') or '')
                text = f'{texts[0]} {texts[1]}' if texts[1] else ''
                yield row['prompt'], row['chosen'], row['rejected'], row.get('split'), re.findall(r"[\w']+|[^\w\s]", text) or None
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise InputError(f'{path} line {number} is no preference pair ({type(error).__name__}: {error}): it takes prompt, chosen and '
                                 f'rejected, each with "units" or "audio_repr"') from None


def truncate(prompt, chosen, rejected, context):
    """Cut token arrays so that prompt + each completion <= context: the prompt's beginning, down to half the context, then completions' ends."""
    prompt = prompt[-max(context // 2, context - max(len(chosen), len(rejected))):]
    return prompt, chosen[:context - len(prompt)], rejected[:context - len(prompt)]


def load_pairs(paths, vocab_size, context, max_auto_bleu, val_pairs):
    """Tokens of the pairs to train on and of those held out: two lists of (prompt, chosen, rejected), and counts of what was met."""
    train, val, count = [], [], dict(read=0, unusable=0, repetitive=0, without_text=0, truncated=0)
    for path in paths.split(','):
        for *units, split, words in read_pairs(path):
            count['read'] += 1
            top = max((int(u.max()) for u in units if len(u)), default=0)
            if top + OFFSET >= vocab_size or min((int(u.min()) for u in units if len(u)), default=0) < 0:
                raise InputError(f'{path}: pair {count["read"]} has unit {top}, the model {init} knows 0 to {vocab_size - OFFSET - 1}: '
                                 f'were the pairs encoded with its encoder?')
            count['without_text'] += words is None
            if not len(units[1]) or not len(units[2]) or np.array_equal(units[1], units[2]):
                count['unusable'] += 1
            elif auto_bleu(np.concatenate(units[:2]).tolist() if words is None else words) >= max_auto_bleu:
                count['repetitive'] += 1
            else:
                prompt, chosen, rejected = (u + OFFSET for u in units)
                pair = np.append(BOS, prompt), np.append(chosen, EOS), np.append(rejected, EOS)
                cut = truncate(*pair, context)
                count['truncated'] += any(len(a) < len(b) for a, b in zip(cut, pair))
                (val if split in ('val', 'validation', 'dev') else train).append(cut)
    by_hash = lambda pair: hashlib.sha256(b'|'.join(part.tobytes() for part in pair)).digest()
    if not val:
        train.sort(key=by_hash)
        held = min(val_pairs, len(train) // 20)
        train, val = train[held:], train[:held]
    return train, sorted(val, key=by_hash)[:val_pairs], count


def deal(lengths, n, seed, epoch):
    """The batches of an epoch, (len(lengths) // n, n) indices: sorted by length, each batch gets one pair of every n-th part, at random.

    So all batches hold about as many tokens, and rows of one fixed width are as full in each. The remainder sits this epoch out.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[:len(lengths) // n * n]
    strata = order[np.argsort(lengths[order], kind='stable')].reshape(n, -1)
    return rng.permuted(strata, axis=1).T


def pack(lengths, width):
    """Best fit decreasing: rows of positions in `lengths`, each with a sum <= width."""
    rows, room = [], []
    for i in np.argsort(-lengths, kind='stable').tolist():
        fits = [(left, r) for r, left in enumerate(room) if left >= lengths[i]]
        if fits:
            left, r = min(fits)
            room[r] = left - lengths[i]
            rows[r].append(i)
        else:
            room.append(width - lengths[i])
            rows.append([i])
    return rows


def lay_out(pairs, rows, width):
    """Rows of pairs as one array (6, rows, width) int64: tokens, mask, doc, positions, branch and segments of SLM.logps.

    A pair is one document: prompt (branch 0), chosen (branch 1), rejected (branch 2); both completions follow the prompt, the prompt is
    computed once. Pair i counts in segments 2 i and 2 i + 1. What is left of a row is filler: document 0, masked out.
    """
    out = np.zeros((6, len(rows), width), np.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            P, C, R = map(len, pairs[i])
            out[:, r, at:at + P + C + R] = (
                np.concatenate(pairs[i]), np.repeat((0, 1, 1), (P, C, R)), np.full(P + C + R, i + 1),
                np.concatenate((np.arange(P + C), np.arange(P, P + R))), np.repeat((0, 1, 2), (P, C, R)), np.repeat((0, 2 * i, 2 * i + 1), (P, C, R)))
            at += P + C + R
    return out


def passes(pairs, width, n_rows):
    """The forward passes of a batch of pairs: (passes, 6, n_rows, width) int64, and (passes, pairs) float, 1 where a pair is in a pass."""
    rows = pack(np.array([sum(map(len, pair)) for pair in pairs]), width)
    rows += [[] for _ in range(-len(rows) % n_rows)]
    within = np.zeros((len(rows) // n_rows, len(pairs)), np.float32)
    for r, row in enumerate(rows):
        within[r // n_rows, row] = 1
    laid = lay_out(pairs, rows, width).reshape(6, -1, n_rows, width).swapaxes(0, 1)
    return torch.from_numpy(np.ascontiguousarray(laid)), torch.from_numpy(within)


def choose_width(lengths, batches, context, n_rows):
    """The row width, at most context (more only for a pair that needs it), that fills `n_rows` x width passes best, and the filled share."""
    longest = -(-int(lengths.max()) // 32) * 32
    best = (0.0, longest)
    for width in range(longest, max(context, longest) + 1, 32):
        slots = sum(-(-len(pack(lengths[batch], width)) // n_rows) * n_rows * width for batch in batches)
        best = max(best, (sum(int(lengths[batch].sum()) for batch in batches) / slots, width))
    return best[::-1]


if __name__ == '__main__':
    config = configure(globals())
    # ------------------------------------------------------------------ processes, model, data
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(device)
    if world > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    say = (lambda *words: print(*words, flush=True)) if rank == 0 else (lambda *words: None)
    dtype = pick_dtype(dtype, device)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(seed)
    if os.path.abspath(init) == os.path.abspath(out_dir):
        fail(f'init and out_dir are both {init}: the pre-trained model would be overwritten, give another --out_dir')

    model = SLM.from_pretrained(init, context=None, rope_theta=rope_theta or None, dropout=dropout)
    if not model.slam:
        fail(f'{init} is no speech language model: pre-train one with train.py --init={init}')
    train, val, count = load_pairs(data, model.config.vocab_size, context, max_auto_bleu, val_pairs)
    n = batch_size * accumulation
    say(f'{data}: {count["read"]} pairs; dropped: {count["repetitive"]} repetitive (bigram auto-BLEU >= {max_auto_bleu}), {count["unusable"]} empty or '
        f'equal; truncated: {count["truncated"]}; held out: {len(val)}; to train on: {len(train)}'
        + (f'; {count["without_text"]} have no text and were judged by their units' * bool(count['without_text'])))
    if len(train) < n:
        fail(f'{data} leaves {len(train)} pairs to train on, fewer than one batch of {n}: lower --batch_size or --accumulation')
    lengths = np.array([sum(map(len, pair)) for pair in train])
    per_epoch = len(train) // n
    limits = [int(x) for x in (max_steps, round(epochs * per_epoch)) if x]
    total_steps = min(limits) if limits else 10**9 if train_hours else fail('nothing ends the run: give --max_steps, --epochs or --train_hours')
    width, filled = choose_width(lengths, deal(lengths, n, seed, 0)[:16], context, batch_size)

    # ------------------------------------------------------------------ the policy's passes
    model.to(device)
    if compile is None:
        compile = device.type == 'cuda'
    logps = torch.compile(model.logps, dynamic=False) if compile else model.logps

    def batch_of(pairs):
        """passes() on the device, copied while it works; this process's share of the passes."""
        laid, within = passes(pairs, width, batch_size)
        move = lambda x: (x.pin_memory() if device.type == 'cuda' else x)[rank::world].to(device, non_blocking=True)
        return move(laid), move(within)

    def policy_logps(laid):
        """Sums of log-probabilities, (n, 2): chosen and rejected of each pair of the batch, 0 for those not in this pass."""
        tokens, mask, doc, positions, branch, segments = laid
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return logps(tokens, mask, doc=doc, positions=positions, branch=branch, segments=segments, n=2 * n).view(n, 2)

    @torch.no_grad()
    def score(pairs, bar=False):
        """Log-probabilities of all completions, (len(pairs), 2) on the device, shared among the processes."""
        from tqdm import tqdm
        model.eval()
        scores = torch.zeros(-(-len(pairs) // n), n, 2, device=device)
        for b in tqdm(range(len(scores)), 'reference log-probabilities', unit='batch', disable=not bar or rank > 0):
            for laid in batch_of(pairs[b * n:(b + 1) * n])[0]:
                scores[b] += policy_logps(laid)
        model.train()
        if world > 1:
            dist.all_reduce(scores)
        return scores.view(-1, 2)[:len(pairs)]

    # ------------------------------------------------------------------ the reference, once
    pairs = train + val
    digest = hashlib.sha256(json.dumps([model.config.to_hf(), str(dtype)], sort_keys=True).encode())
    for array in [p.detach().cpu().numpy() for p in model.parameters()] + [part for pair in pairs for part in pair]:
        digest.update(str(array.shape).encode() + array.data)
    key = digest.hexdigest()
    beside = os.path.dirname(data.split(',')[0]) or '.'
    os.makedirs(out_dir, exist_ok=True)
    cache = os.path.join(beside if os.access(beside, os.W_OK) else out_dir, f'reference-{key[:16]}.npz')
    known, reference_seconds = np.full((len(pairs), 2), np.nan, np.float32), 0.0
    if os.path.exists(cache):
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(cache) as file:
            known, reference_seconds = file['logps'], float(file['seconds'])
    needed = np.ones(len(pairs), bool)
    if total_steps < per_epoch:  # the pairs that no step will meet need none
        needed[:len(train)] = np.isin(np.arange(len(train)), deal(lengths, n, seed, 0)[:total_steps])
    missing = np.flatnonzero(needed & np.isnan(known[:, 0]))
    if len(missing):
        start = time.perf_counter()
        known[missing] = score([pairs[i] for i in missing], bar=True).cpu().numpy()
        reference_seconds += time.perf_counter() - start
        if rank == 0:
            with open(cache + '.tmp', 'wb') as file:
                np.savez(file, logps=known, seconds=reference_seconds)
            os.replace(cache + '.tmp', cache)
    say(f'reference log-probabilities of {needed.sum()} pairs: {len(missing)} computed, {reference_seconds:.1f} s, the others from {cache}')
    known = torch.from_numpy(known)  # (pairs, 2)
    sizes = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])  # (pairs, 2) tokens
    val_known, val_sizes = known[len(train):].to(device), sizes[len(train):].to(device)

    # ------------------------------------------------------------------ resume
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)
    state_file, log_file = os.path.join(out_dir, 'train_state.pt'), os.path.join(out_dir, 'log.jsonl')
    step, elapsed, best, scores, warned, records = 0, reference_seconds, -1.0, {}, False, []
    if resume and os.path.exists(state_file):
        state = torch.load(state_file, map_location='cpu', mmap=True, weights_only=True)
        other = [f'{k}={v!r}, now {config[k]!r}' for k, v in state['config'].items() if k in config and k not in FREE and config[k] != v]
        if other or state['key'] != key:
            fail(f'{out_dir} holds a run with {", ".join(other) or "other weights in init or other pairs"}: choose another --out_dir, '
                 f'or --resume=False to start over')
        model.load_state_dict(state['model'])
        adamw.load_state_dict(state['optimizer'])
        step, elapsed, best, scores, warned = (state[k] for k in ('step', 'elapsed', 'best', 'scores', 'warned'))
        if rank == 0 and os.path.exists(log_file):
            records = [line for line in open(log_file, encoding='utf-8') if line.endswith('\n') and json.loads(line)['step'] <= step]
    over = lambda: step >= total_steps or train_hours > 0 and elapsed >= 3600 * train_hours
    if over():
        say(f'{out_dir}: finished before, {step} steps in {elapsed:.0f} s, {scores}; nothing to do (--resume=False starts over)')
        raise SystemExit

    # ------------------------------------------------------------------ what happens between steps
    def save(folder, to_resume=True):
        """A checkpoint folder; before its model, in one file complete in itself, what a killed run goes on from."""
        if rank == 0:
            if to_resume:
                torch.save(dict(step=step, elapsed=elapsed, best=best, scores=scores, warned=warned, key=key, config=config,
                                model=model.state_dict(), optimizer=adamw.state_dict()), state_file + '.tmp')
                os.replace(state_file + '.tmp', state_file)
            model.save_pretrained(folder, dict(model.slam, recipe=dict(config, pretraining=model.slam.get('recipe')), git_commit=commit,
                                               scores=dict(scores, step=step)))

    def note(record):
        if rank == 0:
            log.write(json.dumps(record) + '\n')
            log.flush()
            if wandb:
                wandb_run.log(record, step=record['step'])

    def validate():
        """Score the held-out pairs, warn when the chosen ones sink, keep the best checkpoint. (Ties are decided by the loss.)"""
        global best, scores, warned
        if not val:
            return
        values = measure(score(val), val_known, val_sizes).tolist()
        scores = {'val_' + name: round(value, 5) for name, value in zip(NAMES, values)}
        note(dict(step=step, **scores))
        say(f'step {step} held out | ' + ' | '.join(f'{name} {value:.3f}' for name, value in zip(NAMES, values)))
        if scores['val_chosen_drift'] < -warn_drop and not warned:
            warned = f'the held-out chosen completions lost {-scores["val_chosen_drift"]:.2f} nats a token against the reference at step {step}: ' \
                     f'the known failure of DPO; lower --lr or the steps, raise --beta, or add --sft_weight=0.1'
            say('warning: ' + warned)
            note(dict(step=step, warning=warned))
        if step and scores['val_accuracy'] - 1e-3 * scores['val_loss'] > best:
            best = scores['val_accuracy'] - 1e-3 * scores['val_loss']
            save(os.path.join(out_dir, 'best'), to_resume=False)

    # ------------------------------------------------------------------ start
    commit = subprocess.getoutput('git rev-parse HEAD')
    if rank == 0:
        log = open(log_file, 'w', encoding='utf-8')
        log.writelines(records)
        if wandb:
            from wandb import init as wandb_init
            wandb_run = wandb_init(project=wandb_project, name=os.path.basename(out_dir), config=config, resume='allow')
    say(f'{init}: {model.num_params():,} parameters on {world} x {device}, {dtype}; {n} pairs a step, {per_epoch} steps an epoch, rows of {width} tokens '
        f'{filled:.1%} filled; ' + ' or '.join(f'{x:,.4g} {what}' for x, what in ((limits and total_steps, 'steps'), (train_hours, 'hours')) if x)
        + (f'; going on from step {step}' if step else ''))
    stopping, totals, noted, first_step, epoch = [], torch.zeros(len(NAMES) + 3, device=device), step, step, None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    if step == 0 and eval_interval:
        validate()
    model.train()
    began = clock = time.perf_counter()
    halt, in_a_row = 0, 0

    # ------------------------------------------------------------------ the loop
    while not over() and not halt:
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            batches = deal(lengths, n, seed, epoch)
        chosen_pairs = batches[step % per_epoch]
        laid, within = batch_of([train[i] for i in chosen_pairs])
        reference, batch_sizes = known[chosen_pairs].to(device, non_blocking=True), sizes[chosen_pairs].to(device, non_blocking=True)
        policy = torch.zeros(n, 2, device=device)
        if dropout:
            torch.manual_seed(seed + step * world + rank)  # the masks are the step's own: no state to save
        for one, present in zip(laid, within):
            part = policy_logps(one)  # (n, 2)
            losses, _, _ = dpo_loss(*part.T, *reference.T, beta, label_smoothing)
            loss = (losses * present).sum() / n
            if sft_weight:
                loss = loss - sft_weight * part[:, 0].sum() / batch_sizes[:, 0].sum()
            loss.backward()
            policy += part.detach()
        if world > 1:  # one sum for all: gradients and the log-probabilities of the other processes' pairs
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            flat = torch.cat([x.reshape(-1) for x in (policy, *grads)])
            dist.all_reduce(flat)
            policy, *grads = (x.view_as(old) for x, old in zip(flat.split([policy.numel(), *(p.numel() for p in params)]), (policy, *params)))
            for p, grad in zip(params, grads):
                p.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        adamw.found_inf = bad = 1 - norm.isfinite().float()  # the fused kernel reads it on the device, and skips the step if it is 1
        for group in adamw.param_groups:
            group['lr'] = learning_rate(step)
        adamw.step()
        adamw.zero_grad()
        values = torch.cat((measure(policy, reference, batch_sizes), norm[None]))
        totals += torch.cat((torch.where(bad > 0, 0, values), torch.stack((bad, torch.ones_like(bad)))))
        step, now = step + 1, time.perf_counter()
        elapsed, clock = elapsed + (now - clock) * (step > first_step + 1 or not compile), now  # the first step compiles
        halt = len(stopping)
        if world > 1:  # the processes agree on the end
            shared = torch.tensor([elapsed * (rank == 0), float(halt)], device=device)
            dist.all_reduce(shared)
            elapsed, halt = shared.tolist()

        # --- now and then: read the numbers, validate, save
        evaluate, keep = (interval and step % interval == 0 for interval in (eval_interval, save_interval))
        if evaluate or keep or halt or over() or step % log_interval == 0:
            *means, skipped, steps = totals.tolist()
            means = [round(x / max(1, steps - skipped), 5) for x in means]
            totals.zero_()
            note(dict(step=step, **dict(zip(NAMES + ['norm'], means)), lr=learning_rate(step - 1), skipped=int(skipped), elapsed=round(elapsed, 2)))
            pace = (time.perf_counter() - began) / (step - first_step)
            left = min((total_steps - step) * pace, 3600 * train_hours - elapsed if train_hours else math.inf)
            say(f'step {step}/{total_steps} | ' + ' | '.join(f'{name} {x:.3f}' for name, x in zip(NAMES + ['norm'], means))
                + f' | lr {learning_rate(step - 1):.1e} | {n / pace:.1f} pairs/s | {left:.0f} s left')
            in_a_row = in_a_row + steps if skipped == steps else 0
            if in_a_row >= 10:
                fail(f'{in_a_row:.0f} steps in a row were not finite: lower --lr; {out_dir} keeps the checkpoint before them')
            if evaluate or over():
                validate()
            if keep or halt or over():
                save(out_dir)
            clock = time.perf_counter()

    # ------------------------------------------------------------------ the end
    if world > 1:
        dist.destroy_process_group()
    result = f'{step} steps of {n} pairs in {elapsed:.0f} s' + ''.join(f', {name} {value:.3f}' for name, value in scores.items())
    if not over():
        say(f'{out_dir}: stopped and saved at {result}; run the same command to continue')
        raise SystemExit(128 + int(stopping[0] if stopping else signal.SIGTERM))
    say(f'{out_dir}: {result}')
