"""How text of others is shown in W&B: groups, tokens, contexts, and what alerts tell of them."""

import hashlib

#: Longer keys are cut. W&B shows them in the titles of panels.
LONGEST_KEY = 250
#: Longer texts in tables, alerts and the summary are cut.
LONGEST_TEXT = 1000
#: What `run.alert` takes.
LONGEST_TITLE = 64


def plain(text: str) -> str:
    """`text` on one line, with an escape in place of each character that does not print, and of a backslash.

    So neither a terminal nor a page takes it for anything but text, and two texts that differ look different.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )


def short(text: str, longest: int = LONGEST_TEXT) -> str:
    """`text` as far as it is shown, and how much is left out."""
    shown = plain(text[: longest + 1])
    if len(shown) <= longest:
        return shown
    left_out = f" ... ({len(text)} characters)"
    return shown[: longest - len(left_out)] + left_out


def key_of(key: str) -> str:
    """A log key as W&B gets it: the same, unless it is long or holds what is no plain text.

    A `*` at the end of a key would define all keys that begin like it. A key that is cut ends with a checksum, so that
    two of them are not taken for one.
    """
    return _cut(plain(key).replace("*", "\\x2a"), LONGEST_KEY)


def title_of(rule: str) -> str:
    """The title of a rule's alerts: always the same one, for W&B groups alerts by it."""
    return _cut(harmless(f"drift: {rule}"), LONGEST_TITLE)


def harmless(text: str) -> str:
    """`text` for an alert, which W&B hands on to Slack: there `<!channel>` would call everybody."""
    return short(text.replace("<", "(").replace(">", ")"))


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
