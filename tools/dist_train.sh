#!/usr/bin/env bash
# Train on several GPUs (or, without a GPU, in several processes):  tools/dist_train.sh CONFIG GPUS [options of train.py]
# Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and PORT) on each.
# MAX_RESTARTS=3: if a process or a machine is lost, all processes are started again, so many times at most, and go on from the
#   latest checkpoint in the work directory, which all machines share. They do so at the first start as well. A lost machine comes
#   back by the same command within ten minutes, except that of NODE_RANK=0, whose loss ends the run.
# NODE_ADDR: with MAX_RESTARTS, this machine's address, where the others do not know its host name.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [options of train.py]" >&2; exit 2; }
CONFIG=$1
GPUS=$2
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
PORT=${PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-0}

if [ "$MAX_RESTARTS" = 0 ]; then
    meet=(--node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$PORT")
    resume=()
else
    case " ${*:3} " in *" --resume"*)
        echo "$0: with MAX_RESTARTS a training resumes by itself, from the latest checkpoint; leave --resume out" >&2
        exit 2
        ;;
    esac
    # torchrun takes machines back by its rendezvous "c10d" alone
    [ "$NODE_RANK" = 0 ] && host=true || host=false
    [ "$NNODES" = 1 ] && NODE_ADDR=${NODE_ADDR:-$MASTER_ADDR}
    meet=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$PORT" --rdzv-id=mmkd --rdzv-conf="is_host=$host")
    meet+=(--max-restarts="$MAX_RESTARTS" ${NODE_ADDR:+--local-addr="$NODE_ADDR"})
    resume=(--resume)
    # torch 2.14 gives a machine that comes back no address to meet at, if the store is shared
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="$GPUS" "${meet[@]}" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}" ${resume[@]+"${resume[@]}"}
