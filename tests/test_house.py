"""The house: what every script keeps to, by its syntax tree, and the helpers they share."""

import config

import ast
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from model import (
    InputError,
    auto_bleu,
    find_audio,
    pack_rows,
    read_jsonl,
    tokenize_words,
    write_atomic,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ['prepare_units', 'make_synthetic', 'train', 'dpo', 'eval_slm', 'sample']


def read(script):
    with open(os.path.join(ROOT, script + '.py'), encoding='utf-8') as file:
        return file.read()


def knobs_of(source):
    """The names assigned between the two ruled lines."""
    lines = source.splitlines()
    first, last = [i for i, line in enumerate(lines) if re.match(r'^# -{20,}', line)][:2]
    tree = ast.parse('\n'.join(lines[first + 1 : last]))
    return {target.id for node in tree.body for target in node.targets}


def assigned_in(node):
    """Every name that a statement and what is below it assigns, functions of their own left out."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            # a function has names of its own, unless it says global
            names |= {
                name
                for below in ast.walk(child)
                if isinstance(below, ast.Global)
                for name in below.names
            }
            continue
        if isinstance(child, ast.comprehension | ast.GeneratorExp | ast.ListComp):
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        names |= assigned_in(child)
    return names


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_knob_is_assigned_in_the_main_body(script):
    """A knob is a constant: what is derived from it has a name of its own."""
    source = read(script)
    mains = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    main = next(node for node in mains if ast.unparse(node.test) == "__name__ == '__main__'")
    assert not knobs_of(source) & assigned_in(main)


def test_the_check_above_finds_what_it_looks_for():
    tree = ast.parse(
        'if x:\n    for a, (b, *c) in d: e = f = 1\n    with g as h: i += 1\n    (j := 2)'
    )
    assert assigned_in(tree.body[0]) == set('abcefhij')
    assert assigned_in(ast.parse('if x:\n def f():\n  global g\n  g = 1\n  k = 2').body[0]) == {'g'}


@pytest.mark.parametrize('script', [*SCRIPTS, 'model'])
def test_scripts_share_model_and_config_alone(script):
    imported = set()
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split('.')[0])
    forbidden = {*SCRIPTS} if script != 'model' else {*SCRIPTS, 'config'}
    assert not imported & forbidden


@pytest.mark.parametrize('script', SCRIPTS)
def test_config_is_imported_first(script):
    """From then on Ctrl-C is one line, also while torch loads."""
    tree = ast.parse(read(script))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert first.module == 'config'


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'torch':
            sys.meta_path.remove(self)  # once
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('script', SCRIPTS)
def test_interrupted_while_libraries_load(script):
    """Ctrl-C just as torch is looked for: one line, exit 130."""
    path = os.path.join(ROOT, script + '.py')
    command = [sys.executable, '-c', INTERRUPTED_IMPORT, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == f'{script}.py: interrupted; run the same command to continue'


def test_later_overrides_win_whatever_came_before(tmp_path, monkeypatch):
    """The script's own value says what type a knob has; None takes any, however it is set."""
    rule = '# ' + '-' * 30 + '\n'
    (tmp_path / 'script.py').write_text(f'{rule}price = None\nrate = 1.0\n{rule}')
    (tmp_path / 'recipe.py').write_text('price = True\nrate = 2\n')
    scope = dict(__file__=str(tmp_path / 'script.py'), price=None, rate=1.0)
    arguments = [str(tmp_path / 'recipe.py'), '--price=4', '--price', '1.5', '--rate=3']
    monkeypatch.setattr('sys.argv', ['script.py', *arguments])
    assert config.configure(scope) == dict(price=1.5, rate=3.0) and scope['price'] == 1.5
    monkeypatch.setattr('sys.argv', ['script.py', *arguments, '--price=neural'])
    assert config.configure(dict(scope, price=None, rate=1.0))['price'] == 'neural'


def run_script(tmp_path, body):
    """A script of the house with that main body, beside a link to config -> its process."""
    script = tmp_path / 'script.py'
    script.write_text(
        'from config import configure\n# ' + '-' * 30 + '\nknob = 1\n# ' + '-' * 30 + '\n'
        "if __name__ == '__main__':\n    config = configure(globals())\n" + body
    )
    if not (tmp_path / 'config').exists():
        (tmp_path / 'config').mkdir()
        with open(os.path.join(ROOT, 'config', '__init__.py'), encoding='utf-8') as file:
            (tmp_path / 'config' / '__init__.py').write_text(file.read())
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ('body', 'code', 'lines'),
    [
        ("    open('/no/such/file')\n", 2, 1),  # the user's to mend
        ('    raise OSError("ours, without a file")\n', 1, None),
        ("    raise OSError(9, 'Bad file descriptor')\n", 1, None),
        ('    raise TypeError("ours")\n', 1, None),
        ('    raise KeyboardInterrupt\n', 130, 2),
        ('    raise BrokenPipeError(32, "Broken pipe")\n', 1, 0),
    ],
)
def test_only_what_a_user_can_mend_is_one_line(tmp_path, body, code, lines):
    process = run_script(tmp_path, body)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert ('Traceback' in error) == (lines is None)
    if lines is not None:
        assert len(error.splitlines()) == lines


def test_second_interrupt_ends_a_script_that_hangs(tmp_path):
    body = (
        '    import time\n    try:\n        print("ready", flush=True)\n        time.sleep(60)\n'
        '    finally:\n        print("cleaning", flush=True)\n        time.sleep(60)\n'
    )
    process = run_script(tmp_path, body)
    for expected in ('ready', 'cleaning'):
        assert process.stdout.readline().strip() == expected
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


def test_what_a_killed_process_left_is_removed_though_nobody_collects_it(tmp_path):
    """A zombie has an id as a living process does; as many containers have it, nobody waits."""
    path = tmp_path / 'a.json'
    with subprocess.Popen(['sleep', '60']) as alive, subprocess.Popen(['true']) as zombie:
        names = [f'{path}.{socket.gethostname()}.{p.pid}.tmp' for p in (alive, zombie)]
        for name in names:
            Path(name).write_text('half')
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays
        with write_atomic(path) as file:
            file.write('whole')
        alive.kill()
    assert [os.path.exists(name) for name in names] == [True, False]
    assert path.read_text() == 'whole'


def test_write_atomic_is_whole_or_not_there(tmp_path):
    path = tmp_path / 'new' / 'file.txt'
    with pytest.raises(RuntimeError), write_atomic(path) as file:
        file.write('half')
        raise RuntimeError
    assert not os.listdir(path.parent)
    with write_atomic(path) as file:
        file.write('grüß')
    assert path.read_text(encoding='utf-8') == 'grüß'
    with pytest.raises(RuntimeError), write_atomic(path, 'wb') as file:
        file.write(b'half')
        raise RuntimeError
    assert path.read_text(encoding='utf-8') == 'grüß'
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_read_jsonl_names_file_and_line(tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"a": 1}\n\n{"a": NaN}\n')
    assert list(read_jsonl(path)) == [(1, {'a': 1}), (3, {'a': None})]
    for bad in ('{"a": ', '[1]', '\xff', '[' * 100_000):
        path.write_text('{}\n' + bad + '\n', encoding='latin-1')
        with pytest.raises(InputError, match='rows.jsonl, line 2'):
            list(read_jsonl(path))
    with pytest.raises(InputError, match='No such file'):
        list(read_jsonl(tmp_path / 'absent.jsonl'))


def test_find_audio(tmp_path):
    for name in ('b/2.MP3', 'b/.hidden.wav', 'a.flac', 'text.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'b' / 'circle').symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in find_audio(str(tmp_path))]
    assert found == ['a.flac', 'b/2.MP3']
    assert find_audio(str(tmp_path / 'a.flac')) == [str(tmp_path / 'a.flac')]
    (tmp_path / 'empty').mkdir()
    for bad in ('empty', 'absent'):
        with pytest.raises(InputError, match=bad):
            find_audio(str(tmp_path / bad))


def test_words_against_nltk():
    """Words, quotes, stops and clitics thrown together at random, and what a recogniser writes."""
    import random

    from nltk.tokenize import word_tokenize

    fragments = (
        """can't cannot CANNOT d'ye gimme gonna gotta lemme more'n wanna 'tis 'Twas we're """
        """they've DON'T it's dogs' 'em 's ' '' `` ` " “ ” ‘ ’ « » „ ( ) [ ] { } < > -- --- – — """
        """... .. . , : ; ? ! @ # $ % & * 3,000 3.14 10:30 U.S. Mr. end. word, a:b Ünïcode I'll"""
    ).split(' ')
    rng = random.Random(0)
    for _ in range(3000):
        words = [rng.choice(fragments) + rng.choice(['', ' ', '  ', '\n']) for _ in range(8)]
        text = ''.join(words[: rng.randint(0, 8)])
        assert tokenize_words(text) == word_tokenize(text, preserve_line=True)
    assert tokenize_words('"I can\'t," he said.') == "`` I ca n't , '' he said .".split()


def test_auto_bleu_by_hand():
    assert auto_bleu('a b a b'.split()) == 2 / 3  # ab twice of ab, ba, ab
    assert auto_bleu([1, 1, 1]) == 1
    assert auto_bleu(['a']) == auto_bleu([]) == 0
    assert auto_bleu('a b c a b c'.split(), n=3) == 2 / 4


def test_pack_rows_against_the_plain_definition():
    """Best fit decreasing, as the textbook has it: every row is looked at for every length."""
    import random

    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 60))]
        rows, room = [], []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fits = [(left, row) for row, left in enumerate(room) if left >= lengths[i]]
            if not fits:
                rows.append([i])
                room.append(40 - lengths[i])
            else:
                _, row = min(fits)
                rows[row].append(i)
                room[row] -= lengths[i]
        assert pack_rows(lengths, 40) == rows
