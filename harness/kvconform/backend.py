"""The base classes of backends: an adapter to one implementation, numpy in and out.

Masks, positions, layout and ownership of the cache stay inside the backend. This module needs only numpy, because a
backend lives in a worker that may be another interpreter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]
Cache = Any
"""What the backend keeps of one sequence; the harness passes it back and never looks inside."""
CacheDesign = Literal["in-place", "capacity", "concatenation"]
"""How a step moves the cache: ``bench.costs.DESIGNS`` says what each value means."""


class Backend(ABC):
    """One implementation, built for one config.

    Required: the attribute ``claims``, the constructor, ``start`` and ``step``; with the claim
    ``interface="generation"`` neither ``start`` nor ``step``. Everything else has a default. A method that belongs to
    an ability is called only if ``claims.abilities`` names the ability; kvconform compares claims and methods when it
    loads the class. A class with the same methods that does not inherit from Backend works as well.

    A complete backend, and the test that judges it:

        import numpy as np
        from kvconform import Backend, Claims, conformance

        class MyCache(Backend):
            claims = Claims(profiles=("attention",), abilities=("length", "reset"))

            @classmethod
            def refuses(cls, config, device):
                special = config.window or config.softcap or config.sink or config.positions != "none"
                return "only plain causal attention is implemented" if special else None

            def __init__(self, config, weights, device):
                self.config = config

            def start(self, batch):
                empty = np.zeros((batch, self.config.kv_heads, 0, self.config.head_dim), np.float32)
                return empty, empty

            def step(self, cache, query, key, value):
                keys, values = (np.concatenate(pair, axis=2) for pair in zip(cache, (key, value)))
                k, v = (np.repeat(x, self.config.group, axis=1) for x in (keys, values))
                t, s = query.shape[2], keys.shape[2]
                scores = query @ k.swapaxes(-1, -2) * self.config.score_scale
                scores = np.where(np.tri(t, s, s - t, dtype=bool), scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                return (weights @ v).astype(np.float32), (keys, values)

            def length(self, cache):
                return [cache[0].shape[2]] * len(cache[0])

            def reset(self, cache):
                return self.start(len(cache[0]))

        def test_my_cache():
            conformance(MyCache)
    """

    claims: Claims
    """What the backend can do; set it on the class."""
    cache_design: CacheDesign | None = None
    """What a step moves, for the roofline of a benchmark; None if it is not known."""

    @abstractmethod
    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str) -> None:
        """``weights`` are float32 arrays named and shaped as in ``kvconform_specs.tensors.weight_shapes`` (none in the
        attention profile), already rounded to ``config.dtype``. ``device`` is ``cpu`` or ``cuda``.

        Raises ``kvconform.Unavailable`` if this machine lacks something that the backend needs.
        """

    def start(self, batch: int) -> Cache:
        """An empty cache of ``batch`` rows."""
        raise self._not_implemented("start")

    def step(self, cache: Cache, *inputs: Any, **options: Any) -> tuple[Array, Cache]:
        """Appends new tokens. Returns the output and the cache to continue with (the same object, if mutable).

        Attention profile: query ``(b, h, t, d)``, key and value ``(b, g, t, d)``, output ``(b, h, t, d)``.
        Decoder profile: token ids ``(b, t)`` int64, logits ``(b, t, V)``; ``(b, 1, V)`` if ``returns="last"``.
        Floats are float32 that are exact in ``config.dtype``; outputs are float32 as well (widened if the
        implementation computes in 16 bits). Inputs lie in the caller's memory: they are only read, and overwritten by
        the caller after the step (unless ``inputs="kept"`` is claimed). The output belongs to the caller: no later
        call changes it. A keyword is passed only if its ability is claimed and used:

        With ``empty_append`` ``t`` may be 0: the output then has no column, and the cache is as before.

        counts (``ragged``): ``(b,)``, how many of the ``t`` columns hold a token in each row, 0 included.
        padding (``ragged``): ``"left"`` if the columns without a token come first; absent: they come last. Their
        content is arbitrary, and their outputs are not judged.
        mask (``mask``, attention profile): bool ``(b, s)`` over logical positions, True where a query may attend. It is
        combined with causality and window; a query that sees nothing gives zeros.
        in_place (``in_place``): True: write the present into the memory of the past; absent: into separate memory.
        count_macs (``macs``): True: count the multiply-adds of this step, for ``macs``.
        last_only (``last_only``, decoder profile): True: return only the logits of the last new token, ``(b, 1, V)``.
        The cache afterwards is the same; ``counts`` is never passed with it.
        context (``contexts``, decoder profile): the number of the sequence's context; absent: 0. All steps of a
        sequence have the same until it is reset: ``weights["context"][context]`` is added to each token's embedding.
        """
        raise self._not_implemented("step")

    # --- optional, whatever is claimed ---
    @classmethod
    def refuses(cls, config: Config, device: str) -> str | None:
        """Why this config is not supported, or None. Default: every config is supported."""
        return None

    def close(self, cache: Cache) -> None:  # noqa: B027 - a default that does nothing
        """Ends the sequence. Default: the cache is dropped."""

    def runtime_info(self) -> dict[str, Any]:
        """What ran since the backend was built: versions, providers, graphs. Default: nothing is reported.

        ``device``: the device of the outputs, as torch names it (``cpu``, ``cuda``, ``cuda:1``). If it is not the
        requested one, the run counts as a fallback. With ``--device cuda`` it must be reported; otherwise no clause
        passes and nothing is timed. ``precision``: in which class matrix products are computed (``float32``,
        ``float32 by tf32``); on a GPU no times are compared without it. ``fallback``: a sentence that says that
        something else ran than the backend's name promises; everything judged before is *not tested*.
        """
        return {}

    def synchronise(self) -> None:  # noqa: B027 - a default that does nothing
        """Waits until the device has finished; a timed region ends with it. Default: nothing to wait for."""

    def device_ns(self, call: Callable[[int], object], steps: int) -> int | None:
        """The device's own nanoseconds for ``steps`` steps. Default: None, they cannot be measured.

        ``call(copy)`` makes one step on that copy of the cache, and can be repeated.
        """
        return None

    def allocated(self) -> int | None:
        """By how many bytes the device's allocator has grown at most since the last call. Default: None, not known."""
        return None

    def count(self, call: Callable[[], None]) -> Mapping[str, Mapping[str, int]]:
        """Runs the call and counts what it does, by counter (``bench.counters.record.COUNTERS``) and by kind, such as
        ``{"operators": {"aten.mm": 17}}``. Default: it counts nothing."""
        call()
        return {}

    def counted_by(self) -> Mapping[str, str]:
        """The versions that operators, allocations and graphs depend on. Default: none."""
        return {}

    # --- one method for each ability of the same name ---
    def uncached_forward(self, *inputs: Any, **options: Any) -> Array:
        """The forward without a cache on whole sequences, inputs and output as in ``step``; touches no cache.

        Keywords ``last_only`` and ``context`` as in ``step``.
        """
        raise self._not_implemented("uncached_forward")

    def length(self, cache: Cache) -> list[int]:
        """How many tokens each row holds."""
        raise self._not_implemented("length")

    def free_slots(self, cache: Cache) -> list[int]:
        """How many more tokens each row can take."""
        raise self._not_implemented("free_slots")

    def truncate(self, cache: Cache, length: Any) -> Cache:
        """Keeps the first ``length`` tokens of each row. Raises ValueError unless ``0 <= length <=`` the length.

        ``length`` is an int; if ``truncate_rows`` is claimed, it may be a list of one int for each row. With a claim
        ``rollback`` it is never so small that more tokens would have to be undone, unless ``too_deep="refused"``: then
        such a length must raise ValueError.
        """
        raise self._not_implemented("truncate")

    def fork(self, cache: Cache) -> Cache:
        """A second cache with the same contents; the two are independent."""
        raise self._not_implemented("fork")

    def reorder(self, cache: Cache, rows: list[int]) -> Cache:
        """Row ``i`` becomes the old row ``rows[i]``; duplicates are legal."""
        raise self._not_implemented("reorder")

    def reset(self, cache: Cache) -> Cache:
        """Empties every row and keeps the batch."""
        raise self._not_implemented("reset")

    def contents(self, cache: Cache) -> list[list[tuple[Array, Array]]]:
        """For each layer, for each row, keys and values ``(g, s, d)`` as float32: the newest ``s`` tokens in logical
        order, all of them unless the claim ``retention`` is ``window``. Quantised ones are returned dequantised."""
        raise self._not_implemented("contents")

    def poison(self, cache: Cache, keys: float | None, values: float | None) -> None:
        """Fills every slot that holds no token of any sequence, in every layer: keys, values, or both. Where it is not
        known which slots are which, both are filled."""
        raise self._not_implemented("poison")

    def bytes(self, cache: Cache) -> int:
        """Bytes of the keys and values of the sequence, all layers together."""
        raise self._not_implemented("bytes")

    def macs(self) -> int:
        """Multiply-adds of the last step with ``count_macs``."""
        raise self._not_implemented("macs")

    def graph_count(self) -> int:
        """How many graphs this backend has compiled or captured so far."""
        raise self._not_implemented("graph_count")

    def generate(self, tokens: Array, new: int, **options: Any) -> Array:
        """Greedy generation (decoder profile): for prompts ``(b, t)`` the ids of the ``new`` tokens that follow,
        ``(b, new)``, both int64. No token ends it early. It uses a cache of its own and touches no sequence.
        Keyword ``context`` as in ``step``."""
        raise self._not_implemented("generate")

    def _not_implemented(self, ability: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not implement the ability {ability!r}")


class BlackBox(Backend):
    """A backend with weights of its own (claim ``reference="self"``), judged by its own forward without a cache.

    It is built with no weights. Profile ``hidden``: hidden states ``(b, t, width)`` to ``(b, t, config.outputs)``.
    """

    configs: Mapping[str, Config]
    """Its configs by name: ``decoder-self`` or ``hidden-self``."""
    recognised: str
    """How it is called, in words."""
    assumed: tuple[str, ...] = ()
    """What was assumed about it, one sentence each."""
    not_tried: tuple[str, ...] = ()
    """What the target has and no clause tries, in a few words each, such as ``crop of its past``."""
    held: Mapping[str, int] | None = None
    """Measured on a long sequence: its ``tokens``, how many of them the cache holds (``held``), and how many of them
    its last output depends on (``seen``). None: not known, or outputs depend on all of them."""
    reference: str = ""
    """The address of another artefact with the same weights, such as ``hf:DIRECTORY``, whose forward without a cache is
    the reference; empty: its own forward is."""
    cache_dtype: str = ""
    """The dtype that its own cache has, where it is judged by another artefact and that is therefore no claim."""
    source: str = ""
    """The file whose change makes earlier results void; empty: none."""
    parameters: int = 0
    """How many weights it has, as far as it is known: ``kvconform check`` tries less on a large model."""

    @abstractmethod
    def uncached_forward(self, *inputs: Any, **options: Any) -> Array:
        """The forward without a cache, which is the reference; it touches no cache.

        Keyword ``context`` as in ``step``."""

    @abstractmethod
    def perturbed(self, storage: float, accumulation: float, seed: int) -> Any:
        """A copy with perturbed weights; only its ``uncached_forward`` is called. Each weight, and each hidden state,
        becomes ``w * (1 + (storage + accumulation * sqrt(n)) * xi)`` with ``xi`` uniform in (-1, 1) from the seed and
        ``n`` the number of terms in the sums that it is part of (1 for vectors). The backend itself does not change."""

    def variants(self) -> Mapping[str, Any]:
        """Models with the same weights that differ from this one in one thing each, as exporters change it; only their
        ``uncached_forward`` is called, to name what another artefact computes. The keys complete "what the reference
        gives ...", such as "without its window". Default: none are known."""
        return {}

    def script_setup(self) -> str | None:
        """Python source, at module level, that imports the target and builds it as this backend was built, without this
        package: numpy is imported as ``np`` already. It is part of a reproduction (``explain.repro``). Default: None,
        no script can be written."""
        return None

    def script(self, program: Program, tag: str) -> str:
        """Python source after ``script_setup`` that runs the program step by step, each call written out.

        The input of step ``i`` is the numpy array ``x<tag><i>``; the output must be assigned to ``y<tag><i>`` as a
        float32 numpy array. A comment at the end of its line names each step."""
        raise NotImplementedError(f"{type(self).__name__} writes no script")


METHODS = (
    "uncached_forward",
    "length",
    "free_slots",
    "truncate",
    "fork",
    "reorder",
    "reset",
    "contents",
    "poison",
    "bytes",
    "macs",
    "graph_count",
    "generate",
)
"""The abilities that are a method of the same name; the others are keywords or properties of ``step``."""


def invalid(kind: Any) -> str:
    """What is wrong with a backend before it runs, in one sentence, or nothing.

    ``kind``: a class, or an object that builds a backend when called, of which only the claims are checked here.

    A method without its claim is an error only in the class that sets ``claims`` or in one derived from it: a subclass
    that narrows the claims of its base inherits methods that it no longer claims.
    """
    claims = getattr(kind, "claims", None)
    if claims is None:
        return "declares no claims (an attribute ``claims = Claims(...)``)"
    if not isinstance(claims, Claims):
        return f"claims is a {type(claims).__name__}, want kvconform.Claims"
    if not isinstance(kind, type):
        return "" if callable(kind) else f"is a {type(kind).__name__}, want a class"
    if hasattr(kind, "__getattr__"):  # it delegates: its methods are known only of a built one
        return ""
    if claims.interface == "generation" and "generate" not in claims.abilities:
        return "claims interface='generation' and not the ability 'generate'"
    for name in () if claims.interface == "generation" else ("start", "step"):
        if not _implements(kind, name):
            return f"has no method {name}()"
    if getattr(kind, "__init__") in (object.__init__, Backend.__init__):  # noqa: B009 - mypy: of a class, not an instance
        return "has no constructor __init__(config, weights, device)"
    return unimplemented(kind, claims) or _unclaimed(kind, claims)


def unimplemented(kind: type, claims: Claims) -> str:
    """The ability that is claimed and has no method, as a sentence, or nothing."""
    own = ("uncached_forward", "perturbed") if claims.reference == "self" else ()
    for name in own:
        if not _implements(kind, name):
            return f"claims reference='self' and has no method {name}()"
    for name in METHODS:
        if name in claims.abilities and not _implements(kind, name):
            return f"claims the ability {name!r} and has no method {name}()"
    return ""


def _implements(kind: type, name: str) -> bool:
    """Whether a class has a method that is not the default of the base classes."""
    found = getattr(kind, name, None)
    return callable(found) and found not in (getattr(base, name, None) for base in (Backend, BlackBox))


def _unclaimed(kind: type, claims: Claims) -> str:
    for base in kind.__mro__:
        if base in (Backend, BlackBox):
            break
        for name in METHODS:
            if vars(base).get(name, vars(Backend)[name]) is not vars(Backend)[name] and name not in claims.abilities:
                return f"has a method {name}() and does not claim the ability {name!r}: claim it, or rename the method"
        if "claims" in vars(base):
            break
    return ""


def completed(built: Any) -> Backend:
    """A built backend with every optional method: one that does not inherit from Backend gets the missing defaults."""
    if isinstance(built, Backend):
        return built
    base = BlackBox if built.claims.reference == "self" else Backend
    names = [name for name in dir(base) if not name.startswith("_")]
    given = {
        name: getattr(built, name)
        for name in (*names, *Backend.__annotations__, *base.__annotations__)
        if hasattr(built, name)
    }
    body = {name: staticmethod(value) if callable(value) else value for name, value in given.items()}
    made: Backend = type(type(built).__name__, (base,), {**body, "__init__": lambda self: None})()
    return made
