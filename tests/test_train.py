"""train.py: rows and their order, the loss of a step, the schedule, optimizers, exact resumption,
processes, steps that are not finite, signals, and what a user can get wrong."""

from config import read_block, report_error, run_config

import contextlib
import io
import itertools
import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from model import BOS, OFFSET, SLM, InputError, SLMConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)
ENV = dict(os.environ, OMP_NUM_THREADS='1')
SMALL = dict(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, n_ffn=64)
TINY = [
    *('--init=scratch', *(f'--{key}={value}' for key, value in SMALL.items())),
    *('--context=32', '--row_tokens=64', '--batch_tokens=256', '--max_steps=40', '--lr=5e-3'),
    *('--train_hours=9', '--warmup_steps=5', '--eval_interval=20', '--save_interval=20'),
    *('--log_interval=1', '--grad_clip=1', '--val_data=', '--device=cpu'),
]


def small_model(**changes):
    return SLM(SLMConfig(**SMALL | dict(vocab_size=22, context=32) | changes))


def write_set(folder, utterances, val=(), units=20):
    """A folder as prepare_units.py leaves it."""
    os.makedirs(os.path.join(folder, 'encoder'), exist_ok=True)
    counts = {}
    for split, rows in (('train', utterances), ('val', val)):
        tokens = [token for row in rows for token in (BOS, *(int(u) + OFFSET for u in row), BOS)]
        np.array(tokens, np.uint16).tofile(os.path.join(folder, split + '.bin'))
        counts[split] = len(tokens)
    meta = dict(vocab_size=units + OFFSET, n_units=units, offset=OFFSET, dtype='uint16')
    meta |= dict(tokens=counts, dedup=True, frame_rate=25.0)
    meta |= dict(encoder='encoder', vocoder='hifigan25')
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(meta, file)
    with open(os.path.join(folder, 'encoder', 'encoder.json'), 'w') as file:
        file.write('{}')
    return str(folder)


def walks(n, seed, longest=100, units=20):
    """Utterances in which the next unit is often the one after: something to learn."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, n)
    return [np.cumsum(rng.choice([1, 1, 1, 2, 5], size)) % units for size in sizes]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp('data') / 'units'), walks(150, 0), walks(10, 1))


def command(*args, processes=1):
    launch = []
    if processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [sys.executable, *launch, 'train.py', *TINY, *args]


def start(*args, **options):
    """The program as a process of its own, its output as pipes of text."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(*args), cwd=ROOT, env=ENV, **pipes | options)


def run(*args, processes=1, **options):
    return subprocess.run(
        command(*args, processes=processes),
        **dict(cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300) | options,
    )


def inside(monkeypatch, capsys, *args):
    """The program in this process: exit code, and the lines on stdout and on stderr."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *TINY, *args])
    monkeypatch.setattr(sys, 'excepthook', report_error)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    code = 0
    try:
        runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
    except SystemExit as end:
        code = end.code
    except Exception:
        with pytest.raises(SystemExit) as end:
            sys.excepthook(*sys.exc_info())
        code = end.value.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def log_of(out):
    with open(os.path.join(out, 'log.jsonl')) as file:
        return [json.loads(line) for line in file]


def losses(out):
    return [row['loss'] for row in log_of(out)]


def read(path):
    with open(path, 'rb') as file:
        return file.read()


# -----------------------------------------------------------------------------
# Chunks, rows, steps


def make_loader(tmp_path, lengths, context=1024, row_tokens=8192, seed=0):
    """A loader over utterances of so many tokens, random units."""
    folder = str(tmp_path / 'lengths')
    units = np.random.default_rng(0).integers(0, 20, max(lengths))
    write_set(folder, [units[: length - 2] for length in lengths])
    return train.Loader(train.open_data(folder), context, row_tokens, seed)


def epoch_of(loader, epoch=0):
    """The rows of an epoch, as arrays of chunks."""
    begin = train.Loader.rows(loader)
    return [
        chunks
        for chunks, _ in itertools.takewhile(
            lambda row: row[1][0] <= epoch,
            itertools.dropwhile(lambda row: row[1][0] < epoch, begin),
        )
    ]


def test_chunks_against_the_plain_definition(data):
    tokens = train.open_tokens(data, train.open_data(data)[0][2], 'train')
    expected, at = [], 0
    for row in walks(150, 0):
        length = len(row) + 2
        for begin in range(0, length, 32):
            if min(32, length - begin) > 1:  # one token would predict nothing
                expected.append((at + begin, min(32, length - begin)))
        at += length
    begins, lengths = train.find_chunks(tokens, 32)
    assert list(zip(begins, lengths, strict=True)) == expected
    starts = np.cumsum([0] + [len(row) + 2 for row in walks(150, 0)])[:-1]
    for block in (1, 7, 1 << 22):
        assert (train.find_utterances(tokens, block) == starts).all()
    assert (train.find_utterances(tokens.astype(np.uint32), 64) == starts).all()


def test_rows_hold_whole_chunks_as_the_file_has_them(data):
    loader = train.Loader(train.open_data(data), 32, 64, seed=3)
    file = np.fromfile(os.path.join(data, 'train.bin'), np.uint16)
    seen = np.zeros(len(loader.lengths), int)
    for chunks in epoch_of(loader):
        tokens, targets, doc = loader.lay_out(chunks)
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
        # nothing shares a document with another chunk or with the padding, of which no document
        # is longer than the context (learned positions)
        documents, sizes = np.unique(doc, return_counts=True)
        padding = documents < 0
        assert len(documents) == len(chunks) + padding.sum() and sizes.max() <= 32
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ('draw', 'row_tokens'),
    [
        # stories of 45 to 90 s and voice-activity cuts up to 60 s: 1,024 and remainders
        (lambda rng, n: rng.integers(800, 1500, n), 8192),
        (lambda rng, n: np.clip(rng.lognormal(6.3, 0.5, n), 20, 1400), 8192),
        (lambda rng, n: rng.integers(60, 240, n), 8192),
        (lambda rng, n: rng.integers(800, 1500, n), 40960),
    ],
)
def test_rows_are_full(tmp_path, draw, row_tokens):
    lengths = draw(np.random.default_rng(1), 4000).astype(int).tolist()
    loader = make_loader(tmp_path, lengths, row_tokens=row_tokens)
    rows = epoch_of(loader)
    filled = [loader.lengths[chunks].sum() for chunks in rows]
    assert max(filled) <= row_tokens
    # the last rows of a block take what is left; a run has hundreds of rows to a block
    best = sorted(filled)[max(1, len(filled) // 200) :]
    assert np.mean(best) > 0.99 * row_tokens


def test_a_step_has_batch_tokens_within_one_percent(tmp_path):
    """The arithmetic of config/slam_a5000.py on lengths of real speech."""
    names = runpy.run_path(os.path.join(ROOT, 'config', 'slam_a5000.py'))
    lengths = np.clip(np.random.default_rng(1).lognormal(6.5, 0.5, 6000), 20, 1400).astype(int)
    loader = make_loader(tmp_path, lengths.tolist(), names['context'], names['row_tokens'])
    rows = names['batch_tokens'] // names['row_tokens']
    steps = list(itertools.islice(loader.steps(rows), 40))
    mean = np.mean([step['tokens'] for step in steps])
    assert abs(mean / names['batch_tokens'] - 1) < 0.01
    assert names['batch_tokens'] == pytest.approx(128 * 620, rel=0.05)
    assert names['batch_tokens'] * names['max_steps'] == pytest.approx(1.4e9, rel=0.05)


@pytest.mark.parametrize(
    ('name', 'world', 'tokens'),
    [
        ('slam_a5000', 1, 1.4e9),
        ('slam_h200', 1, 1.4e9),
        ('slam_scaled', 2, 16.7e9),
        ('slam_large', 2, 6.1e9),
        ('twist_350m', 1, None),
        ('twist_350m_stinystories', 1, None),
        ('gslm', 1, None),
        ('demo', 1, None),
    ],
)
def test_the_arithmetic_of_the_recipes(name, world, tokens, monkeypatch):
    """Knobs that train.py has, whole rows for the processes, and the paper's tokens."""
    monkeypatch.chdir(ROOT)
    knobs = {key: getattr(train, key) for key in configuration_names()}
    knobs |= run_config(f'config/{name}.py', knobs)
    assert set(knobs) == set(configuration_names())
    assert knobs['batch_tokens'] % (knobs['row_tokens'] * world) == 0
    assert knobs['context'] <= knobs['row_tokens']
    if tokens:
        assert knobs['batch_tokens'] * knobs['max_steps'] == pytest.approx(tokens, rel=0.035)


def configuration_names():
    return read_block(os.path.join(ROOT, 'train.py'))[1]


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_the_same_rows_in_the_same_order(data, world):
    sets = train.open_data(data)
    whole = train.Loader(sets, 32, 64, 5)
    rows = [chunks for chunks, _ in itertools.islice(whole.rows(), 6 * 60)]
    parts = [train.Loader(sets, 32, 64, 5).steps(6, rank, world) for rank in range(world)]
    for n in range(60):  # into the third epoch
        steps = [next(part) for part in parts]
        laid = [whole.lay_out(chunks) for chunks in rows[6 * n : 6 * n + 6]]
        for i, row in enumerate(laid):
            assert (steps[i % world]['passes'][i // world].numpy() == row).all()
        assert {step['total'] for step in steps} == {sum((row[1] >= 0).sum() for row in laid)}
        assert {step['tokens'] for step in steps} == {sum((row[2] >= 0).sum() for row in laid)}
        assert len({step['place'] for step in steps}) == 1
        predicted = [sum(step['predicted']) for step in steps]
        assert sum(predicted) == steps[0]['total']
    assert steps[0]['place'][0] >= 2


def test_a_place_is_three_integers_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'BLOCK_ROWS', 5)
    loader = make_loader(tmp_path, [20] * 100, 32, 64)
    assert len(loader.blocks(0)) > 3
    steps = list(itertools.islice(loader.steps(4), 60))
    for n in (0, 7, 30, 58):
        loader.place = steps[n]['place']
        assert [type(part) for part in loader.place] == [int] * 3
        assert (next(loader.steps(4))['passes'] == steps[n + 1]['passes']).all()
    assert len({step['place'] for step in steps}) == 60 and steps[-1]['place'][0] >= 2


def test_epochs_differ_and_seeds_too(data):
    loader = train.Loader(train.open_data(data), 32, 64, 0)
    other = train.Loader(train.open_data(data), 32, 64, 1)
    orders = [loader.order(0), loader.order(1), other.order(0)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_mixture_takes_weights_and_repeats_nothing_early(tmp_path):
    folders = [
        write_set(str(tmp_path / name), walks(n, seed))
        for name, n, seed in (('a', 30, 1), ('b', 40, 2))
    ]
    loader = train.Loader(train.open_data(f'{folders[0]}:2,{folders[1]}:0.5'), 32, 64, 0)
    n = np.diff(loader.first)
    shown = []
    for epoch in range(4):
        order = loader.order(epoch)
        first = order[order < n[0]]
        for half in (first[: n[0]], first[n[0] :]):  # all have come before one comes again
            assert sorted(half) == list(range(n[0]))
        shown.append(order[order >= n[0]])
        assert len(np.unique(np.flatnonzero(order < n[0]) // 8)) > 5  # mixed, not one by one
    for pair in (shown[:2], shown[2:]):
        assert sorted(np.concatenate(pair)) == list(range(n[0], n.sum()))


# -----------------------------------------------------------------------------
# The loss of a step


def test_loss_and_gradient_are_those_of_unpacked_utterances(data):
    """A packed step against each chunk alone through transformers, a mean over all predictions."""
    import tempfile

    from transformers import AutoModelForCausalLM

    step = next(train.Loader(train.open_data(data), 32, 64, 0).steps(6))
    model = small_model()
    packed = 0
    for (tokens, targets, doc), predicted in zip(step['passes'], step['predicted'], strict=True):
        part = model(tokens[None], targets[None], doc=doc[None]) * predicted / step['total']
        part.backward()
        packed += part.item()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, {})
        theirs = AutoModelForCausalLM.from_pretrained(folder)
    chunks = []
    for tokens, _, doc in step['passes']:
        chunks += [tokens[doc == d] for d in doc.unique() if d >= 0]
    total = sum(len(chunk) - 1 for chunk in chunks)
    alone = 0
    for chunk in chunks:
        part = theirs(chunk[None], labels=chunk[None]).loss * (len(chunk) - 1) / total
        part.backward()
        alone += part.item()
    assert packed == pytest.approx(alone, rel=1e-5)
    for ours, name in (
        (model.embed.weight, 'model.embed_tokens.weight'),
        (model.blocks[1].down.weight, 'model.layers.1.mlp.down_proj.weight'),
    ):
        expected = dict(theirs.named_parameters())[name].grad
        torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-7)


def test_validation_is_the_mean_over_tokens(data, monkeypatch, tmp_path):
    other = write_set(str(tmp_path / 'other'), walks(5, 0), walks(30, 7, 20))
    for knob, value in (('context', 32), ('row_tokens', 64)):
        monkeypatch.setattr(train, knob, value)
    rows = train.open_validation(train.open_data(f'{data}:2,{other}', split='val'))
    model = small_model()
    scores = train.validate(model, rows, torch.device('cpu'), contextlib.nullcontext())
    sums, counts = [], []
    for folder in (data, other):
        loader = train.Loader(train.open_data(folder), 32, 64, 0, split='val')
        tokens = [
            loader.tokens[0][b : b + n] for b, n in zip(loader.begins, loader.lengths, strict=True)
        ]
        tokens = [torch.from_numpy(piece.astype(np.int64)) for piece in tokens]
        logps = [model(piece[None])[0, :-1].log_softmax(-1) for piece in tokens]
        nats = [-p.gather(1, piece[1:, None]).sum() for p, piece in zip(logps, tokens, strict=True)]
        sums.append(sum(nats).item())
        counts.append(sum(len(piece) - 1 for piece in tokens))
    assert scores['val_loss_units'] == pytest.approx(sums[0] / counts[0], rel=1e-5)
    assert scores['val_loss_other'] == pytest.approx(sums[1] / counts[1], rel=1e-5)
    assert scores['val_loss'] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert model.training


def test_totals_leave_out_what_is_not_finite():
    totals = torch.zeros(5)
    for loss, norm in (
        (1.0, 2.0),
        (math.nan, math.nan),
        (3.0, math.inf),
        (5.0, 4.0),
        (1, math.nan),
    ):
        totals = train.add_up(totals, torch.tensor([loss, norm]))
    assert totals.tolist() == [6, 6, 2, 3, 1]


# -----------------------------------------------------------------------------
# The schedule


def test_schedules_match_their_closed_forms(monkeypatch):
    n, peak, low = 1000, 1e-3, 5e-5
    knobs = dict(max_steps=n, lr=peak, min_lr=low, warmup_steps=100, warmup_fraction=0.01)
    for knob, value in knobs.items():
        monkeypatch.setattr(train, knob, value)

    def rate(step, kind, progress=None):
        monkeypatch.setattr(train, 'schedule', kind)
        return train.learning_rate(step, step / n if progress is None else progress)

    for kind in ('cosine', 'inverse_sqrt', 'wsd'):
        rates = [rate(step, kind) for step in (0, 49, 99)]
        assert rates == pytest.approx([peak / 100, peak / 2, peak])
    for step in (100, 300, 550, 999):
        cosine = low + (peak - low) * (1 + math.cos(math.pi * (step - 100) / 900)) / 2
        assert rate(step, 'cosine') == pytest.approx(cosine)
        assert rate(step, 'inverse_sqrt') == pytest.approx(peak * math.sqrt(100 / step))
    assert rate(800, 'wsd') == pytest.approx(peak)
    assert rate(900, 'wsd') == pytest.approx((peak + low) / 2)
    # the hours are ahead of the steps: the decay follows them, inverse_sqrt does not
    assert rate(300, 'cosine', 0.55) == pytest.approx((peak + low) / 2)
    assert rate(300, 'cosine', 1.0) == rate(300, 'wsd', 1.0) == pytest.approx(low)
    assert rate(300, 'inverse_sqrt', 1.0) == rate(300, 'inverse_sqrt')
    # the longer warm-up holds; without one the time scale is 10,000 steps
    monkeypatch.setattr(train, 'warmup_fraction', 0.2)
    assert rate(99, 'cosine') == pytest.approx(peak / 2)
    for knob in ('warmup_fraction', 'warmup_steps'):
        monkeypatch.setattr(train, knob, 0)
    assert rate(500, 'inverse_sqrt') == pytest.approx(peak * math.sqrt(10_000 / 10_500))
    with pytest.raises(InputError, match='cosine'):
        rate(1, 'linear')


def test_the_clock_is_an_extra_limit(data, tmp_path):
    """A limit of no time ends the run at its first report, with a checkpoint; 0 is no limit."""
    out = str(tmp_path / 'slm')
    flags = (f'--data={data}', f'--out_dir={out}', '--log_interval=2', '--eval_interval=0')
    done = run(*flags, '--max_steps=1000000', '--train_hours=1e-12')
    assert done.returncode == 0, done.stderr
    assert log_of(out)[-1]['step'] == 2 and os.path.exists(f'{out}/model.safetensors')
    assert 'finished before' in run(*flags, '--max_steps=1000000', '--train_hours=1e-12').stdout
    done = run(*flags, '--max_steps=4', '--train_hours=0')
    assert done.returncode == 0 and log_of(out)[-1]['step'] == 4, done.stderr


# -----------------------------------------------------------------------------
# Optimizers


PACKAGES = dict(ademamix='pytorch_optimizer', adamw8bit='bitsandbytes')


def train_some(model, optimizers, steps):
    """Plain steps -> their losses."""
    curve = []
    for step in steps:
        tokens, targets, doc = step['passes'].transpose(0, 1)
        loss = model(tokens, targets, doc=doc)
        loss.backward()
        for each in optimizers:
            each.step()
        model.zero_grad()
        curve.append(loss.item())
    return curve


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'ademamix', 'adalomo', 'adamw8bit'])
def test_each_optimizer_lowers_the_loss_and_resumes(name, data, monkeypatch):
    monkeypatch.setattr(train, 'optimizer', name)
    monkeypatch.setattr(train, 'lr', 5e-2 if name == 'adalomo' else 5e-3)
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    source = train.Loader(train.open_data(data), 32, 64, 0).steps(4)
    steps = list(itertools.islice(source, 40))
    model = small_model()
    optimizers = train.make_optimizers(model)
    curve = train_some(model, optimizers, steps[:30])
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.3, curve
    again = small_model()
    again.load_state_dict(model.state_dict())
    fresh = train.make_optimizers(again)
    for new, old in zip(fresh, optimizers, strict=True):
        new.load_state_dict(through_a_file(old.state_dict()))
    assert train_some(again, fresh, steps[30:]) == train_some(model, optimizers, steps[30:])


def test_adalomo_is_that_of_its_authors(data, monkeypatch):
    """Against pytorch_optimizer's, which steps inside the backward pass."""
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    monkeypatch.setattr(train, 'optimizer', 'adalomo')
    monkeypatch.setattr(train, 'lr', 1e-2)
    step = next(train.Loader(train.open_data(data), 32, 64, 0).steps(4))
    tokens, targets, doc = step['passes'].transpose(0, 1)
    ours, theirs = small_model(tied=False), small_model(tied=False)
    theirs.load_state_dict(ours.state_dict())
    [optimizer] = train.make_optimizers(ours)
    reference = pytorch_optimizer.AdaLOMO(theirs, lr=1e-2, weight_decay=0.0, loss_scale=0)
    for _ in range(5):
        ours(tokens, targets, doc=doc).backward()
        optimizer.step()
        ours.zero_grad()
        reference.fused_backward(theirs(tokens, targets, doc=doc), 1e-2)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_a_missing_package_and_an_unknown_name_are_one_line(monkeypatch):
    for name, package in PACKAGES.items():
        monkeypatch.setattr(train, 'optimizer', name)
        for module in (package, package + '.optim'):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match='pip install'):
            train.make_optimizers(small_model())
    monkeypatch.setattr(train, 'optimizer', 'sgd')
    with pytest.raises(InputError, match='adamw'):
        train.make_optimizers(small_model())


# -----------------------------------------------------------------------------
# The program


@pytest.fixture(scope='module')
def forty(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('run') / 'slm')
    done = run(f'--data={data}', f'--out_dir={out}', '--save_init')
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_learns_and_leaves_a_checkpoint(forty, data):
    from transformers import AutoModelForCausalLM

    out, done = forty
    rows = log_of(out)
    curve = losses(out)
    assert len(curve) == 40 and np.mean(curve[-5:]) < curve[0] - 0.2
    # whole rows, nearly full: 256 tokens a step
    assert [row['tokens'] for row in rows][-1] == pytest.approx(40 * 256, rel=0.05)
    n_params = small_model().num_params()
    assert rows[-1]['flops'] == 6 * n_params * rows[-1]['tokens']
    assert [row['step'] for row in rows if 'val_loss' in row] == [20, 40]
    assert rows[-1]['val_loss'] == rows[-1]['val_loss_units'] < rows[19]['val_loss']
    assert done.stdout.splitlines()[-1].startswith(
        f'{out}: 40 steps, {rows[-1]["tokens"]:,} tokens'
    )

    slam = json.loads(read(out + '/slam.json'))
    assert os.path.exists(os.path.join(out, slam['encoder'], 'encoder.json'))
    assert slam['vocoder'] == 'hifigan25' and slam['n_units'] == 20 and slam['dedup'] is True
    assert slam['stage'] == 'pretraining' and slam['recipe']['max_steps'] == 40
    assert slam['scores']['val_loss'] == rows[-1]['val_loss'] and 'git_commit' in slam
    assert slam['compute']['tokens'] == rows[-1]['tokens'] and slam['compute']['devices'] == 1
    assert 0 < slam['compute']['hours'] == pytest.approx(rows[-1]['elapsed'] / 3600, abs=1e-5)

    model = SLM.from_pretrained(out)
    tokens = torch.arange(1, 12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, atol=1e-5, rtol=1e-4)
    untrained = SLM.from_pretrained(os.path.join(os.path.dirname(out), 'untrained'))
    assert (untrained.embed.weight != model.embed.weight).any()
    assert SLM.from_pretrained(out + '/best').slam['scores']['val_loss'] == rows[-1]['val_loss']


def test_the_banner_says_what_the_data_mean_for_the_run(forty, data):
    """Counted by hand on the tokens of the file."""
    tokens = np.fromfile(os.path.join(data, 'train.bin'), np.uint16)
    pieces = []
    for row in walks(150, 0):
        full, rest = divmod(len(row) + 2, 32)
        pieces += [32] * full + [rest] * (rest > 1)
    before = [reach for length in pieces for reach in range(1, length)]
    [line] = [line for line in forty[1].stdout.splitlines() if 'tokens an epoch' in line]
    total = sum(pieces)
    assert len(tokens) - 150 <= total and line.startswith(f'{total:,} tokens an epoch')
    assert f'{np.mean(before):.0f} before a prediction' in line
    assert f'{256 * len(pieces) / total:.0f} chunks' in line
    assert f'{40 * 256 / total:.3g} epochs' in line
    assert 'WARNING' not in forty[1].stdout


def test_the_banner_warns_of_many_epochs_and_a_long_warm_up(data, tmp_path, monkeypatch, capsys):
    loader = train.Loader(train.open_data(data), 32, 64, 0)
    warnings = [line for line in train.describe(loader) if 'WARNING' in line]
    tokens = int(loader.lengths.sum())
    assert len(warnings) == 1 and f'{17625 * 81920 / tokens:,.0f} epochs' in warnings[0]
    monkeypatch.setattr(train, 'max_steps', 50)
    monkeypatch.setattr(train, 'batch_tokens', 64)
    [warning] = train.describe(loader)[1:]
    assert 'warm-up of 100 steps' in warning


# the kill comes from within: from without it would come at another step on a busy machine
KILLED_AT_STEP_25 = """
import os, runpy, signal, sys
sys.argv = {argv!r}
import model

def say_and_die(text, rank=0, say=model.say):
    say(text, rank)
    if text.startswith('step 25/'):
        os.kill(os.getpid(), signal.SIGKILL)

model.say = say_and_die
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_killed_and_resumed_is_the_same_run_bit_for_bit(forty, data, tmp_path):
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}', '--save_init'
    body = KILLED_AT_STEP_25.format(argv=['train.py', *TINY, *flags])  # five after its checkpoint
    killed = subprocess.run([sys.executable, '-c', body], cwd=ROOT, env=ENV, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and len(losses(out)) == 25
    with open(out + '/log.jsonl', 'a') as file:
        file.write('{"step": 2')  # torn
    resumed = run(f'--data={data}', f'--out_dir={out}', '--save_init')
    assert resumed.returncode == 0 and 'going on at step 20' in resumed.stdout, resumed.stderr
    assert losses(out) == losses(forty[0])
    for name in ('model.safetensors', 'best/model.safetensors'):
        assert read(f'{out}/{name}') == read(f'{forty[0]}/{name}')


def test_dropout_resumes_bit_for_bit_too(data, tmp_path, monkeypatch, capsys):
    flags = f'--data={data}', '--dropout=0.2', '--save_interval=5', '--eval_interval=0'
    for name, stops in (('once', [12]), ('twice', [5, 12])):
        for stop in stops:
            flag = f'--max_steps={stop}', f'--out_dir={tmp_path}/{name}', '--schedule=inverse_sqrt'
            code, _, err = inside(monkeypatch, capsys, *flags, *flag, '--warmup_fraction=0')
            assert code == 0, err
    weights = [read(f'{tmp_path}/{name}/model.safetensors') for name in ('once', 'twice')]
    assert weights[0] == weights[1]


def test_two_processes_are_one(forty, data, tmp_path):
    done = run(f'--data={data}', f'--out_dir={tmp_path}/slm', processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(f'{tmp_path}/slm') == pytest.approx(losses(forty[0]), abs=1e-5)
    ours, theirs = log_of(f'{tmp_path}/slm')[-1], log_of(forty[0])[-1]
    assert ours['val_loss'] == pytest.approx(theirs['val_loss'], abs=1e-5)
    assert ours['tokens'] == theirs['tokens'] and done.stdout.count('step 40/40') == 1
    assert SLM.from_pretrained(f'{tmp_path}/slm').slam['compute']['devices'] == 2


def test_a_run_goes_on_with_more_processes_and_other_free_knobs(forty, data, tmp_path):
    """And a knob that only one of two versions knows is no matter."""
    out = str(shutil.copytree(forty[0], tmp_path / 'slm'))
    state = torch.load(out + '/train_state.pt', weights_only=True)
    state['config'] |= dict(global_batch=128)
    del state['config']['decay_fraction']
    torch.save(state, out + '/train_state.pt')
    free = ('--max_steps=44', '--eval_interval=3', '--log_interval=2', f'--val_data={data}')
    done = run(f'--data={data}', f'--out_dir={out}', *free, processes=2)
    assert done.returncode == 0 and 'going on at step 40' in done.stdout, done.stderr
    assert [row['step'] for row in log_of(out)][-3:] == [40, 42, 44]


def poisoned(folder):
    """An untied model whose embedding of unit 19 is not a number."""
    model = small_model(family='gpt_neox', n_kv_head=2, tied=False, act='gelu')
    with torch.no_grad():
        model.embed.weight[19 + OFFSET] = math.nan
    slam = dict(encoder='mhubert25', vocoder='hifigan25', n_units=20, frame_rate=25.0)
    model.save_pretrained(folder, slam)
    return f'--init={folder}'


@pytest.mark.parametrize(
    ('optimizer', 'schedule'),
    [('adamw', 'inverse_sqrt'), ('ademamix', 'cosine'), ('adalomo', 'inverse_sqrt')],
)
def test_arms_of_figure_4_learn(data, tmp_path, monkeypatch, capsys, optimizer, schedule):
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}', f'--optimizer={optimizer}', '--eval_interval=0'
    flags += (
        '--max_steps=30',
        '--save_interval=0',
        f'--lr={5e-2 if optimizer == "adalomo" else 5e-3}',
    )
    code, _, err = inside(monkeypatch, capsys, *flags, f'--schedule={schedule}')
    assert code == 0, err
    assert np.mean(losses(out)[-5:]) < losses(out)[0] - 0.2


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'adalomo'])
def test_a_bad_step_is_skipped_and_counted(tmp_path, monkeypatch, capsys, optimizer):
    utterances = walks(100, 4, 30, 19)
    data = write_set(str(tmp_path / 'units'), [*utterances, np.array([3, 19, 4])])
    flags = f'--data={data}', poisoned(str(tmp_path / 'bad')), f'--optimizer={optimizer}'
    flags += '--eval_interval=0', '--log_interval=3', f'--out_dir={tmp_path}/slm'
    code, out, err = inside(monkeypatch, capsys, *flags, '--max_steps=21', '--batch_tokens=128')
    assert code == 0, err
    rows = log_of(f'{tmp_path}/slm')
    bad = sum(row.get('skipped', 0) for row in rows)
    assert 1 <= bad <= 3 and f'{bad} steps skipped' in out[-1]
    assert any('not finite, skipped' in line for line in out)
    assert all(math.isfinite(row['loss']) for row in rows)
    assert rows[-1]['loss'] < rows[0]['loss']
    model = SLM.from_pretrained(f'{tmp_path}/slm')
    rest = [p for name, p in model.named_parameters() if name != 'embed.weight']
    assert all(p.isfinite().all() for p in rest)


def test_a_bad_step_leaves_fused_adamw_as_it_was(monkeypatch):
    """found_inf = 1: parameters, moments and step count bitwise unchanged, without a look at it."""
    monkeypatch.setattr(train, 'optimizer', 'adamw')
    model = small_model()
    [adamw] = train.make_optimizers(model)
    tokens = torch.arange(20)[None]
    for bad in (0, 1):
        before = through_a_file([model.state_dict(), adamw.state_dict()])
        model(tokens, tokens).backward()
        if bad:
            model.embed.weight.grad[3] = math.nan
        adamw.found_inf = torch.tensor(float(bad))
        adamw.step()
        model.zero_grad()
        after = through_a_file([model.state_dict(), adamw.state_dict()])
        same = [
            torch.equal(a, b) for a, b in zip(tensors_of(before), tensors_of(after), strict=False)
        ]
        assert all(same) if bad else not any(same[:1])


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for part in tree for t in tensors_of(part)] if isinstance(tree, list) else []


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    data = write_set(str(tmp_path / 'units'), [np.array([3, 19, 4])] * 500)
    flags = f'--data={data}', f'--out_dir={tmp_path}/slm', poisoned(str(tmp_path / 'bad'))
    code, out, err = inside(monkeypatch, capsys, *flags)
    assert code == 2 and len(err) == 1 and '10 steps in a row' in err[0]
    few = f'--out_dir={tmp_path}/few', '--max_steps=4'
    code, out, err = inside(monkeypatch, capsys, *flags, *few)
    assert code == 2 and len(err) == 1 and '4 steps in a row' in err[0]
    assert not os.path.exists(f'{tmp_path}/few/model.safetensors')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_leaves(data, tmp_path, number):
    """It says so at once; the same command goes on."""
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}', '--max_steps=100000', '--save_interval=0'
    process = start(*flags, '--eval_interval=0', '--warmup_fraction=0', '--log_interval=7')
    for line in process.stdout:
        if line.startswith('step 14/'):
            process.send_signal(number)
            break
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert 'once more ends it at once' in stderr and 'the same command continues' in stderr
    state = torch.load(out + '/train_state.pt', weights_only=True)
    assert 14 <= state['step'] == log_of(out)[-1]['step']
    assert SLM.from_pretrained(out).slam['scores']['step'] == state['step']


HANGING = """
import runpy, sys, time
sys.argv = {argv!r}
import model

def hang(*args, **kwargs):
    print('hanging', flush=True)
    while True:
        time.sleep(60)

model.SLM.forward = hang
runpy.run_path('train.py', run_name='__main__')
"""


def test_the_second_signal_ends_a_step_that_hangs(data, tmp_path):
    """A step that never returns: the first Ctrl-C is answered, the second ends the process."""
    flags = f'--data={data}', f'--out_dir={tmp_path}/slm'
    body = HANGING.format(argv=['train.py', *TINY, *flags])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, '-c', body], cwd=ROOT, env=ENV, **pipes)
    for line in process.stdout:
        if line.startswith('hanging'):
            break
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if 'stopping' in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


def test_torchrun_hands_on_a_signal_and_all_save_at_one_step(data, tmp_path):
    out = str(tmp_path / 'slm')
    flags = f'--data={data}', f'--out_dir={out}', '--max_steps=100000', '--save_interval=0'
    flags += '--eval_interval=0', '--warmup_fraction=0', '--log_interval=2'
    process = subprocess.Popen(
        command(*flags, processes=2), cwd=ROOT, env=ENV, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith('step 6/'):
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and 'the same command continues' in stderr
    assert 'Abort' not in stderr and 'terminate called' not in stderr
    state = torch.load(out + '/train_state.pt', weights_only=True)
    assert 6 <= state['step'] == log_of(out)[-1]['step']


def test_a_full_disk_keeps_the_checkpoint(forty, data, tmp_path):
    out = str(shutil.copytree(forty[0], tmp_path / 'slm'))
    more = f'--data={data}', f'--out_dir={out}', '--max_steps=42', '--eval_interval=0'
    for limit in (40_000, 200_000):  # bytes a file: of the model, of the state
        full = run(
            *more, preexec_fn=lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
        )
        assert full.returncode == 2 and len(full.stderr.splitlines()) == 1, full.stderr
        assert 'make room' in full.stderr
        assert read(f'{out}/train_state.pt') == read(f'{forty[0]}/train_state.pt')
    done = run(*more)
    assert done.returncode == 0 and losses(out)[:40] == losses(forty[0]) and len(losses(out)) == 42
    assert not [name for name in os.listdir(out) if name.endswith('.tmp')]


def test_memory_that_is_not_there_is_one_line(data, tmp_path, monkeypatch, capsys):
    def forward(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(SLM, 'forward', forward)
    code, _, err = inside(monkeypatch, capsys, f'--data={data}', f'--out_dir={tmp_path}/slm')
    assert code == 2 and len(err) == 1
    assert all(word in err[0] for word in ('out of memory', '--row_tokens=64', '--context=32'))


@pytest.mark.parametrize(
    'flag',
    [
        *('--lr=-1', '--context=0', '--row_tokens=0', '--batch_tokens=100', '--max_steps=0'),
        *('--log_interval=0', '--dropout=1', '--decay_fraction=0'),
        *('--seed=-1', '--n_kv_head=0', '--schedule=linear', '--optimizer=sgd', '--context=100'),
        *('--val_data=nowhere', '--data=nowhere', '--compile=maybe', '--dtype=int8'),
        '--dtype=float16',
    ],
)
def test_a_knob_out_of_range_is_one_line(flag, data, tmp_path, monkeypatch, capsys):
    flags = f'--data={data}', f'--out_dir={tmp_path}/slm', flag
    code, _, err = inside(monkeypatch, capsys, *flags)
    assert code == 2 and len(err) == 1 and flag[2:].split('=')[0].split('_')[-1] in err[0]
    assert not os.path.exists(f'{tmp_path}/slm/train_state.pt')


def test_wandb_that_is_not_installed_is_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    flags = f'--data={data}', f'--out_dir={tmp_path}/slm', '--wandb'
    code, _, err = inside(monkeypatch, capsys, *flags)
    assert code == 2 and err == [
        'train.py: wandb is not installed: pip install wandb, or --wandb=False'
    ]


def test_a_finished_run_is_left_alone(forty, data, monkeypatch, capsys):
    flags = f'--data={data}', f'--out_dir={forty[0]}', '--save_init'
    code, out, _ = inside(monkeypatch, capsys, *flags)
    assert code in (0, None) and len(out) == 1 and 'finished before' in out[0]


def test_a_folder_in_use_is_refused(forty, data, tmp_path, monkeypatch, capsys):
    """By another run, or as the model that this run begins from."""
    out = str(shutil.copytree(forty[0], tmp_path / 'slm'))
    flags = f'--data={data}', f'--out_dir={out}'
    with train.open_log(out, 40):
        code, _, err = inside(monkeypatch, capsys, *flags, '--max_steps=42')
    assert code == 2 and len(err) == 1 and 'another process is training' in err[0]
    code, _, err = inside(monkeypatch, capsys, *flags, f'--init={out}', '--resume=False')
    assert code == 2 and len(err) == 1 and 'init and out_dir are both' in err[0]
    assert read(out + '/log.jsonl') == read(forty[0] + '/log.jsonl')
    with train.open_log(out, 7) as log:
        log.write('{"step": 8, "lo')
    train.open_log(out, 9).close()  # a torn line goes
    assert losses(out) == losses(forty[0])[:7]


def test_what_does_not_fit_a_former_run_is_one_line(forty, data, tmp_path, monkeypatch, capsys):
    out = str(shutil.copytree(forty[0], tmp_path / 'slm'))
    other = str(shutil.copytree(data, tmp_path / 'units'))
    flags = f'--out_dir={out}', '--max_steps=42'

    def refused(*args):
        code, _, err = inside(monkeypatch, capsys, *flags, *args)
        assert code == 2 and len(err) == 1, err
        return err[0]

    assert 'is a run with lr=0.005, not 0.1' in refused(f'--data={data}', '--lr=0.1')
    state = torch.load(out + '/train_state.pt', weights_only=True)
    state['config']['data'] = other
    torch.save(state, out + '/train_state.pt')
    assert 'is a run with data=' in refused(f'--data={data}')
    write_set(other, walks(149, 0), walks(10, 1))  # the same folder, encoded anew
    assert 'has other tokens' in refused(f'--data={other}')
    del state['place']  # of the loader before this one
    torch.save(state | dict(position=(0, 0)), out + '/train_state.pt')
    assert 'not of this version: --resume=False' in refused(f'--data={data}')
    with open(out + '/train_state.pt', 'r+b') as file:
        file.truncate(1000)
    assert '--resume=False' in refused(f'--data={data}')
    with open(out + '/train_state.pt', 'wb') as file:
        file.write(b'no state at all')
    assert '--resume=False' in refused(f'--data={data}')


def test_data_that_do_not_fit_are_one_line(data, tmp_path):
    cut = tmp_path / 'cut'
    os.makedirs(cut)
    for name in ('meta.json', 'train.bin', 'val.bin'):
        content = read(os.path.join(data, name))
        (cut / name).write_bytes(content[:-3] if name == 'train.bin' else content)
    with pytest.raises(InputError, match='no folder encoder'):
        train.open_data(str(cut))
    os.makedirs(cut / 'encoder')
    with pytest.raises(InputError, match='truncated'):
        train.Loader(train.open_data(str(cut)), 32, 64, 0)
    with pytest.raises(InputError, match='meta.json'):
        train.open_data('nowhere')
    for weight in ('much', '0', '-1', 'nan', 'inf'):
        with pytest.raises(InputError, match='NAME:WEIGHT'):
            train.open_data(f'{data}:{weight}')
    with pytest.raises(InputError, match='weights of data'):
        train.Loader(train.open_data(f'{data}:0.0001'), 32, 64, 0).order(0)
    meta = json.loads(read(os.path.join(data, 'meta.json')))
    changes = dict(tokens={}), dict(dtype='none'), dict(vocab_size=None), dict(tokens=dict(train=0))
    for i, change in enumerate((*changes, None)):
        shutil.copytree(data, tmp_path / f'meta{i}')
        content = json.dumps(meta | change if change else [])
        (tmp_path / f'meta{i}' / 'meta.json').write_text(content)
        with pytest.raises(InputError, match='prepare_units.py'):
            train.open_data(str(tmp_path / f'meta{i}'))
    (tmp_path / 'meta0' / 'meta.json').write_text(json.dumps(meta | dict(vocab_size=15)))
    with pytest.raises(InputError, match='has token 21, meta.json a vocabulary of 15'):
        train.Loader(train.open_data(str(tmp_path / 'meta0')), 32, 64, 0)
    other = write_set(str(tmp_path / 'other'), walks(3, 0), units=30)
    with pytest.raises(InputError, match='differ in vocab_size'):
        train.open_data(f'{data},{other}')
    with pytest.raises(InputError, match='val_data .*nothing in its split val.*--val_data='):
        train.open_data(other, split='val')
