"""Slow, obvious versions of everything the probe reports: one sequence at a time, unpadded, in float64.

Nothing of `estimators` or `stages` is used. Gradients come from `torch.autograd.grad`, second derivatives from a second
call of it, ridge regressions from numpy's least squares, the update direction from a step of torch's own optimizer. Two
contexts are borrowed: the float64 forward (tests/test_precision.py proves it), and, for DoRA's true derivative,
`Tensor.detach` patched to do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_probe.model.precision import TrueFloat64


class Reference:
    """Loops over prompts and responses of one rollouts file on one float64 model."""

    def __init__(self, model: Any, rollouts: Path, temperature: float = 1.0, max_new_tokens: int = 200) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        self.lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
        self.temperature = temperature
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def true_derivative(self) -> Iterator[None]:
        with mock.patch.object(torch.Tensor, "detach", lambda self: self):
            yield

    def logits(self, n: int, g: int) -> Tensor:
        """Those that predict each generated token of response g of prompt n."""
        prompt, response = self.lines[n]["prompt_ids"], self.lines[n]["response_ids"][g]
        with sdpa_kernel(SDPBackend.MATH), TrueFloat64():
            logits = self.model(torch.tensor([prompt + response]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1]

    def tokens(self, n: int, g: int) -> tuple[Tensor, Tensor]:
        """(log p, H) of the generated tokens of response g of prompt n."""
        logps, entropies = [], []
        for z, token in zip(self.logits(n, g), self.lines[n]["response_ids"][g], strict=True):
            p = torch.softmax(z / self.temperature, -1)
            logps.append(torch.log(p[token]))
            entropies.append(-(p * torch.log(p)).sum())
        return torch.stack(logps), torch.stack(entropies)

    @functools.cached_property
    def steps(self) -> dict[tuple[int, int, int], tuple[float, list[float]]]:
        """(n, g, t) → (R_{>t}, φ_t), with the entropy of the step for the first entry of φ_t; at top_p = 1."""
        result = {}
        for n, line in enumerate(self.lines):
            for g in range(len(line["response_ids"])):
                with torch.no_grad():
                    phi = [self._features(z.tolist(), t) for t, z in enumerate(self.logits(n, g))]
                result |= {(n, g, t): (math.fsum(x[0] for x in phi[t + 1 :]), phi[t]) for t in range(len(phi))}
        return result

    def _features(self, z: list[float], t: int) -> list[float]:
        largest, second = sorted(z, reverse=True)[:2]
        weights = [math.exp((x - largest) / self.temperature) for x in z]
        p = [w / math.fsum(weights) for w in weights]
        mean_z, top = math.fsum(a * x for a, x in zip(p, z, strict=True)), max(p)
        variance = math.fsum(a * (x - mean_z) ** 2 for a, x in zip(p, z, strict=True))
        two_point = -sum(a * math.log(a) for a in (top, math.fsum(p) - top))
        entropy = -math.fsum(a * math.log(a) for a in p)
        return [entropy, top, largest - second, top, two_point, variance, t / self.max_new_tokens]

    @functools.cached_property
    def length_steps(self) -> dict[tuple[int, int, int], tuple[float, list[float]]]:
        """The same with 1 in place of every entropy."""
        last = {(n, g): t for n, g, t in self.steps}
        return {(n, g, t): (float(last[n, g] - t), [1.0, *phi[1:]]) for (n, g, t), (_, phi) in self.steps.items()}

    def coefficients(self, n: int, g: int, baseline: str, *, of_length: bool = False) -> list[float]:
        """R_{≥t} − b_t of every step of a response."""
        steps = self.length_steps if of_length else self.steps
        own = {t: value for (m, h, t), value in steps.items() if (m, h) == (n, g)}
        result = []
        for t, (later, phi) in own.items():
            if baseline == "none":
                result.append(phi[0] + later)
            elif baseline == "hk":
                result.append(later)
            elif baseline == "hk_ema":
                others = [r for (m, _, k), (r, _) in steps.items() if m != n and k == t]
                result.append(later - (mean(others) if others else 0.0))
            elif baseline == "hk_group":
                result.append(later - _shrunk({key: r for key, (r, _) in steps.items()}, n, g, t))
            else:
                result.append(later - self._ridge(n % min(5, len(self.lines)), phi))
        return result

    def _ridge(self, fold: int, phi: list[float]) -> float:
        """β₀ + φᵀβ, fitted to R_{>t} on the prompts outside the fold: Σ(R_{>t} − β₀ − φᵀβ)² + 0.01·rows·|β|² over
        standardised φ, cut to ±10 deviations, by least squares with a row √(0.01·rows)·e_j for every feature."""
        rows = [value for (m, _, _), value in self.steps.items() if m % min(5, len(self.lines)) != fold]
        features, target = np.array([x for _, x in rows]), np.array([r for r, _ in rows])

        def standardised(x: np.ndarray) -> np.ndarray:
            return np.clip((x - features.mean(0)) / features.std(0), -10, 10)

        count, width = features.shape
        fit = np.hstack([np.ones((count, 1)), standardised(features)])
        extra = np.hstack([np.zeros((width, 1)), math.sqrt(0.01 * count) * np.eye(width)])
        beta = np.linalg.lstsq(np.vstack([fit, extra]), np.append(target, np.zeros(width)), rcond=None)[0]
        return float(beta[0] + standardised(np.array(phi)) @ beta[1:])

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

    def x_rb(self, n: int, baseline: str) -> dict[str, Tensor]:
        """−(1/G) Σ_g ∇Σ_t (H_t + (R_{≥t} − b_t)·log p_t), with constant R_{≥t} − b_t."""
        size = len(self.lines[n]["rewards"])
        total = {name: torch.zeros_like(p) for name, p in self.named.items()}
        for g in range(size):
            kappa = torch.tensor(self.coefficients(n, g, baseline), dtype=torch.float64)
            with self.true_derivative():
                logp, entropy = self.tokens(n, g)
                for name, gradient in self.gradient((entropy + kappa * logp).sum()).items():
                    total[name] -= gradient / size
        return total

    def y(self, n: int) -> dict[str, Tensor]:
        line = self.lines[n]
        size, longest = len(line["rewards"]), max(len(r) for r in line["response_ids"])
        mean = sum(line["rewards"]) / size
        loss = torch.zeros((), dtype=torch.float64)
        for g in range(size):
            loss = loss + (line["rewards"][g] - mean) / longest * self.tokens(n, g)[0].sum() / size
        return self.gradient(loss)

    def directional(self, v: dict[str, Tensor]) -> list[list[dict[str, Tensor]]]:
        """Per response: s, R, H, D_vS, D_vR, D_v log p, D_v H, and first and second derivative along v of both
        `change_terms`, by autograd through them."""
        return [[self._along(n, g, v) for g in range(len(line["rewards"]))] for n, line in enumerate(self.lines)]

    def change_terms(
        self, n: int, g: int, logp_after: Tensor, entropy_after: Tensor, logp: Tensor, entropy: Tensor
    ) -> list[Tensor]:
        """Σ_t w_{<t}[(H_t⁺ − H_t) + (ρ_t − 1)c_t] of the entropy and of the length, with the baseline `hk_group`."""
        found = []
        for of_length in (False, True):
            weight, total = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for t, c in enumerate(self.coefficients(n, g, "hk_group", of_length=of_length)):
                rho = torch.exp(logp_after[t] - logp[t])
                moved = torch.zeros(()) if of_length else entropy_after[t] - entropy[t]
                total = total + weight * (moved + (rho - 1) * c)
                weight = weight * rho
            found.append(total)
        return found

    def second(self, n: int, g: int, v: dict[str, Tensor]) -> tuple[float, float]:
        """(D²_vR, D²_vS) of one response, differentiated twice in reverse mode."""
        with self.true_derivative():
            logp, entropy = self.tokens(n, g)
            found = []
            for value in (entropy.sum(), logp.sum()):
                gradient = self.gradient(value, create_graph=True, retain_graph=True)
                first = torch.stack([(gradient[name] * v[name]).sum() for name in v]).sum()
                twice = self.gradient(first, retain_graph=True)
                found.append(float(torch.stack([(twice[name] * v[name]).sum() for name in v]).sum().data))
        return found[0], found[1]

    def _along(self, n: int, g: int, v: dict[str, Tensor]) -> dict[str, Tensor]:
        def dot(grads: dict[str, Tensor]) -> Tensor:
            return sum((grads[name] * v[name]).sum() for name in v)  # pyright: ignore[reportReturnType]

        with self.true_derivative():
            logp, entropy = self.tokens(n, g)
            first_s = dot(self.gradient(logp.sum(), retain_graph=True))
            first_r = dot(self.gradient(entropy.sum(), retain_graph=True))
            d_logp = torch.stack([dot(self.gradient(x, retain_graph=True)) for x in logp])
            d_entropy = torch.stack([dot(self.gradient(x, retain_graph=True)) for x in entropy])
            of_change = []
            for term in self.change_terms(n, g, logp, entropy, logp.data, entropy.data):
                first = dot(self.gradient(term, create_graph=True, retain_graph=True))
                of_change += [first, dot(self.gradient(first, retain_graph=True))]
        values = {
            "s": logp.sum(), "r": entropy.sum(), "entropy": entropy, "d_logp": d_logp, "d_entropy": d_entropy,
            "d_s": first_s, "d_r": first_r, "of_change": torch.stack(of_change),
        }  # fmt: skip
        return {key: value.data for key, value in values.items()}


def _shrunk(later: dict[tuple[int, int, int], float], n: int, g: int, t: int) -> float:
    """The mean of R_{>t} over the own prompt's other responses, drawn towards that over other prompts by the variances
    within and between the latter: nτ²/(nτ² + σ²) of it stays."""
    groups: dict[int, dict[int, list[float]]] = {}  # step → prompt → values, of the other prompts
    for (m, _, k), r in later.items():
        if m != n:
            groups.setdefault(k, {}).setdefault(m, []).append(r)
    own = [r for (m, h, k), r in later.items() if m == n and h != g and k == t]
    if not groups:
        return mean(own) if own else 0.0
    flat = [values for of_step in groups.values() for values in of_step.values()]
    freedom = sum(len(values) - 1 for values in flat)
    sigma2 = math.fsum((x - mean(values)) ** 2 for values in flat for x in values) / max(freedom, 1)
    excess, spread = 0.0, 0.0
    for of_step in groups.values():
        counts, everyone = [len(values) for values in of_step.values()], [x for v in of_step.values() for x in v]
        excess += math.fsum(len(v) * (mean(v) - mean(everyone)) ** 2 for v in of_step.values())
        excess -= (len(counts) - 1) * sigma2
        spread += sum(counts) - sum(k * k for k in counts) / sum(counts)
    tau2 = excess / max(spread, 1.0)
    largest = max(abs(mean([x for v in of_step.values() for x in v])) for of_step in groups.values())
    if tau2 <= (1e-6 * largest) ** 2:
        tau2 = 0.0
    at_step = [x for v in groups.get(t, {}).values() for x in v]
    if not at_step:
        return mean(own) if own else 0.0
    share = len(own) * tau2 / (len(own) * tau2 + sigma2) if len(own) * tau2 + sigma2 > 0 else 0.0
    return share * (mean(own) if own else 0.0) + (1 - share) * mean(at_step)


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
