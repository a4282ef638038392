"""Training an AHN: only the memory learns, from the base with full attention; a run resumes as if never cut short."""

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.engines import engine, greedy
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.reference import ReferenceModel, from_folders, new_memory
from vllm_ahn.tools.cli import main
from vllm_ahn.tools.distill import lengths
from vllm_ahn.tools.distill.data import Samples, read_samples
from vllm_ahn.tools.distill.model import Distillation
from vllm_ahn.tools.distill.run import distill
from vllm_ahn.tools.distill.settings import Settings
from vllm_ahn.tools.tiny import make_tiny

WINDOW, SINKS = 24, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), seed=5, layers=2, hidden=64, heads=2, kv_heads=1).base


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=6)) for _ in range(30)]
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=120)))
    return path


def settings(base: Path, text: Path, output: Path, **changes: Any) -> Settings:
    fixed: dict[str, Any] = {
        "length": 96, "window": WINDOW, "sinks": SINKS, "steps": 12, "batch_size": 8, "micro_batch": 8,
        "learning_rate": 1e-2, "save_every": 4,
    }  # fmt: skip
    return Settings(base=str(base), data=(str(text),), output=str(output), **(fixed | changes))


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "loss.json").read_text())]


@pytest.mark.parametrize("memory", ["DeltaNet", "Mamba2"])
def test_the_loss_falls(memory: str, base: Path, text: Path, tmp_path: Path) -> None:
    """And the output is a checkpoint of the AHN alone."""
    train_and_check(settings(base, text, tmp_path / "ahn", memory=memory, steps=40, learning_rate=3e-2))


def train_and_check(asked: Settings) -> Path:
    output = distill(asked)
    curve = losses(output)
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3]), curve
    assert (output / "loss.png").stat().st_size > 1000
    assert all(".ahn.fn." in name for name in load_file(output / "model.safetensors"))
    assert main(["inspect", str(output)]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("use_q_proj", [False, True])
def test_what_is_trained_is_served(use_q_proj: bool, base: Path, text: Path, tmp_path: Path) -> None:
    """The engine's logits are the reference's, and the memory adds to them."""
    asked = settings(base, text, tmp_path / "ahn", use_q_proj=use_q_proj, steps=40, learning_rate=3e-2)
    output = train_and_check(asked)
    prompt = torch.randint(256, (150,), generator=torch.Generator().manual_seed(0))
    setting = {"checkpoint": str(output), "window": WINDOW, "sinks": SINKS}
    with engine(base, setting, logprobs_mode="raw_logits") as llm:
        ((tokens, logits),) = greedy(llm, [prompt], 5, logprobs=-1)
    sequence = torch.cat((prompt, torch.tensor(tokens[:-1])))[None]
    with torch.no_grad():
        expected = from_folders(base, output, WINDOW, SINKS)(sequence, last=5)[0]
        without = from_folders(base, "none", WINDOW, SINKS)(sequence, last=5)[0]
    assert logits is not None
    assert (logits - expected).abs().max() <= 1e-3
    assert (logits - without).abs().max() > 1e-2


def test_only_the_memory_learns(base: Path) -> None:
    model = new_memory(base, AHNConfig("GatedDeltaNet"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = Distillation(model, "kl")
    memory = {name for name in before if ".ahn.fn." in name}
    tokens = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(1))
    training(tokens, WINDOW, SINKS)["loss"].backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {name for name in memory if name.endswith("o_proj.weight")}  # it is zero, and hides the rest
    torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.1).step()
    training(tokens, WINDOW, SINKS)["loss"].backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == memory
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name not in memory)


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "DeltaNet", "Mamba2"])
@torch.no_grad()
def test_a_new_memory_adds_nothing_and_forgets_slowly(memory: str, base: Path) -> None:
    tokens = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(1))
    ahn = AHNConfig(memory, WINDOW, SINKS, use_q_proj=memory == "GatedDeltaNet")
    model = new_memory(base, ahn, slowest=4096)
    assert torch.equal(model(tokens), from_folders(base, "none", WINDOW, SINKS)(tokens))
    for layer in model.model["layers"]:
        fn = layer.ahn["fn"]
        if memory == "GatedDeltaNet":
            queries = torch.randn(3, 2, 32)
            assert torch.equal(fn.q_proj(queries), queries)
        if memory != "DeltaNet":
            kept = 1 / (fn.A_log.exp() * torch.nn.functional.softplus(fn.dt_bias))
            torch.testing.assert_close(kept, torch.tensor([32.0, 4096.0]))


def test_gradients_do_not_depend_on_checkpointing(base: Path) -> None:
    tokens = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(3))
    gradients = []
    for checkpointing in (True, False):
        torch.manual_seed(4)
        training = Distillation(new_memory(base, AHNConfig("Mamba2")), "kl", checkpointing)
        for name, parameter in training.named_parameters():
            if name.endswith("o_proj.weight") and ".ahn." in name:
                parameter.data.normal_(std=0.1)
        training(tokens, WINDOW, SINKS)["loss"].backward()
        gradients.append({name: p.grad for name, p in training.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_loss(loss: Any, base: Path) -> None:
    """Over positions beyond the window alone, from the same weights with full attention, or from the text."""
    model = new_memory(base, AHNConfig("DeltaNet"))
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight") and ".ahn." in name:
            parameter.data.normal_(std=0.1)
    tokens = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(2))
    got = Distillation(model, loss)(tokens, WINDOW, SINKS)["loss"]
    served = ReferenceModel(model.base, AHNConfig("DeltaNet", WINDOW, SINKS), "naive")
    served.load_state_dict(model.state_dict())
    with torch.no_grad():
        student = served(tokens)[:, WINDOW + SINKS :].log_softmax(-1)
        teacher = from_folders(base)(tokens)[:, WINDOW + SINKS :].log_softmax(-1)
    if loss == "kl":
        expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    else:
        expected = -student[:, :-1].gather(-1, tokens[:, WINDOW + SINKS + 1 :, None]).mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes(base: Path, text: Path, tmp_path: Path) -> None:
    """Killed after a checkpoint and resumed, a run ends with the very same tensors and loss curve."""
    drawn = settings(base, text, tmp_path / "whole", window=None, sinks=None, lossless=(16, 32, 64))
    whole, cut = distill(drawn), tmp_path / "cut"
    command = [
        sys.executable, "-m", "vllm_ahn.tools.cli", "distill", str(base),
        "--data", str(text), "--output", str(cut), "--length", "96", "--lossless", "16", "32", "64", "--steps", "12",
        "--batch-size", "8", "--micro-batch", "8", "--learning-rate", "1e-2", "--save-every", "4",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not is_complete(cut / "checkpoint-4"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "model.safetensors").exists()
    distill(dataclasses.replace(drawn, output=str(cut), resume=True))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert losses(whole) == losses(cut)


def is_complete(checkpoint: Path) -> bool:
    """Whether the trainer has written all of it, the state last."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    return False


@pytest.mark.slow
def test_two_processes_learn_what_one_does(base: Path, text: Path, tmp_path: Path) -> None:
    """Each works on half of every batch; the first writes, and says so."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "-m", "vllm_ahn.tools.cli", "distill", str(base), "--data", str(text), "--output", str(tmp_path / "two"),
        "--length", "96", "--window", str(WINDOW), "--sinks", str(SINKS), "--steps", "4", "--batch-size", "8",
        "--micro-batch", "4", "--learning-rate", "1e-2", "--save-every", "2",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("Serve it:") == 1
    one = distill(settings(base, text, tmp_path / "one", steps=4, micro_batch=4, save_every=2))
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_keeps_the_last_good_state(base: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "ahn"
    with pytest.raises(
        AHNError, match=r"step \d+: (the loss|a gradient) is not finite .*checkpoint-1 is the last good"
    ):
        distill(settings(base, text, output, learning_rate=1e30, save_every=1, warm_up=0.2))
    assert not (output / "model.safetensors").exists()
    kept = load_file(output / "checkpoint-1" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


def test_lengths_are_drawn_as_in_the_paper() -> None:
    rng = random.Random(0)
    drawn = {lengths.draw(rng, 4096, lengths.LOSSLESS, lengths.SINKS) for _ in range(500)}
    sizes = {window + sinks for window, sinks in drawn}
    assert sizes == {1024, 2048}  # more than an eighth of 4096, less than all of it
    assert {sinks for _, sinks in drawn} == {0, 32, 64, 128, 512}
    assert all(2 * sinks <= window + sinks for window, sinks in drawn)


def test_samples(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    (tmp_path / "a.txt").write_text("x" * 70)
    (tmp_path / "b.txt").write_text("y" * 200)
    chat = [{"role": "user", "content": "u" * 60}, {"role": "assistant", "content": "z" * 60}]
    lines = [{"messages": chat}, {"text": "w" * 99}, {"text": "short"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl"))
    asked = settings(base, tmp_path, tmp_path, length=128, batch_size=2, micro_batch=1)
    asked = dataclasses.replace(asked, data=data)
    decoded = [tokenizer.decode(sample) for sample in read_samples(asked, tokenizer)]
    template = tokenizer.apply_chat_template(chat, tokenize=False)
    joined = "x" * 70 + "<|endoftext|>" + "y" * 200 + "<|endoftext|>"
    pieces = [tokenizer.decode(tokenizer(joined)["input_ids"][start : start + 128]) for start in (0, 128)]
    assert decoded == [tokenizer.decode(tokenizer(template)["input_ids"][:128]), "w" * 99, *pieces]

    # Too long for any window that may be drawn, if it were not cut.
    drawn = dataclasses.replace(asked, window=None, sinks=None, lossless=(32,), data=(data[2],), max_ratio=5)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "v" * 1000}))
    assert [len(sample) for sample in read_samples(drawn, tokenizer)] == [128]

    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    samples = Samples(dataclasses.replace(asked, window=None, sinks=None), read_samples(asked, tokenizer))
    items = [samples[i] for i in range(len(samples))]
    assert len(items) == asked.steps * 2
    assert [samples[i]["window"] for i in (5, 3)] == [items[5]["window"], items[3]["window"]]
    assert len({item["window"] for item in items}) > 1
    first_epoch = [len(item["input_ids"]) for item in items[:4]]
    assert sorted(first_epoch) == sorted(len(sample) for sample in samples.samples)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory": "LSTM"}, "--memory is 'LSTM', expected one of gdn, dn, mamba2"),
        ({"memory": "DeltaNet", "use_q_proj": True}, "--use-q-proj is for --memory gdn, but it is DeltaNet"),
        ({"sinks": None}, "--window and --sinks are expected both or neither"),
        ({"window": 96}, "--length is 96, expected more tokens than --window and --sinks together, 104"),
        ({"micro_batch": 3}, "--batch-size is 8, expected a multiple of --micro-batch 3"),
        ({"steps": 0}, "--steps is 0, expected at least 1"),
        ({"warm_up": 1.0}, "--warm-up is 1.0, expected a share"),
        ({"data": ("no-such-folder/x.txt",)}, "no such file, and no data set of that name"),
        ({"length": 100_000, "window": 50_000}, "all 1 samples are too short, expected more tokens than --window"),
        ({"resume": True}, "--resume: no checkpoint in .*ahn"),
        ({"base": "no-such-base-folder/x/y"}, "no such folder, expected a folder or a hub repository"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], sentence: str, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(AHNError, match=sentence):
        distill(dataclasses.replace(settings(base, text, tmp_path / "ahn"), **changes))
    assert not (tmp_path / "ahn").exists()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model_type", "llama", "model_type is 'llama', expected 'qwen2' or 'qwen3'"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config is set, expected a base that is not"),
        ("_ahn_implementation", "Mamba2", "has an AHN of its own"),
    ],
)
def test_bases_that_cannot_be_extended(
    key: str, value: object, sentence: str, base: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(AHNError, match=sentence):
        distill(settings(other, text, tmp_path / "ahn"))


def test_a_run_resumes_with_its_own_settings_only(base: Path, text: Path, tmp_path: Path) -> None:
    asked = settings(base, text, tmp_path / "ahn", steps=2, save_every=1)
    distill(asked)
    with pytest.raises(AHNError, match=r"--output .*: exists, expected a new or empty folder, or --resume"):
        distill(asked)
    with pytest.raises(AHNError, match=r"--resume: steps is 3, expected 2 as in .*distill\.json"):
        distill(dataclasses.replace(asked, resume=True, steps=3))
