"""`gn_fast.torch.group_norm` is PyTorch's, wherever tensors go: values, gradients, strides, errors, transformations."""

import functools

import numpy as np
import pytest
from helpers import fresh_python, name_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import torch.nn.functional as F  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

import gn_fast  # noqa: E402
import gn_fast.torch  # noqa: E402
from gn_fast.torch import _arrays, _composed, group_norm  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = {
    None: lambda x: x,
    ("leaky_relu", 0.2): functools.partial(F.leaky_relu, negative_slope=0.2),
    **_composed.ACTIVATIONS,
}
OPINFO = next(info for info in op_db if info.name == "nn.functional.group_norm")
SHAPES = [(3, 32), (2, 8, 5), (2, 8, 4, 4), (1, 8, 17, 18), (2, 8, 3, 4, 5), (2, 32, 24, 24)]


def randn(*shape, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(**more)


def plain(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype, requires_grad=False)


def stock(x, groups, weight=None, bias=None, eps=1e-5, activation=None, residual=None):
    """PyTorch's operations one by one, in float64."""
    w, b, r = (None if t is None else t.double() for t in (weight, bias, residual))
    y = F.group_norm(x.double(), groups, w, b, eps)
    return ACTIVATIONS[activation](y if r is None else y + r).to(x.dtype)


def tolerance(dtype):
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}


# ---- values and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_values_and_gradients(activation, dtype):
    for shape in SHAPES:
        x, r, dy = (
            randn(*shape, dtype=dtype),
            randn(*shape[:1], *shape[1:], dtype=dtype),
            plain(*shape, dtype=dtype),
        )
        w, b = randn(shape[1], dtype=dtype), randn(shape[1], dtype=dtype)
        y = group_norm(x, 4, w, b, 1e-5, activation, r)
        expected = stock(x, 4, w, b, 1e-5, activation, r)
        assert y.dtype == x.dtype
        assert_close(y, expected, **tolerance(dtype))
        with torch.no_grad():
            assert torch.equal(group_norm(x, 4, w, b, 1e-5, activation, r), y)
        ours = torch.autograd.grad(y, (x, w, b, r), dy)
        scale = 64 * torch.finfo(dtype).eps
        for name, a, e in zip("xwbr", ours, torch.autograd.grad(expected, (x, w, b, r), dy), strict=True):
            assert a.dtype == e.dtype
            assert_close(
                a, e, rtol=scale, atol=scale * max(1.0, float(e.abs().max())), msg=lambda m, n=name: n + m
            )


def test_samples_of_pytorch():
    for dtype in DTYPES:
        for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
            x, kwargs = sample.input, sample.kwargs
            y, expected = group_norm(x, *sample.args, **kwargs), F.group_norm(x, *sample.args, **kwargs)
            assert y.stride() == expected.stride()
            wanted = [
                t for t in (x, kwargs.get("weight"), kwargs.get("bias")) if t is not None and t.requires_grad
            ]
            bound = {torch.float16: 2e-2, torch.bfloat16: 0.2, torch.float32: 2e-5, torch.float64: 1e-12}[
                dtype
            ]
            assert_close(y, expected, rtol=bound, atol=bound, equal_nan=True)
            dy = torch.ones_like(y)
            for a, e in zip(
                torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
            ):
                assert a.shape == e.shape
                assert a.dtype == e.dtype
                finite = e.isfinite()  # those of empty samples are NaN there
                assert_close(a[finite], e[finite], rtol=bound, atol=30 * bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_parameters_of_another_dtype(dtype, parameters):
    x, w, b = randn(2, 8, 6, 6, dtype=dtype), randn(8, dtype=parameters), randn(8, dtype=parameters)
    y = group_norm(x, 2, w, b)
    assert_close(y, stock(x, 2, w, b), **tolerance(dtype))
    y.sum().backward()
    assert (x.grad.dtype, w.grad.dtype, b.grad.dtype) == (dtype, parameters, parameters)
    assert_close(b.grad, torch.full((8,), 72.0, dtype=parameters))


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)])
def test_gradients_of_some(wanted):
    shapes = (2, 8, 5, 5), (8,), (8,), (2, 8, 5, 5)
    tensors = [randn(*s, requires_grad=bool(want)) for s, want in zip(shapes, wanted, strict=True)]
    x, w, b, r = tensors
    asked = [t for t in tensors if t.requires_grad]
    ours = torch.autograd.grad(group_norm(x, 2, w, b, residual=r).square().sum(), asked)
    theirs = torch.autograd.grad(stock(x, 2, w, b, residual=r).square().sum(), asked)
    for a, e in zip(ours, theirs, strict=True):
        assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_second_derivatives_of_a_residual_alone(activation):
    x, r = plain(2, 8, 5), randn(2, 8, 5)

    def second(norm):
        (dr,) = torch.autograd.grad(norm(x, 2, activation=activation, residual=r).sin().sum(), r, create_graph=True)
        return dr, *torch.autograd.grad(dr.sum(), r)

    assert_close(second(group_norm), second(stock), rtol=1e-5, atol=1e-5)


def test_an_argument_given_twice():
    x = randn(2, 8, 5, 5, dtype=torch.float64)
    w = randn(8, dtype=torch.float64)
    for create_graph in (False, True):
        ours = torch.autograd.grad(
            group_norm(x, 2, w, w, residual=x).sin().sum(), (x, w), create_graph=create_graph
        )
        theirs = torch.autograd.grad(stock(x, 2, w, w, residual=x).sin().sum(), (x, w))
        assert_close(ours, theirs)


def test_channels_last_keeps_its_accuracy():
    x = (torch.randn(1, 16, 16, 32, 32, generator=torch.Generator().manual_seed(0)) + 300).to(
        memory_format=torch.channels_last_3d
    )
    assert_close(group_norm(x, 8), F.group_norm(x.double(), 8).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    x, before = plain(4, 32, 40, 40), torch.get_num_threads()
    expected = gn_fast.group_norm(x.numpy(), 8)
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(group_norm(x, 8).numpy(), expected)
    finally:
        torch.set_num_threads(before)


# ---- where tensors lie -----------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "samples innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "channels of channels last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :8],
    "expanded": lambda x: x[:1].expand(x.shape),
    "one position, channels last": lambda x: x[..., :1, :1].contiguous(memory_format=torch.channels_last),
    "one column": lambda x: x[..., :1],
    "one row, channels last": lambda x: x[..., :1, :].contiguous(memory_format=torch.channels_last),
    "one channel": lambda x: x[:, :1].to(memory_format=torch.channels_last),
    "one position, pooled": lambda x: x.to(memory_format=torch.channels_last).mean((2, 3), keepdim=True),
    "one row of any stride": lambda x: x[..., :1, :].contiguous().as_strided((2, 8, 1, 6), (48, 6, 7, 1)),
    "one sample of any stride": lambda x: x[:1].contiguous().as_strided((1, 8, 6, 6), (5, 36, 6, 1)),
    "one position of any strides": lambda x: x[..., :1, :1].contiguous().as_strided((2, 8, 1, 1), (8, 1, 3, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_stocks(layout):
    x = LAYOUTS[layout](plain(2, 8, 6, 6)).detach().requires_grad_()
    groups = min(2, x.shape[1])
    y, expected = group_norm(x, groups), F.group_norm(x, groups)
    assert y.stride() == expected.stride()
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(expected)
    for gradient in (dy, dy.transpose(2, 3).contiguous().transpose(2, 3), dy[:1, :1].expand(dy.shape)):
        a, e = (
            torch.autograd.grad(y, x, gradient, True)[0],
            torch.autograd.grad(expected, x, gradient, True)[0],
        )
        assert a.stride() == e.stride()
        assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_across_the_result_is_as_good_as_a_copy_of_it(dtype, activation):
    """As an attention leaves a sequence: channels innermost, for which there is no memory format."""

    def across(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    input, residual, dy = (plain(2, 8, 36, dtype=dtype) for _ in range(3))
    weight, bias = plain(8, dtype=dtype), plain(8, dtype=dtype)
    found = []
    for lay in (across, torch.clone):
        x, r = lay(input).detach().requires_grad_(), lay(residual).detach().requires_grad_()
        y = group_norm(x, 2, weight, bias, activation=activation, residual=r)
        found.append((y, *torch.autograd.grad(y, (x, r), lay(dy))))
    laid = _arrays.along(torch.contiguous_format, across(input))
    assert laid.flags.c_contiguous
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_three_dimensions_keep_channels_last():
    x = plain(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d).requires_grad_()
    y = group_norm(x, 2)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)


def test_storages_stay_resizable():
    x, w, b = randn(2, 8, 6, 6), randn(8), randn(8)
    y = group_norm(x, 2, w, b)
    gradients = torch.autograd.grad(y.sum(), (x, w, b))
    for t in (x, w, b, y, *gradients):
        t.detach().resize_(1000)


def test_negative_views():
    z = torch.randn(2, 8, 5, 5, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    assert_close(group_norm(z, 2, residual=z), stock(z.clone(), 2, residual=z.clone()))
    x = randn(2, 8, 5, 5)
    (dx,) = torch.autograd.grad(group_norm(x, 2), x, z)
    assert_close(dx, torch.autograd.grad(stock(x, 2), x, z.clone())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 3), (0, 8)])
def test_nothing(shape):
    x, w = randn(*shape), randn(shape[1])
    y = group_norm(x, 2, w)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros(shape[1]))


# ---- autograd --------------------------------------------------------------------------------------------

SMOOTH = [None, "silu", "gelu", "gelu_tanh", "mish", "sigmoid", "tanh", ("leaky_relu", 0.2)]


@pytest.mark.parametrize("activation", SMOOTH, ids=name_of)
def test_gradcheck(activation):
    x, w, b, r = (randn(*s, dtype=torch.float64) for s in ((2, 4, 3, 2), (4,), (4,), (2, 4, 3, 2)))
    call = lambda x, w, b, r: group_norm(x, 2, w, b, 1e-3, activation, r)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, w, b, r), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b, r))
    assert torch.autograd.gradcheck(lambda x: group_norm(x, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda w: group_norm(x.detach(), 2, w, None, 1e-3, activation), (w,))


def test_a_gradient_penalty_trains():
    """The kind of loss that needs second derivatives, as Wasserstein GANs have it."""

    def penalty(norm):
        x, w = randn(4, 8, 6, 6), randn(8)
        (dx,) = torch.autograd.grad(norm(x, 2, w, activation="silu").sum(), x, create_graph=True)
        return torch.autograd.grad((dx.norm() - 1) ** 2, (x, w))

    assert_close(penalty(group_norm), penalty(stock), rtol=1e-4, atol=1e-5)


def test_what_is_changed_in_place_is_noticed():
    x, w = randn(2, 8, 5, 5), randn(8)
    for changed in (x, w):
        y = group_norm(x, 2, w)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_residual_without_an_activation_may_be_changed_in_place():
    """As after a sum, whose terms are not needed again."""
    x, r = randn(2, 8, 5, 5), randn(2, 8, 5, 5)
    for call in (group_norm, torch.compile(group_norm, backend="aot_eager")):
        y = call(x, 2, residual=r)
        with torch.no_grad():
            r.mul_(2)
        assert torch.equal(torch.autograd.grad(y.sum(), r)[0], torch.ones_like(r))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_of_another_dtype(dtype, residual, activation):
    x, r = randn(2, 8, 5, 5, dtype=dtype), randn(2, 8, 5, 5, dtype=residual)
    y = group_norm(x, 2, activation=activation, residual=r)
    found = torch.autograd.grad(y.sum(), (x, r))
    assert [y.dtype, *(d.dtype for d in found)] == [dtype, dtype, residual]
    expected = torch.autograd.grad(stock(x, 2, activation=activation, residual=r).sum(), r)[0]
    coarser = max(dtype, residual, key=lambda d: torch.finfo(d).eps)
    assert_close(found[1].to(coarser), expected.to(coarser), **tolerance(coarser))


def test_memory_that_is_gone_is_not_read():
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        group_norm(plain(2, 8, 5), 2, gone)
    assert_close(group_norm(plain(2, 8, 5), 2, torch._efficientzerotensor(8)), torch.zeros(2, 8, 5))


def test_gradients_that_are_not_stored():
    x = randn(2, 8, 5, 5)
    (dx,) = torch.autograd.grad(group_norm(x, 2), x, torch._efficientzerotensor((2, 8, 5, 5)))
    assert torch.equal(dx, torch.zeros(2, 8, 5, 5))


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, w = randn(2, 8, 5, 5), randn(8)
    expected = torch.autograd.grad(group_norm(x, 2, w).sin().sum(), (x, w))
    for reentrant in (False, True):
        y = checkpoint(lambda x, w: group_norm(x, 2, w).sin(), x, w, use_reentrant=reentrant)
        for t in (x, w):
            t.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, expected[0])
        assert torch.equal(w.grad, expected[1])


def test_inference_mode():
    x = plain(2, 8, 5, 5)
    with torch.inference_mode():
        y = group_norm(x, 2)
    assert y.is_inference()
    assert torch.equal(y, group_norm(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_stocks(dtype):
    x, w = plain(2, 8, 5, 5, dtype=dtype), plain(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm(x, 2, w).dtype == F.group_norm(x, 2, w).dtype


# ---- what records and transforms calls -------------------------------------------------------------------


def arguments(dtype=torch.float32, requires_grad=True):
    shapes = (2, 8, 5, 5), (8,), (8,), (2, 8, 5, 5)
    return [randn(*s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(dtype):
    x, w, b, r = arguments(dtype)
    for call in (
        (x, 2, w, b, 1e-5, "silu", 0.01, r), (x, 2, w, None, 1e-5, "leaky_relu", 0.2, None),
        (x, 4, None, None, 1e-5, None, 0.01, None), (x.detach(), 2, w, b, 1e-5, None, 0.01, None),
        (x.detach().to(memory_format=torch.channels_last), 2, w, b, 1e-5, "gelu", 0.01, r.detach()),
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.gn_fast.group_norm, call)
        torch.library.opcheck(torch.ops.gn_fast.group_norm_with_moments, call)
        _, mean, m2 = torch.ops.gn_fast.group_norm_with_moments(*call)
        dy = torch.randn_like(x).requires_grad_()
        torch.library.opcheck(torch.ops.gn_fast.group_norm_backward, (dy, *call, mean, m2))


def test_operators_have_gradients():
    x, w, b, r = arguments(torch.float64)
    for operator in (torch.ops.gn_fast.group_norm, torch.ops.gn_fast.group_norm_with_moments):

        def call(x, w, b, r, operator=operator):
            found = operator(x, 2, w, b, 1e-3, "silu", 0.01, r)
            return found[0] if isinstance(found, tuple) else found

        small = [
            t[:, :4, :2, :2].detach().requires_grad_() if t.dim() > 1 else t[:4].detach().requires_grad_()
            for t in (x, w, b, r)
        ]
        assert torch.autograd.gradcheck(call, small)
        assert torch.autograd.gradgradcheck(call, small)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic):
    if backend == "inductor" and not torch._inductor.config.cpp.cxx[-1]:
        pytest.skip("no C++ compiler")

    def f(x, w, b, r):
        return group_norm(x * 2, 2, w, b, activation="silu", residual=r) + 1

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    x, w, b, r = arguments()
    for size in (5, 6):
        x, r = randn(2, 8, size, 5), randn(2, 8, size, 5)
        y, expected = compiled(x, w, b, r), f(x, w, b, r)
        assert_close(y, expected)
        assert_close(
            torch.autograd.grad(y.sin().sum(), (x, w, b, r)),
            torch.autograd.grad(expected.sin().sum(), (x, w, b, r)),
            rtol=1e-4,
            atol=1e-5,
        )
        with torch.no_grad():
            assert_close(compiled(x, w, b, r), expected)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return group_norm(x, 2, w, activation="relu")

    x, w = plain(2, 8, 5, 5), plain(8)
    exported = torch.export.export(Model(), (x, w))
    assert next(str(n.target) for n in exported.graph.nodes if n.op == "call_function").startswith(
        "gn_fast.group_norm"
    )
    assert_close(exported.module()(x * 2, w), group_norm(x * 2, 2, w, activation="relu"))


def test_nothing_is_baked_in():
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = plain(2, 8, 5, 5), plain(8)
    call = lambda x, w: group_norm(x, 2, w, activation=("leaky_relu", 0.3))  # noqa: E731
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(
            make_fx(call, tracing_mode=mode)(x, w)(x + w[:, None, None], w), call(x + w[:, None, None], w)
        )
    traced = torch.jit.trace(call, (x, w))
    assert torch.equal(traced(x + w[:, None, None], w), call(x + w[:, None, None], w))


def test_a_module_is_traced_with_its_gradients():
    norm, x = gn_fast.torch.GroupNorm(2, 8), plain(2, 8, 5, 5)
    assert torch.equal(torch.jit.trace(norm, (x,))(x + 1), norm(x + 1))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x, w: f(x, w).sin().sum(), (0, 1)),
    "jvp": lambda f: lambda x, w: torch.func.jvp(f, (x, w), (x.cos(), w.cos())),
    "vmap": lambda f: lambda x, w: torch.vmap(f, (None, 0))(x, torch.stack([w, w + 1])),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_in_compiled_code(transform, backend):
    x, w = plain(2, 8, 5, dtype=torch.float64), plain(8, dtype=torch.float64)
    b = x[0, :, 0].clone()  # a constant
    ours = TRANSFORMS[transform](lambda x, w: group_norm(x, 2, w, b, activation="silu"))
    theirs = TRANSFORMS[transform](lambda x, w: stock(x, 2, w, b, activation="silu"))
    assert_close(torch.compile(ours, backend=backend, fullgraph=True)(x, w), theirs(x, w))


NESTED = {
    "hessian": lambda f: lambda x, w: torch.func.hessian(lambda w: f(x, w).sin().sum())(w),
    "grad of grad": lambda f: torch.func.grad(lambda x, w: torch.func.grad(lambda w: f(x, w).sin().sum())(w).sum()),
    "jvp of grad": lambda f: lambda x, w: torch.func.jvp(torch.func.grad(lambda w: f(x, w).sum()), (w,), (w.cos(),)),
}


@pytest.mark.parametrize("transform", NESTED)
def test_operators_and_transformations_of_some_arguments(transform):
    """What is constant at one level varies at another, or nowhere."""
    x, w, b, r = arguments(torch.float64, requires_grad=False)
    ours = lambda x, w: torch.ops.gn_fast.group_norm(x, 2, w, b, 1e-5, "silu", 0.01, r)  # noqa: E731
    theirs = lambda x, w: stock(x, 2, w, b, activation="silu", residual=r)  # noqa: E731
    assert_close(NESTED[transform](ours)(x, w), NESTED[transform](theirs)(x, w))


def test_transformations_of_compiled_code():
    """dynamo, which watches what a transformed call runs, is not to compile the gradient."""
    x, t = plain(2, 8, 5, dtype=torch.float64), plain(2, 8, 5, dtype=torch.float64).cos()
    for norm in (stock, group_norm):
        torch._dynamo.reset()
        compiled = torch.compile(torch.func.grad(lambda x, norm=norm: norm(x, 2).sin().sum()), backend="eager")
        found = torch.func.jvp(compiled, (x,), (t,))
        expected = torch.func.jvp(torch.func.grad(lambda x: stock(x, 2).sin().sum()), (x,), (t,))
        assert_close(found, expected)


def test_tangents_in_compiled_code():
    import torch.autograd.forward_ad as fwAD

    x = plain(2, 8, 5, dtype=torch.float64)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, x.cos())
        ours, theirs = torch.compile(group_norm, backend="eager")(dual, 2), F.group_norm(dual, 2)
        assert_close(fwAD.unpack_dual(ours).tangent, fwAD.unpack_dual(theirs).tangent)


def test_third_derivatives_by_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def third(norm):
        x = randn(2, 4, 3, dtype=torch.float64)
        y = norm(x, 2).sin().sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = y.sin().sum()
        return y

    with Passing():
        ours = third(group_norm)
    assert_close(ours, third(stock))


def test_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 5).to(memory_format=torch.channels_last)
        assert group_norm(x, 2).stride() == x.stride()
    assert group_norm(torch.empty(2, 8, 5, device="meta"), 2).device.type == "meta"


def test_torch_func():
    x, w, b, r = arguments(torch.float64, requires_grad=False)
    ours = lambda x, w: group_norm(x, 2, w, b, activation="silu", residual=r).sin().sum()  # noqa: E731
    theirs = lambda x, w: stock(x, 2, w, b, activation="silu", residual=r).sin().sum()  # noqa: E731
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, w),
        lambda f: torch.func.jvp(f, (x, w), (x.cos(), w.cos())),
        lambda f: torch.func.hessian(f, 1)(x, w),
        lambda f: torch.func.vmap(f, (None, 0))(x, torch.stack([w, w + 1])),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), (0, None))(torch.stack([x, x * 2]), w),
        lambda f: torch.func.jacrev(torch.func.grad(f, 1), 1)(x, w),
    ):
        assert_close(transform(ours), transform(theirs))


def test_forward_mode():
    import torch.autograd.forward_ad as fwAD

    x, t = plain(2, 8, 5, 5, dtype=torch.float64), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, t)
        assert_close(
            fwAD.unpack_dual(group_norm(dual, 2, activation="silu")).tangent,
            fwAD.unpack_dual(F.silu(F.group_norm(dual, 2))).tangent,
        )


def test_tensors_of_other_classes():
    class Tagged(torch.Tensor):
        pass

    x = plain(2, 8, 5, 5)
    y = group_norm(x.as_subclass(Tagged), 2)
    assert type(y) is Tagged
    assert torch.equal(y.as_subclass(torch.Tensor), group_norm(x, 2))
    with torch.device("cpu"):
        assert torch.equal(group_norm(x, 2), y)


def test_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Seen():
        group_norm(plain(2, 8, 5), 2)
        group_norm(randn(2, 8, 5), 2).sum().backward()
    assert {
        "gn_fast.group_norm.default",
        "gn_fast.group_norm_with_moments.default",
        "gn_fast.group_norm_backward.default",
    } <= set(names)


# ---- errors ----------------------------------------------------------------------------------------------

ERRORS = {
    "one dimension": (lambda: (plain(6), 2), {}),
    "groups do not divide": (lambda: (plain(2, 6), 4), {}),
    "negative groups": (lambda: (plain(2, 6), -2), {}),
    "short weight": (lambda: (plain(2, 6), 2), {"weight": plain(5)}),
    "weight of two dimensions": (lambda: (plain(2, 6), 2), {"weight": plain(1, 6)}),
    "scalar weight": (lambda: (plain(2, 6), 2), {"weight": torch.tensor(1.0)}),
    "short bias": (lambda: (plain(2, 6), 2), {"bias": plain(5)}),
    "integers": (lambda: (torch.ones(2, 6, dtype=torch.int32), 2), {}),
    "complex": (lambda: (torch.ones(2, 6, dtype=torch.complex64), 2), {}),
    "one value": (lambda: (plain(1, 2), 2), {}),
    "sparse": (lambda: (plain(2, 6).to_sparse(), 2), {}),
    "no number of groups": (lambda: (plain(2, 6), 2.0), {}),
    "no eps": (lambda: (plain(2, 6), 2), {"eps": "a"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_stocks_types(case):
    make, kwargs = ERRORS[case]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.group_norm(*make(), **kwargs)
    for transform in (lambda t: t, lambda t: t.requires_grad_() if t.is_floating_point() else t):
        x, groups = make()
        with pytest.raises(theirs.type):
            group_norm(transform(x), groups, **kwargs)


def test_tensors_are_on_one_device():
    for x, w in ((plain(2, 8, 5), plain(8).to("meta")), (plain(2, 8, 5).to("meta"), plain(8))):
        with pytest.raises(RuntimeError, match="weight must be on input's device"):
            group_norm(x, 2, w)


def test_errors_say_what_does_not_fit():
    x = plain(2, 6, 4)
    with pytest.raises(RuntimeError, match=r"greater than 0, got 0"):
        group_norm(x, 0)
    with pytest.raises(RuntimeError, match=r"residual to have the shape of input, \[2, 6, 4\], not \[2, 6\]"):
        group_norm(x, 2, residual=plain(2, 6))
    with pytest.raises(ValueError, match=r"activation must be one of .*, not 'selu'"):
        group_norm(x, 2, activation="selu")
    with pytest.raises(RuntimeError, match=r"works on the CPU: input is on"):
        group_norm(_Elsewhere(x), 2)
    with pytest.raises(NotImplementedError, match=r"residual is torch\.int64"):
        group_norm(x, 2, residual=torch.ones(2, 6, 4, dtype=torch.int64))


class _Elsewhere(torch.Tensor):
    """A tensor that claims to be of another device, as there is none here."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_subclass(cls, x)

    is_cpu, is_meta, device = False, False, "cuda:0"


def test_an_import_without_pytorch_says_what_to_install():
    result = fresh_python("import sys; sys.modules['torch'] = None\nimport gn_fast.torch")
    assert "pip install 'gn_fast[torch]'" in result.stderr


def test_gn_fast_alone_imports_no_torch():
    result = fresh_python("import sys, gn_fast; print('torch' in sys.modules)")
    assert result.stdout.split() == ["False"], result.stderr
