"""An accelerator that is none: its tensors lie and are computed on the CPU, but say that they are elsewhere,
refuse to be mixed with tensors that are not, and count what would make a GPU wait: copies to it that are not
from pinned memory, reads of it.

with Pretended() as gpu: Finetuner(..., device=DEVICE).episode(); gpu.waits"""

import threading
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
READS = {  # of a number or all numbers
    "__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu", "numpy", "__array__", "equal",
    "allclose", "nonzero", "masked_select",
}  # fmt: skip
COPIES = {"tensor", "as_tensor", "from_numpy"}  # factories whose numbers come from the host
FREE = {  # take tensors of both kinds
    "copy_", "lstm", "_pack_padded_sequence", "_pad_packed_sequence", "_has_compatible_shallow_copy_type",
}  # fmt: skip
ACTIVE = threading.local()


class There(torch.Tensor):
    "A tensor that pretends."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return DEVICE if getattr(ACTIVE, "on", False) else torch.device("cpu")

    @property
    def is_cpu(self):
        return self.device.type == "cpu"

    def __deepcopy__(self, memo):
        copied = there(self.detach().clone()).requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return here(self.detach().clone()).__reduce_ex__(protocol)


def there(value):
    "The same tensors, pretending."
    for tensor in tree_leaves(value):
        if isinstance(tensor, torch.Tensor):
            tensor.__class__ = There
    return value


def here(tensor):
    tensor.__class__ = torch.Tensor
    return tensor


def is_place(value):
    return isinstance(value, torch.device) or isinstance(value, str) and value in ("cpu", "cuda", "cuda:0")


class Pretended(TorchFunctionMode):
    "Inside, DEVICE is there; `waits` counts by name."

    def __enter__(self):
        self.waits, ACTIVE.on = Counter(), True
        self.around = mock.patch.multiple(torch.cuda, synchronize=lambda *_: None)
        self.around.start()
        self.before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        ACTIVE.on = False
        self.around.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(self.before)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        pretend = any(isinstance(value, There) for value in tensors)
        if name == "to":
            return self.moved(*args, **kwargs)
        if name == "pin_memory":  # of which a device takes its copy when its turn comes
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if is_place(kwargs.get("device")):
            return self.made(function, name, tensors, args, kwargs)
        if not pretend:
            return function(*args, **kwargs)
        if name in READS:
            self.waits[name] += 1
            found = args[0].clone() if name == "cpu" else function(*args, **kwargs)
            return there(found) if name in ("nonzero", "masked_select") else found
        return self.computed(function, name, tensors, args, kwargs)

    def computed(self, function, name, tensors, args, kwargs):
        "What an operation makes of tensors that are there."
        strangers = [t for t in tensors if not isinstance(t, There) and t.dim()]
        indexing = name in ("__getitem__", "__setitem__")
        if strangers and name not in FREE and not (indexing and isinstance(args[0], There)):
            raise RuntimeError(f"{name} mixes {DEVICE} with a tensor of the CPU {tuple(strangers[0].shape)}")
        if indexing:  # an index of the host is sent there, and of a mask the host must know how many it keeps
            masks = [
                t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool
            ]
            self.waits["index"] += bool(strangers or masks)
        if name == "copy_" and strangers:
            self.waits["copy_"] += 1
        found = function(*args, **kwargs)
        if name == "copy_":
            return found
        if name == "_pack_padded_sequence":  # sizes of steps stay on the host
            return there(found[0]), found[1]
        return there(found)

    def made(self, function, name, tensors, args, kwargs):
        "A new tensor on a named device."
        place = torch.device(kwargs["device"])
        if place.type == "cuda":
            kwargs["device"] = "cpu"
            self.waits[name] += name in COPIES and not any(isinstance(t, There) for t in tensors)
            return there(function(*args, **kwargs))
        return function(*args, **kwargs)

    def moved(self, tensor, *where, **how):
        "Tensor.to"
        given = [*where, *how.values()]
        other = next((value for value in given if isinstance(value, torch.Tensor)), None)
        place = next((torch.device(value) for value in given if is_place(value)), tensor.device)
        place = place if other is None else other.device
        kind = next((value for value in given if isinstance(value, torch.dtype)), tensor.dtype)
        kind = kind if other is None else other.dtype
        found = tensor.to(kind)
        if place.type != tensor.device.type:
            ahead = getattr(tensor, "pinned", False) and how.get("non_blocking")
            self.waits["to" if place.type == "cuda" else "cpu"] += not ahead
            found = found.clone() if found is tensor else found
        return there(found) if place.type == "cuda" else found
