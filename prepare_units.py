"""Any audio -> units: fit k-means if asked, encode, pack into token files.

    python prepare_units.py config/demo_units.py                      the demo, offline, on a CPU
    python prepare_units.py --audio=LibriSpeech --out=data/librispeech
    python prepare_units.py --audio=hub:slprl/sTinyStories:train --out=data/stinystories
    torchrun --nproc_per_node=8 prepare_units.py --audio=librilight --out=data/librilight
    python prepare_units.py --audio=librilight --out=data/librilight --shard=3/64     one of 64 jobs
    python prepare_units.py --audio=speech --encoder=facebook/hubert-base-ls960 --layer=9 \\
        --fit_kmeans=500 --fit_vocoder                                your own language
    python prepare_units.py --from_units=features.jsonl --out=data/theirs             no audio
    python prepare_units.py --audio=speech --report=mfcc:100,mfcc:100:4,out/units/encoder
    python prepare_units.py --from_units=data/stinystories/units.jsonl --out=data/mixed \\
        --text_lm=Qwen/Qwen2.5-0.5B           for an interleaved model: speech/, text/, interleaved/

--audio takes, comma-separated: folders (searched), files, globs, manifest.jsonl (a folder that has
one is read by it), .parquet, hub:owner/name[:split], .tar and .tar.gz. A .json with
`voice_activity` beside a recording (Libri-Light) or an .stm (TEDLIUM) cuts it. Manifests and
parquet of preference pairs (prompt, chosen, rejected) give pairs.jsonl, all else units.jsonl,
train.bin and val.bin: of each utterance <S>, its de-duplicated units + 2, <S>. Folders called
dev-clean, validation and so on validate, those called test-clean, test and so on are left alone.

The work is a list of parts, some files each; parts/00012.jsonl is there, whole, once part 12 is
done. Whoever finds all parts there joins them in order. So a killed run goes on where it stopped,
several may work in one folder, and what comes out depends neither on workers nor on shards. Bad
files go to failed.jsonl.
"""

from config import configure

import contextlib
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import tarfile
import time
import zlib
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from model import (
    AUDIO_EXTENSIONS,
    BOS,
    ENCODERS,
    EOS,
    HOP,
    OFFSET,
    PARTS,
    SAMPLE_RATE,
    VOICE_LEVEL,
    InputError,
    NeuralVoice,
    Source,
    UnitEncoder,
    UnitTable,
    UnitVocoder,
    check_marks,
    copy_part,
    dedup,
    filter_source,
    find_audio,
    find_checkpoint,
    frame_spectra,
    load_audio,
    mel_filters,
    parquet_files,
    pick_device,
    power_of,
    read_json,
    read_jsonl,
    read_parquet,
    read_tokenizer,
    speech_level,
    start_worker,
    write_atomic,
)

# -----------------------------------------------------------------------------
audio = ''  # folders, files, globs, manifests, parquet, hub:owner/name, tars; see above
exclude = ''  # leave out files and folders of these names (patterns, comma-separated)
out = 'data/units'  # a folder: units.jsonl, train.bin, val.bin, meta.json, encoder, vocoder ...
from_units = ''  # instead of audio: units.jsonl, features.jsonl, tokens.jsonl, packed shards; globs
n_units = 500  # that those were made with
report = ''  # judge instead: encoders (NAME[:clusters[:switch]]) and units files, with phone times
report_hours = 0.5  # on so much of --audio
# the encoder
encoder = 'mhubert25'  # mhubert25, hubert50, mfcc (offline), a folder with encoder.json, or any net
layer = None  # of a HuBERT, wav2vec 2 or WavLM: whose hidden states are taken
kmeans = ''  # .safetensors with `centroids`, or a joblib dump of scikit-learn's KMeans
fit_kmeans = 0  # fit this many clusters on the speech itself instead
fit_frames = 300_000  # on so many frames of training speech, drawn evenly
switch = None  # the price of a change of unit, in mean distortions; None: the encoder's (mfcc 1.0)
fit_vocoder = None  # also fit a voice: table (seconds; --fit_vocoder alone), or neural, a small net
vocoder_hours = 0.5  # on so much training speech, drawn evenly
vocoder_steps = 3000  # of training the net: 220 s of one core; a GPU bears many more
# text beside it, for an interleaved model: folders speech, text and interleaved in out
text_lm = ''  # with the tokenizer of this text LM, a folder or a hub name; units need word times
texts = ''  # of the set text: .txt, .jsonl, .parquet, hub:owner/name; '': what the utterances say
draws = 4  # interleavings of each utterance: in so many epochs none comes twice
# how it is cut and split
max_seconds = 0.0  # longer utterances are cut at the quietest point of the last third; 0: never
val_folders = ''  # files below folders of these names validate; '': dev, dev-*, validation, ...
val_fraction = 0.01  # where there is none of these: this share, chosen by a hash of the names
# scale
shard = ''  # i/n: this run encodes parts i, i + n, ... (i from 0); torchrun sets it
workers = 0  # processes that read, and with mfcc encode; 0: one a core of this process's share
seed = 1234
device = 'auto'
# -----------------------------------------------------------------------------

PART_FILES = 128  # at most, of a large corpus
PART_BYTES = 32 << 20  # about 17 minutes of wav
BATCH_SECONDS = 600  # of speech that a worker reads before it hands it on
SAMPLE_SECONDS = 60.0  # what is drawn to fit on is cut to this
CUT_GRID = 640  # samples, 40 ms: cut there, frames fall where they would uncut
PAIR = ('prompt', 'chosen', 'rejected')
ARCHIVES = ('.tar', '.tar.gz', '.tgz')
MANIFESTS = ('manifest.jsonl',)
WANTED = (*AUDIO_EXTENSIONS, *ARCHIVES, '.parquet', *MANIFESTS)
OURS = ('path', 'file_name', 'units', 'duration', 'split')  # not taken from a manifest
SPLITS = dict(validation='val', valid='val', dev='val')  # what others call it
OTHER_NAMES = dict(speaker='voice', raw_text='text')
# What a broken file raises. Want of memory or of a library is not the file's fault
BAD_DATA = (OSError, ValueError, KeyError, TypeError, EOFError, tarfile.TarError, zlib.error)
# Settings that decide what is in a part. A folder's parts all have the same.
RECIPE = (
    *('encoder', 'layer', 'kmeans', 'fit_kmeans', 'fit_frames', 'switch'),
    *('max_seconds', 'val_folders', 'val_fraction', 'exclude', 'seed'),
)


# -----------------------------------------------------------------------------
# What there is: items, a file each, or a row of a manifest


class Item(NamedTuple):
    """Where an utterance, or several, are to be read."""

    kind: str  # file; row of a manifest; tar and parquet, which hold many; see READERS
    path: str
    at: int = 0  # byte of the row
    size: int = 0  # bytes, as far as known
    split: str = ''  # train, val or test, where the data says so
    name: str = ''  # the path in the row


class Corpus(NamedTuple):
    """What --audio names."""

    items: list
    left_out: int  # items of test sets, and what --exclude names
    root: str  # the folder of it all: names in units.jsonl are relative to it


def find_items(path):
    """Yields the items of a file, a folder or a data set of the hub, in a fixed order."""
    if os.path.isdir(path):
        found = find_audio(path, WANTED)
        # a manifest knows what lies beside it and below
        known = {os.path.dirname(file) for file in found if os.path.basename(file) in MANIFESTS}
        for file in found:
            place = os.path.dirname(file) if os.path.basename(file) in MANIFESTS else file
            if known.isdisjoint(map(str, Path(place).parents)):
                yield from find_items(file)
    elif path.startswith('hub:') or path.endswith('.parquet'):
        for name in parquet_files(path):
            yield Item('parquet', name, 0, size_of(name) or PART_BYTES)
    elif path.endswith('.jsonl'):
        yield from items_of_manifest(path)
    else:
        kind = 'tar' if path.endswith(ARCHIVES) else 'file'
        yield Item(kind, path, 0, size_of(path))


def size_of(path):
    """In bytes; 0 of what is on the hub, and of a link that leads nowhere."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def items_of_manifest(path):
    """A row each: `path`, or prompt_path, chosen_path and rejected_path."""
    at = 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                paths = paths_of_row(row)
                split = row.get('split') or ''
                size = int(float(row.get('seconds') or 10) * 20_000)
                if not all(isinstance(text, str) for text in (*paths, split)) or not all(paths):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                raise InputError(
                    f'{path}, line {number}: expected JSON with `path` (or prompt_path, '
                    'chosen_path, rejected_path) and, if any, seconds and split'
                ) from None
            check_marks(row, f'{path}, line {number}')
            yield Item('row', path, at, size, SPLITS.get(split, split), paths[0])
            at += len(line)


def paths_of_row(row):
    """The audio of a manifest's row: one path, or three of a preference pair."""
    return [row[f'{part}_path'] for part in PAIR] if 'prompt_path' in row else [row['path']]


def find_sources():
    """What --audio names -> [items] of each source, and the folder of it all. Raises InputError."""
    sources, folders = [], []
    for source in split_list(audio):
        there = source.startswith('hub:') or os.path.exists(source)
        paths = [source] if there else sorted(glob.glob(source, recursive=True))
        if '**' in source:  # it names folders and again what lies in them
            paths = [path for path in paths if path.lower().endswith(AUDIO_EXTENSIONS + ARCHIVES)]
        items = [item for path in paths for item in find_items(path)]
        if not items:
            what = 'no audio in it' if paths else 'no such file or folder'
            raise InputError(f'--audio={source}: {what} (looked for {" ".join(WANTED)})')
        sources.append(items)
        for path in paths:
            if not path.startswith('hub:'):
                folder = path if os.path.isdir(path) else os.path.dirname(path)
                folders.append(os.path.abspath(folder))
    if not sources:
        raise InputError('--audio names nothing: give folders, files, globs, manifests, hub:NAME')
    return sources, os.path.commonpath(folders) if folders else os.getcwd()


def split_list(text):
    """'a, b/' -> ['a', 'b/']"""
    return [part.strip() for part in text.split(',') if part.strip()]


def name_below(path, root):
    """How a file is called in units.jsonl: relative to the folder of it all."""
    return path.removeprefix('hub:') if path.startswith('hub:') else os.path.relpath(path, root)


def split_by_folder(name):
    """'val' or 'test' where a folder in the name says so (LibriSpeech: dev-clean, test-other)."""
    patterns = [pattern.strip('/') for pattern in split_list(val_folders)]
    for folder in name.split('/')[:-1]:
        if any(fnmatch(folder, pattern) for pattern in patterns):
            return 'val'
        if re.match(r'test([-_.].*)?$', folder):
            return 'test'
        if not patterns and re.match(r'(dev|val|valid|validation)([-_.].*)?$', folder):
            return 'val'
    return ''


def split_by_hash(name):
    """'train' or 'val', by the name alone: val_fraction of all names validate."""
    digest = hashlib.sha1(os.fsencode(name)).digest()
    return 'val' if int.from_bytes(digest[:6], 'big') < val_fraction * 2**48 else 'train'


def split_of(row):
    """train, val or test, as a row says or else its name."""
    split = row.get('split') or split_by_folder(row['file_name'])
    if not split:
        split = 'train' if val_folders else split_by_hash(row['file_name'])
    return SPLITS.get(split, split)


def choose_items(sources, root):
    """-> Corpus of the items to encode, each with its split if its folder says one.

    Left out is what --exclude names, and test sets, but where all of a source is one: it is meant.
    """
    unwanted = [pattern.strip('/') for pattern in split_list(exclude)]
    chosen = []
    for items in sources:
        kept, tests = [], []
        for item in items:
            folder = os.path.dirname(item.path) if item.name else item.path
            name = os.path.join(name_below(folder, root), item.name)
            if any(fnmatch(part, pattern) for part in name.split('/') for pattern in unwanted):
                continue
            if item.kind in ('parquet', 'tar'):
                name += '/'  # dev-clean.tar.gz, test-00000-of-00001.parquet
            split = item.split or split_by_folder(name)
            if split == 'test' and not item.split:
                tests.append(item)
            else:
                kept.append(item._replace(split=split))
        chosen += kept or tests
    if not chosen:
        raise InputError('--exclude leaves nothing of --audio')
    left_out = sum(map(len, sources)) - len(chosen)
    # where some folder validates, all others train; else a hash decides, when an item is read
    if val_folders or any(item.split == 'val' for item in chosen):
        chosen = [item._replace(split=item.split or 'train') for item in chosen]
    return Corpus(list(dict.fromkeys(chosen)), left_out, root)  # named twice, it comes once


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


# -----------------------------------------------------------------------------
# Reading: items -> utterances


class Utterance(NamedTuple):
    """Where an utterance, or a preference pair, is, and what is known of it."""

    path: str  # or a name, of what has none
    known: dict  # text, voice, words ...
    sources: list  # a path or an open file; of a pair three
    spans: list = ()  # [(start s, end s), ...] to be joined; none: all of it


class Piece(NamedTuple):
    """An utterance, a part of a long one, or a preference pair, read."""

    row: dict  # what is known of it, as units.jsonl will say
    waves: list  # (samples,) float32 at 16 kHz each: one, or of a pair three


class Failure(NamedTuple):
    name: str
    reason: str


def failure_of(name, error):
    return Failure(name, ' '.join(str(error).split()) or repr(error))


def utterances_of_file(item):
    """A recording whole, or cut as a file beside it says: Libri-Light's .json, TEDLIUM's .stm."""
    path = item.path
    stem, extension = os.path.splitext(path)
    if extension == '.flac' and os.path.exists(stem + '.json'):
        with open(stem + '.json', encoding='utf-8') as file:
            meta = json.load(file)
        activity = meta.get('voice_activity') if isinstance(meta, dict) else None
        if activity:
            for spans in join_activity(activity):
                yield Utterance(path, {}, [path], spans)
            return
    if extension == '.sph':
        for stm in (stem + '.stm', re.sub(r'sph/([^/]*)$', r'stm/\1', stem + '.stm')):
            if os.path.exists(stm):
                yield from segments_of_stm(stm, path)
                return
    yield Utterance(path, {}, [path])


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
    if group:
        yield group


def segments_of_stm(stm, path):
    """The segments of a talk: lines of talk, channel, speaker, start, end, label and text."""
    with open(stm, encoding='utf-8', errors='replace') as file:
        for line in file:
            fields = line.split(maxsplit=6)
            if len(fields) == 7 and not line.startswith(';;') and 'ignore_time' not in line:
                _, _, speaker, start, end, _, text = fields
                spans = [(float(start), float(end))]
                yield Utterance(path, dict(voice=speaker, text=text.strip()), [path], spans)


def utterances_of_row(item):
    """A row of a manifest, which is read again: rows of millions do not stay in memory."""
    with open(item.path, 'rb') as file:
        file.seek(item.at)
        row = json.loads(file.readline())
    paths = [find_path(path, os.path.dirname(item.path)) for path in paths_of_row(row)]
    yield Utterance(paths[0], row, paths)


def find_path(path, folder):
    """A path from a manifest: relative to its folder or, else, to where we are."""
    beside = os.path.join(folder, path)
    return path if not os.path.exists(beside) and os.path.exists(path) else beside


def named_bytes(content, name):
    """A file in memory that errors name."""
    file = io.BytesIO(content)
    file.name = name
    return file


def utterances_of_tar(item):
    """The recordings in an archive, read from its beginning to its end."""
    stem = re.sub(r'\.(tar|tar\.gz|tgz)$', '', item.path)
    with tarfile.open(item.path, 'r|*') as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith(AUDIO_EXTENSIONS):
                name = os.path.join(stem, member.name)
                source = named_bytes(tar.extractfile(member).read(), name)
                yield Utterance(name, {}, [source])
            tar.members = []  # else it remembers them all


def utterances_of_parquet(item):
    """The rows of a shard: audio in columns prompt, chosen and rejected, or in any one column."""
    for number, row in enumerate(read_parquet(item.path)):
        structs = {
            key: row[key] for key in row if isinstance(row[key], dict) and 'bytes' in row[key]
        }
        keys = PAIR if structs.keys() >= set(PAIR) else list(structs)[:1]
        if not keys:
            raise InputError(f'{item.path}: no column holds audio, a struct of bytes and path')
        known = {OTHER_NAMES.get(key, key): row[key] for key in row if key not in structs}
        own_name = os.path.basename(structs[keys[0]].get('path') or '')
        name = f'{item.path.removesuffix(".parquet")}/{number:05d}'
        name += f'-{own_name}' * bool(own_name)
        sources = []
        for key in keys:
            content, path = structs[key]['bytes'], structs[key].get('path')
            if path and not content:
                sources.append(find_path(path, os.path.dirname(item.path)))
            else:
                sources.append(named_bytes(content or b'', name))
        yield Utterance(name, known, sources)


# A new layout of data: find_items lists its items, and its reader here finds their utterances
READERS = dict(
    file=utterances_of_file,
    row=utterances_of_row,
    tar=utterances_of_tar,
    parquet=utterances_of_parquet,
)


def cut(wave, longest):
    """Spans [(start, end)] in samples that tile (samples,), none over `longest`.

    Cut at the quietest 200 ms of the last third, on the 40 ms grid. 0: one span.
    """
    spans, start = [], 0
    while longest and len(wave) - start > longest:
        last = min(longest, len(wave) - start - longest // 6)  # what remains is no scrap
        blocks = torch.from_numpy(wave[start : start + last // CUT_GRID * CUT_GRID])
        energy = blocks.view(-1, CUT_GRID).square().mean(1)
        energy = F.avg_pool1d(energy[None], 5, 1, 2, count_include_pad=False)[0]
        first = max(1, longest * 2 // 3 // CUT_GRID)
        end = start + (first + int(energy[first:].argmin())) * CUT_GRID
        spans.append((start, end))
        start = end
    return spans + [(start, len(wave))]


def cut_pieces(wave, row, longest):
    """Yields the pieces of one utterance; row: what is known of it, with its start if not 0."""
    spans = cut(wave, int(longest * SAMPLE_RATE))
    for number, (first, last) in enumerate(spans, 1):
        piece = dict(row, seconds=round((last - first) / SAMPLE_RATE, 4))
        if len(spans) > 1:
            start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
            piece |= dict(start=row.get('start', 0.0) + start, piece=f'{number}/{len(spans)}')
            piece.pop('text', None)  # it is the whole utterance's
            for key in ('words', 'phones'):
                if row.get(key):
                    piece[key] = marks_within(row[key], start, end)
            if row.get('words'):
                piece['text'] = ' '.join(word for word, _, _ in piece['words'])
        yield Piece(piece, [wave[first:last]])


def marks_within(marks, start, end):
    """Of [[word or phone, start s, end s], ...] those within a piece, in its own time."""
    length = end - start
    return [
        [label, round(max(0, first - start), 3), round(min(last - start, length), 3)]
        for label, first, last in marks
        if start <= (first + last) / 2 < end
    ]


def read_utterance(utterance, split, root, longest):
    """Yields the pieces of an utterance, of at most `longest` seconds, or the pair that it is."""
    path, known, sources, spans = utterance
    name = name_below(path, root)
    split = split or split_by_hash(name)
    if len(sources) == len(PAIR):
        row = dict(file_name=name)
        for part in PAIR:
            row[part] = dict(units=[], duration=[], text=known.get(f'{part}_text') or '')
        row |= {key: known[key] for key in known if not key.startswith(PAIR) and key not in OURS}
        yield Piece(row | dict(split=split), [load_audio(source).numpy() for source in sources])
        return

    row = dict(file_name=name, units=[], duration=[], split=split)
    row |= {key: known[key] for key in known if key not in OURS}
    if spans:
        row['start'] = spans[0][0]
        parts = [load_audio(sources[0], start=a, seconds=b - a) for a, b in spans]
        wave = torch.cat(parts).numpy()
    else:
        wave = load_audio(sources[0]).numpy()
    yield from cut_pieces(wave, row, longest)


def read_item(item, root, longest):
    """Yields the Pieces of an item, and a Failure for what cannot be read: one file of millions
    must not end the run. What the hub does not give ends it: it is not the data's fault."""
    where = item.path + (f', byte {item.at}' if item.name else '')
    try:
        for utterance in READERS[item.kind](item):
            try:
                yield from read_utterance(utterance, item.split, root, longest)
            except BAD_DATA as error:
                yield failure_of(utterance.path, error)
    except BAD_DATA as error:
        if item.path.startswith('hub:'):
            raise
        yield failure_of(where, error)


def read_batches(items, root):
    """Yields (pieces, failures, whether these are the last) of a part, some minutes at a time."""
    pieces, failures, seconds = [], [], 0.0
    for item in items:
        for found in read_item(item, root, max_seconds):
            if isinstance(found, Failure):
                failures.append(found)
                continue
            pieces.append(found)
            seconds += sum(map(len, found.waves)) / SAMPLE_RATE
            if seconds > BATCH_SECONDS:
                yield pieces, failures, False
                pieces, failures, seconds = [], [], 0.0
    yield pieces, failures, True


class Reader(IterableDataset):
    """What worker processes do: `work(items)` of each job (key, items), which yields results."""

    def __init__(self, jobs, work):
        self.jobs, self.work = jobs, work

    def __iter__(self):
        worker = get_worker_info()
        for key, items in self.jobs[worker.id :: worker.num_workers]:
            try:
                for result in self.work(items):
                    yield key, result
            except InputError as error:
                yield key, error


def work_ahead(jobs, work, in_order=False):
    """Yields (key, result) of `work(items)` for each job (key, items), made by worker processes in
    advance. in_order: of jobs with one result each, in their order; else as they come."""
    parent = os.getpid()
    loader = DataLoader(
        Reader(jobs, work),
        batch_size=None,
        num_workers=max(1, min(count_workers(), len(jobs))),
        worker_init_fn=lambda number: start_worker(parent=parent),
        collate_fn=lambda result: result,  # arrays stay arrays: no shared memory is needed
        multiprocessing_context='fork',  # it takes what is loaded along
        in_order=in_order,
    )
    try:
        for key, result in loader:
            if isinstance(result, InputError):
                raise result
            yield key, result
    except (RuntimeError, MemoryError) as error:
        if 'DataLoader worker (pid' not in str(error) and not isinstance(error, MemoryError):
            raise
        raise InputError(
            'a worker died, most likely for want of memory: use fewer --workers; '
            'the same command continues'
        ) from None


# -----------------------------------------------------------------------------
# The encoder: what is fitted, on speech drawn evenly


def draw_speech(corpus, seconds):
    """Yields lists of about 16 Pieces of training speech, drawn evenly from all items.

    seconds: about how much the caller will take; no more is read of each item than that needs. The
    order depends on the seed alone.
    """
    wanted = [item for item in corpus.items if item.split in ('', 'train')]
    items = wanted or corpus.items
    items = random.Random(seed).sample(items, min(len(items), 100_000))
    per_item = min(64, max(1, math.ceil(seconds / 5 / len(items))))  # few are shorter than 5 s
    per_job = max(1, 16 // per_item)

    def read(items):
        pieces = []
        for item in items:
            for found in islice(read_item(item, corpus.root, SAMPLE_SECONDS), per_item):
                if isinstance(found, Failure) or found.row['split'] == 'train' or not wanted:
                    pieces.append(found)
        yield pieces

    jobs = [(i, items[i : i + per_job]) for i in range(0, len(items), per_job)]
    none, reason = True, ''
    for _, found in work_ahead(jobs, read, in_order=True):
        pieces = [piece for piece in found if isinstance(piece, Piece)]
        failures = [failure.reason for failure in found if isinstance(failure, Failure)]
        none, reason = none and not pieces, reason or ''.join(failures[:1])
        yield pieces
    if none:
        raise InputError(
            'no training speech to fit on: of the files drawn none is readable and not to validate'
            + f' ({reason})' * bool(reason)
        )


def draw_frames(net, corpus, n_frames):
    """(frames, D) features of training speech, on the encoder's device."""
    frames, total = [], 0
    with tqdm(total=n_frames, desc='frames to fit on', unit_scale=True, leave=False) as bar:
        for pieces in draw_speech(corpus, n_frames / net.frame_rate):
            found = net.features([wave for piece in pieces for wave in piece.waves])
            frames += found
            total += sum(map(len, found))
            bar.update(sum(map(len, found)))
            if total >= n_frames:
                break
    return torch.cat(frames)[:n_frames]


def cluster(frames, k, seed):
    """k-means of (frames, D): a k-means++ start on a part, then Lloyd's rounds on all.

    An empty cluster is moved to the frame that is worst served. Returns: centroids (k, D) on the
    CPU, and the mean squared distance. Raises InputError where there are too few frames.
    """
    if len(frames) < k:
        raise InputError(
            f'{len(frames)} frames are too few for {k} clusters: give more speech, or lower '
            '--fit_kmeans'
        )
    centroids, before = first_centroids(frames, k, seed), float('inf')
    for _ in tqdm(range(30), desc='k-means, rounds', leave=False):
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        counts = torch.zeros(k, dtype=torch.float64, device=frames.device)
        distances = []
        for block in frames.split(1 << 15):
            half, unit = (centroids.square().sum(1) / 2 - block @ centroids.T).min(1)
            distances.append(half * 2 + block.square().sum(1))
            # a product: index_add on CUDA adds in no fixed order
            member = (unit[:, None] == torch.arange(k, device=frames.device)).to(frames.dtype)
            sums += (member.T @ block).double()
            counts += member.sum(0).double()
        distances = torch.cat(distances)
        mean = float(distances.double().mean())
        if mean > 0.999 * before:  # the round gained less than a thousandth
            break
        before = mean
        centroids = (sums / counts.clamp(min=1)[:, None]).to(frames.dtype)
        empty = counts == 0
        centroids[empty] = frames[distances.topk(int(empty.sum())).indices]
    return centroids.cpu(), mean


def first_centroids(frames, k, seed):
    """k-means++ (Arthur & Vassilvitskii 2007) on a part of (frames, D): each next centroid by its
    squared distance to the others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(frames), generator=generator)
    part = frames[order[: max(20_000, 30 * k)].to(frames.device)]
    centroids = part[:1]
    distances = (part - centroids).square().sum(1)
    for _ in range(k - 1):
        chance = distances.cpu().double().clamp(min=1e-12)
        i = torch.multinomial(chance, 1, generator=generator).to(frames.device)
        centroids = torch.cat((centroids, part[i]))
        distances = torch.minimum(distances, (part - part[i]).square().sum(1))
    return centroids


def load_encoder(name, clusters, price, corpus):
    """The encoder of that name. clusters: how many to fit, 0 to take those that it has. price: of
    a change of unit, in its own mean distortion, which is measured where it is not known."""
    net = UnitEncoder.from_pretrained(name, layer, '' if clusters else kmeans or None, device)
    if net.centroids is None and not clusters:
        raise InputError(
            f'{name} has no k-means yet: --fit_kmeans=N fits one, --kmeans=FILE or '
            '--encoder=FOLDER takes one'
        )
    if price is not None:
        net.config['switch'] = price
    if clusters:
        frames = draw_frames(net, corpus, fit_frames)
        net.centroids, net.config['distortion'] = cluster(frames, clusters, seed)
        if not net.config['distortion']:
            raise InputError('the speech to fit on is silent, or no two of its sounds differ')
        net.centroids = net.centroids.to(net.device)
    elif net.config.get('switch') and not net.config.get('distortion'):
        frames = draw_frames(net, corpus, min(fit_frames, 30_000))
        net.config['distortion'] = net.distance([frames])
    return net


# -----------------------------------------------------------------------------
# Encoding: parts -> parts/00012.jsonl


def to_line(row):
    """A row as a line of JSON; names need not be UTF-8."""
    text = json.dumps(row, ensure_ascii=False, separators=(',', ':'), default=str)
    return text.encode(errors='backslashreplace') + b'\n'


def encode(net, pieces):
    """The lines of some pieces, their units filled in."""
    units = iter(net.encode([wave for piece in pieces for wave in piece.waves]))
    lines = []
    for row, waves in pieces:
        for utterance in [row] if len(waves) == 1 else [row[part] for part in PAIR]:
            runs, durations = dedup(next(units))
            utterance |= dict(units=runs.tolist(), duration=durations.tolist())
        lines.append(to_line(row))
    return lines


def part_path(number):
    return os.path.join(out, 'parts', f'{number:05d}.jsonl')


def parts_there():
    """The numbers of the parts that are done."""
    names = os.listdir(os.path.join(out, 'parts'))
    return {int(name[:-6]) for name in names if re.fullmatch(r'\d+\.jsonl', name)}


def write_part(number, lines, failures, seconds, n_files):
    """A part is its rows, and a last line that tells of it."""
    summary = dict(files=n_files, audio_seconds=round(seconds, 3), failed=failures)
    with write_atomic(part_path(number), 'wb') as file:
        file.writelines(lines)
        file.write(to_line(dict(part=number, **summary)))


def encode_parts(parts, mine, net, root):
    """Encode those of the parts `mine` that are not there -> how many times faster than speech.

    Cheap features are computed where the files are read. A net runs here, while workers read ahead.
    """
    cheap = net.extractor.cheap

    def work(items):
        for pieces, failures, last in read_batches(items, root):
            seconds = sum(len(wave) for piece in pieces for wave in piece.waves) / SAMPLE_RATE
            yield encode(net, pieces) if cheap else pieces, failures, seconds, last

    there = parts_there()
    todo = [(number, parts[number]) for number in mine if number not in there]
    n_done = sum(len(parts[number]) for number in mine if number in there)
    begun, started, speed, total, n_failed = {}, time.time(), 0, 0.0, 0
    with tqdm(total=sum(len(parts[i]) for i in mine), initial=n_done, unit=' files') as bar:
        for number, (found, failures, seconds, last) in work_ahead(todo, work):
            part = begun.setdefault(number, dict(lines=[], failures=[], seconds=0.0))
            part['lines'] += found if cheap else encode(net, found)
            part['failures'] += failures
            part['seconds'] += seconds
            total += seconds
            n_failed += len(failures)
            speed = round(total / max(time.time() - started, 1e-3))
            if last:
                write_part(number, **begun.pop(number), n_files=len(parts[number]))
                bar.update(len(parts[number]))
                bar.set_postfix_str(f'{speed} x real time, {n_failed} failed')
    return speed


# -----------------------------------------------------------------------------
# Packing: rows -> units.jsonl, pairs.jsonl, token files


def rows_of_parts(n_parts, total):
    """Yields the rows of all parts, in order; adds up in the dict `total` what they tell."""
    for number in range(n_parts):
        for _, row in read_jsonl(part_path(number)):
            if 'file_name' in row:
                total['cut'] += str(row.get('piece', '')).startswith('1/')
                yield row
                continue
            total['files'] += row['files']
            total['audio_seconds'] += row['audio_seconds']
            total['failed'] += row['failed']


def rows_of_units(path):
    """Yields the rows of units made elsewhere: our units.jsonl; the public toolkit's
    features.jsonl (units, duration), tokens.jsonl (audio_repr) and tokenised pairs; a packed shard
    of slm_scaling (a folder with audio.bin, audio.len, meta.json)."""
    rows = rows_of_shard(path) if os.path.isdir(path) else read_jsonl(path)
    for number, row in rows:
        try:
            row = {'file_name': f'{os.path.basename(path)}:{number}', **row}
            pair = {part: row[part] | collapse(row[part]) for part in PAIR if part in row}
            row |= pair if len(pair) == len(PAIR) else collapse(row)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):
            raise InputError(
                f'{path}, line {number}: expected a JSON object with `units` (numbers from 0) or '
                '`audio_repr`'
            ) from None
        check_marks(row, f'{path}, line {number}')
        yield row


def collapse(row):
    """dict(units=..., duration=...) of a row with either format, runs of equal units added up."""
    units = row.get('units')
    if units is None:
        units = [int(unit) for unit in re.findall(r'<Un(\d+)>', row['audio_repr'])]
    duration = row.get('duration') or [1] * len(units)
    if not all(type(unit) is int and unit >= 0 for unit in units) or len(duration) != len(units):
        raise ValueError
    units, runs = dedup(units)
    duration = [sum(part) for part in np.split(duration, np.cumsum(runs)[:-1])]
    return dict(units=units.tolist(), duration=[int(frames) for frames in duration])


def rows_of_shard(path):
    """A packed shard: int16 units of all utterances, int64 lengths; each ends with its EOS. Yields
    (number from 1, row)."""
    try:
        with open(os.path.join(path, 'meta.json'), encoding='utf-8') as file:
            made = json.load(file)['preprocessing']
        special = [made['eos_token'], made['pad_token']]
        lengths = np.fromfile(os.path.join(path, 'audio.len'), np.int64)
        units = np.memmap(os.path.join(path, 'audio.bin'), np.int16, 'r', shape=(lengths.sum(),))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: no packed shard, a folder with audio.bin, audio.len and meta.json ({error})'
        ) from None
    for number, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True), 1):
        found = units[end - length : end]
        yield number, dict(units=found[~np.isin(found, special)].tolist())


def find_unit_files():
    """The files and packed shards that --from_units names, globs and folders of shards too."""
    found = []
    for source in split_list(from_units):
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        for path in paths:
            below = sorted(glob.glob(os.path.join(glob.escape(path), '*/audio.bin')))
            found += map(os.path.dirname, below)
            if not below:
                found.append(path)
        if not paths:
            raise InputError(f'--from_units={source}: no such file or folder')
    return found


def pack(rows, vocab_size, frame_rate):
    """Write units.jsonl, pairs.jsonl, train.bin and val.bin of rows, one at a time in memory.

    Rows of the test split are in units.jsonl alone. Returns: what meta.json says of them. Raises
    InputError naming a row whose unit is out of the vocabulary.
    """
    meta = dict(vocab_size=vocab_size, n_units=vocab_size - OFFSET, offset=OFFSET)
    meta |= dict(dtype='uint16' if vocab_size <= 65_536 else 'uint32', dedup=True)
    meta |= dict(frame_rate=frame_rate, tokens=dict(train=0, val=0))
    meta |= dict(utterances=dict(train=0, val=0), hours=dict(train=0.0, val=0.0))
    usage, n_pairs = np.zeros(vocab_size - OFFSET, dtype=np.int64), 0
    with ExitStack() as stack:

        def create(name):
            return stack.enter_context(write_atomic(os.path.join(out, name), 'wb'))

        token_files = {split: create(f'{split}.bin') for split in meta['tokens']}
        units_file, pairs_file = create('units.jsonl'), None
        for row in rows:
            if 'prompt' in row:
                pairs_file = pairs_file or create('pairs.jsonl')
                pairs_file.write(to_line(row))
                n_pairs += 1
                continue
            units_file.write(to_line(row))
            split, units = split_of(row), np.array(row['units'])
            if split not in token_files or not len(units):
                continue
            if units.max() >= len(usage):
                found = f'{row["file_name"]}: unit {units.max()}'
                raise InputError(f'{found}, but there are {len(usage)} (--n_units)')
            tokens = np.concatenate(([BOS], units + OFFSET, [EOS]))
            token_files[split].write(tokens.astype(meta['dtype']).tobytes())
            usage += np.bincount(units, minlength=len(usage))
            seconds = row.get('seconds') or sum(row['duration']) / frame_rate
            meta['hours'][split] += seconds / 3600
            meta['tokens'][split] += len(tokens)
            meta['utterances'][split] += 1
    n_units, seconds = int(usage.sum()), 3600 * sum(meta['hours'].values())
    meta['hours'] = {split: round(hours, 4) for split, hours in meta['hours'].items()}
    meta['tokens_per_second'] = round(n_units / max(seconds, 1e-9), 2)
    perplexity = math.exp(entropy(usage / max(1, n_units)))
    meta['unit_usage'] = dict(used=int((usage > 0).sum()), perplexity=round(perplexity, 1))
    return meta | dict(pairs=n_pairs)


def entropy(p):
    """In nats, of probabilities of any shape."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def finish(meta):
    """Write meta.json, which says that all is done, and tell what is in it."""
    with write_atomic(os.path.join(out, 'meta.json')) as file:
        json.dump(meta, file, indent=2)
    told = [
        f'{sum(meta["utterances"].values()):,} utterances',
        f'{sum(meta["hours"].values()):.2f} h',
        f'{sum(meta["tokens"].values()):,} tokens ({meta["tokens_per_second"]} units a second)',
        f'{meta["unit_usage"]["used"]} of {meta["n_units"]} units used',
        f'perplexity {meta["unit_usage"]["perplexity"]}',
        f'{meta["pairs"]:,} pairs',
    ]
    if 'files' in meta:
        told += [
            f'{meta["failed"]:,} of {meta["files"]:,} files failed',
            f'{meta["left_out"]:,} files left out (test sets, --exclude)',
            f'{meta["cut"]:,} utterances cut at {max_seconds:g} s' if meta['cut'] else 'none cut',
            f'{meta["x_real_time"]:,} x real time',
        ]
    if not meta['tokens']['val']:
        told.append('nothing to validate on')
    print(f'{out}: {", ".join(told)}')


# -----------------------------------------------------------------------------
# A voice for the units


def draw_utterances(net, corpus):
    """Yields (wave, units, voice) of vocoder_hours of training speech drawn evenly."""
    seconds = 0.0
    for pieces in draw_speech(corpus, vocoder_hours * 3600):
        waves = [wave for piece in pieces for wave in piece.waves]
        voices = [str(piece.row.get('voice') or '') for piece in pieces for _ in piece.waves]
        yield from zip(waves, net.encode(waves), voices, strict=True)
        seconds += sum(map(len, waves)) / SAMPLE_RATE
        if seconds >= vocoder_hours * 3600:
            return


def fit_table(net, corpus):
    """The table vocoder of that speech: mean spectra, mean durations of units."""
    table = UnitTable(net.n_units, net.frame_rate)
    for wave, units, _ in draw_utterances(net, corpus):
        table.add(wave, units)
    return table.finish()


# -----------------------------------------------------------------------------
# A voice one can train

VOICE_NET = dict(width=128, kernel=7, blocks=3)
VOICE_BATCH, VOICE_FRAMES = 8, 64  # stretches of so many frames a step: 20 s of speech
VOICE_WAVES = 2  # of them are made into waves
VOICE_SAVE = 500  # steps between two states on disk
VOICE_RATE = 2e-3  # learning rate, down along a cosine to a fiftieth


def track_pitch(wave):
    """The pitch of (samples,) by the autocorrelation of 40 ms: (10 ms steps,) Hz, 0: unvoiced."""
    n, size, lags = len(wave) // HOP, 640, torch.arange(40, 267)  # 400 to 60 Hz
    window = torch.hann_window(size)
    frames = F.pad(wave, ((size - HOP) // 2,) * 2).unfold(0, size, HOP)[:n] * window
    both = torch.cat((frames, window[None]))
    similar = torch.fft.irfft(torch.fft.rfft(both, 2048).abs().square())
    similar = similar[:, lags] / similar[:, :1].clamp(min=1e-6)
    similar = similar[:-1] / similar[-1]  # less what the window alone does

    # the shortest of the lags that are nearly the best, or pitch would be halved now and then
    best = similar.max(1, keepdim=True).values
    near = (similar >= 0.9 * best).float().argmax(1, keepdim=True) + torch.arange(12)
    near = near.clamp(max=len(lags) - 1)
    lag = lags[near.gather(1, similar.gather(1, near).argmax(1, keepdim=True))[:, 0]]
    power = frames.square().mean(1)
    voiced = (best[:, 0] > 0.6) & (power > 1e-3 * power.quantile(0.95))
    pitch = torch.where(voiced, SAMPLE_RATE / lag, 0.0)
    return F.pad(pitch, (2, 2)).unfold(0, 5, 1).median(1).values


def log_mels(waves):
    """log_mel of (B, samples), on any device."""
    power = power_of(frame_spectra(waves)) @ mel_filters().to(waves.device)
    return power.clamp(min=1e-7).log()


def spectral_loss(waves, real):
    """Mean difference of log power spectra in windows of 8, 32 and 64 ms."""
    total = 0
    for size in (128, 512, 1024):
        window = torch.hann_window(size, device=waves.device)
        both = torch.stack((waves, real)).unfold(-1, size, size // 4) * window
        power = power_of(torch.fft.rfft(both))
        total = total + torch.diff(power.clamp(min=1e-6).log(), dim=0).abs().mean()
    return total / 6  # of amplitudes, not powers


def learn_from(wave, units, voice, steps):
    """What the training needs of an utterance: its wave (samples,) and its units (frames,), of
    `steps` of 10 ms each -> dict of tensors."""
    units, durations = dedup(units)
    n = int(durations.sum()) * steps * HOP
    wave = F.pad(wave, (0, max(0, n - len(wave))))[:n]
    wave = wave * (VOICE_LEVEL / max(speech_level(wave), 1e-5))
    frames, place = units.repeat_interleave(durations), NeuralVoice.places(durations)
    known = dict(frames=frames, place=place, pitch=track_pitch(wave), wave=wave)
    return known | dict(voice=torch.full_like(frames, voice), units=units, durations=durations)


def draw_stretches(speech, step, device):
    """The stretches of one step, a function of (seed, step) alone: dict of tensors (B, ...).

    speech: what learn_from gives of all utterances, one after the other."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    batch = {}
    for keys in (('frames', 'place', 'pitch', 'wave', 'voice'), ('units', 'durations')):
        total = len(speech[keys[0]])
        starts = torch.randint(max(1, total - VOICE_FRAMES), (VOICE_BATCH,), generator=generator)
        for key in keys:
            each = len(speech[key]) // total  # of them a frame
            parts = [speech[key][at * each : (at + VOICE_FRAMES) * each] for at in starts.tolist()]
            batch[key] = torch.stack(parts).to(device)
    noise = torch.randn(batch['wave'][:VOICE_WAVES].shape, generator=generator)
    return batch | dict(noise=noise.to(device))


def voice_loss(voice, batch):
    """The sum of the losses of a step: log-mel, spectral, pitch and duration -> scalar.

    The spectral loss is of waves, through source and inverse STFT. The energies learn from the
    log-mel alone, so that the waves teach what is voice and what is noise.
    """
    energies, logits, log_pitch = voice(batch['frames'], batch['place'], batch['voice'][:, 0])
    mel_loss = (energies - log_mels(batch['wave'])).abs().mean()

    # pitch where there is one; the frames of a run after its first are a Poisson variable
    voiced = batch['pitch'] > 0
    pitch_error = (log_pitch - batch['pitch'].clamp(min=1).log()).abs() * voiced
    pitch_loss = pitch_error.sum() / voiced.sum().clamp(min=1)
    further = voice.mean_durations(batch['units']) - 1
    duration_loss = F.poisson_nll_loss(further, batch['durations'].float() - 1, log_input=False)

    # waves of the first stretches, at the pitch of the recording where that has one
    few = slice(0, VOICE_WAVES)
    pitch = torch.where(voiced, batch['pitch'], log_pitch.detach().exp().clamp(50, 500))[few]
    pulses, _ = Source()(pitch)
    share = voice.voiced(logits[few])
    wave = filter_source(energies[few].detach(), share, pulses, batch['noise'])
    return mel_loss + spectral_loss(wave, batch['wave'][few]) + pitch_loss + duration_loss


def hear_voice(vocoder, speech):
    """Mean difference in nats between the log-mel of recordings and of what a vocoder makes of
    their units."""
    errors = []
    with torch.inference_mode():
        for known in speech:
            speaker = int(known['voice'][0])  # the table has one for all
            wave = vocoder.voice.speak(known['units'], known['durations'], speaker=speaker)
            both = log_mels(torch.stack((wave.cpu(), known['wave'])))
            errors.append(both.diff(dim=0).abs().mean())
    return round(float(torch.stack(errors).mean()), 4)


def begin_voice(config, table, pitch):
    """The net before its training: it speaks as the table does, at the mean pitch."""
    torch.manual_seed(seed)
    voice = NeuralVoice(config, device=pick_device(device))
    with torch.no_grad():
        voice.base.weight.copy_(table.tensors['mel'].flatten(1))
        voice.head.weight *= 0.1
        head = voice.head.bias.view(voice.steps, -1)
        head.zero_()
        head[:, -1] = pitch[pitch > 0].log().mean() if (pitch > 0).any() else math.log(120)
    return voice


def train_voice(voice, config, speech):
    """vocoder_steps steps; a state every few hundred, from which a killed run goes on exactly."""
    optimizer = torch.optim.AdamW(voice.parameters(), VOICE_RATE, betas=(0.9, 0.99))
    path, done = os.path.join(out, 'vocoder_state.pt'), 0
    if os.path.exists(path):
        state = torch.load(path, map_location=voice.device, weights_only=True)
        if state['config'] != config or state['steps'] != vocoder_steps:
            raise InputError(f'{path} is of another voice: delete it, or give its settings')
        voice.load_state_dict(state['voice'])
        optimizer.load_state_dict(state['optimizer'])
        done = state['done']
    bar = tqdm(range(done, vocoder_steps), 'voice', vocoder_steps, initial=done, unit=' steps')
    for step in bar:
        share = (1 + math.cos(math.pi * step / vocoder_steps)) / 2
        optimizer.param_groups[0]['lr'] = VOICE_RATE * min((step + 1) / 20, 0.02 + 0.98 * share)
        loss = voice_loss(voice, draw_stretches(speech, step, voice.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(voice.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % VOICE_SAVE == 0:
            bar.set_postfix_str(f'loss {loss.item():.3f}')
            state = dict(voice=voice.state_dict(), optimizer=optimizer.state_dict())
            state |= dict(config=config, steps=vocoder_steps, done=step + 1)
            with write_atomic(path, 'wb') as file:
                torch.save(state, file)


def fit_neural_vocoder(net, corpus):
    """Train a small net to speak the units, on speech drawn evenly -> UnitVocoder.

    One utterance in 16 is held out; vocoder.json tells its log-mel error and the table's.
    """
    table, speech, voices = UnitTable(net.n_units, net.frame_rate), [], {}
    for wave, units, voice in draw_utterances(net, corpus):
        table.add(wave, units)
        row = voices.setdefault(voice, len(voices))
        speech.append(learn_from(torch.as_tensor(wave), units, row, table.steps))
    if not speech:
        raise InputError('no training speech to fit a voice on: none of the files can be read')
    table, held_out = table.finish(), speech[::16]
    speech = [known for i, known in enumerate(speech) if i % 16] or speech
    speech = {key: torch.cat([known[key] for known in speech]) for key in speech[0]}

    config = dict(kind='neural', n_units=net.n_units, frame_rate=net.frame_rate)
    config |= dict(sample_rate=SAMPLE_RATE, voices=list(voices), **VOICE_NET)
    voice = begin_voice(config, table, speech['pitch'])
    train_voice(voice, config, speech)

    vocoder = UnitVocoder(config, voice.state_dict(), voice.device)
    errors = hear_voice(vocoder, held_out), hear_voice(table, held_out)
    vocoder.config['log_mel_error'] = dict(zip(('neural', 'table'), errors, strict=True))
    print(f'voice: held-out log-mel error {errors[0]:.3f} nats, of the table {errors[1]:.3f}')
    return vocoder


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
        first, last = words[span[0]], words[span[-1]]
        if speech[span[0]]:
            units = units_between(row, first[1], last[2], meta['frame_rate'])
            tokens += [meta['vocab_size'] - 2, *(units + meta['offset']).tolist()]
        else:
            text = ' '.join(words[i][0] for i in span)
            # within a text a word has a space before it, and so other tokens than the first
            tokens += [meta['vocab_size'] - 1, *encode(f' {text}' if span[0] else text)]
    return [*tokens, meta['end']]


def read_texts(where):
    """Yields (name, text) of the documents in text files, JSON lines and parquet, whose column is
    `text`. Raises InputError where there is none."""
    for path in split_list(where):
        if path.endswith('.jsonl'):
            rows = (row for _, row in read_jsonl(path))
        elif path.startswith('hub:') or path.endswith('.parquet') or os.path.isdir(path):
            rows = read_parquet(path)
        else:
            rows = (dict(text=document) for document in documents_of(path))
        for number, row in enumerate(rows):
            if not isinstance(row.get('text'), str):
                raise InputError(f'--texts={path}, row {number}: no text in a column `text`')
            yield f'{path}:{number}', row['text']


def documents_of(path):
    """Yields the documents of a .txt file: between MARK if it has that, or blank lines."""
    with open(path, encoding='utf-8') as file:
        mark = MARK if MARK in file.read(1 << 20) else ''
        file.seek(0)
        lines = []
        for line in chain(file, [mark]):
            if line.strip() == mark:
                yield ''.join(lines).strip()
                lines = []
            else:
                lines.append(line)


def numbered_rows():
    """Yields (number, split, row) of the utterances in out/units.jsonl that are not empty."""
    for number, row in read_jsonl(os.path.join(out, 'units.jsonl')):
        if row['units']:
            yield number, split_of(row), row


def speech_documents(meta):
    """Yields (split, tokens) of the utterances as speech: `<speech>`, units, the end."""
    for _, split, row in numbered_rows():
        units = (np.array(row['units']) + meta['offset']).tolist()
        yield split, [meta['vocab_size'] - 2, *units, meta['end']]


def text_documents(meta, encode):
    """Yields (split, tokens) of texts: `<text>`, the text LM's tokens, the end."""
    rows = ((split, row.get('text')) for _, split, row in numbered_rows())
    if texts:
        rows = ((split_by_hash(name), text) for name, text in read_texts(texts))
    for split, text in rows:
        if text:
            yield split, [meta['vocab_size'] - 1, *encode(text), meta['end']]


def interleaved_documents(meta, encode):
    """Yields (split, tokens) of the utterances with word times, `draws` times, each time with other
    spans; those that validate once."""
    for draw in range(draws):
        for number, split, row in numbered_rows():
            if row.get('words') and (split == 'train' or draw == 0):
                rng = np.random.default_rng((seed, draw, number))
                speech = draw_spans(len(row['words']), rng)
                yield split, interleave(row, speech, encode, meta)


def write_token_set(name, documents, meta):
    """Write train.bin, val.bin and meta.json of (split, tokens) in the folder out/name."""
    folder = os.path.join(out, name)
    tokens, documents_of_split = dict(train=0, val=0), dict(train=0, val=0)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(write_atomic(os.path.join(folder, f'{split}.bin'), 'wb'))
            for split in tokens
        }
        for split, document in tqdm(documents, name, unit=' documents'):
            if split in files:
                files[split].write(np.array(document, meta['dtype']).tobytes())
                tokens[split] += len(document)
                documents_of_split[split] += 1
    with write_atomic(os.path.join(folder, 'meta.json')) as file:
        json.dump(meta | dict(tokens=tokens, utterances=documents_of_split), file, indent=2)
    told = f'{folder}: {documents_of_split["train"]:,} documents, {tokens["train"]:,} tokens'
    if not tokens['train']:
        wanted = dict(text='text', interleaved='words: [[word, start s, end s], ...]')
        told += f'; no train set, rows of units.jsonl need {wanted.get(name, "units")}'
    print(told)


def write_text_sets():
    """The sets speech, text and interleaved beside out/units.jsonl, in the vocabulary of text_lm
    and after it the units, <speech> and <text>; and the tokenizer, a copy."""
    folder = find_checkpoint(text_lm, tensors=False)
    tokenizer, end, digest = read_tokenizer(folder)
    copy_part(folder, out, 'tokenizer')
    meta = read_json(os.path.join(out, 'meta.json'))
    offset = read_json(os.path.join(folder, 'config.json')).get('vocab_size')
    if type(offset) is not int or offset < tokenizer.get_vocab_size():
        raise InputError(f'{folder}/config.json has vocab_size={offset}, fewer than the tokenizer')
    for part in PARTS:  # one copy for the three
        if os.path.isdir(os.path.join(out, part)):
            meta[part] = f'../{part}'
    vocab_size = offset + meta['n_units'] + 2
    meta |= dict(vocab_size=vocab_size, offset=offset, end=end, text_lm=text_lm)
    meta |= dict(tokenizer_sha256=digest, dtype='uint16' if vocab_size <= 65_536 else 'uint32')

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    write_token_set('speech', speech_documents(meta), meta)
    write_token_set('text', text_documents(meta, encode), meta)
    write_token_set('interleaved', interleaved_documents(meta, encode), meta)


# -----------------------------------------------------------------------------
# The report: what units know of phones, before any model is trained


def frame_labels(marks, n_frames, frame_rate):
    """The label of each frame, by its middle, of [[label, start s, end s], ...]; '' in pauses."""
    labels = np.full(n_frames, '', dtype=object)
    middles = (np.arange(n_frames) + 0.5) / frame_rate
    for label, start, end in marks:
        first, last = np.searchsorted(middles, (start, end))
        labels[first:last] = label
    return labels


def measure_units(rows, frame_rate, n_units):
    """How units and phones go together (Hsu et al. 2021, HuBERT, section IV-E).

    rows: of each utterance its units one a frame (frames,) and its marks. Returns: dict of phone
    purity (share of frames right if each unit is read as its commonest phone), cluster purity (the
    same, the other way), pnmi (mutual information / entropy of the phones), bitrate (bits a second
    of the de-duplicated units: their entropy x their rate), units used, tokens a second, and the
    mean length of a run in ms.
    """
    labels, tokens, units = [], [], []
    for found, marks in rows:
        labels.append(frame_labels(marks, len(found), frame_rate))
        tokens.append(dedup(found)[0].numpy())
        units.append(np.asarray(found))
    if not units:
        raise InputError('no utterance with phone or word times: see `phones` of a manifest')
    units, tokens = np.concatenate(units), np.concatenate(tokens)
    names, phones = np.unique(np.concatenate(labels), return_inverse=True)
    together = np.zeros((len(names), n_units))
    np.add.at(together, (phones, units), 1 / len(units))

    phone, unit = together.sum(1), together.sum(0)
    information = entropy(phone) + entropy(unit) - entropy(together)
    rate = len(tokens) / len(units) * frame_rate
    return dict(
        phone_purity=together.max(0).sum(),
        cluster_purity=together.max(1).sum(),
        pnmi=information / max(entropy(phone), 1e-12),
        bitrate=entropy(np.bincount(tokens) / len(tokens)) / math.log(2) * rate,
        units_used=int((unit > 0).sum()),
        tokens_per_second=rate,
        run_ms=1000 / rate,
        frames=len(units),
    )


def judge_file(path):
    """measure_units of a units file with marks; its meta.json says the frame rate."""
    about = os.path.join(os.path.dirname(path), 'meta.json')
    if not os.path.isfile(path) or not os.path.isfile(about):
        raise InputError(f'{path}: no units file with its meta.json beside it')
    meta = read_json(about)
    rows, seconds = [], 0.0
    for _, row in read_jsonl(path):
        marks = row.get('phones') or row.get('words')
        if marks and seconds < report_hours * 3600:
            seconds += sum(row['duration']) / meta['frame_rate']
            rows.append((np.repeat(row['units'], row['duration']), marks))
    return measure_units(rows, meta['frame_rate'], meta['n_units'])


def judge_encoder(setting, pieces, corpus, nets, features):
    """measure_units of an encoder, NAME[:clusters[:switch]], on some pieces of speech. nets and
    features, dicts, keep what later settings need again."""
    pattern = r'(.*?)(?::(\d+))?(?::(\d+\.?\d*))?'
    name, clusters, price = re.fullmatch(pattern, setting).groups()
    clusters = int(clusters or fit_kmeans)
    if (name, clusters) not in nets:
        nets[name, clusters] = load_encoder(name, clusters, switch, corpus)
    net = nets[name, clusters]
    if name not in features:
        features[name] = net.features([piece.waves[0] for piece in pieces])

    own_price = net.config.get('switch')
    if price is not None:
        net.config['switch'] = float(price)
        net.config['distortion'] = net.config.get('distortion') or net.distance(features[name])
    units = net.assign(features[name])
    net.config['switch'] = own_price
    marks = [piece.row.get('phones') or piece.row['words'] for piece in pieces]
    return measure_units(zip(units, marks, strict=True), net.frame_rate, net.n_units)


def draw_marked(corpus):
    """report_hours of utterances with phone or word times, drawn evenly."""
    found, seconds = [], 0.0
    for pieces in draw_speech(corpus, report_hours * 3600):
        for piece in pieces:
            if piece.row.get('phones') or piece.row.get('words'):
                found.append(piece)
                seconds += len(piece.waves[0]) / SAMPLE_RATE
        if seconds >= report_hours * 3600:
            break
    return found


REPORT = dict(  # column and digits of each measure
    phone_purity=('phone purity', 3),
    cluster_purity=('cluster purity', 3),
    pnmi=('PNMI', 3),
    bitrate=('bits/s', 0),
    units_used=('units used', 0),
    tokens_per_second=('tokens/s', 1),
    run_ms=('run, ms', 0),
)


def judge_units():
    """--report: one table of encoders and units files, and report.json."""
    settings = split_list(report)
    if not all(setting.endswith('.jsonl') for setting in settings):
        corpus, nets, features = choose_items(*find_sources()), {}, {}
        pieces = draw_marked(corpus)
    results = {}
    for setting in settings:
        if setting.endswith('.jsonl'):
            results[setting] = judge_file(setting)
        else:
            results[setting] = judge_encoder(setting, pieces, corpus, nets, features)

    width = max(len('units'), *map(len, settings))
    print(f'{"units":{width}}', *(title for title, _ in REPORT.values()), sep='  ')
    for setting, result in results.items():
        cells = (f'{result[key]:{len(title)}.{n}f}' for key, (title, n) in REPORT.items())
        print(f'{setting:{width}}', *cells, sep='  ')
    with write_atomic(os.path.join(out, 'report.json')) as file:
        json.dump(results, file, indent=2)


# -----------------------------------------------------------------------------


def check_knobs(config):
    """Raises InputError naming the first knob whose value cannot be meant."""
    least = dict(n_units=1, fit_frames=1, vocoder_steps=1, draws=1)
    for knob, value in config.items():
        if type(value) in (int, float) and not value >= least.get(knob, 0):
            raise InputError(f'--{knob}={value}: expected at least {least.get(knob, 0)}')
    if val_fraction > 1:
        raise InputError(f'--val_fraction={val_fraction:g}: expected a share, 0 to 1')
    if 0 < max_seconds < 1:
        raise InputError(f'--max_seconds={max_seconds:g}: expected 0 or at least 1')
    if fit_vocoder not in (None, False, '', True, 'table', 'neural'):
        raise InputError(f'--fit_vocoder={fit_vocoder}: expected table or neural')
    if not all(value is None or type(value) in (int, float) for value in (layer, switch)):
        raise InputError('--layer and --switch need a number')
    if not out:
        raise InputError('--out is empty: name a folder')


def find_place():
    """-> (part, of) of --shard or torchrun; the latter's ranks have a GPU each."""
    part, of = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if shard:
        numbers = re.fullmatch(r'(\d+)/(\d+)', shard)
        part, of = map(int, numbers.groups()) if numbers else (0, 0)
        if part >= of:
            raise InputError(f'--shard={shard}: expected i/n with i from 0 to n - 1')
    if torch.cuda.is_available() and device == 'auto':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    return part, of


def count_workers():
    """--workers, or one a core of this process's share."""
    has_affinity = hasattr(os, 'sched_getaffinity')
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return workers or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def settle_recipe(corpus, config):
    """What decides the parts: settings and a digest of the listing. The first to come lays it down
    in the folder, the others must have the same. Raises InputError naming what differs."""
    listing = hashlib.sha1()
    for item in corpus.items:
        path = name_below(item.path, corpus.root)
        listing.update(repr(item._replace(path=path)).encode())
    recipe = {key: config[key] for key in RECIPE} | dict(listing=listing.hexdigest())
    path = os.path.join(out, 'parts', 'recipe.json')
    if not os.path.exists(path):
        with write_atomic(path) as file:
            json.dump(recipe, file, indent=2)
    there = read_json(path)
    others = [key for key in recipe if there.get(key) != recipe[key]]
    if others:
        raise InputError(
            f'{path}: begun with another {", ".join(others)}; give the same settings and audio, '
            'another --out, or delete the folder'
        )
    return recipe


def pack_units():
    """--from_units: no audio, no encoder."""
    if os.path.exists(os.path.join(out, 'parts')):
        raise InputError(f'{out} holds units made from audio: choose another --out, or delete it')
    rows = tqdm((row for path in find_unit_files() for row in rows_of_units(path)), unit=' rows')
    meta = pack(rows, n_units + OFFSET, 50.0 if encoder == 'hubert50' else 25.0)
    if not sum(meta['utterances'].values()) + meta['pairs']:
        raise InputError(f'--from_units={from_units}: no units in it')
    vocoder = 'hifigan25' if encoder == 'mhubert25' else None
    finish(meta | dict(encoder=encoder, vocoder=vocoder, recipe=config))


def prepare_encoder(corpus, recipe, part):
    """The encoder, fitted and saved in --out if it is not one known by name. Shard 0 does it."""
    folder = os.path.join(out, 'encoder')
    custom = fit_kmeans or kmeans or layer is not None or switch is not None
    if not custom and encoder in ENCODERS:
        return load_encoder(encoder, 0, None, corpus), encoder

    made = os.path.join(folder, 'encoder.json')  # of its files the last to be written
    if part == 0 and not os.path.exists(made):
        net = load_encoder(encoder, fit_kmeans, switch, corpus)
        if fit_kmeans:
            net.config['vocoder'] = 'vocoder'
        net.config['fitted'] = recipe
        net.save_pretrained(folder)
    if not os.path.exists(made):
        print('waiting for shard 0 to make the encoder', flush=True)
    while not os.path.exists(made):
        time.sleep(1)
    net = UnitEncoder.from_pretrained(folder, None, None, device)
    if net.config.get('fitted') != recipe:
        raise InputError(
            f'{folder} was fitted with other settings or audio: choose another --out, or delete it'
        )
    return net, 'encoder'


def has_voice(folder):
    """Whether a vocoder is there: of its files this is the last to be written."""
    return os.path.exists(os.path.join(folder, 'vocoder.json'))


def prepare_vocoder(net, name, corpus):
    """The voice that goes with the units: fitted here, or that of the encoder -> its name."""
    folder = os.path.join(out, 'vocoder')
    if fit_vocoder and not has_voice(folder):
        fit_voice = fit_neural_vocoder if fit_vocoder == 'neural' else fit_table
        fit_voice(net, corpus).save_pretrained(folder)
        with suppress(FileNotFoundError):
            os.remove(os.path.join(out, 'vocoder_state.pt'))
    elif name == 'encoder' and has_voice(net.vocoder or '') and not has_voice(folder):
        UnitVocoder.from_pretrained(net.vocoder).save_pretrained(folder)  # all that units need
    if has_voice(folder):
        return 'vocoder'
    return net.vocoder if name != 'encoder' else None


def merge(parts, net, name, speed, corpus):
    """All parts are there: the voice, the token files, meta.json."""
    total = dict(files=0, audio_seconds=0.0, cut=0, failed=[])
    meta = pack(rows_of_parts(len(parts), total), net.n_units + OFFSET, net.frame_rate)
    failed = total.pop('failed')
    if failed:
        with write_atomic(os.path.join(out, 'failed.jsonl'), 'wb') as file:
            file.writelines(to_line(dict(file_name=path, reason=why)) for path, why in failed)
    if not sum(meta['utterances'].values()) + meta['pairs'] and failed:
        path = os.path.join(out, 'failed.jsonl')
        raise InputError(f'none of the {total["files"]} files could be used; see {path}')
    vocoder = prepare_vocoder(net, name, corpus)
    hours = round(total.pop('audio_seconds') / 3600, 4)
    counts = dict(
        failed=len(failed), left_out=corpus.left_out, audio_hours=hours, x_real_time=speed
    )
    return meta | dict(encoder=name, vocoder=vocoder) | total | counts


if __name__ == '__main__':
    config = configure(globals())
    check_knobs(config)
    part, of = find_place()

    # Two errands that make no units
    if report:
        judge_units()
        sys.exit()
    if from_units:
        pack_units()
        if text_lm:
            write_text_sets()
        sys.exit()

    # What there is to do
    corpus = choose_items(*find_sources())
    parts = make_parts(corpus.items)
    recipe = settle_recipe(corpus, config)
    voice_missing = fit_vocoder and not has_voice(os.path.join(out, 'vocoder'))
    if os.path.exists(os.path.join(out, 'meta.json')) and not voice_missing:
        print(f'{out}: everything is already there; nothing to do (delete it to make it again)')
        if text_lm:
            write_text_sets()
        sys.exit()

    # The encoder, then this shard's parts, read by workers ahead of the net
    try:
        net, name = prepare_encoder(corpus, recipe, part)
    except InputError:
        if not parts_there() and not os.path.exists(os.path.join(out, 'encoder', 'encoder.json')):
            # a slip binds no later run; another shard may have removed it already
            with contextlib.suppress(OSError):
                os.remove(os.path.join(out, 'parts', 'recipe.json'))
        raise
    speed = encode_parts(parts, range(part, len(parts), of), net, corpus.root)

    # Whoever finds all parts there joins them; if two do, both write the same
    missing = len(parts) - len(parts_there())
    if missing:
        print(f'{out}: shard {part} of {of} is done; {missing} of {len(parts)} parts are missing')
    else:
        meta = merge(parts, net, name, speed, corpus)
        finish(meta | dict(recipe=config | recipe))
        if text_lm:
            write_text_sets()
