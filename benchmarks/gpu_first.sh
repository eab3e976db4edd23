#!/usr/bin/env bash
# The most telling rows of one GPU in five minutes, on random weights: correctness, copies, rotary forward and backward,
# decoding, attention, prefill, training, perplexity at many lengths. gpu_second.sh goes on with everything else.
#
#   ./benchmarks/gpu_first.sh OUT            rows are added to OUT/gpu.jsonl after every measurement
#   ./benchmarks/gpu_first.sh OUT --dry      the same code on the CPU, in Triton's interpreter, at tiny sizes
#
# OUT gets four files: gpu.jsonl, gpu-first.log, gpu_report.md, gpu-roofline.png. A script that is run again, also from
# a copy of gpu.jsonl, measures what is missing. Needs Python with torch, triton, transformers, einops and matplotlib, and
# nothing else that the image of a GPU machine may lack. Liger's rotary is measured if its wheel lies in .whl/ (pip
# download --no-deps -d .whl liger-kernel: 0.9 MB; installed into a temporary folder, nothing is fetched) or if it can be
# imported. COMMIT=HASH says which commit this is where there is no git repository; PYTHON names the interpreter;
# SECONDS_AT_MOST (285) is the time limit.
set -euo pipefail
cd "$(dirname "$0")/.."
plan=${PLAN:-first}
case "${1:-}" in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "benchmarks/gpu_first.sh"; exit ;;
    "" | -*) echo "error: the first argument must be a folder for the rows, not '${1:-}'" >&2; exit 2 ;;
esac
out=$1; shift
mkdir -p "$out"
python=${PYTHON:-python3}
if compgen -G ".whl/liger_kernel-*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/liger_kernel-*.whl || true
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1
status=0
"$python" benchmarks/gpu.py --plan "$plan" --seconds "${SECONDS_AT_MOST:-285}" --output "$out/gpu.jsonl" \
    ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | tee "$out/gpu-$plan.log" || status=$?
"$python" benchmarks/gpu_report.py --rows "$out/gpu.jsonl" --standalone "$out" || true
exit "$status"
