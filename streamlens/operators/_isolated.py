"""A copy of a model to evaluate and differentiate, of which the run notices nothing."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = [
    "IsolatedCopy",
    "isolated_copy",
    "repeatable",
    "twice_differentiable",
    "unwrapped",
    "widened_input",
]

_TRAINERS: Final = ("_trainer", "_fabric")
"""Attributes through which a LightningModule knows all that trains it."""


@dataclass(frozen=True, slots=True, eq=False)
class IsolatedCopy:
    """Copies of modules that belong together.

    Attributes:
        modules: The copies, in the order given.
        parameters: The copies of the first module's parameters, by their names in the original.
    """

    modules: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]


def isolated_copy(model: nn.Module, *others: nn.Module) -> IsolatedCopy:
    """Copy a model, and modules that may refer to it, so that running the copy touches nothing else.

    The copy has parameters and buffers of its own. It has no hooks, neither ours nor the user's, but for
    those of `torch.nn.utils` that are a part of the computation (weight and spectral norm, pruning). What
    only wraps a module (data parallelism, `torch.compile`) is left out, and batch norm is not synchronised
    over processes. Half precision is widened to float32.

    Args:
        model: The model.
        *others: Modules copied with it, such as its loss: a reference to the model becomes one to its copy.

    Returns:
        The copies.
    """
    roots = (model, *others)
    modules = [module for root in roots for module in root.modules()]
    memo: dict[int, Any] = {}
    for module in modules:
        _prepare(module, memo)
    for module in reversed(modules):
        inner = _wrapped(module)
        if inner is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    copies = tuple(copy.deepcopy(root, memo) for root in roots)
    for made in copies:
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.data = widened_input(tensor.data)
        for module in made.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                # Sparse gradients save memory for optimizers that know them; they have no second derivative.
                module.sparse = False
            elif isinstance(module, nn.SyncBatchNorm):
                # It would wait for other processes, which need not evaluate anything now.
                module.__class__ = type(type(module).__name__, (_Unsynchronised, type(module)), {})
    return IsolatedCopy(copies, {name: memo[id(p)] for name, p in model.named_parameters()})


class _Unsynchronised:
    """Normalises by the batch that this process is given: all of it, where a metric evaluates."""

    forward = nn.BatchNorm1d.forward


def _prepare(module: nn.Module, memo: dict[int, Any]) -> None:
    """Say what becomes of those attributes of a module that are not simply copied."""
    if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
        memo[id(module.process_group)] = module.process_group
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            memo[id(value)] = type(value)(
                (key, copy.deepcopy(hook, memo)) for key, hook in value.items() if _computes(hook)
            )
        elif name in _TRAINERS and value is not None:
            memo[id(value)] = value
        else:
            for tensor in _tensors(value):
                if not tensor.is_leaf:
                    # A result kept from the last forward: PyTorch copies leaves only.
                    memo[id(tensor)] = tensor.detach().clone()


def _computes(hook: object) -> bool:
    """Whether a hook is a part of what the module computes."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _tensors(value: object) -> Iterator[Tensor]:
    entries: Iterable[object] = (value,)
    if isinstance(value, dict):
        entries = value.values()
    elif isinstance(value, list | tuple):
        entries = value
    return (entry for entry in entries if isinstance(entry, Tensor))


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper that adds nothing to what it computes."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    # What torch.compile(module) returns; naming its class would import the compiler.
    return module._modules.get("_orig_mod")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without what only wraps it: data parallelism, `torch.compile`."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def widened_input(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it has fewer bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


@contextlib.contextmanager
def repeatable(model: nn.Module, seed: int) -> Iterator[None]:
    """Make whatever a model draws the same each time; `undisturbed` puts the generators back.

    Args:
        model: The model, for its devices.
        seed: The seed.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        # Not torch.manual_seed, which reaches devices that are none of the model's.
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    yield


class _Decomposed(TorchFunctionMode):
    """Replaces fused functions that PyTorch differentiates wrongly a second time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:
            direction, length, *dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, *dim))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Compute in a way that can be differentiated twice, whatever the caller has switched on or off.

    Flash attention, cuDNN's recurrent networks and compiled code know first derivatives only, and the
    second ones of fused weight norm are wrong; autocast would round.

    Args:
        model: The model that is to be differentiated.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(_Decomposed())
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
