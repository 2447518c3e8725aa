"""The command line itself: a program and a row of arguments.

QEMU walks over its words twice and knows three kinds (system/vl.c, lookup_opt): a word without a
dash is a disk image, as if `-hda` stood before it; `-option` and `--option` are the same; an
option takes the next word, whatever it looks like, or it takes none. Nothing is reordered here:
anonymous devices are named by their order, and of many options the last one counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from calotype.errors import CommandLineError
from calotype.formats.argv.arity import FLAGS, VALUED
from calotype.formats.secrets import redacted, redacted_value


@dataclass(frozen=True, slots=True)
class Argument:
    """One option: its name without dashes, and its value if it takes one."""

    option: str
    value: str | None = None

    @property
    def text(self) -> str:
        """The value; "" where there is none."""
        return self.value or ""

    def words(self) -> tuple[str, ...]:
        """The words that QEMU reads it from."""
        return (f"-{self.option}",) if self.value is None else (f"-{self.option}", self.value)

    def refused(self, problem: str, remedy: str) -> CommandLineError:
        """The error that says what is wrong with this argument, and what to do."""
        words = redacted(self.words())
        value = None if self.value is None else words[-1]
        return CommandLineError(
            f"{' '.join(words)}: {redacted_value('', problem)}",
            redacted_value("", remedy),
            option=self.option,
            value=value,
        )


@dataclass(frozen=True, slots=True)
class CommandLine:
    """QEMU's command line as a value; a place in it is the index of an argument."""

    program: str
    arguments: tuple[Argument, ...] = ()

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "CommandLine":
        """Read the words that QEMU is started with, the program first.

        Raises:
            CommandLineError: There is no program, an option is unknown, or its value is missing.
        """
        if not argv:
            raise CommandLineError("the command line is empty", "begin with qemu-system-...")
        arguments, words = [], iter(argv[1:])
        for word in words:
            option = word.removeprefix("-").removeprefix("-")
            if not word.startswith("-"):
                arguments.append(Argument("hda", word))
            elif option in FLAGS:
                arguments.append(Argument(option))
            elif option not in VALUED:
                raise CommandLineError(f"QEMU has no option {word}", "correct it", option=word)
            elif (value := next(words, None)) is None:
                raise CommandLineError(f"{word} lacks its value", "add it", option=word)
            else:
                arguments.append(Argument(option, value))
        return cls(argv[0], tuple(arguments))

    def argv(self) -> list[str]:
        """The words to start QEMU with, the program first."""
        return [self.program, *(word for each in self.arguments for word in each.words())]

    def has(self, *options: str) -> bool:
        """Whether one of *options* is given."""
        return any(each.option in options for each in self.arguments)

    def values(self, *options: str) -> tuple[str, ...]:
        """The values of all arguments with one of *options*, in order."""
        return tuple(each.text for each in self.arguments if each.option in options)

    def having(self, changes: Mapping[int, Argument], *added: Argument) -> "CommandLine":
        """The same line with the arguments at some places exchanged, and some added at the end."""
        exchanged = (changes.get(place, each) for place, each in enumerate(self.arguments))
        return replace(self, arguments=(*exchanged, *added))
