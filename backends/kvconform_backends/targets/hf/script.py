"""A transformers model and the steps of a program on it, as Python source for a reproduction."""

from __future__ import annotations

from collections.abc import Mapping

from kvconform_backends.targets.hf.recipe import Calls, Recipe
from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.program import (
    Append,
    Close,
    Fork,
    Program,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
    called,
)

SETUP = '''\
import copy
from types import SimpleNamespace

import torch
from transformers import {names}

torch.set_grad_enabled(False)
{seed}config = {config}
model = {maker}.{model}.eval()
{experts}{cut}

def empty():
    return SimpleNamespace(cache={cache}, ids=None, mask=None)


def step(held, x, counts=None):
    """Like ``generate``: appends tokens (b, t) to the cache and returns their logits (b, t, V). counts: how many
    columns of each row hold a token, the last ones."""
    new = torch.from_numpy(x)
    mask = torch.ones_like(new)
    for row, count in enumerate(counts or ()):
        mask[row, :new.shape[1] - count] = 0
    logits, parts = [], [(new, mask)]
    if {parts}:
        parts = [(new[:, [i]], mask[:, [i]]) for i in range(new.shape[1])]
    for new, mask in parts:
        first = held.ids is None
        held.ids = new if first else torch.cat([held.ids, new], 1)
        held.mask = mask if first else torch.cat([held.mask, mask], 1)
        past = {{}} if held.cache is None else {{"{cache_name}": held.cache}}
{inputs}        output = model(**inputs)
{returned}        logits.append(output.logits[:, -new.shape[1]:])
    return torch.cat(logits, 1)[..., :{vocabulary}].float().numpy()


def uncached(x):
    return model(torch.from_numpy(x), use_cache=False).logits[..., :{vocabulary}].float().numpy()
'''


PREPARED = """\
        inputs = model.prepare_inputs_for_generation(
            held.ids, next_sequence_length=new.shape[1], attention_mask=held.mask, use_cache=True,
            {positions}is_first_iteration=first, **past
        )
        inputs.pop("logits_to_keep", None)
"""
DIRECT = """\
        inputs = dict(input_ids=new, attention_mask=held.mask, use_cache=True, {positions}**past)
"""
POSITIONS = "(held.mask.cumsum(-1) - 1).masked_fill(held.mask == 0, 0)"


def setup(recipe: Recipe, calls: Calls, config: Config) -> str:
    """Defines ``model``, ``empty()``, ``step(cache, ids, counts)`` and ``uncached(ids)``."""
    kind = "AutoConfig" if recipe.directory else recipe.origin
    fields = ", ".join(f"{name}={value!r}" for name, value in recipe.fields.items())
    how = f"attn_implementation={recipe.attention!r}, dtype=torch.{recipe.dtype}"
    if recipe.directory:
        made_of = f"AutoConfig.from_pretrained({recipe.origin!r}, local_files_only=True{', ' * bool(fields)}{fields})"
    else:
        made_of = f"{kind}({fields})"
    if recipe.weights:
        model = f"from_pretrained({recipe.origin!r}, config=config, local_files_only=True, {how})"
    else:
        model = f"{'' if recipe.maker == 'AutoModelForCausalLM' else '_'}from_config(config, {how})"
    given = "".join(f", {name}={value!r}" for name, value in recipe.cache_arguments(config).items())
    made = f"{recipe.cache_class}(config=model.config.get_text_config(decoder=True){given})"
    names = {recipe.maker, kind} | ({recipe.cache_class} if calls.makes_cache else set())
    return SETUP.format(
        names=", ".join(sorted(names)),
        config=made_of,
        vocabulary=config.vocabulary,
        model=model,
        seed="" if recipe.weights else f"torch.manual_seed({recipe.seed})\n",
        cache=made if calls.makes_cache else "None",
        cache_name=calls.given_as,
        maker=recipe.maker,
        returned=f"        held.cache = output.{calls.returned_as}\n" if calls.returned_as else "",
        parts={"never": "False", "after the first": "held.ids is not None", "always": "True"}[calls.one_by_one],
        experts="" if recipe.experts is None else f"model.set_experts_implementation({recipe.experts!r})\n",
        cut="" if recipe.tokens is None else f"model.resize_token_embeddings({recipe.tokens})\n",
        inputs=_inputs(calls),
    )


def _inputs(calls: Calls) -> str:
    if calls.prepared:
        return PREPARED.format(positions=f"position_ids={POSITIONS},\n            " * calls.positions)
    return DIRECT.format(positions=f"position_ids={POSITIONS}[:, -new.shape[1]:], " * calls.positions)


def steps(program: Program, tag: str) -> str:
    """The program's steps as Python source after ``setup``; sequences are entries of a dict."""
    lines, held = [f"caches{tag} = {{}}"], dict[str, int]()
    for number, step in enumerate(program.steps):
        call = called(step)
        if isinstance(call, Append) and call.seq not in held:
            lines.append(f"caches{tag}[{call.seq!r}] = empty()")
        lines.append(f"{_line(step, number, tag, held)}  # step {number}: {describe(program, number)}")
        if isinstance(call, Append):
            held[call.seq] = held.get(call.seq, 0) + max(call.counts)
        elif isinstance(call, Fork):
            held[call.into] = held[call.seq]
        elif isinstance(call, Close):
            del held[call.seq]
        elif isinstance(call, Truncate | Reset) and not isinstance(step, Reject):
            held[call.seq] = call.lengths(1)[0] if isinstance(call, Truncate) else 0
    return "\n".join(lines) + "\n"


def _line(step: Step, number: int, tag: str, held: Mapping[str, int]) -> str:
    """``held``: the length of each sequence."""
    call = called(step)
    if isinstance(call, UncachedForward):
        return f"y{tag}{number} = uncached(x{tag}{number})"
    cache = f"caches{tag}[{call.seq!r}]"
    if isinstance(step, Reject):
        return "pass  # refused by the backend, so that nothing is called:"
    if isinstance(call, Append):
        counts = f", {list(call.counts)}" if len(set(call.counts)) > 1 else ""
        return f"y{tag}{number} = step({cache}, x{tag}{number}{counts})"
    if isinstance(call, Truncate):
        (length,) = call.lengths(1)
        kept = f"{cache}.ids[:, :{length}]; {cache}.mask = {cache}.mask[:, :{length}]"
        return f"{cache}.cache.crop({length - held[call.seq]}); {cache}.ids = {kept}"
    if isinstance(call, Reorder):
        rows = list(call.rows)
        if not held[call.seq]:
            return f"{cache} = empty()"
        kept = f"{cache}.ids[{rows}]; {cache}.mask = {cache}.mask[{rows}]"
        return f"{cache}.cache.reorder_cache(torch.tensor({rows})); {cache}.ids = {kept}"
    if isinstance(call, Fork):
        return f"caches{tag}[{call.into!r}] = copy.deepcopy({cache})"
    if isinstance(call, Reset):
        return f"{cache}.cache.reset(); {cache}.ids = {cache}.mask = None"
    if isinstance(call, Close):
        return f"del {cache}"
    raise ValueError(f"steps[{number}]: transformers has no call for {type(call).__name__}")
