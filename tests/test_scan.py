"""`diffsensor scan` and `gate`: every kind of checkpoint reads as the model that it is, once and in order."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from diffsensor import Gate, Monitor, ProbeSet, Reference, cli, read_record
from diffsensor.checkpoints import checkpoint_at, checkpoints_at, load_checkpoint, require_complete
from diffsensor.errors import CaptureError, ConfigError, CorruptFileError
from diffsensor.rules import Limit
from diffsensor.scan import Scan
from tiny import drifted, llama
from tiny_tokenizers import bpe

# peft asks models a question in words that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat on a cat and ran", "on the mat the cat"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference with its tokenizer, probes, and checkpoints of three steps."""
    root = tmp_path_factory.mktemp("scan")
    tokenizer = bpe()
    model = llama(vocab=len(tokenizer))
    model.save_pretrained(root / "reference")
    tokenizer.save_pretrained(root / "reference")
    lines = [{"text": text, "group": "ab"[number % 2]} for number, text in enumerate(TEXTS)]
    (root / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (20, 100, 3):
        drifted(model, 0.001 * step, seed=step).save_pretrained(root / "run" / f"checkpoint-{step}")
    return root


@pytest.fixture
def probes(place: Path) -> ProbeSet:
    return ProbeSet.from_jsonl(place / "probes.jsonl", bpe())


def model_at(place: Path) -> nn.Module:
    return llama(vocab=len(bpe()))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, out, err


def scan(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, *more: object) -> tuple[int, Any, str]:
    given = (
        place / "reference",
        *more,
        "--probes",
        place / "probes.jsonl",
        "--cache-dir",
        tmp_path / "cache",
        "--json",
    )
    code, out, err = command(capsys, "scan", *given)
    return code, json.loads(out) if out else None, err


def test_checkpoints_are_read_in_the_order_of_their_steps_as_a_monitor_reads_them(
    place: Path, probes: ProbeSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = scan(capsys, place, tmp_path, place / "run", "-o", tmp_path / "record")
    assert code == 0
    assert [each["step"] for each in told["checkpoints"]] == [3, 20, 100]
    reference = Reference.build(model_at(place), probes, tmp_path / "other")
    for each in told["checkpoints"]:
        step = each["step"]
        monitor = Monitor(probes, reference)
        expected = {
            reading.key: reading.value
            for reading in monitor.read(drifted(model_at(place), 0.001 * step, seed=step), step)
            if reading.group in ("", "worst")
        }
        found = {key: reading["value"] for key, reading in each["readings"].items()}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9, nan_ok=True)
    record = read_record(tmp_path / "record")
    assert sorted({reading.step for reading in record.readings}) == [3, 20, 100]


def test_the_reference_itself_reads_exactly_0(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, told, _ = scan(capsys, place, tmp_path, place / "reference", "-o", tmp_path / "record")
    (only,) = told["checkpoints"]
    assert {reading["value"] for reading in only["readings"].values()} == {0.0}
    assert only["step"] == 0


def test_what_is_in_the_record_is_not_read_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place / "run" / "checkpoint-3"
    scan(capsys, place, tmp_path, first, "-o", tmp_path / "record")
    loaded: list[Path] = []

    def counting(checkpoint: Any, *arguments: Any, **options: Any) -> nn.Module:
        loaded.append(checkpoint.path)
        return load_checkpoint(checkpoint, *arguments, **options)

    monkeypatch.setattr("diffsensor.scan.load_checkpoint", counting)
    _, told, _ = scan(capsys, place, tmp_path, place / "run", "-o", tmp_path / "record", "--limit", "kl_ref_live=1e-6")
    assert [path.name for path in loaded] == ["checkpoint-20", "checkpoint-100"]
    assert [each["is_new"] for each in told["checkpoints"]] == [False, True, True]
    assert told["checkpoints"][0]["verdict"]["outcome"] == "fail"  # by today's limit


def test_another_checkpoint_of_the_same_step_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(capsys, place, tmp_path, place / "run" / "checkpoint-3", "-o", tmp_path / "record")
    drifted(model_at(place), 0.1).save_pretrained(tmp_path / "checkpoint-3")
    code, _, err = scan(capsys, place, tmp_path, tmp_path / "checkpoint-3", "-o", tmp_path / "record")
    assert code == 2
    assert "another one, or has changed since" in err


@pytest.mark.parametrize(
    ("limit", "outcome", "code"), [("kl_ref_live=100", "pass", 0), ("kl_ref_live@worst=1e-9", "fail", 1)]
)
def test_the_exit_code_of_the_gate_is_the_verdict(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, outcome: str, code: int
) -> None:
    given = ("--reference", place / "reference", "--probes", place / "probes.jsonl", "--cache-dir", tmp_path / "cache")
    checkpoint = place / "run" / "checkpoint-100"
    found, out, _ = command(capsys, "gate", checkpoint, *given, "--limit", limit, "--json")
    assert found == code
    verdict = json.loads(out)["checkpoints"][0]["verdict"]
    assert verdict["outcome"] == outcome
    assert "±" in command(capsys, "gate", checkpoint, *given, "--limit", limit)[1]


def test_a_policy_is_the_gate_of_a_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "drift.yaml").write_text(
        f"probes: {place / 'probes.jsonl'}\nrules:\n  - limit: {{metric: kl_ref_live, above: 0.1}}\n    do: [stop]\n"
        "gate:\n  - limit: {metric: kl_ref_live, above: 1.0e-9}\n"
    )
    given = ("--reference", place / "reference", "--cache-dir", tmp_path / "cache", "--policy", tmp_path / "drift.yaml")
    checkpoint = place / "run" / "checkpoint-100"
    code, _, err = command(capsys, "gate", checkpoint, *given)
    assert code == 1
    assert "There is no run to act on" in err
    # A limit beside the policy is one more, and never takes the place of its gate.
    assert command(capsys, "gate", checkpoint, *given, "--limit", "nll_change=100")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--limit", "kl_ref_liv=1"), "Did you mean 'kl_ref_live'?"),
        (("--limit", "kl_ref_live"), "expected METRIC=NUMBER"),
        ((), "nothing that the checkpoint must meet"),
        (("--limit", "kl_ref_live=1", "--device", "cuda:7"), "device='cuda:7'"),
        (("--limit", "kl_ref_live=1", "--dtype", "float12"), "dtype='float12'"),
    ],
)
def test_what_means_nothing_is_refused_with_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    given = ("--reference", place / "reference", "--probes", place / "probes.jsonl", "--cache-dir", tmp_path / "cache")
    code, out, err = command(capsys, "gate", place / "run" / "checkpoint-3", *given, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_every_kind_of_checkpoint_becomes_the_model_that_it_is(place: Path, tmp_path: Path) -> None:
    live = drifted(model_at(place), 0.1)
    weights = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    live.save_pretrained(tmp_path / "whole")
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "step=7.ckpt")
    inner = {f"teacher.{name}": tensor for name, tensor in model_at(place).state_dict().items()}
    inner |= {f"student.net.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": inner}, tmp_path / "two.ckpt")
    ids = torch.tensor([[5, 6, 7, 8]])
    live.eval()
    paths = {"whole": None, "weights.safetensors": None, "pytorch_model.bin": None, "step=7.ckpt": None}
    for name, module_path in {**paths, "two.ckpt": "student.net"}.items():
        found = load_checkpoint(
            checkpoint_at(tmp_path / name), place / "reference", like={"dtype": torch.float32}, module_path=module_path
        )
        assert torch.equal(found(ids).logits, live(ids).logits), name
    with pytest.raises(CaptureError, match=r"2 of them found\. Say what its names begin with"):
        load_checkpoint(checkpoint_at(tmp_path / "two.ckpt"), place / "reference", like={})


def test_an_adapter_is_put_on_the_reference(place: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(model_at(place), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "checkpoint-5")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = load_checkpoint(
        checkpoint_at(tmp_path / "checkpoint-5"), place / "reference", like={"dtype": torch.float32}
    )
    assert torch.equal(found(ids).logits, adapted.eval()(ids).logits)
    assert not torch.equal(found(ids).logits, model_at(place).eval()(ids).logits)


def test_several_adapters_are_scanned_without_an_alarm(place: Path, probes: ProbeSet, tmp_path: Path) -> None:
    for step in (1, 2):
        model = model_at(place)
        torch.manual_seed(step)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    reader = Scan(place / "reference", {"probes": probes, "cache_dir": tmp_path / "cache"}, record=tmp_path / "record")
    values = [
        next(each.value for each in reader.read(checkpoint).readings if each.metric == "kl_ref_live")
        for checkpoint in checkpoints_at([tmp_path / "run"])
    ]
    reader.close()
    assert values[0] != values[1] > 0
    assert read_record(tmp_path / "record").alerts == ()


class Planted:
    """Runs when a pickle that holds it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": {}}, "holds no state dict"),
        ({"a": torch.zeros(1)}, "none found"),
        ([1, 2], "holds no state dict"),
        ({"state_dict": {"a": Planted()}}, "cannot be read as weights only"),
    ],
)
def test_what_is_no_state_dict_is_refused_and_never_run(
    place: Path, tmp_path: Path, content: object, told: str
) -> None:
    torch.save(content, tmp_path / "step=1.ckpt")
    with pytest.raises(CaptureError, match=told):
        load_checkpoint(checkpoint_at(tmp_path / "step=1.ckpt"), place / "reference", like={})


def test_parameters_that_lack_or_are_unknown_are_named(place: Path, tmp_path: Path) -> None:
    weights = dict(model_at(place).state_dict())
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    torch.save(weights, tmp_path / "less.bin")
    with pytest.raises(CaptureError, match=r"lacks 1 of the model's parameters, first 'model\.layers\.1\.mlp\.up_proj"):
        load_checkpoint(checkpoint_at(tmp_path / "less.bin"), place / "reference", like={})
    torch.save({**weights, "model.layers.1.mlp.up_proj.weight": gone, "extra": gone}, tmp_path / "more.bin")
    with pytest.raises(CaptureError, match="1 parameters that LlamaForCausalLM does not know, first 'extra'"):
        load_checkpoint(checkpoint_at(tmp_path / "more.bin"), place / "reference", like={})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_cut_anywhere_is_not_complete(place: Path, tmp_path: Path, kind: str) -> None:
    weights = {name: tensor.clone() for name, tensor in model_at(place).state_dict().items()}
    file = tmp_path / f"step=1.{kind}"
    if kind == "bin":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    whole = file.read_bytes()
    require_complete(checkpoint_at(file))
    for length in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match="still being written"):
            require_complete(checkpoint_at(file))


def test_a_missing_shard_is_not_complete(place: Path, tmp_path: Path) -> None:
    model_at(place).save_pretrained(tmp_path / "checkpoint-1", max_shard_size="4KB")
    require_complete(checkpoint_at(tmp_path / "checkpoint-1"))
    shards = sorted((tmp_path / "checkpoint-1").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CorruptFileError, match=f"{shards[1].name} is missing"):
        require_complete(checkpoint_at(tmp_path / "checkpoint-1"))


def test_steps_come_from_the_trainers_state_or_from_names(tmp_path: Path) -> None:
    for name in ("checkpoint-12", "epoch=1-step=40", "global_step7", "step_3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 13}')
    assert [each.step for each in checkpoints_at([tmp_path])] == [3, 7, 13, 40]
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    assert [each.step for each in checkpoints_at([tmp_path / "final"])] == [0]
    with pytest.raises(ConfigError, match=r"The step of '.*final' is not known"):
        checkpoints_at([tmp_path])
    with pytest.raises(ConfigError, match="both are of step 3"):
        checkpoints_at([tmp_path / "step_3", tmp_path / "step_3"])


def test_one_model_is_in_memory_at_a_time(
    place: Path, probes: ProbeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def watched(*arguments: Any, **options: Any) -> nn.Module:
        gc.collect()
        assert [each for each in alive if each() is not None] == []
        model = load_checkpoint(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("diffsensor.scan.load_checkpoint", watched)
    gate = Gate(Limit("kl_ref_live", above=1.0))
    reader = Scan(
        place / "reference", {"probes": probes, "gate": gate, "cache_dir": tmp_path}, record=tmp_path / "record"
    )
    for checkpoint in checkpoints_at([place / "run"]):
        reader.read(checkpoint)
    reader.close()
    assert len(alive) == 3
