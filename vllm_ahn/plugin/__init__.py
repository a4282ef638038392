"""The vLLM plugin: what the entry point ``ahn`` of ``vllm.general_plugins`` runs in every process of vLLM.

Only the standard library is imported at the top. vLLM logs a plugin that cannot be imported and goes on
without it, but does not catch what a plugin raises when it is called; so everything that may fail is left to
`register`.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from vllm_ahn.errors import AHNError

GROUP = "vllm.general_plugins"
"""The entry point group whose plugins vLLM loads in every process."""

NAME = "ahn"
"""The plugin's name, as ``VLLM_PLUGINS`` selects it."""

_registered = False


def register() -> None:
    """Make AHN known to vLLM in this process: the names of its models, its limits, and its arguments.

    A process that goes on without an AHN has no more than that: models, kernels and cache specs are imported where they
    are used. May be called any number of times. Raises `AHNError`, which stops the process, where vLLM is of a version
    that is not supported or lacks what is to be extended: serving a model without its memory would be worse.
    """
    global _registered
    if _registered:
        return
    try:
        import vllm

        from vllm_ahn.bases import BASES
        from vllm_ahn.plugin import compat, limits, patches

        compat.check_vllm_version(vllm.__version__)
        from vllm.model_executor.models import ModelRegistry

        for base in BASES:
            ModelRegistry.register_model(base.ahn_architecture, base.model_class)
        limits.install()
        patches.patch_arguments()
    except AHNError:
        raise
    except Exception as error:
        raise AHNError(
            f"the vLLM plugin {NAME!r} (vllm-ahn) could not be loaded: {type(error).__name__}: {error}"
        ) from error
    _registered = True


def is_registered() -> bool:
    """Return whether `register` has done its work in this process."""
    return _registered


def why_not_loaded() -> str | None:
    """Return why vLLM would run without AHN in this environment, in one sentence, or None if it would not.

    Looks at the environment only and loads nothing.
    """
    installed = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not installed:
        return (
            f"no installed distribution has the entry point {NAME!r} in {GROUP}, so vLLM cannot find the AHN "
            "plugin: install vllm-ahn (from a checkout: pip install -e . --no-deps)"
        )
    foreign = [point.value for point in installed if point.value != f"{__name__}:{register.__name__}"]
    if foreign:
        return f"the entry point {NAME!r} in {GROUP} belongs to another package ({', '.join(foreign)})"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return (
            f"VLLM_PLUGINS={allowed!r} leaves the AHN plugin out: add {NAME!r} to the list, or unset "
            "VLLM_PLUGINS to load every plugin"
        )
    return None


def require() -> None:
    """Load vLLM's plugins. Raises `AHNError` where that does not bring AHN in, here or in workers."""
    reason = why_not_loaded()
    if reason is None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        if not _registered:
            # The import failed, which vLLM has only logged, or register() has raised before: this says why.
            register()
    else:
        raise AHNError(reason)
