"""make_synthetic.py: what is said, how it sounds, and that it is the same whoever makes it and however often it is interrupted."""

from config.toy_grammar import (
    HEROES,
    MINIMAL,
    MOODS,
    NAMES,
    NUMBERS,
    PRONOUNS,
    QUALITIES,
    TOPICS,
    toy_rows,
)

import csv
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import make_synthetic as ms

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = ('stories', 'pairs', 'grammar', 'sstory', 'tstory')


def run(*args, check=True):
    result = subprocess.run(
        [sys.executable, 'make_synthetic.py', *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def rows_of(folder):
    with open(os.path.join(folder, 'manifest.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def contents(folder):
    """{path: bytes} of a folder, but for the time that summary.json tells."""
    return {
        os.path.relpath(os.path.join(top, name), folder): open(os.path.join(top, name), 'rb').read()
        for top, _, names in os.walk(folder)
        for name in names
        if name != 'summary.json'
    }


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
    run(
        'config/demo_synthetic.py',
        '--n_stories=60',
        '--n_pairs=44',
        '--n_suite=48',
        '--workers=4',
        f'--out={out}',
    )
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
    topic_of = {thing.split()[0]: topic for topic, parts in TOPICS.items() for thing in parts[1]}

    def tells(sentence):
        """(topic, thing, outcome) of a second sentence or of an ending, each word read on its own."""
        (thing,) = (word for word in re.findall('[a-z]+', sentence.lower()) if word in topic_of)
        words = sentence.lower().strip('.').split()
        (outcome,) = {
            side for side in (0, 1) for word in words if word in QUALITIES[side] + MOODS[side]
        }
        qualities, verbs = TOPICS[topic_of[thing]][2 + 2 * outcome : 4 + 2 * outcome]
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
        for words in HEROES.values()
        for pair in words.split('|')
        for i, form in enumerate(pair.split())
    }
    gender = {
        form: he
        for he, words in HEROES.items()
        for pair in words.split('|')
        for form in pair.split()
    } | {name: he for he, names in NAMES.items() for name in names}

    def faults(text):
        """How often a story breaks agreement, counted word by word."""
        first, *rest = [sentence.strip('.').split() for sentence in ms.sentences(text)]
        first[0] = first[0] if first[0] in gender else first[0].lower()
        heroes = [word for word in first if word in gender]
        many = len(heroes) > 1 or bool(number.get(heroes[0], 0))
        before = first[: first.index(heroes[0])]
        count = sum(word in (('this', 'one') if many else ('these', *NUMBERS)) for word in before)
        count += sum(word in (('is', 'has') if many else ('are', 'have')) for word in first)
        count += sum(
            word in ('his', 'her', 'their')
            and word != ('their' if many else PRONOUNS[gender[heroes[0]]]['his'])
            for word in first
        )
        if rest:
            count += rest[1][0].lower() != ('they' if many else gender[heroes[0]]) or rest[1][
                1
            ] != ('are' if many else 'is')
        return count

    for row in toy['grammar']:
        assert faults(row['right']) == 0 < faults(row['wrong']), row
    assert Counter(row['type'] for row in toy['grammar']).keys() == {*MINIMAL, 'pronoun'}
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
        assert len(rows) in ((43, 44) if task == 'pairs' else (60,) if task == 'stories' else (96,))
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
                    all(0 <= a < b <= c for (_, a, b), (_, c, _) in zip(words, words[1:]))
                    and words[-1][2] <= len(wave) / rate
                )
                for (one, _, end), (_, start, _) in zip(words, words[1:]):
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
        assert len({row['voice'] for row in rows}) == 4
    assert {'train'} <= {row['split'] for row in rows_of(f'{made}/stories')} <= {'train', 'val'}


def test_a_pair_differs_in_what_it_must_only(made):
    for task in ('sstory', 'tstory', 'grammar'):
        rows = rows_of(f'{made}/{task}')
        for right, wrong in zip(rows[::2], rows[1::2]):
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
    for right, wrong in zip(rows[0::4], rows[3::4]):
        endings = [
            soundfile.read(f'{made}/sstory/{row["path"]}')[0][
                round(row['words'][-len(ms.sentences(row['text'])[2].split())][1] * 16000) :
            ]
            for row in (right, wrong)
        ]
        n = min(map(len, endings)) - 1000
        assert np.array_equal(endings[0][:n], endings[1][:n])


def test_prompt_and_ending_laid_end_to_end_are_the_whole(espeak):
    whole, prompt, ending = (
        ms.assemble(espeak(ms.sentences(text), 'gmw/en+m3', 1.1, 45))[0]
        for text in ('A dog barks. It is old. She runs.', 'A dog barks. It is old.', 'She runs.')
    )
    assert np.array_equal(whole, np.concatenate([prompt, ending])) and len(prompt) % 640 == 0


def test_espeak_does_not_remember_what_it_said(espeak):
    for voice in ('gmw/en+m3', 'gmw/en+Annie', 'en-us+klatt4', 'de+f2'):
        first, _ = (
            espeak(['The old man has a dog.', 'She is here.'], voice, 1.1, 40),
            espeak(['Something else entirely, and long.'], 'gmw/en+f2'),
        )
        again = espeak(['She is here.', 'The old man has a dog.'], voice, 1.1, 40)[::-1]
        assert all(np.array_equal(a[0], b[0]) and a[2] == b[2] for a, b in zip(first, again))
    slow, fast = (
        len(espeak(['The old man has a dog.'], 'gmw/en', speed)[0][0]) for speed in (0.8, 1.6)
    )
    assert 1.6 < slow / fast < 2.4


def test_espeak_knows_languages_that_name_no_file(espeak):
    for language, file in (('fr-fr', 'roa/fr'), ('en-gb+f2', 'gmw/en+f2'), ('de', 'gmw/de')):
        (one, rate, words), (two, *_) = (
            espeak(['Salut, Jörg là-bas.'], voice)[0] for voice in (language, file)
        )
        assert (
            np.array_equal(one, two)
            and len(one) > rate / 2
            and [word for word, _, _ in words] == ['Salut,', 'Jörg', 'là-bas.']
        )


def test_word_times_share_what_espeak_does_not_mark():
    wave = np.ones(1000, np.float32)
    assert ms.word_times('of the dog', wave, 1000, [(0, 0), (7, 500)]) == [
        ['of', 0, 0.2],
        ['the', 0.2, 0.5],
        ['dog', 0.5, 1.0],
    ]
    wave[400:500] = 0  # the pause of a comma belongs to no word
    assert ms.word_times('yes, sir', wave, 1000, [(0, 0), (5, 500)]) == [
        ['yes,', 0, 0.4],
        ['sir', 0.5, 1.0],
    ]


@pytest.mark.parametrize('rate', [22050, 24000, 8000, 44100])
def test_resample_keeps_what_fits_and_nothing_else(rate):
    t, low = np.arange(rate * 2) / rate, 0.45 * rate
    for hertz in (200, 3000, 6500, 9500):
        if hertz < low:
            wave = ms.resample(np.sin(2 * np.pi * hertz * t).astype(np.float32), rate)
            assert len(wave) == 32000
            ideal = np.sin(2 * np.pi * hertz * np.arange(32000) / 16000) * (hertz < 7500)
            assert np.abs(wave - ideal)[1000:-1000].max() < 1e-3
    assert len(ms.resample(np.zeros(1, np.float32), rate)) == -(-16000 // rate)


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


def test_auto_bleu_is_that_of_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        words = [rng.choice('a b c d e f g'.split()) for _ in range(rng.randrange(0, 25))]
        bigrams = [tuple(words[i : i + 2]) for i in range(len(words) - 1)]
        expected = (
            sum(sum(other == one for other in bigrams) > 1 for one in bigrams) / len(bigrams)
            if bigrams
            else 0
        )
        assert ms.auto_bleu(' '.join(words)) == pytest.approx(expected)
    assert ms.auto_bleu('the dog, the dog, the cat') == pytest.approx(6 / 7)


def items_of(monkeypatch, task, path, **knobs):
    for key, value in dict(text=str(path), **knobs).items():
        monkeypatch.setattr(ms, key, value)
    return list(ms.make_items(task))


def write_csv(path, columns, *rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([columns.split(), *rows])
    return path


def test_swag_hellaswag_and_plain_pairs(tmp_path, monkeypatch):
    swag = write_csv(
        tmp_path / 'swag.csv',
        'video-id fold-ind startphrase sent1 sent2 gold-source ending0 ending1 ending2 ending3 label',
        ['v', 1, 's', 'A man sits.', 'He', 'gold', 'eats.', 'flies.', 'swims.', 'melts.', 2],
        ['v', 2, 's', 'A man sits.', 'He', 'gen', 'eats.', 'flies.', 'swims.', 'melts.', 2],
        ['v', 3, 's', 'the cat the cat the cat', 'the', 'gold', 'cat.', 'b.', 'c.', 'd.', 0],
    )
    one, two = items_of(monkeypatch, 'pairs', swag)
    texts = {file['role']: file['text'] for file in one['files']}
    assert (
        texts['prompt'] == 'A man sits.'
        and texts['chosen'] == 'He swims.'
        and texts['rejected'] in ('He eats.', 'He flies.', 'He melts.')
    )
    assert two['skip'].startswith('auto-BLEU') and two['text'] == 'the cat the cat the cat the cat.'
    os.rename(
        swag, tmp_path / 'moved.csv'
    )  # what is drawn depends on the row, not on where the file lies
    assert items_of(monkeypatch, 'pairs', tmp_path / 'moved.csv') == [one, two]
    hella = tmp_path / 'hella.jsonl'
    row = dict(
        ctx_a='A cook stirs.',
        ctx_b='she',
        endings=['tastes it.', 'leaves.', 'sings.', 'falls.'],
        label=0,
        source_id='x',
    )
    left_out = (
        dict(row, ctx_a='[header] How to stir'),
        dict(row, endings=['a/b', 'b', 'c', 'd']),
        dict(row, label=''),
        dict(row, label='12'),
        dict(row, endings=['a.', None, 'c.']),
    )
    hella.write_text('\n'.join(json.dumps(r) for r in (row, *left_out)))
    one, *odd = items_of(monkeypatch, 'pairs', hella)
    assert ['label' in item['skip'] and item['text'] for item in odd] == [
        f'{hella} row {n}' for n in (4, 5, 6)
    ]  # what is not whole is listed
    texts = {file['role']: file['text'] for file in one['files']}
    assert (texts['prompt'], texts['chosen']) == ('A cook stirs.', 'she tastes it.')
    assert texts['rejected'] in ('she leaves.', 'she sings.', 'she falls.')
    plain = tmp_path / 'plain.jsonl'
    plain.write_text(json.dumps(dict(prompt='A b.', chosen='C d.', rejected='E f.')))
    assert [file['text'] for file in items_of(monkeypatch, 'pairs', plain)[0]['files']] == [
        'A b.',
        'C d.',
        'E f.',
    ]


def test_storycloze_rows(tmp_path, monkeypatch):
    columns = (
        'InputStoryid InputSentence1 InputSentence2 InputSentence3 InputSentence4 RandomFifthSentenceQuiz1 RandomFifthSentenceQuiz2 '
        'AnswerRightEnding'
    )
    path = write_csv(
        tmp_path / 'cloze.csv',
        columns,
        *([i, 'A.', 'B.', 'C.', f'D {i}.', f'One {i}.', f'Two {i}.', 1 + i % 2] for i in range(8)),
    )
    right = [('One', 'Two')[i % 2] + f' {i}.' for i in range(8)]
    same, topic = (items_of(monkeypatch, task, path) for task in ('sstorycloze', 'tstorycloze'))
    for i in range(8):
        assert [file['text'] for file in same[i]['files']] == [
            f'A. B. C. D {i}. {right[i]}',
            f'A. B. C. D {i}. ' + ('Two', 'One')[i % 2] + f' {i}.',
        ]
        correct, wrong = topic[i]['files']
        assert correct['text'] == same[i]['files'][0]['text'] and wrong['text'].startswith(
            f'A. B. C. D {i}. '
        )
        assert wrong['text'].split('. ', 4)[4] in set(right) - {right[i]}


def test_text_files(tmp_path, monkeypatch):
    (tmp_path / 'tiny.txt').write_text(
        'One day.\n\nShe ran.\n<|endoftext|>\nTwo.\n<|endoftext|>\n<|endoftext|>\n'
    )
    (tmp_path / 'inline.txt').write_text(
        'One.\n<|endoftext|>\nTwo.<|endoftext|>Three.<|endoftext|>Four.\n<|endoftext|>\n'
    )
    (tmp_path / 'plain.txt').write_text('First one\ngoes on.\n\n\nSecond.\n')
    tiny, plain, inline = (
        [
            ms.sentences(item['files'][0]['text'])
            for item in items_of(monkeypatch, 'stories', tmp_path / name)
        ]
        for name in ('tiny.txt', 'plain.txt', 'inline.txt')
    )
    assert tiny == [['One day.', 'She ran.'], ['Two.'], []] and plain == [
        ['First one goes on.'],
        ['Second.'],
    ]
    assert (
        inline == [['One.'], ['Two.'], ['Three.'], ['Four.']]
        and len(items_of(monkeypatch, 'stories', tmp_path)) == 9
    )


@pytest.mark.parametrize(
    'name, content, task, says',
    [
        ('a.txt', bytes(range(256)), 'stories', 'UTF-8'),
        ('a.txt', 'Hello there.'.encode('utf-16'), 'stories', 'UTF-8'),
        ('a.txt', 'Grüße aus Köln.'.encode('latin-1'), 'stories', 'UTF-8'),
        ('a.csv', b'a,b\n1,2\n', 'stories', 'a.csv row 1'),
        ('a.csv', b'a,b\n1,2\n', 'pairs', 'gold-source'),
        ('a.csv', b'a,b\n1,2\n', 'blimp', 'sentence_good'),
        ('a.jsonl', b'{"text": "A."}\n[1]\n', 'stories', 'a.jsonl row 2'),
        ('a.jsonl', b'{"text": "A."}\n\n{"te', 'stories', 'a.jsonl row 2'),
        ('a.jsonl', b'{"text": ["A."]}', 'stories', 'text (list)'),
        ('a.txt', b'', 'stories', 'no text there'),
    ],
)
def test_bad_text_is_one_line(name, content, task, says, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        items_of(monkeypatch, task, tmp_path / name)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and says in printed and len(printed.splitlines()) == 1


def test_odd_text_is_read(tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl').write_text('{"text": null}\n\n{"text": 5}\n')
    (tmp_path / 'b[1].csv').write_text(
        'text\n' + 'word ' * 40000 + '\n'
    )  # longer than what csv reads unasked
    assert [
        item['files'][0]['text'] for item in items_of(monkeypatch, 'stories', tmp_path / 'a.jsonl')
    ] == ['', '5']
    assert (
        len(items_of(monkeypatch, 'stories', tmp_path / 'b[1].csv')[0]['files'][0]['text'].split())
        == 40000
    )
    assert len(items_of(monkeypatch, 'stories', tmp_path)) == 3
    monkeypatch.setitem(
        sys.modules,
        'datasets',
        SimpleNamespace(load_dataset=lambda name, split: {'train': [dict(story='A.')]}[split]),
    )
    assert (
        items_of(monkeypatch, 'stories', 'hub:one/two', text_field='story')[0]['files'][0]['text']
        == 'A.'
    )
    with pytest.raises(SystemExit):
        items_of(monkeypatch, 'stories', 'hub:one/two:nowhere')


@pytest.mark.parametrize(
    'task, roles', [('stories', 1), ('pairs', 3), ('sstorycloze', 2), ('blimp', 2)]
)
def test_at_most_a_thousand_files_a_folder(task, roles, tmp_path, monkeypatch):
    monkeypatch.setattr(ms, 'voices', 'a')
    monkeypatch.setattr(
        ms,
        'speak',
        lambda texts, *how: [(np.ones(10, np.float32), 16000, None)] * len(texts),
        raising=False,
    )
    monkeypatch.setattr(
        ms, 'save', lambda path, wave: open(path, 'x').close() or 1
    )  # 'x': no path twice
    items = [
        (
            n,
            dict(
                files=[dict(name=f'{{n:06d}}_{i}', text='A.', correct=i == 0) for i in range(roles)]
            ),
        )
        for n in range(1200)
    ]
    rows = ms.do_shard((0, task, str(tmp_path), items))['rows']
    paths = [row['path'] for row in rows]
    assert len(paths) == 1200 * roles and all(os.path.exists(tmp_path / path) for path in paths)
    assert max(Counter(map(os.path.dirname, paths)).values()) <= 1000 - (task == 'blimp')
    if task == 'blimp':  # a small suite is flat, as ZeroSpeech; the evaluation finds the rest too
        assert {os.path.dirname(path) for path in paths[:998]} == {'syntactic/dev'}
        write_csv(
            tmp_path / 'syntactic' / 'dev' / 'gold.csv',
            'id filename voice type subtype correct transcription',
            *(
                [
                    i // 2,
                    os.path.relpath(path[:-5], 'syntactic/dev'),
                    'a',
                    't',
                    's',
                    1 - i % 2,
                    'A.',
                ]
                for i, path in enumerate(paths)
            ),
        )
        from eval_slm import list_zerospeech

        assert len(list_zerospeech(str(tmp_path), 'syntactic', 'dev')[0]) == 1200


def test_blimp_is_read_back_by_the_evaluation(tmp_path):
    (tmp_path / 'b.jsonl').write_text(
        '\n'.join(
            json.dumps(
                dict(
                    sentence_good=f'These {noun}s are here.',
                    sentence_bad=f'This {noun}s are here.',
                    field='syntax',
                    linguistics_term='agreement',
                    UID='det_noun',
                    pairID=str(i),
                )
            )
            for i, noun in enumerate(('dog', 'cat', 'king'))
        )
        + '\n'
        + json.dumps(
            dict(
                sentence_good='\ud83d',
                sentence_bad='***',
                linguistics_term='a',
                UID='b',
                pairID='c',
            )
        )
    )  # half an emoji
    run(
        '--task=blimp',
        f'--text={tmp_path}/b.jsonl',
        f'--out={tmp_path}/o',
        '--voices=gmw/en+m3,en-us+f2',
        '--audio_format=wav',
        '--workers=1',
    )
    from eval_slm import list_zerospeech

    pairs = list_zerospeech(f'{tmp_path}/o/blimp', 'syntactic', 'dev')[0]
    assert len(pairs) == 6 and {pair['voice'] for pair in pairs} == {'gmw/en+m3', 'en-us+f2'}
    gold = list(csv.DictReader(open(f'{tmp_path}/o/blimp/syntactic/dev/gold.csv')))
    assert (
        len(open(f'{tmp_path}/o/blimp/skipped.jsonl').readlines())
        == 2
        == json.load(open(f'{tmp_path}/o/blimp/summary.json'))['skipped']
    )
    assert (
        len(gold) == 12
        and list(gold[0]) == 'id filename voice type subtype correct transcription'.split()
    )
    texts = {row['filename']: (row['correct'], row['transcription']) for row in gold}
    for pair in pairs:
        good, bad = (
            texts[os.path.splitext(os.path.basename(pair[side]))[0]] for side in ('pos', 'neg')
        )
        assert (
            good[0] == '1'
            and bad[0] == '0'
            and good[1].startswith('These')
            and bad[1].startswith('This ')
        )


# --- the work


def test_one_worker_makes_what_four_do_and_a_killed_run_continues(made, tmp_path):
    args = (
        'config/demo_synthetic.py',
        '--n_stories=60',
        '--n_pairs=44',
        '--n_suite=48',
        '--task=stories,pairs,grammar',
        f'--out={tmp_path}',
        '--workers=1',
    )
    process = subprocess.Popen(
        [sys.executable, 'make_synthetic.py', *args], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (
        os.path.exists(f'{tmp_path}/stories/journal.jsonl')
        and open(f'{tmp_path}/stories/journal.jsonl').read().count('\n') == 2
    ):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(f'{tmp_path}/stories/manifest.jsonl')
    kept = os.stat(f'{tmp_path}/stories/000/000000.flac').st_mtime_ns
    with open(f'{tmp_path}/stories/journal.jsonl', 'a') as file:
        file.write('{"shard": 1, "items": 20, "ro')  # cut off while writing
    run(*args)
    assert os.stat(f'{tmp_path}/stories/000/000000.flac').st_mtime_ns == kept
    for task in ('stories', 'pairs', 'grammar'):
        assert contents(f'{tmp_path}/{task}') == contents(f'{made}/{task}')
    again = run(*args)
    assert (
        again.stdout.count('nothing to do') == 3
        and os.stat(f'{tmp_path}/stories/000/000000.flac').st_mtime_ns == kept
    )
    other = run(*args, '--pitch=10-20', check=False)
    assert (
        other.returncode == 2
        and 'pitch' in other.stderr
        and len(other.stderr.strip().splitlines()) == 1
    )


def test_several_workers_killed_go_on_where_they_stopped(tmp_path):
    args = (
        'config/demo_synthetic.py',
        '--n_stories=120',
        '--n_pairs=0',
        '--n_suite=0',
        '--task=stories',
    )
    journal = tmp_path / 'killed' / 'stories' / 'journal.jsonl'
    process = subprocess.Popen(
        [sys.executable, 'make_synthetic.py', *args, '--workers=2', f'--out={tmp_path}/killed'],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while not (journal.exists() and journal.read_bytes().count(b'\n') >= 2):
        time.sleep(0.005)
        assert process.poll() is None
    process.kill()
    process.wait()
    kept = {
        path: path.stat().st_mtime_ns
        for path in journal.parent.glob('*/*.flac')
        if int(path.stem) < 40
    }
    run(
        *args, '--workers=3', f'--out={tmp_path}/killed'
    )  # at once, while the workers may still be there
    assert len(kept) == 40 and all(
        path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items()
    )
    run(*args, '--workers=1', f'--out={tmp_path}/whole')
    assert (
        contents(f'{tmp_path}/killed') == contents(f'{tmp_path}/whole')
        and len(rows_of(f'{tmp_path}/whole/stories')) == 120
    )


def test_two_runs_at_once_do_not_mix(tmp_path):
    os.makedirs(tmp_path / 'stories')
    with open(tmp_path / 'stories' / 'journal.jsonl', 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run('--n_stories=1', '--workers=1', f'--out={tmp_path}', check=False)
    assert (
        result.returncode == 2
        and 'another run' in result.stderr
        and os.listdir(tmp_path / 'stories') == ['journal.jsonl']
    )


def test_what_cannot_be_said_is_listed_and_limit_projects(tmp_path):
    (tmp_path / 't.txt').write_text(
        'A dog ran.\n<|endoftext|>\n***\n<|endoftext|>\nA cat sat. '
        + 'It sat on and on, and sang. ' * 40
        + '\n<|endoftext|>\nMore.\n'
    )
    run(f'--text={tmp_path}/t.txt', f'--out={tmp_path}/o', '--limit=3', '--workers=1')
    rows, skipped = (
        rows_of(f'{tmp_path}/o/stories'),
        [json.loads(line) for line in open(f'{tmp_path}/o/stories/skipped.jsonl')],
    )
    assert [row['path'] for row in rows] == ['000/000000.flac', '000/000002.flac'] and rows[1][
        'seconds'
    ] > 60
    assert len(rows[1]['words']) == 3 + 7 * 40 and [
        (row['n'], row['reason']) for row in skipped
    ] == [(1, 'nothing to say')]
    summary = json.load(open(f'{tmp_path}/o/stories/summary.json'))
    assert summary['items'] == 3 and summary['skipped'] == 1 and summary['full_items'] == 4
    assert summary['bytes'] == sum(
        os.path.getsize(f'{tmp_path}/o/stories/{row["path"]}') for row in rows
    )
    assert summary['hours'] == pytest.approx(sum(row['seconds'] for row in rows) / 3600)
    assert summary['full_hours'] == pytest.approx(summary['hours'] * 4 / 3)
    assert summary['full_machine_hours'] == pytest.approx(
        summary['full_hours'] / summary['x_real_time']
    )
    run(
        f'--text={tmp_path}/t.txt',
        f'--out={tmp_path}/o',
        '--limit=3',
        '--workers=1',
        '--task=prompts',
    )
    prompts = rows_of(f'{tmp_path}/o/prompts')
    assert prompts[1]['seconds'] == 3.0 and prompts[1]['text'].startswith('A cat sat. It sat on')


@pytest.mark.parametrize(
    'args, says',
    [
        (['--text=nowhere.txt'], 'nowhere.txt'),
        (['--task=sing'], 'stories'),
        (['--voices=xx-nobody', '--n_stories=3', '--workers=1'], 'xx-nobody'),
        (['--tts=kokoro', '--n_stories=3'], 'pip install'),
        (['--speed=fast'], '0.9-1.1'),
        (['--text=hub:a/b'], 'pip install datasets'),
        (['--speed=0-0'], 'range'),
        (['--pitch=50-100'], 'range'),
        (['--limit=-1'], '--limit=-1'),
        (['--pause=-1'], '--pause=-1'),
        (['--voises=de'], 'voices'),
        (['--out=README.md', '--n_stories=1', '--workers=1'], 'README.md'),
    ],
)
def test_mistakes_are_one_line(args, says, tmp_path, monkeypatch):
    for package in ('kokoro', 'datasets'):  # not there, whatever this machine has
        (tmp_path / f'{package}.py').write_text('raise ImportError')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    result = run(f'--out={tmp_path}', *args, check=False)
    assert (
        result.returncode == 2 and len(result.stderr.splitlines()) == 1 and says in result.stderr
    ), result.stderr


# --- the networks, small and random but of the true shape


@pytest.mark.parametrize(
    'knobs', [dict(tts_model='tests'), dict(device='abacus'), dict(dtype='float3')]
)
def test_a_network_that_is_not_there_is_one_line(knobs, monkeypatch, capsys):
    for key, value in dict(dict(tts_model='tests', device='cpu'), **knobs).items():
        monkeypatch.setattr(ms, key, value)
    with pytest.raises(SystemExit) as error:
        ms.load_vits()
    printed = capsys.readouterr().err
    assert (
        error.value.code == 2
        and list(knobs.values())[0] in printed
        and len(printed.splitlines()) == 1
    )


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
    monkeypatch.setattr(ms, 'tts_model', str(tmp_path))
    monkeypatch.setattr(ms, 'device', 'cpu')
    speak = ms.load_vits()
    texts = ['the dog is here.', 'a cat.']
    one, two = speak(texts, '1'), speak(texts, '1')
    assert len(one) == 2 and all(
        np.array_equal(a[0], b[0]) and a[1:] == (16000, None) and a[0].ndim == 1 and len(a[0])
        for a, b in zip(one, two)
    )
    assert (
        not np.array_equal(one[0][0][:100], speak(texts, '0')[0][0][:100])
        and len(speak(['!?', 'yes'], '0')[0][0]) == 0
    )


def test_fastspeech2(tmp_path, monkeypatch):
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
    monkeypatch.setattr(ms, 'tts_model', str(tmp_path))
    monkeypatch.setattr(ms, 'device', 'cpu')
    speak = ms.load_fastspeech2()
    text = 'The old dog barks, then it sleeps.'
    ((wave, rate, words),) = speak([text], '0')
    assert (
        rate == 22050 and [word for word, _, _ in words] == text.split() and np.isfinite(wave).all()
    )
    assert (
        words[0][1] == 0
        and all(a < b == c for (_, a, b), (_, c, _) in zip(words, words[1:]))
        and words[-1][2] <= len(wave) / rate
    )
    assert np.array_equal(wave, speak([text], '0')[0][0])
    fast = speak([text], '0', speed=2.0)[0]
    assert 0.3 < len(fast[0]) / len(wave) < 0.7 and fast[2][-1][2] <= len(fast[0]) / rate
    espeak = ms.Espeak()
    espeak.load('en-us')
    assert {phone for word in text.split() for phone in espeak.phones(word)} <= set(phones)
    assert espeak.phones('cat') == ['K', 'AE1', 'T'] and espeak.phones('dog') in (
        ['D', 'AO1', 'G'],
        ['D', 'AA1', 'G'],
    )
    assert espeak.phones('-') == [] and [word for word, _, _ in speak(['Oh - no.'], '0')[0][2]] == [
        'Oh',
        '-',
        'no.',
    ]


def test_kokoro(monkeypatch):
    """The adapter, against what KPipeline of kokoro 0.9.4 gives: parts with .audio and tokens, punctuation a token of its own, noise from torch."""
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
    monkeypatch.setattr(ms, 'device', 'cpu')
    speak, text = ms.load_kokoro(), '"Yes," he said.'
    ((wave, rate, words),) = speak([text], 'af_heart')
    assert rate == 24000 and len(wave) == 24000 and [word for word, _, _ in words] == text.split()
    assert [start for _, start, _ in words] == [0.05, 0.55, 0.65] and all(
        a < b <= c for (_, a, b), (_, c, _) in zip(words, words[1:])
    )
    other = speak(['Another.', text], 'af_heart')
    assert np.array_equal(other[1][0], wave) and not np.array_equal(
        other[0][0], wave
    )  # its noise is a function of the text
    assert (
        speak([text], 'ff_siwis')[0][2] is None
        and [language for language, *_ in made] == ['a', 'f']
        and made[0][2] is made[1][2]
    )


def test_kokoro_itself(tmp_path, monkeypatch):
    """The package, where it is installed, on a random checkpoint of Kokoro-82M's layout. Its tagger's model is not on PyPI: a blank one here."""
    import torch

    kokoro, spacy = pytest.importorskip('kokoro'), pytest.importorskip('spacy')
    signs = ';:,.!?—…"()“” \u0303ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ'
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
    monkeypatch.setattr(ms, 'tts_model', str(tmp_path))
    monkeypatch.setattr(ms, 'device', 'cpu')
    speak, text = ms.load_kokoro(), 'The old dog barks, then it sleeps.'
    for voice in ('af_heart', 'bm_george'):
        ((wave, rate, words),) = speak([text], voice)
        assert (
            rate == 24000
            and len(wave) % 600 == 0
            and len(wave) > 24000
            and np.isfinite(wave).all()
            and [word for word, _, _ in words] == text.split()
        )
        assert (
            all(a < b <= c for (_, a, b), (_, c, _) in zip(words, words[1:]))
            and words[-1][2] <= len(wave) / rate
        )
        assert np.array_equal(wave, speak(['Another.', text], voice)[1][0])
    fast = speak([text], 'bm_george', speed=2.0)[0]
    assert 0.3 < len(fast[0]) / len(wave) < 0.7 and fast[2][-1][2] <= len(fast[0]) / rate
    wave, _, words = speak(['Le chien dort.'], 'ff_siwis')[0]
    assert len(wave) > 12000 and words is None
