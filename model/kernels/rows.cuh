// Copies of rows: embeddings of tokens, and the rows that are read behind the last layer.
#pragma once
#include "common.cuh"

// A token with this bit is not a token but the row of `drawn` that holds it: one that an earlier pass drew and the host
// has not seen yet.
#define FROM_DRAWN 0x80000000u

// out[r] = table[tokens[r]]; one block per row.
template <typename T>
__device__ void embed(T *out, const T *table, const uint32_t *tokens, const uint32_t *drawn, int width) {
    uint32_t token = tokens[blockIdx.x];
    if (token & FROM_DRAWN) token = drawn[token & ~FROM_DRAWN];
    const T *from = table + (size_t)token * width;
    T *to = out + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += blockDim.x * Pack<T>::SIZE)
        store_pack(to + i, load_pack(from + i));
}

// out[r] = x[rows[r]], of any width; one block per row.
template <typename T>
__device__ void gather_rows(T *out, const T *x, const uint32_t *rows, int width) {
    const T *from = x + (size_t)rows[blockIdx.x] * width;
    T *to = out + (size_t)blockIdx.x * width;
    // Rows of other widths do not begin at 16 bytes.
    if (width % Pack<T>::SIZE != 0) {
        for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
        return;
    }
    for (int i = threadIdx.x * Pack<T>::SIZE; i < width; i += blockDim.x * Pack<T>::SIZE)
        store_pack(to + i, load_pack(from + i));
}

#define ROW_KERNELS(suffix, T)                                                                                         \
    extern "C" __global__ void embed_##suffix(T *out, const T *table, const uint32_t *tokens, const uint32_t *drawn,   \
                                              int width) {                                                             \
        after_earlier();                                                                                               \
        embed<T>(out, table, tokens, drawn, width);                                                                    \
    }                                                                                                                  \
    REGISTER_KERNEL(embed_##suffix)                                                                                    \
    extern "C" __global__ void gather_rows_##suffix(T *out, const T *x, const uint32_t *rows, int width) {             \
        after_earlier();                                                                                               \
        gather_rows<T>(out, x, rows, width);                                                                           \
    }                                                                                                                  \
    REGISTER_KERNEL(gather_rows_##suffix)

FOR_EACH_DTYPE(ROW_KERNELS)
