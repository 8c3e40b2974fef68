"""From what users write to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dynrun.errors import NotFoundError, UsageError
from dynrun.hub.errors import GatedError
from dynrun.hub.resolve import Found, HubName, find, parse_name
from tests.hub_server import Hub, serving_here

GGUF = {"m-Q4_K_M.gguf": b"GGUF"}
SAFETENSORS = {"config.json": b"{}", "model.safetensors": b""}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as served:
        yield served


def nobody(question: str, options: Sequence[str]) -> str:
    raise UsageError(question, fix=f"name one: {', '.join(options)}")


def found(name: str) -> Found:
    return find(parse_name(name), nobody)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("o/m", HubName("o/m")),
        ("o/m:UD-IQ2_XXS", HubName("o/m", "main", "UD-IQ2_XXS")),
        ("o/m@v1.0:Q8_0", HubName("o/m", "v1.0", "Q8_0")),
        ("o/m:UD/m-00001-of-00002.gguf", HubName("o/m", "main", "UD/m-00001-of-00002.gguf")),
        ("Llama-4-Scout", HubName("Llama-4-Scout")),
        ("https://huggingface.co/o/m", HubName("o/m")),
        ("https://huggingface.co/o/m/tree/main/UD-Q4_K_XL", HubName("o/m")),
        ("https://huggingface.co/o/m/blob/v2/a/b%20c.gguf", HubName("o/m", "v2", "a/b c.gguf")),
        ("https://huggingface.co/o/m/resolve/main/b.gguf?download=true", HubName("o/m", "main", "b.gguf")),
        ("hf.co/o/m:Q4_K_M", HubName("o/m", "main", "Q4_K_M")),
        ("hf://o/m:Q4_K_M", HubName("o/m", "main", "Q4_K_M")),
    ],
)
def test_names_and_addresses_are_understood(text: str, name: HubName) -> None:
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text",
    ["", "a/b/c", "a b/c", "../m", "o/..", "https://example.org/o/m", "https://huggingface.co/datasets/o/m", "o/m:a:b"],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_name(text)


def test_the_option_and_the_name_agree() -> None:
    assert parse_name("o/m", "Q4_K_M") == parse_name("o/m:Q4_K_M") == parse_name("o/m:q4_k_m", "Q4_K_M")
    with pytest.raises(UsageError, match="ask for two quants"):
        parse_name("o/m:Q4_K_M", "Q8_0")


def test_a_repository_with_ggufs_is_itself(hub: Hub) -> None:
    hub.models = {"o/m": GGUF, "o/m-GGUF": GGUF}
    got = found("o/m")
    assert (got.repository.name, got.note) == ("o/m", "")
    (file,) = got.repository.files
    assert (file.size, file.commit) == (4, hub.commit("o/m", "models"))
    assert got.shelf.quants[0].label == "Q4_K_M"


@pytest.mark.parametrize("asked", [SAFETENSORS, None])
def test_a_repository_without_ggufs_means_its_sibling_of_the_same_owner(
    hub: Hub, asked: dict[str, bytes] | None
) -> None:
    hub.models = {"o/m-GGUF": GGUF, "unsloth/m-GGUF": GGUF} | ({"o/m": asked} if asked else {})
    got = found("o/m:Q4_K_M")
    assert got.repository.name == "o/m-GGUF"
    assert got.name == HubName("o/m-GGUF", "main", "Q4_K_M")
    why = "o/m has no GGUF" if asked else "there is no o/m"
    assert got.note == f"{why}; taking o/m-GGUF"


def test_else_one_of_a_known_quantizer_is_taken_and_several_are_asked_about(hub: Hub) -> None:
    hub.models = {"o/m": SAFETENSORS, "bartowski/o_m-GGUF": GGUF, "stranger/m-GGUF": GGUF}
    assert found("o/m").note == "o/m has no GGUF; taking bartowski/o_m-GGUF"
    hub.models["unsloth/m-GGUF"] = GGUF
    with pytest.raises(UsageError, match=r"o/m has no GGUF; which .* — name one: unsloth/m-GGUF, bartowski/o_m-GGUF"):
        found("o/m")
    chosen = find(parse_name("o/m"), lambda question, options: options[1])
    assert chosen.repository.name == "bartowski/o_m-GGUF"


def test_a_part_of_a_name_is_searched(hub: Hub) -> None:
    scout = "unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF"
    hub.models = {
        scout: GGUF,
        "unsloth/Llama-4-Scout-17B-16E-Instruct": SAFETENSORS,
        "other/Llama-4-Scout-GGUF-x": GGUF,
    }
    assert found("unsloth/Llama-4-Scout").note == f"there is no unsloth/Llama-4-Scout; taking {scout}"
    with pytest.raises(UsageError, match=f"name one: {scout}, other/Llama-4-Scout-GGUF-x"):
        found("llama-4-scout")


def test_what_nobody_has_is_not_found(hub: Hub) -> None:
    hub.models = {"o/m": SAFETENSORS}
    with pytest.raises(NotFoundError, match="o/m has no GGUF"):
        found("o/m")
    with pytest.raises(NotFoundError, match="no model o/other on the Hub, or it is private"):
        found("o/other")
    with pytest.raises(NotFoundError, match="the Hub finds no GGUF of nothing-like-it"):
        found("nothing-like-it")


def test_a_gated_repository_is_said_and_not_replaced(hub: Hub) -> None:
    hub.models = {"o/m": SAFETENSORS, "o/m-GGUF": GGUF}
    hub.refused["o/m"] = (403, "GatedRepo")
    with pytest.raises(GatedError, match="ask for access at"):
        found("o/m")
