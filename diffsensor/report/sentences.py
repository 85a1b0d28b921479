"""The sentences of a report: where the run stands and why, what looking cost, what was not seen."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffsensor.errors import listed
from diffsensor.record import RecordContents
from diffsensor.report.texts import count, number, visible
from diffsensor.report.types import Caution, Cost, Figure, Standing, TokenRow, TokenTable
from diffsensor.types import ALL_PROBES

#: Below so many probes a standard error is itself known to no better than a quarter: 1 / sqrt(2 (n - 1)).
FEW_PROBES = 9


def standing_of(
    contents: RecordContents, figures: Sequence[Figure], tokens: Sequence[TokenTable], steps: Sequence[int]
) -> Standing:
    because = [*_how_far(figures), *_which_tokens(tokens), _alerts_in_words(contents), *_actions_in_words(contents)]
    if not contents.verdicts:
        fresh = sum(not alert.is_repeat for alert in contents.alerts)
        told = f"{count(fresh, 'alert')} {'was' if fresh == 1 else 'were'} raised" if fresh else "no alert was raised"
        sentence = f"No gate was set, so no checkpoint was judged; {told}."
        return Standing(outcome="not judged", sentence=sentence, because=tuple(because))
    last = contents.verdicts[-1]
    told = {"pass": "The last checkpoint passed", "fail": "The last checkpoint failed"}.get(
        last.outcome, "It could not be told whether the last checkpoint may pass, which is not a pass"
    )
    sentence = f"{told} (step {last.step}). {visible(last.reason)}"
    if steps and steps[-1] > last.step:
        because.insert(
            0, f"Nothing that was read after step {last.step} has a verdict; the last look is of {steps[-1]}."
        )
    if len(contents.verdicts) > 1:
        outcomes = Counter(verdict.outcome for verdict in contents.verdicts)
        told = ", ".join(f"{outcomes[name]} {name}" for name in ("pass", "fail", "unknown") if outcomes[name])
        because.append(f"{count(len(contents.verdicts), 'verdict')} in all: {told}.")
    return Standing(outcome=last.outcome, sentence=sentence, because=tuple(because))


def _how_far(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return ["Nothing was read of the outputs."]
    main = figures[0]
    if not math.isfinite(main.value):
        return [f"At step {main.step} {main.metric} is not a number: the model's answers are broken."]
    within = f" (95 % {number(main.low)} to {number(main.high)})" if math.isfinite(main.low) else ""
    seen = "" if main.is_measurable else ", which is no measurable drift: it is within 3 noise floors of 0"
    sentence = f"At step {main.step}, {main.metric} over all probes is {number(main.value)} {main.unit}{within}{seen}."
    if main.worst_group and math.isfinite(main.worst_value):
        sentence += f" It is worst in group {visible(main.worst_group, 80)}: {number(main.worst_value)}."
    return [sentence]


def _which_tokens(tokens: Sequence[TokenTable]) -> list[str]:
    for table in tokens:
        if table.group == ALL_PROBES and table.prefers == "live" and table.ranked_by == "mass_moved":
            told = [
                f"{named(row)} (+{number(row.mass_moved)}{_plus_minus(row.mass_moved_stderr)})"
                for row in table.rows[:3]
            ]
            return [f"What gained most probability on average over positions: {', '.join(told)}."] if told else []
    return []


def named(row: TokenRow) -> str:
    """A token for a sentence; by its number where its text was kept out of the record."""
    if not row.token:
        return f"token {row.token_id}"
    text = visible(row.token, 40)
    bare = text.strip(" ")
    open_box = "\N{OPEN BOX}"
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    shown = open_box * before + (bare + open_box * after if bare else "")
    return f"\N{LEFT DOUBLE QUOTATION MARK}{shown}\N{RIGHT DOUBLE QUOTATION MARK}"


def _plus_minus(error: float) -> str:
    return f" ± {number(error, 2)}" if math.isfinite(error) else ""


def _alerts_in_words(contents: RecordContents) -> str:
    rules = contents.manifest.get("rules", [])
    watching = listed(visible(str(rule), 80) for rule in rules) if isinstance(rules, list) and rules else ""
    fresh = [alert for alert in contents.alerts if not alert.is_repeat]
    if not fresh:
        return f"No alert. Watched by: {watching}." if watching else "No alert: no rule was watching."
    worst = max(fresh, key=lambda alert: ("info", "warning", "critical").index(alert.severity))
    by_rule = Counter(alert.rule for alert in fresh)
    told = listed(f"{visible(rule, 80)}{f' ({times} times)' if times > 1 else ''}" for rule, times in by_rule.items())
    return (
        f"{count(len(fresh), 'alert')}, the first at step {fresh[0].step}; the gravest is {worst.severity}. "
        f"Raised by: {told}."
    )


def _actions_in_words(contents: RecordContents) -> list[str]:
    if not contents.actions:
        return []
    outcomes = Counter(action.outcome for action in contents.actions)
    told = ", ".join(f"{times} {outcome}" for outcome, times in outcomes.items())
    return [f"{count(len(contents.actions), 'request')} to the run: {told}."]


def cost_of(contents: RecordContents, steps: Sequence[int], figures: Sequence[Figure]) -> Cost:
    positions = contents.manifest.get("num_positions")
    per_look = positions if isinstance(positions, int) else None
    gaps = sorted(later - earlier for earlier, later in pairwise(steps))
    floor = 3 if any(math.isfinite(figure.noise_floor) for figure in figures) else 0
    not_known = (
        "Seconds, memory and the share of the training time: a record keeps none of them.",
        "Tokens that do not count (the first of a text, prompts, padding): the model runs over them too.",
    )
    return Cost(
        num_looks=len(steps),
        num_floor_looks=floor,
        positions_per_look=per_look,
        positions_read=None if per_look is None else per_look * (len(steps) + floor),
        steps_between_looks=float(gaps[len(gaps) // 2]) if gaps else math.nan,
        num_readings=len(contents.readings),
        bytes_on_disk=sum(file.stat().st_size for file in contents.path.rglob("*") if file.is_file()),
        not_known=not_known,
    )


def cautions_on(
    contents: RecordContents,
    metrics: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, int],
    figures: Sequence[Figure],
) -> tuple[Caution, ...]:
    manifest = contents.manifest
    found = [
        Caution(
            about="all of it",
            says="Probes show what they bring up. A change that shows only under a trigger that no probe contains is "
            "invisible to every number here, and a small drift is no proof that a model is good.",
        )
    ]
    if few := {name: size for name, size in groups.items() if size < FEW_PROBES}:
        told = listed((f"{visible(name, 60)} ({size})" for name, size in few.items()), 20)
        found.append(
            Caution(
                about="groups with few probes",
                says=f"{told}. With n probes a standard error is itself uncertain by about 1/√(2n - 2), which is "
                f"more than a quarter below {FEW_PROBES}; with 1 there is none. Small groups also read worst by chance "
                "more often.",
            )
        )
    if not groups:
        found.append(
            Caution(about="groups", says="The probes have no groups: a change in one kind of text is averaged away.")
        )
    if manifest.get("sealed"):
        found.append(
            Caution(
                about="sealed probes",
                says="They may alert a person, and no action was ever driven by them. Whoever tunes a run by this page "
                "unseals them.",
            )
        )
    if sealed := [name for name, info in metrics.items() if info.get("sealed")]:
        found.append(Caution(about="sealed metrics", says=f"{listed(sealed)}: no action was ever driven by them."))
    if contents.bank_probes:
        found.append(
            Caution(
                about="a rolling bank",
                says="Its probes are drawn anew from the training data: two looks read different texts, so part of a "
                "difference between them is of the texts. Curves of groups and directions are to be read with that.",
            )
        )
    if figures and all(math.isnan(figure.noise_floor) for figure in figures):
        found.append(
            Caution(
                about="noise floor",
                says="It was not measured, so it is not known below which size a reading is rounding alone.",
            )
        )
    hookpoints = manifest.get("hookpoints")
    if hookpoints == []:
        found.append(
            Caution(about="activations", says="No hookpoint was read: changes that the outputs do not show yet.")
        )
    found += [
        Caution(about=name, says=f"blind to {info['blind_to']}")
        for name, info in metrics.items()
        if info.get("blind_to")
    ]
    return tuple(found)
