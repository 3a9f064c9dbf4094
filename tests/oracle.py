"""A policy small enough to enumerate: every expectation that the probe estimates, as a finite sum in float64.

Six tokens, one of them EOS, responses of at most four: 781 of them for each of twelve prompts, so H, ∇H, E[Y], δH₁, the
curvature and ΔH(η) are exact. Prompts are drawn i.i.d. with replacement, because a fixed set of prompts biases U_cross
(its pairs n ≠ m never repeat a prompt). ∇S of every response is a table, so a replication is a draw of indices.

    logits(n, prefix) = W·tanh(prompt_n + previous token + position) + b,   nothing of `estimators` is used here
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

TOKENS, EOS, LIMIT, PROMPTS, HIDDEN = 6, 0, 4, 12, 3
_PARTS = {"prompt": (PROMPTS, HIDDEN), "token": (TOKENS, HIDDEN), "position": (LIMIT, HIDDEN)}
_PARTS |= {"output": (HIDDEN, TOKENS), "bias": (TOKENS,)}
SIZES = {name: math.prod(shape) for name, shape in _PARTS.items()}
NUM_PARAMETERS = sum(SIZES.values())


def _responses() -> list[tuple[int, ...]]:
    """Every response: no EOS before its last token, and LIMIT tokens where it does not end with EOS."""
    words = [w for k in range(LIMIT) for w in itertools.product(range(1, TOKENS), repeat=k)]
    return [(*w, EOS) for w in words] + list(itertools.product(range(1, TOKENS), repeat=LIMIT))


RESPONSES = _responses()
LENGTHS = torch.tensor([len(r) for r in RESPONSES])
# A prefix acts through its last token and its length: state = position·TOKENS + last token (EOS: none yet). Past the
# end of a response stands one more state, and one more cell, which hold zeros.
_STATES = LIMIT * TOKENS
_STATE_OF = torch.full((len(RESPONSES), LIMIT), _STATES)
_CELL_OF = torch.full((len(RESPONSES), LIMIT), _STATES * TOKENS)
for _row, _response in enumerate(RESPONSES):
    for _t, (_last, _token) in enumerate(zip((EOS, *_response), _response, strict=False)):
        _STATE_OF[_row, _t] = _t * TOKENS + _last
        _CELL_OF[_row, _t] = (_t * TOKENS + _last) * TOKENS + _token


def _tables(theta: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of every cell [..., PROMPTS, cells], H of every state [..., PROMPTS, states]) at θ [..., D]."""
    flat = theta.split(list(SIZES.values()), dim=-1)
    part = {
        name: values.reshape(*theta.shape[:-1], *shape)
        for (name, shape), values in zip(_PARTS.items(), flat, strict=True)
    }
    state = part["position"].unsqueeze(-2) + part["token"].unsqueeze(-3)
    state = state.flatten(-3, -2).unsqueeze(-3)
    hidden = torch.tanh(part["prompt"].unsqueeze(-2) + state)
    logits = hidden @ part["output"].unsqueeze(-3) + part["bias"][..., None, None, :]
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    zero = torch.zeros_like(entropy[..., :1])
    return torch.cat([logp.flatten(-2), zero], -1), torch.cat([entropy, zero], -1)


@dataclass(frozen=True)
class PerToken:
    """Of every response: log p and H_t [..., PROMPTS, responses, LIMIT], zero past its end."""

    logp: Tensor
    entropy: Tensor


def per_token(cells: Tensor, states: Tensor) -> PerToken:
    """Tables (or derivatives of tables) along every response."""
    return PerToken(cells[..., _CELL_OF], states[..., _STATE_OF])


@dataclass(frozen=True)
class Draw:
    """Indices of B prompts and of G responses of each, for R replications: [R, B] and [R, B, G]."""

    prompts: Tensor
    responses: Tensor

    def of(self, table: Tensor) -> Tensor:
        """Entries of a table [PROMPTS, responses, ...] → [R, B, G, ...]."""
        return table[self.prompts[..., None], self.responses]

    @property
    def lengths(self) -> Tensor:
        return LENGTHS[self.responses]

    def rows(self, part: slice) -> Draw:
        return Draw(self.prompts[part], self.responses[part])


@dataclass(frozen=True)
class Oracle:
    """θ [D] and rewards in {0, 1} [PROMPTS, responses]. Every property is exact, an enumeration over all responses."""

    theta: Tensor
    rewards: Tensor

    @cached_property
    def tokens(self) -> PerToken:
        return per_token(*_tables(self.theta))

    @cached_property
    def seq_logp(self) -> Tensor:
        """S [PROMPTS, responses]."""
        return self.tokens.logp.sum(-1)

    @cached_property
    def rb_sum(self) -> Tensor:
        """R [PROMPTS, responses]."""
        return self.tokens.entropy.sum(-1)

    @cached_property
    def probability(self) -> Tensor:
        return self.seq_logp.exp()

    @cached_property
    def step_logp(self) -> Tensor:
        """log p of all tokens at every step of a response [PROMPTS, responses, LIMIT, TOKENS], zero past its end."""
        cells = _tables(self.theta)[0][:, :-1].reshape(PROMPTS, _STATES, TOKENS)
        return torch.cat([cells, torch.zeros_like(cells[:, :1])], 1)[:, _STATE_OF]

    @cached_property
    def jacobians(self) -> tuple[Tensor, Tensor]:
        """(∇log p of every cell [PROMPTS, cells, D], ∇H of every state [PROMPTS, states, D])."""
        found: Any = torch.func.jacrev(_tables)(self.theta)
        return found

    @cached_property
    def gradient(self) -> Tensor:
        """∇S [PROMPTS, responses, D]: the Jacobian of every log p, summed along the response."""
        return sum(self.jacobians[0][:, _CELL_OF[:, t]] for t in range(LIMIT))  # pyright: ignore[reportReturnType]

    def entropy(self, theta: Tensor) -> Tensor:
        """H(θ') [...] of θ' [..., D]: every response once more at every θ'."""
        values = [_entropy(part) for part in theta.reshape(-1, NUM_PARAMETERS).split(100)]
        return torch.cat(values).reshape(theta.shape[:-1])

    @cached_property
    def entropy_gradient(self) -> Tensor:
        """∇H [D], by autograd through the enumeration."""
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(_entropy(theta), theta)[0]

    @cached_property
    def mean_x(self) -> Tensor:
        """E[X] = −∇H."""
        return -self.entropy_gradient

    def curvature(self, v: Tensor) -> float:
        """vᵀ∇²Hv, by autograd twice through the enumeration."""
        eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(_entropy(self.theta + eta * v), eta, create_graph=True)[0]
        return float(torch.autograd.grad(first, eta)[0])

    def entropy_per_token(self, theta: Tensor) -> Tensor:
        """H(θ')/E[T], the entropy per token at θ' [D]: what ΣR/ΣT of an endless batch is."""
        seq_logp = _seq_logp(theta)
        return _entropy(theta) / (seq_logp.exp() * LENGTHS).sum(-1).mean(-1)

    def slope_per_token(self, v: Tensor) -> float:
        """Derivative of the entropy per token along v, by autograd through the enumeration."""
        eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return float(torch.autograd.grad(self.entropy_per_token(self.theta + eta * v), eta)[0])

    def along(self, v: Tensor) -> tuple[PerToken, PerToken]:
        """(D_v, D²_v) of log p and H_t of every response."""

        def line(eta: Tensor) -> tuple[Tensor, Tensor]:
            return _tables(self.theta + eta * v)

        zero = torch.zeros((), dtype=torch.float64)
        first: Any = torch.func.jacrev(line)
        return per_token(*first(zero)), per_token(*torch.func.jacfwd(first)(zero))

    def mean_y(self, group: int, advantage: str = "centered", loss: str = "lmax") -> Tensor:
        """E[Y] [D]. Y sees a response through its class (length, reward) alone: sum over the class of one response and
        the multiset of the classes of its G−1 neighbours, times the mean of ∇S within the class."""
        classes = [(length, reward) for length in range(1, LIMIT + 1) for reward in (0, 1)]
        of_class = torch.stack([(t == LENGTHS) & (self.rewards == r) for t, r in classes])  # [class, prompt, response]
        mass = (of_class * self.probability).sum(-1).T  # [prompt, class]
        score = torch.einsum("cps,ps,psd->pcd", of_class.double(), self.probability, self.gradient)
        weight = torch.zeros_like(mass)
        for others in itertools.combinations_with_replacement(range(len(classes)), group - 1):
            ways = math.factorial(group - 1)
            for count in (others.count(c) for c in set(others)):
                ways //= math.factorial(count)
            chance = ways * mass[:, list(others)].prod(-1)
            for own in range(len(classes)):
                members = [classes[c] for c in (own, *others)]
                weight[:, own] += chance * _weight_of_first(members, advantage, loss)
        return torch.einsum("pc,pcd->d", weight, score) / PROMPTS

    def draw(self, replications: int, prompts: int, group: int, seed: int, *, fixed_set: bool = False) -> Draw:
        """Prompts i.i.d. with replacement (or, in `fixed_set`, 0 … prompts−1 each time), then responses by their exact
        probabilities, through the inverse of the cumulative one."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(PROMPTS, (replications, prompts), generator=generator)
        if fixed_set:
            chosen = torch.arange(prompts).repeat(replications, 1)
        return self._responses_of(chosen, group, generator)

    def redraw(self, draw: Draw, seed: int) -> Draw:
        """Fresh responses of the same prompts, as many of each."""
        return self._responses_of(draw.prompts, draw.responses.shape[-1], torch.Generator().manual_seed(seed))

    def _responses_of(self, chosen: Tensor, group: int, generator: torch.Generator) -> Draw:
        uniform = torch.rand(*chosen.shape, group, generator=generator, dtype=torch.float64)
        responses = torch.zeros(uniform.shape, dtype=torch.long)
        for n, cumulative in enumerate(self.probability.cumsum(-1)):
            here = chosen == n
            responses[here] = torch.searchsorted(cumulative, uniform[here]).clamp(max=len(RESPONSES) - 1)
        return Draw(chosen, responses)

    def weighted_gradient(self, draw: Draw, weights: Tensor) -> Tensor:
        """Σ_g weights_g ∇S_g [R, B, D], some replications at a time."""
        out = torch.empty(*draw.prompts.shape, len(self.theta), dtype=torch.float64)
        for part in torch.arange(len(draw.prompts)).split(max(1, 2**15 // draw.responses[0].numel())):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            out[rows] = (weights[rows].unsqueeze(-2) @ draw.rows(rows).of(self.gradient)).squeeze(-2)
        return out

    def rb_gradient(self, draw: Draw, coefficients: Tensor) -> Tensor:
        """mean_i[Σ_t ∇H_t + Σ_t c_t ∇log p_t] [R, D] of c [R, B, G, LIMIT]: what each cell and state is counted for,
        times its gradient."""
        return self.rb_gradients(draw, [coefficients])[0]

    def rb_gradients(self, draw: Draw, of_each: Iterable[Tensor]) -> list[Tensor]:
        """`rb_gradient` of each of several c; the first sum is the same."""
        of_cells, of_states = self.jacobians

        def weighted(table: Tensor, where: Tensor, weights: Tensor) -> Tensor:
            index = draw.prompts[..., None, None] * table.shape[1] + where[draw.responses]
            total = torch.zeros(len(draw.prompts), PROMPTS * table.shape[1], dtype=torch.float64)
            return total.scatter_add(1, index.flatten(1), weights.flatten(1)) @ table.flatten(0, 1)

        steps = torch.ones(*draw.responses.shape, LIMIT, dtype=torch.float64)
        of_entropy = weighted(of_states, _STATE_OF, steps)
        return [(weighted(of_cells, _CELL_OF, c) + of_entropy) / draw.responses[0].numel() for c in of_each]

    def scores(self, draw: Draw, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(S, R) [R, B, G] of the drawn responses at θ' [D], or at one θ' for each replication [R, D]."""
        cells, states = _tables(theta.reshape(-1, len(self.theta)))

        def along(table: Tensor, where: Tensor) -> Tensor:
            table = table.expand(len(draw.prompts), -1, -1)
            index = draw.prompts[..., None, None] * table.shape[-1] + where[draw.responses]
            return table.flatten(1).gather(1, index.flatten(1)).reshape(index.shape).sum(-1)

        return along(cells, _CELL_OF), along(states, _STATE_OF)


def _seq_logp(theta: Tensor) -> Tensor:
    return per_token(*_tables(theta)).logp.sum(-1)


def _entropy(theta: Tensor) -> Tensor:
    """H = mean over prompts of −Σ p·S."""
    seq_logp = _seq_logp(theta)
    return -(seq_logp.exp() * seq_logp).sum(-1).mean(-1)


def _reward(theta: Tensor, rewards: Tensor) -> Tensor:
    return (_seq_logp(theta).exp() * rewards).sum(-1).mean()


def _weight_of_first(members: list[tuple[int, int]], advantage: str, loss: str) -> float:
    """A/divisor of the first of a group of (length, reward)."""
    lengths, rewards = zip(*members, strict=True)
    size, mean = len(members), sum(rewards) / len(members)
    value = rewards[0] - (0.0 if advantage == "raw" else mean)
    if advantage == "grpo":
        value /= math.sqrt(sum((r - mean) ** 2 for r in rewards) / (size - 1)) + 1e-4
    return (
        value
        / {
            "lmax": max(lengths),
            "sequence_mean": lengths[0],
            "token_mean": sum(lengths) / size,
            "constant": LIMIT,
        }[loss]
    )


# The states of training in which claims are tested


@dataclass(frozen=True)
class Regime:
    """An oracle, and a diagonal P [D] for its first-order term."""

    oracle: Oracle
    precond: Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pass_rates(low: float, high: float) -> Tensor:
    """Difficulty: the share of responses that a prompt rewards."""
    return torch.linspace(low, high, PROMPTS, dtype=torch.float64)[:, None]


def _coin_rewards(seed: int) -> Tensor:
    """Rewards without a pattern to learn: each response of a prompt with the prompt's pass rate."""
    uniform = torch.rand(PROMPTS, len(RESPONSES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (uniform < _pass_rates(0.15, 0.85)).double()


def _adam(theta: Tensor, loss: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        theta.grad = torch.autograd.grad(loss(theta), theta)[0]
        optimizer.step()
    return theta.detach()


def _untrained() -> Tensor:
    theta = 0.4 * _normal(NUM_PARAMETERS, seed=4)
    theta[-TOKENS:] += torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    return theta


def _shared_precond() -> Tensor:
    """P large where all prompts share a parameter: the fewer directions carry noise, the nearer ζ₂ is to 2ζ₁."""
    own = NUM_PARAMETERS - SIZES["bias"]
    precond = torch.cat([torch.full((own,), 0.5), torch.full((SIZES["bias"],), 10.0)]).double()
    return precond * (0.2 * _normal(NUM_PARAMETERS, seed=5)).exp()


@cache
def strong() -> Regime:
    """Untrained; a response is rewarded for one or two (by prompt) of the likeliest token, which all prompts share:
    the signal is far above the noise of a prompt, ζ₂ is near its least value 2ζ₁."""
    rewards = torch.tensor(
        [[float(response.count(1) >= 1 + n % 2) for response in RESPONSES] for n in range(PROMPTS)], dtype=torch.float64
    )
    return Regime(Oracle(_untrained(), rewards), _shared_precond())


@cache
def sharpening() -> Regime:
    """Untrained; every prompt rewards its likely responses, the hard ones fewer: A goes with S in every group, so that
    X_n and Y_n of one prompt are nearly parallel, and their products skew."""
    seq_logp = _seq_logp(theta := _untrained())
    order = seq_logp.argsort(-1, descending=True)
    rank_mass = seq_logp.exp().gather(-1, order).cumsum(-1)
    rewards = torch.zeros_like(seq_logp).scatter(-1, order, (rank_mass <= _pass_rates(0.2, 0.8)).double())
    return Regime(Oracle(theta, rewards), _shared_precond())


@cache
def weak() -> Regime:
    """θ where ∇H and the gradient of the expected reward have nearly vanished (both were minimised), rewards without a
    pattern: what is left of X and Y is noise, ζ₂ is hundreds of ζ₁."""
    rewards = _coin_rewards(seed=4)

    def size_of_gradients(theta: Tensor) -> Tensor:
        entropy = torch.autograd.grad(_entropy(theta), theta, create_graph=True)[0]
        reward = torch.autograd.grad(_reward(theta, rewards), theta, create_graph=True)[0]
        return entropy.square().sum() + 4 * reward.square().sum()

    theta = _adam(_normal(NUM_PARAMETERS, seed=3), size_of_gradients, steps=100, lr=0.03)
    return Regime(Oracle(theta, rewards), (0.2 * _normal(NUM_PARAMETERS, seed=5)).exp())


@cache
def solved() -> Regime:
    """θ trained on the same rewards, with a small entropy bonus, until nearly every response is rewarded: a group with
    two different rewards, the only one with Y ≠ 0, is rare."""
    rewards = _coin_rewards(seed=4)
    theta = 0.6 * _normal(NUM_PARAMETERS, seed=3)
    theta = _adam(theta, lambda t: -_reward(t, rewards) - 0.05 * _entropy(t), steps=150, lr=0.05)
    return Regime(Oracle(theta, rewards), torch.ones(NUM_PARAMETERS, dtype=torch.float64))
