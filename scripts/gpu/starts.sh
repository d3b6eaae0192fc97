#!/bin/sh
# starts.sh LENGTHWISE [DEVICE] [DTYPE]: the bundled model answers one request on the GPU. Says why where it does not.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo '{"id": "a", "instruction": "Count from 3 to 9."}' > "$work/in.jsonl"
RUST_LOG=info "$1" generate --device "${2:-cuda}" --dtype "${3:-bf16}" --input "$work/in.jsonl" --output "$work/out.jsonl"
cat "$work/out.jsonl"
