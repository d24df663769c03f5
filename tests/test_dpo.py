"""dpo.py: the loss against its closed form, log-probabilities against transformers, packing, the filter, and runs that are killed."""

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

import dpo
from model import EOS, OFFSET, SLM, InputError, SLMConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SENTENCES = """Ann walked to the market and bought bread. | She went home and ate the bread with her brother.
the dog saw the dog and the dog saw the dog again | the dog saw the dog
He rows, rows, rows; rows, rows, rows the boat. | Then he rows, rows, rows again!
A man pours water into a glass. | He drinks the water and smiles at the camera, then he puts the glass down on the table.
well | no
It rained. It rained. It rained. | It rained. It rained.
""".splitlines()


def random_pairs(n, units=40, seed=0, prompt=(0, 40), completion=(1, 20)):
    """Token triples (prompt, chosen, rejected) as load_pairs gives them."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(OFFSET, units + OFFSET, rng.integers(low, high + 1))
    return [
        (
            np.append(EOS, draw(*prompt)),
            np.append(draw(*completion), EOS),
            np.append(draw(*completion), EOS),
        )
        for _ in range(n)
    ]


def small(family='qwen2', units=40, seed=0, **more):
    config = dict(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_kv_head=2 if family in ('qwen2', 'llama') else 4,
        n_ffn=48,
        vocab_size=units + OFFSET,
        context=128,
    )
    model = SLM(SLMConfig(family=family, **config | more), seed=seed)
    for p in model.parameters():  # far from uniform predictions, else every test is easy
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model


def packed_logps(model, pairs, width, batch_size):
    return sum(
        model.logps(*one_pass, n=2 * len(pairs))
        for one_pass in dpo.lay_out(pairs, width, batch_size)
    ).view(-1, 2)


def write_pairs(path, n=80, units=40, seed=0):
    """Learnable pairs: chosen completions rise, rejected ones fall. Every eighth is held out."""
    rng = np.random.default_rng(seed)
    with open(path, 'w') as file:
        for i in range(n):
            start, parts = (
                int(rng.integers(units)),
                {'prompt': rng.integers(0, units, rng.integers(5, 30)).tolist()},
            )
            parts |= {
                key: [(start + sign * k) % units for k in range(int(rng.integers(4, 12)))]
                for key, sign in (('chosen', 1), ('rejected', -1))
            }
            row = {
                key: dict(units=value, duration=[1] * len(value), text=f'the {key} {i}')
                for key, value in parts.items()
            }
            file.write(
                json.dumps(
                    row | dict(voice='a', split='train' if i % 8 else 'val', file_name=str(i))
                )
                + '\n'
            )


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dpo')
    small().save_pretrained(
        folder / 'init',
        dict(
            encoder='mhubert25', vocoder='hifigan25', n_units=40, frame_rate=25.0, recipe=dict(lr=1)
        ),
    )
    write_pairs(folder / 'pairs.jsonl')
    return folder


def command(place, out, **knobs):
    knobs = (
        dict(
            init=place / 'init',
            data=place / 'pairs.jsonl',
            out_dir=place / out,
            batch_size=2,
            accumulation=4,
            context=128,
            lr=1e-3,
            warmup_steps=4,
            max_steps=24,
            train_hours=0,
            eval_interval=8,
            save_interval=6,
            log_interval=2,
            device='cpu',
        )
        | knobs
    )
    return [os.path.join(ROOT, 'dpo.py'), *(f'--{key}={value}' for key, value in knobs.items())]


def run(place, out, **knobs):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.run(
        [sys.executable, *command(place, out, **knobs)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def inside(monkeypatch, capsys, *args, **knobs):
    """The program in this process, for runs that end in an error: exit code, stdout and lines of stderr."""
    monkeypatch.setattr(sys, 'argv', command(*args, **knobs))
    monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(SystemExit) as end:
        try:
            runpy.run_path(os.path.join(ROOT, 'dpo.py'), run_name='__main__')
        except Exception:
            sys.excepthook(*sys.exc_info())
    said = capsys.readouterr()
    return (
        end.value.code,
        said.out,
        [line for line in said.err.splitlines() if line.startswith('dpo.py: ') or 'Error' in line],
    )


def read_log(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != 'elapsed'}
        for line in open(folder / 'log.jsonl')
    ]


# -----------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize('beta, smoothing', [(0.1, 0.0), (0.5, 0.0), (0.1, 0.2)])
def test_loss_and_gradients_are_the_closed_form(beta, smoothing):
    pc, pr, rc, rr = (-200 * torch.rand(50, dtype=torch.float64) for _ in range(4))
    pc.requires_grad_(), pr.requires_grad_()
    losses, chosen, rejected = dpo.dpo_loss(pc, pr, rc, rr, beta, smoothing)
    losses.sum().backward()
    for i in range(50):
        margin = beta * ((pc[i] - rc[i]).item() - (pr[i] - rr[i]).item())
        sigmoid = 1 / (1 + math.exp(-margin))
        log_sigmoid = lambda x: -math.log1p(math.exp(-x)) if x > -30 else x
        assert losses[i].item() == pytest.approx(
            -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin),
            rel=1e-12,
            abs=1e-12,
        )
        slope = -beta * (
            (1 - smoothing) * (1 - sigmoid) - smoothing * sigmoid
        )  # of the loss in policy_chosen
        assert pc.grad[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-14)
        assert pr.grad[i].item() == pytest.approx(-slope, rel=1e-9, abs=1e-14)
        assert (chosen[i] - rejected[i]).item() == pytest.approx(margin, rel=1e-12, abs=1e-12)
    assert not chosen.requires_grad and not rejected.requires_grad


def test_measure_counts_by_hand():
    policy, reference = (
        torch.tensor([[-10.0, -12.0], [-8.0, -6.0], [-5.0, -5.0]]),
        torch.tensor([[-11.0, -12.0], [-8.0, -8.0], [-5.0, -5.0]]),
    )
    loss, accuracy, margin, chosen, rejected, drift, preferred = dpo.measure(
        policy, reference, torch.tensor([[5, 4], [4, 4], [2, 2]]), 0.1
    ).tolist()
    assert loss == pytest.approx(
        (-math.log(1 / (1 + math.exp(-0.1))) - math.log(1 / (1 + math.exp(0.2))) + math.log(2)) / 3
    )
    assert (accuracy, preferred) == (
        pytest.approx(0.5),
        pytest.approx(0.5),
    )  # one won, one lost, one tied
    assert margin == pytest.approx((0.1 - 0.2) / 3, abs=1e-6) and drift == pytest.approx(1 / 11)
    assert chosen == pytest.approx(-23 / 3) and rejected == pytest.approx(-23 / 3)


def test_learning_rate_is_the_inverse_square_root():
    assert (
        dpo.learning_rate(0, 1.0, 100) == pytest.approx(0.01)
        and dpo.learning_rate(99, 1.0, 100) == 1.0
    )
    for step in (100, 101, 400, 812):
        assert dpo.learning_rate(step, 5e-5, 100) == pytest.approx(5e-5 * math.sqrt(100 / step))
    assert dpo.learning_rate(813, 5e-5, 0) == pytest.approx(5e-5 * math.sqrt(10000 / 10813))


# -----------------------------------------------------------------------------
# Log-probabilities and packing


@pytest.mark.parametrize(
    'family, more',
    [
        ('qwen2', {}),
        ('opt', dict(act='relu')),
        ('gpt_neox', dict(act='gelu', tied=False, rotary_pct=0.25)),
    ],
)
def test_packed_logps_are_transformers_on_padded_batches(family, more, tmp_path):
    from transformers import AutoModelForCausalLM

    model, pairs = small(family, **more), random_pairs(13)
    model.save_pretrained(tmp_path, {})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation='eager'
    ).eval()
    with torch.no_grad():
        ours = packed_logps(model, pairs, 128, 2)
        for side in (0, 1):
            sequences = [np.concatenate((pair[0], pair[1 + side])) for pair in pairs]
            longest = max(map(len, sequences))
            tokens, mask = (
                torch.zeros(len(pairs), longest, dtype=torch.long),
                torch.zeros(len(pairs), longest, dtype=torch.long),
            )
            for i, sequence in enumerate(sequences):
                tokens[i, : len(sequence)], mask[i, : len(sequence)] = torch.from_numpy(sequence), 1
            logps = (
                theirs(tokens, attention_mask=mask)
                .logits.double()
                .log_softmax(-1)[:, :-1]
                .gather(2, tokens[:, 1:, None])[..., 0]
            )
            for i, (sequence, pair) in enumerate(zip(sequences, pairs)):
                assert ours[i, side].item() == pytest.approx(
                    logps[i, len(pair[0]) - 1 : len(sequence) - 1].sum().item(), rel=1e-4
                )


def test_packed_is_unpacked_with_its_gradients():
    model, pairs = small(), random_pairs(16)
    reference = torch.randn(16, 2) * 3 - 30

    def gradients(logps):
        model.zero_grad()
        dpo.dpo_loss(*logps.T, *reference.T)[0].mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def alone():
        rows = []
        for prompt, *completions in pairs:
            for completion in completions:
                tokens = torch.from_numpy(np.concatenate((prompt, completion)))[None]
                rows.append(
                    model.logps(tokens, (torch.arange(tokens.shape[1]) >= len(prompt))[None])
                )
        return torch.cat(rows).view(-1, 2)

    for width, batch_size in ((96, 1), (256, 3)):
        packed = packed_logps(model, pairs, width, batch_size)
        torch.testing.assert_close(packed, alone(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradients(packed), gradients(alone()), rtol=1e-3, atol=1e-5)


def test_laying_out_loses_and_doubles_nothing():
    pairs = random_pairs(40)
    laid = dpo.lay_out(pairs, 128, 3)
    assert laid.shape[1:] == (6, 3, 128)
    tokens, mask, doc, positions, branch, segments = laid.transpose(0, 1).flatten(1, 3).numpy()
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        mine = doc == i + 1
        assert tokens[mine].tolist() == np.concatenate((prompt, chosen, rejected)).tolist()
        assert tokens[mine & (mask == 1) & (segments == 2 * i)].tolist() == chosen.tolist()
        assert tokens[mine & (mask == 1) & (segments == 2 * i + 1)].tolist() == rejected.tolist()
        assert positions[mine & (branch == 2)].tolist() == list(
            range(len(prompt), len(prompt) + len(rejected))
        )
    assert not mask[doc == 0].any() and (doc == 0).sum() == tokens.size - sum(
        sum(map(len, pair)) for pair in pairs
    )


def test_batches_are_even_and_rows_full():
    """With the paper's batch and lengths like SpokenSwag's (4.5 M tokens in 47 k pairs), at least 95 % of what is computed is used."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 90, 5000) + rng.integers(15, 60, 5000) + rng.integers(15, 60, 5000)
    batches = dpo.deal(lengths, 64, 1234, 0)
    assert batches.shape == (78, 64) and len(np.unique(batches)) == batches.size
    assert (batches != dpo.deal(lengths, 64, 1234, 1)).any() and (
        batches == dpo.deal(lengths, 64, 1234, 0)
    ).all()
    totals = lengths[batches].sum(1)
    assert totals.std() < 0.01 * totals.mean()
    width, filled = dpo.choose_width(lengths, batches[:8], 1024, 4)
    assert lengths.max() <= width <= 1024 and filled >= 0.95
    for batch in batches[:4]:
        rows = dpo.pack(lengths[batch], width)
        assert (
            sorted(i for row in rows for i in row) == list(range(64))
            and max(lengths[batch][row].sum() for row in rows) <= width
        )
    assert (
        dpo.choose_width(np.array([2000, 30]), np.array([[0, 1]]), 1024, 1)[0] >= 2000
    )  # a pair longer than the context has room


# -----------------------------------------------------------------------------
# Reading


def test_filter_is_brute_force_on_sentences():
    def brute(words):
        pairs = [(words[i], words[i + 1]) for i in range(len(words) - 1)]
        return (
            sum(
                any(pairs[i] == pairs[j] for j in range(len(pairs)) if j != i)
                for i in range(len(pairs))
            )
            / len(pairs)
            if pairs
            else 0.0
        )

    for line in SENTENCES:
        words = (
            line.replace('|', ' ')
            .replace('.', ' . ')
            .replace(',', ' , ')
            .replace(';', ' ; ')
            .replace('!', ' ! ')
            .split()
        )
        assert dpo.auto_bleu(words) == pytest.approx(brute(words))
    assert dpo.auto_bleu([]) == dpo.auto_bleu(['one']) == 0.0
    assert dpo.auto_bleu('a b a b'.split()) == pytest.approx(2 / 3)


def test_filter_split_and_counts(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    units, rows = lambda *u: dict(units=list(u)), []
    for prompt, chosen in (line.split(' | ') for line in SENTENCES):
        rows.append(
            dict(
                prompt=units(1, 2, 3),
                chosen=units(4, 5),
                rejected=units(6),
                prompt_text=prompt,
                chosen_text=chosen,
            )
        )
    rows += [
        dict(
            prompt=units(1, 2, 1, 2), chosen=units(1, 2), rejected=units(3)
        ),  # no text: units repeat themselves
        dict(prompt=units(1, 2), chosen=units(3, 4), rejected=units(5)),
        dict(prompt=units(1), chosen=units(), rejected=units(5), chosen_text='x'),
        dict(prompt=units(1), chosen=units(5), rejected=units(5)),
        dict(prompt=units(), chosen=units(*range(30)), rejected=units(5)),
        dict(prompt=units(*range(30)), chosen=units(5), rejected=units(6), split='val'),
    ]
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    train, val, count = dpo.load_pairs(str(path), 30, 16, 0.3, 10)
    kept = [dpo.auto_bleu(words) < 0.3 for *_, words in dpo.read_pairs(str(path)) if words]
    assert kept[:6] == [True, False, False, True, True, False]
    assert count == dict(read=12, without_text=5, unusable=2, repetitive=4, truncated=2)
    assert len(train) == 5 and len(val) == 1
    assert val[0][0].tolist() == [29 - k + OFFSET for k in range(13, -1, -1)] and val[0][
        1
    ].tolist() == [5 + OFFSET, EOS]
    assert dpo.load_pairs(str(path), 30, 16, 1.1, 10)[2]['repetitive'] == 0


def test_truncation_spares_the_end_of_the_prompt_and_the_beginning_of_completions():
    a = np.arange(100)
    prompt, chosen, rejected = dpo.truncate(a[:50], a[:30], a[:10], 64)
    assert prompt.tolist() == list(range(16, 50)) and len(chosen) == 30 and len(rejected) == 10
    prompt, chosen, rejected = dpo.truncate(a[:50], a[:80], a[:40], 64)
    assert (
        prompt.tolist() == list(range(18, 50))
        and chosen.tolist() == list(range(32))
        and rejected.tolist() == list(range(32))
    )
    assert [len(x) for x in dpo.truncate(a[:10], a[:80], a[:40], 64)] == [10, 54, 40]
    assert [len(x) for x in dpo.truncate(a[:10], a[:20], a[:40], 64)] == [10, 20, 40]


def test_layouts_of_the_public_toolkit(tmp_path):
    path, say = tmp_path / 'pairs.jsonl', lambda *u: ''.join(f'<Un{x}>' for x in u)
    rows = [
        dict(
            prompt=dict(units=[1, 2], duration=[1, 1], text='Hi there.'),
            chosen=dict(units=[3], text="It's ok"),
            rejected=dict(units=[4]),
        ),
        dict(
            prompt=dict(audio_repr=say(1, 2)),
            chosen=dict(audio_repr=say(3)),
            rejected=dict(audio_repr=say(4)),
            prompt_text='Hi there.',
            chosen_text="It's ok",
        ),
        dict(prompt=say(1, 2), chosen=say(3), rejected=say(4)),
        dict(prompt=[1, 2], chosen=[3], rejected=[4]),
    ]
    path.write_text('\n'.join(map(json.dumps, rows)))
    read = list(dpo.read_pairs(str(path)))
    assert all([part.tolist() for part in row[:3]] == [[1, 2], [3], [4]] for row in read)
    assert [row[4] for row in read] == [['Hi', 'there', '.', "It's", 'ok']] * 2 + [None] * 2


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"prompt": {"units": [1]}, "cho', 'line 2 is no preference pair'),
        ('{"prompt": {"units": [1]}, "chosen": {"units": [1]}}', 'line 2 is no'),
        (
            '{"prompt": {"units": [1]}, "chosen": {"text": "x"}, "rejected": {"units": [1]}}',
            'line 2 is no',
        ),
        ('[1, 2]', 'line 2 is no'),
        (
            '{"prompt": {"units": [1]}, "chosen": {"units": [40]}, "rejected": {"units": [1]}}',
            'has unit 40, the model knows 0 to 39',
        ),
        (
            '{"prompt": {"units": [1]}, "chosen": {"units": [-1]}, "rejected": {"units": [1]}}',
            'has unit -1',
        ),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / 'pairs.jsonl'
    path.write_text(
        '{"prompt": {"units": [1]}, "chosen": {"units": [2]}, "rejected": {"units": [3]}}\n'
        + line
        + '\n'
    )
    with pytest.raises(InputError, match=message):
        dpo.load_pairs(str(path), 40, 128, 0.3, 10)


def test_held_out_pairs_do_not_depend_on_the_order_of_lines(tmp_path):
    write_pairs(tmp_path / 'pairs.jsonl')
    lines = [line.replace('"val"', '"train"') for line in open(tmp_path / 'pairs.jsonl')]
    (
        (tmp_path / 'a.jsonl').write_text(''.join(lines)),
        (tmp_path / 'b.jsonl').write_text(''.join(lines[::-1])),
    )
    a, b = (
        dpo.load_pairs(str(tmp_path / name), 40, 128, 0.3, 100)[1]
        for name in ('a.jsonl', 'b.jsonl')
    )
    assert len(a) == 4 and all(np.array_equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


# -----------------------------------------------------------------------------
# Runs


def test_a_run_its_reference_and_the_same_command_again(place):
    done = run(place, 'whole', warn_drop=-10)
    assert done.returncode == 0, done.stderr
    log = read_log(place / 'whole')
    first, last = log[0], log[-1]
    assert first['step'] == 0 and first['val_loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert first['val_margin'] == 0 and first['val_accuracy'] == 0.5 and first['val_drift'] == 0
    assert (
        last['val_accuracy'] > 0.9
        and last['val_loss'] < 0.6
        and 'lost' in last['warning']
        and 'WARNING' in done.stdout
    )
    assert {'loss', 'accuracy', 'margin', 'chosen', 'rejected', 'norm', 'lr'} <= set(log[1])
    for folder in ('whole', 'whole/best'):
        model = SLM.from_pretrained(str(place / folder))
        assert (
            model.slam['encoder'] == 'mhubert25'
            and model.slam['recipe']['beta'] == 0.1
            and model.slam['recipe']['pretraining'] == dict(lr=1)
        )
    train, val, _ = dpo.load_pairs(str(place / 'pairs.jsonl'), 40, 128, 0.3, 512)
    [cache] = place.glob('reference-*.npz')
    with torch.no_grad():
        again = packed_logps(SLM.from_pretrained(str(place / 'init')), train + val, 128, 4)
    np.testing.assert_allclose(np.load(cache)['logps'], again, rtol=1e-5, atol=1e-4)
    weights, written = (
        (place / 'whole/model.safetensors').read_bytes(),
        os.path.getmtime(place / 'whole/model.safetensors'),
    )
    again = run(place, 'whole')
    assert (
        again.returncode == 0
        and 'finished before' in again.stdout
        and os.path.getmtime(place / 'whole/model.safetensors') == written
    )
    other = run(place, 'whole', beta=0.2)
    assert (
        other.returncode == 2
        and 'beta=0.1, now 0.2' in other.stderr
        and 'Traceback' not in other.stderr
    )
    assert (place / 'whole/model.safetensors').read_bytes() == weights


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(place, number):
    """Stopped in the middle and run again: the weights, the optimizer and the log of a run that nothing disturbed."""
    if not (place / 'whole').exists():
        run(place, 'whole')
    out = f'stopped{int(number)}'
    process = subprocess.Popen(
        [sys.executable, *command(place, out)],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step 10/24'):
            process.send_signal(number)
            break
    process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + signal.SIGTERM)
    state = torch.load(place / out / 'train_state.pt', weights_only=True)
    assert state['step'] == 6 if number == signal.SIGKILL else state['step'] >= 10
    SLM.from_pretrained(str(place / out))
    done = run(place, out)
    assert done.returncode == 0 and f'going on from step {state["step"]}' in done.stdout, (
        done.stderr
    )
    assert (place / out / 'model.safetensors').read_bytes() == (
        place / 'whole/model.safetensors'
    ).read_bytes()
    a, b = (
        torch.load(place / name / 'train_state.pt', weights_only=True)['optimizer']['state']
        for name in (out, 'whole')
    )
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    if number == signal.SIGKILL:
        assert [r for r in read_log(place / out) if 'loss' in r] == [
            r for r in read_log(place / 'whole') if 'loss' in r
        ]


def test_the_options_of_the_loss_against_its_closed_form(place, monkeypatch, capsys):
    """The gradient of the first step, where the policy is the reference: of -beta / 2 (1 - 2 e) (chosen - rejected), pair by pair, and of the
    mean negative log-likelihood of a chosen token times sft_weight. The loss: ln 2 whatever e, and sft_weight is no part of it."""
    train, _, _ = dpo.load_pairs(str(place / 'pairs.jsonl'), 40, 128, 0.3, 512)
    pairs = [
        train[i] for i in dpo.deal(np.array([sum(map(len, pair)) for pair in train]), 8, 1234, 0)[0]
    ]
    model, norms = SLM.from_pretrained(str(place / 'init')).double(), []
    logps = [
        model.logps(
            torch.from_numpy(np.concatenate((prompt, one)))[None],
            torch.tensor([[0] * len(prompt) + [1] * len(one)]),
        )
        for prompt, *both in pairs
        for one in both
    ]
    margin, likelihood = (
        sum(logps[::2]) - sum(logps[1::2]),
        sum(logps[::2]) / sum(len(chosen) for _, chosen, _ in pairs),
    )
    for i, (e, weight) in enumerate(((0, 0), (0.2, 0), (0.2, 0.5))):
        gradient = torch.autograd.grad(
            -0.1 / 2 * (1 - 2 * e) * margin / 8 - weight * likelihood,
            list(model.parameters()),
            retain_graph=True,
        )
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradient)))
        code, out, _ = inside(
            monkeypatch,
            capsys,
            place,
            f'options{i}',
            max_steps=1,
            log_interval=1,
            label_smoothing=e,
            sft_weight=weight,
        )
        assert code == 0, out
        [row] = [row for row in read_log(place / f'options{i}') if 'loss' in row]
        assert row['norm'] == pytest.approx(norms[-1], rel=1e-3, abs=1e-5) and row[
            'loss'
        ] == pytest.approx(math.log(2), abs=2e-5)
    assert (
        norms[1] == pytest.approx(0.6 * norms[0]) and abs(norms[2] / norms[1] - 1) > 0.1
    )  # so that each option shows


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(place, monkeypatch, capsys):
    code, out, errors = inside(
        monkeypatch,
        capsys,
        place,
        'wild',
        lr=1e30,
        warmup_steps=0,
        max_steps=40,
        eval_interval=0,
        save_interval=0,
    )
    assert code == 2 and len(errors) == 1 and 'steps in a row were not finite' in errors[0]
    lines = [line for line in out.splitlines() if '2 not finite, skipped' in line]
    assert lines and all(' | skipped | ' in line and '0.000' not in line for line in lines)
    assert all(('loss' in row) == (row['skipped'] < 2) for row in read_log(place / 'wild'))


def test_a_model_that_is_not_finite_is_one_line(place, tmp_path, monkeypatch, capsys):
    model = SLM.from_pretrained(str(place / 'init'))
    model.embed.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / 'init')
    code, _, errors = inside(monkeypatch, capsys, place, 'broken', init=tmp_path / 'init')
    assert code == 2 and len(errors) == 1 and 'no finite log-probability' in errors[0]


def test_memory_that_is_not_there_is_one_line(place, tmp_path, monkeypatch, capsys):
    def logps(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(SLM, 'logps', logps)
    code, _, errors = inside(
        monkeypatch,
        capsys,
        place,
        tmp_path / 'out',
        seed=7,
        data=shutil.copy(place / 'pairs.jsonl', tmp_path),
    )
    assert (
        code == 2
        and len(errors) == 1
        and all(word in errors[0] for word in ('out of memory', '--batch_size=2', '--context=128'))
    )


@pytest.mark.parametrize(
    'knob, value',
    [
        ('lr', -1),
        ('beta', 0),
        ('context', 0),
        ('batch_size', 0),
        ('accumulation', 0),
        ('log_interval', 0),
        ('seed', -1),
        ('label_smoothing', 0.5),
        ('sft_weight', -1),
        ('train_hours', -1),
    ],
)
def test_a_knob_out_of_range_is_one_line(knob, value, place, monkeypatch, capsys):
    code, _, errors = inside(monkeypatch, capsys, place, 'wrong', **{knob: value})
    assert (
        code == 2 and len(errors) == 1 and f'--{knob}=' in errors[0] and 'out of range' in errors[0]
    )


def test_a_held_out_pair_may_be_the_longest_and_a_full_disk_loses_nothing(place, tmp_path):
    lines = [json.loads(line) for line in open(place / 'pairs.jsonl')]
    long = dict(
        prompt=[1, 2, 3] * 20,
        chosen=list(range(40)),
        rejected=list(range(39, -1, -1)),
        chosen_text='a b',
        split='val',
    )
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [*lines, long]))
    knobs = dict(init=place / 'init', data=tmp_path / 'pairs.jsonl', context=128, max_steps=4)
    done = run(tmp_path, 'out', **knobs)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'out' / 'log.jsonl', 'a') as file:
        file.write('{"step": 4')  # torn
    names, knobs['max_steps'] = ('train_state.pt', 'model.safetensors'), 6
    before = [(tmp_path / 'out' / name).read_bytes() for name in names]
    full = subprocess.run(
        [sys.executable, *command(tmp_path, 'out', **knobs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000,) * 2),
    )
    assert (
        full.returncode == 2
        and 'make room' in full.stderr.splitlines()[-1]
        and 'Traceback' not in full.stderr
    ), full.stderr
    assert before == [(tmp_path / 'out' / name).read_bytes() for name in names]
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, 'out', **knobs)],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()  # a reader that leaves does not stop the run
    assert (
        'Error' not in process.stderr.read()
        and process.wait() == 0
        and read_log(tmp_path / 'out')[-1]['step'] == 6
    )


def test_two_processes_are_one(place):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc_per_node=2',
            '--master_port=0',
            '--rdzv_backend=c10d',
            '--rdzv_endpoint=localhost:0',
            *command(place, 'two', max_steps=6, sft_weight=0.1),
        ],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(place, 'one', max_steps=6, sft_weight=0.1)
    assert one.returncode == 0
    for a, b in zip(read_log(place / 'two'), read_log(place / 'one')):
        assert a.keys() == b.keys() and all(
            a[k] == pytest.approx(b[k], abs=2e-5) for k in a if k != 'warning'
        )


def test_mistakes_are_one_line(place, tmp_path):
    (tmp_path / 'empty.jsonl').write_text('')
    for knobs, message in (
        (dict(init=tmp_path / 'none'), 'none'),
        (dict(data=tmp_path / 'empty.jsonl'), 'leaves 0 pairs to train on'),
    ):
        done = run(place, 'wrong', **knobs)
        assert (
            done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
        ), done.stderr
    with pytest.raises(InputError, match='no pairs file'):
        dpo.load_pairs(str(tmp_path / 'none.jsonl'), 40, 128, 0.3, 10)
