"""Text -> speech: stories for pre-training, preference pairs for DPO, suites of minimal pairs.

    python make_synthetic.py config/demo_synthetic.py                the demo's own toy language
    python make_synthetic.py --text=TinyStoriesV2-GPT4-train.txt --out=data/audio
    python make_synthetic.py --task=pairs --text=swag/train.csv --tts=kokoro --out=data/spokenswag
    python make_synthetic.py --task=minimal --text=mine.csv --test_voices=en-us+f4 --out=data

--text: .txt, .jsonl, .csv or .parquet files in UTF-8, or in UTF-16 with a byte order mark. In .txt
files <|endoftext|> separates documents, or blank lines do if the mark does not occur. Tasks and the
columns that they read:

stories      text (--text_field); <|endoftext|> separates documents here too
pairs        prompt, chosen, rejected; or the columns of SWAG or HellaSwag
minimal      right, wrong and optionally type: your own suite, <n>_correct and <n>_incorrect
blimp        BLiMP's columns -> the layout of ZeroSpeech 2021 (sBLIMP) with gold.csv
storycloze   StoryCloze's columns -> sstorycloze and tstorycloze, <n>_correct and <n>_incorrect

All tasks but stories and pairs are suites. With --test_voices each suite is spoken again, into a
folder such as minimal_unseen. A folder holds audio, manifest.jsonl, skipped.jsonl and summary.json.
Texts are spoken sentence by sentence. Each is trimmed, followed by a pause and padded to whole
40 ms frames. So the audio of a prompt plus the audio of an ending is the audio of the whole text.
"""

from config import configure, fail, report_error

import _ctypes
import csv
import ctypes
import fcntl
import glob
import html
import json
import math
import multiprocessing.connection
import os
import random
import re
import textwrap
import time
import unicodedata
import zlib
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from itertools import count, islice

import numpy as np
import torch
from tqdm import tqdm

from model import (
    MARK,
    SAMPLE_RATE,
    InputError,
    auto_bleu,
    content_hash,
    import_transformers,
    open_text,
    pick_device,
    read_documents,
    read_json,
    read_jsonl,
    read_parquet,
    reading,
    resample,
    save_audio,
    start_worker,
    write_atomic,
)

# -----------------------------------------------------------------------------
out = 'out/synthetic'  # output folder, with one folder for each task
task = 'stories'  # comma-separated, see above; for the toy language also grammar, sstory, tstory
text = 'toy'  # toy (below), a file, folder or glob, or hub:OWNER/NAME[:SPLIT]
text_field = 'text'  # text column for the task stories in .jsonl, .csv, .parquet and hub data
limit = 0  # maximum items of a task; 0: all
val_share = 0.03  # share of stories and pairs marked split=val
max_auto_bleu = 0.3  # skip pairs with at least this bigram auto-BLEU of prompt and chosen text
n_stories = 6000  # size of the toy language: stories
n_pairs = 2000  # preference pairs
n_suite = 500  # minimal pairs in a suite (even)
n_unseen = 200  # items of each suite that are also spoken in test_voices
# the voice
tts = 'espeak'  # espeak, kokoro, vits
tts_model = ''  # a network's hub name, folder or file; '': the default in BACKENDS
voices = ''  # comma-separated, one is drawn per item (blimp: all are used); '': see BACKENDS
test_voices = ''  # voices for the suites NAME_unseen; '': none
speed = '1.0-1.0'  # 1 is normal speed; each voice draws its own speed from this range
pitch = '50-50'  # espeak only: 0 to 99; each voice draws its own pitch from this range
pause = 0.2  # seconds of silence after each sentence
# the machine
workers = 0  # processes for espeak; 0: one per core. A neural voice uses one process
seed = 1234
device = 'auto'  # device of a neural voice: auto, cuda, mps, cpu
# -----------------------------------------------------------------------------

GRID = 640  # samples in a 40 ms frame of a 25 Hz encoder
SILENCE = 0.002  # amplitudes below this count as silence; full scale is 1
PART = 40  # items in a part

# Columns that a task expects
PAIR = 'prompt chosen rejected'.split()
SWAG = 'sent1 sent2 gold-source label ending0 ending1 ending2 ending3'.split()
HELLASWAG = ['ctx_a', 'ctx_b', 'endings (list)', 'label']
BLIMP = 'sentence_good sentence_bad linguistics_term UID pairID'.split()
CLOZE = [*(f'InputSentence{i}' for i in (1, 2, 3, 4)), 'AnswerRightEnding']
CLOZE += ['RandomFifthSentenceQuiz1', 'RandomFifthSentenceQuiz2']

# ZeroSpeech 2021: the folder of audio and gold.csv, and the columns of gold.csv
GOLD_FOLDER = 'syntactic/dev'
GOLD = 'id filename voice type subtype correct transcription'.split()


# -----------------------------------------------------------------------------
# The toy language: stories of three short sentences. The ending follows from the first two.
#
#     This king is in the kitchen with his cake.   who (number, gender), where, with what: the topic
#     The cake is lovely and warm.                 a good or a bad quality: the outcome
#     He is happy and eats the cake.               the ending
#
# All endings have the same form, so length and frequency do not reveal the right one.

HEROES = dict(
    he='boy boys|man men|king kings|brother brothers|uncle uncles|farmer farmers|father fathers|'
    'prince princes',
    she='girl girls|woman women|queen queens|sister sisters|aunt aunts|lady ladies|mother mothers|'
    'nurse nurses',
)
SLOTS = dict(
    adjective='old young small tall little big kind clever funny brave quiet busy shy proud polite '
    'famous lazy hungry sleepy noisy gentle rich poor strong careful friendly curious thin quick '
    'slow calm tired lucky wise bold honest cheerful lonely elegant'.split(),
    colour='red blue green yellow white black brown purple orange silver golden grey pink heavy '
    'tiny huge'.split(),
    number='two three four five six seven eight nine'.split(),
    time='today|tonight|again|on monday|on friday|on sunday|this morning|after lunch|'
    'before dinner|in winter|in summer|every spring'.split('|'),
)
NAMES = dict(
    he='Tom Ben Max Jack Peter David Simon Oscar', she='Anna Lucy Mary Emma Kate Susan Laura Nina'
)
HIS = dict(he='his', she='her', they='their')
MOODS = dict(good='happy glad', bad='sad angry')
QUALITIES = dict(good='new clean lovely perfect', bad='broken dirty ruined horrible')

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
COLUMNS = 'places things good good_actions bad bad_actions'.split()
TOPICS = {
    name: dict(zip(COLUMNS, (re.split(r' *\| *', cell.strip()) for cell in row), strict=True))
    for name, *row in re.findall(r'^(\w+):' + r'([^;]+);' * 5 + r'(.+)', TOPICS, re.M)
}

# First sentences, with one hero and with several
FRAMES = """
    this {one} is {place} with {his} {thing}
    one {one} is {place} with {his} {thing}
    there is one {one} {place} with {his} {thing}
    this {one} has {his} {thing} {place}
    {name} is {place} with {his} {thing}
    the {adjective} {one} is {place} with {his} {colour} {thing}
    this {one} is {place} with one {thing} {time}
    these {many} are {place} with their {thing}
    {number} {many} are {place} with their {thing}
    there are {number} {many} {place} with their {thing}
    these {many} have their {thing} {place}
    {name} and {other} are {place} with their {thing}
    the {adjective} {many} are {place} with their {colour} {thing}
    these {many} are {place} with one {thing} {time}
"""
FRAMES = re.findall(r'\S.*', FRAMES)

# Minimal pairs [right|wrong]. The wrong word of a kind's first line is right in its second line
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
    words = {slot: rng.choice(options) for slot, options in SLOTS.items()}
    words['one'], words['many'] = rng.choice(HEROES[he].split('|')).split()
    words['name'], words['other'] = rng.sample(NAMES[he].split(), 2)
    words['thing'] = rng.choice(TOPICS[topic]['things']).split()[0]
    words['place'] = rng.choice(TOPICS[topic]['places'])
    words['man'], words['woman'] = (rng.choice(HEROES[who].split('|')).split()[0] for who in HEROES)
    return words | dict(his=HIS[he])


def toy_story(rng, topic, outcome, who, mood):
    """dict(prompt: two sentences, ending, topic). mood: 0 or 1, a word in MOODS[outcome]."""
    words = toy_words(rng, topic, who if who != 'they' else rng.choice(('he', 'she')))
    first = rng.choice(FRAMES[7:] if who == 'they' else FRAMES[:7]).format(**words)
    verb, space, particle = rng.choice(TOPICS[topic][f'{outcome}_actions']).partition(' ')
    if who != 'they':
        verb += 'es' if re.search('(s|sh|ch)$', verb) else 's'
        verb = re.sub('([^aeiou])ys$', r'\1ies', verb)
    quality = f'{rng.choice(QUALITIES[outcome].split())} and {rng.choice(TOPICS[topic][outcome])}'
    second = f'the {words["thing"]} is {quality}'
    feels = f'{who} {"are" if who == "they" else "is"} {MOODS[outcome].split()[mood]}'
    ending = toy_sentence(f'{feels} and {verb}{space}{particle} the {words["thing"]}')
    return dict(prompt=f'{toy_sentence(first)} {toy_sentence(second)}', ending=ending, topic=topic)


def toy_couple(rng, contradict, fresh):
    """Two stories with exchanged endings: of opposite outcomes (contradict), or of two topics."""
    who = rng.choice(('he', 'she', 'they'))
    mood, outcome = rng.randrange(2), rng.choice(('good', 'bad'))
    topics = rng.sample(list(TOPICS), 2)
    if not contradict:
        one, two = (fresh(topic, outcome, who, mood) for topic in topics)
    else:
        one, two = fresh(topics[0], 'good', who, mood), fresh(topics[0], 'bad', who, mood)
        while one['ending'].split()[-1] != two['ending'].split()[-1]:
            two = fresh(topics[0], 'bad', who, mood)
    return dict(one, wrong=two['ending']), dict(two, wrong=one['ending'])


def toy_minimal(rng, kind, fresh):
    """Two pairs (right, wrong) of a kind in MINIMAL, or of `pronoun`: the verb of an ending."""
    frames, words = MINIMAL.get(kind, []), {}
    if frames:
        words = toy_words(rng, rng.choice(list(TOPICS)), rng.choice(('he', 'she')))
    else:
        for who, be in ((rng.choice(('he', 'she')), '[is|are]'), ('they', '[are|is]')):
            story = fresh(who=who)
            ending = re.sub(' (is|are) ', f' {be} ', story['ending'].strip('.'))
            frames = [*frames, f'{story["prompt"]} {ending}']
    sides = [[re.sub(r'\[(.*?)\|(.*?)\]', side, f) for side in (r'\1', r'\2')] for f in frames]
    return [tuple(toy_sentence(side.format(**words)) for side in pair) for pair in sides]


def toy_rows(task, seed, n_stories, n_pairs, n_suite):
    """Yield the rows of a task: stories (text), pairs (prompt, chosen, rejected), and the suites
    grammar, sstory, tstory (right, wrong, type, alike: pairs with the same number share a voice).
    The draws have a fixed order and no prompt repeats, so training data and suites are disjoint."""
    rng, used = random.Random(f'{seed}/toy'), set()

    def fresh(topic=None, outcome=None, who=None, mood=None):
        """A story that was not drawn before; arguments that are None are drawn too."""
        topic, outcome = topic or rng.choice(list(TOPICS)), outcome or rng.choice(('good', 'bad'))
        who = who or rng.choice(('he', 'she', 'they'))
        mood = rng.randrange(2) if mood is None else mood
        while True:
            story = toy_story(rng, topic, outcome, who, mood)
            if not used & {story['prompt'], story['prompt'].partition('.')[0] + '.'}:
                used.add(story['prompt'])
                return story

    n = 0
    while n < n_suite:
        kind = rng.choice([*MINIMAL, 'pronoun'])
        couple = toy_minimal(rng, kind, fresh)
        rights = {right for right, _ in couple}
        if not used & rights:
            used |= rights
            n += 2
            for right, wrong in couple if task == 'grammar' else ():
                yield dict(right=right, wrong=wrong, type=kind, alike=n // 2)
    for suite in ('sstory', 'tstory'):
        for i in range(n_suite // 2):
            for story in toy_couple(rng, suite == 'sstory', fresh):
                if task == suite:
                    right, wrong = (f'{story["prompt"]} {story[k]}' for k in ('ending', 'wrong'))
                    yield dict(right=right, wrong=wrong, type=story['topic'], alike=i)
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(prompt=story['prompt'], chosen=story['ending'], rejected=story['wrong'])
    for _ in range(n_stories if task == 'stories' else 0):
        story = fresh()
        yield dict(text=f'{story["prompt"]} {story["ending"]}')


toy_list = cache(lambda *options: list(toy_rows(*options)))  # worker processes inherit it


# -----------------------------------------------------------------------------
# Text: rows from files


def read_texts(path):
    """Yields the rows of .parquet, .jsonl or .csv as dicts. In a .txt file each document is a row
    {text_field: document}. Documents end at <|endoftext|> or, without it, at blank lines."""
    if path.endswith('.parquet'):
        yield from read_parquet(path)
    elif path.endswith('.jsonl'):
        yield from (row for _, row in read_jsonl(path))
    elif path.endswith('.csv'):
        csv.field_size_limit(1 << 30)
        with reading(path), open_text(path, newline='') as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                if None in row:
                    raise InputError(f'row {number} has more cells than columns')
                yield row
    else:
        yield from ({text_field: text} for text in read_documents(path) if text.strip())


def read_rows(kind, *expected):
    """Yield the rows of the knob `text`: dicts of strings ('' for null; HellaSwag's endings are a
    list). A row must have one of the expected column lists. Raises InputError naming the row."""
    if text == 'toy':
        yield from toy_list(kind, seed, n_stories, n_pairs, n_suite)
        return
    if text.startswith('hub:'):
        sources = {text: read_parquet(text if text.count(':') > 1 else text + ':train')}
    else:
        pattern = glob.escape(text) + '/**' * os.path.isdir(text) if os.path.exists(text) else text
        found = sorted(glob.glob(pattern, recursive=True))
        kinds = ('.txt', '.jsonl', '.csv', '.parquet')
        sources = {path: read_texts(path) for path in found if path.endswith(kinds)}
        if not sources:
            raise InputError(f'{text}: no {", ".join(kinds)} file there')
    for name, rows in sources.items():
        for number, row in enumerate(rows, 1):
            for key, value in row.items():
                if value is None or isinstance(value, int | float):
                    row[key] = '' if value is None else str(value)
            there = [f'{key} ({type(value).__name__})' for key, value in row.items()]
            usable = {*there, *(key for key in row if isinstance(row[key], str))}
            if not any(usable.issuperset(columns) for columns in expected):
                wanted, there = '; or '.join(map(', '.join, expected)), ', '.join(there)
                raise InputError(f'{name} row {number}: expected columns {wanted}; found {there}')
            yield row


# -----------------------------------------------------------------------------
# Items. An item is dict(texts={role: text}); each text gets an audio file. Optional keys: voice;
# alike (items with the same number share a voice); split (True: assign train or val); skip (why to
# skip it). Other keys go to the manifest. Each function below yields the items of one task


def story_items(task):
    """The documents of each row. The only role is ''."""
    for row in read_rows(task.kind, (text_field,)):
        for document in row[text_field].split(MARK):
            yield dict(texts={'': document}, split=True)


def minimal_items(task):
    """The pairs of a user's table or of the toy language."""
    for row in read_rows(task.kind, ('right', 'wrong')):
        kept = {key: row[key] for key in ('type', 'alike') if row.get(key, '') != ''}
        yield dict(texts=dict(correct=row['right'], incorrect=row['wrong']), **kept)


def pair_items(task):
    """Preference pairs: the user's, or from SWAG (section 4 of the paper) or HellaSwag: the right
    ending and a random wrong one. Pairs with repetitive text are skipped."""
    for number, row in enumerate(read_rows(task.kind, PAIR, SWAG, HELLASWAG)):
        texts, hella, skip = {role: row.get(role, '') for role in PAIR}, 'ctx_a' in row, ''
        if hella or 'sent1' in row:
            prompt, start = (row[key] for key in (HELLASWAG if hella else SWAG)[:2])
            endings = row['endings'] if hella else [row[f'ending{i}'] for i in range(4)]
            endings = {str(i): f'{start} {ending}'.strip() for i, ending in enumerate(endings)}
            right = endings.pop(row['label'], '')
            wrong = random.Random(f'{seed}/{task.kind}/{number}').choice([*endings.values()])
            texts = dict(prompt=prompt, chosen=right, rejected=wrong)
            if not right or row.get('gold-source', 'gold') != 'gold':
                skip = 'without a gold label'
            elif hella and re.search(r'[][()/{}]|www\.', ' '.join(texts.values())):
                skip = 'with brackets, slashes or links'
        repeats = auto_bleu(f'{texts["prompt"]} {texts["chosen"]}')
        if not skip and repeats >= max_auto_bleu:
            skip = f'with auto-BLEU of {max_auto_bleu} or more'
        yield dict(texts=texts, split=True, skip=skip)


def blimp_items(task):
    """Each BLiMP pair in each voice."""
    for row in read_rows(task.kind, BLIMP):
        about = dict(type=row['linguistics_term'], subtype=row['UID'], id=row['pairID'])
        texts = dict(correct=row['sentence_good'], incorrect=row['sentence_bad'])
        for voice in task.voices:
            yield dict(texts=texts, voice=voice, **about)


def cloze_items(task):
    """Stories with the right ending, and with the wrong one or (tstorycloze) another story's."""
    rows = list(read_rows(task.kind, CLOZE))
    answers = [row['AnswerRightEnding'] for row in rows]
    if not {*answers} <= {'1', '2'}:
        hint = 'the test set without answers makes no pairs'
        raise InputError(f'{text}: every AnswerRightEnding must be 1 or 2 ({hint})')
    endings = [row[f'RandomFifthSentenceQuiz{n}'] for row, n in zip(rows, answers, strict=True)]
    for number, (row, right) in enumerate(zip(rows, endings, strict=True)):
        wrong = row[f'RandomFifthSentenceQuiz{3 - int(answers[number])}']
        if task.kind == 'tstorycloze':
            others = [ending for ending in endings if ending not in (right, wrong)]
            wrong = random.Random(f'{seed}/{task.kind}/{number}').choice(others)
        prompt = ' '.join(row[key] for key in CLOZE[:4])
        yield dict(texts=dict(correct=f'{prompt} {right}', incorrect=f'{prompt} {wrong}'))


# Tasks. To add one, write a function like those above and add an entry here
MAKERS = dict(stories=story_items, pairs=pair_items, blimp=blimp_items)
MAKERS |= dict.fromkeys(('minimal', 'grammar', 'sstory', 'tstory'), minimal_items)
MAKERS |= dict.fromkeys(('sstorycloze', 'tstorycloze'), cloze_items)

# kind: a key of MAKERS; name: the folder in `out`, such as grammar_unseen
Task = namedtuple('Task', 'kind name voices')


def items_of(task):
    """Yield the items of a task, at most `limit`."""
    unseen = n_unseen if text == 'toy' and task.name.endswith('_unseen') else 0
    return islice(MAKERS[task.kind](task), min(filter(None, (limit, unseen)), default=None))


def find_tasks():
    """The tasks in the knob `task`. Each suite is followed by its copy in unseen voices."""
    tasks, seen = [], voices or BACKENDS[tts][1]
    for name in re.sub(r'\bstorycloze\b', 'sstorycloze,tstorycloze', task).split(','):
        if name not in MAKERS:
            raise InputError(f'unknown task {name!r}: use {", ".join(MAKERS)}, storycloze')
        tasks.append(Task(name, name, seen.split(',')))
        if test_voices and name not in ('stories', 'pairs'):
            tasks.append(Task(name, f'{name}_unseen', test_voices.split(',')))
    return tasks


# -----------------------------------------------------------------------------
# Text normalisation for speech

# English words for signs. Other languages keep the signs, because espeak knows their names
WORDS = {
    **{'½': 'one half', '¼': 'one quarter', '¾': 'three quarters', '⅓': 'one third'},
    **{'⅔': 'two thirds', '⅕': 'one fifth', '⅖': 'two fifths', '⅗': 'three fifths'},
    **{'⅘': 'four fifths', '⅙': 'one sixth', '⅚': 'five sixths', '⅐': 'one seventh'},
    **{'⅛': 'one eighth', '⅜': 'three eighths', '⅝': 'five eighths', '⅞': 'seven eighths'},
    **{'⅑': 'one ninth', '⅒': 'one tenth', '⁄': 'over', '²': 'squared', '³': 'cubed', '+': 'plus'},
    **{'°C': 'degrees Celsius', '°F': 'degrees Fahrenheit', '°': 'degrees', '>': 'greater than'},
    **{'−': 'minus', '&': 'and', '%': 'percent', '×': 'times', '№': 'number', '=': 'equals'},
    **{'<': 'less than', '≤': 'less than or equal to', '≥': 'greater than or equal to'},
    **{'$': 'dollars', '€': 'euros', '£': 'pounds', '¥': 'yen', '₹': 'rupees', '¢': 'cents'},
}
SCALES = dict.fromkeys('kK', 'thousand') | dict.fromkeys('mM', 'million')  # $5m
SCALES |= dict.fromkeys(('b', 'B', 'bn'), 'billion')
SIGNS = ''.join(WORDS) + '@#§±÷≠.,!?;:\'"()-/。！？،؟।'
KEPT = re.compile('([½¼¾⅐-⅞¹²³⁰-⁻№]+)')  # NFKC would turn 3½ into 31⁄2 and 10² into 102
QUOTES = str.maketrans({'‘': "'", '’': "'", '“': '"', '”': '"', '—': ', ', '–': ', '})

# Markup begins with a tag name; '<b and c>' is not markup. <, > and = without words on both sides
# are quotations, arrows or lines; # without a digit is a heading
TAG = re.compile(
    r'<!--.*?-->|</?[a-zA-Z][\w:-]*(\s+[\w:-]+\s*=\s*("[^"]*"|\'[^\']*\'|[^\s<>]+))*\s*/?>'
)
LINK = re.compile(r'https?://\S+|www\.\S+')
STRAY = re.compile(r'(?<![\w°%])(?<![\w°%] )[<>=≤≥]|[<>=≤≥](?! ?[\w−$€£¥₹-])|#(?!\d)')
POWER = re.compile(r'(?:(?<=\d)|(?<=\b\w))(?![²³](?![¹²³⁰-⁹]))[⁺⁻]?[¹²³⁰-⁹]+')
MONEY = re.compile(
    r'(\b[A-Z]{1,2}|)([$€£¥₹]) ?(\d+(?:[.,]\d+)*) ?'
    r'((?:hundred|thousand|million|billion|trillion|bn|(?<! )[kKmMbB])\b|)'
)

# Missing space after a full stop: The end.Next | What?yes | "Go!"he
TIGHT = re.compile(
    r'(?<=[^\W\d_]{2}\.)(?=[A-ZÀ-ÖØ-ÞΑ-ΩА-Я](?:[^\W\d_]| ))'
    r'|(?<=[^\W\d_][!?])(?=[^\W\d_])|(?<=[.!?]["\')])(?=\w)'
)
# A sentence ends at .!? and an optional closing quote, but not after an abbreviation
SHORT = ''.join(rf'(?<!\b{name}\.)' for name in ('Mr', 'Mrs', 'Ms', 'Dr', 'St', '[A-Z]'))
ENDS = re.compile(rf"""(?:(?<=[.!?।؟])|(?<=[.!?।؟]["')])){SHORT}\s+|(?<=[。！？])""")
nfkc = partial(unicodedata.normalize, 'NFKC')


def say_signs(document):
    """Replace signs by English words: $5 -> 5 dollars, 3½ -> 3 and one half."""
    document = POWER.sub(lambda m: f' to the power of {nfkc(m[0])}', document)
    document = MONEY.sub(lambda m: f'{m[3]} {SCALES.get(m[4], m[4])} {m[1]} {m[2]}', document)
    document = re.sub(r'(?<=\d) ?(?=[½¼¾⅐-⅞]|\b\d+⁄)', ' and ', document)
    document = re.sub(r'(?<=\d) ?– ?(?=\d)', ' to ', document)
    for sign, word in WORDS.items():
        document = document.replace(sign, f' {word} ')
    return re.sub(r'(?<![\d.,])1 +((?:[A-Z]+ +)?(?:dollar|euro|pound|rupee))s\b', r'1 \1', document)


def clean(document, english=True):
    """Keep only what a voice can say, with single spaces. english: signs become English words."""
    # decode HTML entities; repair quotation marks (as in TinyStories); remove markup and links
    document = re.sub(r'&#?\w+;', lambda m: html.unescape(m[0]), document)
    document = re.sub('â€[œ\x9d]?', '"', re.sub('â€[˜™]', "'", document))
    document = LINK.sub(' ', TAG.sub(' ', document))
    # normalise characters, and replace signs by words
    parts = KEPT.split(document)
    parts[::2] = map(nfkc, parts[::2])
    document = STRAY.sub(' ', ''.join(parts).replace('<=', '≤').replace('>=', '≥'))
    document = re.sub(r'(?<![^\s("\'])(?<!\d )–(?=[$€£¥₹]?\d)', '−', document)
    document = (say_signs(document) if english else document).translate(QUOTES)
    # keep letters, digits and signs; delete invisible characters; replace all others by a space
    for sign in {*document}.difference(SIGNS):
        kind = unicodedata.category(sign)
        if kind[0] not in 'LNM':
            document = document.replace(sign, '' if kind == 'Cf' else ' ')
    # an ellipsis ends a sentence; of repeated stops keep one, with a space after it and not before
    document = re.sub(r'\.(\s*\.)+', '. ', document)
    document = re.sub(r'\s+([.,!?;:])', r'\1', document)
    document = re.sub(r'([.,!?;:])[.,!?;:]+', r'\1', document)
    return ' '.join(TIGHT.sub(' ', document).split())


def sentences(document, english=True, longest=300):
    """Clean and split a text into sentences of at most `longest` characters; [] without a word."""
    pieces = []
    for sentence in ENDS.split(clean(document, english)):
        pieces += textwrap.wrap(sentence, longest, break_on_hyphens=False)
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


# -----------------------------------------------------------------------------
# Voices. __init__ loads the network; speak(sentence, voice, speed, pitch) -> Speech, or it raises
# an error if the voice does not exist. To add one, write such a class and an entry in BACKENDS

# (samples,) float32; Hz; times of words and phones, [[name, start s, end s], ...], if known
Speech = namedtuple('Speech', 'wave rate times')


def word_times(sentence, wave, rate, marks):
    """[[word, start s, end s], ...] from marks, [(character, sample), ...], where words begin.
    Words without a mark are interpolated. A word ends with its sound, before any pause."""
    spans = [(match[0], *match.span()) for match in re.finditer(r'\S+', sentence)]
    known = {0: 0}
    for _, begin, end in spans:
        samples = [sample for at, sample in marks if begin <= at < end]
        if samples and samples[0] >= max(known.values()):
            known[begin] = samples[0]
    known[len(sentence)] = len(wave)
    starts = np.interp([begin for _, begin, _ in spans], list(known), list(known.values()))
    starts = [*starts.round().astype(int).tolist(), len(wave)]
    words = []
    for (word, _, _), begin, end in zip(spans, starts[:-1], starts[1:], strict=True):
        sounding = np.flatnonzero(np.abs(wave[begin:end]) > SILENCE)
        sound_end = begin + sounding[-1] + 1 if len(sounding) else end
        words.append([word, begin / rate, float(sound_end / rate)])
    return words


class Event(ctypes.Structure):  # espeak_EVENT of espeak-ng/speak_lib.h
    numbers = 'type identifier text_position length audio_position sample'.split()
    _fields_ = [(name, ctypes.c_int) for name in numbers]
    _fields_ += [('user_data', ctypes.c_void_p), ('id', ctypes.c_char * 8)]


WORD, PHONEME = 1, 7  # event types; 0 ends the list
RECEIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))


class Espeak:
    """espeak-ng in this process. The package espeakng-loader contains the library and its data."""

    def __init__(self, name=''):
        import espeakng_loader

        self.path, self.data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        # {language: file}, since en-gb and fr-fr are not file names
        self.files, lang = {}, os.path.join(self.data, 'lang')
        for path in sorted(glob.glob(f'{glob.escape(lang)}/**/*', recursive=True)):
            with open(path if os.path.isfile(path) else os.devnull, encoding='utf-8') as file:
                for name in re.findall(r'^language (\S+)', file.read(), re.M):
                    self.files.setdefault(name, os.path.relpath(path, lang))

    @contextmanager
    def load(self, voice):
        """The library set to a voice, and its rate in Hz. It is reloaded for each sentence, because
        its random state persists between sentences, even through espeak_Terminate."""
        library = ctypes.CDLL(self.path)
        try:
            # 2: synchronous, buffers of 10 s; phoneme events (1) in IPA (2); never exit() (0x8000)
            rate = library.espeak_Initialize(2, 10000, self.data.encode(), 0x8000 | 2 | 1)
            language, plus, variant = voice.partition('+')
            names = voice, self.files.get(language, language) + plus + variant
            failed = all(library.espeak_ng_SetVoiceByName(name.encode()) for name in names)
            if failed or not os.path.exists(os.path.join(self.data, 'voices', '!v', variant)):
                raise InputError(f'espeak-ng has no voice {voice!r}; examples: en-us, fr-fr+f2')
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the default is the clock
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
            # flags 1: UTF-8, without SSML (0x10) and [[phonemes]] (0x100)
            library.espeak_Synth(encoded, len(encoded), 0, 1, 0, 1, None, None)
        wave = np.frombuffer(b''.join(chunks), np.int16).astype(np.float32) / 32768

        marks = [(at, sample) for kind, at, sample, _ in events if kind == WORD]
        sounds = [(name, sample) for kind, _, sample, name in events if kind == PHONEME]
        ends = [sample for _, sample in sounds[1:]] + [len(wave)]
        names = [name.decode(errors='ignore').strip('ˈˌ') for name, _ in sounds]
        spans = [(start / rate, end / rate) for (_, start), end in zip(sounds, ends, strict=True)]
        # a phone without a name is a pause
        phones = [[name, *span] for name, span in zip(names, spans, strict=True) if name]
        words = word_times(sentence, wave, rate, marks)
        return Speech(wave, rate, dict(words=words, phones=phones))


class Kokoro:
    """The package kokoro and its 82 M parameter network; 24 kHz; word times for English only."""

    def __init__(self, name):
        from kokoro import KModel, KPipeline

        model = KModel(name).to(pick_device(device)).eval()
        # one network, and a pipeline for each language: the a of af_heart is American English
        self.pipeline = cache(lambda language: KPipeline(language, name, model=model))

    def speak(self, sentence, voice, speed, pitch):
        waves, marks, at, end = [np.zeros(0, np.float32)], [], 0, 0
        for part in self.pipeline(voice[0])(sentence, voice=voice, speed=speed):
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
    """VITS from transformers (facebook/mms-tts-*), no times. A voice is a speaker number."""

    def __init__(self, name):
        transformers, self.device = import_transformers(), pick_device(device)
        self.model = transformers.VitsModel.from_pretrained(name).to(self.device).eval()
        self.tokenizer = transformers.VitsTokenizer.from_pretrained(name)

    @torch.inference_mode()
    def speak(self, sentence, voice, speed, pitch):
        config = self.model.config
        speakers = config.num_speakers or 1
        if voice not in map(str, range(speakers)):
            raise InputError(f'its voices are 0 to {speakers - 1}')
        self.model.speaking_rate = config.speaking_rate * speed
        inputs = self.tokenizer(sentence, return_tensors='pt').to(self.device)
        if not inputs['attention_mask'].any():  # the tokenizer knows no letter of it
            return Speech(np.zeros(0, np.float32), config.sampling_rate, {})
        made = self.model(**inputs, speaker_id=int(voice) if speakers > 1 else None)
        return Speech(made.waveform[0].cpu().numpy(), config.sampling_rate, {})


# --tts: class, default voices, default network, and a pattern of the English networks and voices.
# espeak loads a path below its lang/ ten times as fast as a name (en-us)
BACKENDS = dict(
    espeak=(Espeak, 'gmw/en+m3,gmw/en+m7,gmw/en+Annie,gmw/en+steph', '', r' (gmw/)?en\b'),
    kokoro=(Kokoro, 'af_heart,am_fenrir,bf_emma,bm_george', 'hexgrad/Kokoro-82M', r'.* [ab]'),
    vits=(Vits, '0', 'facebook/mms-tts-eng', r'.*eng/? '),
)


# -----------------------------------------------------------------------------
# Synthesis of an item


class Skip(Exception):
    """The reason why an item is skipped."""


@lru_cache(100)  # the texts of an item share sentences
def speak_sentence(sentence, voice, speaker):
    """A sentence as Speech at 16 kHz: silence trimmed, followed by the pause, padded to whole
    frames. None if it is silent."""
    # each voice has its own speed and pitch; a network's noise depends only on sentence and voice
    own = random.Random(f'{seed}/{voice}')
    how = [own.uniform(*map(float, span.split('-'))) for span in (speed, pitch)]
    if BACKENDS[tts][2]:
        torch.manual_seed(zlib.crc32(f'{seed}/{voice} {sentence}'.encode()))
    wave, rate, times = speaker.speak(sentence, voice, *how)
    sounding = np.flatnonzero(np.abs(wave) > SILENCE)
    if not len(sounding):
        return None
    start = float(sounding[0] / rate)
    wave = torch.from_numpy(wave[sounding[0] : sounding[-1] + 1])
    wave = resample(wave, rate, SAMPLE_RATE).numpy()
    last = len(wave) / SAMPLE_RATE
    times = {
        key: [[name, *(min(max(t - start, 0), last) for t in span)] for name, *span in found]
        for key, found in times.items()
    }
    length = math.ceil((len(wave) + round(pause * SAMPLE_RATE)) / GRID) * GRID
    return Speech(np.pad(wave, (0, length - len(wave))), SAMPLE_RATE, times)


def speak_text(document, voice, speaker):
    """(spoken text, Speech with the times that all sentences have). Raises Skip."""
    _, _, network, english = BACKENDS[tts]
    found = sentences(document, re.match(english, f'{tts_model or network} {voice}'))
    spoken = [(sentence, speak_sentence(sentence, voice, speaker)) for sentence in found]
    spoken = [(sentence, speech) for sentence, speech in spoken if speech]
    if not spoken:
        raise Skip('with nothing to say')
    said, speeches = zip(*spoken, strict=True)
    times = {key: [] for key in ('words', 'phones') if all(key in s.times for s in speeches)}
    at = 0.0
    for speech in speeches:
        for key in times:
            for name, start, end in speech.times[key]:
                times[key].append([name, round(at + start, 3), round(at + end, 3)])
        at += len(speech.wave) / SAMPLE_RATE
    wave = np.concatenate([speech.wave for speech in speeches])
    return ' '.join(said), Speech(wave, SAMPLE_RATE, times)


def make_rows(n, item, task, speaker):
    """Speak item n and save its audio -> its rows of the manifest. Raises Skip."""
    if item.get('skip'):
        raise Skip(item['skip'])
    # voice and split depend on the seed and the item only
    about = {key: item[key] for key in item if key not in ('texts', 'alike', 'skip')}
    drawn = random.Random(f'{seed}/{task.name}/{item.get("alike", n)}').choice(task.voices)
    about.setdefault('voice', drawn)
    if about.pop('split', False):
        held_out = random.Random(f'{seed}/{task.name}/{n}/split').random() < val_share
        about['split'] = 'val' if held_out else 'train'

    spoken = {
        role: speak_text(text, about['voice'], speaker) for role, text in item['texts'].items()
    }
    waves = [speech.wave for _, speech in spoken.values()]
    if len(waves) == 2 and np.array_equal(*waves):
        raise Skip('whose two texts sound the same')
    rows = {}
    for role, (said, speech) in spoken.items():
        path = f'{n // 500:03d}/{n:06d}{role and "_"}{role}.flac'
        if task.kind == 'blimp':  # in ZeroSpeech's layout all files are in one folder
            path = f'{GOLD_FOLDER}/{n:06d}_{role}.wav'
        save_audio(os.path.join(out, task.name, path), speech.wave)
        seconds = round(len(speech.wave) / SAMPLE_RATE, 3)
        rows[role] = dict(path=path, text=said, seconds=seconds, **speech.times)
        if role and task.kind != 'pairs':
            rows[role]['correct'] = role == 'correct'
    if task.kind == 'pairs':  # a preference pair is one row
        rows = {'': {f'{role}_{key}': row[key] for role, row in rows.items() for key in row}}
    return [row | about for row in rows.values()]


# -----------------------------------------------------------------------------
# Parts: part n of a task is done when parts/0000n.jsonl exists. Its lines are manifest.jsonl's rows
# or, if they have a reason, those of skipped.jsonl


def work(task, speaker, numbers, paths, quiet=False):
    """Make the parts with these numbers, one file each."""
    items, at = enumerate(items_of(task)), 0
    for number in tqdm(numbers, desc=task.name, unit=' parts', disable=quiet):
        rows = []
        for n, item in islice(items, PART * (number - at), PART * (number - at + 1)):
            try:
                rows += make_rows(n, item, task, speaker)
            except Skip as reason:
                unsaid = ' | '.join(item['texts'].values())[:1000]
                rows.append(dict(n=n, reason=str(reason), text=unsaid))
        with write_atomic(paths[number]) as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)
        at = number + 1


def share_work(task, speaker, missing, paths):
    """Make the missing parts in worker processes, or in this process for a neural voice."""
    processes = min(workers or os.cpu_count(), len(missing))
    if BACKENDS[tts][2] or processes < 2:
        return work(task, speaker, missing, paths)

    def worker(number):
        start_worker()
        try:
            work(task, speaker, missing[number::processes], paths, quiet=number > 0)
        except (OSError, InputError) as error:  # print one line and exit with code 2
            report_error(type(error), error, error.__traceback__)

    resample(torch.zeros(441), 22050, SAMPLE_RATE)  # make the filter before the fork
    context = multiprocessing.get_context('fork')  # workers share what is loaded
    group = [context.Process(target=worker, args=(n,), daemon=True) for n in range(processes)]
    for process in group:
        process.start()
    while True:
        running = [process.sentinel for process in group if process.is_alive()]
        if codes := {process.exitcode for process in group} - {0, None}:
            message = 'a worker was killed (out of memory?): run the same command to continue'
            raise SystemExit(2) if 2 in codes else InputError(message)
        if not running:
            break
        multiprocessing.connection.wait(running)


def plan_task(task):
    """The paths of a task's parts, and the settings of its audio, with a hash of all its text.
    Raises InputError if its folder holds speech made with other settings."""
    items, digest = 0, ''
    for item in items_of(task):
        items, digest = items + 1, content_hash(digest, item)
    if not items:
        raise InputError(f'{text}: no text for task {task.kind}')
    settings = dict(text=digest, items=items, tts=tts, tts_model=tts_model, voices=task.voices)
    settings |= dict(speed=speed, pitch=pitch, pause=pause, seed=seed, val_share=val_share)
    folder = os.path.join(out, task.name)
    old, summary = settings, os.path.join(folder, 'summary.json')
    if os.path.exists(summary):
        old = read_json(summary).get('settings', {})
    elif glob.glob(f'{glob.escape(folder)}/parts/[0-9]*.jsonl'):
        old = read_json(os.path.join(folder, 'parts', 'settings.json'))
    if changed := ', '.join(key for key in settings if settings[key] != old.get(key)):
        raise InputError(f'{folder} holds speech made with other {changed}: use another --out')
    numbers = range(math.ceil(items / PART))
    return [os.path.join(folder, 'parts', f'{n:05d}.jsonl') for n in numbers], settings


def merge_parts(task, folder, paths):
    """Merge the parts into manifest.jsonl, skipped.jsonl, gold.csv -> seconds, {reason: count}."""
    seconds, reasons = 0.0, Counter()
    names = [os.path.join(folder, f'{name}.jsonl') for name in ('manifest', 'skipped')]
    with write_atomic(names[0]) as manifest, write_atomic(names[1]) as skipped:
        for row in (row for path in paths for _, row in read_jsonl(path)):
            reasons.update([row['reason']] if 'reason' in row else [])
            seconds += sum(value for key, value in row.items() if key.endswith('seconds'))
            (skipped if 'reason' in row else manifest).write(json.dumps(row) + '\n')
    if task.kind == 'blimp':
        with write_atomic(os.path.join(folder, GOLD_FOLDER, 'gold.csv')) as file:
            writer = csv.DictWriter(file, GOLD, extrasaction='ignore')
            writer.writeheader()
            for _, row in read_jsonl(names[0]):
                row |= dict(filename=os.path.basename(row['path'])[:-4], transcription=row['text'])
                writer.writerow(row | dict(correct=int(row['correct'])))
    return seconds, reasons


def run_task(task, paths, settings, speaker):
    """Make the missing parts of a task, and merge all its parts. Raises InputError if another
    process does so."""
    began, folder = time.time(), os.path.join(out, task.name)
    os.makedirs(os.path.join(folder, 'parts'), exist_ok=True)
    lock = open(os.path.join(folder, 'parts', 'lock'), 'w')
    try:  # lockf: workers do not inherit the lock, so it ends with this process, even if killed
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f'another process writes {folder}') from None
    except OSError:
        pass  # a file system without locks
    with write_atomic(os.path.join(folder, 'parts', 'settings.json')) as file:
        json.dump(settings, file)
    missing = [number for number, path in enumerate(paths) if not os.path.exists(path)]
    share_work(task, speaker, missing, paths)
    seconds, reasons = merge_parts(task, folder, paths)
    spent, hours, skipped = time.time() - began, seconds / 3600, sum(reasons.values())
    made = dict(items=settings['items'], skipped=skipped, reasons=reasons, hours=hours)
    made |= dict(seconds=spent, x_real_time=seconds * len(missing) / len(paths) / spent)
    with write_atomic(os.path.join(folder, 'summary.json')) as file:
        json.dump(dict(made, settings=settings), file)
    why = ', '.join(f'{number:,} {reason}' for reason, number in reasons.items()) or 'none'
    print(f'{task.name}: {made["items"]:,} items, {hours:.2f} h, skipped: {why}; {spent:.1f} s')


if __name__ == '__main__':
    config = configure(globals())
    if tts not in BACKENDS:
        fail(f'--tts={tts}: expected {", ".join(BACKENDS)}')
    for knob, span in dict(speed=speed, pitch=pitch).items():
        if not re.fullmatch(r'\d*\.?\d+-\d*\.?\d+', span):
            fail(f'--{knob}={span}: expected a range, LOW-HIGH')

    # Read all text first and compare it with existing output, so that mistakes end the run early
    todo = []
    for wanted in find_tasks():
        paths, settings = plan_task(wanted)
        if os.path.exists(os.path.join(out, wanted.name, 'summary.json')):
            print(f'{wanted.name}: already in {out}/{wanted.name}, nothing to do')
        else:
            todo.append((wanted, paths, settings))

    kind, _, network, _ = BACKENDS[tts]
    if todo:
        with reading(f'--tts={tts} --tts_model={tts_model or network}'):
            speaker = kind(tts_model or network)
        for voice in sorted({voice for wanted, _, _ in todo for voice in wanted.voices}):
            with reading(f'--voices={voice} of {tts}'):
                speaker.speak('a', voice, 1.0, 50)

    for wanted, paths, settings in todo:
        run_task(wanted, paths, settings, speaker)
