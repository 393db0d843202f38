"""A small real server in llama-server's place: the options and GET /health of the worked example."""

import argparse
from pathlib import Path

from tests.gpu_admin import stand_in


class Handler(stand_in.Handler):
    """llama-server's answers."""

    def do_GET(self) -> None:  # noqa: N802
        """Health."""
        if self.path == "/health":
            self.answer({"status": "ok"})
        else:
            super().do_GET()


def main() -> None:
    """`llama-server --model FILE ...`."""
    parser = argparse.ArgumentParser(prog="llama-server")
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--alias", "-a")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--n-gpu-layers", "-ngl", default="auto")
    parser.add_argument("--ctx-size", "-c", type=int, default=0)
    args = parser.parse_args()
    stand_in.obey()
    if not Path(args.model).read_bytes().startswith(b"GGUF"):
        raise SystemExit("main: exiting due to model loading error")
    stand_in.serve(args.host, args.port, Handler)
