"""Numerical contexts: float64 to the end, autocast off everywhere, and true derivatives.

`model.double()` alone is not a float64 forward: transformers casts to float32 inside RMSNorm,
rotary embeddings and eager softmax, and at η = 1e-10 the logits then move by rounding noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from entropy_probe.config import PrecisionSection
from entropy_probe.errors import ConfigError
from entropy_probe.model.quiet import quiet_transformers

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
# Below this size the overhead of a second thread exceeds its work: 15× slower was measured on tiny
# models.
_ONE_THREAD_BELOW = 20_000_000


def str_to_dtype(name: str) -> torch.dtype:
    """`"float32"` → `torch.float32`, and so on."""
    try:
        return _DTYPES[name.removeprefix("torch.").lower()]
    except KeyError:
        remedy = f"choose one of {', '.join(sorted(_DTYPES))}"
        raise ConfigError(f"dtype {name!r}", "is not known", remedy) from None


def maybe_cast_logits_fp32(logits: Tensor) -> Tensor:
    """Logits in float32 or wider: log-softmax in bf16 is off by up to 1e-2."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


@contextmanager
def apply_global_precision(
    allow_tf32: bool = False,
    matmul_precision: str = "high",
) -> Iterator[None]:
    """Set TF32 and matmul precision, and put the user's settings back.

    `matmul_precision` takes effect only with `allow_tf32`: "high" *is* TF32 on NVIDIA hardware.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(matmul_precision if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """`torch.use_deterministic_algorithms(True, warn_only=True)` for the length of the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if enabled:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)


@contextmanager
def threads_for(num_parameters: int) -> Iterator[int]:
    """One thread for a small model, the user's setting otherwise; the setting is put back."""
    before = torch.get_num_threads()
    chosen = 1 if num_parameters < _ONE_THREAD_BELOW else before
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)


_INTEGRAL = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}
_CASTS = {*_NARROWING, Tensor.to, Tensor.type, Tensor.type_as}


class TrueFloat64(TorchFunctionMode):
    """Keep float64 tensors as they are, in casts to float32 and under `dtype=float32`.

    Casts of integers to float32 become casts to float64, so that positions meet float64
    frequencies. Code that was written for float32 islands thereby runs in float64 throughout, on a
    module whose parameters and floating buffers are float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _CASTS and kwargs.get("dtype") is not torch.float32:  # nearly all there are
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        operand = next((a for a in args if isinstance(a, Tensor)), kwargs.get("input"))
        if not isinstance(operand, Tensor) or operand.dtype not in (torch.float64, *_INTEGRAL):
            return func(*args, **kwargs)
        if func in _NARROWING:
            return operand.double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is Tensor.type_as and args[1].dtype is torch.float32:
            return operand.double()
        if func in (Tensor.to, Tensor.type) and len(args) > 1:
            target = args[1]
            if isinstance(target, Tensor) and target.dtype is torch.float32:
                return func(operand.double(), target.device, *args[2:], **kwargs)
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


class TrueDerivative(TorchFunctionMode):
    """Make reverse mode differentiate what the module computes.

    `detach` is the identity, and an embedding's padding token has a gradient. Without this mode
    peft detaches DoRA's weight norm, and torch leaves out the gradient of `padding_idx`, which
    matters where that token stands among a prompt or a response.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.detach, torch.detach):
            return args[0]
        if func is F.embedding:
            args = (*args[:2], None, *args[3:])
            kwargs = {key: value for key, value in kwargs.items() if key != "padding_idx"}
        return func(*args, **kwargs)


class LeanTangents(TorchFunctionMode):
    """In forward mode, y = Wx + b and ẏ = Wẋ where W and b have no tangent.

    torch takes ẏ = Wẋ + Ẇx with zeros for Ẇ: a third product, of a frozen layer as of a trained one.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        place = _INPUT.get(func)
        if place is None or kwargs or any(map(_has_tangent, (*args[:place], *args[place + 1 :]))):
            return func(*args, **(kwargs or {}))
        x, tangent = forward_ad.unpack_dual(args[place])
        if tangent is None:
            return func(*args)
        of_tangent = tangent @ args[2] if func is torch.addmm else F.linear(tangent, args[1])
        return forward_ad.make_dual(func(*args[:place], x, *args[place + 1 :]), of_tangent)


_INPUT: dict[Any, int] = {F.linear: 0, torch.addmm: 1}
"""Where x stands among the arguments of y = Wx + b; GPT-2's layers are the second kind."""


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def has_detached_norm(module: nn.Module) -> bool:
    """Whether the module detaches a part of itself (DoRA)."""
    return any("lora_magnitude_vector" in name for name, _ in module.named_parameters())


def untrained_tokens(module: nn.Module) -> set[int]:
    """Padding tokens of embeddings that are trained: autograd gives their vectors no gradient."""
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    trained = [part for part in embeddings if part.weight.requires_grad]
    return {part.padding_idx for part in trained if part.padding_idx is not None}


@contextmanager
def autocast_off() -> Iterator[None]:
    """Autocast off on every device type: for forwards, and for the backward passes after them."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def numerics(precision: PrecisionSection, num_parameters: int) -> Iterator[int]:
    """Precision, determinism and threads as configured, transformers quiet; all put back.

    Yields the threads.
    """
    with (
        autocast_off(),
        apply_global_precision(precision.allow_tf32, precision.matmul_precision),
        deterministic_algorithms(precision.deterministic_probe),
        quiet_transformers(),
        threads_for(num_parameters) as threads,
    ):
        yield threads


@contextmanager
def forward_context(
    dtype: torch.dtype,
    *,
    forward_mode: bool = False,
    differentiate: bool = False,
    tangents: bool = False,
) -> Iterator[None]:
    """The one context of every forward: autocast off, true float64 where it is asked for.

    `forward_mode`: attention by SDPA's MATH kernel, which alone has forward-mode and second
    derivatives. `differentiate`: under `TrueDerivative`. `tangents`: under `LeanTangents`.
    """
    with ExitStack() as stack:
        stack.enter_context(autocast_off())
        if forward_mode:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if differentiate:
            stack.enter_context(TrueDerivative())
        if tangents:
            stack.enter_context(LeanTangents())
        if dtype is torch.float64:
            stack.enter_context(TrueFloat64())
        yield
