"""The contract of rewards: their text, the weighted sum, validity, gradients, the background."""

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dojo import rewards
from dojo.cli import UserError
from dojo.inputs.prompts import Prompt
from dojo.pocket import scenes
from dojo.rewards import RewardArgs, check_prompts, loading, spec
from dojo.rewards.ocr import Ocr
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import Metadata, Place, Scorer

CPU = torch.device("cpu")


class Brightness(Scorer):
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Listed(Scorer):
    """Gives each picture the number that its prompt says."""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        return [float(prompt) for prompt in prompts]


def mixed(*weighed: tuple[Scorer, float], batch_size: int = 16) -> Reward:
    components = [
        Component(name=f"{type(scorer).__name__}{i}", scorer=scorer, weight=weight)
        for i, (scorer, weight) in enumerate(weighed)
    ]
    return Reward(components, batch_size=batch_size)


# -- the text ---------------------------------------------------------------------------------


def test_a_reward_text_is_read_term_by_term() -> None:
    terms = spec.parse(
        "aesthetic=0.5, pickscore[scale=1/26,dtype=bf16]=2,hpsv2.1,clip[model=a/b-c_d.e,name=c],"
        "my.pkg:fn=-1,./own/file.py:redness=1e-3,http://127.0.0.1:8000#pick=3,https://host/x"
    )
    assert [(t.source, t.name) for t in terms] == [
        ("aesthetic", "aesthetic"),
        ("pickscore", "pickscore"),
        ("hpsv2.1", "hpsv2.1"),
        ("clip", "c"),
        ("my.pkg:fn", "fn"),
        ("./own/file.py:redness", "redness"),
        ("http://127.0.0.1:8000#pick", "pick"),
        ("https://host/x", "remote"),
    ]
    assert [t.weight for t in terms] == [0.5, pytest.approx(2 / 26), 1, 1, -1, 1e-3, 3, 1]
    assert terms[1].options == {"dtype": "bf16"}
    assert terms[3].options == {"model": "a/b-c_d.e"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "form"),
        ("aesthetic,", "form"),
        ("aesthetic=half", "half"),
        ("aesthetic=1/0", "1/0"),
        ("aesthetic=inf", "inf"),
        ("clip[model]", "option=value"),
        ("clip[model=a", "form"),
        ("clip[model=a]2", "form"),
        ("clip=1,clip[model=b]=2", r"clip\[name=other\]"),
        ("aesthetic=0,clip=0", "aesthetic=0,clip=0: every weight is 0"),
        ("aesthetic[scale=0]", "every weight is 0"),
        ("aesthetic[scale=1e308]=1e308", "no number"),
        ("vlm[url=http://me:hidden@host", r"http://\*\*\*@host"),
        ("vlm[url=http://host/?key=hidden]=x", r"key=\*\*\*"),
    ],
)
def test_a_wrong_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.parse(text)
    with pytest.raises(ValueError, match="--reward"):
        RewardArgs(reward=text)
    with pytest.raises(UserError, match="--reward"):
        rewards.load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aestetic", "no scorer aestetic.*aesthetic_v1"),
        ("pocket[head=x]", "pocket has no option head"),
        ("pocket_atoms[mean=median]", "pocket_atoms has no mean median"),
        ("pocket[dtype=int8]", "dtype"),
        ("pocket[device=gpu0]", "device"),
        ("no.such.module:fn", "no.such"),
        ("dojo.rewards.spec:nothing", "no function nothing"),
        ("missing.py:fn", "no file missing.py"),
    ],
)
def test_what_is_not_there_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards.load(text)


@pytest.mark.parametrize(
    "wrong", [{"reward_batch_size": 0}, {"reward_device": "gpu0"}, {"reward": "a=b"}]
)
def test_wrong_options_name_their_flag(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        RewardArgs(**wrong)


def test_the_options_choose_device_precision_and_batch() -> None:
    args = RewardArgs(reward="pocket", reward_dtype="bf16", reward_batch_size=3)
    reward, other = args.load(CPU, "pocket_strict")
    assert reward.batch_size == other.batch_size == 3
    assert reward.components[0].scorer.place.dtype == torch.bfloat16
    assert list(reward.weights) == ["pocket"]
    assert list(other.weights) == ["pocket_strict"]
    places = [one.components[0].scorer.place for one in (reward, other)]
    assert places[0].loaded is places[1].loaded  # what both need is loaded once


# -- the sum ----------------------------------------------------------------------------------


def test_the_score_is_the_weighted_sum_and_the_parts_stay_raw() -> None:
    images = torch.rand(5, 3, 8, 8)
    prompts = ["1", "2", "3", "4", "5"]
    output = mixed((Brightness(Place()), 2.0), (Listed(Place()), -0.5), batch_size=2)(
        images, prompts
    )
    raw = torch.tensor([1.0, 2, 3, 4, 5])
    torch.testing.assert_close(output.components["Listed1"], raw)
    torch.testing.assert_close(output.components["Brightness0"], images.mean((1, 2, 3)))
    torch.testing.assert_close(output.scores, 2 * images.mean((1, 2, 3)) - 0.5 * raw)
    assert output.valid.dtype == torch.bool
    assert output.valid.all()
    assert output.scores.dtype == torch.float32


@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_is_invalid_alone(wrong: str) -> None:
    output = mixed((Listed(Place()), 1.0), (Brightness(Place()), 0.0))(
        torch.rand(3, 3, 8, 8), ["1", wrong, "3"]
    )
    assert output.valid.tolist() == [True, False, True]
    assert output.scores.tolist() == [1.0, 0.0, 3.0]
    assert output.components["Listed0"].isnan().tolist() == [False, True, False]
    assert output.components["Brightness1"].isfinite().all()


def test_one_picture_keeps_its_dimension() -> None:
    output = mixed((Brightness(Place()), 1.0))(torch.rand(1, 3, 8, 8), ["a"])
    assert output.scores.shape == output.valid.shape == (1,)


def test_wrong_shapes_are_refused() -> None:
    reward = mixed((Brightness(Place()), 1.0))
    for images, prompts in ((torch.rand(3, 8, 8), ["a"]), (torch.rand(2, 3, 8, 8), ["a"])):
        with pytest.raises(ValueError, match="B prompts"):
            reward(images, prompts)
    with pytest.raises(ValueError, match="metadata for 0"):
        reward(torch.rand(1, 3, 8, 8), ["a"], [])


def test_gradients_reach_the_pixels_only_where_every_scorer_lets_them() -> None:
    images = torch.rand(3, 3, 8, 8, requires_grad=True)
    reward = mixed((Brightness(Place()), 3.0), batch_size=2)
    reward.require_differentiable()
    reward(images, ["a"] * 3).scores.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, 3 / (3 * 8 * 8)))
    both = mixed((Brightness(Place()), 1.0), (Listed(Place()), 1.0))
    assert not both.differentiable
    with pytest.raises(UserError, match="Listed1"):
        both.require_differentiable()


# -- users' functions -------------------------------------------------------------------------


def test_a_function_from_a_file_is_a_scorer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def redness(images, prompts, metadata):\n"
        "    return images[:, 0].mean(dim=(1, 2))\n"
        "redness.differentiable = True\n"
        "def told(images, prompts, metadata):\n"
        "    return [row['score'] for row in metadata]\n"
        "def short(images, prompts, metadata):\n"
        "    return [1.0]\n"
    )
    path = f"{tmp_path}/mine.py"
    images = torch.rand(2, 3, 4, 4)
    rows = [{"score": 0.25}, {"score": float("nan")}]
    reward = rewards.load(f"{path}:redness=2,{path}:told")
    output = reward(images, ["a", "b"], rows)
    torch.testing.assert_close(output.components["redness"], images[:, 0].mean((1, 2)))
    assert output.valid.tolist() == [True, False]
    rewards.load(f"{path}:redness").require_differentiable()
    with pytest.raises(UserError, match="told"):
        reward.require_differentiable()
    with pytest.raises(UserError, match=r"short .*shape"):
        rewards.load(f"{path}:short")(images, ["a", "b"])


# -- in the background ------------------------------------------------------------------------


def test_scoring_in_the_background_equals_scoring_now_and_holds_nobody_up() -> None:
    release = threading.Event()

    class Slow(Brightness):
        def score(
            self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
        ) -> Tensor:
            assert not torch.is_grad_enabled()
            assert release.wait(10)
            return super().score(images, prompts, metadata)

    reward = mixed((Slow(Place()), 1.0))
    images = torch.rand(2, 3, 4, 4)
    futures = [reward.submit(images, ["a", "b"]), reward.submit(images + 1, ["a", "b"])]
    assert not any(future.done() for future in futures)
    release.set()
    expected = images.mean((1, 2, 3))
    torch.testing.assert_close(futures[0].result(10).scores, expected)
    torch.testing.assert_close(futures[1].result(10).scores, expected + 1)


def test_an_error_in_the_background_surfaces() -> None:
    future = mixed((Listed(Place()), 1.0)).submit(torch.rand(1, 3, 4, 4), ["no number"])
    with pytest.raises(ValueError, match="no number"):
        future.result(10)


# -- rewards without a network ----------------------------------------------------------------


def test_jpeg_rewards_are_the_file_size_in_kilobytes(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 40, 56)
    images[1] = 0.5
    output = rewards.load("jpeg_compressibility,jpeg_incompressibility=0")(images, ["", ""])
    sizes = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(output.scores, -torch.tensor(sizes))
    torch.testing.assert_close(output.components["jpeg_incompressibility"], torch.tensor(sizes))
    assert sizes[0] > 2 * sizes[1]


def test_the_pocket_rewards_know_a_true_caption() -> None:
    import random

    rng = random.Random(0)
    drawn = [scenes.sample(rng) for _ in range(4)]
    pixels = torch.stack([torch.from_numpy(scenes.draw(scene)) for _, scene in drawn])
    images = pixels.permute(0, 3, 1, 2) / 255
    prompts = [caption for caption, _ in drawn]
    reward = rewards.load("pocket,pocket_strict")
    right = reward(images, prompts)
    wrong = reward(images.roll(1, dims=0), prompts)
    assert right.components["pocket_strict"].tolist() == [1.0] * 4
    assert (right.components["pocket"] > 0.9).all()
    assert wrong.scores.mean() < right.scores.mean() - 0.5
    mixed = reward(images, ["a photograph of an astronaut", *prompts[1:]])
    assert mixed.valid.tolist() == [False, True, True, True]
    assert torch.equal(mixed.scores[1:], right.scores[1:])


FREE, GRAMMAR, QUOTED = (
    Prompt(text="a photograph of an astronaut"),
    Prompt(text="a red star"),
    Prompt(text='a sign that says "open"', metadata={"task": "text"}),
)


class Reads(Ocr):
    """Without the packages that read."""

    def __init__(self) -> None:
        self.place = Place()


def test_prompts_that_cannot_be_scored_are_refused_or_counted() -> None:
    said: list[str] = []
    pocket, reads = rewards.load("pocket"), Reward([Component(name="text", scorer=Reads())])
    check_prompts(said.append, pocket, [GRAMMAR])
    check_prompts(said.append, reads, [QUOTED, Prompt(text="x", metadata={"ocr_text": "y"})])
    check_prompts(said.append, rewards.load("jpeg_compressibility"), [FREE])
    assert said == []
    with pytest.raises(UserError, match=r"pocket cannot score 1 of 1 prompts.*'a photograph of an"):
        check_prompts(said.append, pocket, [FREE])
    check_prompts(said.append, pocket, [GRAMMAR, FREE, QUOTED], most=0.7)
    assert "pocket cannot score 2 of 3 prompts, such as 'a photograph of an astronaut'" in said[0]
    with pytest.raises(UserError, match="2 of 3 prompts"):
        check_prompts(said.append, pocket, [GRAMMAR, FREE, QUOTED], most=0.5)
    with pytest.raises(UserError, match=r"text cannot score 1 of 1 .*double quotes"):
        check_prompts(said.append, reads, [GRAMMAR])


def test_the_table_lists_every_scorer() -> None:
    lines = rewards.table().splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(loading.SCORERS)


@pytest.mark.parametrize("typed", ["--reward", "--eval_reward"])
def test_what_a_reward_lacks_is_said_by_the_flag_that_was_typed(typed: str) -> None:
    good, bad = "jpeg_incompressibility", "nowhere.py:score"
    args = RewardArgs(reward=bad if typed == "--reward" else good)
    with pytest.raises(UserError, match=rf"^{typed}: there is no file nowhere\.py"):
        args.load(torch.device("cpu"), *([] if typed == "--reward" else [bad]))
