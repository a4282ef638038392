"""Qwen2 and Qwen2.5 with AHN."""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model

from vllm_ahn.models.ahn import AHNDecoderLayer, AHNForCausalLM

TOKENS_ARE_DYNAMIC = {"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
"""Axes over the tokens of a batch, for the compiler."""


class AHNQwen2DecoderLayer(AHNDecoderLayer, Qwen2DecoderLayer):
    pass


@support_torch_compile(dynamic_arg_dims=TOKENS_ARE_DYNAMIC)
class AHNQwen2Model(Qwen2Model):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=AHNQwen2DecoderLayer)


class AHNQwen2ForCausalLM(AHNForCausalLM):
    model_class = AHNQwen2Model
    hf_to_vllm_mapper = Qwen2ForCausalLM.hf_to_vllm_mapper
    packed_modules_mapping = Qwen2ForCausalLM.packed_modules_mapping
    embedding_modules = Qwen2ForCausalLM.embedding_modules
