"""WandbSink in runs that wandb itself writes, without a server, and that its own tool reads back."""

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.util import get_core_path

from diffsensor import (
    ActionTaken,
    Alert,
    ConfigError,
    Findings,
    Gate,
    Monitor,
    ProbeSet,
    Reading,
    TokenShift,
    Verdict,
    every,
    read_record,
)
from diffsensor.rules import Limit
from diffsensor_lightning import DriftMonitor
from diffsensor_transformers import DriftMonitorCallback
from diffsensor_wandb import RunError, WandbSink
from diffsensor_wandb.shown import LONGEST_KEY, LONGEST_TEXT, LONGEST_TITLE, key_of, plain, short, title_of
from diffsensor_wandb.table import GrowingTable
from tiny import frozen_head, probe_set
from tiny_lightning import TinyModule, data, tiny_llama, tiny_probes, trainer
from tiny_trainers import WORDS, text_probes, tiny_model, tokenizer
from tiny_trainers import plain as hf_trainer

KL = "diffsensor/kl_ref_live"
STEP = "diffsensor/step"
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\n<!channel>" + "x" * 10_000

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture(autouse=True)
def wandb_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its files go to the test's own directory, nothing goes to the network, and no run is left open."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    (tmp_path / "wandb-home").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # or it would go on with the settings of another test
    yield
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


@dataclass
class Told:
    """What a run's file holds, as `wandb leet inspect` reads it."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [each["item"] for each in self.of("history")]

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return self.of("alert")

    @property
    def summary(self) -> dict[str, Any]:
        return {name: value for each in self.of("summary") for name, value in each["update"].items()}

    @property
    def config(self) -> dict[str, Any]:
        return {name: value for each in self.of("config") for name, value in each["update"].items()}

    @property
    def axes(self) -> dict[str, str]:
        return {each["name"]: each.get("step_metric", "") for each in self.of("metric") if "name" in each}

    @property
    def is_finished(self) -> bool:
        return bool(self.of("exit"))

    def curve(self, key: str, axis: str = STEP) -> list[tuple[float, float]]:
        """What a chart of this key on this axis draws: W&B takes the rows that have both."""
        return [(row[axis], row[key]) for row in self.rows if key in row and axis in row]

    def artifacts(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.of("artifact") if each["type"] == kind]


def read_back(folder: Path) -> list[Told]:
    """All runs below a folder, the oldest first."""
    wandb.teardown()  # finish() may not have written all of it
    found = sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    runs = []
    for path in found:
        # What `wandb leet inspect --json` runs, in a tenth of the time.
        command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(path), str(path.parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        runs.append(Told([json.loads(line) for line in done.stdout.splitlines()]))
    return runs


def only_run(tmp_path: Path) -> Told:
    (run,) = read_back(tmp_path)
    return run


def table_rows(tmp_path: Path, run: Told, name: str) -> list[dict[str, Any]]:
    """The rows of all increments of a table."""
    rows = []
    for row in run.rows:
        if (table := row.get(name)) or (table := row if f"{name}.path" in row else None):
            path = table.get("path") or table[f"{name}.path"]
            (file,) = tmp_path.rglob(Path(path).name)
            content = json.loads(file.read_text())
            rows += [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]
    return rows


def keys_of(row: dict[str, Any]) -> set[str]:
    """The keys of ours in a row, but for the axis; the parts of tables and histograms are told as `<key>.<part>`."""
    parts = ("diffsensor/tables/", "diffsensor/layers/")
    ours = {
        name.partition(".")[0] if name.startswith(parts) else name for name in row if name.startswith("diffsensor/")
    }
    return ours - {STEP}


def reading(step: int, value: float, **parts: Any) -> Reading:
    given = {"sensor": "outputs", "metric": "kl_ref_live", "unit": "nats/token", "stderr": 0.1} | parts
    return Reading(step=step, value=value, **given)


def shift(step: int, rank: int = 0, **parts: Any) -> TokenShift:
    given: dict[str, Any] = {
        "ranked_by": "mass_moved", "prefers": "live", "token_id": 7, "token": "tea", "mass_moved": 0.2,
        "mass_moved_stderr": 0.01, "logit_difference": 1.5, "probe": "p1", "position": 3, "context": "a cup of tea",
    }  # fmt: skip
    return TokenShift(step=step, rank=rank, **(given | parts))


def alert(step: int, **parts: Any) -> Alert:
    given: dict[str, Any] = {
        "rule": "kl_ref_live above 0.3", "severity": "warning", "subject": KL, "message": "It moved.", "first_step": 0,
    }  # fmt: skip
    return Alert(step=step, **(given | parts))


def write_all(sink: WandbSink, *found: Findings) -> None:
    for findings in found:
        sink.write(findings)
    sink.close()


# Which run


def test_without_a_run_it_opens_one_and_finishes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = WandbSink(project="drift", name="mine")
    assert wandb.run is None  # nothing is opened before something is read
    with caplog.at_level(logging.INFO, logger="diffsensor_wandb"):
        sink.write(Findings(step=0, readings=(reading(0, 0.0),)))
    assert wandb.run is not None
    assert wandb.run.name == "mine"
    assert wandb.run.id in caplog.text
    sink.write(Findings(step=5, readings=(reading(5, 0.5),)))
    sink.close()
    assert wandb.run is None
    sink.close()  # closing twice is harmless
    run = only_run(tmp_path)
    assert run.is_finished
    assert run.of("run")[0]["project"] == "drift"
    assert run.curve(KL) == [(0, 0), (5, 0.5)]


def test_an_open_run_is_joined_and_left_open(tmp_path: Path) -> None:
    theirs = wandb.init(project="theirs")
    theirs.log({"loss": 1.0})
    write_all(WandbSink(), Findings(step=0, readings=(reading(0, 0.25),)))
    assert wandb.run is theirs
    theirs.log({"loss": 0.5})
    theirs.finish()
    run = only_run(tmp_path)
    assert [row["loss"] for row in run.rows if "loss" in row] == [1.0, 0.5]
    assert run.curve(KL) == [(0, 0.25)]


def test_a_run_that_is_given_is_written_to_whatever_else_is_open(tmp_path: Path) -> None:
    given = wandb.init(project="given", dir=tmp_path / "wandb-home")
    other = wandb.init(project="other", reinit="create_new")
    write_all(WandbSink(given), Findings(step=0, readings=(reading(0, 0.25),)))
    for run in (given, other):
        run.finish()
    told = {run.of("run")[0]["project"]: run for run in read_back(tmp_path)}
    assert told["given"].curve(KL) == [(0, 0.25)]
    assert told["other"].curve(KL) == []


def test_arguments_for_an_own_run_are_told_to_be_left_out_where_one_is_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with wandb.init(project="theirs"):
        write_all(WandbSink(project="mine"), Findings(step=0, readings=(reading(0, 0.25),)))
    assert "was given project for a run of its own, but joins the W&B run" in caplog.text


def test_where_the_trainer_opens_another_run_that_one_is_joined(tmp_path: Path) -> None:
    sink = WandbSink()
    for trial in range(2):
        with wandb.init(project=f"trial {trial}"):
            sink.write(Findings(step=0, readings=(reading(0, float(trial)),)))
    told = {run.of("run")[0]["project"]: run for run in read_back(tmp_path)}
    assert {name: run.curve(KL) for name, run in told.items()} == {"trial 0": [(0, 0)], "trial 1": [(0, 1)]}
    assert all(run.axes[KL] == STEP for run in told.values())


def test_written_to_again_after_it_was_closed_it_opens_a_new_run(tmp_path: Path) -> None:
    sink = WandbSink()
    for step in (0, 5):
        write_all(sink, Findings(step=step, readings=(reading(step, 0.5),), token_shifts=(shift(step),)))
    assert [run.curve(KL) for run in read_back(tmp_path)] == [[(0, 0.5)], [(5, 0.5)]]


def test_a_sink_that_nothing_was_written_to_opens_nothing(tmp_path: Path) -> None:
    WandbSink(record=tmp_path / "none").close()  # as in all processes but the first one
    assert read_back(tmp_path) == []


def test_with_wandb_disabled_nothing_is_written_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    full = Findings(step=0, readings=(reading(0, 1.0),), token_shifts=(shift(0),), alerts=(alert(0),))
    write_all(WandbSink(), full)
    assert read_back(tmp_path) == []


# What a row holds


def test_each_key_is_defined_by_its_exact_name_on_our_axis_whatever_pattern_the_run_has(tmp_path: Path) -> None:
    run = wandb.init()
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.log({"loss": 1.0, "trainer/global_step": 40})
    layers = [reading(5, 0.1, metric="relative_l2", hookpoint=name) for name in ("model.layers.0", "model.layers.1")]
    found = Findings(
        step=5,
        readings=(reading(5, 0.5, noise_floor=1e-6), reading(5, 0.7, group="code"), *layers),
        token_shifts=(shift(5),),
        alerts=(alert(5, value=0.5, unit="nats/token", threshold=0.3),),
        actions=(ActionTaken(step=5, rule="r", action="stop", outcome="done", detail=""),),
    )
    write_all(WandbSink(), found)
    run.finish()
    told = only_run(tmp_path)
    rows = [row for row in told.rows if STEP in row]
    assert "trainer/global_step" not in rows[0]  # a pattern that won would have put its axis there
    keys = {name for row in rows for name in keys_of(row)}
    assert keys == {
        KL, f"{KL}/stderr", f"{KL}/noise_floor", f"{KL}/limit", f"{KL}/group=code", f"{KL}/group=code/stderr",
        "diffsensor/relative_l2/at=model.layers.0", "diffsensor/relative_l2/at=model.layers.0/stderr",
        "diffsensor/relative_l2/at=model.layers.1", "diffsensor/relative_l2/at=model.layers.1/stderr",
        "diffsensor/layers/relative_l2", "diffsensor/tables/tokens", "diffsensor/tables/alerts",
        "diffsensor/tables/actions",
    }  # fmt: skip
    assert {name: told.axes[name] for name in keys} == dict.fromkeys(keys, STEP)
    assert told.axes[STEP] == ""


def test_steps_behind_the_newest_one_are_not_dropped(tmp_path: Path) -> None:
    write_all(WandbSink(), *(Findings(step=step, readings=(reading(step, step / 10),)) for step in (0, 10, 5, 10)))
    assert [step for step, _ in only_run(tmp_path).curve(KL)] == [0, 10, 5, 10]  # a run that was rolled back


def test_errors_that_are_not_defined_and_groups_at_hookpoints_make_no_curve(tmp_path: Path) -> None:
    found = (
        reading(0, 0.5, stderr=math.nan),
        reading(0, 0.5, metric="relative_l2", group="code", hookpoint="layers.0"),
        reading(0, 0.5, group="code", noise_floor=1e-6),
    )
    write_all(WandbSink(), Findings(step=0, readings=found))
    row = only_run(tmp_path).rows[0]
    assert keys_of(row) == {KL, f"{KL}/group=code", f"{KL}/group=code/stderr"}


def test_a_reading_that_is_no_number_is_logged_as_what_it_is_and_spoils_no_table_or_heatmap(tmp_path: Path) -> None:
    layer = reading(0, math.nan, metric="relative_l2", hookpoint="layers.0")
    found = Findings(
        step=0, readings=(reading(0, math.nan), layer), token_shifts=(shift(0, mass_moved_stderr=math.nan),)
    )
    write_all(WandbSink(), found)
    run = only_run(tmp_path)
    assert [value for _, value in run.curve(KL)] == ["NaN"]
    assert not [name for row in run.rows for name in row if name.startswith("diffsensor/layers")]
    assert [row["mass_moved_stderr"] for row in table_rows(tmp_path, run, "diffsensor/tables/tokens")] == [None]


def test_the_heatmap_has_a_bin_for_each_hookpoint_in_order_and_the_configuration_names_them(tmp_path: Path) -> None:
    names = ["model.layers.0", "model.layers.5", "model.layers.11"]

    def look(step: int) -> Findings:
        values = [0.1 * (place + 1) * step for place in range(3)]
        return Findings(
            step=step,
            readings=tuple(
                reading(step, value, metric="relative_l2", unit="share", hookpoint=name)
                for name, value in zip(names, values, strict=True)
            ),
        )

    write_all(WandbSink(), look(1), look(2))
    run = only_run(tmp_path)
    drawn = [row for row in run.rows if "diffsensor/layers/relative_l2.values" in row]
    assert [row["diffsensor/layers/relative_l2.values"] for row in drawn] == [
        pytest.approx([0.1, 0.2, 0.3]),
        pytest.approx([0.2, 0.4, 0.6]),
    ]
    assert {tuple(row["diffsensor/layers/relative_l2.bins"]) for row in drawn} == {(0, 1, 2, 3)}
    assert run.config["diffsensor/hookpoints"] == names
    assert run.config["diffsensor/units"]["relative_l2"] == "share"
    assert len(run.of("config")) <= 2  # told once, not at each look


def test_of_more_hookpoints_than_w_and_b_has_bins_every_second_one_is_drawn(tmp_path: Path) -> None:
    readings = tuple(reading(0, float(place), metric="cka", hookpoint=f"at {place}") for place in range(600))
    write_all(WandbSink(), Findings(step=0, readings=readings))
    run = only_run(tmp_path)
    (row,) = [row for row in run.rows if "diffsensor/layers/cka.values" in row]
    assert row["diffsensor/layers/cka.values"] == list(range(0, 600, 2))
    assert run.config["diffsensor/hookpoints"][:2] == ["at 0", "at 2"]


def test_readings_of_a_bank_and_all_that_belongs_to_them_have_keys_of_their_own(tmp_path: Path) -> None:
    verdict = Verdict(step=0, outcome="pass", reason="Fine.")
    found = Findings(step=0, readings=(reading(0, 0.5, bank="mine"),), token_shifts=(shift(0, bank="mine"),))
    write_all(WandbSink(), found, Findings(step=0, verdicts=(verdict,)))
    run = only_run(tmp_path)
    keys = {name for row in run.rows for name in keys_of(row)}
    assert len(keys) == 3
    assert all("/bank=mine" in key for key in keys)
    ours = {name for name in run.summary if name.startswith(("diffsensor/gate", "diffsensor/worst"))}
    assert "diffsensor/gate/verdict/bank=mine" in ours
    assert "diffsensor/worst/value/bank=mine" in ours


# Limits


def test_the_limit_that_an_alert_tells_is_a_curve_from_then_on(tmp_path: Path) -> None:
    code = f"{KL}/group=code"
    looks = [
        Findings(step=step, readings=(reading(step, value), reading(step, 2 * value, group="code")), alerts=alerts)
        for step, value, alerts in (
            (0, 0.1, ()),
            (5, 0.2, (alert(5, subject=code, value=0.4, unit="nats/token", threshold=0.3),)),
            (10, 0.1, ()),
        )
    ]
    write_all(WandbSink(), *looks)
    run = only_run(tmp_path)
    assert run.curve(f"{code}/limit") == [(5, 0.3), (10, 0.3)]
    assert run.curve(f"{KL}/limit") == []


def test_the_limit_of_a_gate_is_a_curve_from_its_first_verdict_on(tmp_path: Path) -> None:
    verdict = Verdict(step=0, outcome="pass", reason="Fine.", subject=KL, value=0.1, threshold=0.5, unit="nats/token")
    write_all(
        WandbSink(),
        Findings(step=0, readings=(reading(0, 0.1),)),
        Findings(step=0, verdicts=(verdict,)),
        Findings(step=5, readings=(reading(5, 0.2),)),
    )
    assert only_run(tmp_path).curve(f"{KL}/limit") == [(5, 0.5)]


def test_what_evidence_was_compared_with_is_the_limit_of_the_evidence_and_not_of_the_metric(tmp_path: Path) -> None:
    evidence = reading(0, 1.2, sensor="change_point", metric="kl_ref_live_change_point_evidence", unit="evidence")
    told = alert(0, subject=KL, value=1.2, unit="evidence", threshold=1.0)
    write_all(WandbSink(), Findings(step=0, readings=(reading(0, 0.1), evidence), alerts=(told,)))
    run = only_run(tmp_path)
    assert run.curve(f"{evidence.key}/limit") == [(0, 1.0)]
    assert run.curve(f"{KL}/limit") == []


# Tables


def test_each_row_of_the_token_table_goes_to_w_and_b_once(tmp_path: Path) -> None:
    looks = [
        Findings(step=step, readings=(reading(step, 0.1),), token_shifts=tuple(shift(step, rank) for rank in range(3)))
        for step in range(30)
    ]
    write_all(WandbSink(), *looks)
    run = only_run(tmp_path)
    rows = table_rows(tmp_path, run, "diffsensor/tables/tokens")
    assert [(row["step"], row["rank"]) for row in rows] == [(step, rank) for step in range(30) for rank in range(3)]
    assert (rows[0]["token"], rows[0]["context"], rows[0]["mass_moved"]) == ("tea", "a cup of tea", 0.2)
    logged = run.artifacts("wandb-run-incremental-table")
    assert 10 <= len(logged) < 30  # the first ones at once, later ones a few looks together


def test_w_and_b_shows_all_increments_of_a_run_of_50_000_looks() -> None:
    table, num_increments = GrowingTable(["step"]), 0
    for step in range(50_000):
        table.add([[step]])
        if table.is_due:
            assert len(table.rest().data) == step + 1
            num_increments += 1
    assert num_increments < 100


def test_alerts_and_actions_have_tables(tmp_path: Path) -> None:
    taken = ActionTaken(step=5, rule="r", action="stop", outcome="done", detail="Training stops.")
    told = alert(5, value=0.5, threshold=0.3, message="It moved, since step 5.")
    write_all(
        WandbSink(), Findings(step=5, readings=(reading(5, 0.5),), alerts=(told,)), Findings(step=5, actions=(taken,))
    )
    run = only_run(tmp_path)
    (row,) = table_rows(tmp_path, run, "diffsensor/tables/alerts")
    assert (row["rule"], row["message"], row["value"]) == ("kl_ref_live above 0.3", "It moved, since step 5.", 0.5)
    (row,) = table_rows(tmp_path, run, "diffsensor/tables/actions")
    assert (row["action"], row["outcome"], row["detail"]) == ("stop", "done", "Training stops.")


# Alerts, summary, artifact


def test_the_title_of_an_alert_is_that_of_its_rule_and_its_text_says_the_rest(tmp_path: Path) -> None:
    looks = [
        Findings(
            step=step,
            alerts=(
                alert(step, value=0.1, subject="a", message=f"a moved at {step}."),
                alert(step, value=-0.4, subject="b", message=f"b moved at {step}."),
                alert(step, rule="other", severity="critical", message="Other."),
            ),
        )
        for step in (5, 10)
    ]
    write_all(WandbSink(), *looks)
    told = [(each["title"], each["level"], each["text"]) for each in only_run(tmp_path).alerts]
    assert told == [
        ("drift: kl_ref_live above 0.3", "WARN", "step 5: b moved at 5. So do 1 more: a."),
        ("drift: other", "ERROR", "step 5: Other."),
        ("drift: kl_ref_live above 0.3", "WARN", "step 10: b moved at 10. So do 1 more: a."),
        ("drift: other", "ERROR", "step 10: Other."),
    ]


def test_no_alert_waits_for_a_minute_and_none_is_sent_again_that_was_on_record(tmp_path: Path) -> None:
    write_all(WandbSink(), Findings(step=5, alerts=(alert(5), alert(5, rule="again", is_repeat=True))))
    (told,) = only_run(tmp_path).alerts
    assert int(told["wait_duration"]) == 1  # milliseconds


def test_titles_of_long_rules_fit_and_differ() -> None:
    titles = [title_of(f"{'long ' * 40}{number}") for number in range(2)]
    assert titles[0] != titles[1]
    assert all(len(title) <= LONGEST_TITLE for title in titles)
    assert title_of("a rule") == "drift: a rule"


def test_the_summary_tells_the_last_verdict_and_the_worst_reading_of_the_run(tmp_path: Path) -> None:
    looks = [
        Findings(
            step=step,
            readings=(
                reading(step, value, noise_floor=1e-7),
                reading(step, 2 * value, group="code", stderr=0.02),
                reading(step, 2 * value, group="worst", note="group 'code'"),
                reading(step, 100.0, sensor="progress", metric="loss", unit="as given"),
            ),
        )
        for step, value in ((0, 0.0), (5, 0.4), (10, 0.2))
    ]
    verdicts = [
        Findings(step=5, verdicts=(Verdict(step=5, outcome="fail", reason="Too far."),)),
        Findings(step=10, verdicts=(Verdict(step=10, outcome="pass", reason="Back."),)),
    ]
    write_all(WandbSink(), *looks[:2], verdicts[0], looks[2], verdicts[1])
    summary = only_run(tmp_path).summary
    told = {name.removeprefix("diffsensor/"): value for name, value in summary.items()}
    assert (told["gate/verdict"], told["gate/reason"], told["gate/step"]) == ("pass", "Back.", 10)
    assert told["worst/reading"] == f"{KL}/group=code is 0.8 nats/token at step 5, standard error 0.02"
    assert (told["worst/value"], told["worst/stderr"], told["worst/step"]) == (0.8, 0.02, 5)


def test_the_record_is_stored_as_an_artifact_at_the_end(tmp_path: Path) -> None:
    record = tmp_path / "run" / "drift"
    model = frozen_head()
    with Monitor(probe_set(), record=record, cache_dir=tmp_path / "cache", sinks=[WandbSink(record=record)]) as monitor:
        monitor.read(model, 0)
        assert wandb.run is not None
        name = f"drift-record-{wandb.run.id}-fixed"
    run = only_run(tmp_path)
    (artifact,) = run.artifacts("drift-record")
    assert artifact["name"] == name
    stored = {each["path"] for each in artifact["manifest"]["contents"]}
    files = {
        path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file() and path.name[0] != "."
    }
    assert stored == files | {"report.html"}
    (page,) = [each for each in artifact["manifest"]["contents"] if each["path"] == "report.html"]
    assert "<html" in Path(page["local_path"]).read_text()
    assert {"manifest.json", "readings.jsonl"} <= stored
    assert ".lock" not in stored


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_record_is_stored_also_where_there_is_no_report(
    is_missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if is_missing:
        monkeypatch.setitem(sys.modules, "diffsensor.report", None)
    record = tmp_path / "drift"
    record.mkdir()
    (record / "manifest.json").write_text("not a manifest")
    with caplog.at_level(logging.INFO, logger="diffsensor_wandb"):
        write_all(WandbSink(record=record), Findings(step=0, readings=(reading(0, 0.1),)))
    assert "The record is stored in W&B without a report" in caplog.text
    (artifact,) = only_run(tmp_path).artifacts("drift-record")
    assert [each["path"] for each in artifact["manifest"]["contents"]] == ["manifest.json"]


def test_a_record_that_is_not_there_is_told_and_the_run_is_finished_all_the_same(tmp_path: Path) -> None:
    sink = WandbSink(record=tmp_path / "nowhere")
    sink.write(Findings(step=0, readings=(reading(0, 0.1),)))
    with pytest.raises(RunError, match=r"There is no record at .*nowhere, so none is stored in W&B. Give"):
        sink.close()
    assert wandb.run is None
    assert only_run(tmp_path).is_finished


# Text of others


def test_hostile_text_is_plain_text_everywhere(tmp_path: Path) -> None:
    key = changed(reading(0, 0.5), group=HOSTILE).key
    found = Findings(
        step=0,
        readings=(
            reading(0, 0.5, group=HOSTILE),
            reading(0, 0.2, metric="relative_l2", hookpoint=HOSTILE, unit=HOSTILE),
        ),
        token_shifts=(shift(0, token=HOSTILE, context=HOSTILE, probe=HOSTILE, group=HOSTILE),),
        alerts=(alert(0, rule=HOSTILE, subject=key, message=HOSTILE, value=0.5, unit="nats/token", threshold=0.3),),
        actions=(ActionTaken(step=0, rule=HOSTILE, action="stop", outcome="done", detail=HOSTILE),),
        verdicts=(Verdict(step=0, outcome="fail", reason=HOSTILE),),
    )
    write_all(WandbSink(), found)
    run = only_run(tmp_path)
    texts = list(strings_of([record for record in run.records if record["type"] not in ("artifact", "files")]))
    for table in ("tokens", "alerts", "actions"):
        texts += strings_of(table_rows(tmp_path, run, f"diffsensor/tables/{table}"))
    assert any("<script>" in text for text in texts)  # as text, in a table
    assert all(text.isprintable() for text in texts)
    assert max(map(len, texts)) <= LONGEST_TEXT
    (told,) = run.alerts
    assert "<" not in told["title"] + told["text"]
    assert "!channel" in told["text"]


def strings_of(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from strings_of([*content, *content.values()])
    elif isinstance(content, list):
        for part in content:
            yield from strings_of(part)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tea", "tea"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\ttab", "two\\nlines\\ttab"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\\n", "a\\\\n"),
        ("\ud800", "\\ud800"),
        ("שלום, 世界 é", "שלום, 世界 é"),
        ("<b>", "<b>"),
    ],
)
def test_what_does_not_print_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_long_text_is_cut_and_says_how_long_it_is() -> None:
    assert short("x" * 1000) == "x" * 1000
    assert short("x" * 10_000).endswith("xxx ... (10000 characters)")
    assert len(short("\x1b" * 10_000)) == LONGEST_TEXT


def test_keys_that_are_cut_or_escaped_stay_apart() -> None:
    names = ["a", "a\n", "a\\n", "*", "a*", "x" * 10_000, "x" * 9_999 + "y", "x" * 9_999]
    keys = [key_of(f"{KL}/group={name}") for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= LONGEST_KEY and "*" not in key for key in keys)
    assert key_of(f"{KL}/group=code") == f"{KL}/group=code"


def test_a_group_with_a_star_at_its_end_does_not_define_other_keys(tmp_path: Path) -> None:
    write_all(WandbSink(), Findings(step=0, readings=(reading(0, 0.5, group="a*"),)))
    assert not [each for each in only_run(tmp_path).of("metric") if "glob_name" in each]


@pytest.mark.parametrize("log_text", [True, False])
def test_without_text_no_word_of_a_probe_is_in_the_run(log_text: bool, tmp_path: Path) -> None:
    words = tokenizer((*WORDS[:-1], "zebra"))
    probes = ProbeSet.from_texts(["cat zebra mat zebra", "zebra ran under zebra"], words)
    model, record = tiny_model(tmp_path / "model"), tmp_path / "run" / "drift"
    sink = WandbSink(record=record)
    with Monitor(
        probes, record=record, cache_dir=tmp_path / "cache", sinks=[sink], log_text=log_text, schedule=every(1)
    ) as monitor:
        monitor.observe(model, 0)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        monitor.observe(model, 1)
    run = only_run(tmp_path)
    rows = table_rows(tmp_path, run, "diffsensor/tables/tokens")
    assert {row["step"] for row in rows} == {1}
    written = [path.read_bytes() for path in (tmp_path / "wandb-home").rglob("*") if path.is_file()]
    assert any(b"zebra" in content for content in written) is log_text


# Beside the frameworks' own loggers


def test_beside_lightning_s_logger_each_chart_draws_each_reading_once(tmp_path: Path) -> None:
    logger = WandbLogger(project="lightning", save_dir=tmp_path / "wandb-home", offline=True)
    drift = DriftMonitor(tiny_probes(), 2, cache_dir=tmp_path / "cache", record=None, sinks=[WandbSink()])
    trainer([drift], tmp_path, logger=logger).fit(TinyModule(), data())
    assert wandb.run is not None  # it is Lightning's
    wandb.finish()
    run = only_run(tmp_path)
    steps = [0, 2, 4, 6]
    for key in (KL, f"{KL}/group=a", f"{KL}/noise_floor", "diffsensor/relative_l2/at=model.layers.0"):
        ours, theirs = run.curve(key), run.curve(key, "trainer/global_step")
        assert [step for step, _ in ours] == steps
        assert ours == theirs
    assert not [row for row in run.rows if STEP in row and "trainer/global_step" in row and KL in row]
    assert [step for step, _ in run.curve(f"{KL}/stderr")] == steps
    assert run.axes[KL] == STEP


def test_beside_transformers_reporting_each_chart_draws_each_reading_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "transformers")
    drift = DriftMonitorCallback(text_probes(), 2, cache_dir=tmp_path / "cache", sinks=[WandbSink()])
    hf_trainer(tmp_path / "out", [drift], tiny_model(tmp_path / "m"), report_to="wandb").train()
    assert wandb.run is not None
    wandb.finish()
    run = only_run(tmp_path)
    ours, theirs = run.curve(KL), run.curve(f"train/{KL}", "train/global_step")
    assert [step for step, _ in ours] == [0, 2, 4]
    assert ours == theirs
    assert run.curve(KL, "train/global_step") == []
    assert run.curve(f"train/{KL}") == []
    assert run.axes[KL] == STEP


def test_alerts_and_verdicts_of_a_real_run_are_in_w_and_b(tmp_path: Path) -> None:
    record = tmp_path / "drift"
    sink = WandbSink(project="drift", record=record)
    monitor = Monitor(
        tiny_probes(),
        record=record,
        cache_dir=tmp_path / "cache",
        sinks=[sink],
        schedule=every(1),
        rules=[Limit("kl_ref_live", above=1e-4, for_=1, confidence=0.51)],
        gate=Gate(Limit("kl_ref_live", above=1e-4)),
    )
    model = tiny_llama()
    with monitor:
        monitor.observe(model, 0)
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
        monitor.observe(model, 1, loss=2.5)
        verdict = monitor.verdict(model, 1)
    run = only_run(tmp_path)
    (told,) = run.alerts
    assert told["title"] == "drift: kl_ref_live above 0.0001, for_=1, confidence=0.51"
    assert told["text"].startswith("step 1: kl_ref_live is ")
    assert run.curve(f"{KL}/limit") == [(1, 1e-4)]
    assert run.summary["diffsensor/gate/verdict"] == verdict.outcome
    assert run.curve("diffsensor/loss") == [(1, 2.5)]
    recorded = {(each.step, each.key): each.value for each in read_record(record).readings if not each.hookpoint}
    logged = {
        (row[STEP], key): value for row in run.rows for key, value in row.items() if (row.get(STEP), key) in recorded
    }
    assert logged == pytest.approx(recorded)
    rows = table_rows(tmp_path, run, "diffsensor/tables/tokens")
    assert len(rows) == len(read_record(record).token_shifts)


# What fails


def test_a_run_that_was_finished_by_others_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.init()
    model = frozen_head()
    monitor = Monitor(probe_set(), cache_dir=tmp_path / "cache", sinks=[WandbSink()], schedule=every(1))
    monitor.observe(model, 0)
    wandb.finish()
    assert monitor.observe(model, 1)
    assert monitor.failures == {"WandbSink": 1}
    assert "is finished" in caplog.text
    assert wandb.run is None  # and it has not opened another one in its place
    monitor.close()


def test_a_run_that_is_finished_too_early_is_told_when_the_monitor_is_closed(tmp_path: Path) -> None:
    record = tmp_path / "drift"
    record.mkdir()
    (record / "manifest.json").touch()
    sink = WandbSink(record=record)
    with wandb.init():
        sink.write(Findings(step=0, readings=(reading(0, 0.1),)))
    with pytest.raises(RunError, match=r"was finished before the monitor was closed, so it lacks .* Close the monitor"):
        sink.close()


def test_a_lost_service_does_not_end_training(tmp_path: Path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST_SERVICE)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["{}", "read", "{'WandbSink':", "1}", "closed"], done.stdout + done.stderr


LOST_SERVICE = f"""
import os, signal, subprocess, sys
sys.path[:0] = {sys.path!r}
import torch, wandb
torch.set_num_threads(1)
from diffsensor import Monitor, every
from diffsensor_wandb import WandbSink
from tiny import frozen_head, probe_set
model = frozen_head()
monitor = Monitor(probe_set(), cache_dir="cache", sinks=[WandbSink()], schedule=every(1), noise_floor=False)
monitor.observe(model, 0)
print(monitor.failures)
listed = subprocess.run(["ps", "-o", "pid,args", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
for line in listed.splitlines():
    if "wandb-core" in line:
        os.kill(int(line.split()[0]), signal.SIGKILL)
print("read" if monitor.observe(model, 1) else "not read", monitor.failures)
monitor.close()
print("closed", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("api_key", ["", "a" * 40])
def test_without_a_server_training_goes_on_and_waits_for_it_once(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("WANDB_API_KEY", api_key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sink = WandbSink(timeout=1.0)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"No W&B run could be opened .* Log in with `wandb login`, or give WandbSink"):
        sink.write(Findings(step=0, readings=(reading(0, 0.1),)))
    assert time.monotonic() - began < 20
    began = time.monotonic()
    with pytest.raises(RunError, match="No W&B run could be opened"):
        sink.write(Findings(step=5, readings=(reading(5, 0.1),)))
    assert time.monotonic() - began < 0.1
    sink.close()


def test_a_table_that_fails_does_not_keep_alerts_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(GrowingTable, "rest", broken)
    sink = WandbSink()
    with pytest.raises(OSError, match="no space left"):
        sink.write(Findings(step=0, token_shifts=(shift(0),), alerts=(alert(0),)))
    wandb.finish()
    assert len(only_run(tmp_path).alerts) == 1


# What is refused at once


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"projet": "x"}, r"WandbSink was given projet=..., which wandb.init does not take. Did you mean 'project'\?"),
        ({"settings": {}}, "WandbSink was given settings=..., which wandb.init does not take."),
        ({"timeout": 0.0}, "timeout=0.0, expected seconds above 0"),
        ({"timeout": math.inf}, "timeout=inf, expected seconds above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WandbSink(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run='mine', expected a W&B run: what wandb\.init\(\) returned"):
        WandbSink("mine")  # type: ignore[arg-type]


def test_a_run_and_arguments_for_another_one_are_refused() -> None:
    with wandb.init() as run, pytest.raises(ConfigError, match="given a run and project, mode, which only a run of"):
        WandbSink(run, project="x", mode="offline")


def test_without_wandb_the_import_says_how_to_get_it() -> None:
    code = f"import sys; sys.modules['wandb'] = None; sys.path[:0] = {sys.path!r}; import diffsensor_wandb"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: WandbSink needs wandb: pip install 'diffsensor[wandb]'\n")
