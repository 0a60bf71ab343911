# shellcheck shell=bash
# Sourced by the scripts that can run in several processes, after environment.sh: puts what starts them into `launch`.
#
#   NPROC=8 bash scripts/...        8 processes on this machine, each with its GPU, or on the CPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host NPROC=8 bash scripts/...
#                                   16 on two machines: the same on the other with NODE_RANK=1. `host` is the address of
#                                   the machine of rank 0, on which MASTER_PORT (29500 unless set) has to be free.
#
#   MAX_RESTARTS=3 NPROC=8 bash scripts/...
#                                   starts all processes again, up to three times, if one dies; the same on all machines
#
# A process that dies ends all, on every machine. Without NPROC and NNODES there is one process, started as ever.
nproc=${NPROC:-1} nnodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0}
refuse() {
  local script=${0##*/}
  echo "${script%.sh}: $*" >&2
  exit 2
}
[[ $nproc =~ ^[1-9][0-9]{0,3}$ ]] || refuse "NPROC=$nproc: pass the number of processes on this machine, 1 or more"
[[ $nnodes =~ ^[1-9][0-9]{0,3}$ ]] || refuse "NNODES=$nnodes: pass the number of machines, 1 or more"
[[ $restarts =~ ^[0-9]{1,4}$ ]] || refuse "MAX_RESTARTS=$restarts: pass a number, 0 for none"
launch=()
if [ "$nnodes" -gt 1 ]; then
  [[ ${NODE_RANK-} =~ ^(0|[1-9][0-9]{0,3})$ && $NODE_RANK -lt $nnodes ]] ||
    refuse "NODE_RANK=${NODE_RANK-}: pass this machine's number, 0 to $((nnodes - 1))"
  [ -n "${MASTER_ADDR-}" ] || refuse "NNODES=$nnodes needs MASTER_ADDR: pass the address of the machine of NODE_RANK=0"
  [[ ${MASTER_PORT:=29500} =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -lt 65536 ]] ||
    refuse "MASTER_PORT=$MASTER_PORT: pass a port that is free on $MASTER_ADDR, 1 to 65535"
  launch=(torchrun --nnodes "$nnodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  # Only this way of meeting lets the other machines start again too.
  [ "$restarts" = 0 ] || launch=(torchrun --nnodes "$nnodes" --rdzv-backend c10d --rdzv-id fairseq
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
elif [ "$nproc" -gt 1 ]; then
  launch=(torchrun --standalone)
fi
if [ "$restarts" != 0 ]; then
  [ ${#launch[@]} -gt 0 ] || refuse "MAX_RESTARTS=$restarts needs several processes: pass NPROC"
  launch+=(--max-restarts "$restarts")
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or processes look for each other where they were before the restart
fi
[ ${#launch[@]} -eq 0 ] || launch+=(--nproc-per-node "$nproc" --no-python)
