"""sample.py and the vocoders: HiFi-GAN against modules of the published layout, the table against the encoder it belongs to."""

import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import model as M
import sample

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ----------------------------------------------------------------------------- HiFi-GAN

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
        norm = nn.utils.weight_norm
        self.convs1 = nn.ModuleList(
            [
                norm(
                    nn.Conv1d(
                        channels, channels, kernel, 1, dilation=d, padding=(kernel * d - d) // 2
                    )
                )
                for d in dilations
            ]
        )
        self.convs2 = nn.ModuleList(
            [
                norm(nn.Conv1d(channels, channels, kernel, 1, padding=(kernel - 1) // 2))
                for d in dilations
            ]
        )


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
        for i, (u, k) in enumerate(zip(c['upsample_rates'], c['upsample_kernel_sizes'])):
            self.ups.append(
                norm(
                    nn.ConvTranspose1d(
                        wide // 2**i, wide // 2 ** (i + 1), k, u, padding=(k - u) // 2
                    )
                )
            )
            for kernel, dilations in zip(c['resblock_kernel_sizes'], c['resblock_dilation_sizes']):
                self.resblocks.append(ResBlock(wide // 2 ** (i + 1), kernel, dilations))
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
                for conv1, conv2 in zip(block.convs1, block.convs2):
                    y = conv2(F.leaky_relu(conv1(F.leaky_relu(y, 0.1)), 0.1)) + y
                outputs.append(y)
            x = torch.stack(outputs).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))[0, 0]


def save_hifigan(folder, seed=0, new_names=False, **changes):
    """A random generator of the true layout as .pt + .json; -> (oracle, path)."""
    torch.manual_seed(seed)
    c = dict(HIFIGAN, **changes)
    oracle = CodeHiFiGAN(c).eval()
    for name, p in oracle.named_parameters():
        if name.endswith('weight_g'):
            p.data *= torch.rand_like(p) + 0.8  # or folding a norm of 1 would go unseen
    oracle.dur_predictor.proj.weight.data *= 3
    state = oracle.state_dict()
    if new_names:
        state = {
            k.replace('weight_g', 'parametrizations.weight.original0').replace(
                'weight_v', 'parametrizations.weight.original1'
            ): v
            for k, v in state.items()
        }
    path = os.path.join(folder, 'g.pt')
    torch.save(dict(generator=state), path)
    with open(os.path.join(folder, 'g_config.json'), 'w') as file:
        json.dump(c, file)
    return oracle, path


UNITS = [
    torch.tensor([3, 7, 1]),
    torch.arange(30),
    torch.tensor([5]),
    torch.tensor([29, 0, 4, 8, 4, 2, 11]),
]


@pytest.mark.parametrize('new_names', (False, True))
def test_hifigan_is_the_published_function(tmp_path, new_names):
    oracle, path = save_hifigan(str(tmp_path), new_names=new_names)
    voc = M.UnitVocoder.from_pretrained(path)
    assert (voc.n_units, voc.sample_rate, voc.frame_rate, voc.hop) == (30, 16000, 25.0, 640)
    durations = voc.durations(UNITS)
    with torch.no_grad():
        wanted = [oracle.durations(u) for u in UNITS]
        assert (
            all(d.equal(w) and d.min() >= 1 for d, w in zip(durations, wanted))
            and max(int(d.max()) for d in durations) > 1
        )
        frames = [u.repeat_interleave(d) for u, d in zip(UNITS, durations)]
        ours = voc._hifigan(frames, 0, 0)  # one padded batch of lengths from 1 to 30 and more
        for one, f, spoken in zip(ours, frames, voc.decode(UNITS)):
            reference = oracle(f)
            assert len(one) == len(reference) == len(spoken) == 640 * len(f)
            assert reference.std() > 1e-3 and (one - reference).abs().max() < 1e-5
            torch.testing.assert_close(spoken, M.finish_wave(reference), atol=1e-4, rtol=1e-4)


def test_hifigan_speakers_styles_and_given_durations(tmp_path):
    oracle, path = save_hifigan(
        str(tmp_path),
        1,
        multispkr='_',
        num_speakers=4,
        multistyle=True,
        num_styles=3,
        model_in_dim=36,
    )
    voc, given = M.UnitVocoder.from_pretrained(path), [torch.full_like(u, 2) for u in UNITS]
    with torch.no_grad():
        for speaker, style in ((0, 0), (3, 2)):
            ours = voc.decode(UNITS, given, speaker=speaker, style=style)
            for one, u in zip(ours, UNITS):
                torch.testing.assert_close(
                    one,
                    M.finish_wave(oracle(u.repeat_interleave(2), speaker, style)),
                    atol=1e-4,
                    rtol=1e-4,
                )
    with pytest.raises(M.InputError, match='spkr 4'):
        voc.decode(UNITS, given, speaker=4)


def test_vocoder_mistakes_are_one_line(tmp_path):
    save_hifigan(str(tmp_path))
    voc = M.UnitVocoder.from_pretrained(str(tmp_path / 'g.pt'))
    with pytest.raises(M.InputError, match='unit 30 is not among the 30'):
        voc.decode([torch.tensor([30])])
    (tmp_path / 'bad.pt').write_bytes(b'no pickle')
    (tmp_path / 'bad.json').write_text('{"upsample_rates": [2]}')
    torch.save(dict(generator={'dict.weight': torch.zeros(3, 4)}), tmp_path / 'half.pt')
    (tmp_path / 'half.json').write_text('{"upsample_rates": [2]}')
    for name, word in (
        ('bad.pt', 'no unit HiFi-GAN'),
        ('half.pt', 'no unit HiFi-GAN'),
        ('none', 'no vocoder'),
        ('none.pt', 'no vocoder'),
    ):
        with pytest.raises(M.InputError, match=word) as error:
            M.UnitVocoder.from_pretrained(str(tmp_path / name))
        assert name in str(error.value) and '\n' not in str(error.value)


def test_public_vocoder_is_checked_by_hash(tmp_path, monkeypatch):
    _, path = save_hifigan(str(tmp_path))
    monkeypatch.setenv('SLAM_CACHE', str(tmp_path))
    files = [
        (f'https://host.invalid/{name}', hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
        for name in ('g.pt', 'g_config.json')
    ]
    monkeypatch.setitem(M.HIFIGAN, 'toy', tuple(files))
    assert (
        M.UnitVocoder.from_pretrained('toy')
        .decode(UNITS)[1]
        .equal(M.UnitVocoder.from_pretrained(path).decode(UNITS)[1])
    )
    (tmp_path / os.path.basename(M.HIFIGAN['hifigan25'][0][0])).write_bytes(b'something else')
    with pytest.raises(M.InputError, match='sha256'):
        M.UnitVocoder.from_pretrained('hifigan25')


# ----------------------------------------------------------------------------- the table


def babble(seconds, seed=0, rate=16000):
    """Something like speech: vowels of moving formants over a moving pitch, hisses and pauses. (samples,) float."""
    rng = np.random.default_rng(seed)
    parts, total = [], 0
    pitch = rng.uniform(90, 220)
    while total < seconds * rate:
        n = int(rate * rng.uniform(0.06, 0.22))
        t, kind = np.arange(n) / rate, rng.choice(3, p=(0.65, 0.2, 0.15))
        source = np.zeros(n)
        if kind == 0:
            source[
                np.flatnonzero(
                    np.diff(
                        np.floor(np.cumsum(pitch * (1 + 0.1 * np.sin(5 * t)) / rate)), prepend=0
                    )
                )
            ] = 1
        spectrum, f = (
            np.fft.rfft(
                source if kind == 0 else rng.normal(size=n) * (0.05 if kind == 1 else 1e-4)
            ),
            np.fft.rfftfreq(n, 1 / rate),
        )
        peaks = (
            ((500, 1200, 2500), (300, 2200, 2900), (700, 1100, 2500), (350, 800, 2300))[
                rng.integers(4)
            ]
            if kind == 0
            else (4500, 6000)
        )
        sound = (
            np.fft.irfft(spectrum * sum(1 / (1 + ((f - peak) / 120) ** 2) for peak in peaks), n)
            * np.hanning(n) ** 0.3
        )
        parts.append(sound * rng.uniform(0.5, 1))
        total += n
    wave = np.concatenate(parts)[: int(seconds * rate)]
    return torch.from_numpy((0.3 * wave / np.abs(wave).max()).astype(np.float32))


def fit_table(n_units=40, frame_rate=25.0, parts=1):
    """A table of units that are plain clusters of loudness and tilt, on a minute of babble."""
    waves = [babble(6, seed) for seed in range(10)]
    units = []
    for wave in waves:
        mel = M.log_mel(wave)[:: round(100 / frame_rate)]
        units.append(
            ((mel.mean(1) + 16) / 16 * 10).long().clamp(0, 9) * 4
            + ((mel[:, :20].mean(1) - mel[:, 40:].mean(1)) / 3 + 2).long().clamp(0, 3)
        )
    tables = [M.UnitTable(n_units, frame_rate) for _ in range(parts)]
    for i, (wave, u) in enumerate(zip(waves, units)):
        tables[i % parts].add(
            wave.numpy() if i % 2 else wave, u[: len(wave) // round(16000 / frame_rate)]
        )
    with tempfile.NamedTemporaryFile() as file:
        file.write(b''.join(table.to_bytes() for table in tables))
        file.flush()
        return M.UnitTable.from_bytes(file.name, n_units, frame_rate).finish(), units


@pytest.mark.parametrize('frame_rate', (25.0, 50.0))
def test_table_speaks_exact_frames_at_a_good_level(tmp_path, frame_rate):
    voc, units = fit_table(frame_rate=frame_rate)
    pairs = [M.dedup(u) for u in units[:4]] + [
        (torch.tensor([7]), torch.tensor([1])),
        (torch.zeros(0, dtype=torch.long),) * 2,
    ]
    waves = voc.decode([u for u, _ in pairs], [d for _, d in pairs])
    for (u, d), wave in zip(pairs, waves):
        assert len(wave) == int(d.sum()) * voc.hop and wave.dtype == torch.float32
        assert voc.decode([u], [d])[0].equal(wave)  # alone as among others, and every time
    for wave in waves[:4]:
        assert wave.abs().max() < 0.99 and abs(wave.mean()) < 1e-3 and wave[0] == 0 == wave[-1]
        assert 0.5 * M.VOICE_LEVEL < M.speech_level(wave) < 1.2 * M.VOICE_LEVEL
        assert wave.diff().abs().max() < 0.6  # no clicks
    predicted = voc.durations([u for u, _ in pairs])
    assert all(d.min() >= 1 for d in predicted[:5]) and len(predicted[5]) == 0
    assert sum(int(d.sum()) for d in predicted[:4]) == pytest.approx(
        sum(len(u) for u in units[:4]), rel=0.15
    )  # the tempo stays
    voc.save_pretrained(str(tmp_path / 'v'))
    again = M.UnitVocoder.from_pretrained(str(tmp_path / 'v'))
    assert again.config == voc.config and again.decode([pairs[0][0]])[0].equal(
        voc.decode([pairs[0][0]])[0]
    )


def test_tables_of_parts_add_up():
    whole, parts = fit_table()[0], fit_table(parts=3)[0]
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(tensor, parts.tensors[name], atol=1e-5, rtol=1e-5)


def test_table_sounds_like_what_it_was_fitted_on():
    voc, units = fit_table()
    for u in units[:3]:
        frames = u[:150]
        wave, mel = voc._griffin_lim(frames), voc.tensors['mel'][frames].flatten(0, 1)
        heard = M.log_mel(wave)
        loud = mel.logsumexp(1) > mel.logsumexp(1).max() - 6
        assert (
            heard.shape == mel.shape and (heard - mel)[loud].mean(1).abs().median() < 0.5
        )  # nepers of power, about 2 dB
        assert np.corrcoef(heard[loud].flatten(), mel[loud].flatten())[0, 1] > 0.95


# ----------------------------------------------------------------------------- sample.py's parts


def test_find_loop():
    rng = np.random.default_rng(0)
    free = torch.from_numpy(rng.integers(0, 100, 150))
    assert sample.find_loop(free) is None and sample.find_loop(free[:0]) is None
    assert sample.find_loop(torch.tensor([3, 8] * 5)) is None  # too short to mean anything
    assert sample.find_loop(torch.cat((free[:60], torch.tensor([3, 8] * 20)))) == (2, 20)
    period, times = sample.find_loop(torch.cat((free[:30], free[:17].repeat(5), free[90:])))
    assert (period, times) == (17, 5)
    assert sample.find_loop(torch.full((40,), 7)) == (1, 40)


def test_cut_at_a_words_end():
    words = [['the', 0.1, 0.9], ['dog', 0.9, 2.4], ['ran', 2.4, 3.3]]
    assert (
        sample.cut_seconds(words, 3.0) == 2.4
        and sample.cut_seconds(words, 3.3) == 3.3
        and sample.cut_seconds(words, 0.5) == 0.9
    )
    assert sample.cut_seconds(None, 3.0) == 3.0 == sample.cut_seconds([], 3.0)


def test_trim_and_crossfade():
    silence, tone = torch.zeros(16000), 0.1 * torch.sin(torch.arange(16000) * 0.2)
    wave, dropped = sample.trim_silence(torch.cat((silence, tone, silence)), 16000)
    assert abs(dropped - 14400) <= 160 and abs(len(wave) - 19200) <= 320
    assert (
        sample.trim_silence(silence, 16000)[0].equal(silence)
        and len(sample.trim_silence(silence[:10], 16000)[0]) == 10
    )
    both = sample.crossfade(tone, tone, 480)
    assert (
        len(both) == 2 * 16000 - 480
        and both[:15000].equal(tone[:15000])
        and both[-15000:].equal(tone[-15000:])
    )
    assert len(sample.crossfade(tone, tone[:0], 480)) == 16000


def write_jsonl(path, rows):
    with open(path, 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


def test_find_prompts(tmp_path):
    folder = tmp_path / 'talk'
    (folder / 'deep').mkdir(parents=True)
    for name in ('b.wav', 'a.flac', 'deep/a.wav', 'notes.txt'):
        (folder / name).write_bytes(b'')
    assert [p['name'] for p in sample.find_prompts(str(folder))] == ['a', 'b', 'a_2']
    assert [p['name'] for p in sample.find_prompts(f'{folder}/b.wav, {folder}/deep/*.wav')] == [
        'b',
        'a',
    ]
    write_jsonl(
        folder / 'manifest.jsonl',
        [
            dict(
                path='deep/a.wav',
                text='hi there',
                words=[['hi', 0, 1], ['there', 1, 2]],
                split='val',
            ),
            dict(path='b.wav', text='no', split='train'),
        ],
    )
    [p] = sample.find_prompts(str(folder), 'val')
    assert (
        p['text'] == 'hi there'
        and os.path.samefile(p['path'], folder / 'deep/a.wav')
        and len(p['words']) == 2
    )
    assert (
        len(sample.find_prompts(str(folder))) == 2
        and len(sample.find_prompts(str(folder), '', 1)) == 1
    )
    [p] = sample.find_prompts(str(folder / 'deep/a.wav'))
    assert p['text'] == 'hi there' and p['words']  # known from the manifest above it
    write_jsonl(
        tmp_path / 'u.jsonl',
        [
            dict(file_name='x/1.wav', units=[3, 4], duration=[1, 2], split='val'),
            dict(audio_repr='<Un12><Un7>'),
            dict(prompt=dict(units=[5], duration=[2], text='so'), chosen={}, split='val'),
        ],
    )
    a, b, c = sample.find_prompts(str(tmp_path / 'u.jsonl'), 'val')
    assert (
        a['units'].tolist() == [3, 4]
        and a['duration'].tolist() == [1, 2]
        and b['units'].tolist() == [12, 7]
        and b['duration'] is None
    )
    assert c['units'].tolist() == [5] and c['text'] == 'so'
    (tmp_path / 'bad.jsonl').write_text('{"units": [1]}\nnonsense\n')
    (tmp_path / 'odd.jsonl').write_text('{"units": [1, 2], "duration": [1]}\n')
    (tmp_path / 'empty').mkdir()
    for what, word in (
        ('bad.jsonl', 'line 2'),
        ('odd.jsonl', 'durations'),
        ('empty', 'no sound files'),
        ('none.wav', 'no such file'),
    ):
        with pytest.raises(M.InputError, match=word) as error:
            sample.find_prompts(str(tmp_path / what))
        assert what in str(error.value)


def test_edit_distance_and_timeline():
    assert sample.edit_distance([1, 2, 3], [1, 3, 4]) == 2 and sample.edit_distance([], [1]) == 1
    svg = sample.timeline_html(torch.tensor([5, 9, 5]), torch.tensor([1, 2, 3]), 1, 25.0)
    assert (
        svg.count('<rect') == 3
        and 'viewBox="0 0 6 10"' in svg
        and 'unit 9, 0.04 to 0.12 s' in svg
        and 'class="border"' in svg
    )


# ----------------------------------------------------------------------------- the whole, on spoken stories


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Stories spoken by espeak, units and voice fitted on them, a random model: {audio, units, slm} folders, val rows, encoder, vocoder."""
    root = tmp_path_factory.mktemp('data')
    for script, *args in (
        (
            'make_synthetic.py',
            'config/demo_synthetic.py',
            '--task=stories',
            '--n_stories=60',
            '--val_share=0.1',
            f'--out={root}/audio',
        ),
        (
            'prepare_units.py',
            f'--audio={root}/audio/stories',
            '--encoder=mfcc',
            '--fit_kmeans=100',
            '--fit_vocoder=True',
            f'--out={root}/units',
        ),
    ):
        subprocess.run([sys.executable, script, *args], cwd=ROOT, check=True, capture_output=True)
    audio, units = str(root / 'audio/stories'), str(root / 'units')
    slm = M.SLM(
        M.SLMConfig(
            family='qwen2',
            n_layer=2,
            n_embd=64,
            n_head=2,
            n_kv_head=1,
            n_ffn=128,
            vocab_size=102,
            context=512,
        )
    )
    slm.save_pretrained(
        str(root / 'slm'),
        dict(encoder=units + '/encoder', vocoder=units + '/vocoder', n_units=100, frame_rate=25.0),
    )
    val = [row for row in sample.read_lines(audio + '/manifest.jsonl') if row['split'] == 'val']
    return dict(
        root=root,
        audio=audio,
        units=units,
        slm=str(root / 'slm'),
        val=val,
        encoder=M.UnitEncoder.from_pretrained(units + '/encoder'),
        vocoder=M.UnitVocoder.from_pretrained(units + '/vocoder'),
    )


def run(monkeypatch, capsys, *args):
    """sample.py with these arguments, in this process. -> its lines on stdout."""
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', *map(str, args)])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    capsys.readouterr()
    runpy.run_path(os.path.join(ROOT, 'sample.py'), run_name='__main__')
    return capsys.readouterr().out.splitlines()


def test_units_come_back_from_their_sound(data):
    """Held-out speech: at least 90 % of the frames with given durations, 80 % of the de-duplicated units with predicted ones."""
    waves = [M.load_audio(os.path.join(data['audio'], row['path'])) for row in data['val']]
    encoder, vocoder, same, frames, edits, units = data['encoder'], data['vocoder'], 0, 0, 0, 0
    spoken = [M.dedup(u) for u in encoder.encode(waves)]
    given = vocoder.decode([u for u, _ in spoken], [d for _, d in spoken])
    free = vocoder.decode([u for u, _ in spoken])
    for (u, d), a, b in zip(spoken, encoder.encode(given), encoder.encode(free)):
        assert len(a) == int(d.sum())
        same, frames = same + int((a == u.repeat_interleave(d)).sum()), frames + len(a)
        edits, units = (
            edits + sample.edit_distance(u.tolist(), M.dedup(b)[0].tolist()),
            units + len(u),
        )
    assert frames > 500 and same / frames >= 0.9 and 1 - edits / units >= 0.8
    assert sum(map(len, free)) == pytest.approx(sum(map(len, given)), rel=0.2)


def test_prompts_are_continued(data, tmp_path, monkeypatch, capsys):
    args = (
        f'--init={data["slm"]}',
        f'--prompt={data["audio"]}',
        '--max_prompts=2',
        '--num_samples=2',
        '--max_new_tokens=40',
    )
    lines = run(monkeypatch, capsys, *args, f'--out={tmp_path}/a', f'--html={tmp_path}/a/page.html')
    assert '4 continuations of 2 prompts' in lines[-1] and 'real time' in lines[-1]
    rows = sample.read_lines(str(tmp_path / 'a/units.jsonl'))
    assert (
        len(rows) == 4
        and [r['sample'] for r in rows] == [1, 2, 1, 2]
        and rows[0]['units'] != rows[1]['units']
    )
    for row, known in zip(rows[::2], data['val']):
        folder = tmp_path / 'a' / os.path.dirname(row['file_name'])
        assert {p.name for p in folder.iterdir()} == {
            'prompt.wav',
            'continuation.wav',
            'full.wav',
            'continuation-2.wav',
            'full-2.wav',
        }
        end = soundfile.info(folder / 'prompt.wav').duration
        assert end <= 3.02 and any(
            abs(end - word[2]) < 1e-3 for word in known['words']
        )  # at a word's end
        assert (
            row['text'] and known['text'].startswith(row['text']) and row['text'] != known['text']
        )
        assert row['prompt_units'] < len(row['units']) == len(row['duration'])
        for path in folder.iterdir():
            sound, rate = soundfile.read(path)
            assert (
                rate == 16000
                and len(sound) > 8000
                and np.abs(sound).max() < 0.99
                and abs(sound.mean()) < 2e-3
            )
        assert soundfile.info(folder / 'full.wav').duration <= sum(row['duration']) / 25
    page = (tmp_path / 'a/page.html').read_text()
    assert (
        page.count('<section>') == 4
        and page.count('<audio') == 12
        and page.count('data:audio/flac;base64,') == 12
        and '<rect' in page
    )
    assert 'http' not in page.replace('http-equiv', '') and rows[0]['text'] in page

    before = {
        path: path.read_bytes()
        for path in sorted((tmp_path / 'a').rglob('*.*'))
        if path.suffix != '.json' and path.suffix != '.html'
    }
    run(monkeypatch, capsys, *args, f'--out={tmp_path}/a')  # the same command again: the same bytes
    assert all(path.read_bytes() == content for path, content in before.items())
    run(monkeypatch, capsys, *args, f'--out={tmp_path}/b', '--seed=5')
    assert [r['units'] for r in sample.read_lines(str(tmp_path / 'b/units.jsonl'))] != [
        r['units'] for r in rows
    ]
    run(
        monkeypatch,
        capsys,
        *args[:1],
        f'--prompt={tmp_path}/a/units.jsonl',
        '--max_prompts=1',
        '--max_new_tokens=10',
        f'--out={tmp_path}/c',
    )
    again = sample.read_lines(str(tmp_path / 'c/units.jsonl'))[0]
    assert (
        again['units'][: again['prompt_units']] == rows[0]['units'][: again['prompt_units']]
        and again['prompt_units'] > 10
    )
    assert sum(again['duration'][: again['prompt_units']]) / 25 <= 3.0


def test_recordings_without_a_manifest_and_none(data, tmp_path, monkeypatch, capsys):
    wave = M.load_audio(os.path.join(data['audio'], data['val'][0]['path']))
    soundfile.write(tmp_path / 'phone.wav', sample.resample(wave, 16000, 8000).numpy(), 8000)
    soundfile.write(tmp_path / 'stereo.mp3', np.stack([wave.numpy()] * 2, axis=1), 16000)
    soundfile.write(tmp_path / 'short.wav', wave[8000:9600].numpy(), 16000)
    args = (f'--init={data["slm"]}', '--max_new_tokens=20', f'--out={tmp_path}/o')
    lines = run(
        monkeypatch,
        capsys,
        *args,
        f'--prompt={tmp_path}/phone.wav,{tmp_path}/stereo.mp3,{tmp_path}/short.wav',
        '--keep_prompt',
    )
    assert len(lines) >= 4 and '3 continuations of 3 prompts' in lines[-1]
    real, full = (
        M.load_audio(tmp_path / 'o/phone/prompt.wav'),
        M.load_audio(tmp_path / 'o/phone/full.wav'),
    )
    assert len(real) == 48000 and len(full) > 48000
    assert (
        np.corrcoef(real[1000:40000], full[1000:40000])[0, 1] > 0.999
    )  # the recording itself, at the voice's level
    (tmp_path / 'text.wav').write_text('no sound')
    soundfile.write(tmp_path / 'tiny.wav', wave[8000:8200].numpy(), 16000)
    lines = run(
        monkeypatch,
        capsys,
        *args,
        f'--prompt={tmp_path}/text.wav,{tmp_path}/tiny.wav,{tmp_path}/phone.wav',
    )
    assert (
        '1 continuations of 1 prompts' in lines[-1]
    )  # the others are left out, with a word each on stderr
    lines = run(monkeypatch, capsys, *args, '--num_samples=2')
    assert (
        '2 continuations of no prompts' in lines[-1]
        and (tmp_path / 'o/unprompted/full-2.wav').exists()
    )
    lines = run(
        monkeypatch,
        capsys,
        *args,
        '--temperature=0',
        '--repetition_penalty=1.0',
        '--max_new_tokens=120',
        f'--prompt={tmp_path}/phone.wav',
    )
    assert any(
        'warning: it loops' in line for line in lines
    )  # what an untrained model does when it never draws


def test_resynth_needs_no_model(data, tmp_path, monkeypatch, capsys):
    for init in (data['units'], data['units'] + '/encoder', data['slm']):
        lines = run(
            monkeypatch,
            capsys,
            f'--init={init}',
            f'--prompt={data["audio"]}',
            '--resynth',
            '--max_prompts=3',
            f'--out={tmp_path}/r',
            f'--html={tmp_path}/r.html',
        )
        result = json.load(open(tmp_path / 'r/sample.json'))
        assert (
            '3 resynthesised' in lines[-1]
            and result['frames_unchanged'] >= 90
            and result['units_unchanged_predicted_durations'] >= 80
        )
    for row, known in zip(sample.read_lines(str(tmp_path / 'r/units.jsonl')), data['val']):
        sound = M.load_audio(tmp_path / 'r' / row['file_name'])
        assert (
            abs(len(sound) / 16000 - known['seconds']) < 0.04
            and 0.04 < M.speech_level(sound) < 0.12
        )
    assert (tmp_path / 'r.html').read_text().count('<audio') == 6


def test_what_the_user_can_mend_is_one_line(data, tmp_path, monkeypatch, capsys):
    (tmp_path / 'empty.wav').write_bytes(b'')
    (tmp_path / 'text.wav').write_text('this is no sound ' * 50)
    soundfile.write(
        tmp_path / 'nan.wav', np.full(16000, np.nan, dtype=np.float32), 16000, subtype='FLOAT'
    )
    write_jsonl(tmp_path / 'far.jsonl', [dict(file_name='x', units=[3, 100])])
    small = M.SLM(
        M.SLMConfig(
            family='qwen2',
            n_layer=1,
            n_embd=32,
            n_head=2,
            n_kv_head=1,
            n_ffn=64,
            vocab_size=52,
            context=512,
        )
    )
    small.save_pretrained(
        str(tmp_path / 'small'),
        dict(encoder=data['units'] + '/encoder', vocoder=data['units'] + '/vocoder', n_units=50),
    )
    good, prompt = f'--init={data["slm"]}', f'--prompt={data["audio"]}'
    for args, word in (
        ([good, f'--prompt={tmp_path}/empty.wav'], 'empty.wav'),
        ([good, f'--prompt={tmp_path}/text.wav'], 'text.wav'),
        ([good, f'--prompt={tmp_path}/nan.wav'], 'NaN'),
        ([good, f'--prompt={tmp_path}/far.jsonl'], 'unit 100'),
        ([f'--init={tmp_path}/small', prompt], 'units do not match.*has 50.*has 100.*has 100'),
        ([good, '--keep_prompt'], 'recording'),
        ([good, '--resynth'], '--prompt'),
        ([f'--init={tmp_path}', prompt, '--resynth'], 'no slam.json'),
        ([f'--init={tmp_path}/none', prompt], 'none'),
    ):
        with pytest.raises(M.InputError, match=word) as error:
            run(monkeypatch, capsys, *args, f'--out={tmp_path}/o')
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'o').exists()
    done = subprocess.run(
        [sys.executable, 'sample.py', good, f'--prompt={tmp_path}/text.wav'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stdout == ''
        and len(done.stderr.splitlines()) == 1
        and 'text.wav' in done.stderr
    )
