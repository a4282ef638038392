"""The layer of a memory: projections, the recurrence's two scalars, norm and read-out."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_ahn.kernels.recurrence.gates import decay_and_rate
from vllm_ahn.memory.spec import NORM_EPS, MemorySpec

_PARAMETERS = {"o_proj.weight": "out_proj.weight", "q_proj.weight": "query_proj.weight"}
"""Checkpoint name -> our parameter. vLLM picks the modules that take LoRA by the last part of their names, and these
are not the base's ``o_proj`` and ``q_proj``."""


class Memory(nn.Module, ABC):
    """A compressed memory: the module that checkpoints call ``model.layers.N.ahn.fn``.

    `spec` says which of the memories it is; a subclass adds what no table can say, how gates come from the hidden
    state. Modules hold the heads of one tensor-parallel rank; shapes below count those.

    Args:
        hidden_size: width of the hidden states.
        total_num_heads: query heads of the model, over all ranks.
        head_size: size of a head.
        use_q_proj: the memory has a query projection of its own.
    """

    spec: ClassVar[MemorySpec]

    def __init__(self, hidden_size: int, total_num_heads: int, head_size: int, *, use_q_proj: bool = False) -> None:
        super().__init__()
        spec = self.spec
        self.tp_rank = get_tensor_model_parallel_rank()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.total_num_heads = total_num_heads
        self.num_heads = total_num_heads // self.tp_size
        self.head_size = head_size
        self.scale = spec.scale(head_size)
        self.in_proj = HeadProjections(hidden_size, self.num_heads, len(spec.projections), spec.projection_bias)
        for name in spec.head_parameters:
            self.register_parameter(name, float32_per_head(self.num_heads))
        self.norm = Scale(self.num_heads * head_size if spec.norm_all_heads else head_size)
        self.out_proj = PerHeadLinear(self.num_heads, head_size)
        self.query_proj = PerHeadLinear(self.num_heads, head_size) if use_q_proj else None

    @property
    def decay_of_rate(self) -> torch.Tensor | None:
        """``A_log [num_heads]`` float32, where the decay is made of the rate; else None."""
        return self.A_log if self.spec.decay_from_rate else None

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer computes from the hidden states of new tokens.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``, the output of ``input_layernorm``, in the model dtype.

        Returns:
            ``gates [num_tokens, num_heads, num_gates]`` float32, to be kept until the tokens leave the window, and the
            read-out gate ``z [num_tokens, num_heads]`` float32, used in this very step.
        """
        projected = self.in_proj(hidden_states).float().unflatten(-1, (len(self.spec.projections), self.num_heads))
        *for_gates, z = projected.unbind(-2)
        return self.gates(*for_gates), z

    @abstractmethod
    def gates(self, *projected: torch.Tensor) -> torch.Tensor:
        """Gates from their projections, ``[num_tokens, num_heads]`` float32 each; see :meth:`project`."""

    def decay_and_rate(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence's scalars from kept gates.

        Args:
            gates: ``[..., num_heads, num_gates]`` float32, as read back from the window pages.

        Returns:
            ``g`` and ``b``, ``[..., num_heads]`` float32 each; ``g <= 0``.
        """
        return decay_and_rate(self.spec, gates, self.decay_of_rate)

    def normalise(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Norm and gate of what was read: ``rmsnorm(o) silu(z)``, or ``rmsnorm(o silu(z))`` over all heads at once.

        Args:
            o: ``[num_tokens, num_heads, head_size]`` float32, from the recurrence.
            z: ``[num_tokens, num_heads]`` float32, from :meth:`project` of the reading token.

        Returns:
            ``y``, shaped like ``o``, float32.
        """
        gate = F.silu(z).unsqueeze(-1)
        weight = self.norm.weight.float()
        # Of a chunk all this is large, and on a CPU every new tensor of that size costs more than what is computed.
        if not self.spec.norm_all_heads:
            squares = torch.linalg.vector_norm(o, dim=-1, keepdim=True).square_()
            return (o * torch.rsqrt(squares / self.head_size + NORM_EPS).mul_(gate)).mul_(weight)
        gated = (o * gate).flatten(-2)
        # The norm runs over the heads of all ranks.
        squares = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_()
        if self.tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        rms = torch.rsqrt(squares / (self.total_num_heads * self.head_size) + NORM_EPS)
        return gated.mul_(rms).mul_(weight).unflatten(-1, (self.num_heads, self.head_size))

    def read_out(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What the memory adds to the attention output, ``m[h] = y[h] @ o_proj.weight[h]``.

        Returns:
            ``[num_tokens, num_heads, head_size]`` in the model dtype.
        """
        return self.out_proj(self.normalise(o, z))

    def load_weight(self, name: str, weight: torch.Tensor) -> str | None:
        """Take one checkpoint tensor.

        Args:
            name: its name below ``ahn.fn``, for example ``a_proj.weight``.
            weight: the tensor over all heads.

        Returns:
            Name of the parameter that received it, relative to this module, or None if nothing here needs it.
        """
        spec = self.spec
        if name in spec.unused:
            return None
        module, _, kind = name.rpartition(".")
        if module != spec.norm or spec.norm_all_heads:  # all else runs over heads, of which every rank takes its part
            weight = weight.chunk(self.tp_size)[self.tp_rank]
        if module in spec.projections:
            self.in_proj.load_weight(kind, spec.projections.index(module), weight)
            return f"in_proj.{kind}"
        parameter = f"norm.{kind}" if module == spec.norm else _PARAMETERS.get(name, name)
        self.get_parameter(parameter).data.copy_(weight)
        return parameter


class HeadProjections(nn.Module):
    """Projections of the hidden states, each to one value a head, in one matrix.

    One, because a decode step is bound by the number of launches, not by these few columns.

    It is none of vLLM's linear layers, which quantisation and LoRA take for the base's, but is computed as an
    unquantised one is: vLLM's loader finds ``quant_method`` and packs the weight where the device's kernels want it.

    Attributes:
        weight: ``[count * num_heads, hidden_size]`` in the model dtype.
        bias: ``[count * num_heads]`` in the model dtype, or None.
    """

    def __init__(self, hidden_size: int, num_heads: int, count: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.quant_method = UnquantizedLinearMethod()
        self.weight = nn.Parameter(torch.empty(count * num_heads, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(count * num_heads), requires_grad=False) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map ``[num_tokens, hidden_size]`` to ``[num_tokens, count * num_heads]``, both in the model dtype."""
        return self.quant_method.apply(self, hidden_states, self.bias)

    def load_weight(self, kind: str, index: int, weight: torch.Tensor) -> None:
        """Take the "weight" or "bias" of the projection ``index``, this rank's heads only."""
        self.get_parameter(kind).data[index * self.num_heads :][: self.num_heads].copy_(weight)


class PerHeadLinear(nn.Module):
    """One square matrix a head, ``x[h] @ weight[h]``.

    Attributes:
        weight: ``[num_heads, head_size, head_size]`` in the model dtype.
    """

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_size, head_size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[num_tokens, num_heads, head_size]`` of any float dtype to the same shape in the model dtype."""
        return torch.bmm(x.to(self.weight.dtype).transpose(0, 1), self.weight).transpose(0, 1)


class Scale(nn.Module):
    """The learned weight of a norm, ``weight [size]`` in the model dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)


def float32_per_head(num_heads: int) -> nn.Parameter:
    """A parameter of one float32 a head, whatever dtype the model runs in: decays do not survive bfloat16."""
    return nn.Parameter(torch.empty(num_heads, dtype=torch.float32), requires_grad=False)
