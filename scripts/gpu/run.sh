#!/bin/bash
# Checks and measures everything on one machine with a GPU, in one call, meant for half an hour:
#
#   scripts/gpu/run.sh OUTPUT LENGTHS       # binaries of build.sh in target/gpu
#
# LENGTHS: recorded lengths (lengths.jsonl or the published array). Needs a Python with torch (CUDA), transformers and PEFT
# for the peers and the random 7B weights; PYTHON names it. Each step's output is a file in OUTPUT, and a step that fails
# leaves the others running.
set -u
out=$1 lengths=$2
here=$(dirname "$0")
python=${PYTHON:-python3}
models=${MODELS:-/tmp/lengthwise-models}
lengthwise=${LENGTHWISE:-target/gpu/lengthwise}
mkdir -p "$out"
# cuBLAS and NVRTC as PyTorch brings them, and the driver's own folder.
wheels=$("$python" -c 'import glob, nvidia; print(":".join(glob.glob(list(nvidia.__path__)[0] + "/*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="$wheels:/usr/lib/x86_64-linux-gnu:${LD_LIBRARY_PATH:-}"

step() { # name command...
    local name=$1 began=$SECONDS
    shift
    if "$@" > "$out/$name.out" 2> "$out/$name.err"; then echo "$name: $((SECONDS - began)) s"; else echo "$name: FAILED, $(tail -1 "$out/$name.err")"; fi
}
bench() { # name flags...
    local name=$1
    shift
    step "$name" "$lengthwise" bench -q --json --device cuda --model "$models/7b" --replay "$lengths" --prompt-tokens 32 128 "$@"
}

step machine nvidia-smi
step kernels target/gpu/kernel-tests gpu --test-threads 1
# Copy rate of the card: the floor of a step that reads all weights.
step copy_rate "$python" "$here/copy_rate.py"
step answers "$here/same_answers.sh" "$lengthwise"
step make_7b "$python" "$here/make_7b.py" "$models/7b"
step profile "$lengthwise" profile --json --device cuda --model "$models/7b"
bench warm --num 32 --strategy continuous --batch-size 16
bench strategies --num 256 --strategy vanilla,oracle,continuous --vbs --fcr --planner published,cost --batch-size 16 --export-workload "$out/workload.jsonl"
step peer_hf "$python" "$here/../bench_decode/peer_hf.py" "$models/7b" "$out/workload.jsonl" vanilla --num 64 --device cuda --dtype bfloat16
for slots in 16 64 256; do bench "continuous_$slots" --num 1024 --strategy continuous --batch-size $slots; done
bench continuous_most --num 1024 --strategy continuous --batch-size 1024
bench vanilla_1024 --num 1024 --strategy vanilla --batch-size 16
bench seqsch_1024 --num 1024 --strategy seqsch --noise-mae 62 --vbs --fcr --planner published,cost --batch-size 16
step train "$python" "$here/../bench_train.py" "$models" --lengthwise "$lengthwise" --models-used 7b --shapes 8x512 --device cuda --dtype bf16 --steps 5
