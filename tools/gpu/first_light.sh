#!/usr/bin/env bash
# The first five minutes on a GPU: does all of it work there, and where does the time go?
#   tools/gpu/first_light.sh OUT [flags of first_light.py]
# A line per step; OUT gets summary.json, log.txt and profile.txt. Where there is no GPU: DEVICE=cpu ... OUT --tiny
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
out=$1; shift
cd "$(dirname "$0")/../.."
# a process that has asked CUDA whether there is a GPU cannot be forked; NVML may be asked
export PYTHONPATH="$PWD:$PWD/tools/bench:${PYTHONPATH:-}" PYTORCH_NVML_BASED_CUDA_CHECK=1
exec "${PYTHON:-python}" tools/gpu/first_light.py --out "$out" --device "${DEVICE:-auto}" "$@"
