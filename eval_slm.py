"""Every metric of the field, straight from the official downloads, in one table beside the paper's rows.

    python eval_slm.py --init=out/slam,out/slam-dpo --data_dir=data --tasks=sblimp,swuggy,sstorycloze,tstorycloze,salmon
    python eval_slm.py --init=out/slam --data_dir=data --tasks=sstorycloze,genppl,autobleu --html=out/report.html

A pair counts 1 if its correct utterance has the higher log-likelihood, 1/2 on a tie: that of `<S>` units `<S>`, the mean over every token but the
first (the public toolkit's convention), in packed rows without padding. ZeroSpeech is read as unpacked, paired by gold.csv, averaged officially:
over voices within a pair, then over pairs. Intervals: 95 %, bootstrap over pairs; models are compared on the same pairs. A task that cannot run
is 'not run', with the reason, and the exit code is 2; a checkpoint that cannot be loaded ends the run before it begins.
"""

from config import configure, fail

import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
import urllib.request
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import combinations, product

import numpy as np
import torch
from tqdm import tqdm

from model import (
    BOS,
    EOS,
    OFFSET,
    SAMPLE_RATE,
    SLM,
    InputError,
    UnitEncoder,
    UnitVocoder,
    dedup,
    load_audio,
    pick_device,
    pick_dtype,
)

# -----------------------------------------------------------------------------
init = 'out/slam'  # checkpoints to compare, comma-separated: folders or hub names
tasks = 'sblimp,sstorycloze,tstorycloze'  # also swuggy, salmon, genppl, autobleu, gptscore, resynth, a sub-folder of data_dir, NAME=folder or .jsonl
data_dir = 'data'  # holds the suites; for sblimp and swuggy ZeroSpeech 2021: its root, syntactic/ or lexical/
split = 'dev'  # ZeroSpeech 2021: dev or test
likelihood = 'mean'  # per token, or sum
encoder = ''  # name or folder in place of the one each checkpoint names
vocoder = ''
prompts = ''  # folder of prompt audio; '': the correct utterances of sstorycloze, or else of the first suite
n_prompts = 1000  # prompts to continue
prompt_seconds = 3.0
max_new_tokens = 150
temperature = 0.8  # with top-k 25 and repetition penalty 1.1 (Table 6)
asr = 'openai/whisper-large-v3-turbo'  # transcribes for genppl, autobleu and gptscore
text_lm = 'meta-llama/Llama-3.2-1B'  # genppl's
judge = ''  # gptscore's: an instruct model's folder or hub name, or an OpenAI-compatible URL (https://host/v1)
judge_model = (
    'gpt-4o'  # what to ask for at the URL; the key is read from the environment's OPENAI_API_KEY
)
out = 'out/eval.json'  # beside it: NAME.pairs.jsonl with every pair's scores, eval_cache/ with the encoded audio
html = ''  # a self-contained page: tables, loss curves, bars, and three prompts to listen to
submission = ''  # folder for the files that ZeroSpeech's own tool takes
seed = 1234
device = 'auto'  # cuda, mps or cpu
dtype = 'auto'  # bfloat16 on cuda, else float32
# -----------------------------------------------------------------------------

ZEROSPEECH = dict(sblimp='syntactic', swuggy='lexical')
ALIASES = dict(
    sstorycloze=('ssc', 'spoken_storycloze'), tstorycloze=('tsc', 'topic_storycloze')
)  # folders that are taken for these tasks
SALMON = (
    'bg_alignment',
    'bg_all_consistency',
    'bg_domain_consistency',
    'gender_consistency',
    'rir_consistency',
    'sentiment_alignment',
    'sentiment_consistency',
    'speaker_consistency',
)
PERCENT = partial(np.multiply, 100)
TRANSFORM = dict(
    genppl=np.exp, gptscore=np.asarray, autobleu=PERCENT, resynth=PERCENT
)  # of the mean over prompts
TOY = dict(
    grammar='sblimp', sstory='sstorycloze', tstory='tstorycloze'
)  # the demo's suites, and the benchmarks they imitate
LABELS = dict(
    sblimp='sBLIMP',
    swuggy='sWUGGY',
    sstorycloze='sSC',
    tstorycloze='tSC',
    genppl='GenPPL ↓',
    autobleu='auto-BLEU ↓',
    gptscore='GPTScore',
    resynth='resynthesis error ↓',
)
JUDGE = (
    'Below are transcripts of the beginning of a recording and of the continuation that a speech model made. Rate how well the continuation '
    'follows: 1 very bad, 2 bad, 3 fair, 4 good, 5 very good (coherent, likely, well-formed). Forgive small recognition errors and an end cut off. '
    'Answer with one line, "Rating: N".\n\nBeginning: {}\nContinuation: {}'
)


def audio_files(folder):
    """Audio below a folder, relative to it; sorted, so that the file system's order does not matter, and hidden files left out."""
    found = sorted(
        os.path.relpath(os.path.join(top, name), folder)
        for top, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(('.wav', '.flac', '.ogg')) and not name.startswith('.')
    )
    if not found:
        raise InputError(
            f'no audio (.wav, .flac, .ogg) in {folder}'
            if os.path.isdir(folder)
            else f'no folder {folder!r}'
        )
    return found


def read_jsonl(path):
    """A file's JSON objects, one a line; NaN and Infinity, which JSON proper and so the page lacks, are None."""
    try:
        with open(path, encoding='utf-8') as file:
            return [
                dict(json.loads(line, parse_constant=lambda _: None))
                for line in file
                if line.strip()
            ]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f'{path}: expected a JSON object a line ({error})') from None


def list_folder(folder):
    """Pairs, dict(id, voice, types, pos, neg), of a StoryCloze folder (<n>_correct.wav, <n>_incorrect.wav) or a part of SALMon (sample_<n>_*.wav)."""
    files, sides, pairs, manifest = (
        audio_files(folder),
        defaultdict(dict),
        [],
        os.path.join(folder, 'manifest.jsonl'),
    )
    salmon = all(os.path.basename(file).startswith('sample_') for file in files)
    wanted = 'expected ' + (
        'two files sample_<n>_*.wav for each n'
        if salmon
        else '<n>_correct.wav and <n>_incorrect.wav'
    )
    for file in files:
        match = re.fullmatch(
            r'(.*?sample_\d+)_(.*)' if salmon else r'(.+)_(correct|incorrect)',
            os.path.splitext(file)[0],
        )
        if not match or match[2] in sides[match[1]]:
            raise InputError(
                f'{os.path.join(folder, file)}: {"a second file of this name" if match else "unknown file"}, {wanted}'
            )
        sides[match[1]][match[2]] = file
    about = (
        {
            os.path.normpath(row['path']): row
            for row in read_jsonl(manifest)
            if isinstance(row.get('path'), str)
        }
        if os.path.exists(manifest)
        else {}
    )
    for key, side in sides.items():
        if len(side) != 2:
            raise InputError(
                f'{os.path.join(folder, min(side.values()))} {"has no counterpart" if len(side) == 1 else "and more"}: {wanted}'
            )
        (_, pos), (_, neg) = sorted(
            side.items()
        )  # the positive sorts first: 'correct' < 'incorrect', and so in SALMon
        voice, kind = (str(about.get(pos, {}).get(what) or '') for what in ('voice', 'type'))
        pairs.append(
            dict(
                id=key,
                voice=voice,
                types=[kind] * bool(kind),
                pos=os.path.join(folder, pos),
                neg=os.path.join(folder, neg),
            )
        )
    return pairs


def list_zerospeech(root, kind, split, blind=False):
    """Pairs and {file name without suffix: path} of ZeroSpeech 2021's `syntactic` or `lexical`. blind: without gold.csv there are no pairs."""
    folder = next(
        (
            f
            for f in (os.path.join(root, kind, split), os.path.join(root, split), root)
            if os.path.isdir(f)
        ),
        root,
    )
    files = {os.path.splitext(file)[0]: os.path.join(folder, file) for file in audio_files(folder)}
    gold, sides, pairs = os.path.join(folder, 'gold.csv'), defaultdict(lambda: ([], [])), []
    if blind and not os.path.exists(gold) and not any(os.path.dirname(file) for file in files):
        return [], files
    try:
        with open(gold, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, 'strerror', None) or error
        raise InputError(
            f'{gold}: {why}; expected ZeroSpeech 2021 as unpacked, {kind}/{split}/gold.csv with its .wav files'
        ) from None
    wanted = (
        'id',
        'filename',
        'voice',
        'correct',
        *(('type', 'subtype') if kind == 'syntactic' else ('frequency', 'length')),
    )
    for number, row in enumerate(rows or [{}], 1):
        if any(row.get(key) is None for key in wanted) or not re.fullmatch(
            r'(\d+\.?\d*)?', row.get('frequency') or ''
        ):
            raise InputError(
                f'{gold}, row {number}: not that of the {kind} task; expected the columns {", ".join(wanted)}, numbers in frequency'
            )
        if row['filename'] not in files:
            raise InputError(
                f'{os.path.join(folder, row["filename"])}.wav is missing: gold.csv names it'
            )
        key = (
            '/'.join((row['type'], row['subtype'], row['id'])) if kind == 'syntactic' else row['id']
        )  # as the official tool groups
        sides[key, row['voice']][row['correct'].strip() != '1'].append(row)
    if unknown := sorted(files.keys() - {row['filename'] for row in rows}):
        print(
            f'eval_slm.py: {files[unknown[0]]}: unknown file, gold.csv does not name it; {len(unknown)} such are left out',
            file=sys.stderr,
        )
    for (key, voice), (correct, wrong) in sides.items():
        one = (correct + wrong)[0]
        if not correct or not wrong:
            raise InputError(
                f'{gold}: {one["filename"]} has no counterpart, expected a correct and a wrong row of id {key} and voice {voice}'
            )
        types, band = (
            [one.get('type')],
            bisect_right((1, 5, 20, 100), float(one.get('frequency') or 0)),
        )
        if kind == 'lexical':  # the official bands of how often LibriSpeech has the word
            types = [
                ('oov', '1-5', '6-20', '21-100', '>100')[band],
                f'length {one["length"]}',
                'in vocabulary',
            ][: 3 if band else 2]
        pairs += [
            dict(
                id=key, voice=voice, types=types, pos=files[a['filename']], neg=files[b['filename']]
            )
            for a in correct
            for b in wrong
        ]
    return pairs, files


def find_task(name, path, data_dir):
    """[(task, path)] of a task as named by the user; SALMon becomes its eight parts. Raises InputError where there is no such folder."""
    if not path:
        there = (
            {child.lower(): child for child in sorted(os.listdir(data_dir))}
            if os.path.isdir(data_dir)
            else {}
        )
        names = (name.lower(), *ALIASES.get(name, ()), name.lower() + '.jsonl')
        path = next((os.path.join(data_dir, there[n]) for n in names if n in there), data_dir)
        if (
            path == data_dir
            and not (there and name in (*ZEROSPEECH, 'salmon'))
            and os.path.basename(os.path.abspath(path)).lower() not in names
        ):
            raise InputError(
                f'no {name!r} in {data_dir} (it has {", ".join([*there.values()][:9]) or "nothing"}): give --tasks={name}=FOLDER, a folder '
                f'of data_dir, or of {", ".join((*ZEROSPEECH, *ALIASES, "salmon", *TRANSFORM))}'
            )
    parts = [part for part in SALMON if os.path.isdir(os.path.join(path, part))]
    if name == 'salmon' and not parts:
        raise InputError(f'no part of SALMon in {path}: expected the folders {", ".join(SALMON)}')
    return (
        [(f'{name}_{part}', os.path.join(path, part)) for part in SALMON]
        if parts
        else [(name, path)]
    )


def list_task(name, path, split='dev', blind=False):
    """Pairs in any layout, and the files of a submission. A .jsonl of prompt, chosen, rejected, each with units: its validation rows, if any."""
    if name in ZEROSPEECH or os.path.exists(os.path.join(path, 'gold.csv')):
        return list_zerospeech(path, ZEROSPEECH.get(name, 'syntactic'), split, blind)
    if not path.endswith('.jsonl'):
        return list_folder(path), {}
    rows, pairs = list(enumerate(read_jsonl(path), 1)), []
    for i, row in [(i, row) for i, row in rows if row.get('split', 'train') != 'train'] or rows:
        try:
            pos, neg = (
                [*map(int, row['prompt']['units']), *map(int, row[side]['units'])]
                for side in ('chosen', 'rejected')
            )
            if min(pos + neg) < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f'{path}, line {i}: expected prompt, chosen and rejected, each with units (0, 1, ...)'
            ) from None
        pairs.append(dict(id=str(i), voice=str(row.get('voice', '')), types=[], pos=pos, neg=neg))
    if not pairs:
        raise InputError(f'{path} holds no pairs')
    return pairs, {}


def encode_files(paths, where, folder, device='cpu', seconds=0.0, batch=64):
    """De-duplicated units of audio files, {path: int array}; seconds: of their beginnings alone. Raises InputError at a file that is no audio.

    A cache in `folder`, one file an encoder (told by its content), knows what was encoded before, by path, size and time of change: a line each,
    added as soon as it is known, so that a killed run continues; a broken line is ignored.
    """
    digest, known, keys = hashlib.sha256(b'' if os.path.isdir(where) else where.encode()), {}, {}
    for part in (
        sorted(os.scandir(where), key=lambda part: part.name) if os.path.isdir(where) else ()
    ):
        if part.is_file():
            with open(part, 'rb') as file:
                digest.update(part.name.encode() + hashlib.file_digest(file, 'sha256').digest())
    for path in paths:
        stat = os.stat(path)
        keys[path] = f'{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}|{seconds:g}'
    os.makedirs(folder, exist_ok=True)
    with (
        open(
            os.path.join(folder, f'units_{digest.hexdigest()[:16]}.jsonl'),
            'a+',
            encoding='utf-8',
            errors='replace',
        ) as cache,
        ThreadPoolExecutor(8) as pool,
    ):
        cache.seek(0)
        for line in cache:
            with suppress(ValueError, TypeError):
                key, units, check = json.loads(line)
                known |= {key: np.array(units, np.int32)} if check == sum(units) else {}
        todo = sorted(
            (path for path in keys if keys[path] not in known),
            key=lambda path: (os.path.getsize(path), path),
        )  # batches of like lengths
        enc = UnitEncoder.from_pretrained(where, device=device) if todo else None
        for start in tqdm(
            range(0, len(todo), batch),
            desc='encoding',
            unit='batch',
            leave=False,
            disable=len(todo) < 2 * batch,
        ):
            some = todo[start : start + batch]
            waves = [
                wave[: int(seconds * SAMPLE_RATE) or None] for wave in pool.map(load_audio, some)
            ]
            for path, frames in zip(some, enc.encode(waves)):
                units = dedup(frames.cpu())[0].tolist()
                known[keys[path]] = np.array(units, np.int32)
                cache.write(f'\n{json.dumps([keys[path], units, sum(units)])}\n')
            cache.flush()
    return {path: known[key] for path, key in keys.items()}


def pack(lengths, width):
    """Rows [[index, ...], ...] of at most `width`: the longest first, each into the fullest row that still takes it."""
    rows, free = [], []  # free: (room, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[i], -1))
        room, row = free.pop(at) if at < len(free) else (width, len(rows))
        rows += [[]] * (row == len(rows))
        rows[row].append(i)
        insort(free, (room - lengths[i], row))
    return rows


@torch.inference_mode()
def log_likelihoods(model, utterances, progress=False):
    """Log-likelihoods in nats of unit sequences as `<S>` units `<S>`, each token given all before it: sums (n,), tokens predicted (n,).

    Each distinct sequence is computed once, so that equal ones tie exactly. What is beyond the model's context is cut off.
    """
    device, seen = next(model.parameters()).device, {}
    whole = [
        np.array([BOS, *(np.asarray(units, np.int64) + OFFSET), EOS])[: model.config.context]
        for units in utterances
    ]
    index = [seen.setdefault(tokens.tobytes(), (len(seen), tokens))[0] for tokens in whole]
    sequences, top = [tokens for _, tokens in seen.values()], max(tokens.max() for tokens in whole)
    if top >= model.config.vocab_size:
        raise InputError(
            f'unit {top - OFFSET} is none of the {model.config.vocab_size - OFFSET} of the model: made by another encoder?'
        )
    width, batch, sums = (
        max(2048, *map(len, sequences)),
        1 if device.type == 'cpu' else 32,
        np.zeros(len(sequences)),
    )
    rows = pack([*map(len, sequences)], width)
    for start in tqdm(
        range(0, len(rows), batch), desc='scoring', unit='batch', leave=False, disable=not progress
    ):
        x = np.zeros(
            (4, batch, width), np.int64
        )  # tokens, utterance, counted or not, sum to count towards; one shape, so that a GPU compiles once
        x[1] = (
            -1 - np.arange(width) // model.config.context
        )  # what is left of a row: documents no longer than learned positions reach
        for r, row in enumerate(rows[start : start + batch]):
            ends = np.cumsum([len(sequences[i]) for i in row])
            for i, end in zip(row, ends):
                x[:, r, end - len(sequences[i]) : end] = np.stack(
                    np.broadcast_arrays(sequences[i], i + 1, 1, i)
                )
                x[2, r, end - len(sequences[i])] = 0  # nothing predicts the first token
        tokens, doc, mask, segments = torch.from_numpy(x).to(device)
        sums += (
            model.logps(tokens, mask, doc, segments=segments, n=len(sequences))
            .double()
            .cpu()
            .numpy()
        )
    if not np.isfinite(sums).all():  # NaN would lose every comparison, and read as a score of 0
        raise InputError(
            'the model gives likelihoods that are no numbers: its weights hold NaN, or overflow'
        )
    return sums[index], np.array([len(tokens) - 1 for tokens in whole])


def interval(a, b=None, transform=PERCENT, draws=2000, seed=1234):
    """Score and percentile bootstrap 95 % interval over items: transform(mean of a), or that less transform(mean of b), paired.

    A resample is a multinomial draw over the distinct values: the same distribution as n draws with replacement, far cheaper. One item says
    nothing of how sure it is: no interval, low and high are None.
    """
    values, counts = np.unique(
        np.stack([a] if b is None else [a, b], 1).astype(float), axis=0, return_counts=True
    )
    weights = np.concatenate(
        (counts[None], np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=draws))
    )
    means = transform((weights[..., None] * values).sum(1) / len(a))  # (1 + draws, 1 or 2)
    scores = means[:, 0] - (0 if b is None else means[:, 1])
    low, high = np.percentile(scores[1:], (2.5, 97.5)).tolist() if len(a) > 1 else (None, None)
    return dict(score=float(scores[0]), low=low, high=high, n=len(a))


def summarise(pairs, wins, seed=1234):
    """A task's result in percent (score, interval, pairs, by type, by voice) and {id: score in 0 .. 1}: first over voices within a pair, then over pairs."""
    voices, types = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for pair, win in zip(pairs, wins):
        voices[pair['voice']][pair['id']].append(win)
    voices = {
        voice: {key: float(np.mean(wins)) for key, wins in ids.items()}
        for voice, ids in voices.items()
    }
    items = {
        key: float(np.mean([ids[key] for ids in voices.values() if key in ids]))
        for key in dict.fromkeys(pair['id'] for pair in pairs)
    }
    for pair in pairs:
        for kind in pair['types']:
            types[kind][pair['id']] = items[pair['id']]
    parts = {
        what: {
            name: dict(score=100 * float(np.mean([*ids.values()])), n=len(ids))
            for name, ids in sorted(found.items())
        }
        for what, found in (('types', types), ('voices', voices))
    }
    return interval([*items.values()], seed=seed) | parts, items


def auto_bleu(text, n=2):
    """Share of a transcript's word n-grams that occur in it more than once; 0 where there is none. Punctuation marks are words."""
    words = re.findall(r"[\w']+|[^\w\s]", text)
    counts = Counter(zip(*(words[i:] for i in range(n))))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


@lru_cache(maxsize=4)
def load_hf(model_class, processor_class, where, device):
    """A transformers model and its tokenizer or processor. Raises InputError where neither a folder nor the hub has it."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        processor = getattr(transformers, processor_class).from_pretrained(where)
        model = getattr(transformers, model_class).from_pretrained(
            where, dtype=pick_dtype('auto', device)
        )
    except Exception as error:
        raise InputError(
            f'{where!r} cannot be loaded ({" ".join(str(error).split())[:120]}): give the folder of a downloaded copy'
        ) from None
    return model.eval().to(device), processor


@torch.inference_mode()
def transcribe(waves, where, device, batch=16):
    """Whisper's transcripts of 16 kHz waves of up to 30 s; '' for an empty one."""
    model, processor = load_hf('WhisperForConditionalGeneration', 'WhisperProcessor', where, device)
    options = (
        dict(language='en', task='transcribe')
        if getattr(model.generation_config, 'is_multilingual', False)
        else {}
    )
    texts, spoken = [''] * len(waves), [i for i, wave in enumerate(waves) if len(wave)]
    for start in tqdm(range(0, len(spoken), batch), desc='transcribing', disable=len(spoken) < 20):
        some = spoken[start : start + batch]
        features = processor.feature_extractor(
            [waves[i].numpy() for i in some], sampling_rate=SAMPLE_RATE, return_tensors='pt'
        ).input_features
        ids = model.generate(features.to(device, model.dtype), **options)
        for i, text in zip(some, processor.tokenizer.batch_decode(ids, skip_special_tokens=True)):
            texts[i] = text
    return texts


@torch.inference_mode()
def text_nll(text, where, device):
    """Mean negative log-likelihood per token of a text under a text LM, in nats; None where no token is predicted."""
    lm, tokenizer = load_hf('AutoModelForCausalLM', 'AutoTokenizer', where, device)
    ids = tokenizer(text, return_tensors='pt').input_ids.long().to(device)
    return (
        None
        if ids.shape[1] < 2
        else torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1].float(), ids[0, 1:]).item()
    )


@torch.inference_mode()
def rate(question, where, device, model_name='', retries=3):
    """The judge's rating, 1 to 5, None if its answer holds none. where: an endpoint's URL, or a transformers model."""
    if where.startswith(('http://', 'https://')):
        body = json.dumps(
            dict(model=model_name, temperature=0, messages=[dict(role='user', content=question)])
        ).encode()
        headers = {
            'Content-Type': 'application/json',
            'Authorization': 'Bearer ' + os.environ.get('OPENAI_API_KEY', ''),
        }
        try:
            with urllib.request.urlopen(
                urllib.request.Request(where.rstrip('/') + '/chat/completions', body, headers),
                timeout=120,
            ) as reply:
                answer = json.load(reply)['choices'][0]['message']['content'] or ''
        except Exception as error:  # the network's, the server's, or an answer of another shape
            if retries and getattr(error, 'code', 500) not in (400, 401, 403, 404):
                time.sleep(2 ** (3 - retries))
                return rate(question, where, device, model_name, retries - 1)
            raise InputError(
                f'the judge at {where} does not answer ({error}): check the URL, judge_model and $OPENAI_API_KEY'
            ) from None
    else:
        model, tokenizer = load_hf('AutoModelForCausalLM', 'AutoTokenizer', where, device)
        if tokenizer.chat_template:
            question = tokenizer.apply_chat_template(
                [dict(role='user', content=question)], add_generation_prompt=True, tokenize=False
            )
        ids = tokenizer(
            question, return_tensors='pt', add_special_tokens=not tokenizer.chat_template
        ).input_ids.to(device)
        answer = tokenizer.decode(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )[0, ids.shape[1] :]
        )
    match = re.search(r'rating\W*([1-5])(?!\d)', answer, re.I) or re.match(
        r'\W*([1-5])(?!\d)', answer
    )
    return int(match[1]) if match else None


def write(path, text):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.tmp', path)


def markdown(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |'
        for row in rows
    ]
    return '\n'.join(
        [lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:], '']
    )


@contextmanager
def part(result, *names):
    """A part of the evaluation: if it cannot run, these tasks are reported as not run, and the rest goes on."""
    try:
        yield
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = ' '.join(str(error).split()) or 'out of memory'
        print(f'eval_slm.py: {", ".join(names)} not run: {reason}', file=sys.stderr)
        result |= {name: dict(not_run=reason) for name in names}


if __name__ == '__main__':
    config = configure(globals())
    began, device, models, suites, not_run, generative = (
        time.time(),
        pick_device(device),
        {},
        {},
        {},
        [],
    )
    for where in filter(None, map(str.strip, init.split(','))):
        name = os.path.basename(where.rstrip('/'))
        models[f'{name} ({len(models) + 1})' if name in models else name] = where
    wanted = dict.fromkeys(filter(None, map(str.strip, tasks.split(','))))
    if (
        split not in ('dev', 'test')
        or likelihood not in ('mean', 'sum')
        or not (models and wanted and out)
        or min(seed, n_prompts, prompt_seconds, max_new_tokens, temperature) < 0
    ):
        fail(
            'expected --init=CHECKPOINT[,...], --tasks=NAME[,...], --out=FILE, --split=dev or test, --likelihood=mean or sum, and no negative number'
        )
    # what cannot be read or written is told at once, before anything is computed
    for path in filter(None, (out, html, submission and os.path.join(submission, 'scores'))):
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(0, 'it is a folder')
            write(path + '.part', '')
            os.remove(path + '.part')
        except OSError as error:
            fail(f'{path} cannot be written: {error.strerror}')
    precision = pick_dtype(dtype, device)
    for where in models.values():
        SLM.from_pretrained(where)
    for name, _, path in (task.partition('=') for task in wanted):
        generative += [name] * (name in TRANSFORM)
        with part(not_run, name):
            for task, folder in find_task(name, path, data_dir) if name not in TRANSFORM else ():
                with part(not_run, task):
                    suites[task] = list_task(task, folder, split, bool(submission))
    if not suites and not generative:
        fail('nothing can run')
    spoken = {
        task: [pair['pos'] for pair in pairs if isinstance(pair['pos'], str)]
        for task, (pairs, _) in suites.items()
    }
    prompt_files = [
        *dict.fromkeys(
            next(
                (spoken[task] for task in ('sstorycloze', 'sstory', *suites) if spoken.get(task)),
                [],
            )
        )
    ]
    if prompts:
        prompt_files = [os.path.join(prompts, file) for file in audio_files(prompts)]
    prompt_files = prompt_files[: n_prompts if generative else 3]

    metrics, items, scored, heard, cache = (
        {},
        {},
        [],
        defaultdict(dict),
        os.path.join(os.path.dirname(out) or '.', 'eval_cache'),
    )
    for name, where in models.items():
        result = metrics.setdefault(name, dict(not_run))
        with part(result, *suites, *generative):
            model = SLM.from_pretrained(where).to(device, precision).eval()
            enc, voc = (
                encoder or model.slam.get('encoder'),
                vocoder or model.slam.get('vocoder') or '',
            )
            if not enc:
                raise InputError(
                    f'{where} names no encoder (a text LM?): give --encoder and --vocoder'
                )
            if os.path.exists(about := os.path.join(enc, 'encoder.json')):
                its, wanted = (
                    json.load(open(about)).get('n_units'),
                    model.slam.get('n_units', model.config.vocab_size - OFFSET),
                )
                if its != wanted:
                    raise InputError(
                        f'encoder {enc} has {its} units, {where} {wanted}: pass the --encoder with which it was trained'
                    )
            for task, (pairs, files) in suites.items():
                with part(result, task):
                    wanted = [pair[side] for side in ('pos', 'neg') for pair in pairs] + [
                        *files.values()
                    ]
                    units = encode_files(
                        [x for x in wanted if isinstance(x, str)], enc, cache, device
                    )
                    scores, counts = log_likelihoods(
                        model,
                        [units[x] if isinstance(x, str) else x for x in wanted],
                        progress=True,
                    )
                    scores = scores / counts if likelihood == 'mean' else scores
                    if submission and files:
                        folder = os.path.join(
                            submission,
                            name if len(models) > 1 else '',
                            ZEROSPEECH.get(task, 'syntactic'),
                        )
                        lines = [
                            f'{file} {score:.8f}\n'
                            for file, score in zip(files, scores[2 * len(pairs) :])
                        ]
                        write(os.path.join(folder, split + '.txt'), ''.join(lines))
                    if not pairs:
                        raise InputError('no gold.csv: the submission alone was written')
                    pos, neg = scores[: len(pairs)], scores[len(pairs) : 2 * len(pairs)]
                    wins = (pos > neg) + 0.5 * (pos == neg)
                    result[task], items[name, task] = summarise(pairs, wins, seed)
                    scored += [
                        dict(model=name, task=task, **pair, score_pos=a, score_neg=b, win=w)
                        for pair, a, b, w in zip(pairs, pos.tolist(), neg.tolist(), wins.tolist())
                    ]
            with part(result, *generative or ['players']):
                if not generative and not (html and prompt_files):
                    continue
                if not prompt_files:
                    raise InputError('no prompts: give --prompts=FOLDER, or a suite of audio')
                heads, tails, texts = (
                    [*encode_files(prompt_files, enc, cache, device, prompt_seconds).values()],
                    [],
                    [],
                )
                begins = [
                    load_audio(file)[: int(prompt_seconds * SAMPLE_RATE) or None]
                    for file in prompt_files
                ]
                voc = UnitVocoder.from_pretrained(voc, device=device)
                for i in tqdm(
                    range(0, len(heads), 32),
                    desc='continuing',
                    leave=False,
                    disable=len(heads) < 64,
                ):
                    some = [torch.tensor([BOS, *(x + OFFSET)]) for x in heads[i : i + 32]]
                    tails += [
                        x - OFFSET
                        for x in model.generate(some, max_new_tokens, temperature, seed=seed + i)
                    ]
                for file, *clips in [*zip(prompt_files, begins, heads, tails)][: 3 if html else 0]:
                    heard[file] |= {
                        'prompt': clips[0],
                        'resynthesis': voc.decode([clips[1]])[0],
                        f'continuation, {name}': voc.decode([clips[2]])[0],
                    }
                for task in generative:
                    with part(result, task):
                        if task == 'gptscore' and not judge:
                            raise InputError('no judge: give --judge=FOLDER or --judge=URL')
                        if (
                            task == 'resynth'
                        ):  # share of frames whose unit changes on the way units -> wave -> units, durations kept
                            encode = UnitEncoder.from_pretrained(enc, device=device).encode
                            before = encode([load_audio(file) for file in prompt_files[:100]])
                            after = encode(voc.decode(*zip(*map(dedup, before))))
                            values = [
                                1 - float((a[: len(b)] == b[: len(a)]).sum()) / max(1, len(a))
                                for a, b in zip(before, after)
                            ]
                        else:
                            texts = texts or transcribe(voc.decode(tails), asr, device)
                        if task == 'autobleu':
                            values = [*map(auto_bleu, texts)]
                        elif task == 'genppl':
                            values = [text_nll(text, text_lm, device) for text in texts]
                        elif task == 'gptscore':
                            asked = [
                                JUDGE.format(*both)
                                for both in zip(transcribe(begins, asr, device), texts)
                            ]
                            values = [
                                rate(question, judge, device, judge_model)
                                for question in tqdm(asked, desc='judging', leave=False)
                            ]
                        rated = {
                            file: value
                            for file, value in zip(prompt_files, values)
                            if value is not None and np.isfinite(value)
                        }
                        if not rated:
                            raise InputError(f'none of {len(values)} transcripts could be rated')
                        result[task] = interval(
                            [*rated.values()], transform=TRANSFORM[task], seed=seed
                        ) | dict(left_out=len(values) - len(rated))
                        items[name, task] = rated
                        said = [''] * len(values) if task == 'resynth' else texts
                        scored += [
                            dict(model=name, task=task, id=file, value=value, text=text)
                            for file, value, text in zip(prompt_files, values, said)
                        ]

    differences, columns = (
        {},
        [*dict.fromkeys(task for result in metrics.values() for task in result)],
    )
    for (a, b), task in product(combinations(models, 2), columns):
        both = [
            (items[b, task][key], x)
            for key, x in items.get((a, task), {}).items()
            if key in items.get((b, task), {})
        ]
        if both:
            differences.setdefault(f'{b} - {a}', {})[task] = interval(
                *zip(*both), transform=TRANSFORM.get(task, PERCENT), seed=seed
            )

    def cells(results, sign=''):
        for task, r in ((task, results.get(task)) for task in columns):
            digits = sign + ('.2f' if task in ('autobleu', 'gptscore') else '.1f')
            yield (
                ''
                if r is None
                else 'not run'
                if 'not_run' in r
                else f'{r["score"]:{digits}} (1 item)'
                if r['n'] == 1
                else f'{r["score"]:{digits}} [{r["low"]:{digits}}, {r["high"]:{digits}}]'
            )

    head, here = (
        [LABELS.get(task, task) for task in columns],
        os.path.dirname(os.path.abspath(__file__)),
    )
    with open(os.path.join(here, 'config', 'paper.csv'), encoding='utf-8') as file:
        paper = [
            dict(model=row['model'])
            | {task: row.get(TOY.get(task, task)) or '' for task in columns}
            for row in csv.DictReader(file)
        ]
    paper = [row for row in paper if any([*row.values()][1:])]
    toy = [LABELS[TOY[task]] for task in columns if task in TOY]
    note = f'*paper: {", ".join(toy)}, not the toy suites*' if toy else '*paper*'
    table = [['model', *head], *([name, *cells(result)] for name, result in metrics.items())]
    table += [[note] + [''] * len(head)] * bool(paper) + [[*row.values()] for row in paper]
    changes = [
        ['difference', *head],
        *([name, *cells(result, '+')] for name, result in differences.items()),
    ]
    write(
        os.path.splitext(out)[0] + '.pairs.jsonl', ''.join(json.dumps(row) + '\n' for row in scored)
    )
    write(
        out, json.dumps(dict(metrics=metrics, differences=differences, settings=config), indent=1)
    )
    print('\n' + markdown(table) + ('\n' + markdown(changes) if differences else ''))
    failed = {
        f'{task} ({r["not_run"]})'
        for result in metrics.values()
        for task, r in result.items()
        if 'not_run' in r
    }
    done = f'{len(models)} models, {len(columns)} tasks, {len(scored)} scores in {time.time() - began:.0f} s'
    if html:
        import soundfile

        for clips in heard.values():
            for label, wave in clips.items():
                sound = io.BytesIO()
                soundfile.write(sound, wave.numpy(), SAMPLE_RATE, format='WAV', subtype='PCM_16')
                clips[label] = (
                    'data:audio/wav;base64,' + base64.b64encode(sound.getvalue()).decode()
                    if len(wave)
                    else ''
                )
        curves = {}
        for name, log in (
            (name, os.path.join(where, 'log.jsonl')) for name, where in models.items()
        ):
            with part({}, f'the loss curve of {name}'):
                curves |= {name: read_jsonl(log)} if os.path.exists(log) else {}
        page = dict(
            metrics=metrics,
            table=table,
            changes=changes,
            tasks=columns,
            titles=head,
            paper=paper,
            note=note.strip('*'),
            heard=heard,
            summary=done,
            percent=[task for task in columns if TRANSFORM.get(task, PERCENT) is PERCENT],
            lower=[task for task in columns if '↓' in LABELS.get(task, '')],
            failed=sorted(failed),
            curves=curves,
        )
        with open(os.path.join(here, 'config', 'report.html'), encoding='utf-8') as file:
            data = json.dumps(page).replace('</', '<\\/')
            write(
                html,
                file.read().replace('MODELS', ', '.join(models)).replace('>DATA<', f'>{data}<'),
            )
    print(f'{done} -> {out}' + f', {html}' * bool(html) + f'; {len(failed)} not run' * bool(failed))
    raise SystemExit(2 if failed else 0)
