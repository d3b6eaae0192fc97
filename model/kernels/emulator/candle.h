// candle's own kernels (candle-kernels), as many as loading, training and predicting take. They are not compiled here but
// computed anew; what the originals assume of ids, sizes and grids is checked.
#pragma once
#include "memory.h"

#include <functional>
#include <optional>
#include <vector>

namespace candle {
namespace {
// A launch. A kernel's name ends with its type, or with two: `other` is that of ids, of conditions, of what is cast.
struct Launch {
    Type type, other;
    std::vector<uint64_t> args;
    size_t blocks, threads;

    double value(size_t i) const { return load(type, reinterpret_cast<Address>(&args[i]), 0); }
};

struct Operation {
    size_t types;
    // Each argument: `n` a size, `w` one of 32 bits, `p` a pointer, `v` a value of the kernel's type.
    std::string args;
    std::function<void(const Launch &)> run;
};

// A tensor: contiguous, or with strides.
struct Tensor {
    Type type;
    Address at;
    std::vector<size_t> shape, strides;

    size_t place(size_t i) const {
        size_t at = 0;
        for (size_t d = shape.size(); d-- > 0; i /= shape[d]) at += i % shape[d] * strides[d];
        return strides.empty() ? i : at;
    }
    double operator[](size_t i) const { return load(type, at, place(i)); }
    void set(size_t i, double x) const { store(type, at, place(i), x); }
};

Tensor contiguous(const char *what, Type type, Address at, size_t count) {
    check(what, at, bytes_of(type) * count);
    return {type, at, {}, {}};
}

// `info`: the shape, then the strides of each tensor; null where all are contiguous. `which`: whose strides.
Tensor strided(const char *what, Type type, Address at, size_t count, size_t dims, Address info, size_t which) {
    if (!info) return contiguous(what, type, at, count);
    check("shape and strides", info, sizeof(size_t) * dims * (which + 2));
    const size_t *shape = elements<size_t>(info), *strides = shape + dims * (which + 1);
    const Tensor tensor = {type, at, {shape, shape + dims}, {strides, strides + dims}};
    size_t all = 1, last = 0;
    for (size_t d = 0; d < dims; d++) all *= shape[d], last += (shape[d] - 1) * strides[d];
    if (all != count) refuse("the shape has " + std::to_string(all) + " elements, not " + std::to_string(count));
    check(what, at, bytes_of(type) * (last + 1));
    return tensor;
}

void check_grid(const Launch &l, size_t needed) {
    if (l.blocks * l.threads < needed) refuse("the grid is too small");
}

// --- element by element

Operation unary(double (*f)(double)) {
    return {1, "nnppp", [f](const Launch &l) {
        const Tensor in = strided("in", l.type, l.args[3], l.args[0], l.args[1], l.args[2], 0);
        const Tensor out = contiguous("out", l.type, l.args[4], l.args[0]);
        for (size_t i = 0; i < l.args[0]; i++) out.set(i, f(in[i]));
    }};
}

void run_binary(const Launch &l, Type out_type, double (*f)(double, double)) {
    const size_t count = l.args[0];
    const Tensor x = strided("left", l.type, l.args[3], count, l.args[1], l.args[2], 0);
    const Tensor y = strided("right", l.type, l.args[4], count, l.args[1], l.args[2], 1);
    const Tensor out = contiguous("out", out_type, l.args[5], count);
    for (size_t i = 0; i < count; i++) out.set(i, f(x[i], y[i]));
}

Operation binary(double (*f)(double, double)) {
    return {1, "nnpppp", [f](const Launch &l) { run_binary(l, l.type, f); }};
}
Operation comparison(double (*f)(double, double)) {
    return {1, "nnpppp", [f](const Launch &l) { run_binary(l, U8, f); }};
}

void cast(const Launch &l) {
    const Tensor in = strided("in", l.other, l.args[3], l.args[0], l.args[1], l.args[2], 0);
    const Tensor out = contiguous("out", l.type, l.args[4], l.args[0]);
    for (size_t i = 0; i < l.args[0]; i++) out.set(i, in[i]);
}

void affine(const Launch &l) {
    const Tensor in = strided("in", l.type, l.args[3], l.args[0], l.args[1], l.args[2], 0);
    const Tensor out = contiguous("out", l.type, l.args[4], l.args[0]);
    for (size_t i = 0; i < l.args[0]; i++) out.set(i, in[i] * l.value(5) + l.value(6));
}

void const_set(const Launch &l) {
    const Tensor out = strided("out", l.type, l.args[4], l.args[0], l.args[1], l.args[2], 0);
    for (size_t i = 0; i < l.args[0]; i++) out.set(i, l.value(3));
}

void where(const Launch &l) {
    const size_t count = l.args[0], dims = l.args[1];
    const Tensor condition = strided("condition", l.other, l.args[3], count, dims, l.args[2], 0);
    const Tensor yes = strided("on true", l.type, l.args[4], count, dims, l.args[2], 1);
    const Tensor no = strided("on false", l.type, l.args[5], count, dims, l.args[2], 2);
    const Tensor out = contiguous("out", l.type, l.args[6], count);
    for (size_t i = 0; i < count; i++) out.set(i, condition[i] != 0 ? yes[i] : no[i]);
}

void copy2d(const Launch &l) {
    const size_t rows = l.args[2], columns = l.args[3], from_step = l.args[4], to_step = l.args[5];
    const Tensor from = contiguous("from", l.type, l.args[0], (rows - 1) * from_step + columns);
    const Tensor to = contiguous("to", l.type, l.args[1], (rows - 1) * to_step + columns);
    check_grid(l, rows * columns);
    for (size_t row = 0; row < rows; row++)
        for (size_t i = 0; i < columns; i++) to.set(row * to_step + i, from[row * from_step + i]);
}

// --- sums and the like

using Fold = double (*)(double, double);

void reduce(const Launch &l, size_t outputs, double start, Fold fold) {
    const size_t each = l.args[1];
    const Tensor in = strided("in", l.type, l.args[4], outputs * each, l.args[2], l.args[3], 0);
    const Tensor out = contiguous("out", l.type, l.args[5], outputs);
    for (size_t o = 0; o < outputs; o++) {
        double folded = start;
        for (size_t i = 0; i < each; i++) folded = fold(folded, in[o * each + i]);
        out.set(o, folded);
    }
}

double add(double x, double y) { return x + y; }

// A block for each result.
Operation reduction(double start, Fold fold) {
    return {1, "nnnppp", [=](const Launch &l) {
        if (l.blocks * l.args[1] != l.args[0]) refuse("there must be one block for each result");
        reduce(l, l.blocks, start, fold);
    }};
}

// A thread for each result.
void fast_sum_small(const Launch &l) {
    check_grid(l, l.args[0]);
    reduce(l, l.args[0], 0, add);
}

// --- by ids

// An id; none where it is the largest of its type, which stands for a zero.
std::optional<size_t> id(const Tensor &ids, size_t i, size_t below) {
    const double largest = ids.type == U8 ? 0xffp0 : ids.type == U32 ? 0xffffffffp0 : 0x1p63;
    if (ids[i] == largest) return std::nullopt;
    if (ids[i] < 0 || ids[i] >= (double)below)
        refuse("id " + std::to_string((int64_t)ids[i]) + " of " + std::to_string(below));
    return (size_t)ids[i];
}

void index_select(const Launch &l) {
    const size_t left = l.args[6], from = l.args[7], count = l.args[8], right = l.args[9];
    const Tensor ids = strided("ids", l.other, l.args[3], count, l.args[1], l.args[2], 0);
    // The original takes their strides for the other tensor's.
    for (size_t i = 0; i < count; i++)
        if (ids.place(i) != i) refuse("ids must be contiguous");
    const Tensor in = contiguous("in", l.type, l.args[4], left * from * right);
    const Tensor out = contiguous("out", l.type, l.args[5], left * count * right);
    if (l.args[0] != left * count * right) refuse("sizes that do not agree");
    for (size_t i = 0; i < l.args[0]; i++) {
        const auto at = id(ids, i / right % count, from);
        out.set(i, at ? in[(i / (count * right) * from + *at) * right + i % right] : 0);
    }
}

void gather(const Launch &l) {
    const size_t left = l.args[4], from = l.args[5], count = l.args[6], right = l.args[7];
    const Tensor ids = contiguous("ids", l.other, l.args[1], l.args[0]);
    const Tensor in = contiguous("in", l.type, l.args[2], left * from * right);
    const Tensor out = contiguous("out", l.type, l.args[3], l.args[0]);
    if (l.args[0] != left * count * right) refuse("sizes that do not agree");
    for (size_t i = 0; i < l.args[0]; i++) {
        const auto at = id(ids, i, from);
        out.set(i, at ? in[(i / (count * right) * from + *at) * right + i % right] : 0);
    }
}

// Sizes of what is added or put at ids: `left` x `count` x `right` elements, into `left` x `to` x `right`.
struct Scattered {
    size_t left, count, to, right;
};

void scatter(const Launch &l, const Scattered &s, const Tensor &ids, bool ids_of_all, const Address tensors[2], bool adds) {
    const Tensor in = contiguous("in", l.type, tensors[0], s.left * s.count * s.right);
    const Tensor out = contiguous("out", l.type, tensors[1], s.left * s.to * s.right);
    for (size_t i = 0; i < s.left * s.count * s.right; i++) {
        const size_t which = i / s.right % s.count;
        const auto at = id(ids, ids_of_all ? i : which, s.to);
        if (!at) continue;
        const size_t into = (i / (s.count * s.right) * s.to + *at) * s.right + i % s.right;
        out.set(into, adds ? out[into] + in[i] : in[i]);
    }
}

void index_add(const Launch &l) {
    const Scattered s = {l.args[4], l.args[1], l.args[6], l.args[7]};
    scatter(l, s, contiguous("ids", l.other, l.args[0], s.count), false, &l.args[2], true);
}

Operation scattering(bool adds) {
    return {2, "pppnnnn", [adds](const Launch &l) {
        const Scattered s = {l.args[3], l.args[4], l.args[5], l.args[6]};
        scatter(l, s, contiguous("ids", l.other, l.args[0], s.left * s.count * s.right), true, &l.args[1], adds);
    }};
}

// --- all of them

const std::map<std::string, Operation> &operations() {
    static const std::map<std::string, Operation> all = {
        {"ucopy", unary([](double x) { return x; })},
        {"uabs", unary([](double x) { return std::fabs(x); })},
        {"uneg", unary([](double x) { return -x; })},
        {"urecip", unary([](double x) { return 1 / x; })},
        {"uexp", unary([](double x) { return std::exp(x); })},
        {"ulog", unary([](double x) { return std::log(x); })},
        {"usqr", unary([](double x) { return x * x; })},
        {"usqrt", unary([](double x) { return std::sqrt(x); })},
        {"usilu", unary([](double x) { return x / (1 + std::exp(-x)); })},
        {"badd", binary(add)},
        {"bsub", binary([](double x, double y) { return x - y; })},
        {"bmul", binary([](double x, double y) { return x * y; })},
        {"bdiv", binary([](double x, double y) { return x / y; })},
        {"bmaximum", binary([](double x, double y) { return std::fmax(x, y); })},
        {"bminimum", binary([](double x, double y) { return std::fmin(x, y); })},
        {"eq", comparison([](double x, double y) { return (double)(x == y); })},
        {"ne", comparison([](double x, double y) { return (double)(x != y); })},
        {"lt", comparison([](double x, double y) { return (double)(x < y); })},
        {"le", comparison([](double x, double y) { return (double)(x <= y); })},
        {"gt", comparison([](double x, double y) { return (double)(x > y); })},
        {"ge", comparison([](double x, double y) { return (double)(x >= y); })},
        {"cast", {2, "nnppp", cast}},
        {"affine", {1, "nnpppvv", affine}},
        {"const_set", {1, "nnpvp", const_set}},
        {"where", {2, "nnppppp", where}},
        {"copy2d", {1, "ppwwww", copy2d}},
        {"fast_sum", reduction(0, add)},
        {"fast_sum_small", {1, "nnnppp", fast_sum_small}},
        {"fast_max", reduction(-INFINITY, [](double x, double y) { return std::fmax(x, y); })},
        {"fast_min", reduction(INFINITY, [](double x, double y) { return std::fmin(x, y); })},
        {"is", {2, "nnppppnnnn", index_select}},
        {"gather", {2, "npppnnnn", gather}},
        {"ia", {2, "pnppnnnn", index_add}},
        {"sa", scattering(true)},
        {"s", scattering(false)},
    };
    return all;
}

struct Kernel {
    const Operation *operation;
    Type type, other;

    // The bytes of each argument.
    std::vector<size_t> sizes() const {
        std::vector<size_t> sizes;
        for (const char kind : operation->args)
            sizes.push_back(kind == 'w' ? sizeof(uint32_t) : kind == 'v' ? bytes_of(type) : sizeof(uint64_t));
        return sizes;
    }
    void run(std::vector<uint64_t> args, size_t blocks, size_t threads) const {
        operation->run({type, other, std::move(args), blocks, threads});
    }
};

// Takes the type from a name's end.
std::optional<Type> cut_type(std::string &name) {
    const size_t at = name.rfind('_');
    const auto type = at == std::string::npos ? TYPES.end() : TYPES.find(name.substr(at + 1));
    if (type == TYPES.end()) return std::nullopt;
    name.erase(at);
    return type->second;
}

std::optional<Kernel> find(std::string name) {
    std::optional<Type> type = cut_type(name), other = type;
    for (size_t types = 1; type && other && types <= 2; types++) {
        const auto found = operations().find(name);
        if (found != operations().end() && found->second.types == types) return Kernel{&found->second, *type, *other};
        other = cut_type(name);
    }
    return std::nullopt;
}
} // namespace
} // namespace candle
