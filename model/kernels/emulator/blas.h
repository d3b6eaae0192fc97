// cuBLAS' products, and as much of cuRAND as opening a device takes.
#pragma once
#include "stream.h"

namespace {
// cublasStatus_t.
enum { BLAS_SUCCESS = 0, BLAS_INVALID = 7, BLAS_FAILED = 13, BLAS_NOT_SUPPORTED = 15 };
// cublasComputeType_t: sums, and the scalars, are f32.
constexpr int COMPUTE_32F = 68;

// A handle.
struct Blas {
    const void *stream;
    Address workspace;
    size_t workspace_bytes;
};

// Columns in memory, `step` elements from one to the next; of several matrices, `stride` from one to the next.
struct Matrix {
    Address at;
    Type type;
    size_t rows, columns, step;
    long long stride = 0;
    bool transposed = false;

    bool valid() const { return step >= rows; }
    // To the last element of the last of `count` matrices.
    size_t bytes(size_t count) const {
        return bytes_of(type) * ((count - 1) * stride + (columns - 1) * step + rows);
    }
};

// c = alpha a b + beta c.
struct Product {
    Matrix a, b, c;
    size_t inner, count = 1;
    float alpha, beta;
};

// cudaDataType.
bool type_of(int number, Type &type) {
    const std::map<int, Type> types = {{0, F32}, {2, F16}, {14, BF16}};
    const auto found = types.find(number);
    if (found != types.end()) type = found->second;
    return found != types.end();
}

// One matrix's values, those that a sum runs over side by side.
std::vector<float> lines(const Matrix &m, size_t which, size_t count, size_t inner, bool along_columns) {
    std::vector<float> values(count * inner);
    for (size_t line = 0; line < count; line++)
        for (size_t l = 0; l < inner; l++) {
            const size_t row = along_columns ? l : line, column = along_columns ? line : l;
            values[line * inner + l] = (float)load(m.type, m.at, which * m.stride + column * m.step + row);
        }
    return values;
}

void multiply(const Product &p, size_t which) {
    const size_t m = p.c.rows, n = p.c.columns, k = p.inner;
    const std::vector<float> a = lines(p.a, which, m, k, p.a.transposed), b = lines(p.b, which, n, k, !p.b.transposed);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            float sum = 0;
            for (size_t l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
            const size_t to = which * p.c.stride + j * p.c.step + i;
            // What is only written may be NaN.
            store(p.c.type, p.c.at, to, p.alpha * sum + (p.beta == 0 ? 0.0f : p.beta * (float)load(p.c.type, p.c.at, to)));
        }
}

bool overlap(const Matrix &x, const Matrix &y, size_t count) {
    return x.at < y.at + y.bytes(count) && y.at < x.at + x.bytes(count);
}

void run_product(const Blas &blas, const Product &p) {
    check("workspace", blas.workspace, blas.workspace_bytes);
    check("a", p.a.at, p.a.bytes(p.count));
    check("b", p.b.at, p.b.bytes(p.count));
    check("c", p.c.at, p.c.bytes(p.count));
    if (overlap(p.a, p.c, p.count) || overlap(p.b, p.c, p.count)) refuse("the product is written over a factor");
    if (p.count > 1 && p.c.bytes(1) > bytes_of(p.c.type) * p.c.stride) refuse("the products of a batch overlap");
    for (size_t which = 0; which < p.count; which++) multiply(p, which);
}

int put_product(const Blas &blas, const Product &p, int compute) {
    if (p.c.rows == 0 || p.c.columns == 0) return BLAS_SUCCESS;
    if (!p.a.valid() || !p.b.valid() || !p.c.valid()) return BLAS_INVALID;
    if (compute != COMPUTE_32F || p.a.type != p.b.type || (p.c.type != p.a.type && p.c.type != F32)) return BLAS_NOT_SUPPORTED;
    const int error = call([&] {
        Capture *capture = capture_of(blas.stream);
        // Without memory of its own it takes some now.
        if (capture && !blas.workspace) return break_capture(*capture, "cuBLAS' own memory is taken", NOT_IN_CAPTURE);
        return put(blas.stream, {"a product of cuBLAS", [=] { run_product(blas, p); }});
    });
    return error ? BLAS_FAILED : BLAS_SUCCESS;
}
} // namespace

API cublasCreate_v2(void **handle) { return *handle = new Blas{}, BLAS_SUCCESS; }
API cublasDestroy_v2(void *handle) { return delete static_cast<Blas *>(handle), BLAS_SUCCESS; }
// A stream's change takes the workspace away.
API cublasSetStream_v2(void *handle, void *stream) { return *static_cast<Blas *>(handle) = {stream, 0, 0}, BLAS_SUCCESS; }
// Sums are in f32 here, whichever mode is asked for: 0 is the usual one, 16 allows no parts of sums in 16 bits.
API cublasSetMathMode(void *, int mode) { return mode == 0 || mode == 16 ? BLAS_SUCCESS : BLAS_INVALID; }
API cublasSetWorkspace_v2(void *handle, void *at, size_t bytes) {
    const Locked locked(mutex);
    Blas &blas = *static_cast<Blas *>(handle);
    blas.workspace = reinterpret_cast<Address>(at);
    blas.workspace_bytes = bytes;
    return on_device.hold(blas.workspace, bytes) ? BLAS_SUCCESS : BLAS_INVALID;
}
API cublasGemmStridedBatchedEx(void *handle, int a_turned, int b_turned, int m, int n, int k, const float *alpha, Address a,
                               int a_type, int a_step, long long a_stride, Address b, int b_type, int b_step,
                               long long b_stride, const float *beta, Address c, int c_type, int c_step,
                               long long c_stride, int count, int compute, int) {
    if (m < 0 || n < 0 || k <= 0 || count <= 0) return BLAS_INVALID;
    const auto rows_of = [](bool turned, int rows, int columns) { return (size_t)(turned ? columns : rows); };
    Product p = {};
    if (!type_of(a_type, p.a.type) || !type_of(b_type, p.b.type) || !type_of(c_type, p.c.type)) return BLAS_NOT_SUPPORTED;
    p.a = {a, p.a.type, rows_of(a_turned, m, k), rows_of(a_turned, k, m), (size_t)a_step, a_stride, a_turned != 0};
    p.b = {b, p.b.type, rows_of(b_turned, k, n), rows_of(b_turned, n, k), (size_t)b_step, b_stride, b_turned != 0};
    p.c = {c, p.c.type, (size_t)m, (size_t)n, (size_t)c_step, c_stride};
    p.inner = (size_t)k;
    p.count = (size_t)count;
    p.alpha = *alpha;
    p.beta = *beta;
    return put_product(*static_cast<Blas *>(handle), p, compute);
}
API cublasGemmEx(void *handle, int a_turned, int b_turned, int m, int n, int k, const float *alpha, Address a, int a_type,
                 int a_step, Address b, int b_type, int b_step, const float *beta, Address c, int c_type, int c_step,
                 int compute, int how) {
    return cublasGemmStridedBatchedEx(handle, a_turned, b_turned, m, n, k, alpha, a, a_type, a_step, 0, b, b_type, b_step, 0,
                                      beta, c, c_type, c_step, 0, 1, compute, how);
}

API curandCreateGenerator(void **generator, int) { return *generator = &queue, SUCCESS; }
API curandDestroyGenerator(void *) { return SUCCESS; }
API curandSetStream(void *, void *) { return SUCCESS; }
API curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return SUCCESS; }
