"""The gradient of a batch, computed in one of three ways that differ in speed alone.

- eager: PyTorch starts kernel after kernel. On a GPU a small model waits for Python most of the time.
- recorded: the kernels of one batch are recorded once, as a CUDA graph, and replayed for every batch.
- compiled: the same, of kernels that torch.compile makes of the layers and of the softmax. That takes seconds first.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch._functorch.config as autograd_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2lora.dataset.blocks import Rows
from gpt2lora.model.head import body_and_head
from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import say
from gpt2lora.training.loss import nll_sum, to_probabilities

WORTH_IT = 5e14  # parameters times tokens of a run from which compilation saves more time than it takes
# PyTorch's kernels of attention, the fastest first; it takes the first that can do what is asked, the last always can.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,  # 5 % of a step of GPT-2 124M faster than flash on an H200; not deterministic
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
FULL = 0.9  # share of a batch's places that must hold tokens, or padding would cost more than recording saves
_ending: list[threading.Thread] = []  # those that end helpers of the compiler


@dataclass
class Gradient:
    """What adds the gradient of a batch's mean loss to the parameters' own, and returns its summed loss, nats.

    Between steps these are to be None: to add to zeros costs time and memory.

    Its arguments are inputs and targets, both (rows, tokens) int64, and the number of tokens to divide the loss by.
    """

    add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device
    shape: tuple[int, int] | None  # of every batch; None: as it comes
    # Around what runs between two batches and leaves nothing on the device: a validation, say.
    between: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        return self.add(*given)


def prepare(
    model: torch.nn.Module, train: Rows, batch_size: int, compiled: str, steps: int, dtype: torch.dtype
) -> Gradient:
    """Choose the way, say which and why, and make it ready. The random state is left as it was.

    Args:
        compiled: train.compile: "auto", "always" or "never".
    """
    device = next(model.parameters()).device
    shape = (batch_size, train.width)
    way, reason = choose(model, train, steps * shape[0] * shape[1], compiled, device)
    say(f"train: {way} steps: {reason}")
    if way == "eager":
        return plain(model, dtype)
    softmax = to_probabilities
    if way == "compiled":
        wait_for_helpers()  # of what this process compiled before
        compile_layers(model)
        softmax = torch.compile(to_probabilities, dynamic=False)
    with sdpa_kernel(ATTENTION, set_priority=True):  # what is recorded keeps the kernels chosen here
        replay, between = recorded(model, eager(model, dtype, softmax), shape, device)
    if way == "compiled":
        end_helpers()
    return Gradient(replay, device, shape, between)


def end_helpers() -> None:
    """End the compiler's helper processes: that takes a second, here beside the steps and not when the process ends."""
    from torch._inductor.async_compile import shutdown_compile_workers

    _ending.append(threading.Thread(target=shutdown_compile_workers))
    _ending[-1].start()


def wait_for_helpers() -> None:
    """Wait until they have ended: what is compiled before that finds them closed, after that it starts new ones."""
    while _ending:
        _ending.pop().join()


def choose(model: torch.nn.Module, train: Rows, tokens: int, compiled: str, device: torch.device) -> tuple[str, str]:
    """Return the way for a run of so many tokens, and why."""
    if device.type != "cuda":
        return "eager", "CUDA graphs are for GPUs"
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return "eager", "8-bit layers look for outliers in their input, and Python waits for what they find"
    if train.targets < FULL * len(train) * train.width:
        return "eager", "rows differ in length"
    if any(any(getattr(module, "use_dora", {}).values()) for module in model.modules()):
        return "recorded", "one CUDA graph a batch; DoRA's norms do not compile"
    if compiled == "never":
        return "recorded", "train.compile is never"
    if lacking := lacks():
        params.require(compiled == "auto", "train.compile", compiled, f"auto or never, without {lacking}")
        return "recorded", f"to compile them takes {lacking}"
    if compiled == "always":
        return "compiled", "train.compile is always"
    work = sum(value.numel() for value in model.parameters()) * tokens
    way = "compiled" if work >= WORTH_IT else "recorded"
    return way, f"{work:.1e} parameters x tokens; from {WORTH_IT:.0e} on, compilation is worth the seconds it takes"


def lacks() -> str | None:
    """Return what torch.compile needs on a GPU and is not here."""
    if find_spec("triton") is None:
        return "Triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for one
    return None if compiler else "a C compiler"


def plain(model: torch.nn.Module, dtype: torch.dtype) -> Gradient:
    return Gradient(eager(model, dtype, to_probabilities), next(model.parameters()).device, None)


def eager(model: torch.nn.Module, dtype: torch.dtype, softmax: Callable) -> Callable:
    def add(inputs: torch.Tensor, targets: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        nll = nll_sum(model, inputs, targets, dtype, softmax)
        (nll / count).backward()
        return nll.detach()

    return add


def recorded(
    model: torch.nn.Module, add: Callable, shape: tuple[int, int], device: torch.device
) -> tuple[Callable, Callable[[], AbstractContextManager]]:
    """Run `add` a few times, which compiles what is to be compiled, then record it.

    Returns:
        What replays it, and a context in which what is allocated comes from the memory that a replay writes over.
    """
    inputs, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    count = torch.ones((), device=device)
    random = torch.cuda.get_rng_state(device)
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.empty_cache()  # of what was free, but of another stream
    with torch.cuda.stream(aside):
        for _ in range(3):
            add(inputs, targets, count)
    torch.cuda.current_stream(device).wait_stream(aside)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()  # with nothing to add to, what is recorded hands its gradients over: no sums, no second memory
    torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    with torch.cuda.graph(graph, pool.id, aside):  # cuBLAS holds memory for each stream that it works on
        nll = add(inputs, targets, count)
    written = [parameter.grad for parameter in trained]
    model.zero_grad()
    torch.cuda.set_rng_state(random, device)

    def replay(*given: torch.Tensor) -> torch.Tensor:
        for place, value in zip((inputs, targets, count), given, strict=True):
            place.copy_(value)
        add_up(trained, written, graph.replay)
        return nll

    @contextlib.contextmanager
    def between() -> Iterator[None]:
        usual = torch.cuda.current_stream(device)
        aside.wait_stream(usual)
        with torch.cuda.stream(aside), torch.cuda.use_mem_pool(pool, device):
            yield
        usual.wait_stream(aside)

    return replay, between


def add_up(trained: list[torch.Tensor], written: list[torch.Tensor], write: Callable[[], None]) -> None:
    """Call `write`, which writes a batch's gradients over those in `written`, and add them to the parameters' own.

    All parameters have one, or none has: then they get what is `written`, until the next call.
    """
    before = [parameter.grad for parameter in trained]
    if before[0] is written[0]:
        before = [each.clone() for each in written]
    write()
    if before[0] is not None:
        torch._foreach_add_(before, written)
    for parameter, each in zip(trained, written if before[0] is None else before, strict=True):
        parameter.grad = each


def compile_layers(model: torch.nn.Module) -> None:
    """Compile the layers one by one: they are alike, and share what the first one takes seconds for."""
    # Share of what a compiled layer would keep for its backward pass that it may keep; what is cheapest is computed
    # again. With GPT-2 124M at 8 x 1,024 tokens on an H100 that saves a third of the memory, for 0.5 % of the time.
    autograd_config.activation_memory_budget = 0.8
    # Or no later run finds the layers, for LowRankUpdate in them, in the cache on disk of what is derived and divided.
    autograd_config.autograd_cache_allow_custom_autograd_functions = True
    body, _ = body_and_head(model)
    layers = next(module for module in body.modules() if isinstance(module, torch.nn.ModuleList))
    if hasattr(model, "get_base_model"):
        model.get_base_model().enable_input_require_grads()  # or the first layer, unlike all others, needs its own
    for layer in layers:
        layer.compile(dynamic=False)
