"""Modules that are no causal language model: classifiers, encoders, nets with BatchNorm, loops of one's own."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from diffsensor import Monitor, ProbeSet, Reading, Reference, read_record
from diffsensor.errors import CaptureError, ConfigError, DiffSensorError, HookpointError, ProbeError
from diffsensor_lightning import DriftMonitor
from tiny import VOCAB, WIDTH, drifted, llama, probe_set
from tiny_lightning import num_hooks, random_state

CLASSES = 5
CLOSE = {"rel": 1e-4, "abs": 2e-6}


class Digits(nn.Module):
    """A small image classifier with running statistics."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(6 * 64, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Tagger(nn.Module):
    """Logits [batch, pos, classes] out of two tensors, and a loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, values: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        return self.out(torch.tanh(self.mix(values * scale[:, None, None]))), None


class Named(nn.Module):
    """Returns a mapping, as many loops of one's own do."""

    def __init__(self, key: str = "logits") -> None:
        super().__init__()
        self.out = nn.Linear(4, CLASSES)
        self.key = key

    def forward(self, table: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.tensor(0.0), self.key: self.out(table)}


class NanoGPT(nn.Module):
    """As well-known small training scripts write it: (logits, loss), and the last position alone without targets."""

    def __init__(self, always_all: bool) -> None:
        super().__init__()
        self.always_all = always_all
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.h = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.wte(idx)
        for block in self.h:
            hidden = hidden + torch.tanh(block(hidden.cumsum(1) / (1 + torch.arange(hidden.shape[1])[:, None])))
        if targets is None and not self.always_all:
            return self.lm_head(hidden[:, [-1], :]), None
        logits = 3 * self.lm_head(hidden)
        return logits, None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def bert(kind: type[nn.Module], **more: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=32, initializer_range=0.3, **more)
    return kind(config).train()


def padded_texts(num: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 13, (num,), generator=generator)
    attention_mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(3, VOCAB, (num, 12), generator=generator) * attention_mask
    return {"input_ids": ids, "attention_mask": attention_mask}


def classes_read(ref: Tensor, live: Tensor) -> dict[str, float]:
    """The readings over all positions [pos, classes], by their definitions, in float64."""
    log_q, log_p = ref.double().log_softmax(-1), live.double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    return {
        "kl_ref_live": float((q * (log_q - log_p)).sum(-1).mean()),
        "kl_live_ref": float((p * (log_p - log_q)).sum(-1).mean()),
        "tv": float((p - q).abs().sum(-1).mean() / 2),
        "top1_flip": float((q.argmax(-1) != p.argmax(-1)).double().mean()),
        "entropy_change": float(((q * log_q).sum(-1) - (p * log_p).sum(-1)).mean()),
        "mass_moved": float((p.mean(0) - q.mean(0)).abs().sum() / 2),
        "max_token_gain": float((p - q).max()),
    }


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """What the model answers, in evaluation mode and float64."""
    model = copy.deepcopy(model).double().eval()

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    with torch.no_grad():
        if isinstance(inputs, Tensor):
            output = model(double(inputs))
        elif isinstance(inputs, tuple):
            output = model(*map(double, inputs))
        else:
            output = model(**{name: double(value) for name, value in inputs.items()})
    if isinstance(output, Mapping):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def read_both(model: nn.Module, probes: ProbeSet, cache_dir: Path) -> tuple[list[Reading], list[Reading], Reference]:
    """The readings of the model itself, and of a copy that has moved."""
    reference = Reference.build(model, probes, cache_dir)
    monitor = Monitor(probes, reference, sensors="full")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, hooks, chance = [module.training for module in model.modules()], num_hooks(model), random_state()
    same = monitor.read(model, 0)
    assert ([module.training for module in model.modules()], num_hooks(model), random_state()) == (modes, hooks, chance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = monitor.read(drifted(model), 1)
    assert monitor.failures == {}
    return same, moved, reference


KINDS: dict[str, tuple[Any, Any, Any]] = {
    "images, a tensor": (Digits, lambda: torch.rand(9, 1, 8, 8), None),
    "two tensors, a tuple": (
        Tagger,
        lambda: (torch.randn(9, 6, 4), 1 + torch.rand(9)),
        lambda: torch.rand(9, 6) < torch.tensor([1.0, 0.6, 0.6, 0.6, 0.6, 0.6]),
    ),
    "a mapping by name": (Tagger, lambda: {"scale": 1 + torch.rand(9), "values": torch.randn(9, 6, 4)}, "all"),
    "a mapping in return": (Named, lambda: torch.randn(9, 4), None),
    "BERT, sequences": (lambda: bert(BertForSequenceClassification, num_labels=3), padded_texts, None),
    "BERT, tokens": (lambda: bert(BertForTokenClassification, num_labels=4), padded_texts, "attention_mask"),
    "BERT, masked tokens": (lambda: bert(BertForMaskedLM), padded_texts, "attention_mask"),
    "GPT-2, sequences": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, num_labels=3
            )
        ),
        padded_texts,
        None,
    ),
}


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_read_at_the_positions_that_count(kind: str, tmp_path: Path) -> None:
    make, give, mark = KINDS[kind]
    model, inputs = make().train(), give()
    mask = inputs[mark] if mark == "attention_mask" else torch.ones(9, 6) if mark == "all" else mark and mark()
    probes = ProbeSet.from_tensors(inputs, mask, groups=["a", "b", ""] * 3, text=False)
    same, moved, reference = read_both(model, probes, tmp_path)
    assert len(same) > 20
    assert {reading.key: reading.value for reading in same if reading.value != 0.0} == {}

    ref, live = logits_of(model, inputs), logits_of(drifted(model), inputs)
    counted = torch.ones(len(probes)) > 0 if mask is None else mask > 0
    assert reference.plan.num_positions == int(counted.sum())
    found = {reading.metric: reading for reading in moved if not reading.hookpoint and not reading.group}
    for metric, value in classes_read(ref[counted], live[counted]).items():
        assert found[metric].value == pytest.approx(value, **CLOSE), metric
    assert found["kl_ref_live"].num_probes == 9
    assert "nll_change" not in found
    assert reference.hookpoints


@pytest.mark.usefixtures("unchecked")
def test_probes_that_the_mask_leaves_out_are_not_read(tmp_path: Path) -> None:
    images, kept = torch.rand(8, 1, 8, 8), torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]) > 0
    model = Digits()
    probes = ProbeSet.from_tensors(images, kept)
    _, moved, _ = read_both(model, probes, tmp_path)
    found = {reading.metric: reading.value for reading in moved if not reading.hookpoint}
    expected = classes_read(logits_of(model, images[kept]), logits_of(drifted(model), images[kept]))
    assert found["kl_ref_live"] == pytest.approx(expected["kl_ref_live"], **CLOSE)


@pytest.mark.usefixtures("unchecked")
def test_more_probes_than_a_batch_are_all_read(tmp_path: Path) -> None:
    images, model = torch.rand(150, 1, 8, 8), Digits()
    _, moved, reference = read_both(model, ProbeSet.from_tensors(images), tmp_path)
    assert [len(batch.index) for batch in reference.plan.batches] == [18] * 8 + [6]
    found = {reading.metric: reading.value for reading in moved if not reading.hookpoint}
    expected = classes_read(logits_of(model, images), logits_of(drifted(model), images))
    assert found["kl_ref_live"] == pytest.approx(expected["kl_ref_live"], **CLOSE)


def test_the_tokens_of_the_table_are_classes(tmp_path: Path) -> None:
    images, model = torch.rand(9, 1, 8, 8), Digits()
    live = copy.deepcopy(model)
    with torch.no_grad():
        live.layers[-1].bias[7] += 1.0
    reference = Reference.build(model, ProbeSet.from_tensors(images), tmp_path)
    shifts: list[Any] = []
    sink = type(
        "Sink", (), {"write": lambda self, found: shifts.extend(found.token_shifts), "close": lambda self: None}
    )
    Monitor(reference.probes, reference, sinks=[sink()]).read(live, 0)
    (first,) = [line for line in shifts if line.ranked_by == "mass_moved" and line.prefers == "live" and line.rank == 0]
    assert (first.token_id, first.token, first.context) == (7, "⟨7⟩", "")


def test_an_image_at_a_hookpoint_is_one_vector_for_each_probe(tmp_path: Path) -> None:
    images, model = torch.rand(9, 1, 8, 8), Digits().eval()
    live = drifted(model)
    reference = Reference.build(model, ProbeSet.from_tensors(images), tmp_path, ["layers.1"])
    found = {r.metric: r.value for r in Monitor(reference.probes, reference).read(live, 0) if r.hookpoint}
    with torch.no_grad():
        there, here = (net.layers[:2](images).flatten(1).double() for net in (model, live))
    assert found["relative_l2"] == pytest.approx(
        float(((here - there).norm(dim=1) / there.norm(dim=1)).mean()), **CLOSE
    )
    assert found["mean_shift"] == pytest.approx(float((here - there).mean(0).norm()), **CLOSE)


def test_padding_is_no_part_of_a_text_that_is_one_position(tmp_path: Path) -> None:
    model, inputs = bert(BertForSequenceClassification).eval(), padded_texts()
    live = drifted(model)
    hookpoint = "bert.encoder.layer.1"
    probes = ProbeSet.from_tensors(inputs, text=False)
    reference = Reference.build(model, probes, tmp_path, [hookpoint])
    found = {r.metric: r.value for r in Monitor(probes, reference).read(live, 0) if r.hookpoint}
    states: list[Tensor] = []
    with torch.no_grad():
        for net in (model, live):
            handle = net.get_submodule(hookpoint).register_forward_hook(lambda _m, _a, output: states.append(output))
            net(**inputs)
            handle.remove()
    there, here = (state.double() * inputs["attention_mask"][..., None] for state in states)
    there, here = there.flatten(1), here.flatten(1)
    assert found["relative_l2"] == pytest.approx(
        float(((here - there).norm(dim=1) / there.norm(dim=1)).mean()), **CLOSE
    )


@pytest.mark.parametrize("classes", [1, 3])
def test_a_regressor_is_read_by_its_activations_alone(classes: int, tmp_path: Path) -> None:
    # Of one value, every softmax is 1: its outputs would read as unmoved whatever it answers.
    model, images = Digits(classes), torch.rand(9, 1, 8, 8)
    live, probes = drifted(model), ProbeSet.from_tensors(images)
    monitor = Monitor(probes, sensors=["activations"], hookpoints=["layers.5"], cache_dir=tmp_path)
    if classes == 1:
        with pytest.raises(ConfigError, match=r"gives no distribution.*sensors=\['activations'\]"):
            Monitor(probes, cache_dir=tmp_path).attach(model)
    assert {reading.value for reading in monitor.read(model, 0)} == {0.0}
    there, here = logits_of(model, images), logits_of(live, images)
    found = {reading.metric: reading.value for reading in monitor.read(live, 1)}
    assert found["mean_shift"] == pytest.approx(float((here - there).mean(0).norm()), **CLOSE)


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, table: Tensor) -> Tensor:
        value: Tensor = self.out(table)[:, 0]
        return value


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        pytest.param(OneNumber(), torch.rand(5, 4), id="one number a row"),
        pytest.param(bert(BertForSequenceClassification, num_labels=1), padded_texts(), id="one label"),
        pytest.param(
            bert(BertForSequenceClassification, num_labels=3, problem_type="regression"),
            padded_texts(),
            id="regression",
        ),
        pytest.param(
            bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
            padded_texts(),
            id="independent labels",
        ),
    ],
)
def test_outputs_that_are_no_distribution_are_refused(model: nn.Module, inputs: Any, tmp_path: Path) -> None:
    probes = ProbeSet.from_tensors(inputs, text=False)
    for sensors in ("light", "full"):
        with pytest.raises(ConfigError, match="gives no distribution over classes"):
            Monitor(probes, sensors=sensors, cache_dir=tmp_path).attach(model)
    monitor = Monitor(probes, sensors=["activations"], cache_dir=tmp_path)
    monitor.read(model, 0)
    assert monitor.failures == {}
    assert any(reading.value > 0 for reading in monitor.read(drifted(model), 1))


def test_activations_without_a_hookpoint_are_refused(tmp_path: Path) -> None:
    monitor = Monitor(
        ProbeSet.from_tensors(torch.rand(3, 4)), sensors=["activations"], hookpoints=(), cache_dir=tmp_path
    )
    with pytest.raises(ConfigError, match="there is no hookpoint"):
        monitor.attach(OneNumber())


@pytest.mark.usefixtures("unchecked")
def test_a_small_language_model_of_ones_own_is_read(tmp_path: Path) -> None:
    model, probes = NanoGPT(always_all=True), probe_set()
    same, moved, reference = read_both(model, probes, tmp_path)
    assert reference.hookpoints == ("h.0", "h.1")
    assert {reading.value for reading in same} == {0.0}
    found = {reading.metric: reading.value for reading in moved if not reading.hookpoint and not reading.group}
    assert found["kl_ref_live"] > 1e-4
    assert "nll_change" in found


def text_model(kind: str) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}
    small = {"d_model": WIDTH, "vocab_size": VOCAB, "decoder_start_token_id": 0}
    layers = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    wide = LlamaModel(LlamaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    makers: dict[str, Any] = {
        "BertForMaskedLM": lambda: bert(BertForMaskedLM),
        "BertForTokenClassification": lambda: bert(BertForTokenClassification),
        "BertForSequenceClassification": lambda: bert(BertForSequenceClassification),
        "BertModel": lambda: bert(BertModel),
        "GPT2ForTokenClassification": lambda: GPT2ForTokenClassification(
            GPT2Config(vocab_size=VOCAB, **sizes, num_labels=4)
        ),
        "GPT2ForSequenceClassification": lambda: GPT2ForSequenceClassification(
            GPT2Config(vocab_size=VOCAB, **sizes, num_labels=4, pad_token_id=0)
        ),
        "LlamaModel": lambda: llama().model,
        "LlamaModel of tuples": lambda: _tuples(wide),
        "T5": lambda: T5ForConditionalGeneration(T5Config(**small, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
        "BART": lambda: BartForConditionalGeneration(
            BartConfig(**small, **layers, max_position_embeddings=64, init_std=0.3)
        ),
        "NanoGPT": lambda: NanoGPT(always_all=False),
        "a mapping without logits": lambda: _WithIds("scores"),
        "a loss first": lambda: _WithIds("loss"),
        "token ids": lambda: _WithIds("ids"),
    }
    torch.manual_seed(1)
    model: nn.Module = makers[kind]()
    return model


def _tuples(model: nn.Module) -> nn.Module:
    model.config.return_dict = False
    return model


class _WithIds(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.embed = what, nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Any:
        logits = self.embed(ids)
        return {"scores": {"scores": logits}, "loss": (logits.mean(), logits), "ids": logits.argmax(-1)}[self.what]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("BertForMaskedLM", r"BertForMaskedLM reads texts in both directions.*text=False"),
        ("BertForTokenClassification", r"gives 2 logits for each token, but token ids go up to \d+.*text=False"),
        ("GPT2ForTokenClassification", r"gives 4 logits for each token.*text=False"),
        (
            "BertForSequenceClassification",
            r"returned logits of shape \[1, 2\], expected \[1, \d+, classes\].*text=False",
        ),
        ("GPT2ForSequenceClassification", r"returned logits of shape \[1, 4\]"),
        ("BertModel", r"no 'logits': it has no output head"),
        ("LlamaModel", r"with 'last_hidden_state'.* and no 'logits': it has no output head"),
        ("LlamaModel of tuples", r"LlamaModel returned hidden states and no logits: it has no output head"),
        (
            "T5",
            r"could not be run on the first probe, which gives it input_ids: int64 \[1, \d+\] \(ValueError: .*decoder",
        ),
        ("BART", r"reads texts in both directions"),
        ("NanoGPT", r"returned logits of shape \[1, 1, 61\], expected \[1, \d+, classes\].*last token only"),
        ("a mapping without logits", r"returned a dict with 'scores' and no 'logits'"),
        ("a loss first", r"returned a tensor of shape \[\].*A loss, or the predicted class, is no logits"),
        ("token ids", r"and torch\.int64, expected logits"),
    ],
)
def test_a_model_without_next_token_logits_is_refused_in_a_sentence(kind: str, told: str, tmp_path: Path) -> None:
    model = text_model(kind)
    with pytest.raises(CaptureError, match=f"(?s){told}"):
        Monitor(probe_set(), cache_dir=tmp_path).attach(model)
    assert num_hooks(model) == 0


def test_a_causal_model_is_not_taken_for_one_that_reads_both_ways(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in ([[3, 3, 3, 3]], [[0, 0, 0]], [[5, 4]]):
            Reference.build(llama().to(dtype), ProbeSet.from_tensors(torch.tensor(tokens)), tmp_path)


IMAGES = torch.rand(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("model", "inputs", "mask", "told"),
    [
        pytest.param(
            Digits(),
            (IMAGES, torch.tensor([1, 2, 3, 4])),
            None,
            r"argument 0: float32 \[1, 1, 8, 8\], argument 1: int64 "
            r"\[1\] \(TypeError: .*Its forward takes \(images\).*no labels",
            id="images and labels",
        ),
        pytest.param(
            Digits(),
            torch.tensor([1, 2, 3, 4]),
            None,
            r"which gives it argument 0: int64 \[1\]",
            id="labels instead of images",
        ),
        pytest.param(
            Tagger(),
            torch.rand(4, 6, 4),
            None,
            r"Tagger could not be run.*missing 1 required positional argument: "
            r"'scale'.*Its forward takes \(values, scale\)",
            id="an argument is missing",
        ),
        pytest.param(
            Tagger(),
            {"values": torch.rand(4, 6, 4), "size": torch.rand(4)},
            None,
            r"unexpected keyword argument 'size'",
            id="an argument by another name",
        ),
        pytest.param(
            Tagger(),
            (torch.rand(4, 6, 4), torch.rand(4)),
            None,
            r"returned logits of shape \[1, 6, 5\], expected "
            r"\[1, classes\]\. .*a mask \[probe, pos\]",
            id="positions without a mask",
        ),
        pytest.param(
            Tagger(),
            (torch.rand(4, 6, 4), torch.rand(4)),
            torch.ones(4, 5),
            r"\[1, 6, 5\], expected \[1, 5, classes\]",
            id="a mask of another width",
        ),
        pytest.param(
            Digits(), IMAGES, torch.ones(4, 8), r"\[1, 10\], expected \[1, 8, classes\]", id="a mask for one position"
        ),
        pytest.param(
            Named("scores"), torch.rand(4, 4), None, r"a dict with 'loss', 'scores' and no 'logits'", id="a dict"
        ),
        pytest.param(
            nn.Conv2d(1, 2, 3), IMAGES, None, r"\[1, 2, 6, 6\], expected \[1, classes\]", id="a map of classes"
        ),
        pytest.param(
            nn.Identity(), torch.arange(4), None, r"A loss, or the predicted class, is no logits", id="integers"
        ),
        pytest.param(nn.LSTM(4, 3), torch.rand(4, 6, 4), None, r"returned logits of shape \[1, 6, 3\]", id="an LSTM"),
        pytest.param(
            bert(BertForMaskedLM),
            padded_texts(4),
            None,
            r"the positions \[1\].*a mask \[probe, pos\]",
            id="masked tokens without a mask",
        ),
        pytest.param(nn.Module(), IMAGES, None, r"could not be run.*NotImplementedError", id="no forward"),
    ],
)
def test_what_does_not_fit_is_refused_at_attach(
    model: nn.Module, inputs: Any, mask: Tensor | None, told: str, tmp_path: Path
) -> None:
    probes = ProbeSet.from_tensors(inputs, mask, text=False)
    with pytest.raises(CaptureError, match=f"(?s){told}"):
        Monitor(probes, cache_dir=tmp_path).attach(model)
    with pytest.raises(DiffSensorError):
        Reference.build(model, probes, tmp_path)


def test_a_hookpoint_without_the_positions_is_refused(tmp_path: Path) -> None:
    model, inputs = bert(BertForTokenClassification), padded_texts()
    probes = ProbeSet.from_tensors(inputs, inputs["attention_mask"], text=False)
    Reference.build(model, probes, tmp_path, ["bert.encoder.layer.?"])
    model.pooled = nn.Linear(WIDTH, 2)
    forward = model.forward

    def with_pooled(**given: Tensor) -> Any:
        model.pooled(torch.zeros(2, WIDTH))
        return forward(**given)

    model.forward = with_pooled
    with pytest.raises(HookpointError, match=r"'pooled' gives no output for each of the probes' positions \[1, 12\]"):
        Reference.build(model, probes, tmp_path, ["pooled"])


def test_a_live_model_that_answers_otherwise_is_refused_at_attach(tmp_path: Path) -> None:
    probes = ProbeSet.from_tensors(IMAGES)
    reference = Reference.build(Digits(), probes, tmp_path)
    with pytest.raises(DiffSensorError, match="The reference has 10 output tokens, the live model 9"):
        Monitor(probes, reference).attach(Digits(9))


def test_labels_are_no_input() -> None:
    inputs = padded_texts()
    with pytest.raises(ProbeError, match="'labels', which are no input"):
        ProbeSet.from_tensors(inputs | {"labels": inputs["input_ids"]}, text=False)
    with pytest.raises(ProbeError, match="'labels' beside 'input_ids'"):
        ProbeSet.from_tensors(inputs | {"labels": inputs["input_ids"]})
    with pytest.raises(ProbeError, match="token id -100; ids are 0 or more"):
        ProbeSet.from_tensors(torch.tensor([[3, 4, -100]]))


def test_a_model_on_several_devices_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].to("meta")
    with pytest.raises(CaptureError, match=r"spread over the devices cpu, meta.*device_map"):
        Monitor(probe_set(), cache_dir=tmp_path).attach(model)


def test_probes_that_are_inputs_are_stored_and_found_again(tmp_path: Path) -> None:
    probes = ProbeSet.from_tensors(padded_texts(), text=False)
    probes.save(tmp_path / "probes")
    again = ProbeSet.load(tmp_path / "probes")
    assert not again.is_text
    assert again.fingerprint == probes.fingerprint != ProbeSet.from_tensors(padded_texts()).fingerprint


class LitDigits(pl.LightningModule):
    """Handwritten digits, as a Lightning user writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Digits()
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, digits = batch
        loss = nn.functional.cross_entropy(self(images), digits)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_digits(callbacks: list[pl.Callback], root: Path) -> LitDigits:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    train = TensorDataset(images[:1600], torch.tensor(digits.target[:1600]))
    pl.seed_everything(0, verbose=False)
    module = LitDigits()
    trainer = pl.Trainer(
        max_epochs=2, callbacks=callbacks, accelerator="cpu", devices=1, logger=False, default_root_dir=root,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.usefixtures("unchecked")
def test_a_classifier_of_digits_is_watched_while_it_learns(tmp_path: Path) -> None:
    digits = load_digits()
    probes = ProbeSet.from_tensors(
        torch.tensor(digits.images[1600:1728], dtype=torch.float32)[:, None] / 16,
        groups=[str(digit) for digit in digits.target[1600:1728]],
    )
    monitor = DriftMonitor(probes, every_n_train_steps=10, record=tmp_path / "drift", cache_dir=tmp_path / "cache")
    watched, alone = fit_digits([monitor], tmp_path), fit_digits([], tmp_path)
    assert watched.losses == alone.losses
    assert all(torch.equal(one, other) for one, other in zip(watched.parameters(), alone.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(watched.buffers(), alone.buffers(), strict=True))

    record = read_record(tmp_path / "drift")
    kl = [r.value for r in record.readings if r.metric == "kl_ref_live" and not r.group]
    assert kl[0] == 0.0
    assert kl[-1] > 0.5
    assert {r.step for r in record.readings} == {0, 10, 20, 30, 40, 50}
    assert {r.group for r in record.readings if r.metric == "kl_ref_live"} == {"", "worst", *map(str, range(10))}
    moved = {
        r.hookpoint: r.value for r in record.readings if r.step == 50 and r.metric == "relative_l2" and not r.group
    }
    assert list(moved) == ["net.layers.0", "net.layers.1", "net.layers.5"]
    assert all(math.isfinite(value) and value > 0 for value in moved.values())
    entropy = [r.value for r in record.readings if r.metric == "entropy_change" and not r.group]
    assert entropy[-1] < -0.5  # it has become surer
