"""The metrics of the paper for one or more checkpoints, in one table beside the paper's numbers.

    python eval_slm.py --init=out/slam,out/slam-dpo --data_dir=data --tasks=sblimp,swuggy,salmon
    python eval_slm.py --init=out/slam --tasks=sstorycloze,genppl,autobleu --html=out/report.html
    python eval_slm.py --init="out/a-s*,B=out/b-s1+out/b-s2" --tasks=tstorycloze

A pair counts 1 if its correct utterance has the higher log-likelihood, 1/2 on a tie. The
log-likelihood is that of `<S>` units `<S>`, as a mean over every token but the first (the public
toolkit's convention). Checkpoints that differ only in their seed form an arm, given by a pattern or
as NAME=A+B: its row has their mean +- the standard deviation, and its intervals include the seeds.
untrained:FOLDER is the model of a checkpoint with random weights.

Tasks, and where they are looked for in data_dir:
    sblimp, swuggy                      ZeroSpeech 2021 as unpacked: syntactic/, lexical/
    sstorycloze, tstorycloze, salmon    the folders of these names, or parquet files in them
    own, or any other name              your own pairs: NAME=PATH, or NAME in data_dir
        a folder      <id>_correct.wav, <id>_incorrect.wav; type and voice from manifest.jsonl
        .csv, .jsonl  columns correct, incorrect (paths from the file's folder), type, voice
        .parquet      a file, a folder or hub:OWNER/NAME: positive_audio, negative_audio
    genppl, autobleu                    on the transcript of prompt + continuation, as published
    gptscore                            a judge's rating of the continuation
    dnsmos                              predicted opinion score (DNSMOS, overall) of the sound
A suite NAME_unseen beside NAME is scored too. For interleaved models NAME_to_text and
NAME_from_text score the endings of stories in the other modality than their beginnings; these need
the words and their times in manifest.jsonl.

All that is asked for is looked for before anything is computed; what is missing ends the run.
"""

from config import configure

import csv
import glob
import json
import os
import re
import time
import urllib.request
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from model import (
    OFFSET,
    SAMPLE_RATE,
    InputError,
    UnitEncoder,
    UnitVocoder,
    auto_bleu,
    check_encoder_ids,
    content_hash,
    dedup,
    file_hash,
    find_audio,
    find_checkpoint,
    git_commit,
    load_audio,
    load_slm,
    pack_rows,
    pick_device,
    pick_dtype,
    read_json,
    read_jsonl,
    read_parquet,
    reading,
    resample,
    split_of,
    tokenize_words,
    write_atomic,
)

# -----------------------------------------------------------------------------
init = 'out/slam'  # checkpoints, comma-separated: folders, hub names, patterns, NAME=A+B
tasks = 'sblimp,sstorycloze,tstorycloze'  # comma-separated, see above
wer = False  # also the word error rate of resynthesised prompts whose text is known
data_dir = 'data'  # holds the suites
split = 'dev'  # of ZeroSpeech 2021: dev or test
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
# models that listen
asr = 'openai/whisper-large-v3-turbo'  # transcribes for genppl, autobleu, gptscore and wer
asr_language = 'en'  # of a multilingual Whisper
text_lm = 'meta-llama/Llama-3.2-1B'  # genppl's
judge = ''  # gptscore's: an OpenAI-compatible URL, such as http://localhost:8000/v1
judge_model = 'gpt-4o'  # the judge's name there; the key is read from $OPENAI_API_KEY
# what is written
out = 'out/eval.json'  # beside it NAME.pairs.jsonl, every pair's scores, and eval_cache/, the units
html = ''  # a self-contained page: table and figures
paper = (
    'results'  # rows of config/paper.csv: results, peers, data, context (comma-separated) or all
)
seed = 1234
device = 'auto'  # cuda, mps or cpu
dtype = 'auto'  # bfloat16 on cuda, else float32
# -----------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.abspath(__file__))
ZEROSPEECH = dict(sblimp='syntactic', swuggy='lexical')  # tasks of its layout, and their folders
SALMON = (
    *('bg_alignment', 'bg_all_consistency', 'bg_domain_consistency', 'gender_consistency'),
    *('rir_consistency', 'sentiment_alignment', 'sentiment_consistency', 'speaker_consistency'),
)
# titles of columns, where they differ from the task's name
LABELS = dict(sblimp='sBLIMP', swuggy='sWUGGY, all', sstorycloze='sSC', tstorycloze='tSC')
LABELS['swuggy_in_vocabulary'] = 'sWUGGY, in vocabulary'
# suffixes of a task's name for endings in the other modality than the beginnings
CROSSINGS = {'_to_text': ', speech → text', '_from_text': ', text → speech'}
# GenPPL and auto-BLEU of the paper were measured with these defaults (section 4 and Table 6)
PROTOCOL = ('prompts', 'n_prompts', 'prompt_seconds', 'max_new_tokens', 'temperature', 'top_k')
PROTOCOL = {
    name: globals()[name] for name in (*PROTOCOL, 'top_p', 'repetition_penalty', 'asr', 'text_lm')
}
MUCH_CUT, MUCH_BROKEN = 0.01, 0.05  # shares of cut pairs, and of short or looping transcripts
JUDGE = r"""A speech model heard the beginning of a recording and went on speaking. Below are the
transcripts of both. Judge how relevant the continuation is to the beginning and how likely it is to
follow it, on a scale from 1 (very unlikely and irrelevant) to 5 (very likely and highly relevant).
Do not mind small mistakes of the transcription, nor that the continuation stops before its end.
Write a brief analysis first, then close with: "The final answer is \boxed{x}", where x is 1 to 5.

Beginning: %s
Continuation: %s"""

# A recording: its files joined, `seconds` of their beginning (0: all), or what follows `start` s
Clip = namedtuple('Clip', 'files seconds start', defaults=(0.0, 0.0))
# A story whose beginning and ending differ in modality: one is speech, a Clip, the other text. Only
# the ending is scored, which is in the modality `to`: 'text' or 'speech'
Crossing = namedtuple('Crossing', 'speech text to')
# What is scored: pairs, a list of make_pair's dicts; official: the audio is that of the paper
Suite = namedtuple('Suite', 'pairs split official', defaults=('', False))


# -----------------------------------------------------------------------------
# Suites: folders and files -> pairs. A new layout is a function that returns pairs, called in
# list_suite


def make_pair(key, pos, neg, about=None, **more):
    """A pair: dict(id, voice, types, pos, neg, text, words). types: it counts in the score of each;
    pos, neg: each a Clip or Crossing; text, words: of pos; about: the manifest's row of pos."""
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
    endings of one beginning) or a part of SALMon, sample_<n>_*, where the first name is correct.

    Sub-folders that repeat the same n are voices. Raises InputError for any other file.
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
            raise InputError(f'{file}: unknown, or a second file of this name; expected {layout}')
        sides[match[1]][match[2]] = file

    manifest, pairs = read_manifest(folder), []
    by_voice = len({os.path.basename(key) for key in sides}) < len(sides)
    for key, side in sides.items():
        mutual = [side.pop('mutual')] if 'mutual' in side else []
        if len(side) != 2:
            raise InputError(f'{min([*side.values(), *mutual])} has no counterpart of {layout}')
        pos, neg = (side[name] for name in sorted(side))  # 'correct' < 'incorrect'
        pair = make_pair(key, Clip((*mutual, pos)), Clip((*mutual, neg)), manifest.get(pos))
        if by_voice:
            pair |= dict(id=os.path.basename(key), voice=pair['voice'] or os.path.dirname(key))
        pairs.append(pair)
    return pairs


def read_csv(path):
    """Rows of a .csv file as dicts. Raises InputError."""
    with reading(path), open(path, newline='', encoding='utf-8-sig') as file:
        return list(csv.DictReader(file))


def list_table(where, cache):
    """Pairs of a table: .csv or .jsonl with the columns correct and incorrect (paths, from the
    file's folder), or parquet with positive_audio and negative_audio (bytes); type and voice.

    Audio in bytes is unpacked in the folder `cache` under the hash of its content, so that a
    corrected file at the same path is never scored from an old copy. Raises InputError for a row
    without both sides.
    """
    if where.endswith('.csv'):
        rows = enumerate(read_csv(where), 2)
    else:
        rows = read_jsonl(where) if where.endswith('.jsonl') else enumerate(read_parquet(where), 1)
    pairs = []
    for line, row in rows:
        clips = []
        for side in (('correct', 'positive_audio'), ('incorrect', 'negative_audio')):
            path, audio = (row.get(name) for name in side)
            if audio and audio.get('bytes'):
                path = os.path.join(cache, 'audio', content_hash(audio['bytes']) + '.wav')
                if not os.path.exists(path):
                    with write_atomic(path, 'wb') as file:
                        file.write(audio['bytes'])
            elif isinstance(path, str):
                path = os.path.join(os.path.dirname(where), path)
            else:
                wanted = 'a path in {} or bytes in {}'.format(*side)
                raise InputError(f'{where}, line {line}: expected {wanted}')
            clips.append(Clip((path,)))
        about = row | dict(voice=row.get('voice') or row.get('speaker'))
        pairs.append(make_pair(row.get('id', line), *clips, about))
    return pairs


def list_zerospeech(root, kind, split):
    """Pairs of a task of ZeroSpeech 2021, grouped as the official tool does.

    root: what holds the folder `kind` (syntactic or lexical), or that folder, or its split.
    Raises InputError if gold.csv, one of its columns, or a file that it names is missing.
    """
    places = (os.path.join(root, kind, split), os.path.join(root, split), root)
    folder = next((place for place in places if os.path.isdir(place)), root)
    gold, lexical = os.path.join(folder, 'gold.csv'), kind == 'lexical'
    if not os.path.exists(gold):
        wanted = f'the data as unpacked, {kind}/{split}/gold.csv with its .wav files'
        raise InputError(f'{gold} is missing; expected {wanted}')
    clips = {os.path.basename(os.path.splitext(f)[0]): Clip((f,)) for f in find_audio(folder)}

    # {(id, voice): (correct rows, wrong rows)}; a word has several non-words
    groups, pairs = defaultdict(lambda: ([], [])), []
    columns = ['id', 'filename', 'voice', 'correct', *(['frequency'] if lexical else ['type'])]
    for line, row in enumerate(read_csv(gold), 2):
        if any(row.get(name) is None for name in columns):
            wanted = f'expected the columns {", ".join(columns)}'
            raise InputError(f'{gold}, line {line}: not that of the {kind} task; {wanted}')
        if row['filename'] not in clips:
            raise InputError(f'{folder}/{row["filename"]}.wav is missing: gold.csv names it')
        key = row['id'] if lexical else '/'.join((row['type'], row['subtype'], row['id']))
        groups[key, row['voice']][row['correct'].strip() != '1'].append(row)

    for (key, voice), (correct, wrong) in groups.items():
        if not (correct and wrong):
            name = (correct or wrong)[0]['filename']
            raise InputError(f'{gold}: {name} has no counterpart of the same id and voice')
        types = [correct[0].get('type')]
        if lexical:
            known = float(correct[0]['frequency'] or 0) >= 1  # how often LibriSpeech has the word
            types = ['in vocabulary' if known else 'out of vocabulary']
        for sides in product(correct, wrong):
            pos, neg = (clips[row['filename']] for row in sides)
            pairs.append(make_pair(key, pos, neg, dict(voice=voice), types=types))
    return pairs


def find_task(name, path, data_dir):
    """[(task, path), ...] of a task as the user names it: the eight parts of SALMon, or NAME and,
    where it exists, NAME_unseen. Raises InputError where nothing is found."""
    there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    names = [name.lower() + end for end in ('', '.jsonl', '.csv', '.parquet')]
    found = [os.path.join(data_dir, child) for child in there if child.lower() in names]
    if name in (*ZEROSPEECH, 'salmon'):
        found.append(data_dir)  # their parts may lie in data_dir itself
    if not (path or found):
        has = ', '.join(there[:9]) or 'nothing'
        raise InputError(f'no {name!r} in {data_dir} (it has {has}): give --tasks={name}=PATH')
    path = path or found[0]
    if name == 'salmon' or os.path.isdir(os.path.join(path, SALMON[0])):
        return [(f'{name}_{part}', os.path.join(path, part)) for part in SALMON]
    unseen = path.rstrip('/') + '_unseen'
    return [(name, path)] + ([(name + '_unseen', unseen)] if os.path.isdir(unseen) else [])


def list_suite(name, path, split, cache):
    """The Suite of a task. Raises InputError if a file is missing or has no counterpart."""
    # a manifest of ours: synthesised audio, whose scores do not compare with the paper's
    around = (path, os.path.join(path, split), os.path.dirname(os.path.abspath(path)))
    official = not any(os.path.exists(os.path.join(place, 'manifest.jsonl')) for place in around)
    kind = ZEROSPEECH.get(name.removesuffix('_unseen'))
    if kind and not path.endswith(('.csv', '.jsonl', '.parquet')):
        return Suite(list_zerospeech(path, kind, split), split, official)
    shards = glob.glob(os.path.join(glob.escape(path), '**', '*.parquet'), recursive=True)
    pairs = list_folder(path) if os.path.isdir(path) and not shards else list_table(path, cache)
    if not pairs:
        raise InputError(f'{path} holds no pairs')
    return Suite(pairs, official=official)


# -----------------------------------------------------------------------------
# Cross-modal stories: the beginning in one modality, the two endings in the other


def find_crossing(name):
    """Which of CROSSINGS a task's name ends with, or ''."""
    return next((end for end in CROSSINGS if name.endswith(end)), '')


def find_ending(words, others):
    """Index of the word where the endings of two stories begin, lists of words: that of the
    sentence in which they first differ, or that word itself if they share no sentence."""
    both = list(zip(words, others, strict=False))
    same = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
    ends = [i for i in range(1, same + 1) if words[i - 1].endswith(('.', '!', '?'))]
    return max(ends, default=same)


def cross(suite, path, to):
    """The Suite with endings in the modality `to`, 'text' or 'speech', and beginnings in the other.
    Raises InputError where manifest.jsonl lacks the words of a story and their times."""
    manifest, pairs = read_manifest(path), []
    for pair in suite.pairs:
        files = ['+'.join(pair[side].files) for side in ('pos', 'neg')]
        times = [manifest.get(file, {}).get('words') or [] for file in files]
        words = [[word for word, *_ in story] for story in times]
        first = find_ending(*words)
        if not 0 < first < min(map(len, words)):
            raise InputError(f'{files[0]}: no ending known, expected `words` in manifest.jsonl')

        # both sides have the beginning of the correct story
        begin, text = Clip((files[0],), times[0][first - 1][2]), ' '.join(words[0][:first])
        if to == 'text':
            sides = [Crossing(begin, ' '.join(story[first:]), to) for story in words]
        else:
            starts = [story[first][1] for story in times]
            clips = [Clip((file,), start=start) for file, start in zip(files, starts, strict=True)]
            sides = [Crossing(clip, text, to) for clip in clips]
        pairs.append(pair | dict(pos=sides[0], neg=sides[1]))
    return suite._replace(pairs=pairs)


# -----------------------------------------------------------------------------
# Likelihoods: utterances -> units, computed once for an encoder -> the log-likelihood of each


def load_clip(clip):
    """(samples,) at 16 kHz: a clip's files joined, and cut."""
    wave = torch.cat([load_audio(file) for file in clip.files])
    return wave[int(clip.start * SAMPLE_RATE) : int(clip.seconds * SAMPLE_RATE) or None]


def encode_clips(clips, unit_encoder, folder):
    """De-duplicated units of clips, {clip: (n,) int array}. Raises InputError for broken audio.

    They are kept in `folder` under a hash of the audio files' content, the cuts and the encoder,
    so that a corrected file at the same path is encoded again.
    """
    clips = list(dict.fromkeys(clips))
    with ThreadPoolExecutor(8) as pool:
        files = sorted({file for clip in clips for file in clip.files})
        with reading('audio of the suite'):
            hashes = dict(zip(files, pool.map(file_hash, files), strict=True))
        cuts = [[[hashes[file] for file in clip.files], clip.seconds, clip.start] for clip in clips]
        name = content_hash(unit_encoder.encoder_id, cuts)[:32]
        path = os.path.join(folder, f'units_{name}.json')
        if not os.path.exists(path):
            units, starts = [], range(0, len(clips), 64)  # the waves of 64 are in memory at once
            for start in tqdm(starts, 'encoding', leave=False, disable=len(starts) < 3):
                for wave in pool.map(load_clip, clips[start : start + 64]):
                    units.append(dedup(unit_encoder.encode(wave).cpu())[0].tolist())
            with write_atomic(path) as file:
                json.dump(dict(units=units), file)
    units = [np.array(row, np.int64) for row in read_json(path)['units']]
    return dict(zip(clips, units, strict=True))


def to_tokens(model, utterance):
    """(tokens, how many of the first are given and not scored) of an utterance, a list and an int.

    utterance: units, scored but for the first token as `<S>` units `<S>`, of an interleaved model
    `<speech>` units and its end; as the units alone for one trained without (slam['scoring'] ==
    'units'). Or (units, text ids, to): a beginning, given, and the ending in the modality `to`,
    which alone is scored. Raises InputError for units that the model does not have.
    """
    if isinstance(utterance, tuple):
        units, ids, to = utterance
        parts = [('speech', units), ('text', ids)]
        if to == 'speech':
            parts.reverse()
        tokens = model.tokens_of(parts).tolist()
        given = len(model.tokens_of(parts[:1])) + 1  # and the switch to the other modality
    else:
        units, given = utterance, 1
        alone = model.slam.get('scoring') == 'units'
        tokens = model.tokens_of([('speech', units)], alone).tolist()
        tokens += [] if alone else [model.end]

    n_units = model.slam.get('n_units', model.config.vocab_size - OFFSET)
    if (top := int(np.max(units, initial=0))) >= n_units:
        has = f'none of the {n_units} of the model'
        raise InputError(f'unit {top} is {has}: made by another encoder?')
    if len(tokens) <= given:
        raise InputError('an utterance of fewer than two units cannot be scored by this model')
    return tokens, given


def cut_to_context(tokens, given, context):
    """(tokens, given) of to_tokens within the model's context: an utterance loses its end, a
    cross-modal story the start of its beginning."""
    cut = max(0, len(tokens) - context)
    return (tokens[:context], given) if given == 1 else (tokens[cut:], max(1, given - cut))


@torch.inference_mode()
def log_likelihoods(model, utterances):
    """Log-likelihoods in nats of utterances, of to_tokens' kinds, each token given all before it.

    Returns: sums (n,), tokens predicted (n,), both of what fits the model's context. Each distinct
    sequence is computed once, so that equal ones tie exactly. Raises InputError for units that the
    model does not have, and for NaN.
    """
    device, context = next(model.parameters()).device, model.config.context
    sequences = []
    for utterance in utterances:
        tokens, given = cut_to_context(*to_tokens(model, utterance), context)
        sequences.append((tuple(tokens), given))
    distinct = list(dict.fromkeys(sequences))
    lengths = [len(tokens) for tokens, _ in distinct]

    # rows of one width, so that a GPU compiles once; on a CPU they are filled and done one by one
    width = max(2048, *lengths)
    batch = 1 if device.type == 'cpu' else 32
    rows = pack_rows(lengths, width)
    sums = np.zeros(len(distinct))
    starts = range(0, len(rows), batch)
    for start in tqdm(starts, 'scoring', leave=False, disable=len(starts) < 3):
        tokens, document, predicted, segments = np.zeros((4, batch, width), np.int64)
        # the rest of a row: documents within the reach of learned positions
        document[:] = -1 - np.arange(width) // context
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
    if not np.isfinite(sums).all():  # NaN would lose every comparison: a score of 0
        why = 'its weights hold NaN, or overflow'
        raise InputError(f'the model gives likelihoods that are not numbers: {why}')

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
    same for all checkpoints, plus the spread of the seeds: Student's t of their pooled variance,
    because resampling two or three seeds underestimates it. All of one arm's items right or all
    wrong: the exact binomial bound (Clopper and Pearson). One item: no interval.
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
# Models that listen. Those that the tasks need are opened before anything is generated


@lru_cache(maxsize=4)
def load_hf(model_class, processor_class, where):
    """A transformers model and its tokenizer or processor. Raises InputError if there is none; the
    format of a folder made for another library is named."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = find_checkpoint(where, tensors=False)  # fails at once without a network
    about, files = os.path.join(folder, 'config.json'), ' '.join(os.listdir(folder))
    if not os.path.exists(about) or 'model_type' not in read_json(about):
        kind = 'GGUF' if '.gguf' in files else 'CTranslate2' if 'model.bin' in files else 'unknown'
        raise InputError(f'{where} has the format {kind}: expected a folder of transformers')
    place = pick_device(device)
    with reading(where):
        processor = getattr(transformers, processor_class).from_pretrained(where)
        model_class = getattr(transformers, model_class)
        model = model_class.from_pretrained(where, dtype=pick_dtype('auto', place))
    return model.eval().to(place), processor


def open_listener(name):
    """What a metric needs: the model of the knob asr or text_lm, a first answer of the judge, or
    the predictor of the package speechmos. Raises InputError if it cannot be had."""
    if name == 'asr':
        return load_hf('WhisperForConditionalGeneration', 'WhisperProcessor', asr)
    if name == 'text_lm':
        return load_hf('AutoModelForCausalLM', 'AutoTokenizer', text_lm)
    if name == 'judge':
        return ask_judge('Reply with the word ready.')
    try:
        from speechmos import dnsmos  # has its weights in the package
    except ImportError as error:
        raise InputError(f'{error}: pip install speechmos librosa onnxruntime') from None
    return dnsmos


@torch.inference_mode()
def transcribe(waves, batch=16):
    """Whisper's transcripts of 16 kHz waves, of their first 30 s; '' for an empty one."""
    model, processor = open_listener('asr')
    multilingual = getattr(model.generation_config, 'is_multilingual', False)
    options = dict(language=asr_language, task='transcribe') if multilingual else {}
    texts = [''] * len(waves)
    filled = [i for i, wave in enumerate(waves) if len(wave)]
    starts = range(0, len(filled), batch)
    for start in tqdm(starts, 'transcribing', leave=False, disable=len(filled) < 20):
        part = filled[start : start + batch]
        sound = dict(raw_speech=[waves[i].numpy() for i in part], sampling_rate=SAMPLE_RATE)
        features = processor.feature_extractor(**sound, return_tensors='pt').input_features
        ids = model.generate(features.to(model.device, model.dtype), **options)
        found = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for i, text in zip(part, found, strict=True):
            texts[i] = text
    return texts


@torch.inference_mode()
def text_nll(text):
    """Mean negative log-likelihood per token of a text under the text LM, in nats; None where no
    token is predicted."""
    lm, tokenizer = open_listener('text_lm')
    ids = tokenizer(text, return_tensors='pt').input_ids.long().to(lm.device)
    if ids.shape[1] < 2:
        return None
    return torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1].float(), ids[0, 1:]).item()


def ask_judge(question, retries=3):
    """The answer of an OpenAI-compatible endpoint; errors that may pass are tried again. Raises
    InputError."""
    if not judge:
        raise InputError('no judge: give --judge=URL')
    message = dict(role='user', content=question)
    body = json.dumps(dict(model=judge_model, temperature=0, messages=[message])).encode()
    headers = {'Authorization': f'Bearer {os.environ.get("OPENAI_API_KEY", "")}'}
    headers |= {'Content-Type': 'application/json'}
    request = urllib.request.Request(judge.rstrip('/') + '/chat/completions', body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)['choices'][0]['message']['content'] or ''
    except Exception as error:  # of the network, the server, or an answer of another shape
        if retries and getattr(error, 'code', 500) not in (400, 401, 403, 404):
            time.sleep(2 ** (3 - retries))
            return ask_judge(question, retries - 1)
        remedy = 'check the URL, judge_model and $OPENAI_API_KEY'
        raise InputError(f'the judge at {judge} does not answer ({error}): {remedy}') from None


# -----------------------------------------------------------------------------
# Metrics of what a checkpoint says. A new one is a function: items of Speaker.listen -> a value of
# each, None where there is none; and an entry in METRICS


def is_short(text):
    """Whether a transcript has fewer than two tokens; GenPPL and auto-BLEU leave it out."""
    return len(tokenize_words(text)) < 2


def is_loop(text, n=5):
    """Whether one n-gram of words occurs more than once and fills half of a transcript."""
    words, filled = tokenize_words(text), defaultdict(set)
    for i in range(len(words) - n + 1):
        filled[tuple(words[i : i + n])].update(range(i, i + n))
    return any(2 * len(places) >= len(words) for places in filled.values() if len(places) > n)


def rate_fluency(items):
    """GenPPL: mean negative log-likelihoods in nats under the text LM."""
    return [None if is_short(item['text']) else text_nll(item['text']) for item in items]


def rate_repetition(items):
    """Auto-BLEU of the transcripts that GenPPL scores."""
    texts = [item['text'] for item in items]
    return [None if is_short(text) else auto_bleu(tokenize_words(text)) for text in texts]


def rate_sense(items):
    """GPTScore: a judge's rating, 1 to 5, of each continuation, given the text of its prompt: the
    last boxed number of the answer."""
    unknown = [item for item in items if item['known'] is None]
    beginnings = transcribe([load_clip(Clip((i['id'],), i['seconds'])) for i in unknown])
    for item, text in zip(unknown, beginnings, strict=True):
        item['known'] = text
    ratings = []
    for item in tqdm(items, 'judging', leave=False):
        answer = ask_judge(JUDGE % (item['known'], item['text']))
        boxed = re.findall(r'\\boxed\{\D{0,8}?([1-5](?:\.\d+)?)\D{0,2}\}', answer)
        ratings.append(float(boxed[-1]) if boxed and float(boxed[-1]) <= 5 else None)
    return ratings


def rate_sound(items):
    """The overall opinion score of DNSMOS (P.835); None for an empty wave."""
    predictor = open_listener('dnsmos')
    waves = [item['wave'].clamp(-1, 1).numpy() for item in items]
    return [predictor.run(w, SAMPLE_RATE)['ovrl_mos'] if len(w) else None for w in waves]


def rate_words(items):
    """Word errors in percent of the mean number of words: their mean is the word error rate."""
    from torchaudio.functional import edit_distance

    pairs = [(item['known'], item['text'].replace('’', "'")) for item in items]
    words = [[re.findall(r"[\w']+", text.lower()) for text in pair] for pair in pairs]
    mean = np.mean([len(known) for known, _ in words])
    return [100 * edit_distance(known, found) / mean for known, found in words]


# what is listened to: prompt and continuation spoken together, the continuation alone, or whole
# recordings, resynthesised; needs: of open_listener; transform: of a mean over prompts -> the score
Metric = namedtuple('Metric', 'label measure what needs rate transform', defaults=(np.asarray,))
BOTH, AFTER, AGAIN = 'prompt + continuation', 'continuation', 'resynthesis'
METRICS = dict(
    genppl=Metric('GenPPL ↓', 'perplexity', BOTH, ('asr', 'text_lm'), rate_fluency, np.exp),
    autobleu=Metric('auto-BLEU ↓', '% of bigrams', BOTH, ('asr',), rate_repetition, percent),
    gptscore=Metric('GPTScore', '1 to 5', AFTER, ('asr', 'judge'), rate_sense),
    dnsmos=Metric('DNSMOS, overall', '1 to 5', BOTH, ('dnsmos',), rate_sound),
    wer=Metric('WER ↓', '% of words', AGAIN, ('asr',), rate_words),
)


# -----------------------------------------------------------------------------
# Checkpoints, and what they say


def load_model(where):
    """The SLM of a checkpoint; of 'untrained:FOLDER' one of its shape with random weights: normal
    with standard deviation 0.02, biases 0, norms 1, drawn from the knob `seed`."""
    folder = where.removeprefix('untrained:')
    model = load_slm(folder).eval()
    if folder != where:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.data.normal_(0, 0.02, generator=generator)
            else:
                weight.data.fill_(0 if name.endswith('bias') else 1)
        model.slam = model.slam | dict(compute=None, scores=None, stage=None)
    return model


@lru_cache(maxsize=4)
def load_encoder(where, place):
    return UnitEncoder.from_pretrained(where, device=place)


class Speaker:
    """A checkpoint with its encoder and its voice. What it says is computed once for all metrics.

    Raises InputError if the encoder is not known, or if it makes other units than the model's.
    """

    def __init__(self, where):
        self.place = pick_device(device)
        self.model = load_model(where).to(self.place, pick_dtype(dtype, self.place))
        slam = self.model.slam
        known, self.voice = encoder or slam.get('encoder'), vocoder or slam.get('vocoder') or ''
        if not known:
            raise InputError(f'{where} names no encoder (a text LM?): give --encoder and --vocoder')
        self.encoder = load_encoder(known, self.place)
        self.ids = {where: slam.get('encoder_id'), known: self.encoder.encoder_id}
        check_encoder_ids(self.ids)
        penalty = repetition_penalty or (1.1 if slam.get('stage') == 'dpo' else 1.0)
        self.sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
        self.sampling |= dict(top_p=top_p, repetition_penalty=float(penalty))
        self.said = {}  # {what: items}

    def units(self, clips):
        """{clip: its units}, kept beside `out`."""
        return encode_clips(clips, self.encoder, os.path.join(os.path.dirname(out), 'eval_cache'))

    def continue_prompts(self, clips):
        """(units of the prompts, units of their continuations), lists of tensors."""
        heads, tails = [torch.as_tensor(units) for units in self.units(clips).values()], []
        starts = range(0, len(heads), 32)
        for start in tqdm(starts, 'continuing', leave=False, disable=len(heads) < 64):
            part = [self.model.tokens_of([('speech', head)]) for head in heads[start:][:32]]
            new = self.model.generate(part, **self.sampling, seed=seed + start)
            tails += [tail - self.model.offset for tail in new]
        return heads, tails

    def listen(self, metric, listing):
        """Items that a metric rates, dict(id, seconds, known: the prompt's text or None, wave at
        16 kHz, and text: the transcript). listing: of find_prompts."""
        if metric.what not in self.said:
            clips = cut_prompts(metric.what, listing)
            if metric.what == AGAIN:
                units = [torch.as_tensor(units) for units in self.units(clips).values()]
            else:
                heads, units = self.continue_prompts(clips)
            if metric.what == BOTH:
                units = [torch.cat(both) for both in zip(heads, units, strict=True)]
            voice, items = UnitVocoder.from_pretrained(self.voice, device=self.place), []
            check_encoder_ids(self.ids | {self.voice: voice.encoder_id})
            for (clip, text), u in zip(
                clips.items(), tqdm(units, 'speaking', leave=False), strict=True
            ):
                wave = resample(voice.decode(u).cpu(), voice.sample_rate, SAMPLE_RATE)
                items.append(dict(id=clip.files[0], seconds=clip.seconds, known=text, wave=wave))
            self.said[metric.what] = items
        items = self.said[metric.what]
        if 'asr' in metric.needs and 'text' not in items[0]:
            for item, text in zip(items, transcribe([i['wave'] for i in items]), strict=True):
                item['text'] = text
        return items


def find_prompts(suites):
    """[dict(path, text, words), ...]: of the knob `prompts`, or the correct utterances of
    sstorycloze, else of the first suite of audio; at most n_prompts."""
    about = {}  # {path: what is known of it}
    if prompts:
        manifest = read_manifest(prompts)
        about = {f: manifest.get(f, {}) for f in map(os.path.normpath, find_audio(prompts))}
    for task in ('sstorycloze', 'sstory', *suites):
        for pair in suites[task].pairs if task in suites and not about else ():
            clip = pair['pos']
            if isinstance(clip, Clip) and len(clip.files) == 1:
                about.setdefault(clip.files[0], pair)
    rows = list(about.items())[:n_prompts]
    return [dict(path=path, text=row.get('text'), words=row.get('words')) for path, row in rows]


def cut_at_word(prompt, seconds):
    """(seconds, text) of the beginning that ends with the word whose end is nearest to `seconds`;
    (seconds, None) where no words are known, which are [[word, start s, end s], ...] of the
    manifest or aligned_text of the JSON file beside the audio."""
    words, beside = prompt['words'], os.path.splitext(prompt['path'])[0] + '.json'
    if not words and os.path.exists(beside):
        words = read_json(beside).get('aligned_text')
    if not words:
        return seconds, None
    last = min(range(len(words)), key=lambda i: abs(words[i][2] - seconds))
    return words[last][2], ' '.join(word for word, *_ in words[: last + 1])


def cut_prompts(what, listing):
    """{clip: its text, None if not known} of prompts from find_prompts. Raises InputError if none
    is left: GPTScore takes those of at least two prompts' length, WER whole recordings of known
    text, no longer than the 30 s that Whisper hears."""
    clips = {}
    for prompt in listing:
        path = prompt['path']
        with reading(path):
            seconds = soundfile.info(path).duration
        if what == BOTH:
            clips[Clip((path,), prompt_seconds)] = None
        elif what == AGAIN and prompt['text'] and seconds <= 30:
            clips[Clip((path,))] = prompt['text']
        elif what == AFTER and seconds >= 2 * prompt_seconds:
            end, text = cut_at_word(prompt, prompt_seconds)
            clips[Clip((path,), end)] = text
    if not clips:
        wanted = {AFTER: f'{2 * prompt_seconds:g} s or more', AGAIN: 'known text and at most 30 s'}
        raise InputError(f'no prompts of {wanted.get(what, "audio: give --prompts=FOLDER")}')
    return clips


# -----------------------------------------------------------------------------
# The scores of one checkpoint


def score_suite(speaker, suite):
    """Result, {pair id: score in 0 .. 1} and rows for the pairs file, of one suite."""
    model, pairs = speaker.model, suite.pairs
    sides = [pair[side] for side in ('pos', 'neg') for pair in pairs]
    units = speaker.units([getattr(side, 'speech', side) for side in sides])
    utterances, names = [], []
    for side in sides:
        clip = getattr(side, 'speech', side)
        utterance, name = units[clip], '+'.join(clip.files)
        if isinstance(side, Crossing):
            utterance = utterance, model.encode_text(side.text, inside=side.to == 'text'), side.to
            name = [name, side.text]
        utterances.append(utterance)
        names.append(name)

    # likelihoods; pairs of which a side does not fit the model's context are counted
    sums, counts = log_likelihoods(model, utterances)
    lengths = np.array([len(to_tokens(model, utterance)[0]) for utterance in utterances])
    pos, neg = np.split(sums / counts, 2)
    cut = np.maximum(*np.split(lengths, 2)) > model.config.context
    wins = (pos > neg) + 0.5 * (pos == neg)
    result, items = summarise(pairs, wins, seed)
    result |= dict(pairs=len(pairs), cut=int(cut.sum()), cut_equal=int((cut & (pos == neg)).sum()))
    result['context'] = model.config.context

    numbers, rows = dict(score_pos=pos, score_neg=neg, win=wins, cut=cut), []
    for i, pair in enumerate(pairs):
        about = {key: pair[key] for key in ('id', 'voice', 'types', 'text')}
        about |= dict(pos=names[i], neg=names[len(pairs) + i])
        rows.append(about | {name: column[i].item() for name, column in numbers.items()})
    return result, items, rows


def score_generated(speaker, task, listing):
    """Result, {prompt: value} and rows for the pairs file, of one task that continues prompts. The
    result counts prompts without a value, and the shares of transcripts that are short or loop."""
    metric = METRICS[task]
    heard = speaker.listen(metric, listing)
    rows = [{key: item.get(key) for key in ('id', 'seconds', 'text')} for item in heard]
    for row, value in zip(rows, metric.rate(heard), strict=True):
        row['value'] = value
    items = {row['id']: row['value'] for row in rows if row['value'] is not None}
    result = dict(score=None, low=None, high=None, n=0)
    if items:
        result = interval([*items.values()], transform=metric.transform, seed=seed)
    result['left_out'] = len(rows) - len(items)
    if 'asr' in metric.needs:
        result['short'] = float(np.mean([is_short(row['text']) for row in rows]))
        result['loops'] = float(np.mean([is_loop(row['text']) for row in rows]))
    return result, items, rows


def evaluate(name, where, suites, generated, listing):
    """(results, items, rows, sampling) of one checkpoint: {task: result}, {task: {pair or prompt:
    value}}, rows of the pairs file, and how it was sampled."""
    results, items, rows, speaker = {}, {}, [], Speaker(where)
    for task in (*suites, *generated):
        if task in suites:
            results[task], items[task], new = score_suite(speaker, suites[task])
        else:
            results[task], items[task], new = score_generated(speaker, task, listing)
        rows += [dict(model=name, task=task) | row for row in new]
        if task == 'swuggy':  # its second column: the words that LibriSpeech has
            inside = {p['id'] for p in suites[task].pairs if 'in vocabulary' in p['types']}
            if known := {key: value for key, value in items[task].items() if key in inside}:
                items['swuggy_in_vocabulary'] = known
                results['swuggy_in_vocabulary'] = interval([*known.values()], seed=seed)
    return results, items, rows, speaker.sampling


# -----------------------------------------------------------------------------
# Table and page


def format_count(number):
    """1_400_000_000 -> '1.4B'."""
    unit, size = next(((u, s) for u, s in (('B', 1e9), ('M', 1e6)) if number >= s), ('K', 1e3))
    return f'{number / size:.3g}{unit}'


def describe(where):
    """What stands beside a checkpoint's scores: GPUs, GPU-days, parameters, tokens (as text), and
    FLOPs of its training, 6 x parameters x tokens (Kaplan et al. 2020), 0 where not known."""
    model = load_model(where)
    last = model.slam.get('compute') or {}
    runs = [run for run in (last.get('pretraining') or {}, last) if run.get('tokens')]
    days = sum(run['devices'] * run['hours'] for run in runs) / 24
    n, tokens = model.num_params(), [run['tokens'] for run in runs]
    about = dict(where=where, n_parameters=n, flops=6 * n * sum(tokens))
    about |= dict(gpus=f'{last["devices"]} {last["device"]}' if runs else '')
    about |= dict(gpu_days=f'{days:.2g}' if days else '', parameters=format_count(n))
    return about | dict(tokens=' + '.join(map(format_count, tokens)))


def read_paper(suites, generated):
    """Rows of config/paper.csv that the knob `paper` asks for, with `scores`, the numbers that
    compare: of the published audio and split, of continuations under the paper's protocol."""
    official = {task for task in suites if suites[task].official}
    tasks = official & {'sblimp', 'sstorycloze', 'tstorycloze'}
    if 'sstorycloze' in official and all(globals()[k] == v for k, v in PROTOCOL.items()):
        tasks |= {'genppl', 'autobleu', 'gptscore'} & {*generated}
    kinds, rows = split_list(paper), []
    for row in read_csv(os.path.join(ROOT, 'config', 'paper.csv')):
        scores = {task: row[task] for task in tasks if row[task]}
        if split_of(row['split']) != split_of(split):
            scores.pop('sblimp', None)
        if scores and (row['rows'] in kinds or 'all' in kinds):
            rows.append(row | dict(scores=scores))
    return rows


def find_doubts(result):
    """Why a result is marked: more than 1 % of the pairs cut, more than 5 % of the transcripts
    short or looping. '' if it is not."""
    doubts = []
    if result.get('cut', 0) > MUCH_CUT * result.get('pairs', 0):
        equal = f', {result["cut_equal"]} of them to equal tokens' * bool(result['cut_equal'])
        doubts.append(f'{result["cut"]:,} of {result["pairs"]:,} pairs are cut{equal}')
    for key, what in (('short', 'have under two tokens'), ('loops', 'loop')):
        if result.get(key, 0) > MUCH_BROKEN:
            doubts.append(f'{100 * result[key]:.0f} % of the transcripts {what}')
    return ' and '.join(doubts)


def format_cell(column, result, sign=''):
    """A result as text: the score with its spread over seeds, * where find_doubts has a reason; on
    a second line the interval, n, and what was cut, short or looping."""
    if not result:
        return ''
    digits = f'{sign}.{column["digits"]}f'
    cell, more = 'none' if result['score'] is None else f'{result["score"]:{digits}}', []
    if 'spread' in result:
        cell += f' ± {result["spread"]:{digits.strip("+")}}'
    cell += '*' * bool(find_doubts(result))
    if result['low'] is not None:
        more.append(f'[{result["low"]:{digits}}, {result["high"]:{digits}}]')
    if column['task'] in METRICS:
        more.append(f'on {result["n"]} common prompts' if sign else f'n = {result["n"]}')
    if 'short' in result:
        more.append(f'{100 * result["short"]:.0f} % short, {100 * result["loops"]:.0f} % loop')
    if result.get('cut'):
        more.append(f'{result["cut"]:,} of {result["pairs"]:,} cut at {result["context"]:,} tokens')
    return '\n'.join(filter(None, (cell, ' '.join(more))))


def make_columns(metrics, suites, others):
    """A column for each task: dict(task, title, what: split, n and measure, digits, percent, paper:
    the numbers of others, [[model, number], ...])."""
    columns = []
    for task in dict.fromkeys(task for results in metrics.values() for task in results):
        crossing = find_crossing(task)
        base = task.removesuffix(crossing).removesuffix('_unseen')
        title, measure = LABELS.get(base, base), '% of pairs, by mean log-likelihood'
        title += ', unseen voices' * ('_unseen' in task) + CROSSINGS.get(crossing, '')
        if task in METRICS:
            title, measure = METRICS[task].label, f'{METRICS[task].measure}, {METRICS[task].what}'
        n = max(results.get(task, {}).get('n', 0) for results in metrics.values())
        suite = suites.get(task.removesuffix('_in_vocabulary'), Suite([]))
        what = '; '.join(filter(None, (suite.split, f'n = {n:,}' * bool(n), measure)))
        numbers = [
            [row['model'], float(row['scores'][task])] for row in others if task in row['scores']
        ]
        digits = 2 if task in ('autobleu', 'gptscore', 'dnsmos') else 1
        column = dict(task=task, title=title, what=what, digits=digits, paper=numbers)
        columns.append(column | dict(percent=task not in METRICS))
    return columns


def make_tables(columns, record, about, others):
    """(rows of the results, rows of the differences), lists of cells, the head first.

    record: what eval.json has; about: {checkpoint: of `describe`}; others: of read_paper.
    """

    def cells(results, sign=''):
        return [format_cell(column, results.get(column['task']), sign) for column in columns]

    beside = ('gpus', 'gpu_days', 'parameters', 'tokens')
    titles = [column['title'] for column in columns]
    table = [['model', *titles, 'GPUs', 'GPU-days', 'parameters', 'tokens']]
    table.append(['', *(column['what'] for column in columns), '', '', '', ''])
    for name, results in record['metrics'].items():
        table.append([name, *cells(results), *(about[name][key] for key in beside)])
    for name, arm in record['arms'].items():
        title = f'{name}: mean of {len(arm["seeds"])} seeds'
        table.append([title, *cells(arm['metrics']), '', '', '', ''])
    for row in others:
        numbers = [row['scores'].get(column['task'], '') for column in columns]
        table.append([row['model'], *numbers, *(row[key] for key in beside)])
    changes = [['difference', *titles]]
    changes += [[name, *cells(results, '+')] for name, results in record['differences'].items()]
    return table, changes


def make_notes(columns, record, suites, others):
    """Lines under the table: what the intervals are, the sampling, and what a * stands for."""
    notes = ['Intervals: 95 %, bootstrap over pairs; exact where all or none are right.']
    if record['arms']:
        notes.append('Means and differences of several seeds count the seeds too.')
    else:
        which = 'Differences are of these checkpoints'
        notes.append(f'{which}: other seeds may differ by more (--init="a-s*").')
    for name, results in record['metrics'].items():
        if any(column['task'] in METRICS for column in columns):
            knobs = record['sampling'][name].items()
            how = ', '.join(f'{key.replace("_", " ")} {value:g}' for key, value in knobs)
            notes.append(f'{name}: sampled with {how}, prompts of {prompt_seconds:g} s.')
        for column in columns:
            result, title = results.get(column['task'], {}), column['title'].strip(' ↓')
            if doubts := find_doubts(result):
                after = 'endings are not scored' if 'cut' in result else 'compare the differences'
                notes.append(f'* {name}, {title}: {doubts}; {after}.')
            if result.get('left_out'):
                notes.append(f'{name}: {result["left_out"]} without a value left out of {title}.')
    alike = defaultdict(list)  # {note: models}
    for row in others:
        alike[row['note']].append(row['model'])
    notes += [f'{", ".join(models)}: {note}.' for note, models in alike.items() if note]
    own = [task for task, suite in suites.items() if not suite.official]
    if {*own} & {'sblimp', 'sstorycloze', 'tstorycloze'}:
        notes.append(f"{', '.join(own)}: not the published audio, so without the paper's numbers.")
    return notes


def print_table(rows):
    """A list of lists of cells as a table of Markdown, the head first; nothing if it is alone."""
    if len(rows) > 1:
        rows = [[cell.replace('\n', ' ') for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ['-' * width for width in widths])
        print()
        for row in rows:
            print('|', *(f'{cell:<{w}} |' for cell, w in zip(row, widths, strict=True)))


def write_report(path, page):
    """The page: assets/report.html with `page`, a dict of what it shows, in place of DATA."""
    with open(os.path.join(ROOT, 'assets', 'report.html'), encoding='utf-8') as file:
        template = file.read()
    data = json.dumps(page).replace('<', '\\u003c')  # so that no text can end the script it is in
    with write_atomic(path) as file:
        file.write(template.replace('>DATA<', f'>{data}<'))


# -----------------------------------------------------------------------------
# What the user asks for


def split_list(text, sign=','):
    return [part.strip() for part in text.split(sign) if part.strip()]


def find_checkpoints(text):
    """({name: folder}, {arm: [names]}) of the knob init: NAME=A+B and patterns of several folders
    are arms. Raises InputError for a pattern without a match."""
    models, arms = {}, {}
    for part in split_list(text):
        arm, _, members = part.rpartition('=')
        found = []
        for folder in split_list(members, '+') if arm else [members]:
            matches = sorted(filter(os.path.isdir, glob.glob(folder))) or [folder]
            if glob.has_magic(folder) and matches == [folder]:
                raise InputError(f'--init={folder}: no folder has such a name')
            for where in (match.rstrip('/') for match in matches):
                name = 'untrained' if where.startswith('untrained:') else os.path.basename(where)
                name = where if models.get(name, where) != where else name
                models[name] = where
                found.append(name)
        if arm or len(found) > 1:
            arms[arm or os.path.basename(members)] = found
    return models, arms


def find_suites(names):
    """{task: Suite} of tasks as the user names them: NAME or NAME=PATH. Raises InputError."""
    cache, suites = os.path.join(os.path.dirname(out), 'eval_cache'), {}
    fold = 'test' if split_of(split) == 'test' else 'dev'
    for name, _, path in (text.partition('=') for text in names):
        crossing = find_crossing(name)
        for task, place in find_task(name.removesuffix(crossing), path, data_dir):
            suite = list_suite(task, place, fold, cache)
            if crossing:
                suite = cross(suite, place, 'text' if crossing == '_to_text' else 'speech')
            suites[task + crossing] = suite
    return suites


if __name__ == '__main__':
    config = configure(globals())
    began = time.time()

    # what cannot be found, read or opened ends the run before anything is computed
    models, arms = find_checkpoints(init)
    about = {name: describe(where) for name, where in models.items()}
    wanted = dict.fromkeys(split_list(tasks) + ['wer'] * wer)
    generated = [task for task in wanted if task in METRICS]
    suites = find_suites([task for task in wanted if task not in METRICS])
    listing = find_prompts(suites)
    for part in dict.fromkeys(part for task in generated for part in METRICS[task].needs):
        open_listener(part)

    # one checkpoint after the other, each with all its tasks; then their seeds and differences
    metrics, items, rows, sampling = {}, {}, [], {}
    for name, where in models.items():
        found = evaluate(name, where, suites, generated, listing)
        metrics[name], items[name], new, sampling[name] = found
        rows += new
    means, differences = compare(models, arms, items)

    # the files: every pair's scores, and all results
    with write_atomic(os.path.splitext(out)[0] + '.pairs.jsonl') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    record = dict(metrics=metrics, differences=differences, sampling=sampling)
    record |= dict(settings=config, arms=means)
    with write_atomic(out) as file:
        file.write(json.dumps(record, indent=1))

    # what a person reads: the page, the tables and notes, and one line of summary last
    others = read_paper(suites, generated)
    columns = make_columns(metrics, suites, others)
    tables = make_tables(columns, record, about, others)
    notes = make_notes(columns, record, suites, others)
    summary = f'{len(models)} models, {len(columns)} tasks, {len(rows)} scores'
    if html:
        page = dict(made=time.strftime('%d %B %Y, %H:%M'), commit=(git_commit() or '')[:7])
        page |= dict(data=data_dir, summary=summary, table=tables[0], changes=tables[1])
        page |= dict(scores=metrics | {f'{arm} (mean)': means[arm]['metrics'] for arm in means})
        page |= dict(about=about, columns=columns, paper=others)
        write_report(html, page | dict(notes=notes))
    for table in tables:
        print_table(table)
    print('\n' + '\n'.join(notes))
    print(f'{summary} in {time.time() - began:.0f} s -> {out}' + f', {html}' * bool(html))
