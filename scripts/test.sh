#!/usr/bin/env bash
# Sets up (scripts/setup.sh) and runs all tests, one process per core; arguments go to pytest:  bash scripts/test.sh -k bias
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
"${VENV:-.venv}/bin/python" -m pytest --numprocesses auto "$@"
