"""How much memory a step needs above what was there before it: measured where tensors have data, counted where they
have none (device "meta"). Nothing here decides what to do about it: see budget.py.
"""

import ctypes
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from spry_app.autodiff.duals import split

MIB = 2**20
T = TypeVar("T")


def with_peak(step: Callable[[], T], device: torch.device | str) -> tuple[T, float]:
    """What `step` returns, and the MiB of tensors alive above its start at its worst moment.

    Counts what the allocator hands out, temporaries inside operators too, and not the process (page cache, libraries).

    On "meta" nothing is computed: the same step runs on tensors without data, whose sizes are counted from birth to
    death, so a model that fits nowhere can be asked too. Attention is counted as the kernel of the CPU; temporaries
    inside other operators are not seen. Every number that the step reads is zero. It stands for a device beside the
    host, or for the host itself (`on_the_host`).
    """
    results: list[T] = []
    worst = _PEAKS[torch.device(device).type](lambda: results.append(step()), torch.device(device))
    return results[0], worst / MIB


_host: ContextVar[bool] = ContextVar("host", default=False)


@contextmanager
def on_the_host() -> Iterator[None]:
    """Inside it "meta" stands for the CPU: tensors on the CPU count as those on "meta" do, and bringing them there in
    their own format copies nothing.
    """
    token = _host.set(True)
    try:
        yield
    finally:
        _host.reset(token)


def peak_mib(step: Callable[[], object], device: torch.device | str) -> float:
    """The peak alone; see with_peak."""
    return with_peak(step, device)[1]


def settle_allocator(own_pages_from: int = 128 << 10) -> bool:
    """Have glibc give every block from so many bytes pages of its own, which the system gets back when it dies.

    Else such blocks come from a heap that aligned blocks cut into holes: the process then holds 1.3 to 4 times the
    peak that `with_peak` reads. The price is time (docs/performance.md). Call it before the first tensor is made.
    False where the C library is not glibc.
    """
    malloc_option = _glibc("mallopt")
    mmap_threshold = -3
    return malloc_option is not None and bool(malloc_option(mmap_threshold, own_pages_from))


def return_freed_memory() -> None:
    """Give the pages of freed tensors back to the system; glibc's heap would keep them for the process's next step."""
    gc.collect()
    torch.cuda.empty_cache()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


_WITHOUT_MEMORY = ("can't allocate memory", "Cannot allocate memory", "could not create a primitive")
"""The last is what oneDNN says where its own buffers cannot be had."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or PyTorch's allocator of any device, had no more to give; on the CPU that is a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sentence in str(error) for sentence in _WITHOUT_MEMORY
    )


def _glibc(function: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _cpu_peak(step: Callable[[], object], device: torch.device) -> int:
    """PyTorch keeps no peak for the CPU; its profiler records every allocation and release."""
    gc.collect()  # what dies in the step must have lived in it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        step()
    assert recorder.profiler is not None and recorder.profiler.kineto_results is not None
    events = [event for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _meta_peak(step: Callable[[], object], device: torch.device) -> int:
    with _attention_of_the_cpu(), _LiveBytes(_host.get()) as count:
        step()
    return int(count.peak)


_PEAKS: dict[str, Callable[[Callable[[], object], torch.device], int]] = {
    "cpu": _cpu_peak,
    "cuda": _cuda_peak,
    "meta": _meta_peak,
}


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages on "meta" that operations make. One that came in as an argument was there before.

    host: and those on the CPU, which a copy to "meta" in the same format is one of.
    """

    def __init__(self, host: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._host = host
        self._alive = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        out = _READS.get(func, func)(*args, **kwargs)
        if self._host and func is _TO and args[0].device != out.device and args[0].dtype == out.dtype:
            return out
        made = [tensor.untyped_storage() for tensor in _counted(out, self._host)]
        made = [storage for storage in made if id(storage) not in self._storages]
        if made:
            old = {id(tensor.untyped_storage()) for tensor in _counted((args, *kwargs.values()), self._host)}
            for storage in made:
                if id(storage) not in old and id(storage) not in self._storages:
                    self._follow(storage)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def died(_: object) -> None:
            self._alive -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, died)
        self._alive += size
        self.peak = max(self.peak, self._alive)


def _counted(some: Any, host: bool) -> Iterator[Tensor]:
    """Of the arguments of an operation, or of what it returns: a tensor, or a sequence of such."""
    if isinstance(some, Tensor):
        if some.is_meta or host:
            while is_functorch_wrapped_tensor(some):  # torch.func mostly unwraps them, and not for `tensor.data`
                some = get_unwrapped(some)
            if not some._is_zerotensor():  # a tangent that is zero as a whole never has memory
                yield some
    elif isinstance(some, list | tuple):
        for each in some:
            yield from _counted(each, host)


def _number(tensor: Tensor) -> Any:
    return torch.zeros((), dtype=tensor.dtype).item() if tensor.is_meta else tensor.item()


def _copy(tensor: Tensor, **options: Any) -> Tensor:
    device = options.get("device")
    if tensor.is_meta and device is not None and torch.device(device).type != "meta":
        return torch.zeros(tensor.shape, dtype=options.get("dtype") or tensor.dtype, device=device)
    copy: Tensor = _TO(tensor, **options)
    return copy


_TO = torch.ops.aten._to_copy.default
_READS: dict[Any, Callable[..., Any]] = {torch.ops.aten._local_scalar_dense.default: _number, _TO: _copy}
"""Where data would leave the device."""


@contextmanager
def _attention_of_the_cpu() -> Iterator[None]:
    """On "meta" PyTorch takes the MATH kernel, which keeps all scores; devices with data take one that does not.

    The function itself is replaced: torch.autograd.grad would switch a TorchFunctionMode off for what checkpoints
    compute again. What has a tangent, or no fused kernel, goes to PyTorch's own function as ever.
    """
    own = F.scaled_dot_product_attention
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    @functools.wraps(own)
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        tangents = [tangent for _, tangent in map(split, (query, key, value, attn_mask)) if tangent is not None]
        if not query.is_meta or tangents or dropout_p > 0 or not torch._C._get_flash_sdp_enabled():
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own
