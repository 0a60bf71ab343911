#!/usr/bin/env bash
# The paper's comparison: trains all position methods alike with three seeds each, evaluates at many lengths, writes one
# page with plots.
#
#   bash scripts/reproduce.sh                                       # Python's own source, half an hour on 2 cores
#   bash scripts/reproduce.sh --methods alibi fox --seeds 1 2       # some methods, other seeds
#   bash scripts/reproduce.sh --preset slice --data data-bin/part   # a WikiText folder, some hours
#   bash scripts/reproduce.sh --preset paper                        # prints the commands of the real thing
#   bash scripts/reproduce.sh --preset paper --launch               # runs them; ends with the paper's numbers beside ours
#
# What is done is kept and not done again. usage and more options: reproduce.sh --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi reproduce "$@"
