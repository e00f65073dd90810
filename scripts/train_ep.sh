#!/usr/bin/env bash
# Expert-parallel training (train_ep.py) on one node, or on several: each runs this command, with a .venv that was made
# before (bash scripts/quickstart.sh), and one of them prints.
#
#   MODEL=deepseek-ai/DeepSeek-V2-Lite DATA=translation bash scripts/train_ep.sh [flag or key=value of train_ep.py ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MODEL=... DATA=... bash scripts/train_ep.sh    # NODE_RANK=1 on the other
#
# When a process dies, torchrun ends the others; the same command, on all nodes, goes on from the last whole checkpoint.
# MAX_RESTARTS=3 makes torchrun do so by itself, and wait ten minutes for a node that is gone (not node 0), which comes
# back by the same command. Where a process hangs, the others give up after ddp_timeout seconds (a key: ddp_timeout=600;
# 1800 if not given). Why one died stands above torchrun's traceback: "error: rank 3: ...", or a line of NCCL's.
# SIGTERM to torchrun ends a run after the step at work, with a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

# What to set, in the environment:
MODEL=${MODEL:-results/models/tiny}              # folder or hub id of the base model; a folder is there on all nodes
DATA=${DATA:-law}                                # a name in datasets/train, a path or a hub id
case $MODEL in results/models/tiny) preset=tiny ;; *) preset=base ;; esac
name=$(basename "$DATA" .jsonl)
CONFIG=${CONFIG:-configs/$preset.yaml}           # keys of the training
EXPERT_CONFIG=${EXPERT_CONFIG:-results/expert_configs/$name.json}  # scripts/expert/generate_expert_config.py makes it
OUTPUT=${OUTPUT:-results/checkpoints/$name}      # written: the adapter and checkpoints; one folder that all nodes see
NPROC=${NPROC:-}                                 # processes on this node (default: one per GPU, or one)
MAX_RESTARTS=${MAX_RESTARTS:-0}                  # how often torchrun may start all processes again
NNODES=${NNODES:-1}                              # nodes; of several each sets
NODE_RANK=${NODE_RANK:-0}                        #   its number, from 0
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}            #   the name of node 0
MASTER_PORT=${MASTER_PORT:-29500}                #   a port that is free there
IFNAME=${IFNAME:-}                               #   where they do not connect: the interface between them, e.g. eth0

if [ -x .venv/bin/python ]; then ESFT_PYTHON=${ESFT_PYTHON:-.venv/bin/python}; fi  # as it is; made where it is missing
source scripts/environment.sh eval,plot
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

if [ -n "$IFNAME" ]; then
    export GLOO_SOCKET_IFNAME=$IFNAME     # else that of the host's own name, which is the loopback on many systems
    export NCCL_SOCKET_IFNAME="=$IFNAME"  # else the first one that NCCL finds
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # NCCL tells why it fails; by default it does not
# torchrun would give a process one CPU thread
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}
# torchrun would kill 30 seconds after SIGTERM, perhaps before the step at work and its checkpoint are done
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Left as they are: TORCH_NCCL_ASYNC_ERROR_HANDLING, since by default a collective that fails or waits for longer than
# ddp_timeout ends its process; NCCL_IB_HCA, which is for nodes with InfiniBand cards that do not lead to each other.

nodes=(--standalone)
if [ "$NNODES" -gt 1 ]; then
    # a shared store tells its address in the first round only (torch 2.13): a node that comes back would not learn it
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    nodes=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id=esft --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
        --rdzv-conf="is_host=$((NODE_RANK == 0)),read_timeout=600")
fi
exec "$python" -m torch.distributed.run "${nodes[@]}" --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS" \
    train_ep.py --base_model_path="$MODEL" --train_dataset="$DATA" --expert_config="$EXPERT_CONFIG" \
    --train_config="$CONFIG" --output_dir="$OUTPUT" --save_opt_states "$@"
