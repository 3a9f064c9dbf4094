"""Teacher forcing: log p, log q and entropy of π at every generated token, at θ or at θ+ηv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import GenerationConfig, PrecisionSection, ProbeConfig
from entropy_probe.errors import MeasurementError, RolloutsError
from entropy_probe.estimators.placing import mass_before
from entropy_probe.estimators.policy import TokenScores, score_tokens
from entropy_probe.estimators.predictors import mean_s
from entropy_probe.estimators.token_stats import features_of_logits, with_position
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.shared_prompts import Read, Sharing, read_once, sharing_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Tokens of a pass without a graph, where `tf_batch_size` rows have fewer: a small model spends most of such a pass on
# the overhead of each operation.
_TOKENS = 4096
SPREAD_ROWS = 4


@dataclass(frozen=True)
class Scores:
    """Per token [B, G, T], zero past the end of a response; sums over a response in float64 [B, G].

    `rb_entropy` is of π, `rb_entropy_q` of q; they are one where top_p = 1. `features` are φ [B, G, T, 7] of
    `token_stats.baseline_features`, `before` is `placing.mass_before` [B, G, T, 2], `mean_s` is `predictors.mean_s`
    [B, G, T], where they were asked for.
    """

    token_logp: Float[Tensor, "B G T"]
    token_logq: Float[Tensor, "B G T"]
    rb_entropy: Float[Tensor, "B G T"]
    rb_entropy_q: Float[Tensor, "B G T"]
    gen_lens: Int[Tensor, "B G"]
    features: Float[Tensor, "B G T 7"] | None = None
    before: Float[Tensor, "B G T 2"] | None = None
    mean_s: Float[Tensor, "B G T"] | None = None

    def of_prompts(self, prompts: Int[Tensor, " b"], each: int | None = None) -> Scores:
        """The same for some prompts only, and the first responses of `each`, without which all."""
        given = {name: values for name, values in vars(self).items() if values is not None}
        return Scores(**{name: values[prompts][:, :each] for name, values in given.items()})

    def with_logq_of(self, scores: Scores) -> Scores:
        """These with log q as other `scores` of the same responses have it, where it may be one sum (T = 1)."""
        steps = self.token_logp.shape[-1]
        token_logq = scores.token_logq[..., :steps]
        return replace(
            self, token_logq=torch.nn.functional.pad(token_logq, (0, steps - token_logq.shape[-1]))
        )

    @property
    def seq_logp(self) -> Float[Tensor, "B G"]:
        return self.token_logp.double().sum(-1)

    @property
    def seq_logq(self) -> Float[Tensor, "B G"]:
        return self.token_logq.double().sum(-1)

    @property
    def rb_sum(self) -> Float[Tensor, "B G"]:
        return self.rb_entropy.double().sum(-1)

    @property
    def rb_sum_q(self) -> Float[Tensor, "B G"]:
        return self.rb_entropy_q.double().sum(-1)


def read_rows(
    bound: BoundModel,
    rollouts: Rollouts,
    rows: Int[Tensor, " R"],
    read: Read,
    *,
    override: Mapping[str, Tensor] | None = None,
    true_derivative: bool = False,
    once: bool = False,
    rows_at_once: int | None = None,
    beside: Float[Tensor, "R Tmax *C"] | None = None,
    capture: Capture | None = None,
) -> tuple[Tensor, ...]:
    """`read(logits, tokens)` at every generated token of some rows, [R, T, …]; zero past the end of a response.

    (logits [r, V], tokens [r]) → tensors [r, …]; the entries [r] of `beside` are a third argument where it is given.
    The logits at position i−1 predict the token at position i. `read` gets some of the tokens and their logits at a
    time, and returns tensors with one entry for each. T is the longest response of the rows. `once` and `capture` as
    in `BoundModel.read_logits`.
    """
    device = bound.device
    prompt_lens, gen_lens = rollouts.prompt_lens[rows], rollouts.gen_lens[rows]
    ids = rollouts.ids[rows, : int((prompt_lens + gen_lens).max())].to(device)
    inside = torch.arange(int(gen_lens.max()))[None, :] < gen_lens[:, None]
    of_row, step = (index.to(device) for index in inside.nonzero(as_tuple=True))
    column = prompt_lens.to(device)[of_row] - 1 + step
    given = [ids[of_row, column + 1]]
    if beside is not None:
        given.append(beside.to(device)[of_row, step])
    flat = bound.read_logits(
        ids,
        of_row,
        column,
        lambda logits, part: read(logits, *(values[part] for values in given)),
        override=override,
        true_derivative=true_derivative,
        once=once,
        rows_at_once=rows_at_once,
        capture=capture,
    )
    return tuple(
        v.new_zeros(*inside.shape, *v.shape[1:]).index_put((of_row, step), v) for v in flat
    )


def policy_scores(bound: BoundModel, policy: GenerationConfig, precision: PrecisionSection) -> Read:
    """(log p, log q, entropy of π, entropy of q) of some tokens under the policy, as a reading for `read_rows`."""
    dtype = (
        torch.float64 if precision.entropy_fp64 else torch.promote_types(bound.dtype, torch.float32)
    )
    return partial(_scored, policy, dtype)


def _scored(
    policy: GenerationConfig, dtype: torch.dtype, logits: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    scored = score_tokens(logits, tokens, policy.temperature, policy.top_p, dtype)
    return scored.logp, scored.logq, scored.entropy, scored.entropy_q


def scored_at_theta(
    policy: GenerationConfig,
    read: Read,
    with_features: bool,
    with_mean_s: bool,
    logits: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, ...]:
    """What `read` gives, the mass before the token, Σ_i p_i S_i, and the features φ but for the position."""
    found = *read(logits, tokens), mass_before(logits, tokens, policy.temperature, policy.top_p)
    if with_mean_s:
        found = *found, mean_s(logits, policy.temperature)
    if with_features:
        found = *found, features_of_logits(logits, policy.top_p, policy.temperature)
    return found


def score_rows(
    bound: BoundModel,
    rollouts: Rollouts,
    rows: Int[Tensor, " R"],
    config: ProbeConfig,
    *,
    override: Mapping[str, Tensor] | None = None,
    true_derivative: bool = False,
    once: bool = False,
    rows_at_once: int | None = None,
) -> TokenScores:
    """Scores [R, T] of some rows; T is their longest response, entries past a response's end are zero.

    One function for θ and θ+ηv, with and without a graph.
    """
    read = policy_scores(bound, config.generation, config.precision)
    options = {
        "override": override,
        "true_derivative": true_derivative,
        "once": once,
        "rows_at_once": rows_at_once,
    }
    return TokenScores(*read_rows(bound, rollouts, rows, read, **options))


def rows_without_graph(rollouts: Rollouts, policy: GenerationConfig) -> int:
    """Rows of a pass that keeps no graph: `tf_batch_size`, or up to 8 times as many where they are short; 1 stays 1."""
    size = policy.tf_batch_size
    if not len(rollouts.ids):
        return size
    fitting = _TOKENS // int((rollouts.prompt_lens + rollouts.gen_lens).max())
    return 1 if size == 1 else max(size, min(8 * size, fitting))


def rows_spread_over(rollouts: Rollouts, most: int) -> Int[Tensor, "R L"]:
    """The ids of up to `SPREAD_ROWS` rows spread over the batch, and no more than `most`, cut to the longest of
    them."""
    size = len(rollouts.ids)
    rows = torch.linspace(0, size - 1, min(SPREAD_ROWS, most, size)).long()
    longest = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].max())
    return rollouts.ids[rows, :longest]


def batches_by_length(
    rollouts: Rollouts, size: int, some: Int[Tensor, " R"] | None = None
) -> Iterator[Tensor]:
    """Row indices in batches of similar total length; of `some` rows, without which of all."""
    lengths = rollouts.prompt_lens + rollouts.gen_lens
    order = torch.argsort(lengths if some is None else lengths[some], stable=True)
    order = order if some is None else some[order]
    yield from order.split(size) if len(order) else ()


def sharing(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Sharing:
    """Whether `score` reads each prompt once."""
    if config.share_prompts == "never":
        return Sharing("share_prompts is `never`")
    return sharing_of(bound, rollouts, rows_without_graph(rollouts, config.generation), read_rows)


def read_responses(
    bound: BoundModel,
    rollouts: Rollouts,
    size: int,
    read: Read,
    override: Mapping[str, Tensor] | None = None,
    *,
    shared: bool = False,
) -> tuple[Tensor, ...]:
    """`read_rows` of every response, `size` rows of similar length at a time: [B, G, T, …].

    `shared`: behind prompts that are read once, and without a graph.
    """
    if shared:
        parts = read_once(bound, rollouts, size, read, override)
    else:
        batches = batches_by_length(rollouts, size)
        parts = (
            (rows, read_rows(bound, rollouts, rows, read, override=override)) for rows in batches
        )
    found, order = [], []
    for rows, part in parts:
        order.append(rows)
        missing = rollouts.max_gen_len - part[0].shape[1]
        found.append(
            [torch.cat([v, v.new_zeros(len(v), missing, *v.shape[2:])], dim=1) for v in part]
        )
    return tuple(
        rollouts.per_prompt(_put(torch.cat(values), torch.cat(order), len(rollouts.ids)))
        for values in zip(*found, strict=True)
    )


def _put(values: Tensor, rows: Int[Tensor, " R"], count: int) -> Tensor:
    """The values at their rows, of `count`; zero at the others."""
    back = torch.zeros(count, dtype=torch.long).index_put((rows,), 1 + torch.arange(len(rows)))
    return torch.cat([torch.zeros_like(values[:1]), values])[back.to(values.device)]


@torch.no_grad()
def score(
    bound: BoundModel,
    rollouts: Rollouts,
    config: ProbeConfig,
    override: Mapping[str, Tensor] | None = None,
    *,
    with_features: bool = False,
    with_mean_s: bool = False,
) -> Scores:
    """Score every response at θ, or with the parameters in `override` replaced.

    At θ it is also known where the tokens stand among all (`before`), and features and `mean_s` can be asked for.
    """
    policy = config.generation
    if rollouts.num_prompts == 0:
        return _of_nothing(
            rollouts.num_responses, with_features=with_features, with_mean_s=with_mean_s
        )
    read = policy_scores(bound, policy, config.precision)
    if override is None:
        read = partial(scored_at_theta, policy, read, with_features, with_mean_s)
    size, shared = rows_without_graph(rollouts, policy), sharing(bound, rollouts, config).shared
    scores = read_responses(bound, rollouts, size, read, override, shared=shared)
    logp, logq, entropy, entropy_q, *rest = (values.double().cpu() for values in scores)
    if override is None:
        require_finite(rollouts, logp, entropy, "at θ", "use an earlier checkpoint")
    else:
        require_finite(
            rollouts, logp, entropy, "at θ + ηv", "give smaller true_delta_h.etas or first_order.lr"
        )
    if override is None:
        require_inside_nucleus(rollouts, logq, policy.top_p)
    before = rest[0] if override is None else None
    phi = with_position(rest[-1], policy.max_new_tokens) if with_features else None
    lengths = rollouts.per_prompt(rollouts.gen_lens)
    of_s = rest[1] if with_mean_s else None
    return Scores(logp, logq, entropy, entropy_q, lengths, phi, before, of_s)


def _of_nothing(group: int, *, with_features: bool, with_mean_s: bool) -> Scores:
    """The scores of a process that has no prompt."""
    empty = torch.zeros(0, group, 0, dtype=torch.float64)
    phi = empty[..., None].expand(0, group, 0, 7) if with_features else None
    lengths = torch.zeros(0, group, dtype=torch.long)
    before = empty[..., None].expand(0, group, 0, 2)
    of_s = empty if with_mean_s else None
    return Scores(empty, empty, empty, empty, lengths, phi, before, of_s)


def require_finite(
    rollouts: Rollouts, logp: Tensor, entropy: Tensor, where: str, remedy: str
) -> None:
    """Raise `MeasurementError` that names the first prompt with a score that is not finite."""
    finite = (torch.isfinite(logp) & torch.isfinite(entropy)).flatten(1).all(1)
    if not bool(finite.all()):
        raise MeasurementError(
            f"{rollouts.source}: prompt {rollouts.first_prompt + int((~finite).nonzero()[0]) + 1}",
            f"the model's log-probabilities are not finite {where}",
            remedy,
        )


def require_inside_nucleus(rollouts: Rollouts, logq: Tensor, top_p: float) -> None:
    """Raise `RolloutsError` that names the first prompt with a token that was not sampled from q."""
    outside = torch.isneginf(logq).flatten(1).any(1)
    if bool(outside.any()):
        raise RolloutsError(
            f"{rollouts.source}: prompt {rollouts.first_prompt + int(outside.nonzero()[0]) + 1}",
            f"a response holds a token outside the nucleus of top_p {top_p:g}",
            "give the temperature and top_p with which the responses were sampled",
        )
