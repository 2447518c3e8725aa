"""The user's words about a snapshot go before those of its manifest."""

from builders import make_manifest
from calotype.model.labels import UNLABELLED, Labels, labelled


def test_what_was_said_since_goes_before_the_manifest_and_may_be_empty() -> None:
    manifest = make_manifest(tag="old", description="text")
    assert labelled(manifest, UNLABELLED) == manifest
    assert labelled(manifest, Labels(tag="new")).tag == "new"
    assert labelled(manifest, Labels(tag="new")).description == "text"
    assert labelled(manifest, Labels(tag="", description="")).tag == ""
