#!/usr/bin/env bash
# Every method and its shuffled control from one base, several runs at a time on one GPU, until the time is over.
#   MINUTES=9 JOBS=6 SEEDS="0 1 2" tools/gpu/compare_methods.sh RUNS OUT [flags of dlpo_nb.launch]
# RUNS keeps whole runs: a later call with the same folder goes on with those that were not through. OUT gets results.tar.gz:
# settings, environment, metrics and scores of each run, no checkpoints and no audio.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
runs=$1 out=$2; shift 2
root="$(cd "$(dirname "$0")/../.." && pwd)"
export PYTHONPATH="$root:${PYTHONPATH:-}"
mkdir -p "$runs" "$out"
runs="$(cd "$runs" && pwd)"; out="$(cd "$out" && pwd)"
end=$(($(date +%s) + ${MINUTES:-9} * 60))

one() { # METHOD CONTROL SEED [flags]
    local method=$1 control=$2 seed=$3 folder="$runs/$1-$2-seed$3" left=$((end - $(date +%s)))
    shift 3
    [ -e "$folder/summary.json" ] || [ "$left" -le 20 ] && return 0
    local flags=(--method "$method" --control "$control" --seed "$seed" --out "$folder" "$@")
    [ ! -e "$folder/config.json" ] || flags=(--out "$folder" --resume)
    timeout -s INT "$left" "${PYTHON:-python}" -m dlpo_nb.launch "${flags[@]}" >> "$folder.log" 2>&1 || echo "$method $control $seed: not through, see $folder.log"
}
export -f one
export runs end

for seed in ${SEEDS:-0}; do for method in ${METHODS:-dlpo ddpo dpok klinr rwr onlydl}; do for control in none shuffle-advantages; do
    [ "$method $control" = "onlydl shuffle-advantages" ] || echo "$method" "$control" "$seed" # it never sees a reward
done; done; done | xargs -P "${JOBS:-4}" -L 1 bash -c 'one "${@: -3}" "${@:1:$#-3}"' _ "$@"

cd "$runs"
tar czf "$out/results.tar.gz" $(find . -name '*.json' -o -name 'metrics.jsonl' -o -name 'evaluation.csv' -o -name '*.log')
