"""The base models that AHN serves. To add one, write its thin module here and name it in the table."""

AHN_ARCHITECTURES: dict[str, str] = {
    "Qwen2ForCausalLM": "AHNQwen2ForCausalLM",
    "Qwen3ForCausalLM": "AHNQwen3ForCausalLM",
}
"""Architecture of a base's ``config.json`` -> architecture that vLLM loads when the base is served with an AHN."""

MODEL_CLASSES: dict[str, str] = {
    "AHNQwen2ForCausalLM": "vllm_ahn.models.qwen2:AHNQwen2ForCausalLM",
    "AHNQwen3ForCausalLM": "vllm_ahn.models.qwen3:AHNQwen3ForCausalLM",
}
"""Architecture -> ``module:class``, in the form that vLLM's ``ModelRegistry.register_model`` imports lazily."""
