"""Writes model/fixtures/: what the tests of lengthwise-model read.

    python scripts/make_model_fixtures.py [tokenizer.model [ROWS OUTPUT]]

- pytorch_model.bin: two tensors as torch.save writes them, one a slice of a larger storage (torch 2.15.0).
- sentencepiece.json: texts, their ids and what these decode to by SentencePiece 0.2.3, for LLaMA's tokenizer.model (given
  as the argument, not part of the project; without it this file is left as it is).

With ROWS and OUTPUT only that many texts are written, elsewhere; LENGTHWISE_TOKENIZER_ROWS=OUTPUT has the test read them:

    python scripts/make_model_fixtures.py tokenizer.model 12000 /tmp/rows.json
    LENGTHWISE_SHARED_DATA=... LENGTHWISE_TOKENIZER_ROWS=/tmp/rows.json cargo test --release -p lengthwise-model llamas_ids
"""
import json
import random
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "model" / "fixtures"

WORDS = ["the", "Hello", "world", "tokenizer", "1", "42", "3.14159", "naïve", "Ω", "café", "e\u0301", "日本語", "中文字",
         "한국어", "مرحبا", "שלום", "हिन्दी", "🙂", "👩‍👩‍👧", "🇫🇷", "\u200b", "\u00a0", "▁", "▁▁x", "<0x41>", "\x00", "\x07",
         "\x1b[0m", "\r\n", "\n", "\n\n", "\t", " ", "  ", "     ", "fn main() {", "}", "=>", "!=", "#include <x>",
         "</p>", "\\frac{a}{b}", "$", "'s", "\"", "...", "—", "ﬁ", "①", "\U00010348", "\ufffd", "snake_case", "camelCase",
         "http://a.b/c?d=e&f", "AAAAAAAAAAAAAAAA", "antidisestablishmentarianism", "don't", "USER:", "ASSISTANT:"]


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    fixed = ["", " ", "a", " a", "a ", "  a  b  ", "\n", "▁", " ▁ "] + WORDS
    made = []
    while len(made) < count - len(fixed):
        glue = rng.choice(["", " ", " ", "  ", "\n"])
        made.append(glue.join(rng.choice(WORDS) for _ in range(rng.randint(2, 12))))
        made.append("".join(chr(rng.choice([rng.randint(1, 0x17F), rng.randint(0x370, 0x5FF), rng.randint(0x3040, 0x9FFF),
                                            rng.randint(0x1F300, 0x1FAFF)])) for _ in range(rng.randint(1, 20))))
    return fixed + made


def sentencepiece_rows(model: str, count: int) -> str:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    rows = [[text, sp.encode(text), sp.decode(sp.encode(text))] for text in texts(count)]
    return json.dumps(rows, separators=(",", ":")).replace("\"],[\"", "\"],\n[\"") + "\n"


def main() -> None:
    if len(sys.argv) == 4:
        Path(sys.argv[3]).write_text(sentencepiece_rows(sys.argv[1], int(sys.argv[2])))
        return
    FOLDER.mkdir(exist_ok=True)
    whole = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    state = {"w": whole[1:3], "b": torch.tensor([0.5, -2.0], dtype=torch.bfloat16)}
    torch.save(state, FOLDER / "pytorch_model.bin")
    if len(sys.argv) > 1:
        (FOLDER / "sentencepiece.json").write_text(sentencepiece_rows(sys.argv[1], 250))


main()
