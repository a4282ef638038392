#!/usr/bin/env bash
# Makes (or completes) the environment in $1 with the Python in $2, from the pinned files in this folder.
set -euo pipefail
venv=$1 python=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --no-deps "$@"; }

# Machines are set up with a CPU build of PyTorch in different ways: first as pip is configured, then from its own index.
install -r "$here/torch.txt" ||
    install --extra-index-url https://download.pytorch.org/whl/cpu -r "$here/torch.txt"
install -r "$here/cpu.txt" -r "$here/dev.txt"
install --no-build-isolation "$here/vllm-cpu-shim"
install --no-build-isolation --editable "$here/.."
