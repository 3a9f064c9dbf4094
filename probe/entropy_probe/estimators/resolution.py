"""What a standard error can tell: the change that it resolves, and how many prompts would decide or reach a target."""

from __future__ import annotations

import math

from scipy.special import stdtrit

# As the SE falls with √B, so many times the prompts reach the target on average; a tenth more, since the SE of few
# prompts is itself a guess. No look doubles the prompts or more: what the first few say of the SE is not believed far.
_SPARE, _MOST = 1.1, 2.0


def prompts_needed(num_prompts: int, predicted: float, se: float) -> int | None:
    """⌈B·(2·SE/|predicted|)²⌉: about so many make the prediction two standard errors; `None` where it is 0."""
    if predicted == 0:
        return None
    return math.ceil(num_prompts * (2 * se / abs(predicted)) ** 2)


def prompts_to_draw(num_prompts: int, se: float, target: float, most: int) -> int:
    """How many more to draw before the next look; 0 where the target is reached, or there are as many as allowed.

    It looks at the SE alone, never at the value whose SE it is: an interval that may stop when it excludes 0 excludes
    it too often.
    """
    if se <= target or num_prompts >= most:
        return 0
    wanted = min(_MOST, _SPARE * (se / target) ** 2) * num_prompts
    return min(most, max(math.ceil(wanted), num_prompts + 1)) - num_prompts


def next_step_interval(
    predicted: float, se: float, spread: float, num_prompts: int, level: float = 0.95
) -> tuple[float, float]:
    """predicted ± t_{n−1}·√(SE² + 2·spread²): where the first-order change by a step with another U batch lies.

    `spread` is the standard deviation over U batches. It counts twice: the update of this batch, by which the change
    is predicted, is one of them, and the next is another. n: the prompts of E or U, whichever are fewer.
    """
    half = float(stdtrit(num_prompts - 1, 0.5 + level / 2)) * math.hypot(se, math.sqrt(2) * spread)
    return predicted - half, predicted + half
