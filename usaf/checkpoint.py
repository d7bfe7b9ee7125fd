"""A Hugging Face checkpoint, read a tensor or an expert at a time: what it holds is planned from the headers alone.

Three things meet here: the files (`source_folder`), the model that they are for (`architecture`), and the plan of how
tensors become parameters (`weight_plan`). What the plan calls a tensor is a logical one: a weight in FP8 or four bits
is one tensor, as if it had been saved in 16 bits (`source_formats`).

Left out: writing back in the checkpoint's own names (`merge`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from usaf.architecture import meta_model, read_config
from usaf.errors import UserError
from usaf.experts import is_experts_module, projection_names
from usaf.quantization import Encoding, QuantizedTensor
from usaf.skeleton import Handover, find_decoder, handover
from usaf.source_folder import check_index, read_index, sampled_fingerprint
from usaf.source_formats import FourBit, logical_tensors
from usaf.tensor_file import Shards, TensorEntry, TensorFile
from usaf.weight_plan import Piece, WeightPlan, in_rows


class Checkpoint:
    """`folder`, its `config`, the model class on the meta device (`model`), and the `plan` parameter -> tensors.

    `shards`: the file's own tensors -> their file; `stored`: the logical tensors; `quantization`: what config.json says
    of weights that are not in 16 bits, None where they are.

    Raises:
        UserError: no checkpoint of an MoE language model, or not a whole one. All that headers tell is checked here,
            but that experts are there: they may all be in a 4-bit file.
    """

    def __init__(self, folder: Path, attention: str | None = None) -> None:
        self.folder = folder
        self.config, self.quantization = read_config(folder)
        self.shards = read_index(folder)
        self.raw = Shards(folder, self.shards)
        check_index(self.raw)
        self.stored = logical_tensors(self.raw, self.quantization)
        self.model = meta_model(self.config, attention)
        self.plan = WeightPlan(self.model, self.stored, lambda key: self.stored[key].shape())
        self.sources, self.unexpected = self.plan.sources, self.plan.unexpected
        self._encodings: dict[str, Encoding | None] = {}  # expert parameter -> what `four_bit` says
        self._whole: tuple[str, Tensor] | None = None  # the last parameter that could not be read an expert at a time
        self._check_parameters()

    def file(self, shard: str) -> TensorFile:
        return self.raw.file(shard)

    def entry(self, key: str) -> TensorEntry:
        """Of one of the file's own tensors."""
        return self.raw.entry(key)

    def parts(self, key: str) -> tuple[str, ...]:
        """The file's own tensors that make up a logical one: itself, or codes, scales and what else belongs to them."""
        return self.stored[key].parts

    def format(self, key: str) -> str:
        """How a logical tensor is stored: "plain", "fp8", "int4", "fp4" or "mxfp4" (see `source_formats`)."""
        return self.stored[key].format

    def _check_parameters(self) -> None:
        """Every parameter has its tensors, in a dtype and of a shape that fit. Headers only: tensors without data."""
        wanted = self.model.state_dict()
        experts = {target for pair in self.expert_parameters().values() for target in pair}
        lacking = self.missing(sorted(set(wanted) - experts))
        if lacking:
            raise UserError(f"{self.folder}: has no tensor for {lacking[0]} ({len(lacking)} missing in all); the "
                            "checkpoint is incomplete or config.json is of another model, download it again"
                            )  # fmt: skip
        for target, source in self.sources.items():
            parameter = wanted[target]
            if target in experts:
                self._check_lists(target)
                self._encodings[target] = self._find_encoding(target)
            pieces = source.pieces
            whole = next((p.key for p in pieces if not self.stored_dtype(p.key).is_floating_point), None)
            if parameter.is_floating_point() and whole is not None:  # joined to others, one would pass for a float
                raise UserError(f"{self.folder}: {whole} is stored as {self.stored_dtype(whole)}, which is no type of "
                                "weights; use the 16-bit checkpoint of this model")  # fmt: skip
            found = self.plan.assemble(target, pieces, (self._without_data(piece) for piece in pieces))
            if found.shape != parameter.shape:
                raise UserError(f"{self.folder}: {target} has shape {tuple(found.shape)}, config.json asks for "
                                f"{tuple(parameter.shape)}; the two are of different models, download them again"
                                )  # fmt: skip

    def _check_lists(self, target: str) -> None:
        """A parameter whose experts have tensors of their own has one of each kind for each of them."""
        source, num_experts, lists = self.sources[target], self.plan.shapes[target][0], self.plan.lists(target)
        for pattern in source.converter.source_patterns if source.converter and source.experts_apart else ():
            found = len(lists.get(pattern, []))
            if found != num_experts:
                raise UserError(f"{self.folder}: {target} needs {num_experts} tensors like {pattern}, and the "
                                f"checkpoint has {found}; it is incomplete or config.json is of another model, "
                                "download it again")  # fmt: skip

    def _without_data(self, piece: Piece) -> Tensor:
        stored = self.stored[piece.key]
        return torch.empty(stored.shape(), dtype=stored.dtype(), device="meta")

    def stored_dtype(self, key: str) -> torch.dtype:
        """The type in which a logical tensor is read."""
        return self.stored[key].dtype()

    def tensor(self, key: str) -> Tensor:
        """One logical tensor of the checkpoint."""
        return self.stored[key].read()

    def dtype(self, target: str) -> torch.dtype:
        """What a parameter is read in; its data are not read."""
        return self.stored[self.sources[target].keys[0][0]].dtype()

    def read(self, target: str) -> Tensor:
        """A whole parameter of the model, converted from its checkpoint tensors."""
        pieces = self.sources[target].pieces
        return self.plan.assemble(target, pieces, (self.tensor(piece.key) for piece in pieces))

    def mapped(self, target: str) -> Tensor | None:
        """A whole parameter as a view of the checkpoint's file, not to be written to (`TensorFile.map`); None where it
        is not stored as it is used."""
        source = self.sources[target]
        if source.converter is not None or len(source.keys) != 1:
            return None
        key = source.keys[0][0]
        entry = self.entry(key) if self.format(key) == "plain" else None
        if entry is None or entry.start % self.dtype(target).itemsize:
            return None
        return self.raw.of(key).map(key)

    def read_expert(self, target: str, e: int) -> Tensor:
        """Expert e of a fused parameter [E, a, b], as [a, b]; nothing else of it is read."""
        pieces = self.plan.expert_pieces(target, e)
        if pieces is None:
            # A converter that mixes experts: rare, and then a whole parameter at a time.
            if self._whole is None or self._whole[0] != target:
                self._whole = None
                self._whole = (target, self.read(target))
            weight = self._whole[1][e]
            if e == self.plan.shapes[target][0] - 1:  # they are read in order, and memory is scarce
                self._whole = None
            return weight
        return self.plan.assemble_expert(target, pieces, (self.read_piece(piece) for piece in pieces))[0]

    def read_piece(self, piece: Piece) -> Tensor:
        stored = self.stored[piece.key]
        return stored.read() if piece.rows is None else stored.read_rows(*piece.rows)

    def four_bit(self, target: str) -> Encoding | None:
        """The encoding of an expert parameter that is stored in four bits, to be used as it is; else None."""
        return self._encodings[target]

    def _find_encoding(self, target: str) -> Encoding | None:
        """Raises UserError where only a part is in four bits, or in several ways, or in one that cannot be joined."""
        source = self.sources[target]
        stored = [self.stored[key] for key, _ in source.keys]
        if not any(isinstance(s, FourBit) for s in stored):
            return None
        kinds = {(s.encoding(), s.transposed) if isinstance(s, FourBit) else None for s in stored}
        (encoding, transposed), *others = (kind for kind in kinds if kind is not None)
        if others or None in kinds:
            raise UserError(f"{self.folder}: the experts of {target} are stored in several ways (as {encoding.name} in "
                            f"groups of {encoding.group_size}, and otherwise); use a checkpoint in which they are alike"
                            )  # fmt: skip
        module = self.model.get_submodule(target.rpartition(".")[0])
        if transposed != bool(module.is_transposed) or not in_rows(source.converter):
            raise UserError(f"{self.folder}: {target} is stored in four bits along another dimension than this family "
                            "needs; use this model in 16 bits")  # fmt: skip
        return encoding

    def read_four_bit(self, target: str, e: int) -> QuantizedTensor:
        """Expert e of a parameter that is stored in four bits: [1, out, in], codes and scales as they are.

        The converter joins and reorders rows, which is the same work for codes and for scales, so it does each alone.
        """
        pieces = self.plan.expert_pieces(target, e)
        assert pieces is not None, "a converter that joins rows keeps experts apart"
        read: list[QuantizedTensor] = []
        for piece in pieces:
            stored = self.stored[piece.key]
            assert isinstance(stored, FourBit)
            read.append(stored.quantized(*(piece.rows or ())))
        joined = {}
        for part in read[0].tensors():
            # A tensor of one expert alone has two dimensions in the checkpoint.
            alone = zip(pieces, read, strict=True)
            tensors = [q.tensors()[part][0] if p.rows is None else q.tensors()[part] for p, q in alone]
            joined[part] = self.plan.assemble_expert(target, pieces, tensors)
        return read[0].replace(joined, (1, joined["packed"].shape[1], read[0].shape[2]))

    def missing(self, targets: Iterable[str]) -> list[str]:
        """Those of these parameters that the checkpoint does not hold."""
        return self.plan.missing(targets)

    def sampled_fingerprint(self) -> str:
        return sampled_fingerprint(self.folder, self.shards)

    @cached_property
    def handover(self) -> Handover:
        """What the model's layers hand on to each other. Asked before any module has weights."""
        return handover(self.model)

    def num_layers(self) -> int:
        return len(find_decoder(self.model)[2])

    def moe_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        prefix = len(find_decoder(self.model)[1]) + 1
        return sorted({int(name[prefix:].split(".")[0]) for name in self.expert_parameters()})

    def expert_parameters(self) -> dict[str, tuple[str, str]]:
        """The experts modules of the text part: name -> (full name of the first projection, of the second)."""
        found = {}
        for name, module in self.model.named_modules():
            if is_experts_module(module) and name in self.handover.called:
                up, down = projection_names(module)
                found[name] = (f"{name}.{up}", f"{name}.{down}")
        return found
