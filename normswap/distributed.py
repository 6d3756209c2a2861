"""Sums across processes. In a single process every function here gives back what it got."""

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_sum(*tensors: torch.Tensor) -> None:
    """Add each tensor over all processes, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows `[M, C]` of all processes, one after the other, on each of them."""
    rank, size = world()
    if size == 1:
        return rows
    counts = gathered(len(rows))
    result = rows.new_zeros(sum(counts), rows.shape[1])
    start = sum(counts[:rank])
    result[start : start + len(rows)] = rows
    all_sum(result)
    return result


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the first process has."""
    if world()[1] > 1:
        tensor = tensor.clone()
        dist.broadcast(tensor, 0)
    return tensor


def gathered(number: int) -> list[int]:
    """Return the number that each process has."""
    rank, size = world()
    numbers = torch.zeros(size, dtype=torch.long)
    numbers[rank] = number
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        numbers = numbers.cuda()
    all_sum(numbers)
    return [int(n) for n in numbers]
