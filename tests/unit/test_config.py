"""Settings: which source wins, and that a wrong one is told in one line. And where dynrun keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynrun.config import Config, available_cores, load_config
from dynrun.errors import UsageError
from dynrun.paths import builds_dir, cache_dir


@pytest.fixture(autouse=True)
def no_threads_of_a_worker(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/conftest.py sets them for the workers of pytest-xdist."""
    monkeypatch.delenv("DYNRUN_THREADS", raising=False)


def write(text: str) -> None:
    Path(os.environ["DYNRUN_CONFIG"]).write_text(text)


def test_defaults_where_nothing_is_set() -> None:
    assert load_config() == Config(threads=0, n_gpu_layers=-1)
    assert load_config().n_threads == available_cores()


def test_the_file_beats_the_default() -> None:
    write("threads = 3\n")
    assert load_config() == Config(threads=3, n_gpu_layers=-1)
    assert load_config().n_threads == 3


def test_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write("threads = 3\nn_gpu_layers = 4\n")
    monkeypatch.setenv("DYNRUN_THREADS", "5")
    assert load_config() == Config(threads=5, n_gpu_layers=4)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    write("threads = 3\n")
    monkeypatch.setenv("DYNRUN_THREADS", "")
    assert load_config().threads == 3


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("thread = 3\n", "bad setting 'thread' — known integers: n_gpu_layers, threads"),
        ("threads = 'many'\n", "bad setting 'threads'"),
        ("threads = true\n", "bad setting 'threads'"),
        ("threads = 1.5\n", "bad setting 'threads'"),
        ("threads = -1\n", "threads is -1 — the least value is 0"),
        ("threads = = 1\n", "is not valid TOML"),
        ("[threads]\n", "bad setting 'threads'"),
    ],
)
def test_a_wrong_file_is_one_line_of_usage(text: str, telling: str) -> None:
    write(text)
    with pytest.raises(UsageError) as caught:
        load_config()
    assert telling in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["many", "1.5", "-2"])
def test_a_wrong_variable_is_one_line_of_usage(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNRUN_N_GPU_LAYERS", text)
    with pytest.raises(UsageError, match=r"(?i)n_gpu_layers.*" + text):
        load_config()


def test_a_file_that_is_no_text_is_one_line_of_usage() -> None:
    Path(os.environ["DYNRUN_CONFIG"]).write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not valid TOML"):
        load_config()


def test_a_relative_cache_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are run in folders of their own, where a relative path would lead elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNRUN_CACHE", "here")
    assert cache_dir() == tmp_path / "here"
    assert builds_dir().is_relative_to(tmp_path / "here")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DYNRUN_CACHE", "~/kept")
    assert cache_dir() == tmp_path / "kept"
