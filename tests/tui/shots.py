"""Every screen of the app as an SVG, to be looked at; nothing of the user's is read.

.venv/bin/python -m tests.tui.shots FOLDER [--size 80x24] [--light] [--only chat,make]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from textual.widgets import Input

from dynrun.paths import models_dir
from dynrun.runtime.bench_history import keep
from dynrun.tui.making import StageBegan, StageMoved, UnitProbed
from dynrun.tui.messages import JobDone, Visit
from dynrun.tui.order import CurveResult, Measured, Result
from dynrun.tui.screens.make import MAKE
from dynrun.tui.settings import TuiSettings
from dynrun.tui.themes import DARK, LIGHT
from tests.hub_server import serving_here
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, running_app, shows, type_text, wait_until
from tests.tui.scripted_server import DIE, Piece, Scripted, scripted_server
from tests.tui.test_bench import result
from tests.tui.test_plan import DESK

_THOUGHT = "The user wants the first primes. Trial division by the primes found so far is short and fast enough."
_ANSWER = dedent("""\
    The first primes by **trial division**, each candidate by the primes below its square root:

    ```python
    def primes(n: int) -> list[int]:
        found: list[int] = []
        candidate = 2
        while len(found) < n:
            if all(candidate % p for p in found if p * p <= candidate):
                found.append(candidate)
            candidate += 1
        return found
    ```

    | n  | primes(n)[-1] | time   |
    |----|---------------|--------|
    | 10 | 29            | 6 µs   |
    | 1k | 7919          | 2.1 ms |

    - `all` stops at the first divisor;
    - for millions, use a *sieve*.
    """)


@dataclass(frozen=True)
class Studio:
    """``shoot`` writes what the app shows; ``model`` is served by a script, ``machine`` has a GPU."""

    folder: Path
    name: str
    size: tuple[int, int]
    settings: TuiSettings
    model: Path
    machine: Path

    async def shoot(self, pilot: AppPilot, screen: str) -> None:
        await wait_until(pilot, lambda: not pilot.app.screen._layout_required, "the layout")
        path = self.folder / f"{screen}-{self.name}.svg"
        path.write_text(pilot.app.export_screenshot(title=screen), encoding="utf-8")


async def models(studio: Studio) -> None:
    async with running_app(studio.size, settings=studio.settings) as pilot:
        await shows(pilot, "demo-moe")
        await pilot.press("down", "down")
        await shows(pilot, "architecture  llama")
        await studio.shoot(pilot, "models")
        for key, name in (("ctrl+p", "palette"), ("f1", "help"), ("ctrl+o", "jump")):
            await pilot.press(key)
            await wait_until(pilot, lambda: pilot.app.screen.is_modal, name)
            await studio.shoot(pilot, name)
            await pilot.press("escape")
            await wait_until(pilot, lambda: not pilot.app.screen.is_modal, "the way back")
        await pilot.press("slash")
        await type_text(pilot, "tiny")
        await pilot.press("enter")
        await shows(pilot, "o/tiny-GGUF")
        await studio.shoot(pilot, "models-hits")
        await pilot.press("enter")
        await shows(pilot, "F16")
        await studio.shoot(pilot, "models-quants")
        await pilot.press("down", "d")
        await shows(pilot, "━ done")
        await studio.shoot(pilot, "models-download")


async def plan(studio: Studio) -> None:
    async with running_app(studio.size, visit=Visit("plan"), settings=studio.settings) as pilot:
        await shows(pilot, "Press o")
        await studio.shoot(pilot, "plan-empty")
        room = pilot.app.screen
        room._plan_for(studio.machine)  # type: ignore[attr-defined]
        room.open(str(studio.model))  # type: ignore[attr-defined]
        await shows(pilot, "tokens/s")
        await wait_until(pilot, lambda: pilot.app.screen.query_one("#map").size.height, "the map")
        await studio.shoot(pilot, "plan")


async def chat(studio: Studio) -> None:
    pieces: list[Piece] = [("reasoning_content", _THOUGHT), *_ANSWER.splitlines(keepends=True)]
    script = Scripted([pieces, ["The largest known prime is 2", (DIE, 0)]])
    visit = Visit("chat", model=str(studio.model))
    with scripted_server(studio.model, script):
        async with running_app(studio.size, visit=visit, settings=studio.settings) as pilot:
            await shows(pilot, "of 4k")
            await studio.shoot(pilot, "chat-empty")
            await type_text(pilot, "Write the first n primes in Python")
            await pilot.press("enter")
            await shows(pilot, "a second")
            await pilot.press("up", "t")
            await shows(pilot, _THOUGHT[:20])
            await studio.shoot(pilot, "chat")
            await pilot.press("escape", "ctrl+l")
            await shows(pilot, "now Write")
            await studio.shoot(pilot, "chat-list")
            await pilot.press("ctrl+l", "ctrl+t")
            await studio.shoot(pilot, "chat-settings")
            await pilot.press("ctrl+t")
            await type_text(pilot, "And the largest?")
            await pilot.press("enter")
            await shows(pilot, "Nothing is lost")
            await studio.shoot(pilot, "chat-card")


async def make(studio: Studio) -> None:
    async with running_app(studio.size, visit=Visit("make"), settings=studio.settings) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query("#reference"), "the room")
        one(pilot, "#reference", Input).value = "demo"
        await pilot.pause()
        await studio.shoot(pilot, "make")
        room = pilot.app.screen
        for name, detail in (("reference", "demo-F16, 270.8 MB"), ("imatrix", "32768 tokens of builtin")):
            room.post_message(StageBegan(name, detail))
        room.post_message(StageBegan("sensitivity", "210 tensors"))
        kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        for layer in range(30):
            for n, kind in enumerate(kinds):
                room.post_message(UnitProbed(f"blk.{layer}.{kind}.weight", "IQ3_S", 0.01, 1e-4 * (1 + layer * n % 37)))
        room.post_message(StageMoved(127, 210, "blk.18.ffn_gate.weight IQ3_S: error 0.013350, KLD 1.8e-03"))
        await shows(pilot, "60%")
        await studio.shoot(pilot, "make-running")
        room.post_message(JobDone(MAKE, "curve", _curve()))
        await shows(pilot, "The curve is on the slider")
        await studio.shoot(pilot, "make-curve")
        room.post_message(JobDone(MAKE, "make", _made()))
        await shows(pilot, "of the stock preset's KLD")
        await studio.shoot(pilot, "make-result")


def _curve() -> CurveResult:
    presets = {"Q2_K": 88_202_112, "Q3_K_M": 93_510_528, "Q4_K_M": 105_454_432, "Q6_K": 138_380_160}
    rows = [(n, 0.0151 * (105e6 / n) ** 6) for n in range(60_000_000, 150_000_000, 1_500_000)]
    return CurveResult(tuple(rows), tuple(presets.items()))


def _made() -> Result:
    """Sizes as of a real one."""
    ours = Measured("dynrun Q4_K_M", 105_453_312, 6.26, 0.0144, (0.0139, 0.0149), 0.092, 0.943, 21.87)
    stock = Measured("stock Q4_K_M", 105_454_432, 6.26, 0.0213, (0.0206, 0.0221), 0.141, 0.929, 22.03)
    file = models_dir() / "made" / "demo-Q4_K_M.gguf"
    return Result(str(file), str(file.with_suffix(".html")), (ours, stock), 0.0151, (0.676, 0.651, 0.702))


async def bench(studio: Studio) -> None:
    keep(result(1))
    keep(result(2, faster=1.2))
    async with running_app(studio.size, visit=Visit("bench"), settings=studio.settings) as pilot:
        await shows(pilot, "2026-11-02 12:00")
        await pilot.press("enter")
        await shows(pilot, "486.0")
        await studio.shoot(pilot, "bench")
        await pilot.press("down", "v")
        await shows(pilot, "+20.0%")
        await studio.shoot(pilot, "bench-changes")


SCENES: dict[str, Callable[[Studio], Awaitable[None]]] = {
    "models": models,
    "plan": plan,
    "chat": chat,
    "make": make,
    "bench": bench,
}


async def shoot(folder: Path, size: tuple[int, int], light: bool, scenes: list[str]) -> None:
    """Each scene in a home of its own."""
    name = f"{size[0]}x{size[1]}{'-light' if light else ''}"
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        for variable in ("DYNRUN_CACHE", "DYNRUN_DATA", "DYNRUN_CONFIG"):
            patch.setenv(variable, str(Path(home) / variable.lower()))
        made = models_dir() / "made"
        made.mkdir(parents=True)
        model = write_tiny_llama(made / "tiny.gguf", n_block=6, n_expert=4, n_ctx_train=8192)
        machine = Path(home) / "desk.toml"
        machine.write_text(DESK.format(gib=8), encoding="utf-8")
        settings = TuiSettings(theme=(LIGHT if light else DARK).name)
        studio = Studio(folder, name, size, settings, model, machine)
        with serving_here(patch, Path(home)) as hub:
            hub.models["o/tiny-GGUF"] = {"tiny-F16.gguf": model.read_bytes(), "README.md": b"# tiny"}
            for scene in scenes:
                await SCENES[scene](studio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="80x24")
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--only", default=",".join(SCENES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    width, _, height = options.size.partition("x")
    asyncio.run(shoot(options.folder, (int(width), int(height)), options.light, options.only.split(",")))


if __name__ == "__main__":
    main()
