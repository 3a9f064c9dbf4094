"""Only what is known to be Adam is taken for it, and what its groups say of the step is obeyed, by loader, `inspect`
and every criterion. Moments in 8 bits; an ended schedule."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import real_optimizers
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments.blocks import Blocks
from entropy_probe.model.registry import Registry
from entropy_probe.stages.moments import moments_match
from entropy_probe.stages.update import adam_preconditioner, compute_update_vector_adamw
from entropy_probe.stages.witnesses.torch_step import optimizer_step_agreement, preconditioner_agreement
from entropy_probe_checks.criteria import CRITERIA
from pytest_entropy_probe.shown import markdown
from pytest_entropy_probe.shown.records import headline
from pytest_entropy_probe.shown.tables import step_of

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = real_optimizers.model()
    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-3, weight_decay=0.1)
    real_optimizers.stepped(of, optimizer)
    return models.save_checkpoint(tmp_path_factory.mktemp("adamw") / "ckpt", of, optimizer)


@pytest.fixture
def changed(adamw: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The checkpoint with another optimizer.pt."""

    def change(how: Change) -> Path:
        for file in adamw.iterdir():
            (tmp_path / file.name).symlink_to(file)
        content = torch.load(adamw / "optimizer.pt", weights_only=True)
        how(content)
        (tmp_path / "optimizer.pt").unlink()
        torch.save(content, tmp_path / "optimizer.pt")
        return tmp_path

    return change


def in_groups(**keys: Any) -> Change:
    return lambda content: [group.update(keys) for group in content["param_groups"]]


def in_states(**keys: Any) -> Change:
    return lambda content: [entry.update(keys) for entry in content["state"].values()]


def bare(content: Any) -> None:
    """As apex and scripts have their groups: nothing of torch's."""
    keep = ("lr", "betas", "eps", "weight_decay", "params")
    content["param_groups"] = [{k: group[k] for k in keep} for group in content["param_groups"]]


def without(*keys: str) -> Change:
    return lambda content: [group.pop(key) for group in content["param_groups"] for key in keys]


def one_state(key: int, **keys: Any) -> Change:
    return lambda content: content["state"][key].update(keys)


NOT_ADAM: dict[str, tuple[Change, str]] = {
    "momentum": (in_groups(momentum=0.9), "Adam has no `momentum: 0.9`"),
    "momentum of 0": (in_groups(momentum=0), "Adam has no `momentum: 0`"),
    "momentum_decay": (in_groups(momentum_decay=4e-3), "Adam has no `momentum_decay: 0.004`"),
    "rho, as SAM has it": (in_groups(rho=0.05, adaptive=False), "Adam has no `rho: 0.05`"),
    "cautious": (in_groups(caution=True), "Adam has no `caution: True`"),
    "cautious, by another name": (in_groups(cautious=1), "Adam has no `cautious: 1`"),
    "corrected decay": (in_groups(corrected_weight_decay=True), "Adam has no `corrected_weight_decay: True`"),
    "AdEMAMix": (in_groups(alpha=5.0), "Adam has no `alpha: 5.0`"),
    "alpha is no number": (in_groups(alpha=math.nan), "Adam has no `alpha: nan`"),
    "three betas": (in_groups(betas=(0.9, 0.99, 0.999)), "Adam has no `betas: (0.9, 0.99, 0.999)`"),
    "a switch of SOAP": (in_groups(normalize_gradient=False), "Adam has no `normalize_gradient: False`"),
    "an unknown key without value": (in_groups(beta3=None), "Adam has no `beta3`"),
    "a tensor in the groups": (in_groups(d_numerator=torch.ones(3)), "Adam has no `d_numerator`"),
    "eps inside the root": (in_groups(eps_inside_sqrt=True), "Adam has no `eps_inside_sqrt: True`"),
    "another name of the decay": (in_groups(weight_decay_rate=0.1), "Adam has no `weight_decay_rate: 0.1`"),
    "one group of two": (
        lambda c: c["param_groups"].append(
            {**c["param_groups"][0], "params": [c["param_groups"][0]["params"].pop()], "warmup": 3}
        ),
        "Adam has no `warmup: 3`",
    ),
    "bare groups, a key more": (lambda c: (bare(c), in_groups(rectify=False)(c)), "Adam has no `rectify: False`"),
    "foreach without amsgrad": (
        lambda c: (bare(c), in_groups(foreach=None, step=3)(c)),
        "its groups have `foreach` and no `amsgrad`",
    ),
    "SparseAdam": (lambda c: (bare(c), in_groups(maximize=False)(c)), "its groups have `maximize` and no `amsgrad`"),
    "a third moment": (in_states(exp_avg_slow=torch.ones(3)), "Adam's states have no `exp_avg_slow`"),
    "SOAP's states": (in_states(Q=[torch.eye(2)], GG=[torch.eye(2)]), "Adam's states have no `Q`"),
    "a third moment of one tensor": (one_state(4, s=torch.ones(3)), "Adam's states have no `s`"),
    "masters": (in_states(master_param=torch.ones(3)), "Adam's states have no `master_param`"),
    "a key that is a number": (lambda c: in_groups()(c) and c["param_groups"][0].update({7: 1}), "Adam has no `7: 1`"),
}


@pytest.mark.parametrize("case", list(NOT_ADAM))
def test_what_is_not_known_of_adam_is_named(changed: Callable[[Change], Path], case: str) -> None:
    change, why = NOT_ADAM[case]
    folder = changed(change)
    loaded, found = load_checkpoint(folder), inspect_checkpoint(folder)
    assert loaded.adam == {}
    assert loaded.other is not None
    assert loaded.other.reason == f"the optimizer is unknown: {why}"
    assert set(loaded.other.trained) == {name for name, _ in loaded.model.named_parameters()}
    assert found.problems == []
    assert found.warnings[0] == f"{loaded.other.reason}; criteria that need one are not applicable"


HARMLESS: dict[str, Change] = {
    "how it is computed": in_groups(
        fused=True, foreach=False, capturable=True, differentiable=True, set_grad_none=True
    ),
    "bitsandbytes' defaults": in_groups(alpha=0.0, t_alpha=None, t_beta3=None),
    "timm's defaults": in_groups(caution=False, corrected_weight_decay=False),
    "Muon is off": in_groups(use_muon=False, is_muon=False),
    "DeepSpeed and Megatron": in_groups(moe=False, is_expert_parallel=False, wd_mult=1.0, lr_mult=1.0, name="decay"),
    "notes of schedulers": in_groups(initial_lr=1e-3, max_lr=1e-2, min_lr=0.0, base_momentum=0.8, max_momentum=0.9),
    "layer-wise rates": in_groups(lr_scale=0.9, layer_id=3, param_group_name="layer_3"),
    "a state of nothing": in_states(master_param=None),
    "betas in a list": in_groups(betas=[0.9, 0.999]),
    "betas in a tensor": in_groups(betas=torch.tensor([0.9, 0.999], dtype=torch.float64)),
    "betas of tensors": in_groups(betas=(torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.999]).double())),
    "lr in a tensor": in_groups(lr=torch.tensor(1e-3, dtype=torch.float64)),
    "eps and decay in tensors": in_groups(
        eps=torch.tensor(1e-8).double(), weight_decay=torch.tensor([0.1], dtype=torch.float64)
    ),
    "AdamW by apex' word": lambda c: (without("decoupled_weight_decay")(c), in_groups(adam_w_mode=1)(c)),
    "corrected by two words": lambda c: in_groups(bias_correction=True)(c),
    "a moment that amsgrad left": in_states(max_exp_avg_sq=None),
    "bare groups": bare,
}


@pytest.mark.parametrize("case", list(HARMLESS))
def test_what_is_known_to_change_nothing_changes_nothing(
    adamw: Path, changed: Callable[[Change], Path], case: str
) -> None:
    folder = changed(HARMLESS[case])
    loaded, usual = load_checkpoint(folder), load_checkpoint(adamw)
    assert loaded.other is None
    assert inspect_checkpoint(folder).problems == []
    for name, state in usual.adam.items():
        own = loaded.adam[name]
        assert torch.equal(own.exp_avg_sq, state.exp_avg_sq)
        assert (own.betas, own.lr, own.kind) == (pytest.approx(state.betas), pytest.approx(state.lr), "AdamW")
        assert own.eps == pytest.approx(state.eps, rel=1e-6)  # 1e-8 as a float32


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "SWALR"])
def test_schedulers_of_torch_leave_adam_what_it_is(tmp_path: Path, kind: str) -> None:
    """Real ones, stepped: what they write into the groups is known."""
    settings: dict[str, dict[str, Any]] = {
        "StepLR": {"step_size": 1},
        "OneCycleLR": {"max_lr": 1e-2, "total_steps": 9},
        "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2},
        "CosineAnnealingWarmRestarts": {"T_0": 2},
        "SWALR": {"swa_lr": 1e-4},
    }
    of = real_optimizers.model()
    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-3)
    make: Any = torch.optim.swa_utils.SWALR if kind == "SWALR" else getattr(torch.optim.lr_scheduler, kind)
    scheduler = make(optimizer, **settings[kind])
    for _ in range(2):
        real_optimizers.stepped(of, optimizer, steps=1)
        scheduler.step()
    loaded = load_checkpoint(models.save_checkpoint(tmp_path / "ckpt", of, optimizer))
    assert loaded.other is None
    group = optimizer.param_groups[0]
    assert {state.lr for state in loaded.adam.values()} == {float(group["lr"])}
    assert {state.betas for state in loaded.adam.values()} == {tuple(group["betas"])}


WRONG: dict[str, tuple[Change, str]] = {
    "two kinds of decay": (in_groups(adam_w_mode=False), "`decoupled_weight_decay: True`, `adam_w_mode: False`"),
    "corrected and not": (
        in_groups(bias_correction=True, correct_bias=False),
        "`bias_correction: True`, `correct_bias",
    ),
    "a word for a switch": (in_groups(bias_correction="no"), "`bias_correction` is 'no', expected true or false"),
    "negative decay": (in_groups(weight_decay=-0.1), "`weight_decay` is -0.1"),
    "decay is no number": (in_groups(weight_decay=math.nan), "`weight_decay` is nan, expected a number"),
    "negative lr": (in_groups(lr=-1e-3), "`lr` is -0.001"),
    "lr is no number": (in_groups(lr=math.nan), "`lr` is nan, expected a number"),
    "no step anywhere": (lambda c: [entry.pop("step") for entry in c["state"].values()], "`step` is None"),
    "step of a group is text": (
        lambda c: ([entry.pop("step") for entry in c["state"].values()], in_groups(step="three")(c)),
        "`step` is 'three', expected a number",
    ),
    "lost states": (
        lambda c: (bare(c), in_groups(step=3)(c), c["state"].clear()),
        "has no moments .its `state` is empty",
    ),
    "never stepped": (lambda c: (bare(c), c["state"].clear()), "was never stepped"),
    "one beta": (in_groups(betas=(0.9,)), r"`betas` is \(0.9,\)"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_no_adam_can_say_is_an_error(changed: Callable[[Change], Path], case: str) -> None:
    change, message = WRONG[case]
    folder = changed(change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert any(caught.value.problem.partition(": ")[2] in line for line in inspect_checkpoint(folder).problems)


@pytest.mark.parametrize("form", [3, 3.0, torch.tensor(3), torch.tensor([3.0])])
def test_step_in_the_group(adamw: Path, changed: Callable[[Change], Path], form: Any) -> None:
    """Where the states have none; theirs counts where they have one."""

    def move(content: Any) -> None:
        bare(content)
        for entry in content["state"].values():
            assert entry.pop("step") == 3
        in_groups(step=form, bias_correction=True)(content)
        content["state"][0]["step"] = 2

    loaded = load_checkpoint(changed(move))
    steps = [state.step for state in loaded.adam.values()]
    assert steps == [2.0, *[3.0] * (len(steps) - 1)]


@pytest.mark.parametrize("content", [{}, {"foreach": None, "step": 9}, {"prev_norm": torch.ones(2), "amplifier": 0.02}])
def test_an_optimizer_that_keeps_nothing_by_tensor_was_stepped(changed: Callable[[Change], Path], content: Any) -> None:
    def change(c: Any) -> None:
        c["state"].clear()
        c["param_groups"] = [{"params": g["params"], "lr": 0.5, **content} for g in c["param_groups"]]

    other = load_checkpoint(changed(change)).other
    assert other is not None
    assert (other.kind, other.lr) == ("unknown", 0.5)


class _Projector:
    """What GaLore keeps in its states: an object of its own class, with a tensor."""

    def __init__(self) -> None:
        self.rank, self.ortho_matrix = 4, torch.eye(3)


def test_objects_of_galore_need_no_galore(changed: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("galore_torch.galore_projector")
    _Projector.__module__, _Projector.__qualname__ = module.__name__, "GaLoreProjector"
    module.GaLoreProjector = _Projector  # pyright: ignore[reportAttributeAccessIssue]

    def change(content: Any) -> None:
        in_groups(rank=4, update_proj_gap=2, scale=0.25, proj_type="std")(content)
        for entry in content["state"].values():
            entry |= {"projector": _Projector(), "exp_avg": torch.ones(4, 5), "exp_avg_sq": torch.ones(4, 5)}

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
        patch.setitem(sys.modules, module.__name__, module)
        folder = changed(change)
    assert "galore_torch.galore_projector" not in sys.modules
    loaded, found = load_checkpoint(folder), inspect_checkpoint(folder)
    assert loaded.other is not None
    assert (loaded.other.kind, loaded.other.step) == ("GaLore", 3)
    assert found.problems == []


def test_an_object_that_is_not_known_is_named(changed: Callable[[Change], Path]) -> None:
    folder = changed(in_states(queue=__import__("collections").deque([1])))
    with pytest.raises(CheckpointError, match=r"was not executed \(collections.deque\); .* in place of objects"):
        load_checkpoint(folder)
    assert "collections.deque" in inspect_checkpoint(folder).problems[0]


def drawn(shape: tuple[int, ...], **settings: Any) -> tuple[Registry, dict[str, AdamState], dict[str, Tensor]]:
    """A tensor with a state and a gradient."""
    generator = torch.Generator().manual_seed(1)
    module = torch.nn.Linear(*shape[::-1], bias=False).double()
    m, y = (torch.randn(shape, generator=generator) for _ in range(2))
    state = AdamState(
        0.1 * m, 0.01 * m.square() + 1e-4, None, step=4.0, lr=0.02, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.3
    )
    return Registry(module), {"weight": replace(state, **settings)}, {"weight": y.double()}


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("form", ["torch", "transformers"])
def test_v_and_p_are_those_of_the_formula(correction: bool, form: str) -> None:
    """In Python's floats; the forms and their witnesses agree with each other, and not with the other form."""
    settings = {"bias_correction": correction, "of_transformers": form == "transformers"}
    registry, adam, ascent = drawn((3, 4), **settings)
    direction = compute_update_vector_adamw(registry, adam, ascent, lr=0.05)
    p, state = adam_preconditioner(adam)["weight"], adam["weight"]
    c1, c2 = (1 - 0.9**5, 1 - 0.99**5) if correction else (1.0, 1.0)
    theta = registry.parameters["weight"].detach()
    rows = [t.flatten().tolist() for t in (theta, ascent["weight"], state.exp_avg, state.exp_avg_sq)]
    for i, (t, y, m, s) in enumerate(zip(*rows, strict=True)):
        m, after = 0.9 * m - 0.1 * y, 0.99 * s + 0.01 * y * y
        if form == "torch":
            expected = -(m / c1) / (math.sqrt(after / c2) + 1e-3) - 0.3 * t
        else:
            stepped = t - 0.05 * math.sqrt(c2) / c1 * m / (math.sqrt(after) + 1e-3)
            expected = (stepped - 0.05 * 0.3 * stepped - t) / 0.05
        assert float(direction.v["weight"].flatten()[i]) == pytest.approx(expected, rel=1e-12)
        c = 1 - 0.99**4 if correction else 1.0
        of_form = (math.sqrt(s) + 1e-3) / math.sqrt(c) if form == "transformers" else math.sqrt(s / c) + 1e-3
        assert float(p.flatten()[i]) == pytest.approx(1 / of_form, rel=1e-12)
    split = direction.v0["weight"] + direction.diagonal["weight"] * ascent["weight"]
    assert torch.allclose(split, direction.v["weight"], rtol=1e-12)
    agreement, _ = optimizer_step_agreement(registry, adam, ascent, direction, 0.05)
    assert agreement.cosine_with_optimizer_step == pytest.approx(1, abs=1e-13)
    assert agreement.norm_ratio_with_optimizer_step == pytest.approx(1, abs=1e-13)
    assert (preconditioner_agreement(adam, {"weight": p}) or 1.0) < 1e-12
    for flag in settings:
        if flag == "of_transformers" and not correction:
            continue  # ε is where it is in either
        other = {"weight": replace(state, **{flag: not settings[flag]})}
        assert preconditioner_agreement(other, {"weight": p}) > 1e-3  # pyright: ignore[reportOptionalOperand]
        of_other, _ = optimizer_step_agreement(registry, other, ascent, direction, 0.05)
        assert abs(of_other.norm_ratio_with_optimizer_step - 1) > 1e-4


def test_one_tensor_alone_without_bias_correction(adamw: Path, changed: Callable[[Change], Path]) -> None:
    """Each group says it of itself."""

    def change(content: Any) -> None:
        last = content["param_groups"][0]["params"].pop()
        content["param_groups"].append({**content["param_groups"][0], "params": [last], "bias_correction": False})

    loaded = load_checkpoint(changed(change)).adam
    assert [state.bias_correction for state in loaded.values()] == [*[True] * (len(loaded) - 1), False]


# bitsandbytes' layout, with a map of our own: 8 bits of a sign and of a logarithm
MAP = torch.cat([-torch.logspace(0, -7, 127), torch.zeros(2), torch.logspace(-7, 0, 127)])
UNSIGNED = torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)])


def quantised(tensor: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest value, and the largest of each 256, value by value."""
    flat = tensor.flatten()
    scales = torch.stack([part.abs().max() for part in flat.split(256)])
    codes = [int((qmap * scales[i // 256] - x).abs().argmin()) for i, x in enumerate(flat)]
    return torch.tensor(codes, dtype=torch.uint8).view(tensor.shape), scales


def in_8_bits(content: Any) -> None:
    """Tensors from 1000 values on; the others stay as they are, as bitsandbytes has it."""
    for entry in content["state"].values():
        inside = {"state1": entry.pop("exp_avg"), "state2": entry.pop("exp_avg_sq")}
        entry["step"] = int(entry["step"])
        for k, qmap in (("1", MAP), ("2", UNSIGNED)):
            if inside[f"state{k}"].numel() >= 1000:
                codes, scales = quantised(inside[f"state{k}"], qmap)
                inside |= {f"state{k}": codes, f"absmax{k}": scales, f"qmap{k}": qmap}
        entry["__bnb_optimizer_quant_state__"] = inside
    keep = ("lr", "betas", "eps", "weight_decay", "params")
    groups = [{k: group[k] for k in keep} for group in content["param_groups"]]
    content["param_groups"] = [{**g, "alpha": 0.0, "t_alpha": None, "t_beta3": None} for g in groups]


def test_values_of_8_bits(adamw: Path, changed: Callable[[Change], Path]) -> None:
    """Each is within its rounding of the one that was there, and the block's largest is exact."""
    loaded, usual = load_checkpoint(changed(in_8_bits)), load_checkpoint(adamw)
    assert inspect_checkpoint(Path(loaded.info.path)).problems == []
    seconds = [state.exp_avg_sq for state in loaded.adam.values() if state.blocks]
    lost, total = sum(int((s == 0).sum()) for s in seconds), sum(s.numel() for s in seconds)
    said = f"8 bits round {lost} of {total} second moments to 0: P is 1/ε there"
    assert lost > 0
    assert loaded.info.warnings == (said,)
    assert said in inspect_checkpoint(Path(loaded.info.path)).warnings
    packed = {name for name, state in loaded.adam.items() if state.blocks}
    assert packed == {name for name, p in loaded.model.named_parameters() if p.numel() >= 1000}
    for name, state in loaded.adam.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            own, was = getattr(state, moment), getattr(usual.adam[name], moment)
            if name not in packed:
                assert torch.equal(own, was)
                continue
            assert bool(((own - was).abs() <= state.rounding(moment) * (1 + 1e-5)).all())
            largest = (t.flatten().split(256)[-1].abs().max() for t in (own, was))
            assert next(largest) == pytest.approx(float(next(largest)), rel=1e-6)
            assert not torch.equal(own, was)


def test_rounding_is_half_the_way_to_the_neighbours() -> None:
    codes = torch.tensor([[0, 1, 255], [254, 2, 100]], dtype=torch.uint8)
    blocks = Blocks(codes, torch.tensor([2.0, 0.5]), UNSIGNED, size=4)
    half = [
        max(abs(UNSIGNED[c] - UNSIGNED[n]) for n in (c - 1, c + 1) if 0 <= n < 256) / 2 for c in (0, 1, 255, 254, 2)
    ]
    expected = [2 * float(h) for h in half[:4]] + [0.5 * float(half[4])]
    assert blocks.rounding.flatten()[:5].tolist() == pytest.approx(expected)
    assert blocks.values[1, 2] == 0.5 * UNSIGNED[100]


def test_moments_match_leaves_out_what_8_bits_say_too_vaguely() -> None:
    """Two tensors whose second moments lie below the smallest number of their blocks but for one value: what is left of
    them is the other tensor's pattern. As 32-bit numbers they speak for an exchange, as 8-bit ones they say nothing."""
    generator = torch.Generator().manual_seed(0)
    squares = {name: torch.rand(1, 2048, generator=generator).double() + 0.01 for name in "ab"}
    coarse = torch.cat([torch.zeros(1), torch.tensor([1e-6, 3e-6, 9e-6]), torch.linspace(0.5, 1, 252)])
    states = {}
    for name, other in (("a", "b"), ("b", "a")):
        codes = 1 + (squares[other][0] > 0.3).long() + (squares[other][0] > 0.7)
        codes[::256] = 255
        blocks = Blocks(codes.to(torch.uint8), torch.ones(8), coarse, 256)
        values = blocks.values
        states[name] = AdamState(
            values, values, None, 3.0, 1e-3, (0.9, 0.999), 1e-8, 0.0, blocks={"exp_avg_sq": blocks}
        )
    y = {name: of.sqrt() for name, of in squares.items()}
    found, _ = moments_match(states, y)
    assert found.exchanged == 0.0
    as_numbers, _ = moments_match({n: replace(s, blocks={}) for n, s in states.items()}, y)
    assert as_numbers.exchanged is not None
    assert as_numbers.exchanged > 5


SMALL: dict[str, Any] = {"budget": "smoke", "invariance": {"max_examples": 0}}
WHOLE: dict[str, tuple[Change, str]] = {
    "not corrected, of Transformers": (
        lambda c: (bare(c), in_groups(correct_bias=False, eps=1e-6)(c)),
        "AdamW without bias correction",
    ),
    "step in the group": (
        lambda c: (bare(c), [e.pop("step") for e in c["state"].values()], in_groups(step=3, bias_correction=True)(c)),
        "AdamW",
    ),
    "8 bits": (in_8_bits, "AdamW 8-bit"),
}


def measured(folder: Path, tmp_path: Path, **config: Any) -> ProbeReport:
    e, u = (models.random_rollouts(tmp_path / f"{n}.jsonl", prompts=4, responses=3, seed=n) for n in (1, 2))
    return run_probe(folder, ProbeConfig.from_mapping(SMALL | config), e, u)


@pytest.mark.parametrize("case", list(WHOLE))
def test_every_criterion(changed: Callable[[Change], Path], tmp_path: Path, case: str) -> None:
    """None fails, and those of the optimizer are asked."""
    change, kind = WHOLE[case]
    report = measured(changed(change), tmp_path, budget="standard")
    assert report.checkpoint.optimizer.type == kind
    assert not any("schedule" in line for line in report.doubts)
    verdicts = {name: criterion(report) for name, criterion in CRITERIA.items()}
    assert [name for name, verdict in verdicts.items() if verdict.status == "fail"] == []
    asked = ("optimizer_step_cosine", "optimizer_step_norm", "preconditioner_witness", "real_step", "as_stored")
    assert {name: verdicts[name].status for name in asked} == dict.fromkeys(asked, "pass")


def test_an_ended_schedule_is_said_first(changed: Callable[[Change], Path], tmp_path: Path) -> None:
    report = measured(changed(in_groups(lr=0.0, initial_lr=2.5e-4)), tmp_path)
    said = "the optimizer's lr is 0, its schedule has ended: the step is at initial_lr 0.00025"
    assert said in report.doubts
    first = f"!    {said}"
    assert first in headline(report).splitlines()
    steps = [step_of("ckpt", "run", report, [], "")]
    shown = markdown.summary("entropy probe", steps, {}, {"ckpt": headline(report)}, {}, [])
    assert first in shown.splitlines()


def test_no_schedule_at_all_is_said_too(changed: Callable[[Change], Path], tmp_path: Path) -> None:
    report = measured(changed(in_groups(lr=0.0)), tmp_path)
    assert "the optimizer's lr is 0, its schedule has ended: the step is at lr 0.0001" in report.doubts
    given = measured(Path(report.checkpoint.path), tmp_path, first_order={"lr": 1e-4})
    assert not any("schedule" in line for line in given.doubts)
