"""Redaction: no password is shown, nothing else is hidden, and libpq agrees with what is left."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdcsync.config import redact_dsn
from cdcsync.config.redaction import REDACTED, dsn_fault, is_secret_key, redact_url

# Letters that stand nowhere else in the strings below, mixed with what makes passwords hard to delimit.
PASSWORDS = st.text(st.sampled_from("QZÜ \\'\"@/:?&=#%[],\t"), min_size=1, max_size=12).filter(
    lambda text: any(letter in "QZÜ" for letter in text)
)


def escaped(password: str) -> str:
    return "".join(letter if letter in "QZ" else f"%{byte:02X}" for letter in password for byte in letter.encode())


def leaks(password: str, shown: str) -> bool:
    return any(letter in shown for letter in password if letter in "QZÜ")


@given(PASSWORDS)
@example("Q ")
@example("'Q")
@example("Q\\")
def test_libpq_reads_the_redacted_pairs_as_before_but_for_the_password(password: str) -> None:
    others = {"host": "db.example", "user": "o'brien", "application_name": "a b", "sslkey": "/etc/key"}

    shown = redact_dsn(make_conninfo("", password=password, sslpassword=password, **others))

    assert conninfo_to_dict(shown) == {"password": REDACTED, "sslpassword": REDACTED, **others}


def test_the_escapes_of_these_tests_are_the_passwords() -> None:
    assert conninfo_to_dict(f"postgresql://u:{escaped('Ü/@Q')}@h")["password"] == "Ü/@Q"


@given(PASSWORDS)
def test_libpq_reads_the_redacted_uri_as_before_but_for_the_password(password: str) -> None:
    dsn = f"postgresql://ann:{escaped(password)}@[::1]:5432,h2/app?sslmode=require&sslpassword={escaped(password)}"

    before, after = conninfo_to_dict(dsn), conninfo_to_dict(redact_dsn(dsn))

    assert before["password"] == before["sslpassword"] == password
    assert after == {**before, "password": REDACTED, "sslpassword": REDACTED}


@given(PASSWORDS.filter(lambda text: not set("?#") & set(text)))
@example("Q/Z@Q")
@example("Q@Z/Q")
@example("Q:Z@")
def test_a_password_that_someone_forgot_to_escape_is_hidden_too(password: str) -> None:
    assert not leaks(password, redact_dsn(f"postgresql://ann:{password}@db.example/app?sslmode=require"))


@given(PASSWORDS.filter(lambda text: "=" not in text))
@example("Q Z")
@example("'Q")
def test_a_password_that_someone_forgot_to_quote_is_hidden_too(password: str) -> None:
    assert not leaks(password, redact_dsn(f"host=db.example password={password}"))


@given(st.text(st.sampled_from("pasword=postgresql://u:@/?&'\\ []%,"), max_size=40) | st.text(max_size=40))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact_dsn(text)

    assert redact_dsn(once) == once
    assert dsn_fault(once) is None or once == REDACTED


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        " ",
        "postgresql://",
        "postgresql:///app",
        "postgres://db.example",
        "postgresql://ann@db.example/app",
        "postgresql://ann:@db.example/app",
        "postgresql://[::1]:5432,db.example:5433/app?target_session_attrs=read-write",
        "postgresql://%2Frun%2Fpostgresql/app?user=ann@corp&password=&sslkey=/etc/key",
        "host=/run/postgresql dbname='my app' sslkey = /etc/key passfile=/etc/pgpass",
        "service=app password=",
        "service=app password=''",
        "  service=app  ",
    ],
)
def test_what_holds_no_password_stays_as_it_is(dsn: str) -> None:
    assert redact_dsn(dsn) == dsn
    assert dsn_fault(dsn) is None


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://ann:Q@h/app", "postgresql://ann:***@h/app"),
        ("postgresql://:Q@h/app", "postgresql://:***@h/app"),
        ("postgresql://ann:Q?Z@h/app", "postgresql://ann:***@h/app"),
        ("postgresql:///app?host=h&password=Q&pass%77ord=Z", "postgresql:///app?host=h&password=***&pass%77ord=***"),
        ("postgresql:///?scram_client_key=Q&require_auth=x", "postgresql:///?scram_client_key=***&require_auth=x"),
        ("postgresql:///?oauth_client_secret=Q", "postgresql:///?oauth_client_secret=***"),
        ("host=h password=Q", "host=h password=***"),
        ("password = 'Q Z' host = h", "password = '***' host = h"),
        ("password='Q'host=h", "password='***'host=h"),
        ("password=Q\\ Z host=h", "password=*** host=h"),
        # libpq skips the space after `=` and takes what follows for the value.
        ("password= host=h", "password= ***"),
    ],
)
def test_a_password_is_replaced_where_it_stands(dsn: str, shown: str) -> None:
    assert redact_dsn(dsn) == shown
    assert dsn_fault(dsn) is None


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://ann:Q%ffZ@h/app", "postgresql://h/app?application_name=%e4&password=QZ", "host=h password=QZ\udcff"],
)
def test_what_is_no_utf_8_is_refused_and_never_quoted(dsn: str) -> None:
    fault = dsn_fault(dsn)
    assert fault is not None
    assert "UTF-8" in fault
    assert not leaks("QZ", fault)
    assert dsn_fault("postgresql://ann:%C3%A4@h/app") is None


@pytest.mark.parametrize(
    "dsn",
    [
        "Q",
        "mysql://ann:Q@h/app",
        "host=h password='Q",
        "password= 'Q=Z",
        "host=h password=Q Z",
        "host=h Q = ",
        "=Q",
        "postgresql://ann:Q/Z?Q@h",
        "postgresql://ann@corp:Q@h/app",
        "postgresql://ann:Q@Z@h/app",
        "postgresql://ann:Q%zz@h/app",
        "postgresql://ann:Q%00@h/app",
        "postgresql://h?user=ann@corp&password=Q",
        "postgresql://h/app?password=Q&Z",
        "postgresql://h/app?password=Q&Z=1",
        "postgresql://h/app?password=Q=Z",
    ],
)
def test_what_libpq_would_refuse_is_hidden_whole_and_never_quoted(dsn: str) -> None:
    assert redact_dsn(dsn) == REDACTED
    fault = dsn_fault(dsn)
    assert fault is not None
    assert "percent-encoded" in fault
    assert not leaks("QZ", fault)


@pytest.mark.parametrize(
    "key", ["api_key", "APIKey", "client_secret", "token", "hub_token", "password", "authorization", "code", "sig"]
)
def test_keys_that_sound_secret_are(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["dsn", "model", "table", "text", "schema", "encoding", "api-version"])
def test_keys_that_do_not_sound_secret_are_not(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.example/keys", "https://a.example/keys"),
        ("https://a.example:8443/keys?p=policy", "https://a.example:8443/keys?p=policy"),
        ("https://ann:QZ@a.example/keys", "https://***@a.example/keys"),
        ("https://QZ@a.example/keys", "https://***@a.example/keys"),
        ("https://ann:Q@Z@a.example/keys", "https://***@a.example/keys"),
        (
            "https://a.example/keys?code=QZ&p=policy&api%5Fkey=Q",
            "https://a.example/keys?code=***&p=policy&api%5Fkey=***",
        ),
        ("/etc/keys.json", "/etc/keys.json"),
    ],
)
def test_an_address_is_shown_without_user_password_and_keys(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown
