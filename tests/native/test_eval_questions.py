"""`eval mmlu`, `eval task` and `eval flips` on real models; llama-server and llama-perplexity are the oracles."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrun.cli.app import main
from dynrun.evaluation.choices import encode, letter_tokens
from dynrun.evaluation.mmlu import mmlu
from dynrun.evaluation.questions import Question
from dynrun.evaluation.runs import Run, run_task
from dynrun.evaluation.tasks import task
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.process import capture
from dynrun.llamacpp.server import Server
from tests.questions import write_hellaswag, write_mmlu
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
THREADS = 1
# A random model amplifies what batches of other shapes round otherwise; another prompt is off by nats.
NOISE = 0.03

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
benchmark = importlib.import_module("mmlu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # " A" and " B" are tokens, " C" and " D" are not.
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", merges=("Ġ A", "Ġ B"))


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.with_name("tiny-Q2_K.gguf")
    capture([installation().program("llama-quantize"), model, out, "Q2_K", str(THREADS)])
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_mmlu(tmp_path / "mmlu", header=False, letters=True)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main([str(argument) for argument in (*arguments, "--json")]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def log_p_alone(engine: Engine, question: Question, choice: int) -> Any:
    """Log-probabilities [n, n_vocab] of what follows each token of the choice's context and text, decoded alone."""
    tokens = encode(engine, question.prompt(choice) + question.choices[choice])
    logits = engine.logits(tokens).astype(np.float64)
    return tokens, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def test_a_letter_has_the_probability_of_all_its_spellings(model: Path, data: Path) -> None:
    asked = mmlu(str(data))
    run = run_task(model, asked, n_threads=THREADS)
    with Engine.open(model, n_ctx=2048, n_threads=THREADS) as engine:
        spellings = letter_tokens(engine)
        pieces = {letter: {engine.piece(token) for token in spellings[letter]} for letter in "ABCD"}
        assert pieces == {"A": {b"A", b" A"}, "B": {b"B", b" B"}, "C": {b"C"}, "D": {b"D"}}
        for one, question in list(zip(run.answers, asked.questions, strict=True))[::4]:
            prompt = encode(engine, question.prompt())
            logits = engine.logits(prompt, [len(prompt) - 1])[0].astype(np.float64)
            log_p = logits - np.logaddexp.reduce(logits)
            expected = [np.logaddexp.reduce(log_p[list(spellings[letter])]) for letter in question.choices]
            assert one.log_p == pytest.approx(expected, abs=NOISE)


def test_a_continuation_has_the_likelihood_of_its_own_tokens(model: Path, tmp_path: Path) -> None:
    winogrande = [
        {"sentence": "_ met Eve, so Eve was glad.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "Ann met Eve, so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    ]
    path = tmp_path / "w.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in winogrande), encoding="utf-8")
    tasks = [task("winogrande", str(path)), task("hellaswag", str(write_hellaswag(tmp_path / "h.txt", 4)))]
    with Engine.open(model, n_ctx=512, n_threads=THREADS) as engine:
        for asked in tasks:
            run = run_task(model, asked, n_threads=THREADS)
            for one, question in zip(run.answers, asked.questions, strict=True):
                for i, choice in enumerate(question.choices):
                    tokens, log_p = log_p_alone(engine, question, i)
                    n = len(tokens) - len(encode(engine, question.prompt(i)))
                    own = [log_p[j - 1, tokens[j]] for j in range(len(tokens) - n, len(tokens))]
                    assert one.log_p[i] == pytest.approx(sum(own), abs=len(own) * NOISE)
                    assert one.chars[i] == len(choice) - 1


def test_the_server_chooses_the_same_answers(model: Path, data: Path) -> None:
    asked = mmlu(str(data))
    run = run_task(model, asked, n_threads=THREADS)
    with Server(model, n_threads=THREADS, n_ctx=2048) as server, server.client() as client:
        served = {one.id: benchmark.served_log_p(client, one) for one in asked.questions}
    for one in run.answers:
        assert one.log_p == pytest.approx(served[one.id], abs=NOISE)
    assert all(one["nats_apart"] < 2 * NOISE for one in benchmark.differences(run, served))


def test_hellaswag_is_scored_as_by_llama_perplexity(model: Path, tmp_path: Path) -> None:
    n, text = 40, write_hellaswag(tmp_path / "h.txt", 40)
    run = run_task(model, task("hellaswag", str(text)), n_threads=THREADS)
    told, correct = _perplexitys_hellaswag(model, text, n)
    # It goes through the tasks in an order of its own: what it did not get to tell may be right or wrong.
    close = sum(_margin(one.tail) < NOISE for one in run.answers)
    assert correct - close <= run.accuracy("acc_tokens").correct <= correct + n - told + close
    assert close < 4


def _perplexitys_hellaswag(model: Path, text: Path, n: int) -> tuple[int, int]:
    """How many of ``n`` tasks it told the result of, and how many of these were right."""
    arguments = ["-m", model, "-f", text, "--hellaswag", "--hellaswag-tasks", str(n), "-c", "512", "-t", str(THREADS)]
    best = (0, 0)
    for _ in range(5):  # it may end before its logger has written the last lines (common/log.cpp)
        done = capture([installation().program("llama-perplexity"), *arguments])
        for told, percent in re.findall(r"^(\d+)\t([\d.]+)%\t", done.stdout, re.MULTILINE):
            best = max(best, (int(told), round(float(percent) * int(told) / 100)))
        if best[0] == n:
            break
    assert best[0] > n - 4
    return best


def _margin(scores: list[float]) -> float:
    best = sorted(scores, reverse=True)
    return best[0] - best[1]


def test_long_prompts_lose_shots_from_the_front(model: Path, data: Path) -> None:
    asked = mmlu(str(data))
    with Engine.open(model, n_ctx=256, n_threads=THREADS) as vocabulary:
        lengths = {q.id: [len(encode(vocabulary, q.prompt(0, n))) for n in range(6)] for q in asked.questions}
    n_ctx = sorted(found[2] for found in lengths.values())[len(lengths) // 2]
    run = run_task(model, asked, n_threads=THREADS, n_ctx=n_ctx)
    expected = {id_: next(n for n in range(6) if found[n] <= n_ctx) for id_, found in lengths.items()}
    assert {one.id: one.dropped for one in run.answers} == expected
    assert set(expected.values()) == {2, 3}
    assert run.shortened == len(asked.questions)
    cut = run_task(model, asked, n_threads=THREADS, n_ctx=64)
    assert all((one.dropped, one.cut) == (5, lengths[one.id][5] - 64) for one in cut.answers)


def test_an_interrupted_run_goes_on_and_ends_alike(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = mmlu(str(data))
    whole = run_task(model, asked, n_threads=THREADS)
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "other"))
    seen: list[int] = []

    def stop(done: int, _total: int) -> None:
        seen.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(model, asked, n_threads=THREADS, progress=stop)
    resumed = run_task(model, asked, n_threads=THREADS, progress=lambda done, _total: seen.append(done))
    # Two subjects are two blocks: the second run begins with the second.
    assert seen == [0, 6, 6, 12]
    assert resumed.answers == whole.answers
    assert run_task(model, asked, n_threads=THREADS).cached


def test_eval_mmlu_gives_what_others_rely_on(
    model: Path, quantized: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "eval", "mmlu", model, quantized, "--data", data, "--limit", "9")
    assert found["questions"] == 9
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]
    assert {name: subject["questions"] for name, subject in found["subjects"].items()} == {
        "large_sums": 4,
        "small_sums": 5,
    }
    points = 100 * found["accuracy"] - 25
    assert found["efficiency"]["per_gib"] == pytest.approx(points / (found["size_bytes"] / 2**30))
    first, second = found["rows"]
    assert first["flips"] is None
    assert second["model"] == quantized.name
    # The same from the stored runs, by their files and by the models' names.
    stored = run_json(capsys, "eval", "flips", first["run"], second["run"])["rows"]
    assert run_json(capsys, "eval", "flips", model, quantized)["rows"] == stored
    assert {key: stored[0][key] for key in second["flips"]} == second["flips"]
    assert _flips_by_hand(Path(first["run"]), Path(second["run"])) == [
        stored[0][key] for key in ("right_to_wrong", "wrong_to_right", "changed")
    ]


def _flips_by_hand(first: Path, second: Path) -> list[int]:
    counts = [0, 0, 0]
    for one, other in zip(*(json.loads(path.read_text())["answers"] for path in (first, second)), strict=True):
        a, b, gold = np.argmax(one["log_p"]), np.argmax(other["log_p"]), one["gold"]
        counts[0] += a == gold != b
        counts[1] += b == gold != a
        counts[2] += a != b
    return counts


def test_the_tables_say_what_the_numbers_mean(
    model: Path, quantized: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "mmlu", str(model), str(quantized), "--data", str(data), "--by-subject"]) == 0
    out = capsys.readouterr().out
    assert "right→wrong" in out
    assert "12 questions of mmlu, answers by acc; guessing gives 25.0%" in out
    assert re.search(r"^small_sums +6 +\d+\.\d% \(", out, re.MULTILINE)
    text = write_hellaswag(tmp_path / "h.txt", 8)
    assert main(["eval", "task", "hellaswag", str(model), "--data", str(text), "--limit", "6"]) == 0
    out = capsys.readouterr().out
    assert "6 questions of hellaswag, answers by acc_norm" in out
    assert "efficiency" not in out
    assert main(["eval", "flips", str(model), str(quantized)]) == 0
    assert "mmlu: tiny.gguf → tiny-Q2_K.gguf" in capsys.readouterr().out


def test_answers_are_printed_as_csv_and_markdown(
    model: Path, quantized: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval", "mmlu", str(model), str(quantized), "--data", str(data), "--by-subject"]
    assert main([*asked, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["model"], row["subject"], row["questions"]) for row in rows] == [
        (name, subject, n)
        for name in ("tiny.gguf", "tiny-Q2_K.gguf")
        for subject, n in (("large_sums", "6"), ("small_sums", "6"), ("", "12"))
    ]
    assert sum(int(row["correct"]) for row in rows[:2]) == int(rows[2]["correct"])
    assert rows[5]["flips_right_to_wrong"].isdecimal()
    assert main([*asked, "--md"]) == 0
    out = capsys.readouterr().out
    assert "| file | size | accuracy (95%) | flips (95%) |" in out
    assert re.search(r"^\| small_sums \| 6 \|", out, re.MULTILINE)
    assert main(["eval", "flips", str(model), str(quantized), "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["right_to_wrong"] == rows[5]["flips_right_to_wrong"]
    assert main([*asked, "--md", "--csv"]) == 2


def test_models_without_stored_runs_have_no_flips(
    model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "flips", str(model), str(quantized)]) == 4
    error = capsys.readouterr().err
    assert "have no stored runs of the same task and settings — run `dynrun eval mmlu`" in error


def test_a_run_is_whole(model: Path, data: Path) -> None:
    run = run_task(model, mmlu(str(data)), n_threads=THREADS)
    assert isinstance(run, Run)
    assert [path.name for path in run.path.parent.iterdir() if path.suffix != ".lock"] == ["run.json", "manifest.json"]
