#!/usr/bin/env bash
# Perplexity of a checkpoint at one or more lengths, non-overlapping blocks, through fairseq-eval-lm.
#
#   bash scripts/eval_nonoverlapping.sh data-bin/wikitext-103 checkpoints/alibi-512/checkpoint_best.pt 512 1024 3072
#
# usage: eval_nonoverlapping.sh DATA CHECKPOINT LENGTH... [--subset test] [--output FILE] [-- fairseq-eval-lm arguments]
# Ends with a table, also written as JSON beside the checkpoint. Fails unless every token of the subset was scored.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi eval-lm nonoverlapping "$@"
