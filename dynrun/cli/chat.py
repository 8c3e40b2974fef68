"""The chat of `dynrun run` in a terminal: questions are typed, answers stream, Ctrl+C stops an answer and no more."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from dynrun.cli.output import say
from dynrun.cli.running import narrate
from dynrun.errors import DynrunError, UsageError
from dynrun.runtime.events import Answer, Event, Finished, Reading, Restarted, Said, Thought
from dynrun.runtime.history import Chat, Message, find_chat, list_chats, new_chat
from dynrun.runtime.images import find_mmproj, image_part
from dynrun.runtime.printable import printable
from dynrun.runtime.sampling import Sampling, described, in_force
from dynrun.runtime.session import Session

_HELP = '''/new             a new conversation        /system TEXT   another system prompt
/chats           those that were kept      /resume ID     go on with one (or: last)
/retry           answer again              /set NAME N    temp, top_k, top_p, min_p, seed, max_tokens
/image FILE      ask about an image        /think         show thoughts, or fold them
/info            model, memory, settings   /quit, Ctrl+D  end
""" begins and ends a question of several lines. Ctrl+C stops an answer.'''
_SETTINGS = {"temp": "temperature"}


def stats(answer: Answer) -> str:
    """A line on an answer's speed."""
    t = answer.timings
    stopped = {"cancelled": "stopped; ", "length": "the limit of tokens or of the context is reached; "}
    cached = f" ({t.cache_n} more were known)" if t.cache_n else ""
    return (
        f"{stopped.get(answer.stop, '')}prompt: {t.prompt_n} tokens{cached}, {t.prompt_per_second:.1f} a second; "
        f"answer: {t.predicted_n} tokens, {t.predicted_per_second:.1f} a second"
    )


def answered(
    events: Iterator[Event],
    session: Session,
    told: Callable[[Event], None],
    *,
    quiet: bool,
    show_thinking: bool,
) -> Answer:
    """Print an answer as it comes, on stdout its text, on stderr the rest; Ctrl+C stops it."""
    page = _Page(quiet, show_thinking)
    with _ctrl_c(session.cancel):
        for event in events:
            told(event)
            page.take(event)
            if isinstance(event, Finished):
                page.end(event.answer)
                return event.answer
    raise DynrunError("the answer ended without an end", fix="report it")


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl+C calls ``stop``; the second time, should that not help, it interrupts as ever."""
    times = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal times
        times += 1
        if times > 1:
            raise KeyboardInterrupt
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Keys:
    """Ctrl+C at the prompt interrupts the typing; between a question and its answer it is remembered for the answer."""

    def __init__(self) -> None:
        self.typing, self.pressed = False, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """As long as the chat."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.typing or self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class _Page:
    """What is on the screen of one answer."""

    def __init__(self, quiet: bool, show_thinking: bool) -> None:
        self.quiet, self.show_thinking = quiet, show_thinking
        self.live = sys.stderr.isatty() and not quiet
        self.plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
        self.thinking_s, self.thoughts, self.line = 0.0, 0, False

    def take(self, event: Event) -> None:
        match event:
            case Reading(done, total) if done < total:
                self._status(f"reading {done:,} of {total:,} tokens")
            case Thought(text):
                self._think(text)
            case Said(text):
                self._say(text)
            case Restarted():
                self._clear()
                self.thoughts = 0

    def end(self, answer: Answer) -> None:
        self._fold()
        if not self.quiet and not answer.text.endswith("\n"):
            print(flush=True)

    def _think(self, text: str) -> None:
        if not self.thoughts:
            self.thinking_s = time.monotonic()
        self.thoughts += 1
        if self.quiet:
            return
        if self.show_thinking:
            self._clear()
            print(self._dim(printable(text)), end="", file=sys.stderr, flush=True)
        else:
            self._status(f"thinking, {self.thoughts} tokens")

    def _say(self, text: str) -> None:
        self._fold()
        if not self.quiet:
            print(printable(text), end="", flush=True)

    def _fold(self) -> None:
        """The thoughts are over."""
        self._clear()
        if self.thoughts and not self.quiet:
            spent = f"thought for {time.monotonic() - self.thinking_s:.1f} s ({self.thoughts} tokens)"
            say(self._dim(f"\n\n{spent}\n" if self.show_thinking else spent))
        self.thoughts = 0

    def _status(self, text: str) -> None:
        if self.live:
            self.line = True
            print(f"\r\x1b[2K{self._dim(text)}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.line:
            self.line = False
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def _dim(self, text: str) -> str:
        return text if self.plain else f"\x1b[2m{text}\x1b[0m"


class Terminal:
    """The loop of questions and answers; every exchange is kept (history.py) as soon as it is over."""

    def __init__(self, session: Session, chat: Chat, sampling: Sampling, show_thinking: bool) -> None:
        self.session, self.chat, self.sampling, self.show_thinking = session, chat, sampling, show_thinking
        self.images: list[str] = []
        self._keys = _Keys()
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(_HELP),
            "new": self._new,
            "chats": self._chats,
            "resume": self._resume,
            "system": self._system,
            "retry": self._retry,
            "set": self._set,
            "image": self._image,
            "think": self._think,
            "info": self._info,
        }

    def run(self) -> None:
        """Until /quit or Ctrl+D."""
        with _ctrl_c(self.session.cancel):
            for event in self.session.start():
                self._told(event)
        self._info("")
        say("/help lists the commands; Ctrl+D ends")
        self._show_end_of_chat()
        # Line editing and a history of lines, where Python has it.
        with_readline()
        with self._keys.watched():
            self._talk()

    def _talk(self) -> None:
        while (text := _typed(self._keys)) is not None:
            command, _, rest = text.removeprefix("/").partition(" ")
            try:
                if text in ("/quit", "/exit", "/bye"):
                    return
                if text.startswith("/") and command in self._commands:
                    self._commands[command](rest.strip())
                elif text.startswith("/") and "\n" not in text and "/" not in text[1:]:
                    say(f"there is no {text.split()[0]}; /help lists the commands")
                elif text.strip():
                    self._ask(Message("user", text, images=tuple(self.images)))
            except UsageError as error:
                say(str(error))

    def _told(self, event: Event) -> None:
        narrate(event, self.chat.model)

    def _ask(self, question: Message) -> None:
        answer = self._answer((*self.chat.messages, question))
        self.images.clear()
        self.chat = self.chat.said(question, answer)

    def _answer(self, messages: tuple[Message, ...]) -> Message:
        events = self.session.ask(messages, system=self.chat.system, sampling=self.sampling)
        with _ctrl_c(self.session.cancel):
            if self._keys.pressed:
                self.session.cancel()
            answer = answered(events, self.session, self._told, quiet=False, show_thinking=self.show_thinking)
        say(stats(answer))
        return Message("assistant", answer.text, answer.reasoning, stop=answer.stop)

    def _retry(self, _: str) -> None:
        if not self.chat.messages:
            raise UsageError("there is no answer yet", fix="ask something")
        answer = self._answer(self.chat.messages[:-1])
        self.chat = self.chat.taken_back(1).said(answer)

    def _new(self, _: str) -> None:
        self.chat = new_chat(self.chat.model, self.chat.system)
        say("a new conversation")

    def _chats(self, _: str) -> None:
        for chat in list_chats()[:20]:
            print(f"{chat.id}  {chat.model}  {chat.title}")

    def _resume(self, name: str) -> None:
        try:
            found = find_chat(name or "last")
        except DynrunError as error:
            raise UsageError(error.message, fix="/chats lists them") from error
        self.chat = replace(found, model=self.chat.model)
        self._show_end_of_chat()

    def _show_end_of_chat(self) -> None:
        if self.chat.messages:
            say(f"going on with {self.chat.id}, {len(self.chat.messages)} messages; the last ones:")
        for message in self.chat.messages[-2:]:
            print(f"{'> ' if message.role == 'user' else ''}{printable(message.text)}")

    def _system(self, text: str) -> None:
        self.chat = new_chat(self.chat.model, text)
        say("a new conversation with this system prompt" if text else "a new conversation without a system prompt")

    def _set(self, words: str) -> None:
        name, _, number = words.partition(" ")
        field = _SETTINGS.get(name, name)
        try:
            value: Any = (int if field in ("top_k", "seed", "max_tokens") else float)(number)
            self.sampling = replace(self.sampling, **{field: value})
        except (ValueError, TypeError) as error:
            raise UsageError(f"/set {words} makes no sense", fix="as in: /set temp 0.7") from error
        self._info("")

    def _image(self, name: str) -> None:
        path = Path(name).expanduser().absolute()
        try:
            image_part(path)
        except DynrunError as error:
            raise UsageError(error.message, fix=error.fix) from error
        if self.session.placement is None or self.session.placement.choice.mmproj is None:
            near = find_mmproj(self.session.job.model)
            hint = f"--mmproj {near}" if near else "--mmproj FILE"
            raise UsageError("the model was started without an image encoder", fix=f"start with {hint}")
        self.images.append(str(path))
        say("ask about it now")

    def _think(self, _: str) -> None:
        self.show_thinking = not self.show_thinking
        say("thoughts are shown" if self.show_thinking else "thoughts are folded")

    def _info(self, _: str) -> None:
        from dynrun.gguf.header import read_header

        settings = in_force(self.sampling, read_header(self.session.job.model).metadata)
        say(f"{self.chat.model}, {self.session.n_ctx:,} tokens of context; {described(settings)}")


def with_readline() -> None:
    """Have input() edit lines."""
    try:
        import readline

        readline.set_history_length(1000)
    except ImportError:
        pass


def _unfinished(text: str) -> bool:
    """Whether three quotes were begun and not ended."""
    return text.startswith('"""') and not (len(text) >= 6 and text.endswith('"""'))


def _typed(keys: _Keys) -> str | None:
    """What is typed at the prompt; None at the end. Three quotes begin and end a text of several lines."""
    while True:
        try:
            keys.typing, keys.pressed = True, False
            lines = [input("> ")]
            while _unfinished(text := "\n".join(lines)):
                lines.append(input("… "))
            keys.typing = False
            return text[3:-3].strip("\n") if text.startswith('"""') else text
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            say("Ctrl+D or /quit ends")
