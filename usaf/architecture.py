"""What config.json says: the model class that transformers has for it, built on the meta device, without weights.

The architecture is transformers' own; where a family lacks the experts interface, `adapters` give it one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from usaf import adapters
from usaf.errors import UserError, one_line
from usaf.experts import EXPERTS_IMPLEMENTATION, is_experts_module
from usaf.source_formats import Quantization, read_quantization


def read_config(folder: Path) -> tuple[Any, Quantization | None]:
    """The configuration, and what it says of weights that are not in 16 bits (taken out of it: we dequantise)."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"MODEL={folder}: has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        known = config_class_by_architecture(path)
        if known is not None:
            config = known.from_pretrained(folder)
            config.model_type = known.model_type  # by which transformers finds how its tensors are converted
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{path}: transformers {transformers.__version__} cannot read it ({one_line(error)[:300]}); a "
                        "newer transformers may know this model") from None  # fmt: skip
    quantization = read_quantization(config, path)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config, quantization


def config_class_by_architecture(path: Path) -> Any:
    """The configuration class of a checkpoint whose model_type only remote code knows (kimi_k2), but whose architecture
    is one of transformers' own (DeepseekV3ForCausalLM); else None."""
    given = json.loads(path.read_text(encoding="utf-8"))
    architecture = getattr(transformers, (given.get("architectures") or ["none"])[0], None)
    if given.get("model_type") in CONFIG_MAPPING or not isinstance(architecture, type):
        return None
    return getattr(architecture, "config_class", None)


def model_class(config: Any) -> type[PreTrainedModel]:
    """The language-model class of a configuration: the text part alone where transformers reads it so, else the whole.

    Some are missing from the causal-LM mapping and named in `architectures`, or are multimodal models, whose text part
    is what trains; remote code's names for these are not transformers' own.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        known: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return known
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if type(config) in AutoModelForImageTextToText._model_mapping:
        multimodal: Any = AutoModelForImageTextToText._model_mapping[type(config)]
        return multimodal
    raise UserError(f"MODEL: transformers {transformers.__version__} has no causal language model for model_type "
                    f"{config.model_type} (architecture {name}); use an MoE language model it knows")  # fmt: skip


def meta_model(config: Any, attention: str | None = None) -> PreTrainedModel:
    """The model's modules without weights, its experts served by `experts_forward`.

    Raises:
        UserError: it has no MoE layers, or transformers cannot build it.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)
    if not isinstance(config, cls.config_class):  # type: ignore[arg-type]  # a multimodal model, read for its text part
        config = config.get_text_config()
    config.get_text_config().output_router_logits = False  # the loss is ours; no auxiliary term
    try:
        with torch.device("meta"):
            model = cls._from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention,
                experts_implementation=EXPERTS_IMPLEMENTATION,
            )
    except (ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # by transformers
        raise UserError(f"MODEL: transformers {transformers.__version__} cannot build {cls.__name__} from config.json "
                        f"({type(error).__name__}: {one_line(error)[:300]}); correct it, or use a newer transformers"
                        ) from None  # fmt: skip
    if not any(is_experts_module(m) for m in model.modules()):
        adapters.adapt(model)
    if not any(is_experts_module(m) for m in model.modules()):
        raise UserError(f"MODEL: {config.model_type} has no MoE layers that transformers' experts interface or an "
                        "adapter serves; USAF trains experts, so choose a Mixture-of-Experts model")  # fmt: skip
    return model.eval()
