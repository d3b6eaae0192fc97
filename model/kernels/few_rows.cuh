// Products of few rows with a weight: decoding, where the time is that of reading the weight. Each warp keeps several KiB
// of it on their way through shared memory to its tensor cores, and begins before the kernel ahead has ended. bf16 and f16.
#pragma once
#include "mma.cuh"
#include "swiglu.cuh"

#define FEW_ROWS_WARPS 8
#define FEW_ROWS_THREADS (32 * FEW_ROWS_WARPS)
// Inputs that a warp takes at once, 64 bytes of each row.
#define FEW_ROWS_STEP 32

// What becomes of the sums; `Epilogue` in few_rows.rs.
#define FEW_ROWS_ADD 1   // Added to what `out` holds.
#define FEW_ROWS_F32 2   // `out` is f32.
#define FEW_ROWS_GATED 4 // w is gate and up, one behind the other: out = silu(gate) * up.

// A block's tiles of OUTPUTS outputs, its warps' steps along the inputs, and where both lie in shared memory. The warps
// share out a tile's steps, each the eighth of its turn; ROWS: a multiple of 8.
template <typename T, int ROWS, int OUTPUTS> struct FewRows {
    // Steps of a warp on their way and in use, 8 KiB of the weight.
    static constexpr int DEPTH = 128 / OUTPUTS;
    static constexpr int CHUNKS = FEW_ROWS_STEP / 8;
    using Step = Tile<T, FEW_ROWS_STEP>;

    const T *x, *w;
    int rows, outputs, inputs;
    bool gated, x_kept;
    T *weights, *xs;

    __device__ int steps() const { return (inputs + FEW_ROWS_STEP - 1) / FEW_ROWS_STEP; }
    // Outputs of a tile as they are written.
    __device__ int width() const { return gated ? OUTPUTS / 2 : OUTPUTS; }
    __device__ int tiles() const { return (outputs + width() - 1) / width(); }

    // The weight's row that is a tile's row `i`; none where it is behind the last. A gated tile's rows are eight of gate
    // and eight of up in turn.
    __device__ int weight_row(int tile, int i, bool *there) const {
        const int output = tile * width() + (gated ? i / 16 * 8 + i % 8 : i);
        *there = output < outputs;
        return output + (gated && i % 16 >= 8 ? outputs : 0);
    }

    __device__ Step weight_tile(int warp, int slot) const {
        return {weights + (warp * DEPTH + slot) * OUTPUTS * FEW_ROWS_STEP};
    }
    // Kept: each step's own place; else it goes with the weight's.
    __device__ Step x_tile(int warp, int slot, int step) const {
        return {xs + (x_kept ? step : warp * DEPTH + slot) * ROWS * FEW_ROWS_STEP};
    }

    // Begins to copy a step of the weight, by a warp.
    __device__ void copy_weight(int tile, int step, int warp, int slot) const {
        const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, input = step * FEW_ROWS_STEP + chunk * 8;
        const Step to = weight_tile(warp, slot);
#pragma unroll
        for (int i = lane / CHUNKS; i < OUTPUTS; i += 32 / CHUNKS) {
            bool there;
            const int row = weight_row(tile, i, &there);
            there = there && input < inputs;
            copy_async(to.chunk(i, chunk), there ? w + (size_t)row * inputs + input : w, there);
        }
    }

    // Begins to copy the same inputs of x, by a warp.
    __device__ void copy_x(int step, int warp, int slot) const {
        const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, input = step * FEW_ROWS_STEP + chunk * 8;
        const Step to = x_tile(warp, slot, step);
#pragma unroll
        for (int i = lane / CHUNKS; i < ROWS; i += 32 / CHUNKS) {
            const bool there = i < rows && input < inputs;
            copy_async(to.chunk(i, chunk), there ? x + (size_t)i * inputs + input : x, there);
        }
    }
};

// A warp's place among its steps: which it copies next.
struct FewRowsCursor {
    int tile, step;

    __device__ void advance(int warp, int steps) {
        step += FEW_ROWS_WARPS;
        if (step >= steps) {
            step = warp;
            tile += gridDim.x;
        }
    }
};

// sums += a step's weight times its x, by a warp.
template <typename T, int ROWS, int OUTPUTS>
__device__ inline void multiply_step(float (&sums)[OUTPUTS / 16][ROWS / 8][4], Tile<T, FEW_ROWS_STEP> w,
                                     Tile<T, FEW_ROWS_STEP> x) {
    const int lane = threadIdx.x % 32;
    uint32_t b[ROWS / 8][4];
    // Eight rows, their four chunks: the operands of both products below.
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) load_matrices(b[n], x.chunk(n * 8 + lane % 8, lane / 8));
#pragma unroll
    for (int m = 0; m < OUTPUTS / 16; m++) {
#pragma unroll
        for (int k = 0; k < FEW_ROWS_STEP / 16; k++) {
            uint32_t a[4];
            w.load_a(a, m * 16, k * 16);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) mma_16x8x16<T>(sums[m][n], a, b[n][2 * k], b[n][2 * k + 1]);
        }
    }
}

// Leaves a warp's sums for the block, `[ROWS][OUTPUTS]`.
template <int ROWS, int OUTPUTS>
__device__ inline void leave_sums(float *to, const float (&sums)[OUTPUTS / 16][ROWS / 8][4]) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < OUTPUTS / 16; m++)
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                to[(n * 8 + 2 * pair + c % 2) * OUTPUTS + m * 16 + group + c / 2 * 8] = sums[m][n][c];
}

// out[r] = x[r] wᵀ for up to ROWS rows; block b takes tiles b, b + gridDim.x, ...
// - out: [rows, outputs]; x: [rows, inputs]; w: [outputs, inputs], [2 outputs, inputs] where gated
// - x_kept: x stays in shared memory from the first tile on
// Shared memory (`few_rows_shared` in few_rows.rs): the warps' steps of the weight; x, all of it or the warps' steps of it;
// two times the warps' sums, [FEW_ROWS_WARPS][ROWS][OUTPUTS] f32, in turn, so that one barrier per tile does.
// How a row's sum is ordered depends on the inputs alone, not on ROWS, OUTPUTS or the other rows.
template <typename T, int ROWS, int OUTPUTS>
__device__ void few_rows(void *out, const T *x, const T *w, int rows, int outputs, int inputs, int epilogue, int x_kept) {
    using Product = FewRows<T, ROWS, OUTPUTS>;
    constexpr int DEPTH = Product::DEPTH, SUMS = FEW_ROWS_WARPS * ROWS * OUTPUTS;
    DYNAMIC_SHARED(T, shared);
    T *xs = shared + FEW_ROWS_WARPS * DEPTH * OUTPUTS * FEW_ROWS_STEP;
    const bool gated = epilogue & FEW_ROWS_GATED;
    const Product p = {x, w, rows, outputs, inputs, gated, x_kept != 0, shared, xs};
    const int warp = threadIdx.x / 32, steps = p.steps(), tiles = p.tiles();
    float *parts = reinterpret_cast<float *>(xs + (x_kept ? steps : FEW_ROWS_WARPS * DEPTH) * ROWS * FEW_ROWS_STEP);

    // A warp that has no step at all copies none.
    FewRowsCursor next = {warp < steps ? (int)blockIdx.x : tiles, warp};
    // The weight is nobody's output: its first steps may come before the kernel ahead has ended. x may not.
    FewRowsCursor first = next;
#pragma unroll
    for (int slot = 0; slot < DEPTH - 1; slot++, first.advance(warp, steps))
        if (first.tile < tiles) p.copy_weight(first.tile, first.step, warp, slot);
    after_earlier();
#pragma unroll
    for (int slot = 0; slot < DEPTH - 1; slot++, next.advance(warp, steps)) {
        if (next.tile < tiles && (!p.x_kept || next.tile == (int)blockIdx.x)) p.copy_x(next.step, warp, slot);
        commit_copies();
    }

    int slot = 0;
    for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= 1) {
        float sums[OUTPUTS / 16][ROWS / 8][4] = {};
        for (int step = warp; step < steps; step += FEW_ROWS_WARPS, slot = (slot + 1) % DEPTH) {
            wait_for_copies<DEPTH - 2>();
            __syncwarp(); // Every lane's copies of this step are there, and the slot that is filled next has been read.
            const int filled = (slot + DEPTH - 1) % DEPTH;
            if (next.tile < tiles) {
                p.copy_weight(next.tile, next.step, warp, filled);
                if (!p.x_kept || next.tile == (int)blockIdx.x) p.copy_x(next.step, warp, filled);
                next.advance(warp, steps);
            }
            commit_copies(); // Empty behind the last, for the count of groups.
            multiply_step<T, ROWS, OUTPUTS>(sums, p.weight_tile(warp, slot), p.x_tile(warp, slot, step));
        }
        float *own = parts + turn * SUMS;
        leave_sums<ROWS, OUTPUTS>(own + warp * ROWS * OUTPUTS, sums);
        __syncthreads();
        const auto sum = [&](int row, int output) {
            float all = 0;
#pragma unroll
            for (int of = 0; of < FEW_ROWS_WARPS; of++) all += own[(of * ROWS + row) * OUTPUTS + output];
            return all;
        };
        for (int i = threadIdx.x; i < rows * OUTPUTS; i += FEW_ROWS_THREADS) {
            const int row = i / OUTPUTS, column = i % OUTPUTS, output = tile * p.width() + column;
            if (column >= p.width() || output >= outputs) continue;
            const size_t at = (size_t)row * outputs + output;
            if (gated) {
                const int gate = column / 8 * 16 + column % 8;
                static_cast<T *>(out)[at] = swiglu_of(narrow<T>(sum(row, gate)), narrow<T>(sum(row, gate + 8)));
            } else if (epilogue & FEW_ROWS_F32) {
                static_cast<float *>(out)[at] = sum(row, column);
            } else {
                T *to = static_cast<T *>(out) + at;
                const float before = epilogue & FEW_ROWS_ADD ? widen(*to) : 0.0f;
                *to = narrow<T>(before + sum(row, column));
            }
        }
    }
}

#define FEW_ROWS_KERNEL(suffix, T, ROWS, OUTPUTS)                                                                      \
    extern "C" __global__ void __launch_bounds__(FEW_ROWS_THREADS) few_rows_##suffix##_r##ROWS##_o##OUTPUTS(           \
        void *out, const T *x, const T *w, int rows, int outputs, int inputs, int epilogue, int x_kept) {              \
        few_rows<T, ROWS, OUTPUTS>(out, x, w, rows, outputs, inputs, epilogue, x_kept);                                \
    }                                                                                                                  \
    REGISTER_KERNEL(few_rows_##suffix##_r##ROWS##_o##OUTPUTS)

#define FEW_ROWS_KERNELS(suffix, T)       \
    FEW_ROWS_KERNEL(suffix, T, 8, 16)     \
    FEW_ROWS_KERNEL(suffix, T, 8, 32)     \
    FEW_ROWS_KERNEL(suffix, T, 16, 16)    \
    FEW_ROWS_KERNEL(suffix, T, 16, 32)    \
    FEW_ROWS_KERNEL(suffix, T, 32, 16)    \
    FEW_ROWS_KERNEL(suffix, T, 32, 32)

FOR_EACH_HALF(FEW_ROWS_KERNELS)
