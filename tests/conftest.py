"""What the tests share: an untrained pocket SD3, ten scenes with captions, a LoRA run's options."""

import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any import that reads them. The claims about equal bits are claims about the CPU.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several workers of pytest-xdist fill the cores by themselves; more threads would wait in loops.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
if NUM_THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
# Runs write and flush thousands of small files, for which a disk takes its time.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

from dojo.launch import interrupt  # noqa: E402

if TYPE_CHECKING:
    import train_lora_sd3

MakeArgs = Callable[..., "train_lora_sd3.Args"]

torch.set_num_threads(min(NUM_THREADS, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="module")
def settled_imports() -> None:
    """Takes what is loaded by now out of the garbage collection.

    Every run collects garbage when its text encoders go. Among a million objects of libraries
    that takes longer than a step of training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Every test may open an Accelerator of its own; accelerate keeps the first one's state."""
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A script that is run as `__main__` in a test takes the signals; they are pytest's again.

    A later test that sends itself a signal would be ended by the watch of a run that is over.
    """
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    yield
    if interrupt._watch is not None:
        interrupt._watch = None
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def reset_accelerate() -> None:
    """Forgets the Accelerator that was opened last, as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pocket SD3 whose latents are shifted and scaled as the real ones."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sd3", "sd3")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pocket SD1.5 whose latents are scaled as the real ones."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sd15", "sd15")


def make_tiny(folder: Path, family: str) -> Path:
    """Writes an untrained pocket model of a family, sd3 or sd15."""
    from dojo.pocket import models

    torch.manual_seed(0)
    if family == "sd3":
        pipeline: Any = models.sd3_pipeline()
        # The pocket autoencoder's own 0 and 1 would hide a factor that is forgotten.
        pipeline.vae.register_to_config(shift_factor=0.0609, scaling_factor=1.5305)
    else:
        pipeline = models.sd15_pipeline()
        pipeline.vae.register_to_config(scaling_factor=0.18215)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder with ten pocket scenes and metadata.jsonl; no two captions are equal."""
    return make_scenes(tmp_path_factory.mktemp("datas") / "scenes")


def make_scenes(folder: Path) -> Path:
    """Draws them."""
    from PIL import Image

    from dojo.pocket import scenes

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

        own = lora_flags(folder, tiny_sd3, scene_data)
        return train_lora_sd3.cli.parse(train_lora_sd3.Args, None, [*own, *flags])

    return make


def lora_flags(folder: Path, model: Path, data: Path) -> list[str]:
    """The command line of a small LoRA run; what follows it wins."""
    return [*run_flags(folder, model, data), "--rank", "2"]


def run_flags(folder: Path, model: Path, data: Path | None) -> list[str]:
    """The command line of a small supervised run; what follows it wins."""
    flags = {
        "pretrained_model_name_or_path": model,
        **({"dataset_name": data} if data else {}),
        "output_dir": folder / "run",
        "latent_cache_dir": folder / "cache",
        "resolution": 64,
        "max_sequence_length": 24,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def rl_flags(folder: Path, model: Path) -> list[str]:
    """The command line of a small reinforcement learning; what follows it wins.

    Two epochs of four pictures of each of two prompts, two steps each.
    """
    flags = {
        "prompt_set": "pocket",
        "max_prompts": 6,
        "num_eval_prompts": 2,
        "reward": "jpeg_incompressibility",
        "num_prompts_per_epoch": 2,
        "group_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "sample_steps": 4,
        "window_size": 2,
        "clip_range": 1e-3,
        "learning_rate": 1e-3,
        "rank": 2,
        "eval_sample_steps": 2,
        "seed": 0,
    }
    own = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*run_flags(folder, model, None), *own]
