"""What a monitor refuses before anything is read: arguments that mean nothing, and parts that do not fit each other."""

from collections.abc import Mapping, Sequence

from diffsensor.capture import Capture
from diffsensor.errors import ConfigError, ReferenceMismatchError
from diffsensor.probes import ProbeSet, RollingProbes
from diffsensor.protocols import Controller, OutputHead, Sensor, Sink, Teller
from diffsensor.reference import Reference
from diffsensor.sensors import Activations, Outputs


def require_arguments(probes: object, schedule: object, hookpoints: object) -> None:
    if not isinstance(probes, ProbeSet | RollingProbes):
        raise ConfigError(
            f"probes is a {type(probes).__name__}, expected a probe set: ProbeSet.from_texts(texts, tokenizer), or "
            "ProbeSet.default(tokenizer); or RollingProbes(tokenizer), for what the run itself offers."
        )
    if schedule is not None and not callable(schedule):
        raise ConfigError(f"schedule={schedule!r} was given, expected a function of the step, such as every(50).")
    if not isinstance(hookpoints, Sequence):
        raise ConfigError(f"hookpoints={hookpoints!r} was given, expected 'auto' or a sequence of names and globs.")


def require_parts(rules: object, sinks: object, controller: object, tellers: Sequence[object]) -> None:
    if rules is not None and not isinstance(rules, Sequence):
        raise ConfigError(f"rules={rules!r} was given, expected a list of rules and responses: rules=[Limit(...)].")
    if not isinstance(sinks, Sequence):
        raise ConfigError(f"sinks={sinks!r} was given, expected a list of sinks: sinks=[Webhook(...)].")
    for sink in sinks:
        if not isinstance(sink, Sink) or isinstance(sink, type):
            hint = " Did you mean Calls(function)?" if callable(sink) else ""
            raise ConfigError(f"sinks holds {sink!r}, which has no write(findings) and close().{hint}")
    for teller in tellers:
        if not isinstance(teller, Teller) or isinstance(teller, type):
            raise ConfigError(f"tellers holds {teller!r}, which does not tell anything: it has no tell(findings).")
    if controller is not None and not isinstance(controller, Controller):
        raise ConfigError(
            f"controller is a {type(controller).__name__}, expected what says what the run can do: "
            "LoopController(model, optimizer)."
        )


def require_alike(arguments: Sequence[Mapping[str, str]]) -> None:
    """Raise where a process was given something else than the first one: their readings could not be put together."""
    for rank, given in enumerate(arguments):
        if differ := next((name for name in given if given[name] != arguments[0][name]), None):
            raise ConfigError(
                f"The processes of this run disagree about the monitor's {differ}: {arguments[0][differ]!r} in process "
                f"0, {given[differ]!r} in process {rank}. Give all of them the same arguments, and models with the "
                "same weights."
            )


def require_same_temperature(reference: Reference, temperature: float) -> None:
    if reference.temperature != temperature:
        raise ReferenceMismatchError(
            f"The reference was built at temperature {reference.temperature:g}, and is to be read at {temperature:g}. "
            f"Build it with Reference.build(..., temperature={temperature:g}), or leave the monitor's temperature out."
        )


def require_readable(sensors: Sequence[Sensor], reference: Reference, capture: Capture) -> None:
    """Raise where a sensor would read numbers that mean nothing, or none at all."""
    if not capture.gives_distribution and any(isinstance(sensor, Outputs) for sensor in sensors):
        raise ConfigError(
            f"{type(capture.root).__name__} gives no distribution over classes: it gives one value (of which a softmax "
            "is always 1), or its configuration says that it is a regressor or labels independently. Its outputs would "
            "read as unmoved, or mean nothing. Read its activations: sensors=['activations'], with the last layer "
            "among the hookpoints for how far its answers moved."
        )
    if not reference.hookpoints and all(isinstance(sensor, Activations) for sensor in sensors):
        raise ConfigError(
            "Only activations are to be read, and there is no hookpoint. Name some: hookpoints=['layer.name', ...]."
        )


def require_same_probes(theirs: ProbeSet, ours: ProbeSet) -> None:
    if theirs.fingerprint != ours.fingerprint:
        raise ReferenceMismatchError(
            f"The reference was computed for the probe set {theirs.fingerprint[:12]}; given was "
            f"{ours.fingerprint[:12]}. Use the same probes (and tokenizer), or build a reference for these."
        )


def require_same_vocabulary(reference: Reference, head: OutputHead) -> None:
    there = reference.token_mass().shape[1]
    if head.vocab_size != there:
        raise ReferenceMismatchError(
            f"The reference has {there} output tokens, the live model {head.vocab_size}. Tokens cannot be compared "
            "across vocabularies: use a reference with the live model's vocabulary, resized in the same way."
        )
