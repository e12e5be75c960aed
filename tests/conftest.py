"""What the tests share: an untrained pocket SD3, ten scenes with captions, a LoRA run's options."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before any import that reads them. The claims about equal bits are claims about the CPU.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

if TYPE_CHECKING:
    import train_lora_sd3

MakeArgs = Callable[..., "train_lora_sd3.Args"]

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Every test may open an Accelerator of its own; accelerate keeps the first one's state."""
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    """Forgets the Accelerator that was opened last, as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pocket SD3 whose latents are shifted and scaled as the real ones."""
    from dojo.pocket import models

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    torch.manual_seed(0)
    pipeline = models.sd3_pipeline()
    # The pocket autoencoder's own 0 and 1 would hide a factor that is forgotten.
    pipeline.vae.register_to_config(shift_factor=0.0609, scaling_factor=1.5305)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder with ten pocket scenes and metadata.jsonl; no two captions are equal."""
    from PIL import Image

    from dojo.pocket import scenes

    folder = tmp_path_factory.mktemp("datas") / "scenes"
    folder.mkdir()
    rng = random.Random(0)
    drawn: dict[str, scenes.Scene] = {}
    while len(drawn) < 10:
        drawn.setdefault(*scenes.sample(rng))
    rows = []
    for i, (caption, scene) in enumerate(drawn.items()):
        Image.fromarray(scenes.draw(scene)).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def lora_args(tiny_sd3: Path, scene_data: Path) -> MakeArgs:
    """`lora_args(tmp_path, *flags)`: train_lora_sd3's options for three small steps, then flags.

    The run writes to `tmp_path / "run"`, its cache lies in `tmp_path / "cache"`.
    """

    def make(folder: Path, *flags: str) -> "train_lora_sd3.Args":
        import train_lora_sd3

        return train_lora_sd3.cli.parse(
            train_lora_sd3.Args, None, [*lora_flags(folder, tiny_sd3, scene_data), *flags]
        )

    return make


def lora_flags(folder: Path, model: Path, data: Path) -> list[str]:
    """The command line of a small LoRA run; what follows it wins."""
    flags = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": folder / "run",
        "latent_cache_dir": folder / "cache",
        "resolution": 64,
        "max_sequence_length": 24,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "rank": 2,
        "logging_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
