"""A model and its optimizers put back: what follows is what followed before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamlens import StreamlensError
from streamlens.control._kept import Shelf, keep, put_back
from tests._runs import OPTIMIZERS


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, Tensor]:
    """Two steps, and what they leave."""
    data = torch.Generator().manual_seed(seed)
    for _ in range(2):
        x, y = torch.randn(6, 4, generator=data), torch.randn(6, 3, generator=data)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type] # a loss is a tensor in practice
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_training_from_what_was_put_back_is_what_it_was_in_the_same_tensors(
    name: str, on_disk: bool, tmp_path: Path
) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    train(model, optimizer, seed=0)
    shelf = Shelf(tmp_path / "kept" if on_disk else None)
    remembered = shelf.lay("a", keep(model, {1: optimizer}))
    assert (remembered is None) is on_disk
    shelf.move("a", "b")
    expected = train(model, optimizer, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    train(model, optimizer, seed=2)
    for _ in range(2):  # what is kept can be put back more than once
        put_back(shelf.take("b", remembered), model, {1: optimizer})
        again = train(model, optimizer, seed=1)
        assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places


def test_an_optimizer_that_had_no_state_has_none_again_and_groups_stay_as_they_are() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    kept = keep(model, {1: optimizer})
    expected = train(model, optimizer, seed=1)
    optimizer.param_groups[0]["lr"] = 0.2
    put_back(kept, model, {1: optimizer})
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.2
    optimizer.param_groups[0]["lr"] = 0.1
    assert all(torch.equal(value, expected[key]) for key, value in train(model, optimizer, seed=1).items())


def test_copies_of_parameters_that_an_optimizer_owns_are_put_back_too() -> None:
    model = make_model()
    masters = [p.detach().double().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    before = [master.detach().clone() for master in masters]
    kept = keep(model, {1: optimizer})
    with torch.no_grad():
        for master in masters:
            master.fill_(torch.nan)
    put_back(kept, model, {1: optimizer})
    assert all(map(torch.equal, masters, before))


def test_a_constant_that_was_expanded_is_left_alone() -> None:
    model = make_model()
    model.register_buffer("ones", torch.ones(1).expand(3))
    kept = keep(model, {})
    assert "ones" not in kept["tensors"]
    put_back(kept, model, {})


def test_a_model_that_has_other_tensors_now_is_left_as_it_is() -> None:
    model = make_model()
    kept = keep(model, {})
    first = model.get_parameter("0.weight")
    with torch.no_grad():
        first.fill_(1.0)
    model[3] = nn.Linear(5, 2)
    with pytest.raises(StreamlensError, match=r"was changed since it was kept, and has no such '3\.weight'"):
        put_back(kept, model, {})
    assert bool((first == 1).all())
