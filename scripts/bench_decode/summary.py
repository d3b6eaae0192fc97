"""Medians of an output of run.sh, and how they stand against the bars.

    python scripts/bench_decode/summary.py OUTPUT.jsonl

Prints two Markdown tables: the median rate of every engine with its smallest and largest, and each bar as a ratio of medians.
Engines that were not run leave their bars out. Needs nothing beyond Python itself.
"""

import json
import sys
from statistics import median


def name_of(row):
    """An engine's line, or a strategy of ours."""
    if "engine" in row:
        return row["engine"]
    parts = [row["strategy"]] + [flag for flag in ("vbs", "fcr") if row[flag]]
    parts += ["cost"] if row.get("cost_model") else []
    return f"lengthwise {' + '.join(parts)}, {row['batch_size']} slots"


def read(path):
    """Rates of every engine: {name: [(requests/s, tokens/s)]}, in the order of the first run."""
    rates = {}
    for line in open(path):
        value = json.loads(line)
        for row in value.get("strategies", [value]):
            rates.setdefault(name_of(row), []).append((row["samples_per_s"], row["tokens_per_s"]))
    return rates


def bars(rate):
    """(what, asked, reached), as far as both sides were run; `rate` has the median requests/s by name."""

    def best(names):
        found = [rate[name] for name in names if name in rate]
        return max(found) if found else None

    rows = []
    for slots in (16, 64):
        ours = rate.get(f"lengthwise continuous, {slots} slots")
        vllm = best([f"vllm {mode}, {slots} slots" for mode in ("compiled", "eager")])
        rows.append((f"continuous against vLLM's better mode, {slots} slots", 1.3, ours, vllm))
        rows.append((f"continuous against llama.cpp f32, {slots} slots", 2.0, ours, best([f"llama.cpp f32, {slots} slots"])))
    ours = rate.get("lengthwise continuous, 16 slots")
    rows.append(("continuous, 16 slots, against transformers vanilla", 6.0, ours, best(["transformers vanilla"])))
    rows.append(("continuous, 16 slots, against transformers published", 3.0, ours, best(["transformers published"])))
    return [(what, asked, ours / peer) for what, asked, ours, peer in rows if ours and peer]


def main(path):
    rates = read(path)
    print("| engine | requests/s | smallest to largest | tokens/s | runs |\n|---|---|---|---|---|")
    for name, runs in rates.items():
        samples = [r for r, _ in runs]
        tokens = median(t for _, t in runs)
        spread = f"{min(samples):.2f} to {max(samples):.2f}"
        print(f"| {name} | {median(samples):.2f} | {spread} | {tokens:,.0f} | {len(runs)} |")
    print("\n| bar | asked | reached |\n|---|---|---|")
    for what, asked, reached in bars({name: median(r for r, _ in runs) for name, runs in rates.items()}):
        print(f"| {what} | {asked} | {reached:.2f}{'' if reached >= asked else ' (missed)'} |")


if __name__ == "__main__":
    main(sys.argv[1])
