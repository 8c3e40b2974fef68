"""Publishing a folder on the Hub: what is planned, what is sent, what is refused; killed and run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from dynrun.artifacts import sha256_file
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.metrics.summary import Summary
from dynrun.publish.plan import plan_push
from dynrun.report.data import MADE, Card, FileResult, Report
from dynrun.report.folder import write_report
from tests.commands import ARGV, Ran, dynrun
from tests.hub_server import Hub
from tests.hub_upload import PART_BYTES, Uploads, accepting
from tests.tiny import write_tiny_llama

LABELS = ("Q2_K", "Q4_K_M")


def result(path: Path) -> FileResult:
    spread = Summary(0.1, (0.09, 0.11), 0.05, 0.2, 0.8, 2.0, 6.0)
    size, digest = path.stat().st_size, sha256_file(path)
    return FileResult(f"dynrun {path.stem}", path.name, MADE, size, 4.4, spread, 0.77, 0.08, 30.2, sha256=digest)


def report_of(files: list[Path]) -> Report:
    card = Card(base_model="maker/Tiny", license="apache-2.0", languages=("en",))
    return Report("Tiny", "conversations", 1000, 20.0, tuple(map(result, files)), card=card)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "quants"
    folder.mkdir()
    files = [folder / f"Tiny-{label}.gguf" for label in LABELS]
    for seed, file in enumerate(files):
        write_tiny_llama(file, n_vocab=4096, seed=seed)
        file.with_suffix(".scheme.toml").write_text(f"label = '{file.stem}'\n")
    writer = GGUFWriter(folder / "Tiny-imatrix.gguf", "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor("token_embd.weight.in_sum2", np.ones((1, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_report(report_of(files), folder)
    return folder


@pytest.fixture
def folder(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "quants"))


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    with accepting(Hub()) as found:
        yield found


def environment(uploads: Uploads, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": uploads.url,
        "HF_TOKEN": uploads.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home / "hf"),
    }


def push(folder: Path, uploads: Uploads, *options: str, **changes: str) -> Ran:
    return dynrun("push", folder, "me/Tiny-GGUF", *options, "--json", env=environment(uploads, folder.parent) | changes)


def published(uploads: Uploads) -> dict[str, bytes]:
    return {path: bytes(data) for path, data in uploads.hub.models["me/Tiny-GGUF"].items()}  # type: ignore[arg-type]


@pytest.mark.e2e
def test_all_of_a_folder_is_published_in_one_commit(folder: Path, uploads: Uploads) -> None:
    (folder / "notes.txt").write_text("mine alone")
    ran = push(folder, uploads, "--private")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["url"] == f"{uploads.url}/me/Tiny-GGUF"
    assert ran.json["notes"] == []
    there = published(uploads)
    assert there.keys() == {file["path"] for file in ran.json["files"]}
    assert {"README.md", "report.html", "report.json", "Tiny-imatrix.gguf", "Tiny-Q2_K.scheme.toml"} <= there.keys()
    assert "notes.txt" not in there
    assert {path for path in there if path.startswith("plots/")}
    for path, data in there.items():
        assert data == (folder / path).read_bytes() or path == "README.md"
    assert len(uploads.commits) == 1
    assert uploads.messages == ["Upload Tiny-Q2_K.gguf, Tiny-Q4_K_M.gguf, Tiny-imatrix.gguf"]
    assert uploads.private == {"me/Tiny-GGUF": True}
    card = there["README.md"].decode()
    assert "base_model: maker/Tiny" in card
    assert "license: apache-2.0" in card
    assert "hf_" not in ran.stdout + ran.stderr


@pytest.mark.e2e
def test_a_dry_run_shows_everything_and_sends_nothing(folder: Path, uploads: Uploads) -> None:
    ran = push(folder, uploads, "--dry-run")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["card"]["license"] == "apache-2.0"
    assert ran.json["size_bytes"] == sum(file["size_bytes"] for file in ran.json["files"])
    assert ran.json["url"] is None
    shown = dynrun("push", folder, "me/x", "--dry-run", env=environment(uploads, folder.parent)).stdout
    assert "Tiny-Q2_K.gguf" in shown
    assert "license: apache-2.0" in shown
    assert uploads.hub.requests == []


@pytest.mark.e2e
@pytest.mark.parametrize("multipart", [False, True])
def test_killed_and_run_again_it_sends_what_is_missing(folder: Path, uploads: Uploads, multipart: bool) -> None:
    uploads.multipart = multipart
    second, release = threading.Event(), threading.Event()
    first = -(-(folder / "Tiny-Q2_K.gguf").stat().st_size // PART_BYTES) if multipart else 1

    def hold(n: int) -> None:
        if n == first:
            second.set()
            release.wait()

    uploads.on_put = hold
    variables = {**os.environ, **environment(uploads, folder.parent)}
    argv = [*ARGV, "push", str(folder), "me/Tiny-GGUF"]
    with subprocess.Popen(argv, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        assert second.wait(60)
        child.send_signal(signal.SIGKILL)
    release.set()
    assert uploads.commits == []
    assert list(uploads.objects) == [sha256_file(folder / "Tiny-Q2_K.gguf")]
    uploads.on_put = lambda n: None
    assert push(folder, uploads).exit_code == 0
    done = folder / "Tiny-Q2_K.gguf"
    assert sum(n for oid, n in uploads.puts if oid == sha256_file(done)) == done.stat().st_size
    assert len(uploads.commits) == 1
    for name in ("Tiny-Q2_K.gguf", "Tiny-Q4_K_M.gguf"):
        assert published(uploads)[name] == (folder / name).read_bytes()


@pytest.mark.e2e
def test_what_is_there_is_not_sent_again(folder: Path, uploads: Uploads) -> None:
    assert push(folder, uploads).exit_code == 0
    sent = len(uploads.puts)
    assert push(folder, uploads).exit_code == 0
    assert len(uploads.puts) == sent


def test_licence_and_base_model_are_asked_for_where_nobody_knows_them(folder: Path) -> None:
    files = [folder / f"Tiny-{label}.gguf" for label in LABELS]
    write_report(replace(report_of(files), card=Card()), folder)
    with pytest.raises(UsageError, match=r"says no licence.*--license ID"):
        plan_push(folder, "me/x")
    plan = plan_push(folder, "me/x", license="mit")
    assert plan.notes == ("the card names no base model; give --base-model owner/name",)
    plan = plan_push(folder, "me/x", license="mit", base_model="maker/Tiny")
    assert plan.front_matter["license"] == "mit"
    assert plan.front_matter["base_model"] == "maker/Tiny"
    assert plan.front_matter["base_model_relation"] == "quantized"
    card = next(file for file in plan.files if file.name == "README.md")
    assert card.content is not None
    assert b"license: mit" in card.content
    with pytest.raises(UsageError, match="names no repository"):
        plan_push(folder, "me/x", license="mit", base_model="../x")


def test_a_report_of_other_files_is_refused(folder: Path) -> None:
    write_tiny_llama(folder / "Tiny-Q2_K.gguf", n_vocab=4096, seed=9)
    with pytest.raises(UsageError, match=r"is of another Tiny-Q2_K\.gguf: its numbers would not be true"):
        plan_push(folder, "me/x")


def test_what_cannot_be_published_is_refused_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no repository"):
        plan_push(folder, "only-a-name")
    with pytest.raises(NotFoundError, match="is no folder"):
        plan_push(tmp_path / "none", "me/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no GGUF"):
        plan_push(tmp_path / "empty", "me/x")
    (folder / "Tiny-Q2_K.scheme.toml").write_text("token = 'hf_" + "a" * 34 + "'\n")
    with pytest.raises(UsageError, match="holds a token of the Hub; nothing was sent"):
        plan_push(folder, "me/x")
    (folder / "Tiny-Q4_K_M.gguf").write_bytes((folder / "Tiny-Q4_K_M.gguf").read_bytes()[:-100])
    with pytest.raises(DynrunError, match="is not a whole GGUF"):
        plan_push(folder, "me/x")


def test_a_single_report_beside_the_files_is_taken(made_once: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    file = Path(shutil.copy(made_once / "Tiny-Q2_K.gguf", folder))
    with pytest.raises(UsageError, match="has no report"):
        plan_push(folder, "me/x")
    write_report(report_of([file]), folder / "Tiny-Q2_K.report")
    names = {planned.name for planned in plan_push(folder, "me/x").files}
    assert {"README.md", "report.html", "Tiny-Q2_K.gguf"} <= names
    shutil.copytree(folder / "Tiny-Q2_K.report", folder / "Tiny-Q4_K_M.report")
    with pytest.raises(UsageError, match="has 2 reports and none of all files"):
        plan_push(folder, "me/x")


@pytest.mark.e2e
def test_a_token_that_may_not_write_and_a_refused_card_are_told(folder: Path, uploads: Uploads) -> None:
    ran = push(folder, uploads, HF_TOKEN="hf_reader")
    assert ran.exit_code == 4
    assert "does not let me/Tiny-GGUF be written (401)" in ran.error
    assert "hf_reader" not in ran.stderr
    uploads.refuse_card = "license is unknown"
    ran = push(folder, uploads)
    assert ran.exit_code == 2
    assert "the Hub refuses the card" in ran.error
    assert uploads.puts == []


@pytest.mark.e2e
def test_no_network_is_told(folder: Path, uploads: Uploads) -> None:
    ran = push(folder, uploads, HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.exit_code == 3
    assert "could not be sent" in ran.error
    assert json.loads(json.dumps(ran.error)).count("\n") == 0
