#!/usr/bin/env bash
# Sets up, prepares a corpus, trains one model twice (saved activations in BF16, then quantized) and
# draws the comparison into runs/quickstart/. See --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
agoq_setup
exec "$AGOQ_PYTHON" "$root/scripts/quickstart/quickstart.py" "$@"
