"""What is said of every number in the report that the auditor does not compute again: a path begins with one of these.

The criterion that judges it where it is a witness itself; `evidence`, where it is what other figures are made of; or
the reason why nothing can be said of it.
"""

from __future__ import annotations

JUDGED_BY = {
    "checkpoint.num_parameters": "as_stored",
    "checkpoint.num_trainable": "as_stored",
    "checkpoint.optimizer": "as_stored",
    "recipe": "gradient_witness",
    "update.grad_norm_logged": "real_update_norm",
    "sampling": "seeded",
    "preconditioner.difference_from_torch": "preconditioner_witness",
    "real_step": "real_step",
    "real_update": "real_update_cosine",
    "continuity.zero_check": "zero_check",
    "continuity.param_ratio": "param_scaling",
    "continuity.logit_ratio": "logit_scaling",
    "invariance.padding": "padding_invariance",
    "invariance.batch": "batch_invariance",
    "invariance.chunk": "chunk_invariance",
    "invariance.precision": "precision_invariance",
    "cache": "cache_agrees",
    "invariance.zero_step": "drawn_zero_check",
    "invariance.scaling": "drawn_scaling",
    "integrity.copies_modified": "live_model_unmodified",
    "witness": "gradient_witness",  # and projections_agree, curvature_witness
}
NOT_JUDGED = {
    "schema_version": "a version",
    "checkpoint.global_step": "a text of the trainer's, which enters nothing",
    "config": "as it was given",
    "continuity.eta_main": "a step that the tests are made with",
    "continuity.eta_tiny": "a step that the tests are made with",
    "invariance.num_examples": "how many cases were asked for and drawn",
    "update.num_kinked": "of how many responses a shorter step was taken",
    "verdicts": "what is concluded, not what is measured",
    "baseline": "figures of another report, judged there",
    "distributed": "of the processes, not of the policy",
    "environment": "of the machine, not of the policy",
    "memory": "of the machine, not of the policy",
    "timing": "of the machine, not of the policy",
}
