"""`cdcsync evaluate --judged`: an index answers questions, and its figures are stored, compared, gated and drawn."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from cdcsync.cli import main
from cdcsync.flows.evaluate.drawing import HEIGHT, WIDTH
from cdcsync.flows.evaluate.pictures import SCALE
from cdcsync.postgres.sessions import connect
from cdcsync.target import judged_runs
from tests.support.configs import configuration
from tests.support.provider import FakeProvider
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

DOCUMENTS = {
    "cats": "Cats sleep most of the day. A cat purrs when it is content.",
    "dogs": "Dogs guard the house and bark at strangers.",
    "tea": "Boil water, pour it over the leaves, wait three minutes.",
    "trains": "The night train leaves at ten and has a dining car.",
    "stars": "A telescope shows the rings of Saturn on a clear night.",
}
QUESTIONS = {
    "q1": "why does my cat purr",
    "q2": "how long does tea take",
    "q3": "what can I see at night",
    "q4": "is a cat asleep most of the day",
    "q5": "pour boiling water over the leaves",
    "q6": "the rings of Saturn in a telescope",
}
GRADES = {
    "q1": {"cats": 1},
    "q2": {"tea": 1},
    "q3": {"stars": 2, "trains": 1},
    "q4": {"cats": 1},
    "q5": {"tea": 1},
    "q6": {"stars": 1},
}


def write_collection(directory: Path) -> Path:
    """Write the questions in BEIR's layout."""
    (directory / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": id_, "text": text}) for id_, text in QUESTIONS.items()]
    (directory / "queries.jsonl").write_text("\n".join(lines))
    rows = [f"{query}\t{id_}\t{grade}" for query, judged in GRADES.items() for id_, grade in judged.items()]
    (directory / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return directory


@pytest.fixture
def followed(make_pipeline: Callable[[str], Pipeline], database: Database) -> Pipeline:
    """Have a worker make an index of the documents, and one without keyword search."""
    pipeline = make_pipeline(
        configuration(
            database.dsn,
            embedders={"fake": {"type": "hash", "dimensions": 256}},
            indexes={
                "pages": {"text": "{body}"},
                "plain": {"table": "pages", "text": "{body}", "search": ""},
                "flags": {"text": "{body}"},
            },
        )
    )
    pipeline.source.execute("CREATE TABLE flags (good boolean, raw bytea, body text, PRIMARY KEY (good, raw))")
    pipeline.source.execute("INSERT INTO flags VALUES (true, %s, 'A cat purrs')", [b"\0\xff"])
    pipeline.source.execute("CREATE TABLE pages (id text PRIMARY KEY, body text)")
    for id_, body in DOCUMENTS.items():
        pipeline.source.execute("INSERT INTO pages VALUES (%s, %s)", [id_, body])
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    return pipeline


def indexes_of_the_status(pipeline: Pipeline) -> dict[str, Any]:
    """Return the indexes of `cdcsync status --json`."""
    found: dict[str, Any] = json.loads(pipeline.command("status", "--json").stdout)["indexes"]
    return found


def evaluate(pipeline: Pipeline, *arguments: object) -> int:
    """Run the command."""
    try:
        main(["evaluate", *map(str, arguments), "-c", str(pipeline.path)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_modes_are_measured_stored_compared_gated_and_drawn(
    followed: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], database: Database
) -> None:
    collection = write_collection(tmp_path / "animals")
    drawn = tmp_path / "figures.svg"

    def answer(index: str, *arguments: object) -> tuple[int, dict[str, Any]]:
        status = evaluate(followed, index, "--judged", collection, "--json", *arguments)
        return status, json.loads(capsys.readouterr().out)["judged"]

    status, first = answer("pages", "--weights", "0:1:0.5", "--min", "nDCG@10=0.5", "--plot", drawn)
    assert status == 0
    assert (first["run"], first["not_stored"], first["queries"], first["collection"]) == (1, None, 6, "animals")
    assert list(first["modes"]) == ["text", "vector", "hybrid"]
    hybrid, vector = first["modes"]["hybrid"], first["modes"]["vector"]
    assert first["settings"]["hnsw"]["quantise"] == "none"
    assert set(hybrid["figures"]) == {"nDCG@10", "R@100", "RR@10"}
    assert hybrid["scores"]["nDCG@10"].keys() == QUESTIONS.keys()
    assert vector["figures"]["R@100"]["mean"] == 1.0
    by_weight = {one["weight"]: one["figures"]["nDCG@10"] for one in first["weights"]}
    assert by_weight.keys() == {0.0, 0.5, 1.0}
    assert by_weight[0.5]["mean"] == pytest.approx(hybrid["figures"]["nDCG@10"]["mean"], abs=0.01)
    assert by_weight[0.0] == vector["figures"]["nDCG@10"]
    assert first["gates"] == [{"passed": True, "text": first["gates"][0]["text"]}]
    svg = ElementTree.parse(drawn).getroot()
    texts = {node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"text", "vector", "hybrid", "pages: nDCG@10, 6 questions of animals"} <= texts

    # The same again is no worse, and a floor out of reach fails the command.
    status, second = answer("pages", "--against", "LAST", "--min", "text nDCG@10=1.01", "--measure", "RR@10")
    assert (status, second["run"]) == (1, 2)
    assert [gate["passed"] for gate in second["gates"]] == [False, True, True, True]
    assert second["measures"] == ["RR@10", "nDCG@10"]

    # A run of another measure is none that LAST could be compared with, and does not stand in the way of others.
    status, third = answer("pages", "--against", "LAST", "--measure", "P@5")
    assert (status, third["gates"][0]["text"].endswith("this is the first")) == (0, True)
    status, fourth = answer("pages", "--against", "LAST")
    assert (status, [gate["text"].split()[1] for gate in fourth["gates"]]) == (0, ["nDCG@10"] * 3)

    # An index without keyword search has one mode.
    status, plain = answer("plain", "--against", "LAST")
    assert (status, list(plain["modes"])) == (0, ["vector"])
    assert "this is the first" in plain["gates"][0]["text"]

    # An index that has lost its answers is worse than an earlier run says.
    database.execute("DELETE FROM cdcsync.pages_chunks WHERE id IN ('cats', 'tea', 'stars')")
    assert evaluate(followed, "pages", "--judged", collection, "--against", "1") == 1
    told = capsys.readouterr().out
    assert re.search(r"✗ vector nDCG@10 differs by -0\.\d+ \[-\S+ -\S+\] from the run of", told)
    assert "stored as run 6" in told

    # Five of the questions are no proof: chance changes all of five in the same direction once in 16 times.
    (collection / "qrels" / "test.tsv").write_text(
        "\n".join(f"{query}\t{id_}\t1" for query in list(QUESTIONS)[:5] for id_ in GRADES[query])
    )
    assert evaluate(followed, "pages", "--judged", collection, "--against", "1") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"✓ vector nDCG@10 differs by -0\.\d+ from the run of \S+ \S+: too few questions to tell, it takes 6", told
    )
    assert "an interval of 95 % takes 6" in told
    assert "±" not in told

    async def outcomes() -> dict[str, list[judged_runs.Outcome]]:
        async with await connect(database.dsn, "target") as connection:
            return await judged_runs.outcomes(connection, "cdcsync", ["pages", "plain"], most=2)

    # The status shows the last runs, and so does the page.
    assert indexes_of_the_status(followed)["pages"]["judged"][-1]["id"] == 7

    shown = anyio.run(outcomes)
    assert [(one.id, one.measure) for one in shown["pages"]] == [(6, "nDCG@10"), (7, "nDCG@10")]
    assert shown["plain"][0].means == {"vector": plain["modes"]["vector"]["figures"]["nDCG@10"]["mean"]}


def test_documents_are_named_as_answers_in_json_name_them(
    followed: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection = write_collection(tmp_path / "flags")
    (collection / "qrels" / "test.tsv").write_text("q1\ttrue,\\x00ff\t1\n")
    assert evaluate(followed, "flags", "--judged", collection, "--min", "nDCG@10=1") == 0
    assert re.search(r"^ *hybrid +1\.0000 ", capsys.readouterr().out, re.MULTILINE)


def test_recall_and_answers_can_be_measured_and_drawn_together(
    followed: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection, drawn = write_collection(tmp_path / "animals"), tmp_path / "both.png"
    arguments = ("--judged", collection, "--ef-search", 40, "--ef-search", 100, "--plot", drawn)
    assert evaluate(followed, "pages", *arguments) == 0
    told = capsys.readouterr().out
    assert re.search(r"^ *100 +1\.0000 ", told, re.MULTILINE)
    assert re.search(r"^ *hybrid +[01]\.\d{4} ", told, re.MULTILINE)
    with Image.open(drawn) as image:
        assert image.size == (2 * WIDTH * SCALE, HEIGHT * SCALE)


def test_a_wrong_argument_is_told_before_anything_is_measured(
    followed: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection = str(write_collection(tmp_path / "animals"))
    judged = ("--judged", collection)
    for arguments, problem in (
        (("--min", "nDCG@10=0.4"), "name the questions with --judged DIR"),
        ((*judged, "--where", "true"), "judged questions are answered from all rows"),
        ((*judged, "--plot", "figures.pdf"), "only SVG and PNG can be drawn"),
        (("--judged", "nowhere"), "there is no such directory"),
        ((*judged, "--measure", "nonsense"), "nonsense is not a measure that can be taken"),
        ((*judged, "--weights", "1:0:1"), "'1:0:1' is not a range of weights"),
        ((*judged, "--against", "17"), "there is no run 17 of pages by animals"),
        ((*judged, "--against", "FIRST"), "'FIRST' is not a run"),
        ((*judged, "--plot", f"{collection}/no/figures.svg"), "where: --plot"),
    ):
        assert evaluate(followed, "pages", *arguments) == 2
        told = capsys.readouterr()
        assert problem in told.err
        assert told.out == ""


def test_a_reranker_is_measured_as_a_mode_of_its_own(
    followed: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], provider: FakeProvider
) -> None:
    reranker = f'[rerankers.fine]\ntype = "tei"\nbase_url = "{provider.tei_url}"\ncandidates = 3\n'
    text = followed.path.read_text().replace("[indexes.pages]", f'{reranker}[indexes.pages]\nreranker = "fine"')
    followed.path.write_text(text)
    collection = write_collection(tmp_path / "animals")
    assert evaluate(followed, "pages", "--judged", collection, "--json", "--min", "R@100=0.1") == 0
    judged = json.loads(capsys.readouterr().out)["judged"]
    assert list(judged["modes"]) == ["text", "vector", "hybrid", "reranked"]
    assert judged["settings"]["reranker"] == "fine"
    assert judged["gates"][0]["text"].startswith("reranked R@100 is ")
    assert [len(body["texts"]) for _, _, body in provider.requests] == [3] * len(QUESTIONS)
