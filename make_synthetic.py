"""Text -> speech: stories to pre-train on, preference pairs for DPO, suites of minimal pairs.

    python make_synthetic.py config/demo_synthetic.py                the demo's own toy language
    python make_synthetic.py --text=TinyStoriesV2-GPT4-train.txt --out=data/audio
    python make_synthetic.py --task=pairs --text=swag/train.csv --tts=kokoro --out=data/spokenswag
    python make_synthetic.py --task=blimp --text=blimp/data --out=data
    python make_synthetic.py --task=minimal --text=mine.csv --test_voices=en-us+f4 --out=data

--text is a .txt, .jsonl, .csv or .parquet file, a folder or a glob of such, hub:OWNER/NAME[:SPLIT]
(split train by default), or toy. Text files are UTF-8, or UTF-16 with a byte order mark. A .txt
file holds documents separated by <|endoftext|>; where that mark does not occur, by blank lines or
by --separator. The tasks, and the columns they read:

stories      text (--text_field); <|endoftext|> inside a text separates documents too
pairs        prompt, chosen, rejected; or the columns of SWAG or HellaSwag:
                 prompt,chosen,rejected
                 A dog barks at the gate.,It wants to come in.,It wants to be a gate.
                 "Rain fell, and fell.",The river rose.,The river sang.
minimal      right, wrong and optionally type: your own suite, <n>_correct and <n>_incorrect
blimp        BLiMP's columns -> the layout of ZeroSpeech 2021 (sBLIMP) with gold.csv
storycloze   StoryCloze's columns -> sstorycloze and tstorycloze, <n>_correct and <n>_incorrect

Suites are all tasks but stories and pairs. They are spoken a second time in --test_voices, into
folders such as minimal_unseen. Each task has a folder with audio, manifest.jsonl, skipped.jsonl and
summary.json. A text is spoken sentence by sentence. Each sentence is trimmed, followed by a pause
and padded to whole 40 ms frames, so the audio of a prompt followed by the audio of an ending is
exactly the audio of the whole. A sentence's audio depends on its text and its voice only. The work
is done in parts of 40 items; a killed run makes only the missing parts.
"""

from config import configure, fail

import _ctypes
import codecs
import csv
import ctypes
import glob
import hashlib
import html
import io
import json
import math
import os
import random
import re
import time
import unicodedata
import zlib
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from model import (
    SAMPLE_RATE,
    InputError,
    auto_bleu,
    log,
    pick_device,
    read_json,
    read_jsonl,
    read_parquet,
    reading,
    resample,
    split_documents,
    start_worker,
    tokenize_words,
    write_atomic,
)

# -----------------------------------------------------------------------------
out = 'out/synthetic'  # output folder; each task has a folder in it
task = 'stories'  # comma-separated, see above; of the toy language also grammar, sstory, tstory
text = 'toy'  # toy (below), a file, folder or glob, or hub:OWNER/NAME[:SPLIT]
text_field = 'text'  # the column of .jsonl, .csv, .parquet and hub data that holds a story
separator = ''  # between stories of a .txt file; '': <|endoftext|> if it occurs, else blank lines
limit = 0  # use only the first so many items of a task; 0: all
val_share = 0.03  # share of stories and pairs marked split=val
max_auto_bleu = 0.3  # pairs whose prompt and chosen text reach this bigram auto-BLEU are skipped
n_stories = 6000  # size of the toy language: stories
n_pairs = 2000  # preference pairs
n_suite = 500  # minimal pairs in a suite (even)
n_unseen = 200  # the first so many of these are also spoken in test_voices
# the voice
tts = 'espeak'  # espeak, kokoro, vits, piper
tts_model = ''  # a network's folder, file or hub name; '': the default in BACKENDS
voices = ''  # comma-separated, one is drawn for each item (blimp: all are used); '': see BACKENDS
test_voices = ''  # voices of the suites NAME_unseen; '': no such suites
speed = '1.0-1.0'  # 1 is a voice's usual speed; each voice has its own, drawn from this range
pitch = '50-50'  # espeak: 0 to 99; drawn in the same way
pause = 0.2  # seconds of silence after each sentence
# the machine
workers = 0  # processes that speak; 0: one for each core. A network uses one process
shard = ''  # i/n: make only parts i, i + n, ... (i from 0); the last shard to finish merges them
seed = 1234
device = 'auto'  # of a network: cuda, mps, cpu
# -----------------------------------------------------------------------------

GRID = 640  # samples in a 40 ms frame of a 25 Hz encoder
SILENCE = 0.002  # amplitudes below this share of full scale count as silence
PART = 40  # items in a part
LONGEST = 100_000  # characters of the longest item that is spoken, about two hours
MARK = '<|endoftext|>'

# Columns that a task expects
PAIR = ('prompt', 'chosen', 'rejected')
SWAG = ('sent1', 'sent2', 'gold-source', 'label', 'ending0', 'ending1', 'ending2', 'ending3')
HELLASWAG = ('ctx_a', 'ctx_b', 'endings', 'label')
BLIMP = ('sentence_good', 'sentence_bad', 'linguistics_term', 'UID', 'pairID')
CLOZE = (
    *('InputSentence1', 'InputSentence2', 'InputSentence3', 'InputSentence4'),
    *('RandomFifthSentenceQuiz1', 'RandomFifthSentenceQuiz2', 'AnswerRightEnding'),
)

# ZeroSpeech 2021: the folder of audio and gold.csv, and the columns of gold.csv
GOLD_FOLDER = 'syntactic/dev'
GOLD = ('id', 'filename', 'voice', 'type', 'subtype', 'correct', 'transcription')


# -----------------------------------------------------------------------------
# The toy language: stories of three short sentences. The ending follows from the first two.
#
#     This king is in the kitchen with his cake.   who (number, gender), where, with what: the topic
#     The cake is lovely and warm.                 a good or a bad quality: the outcome
#     He is happy and eats the cake.               the ending
#
# All endings have the same form, so length and frequency do not tell the right one. Edit these
# tables to make another toy language.

HEROES = dict(
    he='boy boys|man men|king kings|brother brothers|uncle uncles|farmer farmers|father fathers|'
    'prince princes',
    she='girl girls|woman women|queen queens|sister sisters|aunt aunts|lady ladies|mother mothers|'
    'nurse nurses',
)
NAMES = dict(
    he='Tom Ben Max Jack Peter David Simon Oscar',
    she='Anna Lucy Mary Emma Kate Susan Laura Nina',
)
HIS = dict(he='his', she='her', they='their')
ADJECTIVES = (
    'old young small tall little big kind clever funny brave quiet busy shy proud polite famous '
    'lazy hungry sleepy noisy gentle rich poor strong careful friendly curious thin quick slow '
    'calm tired lucky wise bold honest cheerful lonely elegant'
)
COLOURS = (
    'red blue green yellow white black brown purple orange silver golden grey pink heavy tiny huge'
)
NUMBERS = 'two three four five six seven eight nine'
TIMES = (
    'today|tonight|again|on monday|on friday|on sunday|this morning|after lunch|before dinner|'
    'in winter|in summer|every spring'
)
MOODS = ('happy', 'glad'), ('sad', 'angry')  # of a good outcome, of a bad one
QUALITIES = ('new', 'clean', 'lovely', 'perfect'), ('broken', 'dirty', 'ruined', 'horrible')

# A topic: places; things (one and many); qualities and actions of a good outcome; of a bad one
TOPICS = """
kitchen:  in the kitchen|at the oven|in the bakery; cake cakes|soup soups|pie pies;
          warm|sweet; eat|taste; burnt|sour; throw away|spill
garden:   in the garden|by the fence|under the tree; flower flowers|rose roses|carrot carrots;
          fresh|juicy; water|pick; dead|dry; dig out|bury
school:   at school|in the classroom|beside the teacher; book books|pencil pencils|lesson lessons;
          easy|useful; study|learn; boring|difficult; forget|hate
football: on the field|in the stadium|at the game; ball balls|goal goals|trophy trophies;
          round|winning; kick|celebrate; flat|missing; lose|miss
sea:      on the boat|at the beach|by the river; fish fish|net nets|shell shells;
          shiny|full; catch|pull up; empty|rotten; let go|drop
train:    at the station|on the platform|in the train; ticket tickets|suitcase suitcases|map maps;
          cheap|valid; show|carry; expensive|stolen; search for|report
doctor:   in the hospital|beside the doctor|at the clinic; pill pills|bandage bandages|
          medicine medicines; helpful|mild; take|use; bitter|painful; refuse|fear
music:    on the stage|at the concert|in the choir; song songs|drum drums|violin violins;
          loud|famous; play|practise; silent|false; stop|ignore
"""
COLUMNS = ('places', 'things', 'good', 'good_actions', 'bad', 'bad_actions')
TOPICS = {
    name: {
        column: [word.strip() for word in cell.split('|')]
        for column, cell in zip(COLUMNS, row.split(';'), strict=True)
    }
    for name, row in re.findall(r'^(\w+):((?:.|\n(?= ))+)', TOPICS, re.M)
}

# First sentences
SINGLE = (
    'this {one} is {place} with {his} {thing}',
    'one {one} is {place} with {his} {thing}',
    'there is one {one} {place} with {his} {thing}',
    'this {one} has {his} {thing} {place}',
    '{name} is {place} with {his} {thing}',
    'the {adjective} {one} is {place} with {his} {colour} {thing}',
    'this {one} is {place} with one {thing} {time}',
)
SEVERAL = (
    'these {many} are {place} with their {thing}',
    '{number} {many} are {place} with their {thing}',
    'there are {number} {many} {place} with their {thing}',
    'these {many} have their {thing} {place}',
    '{name} and {other} are {place} with their {thing}',
    'the {adjective} {many} are {place} with their {colour} {thing}',
    'these {many} are {place} with one {thing} {time}',
)

# Minimal pairs [right|wrong]. In the second line of a kind the wrong word of the first is right
MINIMAL = """
this:   [this|these] {one} is {place} with {his} {thing}
        [these|this] {many} are {place} with their {thing}
be:     this {one} [is|are] {place} with {his} {thing}
        these {many} [are|is] {place} with their {thing}
number: one {one} [is|are] {place} with {his} {thing}
        {number} {many} [are|is] {place} with their {thing}
noun:   one [{one}|{many}] is {place} with {his} {thing}
        {number} [{many}|{one}] are {place} with their {thing}
exist:  there [is|are] one {one} {place} with {his} {thing}
        there [are|is] {number} {many} {place} with their {thing}
have:   this {one} [has|have] {his} {thing} {place}
        these {many} [have|has] their {thing} {place}
gender: this {man} has [his|her] {thing} {place}
        this {woman} has [her|his] {thing} {place}
"""
MINIMAL = {kind: frames for kind, *frames in re.findall(r'(\w+): +(.+)\n +(.+)', MINIMAL)}


def toy_sentence(words):
    return words[0].upper() + words[1:] + '.'


def toy_words(rng, topic, he):
    """Random words for the slots of first sentences and minimal pairs, {slot: word}."""
    one, many = rng.choice(HEROES[he].split('|')).split()
    thing = rng.choice(TOPICS[topic]['things']).split()[0]
    name, other = rng.sample(NAMES[he].split(), 2)
    words = dict(one=one, many=many, thing=thing, name=name, other=other, his=HIS[he])
    words['place'] = rng.choice(TOPICS[topic]['places'])
    words['adjective'] = rng.choice(ADJECTIVES.split())
    words['time'] = rng.choice(TIMES.split('|'))
    words['colour'] = rng.choice(COLOURS.split())
    words['number'] = rng.choice(NUMBERS.split())
    words['man'], words['woman'] = (rng.choice(HEROES[who].split('|')).split()[0] for who in HEROES)
    return words


def toy_story(rng, topic, outcome, who, mood):
    """A story as dict: prompt (two sentences), the ending that follows, topic.

    outcome: 0 good, 1 bad; who: he, she or they; mood: which of the two moods of the outcome.
    """
    words = toy_words(rng, topic, who if who != 'they' else rng.choice(('he', 'she')))
    first = rng.choice(SEVERAL if who == 'they' else SINGLE).format(**words)
    column = ('good', 'bad')[outcome]
    verb, space, particle = rng.choice(TOPICS[topic][f'{column}_actions']).partition(' ')
    if who != 'they':
        verb += 'es' if re.search('(s|sh|ch)$', verb) else 's'
        verb = re.sub('([^aeiou])ys$', r'\1ies', verb)
    quality = f'{rng.choice(QUALITIES[outcome])} and {rng.choice(TOPICS[topic][column])}'
    second = f'the {words["thing"]} is {quality}'
    feels = f'{who} {"are" if who == "they" else "is"} {MOODS[outcome][mood]}'
    ending = toy_sentence(f'{feels} and {verb}{space}{particle} the {words["thing"]}')
    return dict(prompt=f'{toy_sentence(first)} {toy_sentence(second)}', ending=ending, topic=topic)


def toy_couple(rng, contradict, fresh):
    """Two stories with exchanged wrong endings: an ending is right as often as it is wrong.

    contradict: the two are about the same thing with opposite outcomes; else about two topics.
    """
    who = rng.choice(('he', 'she', 'they'))
    mood, outcome = rng.randrange(2), rng.randrange(2)
    topics = rng.sample(list(TOPICS), 2)
    if not contradict:
        one, two = (fresh(topic, outcome, who, mood) for topic in topics)
    else:
        one, two = fresh(topics[0], 0, who, mood), fresh(topics[0], 1, who, mood)
        while one['ending'].split()[-1] != two['ending'].split()[-1]:
            two = fresh(topics[0], 1, who, mood)
    return dict(one, wrong=two['ending']), dict(two, wrong=one['ending'])


def toy_minimal(rng, kind, fresh, anything):
    """Two minimal pairs [(right, wrong), (right, wrong)] of a kind of MINIMAL, or of `pronoun`:
    is and are exchanged in the ending of a story."""
    if kind == 'pronoun':
        topic, outcome, _, mood = anything()
        frames = []
        for who in (rng.choice(('he', 'she')), 'they'):
            story = fresh(topic, outcome, who, mood)
            ending = story['ending'].replace(' are ', ' [are|is] ').replace(' is ', ' [is|are] ')
            frames.append(f'{story["prompt"]} {ending.strip(".")}')
        words = {}
    else:
        frames = MINIMAL[kind]
        words = toy_words(rng, rng.choice(list(TOPICS)), rng.choice(('he', 'she')))
    return [
        tuple(
            toy_sentence(re.sub(r'\[(.*?)\|(.*?)\]', side, frame).format(**words))
            for side in (r'\1', r'\2')
        )
        for frame in frames
    ]


def toy_rows(task, seed, n_stories, n_pairs, n_suite):
    """Yield the rows of a task: stories (text), pairs (prompt, chosen, rejected), and the suites
    grammar, sstory, tstory (right, wrong, type, alike: pairs with the same number share a voice).

    All tasks are drawn in one order, and no sentence of grammar and no prompt is drawn twice: the
    training data and the suites have no story, pair or prompt in common.
    """
    rng, used = random.Random(f'{seed}/toy'), set()

    def fresh(*what):
        while True:
            story = toy_story(rng, *what)
            if not used & {story['prompt'], story['prompt'].partition('.')[0] + '.'}:
                used.add(story['prompt'])
                return story

    def anything():
        topic, outcome = rng.choice(list(TOPICS)), rng.randrange(2)
        return topic, outcome, rng.choice(('he', 'she', 'they')), rng.randrange(2)

    n = 0
    while n < n_suite:
        kind = rng.choice([*MINIMAL, 'pronoun'])
        couple = toy_minimal(rng, kind, fresh, anything)
        rights = {right for right, _ in couple}
        if not used & rights:
            used |= rights
            if task == 'grammar':
                for right, wrong in couple:
                    yield dict(right=right, wrong=wrong, type=kind, alike=n // 2)
            n += 2
    for suite in ('sstory', 'tstory'):
        for i in range(n_suite // 2):
            for story in toy_couple(rng, suite == 'sstory', fresh):
                if task == suite:
                    right, wrong = (
                        f'{story["prompt"]} {story[key]}' for key in ('ending', 'wrong')
                    )
                    yield dict(right=right, wrong=wrong, type=story['topic'], alike=i)
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(prompt=story['prompt'], chosen=story['ending'], rejected=story['wrong'])
    for _ in range(n_stories if task == 'stories' else 0):
        story = fresh(*anything())
        yield dict(text=f'{story["prompt"]} {story["ending"]}')


# -----------------------------------------------------------------------------
# Text: rows of files


def text_files():
    """The files that the knob `text` names; [] for toy and hub."""
    if text == 'toy' or text.startswith('hub:'):
        return []
    pattern = text
    if os.path.exists(text):
        pattern = glob.escape(text) + '/**' * os.path.isdir(text)
    found = sorted(glob.glob(pattern, recursive=True))
    return [path for path in found if path.endswith(('.txt', '.jsonl', '.csv', '.parquet'))]


def read_lines(path):
    """Yield the lines of a text file in UTF-8, or in UTF-16 if it begins with a byte order mark.

    Raises InputError naming the line and the byte of anything else, and of NUL characters, which
    UTF-16 without a mark is full of.
    """
    with open(path, 'rb') as file:
        lines, utf16 = file, file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        number = 1
        try:
            if utf16:
                lines = io.StringIO(file.read().decode('utf-16'), newline='')
            for number, line in enumerate(lines, 1):
                if not utf16:
                    line = line.decode('utf-8-sig' if number == 1 else 'utf-8')
                if '\0' in line:
                    raise InputError(f'{path}, line {number}: byte 0x00: save it as UTF-8')
                yield line
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            where = f'{path}, line {number}: byte 0x{byte:02x} at {error.start}'
            raise InputError(f'{where} is not {error.encoding}: save it as UTF-8') from None


def split_stories(lines, between):
    """Yield the stories in an iterator of lines, separated by a string or, if '', by blank lines;
    a few thousand lines at a time."""
    pattern, rest = re.escape(between) if between else r'\n\s*\n', ''
    while block := ''.join(islice(lines, 10_000)):
        *whole, rest = re.split(pattern, rest + block)
        yield from filter(str.strip, whole)
    if rest.strip():
        yield rest


def read_file(path):
    """Yield the rows of a text file as dicts; a story of a .txt file is a row of text_field."""
    if path.endswith('.parquet'):
        yield from read_parquet(path)
    elif path.endswith('.jsonl'):
        for number, line in enumerate(read_lines(path), 1):
            with reading(f'{path}, line {number}'):
                row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {number}: expected a JSON object {{...}}')
            if line.strip():
                yield row
    elif path.endswith('.csv'):
        csv.field_size_limit(1 << 30)
        with reading(path):
            for number, row in enumerate(csv.DictReader(read_lines(path)), 1):
                if None in row:
                    raise InputError(f'{path} row {number}: more cells than columns')
                yield row
    else:
        between = separator.replace('\\n', '\n').replace('\\t', '\t')
        if not between and any(MARK in line for line in read_lines(path)):
            between = MARK
        yield from ({text_field: story} for story in split_stories(read_lines(path), between))


def read_rows(kind, *expected):
    """Yield the rows of the knob `text`, dicts of strings ('' for null). HellaSwag's endings stay
    a list.

    expected: sets of columns, one of which each row must have. Raises InputError naming the row.
    """
    if text == 'toy':
        yield from toy_rows(kind, seed, n_stories, n_pairs, n_suite)
        return
    if text.startswith('hub:'):
        sources = {text: read_parquet(text if text.count(':') > 1 else text + ':train')}
    else:
        sources = {path: read_file(path) for path in text_files()}
    if not sources:
        kinds = 'a .txt, .jsonl, .csv or .parquet file, a folder or glob of such, hub:NAME, toy'
        raise InputError(f'{text}: no text there; expected {kinds}')
    for name, rows in sources.items():
        for number, row in enumerate(rows, 1):
            row = {
                key: ''
                if value is None
                else str(value)
                if isinstance(value, int | float)
                else value
                for key, value in row.items()
            }
            usable = {
                key for key, value in row.items() if isinstance(value, str) or key == 'endings'
            }
            if not any(usable.issuperset(columns) for columns in expected):
                wanted = '; or '.join(map(', '.join, expected))
                there = ', '.join(f'{key} ({type(value).__name__})' for key, value in row.items())
                raise InputError(
                    f'{name} row {number}: task {kind} expects {wanted}; there are {there}'
                )
            yield row


# -----------------------------------------------------------------------------
# Items: what a task speaks. An item is dict(texts={role: text}) with one audio file for each role.
# Other keys: voice; alike (items with the same number share a voice); split (into train and val);
# skip (the reason to skip it); all others go to the manifest. Each function yields a task's items


def story_items(task):
    """The documents of each row; the role of the only file is ''."""
    for row in read_rows(task.kind, (text_field,)):
        for document in split_documents(row[text_field]) or ['']:
            yield dict(texts={'': document}, split=True)


def minimal_items(task):
    """The pairs of a user's table and those of the toy language."""
    for row in read_rows(task.kind, ('right', 'wrong')):
        kept = {key: row[key] for key in ('type', 'alike') if row.get(key, '') != ''}
        yield dict(texts=dict(correct=row['right'], incorrect=row['wrong']), **kept)


def swag_pair(row, draw):
    """(pair, reason to skip it or '') of a row of SWAG (section 4 of the paper) or HellaSwag: the
    right ending, and a wrong one drawn by the seed `draw`."""
    hella = 'ctx_a' in row
    prompt, start = (row['ctx_a'], row['ctx_b']) if hella else (row['sent1'], row['sent2'])
    endings = row['endings'] if hella else [row[f'ending{i}'] for i in range(4)]
    labels = [str(i) for i in range(len(endings))]
    if row['label'] not in labels or not hella and row['gold-source'] != 'gold':
        return dict(prompt=prompt), 'no gold label'
    wrong = random.Random(draw).choice([label for label in labels if label != row['label']])
    pair = dict(prompt=prompt)
    for role, label in (('chosen', row['label']), ('rejected', wrong)):
        pair[role] = f'{start} {endings[int(label)]}'.strip()
    odd = hella and re.search(r'[][()/{}]|www\.', ' '.join(pair.values()))
    return pair, 'brackets, slashes or links' if odd else ''


def pair_items(task):
    """Preference pairs; those whose text repeats itself are skipped."""
    for number, row in enumerate(read_rows(task.kind, PAIR, SWAG, HELLASWAG)):
        pair, skip = row, ''
        if 'prompt' not in row:
            pair, skip = swag_pair(row, f'{seed}/{task.kind}/{number}')
        item = dict(texts={role: pair[role] for role in PAIR if role in pair}, split=True)
        if not skip:
            share = auto_bleu(tokenize_words(f'{pair["prompt"]} {pair["chosen"]}'))
            skip = f'auto-BLEU of {max_auto_bleu} or more' if share >= max_auto_bleu else ''
        yield item | (dict(skip=skip) if skip else {})


def blimp_items(task):
    """Each pair of BLiMP in each voice."""
    for row in read_rows(task.kind, BLIMP):
        about = dict(type=row['linguistics_term'], subtype=row['UID'], id=row['pairID'])
        texts = dict(correct=row['sentence_good'], incorrect=row['sentence_bad'])
        for voice in task.voices:
            yield dict(texts=texts, voice=voice, **about)


def cloze_items(task):
    """Stories with the right ending, and the wrong one or (tstorycloze) that of another story."""
    rows = list(read_rows(task.kind, CLOZE))
    for number, row in enumerate(rows, 1):
        if row['AnswerRightEnding'] not in ('1', '2'):
            found = f'AnswerRightEnding is {row["AnswerRightEnding"]!r}'
            hint = 'expected 1 or 2 (the test set without answers makes no pairs)'
            raise InputError(f'{text} row {number}: {found}, {hint}')
    endings = [row['RandomFifthSentenceQuiz' + row['AnswerRightEnding']] for row in rows]
    for number, (row, right) in enumerate(zip(rows, endings, strict=True)):
        other = {'1': '2', '2': '1'}[row['AnswerRightEnding']]
        wrong = row['RandomFifthSentenceQuiz' + other]
        if task.kind == 'tstorycloze':
            drawn = random.Random(f'{seed}/{task.kind}/{number}').choices(endings, k=20)
            others = [ending for ending in drawn if ending not in (right, wrong)]
            if not others:
                raise InputError(f'{text}: too few stories to draw endings from')
            wrong = others[0]
        prompt = ' '.join(row[key] for key in CLOZE[:4])
        yield dict(texts=dict(correct=f'{prompt} {right}', incorrect=f'{prompt} {wrong}'))


# Tasks: a new one is a function as above and an entry here
MAKERS = dict(
    stories=story_items,
    pairs=pair_items,
    minimal=minimal_items,
    **dict.fromkeys(('grammar', 'sstory', 'tstory'), minimal_items),
    blimp=blimp_items,
    **dict.fromkeys(('sstorycloze', 'tstorycloze'), cloze_items),
)


class Task(NamedTuple):
    kind: str  # a key of MAKERS
    name: str  # its folder in `out`, such as grammar_unseen
    voices: list

    def items(self):
        """Yield the items, at most `limit`."""
        most = [limit] if limit else []
        if text == 'toy' and self.name.endswith('_unseen'):
            most.append(n_unseen)
        return islice(MAKERS[self.kind](self), min(most, default=None))


def find_tasks():
    """The tasks that the knob `task` names; suites also in unseen voices, after the seen ones."""
    speakers = {'': (voices or BACKENDS[tts].voices).split(',')}  # {suffix of the folder: voices}
    if test_voices:
        speakers['_unseen'] = test_voices.split(',')
    tasks = []
    both = 'sstorycloze,tstorycloze'
    for name in ','.join(both if name == 'storycloze' else name for name in task.split(',')).split(
        ','
    ):
        if name not in MAKERS:
            raise InputError(f'no task {name!r}; there are {", ".join(MAKERS)}, storycloze')
        for suffix, spoken_by in speakers.items():
            if not suffix or name not in ('stories', 'pairs'):
                tasks.append(Task(name, name + suffix, spoken_by))
    return tasks


# -----------------------------------------------------------------------------
# Text as a voice can say it

# NFKC would turn 3½ into 31⁄2 and 10² into 102
KEPT = re.compile('([¹²³ªº⁰-⁻¼-¾⅐-⅞™№]+)')
PUNCTUATION = '.,!?;:\'"()-/。！？،؟।'
SIGNS = '%&@#+=<>−±×÷≤≥≠≈°§$€£¥₹¢'  # they carry meaning, so they are spoken


class Plain(dict):
    """A table for str.translate: letters, digits and the signs above stay, typographic quotes and
    dashes become plain ones, invisible characters go, all else is a space."""

    def __missing__(self, code):
        sign = chr(code)
        kind = unicodedata.category(sign)
        if kind[0] in 'LNM' or sign in PUNCTUATION + SIGNS + '™№':
            self[code] = sign
        else:
            self[code] = '' if kind == 'Cf' else ' '
        return self[code]


PLAIN = Plain(str.maketrans({'‘': "'", '’': "'", '“': '"', '”': '"', '—': ', ', '–': ', '}))
TAG = re.compile(
    r'<!--.*?-->|</?[a-zA-Z][\w:-]*(\s+[\w:-]+\s*=\s*("[^"]*"|\'[^\']*\'|[^\s<>]+))*\s*/?>'
)
LINK = re.compile(r'https?://\S+|www\.\S+')
# <, > and = without a word on both sides are quotation marks, arrows or lines; # without a digit is
# a heading
STRAY = re.compile(r'(?<!\w)(?<!\w )[<>=]|[<>=](?! ?[\w−-])|#(?!\d)')

# English words for signs. In other languages the signs stay, since espeak knows their names
WORDS = {
    **{'−': 'minus', '±': 'plus or minus', '×': 'times', '÷': 'divided by', '+': 'plus'},
    **{'=': 'equals', '<': 'less than', '>': 'greater than', '≠': 'not equal to', '≈': 'about'},
    **{'≤': 'less than or equal to', '≥': 'greater than or equal to', '%': 'percent', '&': 'and'},
    **{'°C': 'degrees Celsius', '°F': 'degrees Fahrenheit', '°': 'degrees', '@': 'at'},
    **{'№': 'number', '#': 'number', '§': 'section', '™': ''},
    **{'$': 'dollars', '€': 'euros', '£': 'pounds', '¥': 'yen', '₹': 'rupees', '¢': 'cents'},
}
MONEY = re.compile(r'([$€£¥₹]) ?(\d[\d,]*(?:\.\d+)?)( (?:hundred|thousand|million|billion)\b)?')
NUMERATORS = {'1': 'one', '2': 'two', '3': 'three', '4': 'four', '5': 'five', '7': 'seven'}
DENOMINATORS = dict(
    zip('2345678', 'half third quarter fifth sixth seventh eighth'.split(), strict=True),
    **{'9': 'ninth', '10': 'tenth'},
)
POWER = re.compile('(?:(?<=[0-9)])|(?<=\\b\\w)|(?<=\\b\\w\\w))([⁺⁻]?[¹²³⁰-⁹]+)')

# A stop without a space after it: What?Yes. The end.Next
TIGHT = re.compile(r'(?<=[^\W\d_]{2})([.!?]["\')]?)(?=[^\W\d_](?:[^\W\d_]| ))')
# A sentence ends at one of .!? and a closing sign, but not after an abbreviation
SHORT = ''.join(rf'(?<!\b{name}\.)' for name in ('Mr', 'Mrs', 'Ms', 'Dr', 'St', '[A-Z]'))
ENDS = re.compile(rf"""(?:(?<=[.!?।؟])|(?<=[.!?।؟]["')])){SHORT}\s+|(?<=[。！？])""")


def say_fraction(match):
    """'3½' -> '3 and one half', '⅔' -> 'two thirds'."""
    top, bottom = unicodedata.normalize('NFKC', match[2]).split('⁄')
    if top not in NUMERATORS or bottom not in DENOMINATORS:
        return f'{match[1]} {top}/{bottom}'
    start = f'{match[1]} and ' if match[1] else ''
    return f'{start}{NUMERATORS[top]} {DENOMINATORS[bottom]}{"s" * (top != "1")}'


def say_money(match):
    """'$5 million' -> '5 million dollars'."""
    word = WORDS[match[1]]
    return f'{match[2]}{match[3] or ""} {word.rstrip("s") if match[2] == "1" else word}'


def say_power(match):
    """'²' -> ' squared', '⁻³' -> ' to the power of −3'."""
    known = {'²': ' squared', '³': ' cubed'}
    return known.get(match[0], ' to the power of ' + unicodedata.normalize('NFKC', match[0]))


def say_signs(document):
    """An English text with words for the signs in it."""
    document = re.sub(r'(\d?)\s?([¼-¾⅐-⅞])', say_fraction, document)
    document = MONEY.sub(say_money, POWER.sub(say_power, document))
    document = re.sub(r'(?<=\d) ?– ?(?=\d)', ' to ', document)
    for sign, word in WORDS.items():
        document = document.replace(sign, f' {word} ')
    return document


def clean(document, english=True):
    """Only what a voice can say, with single spaces: without markup, links, control characters.

    english: signs become English words; else they stay, since espeak knows many in each language.
    """
    # quotation marks decoded wrongly, as in TinyStories
    document = re.sub('â€[˜™]', "'", document)
    document = re.sub('â€[œ\x9d]?', '"', document)
    # markup, and entities such as &amp;
    document = LINK.sub(' ', TAG.sub(' ', document))
    document = re.sub(r'&#?\w+;', lambda match: html.unescape(match[0]), document)
    # compatible characters become plain ones, except the signs that carry meaning
    parts = KEPT.split(document)
    parts[::2] = (unicodedata.normalize('NFKC', part) for part in parts[::2])
    document = STRAY.sub(' ', ''.join(parts))
    document = (say_signs(document) if english else document).translate(PLAIN)
    # an ellipsis ends a sentence; no space before a stop, one after it, and one stop of several
    document = re.sub(r'\.(\s*\.)+', '. ', document)
    document = re.sub(r'\s+([.,!?;:])', r'\1', document)
    document = re.sub(r'([.,!?;:])[.,!?;:]+', r'\1', document)
    document = TIGHT.sub(lambda m: add_space(m, document), document)
    return ' '.join(document.split())


def add_space(match, document):
    """A stop and a space, unless it may be part of a name: example.com."""
    following = document[match.end()]
    return match[0] + ' ' * (following.isupper() or match[0][0] != '.')


def sentences(document, english=True, longest=300):
    """A text, cleaned, as sentences of at most `longest` characters; [] if it has no word.

    Longer ones are cut at a comma or space.
    """
    pieces = []
    for sentence in ENDS.split(clean(document, english)):
        at = 0
        while len(sentence) - at > longest:
            end = at + longest
            cut = sentence.rfind(', ', at, end) + 1 or sentence.rfind(' ', at, end) + 1 or end
            pieces.append(sentence[at:cut].strip())
            at = cut
        pieces.append(sentence[at:].strip())
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


# -----------------------------------------------------------------------------
# Voices: __init__ loads; english(voice) is True for voices of English; speak(sentence, voice, speed,
# pitch) returns a Speech and raises InputError if there is no such voice. A new one is such a class
# and an entry in BACKENDS


class Speech(NamedTuple):
    wave: np.ndarray  # (samples,) float32
    rate: int  # Hz
    times: dict  # words and phones, [[word, start s, end s], ...], where they are known


def word_times(sentence, wave, rate, marks):
    """[[word, start s, end s], ...] from marks, [(character, sample), ...], where words begin.

    Words without a mark share the time since the last mark by their lengths. A word ends with its
    sound, before the pause of a comma.
    """
    spans = [(match[0], *match.span()) for match in re.finditer(r'\S+', sentence)]
    starts = []
    for _, begin, end in spans:
        starts.append(next((sample for at, sample in marks if begin <= at < end), None))
    starts[0] = starts[0] or 0
    starts.append(len(wave))
    for i in range(1, len(spans)):
        if starts[i] is None or starts[i] < starts[i - 1]:
            later = range(i + 1, len(starts))
            j = next(j for j in later if starts[j] is not None and starts[j] >= starts[i - 1])
            share = len(spans[i - 1][0]) / sum(len(word) for word, _, _ in spans[i - 1 : j])
            starts[i] = starts[i - 1] + round(share * (starts[j] - starts[i - 1]))

    loud, words = np.abs(wave) > SILENCE, []
    for (word, _, _), begin, end in zip(spans, starts[:-1], starts[1:], strict=True):
        sounding = np.flatnonzero(loud[begin:end])
        sound_end = begin + sounding[-1] + 1 if len(sounding) else end
        words.append([word, begin / rate, float(sound_end / rate)])
    return words


class Event(ctypes.Structure):  # espeak_EVENT of espeak-ng/speak_lib.h
    _fields_ = [
        *((name, ctypes.c_int) for name in ('type', 'identifier', 'text_position', 'length')),
        *((name, ctypes.c_int) for name in ('audio_position', 'sample')),
        ('user_data', ctypes.c_void_p),
        ('id', ctypes.c_char * 8),
    ]


WORD, PHONEME = 1, 7  # types of events; 0 ends their list
RECEIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))


class Espeak:
    """espeak-ng in this process; the package espeakng-loader brings the library and its data."""

    def __init__(self):
        import espeakng_loader

        self.path, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        # {language: file}, since en-gb and fr-fr are not names of files; the lowest number wins
        ranked = []
        lang = os.path.join(self.data, 'lang')
        for path in filter(os.path.isfile, glob.glob(f'{glob.escape(lang)}/**', recursive=True)):
            with open(path, encoding='utf-8') as file:
                named = [line.split()[1:] for line in file if line.startswith('language')]
            ranked += [(-int([*rest, 5][0]), path, name) for name, *rest in named]
        self.files = {name: os.path.relpath(path, lang) for _, path, name in sorted(ranked)}

    def english(self, voice):
        return bool(re.match(r'(gmw/)?en\b', voice))

    @contextmanager
    def load(self, voice):
        """The library set to a voice, and its rate in Hz. It is loaded anew for each sentence: its
        random numbers continue from the sentence before, even through espeak_Terminate."""
        library = ctypes.CDLL(self.path)
        try:
            # 2: synchronous, buffers of 10 s; phoneme events (1) in IPA (2); never exit() (0x8000)
            rate = library.espeak_Initialize(2, 10000, self.data.encode(), 0x8000 | 2 | 1)
            language, plus, variant = voice.partition('+')
            names = voice, self.files.get(language, language) + plus + variant
            there = os.path.exists(os.path.join(self.data, 'voices', '!v', variant))
            set_voice = library.espeak_ng_SetVoiceByName
            if rate <= 0 or not there or all(set_voice(name.encode()) for name in names):
                hint = 'name a language (en-us, de, fr-fr), optionally with a variant (en-us+f2)'
                raise InputError(f'espeak-ng has no voice {voice!r}: {hint}')
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock
            library.espeak_SetPunctuationList(ctypes.c_wchar_p('<>'))  # see parameter 5 below
            yield library, rate
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)

    def speak(self, sentence, voice, speed, pitch):
        chunks, events = [], []

        @RECEIVE
        def receive(samples, length, event):
            if samples and length > 0:
                chunks.append(ctypes.string_at(samples, 2 * length))
            for i in count():
                now = event[i]
                if not now.type:
                    return 0
                events.append((now.type, now.text_position - 1, now.sample, now.id))

        encoded = sentence.encode() + b'\0'
        with self.load(voice) as (library, rate):
            library.espeak_SetSynthCallback(receive)
            # words per minute; volume (at 100 some voices clip); pitch; names of < and >
            for parameter, value in ((1, 175 * speed), (2, 60), (3, pitch), (5, 2)):
                library.espeak_SetParameter(parameter, round(value), 0)
            # flags 1: UTF-8, and neither SSML (0x10) nor [[phonemes]] (0x100)
            library.espeak_Synth(encoded, len(encoded), 0, 1, 0, 1, None, None)
        wave = np.frombuffer(b''.join(chunks), np.int16).astype(np.float32) / 32768

        marks = [(at, sample) for kind, at, sample, _ in events if kind == WORD]
        sounds = [(name, sample) for kind, _, sample, name in events if kind == PHONEME]
        ends = [sample for _, sample in sounds[1:]] + [len(wave)]
        phones = []
        for (name, start), end in zip(sounds, ends, strict=True):
            name = name.decode(errors='ignore').strip('ˈˌ')
            if name:  # an empty one is a pause
                phones.append([name, start / rate, end / rate])
        words = word_times(sentence, wave, rate, marks)
        return Speech(wave, rate, dict(words=words, phones=phones))


def fix_noise(voice, sentence):
    """Make a network's noise a function of the seed, the voice and the sentence."""
    torch.manual_seed(zlib.crc32(f'{seed}/{voice} {sentence}'.encode()))


@contextmanager
def loading(package, name):
    """A missing package or network becomes one line."""
    try:
        yield
    except ImportError:
        fail(f'--tts={tts} needs a package: pip install {package}')
    except Exception as error:  # of many kinds: no such name, file or device, no network
        reason = str(error).strip('* \n').partition('\n')[0]
        fail(f'--tts_model={name} --device={device}: {reason}')


class Kokoro:
    """The package kokoro and its network of 82 M parameters; 24 kHz; word times for English.

    --tts_model: a hub name, or a folder of its layout (config.json, *.pth, voices/*.pt).
    """

    def __init__(self):
        name = tts_model or BACKENDS['kokoro'].model
        self.folder = f'{name}/voices' if os.path.isdir(name) else ''
        files = {}
        if self.folder:
            weights = sorted(glob.glob(f'{glob.escape(name)}/*.pth')) or [f'{name}/*.pth']
            files = dict(config=f'{name}/config.json', model=weights[-1])
        with loading('"kokoro>=0.9"', name):
            from kokoro import KModel, KPipeline

            model = KModel(name, **files).to(pick_device(device)).eval()
        # one network for all languages; a pipeline for each: af_heart, a, American English
        self.pipeline = cache(lambda language: KPipeline(language, name, model=model))

    def english(self, voice):
        return voice[0] in 'ab'

    def speak(self, sentence, voice, speed, pitch):
        waves, marks, at, end = [np.zeros(0, np.float32)], [], 0, 0
        fix_noise(voice, sentence)
        file = f'{self.folder}/{voice}.pt' if self.folder else voice
        for part in self.pipeline(voice[0])(sentence, voice=file, speed=speed):
            for token in part.tokens or ():  # punctuation marks are tokens too
                found = sentence.find(token.text, at)
                if found >= 0 and token.start_ts is not None:
                    marks.append((found, end + round(24000 * token.start_ts)))
                    at = found + len(token.text)
            waves.append(part.audio.cpu().numpy())
            end += len(waves[-1])
        wave = np.concatenate(waves)
        times = dict(words=word_times(sentence, wave, 24000, marks)) if marks else {}
        return Speech(wave, 24000, times)


class Vits:
    """VITS of transformers (facebook/mms-tts-*); no times. A voice is the number of a speaker."""

    def __init__(self):
        self.name = tts_model or BACKENDS['vits'].model
        with loading('transformers', self.name):
            from transformers import VitsModel, VitsTokenizer

            self.device = pick_device(device)
            self.model = VitsModel.from_pretrained(self.name).to(self.device).eval()
            self.tokenizer = VitsTokenizer.from_pretrained(self.name)

    def english(self, voice):
        return self.name.rstrip('/').endswith('eng')

    @torch.inference_mode()
    def speak(self, sentence, voice, speed, pitch):
        config = self.model.config
        if voice not in map(str, range(config.num_speakers or 1)):
            raise InputError(f'the voices of {self.name} are 0 to {(config.num_speakers or 1) - 1}')
        self.model.speaking_rate = config.speaking_rate * speed
        inputs = self.tokenizer(sentence, return_tensors='pt').to(self.device)
        if not inputs['attention_mask'].any():  # no letter of its alphabet
            return Speech(np.zeros(0, np.float32), config.sampling_rate, {})
        fix_noise(voice, sentence)
        speaker = int(voice) if (config.num_speakers or 1) > 1 else None
        made = self.model(**inputs, speaker_id=speaker)
        return Speech(made.waveform[0].cpu().numpy(), config.sampling_rate, {})


class Piper:
    """The package piper-tts and a voice in ONNX beside its .onnx.json. A voice is the number of a
    speaker. Noise is off, so that a sentence always sounds the same."""

    def __init__(self):
        with loading('piper-tts onnx', tts_model):
            from piper import PiperVoice, SynthesisConfig

            cuda = pick_device(device).type == 'cuda'
            self.model = PiperVoice.load(tts_model, use_cuda=cuda, include_alignments=True)
            self.options = SynthesisConfig

    def english(self, voice):
        return self.model.config.espeak_voice.startswith('en')

    def speak(self, sentence, voice, speed, pitch):
        config = self.model.config
        if voice not in map(str, range(config.num_speakers)):
            raise InputError(f'the voices of {tts_model} are 0 to {config.num_speakers - 1}')
        options = self.options(
            speaker_id=int(voice) if config.num_speakers > 1 else None,
            length_scale=config.length_scale / speed,
            noise_scale=0.0,
            noise_w_scale=0.0,
        )
        waves, starts, end = [np.zeros(0, np.float32)], [], 0
        for chunk in self.model.synthesize(sentence, options, include_alignments=True):
            at = end
            for i, phone in enumerate(chunk.phoneme_alignments or ()):  # '^', phones, '$'
                if i == 1 or phone.phoneme == ' ':  # a word begins at, or after, this one
                    starts.append(at + phone.num_samples * (i > 1))
                at += phone.num_samples
            waves.append(chunk.audio_float_array)
            end += len(waves[-1])
        # where phones have as many words as the text, words begin with theirs; else interpolated
        wave, words = (
            np.concatenate(waves),
            [match.start() for match in re.finditer(r'\S+', sentence)],
        )
        marks = list(zip(words, starts, strict=True)) if len(words) == len(starts) else []
        times = dict(words=word_times(sentence, wave, config.sample_rate, marks))
        return Speech(wave, config.sample_rate, times)


# The values of --tts: class, default voices, default network (it runs in one process). espeak: a
# path below its lang/ loads ten times as fast as a name (en-us). kokoro: SpokenSwag's voices
Backend = namedtuple('Backend', 'speaker voices model', defaults=('',))
BACKENDS = dict(
    espeak=Backend(Espeak, 'gmw/en+m3,gmw/en+m7,gmw/en+Annie,gmw/en+steph'),
    kokoro=Backend(Kokoro, 'af_heart,am_fenrir,bf_emma,bm_george', 'hexgrad/Kokoro-82M'),
    vits=Backend(Vits, '0', 'facebook/mms-tts-eng'),
    piper=Backend(Piper, '0', 'en_US-joe-medium.onnx'),
)


# -----------------------------------------------------------------------------
# Waves


def trim(speech):
    """A Speech, not silent, at 16 kHz: without silence at its ends, followed by the pause, and
    padded to whole frames."""
    sounding = np.flatnonzero(np.abs(speech.wave) > SILENCE)
    start = float(sounding[0] / speech.rate)
    wave = torch.from_numpy(speech.wave[sounding[0] : sounding[-1] + 1])
    wave = resample(wave, speech.rate, SAMPLE_RATE).numpy()
    seconds = len(wave) / SAMPLE_RATE
    times = {
        key: [[name, *(min(max(t - start, 0), seconds) for t in span)] for name, *span in found]
        for key, found in speech.times.items()
    }
    length = math.ceil((len(wave) + round(pause * SAMPLE_RATE)) / GRID) * GRID
    return Speech(np.pad(wave, (0, length - len(wave))), SAMPLE_RATE, times)


def join(speeches):
    """Speeches at 16 kHz, one after the other; with the times that all of them have."""
    times = {key: [] for key in ('words', 'phones') if all(key in s.times for s in speeches)}
    at = 0.0
    for speech in speeches:
        for key, found in times.items():
            for name, start, end in speech.times[key]:
                found.append([name, round(at + start, 3), round(at + end, 3)])
        at += len(speech.wave) / SAMPLE_RATE
    return Speech(np.concatenate([speech.wave for speech in speeches]), SAMPLE_RATE, times)


def save_wave(path, wave):
    """Write 16-bit audio atomically. What is louder than full scale is scaled down, not clipped."""
    samples = np.round(wave * (32767 / max(1.0, float(np.abs(wave).max())))).astype(np.int16)
    kind = path.rpartition('.')[2]
    options = dict(compression_level=0.0) if kind == 'flac' else {}
    buffer = io.BytesIO()  # soundfile does not name a full disk
    soundfile.write(buffer, samples, SAMPLE_RATE, format=kind, subtype='PCM_16', **options)
    with write_atomic(path, 'wb') as file:
        file.write(buffer.getbuffer())


# -----------------------------------------------------------------------------
# Speaking an item


class Skip(Exception):
    """Why an item is not spoken."""


@lru_cache(100)  # the files of an item share sentences
def speak_sentence(sentence, voice, speaker):
    """A sentence as Speech at 16 kHz; None if it is silent."""
    own = random.Random(f'{seed}/{voice}')  # each voice has its own speed and pitch
    how = [own.uniform(*map(float, span.split('-'))) for span in (speed, pitch)]
    speech = speaker.speak(sentence, voice, *how)
    return trim(speech) if np.abs(speech.wave).max(initial=0) > SILENCE else None


def speak_text(document, voice, speaker):
    """(text as spoken, Speech). Raises Skip."""
    spoken = []
    for sentence in sentences(document, speaker.english(voice)):
        speech = speak_sentence(sentence, voice, speaker)
        if speech:
            spoken.append((sentence, speech))
    if not spoken:
        raise Skip('nothing to say')
    said, speeches = zip(*spoken, strict=True)
    return ' '.join(said), join(speeches)


def speak_item(item, voice, speaker):
    """{role: (text, Speech)} of an item. Raises Skip."""
    if 'skip' in item:
        raise Skip(item['skip'])
    if sum(map(len, item['texts'].values())) > LONGEST:
        raise Skip(f'longer than {LONGEST:,} letters')
    spoken = {role: speak_text(text, voice, speaker) for role, text in item['texts'].items()}
    waves = [speech.wave for _, speech in spoken.values()]
    if len(waves) == 2 and np.array_equal(*waves):
        raise Skip('both sound the same')
    return spoken


def place_of(kind, n, role, count):
    """The path of a file of item n, with at most 1,000 files in a folder, gold.csv among them.
    ZeroSpeech's layout has no sub-folders, so they begin with the thousandth file."""
    gold = kind == 'blimp'
    folder = f'{n // ((999 if gold else 1000) // count):03d}'
    name = f'{n:06d}' + f'_{role}' * bool(role)
    if gold:
        return os.path.join(GOLD_FOLDER, '' if folder == '000' else folder, f'{name}.wav')
    return os.path.join(folder, f'{name}.flac')


def make_rows(n, item, task, speaker):
    """Speak an item and save its audio -> (rows of the manifest, seconds). Raises Skip."""
    about = {key: item[key] for key in item if key not in ('texts', 'alike')}
    drawn = random.Random(f'{seed}/{task.name}/{item.get("alike", n)}').choice(task.voices)
    about.setdefault('voice', drawn)
    if about.pop('split', False):
        held_out = random.Random(f'{seed}/{task.name}/{n}/split').random() < val_share
        about['split'] = 'val' if held_out else 'train'

    rows, seconds = {}, 0.0
    for role, (said, speech) in speak_item(item, about['voice'], speaker).items():
        path = place_of(task.kind, n, role, len(item['texts']))
        save_wave(os.path.join(out, task.name, path), speech.wave)
        length = round(len(speech.wave) / SAMPLE_RATE, 3)
        seconds += length
        rows[role] = dict(path=path, text=said, seconds=length, **speech.times)
        if role and task.kind != 'pairs':
            rows[role]['correct'] = role == 'correct'
    if task.kind == 'pairs':  # a preference pair is one row
        rows = {'': {f'{role}_{key}': row[key] for role, row in rows.items() for key in row}}
    return [row | about for row in rows.values()], seconds


# -----------------------------------------------------------------------------
# The work: part n of a task is done when parts/0000n.jsonl exists. Its first line counts, the
# others are rows of manifest.jsonl or, with a reason, of skipped.jsonl


def to_json(row):
    """A line of JSON; half of a surrogate pair, which UTF-8 does not have, becomes '?'."""
    return json.dumps(row, ensure_ascii=False).encode(errors='replace').decode() + '\n'


def part_path(task, number):
    return os.path.join(out, task.name, 'parts', f'{number:05d}.jsonl')


def do_part(number, items, task, speaker):
    """Speak the items of a part, [(n, item), ...], and write its file -> seconds of speech."""
    lines, total = [], dict(items=len(items), skipped=0, seconds=0.0)
    for n, item in items:
        try:
            rows, seconds = make_rows(n, item, task, speaker)
            lines += rows
            total['seconds'] += seconds
        except Skip as reason:
            unsaid = ' | '.join(item['texts'].values())[:1000]
            lines.append(dict(n=n, reason=str(reason), text=unsaid))
            total['skipped'] += 1
    with write_atomic(part_path(task, number)) as file:
        file.writelines(map(to_json, (total, *lines)))
    return total['seconds']


class Parts(IterableDataset):
    """A shard's missing parts of a task -> the seconds of speech in each. Worker i of n takes every
    n-th of them. An error is passed to the parent, which raises it."""

    def __init__(self, task, speaker, missing):
        self.task, self.speaker, self.missing = task, speaker, missing

    def __iter__(self):
        worker = get_worker_info()
        mine = {*(self.missing[worker.id :: worker.num_workers] if worker else self.missing)}
        items = enumerate(self.task.items())
        for number in range(max(mine, default=-1) + 1):
            part = list(islice(items, PART))
            try:
                if number in mine:
                    yield do_part(number, part, self.task, self.speaker)
            except (OSError, InputError) as error:
                yield error


def begin_worker(number):
    start_worker()


def do_parts(task, speaker, missing):
    """Yield the seconds of speech in each missing part. Networks speak in this process, the others
    in worker processes."""
    processes = 0 if BACKENDS[tts].model else min(workers or os.cpu_count(), len(missing))
    loader = DataLoader(
        Parts(task, speaker, missing),
        batch_size=None,
        num_workers=processes,
        worker_init_fn=begin_worker,
        multiprocessing_context='fork' if processes else None,  # it shares what is loaded
        in_order=False,
    )
    try:
        for result in loader:
            if isinstance(result, Exception):
                raise result
            yield result
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        hint = 'run the same command to continue, with fewer --workers'
        fail(f'a worker was killed (no memory left?): {hint}')


def merge_parts(task, parts):
    """Merge the parts in order into manifest.jsonl and skipped.jsonl, and gold.csv of blimp ->
    their counts added up, and how often each reason to skip an item occurs."""
    total, reasons, gold, folder = Counter(), Counter(), [], os.path.join(out, task.name)
    manifest, skipped = (os.path.join(folder, f'{name}.jsonl') for name in ('manifest', 'skipped'))
    with write_atomic(manifest) as manifest_file, write_atomic(skipped) as skipped_file:
        for number in range(parts):
            rows = (row for _, row in read_jsonl(part_path(task, number)))
            total.update(next(rows))
            for row in rows:
                (skipped_file if 'reason' in row else manifest_file).write(to_json(row))
                if 'reason' in row:
                    reasons[row['reason']] += 1
                else:
                    gold.append(row)
    if task.kind == 'blimp':
        with write_atomic(os.path.join(folder, GOLD_FOLDER, 'gold.csv')) as file:
            writer = csv.DictWriter(file, GOLD, extrasaction='ignore')
            writer.writeheader()
            for row in gold:
                name = os.path.relpath(os.path.splitext(row['path'])[0], GOLD_FOLDER)
                more = dict(filename=name, transcription=row['text'], correct=int(row['correct']))
                writer.writerow(row | more)
    return dict(total, reasons=dict(reasons))


def check_folder(task, settings):
    """Raise InputError if a task's folder holds speech of other text or made with other settings."""
    folder = os.path.join(out, task.name)
    if glob.glob(f'{glob.escape(folder)}/parts/[0-9]*.jsonl'):
        old = read_json(os.path.join(folder, 'parts', 'settings.json'))
        changed = [key for key in settings if settings[key] != old.get(key)]
        if changed:
            raise InputError(
                f'{folder} holds speech made with other {", ".join(changed)}: choose another --out, '
                'or remove it'
            )


def check_voices(speaker, wanted):
    """Raise InputError naming a voice that does not exist; load a network's voices."""
    for voice in sorted(wanted):
        try:
            speaker.speak('a', voice, 1.0, 50)
        except Exception as error:  # of many kinds
            reason = ' '.join(str(error).split())[:200]
            raise InputError(f'--voices={voice}: {tts} does not speak with it: {reason}') from None


def plan_task(task):
    """(parts, settings) of a task: what its audio depends on, with a hash of all its text."""
    items, digest = 0, hashlib.sha256()
    for items, item in enumerate(task.items(), 1):
        digest.update(json.dumps(item).encode())
    if not items:
        raise InputError(f'{text}: no text in it for task {task.kind}')
    settings = dict(text=digest.hexdigest(), tts=tts, tts_model=tts_model, voices=task.voices)
    settings |= dict(speed=speed, pitch=pitch, pause=pause, seed=seed, val_share=val_share)
    return math.ceil(items / PART), settings


def run_task(task, parts, settings, speaker):
    """Make the missing parts of this shard, and merge all parts if none is missing then."""
    began, spoken, folder = time.time(), 0.0, os.path.join(out, task.name)
    with write_atomic(os.path.join(folder, 'parts', 'settings.json')) as file:
        file.write(to_json(settings))
    first, step = map(int, shard.split('/')) if shard else (0, 1)
    missing = [n for n in range(first, parts, step) if not os.path.exists(part_path(task, n))]
    with tqdm(total=len(missing), desc=task.name, unit=' parts') as bar:
        for seconds in do_parts(task, speaker, missing):
            spoken += seconds
            rate = spoken / (time.time() - began)
            bar.set_postfix_str(f'{spoken / 3600:.2f} h, {rate:.0f} x real time', refresh=False)
            bar.update()

    left = sum(not os.path.exists(part_path(task, number)) for number in range(parts))
    if left:
        log(f'{task.name}: shard {shard} is done; {left} of {parts} parts are missing')
        return
    total, spent = merge_parts(task, parts), time.time() - began
    made = dict(total, hours=total.pop('seconds') / 3600, seconds=spent, x_real_time=spoken / spent)
    with write_atomic(os.path.join(folder, 'summary.json')) as file:
        file.write(to_json(dict(made, settings=settings)))
    reasons = ', '.join(f'{number:,} {reason}' for reason, number in made['reasons'].items())
    log(
        f'{task.name}: {made["items"]:,} items, {made["hours"]:.2f} h, {made["skipped"]} skipped'
        f'{f" ({reasons})" if reasons else ""} in {spent:.1f} s, {made["x_real_time"]:.0f} x real time'
    )


if __name__ == '__main__':
    config = configure(globals())
    if tts not in BACKENDS:
        fail(f'--tts={tts}: expected {", ".join(BACKENDS)}')

    # Read all text first, and compare it with what is there: mistakes end the run before it speaks
    todo = []
    for wanted in find_tasks():
        parts, settings = plan_task(wanted)
        check_folder(wanted, settings)
        if os.path.exists(os.path.join(out, wanted.name, 'summary.json')):
            log(f'{wanted.name}: already in {out}/{wanted.name}, nothing to do')
        else:
            todo.append((wanted, parts, settings))

    # Load the voices once; worker processes share them
    speaker = BACKENDS[tts].speaker() if todo else None
    check_voices(speaker, {voice for wanted, _, _ in todo for voice in wanted.voices})

    # One task after the other
    for wanted, parts, settings in todo:
        run_task(wanted, parts, settings, speaker)
