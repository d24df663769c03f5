"""train.py: rows and their order, the loss of a step, schedules, optimizers, exact resumption,
processes, signals, and mistakes of the user."""

from config import read_block, run_config

import contextlib
import itertools
import math
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, fork_script, read_jsonl, run_checked, run_in_two, small_slm, write_jsonl
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import model
import train
from model import BOS, OFFSET, load_slm

SMALL = dict(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, n_ffn=64)
TINY = [
    *('train.py', '--init=scratch', *(f'--{key}={value}' for key, value in SMALL.items())),
    *('--context=32', '--row_tokens=64', '--batch_tokens=256', '--max_steps=40', '--lr=5e-3'),
    *('--train_hours=0', '--warmup_steps=5', '--eval_interval=20', '--save_interval=20'),
    *('--log_interval=1', '--grad_clip=1', '--val_data=', '--device=cpu'),
]
inside = partial(run_checked, *TINY)


def small_model():
    return small_slm(22, context=32, sizes=SMALL)


def write_set(folder, utterances, val=(), units=20, **more):
    """A folder as prepare_units.py leaves it."""
    os.makedirs(f'{folder}/encoder')
    counts = {}
    for split, rows in (('train', utterances), ('val', val)):
        tokens = [token for row in rows for token in (BOS, *(int(u) + OFFSET for u in row), BOS)]
        np.array(tokens, np.uint16).tofile(f'{folder}/{split}.bin')
        counts[split] = len(tokens)
    meta = dict(vocab_size=units + OFFSET, n_units=units, offset=OFFSET, dtype='uint16')
    meta |= dict(tokens=counts, dedup=True, frame_rate=25.0, encoder_id='abc')
    meta |= dict(encoder='encoder', vocoder='hifigan25')
    write_jsonl(f'{folder}/meta.json', [meta | more])
    write_jsonl(f'{folder}/encoder/encoder.json', [{}])
    return str(folder)


def walks(n, seed, longest=100, units=20):
    """Utterances in which the next unit is often the one after: something to learn."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, n)
    return [np.cumsum(rng.choice([1, 1, 1, 2, 5], size)) % units for size in sizes]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp('data') / 'units', walks(150, 0), walks(10, 1))


def log_of(out):
    return read_jsonl(f'{out}/log.jsonl')


def losses(out):
    return [row['loss'] for row in log_of(out)]


def weights_of(out):
    with open(f'{out}/model.safetensors', 'rb') as file:
        return file.read()


def first_epoch(loader):
    """Its rows, as arrays of chunks."""
    rows = itertools.takewhile(lambda row: row[1][0] == 0, loader.iter_rows())
    return [chunks for chunks, _ in rows]


def test_chunks_against_the_plain_definition(data):
    [[_, _, _, tokens]] = train.open_data(data)
    expected, at = [], 0
    for length in (len(row) + 2 for row in walks(150, 0)):
        for begin in range(0, length, 32):
            if min(32, length - begin) > 1:  # one token would predict nothing
                expected.append((at + begin, min(32, length - begin)))
        at += length
    for block in (1, 7, 1 << 22):
        begins, lengths = train.find_chunks(tokens, 32, block=block)
        assert list(zip(begins, lengths, strict=True)) == expected


def test_rows_hold_whole_chunks_as_the_file_has_them(data):
    loader = train.Loader(train.open_data(data), 32, 64, seed=3)
    file = np.fromfile(os.path.join(data, 'train.bin'), np.uint16)
    seen = np.zeros(len(loader.lengths), int)
    for chunks in first_epoch(loader):
        tokens, targets, doc = loader.collate(chunks)
        at = 0
        for i in chunks:
            piece = file[loader.begins[i] : loader.begins[i] + loader.lengths[i]]
            end = at + len(piece)
            assert (tokens[at:end] == piece).all()
            assert (targets[at:end] == [*piece[1:], -100]).all()
            assert len(set(doc[at:end])) == 1
            seen[i] += 1
            at = end
        assert at <= 64 and (tokens[at:] == 0).all() and (targets[at:] == -100).all()
        # no chunk shares its document, and no document of padding is longer than the context
        documents, sizes = np.unique(doc, return_counts=True)
        assert len(documents) == len(chunks) + (documents < 0).sum() and sizes.max() <= 32
    assert (seen == 1).all()


def test_rows_are_full(tmp_path):
    """Stories of 45 to 90 s: chunks of 1,024 and remainders."""
    lengths = np.random.default_rng(1).integers(800, 1500, 4000)
    folder = write_set(tmp_path / 'lengths', [np.zeros(length - 2) for length in lengths])
    loader = train.Loader(train.open_data(folder), 1024, 8192, 0)
    filled = sorted(loader.lengths[chunks].sum() for chunks in first_epoch(loader))
    # the last rows of a block take what is left; a run has hundreds of rows in a block
    assert filled[-1] <= 8192 and np.mean(filled[len(filled) // 200 :]) > 0.99 * 8192


def test_the_arithmetic_of_the_recipes():
    """Whole rows for one and two processes, and the tokens of the paper."""
    names = read_block(f'{ROOT}/train.py')[1]
    paper = dict(slam_a5000=1.4e9, slam_h200=1.4e9, slam_scaled=16.7e9, slam_large=6.1e9)
    for name, tokens in paper.items():
        knobs = {key: getattr(train, key) for key in names}
        knobs |= run_config(f'{ROOT}/config/{name}.py', knobs)
        assert knobs['batch_tokens'] % (2 * knobs['row_tokens']) == 0
        assert knobs['batch_tokens'] * knobs['max_steps'] == pytest.approx(tokens, rel=0.035)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_the_rows_in_one_order_and_resume(data, world, monkeypatch):
    monkeypatch.setattr(train, 'BLOCK_ROWS', 5)
    sets = train.open_data(data)
    whole, place = train.Loader(sets, 32, 64, 5), None
    rows = [chunks for chunks, _ in itertools.islice(whole.iter_rows(), 6 * 60)]
    parts = [train.Loader(sets, 32, 64, 5).iter_batches(6, rank, world) for rank in range(world)]
    for n in range(60):  # into the third epoch
        if n in (1, 8, 31, 59):  # a checkpoint keeps three integers
            assert [type(number) for number in place] == [int] * 3
            parts[0] = train.Loader(sets, 32, 64, 5, place).iter_batches(6, 0, world)
        batches = [next(part) for part in parts]
        expected = [whole.collate(chunks) for chunks in rows[6 * n : 6 * n + 6]]
        predicted = np.array([(row[1] >= 0).sum() for row in expected])
        for i, row in enumerate(expected):
            own, shares, n_tokens, place = batches[i % world]
            assert (own[i // world].numpy() == row).all()
            assert shares[i // world] == pytest.approx(predicted[i] / predicted.sum())
            assert n_tokens == sum((row[2] >= 0).sum() for row in expected)
            assert place == batches[0][3]
    assert place[0] >= 2


def test_mixture_takes_weights_and_repeats_nothing_early(tmp_path):
    a, b = (write_set(tmp_path / name, walks(n, n)) for name, n in (('a', 30), ('b', 40)))
    loader = train.Loader(train.open_data(f'{a}:2,{b}:0.5'), 32, 64, 0)
    n = np.diff(loader.first)
    orders = [loader.order(epoch) for epoch in range(4)]
    for order in orders:
        first = order[order < n[0]]
        for half in (first[: n[0]], first[n[0] :]):  # all have come before one comes again
            assert sorted(half) == list(range(n[0]))
        assert len(np.unique(np.flatnonzero(order < n[0]) // 8)) > 5  # mixed, not one by one
    for pair in (orders[:2], orders[2:]):
        shown = np.concatenate(pair)
        assert sorted(shown[shown >= n[0]]) == list(range(n[0], n.sum()))


def test_balanced_weights_are_shares_of_tokens(tmp_path):
    """3 to 1, and an epoch as long as both sets."""
    a, b = (write_set(tmp_path / name, walks(n, n)) for name, n in (('a', 30), ('b', 40)))
    sets = train.balance(train.open_data(f'{a}:3,{b}'))
    loader = train.Loader(sets, 32, 64, 0)
    order = np.concatenate([loader.order(epoch) for epoch in range(10)])
    tokens = [loader.lengths[order[(order >= loader.first[1]) == s]].sum() for s in (False, True)]
    assert tokens[0] / tokens[1] == pytest.approx(3, rel=0.02)
    assert sum(tokens) == pytest.approx(10 * sum(len(each.tokens) for each in sets), rel=0.02)


def test_loss_and_gradient_are_those_of_unpacked_utterances(data, tmp_path):
    """A packed batch against each chunk alone through transformers, a mean over all predictions."""
    rows, shares, *_ = next(train.Loader(train.open_data(data), 32, 64, 0).iter_batches(6))
    ours, packed = small_model(), 0
    for (tokens, targets, doc), share in zip(rows, shares, strict=True):
        part = ours(tokens[None], targets[None], doc=doc[None]) * share
        part.backward()
        packed += part.item()

    ours.save_pretrained(tmp_path, {})
    theirs, alone = AutoModelForCausalLM.from_pretrained(tmp_path), 0
    chunks = [tokens[doc == d] for tokens, _, doc in rows for d in doc.unique() if d >= 0]
    total = sum(len(chunk) - 1 for chunk in chunks)
    for chunk in chunks:
        part = theirs(chunk[None], labels=chunk[None]).loss * (len(chunk) - 1) / total
        part.backward()
        alone += part.item()
    assert packed == pytest.approx(alone, rel=1e-5)
    expected = dict(theirs.named_parameters())['model.layers.1.mlp.down_proj.weight'].grad
    torch.testing.assert_close(ours.blocks[1].down.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_validation_is_the_mean_over_tokens(data, monkeypatch, tmp_path):
    other = write_set(tmp_path / 'other', walks(5, 0), walks(30, 7, 20))
    for knob, value in (('context', 32), ('row_tokens', 64)):
        monkeypatch.setattr(train, knob, value)
    sets = train.open_data(f'{data}:2,{other}', 'val')
    net = small_model()
    rows = train.collate_validation(sets)
    scores = train.validate(net, rows, torch.device('cpu'), contextlib.nullcontext())
    nats, counts = [], []
    for each in sets:
        found = zip(*train.find_chunks(each.tokens, 32), strict=True)
        pieces = [torch.from_numpy(each.tokens[b : b + n].astype(np.int64)) for b, n in found]
        losses = [cross_entropy(net(x[None])[0, :-1], x[1:], reduction='sum') for x in pieces]
        nats.append(sum(losses).item())
        counts.append(sum(len(piece) - 1 for piece in pieces))
    assert scores['val_loss_units'] == pytest.approx(nats[0] / counts[0], rel=1e-5)
    assert scores['val_loss_other'] == pytest.approx(nats[1] / counts[1], rel=1e-5)
    assert scores['val_loss'] == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert net.training


def test_schedules_match_their_closed_forms(monkeypatch):
    peak, low = 1e-3, 5e-5
    knobs = dict(max_steps=1000, lr=peak, min_lr=low, warmup_steps=100, warmup_fraction=0.01)

    def rate(kind, step, progress=None, **changes):
        for knob, value in {**knobs, 'schedule': kind, **changes}.items():
            monkeypatch.setattr(train, knob, value)
        return train.learning_rate(step, step / 1000 if progress is None else progress)

    for kind in ('cosine', 'inverse_sqrt'):
        rates = [rate(kind, step) for step in (0, 49, 99)]
        assert rates == pytest.approx([peak / 100, peak / 2, peak])
    for step in (100, 300, 550, 999):
        cosine = low + (peak - low) * (1 + math.cos(math.pi * (step - 100) / 900)) / 2
        assert rate('cosine', step) == pytest.approx(cosine)
        assert rate('inverse_sqrt', step) == pytest.approx(peak * math.sqrt(100 / step))
    # the hours are ahead of the steps: cosine follows them, inverse_sqrt does not
    assert rate('cosine', 300, 0.55) == pytest.approx((peak + low) / 2)
    assert rate('inverse_sqrt', 300, 1.0) == rate('inverse_sqrt', 300)
    # the longer warm-up holds; without one the time scale is 10,000 steps
    assert rate('cosine', 99, warmup_fraction=0.2) == pytest.approx(peak / 2)
    late = rate('inverse_sqrt', 500, warmup_fraction=0, warmup_steps=0)
    assert late == pytest.approx(peak * math.sqrt(10_000 / 10_500))


@pytest.mark.parametrize(('name', 'rate'), dict(adamw=5e-3, adalomo=5e-2, ademamix=5e-3).items())
def test_each_optimizer_lowers_the_loss_and_resumes(name, rate, data, tmp_path):
    """Bit for bit, dropout included."""
    if name == 'ademamix':
        pytest.importorskip('pytorch_optimizer')
    flags = f'--data={data}', f'--optimizer={name}', f'--lr={rate}', '--dropout=0.1'
    flags += '--schedule=inverse_sqrt', '--warmup_fraction=0', '--eval_interval=0'
    for out, stops in (('once', [24]), ('twice', [16, 24])):
        for stop in stops:
            inside(*flags, f'--out_dir={tmp_path}/{out}', f'--max_steps={stop}')
    curve = losses(tmp_path / 'once')
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.2 and losses(tmp_path / 'twice') == curve


def test_adalomo_is_that_of_its_authors(data, monkeypatch):
    """Against pytorch_optimizer's, which steps inside the backward pass."""
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    monkeypatch.setattr(train, 'optimizer', 'adalomo')
    monkeypatch.setattr(train, 'lr', 1e-2)
    rows, *_ = next(train.Loader(train.open_data(data), 32, 64, 0).iter_batches(4))
    tokens, targets, doc = rows.transpose(0, 1)
    nets = small_model(), small_model()
    for net in nets:  # untied: theirs steps once for each use of a parameter
        net.head.weight = torch.nn.Parameter(net.head.weight.detach().clone())
    ours, theirs = nets
    optimizer = train.make_optimizer(ours)
    reference = pytorch_optimizer.AdaLOMO(theirs, lr=1e-2, weight_decay=0.0, loss_scale=0)
    for _ in range(5):
        ours(tokens, targets, doc=doc).backward()
        optimizer.step()
        ours.zero_grad()
        reference.fused_backward(theirs(tokens, targets, doc=doc), 1e-2)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope='module')
def forty(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('run') / 'slm')
    return out, inside(f'--data={data}', f'--out_dir={out}')


def test_a_run_learns_and_leaves_a_checkpoint(forty, data):
    out, done = forty
    rows, curve = log_of(out), losses(out)
    assert len(curve) == 40 and np.mean(curve[-5:]) < curve[0] - 0.2
    # whole rows, nearly full: 256 tokens a step
    assert rows[-1]['tokens'] == pytest.approx(40 * 256, rel=0.05)
    assert {'lr', 'norm', 'tokens_per_s', 'elapsed'} <= set(rows[0])
    assert [row['step'] for row in rows if 'val_loss' in row] == [20, 40]
    assert rows[-1]['val_loss'] == rows[-1]['val_loss_units'] < rows[19]['val_loss']
    loader = train.Loader(train.open_data(data), 32, 64, 0)
    assert f'{loader.dropped} tokens dropped' in done.stdout

    ours = load_slm(out)
    slam = ours.slam
    assert os.path.exists(os.path.join(out, slam['encoder'], 'encoder.json'))
    assert slam['vocoder'] == 'hifigan25' and slam['n_units'] == 20 and slam['dedup'] is True
    assert slam['encoder_id'] == 'abc' and slam['stage'] == 'pretraining'
    assert slam['recipe']['max_steps'] == 40
    assert slam['scores']['val_loss'] == rows[-1]['val_loss']
    assert slam['compute']['tokens'] == rows[-1]['tokens'] and slam['compute']['devices'] == 1
    tokens = torch.arange(1, 12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    torch.testing.assert_close(ours(tokens), theirs, atol=1e-5, rtol=1e-4)

    written = os.stat(f'{out}/model.safetensors').st_mtime_ns
    inside(f'--data={data}', f'--out_dir={out}')  # it is left alone
    assert os.stat(f'{out}/model.safetensors').st_mtime_ns == written


@pytest.mark.parametrize(
    ('name', 'times', 'code'),
    [('SIGKILL', 1, -9), ('SIGTERM', 1, 143), ('SIGINT', 1, 130), ('SIGINT', 2, -2)],
)
def test_a_stopped_run_resumes_bit_for_bit(forty, data, tmp_path, name, times, code):
    """The first Ctrl-C or SIGTERM saves; the second ends the run at once."""
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}'
    about = dict(at='step 25/', number=getattr(signal, name), times=times)
    process = fork_script(*TINY, *flags, **about)
    process.join()
    assert process.exitcode == code
    saved = torch.load(out + '/train_state.pt', weights_only=True)['step']
    with open(out + '/log.jsonl') as file:
        assert saved == 20 if code < 0 else saved == len(file.readlines()) >= 25
    with open(out + '/log.jsonl', 'a') as file:
        file.write('{"step": 2')  # incomplete
    assert f'continuing at step {saved}' in inside(*flags).stdout
    assert losses(out) == losses(forty[0])
    assert weights_of(out) == weights_of(forty[0])


def test_two_processes_are_one_also_when_they_go_on(data, tmp_path):
    """And a run that is made longer reports how its learning rate changes."""
    flags, one = (f'--data={data}', '--eval_interval=6'), str(tmp_path / 'one')
    inside(*flags, f'--out_dir={one}', '--max_steps=12')
    two = str(shutil.copytree(one, tmp_path / 'two'))
    run_in_two(*TINY, *flags, f'--out_dir={two}', '--max_steps=20')
    printed = inside(*flags, f'--out_dir={one}', '--max_steps=20').stdout
    assert 'step 12: the learning rate was 2.95e-04, now it is 2.78e-03' in printed
    for ours, theirs in zip(log_of(two), log_of(one), strict=True):
        for key in ('loss', 'tokens', 'val_loss'):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), abs=1e-5)
    assert load_slm(two).slam['compute']['devices'] == 2


def test_the_clock_is_an_extra_limit(data, tmp_path):
    """A limit of no time ends the run at its first report, with a checkpoint; 0 is no limit."""
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}', '--log_interval=2', '--eval_interval=0'
    for _ in range(2):  # the second time there is nothing to do
        inside(*flags, '--max_steps=1000000', '--train_hours=1e-12')
        assert log_of(out)[-1]['step'] == 2
    assert os.path.exists(f'{out}/model.safetensors')
    inside(*flags, '--max_steps=4')
    assert log_of(out)[-1]['step'] == 4


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    flags = f'--data={data}', f'--out_dir={tmp_path}/slm', '--grad_clip=0', '--eval_interval=0'
    inside(*flags, '--max_steps=3')
    before = weights_of(tmp_path / 'slm')
    state = torch.load(f'{tmp_path}/slm/train_state.pt', weights_only=True)
    state['model']['embed.weight'][5] = math.nan
    torch.save(state, f'{tmp_path}/slm/train_state.pt')
    done = inside(*flags, mistake='not finite at step 4')
    assert 'last checkpoint is kept' in done.stderr and weights_of(tmp_path / 'slm') == before


@pytest.fixture(scope='module')
def places(data, forty, tmp_path_factory):
    """Folders that do not fit."""
    place = tmp_path_factory.mktemp('places')
    write_set(place / 'other', walks(3, 0), units=30)
    write_set(place / 'encoded', walks(3, 0), encoder_id='xyz')
    write_set(place / 'changed', walks(150, 7), walks(10, 1))
    os.truncate(write_set(place / 'broken', walks(3, 0)) + '/train.bin', 20)
    shutil.rmtree(write_set(place / 'bare', walks(3, 0)) + '/encoder')
    small_slm(9).save_pretrained(place / 'small')
    sizes = dict(vocab_size=22, hidden_size=32, word_embed_proj_dim=32, num_attention_heads=2)
    sizes |= dict(max_position_embeddings=48, num_hidden_layers=1, ffn_dim=48)
    opt = transformers.OPTConfig(**sizes)
    transformers.OPTForCausalLM(opt).save_pretrained(place / 'opt')
    return dict(data=data, forty=forty[0], place=place)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--schedule=linear', "schedule 'linear' is unknown"),
        ('--batch_tokens=100', 'batch_tokens=100 is no multiple of 1 x row_tokens=64'),
        ('--data=nowhere', 'nowhere'),
        ('--data={data},{place}/other', 'differ in vocab_size'),
        ('--data={data},{place}/encoded', 'different encoders'),
        ('--data={place}/broken', 'does not fit its meta.json'),
        ('--data={place}/bare', 'no folder encoder/'),
        ('--init={place}/opt --context=64', 'no more than 48 positions'),
        ('--init={place}/small', 'have different tokenizers or vocabularies'),
        ('--init={forty} --out_dir={forty}', 'would be overwritten'),
        ('--out_dir={forty} --lr=0.1', 'is a run with lr=0.005, not 0.1'),
        ('--out_dir={forty} --data={place}/changed', 'is a run with data'),
    ],
)
def test_a_mistake_is_one_line(flags, message, places, tmp_path):
    defaults = f'--data={places["data"]}', f'--out_dir={tmp_path}'
    inside(*defaults, *flags.format(**places).split(), mistake=message)
    assert not os.path.exists(f'{tmp_path}/train_state.pt')


def test_a_folder_in_use_is_refused(forty, data):
    with model.open_run(forty[0], dict(step=40), False, ())[1]:
        flags = f'--data={data}', f'--out_dir={forty[0]}', '--max_steps=42'
        inside(*flags, mistake='another process is training')
