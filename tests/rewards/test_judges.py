"""Judges behind a server: questions with answers (tifa) and marks (unifiedreward)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import vlm
from tests.rewards.test_served import Answer, fake, logprobs, pictures, running

# -- tifa -------------------------------------------------------------------------------------

DOGS = [["How many dogs are there?", "two"], ["Is the grass red?", "Yes"]]


def answering(shares: Mapping[str, dict[str, float]], seen: list[Any]) -> Any:
    """A judge that knows how likely which first words are, by question."""

    def judge(path: str, request: Any) -> Answer:
        seen.append(request["body"])
        text = request["body"]["messages"][0]["content"][1]["text"]
        return 200, {}, json.dumps(logprobs(**shares[text.partition("?")[0]])).encode()

    return judge


@pytest.mark.parametrize(
    ("mean", "expected"), [("arithmetic", (0.8 + 0.45) / 2), ("geometric", math.sqrt(0.8 * 0.45))]
)
def test_tifa_is_the_mean_of_the_probabilities_of_the_answers(mean: str, expected: float) -> None:
    shares = {
        # Word or digit, with a space or a capital; other answers do not matter.
        "How many dogs are there": {"two": 0.4, "2": 0.3, " Two": 0.1, "three": 0.2},
        "Is the grass red": {"Yes": 0.4, " yes": 0.05, "No": 0.1},
    }
    seen: list[Any] = []
    with running(fake(answering(shares, seen))) as url:
        reward = rewards.load(f"tifa[url={url}/v1,model=m,mean={mean}]")
        rows = [{"vqa_list": DOGS}, {}, {"vqa_list": json.dumps(DOGS[:1])}]
        output = reward(pictures(3), ["a", "b", "c"], rows)
    assert output.scores[0].item() == pytest.approx(expected)
    assert output.valid.tolist() == [True, False, True]
    assert output.scores[2].item() == pytest.approx(0.8)
    assert len(seen) == 3
    told = {body["messages"][0]["content"][1]["text"] for body in seen}
    assert told == {f"{question} Answer in one word." for question, _ in DOGS}
    assert {body["max_tokens"] for body in seen} == {1}
    assert {body["top_logprobs"] for body in seen} == {20}


def test_an_answer_that_the_server_does_not_tell_of_is_impossible_and_none_is_no_score() -> None:
    shares: dict[str, dict[str, float]] = {"How many dogs are there": {"three": 0.9}}
    with running(fake(answering(shares, []))) as url:
        text = f"tifa[url={url}/v1,model=m],tifa[url={url}/v1,model=m,mean=geometric,name=g]"
        output = rewards.load(text)(pictures(1), ["a"], [{"vqa_list": DOGS[:1]}])
        assert output.components["tifa"].item() == output.components["g"].item() == 0
        shares["How many dogs are there"] = {}
        output = rewards.load(text)(pictures(1), ["a"], [{"vqa_list": DOGS[:1]}])
    assert output.components["tifa"].isnan().all()
    assert output.components["g"].isnan().all()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_picture_that_the_judge_refuses_has_no_score_and_the_others_have(
    status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(path: str, request: Any) -> Answer:
        text = request["body"]["messages"][-1]["content"][1]["text"]
        if '"b"' in text:
            return status, {}, b'{"error": {"message": "content filter"}}'
        return 200, {}, json.dumps(logprobs(yes=0.6, no=0.2)).encode()

    with running(fake(judge)) as url:
        reward = rewards.load(f"vlm[url={url}/v1,model=m]")
        output = reward(pictures(3), ["a", "b", "c"])
        assert output.valid.tolist() == [True, False, True]
        assert output.scores[0].item() == pytest.approx(0.75)
        # One that has answered before is believed where it refuses a whole batch.
        assert not reward(pictures(2), ["b", "b"]).valid.any()
    assert capsys.readouterr().err.count(f"HTTP {status}:") == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_judge_that_has_refused_all_there_was_ends_the_run(status: int) -> None:
    with running(fake(lambda path, request: (status, {}, b"no such option"))) as url:
        for text in (f"vlm[url={url}/v1,model=m]", f"tifa[url={url}/v1,model=m]"):
            with pytest.raises(UserError, match=f"refuses .HTTP {status}: no such option"):
                rewards.load(text)(pictures(2), ["a", "b"], [{"vqa_list": DOGS}] * 2)


def test_means_of_probabilities() -> None:
    assert vlm.geometric([0.25, 1.0]) == pytest.approx(0.5)
    assert vlm.geometric([0.5, 0.0]) == 0
    assert vlm.geometric([1e-300] * 3) == pytest.approx(1e-300)  # the product would be 0
    assert vlm.arithmetic([0.25, 1.0]) == 0.625
    for mean in vlm.MEANS.values():
        assert mean([1.0, 1.0]) == 1
        assert math.isnan(mean([]))
        assert math.isnan(mean([0.0, math.nan]))


def test_numbers_are_the_same_as_words_and_digits() -> None:
    assert vlm.spellings("Two") == vlm.spellings("2") == {"two", "2"}
    assert vlm.spellings("Yes.") == {"yes"}
    assert vlm.spellings("12") == {"12"}


def test_numbers_above_nine_are_found_as_a_word_only() -> None:
    # A server that writes 10 and 12 digit by digit tells of the 1.
    answer = logprobs(**{"1": 0.7, "ten": 0.2, " twelve": 0.05})
    assert vlm.share_of(answer, vlm.spellings("10")) == pytest.approx(0.2)
    assert vlm.share_of(answer, vlm.spellings("ten")) == pytest.approx(0.2)
    assert vlm.share_of(answer, vlm.spellings("12")) == 0
    assert vlm.share_of(answer, vlm.spellings("twelve")) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "no vqa_list"),
        ({"vqa_list": []}, "no vqa_list"),
        ({"vqa_list": "[["}, "no JSON"),
        ({"vqa_list": 3}, "no vqa_list"),
        ({"vqa_list": [["Is it red?"]]}, "no question with its answer"),
        ({"vqa_list": [["", "yes"]]}, "no question with its answer"),
        ({"vqa_list": [{"question": "Is it red?"}]}, "no question with its answer"),
        ({"vqa_list": '[["Is it red?", true]]'}, "no question with its answer"),
        ({"vqa_list": [{"question": "Is it red?", "answer": False}]}, "no question with its ans"),
    ],
)
def test_a_row_without_questions_has_no_score(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vlm.questions(row)
    reward = rewards.load("tifa[url=http://localhost:1/v1,model=m]")
    assert says in reward.components[0].scorer.cannot_score("a", row)


def test_questions_may_have_names() -> None:
    named = [{"question": "How many?", "answer": 2}, ("Is it red?", "yes")]
    assert vlm.questions({"vqa_list": named}) == [("How many?", "2"), ("Is it red?", "yes")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tifa", r"tifa\[url="),
        ("unifiedreward[model=m]", r"unifiedreward\[url="),
        ("tifa[url=http://a/v1,model=m,mean=median]", "mean is arithmetic or geometric"),
        ("unifiedreward[url=http://a/v1,model=m,tokens=0]", "tokens must be at least 1"),
        ("unifiedreward[url=http://a/v1,model=m,template=no.txt]", r"no\.txt cannot be read"),
        ("tifa[url=http://a/v1,model=m,workers=0]", "tifa: max_workers"),
    ],
)
def test_wrong_options_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        rewards.load(text)


# -- unifiedreward ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3", 0.75),
        ("**Alignment Score (1-5):** 4.5\n**Coherence Score (1–5)**: 1\nstyle score: 3.5", 0.5),
        ("First: Style Score: 1. Then Alignment Score: 5 Coherence Score: 5 Style Score: 5", 1.0),
        ("All in all.\nFinal Score: 2", 0.25),
        ("Alignment Score (1-5): 5\nCoherence Score (1-5): 4", math.nan),
        ("Alignment Score: 5 Coherence Score: 6 Style Score: 3", math.nan),
        ("Alignment Score: 0 Coherence Score: 5 Style Score: 3", math.nan),
        ("Alignment Score (1-5): high", math.nan),
        ("I cannot judge this.", math.nan),
    ],
)
def test_marks_are_read_from_an_answer(text: str, score: float) -> None:
    assert vlm.marks(text) == pytest.approx(score, nan_ok=True)


def test_unifiedreward_asks_for_marks_and_takes_their_mean(tmp_path: Path) -> None:
    seen: list[Any] = []
    answer = "Alignment Score (1-5): 5\nCoherence Score (1-5): 5\nStyle Score (1-5): 2"

    def judge(path: str, request: Any) -> Answer:
        seen.append(request["body"])
        content = answer if len(seen) < 3 else None
        return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()

    (tmp_path / "own.txt").write_text("Judge <{prompt}> {now}")
    with running(fake(judge)) as url:
        at = f"url={url}/v1,model=m"
        first = rewards.load(f"unifiedreward[{at}]")(pictures(1), ['a "red" cat'])
        own = rewards.load(f"unifiedreward[{at},template={tmp_path}/own.txt,tokens=9]")
        second, third = own(pictures(1), ["a cat"]), own(pictures(1), ["a cat"])
    assert first.scores.tolist() == second.scores.tolist() == [0.75]
    assert not third.valid.any()
    texts = [body["messages"][0]["content"][1]["text"] for body in seen]
    assert json.dumps('a "red" cat') in texts[0]
    assert texts[1] == "Judge <a cat> {now}"
    assert [body["max_tokens"] for body in seen] == [512, 9, 9]
    assert "logprobs" not in seen[0]
    (tmp_path / "own.txt").write_text("Judge")
    with pytest.raises(UserError, match=r"no place \{prompt\}"):
        rewards.load(f"unifiedreward[url=http://a/v1,model=m,template={tmp_path}/own.txt]")


def test_its_own_text_is_read_back_as_no_marks() -> None:
    # An answer that only repeats what was asked must not count.
    assert math.isnan(vlm.marks(vlm._MARKS_WANTED))
    assert torch.tensor(vlm.marks("Final Score: 5")).item() == 1
