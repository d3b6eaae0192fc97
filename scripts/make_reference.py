#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2", "safetensors"]
# ///
"""Writes tests/fixtures/: tiny random models and adapters with what transformers and PEFT compute from them.

    python scripts/make_reference.py

- MODEL/: a Hugging Face model folder in f32, and reference.safetensors with
    `tokens` [rows, longest] padded with 0, `lengths` [rows],
    `logits` [sum of lengths, vocab] of every real position, one row behind the other,
    `greedy` [rows, steps], the most likely tokens after each row (no end-of-sequence stop).
- ADAPTER/: an adapter of `llama` as PEFT saves it, and reference.safetensors without `greedy`.
- lora_training.safetensors: LoRA training of `llama` on one batch, see `training`.

Every row runs alone, without padding or cache, in f32 on the CPU with eager attention. Versions and seed are in each
file's metadata. A second run writes the same bytes.
"""

import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
VOCAB = 96
# One token, one cache block's worth and a little, two blocks and a little; all but the first leave a window of 8.
ROW_LENGTHS = (1, 11, 18, 35)
GREEDY_STEPS = 48
# Below this a rounding error could turn the most likely token into the second one.
SMALLEST_MARGIN = 5e-3
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters=ROPE,
    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    # The wavelengths are 6, 63, 628 and 6283: one is kept, one is between, two are stretched.
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama3": transformers.LlamaConfig(**SIZES | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama_linear": transformers.LlamaConfig(**SIZES | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "mistral": transformers.MistralConfig(
        # An epsilon that shows in the logits.
        **SIZES | {"sliding_window": 8, "tie_word_embeddings": False, "rms_norm_eps": 1e-2}
    ),
    "qwen2": transformers.Qwen2Config(**SIZES | {"rope_parameters": ROPE | {"rope_theta": 1000000.0}}),
    # Heads wider than hidden / heads and no multiple of 8, one of keys and values for all.
    "qwen3": transformers.Qwen3Config(
        **SIZES | {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": False}
    ),
}


def metadata(seed):
    """What a file was made with. One entry: safetensors writes several in a random order."""
    made_with = {
        "generator": "scripts/make_reference.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "seed": seed,
    }
    return {"made_with": json.dumps(made_with)}


def randomise(model, seed):
    """Weights that make far from flat logits, and norms and biases that are not at their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        normal = torch.randn(p.shape, generator=generator)
        if name == "model.norm.weight":
            # Signs too: with tied embeddings each token would else predict itself.
            p.data = normal
        elif "norm" in name:
            p.data = 1.0 + 0.4 * normal
        elif "embed_tokens" in name or "lm_head" in name or name.endswith("bias"):
            p.data = 0.5 * normal
        else:
            p.data = 0.3 * normal


def make_rows(seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in ROW_LENGTHS]


def padded(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def logits_of(model, row):
    return model(row[None], use_cache=False).logits[0]


@torch.no_grad()
def greedy(model, row):
    """The most likely tokens after `row`, or None where one of them is not clearly so or they only repeat."""
    whole = row
    for _ in range(GREEDY_STEPS):
        best = logits_of(model, whole)[-1].topk(2)
        if best.values[0] - best.values[1] < SMALLEST_MARGIN:
            return None
        whole = torch.cat([whole, best.indices[:1]])
    tokens = whole[len(row) :]
    return tokens if len(tokens.unique()) >= 12 else None


@torch.no_grad()
def reference(model, rows):
    return {
        "tokens": padded(rows),
        "lengths": torch.tensor([len(row) for row in rows]),
        "logits": torch.cat([logits_of(model, row) for row in rows]).contiguous(),
    }


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_model(name, config):
    """The model of the first seed whose greedy tokens are all clear. What is recorded comes from the saved folder."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(2000):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        randomise(model, seed)
        rows = make_rows(seed)
        # Lazily: most seeds fail at an early row.
        answers = []
        for row in rows:
            answers.append(greedy(model, row))
            if answers[-1] is None:
                break
        else:
            break
    else:
        sys.exit(f"{name}: no seed gives decisive greedy tokens")
    model.save_pretrained(folder)
    tensors = reference(load(folder), rows) | {"greedy": torch.stack(answers)}
    save_file(tensors, folder / "reference.safetensors", metadata(seed))
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: seed {seed}, {size} bytes, logits up to {tensors['logits'].abs().max():.1f}")
    assert size < 120_000, size


def lora_factors(model):
    """The factors under the names that PEFT's files give them, in the order of the names."""
    found = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    return dict(sorted(found.items()))


def with_adapter(seed, **settings):
    """`llama` under a random adapter, both factors non-zero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load(FIXTURES / "llama"), config)
    model.peft_config["default"].base_model_name_or_path = "llama"
    generator = torch.Generator().manual_seed(seed)
    for p in lora_factors(model).values():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model


def make_adapter(name, seed, **settings):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    model = with_adapter(seed, **settings).eval()
    # PEFT holds them in a set, whose order differs from run to run.
    model.peft_config["default"].target_modules = sorted(model.peft_config["default"].target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # an empty model card
    rows = make_rows(seed)
    tensors = reference(peft.PeftModel.from_pretrained(load(FIXTURES / "llama"), folder).eval(), rows)
    save_file(tensors, folder / "reference.safetensors", metadata(seed))
    base = reference(load(FIXTURES / "llama"), rows)["logits"]
    print(f"{name}: moves logits by up to {(tensors['logits'] - base).abs().max():.1f}")


def loss_of(model, rows, labels):
    """The mean over all counted tokens of the batch; `labels[t]` is what the logits of `t - 1` should say."""
    total, count = 0.0, 0
    for row, label in zip(rows, labels):
        logits = logits_of(model, row)[:-1]
        total = total + torch.nn.functional.cross_entropy(logits, label[1:], ignore_index=-100, reduction="sum")
        count += int((label[1:] != -100).sum())
    return total / count


def training(model, rows, labels, prefix):
    """Loss and gradients at the start, then 20 steps of AdamW on the same batch.

    - `PREFIX.initial.NAME`, `PREFIX.grad.NAME`, `PREFIX.final.NAME`: factors, their first gradients (not clipped),
      and factors after the last step
    - `PREFIX.losses` [20]: the loss before each step; `PREFIX.grad_norms` [20]: the joint norm before clipping to 1
    """
    factors = lora_factors(model)
    out = {f"{prefix}.initial.{name}": p.detach().clone() for name, p in factors.items()}
    adamw = torch.optim.AdamW(factors.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    losses, norms = [], []
    for step in range(20):
        adamw.zero_grad()
        loss = loss_of(model, rows, labels)
        loss.backward()
        if step == 0:
            out |= {f"{prefix}.grad.{name}": p.grad.clone() for name, p in factors.items()}
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(factors.values(), 1.0).item())
        adamw.step()
    out |= {f"{prefix}.final.{name}": p.detach().clone() for name, p in factors.items()}
    assert not any(math.isnan(loss) for loss in losses)
    print(f"training {prefix}: loss {losses[0]:.3f} to {losses[-1]:.3f}, norms {max(norms):.2f} to {min(norms):.2f}")
    return out | {f"{prefix}.losses": torch.tensor(losses), f"{prefix}.grad_norms": torch.tensor(norms)}


def is_decided(tensors, model, rows, labels, prefix):
    """Whether rounding decides nothing: a run whose start differs in the last bits has the same losses and norms.

    AdamW divides a gradient near zero by its own size, so that on some seeds the last bit of one gradient is worth a step
    of the full rate; there two right implementations part.
    """
    generator = torch.Generator().manual_seed(0)
    for name, p in lora_factors(model).items():
        start = tensors[f"{prefix}.initial.{name}"]
        p.data = start * (1 + 2e-7 * torch.randn(start.shape, generator=generator))
    other = training(model, rows, labels, prefix)
    losses, norms = (f"{prefix}.losses", f"{prefix}.grad_norms")
    apart = max((other[losses] - tensors[losses]).abs().max().item(), (other[norms] / tensors[norms] - 1).abs().max().item())
    print(f"training {prefix}: disturbed in the last bits, apart by {apart:.1e}")
    return apart < 1e-4  # A tenth of what the tests allow.


def make_training(seeds):
    """Every linear layer, r 4, alpha 8, dropout 0, on `tokens` and `labels` [3, longest] (-100: not counted)."""
    if not any(training_of(seed) for seed in seeds):
        sys.exit("training: no seed gives a run that rounding does not decide")


def training_of(seed):
    """Writes the fixture of a seed; false where rounding decides the run."""
    rows = make_rows(seed)[1:]
    labels = []
    for row, counted in zip(rows, (slice(4, 9), slice(12, 18), slice(30, 33))):
        label = torch.full_like(row, -100)
        label[counted] = row[counted]
        labels.append(label)
    tensors = {
        "tokens": padded(rows),
        "labels": padded(labels, -100),
        "lengths": torch.tensor([len(row) for row in rows]),
    }
    for prefix in ("b_random", "b_zero"):
        model = with_adapter(seed, target_modules="all-linear").train()
        if prefix == "b_zero":
            for name, p in lora_factors(model).items():
                if "lora_B" in name:
                    p.data.zero_()
        tensors |= training(model, rows, labels, prefix)
        if not is_decided(tensors, model, rows, labels, prefix):
            return False
    save_file(tensors, FIXTURES / "lora_training.safetensors", metadata(seed))
    return True


def main():
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls transformers by an old name
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, config in MODELS.items():
        make_model(name, config)
    make_adapter("llama_adapter", 11, target_modules=["q_proj", "v_proj"])
    make_adapter("llama_adapter_all_linear", 12, target_modules="all-linear", use_rslora=True)
    # It begins within the longest row, and changes nothing of the others.
    invocation = make_rows(14)[-1][20:22].tolist()
    make_adapter("llama_adapter_activated", 14, target_modules="all-linear", alora_invocation_tokens=invocation)
    make_training(range(13, 40))


if __name__ == "__main__":
    main()
