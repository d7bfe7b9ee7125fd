"""Which checkpoint tensors make up which parameter of the model, and what one expert of it is made of.

transformers' own conversion mapping says so (three tensors an expert in Qwen3-MoE's files become one fused 3D
parameter), and we run its converters on one expert at a time, so that the peak is one expert, not one layer. What a
family's checkpoint looks like is therefore transformers' knowledge, not ours; where `adapters` rewrite a family, they
add to the mapping. Names and shapes are all that is asked here: nothing is read.

Left out: converters that mix experts cannot be run by the expert (`expert_pieces` gives None), and a way back:
converters only move values, so `merge` finds it by sending addresses forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from usaf import adapters

JOINING = tuple(  # operations along one dimension `dim`; transformers 5.13 has only the first
    getattr(core_model_loading, name)
    for name in ("Concatenate", "Interleave")
    if hasattr(core_model_loading, name)
)  # fmt: skip


class Piece(NamedTuple):
    """A tensor of the checkpoint, or a span of its first dimension: what one expert, or one parameter, is made of."""

    key: str
    pattern: str  # the converter's for it
    rows: tuple[int, int] | None = None  # None: all of it


@dataclass
class Source:
    """The tensors that make up one parameter of the model, in the order the converter wants them."""

    converter: WeightConverter | None
    lead: str  # the parameter under whose name the converter collects; another one where it makes several of the same
    keys: list[tuple[str, str]] = field(default_factory=list)  # (key, the converter's pattern for it)

    @property
    def pieces(self) -> list[Piece]:
        return [Piece(key, pattern) for key, pattern in self.keys]

    @property
    def experts_apart(self) -> bool:
        """Whether each expert has tensors of its own."""
        return self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist)


class WeightPlan:
    """The plan parameter -> `Source` of a model on the meta device, for a checkpoint of tensors by these names.

    shape_of: the shape of one of these tensors.
    """

    def __init__(
        self, model: PreTrainedModel, names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]
    ) -> None:
        self.model, self.shape_of = model, shape_of
        # Of the model as transformers builds it: later, banks take the place of its experts.
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.sources: dict[str, Source] = {}
        self.unexpected: list[str] = []
        self._lists: dict[str, dict[str, list[str]]] = {}
        self._shared: dict[str, bool] = {}  # leading parameter -> what `shares_its_lists` has found
        self._fill(names)

    def _fill(self, names: Iterable[str]) -> None:
        mapping = [*get_model_conversion_mapping(self.model), *adapters.conversions(self.model)]
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        wanted, prefix = self.model.state_dict(), self.model.base_model_prefix
        # The natural order (2 before 10) is what puts expert e at place e of every list.
        for key in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = rename_source_key(key, [], [], prefix, wanted)
            if target not in wanted:
                self.unexpected.append(key)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            for made in targets_of(converter, target):
                self.sources.setdefault(made, Source(converter, target)).keys.append((key, pattern or key))

    def missing(self, targets: Iterable[str]) -> list[str]:
        """Those of these parameters that no tensor of the checkpoint makes, and no other parameter."""
        tied = set(self.model.all_tied_weights_keys)
        return [t for t in targets if t not in self.sources and t not in tied]

    # -- one expert ----------------------------------------------------------------------------------------------------

    def expert_pieces(self, target: str, e: int) -> list[Piece] | None:
        """What expert e of a fused parameter is made of, in the converter's order: whole tensors, or rows of fused
        ones. None where the converter mixes experts."""
        source = self.sources[target]
        if source.experts_apart:
            return [Piece(keys[e], pattern) for pattern, keys in self.lists(target).items()]
        if self.shares_its_lists(target):
            first = self._made_together(target).index(target) * self.shapes[target][0]
            return [Piece(keys[first + e], pattern) for pattern, keys in self.lists(target).items()]
        if not expert_by_expert(source.converter):
            return None
        return [Piece(key, pattern, self._rows_of_expert(target, key, e)) for key, pattern in source.keys]

    def lists(self, target: str) -> dict[str, list[str]]:
        """The converter's pattern -> the tensors that match it, one for each expert where the experts are apart."""
        if target not in self._lists:
            lists = self._lists[target] = {}
            for key, pattern in self.sources[target].keys:
                lists.setdefault(pattern, []).append(key)
        return self._lists[target]

    def shares_its_lists(self, target: str) -> bool:
        """Whether the converter cuts lists of experts' tensors into those of several parameters, one after another's.

        As ERNIE-4.5-VL's does: experts of text, then of vision. Asked of the converter by tensors that hold a number.
        """
        source, made, num_experts = self.sources[target], self._made_together(target), self.shapes[target][0]
        lists = list(self.lists(target).values())
        if len(made) == 1 or any(len(keys) != len(made) * num_experts for keys in lists):
            return False
        if source.lead not in self._shared:
            number = {key: i for i, (key, _) in enumerate(source.keys)}
            found = self.assemble(target, source.pieces, (torch.full((1, 1), number[key]) for key, _ in source.keys))
            first = made.index(target) * num_experts
            expected = [sorted(number[keys[first + e]] for keys in lists) for e in range(num_experts)]
            self._shared[source.lead] = [sorted(expert.flatten().tolist()) for expert in found] == expected
        return self._shared[source.lead]

    def _made_together(self, target: str) -> list[str]:
        """The parameters that the converter of `target` makes of the same tensors, itself included."""
        source = self.sources[target]
        return targets_of(source.converter, source.lead)

    def _rows_of_expert(self, target: str, key: str, e: int) -> tuple[int, int]:
        """Of a tensor that holds all experts, one after another: the entries of its first dimension that are e's."""
        each = self.shape_of(key)[0] // self.shapes[target][0]
        return e * each, (e + 1) * each

    # -- what the converter makes of tensors ---------------------------------------------------------------------------

    def piece_shape(self, piece: Piece) -> tuple[int, ...]:
        shape = self.shape_of(piece.key)
        return shape if piece.rows is None else (piece.rows[1] - piece.rows[0], *shape[1:])

    def assemble(self, target: str, pieces: Iterable[Piece], tensors: Iterable[Tensor]) -> Tensor:
        """The whole parameter, or router, that the converter makes of all its tensors, one for each piece."""
        return self._convert(target, pieces, tensors, self.model, 1)

    def assemble_expert(self, target: str, pieces: Iterable[Piece], tensors: Iterable[Tensor]) -> Tensor:
        """[1, a, b] of a fused parameter, of the tensors of `expert_pieces`."""
        # Of a list that is cut into several parameters' experts, one expert alone stands for that of each.
        shared = not self.sources[target].experts_apart and self.shares_its_lists(target)
        copies = len(self._made_together(target)) if shared else 1
        return self._convert(target, pieces, tensors, _OneExpert(self.model, self.shapes), copies)

    def _convert(
        self, target: str, pieces: Iterable[Piece], tensors: Iterable[Tensor], model: Any, copies: int
    ) -> Tensor:
        source = self.sources[target]
        if source.converter is None:
            return next(iter(tensors))
        converter = copy.deepcopy(source.converter)  # it collects, and remembers
        for piece, tensor in zip(pieces, tensors, strict=True):
            future: Any = tensor  # (declared as a future of one)
            for _ in range(copies):
                converter.add_tensor(source.lead, piece.key, piece.pattern, future)
            del tensor, future  # the converter's alone from here on
        value = converter.convert(source.lead, model=model, config=self.model.config)[target]
        return value[0] if isinstance(value, list) else value


class _OneExpert:
    """The model as a converter sees it that works on one expert of a fused parameter: shapes are those of that one."""

    def __init__(self, model: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
        self.model, self.shapes = model, shapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty((1, *self.shapes[name][1:]), device="meta")


def targets_of(converter: WeightConverter | None, target: str) -> list[str]:
    """The parameters that a converter makes together, given the first of them."""
    patterns = [] if converter is None else converter.target_patterns
    return [target, *(target.replace(patterns[0], other) for other in patterns[1:])]


def dimensions(converter: WeightConverter | None) -> set[int | None]:
    """The dimensions of a fused parameter [E, a, b] that a converter joins or reorders, None for what it does else."""
    found: set[int | None] = set()
    for operation in () if converter is None else converter.operations:
        if isinstance(operation, Transpose):
            found |= {operation.dim0 % 3, operation.dim1 % 3}
        elif isinstance(operation, JOINING):
            found.add(operation.dim % 3)
        elif getattr(operation, "expertwise", False):  # an adapter's own
            found |= {1, 2}
        elif not isinstance(operation, MergeModulelist):
            found.add(None)
    return found


def expert_by_expert(converter: WeightConverter | None) -> bool:
    """Whether a converter of fused parameters leaves every expert for itself."""
    return dimensions(converter) <= {1, 2}


def in_rows(converter: WeightConverter | None) -> bool:
    """Whether whole rows are joined and reordered, within an expert, and nothing else."""
    return dimensions(converter) <= {1}
