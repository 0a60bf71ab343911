#!/usr/bin/env bash
# How fast attention without a mask is, and how much memory it takes, beside attention under a mask and fairseq's own
# transformer_lm: in one layer, in training and in evaluation. Table, plot and JSON in results/benchmark.
#
#   bash scripts/benchmark.sh                              # quick: a few minutes on two CPU cores
#   bash scripts/benchmark.sh --all-lengths --overwrite    # up to 131,072 tokens
#   bash scripts/benchmark.sh --full --parts training,memory --tokens 9216 --output results/benchmark-full   # for a GPU
#   bash scripts/benchmark.sh --checkpoint checkpoints/alibi-512/checkpoint_best.pt --data data-bin/wikitext-103
#
# usage: benchmark.sh [--parts attention,training,evaluation,memory] [--lengths N...] [--repeats N] [--output DIR]
# ... and more: --help. Without --checkpoint a small model is trained once, on Python's own source, and kept in DIR.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python "$root/scripts/benchmark.py" "$@"
