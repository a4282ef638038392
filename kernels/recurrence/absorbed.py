"""What the recurrence takes of absorbed tokens, read from the pages of a CPU."""

from dataclasses import dataclass

import torch

from vllm_ahn.kernels.pages import WindowPages
from vllm_ahn.kernels.recurrence.gates import decay_and_rate
from vllm_ahn.kernels.recurrence.norm import l2_normalize
from vllm_ahn.memory.spec import MemorySpec


@dataclass(frozen=True)
class Absorbed:
    """Tokens of ``R`` requests, ``T`` each; those that are none are zero and leave a state as it is."""

    k: torch.Tensor
    """``[R, T, Hkv, D]`` float32, l2-normalised."""
    v: torch.Tensor
    """``[R, T, Hkv, D]`` float32."""
    g: torch.Tensor
    b: torch.Tensor
    """``[R, T, H]`` float32."""

    @classmethod
    def read(
        cls,
        pages: WindowPages,
        tables: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        memory: MemorySpec,
        A_log: torch.Tensor | None,
    ) -> "Absorbed":
        """Read tokens wherever they lie.

        Args:
            pages: the layer's window pages.
            tables: ``[R, width]`` integer, the requests' block tables.
            positions: ``[R, T]`` int64.
            valid: ``[R, T]`` bool; of other positions no page is read.
            memory: which memory.
            A_log: ``[H]`` float32, where the decay is made of the rate.
        """
        layout = pages.layout
        # Elsewhere a page may hold NaN, which no mask takes away again: look at the last valid one instead.
        positions = positions.masked_fill(~valid, 0)
        positions = torch.where(valid, positions, positions.amax(-1, keepdim=True))
        blocks = tables.gather(1, positions // layout.block_size)
        offsets = positions % layout.block_size
        k = pages.keys_transposed[blocks, :, :, offsets]
        v = pages.values[blocks, :, offsets]
        gates = pages.gates[blocks, :, offsets].float()
        g, b = decay_and_rate(memory, gates.flatten(2).unflatten(-1, (-1, memory.num_gates)), A_log)
        outside = ~valid.unsqueeze(-1)
        return cls(l2_normalize(k), v.float(), g.masked_fill(outside, 0.0), b.masked_fill(outside, 0.0))
