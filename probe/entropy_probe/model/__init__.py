"""Everything that knows a network or a file of weights; no statistics.

checkpoint/   a folder on disk → Checkpoint(model, tokenizer, adam, info)
registry      the one list of parameters, keyed by name
precision     float64 that is float64, autocast off, derivatives that are derivatives
overrides     θ + ηv as a mapping of names, without touching the module
forward       BoundModel: the only place where the network is called
capture       weighted sums of per-row gradients from one forward and one backward pass
output_layer  a causal language model as a backbone and what stands behind it, which works row by row
"""
