"""What it costs to keep the state in bfloat16 (``--mamba-ssm-cache-dtype bfloat16``), over 100,000 tokens.

    python benchmarks/state_precision.py

Arithmetic is float32 in both cases; the state is rounded whenever it is written. A decode writes it after each token, a
prefill once for all of its tokens in a step. So the recurrence runs with the state as it is, rounded after each token,
and rounded after each 2,048 tokens.
"""

from precision import main

if __name__ == "__main__":
    main("state", __doc__)
