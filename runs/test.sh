#!/usr/bin/env bash
# Set up and pass the tests: bash runs/test.sh [pytest options]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
# the linter, and what the project can do without but its tests use where it is there: oracles,
# readers of parquet, two optimizers
has ruff || install ruff
has sklearn pytorch_optimizer nltk pyarrow ||
    install scikit-learn pytorch-optimizer nltk pyarrow || echo 'tests go on without them' >&2
python -m pytest "$@"
