"""What a trainer of TRL's that samples knows of its own completions, as readings beside those of the fixed probes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, final

from diffsensor import ConfigError, Findings, MetricInfo, Reading
from diffsensor_transformers.penalty import kind_in_trl

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("Rollouts needs transformers: pip install 'diffsensor[transformers]'") from error

#: What cuts a distribution off before it is sampled from, and when it does not.
_CUTS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
#: TRL's trainers that learn from what they sample themselves.
SAMPLERS = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")

_SINCE = "then over all batches since the last reading"
_PER_TOKEN = f"mean over the tokens of a batch, of all processes together, {_SINCE}"
_PER_COMPLETION = f"over the completions that were sampled together, of all processes, {_SINCE}"
_TOKENS = "tokens of completions that the loss counts"
_DTYPE = "as the trainer computes it, with dropout where the model has it"

_KL: dict[str, MetricInfo] = {
    "GRPOTrainer": MetricInfo(
        name="rollout_kl_k3",
        unit="nats/token",
        low=0.0,
        high=inf,
        direction="KL(live || the trainer's own reference), at the sampling temperature",
        estimator="sampled, k3: r - 1 - log r with r = p_ref / p_live of each sampled token; unbiased where the live "
        f"model sampled it, from all of its distribution; {_PER_TOKEN}",
        positions=_TOKENS,
        dtype=_DTYPE,
        scale="log",
        blind_to="whatever the policy does not write any more, and what it would write to other prompts; heavy tails, "
        "where r is huge and rare",
        by_group=False,
    ),
    "RLOOTrainer": MetricInfo(
        name="rollout_kl_k1",
        unit="nats/token",
        low=-inf,
        high=inf,
        direction="KL(live || the trainer's own reference), at the sampling temperature",
        estimator="sampled, k1: log p_live - log p_ref of each sampled token, when it was sampled; unbiased, below 0 "
        f"by chance; {_PER_TOKEN}",
        positions=_TOKENS,
        dtype=_DTYPE,
        blind_to="whatever the policy does not write any more, and what it would write to other prompts",
        by_group=False,
    ),
}
_ENTROPY = MetricInfo(
    name="rollout_entropy",
    unit="nats/token",
    low=0.0,
    high=inf,
    direction="of the live model, not a difference; at the sampling temperature",
    estimator=f"exact over the whole vocabulary at each token; {_PER_TOKEN}",
    positions=_TOKENS,
    dtype=_DTYPE,
    blind_to="what it is sure of",
    by_group=False,
)
_LENGTH = MetricInfo(
    name="rollout_length",
    unit="tokens",
    low=0.0,
    high=inf,
    direction="of the completions, not a difference",
    estimator=f"mean {_PER_COMPLETION}",
    positions="completions",
    dtype="exact",
    blind_to="how long those would be that were cut off: see rollout_clipped",
    by_group=False,
)
_CLIPPED = MetricInfo(
    name="rollout_clipped",
    unit="share of completions",
    low=0.0,
    high=1.0,
    direction="of the completions, not a difference",
    estimator=f"share without an end of text, cut off at the longest length allowed, {_PER_COMPLETION}",
    positions="completions",
    dtype="exact",
    blind_to="by how much they were cut",
    by_group=False,
)


def _reward(name: str, what: str) -> MetricInfo:
    return MetricInfo(
        name=name,
        unit="as given",
        low=-inf,
        high=inf,
        direction="of the completions, not a difference",
        estimator=f"{what} {_PER_COMPLETION}",
        positions="completions",
        dtype="as the reward function gives it",
        blind_to="whether it is earned or hacked",
        by_group=False,
    )


def _gap(probes: MetricInfo, sampled: MetricInfo) -> MetricInfo:
    same = "KL(live || reference) in both" if probes.name == "kl_live_ref" else "two directions of the KL"
    return MetricInfo(
        name=f"rollout_kl_minus_{probes.name}",
        unit="nats/token",
        low=-inf,
        high=inf,
        direction=f"{sampled.name} - {probes.name}: {same}; above 0 the policy has moved more where it samples, "
        "below 0 more on the fixed probes",
        estimator=f"mean of {sampled.name} over the batches since the last reading, less the mean of {probes.name} "
        "over all probes at the last reading and at this one",
        positions=f"{_TOKENS}; counted positions of the probes",
        dtype=_DTYPE,
        worst="furthest_from_zero",
        blind_to="a move that is as large on both; it compares other texts with one another, so it need not be 0 for "
        "a model that moved everywhere alike: watch where it goes",
        by_group=False,
        sealed=probes.sealed,
    )


@dataclass(slots=True, kw_only=True)
class _Mean:
    """The mean of what came since the last reading, and what came last of all."""

    total: float = 0.0
    count: int = 0
    newest: float = math.nan

    def add(self, value: float) -> None:
        self.newest = value
        if not math.isnan(value):  # which the trainer leaves out as well: no reward was given
            self.total, self.count = self.total + value, self.count + 1

    def take(self) -> float:
        """And begin anew. Completions are used for several steps, so where none came the newest are still those."""
        value = self.total / self.count if self.count else self.newest
        self.total, self.count = 0.0, 0
        return value


@final
class Rollouts:
    """Readings of what a trainer has counted of its own completions since the last reading; nothing is computed anew.

    The trainer keeps numbers of each batch until it logs them. Here they are copied at each step, as the plain numbers
    that they are by then, so that nothing waits for a GPU and the trainer's log is as before. They are those that the
    trainer logs, over the steps since the last reading in place of those since the last log. There is none before the
    first step.

    One reading compares: how much further the policy has moved where it samples than on the fixed probes. There is one
    where the trainer has a KL and its reference is known to be that of the monitor.

    Arguments:
        trainer: one of TRL's that samples.
        drift: what the monitor reads on the probes, by metric name.
        is_same_reference: whether the monitor's reference is the model with which training began.
        may_get_beta: whether a trainer that begins without a KL may get one on the way.
        probe_temperature: the temperature at which the probes are read.
    """

    name = "rollouts"

    def __init__(
        self,
        trainer: Any,
        drift: Mapping[str, MetricInfo],
        *,
        is_same_reference: bool = True,
        may_get_beta: bool = False,
        probe_temperature: float = 1.0,
    ) -> None:
        kind = sampler(trainer)
        self._trainer = trainer
        self._infos = dict(_of_kept(self._trainer))
        self._probe_kl = ""
        self._gap: MetricInfo | None = None
        if kind in _KL and (self._trainer.beta != 0 or may_get_beta):
            sampled = self._infos["kl"] = _KL[kind]
            probes = next((name for name in ("kl_live_ref", "kl_ref_live") if name in drift), "")
            if probes and is_same_reference and _keeps_reference(self._trainer):
                self._probe_kl = probes
                self._gap = _gap(drift[probes], sampled)
        infos = [*self._infos.values(), *([self._gap] if self._gap else [])]
        self.metrics: dict[str, MetricInfo] = {info.name: info for info in infos}
        caution = _caution(self._trainer)
        temperatures = _temperatures(self._trainer.args.temperature, probe_temperature)
        self._notes = {"kl": caution, "gap": "; ".join(note for note in (temperatures, caution) if note)}
        self._before: dict[str, int] = {}
        self._means = {key: _Mean() for key in self._infos}
        self._last_probe_kl = math.nan

    def begin_step(self) -> None:
        """Before a step: what is kept already is not of this one."""
        self._before = {key: len(values) for key, values in self._kept.items()}

    def end_step(self) -> None:
        """After a step, and before the trainer logs."""
        for key, mean in self._means.items():
            for value in self._kept.get(key, ())[self._before.get(key, 0) :]:
                mean.add(float(value))

    def tell(self, findings: Findings) -> Sequence[Reading]:
        """The readings beside those of this look."""
        values = {key: mean.take() for key, mean in self._means.items()}
        told = [
            self._reading(findings.step, self._infos[key], value, self._notes.get(key, ""))
            for key, value in values.items()
            if not math.isnan(value)
        ]
        if self._gap is None:
            return told
        before, self._last_probe_kl = self._last_probe_kl, _over_all_probes(findings, self._probe_kl)
        gap = values["kl"] - (before + self._last_probe_kl) / 2
        if not math.isnan(gap):
            told.append(self._reading(findings.step, self._gap, gap, self._notes["gap"]))
        return told

    def state_dict(self) -> dict[str, Any]:
        means = {key: [mean.total, mean.count] for key, mean in self._means.items()}
        return {"means": means, "probe_kl": None if math.isnan(self._last_probe_kl) else self._last_probe_kl}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, mean in self._means.items():
            mean.total, mean.count = state["means"].get(key, (0.0, 0))
        self._last_probe_kl = math.nan if state["probe_kl"] is None else state["probe_kl"]

    @property
    def _kept(self) -> Mapping[str, list[float]]:
        kept: Mapping[str, list[float]] = self._trainer._metrics["train"]
        return kept

    def _reading(self, step: int, info: MetricInfo, value: float, note: str) -> Reading:
        return Reading(
            step=step, sensor=self.name, metric=info.name, value=value, unit=info.unit, scale=info.scale, note=note
        )


def sampler(trainer: Trainer) -> str:
    """Which of TRL's trainers that sample this is; "" where it is none of them."""
    return kind_in_trl(trainer, SAMPLERS)


def policy_temperature(trainer: Any) -> float:
    """The temperature at which this trainer samples; raises `ConfigError` for one that does not."""
    if not sampler(trainer):
        raise ConfigError(
            f"temperature='policy' was given, and {type(trainer).__name__} samples nothing. Give a number, or leave "
            "it out."
        )
    return float(trainer.args.temperature)


def _of_kept(trainer: Any) -> dict[str, MetricInfo]:
    """What the numbers are that the trainer keeps, by its own names."""
    infos = {"entropy": _ENTROPY, "completions/mean_length": _LENGTH, "completions/clipped_ratio": _CLIPPED}
    if sampler(trainer) == "DistillationTrainer":
        return infos
    infos |= {
        "reward": _reward("rollout_reward", "mean"),
        "reward_std": _reward("rollout_reward_std", "standard deviation"),
    }
    for name in trainer.reward_func_names:
        infos[f"rewards/{name}/mean"] = _reward(f"rollout_reward/{name}", "mean")
        infos[f"rewards/{name}/std"] = _reward(f"rollout_reward_std/{name}", "standard deviation")
    return infos


def _keeps_reference(trainer: Any) -> bool:
    """Whether the trainer's own reference is the model with which training began, adapters off, and stays it."""
    return not trainer.args.sync_ref_model and "ref" not in getattr(trainer.model, "peft_config", {})


def _caution(trainer: Any) -> str:
    """What a sampled KL of this trainer is besides what its estimator says."""
    if sampler(trainer) not in _KL:
        return ""
    args, cautions = trainer.args, []
    if args.num_iterations * args.steps_per_generation > args.gradient_accumulation_steps:
        is_weighted = getattr(args, "use_bias_correction_kl", False)
        remedy = "tokens are weighted by p_live / p_sampled" if is_weighted else "most are of an earlier model"
        cautions.append(f"completions are used for several steps: {remedy}")
    if cut := [f"{name}={value:g}" for name, off in _CUTS.items() if (value := getattr(args, name)) not in (None, off)]:
        cautions.append(f"completions are sampled with {', '.join(cut)}, and not from all of the distribution")
    return "; ".join(cautions)


def _temperatures(of_policy: float, of_probes: float) -> str:
    if of_policy == of_probes:
        return ""
    return f"completions at temperature {of_policy:g}, probes at {of_probes:g}"


def _over_all_probes(findings: Findings, metric: str) -> float:
    return next(
        (each.value for each in findings.readings if each.metric == metric and not (each.group or each.hookpoint)),
        math.nan,
    )
