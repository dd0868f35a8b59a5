"""The benchmark without its peer: what it measures, prints, writes and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fmjax.bench import cold, growth, inputs, opening, table, timing
from fmjax.bench.material import prepare
from fmjax.bench.measure import compared
from fmjax.bench.worker import read_job
from fmjax.bench.workloads import DEFAULT, SST2_LENGTHS, WORKLOADS
from fmjax.errors import UserError
from scripts import bench

MACHINE = {
    "processor": "a chip", "cores": 2, "threads": 2, "devices": "1 x cpu", "python": "3.11", "versions": {"jax": "1"},
    "commit": "0123456789abcdef", "load": 0.5, "command": "python scripts/bench.py", "tiny": False, "torch.compile": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bert_trian"], 'did you mean "bert_train"?'),
        (["--threads", "1000"], "--threads=1000"),
        (["--rounds", "0"], "--rounds=0"),
        (["--device", "tpu"], '"tpu" is not known'),
        (["bert_train", "--peer_python", "/nowhere/python", "--device", "cpu"], "--peer_python=/nowhere/python"),
        (["--frobnicate"], "--frobnicate: no such flag"),
    ],
)
def test_mistakes_end_in_one_line(argv, said, refused, tmp_path):
    assert said in refused(bench.main, *argv, "--workdir", tmp_path)


def test_list(capsys):
    assert bench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*WORKLOADS, "data", "cold", "growth"]
    assert set(DEFAULT) < {line.split()[0] for line in lines}


def test_a_workload_alone(tmp_path, capsys):
    words = ["gpt_train", "--tiny", "--no_peer", "--seconds", "0.01", "--rounds", "1", "--device", "cpu"]
    assert bench.main([*words, "--workdir", str(tmp_path), "--profile", str(tmp_path / "traces")]) == 0
    out = capsys.readouterr().out
    assert "GPT training" in out and "not measured" in out and "TINY" in out
    found = json.loads((tmp_path / "bench" / "gpt_train.json").read_text())
    own = found["sides"]["fmjax"]
    assert len(own["runs"]) == 2 and found["ratio"] is None and found["bar"] is None
    low, high = own["step_seconds_range"]
    assert 0 < low <= own["step_seconds"] <= high
    assert own["per_second"] == pytest.approx(2 * 16 / own["step_seconds"])
    assert found["bytes"]["temporaries"] > 0 and found["machine"]["versions"]["jax"]
    assert list((tmp_path / "traces").rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", ["bert_mlm", "bert_sst2", "t5_train", "vit_train", "gpt_beam"])
def test_both_sides_are_given_the_same(name, tmp_path):
    workload = WORKLOADS[name]
    size = workload.size("cpu", tiny=True)
    job = prepare(tmp_path, workload, size, "cpu")
    ours, peer = (read_job(tmp_path, side)[1] for side in ("ours", "peer"))
    assert json.loads((tmp_path / "job.json").read_text()) == json.loads(json.dumps(job))
    assert len(ours) == len(peer) == job["batches"]
    if name == "bert_mlm":
        for own, their in zip(ours, peer, strict=True):
            rows = np.arange(size.rows)[:, None]
            np.testing.assert_array_equal(their["labels"][rows, own["masked_positions"]], own["masked_labels"])
            assert (their["labels"] != -100).sum() == own["masked_labels"].size
    if name == "vit_train":
        np.testing.assert_array_equal(ours[0]["images"].transpose(0, 3, 1, 2), peer[0]["pixel_values"])
    if name == "bert_sst2":
        assert texts(ours) == texts(peer)
        assert job["useful_per_pass"] == sum(int(batch["attention_mask"].sum()) for batch in peer)
        assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in ours)
    if workload.kind == "train":
        assert job["flops_per_pass"] > 0


def texts(batches) -> list:
    """Returns the texts of batches with their labels, without padding, in an order of their own."""
    rows = [pair for batch in batches for pair in zip(batch["input_ids"], batch["labels"], strict=True)]
    return sorted((*ids[ids > 0].tolist(), int(label)) for ids, label in rows)


def test_lengths_are_those_of_sst2():
    counts = np.array(SST2_LENGTHS)
    assert counts.sum() == 6920
    assert (counts * np.arange(1, counts.size + 1)).sum() / counts.sum() == pytest.approx(23.34, abs=0.01)


def test_ratio_bar_and_parity():
    runs = {
        "fmjax": [{"seconds": 1.0, "cpu": 1.0}, {"seconds": 2.0, "cpu": 1.0}],
        "eager": [{"seconds": 4.0, "cpu": 3.0}, {"seconds": 4.0, "cpu": 3.0}],
        "compiled": [{"seconds": 3.0, "cpu": 2.0}, {"seconds": 3.0, "cpu": 2.0}],
    }
    job = {"batches": 1, "useful_per_pass": 100, "flops_per_pass": 1e9}
    sides = {name: timing.summary(made, job) for name, made in runs.items()}
    found = compared(sides, runs, {"holds": True})
    assert found == {"peer": "compiled", "ratio": 2.25, "ratio_range": [1.5, 3.0], "cpu_ratio": 2.0}
    assert sides["fmjax"]["per_second"] == pytest.approx(100 / 1.5)
    result = {"title": "T", "unit": "tokens", "sides": sides, "bar": 2.5, "workload": "t", "failed": {"eager": "it broke"}}
    result |= {"job": {"kind": "train"}, "parity": {"steps": 20, "difference": {"eager": 1e-7}}}
    shown = table.side_by_side([result | found])
    assert "| 2.25 (1.50-3.00) | >= 2.5 | no " in shown and "1.0e-07" in shown and "it broke" in shown
    differing = compared(sides, runs, {"holds": False})
    assert differing["ratio"] is None and "results differ" in table.side_by_side([result | differing])
    runs["ctranslate2"] = [{"seconds": 0.5, "cpu": 1.0}, {"seconds": 1.0, "cpu": 1.0}]
    sides = {name: timing.summary(made, job) for name, made in runs.items()}
    for parted, said in [(0, "ms (500-1e+03): 0.50 times as fast (0.50-0.50)"), (0.5, "not compared, since the tokens differ")]:
        parity = {"holds": True, "tolerance": 1e-3, "difference": {"ctranslate2": parted}}
        again = compared(sides, runs, parity)
        assert {name: value for name, value in again.items() if name != "second"} == found
        assert said in table.side_by_side([result | {"sides": sides} | again])
    assert "1 x cpu; Python 3.11, jax 1; commit 0123456789ab; load 0.5" in table.where(MACHINE)


def test_variants_of_the_peer():
    assert timing.variants("generate", "cpu", True, second=True) == ["eager", "ctranslate2"]
    assert timing.variants("generate", "cpu", True) == timing.variants("train", "cpu", False, second=True) == ["eager"]
    assert timing.variants("train", "cpu", True, second=True) == ["eager", "compiled"]
    assert len(timing.variants("generate", "gpu", True, second=True)) == 5


def test_difference():
    assert timing.difference([1.0, 2.0], [1.0, 2.002], "train") == pytest.approx(1e-3, rel=1e-2)
    assert timing.difference([[[1, 2]]], [[[1, 3]]], "generate") == 0.5
    assert timing.difference([1.0], [1.0, 2.0], "train") == float("inf")


def test_other_tables():
    rates = {"per_second": 1e4, "flops_per_second": 1e9}
    points = [{"factor": factor, "seconds": 0.01 * factor, "bytes": 2**20 * factor, **rates} for factor in growth.FACTORS]
    axes = dict.fromkeys(growth.BASE, points)
    result = {"axes": axes, "bends": {axis: growth.bends(points) for axis in axes}, "machine": MACHINE}
    assert result["bends"]["batch"] == pytest.approx([1, 1, 1])
    depths = [line.split()[3] for line in growth.table(result).splitlines() if line.startswith("| depth")]
    assert depths == ["2", "4", "8", "16"]
    assert growth.plot(result).count("<polyline") == 8
    spent = {"start_to_first_step": 4.0, "first_step": 2.0, "tracing": 0.5, "backend_compile": 1.0}
    pair = {"cold": spent, "cached": {name: value / 4 for name, value in spent.items()}}
    assert cold.table({"starts": {"bert_train": pair}}).splitlines()[2].endswith("| yes |")
    run = {"prepare_seconds": 1.0, "prepare_tokens": 100, "feed_seconds": 1.0, "feed_tokens": 300}
    rates = inputs.rates([run])
    assert rates == {"prepare": 100, "feed": 300, "epoch": pytest.approx(75)}
    tasks = {name: {"sides": {"fmjax": rates}} for name in inputs.SIZES}
    result = {"tasks": tasks, "bar": 1.5, "training": {"step_seconds": 0.5, "data_wait": 0.001}}
    shown = inputs.table(result)
    assert "not compared with it" in shown and "a step of 500 ms: 0.10% of the time was spent waiting" in shown
    assert [cell.strip() for cell in shown.splitlines()[-3].split("|")[1:3]] == ["both, first epoch", "75"]


def test_opening_is_measured(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,1\ntwo,2\n")
    found = opening.opened(str(tmp_path / "a.csv"))
    assert found["records"] == 2 and found["seconds"] > 0 and found["bytes"] >= 0
    with pytest.raises(UserError, match=r'CASE="cvs" \(did you mean "csv"\?\)'):
        opening.main(["cvs"])
