"""Train the small base model from nothing, on a CPU: a Qwen2 of 2.4 million parameters that reads bytes.

    python examples/small_model/train_base.py OUTPUT [--effort SHARE]

Writes a checkpoint that ``vllm serve`` takes, with ``training.json`` beside it: seeds, versions, hash of the data and
loss.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from corpus import read_corpus
from reproduce import share_of

from vllm_ahn.tools.tiny.tokenizer import MIN_VOCAB, write_tokenizer

SEED = 1
STEPS = 1500
TOKENS_PER_STEP = 8192
STAGES = ((0.7, 512), (0.3, 2048))
"""Share of the steps, and tokens of a sequence in it. What is far apart is learnt last, on few long sequences."""

MATRIX_RATE = 0.02
"""Learning rate of Muon, for the matrices of the layers."""
OTHER_RATE = 2e-3
"""Learning rate of AdamW, for embeddings, norms and biases."""
WARM_UP = 0.02
"""Share of the steps."""


def small_config() -> Qwen2Config:
    """The shape: four heads of 64, two of keys and values."""
    return Qwen2Config(
        vocab_size=MIN_VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_theta=1e6,
        bos_token_id=MIN_VOCAB - 3,
        eos_token_id=MIN_VOCAB - 1,
        pad_token_id=MIN_VOCAB - 3,
        dtype="float32",
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], seed: int | None) -> torch.Tensor:
    """All texts in one row of tokens, in random order if there is a seed, with the end of text between them."""
    order = (
        torch.arange(len(texts))
        if seed is None
        else torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    )
    end = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    pieces = [tokenizer(texts[i])["input_ids"] + end for i in order.tolist()]
    return torch.tensor([token for piece in pieces for token in piece], dtype=torch.long)


def batches(tokens: torch.Tensor, length: int, seed: int) -> Iterator[torch.Tensor]:
    """``[TOKENS_PER_STEP / length, length]`` from random places, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (TOKENS_PER_STEP // length,), generator=generator)
        yield tokens[starts[:, None] + torch.arange(length)]


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def bits_per_byte(model: Qwen2ForCausalLM, tokens: torch.Tensor, length: int) -> float:
    """Mean over held-out tokens; a token is a byte."""
    model.eval()
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows[:: max(1, len(rows) // 32)]]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def train(output: pathlib.Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output, MIN_VOCAB)
    tokenizer = AutoTokenizer.from_pretrained(output)
    corpus = read_corpus()
    tokens, held_out = encode(tokenizer, corpus.train, SEED), encode(tokenizer, corpus.held_out, None)
    model = Qwen2ForCausalLM(small_config())
    model.train()
    opts = optimizers(model)
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    curve: list[dict[str, float]] = []
    started, mean = time.monotonic(), None
    lengths = [length for share, length in STAGES for _ in range(round(share * steps))]
    sources = {length: batches(tokens, length, SEED + length) for _, length in STAGES}
    for step, length in enumerate(lengths):
        warm = min(1.0, (step + 1) / (WARM_UP * len(lengths)))
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(lengths))))
        for opt, rate in zip(opts, rates, strict=True):
            for group in opt.param_groups:
                group["lr"] = rate * factor
        batch = next(sources[length])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 25 == 0 or step + 1 == len(lengths):
            seconds = time.monotonic() - started
            curve.append({"step": step + 1, "bits_per_byte": mean / math.log(2), "seconds": round(seconds, 1)})
            print(
                f"step {step + 1}/{len(lengths)}  {mean / math.log(2):.3f} bits per byte  {seconds:.0f} s", flush=True
            )
    record = {
        "seed": SEED,
        "steps": len(lengths),
        "tokens_per_step": TOKENS_PER_STEP,
        "stages": STAGES,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
        "held_out_bits_per_byte": {str(n): round(bits_per_byte(model, held_out, n), 4) for n in (512, 2048)},
        "data": {"sha256": corpus.sha256, "train_bytes": len(tokens), "held_out_bytes": len(held_out)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "curve": curve,
    }
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--effort", type=float, default=1.0, help=f"share of the {STEPS} steps to take")
    args = parser.parse_args()
    record = train(args.output, share_of(STEPS, args.effort))
    print(json.dumps({key: value for key, value in record.items() if key != "curve"}, indent=2))


if __name__ == "__main__":
    main()
