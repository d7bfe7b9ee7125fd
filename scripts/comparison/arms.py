"""The arms of a comparison: what each of them is. `methods` runs them.

none, full, attention-only and expert LoRA, QLoRA, DoRA      transformers and PEFT
usaf*                                                        the product itself, by its settings
random, earlier, and every ablation that is no setting       masked dense weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """family: who trains it. guess: the learning rate in whose neighbourhood the sweep begins. then: settings of the
    product whose defaults were others when the arm was run; the command's own come before these."""

    family: str
    guess: float
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    then: dict[str, str] = field(default_factory=dict)


ALL_OF_IT = {"DELTA_SCALE": "1"}
OF_BEFORE = {"RESELECT_EVERY": "50", **ALL_OF_IT}


def product(about: str, guess: float, then: dict[str, str], settings: dict[str, Any]) -> Arm:
    return Arm("usaf", guess, about, {name: str(value) for name, value in settings.items()}, then)


def default(about: str, **settings: Any) -> Arm:
    """With every rate as a user gets it; the demo's own ROUTER_LR is not the product's."""
    return product(about, 0.0, {}, {"ROUTER_LR": "5e-5", **settings})


def unscaled(about: str, **settings: Any) -> Arm:
    """The same with all of the change."""
    return product(about, 0.0, ALL_OF_IT, {"ROUTER_LR": "5e-5", **settings})


def earlier_default(about: str, **settings: Any) -> Arm:
    return product(about, 0.0, OF_BEFORE, {"ROUTER_LR": "5e-5", **settings})


def usaf(about: str, guess: float = 5e-3, **settings: Any) -> Arm:
    """With a rate that is swept."""
    return product(about, guess, OF_BEFORE, settings)


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
    "lora-head-share": peft("the same, the head's part of the budget as USAF's", 5e-3,
                            targets=("experts", "attention", "head"), head_share=True),
    "lora-as-usaf": peft("the same, routers and norms whole, as USAF has them", 5e-3,
                         targets=("experts", "attention", "head"), head_share=True, whole=True),
    "qlora": peft("LoRA on experts and attention, on the 4-bit base, saved in bf16", 5e-3,
                  targets=("experts", "attention"), base="hqq4", bf16=True),
    "lora-all-bytes": peft("LoRA on experts, attention and the head, saved in bf16, as many bytes as USAF's", 5e-3,
                           targets=("experts", "attention", "head"), head_share=True, bf16=True, budget="bytes"),
    "qlora-bytes": peft("LoRA on experts and attention, on the 4-bit base, in bf16, as many bytes as USAF's", 5e-3,
                        targets=("experts", "attention"), base="hqq4", bf16=True, budget="bytes"),
    "dora": peft("DoRA on attention (PEFT has none on fused experts)", 5e-3, targets=("attention",), dora=True),
    "usaf": usaf("the product but for RESELECT_EVERY=50 and DELTA_SCALE=1, its rate swept as the others' are"),
    "usaf-default": default("the product as it is, with no choice made"),
    "usaf-unscaled": unscaled("the same, with all of the change"),
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
TODAY: dict[str, Any] = {**NOW, "reselect_every": 10, "head_rate": 1 / 3}
EXPERTS_ALONE = {"TRAIN_HEAD": 0, "TRAIN_NORMS": 0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "samples-2": ("importance from 2 sequences", {"samples": 2}),
    "samples-16": ("importance from 16 sequences", {"samples": 16}),
    "samples-256": ("importance from 256 sequences", {"samples": 256}),
    "square": ("importance by mean squared gradients", {"score": "square"}),
    "magnitude": ("importance by |weight|", {"score": "magnitude"}),
    "grow-square": ("grown by mean squared gradients", {"grow_by": "square"}),
    "squares": ("importance and growth by mean squared gradients", {"score": "square", "grow_by": "square"}),
    "global": ("one budget for all tensors", {"scope": "all"}),
    "routed": ("only the most routed quarter of experts", {"routed_share": 0.25}),
    "least-share": ("no expert under half of its even share of tokens", {"least_share": 0.5}),
    "zero-moments": ("grown weights start with zero moments", {"moments": "zero"}),
    "reset": ("all moments forgotten at a reselection", {"moments": "reset"}),
    "drop-weight": ("the smallest |weight| is dropped", {"drop_by": "weight"}),
    "dropped-kept": ("what was dropped keeps its value and trains no more", {"dropped": "kept"}),
    "capture-1": ("candidates from 1 step", {"capture_steps": 1}),
    "capture-16": ("candidates from 16 steps", {"capture_steps": 16}),
    "router-dense": ("dense router gradient", {"router_gradient": "dense"}),
    "router-warmup": ("routers alone for 20 steps", {"router_warmup": 20}),
    "gumbel": ("Gumbel noise of 0.3 on the routing", {"gumbel": 0.3}),
    "balance": ("load-balancing loss of 1e-3", {"balance": 1e-3}),
    "low-rank": ("LoRA of rank 1 on the experts, the rest of the budget sparse", {"low_rank": 1}),
    "8bit": ("moments in 8 bits", {"eight_bit": True}),
}
"""What one thing changed of a recipe is called: what it is, and its fields."""


def variants(base: str, recipe: dict[str, Any], *names: str) -> dict[str, Arm]:
    return {f"{base}-{name}": lab(VARIANTS[name][0], **{**recipe, **VARIANTS[name][1]}) for name in names}


ABLATIONS: dict[str, Arm] = {
    "now": lab("the product's defaults but HEAD_LR=LR_PEAK, on dense weights, the baseline of the others", **NOW),
    **variants("now", NOW, "samples-2", "samples-16", "samples-256", "square", "magnitude", "global", "routed",
               "least-share", "zero-moments", "reset", "drop-weight", "capture-1", "capture-16", "router-dense",
               "router-warmup", "gumbel", "balance", "low-rank", "8bit"),
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
    # at 0.013 the rates that the product measures on the demo at 2%, but the norms', which go at 0.01 there
    "dense-default": lab("the product's defaults, all of the change, on dense weights, the head at a third of the rate",
                         **TODAY),
    **variants("dense-default", TODAY, "square", "grow-square", "squares", "global", "routed", "least-share",
               "zero-moments", "reset", "drop-weight", "dropped-kept", "router-dense", "router-warmup", "gumbel",
               "balance", "low-rank", "8bit"),
    "dense-default-attention": lab("and attention", **{**TODAY, "sparse": ("down", "attention", "head")}),
    "dense-default-embedding": lab("and the embeddings", **{**TODAY, "sparse": ("down", "head", "input")}),
    "dense-default-static": lab("never reselected", **{**TODAY, "reselect_every": 0}),
    "dense-default-neurons": lab("whole neurons, never reselected",
                                 **{**TODAY, "sparse": ("experts", "head"), "neurons": True, "reselect_every": 0}),
    "usaf-experts-all": usaf("gate and up projections train too", PROJECTIONS="all", **EXPERTS_ALONE),
    "usaf-experts-static": usaf("never reselected", RESELECT_EVERY=0, **EXPERTS_ALONE),
    "usaf-experts-frozen-router": usaf("routers frozen", ROUTER_LR=0, **EXPERTS_ALONE),
    "usaf-experts-default": earlier_default("at the default rates", **EXPERTS_ALONE),
    "usaf-experts-default-10": earlier_default("at the default rates, reselected every 10 steps", RESELECT_EVERY=10,
                                       **EXPERTS_ALONE),
    "usaf-experts-drop-50": usaf("50% dropped at first", DROP_FRACTION=0.5, **EXPERTS_ALONE),
    "lab": lab("the method with PROJECTIONS=all on dense weights, the baseline of the others"),
    "lab-original": lab("on the unquantised base", base="original"),
    "lab-group-64": lab("on a base with a scale for every 64 weights", base="hqq4-64"),
    "lab-8-bit-base": lab("on a base of 8 bits", base="hqq8-128"),
    # which weights
    **variants("lab", {}, "samples-2", "samples-16", "samples-256", "square", "magnitude", "global", "routed",
               "least-share"),
    "lab-neurons": lab("whole neurons: gate row, up row, down column", neurons=True, reselect_every=0),
    "lab-down": lab("down projections alone", sparse=("down",)),
    "lab-up": lab("gate and up projections alone", sparse=("up",)),
    # reselection
    "lab-static": lab("never reselected", reselect_every=0),
    **variants("lab", {}, "zero-moments", "reset", "drop-weight"),
    "lab-drop-10": lab("10% dropped at first", drop_fraction=0.1),
    "lab-drop-50": lab("50% dropped at first", drop_fraction=0.5),
    "lab-every-10": lab("reselected every 10 steps", reselect_every=10),
    "lab-every-25": lab("reselected every 25 steps", reselect_every=25),
    "lab-until-85": lab("reselected in the first 85% of the steps", reselect_until=0.85),
    **variants("lab", {}, "capture-1", "capture-16"),
    # routers
    "lab-router-0": lab("routers frozen", whole=()),
    "lab-router-1e-3": lab("routers at 1e-3", router_rate=1e-3),
    "lab-router-3e-3": lab("routers at 3e-3", router_rate=3e-3),
    "lab-router-dense": lab("dense router gradient", router_gradient="dense"),
    "lab-router-dense-1e-3": lab("dense router gradient at 1e-3", router_gradient="dense", router_rate=1e-3),
    **variants("lab", {}, "router-warmup", "gumbel", "balance"),
    # what else trains
    **variants("lab", {}, "low-rank"),
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
    "usaf-head-1-default": earlier_default("at the default rates", LR_PEAK="0.0104", HEAD_LR="0.0104"),
    "usaf-head-1-static": usaf("never reselected", RESELECT_EVERY=0, **FULL_HEAD),
    "usaf-head-1-frozen-router": usaf("routers frozen", ROUTER_LR=0, **FULL_HEAD),
    "usaf-head-1-every-10": usaf("reselected every 10 steps", RESELECT_EVERY=10, **FULL_HEAD),
    "usaf-head-1-drop-50": usaf("50% dropped at first", DROP_FRACTION=0.5, **FULL_HEAD),
    "usaf-head-1-floor-0": usaf("cosine to 0", LR_FLOOR=0, **FULL_HEAD),
    "usaf-head-1-clip-100": usaf("gradients not clipped", GRAD_CLIP=100, **FULL_HEAD),
    "usaf-head-half": usaf("the head at half the rate", **HALF_HEAD),
    # kept for runs of before rates were measured, or `Rows.different_targets` was; run anew they are
    # usaf-unscaled-every-50
    "usaf-by-width-default": earlier_default("at rates by width and FRAC: the default of before"),
    "usaf-head-half-default": earlier_default("the same, the head at half the rate"),
    "usaf-head-by-size-default": earlier_default("the same, the head's share of FRAC by its size"),
    # the product as it is, but for one setting
    "usaf-default-square": default("the first weights chosen by squared gradients", IMPORTANCE_SCORE="square"),
    # and with all of the change
    "usaf-unscaled-every-50": unscaled("reselected every 50 steps", RESELECT_EVERY=50),
    "usaf-unscaled-static": unscaled("never reselected", RESELECT_EVERY=0),
    "usaf-unscaled-until-85": unscaled("reselected in the first 85% of the steps", RESELECT_UNTIL=0.85),
    "usaf-unscaled-drop-10": unscaled("10% dropped at first", DROP_FRACTION=0.1),
    "usaf-unscaled-drop-50": unscaled("50% dropped at first", DROP_FRACTION=0.5),
    "usaf-unscaled-capture-1": unscaled("candidates from 1 step", CAPTURE_STEPS=1),
    "usaf-unscaled-capture-10": unscaled("candidates from 10 steps", CAPTURE_STEPS=10, RESELECT_EVERY=10),
    "usaf-unscaled-samples-2": unscaled("importance from 2 sequences", IMPORTANCE_SAMPLES=2),
    "usaf-unscaled-samples-16": unscaled("importance from 16 sequences", IMPORTANCE_SAMPLES=16),
    "usaf-unscaled-samples-256": unscaled("importance from 256 sequences", IMPORTANCE_SAMPLES=256),
    "usaf-unscaled-all-projections": unscaled("gate and up projections train too", PROJECTIONS="all"),
    "usaf-unscaled-frozen-head": unscaled("the head frozen", TRAIN_HEAD=0),
    "usaf-unscaled-frozen-norms": unscaled("norms frozen", TRAIN_NORMS=0),
    "usaf-unscaled-frozen-router": unscaled("routers frozen", ROUTER_LR=0),
    "usaf-unscaled-router-1e-3": unscaled("routers at 1e-3", ROUTER_LR=1e-3),
    "usaf-unscaled-floor-0": unscaled("cosine to 0", LR_FLOOR=0),
    "usaf-unscaled-clip-0.3": unscaled("gradients clipped at 0.3", GRAD_CLIP=0.3),
    "usaf-unscaled-clip-100": unscaled("gradients not clipped", GRAD_CLIP=100),
    "usaf-unscaled-decay": unscaled("weight decay of 0.1", WEIGHT_DECAY=0.1),
    "usaf-unscaled-warmup-0.2": unscaled("warm-up of a fifth", WARMUP=0.2),
    "usaf-unscaled-group-64": unscaled("on a base with a scale for every 64 weights", GROUP_SIZE=64),
    "usaf-unscaled-8-bits": unscaled("on a base of 8 bits", QUANT_BITS=8),
    "qlora-group-64": peft("QLoRA, on a base with a scale for every 64 weights", 5e-3,
                           targets=("experts", "attention"), base="hqq4-64", bf16=True),
    # and at a rate of the sweep
    "usaf-every-10": usaf("reselected every 10 steps", RESELECT_EVERY=10),
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
