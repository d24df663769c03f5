"""eval_slm.py: every number against an independent computation, and the script as a user runs it."""

import csv
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import soundfile
import torch
import transformers

import eval_slm
import model as M

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_UNITS = 30


# ----------------------------------------------------------------------------- what the tests run on


def tone(path, seconds=0.5, seed=0):
    """A little audio file of changing tones, never the same for two seeds."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(seed)
    t = np.arange(int(0.08 * M.SAMPLE_RATE)) / M.SAMPLE_RATE
    wave = np.concatenate(
        [
            np.sin(2 * np.pi * rng.uniform(100, 3000) * t) * rng.uniform(0.05, 0.5)
            for _ in range(math.ceil(seconds / 0.08))
        ]
    )
    soundfile.write(path, wave[: int(seconds * M.SAMPLE_RATE)], M.SAMPLE_RATE)


def suite(folder, n, seed=0, end='wav'):
    for i in range(n):
        for j, side in enumerate(('correct', 'incorrect')):
            tone(os.path.join(folder, f'{i}_{side}.{end}'), 0.3 + 0.05 * (i % 5), seed + 2 * i + j)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """Two SLMs with an encoder and a vocoder of their own: {'a': folder, 'b': folder}."""
    root, waves = tmp_path_factory.mktemp('checkpoints'), []
    for seed in range(20):
        tone(str(root / 'x.wav'), 2.0, seed)
        waves.append(M.load_audio(str(root / 'x.wav')))
    enc = M.UnitEncoder.from_pretrained('mfcc')
    enc.centroids = torch.cat(enc.features(waves))[7::33][:N_UNITS].clone()
    enc.save_pretrained(str(root / 'encoder'))
    table = M.UnitTable(N_UNITS, 25.0)
    for wave, units in zip(waves, enc.encode(waves)):
        table.add(wave, units)
    table.finish().save_pretrained(str(root / 'vocoder'))
    folders = {}
    for seed, name in enumerate('ab'):
        slm = M.SLM(
            M.SLMConfig(
                family='qwen2',
                n_layer=2,
                n_embd=32,
                n_head=4,
                n_kv_head=2,
                n_ffn=64,
                vocab_size=N_UNITS + 2,
                context=256,
            ),
            seed=seed,
        )
        with torch.no_grad():
            for p in slm.parameters():
                p.mul_(5)  # far from uniform
        folders[name] = str(root / name)
        slm.save_pretrained(
            folders[name],
            dict(
                encoder=str(root / 'encoder'),
                vocoder=str(root / 'vocoder'),
                n_units=N_UNITS,
                frame_rate=25.0,
            ),
        )
    with open(os.path.join(folders['a'], 'log.jsonl'), 'w') as file:
        file.writelines(json.dumps(dict(step=i, loss=4 / (i + 1))) + '\n' for i in range(20))
    return folders


def run(*args, ok=True):
    env = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='2', OPENAI_API_KEY='secret')
    done = subprocess.run(
        [sys.executable, 'eval_slm.py', *args, '--device=cpu'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == (0 if ok else 2) and 'Traceback' not in done.stderr, done.stderr
    return done


# ----------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize('family', ['qwen2', 'opt'])
def test_likelihoods_against_transformers_one_by_one(tmp_path, family):
    torch.manual_seed(0)
    if family == 'qwen2':
        hf = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=52,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=300,
                initializer_range=0.3,
            )
        )
    else:
        hf = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=52,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=300,
                dropout=0.0,
                init_std=0.3,
            )
        )
    hf.eval().save_pretrained(tmp_path)
    (tmp_path / 'slam.json').write_text(json.dumps(dict(n_units=50)))
    slm = M.SLM.from_pretrained(str(tmp_path)).eval()
    rng, utterances = np.random.default_rng(0), []
    for _ in range(60):  # stories with one to three endings, some of them said twice
        start = rng.integers(0, 50, rng.integers(0, 80))
        utterances += [
            np.concatenate((start, rng.integers(0, 50, rng.integers(1, 60))))
            for _ in range(rng.integers(1, 4))
        ]
    utterances += [utterances[3].copy(), utterances[0][:5], [7]]
    sums, counts = eval_slm.log_likelihoods(slm, utterances)
    for units, got, n in zip(utterances, sums, counts):
        ids = torch.tensor([[1, *(int(u) + 2 for u in units), 1]])
        with torch.no_grad():
            wanted = -hf(ids, labels=ids).loss.item()  # the mean over every token but the first
        assert got / n == pytest.approx(wanted, abs=2e-5) and n == len(units) + 1
    assert sums[-3] == sums[3]  # the same utterance twice ties exactly
    with pytest.raises(M.InputError, match='another encoder'):
        eval_slm.log_likelihoods(slm, [[3, 50]])
    next(slm.parameters()).data.fill_(math.nan)  # NaN wins no comparison: it would be a score of 0
    with pytest.raises(M.InputError, match='no numbers'):
        eval_slm.log_likelihoods(slm, [[3, 4]])


def test_rows_hold_every_utterance_once_and_hardly_any_padding():
    rng = random.Random(0)
    lengths = [min(500, int(rng.lognormvariate(4, 0.7)) + 1) for _ in range(3000)]
    rows = eval_slm.pack(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    assert len(rows) <= 1.02 * sum(lengths) / 512 + 1


# ----------------------------------------------------------------------------- suites and the official average


def zerospeech(root, kind, split='dev', seed=0):
    """A ZeroSpeech folder with several voices and unequal counts: rows of gold.csv, in no order."""
    rng, rows, folder = random.Random(seed), [], os.path.join(root, kind, split)
    for i in range(14):
        for voice in rng.sample(['amy', 'bob', 'cid', 'dan'], rng.randint(1, 4)):
            wrong = rng.randint(1, 3) if kind == 'lexical' else 1
            for j in range(1 + wrong):
                row = dict(
                    id=i % 7 if kind == 'syntactic' else i,
                    filename=''.join(rng.choices('abcdefgh', k=10)),
                    voice=voice,
                    correct=int(j == 0),
                )
                row |= (
                    dict(type=f't{i // 7}', subtype='s', transcription='x')
                    if kind == 'syntactic'
                    else dict(
                        frequency=[0, 1, 4, 5, 6, 20, 21, 99, 100, 101][i % 10],
                        word='w',
                        phones='p',
                        length=3 + i % 2,
                    )
                )
                rows.append(row)
    rng.shuffle(rows)
    for k, row in enumerate(rows):
        tone(os.path.join(folder, row['filename'] + '.wav'), 0.3, seed + k)
    with open(os.path.join(folder, 'gold.csv'), 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def official(rows, score, keys, keep=lambda row: True):
    """The challenge's average, spelled out: within a pair the mean of its voices, each the mean of its (correct, wrong) combinations."""
    pairs = []
    for key in sorted({tuple(row[k] for k in keys) for row in rows if keep(row)}):
        mine, voices = [row for row in rows if tuple(row[k] for k in keys) == key], []
        for voice in sorted({row['voice'] for row in mine}):
            a = [score[r['filename']] for r in mine if r['voice'] == voice and r['correct'] == 1]
            b = [score[r['filename']] for r in mine if r['voice'] == voice and r['correct'] == 0]
            wins = [
                Fraction(1) if x > y else Fraction(1, 2) if x == y else Fraction(0)
                for x in a
                for y in b
            ]
            voices.append(sum(wins) / len(wins))
        pairs.append(sum(voices) / len(voices))
    return float(100 * sum(pairs) / len(pairs))


@pytest.mark.parametrize('kind', ['syntactic', 'lexical'])
def test_the_official_average(tmp_path, kind, monkeypatch):
    rows = zerospeech(str(tmp_path), kind)
    rng = random.Random(1)
    score = {row['filename']: rng.randint(0, 4) for row in rows}  # with ties
    listings = []
    for root in (tmp_path, tmp_path / kind, tmp_path / kind / 'dev'):
        pairs, files = eval_slm.list_zerospeech(str(root), kind, 'dev')
        listings.append(pairs)
        assert set(files) == set(score)
    assert listings[0] == listings[1] == listings[2]
    of = {path: score[name] for name, path in files.items()}
    wins = [
        1.0 if of[p['pos']] > of[p['neg']] else 0.5 if of[p['pos']] == of[p['neg']] else 0.0
        for p in pairs
    ]
    result, items = eval_slm.summarise(pairs, wins)
    keys = ('type', 'subtype', 'id') if kind == 'syntactic' else ('id',)
    assert result['score'] == pytest.approx(official(rows, score, keys)) and result['n'] == 14
    assert result['low'] <= result['score'] <= result['high']
    if kind == 'syntactic':
        for t in ('t0', 't1'):
            assert result['types'][t]['score'] == pytest.approx(
                official(rows, score, keys, lambda r: r['type'] == t)
            )
    else:
        for band, inside in (
            ('oov', {0}),
            ('1-5', {1, 4}),
            ('6-20', {5, 6}),
            ('21-100', {20, 21, 99}),
            ('>100', {100, 101}),
        ):  # closed on the left
            assert result['types'][band]['score'] == pytest.approx(
                official(rows, score, keys, lambda r: r['frequency'] in inside)
            )
        assert result['types']['in vocabulary']['score'] == pytest.approx(
            official(rows, score, keys, lambda r: r['frequency'] > 0)
        )
    voice = rows[0]['voice']
    assert result['voices'][voice]['score'] == pytest.approx(
        official([r for r in rows if r['voice'] == voice], score, keys)
    )

    walk = os.walk  # a file system that lists backwards gives the same pairs
    monkeypatch.setattr(
        os, 'walk', lambda *a, **k: ((top, dirs, names[::-1]) for top, dirs, names in walk(*a, **k))
    )
    assert eval_slm.list_zerospeech(str(tmp_path), kind, 'dev')[0] == pairs


def test_zerospeech_mistakes_are_named(tmp_path):
    rows = zerospeech(str(tmp_path), 'syntactic')
    with pytest.raises(M.InputError, match='not that of the lexical task.*frequency'):
        eval_slm.list_zerospeech(str(tmp_path / 'syntactic'), 'lexical', 'dev')
    with pytest.raises(M.InputError, match='no audio|no folder'):
        eval_slm.list_zerospeech(str(tmp_path / 'nowhere'), 'lexical', 'dev')
    missing = tmp_path / 'syntactic' / 'dev' / (rows[3]['filename'] + '.wav')
    missing.unlink()
    with pytest.raises(M.InputError, match=missing.name):
        eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')
    gold = tmp_path / 'syntactic' / 'dev' / 'gold.csv'
    gold.write_text(
        ''.join(
            line for line in gold.read_text().splitlines(True) if rows[3]['filename'] not in line
        )
    )
    with pytest.raises(M.InputError, match='has no counterpart'):
        eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')
    gold.unlink()
    with pytest.raises(M.InputError, match='gold.csv'):
        eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')


def test_zerospeech_unknown_files_and_a_wrong_folder(tmp_path, capsys):
    zerospeech(str(tmp_path), 'syntactic')
    pairs, files = eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')
    assert capsys.readouterr().err == ''
    tone(str(tmp_path / 'syntactic' / 'dev' / 'stranger.wav'), 0.3)
    again, files = eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')
    assert (
        again == pairs
        and 'stranger' in files
        and 'stranger.wav: unknown file, gold.csv does not name it' in capsys.readouterr().err
    )
    with pytest.raises(
        M.InputError, match='expected ZeroSpeech 2021 as unpacked, syntactic/test/gold.csv'
    ):  # there is no test: not all that lies below
        eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'test', blind=True)
    gold = tmp_path / 'syntactic' / 'dev' / 'gold.csv'
    for broken, told in (
        (b'\xff\xfe', 'gold.csv'),
        (gold.read_bytes() + b'7,x\n', 'expected the columns'),
    ):
        gold.write_bytes(broken)
        with pytest.raises(M.InputError, match=told):
            eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')


def test_storycloze_and_salmon_layouts(tmp_path, monkeypatch):
    for n in (1, 2, 10, 11):
        for side in ('correct', 'incorrect'):
            path = (
                tmp_path
                / 'sSC'
                / ('000' if n < 10 else '001')
                / f'{n}_{side}.{"flac" if n == 2 else "wav"}'
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / 'sSC' / '.DS_Store').touch()
    (tmp_path / 'sSC' / '000' / '._1_correct.wav').touch()
    (tmp_path / 'sSC' / 'manifest.jsonl').write_text(
        json.dumps(dict(path='000/2_correct.flac', voice='f3', type='animals')) + '\n'
    )
    for part in eval_slm.SALMON[:7]:
        (tmp_path / 'salmon' / part).mkdir(parents=True)
        for n in (0, 1, 10):
            for name in (f'sample_{n}_zebra.wav', f'sample_{n}_apple.wav'):
                (tmp_path / 'salmon' / part / name).touch()

    def listing():
        found = {}
        for task in ('sstorycloze', 'salmon'):
            for name, folder in eval_slm.find_task(task, '', str(tmp_path)):
                if os.path.isdir(folder):
                    found[name] = eval_slm.list_task(name, folder)[0]
        return found

    found = listing()
    assert [os.path.basename(p['pos']) for p in found['sstorycloze']] == [
        '1_correct.wav',
        '2_correct.flac',
        '10_correct.wav',
        '11_correct.wav',
    ]
    assert all(p['neg'] == p['pos'].replace('correct', 'incorrect') for p in found['sstorycloze'])
    assert (found['sstorycloze'][1]['voice'], found['sstorycloze'][1]['types']) == (
        'f3',
        ['animals'],
    )
    assert (
        len(found) == 8 and len(eval_slm.find_task('salmon', '', str(tmp_path))) == 8
    )  # the missing part will be told, not left out
    for part in eval_slm.SALMON[:7]:
        assert {
            (os.path.basename(p['pos']), os.path.basename(p['neg']))
            for p in found[f'salmon_{part}']
        } == {(f'sample_{n}_apple.wav', f'sample_{n}_zebra.wav') for n in (0, 1, 10)}
    walk = os.walk
    monkeypatch.setattr(
        os,
        'walk',
        lambda *a, **k: reversed([(top, dirs, names[::-1]) for top, dirs, names in walk(*a, **k)]),
    )
    assert listing() == found
    (tmp_path / 'sSC' / '001' / '11_incorrect.wav').unlink()
    with pytest.raises(
        M.InputError, match='11_correct.wav has no counterpart: expected <n>_correct.wav'
    ):
        listing()
    (tmp_path / 'sSC' / '001' / '11_wrong.wav').touch()
    with pytest.raises(M.InputError, match='11_wrong.wav: unknown file'):
        listing()
    with pytest.raises(M.InputError, match="no 'tstorycloze' in .*sSC.*NAME|no 'tstorycloze'"):
        eval_slm.find_task('tstorycloze', '', str(tmp_path))


def test_pairs_file(tmp_path):
    row = dict(prompt=dict(units=[1, 2]), chosen=dict(units=[3]), rejected=dict(units=[4, 5]))
    path = tmp_path / 'pairs.jsonl'
    path.write_text(
        json.dumps(dict(row, split='train'))
        + '\n'
        + json.dumps(dict(row, split='val', voice='v'))
        + '\n'
    )
    pairs, _ = eval_slm.list_task('pairs', str(path))
    assert [(p['pos'], p['neg'], p['voice']) for p in pairs] == [([1, 2, 3], [1, 2, 4, 5], 'v')]
    for broken in (
        dict(prompt=dict(units=[1])),
        dict(row, chosen=dict(units=[-1])),
        dict(row, chosen=dict(units=['a'])),
        dict(row, chosen=dict(units=None)),
    ):
        path.write_text(json.dumps(broken) + '\n')
        with pytest.raises(M.InputError, match='line 1: expected prompt, chosen and rejected'):
            eval_slm.list_task('pairs', str(path))
    for broken, told in (
        ('[1]', 'expected a JSON object a line'),
        ('{"a', 'expected a JSON object a line'),
        ('', 'holds no pairs'),
    ):
        path.write_text(broken)
        with pytest.raises(M.InputError, match=told):
            eval_slm.list_task('pairs', str(path))
    path.write_text(
        '{"step": 1, "loss": NaN}\n'
    )  # a diverged run's log: what goes into the page must be JSON
    assert eval_slm.read_jsonl(str(path)) == [dict(step=1, loss=None)]


# ----------------------------------------------------------------------------- statistics


def test_interval_covers():
    """Of 400 simulated evaluations, about 95 % of the intervals hold the truth, alone and paired."""
    rng, hits, paired = np.random.default_rng(0), 0, 0
    for seed in range(400):
        a = rng.choice([0, 0.5, 1], p=[0.3, 0.1, 0.6], size=300)  # truth 65
        r = eval_slm.interval(a, draws=600, seed=seed)
        hits += r['low'] <= 65 <= r['high']
        b = np.where(
            rng.random(300) < 0.8, a, rng.choice([0, 1], size=300)
        )  # truth 0.8 * 65 + 0.2 * 50 = 62
        r = eval_slm.interval(a, b, draws=600, seed=seed)
        paired += r['low'] <= 3 <= r['high']
    assert 0.92 <= hits / 400 <= 0.975 and 0.92 <= paired / 400 <= 0.975, (hits, paired)


def test_interval_is_the_bootstrap_of_resampled_items():
    values = np.random.default_rng(0).normal(3, 1, 80)  # as genppl: exp of a mean
    rng = np.random.default_rng(5)
    naive = np.exp([values[rng.integers(0, 80, 80)].mean() for _ in range(20000)])
    r = eval_slm.interval(values, transform=np.exp, draws=20000)
    assert r['score'] == pytest.approx(np.exp(values.mean()))
    assert [r['low'], r['high']] == pytest.approx(np.percentile(naive, (2.5, 97.5)), rel=0.01)


def test_one_item_has_no_interval():
    assert eval_slm.interval([1.0]) == dict(score=100.0, low=None, high=None, n=1)


@pytest.mark.parametrize('transform', [eval_slm.PERCENT, np.exp])
def test_a_model_against_itself(transform):
    values = np.random.default_rng(0).random(500)
    r = eval_slm.interval(values, values.copy(), transform=transform)
    assert r['score'] == r['low'] == r['high'] == 0


def test_auto_bleu_against_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        words, n = [rng.choice('abcd') for _ in range(rng.randint(0, 12))], rng.choice((1, 2, 3))
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        again = [any(g == h for j, h in enumerate(grams) if j != i) for i, g in enumerate(grams)]
        assert eval_slm.auto_bleu(' '.join(words), n) == (sum(again) / len(again) if again else 0)
    assert eval_slm.auto_bleu('') == eval_slm.auto_bleu('one') == eval_slm.auto_bleu('one two') == 0
    assert eval_slm.auto_bleu('the cat the cat') == 2 / 3


# ----------------------------------------------------------------------------- encoding once


def test_cache(tmp_path, checkpoint):
    where, cache = M.SLM.from_pretrained(checkpoint['a']).slam['encoder'], str(tmp_path / 'cache')
    suite(str(tmp_path / 's'), 4)
    files = [os.path.join(tmp_path, 's', f) for f in eval_slm.audio_files(str(tmp_path / 's'))]
    first = eval_slm.encode_files(files, where, cache)
    one = M.dedup(M.UnitEncoder.from_pretrained(where).encode([M.load_audio(files[2])])[0])[0]
    assert first[files[2]].tolist() == one.tolist()
    (path,) = (os.path.join(cache, f) for f in os.listdir(cache))
    size = os.path.getsize(path)
    again = eval_slm.encode_files(files[::-1], where, cache)
    assert os.path.getsize(path) == size and all(
        (first[f] == again[f]).all() for f in files
    )  # nothing was encoded
    tone(files[0], 0.9, seed=99)  # changed: encoded anew, and what was known is kept
    assert len(eval_slm.encode_files(files[:1], where, cache)[files[0]]) != len(first[files[0]])
    short = eval_slm.encode_files(files, where, cache, seconds=0.2)
    assert all(len(short[f]) < len(first[f]) for f in files[1:])
    content = open(path, 'rb').read()
    for broken in (
        b'\xff' * 900 + content[900:],
        content[:700],
        content.replace(b', 1', b', 2'),
        b'',
        b'[1]\n{}\nnull\n[1,2,3]\n',
    ):  # ignored, and completed
        with open(path, 'wb') as file:
            file.write(broken)
        assert all(
            (eval_slm.encode_files(files[1:], where, cache)[f] == first[f]).all() for f in files[1:]
        )
        size = os.path.getsize(path)
        assert all(
            (eval_slm.encode_files(files[1:], where, cache)[f] == first[f]).all() for f in files[1:]
        )
        assert os.path.getsize(path) == size
    with open(files[3], 'wb') as file:
        file.write(b'no audio')
    with pytest.raises(M.InputError, match=os.path.basename(files[3])):
        eval_slm.encode_files(files, where, cache)


def test_killed_while_encoding(tmp_path, checkpoint):
    """kill -9 in the third batch: the two before it are kept, and the same call completes them."""
    where, cache = M.SLM.from_pretrained(checkpoint['a']).slam['encoder'], str(tmp_path / 'cache')
    suite(str(tmp_path / 's'), 5)
    files = [os.path.join(tmp_path, 's', f) for f in eval_slm.audio_files(str(tmp_path / 's'))]
    program = f"""import eval_slm, os
encode, calls = eval_slm.UnitEncoder.encode, []
def deadly(self, waves):
    calls.append(len(waves))
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return encode(self, waves)
eval_slm.UnitEncoder.encode = deadly
eval_slm.encode_files({files!r}, {where!r}, {cache!r}, batch=3)"""
    assert (
        subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True).returncode
        == -9
    )
    (path,) = (os.path.join(cache, f) for f in os.listdir(cache))
    kept = open(path, 'rb').read()
    assert sum(bool(line.strip()) for line in kept.splitlines()) == 6
    got = eval_slm.encode_files(files, where, cache)
    after = open(path, 'rb').read()
    assert after.startswith(kept) and sum(bool(line.strip()) for line in after.splitlines()) == 10
    alone = eval_slm.encode_files(files, where, str(tmp_path / 'other'))
    assert all((got[f] == alone[f]).all() for f in files)


# ----------------------------------------------------------------------------- judges


@pytest.fixture(scope='session')
def listeners(tmp_path_factory):
    """Folders of a random Whisper and a random Llama with tokenizers of their own, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    root = tmp_path_factory.mktemp('listeners')
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {
        '<|endoftext|>': 256
    }
    tokenizer = transformers.WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens(
        {
            'additional_special_tokens': [
                '<|startoftranscript|>',
                '<|en|>',
                '<|transcribe|>',
                '<|notimestamps|>',
            ]
        }
    )
    transformers.WhisperProcessor(
        transformers.WhisperFeatureExtractor(feature_size=20), tokenizer
    ).save_pretrained(root / 'asr')
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=20,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_target_positions=32,
            decoder_start_token_id=257,
            eos_token_id=256,
            pad_token_id=256,
            bos_token_id=256,
            init_std=1.0,
        )
    )
    whisper.generation_config.update(
        max_length=20, suppress_tokens=list(range(100, 256)), begin_suppress_tokens=[256]
    )
    whisper.save_pretrained(root / 'asr')
    words = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
            | {'<s>': 256},
            merges=[],
        )
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 256)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token='<s>').save_pretrained(
        root / 'lm'
    )
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    ).save_pretrained(root / 'lm')
    return str(root / 'asr'), str(root / 'lm')


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: refuses a wrong key, fails now and then, rates by the length of the question."""

    calls = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        Judge.calls.append(body)
        text = body['messages'][0]['content']
        bad = (
            401
            if self.headers['Authorization'] != 'Bearer secret'
            else 503
            if len(Judge.calls) == 2
            else 404
            if self.path != '/v1/chat/completions'
            else 0
        )
        reply = json.dumps(
            dict(
                choices=[
                    dict(
                        message=dict(
                            content=f'On a scale of 1 to 5.\n**Rating: {1 + len(text) % 5}**'
                        )
                    )
                ]
            )
        ).encode()
        self.send_response(bad or 200)
        self.end_headers()
        self.wfile.write(b'' if bad else reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Judge.calls.clear()
    server = HTTPServer(('127.0.0.1', 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1'
    server.shutdown()


def test_judge(endpoint, listeners, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'secret')
    assert eval_slm.rate('a' * 7, endpoint, 'cpu', 'judge-1') == 3
    assert eval_slm.rate('a' * 8, endpoint, 'cpu', 'judge-1') == 4  # after a 503
    assert len(Judge.calls) == 3 and Judge.calls[0] == dict(
        model='judge-1', temperature=0, messages=[dict(role='user', content='aaaaaaa')]
    )
    monkeypatch.setenv('OPENAI_API_KEY', 'wrong')
    with pytest.raises(M.InputError, match='does not answer.*401'):
        eval_slm.rate('a', endpoint, 'cpu')
    assert eval_slm.rate('How good is it?', listeners[1], 'cpu') in (
        None,
        1,
        2,
        3,
        4,
        5,
    )  # a random judge, but a whole way through
    with pytest.raises(M.InputError, match='nowhere.*cannot be loaded'):
        eval_slm.rate('a', '/nowhere', 'cpu')


# ----------------------------------------------------------------------------- the whole script


def test_two_models_end_to_end(tmp_path, checkpoint):
    data, out = tmp_path / 'data', tmp_path / 'out' / 'eval.json'
    suite(str(data / 'grammar'), 12)
    suite(str(data / 'sstory'), 12, seed=100, end='flac')
    zerospeech(str(data), 'syntactic')
    (data / 'tstory').mkdir()
    (data / 'broken').mkdir()
    suite(str(data / 'broken'), 2)
    (data / 'broken' / '1_correct.wav').write_bytes(b'RIFF')
    args = (
        f'--init={checkpoint["a"]},{checkpoint["b"]},{checkpoint["a"]}',
        f'--data_dir={data}',
        f'--out={out}',
        '--seed=1',
        '--likelihood=sum',
        f'--html={tmp_path}/r.html',
        f'--submission={tmp_path}/sub',
        '--max_new_tokens=10',
    )
    done = run('--tasks=grammar,sstory,tstory,broken,sblimp,nothing', *args, ok=False)
    assert all(
        why in done.stderr
        for why in ('tstory not run: no audio', '1_correct.wav', "nothing not run: no 'nothing' in")
    )
    first = out.read_bytes()
    result = json.loads(first)
    assert list(result['metrics']) == ['a', 'b', 'a (3)']
    for task in ('tstory', 'broken', 'nothing'):
        assert list(result['metrics']['a'][task]) == ['not_run']  # never 0
    assert len(re.findall(r'not run *\|', done.stdout)) == 9 and '3 not run' in done.stdout
    for task in ('grammar', 'sstory', 'sblimp'):
        assert result['metrics']['a'][task] == result['metrics']['a (3)'][task]
        same = result['differences']['a (3) - a'][task]
        assert same['score'] == same['low'] == same['high'] == 0
        gap = result['metrics']['b'][task]['score'] - result['metrics']['a'][task]['score']
        assert result['differences']['b - a'][task]['score'] == pytest.approx(gap)
    # the side file holds what the scores are made of, and they are the checkpoint's likelihoods under transformers
    rows = [json.loads(line) for line in open(tmp_path / 'out' / 'eval.pairs.jsonl')]
    mine = [row for row in rows if row['task'] == 'grammar' and row['model'] == 'a']
    assert 100 * sum(row['win'] for row in mine) / len(mine) == pytest.approx(
        result['metrics']['a']['grammar']['score']
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint['a'])
    enc = M.UnitEncoder.from_pretrained(M.SLM.from_pretrained(checkpoint['a']).slam['encoder'])
    ids = torch.tensor([[1, *(M.dedup(enc.encode([M.load_audio(mine[0]['neg'])])[0])[0] + 2), 1]])
    assert mine[0]['score_neg'] == pytest.approx(
        -hf(ids, labels=ids).loss.item() * (ids.shape[1] - 1), abs=1e-3
    )
    lines = dict(line.split() for line in open(tmp_path / 'sub' / 'b' / 'syntactic' / 'dev.txt'))
    by_b = {
        os.path.basename(row[side])[:-4]: row[f'score_{side}']
        for row in rows
        if (row['model'], row['task']) == ('b', 'sblimp')
        for side in ('pos', 'neg')
    }
    assert {k: float(v) for k, v in lines.items()} == pytest.approx(by_b)
    assert '| Slam' in done.stdout and 'not the toy suites' in done.stdout
    page = open(tmp_path / 'r.html').read()
    assert (
        'http' not in page.replace('http://www.w3.org', '')
        and page.count('data:audio/wav;base64,') == 15
    )  # three of: prompt, resynthesis, a, b, a (3)
    data_in_page = json.loads(page.split('type="application/json">')[1].split('</script>')[0])
    assert data_in_page['metrics'] == result['metrics'] and len(data_in_page['curves']['a']) == 20
    # the same command again: the same bytes, nothing encoded
    assert 'encoding' not in run(
        '--tasks=grammar,sstory,tstory,broken,sblimp,nothing', *args, ok=False
    ).stderr.replace('re-encoding', '')
    assert out.read_bytes() == first


def test_genppl_end_to_end(tmp_path, checkpoint, listeners, endpoint):
    asr, lm = listeners
    suite(str(tmp_path / 'sSC'), 4)
    out = tmp_path / 'eval.json'
    run(
        f'--init={checkpoint["a"]}',
        '--tasks=sstorycloze,genppl,autobleu,gptscore,resynth',
        f'--data_dir={tmp_path}',
        f'--out={out}',
        f'--asr={asr}',
        f'--text_lm={lm}',
        f'--judge={endpoint}',
        '--prompt_seconds=0.3',
        '--max_new_tokens=20',
        '--n_prompts=3',
        '--temperature=0.9',
        '--seed=7',
    )
    got = json.loads(out.read_text())['metrics']['a']
    rows = [json.loads(line) for line in open(tmp_path / 'eval.pairs.jsonl')]
    files = [row['id'] for row in rows if row['task'] == 'genppl']
    assert [os.path.basename(f) for f in files] == [
        '0_correct.wav',
        '1_correct.wav',
        '2_correct.wav',
    ]

    # the same again by hand: prompts, continuations, waves, transcripts, perplexity
    slm = M.SLM.from_pretrained(checkpoint['a'])
    enc, voc = (
        M.UnitEncoder.from_pretrained(slm.slam['encoder']),
        M.UnitVocoder.from_pretrained(slm.slam['vocoder']),
    )
    prompts = [
        torch.cat((torch.tensor([1]), M.dedup(enc.encode([M.load_audio(f)[:4800]])[0])[0] + 2))
        for f in files
    ]
    waves = voc.decode(
        [
            new - 2
            for new in slm.eval().generate(prompts, max_new_tokens=20, temperature=0.9, seed=7)
        ]
    )
    processor, whisper = (
        transformers.WhisperProcessor.from_pretrained(asr),
        transformers.WhisperForConditionalGeneration.from_pretrained(asr),
    )
    tokenizer, llama = (
        transformers.AutoTokenizer.from_pretrained(lm),
        transformers.LlamaForCausalLM.from_pretrained(lm),
    )
    nlls = []
    for wave, row in zip(waves, [row for row in rows if row['task'] == 'genppl']):
        x = processor(wave.numpy(), sampling_rate=16000, return_tensors='pt').input_features
        text = (
            processor.batch_decode(whisper.generate(x), skip_special_tokens=True)[0]
            if len(wave)
            else ''
        )
        assert row['text'] == text
        ids = [
            256,
            *(processor.tokenizer.convert_tokens_to_ids(c) for c in tokenizer.tokenize(text)),
        ]
        assert ids == tokenizer(text).input_ids
        logits, nll = llama(torch.tensor([ids])).logits[0].double(), 0.0
        for t in range(1, len(ids)):
            nll += (
                math.log(sum(math.exp(z) for z in logits[t - 1].tolist()))
                - logits[t - 1, ids[t]].item()
            )
        if len(ids) > 1:
            nlls.append(nll / (len(ids) - 1))
            assert row['value'] == pytest.approx(nlls[-1], rel=1e-4)
    assert got['genppl']['score'] == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    assert (
        got['genppl']['n'] + got['genppl']['left_out'] == 3
        and got['genppl']['low'] <= got['genppl']['score'] <= got['genppl']['high']
    )
    assert got['autobleu']['score'] == pytest.approx(
        100
        * np.mean([eval_slm.auto_bleu(row['text']) for row in rows if row['task'] == 'autobleu'])
    )
    assert 1 <= got['gptscore']['score'] <= 5 and 0 <= got['resynth']['score'] < 100
    assert 'Continuation' in Judge.calls[-1]['messages'][0]['content']


def test_mistakes_end_at_once_in_one_line(tmp_path, checkpoint):
    suite(str(tmp_path / 'sSC'), 2)
    a, cache = checkpoint['a'], tmp_path / 'eval_cache'
    for args, told in (
        ((f'--init={a},{tmp_path}/typo,{a}', '--tasks=sSC'), 'typo'),
        ((f'--init={a}', '--tasks=sSC', f'--html={tmp_path}/sSC'), 'a folder'),
        ((f'--init={a}', '--tasks=sSC', '--html=/dev/null/r.html'), 'r.html cannot be written'),
        ((f'--init={a}', '--tasks='), '--tasks=NAME'),
    ):
        done = run(f'--data_dir={tmp_path}', f'--out={tmp_path}/e.json', *args, ok=False)
        assert told in done.stderr and done.stderr.count('\n') == 1 and not done.stdout
        assert not cache.exists() and sorted(os.listdir(tmp_path)) == [
            'sSC'
        ]  # nothing was computed, nothing left behind


def test_what_cannot_run_is_told(tmp_path, checkpoint):
    suite(str(tmp_path / 'sSC'), 2)
    done = run(
        f'--init={checkpoint["a"]}',
        '--tasks=sSC,genppl,gptscore',
        f'--data_dir={tmp_path}',
        f'--out={tmp_path}/e.json',
        '--prompt_seconds=0.2',
        '--asr=/no/whisper',
        '--max_new_tokens=5',
        ok=False,
    )
    got = json.loads((tmp_path / 'e.json').read_text())['metrics']['a']
    assert (
        'score' in got['sSC']
        and 'cannot be loaded' in got['genppl']['not_run']
        and 'no judge' in got['gptscore']['not_run']
    )
    assert 'not run' in done.stdout
