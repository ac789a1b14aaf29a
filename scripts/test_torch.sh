#!/usr/bin/env bash
# Tests this project with the oldest and the newest torch that it is said to work with, each in an environment of
# its own below build/ (5 GB each). With arguments: with these versions.
#
#   scripts/test_torch.sh                  # kernels, gradients, optimizer, checkpoints and runs, by both ends
#   scripts/test_torch.sh 2.13.0
#   AGOQ_TESTS="tests" scripts/test_torch.sh 2.15.0    # everything
#
# CI runs everything with the oldest, which scripts/setup.sh installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || set -- 2.11.0 2.15.0
tests="${AGOQ_TESTS:-tests/kernels tests/autograd tests/optimizer tests/modules tests/gradients tests/test_memory.py
    tests/training/test_compat.py tests/training/test_cpu.py tests/training/test_saved_bytes.py
    tests/training/test_stock.py tests/training/test_parallel.py tests/training/test_resume.py}"
for version in "$@"; do
    printf '\n=== torch %s\n' "$version"
    # shellcheck disable=SC2086  # several paths
    AGOQ_TORCH="$version" AGOQ_VENV="build/torch-$version" scripts/test.sh \
        -n 2 --dist loadfile --no-loadscope-reorder $tests
done
