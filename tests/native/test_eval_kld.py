"""`eval kld` from files to rows; llama-perplexity is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from dynrun.calibration.dataset import builtin
from dynrun.calibration.splits import split
from dynrun.calibration.text import template_for
from dynrun.demo.builtin import ensure_builtin
from dynrun.errors import DynrunError, UsageError
from dynrun.evaluation.kld import Row, evaluate
from dynrun.evaluation.texts import conversation_parts, text_parts
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.process import capture
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.scoring.reference import Scored, record_reference
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
# Two threads on the tiny model wait for each other longer than they work, more so on a busy machine.
THREADS = 1
DEMO_THREADS = 2


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-F16.gguf")


@pytest.fixture(scope="module")
def tiny_q4(tiny: Path) -> Path:
    return _quantized(tiny, tiny.with_name("tiny-Q4_0.gguf"))


def _quantized(source: Path, out: Path, label: str = "Q4_0") -> Path:
    capture([installation().program("llama-quantize"), source, out, label, str(THREADS)])
    return out


def _dynrun(*arguments: str | Path) -> int:
    from dynrun.cli.app import main

    return main([str(argument) for argument in arguments])


def _text(n_characters: int) -> str:
    """The beginning of the built-in test conversations, as plain text."""
    messages = [m.get("content") or "" for c in split(builtin().conversations, "test") for m in c.messages]
    return "\n\n".join(messages)[:n_characters] + "\n"


def _oracle(
    reference: Path, model: Path, text: Path, n_ctx: int, n_chunks: int, threads: int = THREADS
) -> dict[str, float]:
    """What llama-perplexity says; the names are its own.

    One chunk a batch and no repacking, as in the engine: other kernels and splits of attention round otherwise, and
    move the mean KLD by up to 0.2%, its percentiles by up to a tenth.
    """
    base = text.with_suffix(".base")
    options = ["-t", str(threads), "-c", str(n_ctx), "-b", str(n_ctx), "--no-warmup", "--no-repack"]
    program = [installation().program("llama-perplexity"), *options]
    run = [*program, "-f", text, "--chunks", str(n_chunks), "--kl-divergence-base", base]
    capture([*run, "-m", reference])
    # Its logger is never flushed at the end (common/log.cpp, common_log_main): a fast run may lose its last lines.
    for _ in range(12):
        said = capture([*program, "-m", model, "--kl-divergence-base", base, "--kl-divergence"]).stdout
        if "\nSame top p" in said:
            break
    found = re.findall(r"^ *(\S.*?) *: +(-?[\d.]+)", said, re.M)
    return {re.sub(r" +", " ", name): float(value) for name, value in found}


def _our_row(reference: Path, model: Path, text: str, n_ctx: int, n_chunks: int, threads: int = THREADS) -> Row:
    with Engine.open(reference, n_ctx=16, n_threads=THREADS) as engine:
        parts = text_parts(engine, text, max_tokens=n_ctx * n_chunks, n_ctx=n_ctx)
    (row,) = evaluate(reference, [model], parts, n_threads=threads)
    return row


def _assert_agree(row: Row, oracle: dict[str, float]) -> None:
    # Its base file leaves out what is 16 nats under the maximum; that is most of the difference.
    assert row.kld.mean == pytest.approx(oracle["Mean KLD"], rel=2e-3)
    assert row.kld.p99 == pytest.approx(oracle["99.0% KLD"], rel=2e-3)
    assert row.kld.max == pytest.approx(oracle["Maximum KLD"], rel=2e-3)
    assert 100 * row.same_top_p == pytest.approx(oracle["Same top p"], abs=0.2)
    assert 100 * row.rms_dp == pytest.approx(oracle["RMS Δp"], rel=2e-3, abs=1e-3)
    assert row.ppl == pytest.approx(oracle["Mean PPL(Q)"], rel=1e-4)
    assert row.ppl_reference == pytest.approx(oracle["Mean PPL(base)"], rel=1e-3)


def _parts(reference: Path, max_tokens: int = 600) -> list[Scored]:
    with Vocabulary.load(reference) as vocabulary, template_for(vocabulary) as template:
        return conversation_parts(vocabulary, template, max_tokens=max_tokens, n_ctx=128)


def test_a_plain_text_scores_as_in_llama_perplexity_on_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The built-in model is made once, in the user's own cache: that is what the cache is for.
    with monkeypatch.context() as outside:
        outside.delenv("DYNRUN_CACHE")
        demo = ensure_builtin("demo")
    model = _quantized(demo, tmp_path / "demo-Q4_0.gguf")
    text = tmp_path / "text.txt"
    text.write_text(_text(8_000), encoding="utf-8")
    row = _our_row(demo, model, text.read_text(encoding="utf-8"), 256, 3, DEMO_THREADS)
    assert row.n_tokens == 3 * 127
    _assert_agree(row, _oracle(demo, model, text, 256, 3, DEMO_THREADS))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_plain_text_scores_as_in_llama_perplexity_with_and_without_bos(tmp_path: Path, adds_bos: bool) -> None:
    reference = write_tiny_llama(tmp_path / "tiny.gguf")
    if adds_bos:
        field = GGUFReader(reference, "r+").fields["tokenizer.ggml.add_bos_token"]
        field.parts[field.data[0]][0] = True
    model = _quantized(reference, tmp_path / "tiny-Q4_0.gguf")
    text = tmp_path / "text.txt"
    text.write_text(_text(6_000), encoding="utf-8")
    _assert_agree(
        _our_row(reference, model, text.read_text(encoding="utf-8"), 128, 20), _oracle(reference, model, text, 128, 20)
    )


def test_the_reference_against_itself_diverges_by_nothing(tiny: Path) -> None:
    (row,) = evaluate(tiny, [tiny], _parts(tiny), n_threads=THREADS)
    assert row.kld.max < 1e-6
    assert row.same_top_p == 1
    assert row.rms_dp < 1e-4
    assert row.ppl == pytest.approx(row.ppl_reference, rel=1e-4)


def test_every_position_with_a_known_successor_is_scored(tiny: Path) -> None:
    parts = _parts(tiny)
    assert all(part.outputs == tuple(range(len(part.tokens) - 1)) for part in parts)
    assert 500 < sum(len(part.tokens) for part in parts) <= 600


def test_coarser_files_diverge_more_and_the_ratio_says_so(tiny: Path, tiny_q4: Path, tmp_path: Path) -> None:
    finer = _quantized(tiny, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
    fine, coarse = evaluate(tiny, [finer, tiny_q4], _parts(tiny), n_threads=THREADS)
    assert fine.size_bytes > coarse.size_bytes
    assert fine.kld.ci95[0] < fine.kld.mean < fine.kld.ci95[1] < coarse.kld.mean
    ratio = coarse.ratio_to(fine)
    assert ratio is not None
    assert 1 < ratio.ci95[0] < ratio.value < ratio.ci95[1]


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_numbers(
    tiny: Path, tiny_q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _parts(tiny)
    seen: list[tuple[int, str]] = []

    def interrupt_after_two(done: int, _total: int, note: str) -> None:
        seen.append((done, note))
        if sum(name == tiny_q4.name for _, name in seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, [tiny_q4], parts, n_threads=THREADS, progress=interrupt_after_two)
    seen.clear()
    rows = evaluate(tiny, [tiny_q4], parts, n_threads=THREADS, progress=lambda done, _, note: seen.append((done, note)))
    assert {note for _, note in seen} == {tiny_q4.name}
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "another cache"))
    assert evaluate(tiny, [tiny_q4], parts, n_threads=THREADS) == rows


def test_what_was_measured_is_found_again_without_the_reference_logits(tiny: Path, tiny_q4: Path) -> None:
    parts = _parts(tiny)
    rows = evaluate(tiny, [tiny_q4], parts, n_threads=THREADS)
    record_reference(tiny, parts, n_threads=THREADS).discard()
    found = evaluate(tiny, [tiny_q4], parts, n_threads=THREADS, progress=lambda *_: pytest.fail("measured again"))
    assert found == rows


def test_a_file_with_another_vocabulary_is_refused_before_anything_is_measured(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_vocab=352)
    with pytest.raises(UsageError) as caught:
        evaluate(tiny, [tiny, other], _parts(tiny), n_threads=THREADS, progress=lambda *_: pytest.fail("measured"))
    assert str(tiny) in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_file_whose_logits_are_not_finite_is_named(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes())
    norm = next(tensor for tensor in GGUFReader(broken, "r+").tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    with pytest.raises(DynrunError, match=r"broken\.gguf.*not finite"):
        evaluate(tiny, [broken], _parts(tiny), n_threads=THREADS)


def test_a_text_shorter_than_one_chunk_is_refused(tiny: Path) -> None:
    with Engine.open(tiny, n_ctx=16, n_threads=THREADS) as engine, pytest.raises(UsageError, match="chunk takes 512"):
        text_parts(engine, "too short", max_tokens=4096, n_ctx=512)


def test_the_command_prints_one_json_object(tiny: Path, tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _dynrun("eval", "kld", tiny, tiny_q4, tiny_q4, "--tokens", "400", "--ctx", "64", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert first == second
    assert first["file"] == str(tiny_q4)
    assert set(first["kld"]) >= {"mean", "ci95", "p90", "p99", "p999", "max"}
    assert first["flips"] is None
    assert first["ratio_to_first"] == {"value": 1.0, "ci95": [1.0, 1.0]}


def test_the_command_prints_a_table(tiny: Path, tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _dynrun("eval", "kld", tiny, tiny_q4, "--tokens", "400", "--ctx", "64") == 0
    assert re.search(r"tiny-Q4_0\.gguf .*MB .* ± .*%", capsys.readouterr().out)


def test_the_command_says_which_text_is_missing(tiny: Path, tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _dynrun("eval", "kld", tiny, tiny_q4, "--text", "nowhere.txt") == 4
    assert capsys.readouterr().err.startswith("dynrun: nowhere.txt does not exist")
