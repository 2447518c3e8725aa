"""The user's words are text of a bounded length, and go before those of the manifest."""

import pytest

from builders import make_manifest
from calotype.errors import RequestError
from calotype.model.labels import (
    MAX_TAG_LENGTH,
    UNLABELLED,
    Labels,
    check_description,
    check_tag,
    labelled,
)


@pytest.mark.parametrize(
    "text",
    ["", "before", "x" * MAX_TAG_LENGTH, "a/b ../c", "\u65e5\u672c", "\U0001f468\u200d\U0001f469"],
)
def test_text_is_a_tag(text: str) -> None:
    assert check_tag(text) == text


@pytest.mark.parametrize("text", ["a\nb", "\0", "\x1b[31m", "\x7f", "\udcff", "a\u2028b", "\t"])
def test_what_is_no_text_is_none(text: str) -> None:
    with pytest.raises(RequestError, match="a tag holds") as refused:
        check_tag(text)
    assert str(refused.value).isprintable()


def test_a_tag_that_is_too_long_is_none() -> None:
    with pytest.raises(RequestError, match="1025 characters is too long"):
        check_tag("x" * (MAX_TAG_LENGTH + 1))


def test_a_description_may_have_lines() -> None:
    assert check_description("one\n\ttwo") == "one\n\ttwo"
    with pytest.raises(RequestError, match="a description holds"):
        check_description("\0")


def test_what_was_said_since_goes_before_the_manifest_and_may_be_empty() -> None:
    manifest = make_manifest(tag="old", description="text")
    assert labelled(manifest, UNLABELLED) == manifest
    assert labelled(manifest, Labels(tag="new")).tag == "new"
    assert labelled(manifest, Labels(tag="new")).description == "text"
    assert labelled(manifest, Labels(tag="", description="")).tag == ""
