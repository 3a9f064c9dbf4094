"""Every first_order, two_batch, entropy, update and entropy_change number of the report, against plain loops.

Float64 throughout; a number agrees when it differs by at most 1e-9 of the sum of the absolute values of the terms that
were added to make it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import reference as ref
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.model.forward import bind
from entropy_probe.model.precision import TrueFloat64
from entropy_probe.stages.rollouts import sample_rollouts
from entropy_probe.stages.tasks import Prompt
from test_rollouts import OneToken

FLOAT64 = {key: {"dtype": "float64"} for key in ("func_override", "tf_nograd", "tf_withgrad")}
TOLERANCE = 1e-9
ETAS = [1e-5, 3e-4]
KINDS: dict[str, Any] = {
    "llama+lora": lambda folder: models.adapter_checkpoint(folder, "llama"),
    "gpt2 full": lambda folder: models.full_checkpoint(folder, "gpt2"),
    "gpt2 full, Adam": lambda folder: models.full_checkpoint(folder, "gpt2", torch.optim.Adam),
    "qwen3+lora, AMSGrad": lambda folder: models.adapter_checkpoint(folder, "qwen3", adamw={"amsgrad": True}),
    "llama+dora+modules_to_save": lambda folder: models.adapter_checkpoint(
        folder, "llama", use_dora=True, modules_to_save=["lm_head"]
    ),
}


class Both:
    """The report of one checkpoint, and the reference's E and U batches on the same float64 model."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = KINDS[kind](folder / "ckpt")
        e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        u = models.random_rollouts(folder / "u.jsonl", prompts=6, responses=2, seed=2)
        config = ProbeConfig.from_mapping(
            {
                "precision": FLOAT64,
                "true_delta_h": {"etas": ETAS},
                "generation": {"temperature": 0.9, "tf_batch_size": 4},
            }
        )
        self.report: ProbeReport = run_probe(self.path, config, e, u)
        self.same: ProbeReport = run_probe(self.path, config, e)
        self.checkpoint = load_checkpoint(self.path)
        self.model = self.checkpoint.model.double()
        self.e, self.u = (ref.Reference(self.model, file, temperature=0.9) for file in (e, u))
        self.v = self._direction(self.u)

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state of optimizer.pt as torch reads it, by the name that the construction of the checkpoint implies."""
        saved = torch.load(self.path / "optimizer.pt", weights_only=True)
        return {name: saved["state"][i] for i, name in self._order(saved)}

    def _order(self, saved: dict[str, Any]) -> list[tuple[int, str]]:
        flat = [i for group in saved["param_groups"] for i in group["params"]]
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        if len(saved["param_groups"]) == 2:  # GPT-2: the Trainer decays matrices, not LayerNorms and biases
            kept = [n for n in names if "ln_" in n or n.endswith("bias")]
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

    def _direction(self, batch: ref.Reference) -> dict[str, torch.Tensor]:
        ys = [batch.y(n) for n in range(len(batch.lines))]
        g = {name: -sum(y[name] for y in ys) / len(ys) for name in ys[0]}
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


def test_first_order(both: Both) -> None:
    section, p = both.report.first_order, both.precond()
    size = len(both.u.lines)
    xs, ys = ([f(n) for n in range(size)] for f in (both.u.x, both.u.y))
    k = [[ref.dot(xs[n], ys[m], p) for m in range(size)] for n in range(size)]
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
        y_others = {name: sum(ys[m][name] for m in range(size) if m != n) / (size - 1) for name in p}
        x_others = {name: sum(xs[m][name] for m in range(size) if m != n) / (size - 1) for name in p}
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
        summed = {name: sum(unit[name] for unit in units) for name in p}
        agree(got, math.sqrt(ref.dot(summed, summed)[0]), math.sqrt(ref.dot(summed, summed)[1]))
    agree(section.delta_h1, -1e-3 * u_cross, 1e-3 * total / size**2)
    agree(section.delta_h1_se, 1e-3 * section.se_plugin, 1e-3 * section.se_plugin)
    assert (section.lr, section.lr_source) == (1e-3, "optimizer")


def test_two_batches(both: Both) -> None:
    section, p = both.report.two_batch, both.precond()
    assert section is not None
    xs = [both.e.x(n) for n in range(len(both.e.lines))]
    ys = [both.u.y(m) for m in range(len(both.u.lines))]
    y_bar = {name: sum(y[name] for y in ys) / len(ys) for name in p}
    k = [[ref.dot(x, y, p) for y in ys] for x in xs]
    scale = math.fsum(t[1] for row in k for t in row) / (len(xs) * len(ys))
    s = [ref.dot(x, y_bar, p)[0] for x in xs]
    for got, expected in zip(section.projections, s, strict=True):
        agree(got, expected, scale * len(xs))
    agree(section.bars_dot, ref.mean(s), scale)
    agree(section.delta_h1, -1e-3 * ref.mean(s), 1e-3 * scale)
    agree(section.conditional_se, 1e-3 * ref.sd(s) / math.sqrt(len(s)), 1e-3 * scale)
    t = [ref.mean([k[i][m][0] for i in range(len(xs))]) for m in range(len(ys))]
    left = [[k[i][m][0] - s[i] - t[m] + ref.mean(s) for m in range(len(ys))] for i in range(len(xs))]
    interaction = math.fsum(x * x for row in left for x in row) / ((len(xs) - 1) * (len(ys) - 1))
    var_s, var_t = ref.sd(s) ** 2 / len(xs), ref.sd(t) ** 2 / len(ys)
    of_both = interaction / (len(xs) * len(ys))
    total = max(var_s + var_t - of_both, of_both / 4)
    agree(section.delta_h1_se, 1e-3 * math.sqrt(total), 1e-3 * scale)


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


def _terms(both: Both, v: dict[str, torch.Tensor]) -> tuple[list[float], list[float], list[float], float, float]:
    """Per prompt: naive slope, RB slope, curvature; and the mean size of a slope's and a curvature's terms."""
    along = both.e.directional(v)
    flat = [item for row in along for item in row]
    size = len(flat)
    naive, rb, curvature, slope_scale, curvature_scale = [], [], [], 0.0, 0.0
    for row in along:
        n_terms, r_terms, c_terms = [], [], []
        for g, item in enumerate(row):
            others = ref.mean([float(other["s"]) for k, other in enumerate(row) if k != g])
            n_terms.append(-(float(item["s"]) - others) * float(item["d_s"]))
            value = 0.0
            for t in range(len(item["entropy"])):
                later = float(item["entropy"][t + 1 :].sum())
                value += float(item["d_entropy"][t]) + later * float(item["d_logp"][t])
                slope_scale += (abs(float(item["d_entropy"][t])) + abs(later * float(item["d_logp"][t]))) / size
            r_terms.append(value)
            r_bar = (sum(float(x["r"]) for x in flat) - float(item["r"])) / (size - 1)
            parts = [
                float(item["d2_r"]),
                2 * float(item["d_r"] * item["d_s"]),
                (float(item["r"]) - r_bar) * float(item["d2_s"] + item["d_s"] ** 2),
            ]
            c_terms.append(sum(parts))
            curvature_scale += sum(map(abs, parts)) / size
        naive.append(ref.mean(n_terms))
        rb.append(ref.mean(r_terms))
        curvature.append(ref.mean(c_terms))
    return naive, rb, curvature, slope_scale + ref.mean([abs(x) for x in naive]), curvature_scale


def test_update(both: Both) -> None:
    section = both.report.update
    ys = [both.u.y(m) for m in range(len(both.u.lines))]
    y_bar = {name: sum(y[name] for y in ys) / len(ys) for name in ys[0]}
    agree(section.grad_norm, math.sqrt(ref.dot(y_bar, y_bar)[0]), math.sqrt(ref.dot(y_bar, y_bar)[1]))
    agree(section.norm, math.sqrt(ref.dot(both.v, both.v)[0]), math.sqrt(ref.dot(both.v, both.v)[1]))
    naive, rb, curvature, slope_scale, curvature_scale = _terms(both, both.v)
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


def test_cross_fitted_slope_on_one_batch(both: Both) -> None:
    section = both.same.update
    assert both.same.batch.same_batch
    assert both.same.two_batch is None
    size = len(both.e.lines)
    v = both._direction(both.e)
    xs, ys = ([f(n) for n in range(size)] for f in (both.e.x, both.e.y))
    y_bar = {name: sum(y[name] for y in ys) / size for name in v}
    diagonal = {}
    for group in both.groups():
        beta1, beta2 = group["betas"]
        for name in group["params"]:
            state = both.moments()[name]
            t = float(state["step"]) + 1
            decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            gradient = -y_bar[name] + decay * both.e.named[name].detach()
            second = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * gradient**2
            if group["amsgrad"]:
                second = torch.maximum(second, state["max_exp_avg_sq"].double())
            denominator = torch.sqrt(second) / math.sqrt(1 - beta2**t) + group["eps"]
            diagonal[name] = (1 - beta1) / ((1 - beta1**t) * denominator)
    x_bar = {name: sum(x[name] for x in xs) / size for name in v}
    whole = ref.dot(x_bar, v)
    k = [[ref.dot(xs[n], ys[m], diagonal) for m in range(size)] for n in range(size)]
    all_pairs = math.fsum(k[n][m][0] for n in range(size) for m in range(size)) / size**2
    off = math.fsum(k[n][m][0] for n in range(size) for m in range(size) if n != m) / (size * (size - 1))
    scale = whole[1] + math.fsum(k[n][m][1] for n in range(size) for m in range(size)) / size
    agree(section.delta_h1_per_lr_cross, -(whole[0] - all_pairs) - off, scale)


def test_entropy_change(both: Both) -> None:
    rows = {row.eta: row for row in both.report.entropy_change}
    assert set(rows) == {0.0, 1e-3, *ETAS}
    _, rb, curvature, slope_scale, curvature_scale = _terms(both, both.v)
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
        predicted = [eta * s + 0.5 * eta**2 * c for s, c in zip(rb, curvature, strict=True)]
        scale = abs(eta) * slope_scale + 0.5 * eta**2 * curvature_scale
        agree(row.predicted, ref.mean(predicted), scale)
        agree(row.predicted_se, ref.sd(predicted) / math.sqrt(5), scale)
    assert (rows[0.0].delta_h, rows[0.0].delta_h_rb, rows[0.0].ess) == (0.0, 0.0, 15.0)


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
    """top_p 0.7 at temperature 1.3: weights are S(θ⁺) − log q, and both entropies are of the restricted policy."""
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    checkpoint = load_checkpoint(path)
    config = ProbeConfig.from_mapping(
        {
            "precision": FLOAT64,
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
    g = {name: -sum(y[name] for y in ys) / 3 for name in ys[0]}
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
            weights_before = [math.exp(a - b) for a, b in zip(s, logq, strict=True)]
            raw = [float(a[0].sum()) - b for a, b in zip(after, logq, strict=True)]
            weights = [math.exp(min(0.5, max(-0.5, x))) for x in raw]
            assert row.clip_fraction == pytest.approx(sum(abs(x) > 0.5 for x in raw) / 9)
            assert row.ess == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-9)
            h_after = sum(w * float(a[1].sum()) for w, a in zip(weights, after, strict=True)) / sum(weights)
            h = sum(w * x for w, x in zip(weights_before, r, strict=True)) / sum(weights_before)
            agree(row.delta_h_rb, h_after - h, abs(h) + abs(h_after))
            assert row.restricted
            assert row.predicted is None


@pytest.mark.parametrize("loss", ["lmax", "sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("advantage", ["centered", "grpo", "raw"])
def test_losses_and_advantages(both: Both, loss: str, advantage: str, tmp_path: Path) -> None:
    config = ProbeConfig.from_mapping(
        {
            "precision": FLOAT64,
            "first_order": {"loss": loss, "advantage": advantage},
            "generation": {"temperature": 0.9, "max_new_tokens": 40},
        }
    )
    files = [models.random_rollouts(tmp_path / f"{n}.jsonl", prompts=3, responses=2, seed=n) for n in (1, 2)]
    report = run_probe(both.path, config, *files)
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
