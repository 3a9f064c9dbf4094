"""The same number by another way, and properties that a right number must have.

witness      gradients by a plain loop, curvature by a second derivative
update_by_loop  the weights of Y, token by token
projections  X_kᵀPȲ in three ways
torch_step   v and P beside a step of torch's own optimizer
real_step    ΔH after a step that is taken
continuity   η = 0 and small η;   taylor  the order of convergence of the Taylor remainder
invariance   padding, neighbours and pieces of logits that must change nothing;   properties  the same on drawn cases
shortened    a part of long rows, for second derivatives
cache        sampling's logits beside those that are scored
"""
