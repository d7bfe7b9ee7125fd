"""The targets that our arm is to reach, each with what was measured: reached, not reached, or undecided.

    gain        at least 95% of full fine-tuning's in-domain gain (test split)
    held-out    NLL below each peer's at the peer's own best rate, by more than the spread of seeds: the mean difference
                exceeds its standard deviation, which the module `choice` defines. Undecided without two seeds
    forgetting  not more than each peer's at equal in-domain gain: ours at the chosen rate, the peer's read off its
                sweep, whose seed is ours too where we ran it; where we gain more than it does at any rate, not more
                than it has at its most gain, or else ours too at that gain, read off our sweep
    reload      the saved artifact gives the NLL of the trained model, to the last digit

The first two are against another arm's best rate. Where that is at the edge of its sweep, a better one may exist, and
what would be reached is undecided.

One standard deviation is a mild test with few seeds, so the text adds how many pairs agree, and the 95% interval of the
mean. A seed of ours that diverged at the chosen rate makes every target "not reached".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from comparison.choice import (
    ArmResult,
    Difference,
    Figure,
    difference,
    figure_at_gain,
    forgetting_of,
    gain_share,
    held_out_of,
)
from comparison.run_files import Run

REACHED, NOT_REACHED, UNDECIDED = "reached", "not reached", "undecided"
LEAST_SHARE = 0.95
SAME_PARAMETERS = 0.05  # counts that differ by a larger share are named

GAIN, HELD_OUT, FORGETTING, RELOAD = "gain", "held-out", "forgetting", "reload"
TARGETS = {
    GAIN: f"{LEAST_SHARE:.0%} of full's gain",
    HELD_OUT: "held-out below peers",
    FORGETTING: "forgetting at equal gain",
    RELOAD: "same NLL after reload",
}


@dataclass(frozen=True)
class Verdict:
    """target: a key of TARGETS; text: the figures, a sentence; holds_0: the 95% interval of the difference does."""

    target: str
    status: str
    text: str
    holds_0: bool = False


def verdicts(
    arms: Mapping[str, ArmResult], ours: str, full: str, peers: Sequence[str], swept: Sequence[str] = ()
) -> list[Verdict]:  # fmt: skip
    """Of one configuration; none where our arm was not run. swept: the first of these that was run is our sweep, where
    our arm has one rate."""
    if ours not in arms:
        return []
    our, rivals = arms[ours], [arms[peer] for peer in peers if peer in arms]
    sweep = next((arms[name] for name in swept if name in arms), our)
    if our.best is None:
        return [Verdict(target, NOT_REACHED, f"{ours} diverged at every rate.") for target in TARGETS]
    found = [
        gain_verdict(our, arms.get(full), full),
        *([held_out_verdict(our, peer) for peer in rivals] or [Verdict(HELD_OUT, UNDECIDED, "No peer was run.")]),
        *(
            [forgetting_verdict(our, peer, sweep) for peer in rivals]
            or [Verdict(FORGETTING, UNDECIDED, "No peer was run.")]
        ),
        reload_verdict(our),
    ]
    if our.failed:
        mark = f" {our.failed} of {len(our.seeds)} seeds of {ours} diverged."
        found = [replace(one, status=NOT_REACHED, text=one.text + mark) for one in found]
    return found


def overall(found: Sequence[Verdict], target: str) -> str:
    """Of one target against all peers: reached only where all are, not reached where one is not."""
    of_target = [one for one in found if one.target == target]
    states = {one.status for one in of_target}
    state = next((state for state in (NOT_REACHED, UNDECIDED, REACHED) if state in states), "-")
    unsure = sum(one.holds_0 for one in of_target)
    return f"{state}; {unsure} of {len(of_target)} intervals hold 0" if unsure and state == REACHED else state


def gain_verdict(our: ArmResult, full: ArmResult | None, name: str) -> Verdict:
    if full is None or full.best is None:
        return Verdict(GAIN, UNDECIDED, f"{name} {'was not run' if full is None else 'diverged at every rate'}.")
    share = gain_share(our, full)
    if share is None:
        return Verdict(GAIN, UNDECIDED, f"{name} gained nothing in-domain at its best rate.")
    over = f" ± {100 * share.sd:.1f} over {share.n} seeds" if share.sd is not None else ""
    status = REACHED if share.mean >= LEAST_SHARE else NOT_REACHED
    text = f"{100 * share.mean:.1f}%{over} of {name}'s in-domain gain.{at_our_gain(our, full)}"
    return against_best(full, Verdict(GAIN, status, text))


def at_our_gain(our: ArmResult, full: ArmResult) -> str:
    """Full fine-tuning at a rate at which it gains as much as we do: what it forgets, and its held-out NLL."""
    run, gain = beside(our, full, lambda one: one.gain)
    told = []
    for name, figure, form in (("forgetting", forgetting_of, "+.4f"), ("held-out", held_out_of, ".4f")):
        _, ours = beside(our, full, figure)
        found = figure_at_gain(full.sweep, gain, figure) if gain is not None else None
        if ours is not None and found is not None and found.figure is not None:
            told.append(f"{name} {found.figure:{form}} (ours {ours:{form}})")
    return f" At a rate where {full.arm} gains as much: {', '.join(told)}{seed_text(run)}." if told else ""


def against_best(other: ArmResult, found: Verdict) -> Verdict:
    """Undecided where it seems reached against an arm whose best rate may not be known."""
    if not other.rate_mark:
        return found
    status = UNDECIDED if found.status == REACHED else found.status
    mark = f" The rate of {other.arm} may not be its best ({other.rate_mark})."
    return replace(found, status=status, text=found.text + mark)


def held_out_verdict(our: ArmResult, peer: ArmResult) -> Verdict:
    found = difference(our, peer, held_out_of)
    against = f"NLL against {peer.arm}{counts(our, peer)}: "
    if peer.best is None:
        return Verdict(HELD_OUT, UNDECIDED, f"{against}it diverged at every rate.")
    if found is None:
        return Verdict(HELD_OUT, UNDECIDED, f"{against}no held-out texts.")
    if found.mean >= 0:
        status = NOT_REACHED
    elif found.sd is None:
        status = UNDECIDED
    else:
        status = REACHED if -found.mean > found.sd else NOT_REACHED
    mark = f"; {peer.failed} of {len(peer.seeds)} seeds of {peer.arm} diverged" if peer.failed else ""
    holds_0 = found.interval is not None and found.interval[0] <= 0 <= found.interval[1]
    return against_best(peer, Verdict(HELD_OUT, status, f"{against}{difference_text(found)}{mark}.", holds_0))


def difference_text(found: Difference) -> str:
    if found.sd is None:
        return f"{found.mean:+.4f}, {'one common seed' if found.paired else 'no common seed'}, so its spread is unknown"
    text = f"{found.mean:+.4f} ± {found.sd:.4f} "
    if found.interval is None:
        return text + f"(two means, of at least {found.n} seeds each)"
    low, high = found.interval
    return text + f"over {found.n} paired seeds, lower in {found.lower}; 95% interval {low:+.4f} to {high:+.4f}"


def counts(our: ArmResult, peer: ArmResult) -> str:
    """Trainable parameters of both, where they are not about equal."""
    one, other = (arm.median(lambda run: run.trainable_parameters) for arm in (our, peer))
    if one is None or other is None or abs(one - other) <= SAME_PARAMETERS * max(one, other):
        return ""
    return f" ({one:,.0f} against {other:,.0f} parameters)"


def beside(our: ArmResult, other: ArmResult, figure: Figure) -> tuple[Run | None, float | None]:
    """(Our run of the seed of another arm's sweep, its figure); where there is none, our mean."""
    run = our.with_seed(other.sweep[0].seed)
    return run, our.mean(figure) if run is None else figure(run)


def seed_text(run: Run | None) -> str:
    return "" if run is None else f", seed {run.seed}"


def forgetting_verdict(our: ArmResult, peer: ArmResult, sweep: ArmResult) -> Verdict:
    """sweep: our method's."""
    (run, gain), (_, forgetting) = beside(our, peer, lambda one: one.gain), beside(our, peer, forgetting_of)
    found = figure_at_gain(peer.sweep, gain, forgetting_of) if gain is not None else None
    if gain is None or forgetting is None or found is None:
        return Verdict(FORGETTING, UNDECIDED, f"Against {peer.arm}: not measured.")
    ours = f"Forgetting {forgetting:+.4f} at a gain of {gain:.4f}{seed_text(run)}"
    if found.figure is not None:
        status = REACHED if forgetting <= found.figure else NOT_REACHED
        return Verdict(FORGETTING, status, f"{ours}; {peer.arm} {found.figure:+.4f} at the same gain.")
    if gain < found.top[0]:
        return Verdict(FORGETTING, UNDECIDED, f"{ours}, which is below the sweep of {peer.arm}.")
    status, compared = at_peers_top(forgetting, sweep, *found.top)
    return Verdict(FORGETTING, status, f"{ours}, which {peer.arm} does not reach at any rate. {compared}")


def at_peers_top(ours: float, sweep: ArmResult, gain: float, forgetting: float) -> tuple[str, str]:
    """Where we gain more than the peer ever does: we forget no more all the same, or else the two are compared at the
    most that it gains, on our own sweep. ours: our forgetting; gain, forgetting: the peer's at its most."""
    text = f"At its most, {gain:.4f}, it has {forgetting:+.4f}"
    if ours <= forgetting:
        return REACHED, f"{text}, which is more."
    own = figure_at_gain(sweep.sweep, gain, forgetting_of)
    if own is None or own.figure is None:
        return UNDECIDED, f"{text}, and our own sweep does not pass there."
    status = REACHED if own.figure <= forgetting else NOT_REACHED
    return status, f"{text}; {sweep.arm}, swept, {own.figure:+.4f} there."


def reload_verdict(our: ArmResult) -> Verdict:
    worst = worst_reload(our)
    if worst is None:
        return Verdict(RELOAD, UNDECIDED, "Nothing was loaded again.")
    if math.isnan(worst):
        return Verdict(RELOAD, NOT_REACHED, "The NLL after loading is not finite.")
    runs = [run for run in our.finished if run.reload_difference is not None]
    text = f"The largest difference of {len(runs)} of {len(our.finished)} runs is {worst:.1e}."
    return Verdict(RELOAD, REACHED if worst == 0 else NOT_REACHED, text)


def worst_reload(arm: ArmResult) -> float | None:
    """Over the seeds at the chosen rate; nan if one is not finite, None if none was loaded again."""
    known = [value for run in arm.finished if (value := run.reload_difference) is not None]
    return math.nan if any(math.isnan(value) for value in known) else max(known, default=None)
