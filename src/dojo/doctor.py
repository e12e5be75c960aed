"""Prints the environment that trainings run in, without secrets, and what is known to be wrong.

    python -m dojo.doctor           for people
    python -m dojo.doctor --json    for programs, and for the report of a problem

Tokens, keys and passwords are said to be set and not shown, addresses lose their user info and the
values of their queries, and the home folder is written as ~. Nothing is changed or downloaded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from packaging.requirements import Requirement

from dojo import cli
from dojo.cli.masking import MASK, hide

Table = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "sd-dojo"
HIDDEN = "set, not shown"
GIB = 2**30
_LINUX = sys.platform == "linux"

# Variables that decide how a run goes, by the beginnings of their names.
_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "DEEPSPEED_", "DS_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH"),
    *("PYTORCH_", "TRITON_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DIFFUSERS_"),
    *("DATASETS_", "MODELSCOPE_", "WANDB_", "SWANLAB_", "BITSANDBYTES_", "BNB_", "OMP_", "MKL_"),
    *("OPENBLAS_", "KMP_", "TOKENIZERS_", "AWS_", "S3_", "FSSPEC_", "SLURM_", "SD_DOJO_", "PYTHON"),
    *("XDG_CACHE_", "LD_", "DOJO_WEBHOOK"),
)
_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NUM_PROCESSES"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "TMPDIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
}
# A part of a variable's name, between underscores, that ends so means a secret.
_SECRET = re.compile(
    r"(?:^|_)(?:TOKENS?|KEYS?|SECRETS?|PASS|PASSWD|PASSWORD|CREDENTIALS?|COOKIE|AUTH|JWT|SAS)(?:_|$)"
    r"|_PWD|APIKEY|WEBHOOK|CONNECTION_STRING",
    re.IGNORECASE,
)
# Their values are settings of any name that file systems take, keys among them.
_SETTINGS = "FSSPEC_"
# A table or a list in a variable, which may hold keys under any name; and a long word of letters of
# both kinds and figures, which nobody chose.
_OPAQUE = re.compile(
    r"\s*[{\[]"
    r"|.*?\b(?=\w*[a-z])(?=\w*[A-Z])(?=\w*[0-9])\w{24,}",
    re.DOTALL,
)
# Texts that are keys wherever they stand: of the hubs, trackers and clouds that are talked to.
_KEYS = re.compile(
    r"\b(?:hf_|sk-|ms-|ghp_|github_pat_|AKIA|ASIA|xox[bp]-)[A-Za-z0-9_-]{8,}"
    r"|(?i:(?<=bearer ))[A-Za-z0-9._~+/=-]{8,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9._-]+"
)
_SHARDING = ("FSDP", "DEEPSPEED")
_LOW_DISK = 20.0  # GiB; a pipeline's folder takes 5 to 17
_LOW_SHARED = 1.0  # GiB of /dev/shm, through which workers hand over batches


@dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """How the environment is printed."""

    json: bool = False
    """print one JSON object instead of a text"""


def main(args: DoctorArgs) -> None:
    """Prints it."""
    found = examine()
    print(json.dumps(found, indent=1) if args.json else told(found))


def examine(environ: Mapping[str, str] = os.environ) -> Table:
    """Everything that is known of the environment, by section, with secrets masked."""
    found = {
        "python": _python(),
        "torch": _torch(),
        "nvidia-smi": _nvidia_smi(),
        "packages": packages(_requirements()),
        "accelerate": _accelerate(environ),
        "variables": variables(environ),
        "machine": _machine(),
    }
    return masked({**found, "remarks": remarks(found)}, environ)


# -- without secrets --------------------------------------------------------------------------


def masked(found: Any, environ: Mapping[str, str]) -> Any:
    """The same with every secret masked, in keys and values, however deep they lie.

    Args:
        environ: whose secret variables' values are masked wherever they stand.
    """
    known = [one for name, one in environ.items() if len(one) >= 6 and _is_hidden(name, one)]
    if isinstance(found, Mapping):
        return {masked(k, environ): masked(v, environ) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return [masked(one, environ) for one in found]
    if not isinstance(found, str):
        return found
    text = _KEYS.sub(MASK, hide(found, known))
    return text.replace(str(Path.home()), "~") if str(Path.home()) != "/" else text


def is_secret(name: str) -> bool:
    """Whether a variable or a setting of this name is not to be shown."""
    return bool(_SECRET.search(name))


def _is_hidden(name: str, value: str) -> bool:
    """Whether a variable's value is not shown."""
    secret = is_secret(name) or name.upper().startswith(_SETTINGS)
    return bool(value) and (secret or _OPAQUE.match(value) is not None)


def variables(environ: Mapping[str, str]) -> Table:
    """The variables that decide how a run goes; of secrets only that they are set."""
    return {
        name: HIDDEN if _is_hidden(name, environ[name]) else environ[name]
        for name in sorted(environ)
        if name.upper().startswith(_PREFIXES) or name.upper() in _NAMES
    }


# -- what there is ----------------------------------------------------------------------------


def _python() -> Table:
    own = ROOT / ".venv"
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "the repository's .venv": own.exists() and Path(sys.prefix).resolve() == own.resolve(),
        "system": platform.platform(),
        "dojo": str(Path(__file__).parent),
        "revision": _command("git", "-C", str(ROOT), "describe", "--always", "--dirty") or None,
    }


def _torch() -> Table:
    """What torch sees of the GPUs."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways
        return {"error": f"{type(error).__name__}: {error}"}
    found: Table = {
        "version": torch.__version__,
        "built for CUDA": torch.version.cuda,
        "built for ROCm": getattr(torch.version, "hip", None),
        "sees a GPU": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }
    if found["sees a GPU"]:
        found["cuDNN"] = torch.backends.cudnn.version()
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        found["GPUs"] = [_gpu(torch, number) for number in range(torch.cuda.device_count())]
    return found


def _gpu(torch: Any, number: int) -> Table:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "GiB": round(total / GIB, 1),
        "GiB free": round(free / GIB, 1),
        "bfloat16": properties.major >= 8,
    }


def _nvidia_smi() -> Table:
    """What the driver says, whatever torch says."""
    if shutil.which("nvidia-smi") is None:
        return {"there": False}
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    text = _command("nvidia-smi", query, "--format=csv,noheader")
    return {"there": True, "GPUs": text.splitlines()}


def _command(*words: str) -> str:
    """What a program prints; nothing where it fails or takes too long."""
    with suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""
    return ""


def _requirements() -> list[str]:
    """What the package asks for: the clone's own lists, or the installed package's."""
    path = ROOT / "requirements.txt"
    if not path.is_file():
        with suppress(importlib.metadata.PackageNotFoundError):
            return list(importlib.metadata.requires(DISTRIBUTION) or ())
        return []
    lines = (line.split("#", 1)[0].strip() for line in path.read_text("utf-8").splitlines())
    asked = [line for line in lines if line and not line.startswith("-")]
    with suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.requires(DISTRIBUTION) or ()
        asked += [line for line in installed if "extra ==" in line]
    return asked


def packages(asked: Iterable[str]) -> Table:
    """Installed versions by package, with the range that is asked for and whether it holds.

    Args:
        asked: requirements as pip reads them; those of an extra may be absent.
    """
    found: Table = {}
    for requirement in map(Requirement, asked):
        marker = requirement.marker
        if marker and "extra" not in str(marker) and not marker.evaluate():  # of another Python
            continue
        extra = re.search(r"extra == ['\"]([^'\"]+)", str(requirement.marker or ""))
        row = found.setdefault(
            requirement.name,
            {"version": _version(requirement.name), "asked": str(requirement.specifier), "for": []},
        )
        row["for"].append(extra[1] if extra else "all")
        version = row["version"]
        fits = version is None or requirement.specifier.contains(version, prereleases=True)
        row["fits"] = row.get("fits", True) and fits
    return found


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _accelerate(environ: Mapping[str, str]) -> Table:
    """The configurations that `accelerate launch` and the launchers would take."""
    cache = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    files = {
        "its own": cache / "accelerate" / "default_config.yaml",
        "the launchers'": Path(environ.get("ACCELERATE_CONFIG", "")),
    }
    return {name: _settings(path) for name, path in files.items() if path.is_file()}


def _settings(path: Path) -> Table:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {"file": str(path), "error": f"cannot be read: {error}"}
    content = content if isinstance(content, dict) else {}
    shown = {name: HIDDEN if is_secret(str(name)) else value for name, value in content.items()}
    return {"file": str(path), **shown}


def _machine() -> Table:
    memory = psutil.virtual_memory()
    places = {
        "the working folder": Path.cwd(),
        "the hub's cache": Path(os.environ.get("HF_HOME") or Path.home() / ".cache"),
        "temporary files": Path(os.environ.get("TMPDIR") or "/tmp"),
        "/dev/shm": Path("/dev/shm"),
    }
    free = {name: _free(path) for name, path in places.items()}
    limit = _container_limit()
    return {
        "CPUs": len(psutil.Process().cpu_affinity()) if _LINUX else os.cpu_count(),
        "RAM, GiB": round(memory.total / GIB, 1),
        "RAM available, GiB": round(memory.available / GIB, 1),
        **({} if limit is None else {"RAM limit of the container, GiB": limit}),
        "free, GiB": {name: size for name, size in free.items() if size is not None},
    }


def _container_limit() -> float | None:
    with suppress(OSError, ValueError):  # "max" where there is none
        return round(int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB, 1)
    return None


def _free(path: Path) -> float | None:
    """GiB free where a folder is or would be."""
    for place in (path, *path.parents):
        if place.is_dir():
            return round(shutil.disk_usage(place).free / GIB, 1)
    return None


# -- what is known to be wrong ----------------------------------------------------------------


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What of all this is known to make trouble, a sentence each, with what to do."""
    looked: tuple[Callable[[Mapping[str, Any]], Iterator[str]], ...] = (
        *(_about_python, _about_gpus, _about_packages, _about_sharding),
        *(_about_processes, _about_room),
    )
    return [remark for look in looked for remark in look(found)]


def _about_python(found: Mapping[str, Any]) -> Iterator[str]:
    python = found["python"]
    if not python["the repository's .venv"]:
        yield (
            f"{python['executable']} is not the repository's .venv: `bash scripts/setup.sh` makes "
            "one, and the launchers take it unless another is active"
        )
    here = Path.cwd() / "src" / "dojo"
    if here.is_dir() and here.resolve() != Path(python["dojo"]).resolve():
        yield (
            f"`import dojo` gives {python['dojo']} and not {here}: another clone is installed; "
            "`pip install -e .` here mends it"
        )


def _about_gpus(found: Mapping[str, Any]) -> Iterator[str]:
    torch, smi, names = found["torch"], found["nvidia-smi"], found["variables"]
    if "error" in torch:
        yield f"torch cannot be imported ({torch['error']}): install requirements.txt anew"
        return
    if smi["there"] and not torch["sees a GPU"]:
        yield _why_no_gpu(torch, smi, names)
    for number, gpu in enumerate(torch.get("GPUs", ())):
        if not gpu["bfloat16"]:
            yield (
                f"GPU {number} ({gpu['name']}) does not compute in bfloat16: --mixed_precision "
                "fp16 (SD1.5, SDXL) or no (SD3 overflows in fp16)"
            )
        if (used := gpu["GiB"] - gpu["GiB free"]) > 1.5:
            yield f"GPU {number}: {used:.1f} GiB are in use by other processes (nvidia-smi)"


def _why_no_gpu(torch: Mapping[str, Any], smi: Mapping[str, Any], names: Mapping[str, str]) -> str:
    what = "nvidia-smi is there, but torch sees no GPU: "
    if names.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "none"):
        return f"{what}CUDA_VISIBLE_DEVICES={names['CUDA_VISIBLE_DEVICES']!r} hides all of them"
    if not torch["built for CUDA"]:
        return f"{what}torch {torch['version']} was built without CUDA; install a CUDA wheel"
    if not smi["GPUs"]:
        return f"{what}nor does nvidia-smi; the driver is not running or no GPU is passed on here"
    driver = smi["GPUs"][0].rpartition(",")[2].strip()
    return (
        f"{what}driver {driver} may be too old for CUDA {torch['built for CUDA']}, which torch was "
        "built for; take a newer driver or a wheel for an older CUDA"
    )


def _about_packages(found: Mapping[str, Any]) -> Iterator[str]:
    for name, row in found["packages"].items():
        needed = "all" in row["for"]
        if row["version"] is None and needed:
            yield f"{name} is missing ({name}{row['asked']}): pip install -r requirements.txt"
        elif not row["fits"]:
            extra = "" if needed else f" for the extra {', '.join(row['for'])}"
            yield f"{name} {row['version']} is not in the supported range{extra}: {row['asked']}"


def _about_sharding(found: Mapping[str, Any]) -> Iterator[str]:
    names = found["variables"]
    for kind in _SHARDING:
        asked = [name for name in (f"ACCELERATE_USE_{kind}",) if _true(names.get(name, ""))]
        asked += [name for name in names if name.startswith(f"{kind}_")]
        if asked:
            yield _sharding(kind, ", ".join(asked), found)
    for whose, settings in found["accelerate"].items():
        kind = str(settings.get("distributed_type", ""))
        if kind in _SHARDING:
            yield _sharding(kind, f"{whose} configuration, {settings['file']},", found)


def _sharding(kind: str, who: str, found: Mapping[str, Any]) -> str:
    if kind == "FSDP":
        answer = (
            "which the scripts refuse: --shard shards, scripts/accelerate/multi_gpu.yaml copies"
        )
    elif not found["torch"].get("sees a GPU"):
        answer = "which accelerate silently makes plain data parallel of without a GPU"
    else:
        answer = "which is only meant with a configuration of scripts/accelerate/"
    return f"{who} asks for {kind}, {answer}"


def _about_processes(found: Mapping[str, Any]) -> Iterator[str]:
    names = found["variables"]
    if "WORLD_SIZE" in names and "LOCAL_RANK" not in names:
        yield (
            f"WORLD_SIZE={names['WORLD_SIZE']} is set outside of a launcher: a script refuses to "
            "start, for it would be one of so many processes; unset it, or start it by torchrun"
        )
    count = len(found["torch"].get("GPUs", ()))
    for whose, settings in found["accelerate"].items():
        wanted = settings.get("num_processes")
        if count and isinstance(wanted, int) and wanted > count * settings.get("num_machines", 1):
            yield f"{whose} accelerate configuration starts {wanted} processes on {count} GPUs"


def _about_room(found: Mapping[str, Any]) -> Iterator[str]:
    for name, free in found["machine"]["free, GiB"].items():
        if name == "/dev/shm":
            if free < _LOW_SHARED:
                yield (
                    f"/dev/shm has {free} GiB free: workers of the data loader may die; give a "
                    "container more (docker run --shm-size 8g) or take --dataloader_num_workers 0"
                )
        elif name != "temporary files" and free < _LOW_DISK:
            yield f"{name} has {free} GiB free: a model's folder alone takes 5 to 17"


def _true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes")


# -- as a text --------------------------------------------------------------------------------


def told(found: Mapping[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for name, section in found.items():
        if name in ("packages", "remarks"):
            continue
        lines += [name, *_indented(section), ""]
    lines += ["packages", *_package_lines(found["packages"]), ""]
    lines += ["remarks", *(f"  - {remark}" for remark in found["remarks"] or ["none"])]
    return "\n".join(lines)


def _indented(section: Mapping[str, Any], depth: int = 1) -> Iterator[str]:
    margin = "  " * depth
    if not section:
        yield f"{margin}none"
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield f"{margin}{name}:"
            yield from _indented(value, depth + 1)
        elif isinstance(value, list | tuple):
            yield from (f"{margin}{name} {n}: {_word(one)}" for n, one in enumerate(value))
        else:
            yield f"{margin}{name}: {_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_word(one)}" for name, one in value.items())
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


def _package_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, row in found.items():
        version = row["version"] or "not installed"
        extras = [one for one in row["for"] if one != "all"]
        whose = f" (extra {', '.join(extras)})" if extras and "all" not in row["for"] else ""
        mark = "" if row["fits"] else "   <- not in this range"
        yield f"  {name} {version}, asked {row['asked'] or 'any'}{whose}{mark}"


if __name__ == "__main__":
    cli.run(main, DoctorArgs, __doc__)
