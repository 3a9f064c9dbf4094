"""Real optimizers on a tiny model: what the loader makes of each, and lr·v beside the step that it makes next.

    python tests/real_optimizers.py > docs/optimizers.md

writes the page, with the optimizers of all packages in `PACKAGES`; each must be installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import models
from entropy_probe import load_checkpoint
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments.adam import kind_of
from entropy_probe.model.registry import Registry
from entropy_probe.stages.update import compute_update_vector_adamw, learning_rate

PACKAGES = ("transformers", "bitsandbytes", "torchao", "galore_torch", "apollo_torch", "pytorch_optimizer")
DISTRIBUTIONS = {
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "pytorch_optimizer": "pytorch-optimizer",
}
Make = Callable[[Any], Any]
"""A model → its optimizer."""


@dataclasses.dataclass(frozen=True)
class Found:
    """`kind` of the optimizer; where it is Adam: cosine and ratio of norms of lr·v and the step. Else why it is not."""

    kind: str
    cosine: float = math.nan
    ratio: float = math.nan
    why: str = ""

    @property
    def cells(self) -> str:
        if self.why:
            return f"not Adam ({self.kind}): {self.why}"
        return f"{self.kind}, as it steps"


def model() -> Any:
    """One layer; two matrices of its 11 tensors have 4096 values, of which others keep 8-bit moments."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.LlamaConfig(**models.ROPE | sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def stepped(of: Any, optimizer: Any, steps: int = 3) -> None:
    """Steps on random text, one after another."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(3, models.VOCABULARY, (4, 9), generator=generator)
        with_gradient(of, ids)
        optimizer.step()


def with_gradient(of: Any, ids: Tensor) -> None:
    of.zero_grad()
    of(ids, labels=ids).loss.backward()


def found(folder: Path, make: Make) -> Found:
    """What is made of its checkpoint, by the loader and by `inspect`; and the step that the live optimizer then takes
    on a new gradient, of which v is given the negative."""
    of = model()
    optimizer = make(of)
    stepped(of, optimizer)
    of.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    loaded, inspected = load_checkpoint(folder), inspect_checkpoint(folder)
    assert inspected.problems == []
    assert inspected.optimizer is not None
    if loaded.other is not None:
        assert inspected.optimizer.type == loaded.other.kind
        assert set(loaded.other.trained) == {name for name, _ in of.named_parameters()}
        return Found(loaded.other.kind, why=loaded.other.why)
    kind = inspected.optimizer.type
    assert kind == kind_of(loaded.adam.values())
    ids = torch.randint(3, models.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(6))
    with_gradient(of, ids)
    ascent = {name: -p.grad.double() for name, p in of.named_parameters()}
    lr, _ = learning_rate(loaded.adam, None)
    v = compute_update_vector_adamw(Registry(loaded.model), loaded.adam, ascent).v
    before = {name: p.detach().double().clone() for name, p in of.named_parameters()}
    optimizer.step()
    made = torch.cat([(p.detach().double() - before[n]).flatten() for n, p in of.named_parameters()])
    told = torch.cat([lr * v[name].flatten() for name in before])
    cosine = float(made @ told / made.norm() / told.norm())
    return Found(kind, cosine, float(told.norm() / made.norm()))


LR = 0.05  # θ' − θ is then 1e6 float32 ulps of θ


def of_torch(name: str, **settings: Any) -> Make:
    return lambda of: getattr(torch.optim, name)(of.parameters(), **{"lr": LR, **settings})


def each_group_its_own(of: Any) -> torch.optim.Optimizer:
    """Adam's and AdamW's decay, AMSGrad, and lr and betas of their own; lr and betas in tensors."""
    groups: list[list[nn.Parameter]] = [[], [], []]
    for i, p in enumerate(of.parameters()):
        groups[min(2, i // 4)].append(p)
    return torch.optim.AdamW(
        [
            {"params": groups[0], "lr": torch.tensor(LR), "decoupled_weight_decay": False},
            {"params": groups[1], "lr": LR / 2, "betas": (0.7, 0.99), "weight_decay": 0.3, "eps": 1e-3},
            {"params": groups[2], "lr": LR, "amsgrad": True, "maximize": True},
        ],
        weight_decay=0.1,
    )


class Apex(torch.optim.Optimizer):
    """The layout of apex' FusedAdam, and of DeepSpeed's: `step` in the group, `bias_correction`; its kernel's
    arithmetic: θ − lr·(m̂/(√v̂ + ε) + weight_decay·θ)."""

    def __init__(self, params: Any, *, bias_correction: bool = True) -> None:
        defaults = {"bias_correction": bias_correction, "betas": (0.9, 0.999), "eps": 1e-6}
        super().__init__(params, {"lr": LR, "weight_decay": 0.1, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            c1, c2 = 1.0, 1.0
            if group["bias_correction"]:
                c1, c2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            for p in group["params"]:
                zeros = torch.zeros_like(p)
                state = self.state[p] = self.state[p] or {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                m, s = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                s.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = (m / c1) / ((s / c2).sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)


class MuonWithAdam(torch.optim.Optimizer):
    """Keller Jordan's layout by groups, and Moonlight's by states; the arithmetic is of no matter."""

    def __init__(self, of: Any, *, by_state: bool) -> None:
        matrices = [p for p in of.parameters() if p.ndim == 2]
        vectors = [p for p in of.parameters() if p.ndim == 1]
        self.by_state = by_state
        muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
        adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        if by_state:
            adamw = {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
            own = {"lr": 0.02, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, **adamw}
            super().__init__([*matrices, *vectors], own)
        else:
            groups = [{"params": matrices, "use_muon": True, **muon}, {"params": vectors, "use_muon": False, **adam}]
            super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            is_muon, zeros = p.ndim == 2, torch.zeros_like(p)
            moments = ("moment1", "moment2") if self.by_state else ("exp_avg", "exp_avg_sq")
            own = {"momentum_buffer": zeros} if is_muon else {"step": 1, **dict.fromkeys(moments, zeros)}
            self.state[p] = own | ({"use_muon": is_muon} if self.by_state else {})


class Both:
    """torch's Muon for the matrices and its AdamW for the rest, in the one state_dict that torch makes of two."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.parts = [
            torch.optim.Muon([p for p in of.parameters() if p.ndim == 2], lr=LR),
            torch.optim.AdamW([p for p in of.parameters() if p.ndim == 1], lr=LR),
        ]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.of, self.parts)


class Transformers4(torch.optim.Optimizer):
    """AdamW of transformers 4, which 5 has no more: its layout (`correct_bias`) and its arithmetic."""

    def __init__(self, params: Any, **settings: Any) -> None:
        defaults = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1, "correct_bias": True}
        super().__init__(params, defaults | settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p in [(of, p) for of in self.param_groups for p in of["params"]]:
            zeros = torch.zeros_like(p)
            state = self.state[p] = self.state[p] or {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            (beta1, beta2), lr = group["betas"], group["lr"]
            state["step"] += 1
            state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            size = lr
            if group["correct_bias"]:
                size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
            p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
            p.add_(p, alpha=-lr * group["weight_decay"])


TORCH: dict[str, Make] = {
    "AdamW": of_torch("AdamW", weight_decay=0.1),
    "AdamW, fused": of_torch("AdamW", weight_decay=0.1, fused=True),
    "AdamW, foreach": of_torch("AdamW", foreach=True),
    "AdamW, AMSGrad": of_torch("AdamW", amsgrad=True),
    "AdamW, maximize": of_torch("AdamW", maximize=True, weight_decay=0.1),
    "Adam": of_torch("Adam", weight_decay=0.1),
    "Adam, decoupled decay": of_torch("Adam", weight_decay=0.1, decoupled_weight_decay=True),
    "AdamW, each group its own": each_group_its_own,
    "NAdam": of_torch("NAdam"),
    "RAdam": of_torch("RAdam"),
    "RAdam, decoupled decay": of_torch("RAdam", decoupled_weight_decay=True, weight_decay=0.1),
    "Adamax": of_torch("Adamax"),
    "Muon and AdamW": Both,
    "Adagrad": of_torch("Adagrad"),
    "Adadelta": of_torch("Adadelta"),
    "Adafactor": of_torch("Adafactor"),
    "RMSprop": of_torch("RMSprop", lr=1e-3),
    "Rprop": of_torch("Rprop"),
    "ASGD": of_torch("ASGD"),
    "SGD": of_torch("SGD"),
    "SGD, momentum": of_torch("SGD", momentum=0.9),
}
LAYOUTS: dict[str, Make] = {
    "FusedAdam": lambda of: Apex(of.parameters()),
    "FusedAdam without bias correction": lambda of: Apex(of.parameters(), bias_correction=False),
    "AdamW of transformers 4": lambda of: Transformers4(of.parameters()),
    "AdamW of transformers 4 without bias correction": lambda of: Transformers4(of.parameters(), correct_bias=False),
    "MuonWithAuxAdam": lambda of: MuonWithAdam(of, by_state=False),
    "Muon of Moonlight": lambda of: MuonWithAdam(of, by_state=True),
}


def low_rank(of: Any, **more: Any) -> list[dict[str, Any]]:
    """As the Trainer has them: the targets in the last group."""
    targets = [p for name, p in of.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in of.parameters() if not any(p is target for target in targets)]
    settings = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std", **more}
    return [{"params": rest}, {"params": targets, **settings}]


def of_bitsandbytes(name: str, **settings: Any) -> Make:
    def make(of: Any) -> torch.optim.Optimizer:
        kind = getattr(importlib.import_module("bitsandbytes.optim"), name)
        return kind(of.parameters(), **{"lr": LR, "weight_decay": 0.1, **settings})

    return make


def of_torchao(name: str, **settings: Any) -> Make:
    """Its step goes through `torch.compile`, which needs a compiler: here it does not."""

    def make(of: Any) -> torch.optim.Optimizer:
        adam: Any = importlib.import_module("torchao.optim.adam")
        optimizer = getattr(adam, name)(of.parameters(), **{"lr": LR, **settings})
        step = optimizer.step

        def eager() -> None:
            compiled, torch.compile = torch.compile, lambda function, **_: function
            try:
                step()
            finally:
                torch.compile = compiled

        optimizer.step = eager
        return optimizer

    return make


def of_pytorch_optimizer(name: str) -> Make:
    def make(of: Any) -> torch.optim.Optimizer:
        load: Any = importlib.import_module("pytorch_optimizer").load_optimizer
        return load(name)(of.parameters(), lr=1e-3)

    return make


EIGHT = {"min_8bit_size": 512}
OF_OTHERS: dict[str, dict[str, Make]] = {
    "transformers": {
        "Adafactor": lambda of: transformers.optimization.Adafactor(of.parameters()),
    },
    "bitsandbytes": {
        "AdamW": of_bitsandbytes("AdamW"),
        "Adam": of_bitsandbytes("Adam"),
        "PagedAdamW": of_bitsandbytes("PagedAdamW"),
        "AdamW8bit": of_bitsandbytes("AdamW8bit", **EIGHT),
        "PagedAdamW8bit": of_bitsandbytes("PagedAdamW8bit", **EIGHT),
        "AdEMAMix": of_bitsandbytes("AdEMAMix"),
        "AdEMAMix8bit": of_bitsandbytes("AdEMAMix8bit", **EIGHT),
        "LAMB": of_bitsandbytes("LAMB"),
        "LAMB8bit": of_bitsandbytes("LAMB8bit", **EIGHT),
        "Lion8bit": of_bitsandbytes("Lion8bit", **EIGHT),
        "RMSprop8bit": of_bitsandbytes("RMSprop8bit", weight_decay=0.0, **EIGHT),
    },
    "torchao": {
        "AdamW8bit": of_torchao("AdamW8bit", weight_decay=0.1),
        "Adam8bit": of_torchao("Adam8bit"),
        "AdamW4bit": of_torchao("AdamW4bit"),
        "AdamWFp8": of_torchao("AdamWFp8"),
        "_AdamW": of_torchao("_AdamW"),
    },
    "galore_torch": {
        "GaLoreAdamW": lambda of: importlib.import_module("galore_torch").GaLoreAdamW(low_rank(of), lr=LR),
        "GaLoreAdamW without a rank": lambda of: importlib.import_module("galore_torch").GaLoreAdamW(
            of.parameters(), lr=LR, weight_decay=0.1
        ),
    },
    "apollo_torch": {
        "APOLLOAdamW": lambda of: importlib.import_module("apollo_torch").APOLLOAdamW(
            low_rank(of, proj="random", scale_type="channel"), lr=LR
        ),
    },
    "pytorch_optimizer": {
        name: of_pytorch_optimizer(name)
        for name in (
            "adabelief", "adabound", "adagc", "adai", "adam", "adamc", "adamod", "adamp", "adams", "adamw",
            "adamwsn", "adan", "adanorm", "adapnm", "adatam", "ademamix", "adopt", "ano", "asgd", "avagrad",
            "dadaptadam", "diffgrad", "dualadam", "emonavi", "exadam", "fira", "fromage", "galore",
            "grams", "grokfastadamw", "lamb", "laprop", "lion", "mars", "msvag", "nadam", "padam", "pid", "prodigy",
            "qhadam", "radam", "ranger", "schedulefreeadamw", "sgdw", "simplifiedademamix", "soap", "stableadamw",
            "stablespam", "swats", "tiger", "yogi",
        )
    },
}  # fmt: skip


def rows() -> Iterator[tuple[str, str, Make]]:
    """(package, optimizer, how it is made); of the layouts that are written here the package is empty."""
    for package, made in {"torch": TORCH, "": LAYOUTS, **OF_OTHERS}.items():
        for name, make in made.items():
            yield package, name, make


def line(package: str, name: str, of: Found) -> str:
    return f"| {package or 'layout'} | {name} | {of.cells} |"


HEAD = """# Optimizers, and what is done with each

P and v are defined by Adam's moments. The probe takes an optimizer for Adam only if it knows that Adam writes every key
of the param_groups and of the states. Any other optimizer is named. Its checkpoint is measured without P and v, as
[criteria](criteria.md#optimizers-that-are-not-adam) says.

<!-- needs other packages -->
`python tests/real_optimizers.py` made each row below. The real optimizer takes three steps of a tiny Llama, the probe
loads its checkpoint, and the optimizer takes one more step on a new gradient. *As it steps* means that this step is
lr·v, where v is made from the file and that gradient. Their cosine is at least 1 − 1e-9, and their norms are equal up
to float32's rounding of θ. `tests/test_real_optimizers.py` tests each row. Rows of a package are tested only if the
package is installed. Rows of torch and of the layouts are always tested. A *layout* is the format of a trainer whose
package needs a GPU or no longer exists. The test writes its keys and its arithmetic itself.
"""

KEYS = """
## Keys that are known of Adam

| keys of a group | what is done |
|---|---|
| `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize` | as in torch; numbers, tensors of one element, lists |
| `decoupled_weight_decay`, `adam_w_mode` | they choose AdamW's decay or Adam's; without them the decay is AdamW's |
| `bias_correction` | if it is off, t is infinite in the formulas of v and P |
| `correct_bias` | the same, and the form of AdamW in transformers 4, below |
| `step` | it is used if the states have none (apex, DeepSpeed) |
| `initial_lr` | it is the learning rate if `lr` is 0, and the summary then says so |
| `param_names` | they are the names of the parameters |
| `fused`, `foreach`, `capturable`, `differentiable` | nothing: they say how a step is computed |
| `name`, `lr_scale`, `max_lr`, `base_momentum` … | nothing: they are notes of schedulers and trainers |
| `alpha`, `caution`, `use_muon`, `moe` … | nothing if they are off; if one is on, the optimizer is not Adam |

GaLore and APOLLO share the form of transformers 4. There ε is added before the bias is corrected, and the decay acts on
the parameters after the step.

States hold `step`, `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`, or bitsandbytes' `state1` and `state2`. Moments in 8
bits are stored block by block as codes. The probe reads the numbers that the codes mean, and the optimizer makes its
own next step from the same numbers. If a second moment is rounded to 0, it is 0 for the optimizer too. P is 1/ε at such
values, and a warning counts them. `moments_match` leaves out what 8 bits do not tell precisely enough.

If you added a key of your own that changes nothing in the step, the optimizer counts as unknown too. Remove the key
from the param_groups in a copy of the file.

A file does not tell everything. On a GPU, bitsandbytes' kernels apply the decay after the step, which changes v by
lr·weight_decay of itself. apex and torchao do not write whether the decay is Adam's or AdamW's.
"""


def page() -> str:
    versions = [f"torch {torch.__version__.partition('+')[0]}"]
    versions += [f"{p} {importlib.metadata.version(p)}" for p in (DISTRIBUTIONS.get(p, p) for p in PACKAGES)]
    lines = [line(package, name, made) for package, name, made in all_found(rows())]
    table = ["| package | optimizer | what is done |", "|---|---|---|", *lines]
    return "\n".join([HEAD, f"With {', '.join(versions)}.", "", *table, KEYS])


def all_found(wanted: Iterable[tuple[str, str, Make]]) -> Iterator[tuple[str, str, Found]]:
    for package, name, make in wanted:
        with tempfile.TemporaryDirectory() as place, quiet():
            of = found(Path(place), make)
        print(f"{package} {name}: {of}", file=sys.stderr)
        yield package, name, of


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Packages print and warn as they are imported."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    print(page(), end="")
