"""For all tests: pytest started in the background of a shell ignores SIGINT, and so would the
scripts that the tests interrupt."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
