"""The live page's server over real HTTP: who may ask, for what, and that nothing else can be had."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from streamlens.errors import RunStoreError
from streamlens.views.web.serve import PORT, PageServer
from tests.helpers.pages import Client, serving
from tests.helpers.written_runs import write_run

ADDRESSES = ("/", "/assets/page.js", "/assets/vega.js", "/api/runs", "/api/charts", "/nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "first" / "run.db", 20)
    (root.parent / "secret.txt").write_text("secret")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(folder) as found:
        yield found


def test_the_page_and_its_files_are_there_and_ask_for_nothing_from_elsewhere(client: Client) -> None:
    page = client.get("/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    for name in ("vega.js", "host.js", "runs.js", "charts.js", "page.js", "page.css", "report.css"):
        assert f'"assets/{name}"' in page.text
        assert client.get(f"/assets/{name}").status == 200
    assert "http" not in page.text.replace('http-equiv="', "")


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_answer_forbids_other_sources_framing_and_sniffing(client: Client, address: str) -> None:
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    assert "server" not in headers


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "", "a/b", "[::1"]
)
def test_another_hosts_name_is_turned_away_everywhere(client: Client, address: str, host: str) -> None:
    reply = client.get(address, host=host.format(port=client.port))
    assert reply.status in (400, 403)  # a request without a host is none that a server must take
    assert b"run" not in reply.body.lower() or b"under that name" in reply.body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:7411"])
def test_this_machines_own_names_are_welcome_at_any_port_as_tunnels_have_them(
    client: Client, host: str
) -> None:
    assert client.get("/api/runs", host=host).status == 200


def test_a_name_that_is_turned_away_is_told_which_ones_are_not(client: Client) -> None:
    assert "Open it as one of: 127.0.0.1, ::1, localhost" in client.get("/", host="evil.example").text


@pytest.mark.parametrize(
    "target",
    [
        "/../secret.txt",
        "/assets/../../secret.txt",
        "/assets/..%2f..%2fsecret.txt",
        "/%2e%2e/%2e%2e/secret.txt",
        "/assets/%2e%2e%2fpage.html",
        "/assets//etc/passwd",
        "/assets/%2fetc%2fpasswd",
        "/assets/page.js%00.txt",
        "//etc/passwd",
        "/assets/",
        "/first/run.db",
    ],
)
def test_no_path_leads_to_a_file(client: Client, target: str) -> None:
    reply = client.get(target)
    assert reply.status in (400, 404)
    assert b"secret" not in reply.body


@pytest.mark.parametrize(
    "key", ["../secret.txt", "%2e%2e%2fsecret.txt", "/etc/passwd", "first/run.db", "r1", "", "\0", "0" * 16]
)
def test_a_run_is_asked_for_by_its_key_and_by_nothing_else(client: Client, key: str) -> None:
    found = client.charts(key)
    assert (found["runs"], found["gone"], found["sections"]) == ([], 1, [])


def test_what_cannot_be_asked_is_said_in_words(client: Client) -> None:
    for query, words in (
        ("from=a&to=3", "must be steps"),
        ("from=5", "must be steps"),
        ("from=-1&to=3", "must be steps"),
        (f"from=1&to={'9' * 40}", "must be steps"),
        ("from=5&to=3", "not be beyond"),
        (f"layers={'x' * 500}", "longer than 400"),
        ("&".join(f"run={i}" for i in range(21)), "21 runs were chosen: at most 20"),
    ):
        reply = client.get(f"/api/charts?{query}")
        assert reply.status == 400
        assert words in reply.json["error"]


def test_nothing_can_be_changed(client: Client, folder: Path) -> None:
    before = (folder / "first" / "run.db").read_bytes()
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    with connection:
        connection.sendall(b"DELETE /api/runs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 405 " in connection.recv(100)
    assert (folder / "first" / "run.db").read_bytes() == before


@pytest.mark.parametrize("address", ["/api/charts", "/assets/vega.js"])
def test_an_answer_that_is_known_is_not_sent_again(client: Client, address: str) -> None:
    first = client.get(address)
    again = client.get(address, If_None_Match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert client.get(address, If_None_Match='"other"').status == 200


@pytest.mark.parametrize("address", ["/api/charts", "/assets/vega.js"])
def test_answers_are_compressed_for_those_who_can_read_that(client: Client, address: str) -> None:
    plain = client.get(address)
    small = client.get(address, Accept_Encoding="gzip")
    assert gzip.decompress(small.body) == plain.body
    assert len(small.body) < len(plain.body) / 2


# -- the token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
def test_listening_for_others_asks_every_request_for_the_token(folder: Path, address: str) -> None:
    with serving(folder, host="0.0.0.0") as client:
        (token,) = parse_qs(urlsplit(client.url).query)["token"]
        assert len(token) >= 32
        assert client.get(address).status == 401
        assert client.get(f"{address}?token=wrong").status == 401
        assert client.get(address, Authorization="Bearer ").status == 401
        assert client.get(f"{address}?token={token}%C3%A9").status in (400, 401)
        known = 404 if address == "/nothing" else 200
        assert client.get(f"{address}?token={token}").status == known
        assert client.get(address, Authorization=f"Bearer {token}").status == known
        assert client.get(address, Authorization=f"Bearer {token}", host="cluster.example").status == known


def test_the_page_carries_its_token_to_its_files(folder: Path) -> None:
    with serving(folder, host="0.0.0.0") as client:
        query = urlsplit(client.url).query
        page = client.get(f"/?{query}").text
        assert f'src="assets/page.js?{query}"' in page
        assert (
            client.get("/").text
            == "Open the whole address that `streamlens ui` printed: it ends in ?token=...\n"
        )


def test_at_this_machines_own_address_there_is_a_token_only_if_asked_for(folder: Path) -> None:
    with serving(folder) as client:
        assert client.url == f"http://127.0.0.1:{client.port}/"
    with serving(folder, token=True) as client:
        assert client.get("/").status == 401
        assert client.get(f"/?{urlsplit(client.url).query}").status == 200
        assert client.get(f"/?{urlsplit(client.url).query}", host="evil.example").status == 403


def test_each_server_has_a_token_of_its_own(folder: Path) -> None:
    with serving(folder, token=True) as one, serving(folder, token=True) as other:
        assert urlsplit(one.url).query != urlsplit(other.url).query


# -- where it listens -----------------------------------------------------------------------------


def test_by_default_only_this_machine_can_reach_it(folder: Path) -> None:
    server = PageServer(folder)
    try:
        assert urlsplit(server.url).hostname == "127.0.0.1"
        assert PORT <= (urlsplit(server.url).port or 0) < PORT + 20
        another = PageServer(folder)
        try:
            assert another.url != server.url
        finally:
            another.close()
    finally:
        server.close()


def test_a_port_that_is_taken_is_an_error_that_names_it_and_the_remedy(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127.0.0.1:{port} .*choose another --port"):
            PageServer(folder, port=port)


def test_a_host_that_is_none_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(OSError, match=r"cannot listen at no\.such\.host\.invalid"):
        PageServer(folder, host="no.such.host.invalid", port=0)


def test_where_there_is_nothing_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(RunStoreError, match="check the path"):
        PageServer(tmp_path / "absent", port=0)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_link_out_of_the_folder_is_not_followed_but_named(tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside" / "run.db", 3, run="outside")
    inside = write_run(tmp_path / "runs" / "inside" / "run.db", 3, run="inside")
    (tmp_path / "runs" / "link.db").symlink_to(outside)
    (tmp_path / "runs" / "folder").symlink_to(outside.parent, target_is_directory=True)
    (tmp_path / "runs" / "again.db").symlink_to(inside)
    with serving(tmp_path / "runs") as client:
        assert [run["title"] for run in client.runs()] == ["inside"]
        assert client.get("/api/runs").json["problems"] == [
            "link.db is a link out of the folder, and is not shown"
        ]
