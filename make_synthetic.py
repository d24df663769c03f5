"""Text -> speech: stories to pre-train on, preference pairs for DPO, suites of minimal pairs.

    python make_synthetic.py config/demo_synthetic.py                the demo's own toy language
    python make_synthetic.py --text=TinyStoriesV2-GPT4-train.txt --out=data/audio
    python make_synthetic.py --task=pairs --text=swag/train.csv --tts=kokoro --out=data/spokenswag
    python make_synthetic.py --task=blimp --text=blimp/data --out=data
    python make_synthetic.py --task=minimal --text=mine.csv --test_voices=en-us+f4 --out=data
    python make_synthetic.py --task=wuggy,salmon --text=stories.txt --out=data

--text is a .txt, .jsonl, .csv or .parquet file, a folder or a glob of such, hub:OWNER/NAME[:SPLIT]
(its split train if none is named), or toy. A .txt file holds stories: what stands between
<|endoftext|> marks if the file has them, else between blank lines, or between what --separator
says. The tasks, and the columns they read:

stories, prompts   text (--text_field): whole stories, or the first --prompt_seconds of each
pairs              prompt, chosen, rejected; or the columns of SWAG:
                       prompt,chosen,rejected
                       A dog barks at the gate.,It wants to come in.,It wants to be a gate.
                       Anna has lost her key.,She cannot open the door.,She cannot open the sea.
                       "Rain fell, and fell.",The river rose.,The river sang.
minimal            right, wrong and, if you like, type: your own suite, <n>_correct, <n>_incorrect
blimp              BLiMP's columns -> the layout of ZeroSpeech 2021 (sBLIMP), with gold.csv
storycloze         StoryCloze's columns -> sstorycloze and tstorycloze, <n>_correct, <n>_incorrect
wuggy              text: its words against pseudo-words made of them -> sWUGGY's layout
salmon             text: a second half in another voice, gender, noise or room -> SALMon's layout

Suites, which are all but the first three, are made a second time in --test_voices, beside the
first: minimal_unseen. A file is spoken sentence by sentence; every sentence is trimmed, followed by
a pause and rounded up to whole 40 ms frames, so that a prompt's file and an ending's file laid end
to end are the file of the whole. With espeak a sentence's sound depends on its text and voice
alone. Work is done in parts of 40 items: a killed run makes those that are not there.
"""

from config import configure, fail

import _ctypes
import csv
import ctypes
import glob
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
from itertools import combinations, count, islice
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
    pick_device,
    read_jsonl,
    read_parquet,
    resample,
    start_worker,
    tokenize_words,
    write_atomic,
)

# -----------------------------------------------------------------------------
out = 'out/synthetic'  # a folder for each task: audio, manifest.jsonl, skipped.jsonl, summary.json
task = 'stories'  # comma-separated, see above; of the toy language also grammar, sstory, tstory
text = 'toy'  # toy (below), a file, folder or glob, or hub:OWNER/NAME[:SPLIT]
text_field = 'text'  # where rows of .jsonl, .csv, .parquet and hub data keep a story
separator = ''  # of stories in a .txt file; '': <|endoftext|> if it has that, or blank lines
limit = 0  # at most so many items of a task; 0: all
val_share = 0.03  # of stories and pairs, marked split=val
max_auto_bleu = 0.3  # pairs whose prompt and chosen repeat this share of their bigrams are dropped
prompt_seconds = 3.0  # what is kept of a story by task prompts
n_stories = 6000  # how much of the toy language: stories
n_pairs = 2000  # preference pairs
n_suite = 500  # minimal pairs in a suite; also of wuggy, and of each part of salmon (even)
n_unseen = 200  # of these the first so many are spoken in test_voices too
# the voice
tts = 'espeak'  # espeak, kokoro, vits, fastspeech2
tts_model = ''  # a network's folder or hub name; '': that of BACKENDS, below
voices = ''  # comma-separated, one drawn for each item (blimp: each says all); '': BACKENDS
test_voices = ''  # voices for the suites NAME_unseen; '': no such suites
speed = '1.0-1.0'  # 1 is the voice's usual pace; every voice has its own, drawn from this range
pitch = '50-50'  # espeak: 0 to 99; likewise
pause = 0.2  # seconds of silence after each sentence
# the machine
workers = 0  # processes that speak; 0: one a core. A network speaks in one
seed = 1234
device = 'auto'  # of a network: cuda, mps, cpu. It computes in float32 (TF32 on cuda)
# -----------------------------------------------------------------------------

GRID = 640  # samples in a 40 ms frame of a 25 Hz encoder
SILENCE = 0.002  # of full scale; what stays below it is pause
PART = 40  # items in a part
LONGEST = 100_000  # letters of an item that is still spoken, about two hours
MARK = '<|endoftext|>'

# Columns that a task expects; of pairs one of the sets
PAIR = ('prompt', 'chosen', 'rejected')
SWAG = ('sent1', 'sent2', 'gold-source', 'label', 'ending0', 'ending1', 'ending2', 'ending3')
BLIMP = ('sentence_good', 'sentence_bad', 'linguistics_term', 'UID', 'pairID')
CLOZE = (
    *('InputSentence1', 'InputSentence2', 'InputSentence3', 'InputSentence4'),
    *('RandomFifthSentenceQuiz1', 'RandomFifthSentenceQuiz2', 'AnswerRightEnding'),
)

# ZeroSpeech 2021: where its audio and gold.csv lie, and the columns of gold.csv
LAYOUT = dict(blimp='syntactic/dev', wuggy='lexical/dev')
GOLD = dict(
    blimp=('id', 'filename', 'voice', 'type', 'subtype', 'correct', 'transcription'),
    wuggy=('id', 'filename', 'voice', 'frequency', 'word', 'phones', 'length', 'correct'),
)

# Noise by the exponent of its amplitude over frequency; rooms by the seconds in which sound falls
# by 60 dB, and the energy of the reverberation beside that of the direct sound
NOISES = dict(white=0.0, pink=-0.5, brown=-1.0, blue=0.5)
ROOMS = dict(booth=(0.1, 0.05), office=(0.4, 0.5), hall=(1.0, 1.0), church=(2.0, 3.0))


# -----------------------------------------------------------------------------
# The toy language: stories of three short sentences, whose ending follows from the first two.
#
#     This king is in the kitchen with his cake.   who (number, gender), where, with what: the topic
#     The cake is lovely and warm.                 what it is like: the outcome
#     He is happy and eats the cake.               the ending
#
# All endings have one frame: what a model must know to prefer the right one is in the words, not in
# how long or how usual an ending is. Edit these tables to make another toy language.

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

# A topic: where; with what (one and many); then what it is like and what the hero does, if all is
# well, and the same if not
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


def read_topics(table):
    """{topic: dict(places, things, qualities, actions)}; the last two by outcome, [good, bad]."""
    topics = {}
    for name, row in re.findall(r'^(\w+):((?:.|\n(?= ))+)', table, re.M):
        cells = [[word.strip() for word in cell.split('|')] for cell in row.split(';')]
        places, things, good, good_actions, bad, bad_actions = cells
        topics[name] = dict(places=places, things=things)
        topics[name] |= dict(qualities=[good, bad], actions=[good_actions, bad_actions])
    return topics


TOPICS = read_topics(TOPICS)

# Frames of a first sentence
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

# Minimal pairs, [right|wrong], and below each its mirror image, where what was right is wrong
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
MINIMAL = {
    kind: [frame.strip() for frame in frames]
    for kind, *frames in re.findall(r'(\w+): +(.+)\n +(.+)', MINIMAL)
}


def finish(sentence):
    return sentence[0].upper() + sentence[1:] + '.'


def fill_words(rng, topic, he):
    """What the frames of first sentences are filled with: {slot: word}."""
    one, many = rng.choice(HEROES[he].split('|')).split()
    thing, _ = rng.choice(TOPICS[topic]['things']).split()
    name, other = rng.sample(NAMES[he].split(), 2)
    return dict(
        one=one,
        many=many,
        thing=thing,
        name=name,
        other=other,
        his=HIS[he],
        place=rng.choice(TOPICS[topic]['places']),
        adjective=rng.choice(ADJECTIVES.split()),
        time=rng.choice(TIMES.split('|')),
        colour=rng.choice(COLOURS.split()),
        number=rng.choice(NUMBERS.split()),
        man=rng.choice(HEROES['he'].split('|')).split()[0],
        woman=rng.choice(HEROES['she'].split('|')).split()[0],
    )


def toy_story(rng, topic, outcome, who, mood):
    """A story as dict: prompt (two sentences), the ending that follows, topic.

    outcome: 0 good, 1 bad; who: he, she or they; mood: which of the outcome's two.
    """
    words = fill_words(rng, topic, who if who != 'they' else rng.choice(('he', 'she')))
    first = rng.choice(SEVERAL if who == 'they' else SINGLE).format(**words)
    verb, space, particle = rng.choice(TOPICS[topic]['actions'][outcome]).partition(' ')
    if who != 'they':
        verb += 'es' if re.search('(s|sh|ch)$', verb) else 's'
        verb = re.sub('([^aeiou])ys$', r'\1ies', verb)
    own = TOPICS[topic]['qualities'][outcome]
    quality = f'{rng.choice(QUALITIES[outcome])} and {rng.choice(own)}'
    second = f'the {words["thing"]} is {quality}'
    feels = f'{who} {"are" if who == "they" else "is"} {MOODS[outcome][mood]}'
    ending = f'{feels} and {verb}{space}{particle} the {words["thing"]}'
    return dict(prompt=f'{finish(first)} {finish(second)}', ending=finish(ending), topic=topic)


def toy_couple(rng, contradict, fresh):
    """Two stories with their endings exchanged, so that preferring an ending as such gains nothing.

    contradict: the same thing, well and badly; else two topics.
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
    """A minimal pair and its mirror image, [(right, wrong), (right, wrong)], of a kind of MINIMAL
    or of `pronoun`, in the ending of a story: he is, he are; they are, they is."""
    couple = []
    if kind == 'pronoun':
        topic, outcome, _, mood = anything()
        for who in (rng.choice(('he', 'she')), 'they'):
            story = fresh(topic, outcome, who, mood)
            right = story['ending']
            swap = (' are ', ' is ') if who == 'they' else (' is ', ' are ')
            wrong = right.replace(*swap)
            couple.append((f'{story["prompt"]} {right}', f'{story["prompt"]} {wrong}'))
        return couple
    words = fill_words(rng, rng.choice(list(TOPICS)), rng.choice(('he', 'she')))
    for frame in MINIMAL[kind]:
        right, wrong = (re.sub(r'\[(.*?)\|(.*?)\]', side, frame) for side in (r'\1', r'\2'))
        couple.append((finish(right.format(**words)), finish(wrong.format(**words))))
    return couple


def toy_rows(task, seed, n_stories, n_pairs, n_suite):
    """Yields the rows of a task: stories (text), pairs (prompt, chosen, rejected), and the suites
    grammar, sstory, tstory (right, wrong, type, alike: which pairs have one voice).

    Whatever is asked for is drawn in the same order and nothing is drawn twice, neither a sentence
    of grammar's nor a story's prompt: training and evaluation share no story, pair or context.
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
                    prompt, topic = story['prompt'], story['topic']
                    right, wrong = (f'{prompt} {story[end]}' for end in ('ending', 'wrong'))
                    yield dict(right=right, wrong=wrong, type=topic, alike=i)
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(prompt=story['prompt'], chosen=story['ending'], rejected=story['wrong'])
    if task in ('stories', 'prompts'):
        for _ in range(n_stories):
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


def separator_of(path):
    """What stands between the stories of a .txt file; '' for blank lines.

    A few wrong bytes, as in TinyStories, do no harm; a file in another encoding ends the run.
    """
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        head = file.read(1 << 20)
    if head.count('\0') > len(head) / 10 or head.count('\ufffd') > len(head) / 1000:
        fail(f'{path}: not text in UTF-8; convert it (iconv -t utf-8)')
    written = separator.replace('\\n', '\n').replace('\\t', '\t')
    return written or (MARK if MARK in head else '')


def split_stories(file, between):
    """Yields what stands between separators in a file, or between blank lines; none is empty."""
    pattern = re.escape(between) if between else r'\n\s*\n'
    rest = ''
    while block := file.read(1 << 20):
        *whole, rest = re.split(pattern, rest + block)
        yield from (story for story in whole if story.strip())
    if rest.strip():
        yield rest


def read_file(path):
    """Yields the rows of a text file as dicts; a story of a .txt file is a row of text_field."""
    if path.endswith('.parquet'):
        yield from read_parquet(path)
    elif path.endswith('.jsonl'):
        yield from (row for _, row in read_jsonl(path))
    elif path.endswith('.csv'):
        csv.field_size_limit(1 << 30)
        with open(path, encoding='utf-8-sig', errors='replace', newline='') as file:
            yield from csv.DictReader(file)
    else:
        between = separator_of(path)
        with open(path, encoding='utf-8-sig', errors='replace') as file:
            yield from ({text_field: story} for story in split_stories(file, between))


def read_rows(kind, *expected):
    """Yields the rows of the knob `text`, dicts of strings; what is empty is ''.

    expected: sets of columns, one of which each row must have as text; ends the run otherwise.
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
        fail(f'{text}: no text there; expected {kinds}')
    for name, rows in sources.items():
        for number, row in enumerate(rows, 1):
            for key, value in row.items():
                if value is None or isinstance(value, (int, float)):
                    row[key] = '' if value is None else str(value)
            texts = {key for key, value in row.items() if isinstance(value, str)}
            if not any(texts.issuperset(columns) for columns in expected):
                wanted = '; or '.join(map(', '.join, expected))
                there = ', '.join(f'{key} ({type(value).__name__})' for key, value in row.items())
                fail(f'{name} row {number}: task {kind} expects {wanted}; there are {there}')
            yield row


# -----------------------------------------------------------------------------
# Items: what a task says, made of rows. An item is dict(files={role: [piece, ...]}), a file for
# each role, and a piece is dict(text), perhaps with a voice, noise or room of its own. Other keys:
# voice; alike (items that have this number in common have one voice); split (into train and val);
# skip (a reason); and what is to stand in the manifest. Each function below yields a task's items


def files_of(**texts):
    """The files of an item that are spoken plainly, {role: text}."""
    return {role: [dict(text=text)] for role, text in texts.items()}


def item_texts(item):
    return [piece['text'] for pieces in item['files'].values() for piece in pieces]


def story_items(task, speaker):
    """Each row's text; the role of its only file is none."""
    for row in read_rows(task.kind, (text_field,)):
        yield dict(files=files_of(**{'': row[text_field]}), split=task.kind == 'stories')


def minimal_items(task, speaker):
    """The user's own pairs, and those of the toy language."""
    for row in read_rows(task.kind, ('right', 'wrong')):
        kept = {key: row[key] for key in ('type', 'alike') if row.get(key, '') != ''}
        yield dict(files=files_of(correct=row['right'], incorrect=row['wrong']), **kept)


def swag_pair(row, draw):
    """A pair of a row of SWAG as SpokenSwag has it (section 4 of the paper): the right ending, and
    a wrong one drawn by the seed `draw`. None if the row has no gold label."""
    labels = ['0', '1', '2', '3']
    right = row['label']
    if row['gold-source'] != 'gold' or right not in labels:
        return None
    wrong = random.Random(draw).choice([label for label in labels if label != right])
    endings = [f'{row["sent2"]} {row["ending" + label]}'.strip() for label in (right, wrong)]
    return dict(prompt=row['sent1'], chosen=endings[0], rejected=endings[1])


def pair_items(task, speaker):
    """Preference pairs, without those whose text repeats itself."""
    for number, row in enumerate(read_rows(task.kind, PAIR, SWAG)):
        pair = swag_pair(row, f'{seed}/{task.kind}/{number}') if 'sent1' in row else row
        if not pair:
            continue
        item = dict(files=files_of(**{role: pair[role] for role in PAIR}), split=True)
        share = auto_bleu(tokenize_words(f'{pair["prompt"]} {pair["chosen"]}'))
        if share >= max_auto_bleu:
            item['skip'] = f'auto-BLEU {share:.2f}'
        yield item


def blimp_items(task, speaker):
    for row in read_rows(task.kind, BLIMP):
        about = dict(type=row['linguistics_term'], subtype=row['UID'], id=row['pairID'])
        files = files_of(correct=row['sentence_good'], incorrect=row['sentence_bad'])
        for voice in task.voices:
            yield dict(files=files, voice=voice, **about)


def cloze_items(task, speaker):
    """Stories with their right ending and the wrong one, or another story's (tstorycloze)."""
    rows = list(read_rows(task.kind, CLOZE))
    for row in rows:
        if row['AnswerRightEnding'] not in ('1', '2'):
            hint = 'expected 1 or 2 (the test set without answers makes no pairs)'
            fail(f'{text}: an AnswerRightEnding is {row["AnswerRightEnding"]!r}, {hint}')
    endings = [row['RandomFifthSentenceQuiz' + row['AnswerRightEnding']] for row in rows]
    for number, (row, right) in enumerate(zip(rows, endings, strict=True)):
        other = {'1': '2', '2': '1'}[row['AnswerRightEnding']]
        wrong = row['RandomFifthSentenceQuiz' + other]
        if task.kind == 'tstorycloze':
            drawn = random.Random(f'{seed}/{task.kind}/{number}').choices(endings, k=20)
            others = [ending for ending in drawn if ending not in (right, wrong)]
            if not others:
                fail(f'{text}: too few stories to draw endings from')
            wrong = others[0]
        prompt = ' '.join(row[key] for key in CLOZE[:4])
        yield dict(files=files_of(correct=f'{prompt} {right}', incorrect=f'{prompt} {wrong}'))


def pseudo_words(word, pairs, alphabet):
    """What a word becomes if one letter is changed, vowel for vowel and consonant for consonant,
    so that any two letters side by side are so in a word. pairs: the set of these, edges ^ $."""

    def is_vowel(letter):
        return unicodedata.normalize('NFD', letter)[0] in 'aeiouy'

    for i, letter in enumerate(word):
        for other in alphabet:
            changed = f'^{word[:i]}{other}{word[i + 1 :]}$'
            around = {changed[i : i + 2], changed[i + 1 : i + 3]}
            if is_vowel(other) == is_vowel(letter) and around <= pairs:
                yield changed[1:-1]


def wuggy_items(task, speaker):
    """Words of the text, and pseudo-words made of them that it does not have (as Wuggy's: Keuleers
    and Brysbaert 2010). frequency: how often the text has the word."""
    counts = Counter()
    for row in read_rows('stories', (text_field,)):
        counts.update(re.findall(r'[^\W\d_]+', row[text_field].lower()))
    edged = [f'^{word}$' for word in counts]
    pairs = {word[i : i + 2] for word in edged for i in range(len(word) - 1)}
    alphabet = sorted({letter for word in counts for letter in word})
    words = sorted(word for word in counts if len(word) > 2)

    # each word once in random order, then again as long as pseudo-words are left
    rng, used = random.Random(f'{seed}/wuggy'), set(counts)
    rng.shuffle(words)
    for word in words * 20:
        free = sorted({*pseudo_words(word, pairs, alphabet)} - used)
        if free:
            other = rng.choice(free)
            used.add(other)
            about = dict(id=f'{len(used) - len(counts)}', word=word, frequency=counts[word])
            yield dict(files=files_of(correct=word, incorrect=other), **about)


def swap_choices(task, speaker):
    """What the second half of a recording differs in: (key of a half, [(one, other), ...])."""
    if task.kind == 'bg_all_consistency':
        return 'noise', list(combinations(NOISES, 2))
    if task.kind == 'rir_consistency':
        return 'room', list(combinations(ROOMS, 2))
    couples = list(combinations(task.voices, 2))
    alike = [(one, two) for one, two in couples if speaker.gender(one) == speaker.gender(two)]
    choices = alike or couples
    if task.kind == 'gender_consistency':
        choices = [couple for couple in couples if couple not in alike]
        if not choices:
            fail('gender_consistency needs two voices of two genders')
    if not choices:
        fail('speaker_consistency needs two voices')
    return 'voice', choices


def consistency_items(task, speaker):
    """A recording, and one whose second half is in another voice, of another gender, with other
    noise or in another room, as SALMon asks it (Maimon et al. 2024). Of each text there are two
    pairs with the two exchanged: preferring a voice, noise or room gains nothing."""
    key, choices = swap_choices(task, speaker)
    if text == 'toy':  # held-out stories
        texts = (row['right'] for row in read_rows('sstory'))
    else:
        texts = (row[text_field] for row in read_rows(task.kind, (text_field,)))
    for number, document in enumerate(texts):
        found = sentences(document[:LONGEST])[:4]
        if len(found) < 2:
            yield dict(files=files_of(consistent=document), skip='fewer than two sentences')
            continue
        half = len(found) // 2
        first, second = ' '.join(found[:half]), ' '.join(found[half : 2 * half])
        couple = random.Random(f'{seed}/{task.kind}/{number}').choice(choices)
        for one, two in (couple, couple[::-1]):
            files = dict(
                consistent=[{'text': first, key: one}, {'text': second, key: one}],
                inconsistent=[{'text': first, key: one}, {'text': second, key: two}],
            )
            item = dict(files=files, alike=number)
            if key == 'voice':
                item['voice'] = one
            yield item


# -----------------------------------------------------------------------------
# Tasks: a new one is a function like those above and an entry here

CONSISTENCY = (
    *('speaker_consistency', 'gender_consistency'),
    *('bg_all_consistency', 'rir_consistency'),
)
MAKERS = dict(
    stories=story_items,
    prompts=story_items,
    pairs=pair_items,
    minimal=minimal_items,
    grammar=minimal_items,
    sstory=minimal_items,
    tstory=minimal_items,
    blimp=blimp_items,
    sstorycloze=cloze_items,
    tstorycloze=cloze_items,
    wuggy=wuggy_items,
    **dict.fromkeys(CONSISTENCY, consistency_items),
)


class Task(NamedTuple):
    kind: str  # a key of MAKERS
    name: str  # its folder in `out`, such as grammar_unseen or salmon/rir_consistency
    voices: list

    def items(self, speaker):
        """Yields what is to be spoken, at most `limit` items, and what is skipped."""
        most = [limit] if limit else []
        unseen = '_unseen' in self.name
        if self.kind in ('wuggy', *CONSISTENCY) or text == 'toy' and unseen:
            most += [n_suite, n_unseen] if unseen else [n_suite]
        return islice(MAKERS[self.kind](self, speaker), min(most, default=None))


def find_tasks():
    """The tasks that the knob `task` names; suites also in unseen voices, behind the seen ones."""
    groups = dict(storycloze=('sstorycloze', 'tstorycloze'), salmon=CONSISTENCY)
    speakers = {'': (voices or BACKENDS[tts].voices).split(',')}  # {end of a folder's name: voices}
    if test_voices:
        speakers['_unseen'] = test_voices.split(',')
    tasks = []
    for name in task.split(','):
        kinds = groups.get(name, (name,))
        if not MAKERS.keys() >= {*kinds}:
            fail(f'no task {name!r}; there are {", ".join([*MAKERS, *groups])}')
        for end, spoken_by in speakers.items():
            if end and name in ('stories', 'prompts', 'pairs'):
                continue
            for kind in kinds:
                folder = f'salmon{end}/{kind}' if kind in CONSISTENCY else kind + end
                tasks.append(Task(kind, folder, spoken_by))
    return tasks


# -----------------------------------------------------------------------------
# What a voice can say


class Plain(dict):
    """A table for str.translate: letters, digits and plain punctuation stay, typographic signs
    become plain ones, what is invisible goes, everything else (brackets, markup) is a space."""

    def __missing__(self, code):
        sign = chr(code)
        kind = unicodedata.category(sign)
        if kind[0] in 'LNM' or sign in '.,!?;:\'"()-%&$€£+@/。！？،؟।':
            self[code] = sign
        else:
            self[code] = '' if kind == 'Cf' else ' '
        return self[code]


PLAIN = Plain(str.maketrans({'‘': "'", '’': "'", '“': '"', '”': '"', '—': ', ', '–': ', '}))
# a full stop, question or exclamation mark and what may close after it; not that of a short form
SHORT = ''.join(rf'(?<!\b{name}\.)' for name in ('Mr', 'Mrs', 'Ms', 'Dr', 'St', '[A-Z]'))
ENDS = re.compile(rf"""(?:(?<=[.!?।؟])|(?<=[.!?।؟]["')])){SHORT}\s+|(?<=[。！？])""")


def clean(document):
    """Only what a voice can say, spaces single: no markup, links, control characters."""
    # quotes that were read in a wrong encoding, as in TinyStories
    document = re.sub('â€[˜™]', "'", document)
    document = re.sub('â€[œ\x9d]?', '"', document)
    document = unicodedata.normalize('NFKC', document)
    document = re.sub(r'https?://\S+|www\.\S+|<[^<>]*>', ' ', document).translate(PLAIN)
    # no space before a stop, and one stop of several
    document = re.sub(r'\s+([.,!?;:])', r'\1', document)
    document = re.sub(r'([.,!?;:])[.,!?;:]+', r'\1', document)
    return ' '.join(document.split())


def sentences(document, longest=300):
    """A text, cleaned, as sentences of at most `longest` letters; [] if there is no word in it.

    Longer ones are cut at a comma or space.
    """
    pieces = []
    for sentence in ENDS.split(clean(document)):
        at = 0
        while len(sentence) - at > longest:
            end = at + longest
            cut = sentence.rfind(', ', at, end) + 1 or sentence.rfind(' ', at, end) + 1 or end
            pieces.append(sentence[at:cut].strip())
            at = cut
        pieces.append(sentence[at:].strip())
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


# -----------------------------------------------------------------------------
# Voices: __init__ loads; gender(voice) is '' if not known; speak(sentence, voice, speed, pitch)
# gives a Speech, and raises where there is no such voice. A new one is such a class and an entry in
# BACKENDS


class Speech(NamedTuple):
    wave: np.ndarray  # (samples,) float32
    rate: int  # Hz
    times: dict  # words and phones, [[word, start s, end s], ...], if the voice tells them


def word_times(sentence, wave, rate, marks):
    """[[word, start s, end s], ...] from marks, [(character, sample), ...], where words begin.

    Words without a mark share the time since the last one by letters. A word ends where its sound
    does, not after the pause of a comma.
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
    """espeak-ng in this process; the library and its data come with the package espeakng-loader."""

    def __init__(self):
        import espeakng_loader

        self.path, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        # en-gb and fr-fr are names of no file: {name: file}, that of the lowest number wins
        ranked = []
        lang = os.path.join(self.data, 'lang')
        for path in filter(os.path.isfile, glob.glob(f'{glob.escape(lang)}/**', recursive=True)):
            with open(path, encoding='utf-8') as file:
                named = [line.split()[1:] for line in file if line.startswith('language')]
            ranked += [(-int([*rest, 5][0]), path, name) for name, *rest in named]
        self.files = {name: os.path.relpath(path, lang) for _, path, name in sorted(ranked)}

    @contextmanager
    def load(self, voice):
        """Gives the library, set to a voice, and its rate in Hz; for one sentence alone, since
        flutter and noise go on where the last one left them, even through espeak_Terminate."""
        library = ctypes.CDLL(self.path)
        try:
            # 2: synchronous, buffers of 10 s; phoneme events (1) in IPA (2); never exit() (0x8000)
            rate = library.espeak_Initialize(2, 10000, self.data.encode(), 0x8000 | 2 | 1)
            language, plus, variant = voice.partition('+')
            names = voice, self.files.get(language, language) + plus + variant
            there = os.path.exists(os.path.join(self.data, 'voices', '!v', variant))
            set_voice = library.espeak_ng_SetVoiceByName
            if rate <= 0 or not there or all(set_voice(name.encode()) for name in names):
                hint = 'name a language (en-us, de, fr-fr), with a variant if you like (en-us+f2)'
                fail(f'espeak-ng has no voice {voice!r}: {hint}')
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock
            yield library, rate
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)

    def gender(self, voice):
        variant = voice.partition('+')[2]
        if not variant:
            return 'male'
        with open(os.path.join(self.data, 'voices', '!v', variant), encoding='utf-8') as file:
            return 'female' if 'gender female' in file.read() else 'male'

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
            # words per minute, volume (at 100 some voices clip), pitch
            for parameter, value in ((1, 175 * speed), (2, 60), (3, pitch)):
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
    """A network's noise becomes a function of the seed and of what it says alone."""
    torch.manual_seed(zlib.crc32(f'{seed}/{voice} {sentence}'.encode()))


def first_line(error):
    return str(error).strip('* \n').partition('\n')[0]


class Kokoro:
    """The package kokoro, its 82 M parameter model; 24 kHz; word times for English.

    --tts_model: a hub name, or a folder of its layout (config.json, *.pth, voices/*.pt).
    """

    def __init__(self):
        try:
            from kokoro import KModel, KPipeline
        except ImportError:
            fail('--tts=kokoro needs its package: pip install "kokoro>=0.9"')
        name = tts_model or BACKENDS['kokoro'].model
        self.folder = f'{name}/voices' if os.path.isdir(name) else ''
        files = {}
        if self.folder:
            weights = sorted(glob.glob(f'{glob.escape(name)}/*.pth')) or [f'{name}/*.pth']
            files = dict(config=f'{name}/config.json', model=weights[-1])
        try:
            model = KModel(name, **files).to(pick_device(device)).eval()
        except Exception as error:  # of many kinds: no such name or file, no network
            fail(f'--tts_model={name} --device={device}: {first_line(error)}')
        # one model for all languages; a pipeline by a voice's first letter: af_heart, a, American
        self.pipeline = cache(lambda language: KPipeline(language, name, model=model))

    def gender(self, voice):
        return dict(f='female', m='male').get(voice[1:2], '')

    def speak(self, sentence, voice, speed, pitch):
        waves, marks, at, end = [np.zeros(0, np.float32)], [], 0, 0
        fix_noise(voice, sentence)
        file = f'{self.folder}/{voice}.pt' if self.folder else voice
        for part in self.pipeline(voice[0])(sentence, voice=file, speed=speed):
            for token in part.tokens or ():  # punctuation is a token of its own
                found = sentence.find(token.text, at)
                if found >= 0 and token.start_ts is not None:
                    marks.append((found, end + round(24000 * token.start_ts)))
                    at = found + len(token.text)
            waves.append(part.audio.cpu().numpy())
            end += len(waves[-1])
        wave = np.concatenate(waves)
        times = dict(words=word_times(sentence, wave, 24000, marks)) if marks else {}
        return Speech(wave, 24000, times)


class Transformers:
    """transformers' VITS (facebook/mms-tts-*; no times), and FastSpeech 2 Conformer with HiFi-GAN
    (words and phones timed by its durations). A voice is the number of a speaker."""

    def __init__(self):
        import transformers

        vits = tts == 'vits'
        names = ('VitsModel', 'VitsTokenizer')
        if not vits:
            names = ('FastSpeech2ConformerWithHifiGan', 'FastSpeech2ConformerTokenizer')
        name = tts_model or BACKENDS[tts].model
        torch.set_float32_matmul_precision('high')  # TF32 on cuda
        try:
            self.device = pick_device(device)
            model, tokenizer = (getattr(transformers, part).from_pretrained(name) for part in names)
            self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        except ImportError:
            fail('--tts=fastspeech2 needs a package for its phones: pip install g2p-en')
        except Exception as error:  # of many kinds: no such name, file or device, no network
            fail(f'--tts_model={name} --device={device}: {first_line(error)}')
        config = model.config if vits else model.config.model_config
        self.speakers = config.num_speakers or 1
        self.speak = self.speak_vits if vits else self.speak_fastspeech2

    def gender(self, voice):
        return ''

    def speaker_id(self, voice):
        """The number of a speaker; None for a network of one. Raises InputError."""
        if voice not in map(str, range(self.speakers)):
            raise InputError(f'it speaks with voices 0 to {self.speakers - 1}')
        return int(voice) if self.speakers > 1 else None

    @torch.inference_mode()
    def speak_vits(self, sentence, voice, speed, pitch):
        self.model.speaking_rate = self.model.config.speaking_rate * speed
        rate = self.model.config.sampling_rate
        inputs = self.tokenizer(sentence, return_tensors='pt').to(self.device)
        if not inputs['attention_mask'].any():  # not a letter of its alphabet
            return Speech(np.zeros(0, np.float32), rate, {})
        fix_noise(voice, sentence)
        made = self.model(**inputs, speaker_id=self.speaker_id(voice))
        return Speech(made.waveform[0].cpu().numpy(), rate, {})

    @torch.inference_mode()
    def speak_fastspeech2(self, sentence, voice, speed, pitch):
        """The phones are found a word at a time, so that words have times."""
        config = self.model.config.vocoder_config
        hop, rate = math.prod(config.upsample_rates), getattr(config, 'sampling_rate', 22050)
        self.model.model.config.speaking_speed = 1 / speed  # it multiplies durations
        speaker = self.speaker_id(voice)
        if speaker is not None:
            speaker = torch.tensor([[speaker]], device=self.device)

        phones, ends = [], [0]  # of each word
        end = self.tokenizer.eos_token
        for word in sentence.split():
            found = self.tokenizer.tokenize(word)
            phones += [phone for phone in found if phone.strip() and phone != end]
            ends.append(len(phones))
        tokens = self.tokenizer.convert_tokens_to_ids([*phones, end])
        fix_noise(voice, sentence)
        tokens = torch.tensor([tokens], device=self.device)
        made = self.model(input_ids=tokens, speaker_ids=speaker, return_dict=True)

        durations = made.duration_outputs[0].float().cpu().numpy()  # frames
        if speed != 1:
            durations = np.round(durations / speed)
        seconds = [0.0, *(np.cumsum(durations) * hop / rate).tolist()]
        spans = zip(sentence.split(), ends, ends[1:], strict=False)
        times = dict(
            words=[[word, seconds[first], seconds[last]] for word, first, last in spans],
            phones=[[p, *seconds[i : i + 2]] for i, p in enumerate(phones) if p.isalnum()],
        )
        return Speech(made.waveform[0].cpu().numpy(), rate, times)


# What --tts names: the class, its usual voices, and its network, which runs in one process; what
# has none runs in all `workers`. espeak: a path below its lang/ loads ten times as fast as a name
# (en-us). kokoro: SpokenSwag's voices
Backend = namedtuple('Backend', 'speaker voices model', defaults=('',))
BACKENDS = dict(
    espeak=Backend(Espeak, 'gmw/en+m3,gmw/en+m7,gmw/en+Annie,gmw/en+steph'),
    kokoro=Backend(Kokoro, 'af_heart,am_fenrir,bf_emma,bm_george', 'hexgrad/Kokoro-82M'),
    vits=Backend(Transformers, '0', 'facebook/mms-tts-eng'),
    fastspeech2=Backend(Transformers, '0', 'espnet/fastspeech2_conformer_with_hifigan'),
)


# -----------------------------------------------------------------------------
# Waves


def trim(speech):
    """A Speech, not silent, at 16 kHz without silence at its ends, followed by the pause and in
    whole frames."""
    sounding = np.flatnonzero(np.abs(speech.wave) > SILENCE)
    start = float(sounding[0] / speech.rate)
    wave = speech.wave[sounding[0] : sounding[-1] + 1]
    wave = resample(wave, speech.rate, SAMPLE_RATE).numpy()
    seconds = len(wave) / SAMPLE_RATE
    times = {
        key: [[name, *(min(max(t - start, 0), seconds) for t in span)] for name, *span in found]
        for key, found in speech.times.items()
    }
    length = math.ceil((len(wave) + round(pause * SAMPLE_RATE)) / GRID) * GRID
    return Speech(np.pad(wave, (0, length - len(wave))), SAMPLE_RATE, times)


def join(speeches):
    """Speeches at 16 kHz, one after the other; times only of what all of them tell."""
    times = {key: [] for key in ('words', 'phones') if all(key in s.times for s in speeches)}
    at = 0.0
    for speech in speeches:
        for key, found in times.items():
            for name, start, end in speech.times[key]:
                found.append([name, round(at + start, 3), round(at + end, 3)])
        at += len(speech.wave) / SAMPLE_RATE
    return Speech(np.concatenate([speech.wave for speech in speeches]), SAMPLE_RATE, times)


@cache
def room_response(room):
    """(samples,): the direct sound, and noise that decays by 60 dB in the room's seconds."""
    seconds, energy = ROOMS[room]
    t = np.arange(1, int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = np.random.default_rng(zlib.crc32(room.encode())).standard_normal(len(t))
    tail *= 10 ** (-3 * t / seconds)
    tail *= math.sqrt(energy / np.sum(tail**2))
    return np.concatenate([[1.0], tail])


def add_room(wave, room):
    """(samples,) as it sounds in a room, cut to its length, as loud as before."""
    response = room_response(room)
    size = 1 << (len(wave) + len(response)).bit_length()
    heard = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    return (heard * math.sqrt(np.mean(wave**2) / np.mean(heard**2))).astype(np.float32)


def add_noise(wave, noise, what):
    """(samples,) with noise 10 dB below it, whose draw is a function of the seed and of `what`."""
    draw = np.random.default_rng(zlib.crc32(f'{seed}/{what}/{noise}'.encode()))
    spectrum = np.fft.rfft(draw.standard_normal(len(wave)))
    spectrum[1:] *= np.arange(1.0, len(spectrum)) ** NOISES[noise]
    spectrum[0] = 0
    sound = np.fft.irfft(spectrum, len(wave))
    level = math.sqrt(np.mean(wave**2) / np.mean(sound**2)) * 10 ** (-10 / 20)
    return (wave + level * sound).astype(np.float32)


def save_wave(path, wave):
    """16-bit audio, whole or not at all. Louder than full scale is scaled down, never clipped."""
    samples = np.round(wave * (32767 / max(1.0, float(np.abs(wave).max())))).astype(np.int16)
    kind = path.rpartition('.')[2]
    options = dict(compression_level=0.0) if kind == 'flac' else {}
    buffer = io.BytesIO()  # soundfile names no full disk
    soundfile.write(buffer, samples, SAMPLE_RATE, format=kind, subtype='PCM_16', **options)
    with write_atomic(path, 'wb') as file:
        file.write(buffer.getbuffer())


# -----------------------------------------------------------------------------
# An item spoken


class Skip(Exception):
    """Why an item is not spoken."""


@lru_cache(100)  # the files of an item share sentences
def speak_sentence(sentence, voice, speaker):
    """A sentence as Speech at 16 kHz; None if there is nothing to hear."""
    own = random.Random(f'{seed}/{voice}')  # a voice has a pace and a pitch of its own
    how = [own.uniform(*map(float, span.split('-'))) for span in (speed, pitch)]
    speech = speaker.speak(sentence, voice, *how)
    return trim(speech) if np.abs(speech.wave).max(initial=0) > SILENCE else None


def speak_piece(piece, voice, draw, speaker):
    """(text, Speech) of a piece, in its room and noise. Raises Skip."""
    heard = []
    for sentence in sentences(piece['text']):
        speech = speak_sentence(sentence, piece.get('voice', voice), speaker)
        if speech:
            heard.append((sentence, speech))
    if not heard:
        raise Skip('nothing to say')
    speech = join([speech for _, speech in heard])
    wave = speech.wave
    if 'room' in piece:
        wave = add_room(wave, piece['room'])
    if 'noise' in piece:
        wave = add_noise(wave, piece['noise'], draw)
    return ' '.join(sentence for sentence, _ in heard), speech._replace(wave=wave)


def first_seconds(said, speech):
    """(text, Speech): the beginning of one, with the words that are whole in it, if known."""
    times = {
        key: [span for span in found if span[2] <= prompt_seconds]
        for key, found in speech.times.items()
    }
    if 'words' in times:
        said = ' '.join(word for word, _, _ in times['words'])
    return said, Speech(speech.wave[: round(prompt_seconds * SAMPLE_RATE)], SAMPLE_RATE, times)


def speak_item(n, item, voice, speaker):
    """{role: (text, Speech)} of an item. Raises Skip."""
    if 'skip' in item:
        raise Skip(item['skip'])
    if sum(map(len, item_texts(item))) > LONGEST:
        raise Skip(f'longer than {LONGEST:,} letters')
    spoken = {}
    for role, pieces in item['files'].items():
        made = [speak_piece(piece, voice, f'{n}/{i}', speaker) for i, piece in enumerate(pieces)]
        texts, speeches = zip(*made, strict=True)
        spoken[role] = ' '.join(texts), join(speeches)
    waves = [speech.wave for _, speech in spoken.values()]
    if len(waves) == 2 and np.array_equal(*waves):
        raise Skip('both sound the same')
    return spoken


def place_of(kind, n, role, count):
    """Where in the task's folder a file of item n lies, at most 1,000 a folder, gold.csv among
    them. ZeroSpeech and SALMon have no sub-folders: as many as may stand there without."""
    files = 999 if kind in LAYOUT else 1000  # the other is gold.csv
    folder = f'{n // (files // count):03d}'
    if kind in CONSISTENCY:
        name = f'sample_{n}_{role}.wav'
    elif kind in LAYOUT:
        name = f'{n:06d}_{role}.wav'
    else:
        name = f'{n:06d}_{role}.flac' if role else f'{n:06d}.flac'
    if folder == '000' and name.endswith('.wav'):
        folder = ''
    return os.path.join(LAYOUT.get(kind, ''), folder, name)


def make_rows(n, item, task, speaker):
    """Speaks an item and saves its audio -> (rows of the manifest, seconds). Raises Skip."""
    about = {key: item[key] for key in item if key not in ('files', 'alike')}
    drawn = random.Random(f'{seed}/{task.name}/{item.get("alike", n)}').choice(task.voices)
    about.setdefault('voice', drawn)
    if about.pop('split', False):
        held_out = random.Random(f'{seed}/{task.name}/{n}/split').random() < val_share
        about['split'] = 'val' if held_out else 'train'

    rows, seconds = {}, 0.0
    for role, (said, speech) in speak_item(n, item, about['voice'], speaker).items():
        if task.kind == 'prompts':
            said, speech = first_seconds(said, speech)
        path = place_of(task.kind, n, role, len(item['files']))
        save_wave(os.path.join(out, task.name, path), speech.wave)
        length = round(len(speech.wave) / SAMPLE_RATE, 3)
        seconds += length
        rows[role] = dict(path=path, text=said, seconds=length, **speech.times)
        if role and task.kind != 'pairs':
            rows[role]['correct'] = role in ('correct', 'consistent')
    if task.kind == 'pairs':  # a preference pair is one row
        rows = [{f'{role}_{key}': row[key] for role, row in rows.items() for key in row}]
    else:
        rows = list(rows.values())
    return [row | about for row in rows], seconds


# -----------------------------------------------------------------------------
# The work: parts of a task, each done when its file parts/00012.jsonl is there. Its first line
# counts, the others are rows of manifest.jsonl, or of skipped.jsonl: those that have a reason


def to_json(row):
    """A line of JSON; half of a surrogate pair, which no UTF-8 can hold, becomes '?'."""
    return json.dumps(row, ensure_ascii=False).encode(errors='replace').decode() + '\n'


def part_path(task, number):
    return os.path.join(out, task.name, 'parts', f'{number:05d}.jsonl')


def do_part(number, items, task, speaker):
    """Speaks the items of a part, [(number, item), ...], and writes its file -> seconds."""
    lines, total = [], dict(items=len(items), skipped=0, seconds=0.0)
    for n, item in items:
        try:
            rows, seconds = make_rows(n, item, task, speaker)
            lines += rows
            total['seconds'] += seconds
        except Skip as reason:
            unsaid = ' | '.join(item_texts(item))[:1000]
            lines.append(dict(n=n, reason=str(reason), text=unsaid))
            total['skipped'] += 1
    with write_atomic(part_path(task, number)) as file:
        for line in (total, *lines):
            file.write(to_json(line))
    return total['seconds']


class Parts(IterableDataset):
    """The parts of a task -> the seconds spoken for each, 0 where its file was there. Worker i of n
    takes parts i, i + n, ...; what ends it is handed to the parent."""

    def __init__(self, task, speaker):
        self.task, self.speaker = task, speaker

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        items = enumerate(self.task.items(self.speaker))
        for number in count():
            part = list(islice(items, PART))
            if not part:
                return
            if number % step != first:
                continue
            try:
                there = os.path.exists(part_path(self.task, number))
                yield 0.0 if there else do_part(number, part, self.task, self.speaker)
            except (OSError, InputError) as error:
                yield error


def begin_worker(number):
    start_worker()


def do_parts(task, speaker, parts):
    """Yields after each part of a task its seconds; a network speaks here, others in workers."""
    processes = 0 if BACKENDS[tts].model else min(workers or os.cpu_count(), parts)
    loader = DataLoader(
        Parts(task, speaker),
        batch_size=None,
        num_workers=processes,
        worker_init_fn=begin_worker,
        multiprocessing_context='fork' if processes else None,  # it takes what is loaded along
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


def join_parts(task, parts):
    """Joins the parts in order into manifest.jsonl and skipped.jsonl, and gold.csv where the layout
    has one -> their counts added up."""
    total, gold, folder = Counter(), [], os.path.join(out, task.name)
    manifest, skipped = (os.path.join(folder, f'{name}.jsonl') for name in ('manifest', 'skipped'))
    with write_atomic(manifest) as manifest_file, write_atomic(skipped) as skipped_file:
        for number in range(parts):
            rows = (row for _, row in read_jsonl(part_path(task, number)))
            total.update(next(rows))
            for row in rows:
                (skipped_file if 'reason' in row else manifest_file).write(to_json(row))
                if task.kind in GOLD and 'reason' not in row:
                    gold.append(gold_row(row, LAYOUT[task.kind]))
    if task.kind in GOLD:
        with write_atomic(os.path.join(folder, LAYOUT[task.kind], 'gold.csv')) as file:
            writer = csv.DictWriter(file, GOLD[task.kind], extrasaction='ignore')
            writer.writeheader()
            writer.writerows(gold)
    return total


def gold_row(row, layout):
    """A manifest row as gold.csv has it."""
    phones = [phone for phone, _, _ in row.get('phones', ())]
    name = os.path.relpath(os.path.splitext(row['path'])[0], layout)
    more = dict(phones=' '.join(phones), length=len(phones) or len(row['text']))
    return row | more | dict(filename=name, correct=int(row['correct']), transcription=row['text'])


# -----------------------------------------------------------------------------
# What the user asks for


def check_knobs(config):
    """Ends the run at a knob that is out of its range."""
    if tts not in BACKENDS:
        fail(f'--tts={tts}: expected {", ".join(BACKENDS)}')
    for knob, least in (('limit', 0), ('pause', 0), ('workers', 0), ('prompt_seconds', 0.1)):
        if not least <= config[knob] < math.inf:
            fail(f'--{knob}={config[knob]}: expected {least} or more')
    for knob, low, high, example in (('speed', 0.1, 10, '0.9-1.1'), ('pitch', 0, 99, '40-60')):
        found = re.fullmatch(r'(\d+\.?\d*)-(\d+\.?\d*)', config[knob])
        if not found or not all(low <= float(end) <= high for end in found.groups()):
            expected = f'expected a range within {low} and {high}, such as {example}'
            fail(f'--{knob}={config[knob]}: {expected}')


def check_settings(task, settings):
    """Ends the run if a task's folder holds speech made with other settings."""
    folder = os.path.join(out, task.name)
    if glob.glob(f'{glob.escape(folder)}/parts/[0-9]*.jsonl'):
        with open(os.path.join(folder, 'parts', 'settings.json'), encoding='utf-8') as file:
            old = json.load(file)
        changed = [key for key in settings if settings[key] != old.get(key)]
        if changed:
            made = f'{folder} holds speech made with other {", ".join(changed)}'
            fail(f'{made}: choose another --out, or remove it')


def check_voices(speaker, wanted):
    """Ends the run at a voice that is not there; loads a network's, before it is needed."""
    for voice in sorted(wanted):
        try:
            speaker.speak('a', voice, 1.0, 50)
        except Exception as error:  # of many kinds
            fail(f'--voices={voice}: {tts} does not speak with it: {first_line(error)}')


def count_parts(task, speaker):
    """How many parts a task has; ends the run if there is nothing to say."""
    parts = math.ceil(sum(1 for _ in task.items(speaker)) / PART)
    if not parts:
        fail(f'{text}: no text in it for task {task.kind}')
    return parts


def run_task(task, parts, speaker):
    """Makes a task's speech, what is not there of it -> what summary.json says."""
    began, spoken = time.time(), 0.0
    with tqdm(total=parts, desc=task.name, unit=' parts') as bar:
        for seconds in do_parts(task, speaker, parts):
            spoken += seconds
            rate = spoken / (time.time() - began)
            bar.set_postfix_str(f'{spoken / 3600:.2f} h, {rate:.0f} x real time', refresh=False)
            bar.update()

    total = join_parts(task, parts)
    hours, spent = total.pop('seconds') / 3600, time.time() - began
    return dict(total, hours=hours, seconds=spent, x_real_time=spoken / spent)


def print_summary(task, made):
    """The last line of a task."""
    line = (
        f'{task.name}: {made["items"]:,} items, {made["hours"]:.2f} h, {made["skipped"]} skipped '
    )
    line += f'in {made["seconds"]:.1f} s, {made["x_real_time"]:.0f} x real time'
    written = [path for path in text_files() if path.endswith('.txt')]
    if written and task.kind in ('stories', 'prompts'):
        between = separator_of(written[0])
        separates = f'{between!r} separates' if between else 'blank lines separate'
        line += f'; {made["items"]:,} stories: {separates} them, --separator changes that'
    print(line, flush=True)


if __name__ == '__main__':
    config = configure(globals())
    check_knobs(config)

    # what the speech depends on: it may not change in a folder that holds some
    free = ('out', 'task', 'workers', 'device', 'voices', 'test_voices')
    settings = {key: value for key, value in config.items() if key not in free}
    settings['text_bytes'] = sum(map(os.path.getsize, text_files()))

    # what is there already, and what cannot be made, is said before anything is spoken
    todo = []
    for wanted in find_tasks():
        check_settings(wanted, settings | dict(voices=wanted.voices))
        if os.path.exists(os.path.join(out, wanted.name, 'summary.json')):
            print(f'{wanted.name}: already in {out}/{wanted.name}, nothing to do')
        else:
            todo.append(wanted)
    speaker = BACKENDS[tts].speaker() if todo else None
    check_voices(speaker, {voice for wanted in todo for voice in wanted.voices})
    counts = [count_parts(wanted, speaker) for wanted in todo]

    # one task after the other; its folder tells what the speech was made with
    for wanted, parts in zip(todo, counts, strict=True):
        made_with = settings | dict(voices=wanted.voices)
        with write_atomic(os.path.join(out, wanted.name, 'parts', 'settings.json')) as file:
            file.write(to_json(made_with))
        made = run_task(wanted, parts, speaker) | dict(settings=made_with)
        with write_atomic(os.path.join(out, wanted.name, 'summary.json')) as file:
            file.write(to_json(made))
        print_summary(wanted, made)
