"""The settings: names and defaults users know, rules, precedence, misspellings, and the one line of each mistake."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from usaf.errors import UserError
from usaf.settings import (
    FIELDS,
    ResolvedSettings,
    Settings,
    build_parser,
    changed_settings,
    edit_distance,
    load_settings,
    markdown_table,
    parse_size,
)

# The table of the specification's section 2. Users know these: a change here is a change of what was promised. Two
# were changed by measurements (docs/decisions.md): LR_PEAK was 2e-4 "until measurements say better", RESELECT_EVERY 50.
PROMISED = {
    "MODEL": None,
    "DATASET_PATH": None,
    "HELDOUT_PATH": None,
    "QUANT_PATH": None,
    "TRAIN_FROM": None,
    "FRAC": 0.005,
    "STEPS": 180,
    "EPOCHS": 0,
    "MICROBATCH": 2,
    "ACCUM": 1,
    "SEQ_LEN": 512,
    "LR_PEAK": None,
    "RESELECT_EVERY": 10,
    "USE_CUDA": None,
    "USE_AMP": True,
    "USE_MULTI_GPU": True,
    "USE_FROZEN_CACHE": True,
    "FROZEN_CACHE_N": 0,
    "USE_RESIDENT": "auto",
    "EVAL_EVERY": 30,
    "SAVE_EVERY": 30,
    "RUN_TAG": None,
    "OUTPUT_DIR": "runs",
    "RESUME": None,
    "SEED": 0,
}
PROMISED_DEFAULT_TEXTS = {
    "MODEL": "the bundled demo",
    "DATASET_PATH": "the bundled demo's",
    "HELDOUT_PATH": "the bundled demo's, else a seeded split of the training data",
    "QUANT_PATH": "found beside the model, or made there",
    "TRAIN_FROM": "layers - max(1, layers // 6), so 40 of 48",
    "FRAC": "0.005",
    "LR_PEAK": "measured: how far the chosen weights may go",
    "USE_CUDA": "unset",
    "USE_AMP": "1",
    "USE_RESIDENT": "auto",
    "RUN_TAG": "time stamp",
    "OUTPUT_DIR": "runs",
    "RESUME": "unset",
}
OURS = {
    "HEAD_LR": None,
    "ROUTER_LR": 5e-5,
    "GRAD_CLIP": 1.0,
    "WEIGHT_DECAY": 0.0,
    "WARMUP": 0.05,
    "LR_FLOOR": 0.1,
    "DROP_FRACTION": 0.2,
    "RESELECT_UNTIL": 0.6,
    "CAPTURE_STEPS": 4,
    "IMPORTANCE_SAMPLES": 64,
    "IMPORTANCE_SCORE": "gradient",
    "EVAL_SAMPLES": 64,
    "IN_DOMAIN_FRACTION": 0.05,
    "PROJECTIONS": "down",
    "TRAIN_HEAD": True,
    "TRAIN_NORMS": True,
    "GROUP_SIZE": 128,
    "QUANT_BITS": 4,
    "DELTA_DTYPE": "fp16",
    "DELTA_SCALE": None,
    "PREFIX_CACHE_DIR": None,
    "CACHE_DTYPE": "auto",
    "PREFIX_CHUNK_TOKENS": 8192,
    "HEAD_CHUNK_TOKENS": 256,
    "CPU_THREADS": 0,
    "KEEP_CHECKPOINTS": 2,
    "ATTENTION": "auto",
    "MEMORY_LIMIT": None,
}
SHAPES_NOTHING = {
    "DELTA_DTYPE",
    "DELTA_SCALE",
    "QUANT_PATH",
    "USE_MULTI_GPU",
    "USE_FROZEN_CACHE",
    "FROZEN_CACHE_N",
    "USE_RESIDENT",
    "EVAL_EVERY",
    "SAVE_EVERY",
    "RUN_TAG",
    "OUTPUT_DIR",
    "RESUME",
    "MODEL",
    "DATASET_PATH",
    "HELDOUT_PATH",
    "PREFIX_CACHE_DIR",
    "KEEP_CHECKPOINTS",
    "MEMORY_LIMIT",
}


def refusal(argv=(), environ=None, demo=None) -> str:
    """The one line with which the settings are refused."""
    with pytest.raises(UserError) as caught:
        load_settings(list(argv), environ or {}, demo or {})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def value_of(name: str, text: str) -> object:
    return getattr(load_settings([], {name: text}, {}).values, name.lower())


# ---- names and defaults ---------------------------------------------------------------------------------------------


def test_names_and_defaults_are_the_promised_ones():
    values = load_settings([], {}, {}).values
    found = {name.upper(): getattr(values, name) for name in FIELDS}
    assert list(found.items()) == list((PROMISED | OURS).items())
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in (PROMISED | OURS).items()
    }


def test_all_but_the_listed_settings_shape_the_result():
    assert {name.upper() for name, field in FIELDS.items() if not field.metadata["shapes_result"]} == SHAPES_NOTHING


def test_markdown_table_has_a_row_for_each_setting():
    head, rule, *rows = markdown_table().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert head == "| variable | flag | default | meaning |"
    assert rule.count("|") == 5
    assert [row[0] for row in cells] == [f"`{name}`" for name in PROMISED | OURS]
    assert all(len(row) == 4 and row[3] for row in cells)
    defaults = {row[0].strip("`"): row[2] for row in cells}
    assert PROMISED_DEFAULT_TEXTS.items() <= defaults.items()
    assert "`--train-from`" in [row[1] for row in cells]


# ---- where a value comes from ---------------------------------------------------------------------------------------

OTHER_VALUES = {
    "MODEL": ("org/name", "org/name"),
    "DATASET_PATH": ("C:\\data\\train set.jsonl", "C:\\data\\train set.jsonl"),
    "HELDOUT_PATH": ("a.jsonl,b.jsonl", "a.jsonl,b.jsonl"),
    "QUANT_PATH": ("q.safetensors", "q.safetensors"),
    "TRAIN_FROM": ("0", 0),
    "FRAC": ("1", 1.0),
    "STEPS": ("1_000", 1000),
    "EPOCHS": ("3", 3),
    "MICROBATCH": ("4", 4),
    "ACCUM": (" 2 ", 2),
    "SEQ_LEN": ("8", 8),
    "LR_PEAK": ("1e-3", 1e-3),
    "RESELECT_EVERY": ("0", 0),
    "USE_CUDA": ("0", False),
    "USE_AMP": ("off", False),
    "USE_MULTI_GPU": ("No", False),
    "USE_FROZEN_CACHE": ("FALSE", False),
    "FROZEN_CACHE_N": ("7", 7),
    "USE_RESIDENT": ("yes", "1"),
    "EVAL_EVERY": ("0", 0),
    "SAVE_EVERY": ("1", 1),
    "RUN_TAG": ("run-1_b.c", "run-1_b.c"),
    "OUTPUT_DIR": ("/out", "/out"),
    "RESUME": ("auto", "auto"),
    "SEED": ("9223372036854775807", 2**63 - 1),
    "HEAD_LR": ("1e-3", 1e-3),
    "ROUTER_LR": ("0", 0.0),
    "GRAD_CLIP": ("0.5", 0.5),
    "WEIGHT_DECAY": ("0.01", 0.01),
    "WARMUP": ("0.5", 0.5),
    "LR_FLOOR": ("1", 1.0),
    "DROP_FRACTION": ("0", 0.0),
    "RESELECT_UNTIL": ("1", 1.0),
    "CAPTURE_STEPS": ("1", 1),
    "IMPORTANCE_SAMPLES": ("2", 2),
    "IMPORTANCE_SCORE": ("square", "square"),
    "EVAL_SAMPLES": ("0", 0),
    "IN_DOMAIN_FRACTION": ("0.49", 0.49),
    "PROJECTIONS": ("all", "all"),
    "TRAIN_HEAD": ("0", False),
    "TRAIN_NORMS": ("0", False),
    "GROUP_SIZE": ("64", 64),
    "QUANT_BITS": ("8", 8),
    "DELTA_DTYPE": ("FP32", "fp32"),
    "DELTA_SCALE": ("2", 2.0),
    "PREFIX_CACHE_DIR": ("cache", "cache"),
    "CACHE_DTYPE": ("BF16", "bf16"),
    "PREFIX_CHUNK_TOKENS": ("1", 1),
    "HEAD_CHUNK_TOKENS": ("1", 1),
    "CPU_THREADS": ("2", 2),
    "KEEP_CHECKPOINTS": ("1", 1),
    "ATTENTION": ("eager", "eager"),
    "MEMORY_LIMIT": ("8GB", "8GB"),
}


@pytest.mark.parametrize("name", list(PROMISED | OURS))
def test_each_setting_is_an_environment_variable_and_a_flag(name):
    text, expected = OTHER_VALUES[name]
    field, flag = name.lower(), "--" + name.lower().replace("_", "-")
    from_environment = load_settings([], {name: text}, {})
    assert getattr(from_environment.values, field) == expected
    assert type(getattr(from_environment.values, field)) is type(expected)
    assert from_environment.sources[field] == "environment"
    for argv in ([flag, text], [f"{flag}={text}"]):
        from_flag = load_settings(argv, {}, {})
        assert from_flag.values == from_environment.values
        assert from_flag.sources[field] == "flag"
        assert {source for key, source in from_flag.sources.items() if key != field} == {"default"}


@pytest.mark.parametrize("flag", ["--dataset", "--heldout", "--quant"])
def test_files_have_a_short_flag(flag):
    values = load_settings([flag, "x.jsonl"], {}, {}).values
    assert getattr(values, flag.strip("-") + "_path") == "x.jsonl"


def test_flag_before_environment_before_demo_before_default():
    demo = {"steps": 120, "frac": 0.04, "seq_len": 256}
    settings = load_settings(["--steps", "5"], {"STEPS": "6", "FRAC": "0.5"}, demo)
    chosen = {name: (getattr(settings.values, name), settings.sources[name]) for name in ("steps", "frac", "seq_len")}
    assert chosen == {"steps": (5, "flag"), "frac": (0.5, "environment"), "seq_len": (256, "demo")}
    assert (settings.values.accum, settings.sources["accum"]) == (1, "default")


@pytest.mark.parametrize(("argv", "environ"), [(["--model", "m"], {}), ([], {"MODEL": "m"})])
def test_the_demos_values_are_for_the_demos_model_only(argv, environ):
    settings = load_settings(argv, environ, {"steps": 120})
    assert (settings.values.steps, settings.sources["steps"]) == (180, "default")


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_environment_value_counts_as_unset(empty):
    settings = load_settings([], {"STEPS": empty, "MODEL": empty, "USE_CUDA": empty}, {"steps": 120})
    assert (settings.values.steps, settings.sources["steps"]) == (120, "demo")
    assert (settings.values.model, settings.values.use_cuda, settings.sources["model"]) == (None, None, "default")


@pytest.mark.parametrize("text", ["1", "true", "True", "yes", "YES", "on", " 1 "])
def test_words_for_yes(text):
    assert value_of("USE_CUDA", text) is True


@pytest.mark.parametrize("text", ["0", "false", "False", "no", "NO", "off"])
def test_words_for_no(text):
    assert value_of("USE_AMP", text) is False


# ---- rules ----------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    *itertools.product(["TRAIN_FROM", "EPOCHS", "RESELECT_EVERY", "FROZEN_CACHE_N", "EVAL_EVERY"], ["-1", "x", "1.0"]),
    *itertools.product(["EVAL_SAMPLES", "CPU_THREADS"], ["-1", "inf"]),
    *itertools.product(["STEPS", "MICROBATCH", "ACCUM", "SAVE_EVERY", "KEEP_CHECKPOINTS"], ["0", "-1", "10.5", "1e3"]),
    *itertools.product(["CAPTURE_STEPS", "PREFIX_CHUNK_TOKENS", "HEAD_CHUNK_TOKENS"], ["0", "ten"]),
    *itertools.product(["FRAC"], ["0", "-0.1", "1.0001", "nan", "inf", "-inf", "0,005", "5%", "0x1"]),
    *itertools.product(["LR_PEAK", "HEAD_LR", "GRAD_CLIP"], ["0", "-1e-3", "nan", "inf", "1e999", "1e-999", "one"]),
    *itertools.product(["ROUTER_LR", "WEIGHT_DECAY"], ["-1e-9", "nan", "inf"]),
    *itertools.product(["LR_FLOOR", "DROP_FRACTION", "RESELECT_UNTIL"], ["-0.1", "1.1", "nan"]),
    *itertools.product(["WARMUP"], ["-0.1", "0.51", "nan"]),
    *itertools.product(["IN_DOMAIN_FRACTION"], ["0", "0.5", "1", "nan"]),
    *itertools.product(["GROUP_SIZE"], ["6", "7", "129", "1026", "-128"]),
    *itertools.product(["QUANT_BITS"], ["2", "5", "16"]),
    *itertools.product(["USE_CUDA", "USE_AMP", "USE_MULTI_GPU", "USE_FROZEN_CACHE"], ["2", "-1", "maybe", "auto"]),
    *itertools.product(["USE_RESIDENT"], ["2", "never"]),
    *itertools.product(["CACHE_DTYPE"], ["float16", "int8"]),
    *itertools.product(["DELTA_DTYPE"], ["bf16", "auto", "16"]),
    *itertools.product(["DELTA_SCALE"], ["0", "-0.5", "2.01", "nan", "auto"]),
    *itertools.product(["ATTENTION"], ["flash", "0"]),
    *itertools.product(["SEED"], ["-1", str(2**63), "0.0"]),
    ("SEQ_LEN", "7"),
    ("IMPORTANCE_SAMPLES", "1"),
    ("IMPORTANCE_SCORE", "squares"),
    *itertools.product(["HELDOUT_PATH"], [",", "a.jsonl,,b.jsonl", "a.jsonl,"]),
    *itertools.product(["MEMORY_LIMIT"], ["8", "8G", "0GB", "-8GB", "8.GB", "8 gigabytes", "8GBit", "auto", "1e9GB"]),
    *itertools.product(["RUN_TAG"], [".", "..", "...", "a.", "a/b", "a\\b", "C:", "a b", "é", "a\n", "x" * 101]),
    *itertools.product(["RUN_TAG"], ["CON", "nul", "aux.txt", "Com1", "LPT9.tar.gz", "prn"]),
]


@pytest.mark.parametrize(("name", "text"), OUT_OF_RANGE)
def test_a_value_outside_its_rule_is_one_line_with_setting_value_rule_and_remedy(name, text):
    from_environment = refusal(environ={name: text})
    flag = "--" + name.lower().replace("_", "-").removesuffix("-path")
    from_flag = refusal([f"{flag}={text}"])
    shown = (text if text.isprintable() else repr(text))[:50]
    assert from_environment.startswith(f"{name}={shown}")
    assert "(environment)" in from_environment
    assert f"(flag {flag})" in from_flag
    for message in (from_environment, from_flag):
        assert FIELDS[name.lower()].metadata["check"].rule in message
        assert "leave it out for the default" in message


@pytest.mark.parametrize("tag", ["a", "COM10", "console", "nul-1", "2026-01-01_12.00.00", ".hidden", "x" * 100])
def test_ordinary_run_tags_pass(tag):
    assert value_of("RUN_TAG", tag) == tag


@pytest.mark.parametrize(("name", "text"), [("FRAC", "1e-9"), ("WARMUP", "0"), ("GROUP_SIZE", "1024"), ("SEED", "0")])
def test_ends_of_ranges_pass(name, text):
    assert value_of(name, text) == float(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("7.5GiB", 15 << 29), ("8000MB", 8 * 10**9), (" 1.5 gb ", 15 * 10**8), ("2TiB", 2 << 40),
     ("64kib", 64 << 10), ("0.1MB", 100_000)],
)  # fmt: skip
def test_sizes_have_decimal_and_binary_units(text, size):
    assert parse_size(text) == size
    assert load_settings([], {"MEMORY_LIMIT": text}, {}).values.memory_limit is not None


def test_values_decided_by_us_are_held_to_the_rules_too():
    with pytest.raises(AssertionError, match="steps=0"):
        Settings(steps=0)
    with pytest.raises(AssertionError, match="use_amp=None"):
        load_settings([], {}, {}).replace("measured", use_amp=None)
    with pytest.raises(AssertionError, match="steps=True"):
        load_settings([], {}, {}).replace("data", steps=True)
    with pytest.raises(AssertionError, match="frac=2"):
        load_settings([], {}, {"frac": 2})


@pytest.mark.parametrize("name", ["LR_PEEK", "LR_PEAK", "RUN_TAG"])
def test_line_breaks_and_length_of_a_value_do_not_break_the_line(name):
    assert len(refusal(environ={name: "x\ny\r\u2028" * 1000})) < 400


def test_line_breaks_in_a_folder_do_not_break_the_table():
    settings = load_settings([], {"OUTPUT_DIR": "a\nb"}, {})
    assert settings.values.output_dir == "a\nb"
    assert len(settings.table().splitlines()) == len(FIELDS)


# ---- contradictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "environ"),
    [(["--steps=9", "--epochs=2"], {}), (["--steps=9"], {"EPOCHS": "2"}), ([], {"STEPS": "9", "EPOCHS": "2"})],
)
def test_steps_and_epochs_contradict(argv, environ):
    message = refusal(argv, environ)
    assert "STEPS=9" in message
    assert "EPOCHS=2" in message
    assert "leave one of them out" in message


@pytest.mark.parametrize("environ", [{"EPOCHS": "2"}, {"EPOCHS": "0", "STEPS": "9"}, {"EPOCHS": "2", "STEPS": ""}])
def test_epochs_alone_do_not_contradict_steps_of_default_or_demo(environ):
    load_settings([], environ, {})
    load_settings([], environ, {"steps": 120})


def test_capture_may_not_be_longer_than_the_time_between_reselections():
    message = refusal(environ={"RESELECT_EVERY": "3", "CAPTURE_STEPS": "4"})
    assert "CAPTURE_STEPS=4 (environment)" in message
    assert "RESELECT_EVERY=3 (environment)" in message
    passing: list[dict[str, str]] = [
        {"RESELECT_EVERY": "3"},  # the default window is shortened, not refused
        {"RESELECT_EVERY": "0", "CAPTURE_STEPS": "4"},
        {"RESELECT_EVERY": "3", "CAPTURE_STEPS": "3"},
    ]
    for environ in passing:
        load_settings([], environ, {})


def test_a_compiler_variable_near_a_setting_passes():
    load_settings([], {"FC": "gfortran"}, {})


# ---- misspelt names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STEP", "STEPS"),
        ("LR_PEEK", "LR_PEAK"),
        ("LR_PEKA", "LR_PEAK"),
        ("LRPEAK", "LR_PEAK"),
        ("MODLE", "MODEL"),
        ("EPOCH", "EPOCHS"),
        ("MICRO_BATCH", "MICROBATCH"),
        ("ACUM", "ACCUM"),
        ("USE_CUDNN", "USE_CUDA"),
        ("TRAINFROM", "TRAIN_FROM"),
        ("DATASETPATH", "DATASET_PATH"),
        ("DATA_SET_PATH", "DATASET_PATH"),
        ("SEDE", "SEED"),
        ("QUANT_BIT", "QUANT_BITS"),
    ],
)
def test_a_misspelt_environment_name_is_refused_and_can_be_ignored(name, meant):
    message = refusal(environ={name: "10", "PATH": "/bin"})
    assert message.startswith(f"{name}=10 ")
    assert f"write {meant}," in message
    assert f"USAF_IGNORE={name} " in message
    settings = load_settings([], {name: "10", "USAF_IGNORE": f"OTHER, {name}"}, {})
    assert settings == load_settings([], {}, {})


def test_the_remedy_keeps_what_is_ignored_already():
    assert "USAF_IGNORE=STEP,EPOCH " in refusal(environ={"STEP": "1", "EPOCH": "1", "USAF_IGNORE": "STEP"})


def test_an_ignored_setting_stays_a_setting():
    assert load_settings([], {"STEPS": "9", "USAF_IGNORE": "STEPS"}, {}).values.steps == 9


@pytest.mark.parametrize("name", ["step", "Step", "ST", "USAF_STEPS", "USAF_IGNOR", "STEP-S", "MY_STEPS", "STÉPS", ""])
def test_names_out_of_reach_pass(name):
    load_settings([], {name: "10"}, {})


@pytest.mark.parametrize("seed", range(4))
def test_every_name_within_two_edits_of_a_setting_is_refused(seed):
    """Random edits by the definition: what they make is at most two edits away, whatever our distance says."""
    draw = random.Random(seed)
    names = [name.upper() for name in FIELDS]
    for name in names:
        misspelt = name
        for _ in range(draw.randint(1, 2)):
            misspelt = draw.choice(sorted(one_edit(misspelt)))
        if misspelt not in names and not misspelt.startswith("USAF_"):
            assert refusal(environ={misspelt: "1"}).startswith(f"{misspelt}=1 ")


def one_edit(word: str, letters: str = "AEX_5") -> set[str]:
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    edited = {a + b[1:] for a, b in cuts if b} | {a + c + b for a, b in cuts for c in letters}
    edited |= {a + c + b[1:] for a, b in cuts if b for c in letters}
    edited |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return edited - {word}


def test_edit_distance_agrees_with_the_recursive_definition():
    @functools.cache
    def by_definition(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        ways = [by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0])]
        if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
            ways.append(by_definition(a[2:], b[2:]) + 1)
        return min(ways)

    words = ["".join(word) for length in range(5) for word in itertools.product("AB", repeat=length)]
    words += ["SETPS", "STEPS", "STEP", "LR_PEEK", "LR_PEAK", "CA", "ABC"]
    for a, b in itertools.product(words, words):
        assert edit_distance(a, b) == by_definition(a, b)


ORDINARY_ENVIRONMENT = """
    PATH HOME USER SHELL TERM LANG LC_ALL LC_CTYPE PWD OLDPWD SHLVL LOGNAME MAIL EDITOR VISUAL PAGER LESS LS_COLORS
    DISPLAY HOSTNAME HOSTTYPE TZ TMP TEMP TMPDIR LINES COLUMNS PS1 IFS MANPATH INFOPATH XDG_CACHE_HOME XDG_DATA_DIRS
    SSH_TTY SSH_CLIENT SSH_AUTH_SOCK TERM_PROGRAM COLORTERM NO_COLOR DEBUG VERBOSE CI PORT HOST
    APPDATA LOCALAPPDATA PROGRAMDATA PROGRAMFILES COMSPEC WINDIR SYSTEMROOT SYSTEMDRIVE PATHEXT OS PUBLIC PROMPT
    USERNAME USERDOMAIN USERPROFILE HOMEDRIVE HOMEPATH COMPUTERNAME NUMBER_OF_PROCESSORS SESSIONNAME PSMODULEPATH
    CC CXX CPP LD AR AS NM CFLAGS CXXFLAGS LDFLAGS MAKEFLAGS CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES ROCM_PATH
    HIP_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION LD_LIBRARY_PATH PKG_CONFIG_PATH SIZE STRIP STRINGS RANLIB
    PYTHONPATH PYTHONHOME PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX CONDA_EXE PIP_CACHE_DIR UV_CACHE_DIR
    OMP_NUM_THREADS MKL_NUM_THREADS NUMEXPR_MAX_THREADS HF_HOME HF_TOKEN HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE
    TRANSFORMERS_CACHE TORCH_HOME TOKENIZERS_PARALLELISM WANDB_MODE WANDB_DIR RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR
    MASTER_PORT SLURM_JOB_ID SLURM_NTASKS GITHUB_ACTIONS GITHUB_SHA RUNNER_OS RUNNER_TEMP BUILD_ID JOB_NAME
    PYTEST_CURRENT_TEST PYTEST_XDIST_WORKER HTTP_PROXY HTTPS_PROXY NO_PROXY
"""


def test_an_ordinary_environment_passes():
    for name in ORDINARY_ENVIRONMENT.split():  # one by one, so that a failure names it
        load_settings([], {name: "x"}, {})


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--step", "10"], "--steps"),
        (["--train_from", "4"], "--train-from"),
        (["--STEPS=4"], "--steps"),
        (["-steps", "4"], "--steps"),
        (["--lr", "1e-3"], "--lr-peak"),
        (["--lr-peek=1e-3"], "--lr-peak"),
        (["--data", "x"], "--dataset"),
        (["--steps", "5", "--modle", "x"], "--model"),
        (["--hepl"], "--help"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest(argv, nearest):
    message = refusal(argv)
    assert f"the nearest is {nearest};" in message
    assert any(message.startswith(word.partition("=")[0] + ":") for word in argv)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--steps"], "--steps"),
        (["--steps", "--accum", "2"], "--steps"),
        (["data.jsonl"], "data.jsonl: must follow a flag"),
        (["--steps", "5", "6"], "6: must follow a flag"),
        (["--steps="], "STEPS (flag --steps): must be a whole number"),
        (["--model", ""], "MODEL (flag --model)"),
        (["--lr-peak=-1e-3"], "LR_PEAK=-1e-3"),
        (["--steps", "-5"], "STEPS=-5"),
    ],
)
def test_misused_flags_are_one_line(argv, part):
    assert part in refusal(argv)


def test_flags_come_first_then_names_then_values():
    environ = {"STEP": "1", "FRAC": "2", "ACCUM": "0"}
    assert refusal(["--x"], environ).startswith("--x")
    assert refusal([], environ).startswith("STEP=1")
    assert refusal([], environ | {"USAF_IGNORE": "STEP"}).startswith("FRAC=2")


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], {"STEP": "10"}, {})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()) in text
    assert "(default: 5e-5)" in text
    assert "0.5% of" in text


def test_help_imports_nothing_heavy():
    heavy = ["torch", "transformers", "numpy", "safetensors", "psutil"]
    code = (
        "import sys\nfrom usaf.settings import build_parser\nbuild_parser().format_help()\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_parser_carries_the_name_of_its_command():
    assert build_parser("train.py").format_usage().startswith("usage: train.py ")


# ---- resolved settings ----------------------------------------------------------------------------------------------


def test_replace_gives_a_copy_with_value_and_source():
    before = load_settings([], {}, {})
    after = before.replace("model", train_from=40)
    assert (before.values.train_from, before.sources["train_from"]) == (None, "default")
    assert (after.values.train_from, after.sources["train_from"]) == (40, "model")
    assert after.replace("model", train_from=None) != before
    assert after.values.steps == before.values.steps


def test_table_shows_every_setting_aligned():
    settings = load_settings(["--lr-peak", "1e-5", "--use-amp=no"], {"DATASET_PATH": "x" * 200}, {"steps": 120})
    lines = settings.replace("measured", cpu_threads=2).table().splitlines()
    assert [line.split()[0] for line in lines] == list(PROMISED | OURS)
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["LR_PEAK"] == ["1e-5", "flag"]
    assert rows["USE_AMP"] == ["0", "flag"]
    assert rows["STEPS"] == ["120", "demo"]
    assert rows["CPU_THREADS"] == ["2", "measured"]
    assert rows["DATASET_PATH"] == ["x" * 200, "environment"]
    assert rows["MODEL"] == ["the", "bundled", "demo", "default"]
    short = [line for line in lines if not line.startswith("DATASET_PATH")]
    assert len({len(line) - len(line.split()[-1]) for line in short}) == 1


def test_json_round_trip_is_exact():
    environ = {name: text for name, (text, _) in OTHER_VALUES.items() if name != "STEPS"}
    for settings in (load_settings([], {}, {"steps": 120}), load_settings(["--lr-peak=1e-7"], environ, {})):
        decided = settings.replace("model", train_from=40).replace("measured", frac=0.1 + 0.2)
        data = json.loads(json.dumps(decided.to_json()))
        assert list(data) == list(PROMISED | OURS)
        assert data["TRAIN_FROM"] == {"value": 40, "source": "model"}
        assert ResolvedSettings.from_json(data) == decided


def test_json_of_an_older_version_lacks_newer_settings():
    data = load_settings(["--steps=9"], {}, {}).to_json()
    del data["ATTENTION"], data["KEEP_CHECKPOINTS"]
    assert ResolvedSettings.from_json(data) == load_settings(["--steps=9"], {}, {})


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("STEPZ", {"value": 1, "source": "flag"}),
        ("steps", {"value": 1, "source": "flag"}),
        ("STEPS", {"value": 0, "source": "flag"}),
        ("STEPS", {"value": "9", "source": "flag"}),
        ("STEPS", {"value": True, "source": "flag"}),
        ("STEPS", {"value": None, "source": "flag"}),
        ("FRAC", {"value": float("nan"), "source": "flag"}),
        ("LR_PEAK", {"value": 10**400, "source": "flag"}),
        ("USE_AMP", {"value": 1, "source": "flag"}),
        ("MODEL", {"value": ["a"], "source": "flag"}),
        ("STEPS", {"value": 1}),
        ("STEPS", 1),
    ],
)
def test_json_that_we_did_not_write_is_refused(name, entry):
    with pytest.raises(UserError, match=name):
        ResolvedSettings.from_json(load_settings([], {}, {}).to_json() | {name: entry})


def test_a_run_from_before_the_head_had_a_rate_of_its_own():
    saved = load_settings(["--lr-peak=2e-3"], {}, {}).to_json()
    assert ResolvedSettings.from_json(saved).values.head_lr is None
    del saved["HEAD_LR"]
    assert ResolvedSettings.from_json(saved).values.head_lr == 2e-3


def test_changed_settings_names_what_shapes_the_result():
    old = load_settings(["--lr-peak=2e-4", "--frac=0.01"], {"SEED": "0"}, {})
    assert changed_settings(old, old) == []
    new = load_settings(
        ["--lr-peak=1e-3", "--frac=0.01", "--model=m", "--save-every=1", "--run-tag=b"], {"USE_AMP": "0"}, {}
    )
    assert changed_settings(old, new) == [
        "LR_PEAK: was 2e-4, now 0.001",
        "USE_AMP: was 1, now 0",
    ]


@pytest.mark.parametrize("name", list(PROMISED | OURS))
def test_changed_settings_reports_each_setting_or_lets_it_pass(name):
    old, new = load_settings([], {}, {}), load_settings([], {name: OTHER_VALUES[name][0]}, {})
    assert [line.partition(":")[0] for line in changed_settings(old, new)] == [name] * (name not in SHAPES_NOTHING)


def test_what_the_old_run_decided_itself_is_taken_over_when_left_open():
    old = load_settings([], {}, {}).replace("model", train_from=40).replace("measured", cpu_threads=2)
    assert changed_settings(old, load_settings([], {}, {})) == []
    assert changed_settings(old, load_settings(["--train-from=40"], {}, {})) == []
    assert changed_settings(old, load_settings(["--train-from=39"], {}, {})) == ["TRAIN_FROM: was 40, now 39"]
    assert changed_settings(old, load_settings([], {}, {}).replace("measured", cpu_threads=4, train_from=40)) == [
        "CPU_THREADS: was 2, now 4"
    ]


@pytest.mark.parametrize("tag", ["cache", "Cache"])
def test_no_run_lives_in_the_folder_that_users_may_delete(tag):
    assert f"RUN_TAG={tag}" in refusal(environ={"RUN_TAG": tag})
