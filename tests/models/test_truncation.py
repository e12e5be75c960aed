"""Claims about texts that are longer than their encoders read: told apart by encoder, and said."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import demo
from dojo import cli, data
from dojo.inputs import texts
from dojo.models import sd3, sd15
from dojo.models.truncation import find_cut

SHORT = "a red star"
MIDDLE = f"{'a red star and ' * 4}a ring"  # 18 words
LONG = [f"{'a red star and ' * 10}a ring number {i}" for i in (1, 2)]


def sd3_args(folder: Path, tokens: int) -> sd3.ModelArgs:
    return sd3.ModelArgs(pretrained_model_name_or_path=str(folder), max_sequence_length=tokens)


def test_each_encoder_cuts_where_it_does_and_not_before(tiny_sd3: Path) -> None:
    for tokens, over in [(8, [MIDDLE, *LONG]), (30, LONG), (100, [])]:
        args = sd3_args(tiny_sd3, tokens)
        config = sd3.open_model(args)
        found = find_cut([*LONG, SHORT, MIDDLE, "", SHORT], config.readers())
        assert found.count == 5
        assert found.limits == {"CLIP": 20, "T5": tokens}
        cut = {
            name: {text for text in found.texts if name in found.texts[text]}
            for name in found.limits
        }
        assert cut == {"CLIP": set(LONG), "T5": set(over)}
        # What T5 reads whole tells the two apart although CLIP does not.
        assert found.alike == ([] if tokens == 100 else [sorted(LONG)])


@pytest.mark.parametrize("place", range(3))
def test_the_tokens_that_stay_are_those_that_the_tokenizer_leaves(
    tiny_sd3: Path, place: int
) -> None:
    args = sd3_args(tiny_sd3, 12)
    reader = sd3.open_model(args).readers()[place]
    whole = reader.tokenizer(LONG[0])["input_ids"]
    cut = reader.tokenizer(LONG[0], truncation=True, max_length=reader.limit)["input_ids"]
    assert cut == [*whole[: reader.limit - 1], whole[-1]]


def test_texts_that_are_alike_without_a_cut_are_not_counted(tiny_sd15: Path) -> None:
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15))
    readers = sd15.open_model(args).readers()
    assert len({str(readers[0].tokenizer(text)["input_ids"]) for text in ("a  b", "a b")}) == 1
    found = find_cut(["a  b", "a b", *LONG], readers)
    assert found.alike == [LONG]
    assert found.limits == {"CLIP": 20}


def prepared(folder: Path, model: Path, groups: list[list[str]]) -> tuple[list[str], Any]:
    """What the screen and data_report.json say where the texts of a run are encoded."""
    said: list[str] = []
    run: Any = SimpleNamespace(
        main=True,
        say=said.append,
        output_dir=folder,
        dtype=torch.float32,
        device=torch.device("cpu"),
        phase=lambda _: torch.no_grad(),
        share={"process": 0, "num_processes": 1},
        check_shared=lambda folder, flag: None,
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
    )
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(model))
    cache = data.TextCacheArgs(latent_cache_dir=folder / "cache")
    texts.prepare(run, sd15.open_model(args), cache, groups)
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    return [line for line in said if "freed" not in line], report


def test_a_run_says_what_is_cut_and_says_it_again_when_all_is_cached(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data_report.json").write_text('{"train": 7}')
    said, report = prepared(tmp_path, tiny_sd15, [[SHORT, LONG[0]], [*LONG, ""]])
    assert said[0] == "2 of 4 captions and prompts are cut for CLIP, which reads 20 tokens"
    assert "the longest has 51 tokens" in said[1]
    assert said[2].startswith("  2 are the same as another one once they are cut: 'a red star and")
    assert report["train"] == 7
    assert report["texts"] == {"texts": 4, "tokens_of_CLIP": 20, "cut_for_CLIP": 2}
    assert [row["text"] for row in report["cut_texts"]] == LONG
    assert report["texts_alike_when_cut"] == [{"texts": LONG}]

    def refuse(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(texts.truncation, "find_cut", refuse)
    assert prepared(tmp_path, tiny_sd15, [[SHORT, LONG[0]], [*LONG, ""]]) == (said, report)


def test_a_run_whose_texts_are_read_whole_says_nothing(tiny_sd15: Path, tmp_path: Path) -> None:
    said, report = prepared(tmp_path, tiny_sd15, [[SHORT]])
    assert said == []
    assert report["texts"]["cut_for_CLIP"] == 0


def test_the_demo_says_which_prompts_are_cut(
    tiny_sd3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    def call(self: object, prompt: str, max_sequence_length: int = 256, **_: object) -> Any:
        return picture

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)
    flags = ["--pretrained_model_name_or_path", str(tiny_sd3), "--prompt", SHORT, *LONG]
    flags += ["--output_dir", str(tmp_path), "--max_sequence_length", "24", "--seed", "1"]
    demo.main(cli.parse(demo.Args, None, flags))
    told = capsys.readouterr().out
    assert "2 of 3 captions and prompts are cut for CLIP, which reads 20 tokens\n" in told
    assert "2 of 3 captions and prompts are cut for T5, which reads 24 tokens" in told
