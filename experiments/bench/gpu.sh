#!/usr/bin/env bash
# Everything that needs a GPU, within about ten minutes: the kernels' tests, then the benchmarks, all into one folder.
#     experiments/bench/gpu.sh [FOLDER]
set -eu
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
mkdir -p "$out"
"$python" - <<'CHECK' || { echo "gpu.sh: torch finds no GPU here; nothing was run." >&2; exit 1; }
import sys, torch
sys.exit(not torch.cuda.is_available())
CHECK
"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/machine.txt"
step() { echo "== $1"; shift; timeout "$1" "${@:2}" || echo "failed or out of time: ${*:2}" | tee -a "$out/failed.txt"; }
bench() { "$python" -c 'from experiments.cli import main; main()' bench "$@" --device cuda --out "$out"; }
export -f bench; export python out
step "tests of the kernels" 150 "$python" -m pytest -q -m gpu tests/mixers 2>&1 | tee "$out/tests.txt"
step "operators, heads of SD-1.5" 110 bash -c 'bench operators --dtype bfloat16 --heads 8x40,8x80,8x160 --max-tokens 262144 --budget 90'
step "operators, heads of SDXL" 60 bash -c 'out="$out/sdxl" bench operators --dtype bfloat16 --heads 10x64,20x64 --max-tokens 262144 --budget 45'
step "operators, b8 h16 k64" 40 bash -c 'out="$out/b8" bench operators --dtype bfloat16 --heads 16x64 --batch 8 --max-tokens 32768 --budget 30'
step "blocks" 60 bash -c 'bench layers --dtype bfloat16 --budget 45'
step "UNet of SD-1.5" 90 bash -c 'bench unet --profile sd15 --dtype bfloat16 --min-tokens 4096 --size 256 --size 512 --size 1024 --size 2048 --size 4096 --budget 75'
step "crossover" 60 bash -c 'bench crossover --dtype bfloat16 --repeats 3 --max-tokens 16384'
step "table of backends" 60 bash -c 'bench --calibrate --table "$out/backends.json" --dtype bfloat16 --heads 8x64'
echo "Results: $out"
