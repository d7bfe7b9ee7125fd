"""A model without its weights that runs nonetheless: questions about a family are asked of its own code.

`skeleton` copies a model from the meta device and gives every part a cheap stand-in: a linear layer hands out the
features of its input from a random place on, an embedding makes up its vectors, experts hand on a scaled input, every
other parameter is one random row repeated. Real values flow through the family's real forward, in the memory of the
activations alone.

`handover` asks which outputs of a layer later layers need. In most families that is the hidden state alone; in others
a router's state goes along (zaya), keys and values are shared (gemma4), blocks of layers attend to the inputs of
earlier blocks (inkling2), or the tokens that one layer has selected are used by the next ones too (glm_moe_dsa). The
answer comes from one forward in which everything that leaves a layer is watched, wherever it goes: through the
decoder's own code, through containers that layers share, or straight into another layer.

The same forward tells which modules it calls. A multimodal model's towers and experts of other modalities are not
among them, and need not be loaded; nor is a linear layer whose weight is taken by other code, and which must therefore
stay what that code expects.

Left out: what a layer hands on by other ways (attributes of shared modules, a cache): no family does without a cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from usaf.errors import UserError, one_line
from usaf.experts import is_experts_module

ROWS, TOKENS = 2, 11  # of the question; no model has a dimension of 11

# What a family's own code raises where it wants more than it is given.
NOT_ASKED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)

Path = tuple[Any, ...]
"""Where a tensor is in nested containers: keys and indices, outermost first."""


class HandedOn(MoeModelOutputWithPast):
    """A decoder's output that was not computed: whatever else a head asks of it is not there."""

    def __getattr__(self, _name: str) -> None:
        return None


# -- a model that runs


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that runs the layers, their name, and they: the outermost list with experts in it."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name, m) for name, m in lists if any(is_experts_module(child) for child in m.modules())]
    if not found:
        raise UserError(f"MODEL: the experts of {model.config.model_type} are in no list of layers; this family is not "
                        "supported yet")  # fmt: skip
    name, layers = min(found, key=lambda item: item[0].count("."))
    return model.get_submodule(name.rpartition(".")[0]), name, layers


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the meta device that runs on the host. The model itself is not changed."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        stand_in = stand_in_for(module, generator)
        if stand_in is not None:
            vars(module)["forward"] = stand_in
            tables: set[str] = set()
        else:
            tables = module._non_persistent_buffers_set
        stores: list[dict[str, Any]] = [module._parameters, module._buffers]
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and tensor.is_meta and not is_experts_module(module):
                    value = repeated(tensor, generator)
                    store[name] = value.contiguous() if tables else value
        if tables:
            model._init_weights(module)  # what no checkpoint holds (rotary frequencies), as transformers makes it
    return model


def stand_in_for(module: nn.Module, generator: torch.Generator) -> Callable[..., Tensor] | None:
    """A cheap forward for the modules that hold nearly all weights."""
    if is_experts_module(module):
        return scaled
    if type(module) is nn.Linear:
        if module.in_features == 0:  # of a shared expert that a configuration leaves out
            return partial(nothing, module.out_features)
        place = int(torch.randint(module.in_features, (), generator=generator))
        return partial(turned, place, module.out_features)
    if isinstance(module, nn.Embedding):
        return partial(embed, torch.randn(module.embedding_dim, generator=generator))
    return None


def repeated(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of this shape, all rows of which are one in memory: positive values about 1, or ones for integers."""
    if not tensor.is_floating_point():
        value = torch.ones(tensor.shape[-1:], dtype=tensor.dtype).expand(tensor.shape)
    else:
        value = (0.5 + torch.rand(tensor.shape[-1:], generator=generator)).to(tensor.dtype).expand(tensor.shape)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def scaled(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden * 0.5


def turned(place: int, out_features: int, x: Tensor) -> Tensor:
    """[..., in] -> [..., out]: the features from `place` on, again from the first when they end."""
    whole, rest = divmod(place + out_features, x.shape[-1])
    if whole == 0:
        return x[..., place:rest] * 0.7
    return torch.cat([x[..., place:], *[x] * (whole - 1), x[..., :rest]], dim=-1) * 0.7


def nothing(out_features: int, x: Tensor) -> Tensor:
    """[..., 0] -> [..., out]: the product with a weight that has no columns."""
    return x.sum(-1, keepdim=True) * x.new_zeros(out_features)


def embed(row: Tensor, ids: Tensor) -> Tensor:
    """Vectors that differ by token in their direction, not their size alone, which a norm would take away."""
    return torch.cos(row * (1 + ids % 97).unsqueeze(-1))


# -- what layers hand on


@dataclass(frozen=True)
class Product:
    """A tensor that leaves a layer: by its return value (`where` begins with "out"), or in a container that it was
    given ("args" or "kwargs").

    token_axis, features: the shape is [B, ...] with the tokens at `token_axis` and `features` for the rest; None where
    a tensor is not made of one vector a token.
    """

    layer: int
    where: Path
    token_axis: int
    features: tuple[int, ...] | None


@dataclass(frozen=True)
class Handover:
    """returns[i]: the form of layer i's return value, with a path in the place of each tensor. needed[b]: what layers
    below `b` have made that the layers from `b` on, or what follows the last, need."""

    returns: list[Any]
    needed: list[tuple[Product, ...]]
    called: frozenset[str]  # the modules that a forward of text calls
    after_layers: frozenset[str]  # those of them that are called once the last layer has run, and not before

    @property
    def splits(self) -> list[int]:
        """Where the model can be cut: all that crosses is one vector a token. Begins with 0, ends with the depth."""
        return [b for b, products in enumerate(self.needed) if all(p.features is not None for p in products)]

    def width(self, boundary: int) -> int:
        """Numbers a token that cross `boundary`, one of the cuts."""
        return math.prod(self.token_shape(boundary))

    def token_shape(self, boundary: int) -> tuple[int, ...]:
        """Shape of what crosses `boundary`, one of the cuts, for a token: of the one tensor, or of several in a row
        (`SparseModel.pack`)."""
        crossing = [p.features or () for p in self.needed[boundary]]
        return crossing[0] if len(crossing) == 1 else (sum(map(math.prod, crossing)),)

    def segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) in the smallest pieces between two cuts."""
        cuts = [b for b in self.splits if start <= b <= stop]
        assert [cuts[0], cuts[-1]] == [start, stop], self.splits
        return list(zip(cuts[:-1], cuts[1:], strict=True))


class Watched(Tensor):
    """A tensor that says when it is used, and from which layers' products it was made outside of layers."""

    products: frozenset[int]
    flow: Flow

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            given = [t for _, t in leaves((args, kwargs)) if isinstance(t, Watched)]
            sources = frozenset().union(*(t.products for t in given))
            out = func(*args, **kwargs)
            if not given:
                return out
            flow = given[0].flow
            flow.used(sources)
            return watch(out, flow, frozenset() if flow.inside is not None else sources)


def watch(value: Any, flow: Flow, products: frozenset[int]) -> Any:
    """Every tensor in a torch function's result, watched."""
    if isinstance(value, Tensor):
        watched = value if isinstance(value, Watched) else value.as_subclass(Watched)
        watched.products, watched.flow = products, flow
        return watched
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # (the named results of torch.topk and the like)
        return tuple(watch(v, flow, products) for v in value)
    if isinstance(value, (tuple, list)):
        return type(value)(watch(v, flow, products) for v in value)
    return value


def leaves(value: Any, at: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested containers, with their places."""
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*at, key))
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from leaves(part, (*at, i))


@dataclass
class Flow:
    """What one forward with watched tensors has shown so far. Products are known by their number."""

    inside: int | None = None  # the layer whose code runs; None in the decoder's own
    products: list[Product] = field(default_factory=list)
    handed_on: dict[int, frozenset[int]] = field(default_factory=dict)  # a product that is an earlier one, unchanged
    uses: set[tuple[int, int]] = field(default_factory=set)  # (product, layer that used it)
    returns: list[Any] = field(default_factory=list)

    def used(self, products: frozenset[int]) -> None:
        if self.inside is not None:
            self.uses.update((p, self.inside) for p in products)

    def product(self, layer: int, where: Path, tensor: Tensor) -> Watched:
        """`tensor` leaves `layer`: a watched view of it, as a new product."""
        number = len(self.products)
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(tensor.shape)
            axes = [axis for axis, size in enumerate(shape) if size == TOKENS]
            whole = tensor.is_floating_point() and len(axes) == 1 and axes[0] > 0 and shape[0] == ROWS
            features = tuple(n for axis, n in enumerate(shape) if axis not in (0, axes[0])) if whole else None
            earlier = tensor.products if isinstance(tensor, Watched) else frozenset()
            fresh = tensor.as_subclass(Tensor).view_as(tensor).as_subclass(Watched)
        self.products.append(Product(layer, where, axes[0] if whole else 0, features))
        if earlier:
            self.handed_on[number] = earlier
        fresh.products, fresh.flow = frozenset({number}), self
        return fresh

    def run_layer(self, layer: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        given = {"args": args, "kwargs": kwargs}
        before = {id(t) for _, t in leaves(given)}
        self.inside = layer
        out = forward(*args, **kwargs)
        self.inside = None
        for where, tensor in list(leaves(given)):
            if id(tensor) not in before:
                put(given, where, self.product(layer, where, tensor))
        template, replaced = self._returned(layer, out, ("out",))
        self.returns.append(template)
        return replaced

    def _returned(self, layer: int, value: Any, at: Path) -> tuple[Any, Any]:
        """(the value with paths for tensors, the value with products for tensors)"""
        if isinstance(value, Tensor):
            return at, self.product(layer, at, value)
        if isinstance(value, tuple):
            parts = [self._returned(layer, part, (*at, i)) for i, part in enumerate(value)]
            return [template for template, _ in parts], tuple(part for _, part in parts)
        assert value is None, type(value)
        return None, None

    def needed(self, boundary: int) -> tuple[Product, ...]:
        """Products of layers below `boundary` that layers from it on use, in the order in which they were made."""
        found: set[int] = set()
        for product, layer in self.uses:
            if layer >= boundary:
                found |= self._made_below(boundary, product)
        return tuple(self.products[number] for number in sorted(found))

    def _made_below(self, boundary: int, product: int) -> set[int]:
        if self.products[product].layer < boundary:
            return {product}
        return set().union(*(self._made_below(boundary, p) for p in self.handed_on.get(product, ())))


def put(container: Any, where: Path, value: Tensor) -> None:
    """Set the tensor at a place in nested containers. The innermost container that can change gets it: at its key, or
    in the tuple there, which is made where it is not there yet."""
    holder, at = container, 0
    for depth in range(1, len(where)):
        container = container[where[depth - 1]] if not lacks(container, where[depth - 1]) else None
        if isinstance(container, (MutableMapping, MutableSequence)):
            holder, at = container, depth
    key, *within = where[at:]
    if isinstance(holder, MutableSequence):
        holder.extend([None] * (key + 1 - len(holder)))
    if not within:
        holder[key] = value
        return
    (place,) = within
    parts = [] if lacks(holder, key) else list(holder[key] or ())
    parts.extend([None] * (place + 1 - len(parts)))
    parts[place] = value
    holder[key] = tuple(parts)


def lacks(container: Any, key: Any) -> bool:
    return container is None or (isinstance(container, Mapping) and key not in container)


def get(container: Any, where: Path) -> Tensor:
    for key in where:
        container = container[key]
    return container


def handover(model: PreTrainedModel) -> Handover:
    """What each layer of a model on the meta device hands on to the later ones, and what it calls.

    Raises UserError where the model's code cannot be asked so.
    """
    family = model.config.model_type
    model = skeleton(model)
    decoder, _, layers = find_decoder(model)
    flow = Flow()
    called: dict[str, bool] = {}  # module -> whether the last layer had run when it was first called
    after: list[bool] = []

    def note(name: str, *_: Any) -> None:
        called.setdefault(name, bool(after))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(note, name))
    layers[-1].register_forward_hook(lambda *_: after.append(True))
    for i, layer in enumerate(layers):
        layer.forward = partial(flow.run_layer, i, layer.forward)
    final: list[Tensor] = []
    decoder.register_forward_hook(lambda _module, _args, out: final.append(out.last_hidden_state))
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 7
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    try:
        with torch.no_grad():
            decoder(input_ids=ids, position_ids=positions, use_cache=False)
            decoder.forward = lambda *_, **__: HandedOn(last_hidden_state=final[0].as_subclass(Tensor))
            model(input_ids=ids, use_cache=False)
    except NOT_ASKED as error:
        raise UserError(f"MODEL: {family}: its layers cannot be run by token ids and positions alone "
                        f"({type(error).__name__}: {one_line(error)[:200]}); this family is not supported "
                        "yet") from error  # fmt: skip
    flow.inside = len(layers)  # what follows the last layer counts as one more
    flow.used(final[0].products)  # type: ignore[attr-defined]
    return Handover(flow.returns, [flow.needed(b) for b in range(len(layers) + 1)],
                    frozenset(called), frozenset(name for name, late in called.items() if late))  # fmt: skip
