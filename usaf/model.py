"""The model: transformers' modules with 4-bit experts in them, run any stretch of layers at a time.

The architecture stays transformers' own: masks, rotary embeddings, norms, routers, head. `run_layers` calls the
decoder's own forward with the layers outside [start, stop) replaced by functions that hand on a given hidden state, so
the frozen prefix, the trained suffix, a single layer and the final norm are all one mechanism, for every family.

No attention mask is passed: most families tell packed documents apart by position ids that restart (see `packing` for
those that do not).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from usaf.checkpoint import Checkpoint
from usaf.data import Batch
from usaf.devices import Backend
from usaf.errors import UserError
from usaf.expert_store import ExpertStore
from usaf.experts import ExpertBank, attach_banks, find_layers, is_experts_module, projection_names
from usaf.files import fingerprint
from usaf.linear import FrozenEmbedding, FrozenLinear
from usaf.tensor_file import tensor_bytes


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
    """Carries the hidden state out of a forward that has gone far enough."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class SparseModel:
    """`model` (transformers) with banks for experts; `moe` lists its MoE layers in order."""

    def __init__(self, model: PreTrainedModel, backend: Backend, base_fingerprint: str) -> None:
        self.model, self.backend, self.base_fingerprint = model, backend, base_fingerprint
        self.config: Any = model.config
        self.decoder, self.layers_name, self.layers = find_decoder(model)
        self.moe = find_moe_layers(model, self.layers_name)
        for moe in self.moe:
            moe.router.register_forward_pre_hook(widen_router_input)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def moe_from(self, start: int) -> list[MoeLayer]:
        """The MoE layers at or above layer `start`."""
        return [moe for moe in self.moe if moe.layer >= start]

    def place(self, layer: int, device: torch.device) -> None:
        """Move one decoder layer, its banks included."""
        self.layers[layer].to(device)
        for moe in self.moe:
            if moe.layer == layer:
                for bank in moe.banks:
                    bank.move(device)

    @contextmanager
    def placed(self, layer: int) -> Iterator[None]:
        """A frozen layer on the compute device for as long as it is needed; the host keeps its own."""
        device = self.backend.device
        if device.type == "cpu":
            yield
            return
        # Not place() there and back: that would end with copies in place of the mapped files.
        bases = [(bank, bank.base) for moe in self.moe if moe.layer == layer for bank in moe.banks]
        stores: list[dict[str, Any]] = [s for m in self.layers[layer].modules() for s in (m._parameters, m._buffers)]
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

    def run_layers(self, batch: Batch, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        """The hidden state after layers [start, stop), and after the final norm too when `stop` is the model's end.

        Args:
            batch: B sequences of S tokens.
            hidden: [B, S, ...], what enters layer `start`; None from the embeddings (start 0).

        Returns:
            [B, S, ...] on the compute device.
        """
        assert (hidden is None) == (start == 0)
        ids = batch.input_ids.to(self.backend.device)
        positions = batch.position_ids.to(self.backend.device)
        with self._replaced(start, stop, hidden):
            try:
                return self.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            except _Stopped as stopped:
                return stopped.hidden

    @contextmanager
    def _replaced(self, start: int, stop: int, hidden: Tensor | None) -> Iterator[None]:
        def hand_on(*_: Any, **__: Any) -> Tensor:
            assert hidden is not None
            return hidden

        def halt(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            raise _Stopped(hidden_states)

        replaced = list(self.layers[:start])
        for layer in replaced:
            layer.forward = hand_on
        if stop < self.num_layers:
            replaced.append(self.layers[stop])
            self.layers[stop].forward = halt
        try:
            yield
        finally:
            for layer in replaced:
                del layer.__dict__["forward"]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] after the final norm -> [n, vocabulary], by the model's own head (its scalings and caps included)."""

        def hand_on(*_: Any, **__: Any) -> MoeModelOutputWithPast:
            return MoeModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))

        self.decoder.forward = hand_on
        try:
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.decoder.__dict__["forward"]


def widen_router_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Routers compute in the type of their fp32 master weights, whatever type the layer computes in."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(a.to(weight.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that runs the layers, their name, and they."""
    name, layers = find_layers(model)
    return model.get_submodule(name.rpartition(".")[0]), name, layers


def find_moe_layers(model: PreTrainedModel, layers_name: str) -> list[MoeLayer]:
    """Experts by transformers' marks, routers by shape: the 2D weight [num_experts, hidden] beside the experts."""
    layers = []
    for name, module in model.named_modules():
        if is_experts_module(module):
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
        name.rpartition(".")[0]
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and parameter.shape[0] == num_experts and name.endswith(".weight")
        and not name.startswith(f"{experts_name}.") and "shared" not in name
    ]  # fmt: skip
    if len(found) != 1:
        matches = ", ".join(found) or "none"
        raise UserError(f"MODEL: the router beside {type(block).__name__}'s experts cannot be told ({matches} of shape "
                        f"[{num_experts}, hidden]); this family is not supported yet")  # fmt: skip
    return found[0]


def build_model(checkpoint: Checkpoint, store: ExpertStore, backend: Backend) -> SparseModel:
    """Banks for experts, dense weights from the checkpoint; nothing is initialised at random or copied twice."""
    model = checkpoint.model
    for name, module in list(model.named_modules()):
        if is_experts_module(module):
            up, down = projection_names(module)
            attach_banks(module, store[f"{name}.{up}"], store[f"{name}.{down}"])
    dense_hash = load_dense(model, checkpoint, backend)
    model.requires_grad_(False)
    config = {k: v for k, v in json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")).items()
              if k not in ("transformers_version", "_name_or_path")}  # fmt: skip
    base = fingerprint({"config": config, "dense": dense_hash, "experts": store.content_hash()})
    backend.prepare_model(model)
    sparse = SparseModel(model, backend, base)
    if backend.device.type != "cpu":
        place_shared(sparse)
    return sparse


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
    `Backend.held`); routers are fp32 masters (float64 where the model computes in float64); all others, small, are in
    the compute type.
    """
    routers = {router_path(model, name, m) for name, m in model.named_modules() if is_experts_module(m)}
    shapes = {k: v.shape for k, v in model.state_dict().items() if v.is_meta}
    wanted = set(shapes)
    assert not checkpoint.missing(wanted), "the checkpoint's headers were checked when it was opened"
    hashes = {}
    for name in sorted(wanted & set(checkpoint.sources)):
        value = checkpoint.read(name)
        assert value.shape == shapes[name], name
        hashes[name] = hashlib.sha256(tensor_bytes(value)).hexdigest()
        set_dense(model, name, value, routers, backend)
    for target, source in model.all_tied_weights_keys.items():
        if target in wanted and target not in checkpoint.sources:
            owner = model.get_submodule(target.rpartition(".")[0])
            owner._parameters[target.rpartition(".")[2]] = model.get_parameter(source)
    initialise_tables(model)
    freeze_linear(model, routers, backend.compute_dtype)
    return fingerprint(hashes)


def set_dense(model: PreTrainedModel, name: str, value: Tensor, routers: set[str], backend: Backend) -> None:
    """Put one tensor of the checkpoint in its place, in the type that `load_dense` says."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if value.is_floating_point():
        if attribute in owner._buffers or keeps_fp32(model, name, routers):
            value = value.to(torch.float64 if backend.compute_dtype == torch.float64 else torch.float32)
        elif type(owner) in (nn.Linear, nn.Embedding) or getattr(owner, "in_stored_type", False):
            value = backend.held(value)
        else:
            value = value.to(backend.compute_dtype)
    value = value.clone()  # a converter may hand out a view of something larger
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[attribute] = value


def keeps_fp32(model: PreTrainedModel, name: str, routers: set[str]) -> bool:
    """Routers with all that belongs to them, and what the family itself declares: correction biases that are rounded to
    16 bits would choose other experts."""
    declared = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    of_router = any(name.startswith(f"{router}.") for router in routers)
    return of_router or any(pattern in name for pattern in declared)


def initialise_tables(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): transformers computes them, on the CPU."""
    for module in model.modules():
        # Only the owners of such buffers: _init_weights would draw random weights elsewhere.
        if module._non_persistent_buffers_set:
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)


def freeze_linear(model: PreTrainedModel, routers: set[str], dtype: torch.dtype) -> None:
    """Put `FrozenLinear` and `FrozenEmbedding` in the place of plain linear and embedding layers."""
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if f"{parent_name}.{name}".lstrip(".") in routers:
                continue
            if type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child.weight, child.bias))
            elif type(child) is nn.Embedding:
                setattr(parent, name, FrozenEmbedding(child.weight, dtype))
