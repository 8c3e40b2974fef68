"""The field's own harness (EleutherAI's lm-evaluation-harness, the extra `dynrun[harness]`) on a GGUF.

Takes a model file and names of the harness's tasks, gives its results. What is generated comes from a llama-server
child. Likelihoods of given texts, which llama-server does not tell ("Only no echo is supported",
tools/server/server-common.cpp), come from the engine in this process. The harness fetches its data sets from the Hub.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import write_text
from dynrun.errors import DynrunError, NetworkError, UsageError
from dynrun.llamacpp.process import new_log

PACKAGE = "lm_eval"
# As pyproject.toml has it for the extra.
_REQUIREMENT = "lm-eval>=0.4.13"


@dataclass(frozen=True)
class HarnessSettings:
    """``chat``: give prompts the model's chat template. ``include``: a folder with tasks of the user's own.

    ``unsafe_code``: run what the model writes, as tasks like HumanEval do.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    include: Path | None = None
    unsafe_code: bool = False
    n_ctx: int = 4096
    n_parallel: int = 4


@dataclass(frozen=True)
class HarnessResults:
    """``tasks``: the metrics of each task, as the harness names them; ``raw``: all that it says."""

    tasks: Mapping[str, Mapping[str, Any]]
    raw: Mapping[str, Any]

    @property
    def version(self) -> str:
        return str(self.raw.get("lm_eval_version", ""))

    def write(self, path: Path) -> None:
        """All that the harness says, as JSON."""
        write_text(path, json.dumps(self.raw, indent=1, default=str) + "\n")


def require_harness() -> None:
    """Raises DynrunError, saying how to install it, where the harness is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise DynrunError(
            "lm-evaluation-harness (the extra dynrun[harness]) is not installed",
            fix=f"install it: {sys.executable} -m pip install '{_REQUIREMENT}'",
        )


def run_harness(
    model: Path,
    settings: HarnessSettings,
    *,
    n_threads: int,
    n_gpu_layers: int = -1,
    say: Callable[[str], None] = lambda _: None,
) -> HarnessResults:
    """Evaluate ``model`` on the harness's tasks.

    Raises DynrunError where the harness is missing or fails, UsageError for unknown tasks, NetworkError where a data
    set cannot be fetched, and what the server raises.
    """
    require_harness()
    from lm_eval import simple_evaluate

    from dynrun.evaluation.harness_model import GgufModel

    # The harness prints on both; ours is for results.
    with redirect_stdout(sys.stderr), _as_our_errors():
        manager = _task_manager(settings)
        _check_tasks(settings.tasks, manager.match_tasks(list(settings.tasks)), manager.all_tasks)
        with GgufModel(model, settings, n_threads=n_threads, n_gpu_layers=n_gpu_layers, say=say) as subject:
            raw = simple_evaluate(
                model=subject,
                tasks=manager.match_tasks(list(settings.tasks)),
                num_fewshot=settings.shots,
                limit=settings.limit,
                task_manager=manager,
                apply_chat_template=settings.chat,
                confirm_run_unsafe_code=settings.unsafe_code,
                log_samples=True,
            )
    return HarnessResults({name: _metrics(found) for name, found in raw["results"].items()}, raw)


def _task_manager(settings: HarnessSettings) -> Any:
    """Of the user's own tasks alone where no others are wanted: to read the harness's thousands takes a while."""
    from lm_eval.tasks import TaskManager

    if settings.include is None:
        return TaskManager()
    own = TaskManager(include_path=str(settings.include), include_defaults=False)
    if set(settings.tasks) <= set(own.all_tasks):
        return own
    return TaskManager(include_path=str(settings.include))


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a task by their names; the harness adds the filter: ``exact_match,strict-match``."""
    return {name.removesuffix(",none"): value for name, value in found.items() if isinstance(value, int | float)}


def _check_tasks(wanted: Sequence[str], matched: Sequence[str], known: Sequence[str]) -> None:
    from difflib import get_close_matches

    missing = [name for name in wanted if name not in matched and not any(c in name for c in "*?[")]
    if missing or not matched:
        name = missing[0] if missing else ", ".join(wanted)
        near = get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list them: lm-eval ls tasks"
        raise UsageError(f"the harness has no task {name!r}", fix=hint)


@contextmanager
def _as_our_errors() -> Iterator[None]:
    """Whatever the harness and its libraries raise as one line, the traceback in a log."""
    try:
        yield
    except DynrunError:
        raise
    except Exception as error:
        log = new_log("lm-eval")
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, OSError) or "Connection" in type(error).__name__ or "Offline" in type(error).__name__:
            raise NetworkError(
                f"a data set of the harness could not be fetched: {reason}", fix="check the network", log=log
            ) from error
        raise DynrunError(f"lm-evaluation-harness failed: {reason}", fix="see its log", log=log) from error
