import pytest

from calotype.errors import CommandLineError
from calotype.formats.argv import (
    REFUSED,
    CommandLine,
    Endpoints,
    for_restore,
    has_console,
    supervised,
)
from calotype.formats.argv.arity import VALUED
from calotype.formats.argv.refusals import REFUSED_SETTINGS

ENDPOINTS = Endpoints(
    control_fd=7, query_fd=8, guard_fd=10, service_fd=11, console_fd=9, console_log="/l/a,b.log"
)
MONITORS = [
    "-chardev", "socket,id=calotype-control,fd=7,server=on,wait=off",
    "-mon", "chardev=calotype-control,mode=control",
    "-chardev", "socket,id=calotype-query,fd=8,server=on,wait=off",
    "-mon", "chardev=calotype-query,mode=control",
    "-chardev", "socket,id=calotype-guard,fd=10,server=on,wait=off",
    "-mon", "chardev=calotype-guard,mode=control",
    "-chardev", "socket,id=calotype-service,fd=11,server=on,wait=off",
    "-mon", "chardev=calotype-service,mode=control",
]  # fmt: skip
LOG = "logfile=/l/a,,b.log,logappend=on"
CONSOLE = ["-chardev", f"socket,id=calotype-console,fd=9,server=on,wait=off,{LOG}"]
PORT = ["-serial", "chardev:calotype-console"]


def line(text: str) -> CommandLine:
    return CommandLine.parse(["qemu", *text.split()])


SUPERVISED = {
    "": [*CONSOLE, *PORT],
    "-nographic -m 64": ["-nographic", "-m", "64", *CONSOLE, *PORT],
    "-nodefaults": ["-nodefaults"],
    "-nodefaults -nographic": ["-nodefaults", "-nographic"],
    "-serial stdio -S": [*PORT, "-S", *CONSOLE],
    "-serial mon:stdio -S": [*PORT, "-S", *CONSOLE],
    "-nodefaults -serial stdio": ["-nodefaults", *PORT, *CONSOLE],
    "-serial null -serial stdio": ["-serial", "null", *PORT, *CONSOLE],
    "-serial file:x": ["-serial", "file:x"],
    "-nographic -serial pty": ["-nographic", "-serial", "pty"],
    "-serial none": ["-serial", "none"],
    "-device isa-serial,chardev=c": ["-device", "isa-serial,chardev=c"],
    "-monitor stdio": ["-monitor", "none", *CONSOLE, *PORT],
    "-monitor stdio -serial null": ["-monitor", "none", "-serial", "null"],
    "-monitor vc": ["-monitor", "vc", *CONSOLE, *PORT],
    "-chardev stdio,id=c,mux=on,signal=off -serial chardev:c": [
        "-chardev", f"socket,id=c,fd=9,server=on,wait=off,mux=on,{LOG}",
        "-serial", "chardev:c",
    ],
    "-chardev socket,id=c,path=s -serial chardev:c": [
        "-chardev", "socket,id=c,path=s", "-serial", "chardev:c",
    ],
}  # fmt: skip
CONSOLES = {text: any(LOG in word for word in words) for text, words in SUPERVISED.items()}


@pytest.mark.parametrize(("text", "words"), SUPERVISED.items())
def test_the_terminal_becomes_a_console(text: str, words: list[str]) -> None:
    assert supervised(line(text), ENDPOINTS).argv() == ["qemu", *words, *MONITORS]


@pytest.mark.parametrize(("text", "console"), CONSOLES.items())
def test_whether_there_is_a_console_is_known_beforehand(text: str, console: bool) -> None:
    assert has_console(line(text)) == console


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_a_refused_option_is_refused_with_its_reason(option: str) -> None:
    command = line(f"-S -{option} x" if option in VALUED else f"-S -{option}")
    with pytest.raises(CommandLineError) as caught:
        supervised(command, ENDPOINTS)
    assert f"-{option}" in caught.value.problem
    assert REFUSED[option] in caught.value.problem


@pytest.mark.parametrize(("option", "key", "value"), REFUSED_SETTINGS)
def test_a_refused_setting_is_refused_with_its_reason(
    option: str, key: str, value: str | None
) -> None:
    with pytest.raises(CommandLineError) as caught:
        supervised(line(f"-{option} x=y,{key}={value or 'z'}"), ENDPOINTS)
    assert REFUSED_SETTINGS[option, key, value] in caught.value.problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("-display curses", "needs a terminal"),
        ("-display curses,charset=CP437", "needs a terminal"),
        ("-netdev {'type':'stream','id':'n','addr':{'type':'fd','str':'3'}}", "cannot be opened"),
        ("-serial stdio -monitor stdio", "something else uses stdio"),
        ("-chardev stdio,id=c -serial stdio", "something else uses stdio"),
        ("-nographic -monitor stdio", "something else uses stdio"),
        ("-serial stdio -serial stdio", "something else uses stdio"),
        ("-parallel stdio", "without a terminal"),
        ("-debugcon mon:stdio", "without a terminal"),
        ("-qmp stdio", "without a terminal"),
        ("-gdb stdio", "without a terminal"),
        ("-chardev stdio,id=c,logfile=x", "logged by Calotype"),
        ("-chardev null,id=calotype-x", "are Calotype's"),
        ("-device {'driver':'e1000','id':'calotype-x'}", "are Calotype's"),
        ("-drive file=a,node-name=calotype-x", "are Calotype's"),
        ("-blockdev null-co,node-name=calotype-x", "are Calotype's"),
        ("-object iothread,id=calotype-x", "are Calotype's"),
    ],
)
def test_what_cannot_be_supervised_is_refused(text: str, problem: str) -> None:
    with pytest.raises(CommandLineError, match=problem) as caught:
        supervised(line(text), ENDPOINTS)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [("-m 64", "-m 64 -S -incoming defer"), ("-S -m 64", "-S -m 64 -incoming defer")],
)
def test_a_restored_qemu_waits_for_its_state_and_stays_paused(text: str, words: str) -> None:
    assert for_restore(line(text)).argv()[1:] == words.split()
