"""What is measured on: the batches, the entropy at θ, the sampler's own scores; the optimizer as v and P took it."""

import hashlib
import itertools
import json
import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet, both, ratio

LOGIT_VAR = 5  # the place of Var_q(logit) among the features of a token
# of second moments: standard errors that decide, entries that say something, what rows and columns share
CLEAR, FEWEST, SHARED = 5.0, 8, 0.04


def write(sheet: Sheet) -> None:
    _batch(sheet, "batch", "e", 0)
    _batch(sheet, "update_batch", sheet.u, 1)
    _entropy(sheet)
    _predictors(sheet)
    if "e.sampler_logprobs" in sheet:
        _parity(sheet)
    _optimizer(sheet)


def advantages(sheet: Sheet, which: str) -> np.ndarray:
    """A = (r − baseline)/(sd + eps), as the recipe says, and 0 of a response that a smaller group lacks; or the file's
    own, of tokens the largest in size."""
    r, there = sheet[f"{which}.rewards"], sheet.lengths(which) > 0
    if f"{which}.given_advantages" in sheet:
        given = sheet[f"{which}.given_advantages"].reshape(*r.shape, -1)
        return np.take_along_axis(given, np.abs(given).argmax(2)[..., None], 2)[..., 0]
    recipe = {name: of["value"] for name, of in sheet.report["recipe"]["settings"].items()}
    number = np.maximum(there.sum(1, keepdims=True), 1)
    total, scale = (r * there).sum(1, keepdims=True), recipe["scale"]
    others = (total - r) / np.maximum(number - 1, 1)
    baselines = {"none": 0 * r, "mean": total / number, "leave_one_out": others}
    a = (r - baselines[recipe["baseline"]]) * there
    if scale == "advantages":
        a = (a - a.sum() / there.sum()) * there
    every = (a if scale == "advantages" else r)[there]
    for n, g in np.argwhere(there) if scale != "none" else ():
        own, ddof = r[n][there[n]], recipe["ddof"]
        of = {"group": own, "leave_one_out": np.delete(own, g)}.get(scale, every)
        sd = of.std(ddof=ddof) if len(of) > ddof and np.ptp(of) else 0.0
        if sd or not recipe["undivided_at_zero"]:
            a[n, g] /= sd + recipe["eps"]
    return a


def _batch(sheet: Sheet, section: str, which: str, place: int) -> None:
    write, facts = partial(sheet.write, section), sheet.facts
    rewards, (prompts, group) = sheet[f"{which}.rewards"], sheet[f"{which}.rewards"].shape
    ids, starts, lengths = (of.tolist() for of in sheet.of(which, "ids prompt_lens gen_lens"))
    # where the response begins, and the tokens of prompt and response
    rows = [[n, *row[: n + t]] for row, n, t in zip(ids, starts, lengths, strict=True)]
    texts = [row[1 + row[0] :] for row in rows if len(row) > 1 + row[0]]
    write(num_prompts=prompts, num_responses=group, total_responses=len(texts))
    write(num_tokens=sum(lengths), same_batch=sheet.u == "e")
    write(**{n: facts[n][place] for n in ("source", "missing_gold", "given", "reward", "found")})
    write(prompts_are_builtin=facts["builtin"][place])
    most, mean = abs(rewards).max(), ratio(rewards, sheet.lengths(which) > 0)
    sheet.estimates(section, most, mean_reward=mean)
    a, used = advantages(sheet, which), sheet[f"{which}.advantages"]
    sheet.hold(f"{which}.advantages", used, a, max(most, abs(a).max()))
    idle = abs(a).max(1) <= 1e-12 * abs(rewards).max(1)
    write(zero_advantage_fraction=float(idle.mean()))
    eos, generation = set(facts["eos"]), sheet.config["generation"]
    write(early_eos=sum(not eos.isdisjoint(text[:-1]) for text in texts))
    if facts["source"][place] == "sampled" and not generation["stop"]:
        full = generation["max_new_tokens"]
        write(unended=sum(text[-1] not in eos and len(text) < full for text in texts))
    given = sheet.get(f"{which}.given_advantages")
    from_file = "weights" if facts["weighed"][place] else "given"
    write(advantages="recipe" if given is None else from_file)
    whole = (rows, rewards.tolist(), None if given is None else given.tolist())
    prompt_ids = [row[1 : 1 + row[0]] for row in rows[::group]]
    for name, content in (("fingerprint", whole), ("prompts_fingerprint", prompt_ids)):
        write(**{name: hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def _entropy(sheet: Sheet) -> None:
    """naive −S, rb R, and R of q, per response; R/T per token; and −log q − R of q, which has mean 0 under q."""
    write, lengths = partial(sheet.write, "entropy"), sheet.lengths("e")
    s, s_q, r, r_q = (x.sum(-1) for x in sheet.of("e", "logp logq entropy entropy_q"))
    write(naive=both(-s.mean(1)), rb=both(r.mean(1)), rb_q=both(r_q.mean(1)))
    per_token = ratio(r, lengths)
    write(rb_by_prompt=r.mean(1), per_token=both(per_token))
    write(per_token.mean(), per_token_by_prompt=per_token)  # a small one is what others' leave
    write(surprises=int((sheet["e.logp"] < math.log(0.5)).sum()))
    variance = sheet["e.features"][..., LOGIT_VAR].sum()
    temperature = sheet.config["generation"]["temperature"]
    se = math.sqrt(variance) / temperature / s.size
    write(surprise={"value": (-s_q - r_q).mean(), "se": se})


def _predictors(sheet: Sheet) -> None:
    """Those of the change that need no gradient, on U: −Cov(log p, A), −mean[A(1 − p)(H + log p)] and
    −mean[A(S − Σ_i p_i S_i)] with S = p(H + log p), over the tokens of the step."""
    l, h, mean_s = sheet.of(sheet.u, "logp entropy mean_s")
    in_step = sheet.get(f"{sheet.u}.in_step", np.ones(l.shape[:2])).astype(bool)
    chosen, p = sheet.tokens(sheet.u) & in_step[..., None], np.exp(l)
    a = sheet.get(f"{sheet.u}.given_advantages", advantages(sheet, sheet.u))
    a = (a if a.ndim == 3 else a[..., None]) * chosen
    covariance = (l - l[chosen].mean()) * (a - a[chosen].mean()) * chosen
    write, size = partial(sheet.estimates, "predictors"), abs(a * l).mean()
    write(size, cov_logp_advantage=-ratio(covariance, chosen))  # A may be the same everywhere
    write(steer=-ratio(a * (1 - p) * (h + l), chosen))
    write(wang=-ratio(a * (p * (h + l) - mean_s), chosen))


def _parity(sheet: Sheet) -> None:
    """Δ = reported − scored of every token, ρ = e^{−Δ}: kl mean Δ, k3 mean(ρ − 1 + Δ)."""
    write, there, logq = partial(sheet.write, "sampler_parity"), sheet.tokens("e"), sheet["e.logq"]
    scored, reported = logq[there], sheet["e.sampler_logprobs"].reshape(logq.shape)[there]
    delta, p, q = reported - scored, np.exp(reported), np.exp(scored)
    rho, varied = np.exp(-delta), min(p.std(), q.std()) > 1e-12
    write(mean_abs_difference=abs(delta).mean(), max_abs_difference=abs(delta).max())
    write(kl=delta.mean(), k3=(np.expm1(-delta) + delta).mean())
    write(ratio_min=rho.min(), ratio_mean=rho.mean(), ratio_max=rho.max())
    write(num_tokens=len(delta), share_outside=float(((rho < 0.9) | (rho > 1.1)).mean()))
    write(pearson=np.corrcoef(q, p)[0, 1] if varied else None)


def _optimizer(sheet: Sheet) -> None:
    """Which tensors have a gradient; what the report sums up of P and of second moments."""
    write, names = partial(sheet.write, "registry"), sheet.facts["names"]
    x, y = (set(itertools.compress(names, of)) for of in sheet[f"{sheet.u}.reached"])
    write(num_tensors=len(names), uncovered=[name for name in names if name not in x & y])
    write(x_coverage=len(x) / len(names), y_coverage=len(y) / len(names))
    if "sum.p_min" not in sheet:  # without a step nothing says how long they are
        write(num_parameters=sheet.report["registry"]["num_parameters"])
        return
    write(num_parameters=int(sheet["sum.numel"].sum()))
    write = partial(sheet.write, "preconditioner")
    p_min, p_max, nonfinite = sheet.of("sum", "p_min p_max p_nonfinite")
    write(num_tensors=len(p_min), num_nonfinite=int(nonfinite.sum()))
    write(smallest=float(p_min.min()), largest=float(p_max.max()))
    known = set(sheet.facts["moved"]) - {h["name"] for h in sheet.facts["hyper"] if h["step"] == 0}
    write(missing=[name for name in names if name not in known])
    _beside_torch(sheet)
    # the pair of one shape that would fit each other's second moments best, and tensors nothing speaks of
    alike: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for h in sheet.facts["hyper"]:
        if h["step"] > 0 and h["name"] in y:
            alike.setdefault(tuple(h["shape"]), []).append((math.prod(h["shape"]), h["name"]))
    pairs = [pair for tensors in alike.values() for pair in itertools.combinations(tensors, 2)]
    evidence = sheet["match.pairs"] if pairs else np.zeros(0)
    vague = list(itertools.compress(pairs, evidence > -CLEAR))
    write(num_pairs=len(pairs), num_undecided=len(vague))
    write(undecided=[name for _, name in sorted(set(itertools.chain(*vague)))])
    if pairs:
        pair = [name for _, name in pairs[int(evidence.argmax())]]
        write(exchanged=_exchange(sheet), exchanged_pair=pair)


def _beside_torch(sheet: Sheet) -> None:
    """v beside a step s of torch's own, from v·s, |v|² and |s|²: the worst tensor, or the whole where that is worse."""
    of_tensors = sheet["match.stepped"]
    product, v, s = np.vstack([of_tensors, sum(of_tensors, np.zeros(3))]).T
    with np.errstate(all="ignore"):
        still, cosines, ratios = (v == 0) & (s == 0), product / np.sqrt(v) / np.sqrt(s), v / s
    cosines = np.where(still, 1.0, np.nan_to_num(cosines))
    ratios = np.where(still, 1.0, np.sqrt(ratios))
    k, m = cosines.argmin(), abs(ratios - 1).argmax()
    worst = k if 1 - cosines[k] > abs(ratios[m] - 1) else m
    sheet.write(
        "update",
        cosine_with_optimizer_step=float(cosines[k]),
        norm_ratio_with_optimizer_step=float(ratios[m]),
        worst_parameter=[*(h["name"] for h in sheet.facts["hyper"]), "the whole"][worst],
    )


def _exchange(sheet: Sheet) -> float:
    """½(z_ij + z_ji − z_ii − z_jj)/√(1/(n−3) + 0.04²), z = atanh of the correlation of log squares with log moments."""
    z, entries = np.zeros((2, 2)), np.zeros((2, 2))
    for i, j in itertools.product(range(2), repeat=2):
        squares, moments = sheet["match.squares"][i], sheet["match.of_pair"][j]
        both = (squares > 0) & (moments > 0)
        a, b, entries[i, j] = np.log(squares[both]), np.log(moments[both]), max(both.sum(), FEWEST)
        if len(a) >= FEWEST and a.std() * b.std() > 1e-12:
            z[i, j] = math.atanh(np.clip(np.corrcoef(a, b)[0, 1], -0.999, 0.999))
    gain = 0.5 * (z[0, 1] + z[1, 0] - z[0, 0] - z[1, 1])
    return float(gain / math.sqrt(1 / (min(entries[0, 1], entries[1, 0]) - 3) + SHARED**2))
