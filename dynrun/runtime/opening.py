"""From a model file and wishes to a session: plan, look for what worked before, and for a server that runs already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from dynrun.calibration.template import read_template
from dynrun.gguf.header import Header, read_header
from dynrun.llamacpp.server import ServerOutOfMemoryError
from dynrun.runtime.calibration import note_speed
from dynrun.runtime.events import Answer, Finished, Said
from dynrun.runtime.history import Message
from dynrun.runtime.ladder import Job, Planner
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import ModelFacts, facts_of
from dynrun.runtime.placement import Placement, Wishes
from dynrun.runtime.plan import placed, plan, retreat
from dynrun.runtime.remembered import Remembered, remembered
from dynrun.runtime.remote_devices import with_rpc
from dynrun.runtime.sampling import Sampling
from dynrun.runtime.served import find_served
from dynrun.runtime.session import Session
from dynrun.runtime.this_machine import this_machine


@dataclass(frozen=True)
class Where:
    """Where a model is to go: ``wishes`` for the planner; ``n_gpu_layers`` of the user's configuration (-1: as
    planned); RPC servers, as ``host:port``; ``replan`` forgets what worked before."""

    wishes: Wishes = field(default_factory=Wishes)
    n_gpu_layers: int = -1
    rpc: tuple[str, ...] = ()
    replan: bool = False


def open_session(
    model: Path,
    where: Where,
    *,
    n_threads: int,
    chat_template: Path | None = None,
    reuse: bool = False,
) -> Session:
    """A session for ``model``; nothing is started yet. With ``reuse`` a server of `dynrun serve` is used where one has
    what is wished.

    Raises UsageError where the template is no text or a wish makes no sense.
    """
    if chat_template is not None:
        # With an empty one llama-server takes the model's own and says nothing.
        read_template(chat_template)
    attached = None
    if reuse and chat_template is None and where.wishes.mmproj is None and not where.rpc:
        attached = find_served(model, where.wishes.n_ctx or 0)
    templated = chat_template is not None or has_chat_template(read_header(model))
    job = Job(model, n_threads, chat_template, where.rpc)
    return Session(job, planner_for(model, where), templated=templated, attached=attached)


def has_chat_template(header: Header) -> bool:
    """Whether the model brings a chat template; without one it is given plain text."""
    return "tokenizer.chat_template" in header.metadata


def planner_for(model: Path, where: Where, machine: Machine | None = None) -> Planner:
    """The planner of ``model`` on ``machine`` (this one, as it is when it is first asked)."""
    planning = _Planning(model, where, machine)
    return Planner(planning.first, planning.retreat, planning.remember, planning.learn)


@dataclass
class _Planning:
    model: Path
    where: Where
    given: Machine | None

    @cached_property
    def machine(self) -> Machine:
        return with_rpc(this_machine(), self.where.rpc) if self.given is None else self.given

    @cached_property
    def facts(self) -> ModelFacts:
        return facts_of(read_header(self.model))

    @cached_property
    def memory(self) -> Remembered:
        return remembered(self.model, self.machine, self.wishes, self.where.rpc)

    @cached_property
    def wishes(self) -> Wishes:
        """Capped to what the model was trained for; llama.cpp would go on and talk nonsense."""
        wishes, trained = self.where.wishes, self.facts.n_ctx_train
        if wishes.n_ctx and trained:
            wishes = replace(wishes, n_ctx=min(wishes.n_ctx, trained))
        if wishes.mmproj is not None:
            wishes = replace(wishes, mmproj_bytes=read_header(wishes.mmproj).file_bytes)
        return wishes

    def first(self) -> tuple[Placement, bool]:
        if self.where.replan:
            self.memory.forget()
        if (choice := self.memory.choice()) is not None:
            return placed(self.facts, self.machine, choice), True
        n_layers = self.where.n_gpu_layers
        if not n_layers:
            cpu_only = replace(self.machine, devices=())
            found = plan(self.facts, cpu_only, self.wishes)
            return placed(self.facts, self.machine, found.choice), False
        found = plan(self.facts, self.machine, self.wishes)
        if 0 < n_layers < found.choice.n_gpu_layers:
            found = self._at_most(found, n_layers)
        return found, False

    def _at_most(self, found: Placement, n_layers: int) -> Placement:
        """With at most ``n_layers`` on devices, the last ones, as of -ngl."""
        counts: list[int] = []
        left = n_layers
        for n in reversed(found.choice.layers_of):
            counts.insert(0, min(n, left))
            left -= counts[0]
        return placed(self.facts, self.machine, replace(found.choice, n_gpu_layers=n_layers, layers_of=tuple(counts)))

    def retreat(self, failed: Placement, error: ServerOutOfMemoryError) -> Placement | None:
        return retreat(failed, self.facts, self.machine, host=error.host)

    def remember(self, worked: Placement) -> None:
        self.memory.keep(worked.choice)

    def learn(self, placement: Placement, tokens_per_second: float) -> None:
        note_speed(self.facts, self.machine, placement, tokens_per_second)


def ask_once(
    model: Path, prompt: str, *, n_threads: int, n_gpu_layers: int, sampling: Sampling, on_text: Callable[[str], None]
) -> Answer:
    """One answer, by a server that lives as long as it; ``on_text`` gets the text as it comes."""
    where = Where(Wishes(n_ctx=2048, prompt_cache_bytes=0), n_gpu_layers)
    with open_session(model, where, n_threads=n_threads) as session:
        for event in session.ask([Message("user", prompt)], sampling=sampling):
            if isinstance(event, Said):
                on_text(event.text)
            if isinstance(event, Finished):
                return event.answer
    raise AssertionError("a session ends with an answer or an error")
