"""What a model is made of, in numbers: weights, widths, and the bytes that its layers' activations take.

The numbers are asked of the family's own code, as everything in `skeleton` is: the model of config.json, without its
weights, runs one layer of each kind on a few tokens while every tensor that its operators make is watched. So masks,
rotary embeddings, attention of any sort, norms, shared experts and routers are counted as they are, under whatever
name; what stands in for the experts allocates nothing of its own but its result, since what experts need is known
exactly (`budget`). Bytes grow with tokens, and where scores or masks are formed with tokens times sequence length, so
two lengths give both coefficients.

Rows with a mask (packed documents, padding) take more than rows without: attention then repeats its keys and widens
the mask. Activations are those of a CPU (fp32).

Left out: memory inside one operator (a few MB of attention's blocks), and activations in 16 bits on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from usaf.architecture import meta_model, read_config
from usaf.checkpoint import Checkpoint
from usaf.experts import is_experts_module, projection_names
from usaf.packing import kinds
from usaf.quantization import E2M1_VALUES, INT4_VALUES, Encoding, hqq_encoding
from usaf.skeleton import Handover, find_decoder, handover, leaves, skeleton
from usaf.trained_parts import norms

LENGTHS = (128, 256)
"""Tokens of the two rows of the question: enough that vectors of fixed size (norms) do not count."""

ATTENTION_SUMS = ("scaled_dot_product", "bmm", "baddbmm")
"""Operators whose products grow with the square of the length."""


class Growth(NamedTuple):
    """Bytes (or operations) a token, and a token times the length of its row."""

    per_token: float
    per_square: float = 0.0

    def at(self, tokens: int, length: int) -> int:
        return int(tokens * (self.per_token + self.per_square * length))


@dataclass(frozen=True)
class Activations:
    """Of one layer, without what its experts hold between their two products. Every part includes the layer's result.

    working: most that is alive while it runs without gradients. kept: what it keeps for its backward; kept_first: the
    same where its input needs no gradient. forward, backward: most that is alive on the way, what is kept included.
    attention: operations of scores and sums, forward.
    """

    working: Growth
    kept: Growth
    kept_first: Growth
    forward: Growth
    backward: Growth
    attention: Growth


@dataclass(frozen=True)
class Experts:
    """The fused experts of one layer. up, down: (out, in) of one expert; pairs_per_token: top_k; encodings: how the two
    are stored in 4 bits. normed: products are kept for the backward (a norm follows them)."""

    count: int
    pairs_per_token: float
    up: tuple[int, int]
    down: tuple[int, int]
    encodings: tuple[Encoding, Encoding]
    router_weights: int
    bias_weights: int = 0
    normed: bool = False

    @property
    def weights(self) -> int:
        return sum(self.bank_weights)

    @property
    def bank_weights(self) -> tuple[int, int]:
        """Of all experts, in the first and the second projection."""
        return self.count * self.up[0] * self.up[1], self.count * self.down[0] * self.down[1]

    @property
    def stored_bytes(self) -> int:
        """Of the 4-bit file."""
        shapes = ((self.count, *self.up), (self.count, *self.down))
        return sum(
            dtype.itemsize * torch.Size(shape).numel()
            for encoding, whole in zip(self.encodings, shapes, strict=True)
            for dtype, shape in encoding.tensors(whole).values()
        )


@dataclass(frozen=True)
class LayerShape:
    """linear_weights: of frozen linear maps outside the experts; widest_linear: of the largest of them; other_weights:
    all else but the router's (norms, biases); norm_weights: of these, the norms that train where TRAIN_NORMS is 1."""

    linear_weights: int
    widest_linear: int
    other_weights: int
    norm_weights: int
    activations: Activations
    experts: Experts | None


@dataclass(frozen=True)
class ModelShape:
    """width: numbers a token that cross from layer to layer (at most); head: (vocabulary, hidden); outside: activations
    beside the layers (masks, tables, final norm); last_norm_weights: of the norms behind these; stored_bytes: of one
    dense weight in memory; mapped_share: the part of such weights that is used from the checkpoint's files as is."""

    model_type: str
    layers: tuple[LayerShape, ...]
    splits: tuple[int, ...]
    width: int
    head: tuple[int, int]
    tied: bool
    outside: Growth
    last_norm_weights: int
    stored_bytes: int
    mapped_share: float
    context: int | None

    @property
    def hidden(self) -> int:
        return self.head[1]

    @property
    def shared_weights(self) -> int:
        """Embeddings and head."""
        return self.head_weights * (1 if self.tied else 2)

    @property
    def head_weights(self) -> int:
        return self.head[0] * self.head[1]

    def segments(self, start: int) -> list[tuple[int, int]]:
        """[start, layers) in the smallest pieces between two cuts."""
        cuts = [b for b in self.splits if b >= start]
        return list(zip(cuts[:-1], cuts[1:], strict=True))


def shape_of_checkpoint(checkpoint: Checkpoint, group_size: int, bits: int, masked: bool = True) -> ModelShape:
    """Of a checkpoint whose headers are there, before its model is built."""
    experts = {target for pair in checkpoint.expert_parameters().values() for target in pair}
    sizes = {t: torch.Size(s).numel() for t, s in checkpoint.plan.shapes.items() if t in checkpoint.sources}
    dense = {t: n for t, n in sizes.items() if t not in experts and len(checkpoint.plan.shapes[t]) > 1}
    mapped = sum(n for t, n in dense.items() if is_stored_as_used(checkpoint, t))
    itemsize = max((checkpoint.dtype(t).itemsize for t in dense), default=2)

    def encoding_of(target: str) -> Encoding:
        known = target in checkpoint.sources and checkpoint.four_bit(target)
        return known or hqq_encoding(group_size, bits)

    share = mapped / max(1, sum(dense.values()))
    return model_shape(checkpoint.model, checkpoint.handover, encoding_of, itemsize, share, masked)


def is_stored_as_used(checkpoint: Checkpoint, target: str) -> bool:
    """Whether a parameter is one plain tensor of the checkpoint."""
    source = checkpoint.sources[target]
    return source.converter is None and len(source.keys) == 1 and checkpoint.format(source.keys[0][0]) == "plain"


def shape_of_config(folder: Path, group_size: int, bits: int) -> tuple[ModelShape, PreTrainedModel, list[str]]:
    """Of a folder that need hold no more than config.json; its model, and what cannot be known from it."""
    config, quantization = read_config(folder)
    model = meta_model(config)
    method = None if quantization is None else quantization.method
    text = config.get_text_config()
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    encoding, unknown = hqq_encoding(group_size, bits), []
    if quantization is not None and (method == "mxfp4" or quantization.group_sizes):
        name, group = ("mxfp4", 32) if method == "mxfp4" else ("int4", quantization.group_sizes[0])
        scale = torch.uint8 if method == "mxfp4" else torch.bfloat16
        table = E2M1_VALUES if method == "mxfp4" else INT4_VALUES
        encoding = Encoding(name, group, 4, scale, None, table, quantization.dtype)
        unknown.append(f"experts are taken to be stored in {name}, groups of {group}, in every layer")
    elif quantization is not None:
        unknown.append(f"dense weights in {method} are taken to be held in 16 bits")
    itemsize = 4 if dtype in (torch.float32, "float32") else 2
    mapped = 0.0 if method is not None and method != "mxfp4" else 1.0
    return model_shape(model, handover(model), lambda _: encoding, itemsize, mapped), model, unknown


def model_shape(
    model: PreTrainedModel, handed_over: Handover, encoding_of: Callable[[str], Encoding], stored_bytes: int,
    mapped_share: float, masked: bool = True,
) -> ModelShape:  # fmt: skip
    """The shape of a model on the meta device, which is not changed.

    encoding_of: how a fused expert parameter is stored in 4 bits; masked: whether rows are packed or padded.
    """
    _, layers_name, layers = find_decoder(model)
    measured, outside = ask_activations(model, masked)
    of_norms = norm_weights(model, layers_name, handed_over)
    shapes = []
    for i, layer in enumerate(layers):
        name = f"{layers_name}.{i}"
        shapes.append(layer_shape(model, name, layer, handed_over, encoding_of, of_norms[i], *measured[i]))
    text = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight: Any = (head if isinstance(head, nn.Linear) else embedding).weight
    width = max(handed_over.width(cut) for cut in handed_over.splits if cut > 0)
    return ModelShape(
        model_type=model.config.model_type, layers=tuple(shapes), splits=tuple(handed_over.splits),
        width=width, head=(weight.shape[0], weight.shape[1]),
        tied=bool(model.all_tied_weights_keys), outside=outside, last_norm_weights=of_norms[None],
        stored_bytes=stored_bytes, mapped_share=mapped_share, context=getattr(text, "max_position_embeddings", None),
    )  # fmt: skip


def layer_shape(
    model: PreTrainedModel, name: str, layer: nn.Module, handed_over: Handover, encoding_of: Callable[[str], Encoding],
    of_norms: int, activations: Activations, pairs_per_token: float,
) -> LayerShape:  # fmt: skip
    """Count one layer's weights by their role."""
    found = [(n, m) for n, m in layer.named_modules() if is_experts_module(m) and f"{name}.{n}" in handed_over.called]
    own = tuple(n for n, _ in found)
    linear = [m.weight.numel() for n, m in layer.named_modules()
              if type(m) is nn.Linear and f"{name}.{n}" in handed_over.called]  # fmt: skip
    blocks = [(model.get_submodule(f"{name}.{n}".rpartition(".")[0]), m) for n, m in found]
    routers = sum(p.numel() for block, m in blocks for p in router_parameters(block, m))
    all_weights = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith(tuple(f"{o}." for o in own)))
    experts = None
    if found:
        (inner, module), *_ = found
        up, down = projection_names(module)
        encodings = encoding_of(f"{name}.{inner}.{up}"), encoding_of(f"{name}.{inner}.{down}")
        shapes = [oriented(module, p) for p in (up, down)]
        experts = Experts(
            shapes[0][0], pairs_per_token, shapes[0][1:], shapes[1][1:], encodings, routers,
            sum(p.numel() for p in module.parameters() if p.ndim == 2),
            bool(getattr(module, "has_post_expert_norm", False)),
        )  # fmt: skip
    others = max(0, all_weights - sum(linear) - routers)
    return LayerShape(sum(linear), max(linear, default=0), others, of_norms, activations, experts)


def norm_weights(model: PreTrainedModel, layers_name: str, handed_over: Handover) -> Counter[int | None]:
    """Weights of the norms that could train, by layer; None: behind the last."""
    apart: list[str] = []
    for name, module in model.named_modules():
        if is_experts_module(module):
            block = name.rpartition(".")[0]
            routers = router_names(model.get_submodule(block), module)
            apart += [name, *(f"{block}.{router}".rpartition(".")[0] for router in routers)]
    found: Counter[int | None] = Counter()
    for layer, _, module in norms(model, layers_name, handed_over, apart):
        found[layer] += sum(p.numel() for p in (module._parameters["weight"],) if p is not None)
    return found


def oriented(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(E, out, in) of a fused parameter."""
    experts, rows, columns = module.get_parameter(parameter).shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


def router_parameters(block: nn.Module, experts: nn.Module) -> list[nn.Parameter]:
    return list(router_names(block, experts).values())


def router_names(block: nn.Module, experts: nn.Module) -> dict[str, nn.Parameter]:
    """The 2D weight beside the experts that has a row for each of them, by its name in their block."""
    count = int(getattr(experts, "router_rows", next(p for p in experts.parameters() if p.ndim == 3).shape[0]))
    inside = {id(p) for p in experts.parameters()}
    return {
        n: p for n, p in block.named_parameters()
        if p.ndim == 2 and p.shape[0] == count and id(p) not in inside and "shared" not in n
    }  # fmt: skip


# ---- activations ----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Bytes of the storages that operators under it have made and that are still alive, and their peak; operations of
    attention on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for _, t in leaves((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for _, tensor in leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # else a view, perhaps of a weight
                reference = StorageWeakRef(storage)
                self.alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        if any(name in str(func) for name in ATTENTION_SUMS) and "backward" not in str(func):
            self.operations += products_of(args)
        return out

    def bytes(self) -> int:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())


def products_of(args: Any) -> int:
    """Operations of a batched product (a, b), or of attention (query, key, value)."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    if len(tensors) > 2 and tensors[0].ndim == 4:  # scores, then their sum of the values
        query, key, value = tensors[:3]
        return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    first, second = tensors[-2:]
    return 2 * first.numel() * second.shape[-1]


class _Linear(torch.autograd.Function):
    """The memory of a frozen linear map: its result, and nothing that is kept."""

    @staticmethod
    def forward(ctx, x, out_features: int):
        ctx.in_features = x.shape[-1]
        return x.new_full((*x.shape[:-1], out_features), 0.1)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(*grad.shape[:-1], ctx.in_features), None


class _Experts(torch.autograd.Function):
    """The memory of experts, less what is theirs: the input is kept (weights' gradients need it), the result made."""

    @staticmethod
    def forward(ctx, x, routing_weights, trained):
        ctx.save_for_backward(x, routing_weights)
        return torch.full_like(x, 0.1)

    @staticmethod
    def backward(ctx, grad):
        x, routing_weights = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(routing_weights), None


@dataclass
class _Asked:
    """What one kind of layer answered at one length. pairs: token-expert pairs."""

    working: int = 0
    kept: int = 0
    kept_first: int = 0
    forward: int = 0
    backward: int = 0
    attention: int = 0
    pairs: int = 0


def ask_activations(model: PreTrainedModel, masked: bool) -> tuple[list[tuple[Activations, float]], Growth]:
    """Each layer's activations and pairs a token; and the activations beside the layers."""
    short, long = (ask_at(model, length, masked) for length in LENGTHS)
    answers = []
    for a, b in zip(short[0], long[0], strict=True):
        parts = {
            name: growth(getattr(a, name), getattr(b, name))
            for name in ("working", "kept", "kept_first", "forward", "backward", "attention")
        }
        answers.append((Activations(**parts), b.pairs / LENGTHS[1]))
    return answers, growth(short[1], long[1])


def growth(short: int, long: int) -> Growth:
    """The coefficients through two measured points."""
    a, b = short / LENGTHS[0], long / LENGTHS[1]
    square = max(0.0, (b - a) / (LENGTHS[1] - LENGTHS[0]))
    return Growth(b - square * LENGTHS[1], square)


def ask_at(model: PreTrainedModel, length: int, masked: bool) -> tuple[list[_Asked], int]:
    """One forward of a row (of two documents where it is masked), each kind of layer watched once."""
    copied = skeleton(model)
    trained = torch.zeros(1, requires_grad=True)
    asked: dict[object, _Asked] = {}
    pairs: list[int] = []
    for name, module in copied.named_modules():
        if is_experts_module(module):
            vars(module)["forward"] = partial(stand_in_experts, trained, pairs)
            for weight in router_parameters(copied.get_submodule(name.rpartition(".")[0]), module):
                weight.requires_grad_(True)
        elif type(module) is nn.Linear and module.in_features:
            vars(module)["forward"] = partial(_linear, module.out_features)
    decoder, _, layers = find_decoder(copied)
    order: list[_Asked] = []
    beside = Watch()

    def ask(layer: nn.Module, kind: object, *args: Any, **kwargs: Any) -> Any:
        with unwatched(beside):
            run = partial(type(layer).forward, layer)
            if kind not in asked:
                asked[kind] = watch_layer(run, pairs, args, kwargs)
            order.append(asked[kind])
            return run(*args, **kwargs)

    for layer, kind in zip(layers, kinds(layers), strict=True):
        layer.forward = partial(ask, layer, kind)
    ids = torch.arange(length).unsqueeze(0) % 7
    positions = torch.arange(length // 2).repeat(2) if masked else torch.arange(length)
    with torch.no_grad(), beside:
        decoder(input_ids=ids, position_ids=positions.unsqueeze(0), use_cache=False)
    return order, beside.peak


def _linear(out_features: int, x: Tensor) -> Tensor:
    return _Linear.apply(x, out_features)


def stand_in_experts(trained: Tensor, pairs: list[int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    pairs.append(ids.numel())
    return _Experts.apply(hidden, weights, trained)


@contextmanager
def unwatched(mode: Watch) -> Iterator[None]:
    """The mode off for a while; it is the one entered last."""
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


def watch_layer(run: Callable[..., Any], pairs: list[int], args: Any, kwargs: Any) -> _Asked:
    """One layer, watched without gradients, as the first trainable one, and as any other of them."""
    asked = _Asked()
    pairs.clear()
    with torch.no_grad(), Watch() as watch:
        out = run(*args, **kwargs)
        del out
    asked.working, asked.attention, asked.pairs = watch.peak, watch.operations, sum(pairs)
    with torch.enable_grad():
        for first in (True, False):
            given = given_anew(args, kwargs, needs_gradient=not first)
            with Watch() as watch:
                out = run(*given[0], **given[1])
                if first:
                    asked.kept_first = watch.bytes()
                else:
                    asked.kept, asked.forward = watch.bytes(), watch.peak
                    watch.peak = 0
                    results = [t for _, t in leaves(out) if t.requires_grad]
                    torch.autograd.backward(results, [torch.zeros_like(t) for t in results])
                    asked.backward = watch.peak
                del out
    return asked


def given_anew(args: Any, kwargs: Any, needs_gradient: bool) -> tuple[Any, Any]:
    """The same arguments, the hidden state (the first of them in floating point) detached, with or without gradient."""
    place, hidden = next((at, t) for at, t in leaves((args, kwargs)) if t.is_floating_point())
    fresh = hidden.detach().clone().requires_grad_(needs_gradient)
    if place[0] == 0:
        return (*args[: place[1]], fresh, *args[place[1] + 1 :]), kwargs
    return args, {**kwargs, place[1]: fresh}
