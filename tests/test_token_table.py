"""The token table, against a plain one: who moved, by how much, with which error, and where."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import naive
from diffsensor import Findings, Monitor, ProbeSet, Reference, TokenShift
from tiny import HEADS, VOCAB, Kept, Text, drifted, frozen_head, llama, probe_set, texts


def table(reference: torch.nn.Module, live: torch.nn.Module, probes: ProbeSet, tmp_path: Path, sensors: str) -> list:
    kept = Kept()
    monitor = Monitor(probes, Reference.build(reference, probes, tmp_path), sensors=sensors, sinks=[kept])
    monitor.read(live, 7)
    assert monitor.failures == {}
    (findings,) = kept.findings
    assert isinstance(findings, Findings)
    return list(findings.token_shifts)


class Plain:
    """The table by loops."""

    def __init__(self, reference: torch.nn.Module, live: torch.nn.Module, made: list[Text]) -> None:
        self.made = made
        z_ref, z = naive.logits(reference, made), naive.logits(live, made)
        self.places = [naive.counted_positions(text) for text in made]
        self.gains = [
            [b[place].softmax(0) - a[place].softmax(0) for place in places]
            for a, b, places in zip(z_ref, z, self.places, strict=True)
        ]
        self.lifts = [
            [b[place] - a[place] for place in places] for a, b, places in zip(z_ref, z, self.places, strict=True)
        ]

    def mean(self, of: list[list[Tensor]], weights: list[float]) -> Tensor:
        total = sum(weight * len(probe) for weight, probe in zip(weights, of, strict=True))
        return sum(weight * sum(probe) for weight, probe in zip(weights, of, strict=True) if probe) / total

    def check(self, shift: TokenShift) -> None:
        weights = naive.groups_of(self.made)[shift.group]
        token = shift.token_id
        gained = [[float(position[token]) for position in probe] for probe in self.gains]
        mean, stderr = naive.mean_with_error(gained, weights)
        assert shift.mass_moved == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert shift.mass_moved_stderr == pytest.approx(stderr, rel=1e-3, abs=1e-6)
        assert shift.logit_difference == pytest.approx(float(self.mean(self.lifts, weights)[token]), rel=1e-3, abs=1e-4)
        sign = 1 if shift.prefers == "live" else -1
        inside = [
            (sign * value, number, place)
            for number, (probe, places) in enumerate(zip(gained, self.places, strict=True))
            for value, place in zip(probe, places, strict=True)
            if weights[number] > 0
        ]
        best = max(inside)
        here = next(value for value, number, place in inside if (str(number), place) == (shift.probe, shift.position))
        assert here == pytest.approx(best[0], rel=1e-3, abs=1e-6)
        assert shift.token == f"⟨{token}⟩"
        ids = self.made[int(shift.probe)].ids[: shift.position + 1][-24:]
        assert shift.context == "".join(f"⟨{number}⟩" for number in ids)


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_table_agrees_with_a_plain_one(kind: str, sensors: str, tmp_path: Path) -> None:
    made, model = texts(longest=34), HEADS[kind]()
    live = drifted(model)
    plain = Plain(model, live, made)
    shifts = table(model, live, probe_set(made), tmp_path, sensors)
    assert {(shift.group, shift.ranked_by, shift.prefers) for shift in shifts} == {
        (group, ranked_by, prefers)
        for group in ("", "letters", "poems")
        for ranked_by in ("mass_moved", "logit_difference")
        for prefers in ("live", "reference")
    }
    for shift in shifts:
        plain.check(shift)
        assert shift.step == 7
    for group, weights in naive.groups_of(made).items():
        for ranked_by, of in (("mass_moved", plain.gains), ("logit_difference", plain.lifts)):
            mean = plain.mean(of, weights)
            for prefers, sign in (("live", 1), ("reference", -1)):
                lines = [s for s in shifts if (s.group, s.ranked_by, s.prefers) == (group, ranked_by, prefers)]
                assert [line.rank for line in lines] == list(range(len(lines)))
                wanted = (sign * mean).topk(10 if group == "" else 5)
                assert len(lines) == int((wanted.values > 0).sum())
                values = [sign * getattr(line, ranked_by) for line in lines]
                assert values == pytest.approx(wanted.values.tolist()[: len(lines)], rel=1e-3, abs=1e-5)
                if (wanted.values[:1] > 1.1 * wanted.values[1:2]).all():
                    assert lines[0].token_id == int(wanted.indices[0])


def test_a_token_that_was_planted_comes_first_with_an_example_of_where(tmp_path: Path) -> None:
    model = frozen_head()
    live = drifted(model, 0.0)
    with torch.no_grad():  # towards token 17, wherever the model looks
        live.model.norm.weight.copy_(model.model.norm.weight)
        live.model.layers[1].mlp.down_proj.weight += (
            0.5 * model.lm_head.weight[17][:, None] * torch.sign(model.model.layers[1].mlp.down_proj.weight.sum(0))
        )
    shifts = table(model, live, probe_set(), tmp_path, "light")
    assert {"live", "reference"} == {shift.prefers for shift in shifts}
    strongest = max(shifts, key=lambda shift: abs(shift.logit_difference))
    assert strongest.token_id == 17


def test_an_unchanged_model_has_an_empty_table(tmp_path: Path) -> None:
    for sensors in ("light", "full"):
        assert table(llama(), llama(), probe_set(), tmp_path, sensors) == []
        assert table(frozen_head(), frozen_head(), probe_set(), tmp_path, sensors) == []


def test_the_mass_that_moves_adds_up_to_nothing(tmp_path: Path) -> None:
    """Of a vocabulary that fits into the table as a whole."""
    model, live = llama(), drifted(llama(), 0.3)
    monitor = Monitor(probe_set(), Reference.build(model, probe_set(), tmp_path), sensors=["outputs"])
    moved = {reading.key: reading.value for reading in monitor.read(live, 0)}["diffsensor/mass_moved"]
    shifts = table(model, live, probe_set(), tmp_path, "light")
    up = sum(s.mass_moved for s in shifts if s.group == "" and s.prefers == "live" and s.ranked_by == "mass_moved")
    assert 0.4 * moved < up <= moved * (1 + 1e-5)
    assert VOCAB > 20


def test_one_probe_alone_has_a_table_without_errors(tmp_path: Path) -> None:
    made = [Text(ids=(5, 6, 7, 8), counted=(True,) * 4)]
    shifts = table(llama(), drifted(llama()), probe_set(made), tmp_path, "light")
    assert shifts
    assert all(math.isnan(shift.mass_moved_stderr) for shift in shifts)
