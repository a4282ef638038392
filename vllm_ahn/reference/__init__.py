"""The whole model in plain torch, written from the paper's formulas, differentiable, for any length.

`ReferenceModel` is what the engine's outputs are compared with. It imports neither vLLM nor the engine's layers and
memories. With ``recurrence="naive"`` it shares no arithmetic with the engine but the l2 norm; the default is the
chunk-parallel recurrence of `vllm_ahn.kernels`, which is the CPU core's as well.
"""

from vllm_ahn.reference.base import BaseConfig
from vllm_ahn.reference.decoder import LayerCache
from vllm_ahn.reference.loading import from_folders, new_memory
from vllm_ahn.reference.model import Generation, ReferenceModel

__all__ = ["BaseConfig", "Generation", "LayerCache", "ReferenceModel", "from_folders", "new_memory"]
