"""Claims about a run of each kind of script on a base that is stored packed, partly in CPU memory.

What such a network computes is claimed in tests/finetune.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from dojo.cli import UserError
from dojo.finetune import lora
from tests.finetune.test_quantised import write_lycoris
from tests.scripts import runs
from tests.scripts.runs import SCRIPTS, in_process

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread


@dataclass(frozen=True)
class Case:
    """A small script, and how its base is stored."""

    script: str
    precision: str
    more: tuple[str, ...] = ()


CASES = (
    Case("lora_sd3", "nf4", ("--mixed_precision", "bf16")),
    Case("dreambooth_lora_sd15", "int8"),
    Case("dpo_sdxl", "int8", ("--finetune", "lora", "--rank", "2")),
    Case("refl_sdxl", "nf4", ("--gradient_checkpointing",)),
    Case("grpo_sd3", "int8"),
    Case("nft_sd3", "int8"),
    Case("ddpo_sd3", "fp8", ("--gradient_checkpointing",)),
    Case("ddpo_sd15", "nf4"),
)
# Adapters of other kinds; {inputs} is the folder that the commands read.
OTHERS = (
    Case("lora_sd3", "nf4", ("--use_dora", "--mixed_precision", "bf16")),
    Case("lora_sd15", "int8", ("--init_lora_weights_path", "{inputs}/LoKr.safetensors")),
    Case("lora_sd15", "nf4", ("--init_lora_weights_path", "{inputs}/LoHa.safetensors")),
)


def test_the_cases_are_of_every_kind_of_script() -> None:
    kinds = {SCRIPTS[case.script].kind for case in CASES}
    # A word is learned by a network that nothing is added to.
    assert kinds == {script.kind for script in SCRIPTS.values()} - {runs.word}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all commands read."""
    folder = tmp_path_factory.mktemp("runs") / "inputs"
    runs.make_inputs(folder)
    for kind in ("LoHa", "LoKr"):
        write_lycoris(kind, folder / f"{kind}.safetensors", 32)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.script) for case in CASES),
        *(
            pytest.param(case, id=f"{case.script}-{case.precision}", marks=pytest.mark.slow)
            for case in OTHERS
        ),
    ],
)
def test_a_run_on_a_packed_base_goes_on_to_the_bit_wherever_its_weights_lie(
    tmp_path: Path, inputs: Path, case: Case
) -> None:
    if case.precision == "nf4":
        pytest.importorskip("bitsandbytes")
    script = SCRIPTS[case.script]

    def run(name: str, *more: str) -> Path:
        flags = script.flags(inputs, tmp_path / name)
        steps = ("--max_train_steps", "4", "--checkpointing_steps", "2")
        asked = [word.format(inputs=inputs) for word in case.more]
        own = ("--base_precision", case.precision, *asked)
        in_process(script.load(), [*flags, *steps, *own, *more])
        return tmp_path / name / "run"

    whole = run("whole")
    run("parts", "--max_train_steps", "2", "--blocks_on_cpu", "1", "--activations_on_cpu")
    with pytest.raises(UserError, match=f"--base_precision was {case.precision}, now bf16"):
        run("parts", "--base_precision", "bf16")
    parts = run("parts", "--blocks_on_cpu", "2")
    assert runs.adapter_bytes(parts) == runs.adapter_bytes(whole)
    rows = [row for row in runs.timeless(whole) if "loss" in row]
    assert [row for row in runs.timeless(parts) if "loss" in row] == rows
    assert all(row.get("ratio_max_deviation", 0) == 0 for row in rows)
    assert (whole / lora.WEIGHTS).is_file()
    record = json.loads((whole / "args.json").read_text())
    assert record["args"]["lora"]["base_precision"] == case.precision
    assert f"quantised to {case.precision}" in (whole / "README.md").read_text()


def test_a_run_from_before_there_was_a_choice_goes_on(tmp_path: Path, inputs: Path) -> None:
    script = SCRIPTS["lora_sd3"]
    flags = [*script.flags(inputs, tmp_path), "--checkpointing_steps", "1"]
    in_process(script.load(), [*flags, "--max_train_steps", "1"])
    path = tmp_path / "run" / "args.json"
    record = json.loads(path.read_text())
    del record["args"]["lora"]["base_precision"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="--base_precision was bf16, now int8"):
        in_process(script.load(), [*flags, "--max_train_steps", "2", "--base_precision", "int8"])
    in_process(script.load(), [*flags, "--max_train_steps", "2"])
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"step": 2}
