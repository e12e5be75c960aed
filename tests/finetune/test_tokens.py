"""Claims about new words: how they are spelled, where their vectors lie, what changes in training,
and which files of them are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dojo.cli import UserError
from dojo.finetune import InversionArgs, PivotalArgs, embeddings, tokens
from dojo.finetune.lora import info
from dojo.models import sd3, sd15, sdxl
from dojo.models.table import NewRows
from dojo.models.words import Word, Words
from dojo.run import optim

CPU = torch.device("cpu")


@dataclass
class Length:
    """Of a run, as schedules know it."""

    num_steps: int = 4
    samples_per_step: int = 1
    device: torch.device = CPU


def words(*texts: str, start: str | None = None, **options: Any) -> Words:
    return Words(words=tuple(Word.read(text, start) for text in texts), **options)


def opened(folder: Path, some: Words | None = None) -> Any:
    args = {"pretrained_model_name_or_path": str(folder)}
    for family in (sd3, sd15, sdxl):
        if family.__name__.rpartition(".")[2] in folder.name:
            return replace(family.open_model(family.ModelArgs(**args)), words=some)
    raise AssertionError(folder)


def encoders(folder: Path, some: Words | None = None) -> Any:
    return opened(folder, some).load_text(torch.float32, CPU)


@pytest.fixture(params=["sd15", "sdxl", "sd3"])
def tiny(request: pytest.FixtureRequest) -> Path:
    """A tiny model of a family; its folder's name says which."""
    return request.getfixturevalue(f"tiny_{request.param}")


# ---- spelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a <dog> here", "a <dog> <dog>_1 <dog>_2 here"),
        ("a <dog> <dog>_1 <dog>_2 here", "a <dog> <dog>_1 <dog>_2 here"),
        ("<DOG>,<dog>", "<dog> <dog>_1 <dog>_2,<dog> <dog>_1 <dog>_2"),
        ("a dogx-toy and a dogx", "a dogx-toy dogx-toy_1 and a dogx"),
        ("a dog", "a dog"),
        ("", ""),
    ],
)
def test_a_word_becomes_all_its_tokens_once(text: str, spelled: str) -> None:
    some = words("<dog>:3", "dogx", "dogx-toy:2")
    assert some.spelled(text) == spelled
    assert some.spelled(some.spelled(text)) == spelled


def test_an_encoder_without_new_words_reads_what_they_begin_as_or_nothing() -> None:
    assert words("<dog>:3", start="puppy").replaced("a <dog>  in snow") == "a puppy in snow"
    assert words("<dog>").replaced("a <dog> in snow") == "a in snow"
    assert words("<dog>").replaced("a  cat") == "a  cat", "others stay to the letter"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"new_tokens": ("<Dog>",)}, "--new_tokens: '<Dog>': a new word is one word of small"),
        ({"new_tokens": ("a dog",)}, "a new word is one word"),
        ({"new_tokens": ("<dog>:0",)}, "a word has 1 to 64 vectors"),
        ({"new_tokens": ("<dog>", "<dog>")}, "--new_tokens: <dog> is there twice"),
        ({"new_tokens": ("<dog>:2", "<dog>_1")}, "<dog>_1 is there twice"),
        ({"new_tokens": ("<dog>", "dog")}, "needs letters or digits that no other word has"),
        ({"new_tokens": ("<>",)}, "needs letters or digits"),
        (
            {"new_tokens": ("<a>", "<b>", "<c>"), "initializer_token": ("x", "y")},
            "--initializer_token: 2 words for 3 --new_tokens",
        ),
        ({"initializer_token": ("x",)}, "--initializer_token needs --new_tokens"),
        ({"keep_token_norm": True}, "--keep_token_norm needs --new_tokens"),
        ({"token_steps": 3}, "--token_steps needs --new_tokens"),
        ({"new_tokens": ("<a>",), "token_steps": 0}, "--token_steps 0 must be at least 1"),
        ({"token_lr": 0.0}, "--token_lr 0 must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        PivotalArgs(**options)


def test_textual_inversion_without_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="--new_tokens is missing"):
        InversionArgs(new_tokens=())


def test_optimizers_that_have_one_rate_or_average_are_refused() -> None:
    args = PivotalArgs(new_tokens=("<a>",), token_steps=3)
    args.check(optim.OptimArgs())
    with pytest.raises(ValueError, match="--optimizer prodigy has one rate: --token_lr"):
        args.check(optim.OptimArgs(optimizer="prodigy", learning_rate=1.0))
    with pytest.raises(ValueError, match="--token_steps does not go with --optimizer schedulefree"):
        args.check(optim.OptimArgs(optimizer="schedulefree"))


def test_a_word_that_the_model_knows_is_refused(tiny: Path) -> None:
    known = next(
        word.removesuffix("</w>")
        for word in opened(tiny).readers()[0].tokenizer.get_vocab()
        if word.endswith("</w>") and word.removesuffix("</w>").isalpha() and len(word) > 6
    )
    args = InversionArgs(new_tokens=(known,))
    with pytest.raises(UserError, match=f"--new_tokens: {known} is a token of this model already"):
        args.taught(opened(tiny), 0)


def test_a_beginning_with_more_tokens_than_the_word_has_vectors_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="--initializer_token: 'star ring' is 2 tokens"):
        encoders(tiny, words("<thing>", start="star ring"))
    encoders(tiny, words("<thing>:2", start="star ring"))


def test_encoders_that_compute_as_frozen_ones_may_are_refused(tiny_sd15: Path) -> None:
    place = str(tiny_sd15)
    args = sd15.ModelArgs(pretrained_model_name_or_path=place, text_encoder_precision="int8")
    with pytest.raises(UserError, match="--text_encoder_precision int8 is for text encoders thr"):
        InversionArgs(new_tokens=("<thing>",)).taught(sd15.open_model(args), 0)


def test_a_word_that_no_caption_has_is_refused() -> None:
    tokens.check_used(words("<a>", "<b>"), ["a <A>", "the <b>, alone"])
    with pytest.raises(UserError, match="--new_tokens: no caption has <b>"):
        tokens.check_used(words("<a>", "<b>"), ["a <a>", "a b"])


# ---- vectors ------------------------------------------------------------------------------------


def rows_of(made: Any) -> list[NewRows]:
    return [one for clip in made.trainable for one in clip.modules() if isinstance(one, NewRows)]


def test_vectors_begin_as_another_word_or_are_drawn_alike_for_a_seed(tiny: Path) -> None:
    made = encoders(tiny, words("<thing>:3", start="star"))
    for one, tokenizer in zip(rows_of(made), tokenizers(made), strict=True):
        star = one.weight[tokenizer.inner("star", add_special_tokens=False)["input_ids"][0]]
        assert torch.equal(one.rows, star.expand(3, -1))
    drawn, again, other = (encoders(tiny, words("<thing>", seed=seed)) for seed in (1, 1, 2))
    for one, same, differs in zip(*map(rows_of, (drawn, again, other)), strict=True):
        assert torch.equal(one.rows, same.rows)
        assert not torch.equal(one.rows, differs.rows)
        spread = (one.rows - one.weight.mean(0)) / one.weight.std(0)
        assert 0.7 < spread.std().item() < 1.3


def tokenizers(made: Any) -> list[Any]:
    return made.clip_tokenizers if hasattr(made, "clip_tokenizers") else made.tokenizers


def test_texts_without_new_words_are_read_as_before_to_the_bit(tiny: Path) -> None:
    before, after = encoders(tiny), encoders(tiny, words("<thing>:2"))
    for name, value in before(["a red star", ""]).items():
        assert torch.equal(value, after(["a red star", ""])[name]), name


def test_what_is_looked_up_is_what_a_longer_table_gives() -> None:
    table, rows = torch.nn.Embedding(7, 3), torch.randn(2, 3)
    longer = torch.cat([table.weight, rows])
    made = NewRows(table, rows, 7, keep_norm=False)
    ids = torch.tensor([[0, 7, 6, 8]])
    assert torch.equal(made(ids), longer[ids])


@pytest.mark.parametrize("keep_norm", [False, True])
def test_nothing_but_the_new_rows_changes_in_training(tiny: Path, *, keep_norm: bool) -> None:
    made = encoders(tiny, words("<thing>:2", keep_norm=keep_norm))
    vectors = tokens.Vectors(words("<thing>:2"), made.trainable)
    before = [{n: p.clone() for n, p in clip.state_dict().items()} for clip in made.trainable]
    lengths = [one.vectors().norm(dim=-1) for one in vectors.rows.values()]
    options = optim.OptimArgs(adam_weight_decay=0.5, learning_rate=0.1, max_train_steps=2)
    optimizer, _ = optim.make([{"params": vectors.params}], options, Length())
    for _ in range(2):
        embeds = made.refresh(made(["a <thing>"]), ["a <thing>"])
        torch.stack([value.square().sum() for value in embeds.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for clip, old in zip(made.trainable, before, strict=True):
        changed = {n for n, p in clip.state_dict().items() if not torch.equal(p, old[n])}
        assert {name.rpartition(".")[2] for name in changed} == {"rows"}
    for one, old in zip(vectors.rows.values(), lengths, strict=True):
        same = torch.allclose(one.vectors().norm(dim=-1), old, rtol=1e-5)
        assert same == keep_norm


@pytest.mark.parametrize("end", [2, None])
def test_the_pooled_vector_hears_what_stands_behind_a_new_word(
    tiny_sdxl: Path, tmp_path: Path, end: int | None
) -> None:
    """Also where the configuration names a wrong end of the text, as SDXL's and SD3's do."""
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "sdxl"))
    config = folder / "text_encoder_2" / "config.json"
    if end is not None:
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": end}))
    made = encoders(folder, words("<thing>"))
    here, there = made(["a <thing> left of a star", "a <thing> on a ring"])["pooled_prompt_embeds"]
    assert not torch.allclose(here, there, rtol=1e-3)


def test_vectors_stay_from_their_last_step_on() -> None:
    moving, staying = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [moving]}, {"params": [staying], "lr": 1e-2, "until": 2}]
    optimizer, schedule = optim.make(groups, optim.OptimArgs(max_train_steps=4), Length())
    seen: list[tuple[float, float]] = []
    for _ in range(4):
        (moving.sum() + staying.sum()).backward()
        optimizer.step()
        schedule.step()
        seen.append((moving[0].item(), staying[0].item()))
    assert len({one for one, _ in seen}) == 4
    assert seen[0][1] != seen[1][1] == seen[2][1] == seen[3][1]


# ---- files --------------------------------------------------------------------------------------


def test_files_say_the_word_and_come_back(tmp_path: Path) -> None:
    rows = {"text_encoder": torch.randn(2, 4), "text_encoder_2": torch.randn(2, 6)}
    both = Word(text="<dog>", vectors=2, start="pet", rows=rows)
    one = Word(text="<cat>", vectors=2, rows={"text_encoder": torch.randn(2, 4)})
    embeddings.write(tmp_path, [both, one])
    cat, dog = embeddings.read(str(tmp_path), "--embeddings")
    assert (dog.text, dog.vectors, dog.start, cat.start) == ("<dog>", 2, "pet", None)
    assert all(torch.equal(dog.rows[part], rows[part]) for part in rows)
    files = tmp_path / "embeddings"
    assert load_file(files / "dog.safetensors").keys() == {"clip_l", "clip_g"}
    assert load_file(files / "cat.safetensors").keys() == {"<cat>"}


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    vector = torch.randn(1, 4)

    def read(name: str) -> Word:
        [word] = embeddings.read(str(tmp_path / name), "--embeddings")
        assert torch.equal(word.rows["text_encoder"], vector.expand(word.vectors, -1))
        return word

    save_file({"emb_params": vector}, tmp_path / "my dog.safetensors")
    assert read("my dog.safetensors").text == "my-dog"
    save_file({"emb_params": vector}, tmp_path / "dog.safetensors")
    assert read("dog.safetensors").text == "<dog>", "a word of the language is marked as new"
    save_file({"<cat-toy>": vector[0]}, tmp_path / "learned_embeds.safetensors")
    assert read("learned_embeds.safetensors").text == "<cat-toy>"
    save_file({"clip_l": vector, "clip_g": torch.randn(1, 6)}, tmp_path / "both.safetensors")
    assert read("both.safetensors").rows.keys() == {"text_encoder", "text_encoder_2"}
    torch.save({"string_to_param": {"*": vector}, "name": "old-dog", "step": 3}, tmp_path / "a.pt")
    assert read("a.pt").text == "old-dog"


def test_what_a_file_or_a_result_holds_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector = torch.randn(2, 4)
    torch.save({"string_to_param": {"*": vector}, "name": "old-dog", "step": 3}, tmp_path / "a.pt")
    result = tmp_path / "result" / embeddings.FOLDER
    result.mkdir(parents=True)
    for name in ("one", "two"):
        save_file({f"<{name}>": vector[0]}, result / f"{name}.safetensors")
    info.main(info.Args(input=str(tmp_path / "a.pt")))
    assert "old-dog" in capsys.readouterr().out
    info.main(info.Args(input=str(tmp_path / "result")))
    said = capsys.readouterr().out
    assert "<one>" in said
    assert "<two>" in said


def test_a_file_that_holds_something_else_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"--embeddings: .*other.safetensors is no learned embedd"):
        embeddings.read(str(tmp_path / "other.safetensors"), "--embeddings")
    with pytest.raises(UserError, match="--embeddings: there is no file or folder"):
        embeddings.read(str(tmp_path / "none.safetensors"), "--embeddings")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no embeddings"):
        embeddings.read(str(tmp_path / "empty"), "--embeddings")


def test_a_word_of_another_model_is_refused(tiny_sd15: Path) -> None:
    learned = Word(text="<dog>", rows={"text_encoder": torch.ones(1, 5)})
    with pytest.raises(UserError, match="<dog> was learned for another model"):
        encoders(tiny_sd15, Words(words=(learned,)))


def test_a_word_within_another_is_not_found_there() -> None:
    both = words("dogx", "dogx-toy:2")
    assert [word.text for word in both.find("a dogx-toy")] == ["dogx-toy"]
    assert [word.text for word in both.find("A DogX beside a dogx-toy")] == ["dogx", "dogx-toy"]
    assert not both.find("a dog")


def test_a_word_within_an_ordinary_one_is_neither_found_nor_read_there(tiny_sd15: Path) -> None:
    own = words("sks:2", "<cat>")
    assert not own.find("masks, asks and sks2")
    assert [word.text for word in own.find("masks beside SKS")] == ["sks"]
    assert [word.text for word in own.find("一只sks狗和<cat>s")] == ["sks", "<cat>"]
    assert own.spelled("masks") == "masks"
    assert own.spelled("一只sks狗") == "一只 sks sks_1 狗"
    assert own.spelled("(sks), <cat>s") == "(sks sks_1), <cat>s"
    plain, taught = (
        CLIPTokenizer.from_pretrained(tiny_sd15, subfolder="tokenizer") for _ in range(2)
    )
    reads = own.reader(taught)

    def ids(text: str) -> list[int]:
        return reads(text, add_special_tokens=False)["input_ids"]

    for text in ("masks", "asks", "sks2"):
        assert ids(text) == plain(text, add_special_tokens=False)["input_ids"]
    both = taught.convert_tokens_to_ids(["sks", "sks_1"])
    for text in ("a sks", "一只sks狗", "(SKS)", "my_sks_dog"):
        assert [one for one in ids(text) if one in both] == both, text
        before, after = text.lower().split("sks")
        around = [plain(one, add_special_tokens=False)["input_ids"] for one in (before, after)]
        assert ids(text) == [*around[0], *both, *around[1]], text


def test_letters_that_unicode_folds_together_are_told_apart() -> None:
    assert words("sks").spelled("a \u017fks") == "a \u017fks"
    assert words("kid").spelled("a k\u0131d") == "a k\u0131d"
