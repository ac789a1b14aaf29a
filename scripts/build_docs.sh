#!/usr/bin/env bash
# Builds the documentation into build/site/index.html; a broken link, or a page that no other leads to, fails.
# With "serve": shows it on http://127.0.0.1:8000 and builds it again at each change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
agoq_setup
if [ "${1:-build}" = serve ]; then
    exec "$AGOQ_PYTHON" -m mkdocs serve --strict --config-file docs/site/mkdocs.yml
fi
"$AGOQ_PYTHON" -m mkdocs --quiet build --strict --clean --config-file docs/site/mkdocs.yml
echo "Built: build/site/index.html"
