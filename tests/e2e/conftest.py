"""Folders of safetensors, made once by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.demo.builtin import original
from tests.conftest import in_users_cache
from tests.conversion import make_models


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's original, in three shards of safetensors, as transformers saves what it read of the GGUF."""
    with in_users_cache():
        source = original()
    return make_models("demo", source, tmp_path_factory.mktemp("hf") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def tiny(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny random models, and their logits by transformers."""
    return make_models("tiny", smollm, tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def parts(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a tiny gemma3 with its image encoder, and of a glm4_moe."""
    return make_models("parts", smollm, tmp_path_factory.mktemp("hf") / "parts")
