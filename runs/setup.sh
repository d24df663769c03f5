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

# has PACKAGE ...: are all of these installed?
has() {
    python -c 'import sys; from importlib.util import find_spec
sys.exit(not all(find_spec(name) for name in sys.argv[1:]))' "$@"
}
# --no-compile: Python compiles what is used, not all of it
install() { python -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

if has torch; then
    has torchaudio || install --no-deps torchaudio
    has transformers numpy soundfile tqdm sklearn nltk espeakng_loader pytest ||
        install $(grep -v '^torch' requirements.txt)
else
    install -r requirements.txt
fi

# torch and torchaudio must come from one index: PyPI's torchaudio, which is built for CUDA, cannot
# be imported beside a CPU-only torch
python - <<'PYTHON' || exit 2
import sys, torch

mend = 'pip install --force-reinstall torch torchaudio'
if torch.version.cuda is None:
    mend += ' --index-url https://download.pytorch.org/whl/cpu'
if tuple(map(int, torch.__version__.split('+')[0].split('.')[:2])) < (2, 11):
    sys.exit(f'torch {torch.__version__} is too old, 2.11 or newer is needed: {mend}')
try:
    import torchaudio
except (ImportError, OSError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    sys.exit(f'torchaudio cannot be imported beside torch {torch.__version__} ({reason}): {mend}')
PYTHON

# without compiled files each process would compile every package anew, for seconds
unset PYTHONDONTWRITEBYTECODE
# threads that wait for each other yield soon: on a busy machine spinning costs most of the time
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-100000}
