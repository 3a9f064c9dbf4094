"""What to do, in order, where a criterion or a gate does not pass: beside what a failure means.

Of a gate by its name, of a criterion by its family, and what helps where more data could decide.
"""

from __future__ import annotations

GATES: dict[str, tuple[str, ...]] = {
    "entropy": (
        "Stop the run, or let it go no further than this checkpoint.",
        "See in the responses, and in the figure over positions, where entropy is left: one phrase may have won.",
        "Go back to the last checkpoint that passed, and train on with a smaller learning rate, a higher upper clip, "
        "larger groups, or a KL or entropy term.",
    ),
    "predicted_change": (
        "Do not take the next step as it is.",
        "See how much of the step is momentum: that part is taken whatever the next batch says.",
        "Lower the learning rate by the factor by which the limit is missed, and measure again with first_order.lr.",
    ),
    "realised_ratio": (
        "The step leaves the range in which slope and curvature describe the entropy (η* in the report).",
        "Lower the learning rate below η*, or trust the realised change alone.",
    ),
    "zero_advantage": (
        "Leave out prompts that are always or never solved, or draw more responses of each.",
        "See in the table of update prompts which ones have rewards that differ.",
    ),
    "adam_step": (
        "Copy optimizer and weights from the same step, with trainer_state.json.",
        "If the optimizer was started anew on purpose, leave this gate off.",
    ),
    "finite_moments": (
        "Do not train on: the next step writes NaN.",
        "Go back to an earlier checkpoint, with gradient clipping or a smaller learning rate.",
    ),
    "reward": (
        "Read the responses: a lost format, empty answers and a reward that is no longer computed look different.",
        "Compare with a run of the checkpoint before, on the same prompts (--probe-baseline).",
    ),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "zero_check": (
        "Leave out wrappers, hooks and autocast of your own, and measure again.",
        "Until it passes, no change of the entropy in this report is to be believed.",
    ),
    "scaling": (
        "Set precision to float64 for all passes and run again: what then passes was rounding.",
        "What still fails is a forward that is not a function of its parameters: dropout, caches, random numbers.",
    ),
    "registry": (
        "Run `entropy-probe inspect` on the checkpoint: it lists tensors, optimizer state and how they were matched.",
        "Save the checkpoint again from the trainer, after a step in which every parameter took part.",
    ),
    "ustatistic": (
        "Do not use δH₁; the realised change does not depend on it.",
        "Run again with --probe-no-cache. If it fails again, report it with the architecture's name.",
    ),
    "importance": (
        "Look at smaller steps (true_delta_h.etas) or draw more responses.",
        "With true_delta_h.fallback: resample fresh responses are drawn where weights do not do.",
    ),
    "sequences": (
        "Check that temperature, top_p and the chat template are those the responses were sampled with.",
        "Let the probe sample for itself (leave --probe-rollouts out): if that passes, the file is the cause.",
    ),
    "prediction": (
        "See in the figure ΔH/η from which η on the two part: far out it is curvature, near 0 it is v or the slope.",
        "Give separate batches for measuring and for the update (--probe-rollouts and --probe-update-rollouts).",
        "Hold the recipe below against the trainer's own settings.",
    ),
    "audit": (
        "Run again with --probe-no-cache, and keep the evidence (--probe-evidence=DIR).",
        "`entropy-probe audit REPORT --evidence DIR` names the figure that is off.",
    ),
    "golden": (
        "The failure says first what was made otherwise: a version, the checkpoint, or the responses.",
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
