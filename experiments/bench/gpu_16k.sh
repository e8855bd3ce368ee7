#!/usr/bin/env bash
# "1 GPU, 1 minute, 16K image", measured within a time budget; see experiments/studies/largest_image/gpu_session.py.
#     experiments/bench/gpu_16k.sh [FOLDER] [--budget SECONDS] [--archive FILE.tar.gz] [--dry-run]
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m experiments.studies.largest_image.gpu_session "$@"
