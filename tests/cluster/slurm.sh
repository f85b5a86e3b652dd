#!/usr/bin/env bash
# A Slurm of one machine, as root, without systemd and cgroups; everything is below FOLDER, beside other Slurms that may run.
#   tests/cluster/slurm.sh up FOLDER      start it; then  export SLURM_CONF=FOLDER/slurm.conf
#   tests/cluster/slurm.sh down FOLDER    end its jobs and its daemons
# Partitions: cpu, without GPUs, whose jobs are queued again when one of the partition "urgent" needs their place.
# CPUS=2 is what the machine offers, be there so many cores or not.
set -euo pipefail
fail() {
    echo "$0: $*" >&2
    exit 1
}
[ $# = 2 ] && [[ $1 =~ ^(up|down)$ ]] || fail "usage: $0 up|down FOLDER"
[ "$(id -u)" = 0 ] || fail 'Slurm starts jobs for others and has to be started by root'
for each in slurmctld:slurm-wlm slurmd:slurm-wlm srun:slurm-wlm munged:munge; do
    command -v "${each%:*}" >/dev/null || fail "${each%:*} is missing; on Debian and Ubuntu: apt-get install slurm-wlm munge"
done
mkdir -p "$2"
FOLDER=$(realpath "$2")
export SLURM_CONF=$FOLDER/slurm.conf

down() {
    timeout 10 scancel --quiet --signal=KILL --full --state=RUNNING 2>/dev/null || true
    timeout 10 scancel --quiet --state=PENDING 2>/dev/null || true
    for _ in $(seq 100); do # a job whose controller is gone tries to tell it for ever that it has ended
        [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
        sleep 0.1
    done
    for name in slurmctld slurmd munged; do
        [ -f "$FOLDER/$name.pid" ] || continue
        pid=$(cat "$FOLDER/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -9 "$pid"
    done
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

if [ "$1" = down ]; then
    [ -f "$SLURM_CONF" ] || fail "$FOLDER has no Slurm"
    down
    exit
fi

HOST=$(hostname -s)
mkdir -p "$FOLDER"/{state,spool}
# a munge of its own, known to this Slurm alone
(umask 077 && head -c 128 /dev/urandom >"$FOLDER/munge.key")
munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" --pid-file="$FOLDER/munged.pid" \
    --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munge.seed" 2>"$FOLDER/munged.err" || fail "munged: $(tail -1 "$FOLDER/munged.err")"
cat >"$SLURM_CONF" <<CONF
ClusterName=mmkd
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that is queued again waits until its credential has expired, two minutes by default
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
SlurmdParameters=config_overrides
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=${CPUS:-2} RealMemory=2000 State=UNKNOWN
PartitionName=cpu Nodes=$HOST Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=$HOST MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
slurmctld -c
slurmd
for _ in $(seq 60); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit
    sleep 0.5
done
down
fail "no node is ready after 30 seconds; see $FOLDER/slurmctld.log and $FOLDER/slurmd.log"
