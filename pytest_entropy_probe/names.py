"""Names of options, ini keys, markers and fixtures. PYTEST_DONT_REWRITE: nothing here asserts."""

from __future__ import annotations

# key → (metavar, is it a path, help); the option is --probe-KEY, the ini key probe_KEY.
OPTIONS: dict[str, tuple[str, bool, str]] = {
    "checkpoint": (
        "[NAME=]PATH",
        True,
        "checkpoint folder to probe; repeatable; globs; 'demo' is the bundled one",
    ),
    "base_model": (
        "PATH",
        True,
        "base model of an adapter that names none, or model folder of a checkpoint without config.json",
    ),
    "config": ("FILE", True, "configuration (YAML)"),
    "rollouts": (
        "FILE",
        True,
        "responses on which the entropy is measured, in place of sampling (JSON lines)",
    ),
    "update_rollouts": ("FILE", True, "responses from which the update is computed (JSON lines)"),
    "prompts": (
        "PATH",
        True,
        "prompts to sample from (JSON lines, JSON, CSV, Parquet, a datasets folder)",
    ),
    "recipe": (
        "NAME",
        False,
        "whose update: auto reads the checkpoint's own training settings (default); notes, trl-dapo, verl-grpo, ...; "
        "or a YAML file of parts",
    ),
    "next": (
        "PATH",
        True,
        "the checkpoint one step later: the step that was really made (checkpoint-N+1 is found by itself)",
    ),
    "reference_model": (
        "PATH",
        True,
        "the reference of a KL term; by default an adapter's base",
    ),
    "budget": (
        "NAME",
        False,
        "how much is computed: smoke, standard or full; anything you set yourself stays",
    ),
    "device": ("DEVICE", False, "where it runs: cpu, cuda, cuda:1"),
    "memory_limit": (
        "SIZE",
        False,
        "the most memory to use, such as 8GiB; batches become smaller to keep it",
    ),
    "device_map": (
        "NAME",
        False,
        "for a model that outgrows one device: auto, balanced, balanced_low_0 or sequential; "
        "a map by module is for the configuration",
    ),
    "offload_folder": (
        "DIR",
        True,
        "the folder for parts that do not fit into memory either; default: a temporary one",
    ),
    "sharding": (
        "NAME",
        False,
        "what several processes hold: prompt, a model each; parameter, one model together; auto",
    ),
    "seed": ("N", False, "one seed for all sampling"),
    "target_se": (
        "X",
        False,
        "more prompts until the predicted change has a standard error of X nats per token, or 2se: half of that change",
    ),
    "json": ("PATH", True, "write report.json here; with several checkpoints a folder of them"),
    "evidence": (
        "DIR",
        True,
        "write what the numbers are made of here, DIR/NAME.safetensors: `entropy-probe audit` computes them again",
    ),
    "plot": (
        "PATH",
        True,
        "draw prediction against realisation here (.png, .svg); with several checkpoints a folder",
    ),
    "html": (
        "FILE",
        True,
        "write the run here as one HTML page: verdict, figures, responses, every criterion (.html)",
    ),
    "log": (
        "SINK",
        False,
        "log the figures of every checkpoint at its step: tensorboard:DIR, wandb[:PROJECT], trackio[:PROJECT] or "
        "jsonl:FILE; repeatable",
    ),
    "baseline": (
        "PATH",
        True,
        "report.json that gates compare with, or a folder with one NAME.json for each checkpoint",
    ),
    "golden_dir": ("DIR", True, "compare with the golden files in DIR/NAME/"),
    "golden_update": ("MODE", False, "write golden files: missing, changed or all"),
    "xfails": (
        "FILE",
        True,
        "file of known failures: on each line the beginning of an id, and a reason; strict",
    ),
}
REPEATABLE = ("checkpoint", "log")
FLAGS: dict[str, str] = {
    "golden_update_in_ci": "let --probe-golden-update write even if CI is set",
    "dry_run": "say what memory and how many flops the run would take, as `entropy-probe plan`, and exit: 0 if it fits",
    "no_cache": "measure again; a report that pytest's cache holds is neither used nor kept",
}
MARKERS = {
    "acceptance": "every numerical criterion of the entropy probe",
    "zero_check": "a mapping of the unchanged parameters changes no logit",
    "scaling": "parameters, logits and entropy respond to a step size as their derivative says",
    "registry": "every trainable tensor is there, in order, with a gradient and a preconditioner",
    "ustatistic": "the cross-prompt U-statistic, its diagonal and its standard errors agree",
    "importance": "importance weights are fit to measure the change of entropy",
    "sequences": "log-probabilities and entropies of sequences are exact",
    "audit": "every figure is computed again from the evidence, by code that did not make it",
    "prediction": "the predicted change of entropy against the measured one",
    "golden": "comparison with stored numbers of the same checkpoint",
    "gate": "training-health limits; off unless limits are configured",
    "benchmark": "how long scoring, gradients and the sweep take, by pytest-benchmark; off unless asked for",
}
PAGE = "GITHUB_STEP_SUMMARY"
"""The variable that names the page which GitHub shows beside a job."""
TARGET_FIXTURE = "_probe_target"
GOLDEN_FIXTURE = "_probe_goldens"


def option(key: str) -> str:
    """The option as it is written: `golden_dir` → `--probe-golden-dir`."""
    return f"--probe-{key.replace('_', '-')}"
