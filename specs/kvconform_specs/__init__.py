"""The spec of a KV cache, as data and arithmetic.

Only ``numpy`` is needed to import ``config``, ``program``, ``claims``, ``history``, ``tensors``, ``definition``,
``bounds`` and ``oracle``; the strategies of programs in ``clauses`` need ``hypothesis`` as well.
"""

SUITE_VERSION = "0.5.0"
"""Version of the suite's clauses. A change that can turn a conformant backend red raises it."""
