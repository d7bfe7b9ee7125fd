"""One run of one arm, from the model to a dictionary of figures.

none, full, peft      transformers and PEFT (`dense`, `adapters`)
usaf                  the product itself, by its settings
lab                   masked dense weights (`lab`)
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.adapters import adapter_config, expert_shapes, moved_by_adapter, trained_blocks
from comparison.arms import EVERY, HEAD_RATES, Arm
from comparison.bed import Bed, Loads, dense_model, evaluate_dense, routing_figures, tokens_of
from usaf.errors import RunError, one_line


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


# ---- dense weights ---------------------------------------------------------------------------------------------------


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
        "start": start, "nll": nll, **routing_of(loads, after), "losses": trained.losses,
        "step_seconds": trained.step_seconds, "diverged": trained.diverged, "peak_private_bytes": peak.bytes,
        "tokens": tokens_of(bed.rows(session)),
    }  # fmt: skip


def routing_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run's file. Counts: block -> int64 [E]."""
    loads = {block: [before[block].tolist(), after[block].tolist()] for block in before}
    return {"routing": routing_figures(before, after), "loads": loads}


def at_scales(bed: Bed, session: Any, model: Any, changed: dict[str, tuple[Any, Any]]) -> dict[str, dict[str, float]]:
    """NLL at each of the bed's scales, on the line from the base to the trained model, which is left as it is.

    changed: name -> (parameter, what it was in the base): of adapters the second factor alone, which begins at zero.
    """
    import torch

    trained = {name: parameter.detach().clone() for name, (parameter, _) in changed.items()}
    found = {}
    for scale in (*bed.scales, 1.0) if bed.scales else ():
        for name, (parameter, own) in changed.items():
            parameter.data.copy_(torch.lerp(own, trained[name], scale))
        if scale != 1:
            found[f"{scale:g}"] = evaluate_dense(model, bed.rows(session))
    return found


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
    figures["scaled"] = at_scales(bed, session, model, {n: (p, original[n].detach()) for n, p in chosen.items()})
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


def run_peft(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    import torch
    from peft import PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    from comparison.dense import train

    assert rate is not None
    session, before = seeded_session(bed, seed, further), held()
    base, in_16_bits = arm.options.get("base", "original"), arm.options.get("bf16", False)
    config, ranks = adapter_config(bed, session, arm.options)
    model: Any = get_peft_model(dense_model(bed, session, base), config)
    whole = whole_units(model, session, rate) if arm.options.get("whole") else []
    units = [*adapter_units(model, whole, rate, arm.options.get("head_rate", 1.0)), *whole]

    def work() -> Any:
        trained = train(model, session, units, rate)
        for unit in units if in_16_bits else ():  # what is judged is what is saved
            unit.parameter.data.copy_(unit.parameter.data.to(torch.bfloat16))
        return trained

    own = {unit.name: unit.parameter.detach().clone() for unit in whole}
    figures = dense_figures(bed, session, model, before, work)
    if not arm.options.get("dora"):  # whose change is not linear in B
        changed = {unit.name: (unit.parameter, own.get(unit.name, torch.zeros_like(unit.parameter))) for unit in units
                   if unit.name in own or "lora_B" in unit.name}  # fmt: skip
        figures["scaled"] = at_scales(bed, session, model, changed)
    with tempfile.TemporaryDirectory() as folder:
        for unit in units if in_16_bits else ():
            unit.parameter.data = unit.parameter.data.to(torch.bfloat16)
        model.save_pretrained(folder, save_embedding_layers=False)  # a tied head has the base's
        beside = Path(folder) / "whole.safetensors"
        if whole:
            save_file({unit.name: unit.parameter.detach().contiguous() for unit in whole}, beside)

        def loaded(onto: str) -> dict[str, float]:
            fresh = PeftModel.from_pretrained(dense_model(bed, session, onto), folder)
            if whole:
                fresh.load_state_dict(load_file(beside), strict=False)
            return evaluate_dense(fresh, bed.rows(session))

        figures["reloaded"] = loaded(base)
        figures["exported"] = {} if base == "original" else loaded("original")
        size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    shapes = expert_shapes(session)
    experts = {n: shapes[n][0][0] for n in trained_blocks(session)}
    return {
        **figures, "trainable_parameters": sum(u.numel for u in units), "artifact_bytes": size,
        "experts": sum(experts.values()), "experts_moved": moved_by_adapter(units, experts),
        "note": f"{arm.about}; {ranks}",
    }  # fmt: skip


def adapter_units(model: Any, whole: list[Any], rate: float, head_rate: float) -> list[Any]:
    """head_rate: the head's part of `rate`; whole: tensors that train beside the adapters."""
    from comparison.dense import Unit

    others = {unit.name for unit in whole}
    return [Unit(n, p, rate=head_rate * rate if "lm_head" in n else None) for n, p in model.named_parameters()
            if p.requires_grad and n not in others]  # fmt: skip


def whole_units(model: Any, session: Any, rate: float) -> list[Any]:
    """Routers and norms of the trained layers, and the last norm, at USAF's rates for them."""
    from comparison.dense import Unit
    from comparison.lab import group
    from usaf.optimizer import LARGEST_NORM_RATE

    values = session.settings.values
    rates = {"router": values.router_lr, "norms": min(rate, LARGEST_NORM_RATE)}
    return [Unit(n, p, rate=r) for of, r in rates.items() for n, p in group(model, of, session.start).items()]


# ---- the product -----------------------------------------------------------------------------------------------------


def run_usaf(bed: Bed, arm: Arm, rate: float | None, seed: int, further: dict[str, str]) -> dict[str, Any]:
    """A run of the product's own parts, as `job` puts them together."""
    from usaf.delta import load_delta, save_delta
    from usaf.job import keep_of_change
    from usaf.session import apply_delta, load

    settings = {**arm.then, **further, **arm.options, **({} if rate is None else {"LR_PEAK": repr(rate)})}
    if settings.get("HEAD_LR") in HEAD_RATES:
        settings["HEAD_LR"] = repr(HEAD_RATES[settings["HEAD_LR"]] * float(settings["LR_PEAK"]))
    with tempfile.TemporaryDirectory() as folder:
        settings["PREFIX_CACHE_DIR"] = folder  # runs beside this one have their own
        if {"GROUP_SIZE", "QUANT_BITS"} & arm.options.keys():  # a base of its own too
            settings["QUANT_PATH"] = str(Path(folder) / "experts.safetensors")
        session, before = seeded_session(bed, seed, settings), held()
        load(session)
        start, loads = judged_by_product(bed, session)
        try:
            with TrainingPeak(before) as peak:
                trainer, figures = train_product(session)
        except RunError as error:  # diverged
            return {"start": start, "nll": dict.fromkeys(start, math.nan), "diverged": True, "note": one_line(error)}
        kept = keep_of_change(session, trainer).scale
        trainer.round_deltas()
        nll, after = judged_by_product(bed, session)
        delta, path = trainer.delta({}), Path(folder) / "delta.safetensors"
        size = save_delta(path, delta)
        fresh = seeded_session(bed, seed, settings)
        load(fresh)
        saved = load_delta(path)
        apply_delta(fresh, saved, path)
        reloaded, _ = judged_by_product(bed, fresh)
        at_scale = {}
        exported = on_original(bed, fresh, saved)
        for scale in bed.scales:
            apply_delta(fresh, saved, path, scale)
            at_scale[f"{scale:g}"], _ = judged_by_product(bed, fresh)
    values = trainer.settings
    head = "" if values.head_lr is None else f", HEAD_LR {values.head_lr:g}"
    part = "" if kept == 1 else f", DELTA_SCALE {kept:g}"
    return {
        **figures, "note": f"{arm.about}; LR_PEAK {values.lr_peak:g}{head}{part}",
        "start": start, "nll": nll, "reloaded": reloaded, "exported": exported, "scaled": at_scale,
        **routing_of(loads, after), "artifact_bytes": size, "peak_private_bytes": peak.bytes,
        "tokens": tokens_of(bed.rows(session)),
    }  # fmt: skip


def on_original(bed: Bed, session: Any, delta: Any) -> dict[str, float]:
    """NLL of the delta on the unquantised base, as `usaf.export` merges it, unrounded."""
    import torch

    from usaf.merge import Merge

    model: Any = dense_model(bed, session, "original")
    merge = Merge(session.checkpoint, session.store, delta, "original", torch.float32)
    with torch.no_grad():
        for target in merge.targets:
            for e in range(merge.num_experts(target)):
                model.get_parameter(target)[e].copy_(merge.expert(target, e))
        for name in merge.trained_whole:
            model.get_parameter(name).copy_(merge.whole(name))
        if merge.head is not None:  # its own tensor, where it was the embeddings'
            model.set_output_embeddings(torch.nn.Linear(1, 1, bias=False))
            model.get_output_embeddings().weight = torch.nn.Parameter(merge.merged_head())
    return evaluate_dense(model, bed.rows(session))


def train_product(session: Any) -> tuple[Any, dict[str, Any]]:
    """(the trainer at its end, figures)."""
    from usaf.delta import experts_moved as moved_by_delta
    from usaf.importance import find_important
    from usaf.learning_rate import measure_learning_rates
    from usaf.session import fill_all
    from usaf.trainer import Trainer

    began = time.perf_counter()
    values, order, rows = session.settings.values, session.order, session.data.train
    states = session.boundary(rows, order.chunks)
    fill_all([states])
    trainer = Trainer(session.model, states, rows, order, values, values.steps)
    samples = order.first_rows(min(values.importance_samples, len(rows)))
    found = find_important(
        session.model, states, rows, samples, values.frac, session.chunk_rows(rows), values.head_chunk_tokens,
        lambda _: None, projections=values.projections, score=values.importance_score,
    )  # fmt: skip
    trainer.activate(found.active)
    rates, _ = measure_learning_rates(
        values, session.model, states, rows, order, found, lambda _: None, unseen=session.unseen_states()
    )
    session.settings = session.settings.replace("measured", **rates)
    trainer.settings = session.settings.values
    setup_seconds = time.perf_counter() - began
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
        "half_overlap": found.half_overlap, "setup_seconds": setup_seconds, "turnover": turnover,
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


# ---- masked dense weights --------------------------------------------------------------------------------------------


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
            change[unit.left] = 1.0  # dropped, but not undone
            change[unit.active] = unit.delta
            changes[unit.name] = change.view(unit.parameter.shape)
    active, moved = sum(u.numel for u in trial.sparse), sum(u.moved() for u in trial.sparse)
    by_active = 4 if recipe.neurons else 8  # whole neurons need next to no indices
    return {
        "note": arm.about + (f"; {moved + size - active:,} moved in all" if moved > active else ""),
        **figures, **experts_moved(changes), "trainable_parameters": size,
        "artifact_bytes": by_active * moved + 4 * (size - active), "reloaded": None,
    }  # fmt: skip
