"""The frameworks' own loggers get the same readings under the same keys."""

import csv
import math
import re
import sqlite3
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffsensor import read_record
from diffsensor_lightning import DriftMonitor
from diffsensor_transformers import DriftMonitorCallback
from tiny_lightning import TinyModule, data, tiny_probes, trainer
from tiny_trainers import plain, text_probes, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MLFlow only allows:RuntimeWarning"),  # Lightning's, of each "=" in a key
]
needs_mlflow = pytest.mark.skipif(
    find_spec("mlflow") is None, reason="mlflow is not installed: pip install mlflow-skinny sqlalchemy alembic"
)
of_mlflow_itself = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Curves = dict[tuple[str, int], float]


def fit(root: Path, logger: Any) -> Curves:
    """A run with Lightning; gives what its record holds, as a logger should have it."""
    drift = DriftMonitor(tiny_probes(), 2, cache_dir=root / "cache", record=root / "drift")
    trainer([drift], root, logger=logger).fit(TinyModule(), data())
    return recorded(root / "drift", with_both=True)


def train(root: Path, report_to: str, **options: Any) -> Curves:
    """The same with transformers."""
    drift = DriftMonitorCallback(text_probes(), 2, cache_dir=root / "cache", record=root / "drift")
    plain(root / "out", [drift], tiny_model(root / "model"), report_to=report_to, **options).train()
    return recorded(root / "drift", with_both=False)


def recorded(record: Path, *, with_both: bool) -> Curves:
    shown = [
        reading
        for reading in read_record(record).readings
        if reading.sensor != "progress" and (with_both or not (reading.group and reading.hookpoint))
    ]
    curves = {(reading.key, reading.step): reading.value for reading in shown}
    floors = [each for each in shown if not each.group and not each.hookpoint and math.isfinite(each.noise_floor)]
    return curves | {(reading.floor_key, reading.step): reading.noise_floor for reading in floors}


def on_board(folder: Path) -> Curves:
    found: Curves = {}
    for path in {file.parent for file in folder.rglob("events.out.tfevents.*")}:
        board = EventAccumulator(str(path)).Reload()
        found |= {(tag, each.step): each.value for tag in board.Tags()["scalars"] for each in board.Scalars(tag)}
    return found


def ours(curves: Curves) -> Curves:
    return {place: value for place, value in curves.items() if "diffsensor/" in place[0]}


def in_mlflow(file: Path) -> Curves:
    with sqlite3.connect(file) as database:
        rows = database.execute("select key, step, value from metrics where key like 'diffsensor/%'").fetchall()
    curves = {(key, step): value for key, step, value in rows}
    assert len(curves) == len(rows)  # no two keys have become one
    return curves


def test_lightning_s_tensorboard_gets_the_keys_and_values_of_the_record(tmp_path: Path) -> None:
    expected = fit(tmp_path, TensorBoardLogger(tmp_path / "board"))
    assert len(expected) > 100
    assert ours(on_board(tmp_path / "board")) == pytest.approx(expected, rel=1e-6)


def test_lightning_s_csv_gets_the_keys_and_values_of_the_record(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "csv")
    expected = fit(tmp_path, logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(key, int(row["step"])): float(cell) for row in rows for key, cell in row.items() if cell}
    assert ours(found) == pytest.approx(expected)


def test_transformers_tensorboard_gets_them_under_its_own_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    expected = train(tmp_path, "tensorboard")
    assert len(expected) > 50
    prefixed = {(f"train/{key}", step): value for (key, step), value in expected.items()}
    assert ours(on_board(tmp_path / "board")) == pytest.approx(prefixed, rel=1e-6)


@needs_mlflow
@of_mlflow_itself
def test_lightning_s_mlflow_gets_them_without_what_mlflow_forbids_in_keys(tmp_path: Path) -> None:
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/ml.db", artifact_location=str(tmp_path / "artifacts"))
    expected = fit(tmp_path, logger)
    allowed = {(re.sub(r"[^\w/. -]+", "", key), step): value for (key, step), value in expected.items()}
    assert ours(in_mlflow(tmp_path / "ml.db")) == pytest.approx(allowed)


@needs_mlflow
@of_mlflow_itself
def test_transformers_mlflow_gets_them_without_what_mlflow_forbids_in_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    import_module("mlflow").set_tracking_uri(f"sqlite:///{tmp_path}/ml.db")
    expected = train(tmp_path, "mlflow")
    allowed = {(re.sub(r"[^\w/. :-]", "_", key), step): value for (key, step), value in expected.items()}
    assert ours(in_mlflow(tmp_path / "ml.db")) == pytest.approx(allowed)
