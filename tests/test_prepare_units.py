"""prepare_units.py: an uninterrupted run is the oracle for all others, plain encoding of the waves
for every layout of data."""

import glob
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
import tqdm

import prepare_units as P
from model import UnitEncoder, dedup, load_audio, save_audio

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAIR = ('prompt', 'chosen', 'rejected')


def script(args, env, log):
    """prepare_units.py as a command runs it, in a forked process that has its libraries loaded."""
    os.setsid()  # so that a kill takes the workers along
    os.makedirs(log, exist_ok=True)
    sys.stdout, sys.stderr = open(f'{log}/out', 'w'), open(f'{log}/err', 'w')
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # else one shared by all, which a kill may leave locked
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [os.path.join(ROOT, 'prepare_units.py'), *map(str, args)]
    sys.modules.pop('config', None)  # it looks at sys.argv
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


def begin(log, *args, **env):
    process = multiprocessing.get_context('fork').Process(target=script, args=(args, env, str(log)))
    process.start()
    process.log = log
    return process


def end(process, code=0):
    """Wait for it -> its last line, of stderr where it fails."""
    process.join(300)
    text = {name: open(f'{process.log}/{name}').read() for name in ('out', 'err')}
    assert process.exitcode == code and 'Traceback' not in text['err'], text['err'][-2000:]
    return text['err' if code else 'out'].strip().splitlines()[-1]


@pytest.fixture
def run(tmp_path):
    """run(*args, code=0, **environment) -> the last line that the script printed."""
    return lambda *args, code=0, **env: end(begin(tmp_path / 'log', *args, **env), code)


def speech(seconds, seed):
    """Three tones that change every 100 ms, and a little noise: (samples,) float32."""
    rng = np.random.default_rng(seed)
    pitches = rng.uniform(200, 3000, (3, round(seconds * 10))).repeat(1600, 1)
    wave = 0.1 * np.sin(np.cumsum(2 * np.pi * pitches / 16000, 1)).sum(0)
    return (wave + 0.001 * rng.standard_normal(len(wave))).astype('float32')


def write(path, wave, rate=16000, **options):
    """Write a sound file -> what is in it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, wave, rate, **options)
    return soundfile.read(path, dtype='float32')[0]


def write_rows(path, rows, encoding='utf-8'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding=encoding) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def rows(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def meta(folder):
    return json.loads((folder / 'meta.json').read_text())


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """A folder with an MFCC encoder of 40 units."""
    folder, net = tmp_path_factory.mktemp('encoder') / 'x', UnitEncoder.from_pretrained('mfcc')
    frames = torch.cat([net.features(torch.from_numpy(speech(20, seed))) for seed in range(3)])
    net.fit(frames, 40)
    net.save_pretrained(folder)
    os.mkdir(folder.parent / 'vocoder')  # a voice beside it
    return folder


def units_of(encoder, wave):
    """What a row of units.jsonl must have of a wave."""
    net = UnitEncoder.from_pretrained(str(encoder))
    units, durations = dedup(net.encode(torch.as_tensor(wave)))
    return dict(units=units.tolist(), duration=durations.tolist())


def test_splits_by_folder_and_by_name(monkeypatch):
    names, val = [f'a/{i}.flac' for i in range(4000)], {}
    for share in (0.05, 0.1):
        monkeypatch.setattr(P, 'val_fraction', share)
        val[share] = {name for name in names if P.split_by_hash(name) == 'val'}
    assert 150 < len(val[0.05]) < 250 and val[0.05] <= val[0.1]
    for name, split in {
        'LibriSpeech/dev-clean/1/2.flac': 'val',
        'LibriSpeech/test-other/1/2.flac': 'test',
        'TIMIT/TEST/DR1/a.wav': 'test',
        'x/Validation/a.wav': 'val',
        'data/validation-00000-of-00001.parquet': 'val',
        'hub:owner/name:test#0/4': 'test',
        'train/dev-clean.flac': '',
        'development/contest/testimony/a.flac': '',
    }.items():
        assert P.split_by_folder(name) == split, name


# -----------------------------------------------------------------------------
# Sources: each gives the units of the waves that it was made of


def test_folders_of_files_and_voice_activity(run, encoder, tmp_path):
    """LibriSpeech; Libri-Light's cut, whatever the format; test sets, in capitals too; m4a."""
    root, waves = tmp_path / 'in', {}
    for i, split in enumerate(('train-clean-100', 'dev-clean', 'TEST')):
        name = f'LibriSpeech/{split}/19/198/{i}.flac'
        waves[name, None] = write(f'{root}/{name}', speech(1.0 + i, i))
    activity = [[0.3, 20.1], [20.5, 40.0], [41.0, 58.7], [59.0, 88.0]]
    for kind in ('flac', 'wav'):
        name = f'light/100/{kind}.{kind}'
        wave = write(f'{root}/{name}', np.tile(speech(9.0, 5), 10))
        (root / f'light/100/{kind}.json').write_text(json.dumps(dict(voice_activity=activity)))
        # Libri-Light's cut_by_vad.py: at most 60 s together
        pieces = [wave[round(a * 16000) : round(b * 16000)] for a, b in activity]
        waves[name, 0.3], waves[name, 59.0] = np.concatenate(pieces[:3]), pieces[3]
    for i in range(3):
        (root / f'light/{i}.m4a').write_bytes(b'\0\0\0 ftypM4A ' + bytes(500))
    os.symlink('..', root / 'light/circle')
    os.symlink('100/wav.wav', os.fsencode(root / 'light') + b'/\xff.wav')  # a name not in UTF-8
    summary = run(f'--audio={root}', f'--encoder={encoder}', f'--out={tmp_path}/out')
    assert '1 of test sets left out' in summary and '3 failed' in summary and '.m4a' in summary
    made = rows(tmp_path / 'out/units.jsonl')
    found = {(row['file_name'], row.get('start')): row for row in made}
    odd = found.pop(next(key for key in found if key[0].endswith('\udcff.wav') or 'xff' in key[0]))
    assert odd['seconds'] == 90.0
    del waves['LibriSpeech/TEST/19/198/2.flac', None]
    assert found.keys() == waves.keys()
    for key, row in found.items():
        assert row.items() >= units_of(encoder, waves[key]).items(), key
        assert row['split'] == ('val' if 'dev-clean' in key[0] else 'train')
    about = meta(tmp_path / 'out')
    assert about['failed'] == 3 and about['left_out'] == 1 and about['utterances']['val'] == 1
    assert about['encoder_id'] == UnitEncoder.from_pretrained(str(encoder)).encoder_id
    kinds = [row['kind'] for row in rows(tmp_path / 'out/failed.jsonl')]
    assert sorted(kinds) == ['failed'] * 3 + ['of test sets left out']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_segments_of_a_manifest(run, encoder, tmp_path, encoding):
    """A talk in pieces: by start and end, or offset and duration; words and phones follow."""
    wave = write(f'{tmp_path}/in/Präsenz Ċ.wav', speech(9.0, 3))
    words = [[f'ü{i}', i * 0.5, i * 0.5 + 0.4] for i in range(18)]
    row = dict(path='Präsenz Ċ.wav', words=words, phones=words, text='all of it', voice='v')
    spans = dict(end=3.0, prompt='p'), dict(start=None, offset=3, duration=2.5), dict(start=5.5), {}
    pair = {f'{part}_path': row['path'] for part in PAIR} | dict(chosen_text='yes', seconds=1)
    write_rows(f'{tmp_path}/in/manifest.jsonl', [pair, *(row | span for span in spans)], encoding)
    run(f'--audio={tmp_path}/in', f'--encoder={encoder}', f'--out={tmp_path}/out')
    found = rows(tmp_path / 'out/units.jsonl')
    for row, (start, end) in zip(found, [(0, 3.0), (3.0, 5.5), (5.5, 9.0), (0, 9.0)], strict=True):
        piece = wave[round(start * 16000) : round(end * 16000)]
        assert row.items() >= units_of(encoder, piece).items()
        assert row['seconds'] == end - start and row['voice'] == 'v'
        assert row['words'] == row['phones']
        for label, first, _ in row['words']:
            assert first == pytest.approx(int(label[1:]) * 0.5 - start)
    assert [word for row in found[:3] for word, *_ in row['words']] == [word for word, *_ in words]
    (pair,) = rows(tmp_path / 'out/pairs.jsonl')
    for part in PAIR:
        wanted = units_of(encoder, wave) | dict(text='yes' * (part == 'chosen'))
        assert pair[part].items() >= wanted.items()
    assert meta(tmp_path / 'out')['vocoder'] == str(encoder.parent / 'vocoder')
    assert found[0]['text'] == 'ü0 ü1 ü2 ü3 ü4 ü5' and found[3]['text'] == 'all of it'


def test_splits_of_rows(run, encoder, tmp_path):
    names = ['train', 'val', 'train.100', 'dev-clean', 'Train', 'training', 'VALIDATION', 'Test']
    for i in range(len(names)):
        write(f'{tmp_path}/in/{i}.wav', speech(0.5, i))
    made = [dict(path=f'{i}.wav', split=name) for i, name in enumerate(names)]
    write_rows(f'{tmp_path}/in/manifest.jsonl', made)
    summary = run(f'--audio={tmp_path}/in', f'--encoder={encoder}', f'--out={tmp_path}/out')
    assert meta(tmp_path / 'out')['utterances'] == dict(train=4, val=3)
    assert '1 of test sets left out' in summary
    write_rows(f'{tmp_path}/in/manifest.jsonl', [*made, dict(path='0.wav', split='others')])
    again = run(f'--audio={tmp_path}/in', f'--encoder={encoder}', f'--out={tmp_path}/x', code=2)
    assert "line 9: split 'others' is not known" in again and 'validation' in again


def wav_bytes(wave):
    soundfile.write(buffer := io.BytesIO(), wave, 16000, format='WAV')
    return buffer.getvalue()


def test_parquet_with_null_rows_and_pairs(run, encoder, tmp_path):
    import pyarrow
    import pyarrow.parquet

    audio = [dict(bytes=wav_bytes(speech(1, i)), path=f'{i}.wav') for i in range(5)]
    audio[2] = None
    table = dict(raw_text=list('abcde'), split=['train'] * 4 + ['test'], audio=audio)
    os.makedirs(tmp_path / 'in')
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / 'in/train-0.parquet')
    pairs = {part: audio[:2] for part in PAIR} | dict(speaker=['v', 'w'], prompt_text=['P', 'Q'])
    pairs['rejected'] = [audio[3], None]
    pyarrow.parquet.write_table(pyarrow.table(pairs), tmp_path / 'in/train-1.parquet')
    summary = run(f'--audio={tmp_path}/in', f'--encoder={encoder}', f'--out={tmp_path}/out')
    assert '2 failed' in summary and '1 of test sets left out' in summary and '1 pairs' in summary
    found = rows(tmp_path / 'out/units.jsonl')
    assert [row['text'] for row in found] == ['a', 'b', 'd']
    assert found[2]['file_name'] == 'train-0/00003'
    for row, i in zip(found, (0, 1, 3), strict=True):
        assert row.items() >= units_of(encoder, load_audio(io.BytesIO(audio[i]['bytes']))).items()
    (pair,) = rows(tmp_path / 'out/pairs.jsonl')
    assert pair['prompt']['text'] == 'P' and pair['voice'] == 'v'
    assert pair['rejected']['units'] == found[2]['units']


def test_lost_and_doubtful_sound(run, encoder, tmp_path):
    """Cut short: failed, unless --keep_partial, then without the words beyond. Channels that cancel
    give the units of one. Silence is counted."""
    wave = write(f'{tmp_path}/in/mono.wav', speech(4.0, 1))
    write(f'{tmp_path}/in/cancel.wav', np.stack([wave, -wave], 1))
    write(f'{tmp_path}/in/silent.wav', np.zeros(32000, 'float32'))
    write(f'{tmp_path}/in/cut.flac', wave)
    content = (tmp_path / 'in/cut.flac').read_bytes()
    (tmp_path / 'in/cut.flac').write_bytes(content[: len(content) // 2])
    words = [[str(i), i * 0.5, i * 0.5 + 0.4] for i in range(20)]
    made = [dict(path=f'{name}.wav') for name in ('mono', 'cancel', 'silent')]
    made.append(dict(path='cut.flac', words=words[:8], text='0 1 2 3 4 5 6 7'))
    made.append(dict(path='mono.wav', words=words, text='more than there is'))
    made.append(dict(path='mono.wav', start=1, end=9))
    write_rows(f'{tmp_path}/in/manifest.jsonl', made)
    args = f'--audio={tmp_path}/in', f'--encoder={encoder}', '--val_fraction=0'
    summary = run(*args, f'--out={tmp_path}/out')
    assert '3 failed' in summary and '2 doubtful' in summary
    mono, cancel, silent = rows(tmp_path / 'out/units.jsonl')
    assert mono['units'] == cancel['units'] and silent['seconds'] == 2.0
    reasons = ' '.join(row['reason'] for row in rows(tmp_path / 'out/failed.jsonl'))
    assert all(text in reasons for text in ('stopped early', 'channels cancel', 'silence'))
    run(*args, f'--out={tmp_path}/partial', '--keep_partial')
    cut, long, segment = rows(tmp_path / 'partial/units.jsonl')[3:]
    assert 0 < cut['seconds'] < 4 and 0 < len(cut['words']) < 8
    assert cut['text'].split() == [word for word, *_ in cut['words']]
    assert long['text'] == '0 1 2 3 4 5 6 7' and segment['seconds'] == 3.0
    assert meta(tmp_path / 'partial')['failed'] == 0


def test_units_made_elsewhere(run, tmp_path):
    """features.jsonl and tokens.jsonl as the public toolkits write them, and tokenised pairs."""
    feature = dict(units=[3, 3, 4], duration=[1, 2, 1], file_name='../audio/x.flac')
    write_rows(f'{tmp_path}/a/features.jsonl', [feature, dict(units=[5], split='Test')])
    write_rows(f'{tmp_path}/a/tokens.jsonl', [dict(audio_repr='<Un12><Un7><Un7>'), dict(units=[])])
    pair = {part: dict(audio_repr=f'<Un{i}><Un9>') for i, part in enumerate(PAIR)}
    write_rows(f'{tmp_path}/a/pairs.jsonl', [pair])
    args = f'--from_units={tmp_path}/a/*.jsonl', '--val_fraction=0', '--n_units=500'
    summary = run(*args, f'--out={tmp_path}/out', '--encoder=mhubert25')
    tokens = np.fromfile(tmp_path / 'out/train.bin', 'uint16').tolist()
    assert tokens == [1, 5, 6, 1, 1, 14, 9, 1]
    assert rows(tmp_path / 'out/units.jsonl')[0]['duration'] == [3, 1]
    assert rows(tmp_path / 'out/pairs.jsonl')[0]['chosen']['units'] == [1, 9]
    assert all(text in summary for text in ('1 pairs', '1 of test sets', '1 without units'))
    about = meta(tmp_path / 'out')
    assert about['vocab_size'] == 502 and about['encoder'] == about['encoder_id'] == 'mhubert25'
    run(*args, f'--out={tmp_path}/unknown')
    about = meta(tmp_path / 'unknown')
    assert about['encoder'] is None and about['encoder_id'] is None
    asked = run(args[0], f'--out={tmp_path}/asked', code=2)
    assert 'give --n_units' in asked


def test_our_units_keep_their_origin_and_different_ones_do_not_mix(run, encoder, tmp_path):
    for i, name in enumerate('ab'):
        write(f'{tmp_path}/{name}/x.wav', speech(8, i))
        fit = ('--encoder=mfcc', '--fit_kmeans=8') if i else (f'--encoder={encoder}',)
        run(f'--audio={tmp_path}/{name}', f'--out={tmp_path}/u{name}', *fit, '--val_fraction=0')
    run(f'--from_units={tmp_path}/ua/units.jsonl', f'--out={tmp_path}/again', '--val_fraction=0')
    old, new = meta(tmp_path / 'ua'), meta(tmp_path / 'again')
    for key in ('n_units', 'frame_rate', 'encoder_id', 'tokens', 'vocab_size'):
        assert new[key] == old[key]
    assert UnitEncoder.from_pretrained(new['encoder']).encoder_id == old['encoder_id']
    both = f'--from_units={tmp_path}/ua/units.jsonl,{tmp_path}/ub/units.jsonl'
    assert 'different encoders' in run(both, f'--out={tmp_path}/both', code=2)
    del old['encoder_id']  # as earlier versions wrote it
    (tmp_path / 'ua/meta.json').write_text(json.dumps(old))
    run(f'--from_units={tmp_path}/ua/units.jsonl', f'--out={tmp_path}/old', '--val_fraction=0')
    assert meta(tmp_path / 'old').items() >= dict(encoder_id=None, tokens=old['tokens']).items()


# -----------------------------------------------------------------------------
# Work on disk


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp('corpus')
    for i in range(40):
        folder = 'dev' if i % 10 == 0 else 'train'
        save_audio(root / folder / f'{i:02d}.flac', torch.from_numpy(speech(0.5 + i % 7 * 0.3, i)))
    for i, content in enumerate([b'', b'RIFF', b'fLaC']):
        (root / 'train' / f'bad{i}.wav').write_bytes(content)
    return root


SETTINGS = ('--encoder=mfcc', '--fit_kmeans=20', '--fit_frames=600', '--fit_vocoder')
MADE = [
    *('units.jsonl', 'train.bin', 'val.bin', 'failed.jsonl', 'encoder/encoder.json'),
    *('encoder/encoder.safetensors', 'vocoder/vocoder.safetensors', 'vocoder/vocoder.json'),
]


def contents(folder):
    return {name: open(f'{folder}/{name}', 'rb').read() for name in MADE}


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """One uninterrupted run with a voice."""
    out = tmp_path_factory.mktemp('whole')
    summary = end(begin(out / 'log', f'--audio={corpus}', f'--out={out}', *SETTINGS, '--workers=2'))
    assert '3 failed' in summary
    return out


def test_token_files_are_the_units(corpus, whole):
    about, units = meta(whole), rows(whole / 'units.jsonl')
    for split in ('train', 'val'):
        tokens = np.fromfile(whole / f'{split}.bin', dtype=about['dtype'])
        wanted = [[1, *(u + 2 for u in row['units']), 1] for row in units if row['split'] == split]
        assert tokens.tolist() == sum(wanted, [])
        assert len(tokens) == about['tokens'][split] and len(wanted) == about['utterances'][split]
    expected = dict(encoder='encoder', vocoder='vocoder', vocab_size=22, failed=3, files=43)
    assert about.items() >= expected.items() and about['recipe']['kmeans'] == ''
    rate = sum(len(row['units']) for row in units) / sum(row['seconds'] for row in units)
    assert about['tokens_per_second'] == pytest.approx(rate, abs=0.01)
    wave = load_audio(corpus / 'dev/10.flac')
    assert units[1].items() >= units_of(whole / 'encoder', wave).items()


@pytest.mark.parametrize('shards, workers, torchrun', [(1, 3, False), (3, 1, False), (2, 1, True)])
def test_killed_at_any_moment_the_same_bytes(corpus, whole, tmp_path, shards, workers, torchrun):
    """Killed with -9 whenever another file has appeared, then continued to the end."""
    args = [f'--audio={corpus}', f'--out={tmp_path}/out', *SETTINGS, f'--workers={workers}']

    def start(i):
        env = dict(WORLD_SIZE=str(shards), RANK=str(i)) if torchrun else {}
        more = [] if torchrun else [f'--shard={i}/{shards}']
        return begin(tmp_path / f'log{i}', *args, *more, **env)

    def files():
        return len(glob.glob(f'{tmp_path}/out/**', recursive=True))

    for _ in range(3):
        processes = [start(i) for i in range(shards)]
        seen = files() + random.Random(shards).randrange(3)
        while files() <= seen and any(process.is_alive() for process in processes):
            pass
        for process in processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    for process in [start(i) for i in range(shards)]:
        end(process)
    assert contents(tmp_path / 'out') == contents(whole)


def test_a_finished_folder_is_left_alone_and_others_refused(corpus, whole, run, tmp_path):
    shutil.copytree(corpus, tmp_path / 'moved')
    shutil.copytree(whole, tmp_path / 'out')
    args = [f'--audio={tmp_path}/moved', f'--out={tmp_path}/out']
    assert 'nothing to do' in run(*args, *SETTINGS, '--workers=1')  # by content, not by path
    assert 'other fit_kmeans' in run(*args, *SETTINGS, '--fit_kmeans=9', code=2)
    assert 'other' in run(f'--from_units={whole}/units.jsonl', args[1], code=2)
    shutil.rmtree(tmp_path / 'out/vocoder')  # a voice may be asked for later
    run(*args, *SETTINGS)
    assert contents(tmp_path / 'out') == contents(whole)
    path = tmp_path / 'moved/train/01.flac'  # as long, but another
    content = bytearray(path.read_bytes())
    content[-20] ^= 255
    path.write_bytes(content)
    refused = run(*args, *SETTINGS, code=2)
    assert 'other inputs: choose another --out' in refused


@pytest.mark.parametrize(
    'args, message',
    [
        (['--audio=nowhere'], 'nowhere: no such file'),
        ([''], '--audio names nothing'),
        (['--audio=README.md', '--encoder=mfcc'], 'has no k-means'),
        (['--audio=README.md', '--encoder=mfcc', '--fit_kmeans=9'], 'no training speech'),
        (['--from_units=README.md', '--n_units=4'], 'README.md, line 1'),
        (['--audio={}/rows.jsonl'], "rows.jsonl, line 2 cannot be read: 'path'"),
        (['--audio={}/spans.jsonl'], 'spans.jsonl, line 1 cannot be read: expected 0 <= start'),
        (['--audio={}/latin.jsonl'], "latin.jsonl cannot be read: 'utf-8' codec can't decode byte"),
        (['--from_units={}/units.jsonl', '--n_units=4'], 'has unit 4: --n_units=4'),
        (['--from_units={}/units.jsonl', '--n_units=4', '--out={}/old'], 'made with other'),
        (['--audio=README.md', '--workes=2'], 'did you mean workers'),
        (['--audio=README.md', '--shard=2/2'], '--shard=2/2: expected 0/2 to 1/2'),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, args, message):
    write_rows(f'{tmp_path}/rows.jsonl', [dict(path='a.wav'), dict(text='no path')])
    write_rows(f'{tmp_path}/spans.jsonl', [dict(path='a.wav', start=3, end=2)])
    write_rows(f'{tmp_path}/latin.jsonl', [dict(path='ü.wav')], 'latin-1')
    write_rows(f'{tmp_path}/units.jsonl', [dict(units=[1, 4])])
    write_rows(f'{tmp_path}/old/meta.json', [dict(n_units=4)])
    args = [argument.format(tmp_path) for argument in (f'--out={tmp_path}/out', *args) if argument]
    assert message in run(*args, code=2)
