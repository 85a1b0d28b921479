"""Trainer and Lightning runs that obey a watch beside them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import TrainerCallback

import diffsensor_lightning
import diffsensor_transformers
import tiny_lightning
import tiny_trainers
from diffsensor import ConfigError, Verdict, write_verdict
from diffsensor.actions import SetKLCoefficient
from diffsensor.gate import VERDICT_BESIDE, VERDICT_IN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
]

FAILED = Verdict(step=2, outcome="fail", reason="It moved too far.")


class FailsTheFirst(TrainerCallback):
    """A watch that needs one step to read the checkpoint of step 2, and fails it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            write_verdict(Path(args.output_dir) / "checkpoint-2" / VERDICT_IN, FAILED)


def test_a_trainer_stops_when_a_checkpoint_of_it_has_failed(tmp_path: Path) -> None:
    follow = diffsensor_transformers.FollowVerdicts(every_n_steps=1)
    model = tiny_trainers.tiny_model(tmp_path / "model")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainers.plain(tmp_path / "run", [FailsTheFirst(), follow], model, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    ((found),) = follow.followed
    assert found.checkpoint == tmp_path / "run" / "checkpoint-2"
    assert [taken.outcome for taken in found.actions] == ["done"]


def test_a_trainer_without_verdicts_trains_on(tmp_path: Path) -> None:
    follow = diffsensor_transformers.FollowVerdicts(tmp_path / "elsewhere", every_n_steps=1)
    model = tiny_trainers.tiny_model(tmp_path / "model")
    trainer = tiny_trainers.plain(tmp_path / "run", [follow], model, max_steps=3)
    trainer.train()
    assert (trainer.state.global_step, follow.followed) == (3, [])


def test_what_a_trainer_cannot_do_is_refused_before_its_first_step(tmp_path: Path) -> None:
    follow = diffsensor_transformers.FollowVerdicts(actions=[SetKLCoefficient(0.1)])
    model = tiny_trainers.tiny_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="Failed verdicts ask for set_kl_coefficient"):
        tiny_trainers.plain(tmp_path / "run", [follow], model, max_steps=3).train()


class FailsTheFirstFile(pl.Callback):
    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            (file,) = self.place.glob("*step=2.ckpt")
            write_verdict(file.with_name(file.name + VERDICT_BESIDE), FAILED)


def test_a_lightning_run_stops_when_a_checkpoint_of_it_has_failed(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    follow = diffsensor_lightning.FollowVerdicts(place, every_n_train_steps=1)
    saving = ModelCheckpoint(place, every_n_train_steps=2, save_top_k=-1)
    trainer = tiny_lightning.trainer(
        [FailsTheFirstFile(place), follow, saving], tmp_path, max_steps=6, enable_checkpointing=True
    )
    trainer.fit(tiny_lightning.TinyModule(), tiny_lightning.data())
    assert trainer.global_step == 3
    assert [found.verdict.outcome for found in follow.followed] == ["fail"]


def test_what_a_lightning_run_cannot_do_is_refused_before_its_first_step(tmp_path: Path) -> None:
    follow = diffsensor_lightning.FollowVerdicts(tmp_path, actions=[SetKLCoefficient(0.1)])
    trainer = tiny_lightning.trainer([follow], tmp_path, max_steps=2)
    with pytest.raises(MisconfigurationException, match="Failed verdicts ask for set_kl_coefficient"):
        trainer.fit(tiny_lightning.TinyModule(), tiny_lightning.data())
    with pytest.raises(MisconfigurationException, match="every=0"):
        diffsensor_lightning.FollowVerdicts(tmp_path, every_n_train_steps=0)
