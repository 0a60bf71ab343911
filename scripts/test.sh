#!/usr/bin/env bash
# Sets up (scripts/setup.sh) and runs the tests, one process per core.
#
#   bash scripts/test.sh            # without the tests marked slow, which take minutes
#   bash scripts/test.sh --slow     # all tests
#   bash scripts/test.sh -k bias    # other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules
"${VENV:-.venv}/bin/python" -m pytest --numprocesses auto --dist worksteal ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
