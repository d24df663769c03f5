#!/usr/bin/env bash
# Set up and run the tests.
#     bash runs/test.sh               all: one process per file, as many at once as cores
#     bash runs/test.sh -k packing    pytest's own options, one process
set -euo pipefail
source "$(dirname "$0")/setup.sh"
# the linter, and optional packages that some tests use: an optimizer, parquet files
has ruff || install ruff
has pytorch_optimizer pyarrow datasets ||
    install pytorch-optimizer pyarrow datasets || echo 'their tests are skipped' >&2
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

# the output of a file is printed in one piece; the largest files run first, so that no core is idle
# at the end
test_file() {
    local code=0 printed
    printed=$(python -m pytest "$1" 2>&1) || code=$?
    printf '%s\n%s\n' "$1" "$printed"
    return $code
}
export -f test_file
export OMP_NUM_THREADS=1
ls -S tests/test_*.py |
    xargs -P "$(getconf _NPROCESSORS_ONLN)" -I FILE bash -c 'test_file FILE' ||
    { echo 'some tests failed: see above' >&2; exit 1; }
echo 'all tests passed'
