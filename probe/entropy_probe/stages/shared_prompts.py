"""Responses read behind their prompt, which is read once for all of them, in passes without a graph.

    whole rows    B·G rows of P + T tokens
    shared        B rows of P tokens, whose keys and values are held;   B·G rows of T − 1 tokens that attend to them

Both give the same logits but for rounding. Whole rows are read where the model's cache does not give what they give,
which is found out on a few rows of the batch (`sharing_of`), or where too few tokens are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_probe.errors import ProbeError
from entropy_probe.model.forward import BoundModel, said
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.steps import SLACK, left_padded, two_of
from entropy_probe.stages.rounding import rounding

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

TOKENS = 4096
"""Of the prompts that are read together."""
WORTH = 0.9
"""The largest share of the tokens of whole rows that may be read: a pass in two parts has more operations."""
MOST_SEEN = 1 << 24
"""Entries of the mask, one for each token of a response and each that it may see, of rows that are read together. It
is the only thing that is held of size T·(P + T); 16 MiB of it, and four or eight times that where a kernel adds it."""
FEWEST = 16
"""Responses, below which less would be saved than it takes to find out whether the model gives the same."""
_COLUMNS = 64  # logits of a position that are compared
_BY_LENGTH = ("dynamic", "longrope")  # rotary positions that depend on how long the row is

Read = Callable[..., tuple[Tensor, ...]]
ReadRows = Callable[[BoundModel, Rollouts, Tensor, Read], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sharing:
    """Whether prompts are read once; `why` not, in words for the report, and `None` where they are."""

    why: str | None = None

    @property
    def shared(self) -> bool:
        return self.why is None


@dataclass(frozen=True)
class Together:
    """The numbers of prompts that are read together, and of their rows, in batches of similar length."""

    prompts: Int[Tensor, " n"]
    rows: tuple[Tensor, ...]


def together(
    rollouts: Rollouts, size: int, some: Int[Tensor, " R"] | None = None, tokens: int = TOKENS
) -> list[Together]:
    """All of `some` rows that have a token, without which of all: up to `size` prompts, then `size` rows, at once.

    Prompts that are read together have so many `tokens` at most, padding included, or are one.
    """
    chosen = rollouts.gen_lens > 0
    if some is not None:
        chosen &= torch.zeros_like(chosen).index_fill(0, some, True)
    of_prompt = torch.arange(len(chosen)) // max(rollouts.num_responses, 1)
    lengths = rollouts.prompt_lens[:: max(rollouts.num_responses, 1)]
    wanted = of_prompt[chosen].unique()
    order = wanted[torch.argsort(lengths[wanted], stable=True)].tolist()
    groups: list[list[int]] = []
    for prompt in order:
        last = groups[-1] if groups else []
        full = len(last) >= size or (len(last) + 1) * int(lengths[prompt]) > tokens
        if not last or full:
            groups.append([prompt])
        else:
            last.append(prompt)
    found = []
    for group in groups:
        rows = (chosen & torch.isin(of_prompt, torch.tensor(group))).nonzero()[:, 0]
        rows = rows[torch.argsort(rollouts.gen_lens[rows], stable=True)]
        found.append(Together(torch.tensor(group), rows.split(size)))
    return found


def tokens_read(rollouts: Rollouts, size: int) -> tuple[int, int]:
    """Tokens that a pass reads with prompts read once, and from whole rows; padding counts."""
    shared = whole = 0
    starts = rollouts.prompt_lens[:: rollouts.num_responses]
    for part in together(rollouts, size):
        shared += len(part.prompts) * int(starts[part.prompts].max())
        shared += sum(len(rows) * (int(rollouts.gen_lens[rows].max()) - 1) for rows in part.rows)
    lengths = (rollouts.prompt_lens + rollouts.gen_lens).sort().values
    for rows in lengths.split(size):
        whole += len(rows) * int(rows[-1])
    return shared, whole


def worth(rollouts: Rollouts, size: int) -> str | None:
    """Why a pass over these rollouts is not worth reading each prompt once, whatever the model; `None` where it is."""
    if int((rollouts.gen_lens > 0).sum()) < FEWEST:
        return f"there are fewer than {FEWEST} responses"
    if not _same_prompts(rollouts):
        return "responses of one group follow different prompts"
    shared, whole = tokens_read(rollouts, size)
    if shared > WORTH * whole:
        return f"with each prompt read once {shared} tokens would be read, as whole rows {whole}"
    steps, longest = rollouts.max_gen_len, int(rollouts.prompt_lens.max())
    if min(size, len(rollouts.ids)) * steps * (longest + steps) > MOST_SEEN:
        return "rows are so long that the table of what each token sees would be large"
    return None


def _same_prompts(rollouts: Rollouts) -> bool:
    """Whether the rows of a group begin with one prompt."""
    width = int(rollouts.prompt_lens.max())
    ids, lengths = rollouts.ids[:, :width], rollouts.prompt_lens[:, None]
    prompts = torch.cat([lengths, ids.masked_fill(torch.arange(width) >= lengths, 0)], 1)
    of_groups = rollouts.per_prompt(prompts)
    return bool((of_groups == of_groups[:, :1]).all())


def sharing_of(bound: BoundModel, rollouts: Rollouts, size: int, read_rows: ReadRows) -> Sharing:
    """Whether a pass over these rollouts reads each prompt once: where it is worth it, and the model gives the same.

    The second is found out once for a model, whose `sharing` then holds it: so all passes over the same rollouts are
    made in the same way, and at η = 0 nothing changes.
    """
    if (why := worth(rollouts, size)) is not None:
        return Sharing(why)
    if not bound.sharing:
        bound.sharing.append(exactness(bound, rollouts, size, read_rows))
    return bound.sharing[0]


@torch.no_grad()
def exactness(bound: BoundModel, rollouts: Rollouts, size: int, read_rows: ReadRows) -> Sharing:
    """Logits of a few responses behind their prompts against those of whole rows, to the rounding of another order of
    summation: of the shortest prompt, of the longest, and of the longest row.

    A response begins with the padding token, which RoBERTa's kind passes over as it counts positions.
    """
    if (kind := depends_on_length(getattr(bound.language_model, "config", None))) is not None:
        return Sharing(f"positions of rope type `{kind}` depend on the length of the row")
    adapters = getattr(bound.module, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return Sharing("tokens of the prompt switch an adapter on")
    few, rows = _few(bound, rollouts)
    stride = -(-bound.num_logits // _COLUMNS)

    def read(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        own = logits.gather(1, tokens[:, None])
        return (torch.cat([logits[:, ::stride], own, logits.logsumexp(1, keepdim=True)], 1),)

    scale = worst = 0.0
    try:
        for some, (behind,) in read_once(bound, few, size, read, some=rows):
            (whole,) = read_rows(bound, few, some, read)
            off = (behind - whole).masked_fill(behind == whole, 0.0).abs()  # −∞ equals −∞
            worst = max(worst, float(off.nan_to_num(nan=float("inf")).max()))
            scale = max(scale, float(whole.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max()))
    except ProbeError as error:
        return Sharing(error.problem)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return Sharing(f"the cache of {bound.kind} cannot be used ({said(error)})")
    if worst > SLACK * rounding(bound, few.ids.shape[1], max(scale, 1.0)):
        return Sharing(
            f"logits behind a shared prompt differ by {worst:.2g} from those of whole rows"
        )
    return Sharing()


def _few(bound: BoundModel, rollouts: Rollouts) -> tuple[Rollouts, Int[Tensor, " R"]]:
    """The rollouts with a padding token at the beginning of one response, and the rows that are compared."""
    group = rollouts.num_responses
    rows = (rollouts.gen_lens > 0).nonzero()[:, 0].tolist()
    firsts = sorted({row // group: row for row in reversed(rows)}.values())
    ends = two_of([range(int(rollouts.prompt_lens[row])) for row in firsts])
    chosen = {firsts[n] for n in ends}
    chosen |= {row + 1 for row in chosen if row + 1 in rows and (row + 1) // group == row // group}
    longest = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].argmax())
    chosen.add(rows[longest])
    ids, row = rollouts.ids.clone(), max(chosen)
    pad: Any = getattr(getattr(bound.language_model, "config", None), "pad_token_id", None) or 0
    if 0 <= pad < bound.vocabulary:
        ids[row, rollouts.prompt_lens[row]] = pad
    return replace(rollouts, ids=ids), torch.tensor(sorted(chosen))


def depends_on_length(config: Any) -> str | None:
    """The type of rotary positions that change with the length of the row, so that a prompt alone has others; else
    `None`."""
    for name in ("rope_parameters", "rope_scaling"):
        values = [getattr(config, name, None)]
        while values:
            value = values.pop()
            if isinstance(value, Mapping):
                values += value.values()
            elif value in _BY_LENGTH:
                return str(value)
    return None


def read_once(
    bound: BoundModel,
    rollouts: Rollouts,
    size: int,
    read: Read,
    override: Mapping[str, Tensor] | None = None,
    some: Int[Tensor, " R"] | None = None,
    tokens: int = TOKENS,
    *,
    true_derivative: bool = False,
) -> Iterator[tuple[Int[Tensor, " N"], tuple[Tensor, ...]]]:
    """(rows, what `scores.read_rows` gives for them), a batch of rows after the other: `read(logits, tokens)` at every
    generated token, [N, T, …]. `some` and `tokens` as in `together`."""
    device, group = bound.device, rollouts.num_responses
    for part in together(rollouts, size, some, tokens):
        firsts = (part.prompts * group).tolist()
        prompts = [rollouts.ids[row, : int(rollouts.prompt_lens[row])] for row in firsts]
        ids, mask = left_padded(prompts, pad=0)
        on_device = ids.to(device), mask.to(device)
        held = bound.read_prompts(*on_device, override, true_derivative=true_derivative)
        place = torch.zeros(rollouts.num_prompts, dtype=torch.long)
        place[part.prompts] = torch.arange(len(firsts))
        for rows in part.rows:
            ids, inside = (of.to(device) for of in _responses(rollouts, rows))
            of_row, step = inside.nonzero(as_tuple=True)
            own = ids[of_row, step]
            found = bound.read_after(
                held,
                place[rows // group].to(device),
                ids[:, :-1],
                inside[:, 1:].long(),
                of_row,
                step,
                lambda logits, part, own=own: read(logits, own[part]),
                override,
                true_derivative=true_derivative,
            )
            at = of_row, step
            yield (
                rows,
                tuple(v.new_zeros(*inside.shape, *v.shape[1:]).index_put(at, v) for v in found),
            )
        del held


def _responses(
    rollouts: Rollouts, rows: Int[Tensor, " N"]
) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """The tokens of some responses, padded to the right, and which of them there are."""
    lengths = rollouts.gen_lens[rows, None]
    steps = torch.arange(int(lengths.max()))[None, :]
    columns = (rollouts.prompt_lens[rows, None] + steps).clamp(max=rollouts.ids.shape[1] - 1)
    return rollouts.ids[rows[:, None], columns], steps < lengths
