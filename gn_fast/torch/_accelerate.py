"""`accelerate` and `restore`: gn_fast under a model that exists, and its activations fused where that is certain.

A norm stays the object that it is and changes its class; an activation that its norm applies now is replaced, in the
place where it is called, by a module that passes its input on and keeps the activation for `restore`.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import _activations
from ._arrays import DTYPES, Activation
from ._functional import group_norm
from ._module import GroupNorm
from ._trace import UnclearError, graphs


class Accelerated(GroupNorm):
    """A `torch.nn.GroupNorm` that was accelerated."""

    def _get_name(self) -> str:
        return "GroupNorm"


class Fused(nn.Identity):
    """In the place of an activation that the norm before it applies."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.training = activation.training
        self.activation = activation


@dataclass
class Report:
    """What `accelerate` did: names of modules, as `named_modules` has them.

    Attributes
    ----------
    replaced : list of str
        The norms that are gn_fast's now.
    fused : dict of str to str
        Of these, the ones that apply the activation that followed; and its name.
    left : dict of str to str
        Norms that stay as they are, and activations that stay apart; and why.
    """

    replaced: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.fused)} of them with the activation that follows"]
        lines += [f"  {name} + {self.fused[name]}" if name in self.fused else f"  {name}" for name in self.replaced]
        lines += ["left as they are:"] * bool(self.left)
        lines += [f"  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Put gn_fast under a model: each `torch.nn.GroupNorm` in it, in place.

    Parameters, buffers, hooks, training mode, device, dtype and state_dict stay as they are. A SiLU, ReLU, LeakyReLU,
    GELU, Mish, Hardswish, Sigmoid or Tanh is fused into the norm before it where it is certain to follow: as its
    neighbour in a `torch.nn.Sequential`, or if `torch.fx` shows that the module that holds both calls the one with the
    result of the other and with nothing else, whichever of its arguments are None, in training or not. A copy of that
    module is what runs for it. A norm that is called from elsewhere too, as by who takes a Sequential's children one by
    one, keeps its activation apart if it has a hook. Functions are not seen; `backend` fuses these.

    Parameters
    ----------
    model : torch.nn.Module
        A norm itself, or what holds some; also on the ``meta`` device.

    Returns
    -------
    Report
        What was replaced and fused, and what was not, and why.

    Raises
    ------
    TypeError
        If `model` is no module.

    Examples
    --------
    >>> import torch, gn_fast.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    >>> print(gn_fast.torch.accelerate(model))
    1 replaced, 1 of them with the activation that follows
      1 + silu
    >>> gn_fast.torch.restore(model)
    """
    _check_module(model)
    report = Report()
    for name, module in model.named_modules():
        if type(module) is nn.GroupNorm and "forward" not in vars(module) and _why_not_here(module) is None:
            module.__class__ = Accelerated
            vars(module)["activation"] = None
            report.replaced.append(name)
        elif _is_another(module):
            report.left[name] = _why_left(module)
    names = {id(m): name for name, m in model.named_modules()}
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    shared = {id(o): o for o in (*model.modules(), *model.parameters(), *model.buffers())}
    for prefix, parent in list(model.named_modules()):
        if not any(type(m) is Accelerated and m.activation is None for m in parent.children()):
            continue
        for slot, found in _followers(parent, shared).items():
            path = f"{prefix}.{slot}".lstrip(".")
            if isinstance(found, str):
                report.left[path] = found
                continue
            activation: Any = parent._modules[slot]
            reason = next(filter(None, (_why_apart(m, places) for m in (*found, activation))), None)
            if reason is not None:
                report.left[path] = f"not fused with {names[id(found[0])]}: {reason}"
                continue
            for norm in found:
                norm.activation = _activations.of_module(activation)
                report.fused[names[id(norm)]] = _name(norm.activation)
            parent._modules[slot] = Fused(activation)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the norms' classes and the activations are what they were; what was trained meanwhile stays.

    Parameters
    ----------
    model : torch.nn.Module
        What `accelerate` was given, or a copy of it.

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    _check_module(model)
    for module in list(model.modules()):
        if isinstance(module, Accelerated):
            module.activation = None  # of one that was parametrized meanwhile as well, and has a class for it
        if type(module) is Accelerated:
            del module.activation
            module.__class__ = nn.GroupNorm  # type: ignore[assignment]
        for slot, child in module._modules.items():
            if type(child) is Fused:
                module._modules[slot] = child.activation


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _name(activation: Activation) -> str:
    return activation[0] if isinstance(activation, tuple) else str(activation)


def _is_another(module: nn.Module) -> bool:
    """Whether this is a group norm that stays as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "GroupNorm"
    return isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNorm)


def _why_left(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if type(module) is not nn.GroupNorm:
        return f"it is a {type(module).__qualname__}, which may do more than a GroupNorm"
    return _why_not_here(module) or "its forward is another"


def _why_not_here(module: nn.Module) -> str | None:
    if hasattr(module, "activation"):
        return "it has an attribute of its own that is called activation"
    for p in module.parameters():
        if p.device.type not in ("cpu", "meta"):
            return f"it is on {p.device}, and gn_fast works on the CPU"
        if p.dtype not in DTYPES:
            return f"it is of {p.dtype}, and gn_fast takes floats of 16, 32 and 64 bits"
    return None


# ---- what is certain to follow ---------------------------------------------------------------------------

Followers = dict[str, list[Accelerated]]


def _followers(parent: nn.Module, shared: Mapping[int, Any]) -> dict[str, list[Accelerated] | str]:
    """A module's activations: for each place, the norms whose results are all that it sees; or why it stays apart."""
    slots = [slot for slot, m in parent._modules.items() if m is not None and _activations.of_module(m) is not None]
    if not slots:
        return {}
    own_call = type(parent).__call__ is not nn.Module.__call__ and not isinstance(parent, torch.fx.GraphModule)
    if own_call or "forward" in vars(parent):
        return dict.fromkeys(slots, "not fused: the forward or the call of what holds it is another")
    if _is_stock_sequence(type(parent)):
        pairs = itertools.pairwise(parent._modules.items())
        return {slot: [norm] for (_, norm), (slot, _) in pairs if slot in slots and type(norm) is Accelerated}
    # Other objects, so that a call by another reference to the activation is seen.
    modules = {slot: parent.get_submodule(slot) for slot in slots}
    stand_ins = [{slot: make(m) for slot, m in modules.items()} for make in (copy.copy, Fused)]
    try:
        first, *others = (_calls(parent, slots, graph) for graph in graphs(parent, stand_ins, shared))
    except UnclearError as error:
        return dict.fromkeys(slots, f"not fused: what {type(parent).__qualname__} does cannot be followed: {error}")
    certain = {slot: norms for slot, norms in first.items() if all(other.get(slot) == norms for other in others)}
    unsure = "not fused: what it sees is not, in every run, the result of a norm that nobody else sees"
    return dict.fromkeys(slots, unsure) | certain


def _is_stock_sequence(kind: type[nn.Module]) -> bool:
    stock = nn.Sequential
    return issubclass(kind, stock) and (kind.forward, kind.__iter__) == (stock.forward, stock.__iter__)


def _why_apart(module: nn.Module, places: Counter[int]) -> str | None:
    """What forbids to fuse a norm or an activation."""
    name = "the norm" if isinstance(module, nn.GroupNorm) else "the activation"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hook, None) for hook in hooks):
        return f"{name} has hooks, which see what is between them"
    if "forward" in vars(module):
        return f"{name}'s forward is another"
    if isinstance(module, Accelerated) and module.activation is not None:
        return "the norm has an activation"
    if isinstance(module, nn.GroupNorm) and places[id(module)] > 1:
        return f"{name} is in several places"
    if not isinstance(module, nn.GroupNorm) and (module._parameters or module._buffers or module._modules):
        return f"{name} has a state of its own"
    return None


def _calls(parent: nn.Module, slots: list[str], graph: torch.fx.Graph) -> Followers:
    """The activations that see nothing but the results of norms, which nobody else sees."""
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):  # or is handed on, to be called elsewhere
            calls.setdefault(str(node.target), []).append(node)
        elif node.target is group_norm:
            raise UnclearError("it calls the forward of a norm")

    def norm_of(node: torch.fx.Node) -> Accelerated | None:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            return None
        norm = parent._modules.get(str(before.target))
        once = len(calls[str(before.target)]) == 1 and before.meta["modes"] == node.meta["modes"]
        return norm if type(norm) is Accelerated and once else None

    found = {slot: [norm_of(node) for node in calls.get(slot, ())] for slot in slots}
    return {slot: norms for slot, norms in found.items() if norms and all(norms)}  # type: ignore[misc]
