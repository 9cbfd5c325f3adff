"""The forward and backward pass of a batch as a CUDA graph: its kernels are captured once, then replayed."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch


def capture_cuda_graph(
    model: torch.nn.Module, compute: Callable, shape: tuple[int, int], device: torch.device
) -> tuple[Callable, Callable[[], AbstractContextManager]]:
    """Run `compute` a few times, so that everything is compiled, then capture it.

    Returns:
        The function that replays the graph, and `share_memory` of Backward.
    """
    inputs, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    count = torch.ones((), device=device)
    random_state = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.empty_cache()  # free memory of another stream cannot be reused
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                compute(inputs, targets, count)
            # What waits for the device cannot be captured. Found here, it leaves no half-captured graph.
            with sync_is_error(), as_in_capture():
                compute(inputs, targets, count)
    finally:  # after a failure too: kernels still to run read memory that is about to be freed
        torch.cuda.current_stream(device).wait_stream(stream)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    # Without gradients to add to, the captured backward pass writes its own: no sums, and no second copy in memory.
    model.zero_grad()
    torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    # The same stream: cuBLAS holds memory for each stream. Other threads, such as NCCL's watchdog, go on meanwhile.
    with torch.cuda.graph(graph, pool.id, stream, capture_error_mode="thread_local"):
        nll = compute(inputs, targets, count)
    written = [parameter.grad for parameter in trained]
    model.zero_grad()
    torch.cuda.set_rng_state(random_state, device)

    def replay(*batch: torch.Tensor) -> torch.Tensor:
        for static, value in zip((inputs, targets, count), batch, strict=True):
            static.copy_(value)
        add_gradients(trained, written, graph.replay)
        return nll

    @contextlib.contextmanager
    def share_memory() -> Iterator[None]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool, device):
            yield
        current.wait_stream(stream)

    return replay, share_memory


@contextlib.contextmanager
def sync_is_error() -> Iterator[None]:
    """Let whatever waits for the GPU raise RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def as_in_capture() -> Iterator[None]:
    """Let a model compute what it will compute during a capture: transformers then makes masks without reading them."""
    is_capturing = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = is_capturing


def add_gradients(trained: list[torch.Tensor], written: list[torch.Tensor], write: Callable[[], None]) -> None:
    """Call `write`, which overwrites the tensors `written` with a batch's gradients, and add them to the parameters'.

    If the parameters have no gradients yet, they get the tensors in `written` themselves, until the next call.
    """
    before = [parameter.grad for parameter in trained]
    if before[0] is written[0]:
        before = [each.clone() for each in written]
    write()
    if before[0] is not None:
        torch._foreach_add_(before, written)
    for parameter, gradient in zip(trained, written if before[0] is None else before, strict=True):
        parameter.grad = gradient
