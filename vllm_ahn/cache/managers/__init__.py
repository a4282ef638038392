"""Who holds which block: the scheduler's side of the two memories."""

from vllm_ahn.cache.managers.state import AHNStateManager
from vllm_ahn.cache.managers.window import AHNWindowManager

__all__ = ["AHNStateManager", "AHNWindowManager"]
