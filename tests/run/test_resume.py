"""Claims about what a run may be continued with, and what is said where it may not."""

import importlib
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

import train_grpo_sd3
import train_lora_sd3
from dojo import cli, launch
from dojo.cli import UserError
from dojo.finetune import InversionArgs, PivotalArgs
from dojo.run import folders, optim, shardable
from dojo.run import run as training
from dojo.run.replicas import Replicas
from tests.conftest import ROOT, MakeArgs, reset_accelerate, rl_flags
from tests.run.test_training import metrics, toy

# The shape of the learning rate, when the length changes


def span_of(*words: str, made: optim.Span, step: int, num_steps: int) -> optim.Span:
    args = cli.parse(optim.OptimArgs, None, ["--learning_rate", "1e-3", *words])
    return optim.new_span(args, made, step, num_steps)


def test_the_length_of_a_rate_that_hangs_on_it_is_the_users_choice() -> None:
    made = optim.Span(0, 100)

    def span(*words: str, step: int = 100, num_steps: int = 200) -> optim.Span:
        return span_of(
            "--lr_scheduler", "cosine", *words, made=made, step=step, num_steps=num_steps
        )

    with pytest.raises(UserError) as refused:
        span()
    # From 0, where the cosine ended, to half of 1e-3: nobody wanted that unsaid.
    said = str(refused.value)
    assert "made for 100 optimizer steps and stands at 100 with a learning rate of 0;" in said
    assert "stretch (as if it had been so long from the start: goes on at 0.0005)" in said
    assert "restart (anew over the steps that are left: 0.001)" in said
    assert "keep (as it was: 0)" in said
    choice = "--lr_when_length_changes"
    assert span(choice, "stretch") == optim.Span(0, 200)
    assert span(choice, "restart") == optim.Span(100, 100)
    assert span(choice, "keep") == made
    assert span(num_steps=100, step=50) == made
    # The same command again, on the way or after another kill: nothing is decided anew.
    begun = optim.Span(100, 100)
    again = span_of("--lr_scheduler", "linear", made=begun, step=150, num_steps=200)
    assert again == begun
    for words in (["--lr_scheduler", "constant"], ["--optimizer", "schedulefree"]):
        assert span_of(*words, made=made, step=100, num_steps=200) == optim.Span(0, 200)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("stretch", [0.5, 0.375, 0.25, 0.125, 0]),
        ("restart", [1, 0.75, 0.5, 0.25, 0]),
        ("keep", [0, 0, 0, 0, 0]),
    ],
)
def test_the_rate_goes_on_as_chosen_and_after_a_resume(choice: str, expected: list[float]) -> None:
    words = ["--learning_rate", "1", "--lr_scheduler", "linear", "--lr_when_length_changes", choice]
    args = cli.parse(optim.OptimArgs, None, words)

    class Length:
        num_steps, samples_per_step, device = 4, 1, torch.device("cpu")

    def made() -> tuple[Any, Any]:
        return optim.make([torch.nn.Parameter(torch.zeros(1))], args, Length())

    optimizer, schedule = made()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    span = optim.new_span(args, optim.Span(0, 4), 4, 8)
    rates: list[float] = []
    for step in range(4, 9):
        saved = optimizer.state_dict(), schedule.state_dict()
        Length.num_steps = 8
        optimizer, schedule = made()  # a kill after every step
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        optim.respan(optimizer, schedule, args, span)
        assert schedule.last_epoch == step
        rates.append(optim.learning_rate(optimizer))
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_the_rate_is_set_after_whatever_brings_the_old_one_back(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosine = ["--lr_scheduler", "cosine", "--learning_rate", "1e-3", "--max_train_steps", "2"]
    train_lora_sd3.main(lora_args(tmp_path, *cosine))
    prepare = Replicas.prepare

    def late(self: Replicas, modules: Any, optimizer: Any, *more: Any) -> Any:
        """As DeepSpeed, which reads its part of a checkpoint when there is an engine."""
        assert self.accelerator is not None
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return prepare(self, modules, optimizer, *more)

    monkeypatch.setattr(Replicas, "prepare", late)
    reset_accelerate()
    longer = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    longer += ["--lr_when_length_changes", "restart"]
    train_lora_sd3.main(lora_args(tmp_path, *cosine, *longer))
    weights = [
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors")
        for step in (2, 3)
    ]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_longer_cosine_run_asks_before_it_changes_anything(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cosine = ["--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest"]
    train_lora_sd3.main(lora_args(tmp_path, *cosine, "--max_train_steps", "2"))
    before = (tmp_path / "run" / "args.json").read_bytes()
    longer = [*cosine, "--max_train_steps", "4"]
    reset_accelerate()
    with pytest.raises(UserError, match="--lr_when_length_changes stretch"):
        train_lora_sd3.main(lora_args(tmp_path, *longer))
    assert (tmp_path / "run" / "args.json").read_bytes() == before
    reset_accelerate()
    train_lora_sd3.main(lora_args(tmp_path, *longer, "--lr_when_length_changes", "restart"))
    assert "cosine runs from step 2 over 2" in capsys.readouterr().out
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.5e-4, 0, 0.5e-4, 0])  # of the next step each
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "state.json").read_text())
    assert (state["lr_start"], state["lr_steps"]) == (2, 2)


# Batches


def saved_by(args: Any, folder: Path, **plan: Any) -> training.Run:
    """A run at its first step whose checkpoint lies in `folder / run`."""
    reset_accelerate()
    trained = toy(args)
    trained.run.plan(args.optim, 100, "fingerprint", **plan)
    trained.step(1.0)
    for _ in range(args.optim.gradient_accumulation_steps - 1):
        trained.step(1.0)
    trained.learner.keep(now=True)
    assert (folder / "run" / "checkpoint-1").is_dir()
    return trained.run


def resumed(args: Any, processes: int = 1, data: str = "fingerprint", **plan: Any) -> None:
    """Begins a run that goes on from it, as one of so many processes."""
    reset_accelerate()
    run = training.start(args.run, args.optim)
    run.accelerator.state._shared_state["num_processes"] = processes  # pyright: ignore
    try:
        run.plan(args.optim, 100, data, **plan)
        run.check_folder(args)
    finally:
        run.accelerator.state._shared_state["num_processes"] = 1  # pyright: ignore


def test_another_runs_checkpoint_does_not_replace_the_run_that_lies_in_the_folder(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    saved_by(lora_args(tmp_path / "a", "--rank", "4", "--max_train_steps", "1"), tmp_path / "a")
    other = ["--rank", "2", "--max_train_steps", "1"]
    saved_by(lora_args(tmp_path / "b", *other), tmp_path / "b")
    from_there = ["--resume_from_checkpoint", str(tmp_path / "b" / "run" / "checkpoint-1")]
    for end in (False, True):
        if end:
            folders.write_finished(tmp_path / "a" / "run", 1)
        with pytest.raises(UserError, match=r"a/run holds a run already.*b/run/checkpoint-1 is"):
            resumed(lora_args(tmp_path / "a", *other, *from_there))
    resumed(lora_args(tmp_path / "c", *other, *from_there))
    resumed(lora_args(tmp_path / "b", *other, *from_there))  # its own


def test_another_number_of_processes_is_told_which_batches_go_on(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    def args(batch: int, steps: int) -> Any:
        words = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(steps)]
        return lora_args(tmp_path, *words, "--resume_from_checkpoint", "latest")

    saved_by(args(4, 2), tmp_path)
    fitting = "--train_batch_size 2 --gradient_accumulation_steps 2 on 2 processes goes on"
    with pytest.raises(UserError, match=rf"8, now 16; {fitting}"):
        resumed(args(4, 2), processes=2)
    resumed(args(2, 2), processes=2)
    resumed(args(4, 1), processes=2)
    with pytest.raises(UserError, match=r"with 3 processes it cannot .*, with 1 or 2 or 4 it can"):
        resumed(args(4, 2), processes=3)
    # Pictures of several sizes are dealt into batches over all processes: their order is other.
    with pytest.raises(UserError, match=rf"batches of 4 .*, now 8; with the same data, {fitting}"):
        resumed(args(4, 1), processes=2, data="other")


def test_batches_on_which_the_numbers_hang_must_stay(lora_args: MakeArgs, tmp_path: Path) -> None:
    def args(batch: int, steps: int) -> Any:
        words = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(steps)]
        return lora_args(tmp_path, *words, "--resume_from_checkpoint", "latest")

    def sizes(train: int, sample: int) -> dict[str, int]:
        return {"train_batch_size": train, "sample_batch_size": sample}

    saved_by(args(4, 2), tmp_path, together=sizes(4, 8))
    resumed(args(4, 2), together=sizes(4, 8))
    fitting = "--train_batch_size 2 --sample_batch_size 4 --gradient_accumulation_steps 2 on 2"
    resumed(args(2, 2), processes=2, together=sizes(2, 4))
    with pytest.raises(UserError, match=rf"--sample_batch_size\), now 4.*{fitting}"):
        resumed(args(2, 2), processes=2, together=sizes(2, 2))
    with pytest.raises(UserError, match=r"batches of 4 .*--train_batch_size\), now 2"):
        resumed(args(2, 4), together=sizes(2, 8))


def test_a_policy_is_not_sampled_in_other_batches_after_a_resume(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    flags = [*rl_flags(tmp_path, tiny_sd3), "--max_train_steps", "2"]
    train_grpo_sd3.main(cli.parse(train_grpo_sd3.Args, None, flags))
    reset_accelerate()
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", "4"]
    more += ["--sample_batch_size", "8"]
    with pytest.raises(UserError, match=r"batches of 4 .*--sample_batch_size\), now 8"):
        train_grpo_sd3.main(cli.parse(train_grpo_sd3.Args, None, [*flags, *more]))


# What may change is named by its group


# How far, how to show, where to keep things. Data, seed, the schedule's length and the sizes of
# batches have checks of their own. Groups of which every option is incidental stand by their name.
INCIDENTAL = [
    "run.resume_from_checkpoint",
    "run.overwrite_output_dir",
    "run.dry_run",
    "run.output_dir",
    "run.checkpointing_steps",
    "run.checkpointing_minutes",
    "run.checkpoints_total_limit",
    "run.keep_best",
    "run.early_stopping_patience",
    "run.report_to",
    "run.webhook",
    "run.tracker_project_name",
    "run.run_name",
    "run.logging_steps",
    "optim.max_train_steps",
    "optim.num_train_epochs",
    "optim.steps_per_epoch",
    "optim.train_batch_size",
    "optim.gradient_accumulation_steps",
    "optim.lr_when_length_changes",
    "optim.offload_lower_halves",
    "run.fit",
    "data.data_cache_dir",
    "data.data_cache_limit",
    "lora.blocks_on_cpu",
    "model.activations_on_cpu",
    "model.attention_backend",
    "model.gradient_checkpointing",
    "model.torch_compile",
    "data.dataset_name",
    "data.train_data_dir",
    "data.instance_data_dir",
    "data.data_config",
    "data.cache_dir",
    "data.dataloader_num_workers",
    "data.on_bad_sample",
    "data.eval_fraction",
    "data.eval_data_dir",
    "data.max_train_samples",
    "prior.class_data_dir",
    "prior.sample_batch_size",
    "pretrain.pretrain_data_dir",
    "pretrain.pretrain_dataset_name",
    "sample.sample_batch_size",
    "sample.max_invalid",
    "cache.latent_cache_dir",
    "cache.no_cache_latents",
    "cache.no_cache_text_embeddings",
    "prompts.prompt_file",
    "prompts.prompt_dataset_name",
    "prompts.eval_prompt_file",
    "reward.reward_device",
    "reward.reward_batch_size",
    "reward.list_rewards",
    "scorers.reward_device",
    "scorers.reward_batch_size",
    "scorers.list_rewards",
    "ema.offload_ema",
    "full.save_dtype",
    "full.max_shard_size",
    "full.single_file",
    "full.single_file_without_t5",
    "lora.lora_format",
    "validation",
    "evaluation",
    "publish",
]


def test_a_run_may_be_continued_with_other_values_of_these_options_and_no_others() -> None:
    there: set[str] = set()
    for path in ROOT.glob("train_*.py"):
        groups = get_type_hints(importlib.import_module(path.stem).Args)
        names = {
            f"{group}.{field.name}" for group, kind in groups.items() for field in fields(kind)
        }
        free = {name for name in names if {name, name.split(".")[0]} & set(INCIDENTAL)}
        assert cli.incidental_options(groups) == free
        there |= names | {*groups}
    assert set(INCIDENTAL) <= there
    assert len(INCIDENTAL) == len(set(INCIDENTAL))


def changed(folder: Path, args: Any, then: dict[str, Any], precision: str = "no") -> list[str]:
    """What differs from a record in which some top-level entries were others."""
    run = training.start(args.run, args.optim)
    record = {**folders.record(args, run.seed, run.accelerator), **then}
    (folder / "args.json").write_text(json.dumps(record))
    return folders._changed_options(folder, args, precision)


def test_where_the_precision_came_from_is_said(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path)
    config = {"mixed_precision": "bf16", "mixed_precision_from": "by accelerate's configuration"}
    [told] = changed(tmp_path, args, config)
    assert told == (
        "--mixed_precision was bf16 (by accelerate's configuration), now no (by the flag)"
    )
    unset = lora_args(tmp_path)
    object.__setattr__(unset.run, "mixed_precision", None)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    [told] = changed(tmp_path, unset, config)
    assert told.endswith(
        "now no (by default: python and torchrun read no configuration of accelerate's)"
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    [told] = changed(tmp_path, unset, {"mixed_precision": "bf16"})
    assert told.endswith("now no (by accelerate's configuration)")
    assert changed(tmp_path, unset, {}) == []


def test_a_run_from_before_an_option_goes_on_with_its_default(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    before = folders.options(lora_args(tmp_path))
    del before["run"]["shard"], before["lora"]["rank"]
    then = {"args": before}
    [told] = changed(tmp_path, lora_args(tmp_path, "--rank", "3"), then)
    assert told == "--rank was 16, now 3"
    [told] = changed(tmp_path, lora_args(tmp_path, "--rank", "16", "--shard"), then)
    assert told == "--shard was False, now True"


# Processes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        (launch.COMMAND, "python -m dojo.launch --use_fsdp train_full_sd3.py"),
        (
            launch.COMMAND,
            "python -m dojo.launch --config_file {folder}/fsdp.yaml train_full_sd3.py",
        ),
    ],
)
def test_accelerates_own_sharding_is_refused_however_it_was_asked_for(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    args = lora_args(tmp_path)
    (tmp_path / "fsdp.yaml").write_text("debug: false\ndistributed_type: FSDP\n")
    monkeypatch.setenv(name, value.format(folder=tmp_path))
    with pytest.raises(UserError, match=r"FSDP is not supported.* add --shard"):
        training.start(args.run, args.optim)
    (tmp_path / "fsdp.yaml").write_text("debug: false\ndistributed_type: MULTI_GPU\n")
    monkeypatch.setenv(name, value.format(folder=tmp_path).replace("--use_fsdp", "").strip("true"))
    training.start(args.run, args.optim)


@pytest.mark.parametrize(
    "case",
    [
        ("DYNAMO_BACKEND", "EAGER", "EAGER: accelerate would compile .* --torch_compile"),
        ("MIXED_PRECISION", "fp8", "fp8 is not supported"),
        ("USE_MEGATRON_LM", "true", "MEGATRON_LM is not supported: .* --shard"),
        ("USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG is not supported"),
    ],
)
def test_what_accelerate_would_do_to_the_network_by_itself_is_refused(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str]
) -> None:
    name, value, said = case
    args = lora_args(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=said):
        training.start(args.run, args.optim)
    monkeypatch.setenv(f"ACCELERATE_{name}", "no")
    training.start(args.run, args.optim)


def test_deepspeed_is_refused_on_a_cpu_too(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed needs GPUs"):
        training.start(args.run, args.optim)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer adafactor", "--optimizer adafactor cannot be sharded: it needs the sums"),
        ("--use_8bit_adam", "--optimizer adamw8bit cannot be sharded: its state is packed"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(
    lora_args: MakeArgs, tmp_path: Path, words: str, said: str
) -> None:
    args = lora_args(tmp_path, "--shard", "--dry_run", *words.split())
    with pytest.raises(UserError, match=said):
        training.start(args.run, args.optim).check_folder(args)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("model", "torch_compile", True), ("lora", "base_precision", "nf4"), ("x", "no", "x")],
)
def test_options_that_were_not_tried_sharded_are_refused(
    lora_args: MakeArgs, tmp_path: Path, group: str, name: str, value: object
) -> None:
    args = lora_args(tmp_path, "--shard", "--dry_run")
    run = training.start(args.run, args.optim)
    run.check_folder(args)
    if group == "x":
        with pytest.raises(UserError, match="--mixed_precision bf16 in place of fp16"):
            shardable.check(args, "fp16")
        return
    object.__setattr__(getattr(args, group), name, value)
    with pytest.raises(UserError, match=f"--{name} does not work with --shard: leave one of them"):
        run.check_folder(args)


def test_an_option_that_a_script_needs_is_not_to_be_left_out(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args: Any = lora_args(tmp_path, "--shard")
    words: dict[str, Any] = {"new_tokens": ("<dog>",)}
    made = ((InversionArgs(**words), "--shard"), (PivotalArgs(**words), "one of them"))
    for tokens, left_out in made:
        groups = SimpleNamespace(run=args.run, optim=args.optim, tokens=tokens)
        with pytest.raises(UserError, match=f"--new_tokens does not .* leave {left_out} out"):
            shardable.check(groups, "no")


def test_fewer_processes_than_were_asked_for_are_said(
    lora_args: MakeArgs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = lora_args(tmp_path)
    training.start(args.run, args.optim)
    assert "were asked for" not in capsys.readouterr().out
    monkeypatch.setattr(training.launch, "asked_processes", lambda: 2)
    training.start(args.run, args.optim)
    said = capsys.readouterr().out
    assert "2 processes were asked for and this run has 1" in said
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2" in said


# A length that nobody gave


def test_an_unset_length_is_rounded_to_whole_epochs_and_said(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = lora_args(tmp_path)
    object.__setattr__(args.optim, "max_train_steps", None)
    run = training.start(args.run, args.optim)
    run.plan(args.optim, 2 * 16, "fingerprint", whole_epochs=True)  # 16 steps of two
    assert run.num_steps == 1008
    said = capsys.readouterr().out
    assert "no --max_train_steps: 1008 optimizer steps, which are 63 whole epochs of 16" in said
    run.plan(args.optim, 2 * 16, "fingerprint")
    assert run.num_steps == 1000


@pytest.mark.parametrize("name", ["train_grpo_sd3", "train_ddpo_sd3"])
def test_the_default_command_of_reinforcement_learning_is_accepted(
    name: str, tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(name)
    words = ["--pretrained_model_name_or_path", str(tiny_sd3), "--output_dir", str(tmp_path)]
    words += ["--prompt_set", "pocket", "--resolution", "64", "--max_sequence_length", "24"]
    words += ["--reward", "jpeg_incompressibility", "--mixed_precision", "no", "--dry_run"]
    script.main(cli.parse(script.Args, None, words))
    assert "whole epochs of 16" in capsys.readouterr().out
