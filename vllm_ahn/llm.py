"""`vllm.LLM` with the AHN arguments spelt out, and a check that the plugin is loaded."""

from __future__ import annotations

from typing import Any

import vllm

from vllm_ahn import plugin
from vllm_ahn.plugin import arguments


class LLM(vllm.LLM):
    """`vllm.LLM` for a base model with an AHN; everything not named here is passed on to it.

    Raises `AHNError` for bad input, for a `model` without an AHN of its own when `ahn` is not given, and
    where vLLM does not load the AHN plugin, which plain ``vllm.LLM(additional_config=...)`` cannot notice.
    """

    def __init__(
        self,
        model: str,
        *,
        ahn: str | None = None,
        ahn_window: int | None = None,
        ahn_sinks: int | None = None,
        ahn_checkpoint_interval: int | None = None,
        additional_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: base model, or a model with the AHN merged in: a folder or a Hugging Face repository.
            ahn: AHN checkpoint: a folder or a Hugging Face repository with an optional ``@revision``; "none" for window
                and sinks without a memory.
            ahn_window: W, tokens that a query sees exactly, itself included; 32640 if not given.
            ahn_sinks: S, tokens at the start that stay visible beside the window; 128 if not given.
            ahn_checkpoint_interval: with prefix caching, tokens of a prompt between two checkpoints of the memory, 0
                for one at its end only; vLLM's ``max_num_batched_tokens`` if not given.
            additional_config: vLLM's, in which these are put under ``"ahn"``.
            kwargs: any other argument of `vllm.LLM`.
        """
        plugin.require()
        extra = arguments.with_flags(
            additional_config or {},
            checkpoint=ahn,
            window=ahn_window,
            sinks=ahn_sinks,
            checkpoint_interval=ahn_checkpoint_interval,
        )
        # An empty request is valid only for a merged model; never fall back to the plain model.
        extra = {**extra, "ahn": extra.get("ahn") or {}}
        super().__init__(model, additional_config=extra, **kwargs)
