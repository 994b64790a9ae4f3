"""Which device and floating-point type ``auto`` means here."""

from __future__ import annotations

import torch

from tea_rl.errors import TeaError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``mps`` into a device that is there.

    Raises:
        TeaError: unknown name, or no such device.
    """
    if device not in DEVICES:
        hint = did_you_mean(device, DEVICES)
        raise TeaError(f'model.device must be one of {", ".join(DEVICES)}, got "{device}".{hint}')
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, here in available.items() if here)
        raise TeaError(
            f"model.device is {device}, but torch finds none (available: {there}): use auto or cpu"
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn a dtype name into a torch type; ``auto`` as described at `tea_rl.backbone.load_backbone`.

    Raises:
        TeaError: unknown name.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        known = ("auto", *DTYPES)
        raise TeaError(
            f'model.dtype must be one of {", ".join(known)}, got "{dtype}".{did_you_mean(dtype, known)}'
        )
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer torch
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def cpu_has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX), which torch's attention kernel uses."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)()) and cpu_has_bfloat16()


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """Number format for the products of a head that reads what feeds ``weight``, a part of the backbone.

    The states hold no more than the backbone's format, so where that is bfloat16 and the device multiplies it in hardware, it
    serves the head as well. Everywhere else float32: float16 would need its losses scaled.
    """
    device = weight.device.type
    in_hardware = (
        cpu_has_bfloat16() if device == "cpu" else device == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.bfloat16 if weight.dtype == torch.bfloat16 and in_hardware else torch.float32
