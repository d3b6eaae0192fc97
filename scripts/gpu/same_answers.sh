#!/bin/sh
# The bundled model's greedy answers in f32 on the GPU are those on the CPU, under every strategy that `generate` has.
set -eu
lengthwise=$1
work=$(mktemp -d)
printf '{"id": "%s", "instruction": "Count from 3 to %s."}\n' a 9 b 30 c 12 d 80 e 5 f 41 > "$work/in.jsonl"
for strategy in vanilla continuous; do
    for device in cpu cuda; do
        "$lengthwise" generate -q --device $device --dtype f32 --input "$work/in.jsonl" --output "$work/$strategy.$device" --strategy $strategy
    done
    cmp "$work/$strategy.cpu" "$work/$strategy.cuda"
done
cmp "$work/vanilla.cpu" "$work/continuous.cpu"
echo "the same answers"
