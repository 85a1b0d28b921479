"""The sink: each look as one row of a W&B run, on the axis of the steps that were read."""

import difflib
import inspect
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, final

import numpy as np

from diffsensor import Alert, ConfigError, DiffSensorError, Findings, Reading, Verdict, log_key

try:
    import wandb
    from wandb.errors import UsageError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("WandbSink needs wandb: pip install 'diffsensor[wandb]'", name=error.name) from error

from diffsensor_wandb.shown import harmless, key_of, short, title_of
from diffsensor_wandb.table import GrowingTable

logger = logging.getLogger(__name__)

#: The axis of all that is logged here.
STEP = "diffsensor/step"
#: The metric whose worst reading of the run is told in its summary, where it is read.
HEADLINE = "kl_ref_live"
TOKENS = ("step", "group", "token", "prefers", "ranked_by", "rank", "mass_moved", "mass_moved_stderr",
          "logit_difference", "context", "probe", "position", "token_id")  # fmt: skip
ALERTS = ("step", "rule", "severity", "subject", "message", "value", "stderr", "threshold", "unit", "first_step")
ACTIONS = ("step", "rule", "action", "outcome", "detail")

_LEVELS: dict[str, Literal["INFO", "WARN", "ERROR"]] = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
#: A run of our own holds what was read, and nothing of the machine or the terminal.
_QUIET = {"console": "off", "silent": True, "save_code": False, "x_disable_stats": True, "x_disable_meta": True}
#: More than so many bins W&B does not take.
_BINS = wandb.Histogram.MAX_LENGTH


class RunError(DiffSensorError, RuntimeError):
    """A W&B run that cannot be opened, or not be written to any more."""


@final
class WandbSink:
    """Writes what is found to a W&B run: the one that is open, or else one of its own.

        DriftMonitorCallback(probes, sinks=[WandbSink()])                  # with report_to="wandb"
        Monitor(probes, sinks=[WandbSink(project="drift", mode="offline")])

    Where Lightning's `WandbLogger`, `report_to="wandb"` or you have opened a run by the first reading, it is joined,
    and left open at the end. Else a run is opened at the first reading and finished when the monitor is closed.

    Each look is a row on the axis `diffsensor/step`, and its histograms and tables another one. The axis may go back
    where a run does. Logged are:

    - `<log key>` and `<log key>/stderr` for readings over all probes, of groups, and at hookpoints (those of single
      groups at single hookpoints are many, and in the record alone); `<log key>/noise_floor` over all probes;
    - `<log key>/limit`, what a reading was compared with, from the first alert or verdict that tells it;
    - `diffsensor/layers/<metric>`: its readings at all hookpoints as one histogram, drawn over time as a heatmap. Bin
      k is the hookpoint k of `diffsensor/hookpoints` in the run's configuration;
    - `diffsensor/tables/tokens`, `.../alerts` and `.../actions`: tables that grow, each row in them once.

    Each alert is a W&B alert too, one for a rule and look, with a title that stays the same for the rule. The summary
    has `diffsensor/gate/verdict` (with `reason` and `step`) and `diffsensor/worst/reading` (with `value`, `stderr` and
    `step`): the largest `kl_ref_live` of any group so far.

    Lightning's own `WandbLogger` logs the readings under the same keys, on its axis `trainer/global_step`; a row is on
    one axis or on the other, so each chart draws each reading once. Transformers logs them as `train/diffsensor/...`.

    What comes from probes and groups is shown as plain text on one line, in keys too: a character that does not print
    becomes an escape, and long text is cut. A monitor of several gets a sink of its own, and a `bank` of its own.

    Nothing in here ends a run: the monitor logs and counts what fails. A run that could not be opened is not tried
    again until the monitor has been closed.

    Arguments:
        run: a run that is open. None takes `wandb.run`, or opens one.
        project: of a run of its own.
        record: the monitor's record, stored as an artifact of the type "drift-record" at the end, with its report
            (`report.html`) where `diffsensor[report]` is installed.
        timeout: seconds that opening and finishing a run of its own may each take.
        init: what else `wandb.init` takes, for a run of its own: entity, name, group, mode, dir, tags, ...
    """

    def __init__(
        self,
        run: wandb.Run | None = None,
        *,
        project: str | None = None,
        record: str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
        **init: Any,
    ) -> None:
        if run is not None and not isinstance(run, wandb.Run):
            raise ConfigError(f"WandbSink was given run={run!r}, expected a W&B run: what wandb.init() returned.")
        own = {"project": project, **init} if project is not None else init
        if run is not None and own:
            raise ConfigError(
                f"WandbSink was given a run and {', '.join(own)}, which only a run of its own can have. Leave out one."
            )
        known = [name for name in inspect.signature(wandb.init).parameters if name != "settings"]
        for name in init:
            if name not in known:
                close = difflib.get_close_matches(name, ["run", "record", "timeout", *known], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"WandbSink was given {name}=..., which wandb.init does not take.{hint}")
        if isinstance(timeout, bool) or not (timeout > 0 and math.isfinite(timeout)):
            raise ConfigError(f"WandbSink was given timeout={timeout!r}, expected seconds above 0.")
        self._given, self._own = run, own
        self._record = None if record is None else Path(record)
        self._timeout = timeout
        self._page: _Page | None = None
        self._refused = ""

    def write(self, findings: Findings) -> None:
        page = self._joined()
        page.take_in(findings)
        _send(page.run, findings.alerts)
        page.log_row(findings)
        if page.summary:
            page.run.summary.update(page.summary)
            page.summary = {}

    def close(self) -> None:
        """Log what waits, store the record, and finish the run if it is ours. Writing again opens or joins one anew."""
        page, self._page, self._refused = self._page, None, ""
        if page is None:
            return
        try:
            page.log_rest()
            if self._record is not None:
                page.run.log_artifact(_artifact(page, self._record))
        except UsageError as error:
            raise RunError(
                f"The W&B run {page.run.id} was finished before the monitor was closed, so it lacks the last rows of "
                "the tables, and the record. Close the monitor first."
            ) from error
        finally:
            if page.is_own:
                page.run.finish()

    def _joined(self) -> "_Page":
        """The page of the run that is open now."""
        if self._page is not None:
            # The trainer may have opened another run since.
            newer = wandb.run if self._given is None and not self._page.is_own else None
            if newer is None or newer is self._page.run:
                return self._page
        open_run = self._given or wandb.run
        if open_run is not None:
            if self._own:
                logger.warning(
                    "WandbSink was given %s for a run of its own, but joins the W&B run %s, which is open already. "
                    "Finish that one first, or leave these out.",
                    *(", ".join(self._own), open_run.id),
                )
            self._page = _Page(run=open_run, is_own=False)
        else:
            self._page = _Page(run=self._opened(), is_own=True)
        return self._page

    def _opened(self) -> wandb.Run:
        if self._refused:
            raise RunError(self._refused)
        timeouts = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), self._timeout)
        known = wandb.Settings.model_fields  # those beginning with x_ may go
        quiet: dict[str, Any] = {name: value for name, value in (_QUIET | timeouts).items() if name in known}
        try:
            run = wandb.init(**self._own, settings=wandb.Settings(**quiet))
        except Exception as error:
            self._refused = (
                f"No W&B run could be opened ({type(error).__name__}: {short(str(error), 300)}). Readings are not "
                "logged to W&B until the monitor is opened again; they are in the record. Log in with `wandb login`, "
                "or give WandbSink(mode='offline') and upload later with `wandb sync`."
            )
            raise RunError(self._refused) from error
        logger.info("Readings go to the W&B run %s (%s).", run.id, run.dir if run.offline else run.url)
        return run


@dataclass(slots=True, kw_only=True)
class _Page:
    """What is known of a run that is written to."""

    run: wandb.Run
    is_own: bool
    bank: str = ""
    step: int = 0
    defined: set[str] = field(default_factory=set)
    tables: dict[str, GrowingTable] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    hookpoints: list[str] = field(default_factory=list)
    worst: float = -1.0
    summary: dict[str, Any] = field(default_factory=dict)

    def name(self, what: str) -> str:
        return key_of(log_key(what, bank=self.bank) if self.bank else f"diffsensor/{what}")

    def take_in(self, findings: Findings) -> None:
        """Note what later looks need too, and what the summary tells."""
        self.step = findings.step
        if findings.readings:
            self.readings, self.bank = findings.readings, findings.readings[0].bank
            self._note_worst()
        told_of: list[Alert | Verdict] = [*findings.alerts, *findings.verdicts]
        for told in told_of:
            decided = _decided(told, self.readings)
            if decided is not None and math.isfinite(told.threshold):
                self.limits[decided.key] = told.threshold
        for verdict in findings.verdicts:
            said = {"verdict": verdict.outcome, "reason": short(verdict.reason), "step": verdict.step}
            self.summary |= {self.name(f"gate/{name}"): value for name, value in said.items()}
        for name, columns, rows in (
            ("tokens", TOKENS, [_row(shift, TOKENS) for shift in findings.token_shifts]),
            ("alerts", ALERTS, [_row(alert, ALERTS) for alert in findings.alerts if not alert.is_repeat]),
            ("actions", ACTIONS, [_row(taken, ACTIONS) for taken in findings.actions]),
        ):
            if rows:
                self.tables.setdefault(self.name(f"tables/{name}"), GrowingTable(columns)).add(rows)

    def log_row(self, findings: Findings) -> None:
        row: dict[str, float] = {}
        shown = [reading for reading in findings.readings if not (reading.group and reading.hookpoint)]
        for reading in shown:
            row |= _curves(reading)
            if (limit := self.limits.get(reading.key)) is not None:
                row[key_of(f"{reading.key}/limit")] = limit
        self._log(row)
        self._configure(shown)
        tables = {name: table.rest() for name, table in self.tables.items() if table.has_rest and table.is_due}
        # In a row of their own: W&B takes them apart, does not know the parts by our names, and gives such a row the
        # axis of the trainer's "*" too.
        self._log(self._layers(shown) | tables)

    def log_rest(self) -> None:
        self._log({name: table.rest() for name, table in self.tables.items() if table.has_rest})

    def _log(self, row: Mapping[str, object]) -> None:
        if not row:
            return
        if not self.defined:
            self.run.define_metric(STEP, hidden=True)
        for name in row.keys() - self.defined:
            # By its exact name, for a pattern loses to the "*" that Lightning and transformers define. Not in step with
            # the axis by itself, or a row that they log under the same name on their axis would be on ours again.
            self.run.define_metric(name, step_metric=STEP, step_sync=False)
        self.defined |= row.keys()
        self.run.log({STEP: self.step, **row})  # never step=, or rows behind the newest step would be dropped

    def _layers(self, readings: Sequence[Reading]) -> dict[str, object]:
        by_metric: dict[str, list[float]] = {}
        for reading in readings:
            if reading.hookpoint:
                by_metric.setdefault(reading.metric, []).append(reading.value)
        layers: dict[str, object] = {}
        for metric, values in by_metric.items():
            values = values[:: math.ceil(len(values) / _BINS)]
            if all(math.isfinite(value) for value in values):
                bins = np.array(values), np.arange(len(values) + 1)
                layers[self.name(f"layers/{metric}")] = wandb.Histogram(np_histogram=bins)
        return layers

    def _configure(self, readings: Sequence[Reading]) -> None:
        """What no row can say, where it is new: the units, and which hookpoint a bin of a heatmap is."""
        units = {key_of(reading.metric): short(reading.unit, 100) for reading in readings}
        names = list(dict.fromkeys(short(reading.hookpoint, 200) for reading in readings if reading.hookpoint))
        names = names[:: math.ceil(len(names) / _BINS)] if names else self.hookpoints
        if units.items() <= self.units.items() and names == self.hookpoints:
            return
        self.units, self.hookpoints = self.units | units, names
        told = {self.name("units"): self.units, self.name("hookpoints"): names}
        self.run.config.update(told, allow_val_change=True)

    def _note_worst(self) -> None:
        """The largest reading of the headline metric in any group, or of the first metric where that is not read."""
        drift = [each for each in self.readings if each.sensor != "progress" and not math.isnan(each.value)]
        metric = HEADLINE if any(each.metric == HEADLINE for each in drift) else next((e.metric for e in drift), "")
        of_it = [each for each in drift if each.metric == metric]
        if not of_it:
            return
        # Of two that are equal the first: the worst group by its own name, not as "worst".
        most = max(of_it, key=lambda each: abs(each.value))
        if abs(most.value) <= self.worst:
            return
        self.worst = abs(most.value)
        error = f", standard error {most.stderr:.2g}" if math.isfinite(most.stderr) else ""
        reading = f"{most.key} is {most.value:.3g} {most.unit} at step {most.step}{error}"
        said = {"reading": short(reading), "value": most.value, "stderr": most.stderr, "step": most.step}
        self.summary |= {self.name(f"worst/{name}"): value for name, value in said.items() if value == value}


def _curves(reading: Reading) -> dict[str, float]:
    curves = {key_of(reading.key): reading.value}
    if math.isfinite(reading.stderr):
        curves[key_of(f"{reading.key}/stderr")] = reading.stderr
    if not reading.group and not reading.hookpoint and math.isfinite(reading.noise_floor):
        curves[key_of(reading.floor_key)] = reading.noise_floor
    return curves


def _decided(told: Alert | Verdict, readings: Iterable[Reading]) -> Reading | None:
    """The reading whose value was compared with the threshold: of those that agree, the one it was told of."""
    same = [each for each in readings if (each.value, each.unit) == (told.value, told.unit)]
    return next((each for each in same if each.key == told.subject), same[0] if same else None)


def _send(run: wandb.Run, alerts: Iterable[Alert]) -> None:
    """As alerts of W&B, which are mailed: of several of one rule the one furthest from 0, with the others' subjects."""
    alike: dict[str, list[Alert]] = {}
    for alert in alerts:
        if not alert.is_repeat:
            alike.setdefault(alert.rule, []).append(alert)
    for rule, of_it in alike.items():
        most = max(of_it, key=lambda alert: -1.0 if math.isnan(alert.value) else abs(alert.value))
        others = [alert.subject for alert in of_it if alert is not most]
        so_too = f" So do {len(others)} more: {', '.join(others[:4])}{', ...' * (len(others) > 4)}." if others else ""
        run.alert(
            title=title_of(rule),
            text=harmless(f"step {most.step}: {most.message}{so_too}"),
            level=_LEVELS[most.severity],
            wait_duration=0.001,  # 0 would mean a minute; the rules have cool-downs of their own
        )


def _row(item: object, columns: Sequence[str]) -> list[Any]:
    return [_cell(getattr(item, column)) for column in columns]


def _cell(value: object) -> object:
    """Text that is harmless, and nothing in place of what is no number, which JSON does not have."""
    if isinstance(value, str):
        return short(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _artifact(page: _Page, record: Path) -> wandb.Artifact:
    """The record's files, which `read_record` reads again, and a report on it."""
    files = [path for path in sorted(record.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise RunError(
            f"There is no record at {record}, so none is stored in W&B. Give WandbSink(record=...) the directory that "
            "the monitor's record has."
        )
    bank = "".join(char if char.isascii() and (char.isalnum() or char in "-_.") else "_" for char in page.bank)
    artifact = wandb.Artifact(f"drift-record-{page.run.id}{f'-{bank}'[:60] if bank else ''}", type="drift-record")
    for path in files:
        artifact.add_file(str(path), name=path.relative_to(record).as_posix())
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        if _has_reported(record, report):
            artifact.add_file(str(report), name=report.name)
    return artifact


def _has_reported(record: Path, report: Path) -> bool:
    try:
        from diffsensor.report import write_report
    except ModuleNotFoundError as error:
        logger.info("The record is stored in W&B without a report: that needs %s, which is not installed.", error.name)
        return False
    try:
        write_report(record, report)
    except DiffSensorError as error:
        logger.warning("The record is stored in W&B without a report. %s", error)
        return False
    return True
