#!/bin/sh
# Runs a program that was built for GPUs on a machine without one: driver, cuBLAS and cuRAND are stood in for on the CPU
# (model/kernels/emulator/driver.cpp), slowly, for decoding and prediction.
#
#   scripts/gpu/stand_in.sh target/gpu/lengthwise generate --device cuda --dtype bf16 …
#   scripts/gpu/stand_in.sh scripts/gpu/same_answers.sh target/gpu/lengthwise
#
# The program must be one of build.sh, which looks for the libraries when it runs. STAND_IN_MEMORY_MB: the GPU's memory.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
folder=${STAND_IN:-$here/target/stand-in}
mkdir -p "$folder"
if [ ! -e "$folder/libcuda.so.1" ] || [ -n "$(find "$here/model/kernels" -newer "$folder/libcuda.so.1" | head -1)" ]; then
    c++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -U_FORTIFY_SOURCE -Wno-unknown-pragmas \
        "$here/model/kernels/emulator/driver.cpp" -o "$folder/libcuda.so.1"
    for library in libcublas.so.13 libcurand.so.10; do ln -sf libcuda.so.1 "$folder/$library"; done
fi
LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
