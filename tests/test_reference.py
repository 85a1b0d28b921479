"""The reference: which one it is, that it is asked once, that nothing changes it unseen, and what is refused."""

import copy
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import naive
from diffsensor import Monitor, ProbeSet, Reference
from diffsensor import reference as reference_module
from diffsensor.errors import CorruptFileError, NonFiniteError, ReferenceMismatchError, StorageError
from tiny import HEADS, Text, drifted, frozen_head, llama, opt, own_model, probe_set, readings, softcapped, texts

ANSWERS, META = "answers.safetensors", "meta.json"


def fingerprint(model: nn.Module, tmp_path: Path, probes: ProbeSet | None = None, **options: object) -> str:
    return Reference.build(model, probes or probe_set(), tmp_path, **options).fingerprint


# Which one it is


def changed(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[name].data
        tensor.view(-1).view(torch.int32)[3] += 1  # the last bit of one number

    return change


INGREDIENTS = {
    "one bit of a weight": changed("model.layers.0.mlp.up_proj.weight"),
    "one bit of the embedding": changed("model.embed_tokens.weight"),
    "one bit of the head": changed("lm_head.weight"),
    "one bit of a buffer": changed("model.rotary_emb.inv_freq"),
    "dtype": lambda model: model.double(),
    "a frozen head": frozen_head,
    "attention": lambda model: model.set_attn_implementation("eager"),
    "a setting that is in no weight": lambda model: type(model)(
        type(model.config)(**(model.config.to_dict() | {"rms_norm_eps": 1e-2}))
    ),
}


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_a_fingerprint_changes_with_each_ingredient(ingredient: str, tmp_path: Path) -> None:
    model = llama()
    before = fingerprint(model, tmp_path)
    other = INGREDIENTS[ingredient](model)
    if isinstance(other, nn.Module) and other is not model:
        other.load_state_dict(model.state_dict())
    assert fingerprint(other if isinstance(other, nn.Module) else model, tmp_path) != before


def test_a_fingerprint_changes_with_the_circumstances(tmp_path: Path) -> None:
    model = llama()
    seen = [fingerprint(model, tmp_path), fingerprint(model, tmp_path, probe_set(texts(seed=6)))]
    seen.append(fingerprint(model, tmp_path, probe_set(texts()).thin(2)))
    seen.append(fingerprint(model, tmp_path, hookpoints=["model.norm"]))
    seen.append(fingerprint(model, tmp_path, hookpoints=[]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(fingerprint(model, tmp_path))
    try:
        torch.set_num_threads(2)
        seen.append(fingerprint(model, tmp_path))
    finally:
        torch.set_num_threads(1)
    assert len(set(seen)) == len(seen)
    assert len(list(tmp_path.iterdir())) == len(seen)


def test_a_fingerprint_changes_with_nothing_else(tmp_path: Path) -> None:
    model = llama()
    before = fingerprint(model, tmp_path)
    model.eval()
    model.model.requires_grad_(False)
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    torch.rand(3)
    assert fingerprint(model, tmp_path) == before
    assert fingerprint(copy.deepcopy(model), tmp_path / "elsewhere") == before
    assert fingerprint(torch.compile(model, backend="eager"), tmp_path) == before


OPENED_ELSEWHERE = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
import diffsensor.reference
from diffsensor import Monitor, Reference
from tiny import HEADS, probe_set, texts

def asked(*_):
    raise AssertionError("asked again")

diffsensor.reference._ask = asked
probes = probe_set(texts(num=12, longest=30))
for kind in HEADS:
    for dtype in (torch.float32, torch.bfloat16):
        model = HEADS[kind]().to(dtype)
        reference = Reference.build(model, probes, sys.argv[1])
        for sensors in ("light", "full"):
            found = Monitor(probes, reference, sensors=sensors).read(model, 0)
            wrong = {r.key: (r.value, r.bound) for r in found if r.value != 0.0 or r.bound != 0.0}
            assert len(found) > 20 and not wrong, (kind, dtype, sensors, wrong)
print("all are 0")
"""


def test_another_process_opens_it_and_reads_exactly_0(tmp_path: Path) -> None:
    probes = probe_set(texts(num=12, longest=30))
    for make in HEADS.values():
        for dtype in (torch.float32, torch.bfloat16):
            Reference.build(make().to(dtype), probes, tmp_path)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", OPENED_ELSEWHERE, str(tmp_path), "", *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "all are 0"


# Asked once


def test_a_second_build_opens_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    built = Reference.build(model, probe_set(), tmp_path)
    monkeypatch.setattr(reference_module, "_ask", lambda *_: pytest.fail("was asked again"))
    opened = Reference.build(model, probe_set(), tmp_path)
    assert opened.fingerprint == built.fingerprint
    assert opened.directory == built.directory
    assert repr(opened) == repr(built)
    assert [path.name for path in tmp_path.iterdir()] == [built.directory.name]


def test_two_that_build_at_once_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ask = reference_module._ask

    def slow(*given: object, **options: object) -> object:
        monkeypatch.setattr(reference_module, "_ask", ask)
        Reference.build(model, probe_set(), tmp_path)  # the other one is faster
        return ask(*given, **options)

    monkeypatch.setattr(reference_module, "_ask", slow)
    reference = Reference.build(model, probe_set(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [reference.directory.name]


def test_it_holds_no_logits(tmp_path: Path) -> None:
    """Positions x vocabulary numbers would be most of it."""
    probes = probe_set(texts(num=40, longest=40))
    reference = Reference.build(frozen_head(), probes, tmp_path, hookpoints=[])
    stored = safetensors.torch.load_file(reference.directory / ANSWERS)
    positions = reference.plan.num_positions
    assert positions > 600
    assert all(61 not in tensor.shape or positions not in tensor.shape for tensor in stored.values())


# The head


@pytest.mark.parametrize("how", ["in place", "through .data", "by an optimizer"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_references_head_is_a_copy_and_stays_when_the_models_trains(how: str, tied: bool, tmp_path: Path) -> None:
    made, model = texts(), llama(tied=tied)
    before = copy.deepcopy(model)
    reference = Reference.build(model, probe_set(made), tmp_path)
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(weight.shape, generator=generator)
    if how == "in place":
        with torch.no_grad():
            weight += noise
    elif how == "through .data":
        weight.data.add_(noise)
    else:
        weight.grad = noise
        torch.optim.SGD([weight], lr=1.0, fused=True).step()
    expected = naive.output_readings(before, model, made)
    for sensors in ("light", "full"):
        found = {
            reading.key: reading.value
            for reading in Monitor(probe_set(made), reference, sensors=sensors).read(model, 1)
        }
        for metric in ("kl_ref_live", "nll_change", "mass_moved", "max_token_gain"):
            assert found[f"diffsensor/{metric}"] == pytest.approx(expected[metric, ""][0], rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("change", ["one weight", "all weights", "the scale of the model"])
def test_a_frozen_head_that_changes_all_the_same_is_noticed_and_read_right(change: str, tmp_path: Path) -> None:
    made, model = texts(), frozen_head()
    before = copy.deepcopy(model)
    monitor = Monitor(probe_set(made), Reference.build(model, probe_set(made), tmp_path))
    assert {reading.value for reading in monitor.read(model, 0)} == {0.0}
    if change == "one weight":
        model.lm_head.weight.data[7, 3] += 1.0
    else:
        model.lm_head.weight.data.mul_(1.2)
    expected = naive.output_readings(before, model, made)
    found = {reading.key: reading.value for reading in monitor.read(model, 1)}
    for metric in ("kl_ref_live", "nll_change", "entropy_change", "mass_moved", "max_token_gain"):
        assert found[f"diffsensor/{metric}"] == pytest.approx(expected[metric, ""][0], rel=1e-4, abs=2e-6), metric


def test_a_frozen_head_too_large_to_keep_that_changes_is_said_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reference_module, "_KEPT_HEAD_BYTES", 100)
    model = frozen_head()
    reference = Reference.build(model, probe_set(), tmp_path)
    assert "head.weight" not in safetensors.torch.load_file(reference.directory / ANSWERS)
    monitor = Monitor(probe_set(), reference)
    assert {reading.value for reading in monitor.read(model, 0)} == {0.0}
    model.lm_head.weight.data[7, 3] += 1.0
    found = monitor.read(model, 1)
    assert {reading.sensor for reading in found} == {"activations"}
    assert monitor.failures == {"outputs": 1}
    assert "The model's output head has changed, but it was frozen" in caplog.text
    assert "(61 tokens) was not kept" in caplog.text


@pytest.mark.parametrize("sensors", ["light", "full"])
def test_a_frozen_head_too_large_to_keep_is_read_all_the_same(
    sensors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = texts(), frozen_head()
    live = drifted(model)
    kept = readings(model, live, probe_set(made), tmp_path / "kept", sensors)
    monkeypatch.setattr(reference_module, "_KEPT_HEAD_BYTES", 100)
    found = readings(model, live, probe_set(made), tmp_path / "not", sensors)
    assert {key: reading.value for key, reading in found.items()} == {
        key: reading.value for key, reading in kept.items()
    }


def test_a_head_that_trains_is_kept_however_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "_KEPT_HEAD_BYTES", 100)
    for model in (llama(), llama(tied=True), frozen_head(softcapped())):
        stored = safetensors.torch.load_file(Reference.build(model, probe_set(), tmp_path).directory / ANSWERS)
        assert torch.equal(stored["head.weight"], model.get_output_embeddings().weight)
        assert "mean_unembedding" not in stored


def test_a_head_that_begins_to_train_after_the_reference_is_read_right(tmp_path: Path) -> None:
    made, model = texts(), frozen_head()
    reference = Reference.build(model, probe_set(made), tmp_path)
    live = drifted(copy.deepcopy(model).requires_grad_(True))
    expected = naive.output_readings(model, live, made)
    found = {reading.key: reading.value for reading in Monitor(probe_set(made), reference).read(live, 1)}
    assert found["diffsensor/kl_ref_live"] == pytest.approx(expected["kl_ref_live", ""][0], rel=1e-4)


# Packing


def test_packed_rows_are_used_where_they_are_right_and_only_there(tmp_path: Path) -> None:
    assert Reference.build(llama(), probe_set(), tmp_path).plan.packed
    assert not Reference.build(opt(), probe_set(), tmp_path).plan.packed
    assert not Reference.build(own_model(), probe_set(), tmp_path).plan.packed


def test_one_probe_alone_can_be_a_probe_set(tmp_path: Path) -> None:
    made = [Text(ids=(5, 6, 7), counted=(True,) * 3)]
    found = readings(llama(), drifted(llama()), probe_set(made), tmp_path)
    expected = naive.output_readings(llama(), drifted(llama()), made)
    assert found["diffsensor/kl_ref_live"].value == pytest.approx(expected["kl_ref_live", ""][0], rel=1e-4)


# Damage


@pytest.fixture
def small(tmp_path: Path) -> tuple[Reference, ProbeSet]:
    probes = probe_set([Text(ids=(5, 6, 7, 8), counted=(True,) * 4), Text(ids=(9, 6, 4), counted=(True,) * 3)])
    return Reference.build(frozen_head(), probes, tmp_path / "cache"), probes


@pytest.mark.parametrize("name", [ANSWERS, META])
def test_no_flipped_bit_goes_unseen(name: str, small: tuple[Reference, ProbeSet]) -> None:
    reference, probes = small
    file = reference.directory / name
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if name == ANSWERS else len(good)
    places = [*range(0, header, 3 if name == ANSWERS else 5), *range(header, len(good), 41)]
    for number, place in enumerate(places):
        bad = bytearray(good)
        bad[place] ^= 1 << number % 8
        file.write_bytes(bad)
        with pytest.raises(CorruptFileError):
            Reference.open(reference.directory, probes)
    file.write_bytes(good)
    assert Reference.open(reference.directory, probes).fingerprint == reference.fingerprint


def test_one_flipped_bit_in_any_tensor_is_named(small: tuple[Reference, ProbeSet]) -> None:
    reference, probes = small
    file = reference.directory / ANSWERS
    good = file.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    names = [name for name in json.loads(good[8:start]) if name != "__metadata__"]
    assert len(names) > 10
    for name in names:
        begin, end = json.loads(good[8:start])[name]["data_offsets"]
        for place in {begin, (begin + end) // 2, end - 1} if end > begin else ():
            bad = bytearray(good)
            bad[start + place] ^= 16
            file.write_bytes(bad)
            with pytest.raises(
                CorruptFileError, match=f"has changed since it was written: {name} differs.*Remove that"
            ):
                Reference.open(reference.directory, probes)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated answers": lambda d: os.truncate(d / ANSWERS, (d / ANSWERS).stat().st_size - 5),
    "half of the answers": lambda d: os.truncate(d / ANSWERS, (d / ANSWERS).stat().st_size // 2),
    "answers of 4 bytes": lambda d: os.truncate(d / ANSWERS, 4),
    "empty answers": lambda d: os.truncate(d / ANSWERS, 0),
    "longer answers": lambda d: (d / ANSWERS).write_bytes((d / ANSWERS).read_bytes() + b"\0" * 8),
    "no answers": lambda d: (d / ANSWERS).unlink(),
    "truncated meta": lambda d: os.truncate(d / META, (d / META).stat().st_size - 5),
    "empty meta": lambda d: os.truncate(d / META, 0),
    "no meta": lambda d: (d / META).unlink(),
    "meta of something else": lambda d: (d / META).write_text("[]"),
    "nothing in it": lambda d: [path.unlink() for path in d.iterdir()],
    "a tensor more": lambda d: safetensors.torch.save_file(
        safetensors.torch.load_file(d / ANSWERS) | {"more": torch.zeros(1)}, d / ANSWERS
    ),
    "a tensor less": lambda d: safetensors.torch.save_file(
        {name: t for name, t in safetensors.torch.load_file(d / ANSWERS).items() if name != "entropy"}, d / ANSWERS
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_reference_is_refused_and_built_anew_from_the_same_model(
    damage: str, small: tuple[Reference, ProbeSet], caplog: pytest.LogCaptureFixture
) -> None:
    reference, probes = small
    good = safetensors.torch.load_file(reference.directory / ANSWERS)
    good = {name: tensor.clone() for name, tensor in good.items()}
    fingerprint = reference.fingerprint
    DAMAGE[damage](reference.directory)
    with pytest.raises(CorruptFileError, match="Remove that directory; a new run builds it again"):
        Reference.open(reference.directory, probes)
    with pytest.raises(CorruptFileError):
        Reference.find(fingerprint, probes, reference.directory.parent)
    with caplog.at_level(logging.WARNING):
        again = Reference.build(frozen_head(), probes, reference.directory.parent)
    assert "It is computed anew, from the same weights" in caplog.text
    assert again.fingerprint == fingerprint
    new = safetensors.torch.load_file(again.directory / ANSWERS)
    assert good.keys() == new.keys()
    assert all(torch.equal(good[name], new[name]) for name in good)


# Places that cannot be written to


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reference_module.safetensors.torch, "save_file", full)
    with pytest.raises(StorageError, match=r"could not be written to .*No space left on device.*cache_dir="):
        Reference.build(llama(), probe_set(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file_or_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="Free some room or give another directory: cache_dir="):
        Reference.build(llama(), probe_set(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(reference_module.tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError, match=r"Permission denied.*DIFFSENSOR_CACHE"):
        Reference.build(llama(), probe_set(), tmp_path / "sealed")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="could not be written"):
            Reference.build(llama(), probe_set(), tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSENSOR_CACHE", str(tmp_path / "mine"))
    reference = Reference.build(llama(), probe_set())
    assert reference.directory.parent == tmp_path / "mine" / "references"


# Of other things


def test_a_reference_for_other_probes_is_refused(tmp_path: Path) -> None:
    reference = Reference.build(llama(), probe_set(), tmp_path)
    other = probe_set(texts(seed=9))
    with pytest.raises(ReferenceMismatchError) as caught:
        Reference.open(reference.directory, other)
    assert probe_set().fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)
    with pytest.raises(ReferenceMismatchError, match="Use the same probes"):
        Monitor(other, reference)


def test_one_that_is_gone_is_not_built_anew(tmp_path: Path) -> None:
    reference = Reference.build(llama(), probe_set(), tmp_path)
    shutil.rmtree(reference.directory)
    with pytest.raises(ReferenceMismatchError, match=r"which is not in .*It is not built anew.*Give the cache_dir"):
        Reference.find(reference.fingerprint, probe_set(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    one = Reference.build(llama(), probe_set(), tmp_path)
    other = Reference.build(llama(seed=2), probe_set(), tmp_path)
    shutil.rmtree(one.directory)
    other.directory.rename(one.directory)
    with pytest.raises(ReferenceMismatchError, match=f"holds the reference {other.fingerprint}"):
        Reference.find(one.fingerprint, probe_set(), tmp_path)


@pytest.mark.parametrize("make", [llama, own_model], ids=["packed", "alone"])
def test_a_reference_that_answers_nan_is_refused_with_the_probe_named(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    made = [*texts(), Text(ids=(5, 6, 60, 8, 9), counted=(True,) * 5), Text(ids=(5, 6, 8, 9), counted=(True,) * 4)]
    made = [Text(ids=tuple(3 if t == 60 and i < 11 else t for t in text.ids), counted=text.counted)
            for i, text in enumerate(made)]  # fmt: skip
    model = make()
    with torch.no_grad():
        (model.model.embed_tokens if make is llama else model.embed).weight[60] = torch.nan
    with pytest.raises(NonFiniteError, match=r"not numbers \(NaN or infinite\).*look at the weights") as caught:
        Reference.build(model, probe_set(made), tmp_path)
    assert "first in probe '11' at token" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_answers_nan_to_all_is_refused(tmp_path: Path) -> None:
    for make in (llama, frozen_head, own_model):
        model = make()
        with torch.no_grad():
            next(model.parameters())[:] = torch.inf
        with pytest.raises(NonFiniteError, match="not numbers"):
            Reference.build(model, probe_set(), tmp_path)
    assert list(tmp_path.iterdir()) == []
