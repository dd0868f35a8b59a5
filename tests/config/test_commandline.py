"""Flags, overrides and exit codes: in-process through a tiny script, and once as a real command."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest

from fmjax.config import commandline
from fmjax.errors import Interrupted, UserError

ROOT = Path(__file__).resolve().parents[2]

DOC = """Trains a model.

    python scripts/train.py --config configs/x.py --workdir RUN
"""

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from fmjax.config import arguments, open_dict

def get_config(arg: str = ""):
    tiny = "tiny" in arguments(arg, "tiny")
    train = {"steps": placeholder(int), "seed": 0, "tiny": tiny, "decay": ("a", "b")}
    return ConfigDict({"train": train, "mesh": {"axes": open_dict(data=-1)}})
"""


def flags(config: bool = True) -> commandline.Flags:
    made = commandline.Flags(DOC, config=config)
    made.add("--workdir", type=Path, required=True, help="the run directory")
    made.add("--split", choices=("train", "validation", "test"), default="test", help="what to evaluate on")
    made.add("--count", type=int, default=1)
    made.add("--verbose", action="store_true")
    return made


def run(*argv: str, config: bool = True, main=lambda args: None) -> int:
    return commandline.run(flags(config), main, argv)


def parsed(*argv: str, config: bool = True) -> Namespace:
    seen: list[Namespace] = []
    assert run(*argv, config=config, main=seen.append) == 0
    return seen[0]


def refusal(capsys, *argv: str, config: bool = True) -> str:
    """Returns the line that a command with mistaken flags writes to stderr, and nothing else."""
    assert run(*argv, config=config, main=lambda args: pytest.fail("was run")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_flags():
    args = parsed("--workdir", "runs/a", "--split=train", "--count", "-3", config=False)
    assert vars(args) == {
        "debug": False,
        "workdir": Path("runs/a"),
        "split": "train",
        "count": -3,
        "verbose": False,
    }


def test_a_path_may_begin_with_the_home_folder(capsys):
    assert parsed("--workdir=~/r", config=False).workdir == Path.home() / "r"
    assert "no such home folder" in refusal(capsys, "--workdir=~nobody_at_all/r", config=False)


def test_numbers_of_flags_are_digits(capsys):
    for text in ("1_0", "١", "0x1", " 1"):
        assert "is not a whole number" in refusal(capsys, "--workdir=w", f"--count={text}", config=False)


def test_overrides_are_collected_in_order():
    args = parsed(
        "--config.a.b=1", "--config", "x.py:tiny", "--config.mesh.axes", '{"data": -1}', "--workdir=w",
        "--config.a.b=x=y", "--config.c", "-1", "--config.d=", "--debug",
    )  # fmt: skip
    assert args.config == "x.py:tiny"
    expected = [("a.b", "1"), ("mesh.axes", '{"data": -1}'), ("a.b", "x=y"), ("c", "-1"), ("d", "")]
    assert args.overrides == expected
    assert args.debug


def test_load(tmp_path):
    (tmp_path / "x.py").write_text(CONFIG)
    spec = f"--config={tmp_path}/x.py:tiny"
    args = parsed(spec, "--workdir=w", "--config.train.steps=1e2", "--config.mesh.axes.m=2")
    assert commandline.load(args) == {
        "mesh": {"axes": {"data": -1, "m": 2}},
        "train": {"steps": 100, "seed": 0, "tiny": True, "decay": ["a", "b"]},
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wokdir", "a"], '--wokdir: no such flag (did you mean "--workdir"?); choose from --config, '),
        (["--wokdir=a"], "--wokdir: no such flag (did you mean"),
        (["-workdir=a"], '-workdir: no such flag (did you mean "--workdir"?)'),
        (["--work", "a"], "--work: no such flag"),
        (["--config:tiny"], '--config:tiny: no such flag (did you mean "--config"?)'),
        (["--train.steps=1"], '--train.steps: no such flag (did you mean "--config.train.steps"?)'),
        (["-x"], "-x: no such flag; choose from "),
        ([], "the following arguments are required: --config, --workdir; see "),
        (["--config=c", "--workdir"], "argument --workdir: expected one argument; see "),
        (["--config=c", "--workdir=w", "--count=x"], 'argument --count: "x" is not a whole number; see '),
        (["--config=c", "--workdir=w", "--verbose=1"], "--verbose: ignored explicit argument '1'; see "),
        (
            ["--config=c", "--workdir=w", "stray"],
            '"stray" does not belong to any flag; quote values that contain spaces, or see ',
        ),
        (["--config=c", "--workdir=w", "--config.a"], "--config.a: has no value; write --config.a=VALUE"),
        (["--config.a", "--workdir=w", "--config=c"], "--config.a: has no value; write --config.a=VALUE"),
        (
            ["--config=c", "--workdir=w", "--split=tset"],
            '"tset" is not known (did you mean "test"?); choose one of train, validation, test; see ',
        ),
    ],
)
def test_mistaken_flags(capsys, argv, message):
    assert message in refusal(capsys, *argv)


def test_overrides_where_there_is_no_config(capsys):
    message = refusal(capsys, "--workdir=w", "--config.a=1", config=False)
    assert "--config.a: no such flag, as this command takes no config; choose from --count, " in message
    assert "--config: no such flag" in refusal(capsys, "--workdir=w", "--config=c", config=False)


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Trains a model.\n\n    python scripts/train.py --config configs/x.py --workdir RUN\n" in text
    for part in ("--config FILE[:ARG,ARG]", "--config.KEY=VALUE", "{train,validation,test}", "exit codes: 0"):
        assert part in text


def ends(capsys, error: BaseException, *argv: str) -> tuple[int, str]:
    def main(args: Namespace) -> None:
        raise error

    code = run("--config=c", "--workdir=w", *argv, main=main)
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


def test_user_errors_end_with_2_and_one_line(capsys):
    assert ends(capsys, UserError("what; why; how")) == (2, "error: what; why; how\n")
    message = "two \n\n  lines\r\nand\x1b[31m 语 é"
    assert ends(capsys, UserError(message)) == (2, "error: two lines and\\x1b[31m 语 é\n")


def test_debug_shows_the_traceback(capsys):
    code, text = ends(capsys, UserError("what; why; how"), "--debug")
    assert code == 2
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith("\nerror: what; why; how\n")


def test_debug_shows_the_traceback_of_a_mistaken_flag(capsys):
    assert run("--debug", "--bogus") == 2
    assert "Traceback" in capsys.readouterr().err


def test_interruptions_end_with_75(capsys):
    message = "SIGTERM: saved step 3; run the same command again to continue"
    assert ends(capsys, Interrupted(message)) == (75, f"interrupted: {message}\n")
    code, text = ends(capsys, KeyboardInterrupt())
    assert (code, text) == (75, "interrupted from the keyboard; run the same command again to continue\n")


@pytest.mark.parametrize("error", [ValueError("bug"), BrokenPipeError("of a worker"), SystemExit(5)])
def test_what_is_not_the_users_fault_passes_through(capsys, error):
    with pytest.raises(type(error)):
        ends(capsys, error)


SCRIPT = '''
    """Prints the config.

        python show.py --config x.py
    """

    import sys

    from fmjax.config import commandline


    def main(argv=None):
        flags = commandline.Flags(__doc__, config=True)
        flags.add("--lines", type=int, default=1, help="how often")
        return commandline.run(flags, show, argv)


    def show(args):
        config = commandline.load(args)
        for _ in range(args.lines):
            print(config)


    if __name__ == "__main__":
        sys.exit(main())
'''


def test_as_a_command(tmp_path):
    (tmp_path / "x.py").write_text(CONFIG)
    (tmp_path / "show.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "show.py", "--config", "x.py"]
    options = {"cwd": tmp_path, "text": True, "env": {"PYTHONPATH": str(ROOT), "PATH": ""}}

    done = subprocess.run([*command, "--config.train.seed=3"], capture_output=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'seed': 3" in done.stdout

    wrong = subprocess.run([*command, "--config.train.sede=3"], capture_output=True, **options)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        'error: config.train.sede=3: no such key (did you mean "seed"?); config.train has decay, seed, steps, tiny\n'
    )

    for lines in (1, 20_000):  # the reader has gone before the end, or in the middle
        with subprocess.Popen(
            [*command, f"--lines={lines}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        ) as unread:
            unread.stdout.close()
            assert unread.stderr.read() == ""
        assert unread.returncode == 75
