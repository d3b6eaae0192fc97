// A stand-in for the CUDA driver, cuBLAS and cuRAND, as much of them as the program calls to decode, predict and train: the
// binary for GPUs runs on it without one (scripts/gpu/stand_in.sh). Kernels run on the emulator.
//
// There is one GPU. What a driver answers with an error is one here, and so is much that it would let pass: memory that is
// not the kernel's (memory.h), what a recording must not do (stream.h), ids and sizes that do not fit (candle.h).
#include "emulator.cpp"

#include <cstdlib>

#define API extern "C" __attribute__((visibility("default"))) int

#include "blas.h"
#include "module.h"

namespace {
size_t total = 4ull << 30, taken;
size_t recorded, replayed;

// What another driver may lack, by STAND_IN_LACKS: `graphs`, `early-graphs`, with kernels that begin early, or
// `graph-launches`.
bool lacks(const std::string &what) {
    const char *lacking = std::getenv("STAND_IN_LACKS");
    return lacking && what == lacking;
}

struct Report {
    ~Report() {
        if (launches > 0)
            std::fprintf(stderr, "stand-in: %zu modules, %zu launches, %zu graphs recorded, %zu replayed\n", module_count,
                         launches, recorded, replayed);
    }
} report;

struct Error {
    const char *name, *text;
};
const std::map<int, Error> ERRORS = {
    {INVALID, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NO_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {NO_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {BAD_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {FAILED, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {NOT_IN_CAPTURE, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {CAPTURE_BROKEN, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "a previous error during the capture"}},
    {NOT_CAPTURED, {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency on uncaptured work"}},
    {CAPTURED_EVENT, {"CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event of a capture"}},
    {WRONG_THREAD, {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "the capture is another thread's"}},
};

int error_text(int number, const char **text, const char *Error::*field) {
    const auto found = ERRORS.find(number);
    *text = found == ERRORS.end() ? "an error of the stand-in" : found->second.*field;
    return SUCCESS;
}

int take_memory(Address *at, size_t bytes) {
    if (bytes == 0) return INVALID;
    if (taken + bytes > total) return OUT_OF_MEMORY;
    *at = on_device.take(bytes);
    if (!*at) return OUT_OF_MEMORY;
    taken += bytes;
    return SUCCESS;
}

int give_back_memory(const void *stream, Address at) {
    if (on_device.size(at) == 0) return INVALID;
    taken -= on_device.size(at);
    return put(stream, {"a free", [=] {
        if (const char *why = on_device.give_back(at)) refuse(why);
    }});
}

// Page-locked memory is read and written when a copy's turn comes; any other when the call is made.
bool locked_in(const void *at, size_t bytes) { return page_locked.hold(reinterpret_cast<Address>(at), bytes); }

int copy_to_device(const void *stream, Address to, const void *from, size_t bytes) {
    std::shared_ptr<std::vector<char>> kept;
    if (!locked_in(from, bytes))
        kept = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    return put(stream, {"a copy to the device", [=] {
        check("to", to, bytes);
        if (!kept && !locked_in(from, bytes)) refuse("its page-locked memory is gone");
        std::memcpy(elements<char>(to), kept ? kept->data() : from, bytes);
    }});
}

int copy_back(const void *stream, void *to, Address from, size_t bytes) {
    const bool locked = locked_in(to, bytes);
    const int error = put(stream, {"a copy back", [=] {
        check("from", from, bytes);
        if (locked && !locked_in(to, bytes)) refuse("its page-locked memory is gone");
        std::memcpy(to, elements<char>(from), bytes);
    }});
    return error || locked ? error : run_until(issued);
}

int copy_on_device(const void *stream, Address to, Address from, size_t bytes) {
    return put(stream, {"a copy", [=] {
        check("to", to, bytes);
        check("from", from, bytes);
        if (to < from + bytes && from < to + bytes) refuse("its ends overlap");
        std::memcpy(elements<char>(to), elements<char>(from), bytes);
    }});
}
} // namespace

API cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, [] {
        reserve_addresses();
        catch_faults();
        if (const char *megabytes = std::getenv("STAND_IN_MEMORY_MB")) total = std::strtoull(megabytes, nullptr, 10) << 20;
        emulator_backwards(std::getenv("STAND_IN_BACKWARDS") != nullptr);
    });
    return SUCCESS;
}
API cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
API cuDeviceGet(int *device, int number) { return *device = number, number == 0 ? (int)SUCCESS : (int)NO_DEVICE; }
API cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, size, "stand-in"), SUCCESS; }
API cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = total, SUCCESS; }
// Compute capability 9.0 (75, 76), multiprocessors (16: few, so that a block gets several tiles), the most shared memory of
// a block (97), and whatever else is asked for.
API cuDeviceGetAttribute(int *value, int which, int) {
    *value = which == 75 ? 9 : which == 76 ? 0 : which == 16 ? 4 : which == 97 ? SHARED_MOST : 1;
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void **context, int) { return *context = &total, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void *context) { return in_context = context != nullptr, SUCCESS; }
API cuCtxGetCurrent(void **context) { return *context = in_context ? &total : nullptr, SUCCESS; }
API cuCtxSynchronize() {
    return unsafe_call("the device is waited for", [] { return run_until(issued); });
}
API cuGetErrorName(int error, const char **name) { return error_text(error, name, &Error::name); }
API cuGetErrorString(int error, const char **text) { return error_text(error, text, &Error::text); }
API cuMemGetInfo_v2(size_t *free, size_t *all) {
    return call([=] { return *all = total, *free = total - taken, (int)SUCCESS; });
}

API cuStreamCreate(void **stream, unsigned) {
    return call([=] { return *stream = new char, streams.insert(*stream), (int)SUCCESS; });
}
API cuStreamDestroy_v2(void *stream) {
    return unrecorded_call(stream, "it is destroyed", [=] { return streams.erase(stream), (int)SUCCESS; });
}
API cuStreamSynchronize(void *stream) {
    return unrecorded_call(stream, "it is waited for", [] { return run_until(issued); });
}
API cuStreamWaitEvent(void *stream, void *event, unsigned) {
    return call_on(stream, [=] { return wait_for(stream, *static_cast<Event *>(event)); });
}
API cuStreamIsCapturing(void *stream, int *status) {
    return call_on(stream, [=] {
        const Capture *capture = capture_of(stream);
        return *status = !capture ? 0 : capture->broken ? 2 : 1, (int)SUCCESS;
    });
}

// CU_EVENT_DISABLE_TIMING: 2.
API cuEventCreate(void **event, unsigned flags) {
    return call([=] { return *event = new Event{(flags & 2) == 0}, (int)SUCCESS; });
}
API cuEventDestroy_v2(void *event) {
    return call([=] { return delete static_cast<Event *>(event), (int)SUCCESS; });
}
API cuEventRecord(void *event, void *stream) {
    return call_on(stream, [=] { return record(*static_cast<Event *>(event), stream); });
}
API cuEventQuery(void *handle) {
    return unsafe_call("an event is asked for", [=] {
        const Event &event = *static_cast<Event *>(handle);
        if (event.capture) return (int)CAPTURED_EVENT;
        const bool done = executed >= event.at;
        if (!done) run_until(executed + 1); // Time passes.
        return done ? failure : (int)NOT_READY;
    });
}
API cuEventSynchronize(void *handle) {
    return unsafe_call("an event is waited for", [=] {
        const Event &event = *static_cast<Event *>(handle);
        return event.capture ? (int)CAPTURED_EVENT : run_until(event.at);
    });
}
// Milliseconds: one for each piece of work.
API cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
    return call([=] {
        const Event &from = *static_cast<Event *>(start), &to = *static_cast<Event *>(end);
        if (!from.timed || !to.timed || !from.recorded || !to.recorded) return (int)BAD_HANDLE;
        if (executed < from.at || executed < to.at) return (int)NOT_READY;
        return *milliseconds = (float)(to.at - from.at), (int)SUCCESS;
    });
}
API cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

API cuMemAlloc_v2(Address *at, size_t bytes) {
    return unsafe_call("memory is taken", [=] { return take_memory(at, bytes); });
}
// A driver would record it; nothing here wants memory of a graph's own.
API cuMemAllocAsync(Address *at, size_t bytes, void *stream) {
    return unrecorded_call(stream, "memory is taken", [=] { return take_memory(at, bytes); });
}
API cuMemFreeAsync(Address at, void *stream) {
    return unrecorded_call(stream, "memory is given back", [=] { return give_back_memory(stream, at); });
}
API cuMemFree_v2(Address at) {
    return unsafe_call("memory is given back", [=] {
        const int error = give_back_memory(nullptr, at);
        return error ? error : run_until(issued);
    });
}
API cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    return unsafe_call("memory is locked", [=] {
        *at = elements<void>(page_locked.take(bytes));
        return *at ? (int)SUCCESS : (int)OUT_OF_MEMORY;
    });
}
API cuMemFreeHost(void *at) {
    return unsafe_call("page-locked memory is given back", [=] {
        const char *why = page_locked.give_back(reinterpret_cast<Address>(at));
        return why ? fail(why) : (int)SUCCESS;
    });
}
API cuMemsetD8Async(Address at, unsigned char value, size_t bytes, void *stream) {
    return call_on(stream, [=] {
        return put(stream, {"a memset", [=] {
            check("to", at, bytes);
            std::memset(elements<char>(at), value, bytes);
        }});
    });
}
API cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
    const Locked locked(mutex);
    const auto body = [=] { return copy_to_device(stream, to, from, bytes); };
    return locked_in(from, bytes) ? call_on(stream, body)
                                  : unrecorded_call(stream, "pageable memory is copied", body);
}
API cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
    const Locked locked(mutex);
    const auto body = [=] { return copy_back(stream, to, from, bytes); };
    return locked_in(to, bytes) ? call_on(stream, body)
                                : unrecorded_call(stream, "pageable memory is copied", body);
}
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *stream) {
    return call_on(stream, [=] { return copy_on_device(stream, to, from, bytes); });
}

API cuModuleLoadData(void **module, const void *image) {
    return unsafe_call("a module is loaded", [=] { return *module = load_module(image), (int)SUCCESS; });
}
API cuModuleUnload(void *module) {
    return unsafe_call("a module is unloaded", [=] { return delete static_cast<Module *>(module), (int)SUCCESS; });
}
API cuModuleGetFunction(void **function, void *module, const char *name) {
    return call([=] { return find_function(*static_cast<Module *>(module), name, *reinterpret_cast<Function **>(function)); });
}
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: 8.
API cuFuncSetAttribute(void *function, int which, int value) {
    return call([=] {
        if (which != 8) return (int)SUCCESS;
        if (value > SHARED_MOST) return (int)INVALID;
        return static_cast<Function *>(function)->shared = value, (int)SUCCESS;
    });
}
API cuFuncGetAttribute(int *value, int, void *) { return *value = 1024, SUCCESS; }
API cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **) {
    return call_on(stream, [=] {
        return launch(stream, *static_cast<Function *>(function), {{x, y, z}, {bx, by, bz}, shared}, parameters);
    });
}
// CUlaunchConfig.
struct LaunchConfig {
    Grid grid;
    void *stream, *attributes;
    unsigned attribute_count;
};
API cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **) {
    // Only that which lets a kernel begin early (6).
    for (unsigned i = 0; i < config->attribute_count; i++)
        if (i > 0 || *static_cast<const int *>(config->attributes) != 6) return INVALID;
    return call_on(config->stream, [=] {
        Capture *capture = capture_of(config->stream);
        if (capture && config->attribute_count > 0 && lacks("early-graphs"))
            return break_capture(*capture, "a kernel begins early", NOT_IN_CAPTURE);
        return launch(config->stream, *static_cast<Function *>(function), config->grid, parameters);
    });
}

API cuStreamBeginCapture_v2(void *stream, int mode) {
    return call_on(stream, [=] { return lacks("graphs") ? (int)NOT_IN_CAPTURE : begin_capture(stream, mode); });
}
API cuStreamEndCapture(void *stream, void **graph) {
    return call_on(stream, [=] { return end_capture(stream, reinterpret_cast<Graph **>(graph)); });
}
API cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    return call([=] { return *executable = new Graph(*static_cast<Graph *>(graph)), recorded++, (int)SUCCESS; });
}
API cuGraphLaunch(void *executable, void *stream) {
    return call_on(stream, [=] {
        int error = lacks("graph-launches") ? (int)INVALID : (int)SUCCESS;
        for (const Work &work : static_cast<Graph *>(executable)->work) error = error ? error : put(stream, work);
        return replayed++, error;
    });
}
API cuGraphExecDestroy(void *executable) {
    return call([=] { return delete static_cast<Graph *>(executable), (int)SUCCESS; });
}
API cuGraphDestroy(void *graph) { return call([=] { return delete static_cast<Graph *>(graph), (int)SUCCESS; }); }
API cuThreadExchangeStreamCaptureMode(int *) { return SUCCESS; }
