"""What an answer looks like in a terminal: thoughts folded or shown, no escape sequences of the model's."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from dynrun.cli.chat import answered, stats
from dynrun.runtime.events import Answer, Event, Finished, Restarted, Said, Thought, Timings

ANSWER = Answer(
    "Hello", "Hm.", Timings(prompt_n=5, prompt_per_second=50, predicted_n=2, predicted_per_second=10, cache_n=3)
)


class Stoppable:
    """As much of a session as printing needs."""

    stopped = 0

    def cancel(self) -> None:
        self.stopped += 1


def show(events: list[Event], **how: bool) -> Answer:
    session: Any = Stoppable()
    return answered(iter(events), session, lambda _: None, **{"quiet": False, "show_thinking": False, **how})


EVENTS: list[Event] = [Thought("Hm"), Thought("."), Said("Hel\x1b[2J"), Said("lo"), Finished(ANSWER)]


def test_thoughts_are_folded_to_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(EVENTS) == ANSWER
    out, err = capsys.readouterr()
    assert out == "Hel[2Jlo\n"
    assert "thought for 0.0 s (2 tokens)" in err
    assert "Hm" not in err


def test_thoughts_are_shown_apart_from_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    show(EVENTS, show_thinking=True)
    out, err = capsys.readouterr()
    assert out == "Hel[2Jlo\n"
    assert err.startswith("Hm.")
    assert "\x1b" not in err, "no colours off a terminal"


def test_a_quiet_answer_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show([*EVENTS[:3], Restarted(), *EVENTS[2:]], quiet=True)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_stops_the_answer_and_a_second_one_interrupts() -> None:
    session: Any = Stoppable()

    def events(times: int) -> Iterator[Event]:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        yield Finished(ANSWER)

    before = signal.getsignal(signal.SIGINT)
    assert answered(events(1), session, lambda _: None, quiet=True, show_thinking=False) == ANSWER
    assert session.stopped == 1
    with pytest.raises(KeyboardInterrupt):
        answered(events(2), session, lambda _: None, quiet=True, show_thinking=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_line_of_numbers_says_how_an_answer_ended() -> None:
    assert stats(ANSWER) == "prompt: 5 tokens (3 more were known), 50.0 a second; answer: 2 tokens, 10.0 a second"
    assert stats(Answer("", "", Timings(), "cancelled")).startswith("stopped; prompt: 0 tokens")
