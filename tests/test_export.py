"""The folder that is published: what is in it, what must not be, and that writing it harms nothing."""

import base64
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import analysis
from analysis.__main__ import app
from analysis.export import MARK, README, write_files
from analysis.report import NO_COMPARISON, PLACE, reproduce
from analysis.tables import verdict_sentences
from tests.conftest import ROOT
from tests.test_comparison import log_model
from tests.test_report import Page
from tracking import keys

COMPARISONS = {"scores_by_split", "paired_differences", "accuracy_against_cost", "learning_curves", "reliability"}
TEXTS = {README, "table.md", "table.csv", "table.tex", "runs.csv", "classes.csv", "verdicts.md", "verdicts.csv",
         "report.html", "CITATION.cff"}  # fmt: skip


@pytest.fixture(scope="module")
def exported(finished_task3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made of it, in a new folder; it is not changed."""
    folder = tmp_path_factory.mktemp("exported") / "new" / "out"
    result = CliRunner().invoke(app, ["export", "task3", "--out", str(folder), "--tracking-uri", finished_task3])
    assert result.exit_code == 0 and result.stderr == "" and result.stdout == f"{folder}\n"
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, with a fixed date."""
    return {
        path.relative_to(folder).as_posix(): re.sub(rb"Made on \d{4}-\d\d-\d\d", b"Made on", path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def links(markdown: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", markdown))


def test_the_folder_shows_the_results_and_no_picture_of_the_data(exported: Path, finished_task3: str) -> None:
    names = COMPARISONS | {"confusion_lenet5", "confusion_vggnet"}
    files = contents(exported)
    assert set(files) == TEXTS | {f"figures/{name}.{form}" for name in names for form in ("png", "svg", "pdf")}
    assert [path.name for path in exported.parent.iterdir()] == ["out"]  # nothing is left beside it
    assert sum(map(len, files.values())) < 2e6
    for name, content in files.items():
        if name.endswith(".png"):
            assert Image.open(exported / name).mode == "P"  # which no photograph is
        if name.endswith(".svg"):
            assert b"<svg" in content and b"<image" not in content
    page = Page(files["report.html"].decode())
    assert len(page.sources) == len(names) and page.links == []
    assert not any(b"<image" in base64.b64decode(source.partition(",")[2]) for source in page.sources)
    assert "most confidence" not in page.text and "links open" not in page.text
    assert all(run_id in page.text for run_id in analysis.load_runs(["task3"], finished_task3)["run_id"])


def test_tables_are_those_that_the_commands_print(exported: Path, finished_task3: str, run_analysis) -> None:
    for command, name in (("table", "table"), ("compare", "verdicts")):
        for form, suffix in (("csv", "csv"), ("markdown", "md")):
            printed = run_analysis(command, "task3", "--format", form, "--tracking-uri", finished_task3).stdout
            written = (exported / f"{name}.{suffix}").read_text(encoding="utf-8")
            assert written.endswith(printed) and (written == printed or (name, form) == ("verdicts", "markdown"))


def test_readme_says_what_was_found_and_how_it_was_made(exported: Path, finished_task3: str) -> None:
    readme = (exported / README).read_text(encoding="utf-8")
    runs = analysis.load_runs(["task3"], finished_task3)
    evidence = analysis.Evidence(analysis.choose_group(runs), finished_task3)
    (sentence,) = verdict_sentences(evidence, analysis.default_metric(runs), 0.01)
    table = (exported / "table.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# task3: {runs['question'].iloc[0]}\n")
    assert [line for line in readme.splitlines() if line.startswith("|")] == [
        line for line in table.partition("Runs behind")[0].splitlines() if line.startswith("|")
    ]
    assert "These are generated images" in " ".join(readme.split()) and sentence in readme
    assert sentence in (exported / "verdicts.md").read_text(encoding="utf-8")
    assert reproduce(runs) in readme and "-m analysis export task3 --group " in readme
    for key in ("git_commit", "dataset_digest", "source_digest", "versions", "split_hash", "hardware", "protocol"):
        assert all(value in readme for value in runs[key].unique()), key
    assert runs["start_time"].iloc[0].strftime("%Y-%m-%d") in readme
    assert links(readme) == set(contents(exported)) - {README}  # each resolves, and each file is named
    assert len(re.findall(r"!\[", readme)) == 3


@pytest.mark.slow
def test_made_again_it_is_the_same(exported: Path, finished_task3: str, run_command, tmp_path: Path) -> None:
    options = ("--out", str(tmp_path / "again"), "--tracking-uri", finished_task3)
    result = run_command("-m", "analysis", "export", "task3", *options, PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "again") == contents(exported)


def test_nothing_in_it_is_of_the_makers_machine(exported: Path, finished_task3: str) -> None:
    runs = analysis.load_runs(["task3"], finished_task3)
    folder = Path(finished_task3.removeprefix("sqlite:///")).parent
    private = {str(folder), str(ROOT), f"{Path.home()}/", "sqlite:", "127.0.0.1", *runs["owner"], *runs["command"]}
    assert runs["owner"].str.startswith(socket.gethostname()).all()
    for name, content in contents(exported).items():
        if not name.endswith((".png", ".pdf")):
            assert not [text for text in private if text in content.decode()], name


def test_an_export_replaces_an_earlier_one_and_nothing_else(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    foreign = ("notes.txt", "figures/mine.png", "figures/confusion.txt", "more/verdicts.md")
    stale = ("figures/confusion_seresnet.svg", "figures/most_confused_lenet5.png")
    for name in (*foreign, *stale):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "table.csv").write_text("edited")
    write_files(folder, contents(exported))
    assert contents(folder) == contents(exported) | dict.fromkeys(foreign, b"x")


@pytest.mark.parametrize("name", [README, "table.md", "figures/a.png"])
def test_a_file_that_no_export_made_is_not_replaced(
    name: str, tmp_path: Path, run_analysis, finished_task3: str
) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    files = {"table.md": b"x", "figures/a.png": b"x", README: MARK.encode()}
    with pytest.raises(analysis.groups.ComparisonError, match=f"{name} is there and was not made by an export"):
        write_files(tmp_path, files)
    assert contents(tmp_path) == {name: b"mine", "other.txt": b"mine"}
    if name == README:
        result = run_analysis("export", "task3", "--out", str(tmp_path), "--tracking-uri", finished_task3)
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    (tmp_path / name).unlink()
    write_files(tmp_path, files)
    assert contents(tmp_path) == files | {"other.txt": b"mine"}


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_an_error_in_the_middle_leaves_nothing_that_looks_whole(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"table.md": b"old", "verdicts.md": b"old", "table.csv": b"old", README: MARK.encode()}
    new = {"table.md": b"new", "table.csv": b"new", README: b"new " + MARK.encode()}
    write_files(tmp_path / "out", old)
    real = getattr(Path, method)

    def fail(path: Path, argument: Any) -> Any:
        if path.name == "table.csv":
            raise OSError("No space left on device")
        return real(path, argument)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="No space left"):
            write_files(tmp_path / "out", new)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if method == "write_bytes":
        assert contents(tmp_path / "out") == old
    else:
        assert "interrupted" in (tmp_path / "out" / README).read_text()
    write_files(tmp_path / "out", new)
    assert contents(tmp_path / "out") == new


@pytest.mark.slow
def test_one_network_is_compared_with_nothing(store_uri: str, tmp_path: Path, run_analysis) -> None:
    log_model(store_uri, "vggnet", 0.9, tmp=tmp_path)
    options = ("--out", str(tmp_path / "out"), "--tracking-uri", store_uri)
    assert run_analysis("export", "task3", *options).exit_code == 0
    readme = (tmp_path / "out" / README).read_text()
    assert NO_COMPARISON in readme and not list((tmp_path / "out").glob("verdicts.*"))
    log_model(store_uri, "linear", 0.5, tmp=tmp_path)
    assert run_analysis("export", "task3", *options, "--rope", "2", "--metric", "test/f1_macro").exit_code == 0
    readme = (tmp_path / "out" / README).read_text()
    assert "There are no two networks" in readme and "--metric test/f1_macro --rope 2 --out DIR" in readme
    assert links(readme) == set(contents(tmp_path / "out")) - {README}


def test_an_unreadable_file_is_named_without_its_place(store_uri: str, tmp_path: Path, run_analysis) -> None:
    for model in ("vggnet", "lenet5"):
        log_model(store_uri, model, 0.9, tmp=tmp_path)
    run = analysis.load_runs(["task3"], store_uri).iloc[0]
    path = analysis.local_artifact(run, keys.PREDICTIONS)
    path.write_bytes(b"nothing")
    result = run_analysis("export", "task3", "--out", str(tmp_path / "out"), "--tracking-uri", store_uri)
    assert result.exit_code == 0 and str(path) in result.stderr
    files = {name: content.decode() for name, content in contents(tmp_path / "out").items() if name in TEXTS}
    assert not [name for name, text in files.items() if str(tmp_path) in text]
    assert all("predictions.npz is damaged" in files[name] for name in (README, "verdicts.csv", "report.html"))


@pytest.mark.parametrize(("sentence", "shown"), [
    ("since /a/b/x.npz is damaged; run", "since x.npz is damaged; run"),
    ("No space left: '/home/u/scratch-1@host@/best.pt'", "No space left: 'best.pt'"),
    ("cannot open sqlite:////a/mlflow.db: no", "cannot open mlflow.db: no"),
    ("from http://host:5000/api/x.npz, twice", "from x.npz, twice"),
    ("1/J + scored/trained images, 5/5, T-shirt/top, a / b, </b>", None),
])  # fmt: skip
def test_sentences_lose_folders_alone(sentence: str, shown: str | None) -> None:
    assert PLACE.sub("", sentence) == (sentence if shown is None else shown)


@pytest.mark.parametrize(("arguments", "code", "sentence"), [
    (("task3",), 2, "Missing option '--out'"),
    (("task9", "--out", "{}"), 2, "'task9' is not one of"),
    (("task3", "--out", "{}", "--metric", "test/acuracy"), 2, "did you mean test/accuracy"),
    (("task3", "--out", "{}", "--rope", "-1"), 2, "'--rope'"),
    (("task3", "--out", "{}", "--group", "ffffffff"), 1, "no comparison group 'ffffffff'"),
    (("task3", "task1", "--out", "{}"), 1, "task1 in the result database"),
    (("task3", "--out", "{}", "--tracking-uri", "sqlite:////nowhere/none.db"), 1, "there is no result database"),
    (("task3", "--out", __file__), 2, "'--out'"),
    (("task3", "--out", "/dev/null/x"), 1, "/dev/null"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_no_folder(
    arguments: tuple[str, ...], code: int, sentence: str, finished_task3: str, run_analysis, tmp_path: Path
) -> None:
    filled = [argument.format(tmp_path / "out") for argument in arguments]
    result = run_analysis("export", *filled, MLFLOW_TRACKING_URI=finished_task3)
    assert result.exit_code == code, result.stderr
    assert sentence in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert code == 2 or result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
