"""The worked example of Ray Train, in a process of its own: Ray starts servers, and loads much."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffsensor import read_record

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[train]'"
)

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys
from diffsensor_demo.pretrain import Recipe
import ray_torch_trainer
tiny = Recipe(vocabulary=320, width=32, layers=2, heads=2, steps=20, batch=4, length=64, learning_rate=1e-2)
metrics = ray_torch_trainer.main(["--out", sys.argv[1], "--steps", "10"], tiny).metrics
json.dump({key: value for key, value in metrics.items() if key.startswith("diffsensor/")}, open(sys.argv[2], "w"))
"""


def test_two_workers_of_ray_write_one_record_and_ray_reports_the_drift(tmp_path: Path) -> None:
    paths = [ROOT / "integrations" / "examples", ROOT / "integrations", ROOT]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "DIFFSENSOR_CACHE": str(tmp_path / "cache"),
    }
    out, told = tmp_path / "out", tmp_path / "metrics.json"
    command = [sys.executable, "-c", RUN, str(out), str(told)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    drift = [
        reading
        for reading in read_record(out / "trainer" / "diffsensor").readings
        if reading.metric == "kl_ref_live" and not reading.group
    ]
    assert [reading.step for reading in drift] == [0, 5, 10]
    assert drift[0].value == 0
    assert 0 < drift[1].value < drift[2].value
    assert json.loads(told.read_text())["diffsensor/kl_ref_live"] == drift[2].value
    assert len(list((out / "trainer").glob("diffsensor*"))) == 1
    # The random state of the second process, which transformers keeps where there is more than one.
    assert (out / "trainer" / "checkpoint-10" / "rng_state_1.pth").exists()
