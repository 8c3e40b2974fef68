"""`dynrun demo`: make a quant of the built-in model, prove it, and ask it something."""

from __future__ import annotations

from typing import Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import say

_PROMPT = "Explain in two sentences why the sky is blue."


def demo(
    quant: Annotated[str, typer.Option("--quant", help="The size of this stock preset.")] = "Q3_K_M",
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask the new file.")] = _PROMPT,
) -> None:
    """Make, prove and run a quant of the built-in model (SmolLM2-135M-Instruct).

    Example: dynrun demo --quant Q2_K
    """
    from dynrun.cli.make import run_make, show
    from dynrun.config import load_config
    from dynrun.runtime.chat import answer

    made = run_make("demo", options.target(quant, None, None), options.settings("builtin", None, None, None, None))
    show(made)
    say("")
    print(f"\n> {prompt}\n")
    answer(
        made.file,
        prompt,
        system=None,
        max_tokens=160,
        temperature=0.0,
        seed=1,
        n_threads=load_config().n_threads,
        n_ctx=2048,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print()
