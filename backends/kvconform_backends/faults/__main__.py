"""``python -m kvconform_backends.faults``: how many programs each clause needs to convict each fault."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from kvconform.budget import BUDGETS
from kvconform.subject import Launch, Subject
from kvconform_backends.faults import FAULTS
from kvconform_backends.faults.conviction import convict


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvconform_backends.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="smoke")
    parser.add_argument("names", nargs="*", help="faults or clauses whose names begin so; none: all")
    asked = parser.parse_args()
    names = tuple(asked.names)
    print("fault", "stealth", "clause", "config", "outcome", "programs", "sentence", sep="\t")
    with tempfile.TemporaryDirectory(prefix="kvconform-") as folder:
        for fault in FAULTS:
            clauses = [c for c in fault.clauses if not names or fault.name.startswith(names) or c.startswith(names)]
            if not clauses:
                continue
            with Subject(Launch(fault.address)) as subject:
                for clause in clauses:
                    found = convict(fault, clause, subject, BUDGETS[asked.budget], asked.seed, Path(folder))
                    row = (clause, found.verdict.config, found.verdict.outcome.value, found.programs)
                    print(
                        fault.name, "yes" if fault.stealth else "no", *row, found.verdict.sentence, sep="\t", flush=True
                    )


if __name__ == "__main__":
    main()
