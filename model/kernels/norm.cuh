// RMSNorm. The residual sum before it is in the epilogue of the matrix product (beta = 1), so it costs no pass here.
#pragma once
#include "common.cuh"

// Packs that a thread reads before it writes any.
#define NORM_AT_ONCE 2

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w, rounded before w as Hugging Face does; one block per row.
template <typename T>
__device__ void rms_norm(T *out, const T *x, const T *w, int width, float eps) {
    const T *row = x + (size_t)blockIdx.x * width;
    T *to = out + (size_t)blockIdx.x * width;
    const int step = blockDim.x * Pack<T>::SIZE;
    float squares = 0;
#pragma unroll 2
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += step) {
        const Pack<T> p = load_pack(row + i);
        for (int j = 0; j < Pack<T>::SIZE; j++) squares += widen(p.v[j]) * widen(p.v[j]);
    }
    const float inverse = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for (int begin = threadIdx.x * Pack<T>::SIZE; begin < width; begin += NORM_AT_ONCE * step) {
        Pack<T> p[NORM_AT_ONCE], q[NORM_AT_ONCE];
#pragma unroll
        for (int n = 0; n < NORM_AT_ONCE; n++) {
            const int i = min(begin + n * step, width - Pack<T>::SIZE);
            p[n] = load_pack(row + i);
            q[n] = load_pack(w + i);
        }
#pragma unroll
        for (int n = 0; n < NORM_AT_ONCE; n++) {
            for (int j = 0; j < Pack<T>::SIZE; j++) {
                const float unit = widen(narrow<T>(widen(p[n].v[j]) * inverse));
                p[n].v[j] = narrow<T>(unit * widen(q[n].v[j]));
            }
            if (begin + n * step < width) store_pack(to + begin + n * step, p[n]);
        }
    }
}

#define NORM_KERNELS(suffix, T)                                                                                \
    extern "C" __global__ void rms_norm_##suffix(T *out, const T *x, const T *w, int width, float eps) {       \
        after_earlier();                                                                                       \
        rms_norm<T>(out, x, w, width, eps);                                                                    \
    }                                                                                                          \
    REGISTER_KERNEL(rms_norm_##suffix)

FOR_EACH_DTYPE(NORM_KERNELS)
