"""Checksums that tell changed weights from unchanged ones, at the speed of memory."""

import hashlib
import sys
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from diffsensor.errors import CaptureError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: How many 8-byte words are added up at once.
_CHECKSUM_WORDS = 2**17


@runtime_checkable
class Partitioned(Protocol):
    """A parameter of which DeepSpeed's ZeRO-3 holds a flat part in each process; itself it is empty between its uses.

    The parts are equally long; what the last ones have beyond the parameter's end means nothing.
    """

    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: Tensor
    ds_process_group: Any
    ds_status: Any  # an enumeration: NOT_AVAILABLE, INFLIGHT or AVAILABLE
    ds_active_sub_modules: set[int]

    def all_gather(self, param_list: "list[Partitioned]") -> object: ...

    def partition(self) -> object: ...


def checksum(tensor: Tensor) -> str:
    """A hash of 64-bit sums of the tensor's words over each row and over each column.

    The sums are made where the tensor lies, at the speed of its memory, which a cryptographic hash of all of it
    is not. It tells changed weights from unchanged ones; it is no defence against someone who wants a collision.
    """
    partitioned = as_partitioned(tensor)
    shape = tuple(tensor.shape if partitioned is None else partitioned.ds_shape)
    if 0 in shape:
        return digest(str(shape), str(tensor.dtype))
    sharded = as_sharded(tensor.detach())
    if partitioned is not None:
        by_row, by_column = _sums_of_parts(partitioned, tensor.device)
    else:
        by_row, by_column = _sums(tensor.detach()) if sharded is None else _sums_of_shards(sharded)
    # Each sum by itself: added up with weights, the highest bits of two words would cancel.
    sums = torch.cat([by_row, by_column]).cpu()
    return digest(hashlib.sha256(sums.numpy().tobytes()).hexdigest(), str(shape), str(tensor.dtype))


def as_sharded(tensor: Tensor) -> "DTensor | None":
    """The tensor as one of which each process holds a part, where it is one."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, there is none
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def as_partitioned(tensor: Tensor) -> Partitioned | None:
    """The tensor as a parameter that DeepSpeed's ZeRO-3 has cut, where it is one."""
    return tensor if isinstance(tensor, Partitioned) else None


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    sharded, partitioned = as_sharded(tensor), as_partitioned(tensor)
    if partitioned is not None:
        return partitioned.ds_tensor
    return tensor if sharded is None else sharded.to_local()


def num_weights(parameter: Tensor) -> int:
    """How many numbers a parameter has, in all processes together."""
    partitioned = as_partitioned(parameter)
    return parameter.numel() if partitioned is None else partitioned.ds_numel


def _sums(tensor: Tensor) -> tuple[Int[Tensor, " row"], Int[Tensor, " column"]]:
    words = _as_words(tensor.contiguous().reshape(-1, tensor.shape[-1] if tensor.dim() else 1))
    # Some rows at a time, which are still in the cache when they are added up the other way.
    parts = words.split(max(1, _CHECKSUM_WORDS // max(1, words.shape[1])))
    by_row = torch.cat([part.sum(1, dtype=torch.int64) for part in parts])
    return by_row, torch.stack([part.sum(0, dtype=torch.int64) for part in parts]).sum(0)


def _sums_of_shards(tensor: "DTensor") -> tuple[Int[Tensor, " row"], Int[Tensor, " column"]]:
    """The same of a tensor whose rows lie in several processes: only sums are exchanged. All of them must call it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if tensor.dim() < 2:  # a bias or a norm's weights: as small as its sums
        return _sums(tensor.full_tensor())
    if unfit := [place for place in tensor.placements if not (place.is_replicate() or place.is_shard(0))]:
        raise CaptureError(
            f"A parameter of shape {list(tensor.shape)} is laid out over the processes as {unfit[0]}, expected whole "
            "or cut along its first dimension, as fully_shard does. Models cut by tensor parallelism cannot be read."
        )
    local, mesh = tensor.to_local(), tensor.device_mesh
    width = (local if local.numel() else local.new_zeros(1, *tensor.shape[1:])).contiguous()
    by_row, by_column = _sums(width)
    if not local.numel():
        by_row, by_column = by_row[:0], by_column * 0
    lines = torch.Size(tensor.shape[1:-1]).numel()  # rows of words for each entry of the first dimension
    rows = DTensor.from_local(
        by_row.reshape(-1, lines),
        mesh,
        tensor.placements,
        shape=torch.Size((tensor.shape[0], lines)),
        stride=(lines, 1),
    )
    summed = [Partial() if place.is_shard() else Replicate() for place in tensor.placements]
    return rows.full_tensor().reshape(-1), DTensor.from_local(by_column, mesh, summed).full_tensor()


def _sums_of_parts(tensor: Partitioned, device: torch.device) -> tuple[Int[Tensor, " row"], Int[Tensor, " column"]]:
    """The same of a tensor cut into flat parts. All processes must call it."""
    part, width = tensor.ds_tensor, tensor.ds_shape[-1] if tensor.ds_shape else 1
    start = min(dist.get_rank(tensor.ds_process_group) * len(part), tensor.ds_numel)
    stop = min(start + len(part), tensor.ds_numel)
    if part.dim() != 1 or len(part) * dist.get_world_size(tensor.ds_process_group) < tensor.ds_numel:
        raise CaptureError(
            f"A parameter of shape {list(tensor.ds_shape)} is cut by ZeRO-3 into parts of shape {list(part.shape)}, "
            "which do not make it up. Parameters offloaded to NVMe or kept quantized cannot be read."
        )
    # The rows that the part touches, at least one, with zeros for what others have: a sum of words adds up their bits.
    first = start // width
    touched = part.new_zeros(max(-(-stop // width) - first, 1), width)
    touched.view(-1)[start - first * width : stop - first * width] = part[: stop - start]
    rows, columns = _sums(touched)
    by_row = torch.zeros(tensor.ds_numel // width + 1, dtype=torch.int64, device=device)
    by_row[first : first + len(rows)] = rows.to(device)
    by_column = columns.to(device)
    for sums in (by_row, by_column):
        dist.all_reduce(sums, group=tensor.ds_process_group)
    return by_row[:-1], by_column


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _as_words(rows: Tensor) -> Tensor:
    """The rows' bytes as the widest integers that fill a row exactly."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    row_bytes, offset = rows.shape[1] * rows.element_size(), rows.storage_offset() * rows.element_size()
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if row_bytes % size == 0:
            return (rows if offset % size == 0 else rows.clone()).view(dtype)
    return rows.view(torch.uint8)
