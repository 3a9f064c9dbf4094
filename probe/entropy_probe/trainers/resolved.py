"""The recipe of a run: what was asked for, over what its trainer left, over the recipe of that name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_probe.budgets import BUDGETS
from entropy_probe.config import RECIPES, BatchConfig, ProbeConfig, Recipe, RecipeConfig
from entropy_probe.config.recipe import older_keys
from entropy_probe.errors import ConfigError, ProbeError
from entropy_probe.report import RecipeSection, RecipeSetting
from entropy_probe.trainers.found import Found
from entropy_probe.trainers.settings import Trace, training_settings

_NO_TRACE = "no trainer's settings were found: plain centred advantages"


def resolved(
    config: ProbeConfig,
    folder: str | Path | None,
    *,
    has_reference: bool,
    samples_update: bool = True,
) -> tuple[ProbeConfig, RecipeSection]:
    """The configuration with every part of the recipe set, the policy's temperature and the prompts of a step where
    they are the trainer's; and what the report says of it.

    With `recipe: auto` the checkpoint's own settings count, and the notes' recipe where there are none.
    `samples_update`: the U batch is sampled, and not read from a file.
    """
    trace, name = Trace(), config.recipe.name
    if name == "auto":
        trace = Trace() if folder is None else training_settings(folder)
        name = "notes" if trace.found is None else trace.found.name
    found, troubles = trace.found, list(trace.troubles)
    if found is not None and (problem := _unusable(found)):
        troubles.append(problem)
        found, name = None, "notes"
    parts, sources = _layered(config, name, found)
    left = [] if found is None else list(found.not_reproduced)
    if parts.get("kl_coef") and not has_reference:
        if "kl_coef" in config.recipe.parts:
            remedy = "give --probe-reference-model, the model that training began with"
            raise ConfigError("recipe.kl_coef", "needs a reference model", remedy)
        left.append(
            f"The trainer's loss has a KL term (β {parts['kl_coef']:g}). "
            "The probe leaves it out until you give --probe-reference-model."
        )
        parts["kl_coef"] = 0.0
    recipe = Recipe(**parts)
    changes: dict[str, Any] = {"recipe": RecipeConfig(name=name, **recipe.model_dump())}
    if found is not None:
        changes |= _policy(config, found, sources, left if samples_update else [])
    settings = {
        key: RecipeSetting(value=value, source=sources.get(key, "default"))
        for key, value in {**recipe.model_dump(), **_beside(changes, sources)}.items()
    }
    asked = f"asked for ({config.recipe.name})"
    source = found.source if found else _NO_TRACE if config.recipe.name == "auto" else asked
    section = RecipeSection(
        name=name, source=source, settings=settings, not_reproduced=left, unread=troubles
    )
    return config.model_copy(update=changes), section


def _layered(
    config: ProbeConfig, name: str, found: Found | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Parts, and where each is from."""
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"recipe {name}", RECIPES[name]),
        ("" if found is None else found.source, {} if found is None else found.parts),
        ("first_order, update", older_keys(config.first_order, config.update)),
        ("configuration", config.recipe.parts),
    ]
    parts: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        parts |= layer
        sources |= dict.fromkeys(layer, source)
    return parts, sources


def _policy(
    config: ProbeConfig, found: Found, sources: dict[str, str], left: list[str]
) -> dict[str, Any]:
    """Temperature and length of responses, arguments of the chat template, and prompts of a step, unless they were
    set."""
    changes: dict[str, Any] = {}
    policy, own = config.generation, {}
    for key in ("temperature", "max_new_tokens"):
        value = found.generation.get(key)
        if value is None or key in policy.model_fields_set:
            continue
        if key == "max_new_tokens" and value > policy.max_new_tokens:
            left.append(
                f"The trainer's responses have up to {value} tokens, and those of the probe up to "
                f"{policy.max_new_tokens}, unless you set generation.max_new_tokens."
            )
            continue
        own[key], sources[key] = value, found.source
    if own:
        changes["generation"] = policy.model_copy(update=own)
    batch, prompts = config.batch, found.prompts
    if found.template and "chat_template_kwargs" not in batch.model_fields_set:
        batch = batch.model_copy(update={"chat_template_kwargs": dict(found.template)})
        changes["batch"], sources["chat_template_kwargs"] = batch, found.source
    usual = BUDGETS[config.budget].values.get("batch", {}).get("num_update_prompts")
    given = "num_update_prompts" in batch.model_fields_set and batch.num_update_prompts != usual
    usual = usual or BatchConfig().num_update_prompts
    if prompts is None or given:
        return changes
    if 2 <= prompts <= usual:
        changes["batch"] = batch.model_copy(update={"num_update_prompts": prompts})
        sources["num_update_prompts"] = found.source
    elif prompts != usual:
        left.append(
            f"The trainer makes a step from {prompts} prompt{'s'[: prompts != 1]}. "
            f"The probe takes {usual}, unless you set batch.num_update_prompts."
        )
    return changes


def _beside(changes: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """What of the trainer's settings is no part of the recipe and was taken too."""
    found = {
        key: getattr(changes["generation"], key)
        for key in ("temperature", "max_new_tokens")
        if key in sources
    }
    if "chat_template_kwargs" in sources:
        found["chat_template_kwargs"] = json.dumps(changes["batch"].chat_template_kwargs)
    if "num_update_prompts" in sources:
        found["num_update_prompts"] = changes["batch"].num_update_prompts
    return found


def _unusable(found: Found) -> str:
    """What is wrong with values that no trainer takes."""
    try:
        Recipe(**{**RECIPES[found.name], **found.parts})
        ProbeConfig.from_mapping({"generation": dict(found.generation)})
    except (ProbeError, ValueError) as error:
        return f"{found.source}: has impossible settings ({error})".splitlines()[0][:300]
    return ""
