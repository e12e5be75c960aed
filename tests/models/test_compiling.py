"""--torch_compile: which blocks it reaches in every family, and that nothing is compiled twice."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dojo.models import compiling, opening
from dojo.models.family import ModelArgs
from dojo.models.sd3.network import MMDIT
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has named a folder, and who names one here does not name it for other tests."""
    monkeypatch.setenv(compiling.VARIABLE, "")  # so that it is put back afterwards
    monkeypatch.delenv(compiling.VARIABLE)
    from torch._dynamo import config

    before = config.recompile_limit
    yield
    config.recompile_limit = before


@pytest.mark.parametrize("family", ["sd3", "sd15", "sdxl", "kolors", "hunyuandit"])
def test_each_block_is_compiled_and_nothing_else(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(f"tiny_{family}"))
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened = opening.family_of(ModelArgs(pretrained_model_name_or_path=folder))
    args = opened.ModelArgs(pretrained_model_name_or_path=folder)
    opened.open_model(args).load_network(torch.float32, CPU)
    assert compiled == []
    assert os.environ.get(compiling.VARIABLE) in (None, default_cache_dir())
    args = opened.ModelArgs(pretrained_model_name_or_path=folder, torch_compile=True)
    network: Any = opened.open_model(args).load_network(torch.float32, CPU)
    kinds = {"JointTransformerBlock", "BasicTransformerBlock", "HunyuanDiTBlock"}
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    assert len(blocks) > 1
    assert compiled == blocks
    assert os.environ[compiling.VARIABLE] == str(tmp_path / "sd-dojo" / "compiled")
    with pytest.raises(ValueError, match="--activations_on_cpu does not go with --torch_compile"):
        replace(args, activations_on_cpu=True)


def test_a_users_folder_wins_and_torchs_own_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in (
        ("elsewhere", "elsewhere"),
        (default_cache_dir(), str(compiling.cache_folder())),  # torch writes it there by itself
    ):
        monkeypatch.setenv(compiling.VARIABLE, before)
        compiling.compile_blocks(torch.nn.Module(), MMDIT)
        assert os.environ[compiling.VARIABLE] == after


# Trains an adapter of a UNet two steps, and tells the losses and what torch found compiled.
_TRAIN = """
import json, sys
import torch
from dojo.finetune import lora
from dojo.models import sd15
from dojo.models.sd15 import ModelArgs
from torch._dynamo.utils import counters

folder, compiled = sys.argv[1], sys.argv[2] == "compiled"
torch.manual_seed(0)
model = sd15.open_model(ModelArgs(pretrained_model_name_or_path=folder, torch_compile=compiled))
network = model.load_network(torch.float32, torch.device("cpu"))
params = lora.add(network, lora.LoraArgs(rank=2))
optimizer = torch.optim.SGD(params, lr=1.0)
found = []
for _ in range(2):
    noisy, level, conditions = torch.randn(2, 4, 8, 8), torch.tensor([7, 700]), {}
    _, _, meta = model.meta_inputs(2, (4, 8, 8), torch.float32)
    conditions = {name: torch.randn(one.shape) for name, one in meta.items()}
    loss = model.predict(network, noisy, level, conditions, torch.float32).square().mean()
    loss.backward()
    optimizer.step()
    found.append(float(loss))
with torch.no_grad():  # as validation asks it
    model.predict(network, noisy, level, conditions, torch.float32)
print(json.dumps({"losses": found, **{k: dict(v) for k, v in counters.items() if k != "losses"}}))
"""


@pytest.mark.slow
def test_a_compiled_unet_trains_as_before_and_the_second_start_compiles_nothing(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    def train(how: str) -> dict[str, Any]:
        result = subprocess.run(
            [sys.executable, "-c", _TRAIN, str(tiny_sd15), how],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    plain, first, second = train("plain"), train("compiled"), train("compiled")
    assert first["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert second["losses"] == first["losses"]
    assert "stats" not in plain
    assert first["stats"]["unique_graphs"] > 0
    assert not any("recompile_limit" in reason for reason in first.get("unimplemented", {}))
    cached = "autograd_cache_miss"
    assert first["aot_autograd"][cached] > 0
    assert second["aot_autograd"].get(cached, 0) == 0
    assert second["aot_autograd"]["autograd_cache_hit"] == first["aot_autograd"][cached]
    assert second.get("inductor", {}).get("fxgraph_cache_miss", 0) == 0
    assert list((tmp_path / "sd-dojo" / "compiled").iterdir())
