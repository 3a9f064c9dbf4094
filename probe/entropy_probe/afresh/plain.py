"""The model as transformers and peft load it, and its scores in the plainest way: one response at a time, unpadded,
without a cache, `log_softmax` and `Categorical.entropy` on whole logits, parameters written in place."""

from __future__ import annotations

import functools
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributions import Categorical

from entropy_probe.afresh.stored import of_named_adapter, tensors_of

# Nothing from the network, and no code of the folder's own: whoever asks for it was refused before.
_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

_ALIKE = 1e-3  # nats: rounding may exchange tokens that are so close
_AT_ONCE = 128  # positions whose logits are held in float64
Row = tuple[list[int], int]
"""Token ids of prompt and response, and how many of them are the prompt."""
Scored = list[tuple[list[float], list[float], list[list[float]], list[list[float]], list[float]]]
"""(log p, H, features, mass before it, Σ_i p_i S_i) of every token of each response, as `_features`, `_before` and
`_mean_s` have them."""


def plain_model(folder: Path, base: Path | None, device: torch.device) -> Any:
    """In float32 and eval mode, on the device."""
    names = ("config.json", "adapter_config.json")
    weights = next(
        (
            place
            for place in (folder, *of_named_adapter(folder))
            if any((place / name).is_file() for name in names)
        ),
        folder / "model",
    )
    of_model = weights
    is_adapter = (weights / "adapter_config.json").is_file()
    if is_adapter and base is not None:
        of_model = base
    options: dict[str, Any] = {"dtype": torch.float32} | _SAFE
    with _quiet(), torch.random.fork_rng(devices=[]):  # libraries draw what they then read
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            of_model,
            config=_plain_config(of_model),
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
        model, loading = loaded
        missing = [*loading["missing_keys"], *loading["mismatched_keys"]]
        if missing:
            raise LookupError(f"{missing[0]} is in no file")
        if is_adapter:
            from peft import PeftModel

            name = weights.name if weights in of_named_adapter(folder) else "default"
            _with_its_tokens(model, weights)
            model = PeftModel.from_pretrained(model, str(weights), adapter_name=name)
    return model.float().eval().to(device)


def _with_its_tokens(model: Any, weights: Path) -> None:
    """Resize the base's vocabulary to that of the rows in the adapter's file, which are loaded over it."""
    embedding = model.get_input_embeddings()
    own = next(name for name, module in model.named_modules() if module is embedding)
    for name, tensor in tensors_of(weights):
        whole = f".{own}." in name and name.endswith("weight") and ".lora" not in name
        if whole and tensor.ndim == 2 and tensor.shape[0] != embedding.weight.shape[0]:
            model.resize_token_embeddings(tensor.shape[0], mean_resizing=False)
            return


def _plain_config(folder: Path) -> Any:
    """Of a forward that returns logits in the usual form, whatever the trainer wanted returned besides."""
    text = (folder / "config.json").read_text(encoding="utf-8")

    def usual(values: dict[str, Any]) -> dict[str, Any]:
        unusual = re.compile(
            r"output_(router_logits|attentions|hidden_states)|(use_)?return_dict|torchscript"
        )
        kernels = re.compile(r"_?(attn|experts)_implementation(_internal)?")
        return {
            key: value
            for key, value in values.items()
            if not (unusual.fullmatch(key) or kernels.fullmatch(key))
        }

    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(json.loads(text, object_hook=usual)))
        return transformers.AutoConfig.from_pretrained(place, **_SAFE)


def plain_tokenizer(folder: Path, base: Path | None) -> Any:
    """Of the folder, of its `model/`, or of the base model."""
    places = [
        folder,
        folder / "model",
        *of_named_adapter(folder),
        *([] if base is None else [base]),
    ]
    own = next(place for place in places if list(place.glob("tokenizer*")))
    with _quiet():
        config = _plain_config(own) if (own / "config.json").is_file() else None
        return transformers.AutoTokenizer.from_pretrained(own, config=config, **_SAFE)


@torch.no_grad()
def plain_scores(model: Any, rows: Sequence[Row], temperature: float) -> Scored:
    found: Scored = []
    for ids, start in rows:
        given = torch.tensor([ids], device=model.device)
        of_all = model(input_ids=given, use_cache=False).logits[0, start - 1 : len(ids) - 1]
        taken, scored = torch.tensor(ids[start:]), ([], [], [], [], [])
        for first in range(0, len(taken), _AT_ONCE):
            logits = of_all[first : first + _AT_ONCE].cpu().double()
            tokens, policy = taken[first : first + _AT_ONCE], logits / temperature
            logp = torch.log_softmax(policy, -1)[torch.arange(len(tokens)), tokens]
            entropy = Categorical(logits=policy).entropy()
            features = _features(logits, policy.softmax(-1), entropy)
            before = _before(policy, tokens)
            of_s = _mean_s(policy, entropy)
            for known, more in zip(scored, (logp, entropy, features, before, of_s), strict=True):
                known += more.tolist()
        found.append(scored)
    return found


def _features(logits: Tensor, p: Tensor, entropy: Tensor) -> Tensor:
    """[T, 6] at top_p = 1, where the head is the likeliest token: H, its probability, how far its logit is above the
    next, its probability, the entropy of it against all others, and the variance of the logits under p."""
    top = p.max(-1).values
    first, second = logits.topk(2).values.unbind(-1)
    two = Categorical(probs=torch.stack([top, 1 - top], -1)).entropy()
    mean = (p * logits).sum(-1, keepdim=True)
    spread = (p * (logits - mean) ** 2).sum(-1)
    return torch.stack([entropy, top, first - second, top, two, spread], -1)


def _mean_s(policy: Tensor, entropy: Tensor) -> Tensor:
    """[T]: the mean under p of S = p·(H + log p)."""
    p = policy.softmax(-1)
    return (p * (p * entropy[:, None] + torch.special.xlogy(p, p))).sum(-1)


def _before(policy: Tensor, tokens: Tensor) -> Tensor:
    """[T, 3] at top_p = 1: the probability of what is certainly likelier than the token, the same with what is as
    likely to rounding, and of what comes before it as `_halved` orders the ids."""
    p, own = policy.softmax(-1), policy.gather(-1, tokens[:, None])
    likelier, alike = (p * (policy > own + edge) for edge in (_ALIKE, -_ALIKE))
    order = torch.tensor(_halved(p.shape[-1]))
    place = order.argsort()[tokens]
    until = p[:, order].cumsum(-1).gather(-1, place[:, None]) - p.gather(-1, tokens[:, None])
    return torch.stack([likelier.sum(-1), alike.sum(-1), until[:, 0]], -1)


@functools.cache
def _halved(size: int) -> list[int]:
    """Ids as a tree meets them whose root chooses in the fold of all to a half, and a leaf between x and x + half."""
    if size == 1:
        return [0]
    half = (size + 1) // 2
    return [x for fold in _halved(half) for x in (fold, fold + half) if x < size]


@torch.no_grad()
def step(model: Any, v: Mapping[str, Tensor], eta: float) -> None:
    """θ + ηv, written into the model's own parameters, which must have the names of v."""
    parameters = dict(model.named_parameters())
    for name, direction in v.items():
        parameter = parameters[name]
        change = eta * direction.to(parameter.device, torch.float64).reshape(parameter.shape)
        parameter.copy_(parameter.double() + change)


@contextmanager
def _quiet() -> Iterator[None]:
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
