"""A user's own reward function: what it does is understood, or is one sentence that names it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import RewardOutput
from dojo.rewards.foreign import numbers
from dojo.rewards.reward import Reward

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
TEXTS = ["a", "b", "c"]
VALUES = torch.tensor([0.5, -1.0, 2.0])


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], Reward]:
    """The reward of a file whose function `score(images, prompts, metadata)` has this body."""

    def make(body: str, extra: str = "") -> Reward:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        head = "import sys, torch, numpy as np\n\ndef score(images, prompts, metadata):\n"
        (tmp_path / "mine.py").write_text(f"{head}{lines}{extra}")
        return rewards.load(f"{tmp_path}/mine.py:score")

    return make


@pytest.mark.parametrize(
    "output",
    [
        VALUES,
        VALUES[:, None],
        VALUES.double(),
        VALUES.numpy(),
        VALUES.numpy()[:, None],
        VALUES.tolist(),
        tuple(VALUES.tolist()),
        VALUES[:, None].tolist(),
        list(VALUES),
        list(VALUES[:, None]),
        list(VALUES.numpy()),
        list(VALUES.numpy()[:, None]),
        (VALUES, {"info": 1}),
        (VALUES.tolist(), {}),
        (VALUES.numpy()[:, None], None),
        RewardOutput(scores=VALUES, valid=torch.ones(3, dtype=torch.bool), components={}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_every_usual_form_are_understood(output: Any) -> None:
    assert torch.equal(numbers(output, 3), VALUES)


def test_two_numbers_for_two_pictures_are_no_pair_of_scores_and_info() -> None:
    assert numbers((1.0, 2.0), 2).tolist() == [1, 2]
    assert numbers(([1.0, 2.0], [3.0, 4.0]), 2).tolist() == [1, 2]
    assert numbers([True, np.int64(3)], 2).tolist() == [1, 3]
    assert numbers(np.array([1, 2], dtype=np.uint16), 2).tolist() == [1, 2]


def test_none_and_nan_in_a_list_are_no_score() -> None:
    assert numbers([None, 1.0, float("nan")], 3).isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "x = 1\nraise RuntimeError('no\\nluck')",
            r"mine.py, line 5\) raised RuntimeError: no luck",
        ),
        ("return prompts[7]", r"mine.py, line 4\) raised IndexError"),
        ("sys.exit(0)", r"mine.py, line 4\) raised SystemExit \(sys.exit\(0\)\)"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("return None", r"mine.py, line 3\) returned None"),
        ("pass", "returned None"),
        ("return ['0.5'] * len(images)", r"a list with text \('0\.5'\)"),
        ("return '0.5'", "returned text"),
        ("return 0.5", "a single number"),
        ("return {'scores': [1, 2, 3]}", r"a mapping \(scores\)"),
        ("return images", r"numbers of shape \[3, 3, 4, 4\] for 3"),
        ("return images.mean()", r"numbers of shape \[\] for 3"),
        ("return [1.0]", r"numbers of shape \[1\] for 3"),
        ("return np.array(['a', 'b', 'c'])", "an array of <U1"),
        ("return [[1, 2], [3, 4], [5, 6]]", "a list with a list of 2"),
        ("return torch.zeros(3, dtype=torch.complex64)", "complex"),
        ("return (score for score in [1, 2, 3])", "a generator"),
        (
            "return torch.ones(5)[:len(prompts) + 9] @ images",
            r"mine.py, line 4\) raised RuntimeError",
        ),
        ("raise ValueError('http://me:hidden@host')", r"ValueError: http://\*\*\*@host"),
    ],
)
def test_a_function_that_goes_wrong_is_named_with_its_line(
    mine: Callable[..., Reward], body: str, message: str
) -> None:
    reward = mine(body)
    for call in (reward, lambda *given: reward.submit(*given).result(30)):
        with pytest.raises(UserError, match=message) as caught:
            call(IMAGES, TEXTS)
        assert str(caught.value).startswith("--reward: score (")
        assert "\n" not in str(caught.value)


def test_ctrl_c_goes_through(mine: Callable[..., Reward]) -> None:
    with pytest.raises(KeyboardInterrupt):
        mine("raise KeyboardInterrupt")(IMAGES, TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import sys\nsys.exit(3)\n", r"sys.exit\(3\)\) \(broken.py, line 2\)"),
        ("def score(:\n", r"SyntaxError: .*\(broken.py, line 1\)"),
        ("import a_package_that_is_not_there\n", r"ModuleNotFoundError.*\(broken.py, line 1\)"),
        ("\n\nraise RuntimeError('no')\n", r"RuntimeError: no \(broken.py, line 3\)"),
        ("def other(): pass\nscore = 3\n", r"no function score \(it has other\)"),
    ],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_a_file_that_cannot_be_imported_is_named_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    message: str,
    as_module: bool,
) -> None:
    (tmp_path / "broken.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    source = "broken" if as_module else f"{tmp_path}/broken.py"
    with pytest.raises(UserError, match=message):
        rewards.load(f"{source}:score")
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_an_object_may_be_the_function(mine: Callable[..., Reward]) -> None:
    extra = "\nclass Judge:\n    def __call__(self, *given):\n        return 'x'\nscore = Judge()\n"
    with pytest.raises(UserError, match=r"score \(mine.py, line 7\) returned text"):
        mine("pass", extra)(IMAGES, TEXTS)


def test_what_a_function_is_given_is_its_own(mine: Callable[..., Reward]) -> None:
    body = (
        "images.zero_()\nprompts.clear()\nmetadata[0]['list'].append(1)\nmetadata[1].clear()\n"
        "torch.set_grad_enabled(False)\nreturn [1.0] * 3"
    )
    images, texts = IMAGES.clone(), list(TEXTS)
    rows: list[dict[str, Any]] = [{"list": []}, {"a": 1}, {}]
    output = mine(body)(images, texts, rows)
    assert output.valid.all()
    assert torch.equal(images, IMAGES)
    assert texts == TEXTS
    assert rows == [{"list": []}, {"a": 1}, {}]
    assert torch.is_grad_enabled()


def gradient(reward: Reward) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    reward(images, TEXTS).scores.sum().backward()
    assert images.grad is not None
    return images.grad


@pytest.mark.parametrize(
    "body",
    [
        "return images.mean((1, 2, 3))",
        "return images.mean((1, 2, 3))[:, None], {}",
        "return [image.mean() for image in images]",
        "images.mul_(2)\nreturn images.mean((1, 2, 3)) / 2",
    ],
)
def test_gradients_pass_a_function_that_says_so(mine: Callable[..., Reward], body: str) -> None:
    reward = mine(body, "score.differentiable = True\n")
    assert torch.allclose(gradient(reward), torch.full_like(IMAGES, 1 / 48))


def test_a_lost_gradient_is_said(mine: Callable[..., Reward]) -> None:
    reward = mine("return images.detach().mean((1, 2, 3))", "score.differentiable = True\n")
    with pytest.raises(UserError, match="no gradient leads"):
        gradient(reward)
    assert reward(IMAGES, TEXTS).valid.all()  # nobody asks for one


def test_a_function_without_gradients_may_use_numpy_beside_one_with_them(
    mine: Callable[..., Reward], tmp_path: Path
) -> None:
    mine("return images.numpy().mean((1, 2, 3))")
    (tmp_path / "two.py").write_text(
        "def smooth(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        "smooth.differentiable = True\n"
    )
    both = rewards.load(f"{tmp_path}/two.py:smooth,{tmp_path}/mine.py:score=0")
    assert torch.allclose(gradient(both), torch.full_like(IMAGES, 1 / 48))


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "mine.py").write_text(f"def score(*given):\n    return [{number}.0] * 3\n")
    both = rewards.load(f"{tmp_path}/1/mine.py:score[name=a],{tmp_path}/2/mine.py:score[name=b]")
    output = both(IMAGES, TEXTS)
    assert (output.components["a"] == 1).all()
    assert (output.components["b"] == 2).all()
