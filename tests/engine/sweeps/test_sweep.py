"""Sweeps by the command: real processes, real kills."""

import csv
import json
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from src.engine.runs.checkpoints import find_best
from src.engine.sweeps.folder import SweepFolder
from src.engine.sweeps.sweep import KeepLeaderboard
from tests.engine.tiny import TINY, TinyTask
from tests.forks import run_command
from tests.marks import by_default

SMALL = (*TINY, "trainer.max_epochs=1", "callbacks=minimal")
RATES = ("0.0005", "0.008")
RATES_BY_SEEDS = ("sweep=seeds", "seed=range(2)", "optimizer.lr=0.0005,8e-3")


class Sweep(NamedTuple):
    """A sweep that has ended: its folder, and what the command said."""

    path: Path
    result: subprocess.CompletedProcess[str]

    def record(self, job: str) -> Any:
        return json.loads((self.path / job / "metrics.json").read_text())

    def rows(self) -> list[dict[str, str]]:
        with (self.path / "sweep.csv").open() as file:
            return list(csv.DictReader(file))

    def tested(self) -> set[str]:
        return {path.parents[1].name for path in self.path.glob("*/test/metrics.json")}


def run_sweep(root: Path, *arguments: str) -> Sweep:
    """Run a sweep of the small jobs."""
    before = set(root.glob("logs/multirun/*"))
    result = run_command("train", "-m", *SMALL, *arguments, PROJECT_ROOT=str(root))
    (path,) = set(root.glob("logs/multirun/*")) - before
    return Sweep(path, result)


def run_again(sweep: Sweep, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start a sweep once more in its folder."""
    folder = f"hydra.sweep.dir='{sweep.path}'"
    return run_command("train", "-m", *SMALL, *arguments, folder)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll until it holds; fail when the process ends first."""
    start = time.monotonic()
    while not condition():
        assert process.poll() is None
        assert time.monotonic() - start < 240
        time.sleep(0.2)  # TensorBoard reads the files with what the questions leave it


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two sweeps over different keys write to."""
    return tmp_path_factory.mktemp("root with spaces")


@pytest.fixture(scope="module")
def rates(logs: Path) -> Sweep:
    """Two learning rates, two seeds each."""
    return run_sweep(logs, *RATES_BY_SEEDS)


@pytest.fixture(scope="module")
def recipes(logs: Path, rates: Sweep) -> Sweep:
    """Two learning rates for the optimizers that fit a pattern; beside the other sweep."""
    return run_sweep(logs, "sweep=lr", "optimizer.lr=0.001,0.002", "optimizer=glob(adamw)")


def test_folders_and_tensorboards_runs_are_named_by_the_swept_values_alone(rates: Sweep, recipes: Sweep) -> None:
    for sweep in (rates, recipes):
        assert sweep.result.returncode == 0, sweep.result.stderr
    names = {f"seed={seed},optimizer.lr={rate}" for rate in RATES for seed in range(2)}
    assert {path.name for path in rates.path.iterdir() if path.is_dir()} == names
    runs = EventMultiplexer().AddRunsFromDirectory(str(rates.path)).Reload().Runs()
    assert set(runs) == names | {"."}
    assert {path.name for path in recipes.path.iterdir() if path.is_dir()} == {
        f"optimizer.lr={rate},optimizer=adamw" for rate in ("0.001", "0.002")
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", rates.path.name)


def test_every_job_is_followed_by_where_the_sweep_stands(rates: Sweep) -> None:
    line = r"^(\d+) of 4 jobs: (\d+) finished; best: (\S+), val/acc ([\d.]+)(?:; about .* left)?$"
    said = re.findall(line, rates.result.stdout, re.M)
    assert [(int(ended), int(finished)) for ended, finished, _, _ in said] == [(n, n) for n in range(1, 5)]
    for _, _, job, score in said:
        assert f"{rates.record(job)['best']['score']:.4f}" == score


def test_the_table_has_the_jobs_own_numbers(rates: Sweep) -> None:
    rows = rates.rows()
    assert len(rows) == 4
    for row in rows:
        record = rates.record(row["job"])
        assert row["job"] == f"seed={row['seed']},optimizer.lr={row['optimizer.lr']}"
        assert float(row["best val/acc"]) == record["best"]["score"]
        assert float(row["val/loss"]) == record["metrics"]["val/loss"]
        assert float(row["seconds"]) == record["seconds"]
        own = [f"seed={row['seed']}", f"optimizer.lr={row['optimizer.lr']}"]
        assert [override for override in record["arguments"] if override.split("=")[0] in row] == own
        assert row["checkpoint"] == f"{row['job']}/checkpoints/best.ckpt"
    assert (rates.path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_summed_up_and_the_best_is_said(rates: Sweep) -> None:
    scores = {
        rate: [rates.record(f"seed={seed},optimizer.lr={rate}")["best"]["score"] for seed in range(2)] for rate in RATES
    }
    order = sorted(RATES, key=lambda rate: -statistics.mean(scores[rate]))
    table = (rates.path / "sweep.md").read_text()
    for rank, rate in enumerate(order, 1):
        mean, std = statistics.mean(scores[rate]), statistics.stdev(scores[rate])
        assert f"| {rank} | {rate} | 2 | {mean:.4f} ± {std:.4f} | 2 finished |" in table
        assert f"{mean:.4f} ± {std:.4f}" in rates.result.stdout
    best = max(range(2), key=lambda seed: scores[order[0]][seed])
    name = f"seed={best},optimizer.lr={order[0]}"
    assert f"best: {name}, val/acc {max(scores[order[0]]):.4f}" in rates.result.stdout
    assert f"checkpoint: {rates.path / name}/checkpoints/best.ckpt" in rates.result.stdout


def test_the_winners_seeds_alone_are_tested(rates: Sweep) -> None:
    winner = rates.rows()[0]["optimizer.lr"]
    assert rates.tested() == {f"seed={seed},optimizer.lr={winner}" for seed in range(2)}
    for row in rates.rows():
        assert not any(name.startswith("test") for name in rates.record(row["job"])["metrics"])
        assert bool(row["test/acc"]) == (row["optimizer.lr"] == winner)
    tests = [rates.record(f"{name}/test")["metrics"]["test/acc"] for name in rates.tested()]
    assert f"test/acc: {statistics.mean(tests):.4f} ± {statistics.stdev(tests):.4f} (n=2)" in rates.result.stdout


def test_a_sweep_that_was_moved_tells_right_paths(rates: Sweep, tmp_path: Path) -> None:
    moved = shutil.copytree(rates.path, tmp_path / "moved")
    best = find_best(moved)
    assert best.is_relative_to(moved)
    assert f"- checkpoint: {best.relative_to(moved).as_posix()}\n" in (moved / "sweep.md").read_text()
    tests = list(moved.glob("*/test/metrics.json"))
    assert [(test.parent / json.loads(test.read_text())["checkpoint"]).is_file() for test in tests] == [True] * 2
    for path in (*tests, *moved.glob("sweep.*")):
        if path.suffix != ".png":
            assert str(rates.path) not in path.read_text(), path


@pytest.mark.slow
def test_all_jobs_are_tested_where_that_is_asked_for(tmp_path: Path) -> None:
    sweep = run_sweep(tmp_path, "test=all", "optimizer.lr=0.0005,8e-3")
    assert sweep.result.returncode == 0, sweep.result.stderr
    assert sweep.tested() == {"optimizer.lr=0.0005", "optimizer.lr=0.008"}
    table = (sweep.path / "sweep.md").read_text()
    for row in sweep.rows():
        record = sweep.record(f"{row['job']}/test")
        assert float(row["test/acc"]) == record["metrics"]["test/acc"]
        score = sweep.record(row["job"])["best"]["score"]
        assert (
            f"| {score:.4f} | {record['metrics']['test/acc']:.4f} | {record['metrics']['test/loss']:.4f} | finished |"
            in table
        )


class Untested(TinyTask):
    """Has no test_step."""

    test_step = pl.LightningModule.test_step  # type: ignore[assignment]


def test_a_sweep_of_a_module_without_a_test_ends_with_its_table(tmp_path: Path) -> None:
    sweep = run_sweep(tmp_path, f"model._target_={Untested.__module__}.Untested", "optimizer.lr=0.0005,8e-3")
    assert sweep.result.returncode == 0, sweep.result.stderr
    assert "Untested has no test_step" in sweep.result.stderr
    assert "best val/" in sweep.result.stdout
    assert sweep.tested() == set()


def test_tensorboard_shows_the_figure(rates: Sweep) -> None:
    (image,) = EventAccumulator(str(rates.path)).Reload().Images("sweep")
    shown, written = (Image.open(file) for file in (BytesIO(image.encoded_image_string), rates.path / "sweep.png"))
    assert list(shown.get_flattened_data()) == list(written.convert("RGB").get_flattened_data())


@pytest.fixture
def tensorboard(logs: Path, rates: Sweep, recipes: Sweep, tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows both sweeps."""
    for sweep in (rates, recipes):  # else it would be waited for in vain
        assert sweep.result.returncode == 0, sweep.result.stderr
    said = tmp_path / "said"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logs}/logs", "--host=127.0.0.1", "--port=0"]
    with said.open("w") as file:
        process = subprocess.Popen([*command, "--load_fast=false"], stdout=file, stderr=file)
    try:
        wait_for(lambda: "http://" in said.read_text(), process)
        (address,) = re.findall(r"http://[\d.:]+", said.read_text())
        wait_for(lambda: json.dumps(ask(address, "session_groups")).count("best/val/acc") == 2 * 6, process)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address: str, question: str) -> Any:
    """What TensorBoard's HPARAMS tab is told."""
    statuses = [f"STATUS_{status}" for status in ("SUCCESS", "FAILURE", "RUNNING", "UNKNOWN")]
    body = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 100}
    request = urllib.request.Request(
        f"{address}/data/plugin/hparams/{question}",
        json.dumps(body if question == "session_groups" else {"experimentName": ""}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.load(response)


def test_the_hparams_tab_has_every_job_of_both_sweeps(tensorboard: str, rates: Sweep, recipes: Sweep) -> None:
    columns = {info["name"] for info in ask(tensorboard, "experiment")["hparamInfos"]}
    assert columns == {"optimizer.lr", "seed", "optimizer"}
    rows = {row["name"]: row for row in ask(tensorboard, "session_groups")["sessionGroups"]}
    for sweep in (rates, recipes):
        for planned in sweep.rows():
            row = rows[f"multirun/{sweep.path.name}/{planned['job']}"]
            values = {key: planned[key] for key in columns & set(planned)}
            assert {key: str(value).removesuffix(".0") for key, value in row["hparams"].items()} == values
            metrics = {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}
            assert metrics["best/val/acc"] == pytest.approx(float(planned["best val/acc"]))
            assert metrics["val/acc"] == pytest.approx(float(planned["val/acc"]))


def test_the_same_command_changes_nothing_where_all_has_finished(rates: Sweep) -> None:
    files = {path: path.stat().st_mtime_ns for path in rates.path.rglob("*.*") if path.parent != rates.path}
    assert run_again(rates, *RATES_BY_SEEDS).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in rates.path.rglob("*.*") if path.parent != rates.path} == files


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One job of three is well."""
    return run_sweep(tmp_path_factory.mktemp("failed"), "data.batch_size=20,0,-1", "test=false")


FAILURES = {f"data.batch_size={size}": f"batch_size={size}: expected 1 or more" for size in (0, -1)}


def test_failed_jobs_are_named_and_the_others_finish(failed: Sweep) -> None:
    assert failed.result.returncode == 1
    assert "error: 2 of 3 jobs failed" in failed.result.stderr
    assert "Traceback" not in failed.result.stderr
    rows = {row["job"]: row for row in failed.rows()}
    assert rows["data.batch_size=20"]["status"] == "finished"
    for job, error in FAILURES.items():
        assert re.search(f"^  {re.escape(job)}: .*{error}", failed.result.stderr, re.M)
        assert (rows[job]["status"], rows[job]["best val/acc"]) == ("failed", "")
        assert error in rows[job]["error"]
        log = (failed.path / job / "train.log").read_text()
        assert log.count("stack trace:") == 1
        assert error in log


def test_no_job_is_tested_where_no_test_is_asked_for(failed: Sweep) -> None:
    assert failed.tested() == set()
    assert "test/acc" not in failed.rows()[0]


REFUSED = {
    ("-m", "optimizer=adam,nope"): "error: optimizer=nope: no such file in conf/optimizer/; there are: ",
    ("-m", "optimizer.lrr=0.1,0.2"): "error: optimizer.lrr: no such key; did you mean optimizer.lr?",
    ("-m", "sweep=rates"): "error: sweep=rates: no such file in conf/sweep/; there are: ",
    ("-m", "experiment=glob(zzz*)"): "error: experiment=glob(zzz*): nothing to run",
    ("-m", "optimizer.lr=interval(0.1,1)"): "error: optimizer.lr=interval(0.1,1): a grid needs values, as choice(a,b)",
    ("sweep=lr",): "error: sweep=lr: a sweep needs -m: python -m src.train -m sweep=lr",
}


@pytest.mark.parametrize("arguments", by_default([(words,) for words in REFUSED], 2))
def test_a_sweep_that_cannot_be_is_refused_in_a_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run_command("train", *arguments, PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(REFUSED[arguments])
    assert list(tmp_path.iterdir()) == []


KEPT = {"all": {"best.ckpt", "last.ckpt"}, "last": {"last.ckpt"}, "winner": set()}


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEPT)
def test_the_checkpoints_that_stay_are_the_winners_and_those_asked_for(keep: str, tmp_path: Path) -> None:
    more = ("seed=0,1", "optimizer.lr=0.001,0.1", f"hydra.sweeper.keep={keep}")
    sweep = run_sweep(tmp_path, *more)
    assert sweep.result.returncode == 0, sweep.result.stderr
    winner = sweep.rows()[0]["optimizer.lr"]
    for row in sweep.rows():
        left = {path.name for path in (sweep.path / row["job"]).rglob("*.ckpt")}
        is_winner = row["optimizer.lr"] == winner
        assert left == (KEPT["all"] if is_winner else KEPT[keep])
        assert bool(row["checkpoint"]) == (is_winner or keep == "all")
    assert len(sweep.tested()) == 2
    assert run_again(sweep, *more).returncode == 0  # nothing is left to do


def test_a_word_for_the_checkpoints_that_is_none_is_refused(tmp_path: Path) -> None:
    result = run_command("train", "-m", *SMALL, "seed=0,1", "hydra.sweeper.keep=best", PROJECT_ROOT=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == "error: hydra.sweeper.keep=best: expected one of all, winner, last\n"
    assert list(tmp_path.iterdir()) == []


def make_sweep(path: Path, num_jobs: int) -> tuple[KeepLeaderboard, SweepFolder]:
    """A sweep that has just started, and the callback that accompanies it."""
    folder, callback = SweepFolder(path), KeepLeaderboard()
    with folder.opened(OmegaConf.create({"monitor": "acc", "mode": "max"}), {}):
        folder.add({f"seed={seed}": {"seed": seed} for seed in range(num_jobs)})
    callback.on_multirun_start(OmegaConf.create({"hydra": {"sweeper": {}}}))
    return callback, folder


def end_job(callback: KeepLeaderboard, folder: SweepFolder, seed: int) -> None:
    """What a job of any module leaves, and Hydra's word of its end."""
    job = folder.path / f"seed={seed}"
    job.mkdir()
    record = {"metrics": {"acc": seed / 10}, "best": {"score": seed / 10, "checkpoint": None, "monitor": "acc"}}
    (job / "metrics.json").write_text(json.dumps(record))
    hydra = {"sweep": {"dir": str(folder.path), "subdir": job.name}}
    callback.on_job_end(OmegaConf.create({"hydra": hydra}), JobReturn())


def test_the_table_is_written_at_every_end_and_the_figure_every_few_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, folder = make_sweep(tmp_path, 4)
    drawn = []
    for seed in range(3):
        if seed == 2:
            monkeypatch.setattr("src.engine.sweeps.sweep.INTERVAL", 0)
        end_job(callback, folder, seed)
        assert (tmp_path / "sweep.csv").read_text().count("finished") == seed + 1
        drawn.append((tmp_path / "sweep.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in lines] == [f"{n} of 4 jobs: {n} finished" for n in (1, 2, 3)]
    assert lines[2].startswith("3 of 4 jobs: 3 finished; best: seed=2, acc 0.2000; about ")


@pytest.mark.slow
def test_jobs_elsewhere_leave_the_leaderboard_to_the_process_that_started_the_sweep(tmp_path: Path) -> None:
    callback, folder = make_sweep(tmp_path, 2)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(end_job, callback, folder, 0).result()
    assert not (tmp_path / "sweep.csv").exists()
    end_job(callback, folder, 1)
    assert (tmp_path / "sweep.csv").read_text().count("finished") == 2
