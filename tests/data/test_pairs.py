"""Claims about preference pairs: every schema, the winner the winner, nothing lost or made up."""

import csv
import io
import itertools
import json
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dojo.cli import UserError
from dojo.data import (
    CHOICE_MODELS,
    BadSample,
    Batch,
    Batches,
    CacheArgs,
    Draw,
    Latents,
    PairArgs,
    Pairs,
    PairSet,
    check_pairs,
    collate,
    fit,
    identified,
    open_pairs,
    pair_fingerprint,
    prepare_pairs,
    read_image,
    relabel,
    split_pairs,
)
from dojo.data import shards as disk
from dojo.data.images import Seen, examine
from dojo.data.pairs.choice import Score
from dojo.pocket import scenes

Row = dict[str, Any]
SETTINGS: Mapping[str, object] = {"vae": "v1"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen pictures then make several shards."""
    monkeypatch.setattr(disk, "SHARD_SIZE", 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for busy cores would take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_pictures(count: int) -> dict[str, bytes]:
    """Scenes as PNG files by name, no two alike."""
    source = random.Random(0)
    found: dict[bytes, None] = {}
    while len(found) < count:
        file = io.BytesIO()
        _, scene = scenes.sample(source)
        Image.fromarray(scenes.draw(scene)).save(file, "PNG")
        found.setdefault(file.getvalue())
    return {f"{number}.png": content for number, content in enumerate(found)}


PICTURES = draw_pictures(16)


def folder_of(root: Path, rows: Sequence[Row], kind: str = "jsonl") -> Path:
    """All the pictures, and metadata of one kind that names them."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in PICTURES.items():
        (root / name).write_bytes(content)
    path = root / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                )
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return root


def two(first: int, second: int, label: Any, caption: str | None = "a star") -> Row:
    return {
        "image_0": f"{first}.png",
        "image_1": f"{second}.png",
        "label_0": label,
        "caption": caption,
    }


def args_of(root: Path | str, **options: Any) -> PairArgs:
    return PairArgs(**{"dataset_name": str(root), "resolution": 64, **options})


def opened(root: Path | str, **options: Any) -> Pairs:
    return open_pairs(args_of(root, **options), progress=False)


def numbers_of(pairs: Pairs) -> list[tuple[int, int, str]]:
    """Numbers of the winner's and the loser's picture, told by their pixels, and the caption."""
    by_pixels = {
        read_image(content, name).tobytes(): int(name.removesuffix(".png"))
        for name, content in PICTURES.items()
    }
    assert len(by_pixels) == len(PICTURES)

    def number(index: int) -> int:
        return by_pixels[pairs.pictures.read(index).tobytes()]

    return [(number(pair.winner), number(pair.loser), pair.caption) for pair in pairs.pairs]


def ring(count: int = 8, captions: int | None = None) -> list[Row]:
    """Picture i against i + 1: every picture stands in two pairs."""
    return [
        two(i, (i + 1) % count, (i + 1) % 2, f"caption {i % (captions or count)}")
        for i in range(count)
    ]


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for an autoencoder: [B, 3, H, W] to [B, 3, H / 8, W / 8]."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, mean.abs() + 0.1


def prepared(root: Path, *, no_cache: bool = False, seed: int = 0, **options: Any) -> PairSet:
    args = args_of(root, **options)
    cache = CacheArgs(latent_cache_dir=root.parent / "cache", no_cache_latents=no_cache)
    return prepare_pairs(
        *(open_pairs(args, progress=False), args, cache, encode, SETTINGS),
        seed=seed,
        latent_channels=3,
        pixel_step=8,
    )


def checked_pairs(root: Path, cache: Path) -> Pairs:
    """All pairs of a folder, checked as a run checks them."""
    good, _ = check_pairs(
        *(opened(root), cache / "cache"), on_bad_sample="error", num_threads=1, progress=False
    )
    return good


def first_batches(rows: PairSet, count: int, **options: Any) -> list[Batch]:
    stream = iter(Batches(rows.plan(), seed=rows.seed, **options))
    return [collate([rows[draw] for draw in batch]) for batch in itertools.islice(stream, count)]


def equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "give --dataset_name or --train_data_dir"),
        ({"train_data_dir": "other"}, "--dataset_name and --train_data_dir mean the same"),
        ({"dataset_split": ""}, "--dataset_split"),
        ({"ranked_pairs": "some"}, "--ranked_pairs must be all or best_worst, got 'some'"),
        ({"choice_model": " "}, "--choice_model must not be empty"),
        ({"no_hflip": True, "independent_flip": True}, "--independent_flip contradicts --no_hflip"),
        ({"proportion_empty_prompts": 1.5}, r"--proportion_empty_prompts must lie in \[0, 1\]"),
        ({"proportion_empty_prompts": float("nan")}, "--proportion_empty_prompts"),
        ({"max_train_samples": 0}, "--max_train_samples must be at least 1"),
        ({"resolution": 0}, "--resolution"),
        ({"height": 0}, "--height"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers"),
        ({"on_bad_sample": "ignore"}, "--on_bad_sample"),
        ({"eval_fraction": 1.0}, "--eval_fraction"),
    ],
)
def test_wrong_options_are_refused_by_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args_of("data", **options)


def test_options_parse_and_tell_place_and_size() -> None:
    parsed = tyro.cli(PairArgs, args=["--train-data-dir", "a", "--width", "96"])
    assert (parsed.location, parsed.size, parsed.pictures.size) == ("a", (512, 96), (512, 96))
    assert parsed.pictures.random_flip
    assert not args_of("a", no_hflip=True).pictures.random_flip
    assert args_of("a", choice_model="hps").choice_spec == CHOICE_MODELS["hps"] == "hpsv2.1"
    assert args_of("a", choice_model="aesthetic=1,clip=2").choice_spec == "aesthetic=1,clip=2"
    assert args_of("a").choice_spec is None
    # Diffusion-DPO's names, and files of one's own, whose case counts.
    for typed, ours in {
        "Aesthetics": "aesthetic",
        "CLIP": "clip",
        "PickScore": "pickscore",
        "HPS": "hpsv2.1",
        "Mine.py:Best": "Mine.py:Best",
    }.items():
        assert args_of("a", choice_model=typed).choice_spec == ours


def test_random_crops_need_pictures_encoded_anew(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    args = args_of(root, random_crop=True)
    with pytest.raises(UserError, match="--random_crop, or give --no_cache_latents"):
        args.check(CacheArgs())
    args.check(CacheArgs(no_cache_latents=True))
    args_of(root).check(CacheArgs())
    with pytest.raises(UserError, match="--no_cache_latents"):
        prepared(root, random_crop=True)


# Folders


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_winner_of_a_folder_is_the_winner(tmp_path: Path, kind: str) -> None:
    rows = [two(0, 1, 1.0, "x"), two(2, 3, 0.0, "y"), two(4, 5, 0.5, "z"), two(1, 4, 1.0, " x\n")]
    pairs = opened(folder_of(tmp_path, rows, kind))
    assert numbers_of(pairs) == [(0, 1, "x"), (3, 2, "y"), (1, 4, "x")]
    assert (pairs.num_ties, pairs.num_same, pairs.bad) == (1, 0, [])
    assert len(pairs.pictures) == 5  # picture 1 stands in two pairs, 5 in none
    assert len(set(pairs.pictures.ids)) == 5
    assert pairs.captions == ["x", "y"]
    assert "3 pairs of 5 pictures; pictures from 'image_0' and 'image_1'" in pairs.description
    assert "1 ties" in pairs.description


def test_labels_may_be_written_as_whole_numbers(tmp_path: Path) -> None:
    folder_of(tmp_path, [])
    rows = "image_0,image_1,label_0,prompt\n0.png,1.png,1,a\n0.png,1.png,0,b\n"
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(rows)
    assert numbers_of(opened(tmp_path)) == [(0, 1, "a"), (1, 0, "b")]


def test_the_same_picture_twice_is_no_pair(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path, [two(0, 0, 1), two(0, 1, 1)]))
    assert numbers_of(pairs) == [(0, 1, "a star")]
    assert pairs.num_same == 1


def test_captions_come_from_the_column_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{**two(0, 1, 1, "a"), "prompt": "b", "legend": "c"}]
    root = folder_of(tmp_path, rows)
    assert opened(root).captions == ["a"]
    assert "not used: column 'prompt'" in opened(root).description
    assert opened(root, caption_column="legend").captions == ["c"]
    with pytest.raises(UserError, match=r"no column 'x'.*--caption_column"):
        opened(root, caption_column="x")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label_0": 2}, "label_0 is 2, not 1 (image_0 is preferred), 0 (image_1 is) or 0.5"),
        ({"label_0": None}, "label_0 is None"),
        ({"label_0": "left"}, "label_0 is 'left'"),
        ({"label_0": ""}, "label_0 is ''"),
        ({"label_0": "0,5"}, "label_0 is '0,5'"),
        ({"label_0": "nan"}, "label_0 is 'nan'"),
        ({"caption": None}, "the caption is missing"),
        ({"caption": " "}, "the caption is empty"),
        ({"caption": ["a", "b"]}, "2 captions where one is expected"),
        ({"image_1": "../x.png"}, "'../x.png' climbs out of the folder"),
        ({"image_0": "/x.png"}, "'/x.png' is an absolute path"),
        ({"image_0": None}, "the file name is missing"),
        ({"image_1": "none.png"}, "none.png: there is no such file"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, changes: Row, reason: str) -> None:
    root = folder_of(tmp_path / "set", [two(0, 1, 1), {**two(2, 3, 1), **changes}, two(4, 5, 0)])
    pairs = opened(root)

    def check(**options: Any) -> Any:
        return check_pairs(pairs, tmp_path / "cache", num_threads=1, progress=False, **options)

    with pytest.raises(BadSample) as raised:
        check(on_bad_sample="error")
    assert "1 of 3 pairs cannot be used (--on_bad_sample skip" in str(raised.value)
    assert f"{root / 'metadata.jsonl'} line 2: " in str(raised.value)
    assert reason in str(raised.value)
    good, bad = check(on_bad_sample="skip")
    assert numbers_of(good) == [(0, 1, "a star"), (5, 4, "a star")]
    assert len(good.pictures) == 4
    assert [report.name for report in bad] == [f"{root / 'metadata.jsonl'} line 2"]
    assert reason in bad[0].reason


def test_a_bad_picture_takes_all_its_pairs_along(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring(6))
    (root / "3.png").write_bytes(PICTURES["3.png"][:200])
    good, bad = check_pairs(
        *(opened(root), tmp_path / "cache"), on_bad_sample="skip", num_threads=2, progress=False
    )
    assert [numbers[:2] for numbers in numbers_of(good)] == [(0, 1), (2, 1), (4, 5), (0, 5)]
    assert good.pictures.sizes == [(64, 64)] * 5
    assert [report.name.rpartition(" ")[2] for report in bad] == ["3", "4"]
    assert all(f"{root / '3.png'}: " in report.reason for report in bad)
    with pytest.raises(BadSample, match=r"2 of 6 pairs(.|\n)*3\.png: "):
        check_pairs(*(opened(root), tmp_path / "cache"), on_bad_sample="error", num_threads=2)
    for name in PICTURES:
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable sample(.|\n)*the file is empty"):
        check_pairs(*(opened(root), tmp_path / "cache"), on_bad_sample="skip", num_threads=1)


def test_files_beside_the_pairs_are_counted(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring(4))
    (root / "IMG_1.CR2").write_bytes(b"x")
    (root / "spare.png").write_bytes(PICTURES["0.png"])
    pairs = opened(root)
    assert [(one.count, one.kind) for one in pairs.pictures.unread] == [
        (len(PICTURES) + 1 - 4, "pictures that metadata.jsonl does not name"),
        (1, ".cr2 files"),
    ]
    assert (
        f"not read: {len(PICTURES) - 3} pictures that metadata.jsonl does not name"
        in pairs.description
    )


def test_pictures_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dojo.data.sources import captioned as sources

    read: list[str] = []

    def counted(source: Any, name: str) -> Seen:
        read.append(Path(name).name)
        return examine(source, name)

    monkeypatch.setattr(sources, "examine", counted)
    pairs = opened(folder_of(tmp_path / "set", ring(6)))
    for _ in range(2):
        check_pairs(
            *(pairs, tmp_path / "cache"), on_bad_sample="error", num_threads=1, progress=False
        )
    assert sorted(read) == [f"{i}.png" for i in range(6)]


def test_what_holds_no_pairs_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        opened(tmp_path / "no" / "where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no pairs found; looked for metadata\.csv"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match="neither the columns image_0 and image_1 or jpg_0 and"):
        opened(folder_of(tmp_path / "a", [{"file_name": "0.png", "text": "x"}]))
    with pytest.raises(UserError, match=r"no column 'label_0'.*--choice_model"):
        opened(folder_of(tmp_path / "b", [{"image_0": "0.png", "image_1": "1.png", "text": "x"}]))
    with pytest.raises(UserError, match="no pair with a preference; 1 ties"):
        opened(folder_of(tmp_path / "c", [two(0, 1, 0.5)]))


def test_a_model_that_chooses_takes_ties_and_needs_no_labels(tmp_path: Path) -> None:
    rows = [two(0, 1, 0.5), two(2, 3, 0), two(4, 5, "?")]
    pairs = opened(folder_of(tmp_path / "a", rows), choice_model="clip")
    assert [numbers[:2] for numbers in numbers_of(pairs)] == [(0, 1), (2, 3), (4, 5)]
    assert (pairs.num_ties, pairs.bad) == (0, [])
    bare = [{k: v for k, v in row.items() if k != "label_0"} for row in rows]
    assert len(opened(folder_of(tmp_path / "b", bare), choice_model="clip")) == 3


def test_a_split_is_a_folder(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", [two(0, 1, 1)])
    folder_of(tmp_path / "test", [two(2, 3, 1)])
    assert [numbers[:2] for numbers in numbers_of(opened(tmp_path))] == [(0, 1)]
    held_out = opened(tmp_path, dataset_split="test")
    assert [numbers[:2] for numbers in numbers_of(held_out)] == [(2, 3)]


def test_one_metadata_file_may_serve_several_splits(tmp_path: Path) -> None:
    rows = []
    for split, row in (("train", two(0, 1, 1)), ("test", two(2, 3, "bad"))):
        folder_of(tmp_path / split, []).joinpath("metadata.jsonl").unlink()
        rows.append(row | {key: f"{split}/{row[key]}" for key in ("image_0", "image_1")})
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pairs = opened(tmp_path)
    assert [numbers[:2] for numbers in numbers_of(pairs)] == [(0, 1)]
    assert pairs.bad == []
    assert [report.reason[:7] for report in opened(tmp_path, dataset_split="test").bad] == [
        "label_0"
    ]


# Ranked lists


def listed(*numbers: int, scores: list[Any] | None = None, caption: str = "x") -> Row:
    row: Row = {"images": [f"{number}.png" for number in numbers], "caption": caption}
    return row if scores is None else {**row, "scores": scores}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_ranked_lists_make_all_pairs_or_the_widest(tmp_path: Path, kind: str) -> None:
    root = folder_of(tmp_path, [listed(2, 0, 1), listed(4, 3, caption="y")], kind)
    assert numbers_of(opened(root)) == [(2, 0, "x"), (2, 1, "x"), (0, 1, "x"), (4, 3, "y")]
    widest = opened(root, ranked_pairs="best_worst")
    assert numbers_of(widest) == [(2, 1, "x"), (4, 3, "y")]
    assert len(widest.pictures) == 4


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_scores_rank_and_equal_ones_make_no_pair(tmp_path: Path, kind: str) -> None:
    rows = [
        listed(0, 1, 2, 3, scores=[0.5, 2.0, 0.5, -1.0]),
        listed(4, 5, scores=[1.0, 1.0]),
    ]
    root = folder_of(tmp_path, rows, kind)
    pairs = opened(root)
    assert [numbers[:2] for numbers in numbers_of(pairs)] == [
        (1, 0),
        (1, 2),
        (1, 3),
        (0, 3),
        (2, 3),
    ]
    assert pairs.num_ties == 2
    widest = opened(root, ranked_pairs="best_worst")
    assert [numbers[:2] for numbers in numbers_of(widest)] == [(1, 3)]
    assert widest.num_ties == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (listed(0), "images holds 1 pictures; a pair needs 2"),
        ({**listed(0, 1), "images": "0.png"}, "images is '0.png', not a list"),
        ({**listed(0, 1), "images": None}, "images is None, not a list"),
        ({**listed(0, 1), "images": ["0.png", "../1.png"]}, "climbs out"),
        (listed(0, 1, scores=[1]), "1 scores for 2 pictures"),
        (listed(0, 1, scores=[1, "much"]), "are not all numbers"),
        (listed(0, 1, scores=[1, None]), "are not all numbers"),
        (listed(0, 1, scores=[1, "2,5"]), "'2,5' is no finite number, written without commas"),
        (listed(0, 1, scores=[1, "nan"]), "are not all numbers"),
    ],
)
def test_a_bad_list_is_a_bad_row(tmp_path: Path, row: Row, reason: str) -> None:
    good = listed(2, 3) | ({"scores": [2, 1]} if "scores" in row else {})
    pairs = opened(folder_of(tmp_path, [good, row]))
    assert [numbers[:2] for numbers in numbers_of(pairs)] == [(2, 3)]
    assert [report.name for report in pairs.bad] == [f"{tmp_path / 'metadata.jsonl'} line 2"]
    assert reason in pairs.bad[0].reason


# Tables


def pick_a_pic(rows: Sequence[tuple[int, int, float, str | None]], *, uids: bool) -> Row:
    """Columns as Pick-a-Pic v2 has them."""
    table: Row = {
        "jpg_0": [PICTURES[f"{first}.png"] for first, *_ in rows],
        "jpg_1": [PICTURES[f"{second}.png"] for _, second, *_ in rows],
        "label_0": [label for *_, label, _ in rows],
        "caption": [caption for *_, caption in rows],
    }
    if uids:
        table["image_0_uid"] = [f"uid-{first}" for first, *_ in rows]
        table["image_1_uid"] = [f"uid-{second}" for _, second, *_ in rows]
    return table


ROWS = [(0, 1, 1.0, "a"), (2, 3, 0.0, "b"), (4, 5, 0.5, "c"), (1, 6, 1.0, "a"), (7, 7, 1.0, "d")]
EXPECTED = [(0, 1, "a"), (3, 2, "b"), (1, 6, "a")]


@pytest.mark.parametrize("uids", [False, True])
@pytest.mark.parametrize("kind", ["parquet of bytes", "parquet of pictures", "saved", "hub"])
def test_pick_a_pic_is_read_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, uids: bool
) -> None:
    import datasets

    table = pick_a_pic(ROWS, uids=uids)
    dataset = datasets.Dataset.from_dict(table)
    root: Path | str = tmp_path / "set"
    options = {"cache_dir": str(tmp_path / "downloads")}
    if kind == "parquet of pictures":
        for column in ("jpg_0", "jpg_1"):
            dataset = dataset.cast_column(column, datasets.Image())
    if kind == "saved":
        dataset.save_to_disk(root)
    elif kind == "hub":
        root = "someone/pickapic"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    else:
        tmp_path.joinpath("set").mkdir()
        dataset.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    pairs = opened(root, **options)
    assert numbers_of(pairs) == EXPECTED
    assert (pairs.num_ties, pairs.num_same) == (1, 1)
    assert len(pairs.pictures) == 5  # picture 1 is known again in another column
    assert opened(root, **options).fingerprint == pairs.fingerprint
    assert len(pickle.dumps(pairs)) < 20_000
    good, bad = check_pairs(
        *(pairs, tmp_path / "cache"), on_bad_sample="error", num_threads=1, progress=False
    )
    assert (numbers_of(good), bad) == (EXPECTED, [])


def test_bad_rows_and_pictures_of_a_table_are_named(tmp_path: Path) -> None:
    import datasets

    rows = [*ROWS[:2], (4, 5, 0.7, "c"), (6, 7, 1.0, None), (8, 9, 1.0, "e")]
    table = pick_a_pic(rows, uids=False)
    table["jpg_1"][4] = b""
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    pairs = opened(tmp_path / "set")
    good, bad = check_pairs(
        *(pairs, tmp_path / "cache"), on_bad_sample="skip", num_threads=1, progress=False
    )
    assert numbers_of(good) == EXPECTED[:2]
    told = {report.name.rpartition("set ")[2]: report.reason for report in bad}
    assert list(told) == ["row 2", "row 3", "row 4"]
    assert "label_0 is 0.7" in told["row 2"]
    assert told["row 3"] == "the caption is missing"
    assert told["row 4"].endswith("row 4 jpg_1: the file is empty")
    with pytest.raises(BadSample, match="3 of 5 pairs"):
        check_pairs(*(pairs, tmp_path / "cache"), on_bad_sample="error", num_threads=1)


def test_rows_without_a_label_of_their_own_are_ties(tmp_path: Path) -> None:
    import datasets

    table = pick_a_pic(ROWS[:2], uids=False) | {"has_label": [True, False]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path)
    pairs = opened(tmp_path)
    assert numbers_of(pairs) == EXPECTED[:1]
    assert pairs.num_ties == 1


NO = [False, 0, 0.0, "False", "false", "no", "0", "0.0", "F", None, "", "nan", float("nan")]
YES = [True, 1, 1.0, "True", "TRUE", "yes", "1", "1.0", " t "]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_no_pair_without_a_label_is_trained_on_however_that_is_spelled(
    tmp_path: Path, kind: str
) -> None:
    words = [*NO, *YES]
    rows = [{**two(0, 1, 1, f"{place}"), "has_label": word} for place, word in enumerate(words)]
    pairs = opened(folder_of(tmp_path, rows, kind))
    assert [pair.caption for pair in pairs.pairs] == [f"{len(NO) + k}" for k in range(len(YES))]
    assert (pairs.num_ties, pairs.bad) == (len(NO), [])


def test_a_label_that_is_neither_yes_nor_no_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{**two(0, 1, 1), "has_label": word} for word in ("true", "maybe", 2, "-1", [])]
    pairs = opened(folder_of(tmp_path, rows))
    assert len(pairs) == 1
    assert [row.reason for row in pairs.bad] == [
        f"has_label: {word!r} is neither true nor false" for word in ("maybe", 2, "-1", [])
    ]


def test_a_row_that_leaves_has_label_out_has_none(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path, [{**two(0, 1, 1), "has_label": True}, two(2, 3, 1)]))
    assert numbers_of(pairs) == [(0, 1, "a star")]
    assert pairs.num_ties == 1


def test_labels_may_be_words_and_numbers_have_all_their_spellings(tmp_path: Path) -> None:
    labels = ["True", "no", True, "1e0", " .5 ", "0.", "+1"]
    rows = [two(0, 1, label, f"{place}") for place, label in enumerate(labels)]
    pairs = opened(folder_of(tmp_path, rows))
    winners = [(pair[2], pair[0]) for pair in numbers_of(pairs)]
    assert winners == [("0", 0), ("1", 1), ("2", 0), ("3", 0), ("5", 1), ("6", 0)]
    assert pairs.num_ties == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_of_ranks_is_read_and_the_first_is_the_best(tmp_path: Path, kind: str) -> None:
    lists = [{**listed(0, 1, 2), "rank": [2, 1, 2]}]
    pairs = opened(folder_of(tmp_path / "lists", lists, kind))
    assert [numbers[:2] for numbers in numbers_of(pairs)] == [(1, 0), (1, 2)]
    assert pairs.num_ties == 1
    rows = [{"image_0": "0.png", "image_1": "1.png", "rank": [2, 1], "caption": "x"}]
    assert numbers_of(opened(folder_of(tmp_path / "two", rows, kind))) == [(1, 0, "x")]
    both = [{**two(0, 1, 1), "rank": [2, 1]}]
    pairs = opened(folder_of(tmp_path / "both", both, kind))
    assert numbers_of(pairs) == [(0, 1, "a star")]
    assert "not used: column 'rank'" in pairs.description


@pytest.mark.parametrize("pictures", [False, True])
def test_ranked_lists_of_a_table_are_read(tmp_path: Path, pictures: bool) -> None:
    import datasets

    lists = [[2, 0, 1], [4, 2], [3]]
    table = {
        "images": [[PICTURES[f"{number}.png"] for number in some] for some in lists],
        "scores": [[3.0, 1.0, 1.0], [0.0, 1.0], [1.0]],
        "prompt": ["x", "y", "z"],
    }
    dataset = datasets.Dataset.from_dict(table)
    if pictures:
        dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(tmp_path)
    pairs = opened(tmp_path)
    assert numbers_of(pairs) == [(2, 0, "x"), (2, 1, "x"), (2, 4, "y")]
    assert pairs.num_ties == 1
    assert len(pairs.pictures) == 4
    assert [report.reason for report in pairs.bad] == ["images holds 1 pictures; a pair needs 2"]


def test_columns_that_hold_no_pictures_are_refused(tmp_path: Path) -> None:
    import datasets

    table = pick_a_pic(ROWS, uids=False) | {"jpg_1": [1] * len(ROWS)}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="column 'jpg_1' holds no pictures but"):
        opened(tmp_path)


# Splitting


def test_no_caption_is_on_both_sides(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path, ring(16, captions=8)))
    train, held_out = split_pairs(pairs, eval_fraction=0.25)
    assert held_out is not None
    assert (len(train), len(held_out)) == (12, 4)
    assert not set(train.captions) & set(held_out.captions)
    assert sorted(numbers_of(train) + numbers_of(held_out)) == sorted(numbers_of(pairs))
    reversed_pairs = pairs.with_pairs(pairs.pairs[::-1])
    _, same = split_pairs(reversed_pairs, eval_fraction=0.25)
    assert same is not None
    assert same.captions == held_out.captions
    few, still_held_out = split_pairs(pairs, eval_fraction=0.25, max_train_samples=3)
    assert numbers_of(few) == numbers_of(train)[:3]
    assert still_held_out == held_out


def test_a_split_leaves_something_on_both_sides(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path, ring(8, captions=2)))
    for fraction in (0.01, 0.99):
        train, held_out = split_pairs(pairs, eval_fraction=fraction)
        assert held_out is not None
        assert (len(train), len(held_out)) == (4, 4)
    assert split_pairs(pairs, eval_fraction=0.0)[1] is None
    with pytest.raises(UserError, match=r"--eval_fraction 0\.5 needs pairs of 2 captions"):
        split_pairs(opened(folder_of(tmp_path, ring(8, captions=1))), eval_fraction=0.5)


# Rows


def test_rows_show_the_winner_first(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", [two(0, 1, 1, "x"), two(2, 3, 0, "y")])
    rows = prepared(root, no_cache=True, no_hflip=True)
    for draw, winner, loser in zip(rows.draws(), (0, 3), (1, 2), strict=True):
        row = rows[draw]
        for pixels, number in zip(row["pixels"], (winner, loser), strict=True):
            picture = read_image(PICTURES[f"{number}.png"], "")
            assert torch.equal(pixels, fit(picture, 64, 64))
    assert [rows[draw]["caption"] for draw in rows.draws()] == ["x", "y"]


def test_cached_latents_are_those_encoded_on_the_fly(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    cached, fresh = prepared(root), prepared(root, no_cache=True)
    assert isinstance(cached.rows, Latents)
    for one, other in zip(
        first_batches(cached, 6, batch_size=3), first_batches(fresh, 6, batch_size=3), strict=True
    ):
        assert one["mean"].shape == (3, 2, 3, 8, 8)
        assert other["pixels"].shape == (3, 2, 3, 64, 64)
        assert one["mean"].dtype == other["pixels"].dtype == torch.float32
        mean, std = encode(other["pixels"].flatten(0, 1))
        assert torch.equal(one["mean"].flatten(0, 1), mean)
        assert torch.equal(one["std"].flatten(0, 1), std)
        assert (one["caption"], one["place"]) == (other["caption"], other["place"])


def mirrors(rows: PairSet, count: int) -> list[tuple[bool, bool]]:
    """Whether the winner and the loser of pair 0 are mirrored, at many places."""
    found = []
    plain = rows.still()[Draw(0, 0, (64, 64))]["pixels"]
    assert not torch.equal(plain, plain.flip(-1))
    for place in range(count):
        seen = rows[Draw(0, place, (64, 64))]["pixels"]
        both = [torch.equal(one, other.flip(-1)) for one, other in zip(seen, plain, strict=True)]
        for one, other, mirrored in zip(seen, plain, both, strict=True):
            assert mirrored or torch.equal(one, other)
        found.append((both[0], both[1]))
    return found


def lopsided(root: Path) -> Path:
    """A pair of pictures that show whether they are mirrored."""
    root.mkdir(parents=True)
    for number, colours in enumerate(["red", "blue"]):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colours, (0, 0, 20, 64))
        picture.save(root / f"{number}.png")
    (root / "metadata.jsonl").write_text(json.dumps(two(0, 1, 1)))
    return root


def test_both_pictures_are_mirrored_alike_unless_asked_otherwise(tmp_path: Path) -> None:
    root = lopsided(tmp_path / "set")
    alike = mirrors(prepared(root, no_cache=True), 200)
    assert all(winner == loser for winner, loser in alike)
    assert 70 < sum(winner for winner, _ in alike) < 130
    apart = mirrors(prepared(root, no_cache=True, independent_flip=True), 200)
    assert {(winner, loser) for winner, loser in apart} == set(
        itertools.product([False, True], repeat=2)
    )
    assert 70 < sum(winner == loser for winner, loser in apart) < 130
    assert not any(map(any, mirrors(prepared(root, no_cache=True, no_hflip=True), 50)))
    assert not any(map(any, mirrors(prepared(root, no_cache=True).still(), 50)))


@pytest.mark.parametrize("options", [{}, {"independent_flip": True}, {"no_hflip": True}])
def test_the_cache_holds_every_view(tmp_path: Path, options: dict[str, Any]) -> None:
    root = lopsided(tmp_path / "set")
    cached, fresh = prepared(root, **options), prepared(root, no_cache=True, **options)
    for place in range(30):
        draw = Draw(0, place, (64, 64))
        assert torch.equal(cached[draw]["mean"], encode(fresh[draw]["pixels"])[0])


def test_random_crops_are_drawn_for_each_picture(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", [two(0, 1, 1)])
    wide = Image.linear_gradient("L").rotate(90).resize((256, 64)).convert("RGB")
    for name in ("0.png", "1.png"):
        wide.save(root / name)
    # Twice the same picture under two names: crops at the same place would be equal.
    rows = prepared(root, no_cache=True, random_crop=True, no_hflip=True)
    seen = [rows[Draw(0, place, (64, 64))]["pixels"] for place in range(20)]
    assert not any(torch.equal(one[0], one[1]) for one in seen)
    assert len({one.numpy().tobytes() for one in seen}) == 20
    again = [rows[Draw(0, place, (64, 64))]["pixels"] for place in range(20)]
    assert all(map(torch.equal, seen, again))
    centre = rows.still()[Draw(0, 3, (64, 64))]["pixels"]
    assert torch.equal(centre[0], centre[1])


def test_the_share_of_empty_prompts_is_kept(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    rows = prepared(root, proportion_empty_prompts=0.25)
    places = [rows[Draw(0, place, (64, 64))]["caption"] for place in range(400)]
    assert set(places) == {"", "caption 0"}
    assert 70 < places.count("") < 130
    assert rows.texts() == ["", *(f"caption {i}" for i in range(8))]
    still = rows.still()
    assert "" not in still.texts()
    assert {still[Draw(0, place, (64, 64))]["caption"] for place in range(50)} == {"caption 0"}
    assert "" not in prepared(root).texts()


def test_an_epoch_shows_every_pair_once(tmp_path: Path) -> None:
    rows = prepared(folder_of(tmp_path / "set", ring()))
    assert rows.plan().samples_per_epoch == len(rows) == 8
    for epoch in range(2):
        batches = first_batches(rows, 2, batch_size=4, first_batch=2 * epoch)
        seen = sorted(caption for batch in batches for caption in batch["caption"])
        assert seen == [f"caption {i}" for i in range(8)]


def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    options = {"proportion_empty_prompts": 0.3, "independent_flip": True}
    whole = first_batches(prepared(root, **options), 7, batch_size=3)
    for first in (1, 3, 6):
        rest = first_batches(prepared(root, **options), 7 - first, batch_size=3, first_batch=first)
        assert all(map(equal, whole[first:], rest))


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    rows = prepared(root, proportion_empty_prompts=0.3)
    alone = first_batches(rows, 5, batch_size=4)
    shared = [
        first_batches(rows, 5, batch_size=2, process=process, num_processes=2)
        for process in range(2)
    ]
    for one, first, second in zip(alone, *shared, strict=True):
        assert torch.equal(one["mean"], torch.cat([first["mean"], second["mean"]]))
        assert one["caption"] == first["caption"] + second["caption"]


def test_processes_share_the_encoding_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    args = args_of(root)
    pairs = open_pairs(args, progress=False)
    encoded: list[int] = []

    def counted(pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoded.append(len(pixels))
        return encode(pixels)

    def prepare(process: int, num_processes: int) -> PairSet:
        return prepare_pairs(
            *(pairs, args, CacheArgs(latent_cache_dir=tmp_path / "cache"), counted, SETTINGS),
            seed=0,
            latent_channels=3,
            pixel_step=8,
            process=process,
            num_processes=num_processes,
        )

    prepare(0, 2)
    assert 0 < sum(encoded) < 16
    rows = prepare(1, 2)
    assert sum(encoded) == 16  # eight pictures, each in two pairs, plain and mirrored
    prepare(0, 1)
    assert sum(encoded) == 16
    alone = prepared(folder_of(tmp_path / "other" / "set", ring()))
    one, other = (first_batches(each, 3, batch_size=4) for each in (rows, alone))
    assert all(map(equal, one, other))


def test_rows_are_read_by_workers(tmp_path: Path) -> None:
    rows = prepared(folder_of(tmp_path / "set", ring()))
    loader = DataLoader(
        rows,
        batch_sampler=Batches(rows.plan(), 2, seed=0),
        collate_fn=collate,
        num_workers=1,
    )
    assert equal(next(iter(loader)), first_batches(rows, 1, batch_size=2)[0])


def test_a_size_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resolution 60 is not a multiple of 8"):
        prepared(folder_of(tmp_path / "set", ring()), resolution=60)


def test_the_fingerprint_tells_pairs_and_their_use_apart(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring())
    pairs = opened(root)
    pairs = replace(pairs, pictures=identified(pairs.pictures, None))
    ways = [
        {},
        {"resolution": 32},
        {"no_hflip": True},
        {"independent_flip": True},
        {"random_crop": True},
        {"proportion_empty_prompts": 0.1},
    ]
    found = {pair_fingerprint(pairs, args_of(root, **way)) for way in ways}
    others = [
        pairs.with_pairs(pairs.pairs[:-1]),
        pairs.with_pairs(pairs.pairs[::-1]),
        pairs.with_pairs([pair._replace(caption="x") for pair in pairs.pairs]),
        pairs.with_pairs(
            [pair._replace(winner=pair.loser, loser=pair.winner) for pair in pairs.pairs]
        ),
    ]
    found.update(pair_fingerprint(other, args_of(root)) for other in others)
    assert len(found) == len(ways) + len(others)
    rows = prepared(root)
    assert rows.fingerprint == rows.still().fingerprint == pair_fingerprint(pairs, args_of(root))


# Choosing


class Judge:
    """Scores a picture by a table of its number, and counts what it is asked."""

    def __init__(self, scores: Callable[[int, str], float], fail_after: int = 10**9) -> None:
        self.by_pixels = {
            fit(read_image(content, name), 64, 64).numpy().tobytes(): int(name[:-4])
            for name, content in PICTURES.items()
        }
        self.scores = scores
        self.asked: list[tuple[int, str]] = []
        self.fail_after = fail_after

    def load(self) -> Score:
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        assert images.shape == (len(prompts), 3, 64, 64)
        assert images.min() >= 0
        assert 0.5 < images.max() <= 1
        if len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        numbers = [
            self.by_pixels[((image * 255).round() / 127.5 - 1).numpy().tobytes()]
            for image in images
        ]
        self.asked += zip(numbers, prompts, strict=True)
        scores = torch.tensor([self.scores(*use) for use in zip(numbers, prompts, strict=True)])
        return scores, scores < 100


def chosen(pairs: Pairs, judge: Judge, folder: Path, **options: Any) -> Any:
    return relabel(
        *(pairs, judge.load, folder / "choice.csv", folder / "cache", {"choice_model": "judge"}),
        **options,
    )


def test_a_model_flips_labels_and_drops_what_it_cannot_choose(tmp_path: Path) -> None:
    rows = [two(0, 1, 1, "x"), two(2, 3, 1, "x"), two(4, 5, 0, "y"), two(6, 7, 1, "y")]
    rows += [two(0, 8, 1, "x"), two(0, 9, 1, "x")]
    pairs = opened(folder_of(tmp_path / "set", rows), choice_model="judge")
    scores = {0: 1.0, 1: 2.0, 2: 0.3, 3: 0.1, 4: 5.0, 5: 5.0, 6: -1, 7: 7, 8: 200, 9: float("nan")}
    judge = Judge(lambda number, _: scores[number])
    choice = chosen(pairs, judge, tmp_path)
    assert numbers_of(choice.pairs) == [(1, 0, "x"), (2, 3, "x"), (7, 6, "y")]
    assert len(choice.pairs.pictures) == 6
    assert (choice.num_flipped, choice.num_equal, choice.num_invalid) == (2, 1, 2)
    assert "3 pairs chosen by the model, 2 of them against" in choice.description
    assert sorted(judge.asked) == sorted(
        [*((n, "x") for n in (0, 1, 2, 3, 8, 9)), *((n, "y") for n in (4, 5, 6, 7))]
    )
    with (tmp_path / "choice.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label_0"] for row in table] == ["0", "1", "0.5", "0", "", ""]
    assert [row["score_1"] for row in table] == ["2", "0.100000001", "5", "7", "", ""]
    assert table[0]["image_0"] == str(tmp_path / "set" / "0.png")
    assert table[0]["caption"] == "x"


def test_scores_hang_on_the_caption_too(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path / "set", [two(0, 1, 1, "x"), two(0, 1, 1, "y")]))
    judge = Judge(lambda number, prompt: number if prompt == "x" else -number)
    assert numbers_of(chosen(pairs, judge, tmp_path).pairs) == [(1, 0, "x"), (0, 1, "y")]


def test_nothing_is_scored_twice_and_the_model_is_not_loaded_in_vain(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", ring(8, captions=1))
    pairs = checked_pairs(root, tmp_path)
    judge = Judge(lambda number, _: number)
    first = chosen(pairs, judge, tmp_path)
    assert len(judge.asked) == 8  # each stands in two pairs

    def refuse() -> Score:
        raise AssertionError("loaded")

    settings = {"choice_model": "judge"}
    again = relabel(pairs, refuse, tmp_path / "again.csv", tmp_path / "cache", settings)
    assert again == first
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "choice.csv").read_bytes()
    with pytest.raises(AssertionError, match="loaded"):  # another model has other scores
        relabel(pairs, refuse, tmp_path / "x.csv", tmp_path / "cache", {"choice_model": "other"})
    (root / "3.png").write_bytes(PICTURES["3.png"] + b" ")
    chosen(checked_pairs(root, tmp_path), judge, tmp_path)
    assert 8 < len(judge.asked) <= 8 + 4  # the shard around the picture that changed


def test_a_killed_choice_goes_on_where_it_was(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path / "set", ring(16)))
    whole = Judge(lambda number, prompt: (number * 7 + len(prompt)) % 11)
    expected = chosen(pairs, whole, tmp_path / "whole")
    assert len(whole.asked) == 32
    killed = Judge(whole.scores, fail_after=16)
    with pytest.raises(KeyboardInterrupt):
        chosen(pairs, killed, tmp_path)
    assert not (tmp_path / "choice.csv").exists()
    second = Judge(whole.scores)
    assert chosen(pairs, second, tmp_path) == expected
    assert len(killed.asked) >= 16
    assert sorted(killed.asked + second.asked) == sorted(whole.asked)
    one, other = (folder / "choice.csv" for folder in (tmp_path, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_two_processes_choose_as_one(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path / "set", ring(16)))
    alone = Judge(lambda number, prompt: (number * 7 + len(prompt)) % 11)
    expected = chosen(pairs, alone, tmp_path / "alone")
    judges = [Judge(alone.scores), Judge(alone.scores)]
    barrier = threading.Barrier(2, timeout=60)

    def work(process: int) -> Any:
        return chosen(
            *(pairs, judges[process], tmp_path),
            process=process,
            num_processes=2,
            wait=lambda: barrier.wait() and None,
        )

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [expected, expected]
    assert all(judge.asked for judge in judges)
    assert sorted(judges[0].asked + judges[1].asked) == sorted(alone.asked)
    one, other = (folder / "choice.csv" for folder in (tmp_path, tmp_path / "alone"))
    assert one.read_bytes() == other.read_bytes()


def test_a_model_without_a_preference_is_an_error(tmp_path: Path) -> None:
    pairs = opened(folder_of(tmp_path / "set", ring()))
    with pytest.raises(UserError, match="--choice_model prefers no picture of 8 pairs: 8 have"):
        chosen(pairs, Judge(lambda *_: 1.0), tmp_path)


def test_pictures_of_several_sizes_are_scored(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", [two(0, 1, 1), two(2, 3, 1)])
    Image.new("RGB", (30, 20), "red").save(root / "1.png")
    shapes: list[tuple[int, ...]] = []

    def load() -> Score:
        def score(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(images.shape))
            return images.mean((1, 2, 3)).double(), torch.ones(len(prompts), dtype=torch.bool)

        return score

    choice = relabel(opened(root), load, tmp_path / "c.csv", tmp_path / "cache", {})
    assert len(choice.pairs) == 2
    assert (1, 3, 20, 30) in shapes
    assert sum(shape[0] for shape in shapes) == 4


def test_pairs_of_a_table_may_name_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    root = folder_of(tmp_path / "set", [two(0, 1, 1)])
    (root / "metadata.jsonl").unlink()
    names = {"image_0": ["0.png", "2.png", "../3.png"], "image_1": ["1.png", "/1.png", "3.png"]}
    table = {**names, "label_0": [1, 1, 1], "caption": ["a", "b", "c"]}
    datasets.Dataset.from_dict(table).to_parquet(root / "x.parquet")
    lists = {"images": [["1.png", "0.png"], ["2.png", "../3.png"]], "caption": ["a", "b"]}
    (tmp_path / "lists").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / "lists" / name).write_bytes(PICTURES[name])
    datasets.Dataset.from_dict(lists).to_parquet(tmp_path / "lists" / "x.parquet")
    monkeypatch.chdir(tmp_path)  # from where no path leads to a picture
    for folder, expected, told in [
        (root, [(0, 1, "a")], ["absolute path", "climbs out"]),
        (tmp_path / "lists", [(1, 0, "a")], ["climbs out"]),
    ]:
        pairs = opened(folder, cache_dir=str(tmp_path / "downloads"))
        assert numbers_of(pairs) == expected
        assert len(pairs.bad) == len(told)
        assert all(word in row.reason for word, row in zip(told, pairs.bad, strict=True))
