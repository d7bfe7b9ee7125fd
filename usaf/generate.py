"""`python -m usaf.generate --delta runs/x/delta.safetensors --prompt "..."`: what a saved result writes.

It runs on the 4-bit base plus delta, without an export; no data are read. Without --compare, text appears as it comes.
With it every prompt is answered twice, by the base (the 4-bit experts with all else as in the checkpoint) and by the
tuned model, from the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usaf.console import (
    Parser,
    add_base_flag,
    add_delta_flags,
    add_json_flag,
    add_scale_flag,
    refuse_scaled_base,
    run_command,
    say,
    side_by_side,
    visible,
)
from usaf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from usaf.delta import Delta
    from usaf.generation import Generated, Sampling
    from usaf.prompts import Prompt
    from usaf.session import ModelSession
    from usaf.settings import ResolvedSettings

    Answer = Callable[[list[int], int, bool], Generated]
    """Called with (a prompt's ids, its number, whether its text is written as it comes)."""

LARGEST_SEED = 2**63 - 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m usaf.generate", "Generate text with a saved delta on its 4-bit base.")
    add_delta_flags(parser, required=False)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to answer; repeatable")
    parser.add_argument(
        "--prompts", action="append", default=[], type=Path, metavar="FILE",
        help="prompts, one a line, or JSONL with prompt, question, instruction or messages",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="a system turn before every prompt (needs a chat template)")
    parser.add_argument("--raw", action="store_true", help="no chat template: go on from the text as it stands")
    parser.add_argument("--compare", action="store_true", help="the base's answer beside the tuned model's")
    add_base_flag(parser)
    add_scale_flag(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (default 128)")
    parser.add_argument(
        "--temperature", type=float, metavar="X",
        help="draw tokens at random, the more evenly the higher (default: always the likeliest)",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=float, metavar="X",
        help="draw from the likeliest tokens that have this share of the probability",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides what is drawn (default 0)")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    check_flags(arguments)
    return arguments


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises UserError for a value out of range, and for flags that contradict each other."""
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("max_new_tokens", lambda n: n >= 1, "at least 1; 128 is the default"),
        ("temperature", lambda x: math.isfinite(x) and x >= 0, "a finite number of at least 0; 0.7 is a usual one"),
        ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1; 0.9 is a usual one"),
        ("top_k", lambda n: n >= 1, "at least 1; 50 is a usual one"),
        ("seed", lambda n: 0 <= n <= LARGEST_SEED, "from 0 to 2^63 - 1; 0 is the default"),
    ]
    for name, holds, rule in rules:
        value = getattr(arguments, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {rule}")
    for name in ("top_p", "top_k"):
        if arguments.temperature == 0 and getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} contradicts --temperature 0, which always takes the likeliest "
                            "token; leave one of them out")  # fmt: skip
    if arguments.delta is None and not arguments.base:
        raise UserError("--delta: is missing; give the delta.safetensors of a run, or --base for a model without one")
    refuse_scaled_base(arguments)
    if arguments.base and arguments.compare:
        raise UserError("--base contradicts --compare, which shows base and tuned model; leave one of them out")
    if arguments.system is not None and arguments.raw:
        raise UserError("--system contradicts --raw: without a chat template there are no turns; leave one of them out")
    if arguments.system is not None and not arguments.system.strip():
        raise UserError("--system: is empty; give the text of the system turn, or leave the flag out")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: generate_command(parse(sys.argv[1:] if argv is None else argv)))


def generate_command(arguments: argparse.Namespace) -> int:
    from usaf.delta import load_delta
    from usaf.files import require_writable, write_json
    from usaf.prompts import prompts_of_flags
    from usaf.session import apply_delta, load, prepare_model

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    prompts = prompts_of_flags(arguments.prompt, arguments.prompts)
    delta = None if arguments.delta is None else load_delta(arguments.delta)
    session = prepare_model(settings_of(delta, arguments), None if delta is None else delta.about["decisions"])
    tokenizer = required_tokenizer(session)
    encoded = encode_all(prompts, tokenizer, arguments, session)
    answer = answers(session, tokenizer, arguments)
    load(session)
    (scale,) = arguments.scale
    if delta is not None and not arguments.base:
        apply_delta(session, delta, arguments.delta, scale)
    figures = answer_all(session, encoded, answer, session.own if arguments.compare else None)
    if arguments.json is not None:
        write_json(arguments.json, {
            "delta": None if arguments.delta is None else str(arguments.delta), "base_only": arguments.base,
            "scale": scale,
            "model": str(session.checkpoint.folder), "device": session.backend.name,
            "system": arguments.system, "raw": arguments.raw,
            "max_new_tokens": arguments.max_new_tokens, "sampling": dataclasses.asdict(sampling_of(arguments, 0)),
            "generations": figures,
        })  # fmt: skip
    return 0


def settings_of(delta: Delta | None, arguments: argparse.Namespace) -> ResolvedSettings:
    """Those of the run; without a delta the defaults, and of --model, --quant and --use-cuda what is given."""
    from usaf.demo import DEMO_SETTINGS
    from usaf.session import settings_of_run
    from usaf.settings import load_settings

    if delta is not None:
        return settings_of_run(delta, arguments)
    given = {"--model": arguments.model, "--quant": arguments.quant, "--use-cuda": arguments.use_cuda}
    return load_settings([f"{flag}={value}" for flag, value in given.items() if value is not None], {}, DEMO_SETTINGS)


def required_tokenizer(session: ModelSession) -> PreTrainedTokenizerBase:
    from usaf.session import read_tokenizer

    folder = session.checkpoint.folder
    tokenizer = read_tokenizer(folder, otherwise="")
    if tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json), so it has no text to read or write; put the "
                        "tokenizer's files there, or give a --model folder that has them")  # fmt: skip
    return tokenizer


def encode_all(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace, session: ModelSession
) -> list[tuple[Prompt, list[int]]]:
    """Every prompt with its ids; UserError for one that the model cannot take."""
    from usaf.prompts import encode_prompt, with_system
    from usaf.samples import has_chat_template
    from usaf.session import context_length

    context, vocabulary = context_length(session.checkpoint), session.checkpoint.config.get_text_config().vocab_size
    if arguments.system is not None and not has_chat_template(tokenizer):
        raise UserError(f"--system: {session.checkpoint.folder} has no chat template, hence no turns; leave the flag "
                        "out, and begin the prompt with that text")  # fmt: skip
    encoded = []
    for prompt in prompts:
        asked = prompt if arguments.system is None else with_system(prompt, arguments.system)
        ids = encode_prompt(asked, tokenizer, arguments.raw)
        if max(ids) >= vocabulary:
            raise UserError(f"{session.checkpoint.folder}: its tokenizer gives token {max(ids)}, and the model knows "
                            f"{vocabulary}; put the model's own tokenizer there")  # fmt: skip
        if context is not None and len(ids) >= context:
            raise UserError(f"{prompt.where}: the prompt has {len(ids)} tokens, and the model's context of {context} "
                            "must have room for one more; shorten the prompt")  # fmt: skip
        encoded.append((prompt, ids))
    return encoded


def sampling_of(arguments: argparse.Namespace, number: int) -> Sampling:
    """Of prompt `number`: each has a seed of its own, so that one prompt given twice is answered twice."""
    from usaf.generation import Sampling

    temperature = arguments.temperature
    if temperature is None and (arguments.top_p is not None or arguments.top_k is not None):
        temperature = 1.0
    seed = (arguments.seed + number) % (LARGEST_SEED + 1)
    return Sampling(temperature or None, arguments.top_p or 1.0, arguments.top_k or 0, seed)


def answers(session: ModelSession, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> Answer:
    """The function that answers, once the session is loaded; what ends an answer is read now."""
    from usaf.generation import generate, read_ending
    from usaf.session import context_length

    ending = read_ending(session.checkpoint.folder, session.checkpoint.config, tokenizer)
    context = context_length(session.checkpoint)

    def answer(prompt_ids: list[int], number: int, aloud: bool) -> Generated:
        return generate(
            session.model, tokenizer, prompt_ids, ending, sampling_of(arguments, number), arguments.max_new_tokens,
            context, write if aloud else None,
        )  # fmt: skip

    return answer


def answer_all(
    session: ModelSession, encoded: Sequence[tuple[Prompt, list[int]]], answer: Answer,
    own: dict[str, Tensor] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers every prompt and shows it; with the checkpoint's own routers and norms, the base's answer beside it.

    Returns:
        The figures of each prompt.
    """
    from usaf.generation import base_alone, layers_on_device

    figures = []
    with layers_on_device(session.model):
        for number, (prompt, prompt_ids) in enumerate(encoded):
            if len(encoded) > 1:
                say(f"{'' if number == 0 else chr(10)}[{number + 1} of {len(encoded)}] {heading(prompt)}")
            base = None
            if own is not None:
                with base_alone(session.model, own):
                    base = answer(prompt_ids, number, False)
            found = answer(prompt_ids, number, base is None)
            show(found, base)
            figures.append(figures_of(prompt, prompt_ids, found, base))
    return figures


def write(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def heading(prompt: Prompt) -> str:
    """The first line of what was asked last."""
    text = " ".join(prompt.turns()[-1]["content"].split())
    return visible(text if len(text) <= 100 else text[:97] + "...")


def show(found: Generated, base: Generated | None) -> None:
    """What was not written as it came: both texts, and how fast they came."""
    if base is None:
        say()
        say(f"({measured(found)})")
        return
    say(side_by_side(("base", "tuned"), (base.text, found.text), shutil.get_terminal_size().columns))
    say(f"(base: {measured(base)}; tuned: {measured(found)})")


def measured(found: Generated) -> str:
    return f"{len(found.token_ids)} tokens, {found.tokens_per_second:.1f} a second, stopped by {found.stopped_by}"


def figures_of(prompt: Prompt, prompt_ids: list[int], found: Generated, base: Generated | None) -> dict[str, Any]:
    def of(answer: Generated) -> dict[str, Any]:
        return {"text": answer.text, "tokens": len(answer.token_ids), "tokens_per_second": answer.tokens_per_second,
                "seconds": answer.seconds, "stopped_by": answer.stopped_by}  # fmt: skip

    asked = {"prompt": prompt.content, "prompt_tokens": len(prompt_ids), **of(found)}
    return asked if base is None else {**asked, "base": of(base)}


if __name__ == "__main__":
    sys.exit(main())
