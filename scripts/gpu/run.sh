#!/bin/bash
# Checks and measures everything on one machine with a GPU, in one call of at most ten minutes (measure.py):
#
#   scripts/gpu/run.sh OUTPUT LENGTHS [--seconds 570] [--only PART,...]    # build.sh's target/gpu, or target/gpu.tar.xz alone
#   DRY=1 LENGTHWISE=target/release/lengthwise scripts/gpu/run.sh OUTPUT LENGTHS    # the script itself, on a CPU
#
# LENGTHS: recorded lengths (lengths.jsonl or the published array). Needs a Python with torch (CUDA), transformers and PEFT
# for the peers and the random 7B weights; PYTHON names it. OUTPUT gets results.json and results.md, written after each part.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# Not every machine has xz; every Python has.
[ -e target/gpu ] || [ ! -e target/gpu.tar.xz ] || "$python" -m tarfile -e target/gpu.tar.xz target
# cuBLAS and NVRTC as PyTorch brings them, and the driver's own folder: for our binaries, not for Python.
wheels=$("$python" -c 'import glob, nvidia; print(":".join(glob.glob(list(nvidia.__path__)[0] + "/*/lib")))' 2> /dev/null || true)
export CUDA_LIBRARIES="$wheels:/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu:${LD_LIBRARY_PATH:-}"
exec "$python" -u scripts/gpu/measure.py "$@" ${LENGTHWISE:+--lengthwise "$LENGTHWISE"} ${MODELS:+--models "$MODELS"} ${DRY:+--dry}
