"""Hear it: speech in, the same speech continued out. No text anywhere.

    python sample.py --prompt=a.wav                          # continue the first 3 s of a recording with the public model
    python sample.py --init=out/demo/dpo --prompt=a.wav,b.mp3,folder,units.jsonl --num_samples=4 --html=page.html
    python sample.py --init=out/demo/units --prompt=a.wav --resynth    # wave -> units -> wave, no model: is the encoder good for this language?

Prompts are encoded into units, continued by the model in one batch and vocoded in one voice. For each prompt a folder in `out`:
prompt.wav (what went in), continuation.wav and full.wav (prompt and continuation; of further samples continuation-2.wav ...), and
for all of them units.jsonl, which may serve as prompts again. Encoder and vocoder are those that the checkpoint names.
"""

import time

began = time.perf_counter()

from config import configure

import base64
import glob
import html as html_text
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import torch

from model import (
    BOS,
    OFFSET,
    SAMPLE_RATE,
    SLM,
    InputError,
    UnitEncoder,
    UnitVocoder,
    dedup,
    finish_wave,
    load_audio,
    pick_device,
    pick_dtype,
    save_audio,
    speech_level,
)

# -----------------------------------------------------------------------------
init = 'slprl/slam'  # checkpoint folder, or public model; with --resynth also a data folder, an encoder folder or 'mhubert25'
prompt = ''  # sound files of any kind and rate, folders, manifests, units files (.jsonl): comma-separated; empty: from <S>
prompt_seconds = 3.0  # taken of each prompt, up to a word's end where manifest.jsonl or the units file knows words; 0: all of it
split = 'val'  # of manifests and units files that know splits, take this one; '': all
max_prompts = 0  # take the first so many; 0: all
out = 'out/sample'  # folder for the results
num_samples = 1  # continuations of each prompt
max_new_tokens = 150  # units at most; the model may end earlier
temperature = 0.8  # 0: always the likeliest unit
top_k = 25  # of so many likeliest units; 0: all
top_p = 1.0  # of the smallest set that holds this share of the probability
repetition_penalty = 1.1  # above 1: units heard before are less likely
keep_prompt = False  # full.wav begins with the real recording, cross-faded into the continuation
resynth = False  # encode and vocode only, up to a minute of each prompt
html = ''  # also write this page: players and unit timelines, sound included
play = False  # play the results, if the machine has a player
encoder = ''  # in place of the checkpoint's own: 'mhubert25' or a folder
vocoder = ''  # in place of the checkpoint's own: 'hifigan25', a folder, or a HiFi-GAN .pt with its .json beside it
speaker = 0  # row of the vocoder's speaker table, if it has one
style = 0  # row of its style table
batch_size = 16  # continuations at a time
compile = False  # compile the model's step: half a minute once, then faster; for hundreds of continuations
seed = 1234
device = 'auto'  # auto, cuda, mps or cpu
dtype = 'auto'  # of the model: auto (bfloat16 on cuda), float32, bfloat16
# -----------------------------------------------------------------------------

SOUNDS = ('.wav', '.flac', '.mp3', '.ogg', '.opus', '.aif', '.aiff', '.au')
PLAYERS = (
    ('afplay',),
    ('paplay',),
    ('aplay', '-q'),
    ('ffplay', '-nodisp', '-autoexit', '-loglevel', 'quiet'),
    ('play', '-q'),
)


def read_lines(path):
    """The objects of a JSONL file."""
    rows = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for i, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
                assert not rows or isinstance(rows[-1], dict)
            except (ValueError, AssertionError):
                raise InputError(
                    f'{path}: line {i} is no JSON object; expected a manifest or a units file'
                ) from None
    if not rows:
        raise InputError(f'{path}: the file is empty')
    return rows


def from_row(row, path):
    """A prompt out of a line of a manifest (path), a units file (units, duration), a tokens file (audio_repr) or a pairs file (prompt)."""
    inner = row['prompt'] if isinstance(row.get('prompt'), dict) else row
    name = row.get('file_name') or row.get('path') or row.get('prompt_path')
    found = dict(
        name=str(name or os.path.basename(path)),
        text=inner.get('text') or row.get('prompt_text'),
        words=inner.get('words'),
        split=row.get('split'),
    )
    if 'audio_repr' in inner:
        inner = dict(units=[int(u) for u in re.findall(r'<Un(\d+)>', inner['audio_repr'])])
    if 'units' in inner:
        units, duration = inner['units'], inner.get('duration')
        if (
            not units
            or not all(isinstance(u, int) and u >= 0 for u in units)
            or duration
            and len(duration) != len(units)
        ):
            raise InputError(
                f'{path}: {found["name"]} needs units (numbers from 0) and, if any, as many durations'
            )
        return dict(
            found, units=torch.tensor(units), duration=torch.tensor(duration) if duration else None
        )
    if not name:
        raise InputError(f'{path}: its lines have neither path nor units')
    return dict(found, path=os.path.join(os.path.dirname(path), name))


def words_beside(path):
    """What a manifest.jsonl in the file's folder, or one of the two above, knows of it: {} or its row."""
    folder = os.path.dirname(os.path.abspath(path))
    for _ in range(3):
        manifest = os.path.join(folder, 'manifest.jsonl')
        if os.path.isfile(manifest):
            return next(
                (
                    row
                    for row in read_lines(manifest)
                    if row.get('path') == os.path.relpath(os.path.abspath(path), folder)
                ),
                {},
            )
        folder = os.path.dirname(folder)
    return {}


def find_prompts(text, split='', limit=0):
    """The prompts that a comma-separated list names: dicts with name, text, words and either path or units (and duration)."""
    found = []
    for part in (
        [text]
        if os.path.exists(text)
        else [part.strip() for part in text.split(',') if part.strip()]
    ):
        paths = [part]
        if os.path.isdir(part):
            manifest = os.path.join(part, 'manifest.jsonl')
            paths = (
                [manifest]
                if os.path.isfile(manifest)
                else sorted(
                    path
                    for path in glob.glob(
                        os.path.join(glob.escape(part), '**', '*'), recursive=True
                    )
                    if path.lower().endswith(SOUNDS)
                )
            )
            if not paths:
                raise InputError(f'{part}: no sound files in this folder ({", ".join(SOUNDS)})')
        elif not os.path.exists(part):
            paths = sorted(glob.glob(part, recursive=True))
            if not paths:
                raise InputError(f'{part}: no such file or folder')
        for path in paths:
            if path.endswith(('.jsonl', '.json')):
                some = [from_row(row, path) for row in read_lines(path)]
                some = [p for p in some if not split or p['split'] in (None, split)] or some
                found += some[: limit or None]
            else:
                found.append(dict(name=os.path.basename(path), path=path))
        if limit and len(found) >= limit:
            break
    found = found[: limit or None]
    for p in found:
        if 'path' in p and not p.get('words'):
            row = words_beside(p['path'])
            p |= dict(text=row.get('text'), words=row.get('words'))
    taken = {}
    for p in found:  # names for the folders of the results, each its own
        name = re.sub(r'[^\w.-]+', '_', os.path.splitext(p['name'])[0]).strip('._') or 'prompt'
        taken[name] = taken.get(name, 0) + 1
        p['name'] = name if taken[name] == 1 else f'{name}_{taken[name]}'
    return found


def cut_seconds(words, seconds):
    """Where to end a prompt of about `seconds`: at the end of the last word within, of the first if none is; there if no word is known."""
    ends = [float(end) for _, _, end in words or []]
    return max([end for end in ends if end <= seconds + 0.02] or ends[:1] or [seconds])


def find_loop(units, least=24):
    """The loop that units (n,) fall into: (period, times), or None. It must hold at least 4 times and `least` units, about a second."""
    for period in range(1, len(units) // 4 + 1):
        same, run, best = (units[period:] == units[:-period]).tolist(), 0, 0
        for equal in same:
            run = run + 1 if equal else 0
            best = max(best, run)
        if best + period >= max(4 * period, least):
            return period, (best + period) // period
    return None


def trim_silence(wave, rate, keep=0.1):
    """Drop silence (30 dB below the speech) at both ends of (samples,) but for `keep` seconds. Returns: the wave, samples dropped in front."""
    step = rate // 100
    if len(wave) < 2 * step:
        return wave, 0
    power = wave[: len(wave) // step * step].view(-1, step).square().mean(1).sqrt()
    loud = (power > 0.03 * speech_level(wave)).nonzero()[:, 0]
    if not len(loud):
        return wave, 0
    first, last = (
        max(0, int(loud[0]) * step - int(keep * rate)),
        (int(loud[-1]) + 1) * step + int(keep * rate),
    )
    return wave[first:last], first


def crossfade(a, b, samples):
    """a then b, overlapping by `samples` with equal power."""
    n = min(samples, len(a), len(b))
    ramp = torch.linspace(0, torch.pi / 2, n)
    return torch.cat((a[: len(a) - n], a[len(a) - n :] * ramp.cos() + b[:n] * ramp.sin(), b[n:]))


def find_parts(where):
    """Names or folders of the encoder and the vocoder that belong to `where`: a checkpoint, a data folder or an encoder folder."""
    for file in ('slam.json', 'meta.json'):
        if os.path.isfile(os.path.join(where, file)):
            with open(os.path.join(where, file), encoding='utf-8') as handle:
                named = json.load(handle)
            beside = [os.path.join(where, named.get(key) or '?') for key in ('encoder', 'vocoder')]
            return [
                path if os.path.isdir(path) else named.get(key)
                for path, key in zip(beside, ('encoder', 'vocoder'))
            ]
    if os.path.isdir(where) and not os.path.isfile(os.path.join(where, 'encoder.json')):
        raise InputError(
            f'{where}: no slam.json, meta.json or encoder.json here; expected a checkpoint, a data folder or an encoder folder'
        )
    beside = os.path.join(os.path.dirname(os.path.abspath(where)), 'vocoder')
    return [
        where if os.path.isdir(where) or '/' not in where else 'mhubert25',
        beside if os.path.isdir(beside) else None,
    ]


def edit_distance(a, b):
    """Insertions, deletions and substitutions that turn list a into list b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def resample(wave, rate, wanted):
    """(samples,) at `rate` Hz -> at `wanted` Hz."""
    if rate == wanted:
        return wave
    from torchaudio.functional import resample

    return resample(wave, rate, wanted)


def write(path, text):
    """Whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.tmp', path)


def player_html(label, wave, rate):
    """An <audio> element with the sound inside, as flac."""
    import soundfile

    sound = io.BytesIO()
    soundfile.write(sound, wave.numpy(), rate, format='FLAC', subtype='PCM_16')
    return (
        f'<label>{label}<audio controls preload="metadata" src="data:audio/flac;base64,{base64.b64encode(sound.getvalue()).decode()}"></audio>'
        f'<small>{len(wave) / rate:.1f} s</small></label>'
    )


def timeline_html(units, duration, n_prompt, frame_rate, offset=0.0):
    """Units as coloured blocks, as wide as they last; the prompt's are pale. offset: seconds that the player's sound begins later."""
    total, at, blocks = int(duration.sum()), 0, []
    for i, (unit, frames) in enumerate(zip(units.tolist(), duration.tolist())):
        colour = f'hsl({unit * 137.508 % 360:.0f} {25 if i < n_prompt else 75}% {78 if i < n_prompt else 60}%)'
        blocks.append(
            f'<rect x="{at}" width="{frames}" height="10" fill="{colour}"><title>unit {unit}, {at / frame_rate:.2f} to '
            f'{(at + frames) / frame_rate:.2f} s</title></rect>'
        )
        at += frames
    border = int(duration[:n_prompt].sum())
    mark = (
        f'<line x1="{border}" x2="{border}" y1="0" y2="10" class="border"/>'
        if 0 < border < total
        else ''
    )
    return (
        f'<svg viewBox="0 0 {total} 10" preserveAspectRatio="none" data-offset="{offset:.3f}" data-seconds="{total / frame_rate:.3f}">'
        f'{"".join(blocks)}{mark}<line x1="0" x2="0" y1="0" y2="10" class="now"/></svg>'
    )


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
h1 {{ font-size: 1.4em; margin-bottom: 0 }} section {{ border-top: 1px solid #ccc; padding: .6em 0 1em }} h2 {{ font-size: 1.05em; margin: .2em 0 }}
label {{ display: inline-flex; align-items: center; gap: .5em; margin: .2em 1.2em .2em 0 }} audio {{ height: 34px; width: 200px }}
svg {{ display: block; width: 100%; height: 34px; margin-top: .4em; cursor: pointer; background: #eee }} small, p {{ color: #666; margin: .2em 0 }}
.border, .now {{ stroke: #000; stroke-width: 2; vector-effect: non-scaling-stroke }} .now {{ stroke: #d00 }} .warn {{ color: #b00 }}
</style><h1>{title}</h1><p>{about}</p>{body}<script>
// the red line follows the last player of each section over its units; a click on the units plays from there
for (const section of document.querySelectorAll('section')) {{
  const svg = section.querySelector('svg'), sound = [...section.querySelectorAll('audio')].pop()
  const now = svg.querySelector('.now'), width = svg.viewBox.baseVal.width, seconds = +svg.dataset.seconds, offset = +svg.dataset.offset
  const move = () => {{ const x = (sound.currentTime + offset) / seconds * width; now.setAttribute('x1', x); now.setAttribute('x2', x)
    if (!sound.paused) requestAnimationFrame(move) }}
  sound.addEventListener('play', move); sound.addEventListener('seeked', move)
  svg.addEventListener('click', event => {{ const box = svg.getBoundingClientRect()
    sound.currentTime = Math.max(0, (event.clientX - box.left) / box.width * seconds - offset); sound.play() }})
}}
</script></html>
"""

if __name__ == '__main__':
    config = configure(globals())
    device = pick_device(device)
    if resynth and not prompt:
        raise InputError('--resynth needs --prompt: sound files, a folder or a units file')
    if (
        min(num_samples, max_new_tokens, batch_size) < 1
        or min(temperature, top_k, prompt_seconds, max_prompts, speaker, style) < 0
        or not (
            0 < top_p <= 1
            and 0 < repetition_penalty < 100
            and temperature + prompt_seconds < math.inf
        )
    ):
        raise InputError(
            'num_samples, max_new_tokens and batch_size are at least 1, top_p and repetition_penalty above 0, top_p at most 1, no '
            'number negative or infinite'
        )
    if not out or os.path.isfile(out) or os.path.isdir(html):
        raise InputError(f'--out={out} --html={html}: expected a folder and a file')
    prompts = (
        find_prompts(prompt, split, max_prompts)
        if prompt
        else [dict(name='unprompted', units=torch.zeros(0, dtype=torch.long))]
    )

    # the three networks; only those that are needed
    model = None
    if resynth:
        enc_name, voc_name = find_parts(init)
    else:
        model = SLM.from_pretrained(init, dtype=pick_dtype(dtype, device)).to(device).eval()
        enc_name, voc_name = model.slam.get('encoder'), model.slam.get('vocoder')
    enc_name, voc_name, enc = encoder or enc_name, vocoder or voc_name, None
    if not voc_name or any('path' in p for p in prompts) or resynth:
        if not enc_name:
            raise InputError(
                f'{init} names no encoder (it has no slam.json): pass --encoder=mhubert25 or a folder'
            )
        enc = UnitEncoder.from_pretrained(enc_name, device=device, dtype='float32')
    if not (voc_name or enc.vocoder):
        raise InputError(
            f'{init} names no vocoder: pass --vocoder=hifigan25, or fit one with prepare_units.py --fit_vocoder'
        )
    voc = UnitVocoder.from_pretrained(voc_name or enc.vocoder, device=device)
    sizes = {init: model.slam.get('n_units', model.config.vocab_size - OFFSET)} if model else {}
    sizes |= {f'encoder {enc_name}': enc.n_units} if enc else {}
    sizes |= {f'vocoder {voc_name or enc.vocoder}': voc.n_units}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f'units do not match ({", ".join(f"{name} has {n}" for name, n in sizes.items())}): pass the --encoder and --vocoder '
            f'with which {init} was trained'
        )
    frame_rate = voc.frame_rate
    if enc and abs(enc.frame_rate - frame_rate) > 0.01:
        raise InputError(
            f'encoder {enc_name} has {enc.frame_rate:g} units a second, vocoder {voc_name or enc.vocoder} {frame_rate:g}'
        )

    # prompts -> units
    for p in prompts:
        seconds = (
            60 if resynth else cut_seconds(p.get('words'), prompt_seconds) if prompt_seconds else 0
        )
        if seconds and p.get('words'):
            p['text'] = ' '.join(word for word, _, end in p['words'] if end <= seconds + 0.02)
        if 'path' in p:
            try:
                wave = load_audio(p['path'])
                if len(wave) < SAMPLE_RATE / frame_rate:
                    raise InputError(
                        f'{p["path"]}: too short to hold a unit ({len(wave) / SAMPLE_RATE:.3f} s)'
                    )
            except InputError as error:
                if len(prompts) == 1:
                    raise
                print(f'sample.py: left out: {error}', file=sys.stderr)
                continue
            p['wave'] = wave[: round(seconds * SAMPLE_RATE)] if seconds else wave
            p['units'], p['duration'] = dedup(enc.encode([p['wave']])[0])
        elif len(p['units']):
            if int(p['units'].max()) >= voc.n_units:
                raise InputError(
                    f'{prompt}: {p["name"]} has unit {int(p["units"].max())}, the model knows {voc.n_units}: another encoder made it'
                )
            if p['duration'] is None:
                p['duration'] = voc.durations([p['units']])[0]
            ends = p['duration'].cumsum(0)
            n = int((ends <= round(seconds * frame_rate)).sum()) if seconds else len(ends)
            p['units'], p['duration'] = p['units'][: max(1, n)], p['duration'][: max(1, n)]
        else:
            p['duration'] = p['units']

    prompts = [p for p in prompts if p.get('duration') is not None]
    if not prompts:
        raise InputError(f'--prompt={prompt}: none of the files could be used')
    longest = 1 + max_new_tokens + max(len(p['units']) for p in prompts)
    if model and longest > model.config.context:
        print(
            f'sample.py: warning: {longest} units with the prompt are more than the {model.config.context} it was trained on',
            file=sys.stderr,
        )

    # units -> more units -> sound
    if keep_prompt and any('wave' not in p for p in prompts):
        raise InputError(
            '--keep_prompt needs sound files as prompts: units have no recording to keep'
        )
    loaded, first_sound, spoken, loops = time.perf_counter(), None, 0.0, 0
    rows, sections, kept, edits = [], [], [], []
    jobs = [(p, k) for p in prompts for k in range(num_samples if model else 1)]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        new = [torch.zeros(0, dtype=torch.long) for _ in batch]
        if model:
            tokens = [torch.cat((torch.tensor([BOS]), p['units'] + OFFSET)) for p, _ in batch]
            new = model.generate(
                tokens,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed + start,
                compile=compile,
            )
            new = [row - OFFSET for row in new]
        for (p, k), more, predicted in zip(
            batch, new, voc.durations(new)
        ):  # spoken one by one, so that the first is heard soon
            units, duration = torch.cat((p['units'], more)), torch.cat((p['duration'], predicted))
            cut, seconds = int(p['duration'].sum()) * voc.hop, int(predicted.sum()) / frame_rate
            wave = (
                voc.decode([units], [duration], speaker=speaker, style=style)[0]
                if len(units)
                else torch.zeros(voc.hop)
            )
            tag, sounds, warn = f'-{k + 1}' if k else '', {}, ''  # sounds: name -> (wave, rate)
            name = 'resynth' if resynth else 'full' + tag
            if k == 0 and prompt:
                p['sound'] = (
                    (p['wave'], SAMPLE_RATE)
                    if 'wave' in p
                    else (finish_wave(wave[:cut].clone()), voc.sample_rate)
                )
                sounds['prompt'] = p['sound']
            if resynth:
                full, dropped = wave, 0
            else:
                tail = finish_wave(wave[cut:].clone()) if len(more) else torch.zeros(voc.hop)
                sounds['continuation' + tag] = (
                    trim_silence(tail, voc.sample_rate)[0],
                    voc.sample_rate,
                )
                full, dropped = trim_silence(wave, voc.sample_rate)
                if keep_prompt:
                    real = finish_wave(resample(p['wave'], SAMPLE_RATE, voc.sample_rate))
                    full, dropped = crossfade(real, tail, round(0.03 * voc.sample_rate)), 0
            sounds[name] = full, voc.sample_rate
            for label, (sound, rate) in sounds.items():
                save_audio(os.path.join(out, p['name'], label + '.wav'), sound, rate)
            first_sound = first_sound or time.perf_counter() - began
            spoken += seconds if model else len(wave) / voc.sample_rate

            said = f'{p["name"]}{tag}: {len(p["units"])} units, {int(p["duration"].sum()) / frame_rate:.1f} s'
            if model:
                loop = find_loop(more)
                said += f' + {len(more)} units, {seconds:.1f} s'
                if loop:
                    loops += 1
                    warn = f'warning: it loops ({loop[1]} times the same {loop[0]} units): raise temperature or repetition_penalty'
                elif not len(more):
                    warn = 'warning: the model ended at once; another seed may not'
            elif enc:  # what the units kept of the sound: encode it again, and again as spoken with durations of the vocoder's own
                was, again = (
                    units.repeat_interleave(duration),
                    enc.encode([resample(wave, voc.sample_rate, SAMPLE_RATE)])[0],
                )
                n = min(len(was), len(again))
                kept.append((int((was[:n] == again[:n]).sum()), len(was)))
                free = resample(
                    voc.decode([units], speaker=speaker, style=style)[0],
                    voc.sample_rate,
                    SAMPLE_RATE,
                )
                edits.append(
                    (
                        edit_distance(units.tolist(), dedup(enc.encode([free])[0])[0].tolist()),
                        len(units),
                    )
                )
                said += (
                    f' -> {100 * kept[-1][0] / len(was):.0f} % of the frames have their unit again'
                )
            print(
                f'{said} -> {os.path.join(out, p["name"], name + ".wav")}'
                + (f'\n  {warn}' if warn else ''),
                flush=True,
            )
            rows.append(
                dict(
                    file_name=f'{p["name"]}/{name}.wav',
                    units=units.tolist(),
                    duration=duration.tolist(),
                    prompt_units=len(p['units']),
                    sample=k + 1,
                    text=p.get('text'),
                )
            )
            if html:
                heard = dict(prompt=p['sound'], **sounds) if prompt and k else sounds
                players = ''.join(player_html(label, *sound) for label, sound in heard.items())
                text = f'<p>{html_text.escape(p["text"])}</p>' if p.get('text') else ''
                sections.append(
                    f'<section><h2>{html_text.escape(said)}</h2>{text}<p class="warn">{warn}</p>{players}'
                    f'{timeline_html(units, duration, len(p["units"]) if model else 0, frame_rate, dropped / voc.sample_rate)}</section>'
                )

    write(os.path.join(out, 'units.jsonl'), ''.join(json.dumps(row) + '\n' for row in rows))
    seconds = time.perf_counter() - loaded
    result = dict(
        init=init,
        prompts=len(prompts),
        samples=len(jobs),
        seconds_spoken=round(spoken, 2),
        seconds=round(seconds, 2),
        seed=seed,
        x_real_time=round(spoken / seconds, 1),
        first_sound=round(first_sound, 2),
        loops=loops,
    )
    if kept:
        result['frames_unchanged'] = 100 * sum(n for n, _ in kept) / sum(of for _, of in kept)
        result['units_unchanged_predicted_durations'] = 100 * (
            1 - sum(n for n, _ in edits) / sum(of for _, of in edits)
        )
    write(os.path.join(out, 'sample.json'), json.dumps(result, indent=2) + '\n')
    if html:
        about = f'{init}; encoder {enc_name or "none"}, vocoder {voc_name or enc.vocoder}; temperature {temperature}, top-k {top_k}, seed {seed}'
        write(
            html,
            PAGE.format(
                title='Resynthesis' if resynth else 'Continuations',
                about=html_text.escape(about),
                body=''.join(sections),
            ),
        )
    if play:
        player = next((command for command in PLAYERS if shutil.which(command[0])), None)
        if not player:
            print('no player found (afplay, paplay, aplay, ffplay, play): open the files by hand')
        for row in rows if player else []:
            subprocess.run([*player, os.path.join(out, row['file_name'])], check=False)
    what = (
        f'{len(prompts)} resynthesised'
        if resynth
        else f'{len(jobs)} continuations of {len(prompts) if prompt else "no"} prompts'
    )
    if kept:
        what += (
            f', {result["frames_unchanged"]:.1f} % of the frames come back with given durations, '
            f'{result["units_unchanged_predicted_durations"]:.1f} % of the units with predicted ones'
        )
    print(
        f'{what}: {spoken:.1f} s of speech in {seconds:.1f} s ({spoken / seconds:.1f} x real time), first sound {first_sound:.1f} s after the '
        f'start{f", {loops} with a loop" if loops else ""} -> {html or out}'
    )
