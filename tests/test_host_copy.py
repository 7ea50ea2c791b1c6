"""Copies in the host's memory: every tensor of a tree with its bits, tied ones once, on a GPU through its buffers."""

import pytest
import torch

from ilr_fast import host_copy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tree_s_tensors_are_copied_with_their_bits(device, monkeypatch):
    monkeypatch.setattr(host_copy, "worth_it", lambda device: True)
    monkeypatch.setattr(host_copy, "CHUNK", 2**10)
    sizes = [0, 1, 255, 512, 513, 5000]
    weights = [torch.randn(n, device=device).to(torch.bfloat16) for n in sizes]
    turned = torch.randn(40, 30, device=device).t()
    tree = {"weights": weights, "turned": turned, "tied": (weights[5], weights[5]), "step": torch.tensor(3.0), "n": 1.5,
            "slice": weights[5].view(50, 100)[10:20], "none": None}  # fmt: skip
    (made,) = host_copy.copied([tree], torch.device(device)) or [None]
    assert made["n"] == 1.5 and made["none"] is None and made["tied"][0] is made["tied"][1] is made["weights"][5]
    for own, copy in zip([*weights, turned, tree["step"], tree["slice"]],
                         [*made["weights"], made["turned"], made["step"], made["slice"]], strict=True):  # fmt: skip
        assert copy.device.type == "cpu" and torch.equal(copy, own.cpu()) and copy.dtype == own.dtype
    for own in (*weights, turned):
        own.zero_()
    assert made["turned"].abs().sum() > 0 and made["slice"].abs().sum() > 0
