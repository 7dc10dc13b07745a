"""Who takes part: gn_fast, the limit, and the other libraries, as far as they are installed."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

import gn_fast

from . import limit
from .limit import Call
from .problem import EPS, Array, Problem
from .timing import race, turn


class Contender(NamedTuple):
    """A call to be timed, and what asserts that its result is right."""

    call: Call
    check: Callable[[Any], None]


class UnavailableError(Exception):
    """Says why a contender does not take part in a problem."""


def as_tuple(result: Any) -> tuple[Array, ...]:
    return result if isinstance(result, tuple) else (result,)


# ---- gn_fast and the limit -------------------------------------------------------------------------------


def ours(problem: Problem, fresh: bool = False) -> Contender:
    kwargs: dict[str, Any] = {"axis": problem.axis, "out": None if fresh else problem.out}
    parameters = (problem.num_groups, problem.weight, problem.bias, EPS)
    if problem.mode.activation:
        kwargs["activation"] = problem.mode.activation
    if problem.mode.backward:
        arrays: tuple[Array, ...] = (problem.dy, problem.x)
        call = functools.partial(
            gn_fast.group_norm_backward, *arrays, *parameters, **kwargs, moments=problem.moments
        )
    else:
        call = functools.partial(gn_fast.group_norm, problem.x, *parameters, **kwargs)
    return Contender(call, lambda result: problem.check(as_tuple(result), exact_sums=True))


def fresh(problem: Problem) -> Contender:
    if not problem.mode.fresh:
        raise UnavailableError("another mode")
    return ours(problem, fresh=True)


def fastest(calls: list[Call], check: Callable[[Any], None]) -> Contender:
    """Of several ways to the same result the one that wins a race of a few rounds."""
    for call in calls:
        check(call())
    seconds = race({call: functools.partial(turn, call) for call in calls}, rounds=3)
    return Contender(min(calls, key=lambda call: min(seconds[call])), check)


def a_copy(problem: Problem) -> Contender:
    return fastest(limit.copies(problem), functools.partial(limit.check_copy, problem))


def practical_limit(problem: Problem) -> Contender:
    ways = limit.sweeps(problem)
    if not ways:
        raise UnavailableError("not written for this mode")
    return fastest(ways, functools.partial(limit.check_sweeps, problem))


# ---- the formula, for any library with NumPy's functions -------------------------------------------------


def plain(xp: Any, problem: Problem, x: Any, weight: Any, bias: Any) -> Any:
    """The forward pass as one writes it."""
    _, _, xhat, weight = _normalized(xp, problem, x, weight)
    y = xhat * weight + bias.reshape(weight.shape)
    if problem.mode.activation == "silu":
        y = y / (1 + xp.exp(-y))
    return y.reshape(x.shape).astype(x.dtype)


def plain_backward(xp: Any, problem: Problem, dy: Any, x: Any, weight: Any) -> tuple[Any, ...]:
    """The gradient as one writes it, without activation."""
    axes, rstd, xhat, weight = _normalized(xp, problem, x, weight)
    dy = dy.reshape(xhat.shape)
    over = tuple(axis for axis in range(4) if weight.shape[axis] == 1)
    dweight, dbias = (dy * xhat).sum(over).ravel(), dy.sum(over).ravel()
    dxhat = dy * weight
    a, b = dxhat.mean(axes, keepdims=True), (dxhat * xhat).mean(axes, keepdims=True)
    return (rstd * (dxhat - a - xhat * b)).reshape(x.shape), dweight, dbias


def _normalized(xp: Any, problem: Problem, x: Any, weight: Any) -> tuple[Any, ...]:
    """The axes of a slab, rstd, xhat as (n, g, c, s) or (n, s, g, c), and the weight to fit it."""
    groups, size = problem.num_groups, len(weight) // problem.num_groups
    last = problem.axis == -1
    axes = (1, 3) if last else (2, 3)
    shape = (len(x), -1, groups, size) if last else (len(x), groups, size, -1)
    slabs = x.astype(problem.compute).reshape(shape)
    centred = slabs - slabs.mean(axes, keepdims=True)
    rstd = 1 / xp.sqrt((centred * centred).mean(axes, keepdims=True) + EPS)
    return axes, rstd, centred * rstd, weight.reshape((1, 1, groups, size) if last else (1, groups, size, 1))


def numpy(problem: Problem) -> Contender:
    arguments = (problem.x, problem.weight, problem.bias)
    if problem.mode.backward:
        call = functools.partial(plain_backward, np, problem, problem.dy, *arguments[:2])
    else:
        call = functools.partial(plain, np, problem, *arguments)
    return Contender(call, lambda result: problem.check(as_tuple(result)))


def jax(problem: Problem) -> Contender:
    import jax

    jax.config.update("jax_enable_x64", True)
    forward = functools.partial(plain, jax.numpy, problem)
    arguments = [jax.numpy.asarray(a) for a in (problem.x, problem.weight, problem.bias)]
    if problem.mode.backward:
        arguments.append(jax.numpy.asarray(problem.dy))
        compiled = jax.jit(lambda x, weight, bias, dy: jax.vjp(forward, x, weight, bias)[1](dy))
    else:
        compiled = jax.jit(forward)

    def check(result: Any) -> None:
        problem.check(tuple(np.asarray(a) for a in as_tuple(result)))

    return Contender(lambda: jax.block_until_ready(compiled(*arguments)), check)


# ---- the libraries with a function of their own ----------------------------------------------------------


def torch(problem: Problem) -> Contender:
    """PyTorch eager, with the threads that gn_fast uses and the allocator of its process."""
    import torch

    torch.set_num_threads(gn_fast.get_num_threads())
    bfloat16 = problem.mode.dtype == "bfloat16"  # which NumPy cannot hand over: its bits can

    def tensor(a: Array) -> Any:
        t = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(a)
        return t.movedim(problem.axis, 1) if t.ndim > 1 else t

    def array(t: Any) -> Array:
        t = t.movedim(1, problem.axis) if t.ndim > 1 else t
        return t.contiguous().view(torch.int16).numpy().view(problem.dtype) if bfloat16 else t.numpy()

    x, weight, bias = (tensor(a) for a in (problem.x, problem.weight, problem.bias))
    groups = problem.num_groups
    if problem.mode.backward:
        dy = tensor(problem.dy)
        # Channels-last sequences have no memory format: autograd keeps a copy of x, and makes one of dy.
        copied = problem.mode.channels_last and x.ndim == 3
        x = x.contiguous() if copied else x
        n, channels = x.shape[:2]
        sizes = (n, channels, x.numel() // (n * channels), groups)
        _, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, EPS)
        backward = torch.ops.aten.native_group_norm_backward  # what autograd calls

        def call() -> Any:
            d = dy.contiguous() if copied else dy
            return backward(d, x, mean, rstd, weight, *sizes, [True, True, True])
    else:
        group_norm, silu = torch.nn.functional.group_norm, torch.nn.functional.silu

        def call() -> Any:
            y = group_norm(x, groups, weight, bias, EPS)
            return silu(y, inplace=True) if problem.mode.activation else y

    return Contender(call, lambda result: problem.check(tuple(array(t) for t in as_tuple(result))))


def onnxruntime(problem: Problem) -> Contender:
    if problem.mode.backward or problem.mode.channels_last:
        raise UnavailableError("ONNX has no such operator")
    import onnx
    import onnxruntime
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(problem.dtype)
    arrays = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    stash = helper.np_dtype_to_tensor_dtype(problem.compute)
    settings = {"num_groups": problem.num_groups, "epsilon": EPS, "stash_type": stash}
    nodes = [helper.make_node("GroupNormalization", [*arrays], ["y"], **settings)]
    if problem.mode.activation:
        nodes += [
            helper.make_node("Sigmoid", ["y"], ["sigmoid"]),
            helper.make_node("Mul", ["y", "sigmoid"], ["silu"]),
        ]
    graph = helper.make_graph(
        nodes,
        "group_norm",
        [helper.make_tensor_value_info(name, kind, a.shape) for name, a in arrays.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, problem.x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = gn_fast.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Contender(lambda: session.run(None, arrays), lambda result: problem.check(tuple(result)))


# ---- the list --------------------------------------------------------------------------------------------

OURS = "gn_fast"
FRESH = "gn_fast, fresh"
COPY = "copy"
LIMIT = "practical limit"
TUNED = "PyTorch (tuned)"
AS_IT_COMES = "PyTorch (as it comes)"
PEERS = {TUNED: torch, AS_IT_COMES: torch, "NumPy": numpy, "JAX": jax, "ONNX Runtime": onnxruntime}
CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    OURS: ours,
    FRESH: fresh,
    COPY: a_copy,
    LIMIT: practical_limit,
    **PEERS,
}
# Whose allocator is left alone, in a process of their own; our fresh results owe nothing to the tuning then.
UNTUNED = (FRESH, AS_IT_COMES)


def enter(problem: Problem, names: Iterable[str] = CONTENDERS) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls of those who take part, checked, and why the others do not."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            contender = CONTENDERS[name](problem)
            contender.check(contender.call())
            calls[name] = contender.call
        except (ImportError, UnavailableError) as error:
            absent[name] = str(error)
        except Exception as error:  # whatever another library raises, a wrong result too, is its own affair
            if name not in PEERS:
                raise
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return calls, absent
