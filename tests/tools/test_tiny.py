"""`make_tiny`: checkpoints that transformers and the validator take, the same ones for the same arguments."""

import hashlib
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.paths import GOLDEN
from vllm_ahn.checkpoint import looks_merged, resolve
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.cli import main
from vllm_ahn.tools.tiny import make_tiny

SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "vocab": 300}


def digest(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("merged", [False, True])
def test_transformers_loads_the_base(model_type: str, merged: bool, tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, model_type=model_type, merged=merged, **SMALL)
    config = AutoConfig.from_pretrained(made.base)
    assert config.model_type == model_type
    assert looks_merged(config) == merged == (made.ahn is None)
    setting = None if made.ahn is None else str(made.ahn)
    assert resolve(setting, base=str(made.base), base_revision=None, base_config=config) is not None
    model, report = AutoModelForCausalLM.from_pretrained(made.base, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(".ahn." in name for name in report["unexpected_keys"]) and bool(report["unexpected_keys"]) == merged
    assert model.generation_config.eos_token_id == [299, 297]
    with torch.no_grad():
        logits = model(torch.arange(40)[None] * 7 % 297).logits[0]
    # Choices are clear, no token repeats itself for ever, and the special tokens are not chosen.
    assert 0.8 < logits.std() < 3
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).mean() > 0.1
    assert len(set(logits.argmax(-1).tolist())) > 15
    assert not {297, 298, 299} & set(logits.argmax(-1).tolist())


def test_more_tokens_than_texts(tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, **(SMALL | {"vocab": 70000, "layers": 1, "hidden": 16}))
    config = AutoConfig.from_pretrained(made.base)
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert (config.vocab_size, len(tokenizer), config.eos_token_id) == (70000, 65536, 65535)
    assert tokenizer.eos_token_id == 65535


@pytest.mark.parametrize("vocab", [259, 512, 4000])
def test_tokenizer(vocab: int, tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, **(SMALL | {"vocab": vocab}))
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert len(tokenizer) == vocab
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == vocab - 1
    text = "The window of attention: 世界 é\n\ttwo  spaces\x00 \U0001f9e0."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < vocab
    byte_count = len(text.encode())
    assert len(ids) == byte_count if vocab == 259 else len(ids) < byte_count
    # Every token that a model can choose has a text.
    assert all(isinstance(token, str) for token in tokenizer.convert_ids_to_tokens(list(range(vocab))))


def test_chat_template(tmp_path: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(tmp_path, **SMALL).base)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert ids.count(298) == 3 and ids.count(299) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nBe brief.\nuser")


def test_same_arguments_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    here = tmp_path / "here"
    make_tiny(here, seed=3, **SMALL)
    code = f"from vllm_ahn.tools.tiny import make_tiny; make_tiny({str(tmp_path / 'there')!r}, seed=3, **{SMALL!r})"
    # In another process, whose hashes of strings differ.
    subprocess.run([sys.executable, "-c", code], check=True)
    before = digest(here)
    assert before == digest(tmp_path / "there")
    make_tiny(here, seed=3, **SMALL)
    assert before == digest(here)
    other = digest(make_tiny(tmp_path / "other", seed=4, **SMALL).base.parent)
    assert other["base/model.safetensors"] != before["base/model.safetensors"]
    assert other["ahn/model.safetensors"] != before["ahn/model.safetensors"]
    assert other["base/tokenizer.json"] == before["base/tokenizer.json"]


def test_one_base_for_every_memory_and_form(tmp_path: pathlib.Path) -> None:
    plain = make_tiny(tmp_path / "gdn", **SMALL)
    other = make_tiny(tmp_path / "mamba2", memory="Mamba2", use_router=True, **SMALL)
    assert digest(plain.base) == digest(other.base)
    assert other.ahn is not None
    merged = make_tiny(tmp_path / "merged", memory="Mamba2", use_router=True, merged=True, shards=2, **SMALL)
    assert sorted(path.name for path in merged.base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    both = load_file(plain.base / "model.safetensors") | load_file(other.ahn / "model.safetensors")
    held: dict[str, torch.Tensor] = {}
    for shard in merged.base.glob("*.safetensors"):
        held |= load_file(shard)
    assert held.keys() == both.keys()
    assert all(torch.equal(held[name], both[name]) for name in both)
    index = json.loads((merged.base / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == both.keys()


@pytest.mark.parametrize("name", ["gdn_qwen2", "mamba2_qwen2", "dn_qwen3"])
def test_layout_of_the_golden_checkpoints(name: str, tmp_path: pathlib.Path) -> None:
    golden = GOLDEN / "ahn" / name
    config = json.loads((golden / "config.json").read_text())
    made = make_tiny(tmp_path, model_type=config["model_type"], memory=config["_ahn_implementation"])
    assert made.ahn is not None
    ours = json.loads((made.ahn / "config.json").read_text())
    assert config.keys() - ours.keys() <= {"is_causal", "num_attn_sinks"}
    assert ours["sliding_window"] == 256
    tensors, expected = load_file(made.ahn / "model.safetensors"), load_file(golden / "model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {k: v.shape for k, v in expected.items()}
    base = GOLDEN / ("base_" + config["model_type"])
    resolved = resolve(
        str(made.ahn),
        base=str(base),
        base_revision=None,
        base_config=SimpleNamespace(**json.loads((base / "config.json").read_text())),
    )
    assert resolved is not None and resolved.memory == config["_ahn_implementation"]


def test_dtype(tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, dtype="bfloat16", use_q_proj=True, **SMALL)
    assert made.ahn is not None
    tensors = load_file(made.base / "model.safetensors") | load_file(made.ahn / "model.safetensors")
    kept = {name.rsplit(".", 1)[1] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}
    assert tensors["model.layers.0.ahn.fn.q_proj.weight"].shape == (4, 8, 8)


def test_values_are_sensible(tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, use_router=True)
    assert made.ahn is not None
    tensors = load_file(made.ahn / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name
    rates = torch.cat([value.exp() for name, value in tensors.items() if name.endswith("A_log")])
    steps = torch.cat(
        [torch.nn.functional.softplus(value) for name, value in tensors.items() if name.endswith("dt_bias")]
    )
    assert rates.min() > 0.49 and rates.max() < 4.01
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    assert all(value.std() > 0.05 for name, value in tensors.items() if name.endswith("o_proj.weight"))
    different = {hashlib.sha256(value.numpy().tobytes()).digest() for value in tensors.values()}
    assert len(different) == len(tensors) - 2  # the D of three layers are all ones


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected one of qwen2, qwen3"),
        ({"memory": "Titans"}, "memory is 'Titans', expected one of GatedDeltaNet"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32"),
        ({"vocab": 258}, "vocab is 258, expected at least 259"),
        ({"heads": 0}, "heads is 0, expected at least 1"),
        ({"layers": 0}, "num_hidden_layers is 0, expected a positive whole number"),
        ({"heads": 3}, "num_attention_heads is 3, expected a multiple of num_key_value_heads, 2"),
        ({"hidden": 36}, "head_dim is 9, expected an even number"),
        ({"head_dim": 16}, "head_dim is 16, expected hidden / heads for qwen2, 8"),
        ({"memory": "DeltaNet", "use_q_proj": True}, "use_q_proj is true, expected false for DeltaNet"),
        ({"fa_layer_ids": "5"}, "fa_layer_ids is '5', expected layer numbers from 0 to 1"),
        ({"shards": 0}, "shards is 0, expected at least 1"),
    ],
)
def test_bad_arguments_write_nothing(arguments: dict[str, Any], sentence: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AHNError) as error:
        make_tiny(tmp_path / "out", **(SMALL | arguments))
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [None, "{}", "?", "[]"])
def test_never_overwrites_what_it_did_not_make(config: str | None, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ahn").mkdir()
    (tmp_path / "ahn" / "model.safetensors").write_bytes(b"precious")
    if config is not None:
        (tmp_path / "ahn" / "config.json").write_text(config)
    with pytest.raises(AHNError, match="ahn: exists and was not made by make-tiny"):
        make_tiny(tmp_path, **SMALL)
    assert (tmp_path / "ahn" / "model.safetensors").read_bytes() == b"precious"
    assert not (tmp_path / "base").exists()


def run(*arguments: str) -> int:
    return main(["make-tiny", *arguments])


def test_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "a"), "--memory", "DeltaNet", "--seed", "5", "--layers", "2", "--fa-layer-ids", "1") == 0
    base, ahn = tmp_path / "a" / "base", tmp_path / "a" / "ahn"
    text = capsys.readouterr().out
    assert f"vllm serve {base} --ahn {ahn} " in text
    made = make_tiny(tmp_path / "b", memory="DeltaNet", seed=5, layers=2, fa_layer_ids="1")
    assert digest(tmp_path / "a") == digest(made.base.parent)
    assert run(str(tmp_path / "c"), "--merged", "--model-type", "qwen3") == 0
    assert f"vllm serve {tmp_path / 'c' / 'merged'} --ahn-window" in capsys.readouterr().out
    assert run(str(tmp_path / "d"), "--vocab", "3") == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err == "error: make-tiny: vocab is 3, expected at least 259 tokens\n"
    (tmp_path / "file").touch()
    assert run(str(tmp_path / "file")) == 1
    assert capsys.readouterr().err.startswith("error: make-tiny: [Errno 20] Not a directory")
