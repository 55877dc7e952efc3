#!/usr/bin/env bash
# Trains on GPUs of a SLURM cluster: one process a node, with all of the node's GPUs. From a login node:
#
#   sbatch scripts/slurm_gpu.sh run.yaml                           # what stands below: 2 nodes x 8 GPUs
#   sbatch --nodes=16 --partition=gpu scripts/slurm_gpu.sh run.yaml optim.lr=1e-4
#
# It runs in the folder that it was sent from, which all nodes must see: settings, text, run folder and checkpoints are
# there. ENV names the Python environment (default: .venv in that folder); TASK is train, sft, dpo or distill. Where
# the job is preempted, reaches its time limit or loses a node, it goes back to the queue and on from its newest
# checkpoint, until the run is finished. Options of sbatch on the command line come before those below.
#SBATCH --job-name=jaxllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM to the training processes five minutes ahead of the time limit. They finish their step, save, and end.
#SBATCH --signal=TERM@300
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job for SLURM: sbatch $0 RUN.yaml [section.key=value ...]"
[ $# -gt 0 ] || fail "name the settings file: sbatch scripts/slurm_gpu.sh RUN.yaml [section.key=value ...]"
gpus=${SLURM_GPUS_ON_NODE:-}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "SLURM gave no GPUs (SLURM_GPUS_ON_NODE=$gpus); ask for them by --gpus-per-node=8"
jaxllm=${ENV:-.venv}/bin/jaxllm
[ -x "$jaxllm" ] || fail "$jaxllm is not there; install it (docs/gpu.md), or say where it is by ENV=FOLDER"

# On SLURM jax would give each task the one GPU of its number on the node. With one task a node it is told to take all:
# so the text is read and tokenised once a node, and the tensor and context axes can span the GPUs of a node.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS

# jax takes 75 % of each GPU's memory unless told otherwise; the rest is for NCCL, cuDNN and CUDA itself, which 6 GB of
# 80 should hold. jaxlib refuses to start where both the old and the new name of the variable are set.
[ -n "${XLA_CLIENT_MEM_FRACTION:-}" ] ||
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# jax finds the other tasks by what srun tells each (jax/_src/clusters/slurm_cluster.py). A task without
# --cpus-per-task would be held to one core. srun ends with the highest code of its tasks; --wait lets the others
# finish their save after the first has ended.
code=0
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --wait=300 \
  "$jaxllm" "${TASK:-train}" "$@" parallel.processes=null checkpoint.preempted_exit_code=75 || code=$?

if [ "$code" = 75 ]; then # stopped by a signal, and saved
  echo "saved; back to the queue (start $((${SLURM_RESTART_COUNT:-0} + 1)) ends here)"
  scontrol requeue "$SLURM_JOB_ID" || echo "SLURM did not take it back: send the same job again, and it goes on"
fi
exit "$code"
