#!/usr/bin/env bash
# Sets up (scripts/setup.sh) and runs the tests, one process per core.
#
#   bash scripts/test.sh            # without the tests marked slow
#   bash scripts/test.sh --slow     # all tests
#   bash scripts/test.sh --newest   # the tests that new releases of libraries break, in .venv-newest, which has them
#   bash scripts/test.sh -k bias    # other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow")
arguments=()
for argument in "$@"; do
  case $argument in
    --slow) selection=() ;;
    --newest) export NEWEST=${NEWEST:-1} VENV=${VENV:-.venv-newest} ;;
    *) arguments+=("$argument") ;;
  esac
done
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules
if [ -n "${NEWEST:-}" ]; then
  echo "test: newer than constraints.txt:"
  "$VENV/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable | grep == |
    while read -r line; do grep -qi "^$line\b" constraints.txt || echo "  $line"; done
  arguments+=(tests/test_{startup,compatibility,patches,old_checkpoints,checkpoint_contents,data_folders,export_hf,generate,torch_modes,plan}*.py)
fi
"${VENV:-.venv}/bin/python" -m pytest --numprocesses auto --dist worksteal ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
