#!/usr/bin/env bash
# Perplexity of a checkpoint with a sliding window of one length at one or more strides, through fairseq-eval-lm.
#
#   bash scripts/eval_sliding_window.sh data-bin/wikitext-103 checkpoints/alibi-512/checkpoint_best.pt 1024 512 256
#
# usage: eval_sliding_window.sh DATA CHECKPOINT LENGTH STRIDE... [--subset test] [--output FILE] [-- fairseq-eval-lm arguments]
# Ends with a table, also written as JSON beside the checkpoint. Fails unless every token of the subset was scored.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi eval-lm sliding "$@"
