"""make_synthetic.py: what is said, how it sounds, and that it is the same whoever makes it and
however often it is interrupted."""

import contextlib
import csv
import ctypes
import glob
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import run_script

import make_synthetic as ms
from make_synthetic import MOODS, QUALITIES, TOPICS, toy_rows
from model import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = ('stories', 'pairs', 'grammar', 'sstory', 'tstory')
VOICE = 'gmw/en+m3'
SMALL = (
    *('config/demo_synthetic.py', '--n_stories=60', '--n_pairs=20', '--n_suite=24'),
    '--n_unseen=8',
)


def run(*args, check=True):
    """The script, in this process (which has loaded torch already) and its workers."""
    result = run_script('make_synthetic.py', *args)
    assert not check or result.returncode == 0, result.stderr
    return result


def speak(speaker, texts, voice=VOICE, speed=1.0, pitch=50):
    return [speaker.speak(text, voice, speed, pitch) for text in texts]


def rows_of(folder):
    with open(os.path.join(folder, 'manifest.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def contents(folder):
    """{path: bytes} of a folder, but for the time that summary.json tells."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            if name != 'summary.json':
                with open(path, 'rb') as file:
                    found[os.path.relpath(path, folder)] = file.read()
    return found


def differing(one, other):
    """The paths that only one has, or that differ."""
    return sorted(path for path in one | other if one.get(path) != other.get(path))


@pytest.fixture(scope='module')
def espeak():
    return ms.Espeak()


@pytest.fixture(scope='module')
def toy():
    return {task: list(toy_rows(task, 1234, 9000, 2000, 500)) for task in TASKS}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A small run of all the toy tasks by 4 workers."""
    out = str(tmp_path_factory.mktemp('made'))
    run(*SMALL, '--workers=4', f'--out={out}')
    return out


# --- the toy grammar


def test_toy_is_rich_and_its_parts_share_nothing(toy):
    assert (
        len(TOPICS) >= 8
        and len(toy['stories']) == 9000
        and all(len(toy[suite]) == 500 for suite in TASKS[2:])
    )
    words = Counter(
        word for row in toy['stories'] for word in re.findall(r'[a-z]+', row['text'].lower())
    )
    assert len(words) >= 300
    prompts = dict(
        stories=[' '.join(ms.sentences(row['text'])[:2]) for row in toy['stories']],
        pairs=[row['prompt'] for row in toy['pairs']],
    )
    for suite in ('sstory', 'tstory'):
        prompts[suite] = [' '.join(ms.sentences(row['right'])[:2]) for row in toy[suite]]
        assert prompts[suite] == [' '.join(ms.sentences(row['wrong'])[:2]) for row in toy[suite]]
    prompts['grammar'] = [' '.join(ms.sentences(row['right'])[:2]) for row in toy['grammar']]
    everything = [prompt for part in prompts.values() for prompt in part]
    assert len(set(everything)) == len(everything)  # no story twice, and none in two places
    spoken = {
        sentence
        for part in TASKS[:2]
        for prompt in prompts[part]
        for sentence in (prompt, *ms.sentences(prompt))
    }
    assert not spoken & {row[side] for row in toy['grammar'] for side in ('right', 'wrong')}


def test_toy_endings_are_right_as_often_as_wrong_and_follow_from_the_story(toy):
    for suite in ('sstory', 'tstory'):
        right, wrong = (
            Counter(ms.sentences(row[side])[-1] for row in toy[suite])
            for side in ('right', 'wrong')
        )
        assert right == wrong and all(
            toy[suite][i]['alike'] == toy[suite][i + 1]['alike'] for i in range(0, 500, 2)
        )
    assert Counter(row['chosen'] for row in toy['pairs']) == Counter(
        row['rejected'] for row in toy['pairs']
    )
    topic_of = {
        thing.split()[0]: topic for topic, parts in TOPICS.items() for thing in parts['things']
    }

    def tells(sentence):
        """(topic, thing, outcome) of a second sentence or an ending, each word on its own."""
        (thing,) = (word for word in re.findall('[a-z]+', sentence.lower()) if word in topic_of)
        words = sentence.lower().strip('.').split()
        (outcome,) = {
            side for side in (0, 1) for word in words if word in QUALITIES[side] + MOODS[side]
        }
        qualities, verbs = (
            TOPICS[topic_of[thing]][key][outcome] for key in ('qualities', 'actions')
        )
        known = qualities if ' the ' not in sentence else [verb.split()[0][:3] for verb in verbs]
        assert any(word in known or word[:3] in known for word in words), sentence
        return topic_of[thing], thing, outcome

    for suite in ('sstory', 'tstory'):
        for row in toy[suite]:
            event, right, wrong = (
                tells(ms.sentences(row['right'])[1]),
                tells(ms.sentences(row['right'])[2]),
                tells(ms.sentences(row['wrong'])[2]),
            )
            assert event == right != wrong
            assert (
                (wrong[:2] == event[:2] and wrong[2] != event[2])
                if suite == 'sstory'
                else (wrong[0] != event[0] and wrong[2] == event[2])
            )
    for row in toy['stories']:
        assert tells(ms.sentences(row['text'])[1]) == tells(ms.sentences(row['text'])[2])
    kinds = Counter(
        'topic' if tells(row['chosen'])[0] != tells(row['rejected'])[0] else 'outcome'
        for row in toy['pairs']
    )
    assert kinds['topic'] == kinds['outcome'] == 1000


def test_toy_agrees_in_number_and_gender(toy):
    number = {
        form: i
        for words in ms.HEROES.values()
        for pair in words.split('|')
        for i, form in enumerate(pair.split())
    }
    gender = {
        form: he
        for he, words in ms.HEROES.items()
        for pair in words.split('|')
        for form in pair.split()
    } | {name: he for he, names in ms.NAMES.items() for name in names.split()}

    def faults(text):
        """How often a story breaks agreement, counted word by word."""
        first, *rest = [sentence.strip('.').split() for sentence in ms.sentences(text)]
        first[0] = first[0] if first[0] in gender else first[0].lower()
        heroes = [word for word in first if word in gender]
        many = len(heroes) > 1 or bool(number.get(heroes[0], 0))
        before = first[: first.index(heroes[0])]
        count = sum(
            word in (('this', 'one') if many else ('these', *ms.NUMBERS.split())) for word in before
        )
        count += sum(word in (('is', 'has') if many else ('are', 'have')) for word in first)
        count += sum(
            word in ('his', 'her', 'their')
            and word != ('their' if many else ms.HIS[gender[heroes[0]]])
            for word in first
        )
        if rest:
            count += rest[1][0].lower() != ('they' if many else gender[heroes[0]]) or rest[1][
                1
            ] != ('are' if many else 'is')
        return count

    for row in toy['grammar']:
        assert faults(row['right']) == 0 < faults(row['wrong']), row
    assert Counter(row['type'] for row in toy['grammar']).keys() == {*ms.MINIMAL, 'pronoun'}
    assert not any(faults(row['text']) for row in toy['stories'])
    frame = 'this these the there is are has have one with and in at'.split()
    assert (
        len(
            {
                tuple(
                    word if word in frame else ''
                    for word in ms.sentences(row['text'])[0].lower().split()
                )
                for row in toy['stories']
            }
        )
        >= 12
    )


# --- how it sounds


def test_manifests_and_audio_of_the_demo(made):
    for task in TASKS:
        rows, folder = rows_of(f'{made}/{task}'), f'{made}/{task}'
        assert len(rows) == dict(stories=60, pairs=20).get(task, 48)
        for row in rows:
            for role in ('prompt_', 'chosen_', 'rejected_') if task == 'pairs' else ('',):
                wave, rate = soundfile.read(os.path.join(folder, row[role + 'path']))
                assert (
                    rate == 16000
                    and wave.ndim == 1
                    and len(wave) % 640 == 0
                    and abs(len(wave) / rate - row[role + 'seconds']) < 1e-3
                )
                assert (
                    0.1 < np.abs(wave).max() < 0.999
                    and 0.02 < np.sqrt((wave**2).mean()) < 0.3
                    and abs(wave.mean()) < 0.01
                )
                words = row[role + 'words']
                assert [word for word, _, _ in words] == row[role + 'text'].split()
                assert (
                    all(
                        0 <= a < b <= c
                        for (_, a, b), (_, c, _) in zip(words, words[1:], strict=False)
                    )
                    and words[-1][2] <= len(wave) / rate
                )
                for (one, _, end), (_, start, _) in zip(words, words[1:], strict=False):
                    if one.endswith(
                        '.'
                    ):  # the pause between sentences is silent, the words are not
                        assert (
                            start - end >= 0.19
                            and np.abs(wave[int(end * rate) + 16 : int(start * rate) - 16]).max()
                            < 2e-3
                        )
                assert all(
                    np.abs(wave[int(a * rate) : int(b * rate)]).max() > 0.02 for _, a, b in words
                )
        assert len({row['voice'] for row in rows}) == 4 or len(rows) < 60
    assert {'train'} <= {row['split'] for row in rows_of(f'{made}/stories')} <= {'train', 'val'}


def test_a_pair_differs_in_what_it_must_only(made):
    for task in ('sstory', 'tstory', 'grammar'):
        rows = rows_of(f'{made}/{task}')
        for right, wrong in zip(rows[::2], rows[1::2], strict=True):
            assert right['correct'] and not wrong['correct'] and right['voice'] == wrong['voice']
            assert right['path'].replace('_correct', '_incorrect') == wrong['path']
            one, two = (soundfile.read(f'{made}/{task}/{row["path"]}')[0] for row in (right, wrong))
            if task != 'grammar':
                end = [word for word in right['words'] if word[0].endswith('.')][1]
                same = int(end[2] * 16000)
                assert np.array_equal(one[:same], two[:same]) and not np.array_equal(
                    one[same:], two[same:]
                )
    rows = rows_of(
        f'{made}/sstory'
    )  # an ending is the same sound where it is right and where it is wrong
    for right, wrong in zip(rows[0::4], rows[3::4], strict=True):
        endings = [
            soundfile.read(f'{made}/sstory/{row["path"]}')[0][
                round(row['words'][-len(ms.sentences(row['text'])[2].split())][1] * 16000) :
            ]
            for row in (right, wrong)
        ]
        n = min(map(len, endings)) - 1000
        assert np.array_equal(endings[0][:n], endings[1][:n])


def test_prompt_and_ending_laid_end_to_end_are_the_whole(espeak):
    texts = 'A dog barks. It is old. She runs.', 'A dog barks. It is old.', 'She runs.'
    whole, prompt, ending = (
        ms.join([ms.trim(s) for s in speak(espeak, ms.sentences(text), VOICE, 1.1, 45)])
        for text in texts
    )
    assert np.array_equal(whole.wave, np.concatenate([prompt.wave, ending.wave]))
    assert len(prompt.wave) % 640 == 0
    seconds = len(prompt.wave) / 16000
    for key in ('words', 'phones'):
        later = [[name, a + seconds, b + seconds] for name, a, b in ending.times[key]]
        joined = prompt.times[key] + later
        assert [name for name, *_ in whole.times[key]] == [name for name, *_ in joined]
        spans = [[span[1:] for span in times] for times in (whole.times[key], joined)]
        assert np.allclose(*spans, atol=2e-3)


def test_espeak_does_not_remember_what_it_said(espeak):
    texts = ['The old man has a dog.', 'She is here.']
    for voice in (VOICE, 'gmw/en+Annie', 'en-us+klatt4', 'de+f2'):
        first = speak(espeak, texts, voice, 1.1, 40)
        speak(espeak, ['Something else entirely, and long.'], 'gmw/en+f2')
        again = speak(espeak, texts[::-1], voice, 1.1, 40)[::-1]
        for one, two in zip(first, again, strict=True):
            assert np.array_equal(one.wave, two.wave) and one.times == two.times
    slow, fast = (len(speak(espeak, texts, 'gmw/en', speed)[0].wave) for speed in (0.8, 1.6))
    assert 1.6 < slow / fast < 2.4


def test_espeak_knows_languages_that_name_no_file(espeak):
    for language, file in (('fr-fr', 'roa/fr'), ('en-gb+f2', 'gmw/en+f2'), ('de', 'gmw/de')):
        one, two = (speak(espeak, ['Salut, Jörg là-bas.'], voice)[0] for voice in (language, file))
        assert np.array_equal(one.wave, two.wave) and len(one.wave) > one.rate / 2
        assert [word for word, _, _ in one.times['words']] == ['Salut,', 'Jörg', 'là-bas.']
    found = {voice: espeak.gender(voice) for voice in (VOICE, 'gmw/en', 'en-us+f2', 'de+Annie')}
    assert list(found.values()) == ['male', 'male', 'female', 'female']


def test_phones_of_espeak_are_those_of_its_own_transcription(espeak):
    """Against espeak_TextToPhonemes, and in the sound: s hisses, vowels hum."""
    sentence = 'The old cat, which barks, sees six ships.'
    (speech,) = speak(espeak, [sentence], VOICE)
    phones = speech.times['phones']
    assert all(a < b <= c for (_, a, b), (_, c, _) in zip(phones, phones[1:], strict=False))
    assert 0 <= phones[0][1] < 0.05 and phones[-1][2] <= len(speech.wave) / speech.rate

    with espeak.load(VOICE) as (library, _):
        translate, written = library.espeak_TextToPhonemes, ''
        translate.restype = ctypes.c_char_p
        pointer = ctypes.c_char_p(sentence.encode())
        while pointer.value is not None:
            written += translate(ctypes.byref(pointer), 1, 2).decode()
    assert re.sub('[ˈˌ_ ]', '', written) == ''.join(name for name, _, _ in phones)

    def crossings(start, end):
        """Zero crossings a second of the middle of a phone."""
        third = (end - start) / 3
        piece = speech.wave[int((start + third) * speech.rate) : int((end - third) * speech.rate)]
        return np.mean(np.diff(np.signbit(piece))) * speech.rate

    hiss = [crossings(*span) for name, *span in phones if name == 's']
    hum = [crossings(*span) for name, *span in phones if name in ('iː', 'a', 'əʊ')]
    assert len(hiss) == 5 and len(hum) == 3 and min(hiss) > 2 * max(hum)
    for word, start, end in speech.times['words']:  # words are made of whole phones
        inside = [name for name, a, b in phones if start - 0.06 <= a and b <= end + 0.06]
        assert inside, word


def test_word_times_share_what_espeak_does_not_mark():
    wave = np.ones(1000, np.float32)
    times = ms.word_times('of the dog', wave, 1000, [(0, 0), (7, 500)])
    assert times == [['of', 0, 0.2], ['the', 0.2, 0.5], ['dog', 0.5, 1.0]]
    wave[400:500] = 0  # the pause of a comma belongs to no word
    times = ms.word_times('yes, sir', wave, 1000, [(0, 0), (5, 500)])
    assert times == [['yes,', 0, 0.4], ['sir', 0.5, 1.0]]


def test_rooms_and_noise_are_what_they_say():
    """Reverberation decays by 60 dB in the room's seconds; noise lies 10 dB below, in its slope."""
    click = np.zeros(48000, np.float32)
    click[0] = 1
    for room, (seconds, energy) in ms.ROOMS.items():
        heard = ms.add_room(click, room)
        assert np.sum(heard**2) == pytest.approx(1, rel=1e-3)
        tail = np.sum(heard[1:] ** 2) / heard[0] ** 2
        assert tail == pytest.approx(energy, rel=1e-2)
        first, later = (np.sum(heard[n : n + 800] ** 2) for n in (1, 1 + int(seconds * 4000)))
        assert 10 * np.log10(first / later) == pytest.approx(15, abs=3)
    tone = np.sin(np.arange(64000) / 5).astype(np.float32)
    for noise, slope in ms.NOISES.items():
        added = ms.add_noise(tone, noise, 'x') - tone
        assert np.mean(added**2) / np.mean(tone**2) == pytest.approx(0.1, rel=1e-3)
        power = np.abs(np.fft.rfft(added)) ** 2
        octaves = [np.log2(np.mean(power[2**n : 2 ** (n + 1)])) for n in range(6, 15)]
        assert np.polyfit(range(9), octaves, 1)[0] == pytest.approx(2 * slope, abs=0.2)
        assert np.array_equal(added, ms.add_noise(tone, noise, 'x') - tone)
        assert not np.array_equal(added, ms.add_noise(tone, noise, 'y') - tone)


# --- text


def test_clean_and_sentences():
    assert (
        ms.clean('“Hi” — she\u00a0said…  *so* <b>it</b> goes \U0001f600 http://x.y/z !')
        == '"Hi", she said. so it goes!'
    )
    assert ms.clean('â€œItâ€™s me,â€\x9d') == '"It\'s me,"'
    assert ms.sentences('Mr. Fox ran. "Stop!" he said. J. Doe left') == [
        'Mr. Fox ran.',
        '"Stop!"',
        'he said.',
        'J. Doe left',
    ]
    assert ms.sentences('***') == [] and ms.sentences('') == []
    long = ' '.join(f'word{i}' + ',' * (i % 7 == 0) for i in range(400))
    pieces = ms.sentences(long)
    assert all(len(piece) <= 300 for piece in pieces) and ' '.join(pieces) == ms.clean(long)


def items_of(monkeypatch, task, path, **knobs):
    for key, value in dict(text=str(path), **knobs).items():
        monkeypatch.setattr(ms, key, value)
    return list(ms.Task(task, task, ['a', 'b']).items(None))


def texts_of(item):
    """{role: text} of an item whose files are spoken plainly."""
    return {role: half['text'] for role, (half,) in item['files'].items()}


def write_csv(path, columns, *rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([columns.split(), *rows])
    return path


def test_swag_and_plain_pairs(tmp_path, monkeypatch):
    swag = write_csv(
        tmp_path / 'swag.csv',
        'video-id fold-ind startphrase sent1 sent2 gold-source ending0 ending1 ending2 ending3 '
        'label',
        ['v', 1, 's', 'A man sits.', 'He', 'gold', 'eats.', 'flies.', 'swims.', 'melts.', 2],
        ['v', 2, 's', 'A man sits.', 'He', 'gen', 'eats.', 'flies.', 'swims.', 'melts.', 2],
        ['v', 3, 's', 'the cat the cat the cat', 'the', 'gold', 'cat.', 'b.', 'c.', 'd.', 0],
        [
            'v',
            4,
            's',
            'Of the test split.',
            'He',
            'gold',
            'eats.',
            'flies.',
            'swims.',
            'melts.',
            '',
        ],
    )
    one, two = items_of(monkeypatch, 'pairs', swag)
    texts = texts_of(one)
    assert texts['prompt'] == 'A man sits.' and texts['chosen'] == 'He swims.'
    assert texts['rejected'] in ('He eats.', 'He flies.', 'He melts.')
    assert two['skip'].startswith('auto-BLEU') and texts_of(two)['chosen'] == 'the cat.'
    # what is drawn depends on the row, not on where the file lies
    os.rename(swag, tmp_path / 'moved.csv')
    assert items_of(monkeypatch, 'pairs', tmp_path / 'moved.csv') == [one, two]
    plain = tmp_path / 'plain.jsonl'
    row = dict(prompt='A b.', chosen='C d.', rejected='E f.')
    plain.write_text(json.dumps(row))
    assert texts_of(items_of(monkeypatch, 'pairs', plain)[0]) == row


def test_storycloze_rows(tmp_path, monkeypatch):
    columns = ' '.join(('InputStoryid', *ms.CLOZE))
    rows = [[i, 'A.', 'B.', 'C.', f'D {i}.', f'One {i}.', f'Two {i}.', 1 + i % 2] for i in range(8)]
    path = write_csv(tmp_path / 'cloze.csv', columns, *rows)
    right = [('One', 'Two')[i % 2] + f' {i}.' for i in range(8)]
    same, topic = (items_of(monkeypatch, task, path) for task in ('sstorycloze', 'tstorycloze'))
    for i in range(8):
        prompt = f'A. B. C. D {i}. '
        wrong = ('Two', 'One')[i % 2] + f' {i}.'
        assert texts_of(same[i]) == dict(correct=prompt + right[i], incorrect=prompt + wrong)
        texts = texts_of(topic[i])
        assert texts['correct'] == prompt + right[i]
        assert texts['incorrect'].removeprefix(prompt) in set(right) - {right[i]}


def test_text_files(tmp_path, monkeypatch):
    texts = dict(
        tiny='One day.\n\nShe ran.\n<|endoftext|>\nTwo.\n<|endoftext|>\n<|endoftext|>\n',
        inline='One.\n<|endoftext|>\nTwo.<|endoftext|>Three.<|endoftext|>Four.\n<|endoftext|>\n',
        plain='First one\ngoes on.\n\n \n\nSecond.\n\n',
    )
    for name, content in texts.items():
        (tmp_path / f'{name}.txt').write_text(content)

    def stories(name, **knobs):
        items = items_of(monkeypatch, 'stories', tmp_path / f'{name}.txt', **knobs)
        return [ms.sentences(texts_of(item)['']) for item in items]

    assert stories('tiny') == [['One day.', 'She ran.'], ['Two.']]
    assert stories('plain') == [['First one goes on.'], ['Second.']]
    assert stories('inline') == [['One.'], ['Two.'], ['Three.'], ['Four.']]
    assert len(items_of(monkeypatch, 'stories', tmp_path)) == 8
    lines = [['First one'], ['goes on.'], ['Second.']]
    assert stories('plain', separator='\\n') == lines
    assert stories('plain', separator='Sec') == [['First one goes on.'], ['ond.']]


@pytest.mark.parametrize('between', ['', 'XX', '<|endoftext|>'])
def test_stories_are_split_wherever_a_block_of_the_file_ends(between, tmp_path):
    rng = random.Random(0)
    whole = ''.join(
        rng.choice(['a', 'b ', '\n', '\n\n', 'X', 'XX', 'c.\n \n']) for _ in range(3000)
    )
    pattern = re.escape(between) if between else r'\n\s*\n'
    expected = [story for story in re.split(pattern, whole) if story.strip()]

    class Slow:
        """A file that gives a few letters at a time."""

        def __init__(self):
            self.rest = whole

        def read(self, n):
            n = rng.randrange(1, 9)
            block, self.rest = self.rest[:n], self.rest[n:]
            return block

    found = list(ms.split_stories(Slow(), between))
    assert [story.split() for story in found] == [story.split() for story in expected]


@pytest.mark.parametrize(
    'name, content, task, says',
    [
        ('a.txt', bytes(range(256)), 'stories', 'UTF-8'),
        ('a.txt', 'Hello there.'.encode('utf-16'), 'stories', 'UTF-8'),
        ('a.txt', 'Grüße aus Köln.'.encode('latin-1'), 'stories', 'UTF-8'),
        ('a.csv', b'a,b\n1,2\n', 'stories', 'a.csv row 1'),
        ('a.csv', b'a,b\n1,2\n', 'pairs', 'gold-source'),
        ('a.csv', b'a,b\n1,2\n', 'blimp', 'sentence_good'),
        ('a.jsonl', b'{"text": "A."}\n[1]\n', 'stories', 'a.jsonl, line 2'),
        ('a.jsonl', b'{"text": "A."}\n\n{"te', 'stories', 'a.jsonl, line 3'),
        ('a.jsonl', b'{"text": ["A."]}', 'stories', 'text (list)'),
    ],
)
def test_bad_text_is_one_line(name, content, task, says, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SystemExit, InputError)) as error:
        items_of(monkeypatch, task, tmp_path / name)
    printed = capsys.readouterr().err or str(error.value)
    assert says in printed and len(printed.splitlines()) == 1


def test_odd_text_is_read(tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl').write_text('{"text": null}\n\n{"text": 5}\n')
    # longer than what csv reads unasked
    (tmp_path / 'b[1].csv').write_text('text\n' + 'word ' * 40000 + '\n')

    def texts(name):
        items = items_of(monkeypatch, 'stories', tmp_path / name)
        return [texts_of(item)[''] for item in items]

    assert texts('a.jsonl') == ['', '5']
    assert len(texts('b[1].csv')[0].split()) == 40000
    assert len(texts('')) == 3
    parquet, pyarrow = (pytest.importorskip(name) for name in ('pyarrow.parquet', 'pyarrow'))
    table = pyarrow.table(dict(text=['A story.', None], other=[1, 2]))
    parquet.write_table(table, tmp_path / 'c.parquet')
    assert texts('c.parquet') == ['A story.', '']


HOSTILE = dict(
    nul='A dog\0 ran.',
    markup='<speak><audio src="x"/>A <break time="9s"/>dog ran.</speak>',
    phonemes="A dog [[h@l'oU]] ran.",
    control='A dog \x01200S ran \x1b[31m here.',
    long='dog ' * 2_500_000,
    endless='d' * 10_000_000,
    arabic='كلب \u202eركض\u202c هنا.',
    hebrew='הכלב רץ.',
    nothing='[[]] <> \ud83d \u200b',
    zalgo='d\u0336\u0336\u0336o\u0336g ran.',
    script='ｄｏｇ ﬁsh №5 ½ ™.',
)


def test_hostile_text_is_spoken_or_skipped_and_never_executed(tmp_path, espeak):
    with open(tmp_path / 'hostile.jsonl', 'w') as file:
        file.writelines(json.dumps(dict(text=text)) + '\n' for text in HOSTILE.values())
    run(f'--text={tmp_path}/hostile.jsonl', f'--out={tmp_path}/o', '--workers=2')
    with open(f'{tmp_path}/o/stories/skipped.jsonl') as file:
        skipped = {row['n']: row['reason'] for row in map(json.loads, file)}
    names = list(HOSTILE)
    assert {names[n]: reason for n, reason in skipped.items()} == dict(
        long='longer than 100,000 letters',
        endless='longer than 100,000 letters',
        nothing='nothing to say',
    )
    said = {names[int(row['path'][4:10])]: row for row in rows_of(f'{tmp_path}/o/stories')}
    assert said.keys() == HOSTILE.keys() - {names[n] for n in skipped}
    for name in ('nul', 'markup'):
        assert said[name]['text'] == 'A dog ran.' and said[name]['seconds'] < 3
    assert said['control']['text'] == 'A dog 200S ran 31m here.'
    # phonemes as letters: espeak, which would speak the same sounds of both otherwise, is not asked
    assert said['phonemes']['text'] == "A dog h@l'oU ran."
    marked, plain = speak(espeak, ["[[h@l'oU]]", '<b>hi</b>'], VOICE), speak(espeak, ['hi'], VOICE)
    assert len(marked[0].wave) > 2 * len(plain[0].wave) < len(marked[1].wave)
    for row in said.values():
        wave, _ = soundfile.read(f'{tmp_path}/o/stories/{row["path"]}')
        assert np.abs(wave).max() > 0.05


class Whisper:
    """A voice that says a short click, at once."""

    def speak(self, sentence, *how):
        return ms.Speech(np.full(len(sentence), 0.1, np.float32), 16000, {})


@pytest.mark.parametrize(
    ('task', 'roles'),
    [
        ('stories', ['']),
        ('pairs', ['prompt', 'chosen', 'rejected']),
        ('sstorycloze', ['correct', 'incorrect']),
        ('blimp', ['correct', 'incorrect']),
        ('wuggy', ['correct', 'incorrect']),
    ],
)
def test_at_most_a_thousand_files_a_folder(task, roles, tmp_path, monkeypatch):
    def touch(path, wave):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'x').close()  # 'x': no path twice

    monkeypatch.setattr(ms, 'save_wave', touch)
    monkeypatch.setattr(ms, 'out', str(tmp_path))
    about = dict(blimp=dict(type='t', subtype='s'), wuggy=dict(word='w', frequency=1))
    texts = {role: 'A.' * (i + 1) for i, role in enumerate(roles)}
    item = dict(files=ms.files_of(**texts), id='0', **about.get(task, {}))
    items = [(n, item | dict(id=str(n))) for n in range(1200)]
    wanted = ms.Task(task, f'{task}_unseen', ['a'])
    ms.do_part(0, items, wanted, Whisper())
    total = ms.join_parts(wanted, 1)
    folder = tmp_path / wanted.name
    files = (
        [row[f'{role}_path'] for row in rows_of(folder) for role in roles]
        if (task == 'pairs')
        else [row['path'] for row in rows_of(folder)]
    )
    assert total['items'] == 1200 and len(files) == 1200 * len(roles)
    assert all(os.path.exists(folder / path) for path in files)
    zerospeech = 'gold.csv' in str(list(folder.glob('*/*/*')))
    assert max(Counter(map(os.path.dirname, files)).values()) <= 1000 - zerospeech
    assert zerospeech == (task in ('blimp', 'wuggy'))
    if zerospeech:  # a small suite is flat, as ZeroSpeech; the evaluation finds the rest too
        from eval_slm import list_zerospeech

        kind = 'syntactic' if task == 'blimp' else 'lexical'
        assert {os.path.dirname(path) for path in files[:998]} == {f'{kind}/dev'}
        assert len(list_zerospeech(str(folder), kind, 'dev')) == 1200


def test_blimp_is_read_back_by_the_evaluation(tmp_path):
    rows = [
        dict(sentence_good=f'These {noun}s are here.', sentence_bad=f'This {noun}s are here.')
        for noun in ('dog', 'cat', 'king')
    ]
    rows.append(dict(sentence_good='\ud83d', sentence_bad='***'))  # half an emoji
    with open(tmp_path / 'b.jsonl', 'w') as file:
        for i, row in enumerate(rows):
            about = dict(linguistics_term='agreement', UID='det_noun', pairID=str(i))
            file.write(json.dumps(row | about) + '\n')
    voices = {VOICE, 'en-us+f2'}
    out = f'{tmp_path}/o/blimp'
    run('--task=blimp', f'--text={tmp_path}/b.jsonl', f'--out={tmp_path}/o', '--workers=1',
        f'--voices={",".join(sorted(voices))}')  # fmt: skip
    from eval_slm import list_zerospeech

    pairs = list_zerospeech(out, 'syntactic', 'dev')
    assert len(pairs) == 6 and {pair['voice'] for pair in pairs} == voices
    with open(f'{out}/skipped.jsonl') as file:
        assert len(file.readlines()) == 2 == summary_of(out)['skipped']
    with open(f'{out}/syntactic/dev/gold.csv') as file:
        gold = list(csv.DictReader(file))
    assert list(gold[0]) == 'id filename voice type subtype correct transcription'.split()
    texts = {row['filename']: (row['correct'], row['transcription']) for row in gold}
    assert len(gold) == 12
    for pair in pairs:
        good, bad = (
            texts[os.path.splitext(os.path.basename(pair[side].files[0]))[0]]
            for side in ('pos', 'neg')
        )
        assert good[0] == '1' and good[1].startswith('These')
        assert bad[0] == '0' and bad[1].startswith('This ')


def test_a_suite_of_the_users_own_in_seen_and_unseen_voices(tmp_path):
    from eval_slm import list_folder

    write_csv(
        tmp_path / 'mine.csv',
        'right wrong type note',
        ['The cat sits.', 'The cat sit.', 'number', 'x'],
        ['A knight came.', 'A night came.', '', 'y'],
        ['She runs.', 'She run.', '', 'z'],
    )
    run('--task=minimal', f'--text={tmp_path}/mine.csv', f'--out={tmp_path}/o', '--voices=gmw/en',
        '--test_voices=de,gmw/en+f2', '--workers=2')  # fmt: skip
    for suite, voices in (('minimal', {'gmw/en'}), ('minimal_unseen', {'de', 'gmw/en+f2'})):
        pairs = list_folder(f'{tmp_path}/o/{suite}')
        assert {os.path.basename(pair['pos'].files[0]) for pair in pairs} == {
            '000000_correct.flac',
            '000002_correct.flac',
        }
        assert [pair['types'] for pair in pairs] == [['number'], []]
        assert {pair['voice'] for pair in pairs} <= voices
        with open(f'{tmp_path}/o/{suite}/skipped.jsonl') as file:
            assert [json.loads(line)['reason'] for line in file] == ['both sound the same']


def test_wuggy(tmp_path):
    """Pseudo-words: not in the text, one letter changed, spoken otherwise; the layout of sWUGGY."""
    run('--task=wuggy', '--n_stories=300', '--n_suite=120', f'--out={tmp_path}', '--workers=2')
    rows = rows_of(f'{tmp_path}/wuggy')
    spoken = [row['text'] for row in toy_rows('stories', 1234, 300, 2000, 120)]
    counts = Counter(word.lower() for text in spoken for word in re.findall('[A-Za-z]+', text))
    seen, pairs = set(), list(zip(rows[::2], rows[1::2], strict=True))
    for right, wrong in pairs:
        word, other = right['text'], wrong['text']
        assert right['frequency'] == counts[word] > 0 and other not in counts
        assert len(word) == len(other) and sum(map(str.__ne__, word, other)) == 1
        assert [p for p, *_ in right['phones']] != [p for p, *_ in wrong['phones']]
        assert right['voice'] == wrong['voice'] and other not in seen
        seen.add(other)
    from eval_slm import list_zerospeech

    listed = list_zerospeech(f'{tmp_path}/wuggy', 'lexical', 'dev')
    assert len(listed) == len(pairs) == 120 - summary_of(f'{tmp_path}/wuggy')['skipped'] > 100
    with open(f'{tmp_path}/wuggy/lexical/dev/gold.csv') as file:
        gold = list(csv.DictReader(file))
    assert list(gold[0]) == 'id filename voice frequency word phones length correct'.split()
    assert all(int(row['length']) == len(row['phones'].split()) for row in gold)


def mfcc_distance(path):
    """How far the mean spectra of a recording's halves lie apart, in MFCC 1 to 12."""
    wave, _ = soundfile.read(path)
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    edges = np.floor(513 * 700 * (10 ** (mel / 2595) - 1) / 16000)
    bank = np.zeros((26, 257))
    for i, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        n = np.arange(257)
        bank[i] = np.clip(
            np.minimum((n - low) / (middle - low), (high - n) / (high - middle)), 0, 1
        )
    loud = power.sum(1) > power.sum(1).max() * 1e-4
    logs = np.log(power @ bank.T + 1e-8)
    cosines = np.cos(np.pi * np.outer(np.arange(26) + 0.5, np.arange(1, 13)) / 26)
    mfcc, middle = logs @ cosines, len(logs) // 2
    halves = mfcc[:middle][loud[:middle]], mfcc[middle:][loud[middle:]]
    return np.linalg.norm(halves[0].mean(0) - halves[1].mean(0))


def test_salmon(tmp_path):
    """The layout of SALMon; an oracle that knows nothing of language hears what changes."""
    run('--task=salmon', '--n_suite=40', f'--out={tmp_path}', '--workers=2')
    from eval_slm import SALMON, list_folder

    assert {*os.listdir(tmp_path / 'salmon')} == {*ms.CONSISTENCY} < {*SALMON}
    parts = {part: f'{tmp_path}/salmon/{part}' for part in ms.CONSISTENCY}
    for part, folder in parts.items():
        names = [
            f'sample_{n}_{kind}.wav' for n in range(40) for kind in ('consistent', 'inconsistent')
        ]
        there = {name for name in os.listdir(folder) if name.endswith('.wav')}
        assert there == set(names)
        right = []
        for pair in list_folder(folder):
            sides = pair['pos'].files[0], pair['neg'].files[0]
            assert sides[0].endswith('_consistent.wav')
            right.append(mfcc_distance(sides[0]) < mfcc_distance(sides[1]))
        assert np.mean(right) >= (0.95 if 'room' not in part and 'rir' not in part else 0.6), part
        # the other pair of a text has the two exchanged; noise is another draw
        tails = [soundfile.read(os.path.join(folder, name))[0][-6400:] for name in names[:4]]
        if part != 'bg_all_consistency':
            assert np.array_equal(tails[1], tails[2]) and np.array_equal(tails[0], tails[3])
            assert not np.array_equal(tails[0], tails[1])
    rows = rows_of(f'{tmp_path}/salmon/gender_consistency')
    assert {row['voice'] for row in rows} == set(ms.BACKENDS['espeak'].voices.split(','))


# --- the work


def summary_of(folder):
    with open(os.path.join(folder, 'summary.json')) as file:
        return json.load(file)


def start(*args):
    return subprocess.Popen(
        [sys.executable, 'make_synthetic.py', *map(str, args)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def parts_of(folder):
    return glob.glob(f'{folder}/*/parts/0*.jsonl')


def wait_for_parts(process, folder, n):
    while len(parts_of(folder)) < n:
        time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()


STORIES = ('config/demo_synthetic.py', '--n_stories=160', '--n_suite=0', '--n_pairs=0')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """160 stories in one run of one worker."""
    out = tmp_path_factory.mktemp('whole')
    run(*STORIES, '--task=stories', '--workers=1', f'--out={out}')
    return contents(out)


def test_one_worker_makes_what_four_do(made, tmp_path):
    args = *SMALL, '--task=stories,pairs,grammar', '--workers=1', f'--out={tmp_path}'
    run(*args)
    for task in ('stories', 'pairs', 'grammar', 'grammar_unseen'):
        assert not differing(contents(f'{tmp_path}/{task}'), contents(f'{made}/{task}'))
    kept = os.stat(f'{tmp_path}/stories/000/000000.flac').st_mtime_ns
    again = run(*args)
    assert again.stdout.count('nothing to do') == 4
    assert os.stat(f'{tmp_path}/stories/000/000000.flac').st_mtime_ns == kept
    other = run(*args, '--pitch=10-20', check=False)
    assert other.returncode == 2 and 'pitch' in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
    # a folder without speech takes any
    empty = f'--out={tmp_path}/empty', '--n_stories=2', '--workers=1'
    assert run(*empty, '--voices=xx-nobody', check=False).returncode == 2
    run(*empty, '--voices=gmw/en')


def test_killed_again_and_again_it_makes_the_same_files(whole, tmp_path):
    """kill -9 of the parent alone, whose workers end by themselves; the next run begins at once."""
    for n, workers in ((1, 2), (2, 3), (3, 1)):
        process = start(*STORIES, '--task=stories', f'--workers={workers}', f'--out={tmp_path}')
        wait_for_parts(process, tmp_path, n)
        process.kill()
        process.wait()
    kept = {path: os.stat(path).st_mtime_ns for path in parts_of(tmp_path)}
    half_written = f'manifest.jsonl.{socket.gethostname()}.{process.pid}.tmp'
    (tmp_path / 'stories' / half_written).write_text('half')
    # on a busy machine the last one may have ended before it was killed
    (tmp_path / 'stories' / 'summary.json').unlink(missing_ok=True)
    run(*STORIES, '--task=stories', '--workers=2', f'--out={tmp_path}')
    assert not differing(contents(tmp_path), whole)
    assert len(kept) >= 3
    assert all(os.stat(path).st_mtime_ns == kept[path] for path in sorted(kept)[:3])


def test_two_runs_in_one_folder_do_no_harm(whole, tmp_path):
    both = [start(*STORIES, '--task=stories', '--workers=2', f'--out={tmp_path}') for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert not differing(contents(tmp_path), whole)


@pytest.mark.parametrize('group', [False, True])
def test_ctrl_c_is_one_line_and_leaves_no_process(group, tmp_path):
    """To the parent alone, and to all processes of the terminal as a shell sends it."""
    process = subprocess.Popen(
        [sys.executable, 'make_synthetic.py', *STORIES, '--n_stories=4000', '--task=stories',
         '--workers=3', f'--out={tmp_path}'],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_parts(process, tmp_path, 2)
    for _ in range(2 if group else 1):
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)  # its workers have the pipe, too
    assert process.returncode in ((130, -signal.SIGINT) if group else (130,))
    assert 'Traceback' not in error
    assert ('interrupted; run the same command' in error) or group
    wait_until_gone(process.pid)


def wait_until_gone(group):
    """Zombies of the group do not count: they stay until their new parent has looked at them."""
    for _ in range(300):
        living = []
        for path in glob.glob('/proc/[0-9]*/stat'):  # id (name) state parent group ...
            with contextlib.suppress(OSError), open(path) as file:
                state, _, of, *_ = file.read().rpartition(')')[2].split()
                living += [path] * (int(of) == group and state != 'Z')
        if not living:
            return
        time.sleep(0.1)
    raise AssertionError(f'processes are left: {living}')


def test_a_worker_that_is_killed_is_said(tmp_path):
    process = start(*STORIES, '--n_stories=4000', '--task=stories', '--workers=2',
                    f'--out={tmp_path}')  # fmt: skip
    wait_for_parts(process, tmp_path, 1)
    found = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and 'a worker was killed' in error


def test_an_error_in_a_worker_is_that_of_the_run(tmp_path):
    """A folder where a file is to be: one line, exit 2, and what was finished is kept."""
    (tmp_path / 'stories').mkdir()
    (tmp_path / 'stories' / '000').write_text('no folder')
    result = run(*STORIES, '--task=stories', '--workers=2', f'--out={tmp_path}', check=False)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith('make_synthetic.py: ')
    assert 'stories/000' in result.stderr


def test_what_cannot_be_said_is_listed(tmp_path):
    long = 'A cat sat. ' + 'It sat on and on, and sang. ' * 40
    (tmp_path / 't.txt').write_text(
        f'A dog ran.\n<|endoftext|>\n***\n<|endoftext|>\n{long}\n<|endoftext|>\nMore.\n'
    )
    args = f'--text={tmp_path}/t.txt', f'--out={tmp_path}/o', '--limit=3', '--workers=1'
    result = run(*args)
    assert "3 stories: '<|endoftext|>' separates them, --separator changes that" in result.stdout
    rows, folder = rows_of(f'{tmp_path}/o/stories'), f'{tmp_path}/o/stories'
    assert [row['path'] for row in rows] == ['000/000000.flac', '000/000002.flac']
    assert rows[1]['seconds'] > 60 and len(rows[1]['words']) == 3 + 7 * 40
    with open(f'{folder}/skipped.jsonl') as file:
        assert [json.loads(line) for line in file] == [
            dict(n=1, reason='nothing to say', text='\n***\n')
        ]
    summary = summary_of(folder)
    assert summary['items'] == 3 and summary['skipped'] == 1
    assert summary['hours'] == pytest.approx(sum(row['seconds'] for row in rows) / 3600)
    run(*args, '--task=prompts')
    prompts = rows_of(f'{tmp_path}/o/prompts')
    assert prompts[1]['seconds'] == 3.0 and prompts[1]['text'].startswith('A cat sat. It sat on')


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['--text=nowhere.txt'], 'nowhere.txt'),
        (['--task=sing'], 'stories'),
        (['--voices=xx-nobody', '--n_stories=3', '--workers=1'], 'xx-nobody'),
        (['--task=grammar', '--test_voices=xx-nobody', '--n_suite=2'], 'xx-nobody'),
        (['--task=salmon', '--voices=gmw/en+m3', '--n_suite=2'], 'two voices'),
        (['--tts=kokoro', '--n_stories=3'], 'pip install'),
        (['--speed=fast'], '0.9-1.1'),
        (['--speed=0-0'], 'range'),
        (['--pitch=50-100'], 'range'),
        (['--limit=-1'], '--limit=-1'),
        (['--pause=-1'], '--pause=-1'),
        (['--voises=de'], 'voices'),
        (['--out=README.md', '--n_stories=1', '--workers=1'], 'README.md'),
    ],
)
def test_mistakes_are_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'kokoro', None)  # not there, whatever this machine has
    result = run(f'--out={tmp_path}', *args, check=False)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and says in lines[0], result.stderr


# --- the networks, small and random but of the true shape


@pytest.mark.parametrize('knobs', [dict(tts_model='tests'), dict(device='abacus')])
def test_a_network_that_is_not_there_is_one_line(knobs, monkeypatch, capsys):
    for key, value in dict(dict(tts='vits', tts_model='tests', device='cpu'), **knobs).items():
        monkeypatch.setattr(ms, key, value)
    with pytest.raises(SystemExit) as error:
        ms.Transformers()
    printed = capsys.readouterr().err
    assert error.value.code == 2 and list(knobs.values())[0] in printed
    assert len(printed.splitlines()) == 1


def set_network(monkeypatch, tts, folder=''):
    for key, value in dict(tts=tts, tts_model=str(folder), device='cpu').items():
        monkeypatch.setattr(ms, key, value)


def test_vits(tmp_path, monkeypatch):
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    torch.manual_seed(0)
    (tmp_path / 'vocab.json').write_text(
        json.dumps({c: i for i, c in enumerate("k'zyuxwvtsrqponmlijhgfedcba_ -0123456789")})
    )
    VitsTokenizer(
        str(tmp_path / 'vocab.json'), pad_token='k', unk_token='k', phonemize=False
    ).save_pretrained(tmp_path)
    VitsModel(
        VitsConfig(
            vocab_size=39,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            flow_size=16,
            spectrogram_bins=9,
            upsample_initial_channel=16,
            upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
            prior_encoder_num_flows=1,
            posterior_encoder_num_wavenet_layers=1,
            prior_encoder_num_wavenet_layers=1,
            duration_predictor_num_flows=1,
            duration_predictor_flow_bins=3,
            wavenet_dilation_rate=1,
            num_speakers=2,
            speaker_embedding_size=8,
        )
    ).save_pretrained(tmp_path)
    set_network(monkeypatch, 'vits', tmp_path)
    speaker = ms.Transformers()
    texts = ['the dog is here.', 'a cat.']
    one, two = speak(speaker, texts, '1'), speak(speaker, texts, '1')
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.wave, b.wave) and a.wave.ndim == 1 and len(a.wave)
        assert (a.rate, a.times) == (16000, {})
    assert not np.array_equal(one[0].wave[:100], speak(speaker, texts, '0')[0].wave[:100])
    assert len(speak(speaker, ['!?', 'yes'], '0')[0].wave) == 0
    with pytest.raises(InputError, match='voices 0 to 1'):
        speak(speaker, ['yes'], '2')


PHONES = dict(the='DH AH0', old='OW1 L D', dog='D AO1 G', barks='B AA1 R K S', then='DH EH1 N',
              it='IH1 T', sleeps='S L IY1 P S', oh='OW1', no='N OW1')  # fmt: skip


class G2p:
    """The interface of g2p_en.G2p: phones and marks of a text, a space between words."""

    def __call__(self, text):
        found = re.findall(r'\w+|[^\w\s]', text)
        spoken = [PHONES.get(word.lower(), word).split() for word in found]
        return [phone for word in spoken for phone in (*word, ' ')][:-1]


def find_g2p(monkeypatch, there):
    """g2p_en itself where it is installed, else a stand-in; or not there, whatever is installed."""
    from transformers.utils import import_utils

    if there:
        try:
            from g2p_en import G2p as found

            found()
            return
        except (ImportError, LookupError):  # the latter: NLTK has not its dictionary
            module = SimpleNamespace(G2p=G2p, __spec__=SimpleNamespace())
            monkeypatch.setitem(sys.modules, 'g2p_en', module)
    else:
        monkeypatch.setitem(sys.modules, 'g2p_en', None)
    available = import_utils.BACKENDS_MAPPING['g2p_en']
    mapping = {'g2p_en': (lambda: there, available[1])}
    monkeypatch.setattr(import_utils, 'BACKENDS_MAPPING', import_utils.BACKENDS_MAPPING | mapping)


def test_fastspeech2(tmp_path, monkeypatch, capsys):
    import torch
    from transformers import (
        FastSpeech2ConformerConfig,
        FastSpeech2ConformerHifiGanConfig,
        FastSpeech2ConformerWithHifiGan,
        FastSpeech2ConformerWithHifiGanConfig,
    )

    torch.manual_seed(0)
    vowels = 'AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW'.split()
    phones = [
        v + s for v in vowels for s in '012'
    ] + 'B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH'.split()
    vocab = {
        token: i
        for i, token in enumerate(['<blank>', '<unk>', *phones, ',', '.', '?', '!', '<sos/eos>'])
    }
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    small = FastSpeech2ConformerConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_mel_bins=20,
        encoder_layers=1,
        decoder_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_linear_units=16,
        decoder_linear_units=16,
        duration_predictor_channels=16,
        pitch_predictor_channels=16,
        energy_predictor_channels=16,
        speech_decoder_postnet_units=16,
        speech_decoder_postnet_layers=2,
        duration_predictor_layers=1,
        pitch_predictor_layers=1,
        energy_predictor_layers=1,
    )
    vocoder = FastSpeech2ConformerHifiGanConfig(
        model_in_dim=20,
        upsample_initial_channel=16,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
    )
    model = FastSpeech2ConformerWithHifiGan(
        FastSpeech2ConformerWithHifiGanConfig(
            model_config=small.to_dict(), vocoder_config=vocoder.to_dict()
        )
    )
    torch.nn.init.constant_(
        model.model.duration_predictor.linear.bias, 1.8
    )  # exp(1.8) - 1 = 5 frames a phone
    model.save_pretrained(tmp_path)
    set_network(monkeypatch, 'fastspeech2', tmp_path)
    find_g2p(monkeypatch, there=False)
    with pytest.raises(SystemExit):
        ms.Transformers()
    assert 'pip install g2p-en' in capsys.readouterr().err

    find_g2p(monkeypatch, there=True)
    speaker = ms.Transformers()
    text = 'The old dog barks, then it sleeps.'
    wave, rate, times = speak(speaker, [text], '0')[0]
    words, spoken = times['words'], [phone for phone, _, _ in times['phones']]
    assert rate == 22050 and [word for word, _, _ in words] == text.split()
    assert words[0][1] == 0 and words[-1][2] <= len(wave) / rate and np.isfinite(wave).all()
    assert all(a < b == c for (_, a, b), (_, c, _) in zip(words, words[1:], strict=False))
    assert spoken == ' '.join(PHONES[word] for word in re.findall('[a-z]+', text.lower())).split()
    assert np.array_equal(wave, speak(speaker, [text], '0')[0].wave)
    fast = speak(speaker, [text], '0', speed=2.0)[0]
    assert 0.3 < len(fast.wave) / len(wave) < 0.7
    assert fast.times['words'][-1][2] <= len(fast.wave) / rate
    names = [word for word, _, _ in speak(speaker, ['Oh - no.'], '0')[0].times['words']]
    assert names == ['Oh', '-', 'no.']

    # the network itself, given the same phones at once
    tokens = [token for token in speaker.tokenizer.tokenize(text) if token != ' ']
    ids = torch.tensor([speaker.tokenizer.convert_tokens_to_ids(tokens)])
    with torch.inference_mode():
        expected = speaker.model(input_ids=ids, return_dict=True).waveform[0].numpy()
    assert np.allclose(wave, expected, atol=1e-5)


def test_kokoro(monkeypatch):
    """The adapter, against what KPipeline of kokoro 0.9.4 gives: parts with .audio and tokens,
    punctuation a token of its own, noise from torch."""
    import torch

    made = []

    class KPipeline:
        def __init__(self, language, repo_id, model):
            made.append((language, repo_id, model))

        def __call__(self, text, voice, speed):
            for half in (('"', 'Yes', ',', '"'), ('he', 'said', '.')):
                tokens = [
                    SimpleNamespace(text=token, start_ts=0.1 * i + 0.05, end_ts=0.1 * i + 0.14)
                    for i, token in enumerate(half)
                ]
                tokens[-1].start_ts = tokens[-1].end_ts = None
                yield SimpleNamespace(
                    tokens=tokens if language_of(voice) else None, audio=torch.rand(12000) + 0.1
                )

    def language_of(voice):
        return voice[0] in 'ab'

    monkeypatch.setitem(
        sys.modules, 'kokoro', SimpleNamespace(KPipeline=KPipeline, KModel=torch.nn.Identity)
    )
    set_network(monkeypatch, 'kokoro')
    speaker, text = ms.Kokoro(), '"Yes," he said.'
    wave, rate, times = speak(speaker, [text], 'af_heart')[0]
    words = times['words']
    assert rate == 24000 and len(wave) == 24000 and [word for word, _, _ in words] == text.split()
    assert [start for _, start, _ in words] == [0.05, 0.55, 0.65]
    assert all(a < b <= c for (_, a, b), (_, c, _) in zip(words, words[1:], strict=False))
    # its noise is a function of the text
    other, again = speak(speaker, ['Another.', text], 'af_heart')
    assert np.array_equal(again.wave, wave) and not np.array_equal(other.wave, wave)
    assert speak(speaker, [text], 'ff_siwis')[0].times == {}
    assert [language for language, *_ in made] == ['a', 'f'] and made[0][2] is made[1][2]
    assert [speaker.gender(voice) for voice in ('af_heart', 'bm_george')] == ['female', 'male']


def test_kokoro_itself(tmp_path, monkeypatch):
    """The package, where it is installed, on a random checkpoint of Kokoro-82M's layout. Its
    tagger's model is not on PyPI: a blank one here."""
    import torch

    kokoro, spacy = pytest.importorskip('kokoro'), pytest.importorskip('spacy')
    signs = (
        ';:,.!?—…"()“” \u0303ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyz'
        'ɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ'
    )
    config = dict(
        istftnet=dict(
            upsample_kernel_sizes=[20, 12],
            upsample_rates=[10, 6],
            gen_istft_hop_size=5,
            gen_istft_n_fft=20,
            upsample_initial_channel=512,
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
        ),
        hidden_dim=512,
        max_dur=50,
        n_layer=3,
        n_mels=80,
        n_token=178,
        style_dim=128,
        text_encoder_kernel_size=5,
        dropout=0.2,
        plbert=dict(
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=512,
            num_hidden_layers=1,
            dropout=0.1,
        ),
        vocab={sign: i for i, sign in enumerate(signs, 1)},
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'voices').mkdir()
    torch.manual_seed(0)
    torch.save({}, tmp_path / 'kokoro-v1_0.pth')
    model = kokoro.KModel('hexgrad/Kokoro-82M', config, str(tmp_path / 'kokoro-v1_0.pth'))
    torch.nn.init.constant_(
        model.predictor.duration_proj.linear_layer.bias, -2.0
    )  # sigmoid(-2) * 50 = 6 frames a phone
    torch.save(
        {name: part.state_dict() for name, part in model.named_children()},
        tmp_path / 'kokoro-v1_0.pth',
    )
    for voice in ('af_heart', 'bm_george', 'ff_siwis'):
        torch.save(torch.randn(510, 1, 256), tmp_path / 'voices' / f'{voice}.pt')
    monkeypatch.setattr(spacy.util, 'is_package', lambda name: True)
    monkeypatch.setattr(spacy, 'load', lambda name, enable: spacy.blank('en'))
    set_network(monkeypatch, 'kokoro', tmp_path)
    speaker, text = ms.Kokoro(), 'The old dog barks, then it sleeps.'
    for voice in ('af_heart', 'bm_george'):
        wave, rate, times = speak(speaker, [text], voice)[0]
        words = times['words']
        assert rate == 24000 and len(wave) % 600 == 0 and len(wave) > 24000
        assert np.isfinite(wave).all() and [word for word, _, _ in words] == text.split()
        assert all(a < b <= c for (_, a, b), (_, c, _) in zip(words, words[1:], strict=False))
        assert words[-1][2] <= len(wave) / rate
        assert np.array_equal(wave, speak(speaker, ['Another.', text], voice)[1].wave)
    fast = speak(speaker, [text], 'bm_george', speed=2.0)[0]
    assert 0.3 < len(fast.wave) / len(wave) < 0.7
    assert fast.times['words'][-1][2] <= len(fast.wave) / rate
    french = speak(speaker, ['Le chien dort.'], 'ff_siwis')[0]
    assert len(french.wave) > 12000 and french.times == {}
