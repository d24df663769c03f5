"""Proves every GPU path and measures every GPU figure, unattended, within nine minutes.

    python tests/gpu_check.py                     every step, then one line that counts them
    python tests/gpu_check.py attention generate  these steps alone
    python tests/gpu_check.py --out=gpu.json      where the figures go (out/gpu_check.json)

For a bare machine with one CUDA card, torch 2.11 and requirements.txt: no network, no data, random
weights of the true shapes. A step is a process of its own with a time limit, so that none takes
the others along; it prints `PASS|FAIL name key=value ...`. A watchdog ends everything after 520 s
and prints what is missing. Last line: `GPU_CHECK pass=N fail=M seconds=S`.

--launcher="COMMAND" runs the steps by another program than this Python, --dry says that its
numbers mean nothing (a stand-in for a card): a proof that fails is then marked `dry`, a
measurement that fails is a failure all the same.
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
from collections import Counter

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

WATCHDOG = 520  # seconds for everything
TOKENS = 1.44e9  # that Slam's pre-training sees (Table 4): 17,625 steps of 81,920
DPO_STEPS = 813  # Table 5
REACHABLE = 790e12  # FLOP/s of a large bf16 product measured on an H200
DATASHEET = 989e12  # FLOP/s that its data sheet promises
LIBRISPEECH, LIBRILIGHT = 960, 50_000  # hours

QWEN = dict(family='qwen2', n_embd=896, n_head=14, n_kv_head=2, n_ffn=4864)  # Qwen2.5-0.5B's width


class Wrong(AssertionError):
    """A number is not what it should be; on a stand-in for a card, none is."""


def check(condition, message):
    if not condition:
        raise Wrong(message)


def relative(found, expected):
    """The norm of the difference over the norm of what is expected."""
    found, expected = found.double().cpu().flatten(), expected.double().cpu().flatten()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


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


def clocked(work):
    """(result, seconds) of work(), the device's part included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, max(1e-9, time.perf_counter() - begin)


def gib(n_bytes):
    return round(n_bytes / 2**30, 2)


def random_lengths(n, mean=620, seed=0, most=1024):
    """Lengths of chunks as Slam has them: log-normal, at most 1,024, about `mean` on average."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(math.log(mean), 0.5, n), 4, most).astype(int)


def write_data(folder, n_tokens, units=500, pairs=0, seed=0):
    """A folder as prepare_units.py writes it: random units, `pairs` preference pairs."""
    from model import BOS, OFFSET

    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    counts = {}
    for split, size in (('train', n_tokens), ('val', max(2048, n_tokens // 100))):
        tokens = rng.integers(OFFSET, units + OFFSET, size, dtype=np.uint16)
        lengths = random_lengths(size // 100, seed=seed)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        starts = starts[starts < size - 8]
        tokens[starts] = BOS
        tokens[np.append(starts[1:] - 1, size - 1)] = BOS
        tokens.tofile(os.path.join(folder, split + '.bin'))
        counts[split] = size
    meta = dict(vocab_size=units + OFFSET, n_units=units, offset=OFFSET, dtype='uint16')
    meta |= dict(tokens=counts, dedup=True, frame_rate=25.0, tokens_per_second=20.0)
    meta |= dict(encoder='mhubert25', vocoder='hifigan25', hours=dict(train=1.0, val=0.1))
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    with open(os.path.join(folder, 'pairs.jsonl'), 'w') as file:
        for _ in range(pairs):
            row = {}
            for part, low, high in (('prompt', 20, 80), ('chosen', 30, 120), ('rejected', 30, 120)):
                sequence = rng.integers(0, units, rng.integers(low, high)).tolist()
                row[part] = dict(units=sequence, duration=[1] * len(sequence))
            file.write(json.dumps(row) + '\n')
    return folder


def run_script(script, *flags):
    """A script's main body in this process, from the repository's root. Returns what it observed:
    peak GiB, recompilations, and implicit synchronisations by line of code."""
    torch.cuda.reset_peak_memory_stats()
    argv, sys.argv = sys.argv, [script, *flags]
    heard = Counter()
    os.chdir(ROOT)

    def listen(message, category, filename, lineno, file=None, line=None):
        if 'synchronizing' in str(message):
            heard[f'{os.path.basename(filename)}:{lineno}'] += 1

    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
            warnings.simplefilter('always')
            warnings.showwarning = listen
            begin = time.perf_counter()
            with contextlib.suppress(SystemExit):
                runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
            spent = time.perf_counter() - begin
    finally:
        sys.argv = argv
        torch.cuda.set_sync_debug_mode('default')
    counters = torch._dynamo.utils.counters
    return dict(
        seconds=round(spent, 1),
        peak_gib=gib(torch.cuda.max_memory_allocated()),
        recompiles=sum(counters['recompiles'].values()),
        graph_breaks=sum(counters['graph_break'].values()),
        graphs=counters['stats'].get('unique_graphs', 0),
        synchronisations=sum(heard.values()),
        where=dict(heard.most_common(3)),
        said=said.getvalue(),
    )


def small_hubert(folder, full=True):
    """A HuBERT of the base size (or two layers of it) with random weights, saved; its k-means."""
    from safetensors.torch import save_file
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(num_hidden_layers=11 if full else 2, mask_time_prob=0.0)
    HubertModel(config).eval().save_pretrained(os.path.join(folder, 'hubert'))
    centroids = torch.randn(500, 768)
    path = os.path.join(folder, 'kmeans.safetensors')
    save_file(dict(centroids=centroids), path)
    return os.path.join(folder, 'hubert'), path, config.num_hidden_layers


def random_hifigan(folder):
    """The public unit vocoder's layout with random weights: its .pt and .json."""
    from torch import nn

    c = dict(num_embeddings=500, embedding_dim=128, model_in_dim=128, sampling_rate=16000)
    c |= dict(upsample_rates=[5, 4, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 8, 4])
    c |= dict(upsample_initial_channel=512, resblock_kernel_sizes=[3, 7, 11])
    c |= dict(resblock_dilation_sizes=[[1, 3, 5]] * 3, multispkr=None)
    c |= dict(
        dur_predictor_params=dict(
            encoder_embed_dim=128,
            var_pred_hidden_dim=128,
            var_pred_kernel_size=3,
            var_pred_dropout=0.5,
        )
    )
    torch.manual_seed(0)
    state = {'dict.weight': torch.randn(500, 128)}

    def convolution(name, layer, norm=True):
        weight = layer.weight.detach()
        state[name + '.bias'] = layer.bias.detach()
        if norm:
            state[name + '.weight_g'] = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
            state[name + '.weight_v'] = weight
        else:
            state[name + '.weight'] = weight

    width = c['upsample_initial_channel']
    convolution('conv_pre', nn.Conv1d(128, width, 7))
    block = 0
    shapes = zip(c['upsample_rates'], c['upsample_kernel_sizes'], strict=True)
    for i, (_, kernel) in enumerate(shapes):
        convolution(f'ups.{i}', nn.ConvTranspose1d(width, width // 2, kernel))
        width //= 2
        for size in c['resblock_kernel_sizes']:
            for j in range(3):
                convolution(f'resblocks.{block}.convs1.{j}', nn.Conv1d(width, width, size))
                convolution(f'resblocks.{block}.convs2.{j}', nn.Conv1d(width, width, size))
            block += 1
    convolution('conv_post', nn.Conv1d(width, 1, 7))
    for i in (1, 2):
        convolution(f'dur_predictor.conv{i}.0', nn.Conv1d(128, 128, 3), norm=False)
        state[f'dur_predictor.ln{i}.weight'] = torch.ones(128)
        state[f'dur_predictor.ln{i}.bias'] = torch.zeros(128)
    state['dur_predictor.proj.weight'] = torch.randn(1, 128) * 0.1
    state['dur_predictor.proj.bias'] = torch.ones(1)
    path = os.path.join(folder, 'generator.pt')
    torch.save(dict(generator=state), path)
    with open(os.path.join(folder, 'generator.json'), 'w') as file:
        json.dump(c, file)
    return path


# -----------------------------------------------------------------------------
# Correctness


def hardware():
    """What machine this is: versions, a large bf16 product, a copy."""
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12
    source = torch.empty(2**30, dtype=torch.uint8, device='cuda').random_()
    target = torch.empty_like(source)
    copy = 2 * 2**30 / seconds_of(lambda: target.copy_(source)) / 1e9
    properties = torch.cuda.get_device_properties(0)
    return dict(
        gpu=properties.name.replace(' ', '_'),
        sm=f'{properties.major}{properties.minor}',
        gib=gib(properties.total_memory),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        product_tflops=round(product),
        copy_gb_s=round(copy),
    )


def packed_rows():
    """Documents of awkward lengths, then a preference pair with two branches, in rows of 2,048:
    tokens, targets, doc, positions, branch, each (2, 2048)."""
    rng = np.random.default_rng(0)
    names = ('tokens', 'targets', 'doc', 'positions', 'branch')
    rows = {name: np.zeros((2, 2048), np.int64) for name in names}
    rows['targets'][:] = -100
    for row in range(2):
        at = 0
        for number, length in enumerate((1, 127, 128, 129, 1024), 1):
            span = slice(at, at + length)
            rows['tokens'][row, span] = rng.integers(2, 502, length)
            rows['targets'][row, at : at + length - 1] = rows['tokens'][row, at + 1 : at + length]
            rows['doc'][row, span] = number
            rows['positions'][row, span] = np.arange(length)
            at += length
        # a pair: prompt 100, chosen 200, rejected 150; both completions go on from the prompt
        for branch, (start, length) in enumerate(((0, 100), (100, 200), (100, 150))):
            span = slice(at, at + length)
            rows['tokens'][row, span] = rng.integers(2, 502, length)
            rows['targets'][row, at : at + length - 1] = rows['tokens'][row, at + 1 : at + length]
            rows['doc'][row, span] = 6
            rows['positions'][row, span] = np.arange(start, start + length)
            rows['branch'][row, span] = branch
            at += length
        rows['doc'][row, at:] = 7
        rows['positions'][row, at:] = np.arange(2048 - at)
    return {name: torch.from_numpy(value) for name, value in rows.items()}


def dense_reference(model, rows):
    """Loss and gradients in fp64 on the CPU by transformers, with the mask written out."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation='eager'
        )
        doc, branch = rows['doc'], rows['branch']
        index = torch.arange(doc.shape[1])
        same = doc[:, :, None] == doc[:, None, :]
        before = index[None, :] <= index[:, None]
        open_to = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        hidden = ~(same & before & open_to)[:, None]
        mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -1e30)
        logits = theirs(rows['tokens'], attention_mask=mask, position_ids=rows['positions']).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows['targets'].flatten(), ignore_index=-100
        )
        loss.backward()
        theirs.save_pretrained(os.path.join(folder, 'gradients'))
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(p.grad)
        theirs.float().save_pretrained(os.path.join(folder, 'gradients'))
        from model import SLM

        # our names for their gradients: a checkpoint whose weights are gradients
        with open(os.path.join(folder, 'gradients', 'slam.json'), 'w') as file:
            json.dump({}, file)
        gradients = dict(SLM.from_pretrained(os.path.join(folder, 'gradients')).named_parameters())
    return float(loss), gradients


def attention():
    """Packed attention with documents and branches: loss and every gradient against fp64."""
    import model as house
    from model import SLM, SLMConfig

    rows = packed_rows()
    slm = SLM(SLMConfig(n_layer=2, context=2048, **QWEN))
    with torch.no_grad():  # weights large enough that attention is no mean
        for p in slm.parameters():
            p.mul_(2.0 if p.ndim == 2 else 1.0)
    expected, gradients = dense_reference(slm, rows)
    slm.cuda()
    rows = {name: value.cuda() for name, value in rows.items()}
    result = {}
    kinds = [('fp32', torch.float32, 1e-5, 1e-4), ('bf16', torch.bfloat16, 2e-3, 2e-2)]
    for name, dtype, loss_limit, gradient_limit in kinds:
        torch.set_float32_matmul_precision('highest')
        slm.zero_grad()
        compiled = torch.compile(slm, dynamic=False)
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            loss = compiled(
                rows['tokens'],
                rows['targets'],
                doc=rows['doc'],
                positions=rows['positions'],
                branch=rows['branch'],
            )
        loss.backward()
        worst = max(relative(p.grad, gradients[key]) for key, p in slm.named_parameters())
        result[f'{name}_loss'] = f'{abs(float(loss) - expected) / expected:.1e}'
        result[f'{name}_gradients'] = f'{worst:.1e}'
        check(abs(float(loss) - expected) <= loss_limit * expected, f'{name} loss: {result}')
        check(worst <= gradient_limit, f'{name} gradients: {result}')
    result['kernel'] = house.ATTENTION
    return result


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
    keep = (rows['doc'] >= 2) & (rows['doc'] <= 5)
    first = rows['positions'] == 0
    mask = (keep & ~first).long()
    segments = (rows['doc'] - 2 + 4 * torch.arange(2)[:, None]).clamp(0, 7)
    result = {}
    for name, dtype, limit in (('fp32', torch.float32, 1e-5), ('bf16', torch.bfloat16, 3e-3)):
        model = SLM(slm.config)
        model.load_state_dict(slm.state_dict())
        model = model.to('cuda', dtype).eval()
        inputs = (x.cuda() for x in (rows['tokens'], mask, rows['doc']))
        with torch.no_grad():
            found = model.logps(*inputs, segments=segments.cuda(), n=8).cpu()
        worst = float(((found - torch.tensor(expected)) / torch.tensor(expected)).abs().max())
        result[name] = f'{worst:.1e}'
        check(worst <= limit, f'{name}: {result}')
    return result


def generate():
    """Greedy continuations: eager and compiled on the GPU in fp32 as on the CPU; bf16 runs."""
    from model import BOS, OFFSET, SLM, SLMConfig

    torch.set_float32_matmul_precision('highest')
    slm = SLM(SLMConfig(n_layer=2, context=1024, **QWEN)).eval()
    with torch.no_grad():
        for p in slm.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0)
    rng = np.random.default_rng(0)
    prompts = [
        torch.tensor([BOS, *rng.integers(OFFSET, 502, n).tolist()]) for n in (3, 40, 41, 100)
    ]
    options = dict(max_new_tokens=24, temperature=0, repetition_penalty=1.0)
    expected = slm.generate(prompts, **options)
    slm.cuda()
    result = {}
    for name, compiled in (('eager', False), ('compiled', True)):
        found = slm.generate(prompts, compile=compiled, **options)
        same = sum(
            int((a == b).all()) for a, b in zip(found, expected, strict=True) if len(a) == len(b)
        )
        result[name] = f'{same}/{len(prompts)}'
        check(same == len(prompts), f'{name}: {same} of {len(prompts)} as on the CPU')
    slm.bfloat16()
    for batch in (1, 3, 16):
        for compiled in (False, True):
            made = slm.generate(prompts[:1] * batch, max_new_tokens=20, seed=1, compile=compiled)
            check(len(made) == batch, f'{len(made)} of {batch} continuations')
    result['bf16'] = '1,3,16'
    return result


def encoder():
    """HuBERT units: the GPU against the CPU, alone against in a batch, fp32, TF32 and bf16."""
    from model import UnitEncoder

    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (16000, 48000, 79999, 160001)]
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        hubert, kmeans, layers = small_hubert(folder, full=False)
        load = lambda device, dtype: UnitEncoder.from_pretrained(  # noqa: E731
            hubert, layer=layers, kmeans=kmeans, device=device, dtype=dtype
        )
        expected = load('cpu', 'float32').encode(waves)
        total = sum(map(len, expected))

        def share(units):
            return sum(int((a == b).sum()) for a, b in zip(units, expected, strict=True)) / total

        for name, dtype in (('tf32', 'auto'), ('bf16', 'bfloat16')):
            enc = load('cuda', dtype)
            together = enc.encode(waves)
            alone = [enc.encode([wave])[0] for wave in waves]
            result[name] = round(share(together), 4)
            equal = sum(int((a == b).sum()) for a, b in zip(together, alone, strict=True)) / total
            result[f'{name}_alone'] = round(equal, 4)
        check(result['tf32'] > 0.98, f'units as on the CPU: {result}')
        check(result['tf32_alone'] > 0.995, f'alone as in a batch: {result}')
    return result


def vocoders():
    """The table and the unit HiFi-GAN: the GPU's wave against the CPU's, alone against batch."""
    from model import N_MELS, UnitVocoder

    units = [
        torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 60)
    ]
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        path = random_hifigan(folder)
        generator = torch.Generator().manual_seed(0)
        table = dict(kind='table', n_units=100, frame_rate=25.0, sample_rate=16000)
        tensors = dict(
            mel=torch.randn(100, 4, N_MELS, generator=generator) - 4,
            durations=torch.full((100,), 2.0),
        )
        made = {
            'table': lambda device: UnitVocoder(table, tensors, device),
            'hifigan': lambda device: UnitVocoder.from_pretrained(path, device),
        }
        for name, load in made.items():
            expected, voc = load('cpu').decode(units), load('cuda')
            found = voc.decode(units)
            alone = [voc.decode([one])[0] for one in units]
            worst = max(relative(a, b) for a, b in zip(found, expected, strict=True))
            mixed = max(relative(a, b) for a, b in zip(found, alone, strict=True))
            result[name], result[f'{name}_alone'] = f'{worst:.1e}', f'{mixed:.1e}'
            check(worst < 2e-2 and mixed < 1e-3, f'{name}: {result}')
    return result


def skipped_step():
    """Where found_inf is 1, fused AdamW leaves parameters and states as they are, bit for bit."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, fused=True)

    def step(bad):
        for p in layer.parameters():
            p.grad = torch.full_like(p, math.nan if bad else 1.0)
        optimizer.found_inf = torch.full((), float(bad), device='cuda')
        optimizer.grad_scale = None
        optimizer.step()

    step(bad=False)
    before = [p.detach().clone() for p in layer.parameters()]
    states = [v.clone() for s in optimizer.state.values() for v in s.values()]
    step(bad=True)
    same = all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
    now = [v for s in optimizer.state.values() for v in s.values()]
    same_states = all(torch.equal(a, b) for a, b in zip(now, states, strict=True))
    check(same and same_states, f'parameters {same}, states {same_states}')
    return dict(unchanged=same and same_states)


TINY = (
    '--init=scratch --n_layer=2 --n_embd=64 --n_head=2 --n_kv_head=1 --n_ffn=128 --context=128 '
    '--row_tokens=512 --batch_tokens=1024 --eval_interval=0 --save_interval=0 --train_hours=1 '
    '--log_interval=1 --val_data= --warmup_steps=2'
).split()


def resume():
    """train.py: 20 steps are 10, SIGTERM, and the rest, with the same weights at the end."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 60_000)

        def run(name, stop_at=None):
            out = os.path.join(folder, name)
            command = [*launcher(), os.path.join(ROOT, 'train.py'), *TINY, f'--data={data}']
            command += [f'--out_dir={out}', '--max_steps=20', '--device=cuda']
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            said = []
            for line in process.stdout:
                said.append(line)
                if stop_at and line.startswith(f'step {stop_at}'):
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
            return out, process.wait(), ''.join(said[-3:])

        whole, code, said = run('whole')
        assert code == 0, said
        _, stopped, said = run('parts', stop_at=10)
        assert stopped in (0, 128 + signal.SIGTERM), said
        parts, code, said = run('parts')
        assert code == 0, said
        a, b = (load_file(os.path.join(out, 'model.safetensors')) for out in (whole, parts))
        worst = max(relative(a[name], b[name]) for name in a)
        check(worst < 1e-6 or stopped == 0, f'weights differ by {worst:.1e}')
    return dict(stopped=stopped, weights_differ=f'{worst:.1e}')


def vits():
    """A small random VITS in fp32: as many samples on the GPU as on the CPU."""
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128,
        flow_size=64, spectrogram_bins=33, upsample_initial_channel=64,
    )  # fmt: skip
    speaker = VitsModel(config).eval()
    speaker.noise_scale = speaker.noise_scale_duration = 0.0
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = speaker(input_ids=tokens).waveform
        found = speaker.cuda()(input_ids=tokens.cuda()).waveform
    check(
        found.shape == expected.shape, f'{found.shape[1]} samples, on the CPU {expected.shape[1]}'
    )
    return dict(samples=found.shape[1], differ=f'{relative(found, expected):.1e}')


# -----------------------------------------------------------------------------
# Speed


def attention_kernels():
    """64 x 14/2 x 1,024 x 64 in bf16: flex with its own and with our options, and varlen."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import model as house

    heads, kv_heads, T, D = 14, 2, 64 * 1024, 64
    lengths = random_lengths(2 * T // 620, seed=1)
    doc = np.repeat(np.arange(len(lengths)), lengths)[:T]
    doc = torch.from_numpy(doc).cuda()[None]
    q = torch.randn(1, heads, T, D, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, kv_heads, T, D, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )

    def visible(b, h, i, j):
        return (doc[b, i] == doc[b, j]) & (j <= i)

    mask = torch.compile(create_block_mask)(visible, 1, None, T, T, device='cuda')
    flex = torch.compile(flex_attention, dynamic=False)
    options = house.FLEX_OPTIONS.get(torch.cuda.get_device_capability()[0])
    varlen = house.attend_varlen(doc, 1024)
    common = dict(block_mask=mask, enable_gqa=True)
    ways = {
        'flex_default': lambda: flex(q, k, v, **common),
        'flex_ours': lambda: flex(q, k, v, kernel_options=options, **common),
        'varlen': lambda: varlen(q, k, v),
    }
    result = {}
    for name, forward in ways.items():
        with torch.no_grad():
            ahead = seconds_of(forward, repeats=5)
        gradient = torch.randn_like(forward())

        def both(forward=forward, gradient=gradient):
            forward().backward(gradient)

        whole = seconds_of(both, repeats=5)
        result[f'{name}_forward_ms'] = round(1000 * ahead, 2)
        result[f'{name}_backward_ms'] = round(1000 * max(0, whole - ahead), 2)
    return result


def products():
    """The matrix products of a layer and the head's, 502 columns against 512; TFLOP/s."""
    T, result = 65_536, {}
    shapes = dict(qkv=(896, 1152), out=(896, 896), up=(896, 9728), down=(4864, 896))
    shapes |= dict(head502=(896, 502), head512=(896, 512))
    for name, (inner, outer) in shapes.items():
        x = torch.randn(T, inner, device='cuda', dtype=torch.bfloat16)
        w = torch.randn(outer, inner, device='cuda', dtype=torch.bfloat16)
        spent = seconds_of(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        result[name] = round(2 * T * inner * outer / spent / 1e12)
    return result


def read_log(out):
    with open(os.path.join(out, 'log.jsonl')) as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row.get('tokens_per_s')]


def train_run(config, steps, *flags):
    """train.py on random data with a config, no validation: figures of its later steps."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 6_000_000)
        out = os.path.join(folder, 'run')
        seen = run_script(
            'train.py', config, f'--data={data}', f'--out_dir={out}', '--val_data=',
            f'--max_steps={steps}', '--eval_interval=0', '--save_interval=0', '--log_interval=5',
            '--init=preset:qwen2.5-0.5b', '--device=cuda', *flags,
        )  # fmt: skip
        rows = read_log(out)
    speed = float(np.median([row['tokens_per_s'] for row in rows[len(rows) // 2 :]]))
    return seen, speed


def training():
    """slam_h200: tokens/s, MFU, peak memory, compile time, synchronisations, recompilations."""
    from model import SLM

    seen, speed = train_run('config/slam_h200.py', 30)
    with torch.device('meta'):
        flops = SLM.from_preset('qwen2.5-0.5b', context=1024).flops_per_token(620)
    return dict(
        tokens_s=round(speed),
        hours_of_slam=round(TOKENS / speed / 3600, 2),
        mfu_reachable=round(speed * flops / REACHABLE, 3),
        mfu_datasheet=round(speed * flops / DATASHEET, 3),
        peak_gib=seen['peak_gib'],
        start_s=round(seen['seconds'] - 30 * 81_920 / speed, 1),
        recompiles=seen['recompiles'],
        graph_breaks=seen['graph_breaks'],
        synchronisations=seen['synchronisations'],
        where=seen['where'],
    )


def training_memory():
    """slam_a5000's shape: does its step fit 24 GB? Peak GiB, limit 20."""
    seen, speed = train_run('config/slam_a5000.py', 10)
    check(seen['peak_gib'] < 20, f'peak {seen["peak_gib"]} GiB')
    return dict(peak_gib=seen['peak_gib'], tokens_s=round(speed), recompiles=seen['recompiles'])


def profile():
    """The kernels that take the GPU longest in three training steps of the 358 M shape."""
    from model import SLM

    slm = SLM.from_preset('qwen2.5-0.5b', context=1024).cuda()
    optimizer = torch.optim.AdamW(slm.parameters(), 1e-4, fused=True)
    slm.compile(dynamic=False)
    T = 16_384
    lengths = random_lengths(2 * T // 620)
    doc = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[:T]).cuda()[None]
    tokens = torch.randint(2, 502, (1, T), device='cuda')

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            loss = slm(tokens, tokens, doc=doc)
        loss.backward()
        optimizer.step()
        slm.zero_grad()

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    total = max(1, sum(row.self_device_time_total for row in rows))
    top = {row.key[:60]: f'{row.self_device_time_total / total:.1%}' for row in rows[:15]}
    return dict(step_ms=round(total / 3000, 1), top=top)


def dpo():
    """dpo.py with the 358 M model, compiled: pairs/s of a step and of the reference's pass."""
    from model import SLM

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(os.path.join(folder, 'data'), 10_000, pairs=3000)
        start = os.path.join(folder, 'slm')
        model = SLM.from_preset('qwen2.5-0.5b', context=1024)
        model.save_pretrained(start, dict(n_units=500, dedup=True, frame_rate=25.0))
        out = os.path.join(folder, 'dpo')
        seen = run_script(
            'dpo.py', f'--init={start}', f'--data={data}/pairs.jsonl', f'--out_dir={out}',
            '--max_steps=30', '--eval_interval=0', '--save_interval=0', '--log_interval=5',
            '--device=cuda',
        )  # fmt: skip
        with open(os.path.join(out, 'log.jsonl')) as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if row.get('pairs_per_s')]
    speed = float(np.median([row['pairs_per_s'] for row in rows[len(rows) // 2 :]]))
    reference = next((line for line in seen['said'].splitlines() if 'reference' in line), '')
    return dict(
        pairs_s=round(speed, 1),
        minutes_of_slam=round(DPO_STEPS * 64 / speed / 60, 2),
        peak_gib=seen['peak_gib'],
        recompiles=seen['recompiles'],
        synchronisations=seen['synchronisations'],
        reference=reference.replace(' ', '_')[:100],
    )


def generation():
    """1, 16 and 64 continuations of 150 tokens, prompts of new lengths each time."""
    from model import BOS, OFFSET, SLM

    slm = SLM.from_preset('qwen2.5-0.5b', context=1024).to('cuda', torch.bfloat16).eval()
    rng = np.random.default_rng(0)
    result = {}

    def prompts(n):
        sizes = rng.integers(40, 80, n)
        return [torch.tensor([BOS, *rng.integers(OFFSET, 502, size).tolist()]) for size in sizes]

    for batch in (1, 16, 64):
        for name, compiled in (('eager', False), ('compiled', True)):
            slm.generate(prompts(batch), max_new_tokens=8, seed=0, compile=compiled)
            made, spent = clocked(
                lambda batch=batch, compiled=compiled: slm.generate(
                    prompts(batch), max_new_tokens=150, seed=0, compile=compiled
                )
            )
            result[f'{name}_{batch}'] = round(sum(map(len, made)) / spent)
    _, spent = clocked(lambda: next(slm.generate_steps(prompts(1), max_new_tokens=2, seed=0)))
    result['first_token_ms'] = round(1000 * spent, 1)
    return result


def transformers_generation():
    """The same 32 continuations by us and by transformers.generate; the ratio."""
    from transformers import AutoModelForCausalLM

    from model import SLM

    slm = SLM.from_preset('qwen2.5-0.5b', context=1024).to('cuda', torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as folder:
        slm.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    prompts = torch.randint(2, 502, (32, 60))
    options = dict(max_new_tokens=150, repetition_penalty=1.1)

    def ours():
        return slm.generate(list(prompts), seed=0, compile=True, **options)

    def plain():
        return theirs.generate(
            prompts.cuda(), do_sample=True, top_k=25, temperature=0.8, min_new_tokens=150,
            pad_token_id=0, **options,
        )  # fmt: skip

    ours()
    plain()
    made, spent = clocked(ours)
    _, their_time = clocked(plain)
    ours_speed, their_speed = sum(map(len, made)) / spent, 32 * 150 / their_time
    return dict(
        ours=round(ours_speed),
        transformers=round(their_speed),
        ratio=round(ours_speed / their_speed, 1),
    )


def units():
    """prepare_units.py on 200 flac files with a HuBERT of the base size: hours a second."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        hubert, kmeans, layers = small_hubert(folder)
        rng = np.random.default_rng(int(time.time()))  # new lengths each run
        total = 0.0
        os.makedirs(os.path.join(folder, 'audio'))
        for i in range(200):
            seconds = float(rng.uniform(3, 35))
            wave = 0.05 * rng.standard_normal(int(16000 * seconds))
            soundfile.write(os.path.join(folder, 'audio', f'{i:03d}.flac'), wave, 16000)
            total += seconds
        seen = run_script(
            'prepare_units.py', f'--audio={folder}/audio', f'--out={folder}/units',
            f'--encoder={hubert}', f'--layer={layers}', f'--kmeans={kmeans}', '--device=cuda',
        )  # fmt: skip
        with open(os.path.join(folder, 'units', 'meta.json')) as file:
            meta = json.load(file)
    speed = total / seen['seconds']
    return dict(
        x_real_time=round(speed),
        x_real_time_said=meta.get('x_real_time'),
        librispeech_h=round(LIBRISPEECH / speed, 2),
        librilight_h=round(LIBRILIGHT / speed, 1),
        recompiles=seen['recompiles'],
        synchronisations=seen['synchronisations'],
    )


def encoder_speed():
    """The encoder alone, three new draws of lengths: times real time."""
    from model import UnitEncoder

    with tempfile.TemporaryDirectory() as folder:
        hubert, kmeans, layers = small_hubert(folder)
        enc = UnitEncoder.from_pretrained(hubert, layer=layers, kmeans=kmeans, device='cuda')
        rng = np.random.default_rng(int(time.time()))
        speeds = []
        for draw in range(4):
            seconds = rng.uniform(3, 35, 200)
            waves = [torch.randn(int(16000 * s)) * 0.05 for s in seconds]
            _, spent = clocked(lambda waves=waves: enc.encode(waves))
            if draw:  # the first warms up
                speeds.append(seconds.sum() / spent)
    return dict(x_real_time='/'.join(f'{speed:.0f}' for speed in speeds))


def hifigan():
    """The unit HiFi-GAN of the public size: times real time, alone and 16 together."""
    from model import UnitVocoder

    with tempfile.TemporaryDirectory() as folder:
        voc = UnitVocoder.from_pretrained(random_hifigan(folder), 'cuda')
    result = {}
    for batch in (1, 16):
        units = [torch.randint(0, 500, (200,)) for _ in range(batch)]
        durations = [torch.full((200,), 2) for _ in range(batch)]
        voc.decode(units, durations)
        waves, spent = clocked(lambda u=units, d=durations: voc.decode(u, d))
        result[f'x_real_time_{batch}'] = round(sum(map(len, waves)) / 16000 / spent)
    return result


def scoring():
    """eval_slm.py's log-likelihoods, 2,000 pairs of about 60 units, 358 M in bf16: pairs/s."""
    import eval_slm
    from model import SLM

    slm = SLM.from_preset('qwen2.5-0.5b', context=1024).to('cuda', torch.bfloat16).eval()
    rng = np.random.default_rng(int(time.time()))

    def draw(n):
        return [rng.integers(0, 500, size) for size in rng.integers(30, 90, 2 * n)]

    eval_slm.log_likelihoods(slm, draw(2000))
    _, spent = clocked(lambda: eval_slm.log_likelihoods(slm, draw(2000)))
    return dict(pairs_s=round(2000 / spent))


def checkpoint():
    """Seconds to write and to read a checkpoint of the 358 M model."""
    from model import SLM

    slm = SLM.from_preset('qwen2.5-0.5b', context=1024).cuda()
    with tempfile.TemporaryDirectory() as folder:
        _, written = clocked(lambda: slm.save_pretrained(folder, dict(n_units=500)))
        _, read = clocked(lambda: SLM.from_pretrained(folder).cuda())
    return dict(write_s=round(written, 2), read_s=round(read, 2))


# Steps in order: (function, seconds it may take). What proves comes first, then what measures.
PROOFS = [
    (hardware, 40),
    (skipped_step, 30),
    (attention, 120),
    (log_likelihoods, 60),
    (generate, 120),
    (encoder, 90),
    (vocoders, 60),
    (vits, 40),
    (resume, 120),
]
MEASUREMENTS = [
    (training, 150),
    (attention_kernels, 90),
    (products, 30),
    (training_memory, 100),
    (profile, 90),
    (dpo, 120),
    (generation, 120),
    (transformers_generation, 90),
    (encoder_speed, 60),
    (units, 90),
    (hifigan, 40),
    (scoring, 60),
    (checkpoint, 40),
]
STEPS = PROOFS + MEASUREMENTS


def launcher():
    """How a Python program is run: another interpreter or a wrapper may be named."""
    return shlex.split(os.environ.get('GPU_CHECK_LAUNCHER') or '') or [sys.executable]


def run_step(name, limit):
    """A step in a process of its own -> (status, figures or the reason)."""
    command = [*launcher(), os.path.abspath(__file__), '--one', name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return 'FAIL', dict(error=f'no end within {limit:.0f} s')
    lines = [line for line in done.stdout.splitlines() if line.startswith('FIGURES ')]
    if lines:
        figures = json.loads(lines[-1].removeprefix('FIGURES '))
        return 'FAIL' if 'wrong' in figures else 'PASS', figures
    error = [line for line in done.stderr.strip().splitlines() if line.strip()]
    last = [line for line in error if 'Error' in line or 'error' in line] or error or ['no output']
    return 'FAIL', dict(error=last[-1][:300], code=done.returncode)


def run_one(name):
    """In the step's own process: its figures as a line of JSON."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    function = {function.__name__: function for function, _ in STEPS}[name]
    try:
        figures = function()
    except Wrong as error:
        figures = dict(wrong=' '.join(str(error).split())[:300])
    print('FIGURES ' + json.dumps(figures), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('steps', nargs='*')
    parser.add_argument('--out', default=os.path.join(ROOT, 'out', 'gpu_check.json'))
    parser.add_argument('--launcher', default='')
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--one', action='store_true', help='run a step in this process')
    arguments = parser.parse_args()
    if arguments.one:
        return run_one(arguments.steps[0])
    if arguments.launcher:
        os.environ['GPU_CHECK_LAUNCHER'] = arguments.launcher
    elif not torch.cuda.is_available():
        sys.exit('gpu_check.py: no CUDA device here')
    names = [function.__name__ for function, _ in STEPS]
    unknown = set(arguments.steps) - set(names)
    if unknown:
        sys.exit(f'gpu_check.py: no step {", ".join(unknown)}; there are {", ".join(names)}')

    begin, figures, count = time.monotonic(), {}, Counter()
    watchdog = math.inf if arguments.dry else WATCHDOG
    missing = [name for name in names if not arguments.steps or name in arguments.steps]
    for function, limit in STEPS:
        name = function.__name__
        left = watchdog - (time.monotonic() - begin)
        if name not in missing or left < 5:
            continue
        started = time.monotonic()
        # a stand-in for a card compiles as the card does, on a smaller machine
        limit = limit * 20 if arguments.dry else min(limit, left)
        status, found = run_step(name, limit)
        if status == 'FAIL' and arguments.dry and (function, limit // 20) in PROOFS:
            status = 'dry'
        missing.remove(name)
        seconds = round(time.monotonic() - started, 1)
        figures[name] = dict(found, status=status, seconds=seconds)
        count[status] += 1
        line = ' '.join(f'{key}={json.dumps(value)}' for key, value in found.items())
        print(f'{status} {name} {line} ({seconds} s)', flush=True)
        os.makedirs(os.path.dirname(os.path.abspath(arguments.out)), exist_ok=True)
        with open(arguments.out, 'w') as file:
            json.dump(figures, file, indent=2)
    if missing:
        print(f'no time for: {", ".join(missing)}')
    seconds = round(time.monotonic() - begin)
    failed = count['FAIL'] + len(missing)
    print(f'GPU_CHECK pass={count["PASS"]} fail={failed} seconds={seconds}', flush=True)
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
