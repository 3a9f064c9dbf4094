"""`SequenceProcessor`: sample from any live model, score by teacher forcing, look at every step. The notes' verbs.

    config = {"generation": {"max_new_tokens": 64, "stop": ["</answer>"]}}
    processor = SequenceProcessor(model, tokenizer, config=config)
    sequences, logprobs, diagnostics = processor.generate_with_logprobs(dataset_name="arithmetic", num_prompts=8, G=4)
    logprobs.sequence_logprobs          # [B, G];   logprobs[b, g].logprobs is one response, without padding
    after = processor.teacher_force_logprobs(sequences, params_override=processor.build_params_override(v, 1e-6))

A facade: sampling is `stages/sampling.py`, scoring `stages/scores.py`, the types `stages/sequences.py`, diagnostics
`estimators/token_stats.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entropy_probe.config import GenerationConfig, SequenceConfig
from entropy_probe.errors import ConfigError, MeasurementError, OverrideError, shown
from entropy_probe.estimators.token_stats import (
    DiagnosticsPack,
    DistributionDiagnostics,
    SequenceDiagnostics,
    TokenStepDiagnostics,
    features_of_steps,
    sequence_diagnostics,
    step_diagnostics,
)
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import build_functional_params_named, theta_plus_eta_v
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.registry import Registry
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import Reward, find_reward
from entropy_probe.stages.responses.rollouts import eos_ids
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.sequences import (
    BatchedSequences,
    DiagnosticsResults,
    LogprobResults,
    as_rollouts,
    batched,
    steps_of,
)
from entropy_probe.stages.responses.tasks import as_prompt, dataset_prompts, draw_prompts
from entropy_probe.stages.scores import policy_scores, read_responses, require_finite, require_inside_nucleus
from entropy_probe.stages.witnesses.continuity import ZeroCheck, compared

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "BatchedSequences",
    "DiagnosticsPack",
    "DiagnosticsResults",
    "DistributionDiagnostics",
    "GenerationConfig",
    "LogprobResults",
    "SequenceDiagnostics",
    "SequenceProcessor",
    "TokenStepDiagnostics",
]

_SECONDS_BETWEEN_REPORTS = 5.0


class SequenceProcessor:
    """Sampling, scoring and diagnostics on a live model, which is never changed.

    `config` is a `GenerationConfig`, a mapping with the sections `generation` and `precision`, or a `ProbeConfig`. The
    model is used as it is at the time of each call, in `eval()`, without autocast, in the configured precision
    (`precision.dtype`): where its own dtype differs, each call works on a copy in that dtype. LoRA and
    PEFT stay in place, wrappers of DDP and torch.compile are taken off. `reward` names a reward as `batch.reward` does,
    or is one: (response, gold) → number. Progress of sampling goes to `logger` as INFO.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None = None,
        logger: logging.Logger | None = None,
        config: GenerationConfig | SequenceConfig | Mapping[str, Any] | None = None,
        *,
        reward: str | Reward = "tag_pref",
    ) -> None:
        if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
            raise ConfigError("model", f"is {shown(model)}", "give a module with parameters")
        if config is None or isinstance(config, GenerationConfig):
            sections = SequenceConfig(generation=config or GenerationConfig())
        elif isinstance(config, Mapping):
            sections = SequenceConfig.from_mapping(dict(config))
        elif isinstance(config, SequenceConfig):
            sections = config
        else:
            remedy = "give a GenerationConfig, a ProbeConfig, or {'generation': {..}, 'precision': {..}}"
            raise ConfigError("config", f"is {shown(config)}", remedy)
        self.model = model
        self.tokenizer = tokenizer
        self.logger = logger or logging.getLogger("entropy_probe")
        self.config = sections.generation
        self.precision = sections.precision
        self._reward = find_reward(reward) if isinstance(reward, str) else reward

    # Prompts and responses

    def sample_prompts(
        self, dataset_name: str, split: str = "train", num_prompts: int = 8, seed: int | None = None
    ) -> list[Prompt]:
        """Distinct prompts of a dataset (`batch.dataset` says which there are), with their gold answers."""
        pool = _pool(dataset_name, split)
        if _positive("num_prompts", num_prompts) > len(pool):
            problem = f"{num_prompts} asked for, {len(pool)} in {dataset_name} {split}"
            raise ConfigError("num_prompts", problem, "ask for fewer")
        return draw_prompts(pool, num_prompts, seed=_seed(seed), with_replacement=False)

    def generate_batched(
        self,
        prompts: Sequence[str | Prompt | tuple[str, str | None]],
        G: int | None = None,
        gen_batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> BatchedSequences:
        """G responses of every prompt from q: temperature, top_p, length limit and stop strings of the configuration.

        The same seed gives the same responses whatever `gen_batch_size` is. Without one it is drawn from torch's
        default generator, so that `torch.manual_seed` governs it.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise ConfigError("prompts", f"are {shown(prompts)}", "give a list of at least one")
        asked = [(p, None) if isinstance(p, str) else p for p in prompts]
        prompts = [as_prompt(p, f"entry {i}", key="prompts") for i, p in enumerate(asked)]
        if self.tokenizer is None:
            raise MeasurementError("tokenizer", "was not given, so nothing can be sampled", "give it to the processor")
        group = _positive("G", G, self.config.num_return_sequences)
        size = _positive("gen_batch_size", gen_batch_size, self.config.gen_batch_size)
        generation = self.config.model_copy(update={"num_return_sequences": group, "gen_batch_size": size})
        with self._bound() as bound:
            rollouts = sample_rollouts(
                bound, self.tokenizer, prompts, generation, seed=_seed(seed), progress=_Reports(self.logger)
            )
        return batched(rollouts, self.tokenizer, prompts)

    def generate_with_logprobs(
        self,
        prompts: Sequence[str | Prompt | tuple[str, str | None]] | None = None,
        G: int | None = None,
        dataset_name: str | None = None,
        split: str = "train",
        num_prompts: int | None = None,
        seed: int | None = None,
        with_grad: bool = False,
        gen_batch_size: int | None = None,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
    ) -> tuple[BatchedSequences, LogprobResults, DiagnosticsResults]:
        """Sample from `prompts`, or from `num_prompts` prompts of a dataset, then score and diagnose."""
        if (prompts is None) == (dataset_name is None):
            raise ConfigError("prompts", "and `dataset_name` are both given, or neither is", "give one of them")
        seed = _seed(seed)
        if dataset_name is not None:
            prompts = self.sample_prompts(dataset_name, split, _positive("num_prompts", num_prompts, 8), seed)
        assert prompts is not None
        sequences = self.generate_batched(prompts, G, gen_batch_size, seed=seed)
        scored = self.teacher_force_logprobs_with_diagnostics(sequences, with_grad, tf_batch_size, compute_rb)
        return sequences, *scored

    def generate_with_replacement_sampling(
        self,
        total_sequences: int,
        dataset_name: str,
        split: str = "train",
        max_prompts_pool: int | None = None,
        seed: int | None = None,
        G: int = 1,
        with_grad: bool = False,
        gen_batch_size: int | None = None,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
    ) -> tuple[BatchedSequences, LogprobResults, DiagnosticsResults]:
        """Independent draws: `total_sequences` prompts with replacement, one response each.

        The pool is the dataset's split, or `max_prompts_pool` prompts of it, drawn without replacement.
        """
        if G != 1:
            raise ConfigError("G", f"is {G}: responses to one prompt are not independent", "leave it at 1")
        seed = _seed(seed)
        pool = _pool(dataset_name, split)
        if max_prompts_pool is not None:
            size = min(_positive("max_prompts_pool", max_prompts_pool), len(pool))
            pool = draw_prompts(pool, size, seed=seed, with_replacement=False)
        drawn = draw_prompts(pool, _positive("total_sequences", total_sequences), seed=seed + 1, with_replacement=True)
        return self.generate_with_logprobs(
            drawn,
            1,
            seed=seed,
            with_grad=with_grad,
            gen_batch_size=gen_batch_size,
            tf_batch_size=tf_batch_size,
            compute_rb=compute_rb,
        )

    # Scores

    def teacher_force_logprobs(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
        params_override: Mapping[str, Tensor] | None = None,
        buffers_override: Mapping[str, Tensor] | None = None,
        return_logits: bool = False,
    ) -> LogprobResults:
        """Score every generated token at θ, or with the parameters in `params_override` replaced (θ + ηv).

            log π(token i | tokens before i) from the logits at i−1

        One forward function with and without a graph, at θ and at θ + ηv. `with_grad`: log π, log q and logits carry
        the graph, to the live parameters and to those tensors of `params_override` that require it; else they are on
        the CPU. It is the module's own graph, as a trainer differentiates it (DoRA detaches its weight norm). Long
        batches are computed again in the backward pass: change no parameter before it. `buffers_override` is for
        diagnosis only: buffers are otherwise those of the model. `return_logits` holds [B, G, T, V] in memory. Raises
        `MeasurementError`, `RolloutsError` and `OverrideError`.
        """
        flags = (with_grad, compute_rb, return_baseline_features, return_logits)
        return self._scored(sequences, tf_batch_size, params_override or {}, buffers_override or {}, *flags)[0]

    def teacher_force_logprobs_with_diagnostics(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
        params_override: Mapping[str, Tensor] | None = None,
        buffers_override: Mapping[str, Tensor] | None = None,
        return_logits: bool = False,
    ) -> tuple[LogprobResults, DiagnosticsResults]:
        """`teacher_force_logprobs`, and diagnostics of every step under the same policy from the same logits."""
        flags = (with_grad, compute_rb, return_baseline_features, return_logits)
        overrides = (params_override or {}, buffers_override or {})
        results, step = self._scored(sequences, tf_batch_size, *overrides, *flags, diagnose=True)
        assert step is not None

        def whole(b: int, g: int, steps: int) -> SequenceDiagnostics:
            return sequence_diagnostics(steps_of(step, b, g, steps), torch.from_numpy(results.entropies[b, g, :steps]))

        seq = [[whole(b, g, n) for g, n in enumerate(row)] for b, row in enumerate(results.gen_lens.tolist())]
        return results, DiagnosticsResults(step, seq, results.gen_lens)

    def build_params_override(self, v_named: Mapping[str, Tensor] | None, eta: float) -> dict[str, Tensor]:
        """θ + ηv for the names in v, both upcast to the configured dtype before the addition; detached."""
        if not math.isfinite(eta):
            raise ConfigError("eta", f"is {eta}", "give a finite number")
        return theta_plus_eta_v(Registry.of(self.model), v_named or {}, eta, self._dtype)

    def debug_zero_check(
        self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N L"] | None = None, atol: float = 0.0
    ) -> ZeroCheck:
        """max|direct − functional(η = 0)| over the logits, every parameter being mapped; bit for bit unless `atol`.

        Raises `MeasurementError` where the difference is larger, or not a number.
        """
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            shapes = f"have shape {tuple(ids.shape)}" + ("" if mask is None else f", the mask {tuple(mask.shape)}")
            raise MeasurementError("ids", shapes, "give both as [N, L]")
        with self._bound() as bound, torch.no_grad():
            mapping, _ = build_functional_params_named(bound.module, None, 0.0)
            ids, mask = ids.to(bound.device), None if mask is None else mask.to(bound.device)
            check = compared(bound.direct_logits(ids, mask=mask), bound.logits(ids, mask=mask, override=mapping))
        self.logger.info("[η=0] max|direct - functional| = %.3e", check.max_abs)
        if not check.max_abs <= atol:
            raise MeasurementError(
                "zero check",
                f"max|direct - functional(η=0)| is {check.max_abs:.3e}, expected at most {atol:g}",
                "look for dropout, hooks and state that changes from one forward to the next",
            )
        return check

    def _scored(
        self,
        sequences: BatchedSequences,
        tf_batch_size: int | None,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        with_grad: bool,
        compute_rb: bool,
        return_baseline_features: bool,
        return_logits: bool,
        *,
        diagnose: bool = False,
    ) -> tuple[LogprobResults, TokenStepDiagnostics | None]:
        policy = self.config
        size = _positive("tf_batch_size", tf_batch_size, policy.tf_batch_size)
        if not isinstance(sequences, BatchedSequences):
            raise MeasurementError("sequences", f"are {shown(sequences)}", "give BatchedSequences")
        if with_grad and torch.is_inference_mode_enabled():
            raise MeasurementError("with_grad", "inference mode is on, in which there are no graphs", "leave it")
        with self._bound() as bound, torch.set_grad_enabled(with_grad):
            override = _override(bound, params, buffers)
            eos = eos_ids(bound.language_model, self.tokenizer)
            rollouts = as_rollouts(sequences, bound, eos)
            score = policy_scores(bound, policy, self.precision)
            names = [f.name for f in fields(TokenStepDiagnostics) if eos or f.name != "eos_prob"]
            names = names if diagnose or return_baseline_features else []

            def read(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
                values = score(logits, tokens)
                if names:
                    step = step_diagnostics(logits, policy.top_p, policy.temperature, eos)
                    values += tuple(getattr(step, name) for name in names)
                return (*values, logits) if return_logits else values

            mapping = self._live_parameters(bound) | override if with_grad else override
            logp, logq, entropy, entropy_q, *more = read_responses(bound, rollouts, size, read, mapping)
        where = (
            ("with the override", "give a smaller step") if override else ("as the model is", "look into its weights")
        )
        require_finite(rollouts, logp.detach(), entropy.detach(), *where)
        if not override:
            require_inside_nucleus(rollouts, logq.detach(), policy.top_p)
        if with_grad and not logp.requires_grad:
            problem = "neither a parameter of the model nor a tensor of params_override requires a gradient"
            raise MeasurementError("with_grad", problem, "call requires_grad_() on those that should")
        step = (
            TokenStepDiagnostics(**{n: v.detach().cpu() for n, v in zip(names, more, strict=False)}) if names else None
        )
        plain_logp, plain_logq = _plain(logp), _plain(logq)
        results = LogprobResults(
            logprobs=logp if with_grad else logp.cpu(),
            entropies=-plain_logp.numpy(),
            sequence_logprobs=plain_logp.sum(-1),
            token_logqs=logq if with_grad else logq.cpu(),
            sequence_logqs=plain_logq.sum(-1),
            rewards=self._rewards(sequences),
            gen_lens=sequences.gen_lens,
        )
        if compute_rb:
            differentiable = entropy if with_grad and policy.rb_requires_grad else None
            of_pi, of_q = _plain(entropy).numpy(), _plain(entropy_q).numpy()
            results = replace(results, rb_entropies=of_pi, rb_entropies_q=of_q, rb_entropies_torch=differentiable)
        if return_baseline_features and step is not None:
            features = features_of_steps(step, policy.max_new_tokens)
            inside = rollouts.per_prompt(rollouts.gen_mask)[..., None]
            results = replace(results, baseline_feats_torch=torch.where(inside, features, 0.0))
        if return_logits:
            results = replace(results, logits=more[-1] if with_grad else more[-1].cpu())
        return results, step

    def _live_parameters(self, bound: BoundModel) -> dict[str, Tensor]:
        """Where `bound` is a copy: the model's own trainable parameters in its dtype, for the graph to reach them."""
        registry = Registry.of(self.model)
        if registry.module is bound.module:
            return {}
        return {name: parameter.to(bound.dtype) for name, parameter in registry.trainable.items()}

    def _rewards(self, sequences: BatchedSequences) -> Float[Tensor, "B G"]:
        prompts = sequences.prompts or [Prompt("")] * len(sequences.responses_text)
        rewards = [
            [self._reward(text, prompt.gold) for text in texts]
            for prompt, texts in zip(prompts, sequences.responses_text, strict=True)
        ]
        return torch.tensor(rewards, dtype=torch.float64)

    @property
    def _dtype(self) -> torch.dtype:
        return str_to_dtype(self.precision.dtype)

    @contextmanager
    def _bound(self) -> Iterator[BoundModel]:
        """The model as it is now, in the configured dtype and numerics."""
        with numerics(self.precision, sum(p.numel() for p in self.model.parameters())):
            yield bind(self.model, self._dtype)


class _Reports:
    """Progress to a logger, every few seconds."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            self._logger.info("%s: %d of at most %d tokens", stage, done, total)


def _override(bound: BoundModel, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both in one mapping, after a look at whether each name stands where it belongs."""
    for where, given, known in (
        ("params_override", params, bound.registry.parameters.keys()),
        ("buffers_override", buffers, bound.registry.buffer_names),
    ):
        if not isinstance(given, Mapping) or not all(isinstance(value, Tensor) for value in given.values()):
            raise OverrideError(where, f"is {shown(given)}", "give a mapping of names to tensors")
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise OverrideError(where, f"the unwrapped model has no {unknown!r} among these", "leave it out")
    return {**params, **buffers}


def _pool(dataset_name: str, split: str) -> list[Prompt]:
    if split not in ("train", "test"):
        raise ConfigError("split", f"is {split!r}", "give train or test")
    return dataset_prompts(dataset_name, split)


def _plain(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def _whole(name: str, value: object, lowest: int) -> int:
    number = value if isinstance(value, Integral) and not isinstance(value, bool) else lowest - 1
    if not lowest <= int(number) < 2**63:
        raise ConfigError(name, f"is {shown(value)}", f"give a whole number from {lowest} on")
    return int(number)


def _positive(name: str, value: object, default: int | None = None) -> int:
    """`value`, which must be a whole number above 0; `default`, if there is one, in place of `None`."""
    return default if value is None and default is not None else _whole(name, value, 1)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, (1,))) if seed is None else _whole("seed", seed, 0)
