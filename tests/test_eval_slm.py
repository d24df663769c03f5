"""eval_slm.py: every number against an independent computation, and the script as a user has it."""

import csv
import json
import math
import os
import random
import threading
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
import transformers
from conftest import fit_parts, read_jsonl, run_checked, small_slm, speech, write_jsonl

import eval_slm
import model as M

N_UNITS = 30
run = partial(run_checked, 'eval_slm.py', '--device=cpu')


def suite(folder, n):
    for i in range(n):
        for j, side in enumerate(('correct', 'incorrect')):
            M.save_audio(f'{folder}/{i}_{side}.wav', speech(2 * i + j, 0.3 + 0.05 * (i % 5)))


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """Two SLMs with an encoder and a vocoder of their own: {'a': folder, 'b': folder}."""
    root = tmp_path_factory.mktemp('checkpoints')
    slam = fit_parts(root, [speech(seed, 2.0) for seed in range(20)], N_UNITS)
    for seed, name in enumerate('ab'):
        small_slm(N_UNITS + 2, 256, seed).save_pretrained(root / name, slam)
    return {name: str(root / name) for name in 'ab'}


def rows_of(path, task):
    return [row for row in read_jsonl(path) if row['task'] == task]


def test_packed_likelihoods_are_those_of_transformers_one_by_one(tmp_path):
    """Of OPT, whose learned positions end at its context."""
    torch.manual_seed(0)
    shape = dict(vocab_size=52, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    shape |= dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, init_std=0.3)
    config = transformers.OPTConfig(max_position_embeddings=300, **shape)
    hf = transformers.OPTForCausalLM(config).eval()
    hf.save_pretrained(tmp_path)
    write_jsonl(tmp_path / 'slam.json', [dict(n_units=50)])
    slm = M.load_slm(str(tmp_path)).eval()

    rng = np.random.default_rng(0)
    utterances = [rng.integers(0, 50, rng.integers(2, 140)) for _ in range(40)]
    utterances += [utterances[3].copy(), utterances[0][:5], [7]]
    sums, counts, cut = eval_slm.log_likelihoods(slm, utterances)
    assert not cut.any()
    for units, got, n in zip(utterances, sums, counts, strict=True):
        ids = torch.tensor([[1, *(int(u) + 2 for u in units), 1]])
        with torch.no_grad():
            wanted = -hf(ids, labels=ids).loss.item()  # the mean over every token but the first
        assert got / n == pytest.approx(wanted, abs=2e-5) and n == len(units) + 1
    assert sums[-3] == sums[3]  # equal utterances tie exactly

    slm.slam['scoring'] = 'units'  # of a model trained without <S>: the units alone
    (total,), (n,), _ = eval_slm.log_likelihoods(slm, [[5, 9, 3, 7]])
    ids = torch.tensor([[7, 11, 5, 9]])
    with torch.no_grad():
        assert total / n == pytest.approx(-hf(ids, labels=ids).loss.item(), abs=2e-5) and n == 3
    with pytest.raises(M.InputError, match='another encoder'):
        eval_slm.log_likelihoods(slm, [[3, 50]])
    next(slm.parameters()).data.fill_(math.nan)  # NaN wins no comparison: it would be a score of 0
    with pytest.raises(M.InputError, match='not numbers'):
        eval_slm.log_likelihoods(slm, [[3, 4]])


def test_cut_pairs_are_counted_and_the_suite_is_marked(tmp_path, checkpoint):
    """Stories whose endings lie beyond the context of 256 tokens; one pair of three fits."""
    for i, seconds in enumerate((30, 30, 1)):
        wave = speech(i, seconds)
        M.save_audio(tmp_path / f's/{i}_correct.wav', wave)
        M.save_audio(tmp_path / f's/{i}_incorrect.wav', torch.cat((wave[:-8000], wave[:8000])))
    done = run(f'--init={checkpoint["a"]}', f'--tasks=own={tmp_path}/s', f'--out={tmp_path}/e.json')
    result = M.read_json(tmp_path / 'e.json')['metrics']['a']['own']
    assert result['cut'] == 2 and result['marked']
    assert [row['cut'] for row in rows_of(tmp_path / 'e.pairs.jsonl', 'own')] == [True, True, False]
    assert '2 of 3 cut at 256 tokens' in done.stdout and '* [' in done.stdout
    assert '*: over 1% of the pairs are cut' in done.stdout


@pytest.mark.parametrize('to', ['text', 'speech'])
def test_of_a_story_in_two_modalities_the_ending_alone_is_scored(tmp_path, listeners, to):
    """By an interleaved model: 257 tokens of text, 30 units, two switches."""
    slm = small_slm(257 + N_UNITS + 2, context=40).eval()
    slm.save_pretrained(str(tmp_path), {})
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    V = slm.config.vocab_size
    slm.slam.update(tokenizer=listeners[1], offset=257, end=256, n_units=N_UNITS)
    units, text = np.array([3, 7, 2, 1, 19]), ' ' * (to == 'text') + 'the dog ran'
    words = slm.tokenizer.encode(text, add_special_tokens=False).ids
    (total,), (n,), _ = eval_slm.log_likelihoods(slm, [(units, 'the dog ran', to)])
    parts = [[V - 2, *(units + 257)], [V - 1, *words]]
    begin, end = parts if to == 'text' else parts[::-1]
    ids = torch.tensor([begin + end])
    labels = ids.clone()
    labels[:, : len(begin) + 1] = -100
    with torch.no_grad():
        wanted = -hf(ids, labels=labels).loss.item()
    assert total / n == pytest.approx(wanted, abs=2e-5) and n == len(end) - 1
    # beyond the context the beginning loses its start, the ending is whole
    long = np.tile(units, 9) if to == 'text' else units, words if to == 'text' else 9 * words
    tokens, given, cut = eval_slm.to_tokens(slm, (*long, to))
    assert len(tokens) == 40 and cut > 0 and list(tokens[given - 1 :]) == [int(i) for i in end]


def zerospeech(root, kind):
    """A ZeroSpeech folder, several voices and unequal counts: rows of gold.csv, in no order."""
    rng, rows, folder = random.Random(kind), [], os.path.join(root, kind, 'dev')
    for i in range(14):
        for voice in rng.sample(['amy', 'bob', 'cid', 'dan'], rng.randint(1, 4)):
            for j in range(1 + (rng.randint(1, 3) if kind == 'lexical' else 1)):
                name = ''.join(rng.choices('abcdefgh', k=10))
                row = dict(filename=name, voice=voice, correct=int(j == 0), id=i, subtype='s')
                rows.append(row | dict(type=f't{i // 7}', frequency=i % 4))
    rng.shuffle(rows)
    for k, row in enumerate(rows):
        M.save_audio(os.path.join(folder, row['filename'] + '.wav'), speech(k, 0.3))
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
            wins = [Fraction(1 + (x > y) - (x < y), 2) for x in a for y in b]
            voices.append(sum(wins) / len(wins))
        pairs.append(sum(voices) / len(voices))
    return float(100 * sum(pairs) / len(pairs))


@pytest.mark.parametrize('kind', ['syntactic', 'lexical'])
def test_the_official_average(tmp_path, kind):
    rows = zerospeech(str(tmp_path), kind)
    rng = random.Random(1)
    score = {row['filename']: rng.randint(0, 4) for row in rows}  # with ties
    roots = (tmp_path, tmp_path / kind, tmp_path / kind / 'dev')
    pairs, *others = [eval_slm.list_zerospeech(str(root), kind, 'dev') for root in roots]
    assert others == [pairs, pairs]

    gaps = [score[a[:-4]] - score[b[:-4]] for a, b in map(names, pairs)]
    result, _ = eval_slm.summarise(pairs, [(np.sign(gap) + 1) / 2 for gap in gaps])
    keys = ('type', 'subtype', 'id') if kind == 'syntactic' else ('id',)
    assert result['score'] == pytest.approx(official(rows, score, keys)) and result['n'] == 14
    part, keep = 't1', lambda row: row['type'] == 't1'
    if kind == 'lexical':
        part, keep = 'in vocabulary', lambda row: row['frequency'] > 0
    wanted = official(rows, score, keys, keep)
    assert result['types'][part]['score'] == pytest.approx(wanted)


def names(pair):
    return tuple(os.path.basename(pair[side].path) for side in ('pos', 'neg'))


def test_storycloze_and_salmon_layouts(tmp_path, monkeypatch):
    folders = {'sStoryCloze/00': ('correct', 'incorrect')}
    folders |= {f'salmon/{part}': ('zoo', 'ape') for part in eval_slm.SALMON.split()}
    for folder, (a, b) in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        prefix = 'sample_' if 'salmon' in folder else ''
        for n in (1, 2, 10):
            for side in (a, b):
                (tmp_path / folder / f'{prefix}{n}_{side}.wav').touch()
    row = dict(path='00/2_correct.wav', voice='f3', type='animals', text='A cat.')
    write_jsonl(tmp_path / 'sStoryCloze/manifest.jsonl', [row])
    monkeypatch.setattr(eval_slm, 'data_dir', str(tmp_path))
    suites = eval_slm.find_suites(['sstorycloze', 'salmon'])
    stories = {names(pair): pair for pair in suites.pop('sstorycloze').pairs}
    assert {*stories} == {(f'{n}_correct.wav', f'{n}_incorrect.wav') for n in (1, 2, 10)}
    pair = stories['2_correct.wav', '2_incorrect.wav']
    assert (pair['voice'], pair['types'], pair['text']) == ('f3', ['animals'], 'A cat.')
    wanted = {(f'sample_{n}_ape.wav', f'sample_{n}_zoo.wav') for n in (1, 2, 10)}
    assert all(found.official for found in suites.values())
    assert [{names(pair) for pair in found.pairs} for found in suites.values()] == 8 * [wanted]


def test_a_corrected_file_at_the_same_path_is_scored_anew(tmp_path, checkpoint):
    """Parquet, table and folder with exchanged sides: 100 minus the score."""
    pytest.importorskip('datasets')
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    suite(str(tmp_path / 'own'), 7)

    def score():
        rows = []
        for pair in eval_slm.list_folder(str(tmp_path / 'own')):
            sounds = [open(pair[side].path, 'rb').read() for side in ('pos', 'neg')]
            a, b = (dict(bytes=sound, path='x') for sound in sounds)
            rows.append(dict(positive_audio=a, negative_audio=b))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'own.parquet')
        rows = [f'own/{i}_correct.wav,own/{i}_incorrect.wav' for i in range(7)]
        (tmp_path / 'z.csv').write_text('\n'.join(['correct,incorrect', *rows]))
        flags = f'--data_dir={tmp_path}', f'--out={tmp_path}/e.json'
        run(f'--init={checkpoint["a"]}', f'--tasks=own,z,x={tmp_path}/own.parquet', *flags)
        assert all(row['win'] in (0, 1) for row in rows_of(tmp_path / 'e.pairs.jsonl', 'x'))
        scores = M.read_json(tmp_path / 'e.json')['metrics']['a']
        assert scores['own']['score'] == scores['x']['score'] == scores['z']['score']
        return scores['x']['score']

    before = score()
    assert before not in (0, 50, 100)
    for i in range(7):
        pos, neg = (tmp_path / 'own' / f'{i}_{side}.wav' for side in ('correct', 'incorrect'))
        sounds = pos.read_bytes(), neg.read_bytes()
        pos.write_bytes(sounds[1]), neg.write_bytes(sounds[0])
    assert score() == pytest.approx(100 - before)


def test_a_broken_recording_is_named_and_what_was_finished_is_kept(tmp_path, checkpoint):
    suite(str(tmp_path / 'good'), 2), suite(str(tmp_path / 'bad'), 2)
    (tmp_path / 'bad' / '1_incorrect.wav').write_bytes(b'RIFF')
    flags = f'--init={checkpoint["a"]}', f'--data_dir={tmp_path}', f'--out={tmp_path}/e.json'
    run(*flags, '--tasks=good,bad', mistake='1_incorrect.wav')
    assert list(M.read_json(tmp_path / 'e.json')['metrics']['a']) == ['good']


def test_stories_are_cut_at_word_times_where_they_part(tmp_path):
    words = [['A', 0.0, 0.2], ['dog.', 0.2, 0.5], ['It', 0.7, 0.9], ['ran.', 0.9, 1.2]]
    other = [['A', 0.0, 0.2], ['dog.', 0.2, 0.6], ['He', 0.8, 1.0], ['sat.', 1.0, 1.3]]
    rows = [dict(path='0_correct.wav', words=words), dict(path='0_incorrect.wav', words=other)]
    write_jsonl(tmp_path / 'manifest.jsonl', rows)
    files = [str(tmp_path / row['path']) for row in rows]
    stories = eval_slm.Suite([eval_slm.make_pair('0', *files, {})], False)
    (found,) = eval_slm.cross(stories, str(tmp_path), '_to_text').pairs
    assert found['pos'] == found['neg'] == eval_slm.Clip(files[0], 0.5)
    assert found['to'] == 'text' and found['texts'] == ['It ran.', 'He sat.']
    (found,) = eval_slm.cross(stories, str(tmp_path), '_from_text').pairs
    assert found['to'] == 'speech' and found['texts'] == ['A dog.', 'A dog.']
    assert found['neg'] == eval_slm.Clip(files[1], start=0.8)
    os.remove(tmp_path / 'manifest.jsonl')
    with pytest.raises(M.InputError, match='0_correct.wav: no ending found'):
        eval_slm.cross(stories, str(tmp_path), '_to_text')


def test_interval_is_the_bootstrap_of_resampled_items():
    values = np.random.default_rng(0).normal(3, 1, 80)  # as genppl: exp of a mean
    rng = np.random.default_rng(5)
    naive = np.exp([values[rng.integers(0, 80, 80)].mean() for _ in range(20000)])
    r = eval_slm.interval(values, transform=np.exp, draws=20000)
    assert r['score'] == pytest.approx(np.exp(values.mean()))
    assert [r['low'], r['high']] == pytest.approx(np.percentile(naive, (2.5, 97.5)), rel=0.01)


@pytest.mark.parametrize('n', [1, 2, 7, 100])
def test_all_or_none_right_has_the_exact_binomial_bound(n):
    """Clopper and Pearson: the share at which so extreme a count has a chance of 2.5 %."""
    every, none = eval_slm.interval(np.ones(n)), eval_slm.interval(np.zeros(n))
    assert every['high'] == 100 and (every['low'] / 100) ** n == pytest.approx(0.025)
    assert none['low'] == 0 and (1 - none['high'] / 100) ** n == pytest.approx(0.025)


@pytest.mark.parametrize(('seeds', 'spread'), [(2, 0.3), (3, 0.3), (2, 0.0)])
def test_equal_arms_are_rarely_called_different(seeds, spread):
    """At most 6 % of 500 runs of two arms whose seeds differ as much within as between them."""
    rng = np.random.default_rng(0)
    different = 0
    a = rng.random((seeds, 200))
    assert eval_slm.interval(a)['spread'] == pytest.approx(100 * a.mean(1).std(ddof=1))
    for run_number in range(500):
        skill = 0.4 + spread * rng.normal(size=(2, seeds, 1))
        right = 1 / (1 + np.exp(-(rng.normal(size=200) + skill)))
        a, b = (rng.random((2, seeds, 200)) < right).astype(float)
        r = eval_slm.interval(a, b, draws=300, seed=run_number)
        different += not r['low'] <= 0 <= r['high']
    assert different <= 0.06 * 500


def test_checkpoints_and_arms(tmp_path):
    for name in ('a-s1', 'a-s2', 'b-s1', 'b-s2'):
        (tmp_path / name).mkdir()
    text = f'{tmp_path}/a-s*,B={tmp_path}/b-s1+{tmp_path}/b-s2,untrained:{tmp_path}/a-s1'
    models, arms = eval_slm.find_models(text)
    assert list(models) == ['a-s1', 'a-s2', 'b-s1', 'b-s2', 'untrained']
    assert arms == {'a-s*': ['a-s1', 'a-s2'], 'B': ['b-s1', 'b-s2']}
    items = {name: dict(t={'1': i % 2, '2': 1}) for i, name in enumerate(models)}
    metrics = {name: dict(t=dict(marked=name == 'b-s2', remarks=['cut'])) for name in models}
    means, differences = eval_slm.compare(models, arms, items, metrics)
    assert means['B']['metrics']['t']['marked'] and not means['a-s*']['metrics']['t']['marked']
    assert means['B']['seeds'] == ['b-s1', 'b-s2'] and means['B']['metrics']['t']['score'] == 75
    assert list(differences) == ['a-s* - untrained', 'B - untrained', 'B - a-s*']
    assert differences['B - a-s*']['t']['score'] == 0


def test_generation_metrics_against_independent_lines(tmp_path, checkpoint, listeners):
    """GenPPL and auto-BLEU of prompt + continuation, and the word error rate."""
    from nltk.tokenize import NLTKWordTokenizer

    asr, lm = listeners
    suite(str(tmp_path / 'sstorycloze'), 4)
    rows = [dict(path=f'{i}_correct.wav', text='One two, three!') for i in range(4)]
    write_jsonl(tmp_path / 'sstorycloze/manifest.jsonl', rows)
    knobs = dict(max_new_tokens=20, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2)
    flags = [f'--{key}={value}' for key, value in knobs.items()]
    flags += [f'--asr={asr}', f'--text_lm={lm}', '--prompt_seconds=0.3', '--n_prompts=3']
    flags += [f'--data_dir={tmp_path}', f'--out={tmp_path}/e.json', '--seed=7', '--wer']
    flags += [f'--init={checkpoint["a"]},{checkpoint["b"]}', '--tasks=sstorycloze,genppl,autobleu']
    done = run(*flags)
    got = M.read_json(tmp_path / 'e.json')
    mine = [row for row in rows_of(tmp_path / 'e.pairs.jsonl', 'genppl') if row['model'] == 'a']
    files = [str(tmp_path / 'sstorycloze' / f'{i}_correct.wav') for i in range(3)]
    assert [row['id'] for row in mine] == files and got['sampling']['a'] == knobs

    # by hand: prompts, continuations, waves, transcripts; then perplexity and repeated bigrams
    slm = M.load_slm(checkpoint['a']).eval()
    enc = M.UnitEncoder.from_pretrained(slm.slam['encoder'])
    voc = M.UnitVocoder.from_pretrained(slm.slam['vocoder'])
    heads = [M.dedup(enc.encode(M.load_audio(f)[:4800]))[0] for f in files]
    prompts = [torch.cat((torch.tensor([1]), head + 2)) for head in heads]
    tails = [new - 2 for new in slm.generate(prompts, **knobs, seed=7)]
    processor = transformers.WhisperProcessor.from_pretrained(asr)
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(asr)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    llama = transformers.LlamaForCausalLM.from_pretrained(lm)

    nlls, shares = [], []
    for head, tail, row in zip(heads, tails, mine, strict=True):
        wave = voc.decode(torch.cat((head, tail))).numpy()
        x = processor(wave, sampling_rate=16000, return_tensors='pt').input_features
        (text,) = processor.batch_decode(whisper.generate(x), skip_special_tokens=True)
        words = NLTKWordTokenizer().tokenize(text)
        spoken = [word for word in words if any(map(str.isalnum, word))]
        assert row['text'] == text and (row['value'] is None) == (len(spoken) < 2)
        if len(spoken) > 1:
            ids = tokenizer(text, return_tensors='pt').input_ids
            logps = llama(ids).logits[0, :-1].log_softmax(-1)
            nlls.append(-logps.gather(1, ids[0, 1:, None]).mean().item())
            grams = list(zip(words, words[1:], strict=False))
            shares.append(sum(grams.count(gram) > 1 for gram in grams) / len(grams))
            assert row['value'] == pytest.approx(nlls[-1], rel=1e-4)
    result = got['metrics']['a']
    for task, wanted in (('genppl', math.exp(np.mean(nlls))), ('autobleu', 100 * np.mean(shares))):
        assert result[task]['score'] == pytest.approx(wanted, rel=1e-4)
        assert result[task]['n'] == len(nlls) and result[task]['left_out'] == 3 - len(nlls)
        assert result[task]['short'] == pytest.approx(1 - len(nlls) / 3)
    assert 'common prompts' in done.stdout and f'n = {len(nlls)}' in done.stdout
    assert result['wer']['n'] == 3


def test_loops_and_short_transcripts(monkeypatch):
    for text, loops in {
        'one two three four five six seven eight': False,  # each 5-gram once
        'no no no no no no no': True,
        'a b c d e x y z a b c d e w': True,  # 10 of 14
        'a b c d e x y z u v q r s t a b c d e w k l': False,  # 10 of 22
        "I don't know. I don't know. I don't know.": True,
    }.items():
        assert eval_slm.find_flaws(text) == (False, loops)
    found = {eval_slm.find_flaws(text) for text in ('', ' you', '!!', ' you?!')}
    assert found == {(True, False)} and not eval_slm.find_flaws(' cannot')[0]
    monkeypatch.setattr(eval_slm, 'tasks', 'genppl')
    one = transformers.BatchEncoding(dict(input_ids=[7]))  # a single token of the text LM
    monkeypatch.setitem(eval_slm.OPEN, 'text_lm', lambda: (None, lambda text: one))
    assert eval_slm.find_flaws(' cannot')[0]


def test_word_error_rate_is_all_errors_over_all_words():
    items = [dict(known="It's a big dog.", text=' its a dog'), dict(known='Yes!', text='yes')]
    assert np.mean(eval_slm.rate_words(items)) == pytest.approx(100 * 2 / 5)


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: refuses a wrong key, fails once, rates by length."""

    calls = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        Judge.calls.append(text := body['messages'][0]['content'])
        right = self.headers['Authorization'] == 'Bearer secret' and len(Judge.calls) != 2
        answer = f'From \\boxed{{1}} to 5: fluent. So it is \\boxed{{{1 + len(text) % 5}}}.'
        self.send_response(200 if right else 401)
        self.end_headers()
        reply = dict(choices=[dict(message=dict(content=answer))])
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        """Not to stderr, which the test reads."""


def test_gptscore_end_to_end(tmp_path, checkpoint, listeners, monkeypatch):
    """Of prompts of twice the length whose words are known, cut at the end of a word."""
    server = HTTPServer(('127.0.0.1', 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    prompts = tmp_path / 'prompts'
    words = [['one', 0.0, 0.1], ['two', 0.1, 0.26], ['six', 0.3, 0.5]]
    for i in range(2):  # the text of the second is not known
        M.save_audio(prompts / f'{i}.wav', speech(i, 0.7))
    (prompts / '0.json').write_text(json.dumps(dict(aligned_text=words)))
    flags = [f'--init={checkpoint["a"]}', '--tasks=gptscore', f'--prompts={prompts}']
    flags += [f'--out={tmp_path}/e.json', f'--asr={listeners[0]}', '--prompt_seconds=0.3']
    flags += ['--max_new_tokens=8', f'--judge=http://127.0.0.1:{server.server_port}/v1']
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    run(*flags, mistake='401')  # a wrong key, before all else
    monkeypatch.setenv('OPENAI_API_KEY', 'secret')
    Judge.calls.clear()
    run(*flags)
    server.shutdown()
    (row,) = rows_of(tmp_path / 'e.pairs.jsonl', 'gptscore')
    _, failed, asked = Judge.calls  # the second answer was an error
    assert row['seconds'] == 0.26 and failed == asked
    assert 'Beginning: one two\n' in asked and f'Continuation: {row["text"]}' in asked
    result = M.read_json(tmp_path / 'e.json')['metrics']['a']['gptscore']
    assert result['score'] == row['value'] == 1 + len(asked) % 5 and result['left_out'] == 0


def test_models_end_to_end(tmp_path, checkpoint):
    data, out = tmp_path / 'data', tmp_path / 'out' / 'eval.json'
    suite(str(data / 'grammar'), 12)
    zerospeech(str(data), 'syntactic')
    zerospeech(str(data), 'lexical')
    flags = [f'--init={checkpoint["a"]},{checkpoint["b"]},untrained:{checkpoint["a"]}']
    flags += [f'--data_dir={data}', f'--out={out}', f'--html={tmp_path}/r.html', '--seed=1']
    flags += ['--tasks=grammar,sblimp,swuggy', '--paper=results,peers']
    done = run(*flags)
    first = out.read_bytes()
    result = json.loads(first)
    for task in ('grammar', 'sblimp', 'swuggy'):
        gap = result['metrics']['b'][task]['score'] - result['metrics']['a'][task]['score']
        assert result['differences']['b - a'][task]['score'] == pytest.approx(gap)

    # the paper's rows stand in the column of their suite and split alone
    table = [line.split('|')[1:-1] for line in done.stdout.splitlines() if line.startswith('|')]
    cells = {row[0].strip(): [cell.strip() for cell in row] for row in table}
    column = cells['model'].index('sBLIMP')
    assert cells['Slam'][column] == '58.86' and cells['Slam'][1] == ''
    assert 'slm_scaling 823M sBLIMP is the mean over phenomena' in cells
    assert 'slprl/slam, released' not in cells  # of the test split
    assert table[2][column].strip() == 'dev; % of pairs, by mean log-likelihood'

    # the page holds it all, and nothing from elsewhere; the same command gives the same bytes
    page = open(tmp_path / 'r.html').read()
    assert 'http' not in page.replace('http://www.w3.org', '')
    shown = json.loads(page.split('type="application/json">')[1].split('</script>')[0])
    assert shown['metrics'] == result['metrics'] and len(shown['table']) == len(table) - 1
    run(*flags)
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--tasks=own={tmp}/lone'], '1_correct.wav has no counterpart'),
        (['--tasks=sSC,sSC={tmp}/sSC'], '--tasks names sSC twice'),
        (['--tasks=own={tmp}/bad.csv'], 'bad.csv, line 2: expected correct or positive_audio'),
        (['--tasks=sSC', '--encoder={tmp}/other'], 'different encoders'),
        (['--tasks=sSC,genppl', '--asr=/no/whisper'], "'/no/whisper': there is no such folder"),
        (['--tasks=sSC,genppl', '--asr={tmp}/ct2'], 'ct2 is in CTranslate2 format'),
        (['--tasks=own={tmp}/twice.csv'], "twice.csv, line 4: a second id '1' of voice ''"),
        (['--wer'], 'no prompts with known text: add a suite'),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_computed(tmp_path, checkpoint, args, message):
    suite(str(tmp_path / 'sSC'), 1)
    M.save_audio(tmp_path / 'lone/1_correct.wav', speech(0, 0.5))
    (tmp_path / 'ct2').mkdir()
    (tmp_path / 'ct2/model.bin').touch()
    (tmp_path / 'bad.csv').write_text('right,wrong\na,b\n')
    (tmp_path / 'twice.csv').write_text('\ufeffcorrect,incorrect,id\na,b,\na,b,1\na,b,1', 'utf-8')
    enc = M.UnitEncoder.from_pretrained(M.load_slm(checkpoint['a']).slam['encoder'])
    enc.centroids = enc.centroids.flip(0)
    enc.save_pretrained(str(tmp_path / 'other'))
    defaults = [f'--init={checkpoint["a"]}', '--tasks=sSC', f'--data_dir={tmp_path}']
    args = [arg.format(a=checkpoint['a'], tmp=tmp_path) for arg in args]
    done = run(*defaults, f'--out={tmp_path}/e.json', *args, mistake=message)
    assert not done.stdout and not list(tmp_path.glob('e*'))  # neither a result nor a cache
