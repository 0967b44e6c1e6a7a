#!/usr/bin/env bash
# The CPU benchmarks of results/bench/, half an hour on two quiet cores, and the notebooks that draw them: tools/bench/all.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
for name in decoder scaling memory; do
    "${PYTHON:-python}" "tools/bench/bench_$name.py"
done
for name in dnsmos distillmos vocoders say; do
    "${PYTHON:-python}" "tools/bench/bench_$name.py" --out "results/bench/$name.json"
done
"${PYTHON:-python}" tools/run_nb.py nbs/11ea_vocos.ipynb nbs/21_dnsmos.ipynb nbs/25_distillmos.ipynb nbs/experiments/73_speed.ipynb
