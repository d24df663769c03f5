"""dpo.py: losses against closed forms and TRL, log-probabilities against transformers, pairs that
are dropped, and runs that are killed or shared by two processes."""

import itertools
import math
import shutil
import signal
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fork_script, read_jsonl, run_checked, run_in_two, small_slm, write_jsonl
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import dpo
from model import EOS, OFFSET, load_slm


def random_pairs(n, prompt=(0, 40), completion=(1, 20)):
    rng = np.random.default_rng(0)
    sides = (prompt, completion, completion)
    return [
        dpo.make_pair(*(rng.integers(0, 40, rng.integers(a, b + 1)) for a, b in sides), 128)
        for _ in range(n)
    ]


def packed_logps(net, pairs, width):
    found = torch.zeros(len(pairs), 2)
    for row, indices in dpo.collate(pairs, width):
        found[torch.from_numpy(indices)] = net.logps(*row, n=2 * len(indices)).view(-1, 2)
    return found


def their_logps(theirs, pairs):
    """Each completion in a sequence of its own, by transformers' model: (n, 2)."""
    found = []
    for prompt, completion in ((pair[0], side) for pair in pairs for side in pair[1:]):
        tokens = torch.from_numpy(np.append(prompt, completion))[None]
        logps = theirs(tokens).logits.log_softmax(-1)[0, :-1]
        found.append(logps.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(found).view(-1, 2)


def their_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def learnable_rows(n=80, units=40):
    """Pairs whose chosen completions rise and rejected ones fall. Every eighth is held out."""
    rng = np.random.default_rng(0)
    for i in range(n):
        start = int(rng.integers(units))
        prompt = rng.integers(0, units, rng.integers(5, 30)).tolist()
        row = dict(prompt=dict(units=prompt, text='who'), split='train' if i % 8 else 'dev')
        for key, sign in (('chosen', 1), ('rejected', -1)):
            line = [(start + sign * k) % units for k in range(int(rng.integers(4, 12)))]
            row[key] = dict(units=line, text=f'the {key} {i}')
        yield row


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dpo')
    slam = dict(encoder='mhubert25', vocoder='hifigan25', n_units=40, dedup=True, encoder_id='abc')
    slam |= dict(recipe=dict(lr=1), compute=dict(hours=23.5), stage='pretraining')
    small_slm(40 + OFFSET).save_pretrained(folder / 'init', slam)
    write_jsonl(folder / 'pairs.jsonl', learnable_rows())
    return folder


def flags(place, out, **knobs):
    settings = dict(init=place / 'init', data=place / 'pairs.jsonl', out_dir=place / out)
    settings |= dict(batch_pairs=8, row_tokens=256, context=128, lr=1e-3, warmup_steps=4)
    settings |= dict(max_steps=24, epochs=0, train_hours=0, eval_interval=8, save_interval=6)
    settings |= dict(log_interval=2, device='cpu')
    return ['dpo.py', *(f'--{key}={value}' for key, value in (settings | knobs).items())]


def inside(place, out, mistake=None, **knobs):
    return run_checked(*flags(place, out, **knobs), mistake=mistake)


@pytest.fixture(scope='module')
def whole(place):
    return inside(place, 'whole')


def read_log(folder):
    """log.jsonl without the times."""
    clocks = ('elapsed', 'pairs_per_s')
    rows = read_jsonl(folder / 'log.jsonl')
    return [{key: row[key] for key in row if key not in clocks} for row in rows]


@pytest.mark.parametrize(
    ('name', 'beta'), [('dpo', 0.1), ('dpo', 0.5), ('ipo', 0.1), ('ipo', 1), ('simpo', 2)]
)
def test_losses_are_their_closed_forms(name, beta):
    rng = np.random.default_rng(0)
    policy, reference = -200 * rng.random((2, 50, 2))
    sizes = rng.integers(1, 60, (50, 2))
    scores = beta * policy / sizes if name == 'simpo' else beta * (policy - reference)
    margins = scores[:, 0] - scores[:, 1] - (0.5 * beta if name == 'simpo' else 0)
    expected = np.logaddexp(0, -margins)
    if name == 'ipo':
        gaps = (policy - reference) / sizes
        expected = (gaps[:, 0] - gaps[:, 1] - 1 / (2 * beta)) ** 2
    tensors = map(torch.from_numpy, (policy, reference, sizes))
    losses, _ = dpo.LOSSES[name](*tensors, beta)
    assert losses.numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_measures_by_hand():
    rewards = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [2.0, 2.0]])  # won, lost, a tie
    assert dpo.measure(torch.tensor([1.0, 2.0, 3.0]), rewards).tolist() == [6.0, 1.5, -0.5]
    policy, reference = torch.tensor([[-5.0, -9.0], [-8.0, -4.0]]), torch.zeros(2, 2)
    scores = dpo.validate(policy, reference, torch.tensor([[10, 10], [16, 10]]))
    assert scores['val_accuracy'] == 0.5 and abs(scores['val_margin']) < 1e-6
    assert scores['val_drift'] == pytest.approx(-13 / 26)  # nats a token of the chosen
    record = dict(step=1, loss=1, accuracy=1, margin=1, norm=1, lr=1, pairs_per_s=1)
    lines = dpo.format_record(record | scores, 2, 64)
    assert '64 pairs held out' in lines and 'WARNING: chosen' in lines
    assert 'WARNING' not in dpo.format_record(record | scores | dict(val_drift=-0.2), 2, 64)


def test_learning_rate_is_the_inverse_square_root():
    shares = {0: 0.01, 49: 0.5, 99: 1.0, 100: 1.0, 400: 0.5, 812: math.sqrt(100 / 812)}
    found = [dpo.learning_rate(step) / dpo.lr for step in shares]
    assert found == pytest.approx(list(shares.values()))


def test_packed_logps_and_gradients_are_transformers(place):
    net, theirs = load_slm(str(place / 'init')), their_model(place / 'init')
    pairs = random_pairs(16)
    reference = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)) * 3 - 30
    alone = their_logps(theirs, pairs)
    dpo.dpo_loss(alone, reference, None, 0.1)[0].mean().backward()
    expected = dict(theirs.named_parameters())['model.layers.1.mlp.down_proj.weight'].grad
    for width in (96, 384):
        net.zero_grad()
        packed = packed_logps(net, pairs, width)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-3)
        dpo.dpo_loss(packed, reference, None, 0.1)[0].mean().backward()
        torch.testing.assert_close(net.blocks[1].down.weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_batches_are_even_and_rows_full():
    """The paper's batch and lengths like SpokenSwag's: 94 % of what is computed is used."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 90, 5000) + rng.integers(15, 60, 5000) + rng.integers(15, 60, 5000)
    batches = list(itertools.islice(dpo.iter_batches(lengths, 64, 1234, 0), 160))
    first = np.array(batches[:78])
    assert len(np.unique(first)) == first.size and (first != np.array(batches[78:156])).any()
    for step in (5, 78, 100):
        assert (next(dpo.iter_batches(lengths, 64, 1234, step)) == batches[step]).all()
    totals = lengths[first].sum(1)
    assert totals.std() < 0.01 * totals.mean()
    for row_tokens, world in ((1024, 1), (2048, 2), (8192, 4)):
        width = dpo.row_width(lengths, 64, row_tokens, world, 128)
        rows = [len(dpo.pack_rows(lengths[batch], width)) for batch in first]
        assert width % 128 == 0 and width <= row_tokens
        assert max(rows) % world == 0 and max(rows) == min(rows)
        assert totals.sum() / (sum(rows) * width) > (0.94 if row_tokens > 1024 else 0.88)
    assert dpo.row_width(np.array([2000, 30]), 2, 1024, 1, 128) == 2048  # the longest has room


def test_all_that_is_dropped_is_counted_by_reason(tmp_path):
    pair = dict(prompt=[1, 2, 3], chosen=[4, 5], rejected=[6])
    rows = [
        dict(pair, prompt_text='Ann went to the market.', chosen_text='She ate at home.'),
        dict(pair, prompt_text='He rows, rows, rows; he', chosen_text='rows, rows, rows again!'),
        dict(prompt=[1], chosen=[], rejected=[5]),
        dict(prompt=[1], chosen=[5], rejected=[5]),
        dict(prompt=[], chosen=list(range(30)), rejected=[5]),
        dict(prompt=list(range(30)), chosen=[5], rejected=[6], split='validation'),
        dict(pair, split='Test'),
        dict(pair, split='dev-clean'),  # the same as the first
        dict(prompt=[7], chosen=[8], rejected=[9], split='val'),
    ]
    path = write_jsonl(tmp_path / 'pairs.jsonl', rows)
    train, val, count = dpo.load_pairs(path, 30, 16, 0.3, 1)
    assert len(train) == 2 and len(val) == 1
    assert count == {
        'dropped: auto-BLEU': 1,
        'dropped: empty or equal': 2,
        'dropped: test split': 1,
        'cut to the context': 2,
        'dropped from val: also in train': 1,
        'dropped from val: beyond val_pairs': 1,
    }
    _, val, _ = dpo.load_pairs(path, 30, 16, 0.3, 10)
    prompt, chosen, _ = max(val, key=lambda pair: len(pair[0]))
    assert prompt.tolist() == [OFFSET + unit for unit in range(16, 30)]
    assert chosen.tolist() == [OFFSET + 5, EOS]
    assert dpo.load_pairs(path, 30, 16, 0.0, 10)[2]['dropped: auto-BLEU'] == 0


def test_every_way_to_write_units(tmp_path):
    text = dict(prompt='<Un1><Un2>', chosen='<Un3>', rejected='<Un4>')  # of the public toolkit
    plain = dict(prompt=[1, 2], chosen=[3], rejected=[4])
    rows = [plain, text, {key: dict(units=units, text='x') for key, units in plain.items()}]
    rows += [{key: dict(audio_repr=units) for key, units in text.items()}]
    pairs, *_ = dpo.load_pairs(write_jsonl(tmp_path / 'pairs.jsonl', rows), 40, 128, 0.3, 0)
    assert [np.concatenate(pair).tolist() for pair in pairs] == 4 * [[1, 3, 4, 5, 1, 6, 1]]


def test_held_out_pairs_do_not_depend_on_the_order_of_lines(tmp_path):
    """A tenth of the pairs, by a hash, where no line names a split."""
    rows, found = [dict(row, split=None) for row in learnable_rows()], []
    for order in (rows, rows[::-1]):
        path = write_jsonl(tmp_path / 'some.jsonl', order)
        train, val, _ = dpo.load_pairs(path, 40, 128, 0.3, 100)
        assert len(val) == 8 and len(train) == 72
        found.append([np.concatenate(pair).tolist() for pair in val])
    assert found[0] == found[1]


def test_a_run_its_reference_and_the_same_command_again(place, whole):
    log = read_log(place / 'whole')
    last = log[-1]
    assert [row['step'] for row in log if 'val_loss' in row] == [8, 16, 24]
    assert last['val_accuracy'] > 0.9 and last['val_loss'] < 0.6 and last['val_drift'] != 0
    assert {'loss', 'accuracy', 'margin', 'norm', 'lr', 'tokens'} <= set(log[0])
    assert '70 pairs to train on, 10 held out' in whole.stdout
    net = load_slm(str(place / 'whole'))
    slam = net.slam
    assert (slam['encoder'], slam['stage'], slam['encoder_id']) == ('mhubert25', 'dpo', 'abc')
    assert slam['recipe']['beta'] == 0.1 and slam['recipe']['pretraining'] == dict(lr=1)
    assert slam['compute']['pretraining'] == dict(hours=23.5) and slam['scores']['step'] == 24
    state = torch.load(place / 'whole/train_state.pt', weights_only=True)
    assert torch.equal(state['model']['embed.weight'], net.embed.weight)  # those of the last step
    train, val, _ = dpo.load_pairs(str(place / 'pairs.jsonl'), 40, 128, 0.3, 512)
    with torch.no_grad():
        expected = their_logps(their_model(place / 'init'), train + val)
    torch.testing.assert_close(state['reference'], expected, rtol=1e-5, atol=1e-3)

    weights = (place / 'whole/model.safetensors').stat().st_mtime_ns
    inside(place, 'whole')
    assert (place / 'whole/model.safetensors').stat().st_mtime_ns == weights


@pytest.mark.parametrize(('name', 'code'), [('SIGKILL', -9), ('SIGTERM', 143)])
def test_a_stopped_run_resumes_bit_for_bit(place, whole, name, code):
    """The weights, the optimizer and the log of a run that nothing disturbed."""
    process = fork_script(*flags(place, name), at='step 10/24', number=getattr(signal, name))
    process.join()
    assert process.exitcode == code
    step = torch.load(place / name / 'train_state.pt', weights_only=True)['step']
    assert step == 6 if name == 'SIGKILL' else step >= 10
    assert f'steps {step} to 24' in inside(place, name).stdout
    ours, theirs = (
        torch.load(place / run / 'train_state.pt', weights_only=True) for run in (name, 'whole')
    )
    for key, value in theirs['model'].items():
        assert torch.equal(ours['model'][key], value)
    if name == 'SIGKILL':  # another signal leaves a line of its own
        assert read_log(place / name) == read_log(place / 'whole')


def test_two_processes_are_one(place, whole):
    run_in_two(*flags(place, 'two'))
    for a, b in zip(read_log(place / 'two'), read_log(place / 'whole'), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-4) for key in a)


def test_the_clock_and_epochs_end_a_run_after_one_step_at_least(place):
    """The reference's pass alone takes longer than train_hours; a fifth of an epoch of two."""
    knobs = dict(train_hours=1e-9, log_interval=1, max_steps=0)
    for _ in range(2):  # the second time there is nothing to do
        inside(place, 'clock', **knobs)
        assert read_log(place / 'clock')[-1]['step'] == 1
    assert (place / 'clock/model.safetensors').exists()
    inside(place, 'fifth', batch_pairs=32, epochs=0.2, max_steps=30)
    assert read_log(place / 'fifth')[-1]['step'] == 1


def test_pairs_are_cut_to_the_positions_of_the_model(place):
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, vocab_size=40 + OFFSET, max_position_embeddings=24)
    OPTForCausalLM(OPTConfig(**sizes)).save_pretrained(place / 'short')
    shutil.copy(place / 'init/slam.json', place / 'short')
    done = inside(place, 'cut', init=place / 'short', max_steps=1)
    assert 'cut to the context' in done.stdout


def test_a_loss_that_is_not_finite_ends_the_run(place):
    inside(place, 'wild', 'not finite at step 2', lr=1e30, warmup_steps=0, save_interval=0)
    assert not (place / 'wild/model.safetensors').exists()


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        (dict(loss='dro'), "loss 'dro' is unknown"),
        (dict(init='nowhere'), 'nowhere'),
        (dict(data='nowhere.jsonl'), 'nowhere.jsonl'),
        (dict(batch_pairs=100), '70 training pairs are fewer than one batch (100)'),
        (dict(out_dir='{place}/init'), 'would be overwritten'),
        (dict(out_dir='{place}/whole', beta=0.2), 'is a run with beta=0.1, not 0.2'),
        (dict(out_dir='{place}/whole', data='{place}/few.jsonl'), 'is a run with data'),
        (dict(data='{place}/other/pairs.jsonl'), 'different encoders'),
        (dict(data='{place}/bad.jsonl'), "line 2 cannot be read: 'rejected'"),
        (dict(data='{place}/far.jsonl'), '0 to 39'),
    ],
)
def test_a_mistake_is_one_line(place, whole, knobs, message):
    pair = dict(prompt=[1], chosen=[2], rejected=[40])  # units are 0 to 39
    write_jsonl(place / 'far.jsonl', [pair])
    write_jsonl(place / 'bad.jsonl', [dict(pair, rejected=[3]), dict(prompt=[1], chosen=[2])])
    write_jsonl(place / 'few.jsonl', list(learnable_rows())[:60])
    write_jsonl(place / 'other/pairs.jsonl', learnable_rows())
    write_jsonl(place / 'other/meta.json', [dict(encoder_id='xyz')])
    knobs = {key: str(value).format(place=place) for key, value in knobs.items()}
    inside(place, 'wrong', message, **knobs)


def test_loss_and_gradient_of_a_batch_are_those_of_trl(place, tmp_path):
    """DPOTrainer on padded batches with its reference model, for a policy that has left it."""
    trl = pytest.importorskip('trl')
    policy, reference = their_model(place / 'init'), their_model(place / 'init')
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy.save_pretrained(tmp_path)
    shutil.copy(place / 'init/slam.json', tmp_path)
    ours, pairs = load_slm(str(tmp_path)), random_pairs(8, prompt=(5, 20))
    names = 'prompt_ids', 'chosen_ids', 'rejected_ids'
    rows = [dict(zip(names, [part.tolist() for part in pair], strict=True)) for pair in pairs]
    expected = trl_step(trl, rows, policy, reference, 0.1)
    expected.backward()

    with torch.no_grad():
        known = packed_logps(load_slm(str(place / 'init')), pairs, 256)
    loss = dpo.dpo_loss(packed_logps(ours, pairs, 256), known, None, 0.1)[0].mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient = dict(policy.named_parameters())['model.layers.1.mlp.down_proj.weight'].grad
    torch.testing.assert_close(ours.blocks[1].down.weight.grad, gradient, rtol=1e-3, atol=1e-5)


def trl_step(trl, rows, policy, reference, beta):
    """The loss of TRL's DPOTrainer on padded batches of these rows."""
    from accelerate import Accelerator
    from trl.trainer import dpo_trainer

    trainer = object.__new__(trl.DPOTrainer)  # its loss alone: a whole one wants a text tokenizer
    outputs = 'log_probs', 'entropy', 'mean_logits', 'is_top1'
    dpo_trainer.add_fused_lm_head(policy, outputs=outputs)
    dpo_trainer.add_fused_lm_head(reference)
    trainer.__dict__ |= dict(
        model=policy, ref_model=reference, accelerator=Accelerator(cpu=True), beta=beta,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), loss_types=['sigmoid'],
        loss_weights=[1.0], label_smoothing=0.0, f_divergence_type='reverse_kl', ld_alpha=None,
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False, _tp_size=1,
        _metrics=dict(train=defaultdict(list), eval=defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    batch = dpo_trainer.DataCollatorForPreference(pad_token_id=0)(rows)
    return trainer._compute_loss(policy, batch, False)
