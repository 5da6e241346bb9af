"""Values: what a single text may be, and what is said of one that may not."""

from __future__ import annotations

import pytest

from cdcsync.config import QualifiedName, Worker
from cdcsync.errors import ConfigError
from tests.unit.config.files import SECTIONS, articles, problems, read, refusal


@pytest.mark.parametrize("size", ["1MB", "1024kB", "1 GB", "2047GB", "1TB", "2147483647kB"])
def test_a_memory_size_is_a_whole_number_with_postgresqls_unit(size: str) -> None:
    assert articles(f"hnsw.build_memory = '{size}'").hnsw.build_memory == size


@pytest.mark.parametrize(
    "size", ["", "512", "512 mb", "512M", "1.5GB", "-1GB", "1023kB", "2TB", "2147483648kB", "1MB "]
)
def test_any_other_memory_size_is_refused(size: str) -> None:
    [line] = problems(SECTIONS + f"hnsw.build_memory = '{size}'")

    assert line.startswith('indexes.articles.hnsw.build_memory: expected a memory size from "1MB" to "2047GB"')


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9477", ("127.0.0.1", 9477)),
        ("[::1]:9477", ("::1", 9477)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        ("localhost:0", ("localhost", 0)),
        ("my-host.example:65535", ("my-host.example", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(listen: str, address: tuple[str, int]) -> None:
    assert read(f'[worker]\nlisten = "{listen}"{SECTIONS}').worker.listen_address == address


@pytest.mark.parametrize(
    "listen",
    ["", ":9477", "9477", "localhost", "localhost:", "h:65536", "h:-1", "h:1x", "::1:1", "[h]:1", "[]:1", "a b:1"],
)
def test_any_other_address_is_refused(listen: str) -> None:
    [line] = problems(f'[worker]\nlisten = "{listen}"{SECTIONS}')

    assert line == f'worker.listen: expected host:port such as "127.0.0.1:9477" or "[::1]:9477", got \'{listen}\''
    with pytest.raises(ConfigError, match="expected host:port") as refused:
        _ = Worker(listen=listen).listen_address
    assert refused.value.hint


def test_a_connection_string_that_cannot_be_read_is_refused_and_not_shown() -> None:
    error = refusal('[source]\ndsn = "host=h password=s3cret pass"' + SECTIONS)

    assert error.message.startswith("source.dsn: expected a connection string")
    assert "s3cret" not in f"{error}{error.hint}"


@pytest.mark.parametrize("name", ["A", "1a", "a-b", "a" * 41, "ä"])
def test_an_index_is_named_so_that_its_tables_can_be(name: str) -> None:
    [line] = problems(SECTIONS.replace("indexes.articles", f'indexes."{name}"'))

    assert "expected at most 40 lower-case letters, digits or underscores, no digit first" in line


@pytest.mark.parametrize("name", ["_a", "a" * 40, "a_1"])
def test_an_index_name_of_the_right_form_is_taken(name: str) -> None:
    index = read(SECTIONS.replace("indexes.articles", f"indexes.{name}")).indexes[name]

    assert index.view_name == QualifiedName("public", f"{name}_index")
