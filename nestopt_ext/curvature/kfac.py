"""The Gauss-Newton matrix, layer by layer, as a Kronecker product of two small matrices."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import _lists, _reference
from .._types import SameTensors, TensorList, Tensors
from ._evaluation import evaluate, preserved_rng
from ._kfac_layers import Layer
from ._kfac_params import check_used_once, chosen_params, is_compiled, layers_of, unwrapped
from ._loss_root import LossRoot, has_likelihood, loss_root
from ._operator import CurvatureOperator

#: Eigenvalues of a factor below this, relative to its largest, are taken for rounding and count as zero.
_NEGLIGIBLE = 1e-10

Fisher = Literal["type-2", "mc", "empirical"]


class KFAC(CurvatureOperator):
    r"""Kronecker-factored curvature: one block :math:`A \otimes G` for each layer, plus ``damping`` times the identity.

    For a layer :math:`z = W a` (a bias among the params is the last column of W, with a constant 1 as its input) the
    block that the criterion's Gauss-Newton matrix has for W is approximated by

    .. math:: V \mapsto G V A + \delta V, \qquad A = \mathrm{mean}_r \; a_r a_r^\top, \qquad
              G = \sum_r \sum_c d_{rc} d_{rc}^\top,

    where the rows r run over examples and over the positions at which the layer is used (words of [B, T, D], patches of
    a convolution, in x kh x kw), and :math:`d_{rc}` is what flows back to the row when column c of a square root of the
    criterion's Hessian in the model's outputs is backpropagated. The scale is that of ``criterion`` as given: a mean
    over examples gives the curvature of that mean, a sum that of the sum. There are no blocks between layers; a
    convolution with groups has a block for each group.

    ``model`` is a module, called in the mode it is in: ``model(inputs)``, ``model(*inputs)`` for a tuple or list,
    ``model(**inputs)`` for a dict. Dimension 0 of its output [N, ...] enumerates examples, and each example is taken to
    depend on its own input only (batch statistics in training mode are approximated as if they did not couple).
    ``criterion(outputs, targets)`` returns a scalar. ``params``: None for all that require grad, tensors of the model
    (list, tuple, dict), or names and ``fnmatch`` patterns, for a dict by name. All must be weights and biases of
    Linear, Conv1d, Conv2d and Conv3d layers that are called once. ``damping`` (units of curvature) is finite and >= 0.
    Factors are kept in float64 for float64 params and in float32 otherwise.

    ``fisher`` says what is backpropagated:

    * ``"type-2"``: every column of the root; exact in the outputs, and as many backward passes as an example has
      outputs. CrossEntropyLoss, MSELoss and BCEWithLogitsLoss have theirs in closed form; any other criterion that is
      convex in the outputs and a sum or mean over examples goes by the eigenvectors of its Hessian, for small outputs.
    * ``"mc"``: one backward pass with targets drawn from the model's likelihood; the expectation is that of type-2.
      ``seed`` fixes the draws, which go on from call to call of :meth:`update`. For the three criteria above.
    * ``"empirical"``: one backward pass with ``targets``. An estimate of the empirical Fisher, not of Gauss-Newton.

    The blocks are exact for one layer with a squared error, and for one example in a net without shared weights.

    Solvers use the inverse, which is in closed form: with :math:`A = Q_A \Lambda_A Q_A^\top` and the same for G,

    .. math:: V \mapsto Q_G \left[ (Q_G^\top V Q_A) / (\lambda_G \lambda_A^\top + \delta) \right] Q_A^\top .

    Eigenvalues below 1e-10 of the largest of their factor count as zero in it.

    Parameters, ``.grad``, buffers and random state are the same bits afterwards, also after an exception. Compiled
    modules run uncompiled, and of a data-parallel wrapper the module inside, on the batch of this process. Raises
    TypeError or ValueError, naming the argument, for bad arguments; params of other layers, shared params and layers
    that are not used are named.

    Sources: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature (2015);
    Grosse and Martens (2016) for convolutions; Eschenhagen et al. (2023), whose "expand" this is. Damping is added to
    the product of the factors, not to each of them, and the root of an output of several positions (words, pixels) is
    backpropagated position by position, so that type-2 has no cross terms between them.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> kfac = KFAC(layer, torch.nn.MSELoss(), inputs, targets, damping=1.0)   # exact here: 2 mean(a a') + 1
    >>> kfac.dense()
    tensor([[2., 0.],
            [0., 5.]])
    >>> kfac.inverse([torch.tensor([[2.0, 10.0]])])
    [tensor([[1., 2.]])]
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        params: Tensors | str | Sequence[str] | None = None,
        damping: float = 1e-2,
        *,
        fisher: Fisher = "type-2",
        seed: int = 0,
    ) -> None:
        self._model = unwrapped("KFAC", model)
        if not callable(criterion):
            raise TypeError(f"KFAC: criterion must be callable; got {_lists.value_name(criterion)}.")
        _check_number("KFAC", "damping", damping)
        if fisher not in ("type-2", "mc", "empirical"):
            raise ValueError(f"KFAC: fisher must be 'type-2', 'mc' or 'empirical'; got {fisher!r}.")
        if fisher != "type-2" and not has_likelihood(criterion):
            raise ValueError(
                f"KFAC: criterion must be CrossEntropyLoss, MSELoss or BCEWithLogitsLoss for fisher={fisher!r};"
                f" got {_lists.value_name(criterion)}, of which no likelihood is known. Use fisher='type-2'."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"KFAC: seed must be an int; got {seed!r}.")
        flat, structure = chosen_params("KFAC", self._model, params)
        super().__init__(flat, structure)
        self._criterion = criterion
        self._damping = float(damping)
        self._fisher = fisher
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._layers = layers_of("KFAC", self._model, flat)
        self._moments = self._measure("KFAC", inputs, targets)
        self._eigen: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None

    def update(self, inputs: Any, targets: Any, *, decay: float = 0.95) -> None:
        r"""Mixes in a new batch: :math:`A \leftarrow decay \, A + (1 - decay) A_{new}`, G alike.

        They are taken at the params as they are now. ``decay`` is in [0, 1]; 0 forgets the past. The operator is
        modified; eigenvectors are computed when an inverse next needs them. After an exception nothing is modified.
        """
        _check_number("KFAC.update", "decay", decay, most=1.0)
        for old, new in zip(self._moments, self._measure("KFAC.update", inputs, targets), strict=True):
            for factor, fresh in zip(old, new, strict=True):
                factor.mul_(decay).add_(fresh, alpha=1 - decay)
        self._eigen = None

    def inverse(self, v: SameTensors) -> SameTensors:
        """The exact inverse (damping included) times ``v``; new tensors, in the structure of the params, without graph.

        Raises RuntimeError where damping is 0 and a factor is singular.
        """
        flat = self._structure.match("KFAC.inverse", "v", v)
        _lists.check_like("KFAC.inverse", self._structure.labels("v"), flat, self._params)
        found = self.flat_inverse([t.detach().unsqueeze(0) for t in flat], 0.0)
        result: SameTensors = self._structure.pack([t.squeeze(0) for t in found])
        return result

    # ---- what solvers use -------------------------------------------------------------------------------------------

    @property
    def is_mean_over_examples(self) -> bool:
        """False: a product of means is not the mean of the products."""
        return False

    def flat_product(self, v: TensorList) -> TensorList:
        """The product with a list like the params."""
        return [t.squeeze(0) for t in self.flat_products([t.unsqueeze(0) for t in v])]

    def flat_products(self, v: TensorList) -> TensorList:
        """Products with k lists at once, [k, *shape] for each param."""

        def product(i: int, matrix: Tensor) -> Tensor:
            a, g = self._moments[i]
            return _sandwich(g, matrix, a).add_(matrix, alpha=self._damping)

        return self._by_layer(product, v)

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList:
        """(A + damping I)^-1 for k lists at once, beside the damping of the operator itself."""
        total = self._damping + damping
        eigen = self._eigenvectors()
        if total == 0 and any(bool((a[0][..., 0] == 0).any() | (g[0][..., 0] == 0).any()) for a, g in eigen):
            raise RuntimeError(
                "KFAC: damping must be > 0 for an inverse of singular factors; got 0. Fewer rows than columns went into"
                " them, or inputs or outputs of a layer are dependent."
            )

        def inverse(i: int, matrix: Tensor) -> Tensor:
            (a_values, a_vectors), (g_values, g_vectors) = eigen[i]
            scale = g_values.unsqueeze(-1) * a_values.unsqueeze(-2) + total
            return _sandwich(g_vectors, _sandwich(g_vectors.mT, matrix, a_vectors).div_(scale), a_vectors.mT)

        return self._by_layer(inverse, v)

    def largest_eigenvalue(self) -> Tensor:
        """The largest eigenvalue, damping included, from the eigenvalues of the factors; a 0-dim tensor."""
        peaks = [(a[0][..., -1] * g[0][..., -1]).amax() for a, g in self._eigenvectors()]
        return torch.stack([peak.to(peaks[0]) for peak in peaks]).amax() + self._damping

    def dense(self) -> Tensor:
        """The matrix, of shape [P, P] with P the number of elements of the params in order; costs no products."""
        first = self._params[0]
        sizes = [p.numel() for p in self._params]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        dtype = self._params[0].dtype
        for p in self._params[1:]:
            dtype = torch.promote_types(dtype, p.dtype)
        matrix = torch.zeros((sum(sizes), sum(sizes)), dtype=dtype, device=first.device)
        # Where each entry of a layer's matrices lies in the flat vector, by the same route as the values themselves.
        index = [
            torch.arange(start, start + size, dtype=torch.float64, device="cpu").reshape(1, *p.shape)
            for start, size, p in zip(starts, sizes, self._params, strict=True)
        ]
        for layer, (a, g) in zip(self._layers, self._moments, strict=True):
            places = layer.matrix(index, torch.float64)[0].long().to(first.device)  # [groups, m, n]
            for place, a_group, g_group in zip(places, a, g, strict=True):
                at = place.reshape(-1)
                matrix[at.unsqueeze(1), at] = torch.kron(g_group, a_group).to(matrix)
        matrix.diagonal().add_(self._damping)
        return matrix

    def diagonal(self) -> Tensors:
        """The diagonal of the matrix, in the structure and shapes of the params; exact, and costs no products."""
        entries: TensorList = list(self._params)
        for layer, (a, g) in zip(self._layers, self._moments, strict=True):
            matrix = g.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * a.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
            layer.put(matrix.add_(self._damping).unsqueeze(0), entries, self._params)
        result: Tensors = self._structure.pack([e.squeeze(0) for e in entries])
        return result

    def _by_layer(self, apply: Callable[[int, Tensor], Tensor], v: TensorList) -> TensorList:
        found: TensorList = list(v)
        for i, layer in enumerate(self._layers):
            layer.put(apply(i, layer.matrix(v, self._moments[i][0].dtype)), found, self._params)
        return found

    def _eigenvectors(self) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        if self._eigen is None:
            self._eigen = [(_eigh(a), _eigh(g)) for a, g in self._moments]
        return self._eigen

    # ---- the factors ------------------------------------------------------------------------------------------------

    def _measure(self, caller: str, inputs: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
        """A [groups, n, n] and G [groups, m, m] of each layer for one batch."""
        watched = [_Watched(caller, layer) for layer in self._layers]
        kept: list[Tensor] = []

        def loss() -> Tensor:
            with _uncompiled(self._model), _watching(watched):
                outputs = _call(self._model, inputs)
            _check_outputs(caller, outputs, inputs, self._fisher)
            kept.append(outputs)
            return self._criterion(outputs, targets)

        evaluation = evaluate(caller, "criterion", loss)
        (outputs,) = kept
        edges = [w.finished() for w in watched]
        check_used_once(caller, outputs, self._params, self._layers)
        if not bool(outputs.isfinite().all()):  # before labels are drawn: CUDA answers a NaN there with a dead context
            raise ValueError(
                f"{caller}: outputs of the model must be finite; got NaN or Inf. Check the inputs and the params."
            )
        root = loss_root(caller, self._criterion, outputs, targets)
        state = None if self._generator is None else self._generator.get_state()
        try:
            for cotangent in self._cotangents(root, outputs.device):
                with torch.enable_grad(), preserved_rng(), evaluation.differentiating():
                    grads = torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
                for w, grad in zip(watched, grads, strict=True):
                    w.backpropagated(grad)
            moments = [w.moments() for w in watched]
        except BaseException:
            if self._generator is not None and state is not None:
                self._generator.set_state(state)  # the draws of a batch that failed have not happened
            raise
        return moments

    def _cotangents(self, root: LossRoot, device: torch.device) -> Iterator[Tensor]:
        if self._fisher == "type-2":
            return root.columns()
        if self._fisher == "empirical":
            return iter([root.given()])
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return iter([root.sampled(self._generator)])


class _Watched:
    """One layer during one forward pass and the backward passes through it."""

    def __init__(self, caller: str, layer: Layer) -> None:
        self._caller = caller
        self.layer = layer
        self._calls = 0
        self._edge: GradientEdge | None = None
        self._a: Tensor | None = None
        self._g: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        self._calls += 1
        if not output.requires_grad:
            raise ValueError(
                f"{self._caller}: model must run layer {self.layer.name!r} with grad mode on; got an output without"
                " graph. Take away torch.no_grad(), .detach() or a reentrant checkpoint around it."
            )
        x = (args[0] if args else kwargs["input"]).detach()
        self.layer.check_batched(self._caller, x)
        if self._calls == 1:
            rows = self.layer.input_rows(x.to(self._dtype))
            self._a = _second_moment(rows) / rows.shape[1]
        # An in-place operation on a view, such as ReLU(inplace=True), cuts the view out of the graph; not so a copy.
        output = output.clone() if output._is_view() else output
        self._edge = get_gradient_edge(output)
        return output

    def finished(self) -> GradientEdge:
        if self._calls != 1 or self._edge is None:
            times = "not called" if self._calls == 0 else f"called {self._calls} times"
            raise ValueError(
                f"{self._caller}: params must be of layers that model calls once; got layer {self.layer.name!r},"
                f" {times}. Pass params as names or patterns that leave it out."
            )
        return self._edge

    def backpropagated(self, grad: Tensor | None) -> None:
        if grad is None:
            raise ValueError(
                f"{self._caller}: params must be of layers that the outputs of model depend on; got layer"
                f" {self.layer.name!r}, whose result is not used. Pass params as names or patterns that leave it out."
            )
        moment = _second_moment(self.layer.output_rows(grad.detach().to(self._dtype)))
        self._g = moment if self._g is None else self._g.add_(moment)

    def moments(self) -> tuple[Tensor, Tensor]:
        a, g = cast(Tensor, self._a), cast(Tensor, self._g)
        if not bool(a.isfinite().all() & g.isfinite().all()):
            raise ValueError(
                f"{self._caller}: model and criterion must give finite values; got NaN or Inf in the factors of layer"
                f" {self.layer.name!r}. Check the inputs, the params, and that not all targets are ignored."
            )
        return a, g

    @property
    def _dtype(self) -> torch.dtype:
        return _reference.opmath(next(self.layer.module.parameters()).dtype)


@contextmanager
def _watching(watched: Sequence[_Watched]) -> Iterator[None]:
    """Hooks on the layers, first in line so that they see what the layer itself computed."""
    handles = []
    try:
        for w in watched:
            handle = w.layer.module.register_forward_hook(w.hook, prepend=True, with_kwargs=True)
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Hooks are not run inside a compiled region."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _check_outputs(caller: str, outputs: object, inputs: Any, fisher: str) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{caller}: model must return a tensor; got {_lists.value_name(outputs)}. Wrap it in a module that does."
        )
    if outputs.dim() == 0 or outputs.numel() == 0:
        raise ValueError(
            f"{caller}: outputs of the model must be [N, ...] with N >= 1; got {_lists.shape_name(outputs.shape)}."
        )
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    first = values if isinstance(values, Tensor) else next((t for t in values if isinstance(t, Tensor)), None)
    if fisher == "type-2" and first is not None and first.dim() and len(first) != len(outputs):
        raise ValueError(
            f"{caller}: outputs of the model must have one entry along dimension 0 for each of the {len(first)} inputs;"
            f" got shape {_lists.shape_name(outputs.shape)}. Let the model return [N, C, ...], or use fisher='mc'."
        )


def _second_moment(rows: Tensor) -> Tensor:
    """The sum of outer products of the rows, [groups, n, n] from [groups, rows, n]."""
    return _matmul(rows.mT, rows)


def _sandwich(left: Tensor, v: Tensor, right: Tensor) -> Tensor:
    return _matmul(_matmul(left, v), right)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """In the dtype of the factors, under autocast too."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(factor)
    return torch.where(values < _NEGLIGIBLE * values[..., -1:], 0.0, values), vectors


def _check_number(caller: str, name: str, value: object, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{caller}: {name} must be a number; got {value!r}.")
    if not math.isfinite(value) or not 0 <= float(value) <= most:
        rule = "finite and >= 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{caller}: {name} must be {rule}; got {value}.")
