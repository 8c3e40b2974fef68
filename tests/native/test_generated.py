"""The model's own answers as calibration text: a tiny model is asked, interrupted, asked again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynrun.calibration.dataset import builtin
from dynrun.calibration.generated import (
    GenerationSettings,
    Prompt,
    Transcript,
    generate,
    read_transcript,
    without_loop,
)
from dynrun.config import Config
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.llamacpp.server import ServerDiedError, ServerOutOfMemoryError
from dynrun.models import open_reference
from dynrun.paths import logs_dir, stages_dir
from tests.native.test_session import servers
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native

PROMPTS = (
    Prompt("why", "science", "en", "Why is the sky blue?"),
    Prompt("wer", "history", "de", "Wer war Emmy Noether?", system="Antworte kurz."),
    Prompt("how", "code", "en", "How do I sort a list?", thinking=False),
)
SETTINGS = GenerationSettings(n_parallel=3, max_answer_tokens=24, n_ctx=256)
# A process that kills itself after four answers, once it has said which servers it has.
CHILD = """
import os, signal, sys
from pathlib import Path
from tests.native.test_generated import ask, journals, lines
from tests.native.test_session import servers
def until_killed(*_):
    if len(lines(next(journals()))) >= 4:
        print(*(server.pid for server in servers()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
ask(Path(sys.argv[1]), n_tokens=1000, progress=until_killed)
"""


def ask(model: Path, *, n_tokens: int = 300, **changes: Any) -> Transcript:
    given = {"settings": SETTINGS, "prompts": PROMPTS, "progress": lambda *_: None, **changes}
    return generate(open_reference(str(model)), n_tokens=n_tokens, config=Config(threads=1), **given)


def lines(path: Path) -> list[bytes]:
    """The whole lines of a file."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slow enough to be interrupted."""
    return write_tiny_llama(tmp_path_factory.mktemp("slow") / "slow.gguf", n_embd=1024, n_ff=4096, n_block=4)


def journals() -> Iterator[Path]:
    """Answers of runs that have not come to their end."""
    return stages_dir().glob("generated/*/answers.jsonl")


def test_rounds_go_on_until_there_are_enough_tokens(model: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    made = ask(model, n_tokens=900, progress=lambda *args: seen.append(args))
    said = read_transcript(made.path)
    rounds = len(said) / len(PROMPTS)
    assert 900 <= made.n_tokens < 1000
    assert rounds > 2
    assert len(said) == made.n_answers == len({c.id for c in said})
    by_id = {c.id: c for c in said}
    first, again = by_id["self-wer-0"], by_id["self-wer-1"]
    assert first.document == again.document == "wer"
    assert (first.kind, first.language) == ("history", "de")
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant"]
    assert first.messages[:2] == again.messages[:2]
    assert first.messages[2] != again.messages[2], "each round has seeds of its own"
    assert by_id["self-how-0"].thinking is False
    records = [json.loads(line) for line in lines(made.path)]
    assert records == sorted(records, key=lambda r: (r["round"], [p.id for p in PROMPTS].index(r["document"])))
    assert sum(record["n_tokens"] for record in records) == made.n_tokens
    assert seen[-1][:2] == (900, 900)
    assert "tokens/s" in seen[-1][2]


def test_a_transcript_is_found_again_without_a_server(model: Path) -> None:
    made = ask(model)
    logs = len(list(logs_dir().glob("*llama-server*")))
    again = ask(model, settings=GenerationSettings(n_parallel=1, max_answer_tokens=24, n_ctx=256))
    assert (again.sha256, again.path, again.n_answers) == (made.sha256, made.path, made.n_answers)
    assert again.outcome.cached
    assert len(list(logs_dir().glob("*llama-server*"))) == logs
    assert ask(model, n_tokens=301).path != made.path


def test_a_killed_run_goes_on_where_it_was(slow_model: Path) -> None:
    argv = [sys.executable, "-c", CHILD, str(slow_model)]
    killed = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pids = set(map(int, killed.stdout.split()))
    assert pids
    _, alive = psutil.wait_procs([one for one in psutil.process_iter() if one.pid in pids], timeout=30)
    assert not alive
    (journal,) = journals()
    before = lines(journal)
    made = ask(slow_model, n_tokens=1000)
    assert set(before) <= set(lines(made.path))
    assert made.n_answers > len(before)
    assert not journal.exists()


def test_a_server_that_dies_amid_answers_is_named_with_its_cause_and_the_answers_are_kept(slow_model: Path) -> None:
    def kill(*_: Any) -> None:
        for server in servers():
            server.kill()

    with pytest.raises(ServerOutOfMemoryError, match=r"died: .*SIGKILL") as caught:
        ask(slow_model, n_tokens=400, progress=kill)
    assert "\n" not in str(caught.value)
    kept = lines(next(journals()))
    assert kept
    assert set(kept) <= set(lines(ask(slow_model, n_tokens=400).path))


def test_a_model_without_a_template_goes_on_after_the_bare_prompt(tmp_path: Path) -> None:
    plain = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    made = ask(plain)
    said = {c.id: c for c in read_transcript(made.path)}
    assert all(not c.messages for c in said.values())
    text = said["self-wer-0"].text
    assert text.startswith("Antworte kurz.\n\nWer war Emmy Noether?")
    assert len(text) > len("Antworte kurz.\n\nWer war Emmy Noether?")


def test_another_template_makes_another_transcript(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    made = ask(model, chat_template=template)
    assert read_transcript(made.path)
    template.write_text("{% for m in messages %}")
    # On a busy machine llama-server's last words may be lost with its logger's thread.
    with pytest.raises(ServerDiedError, match=r"the chat template is of no use: (Unexpected|no reason given)"):
        ask(model, chat_template=template)
    with pytest.raises(NotFoundError, match=r"nothing\.jinja is no file"):
        ask(model, chat_template=tmp_path / "nothing.jinja")


def test_thoughts_stand_beside_the_answer(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    made = ask(model, chat_template=template)
    replies = [c.messages[-1] for c in read_transcript(made.path)]
    assert all(reply["reasoning_content"].strip() for reply in replies)


@pytest.mark.parametrize("damage", ["torn", "garbage", "unfinished"])
def test_a_damaged_transcript_is_mended_and_whole_lines_are_kept(model: Path, damage: str) -> None:
    made = ask(model)
    whole, manifest = made.path.read_bytes(), made.path.with_name("manifest.json")
    if damage == "torn":
        made.path.write_bytes(whole[: len(whole) * 2 // 3])
        kept = set(lines(made.path))
    elif damage == "garbage":
        # A journal that a power cut left behind; and answers of nobody.
        made.path.unlink()
        stray = b'[]\n{"round": 0}\n{"round": 0, "document": "who", "n_tokens": 10000}\n'
        half = whole[: len(whole) // 2]
        made.path.with_name("answers.jsonl").write_bytes(b"\0" * 99 + b"\n" + stray + half)
        kept = set(half.splitlines(keepends=True)[:-1])
    else:
        manifest.unlink()
        kept = set(lines(made.path))
    assert kept
    again = ask(model)
    assert not again.outcome.cached
    assert kept <= set(lines(again.path))
    assert again.n_tokens >= 300
    assert again.n_answers == len(read_transcript(again.path))
    assert manifest.is_file()
    if damage == "unfinished":
        assert again.sha256 == made.sha256


def test_a_prompt_that_does_not_fit_is_counted_and_left_out(model: Path) -> None:
    long = Prompt("long", "science", "en", "x" * 600)
    made = ask(model, prompts=(long, *PROMPTS))
    assert made.n_dropped >= 1
    assert all(c.document != "long" for c in read_transcript(made.path))
    with pytest.raises(DynrunError, match="answered none of the last"):
        ask(model, prompts=(long,))


def test_nothing_to_do_is_refused(model: Path) -> None:
    for changes in ({"n_tokens": 0}, {"prompts": ()}, {"settings": GenerationSettings(n_parallel=0)}):
        with pytest.raises(UsageError, match="at least one token"):
            ask(model, **changes)


def test_a_transcript_of_something_else_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    path.write_text('{"id": "x"}\n')
    with pytest.raises(DynrunError, match="line 1, is no answer"):
        read_transcript(path)


def test_an_answer_is_cut_where_it_only_repeats_itself() -> None:
    sense = "The tide rises twice a day because the Moon pulls on the near side of the Earth more than on the far one."
    loop = "I'm not a web developer, but I can assist you with that.\n\n"
    cut = without_loop(sense + loop * 40)
    assert cut.startswith(sense)
    assert cut.count(loop) <= 4
    numbered = without_loop(sense + "".join(f"{i}. Yes, and yes, and yes, and yes.\n" for i in range(100)))
    assert len(numbered) < 600
    assert without_loop("é" * 1000) == ""


def test_sense_is_not_cut() -> None:
    answers = [m["content"] for c in builtin().conversations for m in c.messages if m.get("content")]
    assert len(answers) > 100
    assert [text for text in answers if without_loop(text) != text] == []
    table = "".join(f"| {name} | {i * 37 % 101} | {i * i} |\n" for i, name in enumerate(sys.stdlib_module_names))
    assert without_loop(table[:2000]) == table[:2000]
    assert without_loop("") == ""
