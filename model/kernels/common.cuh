// What the kernels share: element types, sums over a warp or a block, 16-byte loads.
//
// Sizes are in elements unless a name says otherwise. T is float, __nv_bfloat16 or __half; sums are always f32.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define REGISTER_KERNEL(name)
#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(128) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
#else
#include "emulator/cuda.h"
#endif

#define FULL_WARP 0xffffffffu

// Waits until the kernels ahead have ended and all that they wrote can be read, then lets the next one begin, whose blocks
// wait here in turn: so a kernel's start costs nothing where the one ahead leaves room. Every thread of every kernel calls
// it once, before it touches what another kernel may write.
__device__ inline void after_earlier() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n" ::: "memory");
#elif !defined(__CUDACC__)
    emulator::after_earlier();
#endif
}

// Defines one extern "C" kernel per element type: M(suffix, T).
#define FOR_EACH_DTYPE(M) \
    M(f32, float)         \
    M(bf16, __nv_bfloat16) \
    M(f16, __half)
// The types that tensor cores take.
#define FOR_EACH_HALF(M)   \
    M(bf16, __nv_bfloat16) \
    M(f16, __half)

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half(x); }

// As many elements as one 16-byte load brings.
template <typename T> struct alignas(16) Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};

template <typename T> __device__ inline Pack<T> load_pack(const T *p) { return *reinterpret_cast<const Pack<T> *>(p); }
template <typename T> __device__ inline void store_pack(T *p, const Pack<T> &x) { *reinterpret_cast<Pack<T> *>(p) = x; }

// Two neighbours, which one load brings.
template <typename T> struct alignas(2 * sizeof(T)) Pair {
    T v[2];
};

template <typename T> __device__ inline Pair<T> load_pair(const T *p) { return *reinterpret_cast<const Pair<T> *>(p); }
template <typename T> __device__ inline void store_pair(T *p, const Pair<T> &x) { *reinterpret_cast<Pair<T> *>(p) = x; }

// The sum over the `lanes` (a power of two) neighbours that share a result; every lane of the warp must call it.
__device__ inline float sum_lanes(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

__device__ inline float max_lanes(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// The sum over the block, known to every thread. The block is a multiple of 32 threads, at most 1024.
template <typename V> __device__ V block_sum(V x) {
    __shared__ V warps[32];
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    __syncthreads(); // An earlier call's sums have been read.
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    V sum = V(0);
    for (int warp = 0; warp < (int)(blockDim.x / 32); warp++) sum += warps[warp];
    return sum;
}

// The sum of all earlier threads' values, in the order of the threads; `total` is that of all.
template <typename V> __device__ V block_prefix(V x, V *total) {
    __shared__ V warps[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    V inclusive = x;
    for (int offset = 1; offset < 32; offset *= 2) {
        V before = __shfl_up_sync(FULL_WARP, inclusive, offset);
        if (lane >= offset) inclusive += before;
    }
    V exclusive = __shfl_up_sync(FULL_WARP, inclusive, 1);
    if (lane == 0) exclusive = V(0);
    __syncthreads();
    if (lane == 31) warps[warp] = inclusive;
    __syncthreads();
    V before = V(0), sum = V(0);
    for (int w = 0; w < (int)(blockDim.x / 32); w++) {
        if (w == warp) before = sum;
        sum += warps[w];
    }
    *total = sum;
    return before + exclusive;
}
