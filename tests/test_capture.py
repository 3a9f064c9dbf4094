"""One forward and one backward give what `torch.autograd.grad` gives for one prompt and one weighting at a time.

Float64 throughout. The naive side differentiates Σ_{i in n} w_ki S_i for every weighting k and prompt n; both sides add
the same products in another order, so they agree to 1e-12 of the largest entry of all parameters' gradients.

Cases that are expected to fail name what is wrong with them; they are strict, so that a repair shows.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models
import reference as ref
from entropy_probe import ProbeConfig
from entropy_probe.model import capture as rules
from entropy_probe.model import forward
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.registry import checksum
from entropy_probe.stages.gradients.payloads import payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score

TOLERANCE = 1e-12
SHAPE_ALONE = "what has the batch's shape is taken for rows in order: here it is not"
OLD_VERSION = "a tensor made of weights that is changed in place after it was used is refused"
CHECKPOINTED = "what is computed again in the backward pass does not go through the rules"


def known(name: str, reason: str | None) -> Any:
    """A case, expected to fail for the given reason if there is one."""
    marks = () if reason is None else pytest.mark.xfail(strict=True, reason=reason)
    return pytest.param(name, marks=marks, id=name)


@dataclass(frozen=True)
class Case:
    """Rows of tokens, the positions whose next token is scored, and weights [K, R] of rows of `prompts` prompts."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    weights: Tensor
    prompts: int

    @classmethod
    def of(cls, rows: int = 4, length: int = 11, *, weightings: int = 2, prompts: int = 2) -> Case:
        """Responses that begin and, in longer rows, end at different positions; the padding token among the tokens."""
        generator = torch.Generator().manual_seed(1000 * rows + length)
        ids = torch.randint(0, models.VOCABULARY, (rows, length), generator=generator)
        ids[:, 0] = 0
        begin = [min(row % 2, length - 2) for row in range(rows)]
        end = [length - 1 - (row % 3 if length > 5 else 0) for row in range(rows)]
        scored = [(row, column) for row in range(rows) for column in range(begin[row], end[row])]
        of_row, columns = torch.tensor(scored).T.contiguous()
        weights = torch.randn(weightings, rows, generator=generator, dtype=torch.float64)
        return cls(ids, of_row, columns, weights, prompts)

    def seq_logp(self, bound: BoundModel, **options: Any) -> Tensor:
        tokens = self.ids[self.rows, self.columns + 1]

        def read(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
            return (logits.log_softmax(-1).gather(-1, tokens[part][:, None])[:, 0],)

        (logp,) = bound.read_logits(self.ids, self.rows, self.columns, read, **options)
        return logp.new_zeros(len(self.ids)).index_add(0, self.rows, logp)

    def naive(self, bound: BoundModel, **options: Any) -> dict[str, Tensor]:
        parameters = bound.registry.trainable
        seq_logp = self.seq_logp(bound, **options)
        sums = {n: p.new_zeros(len(self.weights), self.prompts, *p.shape) for n, p in parameters.items()}
        for k, weights in enumerate(self.weights):
            for n, part in enumerate((weights * seq_logp).reshape(self.prompts, -1).sum(1)):
                gradients = torch.autograd.grad(part, list(parameters.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[name][k, n] = gradient
        return sums

    def captured(self, bound: BoundModel, **options: Any) -> tuple[dict[str, Tensor], set[str]]:
        """The same by `Capture`, and the names of the parameters that it did not know in every use."""
        parameters = bound.registry.trainable
        capture = Capture(parameters, self.weights, self.prompts)
        sums = capture.sums(self.seq_logp(bound, capture=capture, **options))
        return {name: torch.stack([torch.stack(list(of_k)) for of_k in total]) for name, total in sums.items()}, (
            capture.fell_back
        )

    def error(self, bound: BoundModel, fallen: set[str] | None = None, **options: Any) -> float:
        """The largest difference, relative to the largest entry; names that fell back are put into `fallen`."""
        expected = self.naive(bound, **options)
        got, fell_back = self.captured(bound, **options)
        if fallen is not None:
            fallen.update(fell_back)
        assert got.keys() == expected.keys()
        assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in expected.items()}
        largest = max(float(v.abs().max()) for v in expected.values())
        assert largest > 1e-3
        return max(float((got[n] - v).abs().max()) for n, v in expected.items()) / largest


def assert_right(bound: BoundModel, case: Case | None = None, *, fell_back: set[str] | None = None, **o: Any) -> None:
    """`fell_back`: the ends of the names of the parameters that fall back, if that is to be looked at."""
    fallen: set[str] = set()
    assert (case or Case.of()).error(bound, fallen, **o) < TOLERANCE
    if fell_back is not None:
        assert {end for end in fell_back if any(name.endswith(end) for name in fallen)} == fell_back
        assert all(name.endswith(tuple(fell_back)) for name in fallen), fallen


# Models of transformers and adapters of peft


def adapted(architecture: str, **lora: Any) -> Any:
    return perturbed(models.add_adapter(models.tiny_model(architecture), architecture, **lora))


def perturbed(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_lora_on(architecture: str, *targets: str, **lora: Any) -> Any:
    config = peft.LoraConfig(r=3, target_modules=list(targets), task_type="CAUSAL_LM", **lora)
    return perturbed(peft.get_peft_model(models.tiny_model(architecture), config))  # pyright: ignore[reportArgumentType]


VARIANTS: dict[str, Callable[[str], Any]] = {
    "full": models.tiny_model,
    "lora": adapted,
    "dora": lambda a: adapted(a, use_dora=True),
    "head saved": lambda a: adapted(a, modules_to_save=["lm_head"]),
    "embeddings saved": lambda a: adapted(a, modules_to_save=["wte" if a == "gpt2" else "embed_tokens"]),
    "rslora, all biases": lambda a: adapted(a, use_rslora=True, bias="all"),
    "lora biases": lambda a: adapted(a, bias="lora_only"),
}


@pytest.mark.filterwarnings("ignore:Model with")
@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", models.CONFIGS)
def test_every_architecture(architecture: str, variant: str) -> None:
    """No parameter falls back: with one weighting and with two, for rows of one prompt, of two and of four."""
    bound = bind(VARIANTS[variant](architecture), torch.float64)
    assert bound._split is not None
    for weightings, prompts in ((2, 2), (1, 1)) if variant in ("full", "dora") else ((2, 4),):
        assert_right(bound, Case.of(weightings=weightings, prompts=prompts), fell_back=set())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_true_derivative_of_dora(architecture: str) -> None:
    """GPT-2's transposed layers fall back; a length at which the unit vectors look like tokens costs time alone."""
    bound = bind(adapted(architecture, use_dora=True), torch.float64)
    for rows, length in ((4, 6), (24, 24)):
        case = Case.of(rows, length, weightings=1)
        assert_right(bound, case, true_derivative=True)
        assert_right(bound, case)
    if architecture != "gpt2":
        assert_right(bound, fell_back=set(), true_derivative=True)


def test_a_parameter_that_is_frozen_on_the_way() -> None:
    """Every second parameter frozen; the embeddings, so that the first activations ask for no gradient."""
    for keep in (0, 1):
        model: Any = models.tiny_model("gpt2")
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 2 == keep)
        assert_right(bind(model, torch.float64), fell_back=set())


LORA_ELSEWHERE = [
    (("embed_tokens",), {}, {"lora_embedding_B.default"}),
    (("embed_tokens",), {"use_dora": True}, {"lora_embedding_B.default"}),
    (("lm_head", "q_proj"), {}, set()),
    (("lm_head", "q_proj"), {"use_dora": True}, set()),
    (("q_proj", "down_proj"), {"lora_bias": True, "init_lora_weights": False}, set()),
]


@pytest.mark.parametrize(
    ("targets", "lora", "fell_back"),
    [
        pytest.param(
            targets,
            lora,
            fell_back,
            id=f"{','.join(targets)} {' '.join(lora)}",
        )
        for targets, lora, fell_back in LORA_ELSEWHERE
    ],
)
def test_lora_on_embeddings_and_head(targets: tuple[str, ...], lora: dict[str, Any], fell_back: set[str]) -> None:
    bound = bind(with_lora_on("llama", *targets, **lora), torch.float64)
    assert_right(bound, fell_back=fell_back)
    if "use_dora" in lora:
        assert_right(bound, true_derivative=True)


_TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **_TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **_TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **_TARGETS),
    "hra": lambda: peft.HRAConfig(r=2, **_TARGETS),
    "loha": lambda: peft.LoHaConfig(**_TARGETS),
    "lokr": lambda: peft.LoKrConfig(**_TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, **_TARGETS),
    "vera": lambda: peft.VeraConfig(**_TARGETS),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "some tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[3, 4, 5], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_other_adapters(kind: str) -> None:
    model = perturbed(peft.get_peft_model(models.tiny_model("llama"), ADAPTERS[kind]()))  # pyright: ignore[reportArgumentType]
    assert_right(bind(model, torch.float64))


_SIZES = {
    "vocab_size": models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_LATENT = {
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
_EXPERT_NAMES = {"experts.gate_up_proj", "experts.down_proj"}
# kind: configuration, ends of the names that fall back
OTHERS: dict[str, tuple[dict[str, Any], set[str] | None]] = {
    "gpt_neox": ({}, set()),
    "bloom": ({"n_layer": 2, "n_head": 4}, set()),
    "falcon": ({}, {"query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight"}),
    "gptj": (_GPT, set()),
    "codegen": (_GPT, set()),
    "phi": ({}, set()),
    "phi3": ({}, set()),
    "cohere": ({}, set()),
    "granite": ({"logits_scaling": 4.0}, set()),
    "gemma3_text": ({"head_dim": 8}, {"q_norm.weight", "k_norm.weight"}),
    "stablelm": ({}, set()),
    "olmo2": ({}, set()),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, set()),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, set()),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 16}, None),
    "mamba": ({}, None),
    "rwkv": ({"attention_hidden_size": 32}, {"time_decay", "time_first"}),
    "mixtral": (_EXPERTS, {"gate.weight", *_EXPERT_NAMES}),
    "gpt_oss": ({**_EXPERTS, "head_dim": 8}, None),
    "qwen2_moe": (_EXPERTS, None),
    "qwen3_moe": ({**_EXPERTS, "head_dim": 8}, {"gate.weight", *_EXPERT_NAMES}),
    "deepseek_v3": ({**_EXPERTS, **_LATENT}, {"kv_b_proj.weight", "gate.weight", *_EXPERT_NAMES}),
    "llama4_text": ({**_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}, None),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "attn_type": "uni"}, None),
}


def other(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **OTHERS[kind][0]})
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    return perturbed(model)


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_architectures(kind: str) -> None:
    bound = bind(other(kind), torch.float64)
    assert_right(bound, fell_back=OTHERS[kind][1])
    assert_right(bound, Case.of(prompts=1))


@pytest.mark.parametrize("kind", ["gptj", "phi"])
def test_other_architectures_apart_from_the_bias_of_the_head(kind: str) -> None:
    model = other(kind)
    model.lm_head.bias.requires_grad_(False)
    assert_right(bind(model, torch.float64), fell_back=set())


# Sizes of the batch that are also sizes of the model: 24 or 32 wide, 4 heads, 4 experts, 8 per head

SHAPES = [(4, 4), (8, 8), (4, 32), (24, 24), (1, 2)]


@pytest.mark.parametrize("kind", ["llama lora", "gpt2 dora", "qwen2 full", "gemma3_text", "mixtral", "bloom", "mamba",
                                  "gpt_oss", "xlnet"])  # fmt: skip
def test_sizes_that_coincide(kind: str) -> None:
    """XLNet's layers work on [L, R, d]; an expert of gpt-oss may get R tokens, of L features."""
    architecture, _, variant = kind.partition(" ")
    model = VARIANTS[variant](architecture) if variant else other(kind)
    if kind == "xlnet":
        model.lm_loss.bias.requires_grad_(False)
    bound = bind(model, torch.float64)
    for rows, length in SHAPES:
        assert_right(bound, Case.of(rows, length, weightings=1, prompts=min(rows, 2)))


def test_top_one_routing_with_every_token_in_one_expert() -> None:
    model = other("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    bound = bind(model, torch.float64)
    for rows, length in ((4, 11), (4, 4), (4, 8)):
        assert_right(bound, Case.of(rows, length))


# Models of other makes: whole logits, parameters in every use that torch allows


WIDTH = 6
Body = Callable[[Any, Tensor], Tensor]
BODIES: dict[str, tuple[Body, dict[str, Any]]] = {}


class Custom(nn.Module):
    """x ← x + tanh(body(mean of x so far)) between an embedding and a head with a bias."""

    def __init__(self, body: Body, parts: dict[str, Any], train_embedding: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.embed, self.head = body, nn.Embedding(models.VOCABULARY, WIDTH), nn.Linear(
            WIDTH, models.VOCABULARY
        )  # fmt: skip
        for name, part in parts.items():
            made = nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part()
            setattr(self, name, made)
        for parameter in self.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        self.embed.weight.requires_grad_(train_embedding)

    def forward(self, ids: Tensor, **options: Any) -> Any:
        x = self.embed(ids)
        so_far = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return types.SimpleNamespace(logits=self.head(x + self.body(self, so_far).tanh()))


def body(**parts: Any) -> Callable[[Body], Body]:
    """Adds a body that uses some modules or parameters, given by their shapes."""

    def add(function: Body) -> Body:
        BODIES[function.__name__.replace("_", " ")] = function, parts
        return function

    return add


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def distances(x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    return (steps[:, None] - steps).to(x.dtype)


def attended(bias: Tensor, x: Tensor) -> Tensor:
    return bias.masked_fill(distances(x) < 0, -1e9).softmax(-1) @ x


def mixing(x: Tensor) -> Tensor:
    return torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1))


@body(f=linear)
def sequence_first(self: Any, x: Tensor) -> Tensor:
    return self.f(x.transpose(0, 1)).transpose(0, 1)


@body(w=(WIDTH,))
def sequence_first_scale(self: Any, x: Tensor) -> Tensor:
    return (x.transpose(0, 1) * self.w).transpose(0, 1)


@body(f=lambda: nn.LayerNorm(WIDTH))
def sequence_first_norm(self: Any, x: Tensor) -> Tensor:
    return self.f(x.transpose(0, 1)).transpose(0, 1)


@body(f=linear)
def sequence_first_addmm(self: Any, x: Tensor) -> Tensor:
    flat = x.transpose(0, 1).reshape(-1, WIDTH)
    return torch.addmm(self.f.bias, flat, self.f.weight).reshape(x.shape[1], x.shape[0], -1).transpose(0, 1)


@body(f=linear)
def sorted_tokens_addmm(self: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    order = mixing(flat)
    return torch.addmm(self.f.bias, flat[order], self.f.weight)[order.argsort()].reshape(x.shape)


@body(f=linear)
def sorted_rows(self: Any, x: Tensor) -> Tensor:
    return self.f(x.flip(0)).flip(0)


@body(f=linear)
def sorted_positions(self: Any, x: Tensor) -> Tensor:
    order = mixing(x[0])
    return self.f(x[:, order])[:, order.argsort()]


@body(f=linear)
def flat_linear(self: Any, x: Tensor) -> Tensor:
    return self.f(x.reshape(-1, WIDTH)).reshape(x.shape)


@body(f=linear)
def flat_addmm(self: Any, x: Tensor) -> Tensor:
    return torch.addmm(self.f.bias, x.reshape(-1, WIDTH), self.f.weight).reshape(x.shape)


@body(w=(WIDTH,), b=(WIDTH,))
def flat_norm(self: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    return (self.w * flat / flat.norm(dim=-1, keepdim=True) + self.b).reshape(x.shape)


@body(w=(WIDTH, 1))
def channels_first(self: Any, x: Tensor) -> Tensor:
    return (x.transpose(1, 2) * self.w + self.w).transpose(1, 2)


@body(w=(WIDTH,))
def rows_in_features(self: Any, x: Tensor) -> Tensor:
    rows, length, width = x.shape
    beside = x.permute(1, 0, 2).reshape(1, length, rows * width) * self.w.repeat(rows)
    return beside.reshape(length, rows, width).transpose(0, 1)


@body(w=(1,))
def slope_of_distances(self: Any, x: Tensor) -> Tensor:
    return attended(-distances(x) * self.w.abs(), x)


@body(w=(1,))
def slope_of_distances_per_head(self: Any, x: Tensor) -> Tensor:
    bias = self.w * (-distances(x) * torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None])
    return torch.stack([attended(of_head, x) for of_head in bias]).sum(0)


@body(w=(12, 1))
def embedded_distances(self: Any, x: Tensor) -> Tensor:
    return attended(F.embedding(distances(x).long().clamp(0, 11), self.w)[..., 0], x)


@body(w=(2, 3))
def features_of_distances(self: Any, x: Tensor) -> Tensor:
    table = torch.stack([distances(x), distances(x).cos(), distances(x).sin()], -1)
    return attended(F.linear(table, self.w).prod(-1), x)


@body(w=(WIDTH,))
def scaled_columns(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.arange(36.0).sin().reshape(WIDTH, WIDTH).to(x.dtype) * self.w)


@body(w=(WIDTH,))
def diagonal(self: Any, x: Tensor) -> Tensor:
    return x @ (torch.eye(WIDTH, dtype=x.dtype) * self.w)


@body(w=(WIDTH, WIDTH))
def frozen_experts(self: Any, x: Tensor) -> Tensor:
    experts = torch.arange(4.0 * WIDTH * WIDTH).sin().reshape(4, WIDTH, WIDTH).to(x.dtype)
    return torch.einsum("rld,edf->rlf", x, F.linear(experts, self.w))


@body(w=(4, WIDTH, WIDTH))
def experts(self: Any, x: Tensor) -> Tensor:
    """Every token goes to the first expert."""
    flat = x.reshape(-1, WIDTH)
    return F.linear(flat, self.w[0]).reshape(x.shape) + 0 * self.w[1:].sum()


@body(w=(4, WIDTH, WIDTH), b=(4, WIDTH))
def routed_tokens(self: Any, x: Tensor) -> Tensor:
    """The first four tokens of all go to the first expert."""
    flat = x.reshape(-1, WIDTH)
    return torch.cat([flat[:4] @ self.w[0] + self.b[0], flat[4:] @ self.w[1] + self.b[1]]).reshape(x.shape)


@body(w=(WIDTH,))
def product_and_sum(self: Any, x: Tensor) -> Tensor:
    return x * self.w + self.w


@body(w=(WIDTH,))
def functions_of_a_weight(self: Any, x: Tensor) -> Tensor:
    return self.w**2 * x + F.softplus(self.w) * x + 2 * self.w * x * 3 + self.w / 2 * x + self.w.sum() * x


@body(w=(2 * WIDTH, WIDTH), u=(WIDTH, WIDTH))
def parts_of_weights(self: Any, x: Tensor) -> Tensor:
    both = torch.cat([self.w[:3], self.u[3:]])
    return F.linear(x, self.w[:WIDTH]) + F.linear(x, self.w[WIDTH:].t()) + x @ self.u.T + F.linear(x, both)


@body(w=(WIDTH, WIDTH))
def used_twice(self: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, self.w).tanh(), self.w) + x @ self.w


@body(w=(WIDTH, WIDTH))
def sum_over_indices(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("rld,df->rlf", x, self.w)


@body(f=lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2))
def convolution(self: Any, x: Tensor) -> Tensor:
    return self.f(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


@body(f=lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.0))
def attention_sequence_first(self: Any, x: Tensor) -> Tensor:
    first = x.transpose(0, 1)
    return self.f(first, first, first, attn_mask=distances(x) < 0, need_weights=False)[0].transpose(0, 1)


@body(f=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True))
def encoder_layer(self: Any, x: Tensor) -> Tensor:
    return self.f(x, src_mask=distances(x) < 0)


@body(f=lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True))
def lstm(self: Any, x: Tensor) -> Tensor:
    return self.f(x)[0]


@body(f=lambda: nn.LSTM(WIDTH, WIDTH))
def lstm_sequence_first(self: Any, x: Tensor) -> Tensor:
    return self.f(x.transpose(0, 1))[0].transpose(0, 1)


@body(f=lambda: nn.GRUCell(WIDTH, WIDTH))
def recurrence(self: Any, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        state = self.f(x[:, step], state)
        states.append(state)
    return torch.stack(states, 1)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum((0, 1))


@body(w=(WIDTH,))
def own_function(self: Any, x: Tensor) -> Tensor:
    return Scaled.apply(x, self.w)  # pyright: ignore[reportReturnType]


@body(w=(WIDTH,))
def constant_copy(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        doubled = self.w * 2
    return x * doubled + x * self.w + x * self.w.detach() + x * self.w.data


@body(f=linear)
def in_place_on_outputs(self: Any, x: Tensor) -> Tensor:
    out = self.f(x) + F.relu(self.f(x), inplace=True)
    out += x
    out[:, 0] = 0
    return out


@body(w=(WIDTH,))
def in_place_by_weights(self: Any, x: Tensor) -> Tensor:
    out = x.clone()
    out *= self.w
    out += self.w
    return out


@body(w=(WIDTH, WIDTH))
def copied_weight(self: Any, x: Tensor) -> Tensor:
    copied = torch.zeros(WIDTH, WIDTH, dtype=x.dtype)
    copied[:] = self.w
    return F.linear(x, copied)


@body(w=(1, WIDTH), b=(WIDTH,))
def begun_from_a_weight(self: Any, x: Tensor) -> Tensor:
    state = self.w.expand(x.shape).clone()
    state += x
    return F.layer_norm(state, (WIDTH,), None, self.b)


@body(w=(WIDTH,))
def made_then_changed(self: Any, x: Tensor) -> Tensor:
    made = self.w * 1.0
    out = x + made
    made.mul_(2)
    return out + made


@body(w=(64, WIDTH))
def positions(self: Any, x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    return x + self.w[: x.shape[1]] + F.embedding(steps.expand(x.shape[0], -1), self.w) + F.embedding(steps, self.w)


@body(w=(WIDTH,), b=(WIDTH,))
def other_operations(self: Any, x: Tensor) -> Tensor:
    bent = F.prelu(x.transpose(1, 2), self.w).transpose(1, 2)
    return bent + torch.where(x > 0, x, self.b) - self.b + torch.lerp(x, self.w.expand_as(x), 0.3) / (2 + self.b**2)


@body(f=lambda: torch.nn.utils.parametrizations.weight_norm(linear()))
def normed_weight(self: Any, x: Tensor) -> Tensor:
    return self.f(x)


@body(w=(WIDTH,), b=(WIDTH,))
def layer_norm_by_keyword(self: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, normalized_shape=(WIDTH,), weight=self.w, bias=self.b, eps=1e-6)


@body(f=linear)
def linear_by_keyword(self: Any, x: Tensor) -> Tensor:
    return F.linear(input=x, weight=self.f.weight, bias=self.f.bias)


@body(w=(WIDTH,))
def product_by_keyword(self: Any, x: Tensor) -> Tensor:
    return torch.mul(input=x, other=self.w)


@body(w=(WIDTH,))
def multiple_added(self: Any, x: Tensor) -> Tensor:
    return torch.add(x, self.w, alpha=2)


@body(f=linear)
def addmm_by_keyword(self: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    return torch.addmm(input=self.f.bias, mat1=flat, mat2=self.f.weight).reshape(x.shape)


@body(f=linear)
def computed_again(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: self.f(self.f(x).tanh()), x, use_reentrant=False)  # pyright: ignore[reportReturnType]


WRONG: dict[str, str] = {
    **dict.fromkeys(("sequence first addmm", "sorted tokens addmm", "sorted rows"), SHAPE_ALONE),
    "made then changed": OLD_VERSION,
    "computed again": CHECKPOINTED,
}


def custom(name: str, train_embedding: bool) -> BoundModel:
    return bind(Custom(*BODIES[name], train_embedding), torch.float64)


@pytest.mark.parametrize("name", [known(name, WRONG.get(name)) for name in BODIES])
def test_every_use_of_a_parameter(name: str) -> None:
    """Rows and lengths that are no size of the model, one row, and one scored token."""
    for train_embedding, sizes in ((True, ((4, 11, 2), (1, 3, 1), (3, 2, 3))), (False, ((4, 11, 2), (1, 3, 1)))):
        bound = custom(name, train_embedding)
        assert bound._split is None
        for rows, length, prompts in sizes:
            assert_right(bound, Case.of(rows, length, weightings=1, prompts=prompts))


@pytest.mark.parametrize("name", [known(name, WRONG.get(name)) for name in BODIES])
def test_every_use_with_as_many_rows_as_positions(name: str) -> None:
    """And as the model is wide."""
    assert_right(custom(name, True), Case.of(WIDTH, WIDTH))
    assert_right(custom(name, False), Case.of(WIDTH, WIDTH, weightings=1, prompts=1))


@pytest.mark.parametrize(
    "name",
    [known(name, WRONG.get(name)) for name in BODIES],
)
def test_every_use_with_as_many_rows_as_experts(name: str) -> None:
    assert_right(custom(name, True), Case.of(4, WIDTH))


# The output layer in pieces


@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize(
    "kind", ["llama full", "qwen2 full", "gpt2 full", "gemma2 full", "llama head saved", "llama lora on the head"]
)
def test_output_layer_in_pieces(kind: str, prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied heads, a soft-capped one, a copy of the head, LoRA on it; pieces that hold a part of a row, and several."""
    architecture, _, variant = kind.partition(" ")
    on_head = variant == "lora on the head"
    model = with_lora_on(architecture, "lm_head", "q_proj") if on_head else VARIANTS[variant](architecture)
    bound = bind(model, torch.float64)
    case = Case.of(prompts=prompts)
    whole = case.naive(bound)
    monkeypatch.setattr(forward, "_ROWS", 1)
    for positions in (1, 16):
        monkeypatch.setattr(forward, "_CHUNK", positions * models.VOCABULARY)
        assert_right(bound, case, fell_back=set())
    for name, value in case.captured(bound)[0].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows_at_once", [1, 8, 100])
def test_bias_of_a_head_in_pieces(rows_at_once: int) -> None:
    bound = bind(other("phi"), torch.float64)
    for prompts in (1, 2):
        assert_right(bound, Case.of(prompts=prompts), rows_at_once=rows_at_once)


# `unit_gradients`


def rollouts_of(folder: Path, bound: BoundModel, prompts: int, responses: int) -> tuple[Path, Rollouts]:
    path = models.random_rollouts(folder / "rollouts.jsonl", prompts=prompts, responses=responses, seed=3)
    return path, read_rollouts(path, bound, None)


class Naive:
    """A model, rollouts whose order is not that of their lengths, X and Y of every prompt by plain loops."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.model = VARIANTS[variant]("qwen2").double()
        self.bound = bind(self.model, torch.float64)
        path, self.rollouts = rollouts_of(folder, self.bound, 5, 3)
        lengths = self.rollouts.per_prompt(self.rollouts.prompt_lens + self.rollouts.gen_lens).amax(1)
        assert lengths.argsort(stable=True).tolist() != list(range(5))
        loops = ref.Reference(self.model, path)
        self.x, self.y = ([of_prompt(n) for n in range(5)] for of_prompt in (loops.x, loops.y))


@pytest.fixture(scope="module", params=["full", "dora"])
def naive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Naive:
    return Naive(tmp_path_factory.mktemp("naive"), request.param)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("mode", ["exact", "block"])
def test_unit_gradients(naive: Naive, mode: str, size: int) -> None:
    """Microbatches of some rows of a prompt, of several prompts in the order of their lengths, of all."""
    model, bound, rollouts = naive.model, naive.bound, naive.rollouts
    config = ProbeConfig.from_mapping(
        {
            "precision": {"dtype": "float64"},
            "generation": {"tf_batch_size": size},
            "first_order": {"mode": mode, "num_blocks": 2},
        }
    )
    before, hooks = checksum(model), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    alone = models.alone(bound, rollouts, config)
    units = unit_gradients(bound, alone, config, *payloads(rollouts, score(bound, rollouts, config), config))
    assert checksum(model) == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    blocks = [[n] for n in range(5)] if mode == "exact" else [[0, 1, 2], [3, 4]]
    assert units.sizes.tolist() == [len(block) for block in blocks]
    for got, each in ((units.x, naive.x), (units.y, naive.y)):
        largest = max(float(g.abs().max()) for of_prompt in each for g in of_prompt.values())
        for name, values in got.items():
            means = [torch.stack([each[n][name] for n in block]).mean(0) for block in blocks]
            assert float((values - torch.stack(means).flatten(1)).abs().max()) < TOLERANCE * largest, name


def test_without_y(tmp_path: Path) -> None:
    bound = bind(models.tiny_model("gpt2").double(), torch.float64)
    _, rollouts = rollouts_of(tmp_path, bound, 3, 2)
    config = ProbeConfig.from_mapping({"generation": {"tf_batch_size": 4}})
    of_x, of_y = payloads(rollouts, score(bound, rollouts, config), config)
    share = models.alone(bound, rollouts, config)
    both, alone = (unit_gradients(bound, share, config, of_x, y) for y in (of_y, None))
    assert alone.y == {}
    for name, value in both.x.items():
        torch.testing.assert_close(alone.x[name], value, rtol=1e-13, atol=1e-13)


def test_a_frozen_model_is_not_touched_by_a_second_capture() -> None:
    """What one capture gave does not change with the next; without gradients nothing is captured at all."""
    bound, case = bind(models.tiny_model("gpt2"), torch.float64), Case.of()
    first, _ = case.captured(bound)
    copies = {name: value.clone() for name, value in first.items()}
    again, _ = case.captured(bound)
    for name, value in copies.items():
        assert torch.equal(value, first[name])
        assert torch.equal(value, again[name])
        assert again[name].data_ptr() != first[name].data_ptr()
    capture = Capture(bound.registry.trainable, case.weights, case.prompts)
    with torch.no_grad():
        case.seq_logp(bound, capture=capture)
    assert all(weight.is_parameter and weight.total is None for weight in capture._known.values())


def test_bookkeeping_does_not_outlive_the_sums() -> None:
    """`sums` may be asked for once the positions' context is over, and S may be weighted by the caller afterwards."""
    bound, case = bind(models.tiny_model("llama"), torch.float64), Case.of()
    capture = Capture(bound.registry.trainable, case.weights, case.prompts)
    seq_logp = case.seq_logp(bound, capture=capture)
    assert capture.rows_of is None
    ones = Case(case.ids, case.rows, case.columns, torch.ones(1, 4, dtype=torch.float64), 1)
    expected = torch.autograd.grad(case.seq_logp(bound).sum(), list(bound.registry.trainable.values()))
    for (name, value), gradient in zip(ones.captured(bound)[0].items(), expected, strict=True):
        torch.testing.assert_close(value[0, 0], gradient, rtol=1e-11, atol=1e-11, msg=name)
    capture.sums(seq_logp)


# Faults


Fault = Callable[[pytest.MonkeyPatch], None]


def wrong_rule(operation: Any, rule: Callable[..., Tensor | None]) -> Fault:
    return lambda patch: patch.setitem(rules._RULES, operation, rule)


def wrong_method(name: str, method: Callable[..., Any]) -> Fault:
    return lambda patch: patch.setattr(Capture, name, method)


def bias_forgotten(capture: Capture, x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    out = rules._linear(capture, x, weight, None)
    return out if out is None or bias is None else out + bias.detach()


def addmm_bias_forgotten(capture: Capture, bias: Any, x: Any, weight: Any) -> Tensor | None:
    return rules._addmm(capture, bias.detach(), x, weight)


def padding_forgotten(capture: Capture, ids: Any, weight: Any, padding_idx: Any = None, **rest: Any) -> Tensor | None:
    return rules._embedding(capture, ids, weight, None, **rest)


def not_normalised(capture: Capture, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor | None:
    own, kept = capture.weight(weight), x.detach()
    assert own is not None
    out = F.layer_norm(x, shape, weight.detach(), bias.detach(), eps)
    return capture.tapped(out, None, lambda gradient, _: capture.add_broadcast(own, gradient * kept, None))


def rows_moved_on(capture: Capture) -> Tensor:
    if capture.rows_of is not None:
        return capture.rows_of
    assert capture.shape is not None
    return torch.arange(capture.shape[0] * capture.shape[1]) // (capture.shape[1] + 1)


_add_broadcast, _add_outer, _add_at, _total = (
    getattr(Capture, name) for name in ("add_broadcast", "add_outer", "add_at", "_total")
)
FAULTS: dict[str, tuple[str, Fault]] = {
    "linear: bias": ("qwen2", wrong_rule(F.linear, bias_forgotten)),
    "addmm: bias": ("gpt2", wrong_rule(torch.addmm, addmm_bias_forgotten)),
    "embedding: padding": ("llama", wrong_rule(F.embedding, padding_forgotten)),
    "embedding: prompts": (
        "llama",
        wrong_method("add_at", lambda self, w, ids, values, rows: _add_at(self, w, ids, values, rows * 0)),
    ),
    "norm: input": ("gpt2", wrong_rule(F.layer_norm, not_normalised)),
    "product: other factor": (
        "qwen3",
        wrong_rule(Tensor.mul, rules._add),
    ),
    "sum and product: rows": (
        "llama",
        wrong_method("add_broadcast", lambda self, w, values, rows: _add_broadcast(self, w, values.flip(0), rows)),
    ),
    "product of sizes: rows": (
        "llama",
        wrong_method("rows", rows_moved_on),
    ),
    "outer product: sides": (
        "llama",
        wrong_method("add_outer", lambda self, w, left, right, rows: _add_outer(self, w, left, right * 1.001, rows)),
    ),
    "made weights: not pulled back": ("gemma2", wrong_method("_pull_back", lambda self, kept, last=True: None)),
    "twice the same": ("qwen2", wrong_method("_total", lambda self, w: _total(self, w).zero_())),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_rule_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, plant = FAULTS[fault]
    bound, case = bind(models.tiny_model(architecture), torch.float64), Case.of()
    assert case.error(bound) < TOLERANCE
    plant(monkeypatch)
    assert case.error(bound) > 1e-5
