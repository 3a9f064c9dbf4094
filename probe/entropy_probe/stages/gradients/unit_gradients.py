"""Per-unit gradients X_u and Y_u, and what every first-order number comes from: the products X_nᵀPY_m."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.two_batch import (
    TwoBatchMoments,
    two_batch_moments,
    two_batch_moments_of_sums,
)
from entropy_probe.estimators.ustat import (
    CrossMoments,
    cross_moments,
    cross_moments_of_sums,
    u_statistic,
)
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.report import UStatistic
from entropy_probe.stages.gradients.payloads import Payload
from entropy_probe.stages.gradients.products import (
    columns,
    dots,
    gram,
    grams,
    prompt_mean,
    row_dots,
    weighted_sum,
)
from entropy_probe.stages.gradients.units import Rows
from entropy_probe.stages.made import Made
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Read, read_rows
from entropy_probe.stages.share import Share, Units

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_Key = TypeVar("_Key", bound=Hashable)
_Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class UnitGradients:
    """name → [U, numel] in the compute dtype: X of every unit, and Y of every unit; in float64 [numel] what was asked
    for `beside` X.

    A unit is a prompt, or the mean over a block of prompts. The matrix K_nm = X_nᵀPY_m is known whole.
    """

    x: dict[str, Float[Tensor, "U D"]]
    y: dict[str, Float[Tensor, "U D"]]
    units: Units
    mean_beside: dict[str, Float[Tensor, " D"]] | None = field(default=None, kw_only=True)

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        """The number of prompts of each unit."""
        return self.units.sizes

    def mean_x(self) -> Mapping[str, Float[Tensor, " D"]]:
        """X̄ over all prompts, in float64."""
        return prompt_mean(self.x, self.sizes)

    def mean_y(self) -> Mapping[str, Float[Tensor, " D"]]:
        """Ȳ over all prompts, in float64."""
        return prompt_mean(self.y, self.sizes)

    def with_x_of(self, other: UnitGradients) -> UnitGradients:
        """These, with the X of another payload on the same units."""
        return replace(self, x=other.x)

    def of_units(self, values: Tensor) -> Tensor:
        """[U, …] from the same of the units that are held here."""
        return values

    def chosen(self, which: Int[Tensor, " k"]) -> tuple[_Rows, _Rows]:
        """X and Y of some units, wherever they are; of one process no copy of all is held."""

        def some(side: _Rows) -> _Rows:
            return Made(side, lambda name: side[name][which])

        return some(self.x), some(self.y)

    def products(self, precond: _Rows, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """By name (all, without `names`), what is known of K; so are its sums over names."""
        return grams({name: self.x[name] for name in names or self.x}, self.y, precond)

    def gathered(self, products: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
        """`products`, or sums of them, of the units of all processes."""
        return dict(products)

    def moments(self, products: Tensor) -> CrossMoments:
        """Of gathered products."""
        return cross_moments(products)

    def statistic(self, products: Tensor) -> UStatistic:
        """Of gathered products."""
        return u_statistic(self.moments(products), products)

    def plain_product(self) -> float:
        """X̄ᵀȲ over units, without P."""
        return cross_moments(gram(self.x, self.y)).bars_dot

    def products_with(self, u: UnitGradients, precond: _Rows) -> dict[str, Tensor]:
        """By name, what is known of X_kᵀPY_m with Y of another batch."""
        return grams(self.x, u.y, precond)

    def gathered_with(
        self, u: UnitGradients, products: Mapping[_Key, Tensor]
    ) -> dict[_Key, Tensor]:
        """`products_with`, or sums of them, of the units of all processes."""
        return dict(products)

    def moments_with(self, u: UnitGradients, products: Tensor) -> TwoBatchMoments:
        """Of gathered products with Y of another batch."""
        return two_batch_moments(products, self.sizes, u.sizes)


@dataclass(frozen=True)
class OwnUnitGradients(UnitGradients):
    """The rows of this process's own units, where others hold units too, and the sums over all.

    `sums_x` and `sums_y` are over units, `means_x` and `means_y` over prompts, name → [numel] in float64.
    Of K, which nobody holds, the sums of each row and of each column and the diagonal are known.
    """

    share: Share
    sums_x: Mapping[str, Float[Tensor, " D"]]
    sums_y: Mapping[str, Float[Tensor, " D"]]
    means_x: Mapping[str, Float[Tensor, " D"]]
    means_y: Mapping[str, Float[Tensor, " D"]]

    @classmethod
    def of(cls, held: UnitGradients, share: Share) -> Self:
        """One all-reduce of ΣX and one of ΣY, in buckets; as many again where units are blocks."""
        world, sizes = share.world, held.sizes.double()
        own, total = sizes[share.own_units], float(sizes.sum())

        def summed(weights: Tensor, rows: _Rows) -> dict[str, Tensor]:
            return world.totals({name: weighted_sum(weights, t) for name, t in rows.items()})

        found: dict[str, dict[str, Tensor]] = {}
        for side, rows in (("x", held.x), ("y", held.y)):
            of_units = found[f"sums_{side}"] = summed(torch.ones_like(own), rows)
            of_prompts = of_units if held.units.mode == "exact" else summed(own, rows)
            found[f"means_{side}"] = {name: t / total for name, t in of_prompts.items()}
        return cls(held.x, held.y, held.units, share, **found)

    def mean_x(self) -> Mapping[str, Float[Tensor, " D"]]:
        return self.means_x

    def mean_y(self) -> Mapping[str, Float[Tensor, " D"]]:
        return self.means_y

    def with_x_of(self, other: UnitGradients) -> UnitGradients:
        assert isinstance(other, OwnUnitGradients)
        return replace(self, x=other.x, sums_x=other.sums_x)

    def of_units(self, values: Tensor) -> Tensor:
        return self.share.of_units(values)

    def chosen(self, which: Int[Tensor, " k"]) -> tuple[_Rows, _Rows]:
        share = self.share
        x, y = (
            {name: share.rows(rows, which, share.own_units) for name, rows in side.items()}
            for side in (self.x, self.y)
        )
        return x, y

    def products(
        self, precond: _Rows, names: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "u 3"]]:
        """Σ_m K_nm = x_n·P·ΣY, Σ_m K_mn = y_n·P·ΣX and K_nn = x_n·P·y_n of each own unit n."""
        chosen = list(names or self.x)
        rows = dots({name: self.x[name] for name in chosen}, self.sums_y, precond)
        columns = dots({name: self.y[name] for name in chosen}, self.sums_x, precond)
        diagonal = {n: row_dots(self.x[n], self.y[n], precond[n].reshape(-1)) for n in chosen}
        return {n: torch.stack([rows[n], columns[n], diagonal[n]], 1) for n in chosen}

    def gathered(self, products: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
        together = self.of_units(torch.cat(list(products.values()), 1))
        widths = [values.shape[1] for values in products.values()]
        return dict(zip(products, together.split(widths, 1), strict=True))

    def moments(self, products: Tensor) -> CrossMoments:
        return cross_moments_of_sums(products)

    def statistic(self, products: Tensor) -> UStatistic:
        return u_statistic(self.moments(products), None)

    def plain_product(self) -> float:
        products = (torch.dot(self.sums_x[name], t) for name, t in self.sums_y.items())
        return float(sum(products)) / len(self.sizes) ** 2

    def products_with(self, u: UnitGradients, precond: _Rows) -> dict[str, Float[Tensor, " eu"]]:
        """s_k = X_kᵀPȲ of the own units of this batch, then t_m = X̄ᵀPY_m of those of the other."""
        s, t = dots(self.x, u.mean_y(), precond), dots(u.y, self.mean_x(), precond)
        return {name: torch.cat([s[name], t[name]]) for name in s}

    def gathered_with(
        self, u: UnitGradients, products: Mapping[_Key, Tensor]
    ) -> dict[_Key, Tensor]:
        own = self.share.own_units.stop - self.share.own_units.start
        s, t = torch.stack(list(products.values()), 1).tensor_split([own])
        whole = torch.cat([self.of_units(s), u.of_units(t)])
        return dict(zip(products, whole.unbind(1), strict=True))

    def moments_with(self, u: UnitGradients, products: Tensor) -> TwoBatchMoments:
        s, t = products.tensor_split([len(self.sizes)])
        return two_batch_moments_of_sums(s, t, self.sizes)


@dataclass(frozen=True)
class PairedUnitGradients(OwnUnitGradients):
    """As `OwnUnitGradients`, where K is known whole: every process has the rows of its own units.

    Y of all units goes round for that, a few columns at a time: nobody holds another's gradients.
    """

    def every_y(self, name: str, part: slice) -> Float[Tensor, "U d"]:
        """Some columns of Y of every unit."""
        return self.of_units(self.y[name][:, part])

    def products(
        self, precond: _Rows, names: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "u U"]]:
        return self._own_rows(self, precond, list(names or self.x))

    def moments(self, products: Tensor) -> CrossMoments:
        return cross_moments(products)

    def statistic(self, products: Tensor) -> UStatistic:
        return u_statistic(self.moments(products), products)

    def products_with(self, u: UnitGradients, precond: _Rows) -> dict[str, Float[Tensor, "e U"]]:
        assert isinstance(u, PairedUnitGradients)
        return self._own_rows(u, precond, list(self.x))

    def gathered_with(
        self, u: UnitGradients, products: Mapping[_Key, Tensor]
    ) -> dict[_Key, Tensor]:
        return self.gathered(products)

    def moments_with(self, u: UnitGradients, products: Tensor) -> TwoBatchMoments:
        return two_batch_moments(products, self.sizes, u.sizes)

    def _own_rows(
        self, u: PairedUnitGradients, precond: _Rows, names: list[str]
    ) -> dict[str, Tensor]:
        """`grams` of the own units' X with Y of everybody's."""
        num_units = len(u.sizes)
        found = {}
        for name in names:
            x, y, p = self.x[name], u.y[name], precond[name].reshape(-1)
            total = torch.zeros(len(x), num_units, dtype=torch.float64)
            for part in columns(y, num_units):
                scaled = u.every_y(name, part).double() * p[part].double()
                total += x[:, part].double() @ scaled.T
            found[name] = total
        return found


@dataclass(frozen=True)
class UnitGradientsOnce(PairedUnitGradients):
    """As `PairedUnitGradients`, in memory that all processes see: `every` has X and Y of all units, `x` and `y` are the
    own rows of it. Nothing is sent, and sums over units are made where they are used."""

    every: tuple[dict[str, Float[Tensor, "all _"]], dict[str, Float[Tensor, "all _"]]]

    @classmethod
    def within(
        cls, every: tuple[dict[str, Tensor], dict[str, Tensor]], units: Units, share: Share
    ) -> UnitGradientsOnce:
        """Once all rows are there."""
        even = torch.ones(len(units.sizes), dtype=torch.float64)
        found: dict[str, Any] = {}
        for side, rows in zip(("x", "y"), every, strict=True):
            found[f"sums_{side}"] = Made(
                rows, lambda name, rows=rows: weighted_sum(even, rows[name])
            )
            found[f"means_{side}"] = prompt_mean(rows, units.sizes, share.world)
        x, y = ({name: rows[share.own_units] for name, rows in side.items()} for side in every)
        return cls(x, y, units, share, **found, every=every)

    def with_x_of(self, other: UnitGradients) -> UnitGradients:
        assert isinstance(other, UnitGradientsOnce)
        every = other.every[0], self.every[1]
        means, sums = other.means_x, other.sums_x
        return replace(self, x=other.x, sums_x=sums, means_x=means, every=every)

    def chosen(self, which: Int[Tensor, " k"]) -> tuple[_Rows, _Rows]:
        x, y = (Made(side, lambda name, side=side: side[name][which]) for side in self.every)
        return x, y

    def every_y(self, name: str, part: slice) -> Float[Tensor, "U d"]:
        return self.every[1][name][:, part]


def unit_gradients(
    bound: BoundModel,
    share: Share,
    config: ProbeConfig,
    of_x: Payload,
    of_y: Payload | None = None,
    *,
    beside: Payload | None = None,
    paired: bool = False,
    stage: str = "gradients",
    progress: Progress | None = None,
) -> UnitGradients:
    """X_n and Y_n (`payloads`) of every prompt n, or their means within blocks of prompts.

    Where the module detaches a part of itself (DoRA), or its padding token is read, X is the true derivative
    and Y the module's own autograd, because that is what the trainer's step uses; where the two are one, and
    both are weighted ∇S, X and Y come from one forward and one backward. Without `of_y` only X.

    `beside` X comes Σ_n of another payload over B, from the same forward and a second backward through the layers,
    where `can_share_a_forward`.

    The payloads are those of the share's own prompts, and only its units are made here. `paired`: of several processes
    all products X_nᵀPY_m will be known.
    """
    parameters, rollouts = bound.registry.trainable, share.own
    if not parameters:
        raise MeasurementError(
            "gradients", "no parameter of the model is trainable", "set requires_grad"
        )
    one_pass = (
        of_x.coefficients is None
        and (of_y is None or of_y.coefficients is None)
        and bound.autograd_is_derivative_of(share.rollouts.tokens)
    )
    unit_of = share.units.of_prompt[share.prompts] - share.own_units.start
    own = share.own_units
    sizes = torch.bincount(unit_of, minlength=own.stop - own.start)
    world, num_units = share.world, len(share.units.sizes)
    where = Rows.of(bound, num_units, config, world)

    def nothing() -> dict[str, Tensor]:
        if world.one_copy:
            return where.zeros_of_all(num_units, parameters, bound.dtype, world)
        return {n: where.zeros(len(sizes), p.numel(), bound.dtype) for n, p in parameters.items()}

    every = nothing(), {} if of_y is None else nothing()
    x, y = every
    if world.one_copy:
        x, y = ({name: rows[own] for name, rows in side.items()} for side in every)
    per_row = sizes[unit_of].repeat_interleave(rollouts.num_responses)
    added = _Added(bound, rollouts, per_row, config.generation.temperature)
    other = None
    if beside is not None:
        sums = {n: torch.zeros_like(p, device="cpu") for n, p in parameters.items()}
        other = (sums, beside)

    done = 0
    for units, rows in _microbatches(rollouts, unit_of, config.generation.tf_batch_size):
        if of_y is not None and one_pass:
            added.to([(x, of_x), (y, of_y)], units, rows, true=False)
        else:
            added.to([(x, of_x)], units, rows, true=True, beside=other)
            if of_y is not None:
                added.to([(y, of_y)], units, rows, true=False)
        done += len(rows)
        if progress is not None:
            progress(stage, done, len(rollouts.gen_lens))
    held = UnitGradients(x, y, share.units)
    if other is not None:
        of_beside = {
            n: t.reshape(-1).double() / share.rollouts.num_prompts for n, t in other[0].items()
        }
        return replace(held, mean_beside=of_beside)
    if world.one_copy:
        world.wait()
        return UnitGradientsOnce.within(every, share.units, share)
    if not share.several:
        return held
    kind = PairedUnitGradients if paired else OwnUnitGradients
    return kind.of(held, share)


@dataclass(frozen=True)
class _Added:
    """Gradients of some rows, added to the sums of their units. `per_row`: the prompts of a row's unit."""

    bound: BoundModel
    rollouts: Rollouts
    per_row: Tensor
    temperature: float

    def to(
        self,
        sides: list[tuple[dict[str, Tensor], Payload]],
        units: Tensor,
        rows: Tensor,
        *,
        true: bool,
        beside: tuple[dict[str, Tensor], Payload] | None = None,
    ) -> None:
        """One forward and one backward, for sides with the same payload; as many rows of each of the units. And one
        more backward for a payload `beside` S, whose weighted sum over all rows is added up."""
        bound, parameters = self.bound, self.bound.registry.trainable
        prompts = self.per_row[rows]
        weights = torch.stack([payload.weights.reshape(-1)[rows] / prompts for _, payload in sides])
        into = {
            name: [[side[name][unit].view(p.shape) for unit in units] for side, _ in sides]
            for name, p in parameters.items()
        }
        # on the CPU sums are added where they belong, and no second copy is made of them
        here = into if bound.device.type == "cpu" else None
        capture = Capture(parameters, weights.to(bound.device), len(units), here)
        payload = sides[0][1] if beside is None else beside[1]
        options = {"beside": payload.of_rows(rows), "true_derivative": true, "capture": capture}
        read = payload.read(self.temperature)
        if beside is not None:
            read = _with_logp(sides[0][1].read(self.temperature), read)
        values, *others = read_rows(bound, self.rollouts, rows, read, **options)
        sums = capture.sums(values.sum(-1), last=beside is None)
        for name, own in into.items() if here is None else ():
            for k, n in itertools.product(range(len(sides)), range(len(units))):
                own[k][n].add_(sums[name][k][n].cpu())
        if beside is not None:
            total = {name: [[sum_of]] for name, sum_of in beside[0].items()}
            of_rows = payload.weights.reshape(1, -1)[:, rows].to(bound.device)
            capture.turned_to(of_rows, 1, total if here is not None else None)
            of_all = capture.sums(others[0].sum(-1))
            for name, sum_of in beside[0].items() if here is None else ():
                sum_of.add_(of_all[name][0][0].cpu())


def _with_logp(logp: Read, other: Read) -> Read:
    """Both, of which only the second has numbers of its own beside each token."""

    def read(logits: Tensor, tokens: Tensor, beside: Tensor) -> tuple[Tensor, ...]:
        return (*logp(logits, tokens), *other(logits, tokens, beside))

    return read


def can_share_a_forward(bound: BoundModel, share: Share, of_x: Payload) -> bool:
    """Whether X and one more gradient come from one forward: where X is weighted ∇S, the output layer, which is
    differentiated piece by piece, is frozen, memory is not limited, and no sum goes to another process."""
    limited = bound.recompute or bound.logits_at_once is not None
    alone = not bound.trains_output_layer and not share.several
    return of_x.coefficients is None and alone and not limited


def _microbatches(
    rollouts: Rollouts, unit_of: Int[Tensor, " B"], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(units, rows) with at most `size` rows of similar length, as many of each unit, one unit after the other:
    some prompts that are units themselves, some prompts of one unit, or some rows of one prompt."""
    group, at_once = rollouts.num_responses, max(1, size // rollouts.num_responses)
    lengths = rollouts.per_prompt(rollouts.prompt_lens + rollouts.gen_lens).amax(1)
    order = torch.argsort(lengths, stable=True)
    if not len(unit_of):
        return
    single = len(unit_of) == int(unit_of.max()) + 1
    for within in (
        [order] if single else [order[unit_of[order] == unit] for unit in unit_of.unique()]
    ):
        for prompts in within.split(at_once):
            rows = (prompts[:, None] * group + torch.arange(group)).reshape(-1)
            for part in rows.split(max(size, 1)) if len(prompts) == 1 else [rows]:
                yield unit_of[prompts] if single else unit_of[prompts[:1]], part
