"""Checks and measures everything on one machine with a GPU, part by part; run.sh sets up what it needs.

    python scripts/gpu/measure.py OUTPUT LENGTHS [--seconds 570] [--only PART,...] [--dry]

Each part is a process with a time limit of its own: one that fails or hangs leaves the others running. After each part
OUTPUT/results.json and OUTPUT/results.md are written anew, so a run that is cut off loses one part. What a part printed is
in OUTPUT/PART.out and .err.

--dry: the same parts on the CPU with the bundled model and a few short requests, to see that the script itself works.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bars import bars

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "data" / "tiny"


@dataclass
class Part:
    """A command, the seconds that it may take, and the parts without which it is of no use."""

    name: str
    limit: float
    command: list[str]
    needs: list[str] = field(default_factory=list)


def parts(args: argparse.Namespace) -> list[Part]:
    """In the order of what the bars need most."""
    lengthwise, model, python = args.lengthwise, str(args.models / "7b"), sys.executable
    device, dtype, torch_dtype, few, many, most, sizes = "cuda", "bf16", "bfloat16", 256, 1024, 1024, "1,16,64,256"
    if args.dry:
        device, dtype, torch_dtype, few, many, most, sizes = "cpu", "f32", "float32", 6, 8, 8, "1,2"
        model = str(TINY)
    common = ["--device", device, "--model", model, "-q", "--json"]
    bench = [lengthwise, "bench", *common, "--replay", str(args.lengths), "--prompt-tokens", "32", "128"]
    if args.dry:
        bench += ["--divide-lengths", "16"]
    workload, adapter, pairs = args.output / "workload.jsonl", args.output / "adapter", args.output / "pairs.jsonl"
    sorting = ["--vbs", "--fcr", "--planner", "published,cost", "--noise-mae", "62"]
    made = [] if args.dry else ["make_7b"]
    tests = ["gpu", "--test-threads", "1"]
    sanitizer = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "3", "--tool"]
    profile = [lengthwise, "profile", *common, "--batch-sizes"]
    step = [*profile, sizes.split(",")[1], "--contexts", "128"]
    # The ways that products of few rows are computed, and what each took, go to profile.err.
    chosen, by_blas = ["env", "RUST_LOG=lengthwise_model::gpu::products=debug"], ["env", "LENGTHWISE_GPU_PRODUCTS=blas"]

    def continuous(slots: int, requests: int) -> list[str]:
        return [*bench, "--strategy", "continuous", "--batch-size", str(slots), "--num", str(requests)]

    # As long prompts and answers in the order of arrival, predicted in the passes that answer them and not predicted.
    in_order = [*continuous(most, many), "--order", "fcfs"]
    train = [lengthwise, "train", *common, "--dtype", dtype, "--data", str(pairs), "--output", str(adapter)]
    # --resume: one that an earlier run of this script made serves again.
    train += ["--objective", "head", "--alora", "--resume"]
    evaluate = [lengthwise, "eval", *common, "--adapter", str(adapter), "--data"]
    trained = [python, str(HERE.parent / "bench_train.py"), str(TINY.parent if args.dry else args.models)]
    trained += ["--lengthwise", lengthwise, "--models-used", "tiny" if args.dry else "7b", "--device", device]
    trained += ["--dtype", dtype, *(["--shapes", "2x64", "--steps", "2"] if args.dry else ["--shapes", "8x512", "--steps", "5"])]
    return [
        Part("machine", 20, ["nvidia-smi"] if not args.dry else ["uname", "-a"]),
        Part("kernels", 90, [args.kernel_tests, *tests]),
        Part("copy_rate", 60, [python, str(HERE / "copy_rate.py")]),
        Part("answers", 60, [str(HERE / "same_answers.sh"), lengthwise, device]),
        *([] if args.dry else [Part("make_7b", 120, [python, str(HERE / "make_7b.py"), model])]),
        Part("profile", 90, [*chosen, *profile, sizes, "--contexts", "128,512"], made),
        Part("continuous_most", 90, continuous(most, many), made),
        Part("vanilla_16", 120, [*bench, "--strategy", "vanilla", "--batch-size", "16", "--num", str(few)], made),
        Part("continuous_256", 90, continuous(256, many), made),
        Part("workload", 60, [*continuous(64, few), "--export-workload", str(workload)], made),
        Part(
            "peer_hf",
            120,
            [python, str(HERE.parent / "bench_decode" / "peer_hf.py"), model, str(workload), "vanilla"]
            + ["--num", "2" if args.dry else "32", "--device", device, "--dtype", torch_dtype],
            ["workload"],
        ),
        Part("continuous_16", 90, continuous(16, few), made),
        Part("pairs", 20, [python, str(HERE / "pairs.py"), str(pairs), "16" if args.dry else "1024"]),
        Part("adapter", 60, [*train, "--max-steps", "1", "--batch-size", "4"], [*made, "pairs"]),
        Part("predict_1", 40, [*evaluate, str(pairs) + ".1"], ["adapter"]),
        Part("predict_all", 60, [*evaluate, str(pairs)], ["adapter"]),
        Part("in_order", 60, in_order, made),
        Part("in_passes", 60, [*in_order, "--adapter", str(adapter)], ["adapter"]),
        Part("train", 90, [*trained, "--engines", "lengthwise"], made),
        Part("train_peft", 60, [*trained, "--engines", "peft"], made),
        Part("train_checkpointing", 90, [*trained, "--engines", "checkpointing"], made),
        Part("profile_blas", 60, [*by_blas, *step], made),
        Part("profile_late", 60, ["env", "LENGTHWISE_NO_EARLY_KERNELS=1", *step], made),
        Part("sorted_16", 150, [*bench, "--strategy", "seqsch", *sorting, "--batch-size", "16", "--num", str(few)], made),
        Part("continuous_64", 90, continuous(64, many), made),
        Part("memcheck", 150, [*sanitizer, "memcheck", args.kernel_tests, *tests]),
        Part("racecheck", 150, [*sanitizer, "racecheck", args.kernel_tests, *tests]),
        Part("vanilla_all", 240, [*bench, "--strategy", "vanilla", "--batch-size", "16", "--num", str(many)], made),
    ]


def with_libraries(binary: str, output: Path) -> str:
    """A script that runs the binary with the libraries of CUDA_LIBRARIES, which other programs may not like."""
    script = output.resolve() / Path(binary).name
    libraries = os.environ.get("CUDA_LIBRARIES", "")
    script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{Path(binary).resolve()}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def run(part: Part, limit: float, output: Path) -> dict:
    """What came of a part: its seconds, and what it printed as JSON, or why it failed."""
    out, err = output / f"{part.name}.out", output / f"{part.name}.err"
    began = time.monotonic()
    try:
        with open(out, "w") as stdout, open(err, "w") as stderr:
            process = subprocess.Popen(part.command, stdout=stdout, stderr=stderr, start_new_session=True)
            try:
                status = process.wait(limit)
                failed = f"ended with {status}" if status != 0 else None
            except subprocess.TimeoutExpired:
                # Its own children, too.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                failed = f"stopped after {limit:.0f} s"
    except OSError as error:
        failed = str(error)
    row = {"seconds": round(time.monotonic() - began, 1), "command": " ".join(part.command)}
    if failed:
        last = (err.read_text(errors="replace").strip().splitlines() or [""])[-1]
        row["failed"] = f"{failed}: {last[:300]}".rstrip(": ")
    # Lines that came before a failure count.
    row["result"] = parsed(out.read_text(errors="replace"))
    return row


def parsed(text: str) -> object:
    """One JSON value, a list of several lines of JSON, or the text's last lines."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            return text[-2000:]
    return rows


def write(output: Path, results: dict) -> None:
    """results.json and results.md as far as the run has come."""
    results["bars"] = bars(results["parts"])
    staged = output / "results.json.new"
    staged.write_text(json.dumps(results, indent=1) + "\n")
    staged.replace(output / "results.json")
    lines = [f"# GPU run, commit {results['commit']}{', on the CPU (dry)' if results['dry'] else ''}", ""]
    lines += ["| bar | asked | reached |", "|---|---|---|"]
    lines += [f"| {b['bar']} | {b['asked']} | {b['reached']} |" for b in results["bars"]]
    lines += ["", "| part | seconds | |", "|---|---|---|"]
    for name, row in results["parts"].items():
        lines.append(f"| {name} | {row.get('seconds', '')} | {row.get('failed') or row.get('skipped') or ''} |")
    (output / "results.md").write_text("\n".join(lines) + "\n")


def commit() -> str:
    """Of the working tree; empty where it is a copy, or there is no git."""
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--lengthwise", default="target/gpu/lengthwise")
    parser.add_argument("--kernel-tests", default="target/gpu/kernel-tests")
    parser.add_argument("--models", type=Path, default=Path("/tmp/lengthwise-models"))
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--only", help="these parts alone, with commas")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.lengthwise = with_libraries(args.lengthwise, args.output)
    args.kernel_tests = with_libraries(args.kernel_tests, args.output)
    only = args.only.split(",") if args.only else None
    results = {"commit": os.environ.get("COMMIT") or commit(), "dry": args.dry, "parts": {}}
    ends = time.monotonic() + args.seconds
    for part in parts(args):
        if only and part.name not in only:
            continue
        missing = [need for need in part.needs if "failed" in (row := results["parts"].get(need, {})) or "skipped" in row]
        left = ends - time.monotonic()
        if missing:
            row = {"skipped": f"without {', '.join(missing)}"}
        elif left < 5:
            row = {"skipped": "no time left"}
        else:
            row = run(part, min(part.limit, left), args.output)
        results["parts"][part.name] = row
        write(args.output, results)
        print(f"{part.name}: {row.get('failed') or row.get('skipped') or 'ok'} {row.get('seconds', '')}", flush=True)
    print((args.output / "results.md").read_text())


if __name__ == "__main__":
    main()
