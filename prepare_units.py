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

A row of a manifest.jsonl, which stands for its folder, is an utterance (`path`) or a preference
pair (`prompt_path`, `chosen_path`, `rejected_path`), with any of text, voice, split, `words` and
`phones` ([[label, start, end], ...]), and `start` and `end`, or `offset` and `duration`: the part
of the recording that is used. All times are seconds from the beginning of the recording. A .json
file with `voice_activity` beside a sound file cuts it (Libri-Light). Folders called dev-clean,
validation and so on validate; test sets are left out, unless a source of --audio is nothing else.

Pairs go to pairs.jsonl, all else to units.jsonl, train.bin and val.bin: <S>, de-duplicated units
+ 2, <S> for each utterance. failed.jsonl lists what could not be read, and doubtful sound. The work
is a list of parts. Part 12 is done when parts/00012.jsonl exists; the last process to finish merges
the parts. So a killed run continues where it stopped, and workers and shards change no byte.
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
audio = ''  # files, folders, manifest.jsonl, .parquet, hub:owner/name[:split], globs; with commas
out = 'data/units'  # a folder: units.jsonl, train.bin, val.bin, meta.json, encoder, vocoder ...
from_units = ''  # instead of audio: units.jsonl, features.jsonl, tokens.jsonl; globs
n_units = 0  # of these, where no meta.json lies beside the file
frame_rate = 25.0  # likewise, frames a second
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
# scale
val_fraction = 0.01  # where no folder or row validates: this share, chosen by a hash of the names
shard = ''  # i/n: this run encodes parts i, i + n, ... (i from 0); torchrun sets it
workers = 0  # processes that read, and with mfcc encode; 0: one a core of this process's share
seed = 1234
device = 'auto'
# -----------------------------------------------------------------------------

PART_FILES = 128  # at most, in a part
HASHED = 1 << 16  # bytes at the beginning, in the middle and at the end of a file
DRAWN_SECONDS, VOICE_SECONDS = 60, 1800  # of a recording that is drawn to fit on; for a voice
SLACK = 0.5  # seconds that a recording may end before its words do
WHOLE = (0.0, math.inf)  # seconds of a recording
PAIR = ('prompt', 'chosen', 'rejected')
OTHER_NAMES = dict(speaker='voice', raw_text='text')  # theirs: ours
# what libsndfile does not read is found too, and fails, so that it is counted
WANTED = (*AUDIO_EXTENSIONS, *UNREADABLE_EXTENSIONS, '.tar', '.tar.gz', '.zip', '.parquet')
# fields of a row that are not copied; what meta.json says of units; settings that make the parts
OURS = ('path', 'file_name', 'units', 'duration', 'split', 'start', 'end', 'offset', 'seconds')
ORIGIN = ('encoder', 'vocoder', 'n_units', 'frame_rate', 'encoder_id')
RECIPE = ('layer', 'fit_kmeans', 'fit_frames', 'switch', 'keep_partial', 'val_fraction', 'seed')


# -----------------------------------------------------------------------------
# Finding: --audio -> items


class Item(NamedTuple):
    """A sound file, a parquet file, or a row of a manifest."""

    path: str
    at: int = 0  # of a row: its first byte in the manifest
    split: str = ''  # train, val or test, where the row or a folder says so


def find_paths(names):
    """For each of some comma-separated names the files and folders that it means."""
    found = []
    for name in filter(None, map(str.strip, names.split(','))):
        exists = name.startswith('hub:') or os.path.exists(name)
        found.append([name] if exists else sorted(glob.glob(name, recursive=True)))
        if not found[-1]:
            raise InputError(f'{name}: no such file or folder')
    return found


def find_items():
    """--audio -> (items to encode, the folder that holds them all, a Counter of what is skipped)"""
    sources, items, skipped = find_paths(audio), [], Counter()
    local = [os.path.abspath(path) for path in chain(*sources) if not path.startswith('hub:')]
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in local]
    root = os.path.commonpath(folders or [os.getcwd()])
    for paths in sources:
        found = [item for path in paths for item in items_of(path, root)]
        kept = [item for item in found if item.split != 'test']
        # a source that is nothing but a test set is meant
        what = 'of test sets left out' if kept else 'of a test set used, as nothing else was named'
        skipped[what] += len(found) - len(kept)
        items += kept or [item._replace(split='') for item in found]
    if not items:
        raise InputError('--audio names nothing: give files, folders, manifests or hub:NAME')
    # where a folder or a row validates, all others train; else a hash decides when they are read
    if any(item.split == 'val' for item in items):
        items = [item._replace(split=item.split or 'train') for item in items]
    return list(dict.fromkeys(items)), root, skipped


def items_of(path, root):
    """Yields the items of a file, a folder or a data set of the hub, in a fixed order."""
    if os.path.isdir(path):
        found = find_audio(path, (*WANTED, 'manifest.jsonl'))
        places = tuple(f'{os.path.dirname(name)}/' for name in found if name.endswith('.jsonl'))
        for name in found:
            if not name.removesuffix('/manifest.jsonl').startswith(places):
                yield from items_of(name, root)
    elif path.endswith('.jsonl'):
        at = 0
        with open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                row, sounds, _ = parse_row(line, path, number)
                yield Item(path, at, row['split'] or split_by_folder(sounds[0], root))
                at += len(line)
    else:
        for name in parquet_files(path) if is_shards(path) else [path]:
            yield Item(name, 0, split_by_folder(name, root))


def is_shards(path):
    return path.startswith('hub:') or path.endswith('.parquet')


def parse_row(line, manifest, number='?'):
    """A row of a manifest -> (row, its sound files: one, or three of a pair, (start, end) in s of
    what is used). Raises InputError naming the line."""
    try:
        row = json.loads(line)
        keys = [f'{part}_path' for part in PAIR] if 'prompt_path' in row else ['path']
        sounds = [os.path.join(os.path.dirname(manifest), row[key]) for key in keys]
        start, end = row.get('start', row.get('offset')) or 0.0, row.get('end')
        if end is None:
            end = math.inf if row.get('duration') is None else start + row['duration']
        if not 0 <= start < end or (len(sounds) > 1 and (start, end) != WHOLE):
            raise ValueError('expected 0 <= start < end, and neither in a preference pair')
        check_marks(row, 'its times')
        return row | dict(split=row.get('split') and split_of(row['split'])), sounds, (start, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise InputError(f'{manifest}, line {number}: {reason}') from None


def name_below(path, root):
    """The name of a file in units.jsonl: relative to the folder that holds all."""
    return path.removeprefix('hub:') if path.startswith('hub:') else os.path.relpath(path, root)


def split_by_folder(path, root='.'):
    """'test' or 'val' where a folder below root, or the name of a parquet file, says so (dev-clean,
    TEST, test-00000-of-00001.parquet), else ''."""
    marks = '[/:#]' if path.startswith('hub:') else '/'
    *folders, name = re.split(marks, name_below(path, root))
    splits = {split_of(part, '') for part in (*folders, *[name] * is_shards(path))}
    return 'test' if 'test' in splits else 'val' if 'val' in splits else ''


def split_by_hash(name):
    """'train' or 'val', by the name alone: val_fraction of all names validate."""
    digest = hashlib.sha1(os.fsencode(name)).digest()
    return 'val' if int.from_bytes(digest[:6], 'big') < val_fraction * 2**48 else 'train'


def fingerprint(path):
    """A hash of a file's content: of its length and of 64 KiB at its beginning, middle and end,
    which is all of a small file. Of a folder: of its files. Else: the name itself."""
    if os.path.isdir(path):
        files = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
        return [[os.path.basename(name), fingerprint(name)] for name in files]
    if not os.path.isfile(path):
        return path
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for at in (0, (size - HASHED) // 2, size - HASHED):
            file.seek(max(0, at))
            digest.update(file.read(HASHED))
    return digest.hexdigest()[:16]


def hash_part(items, root):
    """A hash of the names and contents of some items."""
    found = []
    for item in items:
        row, sounds, _ = read_row(item) if item.path.endswith('.jsonl') else ({}, [item.path], 0)
        for sound in sounds:
            files = [path for path in (sound, beside(sound)) if os.path.exists(path)]
            row[name_below(sound, root)] = list(map(fingerprint, files))
        found.append([row, item.split])
    return content_hash(found)


# -----------------------------------------------------------------------------
# Reading: items -> utterances and their waves


def read_row(item):
    """parse_row of an item, which is read again: rows of millions do not stay in memory."""
    with open(item.path, 'rb') as file:
        file.seek(item.at)
        return parse_row(file.readline(), item.path)


def beside(path):
    """The file that may cut a recording: a/b.json of a/b.flac."""
    return os.path.splitext(path)[0] + '.json'


def utterances_of(item):
    """Yields (name, what is known, sounds, spans) of each utterance or preference pair of an item.
    sounds: paths or open files, one or three. spans: [(start s, end s), ...] to be joined."""
    if item.path.endswith('.jsonl'):
        row, sounds, span = read_row(item)
        yield sounds[0], row | dict(split=item.split), sounds, [span]
    elif is_shards(item.path):
        yield from utterances_of_shard(item.path)
    else:
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


def utterances_of_shard(path):
    """The same of a parquet file: audio in columns prompt, chosen and rejected, or in one column. A
    null row has no sounds."""
    for number, row in enumerate(read_parquet(path)):
        found = {key: row[key] for key in row if isinstance(row[key], dict) and 'bytes' in row[key]}
        name, sounds = f'{path.removesuffix(".parquet")}/{number:05d}', []
        for key in PAIR if row.keys() >= set(PAIR) else found:
            content, file = (found.get(key, {}).get(field) for field in ('bytes', 'path'))
            if content:
                sounds.append(io.BytesIO(content))
                sounds[-1].name = f'{name}, {key}'  # for errors
            elif file:
                sounds.append(os.path.join(os.path.dirname(path), file))
        known = {OTHER_NAMES.get(key, key): row[key] for key in row if key not in found}
        own_names = [os.path.basename(sound.get('path') or '') for sound in found.values()]
        yield '-'.join(filter(None, [name, *own_names[:1]])), known, sounds, [WHOLE]


def read_item(item, root, longest=None):
    """Yields (row, waves, notes) for each utterance or preference pair of an item. row is None for
    one that is left out or cannot be read: one file of millions must not end the run.

    row: as in units.jsonl, without units. waves: one or three (samples,) float32 arrays at 16 kHz,
    of at most `longest` seconds a span. notes: [(failed, doubtful or test, name, reason), ...].
    """
    utterances = utterances_of(item)
    while True:
        name = None
        try:
            path, known, sounds, spans = next(utterances)
            name = name_below(path, root)
            split = split_of(known.get('split') or item.split or split_by_hash(name))
            if split == 'test':
                yield None, [], [('test', name, '')]
                continue
            row, waves, notes = load(known, sounds, spans, longest)
            row = dict(file_name=name) | row | dict(split=split)
            yield row, waves, [('doubtful', name, note) for note in notes]
        except StopIteration:
            return
        except (OSError, ValueError, TypeError) as error:
            if name is None and item.path.startswith('hub:'):
                raise  # what the hub does not give is not the data's fault
            reason = ' '.join(str(error).split()) or repr(error)
            yield None, [], [('failed', name or name_below(item.path, root), reason)]


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
            length = min(end - start, longest or math.inf)
            length = None if length == math.inf else length
            parts.append(load_audio(sound, SAMPLE_RATE, start, length, keep_partial, notes))
        waves.append(torch.cat(parts).numpy())
    short = any(note.startswith('stopped early') for note in notes)
    row = {key: known[key] for key in known if key not in OURS}
    if len(sounds) == len(PAIR):
        row = {key: row[key] for key in row if not key.startswith(PAIR)}
        texts = {part: '' if short else known.get(f'{part}_text') or '' for part in PAIR}
        return row | {part: dict(text=text) for part, text in texts.items()}, waves, notes

    # is there as much sound as there should be?
    start, length = spans[0][0], len(waves[0]) / SAMPLE_RATE
    words, phones = row.get('words') or [], row.get('phones') or []
    wanted = sum(last - first for first, last in spans)
    if wanted == math.inf:
        wanted = max([known.get('seconds') or 0, *(mark[2] for mark in words + phones)]) - start
    if not (short or longest) and length < wanted - SLACK:
        short = True
        notes.append(f'stopped early at {start + length:.1f} of {start + wanted:.1f} s')
        if not keep_partial:
            raise InputError(f'the recording {notes[-1]}')
    row['seconds'] = round(length, 4)
    if not short and spans == [WHOLE]:
        return row, waves, notes

    # words and phones of what is used, in its own time
    for key in ('words', 'phones'):
        if row.get(key):
            row[key] = [
                [label, round(max(0, first - start), 3), round(min(last - start, length), 3)]
                for label, first, last in row[key]
                if start <= (first + last) / 2 < start + length
            ]
    if words and not row['words']:
        raise InputError(f'no word lies between {start:g} and {start + length:g} s')
    if words and len(row['words']) < len(words):
        row['text'] = ' '.join(word for word, _, _ in row['words'])
    elif short and not words:
        row.pop('text', None)  # how much of it was spoken is not known
    return row | dict(start=start), waves, notes


class Jobs(IterableDataset):
    """Worker i of n does jobs i, i + n, ...: (key, what) gives (key, result) of work(what)."""

    def __init__(self, jobs, work):
        self.jobs, self.work = jobs, work

    def __iter__(self):
        worker = get_worker_info()
        for key, what in self.jobs[worker.id :: worker.num_workers]:
            try:
                yield from ((key, result) for result in self.work(what))
            except InputError as error:  # which a loader would wrap in a traceback
                yield key, error


def work_ahead(jobs, work, in_order=False):
    """Yields (key, result) of `work(what)` for each job (key, what), made by worker processes.
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
    for key, result in loader:
        if isinstance(result, InputError):
            raise result
        yield key, result


# -----------------------------------------------------------------------------
# What is fitted: k-means and a voice, on speech drawn evenly


def draw_speech(corpus, seconds):
    """Yields waves (samples,) of training speech, `seconds` in all, drawn evenly from all items in
    an order that depends on the seed alone. Raises InputError where there is none."""
    items, root, _ = corpus
    items = [item for item in items if item.split != 'val'] or items
    items = random.Random(seed).sample(items, min(len(items), 100_000))
    per_item = min(64, math.ceil(seconds / 5 / len(items)))  # few are shorter than 5 s

    def read(item):
        found = islice(read_item(item, root, DRAWN_SECONDS), per_item)
        found = [(row, waves) for row, waves, _ in found if row]
        # speech that validates is drawn where there is no other
        yield [w for row, waves in found if row['split'] in ('train', item.split) for w in waves]

    drawn, jobs = 0.0, [(None, item) for item in items]
    with tqdm(total=seconds, desc='speech to fit on', unit=' s', leave=False) as bar:
        for wave in chain.from_iterable(waves for _, waves in work_ahead(jobs, read, True)):
            yield torch.from_numpy(wave)
            drawn += len(wave) / SAMPLE_RATE
            bar.update(len(wave) / SAMPLE_RATE)
            if drawn >= seconds:
                return
    if not drawn:
        raise InputError('no training speech to fit on: no file drawn can be read')


def draw_frames(net, corpus, n_frames):
    """(n_frames, D) float32 features of training speech, fewer if there is less, on the CPU."""
    waves = draw_speech(corpus, n_frames / net.frame_rate)
    return torch.cat([net.features(wave).cpu() for wave in waves])[:n_frames]


def cluster(frames, k):
    """k-means of (frames, D): centroids (k, D), and the mean squared distance to the nearest. The
    same for any number of threads. Raises InputError for too few frames, or nothing but silence."""
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
        centroids, distortion = cluster(draw_frames(net, corpus, fit_frames), fit_kmeans)
        net.centroids = centroids.to(net.device)
        net.config |= dict(distortion=distortion, vocoder='vocoder')
    elif not net.n_units:
        raise InputError(f'{name} has no k-means: give --fit_kmeans=N or --kmeans=FILE')
    elif net.config.get('switch') and not net.config.get('distortion'):
        net.config['distortion'] = net.distance(draw_frames(net, corpus, 30_000).to(net.device))
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
    if not os.path.exists(made):
        log('waiting for shard 0 to make the encoder')
    while not os.path.exists(made):
        time.sleep(1)
    net = UnitEncoder.from_pretrained(folder, device=device)
    if net.config.get('fitted') != recipe:
        raise InputError(f'{folder} is of other settings or audio: choose another --out')
    return net, 'encoder'


def prepare_vocoder(corpus, net, name):
    """The voice that goes with the units, fitted here or that of the encoder -> its name."""
    folder = os.path.join(out, 'vocoder')
    if fit_vocoder and not os.path.exists(os.path.join(folder, 'vocoder.json')):
        table = UnitTable(net.n_units, net.frame_rate)
        for wave in draw_speech(corpus, VOICE_SECONDS):
            table.add(wave, net.encode(wave))
        table.finish(net.encoder_id).save_pretrained(folder)
    if os.path.exists(os.path.join(folder, 'vocoder.json')):
        return 'vocoder'
    return net.vocoder if name != 'encoder' or os.path.isdir(net.vocoder or '') else None


# -----------------------------------------------------------------------------
# Encoding: parts -> parts/00012.jsonl


def to_line(row):
    """A row as a line of JSON; names need not be UTF-8."""
    text = json.dumps(row, ensure_ascii=False, separators=(',', ':'), default=str)
    return text.encode(errors='backslashreplace') + b'\n'


def encode(net, row, waves):
    """The line of a row, with the units of its waves."""
    for wave, where in zip(waves, map(row.get, PAIR) if len(waves) > 1 else [row], strict=True):
        units, durations = dedup(net.encode(torch.from_numpy(wave)))
        where |= dict(units=units.tolist(), duration=durations.tolist())
    return to_line(row)


def part_path(number):
    return os.path.join(out, 'parts', f'{number:05d}.jsonl')


def encode_parts(parts, mine, net, root, recipe_id):
    """Encode those of the parts `mine` that are not there. A part is its rows and a last line that
    sums them up. -> how many times faster than speech."""
    cheap = net.config['kind'] == 'mfcc'  # features in the workers; a net runs here

    def work(items):
        for row, waves, notes in chain.from_iterable(read_item(item, root) for item in items):
            line = encode(net, row, waves) if row and cheap else b''
            yield row, [] if cheap else waves, notes, line, sum(map(len, waves)) / SAMPLE_RATE
        yield None  # the part is complete

    todo = [(number, parts[number]) for number in mine if not os.path.exists(part_path(number))]
    begun, started, total = {number: ([], [], []) for number, _ in todo}, time.time(), 0.0
    with tqdm(total=sum(len(items) for _, items in todo), unit=' files') as bar:
        for number, found in work_ahead(todo, work) if todo else ():
            lines, notes, lengths = begun[number]
            if found:
                row, waves, doubts, line, seconds = found
                lines += [line or encode(net, row, waves)] if row else []
                notes += doubts
                lengths.append(seconds)
                continue
            summary = dict(part=number, recipe=recipe_id, files=len(parts[number]), notes=notes)
            with write_atomic(part_path(number), 'wb') as file:
                file.writelines([*lines, to_line(summary | dict(audio_seconds=sum(lengths)))])
            total += sum(lengths)
            del begun[number]
            bar.update(len(parts[number]))
    return round(total / (time.time() - started))


def rows_of_parts(n_parts, recipe_id, total):
    """Yields the rows of all parts, in order; adds up their last lines in the dict `total`."""
    for path in map(part_path, range(n_parts)):
        for _, row in read_jsonl(path):
            if 'file_name' in row:
                yield row
            elif row['recipe'] != recipe_id:
                raise InputError(f'{path} is of other settings: choose another --out')
            else:
                total |= {key: total[key] + row[key] for key in total}


# -----------------------------------------------------------------------------
# Packing: rows -> units.jsonl, pairs.jsonl, token files


def rows_of_units(path):
    """Yields the rows of units made elsewhere: our units.jsonl and pairs.jsonl, and the public
    toolkits' features.jsonl (units, duration), tokens.jsonl (audio_repr) and tokenised pairs."""
    for number, row in read_jsonl(path):
        try:
            for part in [row[part] for part in PAIR] if row.keys() >= set(PAIR) else [row]:
                part |= collapse(part)
            check_marks(row, 'its times')
            name = row.setdefault('file_name', f'{os.path.basename(path)}:{number}')
            split = row.get('split') or split_by_folder(name) or split_by_hash(name)
            yield row | dict(split=split_of(split))
        except (ValueError, KeyError, TypeError) as error:
            reason = f'no {error}' if isinstance(error, KeyError) else error
            raise InputError(f'{path}, line {number}: {reason}') from None


def collapse(row):
    """dict(units=..., duration=...) of a row in either format; runs of equal units are joined."""
    units = row.get('units')
    if units is None:
        units = [int(unit) for unit in re.findall(r'<Un(\d+)>', row['audio_repr'])]
    duration = row.get('duration') or [1] * len(units)
    if not all(type(unit) is int and unit >= 0 for unit in units) or len(duration) != len(units):
        raise ValueError(
            'expected `units`, numbers from 0, and as many `duration`, or `audio_repr`'
        )
    units, runs = dedup(units)
    duration = [int(sum(part)) for part in np.split(duration, np.cumsum(runs)[:-1])]
    return dict(units=units.tolist(), duration=duration)


def describe_units(paths):
    """What ORIGIN says of units made elsewhere: from the meta.json beside each file, else from the
    knobs. Raises InputError where that is not known, or the files do not belong together."""
    origins = {}
    for path in paths:
        folder = os.path.dirname(os.path.abspath(path))
        meta = dict(encoder=encoder or None, encoder_id=encoder or None, n_units=n_units)
        meta |= dict(frame_rate=frame_rate, vocoder={'mhubert25': 'hifigan25'}.get(encoder))
        if os.path.exists(os.path.join(folder, 'meta.json')):
            meta = read_json(os.path.join(folder, 'meta.json'))
            meta |= {part: os.path.join(folder, part) for part in PARTS if meta.get(part) == part}
        elif os.path.isdir(encoder):
            meta['encoder_id'] = read_json(os.path.join(encoder, 'encoder.json')).get('encoder_id')
        if not meta['n_units']:
            raise InputError(
                f'{path}, no meta.json beside it: give --n_units, --frame_rate, --encoder'
            )
        origins[path] = {key: meta.get(key) for key in ORIGIN}
    check_encoder_ids({path: origin['encoder_id'] for path, origin in origins.items()})
    if len({(origin['n_units'], origin['frame_rate']) for origin in origins.values()}) > 1:
        raise InputError(f'these units differ in n_units or frame_rate: {", ".join(origins)}')
    return max(origins.values(), key=lambda origin: bool(origin['encoder_id']))


def write_tokens(folder, documents, dtype):
    """Write train.bin and val.bin of (split, tokens) -> how many tokens and documents each has."""
    tokens, count = dict(train=0, val=0), dict(train=0, val=0)
    with ExitStack() as stack:
        names = {split: os.path.join(folder, f'{split}.bin') for split in tokens}
        files = {split: stack.enter_context(write_atomic(names[split], 'wb')) for split in names}
        for split, document in documents:
            files[split].write(np.array(document, dtype).tobytes())
            tokens[split] += len(document)
            count[split] += 1
    return dict(tokens=tokens, utterances=count)


def pack(rows, origin, skipped):
    """Write units.jsonl, pairs.jsonl, train.bin and val.bin of rows, one at a time in memory ->
    meta.json. Raises InputError naming a row whose unit is out of the vocabulary."""
    size, usage = origin['n_units'] + OFFSET, np.zeros(origin['n_units'], dtype=np.int64)
    meta = origin | dict(vocab_size=size, offset=OFFSET, dedup=True, pairs=0)
    meta |= dict(dtype='uint16' if size <= 65_536 else 'uint32', hours=dict(train=0.0, val=0.0))

    def documents(stack):
        files = {}
        for row in rows:
            if row['split'] == 'test':
                skipped['of test sets left out'] += 1
                continue
            parts = [row[part] for part in PAIR] if 'prompt' in row else [row]
            highest = max(chain.from_iterable(part['units'] for part in parts), default=0)
            if highest >= len(usage):
                raise InputError(f'{row["file_name"]} has unit {highest}: --n_units={len(usage)}')
            name = 'pairs.jsonl' if 'prompt' in row else 'units.jsonl'
            if name not in files:
                path = os.path.join(out, name)
                files[name] = stack.enter_context(write_atomic(path, 'wb'))
            files[name].write(to_line(row))
            if 'prompt' in row:
                meta['pairs'] += 1
            elif not row['units']:
                skipped['without units'] += 1
            else:
                units = np.array(row['units'], dtype=np.int64)
                usage[:] += np.bincount(units, minlength=len(usage))
                seconds = row.get('seconds') or sum(row['duration']) / origin['frame_rate']
                meta['hours'][row['split']] += seconds / 3600
                yield row['split'], np.concatenate(([BOS], units + OFFSET, [EOS]))

    with ExitStack() as stack:
        meta |= write_tokens(out, documents(stack), meta['dtype'])
    shares, seconds = usage[usage > 0] / max(1, usage.sum()), 3600 * sum(meta['hours'].values())
    perplexity = round(float(np.exp(-(shares * np.log(shares)).sum())), 1)
    meta['hours'] = {split: round(hours, 4) for split, hours in meta['hours'].items()}
    meta['tokens_per_second'] = round(int(usage.sum()) / max(seconds, 1e-9), 2)
    return meta | dict(unit_usage=dict(used=len(shares), perplexity=perplexity))


def finish(meta, skipped, recipe):
    """Write meta.json, which says that all is done, and print what is in it and what is not."""
    notes = [f'{meta["pairs"]:,} pairs', *(f'{n:,} {what}' for what, n in skipped.items() if n)]
    notes += ['nothing to validate on'] * (not meta['tokens']['val'])
    if not sum(meta['utterances'].values()) + meta['pairs']:
        raise InputError(f'{out}: no units to pack; {", ".join(notes)}')
    meta |= dict(left_out=skipped['of test sets left out'], recipe=recipe)
    with write_atomic(os.path.join(out, 'meta.json')) as file:
        json.dump(meta, file, indent=2)
    n = {key: sum(meta[key].values()) for key in ('utterances', 'hours', 'tokens')}
    usage = meta['unit_usage']
    log(
        f'{out}: {n["utterances"]:,} utterances, {n["hours"]:.2f} h, {n["tokens"]:,} tokens '
        f'({meta["tokens_per_second"]} units a second), {usage["used"]} of {meta["n_units"]} units '
        f'used, perplexity {usage["perplexity"]}, {", ".join(notes)}'
    )


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
    """De-duplicated units (n,) of the frames whose middles lie from start to end, in seconds."""
    first, last = (max(0, math.ceil(time * frame_rate - 0.5)) for time in (start, end))
    return dedup(np.repeat(row['units'], row['duration'])[first:last])[0].numpy()


def interleave(row, speech, encode, meta):
    """Tokens of an utterance whose words are speech where `speech` (n_words,) says so, else text:
    `<speech>` or `<text>` before each stretch of them. encode: text -> ids."""
    words, tokens = row['words'], []
    for span in np.split(np.arange(len(words)), np.flatnonzero(np.diff(speech)) + 1):
        if speech[span[0]]:
            units = units_between(row, words[span[0]][1], words[span[-1]][2], meta['frame_rate'])
            tokens += [meta['vocab_size'] - 2, *(units + meta['offset']).tolist()]
        else:
            text = ' '.join(words[i][0] for i in span)
            # within a text a word has a space before it, and so other tokens than the first
            tokens += [meta['vocab_size'] - 1, *encode(f' {text}' if span[0] else text)]
    return tokens


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
    """Yields rows with `split` and `text` of what --texts names. Raises InputError."""
    for path in chain(*find_paths(texts)):
        if path.endswith('.jsonl'):
            rows = (row for _, row in read_jsonl(path))
        elif is_shards(path) or os.path.isdir(path):
            rows = read_parquet(path)
        else:
            rows = (dict(text=document) for document in documents_of(path))
        for number, row in enumerate(rows):
            if not isinstance(row.get('text'), str):
                raise InputError(f'--texts={path}, row {number}: no text in a column `text`')
            yield dict(split=split_by_hash(f'{path}:{number}'), text=row['text'])


def token_documents(kind, meta, encode):
    """Yields (split, tokens) of the set `kind`: the utterances as speech; texts; or the utterances
    with word times, `draws` times with other spans, but once if they validate."""
    speech, text, end = meta['vocab_size'] - 2, meta['vocab_size'] - 1, meta['end']
    for draw in range(draws if kind == 'interleaved' else 1):
        utterances = enumerate(row for _, row in read_jsonl(os.path.join(out, 'units.jsonl')))
        for number, row in enumerate(read_texts()) if texts and kind == 'text' else utterances:
            if kind == 'speech' and row['units']:
                yield row['split'], [speech, *np.add(row['units'], meta['offset']), end]
            elif kind == 'text' and row.get('text'):
                yield row['split'], [text, *encode(row['text']), end]
            elif kind == 'interleaved' and row.get('words') and (row['split'], draw) < ('val', 1):
                spans = draw_spans(len(row['words']), np.random.default_rng((seed, draw, number)))
                yield row['split'], [*interleave(row, spans, encode, meta), end]


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
    size = offset + meta['n_units'] + 2
    meta |= dict(vocab_size=size, offset=offset, end=end, text_lm=text_lm, tokenizer_sha256=digest)
    meta |= dict(dtype='uint16' if size <= 65_536 else 'uint32')
    # one copy of encoder, vocoder and tokenizer for the three
    meta |= {part: f'../{part}' for part in PARTS if os.path.isdir(os.path.join(out, part))}

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    for kind in ('speech', 'text', 'interleaved'):
        documents = tqdm(token_documents(kind, meta, encode), kind, unit=' documents')
        found = meta | write_tokens(os.path.join(out, kind), documents, meta['dtype'])
        with write_atomic(os.path.join(out, kind, 'meta.json')) as file:
            json.dump(found, file, indent=2)
        n = found['tokens']['train']
        need = '' if n else '; rows of units.jsonl need text, and `words` with their times'
        log(f'{out}/{kind}: {found["utterances"]["train"]:,} documents, {n:,} tokens{need}')


# -----------------------------------------------------------------------------


def settle(recipe):
    """Settings and inputs lie beside the parts: others are refused. A run that made nothing yet
    binds no later one."""
    path = os.path.join(out, 'parts', 'recipe.json')
    names = ('meta.json', 'encoder/encoder.json', 'parts/[0-9]*.jsonl')
    if any(glob.glob(os.path.join(glob.escape(out), name)) for name in names):
        before = read_json(path) if os.path.exists(path) else {}
        other = [key for key in recipe if before.get(key) != recipe[key]]
        if other:
            raise InputError(f'{out} was made with other {", ".join(other)}: choose another --out')
    with write_atomic(path) as file:
        json.dump(recipe, file, indent=2)


def make_from_units():
    """--from_units: no audio, no encoder."""
    paths, skipped = list(chain(*find_paths(from_units))), Counter()
    origin = describe_units(paths)
    recipe = dict(from_units=list(map(fingerprint, paths)), val_fraction=val_fraction)
    settle(recipe | origin)
    rows = chain.from_iterable(map(rows_of_units, paths))
    finish(pack(rows, origin, skipped), skipped, recipe)


def make_from_audio():
    """--audio: encode this process's share of the parts; the last process merges them all."""
    part, of = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if shard:
        part, of = map(int, shard.split('/'))
    if torch.cuda.is_available() and device == 'auto':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))

    # what there is to do, and whether what is there already belongs to it
    corpus = items, root, skipped = find_items()
    large = any(is_shards(item.path) for item in items)
    n = 1 if large else max(1, min(PART_FILES, len(items) // 32))
    parts = [items[i : i + n] for i in range(0, len(items), n)]
    with ThreadPoolExecutor(16) as pool:
        inputs = content_hash(list(pool.map(hash_part, parts, [root] * len(parts))))
    recipe = {key: globals()[key] for key in RECIPE} | dict(inputs=inputs)
    recipe |= dict(encoder=fingerprint(encoder or 'mhubert25'), kmeans=fingerprint(kmeans))
    settle(recipe)
    voice = os.path.exists(os.path.join(out, 'vocoder', 'vocoder.json'))
    if os.path.exists(os.path.join(out, 'meta.json')) and (voice or not fit_vocoder):
        return log(f'{out}: everything is already there; nothing to do')

    # the encoder, then this process's parts
    net, name = prepare_encoder(corpus, recipe, part)
    recipe_id = content_hash(recipe)[:12]
    speed = encode_parts(parts, range(part, len(parts), of), net, root, recipe_id)
    missing = sum(not os.path.exists(part_path(number)) for number in range(len(parts)))
    if missing:
        return log(f'{out}: shard {part} of {of} is done, {missing} of {len(parts)} parts missing')

    # all parts are there: merge them; if two processes do, both write the same
    total = dict(files=0, audio_seconds=0.0, notes=[])
    origin = dict(encoder=name, vocoder=None, n_units=net.n_units, frame_rate=net.frame_rate)
    rows = rows_of_parts(len(parts), recipe_id, total)
    meta = pack(rows, origin | dict(encoder_id=net.encoder_id), skipped)
    notes = [note for note in total['notes'] if note[0] != 'test']
    skipped['of test sets left out'] += len(total['notes']) - len(notes)
    with write_atomic(os.path.join(out, 'failed.jsonl'), 'wb') as file:
        for kind, path, reason in notes:
            file.write(to_line(dict(kind=kind, file_name=path, reason=reason)))
    for kind in ('failed', 'doubtful'):
        found = [f'{path}: {reason}' for what, path, reason in notes if what == kind]
        meta[kind] = skipped[f'{kind} ({"".join(found[:1])} ...; see failed.jsonl)'] = len(found)
    meta |= dict(files=total['files'], x_real_time=speed)
    meta['audio_hours'] = round(total['audio_seconds'] / 3600, 4)
    meta['vocoder'] = prepare_vocoder(corpus, net, name)
    finish(meta, skipped, recipe)


if __name__ == '__main__':
    config = configure(globals())
    if from_units:
        make_from_units()
    else:
        make_from_audio()
    if text_lm and os.path.exists(os.path.join(out, 'meta.json')):
        write_text_sets()
