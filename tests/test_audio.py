"""Sound, UnitEncoder and UnitVocoder of model.py. Oracles: closed forms, brute force, torchaudio,
transformers, scikit-learn and the published modules of HiFi-GAN."""

import io
import json
import os
import pickle

import joblib
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import model as M
from model import InputError, UnitEncoder, UnitVocoder, load_audio

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speech(seconds, seed=0):
    """Something with syllables: harmonics that change every 120 ms, pauses, a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    wave = np.zeros_like(t)
    for start in np.arange(0, seconds, 0.12):
        here = (t >= start) & (t < start + 0.12)
        if rng.random() > 0.2:
            peaks, pitch = rng.choice([300, 700, 1200, 2300, 3500], 3), rng.uniform(90, 220)
            for n in range(1, 30):
                loud = np.exp(-(((n * pitch - peaks) / 200) ** 2)).sum()
                wave[here] += loud * np.sin(2 * np.pi * n * pitch * t[here])
    return torch.from_numpy((0.05 * wave + 1e-4 * rng.standard_normal(len(t))).astype('float32'))


def refused(match, function, *args, **options):
    """It raises an InputError of one line."""
    with pytest.raises(InputError, match=match) as error:
        function(*args, **options)
    assert '\n' not in str(error.value)


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# -----------------------------------------------------------------------------
# Sound


@pytest.mark.parametrize(('rate', 'wanted'), [(8000, 16000), (22050, 16000), (16000, 24000)])
def test_resample_is_the_windowed_sinc(rate, wanted):
    wave = np.random.default_rng(0).uniform(-1, 1, 1999)
    cutoff, at = 0.99 * min(1, wanted / rate), np.arange(len(wave))
    times = np.arange(-(-len(wave) * wanted // rate))[:, None] * rate / wanted
    t = cutoff * (at - times)
    window = np.where(np.abs(t) < 6, np.cos(np.pi * t / 12) ** 2, 0)
    expected = cutoff * (wave * np.sinc(t) * window).sum(1)
    ours = M.resample(wave, rate, wanted)
    assert ours.dtype == torch.float32 and len(ours) == len(expected)
    assert np.abs(ours.numpy() - expected).max() < 1e-4
    assert len(M.resample(wave[:0], rate, wanted)) == 0


OGG = dict(format='OGG')
FORMATS = {'.wav': dict(subtype='PCM_24'), '.flac': {}, '.ogg': {}, '.mp3': {}, '.aiff': {}}
FORMATS |= {'.au': {}, '.caf': {}, '.w64': {}, '.sph': dict(format='NIST', subtype='PCM_16')}
FORMATS |= {'.aif': dict(format='AIFF'), '.aifc': dict(format='AIFF')}
FORMATS |= {'.oga': dict(OGG, subtype='VORBIS'), '.opus': dict(OGG, subtype='OPUS')}


@pytest.mark.parametrize('extension', M.AUDIO_EXTENSIONS)
def test_every_format_loads_whole_and_in_part(extension, tmp_path):
    wave, path, notes = speech(3.0).numpy(), tmp_path / ('a' + extension), []
    soundfile.write(path, np.stack([wave, wave], 1), 16000, **FORMATS[extension])
    whole = load_audio(path, notes=notes)
    lossy = extension in ('.ogg', '.oga', '.opus', '.mp3')
    assert len(whole) == 48000 or (lossy and abs(len(whole) - 48000) < 3000)
    assert lossy or np.allclose(whole, wave, atol=1e-4)
    part = load_audio(path, start=1.25, seconds=0.5, notes=notes)
    # a lossy decoder that starts in the middle needs a while to be exact
    assert len(part) == 8000 and (part - whole[20000:28000])[4000:].abs().max() < 1e-3
    assert torch.equal(load_audio(io.BytesIO(path.read_bytes()), start=1.25, seconds=0.5), part)
    assert not notes
    refused('holds no samples at 9 s', load_audio, path, start=9)


def test_channels_that_cancel_give_the_louder_one(tmp_path):
    one, two = speech(1.0, 1).numpy(), speech(1.0, 2).numpy()
    mixed = [((one, two), (one + two) / 2), ((one, 0 * one), one / 2)]
    cancel = [((one, -one), one), ((0.9 * one, -one), -one), ((one, two, -one, -two), None)]
    for cases, expected_notes in (mixed, []), (cancel, ['channels cancel: one of them taken']):
        for channels, expected in cases:
            notes = []
            soundfile.write(tmp_path / 'a.wav', np.stack(channels, 1), 16000, subtype='FLOAT')
            wave = load_audio(tmp_path / 'a.wav', notes=notes).numpy()
            assert expected is None or np.allclose(wave, expected, atol=1e-6)
            assert wave.std() > 0.4 * one.std() and notes == expected_notes


@pytest.mark.parametrize('extension', ('.flac', '.wav', '.mp3', '.aiff', '.au'))
def test_a_decoder_that_stops_early_is_an_error_or_a_note(extension, tmp_path):
    path, notes = tmp_path / ('cut' + extension), []
    soundfile.write(path, speech(10.0), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: int(0.4 * len(content))])
    refused(r'stopped early at [2345]\.\d of 10\.0 s', load_audio, path)
    wave = load_audio(path, keep_partial=True, notes=notes)
    assert 2 < len(wave) / 16000 < 6 and len(notes) == 1 and 'stopped early' in notes[0]
    assert np.corrcoef(wave[:30000], speech(10.0)[:30000])[0, 1] > 0.99
    assert len(load_audio(path, seconds=1.5)) == 24000  # this part is complete


def test_silence_and_streams_of_unknown_length():
    for level, expected in ((0, ['digital silence']), (0.001, [])):
        soundfile.write(file := io.BytesIO(), level * np.sin(np.arange(8000)), 16000, format='WAV')
        content, notes = bytearray(file.getvalue()), []
        content[40:44] = b'\xff\xff\xff\xff'  # the length that a pipe writes
        assert len(load_audio(io.BytesIO(content), notes=notes)) == 8000 and notes == expected


def test_what_is_no_sound_is_one_line_that_names_the_file(tmp_path):
    wave = speech(1.0).numpy()
    soundfile.write(tmp_path / 'cut.flac', wave, 16000)
    content = dict(text=b'this is no sound', empty=b'', raw=bytes(1000))
    content |= {'cut.flac': (tmp_path / 'cut.flac').read_bytes()[:50]}
    for name in content:
        (tmp_path / name).write_bytes(content[name])
    soundfile.write(tmp_path / 'none.wav', wave[:0], 16000)
    for bad in (np.nan, np.inf):
        wave[500] = bad
        soundfile.write(tmp_path / f'{bad}.wav', wave, 16000, subtype='FLOAT')
    for name in (*content, 'none.wav', 'nan.wav', 'inf.wav', 'missing.wav'):
        refused(name, load_audio, tmp_path / name, keep_partial=True)


def test_saved_sound_never_clips_and_leaves_nothing_beside(tmp_path):
    for name, kind in (('x.wav', 'WAV'), ('x.flac', 'FLAC')):
        path = tmp_path / name / name
        M.save_audio(path, 3 * speech(0.5) / speech(0.5).abs().max())
        assert 0.98 < float(load_audio(path).abs().max()) <= 0.99
        assert os.listdir(tmp_path / name) == [name] and soundfile.info(path).format == kind


# -----------------------------------------------------------------------------
# Spectra and the offline encoder


def mel_of(wave):
    """torchaudio's log mel energies of (samples,), frame t centred on 160 t + 80."""
    mel = torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=64, center=False)
    return mel(F.pad(wave, (176, 176))).clamp(min=1e-7).log().T


def test_log_mel_is_that_of_torchaudio():
    for samples in (0, 1, 159, 160, 639, 640, 16001):
        assert M.log_mel(torch.zeros(samples)).shape == (max(1, samples // 160), 64)
    wave = torch.cat([speech(31.0), speech(31.0)])  # more than is processed at once
    assert torch.allclose(M.log_mel(wave), mel_of(wave), atol=2e-3)


def test_mfcc_is_its_definition():
    mel = mel_of(speech(2.0)).numpy().astype(float)
    energy = np.log(np.exp(mel).mean(1))
    loud = max(-7, np.sort(energy)[int(0.95 * 199)])
    halves = np.maximum(mel + 9 - loud, 0).reshape(100, 2, 64).mean(1)
    order = np.arange(13)
    cosines = np.cos(np.outer(order, np.arange(64) + 0.5) * np.pi / 64) / 64**0.5
    weight = np.where(order == 0, 0.4, np.maximum(order, 1) ** 0.3)
    cepstra = (halves @ (cosines.T * weight)).reshape(50, 26)
    padded = cepstra[[0, *range(50), -1]]
    ours = UnitEncoder.from_pretrained('mfcc').features(speech(2.0))
    assert np.allclose(ours, np.hstack([cepstra, 0.8 * (padded[2:] - padded[:-2])]), atol=2e-3)


def fit(n_units, seeds=range(4)):
    """An MFCC encoder whose units are fitted to some speech."""
    encoder = UnitEncoder.from_pretrained('mfcc')
    encoder.fit(torch.cat([encoder.features(speech(8, seed)) for seed in seeds]), n_units)
    return encoder


def units_of(encoder, features):
    """The units of a wave that has these features."""
    encoder.features = lambda wave: features
    return encoder.encode(None)


def test_mfcc_units_do_not_depend_on_loudness_and_count_whole_frames():
    encoder = fit(40)
    for seconds, frames in ((3.0, 75), (0.01, 1), (0, 1), (6.3, 157)):
        wave = speech(seconds, 7)
        units = encoder.encode(wave)
        assert len(units) == frames and encoder.frame_rate == 25 and encoder.n_units == 40
        assert (encoder.encode(wave * 0.05) == units).float().mean() > 0.98


def test_fitted_units_and_k_means_files_against_scikit_learn(tmp_path):
    from sklearn.cluster import KMeans

    x = torch.randn(6000, 6) * torch.linspace(0.3, 2, 6)
    found, again = (UnitEncoder.from_pretrained('mfcc') for _ in range(2))
    found.fit(x, 40)
    again.fit(x, 40)
    theirs = KMeans(40, n_init=3, random_state=np.random.RandomState(0)).fit(x.numpy())
    squared = torch.cdist(x, found.centroids).square().amin(1).mean()
    assert squared < 1.05 * theirs.inertia_ / len(x)
    assert torch.equal(found.centroids, again.centroids)
    for frames, mistake in ((x[:5], 'speech to fit on'), (torch.zeros(50, 6), 'silent')):
        refused(mistake, found.fit, frames, 12)
    joblib.dump(theirs, tmp_path / 'km.bin')
    encoder = UnitEncoder.from_pretrained('mfcc', kmeans=str(tmp_path / 'km.bin'))
    refused('no k-means for 52 features', encoder.encode, speech(1.0))
    assert np.array_equal(units_of(encoder, x), theirs.predict(x.numpy()))


# -----------------------------------------------------------------------------
# HuBERT and its like

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
SMALL |= dict(conv_dim=(24,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
LARGE = dict(feat_extract_norm='layer', do_stable_layer_norm=True, conv_bias=True)
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2, 2), (5, 2, 2, 2, 2, 2, 2, 2)
NETS = {
    'HuBERT base': ('Hubert', {}),
    'mHuBERT': ('Hubert', dict(conv_dim=(24,) * 8, conv_kernel=KERNELS, conv_stride=STRIDES)),
    'HuBERT large, batch norm': ('Hubert', LARGE | dict(conv_pos_batch_norm=True)),
    'wav2vec 2': ('Wav2Vec2', dict(conv_bias=True)),
    'wav2vec 2, adapter': ('Wav2Vec2', dict(LARGE, add_adapter=True)),
    'WavLM': ('WavLM', {}),
    'WavLM large': ('WavLM', LARGE),
}


def save_net(name, folder, **change):
    """transformers' net of the true layout, with norms and biases that do something."""
    family, more = NETS[name]
    config = getattr(transformers, family + 'Config')(**SMALL | more | change)
    net = getattr(transformers, family + 'Model')(config).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    net.save_pretrained(folder)
    return net


@torch.no_grad()
def hidden_states(net, wave, layer):
    return net(wave[None], output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize('name', NETS)
def test_units_are_transformers_hidden_states_and_the_nearest_centroid(name, tmp_path):
    net = save_net(name, tmp_path)
    # the raw wave, whatever this says
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(do_normalize=True)))
    for layer in range(4):
        encoder = UnitEncoder.from_pretrained(str(tmp_path), layer=layer, kmeans='')
        assert encoder.frame_rate == (25 if name == 'mHuBERT' else 50)
        assert len(encoder.net.encoder.layers) == layer
        for i, seconds in enumerate((1.0, 0.4, 2.03)):
            wave = speech(seconds, i) + 0.01
            theirs = hidden_states(net, wave, layer)
            assert torch.equal(encoder.features(wave), theirs)
            encoder.centroids = theirs[torch.randperm(len(theirs))[:9]] + 0.01
            nearest = torch.cdist(theirs.double(), encoder.centroids.double()).argmin(1)
            assert torch.equal(encoder.encode(wave), nearest)
        assert len(encoder.encode(wave[:50])) == 1  # shorter than a frame
    refused('layer 4', UnitEncoder.from_pretrained, str(tmp_path), layer=4, kmeans='')
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors.pop('encoder.layers.0.layer_norm.weight')
    save_file(tensors, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
    refused('missing.*0.layer_norm', UnitEncoder.from_pretrained, str(tmp_path), layer=1)


@pytest.mark.parametrize('name', ('mHuBERT', 'WavLM large'))
def test_long_recordings_are_joined_on_the_frame_grid(name, tmp_path):
    save_net(name, tmp_path)
    wave = torch.cat([speech(5.0, seed) for seed in range(4)])
    encoder = UnitEncoder.from_pretrained(str(tmp_path), layer=0, kmeans='')
    assert encoder.stretch == (100 if 'WavLM' in name else 300)
    whole = encoder.features(wave)
    for encoder.stretch in (4, 19.9):
        parts = encoder.features(wave)
        assert parts.shape == whole.shape
        # up to attention a layer norm's net is local; a group norm sees its part
        assert torch.allclose(parts, whole, atol=2e-4 if 'large' in name else 1.5)
        assert np.corrcoef(parts.flatten(), whole.flatten())[0, 1] > 0.99


# -----------------------------------------------------------------------------
# Files of encoders


def test_a_saved_encoder_is_loaded_again(tmp_path):
    """Of a net from a folder the path is saved, of which the content must be the same."""
    save_net('mHuBERT', tmp_path / 'net')
    encoder = UnitEncoder.from_pretrained(str(tmp_path / 'net'), layer=2, kmeans='')
    encoder.fit(encoder.features(speech(4.0, 1)), 10)
    encoder.save_pretrained(tmp_path / 'encoder')
    assert sorted(os.listdir(tmp_path / 'encoder')) == ['encoder.json', 'encoder.safetensors']
    assert os.path.getsize(tmp_path / 'encoder' / 'encoder.safetensors') < 2000
    units = encoder.encode(speech(2.0, 2))
    for _ in range(2):  # what was loaded can be saved again
        again = UnitEncoder.from_pretrained(str(tmp_path / 'encoder'))
        assert torch.equal(again.encode(speech(2.0, 2)), units)
        assert again.encoder_id == encoder.encoder_id and again.encoder_id.startswith('hubert-')
        again.save_pretrained(tmp_path / 'encoder')
    load = UnitEncoder.from_pretrained
    refused('layer 2, not 1', load, str(tmp_path / 'encoder'), layer=1)
    save_net('mHuBERT', tmp_path / 'net')
    assert load(str(tmp_path / 'encoder')).encoder_id != encoder.encoder_id
    os.rename(tmp_path / 'net', tmp_path / 'gone')
    refused(f'the net of the encoder: .*{tmp_path}/net', load, str(tmp_path / 'encoder'))


def test_fitting_does_not_depend_on_the_number_of_threads():
    features = torch.randn(20_000, 26, generator=torch.Generator().manual_seed(0))
    ids = set()
    for threads in (1, 2):
        encoder = UnitEncoder.from_pretrained('mfcc')
        with threadpool_limits(threads):
            encoder.fit(features, 200)
        ids.add(encoder.encoder_id)
    assert len(ids) == 1


def test_encoder_ids_differ_where_units_do(tmp_path):
    """For another net, layer or centroids, and for any other setting of a kind."""
    ids, places = [], [('a', 1), ('a', 2), ('b', 1), ('mfcc', None)]
    for folder, layer in places:
        if layer == 1:
            save_net('HuBERT base', tmp_path / folder)
        kind, where = ('hubert', str(tmp_path / folder)) if layer else ('mfcc', 'mfcc')
        first, second = (UnitEncoder.from_pretrained(where, layer, kmeans='') for _ in range(2))
        first.centroids = second.centroids = torch.ones(5, 32 if layer else 26)
        assert first.encoder_id == second.encoder_id
        ids.append(first.encoder_id)
        for key in M.SETTINGS[kind]:
            second.config[key] += 1
            ids.append(second.encoder_id)
        second.centroids = second.centroids + 1
        ids.append(second.encoder_id)
        assert set(second.config) - {'kind', 'name', 'model', 'encoder_id'} == set(
            M.SETTINGS[kind]
        )  # none is missing
    assert len(set(ids)) == len(ids)


def test_folders_of_earlier_versions_load_and_those_of_strangers_are_one_line(tmp_path):
    config = dict(kind='mfcc', name='mfcc', frame_rate=25.0, n_cep=13, lifter=0.3, c0=0.4)
    config |= dict(range=9.0, vocoder='../../etc', fitted='100')
    tensors = dict(centroids=torch.arange(130).view(5, 26).float())
    save_file(tensors, tmp_path / 'encoder.safetensors')
    for change in ({}, dict(kind='evil'), dict(kind='hubert'), dict(switch=1.0)):
        content = json.dumps(config | dict(n_units=5) | change)
        (tmp_path / 'encoder.json').write_text(content)
        if change:
            refused(str(tmp_path), UnitEncoder.from_pretrained, str(tmp_path))
            continue
        old = UnitEncoder.from_pretrained(str(tmp_path))
        assert old.encoder_id == 'mfcc-7871ac1c7b7a' and len(old.encode(speech(1.0))) == 25
        old.save_pretrained(tmp_path)
        assert UnitEncoder.from_pretrained(str(tmp_path)).encoder_id == old.encoder_id


def test_the_public_encoder_offline(tmp_path, monkeypatch):
    """Messages name what to put where; then it is what it promises, and only then."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    load = UnitEncoder.from_pretrained
    refused('slprl/mhubert-base-25hz', load, 'mhubert25', kmeans='')
    net = save_net('mHuBERT', tmp_path / 'net', num_hidden_layers=12)
    monkeypatch.setitem(M.ENCODERS['mhubert25'], 'model', str(tmp_path / 'net'))
    theirs = hidden_states(net, F.pad(speech(1.3), (40, 40)), 11)
    path = tmp_path / 'checkpoints' / 'published.safetensors'
    url = (tmp_path / 'gone' / path.name).as_uri()
    monkeypatch.setitem(M.PUBLISHED, 'mhubert25', (url, '0' * 64))
    refused(f'{url} .a copy may be put at {path}', load, 'mhubert25')
    save_file(dict(centroids=theirs[:5].clone()), path)
    refused('sha256 differs.: delete it', load, 'mhubert25')
    monkeypatch.setitem(M.PUBLISHED, 'mhubert25', (url, M.file_hash(path)))
    encoder = load('mhubert25')
    assert torch.equal(encoder.features(speech(1.3)), theirs)
    encoder.save_pretrained(tmp_path / 'encoder')
    again = load(str(tmp_path / 'encoder'))
    assert again.encoder_id == encoder.encoder_id == 'mhubert25'
    assert load('mhubert25', kmeans=str(path)).encoder_id.startswith('hubert-')
    again.fit(torch.randn(50, 32), 5)
    assert again.encoder_id.startswith('hubert-')


# -----------------------------------------------------------------------------
# k-means files


class Malice:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('compress', (0, 3))
def test_a_malicious_kmeans_file_runs_nothing(compress, tmp_path):
    mark, path = tmp_path / 'mark', str(tmp_path / 'km.bin')
    evil = Malice(os.system, f'touch {mark}')
    bad = [evil, Malice(eval, f'open({str(mark)!r}, "w")'), np.array([evil], dtype=object)]
    bad.append(np.array([(1, evil)], dtype=[('a', 'f4'), ('b', object)]))
    bad.append(dict(cluster_centers_=np.zeros((2, 2)), extra=[evil]))
    bad.append(Malice(np.ndarray, (1,), Malice(np.dtype, 'O'), b'A' * 8))  # any address
    for content in bad:
        joblib.dump(content, path, compress=compress)
        refused('cannot be read', M.read_kmeans, path)
    with open(path, 'wb') as file:
        file.write(b'cbuiltins\ngetattr\n(cos\npath\nVsep\ntR.')
    refused('refused', M.read_kmeans, path)
    assert not mark.exists()


def test_what_is_no_kmeans_file_is_one_line(tmp_path):
    (tmp_path / 'km.bin').write_bytes(pickle.dumps(3))
    save_file(dict(centroids=torch.tensor([[float('nan')]])), tmp_path / 'nan.safetensors')
    for name in ('km.bin', 'nowhere', 'nan.safetensors'):
        refused(name, M.read_kmeans, str(tmp_path / name))


# -----------------------------------------------------------------------------
# Vocoders

UNITS = torch.tensor([29, 0, 4, 8, 4, 2, 11])
SCALES = dict(hifi_gan=0.82, dur_predictor=5)  # of random weights: sound that is not clipped


def save_hifigan(folder, speakers=0, styles=0):
    """A random generator of the true layout as .pt and .json -> transformers' own, the path."""
    config = transformers.SeamlessM4TConfig(
        unit_hifi_gan_vocab_size=30,
        unit_embed_dim=12,
        spkr_embed_dim=12 if speakers else 0,
        lang_embed_dim=12 if styles else 0,
        vocoder_num_spkrs=max(1, speakers),
        vocoder_num_langs=max(1, styles),
        upsample_initial_channel=32,
    )
    oracle = transformers.models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TCodeHifiGan(config)
    names = {'unit_embedding': 'dict', 'speaker_embedding': 'spkr', 'language_embedding': 'style'}
    names |= {'hifi_gan.': '', 'upsampler': 'ups', 'conv1.': 'conv1.0.', 'conv2.': 'conv2.0.'}
    state = {}
    for name, tensor in oracle.state_dict().items():
        tensor.mul_(SCALES.get(name.split('.')[0], 3))
        normed = name.startswith('hifi_gan.') and name.endswith('.weight')
        for theirs, published in names.items():
            name = name.replace(theirs, published)
        if normed:  # published with weight norm: w = g v / |v|
            norm = tensor.flatten(1).norm(dim=1).view(-1, 1, 1)
            state |= {name + '_g': norm, name + '_v': 3 * tensor}
        elif tensor.numel():
            state[name] = tensor
    keys = ('upsample_rates', 'upsample_kernel_sizes', 'resblock_kernel_sizes')
    values = {key: getattr(config, key) for key in (*keys, 'resblock_dilation_sizes')}
    torch.save(dict(generator=state), f'{folder}/g.pt')
    with open(f'{folder}/g_config.json', 'w') as file:
        json.dump(values | dict(sampling_rate=16000), file)
    return oracle.eval(), f'{folder}/g.pt'


@pytest.mark.parametrize(('speakers', 'styles'), ((0, 0), (4, 0), (4, 3)))
@torch.no_grad()
def test_hifigan_is_the_published_function(speakers, styles, tmp_path):
    oracle, path = save_hifigan(tmp_path, speakers, styles)
    vocoder = UnitVocoder.from_pretrained(path)
    hop = int(np.prod(vocoder.config['upsample_rates']))
    assert (vocoder.n_units, vocoder.sample_rate, vocoder.frame_rate) == (30, 16000, 16000 / hop)
    embedded = oracle.unit_embedding(UNITS)[None]
    expected = (oracle.dur_predictor(embedded)[0].exp() - 1).round().clamp(min=1)
    durations = vocoder.durations(UNITS)
    assert durations.tolist() == expected.tolist() and 1 < durations.max() < 50
    parts = [embedded[0].repeat_interleave(durations, 0)]
    for table, count in (oracle.speaker_embedding, speakers), (oracle.language_embedding, styles):
        parts += [table.weight[0].expand(len(parts[0]), -1)] if count else []
    wave = oracle.hifi_gan(torch.cat(parts, 1).T[None])[0]
    assert 1e-4 < wave.std() < 0.9 and len(wave) == hop * durations.sum()
    ours = vocoder.decode(UNITS)
    assert torch.allclose(ours, wave, atol=0.01 * float(wave.std()))
    weights = torch.load(path, weights_only=True)
    del weights['generator']['conv_post.bias']
    torch.save(weights, path)
    refused('conv_post.bias', UnitVocoder.from_pretrained, path)
    vocoder.save_pretrained(tmp_path / 'vocoder')
    again = UnitVocoder.from_pretrained(str(tmp_path / 'vocoder'))
    assert torch.equal(again.decode(UNITS), ours)


def test_the_public_vocoder_is_checked_by_hash_and_names_its_encoder(tmp_path, monkeypatch):
    (tmp_path / 'checkpoints').mkdir()
    _, path = save_hifigan(tmp_path / 'checkpoints')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for end in '.pt', '_config.json':
        published = 'https://host.invalid/g' + end, M.file_hash(f'{tmp_path}/checkpoints/g{end}')
        monkeypatch.setitem(M.PUBLISHED, 'hifigan25' + end, published)
    public, plain = (UnitVocoder.from_pretrained(where) for where in ('hifigan25', path))
    assert torch.equal(public.decode(UNITS), plain.decode(UNITS))
    assert public.encoder_id == 'mhubert25' and plain.encoder_id is None
    (tmp_path / 'checkpoints/g.pt').write_bytes(b'something else')
    refused('sha256', UnitVocoder.from_pretrained, 'hifigan25')


def test_the_table_speaks_its_units(tmp_path):
    """What it says has the same units, the tempo and the level; saved is loaded."""
    encoder = fit(30)
    said = [(speech(6, seed), encoder.encode(speech(6, seed))) for seed in range(5)]
    UnitVocoder.fit(said, encoder).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['vocoder.json', 'vocoder.safetensors']
    vocoder = UnitVocoder.from_pretrained(str(tmp_path))
    assert vocoder.encoder_id == encoder.encoder_id
    units = encoder.encode(speech(6, 9))
    runs, durations = M.dedup(units)
    wave = vocoder.decode(runs, durations)
    assert len(wave) == 640 * len(units) and torch.equal(wave, vocoder.decode(runs, durations))
    assert (encoder.encode(wave) == units).float().mean() > 0.9
    assert abs(wave.mean()) < 1e-3 and 0.5 < wave.std() / 0.08 < 1.2
    rounded, mean = vocoder.durations(runs), vocoder.tensors['durations'][runs]
    assert (rounded >= 1).all() and (rounded.cumsum(0) - mean.cumsum(0)).abs().max() <= 0.51
    assert len(vocoder.decode([])) == 0 and len(vocoder.decode([3], [1])) == 640


def test_a_strangers_vocoder_is_one_line(tmp_path):
    UnitVocoder.fit([(speech(1), [4] * 25)], fit(5)).save_pretrained(tmp_path / 'bad')
    about = tmp_path / 'bad' / 'vocoder.json'
    config = json.loads(about.read_text())
    for change in (dict(kind='neural'), dict(frame_rate='fast'), dict(n_units=10**12)):
        about.write_text(json.dumps(config | change))
        refused('vocoder .*bad cannot be read', UnitVocoder.from_pretrained, str(tmp_path / 'bad'))
    for name in ('none', 'none.pt'):
        refused('none', UnitVocoder.from_pretrained, str(tmp_path / name))


# -----------------------------------------------------------------------------
# Finding and reading data


def test_find_audio_sorts_and_follows_links_once(tmp_path):
    for name in ('b/2.wav', 'b/1.FLAC', 'a.mp3', 'b/x.m4a', 'b/z.txt', '.hidden.wav'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'b' / 'loop').symlink_to(tmp_path)
    found = M.find_audio(str(tmp_path))
    assert [os.path.relpath(path, tmp_path) for path in found] == ['a.mp3', 'b/1.FLAC', 'b/2.wav']
    assert M.find_audio(str(tmp_path / 'a.mp3')) == [str(tmp_path / 'a.mp3')]
    for where, message in (('none', 'none is no file'), ('b/loop/b', 'no folder with .parquet')):
        refused(message, M.find_audio, str(tmp_path / where), ('.parquet',))


def test_parquet_rows_keep_nulls_and_audio_bytes(tmp_path):
    pytest.importorskip('datasets')
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    rows = [dict(text=f't{i}', audio=dict(bytes=b'%d' % i, path=None)) for i in range(40)]
    rows[7]['audio'] = rows[8]['text'] = None
    (tmp_path / 'data').mkdir()
    for i, part in enumerate((rows[:25], rows[25:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / 'data' / f'train-{i}.parquet')
    names = list(M.open_shards(str(tmp_path / 'data')))
    assert [os.path.basename(name) for name in names] == ['train-0.parquet', 'train-1.parquet']
    assert list(M.read_parquet(str(tmp_path / 'data'))) == rows
    assert list(M.read_parquet(names[1])) == rows[25:]
    (tmp_path / 'bad.parquet').write_bytes(b'no rows')
    refused('bad.parquet', lambda: list(M.read_parquet(str(tmp_path / 'bad.parquet'))))
    # a name is not a pattern
    for name in ('1', '[1]', '*'):
        pq.write_table(pa.table(dict(text=[name])), tmp_path / f'{name}.parquet')
        assert list(M.read_parquet(str(tmp_path / f'{name}.parquet'))) == [dict(text=name)]
    hub = f'hub:{tmp_path}'  # a local folder in place of a name
    shards = [f'{hub}:train#0/2', f'{hub}:train#1/2']
    assert shards == list(M.open_shards(hub)) == list(M.open_shards(hub + ':train'))
    refused('train#1/3', M.open_shards, f'{hub}:train#1/3')
    assert [row for shard in shards for row in M.read_parquet(shard)] == rows
    assert list(M.read_parquet(hub)) == rows
