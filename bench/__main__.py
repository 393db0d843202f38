"""`make bench`: every measurement, one after the other."""

import subprocess
import sys

from engines import packaged

MEASUREMENTS = (
    "overhead",
    "depth",
    "chat",
    "openai",
    "llm_engine",
    "engines",
    "fleet",
    "failover",
    "load",
    "limits",
    "gpu_admin",
    "metrics",
)


def main() -> None:
    """Run them all; the exit code is the last one that is not 0."""
    packaged.prepare("smollm2-135m-instruct")
    code = 0
    for name in MEASUREMENTS:
        print(f"\n== python -m bench.{name}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode or code
    sys.exit(code)


if __name__ == "__main__":
    main()
