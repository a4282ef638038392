"""``vllm-ahn doctor`` and the plugin's own idea of whether it is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vllm_ahn import plugin
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import compat
from vllm_ahn.tools.cli import doctor


def run_doctor(**environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm-ahn"), "doctor"],
        env={k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_doctor_finds_nothing_broken_here() -> None:
    code, out = run_doctor()
    assert code == 0, out
    for text in (
        "vllm-ahn",
        "0.32.0+cpu",
        "vllm_ahn.plugin:register",
        "Qwen3ForCausalLM",
        "cpu (",
        "plugin can",
    ):
        assert text in out
    assert "problem:" not in out


def test_doctor_notices_that_the_plugin_is_left_out() -> None:
    code, out = run_doctor(VLLM_PLUGINS="another")
    assert code == 1
    assert "problem: VLLM_PLUGINS='another' leaves the AHN plugin out" in out
    assert "loaded by vLLM          no" in out


def test_doctor_notices_a_missing_compiler() -> None:
    code, out = run_doctor(CXX="no-such-compiler")
    assert code == 1
    assert "problem: vLLM compiles models by default" in out


def test_left_out_by_vllm_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "one,ahn")
    assert plugin.why_not_loaded() is None
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert "VLLM_PLUGINS=''" in str(plugin.why_not_loaded())
    with pytest.raises(AHNError, match="leaves the AHN plugin out"):
        plugin.require()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "entry_points", lambda group: [])
    assert "no installed distribution has the entry point 'ahn'" in str(plugin.why_not_loaded())


def test_name_taken_by_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    other = EntryPoint(name="ahn", group=plugin.GROUP, value="somebody:register")
    monkeypatch.setattr(plugin, "entry_points", lambda group: [other])
    assert "belongs to another package (somebody:register)" in str(plugin.why_not_loaded())


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.2.dev1+g0", "dev"])
def test_supported_versions(version: str) -> None:
    compat.check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0"])
def test_other_versions(version: str) -> None:
    with pytest.raises(AHNError, match=re.escape(f"vLLM {version} is installed")):
        compat.check_vllm_version(version)


def test_register_fails_with_a_sentence_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(plugin, "_registered", False)
    with monkeypatch.context() as wrong:
        wrong.setattr(vllm, "__version__", "0.40.0")
        with pytest.raises(AHNError, match=r"vLLM 0\.40\.0"):
            plugin.register()
    with monkeypatch.context() as wrong:
        wrong.setattr("vllm_ahn.plugin.limits.install", lambda: 1 / 0)
        with pytest.raises(AHNError, match="could not be loaded: ZeroDivisionError"):
            plugin.register()
    assert not plugin.is_registered()
    plugin.register()
    plugin.register()
    assert plugin.is_registered()


def test_blind_spots_are_named() -> None:
    assert any("VLLM_PLUGINS" in text and "additional_config" in text for text in doctor.BLIND_SPOTS)
