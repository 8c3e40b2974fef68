"""A scheme out of a stock file makes the same file again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp import tools
from dynrun.models import open_reference
from dynrun.scheme import read_scheme
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native


@pytest.mark.parametrize("shards", [False, True])
def test_the_types_of_somebodys_file_make_the_same_tensors_again(tmp_path: Path, shards: bool) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_block=3, n_expert=4)
    tools.quantize(model, "theirs.gguf", "Q4_K_M", folder=tmp_path, n_threads=1)
    theirs = tmp_path / "theirs.gguf"
    given = tools.split_file(theirs, tmp_path / "s", max_size="1M")[-1] if shards else theirs
    ran = dynrun("scheme", "from", given, "--out", tmp_path / "s.toml", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["label"] == "Q4_K_M"
    assert {"Q4_K", "Q6_K"} <= set(ran.json["types"].values())
    scheme = read_scheme(tmp_path / "s.toml", quantizable(open_reference(str(model)).header))
    tools.write_tensor_types(scheme.types, tmp_path / "types.txt")
    tools.quantize(model, "ours.gguf", "Q8_0", folder=tmp_path, n_threads=1, tensor_type_file="types.txt")
    found = dynrun("scheme", "diff", given, tmp_path / "ours.gguf", "--json").json
    assert (found["types"], found["n_same"]) == ({}, len(scheme.types))
    assert found["a"]["bpw"] == found["b"]["bpw"]
