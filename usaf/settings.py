"""Every setting of the main job: its name, default, meaning and rule, stated once.

The fields of `Settings` are the one definition from which come the environment variables (`LR_PEAK`), the flags
(`--lr-peak`), the checks, the printed table, `--help` and the README's table. A flag goes before the environment, the
environment before the default; where `MODEL` is set by neither, the bundled demo's own values go before the defaults.

Whatever a user can get wrong ends in one `UserError` line (setting, value, rule, remedy), the first problem only, in
this order: flags, misspelt environment names, values, contradictions. A misspelt environment name would otherwise be
silence: `STEP=10` would train 180 steps. Hence every environment name in capitals that is no setting, but at most two
edits from one, is refused; `USAF_IGNORE` lists the names that may stay.

    edits(a, b) = the fewest insertions, deletions, substitutions and swaps of neighbours that turn a into b
                  (optimal string alignment: no part of a is edited twice)

Left out: a configuration file (environment and flags only), and every check that needs the model, the data or the
device; values settled there come in by `ResolvedSettings.replace`. No torch here, so that `--help` is instant.

Source: Damerau, "A technique for computer detection and correction of spelling errors", CACM 7(3), 1964.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from usaf.errors import UserError

IGNORE_VARIABLE = "USAF_IGNORE"
MAX_EDITS = 2
CACHE_FOLDER = "cache"
"""The prefix cache's place in OUTPUT_DIR, which users may delete: no run may live there."""
OTHER_TOOLS = {"FC"}
"""Names within two edits of a setting (FRAC) that belong to every compiler's environment."""

_WORDS = {"1": "1", "true": "1", "yes": "1", "on": "1", "0": "0", "false": "0", "no": "0", "off": "0"}
_WINDOWS_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?", re.IGNORECASE)


# ---- rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What a setting may be. `rule` ends the sentence "must be ..."; `parse` reads a user's text (ValueError where it
    cannot), `accepts` judges a value already of its Python type; `metavar` stands for the value in --help."""

    rule: str
    parse: Callable[[str], object]
    accepts: Callable[[Any], bool]
    metavar: str


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(rule: str, holds: Callable[[int], bool]) -> Check:
    return Check(f"a whole number {rule}", int, lambda value: _is_whole(value) and holds(value), "N")


def _at_least(least: int) -> Check:
    return _whole(f"of at least {least}", lambda value: value >= least)


def _real(rule: str, holds: Callable[[float], bool]) -> Check:
    def accepts(value: Any) -> bool:
        return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max and holds(value)

    return Check(f"a finite number {rule}", float, accepts, "X")


def _share(highest: float = 1.0) -> Check:
    return _real(f"from 0 to {_shown(highest)}", lambda value: 0 <= value <= highest)


def _text(rule: str, metavar: str, holds: Callable[[str], bool] = bool) -> Check:
    return Check(rule, str, lambda value: isinstance(value, str) and holds(value), metavar)


def _choice(*names: str) -> Check:
    """One of `names` in any case; where "0" and "1" are among them, true/false, yes/no and on/off stand for them."""

    def parse(text: str) -> str:
        name = text.strip().lower()
        return _WORDS.get(name, name)

    return Check(
        f"{', '.join(names[:-1])} or {names[-1]}", parse, lambda value: value in names, "{" + ",".join(names) + "}"
    )


def _switch() -> Check:
    def parse(text: str) -> bool:
        try:
            return _WORDS[text.strip().lower()] == "1"
        except KeyError as error:
            raise ValueError(text) from error

    return Check("0 or 1 (or false/true, no/yes, off/on)", parse, lambda value: isinstance(value, bool), "{0,1}")


def parse_size(text: str) -> int:
    """Bytes of a size such as "8GB", "7.5 GiB" or "8000MB". Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(I?)B", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(text)
    number, prefix, binary = found.groups()
    return int(Decimal(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix.upper())))


def _is_size(text: str) -> bool:
    try:
        return parse_size(text) > 0
    except ValueError:
        return False


def _is_folder_name(tag: str) -> bool:
    """Whether `tag` names one folder on Linux, macOS and Windows alike (Windows drops a last dot, so none may end)."""
    plain = re.fullmatch(r"[A-Za-z0-9._-]{1,100}", tag) is not None and not tag.endswith(".")
    return plain and _WINDOWS_RESERVED.fullmatch(tag) is None and tag.lower() != CACHE_FOLDER


def _shown(value: object, limit: int | None = None) -> str:
    """`value` on one line as a user would write it: 1 and 0 for booleans, 2e-4 for 0.0002, escapes for line breaks."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        exact = Decimal(repr(value))
        return f"{exact:e}" if value != 0 and abs(value) < 1e-3 else repr(value).removesuffix(".0")
    text = str(value)
    if not text.isprintable():
        text = repr(text)
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


# ---- the settings ---------------------------------------------------------------------------------------------------


def _setting(default: Any, check: Check, help: str, *, unset: str = "unset", shapes_result: bool = True) -> Any:
    """A field of `Settings`. `unset` says what the default None means; `shapes_result`: it decides a bit of the result,
    so that RESUME refuses a change of it."""
    metadata = {"help": help, "check": check, "shapes_result": shapes_result, "unset": unset}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One field a setting; the variable is the field's name in capitals. Values outside their rule are our own error
    here (AssertionError): users' values come through `load_settings`."""

    model: str | None = _setting(
        None,
        _text("a Hugging Face id or a local folder", "MODEL"),
        "Hugging Face id or local folder of an MoE checkpoint",
        unset="the bundled demo",
        shapes_result=False,  # nor of the data: content is fingerprinted, wherever it lies
    )
    dataset_path: str | None = _setting(
        None, _text("a file", "FILE"), "training data, JSONL", unset="the bundled demo's", shapes_result=False
    )
    heldout_path: str | None = _setting(
        None,
        _text(
            "files separated by commas, none empty",
            "FILES",
            lambda value: all(part.strip() for part in value.split(",")),
        ),
        "held-out data, JSONL; several files, comma-separated, each reported by name",
        unset="the bundled demo's, else a seeded split of the training data",
        shapes_result=False,
    )
    quant_path: str | None = _setting(
        None,
        _text("a file", "FILE"),
        "4-bit experts: experts_q4.safetensors, or a legacy experts_q4.pt",
        unset="found beside the model, or made there",
        shapes_result=False,  # its content is fingerprinted, wherever it lies
    )
    train_from: int | None = _setting(
        None,
        _at_least(0),
        "first trainable layer; those below are frozen",
        unset="layers - max(1, layers // 6), so 40 of 48",
    )
    frac: float = _setting(
        0.005,
        _real("above 0 and at most 1", lambda value: 0 < value <= 1),
        "fraction of the expert weights of trainable layers that train",
    )
    steps: int = _setting(180, _at_least(1), "optimizer steps")
    epochs: int = _setting(0, _at_least(0), "if above 0, sets STEPS from the data")
    microbatch: int = _setting(2, _at_least(1), "sequences per micro-batch")
    accum: int = _setting(1, _at_least(1), "micro-batches per step")
    seq_len: int = _setting(512, _at_least(8), "tokens per sequence when the data is text")
    lr_peak: float | None = _setting(
        None,
        _real("above 0 and at most 1", lambda value: 0 < value <= 1),
        "peak learning rate of the experts' deltas, and of norms up to 0.01; warm-up then cosine",
        unset="measured: how far the chosen weights may go",
    )
    reselect_every: int = _setting(10, _at_least(0), "steps between RigL reselections; 0 = never")
    use_cuda: bool | None = _setting(
        None,
        _switch(),
        "unset: pick by itself (CUDA/ROCm, then DirectML, then CPU); 1: CUDA or a clear error; 0: never CUDA",
    )
    use_amp: bool = _setting(True, _switch(), "mixed precision where the device gains from it")
    use_multi_gpu: bool = _setting(True, _switch(), "use all visible GPUs of the machine", shapes_result=False)
    use_frozen_cache: bool = _setting(
        True, _switch(), "cache the activations that enter the first trainable layer", shapes_result=False
    )
    frozen_cache_n: int = _setting(0, _at_least(0), "samples to cache, 0 = all", shapes_result=False)
    use_resident: str = _setting(
        "auto",
        _choice("auto", "0", "1"),
        "keep trainable layers dequantised in 16 bits in RAM; auto measures whether that beats dequantising again; "
        "both ways give the same weights to the bit",
        shapes_result=False,
    )
    eval_every: int = _setting(
        30, _at_least(0), "steps between evaluations; 0 = only before and after", shapes_result=False
    )
    save_every: int = _setting(30, _at_least(1), "steps between checkpoints", shapes_result=False)
    run_tag: str | None = _setting(
        None,
        _text(
            "one folder name of at most 100 letters, digits and . _ - that does not end in a dot and is no name "
            "Windows reserves (CON, NUL, COM1, ...)",
            "NAME",
            _is_folder_name,
        ),
        "names the run's folder in OUTPUT_DIR",
        unset="time stamp",
        shapes_result=False,
    )
    output_dir: str = _setting("runs", _text("a folder", "FOLDER"), "folder of the runs", shapes_result=False)
    resume: str | None = _setting(
        None,
        _text("auto or a folder", "auto|FOLDER"),
        "auto, or a run's folder: go on where it stopped; auto with nothing to resume starts anew",
        shapes_result=False,
    )
    seed: int = _setting(0, _whole("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63), "decides everything random")

    head_lr: float | None = _setting(
        None,
        _real("above 0 and at most 1", lambda value: 0 < value <= 1),
        "peak learning rate of the output layer's deltas, where TRAIN_HEAD trains it",
        unset="measured, as LR_PEAK is",
    )
    router_lr: float = _setting(
        5e-5,
        _real("from 0 to 1", lambda value: 0 <= value <= 1),
        "peak learning rate of the routers; 0 = routers frozen",
    )
    grad_clip: float = _setting(
        1.0, _real("above 0", lambda value: value > 0), "largest norm of the gradient of all that trains"
    )
    weight_decay: float = _setting(
        0.0, _real("of at least 0", lambda value: value >= 0), "pull of the deltas towards 0, the pretrained weights"
    )
    warmup: float = _setting(0.05, _share(0.5), "share of the steps over which the learning rate rises to its peak")
    lr_floor: float = _setting(0.1, _share(), "share of the peak learning rate at which the cosine ends")
    drop_fraction: float = _setting(
        0.2, _share(), "share of the active weights that the first reselection drops; falls to 0 as a cosine"
    )
    reselect_until: float = _setting(0.6, _share(), "share of the steps after which nothing is reselected")
    capture_steps: int = _setting(
        4, _at_least(1), "ordinary training steps before a reselection whose gradients rank the candidates"
    )
    importance_samples: int = _setting(64, _at_least(2), "sequences whose gradients choose the first active weights")
    importance_score: str = _setting(
        "gradient",
        _choice("gradient", "square"),
        "what chooses the first active weights: their mean gradient, or the mean of the tokens' squared ones",
    )
    eval_samples: int = _setting(64, _at_least(0), "sequences per evaluation set, 0 = all")
    in_domain_fraction: float = _setting(
        0.05,
        _real("above 0 and below 0.5", lambda value: 0 < value < 0.5),
        "share of DATASET_PATH held back from training as in_domain, at least one sample",
    )
    projections: str = _setting(
        "down",
        _choice("down", "all"),
        "projections of the experts that train: down, or all (gate and up as well); FRAC is of all of them either way",
    )
    train_head: bool = _setting(
        True, _switch(), "1: the output layer's best weights train too, out of the same FRAC; 0: it is frozen"
    )
    train_norms: bool = _setting(
        True,
        _switch(),
        "1: the norms of the trained layers and the one behind them train too, whole; 0: they are frozen",
    )
    group_size: int = _setting(
        128,
        _whole("that is even, from 8 to 1024", lambda value: 8 <= value <= 1024 and value % 2 == 0),
        "weights that share one quantisation scale and zero point",
    )
    quant_bits: int = _setting(
        4, _whole("that is 4 or 8", lambda value: value in (4, 8)), "bits of a frozen expert weight"
    )
    delta_dtype: str = _setting(
        "fp16",
        _choice("fp16", "fp32"),
        "type to which the deltas are rounded after the last step, before they are evaluated and saved",
        shapes_result=False,  # of training: checkpoints hold fp32, and a finished run can be finished again
    )
    delta_scale: float | None = _setting(
        None,
        _real("above 0 and at most 2", lambda value: 0 < value <= 2),
        "how much of the change counts in what is evaluated at the end and saved",
        unset="measured after the last step, at most 1",
        shapes_result=False,  # of training, as above
    )
    prefix_cache_dir: str | None = _setting(
        None,
        _text("a folder", "FOLDER"),
        "folder of the cached activations",
        unset="cache in OUTPUT_DIR",
        shapes_result=False,
    )
    cache_dtype: str = _setting(
        "auto",
        _choice("auto", "bf16", "fp16", "fp32"),
        "type to which the activations that enter the first trainable layer are rounded, cached or not; auto: the "
        "checkpoint's own 16-bit type",
    )
    prefix_chunk_tokens: int = _setting(8192, _at_least(1), "tokens that pass a frozen layer at a time")
    head_chunk_tokens: int = _setting(256, _at_least(1), "tokens whose logits and loss are formed at a time")
    cpu_threads: int = _setting(0, _at_least(0), "threads on the CPU, 0 = torch's own choice")
    keep_checkpoints: int = _setting(
        2, _at_least(1), "newest checkpoints kept in the run's folder", shapes_result=False
    )
    attention: str = _setting(
        "auto", _choice("auto", "sdpa", "eager"), "implementation of attention; auto: what the device runs best"
    )
    memory_limit: str | None = _setting(
        None,
        _text("a size above 0 with its unit, such as 8GB, 7.5GiB or 8000MB", "SIZE", _is_size),
        "private memory (without mapped files) that the run may use: chunk sizes are planned from it, or the run is "
        "refused at its start with the least that would do",
        shapes_result=False,  # what it chooses is stored in the settings that it chooses for
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            assert _allowed(field, value), f"{field.name}={value!r} must be {field.metadata['check'].rule}"


BEFORE: dict[str, Any] = {"projections": "all", "train_head": False, "train_norms": False, "delta_dtype": "fp32",
                          "delta_scale": 1.0}  # fmt: skip
"""What these settings stood for before there were any: of deltas and runs of then."""

FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}


def _allowed(field: dataclasses.Field[Any], value: object) -> bool:
    return (value is None and field.default is None) or field.metadata["check"].accepts(value)


def _flags(name: str) -> list[str]:
    """The flags of a setting, the one to show first: --lr-peak; files also without "-path": --dataset."""
    whole = "--" + name.replace("_", "-")
    return [whole.removesuffix("-path"), whole] if name.endswith("_path") else [whole]


def _default_text(field: dataclasses.Field[Any]) -> str:
    return field.metadata["unset"] if field.default is None else _shown(field.default)


# ---- resolved -------------------------------------------------------------------------------------------------------

_GIVEN_SOURCES = frozenset({"default", "environment", "flag", "demo"})


@dataclass(frozen=True)
class ResolvedSettings:
    """The values of a run and where each came from: "default", "environment", "flag", "demo", or a word of the caller
    of `replace` such as "measured", "model" or "data"."""

    values: Settings
    sources: dict[str, str]  # field name -> source

    def __post_init__(self) -> None:
        assert self.sources.keys() == FIELDS.keys(), "one source for each setting"

    def replace(self, source: str, **values: object) -> ResolvedSettings:
        """A copy in which `values`, decided at run time by `source`, stand for what was there."""
        changed: dict[str, Any] = dict(values)
        return ResolvedSettings(
            values=dataclasses.replace(self.values, **changed), sources=self.sources | dict.fromkeys(values, source)
        )

    def table(self) -> str:
        """Every setting on a line of its own: variable, value, source."""
        rows = []
        for name, field in FIELDS.items():
            value = getattr(self.values, name)
            rows.append((name.upper(), field.metadata["unset"] if value is None else _shown(value), self.sources[name]))
        name_width = max(len(row[0]) for row in rows)
        value_width = min(64, max(len(row[1]) for row in rows))  # one long path must not push all sources off screen
        return "\n".join(f"{name:<{name_width}}  {value:<{value_width}}  {source}" for name, value, source in rows)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{"STEPS": {"value": 180, "source": "default"}, ...}; `from_json` gives back an equal object."""
        return {name.upper(): {"value": getattr(self.values, name), "source": self.sources[name]} for name in FIELDS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResolvedSettings:
        """What `to_json` wrote. A setting that `data` lacks (an older version wrote it) has the value that it stands
        for there (`BEFORE`), else its default.

        Raises UserError for an unknown setting or a value outside its rule: `data` comes from a file.
        """
        values = dict(BEFORE)
        sources = dict.fromkeys(FIELDS, "default")
        for variable, entry in data.items():
            field = FIELDS.get(variable.lower())
            if field is None or variable != variable.upper():
                raise UserError(
                    f"saved setting {_shown(variable, 60)}: must be a setting of this version of USAF; "
                    "read the run with the version that wrote it"
                )
            if not (isinstance(entry, Mapping) and "value" in entry and isinstance(entry.get("source"), str)):
                raise UserError(
                    f'saved setting {variable}={_shown(entry, 60)}: must be {{"value": ..., "source": "..."}}; '
                    "restore the file that the run wrote"
                )
            if not _allowed(field, entry["value"]):
                raise UserError(
                    f"saved setting {variable}={_shown(entry['value'], 60)}: must be {field.metadata['check'].rule}; "
                    "restore the file that the run wrote"
                )
            values[field.name], sources[field.name] = entry["value"], entry["source"]
        if "HEAD_LR" not in data:  # the head had the deltas' rate
            values["head_lr"] = values.get("lr_peak")
        return cls(values=Settings(**values), sources=sources)


def changed_settings(old: ResolvedSettings, new: ResolvedSettings) -> list[str]:
    """One "NAME: was X, now Y" for each setting that shapes the result and differs, in the order of the fields.

    A value that the old run decided for itself (measured, from the model, from the data) and that the new one leaves
    at its default, hence undecided, is no change: resume takes it over.
    """
    lines = []
    for name, field in FIELDS.items():
        was, now = getattr(old.values, name), getattr(new.values, name)
        taken_over = old.sources[name] not in _GIVEN_SOURCES and new.sources[name] in ("default", "demo")
        if field.metadata["shapes_result"] and was != now and not taken_over:
            lines.append(f"{name.upper()}: was {_shown(was)}, now {_shown(now)}")
    return lines


# ---- from the user --------------------------------------------------------------------------------------------------


def load_settings(argv: Sequence[str], environ: Mapping[str, str], demo: Mapping[str, object]) -> ResolvedSettings:
    """Settings from flags, else the environment, else the demo (only where MODEL is set by neither), else defaults.

    argv: the arguments after the program's name; environ: usually os.environ, where an empty value counts as unset;
    demo: field name -> value, the bundled demo's own. Raises UserError for the first problem; `--help` prints and
    raises SystemExit(0).
    """
    flags = _parse_flags(argv)
    _refuse_misspelt_names(environ)
    given = {name: (text, "flag") for name, text in flags.items()}
    for name in FIELDS:
        text = environ.get(name.upper(), "")
        if text.strip() and name not in given:
            given[name] = (text, "environment")

    values: dict[str, Any] = {} if "model" in given else dict(demo)
    sources = dict.fromkeys(FIELDS, "default") | dict.fromkeys(values, "demo")
    for name, field in FIELDS.items():
        if name in given:
            text, sources[name] = given[name]
            values[name] = _parse_value(field, text, sources[name])
    settings = ResolvedSettings(values=Settings(**values), sources=sources)
    _refuse_contradictions(settings)
    return settings


def _parse_value(field: dataclasses.Field[Any], text: str, source: str) -> object:
    check: Check = field.metadata["check"]
    try:
        value = check.parse(text)
    except ValueError:
        value = None
    if value is None or not check.accepts(value):
        variable = field.name.upper()
        where = f"flag {_flags(field.name)[0]}" if source == "flag" else source
        raise UserError(
            f"{variable}={_shown(text, 60)} ({where}): must be {check.rule}; "
            f"give such a value, or leave it out for the default ({_default_text(field)})"
        )
    return value


def _refuse_contradictions(settings: ResolvedSettings) -> None:
    values, sources = settings.values, settings.sources
    explicit = ("flag", "environment")
    if values.epochs > 0 and sources["epochs"] in explicit and sources["steps"] in explicit:
        raise UserError(
            f"STEPS={values.steps} ({sources['steps']}) contradicts EPOCHS={values.epochs} ({sources['epochs']}): "
            "EPOCHS above 0 sets STEPS from the data; leave one of them out"
        )
    # A default capture window is shortened to what fits (`trainer`); only one that was asked for can contradict.
    if 0 < values.reselect_every < values.capture_steps and sources["capture_steps"] in explicit:
        raise UserError(
            f"CAPTURE_STEPS={values.capture_steps} ({sources['capture_steps']}) contradicts "
            f"RESELECT_EVERY={values.reselect_every} ({sources['reselect_every']}): gradients are captured over steps "
            f"since the last reselection; set CAPTURE_STEPS to {values.reselect_every} or less, or RESELECT_EVERY to "
            f"{values.capture_steps} or more (0 = never)"
        )


# ---- names ----------------------------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions, substitutions and swaps of neighbours from `a` to `b`; symmetric.

    Source: the module's docstring; the recurrence of Damerau's distance without edits inside a swapped pair.
    """
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before_last[j - 2] + 1)
            row.append(best)
        before_last, last = last, row
    return last[-1]


def _refuse_misspelt_names(environ: Mapping[str, str]) -> None:
    variables = [name.upper() for name in FIELDS]
    ignored = [name.strip() for name in environ.get(IGNORE_VARIABLE, "").split(",") if name.strip()]
    for name in sorted(environ):
        if re.fullmatch("[A-Z0-9_]+", name) is None or name.startswith("USAF_") or name in ignored:
            continue
        if name in variables or name in OTHER_TOOLS:
            continue
        near = [variable for variable in variables if abs(len(variable) - len(name)) <= MAX_EDITS]
        nearest = min(near, key=lambda variable: edit_distance(name, variable), default=None)
        if nearest is not None and edit_distance(name, nearest) <= MAX_EDITS:
            raise UserError(
                f"{name}={_shown(environ[name], 60)} (environment): no setting has this name, and {nearest} is one "
                f"at most {MAX_EDITS} edits away; write {nearest}, or set "
                f"{IGNORE_VARIABLE}={','.join([*ignored, name])} if {name} belongs to something else"
            )


# ---- flags ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own refusals, such as a flag without its value; argparse would print the usage and exit."""
        raise UserError(f"{' '.join(message.split())}; write --flag VALUE or --flag=VALUE; --help lists every flag")


def build_parser(prog: str = "python -m usaf.train") -> argparse.ArgumentParser:
    """A parser with one flag for each setting; texts are left unparsed, and flags not given are left out."""
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Fine-tune an MoE language model by training about 0.5% of its own expert weights and its "
        "routers. With nothing set, runs the whole method on the bundled demo.",
        epilog="Every flag is an environment variable too: --lr-peak is LR_PEAK. A flag goes before the environment.",
    )
    for name, field in FIELDS.items():
        meaning = f"{field.metadata['help']} (default: {_default_text(field)})"
        parser.add_argument(
            *_flags(name), dest=name, metavar=field.metadata["check"].metavar, help=meaning.replace("%", "%%")
        )
    return parser


def _parse_flags(argv: Sequence[str]) -> dict[str, str]:
    """Field name -> text, for the flags in `argv`. Raises UserError for anything else in it, and for an empty text."""
    known, unknown = build_parser().parse_known_args(list(argv))
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{_shown(flag, 60)}: must follow a flag; write --flag VALUE; --help lists every flag")
        raise UserError(
            f"{_shown(flag, 60)}: no flag has this name; the nearest is {_nearest_flag(flag)}; --help lists every flag"
        )
    flags: dict[str, str] = vars(known)
    for name, text in flags.items():
        if not text.strip():
            raise UserError(
                f"{name.upper()} (flag {_flags(name)[0]}): must be {FIELDS[name].metadata['check'].rule}, not empty; "
                "give a value, or leave the flag out"
            )
    return flags


def _nearest_flag(flag: str) -> str:
    """The flag that `flag` begins, as in --lr, else the one with the fewest edits; the earliest of equals."""
    wanted = flag.lstrip("-").lower().replace("_", "-")

    def nearness(known: str) -> tuple[bool, int]:
        name = known.removeprefix("--")
        return (not wanted or not name.startswith(wanted), edit_distance(wanted, name))

    known_flags: Iterable[str] = [flag for name in FIELDS for flag in _flags(name)] + ["--help"]
    return min(known_flags, key=nearness)


# ---- README ---------------------------------------------------------------------------------------------------------


def markdown_table() -> str:
    """The README's table of settings, a line a setting, without a last line break."""
    lines = ["| variable | flag | default | meaning |", "|---|---|---|---|"]
    for name, field in FIELDS.items():
        cells = [f"`{name.upper()}`", f"`{_flags(name)[0]}`", _default_text(field), field.metadata["help"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
