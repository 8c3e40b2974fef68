"""A model that is asked again and again: its server, started when it is needed, and started anew when memory runs out.

Drives the terminal and the app alike: :meth:`Session.start` and :meth:`Session.ask` are generators of frozen events
(events.py); :meth:`Session.cancel`, from any thread or signal handler, ends what is going on. Keeps no conversation
(history.py) and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from types import TracebackType
from typing import Any, Self

from dynrun.errors import DynrunError, NetworkError, UsageError
from dynrun.llamacpp.server import ServerOutOfMemoryError
from dynrun.llamacpp.server_log import memory_ran_out
from dynrun.runtime import ladder
from dynrun.runtime.events import Event, Finished, Ready, Restarted, Starting, Timings
from dynrun.runtime.history import Message, request_messages
from dynrun.runtime.ladder import Job, Planner, Running
from dynrun.runtime.placement import Placement
from dynrun.runtime.reply import BrokenReplyError, Cancellation, RefusedError, reply
from dynrun.runtime.sampling import Sampling

# Fewer tokens are timed too coarsely to learn from.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class Attached:
    """A server that somebody else (``dynrun serve``) runs; ``model`` is its name there where it has several."""

    url: str
    api_key: str
    n_ctx: int
    model: str = ""


class Session:
    """One model, one user. A context manager: its server ends with it.

    ``templated`` is false for a model without a chat template, which is given plain text. With ``attached`` no server
    is started.
    """

    def __init__(self, job: Job, planner: Planner, *, templated: bool, attached: Attached | None = None) -> None:
        self.job, self.planner, self.templated, self.attached = job, planner, templated, attached
        self._running: Running | None = None
        self._starting = Flag()
        self._cancellation = Cancellation()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def placement(self) -> Placement | None:
        """Where the model lies; None before the start and with somebody else's server."""
        return self._running.placement if self._running else None

    @property
    def n_ctx(self) -> int:
        """Tokens of context; 0 before the start."""
        if self.attached is not None:
            return self.attached.n_ctx
        return self._running.placement.choice.n_ctx if self._running else 0

    def start(self) -> Iterator[Event]:
        """Have a server answer; nothing where one does. Raises as :func:`ladder.start` does."""
        # Now, not when the first event is asked for: what is cancelled in between stays so.
        self._starting.clear()
        return self._started()

    def _started(self) -> Iterator[Event]:
        if self.attached is not None:
            yield Starting(None)
            yield Ready(self.attached.url, self.attached.n_ctx, 0.0)
        elif self._running is None:
            self._running = yield from ladder.start(self.job, self.planner, self._starting)

    def ask(
        self, messages: Sequence[Message], *, system: str = "", sampling: Sampling | None = None
    ) -> Iterator[Event]:
        """The answer to a conversation whose last message is the user's, piece by piece; ``Finished`` comes last.

        Starts the server where none runs. Memory that runs out meanwhile makes it start anew with less, and the answer
        begin again. Raises UsageError where the conversation does not fit the context, ServerDiedError.
        """
        self._cancellation = Cancellation()
        endpoint, body = self._request(messages, system)
        body |= (sampling or Sampling()).request()
        return self._asked(endpoint, body, self.start())

    def _asked(self, endpoint: str, body: dict[str, Any], starting: Iterator[Event]) -> Iterator[Event]:
        yield from starting
        while True:
            url, key = self._address()
            try:
                for event in reply(url, key, endpoint, body, self._cancellation):
                    if isinstance(event, Finished):
                        self._learn(event.answer.timings)
                    yield event
                return
            except (BrokenReplyError, RefusedError) as error:
                died = self._why(error)
                if not isinstance(died, ServerOutOfMemoryError):
                    raise died from error
                yield from self._smaller(died)

    def cancel(self) -> None:
        """End the answer, or the start, that is going on."""
        self._starting.set()
        self._cancellation.cancel()

    def close(self) -> None:
        """End the server. A later :meth:`ask` starts one again."""
        running, self._running = self._running, None
        if running is not None:
            running.server.stop()

    def _learn(self, timings: Timings) -> None:
        """Every long enough answer corrects the planner."""
        if self._running is not None and timings.predicted_n >= _LEAST_TOKENS:
            # What cannot be kept does not matter to an answer.
            with suppress(DynrunError, OSError):
                self.planner.learn(self._running.placement, timings.predicted_per_second)

    def _address(self) -> tuple[str, str]:
        if self.attached is not None:
            return self.attached.url, self.attached.api_key
        assert self._running is not None
        return self._running.server.url, self._running.server.api_key

    def _why(self, error: BrokenReplyError | RefusedError) -> DynrunError:
        """The error that is to be told: of a dead server its cause."""
        if self._running is None:
            gone = NetworkError("the running `dynrun serve` stopped answering", fix="run it, or this command, again")
            return gone if isinstance(error, BrokenReplyError) else error
        server = self._running.server
        if (died := server.death(within_s=10.0 if isinstance(error, BrokenReplyError) else 0.2)) is not None:
            return ladder.explained(self.job, died)
        text = server.log_text()
        # Metal and RPC devices refuse the batch and live on.
        if isinstance(error, RefusedError) and error.kind == "server_error" and (death := memory_ran_out(text)):
            return server.died(death, text)
        return DynrunError(error.message, fix="see its log", log=server.log)

    def _smaller(self, error: ServerOutOfMemoryError) -> Iterator[Event]:
        assert self._running is not None
        failed, self._running = self._running, None
        failed.server.stop()
        yield Restarted()
        self._running = yield from ladder.retreat(self.job, self.planner, failed.placement, error, self._starting)

    def _request(self, messages: Sequence[Message], system: str) -> tuple[str, dict[str, Any]]:
        model = {"model": self.attached.model} if self.attached is not None and self.attached.model else {}
        if self.templated:
            return "/v1/chat/completions", {"messages": request_messages(system, messages), **model}
        if any(message.images for message in messages):
            raise UsageError(
                "the model has no chat template, which would say where an image goes", fix="ask without it"
            )
        # llama-server would put another model's template around it.
        texts = [system] if system else []
        return "/v1/completions", {"prompt": "\n\n".join([*texts, *(m.text for m in messages)]), **model}
