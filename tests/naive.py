"""A second implementation of every number, as plain as can be: fp64, one probe at a time, full logits, loops."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiny import Text

Value = tuple[float, float]
"""A value and its standard error."""


def logits(model: nn.Module, made: Sequence[Text]) -> list[Tensor]:
    """The logits [token, vocab] of each probe, run alone, all in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        outputs = [model(torch.tensor([text.ids])) for text in made]
    return [(output if isinstance(output, Tensor) else output.logits)[0].double() for output in outputs]


def log_probabilities(model: nn.Module, made: Sequence[Text]) -> list[Tensor]:
    return [each.log_softmax(-1) for each in logits(model, made)]


def activations(model: nn.Module, made: Sequence[Text], hookpoint: str) -> list[Tensor]:
    """What a sub-module gives at the counted positions of each probe, run alone, all in float64."""
    model = copy.deepcopy(model).double().eval()
    shown: list[Tensor] = []
    model.get_submodule(hookpoint).register_forward_hook(
        lambda _module, _args, output: shown.append((output[0] if isinstance(output, tuple) else output)[0].double())
    )
    with torch.no_grad():
        for text in made:
            model(torch.tensor([text.ids]))
    return [each[counted_positions(text)] for each, text in zip(shown, made, strict=True)]


def counted_positions(text: Text) -> list[int]:
    """The places whose next token is counted."""
    return [place for place in range(len(text.ids) - 1) if text.counted[place + 1]]


def output_metrics(log_q: Tensor, log_p: Tensor, target: int) -> dict[str, float]:
    """All metrics at one position, by their definitions."""
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    return {
        "kl_ref_live": float((q * (log_q - log_p)).sum()),
        "kl_live_ref": float((p * (log_p - log_q)).sum()),
        "js": float((q * (log_q - log_m)).sum() / 2 + (p * (log_p - log_m)).sum() / 2),
        "tv": float((p - q).abs().sum() / 2),
        "top1_flip": float(q.argmax() != p.argmax()),
        "entropy_change": float((q * log_q).sum() - (p * log_p).sum()),
        "nll_change": float(log_q[target] - log_p[target]),
        "gain": float((p - q).max()),
    }


def mean_with_error(by_probe: Sequence[Sequence[float]], weights: Sequence[float]) -> Value:
    """The weighted mean over positions, and sqrt(N/(N-1) sum_i (w_i sum_j (x_ij - mean))^2) / sum w n."""
    pairs = [(values, weight) for values, weight in zip(by_probe, weights, strict=True) if values and weight > 0]
    total = sum(weight * len(values) for values, weight in pairs)
    mean = sum(weight * value for values, weight in pairs for value in values) / total
    squares = sum((weight * sum(value - mean for value in values)) ** 2 for values, weight in pairs)
    count = len(pairs)
    return mean, math.sqrt(count / (count - 1) * squares) / total if count > 1 else math.nan


def groups_of(made: Sequence[Text]) -> dict[str, list[float]]:
    """The weights of the probes in all of them and in each group."""
    names = dict.fromkeys(text.group for text in made if text.group)
    found = {"": [text.weight for text in made]}
    return found | {name: [text.weight * (text.group == name) for text in made] for name in names}


def weighted_tail(values: Sequence[tuple[float, float]], share: float) -> float:
    """Of (value, weight): the smallest value that at least `share` of the weight does not exceed."""
    total, seen = sum(weight for _, weight in values), 0.0
    for value, weight in sorted(values):
        seen += weight
        if seen >= share * total - 1e-12:
            return value
    raise AssertionError


def weighted_worst(values: Sequence[tuple[float, float]], share: float) -> float:
    """The mean of the largest values up to `share` of the weight, at least the largest one."""
    ordered = sorted(values, reverse=True)
    wanted = max(share * sum(weight for _, weight in values), ordered[0][1])
    room, total = wanted, 0.0
    for value, weight in ordered:
        total += value * min(weight, room)
        room -= min(weight, room)
    return total / wanted


def output_readings(reference: nn.Module, live: nn.Module, made: Sequence[Text]) -> dict[tuple[str, str], Value]:
    """Every output metric of the class "full", by (metric, group)."""
    at: list[list[dict[str, float]]] = []
    moved: list[Tensor] = []
    for text, log_q, log_p in zip(made, log_probabilities(reference, made), log_probabilities(live, made), strict=True):
        places = counted_positions(text)
        at.append([output_metrics(log_q[place], log_p[place], text.ids[place + 1]) for place in places])
        moved.append(sum((log_p[place].exp() - log_q[place].exp() for place in places), torch.zeros(log_q.shape[1])))
    found: dict[tuple[str, str], Value] = {}
    for group, weights in groups_of(made).items():
        for metric in ("kl_ref_live", "kl_live_ref", "js", "tv", "top1_flip", "entropy_change", "nll_change"):
            by_probe = [[position[metric] for position in positions] for positions in at]
            found[metric, group] = mean_with_error(by_probe, weights)
        inside = [(position, weight) for positions, weight in zip(at, weights, strict=True) for position in positions]
        kl = [(position["kl_ref_live"], weight) for position, weight in inside if weight > 0]
        found["kl_ref_live_p95", group] = weighted_tail(kl, 0.95), math.nan
        found["kl_ref_live_worst1", group] = weighted_worst(kl, 0.01), math.nan
        found["max_token_gain", group] = max(position["gain"] for position, weight in inside if weight > 0), math.nan
        total = sum(weight for _, weight in inside)
        mean = sum(weight * change for weight, change in zip(weights, moved, strict=True)) / total
        found["mass_moved", group] = float(mean.abs().sum() / 2), math.nan
    return found


def activation_readings(
    reference: nn.Module, live: nn.Module, made: Sequence[Text], hookpoint: str
) -> dict[tuple[str, str], Value]:
    """relative_l2, cosine_distance and mean_shift at one hookpoint, sinks left out."""
    ref, now = activations(reference, made, hookpoint), activations(live, made, hookpoint)
    limit = 10 * torch.cat(ref).norm(dim=1).sort().values[(sum(map(len, ref)) - 1) // 2]
    pairs = [
        [(h_ref, h) for h_ref, h in zip(probe_ref, probe_now, strict=True) if h_ref.norm() <= limit]
        for probe_ref, probe_now in zip(ref, now, strict=True)
    ]
    found: dict[tuple[str, str], Value] = {}
    for group, weights in groups_of(made).items():
        relative = [[float((h - h_ref).norm() / h_ref.norm()) for h_ref, h in probe] for probe in pairs]
        cosine = [[float(1 - (h @ h_ref) / (h.norm() * h_ref.norm())) for h_ref, h in probe] for probe in pairs]
        total = sum(weight * len(probe) for weight, probe in zip(weights, pairs, strict=True))
        mean = (
            sum(weight * (h - h_ref) for weight, probe in zip(weights, pairs, strict=True) for h_ref, h in probe)
            / total
        )
        along = [[float((h - h_ref) @ mean / mean.norm()) for h_ref, h in probe] for probe in pairs]
        found["relative_l2", group] = mean_with_error(relative, weights)
        found["cosine_distance", group] = mean_with_error(cosine, weights)
        found["mean_shift", group] = float(mean.norm()), mean_with_error(along, weights)[1]
    return found
