// The stand-in's stream, and what is recorded instead of run. There is one queue whatever streams are asked for; its work is
// done as late as a program may see it, so what was not waited for is not there.
#pragma once
#include "memory.h"

#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace {
// CUresult.
enum {
    SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 101, NO_CONTEXT = 201, BAD_HANDLE = 400, NOT_FOUND = 500,
    NOT_READY = 600, FAILED = 719, NOT_IN_CAPTURE = 900, CAPTURE_BROKEN = 901, NOT_CAPTURED = 905, CAPTURED_EVENT = 907,
    WRONG_THREAD = 908
};
// CUstreamCaptureMode.
enum { ANY_THREAD = 0, THIS_THREAD = 1, NO_THREAD = 2 };

struct Work {
    std::string what;
    std::function<void()> run;
};
struct Graph {
    std::vector<Work> work;
};
// A recording. Once it is broken, only its end helps.
struct Capture {
    Graph graph;
    size_t number;
    int mode;
    std::thread::id thread;
    bool broken = false;
};
struct Event {
    bool timed, recorded = false;
    // How much had been issued, or the recording that it belongs to.
    size_t at = 0, capture = 0;
};

std::recursive_mutex mutex;
using Locked = std::lock_guard<std::recursive_mutex>;
// A thread's own: the driver refuses one that has none.
thread_local bool in_context;
std::deque<Work> queue;
size_t issued, executed;
// What every call answers once something has failed.
int failure;
// Those that were made, and the default ones.
std::set<const void *> streams = {nullptr, elements<void>(1), elements<void>(2)};
std::map<const void *, Capture> captures;
size_t capture_count;

int fail(const std::string &what) {
    std::fprintf(stderr, "stand-in: %s\n", what.c_str());
    return failure = FAILED;
}

// One call of the driver, on nothing or on a stream that there is.
template <typename Body> int call(const Body &body) {
    const Locked locked(mutex);
    if (!in_context) {
        std::fprintf(stderr, "stand-in: a call by a thread without a context\n");
        return NO_CONTEXT;
    }
    return failure ? failure : body();
}
template <typename Body> int call_on(const void *stream, const Body &body) {
    return call([&] { return streams.count(stream) ? body() : (int)BAD_HANDLE; });
}

Capture *capture_of(const void *stream) {
    const auto found = captures.find(stream);
    return found == captures.end() ? nullptr : &found->second;
}

int break_capture(Capture &capture, const char *what, int error) {
    std::fprintf(stderr, "stand-in: %s while a stream is recorded\n", what);
    capture.broken = true;
    return error;
}

// What may wait for the device, or take its memory: a recording does not allow it to its thread.
template <typename Body> int unsafe_call(const char *what, const Body &body) {
    return call([&] {
        for (auto &[stream, capture] : captures)
            if (capture.mode == ANY_THREAD || (capture.mode == THIS_THREAD && capture.thread == std::this_thread::get_id()))
                return break_capture(capture, what, NOT_IN_CAPTURE);
        return body();
    });
}

// What cannot be recorded.
template <typename Body> int unrecorded_call(const void *stream, const char *what, const Body &body) {
    return call_on(stream, [&] {
        Capture *capture = capture_of(stream);
        return capture ? break_capture(*capture, what, NOT_IN_CAPTURE) : body();
    });
}

int put(const void *stream, Work work) {
    Capture *capture = capture_of(stream);
    if (capture && capture->broken) return CAPTURE_BROKEN;
    if (capture) {
        capture->graph.work.push_back(std::move(work));
    } else {
        queue.push_back(std::move(work));
        issued++;
    }
    return SUCCESS;
}

int run_until(size_t end) {
    for (; executed < end && !failure; executed++) {
        const Work work = std::move(queue.front());
        queue.pop_front();
        try {
            watched(work.run);
        } catch (const Wrong &wrong) {
            fail(work.what + ": " + wrong.why);
        }
    }
    return failure;
}

int begin_capture(const void *stream, int mode) {
    // One recording at a time, and none of the default stream.
    if (capture_of(stream) || !stream) return INVALID;
    captures[stream] = Capture{{}, ++capture_count, mode, std::this_thread::get_id()};
    return SUCCESS;
}

int end_capture(const void *stream, Graph **graph) {
    *graph = nullptr;
    const Capture *capture = capture_of(stream);
    if (!capture) return INVALID;
    if (capture->mode != NO_THREAD && capture->thread != std::this_thread::get_id()) return WRONG_THREAD;
    const bool broken = capture->broken;
    if (!broken) *graph = new Graph(capture->graph);
    captures.erase(stream);
    return broken ? (int)CAPTURE_BROKEN : (int)SUCCESS;
}

int record(Event &event, const void *stream) {
    const Capture *capture = capture_of(stream);
    event.recorded = true;
    event.at = issued;
    event.capture = capture ? capture->number : 0;
    return capture && capture->broken ? (int)CAPTURE_BROKEN : (int)SUCCESS;
}

// Lets a stream wait for an event: in one queue it does anyway.
int wait_for(const void *stream, const Event &event) {
    Capture *capture = capture_of(stream);
    if (capture && capture->broken) return CAPTURE_BROKEN;
    if (event.capture == (capture ? capture->number : 0) || !event.recorded) return SUCCESS;
    if (!capture) return CAPTURED_EVENT;
    return break_capture(*capture, "a wait for an event of before", NOT_CAPTURED);
}
} // namespace
