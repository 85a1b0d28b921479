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
from diffsensor.capture import (
    Capture,
    FrozenWeights,
    checksum_of_replica,
    leave_no_trace,
    random_states_kept,
    require_same_context,
    require_temperature,
)
from diffsensor.checksums import digest
from diffsensor.contextual import ContextualBank
from diffsensor.errors import CaptureError, ConfigError, RanksError, ReferenceMismatchError, listed
from diffsensor.gate import Gate
from diffsensor.look import Failure, look_at, told_of
from diffsensor.noise_floor import measured_floor, with_floor
from diffsensor.oversight import Oversight
from diffsensor.probes import ProbeSet, RollingProbes, checksum_of
from diffsensor.protocols import Budget, Controller, Rule, Schedule, Sensor, Sink, Teller
from diffsensor.ranks import Due, Ranks, mean_of
from diffsensor.record import MANIFEST, Record, read_manifest, read_record
from diffsensor.reference import Reference, require_fitting
from diffsensor.requirements import (
    require_alike,
    require_arguments,
    require_parts,
    require_readable,
    require_same_probes,
    require_same_temperature,
    require_same_vocabulary,
)
from diffsensor.rules import Invariant
from diffsensor.schedules import every
from diffsensor.sensors import resolve_sensors
from diffsensor.sinks import LogAlerts
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, parse_json, read_json
from diffsensor.types import FIXED_BANK, ActionTaken, Alert, Fault, Findings, MetricInfo, Plan, Reading, Scope, Verdict

logger = logging.getLogger(__name__)

#: Under which name the state is a text, in what holds the states of others too.
_STATE = "monitor"
#: What the first process tells the others of a look: what it found, what failed, and the state of its oversight.
_Told = tuple[Findings, list[str], list[dict[str, Any]]]


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
        probes: the fixed inputs; or rolling ones, drawn at each look from what was offered to them, for which the
            reference is asked at each look, too.
        reference: what the reference answered; or the reference model, or its directory or name, which is then
            asked once. None asks the model at its first sight (with adapters off). For rolling probes None is the
            model with its adapter off, and where it has none a frozen copy of it, one more set of weights.
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
        tellers: what tells more of the loop at each look, with unit and meaning. Callbacks bring their own.
        recipe: what identifies the way of training, in plain types; pilots must have the same.
        noise_floor: whether to measure, when first attached and at the price of three readings, by how much the
            same weights read differently in another batch split.
        temperature: what logits are divided by before they are compared: that at which a policy samples, where its
            distributions are to be read as it uses them. A given reference must have been built at the same.

    In a run of several processes (torch.distributed) every one of them makes a monitor with the same arguments and
    calls it at the same steps. They share the probes of each look; the first one decides and writes, and all of them
    get the same readings, alerts, verdicts and actions.
    """

    def __init__(
        self,
        probes: ProbeSet | RollingProbes,
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
        tellers: Sequence[Teller] = (),
        recipe: Mapping[str, object] | None = None,
        noise_floor: bool = True,
        temperature: float = 1.0,
    ) -> None:
        require_arguments(probes, schedule, hookpoints)
        require_temperature(temperature)
        require_parts(rules, sinks, controller, tellers)
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
        self._contextual = _contextual(probes, reference, bank)
        self._tellers = (*tellers, *([] if self._contextual is None else [self._contextual]))
        if twice := sorted(name for teller in self._tellers for name in teller.metrics if name in self.metrics):
            raise ConfigError(f"A teller tells {twice[0]!r}, which a sensor reads. Give it another name.")
        self._oversight.refuse_sealed(self._known, bank_is_sealed=sealed)
        self._sealed, self._progress, self._recipe = sealed, tuple(progress), dict(recipe or {})
        self._measures_floor = noise_floor
        self._temperature = temperature
        self._ranks = Ranks()
        self._due = Due(self.schedule)
        self._is_out = False  # the processes lost each other
        self._floor: dict[str, float] | None = None
        self._frozen: FrozenWeights | None = None
        self._plan_checksum = ""
        self._told: set[tuple[str, str, int]] = set()
        self._findings: Findings | None = None
        self._verdict: Verdict | None = None
        self._outcome = "pass"  # of the last verdict, so that a change of it is told
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
        if self.reference is not None and isinstance(probes, ProbeSet):
            require_same_probes(self.reference.probes, probes)
        if resume and record is None:
            raise ConfigError("resume=True was given without a record. Name the record that is to be gone on with.")

    def attach(self, model: nn.Module) -> None:
        """Look at a model for the first time: find what is needed, get the reference, refuse what cannot work.

        To be called under the autocast and on the device that later readings have; `observe` and `read` do it
        where it has not been done.
        """
        if not isinstance(model, nn.Module):
            raise CaptureError(f"The model given is a {type(model).__name__}, expected a torch.nn.Module.")
        self._ranks = Ranks.now()
        self._ranks.together("attach", lambda: self._attach(model))
        self._act()  # what was left to be done when the run was killed

    def _attach(self, model: nn.Module) -> None:
        ranks = self._ranks
        # Before anything that they do together: the model may be one that runs in all processes or in none.
        require_alike(ranks.each("arguments", self._arguments()))
        resume, fingerprint = ranks.told("run to go on with", self._to_go_on_with)
        if self._contextual is not None:
            self.reference = self._trial_of(self._contextual, model, fingerprint)
        elif self.reference is None:
            assert isinstance(self.probes, ProbeSet)
            if fingerprint is not None:
                self.reference = Reference.find(fingerprint, self.probes, self._cache_dir)
            elif self._reference_model is not None:
                self.reference = self._ask_another(self._reference_model, model, self.probes)
            else:
                self.reference = Reference.build(
                    model,
                    self.probes,
                    self._cache_dir,
                    self._hookpoints,
                    model_path=self._model_path,
                    temperature=self._temperature,
                )
        elif self._fingerprint is not None and self.reference.fingerprint != self._fingerprint:
            raise ReferenceMismatchError(
                f"The run that goes on is compared with the reference {self._fingerprint[:12]}; given was "
                f"{self.reference.fingerprint[:12]}. Give the reference that the run began with, or begin a new run."
            )
        require_alike(ranks.each("reference", {"reference": self.reference.fingerprint[:12]}))
        require_same_temperature(self.reference, self._temperature)
        capture = Capture(model, self.reference.hookpoints, self._model_path, temperature=self._temperature)
        probes = self.reference.probes
        require_fitting(probes, capture)
        with leave_no_trace(capture.root):
            capture.try_out(probes.first(), is_text=probes.is_text)
            require_same_context(self.reference.context, capture.context())
            require_same_vocabulary(self.reference, capture.head())
            require_readable(self.sensors, self.reference, capture)
        self._oversight.speaks = ranks.is_first
        self._oversight.check(self._scope(), self.controller)
        if self._record_path is not None:
            state = ranks.told("state", partial(self._open_record, self._record_path, resume))
            if state is not None:
                self._go_on(state)
        self._plan_checksum = checksum_of(self.reference.plan)
        if self._oversight.looks_at_faults and self._frozen is None:
            self._frozen = FrozenWeights(capture.root)
        if self._contextual is None:
            self._measure_floor(capture, self.reference)
        self._seen = (model, capture)
        self._oversight.begin(self.controller)

    def _trial_of(self, bank: ContextualBank, model: nn.Module, fingerprint: str | None) -> Reference:
        """What the reference of a contextual bank says to a trial; it must be the one that the run began with."""
        trial = bank.begin(
            model, hookpoints=self._hookpoints, model_path=self._model_path, temperature=self._temperature
        )
        before = fingerprint or (None if self.reference is None else self.reference.fingerprint)
        if before not in (None, trial.fingerprint):
            raise ReferenceMismatchError(
                f"The run that goes on is compared with the reference {before[:12]}; the one at hand is "
                f"{trial.fingerprint[:12]}. A copy of the model that the run began with is not kept: give that model, "
                "Monitor(RollingProbes(...), reference=<model, or its directory>), or begin a new run."
            )
        return trial

    def _measure_floor(self, capture: Capture, reference: Reference) -> None:
        if self._measures_floor and self._floor is None:
            floor = measured_floor(lambda plan: self._look(capture, reference, plan, -1)[0], reference.plan)
            self._floor = self._ranks.told("noise floor", lambda: floor)

    def _arguments(self) -> dict[str, str]:
        """What must be the same in all processes, in words that can be compared."""
        oversight = self._oversight
        return {
            "probes": self.probes.fingerprint[:12],
            "reference": "none" if self.reference is None else self.reference.fingerprint[:12],
            "sensors": listed(sensor.name for sensor in self.sensors),
            "hookpoints": str(self._hookpoints),
            "temperature": str(self._temperature),
            "bank": self._bank,
            "rules": listed(rule.name for rule in oversight.rules),
            "gate": listed(self._criteria()),
            "budget": "none" if oversight.budget is None else "one",
            "noise_floor": str(self._measures_floor),
            "record": "none" if self._record_path is None else "one",
            "resume": str(self._resume),
            "state": "none" if self._fingerprint is None else digest(self.state_dict()[_STATE])[:12],
        }

    def _to_go_on_with(self) -> tuple[bool, str | None]:
        """Whether there is a record to go on with, and the reference of the run that goes on."""
        resume = self._resume and self._resumes_record()
        return resume, self._fingerprint or (self._recorded_fingerprint() if resume else None)

    def _open_record(self, path: Path, resume: bool) -> dict[str, Any] | None:
        """Open the record where it is not open yet. Gives the state that is to be gone on with, from there."""
        if self._record is not None:
            return None
        self._record = Record(path, manifest=self._manifest(), resume=resume)
        if not resume:
            return None
        self._told = {(alert.rule, alert.subject, alert.step) for alert in read_record(path).alerts}
        return self._record.read_state() if self._fingerprint is None else None

    def _ask_another(self, other: nn.Module | str | os.PathLike[str], live: nn.Module, probes: ProbeSet) -> Reference:
        """The reference from another model, under the circumstances of the live one."""
        capture = Capture(live, (), self._model_path)
        require_fitting(probes, capture)
        with leave_no_trace(capture.root):
            capture.try_out(probes.first(), is_text=probes.is_text)
        if not isinstance(other, nn.Module):
            from diffsensor.loading import load_causal_lm

            # Whether one head will do for both is decided by whether the live one trains.
            with random_states_kept():  # loading draws numbers for weights that the files may lack
                other = load_causal_lm(other, like=capture.root).requires_grad_(capture.trains_head)
        with capture.autocast_seen():
            return Reference.build(other, probes, self._cache_dir, self._hookpoints, temperature=self._temperature)

    @property
    def last_step(self) -> int:
        """The last step that was read, -1 where none was."""
        return self._last_step

    @property
    def is_out(self) -> bool:
        """Whether the processes of this run have lost each other, so that nothing is read any more."""
        return self._is_out

    def is_due(self, step: int) -> bool:
        """Whether `observe` would look at this step: the schedule says so, and it is not the one read last.

        An earlier step is read again: a run that goes on from an older checkpoint takes the place of what came after.
        The first process decides, and says so ahead: all of them ask, at the same steps.
        """
        if self._is_out:
            return False
        try:
            return step != self._last_step and self._due.at(step)
        except RanksError as error:
            if self._seen is None:
                raise
            self._leave(error)
            return False

    def observe(self, model: nn.Module, step: int, **progress: float | Tensor) -> list[Reading]:
        """Look if something is due, else do nothing. Returns the new readings.

        What the loop says of its progress (`loss=loss, lr=...`: numbers, or tensors of one) is kept beside the
        readings of the same step, as readings of a sensor "progress" in the unit in which it was given.
        """
        self._require_progress(progress)
        if self._is_out:
            return []
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
        if self._is_out:
            return []
        if self._seen is None or self._seen[0] is not model:
            self.attach(model)
        try:
            findings = self._read(step, progress)
        except RanksError as error:
            self._leave(error)
            return []
        self._last_step, self._findings = step, findings
        self._verdict = None  # the one before was on other weights, though it may have been on the same step
        self.readings, self.alerts = list(findings.readings), list(findings.alerts)
        self._hand_on(findings)
        try:
            self._act()
            self._share_failures()
        except RanksError as error:
            self._leave(error)
        return list(self.readings)

    def _read(self, step: int, progress: Mapping[str, float | Tensor]) -> Findings:
        """Look, and judge what was found, in the first process; the others are told of it."""
        assert self._seen is not None and self.reference is not None
        capture, ranks = self._seen[1], self._ranks
        if self._contextual is None:
            findings, failures = self._look(capture, self.reference, self.reference.plan, step)
        else:
            findings, failures = self._look_at_bank(self._contextual, capture, step)
        numbers = {name: _number(value) for name, value in progress.items()}
        faults, found = self._faults(capture, self.reference)
        replica = "" if ranks.size == 1 or capture.holding.is_shared else checksum_of_replica(capture.root)
        reports = ranks.each("faults", (numbers, faults, [each._replace(error=None) for each in found], replica))

        def judged() -> _Told:
            # A process may have nothing to tell of what the others do, such as a loss.
            numbers_told: dict[str, list[float]] = {}
            for theirs, *_ in reports:
                for name, number in theirs.items():
                    numbers_told.setdefault(name, []).append(number)
            told = [_progress_reading(step, name, mean_of(each), self._bank) for name, each in numbers_told.items()]
            known = [
                Fault(kind="sensor", subject=each.name, detail=f"{each.name} failed ({each.told})") for each in failures
            ]
            known += dict.fromkeys(fault for _, theirs, *_ in reports for fault in theirs)
            known += _replica_faults([each for *_, each in reports])
            full = replace(
                # Without text before any rule sees it, whose alerts are told in its words.
                findings if self._log_text else findings.without_text(),
                readings=(*(with_floor(reading, self._floor or {}) for reading in findings.readings), *told),
                faults=tuple(known),
            )
            full = self._oversight.judge(self._with_told(full), self._told)
            states: list[dict[str, Any]] = []
            if ranks.size > 1:
                self._contained("state", lambda: states.append(self._watching()))
            return full, [each.name for each in failures], states

        findings, failed, states = ranks.told("reading", judged)
        if not ranks.is_first:
            for state in states:
                self._watch(state)
        errors = {each.name: each.error for each in (*failures, *found)}
        for name in dict.fromkeys([*failed, *(each.name for _, _, theirs, _ in reports for each in theirs)]):
            self._count(name, errors.get(name))
        return findings

    def _leave(self, error: RanksError) -> None:
        """The processes have lost each other: there are no more readings, and nothing passes a gate."""
        self._is_out, self.readings, self.alerts, self._verdict = True, [], [], None
        logger.error("%s Nothing is read any more in this run, which goes on; a gate passes nothing.", error)

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
        if self._is_out or self._findings is None:
            return gate.unread(step)
        findings = self._findings
        try:
            verdict = self._verdict = self._ranks.told("verdict", lambda: self._oversight.verdict(gate, findings))
            if verdict.outcome != self._outcome:
                self._outcome = verdict.outcome
                if self._ranks.is_first:
                    passes = verdict.outcome == "pass"
                    told = "passes the gate again" if passes else f"does not pass the gate ({verdict.outcome})"
                    logger.warning("step %d: the model %s. %s", step, told, verdict.reason)
            self._hand_on(Findings(step=step, verdicts=(verdict,)))
            self._share_failures()
        except RanksError as error:
            self._leave(error)
            return gate.unread(step)
        return verdict

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """What the sensors read, by metric name."""
        return {name: info for sensor in self.sensors for name, info in sensor.metrics.items()}

    @property
    def _known(self) -> dict[str, MetricInfo]:
        """What is read, and what is told beside it."""
        return self.metrics | {name: info for teller in self._tellers for name, info in teller.metrics.items()}

    def is_sealed(self, reading: Reading) -> bool:
        """Whether no action may be driven by this reading: it must not be put where another one could act on it."""
        info = self._known.get(reading.metric)
        by_rule = reading.metric in self._oversight.sealed_evidence
        return self._sealed or by_rule or (info is not None and info.sealed)

    def _act(self) -> None:
        """Carry out what the last look calls for, each request on record with what became of it."""
        if not self._oversight.has_to_act:
            return
        self._oversight.act(self.controller, self._act_told)
        self._store_state()

    def _act_told(self, taken: ActionTaken) -> None:
        """Every process has done the same; put on record what became of it, and where it went otherwise."""
        outcomes = self._ranks.each(taken.action, (taken.outcome, taken.detail))
        for rank, (outcome, detail) in enumerate(outcomes):
            if outcome != outcomes[0][0]:
                taken = replace(taken, outcome="failed", detail=f"{taken.detail}; process {rank}: {outcome}, {detail}")
        self._hand_on(Findings(step=taken.step, actions=(taken,)))

    def _look(self, capture: Capture, reference: Reference, plan: Plan, step: int) -> tuple[Findings, list[Failure]]:
        return look_at(capture, reference, self.sensors, plan, step=step, bank=self._bank, ranks=self._ranks)

    def _look_at_bank(self, bank: ContextualBank, capture: Capture, step: int) -> tuple[Findings, list[Failure]]:
        """A look at what the bank holds now; nothing is read where that is nothing."""
        findings, (reference, failures) = Findings(step=step), bank.answers(self._ranks)
        if reference is not None:
            self._measure_floor(capture, reference)
            findings, failures = self._look(capture, reference, reference.plan, step)
        # The drift of single probes stands with their names; to a rule they would look like the same ones every time.
        return replace(findings, bank_probes=bank.listed(findings, self._bank), by_probe={}), failures

    def _faults(self, capture: Capture, reference: Reference) -> tuple[list[Fault], list[Failure]]:
        """What this process sees that must not be, and whether it failed to look."""
        faults: list[Fault] = []
        failures: list[Failure] = []
        if self._frozen is not None:
            try:
                moved = self._frozen.moved(capture.root)
            except Exception as error:  # noqa: BLE001 - contained like a sensor
                failures = [Failure("frozen weights", told_of(error), error)]
                detail = f"the frozen weights could not be read ({told_of(error)})"
                moved, faults = [], [Fault(kind="sensor", subject="frozen weights", detail=detail)]
            faults += [
                Fault(kind="frozen", subject=name, detail=f"the parameter {name} does not train, and has moved")
                for name in moved
            ]
        if differences := reference.context.differences(capture.context()):
            detail = f"the circumstances are not those of the reference ({'; '.join(differences)})"
            faults.append(Fault(kind="fingerprint", subject="context", detail=detail))
        if checksum_of(reference.plan) != self._plan_checksum:
            faults.append(Fault(kind="fingerprint", subject="probes", detail="the probes in memory have changed"))
        return faults, failures

    def _scope(self) -> Scope:
        assert self.reference is not None
        is_rolling = isinstance(self.probes, RollingProbes)
        return Scope(
            metrics=self.metrics,
            groups=self.probes.group_sizes,
            group_of=() if is_rolling else tuple(self.probes.groups),
            is_rolling=is_rolling,
            hookpoints=tuple(self.reference.hookpoints),
            progress=(*self._progress, *(name for teller in self._tellers for name in teller.metrics)),
            bank=self._bank,
            sealed=self._sealed,
            probes=self.probes.fingerprint,
            reference=self.reference.fingerprint,
            schedule=repr(self.schedule),
            recipe=self._recipe,
        )

    def _with_told(self, findings: Findings) -> Findings:
        """The findings with what is told beside them."""
        told: list[Reading] = []
        for teller in self._tellers:
            self._contained(teller.name, partial(_tell_into, told, teller, findings))
        return replace(findings, readings=(*findings.readings, *(replace(each, bank=self._bank) for each in told)))

    def _require_progress(self, progress: Mapping[str, float | Tensor]) -> None:
        """Raise unless each is a number under a name of its own. Does not look at its value, which may be on a GPU."""
        for name, value in progress.items():
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                told = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ConfigError(f"observe was given {name}={told}, expected a number, or a tensor of one.")
            if name in self._known:
                raise ConfigError(f"observe was given {name!r}, which is a metric's name. Give it another one.")

    def _hand_on(self, findings: Findings) -> None:
        empty = Findings(step=findings.step, by_probe=findings.by_probe, faults=findings.faults)
        if findings == empty or not self._ranks.is_first:
            return
        for sink in ((self._record,) if self._record is not None else ()) + self._sinks:
            self._contained(type(sink).__name__, partial(sink.write, findings))
        self._store_state()

    def _store_state(self) -> None:
        if self._record is not None:
            record = self._record
            self._contained("Record", lambda: record.write_state(self._state()))

    def _contained(self, name: str, act: Callable[[], object]) -> bool:
        """Do it, and should it fail, log that once, count it and go on. Tells whether it worked."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - contained is the promise; _count logs it with its traceback
            self._count(name, error)
            return False
        return True

    def _share_failures(self) -> None:
        """What failed in one process, such as a sink in the first one, is known to all: their states are the same."""
        for theirs in self._ranks.each("failures", self.failures):
            self.failures |= {name: max(count, self.failures.get(name, 0)) for name, count in theirs.items()}

    def _count(self, name: str, error: Exception | None) -> None:
        """Count a failure, and log the first one; of those that befell another process, that one tells."""
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] == 1 and error is not None:
            logger.error("%s failed and is left out of this reading; the run goes on. %s", name, error, exc_info=error)

    def state_dict(self) -> dict[str, str]:
        """What a run that goes on needs: one text, the same in all processes, that shows when it was changed.

        One, because torch.distributed.checkpoint loads only what is there already: into a new monitor, that has not
        seen a model yet, it could not load the state of each rule.
        """
        return {_STATE: json_bytes(_STATE, self._state()).decode()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on where that state was taken: same reference, same record. To be called before a model is seen."""
        if _STATE not in state:
            raise ConfigError(f"The state given holds {listed(state)}, expected what Monitor.state_dict() gave.")
        self._go_on(parse_json(Path("the monitor's state"), state[_STATE].encode(), _STATE))

    @property
    def last_verdict(self) -> Verdict | None:
        """The verdict on the weights that were read last, where there was one; also of a run that goes on."""
        return self._verdict

    def _state(self) -> dict[str, Any]:
        """In plain types."""
        fingerprint = self._fingerprint if self.reference is None else self.reference.fingerprint
        return {
            "reference": fingerprint,
            "probes": self.probes.fingerprint,
            "last_step": self._last_step,
            "failures": dict(self.failures),
            "noise_floor": self._floor,
            **self._watching(),
            "verdict": None if self._verdict is None else asdict(self._verdict),
            "gate": self._criteria(),
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        if state["probes"] != self.probes.fingerprint:
            raise ReferenceMismatchError(
                f"The run that goes on has the probe set {state['probes'][:12]}; given was "
                f"{self.probes.fingerprint[:12]}. Use the same probes (and tokenizer), or begin a new run."
            )
        self._fingerprint = state["reference"]
        self._last_step = state["last_step"]
        self.failures = dict(state["failures"])
        self._floor = state["noise_floor"]
        self._watch(state)
        # Of another gate it says nothing.
        is_ours = state["verdict"] is not None and state["gate"] == self._criteria()
        self._verdict = Verdict(**state["verdict"]) if is_ours else None
        self._resume = True

    def _watching(self) -> dict[str, Any]:
        """The state of what judges a look, and of what tells beside it."""
        tellers = {teller.name: teller.state_dict() for teller in self._tellers}
        return {"oversight": self._oversight.state_dict(), "tellers": tellers}

    def _watch(self, state: Mapping[str, Any]) -> None:
        self._oversight.load_state_dict(state["oversight"])
        for teller in self._tellers:
            if teller.name in state["tellers"]:
                teller.load_state_dict(state["tellers"][teller.name])

    def _criteria(self) -> list[str]:
        return [] if self._oversight.gate is None else [each.name for each in self._oversight.gate.criteria]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, as a whole or not at all, to be put beside a checkpoint.

        Of several processes the first one writes; it need not be called by the others.
        """
        if self._ranks.is_first:
            store(Path(path), json_bytes(Path(path).stem, self._state()))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where a file says that `save` wrote. Raises `CorruptFileError` where it has changed."""
        self._go_on(read_json(Path(path)))

    def let_go(self) -> None:
        """Hold the model no longer, so that its memory can be had for the next one; that one is looked at anew."""
        self._seen, self._frozen = None, None

    def close(self) -> None:
        """Close the record and the sinks. Reading again opens the record where it ended."""
        for sink in ((self._record,) if self._record is not None else ()) + self._sinks:
            self._contained(type(sink).__name__, sink.close)
        if self._record is not None or (self._record_path is not None and self._seen is not None):
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
            **_described(self.probes),
            "groups": list(self.probes.group_sizes),
            "hookpoints": list(self.reference.hookpoints),
            "sensors": [sensor.name for sensor in self.sensors],
            "schedule": repr(self.schedule),
            "recipe": self._recipe,
            "rules": [rule.name for rule in self._oversight.rules],
            "sealed": self._sealed,
            "context": asdict(self.reference.context),
            "temperature": self.reference.temperature,
            "processes": self._ranks.size,
            "metrics": {name: asdict(info) for name, info in self._known.items()},
        }


def _contextual(probes: ProbeSet | RollingProbes, reference: object, bank: str) -> ContextualBank | None:
    """What answers for probes that roll; None for fixed ones."""
    if not isinstance(probes, RollingProbes):
        return None
    if bank == FIXED_BANK:
        raise ConfigError(
            "The probes roll, and their bank is named 'fixed', as banks are whose readings compare from look to look "
            "on the same texts. Give it another name: Monitor(RollingProbes(...), bank='contextual')."
        )
    if isinstance(reference, Reference):
        raise ConfigError(
            "The probes roll, and the reference given has answers to fixed ones. Give the reference model itself, or "
            "its directory; or leave it out, so that the adapter is switched off or a frozen copy made."
        )
    assert reference is None or isinstance(reference, nn.Module | str | os.PathLike)
    return ContextualBank(probes, reference)


def _described(probes: ProbeSet | RollingProbes) -> dict[str, object]:
    """For the manifest: how many probes there are, or how those come about that are others at each look."""
    if isinstance(probes, ProbeSet):
        return {"num_probes": len(probes), "num_positions": probes.num_positions, "rolling": None}
    return {"num_probes": None, "num_positions": None, "rolling": probes.described}


def _tell_into(told: list[Reading], teller: Teller, findings: Findings) -> None:
    told += teller.tell(findings)


def _progress_reading(step: int, name: str, value: float, bank: str) -> Reading:
    return Reading(step=step, sensor="progress", metric=name, value=value, unit="as given", bank=bank)


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _replica_faults(checksums: Sequence[str]) -> list[Fault]:
    others = [str(rank) for rank, each in enumerate(checksums) if each != checksums[0]]
    if not others:
        return []
    who = "process {} of {} holds" if len(others) == 1 else "processes {} of {} hold"
    detail = f"{who.format(listed(others), len(checksums))} other weights"
    return [Fault(kind="replicas", subject="weights", detail=f"{detail} than process 0, which all should share")]
