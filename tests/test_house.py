"""What every file keeps to, the override mechanism, and the small helpers that scripts share.

PYTHONPATH=. python tests/test_house.py prints the line counts beside their budgets.
"""

import config

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import model as M

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ['prepare_units', 'make_synthetic', 'train', 'dpo', 'eval_slm', 'sample']
# lines after ruff format: the budget, to which 5 % may be added, and for a file that does not meet
# it yet the most that it may have. Raise no number: delete something
BUDGETS = {
    'model.py': (1500, 0),
    'prepare_units.py': (680, 0),
    'make_synthetic.py': (900, 0),
    'train.py': (480, 0),
    'dpo.py': (430, 0),
    'eval_slm.py': (930, 0),
    'sample.py': (330, 0),
    'config/__init__.py': (110, 0),
    'README.md': (180, 0),
    'tests/gpu_check.py': (500, 0),
    'tests/bench_*.py': (600, 0),
    'tests/*.py': (5000, 0),
}


def count_lines(pattern):
    return sum(len(path.read_text().splitlines()) for path in ROOT.glob(pattern))


@pytest.mark.parametrize('pattern', BUDGETS)
def test_no_file_grows_back(pattern):
    budget, most = BUDGETS[pattern]
    assert count_lines(pattern) <= max(1.05 * budget, most)


@pytest.mark.parametrize('script', [*SCRIPTS, 'model', 'config/__init__', 'tests/gpu_check'])
def test_functions_are_short(script):
    tree = ast.parse((ROOT / f'{script}.py').read_text(encoding='utf-8'))
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    parts += [node for node in tree.body if isinstance(node, ast.If)]  # the main body
    for part in parts:
        long = isinstance(part, ast.If) and script in ('train', 'dpo')
        assert part.end_lineno - part.lineno < (150 if long else 60), ast.unparse(part)[:100]


@pytest.mark.parametrize('script', [*SCRIPTS, 'model'])
def test_scripts_share_only_model_and_config(script):
    imported = re.findall(r'^ *(?:from|import) (\w+)', (ROOT / f'{script}.py').read_text(), re.M)
    assert not set(imported) & {*SCRIPTS, 'config' if script == 'model' else ''}
    if script != 'model':  # from then on Ctrl-C is one line, also while torch loads
        assert imported[0] == 'config'


def test_nothing_names_a_machine():
    files = [path for end in ('py', 'sh', 'md', 'html') for path in ROOT.glob(f'*/*.{end}')]
    files = [path for path in [*files, *ROOT.glob('*.[pm]*')] if path.is_file()]
    assert len(files) > 40
    for path in files:
        text = path.read_text(encoding='utf-8')
        assert not re.search(r'(/(home|root|Users|work)/|\.\./shared)\w', text), path


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/[a-z]*.py')), ids=lambda path: path.stem)
def test_recipes_set_knobs_of_their_script(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = dict(eval='eval_slm', synthetic='make_synthetic', units='prepare_units')
    names |= dict(dpo='dpo', sample='sample')
    script = names.get(path.stem.split('_')[-1], 'train')
    block, known = config.read_block(f'{script}.py')
    exec(block, knobs := {})
    assert set(config.run_config(path, knobs)) <= set(known)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script with knobs of all types, a config file beside it: arguments -> their values."""
    rule = '# ' + '-' * 30 + '\n'
    knobs = dict(price=None, rate=1.0, steps=3, flag=False, name='x')
    lines = ''.join(f'{key} = {value!r}\n' for key, value in knobs.items())
    (tmp_path / 'script.py').write_text(rule + lines + rule)
    (tmp_path / 'recipe.py').write_text('_own = 1\nprice = True\nrate = 2\nsteps = steps + 1\n')
    monkeypatch.chdir(tmp_path)

    def configure(*arguments):
        monkeypatch.setattr('sys.argv', ['script.py', *arguments])
        return config.configure(dict(knobs, __file__='script.py', __doc__='What it does.'))

    return configure


@pytest.mark.parametrize(
    ('arguments', 'wanted'),
    [
        (['recipe.py', '--rate=3'], dict(price=True, rate=3.0, steps=4)),
        (['--rate=3', '--steps=9', 'recipe.py'], dict(price=True, rate=2.0, steps=10)),
        (['--price', '1.5', '--flag', '--name=True'], dict(price=1.5, flag=True, name='True')),
        (['--price=neural', '--flag=false', '--steps=1e4'], dict(price='neural', steps=10_000)),
        (['--price', '--flag', 'True'], dict(price=True, flag=True)),
    ],
)
def test_files_and_flags_left_to_right(script, arguments, wanted):
    found = script(*arguments)
    assert found == dict(price=None, rate=1.0, steps=3, flag=False, name='x') | wanted
    assert type(found['rate']) is float and type(found['steps']) is int


MISTAKES = {
    "unknown knob 'raet'; did you mean rate": '--raet=3',
    "--rate: rate expects float, got 'fast'": '--rate=fast',
    'steps expects int, got 1.5': '--steps=1.5',
    'flag expects bool, got 3': '--flag=3',
    "--name needs a value: --name='x' is the default": '--name',
    'absent.py: FileNotFoundError': 'absent.py',
    "unexpected argument 'rate'": 'rate',
}


def test_a_wrong_flag_is_one_line(script, capsys):
    for message, argument in MISTAKES.items():
        with pytest.raises(SystemExit) as ended:
            script(argument)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and message in printed and printed.count('\n') == 1


def start(tmp_path, body):
    """A script beside a link to config, with this body -> its process."""
    if not (tmp_path / 'config').exists():
        (tmp_path / 'config').symlink_to(ROOT / 'config')
    (tmp_path / 's.py').write_text(f'import config\nimport time\n{body}\n')
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, str(tmp_path / 's.py')], **pipes)


@pytest.mark.parametrize(
    ('body', 'code', 'lines'),
    [
        ("open('/no/such/file')", 2, 1),
        ("raise OSError('a bug of ours, without a file')", 1, None),
        ("raise TypeError('a bug of ours')", 1, None),
        ('raise KeyboardInterrupt', 130, 1),
        ("raise BrokenPipeError(32, 'Broken pipe')", 1, 0),
    ],
)
def test_only_what_a_user_can_mend_is_one_line(tmp_path, body, code, lines):
    process = start(tmp_path, body)
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert ('Traceback' in error) if lines is None else (len(error.splitlines()) == lines)


def test_the_second_interrupt_ends_a_script_at_once(tmp_path):
    wait = 'print({!r}, flush=True); time.sleep(60)'
    body = f'try:\n    {wait.format("ready")}\nfinally:\n    {wait.format("cleaning")}'
    process = start(tmp_path, body)
    for expected in ('ready', 'cleaning'):
        assert process.stdout.readline().strip() == expected
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == -signal.SIGINT


def test_write_atomic_is_whole_or_not_there(tmp_path):
    path = tmp_path / 'new' / 'file.txt'
    for old in (None, 'grüß'):
        with pytest.raises(RuntimeError), M.write_atomic(path) as file:
            file.write('half')
            raise RuntimeError
        assert os.listdir(path.parent) == ([] if old is None else ['file.txt'])
        with M.write_atomic(path) as file:
            file.write('grüß')
        assert path.read_text(encoding='utf-8') == 'grüß'


if __name__ == '__main__':
    for pattern, (budget, _) in BUDGETS.items():
        print(f'{pattern:<20} {count_lines(pattern):>6} of {budget:>6} lines')
