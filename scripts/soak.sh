#!/usr/bin/env bash
# Looks for leaks: an hour of training, checkpoints and evaluation at changing lengths in one process; are memory and the
# number of open files flat? Figures and a plot in results/soak; status 1 if not.
#
#   bash scripts/soak.sh data-bin/builtin
#   bash scripts/soak.sh data-bin/builtin --minutes 5
#
# usage: soak.sh DATA [--minutes N] [--updates N] [--output DIR]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python "$root/scripts/soak.py" "$@"
