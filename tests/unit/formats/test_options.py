from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calotype.errors import CommandLineError
from calotype.formats import options

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
VALUES = st.text(st.characters(codec="utf-8"), max_size=12)
LEAVES = VALUES | st.booleans() | st.integers()
TREES: st.SearchStrategy[Any] = st.dictionaries(
    NAMES,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("", None, ()),
        ("", "file", ()),
        ("if=virtio", None, (("if", "virtio"),)),
        ("file=a,,b.qcow2,if=virtio", None, (("file", "a,b.qcow2"), ("if", "virtio"))),
        ("file=a,,", None, (("file", "a,"),)),
        ("file=a,,,if=ide", None, (("file", "a,"), ("if", "ide"))),
        ("file=a,", None, (("file", "a"),)),
        ("file=", None, (("file", ""),)),
        ("file=,if=ide", None, (("file", ""), ("if", "ide"))),
        ("file=k=v", None, (("file", "k=v"),)),
        ("a=1,b=2,a=3", None, (("a", "1"), ("b", "2"), ("a", "3"))),
        ("server,nowait", None, (("server", "on"), ("wait", "off"))),
        ("node-name", None, (("de-name", "off"),)),
        ("512", "size", (("size", "512"),)),
        ("size=512", "size", (("size", "512"),)),
        ("q35,accel=tcg", "type", (("type", "q35"), ("accel", "tcg"))),
        ("a,,b,c", "type", (("type", "a,b"), ("c", "on"))),
        (",b=1", "type", (("type", ""), ("b", "1"))),
        ("file=a\nb,c=d", None, (("file", "a\nb"), ("c", "d"))),
    ],
)
def test_an_option_string_is_read_as_qemu_reads_it(
    text: str, implied: str | None, pairs: tuple[tuple[str, str], ...]
) -> None:
    assert options.parse(text, implied) == pairs


@pytest.mark.parametrize(("text", "position"), [("=x", 0), ("a=1,=2", 4), (",a=1", 0), ("no", 0)])
def test_a_missing_name_is_an_error_with_its_position(text: str, position: int) -> None:
    with pytest.raises(CommandLineError) as caught:
        options.parse(text)
    assert caught.value.data == {"text": text, "position": position}
    assert text in str(caught.value)


@given(st.lists(st.tuples(NAMES, VALUES)))
@example([("a", ","), ("b", ",,"), ("c", "")])
def test_pairs_survive_writing_and_reading(pairs: list[tuple[str, str]]) -> None:
    assert options.parse(options.unparse(pairs)) == tuple(pairs)


@given(st.text(alphabet="ab=,.n0o", max_size=12), st.sampled_from([None, "file"]))
def test_what_was_read_means_the_same_when_written(text: str, implied: str | None) -> None:
    try:
        pairs = options.parse(text, implied)
    except CommandLineError:
        return
    assert options.parse(options.unparse(pairs)) == pairs


@pytest.mark.parametrize(
    ("text", "implied", "tree"),
    [
        ("", None, {}),
        (
            "driver=qcow2,node-name=d0,file.driver=file,file.filename=x,,y",
            None,
            {
                "driver": "qcow2",
                "node-name": "d0",
                "file": {"driver": "file", "filename": "x,y"},
            },
        ),
        ("qcow2,file=f0", "driver", {"driver": "qcow2", "file": "f0"}),
        ("driver=raw,file=f0", "driver", {"driver": "raw", "file": "f0"}),
        ("a.0=x,a.1=y", None, {"a": ["x", "y"]}),
        ("a.1=y,a.0=x", None, {"a": ["x", "y"]}),
        ("a.0.b=x", None, {"a": [{"b": "x"}]}),
        ("a=1,a=2", None, {"a": "2"}),
        ("a.b=1,a.c=2,", None, {"a": {"b": "1", "c": "2"}}),
        ("__com.redhat_x.y=1", None, {"__com.redhat_x": {"y": "1"}}),
        ("a=", None, {"a": ""}),
        ('{"driver": "raw", "read-only": true}', None, {"driver": "raw", "read-only": True}),
        ("{'driver': 'ra\"w', \"x\": 1}", None, {"driver": 'ra"w', "x": 1}),
        (r"{'a': 'it\'s'}", None, {"a": "it's"}),
        ('{"a": "it\'s"}', None, {"a": "it's"}),
    ],
)
def test_a_keyval_or_json_string_is_read_as_qemu_reads_it(
    text: str, implied: str | None, tree: dict[str, Any]
) -> None:
    assert options.parse_nested(text, implied) == tree


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("driver", 0, "has no '='"),
        ("driver=raw,readonly", 11, "has no '='"),
        ("help", 0, "asks for help"),
        ("driver=raw,?", 11, "asks for help"),
        ("a=1,0=2", 4, "not a key"),
        ("a..b=1", 0, "not a key"),
        ("a.0b=1", 0, "not a key"),
        (f"{'x' * 128}=1", 0, "not a key"),
        ("a=1,a.b=2", 4, "contradicts"),
        ("a.b=1,a=2", 0, "contradicts"),
        ("a.0=1,a.b=2", 0, "both a list and an object"),
        ("a.1=x", 0, "'a.0' is missing"),
        ("a.0=x,a.2=y", 0, "'a.1' is missing"),
        ('{"driver": raw}', 11, "not JSON"),
        ('{"driver": "raw"} x', 18, "not JSON"),
    ],
)
def test_what_keyval_does_not_allow_is_an_error_with_its_position(
    text: str, position: int, problem: str
) -> None:
    with pytest.raises(CommandLineError, match=problem) as caught:
        options.parse_nested(text)
    assert caught.value.data == {"text": text, "position": position}


@given(TREES)
def test_a_tree_survives_json(tree: dict[str, Any]) -> None:
    assert options.parse_nested(options.unparse_json(tree)) == tree


@given(TREES)
def test_a_tree_survives_being_flat(tree: dict[str, Any]) -> None:
    assert options.nest(options.flatten(tree)) == tree


@given(TREES)
def test_a_flat_tree_survives_keyval(tree: dict[str, Any]) -> None:
    flat = {key: options.text_of(leaf) for key, leaf in options.flatten(tree).items()}
    read = options.parse_nested(options.unparse(flat.items()))
    assert options.flatten(read) == flat


@pytest.mark.parametrize(
    ("leaf", "text"), [(True, "on"), (False, "off"), (None, ""), (7, "7"), ("x,y", "x,y")]
)
def test_leaves_are_spelled_as_keyval_does(leaf: object, text: str) -> None:
    assert options.text_of(leaf) == text


@pytest.mark.parametrize(
    ("text", "unit", "size_bytes"),
    [
        ("0", "B", 0),
        ("512", "B", 512),
        ("512", "M", 512 << 20),
        ("512b", "M", 512),
        ("1k", "B", 1024),
        ("2G", "B", 2 << 30),
        ("0.5g", "B", 512 << 20),
        (".5G", "B", 512 << 20),
        ("1.k", "B", 1024),
        ("1T", "M", 1 << 40),
        ("0x1000", "B", 4096),
        ("08", "B", 8),
    ],
)
def test_a_size_is_read_as_qemu_reads_it(text: str, unit: str, size_bytes: int) -> None:
    assert options.parse_size(text, unit) == size_bytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1 G", "0x10M", "1z", "16E", "1GG", "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CommandLineError):
        options.parse_size(text)
