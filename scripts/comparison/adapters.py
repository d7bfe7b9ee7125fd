"""The adapters of PEFT's arms, with as many weights as USAF trains.

Ranks follow the budget: adapters get what USAF trains, its routers and norms included, down to less than one rank of
one layer.
"""

from __future__ import annotations

import math
from typing import Any

from comparison.bed import Bed

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")


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


def expert_names(session: Any) -> list[str]:
    return list(session.checkpoint.expert_parameters())


def trained_blocks(session: Any) -> list[str]:
    """Experts modules of the trained layers."""
    return [n for n in expert_names(session) if int(n.split(".layers.")[1].split(".")[0]) >= session.start]


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
