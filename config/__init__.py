"""The override mechanism of every script: files and flags over plain variables, left to right.

    python train.py config/slam_a5000.py --row_tokens=4096 --compile=False --wandb

A script's knobs are the module-level variables between its two ruled lines (`# ----`), each with
a comment. That block is the documentation: --help prints it. A config file is Python that assigns
some of these names (it sees their present values); names that begin with an underscore are its
own. `--key=value`, `--key value`, and bare `--flag` for True.

A mistake of the user's is one line on stderr and exit code 2, never a traceback: call `fail`, or
raise model.InputError. Scripts import this module before anything else, so that Ctrl-C is one
line too while the libraries load; a second Ctrl-C ends any script at once.
"""

import ast
import difflib
import errno
import os
import re
import signal
import sys

RULE = re.compile(r'^# -{20,}')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What a user can mend among the system's errors. Any other OSError is a mistake of ours and keeps
# its traceback.
MENDABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),  # no room to write
    *(errno.EACCES, errno.EPERM),  # no right to
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),  # a wrong path
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE),
)


def fail(message):
    """Print `script: message` as one line on stderr and exit with code 2."""
    sys.stdout.flush()
    script = os.path.basename(sys.argv[0])
    print(f'{script}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def report_error(kind, error, trace):
    """sys.excepthook: what a user can mend is one line; what is our bug keeps its traceback."""
    if kind.__name__ == 'InputError':
        fail(error)
    if kind is KeyboardInterrupt:
        script = os.path.basename(sys.argv[0])
        message = 'interrupted; run the same command to continue'
        print(f'\n{script}: {message}', file=sys.stderr, flush=True)
        raise SystemExit(130)
    if kind is BrokenPipeError:  # a reader that left, `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        # only of a file that was named: an error of ours in a library call names none
        where = f': {error.filename}' if error.filename else ''
        if where or error.errno == errno.ENOSPC:
            done = 'what was finished is kept; mend it and run the same command to continue'
            fail(f'{error.strerror}{where}; {done}')
    sys.__excepthook__(kind, error, trace)


def interrupt(number, frame):
    """SIGINT, once: KeyboardInterrupt, as ever. After that the system's own handler ends the
    process at once, even inside a library's call; workers end with it (model.start_worker)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


# In a script, that is: a notebook or a test that imports functions keeps its own ways.
if os.path.dirname(os.path.abspath(sys.argv[0])) == ROOT and sys.argv[0].endswith('.py'):
    sys.excepthook = report_error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def check_type(key, value, default, where):
    """The value of `key` if its type fits the default's (an int does for a float), else exit 2.

    A default of None takes any value.
    """
    if default is None:
        return value
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        expected = type(default).__name__
        fail(f'{where}: {key} expects {expected} (default {default!r}), got {value!r}')
    return float(value) if isinstance(default, float) else value


def parse(key, text, default):
    """Command-line text as the default's type; None takes any literal, else the text itself."""
    if isinstance(default, str):
        return text
    literal = {'true': 'True', 'false': 'False', 'none': 'None'}.get(text.lower(), text)
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)  # --max_steps=1e4
    return check_type(key, value, default, 'command line')


def run_config(path, knobs):
    """Execute a config file over the present values of the knobs -> the names that it assigned."""
    names = dict(knobs)
    try:
        with open(path, encoding='utf-8') as file:
            exec(compile(file.read(), path, 'exec'), names)
    except FileNotFoundError as error:
        there = sorted(os.listdir('config')) if os.path.isdir('config') else []
        there = [name for name in there if name.endswith('.py') and name != '__init__.py']
        fail(f'no config file {error.filename!r}; there are: {", ".join(there)}')
    except Exception as error:
        fail(f'{path}: {type(error).__name__}: {error}')
    assigned = {}
    for key, value in names.items():
        private = key.startswith('_') or hasattr(value, '__loader__')  # the latter: imports
        unchanged = key in knobs and value is knobs[key]
        if not private and not unchanged:
            assigned[key] = value
    return assigned


def read_block(path):
    """The lines of a script between its two ruled lines, and the names assigned there."""
    with open(path, encoding='utf-8') as file:
        lines = file.read().splitlines()
    first, last = [i for i, line in enumerate(lines) if RULE.match(line)][:2]
    block = lines[first + 1 : last]
    names = dict.fromkeys(re.findall(r'^([a-z]\w*) *=', '\n'.join(block), re.M))
    return block, list(names)


def configure(scope):
    """Apply sys.argv to the knobs of a script: `config = configure(globals())` opens its main body.

    Returns: dict of every knob with its final value, what a checkpoint or log keeps. Exits: 0
    after --help; 2 on an unknown key (naming the nearest), a wrong type (saying which was
    expected), a missing value or a missing config file.
    """
    block, names = read_block(scope['__file__'])
    defaults = {name: scope[name] for name in names}  # which say the types

    def check_name(key, where):
        if key not in names:
            near = difflib.get_close_matches(key, names, 3, 0.5)
            hint = f'; did you mean {", ".join(near)}?' if near else ''
            fail(f'{where}: unknown knob {key!r}{hint} (--help lists all)')

    arguments = sys.argv[1:]
    while arguments:
        argument = arguments.pop(0)

        if argument in ('--help', '-h'):
            print((scope.get('__doc__') or '').strip(), *block, sep='\n')
            raise SystemExit(0)

        if argument.endswith('.py') and not argument.startswith('--'):
            knobs = {name: scope[name] for name in names}
            for key, value in run_config(argument, knobs).items():
                check_name(key, argument)
                scope[key] = check_type(key, value, defaults[key], argument)
            continue

        if not argument.startswith('--'):
            fail(f'unexpected argument {argument!r}: expected a config file (.py) or --key=value')

        key, equals, text = argument[2:].partition('=')
        key = key.replace('-', '_')
        check_name(key, f'--{key}')
        if not equals:
            # --flag alone is True; any other knob takes the next argument
            following = arguments[0] if arguments else '--'
            flag = defaults[key] is None and following.startswith('--')
            if isinstance(defaults[key], bool) or flag:
                text = arguments.pop(0) if following.lower() in ('true', 'false') else 'True'
            elif following.startswith('--'):
                fail(f'--{key} needs a value: --{key}={scope[key]!r} is the default')
            else:
                text = arguments.pop(0)
        scope[key] = parse(key, text, defaults[key])

    return {name: scope[name] for name in names}
