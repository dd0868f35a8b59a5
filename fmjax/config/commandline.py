"""The command line: flags, overrides of the config, and exit codes.

A script declares its flags and makes one call. Its docstring, which has an example, is its help
text:

    def main(argv=None):
        flags = commandline.Flags(__doc__, config=True)
        flags.add("--workdir", type=Path, required=True, help="the run directory")
        return commandline.run(flags, lambda args: train(load(args), args.workdir), argv)

    if __name__ == "__main__":
        sys.exit(main())

Exit codes: 0 success; 2 user error, reported in one line; 75 interrupted: run the same command
again to continue. Any other error is a bug of fmjax and shows its traceback."""

from __future__ import annotations

import argparse
import os
import platform
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import fmjax
from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.config.numbers import real, whole
from fmjax.config.shipped import listing
from fmjax.errors import Interrupted, UserError, nearest, one_line
from fmjax.filesystems.paths import explained as explained_paths
from fmjax.hardware import explained
from fmjax.memory import keep_freed

DONE, USER_ERROR, INTERRUPTED = 0, 2, 75
OVERRIDE = "--config."
EPILOG = (
    "exit codes: 0 success; 2 user error; 75 interrupted, run the same command again to continue"
)


class Flags(argparse.ArgumentParser):
    """The flags of a script. Every mistake raises UserError. Flags cannot be abbreviated.

    `config=True` adds `--config FILE[:ARG,ARG]` and `--config.KEY=VALUE`; `load` reads both. `keys`
    returns the help text about the keys of a config, or of all configs for "".
    """

    def __init__(
        self, doc: str | None, config: bool = False, keys: Callable[[str], str] | None = None
    ):
        super().__init__(
            description=(doc or "").strip(),
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.names = ["-h", "--help"]
        self.takes_config, self.keys = config, keys
        self.add("--debug", action="store_true", help="show the traceback of a user error")
        self.add(
            "--version", action="version", version=version(), help="print the version, and exit"
        )
        if config:
            form = (
                "a config file or a name from --list, with arguments; "
                "--config.KEY=VALUE overrides a key"
            )
            self.add("--config", required=True, metavar="FILE[:ARG,ARG]", help=form)
            self.add(
                "--list",
                action=ListConfigs,
                nargs=0,
                help="list the configs that come with fmjax, and exit",
            )

    def add(self, *names: str, choices: Sequence[str] = (), **options: Any) -> None:
        """Adds a flag, like `argparse.ArgumentParser.add_argument`. Errors list and suggest
        `choices`.
        """
        if (kind := options.get("type")) in READERS:
            options["type"] = READERS[kind]
        if choices:
            options = {"type": one_of(choices), "metavar": "{" + ",".join(choices) + "}"} | options
        self.add_argument(*names, **options)
        self.names += names

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the values of the flags; with a config, also `overrides`, (key, text) pairs in
        order.

        Raises UserError for an unknown, missing or invalid flag. Prints the help and exits if
        requested."""
        rest, overrides = self.split_overrides(argv) if self.takes_config else (list(argv), [])
        for word in rest:
            name = word.partition("=")[0]
            if looks_like_flag(name) and name not in self.names:
                self.refuse_flag(name)
        if self.keys is not None and {"-h", "--help"} & set(rest):
            self.epilog = f"{EPILOG}\n\n{self.keys(value_of('--config', rest))}"
        args, strays = self.parse_known_args(rest)
        if strays:
            raise UserError(
                f'"{strays[0]}" does not belong to any flag; quote values that contain spaces, or '
                f"see {self.prog} --help"
            )
        if self.takes_config:
            args.overrides = overrides
        return args

    def split_overrides(self, argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Returns the other words, and the overrides: `--config.KEY=VALUE` or `--config.KEY
        VALUE`.
        """
        rest, overrides = [], []
        words = iter(argv)
        for word in words:
            if not word.startswith(OVERRIDE):
                rest.append(word)
                continue
            key, equals, text = word.removeprefix(OVERRIDE).partition("=")
            if not equals:
                text = next(words, "--")
                if text.startswith("--"):
                    raise UserError(f"{word}: has no value; write {word}=VALUE")
            overrides.append((key, text))
        return rest, overrides

    def refuse_flag(self, name: str) -> NoReturn:
        names = [known for known in self.names if known.startswith("--")]
        hint = nearest(name, names)
        if name.startswith(OVERRIDE):
            hint = ", as this command takes no config"
        elif self.takes_config and "." in name:
            hint = f' (did you mean "{OVERRIDE}{name.lstrip("-")}"?)'
        raise UserError(f"{name}: no such flag{hint}; choose from {', '.join(sorted(names))}")

    def error(self, message: str) -> NoReturn:
        """Raises argparse's error as a UserError, instead of printing the usage and exiting."""
        raise UserError(f"{message}; see {self.prog} --help")


class ListConfigs(argparse.Action):
    """A flag that prints the configs that come with fmjax, and ends the command."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        print(listing())
        parser.exit()


def version() -> str:
    """Returns the versions of fmjax, JAX and Python."""
    jax_version, python_version = metadata.version("jax"), platform.python_version()
    return f"fmjax {fmjax.__version__} (jax {jax_version}, Python {python_version})"


def value_of(name: str, words: Sequence[str]) -> str:
    """Returns the value of a flag in a list of words, "" if it has none."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name or word.startswith(f"{name}="):
            return word.partition("=")[2] or following
    return ""


def looks_like_flag(word: str) -> bool:
    """Returns whether a word is meant as a flag: it begins with a dash, and is neither a number nor
    a sentence.
    """
    return bool(re.match(r"--?[A-Za-z][^\s]*$", word))


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Returns a parser for flags that only accepts these values."""

    def read(text: str) -> str:
        if text not in choices:
            offer = f"choose one of {', '.join(choices)}"
            raise argparse.ArgumentTypeError(
                f'"{text}" is not known{nearest(text, choices)}; {offer}'
            )
        return text

    return read


def read_path(text: str) -> Path:
    """Returns a path. A leading "~" is the home folder, even if the shell does not expand it."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody
        raise argparse.ArgumentTypeError(
            f'"{text}": no such home folder; write the full path'
        ) from None


def read_whole(text: str) -> int:
    """Returns a whole number."""
    try:
        return whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number') from None


def read_real(text: str) -> float:
    """Returns a finite number."""
    try:
        return real(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number') from None


# Parser of a flag, by its type.
READERS: dict[Any, Callable[[str], Any]] = {Path: read_path, int: read_whole, float: read_real}


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the config of the flags as JSON values. Raises UserError if it is invalid."""
    config = load_config(args.config)
    apply_overrides(config, args.overrides)
    return to_dict(config)


def run(
    flags: Flags, main: Callable[[argparse.Namespace], object], argv: Sequence[str] | None = None
) -> int:
    """Parses the flags (`argv`, or else those of the process), calls `main` with them and returns
    the exit code.

    Writes one line to stderr for a user error or an interruption. Other exceptions are bugs and
    propagate."""
    if argv is None:
        use_utf8()
    words = sys.argv[1:] if argv is None else list(argv)
    keep_freed()
    try:
        with explained(), explained_paths():
            main(flags.parse(words))
        sys.stdout.flush()
        return DONE
    except UserError as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except Interrupted as error:
        print(f"interrupted: {one_line(error)}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(
            "interrupted from the keyboard; run the same command again to continue", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:
        if not close_broken_output():
            raise  # a different pipe, such as a worker's
        return INTERRUPTED


def use_utf8() -> None:
    """Restarts this command in Python's UTF-8 mode, unless file names are already UTF-8.

    In the locale "C" with PYTHONUTF8=0, Python can neither open `数据.csv` nor print its content.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def close_broken_output() -> bool:
    """Returns whether the reader of our output (such as `| head`) has exited; if so, discards the
    rest of the output.
    """
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    broken = [stream for stream, event in poll.poll(0) if event & select.POLLERR]
    for stream in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(broken)
