"""The core of an AHN layer as one operation that the compiler does not look into.

It reads and writes caches that the compiler knows nothing of, by metadata that changes from step to step.
"""

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from vllm_ahn.attention.core import LayerInputs
from vllm_ahn.plugin.compat import layer_name_codec

OP_NAME = "ahn_attention"
QUALIFIED_NAME = f"vllm::{OP_NAME}"
"""As vLLM's compiler knows the operation."""

encode_layer_name, _resolve_layer_name = layer_name_codec()


def _ahn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_query: torch.Tensor,
    gates: torch.Tensor | None,
    z: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:  # a run without requests, to measure memory or to compile
        output.zero_()
        layer.core.reserve(layer, query)
        return
    assert isinstance(context.attn_metadata, dict)
    inputs = LayerInputs(query, key, value, memory_query, gates, z, output)
    plan = context.attn_metadata[layer.layer_name]
    state_table = None if layer.state is None else context.attn_metadata[layer.state.layer_name]
    layer.core.run(layer, inputs, plan, state_table)


def _ahn_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_query: torch.Tensor,
    gates: torch.Tensor | None,
    z: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    return None


direct_register_custom_op(
    op_name=OP_NAME,
    op_func=_ahn_attention,
    mutates_args=["output"],
    fake_impl=_ahn_attention_fake,
)

ahn_attention = torch.ops.vllm.ahn_attention
