"""`dynrun demo`: make a quant of the built-in model, prove it, and ask it something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import emit

_PROMPT = "Explain in two sentences why the sky is blue."


def demo(
    quant: Annotated[str, typer.Option("--quant", help="The size of this stock preset.")] = "Q3_K_M",
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask the new file.")] = _PROMPT,
    as_json: options.AsJson = False,
) -> None:
    """Make, prove and run a quant of the built-in model (SmolLM2-135M-Instruct).

    Example: dynrun demo --quant Q2_K
    """
    from dynrun.cli.make import run_make, show, to_json

    made = run_make("demo", options.target(quant, None, None), options.settings())
    if as_json:
        text = _ask(made.file, prompt, lambda _: None)
        emit(as_json, {**to_json(made), "prompt": prompt, "text": text}, lambda: None)
        return
    show(made)
    print(f"\n> {prompt}\n")
    _ask(made.file, prompt, lambda text: print(text, end="", flush=True))
    print()


def _ask(file: Path, prompt: str, on_text: Callable[[str], None]) -> str:
    """The greedy answer of ``file``."""
    from dynrun.config import load_config
    from dynrun.runtime.opening import ask_once
    from dynrun.runtime.sampling import Sampling

    config, sampling = load_config(), Sampling(temperature=0.0, seed=1, max_tokens=160)
    threads, layers = config.n_threads, config.n_gpu_layers
    said = ask_once(file, prompt, n_threads=threads, n_gpu_layers=layers, sampling=sampling, on_text=on_text)
    return said.text
