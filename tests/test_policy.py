"""The policy file: what it makes of itself, and the line and the closest name of whatever means nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffsensor import Monitor
from diffsensor.actions import Response, ScaleLearningRate, Stop
from diffsensor.errors import ConfigError
from diffsensor.gate import Gate
from diffsensor.policy import ACTIONS, RULES, read_policy
from diffsensor.rules import AnyOf, ChangePoint, Invariant, KOf, Limit
from diffsensor.schedules import every, log_spaced
from diffsensor.sinks import Webhook
from tiny import Letters, llama

WHOLE = """\
probes: probes.jsonl
sensors: full
schedule: {every: 7}
temperature: 0.7
log_text: false
rules:
  - invariant
  - limit: {metric: kl_ref_live, above: 0.3, group: "*", for: 3}
    do: [scale_learning_rate: 0.5, stop]
    patience: 2
  - any_of:
      - change_point: {metric: relative_l2, hookpoint: "*"}
      - limit: {metric: kl_ref_live, above: 1}
  - k_of:
      k: 1
      severity: critical
      rules:
        - limit: {metric: mass_moved, above: 0.5, name: mass}
        - limit: {metric: mass_moved, above: 0.6, name: more mass}
gate:
  - limit: {metric: kl_ref_live, above: 0.3}
  - invariant
budget: {limit: 0.2, kp: 0.5}
sinks:
  - webhook: {url: "https://example.org/hook", min_severity: critical}
banks:
  held_out: {probes: probes.jsonl, schedule: {log_spaced: 5}, sealed: true}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    """Reads a policy from text, in a directory with a file of probes."""
    lines = [{"text": "some text here", "group": "a"}, {"text": "another one there", "group": "b"}]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(text: str, tokenizer: object = Letters()) -> Any:
        (tmp_path / "drift.yaml").write_text(text)
        return read_policy(tmp_path / "drift.yaml", tokenizer)

    return read


def test_everything_that_is_named_is_made_with_its_arguments(policy: Any) -> None:
    found = policy(WHOLE)
    given = found.arguments
    assert len(given["probes"]) == 2
    assert [sensor.name for sensor in given["sensors"]] == ["outputs_full", "activations"]
    assert given["schedule"] == every(7)
    assert (given["temperature"], given["log_text"]) == (0.7, False)
    invariant, response, either, several = given["rules"]
    assert isinstance(invariant, Invariant)
    assert isinstance(response, Response)
    assert isinstance(response.rule, Limit)
    twin = Limit("kl_ref_live", above=0.3, group="*", for_=3)
    assert (response.rule.name, response.rule.state_dict()) == (twin.name, twin.state_dict())
    assert [action.name for action in response.actions] == [ScaleLearningRate(0.5).name, Stop().name]
    assert either.name == AnyOf(ChangePoint("relative_l2", hookpoint="*"), Limit("kl_ref_live", above=1)).name
    masses = [Limit("mass_moved", above=above, name=name) for above, name in ((0.5, "mass"), (0.6, "more mass"))]
    assert several.name == KOf(1, *masses).name
    assert several.severity == "critical"
    assert isinstance(given["gate"], Gate)
    assert [criterion.name for criterion in given["gate"].criteria] == [
        Limit("kl_ref_live", above=0.3).name,
        "invariant",
    ]
    assert given["budget"].limit == 0.2
    assert isinstance(given["sinks"][0], Webhook)
    given["sinks"][0].close()
    held_out = found.banks["held_out"]
    assert (held_out["schedule"], held_out["sealed"], held_out["bank"]) == (log_spaced(5), True, "held_out")


def test_a_policy_drives_a_monitor(policy: Any, tmp_path: Path) -> None:
    text = "probes: probes.jsonl\nrules:\n  - limit: {metric: kl_ref_live, above: 0.1}\ngate:\n  - invariant\n"
    monitor = Monitor(**policy(text).arguments, cache_dir=tmp_path / "cache")
    model = llama()
    assert monitor.read(model, 0)
    assert monitor.verdict(model, 0).outcome == "pass"


def test_the_same_bytes_have_the_same_digest(policy: Any) -> None:
    once, again = policy("probes: probes.jsonl\n"), policy("probes: probes.jsonl\n")
    assert once.digest == again.digest != policy("probes: probes.jsonl\nlog_text: true\n").digest


def test_a_sink_of_another_package_is_named_by_its_entry_point(policy: Any) -> None:
    found = policy("probes: probes.jsonl\nsinks:\n  - wandb: {project: somewhere}\n")
    assert [type(sink).__name__ for sink in found.arguments["sinks"]] == ["WandbSink"]


PROBES = "probes: probes.jsonl\n"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", None, "is empty"),
        ("probes: [", 1, "this is no YAML"),
        ("- probes", 1, "a policy is ['probes'], expected names with values"),
        ("rules: []", 1, "no probes are named"),
        ("probes: probs.jsonl", 1, "Did you mean 'probes.jsonl'?"),
        ("probes: 3", 1, "probes is 3"),
        (PROBES + "sensor: light", 2, "No part of a policy is named 'sensor'. Did you mean 'sensors'?"),
        (PROBES + PROBES, 2, "'probes' is given twice"),
        (PROBES + "sensors: lite", 2, "Did you mean 'light'?"),
        (PROBES + "schedule: {evry: 3}", 2, "Did you mean 'every'?"),
        (PROBES + "schedule: {every: 0}", 2, "at least 1"),
        (PROBES + "rules: invariant", 2, "expected a list"),
        (PROBES + "rules:\n  - limt: {metric: kl_ref_live, above: 1}", 3, "Did you mean 'limit'?"),
        (PROBES + "rules:\n  - limit: {metric: kl_ref_live, abov: 1}", 3, "Did you mean 'above'?"),
        (PROBES + "rules:\n  - invariant\n  - limit: {metric: kl_ref_live}", 4, "above"),
        (PROBES + "rules:\n  - limit: {above: 1}", 3, "limit needs `metric:`"),
        (PROBES + "rules:\n  - invariant: {}\n    do: [stp]", 4, "Did you mean 'stop'?"),
        (PROBES + "rules:\n  - invariant: {}\n    patience: 3", 3, "patience is given without `do:`"),
        (PROBES + "rules:\n  - k_of: {k: 1}", 3, "k_of needs"),
        (PROBES + "rules:\n  - own: {function: 'os:system'}", 3, "No rule is named 'own'"),
        (PROBES + "rules:\n  - invariant: {}\n    do: [stop]\n    patiense: 3", 5, "Did you mean 'patience'?"),
        (PROBES + "gate: []", 2, "no criterion"),
        (PROBES + "gate:\n  - change_point: {metric: relative_l2}", 3, "cannot judge one checkpoint by itself"),
        (PROBES + "budget: {limit: -1}", 2, "limit=-1"),
        (PROBES + "log_text: 'yes'", 2, "log_text is 'yes', expected bool"),
        (PROBES + "temperature: true", 2, "temperature is True"),
        (PROBES + "sinks:\n  - webhok: {url: 'https://x'}", 3, "Did you mean 'webhook'?"),
        (PROBES + "banks:\n  fixed: {probes: probes.jsonl}", 3, "a bank is named 'fixed'"),
        (PROBES + "banks:\n  other: {seled: true}", 3, "Did you mean 'sealed'?"),
        (PROBES + "log_text: !!python/object/apply:os.system ['true']", 2, "cannot be read"),
    ],
)
def test_what_means_nothing_is_refused_with_its_line_and_the_closest_name(
    policy: Any, text: str, line: int | None, told: str, unchecked: None
) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(text)
    sentence = str(caught.value)
    assert told in sentence
    assert ("drift.yaml" if line is None else f"drift.yaml line {line}: ") in sentence
    assert sentence.endswith(".")
    assert ".." not in sentence.replace("...", "")


def test_text_without_a_tokenizer_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"line 1: .* no tokenizer was given"):
        policy(PROBES, tokenizer=None)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        read_policy(tmp_path / "nothing.yaml")


def test_names_are_those_of_the_classes() -> None:
    assert {"limit", "change_point", "group_shift", "envelope", "invariant"} == RULES.keys()
    assert {"stop", "save_checkpoint", "set_kl_coefficient", "scale_kl_coefficient", "rollback"} < ACTIONS.keys()
