"""Per-unit gradients X_u and Y_u, from what they are made of to what they are multiplied with.

units           prompts, or blocks of prompts where gradients of all do not fit
payloads        weights of responses and coefficients of tokens: what X_n and Y_n are made of
unit_gradients  X and Y of every unit, in one forward and one backward where that can be
products        X_uᵀPY_v by name, and norms
coverage        the parameters that X and Y reach
"""
