"""The user's words about a snapshot: a tag, a description, and whether it must not be deleted.

A tag given while a snapshot is taken is part of its manifest, which is about the snapshot alone and
never changes with them. What is said later stands beside it and goes before it. Tags are data: no
path, option or shell word is made of them; they are only checked to be text that can be shown.
"""

import unicodedata

from msgspec import Struct
from msgspec.structs import replace

from calotype.errors import RequestError
from calotype.model.snapshot import Manifest

MAX_TAG_LENGTH = 1024
MAX_DESCRIPTION_LENGTH = 65536

_NOT_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode: control characters, halves of characters, separators of lines."""


class Labels(Struct, frozen=True):
    """What the user said of a snapshot since it was taken; None: nothing."""

    tag: str | None = None
    description: str | None = None
    is_protected: bool = False


UNLABELLED = Labels()


def labelled(manifest: Manifest, labels: Labels) -> Manifest:
    """A manifest with the tag and description that count now."""
    tag = manifest.tag if labels.tag is None else labels.tag
    description = manifest.description if labels.description is None else labels.description
    return replace(manifest, tag=tag, description=description)


def check_tag(text: str) -> str:
    """Return a tag that can be kept and shown; an empty one stands for none.

    Raises:
        RequestError: It is too long, or holds what is no text.
    """
    return _check(text, "a tag", MAX_TAG_LENGTH, "")


def check_description(text: str) -> str:
    """Return a description that can be kept and shown; it may have several lines.

    Raises:
        RequestError: As `check_tag`.
    """
    return _check(text, "a description", MAX_DESCRIPTION_LENGTH, "\n\t")


def _check(text: str, what: str, limit: int, allowed: str) -> str:
    if len(text) > limit:
        raise RequestError(
            f"{what} of {len(text)} characters is too long", f"use at most {limit} characters"
        )
    for character in text:
        if character not in allowed and unicodedata.category(character) in _NOT_TEXT:
            raise RequestError(f"{what} holds {character!a}", "use text without control characters")
    return text
