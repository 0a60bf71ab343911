#!/usr/bin/env bash
# The paper's comparison: trains all position methods alike, evaluates at many lengths, writes one page with plots.
#
#   bash scripts/reproduce.sh                                       # Python's own source, 2 cores, up to 25 minutes
#   bash scripts/reproduce.sh --preset slice --data data-bin/part   # a WikiText folder, about an hour
#   bash scripts/reproduce.sh --preset paper                        # prints the commands of the real thing
#   bash scripts/reproduce.sh --preset paper --launch               # runs them
#
# What is done is kept and not done again. usage and more options: reproduce.sh --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi reproduce "$@"
