"""Claims about the job of Slurm: with stand-ins for its programs, and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, lora_flags
from tests.processes import spawn
from tests.scripts.test_shell import stub

JOB = ROOT / "scripts" / "slurm" / "train.sbatch"

# Starts one task and passes signals on, as srun does; since 22.05 it does not ask for the cores
# that sbatch was asked for.
SRUN = """
while [[ "$1" == --* ]]; do options+=" $1"; shift; done
export OPTIONS_OF_SRUN="$options"
export CORES_OF_TASK="${SRUN_CPUS_PER_TASK:-1}"
SLURM_PROCID="${RANK_OF_TASK:-0}" "$@" &
task=$!
trap 'kill -TERM "$task"' TERM
status=0; wait "$task" || status=$?
while kill -0 "$task" 2>/dev/null; do status=0; wait "$task" || status=$?; done
exit "$status"
"""
SCONTROL = """
case "$1 $2" in
"show hostnames") printf 'node7\\nnode8\\n' ;;
"show job") echo "   JobState=${STATE_OF_JOB:-RUNNING} Reason=None" ;;
"requeue 4711") echo "$*" >>"$REQUEUED" ;;
*) exit 1 ;;
esac
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a task of Slurm's sees, with the stand-ins first."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        stub(folder / "bin", name, text)
    paths = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": paths, "VIRTUAL_ENV": str(folder), "REQUEUED": str(folder / "requeued")}
    own |= {
        "SLURM_JOB_ID": "4711",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    own |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    own["PYTHONPATH"] = f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, **own, **more}


def submit(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the job's body to its end."""
    return subprocess.run(
        ["bash", JOB, *words],
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_job_that_is_told_to_stop_is_requeued_and_goes_on(
    tiny_sd3: Path, scene_data: Path, tmp_path: Path
) -> None:
    flags = [*lora_flags(tmp_path, tiny_sd3, scene_data), "--max_train_steps", "40", "--seed", "1"]
    run = tmp_path / "run"
    with (tmp_path / "log.txt").open("w") as log:
        job = subprocess.Popen(
            ["bash", JOB, "train_lora_sd3.py", *flags],
            env=environment(tmp_path),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").is_file() and job.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        code = job.wait(timeout=240)
    said = (tmp_path / "log.txt").read_text()
    assert code == 143, said
    assert "back into the queue" in said
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    [kept] = run.glob("checkpoint-*")
    step = json.loads((kept / "state.json").read_text())["step"]
    assert 0 < step < 40
    # The job that was put back; what it starts is seen, and then started without its seconds.
    stub(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    again = submit(tmp_path, "train_lora_sd3.py", *flags)
    assert again.returncode == 0, again.stderr
    words = again.stdout.splitlines()
    code, said = spawn("train_lora_sd3.py", words[words.index("train_lora_sd3.py") + 1 :], tmp_path)
    assert code == 0, said
    assert f"resuming from {kept} at step {step}" in said
    assert json.loads((run / "finished.json").read_text()) == {"step": 40}
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "once"


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (143, "RUNNING", True),
        (143, "CANCELLED", False),
        (143, "PREEMPTED", False),  # Slurm does it
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_only_what_was_stopped_before_its_time_is_requeued(
    tmp_path: Path, code: int, state: str, requeued: bool
) -> None:
    stub(tmp_path / "bin", "python", f"exit {code}")
    done = submit(tmp_path, "train_full_sd3.py", STATE_OF_JOB=state)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued


def test_each_machine_is_told_its_number_and_where_the_first_one_is(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    more = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "RANK_OF_TASK": "1"}
    done = submit(tmp_path, "train_full_sd3.py", "--seed", "1 2", **more)
    assert done.stdout.splitlines() == [
        *("-m", "dojo.launch", "--quiet"),
        *("--config_file", "scripts/accelerate/multi_gpu.yaml"),
        *("--num_machines", "2", "--machine_rank", "1", "--num_processes", "16"),
        *("--main_process_ip", "node7", "--main_process_port", "24711"),
        *("train_full_sd3.py", "--seed", "1 2", "--resume_from_checkpoint", "latest"),
    ]


@pytest.mark.parametrize(("asked", "cores"), [("8", "8"), ("", "16")])
def test_a_task_has_the_cores_that_the_job_asked_for(
    tmp_path: Path, asked: str, cores: str
) -> None:
    stub(tmp_path / "bin", "python", 'echo "$CORES_OF_TASK"')
    more = {"SLURM_CPUS_PER_TASK": asked, "SRUN_CPUS_PER_TASK": ""}
    assert submit(tmp_path, "train_full_sd3.py", **more).stdout.split() == [cores]
    assert "#SBATCH --cpus-per-task=16" in JOB.read_text().splitlines()


def test_machines_that_wait_for_one_that_failed_end_before_the_time_limit(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "python", 'echo "$OPTIONS_OF_SRUN $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    more = {"SLURM_WAIT": "", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": ""}
    keep, wait, checkpoint = submit(tmp_path, "train_full_sd3.py", **more).stdout.split()
    assert keep == "--kill-on-bad-exit=0"
    # Not before the launchers that were told to stop have had their time.
    assert wait.startswith("--wait=")
    assert int(checkpoint) < int(wait.removeprefix("--wait=")) < 24 * 3600
    more["SLURM_WAIT"] = "1200"
    assert "--wait=1200" in submit(tmp_path, "train_full_sd3.py", **more).stdout.split()


def test_accelerate_takes_these_words(tmp_path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    stub(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    more = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "RANK_OF_TASK": "1"}
    words = submit(tmp_path, "train_full_sd3.py", **more).stdout.splitlines()[2:]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.multi_gpu
    assert (args.num_machines, args.num_processes, int(args.machine_rank)) == (2, 16, 1)
    assert (args.main_process_ip, args.main_process_port) == ("node7", 24711)


@pytest.mark.parametrize(
    ("words", "more", "told"),
    [
        ((), {}, "name the script"),
        (("--seed", "1"), {}, "name the script"),
        (("train_full_sd3.py",), {"SLURM_JOB_ID": ""}, "start it with sbatch"),
    ],
)
def test_a_job_without_its_words_is_refused(
    tmp_path: Path, words: tuple[str, ...], more: dict[str, str], told: str
) -> None:
    done = submit(tmp_path, *words, **more)
    assert done.returncode == 2
    assert told in done.stderr


def test_slurm_reads_its_lines_before_the_first_command() -> None:
    lines = JOB.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[first] == "set -euo pipefail"
    options = [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@600" in options
    assert "#SBATCH --requeue" in options
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
