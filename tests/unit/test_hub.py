"""Data sets of the Hub, from a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynrun.calibration.hub import HubName, open_hub, parse_hub_name
from dynrun.errors import NetworkError, NotFoundError, UsageError
from tests.hub_server import Hub, serving_here, set_endpoint


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # One test below runs the library in a process of its own.
    with serving_here(monkeypatch, tmp_path) as served:
        yield served


def texts(spec: str, **limits: Any) -> set[str]:
    return {c.text for c in open_hub(spec, **limits).conversations}


def test_a_name_has_a_config_and_a_split() -> None:
    assert parse_hub_name("hf:owner/name") == HubName("owner/name", "", "train")
    assert parse_hub_name("hf:owner/name:en") == HubName("owner/name", "en", "train")
    assert parse_hub_name("hf:owner/name:en:test") == HubName("owner/name", "en", "test")
    assert parse_hub_name("hf:owner/name::test") == HubName("owner/name", "", "test")


@pytest.mark.parametrize("spec", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b:c:d:e", "hf:a b/c"])
def test_what_is_no_name_of_a_data_set_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_hub_name(spec)


def test_the_card_says_which_files_a_config_and_split_have(hub: Hub) -> None:
    card = """---
configs:
- config_name: other
  data_files: other/*.jsonl
- config_name: main
  default: true
  data_files:
  - split: train
    path: ["data/a-*.jsonl", "deep/**/x.jsonl"]
  - split: check
    path: data/b.jsonl
---
# A data set
"""
    hub.repositories["o/d"] = {
        "README.md": card.encode(),
        "data/a-1.jsonl": jsonl("one"),
        "data/a-2.jsonl": jsonl("two"),
        "data/a-3/deeper.jsonl": jsonl("not in that folder"),
        "deep/er/still/x.jsonl": jsonl("three"),
        "data/b.jsonl": jsonl("four"),
        "other/c.jsonl": jsonl("five"),
    }
    assert texts("hf:o/d") == {"one", "two", "three"}
    assert texts("hf:o/d:main:check") == {"four"}
    assert texts("hf:o/d:other") == {"five"}
    with pytest.raises(NotFoundError, match=r"no split 'test'.*there are: check, train"):
        open_hub("hf:o/d:main:test")
    with pytest.raises(NotFoundError, match=r"no configuration 'en'.*there are: main, other"):
        open_hub("hf:o/d:en")


def test_a_card_may_give_folder_and_mapping(hub: Hub) -> None:
    card = "---\nconfigs:\n- config_name: x\n  data_dir: sub\n  data_files: {train: t.jsonl, dev: ./d.jsonl}\n---\n"
    hub.repositories["o/d"] = {
        "README.md": card.encode(),
        "sub/t.jsonl": jsonl("one"),
        "sub/d.jsonl": jsonl("two"),
        "t.jsonl": jsonl("three"),
    }
    assert texts("hf:o/d") == {"one"}
    assert texts("hf:o/d:x:dev") == {"two"}


def test_without_a_card_names_of_files_and_folders_tell(hub: Hub) -> None:
    hub.repositories["o/d"] = {
        "data/train-00000-of-00002.jsonl": jsonl("one"),
        "data/train-00001-of-00002.jsonl": jsonl("two"),
        "data/train_sft-00000-of-00001.jsonl": jsonl("three"),
        "validation/part.jsonl": jsonl("four"),
        "eval.json": b'[{"text": "five"}]',
        "dataset_infos.json": b'{"text": "no data"}',
        "train.txt": b"the same in another format",
        "picture.png": b"\x89PNG",
    }
    assert texts("hf:o/d") == {"one", "two"}
    assert texts("hf:o/d::train_sft") == {"three"}
    assert texts("hf:o/d:default:validation") == {"four"}
    assert texts("hf:o/d::test") == {"five"}


def test_without_a_card_a_folder_is_a_config(hub: Hub) -> None:
    hub.repositories["o/d"] = {"en/train.jsonl": jsonl("one"), "de/train.jsonl": jsonl("zwei")}
    assert texts("hf:o/d:de") == {"zwei"}
    with pytest.raises(NotFoundError, match=r"no configuration 'fr'.*its folders are: de, en"):
        open_hub("hf:o/d:fr")


def test_files_that_name_no_split_and_a_broken_card_are_to_train_on(hub: Hub) -> None:
    hub.repositories["o/d"] = {"README.md": b"---\nconfigs: [unclosed\n---\n", "everything.jsonl": jsonl("one")}
    assert texts("hf:o/d") == {"one"}


def test_of_a_large_data_set_some_files_are_downloaded(hub: Hub) -> None:
    hub.repositories["o/d"] = {f"train-{i}.jsonl": jsonl(f"text {i}") for i in range(10)}
    size = len(jsonl("text 0"))
    some = texts("hf:o/d", limit_bytes=3 * size)
    assert len(some) == 3
    assert len(texts("hf:o/d", limit_bytes=1)) == 1
    downloaded = {line for line in hub.requests if line.startswith("GET /datasets/")}
    assert len(downloaded) == 3


def test_the_hash_pins_the_commit(hub: Hub) -> None:
    hub.repositories["o/d"] = {"train.jsonl": jsonl("one")}
    before = open_hub("hf:o/d").sha256
    assert open_hub("hf:o/d").sha256 == before
    hub.repositories["o/d"]["train.jsonl"] = jsonl("another")
    after = open_hub("hf:o/d")
    assert after.sha256 != before
    assert {c.text for c in after.conversations} == {"another"}


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repositories["o/d"] = {"train.jsonl": jsonl("one")}
    assert texts("hf:o/d") == {"one"}
    assert "Bearer hf_secret" in hub.tokens


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "o/d is gated"),
        (404, "RepoNotFound", "no data set o/d"),
        (401, "", "no data set o/d"),
    ],
)
def test_what_is_missing_or_closed_is_said(hub: Hub, status: int, code: str, message: str) -> None:
    hub.refused["o/d"] = (status, code)
    with pytest.raises(NotFoundError, match=message) as caught:
        open_hub("hf:o/d")
    assert "\n" not in str(caught.value)


def test_a_data_set_of_pictures_is_refused(hub: Hub) -> None:
    hub.repositories["o/d"] = {"train/1.png": b"\x89PNG"}
    with pytest.raises(NotFoundError, match="no files that can be read"):
        open_hub("hf:o/d")


def test_a_broken_server_is_the_networks_fault(hub: Hub) -> None:
    hub.refused["o/d"] = (500, "")
    with pytest.raises(NetworkError, match="could not be fetched: ") as caught:
        open_hub("hf:o/d")
    assert "\n" not in str(caught.value)


def test_no_server_is_the_networks_fault_unless_it_is_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["o/d"] = {"train.jsonl": jsonl("one")}
    online = open_hub("hf:o/d")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert open_hub("hf:o/d") == online
    with pytest.raises(NetworkError, match="o/other could not be fetched"):
        open_hub("hf:o/other")


def test_offline_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.repositories["o/d"] = {"train.jsonl": jsonl("one"), "test.jsonl": jsonl("two")}
    online = open_hub("hf:o/d")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert open_hub("hf:o/d") == online
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        open_hub("hf:o/d::test")
    assert not hub.requests


def test_the_environment_rules(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["o/d"] = {"train.jsonl": jsonl("one")}
    code = "from dynrun.calibration.hub import open_hub; print(open_hub('hf:o/d').conversations[0].text)"
    home = tmp_path / "home"
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_child", "HF_HUB_DISABLE_XET": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | ours, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "one"
    assert "Bearer hf_child" in hub.tokens
    assert list(home.rglob("train.jsonl"))
