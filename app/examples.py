"""Examples for the documentation: one job of each type, the seed's, with real files of a pixel and a few samples."""

from typing import Any

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mO4p6EBAAMWAS9+uuUSAAAAAElFTkSuQmCC"
_SOUND = "UklGRjQAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YRAAAAAAAAAAAAAAAAAAAAAAAAAA"

JOBS: dict[str, Any] = {
    "llm": {
        "summary": "A chat",
        "value": {
            "type": "llm",
            "params": {
                "messages": [
                    {"role": "system", "content": "你是一个有帮助的助手"},
                    {"role": "user", "content": "你好，请介绍一下自己"},
                ],
                "max_tokens": 2048,
                "temperature": 0.7,
                "top_p": 0.9,
            },
            "priority": 0,
            "region": "asia-east",
            "allow_cross_region": True,
            "timeout_seconds": 300,
        },
    },
    "image_gen": {
        "summary": "A picture",
        "value": {
            "type": "image_gen",
            "params": {
                "prompt": "a beautiful sunset over the ocean, highly detailed",
                "negative_prompt": "blurry, low quality",
                "width": 1024,
                "height": 1024,
                "steps": 4,
                "seed": 12345,
            },
        },
    },
    "vision": {
        "summary": "A question about a picture",
        "value": {
            "type": "vision",
            "params": {
                "image_base64": _PIXEL,
                "task": "image_qa",
                "question": "这张图片里有什么？",
                "max_tokens": 1024,
            },
        },
    },
    "whisper": {
        "summary": "Speech to text",
        "value": {
            "type": "whisper",
            "params": {"audio_base64": _SOUND, "language": "zh", "task": "transcribe"},
        },
    },
    "embedding": {
        "summary": "Vectors for a search",
        "value": {
            "type": "embedding",
            "params": {"input": ["什么是向量检索？"], "input_type": "query"},
            "model": "BAAI/bge-m3",
        },
    },
    "comfyui": {
        "summary": "A ComfyUI workflow",
        "value": {
            "type": "comfyui",
            "params": {
                "workflow": {
                    "1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
                    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
                    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}},
                },
                "images": {"cat.png": _PIXEL},
            },
        },
    },
    "triton": {
        "summary": "An inference by a Triton server",
        "value": {
            "type": "triton",
            "params": {
                "model_name": "MAM",
                "inputs": [{"name": "INPUT0", "shape": [1, 3], "datatype": "FP32", "data": [[1.0, 2.0, 3.0]]}],
                "outputs": [{"name": "OUTPUT0"}],
            },
        },
    },
}

DRY_RUNS: dict[str, Any] = {
    "at home": {
        "summary": "A client in China, with a free slot near by",
        "value": {
            "region": "asia-east",
            "reason": "asia-east has a free slot for llm.",
            "client_region": "asia-east",
            "origin": "country",
            "estimated_wait_seconds": 0,
            "queue_position": 1,
            "available_workers": 3,
            "model": "Qwen/Qwen2.5-7B-Instruct",
        },
    },
    "elsewhere": {
        "summary": "The region that the job names has no worker",
        "value": {
            "region": "asia-east",
            "reason": "No live worker serves llm in asia-south. asia-east, 3805 km away, is the nearest that can.",
            "client_region": "asia-south",
            "origin": "request",
            "estimated_wait_seconds": 12,
            "queue_position": 9,
            "available_workers": 3,
            "model": "Qwen/Qwen2.5-7B-Instruct",
        },
    },
}

_STREAMED = """id: queued-1-1
event: status
data: {"status":"queued","attempt":1,"queue_position":1,"estimated_wait_seconds":0,"queued_reason":null}

id: 1-1734508800000-1-0
event: status
data: {"status":"running","attempt":1}

id: 1-1734508800000-2-1
event: token
data: {"delta":"你好","choice":0,"attempt":1}

id: end
event: result
data: {"job_id":"0b0f8f6e-0b1c-4a53-9c54-5a1f0d3a1a11","status":"completed","result":{"response":"你好"}}

"""

#: One server-sent event; data is JSON as text.
EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}

#: How the document shows a stream of events.
EVENTS: dict[str, Any] = {
    "description": "Server-sent events: status, progress, token; last result or error, whose data is the job.",
    "content": {"text/event-stream": {"schema": EVENT, "example": _STREAMED}},
}
