"""--fit: which options are tried in which order, what a card gets, and that a run keeps it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

import train_full_sd3
import train_full_sd15
import train_lora_sd3
import train_lora_sd15
from dojo import cli
from dojo.cli import UserError
from dojo.finetune import AllWeights, fit, lora, offload
from dojo.finetune.adapters import Adapters
from dojo.finetune.whole import WholeArgs
from dojo.models import opening, published, sd3
from dojo.run import OptimArgs, deepspeed, phases
from dojo.run.averaging import EmaArgs
from dojo.run.cost import Cost
from tests.conftest import reset_accelerate, run_flags

GIB = 2**30
CPU = torch.device("cpu")


class Frozen(Adapters):
    """A base of 8 GiB, a quarter of a GiB of it in each of four blocks in four bits."""

    def stored_bytes(self, network: nn.Module) -> tuple[int, int]:
        args = self.args
        offload.spread(list("abcd"), args.blocks_on_cpu)  # refuses more than there are
        size = {"bf16": 8, "int8": 4, "fp8": 4, "nf4": 2}[args.base_precision]
        return round((size - args.blocks_on_cpu * size / 8) * GIB), 0


def stand_in(args: Any, *, processes: int = 1, zero: bool = False) -> Any:
    """A run, as far as what it holds and refuses hangs on it."""
    kind = DistributedType.DEEPSPEED if zero else DistributedType.NO
    joined = SimpleNamespace(mixed_precision="bf16", num_processes=processes, distributed_type=kind)
    joined.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    made: Any = SimpleNamespace(dtype=torch.bfloat16, args=args, accelerator=joined)
    made.replicas = SimpleNamespace(owns_storage=args.shard or zero)
    return made


@pytest.fixture
def make_tried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run that holds round numbers: activations of 4 GiB a row, 1 with checkpointing."""
    monkeypatch.setattr("dojo.finetune.lora.adapter.find_spec", lambda name: name)

    def make(
        *flags: str, script: Any = train_lora_sd15, size: int = 512, zero: bool = False
    ) -> fit.Tried:
        name = "sd3-medium" if script in (train_lora_sd3, train_full_sd3) else "sd15"
        words = ["--pretrained_model_name_or_path", name, "--dataset_name", "datas"]
        args = cli.parse(script.Args, None, [*words, "--output_dir", "out", *flags])
        with published.planning():
            model = opening.open_model(args.model)
        needs = model.needs(torch.bfloat16, (size, size), encoded=8, vae_stays=False)
        run = stand_in(args.run, processes=1 + args.run.shard, zero=zero)
        adapts = hasattr(args, "lora")
        trained: Any = Frozen(run, args.lora) if adapts else AllWeights(run, args.full)
        network = nn.Linear(1, 1, bias=False, device="meta")

        def cost(*, checkpointing: bool) -> tuple[nn.Module, Cost]:
            row = GIB if checkpointing else 4 * GIB
            return network, Cost(0, row * args.optim.train_batch_size)

        return fit.Tried(args, trained, cost, needs, 16)

    return make


def sizes(tried: fit.Tried, change: fit.Change) -> dict[str, float]:
    return {phase.name: phase.size / GIB for phase in tried.phases(change)}


def test_a_change_costs_what_it_says(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    assert sizes(tried, {})["training"] == pytest.approx(8 + 16)
    assert sizes(tried, {"gradient_checkpointing": True})["training"] == pytest.approx(8 + 4)
    smaller = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert sizes(tried, smaller)["training"] == pytest.approx(8 + 8)
    assert sizes(tried, {"base_precision": "nf4"})["training"] == pytest.approx(2 + 16)
    fewer = {"base_precision": "nf4", "blocks_on_cpu": 4}
    assert sizes(tried, fewer)["training"] == pytest.approx(1 + 16)
    assert "text cache" not in sizes(tried, {"text_encoder_device": "cpu"})
    half = sizes(tried, {"vae_dtype": "bf16"})["latent cache"]
    assert half == pytest.approx(sizes(tried, {})["latent cache"] / 2, rel=0.05)


def test_smaller_batches_come_before_recomputation_and_that_before_fewer_bits(
    make_tried: Any,
) -> None:
    tried = make_tried("--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    seen: list[fit.Change] = []
    for change in fit.changes(tried):
        network = {
            name: value
            for name, value in change.items()
            if not name.startswith(("text_", "vae_", "enable_"))
        }
        if network not in seen:
            seen.append(network)
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    ones = {"train_batch_size": 1, "gradient_accumulation_steps": 8}
    again = {"gradient_checkpointing": True}
    assert seen[:6] == [{}, halves, ones, again, {**again, **halves}, {**again, **ones}]
    assert seen[6] == {"base_precision": "int8"}
    assert seen[12] == {"base_precision": "nf4"}
    assert seen[18] == {"base_precision": "nf4", **again, **ones, "blocks_on_cpu": 1}
    assert all(
        change.get("train_batch_size", 4) * change.get("gradient_accumulation_steps", 2) == 8
        for change in seen
    )


def test_the_first_change_that_fits_is_chosen(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    assert fit.choose(tried, 80) == {}
    # 8 and 8 GiB, a tenth more, and one: 18.6.
    assert fit.choose(tried, 19) == {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    chosen = fit.choose(tried, 8)
    assert chosen["base_precision"] == "int8"
    assert chosen["gradient_checkpointing"] is True
    assert tried.wanted(chosen) <= 8
    assert fit.choose(tried, 8) == chosen  # the same again


def test_a_larger_card_never_gets_a_later_change(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    order = [dict(change) for change in fit.changes(tried)]
    places: list[int] = []
    for tenth in range(32, 300, 7):
        try:
            places.append(order.index(dict(fit.choose(tried, tenth / 10))))
        except UserError:
            places.append(len(order))
    assert places == sorted(places, reverse=True)
    assert places[0] == len(order)
    assert places[-1] == 0
    assert len(set(places)) > 5


def test_what_was_typed_stays(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    typed = frozenset({"train_batch_size", "base_precision"})
    for change in fit.changes(tried, typed):
        assert not typed.intersection(change)
    chosen = fit.choose(tried, 15, typed)
    assert chosen == {"gradient_checkpointing": True}
    assert tried.args.optim.train_batch_size == 4


def test_nothing_that_fits_is_refused_with_the_nearest_that_does(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    with pytest.raises(UserError) as refused:
        fit.choose(tried, 2.0)
    said = str(refused.value)
    assert said.startswith("--fit 2: nothing that was tried fits")
    assert "--base_precision nf4" in said
    assert "--blocks_on_cpu 4" in said
    assert "fits a card of 8 GB" in said
    with pytest.raises(UserError, match="typed, and so left as they are: --train_batch_size"):
        fit.choose(tried, 2.0, frozenset({"train_batch_size", "seed"}))


def test_each_choice_is_told_with_its_reason(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    lines = fit.told(15, fit.choose(tried, 15), tried)
    assert lines[0] == ("--fit 15 chooses: --train_batch_size 1 --gradient_accumulation_steps 4")
    assert lines[1] == "  the largest phase has 12.00 GiB (training), computed, not measured"
    assert lines[2].endswith("without it training has 24.00 GiB")
    assert fit.told(80, {}, tried)[0].startswith("--fit 80: the options fit as they are")


PACKING = {"base_precision", "blocks_on_cpu"}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        *([], ["--torch_compile"], ["--shard"], ["--torch_compile", "--shard"]),
        *(["--activations_on_cpu"], ["--base_precision", "fp8"], ["--fused_backward"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("script", [train_lora_sd3, train_full_sd3])
def test_nothing_is_chosen_that_the_run_would_refuse(
    make_tried: Any, script: Any, flags: list[str], zero: bool
) -> None:
    try:
        tried = make_tried("--train_batch_size", "2", *flags, script=script, zero=zero)
    except SystemExit:
        assert (script, flags[0]) == (train_full_sd3, "--base_precision"), "no option of the script"
        return
    refused = tried.refusal({})
    if refused is not None:  # what was typed already: said, and nothing is chosen
        with pytest.raises(UserError, match=re.escape(str(refused))):
            fit.choose(tried, 80)
        return
    every = [change for change in fit.changes(tried) if tried.refusal(change) is None]
    typed = [*flags, *fit.words(every[-1]).split()]  # what is chosen may be typed, all together
    assert make_tried(*typed, script=script, zero=zero).refusal({}) is None, typed
    packs = any(PACKING & change.keys() for change in every)
    together = zero or "--shard" in flags or "--torch_compile" in flags
    assert packs == (hasattr(tried.args, "lora") and not together)
    with pytest.raises(UserError) as said:
        fit.choose(tried, 1.1)
    assert packs == ("--base_precision" in str(said.value) or "--blocks_on_cpu" in str(said.value))


def test_without_the_package_of_four_bits_the_base_is_at_most_int8(
    make_tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dojo.finetune.lora.adapter.find_spec", lambda _: None)
    tried = make_tried("--train_batch_size", "4")
    every = [change for change in fit.changes(tried) if tried.refusal(change) is None]
    assert {change.get("base_precision") for change in every} == {None, "int8"}
    assert every[-1]["base_precision"] == "int8"
    assert every[-1]["blocks_on_cpu"] == 4
    assert tried.refusal({"base_precision": "nf4"}) is not None


def test_what_is_refused_or_held_is_found_once(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    asked: list[str] = []
    plain = Frozen.stored_bytes

    def count(self: Frozen, network: nn.Module) -> tuple[int, int]:
        asked.append(repr(self.args))
        return plain(self, network)

    tried.trained = type("Counting", (Frozen,), {"stored_bytes": count})(
        tried.trained.run, tried.args.lora
    )
    for card in (2.0, 3.0):
        with pytest.raises(UserError):
            fit.choose(tried, card)
    sizes, checkpointing = 3, 2
    times = {one: asked.count(one) for one in asked}
    assert max(times.values()) == sizes * checkpointing
    assert sum(times.values()) == len({"bf16", "int8", "nf4"}) * sizes * checkpointing + 100


def test_weights_that_are_gathered_do_not_grow_with_the_batch(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4", "--shard")
    rows = {4: {}, 1: {"train_batch_size": 1, "gradient_accumulation_steps": 4}}
    for count, change in rows.items():
        held = tried._held(change)
        # One weight in bfloat16, its gradient, and that in float32 to share out.
        assert held.activations == count * 4 * GIB + 2 + 2 + 4
        assert held.whole == 2
        assert held.leaving == 0
    assert make_tried()._held({}).whole == 0


def test_blocks_within_blocks_are_gathered_for_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Inner(nn.Linear):
        pass

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.inner = nn.Linear(4, 5, bias=False), Inner(10, 10, bias=False)

    network = nn.Sequential(Outer(), nn.Linear(7, 1, bias=False), Inner(3, 3, bias=False))
    network._no_split_modules = ["Outer", "Inner"]  # pyright: ignore
    run = stand_in(SimpleNamespace(shard=True))
    run.dtype = torch.bfloat16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    # The largest is the inner one, of 100; the outer has 20 of its own, and 7 lie in none.
    asking, weights = 2 * (20 + 100 + 7 + 9), 2 * (7 + 2 * 100)
    # Its gradients in bfloat16, and in float32 where they are shared out.
    share = fit.Share(2, stepping=weights + (2 + 4) * 100, asking=asking)
    assert fit._shared(run, network) == share
    for param in network.parameters():
        param.requires_grad_(param.numel() == 9)
    # Few that learn are all there until the last micro-batch is through.
    share = fit.Share(2, stepping=weights + 4 * (9 + 9), asking=asking)
    assert fit._shared(run, network) == share


def test_zero_3_counts_the_part_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights in bfloat16 and trained ones in float32, over the processes of all machines;
    a constant table is not shared out."""
    network = nn.Sequential(nn.Linear(30, 20), nn.Linear(10, 8, bias=False))
    network[0].to(torch.bfloat16).requires_grad_(False)
    network.register_buffer("table", torch.zeros(11))
    run = stand_in(SimpleNamespace(shard=False), processes=4, zero=True)
    run.accelerator.state.deepspeed_plugin.zero_stage = 3
    trained = AllWeights(run, WholeArgs())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(deepspeed, "LIVE_WEIGHTS", 70)
    frozen, count = 30 * 20 + 20, 10 * 8
    held = fit.held(trained, network, Cost(0, 1000), 16, OptimArgs(), EmaArgs())
    assert held.kept == (2 * frozen + 16 * count) // 4 + 4 * 11 + 4 * 500_000_000
    whole = 2 * frozen + 4 * count
    assert held.activations == 1000 + whole * 70 // (frozen + count)
    assert held.whole == whole
    assert held.leaving == 0
    run.accelerator.state.deepspeed_plugin.zero_stage = 2  # which is counted as if alone
    plain = fit.held(trained, network, Cost(0, 1000), 16, OptimArgs(), EmaArgs())
    assert (plain.kept, plain.whole) == (2 * frozen + 16 * count + 4 * 11, 0)
    # A reference is a copy of all of it, in the precision of what is trained.
    copied = fit.held(
        trained, network, Cost(0, 1000), 16, OptimArgs(), EmaArgs(), with_reference=True
    )
    assert copied.kept - plain.kept == 4 * (frozen + count) + 4 * 11


@pytest.mark.parametrize("stored", [{}, {"base_precision": "fp8"}, {"blocks_on_cpu": 2}], ids=str)
def test_what_leaves_for_a_while_are_the_weights_of_the_network(
    tiny_sd3: Path, stored: dict[str, Any]
) -> None:
    model = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    run = stand_in(SimpleNamespace(shard=False))
    run.dtype = torch.float32
    trained = Adapters(run, lora.LoraArgs(rank=4, **stored))
    meta = model.meta_network().requires_grad_(False)
    real = model.load_network(torch.float32, CPU, prepare=trained.storage.prepare)
    for network in (meta, real):
        trained.adapt(network)
    counted = fit.held(trained, meta, Cost(0, 0), 16, OptimArgs(), EmaArgs())
    there = sum(one.nbytes for one in (*real.parameters(), *real.buffers()))
    assert counted.leaving == there
    assert counted.kept >= there
    # The update of an average counts where activations take less.
    average = EmaArgs(use_ema=True, offload_ema=True)
    counted = fit.held(trained, meta, Cost(0, 0), 16, OptimArgs(), average)
    assert counted.activations == 12 * max(p.numel() for p in meta.parameters() if p.requires_grad)


def test_weights_that_all_train_are_neither_quantised_nor_moved(make_tried: Any) -> None:
    tried = make_tried(script=train_full_sd15)
    names = {name for change in fit.changes(tried) for name in change}
    assert not names & {"base_precision", "blocks_on_cpu"}
    assert "gradient_checkpointing" in names


def test_pictures_larger_than_the_autoencoders_own_may_come_in_tiles(make_tried: Any) -> None:
    for size, tiles in ((512, False), (1024, True)):
        names = {name for change in fit.changes(make_tried(size=size)) for name in change}
        assert ("enable_vae_tiling" in names) == tiles


def test_encoders_that_every_step_asks_go_to_the_cpu_last(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "2")

    def order() -> tuple[list[bool], list[fit.Change]]:
        every = list(fit.changes(tried))
        return ["text_encoder_device" in change for change in every], every

    away, every = order()
    assert away[2]
    tried.needs = replace(tried.needs, live_text=("text_encoder",))
    last, again = order()
    assert last == sorted(last)
    assert sum(last) == sum(away)
    assert sorted(map(repr, again)) == sorted(map(repr, every))


def test_a_smaller_batch_is_encoded_in_smaller_parts(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4", "--no_cache_latents")
    tried.needs = replace(tried.needs, encoded=8, encoded_in_training=8)
    for size, encoded in ((4, 8), (2, 4), (1, 2)):
        change = {"train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        needs = tried._needs(change)
        assert (needs.encoded, needs.encoded_in_training) == (encoded, encoded)


def test_a_batch_that_other_things_hang_on_is_not_split(make_tried: Any) -> None:
    tried = make_tried("--train_batch_size", "4")
    tried.needs = replace(tried.needs, batch_is_free=False)
    names = {name for change in fit.changes(tried) for name in change}
    assert "train_batch_size" not in names


def test_the_options_of_a_command_line_are_known_by_their_names() -> None:
    words = ["--vae-dtype=no", "--train_batch_size", "4", "text", "--dry_run"]
    assert cli.typed(words) == {"vae_dtype", "train_batch_size", "dry_run"}


# -- whole runs -------------------------------------------------------------------------------


@pytest.fixture
def start(tiny_sd3: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the script, on cards whose every byte is the run's."""
    monkeypatch.setattr(phases, "CONTEXT", 0.0)
    monkeypatch.setattr(phases, "MARGIN", 1.0)

    def begin(folder: Path, *flags: str, card: float | None = None) -> None:
        reset_accelerate()
        fits = [] if card is None else ["--fit", f"{card:.9f}"]
        own = [*run_flags(folder, tiny_sd3, scene_data), "--mixed_precision", "bf16", *flags, *fits]
        monkeypatch.setattr("sys.argv", ["train_lora_sd3.py", *flags, *fits])
        args = cli.parse(train_lora_sd3.Args, None, own)
        fit.planned(train_lora_sd3.main)(args)

    return begin


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gets the GiB of every table of phases that is computed."""
    found: list[float] = []
    original = phases.compute

    def compute(needs: phases.Needs, held: phases.Held) -> list[phases.Phase]:
        made = original(needs, held)
        found.append(max(phase.size for phase in made) / GIB)
        return made

    monkeypatch.setattr(phases, "compute", compute)
    return found


def options(folder: Path) -> dict[str, Any]:
    groups = json.loads((folder / "run" / "args.json").read_text())["args"]
    return {name: value for values in groups.values() for name, value in values.items()}


def test_a_run_trains_with_what_was_chosen_and_goes_on_with_it(
    start: Any,
    peaks: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start(tmp_path, "--dry_run")
    assert not (tmp_path / "run").exists()
    card = peaks[-1] * 0.999  # a little less than the run has as it is
    start(tmp_path, "--dry_run", card=card)
    assert not (tmp_path / "run").exists()
    told = capsys.readouterr().out
    assert f"--fit {card:g} chooses: --" in told
    assert peaks[-1] <= card  # the plan that is printed has the choice in it

    start(tmp_path, card=card)
    assert told.split("chooses: ")[1].split("\n")[0] in capsys.readouterr().out
    chosen = options(tmp_path)
    assert chosen["fit"] == pytest.approx(card)
    assert chosen["train_batch_size"] * chosen["gradient_accumulation_steps"] == 2
    default = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    default |= {"text_encoder_precision": "auto", "text_encoder_device": "auto"}
    default |= {"gradient_checkpointing": False, "enable_vae_slicing": False, "vae_dtype": "no"}
    assert any(chosen[name] != value for name, value in default.items())

    def never(*_: Any) -> None:
        raise AssertionError("what was chosen stands in args.json")

    monkeypatch.setattr(fit, "choose", never)
    more = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    start(tmp_path, *more, card=card)
    again = options(tmp_path)
    assert {name: again[name] for name in fit.CHOSEN if name in again} == {
        name: chosen[name] for name in fit.CHOSEN if name in chosen
    }
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_without_a_card_nothing_is_chosen(start: Any, tmp_path: Path) -> None:
    start(tmp_path, "--max_train_steps", "1")
    assert options(tmp_path)["fit"] is None
    assert options(tmp_path)["train_batch_size"] == 2


def test_a_card_has_more_than_no_memory(
    lora_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lora_args(tmp_path, "--fit", "0")
    assert "--fit 0 must be above 0" in capsys.readouterr().err


def test_every_script_chooses_options_for_a_card() -> None:
    root = Path(train_lora_sd3.__file__).parent
    for path in root.glob("train_*.py"):
        assert "cli.run(finetune.planned(main), Args, __doc__" in path.read_text(), path.name
