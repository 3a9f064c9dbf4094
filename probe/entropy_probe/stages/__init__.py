"""The pipeline, one step per file; each makes its own section of the report. `pipeline/` calls them in order.

batches      E and U, from responses/: sampled, or read from files
scores       log p, log q and entropies of every token;   entropy  the entropy at θ
shared_prompts  responses read behind prompts that are read once
share        the part of a batch that a process works on
gradients/   X and Y of every unit
first_order  U_cross and δH₁;   update  P and the direction v;   moments  P beside the gradients
reference    log p of the reference of a KL term;   real_update  the step that the trainer made
derivatives  D_v at every token;   slopes  slope and curvature along v;   entropy_change  ΔH(η)
predictors   what others predict the change by, and the parts of the slope
witnesses/   the same numbers by another way;   memory/  a limit of memory
moved        θ + ηv for a pass of all processes
made         vectors as long as the parameters, tensor by tensor where they are used
rounding     what another order of summation may change
"""
