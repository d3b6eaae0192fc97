// Elements of tensors in memory, as candle's kernels and cuBLAS' products read and write them.
#pragma once
#include "cuda.h"

#include <limits>
#include <map>
#include <string>

namespace {
using Address = uint64_t;

enum Type { F32, F64, BF16, F16, U8, U32, I64 };

// As the names of candle's kernels spell them.
const std::map<std::string, Type> TYPES = {{"f32", F32}, {"f64", F64}, {"bf16", BF16}, {"f16", F16},
                                           {"u8", U8},   {"u32", U32}, {"i64", I64}};

size_t bytes_of(Type type) {
    switch (type) {
    case U8: return 1;
    case BF16: case F16: return 2;
    case F32: case U32: return 4;
    default: return 8;
    }
}

template <typename V> V *elements(Address at) { return reinterpret_cast<V *>(at); }

// A double holds every value but the largest of i64.
double load(Type type, Address at, size_t i) {
    switch (type) {
    case F32: return elements<float>(at)[i];
    case F64: return elements<double>(at)[i];
    case BF16: return __bfloat162float(elements<__nv_bfloat16>(at)[i]);
    case F16: return __half2float(elements<__half>(at)[i]);
    case U8: return elements<uint8_t>(at)[i];
    case U32: return elements<uint32_t>(at)[i];
    default: return (double)elements<int64_t>(at)[i];
    }
}

// Without its fraction, at the nearest end where the type does not reach, and 0 for what is no number.
template <typename V> V whole(double x) {
    if (std::isnan(x)) return 0;
    if (x <= (double)std::numeric_limits<V>::min()) return std::numeric_limits<V>::min();
    if (x >= (double)std::numeric_limits<V>::max()) return std::numeric_limits<V>::max();
    return (V)x;
}

void store(Type type, Address at, size_t i, double x) {
    switch (type) {
    case F32: elements<float>(at)[i] = (float)x; break;
    case F64: elements<double>(at)[i] = x; break;
    case BF16: elements<__nv_bfloat16>(at)[i] = __float2bfloat16((float)x); break;
    case F16: elements<__half>(at)[i] = __float2half((float)x); break;
    case U8: elements<uint8_t>(at)[i] = whole<uint8_t>(x); break;
    case U32: elements<uint32_t>(at)[i] = whole<uint32_t>(x); break;
    default: elements<int64_t>(at)[i] = whole<int64_t>(x);
    }
}
} // namespace
