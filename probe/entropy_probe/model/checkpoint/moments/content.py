"""Which order of parameters the moments themselves fit: the content of a checkpoint decides where shapes cannot.

The mean square gradient of log p over texts that the model samples of its own looks like `exp_avg_sq` of the same
tensor, entry by entry, and little like that of another tensor of its shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from entropy_probe.model.forward import BoundModel
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.model.registry import Registry, spread_over

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_TEXTS, _TOKENS, _ENTRIES = 8, 24, 4096
# Entries of a tensor share rows and columns: no correlation is surer than this. The same as in `moments_match`.
_SHARED, _FEWEST = 0.04, 8
# 72 checkpoints (Llama, Qwen3, GPT-2; full, LoRA, DoRA; 2 and 4 layers; 3 and 40 steps), layers upwards against from
# the top: the true order wins each by 5.4 to 57 standard errors and lacks up to 0.40 of what the best name of each slot
# gains over its rival; 3 adapters of 3 steps stay undecided. Of 864 pairs of random orders, both wrong, 358 are won by
# more than 5; 23 of the closest also lack less than 0.35, and there chance put more than a third of the tensors right.
_CLEAR, _LACKS = 5.0, 0.35


@dataclass(frozen=True)
class Choice:
    """The best of some orders and its closest rival, by index; the correlation of each over the tensors in question.

    `clear`: it is known that `best` is the order.
    """

    best: int
    rival: int
    correlation: float
    of_rival: float
    clear: bool


def choose(
    model: nn.Module, orders: Sequence[Sequence[str]], moments: Sequence[Tensor | None]
) -> Choice:
    """Compare orders of names, two at least, by what they say of the second moments (`None`: none, or not usable).

        T(order) = Σ_k w z,   z = atanh corr(log squares[order[k]], log moments[k]),   1/w = 1/(n − 3) + 0.04²

    over the slots k where they differ and the n entries where both are positive. `best` has the largest T. It is clear
    if for every rival T(best) − T(rival) is at least 5 standard errors, √Σ(w + w'), and T(best) reaches most of what
    the best name for every single slot would: else the true order may be one that is not among them.
    """
    asked = [
        k
        for k in range(len(moments))
        if len({order[k] for order in orders}) > 1 and moments[k] is not None
    ]
    squares = (
        _mean_squares(model, sorted({order[k] for order in orders for k in asked})) if asked else {}
    )
    z, weight, attainable = _scores(squares, orders, moments, asked)
    total = (weight * z).sum(1)
    ranked = sorted(range(len(orders)), key=lambda i: -float(total[i]))
    best, rivals = ranked[0], ranked[1:]

    def surely_beats(rival: int) -> bool:
        differ = torch.tensor(
            [orders[best][k] != orders[rival][k] for k in asked], dtype=torch.bool
        )
        gain = float(total[best] - total[rival])
        error = math.sqrt(float((weight[best] + weight[rival])[differ].sum()))
        return gain > _CLEAR * error and attainable - float(total[best]) < _LACKS * (
            attainable - float(total[rival])
        )

    beaten = [surely_beats(rival) for rival in rivals]
    rival = rivals[beaten.index(False)] if False in beaten else rivals[0]
    of = (total / weight.sum(1).clamp(min=1e-9)).tanh()
    return Choice(best, rival, float(of[best]), float(of[rival]), all(beaten))


def _scores(
    squares: dict[str, Tensor],
    orders: Sequence[Sequence[str]],
    moments: Sequence[Tensor | None],
    asked: list[int],
) -> tuple[Float[Tensor, "O K"], Float[Tensor, "O K"], float]:
    """z and w of every order at every slot in question, and Σ_k max_name w z."""
    z, weight = torch.zeros(2, len(orders), len(asked), dtype=torch.float64)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for column, k in enumerate(asked):
        moment = moments[k]
        assert moment is not None
        by_shape[moment.shape].append(column)
    attainable = 0.0
    for columns in by_shape.values():
        names = sorted({order[asked[column]] for order in orders for column in columns})
        of_slots = torch.stack([_some(moments[asked[column]]) for column in columns])
        fits, weights = _fits(torch.stack([squares[name] for name in names]), of_slots)
        attainable += float((fits * weights).amax(0).sum())
        row = {name: i for i, name in enumerate(names)}
        for i, order in enumerate(orders):
            rows = [row[order[asked[column]]] for column in columns]
            z[i, columns], weight[i, columns] = (
                x[rows, range(len(columns))] for x in (fits, weights)
            )
    return z, weight, attainable


def _fits(squares: Float[Tensor, "N n"], moments: Float[Tensor, "K n"]) -> tuple[Tensor, Tensor]:
    """(z, w) of every name at every slot. Logs are centred over a row's own positive entries, others count nothing."""
    has_a, has_b = (squares > 0).double(), (moments > 0).double()
    a, b = (_centred_logs(x) for x in (squares, moments))
    scale = ((a.square() @ has_b.T) * (has_a @ b.square().T)).sqrt()
    r = torch.where(scale > 1e-9, a @ b.T / scale.clamp(min=1e-9), 0.0)
    count = (has_a @ has_b.T).clamp(min=_FEWEST)
    return r.clamp(-0.999, 0.999).atanh(), 1 / (1 / (count - 3) + _SHARED**2)


def _centred_logs(x: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    there = x > 0
    logs = torch.where(there, x, 1.0).log()
    return torch.where(
        there, logs - logs.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1), 0.0
    )


def _some(tensor: Tensor | None) -> Float[Tensor, " n"]:
    assert tensor is not None
    flat = tensor.detach().reshape(-1)
    taken = spread_over(len(flat), _ENTRIES)
    return flat[taken.to(flat.device)].double().cpu()


def _mean_squares(model: nn.Module, names: Sequence[str]) -> dict[str, Float[Tensor, " n"]]:
    """Mean over sampled texts of the square of d log p(text)/dθ, at some entries of the named parameters.

    Gradients are dropped one by one as they are made. The model is left as it was.
    """
    registry = Registry.of(model)
    bound = BoundModel(registry, next(iter(registry.parameters.values())).dtype)
    wanted = {name: registry.parameters[name] for name in names}
    squares = {name: torch.zeros_like(_some(parameter)) for name, parameter in wanted.items()}
    required = {p: p.requires_grad for p in registry.parameters.values()}

    def take(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        squares[name] += _some(parameter.grad).square() / _TEXTS
        parameter.grad = None

    for parameter in required:
        parameter.requires_grad_(False)
    hooks = []
    try:
        with quiet_transformers():
            texts = _sampled(bound)
            for name, parameter in wanted.items():
                parameter.requires_grad_()
                hooks.append(
                    parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
                )
            for text in texts:
                logp = bound.direct_logits(text[None, :-1])[0].log_softmax(-1)
                logp.gather(-1, text[1:, None]).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)
    return squares


@torch.no_grad()
def _sampled(bound: BoundModel) -> Int[Tensor, "N L"]:
    """Texts of the model's own, each from a first token at random, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    longest = bound.longest_row or _TOKENS
    ids = torch.randint(0, bound.vocabulary, (_TEXTS, 1), generator=generator)
    for _ in range(min(_TOKENS, longest) - 1):
        logits = bound.direct_logits(ids.to(bound.device), keep=slice(-1, None))[:, 0]
        mass = logits.double().softmax(-1).nan_to_num(0.0).clamp(min=1e-30)
        ids = torch.cat([ids, torch.multinomial(mass.cpu(), 1, generator=generator)], dim=1)
    return ids.to(bound.device)
