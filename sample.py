"""Listen to a model: it continues speech; an interleaved model also reads and writes text.

    python sample.py --prompt=a.wav      # the public model continues the first 3 s
    python sample.py --init=out/demo/dpo --prompt=a.wav,folder,units.jsonl --html=page.html
    python sample.py --init=out/demo/units --prompt=a.wav --resynth   # what do the units keep?
    python sample.py --init=out/mixed --from_text='Once upon a time'  # or --prompt=a.wav --to=text

The vocoder speaks prompt and continuation. For each prompt, `out` gets a folder with prompt.wav,
continuation.wav and full.wav (then full-2.wav ...). units.jsonl and sample.json describe them all.
"""

from config import configure

import base64
import io
import json
import os
import re
from dataclasses import dataclass
from types import SimpleNamespace

import soundfile
import torch
from torchaudio.functional import edit_distance

from model import (
    SAMPLE_RATE,
    InputError,
    UnitEncoder,
    UnitVocoder,
    auto_bleu,
    check_encoder_ids,
    dedup,
    find_audio,
    import_transformers,
    load_audio,
    load_slm,
    pick_device,
    pick_dtype,
    read_json,
    read_jsonl,
    reading,
    resample,
    save_audio,
    split_of,
    write_atomic,
)

# -----------------------------------------------------------------------------
init = 'slprl/slam'  # checkpoint folder or hub name; with --resynth also a data or encoder folder
prompt = ''  # sound files, folders, manifests, units files (.jsonl), comma-separated; '': from <S>
prompt_seconds = 3.0  # of each prompt, cut at a word's end if word times are known; 0: all of it
to = 'speech'  # modality of an interleaved model's output: speech, or text, which is printed
from_text = ''  # a text to continue instead of a prompt
split = 'val'  # use this split of manifests and units files; '': all rows
max_prompts = 0  # use this many of each folder, manifest or units file; 0: all
out = 'out/sample'  # folder for the results
num_samples = 1  # continuations of each prompt
max_new_tokens = 150  # maximum units; the model may end earlier
temperature = 0.8  # 0: greedy
top_k = 25  # sample from the k most likely units; 0: from all
top_p = 1.0  # sample from the smallest set of units with this total probability
repetition_penalty = 1.1  # above 1: makes units that occurred before less likely
resynth = False  # encode and vocode only, at most a minute of each prompt
asr = ''  # folder of a Whisper model: also transcribe the results
html = ''  # also write this page: all results on one time axis, with audio
encoder = ''  # replaces the checkpoint's encoder: 'mhubert25' or a folder
vocoder = ''  # replaces the checkpoint's vocoder: 'hifigan25', a folder, or the .pt of a HiFi-GAN
batch_size = 16  # continuations generated together
seed = 1234
device = 'auto'  # auto, cuda, mps or cpu
dtype = 'auto'  # of the model: auto (bfloat16 on cuda), float32, bfloat16
# -----------------------------------------------------------------------------

REPEAT = 5  # a sequence of this many units that occurs twice in a sample counts as repeated
# percentages in sample.json: a sum of counts in units.jsonl over the sum of other counts
RATES = dict(frames_unchanged=('same_frames', 'frames'), repeated=('repeated_runs', 'runs'))
RATES['wer'] = 'word_errors', 'text_words'


@dataclass
class Prompt:
    """What a continuation begins with: a recording, units, or nothing."""

    name: str  # also the name of its result folder
    path: str | None = None  # of the recording
    span: tuple = (0.0, None)  # start and length in seconds
    wave: torch.Tensor | None = None  # (samples,) the used part of the recording
    units: torch.Tensor | None = None  # (n,) int64
    duration: torch.Tensor | None = None  # (n,) int64, frames of each unit
    text: str | None = None  # transcript of the used part
    words: list | tuple = ()  # (word, end in seconds) each


def parse_row(row, path, number):
    """The Prompt in a row of a manifest or a units file. Raises InputError with file and line."""
    name = str(row.get('file_name') or row.get('path') or os.path.basename(path))
    p = Prompt(name, text=row.get('text'))
    with reading(f'{path}, line {number}'):
        p.words = [(word, float(end)) for word, _, end in row.get('words') or []]
        if row.get('units') is None:  # a recording, or a segment of one
            start = float(row.get('start') or row.get('offset') or 0)
            end = row.get('end') or start + float(row.get('duration') or 'inf')
            p.words = [(word, t - start) for word, t in p.words if start < t <= end]
            p.path = os.path.join(os.path.dirname(path), row['path'])
            p.span = (start, end - start if end < 1e9 else None)
            return p
        numbers = torch.tensor([row['units'], row['duration']])
        if numbers.numel() and (numbers.dtype != torch.long or numbers[1].min() < 1):
            raise ValueError('expected as many durations as units')
        p.units, p.duration = numbers.long()  # empty if a sample ended at once
    return p


def read_prompts(path, split):
    """The prompts of a sound file, a folder, a manifest or a units file: rows of `split` and rows
    without a split; '': all rows. Raises InputError for a bad row, or if no row is left."""
    manifest = os.path.join(path, 'manifest.jsonl')
    path = manifest if os.path.isfile(manifest) else path
    if not path.endswith('.jsonl'):
        return [Prompt(os.path.basename(file), path=file) for file in find_audio(path)]
    prompts = []
    for number, row in read_jsonl(path):
        if not split or split_of(row.get('split') or split) == split_of(split):
            prompts.append(parse_row(row, path, number))
    if not prompts:
        raise InputError(f'{path}: no row has split {split!r}; --split= takes all rows')
    return prompts


def find_prompts(paths, split='', limit=0):
    """The prompts of comma-separated paths, at most `limit` of each folder or .jsonl, with unique
    names; and {units file: its encoder_id}."""
    prompts, ids = [], {}
    for path in (part.strip() for part in paths.split(',') if part.strip()):
        prompts += read_prompts(path, split)[: limit or None]
        for name in ('meta.json', 'sample.json'):  # of prepare_units.py and of this script
            meta = os.path.join(os.path.dirname(path), name)
            if path.endswith('.jsonl') and os.path.isfile(meta):
                ids[path] = read_json(meta).get('encoder_id')
    taken = set()
    for p in prompts:
        p.name = re.sub(r'[^\w.-]+', '_', os.path.splitext(p.name)[0]).strip('._') or 'prompt'
        while p.name in taken:
            p.name += '_2'
        taken.add(p.name)
    return prompts, ids


def encode_prompt(p, nets, seconds):
    """Set the units and durations of a prompt, and the wave of a recording. It is cut to `seconds`,
    at a word's end if word times are known; 0: no cut. Raises InputError for an unusable file or
    for units that the model does not have."""
    if p.path:
        p.wave = load_audio(p.path, *p.span)
    length = len(p.wave) / SAMPLE_RATE if p.path else int(p.duration.sum()) / nets.frame_rate
    if 0 < seconds < length:  # cut after the last word that fits, or after the first
        ends = [end for _, end in p.words]
        length = max([end for end in ends if end <= seconds + 0.02] or ends[:1] or [seconds])
        p.text = ' '.join(word for word, end in p.words if end <= length) or None
    if p.path:
        p.wave = p.wave[: round(length * SAMPLE_RATE)]
        p.units, p.duration = dedup(nets.encoder.encode(p.wave))
        if not len(p.units):
            raise InputError(f'{p.path}: too short to hold a unit')
    else:
        kept = p.duration.cumsum(0) <= length * nets.frame_rate + 1e-3
        kept[:1] = True
        p.units, p.duration = p.units[kept], p.duration[kept]
        if len(p.units) and not 0 <= min(p.units) <= max(p.units) < nets.n_units:
            raise InputError(f'{p.name}: its units are not those from 0 to {nets.n_units - 1}')


def load_networks(prompts, ids, device):
    """Load the networks that these prompts and the knobs need, and no others.

    ids: {file: encoder_id} of the prompts' files.
    Returns: namespace of model, encoder, vocoder, asr (None if not needed) and shared values.
    Raises: InputError if a network is missing, or if units of two encoders would be mixed.
    """
    nets = SimpleNamespace(model=None, encoder=None, vocoder=None, asr=None)
    if not resynth:
        nets.model = load_slm(init, dtype=pick_dtype(dtype, device)).to(device).eval()
        known = nets.model.slam
    else:  # a checkpoint, a data folder, or an encoder
        files = [os.path.join(init, name) for name in ('slam.json', 'meta.json')]
        known = next((read_json(file) for file in files if os.path.isfile(file)), {})
        own = {part: os.path.join(init, part) for part in ('encoder', 'vocoder')}
        known |= {part: folder for part, folder in own.items() if os.path.isdir(folder)}
    of_encoder = encoder or known.get('encoder') or init
    of_vocoder = vocoder or known.get('vocoder')
    if resynth or any(p.path for p in prompts):
        nets.encoder = UnitEncoder.from_pretrained(of_encoder, device=device)
        beside = os.path.join(of_encoder, '../vocoder')
        of_vocoder = of_vocoder or {'mhubert25': 'hifigan25'}.get(of_encoder, beside)
    if to == 'speech':
        nets.vocoder = UnitVocoder.from_pretrained(of_vocoder or '', device=device)

    if asr:
        with reading(asr):
            transformers = import_transformers()
            nets.asr = transformers.pipeline('automatic-speech-recognition', asr, device=device)

    # all parts must use the same units
    parts = [part for part in (nets.encoder, nets.vocoder) if part]
    ids = ids | {type(part).__name__: part.encoder_id for part in parts}
    ids |= {init: known.get('encoder_id')}
    check_encoder_ids(ids)
    sizes = {known.get('n_units'), *(part.n_units for part in parts)} - {None}
    if len(sizes) > 1 or len({part.frame_rate for part in parts}) > 1:
        raise InputError(f'{init}, {of_encoder} and {of_vocoder} differ in units or frame rate')
    nets.n_units, nets.encoder_id = max(sizes, default=0), next(filter(None, ids.values()), None)
    nets.frame_rate = parts[-1].frame_rate if parts else known.get('frame_rate', 25.0)
    return nets


def generate(prompts, model):
    """Continue each prompt num_samples times, in batches. Yields the prompt, the sample's number
    from 1, and its new tokens (n,) int64."""
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    options |= dict(top_p=top_p, repetition_penalty=repetition_penalty)
    kind = 'text' if from_text else 'speech'
    jobs = [(p, k) for p in prompts for k in range(1, num_samples + 1)]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        begins = [from_text or p.units for p, _ in batch]
        tokens = [model.tokens_of([(kind, x)] + [(to, [])] * (kind != to)) for x in begins]
        new = model.generate(tokens, seed=seed + start, kind=to, **options)
        yield from ((p, k, more) for (p, k), more in zip(batch, new, strict=True))


def make_sample(p, k, new, nets):
    """Vocode sample k of a prompt, write the wav files and measure. new: (n,) the generated units.

    Returns: the sample's row of units.jsonl, and the wave (samples,) of prompt and continuation.
    """
    voice, folder, tag = nets.vocoder, os.path.join(out, p.name), f'-{k}' if k > 1 else ''
    units, duration = torch.cat((p.units, new)), torch.cat((p.duration, voice.durations(new)))
    wave = voice.decode(units, duration) if len(units) else torch.zeros(1600)  # it ended at once
    cut = round(int(p.duration.sum()) * voice.sample_rate / voice.frame_rate)
    name = 'resynth.wav' if resynth else f'full{tag}.wav'
    save_audio(os.path.join(folder, name), wave, voice.sample_rate)
    if not resynth:
        save_audio(os.path.join(folder, f'continuation{tag}.wav'), wave[cut:], voice.sample_rate)
    if len(p.units):
        sound = (p.wave, SAMPLE_RATE) if p.path else (wave[:cut], voice.sample_rate)
        save_audio(os.path.join(folder, 'prompt.wav'), *sound)

    row = dict(file_name=f'{p.name}/{name}', sample=k, text=p.text, prompt_units=len(p.units))
    row |= dict(units=units.tolist(), duration=duration.tolist())
    sound = resample(wave, voice.sample_rate, SAMPLE_RATE)
    if resynth:  # how many frames keep their unit when the wave is encoded again?
        before, again = p.units.repeat_interleave(p.duration), nets.encoder.encode(sound)
        n = min(len(before), len(again))
        row |= dict(frames=len(before), same_frames=int((before[:n] == again[:n]).sum()))
    else:
        row['runs'] = max(0, len(new) - REPEAT + 1)
        row['repeated_runs'] = round(row['runs'] * auto_bleu(new.tolist(), n=REPEAT))
    if nets.asr:
        clip = dict(raw=sound.numpy(), sampling_rate=SAMPLE_RATE)
        row['transcript'] = nets.asr(clip, return_timestamps=len(sound) > 30 * SAMPLE_RATE)['text']
    if nets.asr and resynth and p.text:
        words, found = (re.findall(r"[\w']+", x.lower()) for x in (p.text, row['transcript']))
        row |= dict(text_words=len(words), word_errors=edit_distance(words, found))
    return row, wave


def rates_of(rows):
    """The percentages of RATES over all these rows of units.jsonl."""
    sums = {key: sum(row.get(key, 0) for row in rows) for pair in RATES.values() for key in pair}
    return {name: 100 * sums[part] / sums[of] for name, (part, of) in RATES.items() if sums[of]}


def sound_of(wave, rate):
    """Audio for the page: embedded FLAC, seconds, and the waveform's outline, 50 peaks a second."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.numpy(), rate, format='FLAC', subtype='PCM_16')
    return dict(
        src='data:audio/flac;base64,' + base64.b64encode(buffer.getvalue()).decode(),
        seconds=round(len(wave) / rate, 3),
        peaks=[round(100 * float(block.abs().max())) for block in wave.split(rate // 50)],
    )


def write_page(path, samples, nets):
    """Fill assets/sample.html. samples: list of (prompt, row, wave), grouped by prompt."""
    prompts = []
    for p, row, wave in samples:
        if row['sample'] == 1:
            recording = sound_of(p.wave, SAMPLE_RATE) if p.path else None
            prompts.append(dict(name=p.name, text=p.text, recording=recording, samples=[]))
        prompts[-1]['samples'].append(row | sound_of(wave, nets.vocoder.sample_rate))
    about = init if resynth else f'{init}; temperature {temperature}, top-k {top_k}, seed {seed}'
    data = dict(title='Resynthesis' if resynth else 'Continuations', about=about, repeat=REPEAT)
    data |= dict(frame_rate=nets.frame_rate, continued=not resynth, prompts=prompts)
    data = json.dumps(data).replace('<', '\\u003c')  # so that no text can close the script element
    template = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'assets', 'sample.html')
    with open(template, encoding='utf-8') as file, write_atomic(path) as page:
        page.write(file.read().replace('"DATA"', data))


if __name__ == '__main__':
    config = configure(globals())
    if resynth and not prompt or from_text and (prompt or resynth):
        raise InputError('--resynth needs --prompt; --from_text cannot be used with either')
    if to not in ('speech', 'text') or to == 'text' and (resynth or asr or html):
        raise InputError('--to is speech or text; text excludes --resynth, --asr and --html')
    if min(num_samples, batch_size, max_new_tokens) < 1 or temperature < 0:
        raise InputError('num_samples, batch_size or max_new_tokens below 1, or temperature < 0')

    # find the prompts and load the networks that they need
    none = torch.zeros(0).long()
    prompts, ids = find_prompts(prompt, split, max_prompts)
    name = 'from_text' if from_text else 'unprompted'
    prompts = prompts or [Prompt(name, units=none, duration=none, text=from_text or None)]
    nets = load_networks(prompts, ids, pick_device(device))
    for p in prompts:
        encode_prompt(p, nets, 60.0 if resynth else prompt_seconds)

    # generate units, then speech or text; print a line for each sample
    samples = []
    for p, k, new in ((p, 1, none) for p in prompts) if resynth else generate(prompts, nets.model):
        if to == 'text':
            line, wave = nets.model.tokenizer.decode(new.tolist()), None
            row = dict(file_name=p.name, sample=k, text=p.text, continuation=line)
            row |= dict(units=p.units.tolist(), duration=p.duration.tolist())
        else:
            row, wave = make_sample(p, k, new if resynth else new - nets.model.offset, nets)
            seconds = sum(row['duration']) / nets.frame_rate
            line = f'{seconds:.1f} s, {len(p.units)} + {len(new)} units'
            line += ''.join(f', {name} {rate:.0f} %' for name, rate in rates_of([row]).items())
        samples.append((p, row, wave))
        print(f'{row["file_name"]}: {line}', row.get('transcript', ''), flush=True)

    # write the page, units.jsonl and sample.json, and print the mean rates
    if html:
        write_page(html, samples, nets)
    rows = [row for _, row, _ in samples]
    with write_atomic(os.path.join(out, 'units.jsonl')) as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    with write_atomic(os.path.join(out, 'sample.json')) as file:
        result = dict(config, encoder_id=nets.encoder_id, samples=len(rows), **rates_of(rows))
        result['texts'] = [row['continuation'] for row in rows if 'continuation' in row]
        json.dump(result, file, indent=2)
    rates = ''.join(f', {name} {rate:.1f} %' for name, rate in rates_of(rows).items())
    print(f'{len(rows)} samples{rates} -> {html or out}')
