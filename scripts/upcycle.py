"""Turn a small dense Llama-style model into a Mixture-of-Experts (Mixtral) that transformers loads and USAF trains.

    python scripts/upcycle.py --model data/smollm2/model --output data/smollm2/moe

Mixtral is Llama with experts: the same attention, norms, embeddings and head, which are copied bit for bit. Only the
feed-forward changes, layer by layer from the bottom, on real text (half of it `--text`, half the documentation that
comes with Python). With x the input of a layer's feed-forward, a = silu(Gx) * (Ux) its neurons and y = D a its output:

    router    k-means of x / |x| on the centred calibration tokens; the router's logits are a linear fit without bias
              of the distances to the centroids, after a bias for each expert has evened out their loads. Scaled so
              that the first of the chosen experts beats the last by `ROUTER_GAP` on average.
    experts   `specialised`: expert e keeps the `--width` neurons that weigh most, E[w a^2] |d|^2, on the tokens that
              the router sends to it (w the routing weight), and its down projection is refitted on those tokens so
              that it alone gives y: ridge regression towards the columns of D. Neurons may be in several experts.
              `slices`: the neurons are dealt out, each to one expert; where all experts are chosen it is the dense
              model. (MoEfication, LLaMA-MoE)
              `copies`: the whole feed-forward in every expert, with noise. (sparse upcycling)

What enters a layer comes from the layers already replaced, so later experts are fitted to what they will meet. The new
model is then read by transformers and its perplexity on held-out text printed beside the dense model's, and again with
experts chosen at random and with experts swapped, which is how much the router matters.

Left out: training (that is what USAF is for), models that do not fit in memory, biases, other families than Llama's.

Sources: MoEfication (Zhang et al. 2022), sparse upcycling (Komatsuzaki et al. 2023), LLaMA-MoE (Zhu et al. 2024); the
biases that balance loads are those of Wang et al. 2024 (loss-free balancing).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf.console import Parser, phase, run_command, say, table
from usaf.errors import RunError, UserError, one_line
from usaf.files import require_writable, write_json
from usaf.memory import PeakMemory
from usaf.samples import aligned_document, detect_label_convention, encode_sample, place, read_samples

REPOSITORY = Path(__file__).resolve().parent.parent
ROW = 256  # tokens of a calibration or evaluation sequence
ROUTER_GAP = 0.5  # mean logit of the first chosen expert over the last: weights of about 0.62 and 0.38 at top-2
RIDGE = 1e-2  # of the mean squared activation, pulling a refitted down projection towards the dense one
ROUTER_RIDGE = 1e-3
LARGEST_LOAD = 2.0  # an expert gets at most this much more, or less, than its even share of the calibration tokens
KMEANS_STEPS, BALANCE_STEPS, BALANCE_RATE = 20, 400, 0.03
COPY_NOISE = 0.1  # of a matrix's standard deviation
COMPARED_TOKENS = 256  # on which the experts of a layer are compared with each other


@dataclass(frozen=True)
class Shape:
    """Of the new feed-forward: E experts of `width` neurons, `top_k` of them a token."""

    construction: str
    experts: int
    top_k: int
    width: int


@dataclass(frozen=True)
class Layer:
    """One layer's new feed-forward, fp32: router [E, H], gate and up [E, W, H], down [E, H, W]."""

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def expert(self, e: int, x: Tensor) -> Tensor:
        """[n, H] -> [n, H], without the routing weight."""
        neurons = nn.functional.silu(x @ self.gate[e].T) * (x @ self.up[e].T)
        return neurons @ self.down[e].T


@dataclass(frozen=True)
class LayerFigures:
    """router_fit: R^2 of the router's logits against the distances; loads: shares of the calibration tokens over even
    ones; error: |moe - dense|^2 / |dense|^2 there; difference: the smallest relative distance of two experts' outputs
    on the same tokens, whichever they were sent to."""

    router_fit: float
    smallest_load: float
    largest_load: float
    error: float
    difference: float


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/upcycle.py", "A dense Llama-style model as a Mixture-of-Experts (Mixtral).")
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model, with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "data" / "gsm8k" / "train.jsonl",
                        help="JSONL for half of the calibration (default: GSM8K)")  # fmt: skip
    parser.add_argument("--construction", choices=list(CONSTRUCTIONS), default="specialised")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, help="neurons of an expert (default: half of the dense feed-forward's)")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--heldout-tokens", type=int, default=4096, help="a text, of two; 0: no perplexities")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    for name, least in (("experts", 2), ("top_k", 1), ("calibration_tokens", 2 * ROW), ("heldout_tokens", 0),
                        ("threads", 0), ("seed", 0)):  # fmt: skip
        value = getattr(arguments, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if arguments.top_k > arguments.experts:
        raise UserError(f"--top-k {arguments.top_k}: there are {arguments.experts} experts; choose at most that many")
    return arguments


def upcycle_command(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        raise UserError(f"--output {arguments.output}: is not an empty folder; name another one")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began, memory = time.perf_counter(), PeakMemory()
    dense, tokenizer = load_dense(arguments.model)
    shape = resolve_shape(arguments, dense.config)
    calibration, heldout = read_texts(arguments, tokenizer)
    perplexities = {"dense": perplexity(dense, heldout)}
    layers, figures = convert(dense, calibration, shape, arguments.seed)
    moe = build_mixtral(dense, layers, shape)
    parameters = sum(parameter.numel() for parameter in moe.parameters())
    del layers, dense
    write(moe, tokenizer, arguments)
    del moe
    perplexities |= measure(arguments.output, heldout, shape, arguments.seed)
    memory.stop()
    report(arguments, shape, figures, perplexities, {name: rows.numel() for name, rows in heldout.items()}, {
        "parameters": parameters, "calibration_tokens": calibration.numel(),
        "seconds_total": time.perf_counter() - began,
        "peak_memory_bytes": memory.private, "peak_resident_bytes": memory.resident,
    })  # fmt: skip
    return 0


def load_dense(folder: Path) -> tuple[Any, Any]:
    """The dense model in fp32 and its tokenizer; refuses what Mixtral cannot hold."""
    import transformers

    transformers.logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: no config.json there; name the folder of a dense model, such as the one "
                        "that scripts/fetch_smollm2.py makes")  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        if config.model_type not in ("llama", "mistral") or config.hidden_act != "silu" or biased:
            raise UserError(f"--model {folder}: a {config.model_type} model with these options does not fit into "
                            "Mixtral; name a Llama or Mistral model without biases, with silu")  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: cannot be read ({one_line(error)[:200]})") from None


def resolve_shape(arguments: argparse.Namespace, config: Any) -> Shape:
    neurons = config.intermediate_size
    fixed = {"slices": neurons // arguments.experts, "copies": neurons}.get(arguments.construction)
    width = arguments.width or fixed or neurons // 2
    if fixed is not None and (width != fixed or (arguments.construction == "slices" and neurons % arguments.experts)):
        raise UserError(f"--construction {arguments.construction}: needs --width {fixed}, and --experts that divide "
                        f"{neurons} without remainder")  # fmt: skip
    if not 1 <= width <= neurons:
        raise UserError(f"--width {width}: the dense feed-forward has {neurons} neurons; choose 1 to {neurons}")
    return Shape(arguments.construction, arguments.experts, arguments.top_k, width)


# Text.


def read_texts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration rows [N, ROW] and held-out rows of each text; no document is in both."""
    rng = np.random.default_rng(arguments.seed)
    sources = {arguments.text.stem: file_documents(arguments.text, tokenizer, rng),
               "python_docs": python_documents(tokenizer, rng)}  # fmt: skip
    calibration, heldout = [], {}
    for name, documents in sources.items():
        if arguments.heldout_tokens:
            heldout[name] = rows_of(documents, arguments.heldout_tokens, name)
        calibration.append(rows_of(documents, arguments.calibration_tokens // 2, name))
    return torch.cat(calibration), heldout


def file_documents(path: Path, tokenizer: Any, rng: np.random.Generator) -> Iterator[list[int]]:
    """Token ids of a JSONL file's samples, in an order of the seed."""
    samples = read_samples(path)
    convention = detect_label_convention(samples) if samples.kind == "tokens" else "aligned"
    for sample in samples.read(rng.permutation(len(samples))):
        if samples.kind == "tokens":
            yield aligned_document(sample, convention)[0]
        else:
            yield from (ids for ids, _ in encode_sample(sample, samples.kind, tokenizer))


def python_documents(tokenizer: Any, rng: np.random.Generator) -> Iterator[list[int]]:
    """The chapters of the language reference that Python brings for `help()`: English prose on every machine."""
    from pydoc_data.topics import topics

    chapters = [topics[name] for name in sorted(topics)]
    for i in rng.permutation(len(chapters)):
        yield list(tokenizer(chapters[i], add_special_tokens=False, verbose=False)["input_ids"])


def rows_of(documents: Iterator[list[int]], tokens: int, name: str) -> Tensor:
    """int64 [N, ROW]: the next documents one behind the other, about `tokens` tokens of them."""
    ids: list[int] = []
    wanted = max(1, tokens // ROW) * ROW
    while len(ids) < wanted:
        document = next(documents, None)
        if document is None:
            break
        ids += document
    rows = min(len(ids), wanted) // ROW
    if rows == 0:
        raise UserError(f"{place(name)}: too little text for {wanted} tokens of calibration or evaluation; give a "
                        "longer --text, or lower --calibration-tokens and --heldout-tokens")  # fmt: skip
    return torch.tensor(ids[: rows * ROW]).view(rows, ROW)


# The new feed-forward.


class _Recorder(nn.Module):
    """Stands in for a layer's feed-forward: keeps its input, adds nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.x = hidden.reshape(-1, hidden.shape[-1])
        return torch.zeros_like(hidden)


@torch.no_grad()
def convert(dense: Any, rows: Tensor, shape: Shape, seed: int) -> tuple[list[Layer], list[LayerFigures]]:
    """The new feed-forward of every layer. `dense` gives up its own on the way."""
    generator = torch.Generator().manual_seed(seed)
    hidden = dense.model.embed_tokens(rows)
    positions = torch.arange(ROW).unsqueeze(0)
    rotary = dense.model.rotary_emb(hidden, positions)
    layers, figures = [], []
    with phase("upcycle", len(dense.model.layers), "layer") as bar:
        for decoder_layer in dense.model.layers:
            mlp, recorder = decoder_layer.mlp, _Recorder()
            decoder_layer.mlp = recorder
            hidden = decoder_layer(hidden, position_embeddings=rotary, position_ids=positions, attention_mask=None)
            layer, output, found = convert_layer(mlp, recorder.x, shape, generator)
            hidden = hidden + output.view_as(hidden)
            layers.append(layer)
            figures.append(found)
            bar.update()
    return layers, figures


def convert_layer(mlp: Any, x: Tensor, shape: Shape, generator: torch.Generator) -> tuple[Layer, Tensor, LayerFigures]:
    """One layer from its input x [T, H]: the new feed-forward, its output on x [T, H], and its figures."""
    neurons = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    target = mlp.down_proj(neurons)
    router, fit = centroid_router(x, shape, generator)
    weights, chosen = route(router, x, shape.top_k)
    routed = [pairs_of(chosen, weights, e) for e in range(shape.experts)]
    parts = CONSTRUCTIONS[shape.construction](mlp, neurons, target, routed, shape, generator)
    layer = Layer(router, *(torch.stack(part) for part in zip(*parts, strict=True)))
    output = torch.zeros_like(x)
    for e, (token, weight) in enumerate(routed):
        output.index_add_(0, token, layer.expert(e, x[token]) * weight.unsqueeze(1))
    loads = torch.tensor([len(token) for token, _ in routed]) * shape.experts / chosen.numel()
    error = (output - target).square().sum() / target.square().sum()
    difference = smallest_difference(layer, x[torch.randperm(len(x), generator=generator)[:COMPARED_TOKENS]])
    return layer, output, LayerFigures(fit, float(loads.min()), float(loads.max()), float(error), difference)


def route(router: Tensor, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Routing weights [T, k], as Mixtral makes them, and expert ids [T, k]."""
    logits, chosen = (x @ router.T).topk(top_k, dim=1)
    return logits.softmax(1), chosen


def pairs_of(chosen: Tensor, weights: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """The tokens that have expert e among their chosen ones, and its weights there."""
    token, slot = (chosen == e).nonzero(as_tuple=True)
    return token, weights[token, slot]


def centroid_router(x: Tensor, shape: Shape, generator: torch.Generator) -> tuple[Tensor, float]:
    """[E, H] by k-means, and how well a linear map without bias gives the distances (R^2)."""
    directions = x / x.norm(dim=1, keepdim=True)
    centred = directions - directions.mean(0)
    centroids = kmeans(centred, shape.experts, generator)
    nearness = centred @ centroids.T - centroids.square().sum(1) / 2
    nearness = nearness / nearness.std()
    nearness += balancing_bias(nearness, shape.top_k)
    nearness -= nearness.mean(1, keepdim=True)  # what all experts share decides nothing
    gram = x.T @ x
    ridge = ROUTER_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    router = torch.linalg.solve(gram + ridge, x.T @ nearness).T
    logits = x @ router.T
    fit = 1 - float((logits - nearness).square().sum() / nearness.square().sum())
    ranked = logits.topk(min(max(2, shape.top_k), shape.experts), dim=1).values
    return router * (ROUTER_GAP / (ranked[:, 0] - ranked[:, -1]).mean()), fit


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, d] centroids of points [T, d]; the first ones by k-means++."""
    centroids = points[torch.randint(len(points), (1,), generator=generator)]
    distance = (points - centroids[0]).square().sum(1)
    while len(centroids) < count:
        new = points[torch.multinomial(distance, 1, generator=generator)]
        centroids = torch.cat([centroids, new])
        distance = torch.minimum(distance, (points - new).square().sum(1))
    for _ in range(KMEANS_STEPS):
        nearest = (points @ centroids.T - centroids.square().sum(1) / 2).argmax(1)
        members = torch.bincount(nearest, minlength=count).unsqueeze(1)
        means = torch.zeros_like(centroids).index_add_(0, nearest, points) / members.clamp_min(1)
        centroids = torch.where(members > 0, means, centroids)
    return centroids


def balancing_bias(scores: Tensor, top_k: int) -> Tensor:
    """[E]: what to add to scores [T, E] so that no expert's load is more than `LARGEST_LOAD` times, or less than its
    inverse of, the even one: raised by a step where it is too low, lowered where it is too high."""
    experts = scores.shape[1]
    bias = torch.zeros(experts)
    for _ in range(BALANCE_STEPS):
        chosen = (scores + bias).topk(top_k, dim=1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) * experts / chosen.numel()
        step = (load < 1 / LARGEST_LOAD).float() - (load > LARGEST_LOAD).float()
        if not step.any():
            break
        bias += BALANCE_RATE * step
    return bias


def smallest_difference(layer: Layer, x: Tensor) -> float:
    """The smallest distance of two experts' outputs, over the size of outputs, as a mean over tokens: token by token,
    since the first token of a text may have outputs a thousand times as large as the others."""
    outputs = torch.stack([layer.expert(e, x) for e in range(len(layer.gate))])  # [E, n, H]
    sizes = outputs.norm(dim=2).mean(0).clamp_min(1e-12)
    pairs = itertools.combinations(range(len(outputs)), 2)
    return min(float(((outputs[a] - outputs[b]).norm(dim=1) / sizes).mean()) for a, b in pairs)


Parts = Iterable[tuple[Tensor, Tensor, Tensor]]
"""gate [W, H], up [W, H] and down [H, W] of each expert."""


def specialised(
    mlp: Any, neurons: Tensor, target: Tensor, routed: list[tuple[Tensor, Tensor]], shape: Shape, _: torch.Generator
) -> Parts:
    """The neurons that matter on an expert's own tokens, and a down projection refitted there."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    norms = down.square().sum(0)
    for token, weight in routed:
        own = neurons[token]
        importance = (own.square() * weight.unsqueeze(1)).sum(0) * norms
        kept = importance.topk(shape.width).indices.sort().values
        yield gate[kept], up[kept], refit(own[:, kept], target[token], weight, down[:, kept])


def refit(neurons: Tensor, target: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    """down + the ridge solution of weight * |neurons @ change - (target - neurons @ down)|^2 -> min; [H, W]."""
    scaled = neurons * weight.unsqueeze(1)
    gram = scaled.T @ neurons
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram + ridge, scaled.T @ (target - neurons @ down.T))
    return down + change.T


def slices(
    mlp: Any, neurons: Tensor, _: Tensor, routed: list[tuple[Tensor, Tensor]], shape: Shape, __: torch.Generator
) -> Parts:
    """Every neuron in one expert: the one on whose tokens it stands out most, as far as there is room."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    energy = torch.stack([neurons[token].square().mean(0) for token, _ in routed])
    affinity = energy / energy.sum(0)
    room, owner = [shape.width] * shape.experts, [-1] * affinity.shape[1]
    for flat in affinity.flatten().argsort(descending=True, stable=True).tolist():
        e, neuron = divmod(flat, affinity.shape[1])
        if owner[neuron] < 0 and room[e]:
            owner[neuron] = e
            room[e] -= 1
    owners = torch.tensor(owner)
    for e in range(shape.experts):
        own = (owners == e).nonzero().flatten()
        yield gate[own], up[own], down[:, own] * shape.top_k  # the weights of Mixtral's chosen experts sum to one


def copies(
    mlp: Any, _: Tensor, __: Tensor, ___: list[tuple[Tensor, Tensor]], shape: Shape, generator: torch.Generator
) -> Parts:
    """The dense feed-forward in every expert, each with noise of its own."""
    for _e in range(shape.experts):
        noisy = [
            weight + COPY_NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        ]
        yield noisy[0], noisy[1], noisy[2]


CONSTRUCTIONS: dict[str, Callable[..., Parts]] = {"specialised": specialised, "slices": slices, "copies": copies}


# The new model.


def build_mixtral(dense: Any, layers: list[Layer], shape: Shape) -> Any:
    """A Mixtral in bf16 with the dense model's weights outside the feed-forward."""
    from transformers import MixtralConfig, MixtralForCausalLM

    kept = {name: getattr(dense.config, name) for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
        "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    )}  # fmt: skip
    config = MixtralConfig(
        **kept,
        intermediate_size=shape.width,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        sliding_window=getattr(dense.config, "sliding_window", None),
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    tensors = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    for i, layer in enumerate(layers):
        mlp = f"model.layers.{i}.mlp"
        tensors[f"{mlp}.gate.weight"] = layer.router
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.cat([layer.gate, layer.up], dim=1)
        tensors[f"{mlp}.experts.down_proj"] = layer.down
    for name in list(tensors):
        tensors[name] = tensors[name].to(torch.bfloat16)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def write(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """The folder, complete or absent, with the licence of the dense model."""
    output: Path = arguments.output
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name in ("LICENSE", "NOTICE"):
            if (arguments.model / name).is_file():
                shutil.copyfile(arguments.model / name, partial / name)
        if output.exists():
            output.rmdir()
        os.rename(partial, output)
    except OSError as error:
        raise RunError(f"--output {output}: could not be written ({error.strerror or error}); free space, or name "
                       "another folder") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Measuring.


@torch.no_grad()
def perplexity(model: Any, heldout: dict[str, Tensor]) -> dict[str, float]:
    """exp of the mean loss of every token but the first of each row."""
    found = {}
    for name, rows in heldout.items():
        losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in rows.split(4)]
        found[name] = math.exp(sum(losses) / len(rows))
    return found


def measure(folder: Path, heldout: dict[str, Tensor], shape: Shape, seed: int) -> dict[str, dict[str, float]]:
    """Perplexities of the saved model as transformers reads it, and with its router overruled."""
    if not heldout:
        return {}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    def at_random(chosen: Tensor) -> Tensor:
        return torch.rand(len(chosen), shape.experts, generator=generator).topk(shape.top_k, dim=1).indices

    def swapped(chosen: Tensor) -> Tensor:
        return (chosen + 1) % shape.experts

    found = {"moe": perplexity(model, heldout)}
    for name, choice in (("random_experts", at_random), ("swapped_experts", swapped)):
        with overruled(model, choice):
            found[name] = perplexity(model, heldout)
    return found


@contextmanager
def overruled(model: Any, choice: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, every router's expert ids [T, k] go through `choice`; the routing weights stay."""

    def replace(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, chosen = outputs
        return logits, weights, choice(chosen)

    handles = [layer.mlp.gate.register_forward_hook(replace) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def report(
    arguments: argparse.Namespace,
    shape: Shape,
    figures: list[LayerFigures],
    perplexities: dict[str, dict[str, float]],
    heldout_tokens: dict[str, int],
    costs: dict[str, float],
) -> None:
    worst = {
        "router_fit_lowest": min(f.router_fit for f in figures),
        "expert_load_lowest": min(f.smallest_load for f in figures),
        "expert_load_highest": max(f.largest_load for f in figures),
        "layer_error_highest": max(f.error for f in figures),
        "expert_difference_lowest": min(f.difference for f in figures),
    }
    say(f"{arguments.output}: {shape.construction}, {shape.experts} experts of {shape.width} neurons, "
        f"top-{shape.top_k}, {costs['parameters']:,} parameters, {costs['seconds_total']:.0f} s")  # fmt: skip
    say(table([[name, f"{value:.3f}"] for name, value in worst.items()], ["over the layers", ""]))
    if heldout_tokens:
        say()
        names = list(heldout_tokens)
        rows = [[kind, *(f"{found[name]:.2f}" for name in names)] for kind, found in perplexities.items()]
        say(table(rows, ["held-out perplexity", *names]))
    if arguments.json is not None:
        write_json(arguments.json, {
            "model": str(arguments.model), "output": str(arguments.output), **asdict(shape),
            "seed": arguments.seed, **worst, "heldout_tokens": heldout_tokens, "perplexity": perplexities, **costs,
        })  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: upcycle_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
