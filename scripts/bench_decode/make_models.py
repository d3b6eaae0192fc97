"""Llamas with random weights in Hugging Face layout, for timing: 5 M and 110 M parameters.

    python scripts/bench_decode/make_models.py OUTPUT     # needs torch and transformers

The tokenizer is the bundled model's; the benchmark feeds token ids, so only its size matters.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "5m": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, vocab_size=2048),
    "110m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000),
}


def main(output: Path) -> None:
    tiny = Path(__file__).resolve().parents[2] / "data" / "tiny"
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            **shape, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1
        )
        model = LlamaForCausalLM(config).to(torch.float32)
        folder = output / name
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, folder / file)
        print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
