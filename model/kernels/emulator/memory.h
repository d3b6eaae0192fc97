// The stand-in's memory. A piece ends at a page that nobody may touch, and its place is not given out a second time: what
// reads behind it, or once it was given back, ends in a fault, where a GPU would read on. What was not written is NaN.
#pragma once
#include "values.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <pthread.h>
#include <sys/mman.h>

namespace {
constexpr size_t PAGE = 4096, ALIGNMENT = 256;
constexpr int NOT_WRITTEN = 0xff;

// Why work in the stream fails.
struct Wrong {
    std::string why;
};
[[noreturn]] void refuse(const std::string &why) { throw Wrong{why}; }

// The addresses that are left.
Address unused, unused_end;

// Maps pages anew: empty, and to be touched or not.
void *map_pages(Address at, size_t bytes, int access, int more) {
    return mmap(elements<char>(at), bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | more, -1, 0);
}

// As many addresses as the system gives, without memory behind them.
void reserve_addresses() {
    for (size_t bytes = 16ull << 40; unused == 0 && bytes >= PAGE; bytes /= 2) {
        void *at = map_pages(0, bytes, PROT_NONE, 0);
        if (at == MAP_FAILED) continue;
        unused = reinterpret_cast<Address>(at);
        unused_end = unused + bytes;
    }
}

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Memory that was taken and not given back.
class Pieces {
    std::map<Address, size_t> sizes;

    // The pages that a piece lies at the end of.
    static size_t room(size_t bytes) { return rounded(bytes, PAGE); }
    static Address first_page(Address at) { return at / PAGE * PAGE; }

    static bool untouched(Address begin, Address end) {
        for (; begin < end; begin++)
            if (*elements<uint8_t>(begin) != NOT_WRITTEN) return false;
        return true;
    }

  public:
    // 0 where there are no addresses left.
    Address take(size_t bytes) {
        const size_t size = rounded(bytes, ALIGNMENT), all = room(size);
        if (unused_end - unused < all + PAGE) return 0;
        if (map_pages(unused, all, PROT_READ | PROT_WRITE, MAP_FIXED) == MAP_FAILED) return 0;
        std::memset(elements<char>(unused), NOT_WRITTEN, all);
        const Address at = unused + all - size;
        unused += all + PAGE;
        sizes[at] = bytes;
        return at;
    }

    // The bytes that a piece has; 0 where none begins there.
    size_t size(Address at) const {
        const auto piece = sizes.find(at);
        return piece == sizes.end() ? 0 : piece->second;
    }

    // Null, or what is wrong.
    const char *give_back(Address at) {
        const size_t bytes = size(at);
        if (bytes == 0) return "memory is given back that is not taken";
        const Address begin = first_page(at), all = room(at - begin + bytes);
        const bool clean = untouched(begin, at) && untouched(at + bytes, begin + all);
        map_pages(begin, all, PROT_NONE, MAP_FIXED);
        sizes.erase(at);
        return clean ? nullptr : "bytes beside a piece of memory were written";
    }

    bool hold(Address at, size_t bytes) const {
        auto piece = sizes.upper_bound(at);
        if (piece == sizes.begin()) return false;
        --piece;
        return at + bytes <= piece->first + piece->second;
    }

    // Where an address lies.
    std::string place(Address at) const {
        auto piece = sizes.upper_bound(at);
        if (piece != sizes.begin()) {
            --piece;
            const size_t behind = at - piece->first - piece->second;
            if (behind < PAGE) return std::to_string(behind) + " bytes behind a piece of " + std::to_string(piece->second);
        }
        return "in memory that was given back, or never taken";
    }
};

Pieces on_device, page_locked;

void check(const char *what, Address at, size_t bytes) {
    if (bytes > 0 && !on_device.hold(at, bytes)) refuse(std::string(what) + ": no memory of the device");
}

// Faults of what runs in the stream lead back to where it began.
sigjmp_buf before_work;
pthread_t worker;
volatile bool working;
volatile int fault;
Address fault_at;
std::map<int, struct sigaction> other_handlers;

void on_fault(int signal, siginfo_t *info, void *) {
    if (working && pthread_equal(worker, pthread_self())) {
        fault = signal;
        fault_at = reinterpret_cast<Address>(info->si_addr);
        siglongjmp(before_work, 1);
    }
    // The program's own: it happens again, and whoever was asked before answers.
    sigaction(signal, &other_handlers[signal], nullptr);
}

// The compiler lets a misaligned access end in a trap (scripts/gpu/stand_in.sh).
void catch_faults() {
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (const int signal : {SIGSEGV, SIGILL, SIGTRAP}) sigaction(signal, &ours, &other_handlers[signal]);
}

// Runs it, and refuses what touches memory that is not its own. What a fault leaves behind is lost.
template <typename Run> void watched(const Run &run) {
    struct Working {
        Working() { worker = pthread_self(), working = true; }
        ~Working() { working = false; }
    } watch;
    if (sigsetjmp(before_work, 0))
        refuse(fault == SIGSEGV ? "a bad address, " + on_device.place(fault_at) : "a misaligned access");
    run();
}
} // namespace
