"""dpo.py: losses against closed forms and TRL, log-probabilities against transformers, and runs
that are killed, shared by two processes, or do damage."""

from config import report_error

import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
from model import BOS, EOS, OFFSET, SLM, InputError, SLMConfig, tokenize_words

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = dict(os.environ, OMP_NUM_THREADS='1', TRL_EXPERIMENTAL_SILENCE='1')


def random_pairs(n, units=40, seed=0, prompt=(0, 40), completion=(1, 20), context=128):
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return rng.integers(0, units, rng.integers(low, high + 1))

    sides = (prompt, completion, completion)
    return [dpo.make_pair(*(draw(*side) for side in sides), context) for _ in range(n)]


def parts_of(pair):
    """Tokens of prompt, chosen and rejected."""
    return [pair.tokens[pair.branch == branch] for branch in (0, 1, 2)]


def small_model(family='qwen2', units=40, **more):
    shape = dict(n_layer=2, n_embd=32, n_head=4, n_ffn=48, context=128, vocab_size=units + OFFSET)
    shape['n_kv_head'] = 2 if family == 'qwen2' else 4
    model = SLM(SLMConfig(family=family, **shape | more), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # far from uniform predictions, else every test is easy
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def packed_logps(model, pairs, width):
    found = torch.zeros(len(pairs), 2)
    for row, indices in dpo.lay_out(pairs, width):
        found[torch.from_numpy(indices)] = model.logps(*row, n=2 * len(indices)).view(-1, 2)
    return found


def single_logps(model, pairs):
    """Each completion in a sequence of its own."""
    found = []
    for pair in pairs:
        prompt, *completions = parts_of(pair)
        for completion in completions:
            tokens = torch.from_numpy(np.append(prompt, completion))[None]
            found.append(model.logps(tokens, (torch.arange(tokens.shape[1]) >= len(prompt))[None]))
    return torch.cat(found).view(-1, 2)


def write_pairs(path, n=80, units=40):
    """Learnable pairs: chosen completions rise, rejected ones fall. Every eighth is held out."""
    rng = np.random.default_rng(0)
    with open(path, 'w') as file:
        for i in range(n):
            start = int(rng.integers(units))
            prompt = rng.integers(0, units, rng.integers(5, 30)).tolist()
            row = dict(prompt=dict(units=prompt, text='who'), split='train' if i % 8 else 'val')
            for key, sign in (('chosen', 1), ('rejected', -1)):
                length = int(rng.integers(4, 12))
                line = [(start + sign * k) % units for k in range(length)]
                row[key] = dict(units=line, duration=[1] * length, text=f'the {key} {i}')
            file.write(json.dumps(row) + '\n')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dpo')
    slam = dict(encoder='mhubert25', vocoder='hifigan25', n_units=40, dedup=True)
    slam |= dict(recipe=dict(lr=1), compute=dict(hours=23.5), stage='pretraining')
    small_model().save_pretrained(folder / 'init', slam)
    write_pairs(folder / 'pairs.jsonl')
    return folder


def command(place, out, **knobs):
    settings = dict(init=place / 'init', data=place / 'pairs.jsonl', out_dir=place / out)
    settings |= dict(batch_pairs=8, row_tokens=256, context=128, lr=1e-3, warmup_steps=4)
    settings |= dict(max_steps=24, epochs=0, train_hours=0, eval_interval=8, save_interval=6)
    settings |= dict(log_interval=2, device='cpu')
    flags = [f'--{key}={value}' for key, value in (settings | knobs).items()]
    return [os.path.join(ROOT, 'dpo.py'), *flags]


def run(place, out, launcher=(), **knobs):
    line = [sys.executable, *launcher, *command(place, out, **knobs)]
    return subprocess.run(line, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


@pytest.fixture
def inside(place, monkeypatch, capsys):
    """The program in this process: exit code, stdout, and its own lines on stderr."""

    def start(out, **knobs):
        monkeypatch.setattr(sys, 'argv', command(place, out, **knobs))
        monkeypatch.setattr(sys, 'excepthook', report_error)
        monkeypatch.setattr(signal, 'signal', lambda *_: None)
        code = 0
        try:
            runpy.run_path(os.path.join(ROOT, 'dpo.py'), run_name='__main__')
        except SystemExit as end:
            code = end.code
        except Exception:
            with pytest.raises(SystemExit) as end:
                sys.excepthook(*sys.exc_info())
            code = end.value.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith('dpo.py: ')]
        return code, out, lines

    return start


def read_log(folder):
    with open(folder / 'log.jsonl') as file:
        rows = [json.loads(line) for line in file]
    clocks = ('elapsed', 'pairs_per_s')
    return [{key: row[key] for key in row if key not in clocks} for row in rows]


# -----------------------------------------------------------------------------
# The losses


def random_logps(n=50):
    generator = torch.Generator().manual_seed(0)
    policy, reference = -200 * torch.rand(2, n, 2, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 60, (n, 2), generator=generator)
    return policy, reference, sizes


def closed_form(name, policy, reference, sizes, beta):
    """A pair's loss, and its derivative in the log-probabilities of chosen and rejected."""
    (pc, pr), (rc, rr), (nc, nr) = policy, reference, sizes
    if name == 'dpo':
        scale, margin = (beta, -beta), beta * ((pc - rc) - (pr - rr))
    if name == 'simpo':
        scale, margin = (beta / nc, -beta / nr), beta * (pc / nc - pr / nr) - 0.5 * beta
    if name == 'ipo':
        distance = (pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)
        return distance**2, [2 * distance / nc, -2 * distance / nr]
    loss = math.log1p(math.exp(-margin)) if margin > -30 else -margin
    return loss, [-s / (1 + math.exp(margin)) for s in scale]


@pytest.mark.parametrize(
    ('name', 'beta'), [('dpo', 0.1), ('dpo', 0.5), ('ipo', 0.1), ('ipo', 1), ('simpo', 2)]
)
def test_loss_and_gradient_are_the_closed_form(name, beta):
    policy, reference, sizes = random_logps()
    policy.requires_grad_()
    losses, rewards = dpo.LOSSES[name][0](policy, reference, sizes, beta)
    losses.sum().backward()
    for i in range(len(losses)):
        rows = (tensor[i].tolist() for tensor in (policy, reference, sizes))
        loss, slopes = closed_form(name, *rows, beta)
        assert losses[i].item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
        assert policy.grad[i].tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-14)
    margins = rewards[:, 0] - rewards[:, 1]
    order = (-losses if name != 'ipo' else margins).argsort()
    assert (margins[order].diff() >= -1e-9).all()  # the better the margin, the less the loss


@pytest.mark.parametrize(('name', 'beta'), [('dpo', 0.1), ('ipo', 0.3), ('simpo', 2.0)])
def test_loss_is_that_of_trl(name, beta):
    """Its CPOTrainer.cpo_loss takes log-probabilities, or log-ratios, summed or averaged."""
    trl = pytest.importorskip('trl.experimental.cpo.cpo_trainer')
    policy, reference, sizes = random_logps()
    given = dict(dpo=policy - reference, ipo=(policy - reference) / sizes, simpo=policy / sizes)
    theirs = SimpleNamespace(
        loss_type='sigmoid' if name == 'dpo' else name,
        beta=beta,
        simpo_gamma=0.5 * beta,
        alpha=0.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device='cpu'),
    )
    losses, *_ = trl.CPOTrainer.cpo_loss(theirs, *given[name].T)
    torch.testing.assert_close(dpo.LOSSES[name][0](policy, reference, sizes, beta)[0], losses)


def test_only_simpo_needs_no_reference():
    policy, reference, sizes = random_logps()
    for loss, needs_reference in dpo.LOSSES.values():
        losses, _ = loss(policy, torch.full_like(reference, math.nan), sizes, 0.1)
        assert losses.isnan().all() == needs_reference


def test_measure_counts_by_hand():
    rewards = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [2.0, 2.0]])  # won, lost, a tie
    assert dpo.measure(torch.tensor([1.0, 2.0, 3.0]), rewards).tolist() == [6.0, 1.5, -0.5]


def test_learning_rate_is_the_inverse_square_root():
    assert dpo.learning_rate(0, 1.0, 100) == pytest.approx(0.01)
    assert dpo.learning_rate(99, 1.0, 100) == 1.0
    for step in (100, 101, 400, 812):
        assert dpo.learning_rate(step, 5e-5, 100) == pytest.approx(5e-5 * math.sqrt(100 / step))
    assert dpo.learning_rate(813, 5e-5, 0) == pytest.approx(5e-5 * math.sqrt(10000 / 10813))


# -----------------------------------------------------------------------------
# Log-probabilities and rows


@pytest.mark.parametrize(
    ('family', 'more'),
    [
        ('qwen2', {}),
        ('opt', dict(act='relu')),
        ('gpt_neox', dict(act='gelu', tied=False, rotary_share=0.25)),
    ],
)
def test_packed_logps_are_transformers(family, more, tmp_path):
    from transformers import AutoModelForCausalLM

    model, pairs = small_model(family, **more), random_pairs(13)
    model.save_pretrained(tmp_path, {})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation='eager'
    ).eval()
    with torch.no_grad():
        ours = packed_logps(model, pairs, 256)
        for pair, found in zip(pairs, ours, strict=True):
            prompt, *completions = parts_of(pair)
            for completion, value in zip(completions, found, strict=True):
                tokens = torch.from_numpy(np.append(prompt, completion))[None]
                logps = theirs(tokens).logits.double().log_softmax(-1)[0, :-1]
                expected = logps.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()
                assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_packed_is_unpacked_with_its_gradients():
    model, pairs = small_model(), random_pairs(16)
    reference = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)) * 3 - 30
    sizes = torch.tensor([pair.sizes for pair in pairs])

    def gradients(logps):
        model.zero_grad()
        dpo.dpo_loss(logps, reference, sizes, 0.1)[0].mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    for width in (96, 384):
        packed, alone = packed_logps(model, pairs, width), single_logps(model, pairs)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradients(packed), gradients(alone), rtol=1e-3, atol=1e-5)


def test_laying_out_loses_and_doubles_nothing():
    pairs = random_pairs(40)
    met = []
    for row, indices in dpo.lay_out(pairs, 128):
        assert row.shape == (6, 1, 128)
        tokens, mask, doc, positions, branch, segments = row[:, 0].numpy()
        assert not mask[doc == 0].any()
        assert (doc > 0).sum() == sum(len(pairs[i].tokens) for i in indices)
        for k, i in enumerate(indices):
            prompt, chosen, rejected = parts_of(pairs[i])
            mine = doc == k + 1
            assert tokens[mine].tolist() == [*prompt, *chosen, *rejected]
            assert tokens[mine & (mask == 1) & (segments == 2 * k)].tolist() == chosen.tolist()
            assert tokens[(mask == 1) & (segments == 2 * k + 1)].tolist() == rejected.tolist()
            for side, part in ((1, chosen), (2, rejected)):
                places = np.arange(len(prompt), len(prompt) + len(part))
                assert positions[mine & (branch == side)].tolist() == places.tolist()
        met += indices.tolist()
    assert sorted(met) == list(range(40))


def test_batches_are_even_and_rows_full():
    """The paper's batch and lengths like SpokenSwag's: 94 % of what is computed is used."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 90, 5000) + rng.integers(15, 60, 5000) + rng.integers(15, 60, 5000)
    batches = dpo.deal_batches(lengths, 64, 1234, 0)
    assert batches.shape == (78, 64) and len(np.unique(batches)) == batches.size
    assert (batches == dpo.deal_batches(lengths, 64, 1234, 0)).all()
    assert (batches != dpo.deal_batches(lengths, 64, 1234, 1)).any()
    totals = lengths[batches].sum(1)
    assert totals.std() < 0.01 * totals.mean()
    for row_tokens, world in ((1024, 1), (2048, 2), (8192, 1), (8192, 4)):
        width = dpo.row_width(lengths, 64, row_tokens, world, 128)
        rows = [len(dpo.pack_rows(lengths[batch], width)) for batch in batches]
        assert width % 128 == 0 and width <= row_tokens
        assert max(rows) % world == 0 and max(rows) == min(rows)
        assert totals.sum() / (sum(rows) * width) > (0.94 if row_tokens > 1024 else 0.88)
    assert dpo.row_width(np.array([2000, 30]), 2, 1024, 1, 128) == 2048  # the longest has room


# -----------------------------------------------------------------------------
# Reading


def units(*values):
    return dict(units=list(values))


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def test_filter_split_and_counts(tmp_path):
    texts = [
        ('Ann went to the market and bought bread.', 'She ate the bread at home.'),
        ('the dog saw the dog and the dog saw the dog again', 'the dog saw the dog'),
        ('He rows, rows, rows; rows, rows, rows the boat.', 'Then he rows, rows, rows again!'),
        ('well', 'no'),
    ]
    pair = dict(prompt=units(1, 2, 3), chosen=units(4, 5), rejected=units(6))
    rows = [dict(pair, prompt_text=prompt, chosen_text=chosen) for prompt, chosen in texts]
    rows += [
        dict(prompt=units(1, 2, 1, 2), chosen=units(1, 2), rejected=units(3)),  # no text
        dict(prompt=units(1), chosen=units(), rejected=units(5), chosen_text='x'),
        dict(prompt=units(1), chosen=units(5), rejected=units(5)),
        dict(prompt=units(), chosen=units(*range(30)), rejected=units(5)),
        dict(prompt=units(*range(30)), chosen=units(5), rejected=units(6), split='val'),
        dict(pair, split='test'),
    ]
    path = write_rows(tmp_path / 'pairs.jsonl', rows)
    train, val, count = dpo.load_pairs(path, 30, 16, 0.3, 0.0, 10)
    assert count == dict(read=10, repetitive=2, unusable=2, others=1, truncated=2)
    assert len(train) == 4 and len(val) == 1
    prompt, chosen, _ = parts_of(val[0])
    assert prompt.tolist() == [OFFSET + unit for unit in range(16, 30)]
    assert chosen.tolist() == [OFFSET + 5, EOS]
    assert dpo.load_pairs(path, 30, 16, 0.3, 0.3, 10)[2]['repetitive'] == 3
    assert dpo.load_pairs(path, 30, 16, 0.0, 0.0, 10)[2]['repetitive'] == 0


def test_truncation_spares_the_prompts_end_and_the_completions_beginnings():
    prompt = np.arange(49)
    for chosen, rejected, sizes in (
        (29, 9, (34, 30, 10)),
        (79, 39, (32, 32, 32)),
        (20, 3, (43, 21, 4)),
    ):
        pair = dpo.make_pair(prompt, np.arange(chosen), np.arange(rejected), 64)
        parts = parts_of(pair)
        assert tuple(map(len, parts)) == sizes and pair.sizes == sizes[1:]
        assert parts[0][-1] == 48 + OFFSET and parts[1][0] == parts[2][0] == OFFSET
    whole = parts_of(dpo.make_pair(prompt[:9], np.arange(4), np.arange(5), 64))
    assert whole[0][0] == BOS and whole[1][-1] == whole[2][-1] == EOS
    assert list(map(len, whole)) == [10, 5, 6]


def test_layouts_of_the_public_toolkit(tmp_path):
    def say(*values):
        return ''.join(f'<Un{value}>' for value in values)

    texts = dict(prompt_text='Hi there.', chosen_text='It is ok')
    prompt = dict(units=[1, 2], duration=[1, 1], text='Hi there.')
    rows = [
        dict(prompt=prompt, chosen=dict(units=[3], text='It is ok'), rejected=dict(units=[4])),
        {key: dict(audio_repr=say(*value)) for key, value in TOOLKIT.items()} | texts,
        {key: say(*value) for key, value in TOOLKIT.items()},
        TOOLKIT,
    ]
    found = list(dpo.read_pairs(write_rows(tmp_path / 'pairs.jsonl', rows)))
    assert all([part.tolist() for part in sides] == [[1, 2], [3], [4]] for sides, *_ in found)
    words = tokenize_words('Hi there. It is ok')
    assert [words for *_, words in found] == [words, words, [], []]


TOOLKIT = dict(prompt=[1, 2], chosen=[3], rejected=[4])


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"prompt": {"units": [1]}, "cho', 'line 2'),
        ('{"prompt": [1], "chosen": [1]}', 'line 2: no preference pair'),
        ('{"prompt": [1], "chosen": {"text": "x"}, "rejected": [1]}', 'line 2: no preference pair'),
        ('{"prompt": [1], "chosen": [1.5], "rejected": [1]}', 'line 2: no preference pair'),
        ('[1, 2]', 'line 2'),
        ('{"prompt": [1], "chosen": [40], "rejected": [1]}', 'unit 40, the model knows 0 to 39'),
        ('{"prompt": [1], "chosen": [-1], "rejected": [1]}', 'has unit -1'),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / 'pairs.jsonl'
    path.write_text(json.dumps(TOOLKIT) + '\n' + line + '\n')
    with pytest.raises(InputError, match=message):
        dpo.load_pairs(str(path), 40, 128, 0.3, 0, 10)


def test_held_out_pairs_do_not_depend_on_the_order_of_lines(tmp_path):
    """A tenth of the pairs, by a hash; where too few are marked, others go with them."""
    write_pairs(tmp_path / 'pairs.jsonl')
    lines = (tmp_path / 'pairs.jsonl').read_text().splitlines()
    unmarked = [line.replace('"val"', '"train"') for line in lines]
    one_marked = [unmarked[0].replace('"train"', '"val"'), *unmarked[1:]]
    for rows, n in ((unmarked, 8), (one_marked, 8), (lines, 10)):
        found = []
        for order in (rows, rows[::-1]):
            (tmp_path / 'some.jsonl').write_text('\n'.join(order))
            train, val, _ = dpo.load_pairs(str(tmp_path / 'some.jsonl'), 40, 128, 0.3, 0, 100)
            assert len(train) + len(val) == 80
            found.append([pair.tokens.tobytes() for pair in val])
        assert found[0] == found[1] and len(found[0]) == n


# -----------------------------------------------------------------------------
# Runs


def test_a_run_its_reference_and_the_same_command_again(place):
    done = run(place, 'whole')
    assert done.returncode == 0, done.stderr
    log = read_log(place / 'whole')
    first, last = log[0], log[-1]
    assert first['step'] == 0 and first['val_loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert first['val_margin'] == first['val_drift'] == 0 and first['val_accuracy'] == 0.5
    assert last['val_accuracy'] > 0.9 and last['val_loss'] < 0.6
    assert {'loss', 'accuracy', 'margin', 'norm', 'lr', 'tokens'} <= set(log[1])
    for words in (
        '10 pairs held out',
        'units sampled',
        'means little: ± 31 points',
        'of which step 24 is kept',
    ):
        assert words in done.stdout

    model = SLM.from_pretrained(str(place / 'whole'))
    slam = model.slam
    assert (slam['encoder'], slam['stage'], slam['dedup']) == ('mhubert25', 'dpo', True)
    assert slam['recipe']['beta'] == 0.1 and slam['recipe']['pretraining'] == dict(lr=1)
    assert slam['compute']['pretraining'] == dict(hours=23.5) and slam['compute']['devices'] == 1
    assert slam['scores']['step'] == 24 and slam['compute']['tokens'] == last['tokens']

    train, val, _ = dpo.load_pairs(str(place / 'pairs.jsonl'), 40, 128, 0.3, 0, 512)
    [cache] = place.glob('reference-*.pt')
    known, _ = torch.load(cache)
    with torch.no_grad():
        again = single_logps(SLM.from_pretrained(str(place / 'init')), train + val)
    torch.testing.assert_close(known, again, rtol=1e-5, atol=1e-4)

    weights = (place / 'whole/model.safetensors').stat().st_mtime
    again = run(place, 'whole')
    assert again.returncode == 0 and 'finished before' in again.stdout
    other = run(place, 'whole', beta=0.2)
    assert other.returncode == 2 and 'beta=0.1, not 0.2' in other.stderr
    assert len(other.stderr.splitlines()) == 1
    assert (place / 'whole/model.safetensors').stat().st_mtime == weights


# the signal comes from within: from without it would come at another step on a busy machine
STOPPED_AT_STEP_10 = """
import os, runpy, sys
sys.argv = {argv!r}
import model

def say_and_stop(text, rank=0, say=model.say):
    say(text, rank)
    if text.startswith('step 10/24'):
        os.kill(os.getpid(), {number})

model.say = say_and_stop
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(place, number):
    """The weights, the optimizer and the log of a run that nothing disturbed."""
    if not (place / 'whole').exists():
        run(place, 'whole')
    out = f'stopped{int(number)}'
    body = STOPPED_AT_STEP_10.format(argv=command(place, out), number=int(number))
    stopped = subprocess.run([sys.executable, '-c', body], cwd=ROOT, env=ENV, capture_output=True)
    assert stopped.returncode == (-9 if number == signal.SIGKILL else 128 + signal.SIGTERM)
    state = torch.load(place / out / 'train_state.pt', weights_only=True)
    assert state['step'] == 6 if number == signal.SIGKILL else state['step'] >= 10
    SLM.from_pretrained(str(place / out))

    done = run(place, out)
    assert done.returncode == 0, done.stderr
    assert f'going on at step {state["step"]}' in done.stdout
    assert filecontents(place / out) == filecontents(place / 'whole')
    ours, whole = (
        torch.load(place / name / 'train_state.pt', weights_only=True) for name in (out, 'whole')
    )
    for i, moments in whole['optimizer']['state'].items():
        for key in moments:
            assert torch.equal(ours['optimizer']['state'][i][key], moments[key])
    for key, value in whole['model'].items():
        assert torch.equal(ours['model'][key], value)
    if number == signal.SIGKILL:  # a signal leaves a line of its own, at the step where it came
        assert read_log(place / out) == read_log(place / 'whole')


def filecontents(folder):
    return (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('weight', [0.0, 0.5])
def test_the_first_gradient_is_the_closed_form(place, inside, weight):
    """Where the policy is the reference: of -beta / 2 (chosen - rejected), pair by pair, and of the
    mean negative log-likelihood of a chosen token times sft_weight, which the loss leaves out."""
    train, _, _ = dpo.load_pairs(str(place / 'pairs.jsonl'), 40, 128, 0.3, 0, 512)
    lengths = np.array([len(pair.tokens) for pair in train])
    pairs = [train[i] for i in dpo.deal_batches(lengths, 8, 1234, 0)[0]]
    model = SLM.from_pretrained(str(place / 'init')).double()
    chosen, rejected = single_logps(model, pairs).sum(0)
    likelihood = chosen / sum(pair.sizes[0] for pair in pairs)
    objective = -0.1 / 2 * (chosen - rejected) / 8 - weight * likelihood
    gradient = torch.autograd.grad(objective, list(model.parameters()))
    norm = math.sqrt(sum(float((part**2).sum()) for part in gradient))

    out = f'weight{weight}'
    code, said, _ = inside(out, max_steps=1, log_interval=1, sft_weight=weight)
    assert code == 0, said
    [row] = [row for row in read_log(place / out) if 'loss' in row]
    assert row['norm'] == pytest.approx(norm, rel=1e-3, abs=1e-5)
    assert row['loss'] == pytest.approx(math.log(2), abs=2e-5)


@pytest.mark.parametrize(('loss', 'beta'), [('ipo', 1.0), ('simpo', 2.0)])
def test_the_other_losses_learn_too(place, tmp_path, inside, loss, beta):
    data = shutil.copy(place / 'pairs.jsonl', tmp_path)
    code, _, _ = inside(tmp_path / 'out', data=data, loss=loss, beta=beta, max_steps=16)
    first, *_, last = read_log(tmp_path / 'out')
    assert code == 0 and last['val_accuracy'] > max(first['val_accuracy'], 0.55)
    assert last['val_loss'] < first['val_loss'] and last['val_drift'] != 0
    assert bool(list(tmp_path.glob('reference-*.pt'))) == (loss != 'simpo')


def test_samples_are_measured_by_hand(monkeypatch):
    model = small_model()
    samples = [[5, 5, 6, 7, 6, 7], [9], []]
    monkeypatch.setattr(
        SLM, 'generate', lambda *_, **__: [torch.tensor(x, dtype=torch.int64) for x in samples]
    )
    found = dpo.measure_samples(model, [np.array([1, 5]), np.array([1, 9]), np.array([1, 2])])
    repeats, bleu = (2 + 1) / 7, (2 / 5 + 0 + 0) / 3  # 67 twice of 55 56 67 76 67
    assert found == dict(units=7, repeats=pytest.approx(repeats), auto_bleu=pytest.approx(bleu))


def test_damage_is_told_with_its_remedy():
    before = dict(val_repeats=0.01)
    well = dict(val_drift=-0.1, val_repeats=0.012)
    assert dpo.find_damage(well, before) == []
    [sinks] = dpo.find_damage(dict(well, val_drift=-0.9), before)
    [repeats] = dpo.find_damage(dict(well, val_repeats=0.023), before)
    assert 'chosen completions lost 0.90 nats a token' in sinks
    assert 'immediate repeats are 2.3% of the units' in repeats
    assert all('--lr' in line and '--sft_weight' in line for line in (sinks, repeats))


def test_a_run_that_only_damages_ends_as_it_began(place, inside):
    code, out, _ = inside('damage', lr=0.3, warmup_steps=0, max_steps=40, batch_pairs=16)
    assert code == 0 and 'WARNING: chosen completions lost' in out
    assert 'no step was better' in out and 'epochs' in out
    ours, theirs = (SLM.from_pretrained(str(place / name)) for name in ('damage', 'init'))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ours.slam['stage'] == 'pretraining'


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(place, inside):
    code, out, errors = inside(
        'wild', lr=1e30, warmup_steps=0, max_steps=40, eval_interval=0, save_interval=0
    )
    assert code == 2 and len(errors) == 1 and 'steps in a row were not finite' in errors[0]
    assert '2 not finite, skipped' in out
    assert all(
        (row['loss'] is None) == (row.get('skipped') == 2) for row in read_log(place / 'wild')
    )
    code, _, errors = inside(
        'few', lr=1e30, warmup_steps=0, max_steps=4, eval_interval=0, save_interval=0
    )
    assert code == 2 and len(errors) == 1 and '3 steps in a row were not finite' in errors[0]
    assert not (place / 'few' / 'model.safetensors').exists()


def test_a_model_that_is_not_finite_is_one_line(place, tmp_path, inside):
    model = SLM.from_pretrained(str(place / 'init'))
    model.embed.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / 'init')
    code, _, errors = inside('broken', init=tmp_path / 'init')
    assert code == 2 and len(errors) == 1 and 'no finite log-probability' in errors[0]


def test_memory_that_is_not_there_is_one_line(place, tmp_path, inside, monkeypatch):
    def logps(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(SLM, 'logps', logps)
    data = shutil.copy(place / 'pairs.jsonl', tmp_path)
    code, _, errors = inside(tmp_path / 'out', data=data)
    assert code == 2 and len(errors) == 1
    assert all(word in errors[0] for word in ('out of memory', 'row_tokens=256', 'context=128'))


@pytest.mark.parametrize(
    ('knob', 'value'),
    [
        ('lr', -1),
        ('beta', 0),
        ('context', 0),
        ('batch_pairs', 0),
        ('row_tokens', 0),
        ('log_interval', 0),
        ('seed', -1),
        ('sft_weight', -1),
        ('train_hours', -1),
        ('loss', 'dro'),
        ('dtype', 'float16'),
    ],
)
def test_a_knob_out_of_range_is_one_line(knob, value, inside):
    code, _, errors = inside('wrong', **{knob: value})
    assert code == 2 and len(errors) == 1 and knob in errors[0]
    reason = dict(loss='unknown', dtype='bfloat16').get(knob, 'out of range')
    assert reason in errors[0]


def test_a_full_disk_loses_nothing(place, tmp_path):
    """Nor does a torn line of the log, a reader that leaves, or the longest pair held out."""
    rows = [json.loads(line) for line in open(place / 'pairs.jsonl')]
    rows.append(dict(prompt=[1, 2, 3] * 20, chosen=list(range(40)), rejected=[7], split='val'))
    data = write_rows(tmp_path / 'pairs.jsonl', rows)
    knobs = dict(init=place / 'init', data=data, max_steps=4)
    done = run(tmp_path, 'out', **knobs)
    assert done.returncode == 0, done.stderr
    out = tmp_path / 'out'
    with open(out / 'log.jsonl', 'a') as file:
        file.write('{"step": 4')  # torn
    names = ('train_state.pt', 'model.safetensors')
    before = [(out / name).read_bytes() for name in names]
    full = subprocess.run(
        [sys.executable, *command(tmp_path, 'out', **knobs | dict(max_steps=6))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENV,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000,) * 2),
    )
    assert full.returncode == 2 and 'make room' in full.stderr.splitlines()[-1], full.stderr
    assert 'Traceback' not in full.stderr
    assert before == [(out / name).read_bytes() for name in names]
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, 'out', **knobs | dict(max_steps=6))],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()  # a reader that leaves does not stop the run
    assert 'Error' not in process.stderr.read()
    assert process.wait() == 0 and read_log(out)[-1]['step'] == 6


def test_two_processes_are_one(place):
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv_backend=c10d')
    launcher += ('--rdzv_endpoint=localhost:0', '--master_port=0')
    two = run(place, 'two', launcher, max_steps=6, sft_weight=0.1)
    assert two.returncode == 0, two.stderr[-2000:]
    one = run(place, 'one', max_steps=6, sft_weight=0.1)
    assert one.returncode == 0, one.stderr
    for a, b in zip(read_log(place / 'two'), read_log(place / 'one'), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=2e-5) for key in a if key != 'damage')


def test_mistakes_are_one_line(place, tmp_path, inside):
    (tmp_path / 'empty.jsonl').write_text('')
    for knobs, message in (
        (dict(init=tmp_path / 'none'), 'none'),
        (dict(data=tmp_path / 'empty.jsonl'), '0 pairs to train on are no batch'),
        (dict(data=tmp_path / 'none.jsonl'), 'no pairs'),
        (dict(out_dir=place / 'init'), 'would be lost'),
        (dict(max_steps=0), 'one of them must end the run'),
    ):
        code, _, errors = inside('wrong', **knobs)
        assert code == 2 and len(errors) == 1 and message in errors[0]
