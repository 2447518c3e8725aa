"""The user's words about a snapshot: a tag, a description, and whether it must not be deleted.

A tag given while a snapshot is taken is part of its manifest, which is about the snapshot alone and
never changes with them. What is said later stands beside it and goes before it. Tags are data: no
path, option or shell word is made of them (`names.check_tag` says what is text).
"""

from msgspec import Struct
from msgspec.structs import replace

from calotype.model.snapshot import Manifest


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
