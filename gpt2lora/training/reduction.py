"""Sums over the processes of a group, in the order of a binary tree: the same bits for any number of processes.

An all-reduce of NCCL or gloo adds in an order that depends on their number, and so does DistributedDataParallel, whose
hooks also keep the backward pass out of a CUDA graph. Here each process gets one slice of everyone's values
(all-to-all), adds them in order, and sends the sum to all (all-gather): as many bytes as an all-reduce, and no
arithmetic that NCCL chooses.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from gpt2lora.distributed import group

BUCKET_BYTES = 128 * 2**20  # sent at once: so much memory is needed twice


def sum_over_processes(trained: list[torch.Tensor], loss: torch.Tensor, present: int) -> None:
    """Replace the gradients and the loss by their sums over the first `present` processes.

    The others have no micro-batch in this step. A parameter without a gradient in all processes keeps none.
    """
    if group.size() == 1:
        return
    used = group.largest([int(parameter.grad is not None) for parameter in trained])
    for parameter, flag in zip(trained, used, strict=True):
        if flag and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter, flag in zip(trained, used, strict=True) if flag]
    for bucket in split_buckets([*gradients, loss]):
        sum_bucket(bucket, present)


def split_buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in groups of one type, of about BUCKET_BYTES."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(each.nbytes for each in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sum_bucket(tensors: list[torch.Tensor], present: int) -> None:
    """Replace each tensor by its sum over the first `present` processes."""
    sizes, world = [tensor.numel() for tensor in tensors], group.size()
    padding = tensors[0].new_zeros(-sum(sizes) % world)
    flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), padding])
    with group.peers():
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        dist.all_gather_into_tensor(flat, tree_sum(received.view(world, -1)[:present]))
    sums = flat[: sum(sizes)].split(sizes)
    torch._foreach_copy_(tensors, [each.view(tensor.shape) for each, tensor in zip(sums, tensors, strict=True)])


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of the rows: of neighbours, then of neighbouring pairs, and so on; a last one alone waits."""
    while len(rows) > 1:
        pairs = rows[: len(rows) // 2 * 2 : 2] + rows[1::2]
        rows = torch.cat([pairs, rows[-1:]]) if len(rows) % 2 else pairs
    return rows[0].contiguous()


def checksum(tensors: list[torch.Tensor]) -> int:
    """Return the sum of all values' bits as integers; 0 in a single process, which has nothing to compare with."""
    if group.size() == 1:
        return 0
    return int(torch.stack([each.contiguous().view(torch.int32).sum(dtype=torch.int64) for each in tensors]).sum())
