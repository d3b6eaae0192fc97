#!/bin/sh
# same_answers.sh LENGTHWISE [DEVICE]: the bundled model's greedy answers in f32 on the GPU are those on the CPU, under
# every strategy that `generate` has.
set -eu
lengthwise=$1 gpu=${2:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '{"id": "%s", "instruction": "Count from 3 to %s."}\n' a 9 b 30 c 12 d 80 e 5 f 41 > "$work/in.jsonl"
for strategy in vanilla continuous; do
    for where in cpu gpu; do
        device=cpu
        [ $where = cpu ] || device=$gpu
        "$lengthwise" generate -q --device "$device" --dtype f32 --strategy $strategy \
            --input "$work/in.jsonl" --output "$work/$strategy.$where"
    done
    cmp "$work/$strategy.cpu" "$work/$strategy.gpu"
done
# The strategies were told different things, and answer the same.
for strategy in vanilla continuous; do
    sed 's/,"predicted_max_tokens":[^,}]*//' "$work/$strategy.cpu" > "$work/$strategy.answers"
done
cmp "$work/vanilla.answers" "$work/continuous.answers"
echo "the same answers"
