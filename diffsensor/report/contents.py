"""What a report says of one record, got out of it."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffsensor.errors import ConfigError, StorageError
from diffsensor.record import MANIFEST, RecordContents, read_record
from diffsensor.report.sentences import cautions_on, cost_of, standing_of
from diffsensor.report.types import Curve, Detail, Figure, Heatmap, Run, Threshold, TokenRow, TokenTable
from diffsensor.statistics import interval_of
from diffsensor.types import (
    ALL_PROBES,
    FIXED_BANK,
    WORST_GROUP,
    Alert,
    BankProbe,
    Reading,
    TokenShift,
    Verdict,
    log_key,
)

#: Shown first where they were read, in this order.
_FIRST = ("kl_ref_live", "nll_change", "entropy_change", "top1_flip", "mass_moved", "max_token_gain")
#: Alerts, actions and verdicts are shown so many each, the newest.
EVENTS = 200
#: Of what a rolling bank held, so many.
BANK_PROBES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A record that was read, what it is called here, and what its reader warned of."""

    name: str
    contents: RecordContents
    warnings: tuple[str, ...]


def load(paths: Sequence[Path]) -> list[Loaded]:
    """The records at these places. Raises where one is none, was changed, or holds nothing yet."""
    if not paths:
        raise ConfigError("A report was asked for of no record. Give the directory of at least one run.")
    loaded = []
    for path, name in zip(paths, _names(paths), strict=True):
        if not (path / MANIFEST).exists():
            inside = [place for place in ("record", "diffsensor", "drift") if (path / place / MANIFEST).exists()]
            hint = f" Did you mean {path / inside[0]}?" if inside else " Give the directory of a run."
            raise StorageError(f"There is no record at {path}: it has no {MANIFEST}.{hint}")
        with _overheard() as warnings:
            contents = read_record(path)
        if not (contents.readings or contents.alerts or contents.actions or contents.verdicts):
            raise ConfigError(
                f"The record at {path} holds nothing yet: no look at the model was completed. Wait for the first one, "
                "or look in the log of that run for what failed."
            )
        loaded.append(Loaded(name=name, contents=contents, warnings=tuple(warnings)))
    return loaded


def run_of(loaded: Loaded, detail: Detail) -> Run:
    """What there is to say of one record."""
    contents, manifest = loaded.contents, loaded.contents.manifest
    metrics = _metrics(manifest)
    series = _by_place(contents.readings)
    steps = sorted({reading.step for reading in contents.readings})
    drift = {place: curve for place, curve in series.items() if not metrics or place.metric in metrics}
    at_outputs = sorted((place for place in drift if not place.hookpoint), key=_order(metrics))
    figures = tuple(
        _figure(drift[place], drift.get(place.of_group(WORST_GROUP))) for place in at_outputs if not place.group
    )
    tokens = _token_tables(contents.token_shifts, detail)
    groups = _groups(manifest, series)
    cost = cost_of(contents, steps, figures)
    return Run(
        name=loaded.name,
        path=str(contents.path),
        standing=standing_of(contents, figures, tokens, steps),
        warnings=loaded.warnings,
        first_step=steps[0] if steps else -1,
        last_step=steps[-1] if steps else -1,
        num_looks=len(steps),
        metrics=metrics,
        groups=groups,
        figures=figures,
        curves=tuple(_curve(drift[place], detail) for place in at_outputs if place.group != WORST_GROUP),
        told=tuple(_curve(curve, detail) for place, curve in series.items() if place not in drift),
        heatmaps=_heatmaps(drift, manifest, detail),
        thresholds=_thresholds(contents),
        tokens=tokens,
        has_token_text=any(row.token or row.context for table in tokens for row in table.rows) or not tokens,
        bank_probes=_farthest(contents.bank_probes, detail),
        num_bank_probes=sum(probe.step == steps[-1] for probe in contents.bank_probes) if steps else 0,
        num_alerts=len(contents.alerts),
        num_actions=len(contents.actions),
        num_verdicts=len(contents.verdicts),
        alerts=contents.alerts[-EVENTS:],
        actions=contents.actions[-EVENTS:],
        verdicts=contents.verdicts[-EVENTS:],
        cost=cost,
        cautions=cautions_on(contents, metrics, groups, figures),
        provenance={name: value for name, value in manifest.items() if name != "metrics"},
    )


@dataclass(frozen=True, slots=True)
class _Place:
    bank: str
    metric: str
    group: str
    hookpoint: str

    def of_group(self, group: str) -> "_Place":
        return _Place(self.bank, self.metric, group, self.hookpoint)


def _by_place(readings: Iterable[Reading]) -> dict[_Place, list[Reading]]:
    """The readings of each curve. Of a group at a hookpoint, of which there are many, the last one alone."""
    found: dict[tuple[str, str, str, str], list[Reading]] = {}
    for reading in readings:
        key = (reading.bank, reading.metric, reading.group, reading.hookpoint)
        if reading.group and reading.hookpoint:
            found[key] = [reading]
        else:
            found.setdefault(key, []).append(reading)
    return {_Place(*key): curve for key, curve in found.items()}


def _metrics(manifest: Mapping[str, object]) -> Mapping[str, Mapping[str, Any]]:
    metrics = manifest.get("metrics", {})
    return metrics if isinstance(metrics, Mapping) else {}


def _order(metrics: Mapping[str, object]) -> Any:
    known = list(dict.fromkeys([*_FIRST, *metrics]))

    def place_in_order(place: _Place) -> tuple[bool, str, int, str]:
        at = known.index(place.metric) if place.metric in known else len(known)
        return (place.bank != FIXED_BANK, place.bank, at, place.metric)

    return place_in_order


def _figure(curve: Sequence[Reading], worst: Sequence[Reading] | None) -> Figure:
    last = curve[-1]
    low, high = _range(last)
    beside = worst[-1] if worst is not None and worst[-1].step == last.step else None
    return Figure(
        key=last.key,
        metric=last.metric,
        bank=last.bank,
        step=last.step,
        value=last.value,
        stderr=last.stderr,
        low=low,
        high=high,
        unit=last.unit,
        num_probes=last.num_probes,
        noise_floor=last.noise_floor,
        is_measurable=last.is_measurable,
        worst_group=_named_in(beside.note) if beside else "",
        worst_value=beside.value if beside else math.nan,
        note=last.note,
    )


def _named_in(note: str) -> str:
    """The worst group, which the note of its reading names: group 'code'; perhaps with a caution after it."""
    name = note.removeprefix("group ").removesuffix("; no measurable drift")
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name


def _range(reading: Reading) -> tuple[float, float]:
    """The 95 % interval; of a value without an error, what its bound leaves open."""
    low, high = interval_of(reading)
    if math.isnan(low) and reading.bound > 0:
        return reading.value, reading.value + reading.bound
    return low, high


def _curve(readings: Sequence[Reading], detail: Detail) -> Curve:
    last = readings[-1]
    values = [reading.value for reading in readings]
    kept = [readings[index] for index in thinned(values, detail.points)]
    ranges = [_range(reading) for reading in kept]
    return Curve(
        key=last.key,
        metric=last.metric,
        bank=last.bank,
        group=last.group,
        hookpoint=last.hookpoint,
        unit=last.unit,
        noise_floor=last.noise_floor,
        num_probes=last.num_probes,
        num_looks=len(readings),
        num_broken=sum(not math.isfinite(value) for value in values),
        steps=tuple(reading.step for reading in kept),
        values=tuple(reading.value for reading in kept),
        stderrs=tuple(reading.stderr for reading in kept),
        lows=tuple(low for low, _ in ranges),
        highs=tuple(high for _, high in ranges),
    )


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Which of many values to draw: the first, the last, and of each stretch between the lowest and the highest.

    Of a stretch that holds a value which is no number, that one too.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    stretches = max((limit - 2) // 2, 1)
    for stretch in range(stretches):
        start, stop = (1 + (len(values) - 2) * edge // stretches for edge in (stretch, stretch + 1))
        inside = range(start, stop)
        finite = [index for index in inside if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(inside):
            kept.add(next(index for index in inside if not math.isfinite(values[index])))
    return sorted(kept)


def spread(length: int, limit: int) -> list[int]:
    """At most so many indices, evenly spaced, the first and the last among them."""
    if length <= limit:
        return list(range(length))
    return sorted({round(index * (length - 1) / (limit - 1)) for index in range(limit)}) if limit > 1 else [length - 1]


def _heatmaps(
    drift: Mapping[_Place, Sequence[Reading]], manifest: Mapping[str, object], detail: Detail
) -> tuple[Heatmap, ...]:
    listed_ones = manifest.get("hookpoints", [])
    known = [str(name) for name in listed_ones] if isinstance(listed_ones, list) else []
    hookpoints = list(dict.fromkeys([*known, *(place.hookpoint for place in drift if place.hookpoint)]))
    found = []
    for bank, metric in dict.fromkeys((place.bank, place.metric) for place in drift if place.hookpoint):
        rows = [name for name in hookpoints if _Place(bank, metric, ALL_PROBES, name) in drift]
        curves = [{reading.step: reading for reading in drift[_Place(bank, metric, ALL_PROBES, name)]} for name in rows]
        steps = sorted(set().union(*curves))
        kept = [steps[index] for index in spread(len(steps), detail.columns)]
        unit = next((reading.unit for curve in curves for reading in curve.values()), "")
        if kept:
            found.append(
                Heatmap(
                    metric=metric,
                    bank=bank,
                    unit=unit,
                    rows=tuple(rows),
                    columns=tuple(map(str, kept)),
                    over="step",
                    step=steps[-1],
                    num_columns=len(steps),
                    values=tuple(
                        tuple(curve[step].value if step in curve else math.nan for step in kept) for curve in curves
                    ),
                )
            )
        groups = [
            name
            for name in dict.fromkeys(place.group for place in drift if place.metric == metric and place.hookpoint)
            if name not in (ALL_PROBES, WORST_GROUP)
        ]
        if groups and metric == "relative_l2":
            found.append(
                Heatmap(
                    metric=metric,
                    bank=bank,
                    unit=unit,
                    rows=tuple(rows),
                    columns=tuple(groups),
                    over="group",
                    step=steps[-1] if steps else -1,
                    num_columns=len(groups),
                    values=tuple(
                        tuple(_last_value(drift.get(_Place(bank, metric, group, name))) for group in groups)
                        for name in rows
                    ),
                )
            )
    return tuple(found)


def _last_value(curve: Sequence[Reading] | None) -> float:
    return curve[-1].value if curve else math.nan


def _thresholds(contents: RecordContents) -> tuple[Threshold, ...]:
    """The limits that alerts and verdicts name, each with the curve whose value it was held against."""
    named: list[Alert | Verdict] = [*contents.alerts, *contents.verdicts]
    wanted = [each for each in named if math.isfinite(each.threshold)]
    steps = {each.step for each in wanted}
    at: dict[int, list[Reading]] = {}
    for reading in contents.readings:
        if reading.step in steps:
            at.setdefault(reading.step, []).append(reading)
    found: dict[tuple[str, float], Threshold] = {}
    for each in wanted:
        # By its value: a rule may hold its limit against evidence of its own, on another scale than its subject's.
        held = [
            reading.key
            for reading in at.get(each.step, [])
            if reading.value == each.value and reading.unit == each.unit and reading.group != WORST_GROUP
        ]
        key = each.subject if each.subject in held or not held else held[0]
        if held:
            found.setdefault((key, each.threshold), Threshold(key=key, threshold=each.threshold, rule=each.rule))
    return tuple(found.values())


def _token_tables(shifts: Sequence[TokenShift], detail: Detail) -> tuple[TokenTable, ...]:
    tables: dict[tuple[str, str, str, str], dict[int, list[TokenShift]]] = {}
    for shift in shifts:
        place = (shift.bank, shift.group, shift.ranked_by, shift.prefers)
        tables.setdefault(place, {}).setdefault(shift.step, []).append(shift)
    last_of_bank = {
        bank: max(shift.step for shift in shifts if shift.bank == bank)
        for bank in dict.fromkeys(shift.bank for shift in shifts)
    }
    found = []
    for (bank, group, ranked_by, prefers), by_step in tables.items():
        step = last_of_bank[bank]
        looks = sorted(by_step, reverse=True)
        if looks[0] != step:
            continue
        members = {look: {shift.token_id for shift in by_step[look]} for look in looks}
        rows = []
        for shift in sorted(by_step[step], key=lambda shift: shift.rank):
            since = step
            for look in looks:
                if shift.token_id not in members[look]:
                    break
                since = look
            rows.append(_token_row(shift, since, detail))
        found.append(
            TokenTable(step=step, bank=bank, group=group, ranked_by=ranked_by, prefers=prefers, rows=tuple(rows))
        )
    return tuple(found)


def _token_row(shift: TokenShift, since: int, detail: Detail) -> TokenRow:
    return TokenRow(
        rank=shift.rank,
        token_id=shift.token_id,
        token=shift.token,
        mass_moved=shift.mass_moved,
        mass_moved_stderr=shift.mass_moved_stderr,
        logit_difference=shift.logit_difference,
        since=since,
        probe=shift.probe,
        position=shift.position,
        context=cut(shift.context, detail.context),  # its end is where the change is
    )


def _farthest(probes: Sequence[BankProbe], detail: Detail) -> tuple[BankProbe, ...]:
    """The probes that moved most, of those that a rolling bank held at its last look."""
    if not probes:
        return ()
    last = max(probe.step for probe in probes)
    held = [probe for probe in probes if probe.step == last]
    held.sort(key=lambda probe: math.inf if math.isnan(probe.drift) else -abs(probe.drift))
    return tuple(replace(probe, text=cut(probe.text, detail.context)) for probe in held[:BANK_PROBES])


def cut(text: str, limit: int) -> str:
    """The end of a text, where it is longer."""
    return text if len(text) <= limit else "…" + text[-limit:]


def _groups(manifest: Mapping[str, object], series: Mapping[_Place, Sequence[Reading]]) -> dict[str, int]:
    """Each group with the most probes that counted in one of its readings."""
    named = manifest.get("groups", [])
    sizes = {str(name): 0 for name in named} if isinstance(named, list) else {}
    for place, curve in series.items():
        if place.group not in (ALL_PROBES, WORST_GROUP):
            sizes[place.group] = max(sizes.get(place.group, 0), curve[-1].num_probes)
    return sizes


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths, of two parts or more, that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]).replace("//", "/") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What the reader of a record warns of: that its last lines are torn."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listening = Listening(logging.WARNING)
    logger = logging.getLogger("diffsensor")
    logger.addHandler(listening)
    try:
        yield said
    finally:
        logger.removeHandler(listening)


def curve_of(run: Run, metric: str, *, bank: str = FIXED_BANK, group: str = ALL_PROBES) -> Curve | None:
    key = log_key(metric, bank=bank, group=group)
    return next((curve for curve in run.curves if curve.key == key), None)
