"""Pull from a server that errs in every way: the bytes are right in the end, and what came is not fetched again."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynrun.errors import DoesNotFitError, DynrunError, NetworkError, NotFoundError
from dynrun.hub.errors import GatedError, RefusedError
from dynrun.hub.part import NOTE_SUFFIX, SUFFIX, Part
from dynrun.hub.pull import Pulled, pull
from dynrun.hub.repository import fetch_repository
from dynrun.hub.transfer import Progress, TransferSettings
from tests.hub_server import SIGNATURE, Fault, Hub, digest, let_all_go_wrong, serving_here

SHARDS = [f"model-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
# More attempts than any test here lets fail in a row.
QUICK = TransferSettings(connections=4, stall_s=0.2, backoff_s=0.002, piece_bytes=128 << 10, attempts=20)


def noise(seed: int, n: int) -> bytes:
    return random.Random(seed).randbytes(n)  # noqa: S311


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as served:
        served.models["o/m"] = {name: noise(n, 500_000 + 70_001 * n) for n, name in enumerate(SHARDS)}
        yield served


def fetch(settings: TransferSettings = QUICK, **more: Any) -> Pulled:
    return pull(fetch_repository("o/m").files, "main", settings=settings, **more)


def content(hub: Hub) -> list[bytes]:
    files = hub.models["o/m"].values()
    return [data for data in files if isinstance(data, bytes)]


def right(hub: Hub, pulled: Pulled) -> bool:
    return [file.path.read_bytes() for file in pulled.files] == content(hub)


def total(hub: Hub) -> int:
    return sum(map(len, content(hub)))


def begin(hub: Hub) -> int:
    """Pull until some of every file is there and the last one waits for more; how many bytes came."""
    from dynrun.hub.cache import cache_folder

    def watch(progress: Progress) -> None:
        if progress.fetched_bytes >= 900_000 and progress.files[2].done >= 10_000:
            raise KeyboardInterrupt

    hub.fault = lambda path, start, end: Fault("stall", after=10_000) if path == SHARDS[2] else None
    with pytest.raises(KeyboardInterrupt):
        fetch(watch=watch)
    hub.fault = lambda path, start, end: None
    notes = [json.loads(path.read_text()) for path in cache_folder().rglob(f"*{NOTE_SUFFIX}")]
    blobs = [path.stat().st_size for path in cache_folder().glob("*/blobs/*") if SUFFIX not in path.name]
    return sum(blobs) + sum(end - start for note in notes for start, end in note["done"])


def test_files_arrive_where_every_program_finds_them(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    hub.models["o/m"]["config.json"] = b"{}"
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.fetched_bytes == total(hub)
    assert pulled.resumed_bytes == 0
    scanned = scan_cache_dir(tmp_path / "hub")
    assert not scanned.warnings
    (repository,) = scanned.repos
    assert (repository.repo_id, repository.size_on_disk, set(repository.refs)) == ("o/m", total(hub), {"main"})
    for file in pulled.files:
        assert try_to_load_from_cache("o/m", file.path.name) == str(file.path)
        assert hf_hub_download("o/m", file.path.name, local_files_only=True) == str(file.path)
        assert file.path.is_symlink()
        assert file.path.resolve().name == file.sha256 or file.path.name == "config.json"
    left = [path.name for path in (tmp_path / "hub").rglob("*") if "incomplete" in path.name or "tmp" in path.name]
    assert not left


def test_nothing_is_fetched_again(hub: Hub) -> None:
    first = fetch()
    hub.served.clear()
    again = fetch()
    assert again.files == first.files
    assert again.fetched_bytes == 0
    assert not hub.served


@pytest.mark.parametrize("seed", range(20))
def test_each_fault_in_random_combination_costs_what_it_destroys(hub: Hub, seed: int) -> None:
    faults, spoiled = let_all_go_wrong(hub, random.Random(seed))  # noqa: S311
    pulled = fetch()
    assert right(hub, pulled)
    assert not faults
    assert pulled.fetched_bytes == total(hub) + sum(len(content(hub)[SHARDS.index(path)]) for path in spoiled)


@pytest.mark.parametrize("seed", range(20))
def test_faults_of_a_fast_network_cost_no_more(hub: Hub, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of each body comes past the HTTP library there."""
    monkeypatch.setattr("dynrun.hub.source._TRIED_BYTES", 1)
    monkeypatch.setattr("dynrun.hub.source._FAST_BYTES_S", 0.0)
    monkeypatch.setattr("dynrun.hub.source.READ_BYTES", 10_000)
    test_each_fault_in_random_combination_costs_what_it_destroys(hub, seed)


def test_a_slow_connection_is_relieved(hub: Hub) -> None:
    """One answer stops after its first bytes and would never end: others take its rest, half by half."""
    hub.models["o/m"] = {"m.gguf": noise(1, 9 << 20)}
    hub.fault = lambda path, start, end: Fault("late") if start == 0 else None
    settings = TransferSettings(connections=3, stall_s=60.0, piece_bytes=64 << 20, split_s=0.01)

    def release(_: Progress) -> None:
        if any(served.start for served in hub.served):
            hub.release.set()

    pulled = fetch(settings, watch=release)
    assert right(hub, pulled)
    assert pulled.fetched_bytes == 9 << 20
    assert len({served.start for served in hub.served}) > 1


def test_an_interrupted_pull_goes_on_where_it_was(hub: Hub) -> None:
    kept = begin(hub)
    assert 900_000 <= kept < total(hub)
    hub.served.clear()
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.resumed_bytes >= 10_000
    assert pulled.fetched_bytes + kept == total(hub)
    # The interrupted run's last answers may be noted late.
    assert sum(served.sent for served in hub.served if served.fault is None) == pulled.fetched_bytes


def test_what_came_before_a_failure_is_kept(hub: Hub) -> None:
    hub.fault = lambda path, start, end: Fault("500") if path == SHARDS[1] and start >= 256 << 10 else None
    with pytest.raises(NetworkError, match=f"{SHARDS[1]} of o/m could not be fetched: the server answers 500"):
        fetch(TransferSettings(connections=1, backoff_s=0.001, attempts=2, piece_bytes=128 << 10))
    hub.fault = lambda path, start, end: None
    pulled = fetch()
    assert right(hub, pulled)
    first = len(content(hub)[0])
    # The first file was whole; its hash may not have been taken yet when the second one failed.
    assert pulled.resumed_bytes in (256 << 10, first + (256 << 10))
    assert pulled.fetched_bytes == total(hub) - first - (256 << 10)


def test_bytes_reach_the_disk_while_others_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A file system may find out only then that it has no room for what was written long before.
    hub.fault = lambda path, start, end: Fault("stall", after=10_000) if path == SHARDS[2] else None
    with monkeypatch.context() as patch:
        patch.setattr("dynrun.hub.part._sync", full)
        with pytest.raises(DoesNotFitError):
            fetch(replace(QUICK, stall_s=20.0))
    hub.fault = lambda path, start, end: None
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.resumed_bytes > 0


def test_a_file_that_changed_between_two_tries_is_begun_again(hub: Hub, tmp_path: Path) -> None:
    begin(hub)
    hub.models["o/m"][SHARDS[2]] = noise(9, 600_000)
    said: list[str] = []
    pulled = fetch(say=said.append)
    assert right(hub, pulled)
    assert said == [f"{SHARDS[2]} is another file on the Hub since it was begun; it is fetched from the start"]
    assert not [path for path in tmp_path.rglob("*") if SUFFIX in path.name]


def test_a_file_that_changes_while_it_is_fetched_is_noticed(hub: Hub) -> None:
    files = fetch_repository("o/m").files
    hub.models["o/m"][SHARDS[1]] = noise(9, 600_000)
    said: list[str] = []
    pulled = pull(files, "main", settings=QUICK, say=said.append)
    assert right(hub, pulled)
    assert said == [f"o/m changed meanwhile; going on with commit {hub.commit('o/m', 'models')[:8]}"]
    assert pulled.fetched_bytes == total(hub)


def test_wrong_bytes_that_stay_wrong_are_refused_and_others_are_kept(hub: Hub) -> None:
    hub.fault = lambda path, start, end: Fault("wrong") if path == SHARDS[1] else None
    with pytest.raises(NetworkError, match=f"{SHARDS[1]} of o/m came with wrong bytes 3 times"):
        fetch(TransferSettings(connections=1, backoff_s=0.001, piece_bytes=128 << 10))
    hub.fault = lambda path, start, end: None
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.fetched_bytes <= len(content(hub)[1]) + len(content(hub)[2])


def test_a_server_without_ranges_sends_each_file_once(hub: Hub) -> None:
    hub.ranges = False
    pulled = fetch()
    assert right(hub, pulled)
    # Connections that were refused their range hang up early; a piece at most came through each.
    assert pulled.fetched_bytes <= total(hub) + 12 * QUICK.piece_bytes


def test_a_note_that_lies_is_found_out(hub: Hub, tmp_path: Path) -> None:
    begin(hub)
    for data in tmp_path.rglob(f"*{SUFFIX}"):
        if not data.name.endswith(NOTE_SUFFIX):
            data.write_bytes(bytes(data.stat().st_size))
    assert right(hub, fetch())


@pytest.mark.parametrize("text", ["", "{", '{"done": 3}', "[]"])
def test_a_note_that_is_broken_begins_the_file_anew(hub: Hub, tmp_path: Path, text: str) -> None:
    begin(hub)
    for note in tmp_path.rglob(f"*{NOTE_SUFFIX}"):
        note.write_text(text)
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.resumed_bytes == 0


def test_a_gated_model_is_refused_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.gated.add("o/m")
    with pytest.raises(GatedError) as caught:
        fetch()
    assert f"ask for access at {hub.url}/o/m" in str(caught.value)
    assert "the token in HF_TOKEN is sent, and is not enough" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not hub.served


def test_a_private_model_says_that_a_token_is_missing(hub: Hub) -> None:
    hub.refused["o/m"] = (401, "RepoNotFound")
    with pytest.raises(RefusedError, match=r"or it is private.*no token is set: set HF_TOKEN"):
        fetch()


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    fetch()
    assert hub.tokens == {"Bearer hf_verysecret"}
    assert hub.storage_tokens == {""}


def test_a_note_that_is_saved_behind_the_end_does_not_come_back(hub: Hub, tmp_path: Path) -> None:
    (file, *_) = fetch_repository("o/m").files
    part = Part(file, tmp_path / "blob")
    part.prepare()
    part.add(0, 10)
    part.save()
    assert part.note.exists()
    part.finish()
    part.add(10, 20)
    part.save()
    assert [path.name for path in tmp_path.iterdir() if "blob" in path.name] == ["blob"]


def test_what_a_run_left_that_was_killed_behind_the_last_byte_is_removed(hub: Hub, tmp_path: Path) -> None:
    blobs = {file.path.resolve() for file in fetch().files}
    for blob in blobs:
        for name in (blob.name + NOTE_SUFFIX, f".{blob.name}{NOTE_SUFFIX}.new"):
            blob.with_name(name).write_text("{}")
    fetch()
    assert set(next(iter(blobs)).parent.iterdir()) == blobs


def test_no_secret_is_in_what_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    shown: list[str] = []
    for kind in ("reset", "truncate", "403", "503", "stall"):
        hub.fault = lambda path, start, end, kind=kind: Fault(kind)  # type: ignore[misc]
        with pytest.raises((NetworkError, RefusedError)) as caught:
            fetch(TransferSettings(stall_s=0.1, backoff_s=0.001, attempts=2), watch=lambda p: shown.append(p.note))
        shown.append(str(caught.value))
    assert any(shown)
    assert not [text for text in shown if "secret" in text or SIGNATURE[-8:] in text]


def test_a_disk_that_is_too_small_for_all_files_is_said_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = begin(hub)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, total(hub) - kept - 1))
    hub.requests.clear()
    with pytest.raises(DoesNotFitError, match=r"MB are to be downloaded, and the disk of .* free — free 0\.0 MB"):
        fetch()
    assert not [request for request in hub.requests if request.startswith("GET /o/m/resolve")]


@pytest.mark.parametrize(
    "path",
    ["../escape.gguf", "a/../../b.gguf", "/etc/x.gguf", "C:/x.gguf", "a\\..\\..\\b.gguf", "a//b.gguf", "\x1b[2J.gguf"],
)
def test_names_of_files_do_not_leave_the_cache(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.models["o/m"] = {path: b"x"}
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DynrunError, match="do not trust this repository"):
        fetch()
    assert set(tmp_path.rglob("*")) == before


def test_a_file_that_is_gone_is_said(hub: Hub) -> None:
    files = fetch_repository("o/m").files
    del hub.models["o/m"][SHARDS[1]]
    with pytest.raises(NotFoundError, match="o/m has no such file"):
        pull(files, "main", settings=QUICK)


def test_what_another_version_shares_is_not_fetched(hub: Hub) -> None:
    fetch()
    hub.models["o/m"][SHARDS[1]] = noise(9, 600_000)
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.fetched_bytes == 600_000


def test_two_at_once_fetch_once(hub: Hub) -> None:
    files = fetch_repository("o/m").files
    results: list[Pulled] = []
    threads = [threading.Thread(target=lambda: results.append(pull(files, "main", settings=QUICK))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert sum(pulled.fetched_bytes for pulled in results) == total(hub)


def test_one_file_under_two_names_is_fetched_once(hub: Hub) -> None:
    hub.models["o/m"] = {"a.gguf": noise(1, 300_000), "b/a.gguf": noise(1, 300_000)}
    pulled = fetch()
    assert right(hub, pulled)
    assert pulled.fetched_bytes == 300_000
    assert {file.sha256 for file in pulled.files} == {digest(noise(1, 300_000))}


def test_a_xet_server_that_fails_or_stalls_is_left_for_http(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = {name: f"{n + 1:064x}" for n, name in enumerate(SHARDS)}
    notes: set[str] = set()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Connections are taken, and nothing is ever answered.
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for token in ({}, {"accessToken": "t", "exp": 2**40, "casUrl": address}):
            hub.xet_token = token
            pulled = fetch(watch=lambda progress: notes.add(progress.note))
            assert right(hub, pulled)
            assert pulled.fetched_bytes == total(hub)
            hub.models["o/m"] = {name: data[::-1] for name, data in zip(SHARDS, content(hub), strict=True)}
    assert any("Xet fails" in note for note in notes), notes
    assert any("no bytes came any more from Xet" in note for note in notes), notes
    assert f"GET /api/models/o/m/xet-read-token/{fetch_repository('o/m').commit}"[:40] in {r[:40] for r in hub.requests}
