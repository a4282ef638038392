"""AHN checkpoints: find one, read its headers, check it, and resolve it to the configuration that is served."""

from vllm_ahn.checkpoint.locate import local_folder
from vllm_ahn.checkpoint.reader import Checkpoint, read_checkpoint
from vllm_ahn.checkpoint.resolve import LOAD_FORMATS, looks_merged, resolve

__all__ = ["LOAD_FORMATS", "Checkpoint", "local_folder", "looks_merged", "read_checkpoint", "resolve"]
