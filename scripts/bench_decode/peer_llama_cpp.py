"""llama.cpp on an exported work load, f32 weights, continuous batching.

    python scripts/bench_decode/peer_llama_cpp.py MODEL WORKLOAD SLOTS [--tokens FILE] [settings]

Needs llama-cpp-python 0.3.36 built from source (GGML_NATIVE, the default), gguf, safetensors and numpy. Each slot is a
sequence; a free one takes the next request at once, whose prompt runs in the same `llama_decode` as the others' next
tokens. Greedy, each answer exactly as long as recorded. Prints one JSON line; `--tokens` writes the answers' tokens, for
check_tokens.py. The defaults of the settings are the fastest that were found (docs/benchmarks/decode.md).
"""

import argparse
import ctypes
import json
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from convert_gguf import convert

GGML_TYPES = {"f32": 0, "f16": 1}
FLASH = {"on": 1, "off": 0}


def view(pointer, kind, n):
    """A numpy array over memory of llama.cpp's."""
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (n,))


class Batch:
    """A llama_batch that is filled token by token or prompt by prompt."""

    def __init__(self, capacity):
        self.raw = llama_cpp.llama_batch_init(capacity, 0, 1)
        self.token = view(self.raw.token, ctypes.c_int32, capacity)
        self.position = view(self.raw.pos, ctypes.c_int32, capacity)
        self.wanted = view(self.raw.logits, ctypes.c_int8, capacity)
        counts = view(self.raw.n_seq_id, ctypes.c_int32, capacity)
        counts[:] = 1
        self.sequence = [view(self.raw.seq_id[i], ctypes.c_int32, 1) for i in range(capacity)]
        self.capacity = capacity
        self.n = 0

    def add(self, sequence, start, tokens, wants_last):
        """Appends tokens of a sequence; returns the place of the last."""
        n, end = self.n, self.n + len(tokens)
        self.token[n:end] = tokens
        self.position[n:end] = np.arange(start, start + len(tokens))
        self.wanted[n:end] = 0
        self.wanted[end - 1] = wants_last
        for i in range(n, end):
            self.sequence[i][0] = sequence
        self.n = end
        return end - 1


class Engine:
    def __init__(self, file, args, longest):
        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        assert self.model, f"llama.cpp does not read {file}"
        context = llama_cpp.llama_context_default_params()
        # llama.cpp divides the context among the sequences and rounds it up itself.
        context.n_ctx = args.slots * (-(-longest // 32) * 32)
        context.n_batch = args.n_batch
        context.n_ubatch = args.n_ubatch
        context.n_seq_max = args.slots
        context.n_threads = context.n_threads_batch = args.threads
        context.flash_attn_type = FLASH[args.flash]
        context.type_k = context.type_v = GGML_TYPES[args.kv]
        context.kv_unified = args.unified
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        assert self.context, "llama.cpp makes no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = Batch(args.n_batch)
        self.slots = args.slots

    def greedy(self, place):
        logits = view(llama_cpp.llama_get_logits_ith(self.context, place), ctypes.c_float, self.vocab)
        return int(logits.argmax())

    def run(self, requests):
        """The tokens of every answer, in the order of the requests."""
        answers = [[] for _ in requests]
        waiting = list(range(len(requests)))[::-1]
        free = list(range(self.slots))[::-1]
        running = {}  # slot: [request, tokens in the cache]
        while waiting or running:
            batch, places = self.batch, {}
            batch.n = 0
            while free and waiting:
                slot = free.pop()
                llama_cpp.llama_memory_seq_rm(self.memory, slot, -1, -1)
                running[slot] = [waiting.pop(), 0]
            # One token of each answer, then as much of the prompts as fits.
            for slot, (request, done) in running.items():
                if answers[request]:
                    places[slot] = batch.add(slot, done, answers[request][-1:], True)
                    running[slot][1] += 1
            for slot, (request, done) in running.items():
                prompt = requests[request]["prompt"]
                room = batch.capacity - batch.n
                if not answers[request] and room:
                    part = prompt[done : done + room]
                    ends = done + len(part) == len(prompt)
                    place = batch.add(slot, done, part, ends)
                    running[slot][1] += len(part)
                    if ends:
                        places[slot] = place
            batch.raw.n_tokens = batch.n
            code = llama_cpp.llama_decode(self.context, batch.raw)
            assert code == 0, f"llama_decode: {code}"
            for slot, place in places.items():
                request = running[slot][0]
                answers[request].append(self.greedy(place))
                if len(answers[request]) == requests[request]["tokens"]:
                    del running[slot]
                    free.append(slot)
        return answers


def main(args):
    requests = [json.loads(line) for line in open(args.workload)]
    tokens = sum(r["tokens"] for r in requests)
    longest = max(len(r["prompt"]) + r["tokens"] for r in requests)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        convert(Path(args.model), file)
        engine = Engine(file, args, longest)
        engine.run(requests[:4])
        began = time.perf_counter()
        answers = engine.run(requests)
        seconds = time.perf_counter() - began
    assert [len(a) for a in answers] == [r["tokens"] for r in requests]
    if args.tokens:
        Path(args.tokens).write_text("".join(json.dumps(a) + "\n" for a in answers))
    row = {"engine": f"llama.cpp f32, {args.slots} slots", "seconds": seconds}
    row |= {"samples_per_s": len(requests) / seconds, "tokens_per_s": tokens / seconds}
    row |= {"settings": f"n_batch {args.n_batch}, n_ubatch {args.n_ubatch}, flash {args.flash}, kv {args.kv}"}
    row["settings"] += ", unified" if args.unified else ""
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("slots", type=int)
    parser.add_argument("--tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-batch", type=int, default=2048)
    parser.add_argument("--n-ubatch", type=int, default=512)
    parser.add_argument("--flash", choices=FLASH, default="on")
    parser.add_argument("--kv", choices=GGML_TYPES, default="f16")
    parser.add_argument("--unified", action="store_true")
    main(parser.parse_args())
