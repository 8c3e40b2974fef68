"""Chat templates as llama-server renders them: every template that llama.cpp ships, on eight conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.template import ChatTemplate
from dynrun.llamacpp.server import Server
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
FOLDER = Path(__file__).resolve().parents[2] / "vendor" / "llama.cpp" / "models" / "templates"
TEMPLATES = sorted(FOLDER.glob("*.jinja"))

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Gôteborg", "days": 2}},
}
ANSWERED = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"sky": "grey"}'}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer briefly."}
CONVERSATIONS = [
    Conversation("single", "x", [user("Why is the sky blue?")]),
    Conversation("system", "x", [SYSTEM, user("Why?")]),
    Conversation("turns", "x", [user("Hi"), assistant("Hello."), user("1 < 2 & 'a'?"), assistant("Yes."), user("Ok")]),
    Conversation("unicode", "x", [SYSTEM, user("Ünïcode: 日本語 🙂\n\n```py\nprint(f'{1:>3}')\n```\n")]),
    Conversation("thoughts", "x", [user("1+1"), assistant("2", reasoning_content="One and one."), user("And 2+2?")]),
    Conversation("unthinking", "x", [user("1+1"), assistant("2"), user("And 2+2?")], thinking=False),
    Conversation(
        "tools",
        "x",
        [
            user("Weather?"),
            assistant("", tool_calls=[CALL]),
            ANSWERED,
            assistant("Grey."),
            user("Thanks"),
        ],
        tools=[WEATHER],
    ),
    Conversation(
        "agent",
        "x",
        [SYSTEM, user("Weather?"), assistant("I ask.", reasoning_content="Hm.", tool_calls=[CALL]), ANSWERED],
        tools=[WEATHER],
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_embd=64, n_ff=64, n_block=1)


@pytest.fixture
def server(path: Path, model: Path) -> Iterator[Server]:
    with Server(model, n_threads=1, n_ctx=64, chat_template=path) as running:
        yield running


def theirs(client: httpx2.Client, conversation: Conversation) -> str | None:
    """What llama-server renders; None where it refuses."""
    messages = [_over_http(message) for message in conversation.messages]
    body: dict[str, Any] = {"messages": messages, "tools": conversation.tools}
    if conversation.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": conversation.thinking}
    response = client.post("/apply-template", json=body)
    return str(response.json()["prompt"]) if response.is_success else None


def _over_http(message: dict[str, Any]) -> dict[str, Any]:
    """As the OpenAI API has it: arguments are JSON text."""
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message.get("tool_calls", [])
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


# What differs, why, and how the difference shows: both texts are given to the check.
Check = Callable[[str, str | None], bool]
WRITTEN = '{"name": "get_weather", "arguments": {"place": "Gôteborg", "days": 2}}'


def calls_kept(ours: str, theirs: str | None) -> bool:
    """The template knows no calls: llama-server loses them, we write them out as text."""
    return WRITTEN in ours and theirs is not None and "Gôteborg" not in theirs


def calling(check: Check, *templates: str) -> dict[tuple[str, str], Check]:
    """The same explanation for both conversations with calls."""
    return {(template, conversation): check for template in templates for conversation in ("tools", "agent")}


EXPLAINED: dict[tuple[str, str], Check] = {
    **calling(
        calls_kept,
        "HuggingFaceTB-SmolLM3-3B",
        "LFM2-8B-A1B",
        "LFM2.5-Instruct",
        "ibm-granite-granite-3.3-2B-Instruct",
        "llama-cpp-rwkv-world",
        "microsoft-Phi-3.5-mini-instruct",
    ),
    # It writes calls only beside a content that is none: llama-server gives "" and loses them.
    **calling(
        lambda o, t: "get_weather\n```json\n" in o and "Gôteborg" not in str(t),
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    ),
    # It tells the model how to call tools in words of its own, where the template has no place for them.
    **calling(lambda o, t: WRITTEN in o and "You can call any of the following" in str(t), "llama-cpp-deepseek-r1"),
    # Its roles must alternate: llama-server refuses, we merge.
    **calling(lambda o, t: WRITTEN in o and t is None, "google-gemma-2-2b-it"),
    # An outdated template, says llama-server, and moves the tool's answer into the assistant's turn.
    **calling(lambda o, t: "turn>tool" in o and "tool_response>" in str(t), "google-gemma-4-31B-it-interleaved"),
    # It begins a turn after a tool's answer although the template does not.
    ("google-gemma-4-31B-it", "agent"): lambda o, t: t == f"{o}<|turn>model\n",
    # It strips every message for this model.
    ("StepFun3.5-Flash", "unicode"): lambda o, t: "```\n<|im_end|>" in o and "```<|im_end|>" in str(t),
    # With thoughts it loses what the assistant said.
    ("unsloth-mistral-Devstral-Small-2507", "thoughts"): lambda o, t: "[/INST]2<" in o and "[/INST]<" in str(t),
    ("unsloth-mistral-Devstral-Small-2507", "agent"): lambda o, t: "I ask.[TOOL" in o and "[/INST][TOOL" in str(t),
    # The template calls thoughts `reasoning`, which llama-server does not give.
    ("upstage-Solar-Open-100B", "agent"): lambda o, t: "<|think|>Hm." in o and "Hm." not in str(t),
}


def rendered_by_both(server: Server, source: str) -> list[tuple[str, str, str | None]]:
    """Each conversation's name, our text and llama-server's, all of one day: it tells the template today's date."""
    while True:
        today = datetime.now().astimezone()
        with server.client() as client, ChatTemplate(source, "<|im_start|>", "<|im_end|>", today=today) as template:
            found = [
                (one.id, template.render(one, add_generation_prompt=True), theirs(client, one)) for one in CONVERSATIONS
            ]
        if datetime.now().astimezone().date() == today.date():
            return found


@pytest.mark.skipif(not TEMPLATES, reason="vendor/llama.cpp/models/templates is not there")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_renders_as_in_llama_server(path: Path, server: Server) -> None:
    for name, text, other in rendered_by_both(server, path.read_text(encoding="utf-8")):
        explained = EXPLAINED.get((path.stem, name))
        if explained is None:
            assert text == other, name
        else:
            assert text != other, f"{name} is equal: no explanation is needed"
            assert explained(text, other), name
