"""AHN layers on CPUs: plain torch, and vLLM's paged attention."""
