"""Proves the GPU paths and measures the GPU figures, unattended, within nine minutes.

    python tests/gpu_check.py                     every step; figures in out/gpu_check.json
    python tests/gpu_check.py attention generate  these steps

For a machine with one CUDA card and requirements.txt: no network, no data, random weights of the
true shapes. A step is a process with a time limit and prints a line, `PASS|FAIL name {figures}`.
The proofs run together, the measurements one after the other. After 520 s all ends, and what is
missing has failed. --layers=2 makes the large model shallow, for a trial.

--launcher="COMMAND" runs the steps by another program than this Python; --dry: it is a stand-in for
a card, so that nothing is timed out, and a step whose numbers are wrong prints DRY.
"""

import argparse
import contextlib
import io
import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

SECONDS = 520
SHAPE = dict(n_layer=24, n_embd=896, n_head=14, n_kv_head=2, n_ffn=4864)  # Qwen2.5-0.5B, 358 M
# dense bf16 FLOP/s of the data sheets
DATASHEET = dict(H200=989e12, H100=989e12, A100=312e12, A5000=111e12)
SLAM_TOKENS = 17_625 * 81_920  # Table 4; Table 5 has 813 steps of 64 pairs


# -----------------------------------------------------------------------------
# What the steps share


def report(**figures):
    """Figures of this step; they are kept even if the step fails or hangs later."""
    print('FIGURES ' + json.dumps(figures), flush=True)


def check(condition, message):
    """If a number is not what it should be, the step goes on and fails at its end."""
    if not condition:
        report(wrong=' '.join(str(message).split())[:300])


def relative(found, expected):
    """The norm of the difference over the norm of what is expected."""
    found, expected = found.double().cpu().flatten(), expected.double().cpu().flatten()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def clocked(work):
    """(result, seconds) of work(), with the device's part."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, max(1e-9, time.perf_counter() - begin)


def small_slm(layers=2, scale=1.0):
    """A model of SHAPE's width with few layers on the CPU, its matrices scaled."""
    from model import load_slm

    slm = load_slm('scratch', sizes=SHAPE | dict(n_layer=layers), context=2048)
    with torch.no_grad():
        for parameter in slm.parameters():
            parameter.mul_(scale if parameter.ndim == 2 else 1.0)
    return slm


def random_prompts(sizes, seed=0):
    from model import BOS, OFFSET

    rng = np.random.default_rng(seed)
    return [torch.tensor([BOS, *rng.integers(OFFSET, 502, size).tolist()]) for size in sizes]


def write_data(folder, n_tokens=0, pairs=0):
    """A folder of random units as prepare_units.py writes it: chunks as long as Slam's, log-normal,
    about 620 tokens, at most 1,024; and preference pairs."""
    from model import BOS, OFFSET

    os.makedirs(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(OFFSET, 502, n_tokens, dtype=np.uint16)
    lengths = np.clip(rng.lognormal(math.log(620), 0.5, n_tokens // 100 + 1), 4, 1024).astype(int)
    starts = np.cumsum(lengths)
    starts = starts[starts < n_tokens - 8]
    tokens[starts] = tokens[starts - 1] = tokens[:1] = tokens[-1:] = BOS
    tokens.tofile(os.path.join(folder, 'train.bin'))
    meta = dict(vocab_size=502, n_units=500, offset=OFFSET, dtype='uint16', dedup=True)
    meta |= dict(tokens=dict(train=n_tokens), frame_rate=25.0, encoder='mhubert25')
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    with open(os.path.join(folder, 'pairs.jsonl'), 'w') as file:
        for _ in range(pairs):
            sizes = rng.integers((20, 30, 30), (80, 120, 120))
            parts = [dict(units=rng.integers(0, 500, size).tolist()) for size in sizes]
            row = dict(zip(('prompt', 'chosen', 'rejected'), parts, strict=True))
            file.write(json.dumps(row) + '\n')
    return folder


def run_script(script, steps, speed, out, *flags):
    """Some steps of a script in this process -> the median of `speed` in its log's second half.

    Reports memory, recompilations and `waits`: the lines of the main body at which the host waited
    for the device, and in how many steps; a wait at every step costs speed.
    """
    path, waits = os.path.join(ROOT, script), defaultdict(set)

    def listen(message, *_, **__):
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename, frame.f_code.co_name) != (path, '<module>'):
            frame = frame.f_back
        if frame and 'synchronizing' in str(message):
            waits[frame.f_lineno].add(frame.f_globals.get('step', 0))

    sys.argv = [script, *flags, f'--max_steps={steps}', f'--out_dir={out}', '--eval_interval=0']
    sys.argv += ['--save_interval=0', '--log_interval=5', '--device=cuda']
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('always')
        warnings.showwarning = listen
        _, spent = clocked(lambda: runpy.run_path(path, run_name='__main__'))
    torch.cuda.set_sync_debug_mode('default')
    counters = torch._dynamo.utils.counters
    report(
        script_s=round(spent, 1),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        recompiles=sum(counters['recompiles'].values()),
        graph_breaks=sum(counters['graph_break'].values()),
        waits={line: len(found) for line, found in sorted(waits.items())},
    )
    often = [line for line, found in waits.items() if len(found) > steps / 2]
    check(not often, f'{script} waits for the device at every step in line {often}')
    with open(os.path.join(out, 'log.jsonl')) as file:
        values = [row[speed] for row in map(json.loads, file) if row.get(speed)]
    return float(np.median(values[len(values) // 2 :]))


# -----------------------------------------------------------------------------
# Proofs


def hardware():
    """What machine this is, and its speed in a large bf16 product."""
    properties = torch.cuda.get_device_properties(0)
    gib = round(properties.total_memory / 2**30, 1)
    report(gpu=properties.name, gib=gib, torch=torch.__version__, cuda=torch.version.cuda)
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    clocked(lambda: [a @ b for _ in range(5)])
    _, spent = clocked(lambda: [a @ b for _ in range(20)])
    report(product_tflops=round(20 * 2 * 8192**3 / spent / 1e12))


DOCUMENTS = (1, 127, 128, 129, 1024)  # lengths around the block sizes of the attention kernels
PROMPT, CHOSEN, REJECTED = 100, 200, 150  # a preference pair: both completions follow the prompt


def packed_row():
    """One row of 2,048 tokens: DOCUMENTS, a preference pair with two branches, and filler.

    Returns: dict(tokens, targets, doc, positions, branch), each (1, 2048) int64, and the same as
    sequences that stand alone, [(tokens, targets)]; filler predicts nothing.
    """
    rng = np.random.default_rng(0)
    stretches = [(n, 0, 0, length) for n, length in enumerate(DOCUMENTS, 1)]
    stretches += [(6, 0, 0, PROMPT), (6, 1, PROMPT, CHOSEN), (6, 2, PROMPT, REJECTED)]
    stretches += [(7, 0, 0, 2048 - sum(length for *_, length in stretches))]
    parts = defaultdict(list)
    for doc, branch, start, length in stretches:
        tokens = torch.from_numpy(rng.integers(2, 502, length))
        filler = torch.full((length,), -100)
        parts['tokens'].append(tokens)
        parts['targets'].append(filler if doc == 7 else torch.cat((tokens[1:], filler[:1])))
        parts['positions'].append(torch.arange(start, start + length))
        parts['doc'].append(torch.full((length,), doc))
        parts['branch'].append(torch.full((length,), branch))
    alone = list(zip(parts['tokens'], parts['targets'], strict=True))[:-1]
    prompt, hidden = alone[5][0], torch.full((PROMPT,), -100)
    alone[6:] = [(torch.cat((prompt, x)), torch.cat((hidden, y))) for x, y in alone[6:]]
    return {name: torch.cat(columns)[None] for name, columns in parts.items()}, alone


def attention():
    """Packed rows, compiled, against documents alone on the CPU: loss and every gradient."""
    row, alone = packed_row()
    slm = small_slm(scale=2.0)  # weights large enough that attention is no mean
    on_cpu = small_slm(scale=2.0).double()
    counts = [int((targets >= 0).sum()) for _, targets in alone]
    total = 0.0
    for (tokens, targets), n in zip(alone, counts, strict=True):
        if n:
            loss = on_cpu(tokens[None], targets[None]) * n / sum(counts)
            loss.backward()
            total += float(loss.detach())
    expected = dict(on_cpu.named_parameters())
    slm.cuda()
    row = {name: value.cuda() for name, value in row.items()}
    compiled = torch.compile(slm, dynamic=False)
    for dtype, loss_limit, gradient_limit in (('float32', 1e-5, 1e-4), ('bfloat16', 2e-3, 2e-2)):
        slm.zero_grad()
        with torch.autocast('cuda', torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = compiled(**row)
        loss.backward()
        off = abs(float(loss.detach()) - total) / total
        worst = max(relative(p.grad, expected[name].grad) for name, p in slm.named_parameters())
        report(**{f'{dtype}_loss': f'{off:.1e}', f'{dtype}_gradients': f'{worst:.1e}'})
        check(off <= loss_limit and worst <= gradient_limit, f'{dtype}: {off:.1e}, {worst:.1e}')


def log_likelihoods():
    """SLM.logps of packed documents and of a pair's branches, against each alone on the CPU."""
    row, alone = packed_row()
    slm = small_slm(layers=4).eval()
    expected = []
    for i, (tokens, _) in enumerate(alone):
        mask = torch.ones_like(tokens)[None]
        mask[:, : 1 if i < 6 else PROMPT] = 0
        with torch.no_grad():
            expected.append(float(slm.logps(tokens[None], mask)))
    # one segment a sequence: documents, the prompt, and its two completions
    segments = torch.where(row['branch'] > 0, 5 + row['branch'], row['doc'] - 1)
    mask = (row['positions'] > 0) & (row['doc'] < 7)
    inputs = [x.cuda() for x in (row['tokens'], mask.long())]
    options = {name: row[name].cuda() for name in ('doc', 'positions', 'branch')}
    expected, scale = torch.tensor(expected), torch.tensor(expected).abs().clamp(min=1)
    for dtype, limit in (('float32', 1e-5), ('bfloat16', 3e-3)):
        slm = slm.to('cuda', getattr(torch, dtype))
        with torch.no_grad():
            found = slm.logps(*inputs, **options, segments=segments.clamp(max=7).cuda(), n=8).cpu()
        off = (found - expected).abs() / scale
        report(**{dtype: f'{float(off[:6].max()):.1e}'})
        report(**{f'{dtype}_branches': f'{float(off[6:].max()):.1e}'})
        check(float(off.max()) <= limit, f'{dtype}: {off.tolist()}')


def generate():
    """Greedy continuations on the GPU in fp32 as on the CPU; bf16 runs."""
    slm = small_slm(scale=3.0).eval()
    prompts = random_prompts((3, 40, 41, 100))
    options = dict(max_new_tokens=24, temperature=0, repetition_penalty=1.0)
    expected = slm.generate(prompts, **options)
    slm.cuda()
    found = slm.generate(prompts, **options)
    same = sum(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    report(same=f'{same}/{len(prompts)}')
    check(same == len(prompts), f'{same} of {len(prompts)} as on the CPU')
    slm.bfloat16()
    for batch in (1, 3, 16):
        slm.generate(prompts[:1] * batch, max_new_tokens=20, seed=1)
    report(bf16='1,3,16')


TINY = (
    '--init=scratch --n_layer=2 --n_embd=64 --n_head=2 --n_kv_head=1 --n_ffn=128 --context=128 '
    '--row_tokens=512 --batch_tokens=1024 --eval_interval=0 --save_interval=0 --train_hours=1 '
    '--log_interval=1 --val_data= --warmup_steps=2 --max_steps=20 --device=cuda'
).split()


def resume():
    """train.py: 10 steps, SIGTERM and the rest give the same weights as 20 steps at once."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 60_000)

        def run(name, stop_at=None):
            command = [*launcher(), os.path.join(ROOT, 'train.py'), *TINY, f'--data={data}']
            command.append(f'--out_dir={folder}/{name}')
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if stop_at and line.startswith(f'step {stop_at}/'):
                    process.send_signal(signal.SIGTERM)
            return process.wait()

        codes = [run('whole'), run('parts', stop_at=10), run('parts')]
        report(codes=codes)
        check(codes == [0, 128 + signal.SIGTERM, 0], f'exit codes {codes}')
        whole, parts = (load_file(f'{folder}/{x}/model.safetensors') for x in ('whole', 'parts'))
    worst = max(relative(parts[name], whole[name]) for name in whole)
    report(weights_differ=f'{worst:.1e}')
    check(worst < 1e-6, f'{worst:.1e}')


# -----------------------------------------------------------------------------
# Measurements


def train(config, steps):
    """train.py with a config on random data, without validation: tokens/s and MFU."""
    from model import load_slm

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 6_000_000)
        flags = [f'config/{config}.py', f'--data={data}', '--val_data=', '--init=scratch']
        flags += [f'--{name}={size}' for name, size in SHAPE.items()]
        speed = run_script('train.py', steps, 'tokens_per_s', folder + '/run', *flags)
    # 6 operations a weight, forward and backward; attention covers half of 620 tokens on average
    flops = speed * 6 * (load_slm('scratch', sizes=SHAPE).num_params() + 24 * 896 * 620)
    report(tokens_s=round(speed), hours_of_slam=round(SLAM_TOKENS / speed / 3600, 2))
    card = torch.cuda.get_device_name(0)
    for name, peak in DATASHEET.items():
        if name in card:
            report(tflops=round(flops / 1e12), mfu=round(flops / peak, 3))
            check(name != 'H200' or flops >= 0.5 * peak, f'{flops / peak:.1%} of the data sheet')


def train_a5000():
    """slam_a5000's shape, which must fit 24 GB."""
    train('slam_a5000', 10)
    peak = torch.cuda.max_memory_allocated() / 2**30
    check(peak < 20, f'peak {peak:.1f} GiB')


def train_h200():
    """slam_h200's shape, on cards with enough memory."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        return report(skipped='needs 60 GiB')
    train('slam_h200', 30)


def dpo():
    """dpo.py with the 358 M model: pairs/s."""
    from model import load_slm

    with tempfile.TemporaryDirectory() as folder:
        data, init = write_data(folder + '/data', pairs=3000), folder + '/slm'
        slam = dict(n_units=500, dedup=True, frame_rate=25.0)
        load_slm('scratch', sizes=SHAPE, context=1024).save_pretrained(init, slam)
        flags = 'config/slam_dpo.py', f'--init={init}', f'--data={data}/pairs.jsonl'
        speed = run_script('dpo.py', 30, 'pairs_per_s', folder + '/dpo', *flags)
    report(pairs_s=round(speed, 1), minutes_of_slam=round(813 * 64 / speed / 60, 2))


def generation():
    """Tokens/s for 150 tokens each of 1, 16 and 64 prompts."""
    from model import EOS, load_slm

    slm = load_slm('scratch', sizes=SHAPE, dtype=torch.bfloat16).to('cuda').eval()
    slm.head.weight.data[EOS] = 0  # not among the most likely: hardly a prompt ends early
    for batch in (1, 16, 64):
        warm, prompts = (random_prompts([60] * batch, seed) for seed in range(2))
        slm.generate(warm, 8, seed=0)
        made, spent = clocked(partial(slm.generate, prompts, 150, seed=0))
        report(**{f'prompts_{batch}': round(sum(map(len, made)) / spent)})


def units():
    """HuBERT base up to layer 11: units as on the CPU, times real time, hours for the sets."""
    from safetensors.torch import save_file
    from transformers import HubertConfig, HubertModel

    from model import UnitEncoder

    torch.manual_seed(0)
    sizes = (16000 * np.random.default_rng(0).uniform(3, 35, 100)).astype(int)
    waves = [0.05 * torch.randn(size) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        HubertModel(HubertConfig(num_hidden_layers=11)).save_pretrained(folder)
        save_file(dict(centroids=torch.randn(500, 768)), folder + '/kmeans.safetensors')
        options = dict(layer=11, kmeans=folder + '/kmeans.safetensors')
        cpu, gpu = (
            UnitEncoder.from_pretrained(folder, **options, device=d) for d in ('cpu', 'cuda')
        )
    same = [cpu.encode(wave[:48000]) == gpu.encode(wave[:48000]) for wave in waves[:8]]
    same = float(torch.cat(same).float().mean())
    report(same_as_cpu=round(same, 4))
    check(same >= 0.98, f'{same:.1%} of the units as on the CPU')
    _, spent = clocked(lambda: [gpu.encode(wave) for wave in waves])
    speed = sizes.sum() / 16000 / spent
    report(x_real_time=round(speed), librilight_h=round(50_000 / speed, 1))


# -----------------------------------------------------------------------------
# The program

# the steps and the seconds that each may take
PROOFS = dict(attention=150, log_likelihoods=100, generate=150, resume=150)
MEASUREMENTS = dict(hardware=40, train_h200=120, train_a5000=90, dpo=90, generation=90, units=60)
STEPS = PROOFS | MEASUREMENTS
RUNNING = set()  # processes of steps


def launcher():
    """How a Python program is run: by this Python, or by the program that was named."""
    return shlex.split(os.environ.get('GPU_CHECK_LAUNCHER', '')) or [sys.executable]


def stop(process):
    """End a step and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop_all(number, frame):
    """A signal to this program ends the steps that run, too."""
    for process in list(RUNNING):
        stop(process)
    os._exit(128 + number)


def run_step(name, limit, flags):
    """A step in a process group and a temporary folder of its own -> its figures, with `error` if
    it failed or was stopped."""
    figures, begin = {}, time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with open(folder + '/out', 'w') as out, open(folder + '/err', 'w') as err:
            process = subprocess.Popen(
                [*launcher(), os.path.abspath(__file__), '--one', name, *flags],
                stdout=out, stderr=err, cwd=ROOT, start_new_session=True,
                env=os.environ | dict(TMPDIR=folder),
            )  # fmt: skip
        RUNNING.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f'no end within {limit:.0f} s'
        stop(process)
        RUNNING.discard(process)
        with open(folder + '/out') as out, open(folder + '/err') as err:
            for line in out:
                if line.startswith('FIGURES '):
                    figures |= json.loads(line.removeprefix('FIGURES '))
            last = [line.strip() for line in err if line.strip()][-2:]
    if code:
        figures['error'] = f'{code}: {" / ".join(last)[:300]}'
    return figures | dict(seconds=round(time.monotonic() - begin, 1))


def run_all(arguments):
    """Run the steps that were asked for, print a line each -> {name: figures with status}."""
    flags = ['--dry'] * arguments.dry + [f'--layers={arguments.layers}'] * bool(arguments.layers)
    wanted = [name for name in STEPS if name in (arguments.steps or STEPS)]
    end = time.monotonic() + (math.inf if arguments.dry else arguments.seconds)
    results = {}

    def run(name):
        limit = min(3600 if arguments.dry else STEPS[name], end - time.monotonic())
        if limit < 3:
            return
        found = run_step(name, limit, flags)
        status = 'FAIL' if {'wrong', 'error'} & set(found) else 'PASS'
        if arguments.dry and 'wrong' in found and 'error' not in found:
            status = 'DRY'
        results[name] = dict(status=status, **found)
        print(status, name, json.dumps(found), flush=True)

    with ThreadPoolExecutor(1 if arguments.dry else len(PROOFS)) as pool:
        list(pool.map(run, [name for name in wanted if name in PROOFS]))
    for name in wanted:
        if name in MEASUREMENTS:
            run(name)
    missing = dict(status='FAIL', error='no time was left')
    return {name: results.get(name, missing) for name in wanted}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('steps', nargs='*', help=f'of {", ".join(STEPS)}')
    parser.add_argument('--out', default=os.path.join(ROOT, 'out', 'gpu_check.json'))
    parser.add_argument('--seconds', type=float, default=SECONDS)
    parser.add_argument('--layers', type=int)
    parser.add_argument('--launcher', default='')
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--one', action='store_true', help='run a step in this process')
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        sys.exit(f'gpu_check.py: no step {", ".join(unknown)}; there are {", ".join(STEPS)}')
    if arguments.one:
        SHAPE['n_layer'] = arguments.layers or SHAPE['n_layer']
        return globals()[arguments.steps[0]]()
    if arguments.launcher:
        os.environ['GPU_CHECK_LAUNCHER'] = arguments.launcher
    elif not torch.cuda.is_available():
        sys.exit('gpu_check.py: no CUDA device here')

    # one compile cache for all steps
    cache = os.path.join(tempfile.gettempdir(), 'gpu_check_cache')
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', cache)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_all)
    begin = time.monotonic()
    results = run_all(arguments)
    os.makedirs(os.path.dirname(os.path.abspath(arguments.out)), exist_ok=True)
    with open(arguments.out, 'w') as file:
        json.dump(results, file, indent=2)
    failed = sum(found['status'] == 'FAIL' for found in results.values())
    seconds = round(time.monotonic() - begin)
    print(f'GPU_CHECK pass={len(results) - failed} fail={failed} seconds={seconds}', flush=True)
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
