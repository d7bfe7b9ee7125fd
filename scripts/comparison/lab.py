"""Variants of the method on dense weights: every option that an ablation needs, in its plainest form.

A `Recipe` says which tensors train, at which entries, and how these move. What earns its place here is then built into
USAF itself, and what does not stays an option of this file and a line in the results. `dense` has the loop.

Sources: drop the smallest |delta| and seed moments, SpIEL (Ansell et al. 2024); |mean gradient|, SPEFT
(arXiv 2412.13488); most-routed experts, MoE-Sieve (arXiv 2603.24044); sparse plus low-rank, RoSA (Nikdan et al. 2024);
the router's dense gradient, DenseMixer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.bed import Loads, batch_loss
from comparison.dense import Trained, Unit, train
from usaf.errors import UserError
from usaf.importance import active_counts, head_share, head_weights_that_count
from usaf.loss import count_targets
from usaf.optimizer import Adam
from usaf.selection import drop_fraction_at
from usaf.session import Session
from usaf.settings import Settings

EIGHT_BIT_BLOCK = 256  # moments that share a largest value


@dataclass(frozen=True)
class Recipe:
    """The default is USAF's method with PROJECTIONS=all, and the run's settings."""

    base: str = "hqq4"
    sparse: tuple[str, ...] = ("experts",)  # groups of tensors whose best entries train, see `GROUPS`
    whole: tuple[str, ...] = ("router",)  # groups that train whole
    score: str = "gradient"  # random, magnitude, square (mean of squared gradients of sequences)
    scope: str = "tensor"  # the k best of each tensor; "all": of all tensors together
    samples: int | None = None  # None here and below: the setting of the run
    neurons: bool = False  # gate row, up row and down column of a neuron are chosen together
    routed_share: float = 1.0  # only this share of a layer's experts, the most routed
    least_share: float = 0.0  # no expert that gets less than this part of an even share of the tokens
    reselect_every: int | None = None
    reselect_until: float | None = None
    drop_fraction: float | None = None
    drop_by: str = "delta"  # "weight"
    grow_by: str = "gradient"  # square, as in `score`, of the steps of the capture window
    dropped: str = "undone"  # "kept": keeps the value that it came to, so that more weights move than train at once
    capture_steps: int | None = None
    moments: str = "seeded"  # "zero"; "reset": of all weights, as the earlier tool did
    eight_bit: bool = False
    router_rate: float | None = None
    router_optimizer: str = "adam"  # "sgd16": in fp16, as the earlier tool did
    router_gradient: str = "topk"  # "dense"
    router_warmup: int = 0  # first steps that leave the deltas alone
    gumbel: float = 0.0  # routing noise while training
    balance: float = 0.0  # weight of the load-balancing loss
    untie: bool = False  # the head becomes a tensor of its own where it shares the embeddings'
    head_rate: float = 1.0  # the head's rate, of the others'
    norm_rate: float = 1.0  # that of the norms
    beta2: float = 0.999  # Adam's
    low_rank: int = 0  # rank of an adapter on the experts, whose weights come out of the budget

    def filled(self, values: Settings) -> Recipe:
        """With the run's settings where nothing else is said."""
        given: dict[str, Any] = {
            "samples": values.importance_samples, "reselect_every": values.reselect_every,
            "reselect_until": values.reselect_until, "drop_fraction": values.drop_fraction,
            "capture_steps": values.capture_steps, "router_rate": values.router_lr,
        }  # fmt: skip
        return replace(self, **{name: v for name, v in given.items() if getattr(self, name) is None})


GROUPS: dict[str, tuple[str, ...]] = {
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "down": ("mlp.experts.down_proj",),
    "up": ("mlp.experts.gate_up_proj",),
    "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "output": ("o_proj.weight",),
    "router": ("mlp.gate.weight",),
    "norms": ("norm.weight",),
    "embedding": ("embed_tokens.weight", "lm_head.weight"),
    "head": ("lm_head.weight",),
    "input": ("embed_tokens.weight",),
}


def group(model: nn.Module, name: str, first_layer: int) -> dict[str, nn.Parameter]:
    """The parameters of a group, in the trained layers or outside the layers."""
    found = {}
    for full, parameter in model.named_parameters():
        plain = full.replace(".base_layer", "").replace(".parametrizations", "").removesuffix(".original")
        if not plain.endswith(GROUPS[name]) or "lora_" in full:
            continue
        layer = int(plain.split(".layers.")[1].split(".")[0]) if ".layers." in plain else None
        if layer is None or layer >= first_layer:
            found[full] = parameter
    return found


class Lab:
    """One training by a recipe."""

    def __init__(self, model: nn.Module, session: Session, recipe: Recipe, rate: float) -> None:
        self.values = session.settings.values
        self.model, self.session, self.recipe, self.rate = model, session, recipe.filled(self.values), rate
        self.generator = torch.Generator().manual_seed(self.values.seed)
        self.units: list[Unit] = []
        self.sparse: list[Unit] = []
        self.allowed: dict[str, Tensor] = {}  # where only some experts train: parameter name -> bool [E]
        if recipe.untie:
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            head.weight = nn.Parameter(head.weight.detach().clone())
        model.requires_grad_(False)

    def prepare(self) -> None:
        """Choose what trains."""
        recipe, first = self.recipe, self.session.start
        sparse = {n: p for g in recipe.sparse for n, p in group(self.model, g, first).items()}
        whole = {n: p for g in recipe.whole for n, p in group(self.model, g, first).items()}
        active = self.choose(sparse)
        self.sparse = [Unit(name, parameter, active[name]) for name, parameter in sparse.items()]
        self.units = self.sparse + [
            Unit(name, parameter, rate=recipe.router_rate if name.endswith("gate.weight") else None)
            for name, parameter in whole.items()
        ]
        self.units += [Unit(n, p) for n, p in self.adapters().items()]
        for unit in self.units:
            unit.adam = Adam(unit.delta, (0.9, recipe.beta2))
            for of, part in (("head", recipe.head_rate), ("norms", recipe.norm_rate)):
                if unit.name.endswith(GROUPS[of]):
                    unit.rate = self.rate * part
        if recipe.router_optimizer == "sgd16":
            for unit in self.units:
                if unit.name.endswith("gate.weight"):
                    unit.update = partial(sgd16, unit)  # type: ignore[method-assign]

    def adapters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n}

    def budget(self) -> int:
        """Weights that masks may have: FRAC of the experts, whichever tensors it is spent on, less adapters."""
        experts = sum(p.numel() for p in group(self.model, "experts", self.session.start).values())
        left = int(self.values.frac * experts) - sum(p.numel() for p in self.adapters().values())
        if left <= 0:
            raise UserError(
                f"FRAC={self.values.frac:g}: an adapter of rank {self.recipe.low_rank} takes more than that"
            )
        return left

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose(self, tensors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Parameter name -> sorted flat indices."""
        recipe = self.recipe
        if not tensors:
            return {}
        scores = self.scores(tensors)
        if recipe.routed_share < 1 or recipe.least_share > 0:
            self.leave_out_experts(scores)
        numel, budget = {n: p.numel() for n, p in tensors.items()}, self.budget()
        counts = self.counts_of_product(numel)
        if recipe.neurons:
            assert counts is not None
            return best_neurons(scores, counts)
        if recipe.scope == "all":
            flat = torch.cat([s.reshape(-1) for s in scores.values()])
            least = flat.kthvalue(len(flat) - budget + 1).values
            return {n: (s.reshape(-1) >= least).nonzero().squeeze(1) for n, s in scores.items()}
        if counts is None:
            total = sum(numel.values())
            counts = {n: max(1, budget * size // total) for n, size in numel.items()}
        return {n: best(s, counts[n]) for n, s in scores.items()}

    def counts_of_product(self, numel: dict[str, int]) -> dict[str, int] | None:
        """As many weights of each tensor as USAF trains, to the last one; None where it has no such choice of tensors.

        numel: of each tensor that trains sparsely.
        """
        sparse, frac = set(self.recipe.sparse), self.values.frac
        if self.adapters() or sparse - {"head"} not in ({"experts"}, {"down"}):
            return None
        experts = {n: p.numel() for n, p in group(self.model, "experts", self.session.start).items()}
        blocks = sorted({n.rpartition(".")[0] for n in experts})
        layers = [(experts[f"{b}.gate_up_proj"], experts[f"{b}.down_proj"]) for b in blocks]
        head = [n for n in numel if n not in experts]
        which = "down" if "down" in sparse else "all"
        different = self.session.data.train.different_targets()
        counting = [head_weights_that_count(numel[n], self.model.get_parameter(n).shape[1], different) for n in head]
        share = head_share(sum(counting), layers, frac, which) if head else 0.0
        counts = {}
        for block, (up, down) in zip(blocks, layers, strict=True):
            of_up, counts[f"{block}.down_proj"] = active_counts(up, down, frac, which, share)
            if which == "all":
                counts[f"{block}.gate_up_proj"] = of_up
        in_all = sum(sum(active_counts(up, down, frac, which)) for up, down in layers)
        return counts | {n: in_all - sum(counts.values()) for n in head}

    def scores(self, tensors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        recipe = self.recipe
        if recipe.score == "random":
            return {n: torch.rand(p.shape, generator=self.generator) for n, p in tensors.items()}
        if recipe.score == "magnitude":
            return {n: p.detach().abs() for n, p in tensors.items()}
        for parameter in tensors.values():
            parameter.requires_grad_(True)
        total = {n: torch.zeros_like(p) for n, p in tensors.items()}
        for rows in self.sample_rows():
            self.model.zero_grad(set_to_none=True)
            batch = self.session.data.train.batch(rows)
            (batch_loss(self.model, batch) * count_targets(batch)).backward()  # a mean over all samples' targets
            for n, p in tensors.items():
                if p.grad is not None:
                    total[n] += p.grad.square() if recipe.score == "square" else p.grad
        self.model.zero_grad(set_to_none=True)
        for parameter in tensors.values():
            parameter.requires_grad_(False)
        return {n: t.abs() for n, t in total.items()}

    def sample_rows(self) -> Iterable[list[int]]:
        """The first rows of the run's order, a few at a time."""
        order, samples = self.session.order, self.recipe.samples
        assert order is not None
        assert samples is not None
        width = 1 if self.recipe.score == "square" else self.values.microbatch
        rows = [r for i in range(-(-samples // self.values.microbatch)) for r in order.micro_batch(i)]
        rows = rows[:samples]
        return [rows[i : i + width] for i in range(0, len(rows), width)]

    def leave_out_experts(self, scores: dict[str, Tensor]) -> None:
        """Scores of the experts that do not train become -1."""
        of_experts = {n: score for n, score in scores.items() if ".experts." in n}  # a head has no experts to leave out
        blocks = sorted({n.rpartition(".")[0] for n in of_experts})
        with torch.no_grad(), Loads(self.model, blocks) as loads:
            for rows in self.sample_rows():
                batch_loss(self.model, self.session.data.train.batch(rows))
        for name, score in of_experts.items():
            counts = loads.counts[name.rpartition(".")[0]]
            keep = max(1, math.ceil(self.recipe.routed_share * len(counts)))
            allowed = torch.zeros(len(counts), dtype=torch.bool)
            allowed[counts.argsort(descending=True)[:keep]] = True
            allowed &= counts >= self.recipe.least_share * counts.sum() / len(counts)
            score[~allowed] = -1.0
            self.allowed[name] = allowed

    # -- training ------------------------------------------------------------------------------------------------------

    def run(self) -> Trained:
        recipe = self.recipe
        undo: list[Callable[[], None]] = []
        if recipe.gumbel > 0:
            undo += add_gumbel(self.model, recipe.gumbel, self.generator)
        if recipe.router_gradient == "dense":
            undo += add_dense_gradient(self.model)
        trained = train(
            self.model, self.session, self.units, self.rate, self.capture, self.reselect_if_due, self.loss, self.moving
        )  # fmt: skip
        for restore in undo:
            restore()
        return trained

    def moving(self, step: int) -> list[Unit]:
        """The units that this step updates."""
        return [u for u in self.units if u not in self.sparse] if step < self.recipe.router_warmup else self.units

    def loss(self, model: Any, batch: Any) -> Tensor:
        if self.recipe.balance == 0:
            return batch_loss(model, batch)
        out = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False,
            output_router_logits=True,
        )  # fmt: skip
        own = model.config.router_aux_loss_coef  # which transformers has added already
        return out.loss + (self.recipe.balance - own) * out.aux_loss

    def last_reselection(self) -> int:
        steps, until = self.values.steps, self.recipe.reselect_until
        assert until is not None
        return min(math.floor(until * steps + 1e-9), steps - 1)

    def capture(self, step: int, clip: float) -> None:
        """Right after a backward, whose gradient is to be scaled by clip."""
        every, last = self.recipe.reselect_every, self.recipe.capture_steps
        assert every is not None
        assert last is not None
        if every == 0 or not self.recipe.drop_fraction:
            return
        due = (step // every + 1) * every
        if due <= self.last_reselection() and due - step <= last:
            for unit in self.sparse:
                if unit.parameter.grad is not None:
                    unit.window.append(unit.parameter.grad * clip)

    def reselect_if_due(self, step: int) -> None:
        recipe = self.recipe
        if recipe.eight_bit:
            for unit in self.sparse:
                round_moments(unit.adam)
        done = step + 1
        if not recipe.reselect_every or not recipe.drop_fraction or done % recipe.reselect_every:
            return
        if not self.sparse or not self.sparse[0].window:
            return
        fraction = drop_fraction_at(done, self.last_reselection() + 1, recipe.drop_fraction)
        for unit in self.sparse:
            self.reselect(unit, fraction)
            unit.window = []

    def reselect(self, unit: Unit, fraction: float) -> None:
        recipe, active = self.recipe, unit.active
        assert active is not None
        count = int(fraction * len(active))
        if count == 0:
            return
        window = torch.stack([g.reshape(-1) for g in unit.window])
        mean, square = window.mean(0), window.square().mean(0)
        size = (unit.base + unit.delta).abs() if recipe.drop_by == "weight" else unit.delta.abs()
        kept = torch.ones(len(active), dtype=torch.bool)
        kept[torch.sort(size, stable=True).indices[:count]] = False
        candidates = square.clone() if recipe.grow_by == "square" else mean.abs()
        if unit.name in self.allowed:
            candidates.view(len(self.allowed[unit.name]), -1)[~self.allowed[unit.name]] = -1
        candidates[active[kept]] = -2
        grown = best(candidates, count)
        merged, order = torch.sort(torch.cat([active[kept], grown]))
        from_old = torch.cat([kept.nonzero().squeeze(1), torch.full((count,), -1)])[order]
        values = torch.where(from_old >= 0, unit.delta[from_old.clamp(min=0)], torch.zeros(len(merged)))
        unit.set_active(merged, values, undo=recipe.dropped == "undone")
        new = merged[from_old < 0]
        seen = len(unit.window) if recipe.moments == "seeded" else 0
        unit.adam.regrow(from_old, mean[new], square[new], seen)
        if recipe.moments == "reset":
            unit.adam = Adam(unit.delta, (0.9, recipe.beta2))


def best(scores: Tensor, k: int) -> Tensor:
    """Sorted flat indices of the k largest."""
    return torch.sort(torch.topk(scores.reshape(-1), k).indices).values


def best_neurons(scores: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    """Parameter name -> sorted flat indices: of every layer the neurons with the largest summed score, whole (gate row,
    up row, down column), as many as fit into the layer's counts; of a head its own best."""
    chosen = {n: best(score, counts[n]) for n, score in scores.items() if ".experts." not in n}
    for name in [n for n in scores if n.endswith("gate_up_proj")]:
        down = name.replace("gate_up_proj", "down_proj")
        up_score, down_score = scores[name], scores[down]
        _, double, hidden = up_score.shape
        inner = double // 2
        by_neuron = up_score[:, :inner].sum(2) + up_score[:, inner:].sum(2) + down_score.sum(1)
        neurons = best(by_neuron, max(1, (counts[name] + counts[down]) // (3 * hidden)))
        mask_up, mask_down = torch.zeros_like(up_score), torch.zeros_like(down_score)
        e, j = neurons // inner, neurons % inner
        mask_up[e, j] = mask_up[e, j + inner] = 1
        mask_down[e, :, j] = 1
        chosen[name] = mask_up.view(-1).nonzero().squeeze(1)
        chosen[down] = mask_down.view(-1).nonzero().squeeze(1)
    return chosen


def sgd16(unit: Unit, gradient: Tensor, rate: float) -> None:
    """Plain descent on weights held in fp16."""
    unit.delta.copy_((unit.delta.half() - (rate * gradient).half()).float())


@torch.no_grad()
def round_moments(adam: Adam) -> None:
    """Both moments to 8 bits and back: a sign where there is one, and the logarithm of the part of the block's largest
    value, over a range that leaves 4% to 6% between neighbours."""
    for state, levels, octaves in ((adam.exp_avg, 126, 10), (adam.exp_avg_sq, 254, 20)):
        flat = state.view(-1)
        padded = F.pad(flat, (0, -len(flat) % EIGHT_BIT_BLOCK)).view(-1, EIGHT_BIT_BLOCK)
        largest = padded.abs().amax(1, keepdim=True).clamp(min=1e-30)
        code = ((padded.abs() / largest).clamp(min=1e-30).log2() * (levels / octaves)).round()
        rounded = torch.exp2(code * (octaves / levels)) * largest * padded.sign()
        flat.copy_(torch.where(code >= -levels, rounded, torch.zeros_like(rounded)).view(-1)[: len(flat)])


def routers(model: nn.Module) -> Sequence[nn.Module]:
    return [m for n, m in model.named_modules() if n.endswith("mlp.gate")]


def add_gumbel(model: nn.Module, scale: float, generator: torch.Generator) -> list[Callable[[], None]]:
    """Routers choose by noisy logits while training, and weigh by them."""

    def noisy(gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        probabilities = F.softmax(logits + scale * noise, dtype=torch.float, dim=-1)
        value, index = torch.topk(probabilities, gate.top_k, dim=-1)
        if gate.norm_topk_prob:
            value = value / value.sum(-1, keepdim=True)
        return logits, value.to(logits.dtype), index

    return [replace_forward(gate, partial(noisy, gate)) for gate in routers(model)]


def add_dense_gradient(model: nn.Module) -> list[Callable[[], None]]:
    """The router's gradient as if every expert had been used, straight through; the forward is unchanged."""

    def forward(block: Any, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        x = hidden.reshape(-1, shape[-1])
        logits, weights, index = block.gate(x)
        out = block.experts(x, index, weights)
        probabilities = F.softmax(logits, dtype=torch.float, dim=-1)
        if block.gate.norm_topk_prob:
            probabilities = probabilities / probabilities.gather(1, index).sum(1, keepdim=True).detach()
        unused = probabilities.scatter(1, index, 0.0)
        with torch.no_grad():
            experts = block.experts
            h = torch.einsum("th,eoh->teo", x, experts.gate_up_proj)
            gate, up = h.chunk(2, dim=-1)
            each = torch.einsum("tei,ehi->teh", experts.act_fn(gate) * up, experts.down_proj)
        through = torch.einsum("te,teh->th", unused, each)
        return (out + through - through.detach()).reshape(shape)

    blocks = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    return [replace_forward(block, partial(forward, block)) for block in blocks]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    module.forward = forward

    def restore() -> None:
        del module.__dict__["forward"]

    return restore
