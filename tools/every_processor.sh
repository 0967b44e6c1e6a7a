#!/usr/bin/env bash
# The notebooks and the tests as four processors would compute them; with arguments, `pytest ARGUMENTS` in the same four ways.
# ATen without vector instructions; ATen and oneDNN as on a processor with AVX2; MKL in the order of operations that all have.
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
failed=0
for mode in "" "ATEN_CPU_CAPABILITY=default" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" "MKL_CBWR=COMPATIBLE"; do
    echo "== ${mode:-as it is}"
    if [ $# -eq 0 ]; then
        env $mode nbdev_test --n_workers 2 && env $mode python -m pytest -q -n 3 --dist worksteal tests
    else
        env $mode python -m pytest -q "$@"
    fi || { failed=1; echo "== failed: ${mode:-as it is}"; }
done
exit $failed
