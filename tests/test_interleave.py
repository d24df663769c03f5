"""Token sets of speech and text for an interleaved model. Oracles: the frames themselves, and the
tokenizer. test_train.py, test_eval_slm.py and test_sample.py use such sets and models."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import run_script
from safetensors.torch import save_file

import prepare_units
from model import load_slm, read_tokenizer

UNITS, RATE = 20, 25.0
WORDS = 'the a dog cat Ünïcode naïve 🙂 ran. sat! under over tree, house'.split()


def write_text_lm(folder, size=300, rows=8):
    """A byte-level BPE as text LMs have it, and a config.json of an embedding with more rows."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=['<|endoftext|>'], show_progress=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator([' '.join(WORDS)] * 3, trainer)
    options = dict(tokenizer_object=tokenizer, eos_token='<|endoftext|>')
    fast = transformers.PreTrainedTokenizerFast(**options)
    fast.save_pretrained(folder)
    (folder / 'config.json').write_text(json.dumps(dict(vocab_size=len(fast) + rows)))


def make_rows(n, seed=0):
    """Utterances as units.jsonl has them, with words whose times fall between frames."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        words, now = [], float(rng.uniform(0, 0.2))
        for _ in range(rng.integers(1, 40)):
            end = now + float(rng.uniform(0.05, 0.4))
            words.append([WORDS[rng.integers(len(WORDS))], round(now, 3), round(end, 3)])
            now = end + float(rng.choice([0, 0.2]))
        frames = np.repeat(rng.integers(0, UNITS, 200), rng.integers(1, 4, 200))
        frames = frames[: math.ceil(now * RATE)]
        change = np.flatnonzero(np.diff(frames, prepend=-1))
        row = dict(file_name=f'{i}.wav', units=frames[change].tolist(), words=words)
        row['duration'] = np.diff(change, append=len(frames)).tolist()
        row['text'] = ' '.join(word for word, *_ in words)
        row['split'] = 'val' if i % 8 == 7 else 'train'
        rows.append(row)
    return rows


def prepare(place, rows, *flags):
    """The sets of some rows in place/data; returns what was printed."""
    with open(place / 'made.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    units = f'--from_units={place}/made.jsonl', f'--n_units={UNITS}', f'--out={place}/data'
    done = run_script('prepare_units.py', *units, '--val_fraction=0', *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A text LM's tokenizer, units, and the three sets that prepare_units.py makes of them."""
    place = tmp_path_factory.mktemp('interleave')
    write_text_lm(place / 'lm')
    prepare(place, make_rows(48), f'--text_lm={place}/lm', '--draws=3')
    return place


def read_set(place, name, split='train'):
    """(meta.json, documents) of a token set."""
    meta = json.loads((place / f'data/{name}/meta.json').read_text())
    tokens = np.fromfile(place / f'data/{name}/{split}.bin', meta['dtype']).astype(int)
    assert len(tokens) == meta['tokens'][split]
    documents = np.split(tokens, np.flatnonzero(tokens == meta['end']) + 1)
    assert not len(documents.pop()) and len(documents) == meta['utterances'][split]
    return meta, documents


def test_spans_are_poisson_and_a_share_of_the_words():
    speech = prepare_units.draw_spans(20_000, np.random.default_rng(0))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], speech, [0])).astype(int)))
    lengths = edges[1::2] - edges[::2]
    assert 0.3 <= speech.mean() < 0.3 + 30 / 20_000  # the last span alone goes beyond
    assert abs(lengths.mean() - 10) < 3 * math.sqrt(10 / len(lengths))
    for n in (1, 2, 5, 23):  # of few words a span is the larger part, and no word is favoured
        draws = [prepare_units.draw_spans(n, np.random.default_rng(i)) for i in range(300)]
        assert min(draw.mean() for draw in draws) > 0
        everywhere = np.mean(draws, axis=0)
        assert everywhere.max() - everywhere.min() < 0.2, everywhere


@pytest.mark.parametrize('split', ['train', 'val'])
def test_documents_are_utterances_in_spans(place, split):
    """Of each utterance three draws: its words in order, in spans of text and of the frames whose
    middles lie within their times."""
    meta, documents = read_set(place, 'interleaved', split)
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    rows = [(number, row) for number, row in enumerate(make_rows(48)) if row['split'] == split]
    wanted, shares = [], []
    for draw in range(3 if split == 'train' else 1):
        for number, row in rows:
            rng = np.random.default_rng((1234, draw, number))
            speech = prepare_units.draw_spans(len(row['words']), rng)
            frames, tokens = np.repeat(row['units'], row['duration']), []
            middles = (np.arange(len(frames)) + 0.5) / RATE
            for spoken, span in itertools.groupby(range(len(speech)), speech.__getitem__):
                words = [row['words'][i] for i in span]
                text = (' ' if tokens else '') + ' '.join(word for word, *_ in words)
                inside = frames[(words[0][1] <= middles) & (middles < words[-1][2])]
                units = inside[np.flatnonzero(np.diff(inside, prepend=-1))] + meta['offset']
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                tokens += [meta['vocab_size'] - 1 - spoken, *(units if spoken else ids)]
            wanted.append([*tokens, meta['end']])
            shares.append(speech.mean())
    assert [document.tolist() for document in documents] == wanted
    assert min(shares) > 0.29


def test_every_span_of_speech_has_a_unit():
    """Also where its words are shorter than a frame, or lie beyond the last one."""
    words = [['a', 0, 0.5], ['b', 0.501, 0.502], ['c', 0.51, 1.0], ['d', 7, 8]]
    row = dict(words=words, units=list(range(10)), duration=[3] * 10)
    meta = dict(frame_rate=RATE, vocab_size=100, offset=50)
    speech = np.array([False, True, False, True])
    tokens = prepare_units.interleave(row, speech, lambda text: SimpleNamespace(ids=[text]), meta)
    assert tokens == [99, 'a', 98, 50 + 13 // 3, 99, ' c', 98, 50 + 9]


def test_speech_and_text_sets(place):
    rows = [row for row in make_rows(48) if row['split'] == 'train']
    meta, documents = read_set(place, 'speech')
    assert meta['vocab_size'] == meta['offset'] + UNITS + 2 and meta['n_units'] == UNITS
    assert meta['tokenizer'] == '../tokenizer'
    assert (place / 'data/tokenizer/tokenizer.json').exists()
    for row, document in zip(rows, documents, strict=True):
        assert document[0] == meta['vocab_size'] - 2
        assert (document[1:-1] - meta['offset']).tolist() == row['units']
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    _, documents = read_set(place, 'text')
    for row, document in zip(rows, documents, strict=True):
        assert document[0] == meta['vocab_size'] - 1
        assert tokenizer.decode(document[1:-1].tolist()) == row['text']


def test_texts_of_every_format_come_back(place, tmp_path):
    """With spaces and lines within; <|endoftext|> ends a document wherever it stands."""
    import pyarrow
    import pyarrow.parquet

    texts = ['  two  spaces\n\n', 'ends <|endoftext|> not here', '日本語 and \t tabs', 'ﬁ\u200d🙂']
    with open(tmp_path / 'a.jsonl', 'w') as file:
        file.writelines(json.dumps(dict(text=text)) + '\n' for text in texts)
    pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), tmp_path / 'a.parquet')
    (tmp_path / 'a.txt').write_text('One.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>Three.')
    (tmp_path / 'b.txt').write_text('One\nline.\n \n\nTwo.')
    names = ','.join(f'{tmp_path}/{name}' for name in ('a.jsonl', 'a.parquet', 'a.txt', 'b.txt'))
    prepare(tmp_path, make_rows(4), f'--texts={names}', '--draws=1', f'--text_lm={place}/lm')
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    _, documents = read_set(tmp_path, 'text')
    found = [tokenizer.decode(document[1:-1].tolist()) for document in documents]
    rows = ['two  spaces', 'ends', 'not here', *texts[2:]]  # the mark ends a document here too
    assert found == [*rows, *rows, 'One.\n\nStill one.', 'Two.', 'Three.', 'One\nline.', 'Two.']


def test_what_the_sets_need_is_printed(place, tmp_path):
    rows = [{k: v for k, v in row.items() if k != 'words'} for row in make_rows(4)]
    printed = prepare(tmp_path, rows, f'--text_lm={place}/lm')
    assert '0 tokens; rows of units.jsonl need' in printed
    (tmp_path / 'bare').mkdir()
    flags = f'--out={tmp_path}/data', f'--from_units={tmp_path}/made.jsonl', f'--n_units={UNITS}'
    done = run_script('prepare_units.py', *flags, '--val_fraction=0', f'--text_lm={tmp_path}/bare')
    assert done.returncode == 2 and 'tokenizer.json' in done.stderr


def test_sims_layout_has_units_behind_the_text_tokens(place, tmp_path):
    """slprl/SIMS-7B: the tokens of the text LM's tokenizer, units, <speech>, <text>."""
    shutil.copytree(place / 'lm', tmp_path, dirs_exist_ok=True)
    sizes = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=48, vocab_size=20_100)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    state = {f'lm.{name}': tensor for name, tensor in hf.state_dict().items()}
    save_file(state, tmp_path / 'model.safetensors')
    about = dict(model_type='speech_language_model', base_model_name='x', vocab_size=20_100)
    (tmp_path / 'config.json').write_text(json.dumps(about | dict(base_config=hf.config.to_dict())))
    ours = load_slm(str(tmp_path)).eval()
    first = len(transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert ours.slam['n_units'] == 20_100 - 2 - first
    tokens = ours.tokens_of([('speech', [3, 1]), ('text', [5])])
    assert tokens.tolist() == [20_098, first + 3, first + 1, 20_099, 5]
    with torch.no_grad():
        got, expected = ours(tokens[None]), hf(tokens[None]).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
