// Runs a launch block by block. Not thread safe: the caller launches one kernel at a time.
#include "../kernels.cu"

#include <array>
#include <csetjmp>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {
Index thread, block, block_size, grid_size;
unsigned char *dynamic_shared;

namespace {
constexpr size_t STACK = 64 << 10, SHARED = 256 << 10;

// A copy into shared memory, and the group that it belongs to.
struct Copy {
    void *to;
    const void *from;
    bool there;
    size_t group;
};

// A context begins a thread on its own stack; jumps then go back and forth, without the system call of swapcontext.
struct Fiber {
    ucontext_t context;
    std::jmp_buf at;
    bool begun, after_earlier;
    std::unique_ptr<unsigned char[]> stack;
    Wait waits;
    std::vector<Copy> copies;
    // Groups that were closed, and the first one that was not waited for.
    size_t groups, waited;
};

struct Kernel {
    Invoke invoke;
    std::vector<size_t> sizes;
};

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

std::vector<Fiber> fibers;
std::vector<std::array<uint64_t, 4>> slots;
std::jmp_buf scheduler;
size_t running;
Invoke current;
void **current_arguments;
size_t shared_bytes;
bool backwards;
// Aligned as tiles want it.
alignas(128) unsigned char shared_memory[SHARED];
// What the kernel ahead still writes.
struct {
    void *to;
    const void *from;
    size_t bytes;
} late;
char error[256];
const char *faulted;
size_t bank_conflicts;

void run_thread() {
    current(current_arguments);
    wait(Wait::Done);
}

void resume(size_t i) {
    running = i;
    thread = {(unsigned)i, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fibers[i].begun) _longjmp(fibers[i].at, 1);
    fibers[i].begun = true;
    setcontext(&fibers[i].context);
}

// Runs a warp until all its threads wait for the block or have ended; false where a part of it waits for the others in
// vain.
bool run_warp(size_t first) {
    constexpr size_t lanes = 32;
    for (;;) {
        size_t waiting = 0;
        for (size_t n = 0; n < lanes; n++) {
            Fiber &fiber = fibers[first + (backwards ? lanes - 1 - n : n)];
            if (fiber.waits == Wait::Ready) resume(&fiber - fibers.data());
            if (faulted) return true;
            waiting += fiber.waits == Wait::Warp;
        }
        if (waiting < lanes) return waiting == 0;
        for (size_t i = first; i < first + lanes; i++) fibers[i].waits = Wait::Ready;
    }
}

// Runs one block to its end; null, or what is wrong with the kernel.
const char *run_block(size_t count) {
    // What a kernel did not write is no number.
    std::memset(shared_memory, 0xff, shared_bytes);
    for (size_t i = 0; i < count; i++) {
        Fiber &fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new unsigned char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_thread, 0);
        fiber.waits = Wait::Ready;
        fiber.begun = fiber.after_earlier = false;
        fiber.copies.clear();
        fiber.groups = fiber.waited = 0;
    }
    for (;;) {
        // Each warp as far as it gets alone: what it reads of others' before a barrier is not there yet.
        const size_t warps = count / 32;
        for (size_t n = 0; n < warps; n++) {
            if (!run_warp(32 * (backwards ? warps - 1 - n : n))) return "some lanes of a warp miss a shuffle";
            if (faulted) return faulted;
        }
        size_t done = 0;
        for (size_t i = 0; i < count; i++) done += fibers[i].waits == Wait::Done;
        if (done == count) break;
        if (done > 0) return "some threads of a block miss a barrier";
        for (size_t i = 0; i < count; i++) fibers[i].waits = Wait::Ready;
    }
    for (size_t i = 0; i < count; i++)
        if (!fibers[i].after_earlier) return "some threads do not wait for earlier kernels";
    return nullptr;
}
} // namespace

void after_earlier() {
    fibers[running].after_earlier = true;
    if (late.bytes > 0) std::memcpy(late.to, late.from, late.bytes);
    late.bytes = 0;
}

void wait(Wait for_whom) {
    fibers[running].waits = for_whom;
    if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

Slot *warp_slots() { return reinterpret_cast<Slot *>(&slots[thread.x / 32 * 32]); }

void fault(const char *what) { faulted = what; }
void count_bank_conflict() { bank_conflicts++; }

namespace {
void copy(const Copy &c) {
    if (c.there) std::memcpy(c.to, c.from, 16);
    else std::memset(c.to, 0, 16);
}
} // namespace

// A copy arrives at once in one order of the threads, and as late as it may in the other, at the barrier behind the wait:
// one shows what is overwritten while it is read, the other what is read before it was waited for, or by others before a
// barrier.
void begin_copy(void *to, const void *from, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (there && reinterpret_cast<uintptr_t>(from) % 16 != 0))
        return fault("an asynchronous copy is not aligned to 16 bytes");
    const Copy begun = {to, from, there, fibers[running].groups};
    if (backwards) fibers[running].copies.push_back(begun);
    else copy(begun);
}
void commit_copies() { fibers[running].groups++; }
void wait_for_copies(size_t pending) {
    Fiber &fiber = fibers[running];
    fiber.waited = max(fiber.waited, fiber.groups - min(fiber.groups, pending));
}
void barrier(Wait for_whom) {
    std::vector<Copy> &copies = fibers[running].copies;
    size_t arrived = 0;
    while (arrived < copies.size() && copies[arrived].group < fibers[running].waited) copy(copies[arrived++]);
    copies.erase(copies.begin(), copies.begin() + arrived);
    wait(for_whom);
}

Registered::Registered(const char *name, Invoke invoke, const size_t *sizes) {
    Kernel &kernel = kernels()[name];
    kernel.invoke = invoke;
    for (; *sizes > 0; sizes++) kernel.sizes.push_back(*sizes);
}
} // namespace emulator

// Whether the threads of a block run in the order of their numbers or against it: what differs between the two lacks a
// barrier.
extern "C" void emulator_backwards(bool backwards) { emulator::backwards = backwards; }

// What the kernel ahead of the next launch writes: as late as it may, when that launch's first thread waits for it.
extern "C" void emulator_write_late(void *to, const void *from, size_t bytes) { emulator::late = {to, from, bytes}; }

// How many loads of matrices the last launch did from rows that share banks of the shared memory.
extern "C" size_t emulator_bank_conflicts() { return emulator::bank_conflicts; }

// Null, or one line that says what is wrong, valid until the next launch.
extern "C" const char *emulator_launch(const char *name, const unsigned *grid, const unsigned *block, unsigned shared,
                                       void **arguments, size_t argument_count) {
    using namespace emulator;
    const auto fail = [&](const char *why) {
        std::snprintf(error, sizeof error, "kernel %s: %s", name, why);
        return error;
    };
    const auto found = kernels().find(name);
    if (found == kernels().end()) return fail("there is none of that name");
    if (found->second.sizes.size() != argument_count) return fail("it takes another number of arguments");
    const size_t count = block[0];
    if (count == 0 || count > 1024 || count % 32 != 0 || block[1] != 1 || block[2] != 1)
        return fail("a block has 32 to 1024 threads, whole warps of them, in one dimension");
    if (shared > SHARED) return fail("too much shared memory");
    current = found->second.invoke;
    current_arguments = arguments;
    dynamic_shared = shared_memory;
    shared_bytes = shared;
    block_size = {block[0], 1, 1};
    grid_size = {grid[0], grid[1], grid[2]};
    if (fibers.size() < count) fibers = std::vector<Fiber>(count);
    slots.assign(count, {});
    faulted = nullptr;
    bank_conflicts = 0;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                emulator::block = {x, y, z};
                if (const char *why = run_block(count)) return fail(why);
            }
    return nullptr;
}
