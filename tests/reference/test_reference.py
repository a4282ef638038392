"""The whole-model reference: against the golden data, against transformers' base models, and its options."""

import itertools
import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import golden_data
from support.golden_data import CONFIGURATIONS, LOGIT_TOLERANCE
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.reference import BaseConfig, ReferenceModel, from_folders
from vllm_ahn.reference.decoder import Router
from vllm_ahn.reference.layers import window_attention

W, S = 24, 8
GDN = CONFIGURATIONS["gdn_qwen2"]


def load(name: str, **options: Any) -> ReferenceModel:
    golden = CONFIGURATIONS[name]
    return from_folders(golden.base, golden.ahn, golden.window, golden.sinks, **options)


def write_ahn(folder: pathlib.Path, source: pathlib.Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """The AHN checkpoint `source` with other tensors and some changed keys of its config."""
    folder.mkdir()
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))


@pytest.fixture
def prompt() -> torch.Tensor:
    """New in every run; the seed is in the captured output of a test that fails."""
    print("torch seed", torch.seed())
    return torch.randint(0, 512, (1, 90))


@pytest.mark.parametrize("recurrence", ["naive", "chunk"])
@pytest.mark.parametrize(("name", "length"), golden_data.NAMES_AND_LENGTHS)
@torch.no_grad()
def test_golden(name: str, length: int, recurrence: str) -> None:
    """Fed prompt and golden tokens, the model's best next token is the golden one at all 33 places."""
    case = CONFIGURATIONS[name].case(length)
    model = load(name, recurrence=recurrence)
    cache = model.new_cache()
    logits = model(case.prompt[None], cache, last=1)[0]
    for layer, state in case.states.items():
        torch.testing.assert_close(cache[layer].state[0], state, rtol=0, atol=1e-5)
    logits = torch.cat((logits, model(case.tokens[None, :-1], cache)[0]))
    assert logits.argmax(-1).tolist() == case.tokens.tolist()
    assert (logits - case.logits).abs().max() < LOGIT_TOLERANCE


def test_golden_states_are_there() -> None:
    for name in ("gdn_qwen2", "mamba2_qwen2"):
        assert set(CONFIGURATIONS[name].case(100).states) == {0, 1, 2}


@pytest.mark.parametrize(("name", "length"), [("gdn_qwen2", 20), ("gdn_qwen2_s0", 29), ("mamba2_qwen2", 300)])
def test_generate(name: str, length: int) -> None:
    case = CONFIGURATIONS[name].case(length)
    result = load(name).generate(case.prompt[None], 33)
    assert result.tokens[0].tolist() == case.tokens.tolist()
    assert (result.logits[0] - case.logits).abs().max() < LOGIT_TOLERANCE
    assert [state.shape for state in result.states if state is not None] == [(1, 4, 32, 32)] * 3
    short = load(name).generate(case.prompt[None, :10], 2)
    assert short.tokens.shape == (1, 2)
    assert short.states == [None] * 3


@pytest.mark.parametrize("name", golden_data.NAMES)
@torch.no_grad()
def test_a_sequence_in_segments(name: str, prompt: torch.Tensor) -> None:
    """Two sequences, fed in pieces that end before, at and after W + S, give the logits of one pass each."""
    model = load(name)
    batch = torch.cat((prompt, prompt.flip(1)))
    cache = model.new_cache()
    pieces = [model(part, cache) for part in batch.split([1, 30, 1, 1, 20, 37], dim=1)]
    for i in range(2):
        whole = model(batch[i : i + 1])
        torch.testing.assert_close(torch.cat(pieces, 1)[i], whole[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(model(batch[i : i + 1], last=3), whole[:, -3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", golden_data.NAMES)
@torch.no_grad()
def test_up_to_capacity_it_is_the_base(name: str, prompt: torch.Tensor) -> None:
    golden = CONFIGURATIONS[name]
    base, ahn = from_folders(golden.base)(prompt), load(name)(prompt)
    capacity = golden.capacity
    torch.testing.assert_close(ahn[:, :capacity], base[:, :capacity], rtol=0, atol=1e-5)
    assert (ahn[:, capacity] - base[:, capacity]).abs().max() > 1e-2


@torch.no_grad()
def test_window_and_sinks_move_the_capacity(prompt: torch.Tensor) -> None:
    base = from_folders(GDN.base)(prompt)
    for window, sinks in ((1, 0), (1, 3), (40, 0), (7, 50), (89, 0), (90, 0), (10, 300), (1000, 5)):
        logits = from_folders(GDN.base, GDN.ahn, window, sinks)(prompt)
        differs = (logits - base).abs().amax((0, 2)) > 1e-3
        assert not differs[: window + sinks].any()
        assert differs[window + sinks :].all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@torch.no_grad()
def test_base_equals_transformers(model_type: str, bias: bool, tmp_path: pathlib.Path, prompt: torch.Tensor) -> None:
    import transformers

    shape = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": bias,
    }
    if model_type == "qwen3":
        config = transformers.Qwen3Config(**shape, head_dim=16, attention_bias=bias)
    else:
        config = transformers.Qwen2Config(**shape)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = from_folders(tmp_path)
    torch.testing.assert_close(ours(prompt), theirs(prompt).logits, rtol=0, atol=1e-4)


def test_rope_theta_in_either_place() -> None:
    config = json.loads((GDN.base / "config.json").read_text())
    assert BaseConfig.from_dict(config | {"rope_theta": 1e6}).rope_theta == 1e6
    newer = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e6}
    assert BaseConfig.from_dict(newer).rope_theta == 2e6


@pytest.mark.parametrize("name", golden_data.NAMES)
def test_differentiable(name: str) -> None:
    """In float64, the chunk-parallel recurrence gives every parameter the gradient of the token loop."""
    golden = CONFIGURATIONS[name]
    ids = golden.case(100).prompt[None, :60]
    gradients = []
    for recurrence in ("naive", "chunk"):
        model = load(name, recurrence=recurrence, dtype=torch.float64)
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, naive in gradients[0].items():
        assert naive is not None and naive.abs().max() > 0, key
        chunk = gradients[1][key]
        torch.testing.assert_close(chunk, naive, rtol=1e-6, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_bfloat16(prompt: torch.Tensor) -> None:
    for name in golden_data.NAMES:
        model = load(name, dtype=torch.bfloat16)
        narrow = {key for key, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
        assert narrow == {key for key, _ in model.named_parameters() if key.endswith((".A_log", ".dt_bias"))}
        logits, exact = model(prompt).float(), load(name)(prompt)
        assert (logits - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("window", [1, 5, 50, None])
@pytest.mark.parametrize("sinks", [0, 3, 60])
@pytest.mark.parametrize("start", [0, 6])
def test_window_attention_equals_dense_mask(
    window: int | None, sinks: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, heads, kv_heads, dim = 37, 6, 2, 8
    total = start + length
    q = torch.randn(2, length, heads, dim, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, total, kv_heads, dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t, j = torch.arange(start, total)[:, None], torch.arange(total)
    seen = (j <= t) & ((t - j < (window or total)) | (j < sinks))
    scores = torch.einsum("bthd,bjhd->bhtj", q, k.repeat_interleave(3, 2)) * dim**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhtj,bjhd->bthd", weights, v.repeat_interleave(3, 2))
    arriving = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, (q, k, v), arriving)
    for queries, in_steps in itertools.product(((64, 512), (5, 5), (1, 1), (4, 9)), (False, True)):
        monkeypatch.setattr("vllm_ahn.reference.layers.QUERY_BLOCKS", queries)
        monkeypatch.setattr("vllm_ahn.reference.layers._steps_are_faster", lambda q, k, answer=in_steps: answer)
        got = window_attention(q, k, v, start, window, sinks)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(got, (q, k, v), arriving)
        torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            got = window_attention(q, k, v, start, window, sinks)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_attention_is_trained_through_in_bfloat16() -> None:
    exact = [torch.randn(2, 40, heads, 8, requires_grad=True) for heads in (6, 2, 2)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in exact]
    arriving = torch.randn_like(exact[0])
    results = []
    for inputs in (exact, narrow):
        out = window_attention(*inputs, 0, 7, 3)
        results.append((out, *torch.autograd.grad(out, inputs, arriving.to(out.dtype))))
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().mean() < 0.03 * wanted.abs().mean()


@torch.no_grad()
def test_merged_folder(tmp_path: pathlib.Path, prompt: torch.Tensor) -> None:
    merged = tmp_path / "merged"
    tensors = load_file(GDN.base / "model.safetensors") | load_file(GDN.ahn / "model.safetensors")
    write_ahn(merged, GDN.ahn, tensors)
    assert torch.equal(from_folders(merged, window=W, sinks=S)(prompt), load("gdn_qwen2")(prompt))


@pytest.mark.parametrize("base_name", ["base_qwen2", "base_qwen3"])
@torch.no_grad()
def test_q_proj(base_name: str, tmp_path: pathlib.Path, prompt: torch.Tensor) -> None:
    """With identity matrices it changes nothing where the base has no q norm, or one whose weights are all
    alike; with others it changes what is read past W + S."""
    base = golden_data.GOLDEN / base_name
    qwen3 = base_name == "base_qwen3"
    if qwen3:
        tensors = load_file(base / "model.safetensors")
        tensors |= {name: torch.full_like(t, 1.5) for name, t in tensors.items() if name.endswith("q_norm.weight")}
        write_ahn(tmp_path / "base", base, tensors)
        base = tmp_path / "base"
    dim = 64 if qwen3 else 32
    model = ReferenceModel(BaseConfig.from_dict(json.loads((base / "config.json").read_text())), _options(False))
    ahn = {name: tensor for name, tensor in model.state_dict().items() if ".ahn." in name}
    write_ahn(tmp_path / "without", GDN.ahn, ahn)
    identity = torch.eye(dim).repeat(4, 1, 1)
    scaled = {f"model.layers.{i}.ahn.fn.q_proj.weight": (i + 1) * identity for i in range(3)}
    other = {name: torch.randn(4, dim, dim) for name in scaled}
    write_ahn(tmp_path / "identity", GDN.ahn, ahn | scaled, use_q_proj=True)
    write_ahn(tmp_path / "other", GDN.ahn, ahn | other, use_q_proj=True)
    without, same, changed = (
        from_folders(base, tmp_path / kind, W, S)(prompt) for kind in ("without", "identity", "other")
    )
    torch.testing.assert_close(same, without, rtol=0, atol=2e-4)
    torch.testing.assert_close(changed[:, : W + S], without[:, : W + S], rtol=0, atol=1e-5)
    assert (changed[:, W + S :] - without[:, W + S :]).abs().amax((0, 2)).min() > 1e-3


def _options(use_q_proj: bool) -> AHNConfig:
    return AHNConfig("GatedDeltaNet", W, S, use_q_proj=use_q_proj)


@torch.no_grad()
def test_q_proj_comes_before_rope(tmp_path: pathlib.Path) -> None:
    """One layer: the memory is read with RoPE(raw_q @ weight), which is not RoPE(raw_q) @ weight."""
    ahn = load_file(GDN.ahn / "model.safetensors")
    weights = {f"model.layers.{i}.ahn.fn.q_proj.weight": torch.randn(4, 32, 32) for i in range(3)}
    write_ahn(tmp_path / "q", GDN.ahn, ahn | weights, use_q_proj=True)
    model = from_folders(GDN.base, tmp_path / "q", W, S)
    layer, seen = model.model["layers"][0], []
    fn = layer.ahn["fn"]
    absorb = fn.absorb_and_read
    fn.absorb_and_read = lambda q, *rest: seen.append(q) or absorb(q, *rest)
    x = torch.randn(1, 40, 128)
    layer(x, model.new_cache()[0], model.ahn, "chunk")
    raw = layer.self_attn.q_proj(layer.input_layernorm(x))[0, 32:].view(8, 4, 32)
    projected = torch.einsum("thd,hde->the", raw, weights["model.layers.0.ahn.fn.q_proj.weight"])
    frequency = 10000.0 ** (-torch.arange(16) / 16)
    turn = torch.polar(torch.ones(8, 16), torch.arange(32, 40)[:, None] * frequency)
    turned = torch.complex(projected[..., :16], projected[..., 16:]) * turn[:, None]
    torch.testing.assert_close(seen[0][0], torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_router(tmp_path: pathlib.Path) -> None:
    """Heads 0 to 3 take sigmoid(ln r) = r / (1 + r), 1/2, nearly all and nearly nothing of the memory."""
    alpha, beta = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 20.0, -20])
    router = Router(4)
    router.alpha.data, router.beta.data = alpha + 3, beta
    torch.testing.assert_close(router(torch.tensor([1.0]))[0], beta.sigmoid())  # ln 1 = 0

    tensors = load_file(GDN.ahn / "model.safetensors")
    for i in range(3):
        tensors |= {f"model.layers.{i}.ahn_router.alpha": alpha, f"model.layers.{i}.ahn_router.beta": beta}
    write_ahn(tmp_path / "router", GDN.ahn, tensors, use_ahn_router=True)
    routed, plain = from_folders(GDN.base, tmp_path / "router", W, S), load("gdn_qwen2")
    x = torch.randn(1, 70, 128)

    def added(model: ReferenceModel) -> torch.Tensor:
        """What the first layer's memory adds, [T, H, D]."""
        layer = model.model["layers"][0]
        cache, positions = model.new_cache()[0], torch.arange(70)
        hidden = layer.input_layernorm(x)
        q, cache.k, cache.v, raw_q = layer.self_attn.project(hidden, positions)
        return layer._memory(hidden, q, raw_q, positions, cache, model.ahn, "chunk")[0]

    part, whole = added(routed), added(plain)
    assert torch.equal(whole[: W + S], torch.zeros(W + S, 4, 32))
    assert whole[W + S :].abs().amax(-1).min() > 0
    r = torch.arange(1, 70 - W - S + 1)[:, None] / W
    torch.testing.assert_close(part[W + S :, 0], whole[W + S :, 0] * r / (1 + r))
    torch.testing.assert_close(part[:, 1], whole[:, 1] / 2)
    torch.testing.assert_close(part[:, 2], whole[:, 2])
    assert part[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize("as_text", [False, True])
@torch.no_grad()
def test_full_attention_layers(as_text: bool, tmp_path: pathlib.Path, prompt: torch.Tensor) -> None:
    base, plain = from_folders(GDN.base), load("gdn_qwen2")
    tensors = load_file(GDN.ahn / "model.safetensors")
    kept = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("model.layers.0.", "model.layers.2."))
    }
    write_ahn(tmp_path / "some", GDN.ahn, kept, fa_layer_ids="0,2" if as_text else [0, 2])
    some = from_folders(GDN.base, tmp_path / "some", W, S)
    write_ahn(tmp_path / "all", GDN.ahn, tensors, fa_layer_ids=[0, 2])  # some checkpoints hold tensors of every layer
    assert torch.equal(from_folders(GDN.base, tmp_path / "all", W, S)(prompt), some(prompt))
    x = torch.randn(1, 70, 128)
    for i, like in enumerate((base, plain, base)):
        cache = [model.new_cache()[i] for model in (some, like)]
        of_layer = like.ahn  # None for the base
        got, wanted = (m.model["layers"][i](x, c, of_layer, "chunk") for m, c in zip((some, like), cache, strict=True))
        assert torch.equal(got, wanted)
    assert not torch.equal(some(prompt), plain(prompt))
    everywhere = ReferenceModel(base.base, AHNConfig("Mamba2", W, S, full_attention_layers=(0, 1, 2)))
    everywhere.load_state_dict(base.state_dict())
    assert torch.equal(everywhere(prompt), base(prompt))


def test_bad_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AHNError, match=r"config\.json: no such file"):
        from_folders(tmp_path)
    tensors = load_file(GDN.ahn / "model.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if not name.endswith("1.ahn.fn.A_log")}
    write_ahn(tmp_path / "missing", GDN.ahn, missing)
    with pytest.raises(AHNError, match=r"missing tensors model\.layers\.1\.ahn\.fn\.A_log"):
        from_folders(GDN.base, tmp_path / "missing", W, S)
    write_ahn(tmp_path / "surplus", GDN.ahn, tensors | {"model.layers.9.ahn.fn.A_log": torch.zeros(4)})
    with pytest.raises(AHNError, match=r"surplus tensors model\.layers\.9\.ahn\.fn\.A_log"):
        from_folders(GDN.base, tmp_path / "surplus", W, S)
    write_ahn(tmp_path / "shape", GDN.ahn, tensors | {"model.layers.0.ahn.fn.A_log": torch.zeros(5)})
    with pytest.raises(AHNError, match=r"A_log has shape \(5,\), expected \(4,\)"):
        from_folders(GDN.base, tmp_path / "shape", W, S)
    config = json.loads((GDN.base / "config.json").read_text())
    for wrong in ({"model_type": "llama"}, {"use_sliding_window": True}, {"hidden_act": "gelu"}):
        with pytest.raises(AHNError, match=next(iter(wrong))):
            BaseConfig.from_dict(config | wrong)
    with pytest.raises(AHNError, match="rope scaling"):
        BaseConfig.from_dict(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(AHNError, match="recurrence is 'fast'"):
        load("gdn_qwen2", recurrence="fast")


def test_imports_neither_vllm_nor_engine() -> None:
    import subprocess
    import sys

    code = (
        "import sys, vllm_ahn.reference; "
        "print([m for m in sys.modules if m.split('.')[0] == 'vllm' or "
        "m.startswith(('vllm_ahn.memory.base', 'vllm_ahn.attention', 'vllm_ahn.cache', 'vllm_ahn.models'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
