"""Qwen3 with AHN."""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_ahn.models.ahn import AHNForCausalLM


class AHNQwen3ForCausalLM(AHNForCausalLM, Qwen3ForCausalLM):
    """Qwen3's own class, its attention wrapped."""
