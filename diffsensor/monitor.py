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

from diffsensor.capture import Capture, leave_no_trace, random_states_kept, require_same_context
from diffsensor.errors import CaptureError, ConfigError, ReferenceMismatchError
from diffsensor.probes import ProbeSet
from diffsensor.protocols import Fold, OutputHead, Schedule, Sensor, Sink
from diffsensor.record import MANIFEST, Record, read_manifest
from diffsensor.reference import Reference, require_fitting
from diffsensor.schedules import every
from diffsensor.sensors import Activations, Outputs, resolve_sensors
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import FIXED_BANK, Findings, Reading

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
    ) -> None:
        _require_arguments(probes, schedule, hookpoints)
        self.probes = probes
        self.reference = reference if isinstance(reference, Reference) else None
        self.sensors = resolve_sensors(sensors)
        self.schedule: Schedule = every(50) if schedule is None else schedule
        self.failures: dict[str, int] = {}
        #: What was read last.
        self.readings: list[Reading] = []
        self._record_path = None if record is None else Path(record)
        self._record: Record | None = None
        self._sinks = tuple(sinks)
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
        if self._record is None and self._record_path is not None:
            self._record = Record(self._record_path, manifest=self._manifest(), resume=resume)
            if resume and self._fingerprint is None and (state := self._record.read_state()) is not None:
                self.load_state_dict(state)
        self._seen = (model, capture)

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
        return self.read(model, step, **progress) if self.is_due(step) else []

    def read(self, model: nn.Module, step: int, **progress: float | Tensor) -> list[Reading]:
        """Look now. Leaves no trace on the model."""
        self._require_progress(progress)
        if self._seen is None or self._seen[0] is not model:
            self.attach(model)
        assert self._seen is not None and self.reference is not None
        findings = self._look(self._seen[1], self.reference, step)
        if progress:
            told = [_progress_reading(step, name, value, self._bank) for name, value in progress.items()]
            findings = replace(findings, readings=(*findings.readings, *told))
        self._last_step = step
        self.readings = list(findings.readings)
        self._hand_on(findings)
        return list(self.readings)

    def _look(self, capture: Capture, reference: Reference, step: int) -> Findings:
        found: list[Findings] = []
        with leave_no_trace(capture.root):
            folds: dict[str, Fold] | None = None
            try:
                for piece in capture.pieces(reference.plan):
                    if folds is None:  # and not once more where all have failed: they would see a part only
                        folds = self._opened(reference, capture.head())
                    for name in list(folds):
                        if not self._contained(name, partial(folds[name].update, piece)):
                            del folds[name]
            except Exception as error:  # noqa: BLE001 - whatever the model raises, the run goes on
                self._count("forward pass", error)
                folds = {}
            for name, fold in (folds or {}).items():
                self._contained(name, partial(_finish_into, found, fold, step))
        return Findings(
            step=step,
            readings=tuple(replace(reading, bank=self._bank) for each in found for reading in each.readings),
            token_shifts=tuple(replace(shift, bank=self._bank) for each in found for shift in each.token_shifts),
            tensors={name: tensor for each in found for name, tensor in each.tensors.items()},
        )

    def _require_progress(self, progress: Mapping[str, float | Tensor]) -> None:
        """Raise unless each is a number under a name of its own. Does not look at its value, which may be on a GPU."""
        for name, value in progress.items():
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                told = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ConfigError(f"observe was given {name}={told}, expected a number, or a tensor of one.")
            if any(name in sensor.metrics for sensor in self.sensors):
                raise ConfigError(f"observe was given {name!r}, which is a metric's name. Give it another one.")

    def _opened(self, reference: Reference, head: OutputHead) -> dict[str, Fold]:
        folds: dict[str, Fold] = {}
        for sensor in self.sensors:
            self._contained(sensor.name, partial(_open_into, folds, sensor, reference, head))
        return folds

    def _hand_on(self, findings: Findings) -> None:
        if not (findings.readings or findings.token_shifts or findings.tensors):
            return
        if not self._log_text:
            findings = findings.without_text()
        for sink in ((self._record,) if self._record is not None else ()) + self._sinks:
            self._contained(type(sink).__name__, partial(sink.write, findings))
        if self._record is not None:
            record = self._record
            self._contained("Record", partial(record.write_state, self.state_dict()))

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
        self._resume = True

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
            "context": asdict(self.reference.context),
            "metrics": {name: asdict(info) for sensor in self.sensors for name, info in sensor.metrics.items()},
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
