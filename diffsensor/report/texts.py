"""Foreign text made harmless, and numbers made short."""

import math
import unicodedata

#: What would act on a terminal or on the order of the letters beside it, or would not be seen at all.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
LONGEST = 1200


def visible(text: str, limit: int = LONGEST) -> str:
    """`text` with each character that cannot be seen written out, cut in its middle where it is longer than `limit`."""
    if len(text) > limit:
        half = limit // 2
        left_out = len(text) - 2 * half
        return f"{visible(text[:half])} … ({left_out} characters left out) … {visible(text[len(text) - half :])}"
    return "".join(_written_out(each) if unicodedata.category(each) in _UNSEEN else each for each in text)


def _written_out(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def number(value: float, digits: int = 3) -> str:
    """The value to so many digits that count: 0.0123, 1.23e-5, 12 345; a dash for a NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e6:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    else:
        decimals = max(digits - 1 - math.floor(math.log10(float(f"{size:.{digits - 1}e}"))), 0)
        text = f"{size:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return text if value > 0 else "\N{MINUS SIGN}" + text


def short(value: float) -> str:
    """A round number, such as a tick or a limit: without zeros at its end."""
    text = number(value, 6)
    mantissa, mark, exponent = text.partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + mark + exponent


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
