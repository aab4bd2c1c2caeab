"""Which steps are legal after the steps before them."""

from __future__ import annotations

from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.steps import (
    DISTRIBUTIONS,
    LAYOUTS,
    MALFORMED,
    MAX_SEED,
    POISONS,
    AliasHandle,
    Append,
    Call,
    Fork,
    Generate,
    Lengths,
    Poison,
    Reject,
    Reorder,
    Run,
    Step,
    Truncate,
    UncachedForward,
    called,
)


def check(config: Config, lengths: Lengths, step: Step, at: str) -> None:
    """Raises SpecError if the step is not legal, or if a reject step holds a call that is legal or cannot be made."""
    problem = _problem(config, lengths, called(step))
    if not isinstance(step, Reject):
        if problem is not None:
            raise SpecError(f"{at}.{problem[0]}", problem[1])
        return
    call, rows = step.step, lengths.of(step.step.seq)
    if step.wrong == "depth":
        if not isinstance(call, Truncate):
            raise SpecError(f"{at}.wrong", "only a truncation is too deep")
        if problem is not None:
            raise SpecError(
                f"{at}.step.{problem[0]}", f"{problem[1]}; a truncation that is too deep is otherwise legal"
            )
    elif step.wrong:
        known = MALFORMED[config.profile]
        if step.wrong not in known or not isinstance(call, Append):
            raise SpecError(f"{at}.wrong", f"unknown value {step.wrong!r} for an append; known: {', '.join(known)}")
        if problem is not None:
            raise SpecError(f"{at}.step.{problem[0]}", f"{problem[1]}; a malformed append is otherwise legal")
        if step.wrong == "fewer rows" and len(call.counts) < 2:
            raise SpecError(f"{at}.step.counts", "there are no fewer rows than one")
    elif problem is None:
        raise SpecError(f"{at}.step", "is legal; a reject step holds a call that must be refused")
    elif isinstance(call, Append):
        if rows and len(rows) != len(call.counts):
            raise SpecError(f"{at}.step.counts", f"{problem[1]}; a rejected append exceeds the capacity")
    elif not rows:
        raise SpecError(f"{at}.step.seq", problem[1])


def _problem(config: Config, lengths: Lengths, step: Call) -> tuple[str, str] | None:
    """The field of a step that is wrong, and what is wrong with it; None if the step is legal."""
    if isinstance(step, Append | UncachedForward):
        return _problem_of_run(config, lengths, step)
    old = lengths.of(step.seq)
    if not old:
        return "seq", f"no open sequence {step.seq!r}; open: {', '.join(sorted(lengths.rows)) or 'none'}"
    match step:
        case Truncate(length=int(length)) if not 0 <= length <= min(old):
            return "length", f"cannot keep {length} of {min(old)} tokens"
        case Truncate(length=tuple(kept)) if len(kept) != len(old):
            return "length", f"{len(kept)} lengths for sequence {step.seq!r} of {len(old)} rows"
        case Truncate(length=tuple(kept)) if not all(map(_within, kept, old)):
            return "length", f"cannot keep {list(kept)} of {list(old)} tokens"
        case Fork(into=into) | AliasHandle(into=into) if into in lengths.rows:
            return "into", f"sequence {into!r} is already open"
        case Reorder(rows=rows) if not rows or not all(0 <= row < len(old) for row in rows):
            return "rows", f"want rows of 0..{len(old) - 1}, got {list(rows)}"
        case Poison(keys=keys, values=values) if keys not in POISONS or values not in POISONS:
            return "keys", f"unknown poison {keys!r} or {values!r}; known: {', '.join(POISONS)}"
    return None


def _problem_of_run(config: Config, lengths: Lengths, step: Run) -> tuple[str, str] | None:
    old = lengths.of(step.seq) if isinstance(step, Append) else ()
    if not step.counts or min(step.counts) < 0 or (max(step.counts) < 1 and not old):
        return "counts", f"want at least one row and one token, got {list(step.counts)}"
    if old and len(old) != len(step.counts):
        return "counts", f"{len(step.counts)} rows for sequence {step.seq!r} of {len(old)} rows"
    grown = lengths.after(step)
    if max(grown) > config.capacity:
        return "counts", f"length {max(grown)} exceeds the capacity of {config.capacity}"
    for seed in (step.seed, *(seed for _row, _position, seed in step.substitutions)):
        if not 0 <= seed <= MAX_SEED:
            return "seed", f"want a seed of 0..{MAX_SEED}, got {seed}"
    kept = lengths.contexts.get(step.seq, step.context) if isinstance(step, Append) else step.context
    if not 0 <= step.context < config.contexts:
        return "context", f"want a context of 0..{config.contexts - 1}, got {step.context}"
    if kept != step.context:
        return "context", f"sequence {step.seq!r} has the context {kept}, got {step.context}"
    if step.distribution not in DISTRIBUTIONS:
        return "distribution", f"unknown value {step.distribution!r}; known: {', '.join(DISTRIBUTIONS)}"
    nan_rows = step.nan if isinstance(step, Append) else ()
    if config.profile == "decoder" and (nan_rows or step.distribution == "nan"):
        return "nan" if nan_rows else "distribution", "token ids cannot be NaN"
    if not set(nan_rows) <= set(range(len(grown))):
        return "nan", f"want rows of 0..{len(grown) - 1}, got {list(nan_rows)}"
    places = [("substitutions", row, position) for row, position, _seed in step.substitutions]
    places += [("masked", *place) for place in step.masked] if isinstance(step, Append) else []
    for name, row, position in places:
        if not 0 <= row < len(grown) or not 0 <= position < grown[row]:
            return name, f"no token at row {row}, position {position}"
    match step:
        case Generate(last_only=True):
            return "last_only", "a generation gives tokens, and has no last position"
        case _ if step.last_only and config.profile == "attention":
            return "last_only", "the attention profile gives an output for each token"
        case _ if step.last_only and not max(step.counts):
            return "last_only", "an append without a token has no last position"
        case _ if step.last_only and len(set(step.counts)) > 1:
            return "last_only", f"want equal counts, got {list(step.counts)}"
        case Generate() if config.profile != "decoder":
            return "op", "only the decoder profile generates tokens"
        case Generate() if len(set(step.counts)) > 1:
            return "counts", f"want prompts of one length, got {list(step.counts)}"
        case Generate(counts=(count, *_), new=new) if not 1 <= new <= config.capacity - count:
            return (
                "new",
                f"want 1 to {config.capacity - count} new tokens after {count} of {config.capacity}, got {new}",
            )
        case Append() if (step.masked or step.needle) and config.profile != "attention":
            return "masked" if step.masked else "needle", "only the attention profile has it"
        case Append(pad=(side, _)) if side not in ("right", "left"):
            return "pad", f"unknown side {side!r}; known: right, left"
        case Append(layout=layout) if layout not in LAYOUTS:
            return "layout", f"unknown value {layout!r}; known: {', '.join(LAYOUTS)}"
    return None


def _within(length: int, held: int) -> bool:
    return 0 <= length <= held
