#!/bin/bash
# Train a recipe for 16 GPUs on two nodes of 8 under SLURM:
#
#     omnicompile plan model.py --gpus 16 --out recipe.yaml
#     sbatch examples/slurm_train.sh recipe.yaml train.jsonl run
#
# One launcher a node, which starts a process for each GPU. The folder `run` must be on disks that all nodes share.
# Five minutes before the time limit SLURM sends SIGTERM: the step under way is finished, a checkpoint written, and the
# same line submitted again goes on from it.
#SBATCH --job-name=omnicompile
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300

set -euo pipefail
recipe=$1 data=$2 out=$3
shift 3

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((29000 + SLURM_JOB_ID % 1000))

srun --kill-on-bad-exit=1 omnicompile train "$recipe" --data "$data" --out "$out" \
    --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" "$@"
