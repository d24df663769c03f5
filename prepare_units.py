"""Audio to units: fit k-means if asked, encode, pack into token files (section 3 of the paper).

    python prepare_units.py config/demo_units.py                      the demo: offline, on a CPU
    python prepare_units.py --audio=LibriSpeech --out=data/librispeech
    torchrun --nproc_per_node=8 prepare_units.py --audio=hub:slprl/sTinyStories:train --out=DIR
    python prepare_units.py --audio=librilight --out=data/librilight --shard=3/64     one of 64 jobs
    python prepare_units.py --audio=speech --encoder=facebook/hubert-base-ls960 --layer=9 \\
        --fit_kmeans=500 --fit_vocoder                                your own language
    python prepare_units.py --from_units=features.jsonl --n_units=500 --out=data/theirs
    python prepare_units.py --from_units=data/stinystories/units.jsonl --out=data/mixed \\
        --text_lm=Qwen/Qwen2.5-0.5B      for an interleaved model: folders speech, text, interleaved

--audio takes, separated by commas: sound files, folders, globs, manifest.jsonl (it stands for its
folder), .parquet and hub:owner/name[:split]. A .json file with `voice_activity` beside a recording
cuts it (Libri-Light). A row of a manifest is an utterance (`path`) or a preference pair
(`prompt_path`, `chosen_path`, `rejected_path`), with any of text, voice, split, `words` and
`phones` ([[label, start, end], ...]), and `start` and `end`, or `offset` and `duration`: the part
of the recording that is used. All times are seconds from the beginning of the recording.

Pairs go to pairs.jsonl, all else to units.jsonl, train.bin and val.bin: <S>, de-duplicated units
+ 2, <S> for each utterance. Folders called dev-clean, validation and so on validate. Test sets are
left out, but a source of --audio that is nothing else is used. failed.jsonl lists what could not
be read, and doubtful sound.

The work is a list of parts, some files each. Part 12 is done when parts/00012.jsonl exists; the
last process to finish merges the parts. So a killed run continues where it stopped, and the result
depends neither on workers nor on shards.
"""

from config import configure

import glob
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from model import (
    AUDIO_EXTENSIONS,
    BOS,
    EOS,
    OFFSET,
    PARTS,
    SAMPLE_RATE,
    UNREADABLE_EXTENSIONS,
    InputError,
    UnitEncoder,
    UnitTable,
    check_encoder_ids,
    check_marks,
    content_hash,
    dedup,
    file_hash,
    find_audio,
    find_checkpoint,
    load_audio,
    log,
    parquet_files,
    read_json,
    read_jsonl,
    read_parquet,
    read_tokenizer,
    reading,
    split_documents,
    split_of,
    start_worker,
    write_atomic,
)

# -----------------------------------------------------------------------------
audio = ''  # files, folders, globs, manifests, parquet, hub:owner/name[:split]; see above
out = 'data/units'  # a folder: units.jsonl, train.bin, val.bin, meta.json, encoder, vocoder ...
from_units = ''  # instead of audio: units.jsonl, features.jsonl, tokens.jsonl; globs
n_units = 0  # of these, where no meta.json lies beside the file
frame_rate = 0.0  # likewise, frames a second; 0: 25
# the encoder
encoder = ''  # mhubert25 (the default), hubert50, mfcc, a folder of ours, or any net with --layer
layer = None  # of a HuBERT, wav2vec 2 or WavLM: the layer whose hidden states are clustered
kmeans = ''  # .safetensors with `centroids`, or a joblib dump of scikit-learn's KMeans
fit_kmeans = 0  # fit this many clusters on the speech itself instead
fit_frames = 300_000  # on so many frames of training speech, drawn evenly
switch = None  # the price of a change of unit, in mean distortions; None: the encoder's
fit_vocoder = False  # also fit a voice for the units, on half an hour of training speech
keep_partial = False  # use the readable beginning of recordings that are cut short
# text beside it, for an interleaved model: folders speech, text and interleaved in out
text_lm = ''  # with the tokenizer of this text LM, a folder or a hub name; units need word times
texts = ''  # of the set text: .txt, .jsonl, .parquet, hub:owner/name; '': that of the utterances
draws = 4  # interleavings of each utterance: in so many epochs none comes twice
# how it is split
val_folders = ''  # files below folders of these names validate; '': dev, dev-*, validation, ...
val_fraction = 0.01  # where there is none of these: this share, chosen by a hash of the names
# scale
shard = ''  # i/n: this run encodes parts i, i + n, ... (i from 0); torchrun sets it
workers = 0  # processes that read, and with mfcc encode; 0: one a core of this process's share
seed = 1234
device = 'auto'
# -----------------------------------------------------------------------------

PART_FILES, PART_BYTES = 128, 32 << 20  # at most, in a part; about 17 minutes of wav
HASHED = 1 << 16  # bytes at the beginning, in the middle and at the end of a file
DRAWN_SECONDS = 60.0  # at most, of each recording that is drawn to fit on
VOICE_SECONDS = 1800.0  # of speech that a voice is fitted on
SLACK = 0.5  # seconds that a recording may end before its words
SHORT = 'stopped early'  # how a note of load_audio begins
WHOLE = (0.0, math.inf)  # seconds of a recording
PAIR = ('prompt', 'chosen', 'rejected')
MANIFEST = 'manifest.jsonl'
# what libsndfile does not read counts as failed, so that it is not passed over
WANTED = (
    *AUDIO_EXTENSIONS,
    *UNREADABLE_EXTENSIONS,
    '.tar',
    '.tar.gz',
    '.zip',
    '.parquet',
    MANIFEST,
)
RECIPE = (
    'layer',
    'fit_kmeans',
    'fit_frames',
    'switch',
    'keep_partial',
    'val_folders',
    'val_fraction',
    'seed',
)
# keys of a row that we set ourselves
OURS = ('path', 'file_name', 'units', 'duration', 'split', 'start', 'end', 'offset', 'seconds')
OTHER_NAMES = dict(speaker='voice', raw_text='text')
# what meta.json says of the units themselves
ORIGIN = ('encoder', 'vocoder', 'n_units', 'frame_rate', 'encoder_id')


# -----------------------------------------------------------------------------
# Finding: --audio -> items, each a sound file, a row of a manifest or a parquet file


class Item(NamedTuple):
    """What one of the READERS opens."""

    kind: str  # file, row or parquet
    path: str  # of a row: the manifest
    at: int = 0  # of a row: its first byte
    size: int = 0  # bytes of sound, as far as known
    split: str = ''  # train, val or test, where the row or a folder says so


def split_list(text):
    """'a, b/' -> ['a', 'b/']"""
    return [part.strip() for part in text.split(',') if part.strip()]


def find_files(names):
    """The files, folders and data sets of the hub in each of some comma-separated names or globs."""
    sources = []
    for name in split_list(names):
        exists = name.startswith('hub:') or os.path.exists(name)
        sources.append([name] if exists else sorted(glob.glob(name, recursive=True)))
        if not sources[-1]:
            raise InputError(f'{name}: no such file or folder')
    if not sources:
        raise InputError('--audio names nothing: give files, folders, manifests or hub:NAME')
    return sources


def find_corpus():
    """What --audio names -> (items to encode, the folder that holds them all, a Counter of what is
    left out). Raises InputError."""
    sources = find_files(audio)
    paths = [os.path.abspath(path) for path in chain(*sources) if not path.startswith('hub:')]
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in paths]
    root = os.path.commonpath(folders) if folders else os.getcwd()

    # a source that is nothing but a test set is meant
    items, skipped = [], Counter()
    for paths in sources:
        found = [item for path in paths for item in find_items(path, root)]
        kept = [item for item in found if item.split != 'test']
        skipped['of test sets left out'] += len(found) - len(kept) if kept else 0
        skipped['of a test set used, as nothing else was named'] += 0 if kept else len(found)
        items += kept or [item._replace(split='') for item in found]
    # where some folder validates, all others train; else a hash decides, when an item is read
    if val_folders or any(item.split == 'val' for item in items):
        items = [item._replace(split=item.split or 'train') for item in items]
    return list(dict.fromkeys(items)), root, skipped  # named twice, an item comes once


def find_items(path, root):
    """Yields the items of a file, a folder or a data set of the hub, in a fixed order."""
    if path.startswith('hub:') or path.endswith('.parquet'):
        for name in parquet_files(path):
            size = os.path.getsize(name) if os.path.exists(name) else PART_BYTES
            # the name of the file counts too: test-00000-of-00001.parquet
            yield Item('parquet', name, 0, size, split_by_folder(name_below(name, root) + '/'))
    elif os.path.isdir(path):
        found = find_audio(path, WANTED)
        # a manifest stands for its folder
        places = tuple(f'{os.path.dirname(name)}/' for name in found if name.endswith(MANIFEST))
        for name in found:
            if not name.removesuffix(f'/{MANIFEST}').startswith(places):
                yield from find_items(name, root)
    elif path.endswith('.jsonl'):
        yield from items_of_manifest(path, root)
    else:
        size = os.path.getsize(path) if os.path.exists(path) else 0  # a link that leads nowhere
        yield Item('file', path, 0, size, split_by_folder(name_below(path, root)))


def items_of_manifest(path, root):
    """Yields an Item for each row. Raises InputError naming the first row that is wrong."""
    at = 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                (name, *_), (start, end) = sounds_of(row, path), span_of(row)
                seconds = end - start if end < math.inf else float(row.get('seconds') or 10)
                split = row.get('split') and split_of(row['split'])
                check_marks(row, 'its times')
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f'{path}, line {number}: {error}') from None
            split = split or split_by_folder(name_below(name, root))
            yield Item('row', path, at, int(seconds * 20_000), split)
            at += len(line)


def sounds_of(row, manifest):
    """The sound files of a manifest's row, one or three of a preference pair: relative to its
    folder or, else, to where we are. Raises ValueError."""
    keys = [f'{part}_path' for part in PAIR] if 'prompt_path' in row else ['path']
    names = [row.get(key) for key in keys]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'expected {", ".join(keys)}')
    paths = [os.path.join(os.path.dirname(manifest), name) for name in names]
    return [
        name if os.path.exists(name) and not os.path.exists(path) else path
        for name, path in zip(names, paths, strict=True)
    ]


def span_of(row):
    """(start, end) in seconds of the part of its recording that a row uses; end inf: to the end.
    Raises ValueError."""
    start, end = row.get('start', row.get('offset')) or 0.0, row.get('end')
    if end is None:
        end = math.inf if row.get('duration') is None else start + row['duration']
    if not 0 <= start < end or ('prompt_path' in row and (start, end) != WHOLE):
        raise ValueError('expected 0 <= start < end, and neither in a preference pair')
    return start, end


def name_below(path, root):
    """The name of a file in units.jsonl: relative to the folder that holds all."""
    return path.removeprefix('hub:') if path.startswith('hub:') else os.path.relpath(path, root)


def split_by_folder(name):
    """'test' or 'val' where a folder in the name says so (dev-clean, TEST, test-other), else ''."""
    folders, patterns = re.split('[/:]', name)[:-1], split_list(val_folders)
    if any(fnmatch(folder, pattern.strip('/')) for folder in folders for pattern in patterns):
        return 'val'
    splits = {split_of(folder, '') for folder in folders}
    return 'test' if 'test' in splits else 'val' if 'val' in splits and not patterns else ''


def split_by_hash(name):
    """'train' or 'val', by the name alone: val_fraction of all names validate."""
    digest = hashlib.sha1(os.fsencode(name)).digest()
    return 'val' if int.from_bytes(digest[:6], 'big') < val_fraction * 2**48 else 'train'


def make_parts(items):
    """The work: lists of consecutive items, each of some megabytes unless one item is larger."""
    parts, size = [[]], 0
    most = max(1, min(PART_FILES, len(items) // 32))
    for item in items:
        if parts[-1] and (len(parts[-1]) == most or size + item.size > PART_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.size
    return parts


def fingerprint(path):
    """A hash of a file's content: of its length and of 64 KiB at its beginning, middle and end,
    which is all of a small file. Of a folder: of its files. Else: the name itself."""
    if os.path.isdir(path):
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        return [[name, fingerprint(os.path.join(path, name))] for name in names]
    if not os.path.isfile(path):
        return path
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for at in (0, (size - HASHED) // 2, size - HASHED):
            file.seek(max(0, at))
            digest.update(file.read(HASHED))
    return digest.hexdigest()[:16]


def hash_inputs(parts, root):
    """A hash of the names and contents of all that is to be encoded."""

    def hash_part(items):
        found = []
        for item in items:
            row, files = open_row(item) if item.kind == 'row' else ({}, [item.path])
            files += [beside(item.path)] * os.path.exists(beside(item.path))
            found += [name_below(item.path, root), row, item.split, *map(fingerprint, files)]
        return content_hash(found)

    with ThreadPoolExecutor(16) as pool:
        return content_hash(list(pool.map(hash_part, parts)))


# -----------------------------------------------------------------------------
# Reading: items -> utterances and their waves


def beside(path):
    """The file that may cut a recording: a/b.json of a/b.flac."""
    return os.path.splitext(path)[0] + '.json'


def read_file(item):
    """Yields (name, what is known, [sound], spans) of a recording: whole, or cut as the file beside
    it says (Libri-Light)."""
    activity = None
    if os.path.exists(beside(item.path)):
        with reading(beside(item.path)), open(beside(item.path), encoding='utf-8') as file:
            content = json.load(file)
            activity = content.get('voice_activity') if isinstance(content, dict) else None
    for spans in join_activity(activity) if activity else [[WHOLE]]:
        yield item.path, {}, [item.path], spans


def join_activity(activity, longest=60):
    """Voice activity [[start, end], ...] in seconds -> lists of spans of at most `longest` seconds
    together (a longer span is alone), as Libri-Light's cut_by_vad.py joins them."""
    group, seconds = [], 0.0
    for start, end in activity:
        if group and seconds + (end - start) > longest:
            yield group
            group, seconds = [], 0.0
        group.append((start, end))
        seconds += end - start
    yield group


def open_row(item):
    """A row of a manifest, which is read again (rows of millions do not stay in memory), and its
    sound files."""
    with open(item.path, 'rb') as file:
        file.seek(item.at)
        row = json.loads(file.readline())
    return row, sounds_of(row, item.path)


def read_row(item):
    """Yields (name, what is known, sounds, spans) of a row of a manifest."""
    row, sounds = open_row(item)
    yield sounds[0], row, sounds, [span_of(row)]


def read_shard(item):
    """Yields (name, what is known, sounds, spans) of each row of a parquet file: audio in columns
    prompt, chosen and rejected, or in one column. A null row has no sounds."""
    for number, row in enumerate(read_parquet(item.path)):
        audio = {key: row[key] for key in row if isinstance(row[key], dict) and 'bytes' in row[key]}
        name, own_name, sounds = f'{item.path.removesuffix(".parquet")}/{number:05d}', '', []
        for key in PAIR if row.keys() >= set(PAIR) else audio:
            sound = audio.get(key) or {}
            own_name = own_name or os.path.basename(sound.get('path') or '')
            if sound.get('bytes'):
                sounds.append(io.BytesIO(sound['bytes']))
                sounds[-1].name = f'{name}, {key}'  # for errors
            elif sound.get('path'):
                sounds += sounds_of(dict(path=sound['path']), item.path)
        known = {OTHER_NAMES.get(key, key): row[key] for key in row if key not in audio}
        yield name + f'-{own_name}' * bool(own_name), known, sounds, [WHOLE]


# A new layout of data: find_items lists its items, and its reader here finds their utterances
READERS = dict(file=read_file, row=read_row, parquet=read_shard)


def read_item(item, root, longest=None):
    """Yields (row, waves, notes) for each utterance or preference pair of an item. Row is None where
    it is left out or cannot be read: one file of millions must not end the run.

    row: as in units.jsonl, without units. waves: one or three (samples,) float32 arrays at 16 kHz.
    notes: [[failed, doubtful or test, name, reason], ...]. longest: seconds that are read at most.
    """
    utterances = READERS[item.kind](item)
    while True:
        name = None
        try:
            path, known, sounds, spans = next(utterances)
            name = name_below(path, root)
            split = item.split or known.get('split') or split_by_hash(name)
            if split_of(split) == 'test':
                yield None, [], [('test', name, '')]
                continue
            row, waves, notes = load(known, sounds, spans, longest)
            row = dict(file_name=name) | row | dict(split=split_of(split))
            yield row, waves, [('doubtful', name, note) for note in notes]
        except StopIteration:
            return
        except (InputError, OSError, ValueError, TypeError) as error:
            if name is None and item.path.startswith('hub:'):
                raise  # what the hub does not give is not the data's fault
            name = name or name_below(item.path, root)
            yield None, [], [('failed', name, ' '.join(str(error).split()) or repr(error))]


def load(known, sounds, spans, longest):
    """-> (row, waves, notes) of an utterance or a preference pair; see read_item.

    Raises InputError where sound is missing, or ends before its words or its part of the recording
    do. With keep_partial what there is is used, without the words beyond it.
    """
    if len(sounds) not in (1, len(PAIR)):
        raise InputError(f'{len(sounds)} sounds: expected one, or {", ".join(PAIR)}')
    waves, notes = [], []
    for sound in sounds:
        parts = []
        for start, end in spans:
            seconds = min(end - start, longest or math.inf)
            seconds = None if seconds == math.inf else seconds
            parts.append(load_audio(sound, SAMPLE_RATE, start, seconds, keep_partial, notes))
        waves.append(torch.cat(parts).numpy())
    short = any(note.startswith(SHORT) for note in notes)
    row = {key: known[key] for key in known if key not in OURS}
    if len(sounds) == len(PAIR):
        texts = [known.get(f'{part}_text') or '' for part in PAIR]
        row = {key: row[key] for key in row if not key.startswith(PAIR)}
        for part, text in zip(PAIR, texts, strict=True):
            row[part] = dict(units=[], duration=[], text='' if short else text)
        return row, waves, notes

    # is there as much sound as there should be?
    start, length = spans[0][0], len(waves[0]) / SAMPLE_RATE
    marks = [mark for key in ('words', 'phones') for mark in row.get(key) or []]
    promised = sum(last - first for first, last in spans)
    if promised == math.inf:
        promised = max([known.get('seconds') or 0, *(mark[2] for mark in marks)]) - start
    if not (short or longest) and length < promised - SLACK:
        short = True
        notes.append(f'{SHORT} at {start + length:.1f} of {start + promised:.1f} s')
        if not keep_partial:
            raise InputError(f'the recording {notes[-1]}')

    # words and phones of what is used, in its own time
    row = dict(units=[], duration=[]) | row | dict(seconds=round(length, 4))
    if spans != [WHOLE]:
        row['start'] = start
    if short or spans != [WHOLE]:
        words = row.get('words') or []
        for key in ('words', 'phones'):
            if row.get(key):
                row[key] = marks_within(row[key], start, start + length)
        if len(row.get('words') or []) < len(words):
            row['text'] = ' '.join(word for word, _, _ in row['words'])
        elif short and not words:
            row.pop('text', None)  # how much of it was spoken is not known
        if words and not row['words']:
            raise InputError(f'no word lies in {start:g} to {start + length:g} s')
    return row, waves, notes


def marks_within(marks, start, end):
    """The [[label, start s, end s], ...] whose middle lies in [start, end), less `start`."""
    return [
        [label, round(max(0, first - start), 3), round(min(last, end) - start, 3)]
        for label, first, last in marks
        if start <= (first + last) / 2 < end
    ]


# -----------------------------------------------------------------------------
# Worker processes, which read in advance


class Jobs(IterableDataset):
    """Worker i of n does jobs i, i + n, ...: (key, items) gives (key, result) of work(items)."""

    def __init__(self, jobs, work):
        self.jobs, self.work = jobs, work

    def __iter__(self):
        worker = get_worker_info()
        for key, items in self.jobs[worker.id :: worker.num_workers]:
            for result in self.work(items):
                yield key, result


def work_ahead(jobs, work, in_order=False):
    """Yields (key, result) of `work(items)` for each job (key, items), made by worker processes.
    in_order: of jobs with one result each, in their order; else as they come."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    share = workers or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    loader = DataLoader(
        Jobs(jobs, work),
        batch_size=None,
        num_workers=max(1, min(share, len(jobs))),
        worker_init_fn=lambda number: start_worker(),
        collate_fn=lambda result: result,  # arrays stay arrays: no shared memory is needed
        multiprocessing_context='fork',  # the encoder need not be pickled
        in_order=in_order,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if 'DataLoader worker (pid' not in str(error):
            raise
        raise InputError(
            'a worker died, most likely for want of memory: use fewer --workers; '
            'the same command continues'
        ) from None


# -----------------------------------------------------------------------------
# What is fitted: k-means and a voice, on speech drawn evenly


def is_cheap(net):
    """Whether workers compute the features; a net runs in the main process."""
    return net.config['kind'] == 'mfcc'


def draw_speech(corpus, seconds, net, compute):
    """Yields compute(wave) of training speech drawn evenly from all items; wave: (samples,).

    seconds: about how much the caller will take; no more is read of each item than that needs. The
    order depends on the seed alone. Raises InputError where there is none.
    """
    items, root, _ = corpus
    items = [item for item in items if item.split != 'val'] or items
    items = random.Random(seed).sample(items, min(len(items), 100_000))
    per_item = min(64, max(1, math.ceil(seconds / 5 / len(items))))  # few are shorter than 5 s
    per_job = max(1, 16 // per_item)

    def read(items):
        results, reasons = [], []
        for item in items:
            for row, waves, notes in islice(read_item(item, root, DRAWN_SECONDS), per_item):
                reasons += [reason for kind, _, reason in notes if kind == 'failed']
                if row and (row['split'] == 'train' or item.split == 'val'):
                    results += map(compute, waves) if is_cheap(net) else waves
        yield results, reasons

    jobs = [(i, items[i : i + per_job]) for i in range(0, len(items), per_job)]
    none, why = True, []
    for _, (results, reasons) in work_ahead(jobs, read, in_order=True):
        none, why = none and not results, why or reasons
        yield from results if is_cheap(net) else map(compute, results)
    if none:
        raise InputError(f'no training speech to fit on: no file drawn is usable {why[:1]}')


def draw_frames(net, corpus, n_frames):
    """(frames, D) float32 features of training speech, on the CPU."""

    def compute(wave):
        return net.features(torch.from_numpy(wave)).cpu().numpy()

    frames, total = [], 0
    with tqdm(total=n_frames, desc='frames to fit on', unit_scale=True, leave=False) as bar:
        for found in draw_speech(corpus, n_frames / net.frame_rate, net, compute):
            frames.append(found)
            total += len(found)
            bar.update(len(found))
            if total >= n_frames:
                break
    return torch.from_numpy(np.concatenate(frames)[:n_frames])


def cluster(frames, k):
    """k-means of (frames, D): centroids (k, D), and the mean squared distance to the nearest.

    The result is the same for any number of threads. Raises InputError where there are too few
    frames, or nothing but silence.
    """
    from sklearn.cluster import MiniBatchKMeans

    if len(frames) < k:
        raise InputError(f'{len(frames)} frames are too few for {k} clusters: give more speech')
    fitted = MiniBatchKMeans(k, batch_size=10_000, n_init=3, random_state=seed).fit(frames.numpy())
    if not fitted.inertia_ > 0:
        raise InputError('the speech to fit on is silent, or no two of its sounds differ')
    return torch.from_numpy(fitted.cluster_centers_).float(), fitted.inertia_ / len(frames)


def load_encoder(corpus):
    """The encoder of the knobs, its clusters fitted if asked, the unit of its `switch` measured."""
    name = encoder or 'mhubert25'
    net = UnitEncoder.from_pretrained(name, layer, '' if fit_kmeans else kmeans or None, device)
    if switch is not None:
        net.config['switch'] = switch
    if fit_kmeans:
        frames = draw_frames(net, corpus, fit_frames)
        centroids, net.config['distortion'] = cluster(frames, fit_kmeans)
        net.centroids, net.config['vocoder'] = centroids.to(net.device), 'vocoder'
    elif not net.n_units:
        raise InputError(f'{name} has no k-means: give --fit_kmeans=N or --kmeans=FILE')
    elif net.config.get('switch') and not net.config.get('distortion'):
        frames = draw_frames(net, corpus, min(fit_frames, 30_000)).to(net.device)
        net.config['distortion'] = net.distance(frames)
    return net


def prepare_encoder(corpus, recipe, part):
    """-> (encoder, its name). One that is not public is saved in --out by shard 0, for which the
    others wait. Raises InputError if the one there was made by other settings."""
    if not (fit_kmeans or kmeans or os.path.isdir(encoder)) and (layer, switch) == (None, None):
        return load_encoder(corpus), encoder or 'mhubert25'
    folder = os.path.join(out, 'encoder')
    made = os.path.join(folder, 'encoder.json')  # of its files the last to be written
    if part == 0 and not os.path.exists(made):
        net = load_encoder(corpus)
        net.config['fitted'] = recipe
        net.save_pretrained(folder)
    while not os.path.exists(made):
        time.sleep(1)
    net = UnitEncoder.from_pretrained(folder, device=device)
    if net.config.get('fitted') != recipe:
        raise InputError(f'{folder} is of other settings or audio: choose another --out')
    return net, 'encoder'


def prepare_vocoder(corpus, net, name):
    """The voice that goes with the units, fitted here or that of the encoder -> its name."""
    folder = os.path.join(out, 'vocoder')
    if os.path.exists(os.path.join(folder, 'vocoder.json')):  # of its files the last
        return 'vocoder'
    if fit_vocoder:

        def compute(wave):
            return wave, net.encode(torch.from_numpy(wave)).numpy()

        table, seconds = UnitTable(net.n_units, net.frame_rate), 0.0
        for wave, units in draw_speech(corpus, VOICE_SECONDS, net, compute):
            table.add(wave, units)
            seconds += len(wave) / SAMPLE_RATE
            if seconds >= VOICE_SECONDS:
                break
        table.finish(net.encoder_id).save_pretrained(folder)
        return 'vocoder'
    if name == 'encoder' and os.path.isdir(net.vocoder or ''):
        shutil.copytree(net.vocoder, folder)
        return 'vocoder'
    return None if name == 'encoder' else net.vocoder


# -----------------------------------------------------------------------------
# Encoding: parts -> parts/00012.jsonl


def to_line(row):
    """A row as a line of JSON; names need not be UTF-8."""
    text = json.dumps(row, ensure_ascii=False, separators=(',', ':'), default=str)
    return text.encode(errors='backslashreplace') + b'\n'


def encode(net, row, waves):
    """The line of a row, with the units of its waves."""
    for wave, where in zip(waves, [row] if len(waves) == 1 else map(row.get, PAIR), strict=True):
        units, durations = dedup(net.encode(torch.from_numpy(wave)))
        where |= dict(units=units.tolist(), duration=durations.tolist())
    return to_line(row)


def part_path(number):
    return os.path.join(out, 'parts', f'{number:05d}.jsonl')


def encode_parts(parts, mine, net, root, recipe):
    """Encode those of the parts `mine` that are not there. A part is its rows and a last line that
    sums them up."""

    def work(items):
        for item in items:
            for row, waves, notes in read_item(item, root):
                line = encode(net, row, waves) if row and is_cheap(net) else b''
                seconds = sum(map(len, waves)) / SAMPLE_RATE
                yield row, [] if line else waves, notes, line, seconds
        yield None  # the part is complete

    todo = [(number, parts[number]) for number in mine if not os.path.exists(part_path(number))]
    begun = {number: ([], [], []) for number, _ in todo}
    with tqdm(total=sum(len(items) for _, items in todo), unit=' files') as bar:
        for number, found in work_ahead(todo, work) if todo else ():
            lines, notes, lengths = begun[number]
            if found:
                row, waves, doubts, line, seconds = found
                lines += [line or encode(net, row, waves)] if row else []
                notes += doubts
                lengths.append(seconds)
            else:
                summary = dict(part=number, recipe=recipe, files=len(parts[number]), notes=notes)
                summary |= dict(audio_seconds=round(sum(lengths), 3))
                with write_atomic(part_path(number), 'wb') as file:
                    file.writelines([*lines, to_line(summary)])
                del begun[number]
                bar.update(len(parts[number]))


# -----------------------------------------------------------------------------
# Packing: rows -> units.jsonl, pairs.jsonl, token files


def rows_of_parts(n_parts, recipe, total):
    """Yields the rows of all parts, in order; adds up their last lines in the dict `total`."""
    for number in range(n_parts):
        for _, row in read_jsonl(part_path(number)):
            if 'file_name' in row:
                yield row
                continue
            if row['recipe'] != recipe:
                raise InputError(f'{part_path(number)} is of other settings: choose another --out')
            for key in total:
                total[key] += row[key]


def rows_of_units(path):
    """Yields the rows of units made elsewhere: our units.jsonl and pairs.jsonl, and the public
    toolkits' features.jsonl (units, duration), tokens.jsonl (audio_repr) and tokenised pairs."""
    for number, row in read_jsonl(path):
        try:
            parts = [row[part] for part in PAIR] if set(PAIR) <= row.keys() else [row]
            for part in parts:
                part |= collapse(part)
            check_marks(row, 'its times')
            split_of(row.get('split') or 'train')
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}, line {number}: {error!r}; expected `units`, numbers from 0, or `audio_repr`'
            ) from None
        yield {'file_name': f'{os.path.basename(path)}:{number}', **row}


def collapse(row):
    """dict(units=..., duration=...) of a row in either format; runs of equal units are joined."""
    units = row.get('units')
    if units is None:
        units = [int(unit) for unit in re.findall(r'<Un(\d+)>', row['audio_repr'])]
    duration = row.get('duration') or [1] * len(units)
    if not all(type(unit) is int and unit >= 0 for unit in units) or len(duration) != len(units):
        raise ValueError('wrong units')
    units, runs = dedup(units)
    duration = [int(sum(part)) for part in np.split(duration, np.cumsum(runs)[:-1])]
    return dict(units=units.tolist(), duration=duration)


def describe_units(paths):
    """What ORIGIN says of units made elsewhere: from the meta.json beside each file, else from the
    knobs. The encoder and the voice that lie there are copied. Raises InputError where something
    is not known, or differs."""
    ids, numbers = {}, {}
    for path in paths:
        folder = os.path.dirname(path)
        made = os.path.join(folder, 'meta.json')
        if os.path.exists(made):
            origin = {key: read_json(made).get(key) for key in ORIGIN}
        elif n_units:
            own = os.path.join(encoder, 'encoder.json')
            known = read_json(own).get('encoder_id') if os.path.exists(own) else encoder or None
            voice = 'hifigan25' if encoder == 'mhubert25' else None
            values = (encoder or None, voice, n_units, frame_rate or 25.0, known)
            origin = dict(zip(ORIGIN, values, strict=True))
        else:
            raise InputError(
                f'{path} has no meta.json beside it: give --n_units, --frame_rate and --encoder'
            )
        ids[path], numbers[path] = origin['encoder_id'], (origin['n_units'], origin['frame_rate'])
        for part in PARTS:
            if origin.get(part) == part:
                shutil.copytree(
                    os.path.join(folder, part), os.path.join(out, part), dirs_exist_ok=True
                )
    check_encoder_ids(ids)
    if len(set(numbers.values())) > 1:
        raise InputError(f'these units do not go together (n_units, frame_rate): {numbers}')
    return origin | dict(encoder_id=next(filter(None, ids.values()), None))


def pack(rows, origin):
    """Write units.jsonl, pairs.jsonl, train.bin and val.bin of rows, one at a time in memory. Rows
    of a test split are left out.

    Returns: what meta.json says of them. Raises InputError naming a row whose unit is out of the
    vocabulary.
    """
    size, frame_rate = origin['n_units'] + OFFSET, origin['frame_rate']
    meta = origin | dict(vocab_size=size, offset=OFFSET, dedup=True)
    meta |= dict(dtype='uint16' if size <= 65_536 else 'uint32', tokens=dict(train=0, val=0))
    meta |= dict(utterances=dict(train=0, val=0), hours=dict(train=0.0, val=0.0))
    meta |= dict(pairs=0, empty=0, test=0)
    usage = np.zeros(origin['n_units'], dtype=np.int64)
    with ExitStack() as stack:

        def create(name):
            return stack.enter_context(write_atomic(os.path.join(out, name), 'wb'))

        files = {split: create(f'{split}.bin') for split in meta['tokens']}
        units_file, pairs_file = create('units.jsonl'), None
        for row in rows:
            split = split_of(
                row.get('split')
                or split_by_folder(row['file_name'])
                or split_by_hash(row['file_name'])
            )
            if split == 'test':
                meta['test'] += 1
                continue
            if 'prompt' in row:
                pairs_file = pairs_file or create('pairs.jsonl')
                pairs_file.write(to_line(row))
                meta['pairs'] += 1
                continue
            units_file.write(to_line(row | dict(split=split)))
            units = np.array(row['units'], dtype=np.int64)
            if not len(units):
                meta['empty'] += 1
                continue
            if units.max() >= len(usage):
                found = f'{row["file_name"]}: unit {units.max()}'
                raise InputError(f'{found}, but there are {len(usage)} (--n_units)')
            tokens = np.concatenate(([BOS], units + OFFSET, [EOS]))
            files[split].write(tokens.astype(meta['dtype']).tobytes())
            usage += np.bincount(units, minlength=len(usage))
            meta['hours'][split] += (row.get('seconds') or sum(row['duration']) / frame_rate) / 3600
            meta['tokens'][split] += len(tokens)
            meta['utterances'][split] += 1
    seconds, shares = 3600 * sum(meta['hours'].values()), usage[usage > 0] / max(1, usage.sum())
    meta['hours'] = {split: round(hours, 4) for split, hours in meta['hours'].items()}
    meta['tokens_per_second'] = round(int(usage.sum()) / max(seconds, 1e-9), 2)
    perplexity = round(float(np.exp(-(shares * np.log(shares)).sum())), 1)
    return meta | dict(unit_usage=dict(used=len(shares), perplexity=perplexity))


def finish(meta, skipped, recipe):
    """Write meta.json, which says that all is done, and print what is in it."""
    skipped['of test sets left out'] += meta.pop('test')
    skipped['without units'] += meta.pop('empty')
    meta |= dict(left_out={what: n for what, n in skipped.items() if n}, recipe=recipe)
    with write_atomic(os.path.join(out, 'meta.json')) as file:
        json.dump(meta, file, indent=2)
    summary = [
        f'{sum(meta["utterances"].values()):,} utterances',
        f'{sum(meta["hours"].values()):.2f} h',
        f'{sum(meta["tokens"].values()):,} tokens ({meta["tokens_per_second"]} units a second)',
        f'{meta["unit_usage"]["used"]} of {meta["n_units"]} units used',
        f'perplexity {meta["unit_usage"]["perplexity"]}',
        f'{meta["pairs"]:,} pairs',
        *(f'{n:,} {what}' for what, n in meta['left_out'].items()),
        *['nothing to validate on'] * (not meta['tokens']['val']),
    ]
    log(f'{out}: {", ".join(summary)}')


# -----------------------------------------------------------------------------
# Text beside the units: token sets for an interleaved model (section 4.3 of the paper)

SPAN_WORDS, SPEECH_SHARE = 10, 0.3  # mean of a span of speech; share of the words that are speech
MARK = '<|endoftext|>'  # between the documents of a .txt file, which else are parted by blank lines


def draw_spans(n_words, rng):
    """Which words of an utterance are speech, (n_words,) bool: spans of Poisson(SPAN_WORDS) words
    with text between them, drawn until SPEECH_SHARE of the words are speech, or one has no room.
    A span may reach over either end, so that the first word is speech as often as any other."""
    speech = np.zeros(n_words, bool)
    while speech.sum() < SPEECH_SHARE * n_words:
        length = max(1, rng.poisson(SPAN_WORDS))
        # how many words are speech before each; of a span and its neighbours none may be
        before = np.concatenate(([0], np.cumsum(speech)))
        starts = np.arange(1 - length, n_words)
        left, right = (np.clip(x, 0, n_words) for x in (starts - 1, starts + length + 1))
        starts = starts[before[left] == before[right]]
        if not len(starts):
            break
        start = rng.choice(starts)
        speech[max(0, start) : start + length] = True
    return speech


def units_between(row, start, end, frame_rate):
    """De-duplicated units (n,) of the frames of an utterance whose middles lie from start to end,
    in seconds."""
    first, last = (max(0, math.ceil(time * frame_rate - 0.5)) for time in (start, end))
    return dedup(np.repeat(row['units'], row['duration'])[first:last])[0].numpy()


def interleave(row, speech, encode, meta):
    """Tokens of an utterance whose words are speech where `speech` (n_words,) says so, else text:
    `<speech>` or `<text>` before each stretch of them, meta['end'] last. encode: text -> ids."""
    words, tokens = row['words'], []
    for span in np.split(np.arange(len(words)), np.flatnonzero(np.diff(speech)) + 1):
        if speech[span[0]]:
            units = units_between(row, words[span[0]][1], words[span[-1]][2], meta['frame_rate'])
            tokens += [meta['vocab_size'] - 2, *(units + meta['offset']).tolist()]
        else:
            text = ' '.join(words[i][0] for i in span)
            # within a text a word has a space before it, and so other tokens than the first
            tokens += [meta['vocab_size'] - 1, *encode(f' {text}' if span[0] else text)]
    return [*tokens, meta['end']]


def documents_of(path):
    """Yields the documents of a .txt file: between MARK if it has that, or blank lines."""
    with reading(path), open(path, encoding='utf-8') as file:
        marked, text = MARK in file.read(1 << 20), ''
        file.seek(0)
        while piece := file.read(1 << 20):
            text += piece
            text = text if marked else re.sub(r'\n\s*\n', MARK, text)
            complete, _, text = text.rpartition(MARK)
            yield from split_documents(complete)
    yield from split_documents(text)


def read_texts():
    """Yields (split, text) of the documents that --texts names: text files, JSON lines and parquet,
    whose column is `text`. Raises InputError where there is none."""
    for path in split_list(texts):
        if path.endswith('.jsonl'):
            rows = (row for _, row in read_jsonl(path))
        elif path.startswith('hub:') or path.endswith('.parquet') or os.path.isdir(path):
            rows = read_parquet(path)
        else:
            rows = (dict(text=document) for document in documents_of(path))
        for number, row in enumerate(rows):
            if not isinstance(row.get('text'), str):
                raise InputError(f'--texts={path}, row {number}: no text in a column `text`')
            yield split_by_hash(f'{path}:{number}'), row['text']


def documents(kind, meta, encode):
    """Yields (split, tokens) of the set `kind`: the utterances as speech; texts; or the utterances
    with word times, `draws` times with other spans, but once if they validate."""
    if kind == 'text' and texts:
        for split, text in read_texts():
            yield split, [meta['vocab_size'] - 1, *encode(text), meta['end']]
        return
    for draw in range(draws if kind == 'interleaved' else 1):
        for number, row in read_jsonl(os.path.join(out, 'units.jsonl')):
            split = row['split']
            if not row['units']:
                continue
            if kind == 'speech':
                units = (np.array(row['units']) + meta['offset']).tolist()
                yield split, [meta['vocab_size'] - 2, *units, meta['end']]
            elif kind == 'text' and row.get('text'):
                yield split, [meta['vocab_size'] - 1, *encode(row['text']), meta['end']]
            elif kind == 'interleaved' and row.get('words') and (split == 'train' or draw == 0):
                rng = np.random.default_rng((seed, draw, number))
                yield split, interleave(row, draw_spans(len(row['words']), rng), encode, meta)


def write_text_sets():
    """The sets speech, text and interleaved beside out/units.jsonl, in the vocabulary of text_lm
    and after it the units, <speech> and <text>; and a copy of its tokenizer."""
    folder = find_checkpoint(text_lm, tensors=False)
    tokenizer, end, digest = read_tokenizer(folder)
    os.makedirs(os.path.join(out, 'tokenizer'), exist_ok=True)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copyfile(os.path.join(folder, name), os.path.join(out, 'tokenizer', name))
    meta = read_json(os.path.join(out, 'meta.json'))
    offset = read_json(os.path.join(folder, 'config.json')).get('vocab_size')
    if type(offset) is not int or offset < tokenizer.get_vocab_size():
        raise InputError(f'{folder}/config.json has vocab_size={offset}, fewer than the tokenizer')
    for part in PARTS:  # one copy for the three
        if os.path.isdir(os.path.join(out, part)):
            meta[part] = f'../{part}'
    size = offset + meta['n_units'] + 2
    meta |= dict(vocab_size=size, offset=offset, end=end, text_lm=text_lm, tokenizer_sha256=digest)
    meta |= dict(dtype='uint16' if size <= 65_536 else 'uint32')

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    for kind in ('speech', 'text', 'interleaved'):
        tokens, count, place = (
            Counter(train=0, val=0),
            Counter(train=0, val=0),
            os.path.join(out, kind),
        )
        with ExitStack() as stack:
            files = {
                split: stack.enter_context(write_atomic(os.path.join(place, f'{split}.bin'), 'wb'))
                for split in tokens
            }
            for split, document in tqdm(documents(kind, meta, encode), kind, unit=' documents'):
                files[split].write(np.array(document, meta['dtype']).tobytes())
                tokens[split] += len(document)
                count[split] += 1
        with write_atomic(os.path.join(place, 'meta.json')) as file:
            json.dump(meta | dict(tokens=tokens, utterances=count), file, indent=2)
        log(f'{place}: {count["train"]:,} documents, {tokens["train"]:,} tokens')
        if not tokens['train']:
            log(f'{place} has no train set: rows of units.jsonl need text, and words with times')


# -----------------------------------------------------------------------------


def settle(recipe):
    """The settings and inputs lie beside the parts; others are refused. A run that made nothing
    binds no later one."""
    path = os.path.join(out, 'parts', 'recipe.json')
    made = glob.glob(f'{glob.escape(out)}/parts/*.jsonl') + [
        path
        for name in ('meta.json', 'encoder/encoder.json')
        if os.path.exists(os.path.join(out, name))
    ]
    before = read_json(path) if made and os.path.exists(path) else {} if made else recipe
    other = [key for key in recipe if before.get(key) != recipe[key]]
    if other:
        raise InputError(f'{out} was made with other {", ".join(other)}: choose another --out')
    with write_atomic(path) as file:
        json.dump(recipe, file, indent=2)


def make_from_units():
    """--from_units: no audio, no encoder."""
    paths = list(chain(*find_files(from_units)))
    recipe = dict(from_units=[file_hash(path) for path in paths], val_fraction=val_fraction)
    settle(recipe)
    origin = describe_units(paths)
    rows = (row for path in paths for row in rows_of_units(path))
    meta = pack(tqdm(rows, unit=' rows'), origin)
    if not sum(meta['utterances'].values()) + meta['pairs']:
        raise InputError(f'--from_units={from_units}: no units in it')
    finish(meta, Counter(), recipe)


def make_from_audio():
    """--audio: encode this process's share of the parts; the last process merges them all."""
    part, of = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if shard:
        part, of = map(int, shard.split('/'))
    if torch.cuda.is_available() and device == 'auto':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))

    corpus = items, root, skipped = find_corpus()
    parts = make_parts(items)
    recipe = {key: globals()[key] for key in RECIPE}
    recipe |= dict(encoder=fingerprint(encoder), kmeans=fingerprint(kmeans))
    recipe |= dict(inputs=hash_inputs(parts, root))
    settle(recipe)
    voice = os.path.exists(os.path.join(out, 'vocoder', 'vocoder.json'))
    if os.path.exists(os.path.join(out, 'meta.json')) and (voice or not fit_vocoder):
        return log(f'{out}: everything is already there; nothing to do')

    net, name = prepare_encoder(corpus, recipe, part)
    recipe_id = content_hash(recipe)[:12]
    encode_parts(parts, range(part, len(parts), of), net, root, recipe_id)
    missing = sum(not os.path.exists(part_path(number)) for number in range(len(parts)))
    if missing:
        return log(
            f'{out}: shard {part} of {of} is done; {missing} of {len(parts)} parts are missing'
        )

    # all parts are there: token files, voice, meta.json; if two merge, both write the same
    total = dict(files=0, audio_seconds=0.0, notes=[])
    origin = dict(encoder=name, vocoder=None, n_units=net.n_units, frame_rate=net.frame_rate)
    meta = pack(
        rows_of_parts(len(parts), recipe_id, total), origin | dict(encoder_id=net.encoder_id)
    )
    notes, hours = total.pop('notes'), round(total.pop('audio_seconds') / 3600, 4)
    failed = [name for kind, name, _ in notes if kind == 'failed']
    with write_atomic(os.path.join(out, 'failed.jsonl'), 'wb') as file:
        for kind, name, reason in notes:
            if kind != 'test':
                file.write(to_line(dict(file_name=name, reason=reason, kind=kind)))
    if not sum(meta['utterances'].values()) + meta['pairs'] and failed:
        raise InputError(f'none of the {total["files"]} files could be used; see {file.name}')
    meta['vocoder'] = prepare_vocoder(corpus, net, name)
    finish(meta | total | dict(failed=len(failed), audio_hours=hours), skipped, recipe)


if __name__ == '__main__':
    config = configure(globals())
    if from_units:
        make_from_units()
    else:
        make_from_audio()
    if text_lm and os.path.exists(os.path.join(out, 'meta.json')):
        write_text_sets()
