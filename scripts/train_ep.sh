#!/usr/bin/env bash
# Run expert-parallel training (train_ep.py) on one node or on several. On several, each node runs this command, and one
# of them prints. Make .venv before (bash scripts/quickstart.sh).
#
#   MODEL=deepseek-ai/DeepSeek-V2-Lite DATA=translation bash scripts/train_ep.sh [flag or key=value of train_ep.py ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MODEL=... DATA=... bash scripts/train_ep.sh    # NODE_RANK=1 on the other
#
# When a process dies, torchrun ends the others. The same command, on all nodes, continues from the last whole checkpoint.
# MAX_RESTARTS=3 makes torchrun do this by itself, and after a wrong setting (exit code 2), too. It then waits ten
# minutes for a lost node (not node 0), which comes back by the same command. When a process hangs, the others give up
# after ddp_timeout seconds (a key, 1800 by default).
# The reason stands above torchrun's traceback: "error: rank 3: ...", or a line of NCCL.
# SIGTERM to torchrun ends a run after the current step, with a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

# What to set, in the environment:
MODEL=${MODEL:-results/models/tiny}              # folder or hub id of the base model; all nodes must see a folder
DATA=${DATA:-law}                                # a name in datasets/train, a path or a hub id
case $MODEL in results/models/tiny) preset=tiny ;; *) preset=base ;; esac
name=$(basename "$DATA" .jsonl)
CONFIG=${CONFIG:-configs/$preset.yaml}           # keys of the training
EXPERT_CONFIG=${EXPERT_CONFIG:-results/expert_configs/$name.json}  # from scripts/expert/generate_expert_config.py
OUTPUT=${OUTPUT:-results/checkpoints/$name}      # gets the adapter and checkpoints; all nodes must see this folder
NPROC=${NPROC:-}                                 # processes on this node (default: one per GPU, or one)
MAX_RESTARTS=${MAX_RESTARTS:-0}                  # how often torchrun may start all processes again
NNODES=${NNODES:-1}                              # number of nodes; with several, set on each of them:
NODE_RANK=${NODE_RANK:-0}                        #   its number, from 0
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}            #   the name of node 0
MASTER_PORT=${MASTER_PORT:-29500}                #   a free port on node 0
IFNAME=${IFNAME:-}                               #   if they do not connect: the network interface, e.g. eth0

if [ -x .venv/bin/python ]; then ESFT_PYTHON=${ESFT_PYTHON:-.venv/bin/python}; fi  # use .venv as it is
source scripts/environment.sh eval,plot
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

if [ -n "$IFNAME" ]; then
    export GLOO_SOCKET_IFNAME=$IFNAME     # by default that of the host's name, often the loopback
    export NCCL_SOCKET_IFNAME="=$IFNAME"  # by default the first one that NCCL finds
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # NCCL says why it fails; by default it does not
# By default torchrun gives a process one CPU thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}
# By default torchrun kills 30 seconds after SIGTERM, which can be before the current step and its checkpoint are done.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Two variables keep their defaults. TORCH_NCCL_ASYNC_ERROR_HANDLING: a collective that fails, or waits longer than
# ddp_timeout, ends its process. NCCL_IB_HCA: it is for nodes with InfiniBand cards that do not reach each other.

nodes=(--standalone)
if [ "$NNODES" -gt 1 ]; then
    # With a shared store (torch 2.13) a node that comes back never learns the store's address.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    nodes=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id=esft --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
        --rdzv-conf="is_host=$((NODE_RANK == 0)),read_timeout=600")
fi
exec "$python" -m torch.distributed.run "${nodes[@]}" --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS" \
    train_ep.py --base_model_path="$MODEL" --train_dataset="$DATA" --expert_config="$EXPERT_CONFIG" \
    --train_config="$CONFIG" --output_dir="$OUTPUT" --save_opt_states "$@"
