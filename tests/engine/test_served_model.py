"""Which of SGLang's model files is imported, and when all are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from vase_sgl.engine import served_model


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_EXTERNAL_MODEL_PACKAGE", served_model.MODEL_FILE):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)


def _model(folder: Path, *architectures: str) -> str:
    (folder / "config.json").write_text(json.dumps({"architectures": architectures}))
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "file"),
    [("LlamaForCausalLM", "llama"), ("Phi3ForCausalLM", "llama"), ("Qwen3ForCausalLM", "qwen3")],
)
def test_the_file_of_the_architecture(tmp_path: Path, architecture: str, file: str) -> None:
    found = served_model.environment_for(_model(tmp_path, architecture))
    assert found == {
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "vase_sgl.engine.served_model",
        served_model.MODEL_FILE: file,
    }


def test_sglang_s_own_class_is_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in served_model.environment_for(_model(tmp_path, "LlamaForCausalLM")).items():
        monkeypatch.setenv(name, value)
    package = importlib.import_module("vase_sgl.engine.served_model.architecture")
    assert "LlamaForCausalLM" in {entry.__name__ for entry in package.EntryClass}


def test_what_is_not_beyond_doubt_is_left_to_sglang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert served_model.environment_for("org/name-on-a-hub") == {}
    assert served_model.environment_for(_model(tmp_path, "NobodysForCausalLM")) == {}
    assert served_model.environment_for(_model(tmp_path, "LlamaForCausalLM", "Other")) == {}
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "mine")
    assert served_model.environment_for(_model(tmp_path, "LlamaForCausalLM")) == {}
