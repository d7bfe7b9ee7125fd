"""USAF against PEFT and full fine-tuning on one mid-size MoE that fits all of them, on the CPU, in one run.

    python scripts/bench_peers.py --json peers.json          # 0.9 B weights, 2 x 512 tokens a step
    python scripts/bench_peers.py --arms usaf-all,lora-experts --experts-implementation grouped_mm

Every arm trains the same random checkpoint on the same batches in the same order, with the same threads and fp32
arithmetic, in a process of its own, with nothing but what its users would run:

    usaf-all        USAF with TRAIN_FROM=0: all layers train
    usaf-default    USAF with its default TRAIN_FROM, what enters the first trainable layer cached before the steps
    lora-experts    PEFT LoRA of rank 4 on every expert's gate_up_proj and down_proj (target_parameters)
    lora-attention  the same rank on q, k, v and o alone
    dora            PEFT DoRA of the same rank on the experts where this PEFT can, else on attention: its note says
    full            every weight

A step is forward, backward and update; its time is the median of the timed ones. USAF's active weights are a seeded
random choice of FRAC of each expert tensor in place of importance: a step's time depends on their number, not on which
they are. Its experts are quantised beforehand, untimed. Torch's AdamW updates the other arms, without the clipping of
gradients that USAF does, and without a learning-rate schedule.

The peers run transformers' experts implementation that is fastest for them: `--experts-implementation auto` times one
forward and backward of each, for each arm, and the table names what was taken.

Peaks are those of the steps, to which the ratios are, and of the whole process with loading (and the frozen prefix of
usaf-default). What loading has freed is given back to the system before the steps, in every arm alike.

Left out: GPUs, 16-bit arithmetic, gradient checkpointing, 4-bit bases under LoRA (they need CUDA).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_model import (
    Inputs,
    Sizes,
    add_size_flags,
    further_settings,
    measured_steps,
    model_config,
    prepare_session,
    random_active,
    require_at_least,
    run_apart,
    sizes_of,
    trained_figures,
    usaf_trainer,
    with_gradient,
    working_folder,
)
from benchmark import machine, machine_line, matmul_rate, write_json

from usaf.console import Parser, add_json_flag, run_command, say, table
from usaf.errors import RunError, UserError, one_line

USAF_ARMS = {"usaf-all": {"TRAIN_FROM": "0"}, "usaf-default": {}}
PEER_ARMS = ("lora-experts", "lora-attention", "dora", "full")
ARMS = (*USAF_ARMS, *PEER_ARMS)
REFERENCE = "lora-experts"  # what the ratios are to
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")  # of transformers' experts
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK = 4
LEARNING_RATE = 2e-4
PROBE_TOKENS = 2  # of the short pass before an implementation is timed; the fewest that have a loss
HOPELESS_SECONDS = 1.0  # a short pass that takes longer than this and than another's whole one settles the matter


@dataclass(frozen=True)
class Plan:
    """What all arms share."""

    inputs: Inputs
    threads: int
    batch: int
    warmup: int
    timed: int
    settings: dict[str, str]
    """further ones of the USAF arms"""

    @property
    def steps(self) -> int:
        return self.warmup + self.timed

    def usaf_settings(self, arm: str) -> dict[str, str]:
        """IMPORTANCE_SAMPLES=2, the least: nothing but the steps' own rows is to be read and cached."""
        own = {"MICROBATCH": str(self.batch), "IMPORTANCE_SAMPLES": "2"}
        return self.inputs.settings(self.threads, self.steps, {**own, **self.settings, **USAF_ARMS.get(arm, {})})

    @property
    def batches(self) -> Path:
        """Token ids of each step, int64 [steps, batch, tokens]."""
        return self.inputs.data.with_suffix(".npy")


# The arms: each function below runs in a process of its own.


def make_inputs(plan: Plan) -> dict[str, Any]:
    """Checkpoint, 4-bit file, and the batches in the order in which USAF's trainer will take them."""
    import numpy as np

    settings = plan.usaf_settings("usaf-all")
    made = plan.inputs.make(settings)
    session = prepare_session(settings)
    assert session.order is not None
    batches = [session.data.train.batch(session.order.micro_batch(i)).input_ids for i in range(plan.steps)]
    np.save(plan.batches, np.stack([batch.numpy() for batch in batches]))
    return made


def usaf_arm(plan: Plan, arm: str) -> dict[str, Any]:
    """Steps of USAF's own trainer."""
    from usaf.session import fill_all, load

    session = prepare_session(plan.usaf_settings(arm))
    load(session)
    assert session.order is not None
    states = session.boundary(session.data.train, session.order.chunks)
    began = time.perf_counter()
    fill_all([states])
    prefix_seconds = time.perf_counter() - began
    trainer = usaf_trainer(session, states)
    trainer.activate(random_active(trainer, session.settings.values.frac))
    figures = measured_steps(lambda: trainer.train_step().loss, plan.warmup, plan.timed)
    return {
        **figures, **trained_figures(trainer), "train_from": session.start,
        "prefix_seconds": prefix_seconds if states.tokens_computed else None, "prefix_tokens": states.tokens_computed,
        "note": f"TRAIN_FROM={session.start}, FRAC={session.settings.values.frac:g}; resident: "
        f"{session.decisions.get('resident_reason', 'no')}",
    }  # fmt: skip


def peer_arm(plan: Plan, arm: str, implementation: str) -> dict[str, Any]:
    """Steps of transformers' model as PEFT has it, or with every weight training."""
    import numpy as np
    import torch

    model, note = peer_model(plan, arm, implementation)
    batches = torch.from_numpy(np.load(plan.batches))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    upcoming = iter(batches)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, next(upcoming))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    figures = measured_steps(step, plan.warmup, plan.timed)
    return {
        **figures, "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "parameters_with_gradient": with_gradient(trained), "experts_implementation": implementation, "note": note,
    }  # fmt: skip


def probe(plan: Plan, arm: str) -> dict[str, Any]:
    """One forward and backward under each experts implementation: seconds by name, and why others were left out."""
    import numpy as np
    import torch

    model, _ = peer_model(plan, arm, IMPLEMENTATIONS[0])
    ids = torch.from_numpy(np.load(plan.batches)[0])
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in IMPLEMENTATIONS:
        reason = too_large(plan, name)
        if reason is None:
            (model if arm == "full" else model.get_base_model()).set_experts_implementation(name)
            short = pass_seconds(model, ids[:1, :PROBE_TOKENS])
            if short > max(HOPELESS_SECONDS, min(seconds.values(), default=short)):
                reason = f"{PROBE_TOKENS} tokens took {short:.1f} s already"
            else:
                seconds[name] = pass_seconds(model, ids)
        if reason is not None:
            left_out[name] = reason
    return {"seconds": seconds, "left_out": left_out}


def too_large(plan: Plan, implementation: str) -> str | None:
    """batched_mm copies an expert's weights for each token that it gets, and keeps them for the backward."""
    from usaf.memory import available_bytes

    sizes = plan.inputs.sizes
    pairs = plan.batch * plan.inputs.sequence_tokens * sizes.top_k
    needed = 4 * pairs * 3 * sizes.hidden * sizes.intermediate * sizes.layers
    if implementation == "batched_mm" and needed > available_bytes() / 2:
        return f"its copies of weights would take {needed / 1e9:.0f} GB"
    return None


def pass_seconds(model: Any, ids: Any) -> float:
    began = time.perf_counter()
    loss_of(model, ids).backward()
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds


def loss_of(model: Any, ids: Any) -> Any:
    """[B, S] -> the mean loss of every token but the first of each sequence, as USAF's trainer has it."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def peer_model(plan: Plan, arm: str, implementation: str) -> tuple[Any, str]:
    """(the model with what trains in it, a note)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        plan.inputs.model, dtype=torch.float32, experts_implementation=implementation
    )
    model.train()
    if arm == "full":
        return model, "AdamW, moments in fp32"
    from peft import get_peft_model

    config, note = peft_config(arm)
    return get_peft_model(model, config), note


def peft_config(arm: str) -> tuple[Any, str]:
    """(LoraConfig, a note)."""
    from peft import LoraConfig

    shared: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    on_experts: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS}
    if arm == "lora-experts":
        return LoraConfig(**shared, **on_experts), f"rank {RANK} on the experts"
    if arm == "lora-attention":
        return LoraConfig(**shared, target_modules=ATTENTION), f"rank {RANK} on attention"
    refusal = refused_by_peft(LoraConfig(**shared, **on_experts, use_dora=True))
    if refusal is None:
        return LoraConfig(**shared, **on_experts, use_dora=True), f"rank {RANK} on the experts"
    return LoraConfig(**shared, target_modules=ATTENTION, use_dora=True), (
        f"rank {RANK} on attention only, since this PEFT has no DoRA on experts ({refusal})")  # fmt: skip


def refused_by_peft(config: Any) -> str | None:
    """Why PEFT cannot put `config` on a Qwen3-MoE, tried on a tiny one; None where it can."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    tiny = Sizes(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, experts=2, top_k=1, intermediate=8, vocab=16)
    try:
        get_peft_model(AutoModelForCausalLM.from_config(model_config(tiny)), config)
    except ValueError as error:
        return one_line(error)
    return None


# The command.


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/bench_peers.py", "USAF against PEFT and full fine-tuning on one MoE, on the CPU.")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated, in this order (default: all)")
    parser.add_argument("--experts-implementation", choices=("auto", *IMPLEMENTATIONS), default="auto",
                        help="transformers' experts implementation for the peers (default: the fastest)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: 3)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them (default: 1)")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence (default: 512)")
    add_size_flags(parser, Sizes())
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where model and logs stay, and are found again")
    parser.add_argument("settings", nargs="*", help="further settings of the USAF arms, such as USE_RESIDENT=0")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    for name, least in (("steps", 1), ("warmup", 0), ("batch", 1), ("seq_len", 8), ("threads", 0)):
        require_at_least(arguments, name, least)
    arguments.arms = arguments.arms.split(",")
    for arm in arguments.arms:
        if arm not in ARMS:
            raise UserError(f"--arms {arm}: must be among {', '.join(ARMS)}; name such arms, with commas between")
    if any(arm in PEER_ARMS for arm in arguments.arms):
        require_peft()
    return arguments


def require_peft() -> None:
    """Without importing it, which takes seconds."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise UserError("--arms: peft is not installed, which the arms but usaf-* need; install it (pip install peft), "
                        f"or give --arms {','.join(USAF_ARMS)}")  # fmt: skip


def peers_command(arguments: argparse.Namespace) -> int:
    import torch

    sizes = sizes_of(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with working_folder(arguments.keep) as folder:
        inputs = Inputs(folder, sizes, (arguments.warmup + arguments.steps) * arguments.batch, arguments.seq_len)
        plan = Plan(inputs, torch.get_num_threads(), arguments.batch, arguments.warmup, arguments.steps,
                    further_settings(arguments.settings))  # fmt: skip
        report = {
            "benchmark": "peers", "machine": machine(), "matmul_512_rows_flop_per_second": matmul_rate(512, 2048, 2048),
            "model": {**asdict(sizes), "parameters": sizes.parameters}, "sequences_per_step": plan.batch,
            "sequence_tokens": arguments.seq_len, "warmup_steps": plan.warmup, "timed_steps": plan.timed,
        }  # fmt: skip
        say(header(report))
        report |= measure(plan, arguments.arms, arguments.experts_implementation)
    report["matmul_512_rows_flop_per_second_after"] = matmul_rate(512, 2048, 2048)
    say()
    say(peers_table(report["arms"]))
    for arm in report["arms"]:
        say(f"{arm['name']}: {arm['note']}")
    if arguments.json is not None:
        write_json(arguments.json, report)
    return 1 if any("error" in arm for arm in report["arms"]) else 0


def measure(plan: Plan, arms: Sequence[str], wanted: str) -> dict[str, Any]:
    """Every arm in its turn. One that fails (a full fine-tuning that the system kills, say) does not end the others."""
    logs = plan.inputs.folder
    say("model, data and 4-bit experts ...")
    made = run_apart(make_inputs, plan, log=logs / "make.log")
    found, probes = [], {}
    for arm in arms:
        say(f"{arm} ...")
        log = logs / f"{arm}.log"
        try:
            if arm in USAF_ARMS:
                figures = run_apart(usaf_arm, plan, arm, log=log)
            else:
                implementation = wanted
                if wanted == "auto":
                    probes[arm] = run_apart(probe, plan, arm, log=log)
                    implementation = min(probes[arm]["seconds"], key=probes[arm]["seconds"].get)
                    say(f"  {probed(probes[arm])}: {implementation}")
                figures = run_apart(peer_arm, plan, arm, implementation, log=log)
            figures["tokens_per_second"] = plan.batch * plan.inputs.sequence_tokens / figures["step_seconds"]
        except RunError as error:
            figures = {"error": str(error), "note": f"failed: {error}"}
        found.append({"name": arm, **figures})
    add_ratios(found)
    return {"quantise_seconds": made["quantise_seconds"], "arms": found, "experts_probes": probes}


def add_ratios(arms: list[dict[str, Any]]) -> None:
    """Time and the steps' private memory over those of the reference, None where it did not run."""
    reference: dict[str, Any] = next((arm for arm in arms if arm["name"] == REFERENCE and "error" not in arm), {})
    for arm in arms:
        for ratio, key in (("time_ratio", "step_seconds"), ("memory_ratio", "steps_peak_private_bytes")):
            known = key in reference and key in arm
            arm[f"{ratio}_to_{REFERENCE.replace('-', '_')}"] = arm[key] / reference[key] if known else None


def probed(found: dict[str, Any]) -> str:
    times = [f"{name} {seconds:.2f} s" for name, seconds in found["seconds"].items()]
    return "; ".join(["one forward and backward: " + ", ".join(times),
                      *(f"{name} left out, {reason}" for name, reason in found["left_out"].items())])  # fmt: skip


def header(report: dict[str, Any]) -> str:
    model = report["model"]
    return "\n".join([
        machine_line(report["machine"]),
        f"fp32 product of 512 x 2048 x 2048: {report['matmul_512_rows_flop_per_second'] / 1e9:.1f} GFLOP/s",
        f"Qwen3-MoE, {model['parameters']:,} weights: {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['experts']} experts, top-{model['top_k']}, intermediate {model['intermediate']}, vocabulary "
        f"{model['vocab']:,}",
        f"{report['sequences_per_step']} x {report['sequence_tokens']} tokens a step, fp32, median of "
        f"{report['timed_steps']} after {report['warmup_steps']} untimed",
    ])  # fmt: skip


def peers_table(arms: list[dict[str, Any]]) -> str:
    """Memory in GB, private and all resident, of the steps and of the whole process."""
    names = ["arm", "experts", "s/step", "tok/s", "trainable", "private", "resident", "whole", "prefix s",
             "time/LoRA", "memory/LoRA"]  # fmt: skip
    rows = []
    for arm in arms:
        if "error" in arm:
            rows.append([arm["name"], "failed", *[""] * (len(names) - 2)])
            continue
        ratios = [arm[f"{ratio}_to_{REFERENCE.replace('-', '_')}"] for ratio in ("time_ratio", "memory_ratio")]
        prefix = arm.get("prefix_seconds")
        rows.append([
            arm["name"], arm.get("experts_implementation", "usaf"), f"{arm['step_seconds']:.2f}",
            f"{arm['tokens_per_second']:.1f}", f"{arm['trainable_parameters']:,}",
            *(f"{arm[key] / 1e9:.2f}" for key in ("steps_peak_private_bytes", "steps_peak_resident_bytes",
                                                  "peak_private_bytes")),
            "-" if prefix is None else f"{prefix:.2f}", *("-" if r is None else f"{r:.3f}" for r in ratios),
        ])  # fmt: skip
    return table(rows, names)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: peers_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
