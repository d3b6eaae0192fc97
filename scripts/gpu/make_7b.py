"""A Llama of Vicuna-7B's shapes with random bf16 weights, made on the GPU in seconds.

    python scripts/gpu/make_7b.py OUTPUT     # needs torch (CUDA) and transformers

The tokenizer is the bundled model's; the benchmark feeds token ids. OUTPUT is there when it is complete, and is then left as
it is.
"""

import shutil
import sys
from pathlib import Path


def make(folder: Path) -> None:
    # Only here: a folder that is there costs no import.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    tiny = Path(__file__).resolve().parents[2] / "data" / "tiny"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder / file)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")


def main(folder: Path) -> None:
    if folder.exists():
        print(f"{folder} is there")
        return
    # What a run that was stopped left takes room.
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    make(staged)
    staged.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
