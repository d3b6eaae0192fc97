// What both attention kernels know of a layer and of the cache.
#pragma once
#include "common.cuh"

// Tokens in a block of the cache; kv_cache.rs has the same.
#define BLOCK_TOKENS 16

// The first position that a token at `position` sees; a window of 0 is none.
__device__ inline int first_visible(int position, int window) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

// Row of the cache that holds a sequence's position.
__device__ inline size_t cache_slot(const uint32_t *table, int position) {
    return (size_t)table[position / BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS;
}
