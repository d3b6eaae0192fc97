// As much of CUDA C++ as the kernels use, for a C++ compiler: a thread of a block is a fiber, which gives way at every
// barrier and shuffle. Checks what a GPU would not say: threads that miss a barrier others wait at.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};

namespace emulator {
extern Index thread, block, block_size, grid_size;
extern unsigned char *dynamic_shared;

enum class Wait { Ready, Warp, Block, Done };
void wait(Wait for_whom);
// The same, and the copies that this thread waited for are there for all.
void barrier(Wait for_whom);
// The running thread has waited for earlier kernels: each must.
void after_earlier();
// Where a lane leaves what others of its warp read.
using Slot = uint64_t[4];
// Those of the running thread's warp.
Slot *warp_slots();

// A lane's value of another lane of its warp.
template <typename V> V shuffle(V x, unsigned from) {
    static_assert(sizeof(V) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
    std::memcpy(warp_slots()[thread.x % 32], &x, sizeof x);
    wait(Wait::Warp);
    V got;
    std::memcpy(&got, warp_slots()[from], sizeof got);
    wait(Wait::Warp);
    return got;
}

using Invoke = void (*)(void **arguments);
struct Registered {
    // `sizes`: the bytes of each argument, and a 0 behind them.
    Registered(const char *name, Invoke invoke, const size_t *sizes);
};

template <auto kernel> struct Invoker;
template <typename... A, void (*kernel)(A...)> struct Invoker<kernel> {
    template <size_t... I> static void call(void **arguments, std::index_sequence<I...>) {
        kernel(*static_cast<A *>(arguments[I])...);
    }
    static constexpr size_t sizes[] = {sizeof(A)..., 0};
    static void invoke(void **arguments) { call(arguments, std::index_sequence_for<A...>()); }
};
} // namespace emulator

#define REGISTER_KERNEL(name)                                                             \
    static emulator::Registered registered_##name(#name, emulator::Invoker<name>::invoke, \
                                                  emulator::Invoker<name>::sizes);
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(emulator::dynamic_shared)

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::barrier(emulator::Wait::Block); }
inline void __syncwarp() { emulator::barrier(emulator::Wait::Warp); }
template <typename V> V __shfl_xor_sync(unsigned, V x, int mask) {
    return emulator::shuffle(x, emulator::thread.x % 32 ^ (unsigned)mask);
}
template <typename V> V __shfl_up_sync(unsigned, V x, unsigned by) {
    const unsigned lane = emulator::thread.x % 32;
    return emulator::shuffle(x, lane >= by ? lane - by : lane);
}
inline void atomicMax(int *at, int x) { *at = max(*at, x); }

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
// To the nearest, of two equally near the even.
inline __nv_bfloat16 __float2bfloat16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (std::isnan(x)) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float sign = x.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
    return sign * std::ldexp((float)(1024 + fraction), exponent - 25);
}
inline __half __float2half(float x) {
    const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (size == 0.0f) return {sign};
    if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent); // size = f 2^exponent, f in [1/2, 1)
    const int unit = max(exponent - 11, -24);
    const uint32_t steps = (uint32_t)std::nearbyint(std::ldexp(size, -unit)); // Rounds to the even.
    if (unit == -24) return {(uint16_t)(sign | steps)}; // Subnormal, or the carry into the smallest normal.
    return {(uint16_t)(sign | (((uint32_t)(unit + 25) << 10) + (steps - 1024)))};
}

#include "tensor_cores.h"
