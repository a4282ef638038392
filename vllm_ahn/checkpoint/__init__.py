"""AHN checkpoints: find one, read its headers, check it, and resolve it to the configuration that is served."""

from vllm_ahn.checkpoint.check import Checkpoint, read_checkpoint
from vllm_ahn.checkpoint.find import local_folder
from vllm_ahn.checkpoint.request import looks_merged, resolve

__all__ = ["Checkpoint", "local_folder", "looks_merged", "read_checkpoint", "resolve"]
