"""Any audio -> units: fit k-means if asked, encode, pack into token files.

    python prepare_units.py config/demo_units.py                                                  the demo, offline, on a CPU
    python prepare_units.py --audio=LibriSpeech --encoder=mhubert25 --val_folders=dev-clean,dev-other --out=data/librispeech
    torchrun --nproc_per_node=8 prepare_units.py --audio=librilight ...                           a GPU a shard; the first merges them all
    python prepare_units.py --audio=librilight ... --shard=3/64     one of 64 jobs; after the last: the same with --only_pack in place of --shard
    python prepare_units.py --audio=speech --encoder=facebook/hubert-base-ls960 --layer=9 --fit_kmeans=500 --fit_vocoder    your own language
    python prepare_units.py --from_units=features.jsonl --out=data/theirs                         units of the public toolkit, no audio

--audio takes, comma-separated: folders (searched), files, globs, manifest.jsonl (a folder that has one is read by it), lists of paths (.txt) and
.tar shards. Preference manifests (prompt_path, chosen_path, rejected_path) give pairs.jsonl, all else units.jsonl, train.bin and val.bin:
per utterance <S>, its de-duplicated units + 2, <S>. Work goes by chunks of files in a fixed order, each written when all before it are, so the
files do not depend on the number of workers or shards, and a killed run goes on after the last whole chunk. Bad files go to failed.jsonl.
"""

from config import configure

import fcntl
import glob
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import (
    BOS,
    ENCODERS,
    EOS,
    OFFSET,
    SAMPLE_RATE,
    InputError,
    UnitEncoder,
    UnitTable,
    dedup,
    load_audio,
)

# -----------------------------------------------------------------------------
audio = ''  # folders, files, globs, manifest.jsonl, lists (.txt), .tar; comma-separated
out = 'data/units'  # units.jsonl, pairs.jsonl, train.bin, val.bin, meta.json, failed.jsonl; of fitted ones also encoder/, vocoder/
from_units = ''  # or units made elsewhere: features.jsonl, tokens.jsonl of the public toolkit, our units.jsonl; comma-separated
n_units = 500  # that those were made with
# the encoder
encoder = 'mhubert25'  # mhubert25, hubert50, mfcc (offline), a folder with encoder.json, or any HuBERT, wav2vec 2, WavLM with:
layer = None  # whose hidden states are taken
kmeans = ''  # .safetensors with `centroids`, or a joblib dump of scikit-learn's KMeans
fit_kmeans = 0  # fit this many clusters on the speech itself instead
fit_frames = 300_000  # on so many frames of training speech, drawn evenly
switch = 1.0  # mfcc: the price of a change of unit, in mean distortions; 0: the nearest cluster of each frame
fit_vocoder = False  # also fit the table vocoder, a voice for any encoder
vocoder_hours = 0.5  # on so much speech, drawn evenly
# how it is cut and split
max_seconds = 30.0  # longer utterances are cut at the quietest point of the last third
val_folders = (
    ''  # files below these folders validate; if empty, and where a manifest has no `split`:
)
val_fraction = 0.01  # this share of the files, chosen by a hash of their names
max_failed = 1000  # stop when more files than this cannot be used
# scale
shard = ''  # i/n: this run encodes part i (from 0) of n; torchrun sets it
only_pack = False  # merge the shards into token files
workers = 0  # processes that read, and with mfcc encode; 0: one a core
seed = 1234
device = 'auto'
dtype = 'auto'  # of the net: bfloat16 on CUDA, float32 elsewhere
# -----------------------------------------------------------------------------

CHUNK_FILES, CHUNK_BYTES = (
    128,
    32 << 20,
)  # what a worker reads at a time: the window from which batches of like length are made
AUDIO = ('.wav', '.flac', '.ogg', '.opus', '.mp3', '.aiff', '.aif')
GRID = 640  # samples: 40 ms, where utterances are cut, so that frames fall where they would uncut
PARTS = ('prompt', 'chosen', 'rejected')
SPLITS = dict(validation='val', valid='val', dev='val')  # what others call it


class Item(NamedTuple):
    """Where an utterance, or a row of a preference manifest, is to be read."""

    kind: str  # file; row or pair of a manifest; member of a tar
    path: str  # the audio file, the manifest, the tar
    offset: int = 0  # of the row or member, bytes
    size: int = 0  # bytes, as far as known
    split: str = ''  # train, val, or not said
    name: str = ''  # of the member


def list_items(path):
    """The items of one file or folder, in a fixed order."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, 'manifest.jsonl')):
        seen = set()
        for folder, below, names in os.walk(path, followlinks=True):
            below.sort()
            if (real := os.path.realpath(folder)) in seen:  # links may lead in circles
                below[:], names = [], []
            seen.add(real)
            if 'manifest.jsonl' in names:  # it knows what lies here
                below[:], names = [], ['manifest.jsonl']
            for name in sorted(names):
                if name.lower().endswith(AUDIO + ('.tar', 'manifest.jsonl')):
                    yield from list_items(os.path.join(folder, name))
    elif os.path.isdir(path) or path.endswith('.jsonl'):
        path = os.path.join(path, 'manifest.jsonl') if os.path.isdir(path) else path
        with open(path, 'rb') as file:
            at = 0
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    kind, split = 'pair' if 'prompt_path' in row else 'row', row.get('split') or ''
                    size = int(float(row.get('seconds') or 10) * 20000)
                    if not all(
                        isinstance(x, str) and x
                        for x in (
                            row[key]
                            for key in ('path', *(f'{p}_path' for p in PARTS))
                            if key in row
                        )
                    ) or (kind == 'row' and 'path' not in row or not isinstance(split, str)):
                        raise ValueError
                except (ValueError, KeyError, TypeError, OverflowError):
                    raise InputError(
                        f'{path}, line {number}: expected JSON with `path` (or prompt_path, chosen_path, rejected_path)'
                        ' and, if any, seconds and split'
                    ) from None
                yield Item(kind, path, at, size, SPLITS.get(split, split))
                at += len(line)
    elif path.endswith('.tar'):
        try:
            with tarfile.open(path, 'r:') as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(AUDIO):
                        yield Item('member', path, member.offset_data, member.size, '', member.name)
                    tar.members = []  # else it remembers them all
        except tarfile.TarError as error:
            raise InputError(f'{path} is no uncompressed tar ({error})') from None
    elif path.endswith('.txt'):
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            for name in filter(None, (line.split('\t')[0].strip() for line in file)):
                full = os.path.join(os.path.dirname(path), name)
                yield Item('file', full, 0, os.path.getsize(full) if os.path.exists(full) else 0)
    else:
        yield Item('file', path, 0, os.path.getsize(path) if os.path.exists(path) else 0)


def list_audio(where):
    """What --audio names -> (root, items); names are given relative to root, the folder of it all. Raises InputError if there is nothing."""
    items, folders = [], []
    for source in filter(None, (part.strip() for part in where.split(','))):
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if '**' in source and not os.path.exists(source):  # it names folders and what lies in them
            found = [
                path
                for path in found
                if path.lower().endswith(AUDIO + ('.tar',)) and os.path.isfile(path)
            ]
            found = sorted({os.path.realpath(path): path for path in reversed(found)}.values())
        before = len(items)
        for path in found:
            items.extend(list_items(path))
            folders.append(os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path)))
        if len(items) == before:
            raise InputError(
                f'--audio={source}: {"no audio in it" if found else "no such file or folder"} (looked for {" ".join(AUDIO)} .tar)'
            )
    if not items:
        raise InputError(
            '--audio names nothing: give folders, files, globs, a manifest.jsonl, a list of paths (.txt) or .tar shards'
        )
    return os.path.commonpath(folders), list(
        dict.fromkeys(items)
    )  # what was named twice comes once


def make_chunks(items):
    """Lists of consecutive items, each at most CHUNK_FILES (fewer of a small corpus) and, but for one that is larger alone, CHUNK_BYTES."""
    chunks, size, most = [[]], 0, max(1, min(CHUNK_FILES, len(items) // 32))
    for item in items:
        if chunks[-1] and (len(chunks[-1]) == most or size + item.size > CHUNK_BYTES):
            chunks.append([])
            size = 0
        chunks[-1].append(item)
        size += item.size
    return chunks


def split_of(name, val_folders, val_fraction):
    """'train' or 'val' for a file, by its folders if val_folders (comma-separated) says some, else by a hash of its name."""
    if val_folders:
        return (
            'val'
            if set(os.path.dirname(name).split('/'))
            & {folder.strip(' /') for folder in val_folders.split(',')}
            else 'train'
        )
    return (
        'val'
        if int.from_bytes(hashlib.sha1(os.fsencode(name)).digest()[:6], 'big')
        < val_fraction * 2**48
        else 'train'
    )


def cut(wave, longest):
    """Spans [(start, end)] in samples that tile (samples,), none over `longest`: cut at the quietest 200 ms of the last third, on the 40 ms grid."""
    spans, start = [], 0
    while len(wave) - start > longest:
        last = min(longest, len(wave) - start - longest // 6)  # what remains is no scrap
        energy = (
            torch.from_numpy(wave[start : start + last // GRID * GRID])
            .view(-1, GRID)
            .square()
            .mean(1)
        )
        energy = torch.nn.functional.avg_pool1d(energy[None], 5, 1, 2, count_include_pad=False)[0]
        first = max(1, longest * 2 // 3 // GRID)
        end = start + (first + int(energy[first:].argmin())) * GRID
        spans.append((start, end))
        start = end
    return spans + [(start, len(wave))]


def read_item(item, plan):
    """-> list of (row, waves): what is known of each utterance, and its (samples,) at 16 kHz; of a pair the three of PARTS."""
    row, source, folder = {}, item.path, os.path.dirname(item.path)
    if item.kind == 'member':
        with open(item.path, 'rb') as file:
            file.seek(item.offset)
            source = io.BytesIO(file.read(item.size))
        source.name = os.path.join(item.path.removesuffix('.tar'), item.name)
    elif item.kind != 'file':
        with open(item.path, 'rb') as file:
            file.seek(item.offset)
            row = json.loads(file.readline())
        source = os.path.join(folder, row.pop('path', row.get('prompt_path')))
    name = os.path.relpath(getattr(source, 'name', source), plan['root'])
    split = item.split or split_of(name, plan['val_folders'], plan['val_fraction'])
    if item.kind == 'pair':
        waves = [load_audio(os.path.join(folder, row[part + '_path'])).numpy() for part in PARTS]
        known = {
            part: dict(units=[], duration=[], text=row.get(part + '_text', '')) for part in PARTS
        }
        return [(dict(file_name=name, **known, voice=row.get('voice'), split=split), waves)]
    wave = load_audio(source).numpy()
    spans = cut(wave, int(plan['max_seconds'] * SAMPLE_RATE))
    pieces = []
    for start, end in spans:
        piece = dict(file_name=name, units=[], duration=[], split=split) | {
            key: row[key] for key in row if key != 'split'
        }
        piece['seconds'] = round((end - start) / SAMPLE_RATE, 4)
        if len(spans) > 1:
            begin = piece['start'] = start / SAMPLE_RATE  # seconds within the file
            words = [
                [word, round(max(0, a - begin), 3), round(min(b - begin, piece['seconds']), 3)]
                for word, a, b in row.get('words') or []
                if begin <= (a + b) / 2 < end / SAMPLE_RATE
            ]
            piece |= dict(words=words, text=' '.join(word for word, _, _ in words)) if words else {}
            if not words:
                piece.pop('text', None)  # it is the whole file's
        pieces.append((piece, [wave[start:end]]))
    return pieces


# The jobs: what an encoder does with the pieces of one chunk.


def features(encoder, pieces):
    return [
        x.cpu().numpy()
        for x in encoder.features(
            [wave for row, waves in pieces if row['split'] == 'train' for wave in waves]
        )
    ]


def encode(encoder, pieces, table_seconds=0):
    """-> list of (file, line), seconds. Of the first table_seconds of training speech also what the table vocoder needs to know of it."""
    units, lines, table = (
        iter(encoder.encode([wave for _, waves in pieces for wave in waves])),
        [],
        None,
    )
    for row, waves in pieces:
        for said, wave in zip([row] if len(waves) == 1 else [row[part] for part in PARTS], waves):
            frames = next(units)
            said['units'], said['duration'] = (x.tolist() for x in dedup(frames))
            if table_seconds > 0 and row['split'] == 'train':
                table = table or UnitTable(encoder.n_units, encoder.frame_rate)
                table.add(wave, frames)
                table_seconds -= len(wave) / SAMPLE_RATE
        line = json.dumps(row, ensure_ascii=False, separators=(',', ':')).encode(
            errors='backslashreplace'
        )  # names need not be UTF-8
        lines.append(('units' if len(waves) == 1 else 'pairs', line + b'\n'))
    if table:
        lines.append(('table', table.to_bytes()))
    return lines, sum(len(wave) for _, waves in pieces for wave in waves) / SAMPLE_RATE


def begin_worker():
    """One core each; Ctrl-C is the parent's to handle; on Linux a killed parent (kill -9) takes its workers along."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@lru_cache(1)
def worker_encoder(where):
    return (
        UnitEncoder(json.loads(where))
        if where.startswith('{')
        else UnitEncoder.from_pretrained(where)
    )  # not fitted yet: its config alone


def work(job, items, plan, where):
    """In a worker: read, and do the job if its encoder can (mfcc); nets run in the parent. -> result, failures [(name, reason)]."""
    pieces, failures = [], []
    for item in items:
        try:
            pieces += read_item(item, plan)
        except (
            Exception
        ) as error:  # whatever is wrong with one file of millions must not end the run
            name = item.name or f'{item.path}{f", byte {item.offset}" if item.offset else ""}'
            failures.append((name, ' '.join(str(error).split()) or repr(error)))
    return (pieces if where is None else job(worker_encoder(where), pieces)), failures


def in_order(pool, ahead, jobs, plan, encoder, where):
    """Yield (result, failures, chunk) of each (job, chunk) in turn, workers reading at most `ahead` of them in advance."""
    waiting, jobs = deque(), iter(jobs)
    try:
        while True:
            while len(waiting) < ahead and (job := next(jobs, None)) is not None:
                waiting.append((pool.submit(work, *job, plan, where), *job))
            if not waiting:
                return
            future, job, chunk = waiting.popleft()
            result, failures = future.result()
            yield (result if where else job(encoder, result)), failures, chunk
    except BrokenProcessPool:
        raise InputError(
            'a worker died, most likely for want of memory: use fewer --workers; the same command continues'
        ) from None
    finally:
        for future, *_ in waiting:
            future.cancel()


def fit(x, k, seed):
    """k-means of (frames, D): a k-means++ start on a part, five epochs of mini-batches (Sculley 2010), three rounds of Lloyd on all. An empty
    cluster is moved to the frame that is worst served. -> centroids (k, D), mean squared distance."""
    generator = torch.Generator().manual_seed(seed)
    if len(x) < k:
        raise InputError(
            f'{len(x)} frames are too few for {k} clusters: give more speech, or lower --fit_kmeans'
        )
    shuffled = lambda: x[torch.randperm(len(x), generator=generator).to(x.device)]
    some = shuffled()[: max(20_000, 30 * k)]
    centroids = some[:1]
    nearest = (some - centroids).square().sum(1)
    for _ in range(k - 1):
        i = torch.multinomial(nearest.cpu().double().clamp(min=1e-12), 1, generator=generator).to(
            x.device
        )
        centroids = torch.cat((centroids, some[i]))
        nearest = torch.minimum(nearest, (some - some[i]).square().sum(1))

    def assign(block):  # sums (k, D), counts (k,), squared distances (frames,)
        best, unit = (centroids.square().sum(1) / 2 - block @ centroids.T).min(1)
        one = (unit[:, None] == torch.arange(k, device=x.device)).to(
            x.dtype
        )  # a product: CUDA's index_add is not deterministic
        return one.T @ block, one.sum(0), best * 2 + block.square().sum(1)

    seen = torch.zeros(k, device=x.device)  # frames that a centroid is the mean of
    with tqdm(
        total=8 * len(x), desc='k-means, frames', unit='', unit_scale=True, leave=False
    ) as bar:
        for _ in range(5):
            seen *= 0.25  # what was assigned to a worse centroid weighs less
            for block in shuffled().split(1 << 12):
                sums, counts, far = assign(block)
                seen += counts
                centroids = (
                    centroids + (sums - counts[:, None] * centroids) / seen.clamp(min=1)[:, None]
                )
                if empty := min(int((seen == 0).sum()), len(block)):
                    centroids[(seen == 0).nonzero()[:empty, 0]] = block[far.topk(empty).indices]
                bar.update(len(block))
            bar.set_postfix_str(f'mean squared distance {float(far.mean()):.4g}')
        for _ in range(3):
            sums, counts, far = zip(*map(assign, x.split(1 << 15)))
            sums, counts, far = sum(part.double() for part in sums), sum(counts), torch.cat(far)
            centroids = (sums / counts.clamp(min=1)[:, None]).to(x.dtype)
            if empty := int((counts == 0).sum()):
                centroids[counts == 0] = x[far.topk(empty).indices]
            bar.update(len(x))
    return centroids.cpu(), float(far.mean())


def public_rows(path):
    """The rows of a units file: ours, or the public toolkit's features.jsonl (units, duration) or tokens.jsonl (audio_repr)."""
    with open(path, encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                units = (
                    row['units']
                    if 'units' in row
                    else [int(u) for u in re.findall(r'<Un(\d+)>', row['audio_repr'])]
                )
                if (
                    not all(type(u) is int and u >= 0 for u in units)
                    or not isinstance(row.get('file_name', ''), str)
                    or len(row.get('duration', units)) != len(units)
                ):
                    raise ValueError
                units, runs = dedup(units)
                if 'duration' in row:  # runs that were not collapsed are added up
                    runs = [sum(part) for part in np.split(row['duration'], np.cumsum(runs)[:-1])]
                yield {
                    'file_name': f'{os.path.basename(path)}:{number}',
                    **row,
                    'units': units.tolist(),
                    'duration': [int(d) for d in runs],
                }
            except (ValueError, KeyError, TypeError, RuntimeError):
                raise InputError(
                    f'{path}, line {number}: expected a JSON object with `units` (numbers from 0) or `audio_repr`'
                ) from None


def write_json(path, value):
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2)
    os.replace(path + '.tmp', path)


def pack(rows, folder, vocab_size, frame_rate, val_folders='', val_fraction=0.01):
    """Write train.bin, val.bin of rows (units de-duplicated), one at a time in memory. -> what meta.json says of them."""
    dtype = np.uint16 if vocab_size <= 65_536 else np.uint32
    count = {split: dict(tokens=0, utterances=0, seconds=0.0) for split in ('train', 'val')}
    usage = np.zeros(vocab_size - OFFSET, dtype=np.int64)
    files = {split: open(os.path.join(folder, split + '.bin.tmp'), 'wb') for split in count}
    for row in rows:
        split = row.get('split') or split_of(row['file_name'], val_folders, val_fraction)
        split = SPLITS.get(split, split)
        if split not in count or not row['units']:
            continue  # a test split is in units.jsonl alone
        units = np.array(row['units'])
        if units.max() >= len(usage):
            raise InputError(
                f'{row["file_name"]}: unit {units.max()}, but there are {len(usage)} (--n_units)'
            )
        files[split].write(np.concatenate(([BOS], units + OFFSET, [EOS])).astype(dtype).tobytes())
        usage += np.bincount(units, minlength=len(usage))
        total = count[split]
        total['tokens'] += len(units) + 2
        total['utterances'] += 1
        total['seconds'] += row.get('seconds') or sum(row.get('duration', ())) / frame_rate
    for split, file in files.items():
        file.close()
        os.replace(file.name, os.path.join(folder, split + '.bin'))
    share = usage[usage > 0] / max(1, usage.sum())
    seconds = sum(total['seconds'] for total in count.values())
    return dict(
        vocab_size=vocab_size,
        n_units=len(usage),
        offset=OFFSET,
        dtype=np.dtype(dtype).name,
        dedup=True,
        frame_rate=frame_rate,
        tokens={split: total['tokens'] for split, total in count.items()},
        utterances={split: total['utterances'] for split, total in count.items()},
        hours={split: round(total['seconds'] / 3600, 4) for split, total in count.items()},
        tokens_per_second=round(usage.sum() / max(seconds, 1e-9), 2),
        unit_usage=dict(
            used=len(share), perplexity=round(float(np.exp(-(share * np.log(share)).sum())), 1)
        ),
    )


def lock(file):
    """Take the file for this process and its workers. Those of a killed run end within a second; another run does not."""
    for _ in range(30):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    raise InputError(f'{file.name}: another run is at work here')


def finish(meta):
    """Write meta.json and say what is in it."""
    write_json(os.path.join(out, 'meta.json'), meta)
    done = (
        f'{meta["pairs"]:,} pairs, {meta["failed"]:,} of {meta["files"]:,} files failed, {meta["x_real_time"]:,} x real time'
        if 'pairs' in meta
        else 'packed'
    ) + ', nothing to validate on' * (not meta['tokens']['val'])
    print(
        f'{out}: {sum(meta["utterances"].values()):,} utterances, {sum(meta["hours"].values()):.2f} h, {sum(meta["tokens"].values()):,} tokens '
        f'({meta["tokens_per_second"]} units a second), {meta["unit_usage"]["used"]} of {meta["n_units"]} units used, perplexity '
        f'{meta["unit_usage"]["perplexity"]}, {done}'
    )


if __name__ == '__main__':
    config = configure(globals())
    started = time.time()
    if (
        min(workers, max_failed, fit_kmeans, switch, vocoder_hours) < 0
        or min(n_units, fit_frames, max_seconds) < 1
        or not 0 <= val_fraction <= 1
    ):
        raise InputError(
            'max_seconds, n_units and fit_frames are at least 1, val_fraction is a share, and no other number is negative'
        )
    if not out:
        raise InputError('--out is empty: name a folder')
    os.makedirs(out, exist_ok=True)
    here = partial(os.path.join, out)

    if from_units:  # packed without audio
        if os.path.exists(here('progress.json')):
            raise InputError(
                f'{out} holds units made from audio: choose another --out, or delete it'
            )
        with open(here('units.jsonl.tmp'), 'w', encoding='utf-8') as file:

            def copied():
                for row in (row for path in from_units.split(',') for row in public_rows(path)):
                    file.write(json.dumps(row, ensure_ascii=False, separators=(',', ':')) + '\n')
                    yield row

            try:
                meta = pack(
                    tqdm(copied(), unit=' rows'),
                    out,
                    n_units + OFFSET,
                    50.0 if encoder == 'hubert50' else 25.0,
                    val_folders,
                    val_fraction,
                )
                if not sum(meta['utterances'].values()):
                    raise InputError(f'--from_units={from_units}: no units in it')
            except BaseException:
                for name in glob.glob(here('*.tmp')):
                    os.remove(name)
                raise
        os.replace(here('units.jsonl.tmp'), here('units.jsonl'))
        finish(
            meta
            | dict(
                encoder=encoder,
                vocoder='hifigan25' if encoder == 'mhubert25' else None,
                recipe=config,
            )
        )
        sys.exit()

    # ----- what there is to do, and what of it is done
    part, of = 0, 1
    if not only_pack and (shard or int(os.environ.get('WORLD_SIZE', 1)) > 1):
        part, of = map(
            int,
            re.fullmatch(r'(\d+)/(\d+)', shard).groups()
            if re.fullmatch(r'\d+/\d+', shard)
            else (os.environ.get('RANK', -1), os.environ.get('WORLD_SIZE', 0)),
        )
        if not 0 <= part < of:
            raise InputError(f'--shard={shard}: expected i/n with i from 0 to n - 1')
        if not shard and device == 'auto' and torch.cuda.is_available():
            device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    suffix = f'-{part:05d}-of-{of:05d}' if of > 1 else ''
    locked = open(here(f'.lock{suffix}'), 'w')  # kept open to the end
    lock(locked)
    shards = (
        sorted(glob.glob(here('progress-*-of-*.json')))
        if only_pack
        else [here(f'progress{suffix}.json')]
    )
    root, items = list_audio(audio)
    chunks = make_chunks(items)
    mine = chunks[len(chunks) * part // of : len(chunks) * (part + 1) // of]
    decides = (
        'encoder',
        'layer',
        'kmeans',
        'fit_kmeans',
        'fit_frames',
        'switch',
        'fit_vocoder',
        'vocoder_hours',
        'max_seconds',
        'val_folders',
        'val_fraction',
        'seed',
    )
    recipe = {key: config[key] for key in decides}
    recipe['listing'] = hashlib.sha1(
        repr([(i.kind, os.path.relpath(i.path, root), i.offset, i.size) for i in items]).encode()
    ).hexdigest()
    fresh = dict(
        recipe=recipe,
        chunks=0,
        of=len(mine),
        bytes=dict(failed=0, pairs=0, table=0, units=0),
        failed=0,
        audio_seconds=0.0,
        seconds=0.0,
    )
    states = []
    for path in shards:
        state = json.load(open(path)) if os.path.exists(path) else fresh
        if other := [
            key for key in recipe if key in state['recipe'] and state['recipe'][key] != recipe[key]
        ]:
            raise InputError(
                f'{path}: begun with another {", ".join(other)}; give the same settings and audio, another --out, or delete the folder'
            )
        states.append(state)
    if len({path[-10:-5] for path in shards}) > 1:
        raise InputError(
            f'{out} holds shards of several n ({", ".join(map(os.path.basename, shards))}): remove those of all but one'
        )
    if only_pack and (
        not shards
        or len(shards) != int(shards[0][-10:-5])
        or any(state['chunks'] < state['of'] for state in states)
    ):
        raise InputError(
            f'{out}: {sum(state["chunks"] == state["of"] for state in states)} finished shards of '
            f'{int(shards[0][-10:-5]) if shards else "?"}; run the others first'
        )
    if (
        not only_pack
        and states[0]['chunks'] == len(mine)
        and os.path.exists(here(f'units{suffix}.jsonl' if shard or part else 'meta.json'))
    ):
        print(
            f'{out}: {"shard " + suffix[1:] if of > 1 else "everything"} is already there; nothing to do (delete the folder to make it again)'
        )
        sys.exit()

    n_workers = workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    )
    pool = ProcessPoolExecutor(n_workers, get_context('fork'), begin_worker)
    pool.submit(int).result()  # they fork now, before there is a net on a GPU or a thread
    plan = dict(
        root=root, max_seconds=max_seconds, val_folders=val_folders, val_fraction=val_fraction
    )
    sample = [item for item in items if item.kind != 'pair'] or items
    sample = [
        sample[i] for i in random.Random(seed).sample(range(len(sample)), min(len(sample), 50_000))
    ]
    sample = [sample[i : i + 16] for i in range(0, len(sample), 16)]

    # ----- the encoder: nets run here, mfcc in the workers
    fitted_on = {
        key: recipe[key]
        for key in 'encoder layer fit_kmeans fit_frames switch val_folders val_fraction seed listing'.split()
    }
    own = bool(fit_kmeans or kmeans or layer is not None or encoder not in ENCODERS)
    if fit_kmeans and not os.path.exists(here('encoder', 'encoder.json')) and part == 0:
        net = UnitEncoder.from_pretrained(encoder, layer, '', device, dtype)
        frames = []
        if encoder == 'mfcc':
            net.config |= dict(switch=switch)
        with tqdm(
            total=fit_frames, desc='frames to fit on', unit='', unit_scale=True, leave=False
        ) as bar:
            fitted, failures = json.dumps(net.config) if encoder == 'mfcc' else None, []
            for got, failures, _ in in_order(
                pool, n_workers + 2, ((features, chunk) for chunk in sample), plan, net, fitted
            ):
                frames.extend(got)
                bar.update(sum(map(len, got)))
                if bar.n >= fit_frames:
                    break
        if not frames:
            raise InputError(
                'no training speech to fit on'
                + (f': {failures[-1][0]}: {failures[-1][1]}' if failures else '')
            )
        frames = np.concatenate(frames)[:fit_frames]
        net.centroids, net.config['distortion'] = fit(
            torch.from_numpy(frames).to(net.device), fit_kmeans, seed
        )
        net.config |= dict(vocoder='vocoder', fitted=fitted_on)
        net.save_pretrained(here('encoder'))
        del frames, net
    while fit_kmeans and not os.path.exists(here('encoder', 'encoder.json')):
        print('waiting for shard 0 to fit the k-means', flush=True)
        time.sleep(10)
    net = UnitEncoder.from_pretrained(
        *((here('encoder'), None, None) if fit_kmeans else (encoder, layer, kmeans or None)),
        device,
        dtype,
    )
    if fit_kmeans and net.config.get('fitted') != fitted_on:
        raise InputError(
            f'{here("encoder")} was fitted with other settings or audio: choose another --out, or delete the folder'
        )
    if net.centroids is None:
        raise InputError(
            f'{encoder} has no k-means yet: --fit_kmeans=N fits one, --kmeans=FILE or --encoder=FOLDER takes one'
        )
    if own and not fit_kmeans and part == 0:
        net.save_pretrained(here('encoder'))
    where = here('encoder') if net.config['kind'] == 'mfcc' else None

    # ----- encode: what is on disk is always the first `chunks` chunks, whole
    for state in [] if only_pack else states:
        paths = {kind: here(f'{kind}{suffix}.jsonl.part') for kind in state['bytes']}
        if os.path.exists(here('vocoder', 'vocoder.json')):
            state['bytes']['table'] = 0  # has done its work
        for kind, path in paths.items():
            if not os.path.exists(path) and os.path.exists(
                here(f'{kind}{suffix}.jsonl')
            ):  # killed between the last chunk and meta.json
                os.replace(here(f'{kind}{suffix}.jsonl'), path)
            if state['bytes'][kind] and not os.path.exists(path):
                raise InputError(
                    f'{path} is gone, of which {shards[0]} knows: delete the folder to make it again'
                )
        files = {
            kind: open(path, 'r+b' if os.path.exists(path) else 'w+b')
            for kind, path in paths.items()
        }
        for kind, file in files.items():
            file.truncate(state['bytes'][kind])
            file.seek(0, os.SEEK_END)
        step = -(
            -len(chunks) // 32
        )  # the vocoder is fitted on equal parts of so many chunks, evenly spread
        share = fit_vocoder * vocoder_hours * 3600 / len(range(0, len(chunks), step))
        first = len(chunks) * part // of
        todo = (
            (partial(encode, table_seconds=0 if (first + i) % step else share), mine[i])
            for i in range(state['chunks'], len(mine))
        )
        last = '', 'those of the run before'
        write_json(shards[0], state)  # also of a shard with nothing to do
        bar = tqdm(
            total=sum(map(len, mine)),
            initial=sum(map(len, mine[: state['chunks']])),
            desc='encode',
            unit=' files',
        )
        for (lines, seconds), failures, chunk in in_order(
            pool, n_workers + 2, todo, plan, net, where
        ):
            for kind, line in lines:
                files[kind].write(line)
            for name, reason in failures:
                files['failed'].write(
                    json.dumps(dict(file_name=name, reason=reason), ensure_ascii=False).encode(
                        errors='backslashreplace'
                    )
                    + b'\n'
                )
            for kind, file in files.items():
                file.flush()
                state['bytes'][kind] = file.tell()
            now = time.time()
            state |= dict(
                chunks=state['chunks'] + 1,
                failed=state['failed'] + len(failures),
                audio_seconds=state['audio_seconds'] + seconds,
                seconds=state['seconds'] + now - started,
            )
            started = now
            write_json(shards[0], state)
            bar.update(len(chunk))
            bar.set_postfix_str(
                f'{state["audio_seconds"] / state["seconds"]:.0f} x real time, {state["failed"]} failed'
            )
            last = (failures or [last])[-1]
            if state['failed'] > max_failed:
                raise InputError(
                    f'{state["failed"]} files failed, the last: {": ".join(last)}. See {paths["failed"]}; --max_failed={max_failed}'
                )
        bar.close()
        for kind, file in files.items():
            file.close()
            if (
                state['bytes'][kind] or kind == 'units'
            ):  # units last: they say that the shard is whole
                os.replace(file.name, here(f'{kind}{suffix}.jsonl'))
            else:
                os.remove(file.name)
        if of > 1:
            print(
                f'{out}: shard {part} of {of}, {sum(map(len, mine)):,} files, {state["audio_seconds"] / 3600:.2f} h, {state["failed"]} failed'
                + ('; when all are done: the same command with --only_pack' if shard else '')
            )
            if shard or part:
                sys.exit()
            while len(glob.glob(here(f'units-*-of-{of:05d}.jsonl'))) < of:
                time.sleep(1)
            only_pack, states = (
                True,
                [
                    json.load(open(path))
                    for path in sorted(glob.glob(here(f'progress-*-of-{of:05d}.json')))
                ],
            )

    # ----- the vocoder, the token files, the report
    failed, total = sum(state['failed'] for state in states), sum(map(len, chunks))
    if failed == total:
        raise InputError(f'none of the {total} files could be used; see {here("failed.jsonl")}')
    if only_pack:
        for kind in ('units', 'pairs', 'failed', 'table'):
            if parts := sorted(glob.glob(here(f'{kind}-*-of-*.jsonl'))):
                with open(here(kind + '.jsonl.tmp'), 'wb') as whole:
                    for path in parts:
                        with open(path, 'rb') as file:
                            shutil.copyfileobj(file, whole)
                os.replace(here(kind + '.jsonl.tmp'), here(kind + '.jsonl'))
    if os.path.exists(here('table.jsonl')):
        UnitTable.from_bytes(
            here('table.jsonl'), net.n_units, net.frame_rate
        ).finish().save_pretrained(here('vocoder'))
    elif own and net.vocoder and os.path.isdir(net.vocoder) and not os.path.exists(here('vocoder')):
        shutil.copytree(net.vocoder, here('vocoder'))  # the folder holds all that its units need
    with open(here('units.jsonl'), encoding='utf-8') as file:
        meta = pack(
            (json.loads(line) for line in file),
            out,
            net.n_units + OFFSET,
            net.frame_rate,
            val_folders,
            val_fraction,
        )
    seconds = max(sum(state['seconds'] for state in states), 1e-3)
    meta |= dict(
        encoder='encoder' if own else encoder,
        vocoder='vocoder' if os.path.isdir(here('vocoder')) else None if own else net.vocoder,
        pairs=sum(1 for _ in open(here('pairs.jsonl'), 'rb'))
        if os.path.exists(here('pairs.jsonl'))
        else 0,
        files=total,
        failed=failed,
        audio_hours=round(sum(state['audio_seconds'] for state in states) / 3600, 4),
        x_real_time=round(sum(state['audio_seconds'] for state in states) / seconds),
        recipe=config,
    )
    finish(meta)
    if os.path.exists(here('table.jsonl')):  # not before meta.json says that all is done
        os.remove(here('table.jsonl'))
