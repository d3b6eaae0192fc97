// Row by row work of a training pass: copies, biases, positions, and the gradients of norm, positions and activation.
#pragma once
#include "common.cuh"
#include "rope.cuh"

#define NO_ROW 0xffffffffu

// out[r] = base[r] + part[from[r]]: base null is 0, from null is r itself, and a from of NO_ROW adds nothing. out may
// be base. One block per row.
template <typename T>
__device__ void place_rows(T *out, const T *base, const T *part, const uint32_t *from, int width) {
    const size_t row = (size_t)blockIdx.x * width;
    const uint32_t source = from ? from[blockIdx.x] : blockIdx.x;
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += blockDim.x * Pack<T>::SIZE) {
        Pack<T> sum, more;
        for (int j = 0; j < Pack<T>::SIZE; j++) sum.v[j] = narrow<T>(0.0f);
        if (base) sum = load_pack(base + row + i);
        if (source != NO_ROW) {
            more = load_pack(part + (size_t)source * width + i);
            for (int j = 0; j < Pack<T>::SIZE; j++) sum.v[j] = narrow<T>(widen(sum.v[j]) + widen(more.v[j]));
        }
        store_pack(out + row + i, sum);
    }
}

// x[r] += bias; one block per row.
template <typename T> __device__ void add_bias(T *x, const T *bias, int width) {
    T *row = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = narrow<T>(widen(row[i]) + widen(bias[i]));
}

// out[r] = add[r] + the gradient of norm.cuh's input x[r], whose output has the gradient grad[r]: with u = x / rms,
// (g w - u mean(g w u)) / rms. out may be add or grad. One block per row.
template <typename T>
__device__ void rms_norm_grad(T *out, const T *add, const T *x, const T *w, const T *grad, int width, float eps) {
    const size_t row = (size_t)blockIdx.x * width;
    const int step = blockDim.x * Pack<T>::SIZE;
    float squares = 0, dot = 0;
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += step) {
        const Pack<T> a = load_pack(x + row + i), b = load_pack(w + i), g = load_pack(grad + row + i);
        for (int j = 0; j < Pack<T>::SIZE; j++) {
            squares += widen(a.v[j]) * widen(a.v[j]);
            dot += widen(g.v[j]) * widen(b.v[j]) * widen(a.v[j]);
        }
    }
    const float inverse = 1.0f / sqrtf(block_sum(squares) / width + eps);
    const float mean = block_sum(dot) * inverse / width;
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += step) {
        const Pack<T> a = load_pack(x + row + i), b = load_pack(w + i), g = load_pack(grad + row + i);
        Pack<T> sum = load_pack(add + row + i);
        for (int j = 0; j < Pack<T>::SIZE; j++) {
            const float own = widen(g.v[j]) * widen(b.v[j]) - widen(a.v[j]) * inverse * mean;
            sum.v[j] = narrow<T>(widen(sum.v[j]) + own * inverse);
        }
        store_pack(out + row + i, sum);
    }
}

// Queries or keys from raw to what attention reads: heads normalised where the model does that, positions turned in.
// One warp per head, a block's warps take neighbouring heads of one row. Halves of a head are even.
// - out, raw: rows of heads, out_stride and raw_stride apart; norm: [head_dim] or null
// - cos, sin: [positions, head_dim / 2]
template <typename T>
__device__ void turn_heads(T *out, const T *raw, const float *cos, const float *sin, const uint32_t *positions,
                           const T *norm, int heads, int head_dim, int out_stride, int raw_stride, float eps) {
    const int row = blockIdx.x, lane = threadIdx.x % 32, half = head_dim / 2;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads) return; // The whole warp.
    const T *from = raw + (size_t)row * raw_stride + head * head_dim;
    T *to = out + (size_t)row * out_stride + head * head_dim;
    float inverse = 1;
    if (norm) {
        float squares = 0;
        for (int i = lane; i < head_dim; i += 32) squares += widen(from[i]) * widen(from[i]);
        inverse = 1.0f / sqrtf(sum_lanes(squares, 32) / head_dim + eps);
    }
    const size_t angle = (size_t)positions[row] * half;
    const HeadNorm<T> normed = {norm, inverse};
    for (int i = 2 * lane; i < half; i += 64) {
        const Pair<T> left = load_pair(from + i), right = load_pair(from + i + half);
        float a[2], b[2];
        for (int j = 0; j < 2; j++) {
            a[j] = normed.of(widen(left.v[j]), i + j);
            b[j] = normed.of(widen(right.v[j]), i + half + j);
        }
        store_turned(to, i, half, a, b, cos + angle, sin + angle);
    }
}

// The gradient of turn_heads' output, where it lies, to that of its input.
template <typename T>
__device__ void turn_heads_back(T *grad, const T *raw, const float *cos, const float *sin, const uint32_t *positions,
                                const T *norm, int heads, int head_dim, int grad_stride, int raw_stride, float eps) {
    const int row = blockIdx.x, lane = threadIdx.x % 32, half = head_dim / 2;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads) return; // The whole warp.
    const T *from = raw + (size_t)row * raw_stride + head * head_dim;
    T *to = grad + (size_t)row * grad_stride + head * head_dim;
    const size_t angle = (size_t)positions[row] * half;
    float inverse = 1, mean = 0;
    if (norm) {
        float squares = 0, dot = 0;
        for (int i = lane; i < half; i += 32) {
            const float c = cos[angle + i], s = sin[angle + i], ga = widen(to[i]), gb = widen(to[i + half]);
            const float a = widen(from[i]), b = widen(from[i + half]);
            squares += a * a + b * b;
            dot += (ga * c + gb * s) * widen(norm[i]) * a + (gb * c - ga * s) * widen(norm[i + half]) * b;
        }
        inverse = 1.0f / sqrtf(sum_lanes(squares, 32) / head_dim + eps);
        mean = sum_lanes(dot, 32) * inverse / head_dim;
    }
    for (int i = 2 * lane; i < half; i += 64) {
        Pair<T> left = load_pair(to + i), right = load_pair(to + i + half);
        const Pair<float> c = load_pair(cos + angle + i), s = load_pair(sin + angle + i);
        for (int j = 0; j < 2; j++) {
            const float ga = widen(left.v[j]), gb = widen(right.v[j]);
            float a = ga * c.v[j] + gb * s.v[j], b = gb * c.v[j] - ga * s.v[j];
            if (norm) {
                a = (a * widen(norm[i + j]) - widen(from[i + j]) * inverse * mean) * inverse;
                b = (b * widen(norm[i + half + j]) - widen(from[i + half + j]) * inverse * mean) * inverse;
            }
            left.v[j] = narrow<T>(a);
            right.v[j] = narrow<T>(b);
        }
        store_pair(to + i, left);
        store_pair(to + i + half, right);
    }
}

// Gate and up, [rows, 2 width], become their own gradients; grad: of silu(gate) up. Grid (rows, parts of a row).
template <typename T> __device__ void swiglu_grad(T *gate_up, const T *grad, int width) {
    T *gate = gate_up + (size_t)blockIdx.x * 2 * width, *up = gate + width;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<T>::SIZE;
    if (i >= width) return;
    Pack<T> g = load_pack(gate + i), u = load_pack(up + i);
    const Pack<T> d = load_pack(grad + (size_t)blockIdx.x * width + i);
    for (int j = 0; j < Pack<T>::SIZE; j++) {
        const float x = widen(g.v[j]), y = widen(u.v[j]), above = widen(d.v[j]);
        const float sigmoid = 1.0f / (1.0f + expf(-x));
        g.v[j] = narrow<T>(above * y * sigmoid * (1.0f + x * (1.0f - sigmoid)));
        u.v[j] = narrow<T>(above * x * sigmoid);
    }
    store_pack(gate + i, g);
    store_pack(up + i, u);
}

#define TRAINING_ROW_KERNELS(suffix, T)                                                                                \
    extern "C" __global__ void place_rows_##suffix(T *out, const T *base, const T *part, const uint32_t *from,         \
                                                   int width) {                                                        \
        after_earlier();                                                                                               \
        place_rows<T>(out, base, part, from, width);                                                                   \
    }                                                                                                                  \
    REGISTER_KERNEL(place_rows_##suffix)                                                                               \
    extern "C" __global__ void add_bias_##suffix(T *x, const T *bias, int width) {                                     \
        after_earlier();                                                                                               \
        add_bias<T>(x, bias, width);                                                                                   \
    }                                                                                                                  \
    REGISTER_KERNEL(add_bias_##suffix)                                                                                 \
    extern "C" __global__ void rms_norm_grad_##suffix(T *out, const T *add, const T *x, const T *w, const T *grad,     \
                                                      int width, float eps) {                                          \
        after_earlier();                                                                                               \
        rms_norm_grad<T>(out, add, x, w, grad, width, eps);                                                            \
    }                                                                                                                  \
    REGISTER_KERNEL(rms_norm_grad_##suffix)                                                                            \
    extern "C" __global__ void turn_heads_##suffix(T *out, const T *raw, const float *cos, const float *sin,           \
                                                   const uint32_t *positions, const T *norm, int heads, int head_dim,  \
                                                   int out_stride, int raw_stride, float eps) {                        \
        after_earlier();                                                                                               \
        turn_heads<T>(out, raw, cos, sin, positions, norm, heads, head_dim, out_stride, raw_stride, eps);              \
    }                                                                                                                  \
    REGISTER_KERNEL(turn_heads_##suffix)                                                                               \
    extern "C" __global__ void turn_heads_back_##suffix(                                                               \
        T *grad, const T *raw, const float *cos, const float *sin, const uint32_t *positions, const T *norm,           \
        int heads, int head_dim, int grad_stride, int raw_stride, float eps) {                                         \
        after_earlier();                                                                                               \
        turn_heads_back<T>(grad, raw, cos, sin, positions, norm, heads, head_dim, grad_stride, raw_stride, eps);       \
    }                                                                                                                  \
    REGISTER_KERNEL(turn_heads_back_##suffix)                                                                          \
    extern "C" __global__ void swiglu_grad_##suffix(T *gate_up, const T *grad, int width) {                            \
        after_earlier();                                                                                               \
        swiglu_grad<T>(gate_up, grad, width);                                                                          \
    }                                                                                                                  \
    REGISTER_KERNEL(swiglu_grad_##suffix)

FOR_EACH_DTYPE(TRAINING_ROW_KERNELS)
