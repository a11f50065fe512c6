"""`hessian_eigenvalues`: the curvature of the loss along its sharpest directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import is_number, is_whole, relabelled
from streamlens.operators._hessian import OF_LAYERS, Batch, Loss, LossSurface, Mode, loss_surface
from streamlens.operators._lanczos import WHICH, Which, lanczos, random_vector
from streamlens.operators._model import FindModel, ModelNode, on_model
from streamlens.stream import Operator, Stream

__all__ = ["Search", "eigenvalues", "hessian_eigenvalues", "search_of"]

TOPIC = "hessian_eigenvalues"


def hessian_eigenvalues(
    k: int = 5,
    *,
    loss: Loss,
    batch: Batch | None = None,
    batches: Sequence[Batch] | None = None,
    which: Which = "largest",
    eigenvectors: bool = False,
    mode: Mode = "eval",
    parameters: str | Sequence[str] | None = None,
    products: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Operator:
    """The k extreme eigenvalues of the loss's Hessian: how sharply the loss bends, and which way.

    H = d^2 L / d theta^2, where theta are all trainable parameters of the model and L is the mean of
    `loss(model(inputs), labels)` over fixed batches. H v is the derivative of the gradient's product with v
    (Pearlmutter, Fast exact multiplication by the Hessian, 1994), exact and without H itself; its
    extreme eigenpairs are found by Lanczos with full reorthogonalisation.

    Used as `lens.pipe(every(500), hessian_eigenvalues(5, loss=criterion, batch=(x, y)))`: due after each
    update of the lens's cadence, at the parameters that it leaves. After another operator, as in
    `lens.pipe(topic("epoch_finished"), hessian_eigenvalues(...))`, or on a stream that comes from no
    lens (with `model=`), at each of its frames; whatever those hold, the model is taken as it is then.

    The result is topic `hessian_eigenvalues`, of the layer `""`, the model: (1, k) in float64, with the
    components `"1"` to `"k"`, in the unit of the loss over that of the parameters squared. Their sum of
    squares is no norm of H: the rest of the spectrum is left out. `meta` says how good they are:
    `converged` (how many of the k are within the tolerance of an eigenvalue), `residuals`
    (|H v - theta v| of each, which bounds that distance), `products` (how many were taken), and `confirmed`:
    whether all have converged and a second start, which sees eigenvalues of several dimensions again, has
    found no further one among the largest k.

    With `eigenvectors=True` a frame of topic `hessian_eigenvectors` follows: for each parameter, by its
    name, a tensor (k, *shape); together they are unit vectors, each with its largest element positive.

    The model is not touched: the metric works on a copy, which has none of its hooks (but those of
    `torch.nn.utils`, such as weight norm), in float32 or better, without autocast, compiled code or
    flash attention (which has no second derivative); its random numbers are the same each time. Frozen
    parameters are constants; a tied one counts once. ReLU's second derivative is taken as 0. A loss
    that is linear in the parameters has eigenvalues 0. NaN in parameters or batch makes all of them NaN.

    Cost: a copy of the model, a forward, and a gradient; then for each product 1.7 to 2.6 gradients' time
    over the batch. With one batch the gradient's graph, about twice the activations, is held meanwhile;
    with several it is built again for each product. Memory for `products` + k vectors of all
    parameters. Each product waits for a GPU once or twice, to see whether it was enough.

    Args:
        k: How many eigenvalues.
        loss: The loss, a function of the model's output and the labels: one number, the mean over the
            examples. Of the model's parameters it may depend on nothing but the output, unless it is a
            module that refers to the model.
        batch: The batch, a pair (inputs, labels). Inputs in a list or tuple are the model's positional
            arguments, in a dict its keyword arguments. It is kept, not copied.
        batches: Several batches; each counts by its number of examples, its inputs' length.
        which: `"largest"` (the default), the most positive first; `"smallest"`, the most negative first;
            `"magnitude"`, the largest in size first.
        eigenvectors: Whether the eigenvectors are given too.
        mode: `"eval"` (the default): dropout is off and batch norm uses its running statistics, so that
            the loss depends on nothing but the parameters and the batch. `"train"`: dropout's masks are
            drawn, always the same, and batch norm uses the batch's statistics, as in training.
        parameters: A name or globs over the parameters' names (`"head.*"`): the Hessian of the loss in
            these alone, a diagonal block of the whole.
        products: The most Hessian-vector products.
        tolerance: An eigenvalue theta has converged once its residual is at most `tolerance` |theta|.
        seed: Of the start vector, and of what the model draws.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: `loss` is not callable, a batch is no pair, or the model is none.
        ValueError: A number out of range, or an unknown option.
        StreamlensError: When applied: no model is known; it has fewer than k trainable numbers, or a
            parameter that is complex; any parameter is sharded.
        LayerNotFoundError: When applied: `parameters` matches nothing.
    """
    surface = loss_surface(
        TOPIC, loss=loss, batch=batch, batches=batches, mode=mode, parameters=parameters, seed=seed
    )
    search = search_of(TOPIC, k, which, products, tolerance)
    return eigenvalues(TOPIC, surface, search, vectors=bool(eigenvectors), model=model)


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for, and how long."""

    k: int
    which: Which
    products: int
    tolerance: float


def search_of(operator: str, k: int, which: Which, products: int, tolerance: float) -> Search:
    """A search whose numbers are in range.

    Raises:
        ValueError: One is not; the message names the operator that it was given to.
    """
    if not is_whole(k) or k < 1:
        raise ValueError(f"{operator}(k={k!r}): how many eigenvalues, from 1 on")
    if which not in WHICH:
        raise ValueError(
            f"{operator}(which={which!r}): it is {', '.join(map(repr, WHICH[:-1]))} or {WHICH[-1]!r}"
        )
    if not is_whole(products) or products < k:
        raise ValueError(f"{operator}(products={products!r}): a whole number, and at least k = {k}")
    if not is_number(tolerance) or not 0 < tolerance < 1:
        raise ValueError(f"{operator}(tolerance={tolerance!r}): a number between 0 and 1")
    return Search(k, which, products, float(tolerance))


def eigenvalues(
    operator: str, surface: LossSurface, search: Search, *, vectors: bool, model: nn.Module | None
) -> Operator:
    """Frames of topic `hessian_eigenvalues`, for the operators that are made of them.

    Args:
        operator: The operator that the user applies, for messages.
        surface: The loss.
        search: What is looked for.
        vectors: Whether the eigenvectors are given.
        model: The model, on streams that come from no lens.
    """
    k, which = search.k, search.which
    plan = f"{TOPIC}({k}" + (f", which={which!r}" if which != "largest" else "") + ")"

    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _Eigenvalues(stream, find, surface, search, vectors=vectors)

    def check(found: nn.Module) -> None:
        n = surface.dimension(found)
        if n is not None and n < k:
            raise StreamlensError(
                f"{operator}(k={k}): there are only {n} trainable numbers, and as many eigenvalues: "
                f"k is at most {n}"
            )

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return on_model(source, make, plan, operator=operator, model=model, check=check, of_layers=OF_LAYERS)

    return apply


class _Eigenvalues(ModelNode):
    """Takes the Hessian's extreme eigenpairs.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
        surface: The loss.
        search: What is looked for.
        vectors: Whether the eigenvectors are given.
    """

    def __init__(
        self, stream: Stream, find: FindModel, surface: LossSurface, search: Search, *, vectors: bool
    ) -> None:
        super().__init__(stream, find)
        self._surface = surface
        self._search = search
        self._vectors = vectors

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The eigenvalues, and the eigenvectors if they are wanted."""
        search = self._search
        with self._surface.hessian(model) as hessian:
            generator = torch.Generator().manual_seed(self._surface.seed)
            found = lanczos(
                hessian.__matmul__,
                random_vector(hessian.like, generator),
                search.k,
                which=search.which,
                most=search.products,
                tolerance=search.tolerance,
                generator=generator,
            )
            vectors = hessian.split(found.vectors) if self._vectors else {}
        meta = {
            "converged": found.converged,
            "confirmed": found.confirmed,
            "residuals": found.residuals,
            "products": found.products,
        }
        components = tuple(str(i + 1) for i in range(search.k))
        values = relabelled(frame, TOPIC, found.values[None], layers=("",), components=components)
        frames = [values.replace(meta=meta)]
        if vectors:
            parts: list[Tensor] = list(vectors.values())
            named = relabelled(frame, "hessian_eigenvectors", parts, layers=tuple(vectors))
            frames.append(named.replace(meta=meta))
        return frames
