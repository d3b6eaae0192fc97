// Kernels by their names: our own, run on the emulator, and candle's. Includes what a launch is refused for.
#pragma once
#include "candle.h"
#include "stream.h"

namespace {
// Dynamic shared memory of a block: given, and the most that a block may have where it is asked for.
constexpr int SHARED_GIVEN = 48 << 10, SHARED_MOST = 227 << 10;

using Sizes = std::vector<size_t>;

struct Function {
    std::string name;
    // The bytes of each argument.
    Sizes sizes;
    // None of ours.
    std::optional<candle::Kernel> candle;
    int shared = SHARED_GIVEN;
};

struct Module {
    // What a text of PTX declares: candle's modules are such texts, ours is not.
    std::map<std::string, Sizes> declared;
    std::map<std::string, Function> functions;
};

struct Grid {
    unsigned blocks[3], threads[3], shared;
};

size_t module_count, launches;

// The bytes of one declared argument: `.param .u64 NAME`, or `.param .align 2 .b8 NAME[2]`.
size_t declared_size(const std::string &text) {
    const size_t array = text.find('[');
    if (array != std::string::npos) return std::stoul(text.substr(array + 1));
    const size_t type = text.find_first_of("bsuf", text.find('.', 1));
    return std::stoul(text.substr(type + 1)) / 8;
}

std::map<std::string, Sizes> declarations(const std::string &ptx) {
    std::map<std::string, Sizes> all;
    const std::string entry = ".entry ", param = ".param";
    for (size_t at = ptx.find(entry); at != std::string::npos; at = ptx.find(entry, at)) {
        at += entry.size();
        const size_t open = ptx.find('(', at), close = ptx.find(')', open);
        Sizes &sizes = all[ptx.substr(at, open - at)];
        for (size_t p = ptx.find(param, open); p < close; p = ptx.find(param, p)) {
            p += param.size();
            sizes.push_back(declared_size(ptx.substr(p, ptx.find_first_of(",)", p) - p)));
        }
    }
    return all;
}

Module *load_module(const void *image) {
    // Other images begin with zeros and ones that make no text.
    const char *text = static_cast<const char *>(image);
    module_count++;
    return new Module{*text == '/' || *text == '.' || *text == '\n' ? declarations(text) : std::map<std::string, Sizes>(), {}};
}

int fail_to_load(const std::string &name, const char *why) {
    std::fprintf(stderr, "stand-in: kernel %s %s\n", name.c_str(), why);
    return NOT_FOUND;
}

// Finds a kernel of the module, the first time it is asked for.
int find_function(Module &module, const std::string &name, Function *&function) {
    const auto known = module.functions.find(name);
    if (known == module.functions.end()) {
        Function found = {name, {}, std::nullopt};
        if (module.declared.empty()) {
            const auto own = emulator::kernels().find(name);
            if (own == emulator::kernels().end()) return fail_to_load(name, "is none of ours");
            found.sizes = own->second.sizes;
        } else {
            found.candle = candle::find(name);
            if (!module.declared.count(name)) return fail_to_load(name, "is not in this module");
            if (!found.candle) return fail_to_load(name, "of candle's is not here");
            found.sizes = found.candle->sizes();
            if (found.sizes != module.declared[name]) return fail_to_load(name, "takes other arguments than here");
        }
        module.functions[name] = found;
    }
    function = &module.functions[name];
    return SUCCESS;
}

const char *refused(const Function &function, const Grid &grid) {
    const unsigned *blocks = grid.blocks, *threads = grid.threads;
    if (blocks[0] == 0 || blocks[1] == 0 || blocks[2] == 0 || blocks[1] > 65535 || blocks[2] > 65535) return "a bad grid";
    const size_t count = (size_t)threads[0] * threads[1] * threads[2];
    if (count == 0 || count > 1024 || threads[2] > 64) return "a bad block";
    return (int)grid.shared > function.shared ? "more shared memory than the function may have" : nullptr;
}

// The arguments' values. The program passes each of our own kernels' in a word of its own, one behind the other: so it shows
// where they are too few, or one is wider than the kernel takes.
const char *take_arguments(const Function &function, void **parameters, std::vector<uint64_t> &words) {
    words.assign(function.sizes.size(), 0);
    for (size_t i = 0; i < words.size(); i++) {
        const bool ours = !function.candle;
        if (ours && parameters[i] != static_cast<uint64_t *>(parameters[0]) + i) return "too few arguments";
        std::memcpy(&words[i], parameters[i], ours ? sizeof(uint64_t) : function.sizes[i]);
        if (function.sizes[i] < sizeof(uint64_t) && words[i] >> 8 * function.sizes[i] != 0) return "an argument is too large";
    }
    return nullptr;
}

// Our own kernels take pointers, integers and floats: what has 8 bytes is a pointer.
void run_own(const Function &function, std::vector<uint64_t> words, const Grid &grid) {
    std::vector<void *> arguments;
    for (size_t i = 0; i < words.size(); i++) {
        if (function.sizes[i] == sizeof(Address) && words[i] != 0 && !on_device.hold(words[i], 0))
            refuse("argument " + std::to_string(i) + " lies " + on_device.place(words[i]));
        arguments.push_back(&words[i]);
    }
    const char *why = emulator_launch(function.name.c_str(), grid.blocks, grid.threads, grid.shared, arguments.data(),
                                      arguments.size());
    if (why) refuse(why);
}

int launch(const void *stream, const Function &function, const Grid &grid, void **parameters) {
    std::vector<uint64_t> words;
    const char *why = refused(function, grid);
    if (!why) why = take_arguments(function, parameters, words);
    if (why) {
        std::fprintf(stderr, "stand-in: %s: %s\n", function.name.c_str(), why);
        return INVALID;
    }
    launches++;
    return put(stream, {function.name, [=] {
        if (!function.candle) return run_own(function, words, grid);
        function.candle->run(words, grid.blocks[0], grid.threads[0]);
    }});
}
} // namespace
