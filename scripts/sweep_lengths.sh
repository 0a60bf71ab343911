#!/usr/bin/env bash
# Perplexity of checkpoints against evaluation length: non-overlapping and sliding windows, with one table and plots.
#
#   bash scripts/sweep_lengths.sh data-bin/wikitext-103 checkpoints/alibi-512/checkpoint_best.pt checkpoints/sinusoidal-512/checkpoint_best.pt
#   bash scripts/sweep_lengths.sh data-bin/wikitext-103 checkpoints/*/checkpoint_best.pt --lengths 512,1024,3072 --subset test
#   NPROC=8 bash scripts/sweep_lengths.sh data-bin/wikitext-103 checkpoints/alibi-512/checkpoint_best.pt   # on 8 GPUs
#
# usage: sweep_lengths.sh DATA CHECKPOINT... [fairseq-alibi evaluate options]
# Results in results/sweep, or where --output says. An interrupted sweep goes on where it was: the same command again.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source "$(dirname "$0")/processes.sh"
[ "$nnodes" -eq 1 ] || refuse "NNODES=$nnodes: evaluation runs on one machine, with NPROC processes"
output=results/sweep stride=1/2 more=()
while [ $# -gt 0 ]; do
  case $1 in
    --output | --stride-fraction)
      [ $# -ge 2 ] || { echo "sweep_lengths: $1 needs a value" >&2; exit 2; }
      [ "$1" = --output ] && output=$2 || stride=$2
      shift 2
      ;;
    *) more+=("$1"); shift ;;
  esac
done
${launch[@]+"${launch[@]}"} fairseq-alibi evaluate ${more[@]+"${more[@]}"} --by-position --output "$output"
${launch[@]+"${launch[@]}"} fairseq-alibi evaluate ${more[@]+"${more[@]}"} --by-position --output "$output" --stride-fraction "$stride"
fairseq-alibi report "$output"/*.json --output "$output" --overwrite
