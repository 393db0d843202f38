"""`make fuzz`: bad and good input at scale, and any order of events.

Prints its seed, a line for each round, and every fault once; ends with 1 if there was one. `--help` lists the options.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from app.tables import upgrade
from tests.conftest import Valkey
from tests.fuzz import machine, services
from tests.fuzz.cases import Report, run
from tests.rig import free_port

#: Random cases of each operation in one round, beside those that are enumerated.
EXAMPLES = 60


def main() -> int:
    """The number for the shell: 0 if there was no fault."""
    options = _options()
    # What refuses a bad request writes a line for it.
    logging.disable(logging.ERROR)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = folder / "migrated.db"
        upgrade(f"sqlite:///{database}")
        valkey = Valkey(free_port(), folder)
        valkey.start()
        try:
            faults = _cases(options, folder, valkey, database)
            if options.runs:
                _events(options, folder, valkey, database)
        finally:
            valkey.kill()
    for fault, command in faults.items():
        print(f"FAULT {fault}\n    {command}")
    return 1 if faults else 0


def _cases(options: argparse.Namespace, folder: Path, valkey: Valkey, database: Path) -> dict[str, str]:
    total = Report()
    began = time.monotonic()
    number = options.seed
    while total.cases < options.cases:
        for name in services.NAMES:
            valkey.flush()
            place = folder / f"{name}-{number}"
            place.mkdir()
            with services.open_service(name, place, valkey.url, database, seed=number) as service:
                report = run(service, seed=number, examples=EXAMPLES)
            total.add(report)
            print(f"{name} seed {number}: {report}; {total.cases} in {time.monotonic() - began:.0f} s", flush=True)
        number += 1
    if total.cases:
        print(f"all cases: {total}", flush=True)
    return total.faults


def _events(options: argparse.Namespace, folder: Path, valkey: Valkey, database: Path) -> None:
    valkey.flush()
    with machine.platform(valkey.url, f"sqlite:///{database}", str(folder / "blobs")) as dispatch:
        began = time.monotonic()
        steps = machine.run(dispatch, runs=options.runs, steps=options.steps, number=options.seed)
    print(f"events: {options.runs} runs, {steps} steps in {time.monotonic() - began:.0f} s; every promise held")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="the same seed makes the same cases")
    parser.add_argument("--cases", type=int, default=40_000, help="requests to both services, at least (40000)")
    parser.add_argument("--runs", type=int, default=500, help="runs of the machine over row and ledger (500)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each of them, at most (50)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
