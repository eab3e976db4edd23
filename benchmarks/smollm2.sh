#!/usr/bin/env bash
# A real pretrained model without training: SmolLM2-135M (8192 positions) under the scalings, on texts from package
# archives, on a CPU. Rows that are there already are not measured again, so it can be interrupted and extended.
#
#   ./benchmarks/smollm2.sh          under 20 minutes on two cores: one novel, a few scalings, out/smollm2/report.html
#   ./benchmarks/smollm2.sh full     what data/smollm2_rows.jsonl holds: about 4 hours on two cores
#   ./benchmarks/smollm2.sh attention   the methods that change attention, to twice and four times the length
#
# OUTPUT is the folder (default: out/smollm2). CONTROL=trained also measures the control of perplexities: the same tokens
# after the last 8192 only. More flags of eval/perplexity.py and eval/passkey.py may follow, such as
# --attention sdpa where the processor has AMX.
set -euo pipefail
cd "$(dirname "$0")/.."
source ./environment.sh
find_python

what=${1:-quick}
shift || true
output=${OUTPUT:-out/smollm2}
model=models/smollm2-135m
shared=(-m "$model" --dtype bfloat16 --attention blockwise --output "$output/rows.jsonl")

control=(${CONTROL:+--control "$CONTROL"})

under() { # SPEC ...: as flags
    flags=()
    for spec in "$@"; do flags+=(--scaling "$spec"); done
}

attended python -m scaled_rope.texts.fetched_models fetch smollm2-135m --output "$model"
case $what in
    quick)
        under default linear:2 ntk:2 yarn:2 dynamic-yarn
        attended python eval/perplexity.py "${shared[@]}" "${control[@]}" "${flags[@]}" "$@" --dataset standin:books --samples 1 \
            --lengths 1024,2048,4096,8192,12288,16384
        under default yarn:2
        attended python eval/passkey.py "${shared[@]}" "${flags[@]}" "$@" --lengths 4096,8192,12288 --iterations 3
        attended python eval/harness.py "${shared[@]}" "${flags[@]}" --offline --tasks truthfulqa_mc2 --limit 20
        ;;
    full)
        under default yarn:2 linear:2 ntk:2 ntk-by-parts:2 dynamic-yarn dynamic-ntk
        attended python eval/perplexity.py "${shared[@]}" "${control[@]}" "${flags[@]}" "$@" --samples 1 \
            --dataset standin:books --dataset standin:hol-light --dataset standin:sotu \
            --lengths 1024,2048,4096,8192,12288,16384
        under yarn:2 default linear:2
        attended python eval/passkey.py "${shared[@]}" "${flags[@]}" "$@" --lengths 4096,8192,12288,16384 --iterations 5
        under default yarn:2
        attended python eval/harness.py "${shared[@]}" "${flags[@]}" --offline --tasks arc_challenge,hellaswag --limit 40
        attended python eval/harness.py "${shared[@]}" "${flags[@]}" --offline --tasks truthfulqa_mc2 --limit 60
        attended python eval/harness.py "${shared[@]}" "${flags[@]}" --offline --tasks mmlu --limit 2
        under default yarn:4 linear:4 ntk:4
        attended python eval/perplexity.py "${shared[@]}" "${control[@]}" "${flags[@]}" "$@" --dataset standin:books --samples 1 \
            --lengths 1024,2048,4096,8192,16384,24576,32768
        ;;
    attention)
        far=(--scaling rerope,window=4096 --scaling leaky-rerope,window=4096,k=8 --scaling self-extend,group=8,window=2048
            --scaling dual-chunk,chunk=6144 --scaling dynamic-yarn)
        attended python eval/perplexity.py "${shared[@]}" "${control[@]}" "${far[@]}" --scaling default --scaling dynamic-linear \
            --scaling rerope,window=4096,logn=true --scaling leaky-rerope,window=4096,k=8,logn=true "$@" \
            --dataset standin:books --samples 1 --lengths 1024,2048,4096,8192,12288,16384
        attended python eval/perplexity.py "${shared[@]}" "${control[@]}" "${far[@]}" --scaling yarn:4 --scaling dynamic-linear "$@" \
            --dataset standin:books --samples 1 --lengths 1024,2048,4096,8192,16384,24576,32768
        attended python eval/passkey.py "${shared[@]}" "${far[@]}" --scaling yarn:2 "$@" \
            --lengths 12288,16384 --iterations 3 --shared-prefill
        attended python eval/passkey.py "${shared[@]}" "${far[@]}" --scaling yarn:4 "$@" \
            --lengths 32768 --iterations 3 --shared-prefill
        ;;
    *)
        echo "error: $what is not allowed; quick (the default), full or attention" >&2
        exit 2
        ;;
esac
attended python eval/report.py "$output/rows.jsonl" --output "$output" --title "SmolLM2-135M beyond its 8192 positions, untrained"
