#!/usr/bin/env bash
# Exports a checkpoint and runs lm-eval's tasks on it. See --help and docs/checkpoints.md.
#
#   scripts/evaluate.sh runs/mine/checkpoints
#   scripts/evaluate.sh runs/mine/checkpoints --tasks local        # a small task that needs no network
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
agoq_setup
# The extra "eval" is apart from the rest: half a gigabyte that training does not need.
if ! "$AGOQ_PYTHON" -c 'import lm_eval, accelerate' 2>/dev/null; then
    printf 'Installing lm-eval (about 0.5 GB)\n' >&2
    if ! "$AGOQ_PYTHON" -m pip install --disable-pip-version-check --editable "$root[eval]" >&2; then
        printf 'error: lm-eval could not be installed; pip'\''s own words stand above.\n' >&2
        exit 1
    fi
fi
exec "$AGOQ_PYTHON" "$root/scripts/evaluation/evaluate_checkpoint.py" "$@"
