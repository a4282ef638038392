"""Generate text with a base model and an AHN, offline.

    python examples/offline.py BASE CKPT [--window N] [--sinks N] [--prompt TEXT]

BASE and CKPT are folders or Hugging Face repositories, for example Qwen/Qwen2.5-3B-Instruct and
ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B, or the two that ``vllm-ahn make-tiny`` writes.
"""

from __future__ import annotations

import argparse

from vllm import SamplingParams

from vllm_ahn import LLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("checkpoint")
    parser.add_argument("--window", type=int, help="W, tokens that are seen exactly (default: 32640)")
    parser.add_argument("--sinks", type=int, help="S, first tokens that stay visible (default: 128)")
    parser.add_argument("--prompt", default="Once upon a time there was a transformer that forgot nothing. " * 20)
    args = parser.parse_args()

    llm = LLM(args.base, ahn=args.checkpoint, ahn_window=args.window, ahn_sinks=args.sinks)
    (output,) = llm.generate([args.prompt], SamplingParams(temperature=0, max_tokens=64))
    print(f"{len(output.prompt_token_ids or ())} tokens in, {len(output.outputs[0].token_ids)} out:")
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
