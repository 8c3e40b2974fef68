"""`eval kld` from files to rows; llama-perplexity is the oracle."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dynrun.calibration.dataset import builtin
from dynrun.calibration.splits import split
from dynrun.calibration.text import template_for
from dynrun.errors import DynrunError, UsageError
from dynrun.evaluation.continuation import N_TOKENS, continue_along, prompts
from dynrun.evaluation.kld import Row, evaluate
from dynrun.evaluation.texts import conversation_parts, text_parts
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.greedy import continue_greedily
from dynrun.llamacpp.process import capture
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.scoring import reference as reference_module
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
    """What llama-perplexity says; the names are its own."""
    return _oracle_compared(model, _oracle_base(reference, text, n_ctx, n_chunks, threads), n_ctx, threads)


def _perplexity(n_ctx: int, threads: int) -> list[str | Path]:
    """One chunk a batch and no repacking, as in the engine: other kernels and splits of attention round otherwise, and
    move the mean KLD by up to 0.2%, its percentiles by up to a tenth."""
    program = installation().program("llama-perplexity")
    return [program, "-t", str(threads), "-c", str(n_ctx), "-b", str(n_ctx), "--no-warmup", "--no-repack"]


def _oracle_base(reference: Path, text: Path, n_ctx: int, n_chunks: int, threads: int) -> Path:
    base = text.with_suffix(".base")
    run = [*_perplexity(n_ctx, threads), "-f", text, "--chunks", str(n_chunks), "--kl-divergence-base", base]
    capture([*run, "-m", reference])
    return base


def _oracle_compared(model: Path, base: Path, n_ctx: int, threads: int) -> dict[str, float]:
    # Its logger is never flushed at the end (common/log.cpp, common_log_main): a fast run may lose its last lines.
    for _ in range(12):
        run = [*_perplexity(n_ctx, threads), "-m", model, "--kl-divergence-base", base, "--kl-divergence"]
        said = capture(run).stdout
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
    # Its base file leaves out what is 16 nats under the maximum, and is coarser: that is most of the difference.
    assert row.kld.mean == pytest.approx(oracle["Mean KLD"], rel=2e-3)
    for ours, theirs in ((row.kld.p99, "99.0%"), (row.kld.p999, "99.9%"), (row.kld.max, "Maximum")):
        assert ours == pytest.approx(oracle[f"{theirs} KLD"], rel=2e-3, abs=3e-4)
    for ours, theirs in ((row.kld.median, "Median"), (row.kld.p90, "90.0%")):
        assert ours == pytest.approx(oracle[f"{theirs} KLD"], rel=1e-2, abs=3e-4)
    assert 100 * row.same_top_p == pytest.approx(oracle["Same top p"], abs=0.1)
    assert 100 * row.rms_dp == pytest.approx(oracle["RMS Δp"], rel=2e-3, abs=5e-3)
    assert row.ppl == pytest.approx(oracle["Mean PPL(Q)"], rel=1e-4)
    assert row.ppl_reference == pytest.approx(oracle["Mean PPL(base)"], rel=1e-3)
    assert row.score.ln_ppl_ratio.value == pytest.approx(oracle["Mean ln(PPL(Q)/PPL(base))"], abs=1e-3)


def _parts(reference: Path, max_tokens: int = 600) -> list[Scored]:
    with Vocabulary.load(reference) as vocabulary, template_for(vocabulary) as template:
        return conversation_parts(vocabulary, template, max_tokens=max_tokens, n_ctx=128)


def test_demo_and_three_quants_of_it_score_as_in_llama_perplexity(demo_model: Path, tmp_path: Path) -> None:
    quants = [_quantized(demo_model, tmp_path / f"demo-{label}.gguf", label) for label in ("Q4_0", "Q5_0", "Q8_0")]
    text = tmp_path / "text.txt"
    text.write_text(_text(8_000), encoding="utf-8")
    with Vocabulary.load(demo_model) as vocabulary:
        parts = text_parts(vocabulary, text.read_text(encoding="utf-8"), max_tokens=512, n_ctx=256)
    itself, *rows = evaluate(demo_model, [demo_model, *quants], parts, n_threads=DEMO_THREADS)
    assert itself.n_tokens == 2 * 127
    assert itself.kld.mean <= 1e-6
    base = _oracle_base(demo_model, text, 256, 2, DEMO_THREADS)
    for row, quant in zip(rows, quants, strict=True):
        _assert_agree(row, _oracle_compared(quant, base, 256, DEMO_THREADS))


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


def _with_nan(source: Path, path: Path, name: str) -> Path:
    path.write_bytes(source.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == name)
    tensor.data[..., :8] = np.nan
    return path


@pytest.mark.parametrize(
    ("weight", "node"),
    [
        ("output_norm.weight", "result_norm"),
        ("blk.1.ffn_down.weight", "ffn_out-1"),
        ("blk.0.attn_q.weight", "Qcur-0"),
        ("token_embd.weight", ""),
    ],
)
def test_logits_that_are_not_finite_are_traced_to_the_tensor_that_made_them(
    tiny: Path, tmp_path: Path, weight: str, node: str
) -> None:
    broken = _with_nan(tiny, tmp_path / "broken.gguf", weight)
    for reference, file in ((tiny, broken), (broken, tiny)):
        with pytest.raises(DynrunError, match=r"broken\.gguf.*not finite") as caught:
            evaluate(reference, [file], _parts(tiny, 64), n_threads=THREADS)
        assert re.search(
            rf"the first tensor that is not is {node}\S*, computed with {re.escape(weight)} ", str(caught.value)
        )


def test_a_large_vocabulary_is_decoded_in_bounded_blocks_with_the_same_numbers(
    tiny: Path, tiny_q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny, [tiny_q4], _parts(tiny), n_threads=THREADS)
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr(reference_module, "_DECODE_BYTES", 40 * 320 * 4)
    batches = []
    monkeypatch.setattr(Engine, "logit_blocks", _spied(Engine.logit_blocks, batches))
    blocks = evaluate(tiny, [tiny_q4], _parts(tiny), n_threads=THREADS)
    assert max(batches) <= 40
    assert blocks[0].kld.mean == pytest.approx(whole[0].kld.mean, rel=2e-3)
    assert blocks[0].score.n_tokens == whole[0].score.n_tokens


def _spied(method: Callable[..., Iterator[Any]], sizes: list[int]) -> Callable[..., Iterator[Any]]:
    def spy(*arguments: Any) -> Iterator[Any]:
        for block in method(*arguments):
            sizes.append(len(block))
            yield block

    return spy


def test_a_file_parts_from_the_reference_where_its_own_greedy_continuation_does(tiny: Path, tiny_q4: Path) -> None:
    with Vocabulary.load(tiny) as vocabulary, template_for(vocabulary) as template:
        chosen = prompts(vocabulary, template, n=3, n_ctx=512)
    (found,) = continue_along(tiny, [tiny_q4], chosen, n_threads=THREADS)
    answers = []
    for path in (tiny, tiny_q4):
        with Engine.open(path, n_ctx=3 * 512, n_threads=THREADS, n_seq_max=3) as engine:
            answers.append(continue_greedily(engine, [one.tokens for one in chosen], N_TOKENS, engine.eog_tokens))
    pairs = [list(zip(*pair, strict=False)) for pair in zip(*answers, strict=True)]
    parted = tuple(next((i for i, (a, b) in enumerate(pair) if a != b), None) for pair in pairs)
    assert found.parted == parted
    assert any(position is not None for position in parted)
    (itself,) = continue_along(tiny, [tiny], chosen, n_threads=THREADS)
    assert itself.identical == 1
    assert itself.score.kld.mean < 1e-6


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


def test_several_texts_have_rows_of_their_own(
    tiny: Path, tiny_q4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, n in (("one.txt", 3_000), ("two.txt", 1_000)):
        (tmp_path / name).write_text(_text(n), encoding="utf-8")
    texts = ["--text", tmp_path / "one.txt", "--text", "builtin", "--text", tmp_path / "two.txt"]
    options = [*texts, "--tokens", "600", "--ctx", "64"]
    assert _dynrun("eval", "kld", tiny, tiny_q4, *options, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    domains = row["domains"]
    assert [domain["name"] for domain in domains] == ["one.txt", "builtin", "two.txt"]
    assert sum(domain["tokens"] for domain in domains) == row["tokens"]
    assert sum(d["tokens"] * d["kld"]["mean"] for d in domains) / row["tokens"] == pytest.approx(row["kld"]["mean"])
    assert _dynrun("eval", "kld", tiny, tiny_q4, *options, "--csv") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["domain"] for line in lines] == ["", "one.txt", "builtin", "two.txt"]
    assert float(lines[0]["kld_mean"]) == row["kld"]["mean"]
    assert _dynrun("eval", "kld", tiny, tiny_q4, *options, "--md") == 0
    out = capsys.readouterr().out
    assert "| tiny-Q4_0.gguf | " in out
    assert "| builtin | " in out


def test_a_text_too_short_for_a_chunk_is_named(
    tiny: Path, tiny_q4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    assert _dynrun("eval", "kld", tiny, tiny_q4, "--text", tmp_path / "short.txt") == 2
    assert capsys.readouterr().err.startswith("dynrun: short.txt has 10 tokens and 16384 are asked for, a chunk takes")


def test_a_quantized_reference_and_a_cache_of_other_settings_are_said(
    tiny: Path, tiny_q4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ctx", "64", "--json"]
    assert _dynrun("eval", "kld", tiny_q4, tiny, "--tokens", "200", *options) == 0
    first = capsys.readouterr()
    assert "the reference tiny-Q4_0.gguf is itself quantized (Q4_0, Q6_K): divergence is from that file" in first.err
    assert "not used" not in first.err
    assert _dynrun("eval", "kld", tiny_q4, tiny, "--tokens", "300", *options) == 0
    second = capsys.readouterr()
    said = "kept log-probabilities of tiny-Q4_0.gguf are not used: they are of another text or other positions"
    assert said in second.err
    assert said in json.loads(second.out)["notes"]
    assert json.loads(second.out)["rows"][0]["tokens"] > json.loads(first.out)["rows"][0]["tokens"]


def test_flips_of_stored_answers_stand_in_the_rows(
    tiny: Path, tiny_q4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "winogrande.jsonl"
    records = [
        {"sentence": f"The {a} met the {b} because _ was {w}.", "option1": a, "option2": b, "answer": str(1 + i % 2)}
        for i, (a, b, w) in enumerate(
            [("cat", "dog", "late"), ("nurse", "pilot", "tired"), ("tea", "milk", "cold")] * 4
        )
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    scored = ("eval", "kld", tiny, tiny, tiny_q4, "--tokens", "100", "--ctx", "64")
    assert _dynrun(*scored, "--json") == 0
    assert [row["flips"] for row in json.loads(capsys.readouterr().out)["rows"]] == [None, None]
    assert _dynrun("eval", "task", "winogrande", tiny, tiny_q4, "--data", data, "--json") == 0
    asked = json.loads(capsys.readouterr().out)["rows"][1]["flips"]
    assert _dynrun(*scored, "--json") == 0
    itself, quantized = json.loads(capsys.readouterr().out)["rows"]
    assert itself["flips"]["winogrande"]["flips"] == 0
    assert quantized["flips"]["winogrande"] == asked
    assert _dynrun(*scored) == 0
    assert "winogrande 0.0% (0 r→w, 0 w→r)" in capsys.readouterr().out
