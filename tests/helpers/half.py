"""DeepSpeed's answer to whether the device computes in fp16, which for a CPU is whether it has AVX512-FP16."""

from collections.abc import Callable

from deepspeed.accelerator import get_accelerator


def answer(supported: bool, put: Callable = setattr) -> None:
    """Let DeepSpeed give this answer: torch computes in fp16 on any CPU. put: monkeypatch.setattr, to end it with a test."""
    put(type(get_accelerator()), "is_fp16_supported", lambda self: supported)  # supported_dtypes asks it too
