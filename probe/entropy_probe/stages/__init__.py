"""The pipeline, one step per file; each makes its own section of the report. `entropy_probe.run` calls them in order.

batches      E and U, from responses/: sampled, or read from files
units        what a unit of the U-statistic is;   share  the part of a batch that a process works on
scores       log p, log q and entropies of every token;   entropy  the entropy at θ
payloads     what X_n and Y_n are made of;   gradients  X and Y of every unit;   products  X_uᵀPY_v of them
coverage     the parameters that they reach;   measured  all that is known of both batches
first_order  U_cross and δH₁;   update  P and the direction v;   moments  P beside the gradients
derivatives  D_v at every token;   slopes  slope and curvature along v;   entropy_change  ΔH(η)
witnesses/   the same numbers by another way;   integrity  nothing was changed
clock        seconds and memory of each stage;   memory/  a limit of memory
checkpoint, environment  what was measured, and on what
"""
