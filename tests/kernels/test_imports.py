"""What kernels need: on a machine with a GPU, PyTorch and Triton; of this package, the table of memories alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

FILES = sorted((ROOT / "kernels").rglob("*.py"))
NAMES = [
    ".".join(("vllm_ahn.kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
]
WITHOUT_TRITON = [name for name in NAMES if name.endswith((".kernels", ".pages")) or ".recurrence" in name]


def imports(path: Path) -> set[str]:
    """Return the modules of this package that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module.startswith("vllm_ahn")}


def test_kernels_know_nothing_of_the_package_but_the_table_of_memories() -> None:
    graph = {name: imports(path) for name, path in zip(NAMES, FILES, strict=True)}
    outside = {module for found in graph.values() for module in found} - set(NAMES)
    assert outside == {"vllm_ahn.memory.spec"}
    # No circle: modules can be taken away one by one, each when it needs none of those that are left.
    left = dict(graph)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("absent, modules", [(("vllm", "transformers"), NAMES), (("triton", "vllm"), WITHOUT_TRITON)])
def test_kernels_are_imported_where_others_are_absent(absent: tuple[str, ...], modules: list[str]) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
