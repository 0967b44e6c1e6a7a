#!/usr/bin/env bash
# A run on the nodes of a Slurm job: one launcher on each node, which starts a process for each of its GPUs.
#   sbatch --nodes 2 --gpus-per-node 8 tools/gpu/slurm.sh paper --out runs/paper [flags of dlpo_nb.launch]
# --out lies on a disk that all nodes see. A job that Slurm has put into the queue again resumes its run.
# Environment: PYTHON (default python), MODULE (default dlpo_nb.launch; dlpo_nb.pretrain works as well),
# GLOO_SOCKET_IFNAME where a node's own name stands for 127.0.1.1 (see README.md)
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail
[ $# -ge 1 ] && [ -n "${SLURM_JOB_ID:-}" ] || { sed -n '2,6s/^# \?//p' "$0" >&2; exit 2; }
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --resume
# without --ntasks-per-node=1 each task would be a run of its own, all of them in one --out
srun --ntasks-per-node=1 "${PYTHON:-python}" -m "${MODULE:-dlpo_nb.launch}" "$@" --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --rdzv-endpoint "${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"
