"""Qwen2 and Qwen2.5 with AHN."""

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_ahn.models.ahn import AHNForCausalLM


class AHNQwen2ForCausalLM(AHNForCausalLM, Qwen2ForCausalLM):
    """Qwen2's own class, its attention wrapped."""
