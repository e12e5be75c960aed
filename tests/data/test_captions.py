"""Claims about which caption a use gets: asked-for rates, fixed orders, nothing unforeseen."""

from collections import Counter

import pytest

from dojo.data import CaptionArgs
from dojo.data.sources.captions import choose, every, shuffled

TAGS = "hero, red hair, smile, outdoors, night, rain"


def chosen(
    args: CaptionArgs, alternatives: tuple[str, ...], count: int, seed: int = 0
) -> list[str]:
    return [choose(alternatives, args, seed, place) for place in range(count)]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"caption_dropout": -0.1}, "--caption_dropout"),
        ({"caption_dropout": 1.1}, "--caption_dropout"),
        ({"caption_dropout": float("nan")}, "--caption_dropout"),
        ({"keep_tokens": -1, "shuffle_caption": True}, "--keep_tokens"),
        ({"keep_tokens": 1}, "--shuffle_caption"),
        ({"caption_variants": 0}, "--caption_variants"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        CaptionArgs(**options)  # pyright: ignore[reportArgumentType]


def test_captions_are_dropped_at_the_asked_rate() -> None:
    def share(rate: float) -> float:
        captions = chosen(CaptionArgs(caption_dropout=rate), ("a",), 2000)
        return captions.count("") / len(captions)

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert 0.07 < share(0.1) < 0.13


def test_dropping_does_not_change_what_is_kept() -> None:
    plain, dropping = (
        CaptionArgs(shuffle_caption=True),
        CaptionArgs(shuffle_caption=True, caption_dropout=0.5),
    )
    pairs = list(
        zip(chosen(plain, (TAGS, "b, c"), 200), chosen(dropping, (TAGS, "b, c"), 200), strict=True)
    )
    assert 50 < sum(kept != "" for _, kept in pairs) < 150
    assert all(kept in ("", wanted) for wanted, kept in pairs)


def test_each_alternative_has_its_share() -> None:
    counts = Counter(chosen(CaptionArgs(), ("a", "b", "c"), 3000))
    assert set(counts) == {"a", "b", "c"}
    assert all(900 < count < 1100 for count in counts.values())


def test_a_choice_hangs_on_seed_and_place_alone() -> None:
    args = CaptionArgs(caption_dropout=0.2, shuffle_caption=True)
    first, again, other = (chosen(args, (TAGS, "b, c"), 100, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_shuffling_moves_tags_and_loses_none() -> None:
    orders = {shuffled(TAGS, variant) for variant in range(20)}
    assert len(orders) > 15
    assert all(sorted(order.split(", ")) == sorted(TAGS.split(", ")) for order in orders)


def test_the_first_tags_stay_in_place() -> None:
    for variant in range(20):
        assert shuffled(TAGS, variant, keep_tokens=2).split(", ")[:2] == ["hero", "red hair"]
    orders = {shuffled(TAGS, variant, keep_tokens=2) for variant in range(20)}
    assert len(orders) > 5


@pytest.mark.parametrize("caption", ["a red circle", "", "one,", "one, two"])
def test_a_caption_without_tags_to_exchange_stays_as_it_is(caption: str) -> None:
    assert shuffled(caption, 3, keep_tokens=1) == caption


def test_the_orders_are_the_same_in_every_run() -> None:
    # They are keys of the text cache, which runs with other seeds share.
    args = CaptionArgs(shuffle_caption=True, caption_variants=3)
    seen = [set(chosen(args, (TAGS,), 100, seed=seed)) for seed in (0, 1, 2)]
    assert seen[0] == seen[1] == seen[2] == set(every((TAGS,), args))
    assert shuffled(TAGS, 0) == "night, red hair, smile, outdoors, hero, rain"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_names_exactly_what_choose_may_give(shuffle: bool, dropout: float) -> None:
    args = CaptionArgs(shuffle_caption=shuffle, caption_dropout=dropout, caption_variants=3)
    alternatives = (TAGS, "a, b, c", "a red circle", "a red circle")
    named = every(alternatives, args)
    given = set(chosen(args, alternatives, 2000))
    assert given - {""} == set(named)
    assert ("" in given) == (dropout > 0)
    assert len(named) == len(set(named))
