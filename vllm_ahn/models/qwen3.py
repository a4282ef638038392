"""Qwen3 with AHN."""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

from vllm_ahn.models.ahn import AHNDecoderLayer, AHNForCausalLM
from vllm_ahn.models.qwen2 import TOKENS_ARE_DYNAMIC


class AHNQwen3DecoderLayer(AHNDecoderLayer, Qwen3DecoderLayer):
    pass


@support_torch_compile(dynamic_arg_dims=TOKENS_ARE_DYNAMIC)
class AHNQwen3Model(Qwen2Model):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=AHNQwen3DecoderLayer)


class AHNQwen3ForCausalLM(AHNForCausalLM):
    model_class = AHNQwen3Model
    hf_to_vllm_mapper = Qwen3ForCausalLM.hf_to_vllm_mapper
    packed_modules_mapping = Qwen3ForCausalLM.packed_modules_mapping
    embedding_modules = Qwen3ForCausalLM.embedding_modules
