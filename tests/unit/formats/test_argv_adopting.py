"""What of another's command line is started again, and what is said of the rest."""

import pytest

from calotype.formats.argv import (
    CommandLine,
    console_path,
    named_devices,
    obstacles,
    without_its_start,
)


def line(text: str) -> CommandLine:
    return CommandLine.parse(["qemu", *text.split()])


WITHOUT = {
    "-m 64": "-m 64",
    "-m 64 -daemonize -S": "-m 64",
    "-incoming defer -m 64 -loadvm tag": "-m 64",
    "-qmp unix:s,server=on,wait=off": "-qmp unix:s,server=on,wait=off",
    "-qmp unix:s,server,nowait": "-qmp unix:s,server,nowait",
    "-qmp unix:s,server": "-qmp unix:s,server,wait=off",
    "-serial unix:s,server=on,wait=on": "-serial unix:s,server=on,wait=on,wait=off",
    "-serial unix:s": "-serial unix:s",
    "-chardev socket,id=c,path=s,server=on": "-chardev socket,id=c,path=s,server=on,wait=off",
    "-chardev socket,id=c,fd=3,server=on": "-chardev socket,id=c,fd=3,server=on",
    "-chardev file,id=c,path=s": "-chardev file,id=c,path=s",
}


@pytest.mark.parametrize(("ran", "again"), WITHOUT.items())
def test_what_was_about_one_start_is_left_out_of_another(ran: str, again: str) -> None:
    command, dropped = without_its_start(line(ran))
    assert command == line(again)
    assert bool(dropped) == (ran != again)
    assert all(each.words in ran and each.reason for each in dropped)


OBSTACLES = {
    "-m 64": [],
    "-netdev tap,id=n,fd=33": ["fd=33"],
    "-netdev tap,id=n,fds=3:4,vhostfds=5:6": ["fds=3:4"],
    "-add-fd fd=3,set=2 -preconfig": ["-add-fd", "-preconfig"],
    "-display curses -chardev socket,id=c,fd=3": ["curses", "fd=3"],
    "-serial stdio -debugcon stdio": ["stdio"],
}


@pytest.mark.parametrize(("ran", "words"), OBSTACLES.items())
def test_every_word_that_cannot_be_started_again_is_told(ran: str, words: list[str]) -> None:
    found = [error.problem for error in obstacles(line(ran))]
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True))


def test_devices_with_an_id_are_told_with_their_drivers() -> None:
    command = line("-device virtio-rng-pci,id=r -device usb-tablet -device driver=e1000,id=n")
    assert named_devices(command) == {"r": "virtio-rng-pci", "n": "e1000"}


CONSOLES = {
    "": "",
    "-nographic": "",
    "-serial stdio": "",
    "-serial unix:s,server=on": "/vm/s",
    "-serial unix:/run/s,server,nowait": "/run/s",
    "-serial unix:s": "",
    "-serial null -serial unix:s,server=on": "",
    "-chardev socket,id=c,path=s,server=on -serial chardev:c": "/vm/s",
    "-chardev socket,id=c,path=s,server=on -serial chardev:d": "",
    "-chardev socket,id=c,fd=3,server=on -serial chardev:c": "",
}


@pytest.mark.parametrize(("ran", "path"), CONSOLES.items())
def test_the_console_is_the_first_serial_port_where_that_can_be_reached(
    ran: str, path: str
) -> None:
    assert console_path(line(ran), "/vm") == path
