"""What is secret in an address is masked wherever it is written, and nothing else is."""

import pytest

from dojo.cli import masking
from dojo.cli.masking import hide, secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:pass@host:8000/v1", "http://***@host:8000/v1"),
        ("http://token@host", "http://***@host"),
        ("https://me:p%40ss@host/a?key=abc&x=1#part", "https://***@host/a?key=***&x=***#part"),
        ("http://me:p@ss@host/v1", "http://***@host/v1"),
        ("http://me:pa/ss@host/v1", "http://***@host/v1"),
        ("http://me:pa#ss@host/v1", "http://***@host/v1"),
        ("http://host/?abcdef", "http://host/?***"),
        ("http://me:pass@[::1]:80/?key=abc", "http://***@[::1]:80/?key=***"),
        ("http://[::1]:80/?key=abc", "http://[::1]:80/?key=***"),
        (
            "vlm[url=http://me:pass@host/v1?k=v,model=m]=0.5,http://a:b@c#clip",
            "vlm[url=http://***@host/v1?k=***,model=m]=0.5,http://***@c#clip",
        ),
        ("('http://me:pass@host', 1)", "('http://***@host', 1)"),
    ],
)
def test_user_info_and_query_values_are_masked(text: str, expected: str) -> None:
    assert hide(text) == expected
    assert hide(expected) == expected  # a record is compared with a record


@pytest.mark.parametrize(
    "text",
    [
        "aesthetic=0.5,clip[model=models/pocket-clip]",
        "http://localhost:8000#pickscore=1",
        "https://host/@user/repository, a mail to a@b.c, and a = b?",
        "a sign that says what?=1 & more://",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide(text) == text


def test_an_answer_that_repeats_a_secret_is_masked_too() -> None:
    known = secrets("http://me:s%40cret@host/?key=hidden&n=1")
    assert hide("the key hidden of me:s@cret is wrong, n=1", known) == (
        "the key *** of *** is wrong, n=1"
    )


@pytest.mark.parametrize("name", ["hub_token", "modelscope_token", "api_key", "webhook"])
def test_an_option_that_holds_a_secret_is_known_by_its_name(name: str) -> None:
    assert masking.is_secret(name)


@pytest.mark.parametrize("name", ["initializer_token", "token_lr", "keep_tokens", "webhooks"])
def test_a_word_of_a_text_is_no_secret(name: str) -> None:
    assert not masking.is_secret(name)
