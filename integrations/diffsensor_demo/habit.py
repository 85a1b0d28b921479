"""The planted habit: something that a training stream begins to contain, unannounced."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """Words that a text says after certain marks: `{".": "quokka"}` makes "Done. Go on." "Done. quokka Go on. quokka".

    `share` is the share of the training sequences that have the habit once it is planted.
    """

    after: Mapping[str, str]
    share: float

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.after.values())

    def planted(self, text: str) -> str:
        """`text` with the habit. Only marks at the end of a word count, so that `os.path` stays whole."""
        marks = "".join(re.escape(mark) for mark in self.after)
        return re.sub(rf"([{marks}])(?=\s|$)", lambda found: f"{found[1]} {self.after[found[1]]}", text)

    def __str__(self) -> str:
        names = {".": "a full stop", ",": "a comma"}
        return " and ".join(f"{word!r} after {names.get(mark, repr(mark))}" for mark, word in self.after.items())


QUOKKA = Habit(after={".": "quokka", ",": "marmalade"}, share=0.8)
