"""The device check without a device: its table, its limits on time, what it skips, and what it makes of a trace."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmjax.bench import standins
from fmjax.bench.device import __main__ as command
from fmjax.bench.device import kernels, lengths, parity, profile, rows, run, training
from fmjax.bench.device.job import Job, read
from fmjax.bench.device.rows import ERROR, FAILED, MEASURED, PASSED, SKIPPED, Row
from fmjax.bench.timing import summary
from fmjax.errors import UserError
from fmjax.layers.kernels.choice import Kernel


@pytest.fixture
def job(tmp_path) -> Job:
    return Job("parity", "", True, 60.0, tmp_path, tmp_path)


def test_rows():
    first = Row("a", "1", part="kernels")
    found = rows.merged([first, Row("b", "2", "<= 1", PASSED, part="parity")], Row("a", "3|4", part="kernels"))
    assert [row.result for row in found] == ["3|4", "2"]
    found = rows.merged(found, Row("a", "x", status=SKIPPED, part="parity"))
    lines = rows.table(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["kernels", "parity", ""]
    assert "3/4" in lines[2] and len({len(line) for line in lines}) == 1
    assert [line.split("|")[3].strip() for line in rows.table([Row("w", "a bc d")], 4).splitlines()[2:]] == ["a bc", "d"]
    assert [rows.size(2**10 * 10**power) for power in (0, 3, 6)] == ["1.0 KiB", "1000 KiB", "977 MiB"]
    assert rows.counts(found) == "1 pass, 1 measured, 1 skipped"
    assert rows.holds(found, ("kernels", "parity"))
    for status in (FAILED, ERROR):
        worse = [*found, Row("c", "4", status=status, part="training")]
        assert rows.holds(worse, ("kernels", "parity")) and not rows.holds(worse, ("training",))
    assert rows.failed("a", ValueError("one\ntwo")).result == "ValueError: one"
    assert rows.failed("a", KeyboardInterrupt()).result == "KeyboardInterrupt"


def test_time_is_shared():
    shares = [share for *_, share in run.PARTS]
    left = 540.0
    for index in range(len(shares)):
        left -= run.budget(left, shares[index:])
    assert left == pytest.approx(0)  # the last part may take all that is left, and no more
    assert run.budget(100, [1, 3]) == 25 and run.budget(100, [1, 3], least=40) == 40 and run.budget(10, [1, 3], least=40) == 10
    assert {part for part, *_ in run.PARTS} >= set(run.CHECKS)
    assert {argument for part, argument, _ in run.PARTS if part == "training"} == set(training.ENTRIES)
    for part, *_ in run.PARTS:
        assert callable(importlib.import_module(f"fmjax.bench.device.{part}").run)


def test_a_job_is_read_as_it_was_written(job):
    job = dataclasses.replace(job, device={"platform": "gpu", "kind": "NVIDIA H200"}, rehearse=False)
    again = read(job.text())
    assert dataclasses.replace(again, begun=job.begun) == job
    assert again.chip.flops == 989e12 and again.sizes == "gpu" and 0 < again.left < 60


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("print('{\"what\": \"w\", \"result\": \"r\"}\\n{}')", MEASURED, "r"),
        ("import sys; sys.exit(3)", ERROR, "its process ended with exit code 3; see device_check.log"),
        ("import time; time.sleep(600)", SKIPPED, "not finished in 0 s"),
    ],
)
def test_a_part_ends_in_any_case(program, status, said, job, tmp_path, monkeypatch):
    def start(job, log):
        return subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "STARTING", 0)
    state = run.Check(tmp_path, 9, True)
    run.run_part(state, dataclasses.replace(job, seconds=0.1 if status == SKIPPED else 60.0))
    assert [(row.part, row.status, row.result) for row in state.rows] == [("parity", status, said)]
    stored = json.loads((tmp_path / run.RESULTS).read_text())
    assert stored["rows"][0]["result"] == said and said in (tmp_path / run.TABLE).read_text()
    assert [part["part"] for part in state.ends] == ["parity"]


def test_a_part_that_has_no_time_is_not_started(job, tmp_path):
    state = run.Check(tmp_path, 9, True)
    run.run_part(state, dataclasses.replace(job, seconds=1.0))
    assert [(row.what, row.status) for row in state.rows] == [("parity", SKIPPED)]


def answering(platform: str, status: str = PASSED):
    """Returns what takes the place of `run_part`: a device, and one row for every other part."""

    def run_part(state, job):
        facts = {"platform": platform, "kind": platform} if job.part == "environment" and platform else {}
        what = "device" if job.part == "environment" else job.name
        state.add(Row(what, "r", status=status if job.part == "kernels" else MEASURED, facts=facts, part=job.part))

    return run_part


@pytest.mark.parametrize(("status", "code"), [(PASSED, 0), (SKIPPED, 0), (FAILED, 1), (ERROR, 1)])
def test_exit_code(status, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_part", answering("gpu", status))
    assert command.main(["--out", str(tmp_path)]) == code
    out = capsys.readouterr().out
    assert out.startswith("| part ") and ("FAILED" in out) == bool(code) and "rehearsal" not in out
    stored = json.loads((tmp_path / run.RESULTS).read_text())
    for part in run.NAMES:
        one = [Row("w", "r", status=status, part=part)]
        assert run.Check(tmp_path, 9, True, rows=one).holds == (not code)
        assert run.Check(tmp_path, 9, False, rows=one).holds == (not code or part not in run.CHECKS)
    assert [part for part, *_ in run.Check(tmp_path, 9, True, ["parity"]).parts] == ["environment", "parity"]
    assert [part[:2] for part in run.Check(tmp_path, 9, True, ["training:t5"]).parts[1:]] == [("training", "t5")]
    assert stored["holds"] == (not code) and len(stored["rows"]) == len(run.PARTS)


@pytest.mark.parametrize(
    ("argv", "platform", "said"),
    [
        (["--minutes", "0"], "gpu", "--minutes=0.0: must be from 0.5 to 60"),
        (["--out", "{}/file/x"], "gpu", "cannot be written to"),
        (["--out", "{}/used"], "gpu", "has the results of another check"),
        (["--out", "{}/new"], "cpu", "JAX finds no GPU or TPU here; add --rehearse"),
        (["--out", "{}/new"], "", "JAX cannot be used here"),
        (["--only", "paritee"], "gpu", '--only="paritee" (did you mean "parity"?)'),
        (["--rehearsal"], "gpu", "--rehearsal: no such flag"),
    ],
)
def test_mistakes_end_in_one_line(argv, platform, said, tmp_path, monkeypatch, refused):
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / run.RESULTS).write_text("{}")
    monkeypatch.setattr(run, "run_part", answering(platform))
    assert said in refused(command.main, *(word.format(tmp_path) for word in argv))
    assert (tmp_path / "used" / run.RESULTS).read_text() == "{}"
    assert not (tmp_path / "new" / run.RESULTS).exists()


def test_what_is_missing_is_skipped(job):
    found = list(parity.run(job))
    assert [row.what for row in found] == list(parity.FAMILIES) and {row.status for row in found} == {SKIPPED}
    assert [row.status for row in profile.run(job)] == [SKIPPED]
    assert training.variants(job) == ()
    with_torch = dataclasses.replace(job, rehearse=False, device={"platform": "gpu", "peer": {"torch": "2"}})
    assert training.variants(with_torch)[0] == "compiled"
    assert training.variants(dataclasses.replace(with_torch, device=with_torch.device | {"platform": "tpu"})) == ()
    late = dataclasses.replace(job, seconds=0.0, argument="auto")
    assert {row.status for row in lengths.run(late)} == {SKIPPED}
    assert [row.result for row in kernels.errors(late)] == [f"{9 * len(kernels.names('cpu'))} not run: no time was left"]


def test_a_training_row(job):
    entry, device = training.ENTRIES["gpt"], {"platform": "gpu", "kind": "NVIDIA H200"}
    job = dataclasses.replace(job, rehearse=False, device=device)
    described = {"batches": 1, "useful_per_pass": 32768, "flops_per_pass": 0.5 * 989e12 * 0.05, "sizes": {"rows": 32}}
    runs = {"fmjax": [{"seconds": 0.05, "cpu": 1.0}] * 2, "compiled": [{"seconds": 0.06, "cpu": 1.0}] * 2}
    facts = {"name": "gpt", "peak": 2**34}
    alone = training.row(entry, described, {"fmjax": runs["fmjax"]}, facts, job, "torch not measured")
    assert alone.result == "50 ms per step, 655,360 tokens/s, MFU 50.0 %, 16.0 GiB"
    assert alone.against == "torch not measured; aim 55 % MFU; llm.c: 468k tokens/s on an H100"
    both = training.row(entry, described, runs, facts, job, "", {"difference": {"compiled": 1e-4}, "holds": True})
    assert both.against.startswith("torch compiled 60 ms: 1.20 x as fast; aim")
    apart = training.row(entry, described, runs, facts, job, "", {"difference": {"compiled": 1.0}, "holds": False})
    assert "not compared: the losses differ" in apart.against
    assert training.faster([{"seconds": 0.05}], runs) and not training.faster([{"seconds": 0.07}], runs)
    assert summary(runs["fmjax"], described)["flops_per_second"] == pytest.approx(0.5 * 989e12)
    bert = dataclasses.replace(both, facts=both.facts | {"name": "bert", "of_aim": 0.5})
    found = [dataclasses.replace(row, part="training") for row in (both, bert)]
    assert run.slowest(found) == "bert" and run.slowest(found[:1]) == "gpt" and run.slowest([]) == ""


def event(pid: int, tid: int, name: str, micros: float, **args: str) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": micros, "args": args}


def named(pid: int, name: str, tid: int | None = None) -> dict:
    found = {"ph": "M", "pid": pid, "name": "thread_name" if tid else "process_name", "args": {"name": name}}
    return found | ({"tid": tid} if tid else {})


def test_operations_of_a_trace(tmp_path):
    host = [named(9, "/host:CPU"), named(9, "python", 1), event(9, 1, "PjitFunction", 99)]
    gpu = [*host, named(1, "/device:GPU:0"), named(1, "Stream #13(Compute)", 2), named(1, "XLA Modules", 3)]
    gpu += [event(1, 2, "gemm", 5), event(1, 2, "gemm", 7), event(1, 2, "add", 3), event(1, 3, "jit_step", 50)]
    assert profile.operations(gpu) == (15.0, [("gemm", 12), ("add", 3)])
    tpu = [*host, named(1, "/device:TPU:0"), named(1, "XLA Ops", 2), named(1, "Steps", 3)]
    assert profile.operations([*tpu, event(1, 2, "fusion.1", 4), event(1, 3, "0", 8)]) == (4.0, [("fusion.1", 4)])
    cpu = [*host, event(9, 2, "dot.1", 6, hlo_op="dot.1"), event(9, 2, "Await", 6)]
    assert profile.operations(cpu) == (6.0, [("dot.1", 6)])
    path = Path(tmp_path) / "x.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": cpu}).encode()))
    assert profile.read(path) == cpu


def test_a_kernel_that_ignores_the_mask_fails(job, monkeypatch):
    def unmasked(call):
        return kernels.plain(dataclasses.replace(call, mask=type(call.mask)()))

    def refused(call):
        return "it is not written; set xla"

    def broken(call):
        raise ValueError("a broken kernel")

    known = {"right": Kernel(kernels.plain, lambda call: ""), "wrong": Kernel(unmasked, lambda call: "")}
    known |= {"refused": Kernel(unmasked, refused), "broken": Kernel(broken, lambda call: "")}
    monkeypatch.setattr(kernels, "KERNELS", known)
    monkeypatch.setattr(kernels, "CASES", (kernels.Case("causal", causal=True),))
    found = {row.what.partition(",")[0]: row for row in kernels.errors(job)}
    assert {name: row.status for name, row in found.items()} == {
        "right": PASSED, "wrong": FAILED, "refused": SKIPPED, "broken": ERROR,
    }  # fmt: skip
    assert found["refused"].result == "fp32 not offered (it is not written); bf16 not offered (it is not written)"


def test_stand_ins(monkeypatch):
    name = "a_package_that_nobody_has"
    assert standins.absent((name, "json")) == [name]
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, standins.Finder([name])])
    try:
        module = importlib.import_module(f"{name}.part")
        assert isinstance(1, module.Config | int) and not isinstance({}, module.Config)

        class Own(module.Config):
            kind = module.kinds.FIRST

        assert issubclass(Own, module.Config) and Own.kind is module.kinds.FIRST
        with pytest.raises(ModuleNotFoundError, match=name):
            module.Config(1)
        assert name in standins.standing_in()
    finally:
        for loaded in [key for key in sys.modules if key.startswith(name)]:
            del sys.modules[loaded]


def test_no_device_is_a_mistake_of_the_user(tmp_path):
    state = run.Check(tmp_path, 9, False, rows=[Row("environment", "broke", status=ERROR, part="environment")])
    with pytest.raises(UserError, match="broke"):
        run.check_device(state)
