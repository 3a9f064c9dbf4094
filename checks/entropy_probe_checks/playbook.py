"""What to do, in order, where a criterion or a gate does not pass: beside what a failure means.

Of a gate by its name, of a criterion by its family, and what helps where more data could decide.
"""

from __future__ import annotations

GATES: dict[str, tuple[str, ...]] = {
    "entropy": (
        "Stop the run, or let it go no further than this checkpoint.",
        "Look in the responses, and in the figure over positions, for the places where entropy is left: one phrase may "
        "have won.",
        "Go back to the last checkpoint that passed, and train on with a smaller learning rate, a higher upper clip, "
        "larger groups, or a KL or entropy term.",
    ),
    "predicted_change": (
        "Do not take the next step as it is.",
        "Look at how much of the step is momentum. That part is taken whatever the next batch is.",
        "Lower the learning rate by the factor by which the limit is missed, and measure again with first_order.lr.",
    ),
    "realised_ratio": (
        "Compare lr with η* in the report: at η*, the second order is as large as the first.",
        "Lower the learning rate below η*, or use only the realised change.",
    ),
    "zero_advantage": (
        "Leave out prompts that are always or never solved, or draw more responses of each.",
        "Look in the table of update prompts for those whose rewards differ.",
    ),
    "adam_step": (
        "Copy the optimizer, the weights and trainer_state.json from the same step.",
        "If the optimizer was started anew on purpose, leave this gate off.",
    ),
    "finite_moments": (
        "Do not continue the training: the next step writes NaN.",
        "Go back to an earlier checkpoint, and train with gradient clipping or a smaller learning rate.",
    ),
    "reward": (
        "Read the responses: a lost format, empty answers and a reward that is no longer computed look different.",
        "Compare with a run of the previous checkpoint on the same prompts (--probe-baseline).",
    ),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "zero_check": (
        "Remove your own wrappers, hooks and autocast, and measure again.",
        "Until this check passes, do not believe any change of the entropy in this report.",
    ),
    "scaling": (
        "Set precision to float64 for all passes and run again. A check that then passes had failed by rounding.",
        "If a check still fails, the forward pass depends on more than its parameters (dropout, caches, noise).",
    ),
    "registry": (
        "Run `entropy-probe inspect` on the checkpoint: it lists tensors, optimizer state and how they were matched.",
        "Save the checkpoint again from the trainer, after a step in which every parameter took part.",
    ),
    "ustatistic": (
        "Do not use δH₁; the realised change does not depend on it.",
        "Run again with --probe-no-cache. If the check fails again, report it with the name of the architecture.",
    ),
    "importance": (
        "Look at smaller steps (true_delta_h.etas) or draw more responses.",
        "Set true_delta_h.fallback: resample. Fresh responses are then drawn where the weights fail.",
    ),
    "sequences": (
        "Check that temperature, top_p and the chat template are those with which the responses were sampled.",
        "Leave out --probe-rollouts, so that the probe samples. If the check then passes, the file is the cause.",
    ),
    "prediction": (
        "Look in the figure ΔH/η for where the two separate: far from 0 it is curvature, near 0 it is v or the slope.",
        "Give separate batches for measuring and for the update (--probe-rollouts and --probe-update-rollouts).",
        "Compare the recipe below with the trainer's own settings.",
    ),
    "audit": (
        "Run again with --probe-no-cache, and keep the evidence (--probe-evidence=DIR).",
        "Run `entropy-probe audit REPORT --evidence DIR`. It names the figure that is wrong.",
    ),
    "golden": (
        "Read the first lines of the failure. They say what differs: a version, the checkpoint, or the responses.",
        "If the new numbers are right, write them with --probe-golden-update=changed.",
    ),
}
OPEN = (
    "More data can decide: raise batch.num_prompts, or give more lines in the rollouts files.",
    "If this run may stay undecided, list the criterion under allow_inconclusive.",
)


def steps(name: str, family: str, status: str) -> tuple[str, ...]:
    """What to do, the first thing first; nothing where nothing is known, as of a gate that stays open, whose verdict
    says what it lacks."""
    if status in ("pass", "not_applicable"):
        return ()
    if status == "inconclusive":
        more = FAMILIES[family] if family == "importance" else ()
        return () if family == "gate" else (*more, *OPEN)
    return GATES.get(name, ()) if family == "gate" else FAMILIES.get(family, ())
