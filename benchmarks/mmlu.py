"""MMLU: questions per second with and without the shared prefix, and the choices of a separate, slow path.

usage: .venv/bin/python benchmarks/mmlu.py --data DIR [MODEL] [--subjects 20] [--questions 200] [--ctx 2048]

Of so many subjects, evenly drawn, so many questions are asked three times: as `eval mmlu` asks them; each with all of
its prompt decoded; and by llama-server's /completion, whose n_probs give the probabilities of the next token. Speeds
and every choice that differs are printed, with how far apart its two best answers are. On a machine that others use
too, look at the tokens decoded and at the seconds of CPU time rather than at the clock. What was run before is found,
not measured: set DYNRUN_CACHE to an empty folder to measure again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from dynrun.config import load_config
from dynrun.evaluation.choices import prepare
from dynrun.evaluation.mmlu import mmlu
from dynrun.evaluation.questions import Question, Task
from dynrun.evaluation.runs import Run, run_task
from dynrun.llamacpp.server import Server
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import resolve

# Letters are among the likeliest tokens after "Answer:"; the server sends no more than are asked for.
N_PROBS = 2000


def served_log_p(client: httpx2.Client, question: Question, dropped: int = 0) -> list[float]:
    """Log-likelihood of each letter by llama-server: the prompt as text, the letters by their text."""
    request = {
        "prompt": question.prompt(0, dropped),
        "n_predict": 1,
        "n_probs": N_PROBS,
        "temperature": 0.0,
        "cache_prompt": False,
        # What is drawn does not matter (probabilities are those before the sampler), but must be text to be answered.
        "logit_bias": [["A", 1000.0]],
    }
    answer = client.post("/completion", json=request)
    answer.raise_for_status()
    listed: list[dict[str, Any]] = answer.json()["completion_probabilities"][0]["top_logprobs"]
    return [_sum(one["logprob"] for one in listed if one["token"] in (f"{c}", f" {c}")) for c in question.choices]


def _sum(log_p: Iterable[float]) -> float:
    found = list(log_p)
    return float(np.logaddexp.reduce(found)) if found else -math.inf


def differences(run: Run, other: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Questions whose likeliest choice differs, with the nats between the two best choices of the run."""
    found = []
    for one in run.answers:
        if one.choice("acc") != int(np.argmax(other[one.id])):
            best = sorted(one.log_p, reverse=True)
            found.append({"id": one.id, "subject": one.subject, "nats_apart": best[0] - best[1]})
    return found


def served(model: Path, task: Task, run: Run, n_ctx: int, n_threads: int) -> tuple[dict[str, list[float]], float]:
    """Every question by llama-server, and how long that took."""
    dropped = {one.id: one.dropped for one in run.answers}
    with Server(model, n_threads=n_threads, n_ctx=n_ctx) as server, server.client() as client:
        started = time.monotonic()
        found = {one.id: served_log_p(client, one, dropped[one.id]) for one in task.questions}
    return found, time.monotonic() - started


def chosen(task: Task, n_subjects: int, n_questions: int) -> Task:
    """``n_questions`` of ``n_subjects`` subjects."""
    subjects = sorted({one.subject for one in task.questions})
    kept = {subjects[(2 * i + 1) * len(subjects) // (2 * n_subjects)] for i in range(n_subjects)}
    return replace(task, questions=tuple(one for one in task.questions if one.subject in kept)).limited(n_questions)


def measured(model: Path, task: Task, n_ctx: int, n_threads: int, *, shared: bool) -> tuple[Run, float]:
    """The run, and the CPU time of this process for it, loading included."""
    started = time.process_time()
    run = run_task(model, task, n_ctx=n_ctx, n_threads=n_threads, shared=shared)
    return run, time.process_time() - started


def n_tokens(model: Path, task: Task, n_ctx: int, *, shared: bool) -> int:
    """Tokens that are decoded for the task."""
    with Vocabulary.load(model) as vocabulary:
        blocks = prepare(task, vocabulary, n_ctx=n_ctx, shared=shared)
    return sum(len(block.prefix) + sum(branch.n_tokens for branch in block.branches) for block in blocks)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", required=True)
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=load_config().n_threads)
    options = parser.parse_args()
    model = resolve(options.model).path
    task = chosen(mmlu(options.data), options.subjects, options.questions)
    (shared, cpu_s), (alone, cpu_alone_s) = (
        measured(model, task, options.ctx, options.threads, shared=shared) for shared in (True, False)
    )
    by_server, elapsed_s = served(model, task, shared, options.ctx, options.threads)
    alone_log_p = {one.id: one.log_p for one in alone.answers}
    report = {
        "model": model.name,
        "questions": len(task.questions),
        "accuracy": shared.accuracy().to_json(),
        "questions_per_second": {
            "shared prefix": shared.questions_per_second,
            "every prompt alone": alone.questions_per_second,
            "llama-server": len(task.questions) / elapsed_s,
        },
        "ratio": shared.questions_per_second / alone.questions_per_second,
        "cpu_s": {"shared prefix": cpu_s, "every prompt alone": cpu_alone_s},
        "tokens decoded": {
            "shared prefix": n_tokens(model, task, options.ctx, shared=True),
            "every prompt alone": n_tokens(model, task, options.ctx, shared=False),
        },
        "other choice than every prompt alone": differences(shared, alone_log_p),
        "other choice than llama-server": differences(shared, by_server),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
