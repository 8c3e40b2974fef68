"""`eval harness`: lm-evaluation-harness on small local tasks. Skipped where the extra is not installed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dynrun.evaluation.likelihood import likelihoods
from dynrun.evaluation.runs import run_task
from dynrun.evaluation.tasks import task
from dynrun.llamacpp.server import Server
from tests.commands import Ran, dynrun
from tests.questions import write_hellaswag
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
N = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks over one file: choose an ending, and write on to a full stop."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = write_hellaswag(tmp_path / "h.txt", N).read_text(encoding="utf-8").splitlines()
    records = [
        {"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]} for i in range(0, len(lines), 6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "num_fewshot": 0,
    }
    choose = {
        "task": "own_endings",
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    }
    choose["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    write = {"task": "own_writing", "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}"}
    write |= {"generation_kwargs": {"until": ["e"], "max_gen_toks": 24}, "metric_list": [{"metric": "exact_match"}]}
    for one in (choose, write):
        # JSON is YAML.
        (folder / f"{one['task']}.yaml").write_text(json.dumps({**common, **one}), encoding="utf-8")
    return folder


def harness(model: Path, tasks: Path, *arguments: str | Path) -> Ran:
    environment = {"HF_HOME": str(tasks.parent / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return dynrun("eval", "harness", model, "--include", tasks, "--ctx", "512", *arguments, env=environment)


def test_the_harness_scores_choices_and_texts_of_local_tasks(model: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    out = tmp_path / "all.json"
    ran = harness(model, tasks, "--tasks", "own_endings,own_writing", "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    found: dict[str, Any] = ran.json["tasks"]
    # Its accuracies are those of our own reading of the same questions.
    run = run_task(model, task("hellaswag", str(tasks.parent / "h.txt")), n_threads=1)
    assert found["own_endings"]["acc"] == pytest.approx(run.accuracy("acc").value)
    assert found["own_endings"]["acc_norm"] == pytest.approx(run.accuracy("acc_norm").value)
    assert found["own_writing"]["exact_match"] == 0
    samples = json.loads(out.read_text(encoding="utf-8"))["samples"]["own_writing"]
    written = {sample["doc"]["query"]: sample["resps"][0][0] for sample in samples}
    assert len(written) == N
    assert _served(model, list(written)) == written


def _served(model: Path, prompts: list[str]) -> dict[str, str]:
    """What llama-server writes after each prompt, asked by its own door."""
    with Server(model, n_threads=1, n_ctx=512) as server, server.client() as client:
        body = {"n_predict": 24, "stop": ["e"], "temperature": 0.0}
        return {text: client.post("/completion", json={**body, "prompt": text}).json()["content"] for text in prompts}


def test_an_unknown_task_is_told_with_its_neighbours(model: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    ran = harness(model, tasks, "--tasks", "own_ending")
    assert ran.exit_code == 2
    assert re.search(r"the harness has no task 'own_ending' — did you mean .*own_endings", ran.error)


def test_a_data_set_that_cannot_be_fetched_is_a_line(model: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    ran = harness(model, tasks, "--tasks", "arc_easy")
    assert ran.exit_code == 3
    assert "could not be fetched" in ran.error


def test_without_the_harness_a_line_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    # A module of that name that is not found: whether the extra is installed here does not matter.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['lm_eval'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = dynrun("eval", "harness", model, "--tasks", "gsm8k", env={"PYTHONPATH": path})
    assert ran.exit_code == 1
    assert re.search(r"not installed — install it: \S+ -m pip install 'lm-eval>=[\d.]+'", ran.error)


def test_likelihoods_do_not_depend_on_what_else_is_asked(model: Path) -> None:
    contexts = [tuple(range(10, 10 + n)) for n in (3, 30, 60)] + [(10, 11, 99)]
    pairs = [(context, leaf) for context in contexts for leaf in ((1, 2, 3), (4,), (5, 6))] * 2
    together = likelihoods(model, pairs[::-1], n_threads=1)[::-1]
    for pair, found in list(zip(pairs, together, strict=True))[: len(pairs) // 2 : 2]:
        (alone,) = likelihoods(model, [pair], n_threads=1)
        # Batches of another shape round otherwise; another context is off by nats.
        assert found.log_p == pytest.approx(alone.log_p, abs=0.03)
    assert together[: len(pairs) // 2] == together[len(pairs) // 2 :]
    assert likelihoods(model, [], n_threads=1) == []
