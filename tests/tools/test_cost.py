"""``vllm-ahn cost`` as a user meets it: text, JSON, plot, and one sentence for bad input."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cost_case import QWEN2_5, write, write_ahn
from support.paths import GOLDEN
from vllm_ahn.tools.cli import main


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write(tmp_path / "Qwen2.5-3B", QWEN2_5["3B"]) / "config.json")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["cost", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", model]) == 0
    text = capsys.readouterr().out
    for line in (
        "36 layers, hidden size 2,048, 16 heads, 2 key/value heads, head size 128",
        "window 32,640 tokens + 128 sinks",
        "== 128,000 tokens ==",
        "full attention 2.50 100.0 3.29 100.0 9.44 100.0",
        "sinks + window 1.17 46.6 1.95 59.3 2.42 25.6",
        "AHN, Mamba2 1.17 46.7 1.95 59.4 2.45 26.0",
        "full attention, fp8 2.50 100.0 3.13 100.0 2.20 50.0 2.20 50.0 18 18.20x",
        "AHN, GatedDeltaNet 1.17 46.9 1.80 57.5 1.28 29.0 1.87 42.6 30 21.36x",
        "AHN, GatedDeltaNet 25.60 1.60 0.80 1.00 0.02 29.02 13.60 42.62 26.00",
        "bfloat16, blocks of 16 tokens, 2 x 8,192 tokens in flight",
        "blocks of a checkpoint in the prefix cache, where there is room: GatedDeltaNet 68, DeltaNet 70, Mamba2 63",
    ):
        assert line in re.sub(" +", " ", text), text
    assert max(map(len, text.splitlines()[1:])) <= 120
    tables = [line for line in text.splitlines() if line.startswith("---")]
    assert len(tables) == 3
    assert all(len(line) <= 120 for line in tables)


@pytest.mark.parametrize("name", ["Qwen2.5-3B", "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct"])
def test_published_bases_need_neither_folder_nor_network(
    name: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published, folder = answer(capsys, name), answer(capsys, model)
    assert published["model"].pop("name") == name and folder["model"].pop("name") == model
    assert published == folder


def test_published_checkpoints_need_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    name = "ByteDance-Seed/AHN-Mamba2-for-Qwen-2.5-Instruct-7B"
    rows = answer(capsys, "Qwen/Qwen2.5-7B-Instruct", "--ahn", name)["lengths"][0]["vllm"]
    assert rows[3] == answer(capsys, "Qwen2.5-7B", "--memory", "mamba2")["lengths"][0]["vllm"][3]
    assert main(["cost", "Qwen2.5-3B", "--ahn", name]) == 1
    expected = f"error: {name}: this AHN was made for another base than Qwen2.5-3B, expected Qwen/Qwen2.5-7B-Instruct\n"
    assert capsys.readouterr().err == expected


def test_a_folder_wins_over_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "Qwen2.5-3B", QWEN2_5["3B"] | {"num_hidden_layers": 5})
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "Qwen2.5-3B")["model"]["layers"] == 5


def test_a_state_in_bfloat16_takes_half(capsys: pytest.CaptureFixture[str]) -> None:
    wide = answer(capsys, "Qwen2.5-3B", "--memory", "gdn")
    narrow = answer(capsys, "Qwen2.5-3B", "--memory", "gdn", "--mamba-ssm-cache-dtype", "bfloat16")
    assert (wide["state_dtype"], narrow["state_dtype"]) == ("float32", "bfloat16")
    states = [report["lengths"][0]["vllm"][-1]["parts_bytes"]["state"] for report in (wide, narrow)]
    assert states == [36 * 16 * 128 * 128 * 4, 36 * 16 * 128 * 128 * 2]
    assert main(["cost", "Qwen2.5-3B", "--mamba-ssm-cache-dtype", "bfloat16"]) == 0
    assert "a state in the cache's dtype, here bfloat16, instead of bfloat16" in capsys.readouterr().out


def test_text_of_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    golden = GOLDEN / "base_qwen2"
    assert (
        main(["cost", str(golden), "--window", "24", "--sinks", "8", "--length", "300", "--sequences-in", "0.5"]) == 0
    )
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "as vLLM allocates, GFLOP and MiB" in text
    assert "fit 0.50 GiB" in text
    assert "full attention, bfloat16 0.16 100.0 0.25 100.0 0.22 100.0" in text


def test_json_of_some_lengths_and_settings(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--memory dn --window 8064 --length 16k 128K --dtype float32 --block-size 32 -tp 2 --no-async-scheduling"
    )
    arguments += " --max-num-batched-tokens 2048 --sequences-in 7.5 --no-enable-prefix-caching --spec-tokens 7"
    report = answer(capsys, model, *arguments.split())
    assert (report["window"], report["sinks"], report["cache_memory_bytes"]) == (8064, 128, int(7.5 * 2**30))
    assert report["settings"] == {
        "dtype": "float32",
        "block_size": 32,
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 2048,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "spec_tokens": 7,
        "max_in_flight_tokens": 2048,
    }
    assert [entry["length"] for entry in report["lengths"]] == [16_000, 131_072]
    for entry in report["lengths"]:
        assert [row["name"] for row in entry["paper"]] == ["full attention", "sinks + window", "AHN, DeltaNet"]
        full, fp8, window, ahn = entry["vllm"]
        assert (full["name"], fp8["name"]) == ("full attention, float32", "full attention, fp8")
        assert fp8["held_bytes"] * 4 == full["held_bytes"]
        # One KV head of 128, its 8 query heads' gates: 36 layers of 32 tokens in float32.
        assert full["block_bytes"] == 36 * 32 * 256 * 4
        assert ahn["block_bytes"] == 36 * 32 * (256 + 8) * 4
        assert window["held_blocks"] == 4 + 8064 // 32 + 1
        assert ahn["held_blocks"] == window["held_blocks"] + 2 * -(-8 * (128 + 16) // (32 * 264 // 128))
        assert ahn["reserved_blocks"] - ahn["held_blocks"] == 2048 // 32
        assert full["percent"]["held_bytes"] == 100
        assert sum(ahn["parts_bytes"].values()) == ahn["reserved_bytes"]


def test_checkpoints_say_which_memory(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*arguments: str) -> list[str]:
        return [row["name"] for row in answer(capsys, *arguments)["lengths"][0]["paper"][2:]]

    ahn = str(write_ahn(tmp_path / "ahn", "3B", "Mamba2"))
    assert rows(model, "--ahn", ahn) == ["AHN, Mamba2"]
    assert rows(model, "--ahn", "none") == []
    merged = str(write_ahn(tmp_path / "merged", "3B", "GatedDeltaNet"))
    assert rows(merged) == ["AHN, GatedDeltaNet"]
    assert rows(merged, "--memory", "mamba2") == ["AHN, Mamba2"]
    assert rows(str(tmp_path / "Qwen2.5-3B")) == ["AHN, GatedDeltaNet", "AHN, DeltaNet", "AHN, Mamba2"]


def test_layers_with_full_attention_keep_every_block(tmp_path: Path, model: str, capsys: Any) -> None:
    config = json.loads((write_ahn(tmp_path / "ahn", "3B", "DeltaNet") / "config.json").read_text())
    write(tmp_path / "ahn", config | {"fa_layer_ids": "0,7"})
    full, _, _, ahn = answer(capsys, model, "--ahn", str(tmp_path / "ahn"))["lengths"][0]["vllm"]
    assert ahn["held_blocks"] > full["held_blocks"]
    assert ahn["percent"]["held_bytes"] > 103


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(suffix: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"cost.{suffix}"
    assert main(["cost", model, "--memory", "gdn", "--length", "64k", "128k", "--plot", str(file)]) == 0
    assert "128,000 tokens" in capsys.readouterr().out
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert file.read_bytes().startswith(start)
    if suffix == "svg":  # text is text there
        drawn = file.read_text()
        for words in (
            "full attention, bfloat16",
            "full attention, fp8",
            "sinks + window",
            "AHN, GatedDeltaNet",
            "128,000 tokens:",
            "29 % of full",
            "8.79 GiB",
            "tokens of the sequence, thousands",
        ):
            assert words in drawn, words


def test_plot_without_matplotlib(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["cost", model, "--plot", "cost.png"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == 'error: --plot needs matplotlib, which is not installed: pip install "vllm-ahn[plot]"\n'


GOOD = QWEN2_5["3B"]


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        (GOOD | {"architectures": ["LlamaForCausalLM"]}, "", "AHN is implemented only for Qwen2ForCausalLM, Qwen3"),
        (GOOD | {"intermediate_size": None}, "", "config.json: intermediate_size is None, expected a positive whole"),
        ({k: v for k, v in GOOD.items() if k != "vocab_size"}, "", "config.json: vocab_size is missing"),
        ([1], "", "config.json: holds list, expected a JSON object"),
        (
            GOOD,
            "--length 32k 64k",
            "--length is 32,000, expected more tokens than window and sinks together, 32,640 + ",
        ),
        (GOOD, "--window 0", "window (--ahn-window) is 0, expected a whole number of tokens from 1"),
        (GOOD, "--block-size 100", "--block-size is 100, expected one of 16, 32"),
        (GOOD, "-tp 3", "--tensor-parallel-size is 3, expected a divisor of the model's 16 heads"),
        (GOOD, "-tp 0", "--tensor-parallel-size is 0, expected a number above 0"),
        (GOOD, "--spec-tokens 16", "--spec-tokens is 16, expected a number from 0 to 15"),
        (GOOD, "--sequences-in nan", "--sequences-in is nan, expected a number above 0"),
        (GOOD, "--plot cost.gif", "--plot is cost.gif, expected a file name that ends in .png, .svg or .pdf"),
        (GOOD, "--plot nowhere/cost.png", "--plot is nowhere/cost.png, expected a file in a folder that exists"),
        (GOOD, "--ahn nowhere/at/all", "nowhere/at/all: no such folder, expected a folder or a hub repository"),
    ],
)
def test_bad_input(
    config: Any, arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(write(tmp_path, config)), *arguments.split()]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere/at/all", "nowhere/at/all: no such folder, expected a folder or a hub repository"),
        ("{folder}", "no config.json in it, expected the folder or repository of a checkpoint"),
        ("{folder}/broken.json", "broken.json: not readable, expected a JSON object"),
    ],
)
def test_no_model(name: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    assert main(["cost", name.format(folder=tmp_path)]) == 1
    assert sentence in capsys.readouterr().err


def test_ahn_of_another_base(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", model, "--ahn", str(write_ahn(tmp_path / "ahn", "14B", "DeltaNet"))]) == 1
    assert "this AHN was made for another base than" in capsys.readouterr().err


def test_memory_and_checkpoint_exclude_each_other(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cost", model, "--ahn", "none", "--memory", "gdn"])
    assert "not allowed with argument" in capsys.readouterr().err
