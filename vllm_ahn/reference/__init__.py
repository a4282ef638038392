"""The whole model in plain torch, written from the paper's formulas and sharing nothing with the engine.

`ReferenceModel` is what the engine's outputs are compared with, and is differentiable. It imports neither
vLLM nor the engine's layers; of this project it uses `vllm_ahn.kernels`, whose token loop can be asked for by
``recurrence="naive"``.
"""

from .loading import from_folders
from .model import BaseConfig, Generation, LayerCache, ReferenceModel

__all__ = ["BaseConfig", "Generation", "LayerCache", "ReferenceModel", "from_folders"]
