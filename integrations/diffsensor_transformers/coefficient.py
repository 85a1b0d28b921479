"""The KL coefficient of a trainer: that of its penalty, or the `beta` of those of TRL's trainers that have one."""

from typing import Any

from diffsensor import RefusedError
from diffsensor_transformers.penalty import PenalisedLoss, own_beta


def kl_coefficient(trainer: Any) -> float:
    """The coefficient as it is now. Raises `RefusedError` where there is none."""
    _require(trainer)
    if isinstance(trainer.compute_loss, PenalisedLoss):
        return float(trainer.compute_loss.penalty.coefficient)
    return float(trainer.beta)


def set_kl_coefficient(trainer: Any, value: float) -> str:
    """Set the coefficient, for the steps to come, and say so in a clause.

    A penalty and DPO, KTO and GRPO take it from the next step on; RLOO, which puts its KL into the reward, from the
    next completions on. In DPO and KTO beta also multiplies the gradient, so that early in a run more of it may
    move the model faster; only its optimum is nearer the reference.

    Raises `RefusedError` where there is no coefficient, and for 0 where that cannot be undone or leaves no loss.
    """
    before = kl_coefficient(trainer)
    if isinstance(trainer.compute_loss, PenalisedLoss):
        trainer.compute_loss.penalty.coefficient = value
        return f"KL coefficient {before:.4g} -> {value:.4g}"
    if value == 0:
        raise RefusedError(
            f"beta=0 was asked of {type(trainer).__name__}. "
            + (
                "It would make completions without the reference's log-probabilities, and end with an error where they "
                "are used again after beta is raised. "
                if _generates(trainer)
                else "Its loss would not depend on the model any more, or divide by 0. "
            )
            + "Set a small number instead, such as 1e-6."
        )
    trainer.beta = value
    return f"beta {before:.4g} -> {value:.4g}"


def why_no_coefficient(trainer: Any) -> str:
    """Why no KL coefficient can be set in this run, as a sentence with the remedy; "" where it can.

    To be asked before the first step.
    """
    if isinstance(trainer.compute_loss, PenalisedLoss):
        return ""
    name = type(trainer).__name__
    if not (kind := own_beta(trainer)):
        return (
            f"{name} has no KL coefficient. Give the callback a penalty: penalty=KLPenalty() with LoRA, "
            "penalty=KLPenalty.frozen_copy(model) for a full fine-tune."
        )
    if kind == "DPOTrainer" and set(trainer.loss_types) == {"sft"}:
        return f"{name} has loss_type='sft', which beta takes no part in. Add another loss, such as 'sigmoid'."
    if _generates(trainer) and trainer.beta == 0:
        remedy = f"Begin with a beta above 0, however small: {kind.removesuffix('Trainer')}Config(beta=1e-6)."
        if trainer.ref_model is None and not getattr(trainer.model, "peft_config", None):
            return (
                f"{name} began with beta=0, for which it loads no reference model; with another beta it would end with "
                f"an error at its next completions. {remedy}"
            )
        if _uses_completions_again(trainer):
            return (
                f"{name} began with beta=0 and uses its completions for several steps; those made at beta=0 have no "
                f"log-probabilities of the reference, and with another beta it would end with an error. {remedy}"
            )
    return ""


def _require(trainer: Any) -> None:
    if reason := why_no_coefficient(trainer):
        raise RefusedError(reason)


def _generates(trainer: Any) -> bool:
    return own_beta(trainer) in ("GRPOTrainer", "RLOOTrainer")


def _uses_completions_again(trainer: Any) -> bool:
    args: Any = trainer.args
    return bool(args.num_iterations > 1 or args.steps_per_generation > args.gradient_accumulation_steps)
