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


def sparse_weights(bed: Bed, session: Any) -> int:
    """Those of experts and head that USAF trains."""
    shapes = expert_shapes(session)
    return sum(max(1, int(math.prod(s) * bed.frac)) for n in trained_blocks(session) for s in shapes[n])


def whole_weights(session: Any) -> int:
    """Those of the routers and norms that USAF trains."""
    blocks = trained_blocks(session)
    plan = session.checkpoint.plan.shapes
    routers = len(blocks) * expert_shapes(session)[blocks[0]][0][0] * text_config(session).hidden_size
    norms = [n for n, w in plan.items() if len(w) == 1 and n.endswith("norm.weight")
             and (".layers." not in n or int(n.split(".layers.")[1].split(".")[0]) >= session.start)]  # fmt: skip
    return routers + sum(plan[n].numel() for n in norms)


def adapter_weights(bed: Bed, session: Any, options: dict[str, Any]) -> int:
    """How many weights an arm's adapters may have.

    As many as USAF trains, or as fit into its bytes: one for where a weight of experts or head goes, and those of
    DELTA_DTYPE for its value; 4 for one of routers and norms. Where an arm trains these whole, its adapters get the
    rest.
    """
    sparse, whole = sparse_weights(bed, session), whole_weights(session)
    if options.get("budget") == "bytes":
        value = 2 if session.settings.values.delta_dtype == "fp16" else 4
        return ((1 + value) * sparse + 4 * whole) // (2 if options.get("bf16") else 4)
    return sparse + (0 if options.get("whole") else whole)


def head_weights(bed: Bed, session: Any) -> int:
    """Those of the head that USAF trains."""
    from usaf.importance import head_weights_that_count, trained_counts

    config, shapes = text_config(session), expert_shapes(session)
    layers = [(math.prod(shapes[n][0]), math.prod(shapes[n][1])) for n in trained_blocks(session)]
    hidden = config.hidden_size
    counting = head_weights_that_count(config.vocab_size * hidden, hidden, session.data.train.different_targets())
    return trained_counts(counting, layers, bed.frac, session.settings.values.projections)[1]


def text_config(session: Any) -> Any:
    return session.checkpoint.config.get_text_config()


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
    Where not even rank 1 on the last layer fits, it is that all the same, for an adapter cannot be smaller. The head is
    one more layer in that, or (`head_share`) gets USAF's part of the budget and what the layers leave.
    """
    targets = adapter_targets(session, options["targets"])
    if "rank" in options:
        rank = options["rank"]
        names = [name for _, modules, parameters in targets for name in modules + parameters]
        return lora_config(dict.fromkeys(names, rank), f"rank {rank} on {len(targets)} layers", options)
    budget = adapter_weights(bed, session, options)
    if not options.get("head_share"):
        ranks, _, words = shared_ranks(targets, budget)
        return lora_config(ranks, words, options)
    per_rank, (head,), _ = targets.pop()
    of_head = max(1, min(round(head_weights(bed, session) / per_rank), budget // per_rank))
    ranks, left, words = shared_ranks(targets, budget - of_head * per_rank, least=0)
    of_head += left // per_rank
    return lora_config({**ranks, head: of_head}, f"{words}, {of_head} on the head", options)


def shared_ranks(
    targets: list[tuple[int, list[str], list[str]]], budget: int, least: int = 1
) -> tuple[dict[str, int], int, str]:
    """(Module or parameter -> its rank, what is left of the budget, the ranks in words): the same rank for all, and one
    more for the upper ones. least: rank of the last one where there is budget for none."""
    rank, left = divmod(budget, sum(per_rank for per_rank, _, _ in targets))
    more: set[int] = set()  # of the targets, from the top
    for i in reversed(range(len(targets))):
        if targets[i][0] > left:
            break
        left -= targets[i][0]
        more.add(i)
    ranks = [rank + (i in more) for i in range(len(targets))]
    above = not any(ranks) and least > 0
    if above:
        ranks[-1] = least
    used = sum(map(bool, ranks))
    words = f"rank {max(1, rank)} on {used} layers" if used else "no layer, whose rank 1 is above the budget"
    words += (f", one more on {len(more)}" if rank and more else "") + (", above the budget" if above else "")
    named = zip(targets, ranks, strict=True)
    return {name: r for (_, modules, names), r in named if r for name in [*modules, *names]}, left, words


def lora_config(ranks: dict[str, int], words: str, options: dict[str, Any]) -> tuple[Any, str]:
    """PEFT's configuration; ranks: of modules, and of the experts' parameters."""
    from peft import LoraConfig

    parameters = [name for name in ranks if name.endswith(EXPERTS)]
    rank = min(ranks.values())
    pattern = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", rank_pattern=pattern,
        alpha_pattern={name: 2 * r for name, r in pattern.items()}, use_dora=options.get("dora", False),
        target_modules=[name for name in ranks if name not in parameters], target_parameters=parameters or None,
    )  # fmt: skip
    return config, words


def adapter_targets(session: Any, groups: tuple[str, ...]) -> list[tuple[int, list[str], list[str]]]:
    """Of every trained layer, and of the head as one more: (weights of an adapter of rank 1, linear modules, expert
    parameters)."""
    config, shapes = text_config(session), expert_shapes(session)
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
