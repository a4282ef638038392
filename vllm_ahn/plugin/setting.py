"""The user's wish for an AHN as one value, ``additional_config["ahn"]``, whichever way in it came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_ahn.errors import AHNError

FLAG_OF_KEY = {"checkpoint": "--ahn", "window": "--ahn-window", "sinks": "--ahn-sinks"}
"""Key of ``additional_config["ahn"]`` -> the flag of ``vllm serve`` that means the same."""


def with_flags(
    additional_config: object, *, checkpoint: object = None, window: object = None, sinks: object = None
) -> Any:
    """`additional_config` with the values of the three flags merged under ``"ahn"``.

    A value of None is a flag that was not given. The argument is not changed. Raises `AHNError` where
    ``additional_config`` says something about the same thing already.
    """
    given = {"checkpoint": checkpoint, "window": window, "sinks": sinks}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return additional_config
    if additional_config is not None and not isinstance(additional_config, Mapping):
        raise AHNError(
            f"additional_config is {additional_config!r}, expected a dict where "
            f"{FLAG_OF_KEY[next(iter(given))]} is given"
        )
    extra = dict(additional_config or {})
    there = extra.get("ahn")
    if there is None:
        there = {}
    elif isinstance(there, str):
        there = {"checkpoint": there}
    elif not isinstance(there, Mapping):
        raise AHNError(f'additional_config["ahn"] is {there!r}, expected a checkpoint or a dict')
    for key in given:
        if key in there:
            raise AHNError(
                f'{FLAG_OF_KEY[key]} is {given[key]!r} and additional_config["ahn"] gives {key} as well: give only one'
            )
    extra["ahn"] = {**there, **given}
    return extra


def check_keys(additional_config: object) -> None:
    """Raises `AHNError` for "ahn" misspelt in `additional_config`: the plain model would be served."""
    for key in additional_config if isinstance(additional_config, Mapping) else ():
        if isinstance(key, str) and key != "ahn" and re.match(r"(vllm)?[-_]*ahn", key, re.IGNORECASE):
            raise AHNError(f'additional_config has the key {key!r}, expected "ahn" with a checkpoint or a dict')


def ahn_setting(additional_config: Any) -> Any:
    """What ``additional_config`` says about AHN: None, a checkpoint, or a dict (resolved or the user's)."""
    return additional_config.get("ahn") if isinstance(additional_config, dict) else None


def is_resolved(setting: Any) -> bool:
    """Whether `setting` is an `AHNConfig.to_dict()`: only these have the key ``memory``."""
    return isinstance(setting, dict) and "memory" in setting
