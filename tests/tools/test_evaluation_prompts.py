"""Reading data sets, and prompts that are cut to a number of tokens."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from support.evaluation_data import CHINESE, ENGLISH, question, write_data
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import benchmarks
from vllm_ahn.tools.evaluate.data import DATA_VARIABLE, DataFile, read_records
from vllm_ahn.tools.evaluate.prompts import Cut, PromptSettings, doc_to_text, fit, load_tokenizer
from vllm_ahn.tools.tiny import make_tiny

BEFORE, AFTER = "Read this.\n\n", "\n\nWhat is it?\nAnswer:"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny")).base)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, ("16k", "128k"), repeat=2)
    return folder


def tokens(base: str, text: str) -> list[int]:
    return list(load_tokenizer(base)(text).input_ids)


def settings(base: str, limit: int, cut: Cut, chat: bool = False) -> PromptSettings:
    return PromptSettings(base, limit, cut, chat)


def test_a_prompt_that_fits_is_left_alone(base: str) -> None:
    prompt = BEFORE + ENGLISH + AFTER
    assert fit(BEFORE, ENGLISH, AFTER, settings(base, len(tokens(base, prompt)), "middle")) == prompt


@pytest.mark.parametrize("limit", [100, 101])
def test_cut_in_the_middle(base: str, limit: int) -> None:
    """The first half of the tokens and the last half, counted over the whole prompt."""
    prompt = BEFORE + ENGLISH * 5 + AFTER
    whole, cut = tokens(base, prompt), tokens(base, fit(BEFORE, ENGLISH * 5, AFTER, settings(base, limit, "middle")))
    assert cut == whole[: limit // 2] + whole[-(limit - limit // 2) :]


def test_cut_from_the_left(base: str) -> None:
    """The start of the context goes, the instruction stays."""
    whole = tokens(base, BEFORE + ENGLISH * 5 + AFTER)
    cut = tokens(base, fit(BEFORE, ENGLISH * 5, AFTER, settings(base, 100, "left")))
    before = len(tokens(base, BEFORE))
    assert cut == whole[:before] + whole[-(100 - before) :]


def test_cut_from_the_left_where_a_token_reaches_into_the_context(base: str) -> None:
    """``" T"`` is one token, of which the space belongs to the instruction."""
    text = fit("Story: ", ENGLISH * 5, AFTER, settings(base, 100, "left"))
    kept = text.removeprefix("Story: ").removesuffix(AFTER)
    assert kept and ENGLISH.endswith(kept)


@pytest.mark.parametrize("cut", ["middle", "left"])
def test_the_chat_template_counts(base: str, cut: Cut) -> None:
    text = fit(BEFORE, ENGLISH * 5, AFTER, settings(base, 120, cut, chat=True))
    assert text.startswith(f"<|im_start|>user\n{BEFORE}") and text.endswith(
        f"{AFTER}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokens(base, text)) == 120


@pytest.mark.parametrize("cut", ["middle", "left"])
@pytest.mark.parametrize("limit", range(150, 160))
def test_characters_of_several_tokens_are_not_torn(base: str, cut: Cut, limit: int) -> None:
    context = CHINESE * 4
    text = fit("读：", context, "\n问？", settings(base, limit, cut))
    assert text.startswith("读：") and text.endswith("\n问？")
    head = next(n for n in range(len(context), -1, -1) if text.startswith("读：" + context[:n]))
    assert context.endswith(text.removeprefix("读：" + context[:head]).removesuffix("\n问？"))
    # A Chinese character is three tokens here: at most two at each side of the cut could not be kept.
    assert limit - 4 <= len(tokens(base, text)) <= limit


def test_a_seam_that_takes_more_tokens_is_cut_further(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where texts joined count more than apart, the prompt still fits."""
    from vllm_ahn.tools.evaluate import prompts

    tokenizer, count = load_tokenizer(base), prompts._count
    whole = BEFORE + ENGLISH * 5 + AFTER

    def count_more(found: Any, text: str) -> int:
        return count(found, text) + (3 if text != whole else 0)

    monkeypatch.setattr(prompts, "_count", count_more)
    text = fit(BEFORE, ENGLISH * 5, AFTER, settings(base, 100, "middle"))
    assert count(tokenizer, text) == 97


def test_a_limit_that_leaves_no_room(base: str) -> None:
    with pytest.raises(AHNError, match=r"^max_prompt_tokens is 10, expected more"):
        fit(BEFORE, ENGLISH, AFTER, settings(base, 10, "middle"))


def test_no_chat_template(tmp_path: Path) -> None:
    base = make_tiny(tmp_path).base
    config = base / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"no_template"'))
    with pytest.raises(AHNError, match="no chat template"):
        fit(BEFORE, ENGLISH, AFTER, settings(str(base), 1000, "left", chat=True))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match="its tokenizer, which counts the tokens of prompts, cannot be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "neither tokenizer nor pretrained"),
        ({"pretrained": "x", "max_prompt_tokens": "many"}, "max_prompt_tokens is 'many', expected a number"),
        ({"pretrained": "x", "max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"pretrained": "x", "chat_template": "yes"}, "chat_template is 'yes', expected true or false"),
    ],
)
def test_bad_metadata(metadata: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AHNError, match=sentence):
        PromptSettings.from_metadata(metadata, max_tokens=1, cut="left", chat_template=False)


def test_the_tokenizer_may_be_another(base: str) -> None:
    metadata = {"pretrained": "x", "tokenizer": base, "tokenizer_revision": "r", "trust_remote_code": True}
    found = PromptSettings.from_metadata(metadata, max_tokens=7, cut="left", chat_template=True)
    assert found == PromptSettings(base, 7, "left", True, "r", True)


def test_the_paper_s_settings(data: Path) -> None:
    metadata = {"pretrained": "model", "data_folder": str(data)}
    cases = [
        ("ahn_lveval_cmrc_mixup_128k", 256_000, "middle", False),
        ("ahn_lveval_factrecall_en_16k", 32_000, "middle", False),
        ("ahn_infinitebench_longbook_qa_eng", 128_000, "left", False),
        ("ahn_longbench_hotpotqa", 32_000, "left", True),
        ("ahn_longbench_triviaqa", 32_000, "left", False),
    ]
    for subset, limit, cut, chat in cases:
        [first, *_] = benchmarks.load(subset, **metadata)["test"]
        assert first["prompt_settings"] == vars(PromptSettings("model", limit, cut, chat)), subset
        assert first["answers"], subset


def test_prompts(base: str, data: Path) -> None:
    metadata = {"pretrained": base, "data_folder": str(data)}
    [first, *_] = benchmarks.load("ahn_lveval_factrecall_en_16k", **metadata)["test"]
    assert doc_to_text(first) == (
        "Please answer the following questions based on the given article.\n\nArticle: "
        + ENGLISH * 2
        + "\n\nPlease answer the following questions based on the above article.\n\nQuestion: "
        + question("factrecall_en", 0)
        + "\nAnswer:"
    )
    [first, *_] = benchmarks.load("ahn_longbench_dureader", **metadata)["test"]
    assert doc_to_text(first) == (
        "<|im_start|>user\n请基于给定的文章回答下述问题。\n\n文章："
        + CHINESE * 2
        + f"\n\n请基于上述文章回答下面的问题。\n\n问题：{question('dureader', 0)}\n回答："
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "subset",
    ["ahn_lveval_cmrc_mixup", "ahn_lveval_cmrc_mixup_17k", "ahn_infinitebench_passkey", "ahn_longbench_qasper"],
)
def test_unknown_subsets(subset: str) -> None:
    with pytest.raises(AHNError, match=f"subset is '{subset}', expected one of"):
        benchmarks.load(subset, pretrained="x")


def test_unpacked_comes_before_packed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = DataFile("Infinigence/LVEval", "lic_mixup/lic_mixup_16k.jsonl", "lic_mixup.zip")
    monkeypatch.setenv(DATA_VARIABLE, str(data))
    assert [record["input"] for record in read_records(file, ["input"])] == [question("lic_mixup", n) for n in (0, 1)]
    path = tmp_path / file.repository / file.path
    path.parent.mkdir(parents=True)
    path.write_text('{"input": "unpacked"}\n\n')
    assert read_records(file, ["input"], str(tmp_path)) == [{"input": "unpacked"}]


def test_the_hub(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder, the file that the hub has is asked for."""
    import huggingface_hub

    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(data / repository / name)

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for subset in ("ahn_lveval_lic_mixup_16k", "ahn_infinitebench_longbook_qa_chn", "ahn_longbench_qmsum"):
        assert len(benchmarks.load(subset, pretrained="x")["test"]) > 0
    assert asked == [
        ("Infinigence/LVEval", "lic_mixup.zip", "dataset"),
        ("xinrongzhang2022/InfiniteBench", "longbook_qa_chn.jsonl", "dataset"),
        ("THUDM/LongBench", "data.zip", "dataset"),
    ]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(AHNError, match=rf"^nobody/nothing: fetching x.jsonl from the hub failed .*{DATA_VARIABLE}"):
        read_records(DataFile("nobody/nothing", "x.jsonl"), [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"input": 1}\n{', "line 2: no JSON"),
        ("[1]", "line 1: list, expected a JSON object"),
        ('{"context": 1}', "line 1: no field input"),
        ("\n", "no records"),
    ],
)
def test_bad_records(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "a/b/c.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(AHNError, match=f"{path}.*{sentence}"):
        read_records(DataFile("a/b", "c.jsonl"), ["input"], str(tmp_path))


def test_bad_archives(tmp_path: Path) -> None:
    file = DataFile("a/b", "c/c.jsonl", "c.zip")
    with pytest.raises(AHNError, match=r"no c/c.jsonl and no c.zip"):
        read_records(file, [], str(tmp_path))
    path = tmp_path / "a/b/c.zip"
    path.parent.mkdir(parents=True)
    path.write_text("no zip")
    with pytest.raises(AHNError, match="not a zip file"):
        read_records(file, [], str(tmp_path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("d.jsonl", "{}")
    with pytest.raises(AHNError, match=r"0 files called c.jsonl, expected one"):
        read_records(file, [], str(tmp_path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("elsewhere/c.jsonl", '{"x": "é"}')
        archive.writestr("__MACOSX/c/c.jsonl", "rubbish")
    assert read_records(file, ["x"], str(tmp_path)) == [{"x": "é"}]


def test_data_folder_is_a_text() -> None:
    with pytest.raises(AHNError, match="data_folder is 3, expected the path of a folder"):
        benchmarks.load("ahn_longbench_qmsum", pretrained="x", data_folder=3)
