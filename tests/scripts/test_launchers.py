"""The launchers pass flags that their scripts know; the accelerate configurations load."""

import importlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dojo import cli, download
from dojo.inputs import prompts
from dojo.rewards import spec, weights
from dojo.rewards.loading import scorer_class

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
LAUNCHERS = [*sorted((ROOT / "scripts").glob("train_*.sh")), ROOT / "scripts" / "demo.sh"]
_REINFORCED = ("ddpo_sd3", "grpo_sd3", "nft_sd3")
REINFORCED = [path for path in LAUNCHERS if path.stem.removeprefix("train_") in _REINFORCED]
PREFERRED, DIRECT = (ROOT / "scripts" / f"train_{name}_sd15.sh" for name in ("dpo", "refl"))
PREFERRED_SD3 = ROOT / "scripts" / "train_dpo_sd3.sh"
DIRECT_SD3 = ROOT / "scripts" / "train_refl_sd3.sh"
PREFERRED_XL, DIRECT_XL = (ROOT / "scripts" / f"train_{name}_sdxl.sh" for name in ("dpo", "refl"))
# Of pictures, over all processes.
IN_BATCHES = [PREFERRED, DIRECT, PREFERRED_XL, DIRECT_XL, PREFERRED_SD3, DIRECT_SD3]
DENOISING = [ROOT / "scripts" / f"train_ddpo_{family}.sh" for family in ("sd15", "sdxl")]
REWARDED = [*REINFORCED, DIRECT, DIRECT_XL, DIRECT_SD3, *DENOISING]
SUPERVISED = [path for path in LAUNCHERS[:-1] if path not in (*REWARDED, *IN_BATCHES)]
each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
each_reinforced = pytest.mark.parametrize("launcher", REINFORCED, ids=lambda path: path.name)
each_rewarded = pytest.mark.parametrize("launcher", REWARDED, ids=lambda path: path.name)


def record(launcher: Path, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """What a launcher would have started, as a list of words, program first."""
    result, words = launch(launcher, tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return words


def launch(
    launcher: Path, tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a launcher with stand-ins for accelerate and python that write down their arguments."""
    log = tmp_path / "words"
    for name in ("accelerate", "python", "python3"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >"{log}"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    result = subprocess.run(
        ["bash", str(launcher), *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            # Hub ids: nothing has to be downloaded for this test.
            "MODEL_NAME": "someone/model",
            "DATASET_NAME": "someone/data",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            # An active environment: the launcher must not put .venv before the stand-ins.
            "VIRTUAL_ENV": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result, log.read_text().split("\0")[:-1] if log.exists() else []


def split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """The words before the script, the script, and its flags."""
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[:place], words[place], words[place + 1 :]


def parse(script: str, flags: list[str]) -> object:
    """The flags as the script itself reads them."""
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not written yet")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(Path(script).stem)
    return cli.parse(module.Args, module.__doc__, flags)


@each_launcher
def test_the_script_understands_the_launchers_flags(launcher: Path, tmp_path: Path) -> None:
    _, script, flags = split(record(launcher, tmp_path))
    assert script == f"{launcher.stem}.py"
    parse(script, flags)


@each_launcher
def test_further_flags_are_passed_on_and_understood(launcher: Path, tmp_path: Path) -> None:
    further = ["--seed", "7", "--output_dir", "outputs/with space"]
    _, script, flags = split(record(launcher, tmp_path, *further))
    assert flags[-len(further) :] == further
    parse(script, flags)


@pytest.mark.parametrize(
    "launcher", [path for path in (*REINFORCED, *DENOISING) if "nft" not in path.name]
)
@pytest.mark.parametrize("words", ["--trust_region divergence", "--trust_region=divergence"])
def test_the_launchers_clip_steps_back_for_the_bound_on_the_divergence(
    launcher: Path, tmp_path: Path, words: str
) -> None:
    _, _, usual = split(record(launcher, tmp_path))
    assert "--clip_range" in usual
    _, script, flags = split(record(launcher, tmp_path, *words.split()))
    assert "--clip_range" not in flags
    parse(script, flags)


@each_launcher
def test_the_variables_at_the_top_can_be_set_from_outside(launcher: Path, tmp_path: Path) -> None:
    words = record(launcher, tmp_path, MODEL_NAME="other/model", OUTPUT_DIR="outputs/other")
    assert words[words.index("--pretrained_model_name_or_path") + 1] == "other/model"
    assert words[words.index("--output_dir") + 1] == "outputs/other"


@pytest.mark.parametrize("launcher", SUPERVISED, ids=lambda path: path.name)
def test_the_users_resolutions_replace_the_launchers(launcher: Path, tmp_path: Path) -> None:
    _, script, flags = split(record(launcher, tmp_path, "--resolution", "512", "768"))
    args: Any = parse(script, flags)
    assert args.data.resolution == (512, 768)


@each_launcher
def test_a_missing_model_folder_is_one_sentence_with_the_remedy(
    launcher: Path, tmp_path: Path
) -> None:
    result, words = launch(launcher, tmp_path, MODEL_NAME="models/not-there")
    assert result.returncode == 2
    assert not words
    assert "models/not-there" in result.stderr
    assert "scripts/download.sh" in result.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS[:-1], ids=lambda path: path.name)
def test_training_goes_through_accelerate_with_a_configuration(
    launcher: Path, tmp_path: Path
) -> None:
    before, _, flags = split(record(launcher, tmp_path))
    config = "scripts/accelerate/one_gpu.yaml"
    # It passes signals and exit codes on, which accelerate's own command does not.
    assert before == ["python", "-m", "dojo.launch", "--quiet", "--config_file", config]
    assert flags[flags.index("--resume_from_checkpoint") + 1] == "latest"

    several = "scripts/accelerate/multi_gpu.yaml"
    before, _, _ = split(record(launcher, tmp_path, ACCELERATE_CONFIG=several, NUM_PROCESSES="4"))
    assert before[4:] == ["--config_file", several, "--num_processes", "4"]


@each_launcher
def test_what_the_header_tells_to_fetch_can_be_fetched(launcher: Path) -> None:
    lines = [line for line in launcher.read_text().splitlines() if "#   bash scripts/down" in line]
    names = [name for line in lines for name in line.split("download.sh")[1].split()]
    assert names
    assert not set(names) - set(download.BY_NAME)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "imagereward"])
def test_a_reward_is_read_from_where_it_was_fetched_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry, checkpoint = download.BY_NAME[name], cast(Any, scorer_class(name)).checkpoint
    folder = Path(entry.folder)
    folder.mkdir(parents=True)
    assert checkpoint.startswith(entry.repo)
    if checkpoint == entry.repo:
        assert weights.locate(checkpoint) == str(folder)
        return
    path = folder / Path(checkpoint).name
    assert path.name in entry.allow
    path.touch()
    assert weights.file(checkpoint) == path  # without it the hub would be asked: offline, an error


@each_reinforced
@pytest.mark.parametrize("number", [None, 1, 2, 3, 4, 8])
def test_every_number_of_processes_makes_whole_epochs_of_two_steps(
    launcher: Path, number: int | None, tmp_path: Path
) -> None:
    environment = {} if number is None else {"NUM_PROCESSES": str(number)}
    _, script, flags = split(record(launcher, tmp_path, **environment))
    args: Any = parse(script, flags)
    processes = number or 1
    args.sample.check(args.optim, processes, min_group=1)  # raises where sizes do not divide
    assert args.sample.samples == 64 * processes
    assert args.sample.samples == 2 * args.optim.samples_per_step(processes)
    assert args.optim.max_train_steps % 2 == 0
    if launcher.stem != "train_ddpo_sd3":  # an epoch in groups holds no prompt twice
        assert args.sample.num_prompts_per_epoch <= len(prompts.open_prompts(args.prompts).train)


@pytest.mark.parametrize("launcher", DENOISING, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("environment", "pictures"),
    [({}, 256), ({"NUM_PROCESSES": "8"}, 256), ({"NUM_PROCESSES": "3"}, None)],
    ids=("one", "eight", "three"),
)
def test_an_epoch_is_ddpos_number_of_pictures_in_two_steps(
    launcher: Path, environment: dict[str, str], pictures: int | None, tmp_path: Path
) -> None:
    args: Any = parse(*split(record(launcher, tmp_path, **environment))[1:])
    processes = int(environment.get("NUM_PROCESSES", "1"))
    args.sample.check(args.optim, processes, min_group=1)  # raises where sizes do not divide
    assert args.sample.samples == 2 * args.optim.samples_per_step(processes)
    assert args.sample.samples == (pictures or pytest.approx(260, abs=8))
    assert args.optim.max_train_steps % 2 == 0
    assert (args.rollout.eta, args.sample.guidance_scale) == (1, 5)


@pytest.mark.parametrize("words", ["--baseline group", "--baseline=group"])
def test_groups_step_in_for_the_launchers_buffer(words: str, tmp_path: Path) -> None:
    for launcher in DENOISING:
        more = [*words.split(), "--group_size", "8", "--num_prompts_per_epoch", "32"]
        args: Any = parse(*split(record(launcher, tmp_path, *more))[1:])
        assert args.sample.check(args.optim, 1, min_group=args.ddpo.min_group)
        assert len(prompts.open_prompts(args.prompts).train) >= 32  # none twice in an epoch


def test_grpo_has_the_groups_of_flow_grpo(tmp_path: Path) -> None:
    groups = {}
    for number in ("1", "4"):
        launcher = ROOT / "scripts" / "train_grpo_sd3.sh"
        args: Any = parse(*split(record(launcher, tmp_path, NUM_PROCESSES=number))[1:])
        groups[number] = (args.sample.num_prompts_per_epoch, args.sample.group_size)
    assert groups == {"1": (8, 8), "4": (16, 16)}


@each_rewarded
@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ("aesthetic", "pickscore"),
        ("pickscore[scale=1/26]", "hpsv2.1"),
        ("aesthetic=0.5,pickscore=1,hpsv2.1=2", "imagereward"),
        ("pickscore,hpsv2.1,imagereward", None),
    ],
)
def test_no_reward_that_is_trained_on_is_held_out(
    launcher: Path, trained: str, held_out: str | None, tmp_path: Path
) -> None:
    _, script, flags = split(record(launcher, tmp_path, REWARD=trained))
    args: Any = parse(script, flags)
    assert args.reward.reward == trained
    assert args.evaluation.eval_reward == held_out
    assert held_out not in {term.source for term in spec.parse(trained)}


@each_rewarded
def test_the_held_out_reward_can_be_chosen_and_left_out(launcher: Path, tmp_path: Path) -> None:
    for wish in ("clip", ""):
        _, script, flags = split(record(launcher, tmp_path, EVAL_REWARD=wish))
        args: Any = parse(script, flags)
        assert args.evaluation.eval_reward == (wish or None)


@each_rewarded
def test_the_prompts_come_from_one_place(launcher: Path, tmp_path: Path) -> None:
    file = tmp_path / "my prompts.txt"
    for words, environment in (
        ([], {"PROMPT_FILE": str(file)}),
        (["--prompt_file", str(file)], {}),
        ([f"--prompt_file={file}"], {"PROMPT_SET": "pocket"}),
    ):
        _, script, flags = split(record(launcher, tmp_path, *words, **environment))
        args: Any = parse(script, flags)
        assert args.prompts.prompt_file == file
        assert args.prompts.prompt_set is None
    _, script, flags = split(record(launcher, tmp_path, PROMPT_SET="pocket"))
    args = parse(script, flags)
    assert args.prompts.prompt_set == "pocket"


@pytest.mark.parametrize("launcher", [*REINFORCED, *DENOISING], ids=lambda path: path.name)
@pytest.mark.slow
def test_a_dry_run_goes_through_accelerate_and_ends_well(launcher: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", str(launcher), "--dry_run", "--report_to", "none"],
        env={
            **os.environ,
            "MODEL_NAME": f"models/pocket-{launcher.stem.rpartition('_')[2]}",
            "RESOLUTION": "64",
            "PROMPT_SET": "pocket",
            "REWARD": "jpeg_compressibility",  # nothing has to be downloaded
            "EVAL_REWARD": "",
            "OUTPUT_DIR": str(tmp_path / "run"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "steps per epoch: 2.00" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [None, 1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ("launcher", "environment", "pairs", "rate"),
    [
        (PREFERRED, {}, 2048, 2.048e-5),
        (PREFERRED, {"TRAIN_BATCH_SIZE": "1"}, 2048, 2.048e-5),
        (PREFERRED, {"USE_LORA": "1", "TRAIN_BATCH_SIZE": "2"}, 32, 1e-5),
        (DIRECT, {}, 64, 1e-5),
        (PREFERRED_XL, {}, 2048, 2.048e-5),
        (PREFERRED_XL, {"USE_LORA": "1"}, 16, 1e-5),
        (PREFERRED_SD3, {}, 16, 5e-5),
    ],
    ids=("dpo", "dpo-single", "dpo-lora", "refl", "dpo-xl", "dpo-xl-lora", "dpo-sd3"),
)
def test_every_number_of_processes_makes_the_papers_batch_and_rate(
    launcher: Path,
    environment: dict[str, str],
    pairs: int,
    rate: float,
    number: int | None,
    tmp_path: Path,
) -> None:
    wanted = {} if number is None else {"NUM_PROCESSES": str(number)}
    _, script, flags = split(record(launcher, tmp_path, **environment, **wanted))
    args: Any = parse(script, flags)
    assert args.optim.samples_per_step(number or 1) == pairs
    scale = pairs if args.optim.scale_lr else 1
    assert args.optim.learning_rate * scale == pytest.approx(rate)
    adapters = "USE_LORA" in environment or launcher == PREFERRED_SD3
    assert args.finetune.finetune == ("lora" if adapters else "full")


@pytest.mark.parametrize("launcher", IN_BATCHES, ids=lambda path: path.name)
def test_a_batch_that_cannot_be_reached_is_refused(launcher: Path, tmp_path: Path) -> None:
    result, words = launch(launcher, tmp_path, NUM_PROCESSES="3")
    assert result.returncode == 2
    assert not words
    assert "is no multiple of NUM_PROCESSES 3 x TRAIN_BATCH_SIZE" in result.stderr


def test_dpo_has_the_papers_settings(tmp_path: Path) -> None:
    args: Any = parse(*split(record(PREFERRED, tmp_path))[1:])
    assert args.dpo.beta_dpo == 5000
    assert not args.dpo.sft
    assert args.optim.lr_scheduler == "constant_with_warmup"
    assert (args.optim.lr_warmup_steps, args.optim.max_train_steps) == (500, 2000)


def test_dpo_of_sdxl_has_the_papers_settings(tmp_path: Path) -> None:
    args: Any = parse(*split(record(PREFERRED_XL, tmp_path))[1:])
    assert args.dpo.beta_dpo == 5000
    assert args.optim.optimizer == "adafactor"
    assert args.optim.lr_scheduler == "constant_with_warmup"
    assert (args.optim.lr_warmup_steps, args.optim.max_train_steps) == (200, 2000)
    assert args.data.size == (1024, 1024)


def test_dpo_of_sd3_is_tied_as_its_header_says(tmp_path: Path) -> None:
    args: Any = parse(*split(record(PREFERRED_SD3, tmp_path))[1:])
    assert args.dpo.beta_dpo == 2000
    assert (args.lora.rank, args.lora.lora_alpha) == (32, 64)
    assert args.optim.max_train_steps == 1000
    assert args.data.size == (1024, 1024)


@pytest.mark.parametrize(
    "launcher", sorted((ROOT / "scripts").glob("train_*_sdxl.sh")), ids=lambda path: path.name
)
def test_another_autoencoder_may_be_named_for_sdxl(launcher: Path, tmp_path: Path) -> None:
    for name in ("", "models/sdxl-vae-fp16-fix"):
        _, script, flags = split(record(launcher, tmp_path, VAE_NAME=name))
        args: Any = parse(script, flags)
        assert args.model.pretrained_vae_model_name_or_path == (name or None)
        assert args.model.vae_dtype != "fp16"  # in which SDXL's own overflows


@pytest.mark.parametrize("family", ["kolors", "hunyuandit"])
def test_chinese_families_have_the_usual_recipe_and_the_captions_of_their_data(
    tmp_path: Path, family: str
) -> None:
    launcher = ROOT / "scripts" / f"train_lora_{family}.sh"
    args: Any = parse(*split(record(launcher, tmp_path))[1:])
    assert (args.lora.rank, args.lora.lora_alpha) == (4, 4)
    assert (args.optim.learning_rate, args.optim.max_train_steps) == (1e-4, 500)
    assert args.data.size == (1024, 1024)
    assert args.data.caption_column is None  # of a data set that it does not know
    assert args.model.vae_dtype == "no"
    own = {"DATASET_NAME": "datas/pokemon-blip-captions"}
    said, _ = launch(launcher, tmp_path, **own)
    if not (ROOT / own["DATASET_NAME"]).is_dir():
        assert said.returncode == 2
        assert "download.sh pokemon" in said.stderr
    args = parse(*split(record(launcher, tmp_path, CAPTION_COLUMN="zh_text"))[1:])
    assert args.data.caption_column == "zh_text"


def test_refl_has_the_papers_settings(tmp_path: Path) -> None:
    data = {"PRETRAIN_DATA": "my/pictures", "PROMPT_FILE": "refl_data.json"}
    for environment in ({}, data):
        args: Any = parse(*split(record(DIRECT, tmp_path, **environment))[1:])
        assert args.reward.reward == "imagereward"
        assert args.refl.margin is None  # the reward's own: 2
        assert (args.refl.steps, args.refl.grad_steps) == ((30, 39), 1)
        assert (args.refl.guidance_scale, args.refl.sampler) == (1, "ddpm")
        assert args.refl.grad_scale == 1e-3
        assert args.optim.max_train_steps == 100
        assert args.ema.use_ema
        assert args.model.gradient_checkpointing
        assert args.pretrain.pretrain_data_dir == environment.get("PRETRAIN_DATA")
    assert args.prompts.location == "refl_data.json"


def test_refl_of_sd3_has_the_papers_loss_and_a_published_way_of_draft(tmp_path: Path) -> None:
    args: Any = parse(*split(record(DIRECT_SD3, tmp_path))[1:])
    assert args.reward.reward == "imagereward"
    assert (args.refl.steps, args.refl.grad_steps, args.refl.grad_scale) == ((15, 19), 1, 1e-3)
    assert args.optim.samples_per_step(1) == 64
    assert (args.finetune.finetune, args.lora.rank, args.lora.lora_alpha) == ("lora", 32, 64)
    draft = ("--sample_steps", "4", "--first_step", "3")
    args = parse(*split(record(DIRECT_SD3, tmp_path, *draft))[1:])
    assert args.refl.steps == (3, 3)
    assert args.refl.way(3.0).sigmas[3] == pytest.approx(0.5)  # UniRL's


def test_the_users_prompts_replace_those_of_the_demo(tmp_path: Path) -> None:
    demo = ROOT / "scripts" / "demo.sh"
    _, script, flags = split(record(demo, tmp_path, "--prompt", "a red fox", "a blue boat"))
    args: Any = parse(script, flags)
    assert args.prompt == ("a red fox", "a blue boat")
    _, script, flags = split(record(demo, tmp_path, "--prompt_file", "mine.txt"))
    args = parse(script, flags)
    assert (args.prompt, args.prompt_file) == ((), Path("mine.txt"))


def test_the_demo_runs_without_a_lora(tmp_path: Path) -> None:
    words = record(ROOT / "scripts" / "demo.sh", tmp_path, LORA_WEIGHTS_PATH="")
    assert "--lora_weights_path" not in words
    assert "--compare" not in words


ZERO = ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]


def test_the_expected_configurations_exist() -> None:
    names = {path.stem for path in CONFIGURATIONS}
    assert names == {"one_gpu", "multi_gpu", "two_machines", *ZERO}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    # Unknown keys are an error of accelerate's own at the top level.
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "bf16"

    # Below it, a key that `accelerate launch` has no option for would be ignored in silence.
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    assert set(config.deepspeed_config or {}) <= options

    # And what the launcher makes of it.
    args = parser.parse_args(["--config_file", str(path), "train_lora_sd3.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.mixed_precision == "bf16"
    assert args.num_processes == {"one_gpu": 1, "two_machines": 16}.get(path.stem, 2)
    assert args.num_machines == (2 if path.stem == "two_machines" else 1)
    assert bool(args.multi_gpu) == (path.stem in ("multi_gpu", "two_machines"))
    assert not args.use_fsdp  # refused: --shard does it
    assert bool(args.use_deepspeed) == (path.stem in ZERO)
    if path.stem in ZERO:
        assert args.zero_stage == int(path.stem[-1])
        assert args.deepspeed_multinode_launcher == "standard"  # not pdsh, which starts over ssh


@pytest.mark.parametrize("name", ["two_machines", *ZERO])
def test_what_was_not_run_says_so_in_its_first_line(name: str) -> None:
    path = ROOT / "scripts" / "accelerate" / f"{name}.yaml"
    assert path.read_text().splitlines()[0].startswith("# not run here")
