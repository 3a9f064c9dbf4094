"""Sampling's logits, a token after the other, against those of the whole rows that are scored."""

from __future__ import annotations

from entropy_probe.errors import CacheError
from entropy_probe.model.forward import BoundModel
from entropy_probe.report import CacheSection
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.steps import TOKENS, OverCache, Unpadded, Way, WholeRows, two_of

_READ = {
    OverCache: "over the cache",
    Unpadded: "with prompts of one length at a time",
    WholeRows: "from whole rows",
}


def cache_section(bound: BoundModel, rollouts: Rollouts) -> CacheSection:
    """Of the first response to the shortest prompt and to the longest."""
    firsts = range(0, len(rollouts.ids), rollouts.num_responses)
    starts = rollouts.prompt_lens.tolist()
    prompts = [rollouts.ids[i, : starts[i]].tolist() for i in firsts]
    two = two_of(prompts)
    responses = [rollouts.responses[firsts[n]] for n in two]
    tokens = min(TOKENS, max(1, *map(len, responses)))
    of_two = (bound, [prompts[n] for n in two], responses, tokens)
    together = Way(OverCache)
    way = next(iter(bound.ways), together)
    try:
        over_cache = together.off(*of_two)
    except CacheError:
        over_cache = None
    return CacheSection(
        read=_READ[way.steps],
        over_cache=over_cache,
        instead=way.off(*of_two) if way.why else None,
        why=way.why or None,
    )
