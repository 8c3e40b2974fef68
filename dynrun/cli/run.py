"""`dynrun run`: one answer from a model."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, say
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from dynrun.runtime.chat import Answer

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF, or a name that `dynrun ls` shows, or demo.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask; piped text is added to it.")] = "",
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens of the answer at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")] = 0.7,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 2, help="For the same answer again.")] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=1, help="Context in tokens; at most what the model has.")] = 4096,
    chat_template: options.ChatTemplate = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a model once; text that is piped in is part of the question.

    Example: dynrun run demo -p "Summarise this in one sentence." < notes.txt
    """
    question = _question(prompt)
    _check(system or "", temperature)

    from dynrun.config import load_config
    from dynrun.models import resolve
    from dynrun.runtime.chat import answer, has_chat_template, placement

    config = load_config()
    path = resolve(model).path
    if chat_template is None and not has_chat_template(path):
        say(f"{path.name} has no chat template: it is given plain text")
    given = answer(
        path,
        question,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=-1 if seed is None else seed,
        n_threads=config.n_threads,
        n_ctx=ctx,
        n_gpu_layers=config.n_gpu_layers,
        chat_template=chat_template,
        on_text=(lambda _: None) if as_json else _print,
    )
    emit(as_json, _data(given, path, placement()) if as_json else {}, lambda: _show(given))


def _print(text: str) -> None:
    # Escape sequences in a model's text must not reach the terminal.
    print(text.translate(_CONTROLS), end="", flush=True)


def _question(prompt: str) -> str:
    """What the option and standard input say together. Raises UsageError where that is nothing."""
    _check_text(prompt, "-p")
    piped = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            piped = sys.stdin.read().strip("\n")
        except UnicodeDecodeError as error:
            raise UsageError("standard input is no UTF-8 text", fix="convert it, as with iconv -t UTF-8") from error
        _check_text(piped, "standard input")
    question = "\n\n".join(part for part in (prompt, piped) if part.strip())
    if not question:
        raise UsageError("there is no prompt", fix='give one with -p "…", or pipe text in')
    return question


def _check_text(text: str, where: str) -> None:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{where} is no UTF-8 text", fix="convert it, as with iconv -t UTF-8")


def _check(system: str, temperature: float) -> None:
    _check_text(system, "--system")
    if not math.isfinite(temperature):
        raise UsageError(f"--temperature {temperature} is no temperature", fix="give a number from 0 to about 2")


def _data(given: Answer, path: Path, placement: dict[str, str]) -> dict[str, Any]:
    return {**asdict(given), "placement": placement, "model": str(path)}


def _show(given: Answer) -> None:
    if not given.text.endswith("\n"):
        print(flush=True)
    timings = given.timings
    say(
        f"\nprompt: {timings.prompt_n} tokens, {timings.prompt_per_second:.1f} a second; "
        f"answer: {timings.predicted_n} tokens, {timings.predicted_per_second:.1f} a second"
    )
