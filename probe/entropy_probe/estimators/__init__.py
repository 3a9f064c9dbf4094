"""Pure mathematics: tensors in, numbers out. Nothing here knows a network or a file, and of the configuration the
parts of a recipe alone.

    policy      logits → log π, log q, entropies of π and of q
    token_stats logits → diagnostics of every step and response, baseline features
    placing     logits → the mass before a sampled token, for the probability integral transform
    ustat       the matrix X_nᵀPY_m → U_cross, its standard errors
    two_batch   the matrix of two independent batches → bars_dot, its standard errors
    importance  log-weights and payloads → ΔĤ, ESS, cluster-robust standard errors
    baselines   entropies of every step → R_{≥t} − b_t, the coefficients of ∇log p_t
    slope       per-token directional derivatives → slope and curvature of the entropy, per prompt
    performance_difference  what a step changes at every token → ΔH, and its slope and curvature along v
    predictors  scores and advantages → predictors that need no gradient;   skill  how well they told changes
    prediction  slope and curvature → the predicted change, η*;   taylor  orders and identities of ΔH(η)
    resolution  a standard error → what it resolves, how many more prompts
    parity      the sampler's log-probabilities against teacher forcing;   moments  moments against gradients
    adam        moments and hyper-parameters → P, and the update direction v
    advantages  log p of responses → their weights in X
    update_weights  rewards, scores and a recipe → A, and the weights of tokens in Y

Every quantity is in nats. Shapes: B prompts, G responses of each, T tokens, U units (prompts or blocks of prompts).
"""
