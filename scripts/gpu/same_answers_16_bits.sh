#!/bin/sh
# same_answers_16_bits.sh LENGTHWISE [DEVICE] [DTYPE]: the bundled model's greedy answers in 16 bits on the GPU are the same,
# to the byte, with and without kernels that begin early, and with and without recorded passes. Products of few rows are
# computed one way throughout: which is the faster would be measured in every process anew, and the ways round differently.
set -eu
lengthwise=$1 device=${2:-cuda} dtype=${3:-bf16}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '{"id": "%s", "instruction": "Count from 3 to %s."}\n' a 9 b 30 c 12 d 80 e 5 f 41 > "$work/in.jsonl"
# answers NAME [VARIABLE=1 …]
answers() {
    name=$1
    shift
    env LENGTHWISE_GPU_PRODUCTS=kernel "$@" "$lengthwise" generate -q --device "$device" --dtype "$dtype" \
        --input "$work/in.jsonl" --output "$work/$name"
}
answers all
answers late LENGTHWISE_NO_EARLY_KERNELS=1
answers unrecorded LENGTHWISE_NO_GRAPHS=1
answers neither LENGTHWISE_NO_EARLY_KERNELS=1 LENGTHWISE_NO_GRAPHS=1
# All are compared, so that the first difference does not hide the others.
differ=
for name in late unrecorded neither; do
    cmp "$work/all" "$work/$name" || differ="$differ $name"
done
[ -z "$differ" ] || { echo "other answers:$differ" >&2; exit 1; }
echo "the same answers"
