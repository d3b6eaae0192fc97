"""LoRA steps of PEFT + transformers and of `lengthwise train`, side by side on the same model and batch shapes.

    python scripts/bench_decode/make_models.py MODELS
    python scripts/bench_train.py MODELS [--lengthwise target/release/lengthwise] [--steps 20] [--models-used 5m,110m]

On a GPU: `--device cuda --dtype bf16 --shapes 8x512`; peak memory is then what nvidia-smi says of the card. Rank 8 on q_proj and v_proj, f32, no dropout, loss on the last two to four tokens of every sequence (the printed length).
Each measurement is a process of its own; peak memory is its resident set as the system counts it. PEFT runs the step that
its users run: all logits, labels of -100 where there is no loss. Prints one JSON line per run: trained tokens per second,
loading left out, and peak MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPES = [(8, 128), (4, 512)]
TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"


def peft_run(args, folder: str, batch: int, length: int, checkpointing: bool) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    steps, device = args.steps, args.device
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.manual_seed(0)
    ids = torch.randint(2, 1000, (batch, length)).to(device)
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    mask = torch.ones_like(ids)

    def step():
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    step()
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return {"tokens": batch * length * steps, "seconds": time.perf_counter() - began}


def pairs(path: Path, count: int, length: int) -> None:
    """Pairs whose whole training sequence has exactly `length` tokens of the bundled tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    # Whatever the template and the question add is the same for every pair: found by measuring one.
    words = "red " * length
    with open(path, "w") as out:
        for i in range(count):
            instruction = words
            while len(tokenizer.encode(instruction).ids) > length - 60:
                instruction = instruction[4:]
            out.write(json.dumps({"id": str(i), "instruction": instruction, "label": 120, "lengths": [120]}) + "\n")


def lengthwise_run(args, folder: str, batch: int, length: int, checkpointing: bool) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "pairs.jsonl"
        pairs(data, batch, length)

        def train(count: int) -> dict:
            command = [args.lengthwise, "train", "--model", folder, "--data", str(data), "--json", "-q"]
            command += ["--device", args.device, "--dtype", args.dtype]
            command += ["--output", f"{temporary}/{count}", "--batch-size", str(batch), "--epochs", "100000"]
            command += ["--max-steps", str(count), "--lora-dropout", "0", "--save-steps", "1000000"]
            command += ["--gradient-checkpointing"] if checkpointing else []
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        # Two runs, so that what belongs to no step (reading, saving) cancels.
        short, long = train(1), train(1 + args.steps)
    return {"tokens": long["tokens"] - short["tokens"], "seconds": long["seconds"] - short["seconds"]}


class Card:
    """The most memory that the GPU had in use, asked for ten times a second."""

    def __init__(self) -> None:
        self.most, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(0.1):
            self.most = max(self.most, int(subprocess.run(query, capture_output=True, text=True).stdout.split()[0]))

    def peak(self) -> int:
        self.done.set()
        self.thread.join()
        return self.most


def child(arguments: list[str]) -> dict:
    """Runs this script for one measurement and adds the peak memory of it and of what it starts."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, __file__, *arguments])
    os.close(write)
    with os.fdopen(read) as pipe:
        out = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {arguments}")
    row = json.loads(out.splitlines()[-1])
    row.setdefault("peak_mib", usage.ru_maxrss / 1024)
    row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--lengthwise", default="target/release/lengthwise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models-used", default="5m,110m")
    parser.add_argument("--shapes", default=",".join(f"{batch}x{length}" for batch, length in SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--engines", default="peft,lengthwise,checkpointing", help="checkpointing: ours, with it; peft_checkpointing: theirs")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        engine, name, batch, length = args.one
        folder, batch, length = str(args.models / name), int(batch), int(length)
        card = Card() if args.device != "cpu" else None
        if engine.startswith("peft"):
            row = peft_run(args, folder, batch, length, engine == "peft_checkpointing")
        else:
            row = lengthwise_run(args, folder, batch, length, engine == "checkpointing")
            import resource

            row["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        if card:
            row["peak_mib"] = card.peak()
        print(json.dumps(row))
        return
    for name in args.models_used.split(","):
        for batch, length in (shape.split("x") for shape in args.shapes.split(",")):
            for engine in args.engines.split(","):
                common = [str(args.models), "--lengthwise", args.lengthwise, "--steps", str(args.steps)]
                common += ["--device", args.device, "--dtype", args.dtype]
                row = child([*common, "--one", engine, name, batch, length])
                print(json.dumps({"model": name, "batch": f"{batch} x {length}", "engine": engine} | row), flush=True)


if __name__ == "__main__":
    main()
