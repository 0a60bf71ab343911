#!/usr/bin/env bash
# Makes a fairseq data folder of plain-text files: Moses tokens (or white space, or sentencepiece), then BPE learned on the training text.
#
#   bash scripts/prepare_text.sh data-bin/mine --train train.txt --valid valid.txt --test test.txt
#   bash scripts/prepare_text.sh data-bin/mine --train train.txt --valid valid.txt --test test.txt --word-level
#   bash scripts/prepare_text.sh data-bin/mine --train train.txt --valid valid.txt --test test.txt --tokenizer sentencepiece
#   bash scripts/prepare_text.sh data-bin/python --builtin     # needs no files and no network: Python's own source
#
# Each line is one sentence for fairseq. With nothing to do it ends at once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi prepare-text "$@"
