#!/usr/bin/env bash
# Sets up and tests: style, direction of imports, tests. With arguments: only pytest, with them.
#
#   scripts/test.sh
#   scripts/test.sh tests/kernels -k packing
#   scripts/test.sh -n 2 --dist loadfile --exhaustive      # with the cases that others cover
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
agoq_setup

# Tests start several processes each; one thread a process keeps them out of each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ $# -gt 0 ]; then
    exec "$AGOQ_PYTHON" -m pytest "$@"
fi
bin="$(dirname "$AGOQ_PYTHON")"
"$bin/ruff" check .
"$bin/lint-imports" --no-cache | sed -n '/^Contracts$/,$p'
# Two files of tests at a time: most of a run's ranks wait for each other most of the time. In the order of
# tests/conftest.py, long ones first; xdist's own begins with the files that hold the most tests.
exec "$AGOQ_PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder
