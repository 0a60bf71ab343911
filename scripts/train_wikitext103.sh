#!/usr/bin/env bash
# Trains on WikiText-103 with the settings of the ALiBi paper, configs/wikitext103.yaml, at any of its lengths or another.
#
#   bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/alibi-512 512
#   bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/sinusoidal-512 512 --position-method sinusoidal
#   NPROC=2 bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/alibi-512 512
#
# usage: train_wikitext103.sh DATA SAVE_DIR TOKENS_PER_SAMPLE [any fairseq-train arguments, which win over these]
# NPROC processes, one per GPU, share the batch of a single one, so that an update has the paper's tokens; several
# machines: see processes.sh. A stopped run resumes from SAVE_DIR/checkpoint_last.pt when the same command is started again.
# TensorBoard: tensorboard --logdir SAVE_DIR/tensorboard
set -euo pipefail
[ $# -ge 3 ] && [ "${3#*[!0-9]}" = "$3" ] && [ "$3" -gt 0 ] || {
  echo "usage: $0 DATA SAVE_DIR TOKENS_PER_SAMPLE [fairseq-train arguments], for example: $0 data-bin/wikitext-103 checkpoints/alibi-512 512" >&2
  exit 2
}
source "$(dirname "$0")/environment.sh"
source "$(dirname "$0")/processes.sh"
data=$1 save_dir=$2 length=$3
shift 3
[ -f "$data/dict.txt" ] || {
  echo "$data holds no dict.txt: make it with scripts/prepare_wikitext103.sh $data" >&2
  exit 1
}

# An update has 9,216 tokens: in one batch, or block by block from 3,072 tokens on, as the authors did. A length that does
# not divide 9,216 fills it as far as whole blocks fit (2,048: four blocks, 8,192 tokens).
max_tokens=9216 update_freq=1
if [ "$length" -ge 3072 ]; then
  max_tokens=$length update_freq=$((length < 9216 ? 9216 / length : 1))
fi
processes=$((nproc * nnodes))
if [ "$processes" -gt 1 ]; then
  blocks=$((max_tokens / length * update_freq))
  share=$(((blocks + processes - 1) / processes))
  if [ "$length" -ge 3072 ]; then update_freq=$share; else max_tokens=$((share * length)); fi
  [ $((share * processes)) -eq "$blocks" ] || echo "train_wikitext103: $blocks blocks of $length tokens do not divide among\
 $processes processes: an update takes $((share * processes)) blocks, $((share * processes * length)) tokens instead of\
 $((blocks * length)) (--max-tokens and --update-freq set it)" >&2
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
precision=(--fp16)
[ "$gpus" -gt 0 ] || precision=(--cpu --distributed-backend gloo)
[ "$gpus" -eq 0 ] || [ "$nproc" -le "$gpus" ] || refuse "NPROC=$nproc: this machine has $gpus GPUs, pass at most that"

settings=() arguments=$(python "$root/scripts/config_arguments.py" "$root/configs/wikitext103.yaml")
while IFS= read -r argument; do settings+=("$argument"); done <<<"$arguments"

exec ${launch[@]+"${launch[@]}"} fairseq-train "$data" --user-dir "$root/fairseq_alibi" \
  --arch alibi_lm_wiki103 "${settings[@]}" \
  --tokens-per-sample "$length" --max-tokens "$max_tokens" --update-freq "$update_freq" \
  --save-dir "$save_dir" --tensorboard-logdir "$save_dir/tensorboard" "${precision[@]}" "$@"
