#!/usr/bin/env bash
# What an episode costs at full size: seconds by phase, share of the GPU's ceilings, memory; with 50 rollout steps, then with 1000, and with 50 compiled.
#   tools/gpu/full_size.sh OUT [flags of bench_episode.py]
# OUT gets episode_50.json, episode_1000.json and episode_50_compiled.json; a job that runs out of time keeps the settings that were through.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0"; exit 2; }
out=$1; shift
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
"${PYTHON:-python}" tools/bench/bench_episode.py --out "$out/episode_50.json" --utmos --rollout-steps 50 "$@"
"${PYTHON:-python}" tools/bench/bench_episode.py --out "$out/episode_1000.json" --utmos --rollout-steps 1000 --settings bfloat16 "$@"
"${PYTHON:-python}" tools/bench/bench_episode.py --out "$out/episode_50_compiled.json" --utmos --rollout-steps 50 --settings bfloat16 --compile "$@"
