"""Copies and files of an observed model carry nothing of the lens, which follows the original alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.topics import TOPICS
from tests._runs import ARCHITECTURES, small_model, steps_of


def observed(model: nn.Module) -> tuple[sl.Lens, list[Frame]]:
    """A lens with every topic subscribed, raw and reduced where that is possible."""
    frames: list[Frame] = []
    lens = sl.observe(model)
    for name, spec in TOPICS.items():
        lens.pipe(sl.topic(name)).subscribe(frames.append)
        if spec.raw:
            lens.pipe(sl.norm(name), sl.ema(0.5)).subscribe(frames.append)
    return lens, frames


def trained(seed: int, steps: int) -> nn.Module:
    model = small_model(seed)
    list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), steps))
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def test_a_deep_copy_of_an_observed_model_trains_unobserved() -> None:
    model = small_model()
    lens, frames = observed(model)
    with lens:
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
        twin = copy.deepcopy(model)
        assert equal(twin, model)
        before = len(frames), lens.current_step
        list(steps_of(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2, seed=5))
        assert (len(frames), lens.current_step) == before
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, seed=5))
        assert equal(twin, model)
        assert len(frames) > before[0]


def test_a_copy_can_be_observed_beside_the_original() -> None:
    model = small_model()
    steps: dict[str, list[int]] = {"original": [], "copy": []}
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("activations")).subscribe(lambda frame: steps["original"].append(frame.step))
        twin = copy.deepcopy(model)
        with sl.observe(twin) as other:
            other.pipe(sl.norm("activations")).subscribe(lambda frame: steps["copy"].append(frame.step))
            list(steps_of(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2))
            list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
    assert steps == {"original": [0], "copy": [0, 1]}


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_saved_observed_model_loads_and_trains_like_the_original(way: str, tmp_path: Path) -> None:
    model = trained(0, 1)
    lens, _ = observed(model)
    with lens, warnings.catch_warnings():
        warnings.simplefilter("error")
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
        if way == "pickle":
            loaded: nn.Module = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, tmp_path / "model.pt")
            loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert equal(loaded, model)
        for either in (model, loaded):
            list(steps_of(either, torch.optim.SGD(either.parameters(), lr=0.1), 2, seed=7))
        assert equal(loaded, model)


def test_a_saved_observed_model_loads_where_streamlens_is_not_installed(tmp_path: Path) -> None:
    model = small_model()
    criterion = nn.CrossEntropyLoss()
    lens, _ = observed(model)
    with lens:
        lens.watch_loss(criterion)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
        torch.save([model, criterion], tmp_path / "model.pt")
        assert b"streamlens" not in (tmp_path / "model.pt").read_bytes()
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("streamlens", "reactivex"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
model, criterion = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x = torch.ones(2, 4)
criterion(model(x), torch.tensor([0, 1])).backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert "streamlens" not in sys.modules
print(model(x).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    x = torch.ones(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    criterion(model(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert float(done.stdout) == model(x).sum().item()


@pytest.mark.parametrize("architecture", ["convolutions", "attention", "recurrent", "reused"])
def test_every_kind_of_model_copies_and_pickles_while_observed(architecture: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    lens, frames = observed(model)
    with lens:
        x = torch.randn(2, 16)
        output = model(x)
        (output["logits"] if isinstance(output, dict) else output).sum().backward()
        twin = copy.deepcopy(model)
        assert equal(twin, model)
        seen = len(frames)
        twin.eval()(x)
        twin.train()(x)
        assert len(frames) == seen
        # Local classes do not pickle; their parts do.
        for child in model.children():
            pickle.loads(pickle.dumps(child))


def test_an_ema_copy_averages_as_without_observing() -> None:
    def run(observing: bool) -> nn.Module:
        model = small_model()
        lens = observed(model)[0] if observing else None
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in steps_of(model, optimizer, 4):
            averaged.update_parameters(model)
            averaged(torch.ones(1, 4))
        if lens is not None:
            assert lens.current_step == 3
            lens.close()
        return averaged

    assert equal(run(observing=True), run(observing=False))


def test_loading_weights_in_mid_run_is_no_update() -> None:
    """The update after a load is what the optimizer did, not the load."""
    model, other = small_model(), small_model(seed=3)
    updates: list[float] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weight_updates")).subscribe(lambda frame: updates.append(frame["0"].item()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        list(steps_of(model, optimizer, 1))
        for assign in (False, True):
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            if assign:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            before = model.get_parameter("0.weight").detach().clone()
            list(steps_of(model, optimizer, 1))
            assert updates[-1] == pytest.approx(
                (model.get_parameter("0.weight").detach() - before).norm().item(), rel=1e-5
            )
    assert len(updates) == 3


def test_saving_the_state_of_an_observed_model_has_no_key_of_ours() -> None:
    model = small_model()
    keys = list(model.state_dict())
    lens, _ = observed(model)
    with lens:
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
        assert list(model.state_dict()) == keys
