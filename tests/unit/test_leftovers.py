"""`dynrun rm --cache`: what stages left goes, models and stored answers stay, and nothing goes that is worked on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrun.artifacts import StageFolder, link_or_copy, run_stage, stage_folder
from dynrun.cli.app import main
from dynrun.models import made_path


def stage(name: str, n_bytes: int, key: str = "a") -> StageFolder:
    """A whole result."""

    def work(folder: StageFolder) -> dict[str, int]:
        (folder / "data.bin").write_bytes(bytes(n_bytes))
        return {}

    folder = stage_folder(name, {"key": key})
    run_stage(folder, work)
    return folder


def rm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["rm", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def cached(private_cache: Path) -> dict[str, StageFolder]:
    """Two covariances, one of them begun only, a made file, answers, and joined shards."""
    found = {
        "covariance": stage("covariance", 5000),
        "quantize": stage("quantize", 3000),
        "answers": stage("answers", 9),
    }
    begun = stage_folder("covariance", {"key": "begun"})
    begun.path.mkdir()
    (begun / "state.npz").write_bytes(bytes(700))
    joined = private_cache / "models" / "joined" / "0123456789abcdef"
    joined.mkdir(parents=True)
    (joined / "model.gguf").write_bytes(bytes(400))
    link_or_copy(found["quantize"] / "data.bin", made_path("m", "Q4_K_M"))
    return found | {"begun": begun}


def test_it_frees_what_is_no_model_and_no_answer(
    cached: dict[str, StageFolder], private_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = sum((cached[name] / "manifest.json").stat().st_size for name in ("covariance", "quantize"))
    code, out, err = rm(capsys, "--cache", "--dry-run", "--json")
    planned = json.loads(out)
    # The made file's bytes stay under its own name.
    assert (code, planned["freed_bytes"], planned["removed"]) == (0, 5000 + 700 + 400 + manifests, False)
    assert [name.split(":")[0] for name in planned["names"]] == ["covariance", "joined", "quantize"]
    assert "covariance: 2, 0.00 GB" in err
    assert all(folder.path.exists() for folder in cached.values())

    assert json.loads(rm(capsys, "--cache", "--yes", "--json")[1])["freed_bytes"] == planned["freed_bytes"]
    assert [name for name, folder in cached.items() if folder.path.exists()] == ["answers"]
    assert made_path("m", "Q4_K_M").stat().st_size == 3000
    assert not list((private_cache / "models" / "joined").glob("*/"))
    assert json.loads(rm(capsys, "--cache", "--yes", "--json")[1]) == {"names": [], "freed_bytes": 0, "removed": True}


def test_it_says_what_was_freed(cached: dict[str, StageFolder], capsys: pytest.CaptureFixture[str]) -> None:
    stage("rounding", 1_500_000)
    assert rm(capsys, "--cache", "--dry-run")[1] == "would free 1.5 MB\n"
    assert rm(capsys, "--cache", "--yes")[1] == "freed 1.5 MB\n"


def test_nothing_goes_while_a_process_works_on_any_of_it(
    cached: dict[str, StageFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    with cached["begun"].locked():
        code, _, err = rm(capsys, "--cache", "--yes")
    assert code == 1
    assert f"another dynrun works on {cached['begun'].path} — wait for it to end" in err
    assert all(folder.path.exists() for folder in cached.values())


@pytest.mark.parametrize("arguments", [(), ("--cache", "demo:Q4_K_M"), ("--cache", "--all")])
def test_neither_or_both_of_cache_and_a_model_is_a_wrong_call(
    private_cache: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, _, err = rm(capsys, *arguments, "--yes")
    assert code == 2
    assert "--cache" in err
