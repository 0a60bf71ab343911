#!/usr/bin/env bash
# Position methods on made-up tasks with known answers: trains each with three seeds on associative recall, a pass key in
# filler text and copying at once, asks for answers in longer texts, writes one page with plots.
#
#   bash scripts/probe.sh                                       # half an hour on 2 cores
#   bash scripts/probe.sh --methods alibi fox --seeds 1 2       # some methods, other seeds
#   bash scripts/probe.sh --data data-bin/mqar:data-bin/sort    # other folders of fairseq-alibi probe make
#
# What is done is kept and not done again. usage and more options: probe.sh --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi reproduce --preset probes "$@"
