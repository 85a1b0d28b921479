"""The one object that a training loop holds: it looks when something is due and hands on what it found."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from diffsensor.actions import Response
from diffsensor.capture import Capture, FrozenWeights, leave_no_trace, random_states_kept, require_same_context
from diffsensor.errors import CaptureError, ConfigError, ReferenceMismatchError
from diffsensor.gate import Gate
from diffsensor.noise_floor import measured_floor, with_floor
from diffsensor.oversight import Oversight
from diffsensor.probes import ProbeSet, checksum_of
from diffsensor.protocols import Budget, Controller, Fold, OutputHead, Rule, Schedule, Sensor, Sink
from diffsensor.record import MANIFEST, Record, read_manifest, read_record
from diffsensor.reference import Reference, require_fitting
from diffsensor.rules import Invariant
from diffsensor.schedules import every
from diffsensor.sensors import Activations, Outputs, resolve_sensors
from diffsensor.sinks import LogAlerts
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import FIXED_BANK, Alert, Fault, Findings, MetricInfo, Plan, Reading, Scope, Verdict

logger = logging.getLogger(__name__)


@final
class Monitor:
    """Reads a live model against its reference, and keeps what it read.

        with Monitor(probes, record="runs/1/drift", schedule=every(50)) as monitor:
            for step, batch in enumerate(batches):
                monitor.observe(model, step)   # before the update: the first reading is that of step 0
                ...

    Whatever can be checked is checked when a model is first seen. After that nothing in here ends a run: a
    sensor or sink that fails is logged with its traceback once, counted in `failures`, and left out.

    Where the readings are to be watched, rules are given; where the run is to be steered, responses, a gate or a
    budget, and a controller that says what the run can do:

        control = LoopController(model, optimizer)
        monitor = Monitor(probes, rules=[Response(Limit("kl_ref_live", above=0.5), Stop())], controller=control)

    Arguments:
        probes: the fixed inputs.
        reference: what the reference answered; or the reference model, or its directory or name, which is then
            asked once. None asks the model at its first sight (with adapters off).
        sensors: "light", "full", or a list of names and sensors.
        record: the run's directory, where readings, token tables and vectors are kept. None keeps nothing.
        schedule: the steps at which `observe` looks.
        sinks: further places where findings go, after the record.
        hookpoints: "auto" for at most 8 evenly spaced blocks, or names and globs; a given reference has its own.
        cache_dir: where references are kept, `diffsensor.reference.cache_directory()` by default.
        model_path: where in the observed module the language model is, needed only where there are several.
        log_text: False keeps the text of probes and tokens out of every sink.
        bank: what these probes are called in readings and log keys, to tell several monitors of a run apart.
        resume: go on with the record that is there, against the reference that it was begun with.
        rules: rules and responses (rules with their actions). `Invariant()` alone where none are given.
        gate: what a checkpoint must meet; see `verdict`.
        budget: keeps the drift near a limit by moving the coefficient of the controller's KL penalty.
        controller: what the run lets actions ask for. The callbacks for trainers bring their own.
        sealed: these readings may alert a person, and no action is ever driven by them.
        progress: the names of what `observe` will be told, so that rules may look at it.
        recipe: what identifies the way of training, in plain types; pilots must have the same.
        noise_floor: whether to measure, when first attached and at the price of three readings, by how much the
            same weights read differently in another batch split.
    """

    def __init__(
        self,
        probes: ProbeSet,
        reference: Reference | nn.Module | str | os.PathLike[str] | None = None,
        *,
        sensors: str | Sequence[str | Sensor] = "light",
        record: str | os.PathLike[str] | None = None,
        schedule: Schedule | None = None,
        sinks: Sequence[Sink] = (),
        hookpoints: str | Sequence[str] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        model_path: str | None = None,
        log_text: bool = True,
        bank: str = FIXED_BANK,
        resume: bool = False,
        rules: Sequence[Rule | Response] | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        controller: Controller | None = None,
        sealed: bool = False,
        progress: Sequence[str] = (),
        recipe: Mapping[str, object] | None = None,
        noise_floor: bool = True,
    ) -> None:
        _require_arguments(probes, schedule, hookpoints)
        _require_parts(rules, sinks, controller)
        self.probes = probes
        self.reference = reference if isinstance(reference, Reference) else None
        self.sensors = resolve_sensors(sensors)
        self.schedule: Schedule = every(50) if schedule is None else schedule
        self.failures: dict[str, int] = {}
        #: What was read last, and what rules told of it.
        self.readings: list[Reading] = []
        self.alerts: list[Alert] = []
        self.controller = controller
        self._oversight = Oversight([Invariant()] if rules is None else rules, gate, budget, contain=self._count)
        self._oversight.refuse_sealed(self.metrics, bank_is_sealed=sealed)
        self._sealed, self._progress, self._recipe = sealed, tuple(progress), dict(recipe or {})
        self._measures_floor = noise_floor
        self._floor: dict[str, float] | None = None
        self._frozen: FrozenWeights | None = None
        self._plan_checksum = ""
        self._told: set[tuple[str, str, int]] = set()
        self._findings: Findings | None = None
        self._verdict: Verdict | None = None
        self._passes = True  # the model at the last verdict, so that a change of it is told
        self._record_path = None if record is None else Path(record)
        self._record: Record | None = None
        self._sinks: tuple[Sink, ...] = (LogAlerts(), *sinks)
        self._hookpoints, self._model_path, self._cache_dir = hookpoints, model_path, cache_dir
        self._log_text = log_text
        self._resume = resume
        self._fingerprint: str | None = None
        self._seen: tuple[nn.Module, Capture] | None = None
        self._last_step = -1
        self._reference_model = None if isinstance(reference, Reference) else reference
        self._bank = bank
        if self.reference is not None:
            _require_same_probes(self.reference.probes, probes)
        if resume and record is None:
            raise ConfigError("resume=True was given without a record. Name the record that is to be gone on with.")

    def attach(self, model: nn.Module) -> None:
        """Look at a model for the first time: find what is needed, get the reference, refuse what cannot work.

        To be called under the autocast and on the device that later readings have; `observe` and `read` do it
        where it has not been done.
        """
        if not isinstance(model, nn.Module):
            raise CaptureError(f"The model given is a {type(model).__name__}, expected a torch.nn.Module.")
        resume = self._resume and self._resumes_record()
        if self.reference is None:
            fingerprint = self._fingerprint or (self._recorded_fingerprint() if resume else None)
            if fingerprint is not None:
                self.reference = Reference.find(fingerprint, self.probes, self._cache_dir)
            elif self._reference_model is not None:
                self.reference = self._ask_another(self._reference_model, model)
            else:
                self.reference = Reference.build(
                    model, self.probes, self._cache_dir, self._hookpoints, model_path=self._model_path
                )
        elif self._fingerprint is not None and self.reference.fingerprint != self._fingerprint:
            raise ReferenceMismatchError(
                f"The run that goes on is compared with the reference {self._fingerprint[:12]}; given was "
                f"{self.reference.fingerprint[:12]}. Give the reference that the run began with, or begin a new run."
            )
        capture = Capture(model, self.reference.hookpoints, self._model_path)
        require_fitting(self.probes, capture)
        with leave_no_trace(capture.root):
            capture.try_out(self.probes.first(), is_text=self.probes.is_text)
            require_same_context(self.reference.context, capture.context())
        _require_same_vocabulary(self.reference, capture.head())
        _require_readable(self.sensors, self.reference, capture)
        scope = self._scope()
        self._oversight.check(scope, self.controller)
        if self._record is None and self._record_path is not None:
            self._record = Record(self._record_path, manifest=self._manifest(), resume=resume)
            if resume and self._fingerprint is None and (state := self._record.read_state()) is not None:
                self.load_state_dict(state)
            if resume:
                alerts = read_record(self._record_path).alerts
                self._told = {(alert.rule, alert.subject, alert.step) for alert in alerts}
        self._plan_checksum = checksum_of(self.reference.plan)
        if self._oversight.looks_at_faults and self._frozen is None:
            self._frozen = FrozenWeights(capture.root)
        if self._measures_floor and self._floor is None:
            reference = self.reference
            self._floor = measured_floor(lambda plan: self._look(capture, reference, plan, -1)[0], reference.plan)
        self._seen = (model, capture)
        self._oversight.begin(self.controller)
        self._act()  # what was left to be done when the run was killed

    def _ask_another(self, other: nn.Module | str | os.PathLike[str], live: nn.Module) -> Reference:
        """The reference from another model, under the circumstances of the live one."""
        capture = Capture(live, (), self._model_path)
        require_fitting(self.probes, capture)
        with leave_no_trace(capture.root):
            capture.try_out(self.probes.first(), is_text=self.probes.is_text)
        if not isinstance(other, nn.Module):
            from diffsensor.loading import load_causal_lm

            # Whether one head will do for both is decided by whether the live one trains.
            with random_states_kept():  # loading draws numbers for weights that the files may lack
                other = load_causal_lm(other, like=capture.root).requires_grad_(capture.trains_head)
        with capture.autocast_seen():
            return Reference.build(other, self.probes, self._cache_dir, self._hookpoints)

    @property
    def last_step(self) -> int:
        """The last step that was read, -1 where none was."""
        return self._last_step

    def is_due(self, step: int) -> bool:
        """Whether `observe` would look at this step: the schedule says so, and it is not the one read last.

        An earlier step is read again: a run that goes on from an older checkpoint takes the place of what came after.
        """
        return step != self._last_step and self.schedule(step)

    def observe(self, model: nn.Module, step: int, **progress: float | Tensor) -> list[Reading]:
        """Look if something is due, else do nothing. Returns the new readings.

        What the loop says of its progress (`loss=loss, lr=...`: numbers, or tensors of one) is kept beside the
        readings of the same step, as readings of a sensor "progress" in the unit in which it was given.
        """
        self._require_progress(progress)
        if self._resume and self._seen is None:
            self.attach(model)  # only now it is known which step was read last
        if step < self._last_step:
            self._last_step = -1  # the run has gone back, and what it reads now takes the place of what came after
        if self.is_due(step):
            return self.read(model, step, **progress)
        self.alerts = []
        return []

    def read(self, model: nn.Module, step: int, **progress: float | Tensor) -> list[Reading]:
        """Look now. Leaves no trace on the model."""
        self._require_progress(progress)
        if self._seen is None or self._seen[0] is not model:
            self.attach(model)
        assert self._seen is not None and self.reference is not None
        capture = self._seen[1]
        findings, failed = self._look(capture, self.reference, self.reference.plan, step)
        for name, error in failed:
            self._count(name, error)
        if not self._log_text:  # before any rule sees it, whose alerts are told in its words
            findings = findings.without_text()
        told = [_progress_reading(step, name, value, self._bank) for name, value in progress.items()]
        findings = replace(
            findings,
            readings=(*(with_floor(reading, self._floor or {}) for reading in findings.readings), *told),
            faults=self._faults(capture, self.reference, failed),
        )
        findings = self._oversight.judge(findings, self._told)
        self._last_step, self._findings = step, findings
        self._verdict = None  # the one before was on other weights, though it may have been on the same step
        self.readings, self.alerts = list(findings.readings), list(findings.alerts)
        self._hand_on(findings)
        self._act()
        return list(self.readings)

    def verdict(self, model: nn.Module, step: int) -> Verdict:
        """Whether the model as it is now, after `step` steps, may be released: what the gate says of its readings.

        Reads it first where this step was not read. The verdict goes to the record and to the sinks.
        """
        gate = self._oversight.gate
        if gate is None:
            raise ConfigError("A verdict was asked for, and this monitor has no gate: Monitor(..., gate=Gate(...)).")
        if self._verdict is not None and self._verdict.step == step == self._last_step:
            return self._verdict
        if self._findings is None or step != self._last_step:
            self.read(model, step)
        assert self._findings is not None
        self._verdict = self._oversight.verdict(gate, self._findings)
        if (passes := self._verdict.outcome == "pass") != self._passes:
            self._passes = passes
            told = "passes the gate again" if passes else f"does not pass the gate ({self._verdict.outcome})"
            logger.warning("step %d: the model %s. %s", step, told, self._verdict.reason)
        self._hand_on(Findings(step=step, verdicts=(self._verdict,)))
        return self._verdict

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """What the sensors read, by metric name."""
        return {name: info for sensor in self.sensors for name, info in sensor.metrics.items()}

    def is_sealed(self, reading: Reading) -> bool:
        """Whether no action may be driven by this reading: it must not be put where another one could act on it."""
        info = self.metrics.get(reading.metric)
        by_rule = reading.metric in self._oversight.sealed_evidence
        return self._sealed or by_rule or (info is not None and info.sealed)

    def _act(self) -> None:
        """Carry out what the last look calls for, each request on record with what became of it."""
        if not self._oversight.has_to_act:
            return
        self._oversight.act(self.controller, lambda taken: self._hand_on(Findings(step=taken.step, actions=(taken,))))
        self._store_state()

    def _look(
        self, capture: Capture, reference: Reference, plan: Plan, step: int
    ) -> tuple[Findings, list[tuple[str, Exception]]]:
        """What the sensors find, and what failed meanwhile."""
        found: list[Findings] = []
        failed: list[tuple[str, Exception]] = []

        def contained(name: str, act: Callable[[], object]) -> bool:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - contained is the promise; it is counted and logged
                failed.append((name, error))
                return False
            return True

        with leave_no_trace(capture.root):
            folds: dict[str, Fold] | None = None
            try:
                for piece in capture.pieces(plan):
                    if folds is None:  # and not once more where all have failed: they would see a part only
                        folds, head = {}, capture.head()
                        for sensor in self.sensors:
                            contained(sensor.name, partial(_open_into, folds, sensor, reference, head))
                    for name in list(folds):
                        if not contained(name, partial(folds[name].update, piece)):
                            del folds[name]
            except Exception as error:  # noqa: BLE001 - whatever the model raises, the run goes on
                failed.append(("forward pass", error))
                folds = {}
            for name, fold in (folds or {}).items():
                contained(name, partial(_finish_into, found, fold, step))
        findings = Findings(
            step=step,
            readings=tuple(replace(reading, bank=self._bank) for each in found for reading in each.readings),
            token_shifts=tuple(replace(shift, bank=self._bank) for each in found for shift in each.token_shifts),
            tensors={name: tensor for each in found for name, tensor in each.tensors.items()},
            by_probe={name: values for each in found for name, values in each.by_probe.items()},
        )
        return findings, failed

    def _faults(
        self, capture: Capture, reference: Reference, failed: Sequence[tuple[str, Exception]]
    ) -> tuple[Fault, ...]:
        faults = [
            Fault(kind="sensor", subject=name, detail=f"{name} failed ({type(error).__name__}: {error})")
            for name, error in failed
        ]
        if self._frozen is not None:
            try:
                moved = self._frozen.moved(capture.root)
            except Exception as error:  # noqa: BLE001 - contained like a sensor
                self._count("frozen weights", error)
                detail = f"the frozen weights could not be read ({type(error).__name__}: {error})"
                moved, faults = [], [*faults, Fault(kind="sensor", subject="frozen weights", detail=detail)]
            faults += [
                Fault(kind="frozen", subject=name, detail=f"the parameter {name} does not train, and has moved")
                for name in moved
            ]
        if differences := reference.context.differences(capture.context()):
            detail = f"the circumstances are not those of the reference ({'; '.join(differences)})"
            faults.append(Fault(kind="fingerprint", subject="context", detail=detail))
        if checksum_of(reference.plan) != self._plan_checksum:
            faults.append(Fault(kind="fingerprint", subject="probes", detail="the probes in memory have changed"))
        return tuple(faults)

    def _scope(self) -> Scope:
        assert self.reference is not None
        names = self.probes.group_names
        counts = {name: self.probes.groups.count(name) for name in names}
        return Scope(
            metrics=self.metrics,
            groups=counts,
            group_of=tuple(self.probes.groups),
            hookpoints=tuple(self.reference.hookpoints),
            progress=self._progress,
            bank=self._bank,
            sealed=self._sealed,
            probes=self.probes.fingerprint,
            reference=self.reference.fingerprint,
            schedule=repr(self.schedule),
            recipe=self._recipe,
        )

    def _require_progress(self, progress: Mapping[str, float | Tensor]) -> None:
        """Raise unless each is a number under a name of its own. Does not look at its value, which may be on a GPU."""
        for name, value in progress.items():
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                told = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ConfigError(f"observe was given {name}={told}, expected a number, or a tensor of one.")
            if any(name in sensor.metrics for sensor in self.sensors):
                raise ConfigError(f"observe was given {name!r}, which is a metric's name. Give it another one.")

    def _hand_on(self, findings: Findings) -> None:
        empty = Findings(step=findings.step, by_probe=findings.by_probe, faults=findings.faults)
        if findings == empty:
            return
        for sink in ((self._record,) if self._record is not None else ()) + self._sinks:
            self._contained(type(sink).__name__, partial(sink.write, findings))
        self._store_state()

    def _store_state(self) -> None:
        if self._record is not None:
            record = self._record
            self._contained("Record", lambda: record.write_state(self.state_dict()))

    def _contained(self, name: str, act: Callable[[], object]) -> bool:
        """Do it, and should it fail, log that once, count it and go on. Tells whether it worked."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - contained is the promise; _count logs it with its traceback
            self._count(name, error)
            return False
        return True

    def _count(self, name: str, error: Exception) -> None:
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] == 1:
            logger.error("%s failed and is left out of this reading; the run goes on. %s", name, error, exc_info=error)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, in plain types."""
        fingerprint = self._fingerprint if self.reference is None else self.reference.fingerprint
        return {
            "reference": fingerprint,
            "probes": self.probes.fingerprint,
            "last_step": self._last_step,
            "failures": dict(self.failures),
            "noise_floor": self._floor,
            "oversight": self._oversight.state_dict(),
            "verdict": None if self._verdict is None else asdict(self._verdict),
            "gate": self._criteria(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that state was taken: same reference, same record. To be called before a model is seen."""
        if state["probes"] != self.probes.fingerprint:
            raise ReferenceMismatchError(
                f"The run that goes on has the probe set {state['probes'][:12]}; given was "
                f"{self.probes.fingerprint[:12]}. Use the same probes (and tokenizer), or begin a new run."
            )
        self._fingerprint = state["reference"]
        self._last_step = state["last_step"]
        self.failures = dict(state["failures"])
        self._floor = state["noise_floor"]
        self._oversight.load_state_dict(state["oversight"])
        # Of another gate it says nothing.
        is_ours = state["verdict"] is not None and state["gate"] == self._criteria()
        self._verdict = Verdict(**state["verdict"]) if is_ours else None
        self._resume = True

    def _criteria(self) -> list[str]:
        return [] if self._oversight.gate is None else [each.name for each in self._oversight.gate.criteria]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file, as a whole or not at all, to be put beside a checkpoint."""
        store(Path(path), json_bytes(Path(path).stem, self.state_dict()))

    def load(self, path: str | os.PathLike[str]) -> None:
        """`load_state_dict` from a file that `save` wrote. Raises `CorruptFileError` where it has changed."""
        self.load_state_dict(read_json(Path(path)))

    def close(self) -> None:
        """Close the record and the sinks. Reading again opens the record where it ended."""
        for sink in ((self._record,) if self._record is not None else ()) + self._sinks:
            self._contained(type(sink).__name__, sink.close)
        if self._record is not None:
            self._record, self._seen, self._resume = None, None, True

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _resumes_record(self) -> bool:
        """Whether there is a record to go on with. A run that goes on elsewhere, by its checkpoint, has none yet."""
        if self._record_path is None:
            return False
        return (self._record_path / MANIFEST).exists() or self._fingerprint is None

    def _recorded_fingerprint(self) -> str:
        assert self._record_path is not None
        return str(read_manifest(self._record_path)["reference"])

    def _manifest(self) -> dict[str, object]:
        assert self.reference is not None
        return {
            "diffsensor": version("diffsensor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "reference": self.reference.fingerprint,
            "probes": self.probes.fingerprint,
            "num_probes": len(self.probes),
            "num_positions": self.reference.plan.num_positions,
            "groups": list(self.probes.group_names),
            "hookpoints": list(self.reference.hookpoints),
            "sensors": [sensor.name for sensor in self.sensors],
            "schedule": repr(self.schedule),
            "recipe": self._recipe,
            "rules": [rule.name for rule in self._oversight.rules],
            "sealed": self._sealed,
            "context": asdict(self.reference.context),
            "metrics": {name: asdict(info) for name, info in self.metrics.items()},
        }


def _require_arguments(probes: object, schedule: object, hookpoints: object) -> None:
    if not isinstance(probes, ProbeSet):
        raise ConfigError(
            f"probes is a {type(probes).__name__}, expected a probe set: ProbeSet.from_texts(texts, tokenizer), or "
            "ProbeSet.default(tokenizer)."
        )
    if schedule is not None and not callable(schedule):
        raise ConfigError(f"schedule={schedule!r} was given, expected a function of the step, such as every(50).")
    if not isinstance(hookpoints, Sequence):
        raise ConfigError(f"hookpoints={hookpoints!r} was given, expected 'auto' or a sequence of names and globs.")


def _require_parts(rules: object, sinks: object, controller: object) -> None:
    if rules is not None and not isinstance(rules, Sequence):
        raise ConfigError(f"rules={rules!r} was given, expected a list of rules and responses: rules=[Limit(...)].")
    if not isinstance(sinks, Sequence):
        raise ConfigError(f"sinks={sinks!r} was given, expected a list of sinks: sinks=[Webhook(...)].")
    for sink in sinks:
        if not isinstance(sink, Sink) or isinstance(sink, type):
            hint = " Did you mean Calls(function)?" if callable(sink) else ""
            raise ConfigError(f"sinks holds {sink!r}, which has no write(findings) and close().{hint}")
    if controller is not None and not isinstance(controller, Controller):
        raise ConfigError(
            f"controller is a {type(controller).__name__}, expected what says what the run can do: "
            "LoopController(model, optimizer)."
        )


def _open_into(folds: dict[str, Fold], sensor: Sensor, reference: Reference, head: OutputHead) -> None:
    folds[sensor.name] = sensor.open(reference, head)


def _finish_into(found: list[Findings], fold: Fold, step: int) -> None:
    found.append(fold.finish(step))


def _progress_reading(step: int, name: str, value: float | Tensor, bank: str) -> Reading:
    number = float(value.detach() if isinstance(value, Tensor) else value)
    return Reading(step=step, sensor="progress", metric=name, value=number, unit="as given", bank=bank)


def _require_readable(sensors: Sequence[Sensor], reference: Reference, capture: Capture) -> None:
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


def _require_same_probes(theirs: ProbeSet, ours: ProbeSet) -> None:
    if theirs.fingerprint != ours.fingerprint:
        raise ReferenceMismatchError(
            f"The reference was computed for the probe set {theirs.fingerprint[:12]}; given was "
            f"{ours.fingerprint[:12]}. Use the same probes (and tokenizer), or build a reference for these."
        )


def _require_same_vocabulary(reference: Reference, head: OutputHead) -> None:
    there = reference.token_mass().shape[1]
    if head.vocab_size != there:
        raise ReferenceMismatchError(
            f"The reference has {there} output tokens, the live model {head.vocab_size}. Tokens cannot be compared "
            "across vocabularies: use a reference with the live model's vocabulary, resized in the same way."
        )
