"""The vocoders: HiFi-GAN against modules of the published layout, the table against the encoder it
belongs to, and for all: alone = among others, stream = whole, saved = loaded."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as M
import prepare_units

# -----------------------------------------------------------------------------
# Vocoders to try

HIFIGAN = dict(
    num_embeddings=30,
    embedding_dim=12,
    model_in_dim=12,
    upsample_rates=[5, 4, 4, 4, 2],
    upsample_kernel_sizes=[11, 8, 8, 8, 4],
    upsample_initial_channel=32,
    resblock_kernel_sizes=[3, 7, 11],
    resblock_dilation_sizes=[[1, 3, 5]] * 3,
    sampling_rate=16000,
    dur_predictor_params=dict(
        encoder_embed_dim=12, var_pred_hidden_dim=10, var_pred_kernel_size=3, var_pred_dropout=0.5
    ),
)


class ResBlock(nn.Module):
    def __init__(self, channels, kernel, dilations):
        super().__init__()

        def conv(d):
            padding = (kernel * d - d) // 2
            return nn.utils.weight_norm(
                nn.Conv1d(channels, channels, kernel, dilation=d, padding=padding)
            )

        self.convs1 = nn.ModuleList([conv(d) for d in dilations])
        self.convs2 = nn.ModuleList([conv(1) for _ in dilations])


class Durations(nn.Module):
    def __init__(self, width, hidden, kernel):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv1d(width, hidden, kernel, padding=(kernel - 1) // 2), nn.ReLU()
        )
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, kernel, padding=1), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)


class CodeHiFiGAN(nn.Module):
    """The modules as published, one utterance at a time, no folding and no masks: the oracle."""

    def __init__(self, c):
        super().__init__()
        norm, self.c = nn.utils.weight_norm, c
        self.dict = nn.Embedding(c['num_embeddings'], c['embedding_dim'])
        if c.get('multispkr'):
            self.spkr = nn.Embedding(c['num_speakers'], c['embedding_dim'])
        if c.get('multistyle'):
            self.style = nn.Embedding(c['num_styles'], c['embedding_dim'])
        p = c['dur_predictor_params']
        self.dur_predictor = Durations(
            p['encoder_embed_dim'], p['var_pred_hidden_dim'], p['var_pred_kernel_size']
        )
        wide = c['upsample_initial_channel']
        self.conv_pre = norm(nn.Conv1d(c['model_in_dim'], wide, 7, 1, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, rate in enumerate(c['upsample_rates']):
            kernel, narrow = c['upsample_kernel_sizes'][i], wide // 2 ** (i + 1)
            up = nn.ConvTranspose1d(2 * narrow, narrow, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(norm(up))
            for j, size in enumerate(c['resblock_kernel_sizes']):
                self.resblocks.append(ResBlock(narrow, size, c['resblock_dilation_sizes'][j]))
        self.conv_post = norm(nn.Conv1d(wide // 2 ** len(c['upsample_rates']), 1, 7, 1, padding=3))

    def durations(self, units):
        d, x = self.dur_predictor, self.dict(units)[None]
        x = d.ln1(d.conv1(x.transpose(1, 2)).transpose(1, 2))
        x = d.ln2(d.conv2(x.transpose(1, 2)).transpose(1, 2))
        return (d.proj(x)[0, :, 0].exp() - 1).round().long().clamp(min=1)

    def forward(self, frames, speaker=0, style=0):
        x = self.dict(frames).T[None]
        for name, row in (('spkr', speaker), ('style', style)):
            if hasattr(self, name):
                x = torch.cat(
                    (x, getattr(self, name).weight[row][None, :, None].expand(-1, -1, x.shape[-1])),
                    dim=1,
                )
        x, n = self.conv_pre(x), len(self.c['resblock_kernel_sizes'])
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            outputs = []
            for block in self.resblocks[i * n : (i + 1) * n]:
                y = x
                for conv1, conv2 in zip(block.convs1, block.convs2, strict=True):
                    y = conv2(F.leaky_relu(conv1(F.leaky_relu(y, 0.1)), 0.1)) + y
                outputs.append(y)
            x = torch.stack(outputs).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))[0, 0]


def save_hifigan(folder, seed=0, **changes):
    """A random generator of the true layout as .pt + .json; -> (oracle, path)."""
    torch.manual_seed(seed)
    c = dict(HIFIGAN, **changes)
    oracle = CodeHiFiGAN(c).eval()
    for name, p in oracle.named_parameters():
        if name.endswith('weight_g'):
            p.data *= torch.rand_like(p) + 0.8  # or folding a norm of 1 would go unseen
    oracle.dur_predictor.proj.weight.data *= 3
    path = os.path.join(folder, 'g.pt')
    torch.save(dict(generator=oracle.state_dict()), path)
    with open(os.path.join(folder, 'g_config.json'), 'w') as file:
        json.dump(c, file)
    return oracle, path


UNITS = [
    torch.tensor([3, 7, 1]),
    torch.arange(30),
    torch.tensor([5]),
    torch.tensor([29, 0, 4, 8, 4, 2, 11]),
]


def babble(seconds, seed=0, rate=16000):
    """Something like speech: vowels of moving formants over a moving pitch, hisses and pauses."""
    rng = np.random.default_rng(seed)
    vowels = ((500, 1200, 2500), (300, 2200, 2900), (700, 1100, 2500), (350, 800, 2300))
    parts, total, pitch = [], 0, rng.uniform(90, 220)
    while total < seconds * rate:
        n = int(rate * rng.uniform(0.06, 0.22))
        kind = rng.choice(3, p=(0.65, 0.2, 0.15))
        if kind == 0:  # a vowel
            moving = pitch * (1 + 0.1 * np.sin(5 * np.arange(n) / rate))
            source = np.diff(np.floor(np.cumsum(moving / rate)), prepend=0) > 0
            peaks = vowels[rng.integers(4)]
        else:  # a hiss or a pause
            source = rng.normal(size=n) * (0.05 if kind == 1 else 1e-4)
            peaks = (4500, 6000)
        hertz = np.fft.rfftfreq(n, 1 / rate)
        tube = sum(1 / (1 + ((hertz - peak) / 120) ** 2) for peak in peaks)
        sound = np.fft.irfft(np.fft.rfft(source) * tube, n) * np.hanning(n) ** 0.3
        parts.append(sound * rng.uniform(0.5, 1))
        total += n
    wave = np.concatenate(parts)[: int(seconds * rate)]
    return torch.from_numpy((0.3 * wave / np.abs(wave).max()).astype(np.float32))


def babbled_units(wave, frame_rate=25.0):
    """(samples,) -> (frames,) of 40 units that are plain clusters of loudness and tilt."""
    mel = M.log_mel(wave)[:: round(100 / frame_rate)][: len(wave) // round(16000 / frame_rate)]
    loud = ((mel.mean(1) + 16) / 16 * 10).long().clamp(0, 9)
    tilt = ((mel[:, :20].mean(1) - mel[:, 40:].mean(1)) / 3 + 2).long().clamp(0, 3)
    return loud * 4 + tilt


def fit_table(frame_rate=25.0):
    """A table of 40 units on a minute of babble -> vocoder, list of (frames,) units."""
    waves = [babble(6, seed) for seed in range(10)]
    units = [babbled_units(wave, frame_rate) for wave in waves]
    table = M.UnitTable(40, frame_rate)
    for i, (wave, u) in enumerate(zip(waves, units, strict=True)):
        table.add(wave.numpy() if i % 2 else wave, u)
    return table.finish(), units


def random_net(frame_rate=25.0, voices=('a', 'b'), seed=0):
    """A neural vocoder of 30 units that was not trained."""
    torch.manual_seed(seed)
    config = dict(kind='neural', n_units=30, frame_rate=frame_rate, sample_rate=16000)
    config |= dict(voices=list(voices), width=24, kernel=7, blocks=2)
    net = M.NeuralVoice(config)
    with torch.no_grad():
        net.base.weight.mul_(0.5).sub_(5)
        net.head.bias.view(net.steps, -1)[:, -1] = 5.0  # 148 Hz
    return M.UnitVocoder(config, net.state_dict())


def any_vocoder(kind, folder):
    """A vocoder of each kind, of at least 30 units."""
    if kind == 'table':
        return fit_table()[0]
    if kind == 'neural':
        return random_net()
    return M.UnitVocoder.from_pretrained(save_hifigan(str(folder))[1])


KINDS = ('table', 'neural', 'hifigan')

# -----------------------------------------------------------------------------
# What holds for all


@pytest.mark.parametrize('kind', KINDS)
def test_alone_as_among_others_and_every_time(kind, tmp_path):
    voc = any_vocoder(kind, tmp_path)
    units = UNITS + [torch.zeros(0, dtype=torch.long)]
    durations = voc.durations(units)
    for d, u in zip(durations, units, strict=True):
        assert len(d) == len(u) and (d >= 1).all() and d.equal(voc.durations([u])[0])
    waves = voc.decode(units)
    for u, d, wave in zip(units, durations, waves, strict=True):
        assert len(wave) == int(d.sum()) * voc.hop and wave.dtype == torch.float32
        assert wave.abs().max() <= M.VOICE_PEAK + 1e-6 if len(wave) else True
        torch.testing.assert_close(voc.decode([u])[0], wave, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(voc.decode([u], [d])[0], wave, atol=2e-5, rtol=1e-4)
    assert voc.decode([]) == [] == voc.durations([])
    assert voc.decode(units)[1].equal(waves[1])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', (5, 12, 50))
def test_stream_is_the_whole(kind, size, tmp_path):
    """Whatever the pieces: the samples of one call, at the voice's own level."""
    voc = any_vocoder(kind, tmp_path)
    generator = torch.Generator().manual_seed(size)
    units = torch.randint(30, (90,), generator=generator)
    given = torch.randint(1, 4, (20,), generator=generator)
    durations = torch.cat((given, voc.durations([units[20:]])[0]))
    with torch.inference_mode():
        whole = voc.voice.speak(units, durations)
    whole = M.limit_peaks(whole * (M.VOICE_LEVEL / voc.voice.level)).cpu()
    pieces = list(voc.stream(units[20:].split(size), (units[:20], given)))
    assert len(pieces) > (1 if size == 50 else 3)
    wave = torch.cat(pieces)
    torch.testing.assert_close(wave[80:-80], whole[80:-80], atol=2e-5, rtol=1e-3)
    assert wave[0] == 0 == wave[-1] and len(wave) == len(whole)
    # less context than `reach` says would not do
    voc.voice.reach = 1
    short = torch.cat(list(voc.stream(units[20:].split(size), (units[:20], given))))
    assert (short - wave).abs().max() > 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_stream_of_little_and_of_nothing(kind, tmp_path):
    voc = any_vocoder(kind, tmp_path)
    none = torch.zeros(0, dtype=torch.long)
    assert list(voc.stream([])) == [] == list(voc.stream([none, none]))
    [one] = voc.stream([torch.tensor([3])])
    assert len(one) == int(voc.durations([torch.tensor([3])])[0].sum()) * voc.hop
    [prompt] = voc.stream([], (torch.tensor([3]), torch.tensor([2])))
    assert len(prompt) == 2 * voc.hop
    with pytest.raises(M.InputError, match='unit 99'):
        list(voc.stream([torch.tensor([99])]))


def test_energy_at_the_joints_of_a_stream():
    """Within 1 dB of what it is in the whole, at the joints as elsewhere."""
    voc, units = fit_table()
    for u in [M.dedup(u)[0] for u in units[:4]]:
        pieces = list(voc.stream(u.split(9)))
        joints = torch.tensor([len(p) for p in pieces]).cumsum(0)[:-1]
        wave = torch.cat(pieces)
        with torch.inference_mode():
            whole = voc.voice.speak(u, voc.durations([u])[0]) * M.VOICE_LEVEL / voc.voice.level
        for joint in joints.tolist():
            here, there = (x[joint - 40 : joint + 40].square().mean() for x in (wave, whole))
            assert abs(10 * torch.log10((here + 1e-9) / (there + 1e-9))) < 1


@pytest.mark.parametrize('kind', ('table', 'neural'))
def test_saved_is_loaded(kind, tmp_path):
    voc = any_vocoder(kind, tmp_path)
    voc.save_pretrained(str(tmp_path / 'v'))
    again = M.UnitVocoder.from_pretrained(str(tmp_path / 'v'))
    assert sorted(os.listdir(tmp_path / 'v')) == ['vocoder.json', 'vocoder.safetensors']
    assert again.config == voc.config and again.decode(UNITS)[1].equal(voc.decode(UNITS)[1])


def spoil(tmp_path, kind, config=None, **tensors):
    """A saved vocoder with some of its config or tensors changed -> its folder."""
    voc = any_vocoder(kind, tmp_path)
    voc.config |= config or {}
    voc.tensors |= tensors
    voc.tensors = {name: tensor for name, tensor in voc.tensors.items() if tensor is not None}
    voc.save_pretrained(str(tmp_path / 'bad'))
    return str(tmp_path / 'bad')


@pytest.mark.parametrize(
    ('kind', 'config', 'tensors'),
    [
        ('table', dict(kind='drum'), {}),
        ('table', dict(frame_rate='fast'), {}),
        ('table', dict(n_units=7), {}),
        ('table', {}, dict(mel=None)),
        ('table', {}, dict(mel=torch.zeros(40, 4))),
        ('neural', dict(width=32), {}),
        ('neural', dict(width=10**6), {}),
        ('neural', dict(blocks=10**8), {}),
        ('neural', dict(kernel=10**9), {}),
        ('neural', dict(voices=3), {}),
        ('neural', {}, {'head.weight': None}),
        ('neural', {}, {'unit.weight': torch.zeros(29, 24)}),
    ],
)
def test_files_of_strangers_are_one_line(tmp_path, kind, config, tensors):
    folder = spoil(tmp_path, kind, config, **tensors)
    with pytest.raises(M.InputError, match='bad/vocoder') as error:
        M.UnitVocoder.from_pretrained(folder)
    assert '\n' not in str(error.value)


def test_json_that_is_none(tmp_path):
    any_vocoder('table', tmp_path).save_pretrained(str(tmp_path / 'bad'))
    for text in ('[1]', '3', '{', ''):
        (tmp_path / 'bad' / 'vocoder.json').write_text(text)
        with pytest.raises(M.InputError, match='bad/vocoder') as error:
            M.UnitVocoder.from_pretrained(str(tmp_path / 'bad'))
        assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# HiFi-GAN


def test_hifigan_is_the_published_function(tmp_path):
    oracle, path = save_hifigan(str(tmp_path))
    voc = M.UnitVocoder.from_pretrained(path)
    assert (voc.n_units, voc.sample_rate, voc.frame_rate, voc.hop) == (30, 16000, 25.0, 640)
    durations = voc.durations(UNITS)
    with torch.no_grad():
        for d, u in zip(durations, UNITS, strict=True):
            assert d.equal(oracle.durations(u))
        assert max(int(d.max()) for d in durations) > 1
        frames = [u.repeat_interleave(d) for u, d in zip(UNITS, durations, strict=True)]
        for u, d, f, spoken in zip(UNITS, durations, frames, voc.decode(UNITS), strict=True):
            one, reference = voc.voice.speak(u, d), oracle(f)
            assert len(one) == len(reference) == len(spoken) == 640 * len(f)
            assert reference.std() > 1e-3 and (one - reference).abs().max() < 1e-5
            torch.testing.assert_close(spoken, M.finish_wave(reference), atol=1e-4, rtol=1e-4)


def test_hifigan_speakers_styles_and_given_durations(tmp_path):
    several = dict(multispkr='_', num_speakers=4, multistyle=True, num_styles=3, model_in_dim=36)
    oracle, path = save_hifigan(str(tmp_path), 1, **several)
    voc, given = M.UnitVocoder.from_pretrained(path), [torch.full_like(u, 2) for u in UNITS]
    with torch.no_grad():
        for speaker, style in ((0, 0), (3, 2)):
            ours = voc.decode(UNITS, given, speaker=speaker, style=style)
            for one, u in zip(ours, UNITS, strict=True):
                reference = M.finish_wave(oracle(u.repeat_interleave(2), speaker, style))
                torch.testing.assert_close(one, reference, atol=1e-4, rtol=1e-4)
    with pytest.raises(M.InputError, match='spkr 4'):
        voc.decode(UNITS, given, speaker=4)


def test_hifigan_mistakes_are_one_line(tmp_path):
    save_hifigan(str(tmp_path))
    voc = M.UnitVocoder.from_pretrained(str(tmp_path / 'g.pt'))
    with pytest.raises(M.InputError, match='unit 30 is not among the 30'):
        voc.decode([torch.tensor([30])])
    (tmp_path / 'bad.pt').write_bytes(b'no pickle')
    (tmp_path / 'bad.json').write_text('{"upsample_rates": [2]}')
    torch.save(dict(generator={'dict.weight': torch.zeros(3, 4)}), tmp_path / 'half.pt')
    (tmp_path / 'half.json').write_text('{"upsample_rates": [2]}')
    state = torch.load(tmp_path / 'g.pt', weights_only=True)['generator']
    for name, gone in (('nose', 'resblocks.3.convs2.1.bias'), ('ear', 'dur_predictor.ln2.bias')):
        kept = {key: tensor for key, tensor in state.items() if key != gone}
        torch.save(dict(generator=kept), tmp_path / f'{name}.pt')
        (tmp_path / f'{name}.json').write_text(json.dumps(HIFIGAN))
    cases = [('bad.pt', 'no vocoder'), ('half.pt', 'no vocoder'), ('none', 'no vocoder')]
    cases += [('none.pt', 'no vocoder'), ('nose.pt', 'resblocks.3'), ('ear.pt', 'ln2.bias')]
    for name, word in cases:
        with pytest.raises(M.InputError, match=word) as error:
            M.UnitVocoder.from_pretrained(str(tmp_path / name))
        assert name in str(error.value) and '\n' not in str(error.value)


def test_public_vocoder_is_checked_by_hash(tmp_path, monkeypatch):
    _, path = save_hifigan(str(tmp_path))
    monkeypatch.setenv('SLAM_CACHE', str(tmp_path))
    hashes = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ('g.pt', 'g_config.json')
    }
    files = tuple((f'https://host.invalid/{name}', known) for name, known in hashes.items())
    monkeypatch.setitem(M.HIFIGAN, 'toy', files)
    toy, plain = (M.UnitVocoder.from_pretrained(where) for where in ('toy', path))
    assert toy.decode(UNITS)[1].equal(plain.decode(UNITS)[1])
    (tmp_path / os.path.basename(M.HIFIGAN['hifigan25'][0][0])).write_bytes(b'something else')
    with pytest.raises(M.InputError, match='sha256'):
        M.UnitVocoder.from_pretrained('hifigan25')


# -----------------------------------------------------------------------------
# Source and filter


def test_spectra_are_those_of_log_mel_and_invertible():
    wave = babble(1.0)
    spectra = M.frame_spectra(wave)
    power = (spectra.abs().square() @ M.mel_filters()).clamp(min=1e-7).log()
    torch.testing.assert_close(power, M.log_mel(wave), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(M.overlap_add(spectra), wave, atol=1e-5, rtol=1e-4)
    two = torch.stack((wave, wave.flip(0)))
    torch.testing.assert_close(M.overlap_add(M.frame_spectra(two)), two, atol=1e-5, rtol=1e-4)


def test_source_has_its_pitch_and_power_and_goes_on():
    pulses, noise = M.Source()(torch.full((100,), 99.7))
    amplitude, turns = (16000 / 99.7) ** 0.5, torch.arange(1, 100).double()  # of one second
    assert pulses.sum() / amplitude == pytest.approx(99, rel=1e-5)
    moment = (pulses * torch.arange(16000)).double().sum() / amplitude
    assert moment == pytest.approx(float((turns * 16000 / 99.7 - 1).sum()), rel=1e-5)
    assert 0.5 < pulses.square().mean() < 1.01  # a pulse between two samples is shared by both
    assert noise.square().mean() == pytest.approx(1, rel=0.05)
    pitch = 80 + 100 * torch.rand(100, generator=torch.Generator().manual_seed(0))
    whole, source, parts = M.Source()(pitch), M.Source(), []
    for start, stop in ((0, 30), (30, 31), (31, 100)):  # each begins 10 steps early
        first = max(0, start - 10)
        sound = source(pitch[first:stop], first * M.HOP, stop * M.HOP)
        parts.append([x[(start - first) * M.HOP :] for x in sound])
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(several), one, atol=1e-5, rtol=0)


def test_peaks_are_bent_and_nothing_else():
    wave = torch.linspace(-3, 3, 1001)
    bent = M.limit_peaks(wave, knee=0.7)
    assert bent.abs().max() <= M.VOICE_PEAK and (bent.diff() >= 0).all()
    assert bent[wave.abs() <= 0.7].equal(wave[wave.abs() <= 0.7])


# -----------------------------------------------------------------------------
# The table


@pytest.mark.parametrize('frame_rate', (25.0, 50.0))
def test_table_speaks_exact_frames_at_a_good_level(frame_rate):
    voc, units = fit_table(frame_rate=frame_rate)
    pairs = [M.dedup(u) for u in units[:4]]
    waves = voc.decode([u for u, _ in pairs], [d for _, d in pairs])
    for (_, d), wave in zip(pairs, waves, strict=True):
        assert len(wave) == int(d.sum()) * voc.hop
        assert abs(wave.mean()) < 1e-3 and wave[0] == 0 == wave[-1]
        assert 0.5 * M.VOICE_LEVEL < M.speech_level(wave) < 1.2 * M.VOICE_LEVEL
        assert wave.diff().abs().max() < 0.6  # no clicks
    predicted = voc.durations([u for u, _ in pairs])
    frames = sum(len(u) for u in units[:4])
    assert sum(int(d.sum()) for d in predicted) == pytest.approx(frames, rel=0.15)  # the tempo


def test_table_sounds_like_what_it_was_fitted_on():
    voc, units = fit_table()
    for u in units[:3]:
        frames = u[:150]
        wave = voc.voice.speak(frames, torch.ones_like(frames))
        mel, heard = voc.tensors['mel'][frames].flatten(0, 1), M.log_mel(wave)
        loud = mel.logsumexp(1) > mel.logsumexp(1).max() - 6
        assert heard.shape == mel.shape
        assert (heard - mel)[loud].mean(1).abs().median() < 0.5  # nepers of power, about 2 dB
        assert np.corrcoef(heard[loud].flatten(), mel[loud].flatten())[0, 1] > 0.95


def test_rounded_durations_keep_the_tempo():
    mean = 1 + torch.rand(500, generator=torch.Generator().manual_seed(0))
    rounded = M.round_durations(mean)
    assert (rounded >= 1).all() and (rounded.cumsum(0) - mean.cumsum(0)).abs().max() <= 0.51


# -----------------------------------------------------------------------------
# The net


def test_net_speaks_in_the_voice_that_was_asked_for():
    voc = random_net()
    one, two = (voc.decode(UNITS[1:2], speaker=speaker)[0] for speaker in (0, 1))
    assert len(one) == len(two) and not one.equal(two)
    with pytest.raises(M.InputError, match='speaker 2'):
        voc.decode(UNITS, speaker=2)


def test_places_by_hand():
    place = M.NeuralVoice.places(torch.tensor([1, 3]))
    wanted = [[0, 0.5, 1, 1], [np.log(3), 1 / 6, 1, 1 / 3], [np.log(3), 0.5, 1 / 2, 1 / 2]]
    wanted += [[np.log(3), 5 / 6, 1 / 3, 1]]
    torch.testing.assert_close(place, torch.tensor(wanted, dtype=torch.float32))
    assert M.NeuralVoice.places(torch.zeros(0, dtype=torch.long)).shape == (0, 4)


# -----------------------------------------------------------------------------
# Training the net


@pytest.mark.parametrize('hertz', (75, 110, 180, 320))
def test_pitch_of_pulses_is_found(hertz):
    pulses, noise = M.Source()(torch.full((150,), float(hertz)))
    tube = torch.exp(-torch.arange(200) / 30) * torch.cos(torch.arange(200) * 0.3)
    wave = F.conv1d(pulses[None, None], tube.flip(0)[None, None])[0, 0]
    found = prepare_units.track_pitch(wave + 0.01 * noise[: len(wave)])[5:-5]
    assert (found - hertz).abs().median() < 0.02 * hertz and (found > 0).float().mean() > 0.95
    assert (prepare_units.track_pitch(noise) > 0).float().mean() < 0.1  # a hiss has none


def test_losses_know_what_is_equal():
    wave = babble(1.0)
    mels = prepare_units.log_mels(torch.stack((wave, 0.5 * wave)))
    torch.testing.assert_close(mels[0], M.log_mel(wave), atol=1e-4, rtol=1e-4)
    assert prepare_units.spectral_loss(wave[None], wave[None]) == 0
    noise = M.fixed_noise()[None, :16000]
    assert prepare_units.spectral_loss(2 * noise, noise) == pytest.approx(np.log(2), rel=1e-4)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that trains a voice for some steps on babble of two speakers -> its vocoder."""
    rows = []
    for i in range(8):
        wave = babble(1.5 if i == 0 else 4, seed=i % 2)  # one shorter than a stretch
        M.save_audio(tmp_path / f'{i}.wav', wave)
        rows.append(dict(path=f'{i}.wav', voice='ab'[i % 2], split='train'))
    with open(tmp_path / 'manifest.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    encoder = M.UnitEncoder.from_pretrained('mfcc')
    features = torch.cat(encoder.features([babble(4, seed) for seed in (0, 1)]))
    encoder.config['switch'] = 0
    encoder.centroids = features[:: len(features) // 12][:12]
    monkeypatch.setattr(prepare_units, 'audio', str(tmp_path))
    monkeypatch.setattr(prepare_units, 'VOICE_SAVE', 4)
    monkeypatch.setattr(prepare_units, 'VOICE_NET', dict(width=16, kernel=5, blocks=1))

    def run(steps, out):
        os.makedirs(tmp_path / out, exist_ok=True)
        monkeypatch.setattr(prepare_units, 'out', str(tmp_path / out))
        monkeypatch.setattr(prepare_units, 'vocoder_steps', steps)
        corpus = prepare_units.choose_items(*prepare_units.find_sources())
        return prepare_units.fit_neural_vocoder(encoder, corpus)

    return run


def test_training_learns_and_is_resumed_exactly(train, tmp_path, monkeypatch):
    voc = train(40, 'whole')
    errors = voc.config['log_mel_error']
    assert errors['neural'] < 0.98 * errors['table']
    assert sorted(voc.config['voices']) == ['a', 'b'] and voc.n_units == 12
    voc.save_pretrained(str(tmp_path / 'v'))
    again = M.UnitVocoder.from_pretrained(str(tmp_path / 'v'))
    units = [torch.tensor([1, 5, 2, 9])]
    for speaker in (0, 1):
        assert again.decode(units, speaker=speaker)[0].equal(voc.decode(units, speaker=speaker)[0])

    loss, calls = prepare_units.voice_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return loss(*args)

    whole = train(13, 'seen')
    monkeypatch.setattr(prepare_units, 'voice_loss', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(13, 'killed')
    resumed = train(13, 'killed')
    assert len(calls) == 11 + 5  # from step 8, the last that was saved
    for name, tensor in whole.tensors.items():
        assert tensor.equal(resumed.tensors[name]), name
    with pytest.raises(M.InputError, match='vocoder_state.pt'):
        train(14, 'killed')
