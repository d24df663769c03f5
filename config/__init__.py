"""Overrides: `python train.py config/slam_a5000.py --lr=1e-3 --compile=False`, left to right.

A script's knobs are the module-level variables between its two ruled lines (`# ----`), and --help
prints that block. A config file is Python that assigns some of them; names that begin with an
underscore are its own. A knob keeps the type of its default; a default of None takes any literal.
"""

import ast
import contextlib
import difflib
import os
import re
import signal
import sys


def fail(message, code=2):
    """Exit with one line on stderr, `script: message`, for an error that the user can fix."""
    sys.stdout.flush()
    print(f'{os.path.basename(sys.argv[0])}: {" ".join(str(message).split())}', file=sys.stderr)
    raise SystemExit(code)


def report_error(kind, error, trace):
    """sys.excepthook: an error that the user can fix is one line; others keep their traceback."""
    if kind.__name__ == 'InputError':
        fail(error)
    if kind is KeyboardInterrupt:
        fail('interrupted; run the same command to continue', code=130)
    if kind is BrokenPipeError:  # the reader of our output has ended, as in `| head`
        os._exit(1)
    if 'No space left' in f'{error} {error.__context__}':
        fail('the disk is full; what is finished is kept')
    if isinstance(error, OSError) and error.filename:
        fail(f'{error.strerror}: {error.filename}; what is finished is kept')
    sys.__excepthook__(kind, error, trace)


def interrupt(number, frame):
    """The first Ctrl-C raises KeyboardInterrupt; the second ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


# only in a script, which imports this module first; a notebook or a test keeps its own handlers
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(sys.argv[0])) == root and sys.argv[0].endswith('.py'):
    sys.excepthook = report_error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def convert(key, value, defaults, where):
    """A knob's value, from a config file or the text of a flag, as the type of its default."""
    if key not in defaults:
        near = ', '.join(difflib.get_close_matches(key, defaults, 3, 0.5)) or 'one of --help'
        fail(f'{where}: unknown knob {key!r}; did you mean {near}?')
    default = defaults[key]
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):  # else it stays text
            value = ast.literal_eval(re.sub('^(true|false|none)$', lambda m: m[0].title(), value))
    if {type(default), type(value)} == {int, float} and value % 1 == 0:
        value = type(default)(value)  # --lr=1, --max_steps=1e4
    if default is not None and type(value) is not type(default):
        fail(f'{where}: {key} expects {type(default).__name__}, got {value!r}')
    return value


def run_config(path, knobs):
    """Execute a config file, which sees the present knobs -> {name: value} of what it assigned."""
    names = dict(knobs)
    try:
        with open(path, encoding='utf-8') as file:
            exec(compile(file.read(), path, 'exec'), names)
    except Exception as error:
        fail(f'{path}: {type(error).__name__}: {error}')
    own = [key for key in names if key[0] == '_' or hasattr(names[key], '__loader__')]  # imports
    return {k: v for k, v in names.items() if k not in own and v is not knobs.get(k, own)}


def read_block(path):
    """The text of a script between its two ruled lines, and the names of the knobs there."""
    with open(path, encoding='utf-8') as file:
        block = re.split(r'^# -{20,}\n', file.read(), flags=re.M)[1]
    return block, re.findall(r'^([a-z]\w*) *=', block, re.M)


def configure(scope):
    """Apply sys.argv to the knobs of a script: `config = configure(globals())` opens its main body.
    Returns every knob's final value, dict. Exits after --help and for a user's mistake."""
    block, names = read_block(scope['__file__'])
    defaults = {name: scope[name] for name in names}
    arguments = sys.argv[1:]
    while arguments:
        argument = arguments.pop(0)
        if argument in ('--help', '-h'):
            print(scope['__doc__'], block, sep='\n')
            raise SystemExit(0)
        if not argument.startswith('--'):
            if not argument.endswith('.py'):
                fail(f'unexpected argument {argument!r}: expected a config file or --key=value')
            for key, value in run_config(argument, {key: scope[key] for key in defaults}).items():
                scope[key] = convert(key, value, defaults, argument)
            continue
        key, equals, text = argument[2:].partition('=')
        key = key.replace('-', '_')
        if not equals:  # --flag alone is True; any other knob takes the next argument
            text, default = 'True', defaults.get(key)
            value = '(?i)true|false' if isinstance(default, bool) else '(?!--).*'
            if arguments and re.fullmatch(value, arguments[0]):
                text = arguments.pop(0)
            elif not isinstance(default, bool | None):
                fail(f'--{key} needs a value: --{key}={scope[key]!r} is the default')
        scope[key] = convert(key, text, defaults, f'--{key}')
    return {name: scope[name] for name in defaults}
