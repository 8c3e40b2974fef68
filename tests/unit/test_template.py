"""Chat templates: rendered in a sandbox, the simpler form where a template refuses, plain text without one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGUFWriter

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.template import ChatTemplate, read_template, template_of
from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.header import Header, read_header

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}"
)
TALK = Conversation(
    "t",
    "everyday",
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ],
)


def test_a_conversation_is_rendered_by_the_models_template() -> None:
    with ChatTemplate(CHATML) as template:
        text = template.render(TALK)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )


def test_without_a_template_the_text_is_plain() -> None:
    assert ChatTemplate(None).render(TALK) == "Be brief.\n\nHi\n\nHello.\n"


def test_a_template_that_refuses_system_roles_gets_the_simpler_form() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with ChatTemplate(strict) as template:
        assert "<|im_start|>user\nBe brief.\nHi<|im_end|>" in template.render(TALK)


def test_a_template_that_refuses_everything_is_an_error_that_names_the_conversation() -> None:
    with (
        ChatTemplate("{{ raise_exception('never') }}") as template,
        pytest.raises(DynrunError, match="conversation t: never"),
    ):
        template.render(TALK)


def test_bos_and_dates_are_the_same_every_day() -> None:
    with ChatTemplate("{{ bos_token }}{{ strftime_now('%Y') }}", bos="<s>") as template:
        assert template.render(TALK) == "<s>2026"


def test_tool_calls_are_written_out_for_templates_that_know_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = Conversation(
        "c", "tools", [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    with ChatTemplate(CHATML) as template:
        assert '{"name": "add", "arguments": {"a": 1}}' in template.render(talk)


def test_json_in_templates_is_not_escaped_for_html() -> None:
    talk = Conversation("j", "x", [{"role": "user", "content": "a < b & c"}])
    with ChatTemplate("{{ messages[0]['content'] | tojson }}") as template:
        assert template.render(talk) == '"a < b & c"'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'].system('id') }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_cannot_reach_files_or_internals(source: str) -> None:
    with ChatTemplate("x" + source) as template, pytest.raises(DynrunError, match=r"the chat template \(given\) fails"):
        template.render(TALK)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after 1 s"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than 8 million characters"),
        ("{{ 'x' * 99999999999 }}", "more memory than a template may have"),
        (
            "{% set x = namespace(v='xxxxxxxx') %}{% for a in range(99) %}{% set x.v = x.v + x.v %}{% endfor %}",
            "memory",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('a\n\n\x1b[2Jb' * 9999) }}", r"fails on conversation t: a \[2Jba"),
        ("{% if true %}" * 200 + "x" + "{% endif %}" * 200, "not valid Jinja: IndentationError"),
    ],
)
def test_a_hostile_template_ends_in_one_line(source: str, reason: str) -> None:
    # Every simpler form of the conversation is tried too.
    with ChatTemplate(source, deadline_s=1.0 if "1 s" in reason else 30.0) as template:
        with pytest.raises(DynrunError, match=reason) as raised:
            template.render(TALK)
        assert "\n" not in str(raised.value)


def test_after_a_kill_the_next_rendering_has_a_new_child() -> None:
    source = (
        "{% if messages|length > 2 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with ChatTemplate(source + "{% endif %}" + CHATML, deadline_s=1.0) as template:
        long = Conversation("long", "x", [*TALK.messages, *TALK.messages])
        with pytest.raises(DynrunError, match="not done after"):
            template.render(long)
        assert "Hi<|im_end|>" in template.render(Conversation("t", "x", TALK.messages[1:]))


def test_one_child_renders_many_conversations() -> None:
    with ChatTemplate(CHATML) as template:
        texts = {template.render(Conversation(str(i), "x", [{"role": "user", "content": str(i)}])) for i in range(300)}
        pids = {template._child._process.pid for _ in range(2)}  # type: ignore[union-attr]
    assert len(texts) == 300
    assert len(pids) == 1


def test_the_child_knows_nothing_of_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with ChatTemplate("x") as template:
        template.render(TALK)
        environment = Path(f"/proc/{template._child._process.pid}/environ")  # type: ignore[union-attr]
        if not environment.exists():
            pytest.skip("this system has no /proc")
        assert b"secret" not in environment.read_bytes()


THINKING = Conversation(
    "t",
    "x",
    [{"role": "user", "content": "1+1"}, {"role": "assistant", "reasoning_content": "one, two", "content": "2"}],
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[1].reasoning_content }}|{{ messages[1].content }}", "one, two|2"),
        ("{{ messages[1].content }}{# <think> #}", "<think>\none, two\n</think>\n\n2"),
        ("{{ messages[1].content }}", "2"),
    ],
)
def test_thoughts_stand_where_the_template_has_them(source: str, text: str) -> None:
    with ChatTemplate(source) as template:
        assert template.render(THINKING) == text


@pytest.mark.parametrize(("thinking", "text"), [(True, "on"), (False, "off"), (None, "on")])
def test_thinking_is_on_unless_the_conversation_says_otherwise_as_in_llama_server(
    thinking: bool | None, text: str
) -> None:
    source = (
        "{% if enable_thinking is not defined %}unset{% elif enable_thinking %}on{% else %}off{% endif %}{# <think> #}"
    )
    with ChatTemplate(source) as template:
        assert template.render(Conversation("t", "x", TALK.messages, thinking=thinking)) == text


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": "ö"}}}
CALLING = Conversation(
    "c", "tools", [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
)


def test_calls_of_a_template_that_wants_no_content_beside_them_come_after_what_was_said() -> None:
    source = (
        "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}<{{ c.function.arguments }}>"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    said = Conversation("c", "x", [{"role": "assistant", "content": "I add.", "tool_calls": [CALL]}])
    with ChatTemplate(source) as template:
        assert template.render(said) == 'I add.<{"a": "ö"}>'


def test_words_give_way_to_thoughts_where_a_template_takes_one_of_them_beside_a_call() -> None:
    source = (
        "{% for m in messages %}{% if m.content and m.thinking and m.tool_calls %}{{ raise_exception('not both') }}"
        "{% endif %}{{ m.thinking }}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    message = {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": [CALL]}
    with ChatTemplate(source) as template:
        assert template.render(Conversation("c", "x", [message])) == 'Hm.{"a": "ö"}'


def test_no_content_is_an_empty_one() -> None:
    with ChatTemplate("[{{ messages[0].content }}]") as template:
        assert template.render(Conversation("c", "x", [{"role": "assistant", "content": None}])) == "[]"


@pytest.mark.parametrize("printed", ["arguments | tojson", "arguments"])
def test_arguments_are_json_whether_a_template_wants_them_as_object_or_as_text(printed: str) -> None:
    source = "{% for c in messages[1].tool_calls %}{{ c.function." + printed + " }}{% endfor %}"
    with ChatTemplate(source) as template:
        assert template.render(CALLING) == '{"a": "ö"}'


def test_a_template_for_tools_is_used_for_conversations_with_tools() -> None:
    with ChatTemplate("plain", tool_source="tools {{ tools|length }}") as template:
        assert template.render(TALK) == "plain"
        assert template.render(Conversation("t", "x", TALK.messages, tools=[{"type": "function"}])) == "tools 1"


def test_plain_text_is_no_conversation() -> None:
    with ChatTemplate(CHATML) as template:
        assert template.render(Conversation("t", "text", [], text="= Title =\n")) == "= Title =\n"


def header(tmp_path: Path, *, default: str | None, tool_use: str | None) -> Header:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in {"tokenizer.chat_template": default, "tokenizer.chat_template.tool_use": tool_use}.items():
        if value is not None:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_header(path)


@pytest.mark.parametrize(
    ("default", "tool_use", "origin", "source"),
    [
        ("a", None, "tokenizer.chat_template of m.gguf", "a"),
        ("a", "b", "tokenizer.chat_template of m.gguf, tokenizer.chat_template.tool_use with tools", "a"),
        (None, "b", "tokenizer.chat_template.tool_use of m.gguf", "b"),
        (None, None, "none: plain text", None),
    ],
)
def test_where_a_template_came_from_is_told(
    tmp_path: Path, default: str | None, tool_use: str | None, origin: str, source: str | None
) -> None:
    found = template_of(header(tmp_path, default=default, tool_use=tool_use), "", "")
    assert (found.origin, found.source) == (origin, source)


def test_a_file_replaces_the_models_template(tmp_path: Path) -> None:
    file = tmp_path / "f.jinja"
    file.write_text("mine", encoding="utf-8")
    with template_of(header(tmp_path, default="a", tool_use="b"), "", "", file) as found:
        assert found.origin == f"--chat-template {file}"
        assert found.render(CALLING) == "mine"


@pytest.mark.parametrize(("content", "reason"), [(b" \n", "is empty"), (b"\xff", "cannot be read")])
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "f.jinja"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read_template(file)


@pytest.mark.skipif(not Path("/proc").exists(), reason="this system has no /proc")
def test_the_child_ends_with_its_parent() -> None:
    program = (
        "from dynrun.calibration.conversation import Conversation\n"
        "from dynrun.calibration.template import *\n"
        "loops = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'\n"
        "one = ChatTemplate('x{% if messages %}' + loops + '{% endif %}', deadline_s=60)\n"
        "one.render(Conversation('a', 'x', []))\n"
        "print(one._child._process.pid, flush=True)\n"
        "one.render(Conversation('a', 'x', [{'role': 'user', 'content': 'x'}]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert child.exists()
        parent.kill()
    for _ in range(200):
        if not child.exists() or ") Z" in (child / "stat").read_text(encoding="ascii"):
            return
        time.sleep(0.05)
    pytest.fail("it goes on without its parent")


def test_what_marks_generated_text_is_left_out() -> None:
    with ChatTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}") as template:
        assert template.render(TALK) == "Be brief."


def test_broken_jinja_is_one_line() -> None:
    with ChatTemplate("{% for %}") as template, pytest.raises(DynrunError, match="not valid Jinja"):
        template.render(TALK)
