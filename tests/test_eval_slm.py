"""eval_slm.py: every number against an independent computation, and the script as a user has it."""

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
from conftest import run_script

import eval_slm
import model as M

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_UNITS = 30


# --- what the tests run on


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
    features = enc.features(waves)
    enc.centroids = torch.cat(features)[7::33][:N_UNITS].clone()
    enc.config['distortion'] = enc.distance(features)
    enc.save_pretrained(str(root / 'encoder'))
    table = M.UnitTable(N_UNITS, 25.0)
    for wave, units in zip(waves, enc.encode(waves), strict=True):
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
    result = run_script('eval_slm.py', *args, '--device=cpu')
    assert result.returncode == (0 if ok else 2), result.stderr
    return result


# --- likelihoods


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
    for units, got, n in zip(utterances, sums, counts, strict=True):
        ids = torch.tensor([[1, *(int(u) + 2 for u in units), 1]])
        with torch.no_grad():
            wanted = -hf(ids, labels=ids).loss.item()  # the mean over every token but the first
        assert got / n == pytest.approx(wanted, abs=2e-5) and n == len(units) + 1
    assert sums[-3] == sums[3]  # the same utterance twice ties exactly
    # a model trained without <S>: the units alone, after the first
    slm.slam['scoring'] = 'units'
    (total,), (n,) = eval_slm.log_likelihoods(slm, [[5, 9, 3, 7]])
    ids = torch.tensor([[7, 11, 5, 9]])
    with torch.no_grad():
        assert total / n == pytest.approx(-hf(ids, labels=ids).loss.item(), abs=2e-5) and n == 3
    del slm.slam['scoring']
    with pytest.raises(M.InputError, match='another encoder'):
        eval_slm.log_likelihoods(slm, [[3, 50]])
    next(slm.parameters()).data.fill_(math.nan)  # NaN wins no comparison: it would be a score of 0
    with pytest.raises(M.InputError, match='no numbers'):
        eval_slm.log_likelihoods(slm, [[3, 4]])


# --- suites and the official average


def zerospeech(root, kind, split='dev', seed=0):
    """A ZeroSpeech folder, several voices and unequal counts: rows of gold.csv, in no order."""
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
    """The challenge's average, spelled out: within a pair the mean of its voices, each the mean of
    its (correct, wrong) combinations."""
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
        pairs = eval_slm.list_zerospeech(str(root), kind, 'dev')
        listings.append(pairs)
    assert listings[0] == listings[1] == listings[2]

    def score_of(clip):
        return score[os.path.splitext(os.path.basename(clip.files[0]))[0]]

    gaps = [score_of(pair['pos']) - score_of(pair['neg']) for pair in pairs]
    wins = [(np.sign(gap) + 1) / 2 for gap in gaps]
    result, items = eval_slm.summarise(pairs, wins)
    keys = ('type', 'subtype', 'id') if kind == 'syntactic' else ('id',)
    assert result['score'] == pytest.approx(official(rows, score, keys)) and result['n'] == 14
    assert result['low'] <= result['score'] <= result['high']
    if kind == 'syntactic':
        for t in ('t0', 't1'):
            assert result['types'][t]['score'] == pytest.approx(
                official(rows, score, keys, lambda r, t=t: r['type'] == t)
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
                official(rows, score, keys, lambda r, inside=inside: r['frequency'] in inside)
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
    assert eval_slm.list_zerospeech(str(tmp_path), kind, 'dev') == pairs


def test_zerospeech_mistakes_are_named(tmp_path):
    rows = zerospeech(str(tmp_path), 'syntactic')
    with pytest.raises(M.InputError, match='not that of the lexical task.*frequency'):
        eval_slm.list_zerospeech(str(tmp_path / 'syntactic'), 'lexical', 'dev')
    with pytest.raises(M.InputError, match='nowhere/gold.csv is missing'):
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


def test_zerospeech_unknown_files_and_a_wrong_folder(tmp_path):
    zerospeech(str(tmp_path), 'syntactic')
    pairs = eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')
    tone(str(tmp_path / 'syntactic' / 'dev' / 'stranger.wav'), 0.3)
    assert eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev') == pairs
    with pytest.raises(
        M.InputError, match='expected the data as unpacked, syntactic/test/gold.csv'
    ):  # there is no test: not all that lies below
        eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'test')
    gold = tmp_path / 'syntactic' / 'dev' / 'gold.csv'
    for broken, told in (
        (b'\xff\xfe', 'gold.csv'),
        (gold.read_bytes() + b'7,x\n', 'expected the columns'),
    ):
        gold.write_bytes(broken)
        with pytest.raises(M.InputError, match=told):
            eval_slm.list_zerospeech(str(tmp_path), 'syntactic', 'dev')


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(pair):
    """File names of a pair's two sides."""
    return tuple('+'.join(map(os.path.basename, pair[side].files)) for side in ('pos', 'neg'))


def test_storycloze_and_salmon_layouts(tmp_path):
    story = tmp_path / 'sStoryCloze'
    for n in (1, 2, 10, 11):
        for side in ('correct', 'incorrect'):
            end = 'flac' if n == 2 else 'wav'
            touch(story / ('000' if n < 10 else '001') / f'{n}_{side}.{end}')
    touch(story / '.DS_Store', story / '000' / '._1_correct.wav')
    row = dict(path='000/2_correct.flac', voice='f3', type='animals', text='A cat.')
    (story / 'manifest.jsonl').write_text(json.dumps(row) + '\n')
    for part in eval_slm.SALMON[:7]:
        for n in (0, 1, 10):
            folder = tmp_path / 'salmon' / part
            touch(folder / f'sample_{n}_zebra.wav', folder / f'sample_{n}_apple.wav')

    ((task, folder),) = eval_slm.find_task('sstorycloze', '', str(tmp_path))
    pairs = eval_slm.list_folder(folder)
    assert [names(pair)[0] for pair in pairs] == [
        *('1_correct.wav', '2_correct.flac', '10_correct.wav', '11_correct.wav')
    ]
    assert all(neg == pos.replace('correct', 'incorrect') for pos, neg in map(names, pairs))
    assert (pairs[1]['voice'], pairs[1]['types'], pairs[1]['text']) == ('f3', ['animals'], 'A cat.')
    assert not eval_slm.list_suite(task, folder, 'dev', '').official  # a manifest: own audio

    parts = eval_slm.find_task('salmon', '', str(tmp_path))
    assert len(parts) == 8  # the missing part will be told, not left out
    for task, folder in parts[:7]:
        suite = eval_slm.list_suite(task, folder, 'dev', '')
        wanted = {(f'sample_{n}_apple.wav', f'sample_{n}_zebra.wav') for n in (0, 1, 10)}
        assert {names(pair) for pair in suite.pairs} == wanted and suite.official
    with pytest.raises(M.InputError, match='speaker_consistency'):
        eval_slm.list_suite(*parts[7], 'dev', '')

    (story / '001' / '11_incorrect.wav').unlink()
    with pytest.raises(M.InputError, match='11_correct.wav has no counterpart: expected <n>_corr'):
        eval_slm.list_folder(str(story))
    touch(story / '001' / '11_wrong.wav')
    with pytest.raises(M.InputError, match='11_wrong.wav: unknown file'):
        eval_slm.list_folder(str(story))
    with pytest.raises(M.InputError, match="no 'tstorycloze' in"):
        eval_slm.find_task('tstorycloze', '', str(tmp_path))


def test_voices_in_folders_and_mutual_beginnings(tmp_path):
    """Multi-speaker StoryCloze: a sub-folder a voice, two endings of one beginning."""
    for voice in ('anna', 'ben'):
        for n in (1, 2):
            for side in ('correct', 'incorrect', 'mutual'):
                tone(str(tmp_path / 'tsc' / voice / f'{n}_{side}.wav'), 0.2, seed=n)
    pairs = eval_slm.list_folder(str(tmp_path / 'tsc'))
    assert [(pair['id'], pair['voice']) for pair in pairs] == [
        *(('1', 'anna'), ('2', 'anna'), ('1', 'ben'), ('2', 'ben'))
    ]
    assert names(pairs[0]) == ('1_mutual.wav+1_correct.wav', '1_mutual.wav+1_incorrect.wav')
    whole = [M.load_audio(file) for file in pairs[0]['pos'].files]
    assert torch.equal(eval_slm.load_clip(pairs[0]['pos']), torch.cat(whole))
    result, items = eval_slm.summarise(pairs, [1, 1, 0, 1])  # voices first, then pairs
    assert items == {'1': 0.5, '2': 1.0} and result['score'] == 75 and result['n'] == 2


def test_own_pairs(tmp_path):
    """A folder that make_synthetic.py spoke, a table of two paths, and unseen voices beside."""
    suite(str(tmp_path / 'minimal'), 3)
    suite(str(tmp_path / 'minimal_unseen'), 2)
    tasks = eval_slm.find_task('minimal', '', str(tmp_path))
    assert [task for task, _ in tasks] == ['minimal', 'minimal_unseen']
    assert [len(eval_slm.list_suite(*task, 'dev', '').pairs) for task in tasks] == [3, 2]
    lines = ['correct,incorrect,type,voice', 'minimal/0_correct.wav,minimal/1_correct.wav,t,v']
    (tmp_path / 'mine.csv').write_text('\n'.join(lines) + '\n')
    row = dict(correct=f'{tmp_path}/minimal/0_correct.wav', incorrect='minimal/1_correct.wav')
    (tmp_path / 'mine.jsonl').write_text(json.dumps(row | dict(type='t', voice='v')) + '\n')
    for file in ('mine.csv', 'mine.jsonl'):
        ((task, path),) = eval_slm.find_task('mine', str(tmp_path / file), str(tmp_path))
        (pair,) = eval_slm.list_suite(task, path, 'dev', '').pairs
        assert names(pair) == ('0_correct.wav', '1_correct.wav')
        assert (pair['types'], pair['voice']) == (['t'], 'v')
        assert all(os.path.exists(pair[side].files[0]) for side in ('pos', 'neg'))
    (tmp_path / 'mine.csv').write_text('right,wrong\na,b\n')
    with pytest.raises(M.InputError, match='mine.csv, line 2: expected correct and incorrect'):
        eval_slm.list_table(str(tmp_path / 'mine.csv'))


def test_parquet_suite(tmp_path):
    """SALMon and StoryCloze as the hub has them: the sound that comes out is that which went in."""
    import pyarrow
    import pyarrow.parquet

    suite(str(tmp_path / 'wavs'), 3)
    plain = eval_slm.list_folder(str(tmp_path / 'wavs'))
    rows = []
    for pair in plain:
        sound = [dict(bytes=open(pair[s].files[0], 'rb').read(), path='x') for s in ('pos', 'neg')]
        rows.append(dict(positive_audio=sound[0], negative_audio=sound[1]))
    (tmp_path / 'sStoryCloze').mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), str(tmp_path / 'sStoryCloze' / 'test-0.parquet')
    )
    ((task, path),) = eval_slm.find_task('sstorycloze', '', str(tmp_path))
    pairs = eval_slm.list_suite(task, path, 'dev', str(tmp_path / 'cache')).pairs
    assert len(pairs) == 3
    for pair, other in zip(pairs, plain, strict=True):
        for side in ('pos', 'neg'):
            ours, theirs = eval_slm.load_clip(pair[side]), eval_slm.load_clip(other[side])
            assert torch.equal(ours, theirs)


def test_babyslm_averages_over_words(tmp_path):
    """As its own tool: over the non-words of a word and voice, over voices, then over words."""
    folder = tmp_path / 'babyslm' / 'lexical' / 'dev'
    rows, score = [], {}
    rng = random.Random(0)
    for i, word in enumerate(('cat', 'dog', 'cat')):  # two items of one word are one
        for voice in ('A', 'B'):
            for k in range(3):
                name = f'{i}{voice}{k}'
                tone(str(folder / f'{name}.wav'), 0.1, seed=len(rows))
                spoken = word if k == 0 else ''
                rows.append(dict(id=i, filename=name, voice=voice, frequency=7 if k == 0 else ''))
                rows[-1] |= dict(word=spoken, phones='p', length=3, correct=int(k == 0))
                score[name] = rng.random()
    with open(folder / 'gold.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    ((task, path),) = eval_slm.find_task('babyslm_lexical', '', str(tmp_path))
    found = eval_slm.list_suite(task, path, 'dev', '')

    def score_of(clip):
        return score[os.path.basename(clip.files[0]).removesuffix('.wav')]

    wins = [score_of(pair['pos']) > score_of(pair['neg']) for pair in found.pairs]
    result, _ = eval_slm.summarise(found.pairs, np.array(wins, float))
    words = []
    for word in ('cat', 'dog'):
        voices = []
        for voice in ('A', 'B'):
            ids = [i for i, w in enumerate(('cat', 'dog', 'cat')) if w == word]
            both = [(f'{i}{voice}0', f'{i}{voice}{k}') for i in ids for k in (1, 2)]
            voices.append(np.mean([score[a] > score[b] for a, b in both]))
        words.append(np.mean(voices))
    assert result['score'] == pytest.approx(100 * np.mean(words)) and result['n'] == 2


def test_a_table_of_nothing(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    for broken in (dict(correct='a.wav'), dict(correct='a.wav', incorrect=3)):
        path.write_text(json.dumps(broken) + '\n')
        with pytest.raises(M.InputError, match='line 1: expected correct and incorrect'):
            eval_slm.list_table(str(path))
    path.write_text('')
    with pytest.raises(M.InputError, match='holds no pairs'):
        eval_slm.list_suite('pairs', str(path), 'dev', '')
    path = tmp_path / 'pairs.csv'
    path.write_bytes(b'correct,incorrect\n\xff\xfe,b.wav\n')
    with pytest.raises(M.InputError, match='pairs.csv'):
        eval_slm.list_table(str(path))


# --- statistics


def test_interval_covers():
    """Of 400 evaluations, about 95 % of the intervals hold the truth, alone and paired."""
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
    assert eval_slm.interval([0.5]) == dict(score=50.0, low=None, high=None, n=1)


@pytest.mark.parametrize('n', [1, 2, 7, 100])
def test_all_or_none_right_has_the_exact_binomial_bound(n):
    """Clopper and Pearson: the share at which so extreme a count has a chance of 2.5 %."""
    every, none = eval_slm.interval(np.ones(n)), eval_slm.interval(np.zeros(n))
    assert every['high'] == 100 and (every['low'] / 100) ** n == pytest.approx(0.025)
    assert none['low'] == 0 and (1 - none['high'] / 100) ** n == pytest.approx(0.025)


def arms_of_equal_models(rng, seeds, spread, items=200):
    """Wins (seeds, items) of two arms whose seeds differ as much within as between them."""
    ease = rng.normal(size=items)
    skill = 0.4 + spread * rng.normal(size=(2, seeds, 1))
    return rng.random((2, seeds, items)) < 1 / (1 + np.exp(-(ease + skill)))


@pytest.mark.parametrize(('seeds', 'spread'), [(2, 0.3), (3, 0.3), (5, 0.3), (2, 0.0)])
def test_equal_arms_are_rarely_called_different(seeds, spread):
    """At most 6 % of 500 runs; one seed of each, as it was done before, far more."""
    rng = np.random.default_rng(0)
    different = before = 0
    for run_number in range(500):
        a, b = arms_of_equal_models(rng, seeds, spread).astype(float)
        r = eval_slm.interval(a, b, draws=300, seed=run_number)
        different += not r['low'] <= 0 <= r['high']
        r = eval_slm.interval(a[0], b[0], draws=300, seed=run_number)
        before += not r['low'] <= 0 <= r['high']
    assert different <= 0.06 * 500
    assert before > 0.25 * 500 or not spread


def test_arms_that_differ_are_told_apart():
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 3, 1000)) < np.array([0.8, 0.6])[:, None, None]).astype(float)
    r = eval_slm.interval(a, b)
    assert r['score'] == pytest.approx(100 * (a.mean() - b.mean())) and r['low'] > 10
    alone = eval_slm.interval(a)
    assert alone['seeds'] == 3
    assert alone['spread'] == pytest.approx(100 * a.mean(1).std(ddof=1))
    assert alone['low'] < 100 * a.mean() < alone['high']


def test_checkpoints_and_arms(tmp_path):
    for name in ('a-s1', 'a-s2', 'b-s1', 'b-s2'):
        (tmp_path / name).mkdir()
    models, arms = eval_slm.find_checkpoints(f'{tmp_path}/a-s*,B={tmp_path}/b-s1+{tmp_path}/b-s2,x')
    assert list(models) == ['a-s1', 'a-s2', 'b-s1', 'b-s2', 'x'] and models['x'] == 'x'
    assert arms == {'a-s*': ['a-s1', 'a-s2'], 'B': ['b-s1', 'b-s2']}
    items = {name: dict(t={'1': i % 2, '2': 1}) for i, name in enumerate(models)}
    means, differences = eval_slm.compare(models, arms, items)
    assert means['B']['seeds'] == ['b-s1', 'b-s2']
    result = means['B']['metrics']['t']
    assert result['score'] == 75 and result['seeds'] == 2
    assert list(differences) == ['a-s* - x', 'B - x', 'B - a-s*']
    assert differences['B - a-s*']['t']['score'] == 0
    with pytest.raises(M.InputError, match='no folder has such a name'):
        eval_slm.find_checkpoints(f'{tmp_path}/c-s*')


@pytest.mark.parametrize('transform', [eval_slm.percent, np.exp])
def test_a_model_against_itself(transform):
    values = np.random.default_rng(0).random(500)
    r = eval_slm.interval(values, values.copy(), transform=transform)
    assert r['score'] == r['low'] == r['high'] == 0


# --- encoding once


def clips_in(folder, seconds=0.0):
    return [eval_slm.Clip((file,), seconds) for file in M.find_audio(str(folder))]


def test_cache(tmp_path, checkpoint):
    where, cache = M.SLM.from_pretrained(checkpoint['a']).slam['encoder'], str(tmp_path / 'cache')
    suite(str(tmp_path / 's'), 4)
    clips = clips_in(tmp_path / 's')
    first = eval_slm.encode_clips(clips, where, cache)
    alone = M.UnitEncoder.from_pretrained(where).encode([M.load_audio(clips[2].files[0])])[0]
    assert first[clips[2]].tolist() == M.dedup(alone)[0].tolist()
    (path,) = (os.path.join(cache, f) for f in os.listdir(cache))
    size = os.path.getsize(path)
    again = eval_slm.encode_clips(clips[::-1], where, cache)
    assert os.path.getsize(path) == size  # nothing was encoded
    assert all((first[clip] == again[clip]).all() for clip in clips)

    # changed: encoded anew, and what was known is kept
    tone(clips[0].files[0], 0.9, seed=99)
    assert len(eval_slm.encode_clips(clips[:1], where, cache)[clips[0]]) != len(first[clips[0]])
    short = eval_slm.encode_clips(clips_in(tmp_path / 's', 0.2), where, cache)
    for clip, units in list(zip(clips, short.values(), strict=True))[1:]:
        assert len(units) < len(first[clip])

    # broken lines are ignored, and completed
    content = open(path, 'rb').read()
    for broken in (
        b'\xff' * 900 + content[900:],
        content[:700],
        b'',
        b'[1]\n{}\nnull\n[1,2,3]\n',
    ):
        with open(path, 'wb') as file:
            file.write(broken)
        for _ in range(2):
            found = eval_slm.encode_clips(clips[1:], where, cache)
            assert all((found[clip] == first[clip]).all() for clip in clips[1:])
    with open(clips[3].files[0], 'wb') as file:
        file.write(b'no audio')
    with pytest.raises(M.InputError, match=os.path.basename(clips[3].files[0])):
        eval_slm.encode_clips(clips, where, cache)


def test_killed_while_encoding(tmp_path, checkpoint):
    """kill -9 in the third batch: the two before it are kept, and the same call completes them."""
    where, cache = M.SLM.from_pretrained(checkpoint['a']).slam['encoder'], str(tmp_path / 'cache')
    suite(str(tmp_path / 's'), 5)
    clips = clips_in(tmp_path / 's')
    program = f"""import eval_slm, os
encode, calls = eval_slm.UnitEncoder.encode, []
def deadly(self, waves):
    calls.append(len(waves))
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return encode(self, waves)
eval_slm.UnitEncoder.encode = deadly
eval_slm.encode_clips([eval_slm.Clip(*clip) for clip in {[tuple(c) for c in clips]!r}],
                      {where!r}, {cache!r}, batch=3)"""
    assert (
        subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True).returncode
        == -9
    )
    (path,) = (os.path.join(cache, f) for f in os.listdir(cache))
    kept = open(path, 'rb').read()
    assert sum(bool(line.strip()) for line in kept.splitlines()) == 6
    got = eval_slm.encode_clips(clips, where, cache)
    after = open(path, 'rb').read()
    assert after.startswith(kept) and sum(bool(line.strip()) for line in after.splitlines()) == 10
    alone = eval_slm.encode_clips(clips, where, str(tmp_path / 'other'))
    assert all((got[clip] == alone[clip]).all() for clip in clips)


# --- judges


@pytest.fixture(scope='session')
def listeners(tmp_path_factory):
    """Folders of a random Whisper and a random Llama with tokenizers of their own."""
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
    """An OpenAI-compatible endpoint: refuses a wrong key, fails now and then, rates by the length
    of the question."""

    calls = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        Judge.calls.append(body)
        text = body['messages'][0]['content']
        status = 200
        if self.headers['Authorization'] != 'Bearer secret':
            status = 401
        elif len(Judge.calls) == 2:
            status = 503
        elif self.path != '/v1/chat/completions':
            status = 404
        answer = 'On a scale from \\boxed{1} to 5: fluent. The final answer is \\boxed{%d}.'
        message = dict(content=answer % (1 + len(text) % 5))
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(json.dumps(dict(choices=[dict(message=message)])).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Judge.calls.clear()
    server = HTTPServer(('127.0.0.1', 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1'
    server.shutdown()


def test_judge(endpoint, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'secret')
    assert eval_slm.rate('a' * 7, endpoint, 'judge-1') == 3
    assert eval_slm.rate('a' * 8, endpoint, 'judge-1') == 4  # after a 503
    message = dict(role='user', content='aaaaaaa')
    assert Judge.calls[0] == dict(model='judge-1', temperature=0, messages=[message])
    assert len(Judge.calls) == 3
    monkeypatch.setenv('OPENAI_API_KEY', 'wrong')
    with pytest.raises(M.InputError, match='does not answer.*401'):
        eval_slm.rate('a', endpoint, 'judge-1')


@pytest.mark.parametrize(
    ('answer', 'rating'),
    [
        ('It follows. The final answer is \\boxed{4}', 4),
        ('\\boxed{2} at first; no: \\boxed{3.5}.', 3.5),
        ('$\\boxed{\\text{5}}$', 5),
        ('The final answer is 4', None),
        ('\\boxed{7}', None),
        ('\\boxed{}', None),
    ],
)
def test_boxed_answers(answer, rating, monkeypatch):
    monkeypatch.setattr(eval_slm, 'ask_endpoint', lambda *arguments: answer)
    assert eval_slm.rate('?', 'http://x', 'judge-1') == rating


def test_auto_bleu_and_perplexity_of_fixed_transcripts(listeners):
    """The public arithmetic: NLTK's words, bigrams seen more than once; exp of the mean over
    utterances of the mean negative log-likelihood per token."""
    from nltk.tokenize import word_tokenize

    texts = [
        "I don't know, I don't know what he said.",
        'The cat sat on the mat. The cat sat.',
        'A dog.',
    ]
    shares, nlls = [], []
    lm = transformers.LlamaForCausalLM.from_pretrained(listeners[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(listeners[1])
    for text in texts:
        words = word_tokenize(text, preserve_line=True)
        grams = list(zip(words, words[1:], strict=False))
        shares.append(sum(grams.count(gram) > 1 for gram in grams) / len(grams))
        assert eval_slm.auto_bleu(eval_slm.tokenize_words(text)) == pytest.approx(shares[-1])
        ids = tokenizer(text, return_tensors='pt').input_ids
        nlls.append(lm(ids, labels=ids).loss.item())
        assert eval_slm.text_nll(text, listeners[1], 'cpu') == pytest.approx(nlls[-1], rel=1e-5)
    assert max(shares) > 0.4 and min(shares) == 0
    result = eval_slm.interval(nlls, transform=eval_slm.METRICS['genppl'].transform)
    assert result['score'] == pytest.approx(math.exp(sum(nlls) / 3))


def test_prompts_end_with_the_nearest_word(tmp_path):
    tone(str(tmp_path / 'x.wav'), 6.1)
    words = [['one', 0.1, 1.0], ['two', 1.2, 2.8], ['three', 2.9, 3.4], ['four', 5.0, 6.0]]
    prompt = dict(path=str(tmp_path / 'x.wav'), text='', words=words)
    assert eval_slm.cut_at_word(prompt, 3.0) == (2.8, 'one two')
    prompt['words'] = []
    assert eval_slm.cut_at_word(prompt, 3.0) == (3.0, None)
    (tmp_path / 'x.json').write_text(json.dumps(dict(aligned_text=words[:1] + words[2:])))
    assert eval_slm.cut_at_word(prompt, 3.0) == (3.4, 'one three')
    assert eval_slm.cut_at_word(prompt, 3.1) is None  # shorter than two prompts


# --- the whole script


def test_two_models_end_to_end(tmp_path, checkpoint):
    data, out = tmp_path / 'data', tmp_path / 'out' / 'eval.json'
    suite(str(data / 'grammar'), 12)
    suite(str(data / 'sstory'), 12, seed=100, end='flac')
    zerospeech(str(data), 'syntactic')
    zerospeech(str(data), 'lexical', seed=900)
    (data / 'tstory').mkdir()
    suite(str(data / 'broken'), 2)
    (data / 'broken' / '1_correct.wav').write_bytes(b'RIFF')
    args = (
        f'--init={checkpoint["a"]},{checkpoint["b"]},{checkpoint["a"]}',
        f'--data_dir={data}',
        f'--out={out}',
        '--tasks=grammar,sstory,tstory,broken,sblimp,swuggy,nothing',
        '--seed=1',
        f'--html={tmp_path}/r.html',
        '--max_new_tokens=10',
    )
    done = run(*args, ok=False)
    for why in ('tstory not run: no audio', '1_correct.wav', "nothing not run: no 'nothing' in"):
        assert why.replace('no audio', '') in done.stderr
    first = out.read_bytes()
    result = json.loads(first)
    assert list(result['metrics']) == ['a', 'b', 'a (3)']
    for task in ('tstory', 'broken', 'nothing'):
        assert list(result['metrics']['a'][task]) == ['not_run']  # never 0
    assert len(re.findall(r'not run *\|', done.stdout)) == 9 and '3 not run' in done.stdout
    for task in ('grammar', 'sstory', 'sblimp', 'swuggy', 'swuggy_in_vocabulary'):
        assert result['metrics']['a'][task] == result['metrics']['a (3)'][task]
        same = result['differences']['a (3) - a'][task]
        assert same['score'] == same['low'] == same['high'] == 0
        gap = result['metrics']['b'][task]['score'] - result['metrics']['a'][task]['score']
        assert result['differences']['b - a'][task]['score'] == pytest.approx(gap)
    words = result['metrics']['a']['swuggy']
    inside = result['metrics']['a']['swuggy_in_vocabulary']
    assert inside['score'] == pytest.approx(words['types']['in vocabulary']['score'])
    assert inside['n'] == words['types']['in vocabulary']['n'] < words['n']

    # the side file holds what the scores are made of: the checkpoint's likelihoods
    rows = [json.loads(line) for line in open(tmp_path / 'out' / 'eval.pairs.jsonl')]
    mine = [row for row in rows if row['task'] == 'grammar' and row['model'] == 'a']
    score = result['metrics']['a']['grammar']['score']
    assert 100 * sum(row['win'] for row in mine) / len(mine) == pytest.approx(score)
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint['a'])
    enc = M.UnitEncoder.from_pretrained(M.SLM.from_pretrained(checkpoint['a']).slam['encoder'])
    units = M.dedup(enc.encode([M.load_audio(mine[0]['neg'])])[0])[0]
    ids = torch.tensor([[1, *(units + 2), 1]])
    assert mine[0]['score_neg'] == pytest.approx(-hf(ids, labels=ids).loss.item(), abs=1e-4)

    # the paper's rows stand in the column of their suite alone
    table = [line.split('|') for line in done.stdout.splitlines() if line.startswith('|')]
    columns = [cell.strip() for cell in table[0]]
    (slam,) = (row for row in table if row[1].strip() == 'Slam')
    filled = {name for name, cell in zip(columns, slam, strict=True) if cell.strip()}
    assert filled == {'model', 'GPUs', 'GPU-days', 'parameters', 'tokens', 'sBLIMP'}
    what = dict(zip(columns, table[2], strict=True))
    assert what['sBLIMP'].strip() == 'dev; n = 14; % of pairs, by mean log-likelihood'
    assert done.stdout.count('(n small)') >= 15

    # the page holds it all, and nothing from elsewhere
    page = open(tmp_path / 'r.html').read()
    assert 'http' not in page.replace('http://www.w3.org', '')
    assert page.count('data:audio/wav;base64,') == 15  # three of: prompt, resynthesis, three models
    data_in_page = json.loads(page.split('type="application/json">')[1].split('</script>')[0])
    assert data_in_page['scores'] == result['metrics']
    assert len(data_in_page['curves']['a']['loss']) == 20

    # the same command again: the same bytes, nothing encoded
    assert 'encoding' not in run(*args, ok=False).stderr
    assert out.read_bytes() == first


def test_listening_end_to_end(tmp_path, checkpoint, listeners):
    """GenPPL and auto-BLEU of prompt + continuation and of that alone, GPTScore and a MOS
    predictor, each against the same computed by hand."""
    asr, lm = listeners
    suite(str(tmp_path / 'sstorycloze'), 4)
    out = tmp_path / 'eval.json'
    loudness = torch.jit.trace(lambda wave: wave.square().mean().sqrt() + 1, torch.zeros(1, 99))
    loudness.save(str(tmp_path / 'mos.pt'))
    tasks = 'genppl,genppl_continuation,autobleu,autobleu_continuation,utmos'
    run(
        f'--init={checkpoint["a"]}',
        '--tasks=sstorycloze,' + tasks,
        f'--data_dir={tmp_path}',
        f'--out={out}',
        f'--asr={asr}',
        f'--text_lm={lm}',
        f'--utmos={tmp_path}/mos.pt',
        '--prompt_seconds=0.3',
        '--max_new_tokens=20',
        '--n_prompts=3',
        '--temperature=0.9',
        '--top_p=0.9',
        '--top_k=20',
        '--repetition_penalty=1.2',
        '--seed=7',
    )
    record = json.loads(out.read_text())
    got = record['metrics']['a']
    knobs = dict(max_new_tokens=20, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2)
    assert record['sampling']['a'] == got['genppl']['sampling'] == knobs
    rows = [json.loads(line) for line in open(tmp_path / 'eval.pairs.jsonl')]
    files = [row['id'] for row in rows if row['task'] == 'genppl']
    assert [os.path.basename(f) for f in files] == [f'{i}_correct.wav' for i in range(3)]

    # by hand: prompts, continuations, waves, transcripts, perplexity
    slm = M.SLM.from_pretrained(checkpoint['a']).eval()
    enc = M.UnitEncoder.from_pretrained(slm.slam['encoder'])
    voc = M.UnitVocoder.from_pretrained(slm.slam['vocoder'])
    heads = [M.dedup(enc.encode([M.load_audio(f)[:4800]])[0])[0] for f in files]
    prompts = [torch.cat((torch.tensor([1]), head + 2)) for head in heads]
    tails = [new - 2 for new in slm.generate(prompts, **knobs, seed=7)]
    whole = [torch.cat(both) for both in zip(heads, tails, strict=True)]
    processor = transformers.WhisperProcessor.from_pretrained(asr)
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(asr)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    llama = transformers.LlamaForCausalLM.from_pretrained(lm)
    for end, units in (('', whole), ('_continuation', tails)):
        nlls, shares = [], []
        mine = {
            task: [row for row in rows if row['task'] == task + end]
            for task in ('genppl', 'autobleu')
        }
        for wave, row in zip(voc.decode(units), mine['genppl'], strict=True):
            text = ''
            if len(wave):
                x = processor(wave.numpy(), sampling_rate=16000, return_tensors='pt').input_features
                text = processor.batch_decode(whisper.generate(x), skip_special_tokens=True)[0]
            assert row['text'] == text
            shares.append(eval_slm.auto_bleu(eval_slm.tokenize_words(text)))
            ids = tokenizer(text, return_tensors='pt').input_ids.long()
            if ids.shape[1] > 1:
                logps = llama(ids).logits[0, :-1].log_softmax(-1)
                nlls.append(-logps.gather(1, ids[0, 1:, None]).mean().item())
                assert row['value'] == pytest.approx(nlls[-1], rel=1e-4)
        perplexity = got['genppl' + end]
        assert perplexity['score'] == pytest.approx(math.exp(np.mean(nlls)), rel=1e-4)
        assert perplexity['n'] + perplexity['left_out'] == 3
        assert got['autobleu' + end]['score'] == pytest.approx(100 * np.mean(shares))
    loud = [wave.square().mean().sqrt().item() + 1 for wave in voc.decode(whole)]
    assert got['utmos']['score'] == pytest.approx(np.mean(loud), rel=1e-4)


def test_gptscore_end_to_end(tmp_path, checkpoint, listeners, endpoint, monkeypatch):
    """Prompts of twice the length alone, cut at a word, their own text where it is known."""
    monkeypatch.setenv('OPENAI_API_KEY', 'secret')
    prompts = tmp_path / 'prompts'
    for i, seconds in enumerate((0.7, 0.7, 0.5)):
        tone(str(prompts / f'{i}.wav'), seconds, seed=i)
    words = [['one', 0.0, 0.1], ['two', 0.1, 0.26], ['three', 0.3, 0.5]]
    row = dict(path='0.wav', text='one two three', words=words)
    (prompts / 'manifest.jsonl').write_text(json.dumps(row) + '\n')
    out = tmp_path / 'eval.json'
    run(
        f'--init={checkpoint["a"]}',
        '--tasks=gptscore',
        f'--prompts={prompts}',
        f'--out={out}',
        f'--asr={listeners[0]}',
        f'--judge={endpoint}',
        '--prompt_seconds=0.3',
        '--max_new_tokens=8',
    )
    result = json.loads(out.read_text())['metrics']['a']['gptscore']
    rows = [json.loads(line) for line in open(tmp_path / 'eval.pairs.jsonl')]
    assert [(os.path.basename(row['id']), row['seconds']) for row in rows] == [
        ('0.wav', 0.26),
        ('1.wav', 0.3),
    ]
    asked = [call['messages'][0]['content'] for call in Judge.calls]
    assert 'Beginning: one two\n' in asked[0] and f'Continuation: {rows[0]["text"]}' in asked[0]
    ratings = [1 + len(asked[i]) % 5 for i in (0, 2)]  # the second call failed and was repeated
    assert [row['value'] for row in rows] == ratings and asked[1] == asked[2]
    assert result['score'] == np.mean(ratings) and result['left_out'] == 0


@pytest.mark.parametrize(
    ('slam', 'penalty'),
    [(dict(stage='pretraining'), 1.0), (dict(stage='dpo'), 1.1)],
)
def test_repetition_penalty_is_that_of_the_stage(tmp_path, checkpoint, slam, penalty):
    slm = M.SLM.from_pretrained(checkpoint['a'])
    known = dict(encoder=slm.slam['encoder'], vocoder=slm.slam['vocoder'], n_units=N_UNITS)
    slm.save_pretrained(str(tmp_path / 'x'), known | slam)
    speaker = eval_slm.load_speaker('x', str(tmp_path / 'x'))
    assert speaker.sampling['repetition_penalty'] == penalty


def test_mistakes_end_at_once_in_one_line(tmp_path, checkpoint):
    suite(str(tmp_path / 'sSC'), 2)
    a, cache = checkpoint['a'], tmp_path / 'eval_cache'
    for args, told in (
        ((f'--init={a},{tmp_path}/typo,{a}', '--tasks=sSC'), 'typo'),
        ((f'--init={a}', '--tasks=sSC', f'--html={tmp_path}/sSC'), 'a folder'),
        ((f'--init={a}', '--tasks=sSC', '--html=/dev/null/r.html'), '/dev/null'),
        ((f'--init={a}', '--tasks='), '--tasks=NAME'),
    ):
        done = run(f'--data_dir={tmp_path}', f'--out={tmp_path}/e.json', *args, ok=False)
        assert told in done.stderr and done.stderr.count('\n') == 1 and not done.stdout
        # nothing was computed, nothing left behind
        assert not cache.exists() and os.listdir(tmp_path) == ['sSC']


def test_what_cannot_run_is_told(tmp_path, checkpoint):
    suite(str(tmp_path / 'sSC'), 2)
    done = run(
        f'--init={checkpoint["a"]}',
        '--tasks=sSC,genppl,gptscore,utmos',
        f'--data_dir={tmp_path}',
        f'--out={tmp_path}/e.json',
        '--prompt_seconds=0.2',
        '--asr=/no/whisper',
        '--max_new_tokens=5',
        ok=False,
    )
    got = json.loads((tmp_path / 'e.json').read_text())['metrics']['a']
    assert 'score' in got['sSC']
    assert "no checkpoint folder '/no/whisper'" == got['genppl']['not_run']
    assert 'no judge' in got['gptscore']['not_run'] and '--utmos' in got['utmos']['not_run']
    assert 'not run' in done.stdout
