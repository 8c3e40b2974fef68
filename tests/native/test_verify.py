"""`dynrun verify`: a made file holds; every way in which it may not is found and named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynrun.gguf.header import read_header
from dynrun.llamacpp import tools
from dynrun.make import Made
from dynrun.scheme import read_scheme, write_scheme
from dynrun.target import Target
from tests.commands import Ran, dynrun
from tests.native.test_make_scheme import SMALL, run
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_tiny_llama(folder / "base.gguf")


@pytest.fixture(scope="module")
def made(model: Path, folder: Path) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(folder / "cache"))
        return run(model, Target(bpw=4.5), folder / "base-4.gguf")[0]


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The made file and its scheme, to be damaged."""
    shutil.copy(made.scheme_path, tmp_path / "base-4.scheme.toml")
    return Path(shutil.copy(made.file, tmp_path / "base-4.gguf"))


def verified(path: Path, *arguments: str | Path) -> Ran:
    return dynrun("verify", path, *arguments, "--json")


def wrong(ran: Ran) -> dict[str, str]:
    """Name and detail of what does not hold, and that the command says so."""
    found = {one["name"]: one["detail"] for one in ran.json["findings"]}
    assert ran.json["ok"] is not bool(found)
    assert ran.exit_code == bool(found)
    return found


def damage(path: Path, name: str, data: bytes) -> None:
    """Overwrite the beginning of a tensor."""
    header = read_header(path)
    with path.open("r+b") as stream:
        stream.seek(header.data_offset + header.tensors[name].offset)
        stream.write(data)


def test_a_made_file_holds_and_comes_out_the_same_again(copy: Path, model: Path, made: Made) -> None:
    ran = verified(copy, "--reference", model, "--remake", *SMALL)
    assert wrong(ran) == {}, ran.stdout
    checks = {one["name"]: one["ok"] for one in ran.json["checks"]}
    assert all(checks.values()), checks
    names = ("file", "provenance", "scheme", "types", "size", "imatrix", "reference", "tensors", "metadata")
    assert [*names, "kept tensors", "weights", "bytes"] == list(checks)
    imatrix = verified(copy, "--imatrix", made.imatrix.path)
    assert wrong(imatrix) == {}


def test_without_a_scheme_and_a_reference_it_says_what_it_could_not_check(copy: Path) -> None:
    copy.with_suffix(".scheme.toml").unlink()
    ran = verified(copy)
    assert wrong(ran) == {}
    assert {one["name"] for one in ran.json["checks"] if one["ok"] is None} == {"scheme", "imatrix", "reference"}
    text = dynrun("verify", copy).stdout
    assert "nothing is wrong with it, 3 not checked" in text


def test_other_calibration_is_no_fault_of_the_file(copy: Path, model: Path) -> None:
    ran = verified(copy, "--reference", model, "--remake", "--tokens", "256", "--ctx", "64")
    assert wrong(ran) == {}
    last = ran.json["checks"][-1]
    assert (last["name"], last["ok"]) == ("bytes", None)
    assert "these calibration options give imatrix" in last["detail"]


def test_a_truncated_file_and_one_with_more_behind_it(copy: Path) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1000])
    assert "truncated" in wrong(verified(copy))["file"]
    copy.write_bytes(whole + b"\0" * 4096)
    found = wrong(verified(copy))
    assert "4,096 bytes behind the last tensor" in found["file"]
    assert "size" in found


def test_a_flipped_bit_is_found_by_making_the_file_again(copy: Path, model: Path) -> None:
    header = read_header(copy)
    name = "blk.1.ffn_up.weight"
    with copy.open("rb") as stream:
        stream.seek(header.data_offset + header.tensors[name].offset + 40)
        byte = stream.read(1)
    damage_at = header.tensors[name].offset + 40
    with copy.open("r+b") as stream:
        stream.seek(header.data_offset + damage_at)
        stream.write(bytes([byte[0] ^ 1]))
    assert wrong(verified(copy, "--reference", model)) == {}
    found = wrong(verified(copy, "--reference", model, "--remake", *SMALL))
    assert found == {"bytes": f"made again, it differs in {name}"}


def test_lost_weights_are_found_beside_the_reference(copy: Path, model: Path) -> None:
    size = read_header(copy).tensors["blk.0.ffn_down.weight"].nbytes
    damage(copy, "blk.0.ffn_down.weight", bytes(size))
    assert "blk.0.ffn_down.weight" in wrong(verified(copy, "--reference", model))["weights"]
    damage(copy, "blk.0.ffn_down.weight", b"\xff" * size)
    assert wrong(verified(copy, "--reference", model))["weights"] == (
        "blk.0.ffn_down.weight holds values that are not finite"
    )


def test_a_changed_norm_and_another_reference(copy: Path, model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", seed=1)
    found = wrong(verified(copy, "--reference", other))
    assert "the scheme was made for" in found["reference"]
    damage(copy, "output_norm.weight", np.full(4, 7, dtype=np.float32).tobytes())
    assert "output_norm.weight" in wrong(verified(copy, "--reference", model))["kept tensors"]


def test_another_scheme_and_a_file_that_dynrun_did_not_make(copy: Path, model: Path, tmp_path: Path) -> None:
    scheme = read_scheme(copy.with_suffix(".scheme.toml"))
    name, kind = next(iter(scheme.types.items()))
    other = replace(scheme, types={**scheme.types, name: "Q8_0" if kind != "Q8_0" else "Q5_0"})
    write_scheme(other, tmp_path / "other.toml")
    found = wrong(verified(copy, "--scheme", tmp_path / "other.toml"))
    assert "the file was made by scheme" in found["scheme"]
    assert "the scheme says" in found["types"]
    tools.quantize(model, "stock.gguf", "Q8_0", folder=tmp_path, n_threads=1)
    assert "dynrun did not make this file" in wrong(verified(tmp_path / "stock.gguf"))["provenance"]


def test_what_makes_no_sense_is_said_in_one_line(copy: Path, tmp_path: Path) -> None:
    missing = dynrun("verify", tmp_path / "none.gguf")
    assert (missing.exit_code, missing.error) == (4, f"{tmp_path / 'none.gguf'} does not exist — check the path")
    alone = dynrun("verify", copy, "--remake")
    assert alone.exit_code == 2
    assert "--remake needs the model that the file was made from" in alone.error
