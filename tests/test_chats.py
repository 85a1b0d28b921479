"""Chats: what the template writes is what the model gets, and what the assistant says in it is what counts."""

import json
import re
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from diffsensor.errors import ProbeError
from diffsensor.probes import ProbeSet
from diffsensor.probes.tokenizing import marks_of
from tiny_tokenizers import Letters, bpe

CHATML = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are able.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Refuses system messages, knows no generation prompt, and has no header for the assistant.
INST = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content + '</s>' }}{%- endif %}
{%- endfor %}"""

# Of all answers only the last one begins with what the model thought, and its prompt says that it thought nothing.
THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last and '</think>' not in message.content %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if loop.last %}{{- message.content }}
    {%- else %}{{- message.content.split('</think>')[-1].lstrip('\\n') }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""

# The generation prompt is the header alone, and what the answer begins with is the template's own: it is counted.
EMPTY_THOUGHT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|><|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# No special tokens, and the generation prompt is always there, asked for or not.
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "

MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "</s>",
)

ONE = [("user", "how far is the moon?"), ("assistant", "very far indeed")]
SYSTEM = [("system", "the garden"), *ONE]
THREE = [*ONE, ("user", "far"), ("assistant", "far"), ("user", "far"), ("assistant", " the answer: far ")]


def without_marks(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def chat_tokenizer(template: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = bpe(marks=MARKS, **kwargs)
    tokenizer.chat_template = template
    return tokenizer


def chat(turns: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def read(tmp_path: Path, tokenizer: Any, *records: dict[str, Any], max_length: int = 500) -> ProbeSet:
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return ProbeSet.from_jsonl(path, tokenizer, max_length)


def answers(probes: ProbeSet, probe: int = 0) -> list[str]:
    """What is counted, run by run."""
    plan = probes.plan(packed=False)
    places = plan.offset[plan.probe == probe].tolist()
    tokens = plan.target[plan.probe == probe].tolist()
    runs: list[list[int]] = []
    for number, (place, token) in enumerate(zip(places, tokens, strict=True)):
        if number == 0 or place != places[number - 1] + 1:
            runs.append([])
        runs[-1].append(token)
    return [probes.decode(run) for run in runs]


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML, ONE, ["very far indeed<|im_end|>\n"]),
        (CHATML, SYSTEM, ["very far indeed<|im_end|>\n"]),
        (CHATML, THREE, ["very far indeed<|im_end|>\n", "far<|im_end|>\n", " the answer: far <|im_end|>\n"]),
        (LLAMA_3, ONE, ["very far indeed<|eot_id|>"]),
        (LLAMA_3, SYSTEM, ["very far indeed<|eot_id|>"]),
        (LLAMA_3, THREE, ["very far indeed<|eot_id|>", "far<|eot_id|>", "the answer: far<|eot_id|>"]),
        (INST, ONE, [" very far indeed</s>"]),
        (INST, THREE, [" very far indeed</s>", " far</s>", "  the answer: far </s>"]),
        (THINKING, ONE, ["very far indeed<|im_end|>\n"]),
        (THINKING, THREE, ["very far indeed<|im_end|>\n", "far<|im_end|>\n", " the answer: far <|im_end|>\n"]),
        (
            THINKING,
            [("user", "far"), ("assistant", "<think>\nthe moon\n</think>\n\nfar")],
            ["the moon\n</think>\n\nfar<|im_end|>\n"],
        ),
        (EMPTY_THOUGHT, ONE, ["<think>\n\n</think>\n\nvery far indeed<|im_end|><|eot_id|>"]),
        (PLAIN, ONE, [" very far indeed"]),
        (PLAIN, THREE, [" very far indeed", " far", " the answer: far "]),
    ],
)
def test_what_the_assistant_says_is_counted_in_every_turn_with_its_end(
    tmp_path: Path, template: str, turns: list[tuple[str, str]], expected: list[str], is_marked: bool
) -> None:
    tokenizer = chat_tokenizer(template if is_marked else without_marks(template))
    probes = read(tmp_path, tokenizer, chat(turns))
    if template == INST:
        # The first token of an answer is a space and its first letters: the space goes with it.
        expected = [answer.removeprefix(" ") if answer.startswith("  ") else answer for answer in expected]
    assert answers(probes) == expected


def test_answers_whose_marks_are_lost_are_found_all_the_same(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML, trim_offsets=True)
    marked = tokenizer.apply_chat_template(chat(THREE)["messages"], return_assistant_tokens_mask=True)
    found = read(tmp_path, tokenizer, chat(THREE))
    # Of three answers the last one begins with a space, and has no mark.
    assert sum(marked["assistant_masks"]) < found.num_positions
    assert answers(found)[2] == " the answer: far <|im_end|>\n"


def test_a_token_that_crosses_the_end_of_a_span_is_marked_also_where_no_places_are_told() -> None:
    class Pairs(Letters):
        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [sum(map(ord, text[at : at + 2])) for at in range(0, len(text), 2)]}

    assert marks_of(Pairs(), "abcdefgh", [(1, 3), (6, 8)])[1] == [True, True, False, True]


def test_a_template_brings_its_own_bos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(LLAMA_3, bos=True)
    ids = read(tmp_path, tokenizer, chat(THREE)).tokens_of(0).tolist()
    assert (ids[0], ids.count(0)) == (0, 1)
    assert ids == tokenizer.apply_chat_template(chat(THREE)["messages"], return_dict=False)


def test_a_chat_that_is_too_long_loses_its_beginning_then_its_end_but_not_its_bos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(LLAMA_3)
    whole = read(tmp_path, tokenizer, chat(THREE)).tokens_of(0).tolist()
    first = read(tmp_path, tokenizer, chat(THREE)).plan(packed=False).offset[0].item() + 1
    kept = read(tmp_path, tokenizer, chat(THREE), max_length=len(whole) - 4)
    assert kept.tokens_of(0).tolist() == [0, *whole[5:]]
    assert kept.num_truncated == 1
    short = read(tmp_path, tokenizer, chat(THREE), max_length=6)
    assert short.tokens_of(0).tolist() == [0, *whole[first : first + 5]]


def test_a_tokenizer_that_tells_no_places_counts_the_same_letters(tmp_path: Path) -> None:
    class Chatting(Letters):
        def apply_chat_template(self, chat: list[dict[str, str]], **kwargs: Any) -> str:
            text = "".join(f"{message['role'][0]}={message['content']};" for message in chat)
            return text + "a=" * kwargs["add_generation_prompt"]

    assert answers(read(tmp_path, Chatting(), chat(THREE))) == ["very far indeed;", "far;", " the answer: far ;"]


@pytest.mark.parametrize("tokenizer", [bpe(), Letters()])
def test_a_tokenizer_without_a_chat_template_is_refused_by_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=r'line 2: the record is a chat, but .* no chat template .*"completion"'):
        read(tmp_path, tokenizer, {"text": "the moon"}, chat(ONE))


def test_a_template_that_refuses_a_chat_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(
        ProbeError, match=r"line 1: .*template refuses .* system, user, assistant: System role not supported\. Write"
    ):
        read(tmp_path, chat_tokenizer(INST), chat(SYSTEM))


def test_a_template_that_writes_an_answer_twice_is_refused(tmp_path: Path) -> None:
    twice = "{% for message in messages %}{{ message.content }}|{{ message.content }};{% endfor %}"
    with pytest.raises(ProbeError, match=r"line 1: the chat template writes message 1 .*generation"):
        read(tmp_path, chat_tokenizer(twice), chat(ONE))


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], r"messages is \[\]; expected a list"),
        ("hi", "messages is 'hi'; expected a list"),
        (["hi"], "message 0: 'hi' is not an object"),
        ([{"role": "assistant"}], "message 0: content is None; expected a string"),
        ([{"role": "assistant", "content": ""}], "message 0: content is '', an empty string"),
        ([{"role": "", "content": "a"}], "message 0: role is ''"),
        ([{"role": "assistant", "content": "a", "contents": "b"}], "message 0: No key is named 'contents'"),
        ([{"role": "user", "content": "hi"}], r"no message is the assistant's \(roles: user\)"),
    ],
)
def test_messages_that_are_no_chat_are_refused_by_line(tmp_path: Path, messages: object, told: str) -> None:
    with pytest.raises(ProbeError, match=f"line 1: {told}"):
        read(tmp_path, chat_tokenizer(CHATML), {"messages": messages})


def test_columns_of_a_message_that_are_none_are_left_out(tmp_path: Path) -> None:
    messages = [{"role": role, "content": content, "name": None} for role, content in ONE]
    assert answers(read(tmp_path, chat_tokenizer(CHATML), {"messages": messages})) == ["very far indeed<|im_end|>\n"]


def dated(form: str) -> str:
    return "{{- 'Today is " + form + ".' }}" + CHATML


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (dated("' + strftime_now('%d %b %Y') + '"), "%d %b %Y"),
        (dated("' + strftime_now(\"%Y\") + '"), "%Y"),
        ("{%- set form = '%Y-%m-%d' %}" + dated("' + strftime_now(form) + '"), "%Y-%m-%d"),
    ],
)
def test_a_template_that_writes_todays_date_is_warned_about_once_with_the_remedy(
    tmp_path: Path, template: str, form: str
) -> None:
    today = re.escape(datetime.now().strftime(form))
    with pytest.warns(UserWarning, match=rf"today's date \({today}\).*probes\.save.*ProbeSet\.load") as caught:
        probes = read(tmp_path, chat_tokenizer(template), chat(ONE), chat(THREE))
    assert len(caught) == 1
    probes.save(tmp_path / "saved")
    assert ProbeSet.load(tmp_path / "saved").fingerprint == probes.fingerprint


@pytest.mark.parametrize(
    "template", [CHATML, "{%- if no_such %}{{ strftime_now('%Y') }}{% endif %}" + CHATML, dated("2 Jan 2003")]
)
def test_a_date_of_ones_own_or_another_days_is_no_reason_to_warn(tmp_path: Path, template: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path, chat_tokenizer(template), chat([("user", f"Is it {datetime.now():%Y-%m-%d}?"), *ONE[1:]]))
    assert not caught
