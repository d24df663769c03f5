"""sample.py: prompts and networks by hand, greedy generation against transformers, and the whole on
synthetic speech and on 8 kHz recordings."""

import json
import os
import re
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import run_script
from sklearn.cluster import KMeans
from tokenizers import Tokenizer, models, pre_tokenizers

import model as M
import sample

N_UNITS = 40
SIZES = dict(n_layer=2, n_embd=64, n_head=2, n_kv_head=1, n_ffn=128)


def write_jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def rows_of(path):
    return [row for _, row in M.read_jsonl(str(path))]


def speech(seed, seconds):
    """Syllables of two tones each: (samples,) float32."""
    rng, n = np.random.default_rng(seed), int(seconds * 16000)
    tones = np.repeat(rng.integers(200, 3000, (n // 3200 + 1, 2)), 3200, 0)[:n]
    wave = np.sin(2 * np.pi * tones.cumsum(0) / 16000).sum(1) + 0.01 * rng.standard_normal(n)
    return torch.from_numpy(0.1 * wave).float()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Recordings with a manifest, units and a voice fitted on them, and a model that has learned
    nothing: dict of the folders audio, units, slm."""
    root = tmp_path_factory.mktemp('data')
    waves = [speech(seed, 4) for seed in range(12)]
    words = [[f'w{i}', i * 0.7, i * 0.7 + 0.7] for i in range(5)]
    rows = []
    for i, wave in enumerate(waves):
        M.save_audio(root / f'audio/{i}.wav', wave)
        rows.append(dict(path=f'{i}.wav', text='w0 w1 w2 w3 w4', words=words))
        rows[-1]['split'] = 'validation' if i < 2 else 'train'
    write_jsonl(root / 'audio/manifest.jsonl', rows)
    encoder = M.UnitEncoder.from_pretrained('mfcc')
    features = torch.cat([encoder.features(wave) for wave in waves])
    fitted = KMeans(N_UNITS, n_init=1, random_state=0).fit(features.numpy())
    encoder.centroids = torch.from_numpy(fitted.cluster_centers_).float()
    encoder.config['distortion'] = fitted.inertia_ / len(features)
    encoder.save_pretrained(root / 'units/encoder')
    table = M.UnitTable(N_UNITS, encoder.frame_rate)
    for wave in waves:
        table.add(wave, encoder.encode(wave))
    table.finish(encoder.encoder_id).save_pretrained(root / 'units/vocoder')
    meta = dict(encoder='encoder', vocoder='vocoder', encoder_id=encoder.encoder_id)
    (root / 'units/meta.json').write_text(json.dumps(meta))
    slm = M.load_slm('scratch', N_UNITS + 2, context=512, sizes=SIZES)
    slam = meta | {part: str(root / 'units' / part) for part in ('encoder', 'vocoder')}
    slm.save_pretrained(
        str(root / 'slm'), slam | dict(n_units=N_UNITS, frame_rate=25.0, dedup=True)
    )
    return {name: str(root / name) for name in ('audio', 'units', 'slm')}


@pytest.fixture(scope='module')
def whisper(tmp_path_factory):
    """The folder of a random Whisper, which writes rubbish."""
    folder = str(tmp_path_factory.mktemp('whisper'))
    torch.manual_seed(0)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.WhisperTokenizer(vocab=letters | {'<|endoftext|>': 256}, merges=[])
    special = ('startoftranscript', 'en', 'transcribe', 'notimestamps')
    tokenizer.add_special_tokens(dict(additional_special_tokens=[f'<|{s}|>' for s in special]))
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    shape = dict(num_mel_bins=20, d_model=16, max_target_positions=32, init_std=1.0)
    shape |= dict(encoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    ends = dict(decoder_start_token_id=257, eos_token_id=256, pad_token_id=256, bos_token_id=256)
    shape |= dict(decoder_layers=1, vocab_size=len(tokenizer))
    config = transformers.WhisperConfig(**shape, **ends)
    net = transformers.WhisperForConditionalGeneration(config)
    net.generation_config.max_length = 20
    net.save_pretrained(folder)
    return folder


def run(*args):
    """sample.py with these arguments -> its lines on stdout."""
    done = run_script('sample.py', '--device=cpu', *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_prompts_in_folders_manifests_and_units_files(tmp_path):
    for name in ('b.wav', 'a.flac', 'deep/a.wav', 'notes.txt'):
        (tmp_path / 'talk' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'talk' / name).touch()
    rows = [
        dict(path=f'{i}.wav', split=s) for i, s in enumerate(('train', 'validation', 'dev', ''))
    ]
    write_jsonl(tmp_path / 'manifest.jsonl', rows)
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
    write_jsonl(tmp_path / 's.jsonl', [dict(path='t.wav', split='half')])
    with pytest.raises(sample.InputError, match='half'):
        sample.read_prompts(f'{tmp_path}/s.jsonl', 'val')


@pytest.mark.parametrize(
    ('seconds', 'frames', 'text'),
    [
        (3.0, 60, 'the dog'),
        (0.5, 22, 'the'),
        (3.3, 82, 'the dog ran'),
        (9, 90, 'all'),
        (0, 90, 'all'),
    ],
)
def test_a_prompt_ends_with_a_word(seconds, frames, text):
    words = [('the', 0.9), ('dog', 2.4), ('ran', 3.3)]
    ones = torch.ones(90, dtype=torch.long)
    p = sample.Prompt('p', units=torch.arange(90), duration=ones, text='all', words=words)
    sample.encode_prompt(p, SimpleNamespace(n_units=90, frame_rate=25.0), seconds)
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
    for p, k, new in sample.generate(prompts, slm):
        tokens = torch.tensor([[M.BOS, *(p.units + M.OFFSET)]])
        options = dict(
            do_sample=False, repetition_penalty=1.1, max_new_tokens=30, eos_token_id=M.EOS
        )
        wanted = hf.generate(tokens, pad_token_id=0, suppress_tokens=[0], **options)
        wanted = [t for t in wanted[0, tokens.shape[1] :].tolist() if t != M.EOS]
        assert k == 1 and new.tolist() == wanted


def test_continuations(data, tmp_path):
    args = [f'--init={data["slm"]}', f'--prompt={data["audio"]}', '--num_samples=2']
    args += ['--max_new_tokens=40', '--batch_size=3']
    lines = run(*args, f'--out={tmp_path}/a', f'--html={tmp_path}/page.html')
    assert len(lines) == 5 and lines[-1].startswith('4 samples, repeated ')
    rows = rows_of(tmp_path / 'a/units.jsonl')
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
    assert 'http' not in page.replace('http://www.w3.org/2000/svg', '')

    # the same command gives the same files; another seed other ones
    run(*args, f'--out={tmp_path}/b')
    run(*args, f'--out={tmp_path}/c', '--seed=5')
    for path in (tmp_path / 'a').rglob('*.wav'):
        assert path.read_bytes() == (tmp_path / 'b' / path.relative_to(tmp_path / 'a')).read_bytes()
    assert rows_of(tmp_path / 'c/units.jsonl')[0]['units'] != rows[0]['units']

    # units.jsonl serves as prompts again, which need no encoder; no prompt at all is <S>
    again = [args[0], f'--prompt={tmp_path}/a/units.jsonl', '--prompt_seconds=2', '--encoder=none']
    run(*again, '--max_new_tokens=5', f'--out={tmp_path}/d')
    [row, *_] = rows_of(tmp_path / 'd/units.jsonl')
    assert row['units'][: row['prompt_units']] == rows[0]['units'][: row['prompt_units']]
    assert sum(row['duration'][: row['prompt_units']]) <= 50
    run(args[0], '--max_new_tokens=5', f'--out={tmp_path}/e')
    assert sorted(os.listdir(tmp_path / 'e/unprompted')) == ['continuation.wav', 'full.wav']


def test_resynthesis_of_8_khz_recordings_with_transcripts(data, tmp_path, whisper):
    M.save_audio(tmp_path / 'phone/call.wav', M.resample(speech(3, 2), 16000, 8000), 8000)
    page = f'--html={tmp_path}/page.html'
    for init in (data['units'], data['units'] + '/encoder', data['slm']):
        run(f'--init={init}', f'--prompt={tmp_path}/phone', '--resynth', f'--out={tmp_path}/r')
        result = json.loads((tmp_path / 'r/sample.json').read_text())
        assert result['frames_unchanged'] > 60 and 'wer' not in result
    flags = ['--resynth', f'--asr={whisper}', f'--out={tmp_path}/s', page]
    lines = run(f'--init={data["slm"]}', f'--prompt={data["audio"]}', *flags)
    rows = rows_of(tmp_path / 's/units.jsonl')
    printed = ''.join(''.join(lines).split())  # whitespace aside: the transcripts are rubbish
    assert all(''.join(row['transcript'].split()) in printed for row in rows)
    words = [row['text'].split() for row in rows]
    errors = sum(row['word_errors'] for row in rows)
    result = json.loads((tmp_path / 's/sample.json').read_text())
    assert result['wer'] == pytest.approx(100 * errors / sum(map(len, words)))
    for row, text in zip(rows, words, strict=True):
        found = re.findall(r"[\w']+", row['transcript'].lower())
        assert row['word_errors'] == nltk.edit_distance(text, found)
    assert (
        json.dumps(rows[0]['transcript']).replace('<', '\\u003c')
        in (tmp_path / 'page.html').read_text()
    )


def test_text_of_an_interleaved_model_needs_no_other_network(tmp_path):
    """From units to words and from words to words; only sound needs a vocoder."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters | {'<|end|>': 256}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<|end|>')
    fast.save_pretrained(tmp_path / 'text')
    slm = M.load_slm('scratch', 257 + 10 + 2, context=128, sizes=SIZES)
    slam = dict(tokenizer=str(tmp_path / 'text'), offset=257, end=256, n_units=10, frame_rate=25.0)
    slm.save_pretrained(str(tmp_path / 'slm'), slam | dict(encoder='none', vocoder='none'))
    write_jsonl(tmp_path / 'u.jsonl', [dict(units=[1, 2, 9], duration=[2, 1, 1])])
    init, out = f'--init={tmp_path}/slm', f'--out={tmp_path}/out'
    for flag in (f'--prompt={tmp_path}/u.jsonl', '--from_text=Once'):
        lines = run(init, out, flag, '--to=text', '--num_samples=2', '--max_new_tokens=9')
        texts = json.loads((tmp_path / 'out/sample.json').read_text())['texts']
        assert len(texts) == 2 and texts[1].splitlines()[-1] in '\n'.join(lines)
    done = run_script('sample.py', init, out, '--from_text=Once')
    assert done.returncode == 2 and 'none/vocoder.json' in done.stderr


MISTAKES = {
    'empty.wav': '--prompt=empty.wav',
    'absent.wav: no such file': '--prompt=absent.wav',
    'bad.jsonl, line 2': '--prompt=bad.jsonl',
    'odd.jsonl, line 1': '--prompt=odd.jsonl',
    'far: its units are not those from 0 to 39': '--prompt=far.jsonl',
    "no row has split 'val'; --split= takes all": '--prompt=train.jsonl',
    'different encoders': '--prompt=other/u.jsonl',
    'have different units': '--vocoder=small',
    '--resynth needs --prompt': '--resynth',
    'text goes without --resynth': '--to=text --html=page.html',
    'has no text': '--from_text=Once',
}


def test_mistakes_are_one_line(data, tmp_path):
    (tmp_path / 'empty.wav').touch()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/meta.json').write_text('{"encoder_id": "hubert50"}')
    (tmp_path / 'bad.jsonl').write_text('{"units": [1], "duration": [1]}\nnonsense\n')
    write_jsonl(tmp_path / 'odd.jsonl', [dict(units=[1, 2], duration=[1])])
    write_jsonl(tmp_path / 'far.jsonl', [dict(units=[3, 40], duration=[1, 1])])
    write_jsonl(tmp_path / 'train.jsonl', [dict(path='a.wav', split='train')])
    write_jsonl(tmp_path / 'other/u.jsonl', [dict(units=[1, 2], duration=[1, 1])])
    table = M.UnitTable(N_UNITS // 2, 25.0)
    table.add(speech(0, 2), torch.arange(50) % 20)
    table.finish(None).save_pretrained(tmp_path / 'small')
    for message, args in MISTAKES.items():
        args = [re.sub('=(.*[.]|small)', rf'={tmp_path}/\1', arg) for arg in args.split()]
        done = run_script('sample.py', f'--init={data["slm"]}', f'--out={tmp_path}/o', *args)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / 'o').exists()
