"""prepare_units.py: an uninterrupted run is the oracle for all others."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile
import torch
import transformers

import prepare_units as P
from model import (
    InputError,
    UnitEncoder,
    dedup,
    load_audio,
    save_audio,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speech(seconds, seed=0):
    """Something with syllables: harmonics whose envelope changes every 120 ms, pauses between, a little noise."""
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


def run(*args, check=0):
    done = subprocess.run(
        [sys.executable, 'prepare_units.py', *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == check, done.stderr[-2000:]
    assert 'Traceback' not in done.stderr, done.stderr[-2000:]
    return (
        done.stdout.strip().splitlines()[-1] if check == 0 else done.stderr.strip().splitlines()[-1]
    )


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


# --------------------------------------------------------------- clusters


def test_fit_finds_clusters_and_moves_empty_ones():
    torch.manual_seed(0)
    centres = torch.randn(12, 6) * 20
    x = (centres[torch.arange(6000) % 12] + torch.randn(6000, 6) * 0.1)[torch.randperm(6000)]
    found, distance = P.fit(x, 12, seed=3)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1 and 0.03 < distance < 0.12
    assert torch.equal(found, P.fit(x, 12, seed=3)[0])
    found, _ = P.fit(torch.cat((torch.zeros(1000, 2), torch.ones(1000, 2))), 2, seed=0)
    assert sorted(found[:, 0].tolist()) == [0, 1]
    with pytest.raises(InputError, match='too few'):
        P.fit(x[:5], 12, seed=0)


# --------------------------------------------------------------- cutting, listing, packing


def test_cutting_loses_no_sample_and_finds_the_pauses():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(16000 * 100).astype('float32')
    for second in (7.5, 14.0, 22.0):
        wave[int(16000 * (second - 0.2)) : int(16000 * (second + 0.2))] = 0
    spans = P.cut(wave, 160000)
    assert (
        spans[0][0] == 0
        and spans[-1][1] == len(wave)
        and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    )
    assert all(0 < end - start <= 160000 and start % 640 == 0 for start, end in spans)
    assert [
        abs(end / 16000 - second) < 0.2 for (_, end), second in zip(spans, (7.5, 14.0, 22.0))
    ] == [True] * 3
    for extra in (1, 100, 5000):
        assert min(end - start for start, end in P.cut(wave[: 160000 + extra], 160000)) > 20000
    assert P.cut(wave[:160000], 160000) == [(0, 160000)]


def test_split_is_by_name_alone():
    names = [f'a/{i}.flac' for i in range(4000)]
    val = [name for name in names if P.split_of(name, '', 0.05) == 'val']
    assert 150 < len(val) < 250 and set(val) <= {
        name for name in names if P.split_of(name, '', 0.1) == 'val'
    }
    assert P.split_of('LibriSpeech/dev-clean/1/2.flac', 'dev-clean,dev-other', 0.5) == 'val'
    assert P.split_of('LibriSpeech/train/dev-clean.flac', 'dev-clean', 0.5) == 'train'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Thirty-six files in two folders, a few of other kinds, five broken ones."""
    root = tmp_path_factory.mktemp('corpus')
    for i in range(30):
        save_audio(
            root / f'{"dev" if i % 10 == 0 else "train"}' / f'{i:02d}.flac',
            speech(0.5 + i % 7 * 0.3, i),
        )
    save_audio(root / 'train' / 'long.wav', speech(9.0, 99))
    soundfile.write(root / 'train' / 'b.mp3', speech(1.0, 5).numpy(), 16000)
    with tarfile.open(root / 'shard.tar', 'w') as tar:
        for i in range(3):
            tar.add(root / 'train' / f'0{i + 1}.flac', f'in/{i}.flac')
    for i in range(5):
        (root / 'train' / f'bad{i}.wav').write_bytes(
            [b'', b'text', b'RIFF', b'fLaC', b'\0' * 100][i]
        )
    return root


SETTINGS = (
    '--encoder=mfcc',
    '--fit_kmeans=30',
    '--fit_frames=400',
    '--max_seconds=4',
    '--val_folders=dev',
    '--workers=2',
)


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """One uninterrupted run with a voice."""
    out = str(tmp_path_factory.mktemp('whole'))
    said = run(f'--audio={corpus}', f'--out={out}', *SETTINGS, '--fit_vocoder')
    assert '5 of 40 files failed' in said and '30 units used' in said
    return out


def test_a_run_reports_everything(corpus, whole):
    units, meta = rows(f'{whole}/units.jsonl'), json.load(open(f'{whole}/meta.json'))
    assert len({row['file_name'] for row in units}) == 30 + 1 + 1 + 3
    assert {'shard/in/0.flac', 'dev/00.flac', 'train/b.mp3'} <= {r['file_name'] for r in units}
    pieces = [row for row in units if row['file_name'] == 'train/long.wav']
    assert (
        len(pieces) == 3
        and sum(sum(row['duration']) for row in pieces) == 9 * 25
        and pieces[1]['start'] == pieces[0]['seconds']
    )
    assert sorted(row['file_name'] for row in rows(f'{whole}/failed.jsonl')) == [
        f'{corpus}/train/bad{i}.wav' for i in range(5)
    ]
    assert all(row['reason'] for row in rows(f'{whole}/failed.jsonl'))
    assert all(
        row['split'] == ('val' if row['file_name'].startswith('dev/') else 'train') for row in units
    )
    for split in ('train', 'val'):
        tokens = np.fromfile(f'{whole}/{split}.bin', dtype=meta['dtype'])
        wanted = [[1, *(u + 2 for u in row['units']), 1] for row in units if row['split'] == split]
        assert (
            tokens.tolist() == sum(wanted, [])
            and len(tokens) == meta['tokens'][split]
            and len(wanted) == meta['utterances'][split]
        )
    assert (
        meta['encoder'] == 'encoder'
        and meta['vocoder'] == 'vocoder'
        and meta['vocab_size'] == 32
        and meta['failed'] == 5
    )
    row = next(row for row in units if row['file_name'] == 'dev/10.flac')
    alone = UnitEncoder.from_pretrained(f'{whole}/encoder').encode(
        [load_audio(corpus / 'dev/10.flac')]
    )[0]
    assert dedup(alone)[0].tolist() == row['units'] and all(
        a != b for row in units for a, b in zip(row['units'], row['units'][1:])
    )


def test_shards_and_workers_change_nothing_and_a_second_run_does_nothing(corpus, whole, tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    args = [f'--audio={corpus}', *SETTINGS, '--fit_vocoder']
    begin = lambda env, *more: subprocess.Popen(
        [sys.executable, 'prepare_units.py', *args, *more, '--workers=1'],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    shards = [begin(env, f'--out={tmp_path}/shards', f'--shard={i}/3') for i in range(3)]
    ranks = [
        begin(env | dict(RANK=str(i), WORLD_SIZE='2'), f'--out={tmp_path}/ranks') for i in range(2)
    ]  # as torchrun says it; they merge alone
    for process in shards + ranks:
        assert process.wait(200) == 0, process.stderr.read()[-2000:]
    run(*args, f'--out={tmp_path}/shards', '--only_pack')
    for out in (tmp_path / 'shards', tmp_path / 'ranks'):
        same_files(
            out,
            whole,
            [
                'units.jsonl',
                'failed.jsonl',
                'train.bin',
                'val.bin',
                'encoder/encoder.safetensors',
                'vocoder/vocoder.safetensors',
            ],
        )
    before = os.stat(f'{whole}/meta.json').st_mtime_ns
    assert 'nothing to do' in run(f'--audio={corpus}', f'--out={whole}', *SETTINGS, '--fit_vocoder')
    assert os.stat(f'{whole}/meta.json').st_mtime_ns == before
    assert 'begun with another max_seconds' in run(
        f'--audio={corpus}',
        f'--out={whole}',
        *SETTINGS,
        '--fit_vocoder',
        '--max_seconds=5',
        check=2,
    )


def test_a_killed_run_continues_to_the_same_bytes(whole, tmp_path):
    """Of 4,000 short files in 32 chunks, killed with -9 when a few chunks are on disk."""
    wave = speech(0.2, 3).numpy()
    for i in range(100):
        soundfile.write(tmp_path / f'{i:03d}.wav', np.roll(wave, i * 10), 16000)
    for i in range(4000):
        os.symlink(f'{i % 100:03d}.wav', tmp_path / f'link{i:04d}.wav')
    paths = tmp_path / 'list.txt'
    paths.write_text(''.join(f'link{i:04d}.wav\n' for i in range(4000)) + 'link0000.wav\n')
    args = [f'--audio={paths}', f'--encoder={whole}/encoder', '--fit_vocoder', '--workers=2']
    run(*args, f'--out={tmp_path}/a')
    process = subprocess.Popen(
        [sys.executable, 'prepare_units.py', *args, f'--out={tmp_path}/b'],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    progress = tmp_path / 'b' / 'progress.json'
    while process.poll() is None and not (
        progress.exists() and json.load(open(progress))['chunks']
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        not (tmp_path / 'b' / 'units.jsonl').exists()
        and 1 <= json.load(open(progress))['chunks'] < 32
    )
    with open(tmp_path / 'b' / 'units.jsonl.part', 'ab') as file:
        file.write(b'{"file_name": "half a li')  # as a kill in the middle of a write leaves it
    run(*args, f'--out={tmp_path}/b')
    same_files(
        tmp_path / 'a',
        tmp_path / 'b',
        [
            'units.jsonl',
            'train.bin',
            'val.bin',
            'encoder/encoder.safetensors',
            'vocoder/vocoder.safetensors',
        ],
    )
    assert len(rows(tmp_path / 'b' / 'units.jsonl')) == 4000
    voice = (tmp_path / 'b' / 'vocoder' / 'vocoder.safetensors').read_bytes()
    assert (
        voice != open(f'{whole}/vocoder/vocoder.safetensors', 'rb').read()
    )  # fitted on this speech, not taken along with the encoder
    (tmp_path / 'b' / 'meta.json').unlink()  # killed after the last chunk
    (tmp_path / 'b' / 'train.bin').unlink()
    run(*args, f'--out={tmp_path}/b')
    same_files(
        tmp_path / 'a', tmp_path / 'b', ['units.jsonl', 'train.bin', 'vocoder/vocoder.safetensors']
    )
    (tmp_path / 'b' / 'meta.json').unlink()
    (tmp_path / 'b' / 'units.jsonl').unlink()
    assert 'units.jsonl.part is gone' in run(*args, f'--out={tmp_path}/b', check=2)


def test_what_manifests_and_folders_may_hold(corpus, whole, tmp_path):
    """No words, other names of splits, a manifest below, links in circles, a name that is not UTF-8, a second run, another fit."""
    (tmp_path / 'in' / 'below').mkdir(parents=True)
    lines = [
        dict(path=f'{corpus}/train/long.wav', words=None, seconds=None),
        dict(path=f'{corpus}/train/01.flac', split='validation'),
        dict(path=f'{corpus}/train/02.flac', split='test'),
    ]
    (tmp_path / 'in/below/manifest.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines)
    )
    os.symlink('.', tmp_path / 'in/circle')
    os.symlink(f'{corpus}/train/03.flac', tmp_path / 'in/03.flac')
    os.symlink(f'{corpus}/train/04.flac', os.fsencode(tmp_path / 'in') + b'/\xff.flac')
    args = [
        f'--audio={tmp_path}/in',
        f'--encoder={whole}/encoder',
        '--max_seconds=4',
        f'--out={tmp_path}/out',
    ]
    with open(tmp_path / 'lock', 'w') as file:
        (tmp_path / 'out').mkdir()
        os.link(tmp_path / 'lock', tmp_path / 'out/.lock')
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 'another run is at work here' in run(*args, check=2)
    run(*args)
    meta, units = json.load(open(tmp_path / 'out/meta.json')), rows(tmp_path / 'out/units.jsonl')
    assert (
        meta['files'] == 5
        and meta['utterances'] == dict(train=5, val=1)
        and [row.get('split') for row in units].count('test') == 1
    )
    assert meta['failed'] == 0 and b'\xff.flac' in [os.fsencode(row['file_name']) for row in units]
    shutil.copytree(f'{whole}/encoder', tmp_path / 'other/encoder')
    assert 'fitted with other settings' in run(
        args[0], *SETTINGS, f'--out={tmp_path}/other', check=2
    )
    assert 'holds units made from audio' in run(
        f'--from_units={whole}/units.jsonl', f'--out={tmp_path}/out', check=2
    )


def test_manifests_pairs_and_public_unit_files(corpus, whole, tmp_path):
    (tmp_path / 'pairs').mkdir()
    (tmp_path / 'pairs' / 'manifest.jsonl').write_text(
        json.dumps(
            dict(
                prompt_path=f'{corpus}/train/01.flac',
                chosen_path=f'{corpus}/train/02.flac',
                rejected_path=f'{corpus}/train/03.flac',
                prompt_text='a',
                chosen_text='b',
                rejected_text='c',
                voice='v',
                split='val',
            )
        )
        + '\n'
    )
    words = [[str(i), i * 0.5, i * 0.5 + 0.4] for i in range(18)]
    (tmp_path / 'manifest.jsonl').write_text(
        json.dumps(
            dict(
                path=f'{corpus}/train/long.wav',
                text='all',
                seconds=9.0,
                voice='v',
                split='val',
                words=words,
            )
        )
        + '\n'
    )
    run(
        f'--audio={tmp_path},{tmp_path}/pairs,{corpus}/dev/**,{corpus}/dev/*.flac',
        f'--encoder={whole}/encoder',
        f'--out={tmp_path}/out',
        '--max_seconds=4',
    )
    pair, known = (
        rows(tmp_path / 'out/pairs.jsonl')[0],
        {row['file_name']: row for row in rows(f'{whole}/units.jsonl')},
    )
    for part, name, text in (('prompt', '01', 'a'), ('chosen', '02', 'b'), ('rejected', '03', 'c')):
        assert (
            pair[part]['units'] == known[f'train/{name}.flac']['units']
            and pair[part]['text'] == text
        )
    assert pair['voice'] == 'v' and pair['split'] == 'val'
    units = rows(tmp_path / 'out/units.jsonl')
    assert [row['split'] for row in units[:3]] == ['val'] * 3 and sum(
        (row['text'].split() for row in units[:3]), []
    ) == [w for w, _, _ in words]
    assert all(
        0 <= start and end <= row['seconds'] for row in units[:3] for _, start, end in row['words']
    )
    (tmp_path / 'features.jsonl').write_text(
        '{"file_name": "x.wav", "units": [3, 3, 4], "duration": [1, 2, 1]}\n'
    )
    (tmp_path / 'tokens.jsonl').write_text('{"audio_repr": "<Un12><Un7><Un7>"}\n')
    run(
        f'--from_units={tmp_path}/features.jsonl,{tmp_path}/tokens.jsonl',
        f'--out={tmp_path}/packed',
        '--val_fraction=0',
    )
    assert np.fromfile(tmp_path / 'packed/train.bin', 'uint16').tolist() == [
        1,
        5,
        6,
        1,
        1,
        14,
        9,
        1,
    ]
    assert rows(tmp_path / 'packed/units.jsonl')[0]['duration'] == [3, 1]
    assert json.load(open(tmp_path / 'packed/meta.json'))['vocab_size'] == 502


def test_a_net_with_its_own_clusters_and_a_folder_of_broken_files(corpus, tmp_path):
    torch.manual_seed(0)
    small_net().save_pretrained(tmp_path / 'net')
    said = run(
        f'--audio={corpus}/dev',
        f'--encoder={tmp_path}/net',
        '--layer=2',
        '--fit_kmeans=16',
        '--fit_frames=1000',
        '--fit_vocoder',
        f'--out={tmp_path}/units',
        '--val_fraction=0',
        '--device=cpu',
    )
    assert '3 utterances' in said
    encoder = UnitEncoder.from_pretrained(f'{tmp_path}/units/encoder')
    assert (
        encoder.n_units == 16
        and encoder.vocoder == f'{tmp_path}/units/vocoder'
        and os.path.isdir(encoder.vocoder)
    )
    assert (
        dedup(encoder.encode([load_audio(corpus / 'dev/10.flac')])[0])[0].tolist()
        == rows(tmp_path / 'units/units.jsonl')[1]['units']
    )
    (tmp_path / 'bad').mkdir()
    for i in range(4):
        (tmp_path / 'bad' / f'{i}.wav').write_text('no sound')
    said = run(
        f'--audio={tmp_path}/bad',
        f'--encoder={tmp_path}/units/encoder',
        f'--out={tmp_path}/none',
        check=2,
    )
    assert 'none of the 4 files' in said and len(rows(tmp_path / 'none/failed.jsonl')) == 4
    assert 'no such file' in run(f'--audio={tmp_path}/nowhere', f'--out={tmp_path}/none2', check=2)
