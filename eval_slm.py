"""Evaluate checkpoints with the metrics of the paper, in one table with the paper's numbers.

    python eval_slm.py --init=out/slam,out/slam-dpo --tasks=sblimp,swuggy,genppl --html=report.html
    python eval_slm.py --init="untrained:out/a-s1,out/a-s*,B=out/b-s1+out/b-s2"

A pair scores 1 if its correct utterance has the higher mean log-likelihood, and 1/2 for a tie. The
mean is over all tokens of `<S>` units `<S>` except the first (the public toolkit's convention).
An arm is a set of checkpoints that differ only in their seed: a pattern, or NAME=A+B. It gets mean
+- standard deviation, and intervals that include the seeds. untrained:FOLDER: random weights.

Tasks, and their files in data_dir:
    sblimp, swuggy                      ZeroSpeech 2021 as unpacked: syntactic/, lexical/
    sstorycloze, tstorycloze, salmon    the folders of these names, or parquet files in them
    own, or any other name              your own pairs: NAME=PATH, or NAME in data_dir
        a folder      <id>_correct.wav, <id>_incorrect.wav; type and voice from manifest.jsonl
        .csv          columns correct, incorrect (paths relative to the file), type, voice
        .parquet      a file, a folder or hub:OWNER/NAME: positive_audio, negative_audio
    genppl, autobleu                    on the transcript of prompt + continuation, as published
    gptscore, dnsmos                    rating by an LLM judge; predicted opinion score (DNSMOS)
A suite NAME_unseen beside NAME is scored too. NAME_to_text and NAME_from_text score an interleaved
model on story endings in the other modality; manifest.jsonl must have word times.
"""

from config import configure

import csv
import glob
import importlib
import json
import os
import re
import threading
import time
import urllib.request
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import model as M
from model import SAMPLE_RATE, InputError, reading

# -----------------------------------------------------------------------------
init = 'out/slam'  # checkpoints, comma-separated: folders, hub names, patterns, NAME=A+B
tasks = 'sblimp,sstorycloze,tstorycloze'  # comma-separated, see above
wer = False  # also the word error rate of resynthesised prompts with known text
data_dir = 'data'  # holds the suites
split = 'dev'  # split of ZeroSpeech 2021: dev or test
encoder = ''  # name or folder; replaces the encoder that each checkpoint names
vocoder = ''
# prompts and sampling (Table 6 of the paper)
prompts = ''  # folder; '': the correct utterances of sstorycloze, sstory or the first audio suite
n_prompts = 1000  # prompts to continue
prompt_seconds = 3.0  # gptscore: cut at the nearest end of a word
max_new_tokens = 150
temperature = 0.8
top_k = 25
top_p = 1.0
repetition_penalty = None  # None: 1.1 for DPO models, 1.0 for others
# models that transcribe or rate the output
asr = 'openai/whisper-large-v3-turbo'  # transcribes for genppl, autobleu, gptscore and wer
asr_language = 'en'  # language code for a multilingual Whisper
text_lm = 'meta-llama/Llama-3.2-1B'  # text LM for genppl
judge = ''  # LLM for gptscore: an OpenAI-compatible URL, such as http://localhost:8000/v1
judge_model = 'gpt-4o'  # the judge's model name; the key is read from $OPENAI_API_KEY
# output
out = 'out/eval.json'  # beside it: NAME.pairs.jsonl (scores of every pair) and eval_cache/ (units)
html = ''  # a self-contained page: table and figures
paper = 'results'  # rows of config/paper.csv: results, peers, data, context (comma-separated), all
seed = 1234
device = 'auto'  # cuda, mps or cpu
dtype = 'auto'  # bfloat16 on cuda, else float32
# -----------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.abspath(__file__))
ZEROSPEECH = dict(sblimp='syntactic', swuggy='lexical')  # tasks in its layout, and their folders
SALMON = 'bg_alignment bg_all_consistency bg_domain_consistency gender_consistency rir_consistency'
SALMON += ' sentiment_alignment sentiment_consistency speaker_consistency'
PAPER_TASKS = ('sblimp', 'sstorycloze', 'tstorycloze')
TITLES = dict(sblimp='sBLIMP', swuggy='sWUGGY', sstorycloze='sSC', tstorycloze='tSC')
CROSSINGS = ('_to_text', '_from_text')  # of tasks with endings in the other modality
# The paper measured GenPPL and auto-BLEU with these defaults (section 4 and Table 6)
PROTOCOL = 'prompts n_prompts prompt_seconds max_new_tokens temperature top_k top_p asr text_lm'
PROTOCOL = {name: globals()[name] for name in (*PROTOCOL.split(), 'repetition_penalty')}
MUCH_CUT, MUCH_BROKEN = 0.01, 0.05  # with more cut pairs or broken transcripts a score gets a *
JUDGE = r"""A speech model heard the beginning of a recording and went on speaking. Below are the
transcripts of both. Judge how relevant the continuation is to the beginning and how likely it is to
follow it, on a scale from 1 (very unlikely and irrelevant) to 5 (very likely and highly relevant).
Do not mind small mistakes of the transcription, nor that the continuation stops before its end.
Write a brief analysis first, then close with: "The final answer is \boxed{x}", where x is 1 to 5.

Beginning: %s
Continuation: %s"""

# A part of a recording: the first `seconds` (0: all), or everything after `start` s
Clip = namedtuple('Clip', 'path seconds start', defaults=(0.0, 0.0))
# pairs: a list of dicts from make_pair; official: whether the audio is that of the paper
Suite = namedtuple('Suite', 'pairs official')


# -----------------------------------------------------------------------------
# Suites: folders and files -> pairs. list_suite calls one function for each layout


def make_pair(key, pos, neg, about):
    """A pair: dict(id, voice, types, pos, neg, text, words). pos, neg: two paths, stored as Clips.
    types: sub-scores that the pair counts in. about: a manifest row, or other facts about pos."""
    voice, types = about.get('voice') or about.get('speaker'), [about.get('type')]
    pair = dict(id=str(key), voice=str(voice or ''), types=[str(kind) for kind in types if kind])
    pair |= dict(pos=Clip(pos), neg=Clip(neg))
    return pair | dict(text=about.get('text') or '', words=about.get('words') or [])


def read_manifest(folder):
    """{path: row} of a folder's manifest.jsonl; {} if there is none."""
    path = os.path.join(folder, 'manifest.jsonl')
    rows = [row for _, row in M.read_jsonl(path)] if os.path.exists(path) else []
    return {os.path.normpath(os.path.join(folder, str(row.get('path')))): row for row in rows}


def read_csv(path):
    """Rows of a .csv file as dicts. Raises InputError."""
    with reading(path), M.open_text(path, newline='') as file:
        return list(csv.DictReader(file))


def list_folder(folder):
    """Pairs in a folder and its sub-folders: <n>_correct and <n>_incorrect, or a part of SALMon,
    sample_<n>_*, where the first name is correct. Raises InputError for any other file."""
    files = [os.path.normpath(file) for file in M.find_audio(folder)]
    rule, layout = r'(.+)_(correct|incorrect)', '<n>_correct, <n>_incorrect in one folder'
    if all(os.path.basename(file).startswith('sample_') for file in files):
        rule, layout = r'((?:.*/)?sample_\d+)_([^/]*)', 'two files sample_<n>_*.wav in one folder'

    sides = defaultdict(dict)  # {n, with its sub-folder: {side: file}}
    for file in files:
        match = re.fullmatch(rule, os.path.splitext(os.path.relpath(file, folder))[0])
        if not match or match[2] in sides[match[1]]:
            raise InputError(f'{file}: unknown, or a second file of this name; expected {layout}')
        sides[match[1]][match[2]] = file

    manifest, pairs = read_manifest(folder), []
    for key, side in sides.items():
        if len(side) != 2:
            raise InputError(f'{min(side.values())} has no counterpart; expected {layout}')
        pos, neg = (side[name] for name in sorted(side))  # 'correct' < 'incorrect'
        pairs.append(make_pair(key, pos, neg, manifest.get(pos, {})))
    return pairs


def list_table(where):
    """Pairs of a .csv file, with paths relative to its folder, or of parquet. Raises InputError."""
    is_csv, pairs = where.endswith('.csv'), {}
    rows = read_csv(where) if is_csv else M.read_parquet(where)
    for n, row in enumerate(rows, 2 if is_csv else 1):
        sides, place = [], f'{where}, {"line" if is_csv else "row"} {n}'
        for names in (('correct', 'positive_audio'), ('incorrect', 'negative_audio')):
            audio = row.get(names[0]) or row.get(names[1])
            if not audio:
                raise InputError(f'{place}: expected {" or ".join(names)}')
            audio = audio if isinstance(audio, dict) else dict(path=audio)
            path = os.path.join(os.path.dirname(where), audio['path'] or '')
            if audio.get('bytes'):  # name the file by its content, so that no old copy is scored
                name = M.content_hash(audio['bytes'])
                path = os.path.join(os.path.dirname(out), 'eval_cache', name)
                with M.write_atomic(path, 'wb') as file:
                    file.write(audio['bytes'])
            sides.append(path)
        pair = make_pair(n if row.get('id') in (None, '') else row['id'], *sides, row)
        if pairs.setdefault((pair['id'], pair['voice']), pair) is not pair:
            raise InputError(f'{place}: a second id {pair["id"]!r} of voice {pair["voice"]!r}')
    return [*pairs.values()]


def list_zerospeech(root, kind, split):
    """Pairs of a ZeroSpeech 2021 task, grouped as in the official tool. root: the parent of the
    folder `kind` (syntactic or lexical), that folder, or its split. Raises InputError."""
    places = (os.path.join(root, kind, split), os.path.join(root, split), root)
    folder = next(filter(os.path.isdir, places), root)
    gold, lexical = os.path.join(folder, 'gold.csv'), kind == 'lexical'
    files = M.find_audio(folder)
    clips = {os.path.basename(os.path.splitext(path)[0]): path for path in files}
    if len(clips) < len(files):  # a name in gold.csv would be ambiguous
        raise InputError(f'{folder}: {len(files) - len(clips)} recordings share a name')

    # {(id, voice): (correct rows, wrong rows)}; one word has several non-words
    groups, pairs = defaultdict(lambda: ([], [])), []
    columns = ['id', 'filename', 'voice', 'correct', 'frequency' if lexical else 'type']
    for line, row in enumerate(read_csv(gold), 2):
        if lacking := [name for name in columns if row.get(name) is None]:
            raise InputError(f'{gold}, line {line}: no {", ".join(lacking)} (of the {kind} task)')
        if row['filename'] not in clips:
            raise InputError(f'{folder}/{row["filename"]}.wav is missing: gold.csv names it')
        key = row['id'] if lexical else '/'.join((row['type'], row['subtype'], row['id']))
        groups[key, row['voice']][row['correct'].strip() != '1'].append(row)

    for (key, voice), (correct, wrong) in groups.items():
        if not (correct and wrong):
            raise InputError(f'{gold}: id {key}, voice {voice}: no correct or no wrong side')
        kind = correct[0].get('type')
        if lexical:  # by the frequency of the word in LibriSpeech
            kind = ('in' if float(correct[0]['frequency'] or 0) >= 1 else 'out of') + ' vocabulary'
        for sides in product(correct, wrong):
            pos, neg = (clips[row['filename']] for row in sides)
            pairs.append(make_pair(key, pos, neg, dict(voice=voice, type=kind)))
    return pairs


def list_suite(name, path, split='dev'):
    """The Suite of a task. Raises InputError if a file is missing or has no counterpart."""
    # a manifest marks our own synthetic audio; its scores do not compare with the paper's
    around = (path, os.path.join(path, split), os.path.dirname(os.path.abspath(path)))
    official = not any(os.path.exists(os.path.join(place, 'manifest.jsonl')) for place in around)
    kind = ZEROSPEECH.get(name.removesuffix('_unseen'))
    shards = glob.glob(os.path.join(glob.escape(path), '**', '*.parquet'), recursive=True)
    if shards or not os.path.isdir(path):
        pairs = list_table(path)
    else:
        pairs = list_zerospeech(path, kind, split) if kind else list_folder(path)
    if not pairs:
        raise InputError(f'{path} holds no pairs')
    return Suite(pairs, official)


def find_task(name):
    """The path of a task in data_dir, ignoring case. Raises InputError if there is none."""
    there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    names = [name.lower() + end for end in ('', '.csv', '.parquet')]
    found = [os.path.join(data_dir, child) for child in there if child.lower() in names]
    found += [data_dir] * (name in (*ZEROSPEECH, 'salmon'))  # their parts may be in data_dir itself
    if not found:
        raise InputError(f'no {name!r} in {data_dir}: give --tasks={name}=PATH')
    return found[0]


def find_suites(names):
    """{task: Suite} of the tasks that the user gives as NAME or NAME=PATH. salmon becomes eight
    parts, and NAME_unseen is added if it exists. Raises InputError."""
    if split not in ('dev', 'test'):
        raise InputError(f'--split={split} is not known: ZeroSpeech 2021 has dev and test')
    suites = {}
    for text in names:
        name, _, path = text.partition('=')
        crossing = next((end for end in CROSSINGS if name.endswith(end)), '')
        base = name.removesuffix(crossing)
        path = (path or find_task(base)).rstrip('/')
        places = {base: path}
        if os.path.isdir(path + '_unseen'):
            places[base + '_unseen'] = path + '_unseen'
        if base == 'salmon':
            places = {f'salmon_{part}': os.path.join(path, part) for part in SALMON.split()}
        for task, place in places.items():
            suite = list_suite(task, place, split)
            if task + crossing in suites:
                raise InputError(f'--tasks names {task + crossing} twice')
            suites[task + crossing] = cross(suite, place, crossing) if crossing else suite
    return suites


# -----------------------------------------------------------------------------
# Cross-modal stories: the beginning in one modality, the two endings in the other


def find_ending(words, others):
    """Index of the word where the endings of two stories (lists of words) begin: the start of the
    first sentence that differs, or the first word that differs if the stories share no sentence."""
    both = list(zip(words, others, strict=False))
    same = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
    ends = [i for i in range(1, same + 1) if words[i - 1].endswith(('.', '!', '?'))]
    return max(ends, default=same)


def cross(suite, path, crossing):
    """The Suite with endings in text or in speech. Each pair gets `to`, 'text' or 'speech', and
    `texts`, the text part of each side. Raises InputError if manifest.jsonl lacks `words`."""
    manifest, pairs = read_manifest(path), []
    for pair in suite.pairs:
        files = [pair['pos'].path, pair['neg'].path]
        times = [manifest.get(file, {}).get('words') or [] for file in files]
        words = [[word for word, *_ in story] for story in times]
        first = find_ending(*words)
        if not 0 < first < min(map(len, words)):
            raise InputError(f'{files[0]}: no ending found; manifest.jsonl must have `words`')

        # both sides begin with the correct story
        if crossing == '_to_text':
            to, texts = 'text', [' '.join(story[first:]) for story in words]
            pos = neg = Clip(files[0], times[0][first - 1][2])
        else:
            to, texts = 'speech', 2 * [' '.join(words[0][:first])]
            pos, neg = (Clip(f, 0, t[first][1]) for f, t in zip(files, times, strict=True))
        pairs.append(pair | dict(pos=pos, neg=neg, to=to, texts=texts))
    return suite._replace(pairs=pairs)


# -----------------------------------------------------------------------------
# Likelihoods: utterances -> units (computed once for an encoder) -> log-likelihoods


def encode_clips(clips, unit_encoder):
    """De-duplicated units of clips, {clip: (n,) int array}. They are cached under a hash of the
    files' contents, the cuts and the encoder. Raises InputError for broken audio."""
    clips, notes = list(dict.fromkeys(clips)), []
    encoding = threading.Semaphore(1 if unit_encoder.net else 8)  # a net takes one clip at a time
    with ThreadPoolExecutor(8) as pool:
        with reading('audio of the suite'):
            hashes = list(pool.map(M.file_hash, [clip.path for clip in clips]))
        cuts = [[name, *clip[1:]] for name, clip in zip(hashes, clips, strict=True)]
        name = M.content_hash(unit_encoder.encoder_id, cuts)[:32]
        path = os.path.join(os.path.dirname(out), 'eval_cache', f'units_{name}.json')
        if not os.path.exists(path):

            def units_of(clip):
                wave = M.load_audio(clip.path, notes=notes)
                begin, end = (int(t * SAMPLE_RATE) for t in (clip.start, clip.seconds))
                with encoding:
                    return M.dedup(unit_encoder.encode(wave[begin : end or None]))[0].tolist()

            units = list(tqdm(pool.map(units_of, clips), 'encoding', len(clips), leave=False))
            with M.write_atomic(path) as file:
                file.write(json.dumps(dict(units=units)))
    for note, n in Counter(notes).items():  # such as silence or cancelling channels
        print(f'{n} of {len(clips)} recordings: {note}', flush=True)
    return dict(zip(clips, map(np.array, M.read_json(path)['units']), strict=True))


def to_tokens(model, utterance):
    """(tokens, number of unscored tokens at the start, number of cut tokens) of an utterance.

    utterance: units, scored as `<S>` units `<S>` (interleaved model: `<speech>` units end; if
    slam['scoring'] is 'units': the units alone). The first token is not scored. Or a story, (units,
    text, to), of which only the ending is scored, in the modality `to`. What exceeds the context is
    cut: the end of an utterance, or the start of a story.
    """
    if isinstance(utterance, tuple):
        units, text, to = utterance
        parts = [('speech', units), ('text', text)]
        if to == 'speech':
            parts.reverse()
        tokens = model.tokens_of(parts).tolist()
        given = len(model.tokens_of(parts[:1])) + 1  # plus the switch to the other modality
    else:
        units, given = utterance, 1
        alone = model.slam.get('scoring') == 'units'
        tokens = model.tokens_of([('speech', units)], alone).tolist()
        tokens += [] if alone else [model.end]

    n_units = model.slam.get('n_units', model.config.vocab_size - M.OFFSET)
    if (top := int(np.max(units, initial=0))) >= n_units:
        raise InputError(f'unit {top} of {n_units}: the units are those of another encoder')
    if len(tokens) <= given:
        raise InputError('an utterance of fewer than two units cannot be scored by this model')
    cut = max(0, len(tokens) - model.config.context)
    tokens = tokens[cut:] if isinstance(utterance, tuple) else tokens[: len(tokens) - cut]
    return tuple(tokens), max(1, given - cut), cut


@torch.inference_mode()
def log_likelihoods(model, utterances):
    """Log-likelihoods in nats of utterances (see to_tokens), each token given all tokens before it.

    Returns (n,) arrays: sums, numbers of predicted tokens (within the context), and whether the
    utterance was cut. Equal sequences tie exactly. Raises InputError for unknown units and NaN.
    """
    device, context = next(model.parameters()).device, model.config.context
    whole = [to_tokens(model, utterance) for utterance in utterances]
    sequences = [(tokens, given) for tokens, given, _ in whole]
    distinct = list(dict.fromkeys(sequences))
    lengths = [len(tokens) for tokens, _ in distinct]

    # rows of equal width, so that a GPU compiles once; a CPU computes full rows one by one
    width = max(2048, *lengths)
    batch = 1 if device.type == 'cpu' else 32
    rows = M.pack_rows(lengths, width)
    sums = np.zeros(len(distinct))
    for start in tqdm(range(0, len(rows), batch), 'scoring', leave=False):
        arrays = np.zeros((4, batch, width), np.int64)
        tokens, predicted, document, segments = arrays
        # padding at the end of a row is split into documents that learned positions can cover
        document[:] = -1 - np.arange(width) // context
        for r, row in enumerate(rows[start : start + batch]):
            begin = 0
            for i in row:
                end = begin + lengths[i]
                tokens[r, begin:end], given = distinct[i]
                predicted[r, begin + given : end] = 1
                document[r, begin:end] = segments[r, begin:end] = i  # the sum that they add to
                begin = end
        x, mask, doc, segments = torch.from_numpy(arrays).to(device)
        sums += model.logps(x, mask, doc, segments=segments, n=len(sums)).double().cpu().numpy()
    if not np.isfinite(sums).all():  # NaN would lose every comparison and score 0
        raise InputError('the likelihoods are not numbers: NaN in the weights, or an overflow')

    place = {sequence: i for i, sequence in enumerate(distinct)}
    counts = np.array([len(tokens) - given for tokens, given in sequences])
    cut = np.array([cut > 0 for *_, cut in whole])
    return sums[[place[sequence] for sequence in sequences]], counts, cut


# -----------------------------------------------------------------------------
# Statistics


def percent(mean):
    return 100 * mean


def interval(a, b=None, transform=percent, draws=2000, seed=1234):
    """Score of an arm with a 95 % interval, or the difference a - b of two arms.

    a, b: (seeds, items) on the same items, or (items,) of one checkpoint. A score is the mean over
    seeds of transform(mean over items). Its interval combines a bootstrap over items with Student's
    t for the pooled variance of the seeds, since resampling 2 or 3 seeds underestimates it. If all
    or no items are right: the exact Clopper-Pearson bound. Returns: dict(score, low, high, n items)
    and, for several seeds, `seeds`, their number, and `spread`, their standard deviation.
    """
    arms = [np.atleast_2d(np.asarray(arm, float)) for arm in (a, b) if arm is not None]
    n = arms[0].shape[1]
    rng = np.random.default_rng(seed)

    # a resample of items is a multinomial draw over distinct columns; the first is the data
    columns, counts = np.unique(np.concatenate(arms), axis=1, return_counts=True)
    weights = np.concatenate((counts[None], rng.multinomial(n, counts / n, size=draws)))
    scores = transform(weights @ columns.T / n)  # (1 + draws, seeds of both arms)
    scores = np.split(scores, [len(arms[0])], axis=1)[: len(arms)]
    means = [arm.mean(1) for arm in scores]
    difference = means[0] - (means[1] if b is not None else 0)
    result = dict(score=float(difference[0]), low=None, high=None, n=n)

    freedom = sum(len(arm) - 1 for arm in arms)  # degrees of freedom of the pooled variance
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
    """The official average: over voices within a pair, then over pairs. wins: 0, 1/2 or 1 per pair.
    Returns: the result in percent, also by type and by voice, and {id: score in 0 .. 1}."""
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


def compare(models, arms, items, metrics):
    """({arm: dict(seeds=its checkpoints, metrics=results)}, {'b - a': results}): results of arms,
    and differences of arms and single checkpoints on common items. Arms inherit remarks.
    items: {checkpoint: {task: {id: value}}}; metrics: {checkpoint: {task: result}}."""
    in_arms = {name for members in arms.values() for name in members}
    groups = {name: [name] for name in models if name not in in_arms} | arms

    def result_of(task, *names):
        """Interval of a group, or of the first group minus the second; None if none are common."""
        found = [items[member].get(task, {}) for name in names for member in groups[name]]
        keys = [key for key in found[0] if all(key in other for other in found)]
        tables = [[[items[m][task][key] for key in keys] for m in groups[name]] for name in names]
        transform = METRICS[task].transform if task in METRICS else percent
        return interval(*tables, transform=transform, seed=seed) if keys else None

    tasks = dict.fromkeys(task for found in items.values() for task in found)
    means = {arm: dict(seeds=members, metrics={}) for arm, members in arms.items()}
    for (arm, members), task in product(arms.items(), tasks):
        seeds, result = [metrics[member][task] for member in members], result_of(task, arm)
        flaws = dict(marked=any(seed.get('marked') for seed in seeds))
        flaws['remarks'] = [*dict.fromkeys(text for seed in seeds for text in seed['remarks'])]
        means[arm]['metrics'][task] = result and result | flaws
    differences = {
        f'{b} - {a}': {task: result_of(task, b, a) for task in tasks}
        for a, b in combinations(groups, 2)
    }
    return means, differences


# -----------------------------------------------------------------------------
# Models that transcribe or rate the output


@lru_cache(maxsize=4)
def load_hf(model_class, processor_class, where):
    """A transformers model and its tokenizer or processor. Raises InputError for other formats."""
    transformers, place = M.import_transformers(), M.pick_device(device)
    names = os.listdir(M.find_checkpoint(where, tensors=False))  # an error if offline
    for name in names if not any(name.endswith('.safetensors') for name in names) else []:
        if name == 'model.bin' or name.endswith('.gguf'):
            kind = 'CTranslate2' if name == 'model.bin' else 'GGUF'
            raise InputError(f'{where} is in {kind} format: give a model in transformers format')
    with reading(where):
        processor = getattr(transformers, processor_class).from_pretrained(where)
        model = getattr(transformers, model_class).from_pretrained(where)
    return model.eval().to(place, M.pick_dtype('auto', place)), processor


def load_asr():
    """Whisper, its processor and options. Raises InputError for a language that it lacks."""
    model, processor = load_hf('WhisperForConditionalGeneration', 'WhisperProcessor', asr)
    about = model.generation_config
    codes = about.lang_to_id if getattr(about, 'is_multilingual', False) else {}
    if codes and f'<|{asr_language}|>' not in codes:
        raise InputError(f'--asr_language={asr_language}: {asr} has no such code (such as en)')
    return model, processor, dict(language=asr_language, task='transcribe') if codes else {}


# how to load what a metric needs; main calls these before it computes anything
OPEN = dict(
    asr=load_asr,
    text_lm=lambda: load_hf('AutoModelForCausalLM', 'AutoTokenizer', text_lm),
    judge=lambda: ask_judge('Reply with the word ready.'),
    dnsmos=lambda: importlib.import_module('speechmos.dnsmos'),  # the package contains its weights
)


def transcribe(waves, batch=16):
    """Whisper's transcripts of the first 30 s of 16 kHz waves; '' for an empty wave."""
    (model, processor, options), texts = OPEN['asr'](), []
    for start in tqdm(range(0, len(waves), batch), 'transcribing', leave=False):
        sounds = [w.numpy() if len(w) else np.zeros(1) for w in waves[start : start + batch]]
        x = processor.feature_extractor(sounds, sampling_rate=SAMPLE_RATE, return_tensors='pt')
        ids = model.generate(x.input_features.to(model.device, model.dtype), **options)
        texts += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text if len(wave) else '' for text, wave in zip(texts, waves, strict=True)]


@torch.inference_mode()
def text_nll(text):
    """Mean negative log-likelihood per token of a text under the text LM, in nats."""
    lm, tokenizer = OPEN['text_lm']()
    ids = tokenizer(text, return_tensors='pt').input_ids.long().to(lm.device)
    return torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1].float(), ids[0, 1:]).item()


def ask_judge(question):
    """The reply of an OpenAI-compatible endpoint; up to three attempts. Raises InputError."""
    message = dict(role='user', content=question)
    body = json.dumps(dict(model=judge_model, temperature=0, messages=[message])).encode()
    key, url = os.environ.get('OPENAI_API_KEY', ''), judge.rstrip('/') + '/chat/completions'
    headers = {'Content-Type': 'application/json', 'Authorization': f'Bearer {key}'}
    for wait in (1, 3, 0):
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)['choices'][0]['message']['content'] or ''
        except Exception as error:  # network or server errors, or an unexpected reply
            reason = error
            time.sleep(wait)
    raise InputError(f'--judge={judge} does not answer ({reason}); set $OPENAI_API_KEY to its key')


# -----------------------------------------------------------------------------
# Metrics of generated speech. To add one, write a function: items of Checkpoint.generate -> a value
# for each (None if there is none), and add an entry to METRICS


def find_flaws(text, n=5):
    """Whether a transcript has fewer than two words; whether a repeated n-gram fills half of it."""
    nltk = importlib.import_module('nltk.tokenize')  # a second to import
    words, filled = nltk.NLTKWordTokenizer().tokenize(text), defaultdict(set)
    for i in range(len(words) - n + 1):
        filled[tuple(words[i : i + n])].update(range(i, i + n))
    loops = any(2 * len(at) >= len(words) for at in filled.values() if len(at) > n)
    short = sum(any(map(str.isalnum, word)) for word in words) < 2
    if not short and 'genppl' in split_list(tasks):  # or fewer than two tokens of the text LM
        short = len(OPEN['text_lm']()[1](text).input_ids) < 2
    return short, loops


def each_transcript(rate):
    """A metric of single transcripts; short transcripts get None."""
    return lambda items: [None if find_flaws(i['text'])[0] else rate(i['text']) for i in items]


def rate_relevance(items):
    """GPTScore: a judge's rating of each continuation, the last boxed number in its reply."""
    ratings = []
    for item in tqdm(items, 'judging', leave=False):
        answer = ask_judge(JUDGE % (item['known'], item['text']))
        boxed = re.findall(r'\\boxed\{\D{0,8}?([1-5](?:\.\d+)?)\D{0,2}\}', answer)
        ratings.append(float(boxed[-1]) if boxed and float(boxed[-1]) <= 5 else None)
    return ratings


def rate_sound(items):
    """The overall quality score of DNSMOS (P.835); None for an empty wave."""
    waves = [item['wave'].clamp(-1, 1).numpy() for item in items]
    return [OPEN['dnsmos']().run(w, SAMPLE_RATE)['ovrl_mos'] if len(w) else None for w in waves]


def rate_words(items):
    """Word errors in percent of the mean number of words; their mean is the word error rate."""
    from torchaudio.functional import edit_distance

    pairs = [(item['known'], item['text'].replace('’', "'")) for item in items]
    words = [[re.findall(r"[\w']+", text.lower()) for text in pair] for pair in pairs]
    mean = np.mean([len(known) for known, _ in words])
    return [100 * edit_distance(known, found) / mean for known, found in words]


# source: what the wave is: prompt + continuation, the continuation alone, or a resynthesised
# recording; needs: keys of OPEN; transform: mean over prompts -> score
Metric = namedtuple('Metric', 'label unit digits source needs rate transform')
BOTH, AFTER, AGAIN = 'prompt + continuation', 'continuation', 'resynthesis'
fluency = each_transcript(text_nll)
repetition = each_transcript(M.auto_bleu)
METRICS = dict(
    genppl=Metric('GenPPL ↓', 'perplexity', 1, BOTH, ['asr', 'text_lm'], fluency, np.exp),
    autobleu=Metric('auto-BLEU ↓', '% of bigrams', 2, BOTH, ['asr'], repetition, percent),
    gptscore=Metric('GPTScore', '1 to 5', 2, AFTER, ['asr', 'judge'], rate_relevance, np.asarray),
    dnsmos=Metric('DNSMOS, overall', '1 to 5', 2, BOTH, ['dnsmos'], rate_sound, np.asarray),
    wer=Metric('WER ↓', '% of words', 1, AGAIN, ['asr'], rate_words, np.asarray),
)


# -----------------------------------------------------------------------------
# Checkpoints and their generated speech


def split_list(text, sign=','):
    return [part.strip() for part in text.split(sign) if part.strip()]


def find_models(text):
    """({name: folder}, {arm: [names]}) of the knob init. NAME=A+B is an arm, and so is a pattern of
    several folders. Raises InputError for a missing folder."""
    models, arms = {}, {}
    for part in split_list(text):
        arm, _, members = part.rpartition('=')
        found = []
        for pattern in split_list(members, '+') if arm else [members]:
            for where in sorted(filter(os.path.isdir, glob.glob(pattern))) or [pattern]:
                M.find_checkpoint(where.removeprefix('untrained:'), tensors=False)
                name = os.path.basename(where.partition(':')[0].rstrip('/'))  # or 'untrained'
                found.append(name if models.get(name, where) == where else where)
                models[found[-1]] = where
        if arm or len(found) > 1:
            arms[arm or os.path.basename(members)] = found
    return models, arms


def load_model(where):
    """The SLM of a checkpoint. For 'untrained:FOLDER', a model of that shape with random weights:
    normal with standard deviation 0.02, biases 0, norm weights 1, drawn from the knob `seed`."""
    folder = where.removeprefix('untrained:')
    model = M.load_slm(folder)
    if folder != where:
        slam, model = model.slam, M.SLM(model.hf_config, seed=seed)
        model.slam = slam | dict(compute=None, scores=None, stage=None)
    return model.eval()


class Checkpoint:
    """A model, its encoder, and the speech that it generates, shared by all metrics. Raises
    InputError if the encoder is unknown or its units differ from the model's."""

    def __init__(self, where):
        self.place = M.pick_device(device)
        self.model = load_model(where).to(self.place, M.pick_dtype(dtype, self.place))
        slam = self.model.slam
        known, self.voice = encoder or slam.get('encoder'), vocoder or slam.get('vocoder') or ''
        if not known:
            raise InputError(f'{where} names no encoder (a text LM?): give --encoder and --vocoder')
        self.encoder = M.UnitEncoder.from_pretrained(known, device=self.place)
        self.ids = {where: slam.get('encoder_id'), known: self.encoder.encoder_id}
        M.check_encoder_ids(self.ids)
        penalty = repetition_penalty or (1.1 if slam.get('stage') == 'dpo' else 1.0)
        self.sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
        self.sampling |= dict(top_p=top_p, repetition_penalty=float(penalty))
        self.items = {}  # {source of a metric: result of `generate`}

    def generate(self, source, clips):
        """One item for each prompt of cut_prompts: dict(id, seconds, known: the prompt's text or
        None, wave: (samples,) at 16 kHz). source: what the wave contains, see METRICS."""
        if source in self.items:
            return self.items[source]
        voice = M.UnitVocoder.from_pretrained(self.voice, device=self.place)
        M.check_encoder_ids(self.ids | {self.voice: voice.encoder_id})
        M.check_encoder_ids({type(x): (x.n_units, x.frame_rate) for x in (self.encoder, voice)})
        heads = [torch.as_tensor(units) for units in encode_clips(clips, self.encoder).values()]
        tails, items = [], []
        for start in tqdm(range(0, len(heads), 32), 'continuing', leave=False):
            part = [self.model.tokens_of([('speech', head)]) for head in heads[start : start + 32]]
            if source != AGAIN:
                new = self.model.generate(part, **self.sampling, seed=seed + start)
                tails += [tail - self.model.offset for tail in new]
        spoken = {AGAIN: heads, AFTER: tails, BOTH: map(torch.cat, zip(heads, tails, strict=False))}
        for (clip, text), units in zip(clips.items(), spoken[source], strict=True):
            wave = M.resample(voice.decode(units), voice.sample_rate, SAMPLE_RATE)
            items.append(dict(id=clip.path, seconds=clip.seconds, known=text, wave=wave))
        return self.items.setdefault(source, items)


def find_prompts(suites):
    """{path: known facts, such as text and words} of at most n_prompts prompts: the knob `prompts`,
    or the correct utterances of sstorycloze, else of sstory, else of the first audio suite."""
    about = {}
    if prompts:
        manifest = read_manifest(prompts)
        about = {f: manifest.get(f, {}) for f in map(os.path.normpath, M.find_audio(prompts))}
    for task in ('sstorycloze', 'sstory', *suites):
        if task in suites and not about:
            about = {pair['pos'].path: pair for pair in suites[task].pairs if 'to' not in pair}
    return dict(list(about.items())[:n_prompts])


def cut_prompts(source, known):
    """{clip: its text or None} of prompts from find_prompts. GPTScore needs word times and at least
    2 * prompt_seconds of audio; WER needs text and at most 30 s of audio. Raises InputError."""
    clips = {}
    for path, about in known.items():
        with reading(path):
            seconds = soundfile.info(path).duration
        if source == BOTH:
            clips[Clip(path, prompt_seconds)] = None
        elif source == AGAIN and about.get('text') and seconds <= 30:
            clips[Clip(path)] = about['text']
        elif source == AFTER and seconds >= 2 * prompt_seconds:
            # [[word, start s, end s], ...] from the manifest, or from a .json file beside the audio
            words, beside = about.get('words'), os.path.splitext(path)[0] + '.json'
            if not words and os.path.exists(beside):
                words = M.read_json(beside).get('aligned_text')
            if words:
                end = min((end for *_, end in words), key=lambda end: abs(end - prompt_seconds))
                clips[Clip(path, end)] = ' '.join(word for word, _, stop in words if stop <= end)
    if not clips:
        what = {AFTER: ' with word times', AGAIN: ' with known text'}.get(source, '')
        raise InputError(f'no prompts{what}: add a suite to --tasks or give --prompts')
    return clips


# -----------------------------------------------------------------------------
# Scores of one checkpoint. The table prints `remarks` below a score, and * if it is `marked`


def score_suite(checkpoint, suite):
    """The result of one suite, {pair id: score in 0 .. 1}, and rows for the pairs file."""
    model, pairs = checkpoint.model, suite.pairs
    clips = [pair[side] for side in ('pos', 'neg') for pair in pairs]
    units = encode_clips(clips, checkpoint.encoder)
    utterances, names = [units[clip] for clip in clips], [clip.path for clip in clips]
    for i, pair in enumerate(2 * pairs):
        if 'to' in pair:
            text, to = pair['texts'][i // len(pairs)], pair['to']
            utterances[i], names[i] = (utterances[i], text, to), [names[i], text]
    sums, counts, cut = log_likelihoods(model, utterances)
    pos, neg = np.split(sums / counts, 2)
    wins = (pos > neg) + 0.5 * (pos == neg)
    cut = np.logical_or(*np.split(cut, 2))

    # count the pairs with a side that exceeds the model's context
    result, items = summarise(pairs, wins, seed)
    n, what = int(cut.sum()), f'of {len(pairs):,} cut at {model.config.context:,} tokens'
    result |= dict(cut=n, marked=n > MUCH_CUT * len(pairs), remarks=[f'{n:,} {what}'] * bool(n))

    rows = []
    for i, pair in enumerate(pairs):
        row = {key: pair[key] for key in ('id', 'voice', 'types', 'text')}
        row |= dict(pos=names[i], neg=names[len(pairs) + i], score_pos=pos[i], score_neg=neg[i])
        rows.append(row | dict(win=wins[i], cut=bool(cut[i])))
    return result, items, rows


def score_generated(checkpoint, metric, clips):
    """The result of one metric, {prompt: value}, and rows for the pairs file."""
    found = checkpoint.generate(metric.source, clips)
    if 'asr' in metric.needs and 'text' not in found[0]:
        for item, text in zip(found, transcribe([item['wave'] for item in found]), strict=True):
            item['text'] = text
    rows = [{key: item.get(key) for key in ('id', 'seconds', 'text')} for item in found]
    for row, value in zip(rows, metric.rate(found), strict=True):
        row['value'] = value
    items = {row['id']: row['value'] for row in rows if row['value'] is not None}
    result = dict(score=None, low=None, high=None, n=0)
    if items:
        result = interval([*items.values()], transform=metric.transform, seed=seed)

    # count the prompts without a value and the unusable transcripts
    left_out = len(rows) - len(items)
    remarks = [f'{left_out} without a value'] * bool(left_out)
    if 'asr' in metric.needs:
        short, loops = np.mean([find_flaws(row['text']) for row in rows], axis=0).tolist()
        remarks.append(f'{100 * short:.0f} % short, {100 * loops:.0f} % loop')
        result |= dict(short=short, loops=loops, marked=max(short, loops) > MUCH_BROKEN)
    result |= dict(left_out=left_out, remarks=remarks)
    return result, items, rows


# -----------------------------------------------------------------------------
# Table and page

NOTES = [
    'Intervals: 95 %, bootstrap over pairs (arms: also seeds); exact if all or none are right.',
    f'*: over {MUCH_CUT:.0%} of the pairs are cut to the context, so a part is ignored, or over '
    f'{MUCH_BROKEN:.0%} of the transcripts have under two words or loop (a 5-gram fills half).',
]


def describe(model):
    """Text for the columns beside a model's scores: GPUs, GPU-days, parameters and tokens."""
    last = model.slam.get('compute') or {}
    runs = [run for run in (last.get('pretraining') or {}, last) if run.get('tokens')]
    days = sum(run['devices'] * run['hours'] for run in runs) / 24
    about = dict(gpus=f'{last["devices"]} {last["device"]}', gpu_days=f'{days:.2g}') if runs else {}
    tokens = ' + '.join(f'{run["tokens"] / 1e6:.1f}M' for run in runs)
    return about | dict(parameters=f'{model.num_params() / 1e6:.1f}M', tokens=tokens)


def read_paper(suites, generated):
    """Rows of config/paper.csv selected by the knob `paper`. `scores` holds the comparable numbers:
    the same audio and split, and the paper's protocol for continuations."""
    tasks = {task for task in PAPER_TASKS if task in suites and suites[task].official}
    if 'sstorycloze' in tasks and all(globals()[k] == v for k, v in PROTOCOL.items()):
        tasks |= {'genppl', 'autobleu', 'gptscore'} & {*generated}
    rows = []
    for row in read_csv(os.path.join(ROOT, 'config', 'paper.csv')):
        scores = {task: row[task] for task in tasks if row[task]}
        if row['split'] != split:
            scores.pop('sblimp', None)
        if scores and {row['rows'], 'all'} & {*split_list(paper)}:
            rows.append(row | dict(scores=scores))
    return rows


def make_column(task, suites):
    """A table column: dict(task, title, what: split and measure, digits, percent: of pairs)."""
    if task in METRICS:
        title, unit, digits, source, *_ = METRICS[task]
        return dict(task=task, title=title, what=f'{unit}, {source}', digits=digits, percent=False)
    fold = split if task in ZEROSPEECH else ''
    own = 'own audio' * (task in PAPER_TASKS and not suites[task].official)
    what = '; '.join(filter(None, (fold, own, '% of pairs, by mean log-likelihood')))
    return dict(task=task, title=TITLES.get(task, task), what=what, digits=1, percent=True)


def make_cell(column, result, sign=''):
    """A result as text: score, spread and mark; second line: interval, n and remarks."""
    if not result:
        return ''
    digits = f'.{column["digits"]}f'
    cell = 'none' if result['score'] is None else f'{result["score"]:{sign}{digits}}'
    cell += f' ± {result["spread"]:{digits}}' if 'spread' in result else ''
    more = [f'n = {result["n"]:,}' + ' common prompts' * bool(sign and not column['percent'])]
    if result['low'] is not None:
        more.insert(0, f'[{result["low"]:{sign}{digits}}, {result["high"]:{sign}{digits}}]')
    more += result.get('remarks', [])
    return cell + '*' * result.get('marked', False) + '\n' + ', '.join(more)


def make_table(record, columns, others):
    """Rows of strings after two header rows: checkpoints, arms, the paper's models, differences.
    The second line of a cell is small print. record: as in eval.json. others: from read_paper."""
    beside = ('gpus', 'gpu_days', 'parameters', 'tokens')

    def row(name, results, about, sign=''):
        cells = [make_cell(column, results.get(column['task']), sign) for column in columns]
        return [name, *cells, *(about.get(key, '') for key in beside)]

    titles, whats = ([column[key] for column in columns] for key in ('title', 'what'))
    rows = [['model', *titles, 'GPUs', 'GPU-days', 'parameters', 'tokens'], ['', *whats, *4 * ['']]]
    rows += [row(name, found, record['about'][name]) for name, found in record['metrics'].items()]
    for name, arm in record['arms'].items():
        rows.append(row(f'{name}\nmean of {len(arm["seeds"])} seeds', arm['metrics'], {}))
    for other in others:
        numbers = [other['scores'].get(column['task'], '') for column in columns]
        name = other['model'] + f'\n{other["note"]}' * bool(other['note'])
        rows.append([name, *numbers, *(other[key] for key in beside)])
    return rows + [row(name, found, {}, '+') for name, found in record['differences'].items()]


def print_table(rows):
    """Print rows of strings as a Markdown table; the first row is the header."""
    rows = [[cell.replace('\n', ' ') for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ['-' * width for width in widths])
    for row in rows:
        print('|', *(f'{cell:<{w}} |' for cell, w in zip(row, widths, strict=True)))


def write_page(path, page):
    """Write assets/report.html with the dict `page` inserted for DATA."""
    with open(os.path.join(ROOT, 'assets', 'report.html'), encoding='utf-8') as file:
        template = file.read()
    data = json.dumps(page).replace('<', '\\u003c')  # so that no text can close the script element
    with M.write_atomic(path) as file:
        file.write(template.replace('>DATA<', f'>{data}<'))


def save(record, rows):
    """Write all results, and the scores of every pair."""
    with M.write_atomic(os.path.splitext(out)[0] + '.pairs.jsonl') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    with M.write_atomic(out) as file:
        file.write(json.dumps(record, indent=1))


if __name__ == '__main__':
    config = configure(globals())
    began = time.time()

    # find and open everything first, so that mistakes end the run before any computation
    models, arms = find_models(init)
    wanted = dict.fromkeys(split_list(tasks) + ['wer'] * wer)
    generated = [task for task in wanted if task in METRICS]
    suites = find_suites([task for task in wanted if task not in METRICS])
    sources = dict.fromkeys(METRICS[task].source for task in generated)
    clips = {source: cut_prompts(source, find_prompts(suites)) for source in sources}
    for part in dict.fromkeys(part for task in generated for part in METRICS[task].needs):
        with reading(part):
            OPEN[part]()

    # evaluate one checkpoint after another; save after each task, so that a failure loses little
    record = dict(settings=config, metrics={}, sampling={}, about={})
    items, rows = defaultdict(dict), []
    for name, where in models.items():
        checkpoint = Checkpoint(where)
        record['about'][name] = describe(checkpoint.model)
        record['sampling'][name] = checkpoint.sampling
        results = record['metrics'][name] = {}
        for task in (*suites, *generated):
            if task in suites:
                found = score_suite(checkpoint, suites[task])
            else:
                found = score_generated(checkpoint, METRICS[task], clips[METRICS[task].source])
            results[task], items[name][task], new = found
            rows += [dict(model=name, task=task) | row for row in new]
            save(record, rows)
        del checkpoint  # free its memory for the next one

    # compare arms and checkpoints
    record['arms'], record['differences'] = compare(models, arms, items, record['metrics'])
    save(record, rows)

    # print the table, notes and summary, and write the page
    others = read_paper(suites, generated)
    columns = [make_column(task, suites) for task in results]
    table = make_table(record, columns, others)
    sampling = record['sampling'].items() if generated else ()
    notes = NOTES + [f'{name}: sampled with {how}.' for name, how in sampling]
    summary = f'{len(models)} models, {len(columns)} tasks, {len(rows)} scores'
    if html:
        page = dict(columns=columns, table=table, notes=notes, paper=others)
        write_page(html, record | page | dict(made=time.strftime('%d %B %Y'), summary=summary))
    print_table(table)
    print('', *notes, sep='\n')
    print(f'{summary} in {(time.time() - began) / 60:.1f} min -> {out}' + f', {html}' * bool(html))
