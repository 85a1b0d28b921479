"""What is read: sensors on outputs and on activations. To add one: a file, a test and a line here."""

from collections.abc import Callable, Sequence

from diffsensor.errors import ConfigError, unknown
from diffsensor.protocols import Sensor
from diffsensor.sensors.activations import Activations as Activations
from diffsensor.sensors.outputs import Outputs as Outputs
from diffsensor.sensors.sealed import Sealed as Sealed

#: Sensors by the name that a configuration gives them.
SENSORS: dict[str, Callable[[], Sensor]] = {
    "outputs": Outputs,
    "outputs_full": lambda: Outputs("full"),
    "activations": Activations,
}
#: What the two cost classes stand for.
COST_CLASSES: dict[str, tuple[str, ...]] = {
    "light": ("outputs", "activations"),
    "full": ("outputs_full", "activations"),
}


def resolve_sensors(wanted: str | Sequence[str | Sensor]) -> tuple[Sensor, ...]:
    """The sensors meant by "light", "full", or a list of names and sensors."""
    if isinstance(wanted, str):
        if wanted not in COST_CLASSES:
            raise ConfigError(unknown("set of sensors", wanted, COST_CLASSES))
        wanted = COST_CLASSES[wanted]
    sensors = tuple(_named(part) if isinstance(part, str) else part for part in wanted)
    if not sensors:
        raise ConfigError("No sensor was given. Expected 'light', 'full' or a list of sensors.")
    names = [sensor.name for sensor in sensors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"The sensor {twice[0]!r} was given twice. Give each sensor once.")
    metrics = [metric for sensor in sensors for metric in sensor.metrics]
    if twice := sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        raise ConfigError(
            f"Two sensors read the metric {twice[0]!r}: {', '.join(names)}. "
            "Give only one of them ('full' holds what 'light' has)."
        )
    return sensors


def _named(name: str) -> Sensor:
    if name not in SENSORS:
        owners = [sensor for sensor, make in SENSORS.items() if name in make().metrics]
        hint = f" {name!r} is a metric of the sensor {owners[0]!r}." if owners else ""
        raise ConfigError(unknown("sensor", name, SENSORS) + hint)
    return SENSORS[name]()
