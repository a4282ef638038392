"""Finding a checkpoint, and the sentence for each thing wrong with its place or its ``config.json``."""

import pathlib
import shutil
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from support.checkpoint_case import SMALL, Case
from vllm_ahn.checkpoint import local_folder
from vllm_ahn.config import AHNConfig
from vllm_ahn.tools.tiny import TinyPaths, make_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), **SMALL)


@pytest.fixture
def case(made: TinyPaths, tmp_path: pathlib.Path) -> Case:
    assert made.ahn is not None
    return Case(made.base, shutil.copytree(made.ahn, tmp_path / "ahn"))


# Finding the checkpoint


def test_no_such_folder(case: Case, tmp_path: pathlib.Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "../a/b", "a/b/c", "~/ahn", "C:\\ahn", "-x", "a b"):
        case.refused(f"{name}: no such folder, expected a folder or a hub repository", setting=name)


def test_a_file(case: Case) -> None:
    case.refused(f"{case.weights}: a file, expected the folder", setting=str(case.weights))


def test_revision_of_a_folder(case: Case) -> None:
    case.refused(f"{case.ahn} is a folder, expected @main after", setting=f"{case.ahn}@main")
    case.refused("org/repo@: nothing after the @, expected the name of a revision", setting="org/repo@")


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_repository_while_offline(case: Case, offline_hub: pathlib.Path) -> None:
    name = "ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B"
    case.refused(f"{name}: no such folder", "the hub cannot be reached", setting=name)
    case.refused("gpt2@v1.0: no such folder", "the hub cannot be reached", setting="gpt2@v1.0")


def test_repository_in_the_local_cache(case: Case, offline_hub: pathlib.Path) -> None:
    repository, commit = offline_hub / "models--org--ahn", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(case.ahn, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for revision in ("main", "v2"):
        (repository / "refs" / revision).write_text(commit)
    assert case.resolve("org/ahn") == AHNConfig("GatedDeltaNet", checkpoint="org/ahn")
    assert case.resolve({"checkpoint": "org/ahn@v2", "window": 3}) == AHNConfig(
        "GatedDeltaNet", 3, checkpoint="org/ahn", revision="v2"
    )
    assert local_folder("org/ahn", "v2") == repository / "snapshots" / commit
    case.refused("org/ahn@v3: no such folder", setting="org/ahn@v3")
    (repository / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    case.refused("org/ahn@v2/model.safetensors: truncated", setting="org/ahn@v2")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub_errors.RepositoryNotFoundError, "no such folder, and no such hub repository"),
        (hub_errors.RevisionNotFoundError, "the hub repository has no revision rev, expected a branch"),
        (hub_errors.GatedRepoError, "the hub repository is gated, expected a token"),
        (hub_errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (hub_errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (hub_errors.HFValidationError, "no name that a hub repository can have"),
        (OSError, "fetching it as a hub repository failed (No space left on device)"),
    ],
)
def test_hub_errors(case: Case, monkeypatch: pytest.MonkeyPatch, error: type[Exception], sentence: str) -> None:
    asked = []

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.append((name, arguments["revision"], arguments["allow_patterns"]))
        raised = error.__new__(error)
        raised.args = ("No space left on device\nwith more below",)
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert case.refused(sentence, setting="org/repo@rev").startswith("org/repo@rev: ")
    assert asked == [("org/repo", "rev", ["config.json", "*.safetensors", "model.safetensors.index.json"])]


# config.json of the checkpoint


def test_folder_without_config(case: Case) -> None:
    (case.ahn / "config.json").unlink()
    case.refused(f"{case.ahn}: no config.json in it, expected the folder or repository of a checkpoint")


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_config_that_is_none(case: Case, text: str) -> None:
    (case.ahn / "config.json").write_text(text)
    case.refused(f"{case.ahn}/config.json: ", "expected a JSON object")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"_ahn_implementation": "Titans"},
            "_ahn_implementation is 'Titans', expected one of GatedDeltaNet, Del",
        ),
        ({"_ahn_implementation": 1}, "_ahn_implementation is 1, expected one of GatedDeltaNet"),
        ({"_ahn_implementation": ...}, "no _ahn_implementation, so this is no AHN checkpoint"),
        ({"_layer_implementation": "LlamaMemDecoderLayer"}, "expected one of Qwen2MemDecoderLayer, Qwen3Mem"),
        (
            {"_layer_implementation": "Qwen3MemDecoderLayer"},
            "_layer_implementation is Qwen3MemDecoderLayer, but model_type is 'qwen2', expected 'qwen3'",
        ),
        ({"model_type": ...}, "model_type is None, expected 'qwen2'"),
        ({"hidden_size": ...}, "hidden_size is missing, expected a positive whole number"),
        ({"use_q_proj": "yes"}, "use_q_proj is 'yes', expected true or false"),
        ({"use_ahn_router": 1}, "use_ahn_router is 1, expected true or false"),
        ({"fa_layer_ids": "2"}, "fa_layer_ids is '2', expected layer numbers from 0 to 1"),
        ({"fa_layer_ids": "0;1"}, "fa_layer_ids is '0;1', expected layer numbers"),
        ({"fa_layer_ids": [-1]}, "fa_layer_ids is [-1], expected layer numbers"),
        ({"fa_layer_ids": [True]}, "fa_layer_ids is [True], expected layer numbers"),
        ({"fa_layer_ids": {"0": 1}}, "fa_layer_ids is {'0': 1}, expected layer numbers"),
        ({"fa_layer_ids": "0,1"}, "fa_layer_ids names all 2 layers, expected at least one layer with an AHN"),
    ],
)
def test_bad_config(case: Case, changes: dict[str, object], sentence: str) -> None:
    case.change_config(**changes)
    case.refused(f"{case.ahn}/config.json: ", sentence)


def test_q_proj_of_another_memory(tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, memory="DeltaNet", **SMALL)
    assert made.ahn is not None
    case = Case(made.base, made.ahn)
    case.change_config(use_q_proj=True)
    case.refused("config.json: use_q_proj is true, expected false for DeltaNet: only GatedDeltaNet has it")


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("hidden", 64, "hidden_size is 32, expected 64"),
        ("heads", 2, "num_attention_heads is 4, expected 2"),
        ("kv_heads", 4, "num_key_value_heads is 2, expected 4"),
        ("layers", 3, "num_hidden_layers is 2, expected 3"),
        ("model_type", "qwen3", "model_type is qwen2, expected qwen3, head_dim is 8, expected 16"),
    ],
)
def test_ahn_of_another_base(case: Case, tmp_path: pathlib.Path, option: str, value: Any, sentence: str) -> None:
    other = make_tiny(tmp_path / "other", **(SMALL | {option: value})).base
    Case(other, case.ahn).refused(
        f"{case.ahn}/config.json: this AHN was made for another base than {other}: ", sentence
    )


def test_ahn_of_another_head_size(tmp_path: pathlib.Path) -> None:
    ours = make_tiny(tmp_path / "ours", model_type="qwen3", head_dim=16, **SMALL)
    theirs = make_tiny(tmp_path / "theirs", model_type="qwen3", head_dim=32, **SMALL)
    assert ours.ahn is not None
    sentence = Case(theirs.base, ours.ahn).refused("made for another base")
    assert sentence.endswith(f"{theirs.base}: head_dim is 16, expected 32")
