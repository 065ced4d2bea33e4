# shellcheck shell=bash
# What depends on your cluster, in one place: train.sbatch and train_horovodrun.sbatch source it on the first
# node of the job. Edit it once, or set the variables when submitting: HVD_COMPRESS_IFACE=ib0 sbatch ...
#
#   HVD_COMPRESS_VENV    the Python environment with Horovod   (.venv of the directory you submit from)
#   HVD_COMPRESS_SCRIPT  your own training script              (examples/train.py)
#   HVD_COMPRESS_IFACE   network interface between the nodes   (chosen by MPI or Horovod)

# 1. Modules: the compiler, MPI and CUDA that Horovod was BUILT with; an MPI that pip installed is in the venv and
#    needs none. Module systems fail under `set -u`.
# set +u; module purge; module load gcc openmpi cuda; set -u

# 2. The environment, on a file system that every node sees at the same path.
venv=${HVD_COMPRESS_VENV:-$PWD/.venv}
if [ ! -r "$venv/bin/activate" ]; then
  echo "no Python environment at $venv: submit from the project's directory after make, or set HVD_COMPRESS_VENV" >&2
  exit 2
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"

# 3. The script that every rank runs. Your own gets your arguments only. The example gets a directory of this
#    job (an --output among your arguments wins) and continues from the checkpoint there after a requeue.
if [ -n "${HVD_COMPRESS_SCRIPT:-}" ]; then
  training=("$HVD_COMPRESS_SCRIPT" "$@")
else
  training=(examples/train.py --output "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" --resume "$@")
fi
if [ ! -r "${training[0]}" ]; then
  echo "no ${training[0]} in $PWD: submit from the project's directory, or set HVD_COMPRESS_SCRIPT" >&2
  exit 2
fi
training=(python "${training[@]}")

# 4. Threads. Without this every rank starts one for each core of the node, and the ranks compete for the cores.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Since Slurm 22.05 srun takes --cpus-per-task from here, no longer from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# 5. Network. Nodes often have a slow management interface beside the fast one; `srun -N1 ip -br addr` lists
#    them. The name must be the same on every node. Over UCX (InfiniBand) set UCX_NET_DEVICES instead.
#    Horovod's Gloo uses the name for its main context only: for process sets it looks the node's host name
#    up, so with several nodes that must not resolve to 127.x.x.x.
if [ -n "${HVD_COMPRESS_IFACE:-}" ]; then
  export OMPI_MCA_btl_tcp_if_include=$HVD_COMPRESS_IFACE   # Open MPI over TCP
  export HOROVOD_GLOO_IFACE=$HVD_COMPRESS_IFACE            # Gloo
  export NCCL_SOCKET_IFNAME=$HVD_COMPRESS_IFACE            # NCCL's start, and its data without InfiniBand
fi

export PYTHONUNBUFFERED=1   # else the log stays empty until the job ends
