"""How fast prepare_units.py makes units, and in how much memory. By hand:

    python tests/bench_units.py mfcc [files, 300] [folder of another version, to compare with]
    python tests/bench_units.py net [utterances, 40]
    python tests/bench_units.py memory

mfcc: the whole script, twice, in turn with the other version. net: an encoder of HuBERT-base size
(random weights, layer 9) on 3 to 20 s, against the plain loop. memory: of the largest process.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import UnitEncoder, pick_device, save_audio  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
FIT = ('--encoder=mfcc', '--fit_kmeans=100', '--fit_frames=20000')


def noise(seconds):
    """(samples,) whose loudness changes every 100 ms."""
    wave = torch.randn(int(seconds * 16000), generator=GENERATOR)
    loudness = torch.rand(len(wave) // 1600 + 1, generator=GENERATOR).repeat_interleave(1600)
    return 0.1 * wave * loudness[: len(wave)]


def run_script(folder, audio, out, *flags):
    """-> seconds, seconds of CPU, and the peak of the largest process so far in MB."""
    command = [sys.executable, 'prepare_units.py', f'--audio={audio}', f'--out={out}', *flags]
    start, before = time.time(), sum(os.times()[2:4])
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.time() - start, sum(os.times()[2:4]) - before, peak


def bench_mfcc(count='300', other=''):
    with tempfile.TemporaryDirectory() as place:
        wave = noise(30)
        for i in range(int(count)):
            save_audio(f'{place}/in/{i:05d}.flac', wave[i * 160 % 160_000 :][: 20 * 16000])
        for turn in range(2):
            for folder in filter(None, (ROOT, other)):
                out = f'{place}/{turn}{folder == other}'
                seconds, cpu, _ = run_script(folder, f'{place}/in', out, *FIT)
                print(f'{folder}: {seconds:.1f} s, {cpu:.1f} s of CPU, {int(count)} files of 20 s')


def plain_loop(net, waves, centroids, device):
    """The usual extraction: padded batches of 8, all hidden states."""
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    for batch in (order[i : i + 8] for i in range(0, len(order), 8)):
        x = torch.nn.utils.rnn.pad_sequence([waves[i] for i in batch], batch_first=True)
        mask = torch.stack([torch.arange(x.shape[1]) < len(waves[i]) for i in batch]).long()
        with torch.no_grad():
            result = net(x.to(device), attention_mask=mask.to(device), output_hidden_states=True)
        torch.cdist(result.hidden_states[9].float(), centroids).argmin(-1).cpu()


def bench_net(count='40'):
    from transformers import HubertConfig, HubertModel

    device = pick_device()
    lengths = 3 + 17 * torch.rand(int(count), generator=GENERATOR)
    waves = [noise(seconds) for seconds in lengths.tolist()]
    torch.manual_seed(0)
    net = HubertModel(HubertConfig(mask_time_prob=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        encoder = UnitEncoder.from_pretrained(folder, layer=9, kmeans='', device=device)
    frames = torch.cat([encoder.features(wave) for wave in waves[:4]])
    encoder.centroids, net = frames[:500], net.to(device)
    for name in ('plain', 'ours') * 2:
        start = time.time()
        if name == 'plain':
            plain_loop(net, waves, frames[:500], device)
        else:
            [encoder.encode(wave) for wave in waves]
        seconds = time.time() - start
        print(f'{device}, {name}: {seconds:.1f} s, {sum(lengths) / seconds:.1f} x real time')


def bench_memory():
    with tempfile.TemporaryDirectory() as place:
        save_audio(f'{place}/wave.wav', noise(1))
        for count in (1000, 10_000):  # the peak never falls, so the larger comes last
            os.mkdir(f'{place}/{count}')
            for i in range(count):
                os.link(f'{place}/wave.wav', f'{place}/{count}/{i:05d}.wav')
            *_, peak = run_script(ROOT, f'{place}/{count}', f'{place}/out{count}', *FIT)
            print(f'{count:,} files: {peak:.0f} MB')


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    dict(net=bench_net, mfcc=bench_mfcc, memory=bench_memory)[sys.argv[1]](*sys.argv[2:])
