"""sample.py: prompts and networks by hand, greedy generation against transformers, and the whole on
synthetic speech and on 8 kHz recordings."""

import json
import os
import re
from functools import partial
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import fit_parts, read_jsonl, run_checked, small_slm, speech, write_jsonl

import model as M
import sample

N_UNITS = 40
run = partial(run_checked, 'sample.py', '--device=cpu')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Recordings with a manifest, units and a voice fitted on them, and a model that has learned
    nothing: dict of the folders audio, units, slm."""
    root, rows = tmp_path_factory.mktemp('data'), []
    waves = [speech(seed, 4) for seed in range(12)]
    words = [[f'w{i}', i * 0.7, i * 0.7 + 0.7] for i in range(5)]
    for i, wave in enumerate(waves):
        M.save_audio(root / f'audio/{i}.wav', wave)
        split = 'validation' if i < 2 else 'train'
        rows.append(dict(path=f'{i}.wav', text='w0 w1 w2 w3 w4', words=words, split=split))
    write_jsonl(root / 'audio/manifest.jsonl', rows)
    slam = fit_parts(root / 'units', waves, N_UNITS)
    meta = dict(encoder='encoder', vocoder='vocoder', encoder_id=slam['encoder_id'])
    write_jsonl(root / 'units/meta.json', [meta])
    small_slm(N_UNITS + 2, 512).save_pretrained(root / 'slm', slam | dict(dedup=True))
    return {name: str(root / name) for name in ('audio', 'units', 'slm')}


def test_prompts_in_folders_manifests_and_units_files(tmp_path):
    for name in ('b.wav', 'a.flac', 'deep/a.wav', 'notes.txt'):
        (tmp_path / 'talk' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'talk' / name).touch()
    splits = enumerate(('train', 'validation', 'dev', ''))
    write_jsonl(tmp_path / 'manifest.jsonl', [dict(path=f'{i}.wav', split=s) for i, s in splits])
    write_jsonl(tmp_path / 'u.jsonl', [dict(units=[3, 4], duration=[1, 2], text='x')])
    (tmp_path / 'meta.json').write_text('{"encoder_id": "me"}')

    def names(paths, *args):
        return [p.name for p in sample.find_prompts(paths, *args)[0]]

    assert names(f'{tmp_path}/talk') == ['a', 'b', 'a_2']
    both = f'{tmp_path}/talk, {tmp_path}/talk/b.wav'
    assert names(both, '', 1) == ['a', 'b']  # the limit is of each folder
    assert names(str(tmp_path), 'val') == names(str(tmp_path), 'dev-clean') == ['1', '2', '3']
    assert names(str(tmp_path), 'train') == ['0', '3'] and len(names(str(tmp_path))) == 4
    [p], ids = sample.find_prompts(f'{tmp_path}/u.jsonl', 'val')
    assert p.units.tolist() == [3, 4] and p.duration.tolist() == [1, 2] and p.text == 'x'
    assert ids == {f'{tmp_path}/u.jsonl': 'me'}

    segment = dict(path='t.wav', offset=2.0, duration=3.0, words=[['a', 1, 1.5], ['b', 2.5, 3.5]])
    write_jsonl(tmp_path / 's.jsonl', [segment, dict(path='t.wav', start=1.0)])
    segments = sample.read_prompts(f'{tmp_path}/s.jsonl', '')
    assert [p.span for p in segments] == [(2.0, 3.0), (1.0, None)]
    assert segments[0].words == [('b', 1.5)]


def test_a_prompt_ends_with_a_word():
    words = [('the', 0.9), ('dog', 2.4), ('ran', 3.3)]
    ones, about = torch.ones(90, dtype=torch.long), SimpleNamespace(n_units=90, frame_rate=25.0)
    wanted = {3.0: (60, 'the dog'), 0.5: (22, 'the'), 3.3: (82, 'the dog ran'), 9: (90, 'all')}
    for seconds, (frames, text) in {**wanted, 0: (90, 'all')}.items():
        p = sample.Prompt('p', units=torch.arange(90), duration=ones, text='all', words=words)
        sample.encode_prompt(p, about, seconds)
        assert int(p.duration.sum()) == len(p.units) == frames and p.text == text


def test_greedy_generation_is_transformers(data, monkeypatch):
    """Prompts of different lengths in one batch, each against transformers alone."""
    slm = M.load_slm(data['slm']).eval()
    slm.slam['dedup'] = False  # transformers bans no repeat
    hf = transformers.AutoModelForCausalLM.from_pretrained(data['slm'])
    monkeypatch.setattr(sample, 'temperature', 0)
    monkeypatch.setattr(sample, 'max_new_tokens', 30)
    rng = np.random.default_rng(0)
    prompts = [sample.Prompt('p', units=torch.from_numpy(rng.integers(0, 40, n))) for n in (5, 30)]
    options = dict(do_sample=False, repetition_penalty=1.1, max_new_tokens=30, eos_token_id=M.EOS)
    for p, k, new in sample.generate(prompts, slm):
        tokens = torch.tensor([[M.BOS, *(p.units + M.OFFSET)]])
        wanted = hf.generate(tokens, pad_token_id=0, suppress_tokens=[0], **options)
        wanted = [t for t in wanted[0, tokens.shape[1] :].tolist() if t != M.EOS]
        assert k == 1 and new.tolist() == wanted


def test_continuations(data, tmp_path):
    args = [f'--init={data["slm"]}', f'--prompt={data["audio"]}', '--num_samples=2']
    args += ['--max_new_tokens=40', '--batch_size=3']
    done = run(*args, f'--out={tmp_path}/a', f'--html={tmp_path}/page.html')
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[-1].startswith('4 samples, repeated ')
    rows = read_jsonl(tmp_path / 'a/units.jsonl')
    assert [row['file_name'] for row in rows[1:3]] == ['0/full-2.wav', '1/full.wav']
    assert rows[0]['units'] != rows[1]['units'] and rows[0]['text'] == 'w0 w1 w2 w3'
    for row in rows:
        n, new = row['prompt_units'], row['units'][row['prompt_units'] :]
        assert all(a != b for a, b in zip(new, new[1:], strict=False))  # de-duplicated units
        folder, tag = tmp_path / 'a' / row['file_name'][0], row['file_name'][6:]
        frames = [soundfile.info(folder / f'{f}{tag}').frames for f in ('full', 'continuation')]
        assert frames == [sum(row['duration']) * 640, sum(row['duration'][n:]) * 640]
        assert soundfile.info(folder / 'prompt.wav').duration == pytest.approx(2.8)

    # the page has it all and needs no network
    page = (tmp_path / 'page.html').read_text()
    shown = json.loads(page.split('type="application/json">')[1].split('</script>')[0])
    samples = [each for p in shown['prompts'] for each in p['samples']]
    assert [each['units'] for each in samples] == [row['units'] for row in rows]
    assert '://' not in page.replace('http://www.w3.org/2000/svg', '')

    # the same command gives the same files; another seed other ones
    run(*args, f'--out={tmp_path}/b')
    run(*args, f'--out={tmp_path}/c', '--seed=5')
    for path in (tmp_path / 'a').rglob('*.wav'):
        assert path.read_bytes() == (tmp_path / 'b' / path.relative_to(tmp_path / 'a')).read_bytes()
    assert read_jsonl(tmp_path / 'c/units.jsonl')[0]['units'] != rows[0]['units']

    # units.jsonl serves as prompts again, which need no encoder; no prompt at all is <S>
    again = [args[0], f'--prompt={tmp_path}/a/units.jsonl', '--prompt_seconds=2', '--encoder=none']
    run(*again, '--max_new_tokens=5', f'--out={tmp_path}/d')
    [row, *_] = read_jsonl(tmp_path / 'd/units.jsonl')
    assert row['units'][: row['prompt_units']] == rows[0]['units'][: row['prompt_units']]
    assert sum(row['duration'][: row['prompt_units']]) <= 50
    run(args[0], '--max_new_tokens=5', f'--out={tmp_path}/e')
    assert sorted(os.listdir(tmp_path / 'e/unprompted')) == ['continuation.wav', 'full.wav']


def test_resynthesis_of_8_khz_recordings_with_transcripts(data, tmp_path, listeners):
    M.save_audio(tmp_path / 'phone/call.wav', M.resample(speech(3, 2), 16000, 8000), 8000)
    page = f'--html={tmp_path}/page.html'
    for init in (data['units'], data['units'] + '/encoder', data['slm']):
        run(f'--init={init}', f'--prompt={tmp_path}/phone', '--resynth', f'--out={tmp_path}/r')
        result = json.loads((tmp_path / 'r/sample.json').read_text())
        assert result['frames_unchanged'] > 60 and 'wer' not in result
    flags = ['--resynth', f'--asr={listeners[0]}', f'--out={tmp_path}/s', page]
    done = run(f'--init={data["slm"]}', f'--prompt={data["audio"]}', *flags)
    rows = read_jsonl(tmp_path / 's/units.jsonl')
    printed = ''.join(done.stdout.split())  # whitespace aside: the transcripts are rubbish
    assert all(''.join(row['transcript'].split()) in printed for row in rows)
    words = [row['text'].split() for row in rows]
    errors = sum(row['word_errors'] for row in rows)
    result = json.loads((tmp_path / 's/sample.json').read_text())
    assert result['wer'] == pytest.approx(100 * errors / sum(map(len, words)))
    for row, text in zip(rows, words, strict=True):
        found = re.findall(r"[\w']+", row['transcript'].lower())
        assert row['word_errors'] == nltk.edit_distance(text, found)
    shown = json.dumps(rows[0]['transcript']).replace('<', '\\u003c')
    assert shown in (tmp_path / 'page.html').read_text()


def test_text_of_an_interleaved_model_needs_no_other_network(tmp_path, listeners):
    """From units to words and from words to words; only sound needs a vocoder."""
    slm = small_slm(257 + 10 + 2)
    slam = dict(tokenizer=listeners[1], offset=257, end=256, n_units=10, frame_rate=25.0)
    slm.save_pretrained(str(tmp_path / 'slm'), slam | dict(encoder='none', vocoder='none'))
    write_jsonl(tmp_path / 'u.jsonl', [dict(units=[1, 2, 9], duration=[2, 1, 1])])
    init, out = f'--init={tmp_path}/slm', f'--out={tmp_path}/out'
    for flag in (f'--prompt={tmp_path}/u.jsonl', '--from_text=Once'):
        done = run(init, out, flag, '--to=text', '--num_samples=2', '--max_new_tokens=9')
        texts = json.loads((tmp_path / 'out/sample.json').read_text())['texts']
        assert len(texts) == 2 and texts[1].splitlines()[-1] in done.stdout
    run(init, out, '--from_text=Once', mistake='none/vocoder.json')


MISTAKES = {
    'empty.wav': '--prompt=empty.wav',
    "split 'half'": '--prompt=half.jsonl',
    'bad.jsonl, line 2': '--prompt=bad.jsonl',
    'odd.jsonl, line 1': '--prompt=odd.jsonl',
    'far: its units are not those from 0 to 39': '--prompt=far.jsonl',
    "no row has split 'val'; --split= takes all": '--prompt=train.jsonl',
    'different encoders': '--prompt=other/u.jsonl',
    '--resynth needs --prompt': '--resynth',
    'text excludes --resynth': '--to=text --html=page.html',
    'or temperature < 0': '--prompt=far.jsonl --temperature=-1',
    'batch_size or max_new_tokens below 1': '--prompt=far.jsonl --batch_size=0',
    'has no text': '--from_text=Once',
}


def test_mistakes_are_one_line(data, tmp_path):
    (tmp_path / 'empty.wav').touch()
    write_jsonl(tmp_path / 'other/meta.json', [dict(encoder_id='hubert50')])
    (tmp_path / 'bad.jsonl').write_text('{"units": [1], "duration": [1]}\nnonsense\n')
    write_jsonl(tmp_path / 'odd.jsonl', [dict(units=[1, 2], duration=[1])])
    write_jsonl(tmp_path / 'far.jsonl', [dict(units=[3, 40], duration=[1, 1])])
    for split in ('train', 'half'):
        write_jsonl(tmp_path / f'{split}.jsonl', [dict(path='a.wav', split=split)])
    write_jsonl(tmp_path / 'other/u.jsonl', [dict(units=[1, 2], duration=[1, 1])])
    for message, args in MISTAKES.items():
        args = [re.sub('=(.*[.])', rf'={tmp_path}/\1', arg) for arg in args.split()]
        run(f'--init={data["slm"]}', f'--out={tmp_path}/o', *args, mistake=message)
        assert not (tmp_path / 'o').exists()
