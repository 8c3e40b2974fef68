"""The schemes in the repository are whole and fit their model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.artifacts import sha256_file
from dynrun.gguf.header import read_header
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.scheme import read_scheme

pytestmark = pytest.mark.native
FOLDER = Path(__file__).resolve().parents[2] / "schemes" / "smollm2"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.name)
def test_a_scheme_names_every_tensor_of_its_model_and_its_size(path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue("demo_moe_model" if path.name.startswith("demo-moe") else "demo_model")
    tensors = quantizable(read_header(model))
    scheme = read_scheme(path, tensors)
    assert scheme.source_sha256 == sha256_file(model)
    data = sum(tensor_bytes(tensors[name], type_name) for name, type_name in scheme.types.items())
    assert 0 < scheme.size_bytes - data < 5_000_000  # metadata, the vocabulary above all, and norms
    assert scheme.size_bytes <= scheme.budget_bytes
