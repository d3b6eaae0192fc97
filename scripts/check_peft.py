#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2", "safetensors"]
# ///
"""Check that an adapter folder which Lengthwise wrote gives the same logits in PEFT.

    python scripts/check_peft.py MODEL ADAPTER DUMP.safetensors [--tolerance 1e-4]

MODEL is a Hugging Face model folder; DUMP is what Lengthwise computed from both: `tokens` [rows, longest], padded with
anything, `lengths` [rows], and `logits` [sum of lengths, vocab] of every real position, one row behind the other.
Prints the largest difference of each row; exits with 1 where one is above the tolerance or PEFT does not take the
adapter whole. `cargo test -p lengthwise-model --test reference -- --ignored` writes such files and runs this script.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def load(model, adapter):
    """The model under the adapter; every tensor of the adapter's file must have been taken, and no other be wanted."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    file = load_file(Path(adapter) / "adapter_model.safetensors")
    taken = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "lora_" in n}
    if file.keys() != taken.keys():
        sys.exit(f"names differ: {sorted(file.keys() ^ taken.keys())}")
    if different := [name for name, tensor in file.items() if not torch.equal(tensor.float(), taken[name])]:
        sys.exit(f"values differ after loading: {different}")
    return tuned


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("dump")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of any one logit")
    args = parser.parse_args()
    dump = load_file(args.dump)
    lengths = dump["lengths"].tolist()
    if sum(lengths) != len(dump["logits"]):
        sys.exit(f"{args.dump}: rows of {sum(lengths)} tokens in all, logits of {len(dump['logits'])}")
    tuned = load(args.model, args.adapter)
    parts = zip(dump["tokens"].long(), lengths, dump["logits"].split(lengths), strict=True)
    worst, moved = 0.0, 0.0
    for i, (row, length, ours) in enumerate(parts):
        theirs = tuned(row[None, :length]).logits[0]
        with tuned.disable_adapter():
            moved = max(moved, (tuned(row[None, :length]).logits[0] - theirs).abs().max().item())
        difference = (theirs - ours).abs().max().item()
        print(f"row {i}: {length} tokens, logits differ by up to {difference:.1e}")
        # NaN must fail: `not <=`, and max() would drop it.
        if not difference <= args.tolerance:
            worst = float("inf")
        worst = max(worst, difference)
    if moved <= args.tolerance:
        sys.exit("the adapter changes nothing: the comparison says nothing about it")
    if worst > args.tolerance:
        sys.exit(f"differs by more than {args.tolerance:.1e}")
    print(f"equal within {args.tolerance:.1e}; the adapter itself moves logits by up to {moved:.1e}")


if __name__ == "__main__":
    main()
