"""Every MoE family of transformers, from a saved tiny checkpoint to a delta that is read again, by structure alone.

Where the environment variable USAF_FAMILY_RESULTS names a file, a line of JSON is added to it for each family with what
was checked and has held; `scripts/supported_models.py` makes the README's table of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from all_families import CONFIGS, FAMILIES, WRAPPERS, class_of, has_interface, tiny_config, write_checkpoint
from families import activate, base_into, build, leaks, logits_of, random_batch, with_delta, write_tokens
from runs import events, raw_tensors, read_json
from torch import Tensor
from transformers import PreTrainedModel

from usaf import evaluate, export, train
from usaf.checkpoint import Checkpoint
from usaf.data import NO_TARGET
from usaf.delta import load_delta
from usaf.devices import choose_backend
from usaf.loss import count_targets, loss_and_gradient
from usaf.model import SparseModel
from usaf.packing import keeps_documents_apart

# These run by default, one of each kind; the others are marked slow.
REPRESENTATIVE = [
    "deepseek_v4", "ernie4_5_vl_moe", "gemma4", "glm_moe_dsa", "gpt_oss", "inkling2_text", "jamba", "kimi_k25",
    "mistral_large4", "nemotron_h", "qwen3_5_moe", "qwen3_moe", "zaya",
]  # fmt: skip
BATCH = random_batch([[9, 7], [11], [5, 3, 6]])
RAW: dict[str, Any] = {"input_ids": BATCH.input_ids, "position_ids": BATCH.position_ids, "use_cache": False}
STEPS = 3
SETTINGS = {
    "STEPS": STEPS, "FRAC": 0.02, "LR_PEAK": 5e-3, "ROUTER_LR": 1e-3, "RESELECT_EVERY": 2, "CAPTURE_STEPS": 1,
    "RESELECT_UNTIL": 1, "IMPORTANCE_SAMPLES": 4, "EVAL_SAMPLES": 3, "EVAL_EVERY": STEPS, "SAVE_EVERY": STEPS,
    "PREFIX_CHUNK_TOKENS": 100, "USE_CUDA": 0, "CPU_THREADS": 1,
}  # fmt: skip


@dataclass
class Record:
    """What the test of one family has found. checked: in the order of the table's columns."""

    family: str
    saved_class: str
    built_class: str = ""
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    transformers: str = transformers.__version__


@contextmanager
def recorded(family: str) -> Iterator[Record]:
    """The record of a family's test, added to the file of results however the test ends."""
    record = Record(family, class_of(family, tiny_config(family)).__name__)
    try:
        yield record
    finally:
        if "USAF_FAMILY_RESULTS" in os.environ:
            with open(os.environ["USAF_FAMILY_RESULTS"], "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")


@pytest.mark.parametrize(
    "family", [f if f in REPRESENTATIVE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_from_a_saved_checkpoint_to_a_delta(family: str, tmp_path: Path) -> None:
    if not has_interface(family):
        pytest.skip(f"transformers {transformers.__version__} has no experts interface for {family}")
    with recorded(family) as record:
        folder = write_checkpoint(tmp_path / "model", family)
        model, reference = loaded(folder, record)
        same_logits(model, reference, record)
        same_gradients(model, reference, record)
        split_anywhere(model, record)
        documents_apart(folder, reference, record)
        delta = trained(folder, tmp_path, record)
        read_again(delta, tmp_path, record)
        exported_as_trained(folder, delta, tmp_path, record)
        exported_as_stored(folder, delta, tmp_path, record)


def reference_of(folder: Path) -> PreTrainedModel:
    """transformers' own model of a checkpoint, of the class that we build, with eager experts in fp32."""
    cls = type(Checkpoint(folder).model)
    return cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def loaded(folder: Path, record: Record) -> tuple[SparseModel, PreTrainedModel]:
    """Every tensor is the one that from_pretrained reads, whole and an expert at a time, and where the model has it."""
    reference = reference_of(folder)
    expected = dict(reference.state_dict())
    checkpoint = Checkpoint(folder)
    record.built_class = type(checkpoint.model).__name__
    assert set(expected) <= {*checkpoint.sources, *reference.all_tied_weights_keys}
    for target in checkpoint.sources:
        assert torch.equal(checkpoint.read(target).float(), expected[target].float()), target
    for pair in checkpoint.expert_parameters().values():
        for target in pair:
            experts = expected[target]
            for e in range(len(experts)):
                assert torch.equal(checkpoint.read_expert(target, e).float(), experts[e]), (target, e)
    model = build(folder)
    tensors = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    held = {**dict(model.model.named_parameters()), **dict(model.model.named_buffers())}
    dense = {name: tensor for name, tensor in held.items() if "_bank." not in name}
    assert len(dense) > 20
    for name, tensor in dense.items():
        assert not tensor.is_meta, name
        assert torch.equal(tensor.float(), tensors[name].float()), name
    assert model.moe
    if record.built_class != record.saved_class or record.family in WRAPPERS:
        record.notes.append("text part")
    record.checked.append("load")
    return model, reference


def same_logits(model: SparseModel, reference: PreTrainedModel, record: Record) -> None:
    activate(model)
    base_into(reference, model)
    with torch.no_grad():
        expected = reference(**RAW).logits
    torch.testing.assert_close(logits_of(model, BATCH), expected, rtol=1e-5, atol=2e-6)
    assert expected.std() > 0.05
    record.checked.append("logits")


def same_gradients(model: SparseModel, reference: PreTrainedModel, record: Record) -> None:
    reference.requires_grad_(False)
    for moe in model.moe:
        for name in (*moe.names, moe.router_name):
            reference.get_parameter(name).requires_grad_(True)
    logits = reference(**RAW).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH.labels[:, 1:].flatten(), ignore_index=NO_TARGET).backward()
    hidden = model.run_layers(BATCH, 0, model.num_layers)
    _, gradient = loss_and_gradient(model, hidden, BATCH, 7, 1 / count_targets(BATCH))
    hidden.backward(gradient)
    largest_of_routers = 0.0
    for moe in model.moe:
        transposed = reference.get_submodule(moe.names[0].rpartition(".")[0]).is_transposed
        for name, bank in zip(moe.names, moe.banks, strict=True):
            dense = gradient_of(reference, name)
            dense = (dense.transpose(1, 2) if transposed else dense).reshape(-1)[bank.active]
            torch.testing.assert_close(bank.delta.grad, dense, rtol=1e-4, atol=1e-7)
            assert dense.abs().max() > 1e-6, name
        expected = gradient_of(reference, moe.router_name)
        torch.testing.assert_close(moe.router_weight.grad, expected, rtol=1e-4, atol=1e-7)
        largest_of_routers = max(largest_of_routers, float(expected.abs().max()))
    if largest_of_routers == 0:
        record.notes.append("its router gets no gradient outside of its own training mode")
    record.checked.append("gradients")


def gradient_of(reference: PreTrainedModel, name: str) -> Tensor:
    gradient = reference.get_parameter(name).grad
    assert gradient is not None, name
    return gradient


def split_anywhere(model: SparseModel, record: Record) -> None:
    """Cut at every place where it can be cut, and at all of them, the model gives the bits of the whole."""
    cuts = model.handover.splits
    assert cuts[0] == 0
    assert cuts[-1] == model.num_layers
    with torch.no_grad():
        whole = model.run_layers(BATCH, 0, model.num_layers)
        piecewise = None
        for first, end in zip(cuts[:-1], cuts[1:], strict=True):
            piecewise = model.run_layers(BATCH, first, end, piecewise)
        assert torch.equal(piecewise, whole)  # type: ignore[arg-type]
        for cut in cuts[1:-1]:
            below = model.run_layers(BATCH, 0, cut)
            assert below.shape[2:] == model.handover.token_shape(cut)
            assert torch.equal(model.run_layers(BATCH, cut, model.num_layers, below), whole), cut
    if len(cuts) < model.num_layers + 1:
        record.notes.append("some layers train together with the one below")
    if any(len(products) > 1 for products in model.handover.needed):
        record.notes.append("layers hand on more than the hidden state")
    record.checked.append("split")


def documents_apart(folder: Path, reference: PreTrainedModel, record: Record) -> None:
    """Whether documents are packed agrees with whether an edit of one moves the logits of the next."""
    apart = keeps_documents_apart(Checkpoint(folder).model)
    assert apart == (not leaks(reference, 19, 40))
    if not apart:
        record.notes.append("one document a row")
    record.checked.append("packing")


def trained(folder: Path, tmp_path: Path, record: Record) -> Path:
    """A whole run: prefix, importance, steps with a reselection among them, delta."""
    data, heldout = write_tokens(tmp_path / "data.jsonl"), write_tokens(tmp_path / "other.jsonl", samples=6, seed=5)
    places = {"MODEL": folder, "DATASET_PATH": data, "HELDOUT_PATH": heldout, "OUTPUT_DIR": tmp_path / "runs"}
    environ = {**SETTINGS, **places, "RUN_TAG": "run"}
    assert train.main([], {name: str(value) for name, value in environ.items()}) == 0
    run = tmp_path / "runs" / "run"
    assert len(events(run, "step")) == STEPS
    assert [e["grown"] > 0 for e in events(run, "reselect")] == [True]
    losses = [(e["name"], e["loss"]) for e in events(run, "eval")]
    assert len(set(losses)) == len(losses) == 4  # each set's loss has moved
    record.checked.append("run")
    return run / "delta.safetensors"


def read_again(delta: Path, tmp_path: Path, record: Record) -> None:
    """The loss of the saved delta is the run's own, to the bit."""
    assert evaluate.main(["--delta", str(delta), "--json", str(tmp_path / "figures.json")]) == 0
    found = {e["name"]: e["loss"] for e in read_json(tmp_path / "figures.json")["evaluations"]}
    assert found == {e["name"]: e["loss"] for e in events(delta.parent, "eval") if e["step"] == STEPS}
    record.checked.append("reload")


def exported(delta: Path, output: Path, *flags: str) -> Path:
    assert export.main(["--delta", str(delta), "--output", str(output), "--no-evaluate", *flags]) == 0
    return output


def exported_as_trained(folder: Path, delta: Path, tmp_path: Path, record: Record) -> None:
    """Onto the dequantised base: transformers loads the folder and computes what the trained model does."""
    output = exported(delta, tmp_path / "as trained", "--base", "dequantized", "--dtype", "fp32")
    model = with_delta(folder, delta)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, BATCH), reference_of(output)(**RAW).logits, rtol=1e-5, atol=2e-6)


def exported_as_stored(folder: Path, delta: Path, tmp_path: Path, record: Record) -> None:
    """Onto the original weights: names, types and all bytes but those of trained experts and routers are the source's,
    and what transformers loads differs at active weights alone, by their deltas."""
    output = exported(delta, tmp_path / "as stored")
    before, after = raw_tensors(folder), raw_tensors(output)
    head = {n for n in after.keys() - before.keys() if n.endswith("lm_head.weight")}  # where it was the embeddings'
    assert {n: v[:2] for n, v in after.items() if n not in head} == {n: v[:2] for n, v in before.items()}
    assert "tie_word_embeddings" not in (c := read_json(output / "config.json")) or not (
        head and c["tie_word_embeddings"]
    )
    result, checkpoint = load_delta(delta), Checkpoint(folder)
    old, new = (dict(reference_of(f).state_dict()) for f in (folder, output))
    changed = 0
    for name in old:
        if name in result.sparse:
            (indices, values), transposed = result.sparse[name], checkpoint_transposed(checkpoint, name)
            base, now = (w[name].transpose(1, 2).flatten() if transposed else w[name].flatten() for w in (old, new))
            expected = base.clone()
            expected[indices] = (base[indices] + values).to(torch.bfloat16).float()
            assert torch.equal(now, expected), name
            changed += int((now != base).sum())
        elif name in result.whole:
            assert torch.equal(new[name], result.whole[name].to(torch.bfloat16).float()), name
        else:
            assert torch.equal(new[name], old[name]), name
    assert changed > 0
    record.checked.append("export")


def checkpoint_transposed(checkpoint: Checkpoint, target: str) -> bool:
    return bool(getattr(checkpoint.model.get_submodule(target.rpartition(".")[0]), "is_transposed", False))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_computing_in_16_bits_is_close(family: str, tmp_path: Path) -> None:
    """What a card does: forward and backward above a cut in bfloat16, the state entering it included."""
    if not has_interface(family):
        pytest.skip(f"transformers {transformers.__version__} has no experts interface for {family}")
    if family == "deepseek_v4" and not deepseek_v4_computes_in_16_bits():
        pytest.skip(f"transformers {transformers.__version__} cannot compute deepseek_v4 in 16 bits: its norms, kept "
                    "in fp32, hand fp32 on to layers in 16 bits")  # fmt: skip
    folder = write_checkpoint(tmp_path, family)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(folder, dataclasses.replace(choose_backend(False, True), compute_dtype=dtype))
        activate(model)
        cut = model.handover.splits[-2]
        with torch.no_grad():
            state = model.run_layers(BATCH, 0, cut).to(torch.bfloat16).to(dtype)
        hidden = model.run_layers(BATCH, cut, model.num_layers, state)
        loss, gradient = loss_and_gradient(model, hidden, BATCH, 7, 1 / count_targets(BATCH))
        hidden.backward(gradient)
        losses.append(loss)
        for moe in model.moe_from(cut):
            for weight in (moe.router_weight, *(bank.delta for bank in moe.banks)):
                assert weight.grad is not None
                assert weight.dtype == weight.grad.dtype == torch.float32
                assert torch.isfinite(weight.grad).all()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def deepseek_v4_computes_in_16_bits() -> bool:
    """Not in transformers 5.13, where a forward fails whoever loaded the model."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

    return DeepseekV4RMSNorm(4)(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_representative_families_are_known() -> None:
    assert set(REPRESENTATIVE) <= {*CONFIGS, *WRAPPERS}
