from dataclasses import replace

import pytest

from diffsensor.errors import ConfigError
from diffsensor.metrics import ACTIVATION_METRICS, OUTPUT_METRICS
from diffsensor.metrics.activations import CKA_DISTANCE
from diffsensor.rules.select import Select
from diffsensor.types import ALL_PROBES, WORST_GROUP, Findings, MetricInfo, Reading, Scope, log_key

METRICS: dict[str, MetricInfo] = {name: metric.info for name, metric in OUTPUT_METRICS.items()}
METRICS |= {name: metric.info for name, metric in ACTIVATION_METRICS.items()}
METRICS[CKA_DISTANCE.name] = CKA_DISTANCE
SCOPE = Scope(
    metrics=METRICS, groups={"code": 8, "prose": 8}, hookpoints=("h.0", "h.1"), progress=("loss",), bank="rolling"
)
GROUPS = (ALL_PROBES, "code", "prose", WORST_GROUP)


def readings() -> tuple[Reading, ...]:
    """All that such a scope would bring of three metrics."""
    one = Reading(step=0, sensor="", metric="", value=0.1, unit="", bank="rolling")
    kl = [replace(one, metric="kl_ref_live", group=group) for group in GROUPS]
    l2 = [replace(one, metric="relative_l2", group=group, hookpoint=at) for group in GROUPS for at in ("h.0", "h.1")]
    return (*kl, *l2, replace(one, metric="loss", sensor="progress"))


@pytest.mark.parametrize(
    ("select", "where"),
    [
        (Select("kl_ref_live"), [("", "")]),
        (Select("kl_ref_live", "code"), [("code", "")]),
        (Select("kl_ref_live", "worst"), [("worst", "")]),
        (Select("kl_ref_live", "*"), [("code", ""), ("prose", "")]),
        (Select("relative_l2", "", "*"), [("", "h.0"), ("", "h.1")]),
        (Select("relative_l2", "*", "h.1"), [("code", "h.1"), ("prose", "h.1")]),
        (Select("relative_l2", "*", "*"), [("code", "h.0"), ("prose", "h.0"), ("code", "h.1"), ("prose", "h.1")]),
        (Select("loss"), [("", "")]),
    ],
)
def test_what_is_announced_is_what_is_read(select: Select, where: list[tuple[str, str]]) -> None:
    select.check(SCOPE, "a rule")
    keys = {log_key(select.metric, bank="rolling", group=group, hookpoint=at): (group, at) for group, at in where}
    assert select.subjects(SCOPE) == keys
    found = select.readings(Findings(step=0, readings=readings()))
    assert {key: (one.group, one.hookpoint) for key, one in found.items()} == keys


def test_check_returns_what_the_metric_means_and_none_for_what_the_loop_tells() -> None:
    assert Select("kl_ref_live").check(SCOPE, "a rule") is METRICS["kl_ref_live"]
    assert Select("loss").check(SCOPE, "a rule") is None


def test_in_words_it_says_where() -> None:
    assert str(Select("relative_l2", "*", "h.0")) == "relative_l2 in each group at 'h.0'"
    assert str(Select("relative_l2", "worst", "*")) == "relative_l2 in the worst group at each hookpoint"
    assert str(Select("kl_ref_live", "code")) == "kl_ref_live in group 'code'"


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (Select("kl_ref_liv"), "Did you mean 'kl_ref_live'"),
        (Select("los"), "Did you mean 'loss'"),
        (Select("reward"), r"progress=\['reward'\]"),
        (Select("kl_ref_live", "prse"), "Did you mean 'prose'"),
        (Select("cka_distance", "*", "*"), "over all probes only"),
        (Select("kl_ref_live", "", "h.0"), "Leave hookpoint out"),
        (Select("relative_l2"), "'\\*' means each by itself"),
        (Select("relative_l2", "", "h.3"), "Known: h.0, h.1, \\*"),
        (Select("loss", "code"), "which has neither"),
        (Select("loss", "", "*"), "which has neither"),
    ],
)
def test_what_will_not_be_read_is_refused_with_what_will(select: Select, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        select.check(SCOPE, "my rule")
    assert "'my rule'" in str(refused.value)


@pytest.mark.parametrize("group", ["*", "worst", "code"])
def test_no_group_is_judged_where_there_are_none(group: str) -> None:
    with pytest.raises(ConfigError, match="the probes have no groups"):
        Select("kl_ref_live", group).check(replace(SCOPE, groups={}), "a rule")


def test_no_hookpoint_is_judged_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="there is none"):
        Select("relative_l2", "", "*").check(replace(SCOPE, hookpoints=()), "a rule")
