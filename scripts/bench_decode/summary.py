"""Medians of outputs of run.sh, how they stand against the bars, and a figure of them.

    python scripts/bench_decode/summary.py OUTPUT.jsonl...          # both models: 5m.jsonl 110m.jsonl
    python scripts/bench_decode/summary.py --better OUTPUT.jsonl SLOTS

Prints two Markdown tables for each output: the median rate of every engine with its smallest and largest, and each bar as a
ratio of medians; engines that were not run leave their bars out. Writes the same as JSON beside each output (5m.json), and
draws all of them with `lengthwise report` into a folder beside the first (5m-report: SVG, PNG, index.html), where the binary
is ($LENGTHWISE, target/release/lengthwise or the PATH). `--better` prints which of vLLM's modes has been faster at a number
of slots. Needs nothing beyond Python itself.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

VLLM_MODES = ("compiled", "eager")


def name_of(row, cache):
    """An engine's line, or a strategy of ours; with the dtype of the KV cache where that is not the weights'."""
    if "engine" in row:
        return row["engine"]
    parts = [row["strategy"]] + [flag for flag in ("vbs", "fcr") if row[flag]]
    parts += ["cost"] if row.get("cost_model") else []
    cache = f", {cache} cache" if cache else ""
    return f"lengthwise {' + '.join(parts)}, {row['batch_size']} slots{cache}"


def read(path):
    """Rates of every engine, {name: [(requests/s, tokens/s)]} in the order of the first run; the setup; and the notes."""
    rates, setup, notes = {}, {}, []
    for number, line in enumerate(open(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            print(f"{path}, line {number}: cut short, passed over", file=sys.stderr)
            continue
        if "note" in value:
            notes += [] if value["note"] in notes else [value["note"]]
        elif "setup" in value:
            setup |= value["setup"]
        else:
            for row in value.get("strategies", [value]):
                rates.setdefault(name_of(row, value.get("cache")), []).append((row["samples_per_s"], row["tokens_per_s"]))
    return rates, setup, notes


def bars(rate):
    """(what, asked, reached), as far as both sides were run; `rate` has the median requests/s by name."""

    def best(*names):
        found = [rate[name] for name in names if name in rate]
        return max(found) if found else None

    def ours(strategy, slots=16):
        return best(f"lengthwise {strategy}, {slots} slots")

    rows = []
    for slots in (16, 64):
        vllm = best(*(f"vllm {mode}, {slots} slots" for mode in VLLM_MODES))
        continuous = ours("continuous", slots)
        rows.append((f"continuous against vLLM's better mode, {slots} slots", 1.3, continuous, vllm))
        llama = best(f"llama.cpp f32, {slots} slots")
        rows.append((f"continuous against llama.cpp f32, {slots} slots", 2.0, continuous, llama))
    continuous = ours("continuous")
    rows.append(("continuous, 16 slots, against transformers vanilla", 6.0, continuous, best("transformers vanilla")))
    rows.append(("continuous, 16 slots, against transformers published", 3.0, continuous, best("transformers published")))
    rows.append(("continuous against vanilla, 16 slots", 2.6, continuous, ours("vanilla")))
    for strategy, known in (("oracle", "lengths known"), ("seqsch", "lengths predicted")):
        what = f"cost planner against the published rules, {known}"
        rows.append((what, 1.25, ours(f"{strategy} + fcr + cost"), ours(f"{strategy} + vbs + fcr")))
    return [(what, asked, one / other) for what, asked, one, other in rows if one and other]


def spread(values):
    return {"median": median(values), "least": min(values), "most": max(values)}


def summary(path):
    """What `lengthwise report` draws of one output."""
    rates, setup, notes = read(path)
    engines = []
    for name, runs in rates.items():
        samples, tokens = (spread([run[i] for run in runs]) for i in (0, 1))
        engines.append({"engine": name, "runs": len(runs), "samples_per_s": samples, "tokens_per_s": tokens})
    reached = bars({row["engine"]: row["samples_per_s"]["median"] for row in engines})
    rows = [{"bar": what, "asked": asked, "reached": ratio} for what, asked, ratio in reached]
    return {"setup": setup, "engines": engines, "bars": rows, "notes": notes}


def tables(found):
    print("| engine | requests/s | smallest to largest | tokens/s | runs |\n|---|---|---|---|---|")
    for row in found["engines"]:
        rate = row["samples_per_s"]
        between = f"{rate['least']:.2f} to {rate['most']:.2f}"
        tokens = row["tokens_per_s"]["median"]
        print(f"| {row['engine']} | {rate['median']:.2f} | {between} | {tokens:,.0f} | {row['runs']} |")
    print("\n| bar | asked | reached |\n|---|---|---|")
    for row in found["bars"]:
        missed = "" if row["reached"] >= row["asked"] else " (missed)"
        print(f"| {row['bar']} | {row['asked']} | {row['reached']:.2f}{missed} |")
    for note in found["notes"]:
        print(f"\n{note}")


def draw(files):
    """The figures of all summaries, by `lengthwise report`."""
    built = Path(__file__).resolve().parents[2] / "target" / "release" / "lengthwise"
    binary = os.environ.get("LENGTHWISE") or (built if built.is_file() else shutil.which("lengthwise"))
    if not binary:
        print("no figure: there is no lengthwise binary (set LENGTHWISE)", file=sys.stderr)
        return
    folder = files[0].with_name(f"{files[0].stem}-report")
    command = [binary, "report", "-q", "--output", folder]
    for file in files:
        command += ["--input", file]
    if subprocess.run(command).returncode == 0:
        print(f"\nThe figures are in {folder}.")


def better(path, slots):
    rates, _, _ = read(path)
    found = {mode: rates.get(f"vllm {mode}, {slots} slots") for mode in VLLM_MODES}
    ran = {mode: median(run[0] for run in runs) for mode, runs in found.items() if runs}
    print(max(ran, key=ran.get) if ran else "")


def main(paths):
    files = []
    for path in map(Path, paths):
        found = summary(path)
        if not found["engines"]:
            print(f"{path}: nothing has run", file=sys.stderr)
            continue
        print(f"{chr(10) if files else ''}{path.stem}\n" if len(paths) > 1 else "", end="")
        tables(found)
        files.append(path.with_suffix(".json"))
        files[-1].write_text(json.dumps(found, indent=1) + "\n")
    if files:
        draw(files)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--better"]:
        better(sys.argv[2], sys.argv[3])
    elif sys.argv[1:]:
        main(sys.argv[1:])
    else:
        sys.exit(__doc__)
