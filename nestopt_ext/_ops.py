"""The index of native ops: schema, check, fake kernel, reference kernel and typed function of each.

Schemas are defined here, once; importing the native library registers kernels for the CPU, CUDA and Autograd keys under
them. Nothing above this file knows which kernel ran. Whatever may change from step to step is a tensor in the schema,
so that a changed value does not recompile a ``torch.compile``d caller; lists that are mutated return nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _library, _reference

_library.load()
_lib: Any = torch.library.Library("nestopt_ext", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, reference: Callable[..., None], check: Callable[..., list[Tensor]]) -> Any:
    """Registers one op that mutates its arguments. ``check`` raises on a fault, else returns the tensors written."""
    name = schema.partition("(")[0]

    def kernel(*args: Any, **kwargs: Any) -> None:
        written = check(*args, **kwargs)
        reference(*args, **kwargs)
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])

    def fake(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)

    def refuse_derivatives(keys: Any, *args: Any, **kwargs: Any) -> None:
        # Passing on would drop the graph, or leave a tangent as it was, without a word.
        if torch.is_grad_enabled():
            _checks.no_derivative(name, {**dict(zip(names, args, strict=False)), **kwargs})
        with torch._C._AutoDispatchBelowAutograd():
            op(*args, **kwargs)

    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nestopt_ext::{name}", fake, lib=_lib)
    op = getattr(torch.ops.nestopt_ext, name).default
    names = [argument.name for argument in op._schema.arguments]
    if _library.native() is None:
        _lib.impl(name, refuse_derivatives, "Autograd", with_keyset=True)
    return op


def is_native(op: str, device_type: str) -> bool:
    """Whether the native library has a kernel of ``op`` for this kind of device ("cpu", "cuda")."""
    return (op, device_type) in _NATIVE


_SAME = {d: (d,) for d in _checks.FLOATING}
_OPMATH = {d: (_reference.opmath(d),) for d in _checks.FLOATING}


# ---- complex_adam ---------------------------------------------------------------------------------------------------


def check_complex_adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avgs_imag: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    beta1: float,
    beta1_imag: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    bias_correction: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Tensor]:
    op = "complex_adam_step_"
    check = _checks.ListCheck(op)
    _checks.finite(op, beta1=beta1, beta1_imag=beta1_imag, beta2=beta2, eps=eps, weight_decay=weight_decay)
    modulus = math.hypot(beta1, beta1_imag)
    _checks.require(op, "beta1", modulus, modulus < 1, "have a modulus below 1")
    _checks.require(op, "beta2", beta2, 0 <= beta2 < 1, "be in [0, 1)")
    _checks.require(op, "eps", eps, eps >= 0, "not be negative")
    _checks.require(
        op,
        "beta1_imag",
        beta1_imag,
        beta1_imag == 0 or not bias_correction,
        "be zero with bias_correction",
        "A complex average does not converge where this momentum does: leave bias_correction off.",
    )
    like = ("params", params)
    check.leading("params", params)
    check.following("grads", grads, like, _SAME, written=False)
    check.following("exp_avgs", exp_avgs, like, _OPMATH, written=True)
    check.following_or_empty(
        "exp_avgs_imag",
        exp_avgs_imag,
        like,
        _OPMATH,
        needed=beta1_imag != 0,
        needed_while="beta1_imag is not zero",
    )
    check.following("exp_avg_sqs", exp_avg_sqs, like, _OPMATH, written=True)
    if max_exp_avg_sqs:
        check.following("max_exp_avg_sqs", max_exp_avg_sqs, like, _OPMATH, written=True)
    check.scalars("steps", steps, like)
    check.scalar("lr", lr, params)
    if grad_scale is not None:
        check.scalar("grad_scale", grad_scale, params, on_cpu=False)
    if found_inf is not None:
        check.scalar("found_inf", found_inf, params, on_cpu=False)
    check.memory()
    return [*params, *exp_avgs, *exp_avgs_imag, *exp_avg_sqs, *max_exp_avg_sqs, *steps]


_complex_adam_step_ = _define(
    "complex_adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avgs_imag,"
    " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, Tensor lr, *, float beta1,"
    " float beta1_imag=0.0, float beta2=0.999, float eps=1e-8, float weight_decay=0.0,"
    " bool decoupled_weight_decay=False, bool bias_correction=False, bool maximize=False, Tensor? grad_scale=None,"
    " Tensor? found_inf=None) -> ()",
    _reference.complex_adam_step_,
    check_complex_adam_step,
)


def complex_adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avgs_imag: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    beta1: complex,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    bias_correction: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of Adam with complex momentum for a whole list of tensors, in one call; see
    :func:`nestopt_ext._reference.complex_adam_step_` for the definition.

    ``params`` (float32, float64, bfloat16 or float16, any strides, one device) and the four lists of averages (float32
    beside 16-bit params, else the dtype of the param; ``exp_avgs_imag`` and ``max_exp_avg_sqs`` full or empty) are
    updated in place, ``grads`` is only read. ``steps``, tensors of one element (float32 or float64) beside the params,
    are counted up. ``lr`` is a tensor of one element on the CPU or beside the params.
    """
    lists = (params, grads, exp_avgs, exp_avgs_imag, exp_avg_sqs, max_exp_avg_sqs, steps)
    if not any(lists):
        return
    _complex_adam_step_(
        *lists,
        lr,
        beta1=beta1.real,
        beta1_imag=beta1.imag,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        bias_correction=bias_correction,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


# ---- complex_sgd ----------------------------------------------------------------------------------------------------


def check_complex_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum_buffers_imag: Sequence[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    momentum_imag: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Tensor]:
    op = "complex_sgd_step_"
    check = _checks.ListCheck(op)
    _checks.finite(op, momentum=momentum, momentum_imag=momentum_imag, dampening=dampening, weight_decay=weight_decay)
    like = ("params", params)
    check.leading("params", params)
    check.following("grads", grads, like, _SAME, written=False)
    check.following_or_empty(
        "momentum_buffers",
        momentum_buffers,
        like,
        _OPMATH,
        needed=bool(momentum_buffers_imag) or momentum != 0 or momentum_imag != 0,
        needed_while="momentum is not zero",
    )
    check.following_or_empty(
        "momentum_buffers_imag",
        momentum_buffers_imag,
        like,
        _OPMATH,
        needed=momentum_imag != 0,
        needed_while="momentum_imag is not zero",
    )
    check.scalar("lr", lr, params)
    if grad_scale is not None:
        check.scalar("grad_scale", grad_scale, params, on_cpu=False)
    if found_inf is not None:
        check.scalar("found_inf", found_inf, params, on_cpu=False)
    check.memory()
    return [*params, *momentum_buffers, *momentum_buffers_imag]


_complex_sgd_step_ = _define(
    "complex_sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers,"
    " Tensor(c!)[] momentum_buffers_imag, Tensor lr, *, float momentum, float momentum_imag=0.0, float dampening=0.0,"
    " float weight_decay=0.0, bool nesterov=False, bool maximize=False, Tensor? grad_scale=None,"
    " Tensor? found_inf=None) -> ()",
    _reference.complex_sgd_step_,
    check_complex_sgd_step,
)


def complex_sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum_buffers_imag: Sequence[Tensor],
    lr: Tensor,
    *,
    momentum: complex,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of SGD with complex momentum for a whole list of tensors, in one call; see
    :func:`nestopt_ext._reference.complex_sgd_step_` for the definition.

    ``params`` (float32, float64, bfloat16 or float16, any strides, one device) and both buffer lists (float32 beside
    16-bit params, else the dtype of the param; each list full or empty) are updated in place, ``grads`` is only read.
    ``lr`` is a tensor of one element on the CPU or beside the params.
    """
    if not params and not grads and not momentum_buffers and not momentum_buffers_imag:
        return
    _complex_sgd_step_(
        params,
        grads,
        momentum_buffers,
        momentum_buffers_imag,
        lr,
        momentum=momentum.real,
        momentum_imag=momentum.imag,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


# ---- dual_series ----------------------------------------------------------------------------------------------------


def check_dual_series(
    coefficients: Tensor,
    sq_norms: Tensor,
    gram: Tensor,
    weights: Tensor,
    projections: Tensor,
    alpha: Tensor,
    *,
    damping: float = 0.0,
) -> list[Tensor]:
    check = _checks.ListCheck("dual_series_")
    like = ("coefficients", coefficients)
    _checks.finite("dual_series_", damping=damping)
    check.leading("coefficients", coefficients, _checks.REAL)
    check.rank("coefficients", coefficients, 1, "the rows")
    check.vector("sq_norms", sq_norms, like, "that of v")
    rows = coefficients.shape[0]
    check.shaped("gram", gram, like, (rows, rows), "a row and a column for each of coefficients")
    check.following("weights", weights, like, _SAME, written=False)
    check.following("projections", projections, like, _SAME, written=False)
    check.scalar("alpha", alpha, [coefficients])
    check.memory()
    return [coefficients, sq_norms]


_dual_series_ = _define(
    "dual_series_(Tensor(a!) coefficients, Tensor(b!) sq_norms, Tensor gram, Tensor weights, Tensor projections,"
    " Tensor alpha, *, float damping=0.0) -> ()",
    _reference.dual_series_,
    check_dual_series,
)


def dual_series_(
    coefficients: Tensor,
    sq_norms: Tensor,
    gram: Tensor,
    weights: Tensor,
    projections: Tensor,
    alpha: Tensor,
    *,
    damping: float = 0.0,
) -> None:
    r"""All K terms of a Neumann series of :math:`G = R^\top \mathrm{diag}(\text{weights}) R` in the span of its N rows:
    :math:`\sum_{j \le K} (I - \alpha (G + \text{damping}\, I))^j v = (\sum_{j \le K} q^j)\, v + R^\top c` with c the
    ``coefficients`` and :math:`q = 1 - \alpha \cdot` ``damping``; see :func:`nestopt_ext._reference.dual_series_` for
    the recurrence.

    ``coefficients`` [N] and ``sq_norms`` [K + 1] are written: ``sq_norms[0]`` holds :math:`|v|^2` and stays, the others
    receive the squared norms of the terms that follow. ``gram`` [N, N] = :math:`R R^\top`, symmetric, is float32 or
    float64; ``coefficients``, ``sq_norms``, ``weights`` [N] and ``projections`` [N] = :math:`R v` are of one dtype,
    float32 or float64. ``alpha`` (units 1/curvature) is a tensor of one element on the CPU or beside ``gram``.
    Arithmetic is in float64. If the elements of a row of ``gram`` are not next to each other a native kernel works on a
    copy. From a native kernel no bit depends on the number of threads; on CUDA all terms are one launch.
    """
    _dual_series_(coefficients, sq_norms, gram, weights, projections, alpha, damping=damping)


# ---- hadamard_gram --------------------------------------------------------------------------------------------------

#: The dtypes of factors beside an accumulator.
_FACTORS = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: _checks.FLOATING}


def check_hadamard_gram(gram: Tensor, x: Tensor, y: Tensor, *, positions: int = 1, ones: bool = False) -> list[Tensor]:
    op = "hadamard_gram_"
    check = _checks.ListCheck(op)
    _checks.require(op, "positions", positions, positions >= 1, "be positive")
    check.leading("gram", gram, _checks.REAL)
    check.rank("gram", gram, 2, "both of examples")
    rows = gram.shape[0]
    check.shape("gram", gram, gram.shape[1] == rows, "be square")
    check.operand("x", x, ("gram", gram), _FACTORS)
    check.rank("x", x, 2, "rows and features")
    whole = x.shape[0] % positions == 0 and x.shape[0] // positions == rows
    check.shape("x", x, whole, f"have positions = {positions} rows for each of the {rows} of gram")
    check.operand("y", y, ("x", x), _SAME)
    check.rank("y", y, 2, "rows and features")
    examples = y.shape[0] // positions
    whole = y.shape[0] % positions == 0 and (rows % examples == 0 if examples > 0 else rows == 0)
    check.shape("y", y, whole, f"have positions = {positions} rows for each of a divisor of {rows} examples")
    check.memory()
    return [gram]


_hadamard_gram_ = _define(
    "hadamard_gram_(Tensor(a!) gram, Tensor x, Tensor y, *, int positions=1, bool ones=False) -> ()",
    _reference.hadamard_gram_,
    check_hadamard_gram,
)


def hadamard_gram_(gram: Tensor, x: Tensor, y: Tensor, *, positions: int = 1, ones: bool = False) -> None:
    r"""Adds to ``gram`` the inner products of the matrices ``sum_t x_t y_t'``, one for each example, which are never
    formed: with T = ``positions``, ``gram[n, m] += sum_{s, t < T} (x[nT+s] . x[mT+t]) (y[n'T+s] . y[m'T+t])``, where
    n' and m' are n and m modulo the number of examples in ``y``; see :func:`nestopt_ext._reference.hadamard_gram_`.

    ``gram`` [N, N] (float32 or float64, any strides) is updated in place; it need not be symmetric. ``x`` [N T, O] and
    ``y`` [M T, I], N a multiple of M, have one dtype: float32, float64 (beside float64 alone), bfloat16 or float16. The
    inner products of rows are matrix products of torch, of float32 for 16-bit rows; the products of them are taken and
    added up in the dtype of ``gram`` or a wider one. Beside ``gram`` a few panels of at most 8 MB are needed. With the
    weights of a linear layer, x the gradients of its outputs and y its inputs, or the other way round, this is the Gram
    matrix of the gradients of N examples. With ``ones``, y counts as having one more feature, which is 1: x the
    gradients and y the inputs, that is the Gram matrix of the weight with its bias. Has no derivative.
    """
    _hadamard_gram_(gram, x, y, positions=positions, ones=ones)


# ---- neumann --------------------------------------------------------------------------------------------------------

_PRODUCT = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def check_neumann_step(
    v: Sequence[Tensor],
    p: Sequence[Tensor],
    av: Sequence[Tensor],
    alpha: Tensor,
    *,
    damping: float = 0.0,
    sq_norm: Tensor | None = None,
) -> list[Tensor]:
    check = _checks.ListCheck("neumann_step_")
    _checks.finite("neumann_step_", damping=damping)
    check.leading("v", v)
    check.following("p", p, ("v", v), _SAME, written=True)
    if av:
        check.following("av", av, ("v", v), _PRODUCT, written=False)
    check.scalar("alpha", alpha, v)
    if sq_norm is not None:
        check.scalar("sq_norm", sq_norm, v, written=True, on_cpu=False)
    check.memory()
    return [*v, *p, *([] if sq_norm is None else [sq_norm])]


_neumann_step_ = _define(
    "neumann_step_(Tensor(a!)[] v, Tensor(b!)[] p, Tensor[] av, Tensor alpha, *, float damping=0.0,"
    " Tensor(c!)? sq_norm=None) -> ()",
    _reference.neumann_step_,
    check_neumann_step,
)


def neumann_step_(
    v: Sequence[Tensor],
    p: Sequence[Tensor],
    av: Sequence[Tensor],
    alpha: Tensor,
    *,
    damping: float = 0.0,
    sq_norm: Tensor | None = None,
) -> None:
    r"""One term of a Neumann series for a whole list of tensors: ``v -= alpha * (av + damping * v)``, then ``p += v``.

    ``v`` and ``p`` (float32, float64, bfloat16 or float16, any strides, one device) are updated in place; ``av`` has
    their shapes and dtype, or a 16-bit dtype beside float32; or it is empty where ``v`` has been stepped already, and
    then only ``p += v`` is left to do, without ``alpha`` and ``damping``. ``alpha`` (units 1/curvature) is a tensor of
    one element on the CPU or beside ``v``. ``sq_norm``, a tensor of one element beside ``v``, receives the squared norm
    of the new ``v``; it stays on the device. From a native kernel its value does not depend on the number of threads.
    """
    if not v and not p and not av:
        if sq_norm is not None:
            sq_norm.zero_()
        return
    _neumann_step_(v, p, av, alpha, damping=damping, sq_norm=sq_norm)


# ---- rank_one_update ------------------------------------------------------------------------------------------------


def check_rank_one_update(v: Sequence[Tensor], g: Sequence[Tensor], a: Tensor, b: Tensor) -> list[Tensor]:
    check = _checks.ListCheck("rank_one_update_")
    check.leading("v", v)
    check.following("g", g, ("v", v), _PRODUCT, written=False)
    check.scalar("a", a, v, finite=False)
    check.scalar("b", b, v, finite=False)
    check.memory()
    return [*v]


_rank_one_update_ = _define(
    "rank_one_update_(Tensor(a!)[] v, Tensor[] g, Tensor a, Tensor b) -> ()",
    _reference.rank_one_update_,
    check_rank_one_update,
)


def rank_one_update_(v: Sequence[Tensor], g: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    r"""``v <- a * v + b * g`` for a whole list of tensors, in one call: what a function of :math:`g g^\top` does to v.

    ``v`` (float32, float64, bfloat16 or float16, any strides, one device) is updated in place; ``g`` has its shapes and
    dtype, or a 16-bit dtype beside float32. ``a`` and ``b`` are tensors of one element (float32 or float64) on the CPU
    or beside ``v``, of any value: a NaN in one of them is in every element then.
    """
    if v or g:
        _rank_one_update_(v, g, a, b)


# ---- row_dot --------------------------------------------------------------------------------------------------------


def check_row_dot(out: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    check = _checks.ListCheck("row_dot_")
    check.leading("out", out, _checks.REAL)
    check.rank("out", out, 1, "the rows of x")
    rows = out.shape[0]
    check.operand("x", x, ("out", out), _FACTORS)
    check.rank("x", x, 2, "rows and columns")
    check.shape("x", x, x.shape[0] == rows, f"have a row for each element of out, {rows}")
    check.operand("y", y, ("x", x), _SAME)
    check.rank("y", y, 2, "rows and columns")
    check.shape("y", y, y.shape[1] == x.shape[1], f"have the columns of x, {x.shape[1]}")
    divides = rows % y.shape[0] == 0 if y.shape[0] > 0 else rows == 0
    check.shape("y", y, divides, f"have a number of rows that divides those of x, {rows}")
    check.memory()
    return [out]


_row_dot_ = _define("row_dot_(Tensor(a!) out, Tensor x, Tensor y) -> ()", _reference.row_dot_, check_row_dot)


def row_dot_(out: Tensor, x: Tensor, y: Tensor) -> None:
    r"""Inner products of the rows of two matrices: ``out[i] += sum_d x[i, d] * y[i mod M, d]``, M the rows of ``y``.

    ``out`` [N] (float32 or float64, any stride) is updated in place. ``x`` [N, D] and ``y`` [M, D], N a multiple of M,
    have one dtype: float32, float64 (beside float64 alone), bfloat16 or float16, which are multiplied in float32. Rows
    may lie anywhere; if the elements of one are not next to each other a native kernel works on a copy. From a native
    kernel a result does not depend on the number of threads. Has no derivative.
    """
    _row_dot_(out, x, y)


# ---- softmax_hessian ------------------------------------------------------------------------------------------------


def check_softmax_hessian(u: Tensor, logits: Tensor, row_weight: Tensor) -> list[Tensor]:
    check = _checks.ListCheck("softmax_hessian_")
    check.leading("u", u)
    check.rank("u", u, 2, "rows and classes")
    check.following("logits", logits, ("u", u), _PRODUCT, written=False)
    check.row_numbers("row_weight", row_weight, ("u", u))
    check.memory()
    return [u]


_softmax_hessian_ = _define(
    "softmax_hessian_(Tensor(a!) u, Tensor logits, Tensor row_weight) -> ()",
    _reference.softmax_hessian_,
    check_softmax_hessian,
)


def softmax_hessian_(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
    r"""The Hessian of weighted cross-entropies in the logits, times ``u``, in place: for each row ``u <- row_weight *
    (diag(p) - p p') u`` with ``p = softmax(logits)``; see :func:`nestopt_ext._reference.softmax_hessian_`.

    ``u`` [rows, classes] (float32, float64, bfloat16 or float16) is updated in place. ``logits`` has its shape and
    dtype, or a 16-bit dtype beside float32; ``row_weight`` [rows] is float32 or float64. Rows may lie anywhere; if the
    elements of one are not next to each other a native kernel works on a copy. Has no derivative of its own:
    :func:`nestopt_ext._functions.softmax_hessian` is the differentiable form.
    """
    _softmax_hessian_(u, logits, row_weight)


# ---- stn_gate -------------------------------------------------------------------------------------------------------

#: The dtypes of gates and biases beside the data.
_COEFFICIENTS = {d: (d, torch.float32) if d.itemsize == 2 else (d,) for d in _checks.FLOATING}


def _check_stn_dims(op: str, name: str, t: Tensor, batch_dim: int, channel_dim: int) -> None:
    _checks.ListCheck(op).shape(name, t, t.dim() >= 2, "have a dimension of examples and one of channels")
    _checks.require(op, "batch_dim", batch_dim, 0 <= batch_dim < t.dim(), "be a dimension counted from 0")
    after = batch_dim < channel_dim < t.dim()
    _checks.require(op, "channel_dim", channel_dim, after, "be a dimension after batch_dim")


def _check_stn_gates(
    check: _checks.ListCheck, gates: Tensor, like: tuple[str, Tensor], examples: int, channels: int, of_biases: bool
) -> None:
    check.operand("gates", gates, like, _COEFFICIENTS)
    check.rank("gates", gates, 2, "examples and channels")
    check.shape("gates", gates, gates.shape[0] == examples, f"have a row for each example, {examples}")
    columns = gates.shape[1]
    if of_biases:
        rule = f"have two columns for each channel, {2 * channels}"
        check.shape("gates", gates, columns == 2 * channels, rule)
    else:
        rule = f"have a column or two for each channel, {channels} or {2 * channels}"
        check.shape("gates", gates, columns in (channels, 2 * channels), rule)


def _check_stn_bias(
    check: _checks.ListCheck, name: str, t: Tensor | None, like: tuple[str, Tensor], channels: int
) -> None:
    if t is not None:
        check.operand(name, t, like, _COEFFICIENTS)
        check.shape(name, t, t.shape == (channels,), f"have a number for each channel, {channels}")


def check_stn_gate(
    out: Tensor,
    plain: Tensor | None,
    response: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> list[Tensor]:
    check = _checks.ListCheck("stn_gate_")
    like = ("out", out)
    check.leading("out", out)
    _check_stn_dims("stn_gate_", "out", out, batch_dim, channel_dim)
    if plain is not None:
        check.following("plain", plain, like, _SAME, written=False)
    check.following("response", response, like, _SAME, written=False)
    examples, channels = out.shape[batch_dim], out.shape[channel_dim]
    _check_stn_gates(check, gates, like, examples, channels, response_bias is not None)
    _check_stn_bias(check, "bias", bias, like, channels)
    _check_stn_bias(check, "response_bias", response_bias, like, channels)
    check.memory()
    return [out]


_stn_gate_ = _define(
    "stn_gate_(Tensor(a!) out, Tensor? plain, Tensor response, Tensor gates, Tensor? bias, Tensor? response_bias, *,"
    " int batch_dim, int channel_dim) -> ()",
    _reference.stn_gate_,
    check_stn_gate,
)


def stn_gate_(
    out: Tensor,
    plain: Tensor | None,
    response: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> None:
    r"""``out = plain + bias + gates_w * response + gates_b * response_bias`` with gates of its own for each example, in
    one pass; see :func:`nestopt_ext._reference.stn_gate`.

    ``out``, which is overwritten, ``plain`` and ``response`` are of one shape [..., B, ..., D, ...], in which
    ``batch_dim`` has the B examples and ``channel_dim``, after it, the D channels, and of one dtype: float32, float64,
    bfloat16 or float16. ``gates`` [B, 2 D], or [B, D] without ``response_bias``, holds gates_w and gates_b;
    ``bias`` and ``response_bias`` are [D]; these three have the dtype of ``out``, or float32 beside 16 bits. ``plain``
    and the biases may be None: zeros. Channels that lie innermost, and channels-first images, are walked where they
    lie, halves of a stacked tensor too; other strides cost a copy. Has no derivative of its own:
    :func:`nestopt_ext._functions.stn_gate` is the differentiable form.
    """
    _stn_gate_(out, plain, response, gates, bias, response_bias, batch_dim=batch_dim, channel_dim=channel_dim)


def check_stn_gate_backward(
    sums: Tensor,
    grads: Tensor | None,
    shared: Tensor | None,
    grad: Tensor,
    response: Tensor,
    gates: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> list[Tensor]:
    op = "stn_gate_backward_"
    check = _checks.ListCheck(op)
    like = ("grad", grad)
    check.leading("sums", sums, _checks.REAL)
    check.operand("grad", grad, ("sums", sums), _PRODUCT)
    _check_stn_dims(op, "grad", grad, batch_dim, channel_dim)
    examples, channels = grad.shape[batch_dim], grad.shape[channel_dim]
    check.rank("sums", sums, 2, "examples and channels")
    rule = f"have a row for each example and two columns for each channel, {examples} and {2 * channels}"
    check.shape("sums", sums, sums.shape == (examples, 2 * channels), rule)
    check.operand("response", response, like, _SAME)
    check.shape("response", response, response.shape == grad.shape, "have the shape of grad")
    if gates is not None:
        _check_stn_gates(check, gates, like, examples, channels, response_bias is not None)
    _check_stn_bias(check, "response_bias", response_bias, like, channels)
    if grads is not None:
        check.operand("grads", grads, like, _SAME, written=True)
        twice = [*grad.shape]
        twice[channel_dim] *= 2
        alike = grads.shape in (grad.shape, torch.Size(twice))
        check.shape("grads", grads, alike, "have the shape of grad, or that with twice the channels")
        check.shape("grads", grads, gates is not None, "be None without gates")
    if shared is not None:
        check.operand("shared", shared, ("sums", sums), _SAME, written=True)
        rule = f"have two rows of a number for each channel, {channels}"
        check.shape("shared", shared, shared.shape == (2, channels), rule)
    if response_bias is not None:
        held = gates is not None and shared is not None
        check.shape("response_bias", response_bias, held, "be None without gates and shared")
    check.memory()
    return [t for t in (sums, grads, shared) if t is not None]


_stn_gate_backward_ = _define(
    "stn_gate_backward_(Tensor(a!) sums, Tensor(b!)? grads, Tensor(c!)? shared, Tensor grad, Tensor response,"
    " Tensor? gates, Tensor? response_bias, *, int batch_dim, int channel_dim) -> ()",
    _reference.stn_gate_backward_,
    check_stn_gate_backward,
)


def stn_gate_backward_(
    sums: Tensor,
    grads: Tensor | None,
    shared: Tensor | None,
    grad: Tensor,
    response: Tensor,
    gates: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> None:
    r"""What the gradients of :func:`stn_gate_` are made of, in one pass over the data; see
    :func:`nestopt_ext._reference.stn_gate_backward_`.

    ``grad``, ``response``, ``gates`` and ``response_bias`` are as there, and only read. ``sums`` [B, 2 D] (float64 for
    float64, else float32) receives the sums of ``grad * response``, then those of ``grad``, over the positions of an
    example. ``grads`` may be None; or it has the shape of ``grad`` and receives gates_w * grad, the gradient of the
    response; or twice the channels, and receives ``grad`` before it, the gradient of a stacked tensor. ``shared``
    [2, D], of the dtype of ``sums``, may be None; or it receives the gradients of the biases, and the second half of
    ``sums`` is multiplied by ``response_bias``, which makes ``sums`` the gradient of the gates; that is left out
    without ``response_bias``. ``gates`` may be None where nothing needs them. From a native kernel no bit depends on
    the number of threads. Has no derivative of its own.
    """
    tensors = (sums, grads, shared, grad, response, gates, response_bias)
    _stn_gate_backward_(*tensors, batch_dim=batch_dim, channel_dim=channel_dim)


_NATIVE = {
    (op, key.lower())
    for op in (
        "complex_adam_step_",
        "complex_sgd_step_",
        "dual_series_",
        "hadamard_gram_",
        "neumann_step_",
        "rank_one_update_",
        "row_dot_",
        "softmax_hessian_",
        "stn_gate_",
        "stn_gate_backward_",
    )
    for key in ("CPU", "CUDA")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"nestopt_ext::{op}", key)
}
