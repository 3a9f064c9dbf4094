"""What is measured, in order: what one step of the pipeline hands to the next, and what a whole run is watched by.

prepared   a checkpoint bound to the configured precision, and its two batches
measured   the models, and scores and gradients of both batches
growth     more prompts of E, until the predicted change is as certain as asked for
next_step  all that needs Adam's second moment: U_cross and δH₁, v, slopes along it, ΔH(η)
witnessed  gradients, projections and curvature by other ways
evidence   what the figures are made of;   again  what the folder itself says, read and scored afresh
clock      seconds and memory of each stage;   integrity  nothing was changed
checkpoint, environment  what was measured, and on what
"""
