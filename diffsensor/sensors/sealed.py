"""A sensor that may alert a person, and by which no action is ever driven."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from diffsensor.protocols import Fold, OutputHead, ReferenceAnswers, Sensor
from diffsensor.types import MetricInfo


@final
class Sealed:
    """Another sensor, with all that it reads marked as sealed.

    Responses, gates and budgets on such metrics are refused: what a run is steered by becomes a training target.
    """

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor

    @property
    def name(self) -> str:
        return self._sensor.name

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        return {name: replace(info, sealed=True) for name, info in self._sensor.metrics.items()}

    def open(self, reference: ReferenceAnswers, live_head: OutputHead) -> Fold:
        return self._sensor.open(reference, live_head)
