"""Where the memories live: cache specs, the managers that own the blocks, and what a layer keeps.

Importing this room tells vLLM which manager serves which spec. A model of ours imports it in the worker; in the
engine's process the specs arrive by pickle, and bring it along.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_ahn.cache.managers import AHNStateManager, AHNWindowManager
from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec
from vllm_ahn.plugin.compat import register_own_specs

register_own_specs()
KVCacheSpecRegistry.register(AHNWindowSpec, AHNWindowManager)
KVCacheSpecRegistry.register(AHNStateSpec, AHNStateManager)
