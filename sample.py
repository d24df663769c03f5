"""Hear a model: speech in, its continuation out, as sound. An interleaved model also takes text.

    python sample.py --prompt=a.wav      # continue the first 3 s with the public model
    python sample.py --init=out/demo/dpo --prompt=a.wav,folder,units.jsonl --html=page.html
    python sample.py --init=out/demo/dpo --prompt=a.wav --stream=- | aplay -f S16_LE -r 16000
    python sample.py --init=out/demo/units --prompt=a.wav --resynth   # no model: do units suffice?
    python sample.py --init=out/mixed --prompt=a.wav --to=text        # continued in words
    python sample.py --init=out/mixed --from_text='Once upon a time'  # words, continued in speech

Prompts are encoded into units, continued by the model in batches and vocoded in one voice. For each
prompt a folder in `out`: prompt.wav (what went in), continuation.wav and full.wav (prompt and
continuation; of further samples continuation-2.wav ...), and for all of them units.jsonl, which may
serve as prompts again. Encoder and vocoder are those that the checkpoint names.
"""

from config import configure

import base64
import contextlib
import glob
import io
import json
import math
import os
import re
import sys
import time
import wave as wave_file
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import (
    OFFSET,
    SAMPLE_RATE,
    SLM,
    InputError,
    UnitEncoder,
    UnitVocoder,
    check_marks,
    dedup,
    find_audio,
    finish_wave,
    load_audio,
    pick_device,
    pick_dtype,
    read_jsonl,
    resample,
    save_audio,
    write_atomic,
)

# -----------------------------------------------------------------------------
init = 'slprl/slam'  # checkpoint folder or hub name; with --resynth also data or encoder folder
prompt = ''  # sound files, folders, manifests, units files (.jsonl): comma-separated; '': from <S>
prompt_seconds = 3.0  # of each prompt, up to a word's end where words are known; 0: all of it
to = 'speech'  # what an interleaved model goes on in: speech, or text, which is printed
from_text = ''  # what it goes on from, in place of a prompt
split = 'val'  # of manifests and units files that know splits, take this one; '': all
max_prompts = 0  # of each folder, manifest or units file, take the first so many; 0: all
out = 'out/sample'  # folder for the results
num_samples = 1  # continuations of each prompt
max_new_tokens = 150  # units at most; the model may end earlier
temperature = 0.8  # 0: always the likeliest unit
top_k = 25  # of so many likeliest units; 0: all
top_p = 1.0  # of the smallest set that holds this share of the probability
repetition_penalty = 1.1  # above 1: units heard before are less likely
stream = ''  # speak while the units come: to this growing .wav, or '-': raw 16-bit PCM on stdout
resynth = False  # encode and vocode only, up to a minute of each prompt
html = ''  # also write this page: what was said, on one time scale, sound included
encoder = ''  # in place of the checkpoint's own: 'mhubert25' or a folder
vocoder = ''  # in place of the checkpoint's own: 'hifigan25', a folder, or a HiFi-GAN's .pt
speaker = 0  # which of the vocoder's voices, if it has several
style = 0  # row of a HiFi-GAN's style table
batch_size = 16  # continuations at a time
compile = False  # compile the model's step: half a minute once, then faster; for hundreds
seed = 1234
device = 'auto'  # auto, cuda, mps or cpu
dtype = 'auto'  # of the model: auto (bfloat16 on cuda), float32, bfloat16
# -----------------------------------------------------------------------------

PIECE_SECONDS = 0.5  # of speech that --stream vocodes at a time
REPEAT = 5  # units in a row that were said before: the page shows them, and so do five listeners


@dataclass
class Prompt:
    """What a continuation begins with: a recording, or units."""

    name: str  # also of the folder of its results
    path: str | None = None  # of the recording
    wave: torch.Tensor | None = None  # (samples,) of the recording, as far as it is used
    units: torch.Tensor | None = None  # (n,) int64
    duration: torch.Tensor | None = None  # (n,) int64, frames of each unit
    text: str | None = None
    words: list | None = None  # [word, start s, end s] each
    split: str | None = None


class Networks(NamedTuple):
    """What speaks: model and encoder are None where they are not needed."""

    model: SLM | None
    encoder: UnitEncoder | None
    vocoder: UnitVocoder
    names: str  # of the three, for people


# -----------------------------------------------------------------------------
# Prompts


def parse_row(row, path):
    """The Prompt in a line of a manifest (path), of a units file (units, duration) or of a pairs
    file (prompt). Raises InputError where it is none of these."""
    inner = row['prompt'] if isinstance(row.get('prompt'), dict) else row
    check_marks(inner, path)
    name = row.get('file_name') or row.get('path') or row.get('prompt_path')
    found = Prompt(
        name=str(name or os.path.basename(path)),
        text=inner.get('text') or row.get('prompt_text'),
        words=inner.get('words'),
        split=row.get('split'),
    )
    units, duration = inner.get('units'), inner.get('duration')
    if units is None:
        if not name:
            raise InputError(f'{path}: its lines have neither path nor units')
        found.path = os.path.join(os.path.dirname(path), str(name))
        return found

    def whole(numbers, least):
        return isinstance(numbers, list) and all(type(n) is int and n >= least for n in numbers)

    good = units and whole(units, 0)
    if duration:
        good = good and whole(duration, 1) and len(duration) == len(units)
        found.duration = torch.tensor(duration) if good else None
    if not good:
        raise InputError(
            f'{path}: {found.name} needs units (numbers from 0) and, if any, as many durations'
        )
    found.units = torch.tensor(units)
    return found


def read_prompts(path, split):
    """The prompts of a file or a folder, of one split where a manifest or a units file knows splits
    and has it."""
    manifest = os.path.join(path, 'manifest.jsonl')
    path = manifest if os.path.isfile(manifest) else path
    if not path.endswith(('.jsonl', '.json')):
        return [Prompt(os.path.basename(file), path=file) for file in find_audio(path)]
    found = [parse_row(row, path) for _, row in read_jsonl(path)]
    if not found:
        raise InputError(f'{path}: the file is empty')
    return [p for p in found if not split or p.split in (None, split)] or found


def find_prompts(text, split='', limit=0):
    """The prompts that a comma-separated list names, of each folder or .jsonl the first `limit`.
    Each gets a name of its own, for a folder of the results."""
    parts = [part.strip() for part in text.split(',') if part.strip()]
    found = []
    for part in [text] if os.path.exists(text) else parts:
        matches = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        for path in matches or [part]:
            found += read_prompts(path, split)[: limit or None]
    taken = set()
    for p in found:
        name = re.sub(r'[^\w.-]+', '_', os.path.splitext(p.name)[0]).strip('._') or 'prompt'
        p.name, n = name, 1
        while p.name in taken:
            n += 1
            p.name = f'{name}_{n}'
        taken.add(p.name)
    return found


def cut_seconds(words, seconds):
    """Where to end a prompt of about `seconds`: at the end of the last word within, of the first if
    none is; there if no word is known."""
    ends = [float(end) for _, _, end in words or []]
    return max([end for end in ends if end <= seconds + 0.02] or ends[:1] or [seconds])


def encode_prompt(p, nets, seconds, at_words):
    """Give a prompt its units and duration, and its wave if it is a recording, up to `seconds` (0:
    all of it), or, at_words, up to a word's end near there.

    Raises: InputError for a file that cannot be used.
    """
    end = cut_seconds(p.words, seconds) if seconds and at_words else seconds
    if end and p.words:
        p.text = ' '.join(word for word, _, stop in p.words if stop <= end + 0.02)
    if p.path:
        wave = load_audio(p.path)
        if len(wave) < SAMPLE_RATE / nets.vocoder.frame_rate:
            seconds = len(wave) / SAMPLE_RATE
            raise InputError(f'{p.path}: too short to hold a unit ({seconds:.3f} s)')
        p.wave = wave[: round(end * SAMPLE_RATE)] if end else wave
        p.units, p.duration = dedup(nets.encoder.encode([p.wave])[0])
        return
    nets.vocoder.check([p.units])
    if p.duration is None:
        p.duration = nets.vocoder.durations([p.units])[0]
    if end and len(p.units):
        ends = p.duration.cumsum(0)
        kept = max(1, int((ends <= round(end * nets.vocoder.frame_rate)).sum()))
        p.units, p.duration = p.units[:kept], p.duration[:kept]


def encode_prompts(prompts, nets, seconds, at_words=True):
    """Those that can be used; the others are told on stderr. Raises InputError if none can."""
    usable = []
    for p in prompts:
        try:
            encode_prompt(p, nets, seconds, at_words)
            usable.append(p)
        except InputError as error:
            if len(prompts) == 1:
                raise
            print(f'sample.py: left out: {error}', file=sys.stderr)
    if not usable:
        raise InputError(f'--prompt={prompt}: none of the files could be used')
    return usable


# -----------------------------------------------------------------------------
# Networks


def find_parts(where):
    """Names or folders of the encoder and the vocoder that belong to `where`: a checkpoint, a data
    folder or an encoder folder."""
    for file in ('slam.json', 'meta.json'):
        path = os.path.join(where, file)
        if not os.path.isfile(path):
            continue
        with open(path, encoding='utf-8') as handle:
            named = json.load(handle)
        parts = []
        for key in ('encoder', 'vocoder'):
            own = os.path.join(where, named.get(key) or '?')
            parts.append(own if os.path.isdir(own) else named.get(key))
        return parts
    if os.path.isdir(where) and not os.path.isfile(os.path.join(where, 'encoder.json')):
        raise InputError(
            f'{where}: no slam.json, meta.json or encoder.json here; expected a checkpoint, a data '
            'folder or an encoder folder'
        )
    beside = os.path.join(os.path.dirname(os.path.abspath(where)), 'vocoder')
    own = where if os.path.isdir(where) or '/' not in where else 'mhubert25'
    return [own, beside if os.path.isdir(beside) else None]


def load_networks(init, encoder, vocoder, device, dtype, needs_model, needs_encoder):
    """Only those that are needed. Raises InputError where one is missing or they do not match."""
    model = None
    if needs_model:
        model = SLM.from_pretrained(init, dtype=pick_dtype(dtype, device)).to(device).eval()
        named = model.slam.get('encoder'), model.slam.get('vocoder')
    else:
        named = find_parts(init)
    encoder, vocoder = encoder or named[0], vocoder or named[1]
    net = None
    if needs_encoder or not vocoder:
        if not encoder:
            raise InputError(f'{init} names no encoder: pass --encoder=mhubert25 or a folder')
        net = UnitEncoder.from_pretrained(encoder, device=device, dtype='float32')
        vocoder = vocoder or net.vocoder
    if not vocoder:
        raise InputError(
            f'{init} names no vocoder: pass --vocoder=hifigan25, or fit one with prepare_units.py '
            '--fit_vocoder'
        )
    voice = UnitVocoder.from_pretrained(vocoder, device=device)

    # the three must speak of the same units
    sizes = {}
    if model:
        sizes[init] = model.slam.get('n_units', model.config.vocab_size - OFFSET)
    if net:
        sizes[f'encoder {encoder}'] = net.n_units
    sizes[f'vocoder {vocoder}'] = voice.n_units
    if len(set(sizes.values())) > 1:
        known = ', '.join(f'{name} has {n}' for name, n in sizes.items())
        raise InputError(
            f'units do not match ({known}): pass the --encoder and --vocoder with which {init} '
            'was trained'
        )
    if net and abs(net.frame_rate - voice.frame_rate) > 0.01:
        raise InputError(
            f'encoder {encoder} has {net.frame_rate:g} units a second, vocoder {vocoder} '
            f'{voice.frame_rate:g}'
        )
    names = f'{init}; encoder {encoder or "none"}, vocoder {vocoder}'
    return Networks(model, net, voice, names)


# -----------------------------------------------------------------------------
# What is said, and what to say of it


def find_loop(units, least=24):
    """The loop that units (n,) fall into: (period, times), or None. It must hold at least 4 times
    and `least` units, about a second."""
    for period in range(1, len(units) // 4 + 1):
        run = best = 0
        for equal in (units[period:] == units[:-period]).tolist():
            run = run + 1 if equal else 0
            best = max(best, run)
        if best + period >= max(4 * period, least):
            return period, (best + period) // period
    return None


def find_repeats(units, n=REPEAT):
    """For each of the units, a list, whether it is part of `n` in a row that were said before."""
    seen, repeated = set(), [False] * len(units)
    for i in range(len(units) - n + 1):
        if tuple(units[i : i + n]) in seen:
            repeated[i : i + n] = [True] * n
        seen.add(tuple(units[i : i + n]))
    return repeated


def prompt_tokens(p, model):
    """What the model continues: the prompt, units or --from_text, and the switch to --to."""
    kind, ids = ('text', model.encode_text(from_text)) if from_text else ('speech', p.units)
    switch = [] if kind == to else [(to, [])]
    return model.tokens_of([(kind, ids), *switch])


def report_sample(p, k, name, frame_rate, new, duration, note=''):
    """Print sample k of a prompt in words, its continuation `new` (n,) and the duration of that.

    Returns: its line of units.jsonl, with `warning`: what is wrong with it, or ''.
    """
    text = f'{p.name}{tag(k)}: {len(p.units)} units, {int(p.duration.sum()) / frame_rate:.1f} s'
    if not resynth:
        text += f' + {len(new)} units, {int(duration.sum()) / frame_rate:.1f} s'
    print(f'{text}{note} -> {name if stream else os.path.join(out, name)}', flush=True)
    loop, warning = find_loop(new), ''
    if loop:
        warning = f'it loops ({loop[1]} times the same {loop[0]} units): '
        warning += 'raise temperature or repetition_penalty'
    elif not len(new) and not resynth:
        warning = 'the model ended at once; another seed may not'
    if warning:
        print(f'  warning: {warning}', flush=True)
    return dict(
        file_name=name,
        units=torch.cat((p.units, new)).tolist(),
        duration=torch.cat((p.duration, duration)).tolist(),
        prompt_units=len(p.units),
        sample=k,
        text=p.text,
        warning=warning,
    )


def tag(k):
    """What tells sample k of a prompt from the first."""
    return f'-{k}' if k > 1 else ''


# -----------------------------------------------------------------------------
# The modes: each takes the prompts and returns rows for units.jsonl and for people


def generate_batches(prompts, nets, sampling):
    """Continue each prompt num_samples times. Yields batches: lists of (prompt, number of the
    sample from 1, new tokens)."""
    jobs = [(p, k) for p in prompts for k in range(1, num_samples + 1)]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        tokens = [prompt_tokens(p, nets.model) for p, _ in batch]
        new = nets.model.generate(tokens, seed=seed + start, kind=to, **sampling)
        yield [(p, k, tokens) for (p, k), tokens in zip(batch, new, strict=True)]


def continue_prompts(prompts, nets, sampling):
    """Continue each prompt num_samples times, in batches, and save the sound.

    Returns: list of rows as of report_sample with what the page shows: `sound` (samples,) and
    `recording` (samples,) or None.
    """
    voice, rows = nets.vocoder, []
    for batch in generate_batches(prompts, nets, sampling):
        new = [tokens - nets.model.offset for _, _, tokens in batch]
        predicted = voice.durations(new)
        units, durations = [], []  # of prompt and continuation
        for (p, _, _), more, duration in zip(batch, new, predicted, strict=True):
            units.append(torch.cat((p.units, more)))
            durations.append(torch.cat((p.duration, duration)))
        waves = voice.decode(units, durations, speaker=speaker, style=style)
        for (p, k, _), more, duration, wave in zip(batch, new, predicted, waves, strict=True):
            rows.append(save_sample(p, k, nets, more, duration, wave))
    return rows


def save_sample(p, k, nets, new, duration, wave):
    """Write the wav files of a prompt continued, wave (samples,), and report it -> its row."""
    voice, folder = nets.vocoder, os.path.join(out, p.name)
    silence = torch.zeros(voice.hop)
    cut = int(p.duration.sum()) * voice.hop
    if k == 1 and len(p.units):
        sound, rate = p.wave, SAMPLE_RATE
        if sound is None:
            sound, rate = finish_wave(wave[:cut].clone()), voice.sample_rate
        save_audio(os.path.join(folder, 'prompt.wav'), sound, rate)
    rest = finish_wave(wave[cut:].clone()) if len(new) else silence
    save_audio(os.path.join(folder, f'continuation{tag(k)}.wav'), rest, voice.sample_rate)
    wave = wave if len(wave) else silence
    save_audio(os.path.join(folder, f'full{tag(k)}.wav'), wave, voice.sample_rate)
    row = report_sample(p, k, f'{p.name}/full{tag(k)}.wav', voice.frame_rate, new, duration)
    return row | dict(sound=wave, recording=p.wave)


def continue_in_text(prompts, nets, sampling):
    """Continue each prompt num_samples times in words, and print them.

    Returns: rows for units.jsonl, the prompts with their continuation, and dict(texts: as printed).
    """
    rows, texts = [], []
    for batch in generate_batches(prompts, nets, sampling):
        for p, k, tokens in batch:
            texts.append(nets.model.tokenizer.decode(tokens.tolist()))
            print(f'{p.name}{tag(k)}: {p.text or "..."} |{texts[-1]}')
            row = dict(file_name=p.name, units=p.units.tolist(), sample=k, text=p.text)
            row |= dict(duration=p.duration.tolist(), prompt_units=len(p.units))
            rows.append(row | dict(continuation=texts[-1], warning=''))
    return rows, dict(texts=texts)


def resynthesise(prompts, nets):
    """Vocode what was encoded, and encode that again: what do the units keep?

    Returns: rows as of continue_prompts, and dict(frames_unchanged: percent).
    """
    rows, same, frames = [], 0, 0
    voice, none = nets.vocoder, torch.zeros(0, dtype=torch.long)
    for p in prompts:
        [wave] = voice.decode([p.units], [p.duration], speaker=speaker, style=style)
        [again] = nets.encoder.encode([resample(wave, voice.sample_rate, SAMPLE_RATE)])
        was = p.units.repeat_interleave(p.duration)
        n = min(len(was), len(again))
        kept = int((was[:n] == again[:n]).sum())
        same, frames = same + kept, frames + len(was)

        name = f'{p.name}/resynth.wav'
        save_audio(os.path.join(out, name), wave, voice.sample_rate)
        note = f' -> {100 * kept / len(was):.0f} % of the frames have their unit again'
        row = report_sample(p, 1, name, voice.frame_rate, none, none, note)
        rows.append(row | dict(sound=wave, recording=p.wave))
    return rows, dict(frames_unchanged=100 * same / frames)


@contextlib.contextmanager
def open_stream(path, rate):
    """A function that lets (samples,) float out at once, as 16-bit PCM: into a .wav whose header is
    right after every call, or for '-' to stdout."""
    if path == '-':
        file = os.fdopen(os.dup(1), 'wb', closefd=False)
        write = file.write
    else:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(path, 'wb')
        sound = wave_file.open(file, 'wb')
        sound.setparams((1, 2, rate, 0, 'NONE', None))
        write = sound.writeframes

    def let_out(wave):
        write((wave * 32767).round().to(torch.int16).numpy().tobytes())
        file.flush()

    try:
        yield let_out
    except BrokenPipeError:
        raise InputError('nobody listens any more: what reads the stream has ended') from None
    finally:
        if path != '-':
            sound.close()
            file.close()


def take_pieces(steps, size, spoken, offset=OFFSET):
    """Units out of generate_steps, `size` at a time, until the model ends; all go into `spoken`."""
    piece = []
    for tokens in steps:
        unit = int(tokens[0]) - offset
        if unit < 0:
            break
        piece.append(unit)
        spoken.append(unit)
        if len(piece) == size:
            yield torch.tensor(piece)
            piece = []
    if piece:
        yield torch.tensor(piece)


def stream_prompts(prompts, nets, sampling):
    """Speak each prompt and its continuation while the model makes it, one after the other.

    Returns: rows, and dict(first_sound, first_new_sound): seconds until sound left, and until sound
    of a continuation did.
    """
    voice, rows, times = nets.vocoder, [], {}
    size = round(PIECE_SECONDS * voice.frame_rate / 1.4)  # a unit lasts 1.4 frames or so
    with open_stream(stream, voice.sample_rate) as let_out:
        for i, p in enumerate(prompts):
            start, new, samples = time.perf_counter(), [], 0
            tokens = prompt_tokens(p, nets.model)
            steps = nets.model.generate_steps([tokens], seed=seed + i, **sampling)
            pieces = take_pieces(steps, size, new, nets.model.offset)
            given = p.units, p.duration
            for wave in voice.stream(pieces, given, speaker=speaker, style=style):
                let_out(wave)
                samples += len(wave)
                times.setdefault('first_sound', time.perf_counter() - start)
                if samples > int(p.duration.sum()) * voice.hop:
                    times.setdefault('first_new_sound', time.perf_counter() - start)
            new = torch.tensor(new, dtype=torch.long)
            lasts = voice.durations([new])[0]
            rows.append(report_sample(p, 1, stream, voice.frame_rate, new, lasts))
    return rows, {key: round(seconds, 3) for key, seconds in times.items()}


# -----------------------------------------------------------------------------
# The page


def sound_of(wave, rate):
    """For the page: a flac inside, its seconds, and the outline of the wave, 50 peaks a second."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave.numpy(), rate, format='FLAC', subtype='PCM_16')
    blocks = wave.abs().split(rate // 50)
    return dict(
        src='data:audio/flac;base64,' + base64.b64encode(buffer.getvalue()).decode(),
        seconds=round(len(wave) / rate, 3),
        peaks=[round(100 * float(block.max())) for block in blocks],
    )


def write_page(path, rows, nets):
    """config/sample.html with what was said in it: a row a prompt, its samples under it."""
    prompts = {}
    for row in rows:
        name, recording = os.path.dirname(row['file_name']), row['recording']
        if name not in prompts:
            recording = None if recording is None else sound_of(recording, SAMPLE_RATE)
            prompts[name] = dict(name=name, text=row['text'], recording=recording, samples=[])
        shown = ('sample', 'units', 'duration', 'prompt_units', 'warning')
        sample = {key: row[key] for key in shown}
        sample['repeats'] = find_repeats(row['units'])
        sample |= sound_of(row['sound'], nets.vocoder.sample_rate)
        prompts[name]['samples'].append(sample)

    how = '' if resynth else f'; temperature {temperature}, top-k {top_k}, seed {seed}'
    data = dict(title='Resynthesis' if resynth else 'Continuations', about=nets.names + how)
    data |= dict(frame_rate=nets.vocoder.frame_rate, repeat=REPEAT, continued=not resynth)
    data |= dict(prompts=list(prompts.values()))
    # no name and no text can end the script that holds them
    data = json.dumps(data).replace('<', '\\u003c')
    template = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config', 'sample.html')
    with open(template, encoding='utf-8') as file, write_atomic(path) as page:
        page.write(file.read().replace('"DATA"', data))


def write_results(rows, prompts, more, frame_rate, seconds):
    """units.jsonl, sample.json, and the line that ends it all."""
    hidden = ('sound', 'recording', 'warning')
    with write_atomic(os.path.join(out, 'units.jsonl')) as file:
        for row in rows:
            file.write(json.dumps({k: v for k, v in row.items() if k not in hidden}) + '\n')
    frames = 0  # that were made here
    for row in rows:
        frames += sum(row['duration'][0 if resynth else row['prompt_units'] :])
    spoken = frames / frame_rate
    loops = sum(row['warning'].startswith('it loops') for row in rows)
    result = dict(init=init, prompts=len(prompts), samples=len(rows), seed=seed, loops=loops)
    result |= dict(seconds_spoken=round(spoken, 2), seconds=round(seconds, 2))
    result |= dict(x_real_time=round(spoken / seconds, 1), **more)
    with write_atomic(os.path.join(out, 'sample.json')) as file:
        json.dump(result, file, indent=2)

    what = f'{len(rows)} continuations of {len(prompts) if prompt or from_text else "no"} prompts'
    if resynth:
        share = more['frames_unchanged']
        what = f'{len(rows)} resynthesised, {share:.1f} % of the frames come back'
    if 'first_sound' in more:
        what += f', first sound after {more["first_sound"]:.2f} s'
    if to == 'text':
        what += f' in text, in {seconds:.1f} s'
    else:
        what += f': {spoken:.1f} s of speech in {seconds:.1f} s '
        what += f'({spoken / seconds:.1f} x real time)'
    if loops:
        what += f', {loops} with a loop'
    print(f'{what} -> {html or stream or out}')


def check_knobs(config):
    """Raises InputError for knobs that make no sense, alone or together."""
    if min(num_samples, max_new_tokens, batch_size) < 1:
        raise InputError('num_samples, max_new_tokens and batch_size are at least 1')
    numbers = 'temperature', 'top_k', 'prompt_seconds', 'max_prompts', 'speaker', 'style'
    if not all(0 <= config[name] < math.inf for name in numbers):
        raise InputError(f'{", ".join(numbers)} are neither negative nor infinite')
    if not (0 < top_p <= 1 and 0 < repetition_penalty < 100):
        raise InputError('top_p is above 0 and at most 1, repetition_penalty above 0')
    if not out or os.path.isfile(out) or os.path.isdir(html) or os.path.isdir(stream):
        raise InputError(f'--out={out} --html={html} --stream={stream}: expected folder and files')
    if resynth and not prompt:
        raise InputError('--resynth needs --prompt: sound files, a folder or a units file')
    if stream and (resynth or html or num_samples > 1):
        raise InputError('--stream goes without resynth, html and num_samples')
    if to not in ('speech', 'text') or to == 'text' and (stream or html or resynth):
        raise InputError(f'--to={to}: expected speech, or text, which goes without stream and html')
    if from_text and (prompt or resynth):
        raise InputError('--from_text goes without prompt and resynth')


if __name__ == '__main__':
    config = configure(globals())
    check_knobs(config)
    if stream == '-':
        sys.stdout = sys.stderr  # stdout is for sound alone
    where = pick_device(device)

    # what to begin with, and the networks that it takes
    if prompt:
        prompts = find_prompts(prompt, split, max_prompts)
    else:
        name = 'from_text' if from_text else 'unprompted'
        none = torch.zeros(0, dtype=torch.long)
        prompts = [Prompt(name, units=none, text=from_text or None)]
    recorded = any(p.path for p in prompts)
    nets = load_networks(init, encoder, vocoder, where, dtype, not resynth, recorded or resynth)
    loaded = time.perf_counter()
    seconds = 60 if resynth else prompt_seconds
    prompts = encode_prompts(prompts, nets, seconds, at_words=not resynth)

    # units -> more units -> sound
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    sampling |= dict(top_p=top_p, repetition_penalty=repetition_penalty, compile=compile)
    longest = 1 + max_new_tokens + max(len(p.units) for p in prompts)
    if nets.model and longest > nets.model.config.context:
        context = nets.model.config.context
        print(
            f'sample.py: warning: {longest} units with the prompt are more than the {context} it '
            'was trained on',
            file=sys.stderr,
        )
    more = {}
    if resynth:
        rows, more = resynthesise(prompts, nets)
    elif to == 'text':
        rows, more = continue_in_text(prompts, nets, sampling)
    elif stream:
        rows, more = stream_prompts(prompts, nets, sampling)
    else:
        rows = continue_prompts(prompts, nets, sampling)

    # the page, and files for machines
    if html:
        write_page(html, rows, nets)
    seconds = time.perf_counter() - loaded
    write_results(rows, prompts, more, nets.vocoder.frame_rate, seconds)
