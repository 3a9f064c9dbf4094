"""`SequenceProcessor`: sample from any live model, score by teacher forcing, look at every step.

    config = {"generation": {"max_new_tokens": 64, "stop": ["</answer>"]}}
    processor = SequenceProcessor(model, tokenizer, config=config)
    asked = {"dataset_name": "arithmetic", "num_prompts": 8, "G": 4}
    sequences, logprobs, diagnostics = processor.generate_with_logprobs(**asked)
    logprobs.sequence_logprobs      # [B, G]
    logprobs[b, g].logprobs         # [T]: one response, without padding
    moved = processor.build_params_override(v, 1e-6)
    after = processor.teacher_force_logprobs(sequences, params_override=moved)

A facade. Sampling is `stages/responses/sampling.py`, scoring `teacher_forcing.py`, the types are in
`stages/responses/sequences.py`, diagnostics in `estimators/token_stats.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entropy_probe.config import GenerationConfig, SequenceConfig
from entropy_probe.errors import ConfigError, MeasurementError, shown
from entropy_probe.estimators.token_stats import (
    DiagnosticsPack,
    DistributionDiagnostics,
    SequenceDiagnostics,
    TokenStepDiagnostics,
    sequence_diagnostics,
)
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import build_functional_params_named, theta_plus_eta_v
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.registry import Registry
from entropy_probe.stages.responses.ids import eos_ids
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import Asked, Reward, find_rewards, of_each
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
from entropy_probe.stages.witnesses.continuity import ZeroCheck, compared
from entropy_probe.teacher_forcing import (
    Wanted,
    as_results,
    override_of,
    require_graph,
    require_sound,
    teacher_forced,
)

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

    `config` is a `GenerationConfig`, a mapping with the sections `generation` and `precision`, or a
    `ProbeConfig`. The model is used as it is at the time of each call, in `eval()`, without
    autocast, in the configured precision (`precision.dtype`): where its own dtype differs, each
    call works on a copy in that dtype. LoRA and PEFT stay in place, wrappers of DDP and
    torch.compile are taken off. `reward` names a reward as `batch.reward` does, or is one:
    (response, gold) → number. Progress of sampling goes to `logger` as INFO.
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
        sections = _sections(config)
        self.model = model
        self.tokenizer = tokenizer
        self.logger = logger or logging.getLogger("entropy_probe")
        self.config = sections.generation
        self.precision = sections.precision
        self._reward_of = find_rewards(reward) if isinstance(reward, str) else of_each(reward)

    # Prompts and responses

    def sample_prompts(
        self, dataset_name: str, split: str = "train", num_prompts: int = 8, seed: int | None = None
    ) -> list[Prompt]:
        """Distinct prompts of a dataset, with their gold answers.

        `batch.dataset` says which datasets there are.
        """
        pool = _pool(dataset_name, split)
        if _positive("num_prompts", num_prompts) > len(pool):
            problem = f"{num_prompts} were asked for, but {dataset_name} {split} has {len(pool)}"
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
        """G responses of every prompt from q.

        Temperature, top_p, length limit and stop strings are those of the configuration.
        The same seed gives the same responses whatever `gen_batch_size` is. Without one it is drawn
        from torch's default generator, so that `torch.manual_seed` governs it.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise ConfigError("prompts", f"are {shown(prompts)}", "give a list of at least one")
        asked = [(p, None) if isinstance(p, str) else p for p in prompts]
        prompts = [as_prompt(p, f"entry {i}", key="prompts") for i, p in enumerate(asked)]
        if self.tokenizer is None:
            problem = "was not given, so nothing can be sampled"
            raise MeasurementError("tokenizer", problem, "give it to the processor")
        group = _positive("G", G, self.config.num_return_sequences)
        size = _positive("gen_batch_size", gen_batch_size, self.config.gen_batch_size)
        changes = {"num_return_sequences": group, "gen_batch_size": size}
        generation = self.config.model_copy(update=changes)
        with self._bound() as bound:
            rollouts = sample_rollouts(
                bound,
                self.tokenizer,
                prompts,
                generation,
                seed=_seed(seed),
                progress=_Reports(self.logger),
            )
        for line in rollouts.found:
            self.logger.warning("%s", line)
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
        """Sample from `prompts`, or `num_prompts` prompts of a dataset; then score and diagnose."""
        if (prompts is None) == (dataset_name is None):
            problem = "and `dataset_name` are both given, or neither is"
            raise ConfigError("prompts", problem, "give one of them")
        seed = _seed(seed)
        if dataset_name is not None:
            count = _positive("num_prompts", num_prompts, 8)
            prompts = self.sample_prompts(dataset_name, split, count, seed)
        assert prompts is not None
        sequences = self.generate_batched(prompts, G, gen_batch_size, seed=seed)
        how = (with_grad, tf_batch_size, compute_rb)
        return sequences, *self.teacher_force_logprobs_with_diagnostics(sequences, *how)

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

        The pool is the dataset's split, or `max_prompts_pool` prompts of it, drawn without
        replacement.
        """
        if G != 1:
            problem = f"is {G}: responses to one prompt are not independent"
            raise ConfigError("G", problem, "leave it at 1")
        seed = _seed(seed)
        pool = _pool(dataset_name, split)
        if max_prompts_pool is not None:
            size = min(_positive("max_prompts_pool", max_prompts_pool), len(pool))
            pool = draw_prompts(pool, size, seed=seed, with_replacement=False)
        count = _positive("total_sequences", total_sequences)
        drawn = draw_prompts(pool, count, seed=seed + 1, with_replacement=True)
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
        """Score every generated token at θ, or at θ + ηv: with `params_override` in its place.

            log π(token i | tokens before i) from the logits at i−1

        One forward function with and without a graph, at θ and at θ + ηv. `with_grad`: log π, log q
        and logits carry the graph, to the live parameters and to those tensors of `params_override`
        that require it; else they are on the CPU. It is the module's own graph, as a trainer
        differentiates it (DoRA detaches its weight norm). Long batches are computed again in the
        backward pass: change no parameter before it. `buffers_override` is for diagnosis only:
        buffers are otherwise those of the model. `return_logits` holds [B, G, T, V] in memory.
        Raises `MeasurementError`, `RolloutsError` and `OverrideError`.
        """
        wanted = Wanted(with_grad, compute_rb, return_baseline_features, return_logits)
        overrides = (params_override, buffers_override)
        results, _ = self._scored(sequences, tf_batch_size, *overrides, wanted)
        return results

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
        """`teacher_force_logprobs`, and diagnostics of every step.

        They are those of the same policy, from the same logits.
        """
        wanted = Wanted(with_grad, compute_rb, return_baseline_features, return_logits, True)
        overrides = (params_override, buffers_override)
        results, step = self._scored(sequences, tf_batch_size, *overrides, wanted)
        assert step is not None

        def whole(b: int, g: int, steps: int) -> SequenceDiagnostics:
            surprisal = torch.from_numpy(results.entropies[b, g, :steps])
            return sequence_diagnostics(steps_of(step, b, g, steps), surprisal)

        lengths = results.gen_lens.tolist()
        seq = [[whole(b, g, n) for g, n in enumerate(row)] for b, row in enumerate(lengths)]
        return results, DiagnosticsResults(step, seq, results.gen_lens)

    def build_params_override(
        self,
        v_named: Mapping[str, Tensor] | None,
        eta: float,
    ) -> dict[str, Tensor]:
        """θ + ηv for the names in v, detached; both are upcast before the addition."""
        if not math.isfinite(eta):
            raise ConfigError("eta", f"is {eta}", "give a finite number")
        return theta_plus_eta_v(Registry.of(self.model), v_named or {}, eta, self._dtype)

    def debug_zero_check(
        self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N L"] | None = None, atol: float = 0.0
    ) -> ZeroCheck:
        """max|direct − functional(η = 0)| over the logits, every parameter being mapped.

        Both must be equal bit for bit, unless `atol` is given. Raises `MeasurementError` where the
        difference is larger, or not a number.
        """
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            shapes = f"have shape {tuple(ids.shape)}"
            if mask is not None:
                shapes += f", the mask {tuple(mask.shape)}"
            raise MeasurementError("ids", shapes, "give both as [N, L]")
        with self._bound() as bound, torch.no_grad():
            mapping, _ = build_functional_params_named(bound.module, None, 0.0)
            ids, mask = ids.to(bound.device), None if mask is None else mask.to(bound.device)
            direct = bound.direct_logits(ids, mask=mask)
            check = compared(direct, bound.logits(ids, mask=mask, override=mapping))
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
        params: Mapping[str, Tensor] | None,
        buffers: Mapping[str, Tensor] | None,
        wanted: Wanted,
    ) -> tuple[LogprobResults, TokenStepDiagnostics | None]:
        size = _positive("tf_batch_size", tf_batch_size, self.config.tf_batch_size)
        if not isinstance(sequences, BatchedSequences):
            problem = f"are {shown(sequences)}"
            raise MeasurementError("sequences", problem, "give BatchedSequences")
        if wanted.graph and torch.is_inference_mode_enabled():
            problem = "inference mode is on, and it makes no graphs"
            raise MeasurementError("with_grad", problem, "leave it")
        with self._bound() as bound, torch.set_grad_enabled(wanted.graph):
            override = override_of(bound, params or {}, buffers or {})
            eos = eos_ids(bound.language_model, self.tokenizer)
            rollouts = as_rollouts(sequences, bound, eos)
            mapping = self._live_parameters(bound) | override if wanted.graph else override
            policy = (self.config, self.precision)
            scored = teacher_forced(bound, rollouts, eos, *policy, size, mapping, wanted)
        require_sound(scored, self.config, overridden=bool(override))
        if wanted.graph:
            require_graph(scored)
        rewards = self._rewards(sequences)
        return as_results(scored, sequences, rewards, self.config, wanted), scored.step

    def _live_parameters(self, bound: BoundModel) -> dict[str, Tensor]:
        """Where `bound` is a copy: the model's own trainable parameters in its dtype, for the graph
        to reach them.
        """
        registry = Registry.of(self.model)
        if registry.module is bound.module:
            return {}
        return {name: live.to(bound.dtype) for name, live in registry.trainable.items()}

    def _rewards(self, sequences: BatchedSequences) -> Float[Tensor, "B G"]:
        prompts = sequences.prompts or [Prompt("")] * len(sequences.responses_text)
        asked = [
            Asked(prompt, text, sequences.response_ids(b, g).tolist())
            for b, (prompt, texts) in enumerate(zip(prompts, sequences.responses_text, strict=True))
            for g, text in enumerate(texts)
        ]
        rewards = torch.tensor(self._reward_of(asked), dtype=torch.float64)
        return rewards.reshape(len(prompts), -1)

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


def _sections(config: object) -> SequenceConfig:
    if config is None or isinstance(config, GenerationConfig):
        return SequenceConfig(generation=config or GenerationConfig())
    if isinstance(config, Mapping):
        return SequenceConfig.from_mapping(dict(config))
    if isinstance(config, SequenceConfig):
        return config
    remedy = "give a GenerationConfig, a ProbeConfig, or {'generation': {..}, 'precision': {..}}"
    raise ConfigError("config", f"is {shown(config)}", remedy)


def _pool(dataset_name: str, split: str) -> Sequence[Prompt]:
    if split not in ("train", "test"):
        raise ConfigError("split", f"is {split!r}", "give train or test")
    return dataset_prompts(dataset_name, split)


def _whole(name: str, value: object, lowest: int) -> int:
    number = value if isinstance(value, Integral) and not isinstance(value, bool) else lowest - 1
    if not lowest <= int(number) < 2**63:
        raise ConfigError(name, f"is {shown(value)}", f"give a whole number from {lowest} on")
    return int(number)


def _positive(name: str, value: object, default: int | None = None) -> int:
    """`value`, which must be a whole number above 0, or `default` in place of `None`."""
    if value is None and default is not None:
        return default
    return _whole(name, value, 1)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, (1,))) if seed is None else _whole("seed", seed, 0)
