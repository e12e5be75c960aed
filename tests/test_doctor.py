"""dojo.doctor: what is told of an environment, what is hidden, what is known to be wrong."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dojo import cli, doctor

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQr",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG",
    "SWANLAB_API_KEY": "swan-secret-value",
    "HF_HUB_PASSWORD": "correct-horse",
    "UNRELATED_TOKEN": "a-token-of-something-else",
    "SLURM_JWT": "short-lived-pass-of-slurm",
    "FSSPEC_S3": ' {"key": "minnow-key", "secret": "minnow-secret"}',
    "FSSPEC_FTP_ACCT": "carp-account",
    "FSSPEC_ABFS_CONNECTION_STRING": "AccountName=pike;AccountKey=perch",
    "SWANLAB_LARK_WEBHOOK_URL": "https://lark.example/hook/barbel",
    "ACCELERATE_NOTE": '[{"password": "roach-word"}]',
    "NCCL_ANYTHING": "x aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF y",
}
LEAKS = {
    "HTTPS_PROXY": "http://somebody:battery-staple@proxy.example:3128",
    "HF_ENDPOINT": "https://hub.example/?key=query-secret",
    "NCCL_COMMENT": "the token is a-token-of-something-else",
    "PYTORCH_NOTE": "sk-abcdefghijklmnop and hf_ZyXwVuTsRqPo",
    "SLURM_NOTE": "eyJhbGciOiJub25lIn0.eyJleHAiOjF9.tench",
}
HIDDEN = (
    *SECRETS.values(),
    *("battery-staple", "somebody", "query-secret", "sk-abcdefghijklmnop", "hf_ZyXwVuTsRqPo"),
    *("minnow-key", "minnow-secret", "perch", "barbel", "roach-word", "tench"),
)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A made-up environment with nothing wrong in it."""
    monkeypatch.chdir("/")
    return {
        "python": {
            "executable": "/repo/.venv/bin/python",
            "the repository's .venv": True,
            "dojo": str(Path(doctor.__file__).parent),
        },
        "torch": {
            "version": "2.14.1",
            "built for CUDA": "13.0",
            "sees a GPU": True,
            "GPUs": [{"name": "NVIDIA H100", "GiB": 79.2, "GiB free": 78.6, "bfloat16": True}],
        },
        "nvidia-smi": {"there": True, "GPUs": ["NVIDIA H100, 81559 MiB, 600 MiB, 580.65.06"]},
        "packages": {"torch": {"version": "2.14.1", "asked": ">=2.11", "for": ["all"]}},
        "accelerate": {},
        "variables": {},
        "machine": {"free, GiB": {"the working folder": 500.0, "/dev/shm": 32.0}},
    }


def the_remark(found: Any) -> str:
    """The only one that there is."""
    (remark,) = doctor.remarks(found)
    return remark


# -- secrets ----------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {**SECRETS, **LEAKS, "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    settings = tmp_path / "accelerate" / "default_config.yaml"
    settings.parent.mkdir()
    settings.write_text(
        "distributed_type: 'NO'\n"
        "aws_secret_key: swan-secret-value\n"
        "main_process_ip: http://somebody:battery-staple@host\n"
    )
    for as_json in (False, True):
        doctor.main(doctor.DoctorArgs(json=as_json))
        printed = capsys.readouterr().out
        for secret in HIDDEN:
            assert secret not in printed
        for name in (*SECRETS, *LEAKS):
            assert (name in printed) == (name != "UNRELATED_TOKEN")  # that they are set is said
        assert "proxy.example:3128" in printed
        assert "distributed_type" in printed


def test_words_that_only_look_like_secrets_are_shown() -> None:
    shown = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "/repo/src",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_HUB_OFFLINE": "1",
        "LD_LIBRARY_PATH": "/opt/Cuda-13.0/targets/x86_64-linux/lib:/opt/NCCL-2/lib64",
        "NVIDIA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512",
        "SLURM_JOB_NODELIST": "node[01-04,07]",
    }
    assert doctor.variables({**shown, "EDITOR": "vi"}) == dict(sorted(shown.items()))
    assert not doctor.is_secret("PWD")
    # The working folder is no secret because its variable's name looks like one.
    assert doctor.masked("/a/folder/x", {"PWD": "/a/folder"}) == "/a/folder/x"


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert doctor.masked({"file": ["/home/somebody/x.yaml"]}, {}) == {"file": ["~/x.yaml"]}


# -- what there is ----------------------------------------------------------------------------


def test_the_json_has_every_section_and_the_text_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    cli.run(doctor.main, doctor.DoctorArgs, doctor.__doc__)
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"]
    assert found["packages"]["diffusers"]["fits"]
    assert found["machine"]["free, GiB"]["the working folder"] > 0
    text = doctor.told(found)
    assert all(f"\n{section}\n" in f"\n{text}" for section in found)


def test_packages_are_compared_with_the_ranges_that_are_asked_for() -> None:
    asked = [
        "pytest>=8.0",
        "torch>=99",
        "no-such-package>=1",
        'no-such-extra>=1; extra == "shiny"',
        'torch<2; extra == "old"',
        'no-such-python>=1; python_version < "3"',
    ]
    found = doctor.packages(asked)
    assert "no-such-python" not in found
    assert found["pytest"]["fits"]
    assert not found["torch"]["fits"]
    assert found["torch"]["for"] == ["all", "old"]
    assert found["no-such-package"]["version"] is None
    assert found["no-such-extra"]["for"] == ["shiny"]


# -- what is known to be wrong ----------------------------------------------------------------


def test_nothing_is_remarked_where_nothing_is_wrong(found: Any) -> None:
    assert doctor.remarks({**found, "packages": doctor.packages(["pytest>=8.0"])}) == []


def without_gpu(found: Any, **torch: Any) -> Any:
    seen = {**found["torch"], "sees a GPU": False, **torch}
    seen.pop("GPUs")
    return {**found, "torch": seen, "packages": {}}


def test_a_gpu_that_torch_does_not_see_is_explained(found: Any) -> None:
    cpu = the_remark(without_gpu(found, **{"built for CUDA": None}))
    assert "built without CUDA" in cpu
    assert "driver 580.65.06 may be too old for CUDA 13.0" in the_remark(without_gpu(found))
    hidden = {**without_gpu(found), "variables": {"CUDA_VISIBLE_DEVICES": ""}}
    assert "CUDA_VISIBLE_DEVICES='' hides all" in the_remark(hidden)
    silent = {**without_gpu(found), "nvidia-smi": {"there": True, "GPUs": []}}
    assert "nor does nvidia-smi" in the_remark(silent)
    nowhere = {**without_gpu(found), "nvidia-smi": {"there": False}}
    assert doctor.remarks(nowhere) == []  # a machine without a GPU is none the worse


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variables": {"FSDP_VERSION": "2"}}, "FSDP_VERSION asks for FSDP"),
        ({"variables": {"ACCELERATE_USE_FSDP": "true"}}, "ACCELERATE_USE_FSDP asks for FSDP"),
        ({"variables": {"ACCELERATE_USE_DEEPSPEED": "1"}}, "asks for DEEPSPEED"),
        (
            {"accelerate": {"its own": {"file": "x.yaml", "distributed_type": "FSDP"}}},
            "its own configuration, x.yaml, asks for FSDP",
        ),
        ({"accelerate": {"its own": {"num_processes": 4}}}, "starts 4 processes on 1 GPUs"),
        (
            {"variables": {"WORLD_SIZE": "2"}},
            "WORLD_SIZE=2 is set outside of a launcher: a script refuses",
        ),
        ({"machine": {"free, GiB": {"/dev/shm": 0.1}}}, "/dev/shm has 0.1 GiB free"),
        ({"machine": {"free, GiB": {"the hub's cache": 3.0}}}, "the hub's cache has 3.0 GiB free"),
        ({"torch": {"error": "ImportError: libcudart"}}, "torch cannot be imported"),
        (
            {"packages": {"peft": {"version": None, "asked": ">=0.19", "for": ["all"]}}},
            "peft is missing (peft>=0.19)",
        ),
        (
            {
                "packages": {
                    "wandb": {"version": "0.1", "asked": ">=0.18", "for": ["wandb"], "fits": False}
                }
            },
            "wandb 0.1 is not in the supported range for the extra wandb: >=0.18",
        ),
    ],
)
def test_what_makes_trouble_is_said(found: Any, change: Any, said: str) -> None:
    assert said in the_remark({**found, "packages": {}, **change})


def test_a_gpu_without_bfloat16_or_in_use_is_said(found: Any) -> None:
    other = copy.deepcopy({**found, "packages": {}})
    other["torch"]["GPUs"][0] |= {"bfloat16": False, "GiB free": 40.0}
    first, second = doctor.remarks(other)
    assert "does not compute in bfloat16" in first
    assert "39.2 GiB are in use" in second


def test_another_environment_and_another_clone_are_said(
    found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "src" / "dojo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found["python"]["the repository's .venv"] = False
    first, second = doctor.remarks({**found, "packages": {}})
    assert "is not the repository's .venv" in first
    assert "another clone is installed" in second
