"""The Hessian of a loss, by differentiating its gradient."""

from typing import Literal, TypeAlias

from torch import Tensor

from .. import _lists
from .._types import Loss, SameTensors, TensorList, Tensors
from ._forward import ForwardOverReverse
from ._gradient import Gradient, check_params
from ._operator import CurvatureOperator

#: How a gradient is differentiated.
Mode: TypeAlias = Literal["double-backward", "forward-over-reverse"]


class Hessian(CurvatureOperator):
    r"""The Hessian :math:`d^2 L / dw\,dw^\top` of a loss in ``params``, as an operator on tensors.

    ``loss`` is a scalar tensor with a graph, or a zero-argument closure that returns one. ``params`` (Tensor, list,
    tuple or dict of float32, float64, bfloat16 or float16 tensors that require grad) are only read. Params that the
    loss does not use, and a loss that is linear in its params, give zeros. Random state and tensors that a closure
    writes to are put back.

    ``mode`` is how a product is found:

    - "double-backward": the loss is evaluated and differentiated once, when the operator is made, and that graph is
      kept as long as the operator lives. A product costs about one backward pass through the graph of the gradient.
      Many vectors pass it at once. The faster one for small models, and what supports most operations.
    - "forward-over-reverse": nothing is kept. Each product calls the closure again (a tensor will not do), at the
      params as they are then and with the same random numbers each time, on dual numbers, and takes the tangent of its
      gradient. It needs about half of the memory, the params must be leaves, and every operation of the forward
      and of the backward pass must have a forward-mode rule.

    Raises TypeError or ValueError for a bad ``loss``, ``params`` or ``mode``, and RuntimeError, with the way out, where
    PyTorch has no second derivative.

    The method is Pearlmutter's (Fast exact multiplication by the Hessian, 1994), by reverse mode twice, or by forward
    mode over reverse mode as there.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian = Hessian(w[0] ** 2 * w[1], w)
    >>> hessian.dense()                       # [[2 w1, 2 w0], [2 w0, 0]]
    tensor([[4., 2.],
            [2., 0.]])
    >>> (hessian + 0.5 * hessian)(torch.tensor([1.0, 1.0]))
    tensor([9., 3.])
    >>> hessian.diagonal()
    tensor([4., 0.])
    >>> Hessian(lambda: w[0] ** 2 * w[1], w, mode="forward-over-reverse")(torch.tensor([1.0, 1.0]))
    tensor([6., 2.])
    """

    sums_terms = True

    def __init__(self, loss: Loss, params: Tensors, *, mode: Mode = "double-backward") -> None:
        flat, structure = _lists.flatten("Hessian", "params", params)
        check_params("Hessian", "params", structure.labels("params"), flat)
        super().__init__(flat, structure)
        self._gradient = _differentiated("Hessian", loss, flat, structure, mode)
        if isinstance(self._gradient, ForwardOverReverse):
            self._gradient.check()

    def flat_product(self, v: TensorList) -> TensorList:
        """The product with a list like the params."""
        return self._gradient.product(v)

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        """The terms of a Neumann series, where products are replayed."""
        if diagonal is not None or not isinstance(self._gradient, Gradient):
            return None
        return self._gradient.neumann_sum(v, num_terms, alpha, damping)

    def flat_products(self, v: TensorList) -> TensorList:
        """The product with k lists, in one pass through the graph where there is one."""
        if isinstance(self._gradient, Gradient):
            return self._gradient.products(v)
        return super().flat_products(v)


def hvp(loss: Loss, params: SameTensors, v: Tensors, *, mode: Mode = "double-backward") -> SameTensors:
    r"""The Hessian of ``loss`` in ``params`` times ``v``: :math:`\sum_j \partial^2 L / \partial w_i \partial w_j \;
    v_j`.

    Like ``torch.autograd.grad``, on tensors you already have: ``loss`` is a scalar tensor with a graph (or a
    zero-argument closure), ``params`` a Tensor, list, tuple or dict of tensors that require grad, ``v`` the same with
    the shapes, dtypes and devices of the params. Returns new tensors without graph in the structure of ``params``; the
    graph of ``loss`` stays alive and nothing is modified. Params that ``loss`` does not use, and a loss that is linear
    in its params, give zeros. ``mode`` is "double-backward", or for closures "forward-over-reverse", as in
    :class:`Hessian`.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where PyTorch has no second
    derivative. For many products with one loss make a :class:`Hessian`, which differentiates the first time once.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp(w[0] ** 2 * w[1], w, torch.tensor([1.0, 1.0]))   # [2 w1 + 2 w0, 2 w0]
    tensor([6., 2.])
    """
    flat, structure = _lists.flatten("hvp", "params", params)
    check_params("hvp", "params", structure.labels("params"), flat)
    vector = structure.match("hvp", "v", v)
    _lists.check_like("hvp", structure.labels("v"), vector, flat)
    product = _differentiated("hvp", loss, flat, structure, mode).product([t.detach() for t in vector])
    result: SameTensors = structure.pack(product)
    return result


def _differentiated(
    caller: str, loss: Loss, params: TensorList, structure: _lists.Structure, mode: object
) -> Gradient | ForwardOverReverse:
    if mode == "double-backward":
        return Gradient(caller, "loss", loss, params)
    if mode == "forward-over-reverse":
        return ForwardOverReverse(caller, "loss", loss, params, structure.labels("params"))
    raise ValueError(f"{caller}: mode must be 'double-backward' or 'forward-over-reverse'; got {mode!r}.")
