"""Where the memories live: page layouts, cache specs, and the managers that own the blocks.

Importing this package tells vLLM's registry which manager serves which spec. Specs reach the engine core by pickle,
which imports them from here, so their managers come along, and a process without an AHN has neither.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_ahn.cache.managers import AHNStateManager, AHNWindowManager
from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec
from vllm_ahn.plugin.compat import register_own_specs

register_own_specs()
KVCacheSpecRegistry.register(AHNWindowSpec, AHNWindowManager)
KVCacheSpecRegistry.register(AHNStateSpec, AHNStateManager)
