#!/bin/sh
# Runs a program that was built for GPUs on a machine without one: driver, cuBLAS and cuRAND are stood in for on the CPU
# (model/kernels/emulator/driver.cpp), slowly, for decoding, prediction and training. Stricter than a GPU: bad and misaligned
# addresses, freed memory, calls that a recording forbids and much else end in an error.
#
#   scripts/gpu/stand_in.sh target/gpu/lengthwise generate --device cuda --dtype bf16 …
#   scripts/gpu/stand_in.sh target/gpu/lengthwise train --device cuda --dtype f32 --max-steps 4 --batch-size 4 …
#   scripts/gpu/stand_in.sh target/gpu/kernel-tests gpu
#   scripts/gpu/stand_in.sh scripts/gpu/same_answers.sh target/gpu/lengthwise
#
# The program must be one of build.sh, which looks for the libraries when it runs. STAND_IN_MEMORY_MB: the GPU's memory.
# STAND_IN_BACKWARDS=1: the threads of a block run in the other order. STAND_IN_LACKS=graphs, early-graphs or graph-launches:
# the driver records nothing, no kernels that begin early, or does not launch what it recorded.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
folder=${STAND_IN:-$here/target/stand-in}
library=$folder/libcuda.so.1
mkdir -p "$folder"
if [ ! -e "$library" ] || [ -n "$(find "$here/model/kernels" "$0" -newer "$library" | head -1)" ]; then
    # A misaligned access is a trap, which the stand-in names.
    c++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -U_FORTIFY_SOURCE -Wno-unknown-pragmas \
        -fsanitize=alignment -fsanitize-undefined-trap-on-error \
        "$here/model/kernels/emulator/driver.cpp" -o "$library.$$"
    mv "$library.$$" "$library"
    for other in libcublas.so.13 libcurand.so.10; do ln -sf libcuda.so.1 "$folder/$other"; done
fi
LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
