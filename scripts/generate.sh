#!/usr/bin/env bash
# Continues a prompt with a checkpoint: plain text in, plain text out.
#
#   bash scripts/generate.sh data-bin/builtin checkpoints/alibi-128/checkpoint_last.pt "if the value is not" --tokens 1000
#   head -n 50 chapter.txt | bash scripts/generate.sh data-bin/mine checkpoints/mine/checkpoint_best.pt --beam 4
#
# usage: generate.sh DATA CHECKPOINT [PROMPT...] [--tokens N] [--stop-at-line-end] [--beam N | --sampling-topk K ...]
# Without a PROMPT standard input is the prompt, line breaks included. The text goes to standard output, all else to
# standard error. --help lists the options.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python -m fairseq_alibi generate "$@"
