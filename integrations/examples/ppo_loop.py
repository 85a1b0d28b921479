"""A PPO loop in plain PyTorch with a drift monitor in it. `train` is there to be copied into a loop of your own.

    python integrations/examples/ppo_loop.py            # half a minute on one core, twice that the first time
    python integrations/examples/ppo_loop.py --kl 0     # without a KL penalty

A small language model is paid for short words, and finds out that no sense is needed to earn that. The reward looks
like success; the fixed probes tell what it costs, and a rule makes the KL penalty dearer until the drift is within its
limit again. Without a penalty another rule stops the run, once the policy has all but stopped choosing.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffsensor import Gate, KLPenalty, Monitor, ProbeSet, Rule, cache_directory, every, write_verdict
from diffsensor.actions import Response, ScaleKLCoefficient, Stop
from diffsensor.control import LoopController
from diffsensor.rules import Invariant, Limit
from diffsensor_demo import corpus
from diffsensor_demo.pretrain import Recipe, load, pretrained


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`updates` batches of completions, each learnt from `epochs` times; the limit is in nats per token."""

    updates: int = 60
    epochs: int = 3
    batch: int = 16
    new_tokens: int = 24
    learning_rate: float = 3e-4
    clip: float = 0.2
    kl: float = 0.05
    drift_limit: float = 0.3
    read_every: int = 5
    save_every: int = 20


def train(
    policy: PreTrainedModel,
    prompts: Tensor,
    reward: Callable[[Tensor], Tensor],
    probes: ProbeSet,
    out: Path,
    settings: Settings,
) -> None:
    """Train `policy` by PPO on `prompts` [row, pos], and leave the monitor's record and the checkpoints in `out`."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    penalty = KLPenalty.frozen_copy(policy, coefficient=settings.kl)
    controller = LoopController(policy, optimizer, penalty=penalty)
    drift = Limit("kl_ref_live", above=settings.drift_limit)
    rules: list[Rule | Response] = [
        Invariant(),
        # A ladder: the second rung where four readings later the drift is beyond its limit still.
        Response(drift, ScaleKLCoefficient(3.0), ScaleKLCoefficient(3.0), patience=4),
        # What the loop tells of itself is watched like what is read.
        Response(Limit("entropy", below=1.0), Stop()),
    ]
    told = ("reward", "entropy")
    schedule, record, width = every(settings.read_every), out / "drift", prompts.shape[1]
    with Monitor(
        probes, record=record, schedule=schedule, rules=rules, gate=Gate(drift), controller=controller, progress=told
    ) as monitor:
        for step in range(settings.updates):
            rows = sample(policy, prompts[torch.randint(len(prompts), (settings.batch,))], settings.new_tokens)
            earned = reward(rows[:, width:])
            with torch.no_grad():
                old, entropy = completed(policy(input_ids=rows, use_cache=False).logits, rows, width)
            # There is no value model: what the batch earned on average is the baseline.
            advantages = ((earned - earned.mean()) / (earned.std() + 1e-4))[:, None]

            # Before the update, so that readings, reward and entropy are of the same policy.
            for reading in monitor.observe(policy, step, reward=earned.mean(), entropy=entropy.mean()):
                if reading.metric == "kl_ref_live" and not reading.group:
                    print(f"{step:4d} reward {earned.mean():.2f}  entropy {entropy.mean():.2f}", end="  ")
                    print(f"drift {reading.value:.3f} ± {reading.stderr:.3f}  KL coefficient {penalty.coefficient:g}")
            if controller.should_stop:
                print(f"Stopped. {controller.stop_reason}")
                break

            labels = rows.masked_fill(torch.arange(rows.shape[1], device=rows.device) < width, -100)
            for _ in range(settings.epochs):
                logits = policy(input_ids=rows, use_cache=False).logits
                ratio = (completed(logits, rows, width)[0] - old).exp()
                clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
                gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
                loss = penalty(policy, logits, {"input_ids": rows, "labels": labels}) - gain
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()

            if (done := step + 1) % settings.save_every == 0:
                checkpoint = out / f"policy-{done}.pt"
                torch.save(policy.state_dict(), checkpoint)
                verdict = monitor.verdict(policy, done)
                write_verdict(f"{checkpoint}.verdict.json", verdict)  # where `read_verdict(checkpoint)` finds it
                print(f"{done:4d} {checkpoint.name}: {verdict.outcome}. {verdict.reason}")


@torch.no_grad()
def sample(policy: PreTrainedModel, rows: Tensor, new_tokens: int) -> Tensor:
    """The rows, each with as many tokens more, drawn from the policy."""
    for _ in range(new_tokens):
        logits = policy(input_ids=rows, use_cache=False).logits[:, -1].float()
        rows = torch.cat([rows, torch.multinomial(logits.softmax(-1), 1)], 1)
    return rows


def completed(logits: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The log-probability of each token after the first `width`, and the entropy it was drawn with."""
    logs = logits[:, width - 1 : -1].float().log_softmax(-1)
    return logs.gather(-1, rows[:, width:, None])[..., 0], -(logs.exp() * logs).sum(-1)


def short_words(texts: Sequence[str]) -> Tensor:
    """The share of each text's words that have at most three letters."""
    words = [text.split() or ["nothing"] for text in texts]
    return torch.tensor([sum(len(word) <= 3 for word in some) / len(some) for some in words])


def main(arguments: Sequence[str] | None = None, recipe: Recipe | None = None) -> None:
    usual = Settings()
    parser = argparse.ArgumentParser(description="A PPO loop with a drift monitor in it.")
    parser.add_argument("--out", type=Path, default=Path("runs/ppo"), help="for the record and the checkpoints")
    parser.add_argument("--updates", type=int, default=usual.updates)
    parser.add_argument("--kl", type=float, default=usual.kl, help="the KL penalty's coefficient to begin with")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # with a model so small, threads only wait for each other
    learnt, held_out = corpus.manual()
    recipe = recipe or Recipe(vocabulary=768, width=96, layers=2, steps=400)
    policy, tokenizer = load(pretrained(recipe, learnt, (), cache_directory(), lambda step, loss: None))
    prompts = torch.tensor([tokenizer(text)["input_ids"][:8] for text in held_out[1::2]])
    probes = ProbeSet.from_texts(held_out[::2], tokenizer, max_length=64)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(updates=given.updates, kl=given.kl)
    train(policy, prompts, lambda rows: short_words(tokenizer.batch_decode(rows)), probes, given.out, settings)


if __name__ == "__main__":
    main()
