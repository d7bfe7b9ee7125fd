"""The whole product on a device that is not the CPU: boundary states, importance, steps, a reselection, evaluation,
checkpoint and delta of five families on the fake device, which refuses what DirectML lacks.

The fake device shows that host and device tensors never meet and that the results are the CPU's; the recorder, that
DirectML would run every operator of it itself. Where torch cannot have the fake device (2.4.1, which torch-directml
pins), the recorder judges the same course on the CPU, with the versions of the kernels that devices use.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from fake_device import AVAILABLE, DEVICE_NAME, FakeTensor, fake_device, to_host
from operators import OperatorRecorder, directml_fallbacks, directml_types, mixed_devices
from source_checkpoints import to_int4, to_mxfp4
from torch import Tensor

from usaf import experts, head_loss, sparse_weights
from usaf.data import DataOrder, Rows
from usaf.delta import load_delta, save_delta
from usaf.devices import Backend
from usaf.devices.cpu import cpu_backend
from usaf.devices.cuda import CudaBackend
from usaf.devices.directml import DirectMLBackend
from usaf.evaluation import Evaluation, evaluate
from usaf.importance import find_important
from usaf.kernels.sampled import sampled_gradient_reference
from usaf.loss import loss_and_gradient
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.run import RunFolder, load_checkpoint
from usaf.selection import overlap
from usaf.session import make_resident
from usaf.settings import Settings
from usaf.trained_parts import open_head, open_norms
from usaf.trainer import ReselectResult, StepResult, Trainer

LAYERS, START, STEPS = 3, 1, 6
FOUR_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4}, "olmoe": {"num_experts": 4}, "deepseek_v3": {"n_routed_experts": 4}
}  # fmt: skip
# Experts that ship in four bits: bfloat16 scales, which this device lacks, and exponents.
NATIVE = {"int4": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 64}),
          "mxfp4": ("gpt_oss", {"intermediate_size": 64})}  # fmt: skip
SETTINGS = Settings(
    steps=STEPS, microbatch=2, accum=1, lr_peak=1e-2, head_lr=5e-3, router_lr=1e-3, weight_decay=0.1, grad_clip=0.1,
    warmup=0.0, reselect_every=2, capture_steps=2, drop_fraction=0.4, reselect_until=0.5, head_chunk_tokens=24,
)  # fmt: skip
needs_fake_device = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that can have a device written in Python")


def directml_backend(device: torch.device) -> Backend:
    """The backend that `usaf.devices.directml` would make, with its tensors on `device`."""
    return DirectMLBackend(
        name="directml", device=device, compute_dtype=torch.float32, reason="", description="", native_bf16=False,
        has_pinned_memory=False, has_streams=False, attention="eager",
    )  # fmt: skip


def cuda_backend(device: torch.device) -> Backend:
    """What a card from sm_80 on gets, with its tensors on `device`."""
    return CudaBackend(
        name="cuda", device=device, compute_dtype=torch.bfloat16, reason="", description="", native_bf16=True,
        has_pinned_memory=True, has_streams=True, attention="sdpa",
    )  # fmt: skip


def packed_rows(count: int = 6) -> Rows:
    """Rows of 13 to 20 tokens, each of two documents told apart by restarting positions; a tenth without a target."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(13, 21, count)
    ids = rng.integers(3, families.VOCAB, lengths.sum()).astype(np.int32)
    labels = np.where(rng.random(len(ids)) < 0.1, -100, ids).astype(np.int32)
    positions = np.concatenate([np.r_[0:6, 0 : length - 6] for length in lengths]).astype(np.int32)
    return Rows(ids, labels, positions, np.r_[0, lengths.cumsum()].astype(np.int64))


@dataclass
class Course:
    """What a short training run came to; every tensor on the host."""

    active: dict[str, Tensor]
    half_overlap: float
    steps: list[StepResult]
    reselections: list[ReselectResult]
    evaluation: Evaluation
    state: dict[str, Tensor]
    recorder: OperatorRecorder


def trainer_of(folder: Path, backend: Backend, cache: Path | None) -> Trainer:
    """The model with its trainable layers on the device, and a trainer without active weights."""
    model, rows = families.build(folder, backend), packed_rows()
    if backend.device.type != "cpu":
        for layer in range(START, model.num_layers):
            model.place(layer, backend.device)
    assert open_head(model)
    open_norms(model, START)
    order = DataOrder(len(rows), 3, SETTINGS.microbatch, seed=0)
    identity: dict[str, object] = {"model": model.base_fingerprint, "device": str(backend.device)}
    states = BoundaryStates(model, rows, order.chunks, START, torch.bfloat16, identity, cache)
    return Trainer(model, states, rows, order, SETTINGS, STEPS)


def train(folder: Path, backend: Backend, cache: Path) -> Course:
    """Boundary states, importance, three steps with the reselection after the second, and an evaluation."""
    torch.manual_seed(0)
    recorder = OperatorRecorder()
    on_host = backend.device.type == "cpu"
    with contextlib.ExitStack() as recording:
        if not on_host:
            recording.enter_context(recorder)
        trainer = trainer_of(folder, backend, cache)
        if on_host and not AVAILABLE:  # after the loading: torch 2.4 makes no tensor of a subclass while it is recorded
            recording.enter_context(recorder)
        trainer.states.fill(lambda _: None)
        found = find_important(trainer.model, trainer.states, trainer.rows, range(4), 0.02, 2, 24, lambda _: None)
        trainer.activate(found.active)
        steps, reselections = [], []
        for _ in range(3):
            steps.append(trainer.train_step())
            reselections += [r for r in [trainer.reselect_if_due()] if r is not None]
        evaluation = evaluate(trainer.model, trainer.states, "in_domain", 24, lambda _: None)
        state = trainer.state().tensors
    active = {name: to_host(indices) for name, indices in found.active.items()}
    state = {name: to_host(tensor).clone() for name, tensor in state.items()}
    return Course(active, found.half_overlap, steps, reselections, evaluation, state, recorder)


class Courses:
    """The course of each family, run once by each backend."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[tuple[str, str], Course] = {}

    def checkpoint(self, family: str) -> Path:
        folder = self.root / family
        if not folder.is_dir():
            name, changes = NATIVE.get(family, (family, FOUR_EXPERTS.get(family, {})))
            families.write_checkpoint(folder, name, num_hidden_layers=LAYERS, **changes)
            if family in NATIVE:
                {"int4": to_int4, "mxfp4": to_mxfp4}[family](folder)
            families.build(folder)  # leaves the 4-bit experts beside it
        return folder

    def on_device(self, family: str) -> Course:
        if (family, "device") not in self.done:
            folder = self.checkpoint(family)
            with fake_device() as device:
                self.done[family, "device"] = train(folder, directml_backend(device), self.root / "cache")
        return self.done[family, "device"]

    def on_cpu(self, family: str) -> Course:
        if (family, "cpu") not in self.done:
            folder, cpu = self.checkpoint(family), torch.device("cpu")
            self.done[family, "cpu"] = train(folder, directml_backend(cpu), self.root / "cache")
        return self.done[family, "cpu"]


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> Courses:
    return Courses(tmp_path_factory.mktemp("courses"))


@needs_fake_device
@pytest.mark.parametrize("family", [*families.FAMILIES, *NATIVE])
def test_directml_runs_every_operator_itself(family: str, courses: Courses) -> None:
    recorder = courses.on_device(family).recorder
    device_calls = recorder.on(DEVICE_NAME)
    for expected in ("aten::mm", "aten::scatter_add_", "aten::topk", "aten::addcdiv_", "aten::index_put_"):
        assert expected in device_calls.operators  # forward, combination, importance, Adam, reselection
    assert directml_fallbacks(device_calls) == []
    assert directml_types(device_calls) == []
    assert mixed_devices(device_calls) == []


@needs_fake_device
@pytest.mark.parametrize("family", [*families.FAMILIES, *NATIVE])
def test_the_device_gives_the_results_of_the_cpu(family: str, courses: Courses) -> None:
    expected, found = courses.on_cpu(family), courses.on_device(family)
    assert len(found.reselections) == 1
    assert found.reselections == expected.reselections
    assert found.reselections[0].dropped > 0
    assert found.half_overlap == pytest.approx(expected.half_overlap)
    assert found.active.keys() == expected.active.keys()
    assert all(torch.equal(found.active[name], indices) for name, indices in expected.active.items())
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert not one.skipped
    assert found.evaluation.loss == pytest.approx(expected.evaluation.loss, rel=1e-5)
    assert replace(found.evaluation, loss=0.0) == replace(expected.evaluation, loss=0.0)
    assert found.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# Always on host tensors: ExpertBank.set_active, evaluation.expert_counts, reading files.
ON_THE_HOST = ("aten::searchsorted.Tensor", "aten::bincount", "aten::set_.source_Storage")


@pytest.mark.skipif(AVAILABLE, reason="the fake device shows it better")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_directml_runs_every_operator_of_the_cpu_recording(
    family: str, courses: Courses, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_kernels(monkeypatch)
    found = directml_fallbacks(courses.on_cpu(family).recorder)
    assert [line for line in found if not line.startswith(ON_THE_HOST)] == []


def use_device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, the versions of the kernels that DirectML would use."""
    monkeypatch.setattr(experts, "INDEX_ADD_DEVICES", ())
    monkeypatch.setattr(experts, "runs_fused", lambda *_: False)
    monkeypatch.setattr(head_loss, "runs_fused", lambda *_: False)
    monkeypatch.setattr(
        sparse_weights, "sampled_gradient", lambda *arguments: sampled_gradient_reference(*arguments[:4])
    )


@pytest.mark.parametrize(
    ("attention", "prepare", "flagged"),
    [("eager", True, []), ("eager", False, ["aten::silu_backward"]), ("sdpa", True, ["aten::_scaled_dot_product"])],
)
def test_what_the_backend_asks_for_is_needed(
    attention: str, prepare: bool, flagged: list[str], courses: Courses, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_kernels(monkeypatch)
    backend = replace(cpu_backend(""), attention=attention)
    model = families.build(courses.checkpoint("qwen3_moe"), backend)
    if prepare:
        directml_backend(backend.device).prepare_model(model.model)
    batch = packed_rows().batch([0, 1])
    for moe in model.moe:
        moe.router_weight.requires_grad_(True)
    with OperatorRecorder() as recorder:
        hidden = model.run_layers(batch, 0, LAYERS)
        hidden.backward(loss_and_gradient(model, hidden, batch, 24, 1.0)[1])
    found = directml_fallbacks(recorder)
    assert bool(found) == bool(flagged), found
    assert all(any(line.startswith(name) for name in flagged) for line in found), found


@needs_fake_device
def test_a_frozen_layer_leaves_the_hosts_tensors_alone(courses: Courses) -> None:
    with fake_device() as device:
        model = families.build(courses.checkpoint("deepseek_v3"), directml_backend(device))
        for layer in range(model.num_layers):
            before = held_tensors(model, layer)
            with model.placed(layer):
                inside = held_tensors(model, layer)
                assert all(isinstance(tensor.data, FakeTensor) for tensor in inside.values())
            after = held_tensors(model, layer)
            assert before.keys() == inside.keys() == after.keys()
            assert all(after[name] is tensor for name, tensor in before.items())


def held_tensors(model: SparseModel, layer: int) -> dict[str, Tensor]:
    held = dict(model.layers[layer].state_dict(keep_vars=True))
    for moe in model.moe:
        if moe.layer == layer:
            for i, bank in enumerate(moe.banks):
                held.update({f"{i}.{name}": getattr(bank.base, name) for name in ("packed", "scale", "offset")})
    return held


@needs_fake_device
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_of_device_tensors_resumes_to_the_bit(family: str, courses: Courses, tmp_path: Path) -> None:
    """Saved inside the capture window, after a step; the resumed trainer reselects and goes on as the first did."""
    folder = courses.checkpoint(family)
    with fake_device() as device:
        first = trainer_of(folder, directml_backend(device), None)
        first.activate({name: torch.arange(0, bank.numel, 97) for name, bank in first.banks.items()})
        first.train_step()
        assert first.in_capture_window()
        run = RunFolder(tmp_path / "run")
        saved = run.save(first.step, first.state(), keep=1)
        run.close()
        second = trainer_of(folder, directml_backend(device), None)
        second.restore(load_checkpoint(saved))
        for trainer in (first, second):
            trainer.train_step()
            assert trainer.reselect_if_due() is not None
            trainer.train_step()
        expected, found = first.state(), second.state()
        assert found.about == expected.about
        assert found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name].cpu(), tensor.cpu()), name
        device_names = {name for name, tensor in found.tensors.items() if isinstance(tensor, FakeTensor)}
        assert {name.partition("/")[0] for name in device_names} == {"active", "delta", "whole", "adam"}


@needs_fake_device
def test_the_delta_of_device_tensors_is_the_one_trained(courses: Courses, tmp_path: Path) -> None:
    with fake_device() as device:
        trainer = trainer_of(courses.checkpoint("mixtral"), directml_backend(device), None)
        trainer.activate({name: torch.arange(0, bank.numel, 97) for name, bank in trainer.banks.items()})
        trainer.train_step()
        save_delta(tmp_path / "delta.safetensors", trainer.delta({"step": 1}))
        active = {name: to_host(bank.active) for name, bank in trainer.banks.items()}
    loaded = load_delta(tmp_path / "delta.safetensors")
    for name, bank in trainer.banks.items():
        indices, values = loaded.sparse[name]
        assert torch.equal(indices, active[name])
        assert torch.equal(values, to_host(bank.delta.detach()))
        assert bool((values != 0).any())
    for name, router in trainer.routers.items():
        assert torch.equal(loaded.whole[name], to_host(router.weight.detach()))  # type: ignore[operator]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_training_in_bfloat16_follows_float32(family: str, courses: Courses, tmp_path: Path) -> None:
    """The arithmetic of a CUDA card, on the CPU: routers, deltas and moments stay float32."""
    exact = courses.on_cpu(family)
    found = train(courses.checkpoint(family), cuda_backend(torch.device("cpu")), tmp_path)
    kept = {tensor.dtype for name, tensor in found.state.items() if not name.startswith("random")}
    assert kept == {torch.float32, torch.int64, torch.int32}
    for one, other in zip(found.steps, exact.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.005)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.05)
    assert found.evaluation.loss == pytest.approx(exact.evaluation.loss, rel=0.005)
    agreement = [overlap(found.active[name], indices) for name, indices in exact.active.items()]
    assert min(agreement) > 0.8  # a token near the border between two experts may change sides
    assert len(found.reselections) == 1


@needs_fake_device
def test_bfloat16_on_the_fake_device(courses: Courses, tmp_path: Path) -> None:
    folder = courses.checkpoint("qwen3_moe")
    expected = train(folder, cuda_backend(torch.device("cpu")), tmp_path / "cpu")
    with fake_device(refuse=(torch.float64,)) as device:
        found = train(folder, cuda_backend(device), tmp_path / "device")
    assert mixed_devices(found.recorder.on(DEVICE_NAME)) == []
    assert [step.loss for step in found.steps] == pytest.approx([step.loss for step in expected.steps], rel=0.01)
    # index_add and scatter_add, and the two forms of sdpa, round differently in 16 bits
    assert min(overlap(found.active[name], indices) for name, indices in expected.active.items()) > 0.8


@needs_fake_device
@pytest.mark.parametrize("family", NATIVE)
def test_native_experts_have_the_same_bits_on_a_device_without_bf16(family: str, courses: Courses) -> None:
    """Decoded there, and held there in fp32."""
    host = families.build(courses.checkpoint(family))
    with fake_device() as device:
        model = families.build(courses.checkpoint(family), directml_backend(device))
        model.place(START, device)
        for mine, theirs in zip(host.moe_from(START)[:1], model.moe_from(START)[:1], strict=True):
            for bank, there in zip(mine.banks, theirs.banks, strict=True):
                assert there.device.type == device.type
                for resident in (False, True):
                    if resident:
                        make_resident(there)
                        assert there.resident is not None
                        assert there.resident.dtype == torch.float32
                    found = to_host(there.weight(1, torch.float32))
                    assert torch.equal(found, bank.weight(1, torch.float32))


@needs_fake_device
def test_tied_weights_are_one_tensor_on_the_device(tmp_path: Path) -> None:
    families.write_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2, tie_word_embeddings=True)
    with fake_device() as device:
        model = families.build(tmp_path, directml_backend(device))
        head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        assert head.weight is embedding.weight
        assert head.weight.device.type == device.type
