// Drawing the next tokens on the device, as sampling.rs draws them: the logits are never copied back.
#pragma once
#include "common.cuh"

// What a row is drawn with, DRAW_WORDS words: temperature, top-p (f32), top-k, 1 where a token is wanted, and the random
// number in [0, 1) as the two halves of an f64, the lower first.
#define DRAW_WORDS 6
// What is written where no logit is finite.
#define NO_TOKEN 0xffffffffu

// A row's candidates: a token's key is the bits of its weight, which order as the weights do.
struct Kept {
    uint32_t threshold; // Keys above it are kept,
    int ties;           // and of those equal to it the first so many.
};

// A row's logits and how they become weights.
struct Weights {
    const float *logits;
    int vocab;
    float largest, temperature;

    // Calls f(token, weight) on every `step`th token from begin to end that has a weight at all.
    template <typename F> __device__ void each(int begin, int end, int step, F f) const {
        for (int i = begin; i < end; i += step) {
            const float logit = logits[i];
            if (!isfinite(logit)) continue;
            const float weight = expf((logit - largest) / temperature);
            if (weight > 0.0f) f(i, weight);
        }
    }

    // On this thread's tokens where any will do: the threads read side by side.
    template <typename F> __device__ void any(F f) const { each(threadIdx.x, vocab, blockDim.x, f); }

    // On this thread's tokens, neighbours in the vocabulary.
    template <typename F> __device__ void own(F f) const {
        const int count = (vocab + blockDim.x - 1) / blockDim.x, begin = min(vocab, (int)threadIdx.x * count);
        each(begin, min(vocab, begin + count), 1, f);
    }
};

// The largest finite logit and the first token that has it.
__device__ inline uint32_t argmax(const float *logits, int vocab, float *largest) {
    __shared__ float values[32];
    __shared__ uint32_t tokens[32];
    float best = -INFINITY;
    uint32_t token = NO_TOKEN;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float logit = logits[i];
        if (isfinite(logit) && (token == NO_TOKEN || logit > best)) {
            best = logit;
            token = i;
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, best, offset);
        const uint32_t at = __shfl_xor_sync(FULL_WARP, token, offset);
        if (at != NO_TOKEN && (token == NO_TOKEN || other > best || (other == best && at < token))) {
            best = other;
            token = at;
        }
    }
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = best;
        tokens[threadIdx.x / 32] = token;
    }
    __syncthreads();
    best = values[0];
    token = tokens[0];
    for (int w = 1; w < (int)(blockDim.x / 32); w++) {
        if (tokens[w] != NO_TOKEN &&
            (token == NO_TOKEN || values[w] > best || (values[w] == best && tokens[w] < token))) {
            best = values[w];
            token = tokens[w];
        }
    }
    *largest = best;
    return token;
}

// One block per row. drawn[r]: its token; rows of which none is wanted keep what they have.
__device__ void sample_rows(uint32_t *drawn, const float *all_logits, const uint32_t *draws, int vocab) {
    const float *logits = all_logits + (size_t)blockIdx.x * vocab;
    const uint32_t *draw = draws + blockIdx.x * DRAW_WORDS;
    if (draw[3] == 0) return;
    float largest;
    const uint32_t best = argmax(logits, vocab, &largest);
    const float temperature = __uint_as_float(draw[0]), top_p = __uint_as_float(draw[1]);
    if (best == NO_TOKEN || !(temperature > 0.0f)) {
        if (threadIdx.x == 0) drawn[blockIdx.x] = best;
        return;
    }
    const Weights weights = {logits, vocab, largest, temperature};
    // Everything that has a weight: every key is above 0.
    Kept kept = {0, 0};

    const int top_k = (int)min(draw[2], (uint32_t)vocab);
    const auto count_from = [&](uint32_t key) {
        int count = 0;
        weights.any([&](int, float w) { count += __float_as_uint(w) >= key; });
        return block_sum(count);
    };
    if (top_k > 0 && count_from(0) > top_k) {
        // The largest key that leaves at least top_k, bit by bit; a weight is at most 1, so bit 31 is never set.
        uint32_t key = 0;
        for (int bit = 30; bit >= 0; bit--)
            if (count_from(key | 1u << bit) >= top_k) key |= 1u << bit;
        kept.threshold = key;
        kept.ties = top_k - count_from(key + 1);
    }
    const auto sum_from = [&](uint32_t key) {
        double sum = 0;
        weights.any([&](int, float w) { sum += __float_as_uint(w) >= key ? (double)w : 0.0; });
        return block_sum(sum);
    };
    const auto tied_weight = [&] { return kept.ties * (double)__uint_as_float(kept.threshold); };
    if (top_p < 1.0f) {
        const double total = sum_from(kept.threshold + 1) + tied_weight();
        const double enough = total * (double)fmaxf(top_p, 0.0f);
        uint32_t key = 0;
        for (int bit = 30; bit >= 0; bit--) {
            const uint32_t candidate = key | 1u << bit;
            const double sum = sum_from(candidate);
            // Something is kept even where nothing is enough.
            if (candidate <= kept.threshold || (sum > 0.0 && sum >= enough)) key = candidate;
        }
        const double above = sum_from(key + 1), weight = (double)__uint_as_float(key);
        const int needed = max(1, (int)ceil((enough - above) / weight));
        kept.ties = key == kept.threshold ? min(kept.ties, needed) : needed;
        kept.threshold = key;
    }

    // The ties before this thread's own, then the weights before them, and the token at `target` of them all.
    int ties = 0, all_ties;
    weights.own([&](int, float w) { ties += __float_as_uint(w) == kept.threshold; });
    const int ties_before = block_prefix(ties, &all_ties);
    const auto own_kept = [&](auto f) {
        int rank = ties_before;
        weights.own([&](int token, float w) {
            const uint32_t key = __float_as_uint(w);
            if (key > kept.threshold || (key == kept.threshold && rank++ < kept.ties)) f(token, w);
        });
    };
    double sum = 0, total;
    int last = -1;
    own_kept([&](int token, float w) {
        sum += (double)w;
        last = token;
    });
    const double before = block_prefix(sum, &total);
    const double random = __longlong_as_double((long long)((uint64_t)draw[5] << 32 | draw[4]));
    const double target = random * total;
    const bool mine = last >= 0 && target >= before && target < before + sum;
    // Where sums are rounded the target may lie behind all: then the last that is kept.
    const int owners = block_sum(mine ? 1 : 0);
    __shared__ int last_kept;
    if (threadIdx.x == 0) last_kept = -1;
    __syncthreads();
    if (owners == 0) atomicMax(&last_kept, last);
    __syncthreads();
    if (mine) {
        double left = target - before;
        int token = last;
        bool found = false;
        own_kept([&](int at, float w) {
            left -= (double)w;
            if (!found && left < 0.0) {
                token = at;
                found = true;
            }
        });
        drawn[blockIdx.x] = token;
    } else if (owners == 0 && threadIdx.x == 0) {
        drawn[blockIdx.x] = last_kept;
    }
}

extern "C" __global__ void sample(uint32_t *drawn, const float *logits, const uint32_t *draws, int vocab) {
    after_earlier();
    sample_rows(drawn, logits, draws, vocab);
}
REGISTER_KERNEL(sample)
