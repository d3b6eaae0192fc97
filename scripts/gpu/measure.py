"""Checks and measures everything on one machine with a GPU, part by part; run.sh sets up what it needs.

    python scripts/gpu/measure.py OUTPUT LENGTHS [--seconds 570] [--only PART,... | --second] [--dry]

Each part of parts.py is a process with a time limit of its own: one that fails or hangs leaves the others running. After
each part OUTPUT/results.json and results.md are written anew (results.py), so a run that is cut off loses one part. What a
part printed is in OUTPUT/PART.out and .err.

--only: these parts, and what they need that is not there yet, beside the results that OUTPUT has.
--second: likewise, what a first call had no time for, and what is left for a second.
--dry: all parts on the CPU with the bundled model and a few short requests, to see that the scripts themselves work.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from parts import Part, parts
from results import Results, last_line, parsed

# Bytes of the random 7B weights, and some.
WEIGHTS_ROOM = 16 << 30
# GB of a card whose KV cache holds 256 requests of this work load, however long they become; half as many fit any other
# that holds the weights well.
LARGE_CARD = 120


def card() -> tuple[str, float]:
    """The GPU's name and its memory in GB."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20)
        name, mib = asked.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mib) * (1 << 20) / 1e9
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0.0


def models_folder() -> Path:
    """In memory where there is room for the weights, since they are read by every part."""
    shared = Path("/dev/shm")
    folder = shared / "lengthwise-models"
    if (folder / "7b").exists() or shared.exists() and shutil.disk_usage(shared).free > WEIGHTS_ROOM:
        return folder
    return Path("/tmp/lengthwise-models")


def with_libraries(binary: str, output: Path) -> str:
    """A script that runs the binary with the libraries of CUDA_LIBRARIES, which other programs may not like. A library that
    cannot be opened is named on standard error (toolchain.sh)."""
    script = output.resolve() / Path(binary).name
    libraries = os.environ.get("CUDA_LIBRARIES", "")
    program = f'CUDA_SHIM_DEBUG=1 LD_LIBRARY_PATH="{libraries}" exec "{Path(binary).resolve()}" "$@"'
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    return str(script)


def remove(part: Part, output: Path) -> None:
    """What an earlier run of the part made, so that it cannot be taken for this one's. Weights elsewhere stay."""
    for path in part.makes:
        if not path.is_relative_to(output):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # A folder that training was stopped in refuses another run.
    if part.name == "adapter":
        shutil.rmtree(output / "adapter", ignore_errors=True)


def ended(process: subprocess.Popen, limit: float) -> str | None:
    """Waits for a process. Why it failed, if it did; its own children end with it."""
    try:
        status = process.wait(limit)
        return f"ended with {status}" if status != 0 else None
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                print(f"process {process.pid} does not end", flush=True)


def run(part: Part, limit: float, output: Path) -> dict:
    """What came of a part: its seconds, and what it printed as JSON, or why it failed."""
    remove(part, output)
    out, err = output / f"{part.name}.out", output / f"{part.name}.err"
    began = time.monotonic()
    try:
        with open(out, "w") as stdout, open(err, "w") as stderr:
            # A group and no session of its own: whoever ends this script's session ends the part too.
            process = subprocess.Popen(part.command, stdout=stdout, stderr=stderr, process_group=0)
            failed = ended(process, limit)
    except OSError as error:
        failed = str(error)
    row = {"seconds": round(time.monotonic() - began, 1), "command": " ".join(part.command)}
    printed, said = out.read_text(errors="replace"), err.read_text(errors="replace")
    if failed:
        row["failed"] = f"{failed}: {last_line(said)}".rstrip(": ")
        row["cut_short"] = failed.startswith("stopped") and limit < part.limit
    # Lines that came before a failure count.
    return row | {"result": parsed(printed)} | Results.texts(printed, said)


def wanted(every: list[Part], args: argparse.Namespace, results: Results) -> list[Part]:
    """The parts that were asked for, and what they need that is not there yet; in their order."""
    if not args.only and not args.second:
        return every
    by_name = {part.name: part for part in every}
    names = args.only.split(",") if args.only else [part.name for part in every if results.is_left(part)]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"no part is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    chosen, ahead = set(), list(names)
    while ahead:
        name = ahead.pop()
        if name not in chosen:
            chosen.add(name)
            ahead += [need for need in by_name[name].needs if not results.has(by_name[need])]
    return [part for part in every if part.name in chosen]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--lengthwise", default="target/gpu/lengthwise")
    parser.add_argument("--kernel-tests", default="target/gpu/kernel-tests")
    parser.add_argument("--models", type=Path, help="where the random weights are, or are put")
    parser.add_argument("--slots", type=int, help="at which predictions are timed: memory must not bind")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--only", help="these parts, with commas, and what they need")
    parser.add_argument("--second", action="store_true", help="what is left after a first call")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if not args.lengths.is_file():
        parser.error(f"{args.lengths} is not there: the recorded lengths must be taken along")
    args.output, args.models = args.output.resolve(), args.models or models_folder()
    args.output.mkdir(parents=True, exist_ok=True)
    args.gpu, memory = ("", 0.0) if args.dry else card()
    args.slots = args.slots or (4 if args.dry else 256 if memory >= LARGE_CARD else 128)
    args.lengthwise = with_libraries(args.lengthwise, args.output)
    args.kernel_tests = with_libraries(args.kernel_tests, args.output)
    return args


def main() -> None:
    # Ended from outside, it ends its part.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = arguments()
    ends = time.monotonic() + args.seconds
    every = parts(args)
    results = Results(args, every)
    if not results.goes_on:
        for part in every:
            remove(part, args.output)
    print("goes on from the results that are there" if results.goes_on else "begins anew", flush=True)
    by_name = {part.name: part for part in every}
    for part in wanted(every, args, results):
        missing = [need for need in part.needs if not results.has(by_name[need])]
        left = ends - time.monotonic()
        # A part that was named is tried even so.
        if missing and part.name not in (args.only or "").split(","):
            row = {"skipped": f"without {', '.join(missing)}"}
        elif left < 5:
            row = {"skipped": "no time left", "cut_short": True}
        else:
            row = run(part, min(part.limit, left), args.output)
        results.add(part, row)
        print(f"{part.name}: {row.get('failed') or row.get('skipped') or 'ok'} {row.get('seconds', '')}", flush=True)
    print((args.output / "results.md").read_text())


if __name__ == "__main__":
    main()
