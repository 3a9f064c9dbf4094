"""What every key of the configuration is, under the class of `config/` that has it: name, unit, one sentence."""

from __future__ import annotations

FIELDS = """
SequenceConfig
  generation  section  How responses are sampled.
  precision  section  In which number formats the measurement runs.

ProbeConfig
  budget  name  How much is computed: `smoke`, `standard` or `full`. What you set yourself stays.
  device  name  Where it runs: `cpu`, `cuda` or `cuda:N`.
  memory_limit  bytes  Memory that smaller batches keep to, such as `8GiB`; null is no limit.
  recompute  name  Whether decoder layers are run again in gradients instead of keeping their graph: `always`, `never`,
      or `auto`, where they do not fit the memory limit otherwise.
  share_prompts  name  Whether scoring reads a prompt once for all its responses: `auto`, where that saves tokens and
      gives the same logits, or `never`.
  sharding  name  What several processes hold: `prompt`, a model each and the gradients of their own prompts;
      `parameter`, all of it together, once, in the memory of one machine; or `auto`, the second for a full fine-tune
      that does not fit once for each of them.
  device_map  name  For a model that outgrows one device: `auto`, `balanced`, `balanced_low_0`, `sequential`, or a map
      of module names to devices.
  max_memory  bytes  With `device_map`, how much each device may take, such as `{0: 20GiB, cpu: 60GiB}`.
  offload_folder  name  The folder for what outgrows the memory: gradients, and with `device_map` parameters; null is a
      temporary one.
  batch  section  Prompts and rewards of both batches.
  first_order  section  The first-order term and the gradients that it is made of.
  true_delta_h  section  The realised change: which steps, and when its weights are healthy.
  update  section  An older spelling of `recipe.max_grad_norm`.
  recipe  section  Whose update: how the trainer makes a gradient from a batch.
  reference_model  name  The folder of the reference model of a KL term; null takes an adapter's base.
  invariance  section  How many cases are drawn for the property checks.
  limits  section  Limits of criteria that differ from their defaults, and bounds of gates, which are off without.
  allow_inconclusive  name  Criteria that may end inconclusive without failing the run.

GenerationConfig
  temperature  ratio  What logits are divided by; the policy is the softmax of the quotient.
  top_p  share  The nucleus that is sampled from; the probe measures best at 1.
  max_new_tokens  count  The length limit of a response.
  stop  text  A response ends with the token that completes one of these strings.
  do_sample  flag  Always true: a greedy response has no probability to weigh.
  num_return_sequences  count  Responses of each prompt, G; at least 2, as a response's baseline comes from the
      others.
  gen_batch_size  count  How many rows are sampled at once. The responses do not depend on it.
  tf_batch_size  count  How many rows are scored at once.
  rb_requires_grad  flag  Of `SequenceProcessor` alone: whether entropies carry a graph.

PrecisionSection
  allow_tf32  flag  Whether matrix products in float32 may be rounded to TF32 on NVIDIA hardware.
  matmul_precision  name  torch's setting of that name; it takes effect only with `allow_tf32`.
  deterministic_probe  flag  Whether torch's deterministic algorithms are used.
  entropy_fp64  flag  Whether entropies are added up in float64.
  func_override  section  A spelling of `precision.dtype`.
  tf_nograd  section  A spelling of `precision.dtype`.
  tf_withgrad  section  A spelling of `precision.dtype`.
  dtype  name  The number format of θ, of v and of every forward: `float32` or `float64`.

FuncOverrideSection
  autocast  flag  Always false.
  cast_params  flag  Always true: θ and v are upcast before they are added.
  dtype  name  A spelling of `precision.dtype`.

TeacherForcingSection
  autocast  flag  Always false.
  dtype  name  A spelling of `precision.dtype`.
  cast_logits_fp32  flag  Always true: logits are in float32 or wider.

BatchConfig
  num_prompts  count  Prompts of the E batch, on which the entropy is measured.
  num_update_prompts  count  Prompts of the U batch, from which the update comes.
  dataset  name  Where prompts come from: `arithmetic`, `jsonl:PATH`, `gsm8k_r1_template:PATH`, the name of an entry
      point, or `module:function`.
  reward  name  What rewards a response: `tag_pref`, `stand_in`, the name of an entry point, `module:function`, or a
      list of them.
  reward_weights  ratio  With a list of rewards, the weight of each in their sum; null is 1 each.
  system_prompt  text  A system message that goes before every prompt that has none.
  chat_template_kwargs  section  More arguments of the tokenizer's chat template, such as `{enable_thinking: false}`.
  split  name  Which split of the dataset: `train` or `test`.
  with_replacement  flag  Whether a prompt may be drawn twice.
  seed  count  One seed for all sampling.
  target_se  nats/token  Prompts are added to E until the predicted change has this standard error; or `2se`, half of
      that change; null adds none.
  max_prompts  count  How many prompts E may have in the end, if `target_se` adds some.

FirstOrderConfig
  mode  name  `exact`: a unit of the U-statistic is a prompt. `block`: it is a block of prompts.
  num_blocks  count  With `block`, how many blocks.
  advantage  name  An older spelling of parts of `recipe`: `centered`, `grpo` or `raw`.
  loss  name  An older spelling of `recipe.normaliser`: `lmax`, `sequence_mean`, `token_mean` or `constant`.
  estimator  name  The estimator of the entropy gradient X: `naive` or `rb`.
  baseline  name  What Rao-Blackwell estimates subtract; `auto` is `hk_group`.
  missing_state  name  What happens if a tensor lacks Adam state: `raise` an error, or take P as the `identity`.
  lr  η  The learning rate; null takes the optimizer's own.
  max_gradient_gib  ratio  How many GiB the gradients of single prompts may take; beyond that, prompts are put into
      blocks. Those of two blocks may take more: half of the free memory, or they stand on disk.
  max_pairs_gib  ratio  Of several processes: up to how many GiB of gradients go round, several times, so that the
      products of all pairs of prompts are known; 0 is never.

TrueDeltaHConfig
  etas  η  The steps at which the change is measured; `auto` chooses three from the
      learning rate down and both signs of each, `fine` five.
  clip_log_weight  nats/response  Log-weights are clipped to this size; null is no clipping.
  normalize  name  Whether changes are `per_sequence` or `per_token`.
  min_ess_fraction  share  The limit of the criterion `ess`: the least effective sample size over the number of
      responses.
  max_pareto_k  ratio  The limit of the criterion `pareto_k`.
  fallback  name  What is done beyond these limits: `none`, `psis` smooths weights, `resample` draws fresh responses.

UpdateConfig
  max_grad_norm  gradient  An older spelling of `recipe.max_grad_norm`.

InvarianceConfig
  max_examples  count  How many cases are drawn.

RecipeConfig
  name  name  The name of a recipe; `auto` reads the checkpoint's own training settings.

Recipe
  normaliser  name  What the loss of a batch is divided by.
  constant  count  With `normaliser: constant`, the constant; null takes `generation.max_new_tokens`.
  micro_batch_size  count  How many responses a micro-batch has; null is all of them.
  baseline  name  What is taken off a reward: the `mean` of its prompt, that of the other responses (`leave_one_out`),
      or nothing.
  scale  name  The standard deviation that an advantage is divided by: of the `group`, of the other responses, of the
      `batch`, of all `advantages`, or none.
  ddof  count  0 or 1: the standard deviation divides by n or by n − 1.
  eps  reward  What is added to the standard deviation.
  undivided_at_zero  flag  Whether an advantage stays as it is if the standard deviation is 0.
  whiten  flag  Whether the advantages of all tokens are centred and divided by their standard deviation.
  drop  name  Which responses do not count: those of prompts with equal rewards (`zero_std`), or with advantage 0
      (`zero_advantage`).
  mask_truncated  flag  Whether responses without an EOS have no weight.
  top_entropy_quantile  share  The share of tokens that the advantage acts on, those of the largest entropy.
  factor  ratio  A constant on every advantage.
  importance  name  Whether tokens or responses are weighed by π over the sampler, and how that is cut.
  importance_cap  ratio  Where that ratio is cut.
  kl_coef  ratio  The coefficient β of the KL term.
  kl  name  The estimator of the KL term: `k1`, `k2`, `k3` or `k3_ratio`.
  kl_in  name  Where the KL term stands: in the `loss`, the `reward` or the `return`.
  entropy_coef  ratio  The coefficient of an entropy bonus.
  entropy_normaliser  name  What the entropy bonus is divided by: the `same` as the loss, or the tokens of a
      micro-batch.
  max_grad_norm  gradient  The norm to which the gradient is clipped; null is no clipping.
"""
