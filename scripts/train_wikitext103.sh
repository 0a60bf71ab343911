#!/usr/bin/env bash
# Trains on WikiText-103 with the settings of the ALiBi paper, at any of its lengths or another one.
#
#   bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/alibi-512 512
#   bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/sinusoidal-512 512 --position-method sinusoidal
#   NPROC=2 bash scripts/train_wikitext103.sh data-bin/wikitext-103 checkpoints/alibi-512 512
#
# usage: train_wikitext103.sh DATA SAVE_DIR TOKENS_PER_SAMPLE [any fairseq-train arguments, which win over these]
# NPROC processes, one a GPU, share the batch of one, so that an update is the paper's; several machines: see processes.sh.
# A run that was stopped goes on from SAVE_DIR/checkpoint_last.pt. TensorBoard: tensorboard --logdir SAVE_DIR/tensorboard
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

# 9,216 tokens per update: in one batch, or block by block from 3,072 tokens on, as the authors did. Lengths that do not
# divide 9,216 fill it as far as whole blocks go (2,048: four blocks, 8,192 tokens).
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

exec ${launch[@]+"${launch[@]}"} fairseq-train "$data" --user-dir "$root/fairseq_alibi" \
  --task language_modeling --arch alibi_lm_wiki103 --position-method alibi \
  --tokens-per-sample "$length" --sample-break-mode none \
  --max-tokens "$max_tokens" --update-freq "$update_freq" --required-batch-size-multiple 1 \
  --criterion adaptive_loss --optimizer nag --lr 1.0 --clip-norm 0.1 \
  --lr-scheduler cosine --t-mult 2 --lr-period-updates 270000 --lr-shrink 0.75 \
  --warmup-updates 16000 --warmup-init-lr 1e-07 --min-lr 0.0001 --stop-min-lr 1e-09 --max-update 286000 \
  --ddp-backend legacy_ddp --distributed-world-size 1 --seed 1 \
  --save-dir "$save_dir" --tensorboard-logdir "$save_dir/tensorboard" --keep-last-epochs 5 \
  "${precision[@]}" "$@"
