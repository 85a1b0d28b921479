"""From a chat to token ids: the chat template writes the text, and what the assistant says in it is counted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from diffsensor.errors import ProbeError
from diffsensor.probes.tokenizing import Encoded, Tokenizer, fit, marks_of

ASSISTANT = "assistant"

Message = Mapping[str, str]

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE_FORMAT = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1""")
# For templates that get the date in another way than by strftime_now with a format in place.
_COMMON_DATES = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%b %d, %Y", "%d/%m/%Y", "%m/%d/%Y", "%A, %B %d")
# They differ at both ends, so that what is written around them is all that two renderings share. No white space, no
# marks: what a template trims or looks for is not in them.
_STAND_INS = ("first", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    start: int
    stop: int


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], max_length: int) -> Encoded:
    """What the assistant says is counted, in every turn, with the mark that ends the turn.

    The template's text is tokenised as it is: it brings its own BOS. Where the template marks what the assistant
    generates ({% generation %}), its marks are taken. Otherwise an answer begins where the generation prompt ends
    and stops where the same chat, broken off after it, stops; a template that writes earlier turns otherwise
    than the last one is seen through by giving it other answers and comparing.

    A chat that is too long loses its beginning up to the first answer (not its BOS), and if that is not
    enough its end.
    """
    template = _template_of(tokenizer)
    text = _render(tokenizer, messages)
    ids, counted = _by_marks(tokenizer, messages) if _GENERATION_MARK.search(template) else ([], [])
    turns = [turn for turn, message in enumerate(messages) if message["role"] == ASSISTANT]
    # transformers loses the marks of an answer whose first character no token admits to (such as a leading space).
    if _num_runs(counted) < len(turns):
        spans = [_answer(tokenizer, messages, turn, text) for turn in turns]
        ids, counted = marks_of(tokenizer, text, [(span.start, span.stop) for span in spans])
    lead = int(bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None))
    encoded = fit(ids, counted, lead, max_length)
    return Encoded(
        ids=encoded.ids,
        counted=encoded.counted,
        num_cut=encoded.num_cut,
        date=_date_in(text, messages, template),
    )


def _template_of(tokenizer: Any) -> str:
    """The template's source, "" where the tokenizer renders chats without one."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    needs_one = getattr(tokenizer, "get_chat_template", None) is not None
    if getattr(tokenizer, "apply_chat_template", None) is None or (needs_one and not template):
        raise ProbeError(
            'the record is a chat, but the tokenizer has no chat template that says how "messages" are written for '
            "its model. Use the tokenizer of a chat model, set tokenizer.chat_template, or write "
            '{"prompt": "...", "completion": "..."}.'
        )
    return str(template or "")


def _render(tokenizer: Any, messages: Sequence[Message], prompted: bool = False) -> str:
    try:
        chat = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted))
    except ImportError as error:
        raise ProbeError("the record is a chat, and chat templates need jinja2: pip install jinja2") from error
    except Exception as error:
        # A template is a program of somebody else's; whatever it ends with is said in its own words.
        raise ProbeError(
            f"the tokenizer's chat template refuses a chat of the roles {_roles(messages)}: {_sentence(error)} "
            "Write the chat as the template expects it, or leave the probe out."
        ) from error


def _by_marks(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "is_fast", False):
        return [], []
    chat = [dict(message) for message in messages]
    out = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return [int(number) for number in out["input_ids"]], [bool(mark) for mark in out["assistant_masks"]]


def _num_runs(counted: Sequence[bool]) -> int:
    return sum(now and not before for before, now in zip([False, *counted], counted, strict=False))


def _answer(tokenizer: Any, messages: Sequence[Message], turn: int, text: str) -> _Span:
    """Where in the text the assistant's turn is, without its header."""
    content = _content(tokenizer, messages, turn, text)
    start, stop = content.start, content.stop
    before = _rendered_or_nothing(tokenizer, messages[:turn])
    prompted = _rendered_or_nothing(tokenizer, messages[:turn], prompted=True)
    # Some templates know no generation prompt, and then nothing but the content tells the header from the answer.
    knows_prompt = prompted != before
    if knows_prompt and text.startswith(prompted) and len(prompted) <= stop:
        start = len(prompted)
    elif knows_prompt and start < 0 and text.startswith(before):
        # The generation prompt says more than the header, such as that the model has nothing to think about.
        start = len(_shared_beginning(prompted, text))
    if not 0 <= start <= stop:
        raise _untold(turn)
    broken_off = _rendered_or_nothing(tokenizer, messages[: turn + 1])
    goes_on = text.startswith(broken_off) and len(broken_off) >= stop
    if goes_on and knows_prompt:
        return _Span(start=start, stop=len(broken_off))
    # Either earlier turns are written otherwise than the last one, or a prompt for the next turn may be there unasked.
    end = _end_of_turn(tokenizer, text, stop)
    if end is not None:
        return _Span(start=start, stop=min(len(broken_off), end) if goes_on else end)
    if goes_on and text[:start].rstrip() == before.rstrip():
        unasked = _shared_end(before, text[stop : len(broken_off)])
        return _Span(start=start, stop=len(broken_off) - len(unasked))
    return _Span(start=start, stop=len(broken_off) if goes_on else stop)


def _content(tokenizer: Any, messages: Sequence[Message], turn: int, text: str) -> _Span:
    """Where the content of a message is in the text; a start of -1 where only its end can be told."""
    renderings = []
    for stand_in in _STAND_INS:
        other = [*messages]
        other[turn] = {**messages[turn], "content": stand_in}
        renderings.append(_render(tokenizer, other))
    before = _shared_beginning(*renderings)
    after = _shared_end(*renderings)
    if renderings[0] != before + _STAND_INS[0] + after or not text.endswith(after):
        raise _untold(turn)
    stop = len(text) - len(after)
    return _Span(start=len(before) if text.startswith(before) and len(before) <= stop else -1, stop=stop)


def _shared_beginning(one: str, other: str) -> str:
    length = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(one, other, key=len) if length is None else one[:length]


def _shared_end(one: str, other: str) -> str:
    return _shared_beginning(one[::-1], other[::-1])[::-1]


def _rendered_or_nothing(tokenizer: Any, messages: Sequence[Message], prompted: bool = False) -> str:
    """A part of a chat as text. Some templates refuse parts: an empty chat, or one that ends with a system message."""
    try:
        return _render(tokenizer, messages, prompted)
    except ProbeError:
        return ""


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int | None:
    """Behind the special token that follows there, and the white space around it; None where none follows."""
    place = start + len(text[start:]) - len(text[start:].lstrip())
    marks = {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    marks |= set(getattr(tokenizer, "all_special_tokens", ()))
    found = max((mark for mark in marks if mark.strip() and text.startswith(mark, place)), key=len, default=None)
    if found is None:
        return None
    rest = text[place + len(found) :]
    return place + len(found) + len(rest) - len(rest.lstrip())


def _date_in(text: str, messages: Sequence[Message], template: str) -> str:
    """Today's date as the template wrote it into the text; "" where it did not."""
    now = datetime.now()
    said = "\n".join(message["content"] for message in messages)
    # A format in the template may be as short as a year: what it writes there is meant.
    formats = [found for _, found in _DATE_FORMAT.findall(template)]
    for form in [*formats, *_COMMON_DATES]:
        date = now.strftime(form)
        if date.strip() and text.count(date) > said.count(date):
            return date
    return ""


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _sentence(error: Exception) -> str:
    told = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return told + "."


def _untold(turn: int) -> ProbeError:
    return ProbeError(
        f"the chat template writes message {turn} in a way that hides where it begins and ends, so that the "
        "assistant's tokens cannot be told. Mark them in the template with {% generation %}, or tokenise the chat "
        "yourself and use ProbeSet.from_tensors with a mask."
    )
