"""The weights of an update again, token by token in Python's floats: nothing of `estimators/update_weights.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from entropy_probe.config import Recipe
from entropy_probe.estimators.update_weights import UpdateBatch
from entropy_probe.stages.gradients.payloads import Payload


def y_payload_by_loop(recipe: Recipe, batch: UpdateBatch) -> Payload:
    """`payloads.y_payload` of the whole batch."""
    prompts, group = batch.rewards.shape
    loop = _Loop(recipe, batch)
    a = {row: loop.of_response(*row) for row in loop.rows}
    if all(isinstance(one, float) for one in a.values()):
        weights = torch.zeros(prompts, group, dtype=torch.float64)
        for (n, g), one in a.items():
            weights[n, g] = prompts * one
        return Payload(weights)
    found = next((t for t in (batch.logp, batch.weights, batch.advantages) if t is not None), None)
    assert found is not None
    kappa = torch.zeros(prompts, group, found.shape[-1], dtype=torch.float64)
    of_entropy = torch.zeros_like(kappa)
    for n, g, t in loop.tokens():
        one: Any = a[n, g]
        kappa[n, g, t] = one if isinstance(one, float) else one[t]
        of_entropy[n, g, t] = loop.of_entropy(n, g, t)
    weights = torch.full((prompts, group), float(prompts), dtype=torch.float64)
    return Payload(weights, kappa, of_entropy if recipe.entropy_coef != 0 else 0.0)


@dataclass
class _Loop:
    recipe: Recipe
    batch: UpdateBatch

    def __post_init__(self) -> None:
        batch = self.batch
        self.rewards, self.lengths = batch.rewards.tolist(), batch.lengths.tolist()
        self.micro = batch.micro_batch.tolist()
        self.own = [[g for g, length in enumerate(of) if length] for of in self.lengths]
        self.rows = [(n, g) for n, own in enumerate(self.own) for g in own]
        self.logp, self.reference, self.entropy, self.sampler = (
            None if of is None else of.tolist()
            for of in (batch.logp, batch.reference, batch.entropy, batch.sampler)
        )
        self.a = {row: self._advantage(*row) for row in self.rows}
        taken = batch.taken
        self.kept = {
            row: self._counts(*row) if taken is None or bool(taken[row]) else 0 for row in self.rows
        }
        self.count = {row: self.lengths[row[0]][row[1]] * self.kept[row] for row in self.rows}
        self.least = {k: self._threshold(k) for k in {k for of in self.micro for k in of}}
        self.spread = self._over_tokens() if self.recipe.whiten else (0.0, 1.0)

    def tokens(self) -> list[tuple[int, int, int]]:
        return [(n, g, t) for n, g in self.rows for t in range(self.lengths[n][g])]

    def of_response(self, n: int, g: int) -> float | list[float]:
        """a of the response's tokens: one number where they cannot differ."""
        if self.batch.weights is not None:
            return self.batch.weights[n, g].tolist()
        if not self.recipe.by_token and isinstance(self.a[n, g], float):
            return self._w(n, g) * self._policy(n, g, 0)
        return [self._token(n, g, t) for t in range(self.lengths[n][g])]

    def of_entropy(self, n: int, g: int, t: int) -> float:
        recipe = self.recipe
        if recipe.entropy_coef == 0 or not self._acts(n, g, t):
            return 0.0
        if recipe.entropy_normaliser == "same":
            return recipe.entropy_coef * self._w(n, g) * self.kept[n, g]
        mine = self.micro[n][g]
        acting = [
            1
            for m, h, s in self.tokens()
            if self.micro[m][h] == mine and self.kept[m, h] and self._acts(m, h, s)
        ]
        own = recipe.entropy_coef * self.kept[n, g]
        return own / max(len(acting), 1) / self._micro_batches()

    def _token(self, n: int, g: int, t: int) -> float:
        if not self.kept[n, g]:
            return 0.0
        value = self._policy(n, g, t) if self._acts(n, g, t) else 0.0
        if self.recipe.kl_coef > 0 and self.recipe.kl_in == "loss":
            value -= self.recipe.kl_coef * self._slope(self._delta(n, g, t))
        return self._w(n, g) * value

    def _policy(self, n: int, g: int, t: int) -> float:
        mean, deviation = self.spread
        centred = (self._a(n, g, t) - mean) / deviation
        return centred * self._rho(n, g, t) * self.kept[n, g]

    def _a(self, n: int, g: int, t: int) -> float:
        recipe = self.recipe
        own: Any = self.a[n, g]
        value = recipe.factor * (own if isinstance(own, float) else own[t])
        if recipe.kl_coef > 0 and recipe.kl_in == "return":
            later = range(t, self.lengths[n][g])
            value -= recipe.kl_coef * math.fsum(self._estimate(self._delta(n, g, s)) for s in later)
        return value

    def _over_tokens(self) -> tuple[float, float]:
        values = [self._a(*token) for token in self.tokens()]
        return statistics.fmean(values), math.sqrt(statistics.pvariance(values) + 1e-8)

    def _advantage(self, n: int, g: int) -> float | list[float]:
        recipe, given = self.recipe, self.batch.advantages
        if given is not None:
            return given[n, g].tolist()
        if recipe.scale in ("batch", "advantages"):
            of_all = [self._reward(*row) for row in self.rows]
            over, middle = of_all, 0.0
            if recipe.scale == "advantages":
                over = [self._centred(*row) for row in self.rows]
                middle = statistics.fmean(over)
            return (self._centred(n, g) - middle) / (self._deviation(over) + recipe.eps)
        own = [self._reward(n, k) for k in self.own[n] if self._is_scale(k, g)]
        if recipe.scale == "none":
            return self._centred(n, g)
        deviation = self._deviation(own)
        if deviation == 0 and recipe.undivided_at_zero:
            return self._centred(n, g)
        return self._centred(n, g) / (deviation + recipe.eps)

    def _is_scale(self, k: int, g: int) -> bool:
        return self.recipe.scale != "leave_one_out" or k != g

    def _deviation(self, values: Sequence[float]) -> float:
        if len(values) <= self.recipe.ddof:
            return 0.0
        return statistics.stdev(values) if self.recipe.ddof else statistics.pstdev(values)

    def _centred(self, n: int, g: int) -> float:
        reward, others = self._reward(n, g), [self._reward(n, k) for k in self.own[n] if k != g]
        if self.recipe.baseline == "none":
            return reward
        over = [reward, *others] if self.recipe.baseline == "mean" else others
        if not over or min(over) == max(over) == reward:  # the mean of equal values may be off
            return reward - sum(over[:1])
        return reward - math.fsum(over) / len(over)

    def _reward(self, n: int, g: int) -> float:
        recipe, reward = self.recipe, self.rewards[n][g]
        masked = recipe.mask_truncated and bool(self.batch.truncated[n, g])
        if recipe.kl_coef > 0 and recipe.kl_in == "reward" and not masked:
            each = range(self.lengths[n][g])
            reward -= recipe.kl_coef * math.fsum(self._estimate(self._delta(n, g, t)) for t in each)
        return reward

    def _counts(self, n: int, g: int) -> int:
        """1 where a response takes part, if the step takes it."""
        recipe, own = self.recipe, [self.rewards[n][k] for k in self.own[n]]
        if recipe.mask_truncated and bool(self.batch.truncated[n, g]):
            return 0
        if recipe.drop == "zero_std" and max(own) == min(own):
            return 0
        a = self.a[n, g]
        largest = max(map(abs, a)) if isinstance(a, list) else abs(a)
        if recipe.drop == "zero_advantage" and largest <= 1e-12 * max(map(abs, own)):
            return 0
        return 1

    def _w(self, n: int, g: int) -> float:
        kind, taken = self.recipe.normaliser, self.batch.taken
        rows = len(self.rows) if taken is None else int(taken.sum())
        group = [self.count[n, k] for k in self.own[n]]
        if kind == "longest":
            return 1 / max(*group, 1) / rows
        if kind == "prompt_tokens":
            return len(group) / sum(group) / rows if sum(group) else 0.0
        if kind == "sequence_mean":
            return 1 / max(self.count[n, g], 1) / rows
        if kind == "batch_tokens":
            return 1 / max(sum(self.count.values()), 1)
        if kind == "rollout_tokens":
            whole = sum(self.lengths[m][h] for m, h in self.rows if self._counts(m, h))
            return len(self.rows) / rows / max(whole, 1)
        if kind == "micro_batch_tokens":
            mine = [row for row in self.rows if self.micro[row[0]][row[1]] == self.micro[n][g]]
            return 1 / max(sum(self.count[row] for row in mine), 1) / self._micro_batches()
        if kind == "sum":
            return 1 / rows
        return 1 / (self.recipe.constant or self.batch.max_new_tokens) / rows

    def _micro_batches(self) -> int:
        return 1 + max(max(row) for row in self.micro)

    def _threshold(self, k: int) -> float:
        """The entropy from which on a token of a micro-batch acts: a quantile, linear between two values."""
        share = 1 - self.recipe.top_entropy_quantile
        if share <= 0:
            return -math.inf
        assert self.entropy is not None
        values = sorted(
            self.entropy[n][g][t]
            for n, g, t in self.tokens()
            if self.micro[n][g] == k and self.kept[n, g]
        )
        if not values:
            return math.inf
        place = share * (len(values) - 1)
        low = min(int(place), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    def _acts(self, n: int, g: int, t: int) -> bool:
        if self.recipe.top_entropy_quantile >= 1:
            return True
        assert self.entropy is not None
        return bool(self.kept[n, g]) and self.entropy[n][g][t] >= self.least[self.micro[n][g]]

    def _rho(self, n: int, g: int, t: int) -> float:
        kind = self.recipe.importance
        if kind == "none" or self.sampler is None:
            return 1.0
        assert self.logp is not None
        off = [p - q for p, q in zip(self.logp[n][g], self.sampler[n][g], strict=True)]
        level, cut = kind.split("_")
        ratio = math.exp(math.fsum(off[: self.lengths[n][g]]) if level == "sequence" else off[t])
        if ratio <= self.recipe.importance_cap:
            return ratio
        return self.recipe.importance_cap if cut == "truncate" else 0.0

    def _delta(self, n: int, g: int, t: int) -> float:
        assert self.logp is not None
        assert self.reference is not None
        return self.logp[n][g][t] - self.reference[n][g][t]

    def _estimate(self, delta: float) -> float:
        if self.recipe.kl == "k1":
            return delta
        return delta**2 / 2 if self.recipe.kl == "k2" else math.exp(-delta) - 1 + delta

    def _slope(self, delta: float) -> float:
        if self.recipe.kl == "k1":
            return 1.0
        return 1 - math.exp(-delta) if self.recipe.kl == "k3" else delta
