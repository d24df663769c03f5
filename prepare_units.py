"""Audio to units: fit k-means if asked, encode, pack into token files (section 3 of the paper).

    python prepare_units.py config/demo_units.py                      the demo: offline, on a CPU
    torchrun --nproc_per_node=8 prepare_units.py --audio=hub:slprl/sTinyStories:train --out=DIR
    python prepare_units.py --audio=speech --encoder=facebook/hubert-base-ls960 --layer=9 \\
        --fit_kmeans=500 --fit_vocoder                                your own language
    python prepare_units.py --from_units=data/stinystories/units.jsonl --out=data/mixed \\
        --text_lm=Qwen/Qwen2.5-0.5B      for an interleaved model: folders speech, text, interleaved

A row of manifest.jsonl, which stands for its folder, is an utterance (`path`) or a preference pair
(`prompt_path`, `chosen_path`, `rejected_path`), with any of text, voice, split, `words` and
`phones` ([[label, start s, end s], ...]), and the part of the recording that is used: `start` and
`end`, or `offset` and `duration`. A .json file with `voice_activity` beside a sound file cuts it
(Libri-Light). Folders called dev-clean, validation and so on validate; test sets are left out.

Written are units.jsonl, pairs.jsonl, failed.jsonl (what is left out, and doubtful sound), and
train.bin and val.bin: <S>, de-duplicated units + 2, <S> for each utterance. The work is a list of
parts, files below parts/, which the last process to finish merges: a killed run continues where it
stopped, and workers and shards change no byte.
"""

from config import configure

import contextlib
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import model as M
from model import SAMPLE_RATE, InputError, UnitEncoder, read_json, read_jsonl, reading, write_atomic

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
fit_vocoder = False  # also fit a voice for the units, on half an hour of training speech
keep_partial = False  # use the readable beginning of recordings that are cut short
# text beside it, for an interleaved model: folders speech, text and interleaved in out
text_lm = ''  # with the tokenizer of this text LM, a folder or a hub name; units need word times
texts = ''  # of the set text: .txt, .jsonl, .parquet, hub:owner/name; '': that of the utterances
draws = 4  # interleavings of each utterance: in so many epochs none comes twice
# scale
val_fraction = 0.01  # where no folder or row validates: this share, chosen by a hash of the names
shard = ''  # i/n: this run encodes parts i, i + n, ... (i from 0); torchrun sets it
workers = 0  # that read, and with mfcc encode; 0: one a core of this process's share
seed = 1234
device = 'auto'
# -----------------------------------------------------------------------------

DRAWN_SECONDS, VOICE_SECONDS = 60, 1800  # of an item that is drawn to fit on; for a voice
SLACK = 0.5  # seconds that a recording may end before its words do
WHOLE = (0.0, math.inf)  # seconds of a recording
PAIR = ('prompt', 'chosen', 'rejected')
OTHER_NAMES = dict(speaker='voice', raw_text='text')  # theirs: ours
# what libsndfile does not read is found too, and fails, so that it is counted
UNREADABLE = '.m4a .mp4 .aac .wma .amr .webm .mka .ape .wv .tar .tar.gz .zip'.split()
WANTED = (*M.AUDIO_EXTENSIONS, *UNREADABLE, '.parquet', '/manifest.jsonl')
# fields of a row that say how it is read; what meta.json says of units; settings that change them
READ = ('path', 'sounds', 'spans', 'split', 'start', 'end', 'offset', 'duration', 'units')
ORIGIN = ('encoder', 'vocoder', 'n_units', 'frame_rate', 'encoder_id')
RECIPE = ('layer', 'fit_kmeans', 'fit_frames', 'keep_partial', 'val_fraction', 'seed')


class Item(NamedTuple):
    """A sound file, a parquet file, or a row of a manifest, which stays on the disk."""

    path: str
    root: str  # what paths begin with, and names in units.jsonl do not
    at: int = 0  # of a row: its first byte in the manifest
    split: str = ''  # train, val or test, where the row or a folder says so


def find_paths(names):
    """The absolute paths that comma-separated names and globs mean, and hub: names as such."""
    found = []
    for name in filter(None, map(str.strip, names.split(','))):
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not paths and not name.startswith('hub:'):
            raise InputError(f'{name}: no such file or folder')
        found += map(os.path.abspath, paths) if paths else [name]
    return found


def find_items():
    """--audio -> the items to encode, those of test sets too, which are counted and not read."""
    paths = find_paths(audio)
    local = [path for path in paths if not path.startswith('hub:')]
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in local]
    root = os.path.join(os.path.commonpath(folders), '') if folders else 'hub:'
    items = list(chain.from_iterable(list_items(path, root) for path in paths))
    if not items:
        raise InputError('--audio names nothing: give files, folders, manifests or hub:NAME')
    # where a folder or a row validates, all others train; else a hash decides when they are read
    if any(item.split == 'val' for item in items):
        items = [item._replace(split=item.split or 'train') for item in items]
    return list(dict.fromkeys(items))


def list_items(path, root):
    """Yields the items of a file, a folder or a data set of the hub, in a fixed order."""
    if os.path.isdir(path):
        found = M.find_audio(path, WANTED)
        covered = tuple(f'{os.path.dirname(name)}/' for name in found if name.endswith('.jsonl'))
        for name in found:
            if not name.removesuffix('/manifest.jsonl').startswith(covered):
                yield from list_items(name, root)
    elif path.endswith('.jsonl'):
        with reading(path), M.open_text(path, newline='') as file:
            at = file.buffer.tell()
            for number, line in enumerate(file, 1):
                row = parse_row(line, path, number)
                yield Item(path, root, at, row['split'] or split_by_folder(row['path'], root))
                at += len(line.encode(file.encoding))
    else:
        for name in M.parquet_files(path) if is_shards(path) else [path]:
            yield Item(name, root, 0, split_by_folder(name, root))


def is_shards(path):
    return path.startswith('hub:') or path.endswith('.parquet')


def parse_row(line, manifest, number='?'):
    """A line of a manifest -> a row as rows_of yields it. Raises InputError naming the line."""
    with reading(f'{manifest}, line {number}'):
        row, folder = json.loads(line), os.path.dirname(manifest)
        keys = [f'{part}_path' for part in PAIR] if 'prompt_path' in row else ['path']
        sounds = [os.path.normpath(os.path.join(folder, row[key])) for key in keys]
        start, end = row.get('start', row.get('offset')) or 0.0, row.get('end')
        if end is None:
            end = math.inf if row.get('duration') is None else start + row['duration']
        if not 0 <= start < end or (len(sounds) > 1 and (start, end) != WHOLE):
            raise ValueError('expected 0 <= start < end, and neither in a preference pair')
        M.check_marks(row)
        row['split'] = row.get('split') and M.split_of(row['split'])
        return row | dict(path=sounds[0], sounds=sounds, spans=[(start, end)])


def split_by_folder(path, root=''):
    """'test' or 'val' where a folder below root, or the name of a parquet file, says so (dev-clean,
    TEST, test-00000-of-00001.parquet), else ''."""
    *folders, name = re.split('[/:#]', path.removeprefix(root))
    splits = {M.split_of(part, '') for part in (*folders, *[name] * is_shards(path))}
    return 'test' if 'test' in splits else 'val' if 'val' in splits else ''


def split_by_hash(name):
    """'train' or 'val', by the name alone: val_fraction of all names validate."""
    digest = hashlib.sha1(os.fsencode(name)).digest()
    return 'val' if int.from_bytes(digest[:6], 'big') < val_fraction * 2**48 else 'train'


def fingerprint(path):
    """A hash of the content of a file, or of the files of a folder: of each the length and 64 KiB
    at its beginning, middle and end, which is all of a small file. Else: the name itself."""
    parts = []
    for name in sorted(glob.glob(f'{glob.escape(path)}/*')) if os.path.isdir(path) else [path]:
        if os.path.isfile(name):
            with open(name, 'rb') as file:
                size = os.fstat(file.fileno()).st_size
                for at in (0, size // 2, size - (1 << 16)):
                    file.seek(max(0, at))
                    parts += [size, file.read(1 << 16)]
    return M.content_hash(*parts)[:16] if parts else path


def hash_items(items):
    """A hash of what is known of some items, and of the contents of their files."""
    found = []
    for item in items:
        shards = [dict(path='', sounds=[item.path])]
        for row in shards if is_shards(item.path) else rows_of(item):
            files = [(path.removeprefix(item.root), fingerprint(path)) for path in row['sounds']]
            found.append(row | dict(path='', sounds=files, split=item.split))
    return M.content_hash(found)


# -----------------------------------------------------------------------------
# Reading: items -> rows and their waves


def rows_of(item):
    """Yields a row for each utterance or preference pair of an item: path, what is known of it,
    sounds (paths or open files: one, or three), spans to be joined [(start s, end s), ...]."""
    activity = os.path.splitext(item.path)[0] + '.json'
    if item.path.endswith('.jsonl'):
        with M.open_text(item.path, at=item.at) as file:
            yield parse_row(file.readline(), item.path)
    elif is_shards(item.path):
        for number, row in enumerate(M.read_parquet(item.path)):
            # audio is bytes in the columns of PAIR, or in one column; a null row has no sounds
            columns = [key for key in row if isinstance(row[key], dict) and 'bytes' in row[key]]
            keys = [key for key in (PAIR if row.keys() >= set(PAIR) else columns) if row[key]]
            sounds = [io.BytesIO(row[key]['bytes']) for key in keys if row[key]['bytes']]
            known = {OTHER_NAMES.get(key, key): row[key] for key in row if key not in columns}
            name = f'{item.path.removesuffix(".parquet")}/{number:05d}'
            yield known | dict(path=name, sounds=sounds, spans=[WHOLE])
    else:
        content = {}
        if os.path.exists(activity):
            with reading(activity), M.open_text(activity) as file:
                content = json.load(file)
        found = content['voice_activity'] if 'voice_activity' in content else []
        for spans in join_activity(found or [WHOLE]):
            yield dict(path=item.path, sounds=[item.path], spans=spans)


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


def make_note(kind, name, reason=''):
    """A line of failed.jsonl. The summary says how many there are of each kind."""
    return dict(kind=kind, file_name=name, reason=' '.join(str(reason).split()))


def read_item(item):
    """Yields (row, waves) of each utterance or pair: waves are one or three (samples,) float32 at
    16 kHz. (note, []) of what is left out, failed (which must not end the run) or doubtful."""
    expected, name = (OSError, ValueError, TypeError), item.path.removeprefix(item.root)
    try:
        for row in rows_of(item) if item.split != 'test' else [item._asdict()]:
            name = row['path'].removeprefix(item.root)
            try:
                split = M.split_of(row.get('split') or item.split or split_by_hash(name))
                row, waves, doubts = ({}, [], []) if split == 'test' else read_waves(row)
            except expected as error:
                yield make_note('failed', name, error), []
                continue
            yield dict(file_name=name, split=split) | row, waves
            yield from ((make_note('doubtful', name, doubt), []) for doubt in doubts)
    except expected as error:
        if item.path.startswith('hub:'):
            raise  # what the hub does not give is not the data's fault
        yield make_note('failed', name, error), []


def read_waves(row):
    """-> (row, waves, what is doubtful) of a row of rows_of. Raises InputError where sound is
    missing, or ends before its words do; with keep_partial the words beyond are left out."""
    sounds, spans, notes, waves = row['sounds'], row['spans'], [], []
    known = {key: row[key] for key in row if key not in READ}
    if len(sounds) not in (1, len(PAIR)):
        raise InputError(f'{len(sounds)} sounds: expected one, or {", ".join(PAIR)}')
    partial = keep_partial and len(sounds) == 1
    for sound in sounds:
        pieces = []
        for start, end in spans:
            length = None if end == math.inf else end - start
            pieces.append(M.load_audio(sound, SAMPLE_RATE, start, length, partial, notes))
        waves.append(torch.cat(pieces).numpy())
    if len(sounds) == len(PAIR):
        halves = {part: dict(text=row.get(f'{part}_text') or '') for part in PAIR}
        return {k: known[k] for k in known if not k.startswith(PAIR)} | halves, waves, notes

    # is there as much sound as there should be?
    short = any(note.startswith('stopped early') for note in notes)
    start, seconds = spans[0][0], len(waves[0]) / SAMPLE_RATE
    wanted = sum(end - start for start, end in spans)
    if wanted == math.inf:
        marks = [*(row.get('words') or []), *(row.get('phones') or [])]
        wanted = max([row.get('seconds') or 0, *(end for _, _, end in marks)]) - start
    if not short and seconds < wanted - SLACK:
        short = True
        notes.append(f'stopped early at {start + seconds:.1f} of {start + wanted:.1f} s')
        if not keep_partial:
            raise InputError(f'the recording {notes[-1]}')
    if short or spans != [WHOLE]:
        known = crop_marks(known, start, seconds, short) | dict(start=start)
    return known | dict(seconds=round(seconds, 4)), waves, notes


def crop_marks(row, start, seconds, short):
    """The row with the words, phones and text of the part of a recording that is used, in its own
    time. short: there was less sound than expected."""
    words = row.get('words')
    for key in ('words', 'phones'):
        if row.get(key):
            row[key] = [
                [label, round(max(0, first - start), 3), round(min(last - start, seconds), 3)]
                for label, first, last in row[key]
                if start <= (first + last) / 2 < start + seconds
            ]
    if words and not row['words']:
        raise InputError(f'no word lies between {start:g} and {start + seconds:g} s')
    if words and len(row['words']) < len(words):
        row['text'] = ' '.join(word for word, _, _ in row['words'])
    elif short and not words:
        row.pop('text', None)  # how much of it was spoken is not known
    return row


# -----------------------------------------------------------------------------
# Encoding. Processes compute MFCCs; threads read for a net, which takes one utterance at a time

LOCK = threading.Lock()
net = None  # the encoder, which forked processes inherit


def in_parallel(work, tasks):
    """Yields work(task) for each task, in order, computed by some workers. work: a function of this
    file, also a partial one. After Ctrl-C they finish the tasks that they have begun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    count = workers or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if net.net:
        pool = ThreadPoolExecutor(count)
    else:
        context = multiprocessing.get_context('fork')
        pool = ProcessPoolExecutor(count, context, initializer=M.start_worker)
    with pool:
        yield from pool.map(work, tasks)


def read_speech(share, voice, item):
    """The training speech among the first `share` samples of an item -> [(seconds, wave, units)]
    for a voice, [(seconds, None, features)] for k-means."""
    found = []
    for row, waves in read_item(item):
        for wave in waves if share and row.get('split') == 'train' else []:
            wave = wave[:share]
            share -= len(wave)
            with LOCK:
                made = net.encode(wave) if voice else net.features(wave).cpu()
            found.append((len(wave) / SAMPLE_RATE, wave if voice else None, made.numpy()))
        if not share:
            break
    return found


def draw_speech(items, seconds, voice=False):
    """Yields what read_speech makes of training speech, `seconds` in all, drawn evenly from all
    items in an order that depends on the seed alone. Raises InputError where there is none."""
    items = [item for item in items if item.split in ('', 'train')]
    # few are shorter than half a second. Of many the beginnings are enough; of few, more is read
    items = random.Random(seed).sample(items, min(len(items), round(2 * seconds)))
    share = round(SAMPLE_RATE * max(DRAWN_SECONDS, 2 * seconds / max(1, len(items))))
    work, drawn = in_parallel(partial(read_speech, share, voice), items), 0.0
    for found in tqdm(work, 'drawing speech to fit on', leave=False):
        for length, wave, made in found:
            yield wave, made
            drawn += length
        if drawn >= seconds:
            return
    if not drawn:
        raise InputError('no training speech to fit on: no file drawn can be read')


def prepare_encoder(items, recipe, part):
    """Load `net`, its clusters fitted if asked -> its name. One that is not public is saved in
    --out by shard 0, for which the others wait."""
    global net
    name, folder = encoder or 'mhubert25', os.path.join(out, 'encoder')
    made = os.path.join(folder, 'encoder.json')  # of its files the last to be written
    public = layer is None and not (fit_kmeans or kmeans or os.path.isdir(encoder))
    if public or (part == 0 and not os.path.exists(made)):
        net = UnitEncoder.from_pretrained(name, layer, '' if fit_kmeans else kmeans or None, device)
        if fit_kmeans:
            drawn = draw_speech(items, fit_frames / net.frame_rate)
            frames = np.concatenate([features for _, features in drawn])[:fit_frames]
            net.fit(torch.from_numpy(frames), fit_kmeans, seed)
        elif not net.n_units:
            raise InputError(f'{name} has no k-means: give --fit_kmeans=N or --kmeans=FILE')
        if public:
            return name
        net.config['fitted'] = recipe
        net.save_pretrained(folder)
    while not os.path.exists(made):
        time.sleep(1)
    check_settings(recipe)
    net = UnitEncoder.from_pretrained(folder, device=device)
    return 'encoder'


def prepare_vocoder(items, name):
    """The voice that goes with the units, fitted here or that of the encoder -> its name."""
    folder = os.path.join(out, 'vocoder')
    if fit_vocoder and not os.path.exists(os.path.join(folder, 'vocoder.json')):
        table = M.UnitTable(net.n_units, net.frame_rate)
        for wave, units in draw_speech(items, VOICE_SECONDS, voice=True):
            table.add(wave, units)
        table.finish(net.encoder_id).save_pretrained(folder)
    if os.path.exists(os.path.join(folder, 'vocoder.json')):
        return 'vocoder'
    return net.vocoder if name != 'encoder' or os.path.isdir(net.vocoder or '') else None


def encode_part(task):
    """Write the rows and notes of the items of a task (path, items), a part, to its path."""
    path, items = task
    with write_atomic(path, 'wb') as file:
        for row, waves in chain.from_iterable(map(read_item, items)):
            for wave, half in zip(waves, halves_of(row), strict=False):
                with LOCK:
                    units, durations = M.dedup(net.encode(wave))
                half |= dict(units=units.tolist(), duration=durations.tolist())
            file.write(to_line(row))


def halves_of(row):
    """The dicts that hold the units: a row itself, or the prompt, chosen and rejected of a pair."""
    return [row[part] for part in PAIR] if row.keys() >= set(PAIR) else [row]


def to_line(row):
    """A row as a line of JSON; names need not be UTF-8."""
    text = json.dumps(row, ensure_ascii=False, separators=(',', ':'), default=str)
    return text.encode(errors='backslashreplace') + b'\n'


def check_settings(recipe):
    """Raises InputError if what is in --out was made with other settings or of other data."""
    for name, key in (('meta.json', 'recipe'), ('encoder/encoder.json', 'fitted')):
        path = os.path.join(out, name)
        before = read_json(path).get(key) or {} if os.path.exists(path) else recipe
        other = [key for key in recipe if before.get(key) != recipe[key]]
        if other:
            raise InputError(f'{out} was made with other {", ".join(other)}: choose another --out')


# -----------------------------------------------------------------------------
# Units made elsewhere, and packing: rows -> units.jsonl, pairs.jsonl, token files


def rows_of_units(path):
    """Yields the rows of units made elsewhere: our units.jsonl and pairs.jsonl, and the public
    toolkits' features.jsonl (units, duration), tokens.jsonl (audio_repr) and tokenised pairs."""
    for number, row in read_jsonl(path):
        with reading(f'{path}, line {number}'):
            for half in halves_of(row):
                if half.get('units') is None:
                    half['units'] = [int(u) for u in re.findall(r'<Un(\d+)>', half['audio_repr'])]
                (units, runs), n = M.dedup(half['units']), len(half['units'])
                duration = half.get('duration') or [1] * n
                if len(duration) != n or not all(type(u) is int and u >= 0 for u in half['units']):
                    raise ValueError('expected `units`, numbers from 0, and a `duration` of each')
                # runs of equal units become one
                duration = [int(sum(part)) for part in np.split(duration, np.cumsum(runs)[:-1])]
                half |= dict(units=units.tolist(), duration=duration)
            M.check_marks(row)
            name = row.setdefault('file_name', f'{os.path.basename(path)}:{number}')
            split = row.get('split') or split_by_folder(name) or split_by_hash(name)
            row['split'] = M.split_of(split)
        yield row


def describe_units(paths):
    """What ORIGIN says of units made elsewhere: from the meta.json beside each file, else from the
    knobs. Raises InputError where that is not known, or the files do not belong together."""
    origins = {}
    for path in paths:
        folder, about = os.path.dirname(path), os.path.join(encoder, 'encoder.json')
        if os.path.exists(os.path.join(folder, 'meta.json')):
            meta = read_json(os.path.join(folder, 'meta.json'))
            meta |= {part: os.path.join(folder, part) for part in M.PARTS if meta.get(part) == part}
        else:
            name = read_json(about).get('encoder_id') if os.path.isdir(encoder) else encoder
            meta = dict(encoder=encoder or None, encoder_id=name or None, n_units=n_units)
            meta |= dict(frame_rate=frame_rate, vocoder={'mhubert25': 'hifigan25'}.get(encoder))
        if not meta['n_units']:
            raise InputError(f'{path}: no meta.json beside it; give --n_units and --encoder')
        origins[path] = {key: meta.get(key) for key in ORIGIN}
    for key in ('encoder_id', 'n_units', 'frame_rate'):
        M.check_encoder_ids({path: origin[key] for path, origin in origins.items()})
    return max(origins.values(), key=lambda origin: bool(origin['encoder_id']))


def write_tokens(folder, documents, meta):
    """Write train.bin and val.bin of (split, tokens) -> meta with their type of number, and how
    many tokens and documents each has."""
    dtype = 'uint16' if meta['vocab_size'] <= 65_536 else 'uint32'
    tokens, count = dict(train=0, val=0), dict(train=0, val=0)
    train, val = (os.path.join(folder, f'{split}.bin') for split in tokens)
    with write_atomic(train, 'wb') as train, write_atomic(val, 'wb') as val:
        for split, document in documents:
            dict(train=train, val=val)[split].write(np.array(document, dtype).tobytes())
            tokens[split] += len(document)
            count[split] += 1
    return meta | dict(dtype=dtype, tokens=tokens, utterances=count)


def pack(rows, origin, recipe):
    """Write units.jsonl, pairs.jsonl, failed.jsonl and the token files of rows, one at a time in
    memory, and last meta.json -> a line that says what there is and what was left out."""
    counts, seconds, examples = Counter(), Counter(train=0.0, val=0.0), {}

    def documents(files):
        for row in rows:
            name, kind = row['file_name'], 'pairs' if 'prompt' in row else 'units'
            highest = max(chain(*(half.get('units', []) for half in halves_of(row))), default=0)
            if highest >= origin['n_units']:
                raise InputError(f'{name} has unit {highest}: --n_units={origin["n_units"]}')
            if row.get('split') == 'test':
                row = make_note('of test sets left out', name)
            elif row.get('units') == []:
                row = make_note('without units', name)
            if 'kind' in row:
                kind = 'failed'
                examples.setdefault(row['kind'], f'{name}: {row["reason"]}')
            files[kind].write(to_line(row))
            counts[row.get('kind', kind)] += 1
            if kind == 'units':
                length = row.get('seconds') or sum(row['duration']) / origin['frame_rate']
                seconds[row['split']] += length
                yield row['split'], [M.BOS, *np.add(row['units'], M.OFFSET), M.EOS]

    meta = origin | dict(vocab_size=origin['n_units'] + M.OFFSET, offset=M.OFFSET, dedup=True)
    with contextlib.ExitStack() as stack:
        paths = {kind: os.path.join(out, f'{kind}.jsonl') for kind in ('units', 'pairs', 'failed')}
        files = {kind: stack.enter_context(write_atomic(paths[kind], 'wb')) for kind in paths}
        meta = write_tokens(out, documents(files), meta | dict(recipe=recipe))

    n_tokens, hours = sum(meta['tokens'].values()), seconds.total() / 3600
    meta['hours'] = {split: round(seconds[split] / 3600, 4) for split in seconds}
    meta['tokens_per_second'] = round((n_tokens - 2 * counts['units']) / max(seconds.total(), 1), 2)
    meta |= {kind: counts[kind] for kind in ('pairs', 'failed', 'doubtful')}
    meta['left_out'] = counts['of test sets left out']
    summary = [f'{counts["units"]:,} utterances', f'{hours:.2f} h', f'{n_tokens:,} tokens']
    summary += [f'{counts["pairs"]:,} pairs']
    summary += [f'{counts[kind]:,} {kind} ({examples[kind]} ...)' for kind in sorted(examples)]
    summary += ['nothing to validate on'] * (not meta['tokens']['val'])
    if not counts['units'] + counts['pairs']:
        raise InputError(f'{out}: no units to pack; {", ".join(summary)}')
    with write_atomic(os.path.join(out, 'meta.json')) as file:
        json.dump(meta, file, indent=2)
    return f'{out}: {", ".join(summary)}'


# -----------------------------------------------------------------------------
# Text beside the units: token sets for an interleaved model (section 4.3 of the paper)

SPAN_WORDS, SPEECH_SHARE = 10, 0.3  # mean of a span of speech; share of the words that are speech


def draw_spans(n_words, rng):
    """Which words of an utterance are speech, (n_words,) bool: spans of Poisson(SPAN_WORDS) words
    with text between them, drawn until SPEECH_SHARE of the words are speech, or one has no room.
    A span may reach over either end, so that the first word is speech as often as any other."""
    speech = np.zeros(n_words, bool)
    while speech.sum() < SPEECH_SHARE * n_words:
        length = max(1, rng.poisson(SPAN_WORDS))
        # how many words of each span and its neighbours are speech: none may be
        taken = np.convolve(speech, np.ones(length + 2))[1:-1]
        starts = np.flatnonzero(taken < 0.5) + 1 - length
        if not len(starts):
            break
        start = rng.choice(starts)
        speech[max(0, start) : start + length] = True
    return speech


def interleave(row, speech, encode, meta):
    """Tokens of an utterance whose words are speech where `speech` (n_words,) says so, else text:
    `<speech>` or `<text>` before each stretch of them. encode: of a tokenizer."""
    words, tokens = row['words'], []
    frames = np.repeat(row['units'], row['duration'])
    for span in np.split(np.arange(len(words)), np.flatnonzero(np.diff(speech)) + 1):
        if speech[span[0]]:
            # the frames whose middles lie within the words; at least one, however short a word is
            times = words[span[0]][1], words[span[-1]][2]
            first, last = (max(0, math.ceil(time * meta['frame_rate'] - 0.5)) for time in times)
            first = min(first, len(frames) - 1)
            units, _ = M.dedup(frames[first : max(last, first + 1)])
            tokens += [meta['vocab_size'] - 2, *(units + meta['offset']).tolist()]
        else:
            text = ' '.join(words[i][0] for i in span)
            # within a text a word has a space before it, and so other tokens than the first
            tokens += [meta['vocab_size'] - 1, *encode(f' {text}' if span[0] else text).ids]
    return tokens


def documents_of(path):
    """Yields the documents of a source of texts. Raises InputError for rows without `text`."""
    with reading(path):
        for row in M.read_texts(path):
            yield from M.split_documents(row['text'] or '')


def token_documents(kind, meta, encode):
    """Yields (split, tokens) of the set `kind`: the utterances as speech; texts; or the utterances
    with word times, `draws` times with other spans, but once if they validate."""
    speech, text, end = meta['vocab_size'] - 2, meta['vocab_size'] - 1, meta['end']
    if kind == 'text' and texts:
        for path in find_paths(texts):
            for number, document in enumerate(documents_of(path)):
                name = f'{os.path.basename(path)}:{number}'
                yield split_by_hash(name), [text, *encode(document).ids, end]
        return
    for draw in range(draws if kind == 'interleaved' else 1):
        for number, row in read_jsonl(os.path.join(out, 'units.jsonl')):
            if kind == 'speech':
                yield row['split'], [speech, *np.add(row['units'], meta['offset']), end]
            elif kind == 'text' and row.get('text'):
                yield row['split'], [text, *encode(row['text']).ids, end]
            elif kind == 'interleaved' and row.get('words') and (row['split'], draw) < ('val', 1):
                rng = np.random.default_rng((seed, draw, number - 1))
                spans = draw_spans(len(row['words']), rng)
                yield row['split'], [*interleave(row, spans, encode, meta), end]


def write_text_sets():
    """The sets speech, text and interleaved beside out/units.jsonl, in the vocabulary of text_lm
    and after it the units, <speech> and <text>; and a copy of its tokenizer."""
    folder = M.find_checkpoint(text_lm, tensors=False)
    tokenizer, end, digest = M.read_tokenizer(folder)
    M.copy_part(folder, os.path.join(out, 'tokenizer'), 'tokenizer')
    meta = read_json(os.path.join(out, 'meta.json'))
    offset = read_json(os.path.join(folder, 'config.json'))['vocab_size']
    if offset < tokenizer.get_vocab_size():
        raise InputError(f'{folder}: vocab_size is {offset}, fewer than the tokenizer has')
    meta |= dict(vocab_size=offset + meta['n_units'] + 2, offset=offset, end=end)
    meta |= dict(text_lm=text_lm, tokenizer_sha256=digest)
    # one copy of encoder, vocoder and tokenizer for the three
    meta |= {part: f'../{part}' for part in M.PARTS if os.path.isdir(os.path.join(out, part))}

    encode = partial(tokenizer.encode, add_special_tokens=False)
    for kind in ('speech', 'text', 'interleaved'):
        place = os.path.join(out, kind)
        found = write_tokens(place, tqdm(token_documents(kind, meta, encode), kind), meta)
        with write_atomic(os.path.join(place, 'meta.json')) as file:
            json.dump(found, file, indent=2)
        n = found['tokens']['train']
        need = '' if n else '; rows of units.jsonl need text, and `words` with their times'
        M.log(f'{place}: {found["utterances"]["train"]:,} documents, {n:,} tokens{need}')


# -----------------------------------------------------------------------------


def make_from_audio():
    """Encode this process's share of the parts; the last process merges them all. Returns a line
    that says what there is, or is still to do."""
    of_torchrun = f'{os.environ.get("RANK", 0)}/{os.environ.get("WORLD_SIZE", 1)}'
    part, of = map(int, (shard or of_torchrun).split('/'))
    if torch.cuda.is_available() and device == 'auto':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))

    # what there is to do, and whether what is there already belongs to it
    items = find_items()
    n = min(128, max(1, len(items) // 256))
    parts = [items[i : i + n] for i in range(0, len(items), n)]
    with ThreadPoolExecutor(16) as pool:
        recipe = dict(inputs=M.content_hash(list(pool.map(hash_items, parts))))
    recipe |= dict(encoder=fingerprint(encoder or 'mhubert25'), kmeans=fingerprint(kmeans))
    recipe |= {key: globals()[key] for key in RECIPE}
    check_settings(recipe)
    voice = os.path.exists(os.path.join(out, 'vocoder', 'vocoder.json'))
    if os.path.exists(os.path.join(out, 'meta.json')) and (voice or not fit_vocoder):
        return f'{out}: everything is already there; nothing to do'

    # the encoder, then this process's parts that are not there
    name = prepare_encoder(items, recipe, part)
    place = os.path.join(out, 'parts', M.content_hash(recipe)[:8])  # other settings, other parts
    paths = [os.path.join(place, f'{i:05d}.jsonl') for i in range(len(parts))]
    mine = list(zip(paths, parts, strict=True))[part::of]
    todo = [(path, items) for path, items in mine if not os.path.exists(path)]
    list(tqdm(in_parallel(encode_part, todo), 'encoding', len(todo), unit=' parts'))
    missing = sum(not os.path.exists(path) for path in paths)
    if missing:
        return f'{out}: shard {part} of {of} is done, {missing} of {len(parts)} parts missing'

    # all parts are there: merge them; if two processes do, both write the same
    origin = dict(encoder=name, encoder_id=net.encoder_id, n_units=net.n_units)
    origin |= dict(frame_rate=net.frame_rate, vocoder=prepare_vocoder(items, name))
    rows = (row for path in paths for _, row in read_jsonl(path))
    return pack(rows, origin | dict(files=len(items)), recipe)


if __name__ == '__main__':
    config = configure(globals())
    if from_units:
        paths = find_paths(from_units)
        origin = describe_units(paths)
        recipe = dict(from_units=list(map(fingerprint, paths)), val_fraction=val_fraction) | origin
        check_settings(recipe)
        summary = pack(chain.from_iterable(map(rows_of_units, paths)), origin, recipe)
    else:
        summary = make_from_audio()
    M.log(summary)
    if text_lm and os.path.exists(os.path.join(out, 'meta.json')):
        write_text_sets()
