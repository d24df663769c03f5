"""Proves every GPU path and measures every GPU figure, unattended, within nine minutes.

    python tests/gpu_check.py                     every step, then one line that counts them
    python tests/gpu_check.py attention generate  these steps alone
    python tests/gpu_check.py --out=gpu.json      where the figures go (out/gpu_check.json)

For a bare machine with one CUDA card, torch 2.11 and requirements.txt: no network, no data, random
weights of the true shapes. A step is a process of its own with a time limit, and leaves nothing
behind; it prints `PASS|FAIL name key=value ...`. First come the proofs, several at a time, and
beside them the compile caches are filled; then the measurements, each alone. After 520 s all ends,
and what is missing is named. Last line: `GPU_CHECK pass=N fail=M seconds=S`.

On a card of less than 60 GiB one step runs at a time, slam_a5000 is what is trained, and no cache
is filled: give it --seconds=1800. --layers=2 makes the large model a shallow one, for a trial.
--launcher="COMMAND" runs the steps by another program than this Python; --dry says that its
numbers mean nothing (a stand-in for a card) and lifts the limits: a proof that fails is then marked
`dry`, a measurement that fails is a failure all the same.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

SECONDS = 520  # for everything
PROOFS_END = 0.4  # of them: what proves has ended by then, and what measures may begin
TOGETHER = 6  # proofs and cache fills at a time, on a card of 60 GiB or more
LARGE = 60 * 2**30  # bytes

TOKENS = 1.44e9  # that Slam's pre-training sees (Table 4): 17,625 steps of 81,920
DPO_STEPS = 813  # Table 5
REACHABLE = 790e12  # FLOP/s of a large bf16 product measured on an H200
DATASHEET = 989e12  # FLOP/s that its data sheet promises
LIBRISPEECH, LIBRILIGHT = 960, 50_000  # hours

SHAPE = 'qwen2.5-0.5b'  # 358 M parameters
QWEN = dict(family='qwen2', n_embd=896, n_head=14, n_kv_head=2, n_ffn=4864)  # its width

FILLING = '--fill' in sys.argv  # this process only fills the compile caches


# -----------------------------------------------------------------------------
# What the steps share


def report(**figures):
    """Figures of this step; what was told before a step fails or hangs is kept."""
    print('FIGURES ' + json.dumps(figures), flush=True)


def check(condition, message):
    """A number that is not what it should be: the step goes on, and fails."""
    if not condition:
        report(wrong=' '.join(str(message).split())[:300])


def relative(found, expected):
    """The norm of the difference over the norm of what is expected."""
    found, expected = found.double().cpu().flatten(), expected.double().cpu().flatten()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def clocked(work):
    """(result, seconds) of work(), the device's part included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, max(1e-9, time.perf_counter() - begin)


def seconds_of(work, repeats=10, warmup=3):
    """Median seconds of work() on the device, by events."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return max(1e-9, float(np.median(times)))


def gib(n_bytes):
    return round(n_bytes / 2**30, 2)


def large_model(dtype=torch.float32):
    """The 358 M model with random weights, which hardly ever ends an utterance."""
    from model import EOS, SLM

    slm = SLM.from_preset(SHAPE, context=1024).to('cuda', dtype).eval()
    slm.head.weight.data[EOS] = 0  # not among the likeliest
    return slm


def random_lengths(n, mean=620, seed=0, most=1024):
    """Lengths of chunks as Slam has them: log-normal, at most 1,024, about `mean` on average."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(math.log(mean), 0.5, n), 4, most).astype(int)


def write_data(folder, n_tokens, units=500, pairs=0):
    """A folder as prepare_units.py writes it: random units, `pairs` preference pairs."""
    from model import BOS, OFFSET

    os.makedirs(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(OFFSET, units + OFFSET, n_tokens, dtype=np.uint16)
    starts = np.cumsum(random_lengths(n_tokens // 100))
    starts = starts[starts < n_tokens - 8]
    tokens[starts] = tokens[starts - 1] = tokens[0] = tokens[-1] = BOS
    tokens.tofile(os.path.join(folder, 'train.bin'))
    meta = dict(vocab_size=units + OFFSET, n_units=units, offset=OFFSET, dtype='uint16')
    meta |= dict(tokens=dict(train=n_tokens), dedup=True, frame_rate=25.0)
    meta |= dict(encoder='mhubert25', vocoder='hifigan25')
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    with open(os.path.join(folder, 'pairs.jsonl'), 'w') as file:
        for _ in range(pairs):
            sizes = rng.integers((20, 30, 30), (80, 120, 120))
            parts = [dict(units=rng.integers(0, units, size).tolist()) for size in sizes]
            row = dict(zip(('prompt', 'chosen', 'rejected'), parts, strict=True))
            file.write(json.dumps(row) + '\n')
    return folder


def run_script(script, *flags):
    """A script's main body in this process -> its names at the end, its output, and figures.

    Of the figures, `waits` says at which of its lines the host waited for the device, and after
    how many different steps: a line in the loop that does so at every step costs speed.
    """
    torch.cuda.reset_peak_memory_stats()
    path = os.path.join(ROOT, script)
    waits = defaultdict(set)

    def listen(message, *_, **__):
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename, frame.f_code.co_name) != (path, '<module>'):
            frame = frame.f_back
        if frame and 'synchronizing' in str(message):
            waits[frame.f_lineno].add(frame.f_globals.get('step', 0))

    names = {}
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter('always')
        warnings.showwarning = listen
        begin = time.perf_counter()
        try:
            names = runpy.run_path(path, run_name='__main__')
        except SystemExit as end:  # its line on stderr says why
            assert not end.code, f'{script} ended with {end.code}'
        seconds = time.perf_counter() - begin
    torch.cuda.set_sync_debug_mode('default')
    counters = torch._dynamo.utils.counters
    figures = dict(
        script_s=round(seconds, 1),
        peak_gib=gib(torch.cuda.max_memory_allocated()),
        recompiles=sum(counters['recompiles'].values()),
        graph_breaks=sum(counters['graph_break'].values()),
        waits={line: len(steps) for line, steps in sorted(waits.items())},
    )
    return names, said.getvalue(), figures


def median_speed(out, key):
    """The median of a key of log.jsonl over the second half of a run."""
    with open(os.path.join(out, 'log.jsonl')) as file:
        values = [row[key] for row in map(json.loads, file) if row.get(key)]
    return float(np.median(values[len(values) // 2 :]))


def random_hubert(folder, layers):
    """A HuBERT of the base width with random weights, and a k-means: arguments of UnitEncoder."""
    from safetensors.torch import save_file
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    where = os.path.join(folder, 'hubert')
    HubertModel(HubertConfig(num_hidden_layers=layers)).eval().save_pretrained(where)
    centroids = os.path.join(folder, 'kmeans.safetensors')
    save_file(dict(centroids=torch.randn(500, 768)), centroids)
    return where, dict(layer=layers, kmeans=centroids)


def random_hifigan(folder):
    """The public unit vocoder's layout with random weights, saved."""
    from torch import nn

    width, kernels = 512, [3, 7, 11]
    config = dict(num_embeddings=500, embedding_dim=128, model_in_dim=128, sampling_rate=16000)
    config |= dict(upsample_rates=[5, 4, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 8, 4])
    config |= dict(upsample_initial_channel=width, resblock_kernel_sizes=kernels)
    config |= dict(resblock_dilation_sizes=[[1, 3, 5]] * 3, multispkr=None)
    durations = dict(encoder_embed_dim=128, var_pred_hidden_dim=128, var_pred_kernel_size=3)
    config['dur_predictor_params'] = durations | dict(var_pred_dropout=0.5)
    torch.manual_seed(0)
    state = {'dict.weight': torch.randn(500, 128)}

    def add(name, layer):
        weight = layer.weight.detach()
        state[name + '.bias'] = layer.bias.detach()
        state[name + '.weight_g'] = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
        state[name + '.weight_v'] = weight

    add('conv_pre', nn.Conv1d(128, width, 7))
    for i, kernel in enumerate(config['upsample_kernel_sizes']):
        add(f'ups.{i}', nn.ConvTranspose1d(width, width // 2, kernel))
        width //= 2
        for k, size in enumerate(kernels):
            for j in range(3):
                for part in ('convs1', 'convs2'):
                    add(f'resblocks.{3 * i + k}.{part}.{j}', nn.Conv1d(width, width, size))
    add('conv_post', nn.Conv1d(width, 1, 7))
    for i in (1, 2):
        layer = nn.Conv1d(128, 128, 3)
        state[f'dur_predictor.conv{i}.0.weight'] = layer.weight.detach()
        state[f'dur_predictor.conv{i}.0.bias'] = layer.bias.detach()
        state[f'dur_predictor.ln{i}.weight'] = torch.ones(128)
        state[f'dur_predictor.ln{i}.bias'] = torch.zeros(128)
    state['dur_predictor.proj.weight'] = torch.randn(1, 128) * 0.1
    state['dur_predictor.proj.bias'] = torch.ones(1)
    path = os.path.join(folder, 'generator.pt')
    torch.save(dict(generator=state), path)
    with open(os.path.join(folder, 'generator.json'), 'w') as file:
        json.dump(config, file)
    return path


# -----------------------------------------------------------------------------
# Proofs


def hardware():
    """What machine this is: versions, a large bf16 product, a copy."""
    properties = torch.cuda.get_device_properties(0)
    report(
        gpu=properties.name.replace(' ', '_'),
        sm=f'{properties.major}{properties.minor}',
        gib=gib(properties.total_memory),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    report(product_tflops=round(2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12))
    source = torch.empty(2**30, dtype=torch.uint8, device='cuda').random_()
    target = torch.empty_like(source)
    report(copy_gb_s=round(2 * 2**30 / seconds_of(lambda: target.copy_(source)) / 1e9))


def packed_rows():
    """Documents of awkward lengths, then a preference pair with two branches, in rows of 2,048:
    tokens, targets, doc, positions, branch, each (2, 2048)."""
    rng = np.random.default_rng(0)
    names = ('tokens', 'targets', 'doc', 'positions', 'branch')
    rows = {name: np.zeros((2, 2048), np.int64) for name in names}
    rows['targets'][:] = -100
    # document, branch, first position, length; both completions go on from the pair's prompt
    stretches = [(n, 0, 0, length) for n, length in enumerate((1, 127, 128, 129, 1024), 1)]
    stretches += [(6, 0, 0, 100), (6, 1, 100, 200), (6, 2, 100, 150)]
    for row in range(2):
        at = 0
        for doc, branch, start, length in stretches:
            span = slice(at, at + length)
            rows['tokens'][row, span] = rng.integers(2, 502, length)
            rows['targets'][row, at : at + length - 1] = rows['tokens'][row, at + 1 : at + length]
            rows['doc'][row, span] = doc
            rows['positions'][row, span] = np.arange(start, start + length)
            rows['branch'][row, span] = branch
            at += length
        rows['doc'][row, at:] = 7
        rows['positions'][row, at:] = np.arange(2048 - at)
    return {name: torch.from_numpy(value) for name, value in rows.items()}


def dense_reference(slm, rows):
    """Loss and gradients in fp64 on the CPU by transformers, with the mask written out."""
    from transformers import AutoModelForCausalLM

    from model import SLM

    doc, branch = rows['doc'], rows['branch']
    index = torch.arange(doc.shape[1])
    same = doc[:, :, None] == doc[:, None, :]
    before = index[None, :] <= index[:, None]
    open_to = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    hidden = ~(same & before & open_to)[:, None]
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -1e30)
    with tempfile.TemporaryDirectory() as folder:
        slm.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation='eager'
        )
        logits = theirs(rows['tokens'], attention_mask=mask, position_ids=rows['positions']).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows['targets'].flatten(), ignore_index=-100
        )
        loss.backward()
        # our names for their gradients: a checkpoint whose weights are gradients
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(parameter.grad)
        theirs.float().save_pretrained(folder)
        gradients = dict(SLM.from_pretrained(folder).named_parameters())
    return float(loss.detach()), gradients


def attention():
    """Packed attention with documents and branches: loss and every gradient against fp64."""
    from model import SLM, SLMConfig

    rows = packed_rows()
    slm = SLM(SLMConfig(n_layer=2, context=2048, **QWEN))
    with torch.no_grad():  # weights large enough that attention is no mean
        for parameter in slm.parameters():
            parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)
    expected, gradients = dense_reference(slm, rows)
    slm.cuda()
    rows = {name: value.cuda() for name, value in rows.items()}
    compiled = torch.compile(slm, dynamic=False)
    kinds = [('fp32', torch.float32, 1e-5, 1e-4), ('bf16', torch.bfloat16, 2e-3, 2e-2)]
    for name, dtype, loss_limit, gradient_limit in kinds:
        slm.zero_grad()
        with torch.autocast('cuda', dtype, enabled=name != 'fp32'):
            loss = compiled(**rows)
        loss.backward()
        off = abs(float(loss.detach()) - expected) / expected
        worst = max(relative(p.grad, gradients[key]) for key, p in slm.named_parameters())
        report(**{f'{name}_loss': f'{off:.1e}', f'{name}_gradients': f'{worst:.1e}'})
        check(off <= loss_limit and worst <= gradient_limit, f'{name}: {off:.1e}, {worst:.1e}')


def log_likelihoods():
    """SLM.logps on packed rows, fp32 and bf16, against one utterance at a time on the CPU."""
    from model import SLM, SLMConfig

    rows = packed_rows()
    slm = SLM(SLMConfig(n_layer=4, context=2048, **QWEN)).eval()
    expected = []
    for row in range(2):
        for number in range(2, 6):
            tokens = rows['tokens'][row][rows['doc'][row] == number][None]
            mask = torch.ones_like(tokens)
            mask[:, 0] = 0
            with torch.no_grad():
                expected.append(float(slm.logps(tokens, mask)))
    # document d of row r counts in segment 4 r + d - 2; the pair and the filler count nowhere
    counts = (rows['doc'] >= 2) & (rows['doc'] <= 5) & (rows['positions'] > 0)
    segments = (rows['doc'] - 2 + 4 * torch.arange(2)[:, None]).clamp(0, 7)
    inputs = [x.cuda() for x in (rows['tokens'], counts.long(), rows['doc'])]
    for name, dtype, limit in (('fp32', torch.float32, 1e-5), ('bf16', torch.bfloat16, 3e-3)):
        slm = slm.to('cuda', dtype)
        with torch.no_grad():
            found = slm.logps(*inputs, segments=segments.cuda(), n=8).cpu()
        worst = float(((found - torch.tensor(expected)) / torch.tensor(expected)).abs().max())
        report(**{name: f'{worst:.1e}'})
        check(worst <= limit, f'{name}: {worst:.1e}')


def generate():
    """Greedy continuations: eager and compiled on the GPU in fp32 as on the CPU; bf16 runs."""
    from model import BOS, OFFSET, SLM, SLMConfig

    slm = SLM(SLMConfig(n_layer=2, context=1024, **QWEN)).eval()
    with torch.no_grad():
        for parameter in slm.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    rng = np.random.default_rng(0)
    sizes = (3, 40, 41, 100)
    prompts = [torch.tensor([BOS, *rng.integers(OFFSET, 502, n).tolist()]) for n in sizes]
    options = dict(max_new_tokens=24, temperature=0, repetition_penalty=1.0)
    expected = slm.generate(prompts, **options)
    slm.cuda()
    for compiled in (False, True):
        found = slm.generate(prompts, compile=compiled, **options)
        same = sum(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        report(**{'compiled' if compiled else 'eager': f'{same}/{len(sizes)}'})
        check(same == len(sizes), f'{same} of {len(sizes)} as on the CPU, compiled {compiled}')
    slm.bfloat16()
    for batch in (1, 3, 16):
        for compiled in (False, True):
            slm.generate(prompts[:1] * batch, max_new_tokens=20, seed=1, compile=compiled)
    report(bf16='1,3,16')


def encoder():
    """HuBERT units: the GPU against the CPU, alone against in a batch, fp32, TF32 and bf16."""
    from model import UnitEncoder

    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (16000, 48000, 79999, 160001)]

    def equal(units, others):
        return sum(int((a == b).sum()) for a, b in zip(units, others, strict=True)) / total

    with tempfile.TemporaryDirectory() as folder:
        hubert, more = random_hubert(folder, layers=2)
        expected = UnitEncoder.from_pretrained(hubert, **more, dtype='float32').encode(waves)
        total = sum(map(len, expected))
        limits = dict(float32=(0.995, 0.995), auto=(0.98, 0.995), bfloat16=(0, 0))
        for dtype, (as_cpu, as_alone) in limits.items():
            enc = UnitEncoder.from_pretrained(hubert, **more, device='cuda', dtype=dtype)
            together = enc.encode(waves)
            alone = equal(together, [enc.encode([wave])[0] for wave in waves])
            name = dtype.replace('auto', 'tf32')
            report(**{name: round(equal(together, expected), 4), name + '_alone': round(alone, 4)})
            check(equal(together, expected) >= as_cpu, f'{name}: units as on the CPU')
            check(alone >= as_alone, f'{name}: units alone as in a batch')


def vocoders():
    """The table and the unit HiFi-GAN: the GPU's wave against the CPU's, alone against batch."""
    from model import N_MELS, UnitVocoder

    generator = torch.Generator().manual_seed(0)
    units = [torch.randint(0, 100, (n,), generator=generator) for n in (5, 60)]
    table = dict(kind='table', n_units=100, frame_rate=25.0, sample_rate=16000)
    mel = torch.randn(100, 4, N_MELS, generator=generator) - 4
    tensors = dict(mel=mel, durations=torch.full((100,), 2.0))
    with tempfile.TemporaryDirectory() as folder:
        path = random_hifigan(folder)
        made = dict(
            table=[UnitVocoder(table, tensors, device) for device in ('cpu', 'cuda')],
            hifigan=[UnitVocoder.from_pretrained(path, device) for device in ('cpu', 'cuda')],
        )
    durations = [torch.full((len(each),), 2) for each in units]
    for name, (on_cpu, on_gpu) in made.items():
        expected, found = on_cpu.decode(units, durations), on_gpu.decode(units, durations)
        alone = [on_gpu.decode([u], [d])[0] for u, d in zip(units, durations, strict=True)]
        worst = max(relative(a, b) for a, b in zip(found, expected, strict=True))
        mixed = max(relative(a, b) for a, b in zip(found, alone, strict=True))
        report(**{name: f'{worst:.1e}', name + '_alone': f'{mixed:.1e}'})
        check(worst < 2e-2 and mixed < 1e-3, f'{name}: {worst:.1e}, alone {mixed:.1e}')
        pairs = zip(on_cpu.durations(units), on_gpu.durations(units), strict=True)
        apart = sum(int((a != b.cpu()).sum()) for a, b in pairs)  # one may round to the other side
        check(apart <= 1, f'{name}: {apart} durations are others than on the CPU')


def skipped_step():
    """Where found_inf is 1, fused AdamW leaves parameters and states as they are, bit for bit."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, fused=True)

    def step(gradient, bad):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.full((), bad, device='cuda')
        optimizer.step()
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [tensor.detach().clone() for tensor in (*layer.parameters(), *states)]

    first, second, third = step(1.0, 0.0), step(math.nan, 1.0), step(1.0, 0.0)
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    moved = [not torch.equal(a, b) for a, b in zip(second, third, strict=True)]
    report(unchanged=all(same))
    check(all(same) and all(moved), f'unchanged {same}, after a good step changed {moved}')


TINY = (
    '--init=scratch --n_layer=2 --n_embd=64 --n_head=2 --n_kv_head=1 --n_ffn=128 --context=128 '
    '--row_tokens=512 --batch_tokens=1024 --eval_interval=0 --save_interval=0 --train_hours=1 '
    '--log_interval=1 --val_data= --warmup_steps=2 --max_steps=20 --device=cuda'
).split()


def resume():
    """train.py: 20 steps are 10, SIGTERM, and the rest, with the same weights at the end."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 60_000)

        def run(name, stop_at=None):
            out = os.path.join(folder, name)
            command = [*launcher(), os.path.join(ROOT, 'train.py'), *TINY, f'--data={data}']
            process = subprocess.Popen(
                [*command, f'--out_dir={out}'], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for line in process.stdout:
                if stop_at and line.startswith(f'step {stop_at}/'):
                    process.send_signal(signal.SIGTERM)
            return process.wait(), os.path.join(out, 'model.safetensors')

        codes, files = zip(run('whole'), run('parts', stop_at=10), run('parts'), strict=True)
        report(codes=codes)
        assert codes[0] == codes[2] == 0, 'a run failed'
        whole, parts = load_file(files[0]), load_file(files[2])
    worst = max(relative(parts[name], whole[name]) for name in whole)
    report(weights_differ=f'{worst:.1e}')
    check(codes[1] == 128 + signal.SIGTERM and worst < 1e-6, f'{codes}, {worst:.1e}')


def vits():
    """A small random VITS in fp32: as many samples on the GPU as on the CPU."""
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128)
    size |= dict(flow_size=64, spectrogram_bins=33, upsample_initial_channel=64, vocab_size=40)
    speaker = VitsModel(VitsConfig(**size)).eval()
    speaker.noise_scale = speaker.noise_scale_duration = 0.0
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = speaker(input_ids=tokens).waveform
        found = speaker.cuda()(input_ids=tokens.cuda()).waveform
    same = found.shape == expected.shape
    report(samples=found.shape[1], differ=f'{relative(found, expected):.1e}' if same else None)
    check(same, f'{found.shape[1]} samples, on the CPU {expected.shape[1]}')


def train_run(config, steps):
    """train.py on random data with a config, no validation -> its names, tokens/s, figures."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = write_data(os.path.join(folder, 'data'), 6_000_000), os.path.join(folder, 'run')
        names, _, figures = run_script(
            'train.py', config, f'--data={data}', f'--out_dir={out}', '--val_data=',
            f'--max_steps={steps}', '--eval_interval=0', '--save_interval=0', '--log_interval=5',
            f'--init=preset:{SHAPE}', '--device=cuda',
        )  # fmt: skip
        return names, median_speed(out, 'tokens_per_s'), figures


def training_memory():
    """slam_a5000's shape: does its step fit 24 GB? Peak GiB, limit 20."""
    _, _, figures = train_run('config/slam_a5000.py', 3)
    report(**figures)
    check(figures['peak_gib'] < 20, f'peak {figures["peak_gib"]} GiB')


# -----------------------------------------------------------------------------
# Measurements


def training():
    """slam_h200: tokens/s, MFU, peak memory, waits, recompilations; the kernels that take most."""
    large = torch.cuda.get_device_properties(0).total_memory >= LARGE
    steps = 2 if FILLING else 30
    names, speed, figures = train_run(f'config/slam_{"h200" if large else "a5000"}.py', steps)
    flops = names['raw'].flops_per_token(620)
    report(
        tokens_s=round(speed),
        hours_of_slam=round(TOKENS / speed / 3600, 2),
        mfu_reachable=round(speed * flops / REACHABLE, 3),
        mfu_datasheet=round(speed * flops / DATASHEET, 3),
        start_s=round(figures['script_s'] - steps * 81_920 / speed, 1),
        **figures,
    )
    often = [line for line, count in figures['waits'].items() if count > steps / 2]
    check(FILLING or not often, f'train.py waits at every step in line {often}')

    # three more rows under the profiler
    [row, *_] = next(names['loader'].steps(1))['passes']
    tokens, targets, doc = row.cuda()[:, None]

    def step():
        with names['autocast']:
            names['model'](tokens, targets, doc=doc).backward()
        for optimizer in names['optimizers']:
            optimizer.step()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    total = max(1, sum(row.self_device_time_total for row in rows))
    top = {row.key[:60]: f'{row.self_device_time_total / total:.1%}' for row in rows[:15]}
    report(row_ms=round(total / 3000, 1), top=top)


def dpo():
    """dpo.py with the 358 M model, compiled: pairs/s of a step and of the reference's pass."""
    from model import SLM

    with tempfile.TemporaryDirectory() as folder:
        data, out = os.path.join(folder, 'data'), os.path.join(folder, 'dpo')
        write_data(data, 10_000, pairs=3000)
        init = os.path.join(folder, 'slm')
        slam = dict(n_units=500, dedup=True, frame_rate=25.0)
        SLM.from_preset(SHAPE, context=1024).save_pretrained(init, slam)
        names, _, figures = run_script(
            'dpo.py', f'--init={init}', f'--data={data}/pairs.jsonl', f'--out_dir={out}',
            f'--max_steps={2 if FILLING else 30}', '--eval_interval=0', '--save_interval=0',
            '--log_interval=5', '--device=cuda',
        )  # fmt: skip
        speed = median_speed(out, 'pairs_per_s')
    report(pairs_s=round(speed, 1), minutes_of_slam=round(DPO_STEPS * 64 / speed / 60, 2))
    often = [line for line, count in figures['waits'].items() if count > 15]
    check(not often, f'dpo.py waits at every step in line {often}')
    place = names['torch_device']
    _, spent = clocked(
        lambda: names['score'](names['row_logps'], names['pairs'], names['width'], place)
    )
    report(reference_pairs_s=round(len(names['pairs']) / spent), **figures)


def generation():
    """150 tokens each of 1, 16 and 64 prompts of new lengths: eager, compiled, with CUDA graphs;
    the first token; and 32 beside transformers.generate."""
    from transformers import AutoModelForCausalLM

    from model import BOS, OFFSET

    slm = large_model(torch.bfloat16)
    rng = np.random.default_rng()

    def prompts(n):
        sizes = rng.integers(40, 80, n)
        return [torch.tensor([BOS, *rng.integers(OFFSET, 502, size).tolist()]) for size in sizes]

    def tokens_s(batch, compiled):
        slm.generate(prompts(batch), 8, seed=0, compile=compiled)  # compiles, records a graph
        made, spent = clocked(lambda: slm.generate(prompts(batch), 150, seed=0, compile=compiled))
        return round(sum(map(len, made)) / spent)

    plain = torch.compile(slm._next, fullgraph=True, dynamic=True)
    for name, step in (('graphs', None), ('eager', None), ('compiled', plain)):
        slm.compiled_step = step
        for batch in (1, 16, 64):
            report(**{f'{name}_{batch}': tokens_s(batch, name != 'eager')})
    if FILLING:
        return
    slm.compiled_step = None
    _, spent = clocked(lambda: next(slm.generate_steps(prompts(1), 2, seed=0)))
    ours = tokens_s(32, True)
    report(first_token_ms=round(1000 * spent, 1), graphs_32=ours)

    with tempfile.TemporaryDirectory() as folder:
        slm.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    options = dict(max_new_tokens=150, min_new_tokens=150, pad_token_id=0, do_sample=True)
    options |= dict(top_k=25, temperature=0.8, repetition_penalty=1.1)
    batch = torch.randint(2, 502, (32, 60), device='cuda')
    theirs.generate(batch, **options | dict(max_new_tokens=8, min_new_tokens=8))
    _, spent = clocked(lambda: theirs.generate(batch, **options))
    report(transformers_32=round(32 * 150 / spent), ratio=round(ours * spent / 4800, 1))


def attention_kernels():
    """64 x 14/2 x 1,024 x 64 in bf16: flex with its own and with our options, and varlen."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import model as house

    T, D = 64 * 1024, 64
    lengths = random_lengths(2 * T // 620, seed=1)
    doc = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[:T]).cuda()[None]
    q, k, v = (
        torch.randn(1, heads, T, D, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for heads in (14, 2, 2)
    )
    mask = torch.compile(create_block_mask)(
        house.visibility(doc, None), 1, None, T, T, device='cuda'
    )
    flex = torch.compile(flex_attention, dynamic=False)
    options = house.FLEX_OPTIONS.get(torch.cuda.get_device_capability()[0])
    common = dict(block_mask=mask, enable_gqa=True)
    varlen = house.attend_varlen(doc, 1024)
    ways = {
        'flex_default': lambda: flex(q, k, v, **common),
        'flex_ours': lambda: flex(q, k, v, kernel_options=options, **common),
        'varlen': lambda: varlen(q, k, v),
    }
    for name, forward in ways.items():
        with torch.no_grad():
            ahead = seconds_of(forward, repeats=5)
        gradient = torch.randn_like(forward())

        def both(forward=forward, gradient=gradient):
            forward().backward(gradient)

        back = seconds_of(both, repeats=5) - ahead
        report(**{f'{name}_ms': f'{1000 * ahead:.2f} forward, {1000 * back:.2f} backward'})


def products():
    """The matrix products of a layer and the head's, 502 columns against 512; TFLOP/s."""
    T = 65_536
    shapes = dict(qkv=(896, 1152), out=(896, 896), up=(896, 9728), down=(4864, 896))
    shapes |= dict(head502=(896, 502), head512=(896, 512))
    for name, (inner, outer) in shapes.items():
        x = torch.randn(T, inner, device='cuda', dtype=torch.bfloat16)
        w = torch.randn(outer, inner, device='cuda', dtype=torch.bfloat16)
        spent = seconds_of(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        report(**{name: round(2 * T * inner * outer / spent / 1e12)})


def units():
    """HuBERT base: the encoder alone on three new draws of lengths, then prepare_units.py on 200
    flac files; times real time, and hours for the paper's sets."""
    import soundfile

    from model import UnitEncoder

    rng = np.random.default_rng()  # new lengths each run

    def draw():
        sizes = (16000 * rng.uniform(3, 35, 200)).astype(int)
        return [0.05 * torch.randn(size) for size in sizes], sizes.sum() / 16000

    with tempfile.TemporaryDirectory() as folder:
        hubert, more = random_hubert(folder, layers=11)
        enc = UnitEncoder.from_pretrained(hubert, **more, device='cuda')
        enc.encode(draw()[0][:32])
        speeds = []
        for _ in range(3):
            waves, seconds = draw()
            speeds.append(round(seconds / clocked(lambda waves=waves: enc.encode(waves))[1]))
        report(encoder_x_real_time=speeds)

        waves, seconds = draw()
        os.makedirs(os.path.join(folder, 'audio'))
        for i, wave in enumerate(waves):
            soundfile.write(os.path.join(folder, 'audio', f'{i:03d}.flac'), wave.numpy(), 16000)
        _, _, figures = run_script(
            'prepare_units.py', f'--audio={folder}/audio', f'--out={folder}/units',
            f'--encoder={hubert}', *(f'--{key}={value}' for key, value in more.items()),
            '--device=cuda',
        )  # fmt: skip
        with open(os.path.join(folder, 'units', 'meta.json')) as file:
            speed = json.load(file)['x_real_time'] or seconds / figures['script_s']
    report(x_real_time=round(speed), script_s=figures['script_s'], audio_s=round(seconds))
    report(librispeech_h=round(LIBRISPEECH / speed, 2), librilight_h=round(LIBRILIGHT / speed, 1))


def hifigan():
    """The unit HiFi-GAN of the public size: times real time, alone and 16 together."""
    from model import UnitVocoder

    with tempfile.TemporaryDirectory() as folder:
        voc = UnitVocoder.from_pretrained(random_hifigan(folder), 'cuda')
    durations = torch.full((200,), 2)
    for batch in (1, 16):
        sentences = [torch.randint(0, 500, (200,)) for _ in range(batch)]
        voc.decode(sentences, [durations] * batch)
        waves, spent = clocked(lambda s=sentences: voc.decode(s, [durations] * len(s)))
        report(**{f'x_real_time_{batch}': round(sum(map(len, waves)) / 16000 / spent)})


def scoring():
    """eval_slm.py's log-likelihoods, 2,000 pairs of about 60 units, 358 M in bf16: pairs/s."""
    import eval_slm

    slm, rng = large_model(torch.bfloat16), np.random.default_rng()

    def draw():
        return [rng.integers(0, 500, size) for size in rng.integers(30, 90, 4000)]

    eval_slm.log_likelihoods(slm, draw())
    utterances = draw()
    _, spent = clocked(lambda: eval_slm.log_likelihoods(slm, utterances))
    report(pairs_s=round(2000 / spent))


def checkpoint():
    """Seconds to write and to read a checkpoint of the 358 M model."""
    from model import SLM

    slm = large_model()
    with tempfile.TemporaryDirectory() as folder:
        _, written = clocked(lambda: slm.save_pretrained(folder, dict(n_units=500)))
        _, read = clocked(lambda: SLM.from_pretrained(folder).cuda())
    report(write_s=round(written, 2), read_s=round(read, 2))


# -----------------------------------------------------------------------------
# The program

# Steps in order with the seconds each may take. Whatever the proofs do, they have ended after
# PROOFS_END of the time; the limits of the measurements add up to the rest.
PROOFS = dict(
    skipped_step=60, generate=150, attention=150, encoder=100, resume=120, training_memory=170,
    log_likelihoods=80, vocoders=60, vits=60,
)  # fmt: skip
MEASUREMENTS = dict(
    training=85, dpo=45, generation=60, units=40, attention_kernels=25, scoring=15, hifigan=15,
    products=10, checkpoint=15,
)  # fmt: skip
FILLS = ('training', 'dpo', 'generation')  # what compiles longest
RUNNING = set()  # processes of steps


def launcher():
    """How a Python program is run: by this Python, or by the wrapper that was named."""
    return shlex.split(os.environ.get('GPU_CHECK_LAUNCHER', '')) or [sys.executable]


def stop(process):
    """End a step and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_step(name, limit, *flags):
    """A step in a process group and folder of its own -> its figures, with `error` if it failed."""
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
        process.wait()
        RUNNING.discard(process)
        with open(folder + '/out') as out, open(folder + '/err') as err:
            for line in out:
                if line.startswith('FIGURES '):
                    figures |= json.loads(line.removeprefix('FIGURES '))
            said = [line.strip() for line in err if line.strip()]
    if code:
        errors = [line for line in said if re.match(r'[\w.]*(Error|\.py): ', line)] or said or ['']
        figures['error'] = f'{code}: {" / ".join(errors[-2:])[:300]}'
    return figures | dict(seconds=round(time.monotonic() - begin, 1))


class Check:
    """All steps: what they found, and how much time is left."""

    def __init__(self, arguments):
        self.dry, self.out = arguments.dry, arguments.out
        self.seconds = math.inf if self.dry else arguments.seconds
        self.flags = ['--dry'] * arguments.dry
        self.flags += ['--layers', str(arguments.layers)] if arguments.layers else []
        self.begin, self.figures, self.lock = time.monotonic(), {}, threading.Lock()
        self.missing = [name for name in STEPS if name in (arguments.steps or STEPS)]

    def left(self, share=1.0):
        """Seconds until `share` of the time is over."""
        return self.begin + share * self.seconds - time.monotonic()

    def run(self, name, share=1.0):
        """A step, its line and its figures; not at all where no time is left for it."""
        limit = min(3600 if self.dry else STEPS[name], self.left(share))
        if name not in self.missing or limit < 3:
            return
        found = run_step(name, limit, *self.flags)
        status = 'FAIL' if {'wrong', 'error'} & set(found) else 'PASS'
        if self.dry and status == 'FAIL' and name in PROOFS:
            status = 'dry'
        self.missing.remove(name)
        self.note(name, status, found)

    def fill(self, name, share):
        """Its compile caches alone; whether that works is no result."""
        if self.left(share) > 3:
            self.note(f'fill_{name}', 'fill', run_step(name, self.left(share), '--fill'))

    def stop(self, *_):
        """Of a signal: what runs ends, and nothing more begins."""
        self.seconds = 0
        for process in list(RUNNING):
            stop(process)

    def note(self, name, status, found):
        line = ' '.join(f'{key}={json.dumps(value)}' for key, value in found.items())
        with self.lock, open(self.out, 'w') as file:
            self.figures[name] = dict(status=status, **found)
            json.dump(self.figures, file, indent=2)
            print(status, name, line, flush=True)

    def end(self):
        """The last line; whether all went well."""
        if self.missing:
            print(f'missing: {", ".join(self.missing)}')
        count = Counter(found['status'] for found in self.figures.values())
        failed = count['FAIL'] + len(self.missing)
        seconds = round(time.monotonic() - self.begin)
        print(f'GPU_CHECK pass={count["PASS"]} fail={failed} seconds={seconds}', flush=True)
        return failed == 0


STEPS = dict(hardware=30, **PROOFS, **MEASUREMENTS)


def run_one(arguments):
    """A step in this process, which is its own."""
    import torch._inductor.compile_fx

    import model

    if arguments.layers:
        model.PRESETS[SHAPE]['n_layer'] = arguments.layers
    if arguments.dry:  # a stand-in records no CUDA graphs, and no unit of its own is a unit
        torch._inductor.compile_fx.cudagraphify = lambda call, *_, **__: call
        encode = model.UnitEncoder.encode
        model.UnitEncoder.encode = lambda *waves: [units % 500 for units in encode(*waves)]
    [name] = arguments.steps
    globals()[name]()


def run_all(check, alone):
    """The hardware; proofs beside each other and beside cache fills; measurements, each alone."""
    os.makedirs(os.path.dirname(os.path.abspath(check.out)), exist_ok=True)
    check.run('hardware')
    small = check.dry or torch.cuda.get_device_properties(0).total_memory < LARGE
    share = 1.0 if small else PROOFS_END
    with ThreadPoolExecutor(1 if small else TOGETHER) as pool:
        fills = [] if small or alone else FILLS
        work = [pool.submit(check.fill, name, share) for name in fills]
        work += [pool.submit(check.run, name, share) for name in PROOFS]
    for each in work:
        each.result()  # raises what was raised there
    for name in MEASUREMENTS:
        check.run(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('steps', nargs='*')
    parser.add_argument('--out', default=os.path.join(ROOT, 'out', 'gpu_check.json'))
    parser.add_argument('--seconds', type=float, default=SECONDS)
    parser.add_argument('--layers', type=int)
    parser.add_argument('--launcher', default='')
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--one', action='store_true', help='run a step in this process')
    parser.add_argument('--fill', action='store_true', help='with --one: only to fill caches')
    arguments = parser.parse_args()
    unknown = set(arguments.steps) - set(STEPS)
    if unknown:
        sys.exit(f'gpu_check.py: no step {", ".join(unknown)}; there are {", ".join(STEPS)}')
    if arguments.one:
        return run_one(arguments)
    if arguments.launcher:
        os.environ['GPU_CHECK_LAUNCHER'] = arguments.launcher
    elif not torch.cuda.is_available():
        sys.exit('gpu_check.py: no CUDA device here')

    # one cache for all steps, whose temporary files go with them
    cache = os.path.join(tempfile.gettempdir(), 'gpu_check_cache')
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', cache)
    check = Check(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, check.stop)
    try:
        run_all(check, alone=bool(arguments.steps))
    finally:
        good = check.end()
    sys.exit(not good)


if __name__ == '__main__':
    main()
