"""sample.py: its parts by hand, and the whole on spoken stories and on 8 kHz recordings."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import model as M
import sample

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_jsonl(path, rows):
    with open(path, 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


def rows_of(path):
    return [row for _, row in M.read_jsonl(str(path))]


# -----------------------------------------------------------------------------
# Parts


def test_find_loop():
    free = torch.from_numpy(np.random.default_rng(0).integers(0, 100, 150))
    assert sample.find_loop(free) is None and sample.find_loop(free[:0]) is None
    assert sample.find_loop(torch.tensor([3, 8] * 5)) is None  # too short to mean anything
    assert sample.find_loop(torch.cat((free[:60], torch.tensor([3, 8] * 20)))) == (2, 20)
    loop = torch.cat((free[:30], free[:17].repeat(5), free[90:]))
    assert sample.find_loop(loop) == (17, 5)
    assert sample.find_loop(torch.full((40,), 7)) == (1, 40)


def test_find_repeats_against_the_plain_definition():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        units = rng.integers(0, 3, 60).tolist()
        wanted = [False] * len(units)
        for i in range(len(units) - n + 1):
            for j in range(i):
                if units[i : i + n] == units[j : j + n]:
                    wanted[i : i + n] = [True] * n
        assert sample.find_repeats(units, n) == wanted
    assert sample.find_repeats([1, 2]) == [False, False] and sample.find_repeats([]) == []


def test_cut_at_a_words_end():
    words = [['the', 0.1, 0.9], ['dog', 0.9, 2.4], ['ran', 2.4, 3.3]]
    assert sample.cut_seconds(words, 3.0) == 2.4
    assert sample.cut_seconds(words, 3.3) == 3.3
    assert sample.cut_seconds(words, 0.5) == 0.9
    assert sample.cut_seconds(None, 3.0) == 3.0 == sample.cut_seconds([], 3.0)


@pytest.fixture
def talk(tmp_path):
    """A folder of sound files, one of them deeper."""
    folder = tmp_path / 'talk'
    (folder / 'deep').mkdir(parents=True)
    for name in ('b.wav', 'a.flac', 'deep/a.wav', 'notes.txt'):
        (folder / name).write_bytes(b'')
    return folder


def names(found):
    return [p.name for p in found]


def test_find_prompts_in_folders_and_globs(talk):
    assert names(sample.find_prompts(str(talk))) == ['a', 'b', 'a_2']
    both = sample.find_prompts(f'{talk}/b.wav, {talk}/deep/*.wav')
    assert names(both) == ['b', 'a']
    (talk / 'deep/a_2.wav').write_bytes(b'')  # called as another would be
    assert names(sample.find_prompts(str(talk))) == ['a', 'b', 'a_2', 'a_2_2']


def test_a_limit_drops_no_file_that_was_named(talk):
    """It is of each folder: what is named after one is not lost."""
    found = sample.find_prompts(f'{talk},{talk}/b.wav,{talk}/deep', limit=1)
    assert names(found) == ['a', 'b', 'a_2']
    assert names(sample.find_prompts(str(talk), limit=2)) == ['a', 'b']


def test_find_prompts_by_a_manifest(talk):
    words = [['hi', 0, 1], ['there', 1, 2]]
    rows = [dict(path='deep/a.wav', text='hi there', words=words, split='val')]
    write_jsonl(talk / 'manifest.jsonl', rows + [dict(path='b.wav', text='no', split='train')])
    [p] = sample.find_prompts(str(talk), 'val')
    assert p.text == 'hi there' and len(p.words) == 2
    assert os.path.samefile(p.path, talk / 'deep/a.wav')
    assert len(sample.find_prompts(str(talk))) == 2
    assert len(sample.find_prompts(str(talk), '', 1)) == 1


def test_find_prompts_in_units_files(tmp_path):
    rows = [dict(file_name='x/1.wav', units=[3, 4], duration=[1, 2], split='val')]
    rows += [dict(units=[12, 7])]
    rows += [dict(prompt=dict(units=[5], duration=[2], text='so'), chosen={}, split='val')]
    write_jsonl(tmp_path / 'u.jsonl', rows)
    a, b, c = sample.find_prompts(str(tmp_path / 'u.jsonl'), 'val')
    assert a.units.tolist() == [3, 4] and a.duration.tolist() == [1, 2]
    assert b.units.tolist() == [12, 7] and b.duration is None
    assert c.units.tolist() == [5] and c.text == 'so'


@pytest.mark.parametrize(
    ('name', 'text', 'word'),
    [
        ('bad.jsonl', '{"units": [1]}\nnonsense\n', 'line 2'),
        ('odd.jsonl', '{"units": [1, 2], "duration": [1]}\n', 'durations'),
        ('zero.jsonl', '{"units": [1], "duration": [0]}\n', 'durations'),
        ('float.jsonl', '{"units": [1.5]}\n', 'units'),
        ('word.jsonl', '{"units": "12"}\n', 'units'),
        ('less.jsonl', '{"text": "a"}\n', 'neither'),
        ('empty.jsonl', '\n', 'empty'),
        ('none.wav', None, 'no such file'),
        ('folder', None, 'no s'),
    ],
)
def test_prompts_that_are_none(tmp_path, name, text, word):
    if text:
        (tmp_path / name).write_text(text)
    if name == 'folder':
        (tmp_path / name).mkdir()
    with pytest.raises(M.InputError, match=word) as error:
        sample.find_prompts(str(tmp_path / name))
    assert name in str(error.value)


# -----------------------------------------------------------------------------
# The whole, on spoken stories


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Stories spoken by espeak, units and voice fitted on them, and a model that knows nothing:
    dict of the folders audio, units, slm, and what the manifest knows of the val rows."""
    root = tmp_path_factory.mktemp('data')
    audio, units = str(root / 'audio/stories'), str(root / 'units')
    stories = ['--task=stories', '--n_stories=60', '--val_share=0.1', f'--out={root}/audio']
    fit = ['--encoder=mfcc', '--fit_kmeans=100', '--fit_vocoder=True']
    for command in (
        ['make_synthetic.py', 'config/demo_synthetic.py', *stories],
        ['prepare_units.py', f'--audio={audio}', *fit, f'--out={units}'],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    small = dict(family='qwen2', n_layer=2, n_embd=64, n_head=2, n_kv_head=1, n_ffn=128)
    slm = M.SLM(M.SLMConfig(**small, vocab_size=102, context=512))
    parts = dict(encoder=units + '/encoder', vocoder=units + '/vocoder')
    known = dict(n_units=100, frame_rate=25.0, dedup=True)
    slm.save_pretrained(str(root / 'slm'), parts | known)
    val = [row for row in rows_of(audio + '/manifest.jsonl') if row['split'] == 'val']
    return dict(root=root, audio=audio, units=units, slm=str(root / 'slm'), val=val)


def run(monkeypatch, capsys, *args):
    """sample.py with these arguments, in this process -> its lines on stdout."""
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', *map(str, args)])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    capsys.readouterr()
    runpy.run_path(os.path.join(ROOT, 'sample.py'), run_name='__main__')
    return capsys.readouterr().out.splitlines()


def test_units_come_back_from_their_sound(data):
    """Held-out speech: at least 90 % of the frames; with predicted durations the tempo stays."""
    encoder = M.UnitEncoder.from_pretrained(data['units'] + '/encoder')
    vocoder = M.UnitVocoder.from_pretrained(data['units'] + '/vocoder')
    waves = [M.load_audio(os.path.join(data['audio'], row['path'])) for row in data['val']]
    spoken = [M.dedup(u) for u in encoder.encode(waves)]
    given = vocoder.decode([u for u, _ in spoken], [d for _, d in spoken])
    free = vocoder.decode([u for u, _ in spoken])
    same = frames = 0
    for (u, d), again in zip(spoken, encoder.encode(given), strict=True):
        assert len(again) == int(d.sum())
        same += int((again == u.repeat_interleave(d)).sum())
        frames += len(again)
    assert frames > 500 and same / frames >= 0.9
    assert sum(map(len, free)) == pytest.approx(sum(map(len, given)), rel=0.2)


def test_prompts_are_continued(data, tmp_path, monkeypatch, capsys):
    args = [f'--init={data["slm"]}', f'--prompt={data["audio"]}', '--max_prompts=2']
    args += ['--num_samples=2', '--max_new_tokens=40']
    page = f'--html={tmp_path}/a/page.html'
    lines = run(monkeypatch, capsys, *args, f'--out={tmp_path}/a', page)
    assert '4 continuations of 2 prompts' in lines[-1] and 'real time' in lines[-1]
    rows = rows_of(tmp_path / 'a/units.jsonl')
    assert [row['sample'] for row in rows] == [1, 2, 1, 2]
    assert rows[0]['units'] != rows[1]['units']
    for row in rows:  # a de-duplicated checkpoint says no unit twice in a row
        new = row['units'][row['prompt_units'] :]
        assert all(a != b for a, b in zip(new, new[1:], strict=False))
    files = {'prompt.wav', 'continuation.wav', 'full.wav', 'continuation-2.wav', 'full-2.wav'}
    for row, known in zip(rows[::2], data['val'], strict=False):
        folder = tmp_path / 'a' / os.path.dirname(row['file_name'])
        assert {path.name for path in folder.iterdir()} == files
        end = soundfile.info(folder / 'prompt.wav').duration
        assert end <= 3.02 and any(abs(end - word[2]) < 1e-3 for word in known['words'])
        assert (
            row['text'] and known['text'].startswith(row['text']) and row['text'] != known['text']
        )
        assert row['prompt_units'] < len(row['units']) == len(row['duration'])
        for path in folder.iterdir():
            sound, rate = soundfile.read(path)
            assert rate == 16000 and len(sound) > 4000
            assert np.abs(sound).max() < 0.99 and abs(sound.mean()) < 2e-3
        full, rest = (soundfile.info(folder / f'{name}.wav') for name in ('full', 'continuation'))
        assert full.frames == sum(row['duration']) * 640
        assert rest.frames == sum(row['duration'][row['prompt_units'] :]) * 640

    # the same command again: the same bytes; another seed: another continuation
    before = {path: path.read_bytes() for path in (tmp_path / 'a').rglob('*.wav')}
    run(monkeypatch, capsys, *args, f'--out={tmp_path}/a')
    assert all(path.read_bytes() == content for path, content in before.items())
    run(monkeypatch, capsys, *args, f'--out={tmp_path}/b', '--seed=5')
    assert [row['units'] for row in rows_of(tmp_path / 'b/units.jsonl')] != [
        row['units'] for row in rows
    ]

    # units.jsonl serves as prompts again
    again = [args[0], f'--prompt={tmp_path}/a/units.jsonl', '--max_prompts=1']
    run(monkeypatch, capsys, *again, '--max_new_tokens=10', f'--out={tmp_path}/c')
    [row] = rows_of(tmp_path / 'c/units.jsonl')
    n = row['prompt_units']
    assert n > 10 and row['units'][:n] == rows[0]['units'][:n]
    assert sum(row['duration'][:n]) / 25 <= 3.0


def page_data(path):
    page = open(path, encoding='utf-8').read()
    start = page.index('type="application/json">') + len('type="application/json">')
    return page, json.loads(page[start : page.index('</script>', start)])


def test_page_holds_it_all_and_escapes_names(data, tmp_path, monkeypatch, capsys):
    units = [rows_of(data['units'] + '/units.jsonl')[0]['units'][:40]]
    evil = '</script><script>alert("&\u2028")</script><b>'
    write_jsonl(tmp_path / 'p.jsonl', [dict(file_name='<b>&', units=u, text=evil) for u in units])
    args = [f'--init={data["slm"]}', f'--prompt={tmp_path}/p.jsonl,{data["audio"]}']
    args += ['--max_prompts=1', '--num_samples=2', '--max_new_tokens=30', f'--out={tmp_path}/o']
    run(monkeypatch, capsys, *args, f'--html={tmp_path}/page.html')
    page, content = page_data(tmp_path / 'page.html')
    assert page.count('<script') == 2 and 'alert' in page and 'DATA"' not in page
    assert 'http' not in page.replace('http://www.w3.org/2000/svg', '')  # nothing is fetched
    first, second = content['prompts']
    assert first['text'] == evil and first['recording'] is None
    assert second['recording']['seconds'] == pytest.approx(3, abs=0.5)
    rows = rows_of(tmp_path / 'o/units.jsonl')
    samples = first['samples'] + second['samples']
    for shown, row in zip(samples, rows, strict=True):
        assert shown['units'] == row['units'] and shown['duration'] == row['duration']
        assert shown['seconds'] == pytest.approx(sum(row['duration']) / 25, abs=0.002)
        assert len(shown['repeats']) == len(row['units'])
        assert len(shown['peaks']) == int(np.ceil(shown['seconds'] * 50 - 1e-6))
        assert shown['src'].startswith('data:audio/flac;base64,')


def test_stream_says_what_the_whole_says(data, tmp_path, monkeypatch, capsys):
    """--stream to a wav: the samples of full.wav, at one level for all of it."""
    args = [f'--init={data["slm"]}', f'--prompt={data["audio"]}', '--max_prompts=1']
    args += ['--max_new_tokens=60']
    run(monkeypatch, capsys, *args, f'--out={tmp_path}/whole')
    out = [f'--out={tmp_path}/stream', f'--stream={tmp_path}/talk.wav']
    lines = run(monkeypatch, capsys, *args, *out)
    assert 'first sound after' in lines[-1]
    [whole], [row] = (rows_of(tmp_path / name / 'units.jsonl') for name in ('whole', 'stream'))
    assert row['units'] == whole['units'] and row['duration'] == whole['duration']
    full = M.load_audio(tmp_path / 'whole' / whole['file_name'])[100:-100]
    streamed = M.load_audio(tmp_path / 'talk.wav')[100:-100]
    level = float((full * streamed).sum() / full.square().sum())
    quiet = full.abs() * level < 0.6  # peaks are bent
    assert 0.5 < level < 2 and quiet.float().mean() > 0.95
    assert (level * full - streamed)[quiet].abs().max() < 3e-3
    known = json.load(open(tmp_path / 'stream/sample.json'))
    assert 0 < known['first_sound'] <= known['first_new_sound'] <= known['seconds']


def test_stream_to_stdout_is_sound_alone(data, tmp_path):
    """Raw PCM on stdout, every message on stderr; a listener who goes away is one line."""
    command = [sys.executable, 'sample.py', f'--init={data["slm"]}', f'--prompt={data["audio"]}']
    command += ['--max_prompts=2', '--max_new_tokens=20', f'--out={tmp_path}/o', '--device=cpu']
    to_file = subprocess.run(
        [*command, f'--stream={tmp_path}/t.wav'], cwd=ROOT, capture_output=True, check=True
    )
    piped = subprocess.run([*command, '--stream=-'], cwd=ROOT, capture_output=True, check=True)
    sound, rate = soundfile.read(tmp_path / 't.wav', dtype='int16')
    assert rate == 16000 and np.frombuffer(piped.stdout, '<i2').tolist() == sound.tolist()
    assert b'2 continuations of 2 prompts' in piped.stderr
    assert b'2 continuations of 2 prompts' in to_file.stdout

    gone = subprocess.Popen(
        [*command, '--stream=-'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    gone.stdout.close()
    error = gone.stderr.read().decode()
    assert gone.wait() == 2 and 'nobody listens' in error and 'Traceback' not in error


def test_a_growing_wav_is_whole_after_every_piece(tmp_path):
    path = str(tmp_path / 'new/grow.wav')
    with sample.open_stream(path, 16000) as let_out:
        for n in (1, 2, 3):
            let_out(torch.full((1000,), 0.5))
            sound, rate = soundfile.read(path)
            assert len(sound) == 1000 * n and rate == 16000 and abs(sound - 0.5).max() < 1e-4


def test_pieces_of_steps():
    steps = [torch.tensor([u + M.OFFSET]) for u in (5, 6, 7)] + [torch.tensor([M.EOS])]
    spoken = []
    pieces = [p.tolist() for p in sample.take_pieces(steps, 2, spoken)]
    assert pieces == [[5, 6], [7]] and spoken == [5, 6, 7]
    assert list(sample.take_pieces([torch.tensor([M.EOS])], 2, spoken)) == []


@pytest.fixture
def phone(data, tmp_path):
    """8 kHz recordings as users bring them: noisy, quiet, some short -> folder, one wave."""
    wave = M.load_audio(os.path.join(data['audio'], data['val'][0]['path']))
    folder = tmp_path / 'phone'
    folder.mkdir()
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    for name, end, gain in (('long', 64000, 0.3), ('half', 8000, 0.05), ('short', 4000, 1.0)):
        call = gain * (wave + 0.002 * noise)[1600 : 1600 + end]
        soundfile.write(folder / f'{name}.wav', M.resample(call, 16000, 8000).numpy(), 8000)
    return folder


@pytest.mark.parametrize('mode', ('', '--resynth', '--stream'))
def test_every_mode_on_8_khz_recordings(data, phone, tmp_path, monkeypatch, capsys, mode):
    args = [f'--init={data["slm"]}', f'--prompt={phone}', '--max_new_tokens=20']
    args += [f'--out={tmp_path}/o', mode or '--num_samples=1']
    args[-1:] = [f'--stream={tmp_path}/t.wav'] if mode == '--stream' else args[-1:]
    args += [] if mode == '--stream' else [f'--html={tmp_path}/page.html']
    lines = run(monkeypatch, capsys, *args)
    assert '3 resynthesised' in lines[-1] or '3 continuations of 3 prompts' in lines[-1]
    rows = rows_of(tmp_path / 'o/units.jsonl')
    assert sorted(row['prompt_units'] > 0 for row in rows) == [True] * 3


def test_stereo_short_and_bad_files_and_no_prompt(data, tmp_path, monkeypatch, capsys):
    wave = M.load_audio(os.path.join(data['audio'], data['val'][0]['path']))
    soundfile.write(tmp_path / 'stereo.mp3', np.stack([wave.numpy()] * 2, axis=1), 16000)
    soundfile.write(tmp_path / 'tiny.wav', wave[8000:8200].numpy(), 16000)
    (tmp_path / 'text.wav').write_text('no sound')
    args = [f'--init={data["slm"]}', '--max_new_tokens=20', f'--out={tmp_path}/o']
    prompts = ','.join(f'{tmp_path}/{name}' for name in ('text.wav', 'tiny.wav', 'stereo.mp3'))
    lines = run(monkeypatch, capsys, *args, f'--prompt={prompts}')
    assert '1 continuations of 1 prompts' in lines[-1]  # the others are told on stderr
    lines = run(monkeypatch, capsys, *args, '--num_samples=2')
    assert '2 continuations of no prompts' in lines[-1]
    assert (tmp_path / 'o/unprompted/full-2.wav').exists()
    lines = run(monkeypatch, capsys, *args, f'--stream={tmp_path}/t.wav')
    assert '1 continuations of no prompts' in lines[-1]
    never_drawn = ['--temperature=0', '--repetition_penalty=1.0', '--max_new_tokens=120']
    lines = run(monkeypatch, capsys, *args, *never_drawn, f'--prompt={tmp_path}/stereo.mp3')
    assert any('warning: it loops' in line for line in lines)  # an untrained model, that is


def test_resynth_needs_no_model(data, tmp_path, monkeypatch, capsys):
    args = [f'--prompt={data["audio"]}', '--resynth', '--max_prompts=3', f'--out={tmp_path}/r']
    for init in (data['units'], data['units'] + '/encoder', data['slm']):
        page = f'--html={tmp_path}/r.html'
        lines = run(monkeypatch, capsys, f'--init={init}', *args, page)
        result = json.load(open(tmp_path / 'r/sample.json'))
        assert '3 resynthesised' in lines[-1] and result['frames_unchanged'] >= 90
    for row, known in zip(rows_of(tmp_path / 'r/units.jsonl'), data['val'], strict=False):
        sound = M.load_audio(tmp_path / 'r' / row['file_name'])
        assert abs(len(sound) / 16000 - known['seconds']) < 0.04
        assert 0.04 < M.speech_level(sound) < 0.12
    _, content = page_data(tmp_path / 'r.html')
    assert len(content['prompts']) == 3 and not content['continued']


def test_what_the_user_can_mend_is_one_line(data, tmp_path, monkeypatch, capsys):
    (tmp_path / 'empty.wav').write_bytes(b'')
    (tmp_path / 'text.wav').write_text('this is no sound ' * 50)
    nan = np.full(16000, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / 'nan.wav', nan, 16000, subtype='FLOAT')
    write_jsonl(tmp_path / 'far.jsonl', [dict(file_name='x', units=[3, 100])])
    small = dict(family='qwen2', n_layer=1, n_embd=32, n_head=2, n_kv_head=1, n_ffn=64)
    parts = dict(encoder=data['units'] + '/encoder', vocoder=data['units'] + '/vocoder')
    slm = M.SLM(M.SLMConfig(**small, vocab_size=52, context=512))
    slm.save_pretrained(str(tmp_path / 'small'), parts | dict(n_units=50))
    good, prompt = f'--init={data["slm"]}', f'--prompt={data["audio"]}'
    for args, word in (
        ([good, f'--prompt={tmp_path}/empty.wav'], 'empty.wav'),
        ([good, f'--prompt={tmp_path}/text.wav'], 'text.wav'),
        ([good, f'--prompt={tmp_path}/nan.wav'], 'NaN'),
        ([good, f'--prompt={tmp_path}/far.jsonl'], 'unit 100'),
        ([f'--init={tmp_path}/small', prompt], 'units do not match.*has 50.*has 100.*has 100'),
        ([good, '--resynth'], '--prompt'),
        ([good, prompt, f'--stream={tmp_path}/a.wav', '--resynth'], '--stream'),
        ([good, prompt, f'--stream={tmp_path}'], 'expected'),
        ([good, prompt, '--speaker=-1'], 'negative'),
        ([f'--init={tmp_path}', prompt, '--resynth'], 'no slam.json'),
        ([f'--init={tmp_path}/none', prompt], 'none'),
    ):
        with pytest.raises(M.InputError, match=word) as error:
            run(monkeypatch, capsys, *args, f'--out={tmp_path}/o')
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'o').exists()
    command = [sys.executable, 'sample.py', good, f'--prompt={tmp_path}/text.wav']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and 'text.wav' in done.stderr
