"""Audio and UnitEncoder of model.py; the oracles are closed forms, torchaudio and transformers."""

import hashlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
from model import (
    AUDIO_EXTENSIONS,
    BLOCK,
    HOP,
    MFCC,
    N_MELS,
    InputError,
    KMeansReader,
    UnitEncoder,
    dedup,
    fetch,
    load_audio,
    log_mel,
    mel_filters,
    resample,
    save_audio,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speech(seconds, seed=0):
    """Something with syllables: harmonics that change every 120 ms, pauses, a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    wave = np.zeros_like(t)
    for start in np.arange(0, seconds, 0.12):
        here = (t >= start) & (t < start + 0.12)
        if rng.random() > 0.2:
            peaks, pitch = rng.uniform(200, 4000, 3), rng.uniform(90, 220)
            for n in range(1, 30):
                wave[here] += np.exp(-(((n * pitch - peaks) / 200) ** 2)).sum() * np.sin(
                    2 * np.pi * n * pitch * t[here]
                )
    return torch.from_numpy((0.05 * wave + 1e-4 * rng.standard_normal(len(t))).astype('float32'))


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------- resampling


def windowed_sinc(wave, rate, wanted):
    """The definition, sample by sample, in float64."""
    cutoff, at = 0.99 * min(1, wanted / rate), np.arange(len(wave))
    out = []
    for j in range(-(-len(wave) * wanted // rate)):
        t = cutoff * (at - j * rate / wanted)
        window = np.where(np.abs(t) < 6, np.cos(np.pi * t / 12) ** 2, 0)
        out.append(cutoff * (wave * np.sinc(t) * window).sum())
    return np.array(out)


RATES = [(r, 16000) for r in (8000, 11025, 22050, 24000, 44100, 48000)] + [(16000, 24000)]


@pytest.mark.parametrize(('rate', 'wanted'), [*RATES, (16000, 22050), (11127, 16000)])
def test_resample_is_the_windowed_sinc(rate, wanted):
    for samples in (0, 1, 7, 1999):
        wave = np.random.default_rng(samples).uniform(-1, 1, samples)
        ours = resample(wave, rate, wanted).numpy()
        theirs = windowed_sinc(wave, rate, wanted)
        assert len(ours) == len(theirs)
        assert np.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_resample_of_minutes_is_that_of_the_whole():
    wave = np.random.default_rng(0).uniform(-1, 1, 20 * 125 + 7)
    ours = resample(wave, 20, 32).numpy()
    theirs = windowed_sinc(wave, 20, 32)
    assert len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('rate', 'wanted'), RATES)
def test_resample_equals_torchaudio(rate, wanted):
    torchaudio = pytest.importorskip('torchaudio', exc_type=(ImportError, OSError))
    for samples in (1, 12345, 3 * rate):
        wave = 0.3 * torch.randn(samples)
        # in float32 torchaudio rounds its filter's phases: 1e-5 at 22,050 Hz
        theirs = torchaudio.functional.resample(wave.double(), rate, wanted).float()
        ours = resample(wave, rate, wanted)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- audio


FORMATS = {
    '.wav': dict(subtype='PCM_24'),
    '.flac': {},
    '.ogg': dict(subtype='VORBIS'),
    '.oga': dict(format='OGG', subtype='VORBIS'),
    '.opus': dict(format='OGG', subtype='OPUS'),
    '.mp3': {},
    '.aiff': {},
    '.aif': dict(format='AIFF'),
    '.aifc': dict(format='AIFF'),
    '.au': {},
    '.sph': dict(format='NIST', subtype='PCM_16'),
    '.caf': {},
    '.w64': {},
}


@pytest.mark.parametrize('extension', AUDIO_EXTENSIONS)
def test_every_format_loads_whole_and_in_part(extension, tmp_path):
    wave, path = speech(3.0).numpy(), tmp_path / ('a' + extension)
    soundfile.write(path, np.stack([wave, wave], 1), 16000, **FORMATS[extension])
    whole = load_audio(path)
    lossy = extension in ('.ogg', '.oga', '.opus', '.mp3')
    assert len(whole) == 48000 or lossy and abs(len(whole) - 48000) < 3000
    if not lossy:
        assert np.allclose(whole, wave, atol=1e-4)
    part = load_audio(path, start=1.25, seconds=0.5)
    # a lossy decoder that starts in the middle needs a while to be exact
    assert len(part) == 8000 and (part - whole[20000:28000])[4000:].abs().max() < 1e-3
    assert torch.equal(load_audio(io.BytesIO(path.read_bytes()), start=1.25, seconds=0.5), part)
    with pytest.raises(InputError, match='holds no samples at 9 s'):
        load_audio(path, start=9)


def test_rates_channels_and_short_sounds(tmp_path):
    for rate in (8000, 22050, 44100, 11127):
        wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        soundfile.write(tmp_path / 'r.wav', np.stack([wave, 0 * wave], 1), rate, subtype='FLOAT')
        ours = load_audio(tmp_path / 'r.wav')
        wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)  # the mean of both
        assert len(ours) == 16000 and np.abs(ours.numpy() - wanted)[100:-100].max() < 2e-3
    soundfile.write(tmp_path / 'short.wav', speech(0.1).numpy(), 16000)
    assert len(load_audio(tmp_path / 'short.wav')) == 1600


def test_bad_files_are_one_line_that_names_them(tmp_path):
    wave = speech(1.0).numpy()
    soundfile.write(tmp_path / 'a.flac', wave, 16000)
    whole = (tmp_path / 'a.flac').read_bytes()
    (tmp_path / 'truncated.flac').write_bytes(whole[: len(whole) // 2])
    part = load_audio(tmp_path / 'truncated.flac')
    assert 1000 < len(part) < 16000
    assert torch.allclose(part, load_audio(tmp_path / 'a.flac')[: len(part)])
    (tmp_path / 'text.wav').write_text('this is no sound')
    (tmp_path / 'empty.wav').write_bytes(b'')
    (tmp_path / 'cut.flac').write_bytes(whole[:50])
    (tmp_path / 'a.raw').write_bytes(bytes(1000))
    (tmp_path / 'packed.sph').write_bytes(
        b'NIST_1A\n   1024\nsample_rate -i 16000\nchannel_count -i 1\nsample_n_bytes -i 2\n'
        b'sample_byte_format -s2 01\nsample_count -i 100\n'
        b'sample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n'.ljust(1024)
        + bytes(200)
    )
    soundfile.write(tmp_path / 'none.wav', wave[:0], 16000)
    soundfile.write(tmp_path / 'nan.wav', np.full(100, np.nan, 'float32'), 16000, subtype='FLOAT')
    names = 'text.wav empty.wav cut.flac a.raw packed.sph none.wav nan.wav missing.wav'
    for name in names.split():
        with pytest.raises(InputError, match=name) as error:
            load_audio(tmp_path / name)
        assert '\n' not in str(error.value)


def test_an_import_error_is_not_reported_as_bad_audio(tmp_path, monkeypatch):
    soundfile.write(tmp_path / 'a.wav', speech(0.1).numpy(), 22050)
    monkeypatch.setitem(sys.modules, 'torchaudio', None)
    assert len(load_audio(tmp_path / 'a.wav')) == 1161
    monkeypatch.setitem(sys.modules, 'soundfile', None)
    with pytest.raises(ModuleNotFoundError):
        load_audio(tmp_path / 'a.wav')


def test_save_audio_never_clips_and_leaves_nothing_beside(tmp_path):
    for name in ('x.wav', 'x.flac'):
        save_audio(tmp_path / name / name, 3 * speech(0.5) / speech(0.5).abs().max())
        assert 0.98 < float(load_audio(tmp_path / name / name).abs().max()) <= 0.99
        assert os.listdir(tmp_path / name) == [name]
    assert soundfile.info(tmp_path / 'x.flac' / 'x.flac').format == 'FLAC'


def test_dedup():
    units, durations = dedup([3, 3, 5, 3])
    assert units.tolist() == [3, 5, 3] and durations.tolist() == [2, 1, 1]


def test_log_mel_is_its_definition():
    for samples in (0, 1, 159, 160, 639, 640, 16001):
        assert log_mel(torch.zeros(samples)).shape == (max(1, samples // HOP), N_MELS)
    wave = speech(25.0)
    ours = log_mel(wave)  # longer than the pieces it is made of
    padded = np.pad(wave.numpy().astype('float64'), 400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    turns = np.outer(np.arange(257), np.arange(400)) / 512
    for t in (0, 1, 999, 1000, 2498, 2499):
        centre = 400 + 160 * t + 80
        spectrum = np.exp(-2j * np.pi * turns) @ (hann * padded[centre - 200 : centre + 200])
        mel = np.abs(spectrum) ** 2 @ mel_filters().numpy().astype('float64')
        assert np.allclose(ours[t], np.log(np.maximum(mel, 1e-7)), atol=2e-3), t
    peaks = mel_filters().argmax(0) * 31.25  # Hz; bands are as far apart in mel
    mel = 2595 * torch.log10(1 + peaks / 700)
    assert (mel.diff() - 2840 / 65).abs().max() < 45 and (mel_filters().sum(0) > 0.5).all()


# ---------------------------------------------------------------------------- the offline encoder


@pytest.fixture(scope='module')
def mfcc(tmp_path_factory):
    encoder = UnitEncoder.from_pretrained('mfcc')
    features = encoder.features([speech(20, seed) for seed in range(3)])
    frames = torch.cat(features)
    encoder.centroids = frames[torch.randperm(len(frames))[:40]]
    encoder.config['distortion'] = encoder.distance(features)
    folder = tmp_path_factory.mktemp('mfcc') / 'encoder'
    encoder.save_pretrained(folder)
    return UnitEncoder.from_pretrained(str(folder))


def test_mfcc_units_need_neither_batch_nor_loudness_nor_the_rest(mfcc):
    waves = [speech(seconds, 7 + i) for i, seconds in enumerate((3.0, 0.01, 6.3, 1.0))]
    together = mfcc.encode(waves)
    assert [len(u) for u in together] == [75, 1, 157, 25]
    assert mfcc.frame_rate == 25 and mfcc.n_units == 40
    for wave, units in zip(waves, together, strict=True):
        assert torch.equal(mfcc.encode([wave])[0], units)
        assert (mfcc.encode([wave * 0.05])[0] == units).float().mean() > 0.99
    assert (mfcc.encode([waves[2][:48000]])[0][:74] == together[2][:74]).float().mean() > 0.9


def test_distance_is_the_mean_squared_distance(mfcc):
    frames = mfcc.features([speech(2.0, 5)])[0]
    every = (frames[:, None].double() - mfcc.centroids.double()).square().sum(2)
    assert mfcc.distance([frames]) == pytest.approx(float(every.min(1).values.mean()), rel=1e-5)


def test_what_assign_cannot_do_is_said(mfcc):
    with pytest.raises(InputError, match='no k-means'):
        UnitEncoder(MFCC).encode([speech(1.0)])
    with pytest.raises(InputError, match='needs `distortion`'):
        UnitEncoder(MFCC, mfcc.centroids).encode([speech(1.0)])
    with pytest.raises(InputError, match='for 26 features, mfcc gives 3'):
        mfcc.assign([torch.zeros(5, 3)])
    assert (
        mfcc.encode([]) == []
        and UnitEncoder(dict(MFCC, switch=0), torch.ones(1, 26)).encode([]) == []
    )


def best_path(costs, price):
    """Plain dynamic programming over all changes, in float64: (T, K) -> the least total, units."""
    total, came = costs[0].copy(), []
    for cost in costs[1:]:
        moves = total[:, None] + price * (1 - np.eye(len(total)))  # from, to
        came.append(moves.argmin(0))
        total = moves.min(0) + cost
    path = [int(total.argmin())]
    for step in reversed(came):
        path.append(int(step[path[-1]]))
    return total.min(), path[::-1]


def path_cost(costs, path, price):
    path = np.array(path)
    return costs[np.arange(len(path)), path].sum() + price * (path[1:] != path[:-1]).sum()


def test_the_price_of_a_change_gives_the_cheapest_path():
    rng = np.random.default_rng(0)
    # every path of five frames and three units
    costs = rng.random((5, 3))
    paths = np.array(list(itertools.product(range(3), repeat=5)))
    cheapest = min(path_cost(costs, path, 0.3) for path in paths)
    assert best_path(costs, 0.3)[0] == pytest.approx(cheapest)
    # utterances of several lengths, one over the block in which distances are kept
    centroids = torch.from_numpy(rng.standard_normal((20, 4))).float()
    lengths = (1, 2, 37, 150, BLOCK + 200)
    features = [torch.from_numpy(rng.standard_normal((n, 4))).float() for n in lengths]
    for switch in (0.3, 1.0, 4.0, 1e4):
        encoder = UnitEncoder(dict(MFCC, switch=switch, distortion=0.5), centroids)
        units = encoder.assign(features)
        changes = 0
        for f, u in zip(features, units, strict=True):
            squared = ((f.numpy()[:, None] - centroids.numpy()) ** 2).sum(2).astype('float64')
            least, path = best_path(squared, switch * 0.5)
            assert path_cost(squared, u.numpy(), switch * 0.5) == pytest.approx(least, rel=1e-5)
            assert (u.numpy() == path).mean() > 0.99  # ties apart
            assert torch.equal(encoder.assign([f])[0], u)
            changes += int((u[1:] != u[:-1]).sum())
        assert changes > 0 or switch == 1e4
    assert changes == 0
    free = UnitEncoder(dict(MFCC, switch=0), centroids).assign(features)
    for f, u in zip(features, free, strict=True):
        assert torch.equal(u, torch.cdist(f, centroids).argmin(1))


# ---------------------------------------------------------------------------- HuBERT-like nets

SMALL = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(24,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
LARGE = dict(feat_extract_norm='layer', do_stable_layer_norm=True, conv_bias=True)
MHUBERT = dict(
    conv_dim=(24,) * 8,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2, 2),
)
NETS = {
    'HuBERT base': ('Hubert', {}),
    'HuBERT base, 25 Hz': ('Hubert', MHUBERT),
    'HuBERT large, batch norm': ('Hubert', LARGE | dict(conv_pos_batch_norm=True)),
    'wav2vec 2': ('Wav2Vec2', dict(conv_bias=True)),
    'WavLM': ('WavLM', {}),
    'WavLM large': ('WavLM', LARGE),
}


def random_net(name, **change):
    """transformers' net of the true layout, with norms and biases that do something."""
    family, more = NETS[name]
    config = getattr(transformers, family + 'Config')(**SMALL | more | change)
    net = getattr(transformers, family + 'Model')(config).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if 'batch norm' in name:
        net.encoder.pos_conv_embed.batch_norm.running_mean += torch.randn(32)
    return net


@torch.no_grad()
def hidden_states(net, wave, layer):
    return net(wave[None], output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize('name', NETS)
def test_nets_give_transformers_hidden_states_in_any_batch(name, tmp_path):
    net = random_net(name)
    net.save_pretrained(tmp_path)
    # the public encoders take the raw wave whatever this says
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(do_normalize=True)))
    waves = [speech(seconds, i) + 0.01 for i, seconds in enumerate((1.0, 0.4, 2.03, 0.01))]
    # at the last layer of a pre-norm net, transformers 4 norms and 5 does not
    for layer in (0, 1, 2 if 'large' in name else 3):
        encoder = UnitEncoder.from_pretrained(str(tmp_path), layer=layer, kmeans='')
        assert encoder.frame_rate == (25 if '25' in name else 50)
        assert (
            len(encoder.extractor.net.encoder.layers) == layer
            and encoder.extractor.dtype == torch.float32
        )
        alone = encoder.features(waves)
        for wave, ours in zip(waves[:3], alone, strict=False):
            theirs = hidden_states(net, wave, layer)
            assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()
        encoder.extractor.batch_seconds = 100
        frames = torch.cat(alone)
        encoder.centroids = frames[torch.randperm(len(frames))[:20]]
        for one, many in zip(alone, encoder.features(waves), strict=True):
            assert torch.allclose(one, many, atol=2e-4), (one - many).abs().max()
        units = encoder.encode(waves)
        assert all(
            torch.equal(encoder.encode([w])[0], u) for w, u in zip(waves, units, strict=True)
        )
        backwards = encoder.encode(waves[::-1])[::-1]
        assert all(torch.equal(a, b) for a, b in zip(backwards, units, strict=True))
    with pytest.raises(InputError, match='layer 4'):
        UnitEncoder.from_pretrained(str(tmp_path), layer=4, kmeans='')


def test_padding_of_the_public_encoder_is_of_the_utterance(tmp_path):
    net = random_net('HuBERT base, 25 Hz')
    net.save_pretrained(tmp_path / 'net')
    encoder = UnitEncoder.from_pretrained(str(tmp_path / 'net'), layer=2, kmeans='')
    encoder.extractor.pad = 40
    wave = speech(1.3)
    theirs = hidden_states(net, torch.nn.functional.pad(wave, (40, 40)), 2)
    assert torch.allclose(encoder.features([wave])[0], theirs, atol=2e-4)


@pytest.mark.parametrize('name', ['HuBERT base, 25 Hz', 'HuBERT large, batch norm', 'WavLM'])
def test_long_utterances_are_joined_on_the_frame_grid(name, tmp_path):
    net = random_net(name)
    net.save_pretrained(tmp_path)
    wave = torch.cat([speech(5.0, seed) * (0.2 + seed) for seed in range(4)])
    for layer in (0, 3):
        encoder = UnitEncoder.from_pretrained(str(tmp_path), layer=layer, kmeans='')
        assert encoder.extractor.longest == (1666 if name == 'WavLM' else 100 * encoder.frame_rate)
        whole = encoder.features([wave])[0]
        encoder.extractor.longest = 200  # frames
        in_parts, short = encoder.features([wave, wave[:40000]])
        alone = encoder.features([wave[:40000]])[0]
        assert torch.equal(short, alone) and in_parts.shape == whole.shape
        encoder.extractor.batch_seconds = 20
        for a, b in zip(encoder.features([wave, wave[:40000]]), (in_parts, short), strict=True):
            assert torch.allclose(a, b, atol=2e-4)
        # up to attention all is local, and the group norm is that of the whole utterance
        if layer == 0:
            assert torch.allclose(in_parts, whole, atol=2e-4)
    encoder.centroids = whole[torch.randperm(len(whole))[:50]]
    differ = (encoder.assign([in_parts])[0] != encoder.assign([whole])[0]).float().mean()
    print(f'{name}: {100 * differ:.1f} % of the units of a random net in stretches differ')
    assert differ < 0.2


def test_stretches_compute_every_frame_once_with_context(tmp_path):
    random_net('HuBERT base').save_pretrained(tmp_path)
    encoder = UnitEncoder.from_pretrained(str(tmp_path), layer=1, kmeans='')
    encoder.extractor.longest = 100
    for frames in (1, 99, 100, 101, 800, 8191):
        wave = torch.arange((frames - 1) * 320 + 400 + 7, dtype=torch.float32)
        stretches = encoder.extractor._stretches(wave)
        at = 0
        for s in stretches:
            skip, wanted = s.wanted.start, s.wanted.stop - s.wanted.start
            assert s.frames <= 100 and len(s.wave) == (s.frames - 1) * 320 + 400
            assert int(s.wave[0]) == (at - skip) * 320
            assert skip >= 10 or at == skip
            at += wanted
            assert s.frames - s.wanted.stop >= 10 or at == frames
        assert at == frames


HOURS = {
    'mfcc': """
encoder = UnitEncoder(dict(MFCC, distortion=1.0), torch.randn(500, 26))
""",
    'net': """
import transformers
config = dict(kind='hubert', name='x', model='x', layer=1, pad=40)
net = transformers.HubertModel(transformers.HubertConfig(hidden_size=32, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=32, conv_dim=(64, 8, 8, 8, 8, 8, 8),
    num_conv_pos_embeddings=16))
encoder = UnitEncoder(config, torch.randn(100, 32), net=net)
""",
}


@pytest.mark.parametrize('kind', HOURS)
def test_long_utterances_take_bounded_memory(kind):
    """Ten minutes, 38 MB: at once, the spectra would take 250, a net's first layer 490."""
    program = f"""
import resource, torch
from model import MFCC, UnitEncoder
{HOURS[kind]}
wave = 0.1 * torch.randn(600 * 16000)
encoder.encode([wave[: 16000 * 30]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
units = encoder.encode([wave])[0]
assert abs(len(units) - 600 * encoder.frame_rate) <= 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f'{kind}: {done.stdout.strip()} MB more')
    assert int(done.stdout) < 200, done.stdout


def test_precision_is_scoped(monkeypatch):
    """On CUDA products are TF32 by default, none of it remains for the rest of the program."""
    config = dict(kind='hubert', name='x', model='x', layer=3, pad=0)
    net = UnitEncoder(config, net=random_net('HuBERT base')).extractor
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    monkeypatch.setattr(net, 'device', torch.device('cuda'))
    for tf32, name in ((True, 'high'), (False, 'highest')):
        net.tf32 = tf32
        with pytest.raises(KeyError), net._precision():
            assert torch.get_float32_matmul_precision() == name and cudnn.allow_tf32 == tf32
            raise KeyError
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == before


# ---------------------------------------------------------------------------- files


def test_a_saved_encoder_is_complete_by_itself(tmp_path):
    net = random_net('HuBERT base, 25 Hz')
    net.save_pretrained(tmp_path / 'net')
    encoder = UnitEncoder.from_pretrained(str(tmp_path / 'net'), layer=2, kmeans='')
    waves = [speech(1.0, 1), speech(0.5, 2)]
    frames = torch.cat(encoder.features(waves))
    encoder.centroids = frames[torch.randperm(len(frames))[:10]]
    encoder.config |= dict(switch=0.5, distortion=encoder.distance([frames]))
    before = os.umask(0o027)
    try:
        encoder.save_pretrained(tmp_path / 'encoder')
    finally:
        os.umask(before)
    assert sorted(os.listdir(tmp_path / 'encoder')) == ['encoder.json', 'encoder.safetensors']
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in (tmp_path / 'encoder').iterdir())
    units = encoder.encode(waves)
    os.rename(tmp_path / 'net', tmp_path / 'gone')
    for _ in range(2):  # what was loaded can be saved again
        again = UnitEncoder.from_pretrained(str(tmp_path / 'encoder'))
        assert all(torch.equal(a, b) for a, b in zip(again.encode(waves), units, strict=True))
        assert again.vocoder == str(tmp_path / 'vocoder')
        again.save_pretrained(tmp_path / 'encoder')
    with pytest.raises(InputError, match='of layer 2, not 1'):
        UnitEncoder.from_pretrained(str(tmp_path / 'encoder'), layer=1)


def test_a_large_net_is_kept_as_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(model, 'SMALL_NET', 1000)
    random_net('WavLM').save_pretrained(tmp_path / 'net')
    encoder = UnitEncoder.from_pretrained(str(tmp_path / 'net'), layer=1, kmeans='')
    encoder.centroids = torch.randn(5, 32)
    encoder.save_pretrained(tmp_path / 'encoder')
    assert os.path.getsize(tmp_path / 'encoder' / 'encoder.safetensors') < 2000
    again = UnitEncoder.from_pretrained(str(tmp_path / 'encoder'))
    assert torch.equal(again.centroids, encoder.centroids)
    os.rename(tmp_path / 'net', tmp_path / 'gone')
    with pytest.raises(InputError, match='net.*--encoder'):
        UnitEncoder.from_pretrained(str(tmp_path / 'encoder'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(kind='evil'), 'kind'),
        (dict(kind=None), 'kind'),
        (dict(name=None), '`name`'),
        (dict(layer='2'), '`layer`'),
        (dict(layer=-1), '`layer`'),
        (dict(layer=True), '`layer`'),
        (dict(pad=1e3), '`pad`'),
        (dict(switch=float('nan')), '`switch`'),
        (dict(n_units=7), '5 units, encoder.json says 7'),
        (dict(n_units='5'), '`n_units`'),
        (dict(model=['x']), '`model`'),
        (dict(vocoder=3), '`vocoder`'),
        (dict(vocoder='../../etc'), '`vocoder`'),
        (dict(net=dict(model_type='bert')), 'bert'),
        (dict(net=dict(model_type='hubert', hidden_size=-3)), 'does not hold the net'),
        (dict(net=dict(model_type='hubert', hidden_size=10**6)), 'does not hold the net'),
        (dict(layer=900, net=dict(model_type='hubert', num_hidden_layers=10**8)), 'does not hold'),
    ],
)
def test_a_strangers_encoder_is_one_line(change, message, tmp_path):
    random_net('HuBERT base').save_pretrained(tmp_path / 'net')
    encoder = UnitEncoder.from_pretrained(str(tmp_path / 'net'), layer=1, kmeans='')
    encoder.centroids = torch.randn(5, 32)
    encoder.save_pretrained(tmp_path / 'encoder')
    path = tmp_path / 'encoder' / 'encoder.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as error:
        UnitEncoder.from_pretrained(str(tmp_path / 'encoder'))
    assert '\n' not in str(error.value)


def test_broken_encoder_files_are_one_line(mfcc, tmp_path):
    mfcc.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'encoder.json').read_text())
    for key in ('name', 'frame_rate', 'n_cep', 'range'):
        rest = {name: value for name, value in config.items() if name != key}
        (tmp_path / 'encoder.json').write_text(json.dumps(rest))
        with pytest.raises(InputError, match=f'`{key}`'):
            UnitEncoder.from_pretrained(str(tmp_path))
    (tmp_path / 'encoder.json').write_text(json.dumps(config | dict(n_cep=65)))
    with pytest.raises(InputError, match='64 cepstra'):
        UnitEncoder.from_pretrained(str(tmp_path))
    (tmp_path / 'encoder.json').write_text('[1]')
    with pytest.raises(InputError, match='encoder.json'):
        UnitEncoder.from_pretrained(str(tmp_path))
    (tmp_path / 'encoder.json').write_text(json.dumps(config))
    for tensors in (dict(x=torch.ones(2)), dict(centroids=torch.tensor([[float('nan')]]))):
        save_file(tensors, tmp_path / 'encoder.safetensors')
        with pytest.raises(InputError, match='centroids'):
            UnitEncoder.from_pretrained(str(tmp_path))
    (tmp_path / 'encoder.safetensors').write_bytes(b'no tensors')
    with pytest.raises(InputError, match='encoder.safetensors'):
        UnitEncoder.from_pretrained(str(tmp_path))


def test_broken_nets_are_one_line(tmp_path):
    random_net('HuBERT base').save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / 'model.safetensors'), tmp_path / 'config.json'
    fine = config.read_text()
    for change in (dict(hidden_size=-8), dict(hidden_size=64), dict(conv_stride=[0] * 7)):
        config.write_text(json.dumps(json.loads(fine) | change))
        with pytest.raises(InputError, match=str(tmp_path)):
            UnitEncoder.from_pretrained(str(tmp_path), layer=1)
    config.write_text(fine)
    tensors.pop('encoder.layers.0.layer_norm.weight')
    save_file(tensors, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match='missing.*encoder.layers.0.layer_norm.weight'):
        UnitEncoder.from_pretrained(str(tmp_path), layer=1)


def test_public_encoder_offline_names_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv('SLAM_CACHE', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(InputError) as error:
        UnitEncoder.from_pretrained('mhubert25')
    for word in (
        'config.json',
        'model.safetensors',
        'slprl/mhubert-base-25hz',
        str(tmp_path / 'mhubert25'),
        'km500.bin',
    ):
        assert word in str(error.value)
    # what the message says to do
    random_net('HuBERT base, 25 Hz', num_hidden_layers=12).save_pretrained(tmp_path / 'mhubert25')
    with pytest.raises(InputError, match='km500.bin'):
        UnitEncoder.from_pretrained('mhubert25')
    encoder = UnitEncoder.from_pretrained('mhubert25', kmeans='')
    assert len(encoder.extractor.net.encoder.layers) == 11 and encoder.vocoder == 'hifigan25'
    assert len(encoder.features([torch.zeros(720 - 80)])[0]) == 1


def test_fetch_downloads_once_and_checks(tmp_path, monkeypatch):
    monkeypatch.setenv('SLAM_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'f.bin').write_bytes(b'abc')
    url, sha256 = (tmp_path / 'f.bin').as_uri(), hashlib.sha256(b'abc').hexdigest()
    assert open(fetch(url, sha256), 'rb').read() == b'abc'
    os.remove(tmp_path / 'f.bin')
    assert fetch(url, sha256) == str(tmp_path / 'cache' / 'f.bin')
    with pytest.raises(InputError, match='sha256 differs.: delete it'):
        fetch(url, '0' * 64)
    with pytest.raises(InputError, match='put it at'):
        fetch((tmp_path / 'g.bin').as_uri())
    assert os.listdir(tmp_path / 'cache') == ['f.bin']


# ---------------------------------------------------------------------------- k-means files


@pytest.fixture
def kmeans_dump(tmp_path):
    """A joblib dump as scikit-learn's KMeans makes it."""
    cluster = pytest.importorskip('sklearn.cluster')
    x = np.random.default_rng(0).standard_normal((400, 8))
    state = np.random.RandomState(0)
    kmeans = cluster.MiniBatchKMeans(20, random_state=state, n_init=1).fit(x)
    joblib.dump(kmeans, tmp_path / 'km.bin')
    return str(tmp_path / 'km.bin'), kmeans.cluster_centers_, x, kmeans.predict(x)


def test_kmeans_file_of_scikit_learn(kmeans_dump):
    path, centres, x, predicted = kmeans_dump
    ours = KMeansReader.centroids(path)
    assert np.allclose(ours.numpy(), centres, atol=1e-6)
    encoder = UnitEncoder(dict(MFCC, switch=0), ours)
    assert encoder.assign([torch.from_numpy(x).float()])[0].tolist() == predicted.tolist()


class Malice:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('how', ['system', 'eval', 'getattr', 'objects', 'nested'])
def test_malicious_kmeans_file_is_refused(how, tmp_path):
    mark, path = tmp_path / 'mark', str(tmp_path / 'km.bin')
    bad = {
        'system': Malice(os.system, f'touch {mark}'),
        'eval': Malice(eval, f'open({str(mark)!r}, "w")'),
        'objects': np.array([Malice(os.system, f'touch {mark}')], dtype=object),
        'nested': dict(cluster_centers_=np.zeros((2, 2)), extra=[Malice(os.mkdir, str(mark))]),
    }
    if how == 'getattr':
        with open(path, 'wb') as file:
            file.write(b'cbuiltins\ngetattr\n(cos\npath\nVsep\ntR.')
    else:
        joblib.dump(bad[how], path)
    with pytest.raises(InputError, match='refused'):
        KMeansReader.centroids(path)
    assert not mark.exists()


def test_what_is_no_kmeans_file_is_one_line(tmp_path):
    path = str(tmp_path / 'km.bin')
    with open(path, 'wb') as file:
        pickle.dump(3, file)
    with pytest.raises(InputError, match='no k-means file'):
        KMeansReader.centroids(path)
    with pytest.raises(InputError, match='no k-means file'):
        KMeansReader.centroids(path + 'nowhere')
