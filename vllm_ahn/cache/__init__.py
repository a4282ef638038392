"""Where the memories live: page layouts, cache specs, and the managers that own the blocks."""


def register_specs() -> None:
    """Tell vLLM's registry which manager serves which spec. May be called any number of times."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_ahn.cache.managers import AHNStateManager, AHNWindowManager
    from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec

    # The registry adds vLLM's own specs when it is first asked and still empty: ours must not come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(AHNWindowSpec, AHNWindowManager)
    KVCacheSpecRegistry.register(AHNStateSpec, AHNStateManager)
