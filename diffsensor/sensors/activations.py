"""How far, and in which direction, the activations at each hookpoint have moved."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.metrics.activations import ACTIVATION_METRICS, CKA_DISTANCE, MEAN_SHIFT
from diffsensor.metrics.cka import POSITIONS, UNSTABLE_BELOW, CkaSide, cka_distance_from
from diffsensor.protocols import OutputHead, ReferenceAnswers
from diffsensor.sensors.means import probe_sums, readings_of
from diffsensor.statistics import Estimate, Strata, ratio_means, strata_of
from diffsensor.types import ALL_PROBES, FIXED_BANK, Findings, MetricInfo, Piece, Reading, log_key


class Activations:
    """Relative L2, cosine distance, mean shift and CKA distance at every hookpoint.

    Also keeps the mean-difference vector of each hookpoint and group, which says in which direction the
    activations moved. Attention sinks are left out. Blind to what no hookpoint carries.
    """

    name = "activations"

    def __init__(self) -> None:
        # The reference's part of CKA, kept from reading to reading, by hookpoint.
        self._cka_sides: tuple[ReferenceAnswers, dict[str, CkaSide]] | None = None

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        infos = [metric.info for metric in ACTIVATION_METRICS.values()]
        return {info.name: info for info in (*infos, MEAN_SHIFT, CKA_DISTANCE)}

    def open(self, reference: ReferenceAnswers, live_head: OutputHead) -> "ActivationsFold":
        if self._cka_sides is None or self._cka_sides[0] is not reference:
            self._cka_sides = (reference, {})
        return ActivationsFold(self.name, reference, self._cka_sides[1])


class ActivationsFold:
    """One reading of `Activations` while it is being taken."""

    def __init__(self, sensor: str, reference: ReferenceAnswers, cka_sides: dict[str, CkaSide]) -> None:
        self._sensor, self._reference, self._cka_sides = sensor, reference, cka_sides
        self._strata = strata_of(reference.probes)
        self._at = {name: _Hookpoint(reference, name) for name in reference.hookpoints}

    def update(self, piece: Piece) -> None:
        for name, live in piece.activations.items():
            self._at[name].add(piece.positions, live)

    def sums(self) -> Mapping[str, Tensor]:
        return {f"{part} at {name}": tensor for name, seen in self._at.items() for part, tensor in seen.sums.items()}

    def finish(self, step: int, sums: Mapping[str, Tensor]) -> Findings:
        readings: list[Reading] = []
        tensors: dict[str, Tensor] = {}
        for name, seen in self._at.items():
            seen.sums = {part: sums[f"{part} at {name}"] for part in seen.sums}
            found = {metric.info: seen.means(metric.info.name, self._strata) for metric in ACTIVATION_METRICS.values()}
            differences, found[MEAN_SHIFT] = seen.mean_shifts(self._strata)
            for info, estimates in found.items():
                readings += readings_of(estimates, info, self._strata, sensor=self._sensor, step=step, hookpoint=name)
            if (cka := self._cka(seen, step, name)) is not None:
                readings.append(cka)
            for group, difference in zip(self._strata.names, differences, strict=True):
                key = log_key("mean_difference", bank=FIXED_BANK, group=group, hookpoint=name)
                tensors[key] = difference.float()
        return Findings(step=step, readings=tuple(readings), tensors=tensors)

    def _cka(self, seen: "_Hookpoint", step: int, hookpoint: str) -> Reading | None:
        if len(seen.cka_positions) < POSITIONS:
            return None
        live = seen.sums["cka_rows"]
        owner = self._reference.plan.probe[seen.cka_positions].to(live.device)
        if hookpoint not in self._cka_sides:
            everywhere = slice(0, self._reference.plan.num_positions)
            ref = self._reference.activation(hookpoint, everywhere, torch.device("cpu"))[seen.cka_positions]
            self._cka_sides[hookpoint] = CkaSide.of(ref.to(live.device).float(), owner)
        value, stderr = cka_distance_from(self._cka_sides[hookpoint], live)
        if not math.isfinite(value):
            return None
        return Reading(
            step=step,
            sensor=self._sensor,
            metric=CKA_DISTANCE.name,
            value=value,
            stderr=stderr,
            unit=CKA_DISTANCE.unit,
            num_probes=len(owner.unique()),
            group=ALL_PROBES,
            hookpoint=hookpoint,
            scale=CKA_DISTANCE.scale,
            note="unstable: below 1e-4 this is mostly rounding" if 0 != abs(value) < UNSTABLE_BELOW else "",
        )


class _Hookpoint:
    """The running sums of one hookpoint; a probe's positions are all in one batch."""

    def __init__(self, reference: ReferenceAnswers, name: str) -> None:
        self._reference, self._name = reference, name
        self._num_probes = len(reference.probes.names)
        counted = torch.ones(reference.plan.num_positions, dtype=torch.bool)
        counted[reference.sinks(name)] = False
        self._counted = counted
        self.cka_positions = _evenly_spaced(counted.nonzero()[:, 0], POSITIONS)
        width = reference.activation(name, slice(0, 1), torch.device("cpu")).shape[1]
        of_probes = torch.zeros(self._num_probes, dtype=torch.float64)
        self.sums = {metric: of_probes.clone() for metric in ACTIVATION_METRICS}
        self.sums["counts"] = of_probes.clone()
        self.sums["difference"] = torch.zeros(self._num_probes, width, dtype=torch.float64)
        self.sums["cka_rows"] = torch.zeros(len(self.cka_positions), width, dtype=torch.float32)

    def add(self, positions: slice, live: Float[Tensor, "pos width"]) -> None:
        ref = self._reference.activation(self._name, positions, live.device).float()
        live = live.float()
        counted = self._counted[positions]
        owner = self._reference.plan.probe[positions]
        for name in ("difference", "cka_rows"):  # where they are added up in every batch
            self.sums[name] = self.sums[name].to(live.device)
        wanted = (self.cka_positions >= positions.start) & (self.cka_positions < positions.stop)
        places = (self.cka_positions[wanted] - positions.start).to(live.device)
        self.sums["cka_rows"][wanted.to(live.device)] = live[places]
        if not bool(counted.all()):
            here = counted.nonzero()[:, 0]
            ref, live, owner = ref[here.to(ref.device)], live[here.to(live.device)], owner[here]
        for metric, described in ACTIVATION_METRICS.items():
            self.sums[metric] += probe_sums(described.measure(ref, live), owner, self._num_probes)
        # As a product, which adds in a fixed order on every device, as index_add_ does not.
        member = torch.nn.functional.one_hot(owner.to(ref.device), self._num_probes).to(ref.dtype)
        self.sums["difference"] += member.T @ (live - ref)
        self.sums["counts"] += torch.bincount(owner, minlength=self._num_probes)

    def means(self, metric: str, strata: Strata) -> list[Estimate]:
        """The mean over counted positions in each stratum."""
        return ratio_means(self.sums[metric][None], self.sums["counts"], strata.weights)

    def mean_shifts(self, strata: Strata) -> tuple[Float[Tensor, "stratum width"], list[Estimate]]:
        """mean(h - h_ref) over the counted positions of each stratum, and its norm with its error."""
        difference, counts = self.sums["difference"].cpu(), self.sums["counts"]
        means = (strata.weights @ difference) / (strata.weights @ counts)[:, None]
        norms: Tensor = torch.linalg.vector_norm(means, dim=1)
        along = (means / torch.where(norms > 0, norms, 1.0)[:, None]) @ difference.T
        errors = ratio_means(along, counts, strata.weights)
        return means, [replace(error, value=norm) for error, norm in zip(errors, norms.tolist(), strict=True)]


def _evenly_spaced(positions: Int[Tensor, " pos"], limit: int) -> Int[Tensor, " some"]:
    if len(positions) <= limit:
        return positions
    return positions[torch.linspace(0, len(positions) - 1, limit, dtype=torch.float64).round().long()]
