# Sourced by every script here: an environment in which the project runs. A virtual or conda
# environment that is active is used as it is, else .venv is made. A torch that is already there
# is never replaced; when everything is there, nothing is installed and no network is needed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo 'Python 3.11 or newer is needed (python3 is older or missing)' >&2
    exit 2
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi

# has PACKAGE ...: can all of these be imported?
has() {
    python - "$@" <<'PYTHON'
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))
PYTHON
}

# --no-compile: Python compiles what is used, not all of it
install() { python -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

if has torch; then
    python - <<'PYTHON' || exit 2
import sys, torch
if tuple(map(int, torch.__version__.split('+')[0].split('.')[:2])) < (2, 11):
    sys.exit(f'torch {torch.__version__} is in {sys.prefix}, 2.11 or newer is needed: '
             'leave this environment (deactivate), and the script makes one of its own')
PYTHON
    has numpy transformers soundfile tqdm espeakng_loader joblib pytest ||
        install $(grep -v '^torch' requirements.txt)
else
    install -r requirements.txt
fi

# threads that wait for each other give way soon: on a busy machine endless spinning costs most
# of the time
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-100000}
