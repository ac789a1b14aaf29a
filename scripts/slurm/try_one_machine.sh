#!/usr/bin/env bash
# train.sbatch on a real SLURM that lives on this machine alone, for as long as this script runs: a small job
# on the CPU is cut by its time limit three times or more, and must end as the same job does that is not cut,
# to the last digit, with every iteration done once. About 15 minutes on 2 cores.
#
#   scripts/slurm/try_one_machine.sh [FOLDER]      # what it writes stays in FOLDER, if one is given
#
# Needs Debian's or Ubuntu's packages slurmctld, slurmd and munge; without them it says so and exits with 77.
# ITERATIONS (default 3000) must be enough for three cuts: more on a faster machine.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
for tool in slurmctld slurmd munged sbatch srun scontrol; do
    if ! PATH="$PATH:/usr/sbin" command -v "$tool" >/dev/null; then
        echo "skipped: $tool is not installed (Debian, Ubuntu: apt install slurmctld slurmd munge)"
        exit 77
    fi
done
export PATH="$PATH:/usr/sbin"
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
agoq_setup

iterations="${ITERATIONS:-3000}" ranks=2 me="$(id -un)" host="$(hostname -s)"
temporary=""
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work="$(cd "$1" && pwd)"
else
    temporary="$(mktemp -d)"
    work="$temporary"
fi
pids=()
cleanup() {
    trap - EXIT
    scancel --user "$me" 2>/dev/null || true
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    [ -z "$temporary" ] || rm -rf "$temporary"
}
trap cleanup EXIT

free_port() {
    "$AGOQ_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# --- A cluster of one node ------------------------------------------------------------------------

mkdir -p "$work"/{munge,state,spool,out}
chmod 711 "$work/munge"  # others may reach the socket
dd if=/dev/urandom of="$work/munge/key" bs=1 count=1024 status=none
chmod 400 "$work/munge/key"
munged --foreground --force --key-file="$work/munge/key" --socket="$work/munge/socket" \
    --pid-file="$work/munge/pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed" \
    >"$work/munge/out" 2>&1 &
pids+=($!)
export SLURM_CONF="$work/slurm.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# A requeued job starts once its old credential has expired: seconds, not two minutes.
AuthInfo=socket=$work/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$ranks State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
for _ in $(seq 50); do [ -S "$work/munge/socket" ] && break; sleep 0.2; done
slurmctld -D >"$work/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D -N "$host" >"$work/slurmd.out" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
    sleep 0.3
done
sinfo --noheader --format=%T | grep -q idle || { tail -n 5 "$work"/slurm*.log >&2; exit 1; }

# --- Two jobs -------------------------------------------------------------------------------------

cat >"$work/tiny.flags" <<FLAGS
# A model of two layers on made-up data; stochastic rounding must resume, too.
--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights
--attention-dropout 0 --hidden-dropout 0 --seq-length 64 --max-position-embeddings 64 --bf16
--micro-batch-size 1 --global-batch-size 4 --train-iters $iterations --lr 1e-3
--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
--eval-iters 0 --eval-interval 100000 --log-interval 1 --save-interval 100000
--use-distributed-optimizer --agoq-rounding stochastic --agoq-grad-bits 8 --agoq-optimizer-bits 8
FLAGS
submit() { # NAME MINUTES [OPTIONS OF sbatch]
    local name="$1" minutes="$2"
    AGOQ_VENV="$(dirname "$(dirname "$AGOQ_PYTHON")")" AGOQ_ROOT="$root" OMP_NUM_THREADS=1 \
        sbatch --parsable --nodes=1 --ntasks-per-node=$ranks --cpus-per-task=1 --gpus-per-node=0 \
        --job-name="$name" --time="$minutes" --signal=B:USR1@20 --output="$work/out/$name.log" \
        "$root/scripts/slurm/train.sbatch" "$work/tiny.flags" \
        --save "$work/out/$name" --agoq-report "$work/out/$name.json" \
        --tensorboard-dir "$work/out/$name-series" --tensorboard-log-interval 1
}
finish() { # NAME JOB
    local state
    while :; do
        state="$(scontrol --oneliner show job "$2" | sed 's/.* JobState=\([A-Z_]*\) .*/\1/')"
        case "$state" in
            COMPLETED) return 0 ;;
            PENDING | RUNNING | COMPLETING | CONFIGURING | REQUEUED) sleep 2 ;;
            *) echo "$1: $state"; tail -n 20 "$work/out/$1.log"; return 1 ;;
        esac
    done
}
# One after the other: both want all CPUs.
job="$(submit uncut 60)"
finish uncut "$job"
job="$(submit cut 2)"
finish cut "$job"

"$AGOQ_PYTHON" - "$work/out" "$iterations" <<'PYTHON'
import json
import re
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

out, iterations = Path(sys.argv[1]), int(sys.argv[2])
runs, faults = {}, []
for name in ("uncut", "cut"):
    # Not the log: of each start Megatron logs as the second loss the mean of the first two.
    series = EventAccumulator(str(out / f"{name}-series"), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(e.step, e.value) for e in series.Scalars(tag)] for tag in ("lm loss", "grad-norm")}
    for tag, found in points.items():
        if sorted(step for step, _ in found) != list(range(1, iterations + 1)):
            faults.append(f"{name}: iterations lost or done twice ({tag})")
    cuts = len(re.findall("cut with status 0; requeued", (out / f"{name}.log").read_text()))
    final = json.loads((out / f"{name}.json").read_text())["final_train_loss"]
    print(f"{name}: {len(points['lm loss'])} iterations, cut {cuts} times, final training loss {final!r}")
    runs[name] = {tag: sorted(found) for tag, found in points.items()} | {"final": final}
    if name == "cut" and cuts < 3:
        faults.append(f"only {cuts} cuts: set ITERATIONS to more than {iterations}")
if runs["cut"] != runs["uncut"]:
    faults.append("losses or gradient norms differ")
print("; ".join(faults) or "the same losses and gradient norms, every iteration once")
sys.exit(bool(faults))
PYTHON
