// From a row of queries, keys and values as the product gives them to what attention reads: biases added, heads
// normalised, positions turned in, keys and values written into the cache. One pass over the row.
#pragma once
#include "common.cuh"

// A head's norm, rounded before its weight as norm.cuh does; `w` null: none.
template <typename T> struct HeadNorm {
    const T *w;
    float inverse;

    __device__ float of(float x, int i) const { return w ? widen(narrow<T>(x * inverse)) * widen(w[i]) : x; }
};

// Writes neighbours of either half of a head, `a` from i on and `b` from i + half on, with their position turned in.
// - cos, sin: of the position, [half]
template <typename T>
__device__ inline void store_turned(T *head, int i, int half, const float (&a)[2], const float (&b)[2],
                                    const float *cos, const float *sin) {
    const Pair<float> c = load_pair(cos + i), s = load_pair(sin + i);
    Pair<T> left, right;
    for (int j = 0; j < 2; j++) {
        left.v[j] = narrow<T>(a[j] * c.v[j] - b[j] * s.v[j]);
        right.v[j] = narrow<T>(b[j] * c.v[j] + a[j] * s.v[j]);
    }
    store_pair(head + i, left);
    store_pair(head + i + half, right);
}

// One warp per head; a block's warps take neighbouring heads of one row. Halves of a head are even.
// - qkv: [rows, (heads + 2 kv_heads) head_dim], the queries are changed where they lie
// - keys, values: the layer's cache, [slots, kv_heads head_dim]
// - cos, sin: [positions, head_dim / 2]
// - bias [(heads + 2 kv_heads) head_dim], q_norm and k_norm [head_dim]: null where the model has none
template <typename T>
__device__ void rope_cache(T *qkv, T *keys, T *values, const float *cos, const float *sin, const uint32_t *positions,
                           const uint32_t *slots, const T *bias, const T *q_norm, const T *k_norm, int heads,
                           int kv_heads, int head_dim, float eps) {
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads + 2 * kv_heads) return; // The whole warp: no lane is missing below.
    const int half = head_dim / 2, width = (heads + 2 * kv_heads) * head_dim;
    T *from = qkv + (size_t)row * width + head * head_dim;
    const T *add = bias ? bias + head * head_dim : nullptr;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    T *to = from;
    if (!is_query) {
        T *cache = is_value ? values : keys;
        const int kv_head = (head - heads) % kv_heads;
        to = cache + (size_t)slots[row] * kv_heads * head_dim + kv_head * head_dim;
    }
    if (is_value) {
        constexpr int SIZE = Pack<T>::SIZE;
        for (int i = lane * SIZE; i < head_dim; i += 32 * SIZE) {
            Pack<T> value = load_pack(from + i);
            for (int j = 0; add && j < SIZE; j++) value.v[j] = narrow<T>(widen(value.v[j]) + widen(add[i + j]));
            store_pack(to + i, value);
        }
        return;
    }
    const T *norm = is_query ? q_norm : k_norm;
    float inverse = 1;
    if (norm) {
        float squares = 0;
        for (int i = lane; i < head_dim; i += 32) {
            const float x = widen(from[i]) + (add ? widen(add[i]) : 0.0f);
            squares += x * x;
        }
        inverse = 1.0f / sqrtf(sum_lanes(squares, 32) / head_dim + eps);
    }
    const size_t angle = (size_t)positions[row] * half;
    const HeadNorm<T> normed = {norm, inverse};
    for (int i = 2 * lane; i < half; i += 64) {
        const Pair<T> left = load_pair(from + i), right = load_pair(from + i + half);
        float a[2], b[2];
        for (int j = 0; j < 2; j++) {
            a[j] = widen(left.v[j]);
            b[j] = widen(right.v[j]);
            if (add) {
                a[j] = widen(narrow<T>(a[j] + widen(add[i + j])));
                b[j] = widen(narrow<T>(b[j] + widen(add[i + half + j])));
            }
            a[j] = normed.of(a[j], i + j);
            b[j] = normed.of(b[j], i + half + j);
        }
        store_turned(to, i, half, a, b, cos + angle, sin + angle);
    }
}

#define ROPE_KERNELS(suffix, T)                                                                                        \
    extern "C" __global__ void rope_cache_##suffix(T *qkv, T *keys, T *values, const float *cos, const float *sin,     \
                                                   const uint32_t *positions, const uint32_t *slots, const T *bias,    \
                                                   const T *q_norm, const T *k_norm, int heads, int kv_heads,          \
                                                   int head_dim, float eps) {                                          \
        after_earlier();                                                                                               \
        rope_cache<T>(qkv, keys, values, cos, sin, positions, slots, bias, q_norm, k_norm, heads, kv_heads, head_dim,  \
                      eps);                                                                                            \
    }                                                                                                                  \
    REGISTER_KERNEL(rope_cache_##suffix)

FOR_EACH_DTYPE(ROPE_KERNELS)
