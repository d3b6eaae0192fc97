// mma.cuh's instructions on the CPU: what a warp computes together goes through the warp's slots, as shuffles do.
#pragma once

namespace emulator {
// What is wrong with the running kernel: the launch ends with it.
void fault(const char *what);
// Counts a load of eight rows that share banks.
void count_bank_conflict();
// This thread's copies into shared memory: begun, closed as a group, waited for.
void begin_copy(void *to, const void *from, bool there);
void commit_copies();
void wait_for_copies(size_t pending);

inline float half_of(__nv_bfloat16, uint32_t bits) { return __bfloat162float({(uint16_t)bits}); }
inline float half_of(__half, uint32_t bits) { return __half2float({(uint16_t)bits}); }

// Leaves a lane's words for its warp; the slots are the warp's until the next wait.
template <size_t N> void leave(const uint32_t (&words)[N]) {
    static_assert(sizeof words <= sizeof(Slot), "a lane leaves at most a slot");
    std::memcpy(warp_slots()[thread.x % 32], words, sizeof words);
    wait(Wait::Warp);
}
inline uint32_t left(unsigned lane, unsigned word) {
    uint32_t bits;
    std::memcpy(&bits, reinterpret_cast<const unsigned char *>(warp_slots()[lane]) + 4 * word, sizeof bits);
    return bits;
}

inline void check_banks(const uintptr_t *rows) {
    for (int matrix = 0; matrix < 4; matrix++)
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < i; j++) {
                const uintptr_t a = rows[matrix * 8 + i], b = rows[matrix * 8 + j];
                if (a != b && a / 16 % 8 == b / 16 % 8) return count_bank_conflict();
            }
}

inline void load_matrices(uint32_t (&r)[4], const void *row, bool transposed) {
    const unsigned lane = thread.x % 32;
    const uintptr_t at = reinterpret_cast<uintptr_t>(row);
    if (at % 16 != 0) fault("a matrix row is not aligned to 16 bytes");
    std::memcpy(warp_slots()[lane], &at, sizeof at);
    wait(Wait::Warp);
    uintptr_t rows[32];
    for (int i = 0; i < 32; i++) std::memcpy(&rows[i], warp_slots()[i], sizeof rows[i]);
    if (lane == 0) check_banks(rows);
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int half = 0; half < 2; half++) {
            const int one = lane / 4, two = 2 * (lane % 4) + half;
            const uintptr_t from = rows[matrix * 8 + (transposed ? two : one)] + 2 * (transposed ? one : two);
            std::memcpy(&pair[half], reinterpret_cast<const void *>(from), sizeof pair[half]);
        }
        r[matrix] = (uint32_t)pair[1] << 16 | pair[0];
    }
    wait(Wait::Warp);
}
} // namespace emulator

template <typename T> void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const unsigned lane = emulator::thread.x % 32;
    emulator::leave({a[0], a[1], a[2], a[3], b0, b1});
    const auto half = [](unsigned of, unsigned word, unsigned k) {
        return emulator::half_of(T(), emulator::left(of, word) >> k % 2 * 16);
    };
    for (unsigned c = 0; c < 4; c++) {
        const unsigned row = lane / 4 + c / 2 * 8, column = 2 * (lane % 4) + c % 2;
        for (unsigned k = 0; k < 16; k++) {
            const float x = half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k);
            d[c] += x * half(column * 4 + k % 8 / 2, 4 + k / 8, k);
        }
    }
    emulator::wait(emulator::Wait::Warp);
}

inline void load_matrices(uint32_t (&r)[4], const void *row) { emulator::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) { emulator::load_matrices(r, row, true); }

inline void copy_async(void *to, const void *from, bool there) { emulator::begin_copy(to, from, there); }
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING> void wait_for_copies() { emulator::wait_for_copies(PENDING); }

template <typename T> uint32_t pack_pair(float low, float high);
template <> inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
    return (uint32_t)__float2bfloat16(high).bits << 16 | __float2bfloat16(low).bits;
}
template <> inline uint32_t pack_pair<__half>(float low, float high) {
    return (uint32_t)__float2half(high).bits << 16 | __float2half(low).bits;
}
