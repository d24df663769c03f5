"""make_synthetic.py: the text that is spoken, how it sounds, and that the files do not depend on
the number of processes and of interruptions."""

import csv
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, fork_script, read_jsonl, run_checked, write_jsonl

import make_synthetic as ms
from model import InputError

TASKS = ('stories', 'pairs', 'grammar', 'sstory', 'tstory')
VOICE = 'gmw/en+m3'
run = partial(run_checked, 'make_synthetic.py')
SMALL = ('config/demo_synthetic.py', '--n_stories=60', '--n_pairs=20', '--n_suite=24')


def rows_of(folder, name='manifest.jsonl'):
    return read_jsonl(f'{folder}/{name}')


def contents(folder):
    """{path: bytes} of a folder, without summary.json, which has times."""
    paths = (path for path in Path(folder).rglob('*.*') if path.name != 'summary.json')
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_csv(path, columns, *rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([columns.split(), *rows])
    return path


def items_of(monkeypatch, task, path, **knobs):
    for key, value in dict(text=str(path), **knobs).items():
        monkeypatch.setattr(ms, key, value)
    return list(ms.items_of(ms.Task(task, task, ['a', 'b'])))


@pytest.fixture(scope='module')
def espeak():
    return ms.Espeak()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A small run of all the toy tasks by 3 workers."""
    out = str(tmp_path_factory.mktemp('made'))
    run(*SMALL, '--n_unseen=8', '--workers=3', f'--out={out}')
    return out


def test_toy_is_rich_and_its_parts_share_no_prompt():
    toy = {task: list(ms.toy_rows(task, 1234, 3000, 700, 200)) for task in TASKS}
    words = Counter(w for row in toy['stories'] for w in re.findall('[a-z]+', row['text'].lower()))
    assert len(toy['stories']) == 3000 and len(words) >= 300
    prompts = [row['prompt'] for row in toy['pairs']]
    prompts += [' '.join(ms.sentences(row['text'])[:2]) for row in toy['stories']]
    spoken = {sentence for prompt in prompts for sentence in (prompt, *ms.sentences(prompt))}
    for suite in TASKS[2:]:
        assert len(toy[suite]) == 200
        prompts += [' '.join(ms.sentences(row['right'])[:2]) for row in toy[suite]]
    assert len(set(prompts)) == len(prompts)
    assert not spoken & {row[side] for row in toy['grammar'] for side in ('right', 'wrong')}

    # an ending is right as often as wrong: none is known by itself
    sides = [('sstory', 'right', 'wrong'), ('tstory', 'right', 'wrong')]
    for task, good, bad in [*sides, ('pairs', 'chosen', 'rejected')]:
        right, wrong = (
            Counter(ms.sentences(row[side])[-1] for row in toy[task]) for side in (good, bad)
        )
        assert right == wrong


def test_manifests_and_audio_of_the_demo(made):
    for task in TASKS:
        rows = rows_of(f'{made}/{task}')
        assert len(rows) == dict(stories=60, pairs=20).get(task, 48)
        for row in rows:
            for role in ('prompt_', 'chosen_', 'rejected_') if task == 'pairs' else ('',):
                wave, rate = soundfile.read(f'{made}/{task}/{row[role + "path"]}')
                assert rate == 16000 and wave.ndim == 1 and len(wave) % 640 == 0
                assert abs(len(wave) / rate - row[role + 'seconds']) < 1e-3
                assert 0.1 < np.abs(wave).max() < 0.999 and abs(wave.mean()) < 0.01
                words = row[role + 'words']
                assert [word for word, _, _ in words] == row[role + 'text'].split()
                assert words[-1][2] <= len(wave) / rate
                for (word, start, end), (_, later, _) in zip(words, words[1:], strict=False):
                    assert 0 <= start < end <= later
                    assert np.abs(wave[int(start * rate) : int(end * rate)]).max() > 0.02
                    if word.endswith('.'):  # the pause between sentences is silent
                        between = wave[int(end * rate) + 16 : int(later * rate) - 16]
                        assert later - end >= 0.09 and np.abs(between).max() < 2e-3
    assert {'train'} <= {row['split'] for row in rows_of(f'{made}/stories')} <= {'train', 'val'}


def test_espeak_speaks_a_sentence_always_alike(espeak):
    """So that a story begins as its prompt, sentence by sentence."""
    texts = ['The old man has a dog.', 'She is here.']
    for voice in (VOICE, 'gmw/en+Annie', 'de+f2'):
        first = [espeak.speak(text, voice, 1.1, 40) for text in texts]
        espeak.speak('Something else entirely, and long.', 'gmw/en+f2', 1.0, 50)
        again = [espeak.speak(text, voice, 1.1, 40) for text in texts[::-1]][::-1]
        for one, two in zip(first, again, strict=True):
            assert np.array_equal(one.wave, two.wave) and one.times == two.times
    whole, *parts = (ms.speak_text(text, VOICE, espeak)[1] for text in (' '.join(texts), *texts))
    assert np.array_equal(whole.wave, np.concatenate([part.wave for part in parts]))
    slow, fast = (len(espeak.speak(texts[0], 'gmw/en', speed, 50).wave) for speed in (0.8, 1.6))
    assert 1.6 < slow / fast < 2.4


def test_espeak_knows_languages_that_name_no_file(espeak):
    for language, file in (('fr-fr', 'roa/fr'), ('en-gb+f2', 'gmw/en+f2'), ('de', 'gmw/de')):
        one, two = (espeak.speak('Salut, Jörg là-bas.', v, 1.0, 50) for v in (language, file))
        assert np.array_equal(one.wave, two.wave) and len(one.wave) > one.rate / 2
        assert [word for word, _, _ in one.times['words']] == ['Salut,', 'Jörg', 'là-bas.']


def test_phones_of_espeak_are_those_of_its_own_transcription(espeak):
    sentence = 'The old cat, which barks, sees six ships.'
    speech = espeak.speak(sentence, VOICE, 1.0, 50)
    phones = speech.times['phones']
    assert all(a < b <= c for (_, a, b), (_, c, _) in zip(phones, phones[1:], strict=False))
    with espeak.load(VOICE) as (library, _):
        translate, written = library.espeak_TextToPhonemes, ''
        translate.restype = ctypes.c_char_p
        pointer = ctypes.c_char_p(sentence.encode())
        while pointer.value is not None:
            written += translate(ctypes.byref(pointer), 1, 2).decode()
    assert re.sub('[ˈˌ_ ]', '', written) == ''.join(name for name, _, _ in phones)
    for word, start, end in speech.times['words']:  # words consist of whole phones
        assert [name for name, a, b in phones if start - 0.06 <= a and b <= end + 0.06], word


def test_word_times_between_marks_are_interpolated():
    wave = np.ones(1000, np.float32)
    times = ms.word_times('of the dog', wave, 1000, [(0, 0), (7, 700)])
    assert times == [['of', 0, 0.3], ['the', 0.3, 0.7], ['dog', 0.7, 1.0]]
    wave[400:500] = 0  # the pause of a comma belongs to no word
    times = ms.word_times('yes, sir', wave, 1000, [(0, 0), (5, 500)])
    assert times == [['yes,', 0, 0.4], ['sir', 0.5, 1.0]]


SAID = {
    '“Hi” — she\u00a0said…  *so* <b>it</b> \U0001f600 http://x.y/z !': '"Hi", she said. so it!',
    'â€œItâ€™s me,â€\x9d': '"It\'s me,"',
    'It is −5 today, –5°C.': 'It is minus 5 today, minus 5 degrees Celsius.',
    'Add 3½ cups, ¼ egg, ⅔ of it.': 'Add 3 and one half cups, one quarter egg, two thirds of it.',
    'Ten 10², x³, 10⁻³.': 'Ten 10 squared, x cubed, 10 to the power of minus 3.',
    '10²³ it is, 5 ⅛, 1⁄2 l': '10 to the power of 23 it is, 5 and one eighth, 1 over 2 l',
    'price<$5, 5 <= x': 'price less than 5 dollars, 5 less than or equal to x',
    'I know 5 < 6 and 8 > 7, x=y.': 'I know 5 less than 6 and 8 greater than 7, x equals y.',
    '$5m, €2bn, US$10k': '5 million dollars, 2 billion euros, 10 thousand US dollars',
    'It cost $5 million, €1 or 3 £.': 'It cost 5 million dollars, 1 euro or 3 pounds.',
    '20 °C, 68°F, 50%.': '20 degrees Celsius, 68 degrees Fahrenheit, 50 percent.',
    'R&amp;D, pages 5–6, №7': 'R and D, pages 5 to 6, number 7',
    '> quoted -> this <\n# Title\n=====': 'quoted - this Title',
    '<p class="x">One<br/> two</p> a <b and c> d': ('One two a less than b and c greater than d'),
    'ｄｏｇ ﬁsh #5': 'dog fish #5',
}


@pytest.mark.parametrize('text', SAID)
def test_signs_that_carry_meaning_are_spoken(text):
    assert ms.clean(text) == SAID[text]


def test_signs_in_other_languages_are_spoken_in_that_language(espeak):
    def phones(text):
        return ''.join(name for name, _, _ in espeak.speak(text, 'de', 1.0, 50).times['phones'])

    text = 'Es sind −5 °C & 3½ €, und 5 < 6.'
    assert ms.clean(text, english=False) == text
    for word in ('minus', 'Grad C und', 'ein halb Euro', 'kleiner'):
        assert phones(word)[:4] in phones(text), word
    assert ms.speak_text('5 < 6', 'de', espeak)[0] == '5 < 6'
    assert ms.speak_text('5 < 6', 'en-us', espeak)[0] == '5 less than 6'


def test_sentences():
    cases = {
        'Mr. Fox ran. "Stop!" J. Doe left': ['Mr. Fox ran.', '"Stop!"', 'J. Doe left'],
        'Wait...what is it?': ['Wait.', 'what is it?'],
        'The end.Next came Dr.Who.': ['The end.', 'Next came Dr. Who.'],
        'What?Yes!no': ['What?', 'Yes!', 'no'],
        'A Ph.D. of example.com has 3.5.': ['A Ph.D. of example.com has 3.5.'],
        '***': [],
        '': [],
    }
    for text, expected in cases.items():
        assert ms.sentences(text) == expected
    long = ' '.join(f'word{i}' + ',' * (i % 7 == 0) for i in range(400))
    pieces = ms.sentences(long)
    assert all(len(piece) <= 300 for piece in pieces) and ' '.join(pieces) == ms.clean(long)


def test_swag_hellaswag_and_own_pairs(tmp_path, monkeypatch):
    four = ['eats.', 'flies.', 'swims.', 'melts.']
    columns = 'sent1 sent2 gold-source ending0 ending1 ending2 ending3 label'
    rows = [
        ['A man sits.', 'He', 'gold', *four, 2],
        ['A man sits.', 'He', 'gen', *four, 2],
        ['the cat the cat the cat', 'the', 'gold', 'cat.', 'b.', 'c.', 'd.', 0],
        ['Of the test split.', 'He', 'gold', *four, ''],
    ]
    found = items_of(monkeypatch, 'pairs', write_csv(tmp_path / 'swag.csv', columns, *rows))
    reasons = ['', 'without a gold label', 'with auto-BLEU of 0.3 or more', 'without a gold label']
    assert [item['skip'] for item in found] == reasons
    wrong = found[0]['texts'].pop('rejected')
    assert found[0]['texts'] == dict(prompt='A man sits.', chosen='He swims.')
    assert wrong in ('He eats.', 'He flies.', 'He melts.')
    hella = [dict(ctx_a='A man sits.', ctx_b='he', endings=four, label=2)]
    hella += [dict(ctx_a='[header] A man', ctx_b='he', endings=four, label='1')]
    one, two = items_of(monkeypatch, 'pairs', write_jsonl(tmp_path / 'h.jsonl', hella))
    assert one['texts']['chosen'] == 'he swims.' and one['texts']['rejected'] != 'he swims.'
    assert one['skip'] == '' and two['skip'] == 'with brackets, slashes or links'
    plain = dict(prompt='A b.', chosen='C d.', rejected='E f.')
    (item,) = items_of(monkeypatch, 'pairs', write_jsonl(tmp_path / 'plain.jsonl', [plain]))
    assert item['texts'] == plain


def test_storycloze(tmp_path, monkeypatch):
    columns = [f'InputSentence{n}' for n in (1, 2, 3, 4)]
    columns += ['RandomFifthSentenceQuiz1', 'RandomFifthSentenceQuiz2', 'AnswerRightEnding']
    rows = [['A.', 'B.', 'C.', f'D {i}.', f'One {i}.', f'Two {i}.', 1 + i % 2] for i in range(8)]
    path = write_csv(tmp_path / 'cloze.csv', ' '.join(columns), *rows)
    right = [('One', 'Two')[i % 2] + f' {i}.' for i in range(8)]
    same, topic = (items_of(monkeypatch, task, path) for task in ('sstorycloze', 'tstorycloze'))
    for i in range(8):
        prompt, wrong = f'A. B. C. D {i}. ', ('Two', 'One')[i % 2] + f' {i}.'
        assert same[i]['texts'] == dict(correct=prompt + right[i], incorrect=prompt + wrong)
        assert topic[i]['texts']['correct'] == prompt + right[i]
        assert topic[i]['texts']['incorrect'].removeprefix(prompt) in set(right) - {right[i]}


def test_documents_of_text_files(tmp_path, monkeypatch):
    texts = dict(
        tiny='One day.\n\nShe ran.\n<|endoftext|>\nTwo.\n<|endoftext|>\n<|endoftext|>\n',
        inline='One.\n<|endoftext|>\nTwo.<|endoftext|>Three.<|endoftext|>Four.\n',
        plain='First one\r\ngoes on.\r\n\r\n \r\n\r\nSecond.\r\n\r\n',
    )
    for name, content in texts.items():
        (tmp_path / f'{name}.txt').write_bytes(content.encode())
    (tmp_path / 'rows.jsonl').write_text('{"text": "One.<|endoftext|>Two."}\n{"text": null}\n')

    def stories(name, **knobs):
        items = items_of(monkeypatch, 'stories', tmp_path / name, **knobs)
        return [ms.sentences(item['texts']['']) for item in items]

    assert stories('tiny.txt') == [['One day.', 'She ran.'], ['Two.']]
    assert stories('plain.txt') == [['First one goes on.'], ['Second.']]
    assert stories('inline.txt') == [['One.'], ['Two.'], ['Three.'], ['Four.']]
    assert stories('rows.jsonl') == [['One.'], ['Two.'], []]
    assert len(stories('')) == 11


@pytest.mark.parametrize('name', ['a.txt', 'a.csv', 'a.jsonl'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'cp1252'])
def test_text_is_utf_8_or_utf_16_with_a_mark(name, encoding, tmp_path, monkeypatch):
    story = 'Die Tür ist grün.'
    content = dict(txt=story, csv=f'text,n\n{story},1\n', jsonl=f'{{"text": "{story}"}}\n')
    (tmp_path / name).write_bytes(content[name[2:]].encode(encoding))
    if encoding in ('utf-16-le', 'cp1252'):
        byte = '0x00|0xfc' if encoding == 'utf-16-le' else '0xfc'
        with pytest.raises(InputError, match=rf'{name}.* byte ({byte})'):
            items_of(monkeypatch, 'stories', tmp_path / name)
    else:
        (item,) = items_of(monkeypatch, 'stories', tmp_path / name)
        assert item['texts'][''].strip() == story


def test_hostile_text_is_spoken_or_skipped_and_never_executed(tmp_path):
    hostile = {
        'A dog\0 ran.': 'A dog ran.',
        '<speak><audio src="x"/>A <break time="9s"/>dog ran.</speak>': 'A dog ran.',
        "A dog [[h@l'oU]] ran.": "A dog h@l'oU ran.",
        'A dog \x01200S ran \x1b[31m here.': 'A dog 200S ran 31m here.',
        '[[]] <> \ud83d \u200b': None,
    }
    write_jsonl(tmp_path / 'hostile.jsonl', [dict(text=text) for text in hostile])
    done = run(f'--text={tmp_path}/hostile.jsonl', f'--out={tmp_path}/o', '--workers=1')
    assert 'skipped: 1 with nothing to say;' in done.stdout
    rows = rows_of(f'{tmp_path}/o/stories')
    assert [row['text'] for row in rows] == [text for text in hostile.values() if text]
    assert max(row['seconds'] for row in rows[:2]) < 3
    (skipped,) = rows_of(f'{tmp_path}/o/stories', 'skipped.jsonl')
    assert skipped['n'] == 4 and rows_of(f'{tmp_path}/o/stories', 'summary.json')[0]['skipped'] == 1


def test_blimp_is_read_back_by_the_evaluation(tmp_path):
    sides = [(f'These {noun} are here.', f'This {noun} are here.') for noun in ('dogs', 'cats')]
    rows = []
    for i, (good, bad) in enumerate([*sides, ('\ud83d', '***')]):  # half an emoji
        rows.append(dict(sentence_good=good, sentence_bad=bad, linguistics_term='agreement'))
        rows[-1] |= dict(UID='det_noun', pairID=str(i))
    write_jsonl(tmp_path / 'b.jsonl', rows)
    voices, out = {VOICE, 'en-us+f2'}, f'{tmp_path}/o/blimp'
    run('--task=blimp', f'--text={tmp_path}/b.jsonl', f'--out={tmp_path}/o', '--workers=1',
        f'--voices={",".join(sorted(voices))}')  # fmt: skip
    from eval_slm import list_zerospeech

    pairs = list_zerospeech(out, 'syntactic', 'dev')
    assert len(pairs) == 4 and {pair['voice'] for pair in pairs} == voices
    assert len(rows_of(out, 'skipped.jsonl')) == 2
    # the official scorer needs these columns, files by name without extension, and pairs by id and
    # voice, one correct and one not
    with open(f'{out}/syntactic/dev/gold.csv') as file:
        gold = list(csv.DictReader(file))
    assert list(gold[0]) == 'id filename voice type subtype correct transcription'.split()
    assert {os.path.exists(f'{out}/syntactic/dev/{row["filename"]}.wav') for row in gold} == {True}
    sides = Counter((row['id'], row['voice'], row['correct']) for row in gold)
    assert len(sides) == 8 and {*sides.values()} == {1}
    assert all(row['transcription'].startswith('These') for row in gold if row['correct'] == '1')


def test_a_suite_of_the_users_own_in_seen_and_unseen_voices(tmp_path):
    from eval_slm import list_folder

    rows = [
        ['The cat sits.', 'The cat sit.', 'number', 'x'],
        ['A knight came.', 'A night came.', '', 'y'],
        ['She runs.', 'She run.', '', 'z'],
    ]
    write_csv(tmp_path / 'mine.csv', 'right wrong type note', *rows)
    run('--task=minimal', f'--text={tmp_path}/mine.csv', f'--out={tmp_path}/o', '--voices=gmw/en',
        '--test_voices=de,gmw/en+f2', '--workers=1')  # fmt: skip
    for suite, voices in (('minimal', {'gmw/en'}), ('minimal_unseen', {'de', 'gmw/en+f2'})):
        pairs = list_folder(f'{tmp_path}/o/{suite}')
        assert len(pairs) == 2 and {pair['voice'] for pair in pairs} <= voices
        (skipped,) = rows_of(f'{tmp_path}/o/{suite}', 'skipped.jsonl')
        assert skipped['reason'] == 'whose two texts sound the same'


STORIES = ('config/demo_synthetic.py', '--n_stories=160', '--n_suite=0', '--n_pairs=0')
STORIES += ('--task=stories',)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """160 stories in one run of one process."""
    out = tmp_path_factory.mktemp('whole')
    run(*STORIES, '--workers=1', f'--out={out}')
    return contents(out)


def test_one_process_makes_what_three_do(made, tmp_path):
    args = *SMALL, '--n_unseen=8', '--task=stories,grammar', '--workers=1', f'--out={tmp_path}'
    run(*args)
    for task in ('stories', 'grammar', 'grammar_unseen'):
        assert contents(f'{tmp_path}/{task}') == contents(f'{made}/{task}')
    assert run(*args).stdout.count('nothing to do') == 3
    for changed, gone in (('--pitch=10-20', 'parts'), ('--n_stories=61', 'summary.json')):
        (tmp_path / 'stories' / gone).rename(tmp_path / 'gone')
        run(*args, changed, mistake=f'with other {"pitch" if "pitch" in changed else "text"}')
        (tmp_path / 'gone').rename(tmp_path / 'stories' / gone)


def children(pid):
    found = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True)
    return found.stdout.split()


def wait_for_parts(out, n, is_alive):
    while is_alive() and len(list(out.glob('*/parts/0*.jsonl'))) < n:
        time.sleep(0.005)
    assert len(list(out.glob('*/parts/0*.jsonl'))) >= n  # it may have ended since


def test_killed_runs_are_continued_to_the_same_files(whole, tmp_path):
    """kill -9 of the parent alone: the next run begins at once, even if workers still live."""
    workers = []
    try:
        for n, flag in ((1, '--workers=2'), (2, '--workers=1')):
            process = fork_script('make_synthetic.py', *STORIES, f'--out={tmp_path}', flag)
            wait_for_parts(tmp_path, n, process.is_alive)
            workers += children(process.pid)
            subprocess.run(['kill', '-STOP', *workers])  # they live until both runs are killed
            process.kill()
            process.join()
    finally:
        subprocess.run(['kill', '-KILL', *workers])
    kept = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob('*/parts/0*.jsonl')}
    (tmp_path / 'stories' / 'summary.json').unlink(missing_ok=True)
    run(*STORIES, '--workers=2', f'--out={tmp_path}')
    temporary = {path for path in contents(tmp_path) if path.endswith('.tmp')}
    found = {path: data for path, data in contents(tmp_path).items() if path not in temporary}
    assert found == whole
    assert all(os.stat(path).st_mtime_ns == kept[path] for path in sorted(kept)[:2])


@pytest.mark.parametrize(
    ('killed', 'code', 'message'),
    [('worker', 2, 'a worker was killed'), ('run', 130, 'interrupted; run the same command')],
)
def test_ctrl_c_or_a_killed_worker_ends_a_run(tmp_path, killed, code, message):
    args = *STORIES, f'--out={tmp_path}', '--workers=2', '--n_stories=4000'
    command = [sys.executable, 'make_synthetic.py', *args]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_parts(tmp_path, 1, lambda: process.poll() is None)
    if killed == 'worker':
        subprocess.run(['kill', '-KILL', children(process.pid)[0]])
    else:
        run(*args, mistake='another process writes')
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)  # its workers hold the pipe, too
    assert process.returncode == code and message in error and 'Traceback' not in error


@pytest.mark.parametrize(
    ('content', 'args', 'says'),
    [
        ('', ['--text=nowhere.txt'], 'nowhere.txt'),
        ('', ['--voices=xx-nobody', '--n_stories=3'], 'xx-nobody'),
        ('', ['--tts=kokoro', '--n_stories=3'], 'kokoro'),
        ('', ['--pitch=slow'], '--pitch=slow: expected'),
        ('', ['--out=README.md', '--n_stories=1'], 'README.md'),
        ('a,b\n1,2\n', [], 'a.csv row 1: expected columns text; found a (str), b (str)'),
        ('text\nOne, two.\n', [], 'a.csv: row 1 has more cells than columns'),
        ('ctx_a,ctx_b,endings,label\nA,B,abcd,2', ['--task=pairs'], 'endings (list), label; found'),
        ('{"text": "A."}\n[1]\n', [], 'a.jsonl, line 2'),
    ],
)
def test_mistakes_are_one_line(content, args, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'kokoro', None)  # missing, also if it is installed here
    if content:
        path = tmp_path / ('a.jsonl' if content.startswith('{') else 'a.csv')
        path.write_text(content)
        args = [*args, f'--text={path}']
    run(f'--out={tmp_path}/o', '--workers=1', *args, mistake=says)


def test_vits(tmp_path, monkeypatch):
    """A small random network of the published layout: words of the text, the seed and the voice
    determine the sound."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    torch.manual_seed(0)
    letters = "k'zyuxwvtsrqponmlijhgfedcba_ -0123456789"
    (tmp_path / 'vocab.json').write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    options = dict(pad_token='k', unk_token='k', phonemize=False)
    VitsTokenizer(str(tmp_path / 'vocab.json'), **options).save_pretrained(tmp_path)
    sizes = dict.fromkeys(('hidden_size', 'ffn_dim', 'flow_size', 'upsample_initial_channel'), 16)
    once = ('num_hidden_layers', 'prior_encoder_num_flows', 'posterior_encoder_num_wavenet_layers')
    once += ('prior_encoder_num_wavenet_layers', 'duration_predictor_num_flows')
    sizes |= dict.fromkeys(once, 1)
    sizes |= dict(vocab_size=len(letters), num_attention_heads=2, spectrogram_bins=9)
    sizes |= dict(upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3])
    sizes |= dict(resblock_dilation_sizes=[[1, 3, 5]], duration_predictor_flow_bins=3)
    config = VitsConfig(**sizes, num_speakers=2, speaker_embedding_size=8)
    VitsModel(config).save_pretrained(tmp_path)
    (tmp_path / 't.txt').write_text('The dog is here. A cat?')
    args = ('--tts=vits', f'--tts_model={tmp_path}', '--device=cpu', f'--text={tmp_path}/t.txt')
    for name, voice in (('a', 1), ('b', 1), ('c', 0)):
        run(*args, f'--out={tmp_path}/{name}', f'--voices={voice}')
    (row,) = rows_of(f'{tmp_path}/a/stories')
    assert row['text'] == 'The dog is here. A cat?' and 'words' not in row
    waves = [(tmp_path / f'{name}/stories/{row["path"]}').read_bytes() for name in 'abc']
    assert waves[0] == waves[1] != waves[2]
    run(*args, f'--out={tmp_path}/d', '--voices=2', mistake='its voices are 0 to 1')


def test_words_of_kokoro_begin_where_its_tokens_do():
    """KPipeline of kokoro 0.9.4 yields parts with .audio and tokens, among them punctuation marks,
    the last one without times."""

    def pipeline(sentence, voice, speed):
        for half in (('"', 'Yes', ',', '"'), ('he', 'said', '.')):
            starts = [0.05, 0.15, 0.25][: len(half) - 1] + [None]
            tokens = zip(half, starts, strict=True)
            tokens = [SimpleNamespace(text=text, start_ts=start) for text, start in tokens]
            yield SimpleNamespace(tokens=tokens, audio=torch.rand(12000) + 0.1)

    speaker = object.__new__(ms.Kokoro)  # without its network
    speaker.pipeline = dict(a=pipeline).get
    wave, rate, times = speaker.speak('"Yes," he said.', 'af_heart', 1.0, 50)
    assert rate == 24000 and len(wave) == 24000
    assert [word for word, _, _ in times['words']] == ['"Yes,"', 'he', 'said.']
    assert [start for _, start, _ in times['words']] == [0.05, 0.55, 0.65]
