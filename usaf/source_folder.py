"""Where a checkpoint lies, and which files hold its tensors: a local folder, or one in the model hub's own cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath

from huggingface_hub.errors import HTTPError

from usaf.errors import UserError, one_line
from usaf.tensor_file import Shards, TensorFile

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
# 4 KiB blocks of each shard that stand for its content where hashing 60 GB would take minutes.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096
HUB_SECONDS = 10.0  # the model hub must answer within these, or what is in its cache must do
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
HUB_NOT = ["*/*", "consolidated*"]  # the same weights again, in the formats of other programs


def resolve_model(model: str) -> Path:
    """A local folder, or a model id whose files are fetched into the hub's own cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such folder; give a folder with config.json and safetensors files, or a "
                        "model id such as Qwen/Qwen3-30B-A3B")  # fmt: skip
    return from_hub(model)


def from_hub(model: str) -> Path:
    """The folder of a model id in the hub's cache, fetched there if need be.

    One short question goes first: without a network the hub's client may wait for minutes, and what is in the cache
    needs none.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except (OSError, ValueError, HTTPError) as error:
        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            raise unobtainable(model, error) from None
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT))
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise unobtainable(model, error) from None


def resolve_config(model: str) -> Path:
    """A folder with the config.json of a model, and perhaps no more: of an id, that file alone is fetched."""
    if Path(model).expanduser().is_dir() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return resolve_model(model)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", etag_timeout=HUB_SECONDS)).parent
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise unobtainable(model, error) from None


def unobtainable(model: str, error: BaseException) -> UserError:
    return UserError(f"MODEL={model}: no such folder here, and the model hub could not give it "
                     f"({type(error).__name__}: {one_line(error)[:200]}); check the name and the network, or download "
                     "it and give the folder")  # fmt: skip


def read_index(folder: Path) -> dict[str, str]:
    """checkpoint key -> shard file name. A single file goes before an index, as in transformers."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return dict.fromkeys(TensorFile(single).entries, SINGLE_NAME)
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError):
            weight_map = None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: is not a checkpoint index (JSON with a weight_map); download it again")
        for shard in sorted(set(weight_map.values())):
            if shard in ("", "..") or PurePath(shard).name != shard or "\\" in shard:  # an export would write there
                raise UserError(f"{index}: names {shard!r} as a shard, which must be a file beside it; move the file "
                                "there and correct the index, or download them again")  # fmt: skip
        return weight_map
    hint = "; convert its .bin files with save_pretrained first" if list(folder.glob("*.bin")) else ""
    raise UserError(
        f"MODEL={folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}; give a checkpoint in safetensors{hint}"
    )


def check_index(raw: Shards) -> None:
    """Every tensor that the index names is in its shard. Headers only."""
    for key, shard in sorted(raw.where.items(), key=lambda item: (item[1], item[0])):
        if key not in raw.file(shard).entries:
            raise UserError(f"{raw.folder / INDEX_NAME}: says that {shard} holds {key}, which it does not; "
                            "index and shards are of different checkpoints, download them again")  # fmt: skip


def sampled_fingerprint(folder: Path, shards: Mapping[str, str]) -> str:
    """Sizes and evenly spaced blocks of every shard: tells another model, or the same one after a fine-tune."""
    digest = hashlib.sha256()
    for shard in sorted(set(shards.values())):
        path = folder / shard
        size = path.stat().st_size
        digest.update(f"{shard} {size}".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLED_BLOCKS):
                file.seek(max(0, (size - BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1)))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
