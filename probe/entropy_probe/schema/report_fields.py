"""What every field of the report is: its unit, and one sentence. `entropy-probe schema` and the site print them.

A line for each field, under the class of `report.py` that has it: name, unit, what it is, with two spaces between.
A line that is indented further goes on with the last.
"""

from __future__ import annotations

UNITS = {
    "nats/response": "natural units of information, of a whole response",
    "nats/token": "natural units of information, of one token",
    "nats": "natural units of information, of a whole response, or of one token if "
    "`true_delta_h.normalize` is `per_token`",
    "nats/response/η": "change of the entropy of a response per unit of the learning rate",
    "nats/token/η": "change of the entropy per token per unit of the learning rate",
    "nats/response/η²": "second derivative of the entropy of a response by the learning rate",
    "nats/token/η²": "second derivative of the entropy per token by the learning rate",
    "(nats/response/η)²": "a variance of such slopes",
    "η": "a learning rate: the step θ → θ + ηv has this η",
    "gradient": "the Euclidean norm of a gradient",
    "1/gradient": "what a gradient is multiplied by: P = 1/(√v̂ + ε)",
    "θ/η": "the Euclidean norm of a change of the parameters, per unit of the learning rate",
    "reward": "what the reward function gives",
    "share": "a part of a whole, from 0 to 1",
    "ratio": "a number without a unit",
    "cosine": "from −1 to 1",
    "SE": "a number of standard errors",
    "count": "a whole number",
    "step": "a number of optimizer steps",
    "bytes": "a number of bytes",
    "seconds": "a duration",
    "flag": "true or false",
    "name": "a short text that names something",
    "text": "a text for people",
    "digest": "a checksum, in hexadecimal digits",
    "value": "a number, a flag or a name, as the setting takes it",
    "section": "a table of further fields",
}

FIELDS = """
OptimizerSection
  type  name  Which optimizer wrote the states, as the keys of its file show.
  lr  η  The learning rate that the file records; null if it records none.
  betas  ratio  Adam's two decay rates, β₁ and β₂.
  eps  ratio  Adam's ε, which is added to the root of the second moment.
  weight_decay  ratio  The weight decay of the parameter group.
  step  step  How many steps the optimizer has made.
  covered  count  How many trainable tensors have a second moment.
  total  count  How many tensors are trainable.
  saved  count  Under each set of hyper-parameters in the file, how many tensors it holds.
  read  count  Under each set of hyper-parameters, how many tensors were read with it; it must equal `saved`.
  no_second_moment  text  Why there is no second moment, if the optimizer is not Adam; null for Adam.

CheckpointSection
  name  name  The checkpoint's name in tables and file names.
  path  name  The folder from which it was read.
  fingerprint  digest  A SHA-256 over its weights, configuration and optimizer state.
  model_type  name  The architecture, as `config.json` calls it.
  num_parameters  count  How many numbers the model has.
  num_trainable  count  How many of them are trained.
  weights_dtype  name  The number format in which the weights are stored.
  adapter  name  The kind of adapter, such as LoRA; null for a full model.
  global_step  step  The training step that `trainer_state.json` records; null without that file.
  optimizer  section  The optimizer as the checkpoint recorded it.
  warnings  text  What had to be concluded about the checkpoint because no file says it, one line each.
  device_map  name  The device of each module; null if all modules are on one device.

BatchSection
  num_prompts  count  How many prompts the batch has.
  num_responses  count  How many responses the prompt with the most responses has.
  total_responses  count  How many responses the batch has.
  num_tokens  count  How many tokens of the responses are scored.
  source  name  Where the responses come from: `sampled`, or the file.
  prompts_fingerprint  digest  A SHA-256 over the prompts: batches with the same prompts have the same.
  same_batch  flag  Whether one batch serves both for the entropy and for the update.
  mean_reward  reward  The mean reward of the responses.
  mean_reward_se  reward  Its standard error, from the spread over prompts; null for a single prompt.
  zero_advantage_fraction  share  The share of prompts whose responses all have advantage 0; they add nothing to the
      update.
  missing_gold  count  How many prompts have no gold answer.
  given  name  Where the responses were asked to come from: `sampled`, or the file.
  early_eos  count  How many responses have an EOS before their last token.
  unended  count  How many responses end neither with an EOS nor at the length limit; null if the limit is not
      known or stop strings end responses too.
  fingerprint  digest  A SHA-256 over the token ids, the rewards, and the advantages that were given.
  advantages  name  Where the advantages come from: `given` in the file, as `weights` of tokens, or by the `recipe`.
  reward  name  What gave the rewards: the name of the function, or `file`; `stand_in` says nothing of the policy.
  prompts_are_builtin  flag  Whether the prompts are the built-in ones, which nobody chose.
  found  text  What was odd about prompts and ids, and what was done about it.

RecipeSetting
  value  value  The value of this part of the recipe.
  source  name  Where the value comes from: `default`, the recipe, the trainer's file, or `configuration`.

RecipeSection
  name  name  The name of the recipe, which says how the trainer makes a gradient from a batch.
  source  name  The file or the setting that named the recipe.
  settings  section  Every part of the recipe, with its value and where that comes from.
  not_reproduced  text  What the trainer does and the probe does not.
  unread  text  Files with settings that could not be read, with the reason.

SamplingSection
  same_seed  share  The share of responses of two prompts that the same seed draws again; it must be 1.
  other_seed  share  The share of them that another seed draws too; it must be small.

Estimate
  value  ratio  The estimate; its unit is that of the field that holds it.
  se  ratio  Its standard error, in the same unit.

Part
  value  nats/response  What this group of tensors adds to δH₁.
  se  nats/response  The standard error of this part; null if a single unit does not tell it.

EntropySection
  naive  nats/response  The mean of −log p over whole responses; noisy, and unbiased.
  rb  nats/response  The mean of the summed entropies of all next-token distributions (Rao-Blackwell); it has less
      noise.
  rb_q  nats/response  The same of the distribution that was sampled from, which is π cut to its nucleus.
  surprise  nats/response  The mean of Σ(−log q − H(q)), which is 0 in expectation if the responses come from q.
  per_token  nats/token  The Rao-Blackwell entropy per token, ΣR/ΣT: the entropy that tables show.
  rb_by_prompt  nats/response  For each prompt the mean Rao-Blackwell entropy of its responses.
  per_token_by_prompt  nats/token  What each prompt adds to the entropy per token.
  surprises  count  How many tokens were less likely than not; with few of them no standard error holds.

Parts
  layer  section  δH₁ by layer.
  module  section  δH₁ by the kind of module.
  factor  section  δH₁ by what is trained of a module: the factors of LoRA, or the whole weight.

UStatistic
  u_cross  nats/response/η  The mean of X_nᵀPY_m over pairs of different units: minus the slope of the entropy.
  zeta1_plugin  (nats/response/η)²  The variance ζ̂₁ of the row means.
  zeta1_jackknife  (nats/response/η)²  The same from the jackknife; null with fewer than 3 units.
  se_plugin  nats/response/η  The standard error √(4ζ̂₁/U).
  se_jackknife  nats/response/η  The jackknife's standard error; null with fewer than 3 units.
  var_unbiased  (nats/response/η)²  An unbiased estimate of the variance of U_cross, which may be negative; null with
      fewer than 5 units, and over several processes beyond `first_order.max_pairs_gib`.

FirstOrderSection
  mode  name  `exact`: a unit is a prompt; `block`: a unit is a block of prompts.
  estimator  name  Which estimator of the entropy gradient X is: `naive`, or a Rao-Blackwell one.
  num_units  count  How many units U there are.
  interval  nats/response/η  A 95 % interval of U_cross by Student's t.
  bars_dot  nats/response/η  X̄ᵀPȲ, the product of the means, which still holds the diagonal.
  bars_dot_plain  ratio  X̄ᵀȲ, the same product without P.
  diag_sum  nats/response/η  Σ_n X_nᵀPY_n, the diagonal that U_cross leaves out.
  row_means  nats/response/η  For each unit the mean r_n of its products with the other units; their mean is U_cross.
  norm_x_sum  gradient  ‖ΣX_n‖, the norm of the summed entropy gradients.
  norm_y_sum  gradient  ‖ΣY_n‖, the norm of the summed gradients of the objective.
  lr  η  The learning rate in use.
  lr_source  name  Where the learning rate comes from: the optimizer's file, its `initial_lr`, or the configuration.
  delta_h1  nats/response  δH₁ = −lr·U_cross: the first-order change of the entropy by a fresh preconditioned gradient
      step, without momentum and decay.
  delta_h1_se  nats/response  Its standard error; null for a single unit.
  delta_h1_by_unit  nats/response  What each unit adds to δH₁; the entries add up to it.
  delta_h1_parts  section  δH₁ split over groups of tensors, three times.

TwoBatchSection
  bars_dot  nats/response/η  X̄_EᵀPȲ_U, the product of the mean gradients of the two batches.
  delta_h1  nats/response  −lr·X̄_EᵀPȲ_U: the change by a fresh gradient step, from two independent batches.
  delta_h1_se  nats/response  Its standard error over both batches; null if U is a single unit.
  conditional_se  nats/response  The standard error with the update held fixed.
  projections  nats/response/η  s_k = X_kᵀPȲ_U of every unit k of the E batch.
  update_projections  nats/response/η  t_m = X̄_EᵀPY_m of every unit m of the U batch.
  interaction  (nats/response/η)²  The variance of X_kᵀPY_m that neither rows nor columns explain; null over several
      processes beyond `first_order.max_pairs_gib`.
  delta_h1_parts  section  δH₁ split over groups of tensors, three times.

StepAgreement
  cosine_with_optimizer_step  cosine  The smallest cosine between v and a step of torch's own optimizer, over the
      whole and over every tensor.
  norm_ratio_with_optimizer_step  ratio  The ratio ‖v‖/‖step‖ that is furthest from 1, over the same.
  worst_parameter  name  The tensor in which the two differ the most.

UpdateSection
  lr  η  The learning rate in use: the next step is lr·v.
  norm  θ/η  ‖v‖, the length of the update direction.
  norm_v0  θ/η  ‖v₀‖, the length of the part that momentum and weight decay decide.
  grad_norm  gradient  The norm of the gradient of the U batch, before clipping.
  clip_factor  ratio  What clipping multiplied the gradient by; 1 if it did nothing.
  grad_norm_logged  gradient  The last gradient norm that the trainer wrote down, of an earlier step.
  momentum_share  ratio  v₀ᵀv/‖v‖²: how much of v was decided before this batch.
  delta_h1_per_lr_naive  nats/response/η  The slope ∇Hᵀv of the entropy along v, by the naive estimator.
  delta_h1_per_lr_naive_se  nats/response/η  Its standard error.
  delta_h1_per_lr_rb  nats/response/η  The slope ∇Hᵀv by the Rao-Blackwell estimator with `baseline`; predictions use
      it.
  delta_h1_per_lr_rb_se  nats/response/η  Its standard error.
  delta_h1_per_lr_cross  nats/response/η  The cross-fitted slope, if one batch serves as both; else null.
  delta_h1_per_lr_cross_se  nats/response/η  Its standard error.
  delta_h1_per_lr_cross_per_token  nats/token/η  The cross-fitted slope per token; null with two batches.
  delta_h1_per_lr_cross_per_token_se  nats/token/η  Its standard error.
  estimators  nats/response/η  The slope by every estimator of the entropy gradient, each with its standard error.
  baseline  name  The baseline of the estimator in use.
  slope_of_v0  nats/response/η  −X̄ᵀv₀: what momentum and weight decay add to the slope.
  slope_by_unit  nats/response/η  What each unit of the U batch adds to the slope.
  slope_rounding  nats/response/η  How much rounding can change the slope.
  num_kinked  count  For how many responses the step of the second derivative was shortened, because of a jump or a
      kink.
  spread_over_batches  nats/response  The standard deviation of lr·slope over U batches of this size; null for a
      single unit.
  slope_of_v0_per_token  nats/token/η  The part of the slope per token that momentum and weight decay decide.
  slope_by_unit_per_token  nats/token/η  What each prompt of the U batch adds to the slope per token.
  slope_rounding_per_token  nats/token/η  What the precision leaves of the slope per token.
  spread_over_batches_per_token  nats/token  The standard deviation over U batches of this size, per token; null for a
      single unit.
  delta_h1_per_lr_per_token  nats/token/η  The slope of the entropy per token along v.
  delta_h1_per_lr_per_token_se  nats/token/η  Its standard error.
  slope_of_change  nats/response/η  The derivative at η = 0 of the very estimator behind `delta_h_rb`, on these
      responses.
  slope_of_change_size  nats/response/η  The sum of the absolute values of its terms.
  slope_of_change_rounding  nats/response/η  How much rounding can change it.
  slope_of_change_per_token  nats/token/η  The derivative at η = 0 of the estimator behind `delta_h_per_token`.
  curvature_of_change  nats/response/η²  The second derivative at η = 0 of the estimator behind `delta_h_rb`.
  curvature_of_change_size  nats/response/η²  The sum of the absolute values of its terms.
  curvature  nats/response/η²  The second derivative vᵀ∇²Hv of the entropy along v.
  curvature_se  nats/response/η²  Its standard error.
  curvature_per_token  nats/token/η²  The second derivative of the entropy per token along v.
  curvature_per_token_se  nats/token/η²  Its standard error.
  eta_star  η  2·|slope|/|curvature|, the step at which second order is as large as first; null if the curvature is
      within its noise.

RealUpdateSection
  path  name  The checkpoint that the trainer wrote after its step.
  steps_between  step  How many steps lie between the two checkpoints.
  own_batch  flag  Whether the U batch is the batch of that very step.
  cosine  cosine  Between v and (θ′ − θ)/lr, the step that the trainer made.
  norm_ratio  ratio  ‖v‖ over the norm of the trainer's step.
  rounding  ratio  How far the stored number formats alone can move the two, relative to their size.
  gradient_cosine  cosine  Between the clipped gradient and the trainer's, which the two first moments reveal; null
      where several steps lie between.
  gradient_norm_ratio  ratio  The norm of our gradient over that of the trainer's.
  gradient_rounding  ratio  How far the stored number formats alone can move the gradients.
  clip_factor  ratio  What clipping multiplied the trainer's gradient by; null if nothing tells it.
  logged_grad_norm  gradient  The norm before clipping that the trainer logged.
  delta_h  nats/response  The change of the entropy along the trainer's step, by importance sampling.
  delta_h_se  nats/response  Its standard error.
  delta_h_per_token  nats/token  The same per token.
  delta_h_per_token_se  nats/token  Its standard error.
  predicted  nats/response  The change that slope and curvature along the trainer's step predict.
  predicted_se  nats/response  Its standard error.
  predicted_per_token  nats/token  The same per token.
  predicted_per_token_se  nats/token  Its standard error.

Look
  num_prompts  count  How many prompts the E batch had.
  se  nats/token  The standard error of the change that they predicted.

ResolutionSection
  per_token  nats/token  The change that the run resolves: two standard errors of the predicted one.
  per_response  nats/response  The same per response.
  prompts_needed  count  About how many prompts would make the predicted change two standard errors; null if it is 0.
  next_step  nats/token  A 95 % interval of the change by a step with another U batch of this size; null if the U
      batch was given or has one prompt.
  target_se  nats/token  The standard error that was asked for; null if none was.
  looks  section  The sizes of the E batch at which the standard error was looked at.

PredictorsSection
  cov_logp_advantage  nats  Minus the covariance of log p and the advantage over the tokens of the U batch, before κ.
  cov_logp_advantage_se  nats  Its standard error over prompts; null for one prompt.
  steer  nats  STEER's predictor over the tokens of the U batch, before κ.
  steer_se  nats  Its standard error over prompts; null for one prompt.
  wang  nats  The predictor of Wang et al. over the tokens of the U batch, before κ.
  wang_se  nats  Its standard error over prompts; null for one prompt.
  of_entropies  nats/token  The part of lr·slope by which the entropies of the steps change.
  of_entropies_se  nats/token  Its standard error.
  of_visits  nats/token  The part of lr·slope by which other steps are visited.
  of_visits_se  nats/token  Its standard error.
  of_entropies_per_response  nats/response  The part of the entropies per response.
  of_entropies_per_response_se  nats/response  Its standard error.
  of_visits_per_response  nats/response  The part of the visits per response.
  of_visits_per_response_se  nats/response  Its standard error.

Reweighting
  eta  η  The size of the step; the row at η = lr is the optimizer's next step.
  ess  count  The effective sample size (Σw)²/Σw² of the weights in use.
  ess_fraction  share  The effective sample size over the number of responses.
  unclipped_ess_fraction  share  The same of the weights before clipping; the verdict uses this one.
  pareto_k  ratio  k̂, the tail shape of the largest weights; null if it means nothing.
  clip_fraction  share  The share of weights that were clipped.
  log_weight_min  nats/response  The smallest log-weight, log p at θ + ηv minus log q.
  log_weight_median  nats/response  The median log-weight.
  log_weight_max  nats/response  The largest log-weight.
  method  name  How the responses were made to stand for those at θ + ηv: `snis`, or a fallback, `psis` or `resample`.
  reliable  flag  Whether the change at this η is to be believed.
  restricted  flag  Whether the change is that of π cut to its nucleus, because top_p < 1.

EntropyChangeRow
  delta_h  nats  The realised change by importance sampling of whole responses, naive.
  delta_h_se  nats  Its standard error.
  delta_h_rb  nats  The realised change by importance sampling of whole responses, Rao-Blackwell.
  delta_h_rb_se  nats  Its standard error.
  delta_h_rb_by_prompt  nats  What each prompt adds to it.
  delta_h_interval  nats  A 95 % interval of `delta_h`.
  delta_h_rb_interval  nats  A 95 % interval of `delta_h_rb`.
  delta_h_per_token  nats/token  The realised change per token by importance sampling, Rao-Blackwell.
  delta_h_per_token_se  nats/token  Its standard error.
  delta_h_per_token_interval  nats/token  Its 95 % interval.
  delta_h_per_token_naive  nats/token  The same, naive.
  delta_h_per_token_naive_se  nats/token  Its standard error.
  delta_h_pd  nats  The realised change token by token, in the performance-difference form: the one that is reported
      where it can be.
  delta_h_pd_se  nats  Its standard error.
  delta_h_pd_interval  nats  Its 95 % interval.
  delta_h_pd_by_prompt  nats  What each prompt adds to it.
  delta_h_per_token_pd  nats/token  The realised change per token in the performance-difference form.
  delta_h_per_token_pd_se  nats/token  Its standard error.
  delta_h_per_token_pd_interval  nats/token  Its 95 % interval.
  predicted  nats  η·slope + ½η²·curvature: what first and second order say; null if top_p < 1.
  predicted_se  nats  Its standard error.
  difference  nats  The realised change minus the predicted one.
  difference_se  nats  The standard error of the difference; it is small, since both share their responses.
  ratio  ratio  The realised change over the predicted one.
  in_range  flag  Whether η is small and the weights are healthy enough to compare the two.
  predicted_per_token  nats/token  The predicted change per token.
  predicted_per_token_se  nats/token  Its standard error.
  difference_per_token  nats/token  The realised change per token minus the predicted one.
  difference_per_token_se  nats/token  The standard error of that difference.

RealStepSection
  delta_h  nats/response  ΔĤ_RB at θ + lr·v by functional override, in true float64, on a few prompts.
  virtual_difference  nats/response  How far it is off with θ + lr·v written into a copy; it must be 0.
  virtual_undone  flag  Whether θ was back bit for bit after that.
  real_difference  nats/response  How far it is off after a real step of torch's own optimizer.
  real_relative  ratio  The same over the size of the terms that rounding acts on.
  real_seq_logp  ratio  The largest relative difference of a response's log-probability after that step.

TaylorTests
  taylor_order  ratio  The order of the remainder after the first derivative; it must be 2.
  logit_slope  ratio  The slope of log ‖Δlogits‖ against log η; it must be 1.
  logit_monotone  flag  Whether ‖Δlogits‖ grows with η.
  delta_h_slope  ratio  The slope of log |ΔH| against log η at small η; it must be 1.
  identity_error_naive  ratio  How far the naive change's derivative is off a finite difference, over the size of its
      terms.
  identity_error_rb  ratio  The same for the Rao-Blackwell change.
  identity_error_per_token  ratio  The same for the change per token.
  trusted_eta_min  η  The smallest η from which the configured precision resolves the change.
  trusted_eta_max  η  The largest η up to which it does.
  taylor_eta_min  η  The smallest η of the tests.
  taylor_eta_max  η  The largest η of the tests.
  taylor_radius  η  The step at which higher orders take over, from the derivatives of the change.
  taylor_slope  nats/response/η  The derivative of the change at η = 0 on these few responses.

ContinuitySection
  zero_check_max_abs  nats/token  The largest change of a logit at η = 0; it must be 0.
  zero_check_bitwise  flag  Whether all logits are bit for bit the same at η = 0.
  eta_main  η  The larger of the two steps of the scaling tests.
  eta_tiny  η  The smaller of the two.
  param_ratio  ratio  How the change of θ follows η between the two steps; 1 is perfect.
  logit_ratio  ratio  How the change of the logits follows η between them; 1 is perfect.

WorstCase
  worst  nats/token  The largest difference that was found, of a log-probability, an entropy or a logit; without a
      unit for `scaling`.
  bound  nats/token  What rounding allows there, in the same unit.
  example  text  Where it was found.

InvarianceOfCases
  padding  section  What padding changes in a score.
  batch  section  What neighbours in the batch change in a score.
  chunk  section  What reading logits in pieces changes in a score.
  zero_step  section  What a step of η = 0 changes in a logit, on drawn cases; null without any.
  scaling  section  How far the logits are from following η, on drawn cases; null without any.
  num_examples  count  How many cases were drawn.

InvarianceSection
  precision  section  What the configured precision changes against true float64.

CacheSection
  read  text  How sampling reads rows: over the cache, prompts of one length at a time, or from whole rows.
  over_cache  section  How far logits over the cache are from those of whole rows; null without a usable cache.
  instead  section  The same for what sampling does in its place; null if it uses the cache.
  why  text  Why sampling does not use the cache; null if it does.

SamplerParitySection
  num_tokens  count  How many tokens have a log-probability that the sampler reported.
  mean_abs_difference  nats/token  The mean of |log p of the sampler − log q here|.
  max_abs_difference  nats/token  The largest of them.
  kl  nats/token  The mean of log p of the sampler − log q here, an estimate of KL(sampler ‖ q).
  k3  nats/token  The same by the estimator ρ − 1 − log ρ, which is never negative.
  pearson  ratio  The correlation of the two probabilities; null if one of them does not vary.
  ratio_min  ratio  The smallest ρ, which is q here over p of the sampler.
  ratio_mean  ratio  The mean of ρ, which is 1 in expectation.
  ratio_max  ratio  The largest ρ.
  share_outside  share  The share of tokens whose ρ lies outside [0.9, 1.1].

RegistrySection
  num_tensors  count  How many trainable tensors there are.
  num_parameters  count  How many numbers they hold.
  x_coverage  share  The share of these tensors that get a gradient other than 0 from the entropy.
  y_coverage  share  The share of these tensors that get a gradient other than 0 from the objective.
  uncovered  name  The tensors that lack one of the two.
  explained  text  For tensors without a gradient whose reason is known, the reason.
  taken_as_frozen  name  Tensors of a full model that the optimizer has no state of; they do not count as trainable.

MomentsMatch
  exchanged  SE  The strongest evidence that two tensors of one shape have each other's second moments; null if
      nothing can be compared.
  exchanged_pair  name  The two tensors with that evidence.
  num_pairs  count  How many pairs of tensors of one shape were compared.
  num_undecided  count  In how many of these pairs an exchange would not be seen.
  undecided  name  The tensors of those pairs, the smallest first.

PreconditionerSection
  num_tensors  count  Over how many tensors P was made.
  missing  name  The tensors that have no second moment.
  num_nonfinite  count  How many entries of P are not finite.
  smallest  1/gradient  The smallest entry of P.
  largest  1/gradient  The largest entry of P.
  difference_from_torch  ratio  The largest relative difference from what torch's own Adam divides by.

IntegritySection
  checksum_before  digest  The checksum of the live model before the run.
  checksum_after  digest  The checksum of the live model after the run; it must be the same.
  copies_modified  count  How many of the probe's own copies did not keep their values.
  buffers_overridden  name  The buffers that an override replaced; there must be none.

DistributedSection
  world_size  count  How many processes measured together.
  sharding  name  What they held: `prompt`, a model each and the gradients of their own prompts, or `parameter`, all of
      it together, once.
  bytes_sent_per_rank  bytes  What each process sent for sums of gradients, counts and scalars.
  bytes_of_prompts_per_rank  bytes  What each process sent for values of single prompts, responses and tokens.

StageMemory
  at_start  bytes  What was held when the stage began.
  peak  bytes  The most that was held during the stage.

MemorySection
  counted  name  What is counted: `resident` memory of the process, or memory `allocated` on the device.
  stages  section  For each stage, what was held at its start and at most.
  limit  bytes  The limit of memory that was set; null without one.
  expected  bytes  The most that was expected when the sizes of batches were chosen; null without a limit.
  tf_batch_size  count  How many rows are scored at once.
  logits_at_once  count  How many logits are held at once; null if no limit was set.
  recompute  flag  Whether decoder layers are run again in gradients instead of keeping their graph.
  prompts_unshared  text  Why scoring reads a prompt with every response; null if it reads each prompt once.
  attention  name  How the longest rows' attention is differentiated: `short` rows whole, long ones in `blocks` of
      queries; `whole` if the model multiplies queries and keys itself.
  second_order_tokens  count  The most tokens of a row in second derivatives, if longer rows were shortened for them;
      null if none was.
  left_out  text  Why second derivatives were left out; null if the limit has room for them.

Verdict
  criterion  name  The criterion that was asked.
  family  name  The family it belongs to, which is also its marker.
  status  name  `pass`, `fail`, `inconclusive` or `not_applicable`.
  value  value  What was found; null if nothing was measured.
  limit  value  What it was compared with; null if there is no limit.
  hint  text  What the verdict means and what to do.
  unseen  flag  Whether the criterion would see nothing here, because rounding, kinks or a missing derivative hide it.
  unit  name  The unit of value and limit, if they are not values of the quantity itself.

BaselineSection
  name  name  The checkpoint whose report is the baseline.
  fingerprint  digest  The fingerprint of that checkpoint.
  not_chosen  text  What of its prompts and rewards nobody chose.
  quantities  section  What gates compare with, each with its standard error.

ProbeReport
  schema_version  count  The version of this schema.
  probe_version  name  The version of the package that wrote the report.
  checkpoint  section  Which checkpoint was measured, and what it holds.
  config  section  The configuration in force, every key resolved.
  left_out  name  The parts of the measurement that the budget left out.
  recipe  section  Whose update this is: how the trainer makes a gradient from a batch.
  batch  section  The E batch, on which the entropy is measured.
  update_batch  section  The U batch, from which the update comes.
  sampling  section  Whether the seed decides what is sampled; null if nothing was sampled here.
  entropy  section  The entropy of the policy at the checkpoint.
  first_order  section  The first-order term of a fresh gradient step, from only the U batch; null if the
      optimizer is not Adam.
  two_batch  section  The same term from both batches; null if one batch serves as both.
  update  section  The optimizer's own next step v, and the slope and curvature of the entropy along it.
  resolution  section  What the noise resolves of the next step; null if no change is predicted.
  predictors  section  What other authors' formulas tell of the next step, and the two parts of the slope.
  entropy_change  section  The realised and the predicted change of the entropy, one row for every η.
  continuity  section  Whether η = 0 changes nothing, and whether small steps behave as their derivatives say.
  invariance  section  Whether padding, neighbours and pieces of logits leave scores as they are.
  cache  section  Whether sampling reads the same logits that are scored.
  sampler_parity  section  Whether the engine that sampled agrees with these scores; null without its
      log-probabilities.
  witness  ratio  Numbers by another way on a few prompts: U_cross twice, and relative differences of X, of Y, of
      projections and of second derivatives.
  real_step  section  The change after a step that was really taken on a copy; null if there is no memory for one.
  real_step_missing  text  Why `real_step` is null.
  real_update  section  The step that the trainer really made, beside v; null without the next checkpoint.
  real_update_missing  text  What was wrong with the next checkpoint.
  registry  section  Which tensors are trained, and whether each gets a gradient.
  preconditioner  section  P = 1/(√v̂ + ε) over all trainable tensors.
  integrity  section  Whether the live model is what it was.
  verdicts  section  What each criterion concluded; empty if nobody judged.
  baseline  section  The report that gates compare with; null without one.
  distributed  section  What several processes sent each other; null for one process.
  environment  name  The versions of Python and of the libraries, the device, and the number of threads.
  memory  section  How much memory each stage held.
  timing  seconds  How long each stage took.
"""
