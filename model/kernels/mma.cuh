// Tensor cores: products of small matrices by a warp, the loads that feed them, and copies into shared memory that run
// beside them. T is __nv_bfloat16 or __half; sums are f32. Every function with "warp" in its comment is called by all 32
// lanes together.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), for lane = 4 group + pair; a register holds
// two elements, the lower one in its lower half:
//   A [16][16]: register 0: A[group][2 pair, +1], 1: A[group + 8][the same], 2: A[group][2 pair + 8, +9], 3: A[group + 8][those]
//   B [16][8]:  register 0: B[2 pair, +1][group], 1: B[2 pair + 8, +9][group]
//   C [16][8]:  0, 1: C[group][2 pair, +1]; 2, 3: C[group + 8][the same]
// So two neighbouring C become one A: {pack(c[0], c[1]), pack(c[2], c[3]), pack(d[0], d[1]), pack(d[2], d[3])}.
#pragma once
#include "common.cuh"

#ifdef __CUDACC__
#include <type_traits>

// d += a b, by a warp.
template <typename T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Four 8x8 matrices from shared memory, by a warp: lane i names row i % 8 of matrix i / 8, 16 bytes. Register m is the
// lane's pair of matrix m: [lane / 4][2 (lane % 4), +1].
__device__ inline void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed: register m is matrix m's [2 (lane % 4), +1][lane / 4].
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy 16 bytes into shared memory; zeros where the source is not `there`, which is then not read.
__device__ inline void copy_async(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// Closes a group: this thread's copies since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most PENDING of this thread's newest groups are on their way. Other threads see them behind a barrier.
template <int PENDING> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Two sums as a register of a fragment.
template <typename T> __device__ inline uint32_t pack_pair(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
}
#endif

// Where a row's 16-byte chunk lies in a tile of rows of CHUNKS such, in chunks: shifted so that the same chunk of eight
// neighbouring rows (from a multiple of eight on) lies in eight different groups of banks.
template <int CHUNKS> __device__ inline int swizzled(int row, int chunk) {
    // The largest power of two that divides CHUNKS, at most 8.
    constexpr int SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    return row * CHUNKS + (chunk ^ (row / (8 / SPAN) % SPAN));
}

// A tile in shared memory: rows of WIDTH elements, a multiple of 16, their chunks swizzled; begins at 128 bytes.
template <typename T, int WIDTH> struct Tile {
    static constexpr int CHUNKS = WIDTH / 8;
    T *at;

    __device__ T *chunk(int row, int chunk) const { return at + swizzled<CHUNKS>(row, chunk) * 8; }

    // A of [row.., 16][column.., 16], by a warp.
    __device__ void load_a(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        load_matrices(a, chunk(row + lane % 16, column / 8 + lane / 16));
    }
    // The B of two products, by a warp: B[k][n] = tile[row + n][column + k] for n in 0..8 (registers 0, 1) and 8..16
    // (2, 3). For x yᵀ, y in rows.
    __device__ void load_b_of_rows(uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        load_matrices(b, chunk(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
    }
    // The B of two products, by a warp: B[k][n] = tile[row + k][column + n] for n in 0..8 (registers 0, 1) and 8..16
    // (2, 3). For x y, y in rows.
    __device__ void load_b_of_columns(uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        load_matrices_transposed(b, chunk(row + lane % 16, column / 8 + lane / 16));
    }
    // Aᵀ: A[m][k] = tile[row + k][column + m], by a warp. For xᵀ y, x in rows.
    __device__ void load_a_of_columns(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        load_matrices_transposed(a, chunk(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
    }
};
