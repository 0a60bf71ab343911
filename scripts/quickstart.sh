#!/usr/bin/env bash
# Shows the claim of ALiBi in a few minutes on two CPU cores: trains two equal models, ALiBi and sinusoidal, on short
# sequences, evaluates both on longer ones, and draws perplexity against length.
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --data data-bin/mine --train-length 256 --lengths "256 1024 4096" --updates 1000
#   bash scripts/quickstart.sh -- --decoder-layers 4        # more fairseq-train arguments, for both models
#
# Without --data it takes a corpus that every machine has: the source text of Python's standard library.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
arguments=("$@")
data='' train_length=128 lengths='128 256 512 1024 2048' updates=600 output=results/quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --data | --train-length | --lengths | --updates | --output)
      [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      shift 2
      ;;
    --) shift; break ;;
    *)
      echo "quickstart: '$1' is no option: --data DIR, --train-length N, --lengths \"N N ...\", --updates N, --output DIR" >&2
      exit 2
      ;;
  esac
done
for number in "${train_length:-none}" "${updates:-none}" ${lengths:-none}; do
  case $number in
    *[!0-9]* | 0) echo "quickstart: '$number' is no length or number of updates: pass whole numbers of at least 1" >&2; exit 2 ;;
  esac
done
[ -z "$data" ] || [ -f "$data/dict.txt" ] || {
  echo "quickstart: $data holds no dict.txt: make it with bash scripts/prepare_text.sh $(printf %q "$data")" >&2
  exit 1
}

if [ -z "${QUICKSTART_LOCKED-}" ]; then # a second quickstart into the same folder is refused
  bash "$here/setup.sh"
  source "$here/environment.sh"
  export QUICKSTART_LOCKED=1
  exec python "$here/with_lock.py" "$output" bash "$here/quickstart.sh" ${arguments[@]+"${arguments[@]}"}
fi
source "$here/environment.sh"
if [ -z "$data" ]; then
  data=$root/data-bin/builtin
  bash "$here/prepare_text.sh" "$data" --builtin
fi
if [ -e "$output" ]; then # earlier results are kept, under the time at which they were made
  kept=$output-$(date -r "$output" +%Y%m%d-%H%M%S)
  mv "$output" "$kept"
  echo "quickstart: the results that were in $output are now in $kept"
fi
mkdir -p "$output"

# Both models at once, one thread each: as fast as two threads for one after the other, and steady on a busy machine.
export OMP_NUM_THREADS=1
both() { # both COMMAND: runs it for alibi, whose progress bar is shown, and sinusoidal; prints the log of one that fails
  "$1" sinusoidal >>"$output/sinusoidal.log" 2>&1 &
  local other=$!
  "$1" alibi >>"$output/alibi.log" &
  local one=$!
  trap 'kill $one $other 2>/dev/null || true; wait' EXIT # however this ends, no training is left running
  trap 'exit 143' TERM
  wait $one || { tail -n 20 "$output/alibi.log" >&2; exit 1; }
  wait $other || { tail -n 20 "$output/sinusoidal.log" >&2; exit 1; }
  trap - EXIT TERM
}
train() {
  local warmup=$((updates < 100 ? updates / 2 : 50))
  exec fairseq-train "$data" --user-dir "$root/fairseq_alibi" \
    --task language_modeling --arch alibi_lm_tiny --position-method "$1" \
    --tokens-per-sample "$train_length" --max-tokens $((train_length < 2048 ? 2048 : train_length)) \
    --required-batch-size-multiple 1 --criterion cross_entropy --optimizer adam --lr 0.004 --clip-norm 0.5 \
    --lr-scheduler cosine --warmup-updates $warmup --lr-period-updates $((updates - warmup)) --max-update "$updates" \
    --seed 1 --cpu --disable-validation --no-epoch-checkpoints --save-dir "$output/$1" "${@:2}"
}
evaluate() {
  # shellcheck disable=SC2086 # the lengths are words
  exec bash "$here/eval_nonoverlapping.sh" "$data" "$output/$1/checkpoint_last.pt" $lengths --output "$output/$1.json" -- --cpu
}
more=("$@")
train_more() { train "$1" ${more[@]+"${more[@]}"}; }

echo "quickstart: training alibi and sinusoidal on $train_length tokens, $updates updates (logs in $output)"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null &&
  echo "quickstart: the GPU is not used: these tiny models take minutes on a CPU, where their numbers are those of the README"
both train_more
echo "quickstart: evaluating both at $lengths tokens"
both evaluate
fairseq-alibi report "$output/alibi.json" "$output/sinusoidal.json" --output "$output"
