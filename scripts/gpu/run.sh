#!/bin/bash
# Checks and measures everything on one machine with a GPU (measure.py), in two calls of at most ten minutes each:
#
#   scripts/gpu/run.sh OUTPUT LENGTHS               # what the bars need, the most important first
#   scripts/gpu/run.sh OUTPUT LENGTHS --second      # what that had no time for, and the rest; again while something is left
#   scripts/gpu/run.sh OUTPUT LENGTHS --only PART,...       # these parts alone, and what they need that is not there yet
#   DRY=1 LENGTHWISE=target/release/lengthwise scripts/gpu/run.sh OUTPUT LENGTHS    # the scripts themselves, on a CPU
#
# To be taken along: this repository, target/gpu.tar.xz of build.sh (or target/gpu unpacked), and LENGTHS, a file of recorded
# lengths (lengths.jsonl or the published array), which is not in the repository. Needs a Python of 3.11 or later with torch
# (CUDA), transformers and PEFT for the other engines and the random 7B weights; PYTHON names it.
#
# OUTPUT gets results.json and results.md, written after each part; they hold what is worth keeping, also of what a part
# printed last. OUT: a folder that gets both as well, should OUTPUT not outlast the call. The second call finds the first
# one's results, work load, adapter and weights where OUTPUT, the card and the commit (COMMIT, where this is no git tree) are
# the same; on another machine put results.json into OUTPUT first, and what is needed is made again.
# MODELS: where the weights go; else memory (/dev/shm) where 16 GB are free, else /tmp. LENGTHWISE_NO_GRAPHS=1 and
# LENGTHWISE_NO_EARLY_KERNELS=1 hold for all parts, and are named in the results.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
packed=target/gpu.tar.xz unpacked=target/gpu/lengthwise
if [ -e $packed ] && { [ ! -e $unpacked ] || [ $packed -nt $unpacked ]; }; then
    # Not every machine has xz; every Python has.
    "$python" -m tarfile -e $packed target
    touch $unpacked
fi
# cuBLAS, cuRAND and NVRTC as PyTorch brings them, and the driver's own folder: for our binaries, not for Python.
find_wheels='import glob, nvidia; print(":".join(f for p in nvidia.__path__ for f in sorted(glob.glob(p + "/*/lib"))))'
wheels=$("$python" -c "$find_wheels" 2> /dev/null || true)
others=/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu:/usr/local/cuda/lib64
export CUDA_LIBRARIES="${wheels:+$wheels:}$others${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# The model is a folder: nothing is asked of the hub. What a script prints is there when it is stopped.
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[ -z "${LENGTHWISE:-}" ] || set -- "$@" --lengthwise "$LENGTHWISE"
[ -z "${MODELS:-}" ] || set -- "$@" --models "$MODELS"
[ -z "${DRY:-}" ] || set -- "$@" --dry
exec "$python" scripts/gpu/measure.py "$@"
