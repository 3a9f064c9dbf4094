"""Slow, obvious versions of everything the probe reports: one sequence at a time, unpadded, in float64.

Nothing of `estimators` or `stages` is used. Gradients come from `torch.autograd.grad`, second derivatives from a second
call of it, the update direction from a step of torch's own optimizer. Two contexts are borrowed: the float64 forward
(tests/test_precision.py proves it), and, for DoRA's true derivative, `Tensor.detach` patched to do nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_probe.model.precision import TrueFloat64


class Reference:
    """Loops over prompts and responses of one rollouts file on one float64 model."""

    def __init__(self, model: Any, rollouts: Path, temperature: float = 1.0) -> None:
        self.model = model
        self.lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
        self.temperature = temperature
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def true_derivative(self) -> Iterator[None]:
        with mock.patch.object(torch.Tensor, "detach", lambda self: self):
            yield

    def tokens(self, n: int, g: int) -> tuple[Tensor, Tensor]:
        """(log p, H) of the generated tokens of response g of prompt n."""
        prompt, response = self.lines[n]["prompt_ids"], self.lines[n]["response_ids"][g]
        with sdpa_kernel(SDPBackend.MATH), TrueFloat64():
            logits = self.model(torch.tensor([prompt + response]), use_cache=False).logits[0]
        logps, entropies = [], []
        for i, token in enumerate(response):
            p = torch.softmax(logits[len(prompt) + i - 1] / self.temperature, -1)
            logps.append(torch.log(p[token]))
            entropies.append(-(p * torch.log(p)).sum())
        return torch.stack(logps), torch.stack(entropies)

    def gradient(self, value: Tensor, **options: Any) -> dict[str, Tensor]:
        grads = torch.autograd.grad(value, list(self.named.values()), **options)
        return dict(zip(self.named, grads, strict=True))

    def x(self, n: int) -> dict[str, Tensor]:
        size = len(self.lines[n]["rewards"])
        with self.true_derivative():
            s = [self.tokens(n, g)[0].sum() for g in range(size)]
        loss = torch.zeros((), dtype=torch.float64)
        for g in range(size):
            others = sum(float(s[k].data) for k in range(size) if k != g) / (size - 1)
            loss = loss + (float(s[g].data) - others) * s[g] / size
        with self.true_derivative():
            return self.gradient(loss)

    def y(self, n: int) -> dict[str, Tensor]:
        line = self.lines[n]
        size, longest = len(line["rewards"]), max(len(r) for r in line["response_ids"])
        mean = sum(line["rewards"]) / size
        loss = torch.zeros((), dtype=torch.float64)
        for g in range(size):
            loss = loss + (line["rewards"][g] - mean) / longest * self.tokens(n, g)[0].sum() / size
        return self.gradient(loss)

    def directional(self, v: dict[str, Tensor]) -> list[list[dict[str, Tensor]]]:
        """Per response: s, R, H, D_vS, D_vR, D_v log p, D_v H and the second derivatives of S and R along v."""
        return [[self._along(n, g, v) for g in range(len(line["rewards"]))] for n, line in enumerate(self.lines)]

    def _along(self, n: int, g: int, v: dict[str, Tensor]) -> dict[str, Tensor]:
        def dot(grads: dict[str, Tensor]) -> Tensor:
            return sum((grads[name] * v[name]).sum() for name in v)  # pyright: ignore[reportReturnType]

        with self.true_derivative():
            logp, entropy = self.tokens(n, g)
            first_s = dot(self.gradient(logp.sum(), create_graph=True))
            second_s = dot(self.gradient(first_s, retain_graph=True))
            first_r = dot(self.gradient(entropy.sum(), create_graph=True))
            second_r = dot(self.gradient(first_r, retain_graph=True))
            d_logp = torch.stack([dot(self.gradient(x, retain_graph=True)) for x in logp])
            d_entropy = torch.stack([dot(self.gradient(x, retain_graph=True)) for x in entropy])
        values = {
            "s": logp.sum(), "r": entropy.sum(), "entropy": entropy, "d_logp": d_logp, "d_entropy": d_entropy,
            "d_s": first_s, "d_r": first_r, "d2_s": second_s, "d2_r": second_r,
        }  # fmt: skip
        return {key: value.data for key, value in values.items()}


def dot(a: dict[str, Tensor], b: dict[str, Tensor], p: dict[str, Tensor] | None = None) -> tuple[float, float]:
    """(aᵀPb, the sum of the absolute values of its terms)."""
    terms = [(a[n] * b[n] * (1.0 if p is None else p[n])).flatten() for n in b]
    return math.fsum(float(t.sum()) for t in terms), math.fsum(float(t.abs().sum()) for t in terms)


def optimizer_step(
    model: Any, named_groups: list[dict[str, Any]], state: dict[str, Any], g: dict[str, Tensor], cls: Any
):
    """(θ' − θ)/lr of one step of torch's own optimizer in float64, loaded with the given state, on the gradient g."""
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    groups = [{**group, "params": [parameters[n] for n in group["params"]]} for group in named_groups]
    optimizer = cls(groups)
    for name, entries in state.items():
        optimizer.state[parameters[name]] = {
            k: v.double().clone() if k != "step" else torch.tensor(float(v)) for k, v in entries.items()
        }
    for name, gradient in g.items():
        parameters[name].grad = gradient.clone()
    optimizer.step()
    after = {n: parameters[n].detach().clone() for n in g}
    with torch.no_grad():
        for name, value in before.items():
            parameters[name].copy_(value)
            parameters[name].grad = None
    lr = {n: group["lr"] for group in named_groups for n in group["params"]}
    return {n: (after[n] - before[n]) / lr[n] for n in g}


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def sd(values: list[float]) -> float:
    return math.sqrt(math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))
