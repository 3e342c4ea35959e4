# Reads everything up to a number with PyPI's client for Jetstreams, breaks the connection on the way, and prints what it saw.
import json
import sys

from atproto import JetstreamClient

base_uri, start, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
seen = {"posts": 0, "deleted": 0, "identities": 0, "accounts": 0, "others": 0, "numbers": 0, "connections": 0}


def fail(error):
    raise SystemExit(repr(error))


def read(cursor, most):
    """Reads so many messages, or up to the last one; the number to continue with."""
    client = JetstreamClient({"cursor": cursor}, base_uri=base_uri)
    # What it saw last comes again after a new connection.
    client._cursor = cursor if seen["connections"] else None
    seen["connections"] += 1
    received = 0

    def on_message(message):
        nonlocal received
        kind = message.py_type.split("#")[1]
        if kind == "info":
            return
        received += 1
        seen["numbers"] += 1
        if kind == "identity":
            seen["identities"] += 1
        elif kind == "account":
            seen["accounts"] += 1
        elif message.collection == "app.bsky.feed.post" and message.operation == "create":
            assert message.record.py_type == "app.bsky.feed.post" and message.cid and message.rev
            seen["posts"] += 1
        elif message.collection == "app.bsky.feed.post" and message.operation == "delete":
            seen["deleted"] += 1
        else:
            seen["others"] += 1
        if received == most or message.seq >= last:
            client.stop()

    client.start(on_message, fail)
    return client.cursor


cursor = start
while cursor < last:
    cursor = read(cursor, 700)
print(json.dumps({**seen, "cursor": cursor}))
