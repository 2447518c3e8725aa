"""The command's entry; `python -m calotype` is `calotype`.

Imports take a few tenths of a second, and nobody could answer Ctrl-C or SIGTERM during them. So
both are held back here, and let through by `calotype.cli.main.main` once their answer stands. When
all is said they are held back again: an exit code that is settled stays.
"""

import signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Run one command."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    from calotype.cli.main import main as command  # noqa: PLC0415

    try:
        command()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


if __name__ == "__main__":
    main()
