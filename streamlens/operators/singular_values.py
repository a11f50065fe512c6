"""`singular_values`, `condition_number` and `effective_rank`: what takes a whole decomposition."""

from __future__ import annotations

from streamlens.operators._base import is_whole
from streamlens.operators._spectrum import ConditionNumber, EffectiveRank, SingularValues
from streamlens.operators.spectral_norm import tensor_reduction
from streamlens.stream import Operator

__all__ = ["condition_number", "effective_rank", "singular_values"]


def singular_values(k: int = 10, topic: str | None = None) -> Operator:
    """The k largest singular values of each layer, largest first.

    The input is raw frames; a tensor is the matrix (first dimension, rest), a vector one column. The
    values are in the tensor's unit, at least 0, as topic `<topic>.singular_values` with components
    `sigma_1` to `sigma_k`; NaN where a matrix has fewer than k, and in all where an element is not finite.

    The cost is an exact decomposition of each matrix in float64 (some 0.3 s for 1024 x 1024): choose a
    cadence, `lens.pipe(every(100), singular_values(10, "weights"))`. On a Lens it is computed once for
    all chains that ask. On a GPU, PyTorch's decomposition makes the host wait.

    Args:
        k: How many.
        topic: The topic to select, such as `"weights"`; the stream as it is unless given.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: k is not a positive number.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    if not is_whole(k) or k < 1:
        raise ValueError(
            f"singular_values({k!r}): how many values, a number from 1 on; the topic comes second, as in "
            "singular_values(10, 'weights')"
        )
    return tensor_reduction(SingularValues(k), topic, "singular_values")


def condition_number(topic: str | None = None) -> Operator:
    """The condition number of each layer: its largest singular value over its smallest.

    Without unit, at least 1, as topic `<topic>.condition_number`. It is inf for a matrix that is singular
    to the precision of its elements (smallest <= largest * max(shape) * eps, as `numpy.linalg.matrix_rank`
    judges), NaN for one of zeros, without elements, or not finite. A vector's is 1. Unchanged when the
    matrix is scaled.

    Input and cost (an exact decomposition in float64 each) are as for `singular_values`.

    Args:
        topic: The topic to select, such as `"weights"`; the stream as it is unless given.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    return tensor_reduction(ConditionNumber(), topic, "condition_number")


def effective_rank(topic: str | None = None) -> Operator:
    """The effective rank of each layer: how many singular values share the sum evenly.

    exp(H(p)) with H the entropy of p_i = s_i / sum(s) (Roy & Vetterli 2007): 1 if one direction is
    all, n if n singular values are equal; without unit, at most the rank. The result is topic
    `<topic>.effective_rank`; NaN for a matrix of zeros, without elements, or not finite. A vector's
    is 1. Unchanged when the matrix is scaled.

    Input and cost (an exact decomposition in float64 each) are as for `singular_values`.

    Args:
        topic: The topic to select, such as `"weights"`; the stream as it is unless given.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    return tensor_reduction(EffectiveRank(), topic, "effective_rank")
