import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.errors import CommandLineError
from calotype.formats.argv import Argument, CommandLine, machine, memory_bytes, with_machine
from calotype.formats.argv.arity import FLAGS, VALUED
from calotype.formats.argv.syntax import IMPLIED, JSON, KEYVAL


def line(text: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *text.split()])


ARGUMENTS = st.one_of(
    st.builds(Argument, st.sampled_from(sorted(VALUED)), st.text(max_size=8)),
    st.builds(Argument, st.sampled_from(sorted(FLAGS))),
)


@given(st.lists(ARGUMENTS))
def test_a_command_line_survives_writing_and_reading(arguments: list[Argument]) -> None:
    command = CommandLine("qemu", tuple(arguments))
    assert CommandLine.parse(command.argv()) == command


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--drive file=a", "-drive file=a"),
        ("a.qcow2 -S", "-hda a.qcow2 -S"),
        ("-m -S", "-m -S"),
        ("-drive --drive", "-drive --drive"),
        ("--S", "-S"),
    ],
)
def test_words_are_taken_as_qemu_takes_them(written: str, read: str) -> None:
    assert line(written).argv()[1:] == read.split()


def test_an_empty_word_is_a_disk_without_an_image() -> None:
    assert CommandLine.parse(["qemu", ""]).arguments == (Argument("hda", ""),)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "is empty"),
        (["qemu", "-m"], "-m lacks its value"),
        (["qemu", "-S", "--drive"], "--drive lacks its value"),
        (["qemu", "-curses"], "QEMU has no option -curses"),
        (["qemu", "-"], "QEMU has no option -"),
        (["qemu", "---drive", "x"], "QEMU has no option ---drive"),
        (["qemu", "-mem"], "QEMU has no option -mem"),
    ],
)
def test_what_qemu_would_not_take_is_refused(argv: list[str], problem: str) -> None:
    with pytest.raises(CommandLineError, match=problem):
        CommandLine.parse(argv)


def test_the_tables_agree_with_each_other() -> None:
    assert not VALUED & FLAGS
    assert IMPLIED.keys() | KEYVAL | JSON <= VALUED


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("", 128 << 20),
        ("-m 512", 512 << 20),
        ("-m size=512M", 512 << 20),
        ("-m 0.5G", 512 << 20),
        ("-m 1g,slots=2,maxmem=4G", 1 << 30),
        ("-m 512 -m 256", 256 << 20),
        ("-m 512 -m slots=2,maxmem=1G", 512 << 20),
        ("-m 0", 128 << 20),
        ("-m 10000b", 16384),
        ("-machine q35,memory.size=256M", 256 << 20),
        ("-m 64 -machine q35,memory.size=256M", 64 << 20),
        ("-object memory-backend-ram,id=r,size=1G -M q35,memory-backend=r", 1 << 30),
        ("-object memory-backend-ram,id=r,size=1G -M q35", 128 << 20),
    ],
)
def test_memory_is_counted_as_qemu_counts_it(text: str, size_bytes: int) -> None:
    assert memory_bytes(line(text)) == size_bytes


@pytest.mark.parametrize("text", ["-m x", "-m 1.5b", "-machine q35,memory.size=?"])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CommandLineError):
        memory_bytes(line(text))


@pytest.mark.parametrize(
    ("text", "name", "changed"),
    [
        ("-S", "", "-S -machine type=pc-q35-10.0"),
        ("-M q35", "q35", "-M type=pc-q35-10.0"),
        (
            "-machine accel=tcg,type=q35,smm=off -S",
            "q35",
            "-machine accel=tcg,type=pc-q35-10.0,smm=off -S",
        ),
        (
            "-machine accel=tcg -smp 2",
            "",
            "-machine accel=tcg -smp 2 -machine type=pc-q35-10.0",
        ),
        (
            "-M pc -machine q35,accel=tcg",
            "q35",
            "-M type=pc-q35-10.0 -machine type=pc-q35-10.0,accel=tcg",
        ),
    ],
)
def test_the_machine_type_is_exchanged_and_the_rest_stays(
    text: str, name: str, changed: str
) -> None:
    command = line(text)
    assert machine(command) == name
    assert with_machine(command, "pc-q35-10.0").argv()[1:] == changed.split()
    assert machine(with_machine(command, "pc-q35-10.0")) == "pc-q35-10.0"
