"""The trained part of a module, and the digest of what is frozen."""

from __future__ import annotations

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from tlcr.training import trained_part as module
from tlcr.training.trained_part import TrainedPart, digest, frozen_digest, trained_part


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))


def test_a_module_that_is_trained_whole_is_its_own_part() -> None:
    whole = net()
    assert trained_part(whole) is whole and frozen_digest(whole) is None


def test_the_part_holds_the_trained_parameters_alone_and_loads_in_place(tmp_path) -> None:
    whole = net()
    whole[0].requires_grad_(False)
    part = trained_part(whole)
    assert isinstance(part, TrainedPart)
    assert set(part.state_dict()) == {"2.0.weight", "2.0.bias"}
    save_model(part, tmp_path / "part.safetensors")
    saved = whole[2][0].weight.detach().clone()
    with torch.no_grad():
        whole[2][0].weight.zero_()
    load_model(part, tmp_path / "part.safetensors")
    assert torch.equal(whole[2][0].weight, saved)


def test_the_digest_knows_every_element_name_dtype_and_shape(monkeypatch) -> None:
    x = torch.arange(12.0)
    first = digest([("a", x), ("b", x + 1)])
    assert first == digest([("b", x + 1), ("a", x.clone())])  # in any order
    monkeypatch.setattr(module, "PIECE", 5)
    assert first == digest([("a", x), ("b", x + 1)])  # in pieces of any size
    changed = x.clone()
    changed[11] = torch.nextafter(x[11], torch.tensor(99.0))
    others = [
        [("a", changed), ("b", x + 1)],
        [("c", x), ("b", x + 1)],
        [("a", x.reshape(3, 4)), ("b", x + 1)],
        [("a", x.double()), ("b", x + 1)],
        [("a", x)],
    ]
    assert len({first, *(digest(other) for other in others)}) == 6


def test_only_what_is_frozen_is_in_the_frozen_digest() -> None:
    whole = net()
    whole[0].requires_grad_(False)
    before = frozen_digest(whole)
    with torch.no_grad():
        whole[2][0].weight.add_(1)
    assert frozen_digest(whole) == before
    with torch.no_grad():
        whole[0].bias[3] += 1
    assert frozen_digest(whole) != before
