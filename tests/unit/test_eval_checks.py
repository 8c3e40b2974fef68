"""What is refused and what is said before divergence is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from dynrun.cli.app import main
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.evaluation.checks import checked_headers, notes_on
from dynrun.evaluation.texts import read_text
from dynrun.gguf.header import read_header
from dynrun.gguf.rewrite import rewrite
from tests.tiny import write_tiny_llama

SMALL = {"n_embd": 64, "n_ff": 64, "n_block": 1}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "reference.gguf", **SMALL)


def _changed(reference: Path, path: Path, key: str, old: bytes, new: bytes) -> Path:
    """A copy in which the string ``old`` of the metadata entry ``key`` is ``new``, of the same length."""
    path.write_bytes(reference.read_bytes())
    field = GGUFReader(path, "r+").fields[key]
    parts = [field.parts[i] for i in field.data]
    next(part for part in parts if bytes(part) == old)[:] = np.frombuffer(new, dtype=np.uint8)
    return path


def _refused(reference: Path, file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        checked_headers(reference, [reference, file])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_vocabulary_of_another_size_is_refused_with_both_sizes(reference: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_vocab=352, **SMALL)
    said = _refused(reference, other)
    assert str(other) in said
    assert "another vocabulary" in said
    assert "352 tokens, not 320" in said


def test_another_tokenizer_of_the_same_size_is_refused_with_the_first_other_token(
    reference: Path, tmp_path: Path
) -> None:
    other = _changed(reference, tmp_path / "other.gguf", "tokenizer.ggml.tokens", b"he", b"eh")
    assert "another tokenizer" in (said := _refused(reference, other))
    assert "token 257 is 'eh', not 'he'" in said


def test_the_same_tokens_with_other_merges_are_another_tokenizer(reference: Path, tmp_path: Path) -> None:
    other = _changed(reference, tmp_path / "other.gguf", "tokenizer.ggml.merges", b"h e", b"e h")
    assert "tokenizer.ggml.merges differs" in _refused(reference, other)


def test_a_file_without_a_model_is_refused(reference: Path, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "holds no language model (general.type 'imatrix')" in _refused(reference, tmp_path / "imatrix.gguf")


def test_another_way_to_split_text_is_said_but_measured(reference: Path, tmp_path: Path) -> None:
    other = _changed(reference, tmp_path / "other.gguf", "tokenizer.ggml.pre", b"gpt-2", b"gpt-4")
    assert len(checked_headers(reference, [other])) == 1
    (note,) = notes_on(reference, [reference, other])
    assert note.startswith("other.gguf has tokenizer.ggml.pre 'gpt-4', the reference 'gpt-2'")


def test_a_model_of_another_shape_is_said(reference: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_embd=64, n_ff=64, n_block=2)
    assert notes_on(reference, [other]) == ["other.gguf is a model of another architecture or shape than the reference"]


def test_a_reference_that_is_itself_quantized_is_said(reference: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    quantized = tmp_path / "quantized.gguf"
    rewrite(read_header(reference), quantized, {name: "Q8_0"}, lambda _: np.zeros(64 * 64 // 32 * 34, dtype=np.uint8))
    (note,) = notes_on(quantized, [reference])
    assert note.startswith("the reference quantized.gguf is itself quantized (Q8_0): divergence is from that file")
    assert notes_on(reference, [quantized]) == []


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [(b"", UsageError, "is empty"), (b" \n\t\n", UsageError, "is empty"), (b"\xff\xfe\x00", UsageError, "UTF-8")],
)
def test_a_text_that_says_nothing_is_refused(
    tmp_path: Path, content: bytes, kind: type[DynrunError], said: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(kind, match=said):
        read_text(path)


def test_a_text_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.txt does not exist"):
        read_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("command", [["eval", "kld"], ["compare"]])
def test_two_forms_of_output_at_once_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "demo", "other.gguf", "--csv", "--md"]) == 2
    assert capsys.readouterr().err == (
        "dynrun: only one of --json, --csv and --md can be printed — leave the others out\n"
    )


def test_one_file_is_refused_as_a_curve(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(reference), str(reference), "--curve", str(reference)]) == 2
    assert capsys.readouterr().err.startswith("dynrun: one file makes no curve")


def test_a_curve_is_given_or_built(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [argument for _ in range(2) for argument in ("--curve", str(reference))]
    assert main(["compare", str(reference), str(reference), *given, "--presets", "all"]) == 2
    assert capsys.readouterr().err == "dynrun: --presets are built, and the --curve is given — give one of the two\n"
