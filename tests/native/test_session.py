"""Sessions with a real llama-server on a tiny model: asked, stopped, killed, out of memory; `run` on top of them."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynrun.cli.app import main
from dynrun.errors import UsageError
from dynrun.llamacpp.build import RECORD, installation
from dynrun.llamacpp.server import CancelledError, ServerOutOfMemoryError
from dynrun.runtime.calibration import calibration_of
from dynrun.runtime.events import Answer, Event, Finished, Ready, Restarted, Retreated, Said, Starting
from dynrun.runtime.history import Message, find_chat
from dynrun.runtime.opening import Where, open_session
from dynrun.runtime.placement import Wishes
from dynrun.runtime.sampling import Sampling
from dynrun.runtime.session import Session
from dynrun.runtime.this_machine import this_machine
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
GREEDY = Sampling(temperature=0.0, max_tokens=12)
ENDLESS = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_ctx_train=1024)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that an answer is not over before its first piece is read."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    return write_tiny_llama(path, n_embd=512, n_ff=2048, n_block=6)


def session(path: Path, n_ctx: int = 512, **more: Any) -> Session:
    return open_session(path, Where(Wishes(n_ctx=n_ctx, prompt_cache_bytes=0), **more), n_threads=1)


def ask(path: Path, *texts: str, system: str = "", sampling: Sampling = GREEDY) -> Answer:
    with session(path) as opened:
        return answer_of(opened, *texts, system=system, sampling=sampling)


def answer_of(opened: Session, *texts: str, system: str = "", sampling: Sampling = GREEDY) -> Answer:
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    *_, last = opened.ask(messages, system=system, sampling=sampling)
    assert isinstance(last, Finished)
    return last.answer


def servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "llama-server"]


def test_an_answer_comes_piece_by_piece_and_the_server_is_used_again(model: Path) -> None:
    with session(model) as opened:
        events = list(opened.ask([Message("user", "the cat")], sampling=GREEDY))
        assert [type(event) for event in events[:2]] == [Starting, Ready]
        assert isinstance(events[-1], Finished)
        first = events[-1].answer
        assert first.text == "".join(event.text for event in events if isinstance(event, Said))
        assert (first.stop, first.timings.predicted_n) == ("length", 12)
        assert first.timings.prompt_n > 5, "the prompt is put into the model's template"
        assert min(first.timings.prompt_per_second, first.timings.predicted_per_second) > 0
        (server,) = servers()
        assert answer_of(opened, "the cat").text == first.text
        assert servers() == [server]
    assert servers() == []


def test_a_conversation_is_read_on_from_where_it_was(model: Path) -> None:
    with session(model) as opened:
        first = answer_of(opened, "the cat")
        second = answer_of(opened, "the cat", first.text, "and the dog")
    assert second.timings.cache_n > first.timings.prompt_n - 4


def test_a_long_answer_teaches_the_planner(model: Path) -> None:
    with session(model) as opened:
        assert answer_of(opened, "the cat", sampling=Sampling(temperature=0.0, max_tokens=70)).timings.predicted_n == 70
    assert set(calibration_of(this_machine(measure=False))) != set()


def test_the_system_prompt_is_part_of_the_question(model: Path) -> None:
    with session(model) as opened:
        plain, told = answer_of(opened, "a"), answer_of(opened, "a", system="Be brief.")
    assert told.timings.prompt_n + told.timings.cache_n > plain.timings.prompt_n + plain.timings.cache_n


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(model: Path) -> None:
    with session(model) as opened:
        one, again, other = (
            answer_of(
                opened, "x", sampling=Sampling(temperature=2.0, top_k=0, min_p=0.0, seed=seed, max_tokens=24)
            ).text
            for seed in (1, 1, 2)
        )
    assert one == again != other


def test_a_model_without_a_template_is_given_plain_text(tmp_path: Path) -> None:
    plain = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    given = ask(plain, "xyz")
    assert given.timings.prompt_n == 3
    assert given.text


def test_a_prompt_longer_than_the_context_is_refused_and_the_session_goes_on(model: Path) -> None:
    with session(model) as opened:
        with pytest.raises(UsageError, match="does not fit the context"):
            answer_of(opened, "x" * 600)
        assert answer_of(opened, "x").text


def test_an_answer_is_stopped_and_the_next_one_is_whole(slow: Path) -> None:
    with session(slow, n_ctx=2048) as opened:
        pieces: list[Event] = []
        for event in opened.ask([Message("user", "the cat")], sampling=ENDLESS):
            pieces.append(event)
            if isinstance(event, Said):
                threading.Thread(target=opened.cancel).start()
        assert isinstance(pieces[-1], Finished)
        assert pieces[-1].answer.stop == "cancelled"
        assert 0 < pieces[-1].answer.timings.predicted_n < 1000
        assert answer_of(opened, "the cat").stop == "length"


def test_a_start_is_cancelled(slow: Path) -> None:
    with session(slow) as opened:
        events = opened.ask([Message("user", "the cat")])
        assert isinstance(next(events), Starting)
        opened.cancel()
        with pytest.raises(CancelledError):
            list(events)
        assert servers() == []


def test_a_session_that_is_left_in_mid_answer_leaves_no_server(slow: Path) -> None:
    with session(slow) as opened:
        for event in opened.ask([Message("user", "the cat")], sampling=ENDLESS):
            if isinstance(event, Said):
                break
    assert servers() == []


def test_a_server_that_is_killed_in_mid_answer_is_started_with_less_and_the_answer_begins_again(slow: Path) -> None:
    """SIGKILL is what the system sends that has no memory left."""
    with session(slow, n_ctx=2048) as opened:
        events: list[Event] = []
        for event in opened.ask([Message("user", "the cat")], sampling=ENDLESS):
            events.append(event)
            if isinstance(event, Said) and not any(isinstance(e, Restarted) for e in events):
                os.kill(servers()[0].pid, signal.SIGKILL)
            elif isinstance(event, Said):
                opened.cancel()
        again = next(i for i, event in enumerate(events) if isinstance(event, Restarted))
        assert [type(event) for event in events[again : again + 3]] == [Restarted, Retreated, Ready]
        assert opened.n_ctx == 1024
        assert isinstance(events[-1], Finished)


@pytest.fixture
def limit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Gives llama-server so many MB of address space; a server with a tiny model takes 200."""
    if sys.platform != "linux":
        pytest.skip("needs ulimit -v")
    real = installation()

    def limit(megabytes: int) -> None:
        program = tmp_path / "bin" / "llama-server"
        program.parent.mkdir()
        limited = f'ulimit -v {megabytes * 1000}\nexec "{real.program("llama-server")}" "$@"'
        program.write_text(f"#!/bin/sh\n{limited}\n")
        program.chmod(0o755)
        record = {"bin": str(program.parent), "fingerprint": "f", "backend": "cpu", "commit": real.commit}
        (tmp_path / RECORD).write_text(json.dumps(record))
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        installation.cache_clear()

    yield limit
    installation.cache_clear()


def test_what_memory_allows_is_found_and_remembered(limit_memory: Callable[[int], None], tmp_path: Path) -> None:
    # 1 KiB of KV cache a token: 1 GiB.
    wide = write_tiny_llama(tmp_path / "wide.gguf", n_ctx_train=1 << 20)
    limit_memory(400)
    with session(wide, n_ctx=1 << 20) as opened:
        events = list(opened.start())
        assert sum(isinstance(event, Retreated) for event in events) >= 2
        assert isinstance(events[-1], Ready)
        worked = opened.n_ctx
        assert 0 < worked < 1 << 20
        assert answer_of(opened, "the cat").text
    with session(wide, n_ctx=1 << 20) as opened:
        starting, ready = opened.start()
        assert isinstance(starting, Starting)
        assert starting.remembered
        assert isinstance(ready, Ready)
        assert ready.n_ctx == worked
    with session(wide, n_ctx=1 << 20, replan=True) as opened:
        starting = next(iter(opened.start()))
        assert isinstance(starting, Starting)
        assert not starting.remembered


def test_where_nothing_smaller_is_left_the_cause_is_told(slow: Path, limit_memory: Callable[[int], None]) -> None:
    """The weights alone are too many."""
    limit_memory(225)
    with session(slow, n_ctx=1024) as opened, pytest.raises(ServerOutOfMemoryError, match="memory ran out") as caught:
        list(opened.start())
    assert caught.value.exit_code == 5
    assert caught.value.last_lines
    assert servers() == []


def test_run_gives_one_json_object(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped text\n"))
    assert main(["run", str(model), "-p", "look:", "-n", "5", "--temp", "0", "--ctx", "512", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["text"] == ask(model, "look:\n\npiped text", sampling=Sampling(temperature=0.0, max_tokens=5)).text
    assert given["reasoning"] == ""
    assert given["timings"]["predicted_n"] == 5
    assert given["placement"]["verdict"] in ("ram", "gpu")
    assert given["placement"]["n_ctx"] == 512
    assert given["model"] == str(model)


def test_run_prints_the_answer_on_stdout_and_the_rest_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("xyz"))
    assert main(["run", str(plain), "-n", "8", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "\x1b" not in out + err
    assert "plain text" in err
    assert "answer: 8 tokens" in err


def test_run_goes_on_with_a_conversation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynrun.runtime.history import new_chat

    chat = new_chat(str(model), "Be brief.").said(Message("user", "the cat"), Message("assistant", "the"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["run", "--resume", "last", "-p", "more", "-n", "4", "--temp", "0", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert [m.text for m in find_chat(chat.id).messages] == ["the cat", "the", "more", text]
    assert main(["run", "--chats", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["chats"]
    assert (listed["id"], listed["messages"], listed["title"]) == (chat.id, 4, "the cat")
