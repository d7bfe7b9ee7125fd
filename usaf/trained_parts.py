"""What trains beside experts and routers: the output layer, sparsely, and the norms, whole.

A head trains only where the logits are what it returns (`SparseModel.plain_head`): a scaled or capped one is frozen.
Norms are the one-dimensional weights of the trained layers, but for those in experts and routers, and those of what
follows the last layer. They are fp32 masters, as routers are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from usaf.model import MoeLayer, SparseModel, master_dtype
from usaf.skeleton import Handover
from usaf.sparse_head import SparseHead


def open_head(model: SparseModel) -> bool:
    """Put a `SparseHead` in the place of the output layer. False where this head cannot train."""
    layer = model.plain_head
    if layer is None:
        return False
    name = next(name for name, module in model.model.named_modules() if module is layer)
    model.head, model.head_name = SparseHead(layer), f"{name}.weight"
    parent, _, attribute = name.rpartition(".")
    setattr(model.model.get_submodule(parent), attribute, model.head)
    return True


def open_norms(model: SparseModel, start: int) -> None:
    """Make fp32 masters (float64 where the model computes in that) of the norms that train from layer `start` on."""
    for name, module in trained_norms(model, start).items():
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        model.norms[f"{name}.weight"] = weight
        if model.backend.compute_dtype in (torch.float16, torch.bfloat16):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32)
            module.forward = functools.partial(in_fp32, module.forward, model.backend.compute_dtype)
        weight.data = weight.data.to(master_dtype(model.backend))


def trained_norms(model: SparseModel, start: int) -> dict[str, nn.Module]:
    """Module name -> the module."""
    apart = [name for moe in model.moe for name in experts_and_router(moe)]
    found = norms(model.model, model.layers_name, model.handover, apart)
    return {name: module for layer, name, module in found if layer is None or layer >= start}


def norms(
    model: nn.Module, layers_name: str, handover: Handover, apart: list[str]
) -> Iterator[tuple[int | None, str, nn.Module]]:  # fmt: skip
    """(layer, name, module) of those that could train; layer None: behind the last. apart: the names of experts and
    routers."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1 or name not in handover.called:
            continue
        if any(f"{name}.".startswith(f"{other}.") for other in apart):
            continue
        if name.startswith(f"{layers_name}."):
            yield int(name[len(layers_name) + 1 :].split(".")[0]), name, module
        elif name in handover.after_layers:
            yield None, name, module


def experts_and_router(moe: MoeLayer) -> tuple[str, str]:
    """The names of the two modules of a layer's MoE block; a router may be several layers deep (zaya's is)."""
    experts = moe.names[0].rpartition(".")[0]
    block = experts.rpartition(".")[0]
    return experts, f"{block}.{moe.router_name[len(block) + 1 :].partition('.')[0]}"


def in_fp32(forward: Callable[..., Any], narrow: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """A module's forward in the type of its fp32 weights, and its result in `narrow`: some families cast what goes in
    to the type of the weight, so what comes in does not say what is to come out."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(part, dtype) for part in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    wide = {name: cast(value, torch.float32) for name, value in kwargs.items()}
    return cast(forward(*(cast(a, torch.float32) for a in args), **wide), narrow)
