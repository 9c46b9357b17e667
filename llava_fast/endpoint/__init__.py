"""Client for many requests to a chat endpoint with OpenAI's API: rate limits, retries, and stored replies.

    with Store("replies.jsonl") as store:
        asked = ask_all(requests, endpoint, store, title="judging")
        for request, reply in zip(requests, Replies(store, asked.keys)):
            ...                             # reply is None if the request failed; the next run repeats it

`llava-fast judge` and `make-data` share this client. It needs `pip install 'llava_fast[endpoint]'`.
"""

from llava_fast.endpoint.asking import Ask, Asked, ask_all, ask_all_async, dry_run
from llava_fast.endpoint.cost import Estimate, estimate
from llava_fast.endpoint.replies import Replies, Reply, Store
from llava_fast.endpoint.requests import Request, image_part
from llava_fast.endpoint.settings import Endpoint

__all__ = [
    "Ask",
    "Asked",
    "Endpoint",
    "Estimate",
    "Replies",
    "Reply",
    "Request",
    "Store",
    "ask_all",
    "ask_all_async",
    "dry_run",
    "estimate",
    "image_part",
]
