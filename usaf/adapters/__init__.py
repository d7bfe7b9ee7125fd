"""Families whose MoE layers do not have transformers' experts interface: one small adapter each, one file a family.

All of USAF asks of an MoE layer is what transformers' interface (`use_experts_implementation`) gives: an experts module
with two fused 3D parameters, called with (hidden_TH, expert_ids_TK, routing_weights_TK), and beside it a module that
owns the router's 2D weight. A family without the interface gets this structure by an adapter, which rewrites
transformers' model on the meta device, before anything is loaded. Masks, attention, norms, routers and head stay
transformers' own; the other modules of USAF never learn which family they serve.

To add a family:

1. Find its MoE block in `transformers/models/<family>/modeling_<family>.py`. What stays as it is, which tensors are the
   experts, and what does the forward do with the router's scores?
2. Write `<family>.py` here with three names (`step3p7.py` is the shortest example, `llama4.py` one that computes
   otherwise, `dbrx.py` one whose tensors are stored otherwise):

       MODEL_TYPES                the `model_type`s of its config.json, that of a multimodal wrapper included
       adapt(model)               put a `FusedExperts` (see `fused`) in the place of the experts; where the block itself
                                  knows no experts module, put one in its place that does (`jetmoe.py`)
       conversions(model)         how the checkpoint's tensors become the fused parameters: transformers'
                                  `WeightRenaming` and `WeightConverter`, after those that it has itself. Data movement
                                  only, since an export runs them backwards. Empty where the names are right.

   Keep names that are right: whatever has the checkpoint's name needs no conversion.
3. Add the file to `ADAPTERS` below.
4. Add a tiny configuration to `tests/adapted_families.py`. `tests/test_adapters.py` then holds the family to logits and
   gradients of transformers' own model, split execution, its answer about packed documents, and a whole run.

When a newer transformers gives a family the interface, its adapter is no longer used (`architecture.meta_model` adapts
only what has no experts modules), and a test asks for the adapter to be dropped.

Left out: doge. Its routing mixes the scores of different tokens, so that a token's experts depend on the batch it is
in, and its experts are pairs of vectors, which groups along a row cannot quantise.
"""

from __future__ import annotations

from types import ModuleType

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from usaf.adapters import dbrx, jetmoe, llama4, longcat_flash, step3p7
from usaf.adapters.fused import FusedExperts

ADAPTERS: dict[str, ModuleType] = {
    model_type: family for family in (dbrx, jetmoe, llama4, longcat_flash, step3p7) for model_type in family.MODEL_TYPES
}


def adapt(model: PreTrainedModel) -> None:
    """Give the model, which has no experts modules and lies on the meta device, some if there is an adapter for it."""
    family = ADAPTERS.get(model.config.model_type)
    if family is not None:
        family.adapt(model)


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """What is to follow transformers' own conversion mapping of this model; nothing for a model as transformers has it.

    The objects are the caller's own: transformers' transforms keep state.
    """
    if not any(isinstance(module, FusedExperts) for module in model.modules()):
        return []
    return ADAPTERS[model.config.model_type].conversions(model)
