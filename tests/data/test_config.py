"""Claims about --data_config: several folders, each with options of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dojo.cli import UserError
from dojo.data import Captioned, DataArgs, Recipe, identified, open_training, verify


def pictures(folder: Path, *names: str, colour: str = "red") -> Path:
    """A folder of pictures 12 x 8, each with a sidecar that holds its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("a", "b"):
        Image.new("RGB", (12, 8), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return folder


def write(path: Path, content: Any) -> Path:
    """A config of that content: JSON, which is YAML as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def opened(config: Path, **flags: Any) -> Captioned:
    return open_training(DataArgs(data_config=config, **flags))


def refusal(config: Path, **flags: Any) -> str:
    with pytest.raises(UserError) as raised:
        opened(config, **flags)
    return str(raised.value)


def test_every_entry_has_its_own_recipe_and_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "dog", "a", "b")
    pictures(tmp_path / "class" / "train", "c")
    pictures(tmp_path / "class" / "other", "d", "e")
    config = tmp_path / "data.yaml"
    config.write_text(
        """\
- path: dog
  resolution: [512, 768]
  repeats: 4
  instance_prompt: 一只 sks 狗   # a comment
  random_crop: true
  aspect_buckets: yes
- path: class
  split: other
  is_regularisation: true
  weight: 0.5
  resolution: 256
  height: 128
  random_flip: false
""",
        encoding="utf-8",
    )
    source = opened(config, random_flip=True, resolution=(64,), repeats=2)
    assert source.captions == [("一只 sks 狗",)] * 2 + [("caption d",), ("caption e",)]
    assert source.recipe(1) == Recipe(
        resolution=(512, 768),
        height=None,
        width=None,
        random_crop=True,
        random_flip=True,
        aspect_buckets=True,
        repeats=4,
    )
    assert source.recipe(2) == Recipe(
        resolution=(256,),
        height=128,
        width=None,
        random_crop=False,
        random_flip=False,
        aspect_buckets=False,
        repeats=2,
        weight=0.5,
        is_regularisation=True,
    )
    first, second = source.description.splitlines()
    assert first.startswith(f"{tmp_path / 'dog'}: 2 pictures")
    assert first.endswith("; used with repeats 4")
    assert "1 .txt" not in second
    assert second.endswith("; used with repeats 2, weight 0.5, regularisation")
    good, bad, sizes = verify(source, on_bad_sample="error", num_threads=1, progress=False)
    assert (good, bad, sizes) == ([0, 1, 2, 3], [], [(8, 12)] * 4)


@pytest.mark.parametrize("name", ["data.json", "data.yaml", "data.YML"])
def test_json_and_yaml_with_and_without_sources_are_alike(tmp_path: Path, name: str) -> None:
    pictures(tmp_path / "dog")
    entries = [{"path": "dog", "caption_strategy": "filename"}]
    sources = [
        opened(write(tmp_path / name, content)) for content in (entries, {"sources": entries})
    ]
    assert sources[0] == sources[1]
    assert sources[0].captions == [("a",), ("b",)]


def test_what_an_entry_does_not_say_comes_from_the_flags(tmp_path: Path) -> None:
    pictures(tmp_path / "dog")
    config = write(tmp_path / "data.json", [{"path": "dog"}])
    flags = {"resolution": (64,), "height": 96, "center_crop": True, "instance_prompt": "x"}
    source = opened(config, **flags)
    assert source.captions == [("x",)] * 2
    assert source.recipe(0) == Recipe.of(DataArgs(dataset_name="a", **flags))


@pytest.mark.parametrize(
    ("flags", "said", "expected"),
    [
        ({"height": 96, "width": 64}, {"resolution": 128}, {"height": None, "resolution": (128,)}),
        ({"height": 96}, {"resolution": [64, 128]}, {"height": None, "resolution": (64, 128)}),
        ({"height": 96}, {"aspect_buckets": True}, {"height": None, "aspect_buckets": True}),
        ({"height": 96}, {"height": 32}, {"height": 32}),
        ({"center_crop": True}, {"random_crop": True}, {"random_crop": True}),
        ({"random_crop": True}, {"center_crop": True}, {"random_crop": False}),
        ({"random_crop": True}, {"random_crop": False}, {"random_crop": False}),
        ({"no_hflip": True}, {"random_flip": True}, {"random_flip": True}),
        ({"aspect_buckets": True}, {"aspect_buckets": False}, {"aspect_buckets": False}),
    ],
)
def test_what_an_entry_says_wins_over_flags_that_contradict_it(
    tmp_path: Path, flags: dict[str, Any], said: dict[str, Any], expected: dict[str, Any]
) -> None:
    pictures(tmp_path / "dog")
    source = opened(write(tmp_path / "data.json", [{"path": "dog", **said}]), **flags)
    recipe = source.recipe(0)
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "said", "captions"),
    [
        ({"instance_prompt": "x"}, {"caption_strategy": "sidecar"}, ("caption a",)),
        ({"instance_prompt": "x"}, {"caption_column": "title"}, ("t",)),
        ({"instance_prompt": "x"}, {"instance_prompt": "y"}, ("y",)),
        ({"instance_prompt": "x"}, {"caption_strategy": "instance"}, ("x",)),
        ({"caption_column": "title"}, {"instance_prompt": "y"}, ("y",)),
        ({"caption_column": "title"}, {"caption_strategy": "filename"}, ("a",)),
        ({"caption_column": "title"}, {"caption_strategy": "column"}, ("t",)),
        ({"caption_strategy": "sidecar"}, {"instance_prompt": "y"}, ("y",)),
        ({"caption_strategy": "sidecar"}, {"caption_column": "title"}, ("t",)),
        ({"caption_strategy": "sidecar"}, {}, ("caption a",)),
        ({}, {}, ("from text",)),
    ],
)
def test_the_captions_an_entry_asks_for_win_over_the_flags(
    tmp_path: Path, flags: dict[str, Any], said: dict[str, Any], captions: tuple[str, ...]
) -> None:
    pictures(tmp_path / "dog", "a")
    row = {"file_name": "a.png", "text": "from text", "title": "t"}
    (tmp_path / "dog" / "metadata.jsonl").write_text(json.dumps(row))
    config = write(tmp_path / "data.json", [{"path": "dog", **said}])
    assert opened(config, **flags).captions == [captions]


def test_paths_start_at_the_config_then_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "configs" / "both", "beside")
    pictures(tmp_path / "work" / "both", "here")
    pictures(tmp_path / "work" / "only", "there")
    pictures(tmp_path / "elsewhere", "absolute")
    monkeypatch.chdir(tmp_path / "work")
    entries = [{"path": "both"}, {"path": "only"}, {"path": str(tmp_path / "elsewhere")}]
    config = write(tmp_path / "configs" / "data.json", entries)
    captions = [("caption beside",), ("caption there",), ("caption absolute",)]
    assert opened(config).captions == captions
    assert opened(Path("../configs/data.json")).captions == captions


def test_a_hub_id_goes_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, cache_dir: str | None) -> Any:
        calls.append((path, name, split, cache_dir))
        return datasets.Dataset.from_dict({"picture": [b"x"], "text": ["t"], "title": [["u", "v"]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = {"path": "a/b", "split": "test", "image_column": "picture", "caption_column": "title"}
    source = opened(write(tmp_path / "data.json", [said]), cache_dir="/cache")
    assert source.captions == [("u", "v")]
    assert calls == [("a/b", None, "test", "/cache")]


def test_a_folder_named_twice_gives_unique_ids_and_its_own_first(tmp_path: Path) -> None:
    pictures(tmp_path / "dog")
    entries = [{"path": "dog"}, {"path": "dog", "resolution": 64}]
    twice = identified(opened(write(tmp_path / "twice.json", entries)), None)
    once = identified(opened(write(tmp_path / "once.json", entries[:1])), None)
    assert twice.ids[:2] == once.ids
    assert len(set(twice.ids)) == 4
    assert [twice.recipe(index).resolution for index in range(4)] == [(512,)] * 2 + [(64,)] * 2


def test_masks_belong_to_their_entry(tmp_path: Path) -> None:
    pictures(tmp_path / "dog", "a")
    pictures(tmp_path / "cat", "a")
    pictures(tmp_path / "cut", "c")
    Image.new("RGBA", (12, 8), (0, 0, 0, 99)).save(tmp_path / "cut" / "c.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (12, 8), 200).save(tmp_path / "masks" / "a.png")
    entries = [
        {"path": "dog", "mask_dir": "masks"},
        {"path": "cat"},
        {"path": "cut", "mask_from_alpha": True},
    ]
    source = opened(write(tmp_path / "data.json", entries), masked_loss_weight=0.1)
    masks = [source.read_mask(index) for index in range(3)]
    assert [mask.getpixel((0, 0)) if mask else None for mask in masks] == [200, None, 99]
    assert source.has_masks
    entries[1]["mask_dir"] = ""  # none, although the flags name some
    del entries[0]["mask_dir"]
    config = write(tmp_path / "data.json", entries)
    again = opened(config, mask_dir=str(tmp_path / "masks"))
    masks = [again.read_mask(index) for index in range(3)]
    assert [mask.getpixel((0, 0)) if mask else None for mask in masks] == [200, None, 99]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"path": "dog", "repeat": 2}], "entry 1: unknown key 'repeat'; did you mean 'repeats'?"),
        ([{"path": "dog", "num_repeats": 2}], "did you mean 'repeats'?"),
        ([{"path": "dog", "is_regularization": True}], "did you mean 'is_regularisation'?"),
        ([{"path": "dog", "xyzzy": 2}], "unknown key 'xyzzy'; there are path, split"),
        ([{"path": "dog"}, {"repeats": 2}], "entry 2 has no path"),
        ([{"path": 7}], "entry 1: path must be text, got 7"),
        ([{"path": "dog", "repeats": 2.5}], "repeats must be a whole number, got 2.5"),
        ([{"path": "dog", "repeats": True}], "repeats must be a whole number, got True"),
        ([{"path": "dog", "repeats": 0}], "entry 1 ({dog}): --repeats must be at least 1"),
        ([{"path": "dog", "weight": "1"}], "weight must be a number, got '1'"),
        ([{"path": "dog", "weight": 0}], "weight must be a finite number above 0, got 0"),
        ([{"path": "dog", "random_flip": 1}], "random_flip must be true or false, got 1"),
        ([{"path": "dog", "random_flip": None}], "random_flip must be true or false, got None"),
        ([{"path": "dog", "resolution": []}], "resolution must be a whole number or a list"),
        ([{"path": "dog", "resolution": [64, "96"]}], "resolution must be a whole number or a"),
        ([{"path": "dog", "caption_strategy": "colum"}], "--caption_strategy must be one of auto"),
        ([{"path": "dog", "caption_strategy": "instance"}], "needs --instance_prompt"),
        ([{"path": "dog", "resolution": [64, 96], "height": 8}], "--height contradicts several"),
        ([{"path": "dog", "split": "test"}], "entry 1 ({dog}): {dog}: --dataset_split names no"),
        ([{"path": "absent/x/y"}], "entry 1 (absent/x/y): absent/x/y: there is no such folder"),
        (["dog"], "entry 1: keys and values are expected, got 'dog'"),
        ({"source": []}, "unknown key 'source'; did you mean 'sources'?"),
        ({}, "a list of entries is expected"),
        ("", "a list of entries is expected"),
        ("dog", "a list of entries is expected"),
        ([], "has no entries"),
        ({"sources": []}, "has no entries"),
        ("- path: [dog", "cannot be read"),
        ("- path: dog\n  path: cat\n", "the key 'path' stands twice in one entry"),
        ("- path: !!python/name:os.system x\n", "cannot be read"),
    ],
)
def test_mistakes_name_file_entry_and_key(tmp_path: Path, content: Any, message: str) -> None:
    dog = pictures(tmp_path / "dog")
    config = write(tmp_path / "data.yaml", content)
    told = refusal(config)
    assert told.startswith(str(config))
    assert message.replace("{dog}", str(dog)) in told


def test_a_file_that_cannot_be_taken_is_named(tmp_path: Path) -> None:
    assert re.search(r"absent\.yaml: there is no such file", refusal(tmp_path / "absent.yaml"))
    assert "a .yaml, .yml or .json file" in refusal(write(tmp_path / "data.txt", []))
    assert "cannot be read" in refusal(write(tmp_path / "data.json", "[{]"))
    assert "stands twice" in refusal(write(tmp_path / "data.json", '[{"path": "a", "path": "b"}]'))
    (tmp_path / "data.yaml").write_bytes("- path: 狗".encode("gbk"))
    assert "cannot be read" in refusal(tmp_path / "data.yaml")


def test_flags_that_no_entry_uses_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "dog")
    entries: list[dict[str, Any]] = [{"path": "dog"}, {"path": "dog", "aspect_buckets": True}]
    config = write(tmp_path / "data.json", entries)
    assert [r.aspect_buckets for r in opened(config, bucket_step=32).recipes] == [False, True]
    config = write(tmp_path / "data.json", entries[:1])
    assert "--bucket_step: no entry of" in refusal(config, bucket_step=32)
    assert "--masked_loss_weight: no entry of" in refusal(config, masked_loss_weight=0.1)
