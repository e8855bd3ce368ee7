#!/usr/bin/env bash
# Everything of the benchmarks that needs a GPU, within a time budget; see experiments/bench/gpu_session.py.
#     experiments/bench/gpu.sh [FOLDER] [--budget SECONDS] [--archive FILE.tar.gz] [--dry-run]
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m experiments.bench.gpu_session "$@"
