"""Config files, overrides, the stored config, and what may differ when a run is continued."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fmjax import __version__
from fmjax.config import (
    apply_overrides,
    arguments,
    check_resumable,
    load_config,
    open_dict,
    read_config,
    to_dict,
    write_config,
)
from fmjax.config.stored import LISTED, continued
from fmjax.defaults import unset
from fmjax.errors import UserError
from fmjax.models import t5


def experiment() -> ConfigDict:
    """A config with a key of every kind, locked as those of experiments are."""
    config = ConfigDict()
    config.model = ConfigDict({"name": "bert", "size": placeholder(str), "width": placeholder(int)})
    config.data = ConfigDict({"files": open_dict(), "columns": placeholder(tuple), "batch_size": 32})
    config.optim = ConfigDict(
        {
            "learning_rate": 1e-4,
            "no_decay": ("bias$", "norm/scale$"),
            "freeze": (),
            "betas": (0.9, 0.999),
            "bounds": (0, 0.5),
            "milestones": [1, 2],
            "multipliers": open_dict(),
        }
    )
    config.train = ConfigDict({"steps": placeholder(int), "epochs": placeholder(float), "nsp": False})
    config.train.early_stopping = ConfigDict({"patience": 0})
    config.mesh = ConfigDict({"axes": open_dict(data=-1)})
    config.init = ConfigDict({"weights": placeholder(str), "from": placeholder(str)})
    return config.lock()


def given(node: ConfigDict) -> dict[str, Any]:
    """Returns the keys of a group that are set, as plain values."""
    values = {key: value for key, value in node.items() if value is not None}
    return {key: given(value) if isinstance(value, ConfigDict) else value for key, value in values.items()}


def override(*overrides: tuple[str, str]) -> ConfigDict:
    config = experiment()
    apply_overrides(config, overrides)
    return config


def refusal(call, *args, **options) -> str:
    """Returns the message of the UserError that a call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Config files


def write(folder: Path, text: str, name: str = "bert_mlm.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


GOOD = """
from ml_collections import ConfigDict

def get_config(arg: str = "default"):
    return ConfigDict({"arg": arg, "file": __file__})
"""


def test_load_passes_the_arguments(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_config(path).to_dict() == {"arg": "default", "file": path}
    assert load_config(f"{path}:").arg == "default"
    assert load_config(f"{path}:tiny,zh").arg == "tiny,zh"


def test_load_leaves_nothing_behind(tmp_path):
    load_config(write(tmp_path, GOOD))
    assert [path.name for path in tmp_path.iterdir()] == ["bert_mlm.py"]


def test_load_reads_the_file_as_its_own_program(tmp_path):
    # Without the future import, annotations are evaluated: the loader's own must not leak into the file.
    path = write(tmp_path, GOOD + "\nassert get_config.__annotations__ == {'arg': str}\n")
    assert load_config(path).arg == "default"


def test_load_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, GOOD)
    for name in ("bert_mln.py", "bert_mln.py:tiny", "bert_mlm", "bert_mlm:tiny"):
        assert refusal(load_config, f"{tmp_path}/{name}") == (
            f'--config={tmp_path}/{name}: no such file (did you mean "bert_mlm.py"?); {tmp_path} has bert_mlm.py'
        )


def test_load_missing_file_suggests_one_of_configs(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", GOOD)
    write(tmp_path, "", "setup.py")
    monkeypatch.chdir(tmp_path)
    message = refusal(load_config, "bert_mln.py")
    assert message.endswith('no such file (did you mean "bert_mlm.py"?); configs has bert_mlm.py')


def test_load_missing_file_lists_what_there_is(tmp_path):
    write(tmp_path, GOOD)
    write(tmp_path, "", "__init__.py")
    assert refusal(load_config, f"{tmp_path}/zzz.py").endswith(f"no such file; {tmp_path} has bert_mlm.py")


def test_load_of_a_folder(tmp_path):
    assert "Is a directory" in refusal(load_config, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("x = 1\ndef get_config(:\n", 2, "SyntaxError: "),
        ("x = 1\n\nboom\n", 3, "NameError: name 'boom' is not defined"),
        ("def get_config(arg=''):\n    return {}['absent']\n", 2, "KeyError: 'absent'"),
        ("def get_config(arg=''):\n    raise ValueError('two\\nlines')\n", 2, "ValueError: two lines"),
        ("def get_config(arg=''):\n    raise SystemExit('no data')\n", 2, "SystemExit: no data"),
        ("import json\ndef get_config(arg=''):\n    return json.loads('[')\n", 3, "JSONDecodeError: "),
    ],
)
def test_load_names_the_failing_line(tmp_path, text, line, said):
    path = write(tmp_path, text)
    message = refusal(load_config, path)
    assert message.startswith(f"{path}:{line}: {said}")
    assert message.endswith("; fix the config file")


def test_load_names_a_misspelt_key(tmp_path):
    body = "    config = ConfigDict({'steps': 1}).lock()\n    config.stpes = 2\n    return config\n"
    path = write(tmp_path, f"from ml_collections import ConfigDict\ndef get_config(arg=''):\n{body}")
    message = refusal(load_config, path)
    assert message.startswith(f"{path}:4: AttributeError: ")
    assert '"steps" instead of "stpes"' in message


def test_load_without_get_config(tmp_path):
    path = write(tmp_path, "get_config = 3\n")
    assert refusal(load_config, path).startswith(f"{path}: has no get_config; define `def get_config(")


def test_load_of_something_else(tmp_path):
    path = write(tmp_path, "def get_config(arg=''):\n    return {'a': 1}\n")
    assert "get_config returned dict; return an ml_collections.ConfigDict" in refusal(load_config, path)


def test_load_with_arguments_where_none_are_taken(tmp_path):
    path = write(tmp_path, "def get_config():\n    return None\n")
    assert refusal(load_config, f"{path}:tiny") == f'{path}: takes no arguments; drop ":tiny"'


def test_load_passes_errors_for_the_user_through(tmp_path):
    text = "from fmjax.config import arguments\ndef get_config(arg=''):\n    arguments(arg, 'tiny', 'zh')\n"
    message = refusal(load_config, write(tmp_path, text) + ":tny")
    assert message == 'config argument "tny" is not known (did you mean "tiny"?); choose from tiny, zh'


def test_arguments():
    assert arguments("", "tiny", "zh") == set()
    assert arguments("tiny, zh", "tiny", "zh", "nsp") == {"tiny", "zh"}
    assert refusal(arguments, "x") == 'config argument "x" is not known; this config takes no arguments'


# Overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.name", "roberta", "roberta"),
        ("model.name", "true", "true"),
        ("model.name", "", ""),
        ("model.name", "none", "none"),
        ("model.size", "tiny", "tiny"),
        ("data.batch_size", "64", 64),
        ("data.batch_size", "1e3", 1000),
        ("data.batch_size", "-1", -1),
        ("data.batch_size", "12345678901234567890", 12345678901234567890),
        ("train.steps", "10", 10),
        ("train.epochs", "3", 3.0),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("train.nsp", "true", True),
        ("train.nsp", "Yes", True),
        ("train.nsp", "1", True),
        ("train.nsp", "0", False),
        ("train.nsp", "no", False),
        ("train.nsp", "FALSE", False),
        ("train.early_stopping.patience", "3", 3),
        ("optim.no_decay", "bias$", ("bias$",)),
        ("optim.no_decay", "bias$, scale$", ("bias$", "scale$")),
        ("optim.no_decay", '["a{1,2}", "b"]', ("a{1,2}", "b")),
        ("optim.no_decay", r"('a\d+', 'b')", (r"a\d+", "b")),
        ("optim.no_decay", "(^head/|bias)", ("(^head/|bias)",)),
        ("optim.no_decay", "[a-z]+,b", ("[a-z]+", "b")),
        ("optim.no_decay", "", ()),
        ("optim.no_decay", "()", ()),
        ("optim.freeze", "embed,encoder", ("embed", "encoder")),
        ("optim.freeze", "1,2", ("1", "2")),
        ("data.columns", "text,label", ("text", "label")),
        ("optim.betas", "0.8,1", (0.8, 1.0)),
        ("optim.betas", "[0.8, 1]", (0.8, 1.0)),
        ("optim.bounds", "1,2", (1.0, 2.0)),
        ("optim.milestones", "10,2e1", [10, 20]),
        ("init.weights", "runs/1:2=3", "runs/1:2=3"),
    ],
)
def test_override(key, text, value):
    got = override((key, text))[key]
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, tuple | list):
        assert [type(element) for element in got] == [type(element) for element in value]


@pytest.mark.parametrize("override_", [("init.from", "runs/1"), ("init", '{"from": "runs/1"}')])
def test_init_from_is_the_old_name_of_init_weights(override_):
    config = override(override_)
    assert config.init.weights == "runs/1" and config.init["from"] is None
    assert override(("init.weights", "runs/0"), override_).init.weights == "runs/1"


def test_old_names_become_the_present_ones_in_json():
    config = experiment()
    config.init["from"] = "runs/1"
    assert to_dict(config)["init"] == {"weights": "runs/1"}
    config.init.weights = "runs/2"
    assert to_dict(config)["init"] == {"weights": "runs/2"}
    assert to_dict({"init": {"from": None}, "data": {"from": 1}}) == {"init": {}, "data": {"from": 1}}


def test_a_stored_config_is_read_by_the_present_names(tmp_path):
    """A run that was begun with `init.from` continues, whichever name the command has."""
    header = {"version": "0.1.0", "schema": 1, "given": {"init": {"from": "runs/1"}}}
    (tmp_path / "config.json").write_text(json.dumps({"fmjax": header, "init": {"from": "runs/1"}, "x": 1}))
    stored = read_config(tmp_path)
    assert stored["init"] == stored["fmjax"]["given"]["init"] == {"weights": "runs/1"} and stored["x"] == 1
    check_resumable(stored["fmjax"]["given"], {"init": {"weights": "runs/1"}})
    check_resumable({"init": {"from": "runs/1"}}, {"init": {"from": "runs/1"}})
    with pytest.raises(UserError, match=r'init\.weights: "runs/1" -> "runs/2"; use init\.weights=runs/1 again, which need not'):
        check_resumable(stored["fmjax"]["given"], {"init": {"from": "runs/2"}})


def test_a_run_continues_with_the_kernel_of_its_new_machine(tmp_path):
    given = {"model": {"name": "gpt", "attention": "splash"}, "data": {}, "train": {}, "checkpoint": {}, "mesh": {}}
    write_config(tmp_path, {**given, "model": {**given["model"], "width": 8}}, given)
    for now in ({"attention": "cudnn"}, {}):
        found = continued(tmp_path, {**given, "model": {"name": "gpt"} | now})
        assert found["model"] == {"name": "gpt", "width": 8} | now
    with pytest.raises(UserError, match=r'model\.name: "gpt" -> "bert"'):
        continued(tmp_path, {**given, "model": {"name": "bert"}})


def test_later_overrides_win():
    assert override(("train.steps", "10"), ("train.steps", "20")).train.steps == 20


@pytest.mark.parametrize("text", ["none", "None", " NONE "])
def test_none_unsets_a_placeholder_alone(text):
    config = override(("train.steps", "10"), ("train.steps", text))
    assert config.train.steps is None
    assert "expects int" in refusal(override, ("data.batch_size", text))
    apply_overrides(config, [("train.steps", "7")])
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "train.steps",
            "abc",
            'config.train.steps=abc: expects int, got "abc"; write a whole number such as 100 or 1e3',
        ),
        ("train.steps", "1.5", 'expects int, got "1.5"'),
        ("train.steps", "", 'expects int, got ""'),
        ("train.steps", "inf", 'expects int, got "inf"'),
        ("train.steps", "nan", 'expects int, got "nan"'),
        ("train.steps", "1e30", 'expects int, got "1e30"'),
        ("train.steps", "9" * 5000, "expects int"),
        ("train.steps", "true", "expects int"),
        ("train.steps", "1_000", 'expects int, got "1_000"'),
        ("train.steps", "١٢", "expects int"),
        ("optim.learning_rate", "1_0.5", "expects float"),
        ("optim.learning_rate", "inf", "expects float"),
        ("mesh.axes.model", "1_0", "expects a number, like the others"),
        ("mesh.axes", '{"data": 1, "data": 2}', 'the key "data" occurs twice in a JSON object; remove one'),
        ("optim.learning_rate", "fast", 'expects float, got "fast"; write a number such as 0.1 or 3e-4'),
        ("train.nsp", "maybe", 'expects bool, got "maybe"; write true or false'),
        ("optim.betas", "0.9,x", 'config.optim.betas=x: expects float, got "x"'),
        ("optim.milestones", "[1, 2.5]", 'config.optim.milestones=2.5: expects int, got "2.5"'),
        ("optim.no_decay", "[1, 2]", 'expects a tuple of str, got "[1, 2]"; write a,b or ["a", "b"]'),
        ("mesh.axes.model", "two", 'expects a number, like the others, got "two"; write one such as 4'),
        ("mesh.axes.data", "true", "expects a number"),
        ("mesh.axes", "{'data': 1}", "write --config.mesh.axes.KEY=VALUE or a JSON object"),
        ("mesh.axes", '{"data": "x"}', "config.mesh.axes.data="),
    ],
)
def test_override_of_the_wrong_type(key, text, message):
    assert message in refusal(override, (key, text))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.stpes", '(did you mean "steps"?); config.train has early_stopping, epochs, nsp, steps'),
        ("trian.steps", '(did you mean "train"?); config has data, init, mesh, model, optim, train'),
        ("batch_size", '(did you mean "config.data.batch_size"?); config has data, '),
        ("train.learning_rate", '(did you mean "config.optim.learning_rate"?); config.train has '),
        ("train.early_stopping.zzz", "zzz=1: no such key; config.train.early_stopping has patience"),
        ("", "config.=1: no such key; config has"),
        ("train.", "config.train.=1: no such key; config.train has"),
        ("data.files.", "config.data.files.=1: no such key; config.data.files has none yet"),
        ("train.steps.x", "steps is a single value, not a group of keys; write --config.train.steps=VALUE"),
        ("data.batch_size.x.y", "config.data.batch_size.x.y=1: config.data.batch_size is a single value"),
        ("train", "a group of keys (early_stopping, epochs, nsp, steps); write --config.train.KEY=VALUE"),
        ("data.files", "is a group of keys (none yet)"),
        ("optim.multipliers.a.b", "a dot needs the form --config.optim.multipliers='{\"KEY\": VALUE}'"),
    ],
)
def test_override_of_the_wrong_key(key, message):
    assert message in refusal(override, (key, "1"))


def test_open_groups_take_new_keys():
    config = override(
        ("data.files.train", "a.txt"),
        ("data.files.dev-1", '["b.txt", "c.txt"]'),
        ("data.files.train", '["a", "b"]'),
        ("data.files.train", "b.txt"),
        ("mesh.axes.model", "2"),
        ("optim.multipliers.embed", "0.5"),
        ("optim.multipliers.head", "2"),
    )
    assert given(config.data)["files"] == {"train": "b.txt", "dev-1": ("b.txt", "c.txt")}
    assert given(config.mesh)["axes"] == {"data": -1, "model": 2}
    assert given(config.optim)["multipliers"] == {"embed": 0.5, "head": 2}


def test_text_beside_text_stays_text():
    config = override(("data.files.train", "a.txt"), ("data.files.test", "2024"))
    assert given(config.data)["files"] == {"train": "a.txt", "test": "2024"}


def test_open_groups_keep_their_order():
    config = override(("mesh.axes", '{"tensor": 2, "data": -1, "expert": 1}'))
    assert list(to_dict(config)["mesh"]["axes"]) == ["tensor", "data", "expert"]


def test_json_replaces_an_open_group():
    pattern = r"encoder/layers.*\d$"
    config = override(("optim.multipliers.old", "3"), ("optim.multipliers", json.dumps({pattern: 0.1})), ("mesh.axes", "{}"))
    assert given(config.optim)["multipliers"] == {pattern: 0.1}
    assert given(config.mesh) == {"axes": {}}
    apply_overrides(config, [("optim.multipliers.head", "2"), ("mesh.axes.data", "4")])
    assert given(config.optim)["multipliers"] == {pattern: 0.1, "head": 2}
    assert given(config.mesh) == {"axes": {"data": 4}}


def test_json_sets_the_keys_it_names_in_a_fixed_group():
    config = override(("train", '{"steps": 5, "nsp": true, "early_stopping": {"patience": 2}}'))
    assert given(config.train) == {"steps": 5, "nsp": True, "early_stopping": {"patience": 2}}
    assert override(("model", '{"name": "gpt"}')).model.name == "gpt"
    message = refusal(override, ("train", '{"stpes": 5}'))
    assert message.startswith('config.train.stpes=5: no such key (did you mean "steps"?)')
    assert "null is not allowed; remove that key" in refusal(override, ("train", '{"steps": null}'))


def test_an_override_runs_nothing(tmp_path):
    attack = f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"
    override(("data.files.train", attack), ("optim.freeze", f"[{attack}]"))
    assert not list(tmp_path.iterdir())


def test_a_plain_none_takes_what_the_text_looks_like():
    config = ConfigDict({"a": None, "b": placeholder(object)})
    apply_overrides(config, [("a", "3"), ("b", "[1, 2]")])
    assert config.to_dict() == {"a": 3, "b": (1, 2)}
    config.x = None
    apply_overrides(config, [("x", "none")])
    assert config.x is None


def test_other_placeholder_types():
    config = ConfigDict({"a": placeholder(int | bool)})
    assert 'expects int | bool, got "x"' in refusal(apply_overrides, config, [("a", "x")])
    apply_overrides(config, [("a", "3")])
    assert config.a == 3


def test_a_setting_that_may_be_none_takes_its_other_type():
    config = ConfigDict(unset(t5.Settings))
    apply_overrides(config, [("attention_dropout", "0")])
    assert config.attention_dropout == 0 and isinstance(config.attention_dropout, float)
    apply_overrides(config, [("attention_dropout", "none")])
    assert config.attention_dropout is None
    assert 'expects float, got "x"' in refusal(apply_overrides, config, [("attention_dropout", "x")])


def test_the_lock_leaves_open_groups_open():
    config = experiment()
    config.data.files.train = "a"
    config.optim.multipliers["encoder/.*"] = 0.5
    config.data.files = open_dict(test="b")
    with pytest.raises(AttributeError):
        config.train.stpes = 3
    assert given(config.data)["files"] == {"test": "b"}


def test_open_dict_is_open_all_the_way():
    node = open_dict(**{"a.b": {"c": 1}, "self": 2})
    node["a.b"]["d.e"] = 3
    assert given(node) == {"a.b": {"c": 1, "d.e": 3}, "self": 2}


# Plain values


def test_to_dict():
    config = override(("train.steps", "5"), ("data.files.train", '["a", "b"]'))
    assert to_dict(config.train) == {"early_stopping": {"patience": 0}, "nsp": False, "steps": 5}
    assert to_dict(config.data)["files"] == {"train": ["a", "b"]}
    assert to_dict(config.init) == {}
    assert given(config.optim)["no_decay"] == ("bias$", "norm/scale$")
    assert type(given(config.mesh)["axes"]) is dict
    assert given(config.model) == {"name": "bert"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1}, b"x", Path(), "\udcff", (len,)])
def test_to_dict_refuses_what_json_cannot_hold(value):
    message = refusal(to_dict, {"train": {"x": value}})
    assert message.startswith("config.train.x")
    assert "JSON cannot represent it; use finite numbers" in message


# The run directory

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
keys = st.text(min_size=1).filter(lambda key: key != "fmjax")
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=60)
@drawn(st.dictionaries(keys, values, max_size=4), st.dictionaries(keys, values, max_size=4))
def test_stored_config_round_trip(tmp_path_factory, config, origin):
    workdir = tmp_path_factory.mktemp("run")
    write_config(workdir, open_dict(**config), origin)
    stored = read_config(workdir)
    header = stored.pop("fmjax")
    assert stored == to_dict(config)
    assert list(stored) == list(to_dict(config))
    assert header == {"version": __version__, "schema": 1, "given": to_dict(origin)}
    write_config(workdir, stored, header["given"])
    assert read_config(workdir) == {"fmjax": header} | stored
    check_resumable(stored, config)


def test_stored_config_is_readable_and_stable(tmp_path):
    config = override(("data.files.train", "训练.txt"))
    write_config(tmp_path / "a" / "run", config)
    write_config(tmp_path / "b", experiment())
    text = (tmp_path / "a" / "run" / "config.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "fmjax": {\n  "version"')
    assert text.endswith("}\n")
    assert "训练.txt" in text
    write_config(tmp_path / "b", config)  # over the run's own
    assert (tmp_path / "b" / "config.json").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["config.json"]
    assert read_config(tmp_path / "b")["fmjax"]["given"] == to_dict(config)


def test_write_replaces_the_header_of_a_stored_config(tmp_path):
    write_config(tmp_path / "a", {"x": 1})
    write_config(tmp_path / "b", read_config(tmp_path / "a") | {"x": 2})
    stored = read_config(tmp_path / "b")
    assert stored["x"] == 2
    assert stored["fmjax"]["given"] == {"x": 2}


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    write_config(tmp_path, {"x": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refusal(write_config, tmp_path, {"x": 2})
    assert "config.json: cannot be written (No space left on device); free disk space" in message
    assert read_config(tmp_path)["x"] == 1


def test_write_spares_hugging_face_configs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "is from a Hugging Face model" in refusal(write_config, tmp_path, {"x": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bert"}


def test_write_where_a_file_stands(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(write_config, tmp_path / "file", {"x": 1})


def test_read_without_a_run(tmp_path):
    write_config(tmp_path / "mlm-1", {"x": 1})
    message = refusal(read_config, tmp_path / "mlm-2")
    assert "cannot be read, no such file or directory" in message
    assert message.endswith('; name the folder of a run (did you mean "mlm-1"?)')
    (tmp_path / "other").mkdir()
    assert refusal(read_config, tmp_path / "other").endswith("; name the folder of a run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{\xff}", "is not JSON"),
        (b'{"a": 1', "is not JSON (Expecting"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", 'has no valid key "fmjax"'),
        (b'{"train": {}}', 'has no valid key "fmjax"'),
        (b'{"fmjax": 3}', 'has no valid key "fmjax"'),
        (b'{"fmjax": {"version": "1", "schema": 1}}', 'has no valid key "fmjax"'),
        (b'{"fmjax": {"version": "9.9", "schema": 2, "given": {}}}', "by a newer fmjax, 9.9; update fmjax"),
        (b'{"model_type": "bert"}', '(model_type "bert"), not to a run; create a run: python scripts/convert.py'),
    ],
)
def test_read_of_something_else(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert message in refusal(read_config, tmp_path)


# Comparing


def test_what_differs_is_listed():
    old = {"train": {"seed": 0}, "data": {"files": {"train": "a"}}, "freeze": ("a",), "none": {}}
    new = {"train": {"seed": 1}, "data": {"x": 3}, "freeze": ["a"]}
    listed = 'train.seed: 0 -> 1; data.files.train: "a" -> (absent); data.x: (absent) -> 3; undo'
    assert listed in refusal(check_resumable, old, new)
    check_resumable(new, new)


STORED = {
    "train": {"steps": 10, "epochs": 1.5, "log_every": 10, "seed": 0},
    "checkpoint": {"keep": 2},
    "mesh": {"axes": {"data": -1}},
    "data": {"batch_size": 8, "files": {"train": "a"}, "tokenizer": "t", "mixture": {"x": {"files": "x", "weight": 1}}},
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train": {"steps": 20, "epochs": 2, "log_every": 1, "seed": 0}},
        {"train": {"steps": 10, "epochs": 1.5, "log_every": 10, "eval_every": 5, "seed": 0}},
        {"checkpoint": {"every": 5, "best": "accuracy"}, "mesh": {"axes": {"model": 2}, "rules": "fsdp"}},
        {"checkpoint": {}},
        {"data": STORED["data"] | {"files": {"train": "moved/a"}, "tokenizer": "moved/t"}},
        {"data": STORED["data"] | {"mixture": {"x": {"files": "moved/x", "weight": 1}}}},
        {"train": STORED["train"] | {"early_stopping": {"metric": "loss", "patience": 5}}},
    ],
)
def test_what_a_continued_run_may_change(change):
    check_resumable(STORED, STORED | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": STORED["train"] | {"steps": 9}}, "train.steps: 10 -> 9; "),
        ({"train": STORED["train"] | {"epochs": 1.0}}, "train.epochs: 1.5 -> 1.0; "),
        ({"train": STORED["train"] | {"steps": None}}, "train.steps: 10 -> (absent); "),
        ({"train": STORED["train"] | {"seed": 1}}, "train.seed: 0 -> 1; "),
        ({"optim": {"learning_rate": 0.1}}, "optim.learning_rate: (absent) -> 0.1; "),
        ({"data": STORED["data"] | {"batch_size": 16}}, "data.batch_size: 8 -> 16; "),
        ({"data": STORED["data"] | {"files": {}}}, 'data.files.train: "a" -> (absent); '),
        ({"data": STORED["data"] | {"mixture": {"x": {"files": "y", "weight": 2}}}}, "data.mixture.x.weight: 1 -> 2; "),
        ({"a": {"steps": 9, "checkpoint": 1}}, "a.steps: (absent) -> 9; a.checkpoint: (absent) -> 1; "),
    ],
)
def test_what_a_continued_run_may_not_change(change, message):
    # What may change is not listed with what may not.
    said = refusal(check_resumable, STORED, STORED | {"checkpoint": {"keep": 3}} | change)
    assert said == (
        f"the run was started with another config: {message}undo these changes, or start a new run in another --workdir, "
        "from these weights with --config.init.weights=RUN"
    )


def test_long_lists_of_differences_are_cut():
    message = refusal(check_resumable, {}, {"data": {f"k{i}": i for i in range(LISTED + 3)}})
    assert "data.k9: (absent) -> 9; and 3 more; undo" in message
