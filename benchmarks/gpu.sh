#!/usr/bin/env bash
# What a GPU does with this model, in at most eight minutes, into results/speed/gpu.json. The machine
# needs torch and transformers, this repository, and no network:
#
#     python3 benchmarks/gpu.py --pack FOLDER   # before: a backbone in half precision, in parts of
#                                               # at most 60 MB, into build/backbone; carry those too
#     benchmarks/gpu.sh                         # there; without a backbone, random weights
#     benchmarks/gpu.sh --dry                   # tiny shapes, on a CPU, in seconds
set -euo pipefail
cd "$(dirname "$0")/.."
parts=(build/backbone/model.safetensors.part-*)
if [ -e "${parts[0]}" ]; then cat "${parts[@]}" > build/backbone/model.safetensors; fi
exec timeout 480 "${PYTHON:-python3}" benchmarks/gpu.py "$@"
