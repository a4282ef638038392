"""A base with an AHN checkpoint to spoil, for the tests of `vllm_ahn.checkpoint`."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ahn.checkpoint import resolve
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError

SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "intermediate": 32,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 259,
}


def read_base(folder: pathlib.Path) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


@dataclasses.dataclass
class Case:
    """A base with an AHN checkpoint of its own to spoil."""

    base: pathlib.Path
    ahn: pathlib.Path

    @property
    def weights(self) -> pathlib.Path:
        return self.ahn / "model.safetensors"

    def change_config(self, **changes: object) -> None:
        config = json.loads((self.ahn / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (self.ahn / "config.json").write_text(json.dumps(config))

    def change_tensors(self, **changes: torch.Tensor | None) -> None:
        """Replaces, adds, or for None removes ``model.layers.`` tensors; "__" in a keyword is a dot."""
        tensors = load_file(self.weights)
        for key, value in changes.items():
            name = "model.layers." + key.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        save_file(tensors, self.weights)

    def resolve(self, setting: object = ..., **arguments: Any) -> AHNConfig | None:
        arguments = {"base_revision": None, "base_config": read_base(self.base)} | arguments
        return resolve(str(self.ahn) if setting is ... else setting, base=str(self.base), **arguments)

    def refused(self, *parts: str, setting: object = ..., **arguments: Any) -> str:
        """Asserts that `resolve` raises one sentence with all of `parts` in it."""
        with pytest.raises(AHNError) as error:
            self.resolve(setting, **arguments)
        sentence = str(error.value)
        assert "\n" not in sentence
        for part in parts:
            assert part in sentence, sentence
        return sentence
