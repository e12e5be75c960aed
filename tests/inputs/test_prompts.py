"""Claims about the prompts of reinforcement learning: read, merged, held out, drawn."""

import dataclasses
import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dojo import rng
from dojo.cli import UserError
from dojo.data import CacheArgs, CaptionArgs, DataArgs
from dojo.evaluate import ValidationArgs
from dojo.inputs.prompts import Prompt, PromptArgs, Prompts, open_prompts, read_file
from dojo.models.sd3 import ModelArgs
from dojo.pocket import scenes
from dojo.run.optim import OptimArgs
from dojo.run.run import RunArgs
from tests.conftest import ROOT
from tests.processes import together

REAL = ROOT.parent / "shared" / "data" / "prompts"


def lines_file(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def opened(path: Path, **options: Any) -> Prompts:
    return open_prompts(PromptArgs(prompt_file=path, **options))


def texts(prompts: tuple[Prompt, ...] | list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def set_of(count: int) -> Prompts:
    train = tuple(Prompt(text=f"prompt {i}") for i in range(count))
    return Prompts(train=train, held_out=(), description="")


# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--prompt_file, --prompt_set, --prompt_dataset_name"),
        ({"prompt_set": "animals", "prompt_file": Path("a.txt")}, "give one of them"),
        ({"prompt_set": "animals", "prompt_column": "a"}, "--prompt_column needs"),
        ({"prompt_file": Path("a.txt"), "prompt_dataset_split": "a"}, "--prompt_dataset_split nee"),
        ({"prompt_dataset_name": "a", "prompt_dataset_split": ""}, "--prompt_dataset_split must"),
        ({"prompt_dataset_name": ""}, "--prompt_dataset_name must not be empty"),
        ({"prompt_set": "animals", "max_prompts": 0}, "--max_prompts must be at least 1"),
        ({"prompt_set": "animals", "num_eval_prompts": -1}, "--num_eval_prompts must be 0 or"),
        (
            {"prompt_set": "animals", "num_eval_prompts": 0, "eval_prompt_file": Path("a.txt")},
            "--num_eval_prompts 0 contradicts --eval_prompt_file",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptArgs(**options)


def test_no_flag_is_also_one_of_another_group() -> None:
    own = {field.name for field in dataclasses.fields(PromptArgs)}
    others = (DataArgs, CacheArgs, CaptionArgs, ValidationArgs, RunArgs, OptimArgs, ModelArgs)
    for other in others:
        assert not own & {field.name for field in dataclasses.fields(other)}, other


# -- files ------------------------------------------------------------------------------------


def test_a_text_file_gives_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa star\r\n\r\n  一颗红心 \r\n".encode())
    assert read_file(path, "--x") == [Prompt(text="a star"), Prompt(text="一颗红心")]


def test_only_line_feeds_end_a_prompt_and_each_is_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\u2028star\x0c, red\x85sky\na cat\r\n".encode())
    assert texts(read_file(path, "--x")) == ["a star , red sky", "a cat"]


def test_options_behind_a_prompt_are_no_words_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "a star --n blurry, dark --w 64 --h 32 --d 7 --s 4 --l 2.5\na --no cat --ar 3\n"
    )
    first, second = read_file(path, "--x", with_options=True)
    assert first == Prompt(
        text="a star",
        options={
            "negative": "blurry, dark",
            **{"width": 64, "height": 32, "seed": 7},
            **{"num_inference_steps": 4, "guidance_scale": 2.5},
        },
    )
    assert second == Prompt(text="a --no cat --ar 3")
    with pytest.raises(UserError, match=r"^--x: .*'a star --n .*\(--n, --w, --h, --d, --s, --l\)"):
        read_file(path, "--x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w wide", "--w wide is no int"),
        ("a --s", "--s  is no int"),
        ("a --n --w 64", "--n has no value"),
        ("a --w 64 --w 32", "--w stands twice"),
        ("--w 64", "there is no prompt before"),
    ],
)
def test_wrong_options_behind_a_prompt_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(line)
    with pytest.raises(UserError, match=f"^--x: .*{message}"):
        read_file(tmp_path / "a.txt", "--x", with_options=True)


def test_the_other_columns_of_a_row_become_metadata(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "a bench", "text": "kept", "include": [{"class": "bench", "count": 1}]},
        {"text": "two\nlines", "id": 7},
        {"prompt": None, "caption": "a cat"},
    ]
    lines_file(jsonl, [json.dumps(row) for row in rows])
    assert read_file(jsonl, "--x") == [
        Prompt(
            text="a bench",
            metadata={"text": "kept", "include": [{"class": "bench", "count": 1}]},
        ),
        Prompt(text="two lines", metadata={"id": 7}),
        Prompt(text="a cat", metadata={"prompt": None}),
    ]
    table = lines_file(
        tmp_path / "a.csv",
        ["ocr_text,caption", 'OPEN,"a shop, ""OPEN"" on its door"', ",a wall"],
    )
    assert read_file(table, "--x") == [
        Prompt(text='a shop, "OPEN" on its door', metadata={"ocr_text": "OPEN"}),
        Prompt(text="a wall"),  # an empty cell is not set: the reward looks at the prompt
    ]


def test_a_list_in_json_is_read_as_the_rows_of_a_table(tmp_path: Path) -> None:
    # As ImageReward's refl_data.json.
    rows = [{"text": "a bench", "id": "000-1"}, {"prompt": "a cat", "text": "kept", "id": None}]
    path = tmp_path / "refl_data.json"
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8-sig")
    table = lines_file(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    assert read_file(path, "--x") == read_file(table, "--x")
    path.write_text(json.dumps(["a star", " two\nlines ", {"caption": "一颗红心"}]))
    prompts = [Prompt(text=text) for text in ("a star", "two lines", "一颗红心")]
    assert read_file(path, "--x") == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "a.txt holds no prompt"),
        ("a.txt", b"\xff\xfe", "a.txt cannot be read"),
        ("missing.txt", None, "missing.txt cannot be read"),
        ("missing.jsonl", None, "missing.jsonl cannot be read"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"id": 1}\n', r"a.jsonl .*\(line 3: no prompt or text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', r"\(line 2: prompt is empty\)"),
        ("a.jsonl", b'{"prompt": ["a"]}\n', r"\(line 1: prompt is of type list, not text\)"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}\n', r"\(line 1: prompt holds half of a char"),
        ("a.jsonl", b'{"prompt": "a"}\n"b"\n', "a.jsonl line 2: not a JSON object"),
        ("a.csv", b"Prompt\na\n", r"\(line 2: no prompt or text or caption; it has 'Prompt'\)"),
        ("a.csv", b"prompt,id\na star, red, 1\n", r"\(line 2: more fields than the header"),
        ("a.json", b'{"prompt": "a"}', "a.json is no list of prompts or of objects"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b'["a",\n', "a.json line 2: not JSON"),
        ("a.json", b'["a", ["b"]]', "a.json row 2: neither a prompt nor a JSON object"),
        ("a.json", b'["a", " "]', r"\(row 2: prompt is empty\)"),
        ("a.json", b'[{"text": "a"}, {"id": 1}]', r"\(row 2: no prompt or text or caption; it has"),
        ("a.json", b"\xff\xfe", "a.json is not UTF-8"),
        ("missing.json", None, "missing.json cannot be read"),
        ("a.JSON", b'["a"]', "a.JSON is none of .txt, .jsonl, .csv, .json"),
        ("a.tsv", b"a\tb", "a.tsv is none of"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_flag(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^--here: .*{message}"):
        read_file(tmp_path / name, "--here")


def test_real_prompt_files_are_read_whole() -> None:
    if not REAL.is_dir():
        pytest.skip("needs the published prompt files")
    rows = read_file(REAL / "geneval_metadata.jsonl", "--x")
    assert len(rows) == 553
    assert texts(rows) == texts(read_file(REAL / "geneval_prompts.txt", "--x"))
    assert rows[0].metadata == {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
    }
    assert len(read_file(REAL / "ocr_test.txt", "--x")) == 1018
    animals = open_prompts(PromptArgs(prompt_set="animals", num_eval_prompts=0))
    assert texts(animals.train) == texts(read_file(REAL / "ddpo_simple_animals.txt", "--x"))


def test_the_animals_are_the_45_and_none_twice() -> None:
    animals = open_prompts(PromptArgs(prompt_set="animals", num_eval_prompts=0))
    assert len(set(texts(animals.train))) == len(animals.train) == 45


# -- data sets --------------------------------------------------------------------------------


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("no_cache")
def test_a_folder_of_the_datasets_library_is_read_without_its_pictures(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict(
        {
            "image": [Image.new("RGB", (4, 4))] * 6,
            "question": [f"a star {i}" for i in range(6)],
            "tags": [{"count": i} for i in range(6)],
            "made": [date(2024, 1, 2)] * 6,
        }
    )
    datasets.DatasetDict({"some": table}).save_to_disk(tmp_path / "saved")
    plain = lines_file(
        tmp_path / "saved.jsonl",
        [
            json.dumps({"prompt": f"a star {i}", "tags": {"count": i}, "made": "2024-01-02"})
            for i in range(6)
        ],
    )
    of_table = open_prompts(
        PromptArgs(
            prompt_dataset_name=str(tmp_path / "saved"),
            prompt_dataset_split="some",
            prompt_column="question",
        )
    )
    assert (of_table.train, of_table.held_out) == (opened(plain).train, opened(plain).held_out)
    assert len(of_table.held_out) == 1

    (tmp_path / "folder").mkdir()
    plain.rename(tmp_path / "folder" / "train.jsonl")
    of_folder = open_prompts(PromptArgs(prompt_dataset_name=str(tmp_path / "folder")))
    assert texts(of_folder.train) == texts(of_table.train)
    assert of_folder.train[0].metadata["tags"] == of_table.train[0].metadata["tags"]
    assert (tmp_path / "cache").is_dir()


@pytest.mark.usefixtures("no_cache")
def test_what_is_wrong_with_a_data_set_names_the_flags(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["a", ""], "count": [1, 2]})
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    base: dict[str, Any] = {"prompt_dataset_name": str(tmp_path / "saved")}
    for more, message in (
        ({}, r"--prompt_dataset_name: .*row 2: prompt is empty"),
        ({"prompt_column": "text"}, r"--prompt_column: .*it has 'prompt', 'count'"),
        ({"prompt_dataset_split": "test"}, r"no split 'test'.*\(--prompt_dataset_split\)"),
        (
            {"prompt_dataset_name": str(tmp_path / "none")},
            r"--prompt_dataset_name: .*none: neither",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_prompts(PromptArgs(**{**base, **more}))


# -- merging and holding out ------------------------------------------------------------------


def test_equal_prompts_are_one_and_metadata_tells_them_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "x": 1, "y": 2},
        {"prompt": "b"},
        {"y": 2, "prompt": "a", "x": 1},
        {"prompt": "a", "x": 2, "y": 2},
        {"prompt": "b "},
    ]
    path = lines_file(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    prompts = opened(path, num_eval_prompts=0)
    assert [(one.text, one.metadata.get("x")) for one in prompts.train] == [
        *(("a", 1), ("b", None), ("a", 2)),
    ]
    assert "2 duplicates merged" in prompts.description


def test_rare_values_of_a_column_are_repeated_until_all_come_equally_often(tmp_path: Path) -> None:
    rows = [{"prompt": f"{task} {i}", "task": task} for task in ("a", "b") for i in range(8)][:11]
    path = lines_file(tmp_path / "p.jsonl", [json.dumps(row) for row in rows])
    plain, even = (opened(path, num_eval_prompts=2, balance=b) for b in (None, "task"))
    assert even.held_out == plain.held_out
    assert set(texts(even.train)) == set(texts(plain.train))
    assert Counter(prompt.metadata["task"] for prompt in even.train) == {"a": 7, "b": 7}
    assert sorted(Counter(texts(even.train)).values()) == [1] * 7 + [3, 4]
    assert even.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match="--balance: 'a 0' has no column shape"):
        opened(path, balance="shape", num_eval_prompts=0)


def test_a_text_is_held_out_with_every_metadata_it_has(tmp_path: Path) -> None:
    rows = [{"prompt": f"text {i % 20}", "variant": i} for i in range(60)]
    path = lines_file(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    prompts = opened(path, num_eval_prompts=5)
    assert len(set(texts(prompts.held_out))) == 5
    assert len(prompts.held_out) == 15
    assert not set(texts(prompts.held_out)) & set(texts(prompts.train))


@pytest.mark.parametrize("tasks", [1, 6])
def test_a_longer_file_holds_out_nothing_that_was_trained_on(tmp_path: Path, tasks: int) -> None:
    def rows(count: int) -> list[str]:
        # The tasks are not equally frequent.
        task = [min(rng.seed_for("task", i) % 12, tasks - 1) for i in range(count)]
        return [json.dumps({"prompt": f"text {i}", "task": task[i]}) for i in range(count)]

    short = opened(lines_file(tmp_path / "short.jsonl", rows(100)), num_eval_prompts=16)
    mixed = rows(140)[::-1]
    long = opened(lines_file(tmp_path / "long.jsonl", mixed), num_eval_prompts=16)
    assert len(short.held_out) == len(long.held_out) == 16
    assert not set(texts(short.train)) & set(texts(long.held_out))
    assert set(texts(short.held_out)) & set(texts(long.held_out))


def test_max_prompts_shortens_training_alone(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.txt", [f"text {i}" for i in range(100)])
    whole, part = opened(path), opened(path, max_prompts=7)
    assert part.held_out == whole.held_out
    assert part.train == whole.train[:7]
    assert len(whole.train) + len(whole.held_out) == 100


def test_unset_holds_out_32_but_at_most_a_fifth(tmp_path: Path) -> None:
    for count, expected in ((4, 0), (45, 9), (159, 31), (1000, 32)):
        path = lines_file(tmp_path / "a.txt", [f"text {i}" for i in range(count)])
        assert len(opened(path).held_out) == expected
    with pytest.raises(UserError, match="--num_eval_prompts 45 leaves nothing"):
        open_prompts(PromptArgs(prompt_set="animals", num_eval_prompts=45))


def test_no_text_of_the_evaluation_file_is_trained_on(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "a.txt", ["a", "b", "c", "d"])
    other = lines_file(tmp_path / "other.txt", ["c", "z", "z", "b"])
    prompts = opened(path, eval_prompt_file=other)
    assert texts(prompts.train) == ["a", "d"]
    assert texts(prompts.held_out) == ["c", "z", "b"]
    assert "2 to train on, 3 held out from" in prompts.description
    assert "2 also in" in prompts.description
    first = opened(path, eval_prompt_file=other, num_eval_prompts=1)
    assert texts(first.held_out) == ["c"]
    assert first.train == prompts.train
    assert first.texts == ["a", "d", "c"]
    with pytest.raises(UserError, match=r"--eval_prompt_file .* leaves nothing to train on"):
        opened(path, eval_prompt_file=path)
    with pytest.raises(UserError, match=r"^--eval_prompt_file: .* cannot be read"):
        opened(path, eval_prompt_file=tmp_path / "none.txt")


def test_the_fingerprint_is_that_of_texts_metadata_and_order(tmp_path: Path) -> None:
    def of(*rows: dict[str, Any]) -> str:
        path = lines_file(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
        return opened(path, num_eval_prompts=0).fingerprint

    a, b = {"prompt": "a", "x": 1, "y": 2}, {"prompt": "b"}
    marks = [of(a, b), of(b, a), of(a), of({**a, "x": 2}, b), of({"prompt": "a"}, b)]
    assert len(set(marks)) == len(marks)
    assert of({"y": 2, "x": 1, "prompt": "a"}, b) == marks[0]


# -- the pocket set ---------------------------------------------------------------------------


def test_the_pocket_set_is_balanced_and_so_is_what_it_holds_out() -> None:
    prompts = open_prompts(PromptArgs(prompt_set="pocket", num_eval_prompts=240))
    assert len(prompts.train) + len(prompts.held_out) == 1200
    assert len(set(texts(prompts.train + prompts.held_out))) == 1200
    for prompt in prompts.train + prompts.held_out:
        assert scenes.parse(prompt.text).task == prompt.metadata["task"]
    held_out = Counter(prompt.metadata["task"] for prompt in prompts.held_out)
    assert held_out == dict.fromkeys(scenes.TASKS, 40)
    # The grammar has 72 captions of single_object: six shapes, three sizes, four backgrounds.
    train = Counter(prompt.metadata["task"] for prompt in prompts.train)
    assert train.pop("single_object") == 72 - 40
    assert set(train.values()) <= {185, 186}
    # Runs of different versions can be compared only as long as this stays.
    assert prompts.fingerprint == "46eae902371dc9548f906ab877f340b2"


# -- drawing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [(7, 3), (7, 5), (8, 6), (12, 4), (5, 5), (9, 1), (10, 9), (100, 48)]
)
def test_epochs_are_cut_from_passes_without_repetition(size: int, count: int) -> None:
    prompts = set_of(size)
    epochs = [prompts.draw(3, epoch, count, replace=False) for epoch in range(4 * size)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == count
    stream = [prompt for epoch in epochs for prompt in epoch]
    passes = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_passes_prefer_no_order() -> None:
    # With 6 prompts and epochs of 4 every second pass begins within an epoch.
    prompts = set_of(6)
    first, second = Counter[int](), Counter[int]()
    last_again = 0
    for seed in range(600):
        epoch = prompts.draw(seed, 1, 4, replace=False)  # two of the first pass, two of the next
        first.update(epoch[:2])
        second.update(epoch[2:])
        last_again += set(epoch[:2]) == set(prompts.draw(seed, 2, 4, replace=False)[2:])
    for counts in (first, second):  # mean 200, standard deviation 11.5
        assert all(150 < counts[prompt] < 250 for prompt in range(6))
    # What ended the first pass has its place anywhere behind what it gave way to: the same two
    # end the next pass in at most a sixth of the cases.
    assert last_again < 140


def test_with_replacement_draws_are_independent_and_uniform() -> None:
    prompts = set_of(10)
    drawn = Counter(
        prompt for epoch in range(200) for prompt in prompts.draw(0, epoch, 50, replace=True)
    )
    assert sum(drawn.values()) == 10_000
    # 10,000 draws of one in ten: mean 1,000, standard deviation 30.
    assert all(850 < drawn[prompt] < 1150 for prompt in range(10))
    assert prompts.draw(0, 0, 50, replace=True) != prompts.draw(1, 0, 50, replace=True)


def test_an_epoch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match="--num_prompts_per_epoch 8: there are only 7 prompts"):
        set_of(7).draw(0, 0, 8, replace=False)
    assert len(set_of(7).draw(0, 0, 8, replace=True)) == 8
    with pytest.raises(ValueError, match="--num_prompts_per_epoch must be at least 1"):
        set_of(7).draw(0, 0, 0, replace=True)


def _held_out_and_drawn() -> list[Any]:
    prompts = open_prompts(PromptArgs(prompt_set="animals"))
    draws = [prompts.draw(5, 41, 28, replace=replace) for replace in (False, True)]
    return [texts(prompts.held_out), prompts.fingerprint, *draws]


def _tell(file: Path) -> None:
    file.write_text(json.dumps([hash("animals"), *_held_out_and_drawn()]))


def test_another_process_holds_out_and_draws_the_same(tmp_path: Path) -> None:
    code, said = together(_tell, (tmp_path / "told.json",), tmp_path)
    assert code == 0, said
    other, *told = json.loads((tmp_path / "told.json").read_text())
    assert other != hash("animals"), "both processes have their names in one order"
    assert told == _held_out_and_drawn()


def test_the_compositional_set_holds_out_as_many_of_each_number_of_objects() -> None:
    prompts = open_prompts(PromptArgs(prompt_set="pocket_compositional", num_eval_prompts=120))
    assert len(prompts.train) + len(prompts.held_out) == 1200
    for prompt in (*prompts.train, *prompts.held_out):
        number = scenes.parse(prompt.text).num_objects
        assert prompt.metadata["task"] == f"{number}_object"
    held_out = Counter(prompt.metadata["task"] for prompt in prompts.held_out)
    assert set(held_out.values()) == {30}
