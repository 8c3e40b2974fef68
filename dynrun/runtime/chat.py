"""One answer from a model, by a llama-server that lives as long as the answer.

Takes a file and a prompt, gives the text as it comes and an :class:`Answer` in the end. Does not keep conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from dynrun.calibration.template import read_template
from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.header import read_header
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.server import Server


@dataclass(frozen=True)
class Timings:
    """Tokens and tokens per second of the prompt and of the answer, as llama-server measured them."""

    prompt_n: int
    prompt_per_second: float
    predicted_n: int
    predicted_per_second: float


@dataclass(frozen=True)
class Answer:
    """``text`` without the thoughts; ``reasoning`` is empty where the model has none."""

    text: str
    reasoning: str
    timings: Timings


def has_chat_template(path: Path) -> bool:
    """Whether the model brings a chat template; without one it is given plain text."""
    return "tokenizer.chat_template" in read_header(path).metadata


def placement() -> dict[str, str]:
    """Where a model runs: the backend, and the first device it uses (``cpu`` where there is no other)."""
    backend = installation().backend
    devices = [] if backend == "cpu" else tools.devices()
    return {"backend": backend, "device": devices[0].split(":")[0] if devices else "cpu"}


def answer(
    path: Path,
    prompt: str,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    n_threads: int,
    n_ctx: int,
    on_text: Callable[[str], None],
    n_gpu_layers: int = -1,
    chat_template: Path | None = None,
) -> Answer:
    """Ask the model at ``path`` once; ``on_text`` gets the answer's text as it comes. ``seed`` -1 is a random one;
    ``chat_template`` a Jinja file instead of the model's own.

    Raises UsageError where the prompt is longer than the context or the template is no text, ServerDiedError, with its
    cause, where llama-server died, at whatever moment.
    """
    if chat_template is not None:
        # With an empty one llama-server takes the model's own and says nothing.
        read_template(chat_template)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stream": True}
    templated = chat_template is not None or has_chat_template(path)
    endpoint, asked = _request(templated, prompt, system)
    parts = _Parts(on_text)
    serving = Server(path, n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=n_gpu_layers, chat_template=chat_template)
    with serving as server, server.client() as client:
        try:
            for event in _events(client, endpoint, {**asked, **sampling}, server):
                parts.take(event)
        except httpx.TransportError as error:
            if (died := server.death()) is not None:
                raise died from error
            raise DynrunError(f"llama-server stopped answering: {error}", fix="see its log", log=server.log) from error
        if parts.timings is None:
            broken = DynrunError("llama-server ended its answer too early", fix="see its log", log=server.log)
            raise server.death(within_s=1.0) or broken
    return Answer("".join(parts.text), "".join(parts.reasoning), parts.timings)


def _request(templated: bool, prompt: str, system: str | None) -> tuple[str, dict[str, Any]]:
    if not templated:
        # llama-server would put another model's template around it.
        return "/v1/completions", {"prompt": prompt if system is None else f"{system}\n\n{prompt}"}
    messages = [] if system is None else [{"role": "system", "content": system}]
    return "/v1/chat/completions", {"messages": [*messages, {"role": "user", "content": prompt}]}


def _events(client: httpx.Client, endpoint: str, body: dict[str, Any], server: Server) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events (tools/server/README.md of llama.cpp)."""
    with client.stream("POST", endpoint, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise _refused(response.read(), server)
        for line in response.iter_lines():
            kind, _, data = line.partition(": ")
            if kind not in ("data", "error") or data == "[DONE]":
                continue
            event = json.loads(data)
            if kind == "error" or "error" in event:
                raise _refused(data.encode(), server)
            yield event


def _refused(body: bytes, server: Server) -> DynrunError:
    try:
        error = json.loads(body)["error"]
        kind, message = str(error.get("type")), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, message = "", body.decode("utf-8", "replace")
    if kind == "exceed_context_size_error":
        fix = f"shorten it, or give a context of more than {server.n_ctx} tokens (--ctx) if the model has one"
        return UsageError(f"the prompt does not fit the context: {message[:300]}", fix=fix)
    return DynrunError(f"llama-server refused the request: {message[:300]}", fix="see its log", log=server.log)


@dataclass
class _Parts:
    on_text: Callable[[str], None]
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    timings: Timings | None = None

    def take(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice
            if thought := delta.get("reasoning_content"):
                self.reasoning.append(thought)
            if text := delta.get("content") or delta.get("text"):
                self.text.append(text)
                self.on_text(text)
        if timings := event.get("timings"):
            self.timings = Timings(
                prompt_n=int(timings["prompt_n"]),
                prompt_per_second=float(timings["prompt_per_second"]),
                predicted_n=int(timings["predicted_n"]),
                predicted_per_second=float(timings["predicted_per_second"]),
            )
