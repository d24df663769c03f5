"""prepare_units.py: an uninterrupted run is the oracle for all others, plain encoding of the waves
for every layout of public data, scikit-learn for the report."""

import glob
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import tarfile
import tempfile
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
import tqdm
import transformers
from test_encoder import speech

import prepare_units as P
from model import (
    InputError,
    UnitEncoder,
    dedup,
    load_audio,
    save_audio,
)

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def script(args, env, log):
    """prepare_units.py as a command runs it, in a forked process that has its libraries loaded."""
    sys.stdout, sys.stderr = open(f'{log}/out', 'w'), open(f'{log}/err', 'w')
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # else one shared by all, which a kill may leave locked
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [os.path.join(ROOT, 'prepare_units.py'), *args]
    for name in list(sys.modules):  # these look at sys.argv and the environment
        if name == 'config' or name.startswith('huggingface_hub'):
            del sys.modules[name]
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


def begin(*args, **env):
    process = multiprocessing.get_context('fork').Process(
        target=script, args=(args, env, log := tempfile.mkdtemp())
    )
    process.start()
    process.log = log
    return process


def end(process, check=0):
    """Wait for it -> its last line, of stderr where it fails."""
    process.join(300)
    said = {name: open(f'{process.log}/{name}').read() for name in ('out', 'err')}
    shutil.rmtree(process.log)
    assert process.exitcode == check and 'Traceback' not in said['err'], said['err'][-2000:]
    return said['err' if check else 'out'].strip().splitlines()[-1]


def run(*args, check=0, **env):
    return end(begin(*args, **env), check)


def small_net():
    """A random HuBERT of 25 Hz."""
    config = transformers.HubertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        conv_dim=(24,) * 8,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2, 2),
    )
    return transformers.HubertModel(config)


def rows(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def same_files(a, b, names):
    for name in names:
        assert (
            open(os.path.join(a, name), 'rb').read() == open(os.path.join(b, name), 'rb').read()
        ), name


# --------------------------------------------------------------- k-means, cutting, splits


def test_k_means_is_as_good_as_scikit_learn_and_moves_empty_clusters():
    cluster = pytest.importorskip('sklearn.cluster')
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 6, generator=rng) * torch.linspace(0.3, 2, 6)
    found, distance = P.cluster(x, 40, seed=3)
    theirs = cluster.KMeans(40, n_init=3, random_state=0).fit(x.numpy())
    assert distance < 1.03 * theirs.inertia_ / len(x)
    nearest = torch.cdist(x.double(), found.double()).min(1).values
    assert abs(float(nearest.square().mean()) / distance - 1) < 0.01
    assert torch.equal(found, P.cluster(x, 40, seed=3)[0])
    found, _ = P.cluster(torch.cat((torch.zeros(1000, 2), torch.ones(1000, 2))), 2, seed=0)
    assert sorted(found[:, 0].tolist()) == [0, 1]
    with pytest.raises(InputError, match='too few'):
        P.cluster(x[:5], 12, seed=0)


def test_cutting_loses_no_sample_and_finds_the_pauses():
    wave = np.random.default_rng(0).standard_normal(16000 * 100).astype('float32')
    for second in (7.5, 14.0, 22.0):
        wave[int(16000 * (second - 0.2)) : int(16000 * (second + 0.2))] = 0
    spans = P.cut(wave, 160000)
    assert spans[0][0] == 0 and spans[-1][1] == len(wave)
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert all(0 < end - start <= 160000 and start % 640 == 0 for start, end in spans)
    for (_, end), second in zip(spans, (7.5, 14.0, 22.0), strict=False):
        assert abs(end / 16000 - second) < 0.2
    for extra in (1, 100, 5000):
        assert min(end - start for start, end in P.cut(wave[: 160000 + extra], 160000)) > 20000
    assert P.cut(wave[:160000], 160000) == [(0, 160000)]
    assert P.cut(wave, 0) == [(0, len(wave))]  # the default: never


def test_a_cut_utterance_keeps_its_words_and_phones():
    wave = speech(9.0).numpy()
    words = [[str(i), i * 0.5, i * 0.5 + 0.4] for i in range(18)]
    row = dict(text='all', words=words, phones=words)
    pieces = [piece.row for piece in P.cut_pieces(wave, row, 4)]
    assert [piece['piece'] for piece in pieces] == ['1/3', '2/3', '3/3']
    assert sum((piece['text'].split() for piece in pieces), []) == [word for word, _, _ in words]
    for piece in pieces:
        assert piece['phones'] == piece['words']
        for label, start, end in piece['words']:
            assert 0 <= start < end <= piece['seconds']
            assert abs(start + piece['start'] - int(label) * 0.5) < 0.2
    (whole,) = P.cut_pieces(wave, row, 0)
    assert whole.row == row | dict(seconds=9.0) and len(whole.waves[0]) == len(wave)


def test_splits_by_folder_and_by_name(monkeypatch):
    names = [f'a/{i}.flac' for i in range(4000)]
    val = {}
    for share in (0.05, 0.1):
        monkeypatch.setattr(P, 'val_fraction', share)
        val[share] = {name for name in names if P.split_by_hash(name) == 'val'}
    assert 150 < len(val[0.05]) < 250 and val[0.05] <= val[0.1]
    for name, expected in {
        'LibriSpeech/dev-clean/1/2.flac': 'val',
        'LibriSpeech/test-other/1/2.flac': 'test',
        'legacy/test/sph/a.sph': 'test',
        'data/validation-00000-of-00001.parquet/': 'val',
        'train/dev-clean.flac': '',
        'development/contest/testimony/a.flac': '',
    }.items():
        assert P.split_by_folder(name) == expected
    monkeypatch.setattr(P, 'val_folders', 'test-*, held_out/')
    assert P.split_by_folder('x/test-clean/1.flac') == 'val'
    assert P.split_by_folder('x/dev-clean/1.flac') == ''


def choose(monkeypatch, names, val_folders='', exclude=''):
    monkeypatch.setattr(P, 'val_folders', val_folders)
    monkeypatch.setattr(P, 'exclude', exclude)
    corpus = P.choose_items([[P.Item('file', f'/r/{name}') for name in names]], '/r')
    return [(item.path[3:], item.split) for item in corpus.items], corpus.left_out


def test_what_is_left_out(monkeypatch):
    names = ['train/a', 'dev-clean/b', 'test-clean/c', 'x/bad-1']
    chosen, left_out = choose(monkeypatch, names)
    assert chosen == [('train/a', 'train'), ('dev-clean/b', 'val'), ('x/bad-1', 'train')]
    assert left_out == 1
    assert choose(monkeypatch, names, exclude='bad-*,dev-clean') == ([('train/a', '')], 3)
    assert choose(monkeypatch, names, val_folders='x')[0] == [
        *(('train/a', 'train'), ('dev-clean/b', 'train'), ('x/bad-1', 'val'))
    ]
    assert choose(monkeypatch, ['test-clean/c']) == (
        [('test-clean/c', '')],
        0,
    )  # a test set alone was meant
    with pytest.raises(InputError, match='--exclude'):
        choose(monkeypatch, names, exclude='*')


# --------------------------------------------------------------- public layouts


def tone(seconds, seed):
    return speech(seconds, seed).numpy()


def write(path, wave, rate=16000, **how):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, wave, rate, **how)
    return soundfile.read(path, dtype='float32')[0]


def wav_bytes(wave):
    soundfile.write(buffer := io.BytesIO(), wave, 16000, format='WAV')
    return buffer.getvalue()


def official_cut(data, activity, target):
    """Libri-Light's cut_by_vad.py, its loop, on samples."""
    stitched, seconds, pieces = [], 0.0, []
    for start, end in activity:
        if seconds + (end - start) > target and seconds > 0:
            pieces.append(np.hstack(stitched))
            stitched, seconds = [], 0
        stitched.append(data[int(start * 16000) : int(end * 16000)])
        seconds += end - start
    return [*pieces, np.hstack(stitched)] if stitched else pieces


@pytest.fixture(scope='module')
def public(tmp_path_factory):
    """Small copies of the true layouts -> (folder, {name of a row: the wave it was made of})."""
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    root, waves = tmp_path_factory.mktemp('public'), {}

    for i, split in enumerate(('train-clean-100', 'dev-clean', 'test-clean')):
        name = f'LibriSpeech/{split}/19/198/19-198-000{i}.flac'
        waves[name] = write(f'{root}/{name}', tone(1.0 + i, i))
        (root / f'LibriSpeech/{split}/19/198/19-198.trans.txt').write_text(f'19-198-000{i} WORDS\n')

    book = 'librilight/small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb'
    wave = write(f'{root}/{book}.flac', np.tile(tone(9.0, 5), 10))
    activity = [[0.3, 20.1], [20.5, 40.0], [41.0, 58.7], [59.0, 88.0]]
    meta = dict(speaker='100', book_meta=dict(id='1'), snr=9.5, voice_activity=activity)
    (root / f'{book}.json').write_text(json.dumps(meta))
    for start, piece in zip((0.3, 59.0), official_cut(wave, activity, 60), strict=True):
        waves[f'{book}.flac', start] = piece

    ted = 'TEDLIUM_release-3/legacy/train'
    wave = write(f'{root}/{ted}/sph/AlGore_2009.sph', tone(6.0, 6), format='NIST', subtype='PCM_16')
    os.makedirs(root / ted / 'stm')
    (root / ted / 'stm/AlGore_2009.stm').write_text(
        'AlGore_2009 1 AlGore_2009 0.50 2.25 <o,f0,male> and so we begin\n'
        'AlGore_2009 1 inter_segment_gap 2.25 3.00 <o,,unknown> ignore_time_segment_in_scoring\n'
        'AlGore_2009 1 AlGore_2009 3.00 5.50 <o,f0,male> the end\n'
    )
    for start, end in ((0.5, 2.25), (3.0, 5.5)):
        waves[f'{ted}/sph/AlGore_2009.sph', start] = wave[int(start * 16000) : int(end * 16000)]

    name = 'voxpopuli/raw_audios/en/2009/20090112-0900-PLENARY_en.ogg'
    waves[name] = write(f'{root}/{name}', tone(2.0, 7))

    for kind, archive in (('w', 'shard.tar'), ('w:gz', 'train-other-500.tar.gz')):
        with tarfile.open(root / archive, kind) as tar:
            for i in range(2):
                wave = write(f'{root}/aside/{i}.wav', tone(1.0 + i / 2, 8 + i))
                tar.add(f'{root}/aside/{i}.wav', f'in/{i}.wav')
                waves[f'{archive.split(".")[0]}/in/{i}.wav'] = wave
    shutil.rmtree(root / 'aside')

    def struct(seed, name):
        wave = load_audio(io.BytesIO(data := wav_bytes(tone(0.8 + seed % 3 / 5, seed)))).numpy()
        return dict(bytes=data, path=name), wave

    os.makedirs(root / 'stories')
    for shard in range(2):
        structs = [struct(10 * shard + i, f'{i}.wav') for i in range(3)]
        table = dict(text=['one', 'two', 'three'], audio=[struct for struct, _ in structs])
        shard_name = f'stories/train-0000{shard}-of-00002'
        pq.write_table(pa.table(table), f'{root}/{shard_name}.parquet', row_group_size=2)
        for i, (_, wave) in enumerate(structs):
            waves[f'{shard_name}/0000{i}-{i}.wav'] = wave

    os.makedirs(root / 'SpokenSwag/data')
    table = dict(speaker=['af_heart'], auto_bleu2=[0.25])
    for seed, part in enumerate(P.PAIR, 40):
        audio, waves['SpokenSwag', part] = struct(seed, None)
        table |= {f'{part}_text': [part.upper()], part: [audio]}
    pq.write_table(pa.table(table), root / 'SpokenSwag/data/train-00000-of-00058.parquet')
    return root, waves


@pytest.fixture(scope='module')
def packed(public, tmp_path_factory):
    """All of them in one run, with an encoder made here."""
    root, _ = public
    folder = tmp_path_factory.mktemp('packed')
    net = UnitEncoder.from_pretrained('mfcc')
    x = torch.cat(net.features([speech(20, seed) for seed in range(3)]))
    net.centroids, net.config['distortion'] = P.cluster(x, 40, seed=1)
    net.save_pretrained(folder / 'encoder')
    said = run(f'--audio={root}', f'--encoder={folder}/encoder', f'--out={folder}/out')
    return said, folder, UnitEncoder.from_pretrained(str(folder / 'encoder'))


def test_every_public_layout_gives_the_units_of_its_waves(public, packed):
    (_, waves), (said, folder, net) = public, packed
    found = {row['file_name']: row for row in rows(folder / 'out/units.jsonl')}
    found |= {(row['file_name'], row.get('start')): row for row in rows(folder / 'out/units.jsonl')}
    kept = {key: wave for key, wave in waves.items() if 'SpokenSwag' not in key}
    left = [key for key in kept if key not in found]
    assert left == ['LibriSpeech/test-clean/19/198/19-198-0002.flac']
    assert len(rows(folder / 'out/units.jsonl')) == len(kept) - 1
    for key, wave in kept.items():
        if key not in left:
            units, duration = dedup(net.encode([torch.from_numpy(wave)])[0])
            assert found[key]['units'] == units.tolist(), key
            assert found[key]['duration'] == duration.tolist()
    for row in found.values():
        assert row['split'] == ('val' if 'dev-clean' in row['file_name'] else 'train')
    ted = found['TEDLIUM_release-3/legacy/train/sph/AlGore_2009.sph', 3.0]
    assert (ted['text'], ted['voice'], ted['seconds']) == ('the end', 'AlGore_2009', 2.5)
    assert found['stories/train-00001-of-00002/00002-2.wav']['text'] == 'three'
    assert '1 files left out' in said and 'none cut' in said and '1 pairs' in said
    (pair,) = rows(folder / 'out/pairs.jsonl')
    for part in P.PAIR:
        units = dedup(net.encode([torch.from_numpy(waves['SpokenSwag', part])])[0])[0]
        assert pair[part]['units'] == units.tolist() and pair[part]['text'] == part.upper()
    assert pair['voice'] == 'af_heart' and pair['auto_bleu2'] == 0.25


def serve_hub(root, repo):
    """The hub's two answers that listing and fetching a data set need, over HTTP."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            path, body = self.path.split('?')[0], b''
            tree, resolve = f'/api/datasets/{repo}/tree/main', f'/datasets/{repo}/resolve/main/'
            if path == tree:
                files = [path for path in root.rglob('*') if path.is_file()]
                answer = [
                    dict(type='file', path=str(path.relative_to(root)), size=1, oid='0' * 40)
                    for path in files
                ]
                body = json.dumps(answer).encode()
            elif path.startswith(resolve):
                body = (root / path.removeprefix(resolve)).read_bytes()
            self.send_response(200 if body else 404)
            self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header('X-Repo-Commit', '0' * 40)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(body)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_data_of_the_hub_fetched_once_and_then_offline(public, packed, tmp_path):
    (root, _), (_, folder, _) = public, packed
    server = serve_hub(root / 'stories', 'slprl/sTinyStories')
    args = ('--audio=hub:slprl/sTinyStories:train', f'--encoder={folder}/encoder')
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=f'{tmp_path}/hf')
    run(*args, f'--out={tmp_path}/a', **env)
    server.shutdown()
    server.server_close()
    run(*args, f'--out={tmp_path}/b', **env, HF_HUB_OFFLINE='1')
    same_files(tmp_path / 'a', tmp_path / 'b', ['units.jsonl', 'train.bin'])
    hub, local = rows(tmp_path / 'a/units.jsonl'), rows(folder / 'out/units.jsonl')
    local = [row['units'] for row in local if row['file_name'].startswith('stories')]
    assert [row['units'] for row in hub] == local
    args = ('--audio=hub:no/where', f'--out={tmp_path}/c')
    said = run(*args, check=2, **env, HF_HUB_OFFLINE='1')
    assert 'hub:no/where: the hub did not give it' in said


def test_preference_files_with_paths_from_here_or_from_the_file(public, packed, tmp_path):
    (root, waves), (_, folder, net) = public, packed
    names = [key for key in waves if 'LibriSpeech' in str(key)]
    lines = [
        {f'{part}_path': f'{start}/{name}' for part, name in zip(P.PAIR, names, strict=True)}
        for start in (os.path.relpath(root, ROOT), os.path.relpath(root, tmp_path), str(root))
    ]
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    args = (f'--encoder={folder}/encoder', f'--out={tmp_path}/out')
    run(f'--audio={tmp_path}/pairs.jsonl', *args)
    pairs = rows(tmp_path / 'out/pairs.jsonl')
    for pair in pairs:
        for part, name in zip(P.PAIR, names, strict=True):
            units = dedup(net.encode([torch.from_numpy(waves[name])])[0])[0]
            assert pair[part]['units'] == units.tolist()
    assert len(pairs) == 3


def test_units_made_elsewhere(tmp_path):
    """features.jsonl and tokens.jsonl as the public toolkit writes them, tokenised pairs, and the
    packed shards of slm_scaling, whose utterances end with their EOS."""
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/features.jsonl').write_text(
        '{"units": [3, 3, 4], "duration": [1, 2, 1], "file_name": "../audio/x.flac"}\n'
    )
    (tmp_path / 'a/tokens.jsonl').write_text('{"audio_repr": "<Un12><Un7><Un7>"}\n')
    pair = {part: dict(audio_repr=f'<Un{i}><Un9>') for i, part in enumerate(P.PAIR)}
    (tmp_path / 'a/toks-pairs.jsonl').write_text(json.dumps(dict(prompt_path='p.wav', **pair)))
    for shard in range(2):
        folder = tmp_path / f'shards/shard-0000{shard}'
        folder.mkdir(parents=True)
        np.array([5, 6, 5, 500, 8, 500], np.int16).tofile(folder / 'audio.bin')
        np.array([4, 2], np.int64).tofile(folder / 'audio.len')
        special = dict(eos_token=500, pad_token=501, vocab_size=502)
        (folder / 'meta.json').write_text(json.dumps(dict(num_samples=2, preprocessing=special)))
    where = f'{tmp_path}/a/*.jsonl,{tmp_path}/shards'
    said = run(f'--from_units={where}', f'--out={tmp_path}/out', '--val_fraction=0')
    tokens = np.fromfile(tmp_path / 'out/train.bin', 'uint16').tolist()
    assert tokens == [1, 5, 6, 1, 1, 14, 9, 1] + [1, 7, 8, 7, 1, 1, 10, 1] * 2
    found = rows(tmp_path / 'out/units.jsonl')
    assert found[0]['duration'] == [3, 1] and found[-1]['file_name'] == 'shard-00001:2'
    assert rows(tmp_path / 'out/pairs.jsonl')[0]['chosen']['units'] == [1, 9]
    assert json.load(open(tmp_path / 'out/meta.json'))['vocab_size'] == 502 and '1 pairs' in said
    args = f'--from_units={tmp_path}/a/features.jsonl', f'--out={tmp_path}/x'
    assert 'unit 4, but there are 4' in run(*args, '--n_units=4', check=2)
    assert not os.listdir(tmp_path / 'x')
    (tmp_path / 'a/bad.jsonl').write_text('{"units": [1, -2]}\n')
    said = run(f'--from_units={tmp_path}/a/bad.jsonl', f'--out={tmp_path}/x', check=2)
    assert 'bad.jsonl, line 1' in said


# --------------------------------------------------------------- work on disk


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Thirty-three files in two folders, a long one, five broken ones, a link in a circle."""
    root = tmp_path_factory.mktemp('corpus')
    for i in range(30):
        folder = root / ('dev' if i % 10 == 0 else 'train')
        save_audio(folder / f'{i:02d}.flac', speech(0.5 + i % 7 * 0.3, i))
    save_audio(root / 'train/long.wav', speech(9.0, 99))
    soundfile.write(root / 'train/b.mp3', speech(1.0, 5).numpy(), 16000)
    for i, content in enumerate([b'', b'text', b'RIFF', b'fLaC', b'\0' * 100]):
        (root / 'train' / f'bad{i}.wav').write_bytes(content)
    os.symlink('..', root / 'train/circle')
    os.symlink('01.flac', os.fsencode(root / 'train') + b'/\xff.flac')  # a name that is not UTF-8
    return root


SETTINGS = ('--encoder=mfcc', '--fit_kmeans=30', '--fit_frames=400', '--fit_vocoder')
MADE = [
    *('units.jsonl', 'train.bin', 'val.bin', 'failed.jsonl', 'encoder/encoder.json'),
    *('encoder/encoder.safetensors', 'vocoder/vocoder.safetensors', 'vocoder/vocoder.json'),
]


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """One uninterrupted run with a voice."""
    out = str(tmp_path_factory.mktemp('whole'))
    said = run(f'--audio={corpus}', f'--out={out}', *SETTINGS, '--workers=2', '--max_seconds=4')
    assert '5 of 38 files failed' in said and '1 utterances cut at 4 s' in said
    return out


def test_a_run_tells_everything(corpus, whole):
    units, meta = rows(f'{whole}/units.jsonl'), json.load(open(f'{whole}/meta.json'))
    assert len({row['file_name'] for row in units}) == 30 + 3
    assert b'train/\xff.flac' in [os.fsencode(row['file_name']) for row in units]
    pieces = [row for row in units if row['file_name'] == 'train/long.wav']
    assert len(pieces) == 3 and pieces[1]['start'] == pieces[0]['seconds']
    assert sum(sum(row['duration']) for row in pieces) == 9 * 25
    failed = rows(f'{whole}/failed.jsonl')
    assert [row['file_name'] for row in failed] == [f'{corpus}/train/bad{i}.wav' for i in range(5)]
    assert all(row['reason'] for row in failed)
    for row in units:
        assert row['split'] == ('val' if row['file_name'].startswith('dev/') else 'train')
        assert all(a != b for a, b in zip(row['units'], row['units'][1:], strict=False))
    for split in ('train', 'val'):
        tokens = np.fromfile(f'{whole}/{split}.bin', dtype=meta['dtype'])
        wanted = [[1, *(u + 2 for u in row['units']), 1] for row in units if row['split'] == split]
        assert tokens.tolist() == sum(wanted, [])
        assert len(tokens) == meta['tokens'][split] and len(wanted) == meta['utterances'][split]
    seconds = sum(row['seconds'] for row in units)
    rate = sum(len(row['units']) for row in units) / seconds
    assert abs(meta['tokens_per_second'] - rate) < 0.01
    expected = dict(encoder='encoder', vocoder='vocoder', vocab_size=32, failed=5, cut=1, pairs=0)
    assert {key: meta[key] for key in expected} == expected
    encoder = UnitEncoder.from_pretrained(f'{whole}/encoder')
    alone = encoder.encode([load_audio(corpus / 'dev/10.flac')])[0]
    row = next(row for row in units if row['file_name'] == 'dev/10.flac')
    assert dedup(alone)[0].tolist() == row['units']


def test_killed_at_any_moment_and_however_shared_out_the_same_bytes(corpus, whole, tmp_path):
    """Three shards of one worker each begin together in one folder and are killed with -9 again
    and again; then two more join, one shard twice. Nobody waits for a lock, nothing is lost."""
    rng = random.Random(0)
    args = [f'--audio={corpus}', f'--out={tmp_path}/out', *SETTINGS, '--max_seconds=4']
    parts = f'{tmp_path}/out/parts/*'
    for _ in range(5):
        shards = [begin(*args, '--workers=1', f'--shard={i}/3') for i in range(3)]
        seen = len(glob.glob(parts))
        while len(glob.glob(parts)) <= seen and any(shard.is_alive() for shard in shards):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        for shard in shards:
            shard.kill()
            shard.join()
    shards = [begin(*args, f'--workers={1 + i}', f'--shard={i}/3') for i in (0, 1, 2, 1)]
    for shard in shards:
        end(shard)
    same_files(tmp_path / 'out', whole, MADE)


def test_a_finished_folder_is_left_alone_and_another_recipe_refused(corpus, whole, tmp_path):
    before = os.stat(f'{whole}/meta.json').st_mtime_ns
    args = [f'--audio={corpus}', f'--out={whole}', *SETTINGS]
    assert 'nothing to do' in run(*args, '--max_seconds=4', '--workers=1')
    assert os.stat(f'{whole}/meta.json').st_mtime_ns == before
    said = run(*args, '--max_seconds=5', check=2)
    assert 'recipe.json: begun with another max_seconds' in said
    assert 'another exclude, listing' in run(*args, '--max_seconds=4', '--exclude=b.mp3', check=2)
    assert 'made from audio' in run(f'--from_units={whole}/units.jsonl', f'--out={whole}', check=2)
    shutil.rmtree(f'{whole}/vocoder')  # a voice may be asked for later
    run(*args, '--max_seconds=4')
    assert os.path.exists(f'{whole}/vocoder/vocoder.json')
    os.makedirs(tmp_path / 'out')
    shutil.copytree(f'{whole}/encoder', tmp_path / 'out/encoder')
    said = run(f'--audio={corpus}', f'--out={tmp_path}/out', *SETTINGS, check=2)
    assert 'fitted with other settings' in said


def test_torchrun_ranks_share_the_work(corpus, whole, tmp_path):
    args = [f'--audio={corpus}', f'--out={tmp_path}/out', *SETTINGS, '--max_seconds=4']
    world = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    for rank in [begin(*args, **world, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]:
        end(rank)
    same_files(tmp_path / 'out', whole, MADE)


def test_manifests(corpus, packed, tmp_path):
    _, folder, _ = packed
    (tmp_path / 'in/below').mkdir(parents=True)
    phones = [['a', 0.0, 0.4], ['b', 0.4, 0.8]]
    lines = [
        dict(path=f'{corpus}/train/long.wav', words=None, seconds=None, voice='v', phones=phones),
        dict(path=f'{corpus}/train/01.flac', split='validation', duration=1.5, file_name='x'),
        dict(path=f'{corpus}/train/02.flac', split='test'),
        dict(path=f'{corpus}/train/gone.flac'),
    ]
    manifest = tmp_path / 'in/below/manifest.jsonl'
    manifest.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    args = [f'--audio={tmp_path}/in', f'--encoder={folder}/encoder', f'--out={tmp_path}/out']
    run(*args, '--val_fraction=0')
    meta, units = json.load(open(tmp_path / 'out/meta.json')), rows(tmp_path / 'out/units.jsonl')
    assert meta['utterances'] == dict(train=1, val=1) and meta['failed'] == 1
    assert units[0]['phones'] == phones and units[0]['voice'] == 'v' and units[0]['seconds'] == 9.0
    assert [row['split'] for row in units] == ['train', 'val', 'test']
    (failed,) = rows(tmp_path / 'out/failed.jsonl')
    assert failed['file_name'].endswith('gone.flac') and 'no such' in failed['reason']
    manifest.write_text('{"path": "a.wav"}\n{"text": "no path"}\n')
    assert 'manifest.jsonl, line 2: expected JSON' in run(*args[:2], f'--out={tmp_path}/o', check=2)
    for words in ([['a', 0.1]], [['a', 0.1, '0.5']], [[None, 0.1, 0.5]], {'a': 1}, 'a', 7):
        manifest.write_text(json.dumps(dict(lines[1], words=words)))
        said = run(*args[:2], f'--out={tmp_path}/o', check=2)
        assert 'manifest.jsonl, line 1: `words` must be' in said


def test_a_net_with_its_own_clusters_and_a_price_of_change(corpus, tmp_path):
    torch.manual_seed(0)
    small_net().save_pretrained(tmp_path / 'net')
    args = [f'--audio={corpus}/dev', '--val_fraction=0', '--device=cpu', '--fit_frames=1000']
    net = [f'--encoder={tmp_path}/net', '--layer=2', '--fit_kmeans=16']
    run(*args, *net, f'--out={tmp_path}/free', '--fit_vocoder')
    encoder = UnitEncoder.from_pretrained(f'{tmp_path}/free/encoder')
    assert encoder.n_units == 16 and encoder.vocoder == f'{tmp_path}/free/vocoder'
    units = encoder.encode([load_audio(corpus / 'dev/10.flac')])[0]
    assert dedup(units)[0].tolist() == rows(tmp_path / 'free/units.jsonl')[1]['units']

    # the same k-means, ready made: its distortion is measured, not known
    config = json.load(open(tmp_path / 'free/encoder/encoder.json'))
    fitted = config.pop('distortion')
    json.dump(config, open(tmp_path / 'free/encoder/encoder.json', 'w'))
    run(*args, f'--encoder={tmp_path}/free/encoder', '--switch=4', f'--out={tmp_path}/four')
    config = json.load(open(tmp_path / 'four/encoder/encoder.json'))
    assert config['switch'] == 4 and abs(config['distortion'] / fitted - 1) < 0.01
    rates = [
        json.load(open(tmp_path / name / 'meta.json'))['tokens_per_second']
        for name in ('free', 'four')
    ]
    assert rates[1] < 0.8 * rates[0]


def test_nothing_but_broken_files_or_none_at_all(packed, tmp_path):
    _, folder, _ = packed
    (tmp_path / 'bad').mkdir()
    for i in range(4):
        (tmp_path / 'bad' / f'{i}.wav').write_text('no sound')
    args = [f'--encoder={folder}/encoder', f'--out={tmp_path}/none']
    assert 'none of the 4 files' in run(f'--audio={tmp_path}/bad', *args, check=2)
    assert len(rows(tmp_path / 'none/failed.jsonl')) == 4
    assert 'no such file' in run(f'--audio={tmp_path}/nowhere', *args, check=2)
    fit = '--encoder=mfcc', '--fit_kmeans=9', f'--out={tmp_path}/fit'
    assert '.wav: not readable audio' in run(f'--audio={tmp_path}/bad', *fit, check=2)
    with tarfile.open(tmp_path / 'bad.tar', 'w') as tar:
        tar.add(tmp_path / 'bad/0.wav', 'x/0.wav')
    run(f'--audio={tmp_path}/bad.tar', args[0], f'--out={tmp_path}/tar', check=2)
    assert rows(tmp_path / 'tar/failed.jsonl')[0]['reason'].startswith(f'{tmp_path}/bad/x/0.wav: ')


def test_a_slip_binds_no_later_run(corpus, tmp_path):
    args = f'--audio={corpus}/dev', '--fit_kmeans=4', f'--out={tmp_path}/out'
    assert 'no encoder' in run(*args, '--encoder=mfccc', check=2)
    save_audio(tmp_path / 'silence.wav', torch.zeros(32000))
    silence = f'--audio={tmp_path}/silence.wav'
    assert 'is silent' in run(silence, *args[1:], '--encoder=mfcc', check=2)
    run(*args, '--encoder=mfcc', '--val_fraction=0')
    assert os.path.exists(tmp_path / 'out/train.bin')
    assert 'no units file' in run(f'--report={tmp_path}/gone.jsonl', check=2)


def test_want_of_memory_or_of_a_library_is_no_bad_file(tmp_path, monkeypatch):
    for error in (ImportError('soundfile'), MemoryError(), InputError('broken')):

        def broken(*args, error=error, **more):
            raise error

        monkeypatch.setattr(P, 'load_audio', broken)
        found = P.read_item(P.Item('file', f'{tmp_path}/a.wav'), str(tmp_path), 0)
        if isinstance(error, InputError):
            assert list(found) == [P.Failure(f'{tmp_path}/a.wav', 'broken')]
        else:
            with pytest.raises(type(error)):
                list(found)


# --------------------------------------------------------------- the report


def test_measures_of_units_against_scikit_learn():
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 8, 3000)
    units = np.where(rng.random(3000) < 0.6, phones * 2, rng.integers(0, 20, 3000))
    marks = [[f'p{phone}', i / 50, (i + 1) / 50] for i, phone in enumerate(phones)]
    found = P.measure_units([(units, marks)], 50.0, 20)
    information = metrics.mutual_info_score(phones, units)
    p = np.bincount(phones) / 3000
    assert abs(found['pnmi'] - information / -(p * np.log(p)).sum()) < 1e-9
    table = metrics.cluster.contingency_matrix(phones, units)
    assert abs(found['phone_purity'] - table.max(0).sum() / 3000) < 1e-12
    assert abs(found['cluster_purity'] - table.max(1).sum() / 3000) < 1e-12
    runs = units[np.insert(units[1:] != units[:-1], 0, True)]
    q = np.bincount(runs) / len(runs)
    q = q[q > 0]
    assert abs(found['bitrate'] - -(q * np.log2(q)).sum() * len(runs) / 60) < 1e-9
    assert abs(found['run_ms'] - 60_000 / len(runs)) < 1e-9
    assert found['units_used'] == len(set(units))
    labels = P.frame_labels([['a', 0.1, 0.3], ['b', 0.3, 0.42]], 12, 25.0)
    assert labels.tolist() == ['', '', 'a', 'a', 'a', 'a', 'a', 'b', 'b', 'b', '', '']


def test_report_of_encoders_and_units_files(tmp_path):
    """Phones that the sound tells apart: units know them; units in disorder do not."""
    tones, lines = [200, 500, 1100, 2400], []
    for i in range(40):
        phones = np.random.default_rng(i).integers(0, 4, 8)
        t = np.arange(3200) / 16000
        wave = np.concatenate([0.3 * np.sin(2 * np.pi * tones[phone] * t) for phone in phones])
        write(f'{tmp_path}/in/{i}.wav', wave)
        marks = [[str(phone), n * 0.2, (n + 1) * 0.2] for n, phone in enumerate(phones)]
        lines.append(dict(path=f'{i}.wav', phones=marks))
    manifest = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'in/manifest.jsonl').write_text(manifest)
    fit = (f'--audio={tmp_path}/in', '--fit_frames=1000')
    run(*fit, '--encoder=mfcc', '--fit_kmeans=6', f'--out={tmp_path}/units')
    found = rows(tmp_path / 'units/units.jsonl')
    with open(tmp_path / 'units/disorder.jsonl', 'w') as file:
        for i, row in enumerate(found):
            file.write(json.dumps(row | dict(phones=found[i - 1]['phones'])) + '\n')
    settings = ['mfcc:6', 'mfcc:6:8', f'{tmp_path}/units/encoder', f'{tmp_path}/units/units.jsonl']
    settings.append(f'{tmp_path}/units/disorder.jsonl')
    run(*fit, f'--report={",".join(settings)}', f'--out={tmp_path}/report')
    report = json.load(open(tmp_path / 'report/report.json'))
    assert list(report) == settings
    cheap, dear, encoder, file, disorder = report.values()
    assert min(cheap['pnmi'], encoder['pnmi']) > 0.8 and cheap['phone_purity'] > 0.9
    assert disorder['pnmi'] < 0.5 < file['pnmi']
    assert abs(file['pnmi'] - encoder['pnmi']) < 1e-9  # the same units, read or made
    assert dear['tokens_per_second'] <= cheap['tokens_per_second']
    assert dear['run_ms'] >= cheap['run_ms'] and cheap['units_used'] == 6
