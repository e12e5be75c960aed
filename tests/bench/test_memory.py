"""dojo.bench memory: every method's command, the phases that it computes, those that come."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dojo import cli
from dojo.bench import memory, models, rl, watched
from dojo.bench.memory import MemoryArgs
from dojo.finetune import fit
from dojo.run import Learner, phases
from tests.conftest import reset_accelerate
from tests.scripts import runs

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread

CACHES = ("text cache", "latent cache")
PHASES: dict[memory.Method, tuple[str, ...]] = {
    "lora": (*CACHES, "training", "validation"),
    "full": (*CACHES, "training", "validation"),
    "dreambooth_lora": (*CACHES, "class pictures", "training", "validation"),
    "dpo": (*CACHES, "training", "validation"),
    "refl": ("text cache", "training", "scoring"),
    "ddpo": ("text cache", "training", "scoring"),
    "grpo": ("text cache", "training", "scoring"),
    "nft": ("text cache", "training", "scoring"),
}
CASES = [
    (model, method)
    for model in models.POCKETS
    for method in PHASES
    if models.family_name(model) in rl.SCRIPTS.get(method, ("sd3", "sd15", "sdxl"))  # pyright: ignore[reportArgumentType, reportCallIssue]
]

# Those that begin phases in ways of their own.
QUICK = [
    *(("pocket", "dreambooth_lora"), ("pocket", "nft")),
    *(("pocket-sd15", "dpo"), ("pocket-sd15", "refl"), ("pocket-sd15", "ddpo")),
]


def case(model: Any, method: memory.Method, folder: Path, **more: Any) -> MemoryArgs:
    """A small one."""
    batch: dict[str, Any] = {"batch_size": 2, "mixed_precision": "no", "work_dir": folder, **more}
    return MemoryArgs(model=model, method=method, **batch)


def parsed(args: MemoryArgs, folder: Path, *extra: str) -> tuple[Any, Any]:
    """The script that a case starts, and its options as it reads them."""
    words = memory.command(args, models.pocket(args.model), folder / "runs" / "run", extra)
    python, script, *flags = words
    assert python == sys.executable
    module: Any = importlib.import_module(Path(script).stem)
    return module, cli.parse(module.Args, None, flags)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(*one, marks=[] if one[0] == "pocket" or one in QUICK else [pytest.mark.slow])
        for one in CASES
    ],
)
def test_the_phases_of_every_method_are_computed(
    model: str, method: memory.Method, tmp_path: Path
) -> None:
    args = case(model, method, tmp_path, rank=None if method == "full" else 3)
    module, options = parsed(args, tmp_path)
    assert module.__name__ == f"train_{method}_{models.family_name(model)}"
    assert options.optim.train_batch_size == 2
    if method != "full":
        assert options.lora.rank == 3
    reset_accelerate()
    found = fit.plan(module.main, options).phases({})
    assert tuple(phase.name for phase in found) == _in_order(PHASES[method])


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in phases.PHASES if name in names)


@pytest.mark.parametrize(
    ("model", "method"),
    [pytest.param(*one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in CASES],
)
def test_the_phases_of_a_run_are_those_that_were_computed(
    model: str, method: memory.Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script itself, until its first step is kept; what is wrapped is let go afterwards."""
    small = ["--sample_steps", "3", "--window_size", "1"] if method in rl.OF_A_WAY else []
    module, options = parsed(case(model, method, tmp_path), tmp_path, *small)
    reset_accelerate()
    needs = fit.plan(module.main, options).needs
    monkeypatch.setattr(watched, "setattr", monkeypatch.setattr, raising=False)
    loaded: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *args, **more: (loaded.append(name), function(*args, **more))[1]

    watched.wrap("dojo.inputs.texts:_fill", partial(noting, "texts"))
    watched.wrap("dojo.rewards:RewardArgs.load", partial(noting, "rewards"))
    kind: Any = type(needs.config)
    monkeypatch.setattr(kind, "load_vae", noting("autoencoder", kind.load_vae))
    asked: set[str] = set()  # phases in which the network was
    predict = kind.predict

    def seen(model: Any, network: Any, noisy: torch.Tensor, *given: Any) -> torch.Tensor:
        if not noisy.is_meta:
            asked.add(made.current)
        return predict(model, network, noisy, *given)

    monkeypatch.setattr(kind, "predict", seen)
    made = watched.watch(tmp_path / "peaks.json", torch.device("cpu"))

    def over(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "keep", over)
    reset_accelerate()
    with pytest.raises(KeyboardInterrupt):
        module.main(options)
    found = json.loads(made.file.read_text())
    assert found.keys() - {watched.OUTSIDE} == {*PHASES[method]}
    assert all(found.values())
    assert "training" in asked <= {"training", "validation", "scoring"}
    if method in rl.SCRIPTS:  # the others move the autoencoder to the CPU before
        assert loaded[: loaded.index("texts")] == [*needs.before_texts][::-1]


@pytest.mark.parametrize("scored", [False, True])
def test_an_evaluation_is_the_phase_that_its_rewards_say(scored: bool, tmp_path: Path) -> None:
    class Evaluator:
        rewards = ["a reward"] * scored

    made = watched.Watch(tmp_path / "peaks.json", lambda: 1, lambda: None, current="training")
    seen: list[str] = []
    made.evaluating(lambda _: seen.append(made.current))(Evaluator())
    assert (seen, made.current) == (["scoring" if scored else "validation"], "training")


def test_a_step_of_a_method_with_epochs_is_an_epoch() -> None:
    rows = [{"step": 1, "epoch": 0.5, "loss": 1.0}, {"step": 2, "epoch": 1, "loss": 1.0}]
    counts = {method: memory.counted(method) for method in PHASES}
    assert {method: done(rows) for method, (done, _) in counts.items()} == {
        **dict.fromkeys(("lora", "full", "dreambooth_lora", "dpo", "refl"), 2),
        **dict.fromkeys(("ddpo", "grpo", "nft"), 1),
    }
    assert counts["nft"][1] == "epochs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model pocket-sd15 --method grpo", "there is no such script"),
        ("--model pocket --method dreambooth_lora --finetune full", "--finetune does nothing"),
        ("--model pocket --method grpo --finetune full --rank 4", "--rank does nothing"),
        ("--model pocket --method full --rank 4", "--rank does nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(MemoryArgs, None, words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
