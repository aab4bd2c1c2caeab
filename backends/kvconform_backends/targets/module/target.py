"""``py:`` targets: the user's module, function or factory as a black box, judged by its own uncached forward.

The target is ``file.py:NAME`` or ``package.module:NAME``. Its calling convention is detected by trial
(``recognition``); if that fails, the error shows the adapter to write.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kvconform.backend import BlackBox
from kvconform.errors import BackendUnavailable, InvalidBackend, SpecError, Unavailable
from kvconform.worker.registry import module_of
from kvconform_backends.targets import black_box
from kvconform_backends.targets.module import calls, conventions, identifiers, slots
from kvconform_backends.targets.module.calls import Caller, ModuleSequence
from kvconform_backends.targets.module.recognised import ProbedTarget, Recognised
from kvconform_backends.targets.module.recognition import recognise
from kvconform_backends.targets.module.refusals import Unrecognised
from kvconform_backends.targets.module.script import ModuleScript
from kvconform_backends.targets.third_party import ThirdPartyError, guarded
from kvconform_backends.torch import device_time
from kvconform_backends.validation import check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]

OPTIONS: Mapping[str, Any] = MappingProxyType({"init": {}, "seed": 0, "dtype": None, "convention": {}, "claims": {}})
"""Options after the ``?`` of an address. ``init``: keyword arguments of a class or factory; ``seed``: for random
weights; ``dtype``: converts the target; ``convention``: fields of ``conventions.Convention``; ``claims``: from outside,
of which ``max_chunk`` and ``max_batch`` limit the trials."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a target comes from, and how to build it."""

    address: str
    file: str
    name: str
    init: Mapping[str, Any]
    seed: int
    dtype: torch.dtype | None

    def namespace(self) -> dict[str, Any]:
        """The names in the file, which is executed again each time: trials leave nothing in its globals."""
        torch.manual_seed(self.seed)
        if not self.file.endswith(".py"):
            namespace: dict[str, Any] = vars(importlib.import_module(self.file))
            return namespace
        folder = str(Path(self.file).resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)  # neighbouring files are importable, as when it is run
        namespace = vars(module_of(self.file))
        return namespace

    def made(self, namespace: Mapping[str, Any]) -> Any:
        """The built target, ready to be called. Raises BackendUnavailable if building fails."""
        found = namespace[self.name]
        torch.manual_seed(self.seed)
        if self._builds(found):
            try:
                with guarded():
                    found = found(**arguments(found, self.init))
            except ThirdPartyError as error:
                needed = ", ".join(f'"{name}": ...' for name in required(found))
                hint = f"; give its arguments: --init '{{{needed}}}'" if needed and not self.init else ""
                raise BackendUnavailable(f"{self.address} cannot be built: {error}{hint}") from error
        elif isinstance(found, nn.Module):
            with suppress(ThirdPartyError), guarded():  # one that cannot be copied is new: its file was executed for it
                found = copy.deepcopy(found)
        if isinstance(found, nn.Module):
            found.eval()
            if self.dtype is not None:
                found.to(self.dtype)
        return found

    def rebuilt(self) -> tuple[Any, Mapping[str, Any]]:
        """Another build with the same weights, from the file executed again, and the names in it."""
        namespace = self.namespace()
        return self.made(namespace), namespace

    def written(self, namespace: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
        """The expression with which ``made`` builds the target, and the names it uses; None if the name is the target
        itself."""
        found = namespace[self.name]
        if not self._builds(found):
            return None
        given = arguments(found, self.init)
        classes = tuple(type(value).__name__ for value in given.values() if is_dataclass(value))
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in given.items())})", classes

    def _builds(self, found: Any) -> bool:
        """Whether the name is called to build the target: a class, or a function without tokens and past."""
        if isinstance(found, type):
            return True
        if isinstance(found, nn.Module) or not inspect.isfunction(found):
            return False
        if self.init:
            return True
        return not required(found) and not set(inspect.signature(found).parameters) & identifiers.PASTS


def required(found: Any) -> list[str]:
    """The parameters without a default."""
    parameters = inspect.signature(found).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def arguments(found: Any, init: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with those annotated as a dataclass converted to it."""
    given = dict(init)
    for name, hint in _hints(found).items():
        if is_dataclass(hint) and isinstance(hint, type) and name in required(found):
            value = given.get(name, {})
            given[name] = hint(**value) if isinstance(value, Mapping) else value
    return given


def _hints(found: Any) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.getattr_static(found, "__init__") if isinstance(found, type) else found)
    except (NameError, TypeError):  # names imported for type checkers only
        return {}


def open_module(target: str, options: Mapping[str, Any]) -> Any:
    """The black box around a target; a ``kvconform.backend.Backend`` is returned unchanged."""
    address = f"py:{target}"
    for option in options:
        if option not in OPTIONS:
            raise BackendUnavailable(f"{address}: unknown option {option!r}; known: {', '.join(OPTIONS)}")
    asked = {**OPTIONS, **options}
    if asked["dtype"] not in (None, *DTYPES):
        raise BackendUnavailable(f"{address}: unknown dtype {asked['dtype']!r}; known: {', '.join(DTYPES)}")
    file, colon, name = target.rpartition(":")
    if not colon:
        raise BackendUnavailable(f"{address}: expected file.py:NAME or package.module:NAME")
    source = Source(address, file, name, asked["init"], asked["seed"], DTYPES.get(asked["dtype"] or ""))
    try:
        with guarded():
            namespace = source.namespace()
    except BackendUnavailable as missing:
        raise BackendUnavailable(f"{address}: {missing}") from missing
    except ThirdPartyError as error:
        if isinstance(error.__cause__, SpecError):  # claims with an unknown value
            raise InvalidBackend(f"{address}: {error.__cause__}") from error
        raise BackendUnavailable(f"{address} cannot be imported: {error}") from error
    top, *inner = name.split(".")
    item = namespace.get(top)
    for part in inner:
        item = getattr(item, part, None)
    if item is None:
        raise BackendUnavailable(f"{address}: {file} has no {name!r}")
    if hasattr(item, "claims"):
        return item
    if inner:
        raise BackendUnavailable(f"{address}: {name} is nested in a class and is not a backend: move it to the module")
    module = source.made(namespace)
    if hasattr(module, "claims"):
        return module
    if not callable(module):
        raise BackendUnavailable(f"{address} is a {type(module).__name__}, which cannot be called")
    floats = (p.dtype for p in module.parameters() if p.is_floating_point()) if isinstance(module, nn.Module) else ()
    dtype = source.dtype or next(iter(floats), torch.float32)
    probed = ProbedTarget(module, name, namespace, asked["init"], dtype, source.rebuilt)
    try:
        given = conventions.checked(asked["convention"], namespace)
    except ValueError as error:
        raise InvalidBackend(f"{address}: {error}") from error
    try:
        with guarded():
            found = recognise(probed, given, asked["claims"])
    except Unrecognised as words:
        sentence = f"{address}: not judged: no known calling convention fits {words}"
        raise BackendUnavailable(f"{sentence}. {conventions.advice(words.line, file, name)}") from words
    except ThirdPartyError as error:
        raise BackendUnavailable(f"{address}: not judged: a trial raised {error}") from error
    return ModuleTarget(source, module, found, dtype)


class ModuleTarget:
    """A recognised target; calling it with a config builds the backend."""

    def __init__(self, source: Source, module: Any, found: Recognised, dtype: torch.dtype) -> None:
        convention = found.convention
        abilities = {
            "uncached_forward": not convention.always,
            "reset": found.restarts,
            "length": bool(convention.length),
            "immutable": found.immutable,
            "contexts": found.contexts > 1,
            "poison": bool(found.slots),
            "truncate": bool(convention.truncate),
            "ragged": bool(convention.ragged),
            "fork": bool(convention.fork),
            "reorder": bool(convention.reorder),
        }
        profile = "decoder" if convention.takes == "tokens" else "hidden"
        stored = next((name for name, kind in DTYPES.items() if kind is dtype), "float32")
        self.claims = Claims(
            profiles=(profile,),
            abilities=tuple(name for name, has in abilities.items() if has),
            dtypes=(stored,),
            devices=("cpu", "cuda") if isinstance(module, nn.Module) else ("cpu",),
            max_batch=1 if found.batch == 1 else found.rows,
            max_chunk=found.chunk,
            max_sequences=1 if convention.owned or convention.begin else None,
            overflow="refused" if found.refuses else "undefined",
            rollback=found.rollback,
            too_deep="refused" if found.rollback else "undefined",
            ragged_appends="any" if found.ragged_later else "first",
            returns="last" if found.last_only else "all",
            reference="self",
            inputs="kept" if found.keeps_inputs else "copied",
        )
        reserved = sorted({*range(found.vocabulary, found.outputs), *found.reserved}) if profile == "decoder" else ()
        own = Config(
            profile,
            found.heads,
            found.kv_heads,
            found.head_dim,
            found.capacity,
            dtype=stored,
            layers=found.layers,
            width=found.width or found.heads * found.head_dim,
            vocabulary=found.outputs if profile == "decoder" or found.outputs != found.width else 0,
            reserved=tuple(reserved),
            contexts=found.contexts,
        )
        self.configs = {f"{profile}-self": own}
        self.recognised = found.words
        self.assumed = (*found.doubts, _built(source), *found.assumed)
        self.not_tried = found.operations
        self.held = found.held
        self.parameters = sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
        self.source = source.file if source.file.endswith(".py") else str(sys.modules[source.file].__file__ or "")
        self.dtype, self.found, self._source = dtype, found, source

    def rebuilt(self, device: str) -> nn.Module:
        """Another build of a module, with the same weights."""
        module: nn.Module = self._source.rebuilt()[0]
        return module.to(device)

    def __call__(self, config: Config, weights: Mapping[str, Any], device: str) -> ModuleBackend:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device on this machine")
        torch.set_float32_matmul_precision("highest")  # no TF32
        namespace = self._source.namespace()
        module = self._source.made(namespace)
        if device != "cpu":
            module.to(device)
        caller = Caller(module, self.found.convention, namespace, self.dtype, device, shares=True)
        built = self._source.written(namespace)
        script = ModuleScript(self._source, self.found, module, built, self.dtype, device)
        return ModuleBackend(self, caller, script)


def _built(source: Source) -> str:
    """How the target is built, as a sentence."""
    given = ", ".join(f"{name}={value!r}" for name, value in source.init.items())
    of = f" with {given}" if given else ""
    return f"it is built{of} after torch.manual_seed({source.seed}), in eval mode, with its initial weights"


class ModuleBackend(BlackBox):
    """One build of a target on one device."""

    def __init__(self, target: ModuleTarget, caller: Caller, written: ModuleScript) -> None:
        self.claims, self.target, self.caller, self.written = target.claims, target, caller, written
        self.noise: tuple[float, float, int] | None = None  # perturbs its hidden states

    def start(self, batch: int) -> ModuleSequence:
        return self.caller.start(batch)

    def step(
        self, sequence: ModuleSequence, x: Array, context: int = 0, counts: Array | None = None, padding: str = "right"
    ) -> tuple[Array, ModuleSequence]:
        """Rows of different lengths are padded on the right."""
        return self.caller.step(sequence, x, context, () if counts is None else tuple(map(int, counts)))

    def truncate(self, sequence: ModuleSequence, length: int) -> ModuleSequence:
        if not 0 <= length <= sequence.tokens:
            raise ValueError(f"cannot keep {length} of {sequence.tokens} tokens")
        return self.caller.truncate(sequence, length)

    def fork(self, sequence: ModuleSequence) -> ModuleSequence:
        return self.caller.fork(sequence)

    def reorder(self, sequence: ModuleSequence, rows: list[int]) -> ModuleSequence:
        check_rows(rows, sequence.batch)
        return self.caller.reorder(sequence, rows) if sequence.tokens else self.caller.start(len(rows))

    def uncached_forward(self, x: Array, context: int = 0) -> Array:
        """``(b, t, e)``, at most ``max_batch`` rows at a time, and prefix by prefix if it returns only the last
        output."""
        if self.noise is not None and self.caller.convention.takes == "states":
            x = black_box.perturbed_states(x, *self.noise)
        rows = self.claims.max_batch or len(x)
        return np.concatenate([self._uncached(x[row : row + rows], context) for row in range(0, len(x), rows)])

    def _uncached(self, x: Array, context: int) -> Array:
        if self.target.found.uncached_last:
            ends = range(1, x.shape[1] + 1)
            return np.concatenate([self.caller.uncached(x[:, :end], context)[:, -1:] for end in ends], axis=1)
        return self.caller.uncached(x, context)

    def length(self, sequence: ModuleSequence) -> list[int]:
        """Where rows have different lengths, the past does not tell them."""
        return list(sequence.counts) or [self.caller.length(sequence)] * sequence.batch

    def reset(self, sequence: ModuleSequence) -> ModuleSequence:
        return self.caller.start(sequence.batch)

    def poison(self, sequence: ModuleSequence, keys: float | None, values: float | None) -> None:
        """All arrays with slots: which of them hold keys is not known."""
        number = values if keys is None else keys
        if number is not None:
            slots.fill(self.caller.module, sequence.past, self.target.found.slots, sequence.tokens, number)

    def perturbed(self, storage: float, accumulation: float, seed: int) -> ModuleBackend:
        noise = storage, accumulation, seed
        caller = self.caller.on(calls.perturbed(self.caller.module, *noise, self._rebuilt()))
        other = ModuleBackend(self.target, caller, self.written)
        other.noise = noise
        return other

    def _rebuilt(self) -> nn.Module | None:
        """Another build of a module that cannot be copied."""
        module = self.caller.module
        if not isinstance(module, nn.Module):
            return None
        with suppress(ThirdPartyError), guarded():
            copy.deepcopy(module)
            return None
        return self.target.rebuilt(self.caller.device)

    def runtime_info(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "device": self.caller.seen_on,
            "call": self.caller.convention.call,
            "precision": device_time.precision(self.target.dtype, self.caller.device),
        }

    def synchronise(self) -> None:
        device_time.synchronise(self.caller.device)

    def script_setup(self) -> str:
        return self.written.setup()

    def script(self, program: Program, tag: str) -> str:
        return self.written.steps(program, tag)
