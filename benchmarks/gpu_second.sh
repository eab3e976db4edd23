#!/usr/bin/env bash
# What did not fit into gpu_first.sh: all shapes, lengths, methods and variants, in the order of what they are worth.
#
#   ./benchmarks/gpu_second.sh OUT           goes on from OUT/gpu.jsonl; run it again for what is still missing
#
# Arguments and variables are those of gpu_first.sh; the time limit is 480 seconds here.
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    "" | -*) echo "error: the first argument must be a folder for the rows, not '${1:-}'" >&2; exit 2 ;;
esac
export PLAN=second SECONDS_AT_MOST=${SECONDS_AT_MOST:-480}
exec bash "$(dirname "$0")/gpu_first.sh" "$@"
