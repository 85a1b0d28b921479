"""A copy of a model that stays as it is, to answer for the reference while the model itself trains."""

import copy

from torch import nn

from diffsensor.capture.find import find_model
from diffsensor.capture.zero3 import is_zero3
from diffsensor.errors import CaptureError


def frozen_copy(model: nn.Module, path: str | None = None) -> nn.Module:
    """A copy of the language model inside `model`, as it is now: one more set of weights, without gradients."""
    root = find_model(model, path)
    if is_zero3(root):
        raise CaptureError(
            f"The parameters of {type(root).__name__} are cut up by DeepSpeed's ZeRO-3, and a copy of it would be "
            "empty. Make the copy before deepspeed.initialize, or load the reference from its files."
        )
    copied = copy.deepcopy(root).requires_grad_(False).eval()
    for parameter in copied.parameters():
        parameter.grad = None
    for module in copied.modules():
        # Trainers put a forward of theirs in its place, which calls the model that was copied from.
        vars(module).pop("forward", None)
    return copied
