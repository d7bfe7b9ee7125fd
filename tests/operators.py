"""Which operators a block of code runs, and which of them DirectML would hand back to the CPU.

`OperatorRecorder` sees every operator that reaches a device, forward and backward, with the devices and types of its
tensors. `directml_fallbacks` judges the names the way torch's dispatcher would on a machine with torch-directml,
whose native operators are listed in directml_operators.json (dumped from torch-directml 0.2.5.dev240914):

1. an operator of the list is native;
2. a view only makes a new tensor over the same memory (as_strided, native);
3. a composite kernel (CompositeExplicitAutograd) runs on every device and calls other operators: COMPOSITES names
   them, and each is judged in turn; one that is not in the table is flagged, to be looked up in native_functions.yaml
   and added;
4. a structured functional or in-place operator (CompositeExplicitAutogradNonFunctional) calls its out= overload, the
   only one a device registers: `add.Tensor` and `add_.Tensor` are native because `add.out` is;
5. anything else goes to the CPU by the backend's fallback.

Beyond names: index_put with several index tensors is not supported there, whatever the list says. silu_backward is
flagged by rule 4; torch's autograd may replace it by its parts on a foreign device (fake_device.py shows that), but
only a run on real hardware could tell, and x * sigmoid(x) is safe either way.

Left out: the recording runs on the installed torch and on the CPU. Composites of torch 2.4.1 may differ in a few places
(prefer operators that are one in every version, such as sort(stable=True) over argsort), and the list says nothing of
the types an operator takes there.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NATIVE = frozenset(json.loads((Path(__file__).parent / "directml_operators.json").read_text(encoding="utf-8")))
TRANSFERS = ("aten::_to_copy", "aten::copy_")
INDEX_PUTS = ("aten::index_put", "aten::index_put_", "aten::_unsafe_index_put", "aten::_index_put_impl_")
NEW_EMPTY = ("empty.memory_format", "empty_strided")
# Composite kernels and what they call (torch's native_functions.yaml and the kernels it names), "aten::" left out. A
# key without an overload also stands for the composite overloads that have no key of their own.
COMPOSITES: dict[str, tuple[str, ...]] = {
    "_to_copy": (*NEW_EMPTY, "copy_"),
    "clone": ("empty_like", "empty_strided", "copy_"),
    "empty_like": NEW_EMPTY,
    "new_empty": NEW_EMPTY,
    "new_empty_strided": NEW_EMPTY,
    "empty_permuted": NEW_EMPTY,
    "zeros": (*NEW_EMPTY, "zero_"),
    "zeros_like": ("empty_like", "zero_"),
    "new_zeros": ("new_empty", "zero_"),
    "ones": (*NEW_EMPTY, "fill_.Scalar"),
    "new_ones": ("new_empty", "fill_.Scalar"),
    "full_like": ("empty_like", "fill_.Scalar"),
    "new_full": ("new_empty", "fill_.Scalar"),
    "scalar_tensor": (*NEW_EMPTY, "fill_.Scalar"),
    "lift_fresh": (),
    "abs": ("abs.out",),
    "abs_": ("abs.out",),
    "stack": ("unsqueeze", "cat", "view"),
    "add.Scalar": ("add.Tensor",),
    "sub.Scalar": ("sub.Tensor",),
    "mul.Scalar": ("mul.Tensor",),
    "div.Scalar": ("div.Tensor",),
    "add_.Scalar": ("add_.Tensor",),
    "sub_.Scalar": ("sub_.Tensor",),
    "mul_.Scalar": ("mul_.Tensor",),
    "div_.Scalar": ("div_.Tensor",),
    "sum": ("sum.dim_IntList",),
    "mean": ("mean.dim",),
    "remainder.Scalar": ("remainder.Tensor",),
    "floor_divide.Scalar": ("floor_divide",),
    "floor_divide_.Scalar": ("floor_divide_.Tensor",),
    "bitwise_and.Scalar": ("bitwise_and.Tensor",),
    "bitwise_or.Scalar": ("bitwise_or.Tensor",),
    "bitwise_xor.Scalar": ("bitwise_xor.Tensor",),
    "bitwise_left_shift.Tensor_Scalar": ("bitwise_left_shift.Tensor",),
    "bitwise_right_shift.Tensor_Scalar": ("bitwise_right_shift.Tensor",),
    "logical_and": ("logical_and.out",),
    "logical_or": ("logical_or.out",),
    "logical_xor": ("logical_xor.out",),
    "logical_not": ("logical_not.out",),
    "logical_and_": ("logical_and.out",),
    "logical_or_": ("logical_or.out",),
    "logical_xor_": ("logical_xor.out",),
    "logical_not_": ("logical_not.out",),
    "masked_fill.Scalar": ("clone", "masked_fill_.Scalar"),
    "masked_fill.Tensor": ("clone", "masked_fill_.Tensor"),
    "sort": ("sort.stable",),
    "arange": ("empty.memory_format", "arange.start_out"),
    "randperm": ("empty.memory_format", "randperm.generator_out"),
    "rand": ("empty.memory_format", "uniform_"),
    "randn": ("empty.memory_format", "normal_"),
    "randint": ("empty.memory_format", "random_.from"),
    "select_backward": ("zeros", "select.int", "copy_"),
    "slice_backward": ("zeros", "slice.Tensor", "copy_"),
    "select_scatter": ("clone", "select.int", "copy_"),
    "slice_scatter": ("clone", "slice.Tensor", "copy_"),
    "index_put": ("clone", "index_put_"),
    "index_put_": ("_index_put_impl_",),
    "_unsafe_index_put": ("clone", "index_put_"),
}


@dataclass(frozen=True)
class TensorKind:
    """What a call's argument or result was: `device` is a device type such as "cpu"."""

    device: str
    dtype: torch.dtype
    dimensions: int


@dataclass(frozen=True)
class Call:
    """One kind of call. `operator` is "namespace::name" or "namespace::name.overload"; `index_tensors` counts the index
    tensors of an index_put (0 for other operators)."""

    operator: str
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    index_tensors: int = 0


@functools.cache
def operator_name(function: torch._ops.OpOverload) -> str:
    """ "aten::add.Tensor", or "aten::mm" where the overload has no name."""
    overload = function._schema.overload_name
    return f"{function._schema.name}.{overload}" if overload else function._schema.name


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@functools.cache
def _is_implicit_composite(name: str) -> bool:
    """Whether every device runs the operator as its parts. Not so where another generic kernel comes first in the
    dispatcher's
    order: silu_backward has an implicit kernel too, but a device without its own gets the structured one."""
    explicit = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return _has_kernel(name, "CompositeImplicitAutograd") and not any(_has_kernel(name, key) for key in explicit)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results; ten times as fast as torch's general tree_leaves."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _kinds(values: Any) -> tuple[TensorKind, ...]:
    return tuple(TensorKind(t.device.type, t.dtype, t.dim()) for t in tensors_in(values))


class OperatorRecorder(TorchDispatchMode):
    """Context manager that counts in `calls` the operators run inside it, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    @property
    def operators(self) -> set[str]:
        """The names of the operators seen."""
        return {call.operator for call in self.calls}

    def on(self, device: str) -> OperatorRecorder:
        """The calls that touched a tensor of that device type."""
        chosen = OperatorRecorder()
        for call, count in self.calls.items():
            if any(kind.device == device for kind in (*call.inputs, *call.outputs)):
                chosen.calls[call] = count
        return chosen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func)
        if name not in NATIVE and _is_implicit_composite(name):
            # Seen undecomposed only under inference_mode: record its parts, as autograd would have left them.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        index_tensors = 0
        if func._schema.name in INDEX_PUTS:
            index_tensors = sum(index is not None for index in args[1])
        self.calls[Call(name, _kinds((args, kwargs)), _kinds(out), index_tensors)] += 1
        return out


def _lookup(name: str) -> torch._ops.OpOverload:
    """The operator of that name; "aten::" may be left out."""
    namespace, _, rest = name.rpartition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace or "aten"), base)
    return getattr(packet, overload or "default")


def _is_view(function: torch._ops.OpOverload) -> bool:
    aliases = [argument.alias_info for argument in function._schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _out_overload(function: torch._ops.OpOverload) -> str | None:
    """The overload with the same arguments plus out tensors; in-place `name_` shares the one of `name`."""
    schema = function._schema
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    namespace, _, base = schema.name.partition("::")
    if base.endswith("_") and not base.startswith("__"):
        base = base[:-1]
    packet = getattr(getattr(torch.ops, namespace), base)
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        arguments = candidate._schema.arguments
        given = [(argument.name, str(argument.type)) for argument in arguments if not _is_out(argument)]
        if len(given) < len(arguments) and given == wanted:
            return operator_name(candidate)
    return None


def _is_out(argument: Any) -> bool:
    return argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write


@functools.cache
def fallback_reason(name: str) -> str | None:
    """Why DirectML would not run the operator `name` itself, or None where it would (rules 1 to 5 above)."""
    if name in NATIVE or name.startswith("profiler::"):
        return None
    if not name.startswith("aten::"):
        return "not one of torch's own operators"
    function = _lookup(name)
    if _is_view(function):
        return None
    composite = _has_kernel(name, "CompositeExplicitAutograd")
    short = name.removeprefix("aten::")
    parts = COMPOSITES.get(short)
    if parts is None and composite:
        parts = COMPOSITES.get(short.partition(".")[0])
    if parts is not None:
        for part in parts:
            reason = fallback_reason("aten::" + part)
            if reason is not None:
                return f"calls {part}: {reason}"
        return None
    if _has_kernel(name, "CompositeExplicitAutogradNonFunctional"):
        out = _out_overload(function)
        return None if out in NATIVE else f"{out or 'its out= overload'} is not native"
    if composite:
        return "a composite whose parts are not in COMPOSITES"
    return "has no DirectML kernel"


def directml_fallbacks(recorder: OperatorRecorder) -> list[str]:
    """ "operator: why" for each recorded operator that DirectML would run on the CPU or not at all, sorted."""
    found = set()
    for call in recorder.calls:
        if call.index_tensors > 1:
            found.add(f"{call.operator}: {call.index_tensors} index tensors, DirectML takes one")
        reason = fallback_reason(call.operator)
        if reason is not None:
            found.add(f"{call.operator}: {reason}")
    return sorted(found)


def _tensors(call: Call) -> Iterator[TensorKind]:
    """The call's tensors without CPU scalars, which torch lets any device read."""
    for kind in (*call.inputs, *call.outputs):
        if kind.dimensions > 0 or kind.device != "cpu":
            yield kind


def directml_types(recorder: OperatorRecorder) -> list[str]:
    """ "operator: type" for each use of a type DirectML lacks (bfloat16, complex) or gets wrong (float64), sorted."""
    lacking = {torch.bfloat16, torch.float64, torch.complex32, torch.complex64, torch.complex128}
    return sorted({f"{c.operator}: {k.dtype}" for c in recorder.calls for k in _tensors(c) if k.dtype in lacking})


def mixed_devices(recorder: OperatorRecorder) -> list[str]:
    """ "operator: devices" for each operator other than a copy whose tensors lay on more than one device, sorted."""
    found = set()
    for call in recorder.calls:
        devices = sorted({kind.device for kind in _tensors(call)})
        if len(devices) > 1 and not call.operator.startswith(TRANSFERS):
            found.add(f"{call.operator}: {', '.join(devices)}")
    return sorted(found)
