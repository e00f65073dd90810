#!/usr/bin/env bash
# What one GPU shows, by one command in under 9 minutes: the tests marked gpu, then speed and memory of ways to
# fine-tune (benchmark.py), then a profile of one step. `--rehearse` does the same on a CPU with small shapes.
#
# The machine needs an NVIDIA driver, a C compiler (torch.compile), and a Python with the packages of
#     pip install -c constraints.txt -e .[lora,quant,dev]
# in .venv, or in the environment whose Python ESFT_PYTHON names. Nothing is installed and no network is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${ESFT_PYTHON:-.venv/bin/python}
"$python" -c 'import importlib.util, sys
if missing := [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]:
    print("error: cannot start: these packages are missing:", *missing, "(see the top of gpu.sh)", file=sys.stderr)
    sys.exit(2)' torch transformers accelerate datasets safetensors yaml psutil peft bitsandbytes pytest
exec "$python" scripts/experiments/gpu.py "$@"
