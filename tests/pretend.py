"""A pretended GPU: real values, computed on the CPU, in tensors that say they are on cuda:0 and refuse to
mix.

    with pretend.gpu() as waits:
        ...  # any code: it runs as on a machine with one GPU

What a real GPU refuses raises here, too: tensors of two devices in one operation, `.numpy()` of a GPU's
tensor, a generator of the other device. `waits` counts, by place in the code, what makes the processor wait
until the GPU has caught up: reading a number or a tensor back, an operation whose result has a size that
the GPU knows first, and a copy to the GPU that is not from pinned memory or not asked for with
non_blocking.

How: every operation of PyTorch passes through a TorchDispatchMode, `Watch`, which compares where its
tensors claim to be, computes it on the CPU, and marks what comes out. (FakeTensorMode, which PyTorch has
for this, holds no values, and its backward pass needs a driver.) It is no model of time, and CUDA's own
kernels are not run.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, aten = torch.device("cuda", 0), torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)  # the two operations that may see both devices
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
           aten._unsafe_index.Tensor)  # their indices may be on the CPU
JOINED = (aten.cat.default, aten.stack.default)  # they refuse even a single number of the CPU's
WAITS = {aten._local_scalar_dense.default: "a number read", aten.nonzero.default: "a size not known",
         aten.masked_select.default: "a size not known"}
tensor_to = torch.Tensor.to


class Gpu(torch.Tensor):
    """A CPU tensor that claims to be on the GPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Watch.active.run(function, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        if not isinstance(value, Gpu):
            raise RuntimeError("incompatible tensor type: the data of a tensor on cuda:0 can't be on the cpu")
        torch.Tensor.data.__set__(self, value)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        Watch.active.note("a tensor read")
        return plain(self).tolist()

    def __format__(self, how):
        return format(self.item(), how) if how else repr(self)

    def __repr__(self):
        return f"{plain(self)!r} on cuda:0"

    def __reduce_ex__(self, protocol):  # torch.save: what is loaded is put on a device by map_location
        return plain(self).__reduce_ex__(protocol)


def mark(x):
    """A CPU tensor → the same memory as a tensor on the GPU."""
    return x if isinstance(x, Gpu) else torch.Tensor._make_subclass(Gpu, x.detach())


def plain(x):
    """A tensor on the GPU → a copy on the CPU."""
    with torch._C._DisableTorchDispatch():
        return x.detach().as_subclass(torch.Tensor).clone()


class Watch(TorchDispatchMode):
    """Sees every operation: refuses what a GPU refuses, counts what it waits for, and computes it on the
    CPU."""

    active = None

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def note(self, wait):
        """Count a wait at the line of the nearest caller that is neither PyTorch nor this file."""
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        library = "transformers/" if "transformers" in path.parts else ""
        self.waits[f"{wait}: {library}{path.name}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, Gpu) for x in tensors)
        wanted = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if on_gpu and function not in COPIES:
            self.refuse_mixed(function, args, kwargs)
        self.count_waits(function, args, kwargs, on_gpu, wanted)
        if wanted:
            kwargs = kwargs | {"device": torch.device("cpu")}
        with torch._C._DisableTorchDispatch():
            out = function(*args, **kwargs)
        in_place = function.overloadpacket._qualified_op_name.endswith("_")
        if in_place and args and isinstance(out, torch.Tensor):
            return args[0]
        in_backward = torch._C._current_graph_task_id() != -1  # which makes some tensors from nothing
        if on_gpu or wanted or (in_backward and not tensors):
            return tree_map_only(torch.Tensor, mark, out)
        return out

    def refuse_mixed(self, function, args, kwargs):
        checked = (args[0], args[2:], kwargs) if function in INDEXED else (args, kwargs)
        first = function._schema.arguments[0].alias_info
        written = args[0] if first is not None and first.is_write else None
        for x in tree_leaves(checked):
            if not isinstance(x, torch.Tensor) or isinstance(x, Gpu):
                continue
            if x.ndim or function in JOINED or x is written:  # else a number, which may come from the CPU
                raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but found at "
                                   f"least two devices, cuda:0 and cpu (a tensor of shape {tuple(x.shape)})")

    def count_waits(self, function, args, kwargs, on_gpu, wanted):
        if on_gpu and function in WAITS:
            self.note(WAITS[function])
        if on_gpu and function in INDEXED:
            for index in args[1]:
                if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                    self.note("a size not known")
        source = None
        if function is aten._to_copy.default and wanted and not on_gpu:
            source = args[0]
        elif function is aten.copy_.default and isinstance(args[0], Gpu) and not isinstance(args[1], Gpu):
            source = args[1]
        if source is not None and source.numel() > 1:
            waits_not = getattr(source, "pretended_pinned", False) and kwargs.get("non_blocking", False)
            if not waits_not:
                self.note("a copy from pageable memory")


# ---- What is not an operation, and has to be replaced by its name --------------------------------------


def moved(self, *args, **kwargs):
    """Tensor.to, from or to the pretended GPU."""
    target = kwargs.get("device", args[0] if args else None)
    if isinstance(target, Gpu):
        return tensor_to(self, CUDA, target.dtype, *args[1:])
    if not isinstance(target, (str, torch.device)):
        return tensor_to(self, *args, **kwargs)
    if torch.device(target).type == "cuda":  # with its index, or PyTorch would ask the driver for it
        kwargs.pop("device", None)
        return tensor_to(self, CUDA, *args[1:], **kwargs)
    if torch.device(target).type == "cpu" and isinstance(self, Gpu):
        Watch.active.note("a tensor read")
        return tensor_to(plain(self), *args, **kwargs)
    return tensor_to(self, *args, **kwargs)


def pin_memory(self):
    if isinstance(self, Gpu):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = self.clone()
    copy.pretended_pinned = True
    return copy


def made(make):
    """torch.tensor or torch.as_tensor, which look for their device before any mode is asked."""
    def on_device(data, *args, device=None, **kwargs):
        out = make(data, *args, **kwargs)
        return out if device is None else out.to(device)
    return on_device


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        generator = torch._C.Generator.__new__(cls, "cpu")
        generator.pretended_device = torch.device(device).type
        return generator


def multinomial(p, *args, generator=None, real=torch.multinomial):
    if generator is not None and generator.pretended_device != p.device.type:
        raise RuntimeError(f"Expected a '{p.device.type}' device type for generator but found "
                           f"'{generator.pretended_device}'")
    return real(p, *args, generator=generator)


def grouped(lists, with_indices=False, real=torch._C._group_tensors_by_device_and_dtype):
    """What optimisers and clipping sort tensors by. C++ sees CPU tensors, so it is told here where they
    are."""
    groups = {}
    for (_, dtype), (values, indices) in real(lists, with_indices).items():
        groups[values[0][0].device, dtype] = (values, indices)
    return groups


@contextlib.contextmanager
def gpu(bf16=True):
    """Pretend that there is one GPU, with arithmetic in bf16 or without → Counter of waits."""
    properties = mock.Mock(major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    properties.name = "a pretended GPU"
    idle = mock.Mock(**{"is_capturing.return_value": False})
    watch = Watch()
    cuda = {"is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
            "current_device": lambda: 0, "is_bf16_supported": lambda including_emulation=True: bf16,
            "get_device_name": lambda *_: properties.name, "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (9, 0), "synchronize": lambda *_: None,
            "empty_cache": lambda: None, "is_current_stream_capturing": lambda: False,
            "reset_peak_memory_stats": lambda *_: None, "max_memory_allocated": lambda *_: 0}
    replaced = [(torch.cuda, name, value) for name, value in cuda.items()] + [
        (torch.accelerator, "current_stream", lambda *_: idle),
        (torch.Tensor, "to", moved), (torch.Tensor, "pin_memory", pin_memory),
        (torch.Tensor, "cpu", lambda self, **_: moved(self, "cpu")),
        (torch.Tensor, "cuda", lambda self, *_, **__: moved(self, CUDA)),
        (torch, "tensor", made(torch.tensor)), (torch, "as_tensor", made(torch.as_tensor)),
        (torch, "Generator", Generator), (torch, "multinomial", multinomial),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped)]
    lift = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    # PyTorch keeps a list of functions that `with torch.device(…)` changes: torch.tensor is another in here.
    with contextlib.ExitStack() as stack:
        _device_constructors.cache_clear()
        stack.callback(_device_constructors.cache_clear)
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…) makes a CPU tensor first
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved module gets new parameters
        stack.enter_context(watch)
        Watch.active = watch
        try:
            yield watch.waits
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
