#!/usr/bin/env bash
# Set up and pass the tests: bash runs/test.sh [pytest options]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
# what the project can do without, and its tests use where it is there: oracles, and two optimizers
python -m pip install --quiet --no-compile --disable-pip-version-check ruff
python -m pip install --quiet --no-compile --disable-pip-version-check \
    scikit-learn pytorch-optimizer nltk pyarrow || echo 'tests go on without them' >&2
python -m pytest "$@"
