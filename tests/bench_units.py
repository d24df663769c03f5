"""How fast prepare_units makes units, by hand:   python tests/bench_units.py [seconds of the longest utterance, 20] [utterances, 40]

An encoder of HuBERT-base size (random weights, layer 9, 500 clusters) on utterances of 3 to 20 s: ours in fp32 and bf16 against the plain
loop (transformers HubertModel, length-sorted padded batches of 8, all hidden states, k-means as scikit-learn predicts), in the same run.
On CUDA also hours of speech per second and the time that LibriSpeech and Libri-Light would take one such GPU.
"""

import os
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import UnitEncoder, pick_device

longest, count = float((sys.argv[1:] or [20])[0]), int((sys.argv[2:] or [40])[0])
device = pick_device()


def timed(run):
    if device.type == 'cuda':
        run()  # compiles
        torch.cuda.synchronize()
    start = time.time()
    result = run()
    return result, time.time() - start


def plain(net, waves, centroids):
    """The public extractor's way: what is padded is computed, every layer is, and clusters are found on the CPU."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(len(centroids), n_init=1, max_iter=1).fit(centroids.numpy())
    kmeans.cluster_centers_ = centroids.numpy().copy()
    order, units = sorted(range(len(waves)), key=lambda i: len(waves[i])), [None] * len(waves)
    for batch in (order[i : i + 8] for i in range(0, len(order), 8)):
        x = torch.nn.utils.rnn.pad_sequence([waves[i] for i in batch], batch_first=True).to(device)
        mask = (
            torch.arange(x.shape[1], device=device)
            < torch.tensor([len(waves[i]) for i in batch], device=device)[:, None]
        )
        with torch.no_grad():
            hidden = (
                net(x, attention_mask=mask.long(), output_hidden_states=True)
                .hidden_states[9]
                .float()
                .cpu()
            )
        for i, row in zip(batch, hidden):
            units[i] = torch.from_numpy(
                kmeans.predict(
                    row[: int(net._get_feat_extract_output_lengths(len(waves[i])))].numpy()
                )
            ).long()
    return units


def agreement(a, b):
    return sum(int((x == y).sum()) for x, y in zip(a, b)) / sum(map(len, b))


if __name__ == '__main__':
    from transformers import HubertConfig, HubertModel

    generator = torch.Generator().manual_seed(0)
    seconds = 3 + (longest - 3) * torch.rand(count, generator=generator)
    waves = [0.1 * torch.randn(int(s * 16000), generator=generator) for s in seconds]
    total = float(seconds.sum())
    torch.manual_seed(0)
    net = HubertModel(HubertConfig(mask_time_prob=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        ours = UnitEncoder.from_pretrained(
            folder, layer=9, kmeans='', device=device, dtype='float32'
        )
        half = UnitEncoder.from_pretrained(
            folder, layer=9, kmeans='', device=device, dtype='bfloat16'
        )
    frames = torch.cat(ours.features(waves[:4])).cpu()
    ours.centroids = half.centroids = frames[
        torch.randperm(len(frames), generator=generator)[:500]
    ].to(device)
    net = net.to(device)
    few = (
        waves if device.type == 'cuda' else waves[: max(1, count // 40)]
    )  # a CPU without bf16 units takes many times as long
    print(
        f'{device}, {torch.get_num_threads()} threads; {count} utterances, {total:.0f} s; HuBERT base, layer 9 of 12, 500 clusters'
    )

    def report(name, took, some, plain_took, units, wanted):
        spoken = sum(map(len, some)) / 16000
        print(
            f'{name:20}{took:8.1f} s {spoken / took:9.1f} x real time {plain_took / took * spoken / total:7.2f} x plain '
            f'{100 * agreement(units, wanted):8.2f} % of the units as ours in fp32',
            flush=True,
        )

    (
        ours.encode(waves[:2]),
        plain(net, waves[:2], ours.centroids.cpu()),
    )  # libraries loaded, memory touched
    units, fast = timed(lambda: ours.encode(waves))
    theirs, slow = timed(lambda: plain(net, waves, ours.centroids.cpu()))
    report('plain loop, fp32', slow, waves, slow, theirs, units)
    report('ours, fp32', fast, waves, slow, units, units)
    short, bf16 = timed(lambda: half.encode(few))
    report('ours, bf16', bf16, few, slow, short, units[: len(few)])
    alone = [plain(net, [wave], ours.centroids.cpu())[0] for wave in waves]
    print(
        f'the plain loop, each utterance alone: {100 * agreement(alone, units):.3f} % of the units as ours'
    )
    if device.type == 'cuda':
        rate = total / bf16
        print(
            f'{rate / 3600:.2f} h of speech a second; LibriSpeech (960 h) {960 * 60 / rate:.1f} min, Libri-Light (50,000 h) {5e4 / rate:.1f} h'
        )
