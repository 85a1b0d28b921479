"""A drift budget: how far the model may move, kept by moving the coefficient of a KL penalty."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, final

from diffsensor.errors import ConfigError, unknown
from diffsensor.types import ALL_PROBES, FIXED_BANK, WORST_GROUP, Findings, Reading, Scope

#: The relative error is cut off here: ten times the budget pulls no harder than twice.
_LARGEST_ERROR = 1.0


@final
class DriftBudget:
    """Keeps a reading near `limit`, by PI control on the logarithm of a KL penalty's coefficient.

        e = reading / limit - 1, cut to [-1, 1]
        log coefficient = log start + kp * e + ki * (the sum of all e so far)

    The coefficient stays within [lowest, highest] and moves by at most `max_factor` at one reading. What it cannot
    follow is not added to the sum (anti-windup), so that it turns at once when the reading does. A look at which the
    metric was not read, or is no number, changes nothing.

    The penalty is of training batches and the reading of the probes, so this holds a budget only as far as both move
    together; and it holds the mean near the limit, not below it: leave room where the limit must never be passed.
    Where the learning rate decays to next to nothing, the model cannot use a budget that is given back late, and ends
    below it.

    Arguments:
        limit: the budget, in the unit of the metric; nats per token for "kl_ref_live".
        metric: a distance that is 0 where nothing moved, read on the outputs.
        kp, ki: how hard it reacts to the error now, and to all that was; per reading.
        start: the coefficient before anything was read. The reading of step 0, which is 0, lowers it by `max_factor`.
        lowest, highest: the coefficient's range.
        max_factor: by how much it may rise or fall at one reading.
        group: one group of the probes, or "worst"; all probes by default.

    Raises `ConfigError` for numbers that mean nothing here; what needs the monitor is checked by `check`.
    """

    def __init__(
        self,
        limit: float,
        *,
        metric: str = "kl_ref_live",
        kp: float = 0.6,
        ki: float = 0.15,
        start: float = 1.0,
        lowest: float = 1e-4,
        highest: float = 1e2,
        max_factor: float = 1.5,
        group: str = ALL_PROBES,
    ) -> None:
        for name, value, low in (
            ("limit", limit, 0.0), ("kp", kp, -1.0), ("ki", ki, 0.0), ("start", start, 0.0), ("lowest", lowest, 0.0),
            ("highest", highest, 0.0), ("max_factor", max_factor, 1.0),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, Real) or not low < value < math.inf:
                raise ConfigError(
                    f"The drift budget was given {name}={value!r}. Give a number of more than {max(low, 0.0):g}."
                )
        if kp < 0:
            raise ConfigError(f"The drift budget was given kp={kp!r}. Give a number of at least 0.")
        if not lowest <= start <= highest:
            raise ConfigError(
                f"The drift budget was given start={start!r}, which is not between lowest={lowest!r} and "
                f"highest={highest!r}. Begin with a coefficient that it may have."
            )
        self.limit, self.metric, self.group = float(limit), metric, group
        self._kp, self._ki, self._start = float(kp), float(ki), float(start)
        self._range = math.log(lowest), math.log(highest)
        self._largest_move = math.log(max_factor)
        self._bank = FIXED_BANK
        self._sum = 0.0
        self._log = math.log(start)
        self._reading = math.nan

    @property
    def name(self) -> str:
        where = f", group={self.group!r}" if self.group != ALL_PROBES else ""
        return f"DriftBudget({self.limit:g}, metric={self.metric!r}{where})"

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset({self.metric})

    @property
    def coefficient(self) -> float:
        """What the penalty's coefficient should be now."""
        return math.exp(self._log)

    def check(self, scope: Scope) -> None:
        """Raise `ConfigError`, with the closest valid choice, unless this budget can be kept on what will be read."""
        info = scope.metrics.get(self.metric)
        distances = [
            name
            for name, each in scope.metrics.items()
            if each.low == 0 and each.at == "outputs" and not each.sealed and (each.by_group or not self.group)
        ]
        if info is None:
            raise ConfigError(
                f"{self.name} cannot be kept. {unknown('metric that is read here', self.metric, distances)}"
            )
        if info.low != 0 or info.at != "outputs":
            raise ConfigError(
                f"{self.name} cannot be kept: {self.metric} is "
                + ("a change with a sign" if info.low < 0 else "read at each hookpoint")
                + ", and a budget is for a distance that is 0 where nothing moved, read once. "
                + unknown("such metric", self.metric, distances)
            )
        if not self.limit < info.high:
            raise ConfigError(
                f"{self.name} cannot be kept: {self.metric} is in {info.unit} and goes from {info.low:g} to "
                f"{info.high:g}. Give a limit between these."
            )
        if self.group not in (ALL_PROBES, *scope.groups) and not (self.group == WORST_GROUP and scope.groups):
            known = [*scope.groups, WORST_GROUP] if scope.groups else ["(the probes have no groups)"]
            raise ConfigError(f"{self.name} cannot be kept. {unknown('group', self.group, known)}")
        if self.group != ALL_PROBES and not info.by_group:
            raise ConfigError(f"{self.name} cannot be kept: {self.metric} is not read by group. Leave group out.")
        self._bank = scope.bank

    def update(self, findings: Findings) -> float | None:
        """Take in one look. The coefficient to be set, or None where nothing was read that says anything."""
        read = [
            reading.value
            for reading in findings.readings
            if reading.metric == self.metric and reading.group == self.group and math.isfinite(reading.value)
        ]
        if not read:
            return None
        error = min(max(read[0] / self.limit - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
        wanted = math.log(self._start) + self._kp * error + self._ki * (self._sum + error)
        low = max(self._range[0], self._log - self._largest_move)
        high = min(self._range[1], self._log + self._largest_move)
        self._log = min(max(wanted, low), high)
        if (self._log - wanted) * error >= 0:
            # Else it is as far as it may go where the error pushes, and a longer sum would only hold it there.
            self._sum += error
        self._reading = read[0]
        return self.coefficient

    def evidence(self, step: int) -> Reading:
        """The coefficient as a reading, for the record."""
        note = "" if math.isnan(self._reading) else f"{self.metric} is {self._reading:.4g}, the budget {self.limit:g}"
        return Reading(
            step=step,
            sensor="drift_budget",
            metric="kl_coefficient",
            value=self.coefficient,
            unit="nats of loss per nat of KL",
            bank=self._bank,
            scale="log",
            note=note,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, in plain types."""
        return {
            "sum": self._sum,
            "log_coefficient": self._log,
            "reading": None if math.isnan(self._reading) else self._reading,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._log = float(state["sum"]), float(state["log_coefficient"])
        self._reading = math.nan if state["reading"] is None else float(state["reading"])
