"""Compare what an engine answered with the reference, or, in bfloat16, with plain schedules."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams

from fuzz.case import Case
from fuzz.play import Answer, Failure, Played, case_engine
from vllm_ahn.reference import ReferenceModel
from vllm_ahn.tools.tiny import TinyPaths

TOLERANCE = 1e-3
"""In float32: of log-probabilities, and between the two best where another token may be taken."""


@dataclass
class Compared:
    """What was compared."""

    positions: int = 0
    ties: int = 0
    """Positions whose two best tokens lie within the tolerance, so that the token says nothing; in bfloat16, those
    where another token than the plain schedule's best was taken within the tolerance."""
    largest_error: float = 0.0


def against_reference(answers: list[Answer], model: ReferenceModel) -> Compared:
    """Compare each token with what the reference gives after the engine's own tokens before it.

    Raises:
        Failure: a token is not the best, or a log-probability is off.
    """
    compared = Compared()
    for index, answer in enumerate(answers):
        if not answer.tokens:
            continue
        text = torch.tensor([answer.prompt + answer.tokens[:-1]])
        with torch.no_grad():
            expected = model(text, last=len(answer.tokens))[0].log_softmax(-1)
        _check_tokens(index, answer, expected.topk(2).values, expected, TOLERANCE, compared)
        for position, reported in enumerate(answer.logprobs):
            tokens = torch.tensor(list(reported))
            given = torch.tensor([entry.logprob for entry in reported.values()], dtype=expected.dtype)
            error = float((given - expected[position, tokens]).abs().max())
            # Written so that NaN fails.
            if not error <= TOLERANCE:
                raise Failure(f"{_where(index, answer, position)}: a log-probability is off by {error:.3g}")
            compared.largest_error = max(compared.largest_error, error)
    return compared


def _check_tokens(
    index: int, answer: Answer, best: torch.Tensor, expected: torch.Tensor, tolerance: float, compared: Compared
) -> None:
    """Check tokens against ``expected [n, vocab]``, the two best of which are ``best [n, 2]``."""
    own = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    if len(answer.logprobs) != len(answer.tokens):
        raise Failure(f"request {index} has {len(answer.tokens)} tokens and {len(answer.logprobs)} log-probabilities")
    for position, token in enumerate(answer.tokens):
        compared.positions += 1
        compared.ties += bool(best[position, 0] - best[position, 1] <= tolerance)
        worse = float(best[position, 0] - own[position])
        if not worse <= tolerance:
            raise Failure(f"{_where(index, answer, position)}: token {token} is worse than the best by {worse:.3g}")


def _where(index: int, answer: Answer, position: int) -> str:
    ended = "aborted request" if answer.aborted else "request"
    return (
        f"{ended} {index}, prompt of {len(answer.prompt)} tokens ({answer.num_cached_tokens} cached), "
        f"token {position} of {len(answer.tokens)}"
    )


def against_plain_schedules(case: Case, paths: TinyPaths, played: Played) -> Compared:
    """Compare log-probabilities of tokens with those of two plain engines, by how far these are apart.

    One of them takes all of the texts at once, the other token by token, both without prefix caching, in plenty of
    blocks. They are given the engine's own tokens, and say by ``prompt_logprobs`` what they think of them.

    Raises:
        Failure: the engine is further from both than twice what the two are apart.
    """
    answers = [(index, answer) for index, answer in enumerate(played.answers) if answer.tokens]
    texts = [answer.prompt + answer.tokens for _, answer in answers]
    at_once, one_by_one = (
        [
            logprobs[len(answer.prompt) :]
            for (_, answer), logprobs in zip(answers, _prompt_logprobs(case, paths, texts, chunk), strict=True)
        ]
        for chunk in (0, 1)
    )
    apart = max(float((a - b)[:, 0].abs().max()) for a, b in zip(at_once, one_by_one, strict=True))
    compared = Compared()
    for (index, answer), plain, other in zip(answers, at_once, one_by_one, strict=True):
        for position, (token, reported) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            compared.positions += 1
            own, best = plain[position].tolist()
            compared.ties += own < best
            error = min(abs(reported[token].logprob - x[position, 0].item()) for x in (plain, other))
            if not error <= 2 * apart:
                raise Failure(f"{_where(index, answer, position)}: off by {error:.3g}, plain schedules by {apart:.3g}")
            if not best - own <= 2 * apart:
                raise Failure(f"{_where(index, answer, position)}: token {token} is worse by {best - own:.3g}")
            compared.largest_error = max(compared.largest_error, error)
    return compared


def _prompt_logprobs(case: Case, paths: TinyPaths, texts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """For each text ``[length, 2]``: log-probabilities of its own tokens and of the best; NaN at first."""
    plain: dict[str, Any] = {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 8,
        "long_prefill_token_threshold": chunk,
        "async_scheduling": False,
        "scheduling_policy": "fcfs",
        "max_model_len": case.engine["max_model_len"] + 1,
        "speculative_config": None,
    }
    ample = Case(case.seed, case.model, case.window, case.sinks, case.engine, None)
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=1)
    with case_engine(ample, paths, **plain) as llm:
        outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    result = []
    for text, output in zip(texts, outputs, strict=True):
        rows = [[float("nan")] * 2]
        for token, entries in zip(text[1:], output.prompt_logprobs[1:], strict=True):
            rows.append([entries[token].logprob, max(entry.logprob for entry in entries.values())])
        result.append(torch.tensor(rows))
    return result
