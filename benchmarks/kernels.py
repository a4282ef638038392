"""The kernels of an AHN layer on a GPU: verified, then timed.

    python benchmarks/kernels.py [--quick] [--cases decode,prefill,window,write] [--json FILE]

Needs torch, triton, einops and flash-linear-attention, and no vLLM; where vLLM can be imported, window attention is its
kernel. Shapes are Qwen2.5's, W = 32,640, S = 128, blocks of 16 tokens, bfloat16 with states in float32.

Each case first compares kernels with plain torch in float64, on fresh random inputs. What does not agree is not timed,
and the exit status is 1.
"""

import sys
from pathlib import Path

# Nothing else outside of this: Transformers looks for a package named `kernels`, and from this folder finds this file.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

    from kernel_cases.run import main

    sys.exit(main(__doc__ or ""))
