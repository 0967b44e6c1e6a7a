#!/usr/bin/env bash
# One slice of the training of a base, on a machine where a job is short and only small files come and go.
# tools/gpu/train_base.sh CORPUS BEFORE AFTER [flags of dlpo_nb.pretrain]
#   CORPUS  folder with manifest.jsonl and audio/
#   BEFORE  AFTER of the slice before; a missing or empty folder starts the run
#   AFTER   gets state.part.NN and base.part.NN (at most 16 MB each), metrics.jsonl, config.json, environment.json, samples as step_*.wav
# Environment: SLICE_MINUTES (default 8), PYTHON (default python), DEBS, TEXTS (see README.md: festival speaks the corpus here)
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
fi
corpus=$1 before=$2 after=$3
shift 3
python=${PYTHON:-python}
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
mkdir -p "$after"

if [ -n "${DEBS:-}" ]; then
    # festival from its packages, without installing them
    for package in "$DEBS"/*.deb; do dpkg -x "$package" "$run/festival"; done
    mkdir "$run/bin"
    cat >"$run/bin/festival" <<SCRIPT
#!/bin/sh
libraries=$run/festival/usr/lib/x86_64-linux-gnu
LD_LIBRARY_PATH=\$libraries:\$libraries/pulseaudio:$run/festival/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH
data=$run/festival/usr/share/festival
exec $run/festival/usr/bin/festival --datadir \$data --libdir \$data "\$@"
SCRIPT
    chmod +x "$run/bin/festival"
    PATH=$run/bin:$PATH $python -m dlpo_nb.data --texts "${TEXTS:?a file with one text a line}" --out "$corpus" \
        --workers "$(nproc)" --fragments --limit "${UTTERANCES:-9000}"
fi

if compgen -G "$before/state.part.*" >/dev/null; then
    cat "$before"/state.part.* >"$run/state.pt"
    if [ -e "$before/metrics.jsonl" ]; then cp "$before/metrics.jsonl" "$run/"; fi
fi
$python -m dlpo_nb.pretrain --corpus "$corpus" --out "$run" --resume --slice-minutes "${SLICE_MINUTES:-8}" "$@"

rm -f "$after"/state.part.* "$after"/base.part.*
split -d -b 16000000 "$run/state.pt" "$after/state.part."
split -d -b 16000000 "$run/base.safetensors" "$after/base.part."
for name in metrics.jsonl config.json environment.json; do
    if [ -e "$run/$name" ]; then cp "$run/$name" "$after/"; fi
done
if compgen -G "$run/samples/*.wav" >/dev/null; then cp "$run"/samples/*.wav "$after/"; fi
