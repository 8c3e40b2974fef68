"""The search stage: the best scheme that measuring finds for one budget, on disk; interrupted, it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dynrun.allocation.bench import Bench, SearchLog
from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints
from dynrun.allocation.search import Found, Narrator, Search, SearchSettings
from dynrun.allocation.stage import Budget, allocate, options_for, solver_for
from dynrun.artifacts import Outcome, StageFolder, run_stage, sha256_file, stage_folder, write_json
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.sequences import TokenSequence, fingerprint
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference
from dynrun.rounding.store import Feedback
from dynrun.scheme import Scheme
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.stage import SensitivityStage

RESULT_FILE = "search.json"
_LOG_FILE = "measured.jsonl"
_REVISION = 4


@dataclass(frozen=True)
class SearchStage:
    """The chosen scheme; ``trials``: every candidate's name, predicted and measured KLD (nats per token), best first;
    ``ratio_ci95``: of the best one's KLD over the runner-up's, paired by sequence."""

    scheme: Scheme
    trials: tuple[Mapping[str, Any], ...]
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    outcome: Outcome


def search_folder(
    reference: Reference,
    imatrix: ImatrixStage,
    table: SensitivityStage,
    text: Sequence[TokenSequence],
    budget: Budget,
    constraints: Constraints,
    settings: SearchSettings,
    feedback: str = "",
) -> StageFolder:
    """Where the search's result lies, made or not; ``feedback``: the key of the rounding that it is made with."""
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "table": sha256_file(table.path),
        "text": fingerprint(text),
        "budget": [budget.size_bytes, budget.fixed_bytes],
        "constraints": repr(constraints) if constraints != NO_CONSTRAINTS else "",
        "stock": dict(budget.stock_types) if constraints.min_speed else {},
        "settings": asdict(settings),
        "feedback": feedback,
        "revision": _REVISION,
    }
    return stage_folder("search", inputs)


def search(
    reference: Reference,
    imatrix: ImatrixStage,
    table: SensitivityStage,
    text: Sequence[TokenSequence],
    budget: Budget,
    *,
    constraints: Constraints,
    settings: SearchSettings,
    config: Config,
    narrate: Narrator,
    feedback: Feedback | None = None,
) -> SearchStage:
    """The best scheme within ``budget`` that is found, or find that it was; candidates are rounded with ``feedback``.
    Raises what :func:`allocate` raises."""
    first = allocate(reference, imatrix, table.tensors, budget, constraints)
    if settings.n_candidates <= 0:
        return SearchStage(first, (), None, None, Outcome("search", {}, 0.0, cached=True))
    key = feedback.key if feedback else ""
    folder = search_folder(reference, imatrix, table, text, budget, constraints, settings, key)

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with closing(open_bench(reference, imatrix, text, config, folder / _LOG_FILE, feedback)) as bench:
            found = Search(
                options_for(reference, imatrix, table.tensors, constraints),
                solver_for(reference, budget, constraints),
                {name: row.slope for name, row in table.tensors.items() if row.slope},
                {name: row.errors for name, row in table.tensors.items()},
                {name: row.unseen for name, row in table.tensors.items()},
                bench,
                settings,
                narrate,
            ).run()
        write_json(folder / RESULT_FILE, _result(found))
        return {}

    outcome = run_stage(folder, work)
    return _read(folder / RESULT_FILE, first, budget, outcome)


def _read(path: Path, first: Scheme, budget: Budget, outcome: Outcome) -> SearchStage:
    """The stage's result, its scheme with the head of ``first``."""
    data = json.loads(path.read_text(encoding="utf-8"))
    scheme = replace(
        first,
        types={name: data["types"][name] for name in first.types},
        size_bytes=data["nbytes"] + budget.fixed_bytes,
        predicted_kld=data["trials"][0]["predicted_kld"],
        measured_kld=data["trials"][0]["kld"],
    )
    ci95 = tuple(data["ratio_ci95"]) if data["ratio_ci95"] else None
    return SearchStage(scheme, tuple(data["trials"]), data["ratio"], ci95, outcome)


def _result(found: Found) -> dict[str, Any]:
    best = found.best.candidate
    return {
        "types": dict(best.types),
        "nbytes": best.nbytes,
        "trials": [trial.to_json() for trial in found.trials],
        "ratio": found.ratio.value if found.ratio else None,
        "ratio_ci95": list(found.ratio.ci95) if found.ratio else None,
        "factors": dict(found.factors),
    }


def open_bench(
    reference: Reference,
    imatrix: ImatrixStage,
    text: Sequence[TokenSequence],
    config: Config,
    log: Path,
    feedback: Feedback | None,
) -> Bench:
    """What measures schemes on ``text``; what was measured is in ``log``."""
    n_ctx = max(len(sequence.tokens) for sequence in text)
    engine = partial(
        Engine.open, reference.path, n_ctx=n_ctx, n_threads=config.n_threads, n_gpu_layers=config.n_gpu_layers
    )

    def quantizer() -> Quantizer:
        return Quantizer(WeightFile(reference.path), read_imatrix(imatrix.path), config.n_threads)

    return Bench(engine, quantizer, text, SearchLog(log), feedback)
