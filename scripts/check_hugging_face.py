#!/usr/bin/env python3
"""Compare Lengthwise with Hugging Face transformers and PEFT on the same model, adapter and instructions.

    lengthwise generate --model MODEL --input in.jsonl --output answers.jsonl --max-new-tokens 100
    lengthwise predict --json --model MODEL --adapter ADAPTER "instruction" … > predictions.json
    python scripts/check_hugging_face.py MODEL in.jsonl answers.jsonl [ADAPTER predictions.json]

Every greedy answer must be the same text of the same length, every prediction the same number. Exits with 1 where one
is not. Needs torch, transformers and peft (checked with torch 2.15, transformers 5.23 and peft 0.21 on the CPU in f32).
"""

import json
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH_QUESTION = (
    "\nDon't output the response for the above instruction. Instead, you need to predict the number of tokens in your "
    "response. Output one number only."
)


def generate(model, tokenizer, instruction, max_new_tokens):
    """The greedy answer's text and its number of generated tokens."""
    chat = [{"role": "user", "content": instruction}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    tokens = output[0][inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens)


def main():
    folder, instructions, answers, *rest = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    instructions = [json.loads(line) for line in open(instructions, encoding="utf-8")]
    answers = {a["id"]: a for a in map(json.loads, open(answers, encoding="utf-8"))}
    wrong = 0
    for item in instructions:
        ours = answers[item["id"]]
        theirs = generate(model, tokenizer, item["instruction"], 100)
        if theirs != (ours["text"].strip(), ours["tokens"]):
            wrong += 1
            print(f"{item['id']}: {theirs} here, {ours['text']!r} there")
    print(f"answers: {len(instructions) - wrong} of {len(instructions)} equal")
    if rest:
        from peft import PeftModel

        adapter, predictions = rest
        tuned = PeftModel.from_pretrained(model, adapter)
        predictions = json.load(open(predictions, encoding="utf-8"))["predictions"]
        different = 0
        for item, prediction in zip(instructions, predictions, strict=True):
            text, _ = generate(tuned, tokenizer, item["instruction"] + LENGTH_QUESTION, 8)
            number = re.search(r"\d+", text)
            if prediction["parsed"] and (number is None or int(number[0]) != prediction["max_tokens"]):
                different += 1
                print(f"{item['id']}: {text!r} here, {prediction} there")
        print(f"predictions: {len(instructions) - different} of {len(instructions)} equal")
        wrong += different
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
