#!/usr/bin/env bash
# "1 GPU, 1 minute, 16K image", measured within ten minutes on one H100 or H200: SDXL and SD-1.5 with random weights, all
# the memory there is and 24 GB of it, against softmax attention.
#     experiments/bench/gpu_16k.sh [FOLDER]
set -eu
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu_16k}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
mkdir -p "$out"
"$python" - <<'CHECK' || { echo "gpu_16k.sh: torch finds no GPU here; nothing was run." >&2; exit 1; }
import sys, torch
sys.exit(not torch.cuda.is_available())
CHECK
"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/machine.txt"
rm -f "$out/failed.txt" "$out/reach.jsonl"
reach() {
    echo "== ${*:2}"
    timeout "$1" "$python" -m experiments.studies.largest_image "$out/reach.jsonl" "${@:2}" \
        || echo "failed or out of time: ${*:2}" | tee -a "$out/failed.txt"
}
sdxl="random:SDXL base"
reach 150 --mixer linfusion --model "$sdxl" --size 16384x8192
reach 150 --mixer linfusion --model "$sdxl" --size 16384x8192 --memory 24GB
reach 60 --mixer linfusion --model random:SD-1.5 --size 16384x8192
reach 30 --mixer linfusion --model "$sdxl" --size 4096x2048
reach 30 --model "$sdxl" --size 4096x2048
reach 60 --mixer linfusion --model "$sdxl" --size 8192x4096
reach 110 --model "$sdxl" --size 8192x4096
"$python" -m experiments.studies.largest_image "$out/reach.jsonl" --print | tee "$out/reach.txt"
echo "Results: $out"
[ ! -s "$out/failed.txt" ]
