"""What tests share. Pytest started in the background of a shell ignores SIGINT, and so would the
scripts that the tests interrupt."""

import config

import contextlib
import io
import os
import runpy
import signal
import sys
from types import SimpleNamespace

from model import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(name, *args):
    """A script with these arguments, in this process, which has loaded its libraries already.

    Returns: its returncode, stdout and stderr, as subprocess.run has them.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd()
    sys.argv = [name, *map(str, args)]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(name, run_name='__main__')
            except (OSError, InputError) as error:
                config.report_error(type(error), error, error.__traceback__)
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
