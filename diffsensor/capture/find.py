"""Finding the language model inside a module, and the hookpoints inside the language model."""

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from diffsensor.checksums import num_weights
from diffsensor.errors import (
    CaptureError,
    ConfigError,
    HookpointError,
    unknown,
)

AUTO_HOOKPOINTS = 8


def find_model(model: nn.Module, path: str | None = None) -> nn.Module:
    """The language model inside `model`: at `path`, or the only one there is, or `model` itself where there is none."""
    if path is not None:
        names = [name for name, _ in model.named_modules() if name]
        if path and path not in names:
            raise CaptureError(unknown("sub-module", path, names))
        return unwrapped(model.get_submodule(path))
    model = unwrapped(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in found):
            continue
        if output_embeddings(module) is not None:
            found[name] = unwrapped(module)
    if len(found) > 1:
        raise CaptureError(
            f"{type(model).__name__} holds {len(found)} language models: {', '.join(map(repr, found))}. "
            f"Say which one is trained: model_path={next(iter(found))!r}."
        )
    return next(iter(found.values()), model)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where `torch.compile`, data parallelism or DeepSpeed wrapped it."""
    wrappers = {
        "OptimizedModule": "_orig_mod",
        "DistributedDataParallel": "module",
        "DataParallel": "module",
        "DeepSpeedEngine": "module",
    }
    while type(module).__name__ in wrappers:
        module = module.get_submodule(wrappers[type(module).__name__])
    return module


def output_embeddings(module: nn.Module) -> nn.Module | None:
    # By attribute and not by class: PEFT's models hand it on to the model that they wrap.
    get = getattr(module, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def require_one_device(root: nn.Module) -> None:
    places = sorted({str(parameter.device) for parameter in root.parameters()})
    if len(places) > 1:
        raise CaptureError(
            f"{type(root).__name__} is spread over the devices {', '.join(places)}, as device_map='auto' does. "
            "Readings need the whole model on one device: load it without device_map, or with device_map={'': 0}."
        )


def refuse_virtual_tokens(root: nn.Module) -> None:
    for name, config in getattr(root, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise CaptureError(
                f"The adapter {name!r} ({type(config).__name__}) puts virtual tokens before every text, and readings "
                "would be of other positions than the probes'. Expected adapters on weights, such as LoRA."
            )


def resolve_hookpoints(
    root: nn.Module, wanted: str | Sequence[str], head: nn.Module | None = None
) -> dict[str, nn.Module]:
    """The sub-modules that `wanted` names, in the order of the model."""
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ConfigError(f"hookpoints={wanted!r} is a string, expected 'auto' or a sequence of names and globs.")
        return _evenly_spaced_blocks(root, head)
    modules = {name: module for name, module in _named_modules(root) if name and module is not head}
    names = list(modules)
    chosen: set[str] = set()
    for pattern in wanted:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise HookpointError(unknown("hookpoint", pattern, names))
        chosen.update(matches)
    return {name: module for name, module in modules.items() if name in chosen}


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The sub-modules, named alike whether or not PEFT wraps the model."""
    wrapped = "base_model.model." if getattr(root, "peft_config", None) else ""
    return ((name.removeprefix(wrapped), module) for name, module in root.named_modules())


def _evenly_spaced_blocks(root: nn.Module, head: nn.Module | None) -> dict[str, nn.Module]:
    named = list(_named_modules(root))
    # The stack of blocks is the list that holds most of the weights; lists inside a block come later and hold fewer.
    # Where there is no list, it is the longest way through a chain of modules, or what the module has at its top.
    stack: nn.Module
    for kind in (nn.ModuleList, nn.Sequential):
        stacks = [(name, module) for name, module in named if isinstance(module, kind) and len(module)]
        if stacks:
            name, stack = max(stacks, key=lambda item: _num_weights(item[1]))
            break
    else:
        name, stack = "", root
    blocks = [(f"{name}.{part}".lstrip("."), block) for part, block in stack.named_children()]
    if not isinstance(stack, nn.ModuleList):
        blocks = [
            (part, block)
            for part, block in blocks
            # Embeddings of places, which are the same for all probes, have no output for each of them.
            if _num_weights(block)
            and not isinstance(block, nn.Embedding)
            and all(module is not head for module in block.modules())
        ]
    count = min(AUTO_HOOKPOINTS, len(blocks))
    places = sorted({round(i * (len(blocks) - 1) / max(count - 1, 1)) for i in range(count)})
    return dict(blocks[place] for place in places)


def _num_weights(module: nn.Module) -> int:
    return sum(num_weights(parameter) for parameter in module.parameters())
