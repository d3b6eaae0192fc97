"""Hugging Face `generate` on an exported work load: static batches as the published code runs them.

    python scripts/bench_decode/peer_hf.py MODEL WORKLOAD vanilla|published... [--num N] [--device cuda] [--dtype bfloat16]

`vanilla`: batches of 16 in order of arrival. `published`: sorted by the true length, variable batch sizes, each batch
until its longest ends (oracle + VBS + FCR with nothing to fail). Prints one JSON line per mode. Before the first, 16 of the
requests are answered with 8 tokens each.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

VARIABLE_BATCH_SIZES = [(50, 256), (100, 128), (150, 64), (200, 32)]


def batches(requests, mode):
    if mode == "vanilla":
        return [requests[i : i + 16] for i in range(0, len(requests), 16)]
    bins = {}
    for request in requests:
        bins.setdefault(-(-request["tokens"] // 50) * 50, []).append(request)
    out = []
    bounds = sorted(bins)
    for i, bound in enumerate(bounds):
        size = next((size for limit, size in VARIABLE_BATCH_SIZES if bound <= limit), 16)
        rows = bins[bound]
        rest = len(rows) % size
        if i + 1 < len(bounds) and rest < max(size // 2, 16):
            bins[bounds[i + 1]] = bins[bounds[i + 1]] + rows[len(rows) - rest :]
            rows = rows[: len(rows) - rest]
        out += [rows[j : j + size] for j in range(0, len(rows), size)]
    return out


def run(model, requests, mode):
    began = time.perf_counter()
    for batch in batches(requests, mode):
        longest = max(len(r["prompt"]) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            n = len(request["prompt"])
            ids[row, longest - n :] = torch.tensor(request["prompt"])
            mask[row, longest - n :] = 1
        steps = max(r["tokens"] for r in batch)
        ids, mask = ids.to(model.device), mask.to(model.device)
        model.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("modes", nargs="+", choices=["vanilla", "published"])
    parser.add_argument("--num", type=int, help="only the first so many requests")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    requests = [json.loads(line) for line in open(args.workload)][: args.num]
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(args.device)
    model.generation_config.pad_token_id = 0
    tokens = sum(r["tokens"] for r in requests)
    with torch.inference_mode():
        # As many rows as a static batch has, so that what is done once for a batch of that size is done.
        run(model, [request | {"tokens": min(request["tokens"], 8)} for request in requests[:16]], "vanilla")
        for mode in args.modes:
            seconds = run(model, requests, mode)
            row = {"engine": f"transformers {mode}", "requests": len(requests), "seconds": seconds}
            row |= {"samples_per_s": len(requests) / seconds, "tokens_per_s": tokens / seconds}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
