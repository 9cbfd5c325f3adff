"""How the gradient of a batch is computed: eager, captured as a CUDA graph, or compiled and captured.

- eager: PyTorch launches kernel after kernel. On a GPU, a small model then waits for Python most of the time.
- captured: the kernels of one batch are captured once as a CUDA graph, which is replayed for every batch.
- compiled: torch.compile first makes faster kernels of the layers and of the softmax. This takes seconds.

All three compute the same gradients.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch._functorch.config as autograd_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.distributed import group
from gpt2lora.model import dora_forward
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.model.errors import first_line
from gpt2lora.model.head import body_and_head
from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import echo
from gpt2lora.training.cuda_graph import capture_cuda_graph
from gpt2lora.training.loss import CHUNK_TOKENS, nll_sum, softmax_nll

COMPILE_THRESHOLD = 5e14  # parameters times tokens of a run, above which compilation saves more time than it takes
# PyTorch's attention kernels, the fastest first. It uses the first that supports the inputs; the last always does.
ATTENTION_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,  # a step of GPT-2 124M is 5 % faster than with flash on an H200; not deterministic
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
MODES = ("compiled", "captured", "eager")  # each is tried if the one before it fails
MIN_FILL = 0.9  # share of a batch's positions that must hold tokens, or padding costs more than a CUDA graph saves
_shutdowns: list[threading.Thread] = []  # threads that shut down compile workers


@dataclass
class Backward:
    """Call it with a batch: it adds the gradient of the mean loss to the parameters' gradients.

    Args of a call: inputs and targets, (rows, tokens) int64, and the number of tokens to divide the summed loss by.
    It returns the summed loss in nats. Set gradients to None between steps; adding into zeros costs time and memory.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device
    shape: tuple[int, int] | None  # that every batch is padded to; None: batches keep their own
    # The context of other computations between two batches, such as validation, that leave nothing on the device: they
    # use the memory that the next replay overwrites.
    share_memory: Callable[[], AbstractContextManager] = contextlib.nullcontext
    overwrites: bool = False  # a call writes its gradients into the same memory as the one before

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return self.compute(inputs, targets, count)


def prepare_backward(
    model: torch.nn.Module, train: Blocks, batch_size: int, compiled: str, batches: int, dtype: torch.dtype
) -> Backward:
    """Choose how to compute gradients, print the choice and its reason, and compile and capture what is needed.

    The state of the random number generators does not change. In a group all processes take the same: other kernels
    would give other bytes.

    Args:
        compiled: train.compile: "auto", "always" or "never".
        batches: of the whole run, by all processes.
    """
    device = next(model.parameters()).device
    shape = (batch_size, train.width)
    mode, reason = choose_execution(model, train, batches * shape[0] * shape[1], compiled, device)
    random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for attempt in MODES[MODES.index(mode) : -1]:
        backward, failure = None, "in another process"
        try:
            backward = captured_backward(model, attempt == "compiled", shape, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler raises many types
            failure = f"{type(error).__name__}: {first_line(error)}"
        # Not in the clause above: until it ends, the error keeps what the attempt allocated.
        if not group.largest([int(backward is None)])[0]:
            echo(f"train: {attempt} steps: {reason}")
            return backward
        backward, reason = None, f"{attempt} ones fail: {failure}"
        restore_eager(model, device, random_state)
    if device.type == "cuda" or mode != "eager":  # on a CPU there is nothing to choose
        echo(f"train: eager steps: {reason}")
    return eager_backward(model, dtype)


def captured_backward(model: torch.nn.Module, compiled: bool, shape: tuple[int, int], dtype: torch.dtype) -> Backward:
    """Return the computation as a CUDA graph, of compiled layers or of PyTorch's kernels."""
    device, softmax = next(model.parameters()).device, softmax_nll
    if compiled:
        wait_for_compile_workers()
        compile_layers(model)
        softmax = torch.compile(softmax_nll, dynamic=False)
    with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):  # the graph keeps the kernels that are chosen now
        replay, share_memory = capture_cuda_graph(model, make_backward(model, dtype, softmax), shape, device)
    if compiled:
        shut_down_compile_workers()
    return Backward(replay, device, shape, share_memory, overwrites=True)


def restore_eager(model: torch.nn.Module, device: torch.device, random_state: torch.Tensor) -> None:
    """Undo what a failed attempt to compile or to capture left behind."""
    if find_spec("triton"):
        shut_down_compile_workers()
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()
    if hasattr(model, "get_base_model") and hasattr(model.get_base_model(), "_require_grads_hook"):
        model.get_base_model().disable_input_require_grads()
    model.zero_grad()
    # A capture that failed leaves its generator's state waiting for the end of the capture; a copy does not wait.
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.set_rng_state(random_state, device)
    torch.cuda.empty_cache()


def choose_execution(
    model: torch.nn.Module, train: Blocks, tokens: int, compiled: str, device: torch.device
) -> tuple[str, str]:
    """Return "eager", "captured" or "compiled" for a run of so many tokens, and the reason."""
    if device.type != "cuda":
        return "eager", "CUDA graphs are for GPUs"
    if train.targets < MIN_FILL * len(train) * train.width:
        return "eager", "rows differ in length"
    if dora_forward.has_peft_dora(model):
        return "captured", "one CUDA graph a batch; PEFT's forward pass of DoRA does not compile"
    if compiled == "never":
        return "captured", "train.compile is never"
    if missing := missing_compile_requirement():
        params.require(compiled == "auto", "train.compile", compiled, f"auto or never, without {missing}")
        return "captured", f"compilation needs {missing}"
    if compiled == "always":
        return "compiled", "train.compile is always"
    work = sum(value.numel() for value in model.parameters()) * tokens
    mode = "compiled" if work >= COMPILE_THRESHOLD else "captured"
    return mode, f"{work:.1e} parameters x tokens; compilation saves time from {COMPILE_THRESHOLD:.0e} on"


def missing_compile_requirement() -> str | None:
    """Return what torch.compile needs on a GPU and this machine lacks, or None."""
    if find_spec("triton") is None:
        return "Triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # where Triton looks for one
    return None if compiler else "a C compiler"


def eager_backward(model: torch.nn.Module, dtype: torch.dtype) -> Backward:
    """Return eager computation, for batches of any shape."""
    compute = make_backward(model, dtype, softmax_nll)

    def compute_or_explain(*batch: torch.Tensor) -> torch.Tensor:
        with computation_errors(model, dtype, "train.precision"):
            return compute(*batch)

    return Backward(compute_or_explain, next(model.parameters()).device, None)


def make_backward(model: torch.nn.Module, dtype: torch.dtype, softmax: Callable) -> Callable:
    """Return the function that computes the loss of a batch and its backward pass."""

    def compute(inputs: torch.Tensor, targets: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        nll = nll_sum(model, inputs, targets, dtype, softmax)
        (nll / count).backward()
        return nll.detach()

    def compute_in_parts(inputs: torch.Tensor, targets: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_TOKENS[inputs.device.type] // inputs.shape[1])  # all logits of a part are held at once
        parts = zip(inputs.split(rows), targets.split(rows), strict=True)
        return torch.stack([compute(*part, count) for part in parts]).sum()

    _, head = body_and_head(model)
    return compute_in_parts if head is None else compute


def compile_layers(model: torch.nn.Module) -> None:
    """Compile the layers one by one: they are alike, so only the first one takes seconds."""
    # The share of activations that a compiled layer may keep for its backward pass; the cheapest are recomputed.
    # With GPT-2 124M at 8 x 1,024 tokens on an H100 this saves a third of the memory, for 0.5 % of the time.
    autograd_config.activation_memory_budget = 0.8
    # Without this, torch does not cache layers on disk that hold a custom autograd function such as LowRankUpdate.
    autograd_config.autograd_cache_allow_custom_autograd_functions = True
    body, _ = body_and_head(model)
    layers = next(module for module in body.modules() if isinstance(module, torch.nn.ModuleList))
    if hasattr(model, "get_base_model"):
        model.get_base_model().enable_input_require_grads()  # otherwise the first layer differs from all others
    for layer in layers:
        layer.compile(dynamic=False)


def shut_down_compile_workers() -> None:
    """Shut down the compile workers in a thread, so that exit does not wait for them."""
    from torch._inductor.async_compile import shutdown_compile_workers

    _shutdowns.append(threading.Thread(target=shutdown_compile_workers))
    _shutdowns[-1].start()


def wait_for_compile_workers() -> None:
    """Wait until the workers have shut down: compiling before that fails on their closed pool."""
    while _shutdowns:
        _shutdowns.pop().join()
