"""The parameters as they lie in memory: whether frozen ones have moved, and whether replicas are the same."""

from torch import nn

from diffsensor.checksums import checksum, digest, own_part


class FrozenWeights:
    """Checksums of the parameters that did not train when this was made.

    Costs reading those weights once at each look, where a forward pass reads them once for each batch. A parameter
    that trains by now (a backbone that was unfrozen) is left out from then on. Of sharded parameters each process
    looks at its own part. Blind to buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums = {
            name: checksum(own_part(parameter))
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }

    def moved(self, model: nn.Module) -> list[str]:
        """The names of those that are frozen and not what they were."""
        parameters = dict(model.named_parameters())
        self._sums = {
            name: was for name, was in self._sums.items() if name in parameters and not parameters[name].requires_grad
        }
        return [name for name, was in self._sums.items() if checksum(own_part(parameters[name])) != was]


def checksum_of_replica(model: nn.Module) -> str:
    """A checksum of all parameters that train, by which replicas of a model are compared; blind to buffers."""
    return digest(*(checksum(parameter) for parameter in model.parameters() if parameter.requires_grad))
