#!/usr/bin/env bash
# Train on a Slurm cluster:  tools/slurm_train.sh [--requeue] PARTITION JOB CONFIG WORK_DIR [options of train.py]
# Variables, with their defaults:
#   GPUS=8            processes, each with a GPU
#   GPUS_PER_NODE=8   processes on each machine (or GPUS, if there are fewer)
#   CPUS_PER_TASK=5   cores of each process
#   GRES=gpu:8        what is asked of each machine (gpu:GPUS_PER_NODE); GRES= where it has no GPUs
#   SRUN_ARGS=        more options of srun, or with --requeue of sbatch
# --requeue submits the job and returns. The job's output goes to WORK_DIR/slurm-JOBID.out. It resumes by itself from the latest
# checkpoint in WORK_DIR, and is queued again when Slurm preempts it or its time is nearly up:
#   GRACE=120         seconds before the time limit (SRUN_ARGS=--time=...) at which it saves a checkpoint and ends
set -euo pipefail
usage="usage: $0 [--requeue] PARTITION JOB CONFIG WORK_DIR [options of train.py]"
[ "${1:-}" = --requeue ] && { REQUEUE=yes; shift; } || REQUEUE=
[ $# -ge 4 ] || { echo "$usage" >&2; exit 2; }
PARTITION=$1
JOB=$2
CONFIG=$3
WORK_DIR=$4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}
GRES=${GRES-gpu:$GPUS_PER_NODE}

job=(-p "$PARTITION" --job-name="$JOB" ${GRES:+--gres="$GRES"} --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE")
job+=(--cpus-per-task="$CPUS_PER_TASK")
train=("${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" --work-dir="$WORK_DIR" --launcher=slurm "${@:5}")

# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
[ -n "$REQUEUE" ] || exec srun "${job[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${train[@]}"

case " ${*:5} " in *" --resume"*)
    echo "$0: with --requeue a training resumes by itself, from the latest checkpoint; leave --resume out" >&2
    exit 2
    ;;
esac
mkdir -p "$WORK_DIR"
# train.py ends with 75 when it was told to stop and has saved a checkpoint. Processes end one after the other, each within a
# minute, so the first to end must not have the others killed. The trap keeps bash alive to see that code.
# shellcheck disable=SC2086
exec sbatch "${job[@]}" --requeue --open-mode=append --output="$WORK_DIR/slurm-%j.out" --signal="USR1@${GRACE:-120}" ${SRUN_ARGS:-} <<BATCH
#!/usr/bin/env bash
trap : TERM USR1
srun --cpus-per-task=$CPUS_PER_TASK --kill-on-bad-exit=0 --wait=60 $(printf '%q ' "${train[@]}") --resume
code=\$?
if [ \$code = 75 ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$code
BATCH
