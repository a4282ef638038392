"""What a long sequence costs with and without an AHN: as the paper counts it, and as vLLM allocates it."""
