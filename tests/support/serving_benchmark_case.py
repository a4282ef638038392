"""`benchmarks/serving.py` with a tiny model and short prompts.

python tests/support/serving_benchmark_case.py OUTPUT
"""

from __future__ import annotations

import functools
import sys

from support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import models
import serving

if __name__ == "__main__":
    models.SHAPES["0.5B"] = models.SHAPES["tiny"]
    serving.prompt = functools.partial(serving.prompt, vocab=512)  # type: ignore[assignment]
    serving.SHORT, serving.REQUESTS, serving.ROUNDS = 64, 2, 1
    serving.NEAR, serving.FAR, serving.ANSWER = 1100, 1300, 8
    sys.argv = ["serving.py", "--eager", "--dtype", "float32", "--repetitions", "2", "--output", sys.argv[1]]
    serving.main()
