"""`dynrun run`: a chat with a model, or one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, say
from dynrun.cli.running import Running, crashes_told, narrate, open_session, placement_json, sampled
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.runtime.history import Chat, Message
    from dynrun.runtime.session import Session

ModelOrNone = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A GGUF, or a name that `dynrun ls` shows, or demo.")
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="An image to ask about; repeatable.")
]


Prompt = Annotated[str, typer.Option("-p", "--prompt", help="Ask once; piped text is added to it.")]
System = Annotated[str | None, typer.Option("--system", help="The system prompt.")]
ShowThinking = Annotated[
    bool, typer.Option("--show-thinking", help="Show the model's thoughts instead of folding them.")
]
Resume = Annotated[
    str | None, typer.Option("--resume", metavar="ID", help="Go on with a conversation: its id, or last.")
]
Chats = Annotated[bool, typer.Option("--chats", help="List the conversations that were kept.")]
NewServer = Annotated[bool, typer.Option("--new-server", help="Start one even where `dynrun serve` serves this model.")]


@sampled
def run(
    settings: Running,
    model: ModelOrNone = None,
    prompt: Prompt = "",
    system: System = None,
    image: Images = None,
    show_thinking: ShowThinking = False,
    resume: Resume = None,
    chats: Chats = False,
    new_server: NewServer = False,
    as_json: options.AsJson = False,
) -> None:
    """Chat with a model; with -p or piped text, ask it once.

    Example: dynrun run demo -p "Summarise this in one sentence." < notes.txt
    """
    if chats:
        _list(as_json)
        return
    _check_text(system or "", "--system")
    question = _question(prompt)
    if not question and (as_json or image):
        raise UsageError("there is no prompt", fix='give one with -p "…", or pipe text in')
    conversation = _conversation(model, system, resume)

    from dynrun.models import resolve

    path = resolve(conversation.model).path
    if image and settings.mmproj is None:
        settings = replace(settings, mmproj=_encoder(path))
    with crashes_told(), open_session(path, settings, reuse=not new_server) as session:
        if not session.templated:
            say(f"{path.name} has no chat template: it is given plain text")
        if question:
            _once(session, settings, conversation, _asked(question, image or []), bool(resume), show_thinking, as_json)
        else:
            from dynrun.cli.chat import Terminal

            Terminal(session, conversation, settings.sampling, show_thinking).run()


def _once(
    session: Session,
    settings: Running,
    conversation: Chat,
    question: Message,
    keep: bool,
    show_thinking: bool,
    as_json: bool,
) -> None:
    from dynrun.cli.chat import answered, stats
    from dynrun.runtime.events import Event
    from dynrun.runtime.history import Message

    messages = (*conversation.messages, question)
    events = session.ask(messages, system=conversation.system, sampling=settings.sampling)

    def told(event: Event) -> None:
        narrate(event, session.job.model.name)

    answer = answered(events, session, told, quiet=as_json, show_thinking=show_thinking)
    if keep:
        conversation.said(question, Message("assistant", answer.text, answer.reasoning, stop=answer.stop))
    placement = {"placement": placement_json(session.placement), "model": str(session.job.model)}
    emit(as_json, {**asdict(answer), **placement}, lambda: say(stats(answer)))


def _conversation(model: str | None, system: str | None, resume: str | None) -> Chat:
    from dynrun.runtime.history import find_chat, new_chat

    if resume is None:
        if model is None:
            raise UsageError("which model?", fix="name one, as in: dynrun run demo")
        return new_chat(model, system or "")
    found = find_chat(resume)
    return replace(found, model=model or found.model, system=found.system if system is None else system)


def _asked(question: str, images: list[Path]) -> Message:
    from dynrun.runtime.history import Message
    from dynrun.runtime.images import image_part

    for image in images:
        image_part(image)
    return Message("user", question, images=tuple(str(image.absolute()) for image in images))


def _encoder(model: Path) -> Path:
    from dynrun.runtime.images import find_mmproj

    found = find_mmproj(model)
    if found is None:
        raise UsageError(f"no image encoder lies beside {model.name}", fix="name its mmproj file with --mmproj")
    say(f"images by {found.name}")
    return found


def _list(as_json: bool) -> None:
    from dynrun.runtime.history import list_chats

    kept = list_chats()
    data: dict[str, Any] = {
        "chats": [
            {"id": c.id, "model": c.model, "title": c.title, "messages": len(c.messages), "path": str(c.path)}
            for c in kept
        ]
    }

    def show() -> None:
        for chat in kept:
            print(f"{chat.id}\t{chat.model}\t{len(chat.messages)}\t{chat.title}")
        if not kept:
            say("no conversation was kept yet: dynrun run demo")

    emit(as_json, data, show)


def _question(prompt: str) -> str:
    """What the option and standard input say together; nothing where a terminal is to be asked.

    Raises UsageError where piped text and prompt are blank.
    """
    _check_text(prompt, "-p")
    piped, terminal = "", sys.stdin is None or sys.stdin.isatty()
    if not terminal:
        try:
            piped = sys.stdin.read().strip("\n")
        except UnicodeDecodeError as error:
            raise UsageError("standard input is no UTF-8 text", fix="convert it, as with iconv -t UTF-8") from error
        _check_text(piped, "standard input")
    question = "\n\n".join(part for part in (prompt, piped) if part.strip())
    if not question and (prompt or not terminal):
        raise UsageError("there is no prompt", fix='give one with -p "…", or pipe text in')
    return question


def _check_text(text: str, where: str) -> None:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{where} is no UTF-8 text", fix="convert it, as with iconv -t UTF-8")
