#!/usr/bin/env bash
# Install into .venv (once), then run the linter and the fast tests. Arguments go to pytest: `bash scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh eval,plot,lora,quant,optim,track,suites,clients,gguf,curate,dev
"$python" -m ruff check .
"$python" -m ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec "$python" -m pytest -q -n "${ESFT_TEST_PROCESSES:-2}" --dist worksteal "$@"
