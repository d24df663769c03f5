"""Speech and text in one model: the token sets, the enlarged vocabulary, likelihoods across the
two, and public interleaved checkpoints. Oracles: the frames themselves, and transformers."""

import json
import math
import os
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import eval_slm
import prepare_units
import train
from model import SLM, InputError, SLMConfig, UnitTable, read_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UNITS, RATE = 20, 25.0
WORDS = 'the a dog cat Ünïcode naïve 🙂 ran. sat! under over tree, house'.split()
TINY = [
    *('--context=64', '--row_tokens=128', '--batch_tokens=256', '--val_data=', '--warmup_steps=2'),
    *(
        '--max_steps=6',
        '--eval_interval=3',
        '--save_interval=3',
        '--log_interval=1',
        '--device=cpu',
    ),
    *('--train_hours=9', '--balanced', '--embed_init=random'),
]


def run_script(monkeypatch, name, *flags):
    """A script in this process; what a user can mend is raised as InputError."""
    monkeypatch.setattr(sys, 'argv', [name + '.py', *flags])
    monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    try:
        runpy.run_path(os.path.join(ROOT, name + '.py'), run_name='__main__')
    except SystemExit as end:
        return end.code or 0
    return 0


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def write_tokenizer(folder, size=300, bos=None):
    """A byte-level BPE as text LMs have it; bos: what it puts before all text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ['<|endoftext|>', *([bos] if bos else [])]
    options = dict(special_tokens=special, show_progress=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator([' '.join(WORDS)] * 3, trainer)
    if bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f'{bos} $A', None, ids)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
    fast.save_pretrained(folder)
    return len(fast)


def write_text_lm(folder, size=300, rows=8, tied=True):
    """A random text LM whose embedding has more rows than its tokenizer tokens -> the model."""
    size = write_tokenizer(folder, size)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=size + rows, tie_word_embeddings=tied)
    config = transformers.Qwen2Config(**shape, initializer_range=0.3, max_position_embeddings=128)
    lm = transformers.Qwen2ForCausalLM(config).eval()
    lm.save_pretrained(folder)
    return lm


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
        row |= dict(duration=np.diff(change, append=len(frames)).tolist())
        row |= dict(
            text=' '.join(word for word, *_ in words), split='val' if i % 8 == 7 else 'train'
        )
        rows.append(row)
    return rows


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A text LM, units, and the three sets that prepare_units.py makes of them."""
    place = tmp_path_factory.mktemp('interleave')
    write_text_lm(place / 'lm')
    with open(place / 'made.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in make_rows(48))
    flags = (f'--from_units={place}/made.jsonl', f'--n_units={UNITS}', f'--out={place}/data')
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, 'prepare_units', *flags, f'--text_lm={place}/lm', '--draws=3') == 0
    return place


@pytest.fixture(scope='module')
def checkpoint(place):
    """An interleaved model of that text LM, six steps on all three sets."""
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, 'train', *TINY, *training(place), f'--out_dir={place}/slm') == 0
    return str(place / 'slm')


def training(place):
    data = ','.join(f'{place}/data/{name}' for name in ('speech', 'text', 'interleaved'))
    return f'--init={place}/lm', f'--data={data}'


def read_set(place, name, split='train'):
    """(meta.json, documents) of a token set."""
    meta = json.loads(read(place / f'data/{name}/meta.json'))
    tokens = np.fromfile(place / f'data/{name}/{split}.bin', meta['dtype']).astype(int)
    assert len(tokens) == meta['tokens'][split]
    documents = np.split(tokens, np.flatnonzero(tokens == meta['end']) + 1)
    assert not len(documents.pop()) and len(documents) == meta['utterances'][split]
    return meta, documents


# -----------------------------------------------------------------------------
# Token sets


def test_spans_are_poisson_and_a_share_of_the_words():
    speech = prepare_units.draw_spans(20_000, np.random.default_rng(0))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], speech, [0])).astype(int)))
    lengths = edges[1::2] - edges[::2]
    assert 0.3 <= speech.mean() < 0.3 + 30 / 20_000  # the last span alone goes beyond
    assert abs(lengths.mean() - 10) < 3 * math.sqrt(10 / len(lengths))
    assert abs(lengths.var() - 10) < 4 * 10 * math.sqrt(2 / len(lengths))
    for n in (1, 2, 5, 23):  # of few words a span is the larger part, and no word is favoured
        draws = [prepare_units.draw_spans(n, np.random.default_rng(i)) for i in range(300)]
        assert min(draw.mean() for draw in draws) > 0
        everywhere = np.mean(draws, axis=0)
        assert everywhere.max() - everywhere.min() < 0.2, everywhere


def test_units_of_a_span_are_the_frames_between_its_word_times():
    for row in make_rows(20, seed=1):
        frames = np.repeat(row['units'], row['duration'])
        for (_, start, _), (_, _, end) in zip(row['words'], row['words'][3:], strict=False):
            inside = [u for i, u in enumerate(frames) if start <= (i + 0.5) / RATE < end]
            wanted = [u for i, u in enumerate(inside) if i == 0 or u != inside[i - 1]]
            assert prepare_units.units_between(row, start, end, RATE).tolist() == wanted


@pytest.mark.parametrize('split', ['train', 'val'])
def test_documents_are_utterances_in_spans(place, split):
    """Of each utterance three draws: its words in their order, each as text or as its frames."""
    meta, documents = read_set(place, 'interleaved', split)
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    speech, text = meta['vocab_size'] - 2, meta['vocab_size'] - 1
    rows = [row for row in make_rows(48) if row['split'] == split]
    assert len(documents) == len(rows) * (3 if split == 'train' else 1)
    shares = []
    for number, document in enumerate(documents):
        row, at, spoken = rows[number % len(rows)], 0, 0
        starts = np.flatnonzero(document >= speech)
        assert starts[0] == 0 and document[-1] == meta['end']
        for start, stop in zip(starts, [*starts[1:], len(document) - 1], strict=True):
            inside = document[start + 1 : stop]
            if document[start] == text:
                said = tokenizer.decode(inside.tolist())
                n = len(said.split())
                assert said == (' ' if at else '') + ' '.join(w for w, *_ in row['words'][at:][:n])
            else:
                # as many words as make these units: the next span says where it ends
                later = document[stop + 1 :] if stop < len(document) - 1 else []
                following = next((i for i, x in enumerate(later) if x >= speech), len(later))
                rest = tokenizer.decode([x for x in later[:following] if x != meta['end']]).split()
                n = len(row['words']) - at
                if rest:
                    ends = range(at + 1, len(row['words']))
                    spans = [e for e in ends if fits(row, at, e, inside - meta['offset'], rest)]
                    n = spans[0] - at
                assert fits(row, at, at + n, inside - meta['offset'], rest)
                spoken += n
            at += n
        assert at == len(row['words'])
        shares.append(spoken / at)
    assert min(shares) > 0.29 or len(min(rows, key=lambda r: len(r['words']))['words']) < 5
    if split == 'train':
        draws = np.array_split(np.arange(len(documents)), 3)
        same = [np.array_equal(documents[a], documents[b]) for a, b in zip(*draws[:2], strict=True)]
        assert np.mean(same) < 0.5  # of one word there is one draw


def fits(row, first, end, units, following):
    """Are these the units of words first .. end - 1, and do these words follow?"""
    words = row['words']
    wanted = prepare_units.units_between(row, words[first][1], words[end - 1][2], RATE)
    here = [word for word, *_ in words[end:][: len(following)]]
    return np.array_equal(units, wanted) and here == following


def test_speech_and_text_sets(place):
    rows = [row for row in make_rows(48) if row['split'] == 'train']
    meta, documents = read_set(place, 'speech')
    offset = meta['offset']
    assert meta['vocab_size'] == offset + UNITS + 2 and meta['n_units'] == UNITS
    for row, document in zip(rows, documents, strict=True):
        assert document[0] == meta['vocab_size'] - 2
        assert (document[1:-1] - offset).tolist() == row['units']
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    _, documents = read_set(place, 'text')
    for row, document in zip(rows, documents, strict=True):
        assert document[0] == meta['vocab_size'] - 1
        assert tokenizer.decode(document[1:-1].tolist()) == row['text']


def test_text_comes_back_byte_by_byte(place, tmp_path, monkeypatch):
    """Any text: of other files, with the names of special tokens in it, spaces and lines."""
    texts = ['  two  spaces\n\n', 'ends <|endoftext|> not here', '日本語 and \t tabs', 'ﬁ\u200d🙂']
    with open(tmp_path / 'texts.jsonl', 'w') as file:
        file.writelines(json.dumps(dict(text=text)) + '\n' for text in texts)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), tmp_path / 'texts.parquet')
    (tmp_path / 'tiny.txt').write_text('One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n')
    (tmp_path / 'blank.txt').write_text('One\nline.\n\n\nTwo.')
    wanted = [*texts, *texts, 'One.\n\nStill one.', 'Two.', 'One\nline.', 'Two.']
    names = ','.join(f'{tmp_path}/{name}' for name in ('texts.jsonl', 'texts.parquet', 'tiny.txt'))
    flags = (f'--texts={names},{tmp_path}/blank.txt', '--val_fraction=0', '--draws=1')
    flags += (f'--from_units={place}/made.jsonl', f'--n_units={UNITS}', f'--out={tmp_path}/data')
    assert run_script(monkeypatch, 'prepare_units', *flags, f'--text_lm={place}/lm') == 0
    tokenizer, _, _ = read_tokenizer(place / 'lm')
    _, documents = read_set(tmp_path, 'text')
    found = [tokenizer.decode(document[1:-1].tolist()) for document in documents]
    assert found == wanted


def test_what_the_sets_need_is_said(place, tmp_path, monkeypatch, capsys):
    rows = [{k: v for k, v in row.items() if k != 'words'} for row in make_rows(4)]
    with open(tmp_path / 'made.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    flags = (f'--from_units={tmp_path}/made.jsonl', f'--n_units={UNITS}', f'--out={tmp_path}/data')
    assert run_script(monkeypatch, 'prepare_units', *flags, f'--text_lm={place}/lm') == 0
    said = capsys.readouterr().out
    assert '0 tokens; no train set, rows of units.jsonl need words' in said
    with pytest.raises(InputError, match='has nothing in its split train'):
        train.open_data(f'{tmp_path}/data/interleaved')
    (tmp_path / 'bare').mkdir()
    shutil.copy(place / 'lm/config.json', tmp_path / 'bare')
    with pytest.raises(Exception, match='tokenizer.json is missing'):
        run_script(monkeypatch, 'prepare_units', *flags, f'--text_lm={tmp_path}/bare')


# -----------------------------------------------------------------------------
# Training


def test_documents_begin_after_an_end():
    tokens = np.array([9, 1, 1, 3, 0, 9, 1, 0, 8, 0])
    assert train.find_utterances(tokens, 3, 0).tolist() == [0, 5, 8]
    assert train.find_utterances(tokens[:-1], end=0).tolist() == [0, 5, 8]
    begins, lengths = train.find_chunks(tokens, 3, 0)
    assert begins.tolist() == [0, 3, 5, 8] and lengths.tolist() == [3, 2, 3, 2]


def test_balanced_weights_are_shares_of_the_tokens(place):
    sets = [
        train.DataSet(str(place / 'data' / name), weight, read_set(place, name)[0])
        for name, weight in (('speech', 1.0), ('text', 1.0), ('interleaved', 2.0))
    ]
    loader = train.Loader(train.balance(sets), 64, 128, seed=0)
    seen = np.zeros(3)
    for epoch in range(20):
        order = loader.order(epoch)
        source = np.searchsorted(loader.first, order, 'right') - 1
        seen += np.bincount(source, loader.lengths[order], 3)
    assert np.allclose(seen / seen.sum(), [0.25, 0.25, 0.5], atol=0.01)
    whole = sum(meta['tokens']['train'] for _, _, meta in sets)
    assert seen.sum() / 20 == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize('embed_init', ['first_rows', 'random', 'mean'])
@pytest.mark.parametrize('tied', [True, False])
def test_enlarged_vocabulary_against_transformers(tmp_path, tied, embed_init):
    """Text as the text LM has it; saved, transformers' own class gives the same logits."""
    lm = write_text_lm(tmp_path / 'lm', tied=tied)
    rows, (_, end, digest) = lm.config.vocab_size, read_tokenizer(tmp_path / 'lm')
    text = dict(offset=rows, tokenizer_sha256=digest, text_lm='lm')
    size = rows + UNITS + 2
    options = dict(vocab_size=size, embed_init=embed_init, text=text)
    ours = SLM.from_pretrained(str(tmp_path / 'lm'), **options).eval()
    for weight, old in (
        (ours.embed.weight, lm.get_input_embeddings().weight),
        (ours.head.weight, lm.get_output_embeddings().weight),
    ):
        assert torch.equal(weight[:rows], old)
        new = dict(first_rows=old[: UNITS + 2], mean=old.mean(0).expand(UNITS + 2, -1))
        if embed_init in new:
            torch.testing.assert_close(weight[rows:], new[embed_init])
        else:
            assert 0.015 < weight[rows:].std() < 0.025
    tokens = torch.randint(0, rows, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[..., :rows], lm(tokens).logits, atol=1e-4, rtol=0)
    slam = dict(tokenizer=str(tmp_path / 'lm'), offset=rows, end=end, n_units=UNITS)
    ours.save_pretrained(tmp_path / 'ours', slam)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
    tokens = torch.randint(0, size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
    assert hf.config.eos_token_id == end
    again = SLM.from_pretrained(str(tmp_path / 'ours'))
    assert (again.offset, again.end, again.slam['n_units']) == (rows, end, UNITS)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert read(tmp_path / 'ours/tokenizer' / name) == read(tmp_path / 'lm' / name)


def test_training_keeps_what_a_checkpoint_needs(place, checkpoint):
    slam = json.loads(read(f'{checkpoint}/slam.json'))
    meta = read_set(place, 'text')[0]
    assert slam['tokenizer'] == 'tokenizer' and slam['text_lm'] == str(place / 'lm')
    assert (slam['offset'], slam['end']) == (meta['offset'], meta['end'])
    shutil.copytree(checkpoint, place / 'moved', dirs_exist_ok=True)
    slm = SLM.from_pretrained(str(place / 'moved'))
    assert slm.tokenizer.decode(slm.encode_text('the dog', inside=True)) == ' the dog'
    with open(f'{checkpoint}/log.jsonl') as file:
        last = [json.loads(line) for line in file][-1]
    assert {'val_loss_speech', 'val_loss_text', 'val_loss_interleaved'} <= set(last)


def test_resumed_is_the_same_run(place, checkpoint, monkeypatch):
    out = f'--out_dir={place}/halves'
    for steps in (3, 6):
        flags = [flag for flag in TINY if not flag.startswith('--max_steps')]
        flags += [*training(place), out, f'--max_steps={steps}', '--schedule=inverse_sqrt']
        assert run_script(monkeypatch, 'train', *flags, '--warmup_fraction=0') == 0
    flags = [*TINY, *training(place), f'--out_dir={place}/whole', '--schedule=inverse_sqrt']
    assert run_script(monkeypatch, 'train', *flags, '--warmup_fraction=0') == 0
    weights = [read(place / name / 'model.safetensors') for name in ('halves', 'whole')]
    assert weights[0] == weights[1]


def test_data_and_model_of_different_text_are_refused(place, checkpoint, tmp_path, monkeypatch):
    def refused(*flags):
        with pytest.raises(Exception) as error:
            run_script(monkeypatch, 'train', *TINY, f'--out_dir={tmp_path}/out', *flags)
        assert type(error.value).__name__ == 'InputError'
        return str(error.value)

    init, data = training(place)
    write_text_lm(tmp_path / 'other', size=290, rows=18)  # as many rows, another tokenizer
    assert 'different tokenizers' in refused(f'--init={tmp_path}/other', data)
    write_text_lm(tmp_path / 'longer', rows=9)  # the same tokenizer, another embedding
    assert 'different tokenizers' in refused(f'--init={tmp_path}/longer', data)
    assert 'text and units, the data hold units alone' in refused(
        f'--init={checkpoint}', f'--data={place}/data'
    )
    size = dict(n_layer=1, n_embd=8, n_head=1, n_kv_head=1, n_ffn=8, vocab_size=UNITS + 2)
    SLM(SLMConfig(**size)).save_pretrained(tmp_path / 'units', dict(n_units=UNITS))
    assert 'units alone, the data hold text and units' in refused(f'--init={tmp_path}/units', data)
    made = (f'--from_units={place}/made.jsonl', f'--n_units={UNITS}', f'--out={tmp_path}/data')
    run_script(monkeypatch, 'prepare_units', *made, f'--text_lm={tmp_path}/other')
    mixed = f'--data={place}/data/speech,{tmp_path}/data/text'
    assert 'only like units mix' in refused(init, mixed)
    assert 'different tokenizers' in refused(f'--init={checkpoint}', f'--data={tmp_path}/data/text')
    assert 'only like units mix' in refused(init, f'--data={place}/data,{place}/data/text')


# -----------------------------------------------------------------------------
# Likelihoods and generation


def test_speech_is_scored_behind_its_switch(checkpoint):
    slm = SLM.from_pretrained(checkpoint).eval()
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    units = [3, 7, 7, 1]
    (total,), (n,) = eval_slm.log_likelihoods(slm, [units])
    ids = [slm.config.vocab_size - 2, *(unit + slm.offset for unit in units), slm.end]
    ids = torch.tensor([ids])
    with torch.no_grad():
        assert total / n == pytest.approx(-hf(ids, labels=ids).loss.item(), abs=2e-5) and n == 5
    with pytest.raises(InputError, match='unit 20 is none of the 20'):
        eval_slm.log_likelihoods(slm, [[20, 1]])


@pytest.mark.parametrize('to', ['text', 'speech'])
def test_an_ending_alone_is_scored_in_the_other_modality(checkpoint, to):
    slm = SLM.from_pretrained(checkpoint).eval()
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    words = slm.encode_text('the dog ran.', inside=to == 'text')
    units = np.array([3, 7, 2, 1, 19])
    (total,), (n,) = eval_slm.log_likelihoods(slm, [(units, words, to)])
    V = slm.config.vocab_size
    spoken, written = [V - 2, *(units + slm.offset)], [V - 1, *words]
    begin, end = (spoken, written) if to == 'text' else (written, spoken)
    ids = torch.tensor([[*begin, *end]])
    labels = ids.clone()
    labels[:, : len(begin) + 1] = -100
    with torch.no_grad():
        wanted = -hf(ids, labels=labels).loss.item()
    assert total / n == pytest.approx(wanted, abs=2e-5) and n == len(end) - 1


def test_where_stories_part():
    a = 'He is in. It is dead. He is sad and digs.'.split()
    assert eval_slm.find_ending(a, 'He is in. It is dead. He is glad.'.split()) == 6
    assert eval_slm.find_ending(a, 'He is out. It is dead.'.split()) == 2
    assert eval_slm.find_ending(a, a) == len(a)


def test_stories_are_cut_at_word_times(tmp_path):
    words = [['A', 0.0, 0.2], ['dog.', 0.2, 0.5], ['It', 0.7, 0.9], ['ran.', 0.9, 1.2]]
    other = [['A', 0.0, 0.2], ['dog.', 0.2, 0.6], ['He', 0.8, 1.0], ['sat.', 1.0, 1.3]]
    rows = [dict(path='0_correct.wav', words=words), dict(path='0_incorrect.wav', words=other)]
    with open(tmp_path / 'manifest.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    files = [str(tmp_path / row['path']) for row in rows]
    pair = eval_slm.make_pair('0', *(eval_slm.Clip((file,)) for file in files))
    suite = eval_slm.Suite([pair])
    (found,) = eval_slm.cross(suite, str(tmp_path), 'text').pairs
    begin = eval_slm.Clip((files[0],), 0.5)
    assert found['pos'] == (begin, 'It ran.', 'text') and found['neg'] == (begin, 'He sat.', 'text')
    (found,) = eval_slm.cross(suite, str(tmp_path), 'speech').pairs
    assert found['neg'] == (eval_slm.Clip((files[1],), start=0.8), 'A dog.', 'speech')
    mutual = str(tmp_path / '0_mutual.wav')
    pair = eval_slm.make_pair('0', *(eval_slm.Clip((mutual, file)) for file in files))
    with pytest.raises(InputError, match='0_correct.wav: no ending known'):
        eval_slm.cross(eval_slm.Suite([pair]), str(tmp_path), 'speech')
    os.remove(tmp_path / 'manifest.jsonl')
    with pytest.raises(InputError, match='no ending known'):
        eval_slm.cross(suite, str(tmp_path), 'text')


@pytest.mark.parametrize('kind', ['speech', 'text'])
def test_generation_stays_in_its_modality(checkpoint, kind):
    slm = SLM.from_pretrained(checkpoint).eval()
    slm.slam['end'] = slm.end
    prompt = slm.tokens_of([('speech', [1, 2, 3]), ('text', [])][: 1 + (kind == 'text')])
    new = slm.generate([prompt] * 8, 40, temperature=2.0, top_k=0, seed=0, kind=kind)
    tokens = torch.cat(new)
    assert len(tokens) and slm.end not in tokens
    if kind == 'text':
        assert int(tokens.max()) < slm.offset
    else:
        assert int(tokens.min()) >= slm.offset and int(tokens.max()) < slm.offset + UNITS


def test_samples_across_modalities(place, checkpoint, tmp_path, monkeypatch, capsys):
    """sample.py: from units to words, printed and in sample.json; from words to sound."""
    table = UnitTable(UNITS, RATE)
    noise = 0.1 * torch.randn(8 * 16000, generator=torch.Generator().manual_seed(0))
    table.add(noise, torch.arange(UNITS).repeat_interleave(10))
    table.finish().save_pretrained(tmp_path / 'vocoder')
    flags = (f'--init={checkpoint}', f'--vocoder={tmp_path}/vocoder', '--temperature=2')
    flags += (f'--out={tmp_path}/out', '--device=cpu', '--top_k=0')
    heard = (f'--prompt={place}/made.jsonl', '--max_prompts=2', '--num_samples=2')
    assert run_script(monkeypatch, 'sample', *flags, *heard, '--to=text') == 0
    texts = json.loads(read(tmp_path / 'out/sample.json'))['texts']
    assert len(texts) == 4 and any(texts)
    printed = capsys.readouterr().out
    assert all(f'|{text}' in printed for text in texts)
    assert run_script(monkeypatch, 'sample', *flags, '--from_text=the dog ran.') == 0
    (row,) = [json.loads(line) for line in read(tmp_path / 'out/units.jsonl').splitlines()]
    assert row['units'] and max(row['units']) < UNITS and row['prompt_units'] == 0
    assert os.path.getsize(tmp_path / 'out/from_text/full.wav') > 1000


# -----------------------------------------------------------------------------
# Public interleaved checkpoints


@pytest.mark.parametrize('bos', [None, '<|begin|>'])
def test_public_interleaved_layout(tmp_path, bos):
    """slprl/SIMS-*: the text LM's tokens, the units, <speech>, <text>; under `lm.`, tokens 0 and 1
    named as padding and ends whatever they are. Speech is scored as its units alone."""
    first = write_tokenizer(tmp_path, bos=bos)
    torch.manual_seed(0)
    size = first + 500 + 2
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    hf = transformers.Qwen2Config(**shape, num_key_value_heads=2, initializer_range=0.3)
    hf.vocab_size = size = max(size, 20_001)
    lm = transformers.Qwen2ForCausalLM(hf).eval()
    tensors = {'lm.' + name: tensor.contiguous() for name, tensor in lm.state_dict().items()}
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / 'model.safetensors')
    base = hf.to_dict() | dict(vocab_size=first, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    config = dict(model_type='speech_language_model', base_config=base, vocab_size=size)
    config |= dict(base_model_name='Qwen/Qwen2.5-0.5B', twist_init=True)
    (tmp_path / 'config.json').write_text(json.dumps(config))

    slm = SLM.from_pretrained(str(tmp_path)).eval()
    assert slm.offset == first and slm.slam['n_units'] == size - 2 - first
    prefix = [1] if bos else []
    units = [3, 499, 7, 1]
    (total,), (n,) = eval_slm.log_likelihoods(slm, [units])
    ids = torch.tensor([[*prefix, *(unit + first for unit in units)]])
    with torch.no_grad():
        wanted = -lm(ids, labels=ids).loss.item()
    assert total / n == pytest.approx(wanted, abs=2e-5) and n == len(ids[0]) - 1
    text = slm.encode_text('the cat sat!', inside=True)
    tokens = slm.tokens_of([('speech', units), ('text', text)]).tolist()
    assert tokens == [*prefix, size - 2, *ids[0, len(prefix) :].tolist(), size - 1, *text]
    slm.save_pretrained(tmp_path / 'ours')
    assert SLM.from_pretrained(str(tmp_path / 'ours')).encode_text('the') == slm.encode_text('the')
    os.remove(tmp_path / 'tokenizer.json')
    with pytest.raises(InputError, match='copy tokenizer.json.*of its text LM, Qwen/Qwen2.5-0.5B'):
        SLM.from_pretrained(str(tmp_path))
