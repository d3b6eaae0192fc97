"""vLLM on an exported work load.

    python scripts/bench_decode/peer_vllm.py MODEL WORKLOAD SLOTS [--eager]

f32, prefix caching off, each answer exactly as long as recorded. Prints one JSON line; `--eager`
leaves torch.compile out.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main(folder, workload, slots, eager):
    requests = [json.loads(line) for line in open(workload)]
    tokens = sum(r["tokens"] for r in requests)
    prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
    params = [SamplingParams(max_tokens=r["tokens"], ignore_eos=True, temperature=0, detokenize=False) for r in requests]
    llm = LLM(
        folder,
        dtype="float32",
        max_num_seqs=slots,
        max_model_len=1024,
        enforce_eager=eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    llm.generate(prompts[:4], params[:4], use_tqdm=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert [len(o.outputs[0].token_ids) for o in outputs] == [r["tokens"] for r in requests]
    mode = "eager" if eager else "compiled"
    row = {"engine": f"vllm {mode}, {slots} slots", "seconds": seconds}
    row |= {"samples_per_s": len(requests) / seconds, "tokens_per_s": tokens / seconds}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--eager"]
    main(arguments[0], arguments[1], int(arguments[2]), "--eager" in sys.argv)
