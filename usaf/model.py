"""The model: transformers' modules with 4-bit experts in them, run any stretch of layers at a time.

The architecture stays transformers' own: masks, rotary embeddings, norms, routers, head. `run_layers` calls the
decoder's own forward with the layers outside [start, stop) replaced by functions that hand on a given hidden state, so
the frozen prefix, the trained suffix, a single layer and the final norm are all one mechanism, for every family.

No attention mask is passed: most families tell packed documents apart by position ids that restart (see `packing` for
those that do not).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usaf.checkpoint import Checkpoint
from usaf.data import Batch
from usaf.devices import Backend
from usaf.errors import UserError
from usaf.expert_bank import ExpertBank
from usaf.expert_store import ExpertStore
from usaf.experts import attach_banks, is_experts_module, projection_names
from usaf.files import fingerprint
from usaf.linear import FrozenEmbedding, FrozenLinear
from usaf.read_ahead import Span, read_ahead
from usaf.skeleton import HandedOn, Handover, Path, Product, find_decoder, get, put
from usaf.sparse_head import SparseHead
from usaf.sparse_weights import SparseWeights
from usaf.tensor_file import tensor_bytes

MOST_EXTRA_ROWS = 8
"""Rows that a router's weight may have beyond one for each expert."""


@dataclass(frozen=True)
class MoeLayer:
    """The trainable parts of one MoE layer, and their names in the checkpoint's model."""

    layer: int
    names: tuple[str, str]  # of the two fused expert parameters
    banks: tuple[ExpertBank, ExpertBank]
    router_name: str
    router: nn.Module  # the module that owns the router weight [num_experts, hidden], fp32

    @property
    def router_weight(self) -> nn.Parameter:
        return self.router.weight  # type: ignore[return-value]


class _Stopped(Exception):
    """Ends a forward that has gone far enough."""


class SparseModel:
    """`model` (transformers) with banks for experts; `moe` lists its MoE layers in order."""

    def __init__(self, model: PreTrainedModel, backend: Backend, base_fingerprint: str, handover: Handover) -> None:
        self.model, self.backend, self.base_fingerprint = model, backend, base_fingerprint
        self.handover = handover
        self.config: Any = model.config
        self.decoder, self.layers_name, self.layers = find_decoder(model)
        self.moe = find_moe_layers(model, self.layers_name)
        self.head: SparseHead | None = None  # where it trains (`trained_parts`), and the name of its weight
        self.head_name = ""
        self.norms: dict[str, nn.Parameter] = {}  # those that train, by name
        self.spans: dict[int, list[Span]] = {}  # MoE layer -> where its mapped experts lie
        for moe in self.moe:
            moe.router.register_forward_pre_hook(widen_router_input)
            for module in beside_router(model, moe, self.layers_name):
                narrow = functools.partial(narrow_input, backend.compute_dtype)
                module.register_forward_pre_hook(narrow, with_kwargs=True)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def moe_from(self, start: int) -> list[MoeLayer]:
        """The MoE layers at or above layer `start`."""
        return [moe for moe in self.moe if moe.layer >= start]

    def sparse_weights(self, start: int) -> dict[str, SparseWeights[Any]]:
        """What trains sparsely from layer `start` on, by name: its experts, and the head where it does."""
        found: dict[str, SparseWeights[Any]] = {}
        for moe in self.moe_from(start):
            found |= zip(moe.names, moe.banks, strict=True)
        return found if self.head is None else {**found, self.head_name: self.head}

    def whole_weights(self, start: int, routers: bool) -> dict[str, nn.Parameter]:
        """What trains in all its weights, by name: routers, where they do, and norms."""
        own = {moe.router_name: moe.router_weight for moe in self.moe_from(start)} if routers else {}
        return {**own, **self.norms}

    def own_weights(self) -> dict[str, Tensor]:
        """Copies of all routers and norms, by name: the checkpoint's own, as long as no delta is applied."""
        return {name: weight.detach().clone() for name, weight in self.whole_weights(0, routers=True).items()}

    def place(self, layer: int, device: torch.device) -> None:
        """Move one decoder layer, its banks included."""
        self.layers[layer].to(device)
        for moe in self.moe:
            if moe.layer == layer:
                for bank in moe.banks:
                    bank.move(device)

    def read_ahead(self, first: int, end: int) -> None:
        """Have the experts of layers [first, end) read from the disk while others compute."""
        read_ahead([span for layer in range(first, end) for span in self.spans.get(layer, [])])

    @contextmanager
    def placed(self, first: int, end: int | None = None) -> Iterator[None]:
        """Frozen layers [first, end), one unless told otherwise, on the compute device for as long as they are needed;
        the host keeps its own."""
        device = self.backend.device
        if device.type == "cpu":
            yield
            return
        layers = range(first, first + 1 if end is None else end)
        # Not place() there and back: that would end with copies in place of the mapped files.
        bases = [(bank, bank.base) for moe in self.moe if moe.layer in layers for bank in moe.banks]
        modules = [module for layer in layers for module in self.layers[layer].modules()]
        stores: list[dict[str, Any]] = [store for m in modules for store in (m._parameters, m._buffers)]
        on_host = [(store, dict(store)) for store in stores]
        try:
            for bank, _ in bases:
                bank.move(device)
            for store, tensors in on_host:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = tensor.detach().to(device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        store[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
            yield
        finally:
            for bank, base in bases:
                bank.base = base
            for store, tensors in on_host:
                store.update(tensors)

    def run_layers(self, batch: Batch, start: int, stop: int, state: Tensor | None = None, norm: bool = True) -> Tensor:
        """The state after layers [start, stop), and after the final norm too when `stop` is the model's end.

        Both ends must be among `handover.splits`. The state is the hidden state; in the few families whose layers hand
        on more than that, all of it in one tensor (see `pack`).

        Args:
            batch: B sequences of S tokens.
            state: [B, S, ...], what enters layer `start`; None from the embeddings (start 0).
            norm: False stops before the final norm.

        Returns:
            [B, S, ...] on the compute device.
        """
        assert (state is None) == (start == 0)
        ids = batch.input_ids.to(self.backend.device)
        positions = batch.position_ids.to(self.backend.device)
        through = stop == self.num_layers and norm
        products = {} if state is None else self.unpack(start, state)
        with self._replaced(start, stop, products, through):
            try:
                output = self.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            except _Stopped:
                return self.pack(stop, products)
        assert through
        return output

    def pack(self, boundary: int, products: dict[Product, Tensor]) -> Tensor:
        """What crosses `boundary` as one tensor [B, S, ...]: the one there is, or all features of a token in a row."""
        tensors = [products[p] for p in self.handover.needed[boundary]]
        if len(tensors) == 1:
            return tensors[0]
        widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        axes = (p.token_axis for p in self.handover.needed[boundary])
        flat = [t.movedim(axis, 1).flatten(2).to(widest) for t, axis in zip(tensors, axes, strict=True)]
        return torch.cat(flat, dim=-1)

    def unpack(self, boundary: int, state: Tensor) -> dict[Product, Tensor]:
        """The inverse of `pack`. All but the layer's own output come in the compute type."""
        needed = self.handover.needed[boundary]
        if len(needed) == 1:
            return {needed[0]: state}
        parts = state.split([math.prod(p.features or ()) for p in needed], dim=-1)
        products = {}
        for product, part in zip(needed, parts, strict=True):
            assert product.features is not None
            whole = part.reshape(*part.shape[:2], *product.features).movedim(1, product.token_axis)
            own = product.layer == boundary - 1 and product.where in (("out",), ("out", 0))
            products[product] = whole if own else whole.to(self.backend.compute_dtype)
        return products

    @contextmanager
    def _replaced(self, start: int, stop: int, products: dict[Product, Tensor], through: bool) -> Iterator[None]:
        """Layers below `start` hand on what is in `products`, and what the others make for `stop` is put there."""
        by_place = {(p.layer, p.where): tensor for p, tensor in products.items()}
        some = next(iter(by_place.values()), None)  # where nothing needs a layer's output, anything will do
        for i in range(start):
            self.layers[i].forward = functools.partial(self._hand_on, i, by_place, some)
        hooks = []
        if not through:
            for i in range(start, stop):
                kept = [p for p in self.handover.needed[stop] if p.layer == i]
                keep = functools.partial(_keep, products, kept, i == stop - 1)
                hooks.append(self.layers[i].register_forward_hook(keep, with_kwargs=True))
        try:
            yield
        finally:
            for layer in self.layers[:start]:
                del layer.__dict__["forward"]
            for hook in hooks:
                hook.remove()

    def _hand_on(
        self, layer: int, by_place: dict[tuple[int, Path], Tensor], some: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        given = {"args": args, "kwargs": kwargs}
        for (of, where), tensor in by_place.items():
            if of == layer and where[0] != "out":
                put(given, where, tensor)
        made = {where: tensor for (of, where), tensor in by_place.items() if of == layer}
        return _filled(self.handover.returns[layer], made, some)

    @functools.cached_property
    def plain_head(self) -> FrozenLinear | None:
        """The output layer, where the logits are exactly what it returns: neither scaled nor capped. Found by one token
        that goes through the head, by what enters the layer and whether its output is what comes out."""
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, FrozenLinear):
            return None
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
        hidden = (
            torch.linspace(-1, 1, layer.in_features).to(self.backend.device, self.backend.compute_dtype).unsqueeze(0)
        )
        try:
            with torch.no_grad():
                logits = self.logits(hidden)
        finally:
            hook.remove()
        passed = [hidden.reshape(-1), logits.reshape(-1)]
        plain = len(seen) == 2 and all(torch.equal(a.reshape(-1), b) for a, b in zip(seen, passed, strict=True))
        return layer if plain else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] after the final norm -> [n, vocabulary], by the model's own head (its scalings and caps included)."""

        def hand_on(*_: Any, **__: Any) -> HandedOn:
            return HandedOn(last_hidden_state=hidden.unsqueeze(0))

        self.decoder.forward = hand_on
        try:
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.decoder.__dict__["forward"]


def _filled(template: Any, made: dict[Path, Tensor], some: Tensor | None) -> Any:
    """A layer's return value in the form of `template`: `some` for a hidden state that nothing needs, None for others.

    (No function inside another: one that calls itself would be a cycle, and hold a layer's states until it is found.)
    """
    if isinstance(template, list):
        return tuple(_filled(part, made, some) for part in template)
    return None if template is None else made.get(template, some if template in (("out",), ("out", 0)) else None)


def _keep(
    products: dict[Product, Tensor],
    kept: list[Product],
    last: bool,
    _layer: nn.Module,
    args: Any,
    kwargs: Any,
    out: Any,
) -> None:
    """A layer's forward hook: note what it has made; the last one ends the forward."""
    for product in kept:
        products[product] = get({"args": args, "kwargs": kwargs, "out": out}, product.where)
    if last:
        raise _Stopped


def widen_router_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Routers compute in the type of their fp32 master weights, whatever type the layer computes in."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(a.to(weight.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def beside_router(model: PreTrainedModel, moe: MoeLayer, layers_name: str) -> list[nn.Module]:
    """What a router's weights may reach but for the experts, which take any type: the other modules of their block,
    such as shared experts. (None where the block is the layer itself, as in gemma4.)"""
    experts = moe.names[0].rpartition(".")[0]
    block = experts.rpartition(".")[0]
    if block.rpartition(".")[0] == layers_name:
        return []
    children = model.get_submodule(block).named_children()
    return [m for name, m in children if f"{block}.{name}" != experts
            and not f"{moe.router_name}.".startswith(f"{block}.{name}.")]  # fmt: skip


def narrow_input(
    dtype: torch.dtype, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The counterpart of `widen_router_input`: in a 16-bit model fp32 goes no further than routers and experts."""

    def narrow(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    return tuple(narrow(a) for a in args), {name: narrow(value) for name, value in kwargs.items()}


def find_moe_layers(model: PreTrainedModel, layers_name: str) -> list[MoeLayer]:
    """Experts by transformers' marks, routers by shape: the 2D weight [num_experts, hidden] beside the experts."""
    layers = []
    for name, module in model.named_modules():
        if hasattr(module, "up_bank"):
            index = int(name[len(layers_name) + 1 :].split(".")[0])
            up, down = module.up_bank, module.down_bank
            up_name, down_name = projection_names(module)
            router = router_path(model, name, module)
            names = (f"{name}.{up_name}", f"{name}.{down_name}")
            layers.append(MoeLayer(index, names, (up, down), f"{router}.weight", model.get_submodule(router)))
    return sorted(layers, key=lambda moe: moe.layer)


def router_path(model: PreTrainedModel, experts_name: str, experts: nn.Module) -> str:
    """The full name of the module that owns the router weight of these experts."""
    block, _, own = experts_name.rpartition(".")
    bank: Any = experts.up_bank
    rows = getattr(experts, "router_rows", bank.num_experts)  # some of those with an adapter choose among more
    return f"{block}.{find_router(model.get_submodule(block), own, int(rows))}"


def find_router(block: nn.Module, experts_name: str, num_experts: int) -> str:
    """The name, inside an MoE block, of the module that owns the router weight."""
    found = [
        (parameter.shape[0] - num_experts, name.rpartition(".")[0])
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and name.endswith(".weight")
        and not name.startswith(f"{experts_name}.") and "shared" not in name
    ]  # fmt: skip
    # Some routers also know ways past the experts (zaya's skip, inkling's shared ones): a few rows more.
    for extra in range(1 + MOST_EXTRA_ROWS):
        matching = [name for more, name in found if more == extra]
        if matching:
            break
    if len(matching) != 1:
        matches = ", ".join(matching) or "none"
        raise UserError(f"MODEL: the router beside {type(block).__name__}'s experts cannot be told ({matches} of shape "
                        f"[{num_experts}, hidden]); this family is not supported yet")  # fmt: skip
    return matching[0]


def build_model(checkpoint: Checkpoint, store: ExpertStore, backend: Backend) -> SparseModel:
    """Banks for experts, dense weights from the checkpoint; nothing is initialised at random or copied twice."""
    model, handover = checkpoint.model, checkpoint.handover
    for name, (up, down) in checkpoint.expert_parameters().items():
        attach_banks(model.get_submodule(name), store[up], store[down])
    drop_what_text_never_calls(model, handover)
    dense_hash = load_dense(model, checkpoint, backend)
    model.requires_grad_(False)
    config = {k: v for k, v in json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")).items()
              if k not in ("transformers_version", "_name_or_path")}  # fmt: skip
    base = fingerprint({"config": config, "dense": dense_hash, "experts": store.content_hash()})
    backend.prepare_model(model)
    sparse = SparseModel(model, backend, base, handover)
    sparse.spans = {moe.layer: [span for name in moe.names for span in store.spans.get(name, [])] for moe in sparse.moe}
    if backend.device.type != "cpu":
        place_shared(sparse)
    return sparse


def drop_what_text_never_calls(model: PreTrainedModel, handover: Handover) -> None:
    """Towers beside the decoder and experts of other modalities: their weights are neither loaded nor left on meta."""
    decoder = find_decoder(model)[1].rpartition(".")[0]
    for name, module in list(model.named_modules()):
        parent = name.rpartition(".")[0]
        beside = f"{decoder}.".startswith(f"{parent}." if parent else "") and parent != decoder
        if name and (beside or is_experts_module(module)):
            within = (name, f"{name}.")
            if not any(called == within[0] or called.startswith(within[1]) for called in handover.called):
                setattr(model.get_submodule(parent), name.rpartition(".")[2], nn.Module())


def place_shared(sparse: SparseModel) -> None:
    """Everything outside the layers (embeddings, final norm, head, rotary tables) to the compute device."""
    attribute, model = sparse.layers_name.rpartition(".")[2], sparse.model
    shared = {t: s for t, s in model.all_tied_weights_keys.items() if model.get_parameter(t) is model.get_parameter(s)}
    setattr(sparse.decoder, attribute, nn.ModuleList())
    model.to(sparse.backend.device)  # type: ignore[arg-type]
    setattr(sparse.decoder, attribute, sparse.layers)
    for target, source in shared.items():  # torch moves the one tensor twice, except to CUDA
        owner, _, name = target.rpartition(".")
        model.get_submodule(owner)._parameters[name] = model.get_parameter(source)


def load_dense(model: PreTrainedModel, checkpoint: Checkpoint, backend: Backend) -> str:
    """Give every parameter and buffer that is still on meta its value; returns the sha256 of what the checkpoint holds.

    Weights of plain linear and embedding layers stay in the checkpoint's type where the device can hold it (see
    `Backend.held`), and on the host they are views of its files: the system's cache holds them, not the process.
    Routers are fp32 masters (float64 where the model computes in float64), as are buffers beside experts, among them
    correction biases; all others, small, are in the compute type (norms that train become masters in `trained_parts`).
    """
    experts = {name: module for name, module in model.named_modules() if hasattr(module, "up_bank")}
    routers = {router_path(model, name, module) for name, module in experts.items()}
    places = Places(routers, {name.rpartition(".")[0] for name in experts}, checkpoint.handover.called)
    shapes = {k: v.shape for k, v in model.state_dict().items() if v.is_meta}
    wanted = set(shapes)
    assert not checkpoint.missing(wanted), "the checkpoint's headers were checked when it was opened"
    hashes = {}
    for name in sorted(wanted & set(checkpoint.sources)):
        value = checkpoint.mapped(name) if stays_as_stored(model, name, places) else None
        value = checkpoint.read(name) if value is None else value
        assert value.shape == shapes[name], name
        hashes[name] = hashlib.sha256(tensor_bytes(value)).hexdigest()
        set_dense(model, name, value, places, backend)
    for target, source in model.all_tied_weights_keys.items():
        if target in wanted and target not in checkpoint.sources:
            if keeps_fp32(model, target, places.routers):  # hy_v4's head computes in the type of its weight
                set_dense(model, source, model.get_parameter(source).to(master_dtype(backend)), places, backend)
            owner = model.get_submodule(target.rpartition(".")[0])
            owner._parameters[target.rpartition(".")[2]] = model.get_parameter(source)
    initialise_tables(model)
    freeze_linear(model, places, backend.compute_dtype)
    return fingerprint(hashes)


class Places(NamedTuple):
    """Modules by their role: routers, the blocks that have experts, and all that are called (see `skeleton`)."""

    routers: set[str]
    blocks: set[str]
    called: frozenset[str]


def set_dense(model: PreTrainedModel, name: str, value: Tensor, places: Places, backend: Backend) -> None:
    """Put one tensor of the checkpoint in its place, in the type that `load_dense` says."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if value.is_floating_point():
        beside_experts = attribute in owner._buffers and any(name.startswith(f"{b}.") for b in places.blocks)
        if beside_experts or keeps_fp32(model, name, places.routers):
            value = value.to(master_dtype(backend))
        elif is_held(owner, owner_name, places):
            value = backend.held(value)
        else:
            value = value.to(backend.compute_dtype)
    if value.untyped_storage().nbytes() > value.nbytes:  # a converter may hand out a view of something larger
        value = value.clone()
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[attribute] = value


def is_held(owner: nn.Module, owner_name: str, places: Places) -> bool:
    """Whether the weights of this module are kept in the checkpoint's type and widened when they are used."""
    return (type(owner) in (nn.Linear, nn.Embedding) and owner_name in places.called) or (
        hasattr(owner, "in_stored_type")
    )


def stays_as_stored(model: PreTrainedModel, name: str, places: Places) -> bool:
    """Whether a tensor of the checkpoint is used as it is and never written to."""
    owner_name = name.rpartition(".")[0]
    held = is_held(model.get_submodule(owner_name), owner_name, places)
    return held and not keeps_fp32(model, name, places.routers)


def master_dtype(backend: Backend) -> torch.dtype:
    """Of weights that must not be rounded to the compute type."""
    return torch.float64 if backend.compute_dtype == torch.float64 else torch.float32


def keeps_fp32(model: PreTrainedModel, name: str, routers: set[str]) -> bool:
    """Routers with all that belongs to them, and what the family itself declares: correction biases that are rounded to
    16 bits would choose other experts."""
    declared = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    of_router = any(name.startswith(f"{router}.") for router in routers)
    return of_router or any(pattern in name for pattern in declared)


def initialise_tables(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): transformers computes them, on the CPU."""
    for module in model.modules():
        # Only the owners of such buffers, and none of their weights: _init_weights draws those anew.
        tables = module._non_persistent_buffers_set
        if tables:
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            loaded = [{n: t for n, t in store.items() if t is not None and n not in tables} for store in stores]
            for store, tensors in zip(stores, loaded, strict=True):
                store.update({n: torch.empty_like(t, device="meta") for n, t in tensors.items()})
            for name in tables:
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
            for store, tensors in zip(stores, loaded, strict=True):
                store.update(tensors)


def freeze_linear(model: PreTrainedModel, places: Places, dtype: torch.dtype) -> None:
    """Put `FrozenLinear` and `FrozenEmbedding` in the place of plain linear and embedding layers that are called; where
    a family takes the weight itself instead, it stays in the compute type."""
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            full_name = f"{parent_name}.{name}".lstrip(".")
            if full_name in places.routers or full_name not in places.called:
                continue
            if type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child.weight, child.bias))
            elif type(child) is nn.Embedding:
                setattr(parent, name, FrozenEmbedding(child.weight, dtype))
