"""LoRA steps of PEFT + transformers and of `lengthwise train`, side by side on the same model and batch shapes.

    python scripts/bench_decode/make_models.py MODELS
    python scripts/bench_train.py MODELS [--lengthwise target/release/lengthwise] [--steps 20] [--models-used 5m,110m]

On a GPU: `--device cuda --dtype bf16 --shapes 8x512`; peak memory is then what nvidia-smi says of the card. Rank 8 on q_proj
and v_proj, no dropout, loss on the last two to four tokens of every sequence (the printed length). All sequences of both
sides have exactly as many tokens as the shape says. Each measurement is a process of its own; peak memory is its resident
set as the system counts it. PEFT runs the step that its users run: all logits, labels of -100 where there is no loss. Prints
one JSON line per run: trained tokens per second, loading left out, and peak MiB.
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
        # Nothing is generated: no cache of keys and values.
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
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


def pairs(path: Path, count: int, words: int) -> None:
    """So many equal pairs, with instructions of so many words, each a token of the bundled tokenizer."""
    pair = {"instruction": " ".join(["red"] * words), "label": 120, "lengths": [120]}
    path.write_text("".join(json.dumps({"id": str(i)} | pair) + "\n" for i in range(count)))


def end_with(status: int) -> None:
    """Ends where a process failed. It has said why itself, in what is then the last line, unless a signal ended it."""
    if status != 0:
        raise SystemExit(status if status > 0 else f"ended by signal {-status}")


def lengthwise_run(args, folder: str, batch: int, length: int, checkpointing: bool) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "pairs.jsonl"

        def train(name: str, count: int, words: int) -> dict:
            pairs(data, batch, words)
            command = [args.lengthwise, "train", "--model", folder, "--data", str(data), "--json", "-q"]
            command += ["--device", args.device, "--dtype", args.dtype]
            command += ["--output", f"{temporary}/{name}", "--batch-size", str(batch), "--epochs", "100000"]
            command += ["--max-steps", str(count), "--lora-dropout", "0", "--save-steps", "1000000"]
            command += ["--gradient-checkpointing"] if checkpointing else []
            # What it says on standard error is for whoever reads ours.
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            end_with(ended.returncode)
            return json.loads(ended.stdout)

        # The first run is thrown away: in it a driver compiles what it has not compiled before. Of its tokens those beside
        # the words are the template's, the question's and the answer's, the same for every pair.
        words = length // 2
        words += length - train("first", 1, words)["tokens"] // batch
        if words < 1:
            raise SystemExit(f"{length} tokens have no room for an instruction: at least {length + 1 - words} are needed")
        # Two runs, so that what belongs to no step (reading, saving) cancels.
        short, long = train("short", 1, words), train("long", 1 + args.steps, words)
    row = {"tokens": long["tokens"] - short["tokens"], "seconds": long["seconds"] - short["seconds"]}
    if row["tokens"] != args.steps * batch * length:
        raise SystemExit(f"{row['tokens']} tokens in {args.steps} steps of {batch} x {length}")
    return row


class Card:
    """The most memory that the GPU had in use, asked for four times a second; 0 where nvidia-smi does not tell."""

    def __init__(self) -> None:
        self.most, self.done = 0, threading.Event()
        # A run that fails does not wait for it.
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(0.25):
            try:
                asked = subprocess.run(query, capture_output=True, text=True).stdout
                self.most = max(self.most, int(asked.split()[0]))
            except (OSError, ValueError, IndexError):
                continue

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
    end_with(os.waitstatus_to_exitcode(status))
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
    engines = "checkpointing: ours, with it; peft_checkpointing: theirs"
    parser.add_argument("--engines", default="peft,lengthwise,checkpointing", help=engines)
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
