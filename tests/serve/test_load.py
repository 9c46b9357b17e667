"""Many clients at once, and bodies made up from the server's own description: a few seconds of each."""

import asyncio
import time
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from benchmarks import soak
from tests.serve.conftest import about, ask, local


@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch-invariant"])
def test_a_few_seconds_of_everything_at_once(model, invariant):
    asked = soak.questions(model, 12, 0.0 if invariant else soak.NEAR)
    limits = {"max_body_bytes": 100_000, "max_running": 8, "max_waiting": 8}
    with local(model, **limits, batch_invariant=invariant) as server:
        report = asyncio.run(soak.soak(server.url, "tiny", asked, 2, 20, 100_000))
        assert set(report.counts) <= {"right", "left", "refused as it should be", "busy"}, report.summary()
        assert {"right", "left", "refused as it should be"} <= set(report.counts)
        assert ask(server.client(), about("hello")).choices  # nothing is stuck
        ends = time.monotonic() + 3
        while server.service.open_answers and time.monotonic() < ends:  # of clients that left at the very end
            time.sleep(0.01)
        assert server.service.open_answers == 0


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/llava_fast/plan", "/v1/models/{name}"]
)
def test_no_request_is_a_server_error(server, path):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = [each.ok() for each in schema.get_all_operations() if each.ok().path == path]
    statuses = Counter()

    @given(case=operation.as_strategy())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def ask_anything(case):
        if isinstance(case.body, dict):
            case.body = {**case.body, "model": "tiny"}
            if "completions" in path:
                case.body |= {"max_tokens": 2, "n": 1}
            case.body.pop("max_completion_tokens", None)
        response = case.call(timeout=20)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error])

    ask_anything()
    assert max(statuses) < 500
