"""Whether another engine's greedy tokens are those of transformers, alone, for the first few requests.

    python scripts/bench_decode/check_tokens.py MODEL WORKLOAD TOKENS [COUNT]

TOKENS: one JSON array a line, as peer_llama_cpp.py writes it. Fails at the first token that differs and whose logit is not
within 1e-4 of the largest, relative to the spread of the logits there: sums in another order decide such ties either way.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main(folder, workload, tokens, count):
    requests = [json.loads(line) for line in open(workload)][:count]
    answers = [json.loads(line) for line in open(tokens)][:count]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compared = ties = 0
    for request, answer in zip(requests, answers):
        # The engine's own tokens are fed back, so that one tie does not end the comparison.
        ids = torch.tensor([request["prompt"] + answer])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(request["prompt"]) - 1 : -1]
        for step, (row, got) in enumerate(zip(logits, answer)):
            compared += 1
            gap = ((row.max() - row[got]) / row.std()).item()
            ties += got != row.argmax().item()
            assert gap <= 1e-4, f"request {request['id']}, token {step}: {got}, transformers {row.argmax().item()} ({gap:.2e})"
    print(f"{compared} greedy tokens of {len(answers)} requests equal transformers', {ties} of them within rounding")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 4)
