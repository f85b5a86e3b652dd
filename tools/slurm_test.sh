#!/usr/bin/env bash
# Test on a Slurm cluster:  tools/slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [options of test.py]
# Variables: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, GRES and SRUN_ARGS, as for slurm_train.sh.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB CONFIG CHECKPOINT [options of test.py]" >&2; exit 2; }
PARTITION=$1
JOB=$2
CONFIG=$3
CHECKPOINT=$4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
GRES=${GRES-gpu:$GPUS_PER_NODE}

# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
exec srun -p "$PARTITION" \
    --job-name="$JOB" \
    ${GRES:+--gres="$GRES"} \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher=slurm "${@:5}"
