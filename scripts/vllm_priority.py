"""Length predictions as vLLM's priorities: the shortest answer first.

    lengthwise serve --model MODEL --adapter HEAD --listen 127.0.0.1:50051
    vllm serve MODEL --scheduling-policy priority --max-num-seqs 16
    python scripts/vllm_priority.py INSTRUCTIONS --vllm http://127.0.0.1:8000/v1 --predictor 127.0.0.1:50051

Sends all instructions (JSONL with `instruction`) at once, in their order and then with the shortest predicted first, and
prints how long their callers waited: one JSON line each time. Predictions are made anew for each run that uses them, and
count. Needs openai and grpcio-tools.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import grpc
from openai import AsyncOpenAI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proto"))
messages, services = grpc.protos_and_services("lengthwise/v1/predictor.proto")

# Most requests that one PredictBatch takes.
MOST = 1024


def predict(address: str, instructions: list[str], cap: int) -> list[int]:
    """The expected length of each answer, in tokens: the median where the server gives quantiles."""
    lengths = []
    with grpc.insecure_channel(address) as channel:
        predictor = services.LengthPredictorStub(channel)
        for first in range(0, len(instructions), MOST):
            some = [messages.PredictRequest(instruction=i, max_new_tokens=cap) for i in instructions[first : first + MOST]]
            lengths += map(expected, predictor.PredictBatch(messages.PredictBatchRequest(requests=some), timeout=600).responses)
    return lengths


def expected(response) -> int:
    return next((q.tokens for q in response.quantiles if q.probability == 0.5), response.max_tokens)


async def answer(client: AsyncOpenAI, model: str, instruction: str, priority: int, cap: int) -> tuple[float, int]:
    """When the answer was whole, and its tokens."""
    completion = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": instruction}],
        temperature=0,
        max_tokens=cap,
        # A smaller number goes first.
        extra_body={"priority": priority},
    )
    return time.perf_counter(), completion.usage.completion_tokens


async def run(args: argparse.Namespace, client: AsyncOpenAI, model: str, instructions: list[str], predicted: bool) -> dict:
    began = time.perf_counter()
    priorities = [0] * len(instructions)
    if predicted:
        priorities = await asyncio.to_thread(predict, args.predictor, instructions, args.max_new_tokens)
    asked = zip(instructions, priorities)
    ends = await asyncio.gather(*(answer(client, model, i, p, args.max_new_tokens) for i, p in asked))
    waits = sorted(end - began for end, _ in ends)
    return {
        "order": "shortest predicted first" if predicted else "order of arrival",
        "requests": len(waits),
        "mean_s": round(statistics.fmean(waits), 3),
        "median_s": round(statistics.median(waits), 3),
        "p90_s": round(waits[int(0.9 * len(waits))], 3),
        "last_s": round(waits[-1], 3),
        "tokens": sum(tokens for _, tokens in ends),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instructions", type=Path)
    parser.add_argument("--vllm", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--predictor", default="127.0.0.1:50051")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    instructions = [json.loads(line)["instruction"] for line in args.instructions.open(encoding="utf-8") if line.strip()]
    async with AsyncOpenAI(base_url=args.vllm, api_key="none", timeout=3600, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        # What is done once, at the first requests, is nobody's waiting.
        await asyncio.gather(*(answer(client, model, i, 0, 8) for i in instructions[:16]))
        for predicted in [False, True] * args.repeats:
            print(json.dumps(await run(args, client, model, instructions, predicted)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
