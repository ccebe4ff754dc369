#!/usr/bin/env bash
# Tests and measurements on one NVIDIA GPU: ten minutes on one of 80 GB. Each result is written at once.
#
#   benchmarks/gpu.sh                  everything, into benchmarks/results/gpu
#   benchmarks/gpu.sh FOLDER           into another folder
#   SECONDS_IN_ALL=480 benchmarks/gpu.sh
#
# For a machine without a network, download the missing packages beforehand on a machine that has one:
#
#   python benchmarks/gpu_wheels.py --python 3.12 --without numpy scipy     into data/wheels, which git ignores
#
# and copy that folder too: the script uses it if it exists. torch itself must be installed on the machine.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
limit=${SECONDS_IN_ALL:-600}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline

if [ -d data/wheels ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" data/wheels/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi

failed=0
# step NAME MOST COMMAND: runs COMMAND for at most MOST seconds, or for the seconds that are left
step() {
    local name=$1 most=$2 left=$((limit - SECONDS))
    shift 2
    [ "$left" -gt 5 ] || { printf '%s: no time left\n' "$name" | tee -a "$out/steps.txt"; failed=1; return; }
    [ "$most" -lt "$left" ] || most=$left
    local began=$SECONDS code=0
    timeout "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=1
    printf '%s: exit code %d, %d s\n' "$name" "$code" $((SECONDS - began)) | tee -a "$out/steps.txt"
    tail -n 15 "$out/$name.log"
}

: >"$out/steps.txt"
step machine 30 bash -c 'nvidia-smi; '"$python"' -c "import torch, transformers, lightning; print(torch.__version__, torch.version.cuda, transformers.__version__, lightning.__version__, torch.cuda.get_device_name())"'
step rates 40 "$python" benchmarks/gpu.py rates --out "$out"
# correctness: every decoder and the packed update, every preset, resume, LoRA, precisions, FSDP
step paths 150 "$python" -m pytest -m gpu -n 0 -q -rA tests/gpu/test_gpu_paths.py
step runs 200 "$python" -m pytest -m gpu -n 0 -q -rA tests/gpu/test_gpu_runs.py
# speed and memory
step decode 120 "$python" benchmarks/gpu.py decode syncs tf32 --out "$out"
step plan 120 "$python" benchmarks/gpu.py runs --out "$out"
for model in gpt2 llama; do
    step "faithful-$model" 40 "$python" benchmarks/faithfulness.py --model "$model" --device cuda --out "$out/faithfulness.csv"
done
if "$python" -c 'import trl' 2>/dev/null; then
    for model in gpt2 llama; do
        step "race-$model" 120 "$python" benchmarks/vs_trl.py --model "$model" --algo grpo --precision bf16 \
            --device cuda --prompts 32 --new-tokens 128 --runs 3 --out "$out/vs_trl.csv"
    done
fi
printf 'in all: %d s\n' "$SECONDS" | tee -a "$out/steps.txt"
exit "$failed"
