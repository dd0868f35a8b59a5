"""The configs that come with fmjax: named without a path, listed, and explained key by key in the help."""

from __future__ import annotations

from pathlib import Path

import pytest

import fmjax
from fmjax.config import commandline, load_config
from fmjax.config.files import find_config, leaves
from fmjax.config.shipped import shipped_configs
from fmjax.errors import UserError
from fmjax.train import keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("spec", ["bert_mlm", "configs/bert_mlm.py", "configs/bert_mlm"])
@pytest.mark.parametrize("arg", ["", "tiny", "tiny,nsp"])
def test_a_config_is_found_by_name(spec, arg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(f"{spec}:{arg}" if arg else spec) == (CONFIGS / "bert_mlm.py", arg)


def test_a_file_that_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "bert_mlm.py").write_text("")
    assert find_config("configs/bert_mlm.py:tiny") == (Path("configs/bert_mlm.py"), "tiny")
    (tmp_path / "bert_mlm").mkdir()  # a run directory, for example
    assert find_config("bert_mlm:tiny") == (CONFIGS / "bert_mlm.py", "tiny")


def test_a_config_of_that_name_elsewhere_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file; write --config bert_mlm to use the one that comes with fmjax"):
        load_config("bert_mlm.py:tiny")
    with pytest.raises(UserError, match="mine/bert_mlm.py: no such file"):
        load_config("mine/bert_mlm.py")
    with pytest.raises(UserError, match=r'no such file \(did you mean "bert_mlm.py"\?\)'):
        load_config("bert_mln:tiny")


def said(capsys, *words: str, config: bool = True) -> str:
    flags = commandline.Flags("Trains.", config=config, keys=keys.describe if config else None)
    flags.add("--workdir", required=True)
    with pytest.raises(SystemExit) as ended:
        commandline.run(flags, lambda args: pytest.fail("was run"), words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_list(capsys):
    lines = said(capsys, "--list").splitlines()
    assert {line.split()[0] for line in lines} == {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert "Pretrains BERT by masked language modeling on any text." in next(line for line in lines if "bert_mlm" in line)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("config", [True, False])
def test_version(config, capsys):
    assert said(capsys, "--version", config=config).startswith(f"fmjax {fmjax.__version__} (jax ")


def test_help_shows_the_keys(capsys):
    text = said(capsys, "--help")
    assert "  data.files={} " in text and "  data.batch_size=32" in text and "examples per training step" in text
    assert not any(line.startswith(("  model.", "  task.")) for line in text.splitlines())
    text = said(capsys, "--help", "--config", "bert_mlm:tiny")
    assert "keys, with the values of bert_mlm:tiny " in text
    assert "  task.mask_rate=0.15" in text and "fraction of the tokens that is masked" in text
    assert "  model.width=" in text and "width of hidden states" in text


@pytest.mark.parametrize("name", shipped_configs())
def test_every_key_has_its_line(name):
    described = keys.describe(name).splitlines()[1:]
    config = load_config(name)
    assert {".".join(path) for path, _ in leaves(config)} <= {line.split("=")[0].strip() for line in described}
    for line in described:
        key, *words = line.split(maxsplit=1)
        assert words, f"{name}: {key} has no meaning: write a comment beside its default"
