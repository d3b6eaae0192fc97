// The feed-forward's activation on the fused gate and up projections.
#pragma once
#include "common.cuh"

// silu(gate) * up, rounded between the two as Hugging Face does.
template <typename T> __device__ inline T swiglu_of(T gate, T up) {
    const float x = widen(gate);
    return narrow<T>(widen(narrow<T>(x / (1.0f + expf(-x)))) * widen(up));
}

// out[r] = silu(gate_up[r, ..width]) * gate_up[r, width..]; grid (rows, parts of a row).
template <typename T>
__device__ void swiglu(T *out, const T *gate_up, int width) {
    const T *gate = gate_up + (size_t)blockIdx.x * 2 * width, *up = gate + width;
    T *to = out + (size_t)blockIdx.x * width;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<T>::SIZE;
    if (i >= width) return;
    Pack<T> g = load_pack(gate + i);
    const Pack<T> u = load_pack(up + i);
    for (int j = 0; j < Pack<T>::SIZE; j++) g.v[j] = swiglu_of(g.v[j], u.v[j]);
    store_pack(to + i, g);
}

#define SWIGLU_KERNELS(suffix, T)                                                                  \
    extern "C" __global__ void swiglu_##suffix(T *out, const T *gate_up, int width) {              \
        after_earlier();                                                                           \
        swiglu<T>(out, gate_up, width);                                                            \
    }                                                                                              \
    REGISTER_KERNEL(swiglu_##suffix)

FOR_EACH_DTYPE(SWIGLU_KERNELS)
