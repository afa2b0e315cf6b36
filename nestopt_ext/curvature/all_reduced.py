"""Products averaged over the processes of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from .. import _lists
from .._distributed import average_, check_group
from .._types import MatVec, TensorList
from ._operator import CurvatureOperator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def all_reduced(matvec: CurvatureOperator, process_group: ProcessGroup) -> CurvatureOperator: ...
@overload
def all_reduced(matvec: MatVec, process_group: ProcessGroup) -> MatVec: ...
def all_reduced(matvec: MatVec, process_group: ProcessGroup) -> MatVec:
    r"""The mean of ``matvec`` over the processes of a group: :math:`\frac{1}{n} \sum_r A_r v` on each of n ranks.

    With ``matvec`` the curvature of a loss that is a mean over the rank's own examples, and as many examples on each
    rank, this is the curvature of the mean over all of them. (For unequal shares, scale the loss of a rank by
    n * its examples / all examples.) Solvers then run on every rank side by side; given the same right-hand side they
    arrive at the same bits.

    ``matvec`` is a curvature operator, and so is then the result, or any callable on tensors. Every rank must make the
    same calls in the same order; each product is one all-reduce for every device and dtype. Closed forms of the
    operator are not used, as the matrix of one rank is not the whole.

    Raises TypeError for a ``process_group`` that is none, RuntimeError where torch.distributed is not initialized, and
    ValueError for an operator that is not a mean over examples (:class:`RankOne`, :class:`KFAC`): average what it is
    made of.

    >>> import torch, torch.distributed as dist
    >>> from nestopt_ext import Hessian
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> all_reduced(Hessian(w[0] ** 2 * w[1], w), dist.group.WORLD)(torch.tensor([1.0, 1.0]))   # the mean over one rank
    tensor([6., 2.])
    >>> dist.destroy_process_group()
    """
    caller = "all_reduced"
    if process_group is None:
        raise TypeError(
            f"{caller}: process_group must be a process group; got None. Pass torch.distributed.group.WORLD."
        )
    check_group(caller, process_group)
    if isinstance(matvec, CurvatureOperator):
        if not matvec.is_mean_over_examples:
            raise ValueError(
                f"{caller}: matvec must be a mean over examples; got {type(matvec).__name__}, which is not: the mean"
                " over the ranks would be another matrix. Average what it is made of: pass process_group to its"
                " constructor where it takes one."
            )
        return _AllReduced(matvec, process_group)
    if not callable(matvec):
        raise TypeError(f"{caller}: matvec must be callable; got {_lists.value_name(matvec)}.")
    return _Averaged(matvec, process_group)


class _AllReduced(CurvatureOperator):
    """The mean of an operator over ranks."""

    def __init__(self, operator: CurvatureOperator, group: ProcessGroup) -> None:
        super().__init__(operator._params, operator._structure)
        self._operator = operator
        self._group = group

    def flat_product(self, v: TensorList) -> TensorList:
        product = self._operator.flat_product(v)
        average_(product, self._group)
        return product

    def flat_products(self, v: TensorList) -> TensorList:
        product = self._operator.flat_products(v)
        average_(product, self._group)
        return product


class _Averaged:
    """The mean of any matvec over ranks."""

    def __init__(self, matvec: MatVec, group: ProcessGroup) -> None:
        self._matvec = matvec
        self._group = group

    def __call__(self, v: Any) -> Any:
        flat, structure = _lists.flatten("all_reduced", "matvec(v)", self._matvec(v))
        product = [t.detach().clone() for t in flat]
        average_(product, self._group)
        return structure.pack(product)
