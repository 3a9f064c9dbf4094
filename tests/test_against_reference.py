"""Every first_order, two_batch, entropy, update and entropy_change number of the report, against plain loops.

Three runs of each checkpoint: on two batches with the naive X and with X by Rao-Blackwell, and on one batch.

Float64 throughout; a number agrees when it differs by at most 1e-9 of the sum of the absolute values of the terms that
were added to make it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import models
import reference as ref
import typecheck
from entropy_probe import Checkpoint, ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.estimators.baselines import BASELINES
from entropy_probe.model.forward import bind
from entropy_probe.model.precision import TrueFloat64
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from test_rollouts import OneToken

TOLERANCE = 1e-9
ETAS = [1e-5, 3e-4]
KINDS: dict[str, Any] = {
    "llama+lora": lambda folder: models.adapter_checkpoint(folder, "llama"),
    "gpt2 full": lambda folder: models.full_checkpoint(folder, "gpt2"),
    "gpt2 full, Adam": lambda folder: models.full_checkpoint(folder, "gpt2", torch.optim.Adam),
    "gemma2 full": lambda folder: models.full_checkpoint(folder, "gemma2"),
    "qwen3+lora, AMSGrad": lambda folder: models.adapter_checkpoint(folder, "qwen3", adamw={"amsgrad": True}),
    "llama+dora+modules_to_save": lambda folder: models.adapter_checkpoint(
        folder, "llama", use_dora=True, modules_to_save=["lm_head"]
    ),
}
BASELINE = {
    "llama+lora": "hk_ridge",
    "gpt2 full": "none",
    "gpt2 full, Adam": "hk",
    "gemma2 full": "hk_ema",
    "qwen3+lora, AMSGrad": "hk_ema",
    "llama+dora+modules_to_save": "hk_ridge",
}
"""That of the run with estimator rb, by kind."""
Tensors = dict[str, torch.Tensor]


class Both:
    """The report of one checkpoint, and the reference's E and U batches on the same float64 model."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = KINDS[kind](folder / "ckpt")
        e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        u = models.random_rollouts(folder / "u.jsonl", prompts=6, responses=2, seed=2)
        self.baseline = BASELINE[kind]
        mapping = {
            "budget": "smoke",  # the reference knows no witnesses, and the batches are of files
            "invariance": {"max_examples": 0},
            "precision": models.FLOAT64,
            "true_delta_h": {"etas": ETAS},
            "generation": {"temperature": 0.9, "tf_batch_size": 4},
        }
        config = ProbeConfig.from_mapping(mapping)
        self.report: ProbeReport = run_probe(self.path, config, e, u)
        self.same: ProbeReport = run_probe(self.path, config, e)
        config = ProbeConfig.from_mapping(mapping | {"first_order": {"estimator": "rb", "baseline": self.baseline}})
        self.rb: ProbeReport = run_probe(self.path, config, e, u)
        self.checkpoint = load_checkpoint(self.path)
        self.model = self.checkpoint.model.double()
        self.e, self.u = (ref.Reference(self.model, file, temperature=0.9) for file in (e, u))
        self.x_e, self.x_u = ([batch.x(n) for n in range(len(batch.lines))] for batch in (self.e, self.u))
        self.y_u = [self.u.y(m) for m in range(len(self.u.lines))]
        self.v = self._direction(self.y_u)

    @functools.cached_property
    def loaded(self) -> Checkpoint:
        """As it was read: `model` is in float64."""
        return load_checkpoint(self.path)

    @functools.cached_property
    def x_rb_u(self) -> list[Tensors]:
        return [self.u.x_rb(n, self.baseline) for n in range(len(self.u.lines))]

    @functools.cached_property
    def along(self) -> list[list[Tensors]]:
        return self.e.directional(self.v)

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state of optimizer.pt as torch reads it, by the name that the construction of the checkpoint implies."""
        saved = torch.load(self.path / "optimizer.pt", weights_only=True)
        return {name: saved["state"][i] for i, name in self._order(saved)}

    def _order(self, saved: dict[str, Any]) -> list[tuple[int, str]]:
        flat = [i for group in saved["param_groups"] for i in group["params"]]
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        if len(saved["param_groups"]) == 2:  # full: the Trainer decays matrices, not norms and biases
            kept = [n for n in names if "ln_" in n or "norm" in n or n.endswith("bias")]
            names = [n for n in names if n not in kept] + kept
        return list(zip(flat, names, strict=True))

    def groups(self) -> list[dict[str, Any]]:
        saved = torch.load(self.path / "optimizer.pt", weights_only=True)
        names = dict(self._order(saved))
        return [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]

    def precond(self) -> dict[str, torch.Tensor]:
        result = {}
        for group in self.groups():
            for name in group["params"]:
                state = self.moments()[name]
                second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
                v_hat = second / (1 - group["betas"][1] ** float(state["step"]))
                result[name] = 1 / (torch.sqrt(v_hat) + group["eps"])
        return result

    def momentum_and_diagonal(self, ys: list[Tensors]) -> tuple[Tensors, Tensors]:
        """(v₀, D): v₀ = −β₁·exp_avg·scale − weight_decay·θ and D = (1−β₁)·scale, where scale is one over (1−β₁^t) times
        the denominator of v; a coupled decay, being in g, comes into v₀ as −(1−β₁)·weight_decay·θ·scale."""
        y_bar, v0, diagonal = average(ys), {}, {}
        for group in self.groups():
            beta1, beta2 = group["betas"]
            for name in group["params"]:
                state, theta = self.moments()[name], self.e.named[name].detach()
                t = float(state["step"]) + 1
                coupled = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
                gradient = -y_bar[name] + coupled * theta
                second = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * gradient**2
                if group["amsgrad"]:
                    second = torch.maximum(second, state["max_exp_avg_sq"].double())
                denominator = torch.sqrt(second) / math.sqrt(1 - beta2**t) + group["eps"]
                scale = 1 / ((1 - beta1**t) * denominator)
                diagonal[name] = (1 - beta1) * scale
                pulled = beta1 * state["exp_avg"].double() + (1 - beta1) * coupled * theta
                v0[name] = -pulled * scale - (group["weight_decay"] - coupled) * theta
        return v0, diagonal

    def _direction(self, ys: list[Tensors]) -> Tensors:
        g = {name: -y for name, y in average(ys).items()}
        cls = torch.optim.AdamW if self.groups()[0]["decoupled_weight_decay"] else torch.optim.Adam
        return ref.optimizer_step(self.model, self.groups(), self.moments(), g, cls)


@pytest.fixture(scope="module", params=list(KINDS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    torch.set_num_threads(1)
    return Both(tmp_path_factory.mktemp("reference"), request.param)


def agree(got: float | None, expected: float, scale: float) -> None:
    assert got is not None
    assert abs(got - expected) <= TOLERANCE * scale, (
        f"{got!r} vs {expected!r}: {abs(got - expected) / scale:.2e} of the terms"
    )


def average(units: list[Tensors]) -> Tensors:
    return {name: torch.stack([unit[name] for unit in units]).mean(0) for name in units[0]}


Gram = list[list[tuple[float, float]]]


def gram(xs: list[Tensors], ys: list[Tensors], p: Tensors, names: Iterable[str] | None = None) -> Gram:
    """X_nᵀPY_m with the sum of the absolute values of its terms, over some names only where they are given."""
    kept = {name: p[name] for name in (p if names is None else names)}
    return [[ref.dot(x, {name: y[name] for name in kept}, kept) for y in ys] for x in xs]


def u_statistic(k: Gram) -> tuple[float, float, list[float], float]:
    """(U_cross, its plug-in SE, row means, the size of the terms)."""
    size = len(k)
    u_cross = math.fsum(k[n][m][0] for n in range(size) for m in range(size) if n != m) / (size * (size - 1))
    r = [0.5 * ref.mean([k[n][m][0] + k[m][n][0] for m in range(size) if m != n]) for n in range(size)]
    return u_cross, 2 * ref.sd(r) / math.sqrt(size), r, math.fsum(t[1] for row in k for t in row) / (size * (size - 1))


def two_batches(k: Gram) -> tuple[float, float, list[float], float]:
    """(mean, its SE in all, projections, the size of the terms)."""
    size_e, size_u = len(k), len(k[0])
    s = [ref.mean([t[0] for t in row]) for row in k]
    t = [ref.mean([row[m][0] for row in k]) for m in range(size_u)]
    left = [[k[i][m][0] - s[i] - t[m] + ref.mean(s) for m in range(size_u)] for i in range(size_e)]
    interaction = math.fsum(x * x for row in left for x in row) / ((size_e - 1) * (size_u - 1))
    var_s, var_t, of_both = ref.sd(s) ** 2 / size_e, ref.sd(t) ** 2 / size_u, interaction / (size_e * size_u)
    total = max(var_s + var_t - of_both, of_both / 4)
    return ref.mean(s), math.sqrt(total), s, math.fsum(x[1] for row in k for x in row) / (size_e * size_u)


def test_first_order(both: Both) -> None:
    section, p = both.report.first_order, both.precond()
    size = len(both.u.lines)
    xs, ys = both.x_u, both.y_u
    k = gram(xs, ys, p)
    total = math.fsum(k[n][m][1] for n in range(size) for m in range(size))
    off = [(n, m) for n in range(size) for m in range(size) if n != m]
    u_cross = math.fsum(k[n][m][0] for n, m in off) / (size * (size - 1))
    bars_dot = math.fsum(k[n][m][0] for n in range(size) for m in range(size)) / size**2
    diag_sum = math.fsum(k[n][n][0] for n in range(size))
    agree(section.u_cross, u_cross, total / (size * (size - 1)))
    agree(section.bars_dot, bars_dot, total / size**2)
    agree(section.diag_sum, diag_sum, total)
    agree(section.u_cross, size / (size - 1) * bars_dot - diag_sum / (size * (size - 1)), total / (size * (size - 1)))
    r = []
    for n in range(size):
        x_others, y_others = (average([unit for m, unit in enumerate(units) if m != n]) for units in (xs, ys))
        r.append(0.5 * (ref.dot(xs[n], y_others, p)[0] + ref.dot(ys[n], x_others, p)[0]))
    for got, expected in zip(section.row_means, r, strict=True):
        agree(got, expected, total / size)
    q = math.fsum((x - ref.mean(r)) ** 2 for x in r)
    agree(section.zeta1_plugin, q / (size - 1), q)
    agree(section.se_plugin, math.sqrt(4 * q / (size - 1) / size), math.sqrt(q))
    leave = [(size * u_cross - 2 * x) / (size - 2) for x in r]
    variance = (size - 1) / size * math.fsum((x - ref.mean(leave)) ** 2 for x in leave)
    agree(section.se_jackknife, math.sqrt(variance), math.sqrt(variance))
    agree(section.zeta1_jackknife, size / 4 * variance, size / 4 * variance)
    h = {(n, m): 0.5 * (k[n][m][0] + k[m][n][0]) for n, m in off if n < m}
    w = ref.mean([(x - u_cross) ** 2 for x in h.values()])
    a = q * (size - 1) / (size - 2)
    c = 4 * (size - 2) / (size - 4)
    agree(section.var_unbiased, (c * (a - w) + 2 * w) / (size * (size - 1) + c - 2), c * (a + w) + 2 * w)
    for got, units in ((section.norm_x_sum, xs), (section.norm_y_sum, ys)):
        summed = {name: torch.stack([unit[name] for unit in units]).sum(0) for name in p}
        agree(got, math.sqrt(ref.dot(summed, summed)[0]), math.sqrt(ref.dot(summed, summed)[1]))
    agree(section.delta_h1, -1e-3 * u_cross, 1e-3 * total / size**2)
    assert section.se_plugin is not None
    agree(section.delta_h1_se, 1e-3 * section.se_plugin, 1e-3 * section.se_plugin)
    assert (section.lr, section.lr_source) == (1e-3, "optimizer")


def test_two_batches(both: Both) -> None:
    section, p = both.report.two_batch, both.precond()
    assert section is not None
    mean, se, s, scale = two_batches(gram(both.x_e, both.y_u, p))
    y_bar = average(both.y_u)
    for got, projection, x in zip(section.projections, s, both.x_e, strict=True):
        agree(got, projection, scale * len(s))
        agree(got, ref.dot(x, y_bar, p)[0], scale * len(s))
    agree(section.bars_dot, mean, scale)
    agree(section.delta_h1, -1e-3 * mean, 1e-3 * scale)
    agree(section.conditional_se, 1e-3 * ref.sd(s) / math.sqrt(len(s)), 1e-3 * scale)
    agree(section.delta_h1_se, 1e-3 * se, 1e-3 * scale)


def test_rao_blackwell_x(both: Both) -> None:
    section, across, p = both.rb.first_order, both.rb.two_batch, both.precond()
    assert (section.estimator, both.rb.config["first_order"]["baseline"]) == ("rb", both.baseline)
    assert across is not None
    xs_e = [both.e.x_rb(n, both.baseline) for n in range(len(both.e.lines))]
    k = gram(both.x_rb_u, both.y_u, p)
    u_cross, se, r, scale = u_statistic(k)
    agree(section.u_cross, u_cross, scale)
    agree(section.bars_dot, ref.mean([t[0] for row in k for t in row]), scale)
    agree(section.se_plugin, se, scale)
    for got, expected in zip(section.row_means, r, strict=True):
        agree(got, expected, scale * len(r))
    mean, se, s, scale = two_batches(gram(xs_e, both.y_u, p))
    agree(across.bars_dot, mean, scale)
    agree(across.delta_h1_se, 1e-3 * se, 1e-3 * scale)
    for got, expected in zip(across.projections, s, strict=True):
        agree(got, expected, scale * len(s))
    rb, slope_scale = _rb_slopes(both, both.baseline)
    along, terms = ref.dot(average(xs_e), both.v)
    agree(both.rb.update.slope_of_v0 + math.fsum(both.rb.update.slope_by_unit), -along, terms)
    agree(both.rb.update.delta_h1_per_lr_rb, -along, terms + slope_scale)
    agree(both.rb.update.delta_h1_per_lr_rb, ref.mean(rb), slope_scale)
    agree(both.rb.update.delta_h1_per_lr_rb_se, ref.sd(rb) / math.sqrt(len(rb)), slope_scale)


def test_interval_and_plain_dot(both: Both) -> None:
    for section, xs in ((both.report.first_order, both.x_u), (both.rb.first_order, both.x_rb_u)):
        assert section.interval is not None
        assert section.se_plugin is not None
        expected = stats.t.interval(0.95, section.num_units - 1, loc=section.u_cross, scale=section.se_plugin)
        for got, end in zip(section.interval, expected, strict=True):
            agree(got, float(end), abs(section.u_cross) + section.se_plugin)
        agree(section.bars_dot_plain, *ref.dot(average(xs), average(both.y_u)))


def _chosen(names: Iterable[str]) -> list[tuple[str, str, Callable[[str], bool]]]:
    """(table, part, whether a parameter is in it): one part of each table, and not the whole."""
    adapter = any("lora_A" in name for name in names)
    return [
        ("layer", "layer 1", lambda name: ".1." in name),
        ("module", "attention", lambda name: "attn" in name),
        (
            "factor",
            "lora_A" if adapter else "weight",
            lambda name: "lora_A" in name if adapter else "bias" not in name,
        ),
    ]


def test_parts_add_up_and_are_those_of_their_names(both: Both) -> None:
    """Seen to fail with `post_attention_layernorm` of Gemma-2 counted as attention."""
    section, across, p = both.report.first_order, both.report.two_batch, both.precond()
    assert across is not None
    *_, r, scale = u_statistic(gram(both.x_u, both.y_u, p))
    *_, scale_across = two_batches(gram(both.x_e, both.y_u, p))
    agree(math.fsum(section.delta_h1_by_unit), section.delta_h1, 1e-3 * scale)
    for got, expected in zip(section.delta_h1_by_unit, r, strict=True):
        agree(got, -1e-3 * expected / len(r), 1e-3 * scale)
    for of, size in ((section, scale), (across, scale_across)):
        for table in (of.delta_h1_parts.layer, of.delta_h1_parts.module, of.delta_h1_parts.factor):
            agree(math.fsum(part.value for part in table.values()), of.delta_h1, 1e-3 * size)
    for table, label, inside in _chosen(p):
        names = [name for name in p if inside(name)]
        for of, xs, moments in ((section, both.x_u, u_statistic), (across, both.x_e, two_batches)):
            value, se, _, size = moments(gram(xs, both.y_u, p, names))
            got = getattr(of.delta_h1_parts, table)[label]
            agree(got.value, -1e-3 * value, 1e-3 * size)
            agree(got.se, 1e-3 * se, 1e-3 * size)


def test_entropy(both: Both) -> None:
    section = both.report.entropy
    with torch.no_grad():
        tokens = [[both.e.tokens(n, g) for g in range(3)] for n in range(len(both.e.lines))]
    s = [[float(logp.sum()) for logp, _ in row] for row in tokens]
    r = [[float(h.sum()) for _, h in row] for row in tokens]
    for got, values, sign in ((section.naive, s, -1), (section.rb, r, 1)):
        means = [sign * ref.mean(row) for row in values]
        agree(got.value, ref.mean(means), ref.mean([abs(x) for row in values for x in row]))
        agree(got.se, ref.sd(means) / math.sqrt(len(means)), ref.mean([abs(m) for m in means]))
    assert section.rb_q == section.rb
    lengths = [[len(h) for _, h in row] for row in tokens]
    count = sum(map(sum, lengths))
    ratio = math.fsum(map(math.fsum, r)) / count
    agree(section.per_token.value, ratio, ratio)
    clusters = [
        math.fsum(x - ratio * n for x, n in zip(*pair, strict=True)) / (count / 15)
        for pair in zip(r, lengths, strict=True)
    ]
    agree(section.per_token.se, math.sqrt(5 / 4 * math.fsum(c * c for c in clusters)) / 15, ratio)


def _terms(both: Both) -> tuple[list[float], list[float], list[float], float, float]:
    """Per prompt: naive slope, RB slope, curvature; and the mean size of a slope's and a curvature's terms."""
    naive, curvature = [], []
    for row in both.along:
        terms = []
        for g, item in enumerate(row):
            others = ref.mean([float(other["s"]) for k, other in enumerate(row) if k != g])
            terms.append(-(float(item["s"]) - others) * float(item["d_s"]))
        naive.append(ref.mean(terms))
        curvature.append(ref.mean([float(item["of_change"][1]) for item in row]))
    rb, scale = _rb_slopes(both, "hk_group")
    of_change = [ref.mean([float(item["of_change"][0]) for item in row]) for row in both.along]
    assert rb == pytest.approx(of_change, rel=1e-9, abs=1e-9 * scale)
    curvature_scale = ref.mean([abs(float(item["of_change"][1])) for row in both.along for item in row])
    return naive, rb, curvature, scale + ref.mean([abs(x) for x in naive]), curvature_scale


def _rb_slopes(both: Both, baseline: str) -> tuple[list[float], float]:
    """Per prompt mean_g Σ_t (D_vH_t + (R_{≥t} − b_t)·D_v log p_t), and the mean size of a response's terms."""
    slopes, size = [], []
    for n, row in enumerate(both.along):
        terms = [
            [float(d) for d in item["d_entropy"]]
            + [k * float(d) for k, d in zip(both.e.coefficients(n, g, baseline), item["d_logp"], strict=True)]
            for g, item in enumerate(row)
        ]
        slopes.append(ref.mean([math.fsum(x) for x in terms]))
        size.append(ref.mean([math.fsum(map(abs, x)) for x in terms]))
    return slopes, ref.mean(size)


def test_slope_by_every_estimator(both: Both) -> None:
    section = both.report.update
    assert set(section.estimators) == {"naive", *(f"rb_{baseline}" for baseline in BASELINES)}
    naive, _, _, scale, _ = _terms(both)
    values = {"naive": (naive, scale)} | {f"rb_{baseline}": _rb_slopes(both, baseline) for baseline in BASELINES}
    for name, (slopes, size) in values.items():
        agree(section.estimators[name].value, ref.mean(slopes), size)
        agree(section.estimators[name].se, ref.sd(slopes) / math.sqrt(len(slopes)), size)
    assert section.baseline == "hk_group"
    agree(section.estimators["rb_hk_group"].value, section.delta_h1_per_lr_rb, values["rb_hk_group"][1])
    assert len({estimate.value for estimate in section.estimators.values()}) >= 5  # τ² = 0: hk_group is hk_ema
    for name, (_, size) in values.items():  # the same U batch, and v but for the rounding of Y
        agree(both.rb.update.estimators[name].value, section.estimators[name].value, size)


def test_slope_by_source(both: Both) -> None:
    """Momentum and decay, and every prompt of U, each by its own −X̄ᵀ(·); together the naive slope."""
    section = both.report.update
    v0, diagonal = both.momentum_and_diagonal(both.y_u)
    y_bar, x_bar = average(both.y_u), average(both.x_e)
    for name, v in both.v.items():
        together = v0[name] + diagonal[name] * y_bar[name]
        scale = v0[name].abs() + (diagonal[name] * y_bar[name]).abs() + both.e.named[name].detach().abs() / 1e-3
        assert bool(((together - v).abs() <= TOLERANCE * scale).all()), name
    agree(section.norm_v0, math.sqrt(ref.dot(v0, v0)[0]), math.sqrt(ref.dot(v0, v0)[1]))
    value, size = ref.dot(x_bar, v0)
    agree(section.slope_of_v0, -value, size)
    for got, y in zip(section.slope_by_unit, both.y_u, strict=True):
        value, part = ref.dot(x_bar, y, diagonal)
        agree(got, -value / len(both.y_u), part / len(both.y_u))
        size += part / len(both.y_u)
    whole = section.slope_of_v0 + math.fsum(section.slope_by_unit)
    agree(whole, -ref.dot(x_bar, both.v)[0], size)
    agree(whole, section.delta_h1_per_lr_naive, size)


def test_update(both: Both) -> None:
    section = both.report.update
    y_bar = average(both.y_u)
    agree(section.grad_norm, math.sqrt(ref.dot(y_bar, y_bar)[0]), math.sqrt(ref.dot(y_bar, y_bar)[1]))
    agree(section.norm, math.sqrt(ref.dot(both.v, both.v)[0]), math.sqrt(ref.dot(both.v, both.v)[1]))
    naive, rb, curvature, slope_scale, curvature_scale = _terms(both)
    root = math.sqrt(len(naive))
    agree(section.delta_h1_per_lr_naive, ref.mean(naive), slope_scale)
    agree(section.delta_h1_per_lr_naive_se, ref.sd(naive) / root, slope_scale)
    agree(section.delta_h1_per_lr_rb, ref.mean(rb), slope_scale)
    agree(section.delta_h1_per_lr_rb_se, ref.sd(rb) / root, slope_scale)
    agree(section.curvature, ref.mean(curvature), curvature_scale)
    agree(section.curvature_se, ref.sd(curvature) / root, curvature_scale)
    decided = abs(ref.mean(curvature)) >= 2 * ref.sd(curvature) / root
    assert (section.eta_star is not None) == decided
    if section.eta_star is not None:
        star = 2 * abs(ref.mean(rb)) / abs(ref.mean(curvature))
        agree(
            section.eta_star,
            star,
            star * (slope_scale / abs(ref.mean(rb)) + curvature_scale / abs(ref.mean(curvature))),
        )
    assert section.delta_h1_per_lr_cross is None


@pytest.mark.parametrize("both", ["llama+lora"], indirect=True)
def test_cross_fitted_slope_per_token(both: Both, tmp_path: Path) -> None:
    """One batch, per token: what is predicted is by −X̄ᵀv₀ − U_cross[P → D] of X_n = (1/G) Σ_g [f − the others' f]∇S/T̄,
    f = S − s̄T."""
    e = models.random_rollouts(tmp_path / "e.jsonl", prompts=5, responses=3, seed=1)
    mapping = {
        "precision": models.FLOAT64,
        "true_delta_h": {"etas": [1e-6], "normalize": "per_token"},
        "generation": {"temperature": 0.9},
    }
    report = run_probe(both.path, ProbeConfig.from_mapping(mapping), e)
    scored = [[both.e.tokens(n, g)[0] for g in range(3)] for n in range(5)]
    mean_t = ref.mean([len(logp) for row in scored for logp in row])
    s_bar = math.fsum(float(logp.detach().sum()) for row in scored for logp in row) / (15 * mean_t)
    xs = []
    for row in scored:
        f = [float(logp.detach().sum()) - s_bar * len(logp) for logp in row]
        loss = sum((f[g] - ref.mean([f[k] for k in range(3) if k != g])) * row[g].sum() for g in range(3)) / 3 / mean_t
        xs.append(both.e.gradient(loss))
    ys = [both.e.y(n) for n in range(5)]
    v0, diagonal = both.momentum_and_diagonal(ys)
    along, scale = ref.dot(average(xs), v0)
    k = gram(xs, ys, diagonal)
    off = math.fsum(k[n][m][0] for n in range(5) for m in range(5) if n != m) / 20
    row = next(row for row in report.entropy_change if row.eta == 1e-6)
    predicted = 1e-6 * (-along - off) + 0.5e-12 * report.update.curvature_per_token
    agree(row.predicted, predicted, 1e-6 * (scale + math.fsum(t[1] for line in k for t in line) / 20))


def test_cross_fitted_slope_on_one_batch(both: Both) -> None:
    section = both.same.update
    assert both.same.batch.same_batch
    assert both.same.two_batch is None
    size = len(both.e.lines)
    xs, ys = both.x_e, [both.e.y(n) for n in range(size)]
    v = both._direction(ys)
    _, diagonal = both.momentum_and_diagonal(ys)
    whole = ref.dot(average(xs), v)
    k = gram(xs, ys, diagonal)
    all_pairs = math.fsum(k[n][m][0] for n in range(size) for m in range(size)) / size**2
    off = math.fsum(k[n][m][0] for n in range(size) for m in range(size) if n != m) / (size * (size - 1))
    scale = whole[1] + math.fsum(k[n][m][1] for n in range(size) for m in range(size)) / size
    agree(section.delta_h1_per_lr_cross, -(whole[0] - all_pairs) - off, scale)


def per_token_derivatives(both: Both) -> tuple[list[tuple[float, float]], list[float]]:
    """(first, second) derivative of Δh = (ΔM − hΔL)/(L + ΔL) along v with the SE of each, and the sizes of their terms.

    Of M, L and their derivatives as means over prompts with weights; the SE from those with a prompt left in once more.
    """
    rows = [[(float(x["r"]), len(x["entropy"]), *x["of_change"].tolist()) for x in row] for row in both.along]

    def values(weights: list[float]) -> tuple[float, float]:
        flat = [(w / math.fsum(weights) / 3, *x) for w, row in zip(weights, rows, strict=True) for x in row]
        m, length, m1, m2, l1, l2 = (math.fsum(w * x[k] for w, *x in flat) for k in range(6))
        h = m / length
        first = (m1 - h * l1) / length
        return first, (m2 - h * l2 - 2 * first * l1) / length

    def se(which: int, step: float = 1e-4) -> float:
        influence = []
        for n in range(5):
            up, down = ([1 + sign * step * (m == n) for m in range(5)] for sign in (1, -1))
            influence.append(5 * (values(up)[which] - values(down)[which]) / (2 * step))
        return ref.sd(influence) / math.sqrt(5)

    flat = [x for row in rows for x in row]
    mean_t = ref.mean([t for _, t, *_ in flat])
    h = ref.mean([r for r, *_ in flat]) / mean_t
    sizes = [ref.mean([abs(x[k]) + h * abs(x[k + 2]) for x in flat]) / mean_t for k in (2, 3)]
    sizes[1] += 2 * abs(values([1.0] * 5)[0]) * ref.mean([abs(x[4]) for x in flat]) / mean_t
    return [(value, se(k)) for k, value in enumerate(values([1.0] * 5))], sizes


def test_per_token_slope_and_curvature(both: Both) -> None:
    section = both.report.update
    found, sizes = per_token_derivatives(both)
    got = (
        (section.delta_h1_per_lr_per_token, section.delta_h1_per_lr_per_token_se),
        (section.curvature_per_token, section.curvature_per_token_se),
    )
    for (value, se), (expected, expected_se), size in zip(got, found, sizes, strict=True):
        agree(value, expected, size)
        assert se == pytest.approx(expected_se, rel=1e-6)  # a difference of step 1e-4


def test_derivative_of_the_change_per_token(both: Both) -> None:
    """(1/ΣT)·[Σ(R − h̄T)·D_vS + ΣD_vR]: that of the change by normalised weights."""
    flat = [(float(x["r"]), len(x["entropy"]), float(x["d_s"]), float(x["d_r"])) for row in both.along for x in row]
    count = math.fsum(t for _, t, _, _ in flat)
    h = math.fsum(r for r, *_ in flat) / count
    value = math.fsum((r - h * t) * s + d for r, t, s, d in flat) / count
    scale = math.fsum(abs(r * s) + abs(h * t * s) + abs(d) for r, t, s, d in flat) / count
    agree(both.report.update.slope_of_change_per_token, value, scale)


def agree_with_interval(got: tuple[float, float], value: float, se: float, scale: float) -> None:
    if se == 0.0:  # η = 0
        assert got == (value, value)
        return
    for end, expected in zip(got, stats.t.interval(0.95, 4, loc=value, scale=se), strict=True):
        agree(end, float(expected), scale)


def test_entropy_change(both: Both) -> None:
    rows = {row.eta: row for row in both.report.entropy_change}
    assert set(rows) == {0.0, 1e-3, *ETAS}
    _, rb, curvature, slope_scale, curvature_scale = _terms(both)
    with torch.no_grad():
        before = [[both.e.tokens(n, g) for g in range(3)] for n in range(len(both.e.lines))]
    for eta, row in rows.items():
        theta = {n: p.detach().clone() for n, p in both.e.named.items()}
        with torch.no_grad():
            for name, p in both.e.named.items():
                p.add_(both.v[name], alpha=eta)
            after = [[both.e.tokens(n, g) for g in range(3)] for n in range(len(both.e.lines))]
            for name, p in both.e.named.items():
                p.copy_(theta[name])
        w = [
            [math.exp(float(a[0].sum() - b[0].sum())) for a, b in zip(*pair, strict=True)]
            for pair in zip(after, before, strict=True)
        ]
        total = math.fsum(map(math.fsum, w))
        ess = total**2 / math.fsum(x * x for line in w for x in line)
        raw = sorted(
            float(a[0].sum() - b[0].sum())
            for x, y in zip(after, before, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        moved = max(abs(float(t[0].sum())) for line in before for t in line)
        for got, expected in (
            (row.log_weight_min, raw[0]),
            (row.log_weight_median, raw[7]),
            (row.log_weight_max, raw[14]),
        ):
            agree(got, expected, moved)
        assert row.method == "snis"
        agree(row.ess, ess, 15)
        agree(row.ess_fraction, ess / 15, 1)
        for value, se, part, sign in ((row.delta_h, row.delta_h_se, 0, -1), (row.delta_h_rb, row.delta_h_rb_se, 1, 1)):
            f = [[sign * float(t[part].sum()) for t in line] for line in before]
            f_after = [[sign * float(t[part].sum()) for t in line] for line in after]
            h = ref.mean([x for line in f for x in line])
            h_after = (
                math.fsum(x * y for a, b in zip(w, f_after, strict=True) for x, y in zip(a, b, strict=True)) / total
            )
            agree(value, h_after - h, abs(h) + abs(h_after))
            phi = [
                math.fsum(15 * w[n][g] / total * (f_after[n][g] - h_after) - (f[n][g] - h) for g in range(3))
                for n in range(5)
            ]
            agree(se, math.sqrt(5 / 4 * math.fsum(x * x for x in phi)) / 15, abs(h) + abs(h_after))
            interval = row.delta_h_interval if part == 0 else row.delta_h_rb_interval
            agree_with_interval(interval, value, se, abs(h) + abs(h_after))
        value, se, scale = _change_per_token(before, after, w)
        agree(row.delta_h_per_token, value, scale)
        agree(row.delta_h_per_token_se, se, scale)
        terms = _change_by_tokens(both, before, after)
        of_tokens, of_token = (
            _change_per_token_by_tokens(before, terms),
            abs(h) / ref.mean([len(x[0]) for y in before for x in y]),
        )
        phi = [math.fsum(d for d, _ in line) - 3 * ref.mean([d for line in terms for d, _ in line]) for line in terms]
        h_pd = ref.mean([d for line in terms for d, _ in line])
        agree(row.delta_h_pd, h_pd, abs(h))
        pd_se = math.sqrt(5 / 4 * math.fsum(x * x for x in phi)) / 15
        agree(row.delta_h_pd_se, pd_se, abs(h))
        agree_with_interval(row.delta_h_pd_interval, h_pd, pd_se, abs(h))
        agree(row.delta_h_per_token_pd, of_tokens[0], of_token)
        assert row.delta_h_per_token_pd_se == pytest.approx(of_tokens[1], rel=1e-6)  # a difference of step 1e-4
        predicted = [eta * s + 0.5 * eta**2 * c for s, c in zip(rb, curvature, strict=True)]
        scale = abs(eta) * slope_scale + 0.5 * eta**2 * curvature_scale
        agree(row.predicted, ref.mean(predicted), scale)
        agree(row.predicted_se, ref.sd(predicted) / math.sqrt(5), scale)
        left = [x / 3 - y for x, y in zip(phi, predicted, strict=True)]
        agree(row.difference, h_pd - ref.mean(predicted), abs(h) + abs(h_after) + scale)
        agree(row.difference_se, ref.sd(left) / math.sqrt(5), abs(h) + abs(h_after) + scale)
    assert (rows[0.0].delta_h, rows[0.0].delta_h_rb, rows[0.0].ess) == (0.0, 0.0, 15.0)


Lines = list[list[tuple[torch.Tensor, torch.Tensor]]]


def _change_by_tokens(both: Both, before: Lines, after: Lines) -> list[list[tuple[float, float]]]:
    """What every response says of ΔH and of ΔL."""
    return [
        [
            tuple(float(x) for x in both.e.change_terms(n, g, *after[n][g], *now))  # pyright: ignore[reportReturnType]
            for g, now in enumerate(line)
        ]
        for n, line in enumerate(before)
    ]


def _change_per_token_by_tokens(before: Lines, terms: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """(Δh = (ΔM − hΔL)/(L + ΔL), its SE from a prompt counted a little more and less often)."""
    rows = [
        [(float(now[1].sum()), len(now[1]), *own) for now, own in zip(*pair, strict=True)]
        for pair in zip(before, terms, strict=True)
    ]

    def value(weights: list[float]) -> float:
        flat = [(w, *x) for w, row in zip(weights, rows, strict=True) for x in row]
        m, length, dm, dl = (math.fsum(w * x[k] for w, *x in flat) for k in range(4))
        return (dm - m / length * dl) / (length + dl)

    def influence(n: int, step: float = 1e-4) -> float:
        up, down = ([1 + sign * step * (m == n) for m in range(5)] for sign in (1, -1))
        return 5 * (value(up) - value(down)) / (2 * step)

    return value([1.0] * 5), ref.sd([influence(n) for n in range(5)]) / math.sqrt(5)


def _change_per_token(before: Lines, after: Lines, w: list[list[float]], part: int = 1) -> tuple[float, float, float]:
    """(ΔĤ per token, its SE, the size of its terms) of R, or of −S where `part` is 0."""
    sign, total = (1 if part else -1), math.fsum(map(math.fsum, w))
    size = sum(map(len, w))
    flat = [
        (n, w[n][g] / total, sign * float(b[part].sum()), sign * float(after[n][g][part].sum()), len(b[part]))
        for n, line in enumerate(before)
        for g, b in enumerate(line)
    ]
    count = math.fsum(t for *_, t in flat)
    count_after = size * math.fsum(x * t for _, x, _, _, t in flat)
    h = math.fsum(f for _, _, f, _, _ in flat) / count
    h_after = size * math.fsum(x * f for _, x, _, f, _ in flat) / count_after
    clusters = [
        math.fsum(
            size * (size * x * (f_after - h_after * t) / count_after - (f - h * t) / count)
            for m, x, f, f_after, t in flat
            if m == n
        )
        for n in range(len(before))
    ]
    factor = len(before) / (len(before) - 1)
    return h_after - h, math.sqrt(factor * math.fsum(c * c for c in clusters)) / size, abs(h) + abs(h_after)


@pytest.mark.parametrize("both", ["gpt2 full"], indirect=True)
def test_normalised_per_token(both: Both, tmp_path: Path) -> None:
    """`normalize: per_token`: every change of the row is per token, and so is what is predicted."""
    e = models.random_rollouts(tmp_path / "e.jsonl", prompts=5, responses=3, seed=1)
    u = models.random_rollouts(tmp_path / "u.jsonl", prompts=6, responses=2, seed=2)
    mapping = {
        "precision": models.FLOAT64,
        "true_delta_h": {"etas": ETAS, "normalize": "per_token"},
        "generation": {"temperature": 0.9, "tf_batch_size": 4},
    }
    report = run_probe(both.path, ProbeConfig.from_mapping(mapping), e, u)
    ((slope, _), (curvature, _)), (slope_scale, curvature_scale) = per_token_derivatives(both)
    with torch.no_grad():
        before = [[both.e.tokens(n, g) for g in range(3)] for n in range(5)]
    for row in report.entropy_change:
        theta = {n: p.detach().clone() for n, p in both.e.named.items()}
        with torch.no_grad():
            for name, p in both.e.named.items():
                p.add_(both.v[name], alpha=row.eta)
            after = [[both.e.tokens(n, g) for g in range(3)] for n in range(5)]
            for name, p in both.e.named.items():
                p.copy_(theta[name])
        w = [
            [math.exp(float(a[0].sum() - b[0].sum())) for a, b in zip(*x, strict=True)]
            for x in zip(after, before, strict=True)
        ]
        naive, naive_se, naive_scale = _change_per_token(before, after, w, part=0)
        rb, rb_se, scale = _change_per_token(before, after, w)
        agree(row.delta_h, naive, naive_scale)
        agree(row.delta_h_se, naive_se, naive_scale)
        agree_with_interval(row.delta_h_interval, naive, naive_se, naive_scale)
        for value, se in ((row.delta_h_rb, row.delta_h_rb_se), (row.delta_h_per_token, row.delta_h_per_token_se)):
            agree(value, rb, scale)
            agree(se, rb_se, scale)
        agree_with_interval(row.delta_h_rb_interval, rb, rb_se, scale)
        predicted = row.eta * slope + 0.5 * row.eta**2 * curvature
        predicted_scale = abs(row.eta) * slope_scale + 0.5 * row.eta**2 * curvature_scale
        agree(row.predicted, predicted, predicted_scale)
        of_tokens = _change_per_token_by_tokens(before, _change_by_tokens(both, before, after))[0]
        agree(row.delta_h_pd, of_tokens, scale)
        agree(row.difference, of_tokens - predicted, scale + predicted_scale)
        assert (row.predicted_per_token, row.difference_per_token) == (row.predicted, row.difference)
        agree(row.delta_h_per_token_naive, naive, naive_scale)
        agree(row.delta_h_per_token_naive_se, naive_se, naive_scale)
        agree_with_interval(row.delta_h_per_token_interval, rb, rb_se, scale)


def _nucleus_logq(p: torch.Tensor, top_p: float) -> dict[int, float]:
    """log q by sorting: the most likely tokens until their mass reaches top_p, renormalised; the others are not in."""
    ranked = sorted(range(len(p)), key=lambda i: -float(p[i]))
    inside, mass = [], 0.0
    for i in ranked:
        inside.append(i)
        mass += float(p[i])
        if mass >= top_p:
            break
    return {i: math.log(float(p[i]) / mass) for i in inside}


def test_restricted_policy(tmp_path: Path) -> None:
    """top_p 0.7 at temperature 1.3: weights are S(θ⁺) − log q, clipped as those at θ are, so that η = 0 gives exactly
    0; both entropies are of the restricted policy."""
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    checkpoint = load_checkpoint(path)
    config = ProbeConfig.from_mapping(
        {
            "precision": models.FLOAT64,
            "generation": {"temperature": 1.3, "top_p": 0.7, "num_return_sequences": 3, "max_new_tokens": 5},
            "true_delta_h": {"etas": [1e-3], "clip_log_weight": 0.5},
        }
    )
    sampled = sample_rollouts(
        bind(checkpoint.model), OneToken(), [Prompt("ab"), Prompt("cde"), Prompt("f")], config.generation, seed=3
    )
    lines = [
        {
            "prompt_ids": sampled.ids[3 * n, : sampled.prompt_lens[3 * n]].tolist(),
            "response_ids": [
                sampled.ids[i, sampled.prompt_lens[i] : sampled.prompt_lens[i] + sampled.gen_lens[i]].tolist()
                for i in range(3 * n, 3 * n + 3)
            ],
            "rewards": [0.0, 1.0, 0.5],
        }
        for n in range(3)
    ]
    file = tmp_path / "e.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report = run_probe(path, config, file)
    model = checkpoint.model.double()
    e = ref.Reference(model, file, temperature=1.3)
    ys = [e.y(n) for n in range(3)]
    both = object.__new__(Both)
    both.path, both.model, both.e = path, model, e
    g = {name: -y for name, y in average(ys).items()}
    v = ref.optimizer_step(model, both.groups(), both.moments(), g, torch.optim.AdamW)
    s, logq, r, r_q = [], [], [], []
    with torch.no_grad():
        for n, line in enumerate(lines):
            for k, response in enumerate(line["response_ids"]):
                logp, entropy = e.tokens(n, k)
                with TrueFloat64():
                    logits = model(torch.tensor([line["prompt_ids"] + response]), use_cache=False).logits[0]
                start = len(line["prompt_ids"]) - 1
                probabilities = [torch.softmax(logits[start + t] / 1.3, -1) for t in range(len(response))]
                nuclei = [_nucleus_logq(p, 0.7) for p in probabilities]
                logq.append(sum(of_step[t] for of_step, t in zip(nuclei, response, strict=True)))
                r_q.append(-math.fsum(math.exp(x) * x for of_step in nuclei for x in of_step.values()))
                s.append(float(logp.sum()))
                r.append(float(entropy.sum()))
        agree(report.entropy.rb_q.value, ref.mean(r_q), ref.mean(r_q))
        for row in report.entropy_change:
            for name, p in e.named.items():
                p.add_(v[name], alpha=row.eta)
            after = [e.tokens(n, k) for n in range(3) for k in range(3)]
            for name, p in e.named.items():
                p.sub_(v[name], alpha=row.eta)
            weights_before = [math.exp(min(0.5, max(-0.5, a - b))) for a, b in zip(s, logq, strict=True)]
            raw = [float(a[0].sum()) - b for a, b in zip(after, logq, strict=True)]
            weights = [math.exp(min(0.5, max(-0.5, x))) for x in raw]
            assert row.clip_fraction == pytest.approx(sum(abs(x) > 0.5 for x in raw) / 9)
            assert row.ess == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-9)
            h_after = sum(w * float(a[1].sum()) for w, a in zip(weights, after, strict=True)) / sum(weights)
            h = sum(w * x for w, x in zip(weights_before, r, strict=True)) / sum(weights_before)
            agree(row.delta_h_rb, h_after - h, abs(h) + abs(h_after))
            assert row.restricted
            assert row.predicted is None


# What is compared is ‖g‖ alone: nothing else needs to be measured 72 times.
ONLY_THE_UPDATE = {"budget": "smoke", "invariance": {"max_examples": 0}, "true_delta_h": {"etas": [1e-4]}}


@pytest.mark.parametrize("loss", ["lmax", "sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("advantage", ["centered", "grpo", "raw"])
def test_losses_and_advantages(both: Both, loss: str, advantage: str, tmp_path: Path) -> None:
    config = ProbeConfig.from_mapping(
        {
            "precision": models.FLOAT64,
            **ONLY_THE_UPDATE,
            "first_order": {"loss": loss, "advantage": advantage},
            "generation": {"temperature": 0.9, "max_new_tokens": 40},
        }
    )
    files = [models.random_rollouts(tmp_path / f"{n}.jsonl", prompts=3, responses=2, seed=n) for n in (1, 2)]
    with typecheck.unchecked():  # those of `both` are checked
        report = run_probe(both.loaded, config, *files)
    u = ref.Reference(both.model, files[1], temperature=0.9)
    total = {name: torch.zeros_like(p) for name, p in u.named.items()}
    for n, line in enumerate(u.lines):
        rewards, lengths = line["rewards"], [len(response) for response in line["response_ids"]]
        for k in range(2):
            a = rewards[k] - (0 if advantage == "raw" else ref.mean(rewards))
            a = a / (ref.sd(rewards) + 1e-4) if advantage == "grpo" else a
            weight = {
                "lmax": a / max(lengths),
                "sequence_mean": a / lengths[k],
                "token_mean": a * 2 / sum(lengths),
                "constant": a / 40,
            }[loss]
            for name, gradient in u.gradient(weight * u.tokens(n, k)[0].sum() / 2 / 3).items():
                total[name] += gradient
    norm, scale = (math.sqrt(x) for x in ref.dot(total, total))
    agree(report.update.grad_norm, norm, scale)
