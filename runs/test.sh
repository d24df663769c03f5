#!/usr/bin/env bash
# Set up and pass the tests: bash runs/test.sh [pytest options]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m pytest "$@"
