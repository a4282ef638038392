"""Where the packages lie; everything else about the project is in ``pyproject.toml``."""

from setuptools import find_packages, setup

# In a checkout vllm_ahn/kernels is a symbolic link to kernels/. Packages are taken from kernels/ itself, and
# the link is left out, so that a distribution holds the kernels once.
PACKAGES = find_packages(include=["vllm_ahn", "vllm_ahn.*"], exclude=["vllm_ahn.kernels", "vllm_ahn.kernels.*"])
KERNELS = ["vllm_ahn.kernels", *(f"vllm_ahn.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*PACKAGES, *KERNELS],
    package_dir={"vllm_ahn": "vllm_ahn", "vllm_ahn.kernels": "kernels"},
    package_data={"vllm_ahn": ["py.typed", "tools/evaluate/benchmarks.toml"], "vllm_ahn.kernels": ["*.cpp"]},
)
