// From a row of queries, keys and values as the product gives them to what attention reads: biases added, heads
// normalised, positions turned in, keys and values written into the cache. One pass over the row.
#pragma once
#include "common.cuh"

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
    for (int i = 2 * lane; i < half; i += 64) {
        Pair<T> left = load_pair(from + i), right = load_pair(from + i + half);
        const Pair<float> c = load_pair(cos + angle + i), s = load_pair(sin + angle + i);
        for (int j = 0; j < 2; j++) {
            float a = widen(left.v[j]), b = widen(right.v[j]);
            if (add) {
                a = widen(narrow<T>(a + widen(add[i + j])));
                b = widen(narrow<T>(b + widen(add[i + half + j])));
            }
            if (norm) {
                a = widen(narrow<T>(a * inverse)) * widen(norm[i + j]);
                b = widen(narrow<T>(b * inverse)) * widen(norm[i + half + j]);
            }
            left.v[j] = narrow<T>(a * c.v[j] - b * s.v[j]);
            right.v[j] = narrow<T>(b * c.v[j] + a * s.v[j]);
        }
        store_pair(to + i, left);
        store_pair(to + i + half, right);
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
