#!/usr/bin/env bash
# Builds the documentation into build/site; a warning is an error. With --serve it shows it and builds it again on changes.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare "${EXTRAS:-docs}" ${EXTRAS:+deepspeed}

cd "$root"
if [[ "${1:-}" == --serve ]]; then
    exec "$venv_python" -m mkdocs serve
fi
# The theme's makers advertise in every build.
export NO_MKDOCS_2_WARNING=1
"$venv_python" -m mkdocs build --strict --quiet
echo "docs: $root/build/site/index.html"
