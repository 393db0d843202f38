"""A small real server in vLLM's place: `vllm serve` with the same command line, /health and /v1/models."""

import argparse
import os
import time

from tests.gpu_admin import stand_in


class Handler(stand_in.Handler):
    """vLLM's answers."""

    models: tuple[str, ...] = ()

    def do_GET(self) -> None:  # noqa: N802
        """Health and models."""
        if self.path == "/health":
            self.send(b"", "text/plain")
        elif self.path.startswith("/v1/") and os.environ.get("VLLM_API_KEY"):
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path == "/v1/models":
            now = int(time.time())
            data = [{"id": name, "object": "model", "created": now, "owned_by": "vllm"} for name in self.models]
            self.answer({"object": "list", "data": data})
        else:
            super().do_GET()


def main() -> None:
    """`vllm serve MODEL ...`."""
    parser = argparse.ArgumentParser(prog="vllm")
    serve = parser.add_subparsers(required=True).add_parser("serve")
    serve.add_argument("model_tag")
    serve.add_argument("--host")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--served-model-name", nargs="+")
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    serve.add_argument("--max-model-len", type=int)
    serve.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"], default="auto")
    serve.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args()
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    if args.tensor_parallel_size != len(visible):
        parser.error(f"tensor parallel size {args.tensor_parallel_size} with GPUs {visible}")
    stand_in.obey()
    Handler.models = tuple(args.served_model_name or [args.model_tag])
    stand_in.serve(args.host or "0.0.0.0", args.port, Handler)
