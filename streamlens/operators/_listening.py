"""What operators subscribe for themselves: a stream that tells them what to do."""

from __future__ import annotations

from collections.abc import Callable

from reactivex import Observable
from reactivex.abc import DisposableBase

from streamlens.chain import current_chain
from streamlens.frame import Frame
from streamlens.operators._base import checked_source
from streamlens.stream import Stream

__all__ = ["check_control", "listen"]


def check_control(operator: str, argument: str, stream: object) -> Stream:
    """The stream that an operator was given to listen to.

    Args:
        operator: The operator, for the message.
        argument: What its argument is called.
        stream: What was given.

    Returns:
        It as a Stream.

    Raises:
        TypeError: It is no Observable.
        StreamlensError: It is a Lens with no topic selected.
    """
    if not isinstance(stream, Observable):
        raise TypeError(
            f"{operator}({argument}=...) takes a stream of alerts, such as lens.derive('alerts', "
            f"lens.pipe(health())), got {stream!r}"
        )
    return checked_source(stream)


def listen(stream: Stream, on_next: Callable[[Frame], None], name: str) -> DisposableBase:
    """Subscribe a stream beside the chain that is being put together, under a key of its own.

    Args:
        stream: The stream.
        on_next: Receives its frames.
        name: The beginning of the key.

    Returns:
        What ends the subscription.
    """
    token = current_chain.set(None)
    try:
        return stream.subscribe(on_next, name=stream.runtime.chain_key(name))
    finally:
        current_chain.reset(token)
