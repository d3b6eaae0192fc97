// A stand-in for the CUDA driver, cuBLAS and cuRAND, as much of them as the program calls to decode and predict: the
// binary for GPUs runs on it without one (scripts/gpu/stand_in.sh). Kernels run on the emulator.
//
// A stream's work is done as late as a program may see it: what was not waited for is not there. Memory is filled with
// NaN when it is taken and when it is given back. There is one GPU, and one stream whatever handles are asked for.
#include "emulator.cpp"

#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>

namespace {
using Work = std::function<void()>;
using Address = uint64_t;
using Locked = std::lock_guard<std::recursive_mutex>;

// CUresult.
enum { SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600, FAILED = 719, NOT_IN_CAPTURE = 900 };
// Dynamic shared memory of a block: given, and the most that a block may have where it is asked for.
constexpr int SHARED_GIVEN = 48 << 10, SHARED_MOST = 227 << 10;

struct Graph {
    std::vector<Work> work;
};
struct Function {
    std::string name;
    int shared = SHARED_GIVEN;
};
struct Event {
    size_t at = 0;
};

std::recursive_mutex mutex;
std::deque<Work> stream;
size_t issued, executed;
// What every call answers once something has failed.
int failure;
Graph *capture;
// Bytes of each piece of memory.
std::map<Address, size_t> on_device, page_locked;
size_t total = 4ull << 30, taken;
size_t modules, launches, recorded, replayed;

struct Report {
    ~Report() {
        if (launches > 0)
            std::fprintf(stderr, "stand-in: %zu modules, %zu launches, %zu graphs recorded, %zu replayed\n", modules,
                         launches, recorded, replayed);
    }
} report;

void fail(const std::string &what) {
    std::fprintf(stderr, "stand-in: %s\n", what.c_str());
    failure = FAILED;
}

int put(Work work) {
    if (capture) {
        capture->work.push_back(std::move(work));
    } else {
        stream.push_back(std::move(work));
        issued++;
    }
    return failure;
}

int run_until(size_t end) {
    for (; executed < end; executed++) {
        const Work work = std::move(stream.front());
        stream.pop_front();
        work();
    }
    return failure;
}

// What waits is not allowed while a graph is recorded.
int wait_until(size_t end) { return capture ? (int)NOT_IN_CAPTURE : run_until(end); }

bool within(const std::map<Address, size_t> &pieces, Address at, size_t bytes) {
    auto piece = pieces.upper_bound(at);
    if (piece == pieces.begin()) return false;
    --piece;
    return at + bytes <= piece->first + piece->second;
}

void check(const char *what, Address at, size_t bytes) {
    if (bytes > 0 && !within(on_device, at, bytes)) fail(std::string(what) + ": no memory of the device");
}

enum Type { F32, U32, U8, BF16, F16 };

Type type_of(const std::string &name) {
    const std::map<std::string, Type> types = {{"f32", F32}, {"u32", U32}, {"u8", U8}, {"bf16", BF16}, {"f16", F16}};
    const auto found = types.find(name);
    if (found == types.end()) fail("no values of type " + name);
    return found == types.end() ? U8 : found->second;
}

size_t bytes_of(Type type) { return type == F32 || type == U32 ? 4 : type == U8 ? 1 : 2; }

float load(Type type, Address at, size_t i) {
    switch (type) {
    case F32: return reinterpret_cast<const float *>(at)[i];
    case U32: return (float)reinterpret_cast<const uint32_t *>(at)[i];
    case U8: return reinterpret_cast<const uint8_t *>(at)[i];
    case BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(at)[i]);
    default: return __half2float(reinterpret_cast<const __half *>(at)[i]);
    }
}

void store(Type type, Address at, size_t i, float x) {
    switch (type) {
    case F32: reinterpret_cast<float *>(at)[i] = x; break;
    case U32: reinterpret_cast<uint32_t *>(at)[i] = (uint32_t)x; break;
    case U8: reinterpret_cast<uint8_t *>(at)[i] = (uint8_t)x; break;
    case BF16: reinterpret_cast<__nv_bfloat16 *>(at)[i] = __float2bfloat16(x); break;
    default: reinterpret_cast<__half *>(at)[i] = __float2half(x);
    }
}

// candle's kernels that loading weights and adapters takes: where element i of a strided tensor lies.
size_t strided(size_t i, size_t dims, Address info) {
    const size_t *shape = reinterpret_cast<const size_t *>(info), *strides = shape + dims;
    if (!shape) return i;
    size_t at = 0;
    for (size_t d = dims; d-- > 0; i /= shape[d]) at += i % shape[d] * strides[d];
    return at;
}

bool begins(const std::string &name, const char *with) { return name.rfind(with, 0) == 0; }

// How many arguments a kernel of candle's takes; 0 for one that is not here.
size_t candle_arguments(const std::string &name) {
    if (begins(name, "cast_") || begins(name, "ucopy_") || begins(name, "uabs_")) return 5;
    return begins(name, "fast_sum_") || begins(name, "copy2d_") ? 6 : 0;
}

void run_candle(const std::string &name, const std::vector<uint64_t> &a, unsigned blocks) {
    const Type type = type_of(name.substr(name.rfind('_') + 1));
    if (candle_arguments(name) == 5) {
        const Type from = name[0] == 'u' ? type : type_of(name.substr(5, name.rfind('_') - 5));
        const auto value = [&](float x) { return begins(name, "uabs_") ? std::fabs(x) : x; };
        for (size_t i = 0; i < a[0]; i++) store(type, a[4], i, value(load(from, a[3], strided(i, a[1], a[2]))));
    } else if (begins(name, "fast_sum_")) {
        const size_t outputs = begins(name, "fast_sum_small_") ? a[0] : blocks;
        for (size_t o = 0; o < outputs; o++) {
            double sum = 0;
            for (size_t i = 0; i < a[1]; i++) sum += load(type, a[4], strided(o * a[1] + i, a[2], a[3]));
            store(type, a[5], o, (float)sum);
        }
    } else {
        const size_t size = bytes_of(type);
        for (uint32_t row = 0; row < (uint32_t)a[2]; row++)
            std::memcpy(reinterpret_cast<char *>(a[1]) + size * row * (uint32_t)a[5],
                        reinterpret_cast<const char *>(a[0]) + size * row * (uint32_t)a[4], size * (uint32_t)a[3]);
    }
}
} // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cuInit(unsigned) {
    if (const char *megabytes = std::getenv("STAND_IN_MEMORY_MB")) total = std::strtoull(megabytes, nullptr, 10) << 20;
    return SUCCESS;
}
API cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
API cuDeviceGet(int *device, int number) { return *device = number, number == 0 ? SUCCESS : 101; }
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
API cuCtxSetCurrent(void *) { return SUCCESS; }
API cuCtxGetCurrent(void **context) { return *context = &total, SUCCESS; }
API cuCtxSynchronize() {
    const Locked locked(mutex);
    return wait_until(issued);
}
API cuGetErrorName(int, const char **name) { return *name = "CUDA_ERROR", SUCCESS; }
API cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "an error of the stand-in";
    return SUCCESS;
}
API cuMemGetInfo_v2(size_t *free, size_t *all) {
    const Locked locked(mutex);
    return *all = total, *free = total - taken, SUCCESS;
}

API cuStreamCreate(void **handle, unsigned) { return *handle = &stream, SUCCESS; }
API cuStreamDestroy_v2(void *) { return SUCCESS; }
API cuStreamSynchronize(void *) {
    const Locked locked(mutex);
    return wait_until(issued);
}
API cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
API cuStreamIsCapturing(void *, int *status) { return *status = capture ? 1 : 0, SUCCESS; }
API cuEventCreate(void **event, unsigned) { return *event = new Event, SUCCESS; }
API cuEventDestroy_v2(void *event) { return delete static_cast<Event *>(event), SUCCESS; }
API cuEventRecord(void *event, void *) {
    const Locked locked(mutex);
    return static_cast<Event *>(event)->at = issued, SUCCESS;
}
API cuEventQuery(void *event) {
    const Locked locked(mutex);
    if (capture) return NOT_IN_CAPTURE;
    if (executed < issued) run_until(executed + 1); // Time passes.
    return executed >= static_cast<Event *>(event)->at ? failure : (int)NOT_READY;
}
// Milliseconds: one for each piece of work.
API cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
    return *milliseconds = (float)(static_cast<Event *>(end)->at - static_cast<Event *>(start)->at), SUCCESS;
}
API cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
API cuEventSynchronize(void *event) {
    const Locked locked(mutex);
    return wait_until(static_cast<Event *>(event)->at);
}

API cuMemAlloc_v2(Address *at, size_t bytes) {
    const Locked locked(mutex);
    if (capture) return NOT_IN_CAPTURE;
    if (bytes == 0) return INVALID;
    if (taken + bytes > total) return OUT_OF_MEMORY;
    void *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);
    *at = reinterpret_cast<Address>(memory);
    on_device[*at] = bytes;
    taken += bytes;
    return failure;
}
API cuMemAllocAsync(Address *at, size_t bytes, void *) { return cuMemAlloc_v2(at, bytes); }
API cuMemFreeAsync(Address at, void *) {
    const Locked locked(mutex);
    if (!on_device.count(at)) return INVALID;
    taken -= on_device[at];
    return put([at] {
        std::memset(reinterpret_cast<void *>(at), 0xff, on_device[at]);
        on_device.erase(at);
        std::free(reinterpret_cast<void *>(at));
    });
}
API cuMemFree_v2(Address at) {
    const Locked locked(mutex);
    const int error = cuMemFreeAsync(at, nullptr);
    return error ? error : wait_until(issued);
}
API cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    const Locked locked(mutex);
    if (capture) return NOT_IN_CAPTURE;
    *at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(*at, 0xff, bytes);
    page_locked[reinterpret_cast<Address>(*at)] = bytes;
    return SUCCESS;
}
API cuMemFreeHost(void *at) {
    const Locked locked(mutex);
    const auto piece = page_locked.find(reinterpret_cast<Address>(at));
    if (piece == page_locked.end()) return INVALID;
    std::memset(at, 0xff, piece->second);
    page_locked.erase(piece);
    std::free(at);
    return SUCCESS;
}
API cuMemsetD8Async(Address at, unsigned char value, size_t bytes, void *) {
    const Locked locked(mutex);
    return put([=] {
        check("memset", at, bytes);
        std::memset(reinterpret_cast<void *>(at), value, bytes);
    });
}
// From page-locked memory when the copy's turn comes; any other has been read when the call returns.
API cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *) {
    const Locked locked(mutex);
    std::shared_ptr<std::vector<char>> kept;
    if (!within(page_locked, reinterpret_cast<Address>(from), bytes))
        kept = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    return put([=] {
        check("copy", to, bytes);
        std::memcpy(reinterpret_cast<void *>(to), kept ? kept->data() : from, bytes);
    });
}
API cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *) {
    const Locked locked(mutex);
    const bool waits = !within(page_locked, reinterpret_cast<Address>(to), bytes);
    if (waits && capture) return NOT_IN_CAPTURE;
    put([=] {
        check("copy back", from, bytes);
        std::memcpy(to, reinterpret_cast<const void *>(from), bytes);
    });
    return waits ? run_until(issued) : failure;
}
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *) {
    const Locked locked(mutex);
    return put([=] {
        check("copy", to, bytes);
        check("copy", from, bytes);
        std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    });
}

API cuModuleLoadData(void **module, const void *) { return *module = &modules, modules++, SUCCESS; }
API cuModuleUnload(void *) { return SUCCESS; }
API cuModuleGetFunction(void **function, void *, const char *name) {
    const Locked locked(mutex);
    if (!emulator::kernels().count(name) && candle_arguments(name) == 0) {
        std::fprintf(stderr, "stand-in: there is no kernel %s\n", name);
        return NOT_FOUND;
    }
    *function = new Function{name};
    return SUCCESS;
}
API cuFuncSetAttribute(void *function, int which, int value) {
    if (which != 8) return SUCCESS;
    if (value > SHARED_MOST) return INVALID;
    static_cast<Function *>(function)->shared = value;
    return SUCCESS;
}
API cuFuncGetAttribute(int *value, int, void *) { return *value = 1024, SUCCESS; }
API cuLaunchKernel(void *handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *, void **parameters, void **) {
    const Locked locked(mutex);
    const Function &function = *static_cast<Function *>(handle);
    if (x * y * z == 0 || y > 65535 || z > 65535 || bx * by * bz > 1024) return INVALID;
    if ((int)shared > function.shared) {
        std::fprintf(stderr, "stand-in: %s: %u bytes of shared memory\n", function.name.c_str(), shared);
        return INVALID;
    }
    launches++;
    const auto own = emulator::kernels().find(function.name);
    const bool ours = own != emulator::kernels().end();
    const std::vector<size_t> sizes =
        ours ? own->second.sizes : std::vector<size_t>(candle_arguments(function.name), sizeof(uint64_t));
    // The arguments' values now, whatever becomes of the caller's.
    std::vector<uint64_t> words(sizes.size());
    for (size_t i = 0; i < sizes.size(); i++) std::memcpy(&words[i], parameters[i], sizes[i]);
    return put([=, name = function.name]() mutable {
        if (!ours) return run_candle(name, words, x);
        const unsigned grid[] = {x, y, z}, block[] = {bx, by, bz};
        std::vector<void *> arguments;
        for (uint64_t &word : words) arguments.push_back(&word);
        const char *why = emulator_launch(name.c_str(), grid, block, shared, arguments.data(), arguments.size());
        if (why) fail(why);
    });
}
// CUlaunchConfig.
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
};
API cuLaunchKernelEx(const LaunchConfig *config, void *handle, void **parameters, void **extra) {
    // Only that which lets a kernel begin early (6).
    for (unsigned i = 0; i < config->attribute_count; i++)
        if (i > 0 || *static_cast<const int *>(config->attributes) != 6) return INVALID;
    const unsigned *grid = config->grid, *block = config->block;
    return cuLaunchKernel(handle, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared,
                          config->stream, parameters, extra);
}

API cuStreamBeginCapture_v2(void *, int) {
    const Locked locked(mutex);
    if (capture) return INVALID;
    return capture = new Graph, SUCCESS;
}
API cuStreamEndCapture(void *, void **graph) {
    const Locked locked(mutex);
    if (!capture) return INVALID;
    return *graph = capture, capture = nullptr, SUCCESS;
}
API cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    return *executable = new Graph(*static_cast<Graph *>(graph)), recorded++, SUCCESS;
}
API cuGraphLaunch(void *executable, void *) {
    const Locked locked(mutex);
    for (const Work &work : static_cast<Graph *>(executable)->work) put(work);
    return replayed++, failure;
}
API cuGraphExecDestroy(void *executable) { return delete static_cast<Graph *>(executable), SUCCESS; }
API cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), SUCCESS; }
API cuThreadExchangeStreamCaptureMode(int *) { return SUCCESS; }

API cublasCreate_v2(void **handle) { return *handle = &stream, SUCCESS; }
API cublasDestroy_v2(void *) { return SUCCESS; }
API cublasSetStream_v2(void *, void *) { return SUCCESS; }
API cublasSetWorkspace_v2(void *, void *at, size_t bytes) {
    return check("cuBLAS' workspace", reinterpret_cast<Address>(at), bytes), SUCCESS;
}
// Columns: c[i + j ldc] = alpha sum_l a b + beta c, a and b transposed where the operation is 1.
API cublasGemmEx(void *, int ta, int tb, int m, int n, int k, const float *alpha, Address a, int a_type, int lda,
                 Address b, int b_type, int ldb, const float *beta, Address c, int c_type, int ldc, int, int) {
    const Locked locked(mutex);
    // cudaDataType: 0, 2 and 14.
    const auto type = [](int type) { return type == 0 ? F32 : type == 2 ? F16 : BF16; };
    const Type at = type(a_type), bt = type(b_type), ct = type(c_type);
    return put([=, alpha = *alpha, beta = *beta] {
        check("a", a, bytes_of(at) * m * k);
        check("b", b, bytes_of(bt) * n * k);
        check("c", c, bytes_of(ct) * m * n);
        for (size_t j = 0; j < (size_t)n; j++)
            for (size_t i = 0; i < (size_t)m; i++) {
                float sum = 0;
                for (size_t l = 0; l < (size_t)k; l++)
                    sum += load(at, a, ta ? i * lda + l : l * lda + i) * load(bt, b, tb ? l * ldb + j : j * ldb + l);
                const size_t to = j * ldc + i;
                store(ct, c, to, alpha * sum + (beta == 0 ? 0.0f : beta * load(ct, c, to)));
            }
    });
}

API curandCreateGenerator(void **generator, int) { return *generator = &stream, SUCCESS; }
API curandDestroyGenerator(void *) { return SUCCESS; }
API curandSetStream(void *, void *) { return SUCCESS; }
API curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return SUCCESS; }
