"""Calibration text in the model's own words: it answers the shipped prompts, through llama-server.

Takes a reference and a number of tokens, gives a transcript on disk. Sampling in parallel slots is not reproducible, so
the transcript, and not its settings, is what later stages hash. Does not render or tokenize what was said.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import httpx2

from dynrun.artifacts import (
    Outcome,
    StageFolder,
    atomic_path,
    key_of,
    run_stage,
    sha256_bytes,
    sha256_file,
    stage_folder,
)
from dynrun.calibration.conversation import Conversation
from dynrun.config import Config
from dynrun.errors import MALFORMED, DynrunError, NotFoundError, UsageError
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.server import Server
from dynrun.models import Reference

TRANSCRIPT_FILE = "transcript.jsonl"
# One line an answer, as it came, until there are enough.
_JOURNAL_FILE = "answers.jsonl"
# Counts up when the same settings mean other requests or other records.
_REVISION = 1
# llama-server's defaults (common/common.h), spelt out: a GGUF may bring others (general.sampling.*).
_SAMPLING = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
# Bytes: see without_loop.
_PIECE, _NEWS = 128, 40
# A slot may be slow for as long as it likes: if the server dies, the connection breaks.
_TIMEOUT = httpx2.Timeout(10.0, read=None)

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class GenerationSettings:
    """``n_ctx``: each slot's context, for prompt and answer; ``n_parallel``: slots, which change only the speed."""

    n_parallel: int = 8
    temperature: float = 0.7
    seed: int = 0
    max_answer_tokens: int = 512
    n_ctx: int = 1024


@dataclass(frozen=True)
class Prompt:
    """A question of the shipped list. ``thinking`` is the template's switch, None leaves it to the template."""

    id: str
    kind: str
    language: str
    prompt: str
    system: str = ""
    thinking: bool | None = None


@dataclass(frozen=True)
class Transcript:
    """``n_tokens`` of prompts and answers; ``n_dropped`` were empty, or their prompt did not fit the context."""

    path: Path
    sha256: str
    n_tokens: int
    n_answers: int
    n_dropped: int
    elapsed_s: float
    outcome: Outcome


def shipped_prompts() -> tuple[Prompt, ...]:
    """The prompts of this package (written for this project, CC0)."""
    data = (files("dynrun.calibration") / "data" / "prompts.jsonl").read_bytes()
    return tuple(Prompt(**json.loads(line)) for line in data.splitlines() if line.strip())


def generate(
    reference: Reference,
    *,
    n_tokens: int,
    config: Config,
    progress: Progress,
    settings: GenerationSettings | None = None,
    chat_template: Path | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> Transcript:
    """Let the model answer until prompts and answers have ``n_tokens``, or find what it said.

    Where the prompts run out another round begins, with other seeds. An interrupted run goes on: answers that were
    there are kept. Raises ServerDiedError with its cause, NotFoundError where ``chat_template`` is no file, DynrunError
    where llama-server refuses a request twice or the model has nothing to say.
    """
    asked = tuple(shipped_prompts() if prompts is None else prompts)
    job = _Job(reference, asked, n_tokens, settings or GenerationSettings(), config, chat_template)
    if n_tokens < 1 or job.settings.n_parallel < 1 or not asked:
        raise UsageError("generated text needs at least one token, one slot and one prompt")
    if chat_template is not None and not chat_template.is_file():
        raise NotFoundError(f"the chat template {chat_template} is no file", fix="check the path")

    def work(folder: StageFolder) -> Mapping[str, Any]:
        journal = _Journal(folder, [prompt.id for prompt in asked])
        if journal.n_tokens < n_tokens:
            job.run(journal, progress)
        return journal.finish()

    folder = stage_folder("generated", job.inputs())
    outcome = run_stage(folder, work)
    path = folder / TRANSCRIPT_FILE
    return Transcript(path, sha256_file(path), **outcome.result, elapsed_s=outcome.elapsed_s, outcome=outcome)


def read_transcript(path: Path) -> tuple[Conversation, ...]:
    """The conversations of a transcript, rounds in turn. Raises DynrunError, naming the line, for anything else."""
    names = ("id", "kind", "language", "document", "messages", "text", "thinking")
    conversations = []
    # By b"\n" alone: str.splitlines takes characters for line ends that answers may hold.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            conversations.append(Conversation(**{name: record[name] for name in names}))
        except (ValueError, KeyError, TypeError) as error:
            raise DynrunError(f"{path}, line {number}, is no answer of a model", fix="remove its folder") from error
    return tuple(conversations)


# -- what there is already ---------------------------------------------------------------------------------------------


class _Journal:
    """The answers so far; each is on disk before it counts, dropped ones too, so that none is asked for twice."""

    def __init__(self, folder: StageFolder, order: Sequence[str]) -> None:
        self._folder, self._path = folder, folder / _JOURNAL_FILE
        self._order = {id_: number for number, id_ in enumerate(order)}
        if not self._path.exists() and (folder / TRANSCRIPT_FILE).exists():
            # Finished, but damaged since, or killed before the manifest was written.
            (folder / TRANSCRIPT_FILE).replace(self._path)
        self.records: dict[tuple[int, str], dict[str, Any]] = {}
        self.n_tokens = 0
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        data = self._path.read_bytes()
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                self._keep((int(record["round"]), str(record["document"])), record)
            except (ValueError, KeyError, TypeError):
                # Torn by a kill: that answer is asked for again.
                continue
        if data and not data.endswith(b"\n"):
            self._append(b"\n")

    def _keep(self, key: tuple[int, str], record: dict[str, Any]) -> None:
        if key[1] in self._order and key not in self.records:
            n_tokens = int(record["n_tokens"])
            self.records[key] = record
            self.n_tokens += n_tokens

    def _append(self, data: bytes) -> None:
        with self._path.open("ab") as stream:
            stream.write(data)

    def add(self, record: dict[str, Any]) -> None:
        """Keep an answer."""
        self._append(_line(record))
        self._keep((record["round"], record["document"]), record)

    def expected(self, n_more: int) -> float:
        """Tokens there will be once ``n_more`` answers of the usual length have come."""
        return self.n_tokens * (1 + n_more / max(1, len(self.records)))

    def finish(self) -> dict[str, int]:
        """Write the transcript, rounds in turn and each in the prompts' order; remove the journal."""
        keys = sorted(self.records, key=lambda key: (key[0], self._order[key[1]]))
        kept = [self.records[key] for key in keys if self.records[key]["n_tokens"]]
        with atomic_path(self._folder / TRANSCRIPT_FILE) as temporary:
            temporary.write_bytes(b"".join(map(_line, kept)))
        self._path.unlink()
        return {"n_tokens": self.n_tokens, "n_answers": len(kept), "n_dropped": len(keys) - len(kept)}


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


# -- asking ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    reference: Reference
    prompts: Sequence[Prompt]
    n_tokens: int
    settings: GenerationSettings
    config: Config
    chat_template: Path | None

    def inputs(self) -> dict[str, Any]:
        """What the transcript is found by."""
        # The number of slots is the machine's affair: a transcript made with another one is as good.
        settings = {**asdict(self.settings), **_SAMPLING, "n_parallel": None}
        return {
            "reference": self.reference.sha256,
            "prompts": key_of({"prompts": [asdict(prompt) for prompt in self.prompts]}),
            "settings": settings,
            "n_tokens": self.n_tokens,
            "template": "" if self.chat_template is None else sha256_file(self.chat_template),
            "revision": _REVISION,
            "llama_cpp": installation().commit,
        }

    def run(self, journal: _Journal, progress: Progress) -> None:
        """Ask until the journal has enough."""
        with self._server() as server, server.client() as client, ThreadPoolExecutor(self.settings.n_parallel) as pool:
            templated = self.chat_template is not None or "tokenizer.chat_template" in self.reference.header.metadata
            asker = _Asker(client, self.settings, templated, server.log)
            try:
                self._loop(journal, progress, lambda prompt, round_: pool.submit(asker.ask, prompt, round_))
            except httpx2.TransportError as error:
                broken = DynrunError(f"llama-server stopped answering: {error}", fix="see its log", log=server.log)
                raise server.death() or broken from error
            finally:
                # What is still being answered is not needed, or there is an error to be shown now.
                server.kill()

    def _server(self) -> Server:
        return Server(
            self.reference.path,
            n_threads=self.config.n_threads,
            n_ctx=self.settings.n_ctx,
            n_gpu_layers=self.config.n_gpu_layers,
            n_parallel=self.settings.n_parallel,
            chat_template=self.chat_template,
        )

    def _loop(
        self, journal: _Journal, progress: Progress, ask: Callable[[Prompt, int], Future[dict[str, Any]]]
    ) -> None:
        started, before, silent = time.monotonic(), journal.n_tokens, 0
        todo = self._unasked(set(journal.records))
        pending: set[Future[dict[str, Any]]] = set()
        while journal.n_tokens < self.n_tokens:
            # Towards the end only as many as are needed: to stop amid eight answers would prefer the short ones.
            while len(pending) < self.settings.n_parallel and (
                not pending or journal.expected(len(pending)) < self.n_tokens
            ):
                pending.add(ask(*next(todo)))
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                if journal.n_tokens < self.n_tokens:
                    journal.add(future.result())
                    silent = 0 if future.result()["n_tokens"] else silent + 1
            if silent >= max(len(self.prompts), 2 * self.settings.n_parallel):
                message = f"{self.reference.name} answered none of the last {silent} prompts"
                raise DynrunError(message, fix="check its chat template, or calibrate on another source")
            rate = (journal.n_tokens - before) / (time.monotonic() - started)
            progress(min(journal.n_tokens, self.n_tokens), self.n_tokens, f"{rate:.0f} tokens/s")

    def _unasked(self, known: set[tuple[int, str]]) -> Iterator[tuple[Prompt, int]]:
        for round_ in count():
            yield from ((prompt, round_) for prompt in self.prompts if (round_, prompt.id) not in known)


@dataclass(frozen=True)
class _Asker:
    """One request; used by many threads."""

    client: httpx2.Client
    settings: GenerationSettings
    templated: bool
    log: Path

    def ask(self, prompt: Prompt, round_: int) -> dict[str, Any]:
        """The record of an answer; one with ``n_tokens`` 0 where there is none to keep.

        A failed request is tried once more. Raises httpx2.TransportError or DynrunError.
        """
        try:
            response = self._post(prompt, round_, 0)
        except httpx2.TransportError:
            response = None
        # Perhaps a text that llama-server cannot parse: another one.
        if response is None or response.is_server_error:
            response = self._post(prompt, round_, 1)
        record = _record(prompt, round_)
        if response.is_success:
            try:
                return record | self._said(prompt, response.json())
            except MALFORMED as error:
                raise DynrunError(f"llama-server's answer to {prompt.id} makes no sense", log=self.log) from error
        if "exceed_context_size_error" in response.text:
            return record
        raise DynrunError(f"llama-server refused the prompt {prompt.id}: {_reason(response)}", log=self.log)

    def _post(self, prompt: Prompt, round_: int, attempt: int) -> httpx2.Response:
        body: dict[str, Any] = {
            **_SAMPLING,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_answer_tokens,
            "seed": _seed(self.settings.seed, prompt.id, round_, attempt),
        }
        if not self.templated:
            # llama-server would put another model's template around it.
            return self.client.post("/v1/completions", json={**body, "prompt": _plain(prompt)}, timeout=_TIMEOUT)
        body["messages"] = _question(prompt)
        if prompt.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": prompt.thinking}
        return self.client.post("/v1/chat/completions", json=body, timeout=_TIMEOUT)

    def _said(self, prompt: Prompt, answer: dict[str, Any]) -> dict[str, Any]:
        choice, usage = answer["choices"][0], answer["usage"]
        message = choice["message"] if self.templated else {"content": choice["text"]}
        whole = {name: str(message.get(name) or "") for name in ("reasoning_content", "content")}
        said = {name: cut for name, text in whole.items() if (cut := without_loop(text)).strip()}
        if not said:
            return {}
        share = sum(map(len, said.values())) / sum(map(len, whole.values()))
        n_tokens = int(usage["prompt_tokens"]) + max(1, round(int(usage["completion_tokens"]) * share))
        if not self.templated:
            return {"text": _plain(prompt) + said["content"], "n_tokens": n_tokens}
        reply = {"role": "assistant", "content": "", **said}
        return {"messages": [*_question(prompt), reply], "n_tokens": n_tokens}


def without_loop(text: str) -> str:
    """``text`` up to where it only repeats itself: two pieces of 128 bytes that bring deflate fewer than 40 new bytes.

    Small models fall into loops that last until the answer is broken off; their copies would weigh in the statistics,
    and no user reads on there. What stands before is as good as any, and to drop the answer would waste its time and
    prefer prompts that need short ones: so it is cut. Loops bring 18 to 40 bytes; the most repetitive answers of the
    shipped set, code and tables, 50, and a rate of the whole text, as Whisper has it (arXiv:2212.04356, 4.5), comes
    too late for a loop at a long answer's end.
    """
    data, compressor, before = text.encode(), zlib.compressobj(9), _PIECE
    for start in range(0, len(data) - _PIECE + 1, _PIECE):
        piece = data[start : start + _PIECE]
        news = len(compressor.compress(piece)) + len(compressor.flush(zlib.Z_SYNC_FLUSH))
        if before + news < _NEWS:
            return data[: start - _PIECE].decode(errors="ignore")
        before = news
    return text


def _record(prompt: Prompt, round_: int) -> dict[str, Any]:
    return {
        "id": f"self-{prompt.id}-{round_}",
        "kind": prompt.kind,
        "language": prompt.language,
        # Of all rounds: answers to one prompt never stand in two splits.
        "document": prompt.id,
        "round": round_,
        "messages": [],
        "text": "",
        "thinking": prompt.thinking,
        "n_tokens": 0,
    }


def _question(prompt: Prompt) -> list[dict[str, str]]:
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.prompt}]


def _plain(prompt: Prompt) -> str:
    return "\n\n".join(message["content"] for message in _question(prompt))


def _seed(seed: int, prompt_id: str, round_: int, attempt: int) -> int:
    # 31 bits: the largest 32-bit number means a random seed (LLAMA_DEFAULT_SEED).
    return int(sha256_bytes(f"{seed}\0{prompt_id}\0{round_}\0{attempt}".encode())[:8], 16) >> 1


def _reason(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:300]
    except MALFORMED:
        return f"status {response.status_code}"
