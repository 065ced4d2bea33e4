#!/usr/bin/env bash
# A real Slurm on this machine, to test the files in slurm/: two nodes, which are two slurmd on one
# host. It has its own configuration, key, ports and logs in a temporary directory: a Slurm in /etc/slurm is
# neither read nor changed. Debian or Ubuntu; needs root, because slurmd does.
#
#   slurm_cluster.sh install          Slurm, munge and PMIx from the distribution
#   slurm_cluster.sh start            prints the line that points sbatch, srun, squeue ... at it
#   slurm_cluster.sh submit ARGS...   sbatch ARGS there, wait, show the log, fail if the job failed
#   slurm_cluster.sh stop             stop what start started, remove the directory
#   slurm_cluster.sh test             all of this in a new directory: both sbatch files with two ranks,
#                                     on one node and, over PMIx, on two
#
#   SLURM_CLUSTER_DIR     where it lives                     (/tmp/hvd_compress-slurm; not used by test)
#   SLURM_CLUSTER_WAIT    seconds that a job may take        (600)
#   HVD_COMPRESS_VENV     the Python environment of the jobs (.venv)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dir=${SLURM_CLUSTER_DIR:-${TMPDIR:-/tmp}/hvd_compress-slurm}
limit=${SLURM_CLUSTER_WAIT:-600}
export HVD_COMPRESS_VENV=${HVD_COMPRESS_VENV:-$root/.venv}
PATH=$PATH:/usr/sbin:/sbin # where slurmctld, slurmd and munged are; not on every user's PATH

say() { printf '[slurm] %s\n' "$*"; }
die() { printf '[slurm] FAILED: %s\n' "$*" >&2; exit 1; }
need_root() { [ "$(id -u)" = 0 ] || die "'$1' needs root, as slurmd does: sudo $0 $1"; }

# --- install --------------------------------------------------------------------------------------
# Slurm's plugin loads libpmix.so, a name that only the -dev package has. The output of ldconfig is read to its end,
# because under pipefail a grep that exits early would make it fail.
installed() {
  local name
  for name in slurmctld slurmd munged sbatch srun; do command -v $name >/dev/null || return 1; done
  ldconfig -p | grep -w 'libpmix\.so ' >/dev/null
}

install() {
  ! installed || return 0
  need_root install
  command -v apt-get >/dev/null || die "no apt-get here: install munge, PMIx and Slurm (slurmctld, slurmd) yourself"
  say "installing slurm-wlm, munge and libpmix-dev"
  local log
  log=$(mktemp)
  if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
         apt-get install -y -q --no-install-recommends slurm-wlm munge libpmix-dev; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "apt-get install; its whole output is in $log"
  fi
  rm -f "$log"
  installed || die "the packages are installed, but slurmctld, slurmd, munged or libpmix.so is still missing"
}

# --- start and stop -------------------------------------------------------------------------------
# The mark prevents `stop` from removing, and root from using, a directory that start did not create.
ours() { [ -O "$dir" ] && [ -e "$dir/started-by-slurm_cluster" ]; }
use() { export SLURM_CONF=$dir/slurm.conf; }

nodes=(node1 node2)
# Here ranks share cores with each other and with other processes, and Open MPI polls while it waits.
export OMPI_MCA_mpi_yield_when_idle=1

# Print ports that are free now, for slurmctld and each slurmd: the usual ones may belong to a Slurm that
# is installed here already.
free_ports() {
  "$HVD_COMPRESS_VENV/bin/python" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))'
}

write_conf() {
  local host cpus memory ports
  host=$(hostname -s)
  cpus=$(nproc)
  ((cpus >= 2)) || cpus=2 # two ranks have to fit on a node; config_overrides below allows it
  memory=$(awk '/^MemTotal/ {print int($2 / 2048)}' /proc/meminfo)
  read -ra ports <<<"$(free_ports)"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=hvd_compress
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
# The directory of PMIx's sockets: nodes on one host must not share it, or ranks fail to start.
TmpFS=$dir/tmp-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
# Nothing that needs cgroups, which containers often lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=${nodes[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=$cpus RealMemory=$memory
NodeName=${nodes[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=$cpus RealMemory=$memory
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

# daemon NAME COMMAND...: run it in a session of its own, so that Ctrl-C reaches only this script; record its pid.
daemon() {
  local name=$1
  shift
  setsid "$@" >"$dir/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.started"
}

# Print a recorded pid if it still is the process that was started, because pids are reused.
running() {
  local pid
  pid=$(cat "$dir/$1.started" 2>/dev/null) && [ -r "/proc/$pid/cmdline" ] || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -F -- "$dir/" >/dev/null && echo "$pid"
}

# within SECONDS COMMAND...: try until it succeeds
within() {
  local until=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < until)) || return 1
    sleep 0.3
  done
}
idle() { [ "$(sinfo -h -o %T)" = idle ]; }
no_jobs() { local jobs; jobs=$(squeue -h) && [ -z "$jobs" ]; }
gone() { ! running "$1"; }

# on_exit keep|stop: after a failure show the logs; stop the cluster after a failure (keep) or always (stop).
on_exit() {
  local code=$?
  trap - EXIT
  [ $code = 0 ] || ! ours || logs
  [ "$code $1" = "0 keep" ] || ! ours || (stop)
  exit $code
}

start() {
  need_root start
  prepared
  mkdir -m 755 "$dir" || die "is a cluster running there already? $0 stop"
  trap 'on_exit keep' EXIT
  trap 'exit 130' INT TERM
  boot
}

# Check what is needed before a directory is created.
prepared() {
  [ -x "$HVD_COMPRESS_VENV/bin/python" ] || die "no Python environment at $HVD_COMPRESS_VENV: run make, or set HVD_COMPRESS_VENV"
  installed || die "Slurm, munge or PMIx is missing: $0 install"
}

boot() {
  touch "$dir/started-by-slurm_cluster"
  use
  mkdir "$dir/state" "${nodes[@]/#/$dir/spool-}" "${nodes[@]/#/$dir/tmp-}"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  write_conf
  daemon munged munged -F --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
    --pid-file="$dir/munged.pid" --seed-file="$dir/munged.seed"
  within 10 test -S "$dir/munge.socket" || die "munged does not come up"
  daemon slurmctld slurmctld -D -i -f "$SLURM_CONF"
  local node
  for node in "${nodes[@]}"; do daemon "slurmd-$node" slurmd -D -N "$node" -f "$SLURM_CONF"; done
  within 30 idle || die "the nodes do not become idle"
  srun --mpi=pmix --nodes=2 --immediate=10 true || die "srun --mpi=pmix does not work"
  say "$(sinfo --version), two nodes with $(sinfo -h -o %c) CPUs each, is ready; to use it from this shell:"
  say "  export SLURM_CONF=$dir/slurm.conf"
}

stop() {
  need_root stop
  [ -d "$dir" ] || { say "nothing to stop in $dir"; return 0; }
  ours || die "$dir was not made by start: left alone"
  use
  if running slurmctld >/dev/null; then
    squeue -h -o %A | xargs -r scancel || true
    within 20 no_jobs || say "some jobs did not end"
  fi
  local name pid
  for name in "${nodes[@]/#/slurmd-}" slurmctld munged; do
    pid=$(running "$name") || continue
    kill "$pid"
    within 10 gone "$name" || kill -KILL "$pid"
  done
  rm -rf "$dir"
  say "stopped, $dir removed"
}

logs() {
  local file
  for file in "$dir"/*.out "$dir"/*.log; do
    [ ! -s "$file" ] || { say "--- the end of $file"; tail -n 15 "$file"; }
  done >&2
}

# --- jobs -----------------------------------------------------------------------------------------
# job ID FIELD: one value of scontrol's KEY=VALUE words. Without a database there is no sacct.
field() { scontrol show job -o "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }
ended() { case $(field "$1" JobState) in PENDING | CONFIGURING | RUNNING | COMPLETING) return 1 ;; esac; }

# Submit a job and wait for it; set $job to its id and $log to its log.
submit() {
  ours || die "no cluster of yours in $dir: $0 start"
  use
  job=$(cd "$root" && sbatch --parsable --output="$dir/%x-%j.log" "$@") || return 1
  log=$(field "$job" StdOut)
  say "job $job: sbatch $*"
  if ! within "$limit" ended "$job"; then
    say "job $job is still $(field "$job" JobState) after $limit s ($(field "$job" Reason))"
    scancel "$job"
    within 20 ended "$job" || true
  fi
  local state code
  state=$(field "$job" JobState) code=$(field "$job" ExitCode)
  sed -e 's/.*\r//' -e 's/^/  | /' "$log" 2>/dev/null || say "no log in $log"
  say "job $job: $state, exit code $code"
  [ "$state $code" = "COMPLETED 0:0" ]
}

# --- test -----------------------------------------------------------------------------------------
# Check that one Horovod job of two ranks trained to its end. Two jobs of one rank would both look correct in the
# log, so this reads the files that the training wrote: its size, and a checkpoint from each rank.
check_training() {
  "$HVD_COMPRESS_VENV/bin/python" - "$1" "$2" <<'PY'
import json, pathlib, sys
run, epochs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
log = json.loads((run / "log.json").read_text())
assert log["ranks"] == 2, f"a Horovod job of size {log['ranks']}, not 2"
done = [e["epoch"] for e in log["epochs"]]
assert done == list(range(1, epochs + 1)), f"epochs done: {done}, not 1 to {epochs}"
for rank in range(2):
    path = run / f"checkpoint.epoch{epochs}.rank{rank}.pt"
    assert path.exists(), f"rank {rank} left no {path.name}"
print(f"[slurm] 2 ranks in one job, {epochs} epochs, test accuracy {log['epochs'][-1]['test_accuracy']:.1f} %")
PY
}

check() { # NAME "HOW TO COMPRESS" SBATCH-ARGUMENTS...
  local name=$1 out=$dir/run-$1 epochs=2 lines how
  read -ra how <<<"--compression $2"
  shift 2
  submit "$@" "${how[@]}" --epochs $epochs --train-samples 256 --width 4 --output "$out" \
    || die "$name: the job did not succeed"
  check_training "$out" $epochs || die "$name: this was no training on two ranks"
  lines=$(grep -c "test accuracy" "$log" || true)
  [ "$lines" = $epochs ] || die "$name: $lines lines with a test accuracy in the log, not $epochs"
}

run_test() {
  need_root test
  install
  prepared
  dir=$(mktemp -d "${TMPDIR:-/tmp}/hvd_compress-slurm.XXXXXX")
  trap 'on_exit stop' EXIT
  trap 'exit 130' INT TERM
  chmod 755 "$dir" # munge's clients look into it
  boot
  check one-node def slurm/train.sbatch
  check two-nodes def --nodes=2 --ntasks-per-node=1 slurm/train.sbatch
  check tree "gs-sgd --sketch-exchange tree" --nodes=2 --ntasks-per-node=1 slurm/train.sbatch
  check merges gtop-k slurm/train.sbatch
  check horovodrun def slurm/train_horovodrun.sbatch
  say "both sbatch files train with two ranks"
}

case ${1:-} in
  install | start | stop) "$1" ;;
  submit) shift; submit "$@" ;;
  test) run_test ;;
  *) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"; [ $# = 0 ] || die "no command '$1'" ;;
esac
