"""The shared client of endpoints against one that fails, stalls, truncates and lies."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llava_fast.endpoint import Endpoint, Replies, Request, Store, ask_all, dry_run, estimate, image_part
from llava_fast.endpoint.asking import _retry_after
from llava_fast.errors import EndpointError, MissingFileError
from tests.support.scripted_endpoint import FAULTS, REPLIES, completion, scripted

KEY = "sk-a-secret-of-tests"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "replies.jsonl") as opened:
        yield opened


def questions(count: int, **options) -> list[Request]:
    return [
        Request([{"role": "user", "content": f"question {n}"}], {"max_tokens": 8, **options}, name=f"q{n}")
        for n in range(count)
    ]


def at(server, **settings) -> Endpoint:
    return Endpoint("scripted", server.url, **{"backoff": 0.001, "timeout": 10, **settings})


def ask(requests, endpoint, store):
    return ask_all(requests, endpoint, store, progress=False)


def echo(body):
    return "reply to " + body["messages"][-1]["content"]


def test_replies_in_order_of_requests(store):
    with scripted(echo, delay=0.01) as server:
        asked = ask(questions(20), at(server, concurrency=5), store)
        assert server.most_at_once == 5
    assert [store.get(key).text for key in asked.keys] == [f"reply to question {n}" for n in range(20)]
    assert (asked.replied, asked.kept, asked.failed, asked.retries) == (20, 0, 0, 0)
    assert (asked.prompt_tokens, asked.reply_tokens) == (200, 100)
    assert server.bodies[0].keys() == {"model", "messages", "max_tokens"}


def test_options_of_any_name_reach_the_endpoint(store):
    with scripted(echo) as server:
        ask(questions(1, temperature=0.2, top_k=3, seed=1), at(server), store)
    assert {"temperature": 0.2, "top_k": 3, "seed": 1}.items() <= server.bodies[0].items()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_spoils_no_other(store, fault):
    seen = set()

    def once(body, number):
        text = body["messages"][-1]["content"]
        if text == "question 1" and text not in seen:
            seen.add(text)
            return fault
        return None

    with scripted(echo, once) as server:
        # On a busy machine an answer takes a while, so only what never comes in time gets a short limit.
        asked = ask(questions(4), at(server, timeout=1 if fault in ("stall", "trickle") else 10), store)
    texts = [store.get(key).text for key in asked.keys]
    if fault == "half pair":
        assert (texts[1], asked.retries) == ("\ud800", 0)
        texts[1] = "reply to question 1"
    else:
        assert asked.retries == 1
    assert texts == [f"reply to question {n}" for n in range(4)]
    assert asked.failed == 0


@pytest.mark.parametrize("kind", REPLIES)
def test_a_well_formed_reply_is_kept_and_says_what_it_is(store, kind):
    with scripted(fault=lambda body, number: kind) as server:
        asked = ask(questions(1), at(server), store)
        assert len(server.bodies) == 1
    reply = store.get(asked.keys[0])
    assert not reply.is_whole
    assert (reply.text, reply.finish, reply.refusal) == {
        "empty": ("", "stop", ""),
        "refusal": ("", "stop", "I cannot help with that."),
        "length": ("An unfinished", "length", ""),
    }[kind]


def test_a_request_that_fails_is_named_and_asked_again_by_the_next_run(store):
    def fault(body, number):
        return "500" if body["messages"][-1]["content"] == "question 2" else None

    with scripted(echo, fault) as server:
        asked = ask(questions(4), at(server, attempts=3), store)
        assert [key in store for key in asked.keys] == [True, True, False, True]
        assert (asked.failed, asked.retries, len(server.bodies)) == (1, 2, 6)
        assert dict(asked.reasons) == {"HTTP 500: scripted 500 (3 attempts)": 1}
        assert "the same command asks them again" in str(asked)
        server.fault = lambda body, number: None
        again = ask(questions(4), at(server), store)
        assert (again.replied, again.kept, len(server.bodies)) == (1, 3, 7)
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    assert [line["name"] for line in lines if "failed" in line] == ["q2"]


def test_a_bad_request_is_not_tried_again(store):
    with scripted(echo, lambda body, number: "400") as server:
        asked = ask(questions(3), at(server), store)
        assert (asked.failed, len(server.bodies)) == (3, 3)


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_no_request_survives_ends_the_run_in_one_line(store, status):
    with (
        scripted(echo, lambda body, number: status if number == 3 else None) as server,
        pytest.raises(EndpointError, match=f"refuses model scripted: HTTP {status}") as caught,
    ):
        ask(questions(50), at(server, concurrency=1), store)
    assert "\n" not in str(caught.value)
    assert (len(server.bodies), len(store)) == (4, 3)


def test_no_quota_ends_the_run(store):
    answer = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    with scripted() as server:
        handler = server.server.RequestHandlerClass
        handler.reply = lambda self, body, fault: self.send(429, json.dumps(answer))
        with pytest.raises(EndpointError, match="exceeded your quota"):
            ask(questions(5), at(server, concurrency=2), store)
        assert len(server.bodies) <= 2


def test_many_failures_in_a_row_end_the_run(store):
    with (
        scripted(echo, lambda body, number: "400") as server,
        pytest.raises(EndpointError, match="20 requests in a row failed, the last: HTTP 400"),
    ):
        ask(questions(100), at(server, concurrency=4), store)
    assert len(server.bodies) < 30


def test_no_endpoint_at_all(store):
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1", attempts=2, backoff=0.001)
    with pytest.raises(EndpointError, match="20 requests in a row failed, the last: Connection error"):
        ask(questions(100), endpoint, store)


def test_requests_in_flight_end_before_the_run_does(store):
    def fault(body, number):
        return "401" if body["messages"][-1]["content"] == "question 0" else None

    with scripted(echo, fault, delay=0.05) as server, pytest.raises(EndpointError):
        ask(questions(9), at(server, concurrency=3), store)
    assert 2 <= len(store) == len(server.bodies) - 1 < 8


def test_a_wait_for_the_endpoint_ends_when_the_run_does(store):
    def fault(body, number):
        return {"question 0": "429", "question 1": "401"}.get(body["messages"][-1]["content"])

    with scripted(echo, fault) as server:
        begun = time.monotonic()
        with pytest.raises(EndpointError):
            ask(questions(3), at(server, backoff=60), store)
        assert time.monotonic() - begun < 5


def test_equal_requests_are_asked_once_and_draws_apart(store):
    same = questions(1) * 5
    with scripted(echo, delay=0.02) as server:
        asked = ask(same, at(server), store)
        assert (len(server.bodies), asked.replied, len(set(asked.keys))) == (1, 1, 1)
        draws = [Request(same[0].messages, same[0].options, draw) for draw in range(3)]
        assert ask(draws, at(server), store).replied == 2
    assert len(store) == 3


def test_equal_requests_fail_once(store):
    with scripted(echo, lambda body, number: "400") as server:
        asked = ask(questions(1) * 5, at(server), store)
    assert (asked.failed, len(server.bodies)) == (1, 1)


def test_requests_a_minute(store):
    with scripted(echo) as server:
        ask(questions(5), at(server, requests_per_minute=60 / 0.05), store)
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert sum(gaps) >= 0.9 * 4 * 0.05


def test_tokens_a_minute(store):
    requests = questions(4)
    each = sum(requests[0].tokens())
    with scripted(echo) as server:
        ask(requests, at(server, tokens_per_minute=each * 60 / 0.05), store)
    # Three waits of 0.05 s; the first request may arrive late, the others without them within some milliseconds.
    assert server.times[-1] - server.times[0] >= 2 * 0.05


def test_retry_after_holds_all_requests_back(store):
    with scripted(echo, lambda body, number: "429" if number == 0 else None) as server:
        ask(questions(3), at(server, concurrency=1), store)
    assert server.times[1] - server.times[0] >= 0.019  # retry-after-ms: 20


def test_retry_after_is_read_in_each_form():
    assert _retry_after({"retry-after": "7"}) == 7
    assert _retry_after({"retry-after-ms": "1500", "retry-after": "7"}) == 1.5
    assert 3500 < _retry_after({"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"}) <= 3600
    assert [_retry_after({"retry-after": wrong}) for wrong in ("", "soon", "nan", "-3")] == [0, 0, 0, 0]


def test_the_budget_ends_the_run_and_the_next_goes_on(store):
    with scripted(echo) as server:
        endpoint = at(server, concurrency=1, price_in=1e5, price_out=0, max_cost=3.0)
        with pytest.raises(EndpointError, match=r"this run has cost \$3.00 of at most \$3.00"):
            ask(questions(5), endpoint, store)
        assert len(server.bodies) == len(store) == 3
        asked = ask(questions(5), endpoint, store)
        assert (asked.replied, asked.kept, asked.dollars) == (2, 3, 2.0)


def test_the_budget_counts_estimates_where_the_endpoint_does_not_tell_tokens(store):
    def untold(body):
        return {name: value for name, value in completion("Fine.").items() if name != "usage"}

    # A request has 3 + 4 prompt tokens and at most 8 of the reply, by Request.tokens.
    with scripted(untold) as server:
        endpoint = at(server, concurrency=1, price_in=1e6, price_out=1e6, max_cost=40)
        with pytest.raises(EndpointError, match=r"this run has cost \$45.00 of at most \$40.00"):
            ask(questions(5), endpoint, store)
        assert len(server.bodies) == 3
        asked = ask(questions(5), endpoint, store)
    assert (asked.prompt_tokens, asked.reply_tokens, asked.estimated) == (14, 16, 2)
    assert "(estimated for 2 replies" in str(asked)


def test_a_full_disk_ends_the_run_with_one_line(store, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llava_fast.storage.journal.os.write", full)
    for fault in (None, "400"):  # for a reply, and for the note of a failure
        with scripted(echo, lambda body, number, fault=fault: fault) as server:
            with pytest.raises(EndpointError, match=r"replies\.jsonl cannot be written: No space left on device"):
                ask(questions(9), at(server, concurrency=2), store)
            assert len(server.bodies) <= 2


def test_a_disk_that_is_full_when_replies_are_flushed_is_one_line(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path / "replies.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("llava_fast.storage.journal.os.fsync", full)
        with pytest.raises(EndpointError, match="cannot be written: No space left"):
            store.close()
    Store(tmp_path / "replies.jsonl").close()  # its lock is released


def test_the_key_is_sent_and_kept_nowhere(store, capsys):
    def fault(body, number):
        return "400" if number == 1 else None

    with scripted(lambda body: f"your key is {KEY}", fault) as server:
        handler, send = server.server.RequestHandlerClass, server.server.RequestHandlerClass.send
        handler.send = lambda self, status, text, **more: send(self, status, text.replace("scripted", KEY), **more)
        asked = ask_all(questions(2), at(server, concurrency=1), store)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert store.get(asked.keys[0]).text == "your key is ***"
    assert KEY not in store.path.read_text() + str(asked) + "".join(capsys.readouterr())


def test_a_key_in_a_malformed_reply_is_not_shown(store):
    with scripted(lambda body: {"error": f"{KEY} is\nwrong"}) as server:
        asked = ask(questions(1), at(server, attempts=1), store)
    assert dict(asked.reasons) == {"it holds no choices[0].message, but the error *** is wrong (1 attempts)": 1}
    assert KEY not in store.path.read_text()


def test_a_key_that_is_missing(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="put it into the environment variable OPENAI_API_KEY"):
        Endpoint("m").api_key()
    assert Endpoint("m", "http://localhost:8000/v1").api_key() == "none"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "has no name"),
        ({"base_url": "localhost"}, "must begin with http"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"price_in": 1.0}, "one price is missing"),
        ({"max_cost": 1.0}, "needs both prices"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute is nan"),
    ],
)
def test_a_setting_out_of_range(settings, words):
    with pytest.raises(EndpointError, match=words):
        Endpoint(**{"model": "m", **settings})


def test_the_estimate_counts_what_is_left(store):
    with scripted(echo) as server:
        endpoint = at(server, price_in=1.0, price_out=2.0)
        before = estimate([*questions(10), *questions(2)], endpoint, store)
        ask(questions(4), endpoint, store)
        after = estimate(questions(10), endpoint, store)
    assert (before.requests, before.kept, after.requests, after.kept) == (10, 0, 6, 4)
    assert before.reply_tokens == 80
    assert before.dollars == pytest.approx((before.prompt_tokens + 2 * 80) / 1e6)
    assert str(after).startswith("6 requests to ask (4 replies are there already), about ")


def test_a_dry_run_asks_nothing_and_needs_no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG" + bytes(100))
    request = Request([{"role": "user", "content": [image_part(picture), {"type": "text", "text": "What is it?"}]}])
    shown = dry_run([request], Endpoint("m"))
    assert "What is it?" in shown
    assert "<data:image/png;base64,iVBOR" in shown
    assert len(shown) < 400
    with pytest.raises(EndpointError, match="nothing to ask"):
        dry_run([], Endpoint("m"))


def test_images_that_cannot_be_sent(tmp_path):
    with pytest.raises(MissingFileError):
        image_part(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(EndpointError, match="no JPEG, PNG, GIF or WebP"):
        image_part(tmp_path / "text.jpg")


def test_a_torn_line_is_cut_off_and_a_broken_one_left_alone(tmp_path):
    path = tmp_path / "replies.jsonl"
    with scripted(echo) as server:
        with Store(path) as store:
            ask(questions(3), at(server, concurrency=1), store)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"\0\0\0\n" + b'{"key": "x", "reply": 3}\n' + lines[1] + lines[2][:40])
        with Store(path) as store:
            assert (len(store), store.unreadable) == (2, 2)
            asked = ask(questions(3), at(server), store)
            assert (asked.kept, asked.replied) == (2, 1)
            assert [store.get(key).text for key in asked.keys] == [f"reply to question {n}" for n in range(3)]
    assert path.read_bytes().endswith(lines[2])


def test_one_process_at_a_time(tmp_path):
    with Store(tmp_path / "replies.jsonl"), pytest.raises(EndpointError, match="another process writes"):
        Store(tmp_path / "replies.jsonl")
    Store(tmp_path / "replies.jsonl").close()


def test_a_store_that_cannot_be_opened(tmp_path):
    with pytest.raises(EndpointError, match="cannot be opened"):
        Store(tmp_path)


KILLED = """
import sys
from llava_fast.endpoint import Endpoint, Request, Store, ask_all
with Store(sys.argv[1]) as store:
    requests = [Request([{"role": "user", "content": f"question {n}"}], {}) for n in range(60)]
    ask_all(requests, Endpoint("scripted", sys.argv[2], concurrency=4, backoff=0.001), store, progress=False)
"""


def test_killed_at_random_no_reply_is_lost(tmp_path):
    path, rng = tmp_path / "replies.jsonl", random.Random(3)
    with scripted(echo, lambda body, number: "500" if rng.random() < 0.1 else None, delay=0.005) as server:
        runs = 0
        while True:
            command = [sys.executable, "-c", KILLED, str(path), server.url]
            process = subprocess.Popen(command, env={**os.environ, "OPENAI_API_KEY": KEY})
            kill_at = len(server.bodies) + rng.randint(5, 25)
            while process.poll() is None and (len(server.bodies) < kill_at or runs == 4):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
            runs += 1
            if process.returncode == 0:
                break
            assert runs <= 5
    texts = [json.loads(line)["reply"]["choices"][0]["message"]["content"] for line in path.read_text().splitlines()]
    assert sorted(texts) == sorted(f"reply to question {n}" for n in range(60))
    assert runs > 1


def test_replies_are_a_sequence(store):
    with scripted(echo, lambda body, number: "400" if number == 1 else None) as server:
        asked = ask(questions(3), at(server, concurrency=1), store)
    replies = Replies(store, asked.keys)
    assert [reply and reply.text for reply in replies] == ["reply to question 0", None, "reply to question 2"]
    assert replies[1:][1].text == replies[-1].text == "reply to question 2"
