"""What every field of the report of a step is, as `report_fields` says of the report of a checkpoint."""

from __future__ import annotations

FIELDS = """
StepReport
  schema_version  count  The version of this form; it is 1.
  kind  name  Always `step`: a report of this form is not that of a checkpoint.
  probe_version  name  The version of this library.
  after_step  step  How many steps had been taken when this one was probed: its θ is that of the checkpoint of this
      number.
  config  section  The configuration with which the step was measured.
  recipe  section  Whose update it is: the optimizer's own step on the gradients of the loss.
  batch  section  The E batch, on which everything is measured.
  entropy  section  The entropy at θ, before the step.
  update  section  The step that the optimizer was about to take.
  predicted_per_token  section  The change of the entropy per token that the step was expected to bring.
  predicted_per_response  section  The change of the entropy of a response that the step was expected to bring.
  realised  section  The change at θ plus the step, measured before the step was taken; η = 1 is the whole step.
  resolution  section  What the E batch can tell about the step.
  came  section  The change at the θ' that the trainer made, on the same responses; null if the step was not taken.
  since  section  The change since the probe before this one; null for the first.
  gates  section  A verdict for each bound that the user set.
  environment  section  Versions, device and threads.
  timing  seconds  What each stage took.

StepBatchSection
  num_prompts  count  How many prompts there are.
  num_responses  count  How many responses of each prompt.
  num_tokens  count  How many tokens are scored.
  prompts  name  Where the prompts are from: a file, the training set, or `given`.
  fingerprint  digest  A SHA-256 over all token ids.
  found  text  What was odd about prompts and ids.

StepUpdateSection
  optimizer  name  The class of the optimizer.
  lr  η  The largest learning rate of its groups.
  norm  ratio  The Euclidean norm of the step, θ' − θ.
  grad_norm  gradient  The norm of the gradient that the optimizer was given, after clipping.
  momentum_share  share  The part of the step that momentum and decay alone make: v₀ᵀv/‖v‖².
  in_float64  flag  Whether the step was computed in float64, or in the dtypes of the optimizer's own state.

StepPrediction
  first_order  section  The slope of the entropy along the step, with its standard error over prompts.
  second_order  section  The same with half the curvature along the step; null if the budget leaves it out.

SinceSection
  after_step  step  How many steps had been taken at the probe before.
  steps  step  How many steps lie between the two probes.
  change  section  The difference of the two measured entropies, nats per token, with its standard error.
  predicted  section  What was predicted for the first of these steps, nats per token.
"""
