"""Audio to units: fit k-means if asked, encode, pack into token files (section 3 of the paper).

    python prepare_units.py config/demo_units.py                      the demo: offline, on a CPU
    torchrun --nproc_per_node=8 prepare_units.py --audio=hub:slprl/sTinyStories:train --out=DIR
    python prepare_units.py --audio=DIR --encoder=mhubert25 --fit_kmeans=500       your own language
    python prepare_units.py --from_units=a/units.jsonl --text_lm=Qwen/Qwen2.5-0.5B --out=data/mixed

A row of manifest.jsonl is an utterance (`path`) or a preference pair (`prompt_path`, `chosen_path`,
`rejected_path`). It may have text, voice, split, `words` and `phones` ([[label, start s, end s],
...]), and `start` and `end` (or `offset` and `duration`) of the part to use. Other files in its
folder are not read. A .json file with `voice_activity` beside a sound file says where to cut it
(Libri-Light). Folders such as dev-clean or validation form the val split; test sets are left out.

Output: units.jsonl, pairs.jsonl, failed.jsonl (what is left out, and doubtful sound), train.bin and
val.bin. An utterance is <S>, de-duplicated units + 2, <S>. Each part of the work is a file in
parts/; the last process to finish merges them. A killed run continues where it stopped. The number
of workers and shards does not change the output.
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
out = 'data/units'  # folder for units.jsonl, train.bin, val.bin, meta.json, encoder, vocoder ...
from_units = ''  # instead of audio: units.jsonl, features.jsonl, tokens.jsonl; globs
n_units = 0  # for from_units without a meta.json beside the file
frame_rate = 25.0  # likewise; frames per second
# the encoder
encoder = ''  # mhubert25 (the default), hubert50, mfcc, an encoder folder, or any net with --layer
layer = None  # hidden layer whose states are clustered, of a HuBERT, wav2vec 2 or WavLM
kmeans = ''  # .safetensors with `centroids`, or a joblib dump of scikit-learn's KMeans
fit_kmeans = 0  # fit this many clusters on the audio instead
fit_frames = 300_000  # number of frames to fit on, drawn evenly from the training speech
fit_vocoder = False  # also fit a vocoder for the units, on half an hour of training speech
keep_partial = False  # use the readable beginning of truncated recordings
# text for an interleaved model: folders speech, text and interleaved in out
text_lm = ''  # folder or hub name of a text LM: use its tokenizer; utterances need word times
texts = ''  # documents for the set text: .txt, .jsonl, .parquet, hub:owner/name; '': transcripts
draws = 4  # different interleavings of each utterance: enough for this many epochs
# parallel work
val_fraction = 0.01  # if no folder or row has a val split: validate on this share, by hash of names
shard = ''  # i/n: encode parts i, i + n, ... (i from 0); torchrun sets it
workers = 0  # to read, and with mfcc to encode; 0: one per core of this process
seed = 1234
device = 'auto'
# -----------------------------------------------------------------------------

DRAWN_SECONDS, VOICE_SECONDS = 60, 1800  # to fit on: smallest limit per item; total for a vocoder
SLACK = 0.5  # seconds by which a recording may be shorter than its word times
WHOLE = (0.0, math.inf)  # start and end of a whole recording, in seconds
PAIR = ('prompt', 'chosen', 'rejected')
OTHER_NAMES = dict(speaker='voice', raw_text='text')  # field names of other data sets -> ours
# libsndfile cannot read these. They are listed as items so that they count as failed
UNREADABLE = '.m4a .mp4 .aac .wma .amr .webm .mka .ape .wv .tar .tar.gz .zip'.split()
WANTED = (*M.AUDIO_EXTENSIONS, *UNREADABLE, '.parquet', '/manifest.jsonl')
# fields that say how to read a row; meta.json's facts about units; settings that change units
READ = 'path sounds spans split start end offset duration units kind prompt chosen rejected'.split()
ORIGIN = ('encoder', 'vocoder', 'n_units', 'frame_rate', 'encoder_id')
RECIPE = ('layer', 'fit_kmeans', 'fit_frames', 'keep_partial', 'val_fraction', 'seed')


class Item(NamedTuple):
    """A sound file, a parquet file, or a row of a manifest. The row's content stays on disk."""

    path: str
    root: str  # prefix of paths that names in units.jsonl leave out
    at: int = 0  # position of a row in the manifest, for seek
    split: str = ''  # train, val or test, if the row or a folder says so


def find_paths(names):
    """The absolute paths of comma-separated names and globs; hub: names are returned unchanged."""
    found = []
    for name in filter(None, map(str.strip, names.split(','))):
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not paths and not name.startswith('hub:'):
            raise InputError(f'{name}: no such file or folder')
        found += map(os.path.abspath, paths) if paths else [name]
    return found


def find_items():
    """--audio -> the items to encode. Test sets are included, to be counted but not read."""
    paths = find_paths(audio)
    folders = [p if os.path.isdir(p) else os.path.dirname(p) for p in paths if p[:4] != 'hub:']
    root = os.path.join(os.path.commonpath(folders), '') if folders else 'hub:'
    items = list(chain.from_iterable(list_items(path, root) for path in paths))
    if not items:
        raise InputError('--audio names nothing: give files, folders, manifests or hub:NAME')
    # if a folder or row has a val split, the rest trains; else read_item splits by hash
    if any(item.split == 'val' for item in items):
        items = [item._replace(split=item.split or 'train') for item in items]
    return list(dict.fromkeys(items))


def list_items(path, root):
    """Yields the items of a file, a folder or a hub data set, in a fixed order."""
    if os.path.isdir(path):
        found = M.find_audio(path, WANTED)
        covered = tuple(f'{os.path.dirname(name)}/' for name in found if name.endswith('.jsonl'))
        for name in found:
            if not name.removesuffix('/manifest.jsonl').startswith(covered):
                yield from list_items(name, root)
    elif path.endswith('.jsonl'):
        with reading(path), M.open_text(path) as file:
            at = 0
            for number, line in enumerate(iter(file.readline, ''), 1):
                row = parse_row(line, path, number)
                yield Item(path, root, at, row['split'] or split_by_folder(row['path'], root))
                at = file.tell()
    else:
        for name in M.open_shards(path) if is_shards(path) else [path]:
            yield Item(name, root, 0, split_by_folder(name, root))


def is_shards(path):
    return path.startswith('hub:') or path.endswith('.parquet')


def parse_row(line, manifest, number='?'):
    """A line of a manifest -> a row as in rows_of. Raises InputError naming the line."""
    with reading(f'{manifest}, line {number}'):
        row, folder = json.loads(line), os.path.dirname(manifest)
        keys = [f'{part}_path' for part in PAIR] if 'prompt_path' in row else ['path']
        sounds = [os.path.normpath(os.path.join(folder, row[key])) for key in keys]
        start, end = row.get('start') or row.get('offset') or 0.0, row.get('end')
        if end is None:
            end = math.inf if row.get('duration') is None else start + row['duration']
        if not 0 <= start < end or (len(sounds) > 1 and (start, end) != WHOLE):
            raise ValueError('expected 0 <= start < end, and no start or end in a preference pair')
        row['split'] = row.get('split') and M.split_of(row['split'])
        return row | dict(path=sounds[0], sounds=sounds, spans=[(start, end)])


def split_by_folder(path, root=''):
    """'test' or 'val' if a folder below root, or the name of a parquet file, says so (dev-clean,
    TEST, test-00000-of-00001.parquet), else ''."""
    *folders, name = re.split('[/:#]', path.removeprefix(root))
    splits = {M.split_of(part, '') for part in (*folders, *[name] * is_shards(path))}
    return 'test' if 'test' in splits else 'val' if 'val' in splits else ''


def split_by_hash(name):
    """'train' or 'val', depending on the name only. val_fraction of all names are 'val'."""
    digest = hashlib.sha1(os.fsencode(name)).digest()
    return 'val' if int.from_bytes(digest[:6], 'big') < val_fraction * 2**48 else 'train'


def fingerprint(path):
    """A hash of a file, or of the files in a folder: of their sizes and of 64 KiB at the beginning,
    middle and end, so small files are hashed whole. Any other name is returned unchanged."""
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
    """A hash of the rows of some items and of the contents of their files."""
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
    """Yields a row for each utterance or preference pair of an item: its fields, path, sounds (one
    or three paths or open files), spans to be joined [(start s, end s), ...]."""
    activity = os.path.splitext(item.path)[0] + '.json'
    if item.path.endswith('.jsonl'):
        with M.open_text(item.path) as file:
            file.seek(item.at)
            yield parse_row(file.readline(), item.path)
    elif is_shards(item.path):
        for number, row in enumerate(M.read_parquet(item.path)):
            # audio is bytes in the columns of PAIR, or in one column; null has no sounds
            columns = [key for key in row if isinstance(row[key], dict) and 'bytes' in row[key]]
            keys = [key for key in (PAIR if row.keys() >= set(PAIR) else columns) if row[key]]
            sounds = [io.BytesIO(row[key]['bytes']) for key in keys if row[key]['bytes']]
            known = {OTHER_NAMES.get(key, key): row[key] for key in row if key not in columns}
            name = f'{item.path.removesuffix(".parquet")}/{number:05d}'
            yield known | dict(path=name, sounds=sounds, spans=[WHOLE])
    else:
        content = read_json(activity) if os.path.exists(activity) else {}
        found = content.get('voice_activity') if isinstance(content, dict) else []
        for spans in join_activity(found or [WHOLE]):
            yield dict(path=item.path, sounds=[item.path], spans=spans)


def join_activity(activity, longest=60):
    """Voice activity [[start, end], ...] in seconds -> lists of spans, at most `longest` seconds
    together (a longer span stays alone), as in Libri-Light's cut_by_vad.py."""
    group, seconds = [], 0.0
    for start, end in activity:
        if group and seconds + (end - start) > longest:
            yield group
            group, seconds = [], 0.0
        group.append((start, end))
        seconds += end - start
    yield group


def make_note(kind, name, reason=''):
    """A line of failed.jsonl. The summary counts the lines of each kind."""
    return dict(kind=kind, file_name=name, reason=' '.join(str(reason).split()))


def read_item(item):
    """Yields (row, waves) for each utterance or pair. waves: one or three (samples,) float32 at 16
    kHz. Yields (note, []) for an item that is left out, failed (the run goes on) or doubtful."""
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
            raise  # a failure of the hub is not a fault of the data
        yield make_note('failed', name, error), []


def read_waves(row):
    """A row of rows_of -> (row, waves, doubts). Raises InputError if sound is missing or ends
    before its words; with keep_partial the later words are dropped instead."""
    sounds, spans, notes, waves = row['sounds'], row['spans'], [], []
    known = {key: row[key] for key in row if key not in READ}
    if len(sounds) not in (1, len(PAIR)):
        raise InputError(f'{len(sounds)} sounds: expected one, or {", ".join(PAIR)}')
    may_be_cut = keep_partial and len(sounds) == 1
    for sound in sounds:
        pieces = []
        for start, end in spans:
            length = None if end == math.inf else end - start
            pieces.append(M.load_audio(sound, start, length, may_be_cut, notes))
        waves.append(torch.cat(pieces).numpy())
    if len(sounds) == len(PAIR):
        halves = {part: dict(text=row.get(f'{part}_text') or '') for part in PAIR}
        return {k: known[k] for k in known if not k.startswith(PAIR)} | halves, waves, notes

    marks = [*(row.get('words') or []), *(row.get('phones') or [])]
    if not all(isinstance(label, str) and 0 <= a <= b < 1e6 for label, a, b in marks):
        raise ValueError('expected words and phones as [[text, start s, end s], ...]')
    # compare the length of the sound with what the row promises
    short = any(note.startswith('stopped early') for note in notes)
    start, seconds = spans[0][0], len(waves[0]) / SAMPLE_RATE
    wanted = sum(end - start for start, end in spans)
    if wanted == math.inf:
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
    """Restrict a row to the used part of its recording: words and phones in the part's own time,
    and its text. short: there was less sound than expected."""
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
        row.pop('text', None)  # the spoken part of the text is unknown
    return row


# -----------------------------------------------------------------------------
# Encoding. Processes compute MFCCs; threads read audio for a net, which encodes one at a time

LOCK = threading.Lock()
net = None  # the encoder, which forked processes inherit


def in_parallel(work, tasks):
    """Yields work(task) for each task, in order, from several workers. work: a function of this
    file, or a partial of one. After Ctrl-C the workers finish their current tasks."""
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
    """The training speech in the first `share` samples of an item, as [(seconds, wave, units)] for
    a vocoder or [(seconds, None, features)] for k-means."""
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
    """Yields the results of read_speech for `seconds` of training speech, drawn evenly from all
    items in an order that depends on the seed only. Raises InputError if there is none."""
    items = [item for item in items if item.split in ('', 'train')]
    # most items exceed half a second. Of many items read only the beginnings, of few items more
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
        raise InputError('no training speech to fit on: none of the drawn files can be read')


def prepare_encoder(items, recipe, part):
    """Load `net`, and fit its clusters if asked -> its name. An encoder that is not public is saved
    in --out by shard 0; the other shards wait for it."""
    global net
    name, folder = encoder or 'mhubert25', os.path.join(out, 'encoder')
    made = os.path.join(folder, 'encoder.json')  # the last of its files to be written
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
    """The name of the units' vocoder: fitted here, found beside the encoder, or public; or None."""
    folder, beside = os.path.join(out, 'vocoder'), os.path.abspath(f'{encoder}/../vocoder')
    if fit_vocoder and not os.path.exists(os.path.join(folder, 'vocoder.json')):
        speech = draw_speech(items, VOICE_SECONDS, voice=True)
        M.UnitVocoder.fit(speech, net).save_pretrained(folder)
    if os.path.exists(os.path.join(folder, 'vocoder.json')):
        return 'vocoder'
    there = os.path.exists(f'{encoder}/encoder.json') and os.path.isdir(beside)
    return beside if there else {'mhubert25': 'hifigan25'}.get(name)


def encode_part(task):
    """Encode a part, task = (path, items), and write its rows and notes to path."""
    path, items = task
    with write_atomic(path, 'wb') as file:
        for row, waves in chain.from_iterable(map(read_item, items)):
            for wave, half in zip(waves, halves_of(row), strict=False):
                with LOCK:
                    units, durations = M.dedup(net.encode(wave))
                half |= dict(units=units.tolist(), duration=durations.tolist())
            file.write(to_line(row))


def halves_of(row):
    """The dicts that hold units: the row itself, or prompt, chosen and rejected of a pair."""
    return [row[part] for part in PAIR] if row.keys() >= set(PAIR) else [row]


def to_line(row):
    """A row as a line of JSON; names need not be UTF-8."""
    text = json.dumps(row, ensure_ascii=False, separators=(',', ':'), default=str)
    return text.encode(errors='backslashreplace') + b'\n'


def check_settings(recipe):
    """Raises InputError if the content of --out was made with other settings or other data."""
    for name, key in (('meta.json', 'recipe'), ('encoder/encoder.json', 'fitted')):
        path = os.path.join(out, name)
        before = read_json(path).get(key) or {} if os.path.exists(path) else recipe
        if other := [key for key in recipe if before.get(key) != recipe[key]]:
            raise InputError(f'{out} was made with other {", ".join(other)}: choose another --out')


# -----------------------------------------------------------------------------
# Existing units, and packing: rows -> units.jsonl, pairs.jsonl, token files


def rows_of_units(path):
    """Yields the rows of existing units: our units.jsonl and pairs.jsonl, and the public toolkits'
    features.jsonl (units, duration), tokens.jsonl (audio_repr) and tokenised pairs."""
    for number, row in read_jsonl(path):
        with reading(f'{path}, line {number}'):
            for half in halves_of(row):
                if half.get('units') is None:
                    half['units'] = [int(u) for u in re.findall(r'<Un(\d+)>', half['audio_repr'])]
                (units, runs), n = M.dedup(half['units']), len(half['units'])
                duration = half.get('duration') or [1] * n
                values = [*half['units'], *duration]
                if len(duration) != n or not all(type(x) is int and x >= 0 for x in values):
                    raise ValueError('expected `units`, integers from 0, and as many `duration`s')
                duration = [int(sum(part)) for part in np.split(duration, np.cumsum(runs)[:-1])]
                half |= dict(units=units.tolist(), duration=duration)
            name = row.setdefault('file_name', f'{os.path.basename(path)}:{number}')
            split = row.get('split') or split_by_folder(name) or split_by_hash(name)
            row['split'] = M.split_of(split)
        yield row


def describe_units(paths):
    """The fields ORIGIN of existing units, from the meta.json beside each file or else from the
    knobs. Raises InputError if they are unknown or if the files do not match."""
    origins = {}
    for path in paths:
        folder, local = os.path.dirname(path), os.path.isdir(encoder)
        if os.path.exists(os.path.join(folder, 'meta.json')):
            meta = read_json(os.path.join(folder, 'meta.json'))
            meta |= {part: os.path.join(folder, part) for part in M.PARTS if meta.get(part) == part}
        else:
            made = read_json(os.path.join(encoder, 'encoder.json')) if local else {}
            known = dict(encoder_id=encoder or None, n_units=n_units)
            known |= dict(frame_rate=50.0 if encoder == 'hubert50' else frame_rate)
            meta = known | {key: made[key] for key in known if made.get(key)}
            meta['encoder'] = os.path.abspath(encoder) if local else encoder or None
            meta['vocoder'] = {'mhubert25': 'hifigan25'}.get(encoder)
        if not meta['n_units']:
            raise InputError(f'{path}: no meta.json beside it; give --n_units and --encoder')
        origins[path] = {key: meta.get(key) for key in ORIGIN}
    for key in ('encoder_id', 'n_units', 'frame_rate'):
        M.check_encoder_ids({path: origin[key] for path, origin in origins.items()})
    return max(origins.values(), key=lambda origin: bool(origin['encoder_id']))


def write_tokens(folder, documents, meta):
    """Write train.bin and val.bin from (split, tokens). Returns meta with the number type, and the
    number of tokens and documents in each split."""
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
    """Write units.jsonl, pairs.jsonl, failed.jsonl and the token files, and last meta.json. Only
    one row is in memory at a time. Returns a summary of what was written and left out."""
    counts, seconds, examples = Counter(), Counter(train=0.0, val=0.0), {}

    def documents(files):
        for row in rows:
            name, kind = row['file_name'], 'pairs' if row.keys() >= set(PAIR) else 'units'
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
    summary += ['no validation data'] * (not meta['tokens']['val'])
    if not counts['units'] + counts['pairs']:
        raise InputError(f'{out}: no units to pack; {", ".join(summary)}')
    with write_atomic(os.path.join(out, 'meta.json')) as file:
        json.dump(meta, file, indent=2)
    return f'{out}: {", ".join(summary)}'


# -----------------------------------------------------------------------------
# Text beside the units: token sets for an interleaved model (section 4.3 of the paper)

SPAN_WORDS, SPEECH_SHARE = 10, 0.3  # mean length of a speech span; share of words that are speech


def draw_spans(n_words, rng):
    """Which words of an utterance are speech, (n_words,) bool. Spans of Poisson(SPAN_WORDS)
    words with text between them are drawn until SPEECH_SHARE is reached or no span fits. Spans may
    extend beyond both ends, so that the first word is speech as often as any other."""
    speech = np.zeros(n_words, bool)
    while speech.sum() < SPEECH_SHARE * n_words:
        length = max(1, rng.poisson(SPAN_WORDS))
        # speech words in each candidate span and its two neighbours; there must be none
        taken = np.convolve(speech, np.ones(length + 2))[1:-1]
        starts = np.flatnonzero(taken < 0.5) + 1 - length
        if not len(starts):
            break
        start = rng.choice(starts)
        speech[max(0, start) : start + length] = True
    return speech


def interleave(row, speech, encode, meta):
    """The tokens of an utterance: words are speech where `speech` (n_words,) is True, else text.
    `<speech>` or `<text>` starts each span. encode: a tokenizer's method."""
    words, tokens = row['words'], []
    frames = np.repeat(row['units'], row['duration'])
    for span in np.split(np.arange(len(words)), np.flatnonzero(np.diff(speech)) + 1):
        if speech[span[0]]:
            # frames with their centre inside the words; at least one, even for a very short word
            times = words[span[0]][1], words[span[-1]][2]
            first, last = (max(0, math.ceil(time * meta['frame_rate'] - 0.5)) for time in times)
            first = min(first, len(frames) - 1)
            units, _ = M.dedup(frames[first : max(last, first + 1)])
            tokens += [meta['vocab_size'] - 2, *(units + meta['offset']).tolist()]
        else:
            text = ' '.join(words[i][0] for i in span)
            # inside a text, a word follows a space, which changes its tokens
            tokens += [meta['vocab_size'] - 1, *encode(f' {text}' if span[0] else text).ids]
    return tokens


def documents_of(path):
    """Yields the documents of a text source. Raises InputError for rows without `text`."""
    rows = M.read_parquet(path) if is_shards(path) else (row for _, row in read_jsonl(path))
    texts = M.read_documents(path) if path.endswith('.txt') else (row['text'] for row in rows)
    with reading(path):
        for text in texts:
            yield from filter(None, map(str.strip, (text or '').split(M.MARK)))


def token_documents(kind, meta, encode):
    """Yields (split, tokens) of the set `kind`: utterances as speech; texts; or utterances with
    word times, interleaved `draws` times with different spans (once in the val split)."""
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
    """Write the sets speech, text and interleaved beside out/units.jsonl, and a copy of text_lm's
    tokenizer. The vocabulary is that of text_lm, then the units, <speech> and <text>."""
    folder = M.find_checkpoint(text_lm, tensors=False)
    tokenizer, end, digest = M.read_tokenizer(folder)
    M.copy_part(folder, os.path.join(out, 'tokenizer'), 'tokenizer')
    meta = read_json(os.path.join(out, 'meta.json'))
    offset = read_json(os.path.join(folder, 'config.json'))['vocab_size']
    if offset < tokenizer.get_vocab_size():
        raise InputError(f'{folder}: the tokenizer has more tokens than vocab_size={offset}')
    meta |= dict(vocab_size=offset + meta['n_units'] + 2, offset=offset, end=end)
    meta |= dict(text_lm=text_lm, tokenizer_sha256=digest)
    # the three sets share one copy of encoder, vocoder and tokenizer
    meta |= {part: f'../{part}' for part in M.PARTS if os.path.isdir(os.path.join(out, part))}

    encode = partial(tokenizer.encode, add_special_tokens=False)
    for kind in ('speech', 'text', 'interleaved'):
        place = os.path.join(out, kind)
        found = write_tokens(place, tqdm(token_documents(kind, meta, encode), kind), meta)
        with write_atomic(os.path.join(place, 'meta.json')) as file:
            json.dump(found, file, indent=2)
        n = found['tokens']['train']
        need = '' if n else '; rows of units.jsonl need text, and `words` with their times'
        print(f'{place}: {found["utterances"]["train"]:,} documents, {n:,} tokens{need}')


# -----------------------------------------------------------------------------


def make_from_audio():
    """Encode this process's share of the parts; the last process merges all. Returns a message."""
    of_torchrun = f'{os.environ.get("RANK", 0)}/{os.environ.get("WORLD_SIZE", 1)}'
    part, of = map(int, (shard or of_torchrun).split('/'))
    if not 0 <= part < of:
        raise InputError(f'--shard={shard}: expected 0/{of} to {of - 1}/{of}')
    if torch.cuda.is_available() and device == 'auto':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))

    # list the items, and check that existing output has the same inputs and settings
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

    # load or fit the encoder, and encode this process's missing parts
    name = prepare_encoder(items, recipe, part)
    place = os.path.join(out, 'parts', M.content_hash(recipe)[:8])  # one folder per settings
    paths = [os.path.join(place, f'{i:05d}.jsonl') for i in range(len(parts))]
    tasks = list(zip(paths, parts, strict=True))[part::of]
    todo = [task for task in tasks if not os.path.exists(task[0])]
    list(tqdm(in_parallel(encode_part, todo), 'encoding', len(todo), unit=' parts'))
    if missing := sum(not os.path.exists(path) for path in paths):
        return f'{out}: shard {part} of {of} is done, {missing} of {len(parts)} parts missing'

    # merge the parts; if two processes do so, both write the same bytes
    origin = dict(encoder=name, encoder_id=net.encoder_id, n_units=net.n_units)
    origin |= dict(frame_rate=net.frame_rate, vocoder=prepare_vocoder(items, name))
    rows = (row for path in paths for _, row in read_jsonl(path))
    return pack(rows, origin | dict(files=len(items)), recipe)


if __name__ == '__main__':
    config = configure(globals())
    if from_units:
        paths = find_paths(from_units)
        if os.path.abspath(out) in map(os.path.dirname, paths):
            raise InputError(f'{out} contains the units that are read: choose another --out')
        origin = describe_units(paths)
        recipe = dict(from_units=list(map(fingerprint, paths)), val_fraction=val_fraction) | origin
        check_settings(recipe)
        summary = pack(chain.from_iterable(map(rows_of_units, paths)), origin, recipe)
    else:
        summary = make_from_audio()
    print(summary, flush=True)
    if text_lm and os.path.exists(os.path.join(out, 'meta.json')):
        write_text_sets()
