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
rm -f "$out/failed.txt"
step() { echo "== $1"; timeout "$2" "${@:3}" || echo "failed or out of time: $1" | tee -a "$out/failed.txt"; }
bench() { "$python" -c 'from experiments.cli import main; main()' bench "$@" --device cuda --dtype bfloat16; }
export -f bench; export python out
step "tests of the kernels" 140 "$python" -m pytest -q -m gpu tests/mixers
step "operators, heads of SD-1.5" 110 bash -c 'bench operators --heads 8x40,8x160 --against "[!r]*" --repeats 5 --budget 90 --out "$out/sd15"'
step "operators, heads of SDXL" 70 bash -c 'bench operators --heads 20x64 --against "[!r]*" --repeats 5 --budget 50 --out "$out/sdxl"'
step "operators, b8 h16 k64" 50 bash -c 'bench operators --heads 16x64 --batch 8 --max-tokens 32768 --repeats 5 --budget 35 --out "$out/b8"'
step "blocks" 40 bash -c 'bench layers --budget 30 --out "$out"'
step "UNet of SD-1.5" 80 bash -c 'bench unet --profile sd15 --min-tokens 4096 --size 256 --size 512 --size 1024 --size 2048 --size 4096 --repeats 5 --budget 65 --out "$out"'
step "crossover" 50 bash -c 'bench crossover --repeats 3 --max-tokens 16384 --out "$out"'
step "table of backends" 50 bash -c 'bench --calibrate --table "$out/backends.json" --heads 8x64'
echo "Results: $out"
[ ! -s "$out/failed.txt" ]
