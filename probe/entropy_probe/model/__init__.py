"""Everything that knows a network or a file of weights; no statistics.

checkpoint/   a folder on disk → Checkpoint(model, tokenizer, adam, info)
registry      the one list of parameters, keyed by name
switches      what training leaves in a configuration, and a measurement does without
precision     float64 that is float64, autocast off, derivatives that are derivatives
overrides     θ + ηv as a mapping of names, without touching the module
forward       BoundModel: where the network is called, for θ and θ + ηv alike
capture       weighted sums of per-row gradients from one forward and one backward pass
prompt_cache  keys and values of prompts that are read once for all their responses
attention     long rows in blocks of queries;   recompute  layers that are run again in a backward pass
beside        a copy that shares a live model's memory;   own_forward  a copy calls itself
live_step     the step that a live optimizer is about to take
sharded       a live model that FSDP2 has spread over processes: its shards, and the whole of it in one of them
lending       parameters that are elsewhere, or in another dtype, lent for the length of a forward
placement     the parts of a model that outgrows one device;   disk  tensors whose data stands in a file
device      the device that a name means
parts         which layer and which kind of module a parameter belongs to
quiet         transformers without its progress bars
output_layer  a causal language model as a backbone and what stands behind it, which works row by row
"""
