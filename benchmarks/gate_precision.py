"""What it costs that gates are kept in bfloat16, over 100,000 tokens.

    python benchmarks/gate_precision.py

Gates are computed in float32 and stored beside K and V in the cache dtype until their token leaves the window. Here the
recurrence runs once with the gates as computed and once with the gates as read back from a bfloat16 page. As a
yardstick it runs a third time with K and V in bfloat16 instead, which is what any bfloat16 cache does to them.
"""

from precision import main

if __name__ == "__main__":
    main("gates", __doc__)
