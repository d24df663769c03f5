"""How fast prepare_units makes units, and in how much memory. By hand:

    python tests/bench_units.py net [utterances, 40] [seconds of the longest, 20]
    python tests/bench_units.py mfcc [files, 1000]
    python tests/bench_units.py memory
    python tests/bench_units.py chapter [hours, 3]

net: an encoder of HuBERT-base size (random weights, layer 9, 500 clusters) on utterances of 3 to 20
s; ours against the plain loop (transformers' HubertModel, length-sorted padded batches of 8, all
hidden states, k-means as scikit-learn predicts). mfcc: the whole script on files of 20 s, against
encoding them one by one in one process. memory: peak of the largest process, 1,000 and 10,000
files. chapter: the same of one utterance of three hours.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import soundfile
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import UnitEncoder, load_audio, pick_device, save_audio  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)


def noise(seconds):
    """Something that changes every 100 ms."""
    wave = torch.randn(int(seconds * 16000), generator=GENERATOR)
    loudness = torch.rand(len(wave) // 1600 + 1, generator=GENERATOR).repeat_interleave(1600)
    return 0.1 * wave * loudness[: len(wave)]


def timed(run):
    if torch.cuda.is_available():
        run()  # compiles
        torch.cuda.synchronize()
    start, cpu = time.time(), time.process_time()
    result = run()
    return result, time.time() - start, time.process_time() - cpu


def plain_loop(net, waves, kmeans, device):
    """The public extractor's way: padding is computed, every layer is, clusters on the CPU."""
    units = [None] * len(waves)
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    for batch in (order[i : i + 8] for i in range(0, len(order), 8)):
        x = torch.nn.utils.rnn.pad_sequence([waves[i] for i in batch], batch_first=True)
        lengths = torch.tensor([len(waves[i]) for i in batch])
        mask = (torch.arange(x.shape[1]) < lengths[:, None]).long()
        with torch.no_grad():
            result = net(x.to(device), attention_mask=mask.to(device), output_hidden_states=True)
        hidden = result.hidden_states[9].float().cpu()
        for i, row in zip(batch, hidden, strict=True):
            frames = int(net._get_feat_extract_output_lengths(len(waves[i])))
            units[i] = torch.from_numpy(kmeans.predict(row[:frames].numpy())).long()
    return units


def bench_net(count=40, longest=20):
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        sys.exit('the plain loop predicts with scikit-learn: pip install scikit-learn')
    from transformers import HubertConfig, HubertModel

    device = pick_device()
    lengths = 3 + (longest - 3) * torch.rand(count, generator=GENERATOR)
    waves = [noise(seconds) for seconds in lengths.tolist()]
    total = sum(map(len, waves)) / 16000
    torch.manual_seed(0)
    net = HubertModel(HubertConfig(mask_time_prob=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        kinds = ['auto', 'float32', 'bfloat16'] if device.type == 'cuda' else ['float32']
        ours = {kind: load_net(folder, device, kind) for kind in kinds}
    frames = torch.cat(ours['float32'].features(waves[:4]))
    centroids = frames[torch.randperm(len(frames), generator=GENERATOR)[:500].to(device)]
    kmeans = KMeans(len(centroids), n_init=1, max_iter=1).fit(centroids.cpu().numpy())
    kmeans.cluster_centers_ = centroids.cpu().numpy().copy()

    print(f'{device}, {torch.get_num_threads()} threads; {count} utterances, {total:.0f} s')
    net = net.to(device)
    plain_loop(net, waves[:2], kmeans, device)  # libraries loaded, memory touched
    theirs, slow, slow_cpu = timed(lambda: plain_loop(net, waves, kmeans, device))
    print(
        f'{"plain loop":20}{slow:8.1f} s {total / slow:9.1f} x real time {slow_cpu:8.1f} s of CPU'
    )
    for kind, encoder in ours.items():
        encoder.centroids = centroids
        encoder.encode(waves[:2])
        units, took, cpu = timed(lambda encoder=encoder: encoder.encode(waves))
        print(f'{"ours, " + kind:20}{took:8.1f} s {total / took:9.1f} x real time', end=' ')
        print(f'{cpu:8.1f} s of CPU {slow / took:7.2f} x plain, of CPU {slow_cpu / cpu:.2f}')
        if kind == 'float32':
            wanted = units
        if kind in ('bfloat16', 'auto') and 'float32' in ours:
            wanted = ours['float32'].encode(waves)
        same = sum(int((a == b).sum()) for a, b in zip(units, wanted, strict=True))
        print(f'{"":20}{100 * same / sum(map(len, wanted)):8.2f} % of the units as in float32')


def load_net(folder, device, dtype):
    return UnitEncoder.from_pretrained(folder, layer=9, kmeans='', device=device, dtype=dtype)


def make_encoder(folder):
    """An MFCC encoder with 100 clusters of noise."""
    encoder = UnitEncoder.from_pretrained('mfcc')
    frames = torch.cat(encoder.features([noise(60)]))
    encoder.centroids = frames[torch.randperm(len(frames), generator=GENERATOR)[:100]]
    encoder.config['distortion'] = encoder.distance([frames])
    encoder.save_pretrained(f'{folder}/encoder')
    return encoder


def run_script(folder, out, *more):
    """-> seconds, and the peak of its largest process in MB."""
    command = [sys.executable, 'prepare_units.py', f'--audio={folder}/in', f'--out={folder}/{out}']
    command += [f'--encoder={folder}/encoder', *more]
    start = time.time()
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.time() - start, peak


def bench_mfcc(count=1000):
    with tempfile.TemporaryDirectory() as folder:
        encoder = make_encoder(folder)
        paths = [f'{folder}/in/{i:05d}.flac' for i in range(count)]
        wave = noise(30)
        for i, path in enumerate(paths):
            save_audio(path, wave[i * 160 % 160_000 :][: 20 * 16000])
        few = paths[: count // 10]
        start = time.time()
        for path in few:
            encoder.encode([load_audio(path)])
        plain = (time.time() - start) * len(paths) / len(few)
        seconds, _ = run_script(folder, 'out')
        with open(f'{folder}/out/meta.json', encoding='utf-8') as file:
            inside = json.load(file)['x_real_time']
        spoken = 20 * count
        print(f'one by one: {spoken / plain:.0f} x real time')
        print(f'ours: {inside} x real time encoding, {spoken / seconds:.0f} with start and packing')
        print(f'ratio {plain / seconds:.2f}')


def bench_memory():
    """ru_maxrss never falls, so the larger corpus comes last."""
    with tempfile.TemporaryDirectory() as folder:
        make_encoder(folder)
        save_audio(f'{folder}/wave.wav', noise(1))
        peaks = []
        for count in (1000, 10_000):
            os.makedirs(f'{folder}/in', exist_ok=True)
            for i in range(count):
                if not os.path.exists(f'{folder}/in/{i:05d}.wav'):
                    os.link(f'{folder}/wave.wav', f'{folder}/in/{i:05d}.wav')
            peaks.append(run_script(folder, f'out{count}')[1])
            print(f'{count:,} files: {peaks[-1]:.0f} MB')
        print(f'ratio {peaks[1] / peaks[0]:.3f}')


def bench_chapter(hours=3):
    with tempfile.TemporaryDirectory() as folder:
        make_encoder(folder)
        os.mkdir(f'{folder}/in')
        part = noise(600).numpy()
        # by pieces: what this process has in memory counts as its children's
        with soundfile.SoundFile(f'{folder}/in/chapter.flac', 'w', 16000, 1) as file:
            for _ in range(int(6 * hours)):
                file.write(part)
        seconds, peak = run_script(folder, 'out', '--val_fraction=0')
        print(f'{hours:g} h in one file, whole: {seconds:.1f} s, {peak:.0f} MB')
        print(f'its samples alone: {hours * 3600 * 64_000 / 2**20:.0f} MB')


if __name__ == '__main__':
    kinds = dict(net=bench_net, mfcc=bench_mfcc, memory=bench_memory, chapter=bench_chapter)
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    kinds[sys.argv[1]](*map(int, sys.argv[2:]))
