"""How far the model's next-token distributions have moved, and which tokens it prefers now."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffsensor.errors import ConfigError
from diffsensor.head import full_precision
from diffsensor.metrics.outputs import (
    KL_P95,
    KL_WORST1,
    MASS_MOVED,
    MAX_TOKEN_GAIN,
    OUTPUT_METRICS,
    OutputMetric,
)
from diffsensor.metrics.tiles import FullPass, LightPass, Sums, on_grid, tiles
from diffsensor.protocols import OutputHead, ReferenceAnswers
from diffsensor.sensors.means import probe_sums, readings_of
from diffsensor.sensors.tails import quantile, worst_mean
from diffsensor.sensors.token_table import token_table
from diffsensor.statistics import Estimate, ratio_means, strata_of
from diffsensor.types import Cost, Findings, MetricInfo, Piece, Reading, TokenShift

logger = logging.getLogger(__name__)


class Outputs:
    """Drift of the outputs and the token table, in one of two cost classes.

    `light`: KL(reference || live), change of NLL and entropy, top-1 flips, mass moved, largest token gain. With
    a frozen linear head this needs the live head alone. `full` adds the reverse KL, JS, TV and the tails of
    the KL, from both heads. Blind to what no probe brings up.
    """

    def __init__(self, cost: Cost = "light") -> None:
        if cost not in ("light", "full"):
            raise ConfigError(f"Outputs was given cost={cost!r}, expected 'light' or 'full'.")
        self.cost: Cost = cost
        self.name = "outputs" if cost == "light" else "outputs_full"

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        infos = [metric.info for metric in self.output_metrics]
        tails = (KL_P95, KL_WORST1) if self.cost == "full" else ()
        return {info.name: info for info in (*infos, MASS_MOVED, MAX_TOKEN_GAIN, *tails)}

    @property
    def output_metrics(self) -> tuple[OutputMetric, ...]:
        return tuple(metric for metric in OUTPUT_METRICS.values() if metric.cost == "light" or self.cost == "full")

    def open(self, reference: ReferenceAnswers, live_head: OutputHead) -> "OutputsFold":
        return OutputsFold(self, reference, live_head)


class OutputsFold:
    """One reading of `Outputs` while it is being taken."""

    def __init__(self, sensor: Outputs, reference: ReferenceAnswers, live_head: OutputHead) -> None:
        self._sensor, self._reference, self._live_head = sensor, reference, live_head
        self._ref_head = reference.head_beside(live_head)
        self._metrics = sensor.output_metrics
        self._strata = strata_of(reference.probes)
        if bool((reference.plan.target < 0).any()):
            self._metrics = tuple(metric for metric in self._metrics if metric.info.name != "nll_change")
        self._folds = {metric.info.name: metric.fold for metric in self._metrics if metric.fold is not None}
        self._sums: dict[str, Tensor] = {}
        self._light: LightPass | None = None
        self._full: FullPass | None = None

    def update(self, piece: Piece) -> None:
        device = piece.hidden.device
        if not self._sums:
            self._sums = self._empty(device)
            self._begin(device)
        with full_precision(device):
            for start, stop in tiles(len(piece.hidden), self._shape_rows()):
                self._compare(piece.hidden[start:stop], piece.positions.start + start)
        self._sums["hidden"][piece.positions] = piece.hidden

    def _empty(self, device: torch.device) -> dict[str, Tensor]:
        """A row for each position of what is read at each, and the sums over positions."""
        num_positions, vocab_size = self._reference.plan.num_positions, self._live_head.vocab_size
        names = [metric.info.name for metric in self._metrics] + ["max_gain", "log_ratio"]
        sums = {name: torch.zeros(num_positions, dtype=torch.float64, device=device) for name in names}
        hidden = self._reference.rows(slice(0, 1), device).hidden
        sums["hidden"] = hidden.new_zeros(num_positions, hidden.shape[1])
        strata = (len(self._strata.names), vocab_size)
        sums["mass"] = torch.zeros(strata, dtype=torch.float64, device=device)
        if not self._live_head.is_linear:
            sums["logits"] = torch.zeros(strata, dtype=torch.float64, device=device)
        return sums

    def _begin(self, device: torch.device) -> None:
        one_is_enough = (
            self._ref_head is self._live_head
            and self._live_head.is_linear
            and self._reference.rows(slice(0, 1), device).mean_unembedding is not None
        )
        if self._sensor.cost == "full":
            self._full = FullPass(self._ref_head, self._live_head, device)
        else:
            self._light = LightPass(self._live_head, device, None if one_is_enough else self._ref_head)

    def _shape_rows(self) -> int:
        part = self._light or self._full
        assert part is not None
        return part.shape.rows

    def _compare(self, hidden: Float[Tensor, "pos dim"], start: int) -> None:
        positions = slice(start, start + len(hidden))
        ref = self._reference.rows(positions, hidden.device)
        strata = self._reference.strata(positions, hidden.device)
        logits = self._sums.get("logits")
        if self._light is not None:
            sums, mass = self._light.compare(hidden, ref, strata, logits)
        else:
            assert self._full is not None
            sums, mass = self._full.compare(hidden, ref, strata, self._folds, logit_sums=logits)
        self._sums["mass"] += on_grid(mass, self._strata.grid)
        for name, values in self._of_each_position(sums).items():
            self._sums[name][positions] = values

    def _of_each_position(self, sums: Sums) -> dict[str, Float[Tensor, " pos"]]:
        found = {metric.info.name: metric.finish(sums) for metric in self._metrics}
        found |= {"max_gain": sums.max_gain, "log_ratio": sums.log_ratio}
        return {name: values for name, values in found.items() if values is not None}

    def sums(self) -> Mapping[str, Tensor]:
        if self._light is not None:
            self._light.forget()
        return self._sums or self._empty(torch.device("cpu"))

    def finish(self, step: int, sums: Mapping[str, Tensor]) -> Findings:
        values, hidden = dict(sums), sums["hidden"]
        mass, logits = values.pop("mass"), values.pop("logits", None)
        del values["hidden"]
        name, reference = self._sensor.name, self._reference
        owner, num_probes = reference.plan.probe, len(reference.probes.names)
        counts = torch.bincount(owner, minlength=num_probes)
        readings: list[Reading] = []
        by_probe: dict[str, Tensor] = {}
        for metric in self._metrics:
            totals = probe_sums(values[metric.info.name], owner, num_probes)
            by_probe[metric.info.name] = totals / counts
            means = ratio_means(totals[None], counts, self._strata.weights)
            readings += readings_of(means, metric.info, self._strata, sensor=name, step=step)
        if self._sensor.cost == "full":
            kl = values["kl_ref_live"].cpu()
            for info, tail in ((KL_P95, quantile), (KL_WORST1, worst_mean)):
                estimates = [tail(kl, owner, weights, num_probes) for weights in self._strata.weights]
                readings += readings_of(estimates, info, self._strata, sensor=name, step=step)
        moved = self._mass_moved(mass)
        readings += self._mass_readings(moved, step)
        readings += self._gain_readings(values, hidden, step)
        shifts: tuple[TokenShift, ...] = ()
        not_numbers = ~torch.stack([*values.values()]).isfinite().all(0)
        if bool(not_numbers.any()):
            logger.warning(
                "The live model's answers at step %d are not numbers (NaN or infinite) at %d of %d positions, first in "
                "probe %r; its readings are NaN where they should be a number. Look at the loss and the learning rate.",
                step,
                int(not_numbers.sum()),
                len(not_numbers),
                reference.probes.names[int(reference.plan.probe[int(not_numbers.nonzero()[0])])],
            )
        else:
            with full_precision(hidden.device):
                shifts = token_table(
                    reference=reference,
                    ref_head=self._ref_head,
                    live_head=self._live_head,
                    hidden=hidden,
                    mass_moved=moved,
                    logit_sums=logits,
                    log_ratio=values["log_ratio"],
                    step=step,
                )
        return Findings(step=step, readings=tuple(readings), token_shifts=shifts, by_probe=by_probe)

    def _mass_moved(self, mass: Float[Tensor, "stratum vocab"]) -> Float[Tensor, "stratum vocab"]:
        """mean(p) - mean(q) over the counted positions of each stratum."""
        everywhere = slice(0, self._reference.plan.num_positions)
        total = self._reference.strata(everywhere, mass.device).sum(1, keepdim=True)
        summed = mass if self._sensor.cost == "full" else mass - self._reference.token_mass().to(mass.device)
        return summed / total

    def _mass_readings(self, moved: Float[Tensor, "stratum vocab"], step: int) -> list[Reading]:
        values = (moved.abs().sum(1) / 2).tolist()
        return readings_of(self._without_error(values), MASS_MOVED, self._strata, sensor=self._sensor.name, step=step)

    def _gain_readings(
        self, values: Mapping[str, Tensor], hidden: Float[Tensor, "pos dim"], step: int
    ) -> list[Reading]:
        everywhere = slice(0, self._reference.plan.num_positions)
        members = self._reference.strata(everywhere, hidden.device) > 0
        gains = limits = values["max_gain"]
        if self._sensor.cost == "light":
            gains, limits = self._search_gains(limits, hidden, members)
        largest, bounds = [], []
        for member in members:
            if not bool(member.any()) or bool(values["max_gain"][member].isnan().any()):
                largest.append(math.nan)
                bounds.append(0.0)
            else:
                largest.append(float(gains[member].clamp_min(0).amax()))
                bounds.append(max(float(limits[member].amax()) - largest[-1], 0.0))
        return readings_of(
            self._without_error(largest),
            MAX_TOKEN_GAIN,
            self._strata,
            sensor=self._sensor.name,
            step=step,
            bounds=bounds,
        )

    def _without_error(self, values: Sequence[float]) -> list[Estimate]:
        numbers = (self._strata.weights > 0).sum(1).tolist()
        return [
            Estimate(value=value, stderr=math.nan, num_probes=number)
            for value, number in zip(values, numbers, strict=True)
        ]

    def _search_gains(
        self, limits: Float[Tensor, " pos"], hidden: Float[Tensor, "pos dim"], members: Tensor
    ) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
        """The gain at the positions where it may be largest, 0 elsewhere; and what it may be at most.

        Looks at the most promising positions of all probes and of each group, one in 64 in all.
        """
        limits = limits.nan_to_num(nan=0.0, posinf=1.0)
        budget = max(8, len(limits) // 64)
        each = max(1, budget // len(members))
        promising = torch.cat([(limits * member).topk(min(each, len(limits))).indices for member in members]).unique()
        promising = promising[limits[promising] > 0]
        gains = torch.zeros_like(limits)
        everywhere = slice(0, self._reference.plan.num_positions)
        ref_hidden = self._reference.rows(everywhere, torch.device("cpu")).hidden[promising.cpu()].to(hidden.device)
        # Small portions: two rows of the vocabulary for each position.
        for start, stop in tiles(len(promising), 16):
            some = promising[start:stop]
            gains[some] = self._gains(hidden[some], ref_hidden[start:stop])
        limits = limits.clone()
        limits[promising] = gains[promising]
        return gains, limits

    def _gains(
        self, hidden: Float[Tensor, "some dim"], ref_hidden: Float[Tensor, "some dim"]
    ) -> Float[Tensor, " some"]:
        """The largest p - q at each of some positions."""
        size = self._live_head.vocab_size
        with full_precision(hidden.device):
            if self._ref_head is self._live_head:
                # One product for both: so few rows cost what reading the head's weights does.
                p, q = self._live_head.logits(torch.cat([hidden, ref_hidden]), 0, size).softmax(1).split(len(hidden))
            else:
                p = self._live_head.logits(hidden, 0, size).softmax(1)
                q = self._ref_head.logits(ref_hidden, 0, size).softmax(1)
        gain: Tensor = (p - q).amax(1)
        return gain.double()
