"""Every metric of the field, straight from the official downloads, in one table beside the paper's.

    python eval_slm.py --init=out/slam,out/slam-dpo --data_dir=data --tasks=sblimp,swuggy,salmon
    python eval_slm.py --init=out/slam --tasks=sstorycloze,genppl,autobleu --html=out/report.html
    python eval_slm.py --init="out/a-s*,B=out/b-s1+out/b-s2" --tasks=tstorycloze

A pair counts 1 if its correct utterance has the higher log-likelihood, 1/2 on a tie: that of
`<S>` units `<S>`, the mean over every token but the first (the public toolkit's convention).
Checkpoints that differ in their seed alone are an arm, by a pattern or by NAME=A+B: its row is
their mean +- the standard deviation over seeds, and its intervals count seeds.

Tasks, and where they are looked for in data_dir:
    sblimp, swuggy                      ZeroSpeech 2021 as unpacked: syntactic/, lexical/
    babyslm_syntactic, babyslm_lexical  BabySLM as unpacked: babyslm/syntactic/, babyslm/lexical/
    sstorycloze, tstorycloze, salmon    the folders of that name, or parquet files in them
    own, or any other name              your own pairs: NAME=PATH, or NAME in data_dir
        a folder      <id>_correct.wav, <id>_incorrect.wav; type and voice from manifest.jsonl
        .csv, .jsonl  columns correct, incorrect (paths from the file's folder), type, voice
        .parquet      a file, a folder of them or hub:OWNER/NAME: positive_audio, negative_audio
    genppl, autobleu                    on prompt + continuation, as published; with
                                        _continuation behind the name on that alone
    gptscore, utmos                     a judge's opinion, a predictor's of the sound
NAME_unseen beside a suite is scored with it. Of an interleaved model NAME_to_text and
NAME_from_text score the endings of stories in the other modality than their beginnings, alone:
where manifest.jsonl knows the words and their times.

A task that cannot run is 'not run', with the reason, and the exit code is 2.
"""

from config import configure, fail

import base64
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
import time
import urllib.request
from bisect import bisect_right
from collections import defaultdict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import (
    OFFSET,
    SAMPLE_RATE,
    SLM,
    InputError,
    UnitEncoder,
    UnitVocoder,
    auto_bleu,
    dedup,
    find_audio,
    find_checkpoint,
    git_commit,
    load_audio,
    pack_rows,
    pick_device,
    pick_dtype,
    read_jsonl,
    read_parquet,
    tokenize_words,
    write_atomic,
)

# -----------------------------------------------------------------------------
init = 'out/slam'  # checkpoints to compare, comma-separated: folders, hub names, patterns, NAME=A+B
tasks = 'sblimp,sstorycloze,tstorycloze'  # comma-separated, see above
data_dir = 'data'  # holds the suites
split = 'dev'  # of ZeroSpeech 2021 and BabySLM: dev or test
encoder = ''  # name or folder in place of the one each checkpoint names
vocoder = ''
# what is continued, and how (Table 6 of the paper)
prompts = ''  # folder of prompts; '': the correct utterances of sstorycloze, or of the first suite
n_prompts = 1000  # prompts to continue
prompt_seconds = 3.0  # gptscore: at the end of the word nearest to it
max_new_tokens = 150
temperature = 0.8
top_k = 25
top_p = 1.0
repetition_penalty = None  # None: 1.1 after DPO, 1.0 before it
# who listens
asr = 'openai/whisper-large-v3-turbo'  # transcribes for genppl, autobleu and gptscore
text_lm = 'meta-llama/Llama-3.2-1B'  # genppl's
judge = ''  # gptscore's: an OpenAI-compatible URL, such as http://localhost:8000/v1
judge_model = 'gpt-4o'  # what to ask for there; the key is read from $OPENAI_API_KEY
utmos = ''  # a TorchScript file: (1, samples) float at 16 kHz -> the opinion score
# what is written
out = 'out/eval.json'  # beside it NAME.pairs.jsonl, every pair's scores, and eval_cache/, the units
html = ''  # a self-contained page: table, figures, prompts to listen to
paper = 'results'  # rows of config/paper.csv to stand beside: results, data, context, all or none
seed = 1234
device = 'auto'  # cuda, mps or cpu
dtype = 'auto'  # bfloat16 on cuda, else float32
# -----------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.abspath(__file__))
ZEROSPEECH = dict(  # tasks of ZeroSpeech's layout, and their folders
    sblimp='syntactic',
    swuggy='lexical',
    babyslm_syntactic='babyslm/syntactic',
    babyslm_lexical='babyslm/lexical',
)
SALMON = (
    *('bg_alignment', 'bg_all_consistency', 'bg_domain_consistency', 'gender_consistency'),
    *('rir_consistency', 'sentiment_alignment', 'sentiment_consistency', 'speaker_consistency'),
)
LABELS = dict(  # of columns, where they differ from the task's name
    sblimp='sBLIMP',
    swuggy='sWUGGY, all',
    swuggy_in_vocabulary='sWUGGY, in vocabulary',
    sstorycloze='sSC',
    tstorycloze='tSC',
)
# what may follow a task's name: endings in the other modality than beginnings; in words
CROSSINGS = {'_to_text': ', speech → text', '_from_text': ', text → speech'}
# what GenPPL and auto-BLEU of the paper were measured with (section 4 and Table 6)
PAPER_SAMPLING = dict(
    prompt_seconds=3.0, max_new_tokens=150, temperature=0.8, top_k=25, top_p=1.0, n_prompts=1000
)
SMALL = 50  # fewer pairs are said to be few
BANDS = ('oov', '1-5', '6-20', '21-100', '>100')  # how often LibriSpeech has the word
JUDGE = r"""A speech model heard the beginning of a recording and went on speaking. Below are the
transcripts of both. Judge how relevant the continuation is to the beginning and how likely it is to
follow it, on a scale from 1 (very unlikely and irrelevant) to 5 (very likely and highly relevant).
Do not mind small mistakes of the transcription, nor that the continuation stops before its end.
Write a brief analysis first, then close with: "The final answer is \boxed{x}", where x is 1 to 5.

Beginning: %s
Continuation: %s"""

# A recording: its files, laid end to end, `seconds` of their beginning (0: all), or what follows
# `start` seconds
Clip = namedtuple('Clip', 'files seconds start', defaults=(0.0, 0.0))
# A story whose beginning and ending differ in modality: one is speech, a Clip, the other text. The
# ending alone is scored, which is in the modality `to`: 'text' or 'speech'
Crossing = namedtuple('Crossing', 'speech text to')
# What is scored: pairs, of make_pair; split, of the suite; official: the paper's own audio
Suite = namedtuple('Suite', 'pairs split official', defaults=('', False))
# A checkpoint and what it hears and speaks through; sampling: the arguments of model.generate
Speaker = namedtuple('Speaker', 'name model encoder vocoder sampling device')
# What became of a checkpoint's tasks: {task: result, or dict(not_run=reason)}, {task: {pair or
# prompt: value}}, what the results are means of, rows of the pairs file, and how it was sampled
Scores = namedtuple('Scores', 'results items rows sampling')


# -----------------------------------------------------------------------------
# Suites: folders and files -> pairs. A new layout is a function that returns pairs, called in
# list_suite


def make_pair(key, pos, neg, about=None, **more):
    """A pair as dict: id, voice, types (it counts in the score of each), pos and neg (what is
    compared, each a Clip or Crossing), text and words (of pos, where known).

    about: what a manifest knows of its correct utterance (voice, type, text, words).
    """
    about = about or {}
    kind = str(about.get('type') or '')
    pair = dict(id=str(key), voice=str(about.get('voice') or ''), types=[kind] if kind else [])
    pair |= dict(pos=pos, neg=neg, text=about.get('text') or '', words=about.get('words') or [])
    return pair | more


def read_manifest(folder):
    """{path: row} of a folder's manifest.jsonl; {} if there is none."""
    path = os.path.join(folder, 'manifest.jsonl')
    rows = read_jsonl(path) if os.path.exists(path) else ()
    named = [row for _, row in rows if isinstance(row.get('path'), str)]
    return {os.path.normpath(os.path.join(folder, row['path'])): row for row in named}


def list_folder(folder):
    """Pairs of a folder: StoryCloze's <n>_correct, <n>_incorrect (with <n>_mutual these are two
    endings of that beginning) or a part of SALMon, sample_<n>_*, where the first name is correct.

    Sub-folders that repeat the same n are voices.
    """
    files = [os.path.normpath(file) for file in find_audio(folder)]
    rule, layout = r'(.+)_(correct|incorrect|mutual)', '<n>_correct, <n>_incorrect'
    if all(os.path.basename(file).startswith('sample_') for file in files):
        rule, layout = r'(.*?sample_\d+)_(.*)', 'two files sample_<n>_*.wav for each n'

    # {n, with its sub-folder: {side: file}}
    sides = defaultdict(dict)
    for file in files:
        match = re.fullmatch(rule, os.path.splitext(os.path.relpath(file, folder))[0])
        if not match or match[2] in sides[match[1]]:
            why = 'a second file of this name' if match else 'unknown file'
            raise InputError(f'{file}: {why}, expected {layout}')
        sides[match[1]][match[2]] = file

    manifest, pairs = read_manifest(folder), []
    by_voice = len({os.path.basename(key) for key in sides}) < len(sides)
    for key, side in sides.items():
        mutual = [side.pop('mutual')] if 'mutual' in side else []
        if len(side) != 2:
            why = 'has no counterpart' if len(side) < 2 else 'and more'
            raise InputError(f'{min([*side.values(), *mutual])} {why}: expected {layout}')
        pos, neg = (side[name] for name in sorted(side))  # 'correct' < 'incorrect'
        pair = make_pair(key, Clip((*mutual, pos)), Clip((*mutual, neg)), manifest.get(pos))
        if by_voice:
            pair |= dict(id=os.path.basename(key), voice=pair['voice'] or os.path.dirname(key))
        pairs.append(pair)
    return pairs


def read_csv(path):
    """Rows of a .csv file as dicts. Raises InputError where it is none."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f'{path}: {getattr(error, "strerror", None) or error}') from None


def list_table(path):
    """Pairs of a .csv or .jsonl: the columns correct and incorrect (paths, from the file's folder),
    type and voice."""
    is_csv = path.endswith('.csv')
    pairs = []
    for line, row in enumerate(read_csv(path), 2) if is_csv else read_jsonl(path):
        names = row.get('correct'), row.get('incorrect')
        if not all(isinstance(name, str) for name in names):
            raise InputError(f'{path}, line {line}: expected correct and incorrect, paths of audio')
        pos, neg = (Clip((os.path.join(os.path.dirname(path), name),)) for name in names)
        pairs.append(make_pair(row.get('id', line), pos, neg, row))
    return pairs


def list_parquet(where, cache):
    """Pairs of rows with positive_audio and negative_audio; their sound is unpacked in `cache`."""
    name = hashlib.sha256(os.path.abspath(where).encode()).hexdigest()[:16]
    folder = os.path.join(cache, 'parquet_' + name)
    pairs = []
    for i, row in enumerate(read_parquet(where)):
        clips = []
        for side in ('positive_audio', 'negative_audio'):
            sound = (row.get(side) or {}).get('bytes')
            if not sound:
                wanted = 'expected bytes in positive_audio and negative_audio'
                raise InputError(f'{where}, row {i}: {wanted}')
            file = os.path.join(folder, f'{i:06d}_{side}.wav')
            if not os.path.exists(file) or os.path.getsize(file) != len(sound):
                with write_atomic(file, 'wb') as unpacked:
                    unpacked.write(sound)
            clips.append(Clip((file,)))
        about = dict(voice=row.get('speaker') or row.get('voice'), type=row.get('type'))
        pairs.append(make_pair(row.get('id', i), *clips, about))
    return pairs


def read_gold(gold, kind, split):
    """Rows of ZeroSpeech's gold.csv, checked. kind: as of list_zerospeech."""
    columns = ['id', 'filename', 'voice', 'correct']
    columns += ['frequency', 'length', 'word'] if kind.endswith('lexical') else ['type', 'subtype']
    if not os.path.exists(gold):
        wanted = f'the data as unpacked, {kind}/{split}/gold.csv with its .wav files'
        raise InputError(f'{gold} is missing; expected {wanted}')
    rows = read_csv(gold)
    for number, row in enumerate(rows or [{}], 1):
        if any(row.get(key) is None for key in columns):
            wanted = f'expected the columns {", ".join(columns)}'
            raise InputError(f'{gold}, row {number}: not that of the {kind} task; {wanted}')
    return rows


def list_zerospeech(root, kind, split):
    """Pairs of a task of ZeroSpeech 2021 or BabySLM, grouped as the official tools do.

    root: what holds the folder `kind` (syntactic, lexical, babyslm/syntactic, babyslm/lexical), or
    that folder, or its split.
    """
    places = (os.path.join(root, kind, split), os.path.join(root, split), root)
    folder = next((place for place in places if os.path.isdir(place)), root)
    gold = os.path.join(folder, 'gold.csv')
    rows = read_gold(gold, kind, split)
    paths = {os.path.splitext(os.path.relpath(f, folder))[0]: f for f in find_audio(folder)}
    paths = {os.path.basename(stem): path for stem, path in paths.items()} | paths
    lexical = kind.endswith('lexical')

    # {(id, voice): (correct rows, wrong rows)}; words have several non-words
    groups = defaultdict(lambda: ([], []))
    for row in rows:
        if row['filename'] not in paths:
            missing = os.path.join(folder, row['filename']) + '.wav'
            raise InputError(f'{missing} is missing: gold.csv names it')
        key = row['id'] if lexical else '/'.join((row['type'], row['subtype'], row['id']))
        correct, wrong = groups[key, row['voice']]
        (correct if row['correct'].strip() == '1' else wrong).append(row)

    pairs = []
    for (key, voice), (correct, wrong) in groups.items():
        about = (correct + wrong)[0]
        if not correct or not wrong:
            wanted = f'expected a correct and a wrong row of id {key} and voice {voice}'
            raise InputError(f'{gold}: {about["filename"]} has no counterpart, {wanted}')
        types = [about.get('type')]
        if lexical:
            band = bisect_right((1, 5, 20, 100), float(about['frequency'] or 0))
            types = [BANDS[band], f'length {about["length"]}'] + ['in vocabulary'] * (band > 0)
            key = about['word'] if kind.startswith('babyslm') else key  # as BabySLM averages
        for a, b in product(correct, wrong):
            pos, neg = (Clip((paths[row['filename']],)) for row in (a, b))
            pairs.append(make_pair(key, pos, neg, dict(voice=voice), types=types))
    return pairs


def find_place(name, data_dir):
    """Where a task's suite lies in data_dir, its name in whatever case. Raises InputError."""
    there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    names = [name.lower() + end for end in ('', '.jsonl', '.csv', '.parquet')]
    for child in there:
        if child.lower() in names:
            return os.path.join(data_dir, child)
    if name in (*ZEROSPEECH, 'salmon'):  # their parts may lie in data_dir itself
        return data_dir
    has = ', '.join(there[:9]) or 'nothing'
    remedy = f'give --tasks={name}=PATH, or one of {", ".join((*ZEROSPEECH, "salmon", *METRICS))}'
    raise InputError(f'no {name!r} in {data_dir} (it has {has}): {remedy}')


def find_task(name, path, data_dir):
    """[(task, path)] of a task as the user names it: SALMon becomes its eight parts, and what
    stands beside it as NAME_unseen comes along. Raises InputError where nothing is found."""
    path = path or find_place(name, data_dir)
    if any(os.path.isdir(os.path.join(path, part)) for part in SALMON):
        return [(f'{name}_{part}', os.path.join(path, part)) for part in SALMON]
    if name == 'salmon':
        raise InputError(f'no part of SALMon in {path}: expected the folders {", ".join(SALMON)}')
    unseen = path.rstrip('/') + '_unseen'
    return [(name, path)] + ([(name + '_unseen', unseen)] if os.path.isdir(unseen) else [])


def list_suite(name, path, split, cache):
    """The Suite of a task. Raises InputError if a file is missing or without counterpart."""
    base = name.removesuffix('_unseen')
    # whoever made the audio himself has our manifest there: its numbers are not the paper's
    around = (path, os.path.join(path, split), os.path.dirname(os.path.abspath(path)))
    official = not any(os.path.exists(os.path.join(place, 'manifest.jsonl')) for place in around)
    if base in ZEROSPEECH and not path.endswith(('.csv', '.jsonl', '.parquet')):
        return Suite(list_zerospeech(path, ZEROSPEECH[base], split), split, official)
    shards = glob.glob(os.path.join(glob.escape(path), '**', '*.parquet'), recursive=True)
    if path.startswith('hub:') or path.endswith('.parquet') or shards:
        pairs = list_parquet(path, cache)
    else:
        pairs = list_folder(path) if os.path.isdir(path) else list_table(path)
    if not pairs:
        raise InputError(f'{path} holds no pairs')
    return Suite(pairs, official=official)


# -----------------------------------------------------------------------------
# Stories that cross over: the beginning in one modality, the two endings in the other


def find_crossing(name):
    """Which of CROSSINGS a task's name ends with, or ''."""
    return next((end for end in CROSSINGS if name.endswith(end)), '')


def find_ending(words, others):
    """Index of the word at which two stories part, lists of words: where the sentence begins in
    which they first differ, or that word itself if they have no sentence in common."""
    both = list(zip(words, others, strict=False))
    same = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
    ends = [i for i in range(1, same + 1) if words[i - 1].endswith(('.', '!', '?'))]
    return max(ends, default=same)


def cross(suite, path, to):
    """The Suite with endings in the modality `to`, 'text' or 'speech', and beginnings in the other.
    Raises InputError where manifest.jsonl does not know the words of a story and their times."""
    manifest, pairs = read_manifest(path), []
    for pair in suite.pairs:
        stories = []  # of each side its file, the words of it, and those with their times
        for side in ('pos', 'neg'):
            file = '+'.join(pair[side].files)  # of two files no words are known
            times = manifest.get(file, {}).get('words') or []
            stories.append((file, [word for word, *_ in times], times))
        first = find_ending(stories[0][1], stories[1][1])
        if not 0 < first < min(len(words) for _, words, _ in stories):
            wanted = 'expected `words` of it in manifest.jsonl'
            raise InputError(f'{stories[0][0]}: no ending known, {wanted}')

        # both go on from the beginning of the correct one
        file, words, times = stories[0]
        begin, begin_text = Clip((file,), times[first - 1][2]), ' '.join(words[:first])
        sides = []
        for file, words, times in stories:
            if to == 'text':
                sides.append(Crossing(begin, ' '.join(words[first:]), to))
            else:
                sides.append(Crossing(Clip((file,), start=times[first][1]), begin_text, to))
        pairs.append(pair | dict(pos=sides[0], neg=sides[1]))
    return suite._replace(pairs=pairs)


# -----------------------------------------------------------------------------
# Likelihoods: utterances -> units, once for an encoder -> the log-likelihood of each


def load_clip(clip):
    """(samples,) of a clip's files, laid end to end, and cut to its seconds."""
    wave = torch.cat([load_audio(file) for file in clip.files])
    return wave[int(clip.start * SAMPLE_RATE) : int(clip.seconds * SAMPLE_RATE) or None]


def hash_encoder(where):
    """Of an encoder's files if it is a folder, else of its name."""
    digest = hashlib.sha256(b'' if os.path.isdir(where) else where.encode())
    for path in sorted(filter(os.path.isfile, glob.glob(f'{glob.escape(where)}/*'))):
        with open(path, 'rb') as file:
            content = hashlib.file_digest(file, 'sha256').digest()
        digest.update(os.path.basename(path).encode() + content)
    return digest.hexdigest()[:16]


def clip_key(clip):
    """What a cache knows a clip by: path, size and time of change of its files, and its cut."""
    parts = []
    for file in clip.files:
        stat = os.stat(file)
        parts.append(f'{os.path.realpath(file)}|{stat.st_size}|{stat.st_mtime_ns}')
    return '|'.join([*parts, f'{clip.seconds:g}', f'{clip.start:g}'])


def read_cache(path):
    """{key: units} of the lines of a cache; broken ones, of killed runs, are ignored."""
    known = {}
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                with suppress(ValueError, TypeError):
                    key, units = json.loads(line)
                    known[key] = np.array(units, np.int32)
    return known


def encode_clips(clips, where, folder, device='cpu', batch=64):
    """De-duplicated units of clips, {clip: int array}. Raises InputError at what is no audio.

    A cache in `folder`, one file an encoder, keeps them, a line a clip, added as soon as it is
    known: a killed run continues.
    """
    path = os.path.join(folder, f'units_{hash_encoder(where)}.jsonl')
    known = read_cache(path)
    keys = {clip: clip_key(clip) for clip in clips}
    todo = [clip for clip in keys if keys[clip] not in known]
    if todo:
        # like lengths in a batch
        todo.sort(key=lambda clip: (sum(map(os.path.getsize, clip.files)), clip.files))
        unit_encoder = UnitEncoder.from_pretrained(where, device=device)
        starts = range(0, len(todo), batch)
        quiet = len(starts) < 3
        os.makedirs(folder, exist_ok=True)
        with open(path, 'a', encoding='utf-8') as cache, ThreadPoolExecutor(8) as pool:
            for start in tqdm(starts, 'encoding', unit='batch', leave=False, disable=quiet):
                part = todo[start : start + batch]
                frames = unit_encoder.encode(list(pool.map(load_clip, part)))
                for clip, of_clip in zip(part, frames, strict=True):
                    units = dedup(of_clip.cpu())[0].tolist()
                    known[keys[clip]] = np.array(units, np.int32)
                    # a new line first: the last one may be broken
                    cache.write(f'\n{json.dumps([keys[clip], units])}\n')
                cache.flush()
    return {clip: known[key] for clip, key in keys.items()}


def units_of(speaker, clips):
    """{clip: its units} by a checkpoint's encoder, kept beside `out`."""
    folder = os.path.join(os.path.dirname(out), 'eval_cache')
    return encode_clips(clips, speaker.encoder, folder, speaker.device)


def to_tokens(model, utterance):
    """(tokens, how many of the first are given and not scored) of an utterance, a list and int.

    utterance: units, scored but for the first token as `<S>` units `<S>`, of an interleaved model
    `<speech>` units and its end; as the units alone for one trained without (slam['scoring'] ==
    'units'). Or (units, text ids, to): a beginning, given, and the ending in the modality `to`,
    scored alone. Beyond the model's context the end is cut off, of a beginning the start.
    """
    context = model.config.context
    if isinstance(utterance, tuple):
        units, ids, to = utterance
        parts = [('speech', units), ('text', ids)]
        if to == 'speech':
            parts.reverse()
        tokens = model.tokens_of(parts).tolist()
        given = len(model.tokens_of(parts[:1])) + 1  # and the switch to the other modality
        cut = max(0, len(tokens) - context)
        tokens, given = tokens[cut:], max(1, given - cut)
    else:
        units, given = utterance, 1
        alone = model.slam.get('scoring') == 'units'
        tokens = model.tokens_of([('speech', units)], alone).tolist()
        tokens = (tokens if alone else [*tokens, model.end])[:context]

    n_units = model.slam.get('n_units', model.config.vocab_size - OFFSET)
    if (top := int(np.max(units, initial=0))) >= n_units:
        has = f'none of the {n_units} of the model'
        raise InputError(f'unit {top} is {has}: made by another encoder?')
    if len(tokens) <= given:
        raise InputError('an utterance of fewer than two units cannot be scored by this model')
    return tokens, given


@torch.inference_mode()
def log_likelihoods(model, utterances):
    """Log-likelihoods in nats of utterances, of to_tokens' kinds, each token given all before it.

    Returns: sums (n,), tokens predicted (n,). Each distinct sequence is computed once, so that
    equal ones tie exactly. Raises InputError for units that the model does not have, and for NaN.
    """
    device = next(model.parameters()).device
    sequences = []
    for utterance in utterances:
        tokens, given = to_tokens(model, utterance)
        sequences.append((tuple(tokens), given))
    distinct = list(dict.fromkeys(sequences))
    lengths = [len(tokens) for tokens, _ in distinct]

    # rows of one width, so that a GPU compiles once; on a CPU they are filled and done one by one
    width = max(2048, *lengths)
    batch = 1 if device.type == 'cpu' else 32
    rows = pack_rows(lengths, width)
    sums = np.zeros(len(distinct))
    starts = range(0, len(rows), batch)
    for start in tqdm(starts, 'scoring', unit='batch', leave=False, disable=len(starts) < 3):
        tokens, document, predicted, segments = np.zeros((4, batch, width), np.int64)
        # what is left of a row: documents no longer than learned positions reach
        document[:] = -1 - np.arange(width) // model.config.context
        for r, row in enumerate(rows[start : start + batch]):
            begin = 0
            for i in row:
                end = begin + lengths[i]
                sequence, given = distinct[i]
                tokens[r, begin:end] = sequence
                document[r, begin:end] = i + 1
                predicted[r, begin + given : end] = 1
                segments[r, begin:end] = i  # the sum that they count towards
                begin = end
        arrays = (tokens, predicted, document, segments)
        x, mask, doc, segments = (torch.from_numpy(array).to(device) for array in arrays)
        part = model.logps(x, mask, doc, segments=segments, n=len(distinct))
        sums += part.double().cpu().numpy()
    if not np.isfinite(sums).all():  # NaN would lose every comparison, and read as a score of 0
        why = 'its weights hold NaN, or overflow'
        raise InputError(f'the model gives likelihoods that are no numbers: {why}')

    place = {sequence: i for i, sequence in enumerate(distinct)}
    counts = [len(tokens) - given for tokens, given in sequences]
    return sums[[place[sequence] for sequence in sequences]], np.array(counts)


# -----------------------------------------------------------------------------
# Statistics


def percent(mean):
    return 100 * mean


def interval(a, b=None, transform=percent, draws=2000, seed=1234):
    """Score of an arm with a 95 % interval, or the difference a - b of two.

    a, b: (seeds, items) of the same items, or (items,) of one checkpoint. An arm's score is the
    mean over its seeds of transform(mean over items). The interval is a bootstrap over items, the
    same for all checkpoints, on which the spread of the seeds is laid: Student's t of their pooled
    variance, because resampling two or three seeds knows too little of it. All of one arm's items
    right or all wrong: the exact binomial bound (Clopper and Pearson). One item: no interval.
    Returns: dict(score, low, high, n items), and of several seeds their number and spread, the
    standard deviation.
    """
    arms = [np.atleast_2d(np.asarray(arm, float)) for arm in (a, b) if arm is not None]
    n = arms[0].shape[1]
    rng = np.random.default_rng(seed)

    # a resample of the items is a multinomial draw over the distinct columns: the same, far
    # cheaper; the first row are the items as they are
    columns, counts = np.unique(np.concatenate(arms), axis=1, return_counts=True)
    weights = np.concatenate((counts[None], rng.multinomial(n, counts / n, size=draws)))
    scores = transform(weights @ columns.T / n)  # (1 + draws, seeds of both arms)
    scores = np.split(scores, [len(arms[0])], axis=1)[: len(arms)]
    means = [arm.mean(1) for arm in scores]
    difference = means[0] - (means[1] if b is not None else 0)
    result = dict(score=float(difference[0]), low=None, high=None, n=n)

    # the variance of the seeds, pooled
    freedom = sum(len(arm) - 1 for arm in arms)
    squares = sum(np.square(arm[0] - arm[0].mean()).sum() for arm in scores)
    if freedom and b is None:
        result |= dict(seeds=len(arms[0]), spread=float(np.sqrt(squares / freedom)))

    if b is None and transform is percent and set(np.unique(columns)) in ({0.0}, {1.0}):
        bound = 100 * 0.025 ** (1 / n)
        right = columns.any()
        return result | dict(low=bound if right else 0.0, high=100.0 if right else 100 - bound)
    if n < 2:
        return result
    deviations = difference[1:] - difference[0]
    if freedom:
        error = np.sqrt(squares / freedom * sum(1 / len(arm) for arm in arms))
        deviations = deviations + error * rng.standard_t(freedom, size=(20, draws))
    low, high = np.percentile(difference[0] + deviations, (2.5, 97.5)).tolist()
    if transform is percent:
        low, high = max(low, 0.0 if b is None else -100.0), min(high, 100.0)
    return result | dict(low=low, high=high)


def summarise(pairs, wins, seed=1234):
    """The official average: over voices within a pair, then over pairs.

    wins: 0, 1/2 or 1 of each pair and voice. Returns: the result in percent (score, interval, by
    type, by voice), and {id: score in 0 .. 1}.
    """
    wins_of = defaultdict(list)  # a word of sWUGGY has several non-words in each voice
    for pair, win in zip(pairs, wins, strict=True):
        wins_of[pair['id'], pair['voice']].append(win)
    of_pair, voices, types = (defaultdict(dict) for _ in range(3))
    for (key, voice), found in wins_of.items():
        of_pair[key][voice] = voices[voice][key] = float(np.mean(found))
    items = {key: float(np.mean([*found.values()])) for key, found in of_pair.items()}
    for pair in pairs:
        for kind in pair['types']:
            types[kind][pair['id']] = items[pair['id']]

    result = interval([*items.values()], seed=seed)
    for part, groups in (('types', types), ('voices', voices)):
        result[part] = {
            name: dict(score=100 * float(np.mean([*ids.values()])), n=len(ids))
            for name, ids in sorted(groups.items())
        }
    return result, items


# -----------------------------------------------------------------------------
# Continuations and who listens to them


@lru_cache(maxsize=4)
def load_hf(model_class, processor_class, where, device):
    """A transformers model and its tokenizer or processor. Raises InputError if it cannot."""
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = pick_dtype('auto', device)
    find_checkpoint(where, tensors=False)  # without a network it says so at once
    try:
        processor = getattr(transformers, processor_class).from_pretrained(where)
        model = getattr(transformers, model_class).from_pretrained(where, dtype=dtype)
    except Exception as error:
        why = ' '.join(str(error).split())[:120]
        remedy = 'give the folder of a downloaded copy'
        raise InputError(f'{where!r} cannot be loaded ({why}): {remedy}') from None
    return model.eval().to(device), processor


@torch.inference_mode()
def transcribe(waves, where, device, batch=16):
    """Whisper's transcripts of 16 kHz waves, of their first 30 s; '' for an empty one."""
    model, processor = load_hf('WhisperForConditionalGeneration', 'WhisperProcessor', where, device)
    options = {}
    if getattr(model.generation_config, 'is_multilingual', False):
        options = dict(language='en', task='transcribe')
    texts = [''] * len(waves)
    spoken = [i for i, wave in enumerate(waves) if len(wave)]
    starts = range(0, len(spoken), batch)
    for start in tqdm(starts, 'transcribing', leave=False, disable=len(spoken) < 20):
        part = spoken[start : start + batch]
        sound = [waves[i].numpy() for i in part]
        features = processor.feature_extractor(
            sound, sampling_rate=SAMPLE_RATE, return_tensors='pt'
        ).input_features
        ids = model.generate(features.to(device, model.dtype), **options)
        found = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for i, text in zip(part, found, strict=True):
            texts[i] = text
    return texts


@torch.inference_mode()
def text_nll(text, where, device):
    """Mean negative log-likelihood per token of a text under a text LM, in nats; None where no
    token is predicted."""
    lm, tokenizer = load_hf('AutoModelForCausalLM', 'AutoTokenizer', where, device)
    ids = tokenizer(text, return_tensors='pt').input_ids.long().to(device)
    if ids.shape[1] < 2:
        return None
    return torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1].float(), ids[0, 1:]).item()


def ask_endpoint(question, url, model_name, retries=3):
    """The answer of an OpenAI-compatible endpoint; what may pass is tried again."""
    message = dict(role='user', content=question)
    body = json.dumps(dict(model=model_name, temperature=0, messages=[message])).encode()
    key = os.environ.get('OPENAI_API_KEY', '')
    headers = {'Content-Type': 'application/json', 'Authorization': f'Bearer {key}'}
    request = urllib.request.Request(url.rstrip('/') + '/chat/completions', body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)['choices'][0]['message']['content'] or ''
    except Exception as error:  # the network's, the server's, or an answer of another shape
        if retries and getattr(error, 'code', 500) not in (400, 401, 403, 404):
            time.sleep(2 ** (3 - retries))
            return ask_endpoint(question, url, model_name, retries - 1)
        remedy = 'check the URL, judge_model and $OPENAI_API_KEY'
        raise InputError(f'the judge at {url} does not answer ({error}): {remedy}') from None


def rate(question, url, model_name):
    """A judge's rating, 1 to 5, from the last boxed number of its answer; None if it has none."""
    answer = ask_endpoint(question, url, model_name)
    boxed = re.findall(r'\\boxed\{\D{0,8}?([1-5](?:\.\d+)?)\D{0,2}\}', answer)
    return float(boxed[-1]) if boxed and float(boxed[-1]) <= 5 else None


def predict_mos(waves, where, device):
    """The opinion score of each wave (samples,) by a TorchScript file, None for an empty one."""
    try:
        predictor = torch.jit.load(where, map_location=device).eval()
        with torch.inference_mode():
            return [float(predictor(w[None].to(device))) if len(w) else None for w in waves]
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[-1]
        wanted = 'expected TorchScript that maps (1, samples) at 16 kHz to a score'
        raise InputError(f'{where!r}: {wanted} ({why})') from None


def read_words(prompt):
    """[[word, start s, end s], ...] of a prompt: its manifest's, or `aligned_text` of the JSON file
    beside the audio; [] where neither is known."""
    beside = os.path.splitext(prompt['path'])[0] + '.json'
    if not prompt['words'] and os.path.exists(beside):
        with open(beside, encoding='utf-8') as file, suppress(ValueError, AttributeError):
            return json.load(file).get('aligned_text') or []
    return prompt['words']


def cut_at_word(prompt, seconds):
    """(seconds, text) of the beginning that ends with the word whose end is nearest to `seconds`;
    (seconds, None) where the words are not known. None if the file is shorter than two of these."""
    if len(load_audio(prompt['path'])) < 2 * seconds * SAMPLE_RATE:
        return None
    words = read_words(prompt)
    if not words:
        return seconds, None
    last = min(range(len(words)), key=lambda i: abs(words[i][2] - seconds))
    return words[last][2], ' '.join(word for word, *_ in words[: last + 1])


def find_prompts(suites):
    """[dict(path, text, words), ...]: of the knob `prompts`, or the correct utterances of
    sstorycloze, else of the first suite of audio; at most n_prompts."""
    about = {}  # {path: what is known of it}
    if prompts:
        manifest = read_manifest(prompts)
        for file in map(os.path.normpath, find_audio(prompts)):
            about[file] = manifest.get(file, {})
    for task in ('sstorycloze', 'sstory', *suites):
        if task in suites and not about:
            for pair in suites[task].pairs:
                clip = pair['pos']
                if isinstance(clip, Clip) and len(clip.files) == 1:
                    about.setdefault(clip.files[0], pair)
    found = []
    for path, row in list(about.items())[:n_prompts]:
        found.append(dict(path=path, text=row.get('text') or '', words=row.get('words') or []))
    return found


def cut_prompts(task, listing):
    """{clip: its text, None if not known} of the prompts of a task, from find_prompts; GPTScore
    takes those of at least two prompts' length, cut at a word. Raises InputError if none is left.
    """
    if not listing:
        raise InputError('no prompts: give --prompts=FOLDER, or a suite of audio')
    if task != 'gptscore':
        return {Clip((prompt['path'],), prompt_seconds): None for prompt in listing}
    clips = {}
    for prompt in listing:
        if cut := cut_at_word(prompt, prompt_seconds):
            seconds, text = cut
            clips[Clip((prompt['path'],), seconds)] = text
    if not clips:
        raise InputError(f'no prompt is {2 * prompt_seconds:g} s or longer')
    return clips


def continue_prompts(speaker, clips):
    """(units of the prompts, units of their continuations), both of each clip."""
    units = units_of(speaker, clips)
    heads = [torch.as_tensor(units[clip]).long() for clip in clips]
    tails = []
    starts = range(0, len(heads), 32)
    for start in tqdm(starts, 'continuing', leave=False, disable=len(heads) < 64):
        part = [speaker.model.tokens_of([('speech', head)]) for head in heads[start:][:32]]
        new = speaker.model.generate(part, **speaker.sampling, seed=seed + start)
        tails += [tail - speaker.model.offset for tail in new]
    return heads, tails


def vocode(speaker, units):
    """Waves (samples,) at 16 kHz of lists of units."""
    return UnitVocoder.from_pretrained(speaker.vocoder, device=speaker.device).decode(units)


class Heard(NamedTuple):
    """A prompt and how a checkpoint went on, as a metric is given it."""

    prompt: Clip
    prompt_text: str | None  # where it is known
    prompt_units: torch.Tensor
    units: torch.Tensor  # of the continuation
    wave: torch.Tensor  # (samples,) of both or of the continuation alone, as `alone` says
    text: str  # transcript of the wave; '' for a metric that needs no words


def listen(speaker, prompts, metric, memory):
    """[Heard, ...] of prompts, {clip: text}, for a metric.

    memory: a dict in which one checkpoint's tasks find what those before them have computed.
    """

    def once(key, function, *arguments):
        if key not in memory:
            memory[key] = function(*arguments)
        return memory[key]

    clips, alone = tuple(prompts), metric.alone
    heads, tails = once(clips, continue_prompts, speaker, clips)
    units = tails if alone else [torch.cat(both) for both in zip(heads, tails, strict=True)]
    waves = once((clips, alone), vocode, speaker, units)
    texts = [''] * len(clips)
    if metric.words:
        texts = once((clips, alone, 'texts'), transcribe, waves, asr, speaker.device)
    columns = (clips, prompts.values(), heads, tails, waves, texts)
    return [Heard(*row) for row in zip(*columns, strict=True)]


# -----------------------------------------------------------------------------
# Metrics of continued prompts. A new one is a function: a list of Heard -> a value of each, None
# where there is none; and an entry in METRICS


def rate_fluency(heard, device):
    """GenPPL: mean negative log-likelihoods in nats under the text LM."""
    return [text_nll(item.text, text_lm, device) for item in heard]


def rate_repetition(heard, device):
    """Auto-BLEU of each transcript."""
    return [auto_bleu(tokenize_words(item.text)) for item in heard]


def rate_sense(heard, device):
    """GPTScore: a judge's rating of each continuation, given the text of its prompt."""
    unknown = [item.prompt for item in heard if item.prompt_text is None]
    found = transcribe([load_clip(clip) for clip in unknown], asr, device)
    texts = dict(zip(unknown, found, strict=True))
    values = []
    for item in tqdm(heard, 'judging', leave=False):
        prompt_text = texts.get(item.prompt, item.prompt_text)
        values.append(rate(JUDGE % (prompt_text, item.text), judge, judge_model))
    return values


def rate_sound(heard, device):
    """MOS by the predictor."""
    return predict_mos([item.wave for item in heard], utmos, device)


class Metric(NamedTuple):
    label: str
    measure: str
    rate: Callable  # of the functions above
    transform: Callable  # the score of a mean over prompts
    alone: bool = False  # of the continuation alone, else of prompt and continuation together
    words: bool = True  # of transcripts


METRICS = dict(
    genppl=Metric('GenPPL ↓', 'perplexity, prompt + continuation', rate_fluency, np.exp),
    genppl_continuation=Metric(
        'GenPPL of the continuation ↓', 'perplexity', rate_fluency, np.exp, alone=True
    ),
    autobleu=Metric('auto-BLEU ↓', '% of bigrams, prompt + continuation', rate_repetition, percent),
    autobleu_continuation=Metric(
        'auto-BLEU of the continuation ↓', '% of bigrams', rate_repetition, percent, alone=True
    ),
    gptscore=Metric('GPTScore', '1 to 5', rate_sense, np.asarray, alone=True),
    utmos=Metric('MOS (UTMOS)', '1 to 5', rate_sound, np.asarray, words=False),
)


# -----------------------------------------------------------------------------
# The scores of one checkpoint


def attempt(results, name, function, *arguments):
    """function(*arguments); where a file, a model or memory is missing, None, and results[name]
    says why it is not run."""
    try:
        return function(*arguments)
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = ' '.join(str(error).split()) or 'out of memory'
        print(f'eval_slm.py: {name} not run: {reason}', file=sys.stderr)
        results[name] = dict(not_run=reason)
        return None


def load_speaker(name, where):
    """The Speaker of a checkpoint. Raises InputError if its encoder is not known, or another's."""
    place = pick_device(device)
    model = SLM.from_pretrained(where).to(place, pick_dtype(dtype, place)).eval()
    unit_encoder = encoder or model.slam.get('encoder')
    if not unit_encoder:
        raise InputError(f'{where} names no encoder (a text LM?): give --encoder and --vocoder')
    about = os.path.join(unit_encoder, 'encoder.json')
    if os.path.exists(about):
        with open(about, encoding='utf-8') as file:
            has = json.load(file).get('n_units')
        wanted = model.slam.get('n_units', model.config.vocab_size - OFFSET)
        if has != wanted:
            remedy = 'pass the --encoder with which it was trained'
            raise InputError(f'encoder {unit_encoder} has {has} units, {where} {wanted}: {remedy}')

    penalty = repetition_penalty
    if penalty is None:
        penalty = 1.1 if model.slam.get('stage') == 'dpo' else 1.0
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    sampling |= dict(top_p=top_p, repetition_penalty=float(penalty))
    unit_vocoder = vocoder or model.slam.get('vocoder') or ''
    return Speaker(name, model, unit_encoder, unit_vocoder, sampling, place)


def score_suite(speaker, task, suite):
    """Result, {pair id: score in 0 .. 1} and rows for the pairs file, of one suite."""
    sides = [pair[side] for side in ('pos', 'neg') for pair in suite.pairs]
    clips = [side.speech if isinstance(side, Crossing) else side for side in sides]
    units = units_of(speaker, clips)
    utterances = []
    for side, clip in zip(sides, clips, strict=True):
        utterance = units[clip]
        if isinstance(side, Crossing):
            text = speaker.model.encode_text(side.text, inside=side.to == 'text')
            utterance = (utterance, text, side.to)
        utterances.append(utterance)

    sums, counts = log_likelihoods(speaker.model, utterances)
    pos, neg = np.split(sums / counts, 2)
    wins = (pos > neg) + 0.5 * (pos == neg)
    result, items = summarise(suite.pairs, wins, seed)
    rows = []
    for pair, a, b, win in zip(suite.pairs, pos.tolist(), neg.tolist(), wins.tolist(), strict=True):
        about = {key: pair[key] for key in ('id', 'voice', 'types', 'text')}
        for side in ('pos', 'neg'):
            what = pair[side]
            if isinstance(what, Crossing):
                about[side] = [*what.speech.files, what.text]
            else:
                about[side] = '+'.join(what.files)
        rows.append(dict(model=speaker.name, task=task, **about, score_pos=a, score_neg=b, win=win))
    return result, items, rows


def only_in_vocabulary(pairs, items):
    """sWUGGY's second column, result and items: the words that LibriSpeech has."""
    inside = {pair['id'] for pair in pairs if 'in vocabulary' in pair['types']}
    kept = {key: value for key, value in items.items() if key in inside}
    if not kept:
        raise InputError('no word of the suite is in the vocabulary of LibriSpeech')
    return interval([*kept.values()], seed=seed), kept, []


def score_generated(speaker, task, listing, memory):
    """Result, {prompt: value} and rows for the pairs file, of one task that continues prompts.

    listing: of find_prompts. memory: as in `listen`.
    """
    if task == 'gptscore' and not judge:
        raise InputError('no judge: give --judge=URL')
    if task == 'utmos' and not utmos:
        raise InputError('no predictor of opinion scores: give --utmos=FILE')
    metric = METRICS[task]
    heard = listen(speaker, cut_prompts(task, listing), metric, memory)
    items, rows = {}, []
    for item, value in zip(heard, metric.rate(heard, speaker.device), strict=True):
        path = item.prompt.files[0]
        about = dict(model=speaker.name, task=task, id=path, seconds=item.prompt.seconds)
        rows.append(dict(about, value=value, text=item.text))
        if value is not None and np.isfinite(value):
            items[path] = value
    if not items:
        raise InputError(f'none of {len(rows)} continuations could be rated')
    result = interval([*items.values()], transform=metric.transform, seed=seed)
    result |= dict(left_out=len(rows) - len(items), sampling=speaker.sampling)
    return result, items, rows


def evaluate(name, where, suites, generated, listing, players):
    """The Scores of one checkpoint, of all its tasks. players: as of record_clips."""
    scores, broken = Scores({}, {}, [], {}), {}
    speaker = attempt(broken, name, load_speaker, name, where)
    if not speaker:
        scores.results.update(dict.fromkeys((*suites, *generated), broken[name]))
        return scores
    scores.sampling.update(speaker.sampling)

    def score(task, function, *arguments):
        if found := attempt(scores.results, task, function, *arguments):
            scores.results[task], scores.items[task], rows = found
            scores.rows.extend(rows)

    for task, suite in suites.items():
        score(task, score_suite, speaker, task, suite)
        if task == 'swuggy' and task in scores.items:
            inside = 'swuggy_in_vocabulary'
            score(inside, only_in_vocabulary, suite.pairs, scores.items[task])
    memory = {}
    for task in generated:
        score(task, score_generated, speaker, task, listing, memory)
    if html and listing:
        attempt({}, f'the players of {name}', record_clips, speaker, listing, players)
    return scores


def compare(models, arms, items):
    """({arm: dict(seeds=its checkpoints, metrics=results)}, {'b - a': results}): arms by their
    seeds, and every two arms or single checkpoints by the items that all of theirs share.

    items: {checkpoint: {task: {id: value}}}.
    """
    in_arms = {name for members in arms.values() for name in members}
    groups = {name: [name] for name in models if name not in in_arms} | arms

    def table(task, *names):
        """The values of groups' checkpoints on the items that all have, (checkpoints, items) of
        each group; None if there are no such items."""
        found = [items.get(member, {}).get(task, {}) for name in names for member in groups[name]]
        keys = [key for key in found[0] if all(key in other for other in found)]
        tables = [[[items[m][task][key] for key in keys] for m in groups[name]] for name in names]
        return tables if keys else None

    means = {arm: dict(seeds=members, metrics={}) for arm, members in arms.items()}
    differences = {}
    for task in dict.fromkeys(task for found in items.values() for task in found):
        transform = METRICS[task].transform if task in METRICS else percent
        for arm in arms:
            if tables := table(task, arm):
                means[arm]['metrics'][task] = interval(*tables, transform=transform, seed=seed)
        for a, b in combinations(groups, 2):
            if tables := table(task, b, a):
                difference = interval(*tables, transform=transform, seed=seed)
                differences.setdefault(f'{b} - {a}', {})[task] = difference
    return means, differences


# -----------------------------------------------------------------------------
# What is said about it: table and page


def parse_count(text):
    """'358M', '1.4B + 5M' -> a number; None for what is none."""
    units = dict(K=1e3, M=1e6, B=1e9, T=1e12)
    parts = re.findall(r'([\d.]+)\s*([KMBT])', text) if not text.startswith('+') else []
    return sum(float(number) * units[unit] for number, unit in parts) or None


def format_count(number):
    """1_400_000_000 -> '1.4B'."""
    for unit, size in (('B', 1e9), ('M', 1e6), ('K', 1e3)):
        if number >= size:
            return f'{number / size:.3g}{unit}'
    return f'{number:.0f}'


def describe(where):
    """What stands beside a checkpoint's scores: GPUs, GPU-days, parameters, tokens (as text), and
    FLOPs of its training, 6 x parameters x tokens (Kaplan et al. 2020), None where not known."""
    model = SLM.from_pretrained(where)
    last = model.slam.get('compute') or {}
    runs = [run for run in (last.get('pretraining') or {}, last) if run.get('tokens')]
    tokens = [run['tokens'] for run in runs]
    tokens = tokens or [(model.slam.get('scores') or {}).get('tokens') or 0]
    days = sum(run.get('devices', 1) * run.get('hours', 0) for run in runs) / 24
    parameters = model.num_params()
    return dict(
        where=where,
        gpus=f'{runs[-1].get("devices", 1)} {runs[-1].get("device", "")}'.strip() if runs else '',
        gpu_days=f'{days:.2g}' if days else '',
        parameters=format_count(parameters),
        tokens=' + '.join(format_count(count) for count in tokens if count),
        flops=6 * parameters * sum(tokens) or None,
        n_parameters=parameters,
    )


def read_paper():
    """Rows of config/paper.csv that the knob `paper` asks for."""
    with open(os.path.join(ROOT, 'config', 'paper.csv'), encoding='utf-8') as file:
        return [row for row in csv.DictReader(file) if paper in ('all', row['rows'])]


def comparable(suites):
    """Tasks whose numbers may stand in the paper's columns: its suite, split, and protocol."""
    official = {task for task in suites if suites[task].official}
    tasks = official & {'sstorycloze', 'tstorycloze'}
    if split == 'dev':
        tasks |= official & {'sblimp'}
    knobs = globals()
    as_paper = all(knobs[name] == value for name, value in PAPER_SAMPLING.items())
    if as_paper and repetition_penalty is None and not prompts and 'sstorycloze' in official:
        if asr.rstrip('/').endswith('whisper-large-v3-turbo'):
            tasks |= {'autobleu', 'gptscore'}
            tasks |= {'genppl'} if text_lm.rstrip('/').endswith('Llama-3.2-1B') else set()
    return tasks


def format_cell(task, result, sign=''):
    """A result as text: score, spread over seeds, interval; '(n small)' below SMALL items."""
    if result is None:
        return ''
    if 'not_run' in result:
        return 'not run'
    digits = sign + ('.2f' if task in METRICS and not task.startswith('genppl') else '.1f')
    cell = f'{result["score"]:{digits}}'
    if 'spread' in result:
        cell += f' ± {result["spread"]:{digits.strip("+")}}'
    if result['low'] is not None:
        cell += f' [{result["low"]:{digits}}, {result["high"]:{digits}}]'
    return cell + (' (n small)' if result['n'] < SMALL else '')


def name_column(task):
    """(title, measure) of a task."""
    if task in METRICS:
        return METRICS[task].label, METRICS[task].measure
    crossing = find_crossing(task)
    base = task.removesuffix(crossing)
    seen = base.removesuffix('_unseen')
    title = LABELS.get(seen, seen) + ', unseen voices' * (seen != base)
    measure = '% of pairs, by mean log-likelihood' + ' of the ending' * bool(crossing)
    return title + CROSSINGS.get(crossing, ''), measure


def make_columns(metrics, suites):
    """What stands over a column and where: dict(task, title, what, percent, paper) of each; paper:
    [[model, number], ...] where the paper's rows may stand in it, else []."""
    known, others, columns = comparable(suites), read_paper(), []
    for task in dict.fromkeys(task for results in metrics.values() for task in results):
        title, measure = name_column(task)
        n = max(results.get(task, {}).get('n', 0) for results in metrics.values())
        suite = suites.get(task.removesuffix('_in_vocabulary'))
        what = (suite.split if suite else '', f'n = {n:,}' if n else '', measure)
        column = dict(task=task, title=title, what='; '.join(filter(None, what)), paper=[])
        column['percent'] = task not in METRICS
        if task in known:
            column['paper'] = [[row['model'], float(row[task])] for row in others if row.get(task)]
        columns.append(column)
    return columns


def make_tables(columns, record, about):
    """(rows of the results, rows of the differences), lists of cells, the head first.

    record: what eval.json has; about: {checkpoint: of `describe`}.
    """

    def cells(results, sign=''):
        return [format_cell(c['task'], results.get(c['task']), sign) for c in columns]

    def beside(row):
        return [row[key] for key in ('gpus', 'gpu_days', 'parameters', 'tokens')]

    titles = [column['title'] for column in columns]
    table = [['model', *titles, 'GPUs', 'GPU-days', 'parameters', 'tokens']]
    table.append(['', *(column['what'] for column in columns), '', '', '', ''])
    for name, results in record['metrics'].items():
        table.append([name, *cells(results), *beside(about[name])])
    for name, arm in record['arms'].items():
        title = f'{name}: mean of {len(arm["seeds"])} seeds'
        table.append([title, *cells(arm['metrics']), '', '', '', ''])
    for row in read_paper():
        theirs = [row.get(column['task'], '') if column['paper'] else '' for column in columns]
        if any(theirs):
            table.append([row['model'], *theirs, *beside(row)])
    changes = [['difference', *titles]]
    changes += [[name, *cells(results, '+')] for name, results in record['differences'].items()]
    return table, changes


def make_notes(record, suites):
    """Lines under the table: what the intervals are, how was sampled, what was left out."""
    notes = ['Intervals: 95 %, bootstrap over pairs; exact where all or none are right.']
    if record['arms']:
        notes.append('Means and differences of several seeds count the seeds too.')
    else:
        which = 'Differences are of these checkpoints'
        notes.append(f'{which}: other seeds may differ by more (--init="a-s*").')

    if any(task in METRICS for results in record['metrics'].values() for task in results):
        alike = defaultdict(list)  # {what is said: checkpoints}
        for name, knobs in record['sampling'].items():
            said = ', '.join(f'{key.replace("_", " ")} {value:g}' for key, value in knobs.items())
            alike[f'sampled with {said}, prompts of {prompt_seconds:g} s.'].append(name)
        notes += [f'{", ".join(names)}: {said}' for said, names in alike.items()]
    for name, results in record['metrics'].items():
        for task, result in results.items():
            if result.get('left_out'):
                label = METRICS[task].label.strip(' ↓')
                notes.append(f'{name}: {result["left_out"]} without an answer left out of {label}.')

    own = [task for task, suite in suites.items() if not suite.official]
    if {*own} & {'sblimp', 'sstorycloze', 'tstorycloze'}:
        notes.append(f"{', '.join(own)}: not the published audio, so without the paper's numbers.")
    return notes


def find_failed(record):
    """What was not run, and why, each reason once."""
    reasons = set()
    for results in record['metrics'].values():
        for task, result in results.items():
            if 'not_run' in result:
                reasons.add(f'{task} ({result["not_run"]})')
    return sorted(reasons)


def print_table(rows):
    """A list of lists of cells as a table of Markdown, the head first; nothing if it is alone."""
    if len(rows) < 2:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append('| ' + ' | '.join(cells) + ' |')
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    print('\n' + '\n'.join(lines))


def read_curve(about, points=300):
    """Points of a run's log.jsonl for the page: dict(kind, loss, val), each [[tokens, FLOPs, hours,
    loss], ...]; the loss averaged over as many steps as leave so few points. None without a log."""
    path = os.path.join(about['where'], 'log.jsonl')
    if not os.path.exists(path):
        return None
    rows = [row for _, row in read_jsonl(path)]
    tokens, seconds = 0, 0.0
    loss, val = [], []
    for row in rows:
        # a row of validation stands where the one of training before it does
        tokens, seconds = row.get('tokens') or tokens, row.get('elapsed') or seconds
        at = [tokens, 6 * about['n_parameters'] * tokens, seconds / 3600]
        if row.get('loss') is not None:
            loss.append([*at, row['loss']])
        if row.get('val_loss') is not None:
            val.append([*at, row['val_loss']])
    together = max(1, len(loss) // points)
    starts = range(0, len(loss) - together + 1, together)
    loss = [np.mean(loss[start : start + together], axis=0).tolist() for start in starts]
    tuned = any('margin' in row for row in rows)
    return dict(kind='preference' if tuned else 'language', loss=loss, val=val)


def to_uri(wave):
    """A wave as a data: URI of 16-bit sound; '' for an empty one."""
    import soundfile

    sound = io.BytesIO()
    soundfile.write(sound, wave.numpy(), SAMPLE_RATE, format='WAV', subtype='PCM_16')
    data = base64.b64encode(sound.getvalue()).decode()
    return 'data:audio/wav;base64,' + data if len(wave) else ''


def record_clips(speaker, listing, players):
    """Adds to players, {path: dict(title, clips={label: URI})}, how a speaker goes on with the
    first three prompts: the prompt, its resynthesis, the continuation."""
    clips = [Clip((prompt['path'],), prompt_seconds) for prompt in listing[:3]]
    heads, tails = continue_prompts(speaker, clips)
    waves = vocode(speaker, [*heads, *tails])
    again, new = waves[: len(heads)], waves[len(heads) :]
    for prompt, clip, resynthesis, continuation in zip(listing, clips, again, new, strict=False):
        title = prompt['text'] or os.path.basename(prompt['path'])
        entry = players.setdefault(prompt['path'], dict(title=title, clips={}))
        entry['clips'].setdefault('prompt', to_uri(load_clip(clip)))
        entry['clips'].setdefault('resynthesis', to_uri(resynthesis.cpu()))
        entry['clips'][f'continuation, {speaker.name}'] = to_uri(continuation.cpu())


def paper_scaling(columns):
    """Points of the paper's Figure 1; none where our tSC may not stand in it."""
    if not any(column['paper'] for column in columns if column['task'] == 'tstorycloze'):
        return []
    points = []
    for row in read_paper():
        parameters, tokens = parse_count(row['parameters']), parse_count(row['tokens'])
        if row['tstorycloze'] and parameters:
            flops = 6 * parameters * tokens if tokens else None
            point = dict(model=row['model'], tsc=float(row['tstorycloze']))
            points.append(point | dict(flops=flops, parameters=parameters))
    return points


def make_page(columns, tables, notes, record, about, players, summary):
    """What the page shows, as JSON can hold it. record, about: as of make_tables."""
    arms = {f'{name} (mean)': arm['metrics'] for name, arm in record['arms'].items()}
    scores = record['metrics'] | arms
    return dict(
        made=time.strftime('%d %B %Y, %H:%M'),
        commit=(git_commit() or '')[:7],
        data=data_dir,
        summary=summary,
        notes=notes,
        table=tables[0],
        n_models=len(scores),
        changes=tables[1],
        scores=scores,
        about=about,
        columns=columns,
        curves={name: read_curve(entry) for name, entry in about.items()},
        scaling=paper_scaling(columns),
        players=list(players.values()),
    )


def write_report(path, page):
    """The page: config/report.html with `page`, a dict of what it shows, in place of DATA."""
    with open(os.path.join(ROOT, 'config', 'report.html'), encoding='utf-8') as file:
        template = file.read()
    data = json.dumps(page).replace('<', '\\u003c')  # so that no text can end the script it is in
    with write_atomic(path) as file:
        file.write(template.replace('>DATA<', f'>{data}<'))


# -----------------------------------------------------------------------------
# What the user asks for


def split_list(text, sign=','):
    return [part.strip() for part in text.split(sign) if part.strip()]


def check_knobs(config):
    """Ends the run at a knob that is out of its range, or names a file that cannot be there."""
    if not (split_list(init) and split_list(tasks) and out):
        fail('expected --init=CHECKPOINT[,...], --tasks=NAME[,...] and --out=FILE')
    if split not in ('dev', 'test'):
        fail(f'--split={split}: expected dev or test')
    for knob, value in config.items():
        if type(value) in (int, float) and value < 0:
            fail(f'--{knob}={value}: expected no negative number')
    pick_dtype(dtype, pick_device(device))
    for path in filter(None, (out, html)):
        if os.path.isdir(path):
            fail(f'{path} is a folder, expected a file')
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def find_checkpoints(text):
    """({name: folder}, {arm: [names]}) of the knob init: NAME=A+B and patterns of several folders
    are arms. Raises InputError for a pattern without a match."""
    models, arms = {}, {}

    def add(where):
        where = where.rstrip('/')
        name = os.path.basename(where)
        if where in models.values():
            name = f'{name} ({len(models) + 1})'
        elif name in models:
            name = where
        models[name] = where
        return name

    for part in split_list(text):
        arm, _, members = part.rpartition('=')
        found = []
        for folder in split_list(members, '+') if arm else [members]:
            matches = sorted(filter(os.path.isdir, glob.glob(folder))) or [folder]
            if glob.has_magic(folder) and matches == [folder]:
                raise InputError(f'--init={folder}: no folder has such a name')
            found += [add(match) for match in matches]
        if arm or len(found) > 1:
            arms[arm or os.path.basename(members)] = found
    return models, arms


def find_suites(names):
    """({task: Suite}, {task: dict(not_run=reason)}) of tasks as the user names them: NAME=PATH."""
    cache = os.path.join(os.path.dirname(out), 'eval_cache')
    suites, not_run = {}, {}
    for name, _, path in (text.partition('=') for text in names):
        crossing = find_crossing(name)
        base = name.removesuffix(crossing)
        for task, place in attempt(not_run, name, find_task, base, path, data_dir) or ():
            suite = attempt(not_run, task + crossing, list_suite, task, place, split, cache)
            if suite and crossing:
                to = 'text' if crossing == '_to_text' else 'speech'
                suite = attempt(not_run, task + crossing, cross, suite, place, to)
            if suite:
                suites[task + crossing] = suite
    return suites, not_run


if __name__ == '__main__':
    config = configure(globals())
    began = time.time()

    # what cannot be read or written is told at once, before anything is computed
    check_knobs(config)
    models, arms = find_checkpoints(init)
    about = {name: describe(where) for name, where in models.items()}

    # the suites; a task that is missing is told, and the rest goes on
    wanted = dict.fromkeys(split_list(tasks))
    generated = [task for task in wanted if task in METRICS]
    suites, not_run = find_suites([task for task in wanted if task not in METRICS])
    if not suites and not generated:
        fail('nothing can run')
    listing = find_prompts(suites)

    # one checkpoint after the other, each with all its tasks; then their seeds and differences
    scores, players = {}, {}
    for name, where in models.items():
        scores[name] = evaluate(name, where, suites, generated, listing, players)
    items = {name: found.items for name, found in scores.items()}
    arm_means, differences = compare(models, arms, items)

    # the files: every pair's scores, and all results
    rows = [row for found in scores.values() for row in found.rows]
    with write_atomic(os.path.splitext(out)[0] + '.pairs.jsonl') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    record = dict(
        metrics={name: not_run | found.results for name, found in scores.items()},
        differences=differences,
        sampling={name: found.sampling for name, found in scores.items() if found.sampling},
        settings=config,
        arms=arm_means,
    )
    with write_atomic(out) as file:
        file.write(json.dumps(record, indent=1))

    # what a person reads: the page, the tables and notes, and one line of summary last
    columns = make_columns(record['metrics'], suites)
    tables = make_tables(columns, record, about)
    notes = make_notes(record, suites)
    failed = find_failed(record)
    summary = f'{len(models)} models, {len(columns)} tasks, {len(rows)} scores'
    if html:
        lines = notes + [f'Not run: {reason}' for reason in failed]
        write_report(html, make_page(columns, tables, lines, record, about, players, summary))
    for table in tables:
        print_table(table)
    print('\n' + '\n'.join(notes))
    summary += f' in {time.time() - began:.0f} s -> {out}' + f', {html}' * bool(html)
    print(summary + f'; {len(failed)} not run' * bool(failed))
    raise SystemExit(2 if failed else 0)
