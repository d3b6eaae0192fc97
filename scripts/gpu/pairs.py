"""Instructions of 32 to 128 tokens with a length each, to train and time a predictor on: PATH, and its first as PATH.1.

    python scripts/gpu/pairs.py PATH COUNT
"""

import json
import random
import sys


def main(path: str, count: int) -> None:
    chooser = random.Random(0)
    words = "red blue seven count the river of a house and list from to name green write it why".split()
    lines = []
    for i in range(count):
        # A word is about a token of the bundled tokenizer.
        instruction = " ".join(chooser.choices(words, k=chooser.randint(32, 128)))
        length = chooser.randint(10, 400)
        lines.append(json.dumps({"id": str(i), "instruction": instruction, "label": length, "lengths": [length]}) + "\n")
    open(path, "w").writelines(lines)
    open(f"{path}.1", "w").writelines(lines[:1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
