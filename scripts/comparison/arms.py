"""The arms of a comparison, and one run of one of them, from the model to a dictionary of figures.

    none, full, attention-only and expert LoRA, QLoRA, DoRA      transformers and PEFT (`dense`)
    usaf*                                                        the product itself, by its settings
    random, earlier, and every ablation that is no setting       masked dense weights (`lab`)

Ranks follow the budget: adapters get what USAF trains, its routers included, down to less than one rank of one layer.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comparison.bed import Bed, Loads, dense_model, evaluate_dense, routing_figures, tokens_of
from usaf.errors import RunError, one_line

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """family: who trains it. guess: the learning rate in whose neighbourhood the sweep begins."""

    family: str
    guess: float
    about: str
    options: dict[str, Any] = field(default_factory=dict)


def usaf(about: str, guess: float = 5e-3, **settings: Any) -> Arm:
    return Arm("usaf", guess, about, {name: str(value) for name, value in settings.items()})


def lab(about: str, guess: float = 5e-3, **recipe: Any) -> Arm:
    return Arm("lab", guess, about, recipe)


def peft(about: str, guess: float, **options: Any) -> Arm:
    return Arm("peft", guess, about, options)


ARMS: dict[str, Arm] = {
    "none": Arm("none", 0.0, "no training"),
    "full": Arm("full", 1e-3, "full fine-tuning of the trained layers, fp32 base; everything where all layers train"),
    "lora-experts": peft("LoRA on the experts", 5e-3, targets=("experts",)),
    "lora-experts-attention": peft("LoRA on experts and attention", 5e-3, targets=("experts", "attention")),
    "lora-all": peft("LoRA on experts, attention and the head", 5e-3, targets=("experts", "attention", "head")),
    "lora-all-head-half": peft("the same, the head at half the rate", 5e-3, targets=("experts", "attention", "head"),
                               head_rate=0.5),
    "lora-attention": peft("LoRA on attention alone", 5e-3, targets=("attention",)),
    "lora-bytes": peft("LoRA on the experts, rank by USAF's bytes on disk", 5e-3, targets=("experts",), budget="bytes"),
    "qlora": peft("LoRA on experts and attention, on the 4-bit base, saved in bf16", 5e-3,
                  targets=("experts", "attention"), base="hqq4", bf16=True),
    "dora": peft("DoRA on attention (PEFT has none on fused experts)", 5e-3, targets=("attention",), dora=True),
    "usaf": usaf("the product, its rate swept as the others' are"),
    "usaf-default": usaf("the product as it is, with no choice made", guess=0.0, ROUTER_LR="5e-5"),
    "usaf-experts": usaf("experts and routers alone", TRAIN_HEAD=0, TRAIN_NORMS=0),
    "usaf-static": usaf("never reselected", RESELECT_EVERY=0),
    "usaf-frozen-router": usaf("routers frozen", ROUTER_LR=0),
    "random": lab("random weights, never reselected", score="random", reselect_every=0),
    "router": lab("routers alone, at the arm's rate", 1e-3, sparse=(), router_only=True),
    "earlier": lab("the earlier tool's recipe", 1e-3, base="minmax4", samples=1, drop_by="weight", moments="reset",
                   capture_steps=1, reselect_until=1.0, router_optimizer="sgd16"),
}  # fmt: skip
"""Those of the main table; `ABLATIONS` has the others."""

FULL_HEAD: dict[str, Any] = {"HEAD_LR": "LR_PEAK"}
HALF_HEAD: dict[str, Any] = {"HEAD_LR": "LR_PEAK/2"}
HEAD_RATES = {"LR_PEAK": 1.0, "LR_PEAK/2": 0.5}
"""HEAD_LR of an arm that goes with its rate -> its part of that."""
NOW: dict[str, Any] = {"sparse": ("down", "head"), "untie": True, "whole": ("router", "norms")}
EXPERTS_ALONE = {"TRAIN_HEAD": 0, "TRAIN_NORMS": 0}

ABLATIONS: dict[str, Arm] = {
    "now": lab("the product's defaults but HEAD_LR=LR_PEAK, on dense weights, the baseline of the others", **NOW),
    "now-samples-2": lab("importance from 2 sequences", samples=2, **NOW),
    "now-samples-16": lab("importance from 16 sequences", samples=16, **NOW),
    "now-samples-256": lab("importance from 256 sequences", samples=256, **NOW),
    "now-square": lab("importance by mean squared gradients", score="square", **NOW),
    "now-magnitude": lab("importance by |weight|", score="magnitude", **NOW),
    "now-global": lab("one budget for all tensors", scope="all", **NOW),
    "now-routed": lab("only the most routed quarter of experts", routed_share=0.25, **NOW),
    "now-least-share": lab("no expert under half of its even share of tokens", least_share=0.5, **NOW),
    "now-zero-moments": lab("grown weights start with zero moments", moments="zero", **NOW),
    "now-reset": lab("all moments forgotten at a reselection", moments="reset", **NOW),
    "now-drop-weight": lab("the smallest |weight| is dropped", drop_by="weight", **NOW),
    "now-capture-1": lab("candidates from 1 step", capture_steps=1, **NOW),
    "now-capture-16": lab("candidates from 16 steps", capture_steps=16, **NOW),
    "now-router-dense": lab("dense router gradient", router_gradient="dense", **NOW),
    "now-router-warmup": lab("routers alone for 20 steps", router_warmup=20, **NOW),
    "now-gumbel": lab("Gumbel noise of 0.3 on the routing", gumbel=0.3, **NOW),
    "now-balance": lab("load-balancing loss of 1e-3", balance=1e-3, **NOW),
    "now-low-rank": lab("LoRA of rank 1 on the experts, the rest of the budget sparse", low_rank=1, **NOW),
    "now-8bit": lab("moments in 8 bits", eight_bit=True, **NOW),
    "now-original": lab("on the unquantised base", base="original", **NOW),
    "now-attention": lab("and attention", **{**NOW, "sparse": ("down", "attention", "head")}),
    "now-up": lab("and gate and up projections", **{**NOW, "sparse": ("experts", "head")}),
    "now-every-10": lab("reselected every 10 steps", reselect_every=10, **NOW),
    "now-embedding": lab("and the embeddings", **{**NOW, "sparse": ("down", "head", "input")}),
    "now-router-1e-3": lab("routers at 1e-3", router_rate=1e-3, **NOW),
    "now-router-5e-3": lab("routers at 5e-3", router_rate=5e-3, **NOW),
    "now-head-half": lab("the head at half the rate", head_rate=0.5, **NOW),
    "now-head-quarter": lab("the head at a quarter of the rate", head_rate=0.25, **NOW),
    "now-head-eighth": lab("the head at an eighth of the rate", head_rate=0.125, **NOW),
    "now-norms-half": lab("the norms at half the rate", norm_rate=0.5, **NOW),
    "now-head-half-norms-half": lab("head and norms at half the rate", head_rate=0.5, norm_rate=0.5, **NOW),
    "now-head-double": lab("the head at twice the rate", head_rate=2.0, **NOW),
    "now-beta2-0.95": lab("Adam's second moment over 20 steps", beta2=0.95, **NOW),
    "now-low-rank-10": lab("LoRA of rank 1 on the experts beside fewer weights, reselected every 10 steps", low_rank=1,
                           reselect_every=10, **NOW),
    "now-attention-10": lab("and attention, reselected every 10 steps", reselect_every=10,
                            **{**NOW, "sparse": ("down", "attention", "head")}),
    "now-attention-low-rank-10": lab("and attention, LoRA of rank 1 on the experts, reselected every 10 steps",
                                     low_rank=1, reselect_every=10,
                                     **{**NOW, "sparse": ("down", "attention", "head")}),
    "usaf-experts-all": usaf("gate and up projections train too", PROJECTIONS="all", **EXPERTS_ALONE),
    "usaf-experts-static": usaf("never reselected", RESELECT_EVERY=0, **EXPERTS_ALONE),
    "usaf-experts-frozen-router": usaf("routers frozen", ROUTER_LR=0, **EXPERTS_ALONE),
    "usaf-experts-default": usaf("at the default rates", guess=0.0, ROUTER_LR="5e-5", **EXPERTS_ALONE),
    "usaf-experts-default-10": usaf("at the default rates, reselected every 10 steps", guess=0.0, ROUTER_LR="5e-5",
                                    RESELECT_EVERY=10, **EXPERTS_ALONE),
    "usaf-experts-drop-50": usaf("50% dropped at first", DROP_FRACTION=0.5, **EXPERTS_ALONE),
    "lab": lab("the method with PROJECTIONS=all on dense weights, the baseline of the others"),
    "lab-original": lab("on the unquantised base", base="original"),
    "lab-group-64": lab("on a base with a scale for every 64 weights", base="hqq4-64"),
    "lab-8-bit-base": lab("on a base of 8 bits", base="hqq8-128"),
    # which weights
    "lab-samples-2": lab("importance from 2 sequences", samples=2),
    "lab-samples-16": lab("importance from 16 sequences", samples=16),
    "lab-samples-256": lab("importance from 256 sequences", samples=256),
    "lab-square": lab("importance by mean squared gradients", score="square"),
    "lab-magnitude": lab("importance by |weight|", score="magnitude"),
    "lab-global": lab("one budget for all tensors", scope="all"),
    "lab-routed": lab("only the most routed quarter of experts", routed_share=0.25),
    "lab-least-share": lab("no expert under half of its even share of tokens", least_share=0.5),
    "lab-neurons": lab("whole neurons: gate row, up row, down column", neurons=True, reselect_every=0),
    "lab-down": lab("down projections alone", sparse=("down",)),
    "lab-up": lab("gate and up projections alone", sparse=("up",)),
    # reselection
    "lab-static": lab("never reselected", reselect_every=0),
    "lab-zero-moments": lab("grown weights start with zero moments", moments="zero"),
    "lab-reset": lab("all moments forgotten at a reselection", moments="reset"),
    "lab-drop-weight": lab("the smallest |weight| is dropped", drop_by="weight"),
    "lab-drop-10": lab("10% dropped at first", drop_fraction=0.1),
    "lab-drop-50": lab("50% dropped at first", drop_fraction=0.5),
    "lab-every-10": lab("reselected every 10 steps", reselect_every=10),
    "lab-every-25": lab("reselected every 25 steps", reselect_every=25),
    "lab-until-85": lab("reselected in the first 85% of the steps", reselect_until=0.85),
    "lab-capture-1": lab("candidates from 1 step", capture_steps=1),
    "lab-capture-16": lab("candidates from 16 steps", capture_steps=16),
    # routers
    "lab-router-0": lab("routers frozen", whole=()),
    "lab-router-1e-3": lab("routers at 1e-3", router_rate=1e-3),
    "lab-router-3e-3": lab("routers at 3e-3", router_rate=3e-3),
    "lab-router-dense": lab("dense router gradient", router_gradient="dense"),
    "lab-router-dense-1e-3": lab("dense router gradient at 1e-3", router_gradient="dense", router_rate=1e-3),
    "lab-router-warmup": lab("routers alone for 20 steps", router_warmup=20),
    "lab-gumbel": lab("Gumbel noise of 0.3 on the routing", gumbel=0.3),
    "lab-balance": lab("load-balancing loss of 1e-3", balance=1e-3),
    # what else trains
    "lab-low-rank": lab("LoRA of rank 1 on the experts, the rest of the budget sparse", low_rank=1),
    "lab-attention": lab("the budget spent on experts and attention", sparse=("experts", "attention")),
    "lab-attention-global": lab("one budget for experts and attention", sparse=("experts", "attention"), scope="all"),
    "lab-embedding": lab("the budget spent on embeddings alone", sparse=("embedding",)),
    "lab-norms": lab("and every norm", whole=("router", "norms")),
    "lab-all-global": lab("one budget for experts, attention, embeddings", sparse=("experts", "attention", "embedding"),
                          scope="all"),
    "lab-head": lab("one budget for experts and an untied head", sparse=("experts", "head"), scope="all", untie=True),
    # together
    "lab-global-10": lab("one budget for all tensors, reselected every 10 steps", scope="all", reselect_every=10),
    "lab-global-20": lab("one budget for all tensors, reselected every 20 steps", scope="all", reselect_every=20),
    "lab-global-10-norms": lab("the same every 10 steps, and every norm", scope="all", reselect_every=10,
                               whole=("router", "norms")),
    "lab-global-10-attention": lab("one budget for experts and attention, every 10 steps", scope="all",
                                   reselect_every=10, sparse=("experts", "attention")),
    "lab-global-10-all": lab("one budget for experts, attention and head, every 10 steps, and every norm", scope="all",
                             reselect_every=10, sparse=("experts", "attention", "head"), whole=("router", "norms"),
                             untie=True),
    "lab-down-10": lab("down projections alone, every 10 steps", sparse=("down",), reselect_every=10),
    "lab-down-global-10": lab("one budget for down projections, every 10 steps", sparse=("down",), scope="all",
                              reselect_every=10),
    "lab-down-attention-10": lab("one budget for down projections and attention, every 10 steps",
                                 sparse=("down", "attention"), scope="all", reselect_every=10),
    "lab-down-10-norms": lab("down projections alone, every 10 steps, and every norm", sparse=("down",),
                             reselect_every=10, whole=("router", "norms")),
    "lab-down-head": lab("down projections and an untied head", sparse=("down", "head"), untie=True),
    "lab-down-head-global": lab("one budget for down projections and an untied head", sparse=("down", "head"),
                                scope="all", untie=True),
    "lab-down-head-norms": lab("down projections, an untied head, and every norm", sparse=("down", "head"),
                               untie=True, whole=("router", "norms")),
    "lab-down-output-head-norms": lab("down and output projections, an untied head, and every norm",
                                      sparse=("down", "output", "head"), untie=True, whole=("router", "norms")),
    "lab-down-attention-head-norms": lab("down projections, attention, an untied head, and every norm",
                                         sparse=("down", "attention", "head"), untie=True, whole=("router", "norms")),
    "lab-down-norms": lab("down projections, and every norm", sparse=("down",), whole=("router", "norms")),
    "lab-down-output": lab("down and output projections", sparse=("down", "output")),
    "lab-8bit": lab("moments in 8 bits", eight_bit=True),
    # settings
    "usaf-head-1": usaf("the head at the full rate", **FULL_HEAD),
    "usaf-head-1-default": usaf("at the default rates", guess=0.0, ROUTER_LR="5e-5", LR_PEAK="0.0104",
                                HEAD_LR="0.0104"),
    "usaf-head-1-static": usaf("never reselected", RESELECT_EVERY=0, **FULL_HEAD),
    "usaf-head-1-frozen-router": usaf("routers frozen", ROUTER_LR=0, **FULL_HEAD),
    "usaf-head-1-every-10": usaf("reselected every 10 steps", RESELECT_EVERY=10, **FULL_HEAD),
    "usaf-head-1-drop-50": usaf("50% dropped at first", DROP_FRACTION=0.5, **FULL_HEAD),
    "usaf-head-1-floor-0": usaf("cosine to 0", LR_FLOOR=0, **FULL_HEAD),
    "usaf-head-1-clip-100": usaf("gradients not clipped", GRAD_CLIP=100, **FULL_HEAD),
    "usaf-head-half": usaf("the head at half the rate", **HALF_HEAD),
    # kept for runs of before rates were measured, or `Rows.different_targets` was; run anew they are usaf-default
    "usaf-by-width-default": usaf("at rates by width and FRAC: the default of before", guess=0.0, ROUTER_LR="5e-5"),
    "usaf-head-half-default": usaf("the same, the head at half the rate", guess=0.0, ROUTER_LR="5e-5"),
    "usaf-head-by-size-default": usaf("the same, the head's share of FRAC by its size", guess=0.0, ROUTER_LR="5e-5"),
    "usaf-every-10": usaf("reselected every 10 steps", RESELECT_EVERY=10),
    "usaf-default-10": usaf("as usaf-default, reselected every 10 steps", guess=0.0, ROUTER_LR="5e-5",
                            RESELECT_EVERY=10),
    "usaf-every-20": usaf("reselected every 20 steps", RESELECT_EVERY=20),
    "usaf-drop-10": usaf("10% dropped at first", DROP_FRACTION=0.1),
    "usaf-drop-50": usaf("50% dropped at first", DROP_FRACTION=0.5),
    "usaf-until-85": usaf("reselected in the first 85% of the steps", RESELECT_UNTIL=0.85),
    "usaf-samples-256": usaf("importance from 256 sequences", IMPORTANCE_SAMPLES=256),
    "usaf-frozen-head": usaf("the head frozen", TRAIN_HEAD=0),
    "usaf-frozen-norms": usaf("norms frozen", TRAIN_NORMS=0),
    "usaf-router-1e-3": usaf("routers at 1e-3", ROUTER_LR=1e-3),
    "usaf-router-3e-3": usaf("routers at 3e-3", ROUTER_LR=3e-3),
    "usaf-floor-0": usaf("cosine to 0", LR_FLOOR=0),
    "usaf-warmup-0.2": usaf("warm-up of a fifth", WARMUP=0.2),
    "usaf-clip-0.3": usaf("gradients clipped at 0.3", GRAD_CLIP=0.3),
    "usaf-clip-100": usaf("gradients not clipped", GRAD_CLIP=100),
    "usaf-decay": usaf("weight decay of 0.1", WEIGHT_DECAY=0.1),
}  # fmt: skip
"""Each differs in one thing from the arm whose name begins its own."""

EVERY = {**ARMS, **ABLATIONS}


def run_arm(bed: Bed, name: str, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    """One run. further: settings of USAF that every arm shares."""
    began = time.perf_counter()
    arm = EVERY[name]
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "none": run_none, "full": run_full, "peft": run_peft, "usaf": run_usaf, "lab": run_lab,
    }  # fmt: skip
    figures = {"note": arm.about, **work[arm.family](bed, arm, rate, seed, further)}
    return {
        "arm": name, "family": arm.family, "options": bed.describe(further), "rate": rate, "seed": seed, **figures,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


class TrainingPeak:
    """Private memory of the block at its fullest, with the model that was there before it and without what the process
    held before that model."""

    def __init__(self, before: int) -> None:
        self.before = before

    def __enter__(self) -> TrainingPeak:
        from usaf.memory import PeakMemory, return_freed

        return_freed()
        self.memory = PeakMemory()
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.stop()
        self.bytes = self.memory.private - self.before


def held() -> int:
    from usaf.memory import private_bytes

    return private_bytes()


def expert_names(session: Any) -> list[str]:
    return list(session.checkpoint.expert_parameters())


def trained_blocks(session: Any) -> list[str]:
    """Experts modules of the trained layers."""
    return [n for n in expert_names(session) if int(n.split(".layers.")[1].split(".")[0]) >= session.start]


def budget_of(bed: Bed, session: Any) -> int:
    """Weights that USAF trains: FRAC of every expert tensor of the trained layers, and their routers and norms."""
    config = session.checkpoint.config.get_text_config()
    shapes = expert_shapes(session)
    blocks = trained_blocks(session)
    routers = len(blocks) * shapes[blocks[0]][0][0] * config.hidden_size
    norms = [n for n, w in session.checkpoint.plan.shapes.items() if len(w) == 1 and n.endswith("norm.weight")
             and (".layers." not in n or int(n.split(".layers.")[1].split(".")[0]) >= session.start)]  # fmt: skip
    whole = routers + sum(session.checkpoint.plan.shapes[n].numel() for n in norms)
    return whole + sum(max(1, int(math.prod(s) * bed.frac)) for n in blocks for s in shapes[n])


def expert_shapes(session: Any) -> dict[str, list[tuple[int, int, int]]]:
    """Experts module -> the shapes of its two tensors."""
    from usaf.expert_store import shapes_of

    shapes = shapes_of(session.checkpoint)
    return {name: [shapes[t] for t in targets] for name, targets in session.checkpoint.expert_parameters().items()}


# ---- dense arms -----------------------------------------------------------------------------------------------------


def seeded_session(bed: Bed, seed: int, further: dict[str, str]) -> Any:
    import torch

    session = bed.session(seed, further)
    torch.manual_seed(seed)
    return session


def judged(bed: Bed, session: Any, model: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """(NLL by set, tokens of each expert) of a dense model."""
    with Loads(model, trained_blocks(session)) as loads:
        nll = evaluate_dense(model, bed.rows(session))
    return nll, loads.counts


def run_none(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    """What every base gives before any training."""
    session = seeded_session(bed, seed, further)
    bases = {base: evaluate_dense(dense_model(bed, session, base), bed.rows(session))
             for base in ("original", "hqq4", "minmax4")}  # fmt: skip
    return {
        "trainable_parameters": 0, "artifact_bytes": 0, "nll": bases["original"],
        "start": bases["original"], "bases": bases, "tokens": tokens_of(bed.rows(session)),
    }  # fmt: skip


def dense_figures(bed: Bed, session: Any, model: Any, before: int, train: Callable[[], Any]) -> dict[str, Any]:
    """Train between two evaluations. before: private bytes without the model."""
    start, loads = judged(bed, session, model)
    with TrainingPeak(before) as peak:
        trained = train()
    nll, after = judged(bed, session, model)
    return {
        "start": start, "nll": nll, "routing": routing_figures(loads, after), "losses": trained.losses,
        "step_seconds": trained.step_seconds, "diverged": trained.diverged, "peak_private_bytes": peak.bytes,
        "tokens": tokens_of(bed.rows(session)),
    }  # fmt: skip


def run_full(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    from comparison.dense import Unit, train

    assert rate is not None
    session, before = seeded_session(bed, seed, further), held()
    model = dense_model(bed, session, "original")
    model.requires_grad_(False)
    chosen = {
        n: p for n, p in model.named_parameters()
        if bed.train_from == 0 or (".layers." in n and int(n.split(".layers.")[1].split(".")[0]) >= bed.train_from)
    }  # fmt: skip
    units = [Unit(n, p) for n, p in chosen.items()]
    figures = dense_figures(bed, session, model, before, lambda: train(model, session, units, rate))
    original = dict(dense_model(bed, session, "original").named_parameters())
    size = sum(p.numel() for p in chosen.values())
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file, save_file

        path = Path(folder) / "full.safetensors"
        save_file({n: p.detach().contiguous() for n, p in chosen.items()}, path)
        fresh = dense_model(bed, session, "original")
        fresh.load_state_dict(load_file(path), strict=False)
        figures["reloaded"] = evaluate_dense(fresh, bed.rows(session))
        bytes_ = path.stat().st_size
    moved = experts_moved({n: (p - original[n]).detach() for n, p in chosen.items() if p.dim() == 3})
    return {**figures, **moved, "trainable_parameters": size, "artifact_bytes": bytes_}


def experts_moved(changes: dict[str, Any]) -> dict[str, int]:
    """Experts with a changed weight. changes: fused tensor [E, out, in] -> its change."""
    touched: dict[str, Any] = {}
    for name, change in changes.items():
        block = name.rpartition(".")[0]
        here = change.reshape(len(change), -1).ne(0).any(1)
        touched[block] = here | touched[block] if block in touched else here
    return {
        "experts": sum(len(t) for t in touched.values()),
        "experts_moved": int(sum(t.sum() for t in touched.values())),
    }


def adapter_config(bed: Bed, session: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """(PEFT's configuration for an arm, its ranks in words).

    All layers get the same rank, as far as the budget goes, and the upper ones one more, until less than that is left.
    Where not even rank 1 on the last layer fits, it is that all the same, for an adapter cannot be smaller.
    """
    from peft import LoraConfig

    targets = adapter_targets(session, options["targets"])
    budget = budget_of(bed, session)
    if options.get("budget") == "bytes":  # 8 bytes a weight of ours, 4 of an adapter's
        budget *= 2
    rank = options.get("rank") or budget // sum(per_rank for per_rank, _, _ in targets)
    left = 0 if "rank" in options else budget - rank * sum(per_rank for per_rank, _, _ in targets)
    more = []  # of the layers, from the top
    for per_rank, modules, parameters in reversed(targets):
        if per_rank > left:
            break
        left -= per_rank
        more.append([*modules, *parameters])
    used = targets if rank else targets[-max(1, len(more)) :]
    pattern = {name: rank + 1 for names in more for name in names} if rank else {}
    shared: dict[str, Any] = {
        "r": max(1, rank), "lora_alpha": 2 * max(1, rank), "lora_dropout": 0.0, "task_type": "CAUSAL_LM",
        "target_modules": [m for _, modules, _ in used for m in modules], "rank_pattern": pattern,
        "alpha_pattern": {name: 2 * r for name, r in pattern.items()}, "use_dora": options.get("dora", False),
    }  # fmt: skip
    parameters = [p for _, _, names in used for p in names]
    if parameters:
        shared["target_parameters"] = parameters
    words = f"rank {max(1, rank)} on {len(used)} layers" + (f", one more on {len(more)}" if pattern else "")
    words += "" if rank or more else ", above the budget"
    return LoraConfig(**shared), words


def adapter_targets(session: Any, groups: tuple[str, ...]) -> list[tuple[int, list[str], list[str]]]:
    """Of every trained layer, and of the head as one more: (weights of an adapter of rank 1, linear modules, expert
    parameters)."""
    config, shapes = session.checkpoint.config.get_text_config(), expert_shapes(session)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    found = []
    for block in trained_blocks(session):
        per_rank, modules, parameters = 0, [], []
        if "experts" in groups:
            parameters = [f"{block}.{p}" for p in EXPERTS]
            per_rank += sum(e * (o + i) for e, o, i in shapes[block])
        if "attention" in groups:
            modules = [f"{block.rpartition('.mlp')[0]}.self_attn.{p}" for p in ATTENTION]
            per_rank += 2 * (config.hidden_size + wide) + 2 * (config.hidden_size + narrow)
        found.append((per_rank, modules, parameters))
    if "head" in groups:
        found.append((config.hidden_size + config.vocab_size, ["lm_head"], []))
    return found


def run_peft(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    import torch
    from peft import PeftModel, get_peft_model

    from comparison.dense import Unit, train

    assert rate is not None
    session, before = seeded_session(bed, seed, further), held()
    base, in_16_bits = arm.options.get("base", "original"), arm.options.get("bf16", False)
    config, ranks = adapter_config(bed, session, arm.options)
    model: Any = get_peft_model(dense_model(bed, session, base), config)
    head_rate = arm.options.get("head_rate", 1.0) * rate
    units = [Unit(n, p, rate=head_rate if "lm_head" in n else None) for n, p in model.named_parameters()
             if p.requires_grad]  # fmt: skip

    def work() -> Any:
        trained = train(model, session, units, rate)
        for unit in units if in_16_bits else ():  # what is judged is what is saved
            unit.parameter.data.copy_(unit.parameter.data.to(torch.bfloat16))
        return trained

    figures = dense_figures(bed, session, model, before, work)
    with tempfile.TemporaryDirectory() as folder:
        for unit in units if in_16_bits else ():
            unit.parameter.data = unit.parameter.data.to(torch.bfloat16)
        model.save_pretrained(folder, save_embedding_layers=False)  # a tied head has the base's
        fresh = PeftModel.from_pretrained(dense_model(bed, session, base), folder)
        figures["reloaded"] = evaluate_dense(fresh, bed.rows(session))
        size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    shapes = expert_shapes(session)
    experts = {n: shapes[n][0][0] for n in trained_blocks(session)}
    return {
        **figures, "trainable_parameters": sum(u.numel for u in units), "artifact_bytes": size,
        "experts": sum(experts.values()), "experts_moved": moved_by_adapter(units, experts),
        "note": f"{arm.about}; {ranks}",
    }  # fmt: skip


def moved_by_adapter(units: list[Any], experts_of: dict[str, int]) -> int:
    """Experts whose part of an adapter is not zero any more; B begins at zero.

    units: the trained tensors; experts_of: experts module -> its experts. PEFT keeps one B [out, rank * E] a fused
    tensor, the columns of an expert E apart.
    """
    touched: dict[str, Any] = {}
    for unit in units:
        block = next((b for b in experts_of if b in unit.name), None)
        if block is not None and "lora_B" in unit.name:
            b = unit.parameter.detach()
            here = b.reshape(len(b), -1, experts_of[block]).ne(0).any(0).any(0)
            touched[block] = here | touched[block] if block in touched else here
    return int(sum(t.sum() for t in touched.values()))


# ---- the product ----------------------------------------------------------------------------------------------------


def run_usaf(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    """A run of the product's own parts, as `job` puts them together."""
    from usaf.delta import load_delta, save_delta
    from usaf.session import apply_delta, load

    settings = {**further, **arm.options, **({} if rate is None else {"LR_PEAK": repr(rate)})}
    if settings.get("HEAD_LR") in HEAD_RATES:
        settings["HEAD_LR"] = repr(HEAD_RATES[settings["HEAD_LR"]] * float(settings["LR_PEAK"]))
    with tempfile.TemporaryDirectory() as folder:
        settings["PREFIX_CACHE_DIR"] = folder  # runs beside this one have their own
        session, before = seeded_session(bed, seed, settings), held()
        load(session)
        start, loads = judged_by_product(bed, session)
        try:
            with TrainingPeak(before) as peak:
                trainer, figures = train_product(session)
        except RunError as error:  # diverged
            return {"start": start, "nll": dict.fromkeys(start, math.nan), "diverged": True, "note": one_line(error)}
        nll, after = judged_by_product(bed, session)
        delta, path = trainer.delta({}), Path(folder) / "delta.safetensors"
        size = save_delta(path, delta)
        fresh = seeded_session(bed, seed, settings)
        load(fresh)
        apply_delta(fresh, load_delta(path), path)
        reloaded, _ = judged_by_product(bed, fresh)
    values = trainer.settings
    head = "" if values.head_lr is None else f", HEAD_LR {values.head_lr:g}"
    return {
        **figures, "note": f"{arm.about}; LR_PEAK {values.lr_peak:g}{head}",
        "start": start, "nll": nll, "reloaded": reloaded, "routing": routing_figures(loads, after),
        "artifact_bytes": size, "peak_private_bytes": peak.bytes, "tokens": tokens_of(bed.rows(session)),
    }  # fmt: skip


def train_product(session: Any) -> tuple[Any, dict[str, Any]]:
    """(the trainer at its end, figures)."""
    from usaf.delta import experts_moved as moved_by_delta
    from usaf.importance import find_important
    from usaf.learning_rate import measure_learning_rates
    from usaf.session import fill_all
    from usaf.trainer import Trainer

    values, order, rows = session.settings.values, session.order, session.data.train
    states = session.boundary(rows, order.chunks)
    fill_all([states])
    trainer = Trainer(session.model, states, rows, order, values, values.steps)
    samples = order.first_rows(min(values.importance_samples, len(rows)))
    began = time.perf_counter()
    found = find_important(
        session.model, states, rows, samples, values.frac, session.chunk_rows(rows), values.head_chunk_tokens,
        lambda _: None, projections=values.projections,
    )  # fmt: skip
    importance_seconds = time.perf_counter() - began
    trainer.activate(found.active)
    rates, _ = measure_learning_rates(values, session.model, states, rows, order, found, lambda _: None)
    session.settings = session.settings.replace("measured", **rates)
    trainer.settings = session.settings.values
    losses: list[float] = []
    seconds: list[float] = []
    turnover: list[float] = []

    def after_step(result: Any, reselection: Any) -> bool:
        losses.append(result.loss)
        seconds.append(result.seconds)
        turnover.extend([] if reselection is None else [reselection.turnover])
        return True

    trainer.run(after_step)
    sizes = {n: b.part_size for moe in trainer.trained for n, b in zip(moe.names, moe.banks, strict=True)}
    moved = moved_by_delta(trainer.delta({}), sizes)
    whole = sum(w.numel() for w in trainer.whole().values())
    return trainer, {
        "losses": losses, "step_seconds": sorted(seconds)[len(seconds) // 2],
        "diverged": not math.isfinite(losses[-1]), "trainable_parameters": trainer.active_parameters() + whole,
        "half_overlap": found.half_overlap, "importance_seconds": importance_seconds, "turnover": turnover,
        "experts": sum(moe.banks[0].num_experts for moe in trainer.trained), "experts_moved": sum(moved.values()),
    }  # fmt: skip


def judged_by_product(bed: Bed, session: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """As `judged`, by USAF's own evaluation; loads are those of the trained layers."""
    from usaf.evaluation import evaluate
    from usaf.prefix import chunked
    from usaf.session import fill_all

    nll = {}
    head = session.settings.values.head_chunk_tokens
    with Loads(session.model.model, trained_blocks(session)) as loads:
        for name, rows in bed.rows(session).items():
            states = session.boundary(rows, chunked(len(rows), session.chunk_rows(rows)))
            fill_all([states])
            nll[name] = evaluate(session.model, states, name, head, lambda _: None).loss
    return nll, loads.counts


# ---- masked dense weights -------------------------------------------------------------------------------------------


def run_lab(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    from comparison.lab import Lab, Recipe

    assert rate is not None
    options = dict(arm.options)
    router_only = options.pop("router_only", False)
    recipe = Recipe(**options)
    if router_only:
        recipe = replace(recipe, router_rate=rate)
    session, before = seeded_session(bed, seed, further), held()
    model: Any = dense_model(bed, session, recipe.base)
    if recipe.low_rank:
        from peft import get_peft_model

        config, _ = adapter_config(bed, session, {"targets": ("experts",), "rank": recipe.low_rank})
        model = get_peft_model(model, config)
    trial = Lab(model, session, recipe, rate)
    trial.prepare()
    figures = dense_figures(bed, session, model, before, trial.run)
    size = sum(u.numel for u in trial.units)
    changes = {}
    for unit in trial.sparse:
        if unit.parameter.dim() == 3 and unit.active is not None:
            import torch

            change = torch.zeros(unit.parameter.numel())
            change[unit.active] = unit.delta
            changes[unit.name] = change.view(unit.parameter.shape)
    active = sum(u.numel for u in trial.sparse)
    by_active = 4 if recipe.neurons else 8  # whole neurons need next to no indices
    return {
        **figures, **experts_moved(changes), "trainable_parameters": size,
        "artifact_bytes": by_active * active + 4 * (size - active), "reloaded": None,
    }  # fmt: skip
