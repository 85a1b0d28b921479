"""What diffsensor raises. Every message says what was given, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class DiffSensorError(Exception):
    """The parent of every error that diffsensor raises on purpose."""


class ProbeError(DiffSensorError, ValueError):
    """A probe set that cannot be built, read or used with this model."""


class CaptureError(DiffSensorError, TypeError):
    """A model that cannot be looked at in the way that was asked for."""


class HookpointError(DiffSensorError, ValueError):
    """A hookpoint that this model does not have."""


class ReferenceMismatchError(DiffSensorError, ValueError):
    """A reference that does not belong to this model, probe set or run."""


class CorruptFileError(DiffSensorError, OSError):
    """A stored file that is truncated, changed or not ours."""


class StorageError(DiffSensorError, OSError):
    """A place that cannot be written to, or that somebody else is writing to."""


class ConfigError(DiffSensorError, ValueError):
    """An argument with a value that means nothing here."""


class NonFiniteError(DiffSensorError, ArithmeticError):
    """Answers of a model that are not numbers."""


class RanksError(DiffSensorError, RuntimeError):
    """Processes of one run that did not come together: one failed, is elsewhere, or is gone."""


class RefusedError(DiffSensorError, RuntimeError):
    """An action that this run cannot carry out now."""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The names in order, separated by commas; at most `limit`, then how many more there are."""
    names = list(names)
    rest = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return (", ".join(names[:limit]) + rest) or "none"


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: what was given, the closest one, all that exist.

    No metric is named 'kl_ref_liv'. Did you mean 'kl_ref_live'? Known: cosine_distance, kl_ref_live.
    """
    known = list(known)
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"No {kind} is named {given!r}.{hint} Known: {listed(known)}."
