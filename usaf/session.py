"""Everything a command needs before it works: device, checkpoint, data, 4-bit experts, model, boundary states.

`prepare` checks all that can be checked cheaply (settings, headers, data) before anything is written; `load` then
makes or maps the 4-bit file and builds the model. Training and evaluation both come this way, with the same decisions,
so they compute the same bits. Commands that need no data begin with `prepare_model` instead.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from usaf import __version__
from usaf.checkpoint import Checkpoint
from usaf.console import LateBar, phase, say
from usaf.data import DataOrder, Rows, TrainingData, build_training_data, enough
from usaf.delta import Delta, scaled
from usaf.delta_scale import MOST_SEQUENCES, Sequences, chosen_rows
from usaf.demo import DEMO_MODEL, build_demo_text
from usaf.devices import Backend, choose_backend
from usaf.errors import UserError, one_line
from usaf.evaluation import Evaluation, evaluate
from usaf.expert_bank import ExpertBank
from usaf.expert_store import ExpertStore, check_store, find_path, open_or_make, read_store
from usaf.files import fingerprint
from usaf.fused_experts import runs_fused
from usaf.learning_rate import rows_beyond
from usaf.memory import available_bytes
from usaf.memory_limit import Kept, keep_to_limit
from usaf.model import SparseModel, build_model
from usaf.packing import keeps_documents_apart
from usaf.prefix import BoundaryStates, cache_dtype, chunked
from usaf.quantization import dequantize
from usaf.settings import CACHE_FOLDER, ResolvedSettings, Settings
from usaf.source_folder import resolve_model
from usaf.sparse_weights import SparseWeights
from usaf.trained_parts import open_head, open_norms
from usaf.workspace import PRIVATE, Workspace

PhaseDone = Callable[[str, float], None]
RESIDENT_MARGIN = 1.25  # with a resident copy an expert's product must be faster by this much to be worth its memory
RESIDENT_ROWS = 64  # of such a product: the tokens that an expert gets of 1,024, 8 of 128 experts a token
RESIDENT_SHARE = 0.5  # and take no more than this share of the free memory


@dataclass(kw_only=True)
class ModelSession:
    """One prepared command, as far as its model goes. `decisions`: every choice that a measurement or the machine made,
    kept with the results."""

    settings: ResolvedSettings
    backend: Backend
    checkpoint: Checkpoint
    decisions: dict[str, Any]
    store: ExpertStore | None = None  # the 4-bit experts, where there are any yet
    model: SparseModel = field(init=False)
    loaded: bool = False  # whether `model` is there
    own: dict[str, Tensor] | None = None  # where a delta is applied, the checkpoint's own routers and norms

    @property
    def start(self) -> int:
        assert self.settings.values.train_from is not None
        return self.settings.values.train_from


@dataclass(kw_only=True)
class Session(ModelSession):
    """One prepared command with its data."""

    data: TrainingData
    order: DataOrder | None = None
    kept: Kept | None = None  # what keeps it to its MEMORY_LIMIT

    def __post_init__(self) -> None:
        self.stored_dtype = stored_dtype(self.checkpoint)

    def workspace(self, what: str) -> Workspace | None:
        """Where these buffers lie (see `budget.SPILLABLE`); None is private memory."""
        mapped = what in self.decisions.get("mapped_buffers", ()) and self.backend.device.type == "cpu"
        return Workspace(cache_folder(self.settings.values)) if mapped else None

    def chunk_rows(self, rows: Rows) -> int:
        """Sequences in one chunk of the prefix."""
        return max(1, self.settings.values.prefix_chunk_tokens // rows.longest())

    def identity(self) -> dict[str, object]:
        """What determines the boundary states beside the sequences: model, versions, arithmetic."""
        return {
            "model": self.model.base_fingerprint,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "usaf": __version__, "device": self.backend.name, "device name": self.backend.description,
            "compute": str(self.backend.compute_dtype),
            "threads": self.decisions["threads"], "cpu": self.decisions["cpu_capability"],
            "attention": self.decisions["attention"],
        }  # fmt: skip

    def boundary(self, rows: Rows, chunks: list[list[int]], cached: bool = True) -> BoundaryStates:
        values = self.settings.values
        folder = cache_folder(values) if values.use_frozen_cache and cached else None
        dtype = cache_dtype(values.cache_dtype, self.stored_dtype)
        return BoundaryStates(
            self.model, rows, chunks, self.start, dtype, self.identity(), folder, values.frozen_cache_n,
            self.decisions.get("stretch_bytes"), self.workspace("stretch") or PRIVATE,
        )  # fmt: skip

    def unseen_states(self) -> BoundaryStates:
        """Those of rows that do not train, computed when they are needed."""
        return self._untrained(self.data.unseen, range(len(self.data.unseen)))

    def scale_sequences(self) -> Sequences | None:
        """Those that DELTA_SCALE is measured on; None where the data have too few. An epoch leaves hardly any unseen:
        then in_domain's samples, which choose nothing else, are among them."""
        for rows in (self.data.unseen, self.data.untrained):
            if enough(rows):
                states = self._untrained(rows, chosen_rows(rows))
                return Sequences(states, evaluated=rows is self.data.untrained)
        return None

    def _untrained(self, rows: Rows, chosen: Sequence[int]) -> BoundaryStates:
        chunks = chunked(len(chosen), self.chunk_rows(self.data.train))
        return self.boundary(rows, [[chosen[i] for i in chunk] for chunk in chunks], cached=False)

    def evaluation_sets(self) -> dict[str, Rows]:
        return {"in_domain": self.data.in_domain, **self.data.heldout}

    def evaluation_states(self) -> dict[str, BoundaryStates]:
        return {
            name: self.boundary(rows, chunked(len(rows), self.chunk_rows(rows)))
            for name, rows in self.evaluation_sets().items()
        }

    @cached_property
    def data_fingerprint(self) -> str:
        """Of every sequence that is trained on or evaluated."""
        sets = {name: rows.fingerprint() for name, rows in self.evaluation_sets().items()}
        return fingerprint({**sets, "train": self.data.train.fingerprint()})


def output_folder(values: Settings) -> Path:
    return Path(values.output_dir).expanduser()


def cache_folder(values: Settings) -> Path:
    if values.prefix_cache_dir is not None:
        return Path(values.prefix_cache_dir).expanduser()
    return output_folder(values) / CACHE_FOLDER


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the checkpoint's dense weights (of its embeddings)."""
    for target in checkpoint.sources:
        if "embed" in target:
            return checkpoint.dtype(target)
    return torch.bfloat16


def versions() -> dict[str, str]:
    return {
        "usaf": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "safetensors": safetensors.__version__, "python": platform.python_version(), "system": platform.platform(),
    }  # fmt: skip


def prepare(settings: ResolvedSettings, decisions: dict[str, Any] | None = None, train: bool = True) -> Session:
    """Check settings against checkpoint and data, and read the data. Nothing is written but the demo's texts.

    decisions: those of an earlier process, which this one must share (resume, evaluation).
    train: False reads one training sequence only.
    """
    base = prepare_model(settings, decisions)
    data = read_data(base.settings, base.checkpoint, train)
    settings = resolve_steps(base.settings, data.train) if train else base.settings
    kept = None
    if train and settings.values.memory_limit is not None:  # an evaluation has its run's chunk sizes and decisions
        kept = keep_to_limit(
            settings, base.checkpoint, data, base.decisions["threads"],
            resumes=decisions is not None, quantises=base.store is None, on_device=base.backend.device.type != "cpu",
        )  # fmt: skip
        settings = kept.settings
        base.decisions.update(kept.decisions)
    session = Session(
        settings=settings, backend=base.backend, checkpoint=base.checkpoint, decisions=base.decisions, store=base.store,
        data=data, kept=kept,
    )  # fmt: skip
    if train:
        rows, values = session.data.train, settings.values
        session.order = DataOrder(len(rows), session.chunk_rows(rows), values.microbatch, values.seed)
    return session


def prepare_model(settings: ResolvedSettings, decisions: dict[str, Any] | None = None) -> ModelSession:
    """Check settings against the checkpoint; no data are read, and nothing is written."""
    values = settings.values
    backend = choose_backend(values.use_cuda, values.use_amp)
    chosen = decide(values, backend, decisions or {})
    torch.set_num_threads(chosen["threads"])
    attention = chosen["attention"]
    checkpoint = Checkpoint(resolve_model(values.model or str(DEMO_MODEL)), None if attention == "sdpa" else attention)
    return ModelSession(
        settings=resolve_train_from(settings, checkpoint), backend=backend, checkpoint=checkpoint, decisions=chosen,
        store=open_quantised(checkpoint, values),
    )  # fmt: skip


def settings_of_run(delta: Delta, arguments: argparse.Namespace) -> ResolvedSettings:
    """The settings of the run that saved `delta`, but for what the flags of `console.add_delta_flags` say has moved."""
    if not {"settings", "decisions", "step"} <= delta.about.keys():
        raise UserError(f"{arguments.delta}: does not say how it was trained; give the delta.safetensors that the run "
                        "wrote")  # fmt: skip
    settings = ResolvedSettings.from_json(delta.about["settings"])
    if arguments.use_cuda is not None:
        settings = settings.replace("flag", use_cuda=arguments.use_cuda == "1")
    moved = {"model": arguments.model, "quant_path": arguments.quant}
    settings = settings.replace("flag", **{name: value for name, value in moved.items() if value is not None})
    used = delta.about["decisions"]["quant_path"]
    # A base that has moved has its own 4-bit file beside it.
    if arguments.model is None and settings.values.quant_path is None and Path(used).is_file():
        settings = settings.replace("run", quant_path=used)
    return settings


def decide(values: Settings, backend: Backend, earlier: dict[str, Any]) -> dict[str, Any]:
    """Every choice that the machine makes and that decides bits; an earlier process's choices stand."""
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = {
        "threads": values.cpu_threads or torch.get_num_threads(),
        "attention": values.attention if values.attention != "auto" else backend.attention,
        "resident": None,
        **earlier,
        # Facts of this machine, which cannot be taken over.
        "cpu_capability": capability,
        "device": backend.name,
        "compute": str(backend.compute_dtype).removeprefix("torch."),
    }
    if backend.attention == "eager":
        chosen["attention"] = "eager"  # the other one would leave this device
    if earlier and earlier["cpu_capability"] != capability:
        say(f"warning: this began on a processor with {earlier['cpu_capability']}, and this one has {capability}: "
            "results may differ in their last bits")  # fmt: skip
    return chosen


def open_quantised(checkpoint: Checkpoint, values: Settings) -> ExpertStore | None:
    """The 4-bit file, if it is there; one of another model or of other settings is refused before the data are read."""
    path, there = find_path(checkpoint, values.quant_path)
    if not there:
        return None
    store = read_store(path)
    check_store(store, checkpoint, values.group_size, values.quant_bits)
    return store


def resolve_train_from(settings: ResolvedSettings, checkpoint: Checkpoint) -> ResolvedSettings:
    return settle_train_from(settings, checkpoint.num_layers(), checkpoint.handover.splits, checkpoint.moe_layers())


def settle_train_from(
    settings: ResolvedSettings, layers: int, splits: Sequence[int], moe_layers: Sequence[int]
) -> ResolvedSettings:
    """TRAIN_FROM for a model of so many layers, which can be cut at `splits`, those of `moe_layers` with experts."""
    start, cuts = settings.values.train_from, splits[:-1]
    if start is None:
        start = max(cut for cut in cuts if cut <= layers - max(1, layers // 6))
        settings = settings.replace("default", train_from=start)
    if start >= layers:
        raise UserError(f"TRAIN_FROM={start}: the model has {layers} layers, counted from 0; choose 0 to {layers - 1}")
    if not any(layer >= start for layer in moe_layers):
        raise UserError(f"TRAIN_FROM={start}: no MoE layer at or above it (they are {min(moe_layers)} to "
                        f"{max(moe_layers)}); choose at most {max(moe_layers)}")  # fmt: skip
    if start not in cuts:
        below, *above = max(c for c in cuts if c < start), *(c for c in cuts if c > start)
        choice = f"{below} or {above[0]}" if above else f"{below}"
        raise UserError(f"TRAIN_FROM={start}: in this family layer {start} goes on with what an earlier layer computed "
                        f"for both (such as the tokens to attend to), so they train together; choose {choice}"
                        )  # fmt: skip
    return settings


def resolve_steps(settings: ResolvedSettings, rows: Rows) -> ResolvedSettings:
    values = settings.values
    if values.epochs == 0:
        return settings
    per_step = values.microbatch * values.accum
    return settings.replace("data", steps=max(1, -(-len(rows) * values.epochs // per_step)))


def read_data(settings: ResolvedSettings, checkpoint: Checkpoint, train: bool) -> TrainingData:
    values = settings.values
    demo = build_demo_text() if values.dataset_path is None else None
    if values.heldout_path is not None:
        heldout: list[str] | None = [part.strip() for part in values.heldout_path.split(",")]
    else:
        heldout = [str(path) for path in demo.heldout] if demo is not None else None
    own_domain = demo is not None and values.model is None
    rows = max(values.steps * values.accum * values.microbatch, values.importance_samples)
    apart = keeps_documents_apart(checkpoint.model)
    data = build_training_data(
        values.dataset_path or str(demo.train),  # type: ignore[union-attr]
        heldout,
        read_tokenizer(checkpoint.folder),
        vocab_size=checkpoint.config.get_text_config().vocab_size,
        seq_len=values.seq_len,
        rows_needed=1 if not train else None if values.epochs else rows,
        unseen_rows=max(0 if values.epochs else rows_beyond(values, rows), MOST_SEQUENCES) if train else 0,
        eval_rows=values.eval_samples,
        in_domain_fraction=values.in_domain_fraction,
        seed=values.seed,
        one_document_per_row=not apart,
        extra_eval={"forgetting_python": demo.forgetting} if own_domain else None,  # type: ignore[union-attr]
    )
    if not apart:
        data.notes.append("one document a row: layers of this family see across packed documents")
    check_context(data, checkpoint, values.seq_len)
    return data


def check_context(data: TrainingData, checkpoint: Checkpoint, seq_len: int) -> None:
    """Refuse sequences beyond the model's context."""
    limit = context_length(checkpoint)
    for name, rows in {"train": data.train, "in_domain": data.in_domain, **data.heldout}.items():
        if limit is not None and rows.longest() > limit:
            raise UserError(f"SEQ_LEN={seq_len}: the sequences of {name} reach {rows.longest()} tokens, and the "
                            f"model's context is {limit}; lower SEQ_LEN, or shorten the samples")  # fmt: skip


def context_length(checkpoint: Checkpoint) -> int | None:
    """Tokens that the model can see at once; None where its family has no limit."""
    return getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)


def read_tokenizer(folder: Path, otherwise: str = ", or give data of token ids") -> PreTrainedTokenizerBase | None:
    """None where the folder has none: data of token ids needs none. otherwise: what to do but restore it."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({one_line(error)[:200]}); restore the tokenizer's files"
            f"{otherwise}"
        ) from None


def load(session: ModelSession, done: PhaseDone | None = None) -> None:
    """The 4-bit experts (made where there are none), the model, and its trainable layers in their place."""
    values = session.settings.values
    bar = LateBar("quantise", "expert", done)
    try:
        session.store = store = session.store or open_or_make(
            session.checkpoint, values.quant_path, values.group_size, values.quant_bits, bar
        )
    finally:
        bar.abandon()
    began = time.perf_counter()
    session.model = build_model(session.checkpoint, store, session.backend)
    session.loaded = True
    for layer in range(session.start, session.model.num_layers):
        if session.backend.device.type != "cpu":
            session.model.place(layer, session.backend.device)
    open_parts(session)
    session.decisions["quant_path"] = str(store.path)
    kept = session.kept if isinstance(session, Session) else None
    choose_resident(session, None if kept is None else kept.room_bytes)
    if done is not None:
        done("load", time.perf_counter() - began)


def open_parts(session: ModelSession) -> None:
    """TRAIN_HEAD, TRAIN_NORMS: what trains beside experts and routers."""
    values = session.settings.values
    if values.train_head and not open_head(session.model):
        say("head: frozen, since this family does more with its output than a linear layer (TRAIN_HEAD=0 is the same)")
    if values.train_norms:
        open_norms(session.model, session.start)


def choose_resident(session: ModelSession, room_bytes: int | None = None) -> None:
    """USE_RESIDENT: keep the trainable layers' base decoded in 16 bits where that is faster and fits.

    room_bytes: what MEMORY_LIMIT leaves for them.
    """
    banks = [bank for moe in session.model.moe_from(session.start) for bank in moe.banks]
    chosen = session.decisions["resident"]
    setting = session.settings.values.use_resident
    # It decides no bit, so a setting or a limit given on resume counts.
    if chosen is None or setting != "auto" or room_bytes is not None:
        chosen, reason = decide_resident(banks, setting, session.backend, room_bytes)
        session.decisions["resident"], session.decisions["resident_reason"] = chosen, reason
        say(f"resident experts: {'yes' if chosen else 'no'} ({reason})")
    if chosen:
        for bank in banks:
            make_resident(bank)


def decide_resident(
    banks: list[ExpertBank], setting: str, backend: Backend, room_bytes: int | None = None
) -> tuple[bool, str]:
    """(whether, why). `auto` times a product with one expert decoded for it against one with its 16-bit copy, and looks
    at the memory that the copies would take: the host's free memory, or a share of the card's, and no more than
    `room_bytes` of the host's where MEMORY_LIMIT leaves so many."""
    if setting in ("0", "1"):
        return setting == "1", f"USE_RESIDENT={setting}"
    needed = sum(bank.base.resident_dtype().itemsize * bank.numel for bank in banks)
    if room_bytes is not None and backend.device.type == "cpu" and needed > room_bytes:
        return False, f"decoded copies would take {needed / 1e9:.2f} GB, and MEMORY_LIMIT leaves {room_bytes / 1e9:.2f}"
    free = available_bytes() if backend.device.type == "cpu" else backend.total_memory_bytes()
    if free is None:
        return False, f"{backend.name} does not say how much memory it has"
    if needed > RESIDENT_SHARE * free:
        return False, f"decoded copies would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB"
    decode, resident = (product_seconds(banks[0], resident, backend) for resident in (False, True))
    return decode > RESIDENT_MARGIN * resident, (
        f"an expert's product takes {decode * 1e3:.2f} ms with decoding, {resident * 1e3:.2f} ms with a decoded copy; "
        f"the copies take {needed / 1e9:.2f} GB"
    )


@torch.no_grad()
def product_seconds(bank: ExpertBank, resident: bool, backend: Backend) -> float:
    """The time that one expert of a bank like this one takes for `RESIDENT_ROWS` tokens; the best of five."""
    alone = ExpertBank(bank.base.expert(0))
    if resident:
        make_resident(alone)
    x = torch.ones(RESIDENT_ROWS, bank.in_features, dtype=backend.compute_dtype, device=bank.device)
    fused = runs_fused(x, alone, alone)
    buffer = torch.empty(bank.part_size if fused else 0)

    def product() -> Tensor:
        return x @ (alone.decode(0, buffer, alone.delta) if fused else alone.weight(0, x.dtype)).t()

    threads = torch.get_num_threads()
    if fused:
        torch.set_num_threads(1)  # as in `workers`: an expert's product runs on one core
    try:
        seconds(product, backend)  # compiling, and first touches
        return min(seconds(product, backend) for _ in range(7))
    finally:
        torch.set_num_threads(threads)


def seconds(work: Callable[[], object], backend: Backend) -> float:
    began = time.perf_counter()
    work()
    backend.synchronize()
    return time.perf_counter() - began


def make_resident(bank: ExpertBank) -> None:
    """One expert at a time, so that no wider copy of the bank exists."""
    dtype = bank.base.resident_dtype()
    copies = torch.empty(bank.base.shape, dtype=dtype, device=bank.device)
    for e in range(bank.num_experts):
        copies[e] = dequantize(bank.base.expert(e), dtype)[0]
    bank.resident = copies


def apply_delta(session: ModelSession, delta: Delta, path: Path, scale: float = 1.0) -> Delta:
    """Put a trained result, or `scale` of it, onto its base, instead of one that is there, and return what was put
    there; refuses one of another base."""
    refuse_other(session, delta, path)
    if session.own is None:
        session.own = session.model.own_weights()
    delta = scaled(delta, scale, session.own)
    sparse, whole = places_of_delta(session)
    for name, (indices, values) in delta.sparse.items():
        sparse[name].set_active(indices, values)
        sparse[name].delta.requires_grad_(False)
    for name, weight in delta.whole.items():
        whole[name].data.copy_(weight)
    return delta


def places_of_delta(session: ModelSession) -> tuple[dict[str, SparseWeights[Any]], dict[str, torch.nn.Parameter]]:
    """(what trains in chosen weights, what trains whole), by name."""
    whole = session.model.whole_weights(session.start, routers=session.settings.values.router_lr > 0)
    return session.model.sparse_weights(session.start), whole


def refuse_other(session: ModelSession, delta: Delta, path: Path) -> None:
    """A delta that does not belong on this model is a UserError."""
    if delta.base_fingerprint != session.model.base_fingerprint:
        raise UserError(f"{path}: was trained on another base than {session.checkpoint.folder} with "
                        f"{session.decisions['quant_path']}; give the model and the 4-bit file it was trained "
                        "on")  # fmt: skip
    refuse_misfit(delta, *places_of_delta(session), path)


def refuse_misfit(
    delta: Delta, sparse: dict[str, SparseWeights[Any]], whole: dict[str, torch.nn.Parameter], path: Path
) -> None:
    """A delta of this base holds every trained parameter, and nothing beyond their shapes."""
    for name in sorted(delta.sparse.keys() ^ sparse.keys() | delta.whole.keys() ^ whole.keys()):
        raise UserError(f"{path}: {name} is in only one of the delta and the layers that it trained; the file is "
                        "damaged, copy it again, or run again")  # fmt: skip
    for name, (indices, _) in delta.sparse.items():
        if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < sparse[name].numel:
            raise UserError(f"{path}: {name} has indices from {int(indices[0])} to {int(indices[-1])}, and the model's "
                            f"weights there are 0 to {sparse[name].numel - 1}; the file is damaged, copy it again, or "
                            "run again")  # fmt: skip
    for name, weight in delta.whole.items():
        if weight.shape != whole[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(weight.shape)}, and the model's is "
                            f"{tuple(whole[name].shape)}; the file is damaged, copy it again, or run again"
                            )  # fmt: skip


def fill_all(states: list[BoundaryStates], done: PhaseDone | None = None) -> None:
    """The frozen prefix over everything that the run will use and the cache lacks."""
    pending = sum(s.pending_tokens() for s in states)
    if pending == 0:
        return
    say(f"frozen prefix: states are kept in {next(s.cache.folder.parent for s in states if s.cache is not None)}")
    with phase("frozen prefix", pending, "tok", done) as bar:
        for state in states:
            for note in state.fill(bar.update):
                say(note)


def evaluate_all(
    session: Session, states: dict[str, BoundaryStates], done: PhaseDone | None = None,
    after_chunk: Callable[[], None] = lambda: None,
) -> list[Evaluation]:  # fmt: skip
    """Every set, in their order. `after_chunk` may raise, and so give it up."""
    tokens = sum(s.rows.length(row) for s in states.values() for chunk in s.chunks for row in chunk)
    results = []
    with phase("evaluate", tokens, "tok", done) as bar:

        def progress(tokens: int) -> None:
            bar.update(tokens)
            after_chunk()

        for name, state in states.items():
            results.append(evaluate(session.model, state, name, session.settings.values.head_chunk_tokens, progress))
    return results


def default_tag() -> str:
    return time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid() % 1000:03d}"
