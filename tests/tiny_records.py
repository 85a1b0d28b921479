"""Records made up by hand, for tests of what shows them: no model, known numbers."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsensor.record import Record
from diffsensor.sensors import Activations, Outputs
from diffsensor.types import (
    ActionTaken,
    Alert,
    Findings,
    Reading,
    TokenShift,
    Verdict,
    log_key,
)

WIDTH = 16
_OUTPUTS = {"kl_ref_live": 0.4, "nll_change": -0.1, "entropy_change": 0.05, "top1_flip": 0.2, "mass_moved": 0.08}
_AT_HOOKPOINTS = {"relative_l2": 0.3, "cosine_distance": 0.04}
_INFOS = {**Outputs().metrics, **Activations().metrics}


def manifest(groups: Sequence[str], hookpoints: Sequence[str], **others: Any) -> dict[str, object]:
    members: dict[str, object] = {
        "diffsensor": "0.1.0",
        "torch": "2.13.0",
        "reference": "a1" * 32,
        "probes": "b2" * 32,
        "num_probes": 12 * len(groups),
        "num_positions": 600 * len(groups),
        "groups": list(groups),
        "hookpoints": list(hookpoints),
        "sensors": ["outputs", "activations"],
        "schedule": "every(n=10)",
        "recipe": {"trainer": "Trainer", "learning_rate": 0.0003, "optimizers": [{"class": "AdamW"}]},
        "rules": ["kl_ref_live in each group above 0.3", "invariant"],
        "sealed": False,
        "context": {"dtype": "torch.float32", "device": "cpu"},
        "temperature": 1.0,
        "processes": 1,
        "metrics": {name: asdict(_INFOS[name]) for name in (*_OUTPUTS, *_AT_HOOKPOINTS)},
    }
    return members | others


def make_record(
    path: Path,
    *,
    looks: int = 12,
    groups: Sequence[str] = ("knowledge", "code", "refusal"),
    hookpoints: Sequence[str] = ("model.layers.0", "model.layers.1", "model.layers.2"),
    seed: int = 0,
    with_events: bool = True,
    by_group_at_hookpoints: bool = True,
    tokens: Sequence[str] = (" the", " nice", "!", " sorry", "\n"),
    values: Mapping[tuple[int, str], float] | None = None,
    direction: int | None = None,
    **others: Any,
) -> Path:
    """A run whose drift grows and levels off. `values` puts a number in place of kl_ref_live, by step and group."""
    chance = random.Random(seed)
    way = torch.randn(len(hookpoints), WIDTH, generator=torch.Generator().manual_seed(direction or seed))
    speeds = {group: 0.4 + chance.random() for group in groups}
    rank = {token: place for place, token in enumerate(chance.sample(list(tokens), len(tokens)))}
    with Record(path, manifest=manifest(groups, hookpoints, **others)) as record:
        for look in range(looks):
            step, grown = 10 * look, 1 - math.exp(-3 * look / max(looks, 2))
            readings = list[Reading]()
            for metric, size in _OUTPUTS.items():
                readings += _of_strata(step, metric, size * grown, speeds, chance, "", values or {})
            for depth, hookpoint in enumerate(hookpoints):
                for metric, size in _AT_HOOKPOINTS.items():
                    far = size * grown * (1 + depth) / len(hookpoints)
                    some = speeds if by_group_at_hookpoints else {}
                    readings += _of_strata(step, metric, far, some, chance, hookpoint, {})
            readings.append(Reading(step=step, sensor="progress", metric="loss", value=3 - grown, unit="as given"))
            shifts = tuple(
                _shift(step, group, ranked_by, prefers, place, token, grown)
                for group in ("", *groups)
                for ranked_by in ("mass_moved", "logit_difference")
                for prefers in ("live", "reference")
                for token, place in rank.items()
            )
            tensors: dict[str, Tensor] = {
                log_key("mean_difference", hookpoint=name): grown * (way[place] + 0.3 * torch.randn(WIDTH))
                for place, name in enumerate(hookpoints)
            }
            alerts = (_alert(step, readings),) if with_events and look == looks // 2 else ()
            record.write(
                Findings(
                    step=step,
                    readings=tuple(readings),
                    token_shifts=shifts if look else (),
                    tensors=tensors,
                    alerts=alerts,
                )
            )
            if alerts:
                record.write(Findings(step=step, actions=(_action(step, alerts[0].rule),)))
            if with_events and look % 4 == 3:
                record.write(Findings(step=step, verdicts=(_verdict(step, readings[0]),)))
    return path


def _of_strata(
    step: int,
    metric: str,
    size: float,
    speeds: Mapping[str, float],
    chance: random.Random,
    hookpoint: str,
    values: Mapping[tuple[int, str], float],
) -> list[Reading]:
    info = _INFOS[metric]
    found = []
    for group, speed in {"": 1.0, **speeds}.items():
        value = size * speed * (1 + 0.05 * chance.gauss(0, 1))
        if metric == "kl_ref_live":
            value = values.get((step, group), value)
        found.append(
            Reading(
                step=step,
                sensor="activations" if hookpoint else "outputs",
                metric=metric,
                value=value,
                stderr=math.nan if metric == "mass_moved" else 0.08 * abs(size) * (1 if group else 0.5),
                unit=info.unit,
                num_probes=12 if group else 12 * max(len(speeds), 1),
                group=group,
                hookpoint=hookpoint,
                scale=info.scale,
                noise_floor=2e-8,
            )
        )
    if len(found) > 1:
        worst = max(found[1:], key=lambda reading: -math.inf if math.isnan(reading.value) else reading.value)
        fields = {name: getattr(worst, name) for name in worst.__slots__}
        found.append(Reading(**{**fields, "group": "worst", "note": f"group {worst.group!r}"}))
    return found


def _shift(step: int, group: str, ranked_by: Any, prefers: Any, rank: int, token: str, grown: float) -> TokenShift:
    sign = 1 if prefers == "live" else -1
    return TokenShift(
        step=step,
        group=group,
        ranked_by=ranked_by,
        prefers=prefers,
        rank=rank,
        token_id=1000 + sum(token.encode("utf-8", "surrogatepass")),
        token=token,
        mass_moved=sign * 0.03 * grown / (1 + rank),
        mass_moved_stderr=0.002,
        logit_difference=sign * 2.5 * grown / (1 + rank),
        probe=f"{rank}",
        position=7,
        context="The quick brown fox jumps over the lazy dog, and then it says",
    )


def _alert(step: int, readings: Sequence[Reading]) -> Alert:
    reading = max(readings[1:4], key=lambda each: each.value)
    return Alert(
        step=step,
        rule="kl_ref_live in each group above 0.3",
        severity="warning",
        subject=reading.key,
        message=f"kl_ref_live of group {reading.group!r} is {reading.value:.3g} nats/token, above the limit 0.3.",
        value=reading.value,
        stderr=reading.stderr,
        threshold=0.3,
        unit=reading.unit,
        first_step=step - 10,
    )


def _action(step: int, rule: str) -> ActionTaken:
    return ActionTaken(
        step=step, rule=rule, action="scale_learning_rate(0.5)", outcome="done", detail="The rate is 0.00015 now."
    )


def _verdict(step: int, reading: Reading) -> Verdict:
    outcome: Any = "pass" if reading.value < 0.3 else "fail"
    return Verdict(
        step=step,
        outcome=outcome,
        reason=f"kl_ref_live is {reading.value:.3g} nats/token; the limit is 0.3.",
        rule="kl_ref_live above 0.3",
        subject=reading.key,
        value=reading.value,
        stderr=reading.stderr,
        threshold=0.3,
        unit=reading.unit,
    )
