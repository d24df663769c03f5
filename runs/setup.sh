# Sourced by demo.sh and test.sh: a virtual environment with requirements.txt, unless one is active already.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo 'Python 3.11 or newer is needed (python3 is older or missing)' >&2
    exit 2
fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
# --no-compile: Python compiles what is used, not all of it; quick when everything is there already
python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
# threads that wait for each other give way soon: on a busy machine endless spinning costs most of the time
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-100000}
