"""torchtitan's `step-N/` loads as the same function of the tokens, and its moments as the same direction.

The model here is a plain one, by torchtitan's names, with torchtitan's rotation of neighbouring rows; it is saved with
the keys that torchtitan has, older (`attention.wq`, `output`), newer (`attention.qkv_linear.wq`, `lm_head`), and with
q, k and v in one matrix. Where torchtitan is installed, its own adapter says which row is which.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import models
from entropy_probe import load_checkpoint
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint

HIDDEN, HEADS, KEYS, SIZE = 24, 4, 2, 6


class Attention(nn.Module):
    def __init__(self, qwen: bool) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, HEADS * SIZE, bias=False)
        self.wk, self.wv = (nn.Linear(HIDDEN, KEYS * SIZE, bias=False) for _ in range(2))
        self.wo = nn.Linear(HEADS * SIZE, HIDDEN, bias=False)
        if qwen:
            self.q_norm, self.k_norm = nn.RMSNorm(SIZE, 1e-6), nn.RMSNorm(SIZE, 1e-6)
        self.qwen = qwen

    def rotated(self, rows: Tensor) -> Tensor:
        """[.., T, d]: Llama turns the rows 2i and 2i + 1 as a complex number, Qwen3 the rows i and i + d/2."""
        angles = torch.arange(rows.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
        turn = torch.polar(torch.ones_like(angles), angles)
        if not self.qwen:
            return torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(
                -2
            )
        turned = torch.complex(*rows.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, SIZE)) for w in (self.wq, self.wk, self.wv))
        if self.qwen:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
        k, v = (rows.repeat_interleave(HEADS // KEYS, dim=1) for rows in (self.rotated(k), v))
        scores = self.rotated(q) @ k.transpose(-1, -2) / SIZE**0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        return self.wo(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, 40, bias=False) for _ in range(2))
        self.w2 = nn.Linear(40, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, qwen: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(qwen), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(HIDDEN, 1e-6), nn.RMSNorm(HIDDEN, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    def __init__(self, qwen: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tok_embeddings = nn.Embedding(models.VOCABULARY, HIDDEN)
        self.layers = nn.ModuleDict({str(n): Layer(qwen) for n in range(2)})
        self.norm = nn.RMSNorm(HIDDEN, 1e-6)
        self.output = nn.Linear(HIDDEN, models.VOCABULARY, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


def stepped(qwen: bool) -> tuple[Titan, torch.optim.Optimizer]:
    model = Titan(qwen)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=2e-3, betas=(0.8, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(3, models.VOCABULARY, (4, 9), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model, optimizer


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For each head of keys the rows of its queries, its own, and those of its values, one after the other."""
    rows, each = [], HEADS // KEYS * SIZE
    for n in range(KEYS):
        rows += [*q[n * each : (n + 1) * each], *k[n * SIZE : (n + 1) * SIZE], *v[n * SIZE : (n + 1) * SIZE]]
    return torch.stack(rows)


def newer(name: str) -> str:
    name = re.sub(r"attention\.(w[qkv])\.", r"attention.qkv_linear.\1.", name)
    return re.sub(r"^((?:state\.|param_groups\.)?)output\.", r"\1lm_head.", name)


def save(folder: Path, model: Titan, optimizer: torch.optim.Optimizer, form: str) -> Path:
    of_model = dict(model.state_dict())
    of_optimizer = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    if form != "older":
        of_model = {newer(name): tensor for name, tensor in of_model.items()}
        of_optimizer = {newer(name): value for name, value in of_optimizer.items()}
    if form == "fused":
        for name in [name for name in of_optimizer if ".wq." in name]:
            parts = [of_optimizer.pop(name.replace(".wq.", f".{w}.")) for w in ("wq", "wk", "wv")]
            moment = name.endswith(("exp_avg", "exp_avg_sq"))
            of_optimizer[name.replace(".wq.", ".wqkv.")] = fused(*parts) if moment else parts[0]
    state = {
        **of_model,
        "optimizer": of_optimizer,
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": b"pickled by torchtitan"},
        "train_state": {"step": 3 if form != "older" else torch.tensor(3, dtype=torch.int32), "ntokens_seen": 108},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def trained(request: pytest.FixtureRequest) -> tuple[str, Titan, torch.optim.Optimizer]:
    return request.param, *stepped(request.param == "qwen3")


@pytest.fixture
def base(trained: tuple[str, Titan, Any], tmp_path: Path) -> Path:
    models.tiny_model(trained[0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_same_function(ours: Any, theirs: Titan) -> None:
    ids = torch.randint(3, models.VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected, got = theirs(ids), ours(ids).logits
    # float32 in another order of operations; rows in a wrong order change the logits by about 1
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["older", "newer", "fused"])
def test_the_same_function_and_direction(
    trained: tuple[str, Titan, torch.optim.Optimizer], base: Path, tmp_path: Path, form: str
) -> None:
    _, model, optimizer = trained
    save(tmp_path / "checkpoint" / "step-3", model, optimizer, form)
    loaded = load_checkpoint(tmp_path, base)
    assert loaded.info.path == tmp_path / "checkpoint" / "step-3"
    assert loaded.info.global_step == 3
    assert_same_function(loaded.model, model)
    assert set(loaded.adam) == {name for name, _ in loaded.model.named_parameters()}
    assert {(s.step, s.lr, s.betas, s.weight_decay) for s in loaded.adam.values()} == {(3, 2e-3, (0.8, 0.95), 0.1)}
    for moment in ("exp_avg", "exp_avg_sq"):  # each added to the weights makes the same change of the function
        moved = Titan(trained[0] == "qwen3")
        moved.load_state_dict(model.state_dict())
        again = load_checkpoint(tmp_path, base).model
        with torch.no_grad():
            for parameter, held in zip(moved.parameters(), model.parameters(), strict=True):
                parameter += scaled(optimizer.state[held][moment])
            for name, parameter in again.named_parameters():
                parameter += scaled(getattr(loaded.adam[name], moment))
        assert_same_function(again, moved)
        values = torch.cat([getattr(state, moment).flatten() for state in loaded.adam.values()])
        held = torch.cat([optimizer.state[parameter][moment].flatten() for parameter in model.parameters()])
        assert torch.equal(values.sort().values, held.sort().values)


def scaled(moment: Tensor) -> Tensor:
    return 0.3 * moment / moment.abs().max()


@pytest.mark.parametrize("form", ["older", "fused"])
def test_inspect_says_the_same(trained: tuple[str, Titan, Any], base: Path, tmp_path: Path, form: str) -> None:
    name, model, optimizer = trained
    folder = save(tmp_path / "step-3", model, optimizer, form)
    found = inspect_checkpoint(folder, base)
    assert (found.format, found.problems, found.global_step) == ("torchtitan", [], 3)
    assert found.weights is not None
    assert found.optimizer is not None
    assert (found.weights.model_type, found.weights.dtype) == (name, "float32")
    assert found.weights.num_parameters == found.optimizer.num_trainable == sum(p.numel() for p in model.parameters())
    assert (found.optimizer.type, found.optimizer.step, found.optimizer.lr) == ("AdamW", [3], [2e-3])
    assert (found.optimizer.groups, found.optimizer.covered) == (1, len(load_checkpoint(folder, base).adam))


def test_a_last_step_with_the_model_alone_is_passed_over(
    trained: tuple[str, Titan, Any], base: Path, tmp_path: Path
) -> None:
    _, model, optimizer = trained
    save(tmp_path / "step-3", model, optimizer, "newer")
    dcp.save({newer(n): t for n, t in model.state_dict().items()}, checkpoint_id=tmp_path / "step-4", no_dist=True)
    assert load_checkpoint(tmp_path, base).info.path.name == "step-3"
    assert inspect_checkpoint(tmp_path, base).note.endswith("1 newer without optimizer state")
    with pytest.raises(CheckpointError, match="step-4: holds only the model, and no optimizer; take an earlier step"):
        load_checkpoint(tmp_path / "step-4", base)


def test_a_tied_head(tmp_path: Path) -> None:
    model = Titan(qwen=False)
    model.output.weight = model.tok_embeddings.weight
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=2e-3)
    model(torch.arange(3, 9)[None]).square().mean().backward()
    optimizer.step()
    config = models.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "step-1")
    loaded = load_checkpoint(save(tmp_path / "step-1", model, optimizer, "newer"))
    assert_same_function(loaded.model, model)
    held = optimizer.state[model.tok_embeddings.weight]["exp_avg"]
    assert torch.equal(loaded.adam["model.embed_tokens.weight"].exp_avg, held)
    assert "lm_head.weight" not in loaded.adam
    found = inspect_checkpoint(tmp_path / "step-1")
    assert found.problems == []
    assert any("tied head" in warning for warning in found.warnings)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    model, optimizer = stepped(False)
    folder = save(tmp_path / "step-3", model, optimizer, "older")
    with pytest.raises(CheckpointError, match=r"step-3: has no config\.json; name the base model's folder"):
        load_checkpoint(folder)
    models.tiny_model("gemma2").save_pretrained(tmp_path / "gemma2")
    with pytest.raises(CheckpointError, match="model_type is gemma2, torchtitan's names are known of llama and qwen3"):
        load_checkpoint(folder, tmp_path / "gemma2")
    config = models.CONFIGS["llama"]()
    config.num_attention_heads, config.num_key_value_heads = 8, 8
    config.save_pretrained(tmp_path / "heads")
    with pytest.raises(CheckpointError, match=r"wq.weight of shape \(24, 24\) has no rows for 8 heads"):
        load_checkpoint(folder, tmp_path / "heads")
    model.layers["0"].moe = nn.Linear(2, 2)
    models.CONFIGS["llama"]().save_pretrained(folder)
    save(folder, model, optimizer, "older")
    with pytest.raises(CheckpointError, match=r"layers\.0\.moe\.\w+ has no known place in the model"):
        load_checkpoint(folder)
    assert len(inspect_checkpoint(folder).problems) == 1


def test_torchtitans_own_adapter_puts_each_value_there(base: Path, tmp_path: Path, trained: Any) -> None:
    """Bit for bit, for the weights and, as if they were weights, the moments."""
    adapters = pytest.importorskip(f"torchtitan.models.{'llama3' if trained[0] == 'llama' else 'qwen3'}")
    family = "Llama3" if trained[0] == "llama" else "Qwen3"
    attention = type("Attention", (), {"n_heads": HEADS, "n_kv_heads": KEYS, "head_dim": SIZE})
    layer = type("Layer", (), {"attention": attention, "moe": None})
    config = type("Config", (), {"layers": [layer], "dim": HIDDEN, "enable_weight_tying": False})
    adapter: Any = getattr(adapters, f"{family}StateDictAdapter")(config, None)
    _, model, optimizer = trained
    loaded = load_checkpoint(save(tmp_path / "step-3", model, optimizer, "newer"), base)
    theirs = adapter.to_hf({newer(name): p.detach() for name, p in model.named_parameters()})
    ours = dict(loaded.model.named_parameters())
    assert {name: True for name in ours} == {name: torch.equal(ours[name], tensor) for name, tensor in theirs.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        theirs = adapter.to_hf({newer(name): optimizer.state[p][moment] for name, p in model.named_parameters()})
        assert all(torch.equal(getattr(loaded.adam[name], moment), tensor) for name, tensor in theirs.items())
