"""train.py: the loader, the schedule, exact resumption, processes, skipped steps, signals, optimizers."""

import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from model import BOS, OFFSET, SLM, SLMConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)
ENV = dict(os.environ, OMP_NUM_THREADS='1')
TINY = (
    '--init=scratch --n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --n_ffn=64 --context=32 --batch_size=4 --global_batch=8 --max_steps=40 '
    '--train_hours=9 --warmup_steps=5 --eval_interval=20 --save_interval=20 --grad_clip=1 --device=cpu'.split()
)


def write_set(folder, utterances, val=(), units=20):
    os.makedirs(folder, exist_ok=True)
    counts = {}
    for split, rows in (('train', utterances), ('val', val)):
        tokens = np.array(
            [token for row in rows for token in (BOS, *(unit + OFFSET for unit in row), BOS)],
            np.uint16,
        )
        tokens.tofile(os.path.join(folder, split + '.bin'))
        counts[split] = len(tokens)
    with open(os.path.join(folder, 'meta.json'), 'w') as file:
        json.dump(
            dict(
                vocab_size=units + OFFSET,
                n_units=units,
                offset=OFFSET,
                dtype='uint16',
                tokens=counts,
                dedup=True,
                frame_rate=25.0,
                encoder='encoder',
                vocoder='hifigan25',
            ),
            file,
        )
    with open(os.path.join(folder, 'units.jsonl'), 'w') as file:
        for i, row in enumerate(utterances):
            file.write(
                json.dumps(dict(file_name=f'audio/{i}.flac', units=[int(unit) for unit in row]))
                + '\n'
            )
    os.makedirs(os.path.join(folder, 'encoder'), exist_ok=True)
    with open(os.path.join(folder, 'encoder', 'encoder.json'), 'w') as file:
        file.write('{}')
    return str(folder)


def walks(n, seed, longest=100, units=20):
    """Utterances in which the next unit is often the one after: something to learn."""
    rng = np.random.default_rng(seed)
    return [
        np.cumsum(rng.choice([1, 1, 1, 2, 5], rng.integers(1, longest))) % units for _ in range(n)
    ]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp('data') / 'units'), walks(150, 0), walks(10, 1))


def command(*args, processes=1):
    launch = (
        ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        if processes > 1
        else []
    )
    return [sys.executable, *launch, 'train.py', *TINY, *args]


def run(*args, processes=1):
    return subprocess.run(
        command(*args, processes=processes),
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )


def inside(monkeypatch, capsys, *args):
    """The program in this process, for runs that end in an error: exit code and lines of stderr."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *TINY, *args])
    monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(SystemExit) as end:
        try:
            runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
        except Exception:
            sys.excepthook(*sys.exc_info())
    return end.value.code, capsys.readouterr().err.splitlines()


def losses(out):
    rows = [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))]
    return [row['loss'] for row in rows if 'loss' in row]


# ----------------------------------------------------------------------------- the loader


def test_every_token_once_an_epoch_without_padding(data):
    T, sets = 32, train.open_data(data)
    loader = train.Loader(sets, T, seed=3)
    tokens, n = loader.tokens[0], int(loader.ends[-1])
    assert n == len(tokens) and loader.lengths.max() == T and loader.lengths.sum() == n
    seen, predicted, at = np.zeros(n, int), np.zeros(n, int), 0
    for place, s, begin, length, last in loader.pieces(
        n // T
    ):  # all rows of the epoch but the one that ends in the next
        assert (
            place == at and place // T == (place + length - 1) // T
        )  # no gap, no piece over a row's end
        seen[begin : begin + length] += 1
        predicted[begin + 1 : begin + length + (not last)] += 1
        at += length
    rest = np.concatenate(
        [
            np.arange(b + l - left, b + l)
            for b, l, left in zip(
                loader.begins[loader.order],
                loader.lengths[loader.order],
                np.clip(loader.ends - loader.offset, 0, loader.lengths[loader.order]),
            )
        ]
    )
    assert (seen[rest] == 0).all() and (np.delete(seen, rest) == 1).all()
    assert predicted.max() == 1 and not predicted[loader.begins].any()
    assert predicted.sum() >= n - len(loader.begins) - T  # everything but the chunks' first tokens


def test_rows_hold_what_the_file_holds(data):
    loader = train.Loader(train.open_data(data), 32, seed=3)
    stream = np.concatenate(
        [
            loader.tokens[0][b : b + l]
            for b, l in zip(loader.begins[loader.order], loader.lengths[loader.order])
        ]
    ).astype(int)
    begins = np.zeros(len(stream), bool)
    begins[loader.ends[:-1]] = begins[0] = True
    step = next(loader.batches(2, 16))
    tokens, targets, doc = step['micro'].transpose(0, 1).reshape(3, -1)
    n = 16 * 32
    assert (tokens.numpy() == stream[:n]).all() and step['total'] == (targets >= 0).sum()
    assert (np.where(begins[1 : n + 1], -100, stream[1 : n + 1]) == targets.numpy()).all()
    border = np.r_[
        True, np.diff(doc.numpy()) != 0
    ]  # where attention is cut: at each chunk and each row
    assert (border == (begins[:n] | (np.arange(n) % 32 == 0))).all()


def test_a_document_does_not_see_another(data):
    loader = train.Loader(train.open_data(data), 32, seed=0)
    tokens, targets, doc = next(loader.batches(4, 4))['micro'][0]
    model = SLM(
        SLMConfig(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, n_ffn=64, vocab_size=22, context=32)
    )
    logits = model(tokens, doc=doc)
    for row in range(4):
        for d in doc[row].unique():
            part = tokens[row, doc[row] == d]
            torch.testing.assert_close(
                logits[row, doc[row] == d], model(part[None])[0], atol=1e-5, rtol=1e-4
            )


def test_processes_share_one_global_batch_and_states_resume(data):
    sets = train.open_data(data)
    one = train.Loader(sets, 32, 5).batches(2, 8)
    two = [train.Loader(sets, 32, 5).batches(4, 8, rank, 2) for rank in range(2)]
    later = train.Loader(sets, 32, 5)
    for step in range(80):  # into the third epoch
        a, b = next(one), [next(batches) for batches in two]
        rows = torch.cat([x['micro'].transpose(0, 1).reshape(3, -1, 32)[:2] for x in b], dim=1)
        assert (rows == a['micro'].transpose(0, 1).reshape(3, -1, 32)[:2]).all() and a[
            'total'
        ] == b[0]['total'] == b[1]['total']
        if step == 40:
            later.seek(*a['after'])
            resumed = later.batches(2, 8)
        if step > 40:
            assert (next(resumed)['micro'] == a['micro']).all()
    assert a['after'][0] >= 2


def test_mixture_takes_weights_and_repeats_nothing_early(tmp_path):
    folders = [
        write_set(str(tmp_path / name), walks(n, seed))
        for name, n, seed in (('a', 30, 1), ('b', 40, 2))
    ]
    loader = train.Loader(train.open_data(f'{folders[0]}:2,{folders[1]}:0.5'), 32, 0)
    n = np.diff(loader.first)
    shown = []
    for epoch in range(4):
        loader.seek(epoch, 0)
        assert (np.bincount(loader.order, minlength=n.sum())[: n[0]] == 2).all()
        shown.append(loader.order[loader.order >= n[0]])
    assert (
        sorted(np.concatenate(shown[:2]))
        == list(range(n[0], n.sum()))
        == sorted(np.concatenate(shown[2:]))
    )


def test_utterances_found_across_blocks_and_in_uint32(data):
    tokens = train.Loader(train.open_data(data), 32, 0).tokens[0]
    rows = walks(150, 0)
    starts = np.cumsum([0] + [len(row) + 2 for row in rows])[:-1]
    for block in (1, 7, 1 << 22):
        assert (train.find_utterances(tokens, block) == starts).all()
    assert (train.find_utterances(tokens.astype(np.uint32), 64) == starts).all()


def test_validation_rows_keep_chunks_whole(data):
    sets = train.open_data(data)
    loader, count = train.Loader(sets, 32, 0, 'val', whole=True), 0
    for step in loader.batches(4, 4):
        tokens, targets, doc = step['micro'][0]
        count += int((doc >= 0).sum())
        assert (
            (targets >= 0).sum() == step['total']
            and (tokens[doc < 0] == 0).all()
            and (targets[doc < 0] == -100).all()
        )
        if loader.epoch:
            break
    assert count == len(loader.tokens[0])


# ----------------------------------------------------------------------------- the schedule


def test_schedules_match_their_closed_forms():
    n, peak, low = 1000, 1e-3, 5e-5
    rate = lambda step, kind, steps=100, fraction=0.01: train.learning_rate(
        step, step / n, peak, low, kind, steps, fraction, n
    )
    for kind in ('cosine', 'inverse_sqrt', 'wsd'):
        assert [rate(s, kind) for s in (0, 49, 99)] == pytest.approx([peak / 100, peak / 2, peak])
    for step in (100, 300, 550, 999):
        assert rate(step, 'cosine') == pytest.approx(
            low + (peak - low) * (1 + math.cos(math.pi * (step - 100) / 900)) / 2
        )
        assert rate(step, 'inverse_sqrt') == pytest.approx(
            peak * math.sqrt(100 / (step + 100 - 100))
        )
    assert rate(500, 'inverse_sqrt', steps=0, fraction=0) == pytest.approx(
        peak * math.sqrt(10_000 / 10_500)
    )
    assert rate(800, 'wsd') == pytest.approx(peak) and rate(900, 'wsd') == pytest.approx(
        (peak + low) / 2
    )
    assert rate(99, 'cosine', steps=10, fraction=0.2) == pytest.approx(
        peak / 2
    )  # the longer warmup holds
    clock = train.learning_rate(
        300, 1.0, peak, low, 'cosine', 100, 0.01, n
    )  # the hours are over before the steps
    assert clock == pytest.approx(low)
    with pytest.raises(train.InputError, match='cosine'):
        rate(1, 'linear')


# ----------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize('name', ['adamw', 'muon', 'ademamix', 'adalomo'])
def test_each_optimizer_lowers_the_loss_and_resumes(name, data):
    def start():
        model = SLM(
            SLMConfig(
                n_layer=2, n_embd=32, n_head=2, n_kv_head=1, n_ffn=64, vocab_size=22, context=32
            )
        )
        return model, train.make_optimizers(
            model, name, 5e-3 if name != 'adalomo' else 5e-2, (0.9, 0.999), 1e-8, 0.0
        )

    def steps(model, optimizers, batches):
        out = []
        for batch in batches:
            tokens, targets, doc = batch['micro'][0]
            loss = model(tokens, targets, doc=doc)[1]
            loss.backward()
            for one in optimizers:
                one.step()
            model.zero_grad()
            out.append(loss.item())
        return out

    source = train.Loader(train.open_data(data), 32, 0).batches(8, 8)
    batches = [next(source) for _ in range(40)]
    if (
        name in ('ademamix', 'adalomo')
        and train.importlib.util.find_spec('pytorch_optimizer') is None
    ):
        with pytest.raises(train.InputError, match='pip install pytorch-optimizer'):
            start()
        return
    model, optimizers = start()
    curve = steps(model, optimizers, batches[:30])
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.3, curve
    again, fresh = start()
    again.load_state_dict(model.state_dict())
    for new, old in zip(fresh, optimizers):
        new.load_state_dict(torch.load(save(old.state_dict()), weights_only=True))
    assert steps(again, fresh, batches[30:]) == steps(model, optimizers, batches[30:])


def save(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# ----------------------------------------------------------------------------- the program


@pytest.fixture(scope='module')
def forty(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('run') / 'slm')
    done = run(f'--data={data}', f'--out_dir={out}', '--save_init')
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_learns_and_leaves_a_checkpoint(forty, data):
    from transformers import AutoModelForCausalLM

    out, done = forty
    curve = losses(out)
    assert len(curve) == 40 and np.mean(curve[-5:]) < curve[0] - 0.2
    assert done.stdout.strip().splitlines()[-1].startswith(f'{out}: 40 steps, 10,240 tokens')
    [estimate] = [line for line in done.stdout.splitlines() if line.startswith('estimated finish ')]
    around = {
        time.strftime('%a %H:%M', time.localtime(os.path.getmtime(out + '/model.safetensors') + s))
        for s in range(-120, 121, 30)
    }
    assert estimate[17:26] in around and done.stdout.index(estimate) < done.stdout.index(
        'step 12/40'
    ), estimate
    model, slam = SLM.from_pretrained(out), json.load(open(out + '/slam.json'))
    assert (
        os.path.exists(os.path.join(out, slam['encoder'], 'encoder.json'))
        and slam['vocoder'] == 'hifigan25'
        and slam['n_units'] == 20
    )
    assert (
        slam['recipe']['max_steps'] == 40
        and slam['scores']['val_loss'] < curve[0]
        and 'git_commit' in slam
    )
    tokens = torch.arange(1, 12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, atol=1e-5, rtol=1e-4)
    untrained = SLM.from_pretrained(os.path.join(os.path.dirname(out), 'untrained'))
    assert (untrained.embed.weight != model.embed.weight).any()
    again = run(f'--data={data}', f'--out_dir={out}', '--save_init')
    assert again.returncode == 0 and 'finished before' in again.stdout
    other = run(f'--data={data}', f'--out_dir={out}', '--lr=0.1', '--max_steps=50')
    assert (
        other.returncode == 2 and 'lr=0.001' in other.stderr and len(other.stderr.splitlines()) == 1
    )


def test_killed_and_resumed_is_the_same_run_bit_for_bit(forty, data, tmp_path):
    out = str(tmp_path / 'slm')
    process = subprocess.Popen(
        command(f'--data={data}', f'--out_dir={out}'),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    for line in process.stdout:
        if line.startswith('step 25/'):
            process.kill()  # five steps after its checkpoint
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL and len(losses(out)) < 40
    resumed = run(f'--data={data}', f'--out_dir={out}')
    assert resumed.returncode == 0 and 'going on at step 20' in resumed.stdout, resumed.stderr
    assert losses(out) == losses(forty[0])
    assert (
        open(out + '/model.safetensors', 'rb').read()
        == open(forty[0] + '/model.safetensors', 'rb').read()
    )


def test_two_processes_are_one(forty, data, tmp_path):
    done = run(f'--data={data}', f'--out_dir={tmp_path}/slm', '--batch_size=2', processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(f'{tmp_path}/slm') == pytest.approx(losses(forty[0]), abs=1e-5)
    assert done.stdout.count('step 40/40') == 1


def test_sharded_model_is_the_same_on_any_number_of_processes(forty, data, tmp_path):
    args = f'--data={data}', f'--out_dir={tmp_path}/slm', '--batch_size=2', '--shard_model'
    assert run(*args, processes=2).returncode == 0
    assert losses(f'{tmp_path}/slm') == pytest.approx(losses(forty[0]), abs=1e-5)
    assert (
        SLM.from_pretrained(f'{tmp_path}/slm').num_params()
        == SLM.from_pretrained(forty[0]).num_params()
    )
    done = run(*args, '--max_steps=44')
    assert (
        done.returncode == 0
        and 'going on at step 40' in done.stdout
        and len(losses(f'{tmp_path}/slm')) == 44
    ), done.stderr


def poisoned(folder):
    """An untied model whose embedding of unit 19 is not a number."""
    model = SLM(
        SLMConfig(
            'gpt_neox',
            n_layer=1,
            n_embd=32,
            n_head=2,
            n_kv_head=2,
            n_ffn=64,
            vocab_size=22,
            context=32,
            tied=False,
            act='gelu',
        )
    )
    with torch.no_grad():
        model.embed.weight[19 + OFFSET] = math.nan
    model.save_pretrained(
        folder, dict(encoder='mhubert25', vocoder='hifigan25', n_units=20, frame_rate=25.0)
    )
    return folder


def test_a_bad_batch_is_skipped_and_named(tmp_path):
    clean = [row for row in walks(300, 4, 30, 19)]
    data = write_set(str(tmp_path / 'units'), clean[:70] + [np.array([3, 19, 4])] + clean[70:])
    done = run(
        f'--data={data}',
        f'--out_dir={tmp_path}/slm',
        f'--init={poisoned(str(tmp_path / "bad"))}',
        '--eval_interval=0',
        '--max_steps=20',
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(f'{tmp_path}/slm/log.jsonl')]
    bad = [row for row in rows if row['loss'] is None]
    assert (
        len(bad) == 1
        and bad[0]['skipped'] == [f'{data} utterance 70 audio/70.flac']
        and 'audio/70.flac' in done.stdout
    )
    assert '1 steps skipped' in done.stdout and rows[-1]['loss'] < rows[0]['loss']
    model = SLM.from_pretrained(f'{tmp_path}/slm')
    assert all(p.isfinite().all() for name, p in model.named_parameters() if name != 'embed.weight')


def test_ten_bad_steps_stop_the_run(tmp_path):
    data = write_set(str(tmp_path / 'units'), [np.array([3, 19, 4])] * 50)
    done = run(
        f'--data={data}',
        f'--out_dir={tmp_path}/slm',
        f'--init={poisoned(str(tmp_path / "bad"))}',
        '--optimizer=muon',
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and '10 steps in a row' in done.stderr
        and f'{data} utterance' in done.stderr
    )


def test_sigterm_saves_and_leaves(data, tmp_path):
    out = str(tmp_path / 'slm')
    process = subprocess.Popen(
        command(f'--data={data}', f'--out_dir={out}', '--max_steps=100000', '--save_interval=0'),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step 10/'):
            process.send_signal(signal.SIGTERM)
            break
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and 'the same command continues' in stderr
    state = torch.load(out + '/train_state.pt', weights_only=True)
    assert 10 <= state['step'] == len(losses(out))
    assert SLM.from_pretrained(out).slam['scores']['step'] == state['step']


def test_a_reader_that_leaves_does_not_stop_the_run(forty, data, tmp_path):
    out = str(tmp_path / 'slm')
    process = subprocess.Popen(
        command(f'--data={data}', f'--out_dir={out}'),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 0 and losses(out) == losses(forty[0])


def test_a_full_disk_keeps_the_checkpoint_and_a_torn_log_line_is_no_matter(forty, data, tmp_path):
    out = str(shutil.copytree(forty[0], tmp_path / 'slm'))
    with open(out + '/log.jsonl', 'a') as file:
        file.write('{"step": 4')
    more = command(f'--data={data}', f'--out_dir={out}', '--max_steps=42')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # bytes a file
    full = subprocess.run(more, cwd=ROOT, env=ENV, capture_output=True, text=True, preexec_fn=limit)
    assert (
        full.returncode == 2 and len(full.stderr.splitlines()) == 1 and 'make room' in full.stderr
    ), full.stderr
    for name in ('train_state.pt', 'model.safetensors'):
        assert open(f'{out}/{name}', 'rb').read() == open(f'{forty[0]}/{name}', 'rb').read()
    assert subprocess.run(more, cwd=ROOT, env=ENV).returncode == 0
    assert len(losses(out)) == 42 and losses(out)[:40] == losses(forty[0])
    assert not [name for name in os.listdir(out) if name.endswith('.tmp')]


def test_memory_that_is_not_there_is_one_line(data, tmp_path, monkeypatch, capsys):
    def forward(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(SLM, 'forward', forward)
    code, lines = inside(monkeypatch, capsys, f'--data={data}', f'--out_dir={tmp_path}/slm')
    assert (
        code == 2
        and len(lines) == 1
        and all(word in lines[0] for word in ('out of memory', '--batch_size=4', '--context=32'))
    )


@pytest.mark.parametrize(
    'flag',
    [
        '--lr=-1',
        '--context=0',
        '--batch_size=0',
        '--batch_size=3',
        '--max_steps=0',
        '--train_hours=0',
        '--log_interval=0',
        '--dropout=1',
        '--decay_fraction=0',
        '--seed=-1',
        '--n_kv_head=0',
        '--schedule=linear',
        '--optimizer=sgd',
    ],
)
def test_a_knob_out_of_range_is_one_line(flag, data, tmp_path, monkeypatch, capsys):
    code, lines = inside(monkeypatch, capsys, f'--data={data}', f'--out_dir={tmp_path}/slm', flag)
    assert (
        code == 2
        and len(lines) == 1
        and flag[2:].split('=')[0] in lines[0]
        and not os.path.exists(f'{tmp_path}/slm/train_state.pt')
    )


def test_what_does_not_fit_a_former_run_is_one_line(forty, data, tmp_path, monkeypatch, capsys):
    out, other = (
        str(shutil.copytree(forty[0], tmp_path / 'slm')),
        str(shutil.copytree(data, tmp_path / 'units')),
    )
    state = torch.load(out + '/train_state.pt', weights_only=True)
    state['config']['data'] = other
    torch.save(state, out + '/train_state.pt')
    write_set(other, walks(149, 0), walks(10, 1))  # the same folder, encoded anew
    code, lines = inside(
        monkeypatch, capsys, f'--data={other}', f'--out_dir={out}', '--max_steps=42'
    )
    assert code == 2 and len(lines) == 1 and 'other data' in lines[0]
    code, lines = inside(
        monkeypatch, capsys, f'--data={data}', f'--out_dir={out}', '--max_steps=42'
    )
    assert code == 2 and len(lines) == 1 and 'is a run with data=' in lines[0]
    with open(out + '/train_state.pt', 'r+b') as file:
        file.truncate(1000)
    code, lines = inside(
        monkeypatch, capsys, f'--data={data}', f'--out_dir={out}', '--max_steps=42'
    )
    assert code == 2 and len(lines) == 1 and '--resume=False' in lines[0]
    code, lines = inside(monkeypatch, capsys, f'--data={data}', f'--out_dir={out}/slam.json/below')
    assert code == 2 and len(lines) == 1 and 'Not a directory' in lines[0]


def test_mistakes_are_one_line(data, tmp_path):
    os.makedirs(tmp_path / 'cut')
    for name in ('meta.json', 'train.bin', 'val.bin'):
        content = open(os.path.join(data, name), 'rb').read()
        open(tmp_path / 'cut' / name, 'wb').write(content[:-3] if name == 'train.bin' else content)
    with pytest.raises(train.InputError, match='no folder encoder'):
        train.open_data(str(tmp_path / 'cut'))
    for part in ('encoder', 'vocoder'):
        os.makedirs(tmp_path / 'cut' / part)
    with pytest.raises(train.InputError, match='truncated'):
        train.Loader(train.open_data(str(tmp_path / 'cut')), 32, 0)
    with pytest.raises(train.InputError, match='meta.json'):
        train.open_data('nowhere')
    for weight in ('much', '0', '-1', 'nan', 'inf'):
        with pytest.raises(train.InputError, match='NAME:WEIGHT'):
            train.open_data(f'{data}:{weight}')
    with pytest.raises(train.InputError, match='weights of data'):
        train.Loader(train.open_data(f'{data}:0.0001'), 32, 0)
    for i, change in enumerate((dict(dtype='none'), dict(tokens={}), dict(vocab_size=None), None)):
        shutil.copytree(data, tmp_path / f'meta{i}')
        meta = json.load(open(os.path.join(data, 'meta.json')))
        (tmp_path / f'meta{i}' / 'meta.json').write_text(
            json.dumps(meta | change if change else [])
        )
        with pytest.raises(train.InputError, match='prepare_units.py'):
            train.open_data(str(tmp_path / f'meta{i}'))
    (tmp_path / 'meta3' / 'meta.json').write_text(json.dumps(meta | dict(vocab_size=15)))
    with pytest.raises(train.InputError, match='has token 21, meta.json a vocabulary of 15'):
        train.Loader(train.open_data(str(tmp_path / 'meta3')), 32, 0)
    with pytest.raises(train.InputError, match='differ in vocab_size'):
        train.open_data(f'{data},{write_set(str(tmp_path / "other"), walks(3, 0), units=30)}')
    done = run('--data=nowhere', f'--out_dir={tmp_path}/slm')
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and 'prepare_units.py' in done.stderr
        and not os.path.exists(f'{tmp_path}/slm')
    )
