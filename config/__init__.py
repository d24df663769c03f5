"""The override mechanism of every script: files and flags over plain variables, applied left to right.

    python train.py config/slam_a5000.py --batch_size=4 --compile=False --wandb

A script's knobs are the module-level variables between its two ruled lines (`# ----`), each with a comment. That block is the
documentation: --help prints it. A config file is Python that assigns some of these names (it sees their present values);
names that begin with an underscore are its own. `--key=value`, `--key value`, and bare `--flag` for True.

A mistake of the user's is one line on stderr and exit code 2, never a traceback: call `fail`, or raise model.InputError.
"""
import ast
import difflib
import os
import re
import sys

RULE = re.compile(r'^# -{20,}')


def fail(message):
    """Print `script: message` as one line on stderr and exit with code 2."""
    sys.stdout.flush()
    print(f'{os.path.basename(sys.argv[0])}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def _excepthook(kind, error, trace):
    """What a user can mend is one line; what is our bug keeps its traceback."""
    if kind.__name__ == 'InputError':
        fail(error)
    if isinstance(error, OSError) and kind is not BrokenPipeError:  # no room, no right, no such file
        where = f': {error.filename}' if error.filename else ''
        fail(f'{error.strerror or error}{where}; what was finished is kept, mend it and run the same command to continue')
    if kind is KeyboardInterrupt:
        print(f'\n{os.path.basename(sys.argv[0])}: interrupted; run the same command to continue', file=sys.stderr, flush=True)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


def _check(key, value, default, where):
    """The value of `key` if its type fits the default's (an int does for a float), else a one-line error."""
    kinds = (int, float) if isinstance(default, float) else type(default)
    if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
        fail(f'{where}: {key} expects {type(default).__name__} (now {default!r}), got {value!r}')
    return float(value) if isinstance(default, float) else value


def _parse(key, text, default):
    """The command-line text as the type of the default; a default of None takes any literal, else the text itself."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval({'true': 'True', 'false': 'False', 'none': 'None'}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)  # --max_steps=1e4
    return _check(key, value, default, 'command line')


def configure(scope):
    """Apply sys.argv to the knobs of a script; call it as `configure(globals())` under the second ruled line.

    Returns: dict of every knob with its final value, what a checkpoint or log keeps. Exits: 0 after --help, 2 on an unknown
    key (naming the nearest), a wrong type (saying which was expected), a missing value or a missing config file.
    """
    sys.excepthook = _excepthook
    lines = open(scope['__file__'], encoding='utf-8').read().splitlines()
    first, last = [i for i, line in enumerate(lines) if RULE.match(line)][:2]
    block = lines[first + 1:last]
    names = dict.fromkeys(re.findall(r'^([a-z]\w*) *=', '\n'.join(block), re.M))

    def assign(key, value, where, parse=False):
        if key not in names:
            near = difflib.get_close_matches(key, names, 3, 0.5)
            fail(f'{where}: unknown knob {key!r}' + (f'; did you mean {", ".join(near)}?' if near else '') + ' (--help lists all)')
        scope[key] = _parse(key, value, scope[key]) if parse else _check(key, value, scope[key], where)

    args = sys.argv[1:]
    while args:
        arg = args.pop(0)
        if arg in ('--help', '-h'):
            print((scope.get('__doc__') or '').strip(), *block, sep='\n')
            raise SystemExit(0)
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            key = key.replace('-', '_')
            if not equals:
                flag = isinstance(scope.get(key), bool)
                if args and (args[0].lower() in ('true', 'false') if flag else not args[0].startswith('--') or key not in names):
                    text = args.pop(0)
                elif flag:
                    text = 'True'
                elif key in names:
                    fail(f'--{key} needs a value: --{key}={scope[key]!r} is the default')
            assign(key, text, f'--{key}', parse=True)
        elif arg.endswith('.py'):
            before = {name: scope[name] for name in names}
            after = dict(before)
            try:
                exec(compile(open(arg, encoding='utf-8').read(), arg, 'exec'), after)
            except FileNotFoundError as error:
                fail(f'no config file {error.filename!r}; there are: {", ".join(sorted(os.listdir("config")) if os.path.isdir("config") else [])}')
            except Exception as error:
                fail(f'{arg}: {type(error).__name__}: {error}')
            for key, value in after.items():
                if not key.startswith('_') and not (key in before and value is before[key]) and not hasattr(value, '__loader__'):
                    assign(key, value, arg)
        else:
            fail(f'unexpected argument {arg!r}: expected a config file (.py) or --key=value')
    return {name: scope[name] for name in names}
