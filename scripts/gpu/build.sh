#!/bin/sh
# Builds what run.sh takes to a machine with a GPU, on one that has neither GPU, driver nor CUDA toolkit:
#
#   scripts/gpu/build.sh            # target/gpu: lengthwise, kernel-tests; target/gpu.tar.xz: both, to be taken along
#
# CUDA_COMPUTE_CAP: of the GPU (90 for H100 and H200). CUDA_TOOLCHAIN: where toolchain.sh puts nvcc. With a CUDA toolkit of
# your own, `cargo build --release --features cuda` is all it takes.
set -eu
cd "$(dirname "$0")/../.."
toolchain=${CUDA_TOOLCHAIN:-target/cuda-toolchain}
scripts/gpu/toolchain.sh "$toolchain"
. "$toolchain/env.sh"
export CARGO_TARGET_DIR=target/cuda
cargo build --release --features cuda -p lengthwise-cli
tests=$(cargo test --release -p lengthwise-model --features cuda --lib --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))$/\1/p')
mkdir -p target/gpu
cp target/cuda/release/lengthwise target/gpu/lengthwise
cp "$tests" target/gpu/kernel-tests
strip target/gpu/lengthwise target/gpu/kernel-tests
tar cJf target/gpu.tar.xz -C target gpu
ls -l target/gpu target/gpu.tar.xz
