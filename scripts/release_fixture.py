#!/usr/bin/env python3
"""What scripts/make-release-fixture.sh needs beside a shell: it appends the entries of one phase to the stream, and
writes down what Redis holds.

    release_fixture.py append PORT PHASE FIRST_SEQ APPEND_LUA
    release_fixture.py commands APPEND_ONLY_FILE

`append` does what the reader does: it takes the reader's lease and runs the reader's own script. PHASE is one of
`applied`, `later`, `deletion`, `pending` and `waiting`; FIRST_SEQ is the relay position before the first of them.
`commands` prints the commands of a rewritten append-only file, one a line, each a JSON list of words.
"""

import base64
import datetime
import hashlib
import json
import socket
import sys

STREAM, CURSOR = "firehose:events", "firehose:cursor"
# 2026-01-01T01:00:00Z: after the simulated relay's events, which have the lower numbers.
START_SECONDS = 1_767_229_200


def did(name):
    return f"did:plc:{name}"


def uri(name, collection, rkey):
    return f"at://{did(name)}/{collection}/{rkey}"


def post(name, rkey):
    return uri(name, "app.bsky.feed.post", rkey)


def cid(value):
    """A CID as records have it: of the right form, made from what it stands for."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return "b" + base64.b32encode(b"\x01\x71\x12\x20" + digest).decode().lower().rstrip("=")


def ref(at):
    return {"uri": at, "cid": cid(at)}


def tid(micros):
    number, text = micros << 10, ""
    for _ in range(13):
        number, text = number >> 5, "234567abcdefghijklmnopqrstuvwxyz"[number & 31] + text
    return text


def put(collection, rkey, record, action="create"):
    record = {"$type": collection, **record}
    return {"action": action, "path": f"{collection}/{rkey}", "cid": cid(record), "record": record}


def delete(collection, rkey):
    return {"action": "delete", "path": f"{collection}/{rkey}"}


class Feed:
    """The entries of all phases. Each event has the next number and is a second younger than the one before."""

    def __init__(self, first_seq):
        self.seq, self.seconds, self.phases, self.entries = first_seq, START_SECONDS, {}, None

    def phase(self, name):
        self.entries = self.phases.setdefault(name, [])

    def version(self):
        self.seq, self.seconds = self.seq + 1, self.seconds + 1
        return self.seq, self.seconds

    def add(self, event_type, data, seq):
        self.entries.append((event_type, data if isinstance(data, str) else json.dumps(data), seq))

    def commit(self, name, *ops, at=None, rev=True):
        """`at`: a version that was given before, for what comes again or late."""
        seq, seconds = at or self.version()
        data = {"repo": did(name), "ops": list(ops)}
        for op in ops:
            if "record" in op:
                op["record"].setdefault("createdAt", when(seconds))
        # What the Python reader wrote has no revision.
        if rev:
            data |= {"rev": tid(seconds * 1_000_000), "time": when(seconds), "commit": cid([name, seq])}
        self.add("commit", data, seq)
        return seq, seconds

    def identity(self, name, handle):
        seq, seconds = self.version()
        self.add("identity", {"did": did(name), "handle": handle, "time": when(seconds)}, seq)

    def account(self, name, status=None):
        seq, seconds = self.version()
        said = {"status": status} if status else {}
        self.add("account", {"did": did(name), "active": not status, **said, "time": when(seconds)}, seq)


def when(seconds):
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


# Records

POST, LIKE, REPOST, BOOKMARK = "app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.feed.repost", "app.bsky.bookmark"
FOLLOW, BLOCK, PROFILE = "app.bsky.graph.follow", "app.bsky.graph.block", "app.bsky.actor.profile"
LIST, ITEM, LIST_BLOCK = "app.bsky.graph.list", "app.bsky.graph.listitem", "app.bsky.graph.listblock"
PACK, GENERATOR, LABELER = "app.bsky.graph.starterpack", "app.bsky.feed.generator", "app.bsky.labeler.service"
LABEL, VERIFICATION = "com.atproto.label.label", "app.bsky.graph.verification"
THREAD_GATE, POST_GATE, THING = "app.bsky.feed.threadgate", "app.bsky.feed.postgate", "com.example.thing"


def text(words, **more):
    return {"text": words, "langs": ["en"], **more}


def reply(words, parent, root=None, **more):
    return text(words, reply={"root": ref(root or parent), "parent": ref(parent)}, **more)


def quote(words, target, **more):
    return text(words, embed={"$type": "app.bsky.embed.record", "record": ref(target)}, **more)


def mention(name):
    return [{
        "index": {"byteStart": 0, "byteEnd": 4},
        "features": [{"$type": "app.bsky.richtext.facet#mention", "did": did(name)}],
    }]


def profile(name, **more):
    return {"displayName": name, "description": f"the profile of {name}", **more}


def self_labels(*values):
    return {"$type": "com.atproto.label.defs#selfLabels", "values": [{"val": value} for value in values]}


def picture(name):
    return {"$type": "blob", "ref": {"$link": cid(name)}, "mimeType": "image/jpeg", "size": 1234}


def everything(feed, name, friend, target):
    """One record of every kind that has a table, with the key `mine`."""
    mine = post(name, "mine")
    feed.commit(name, put(PROFILE, "self", profile(name, avatar=picture(name), labels=self_labels("bot"))))
    feed.commit(name, put(POST, "mine", text("mine", tags=["one", "two"], labels=self_labels("nudity"))))
    feed.commit(name, put(POST, "reply", reply("a reply", target)), put(POST, "quote", quote("a quote", target)))
    feed.commit(name, put(LIKE, "mine", {"subject": ref(target), "via": ref(uri(friend, REPOST, "mine"))}))
    feed.commit(name, put(REPOST, "mine", {"subject": ref(target)}), put(BOOKMARK, "mine", {"subject": ref(target)}))
    feed.commit(name, put(FOLLOW, "mine", {"subject": did(friend)}), put(BLOCK, "mine", {"subject": did("mallory")}))
    feed.commit(
        name,
        put(LIST, "mine", {"name": "friends", "purpose": "app.bsky.graph.defs#curatelist", "avatar": picture("list")}),
        put(ITEM, "mine", {"list": uri(name, LIST, "mine"), "subject": did(friend)}),
        put(LIST_BLOCK, "mine", {"subject": uri(name, LIST, "mine")}),
    )
    generator = uri(name, GENERATOR, "mine")
    feed.commit(
        name,
        put(PACK, "mine", {"name": "start", "list": uri(name, LIST, "mine"), "feeds": [{"uri": generator}]}),
        put(GENERATOR, "mine", {"did": "did:web:feed.example", "displayName": "the feed"}),
        put(LABELER, "self", {"policies": {"labelValues": ["spam"]}}),
        put(LIKE, "generator", {"subject": ref(generator)}),
        put(LIKE, "labeler", {"subject": ref(uri(name, LABELER, "self"))}),
    )
    feed.commit(
        name,
        put(LABEL, "mine", {"uri": did("mallory"), "val": "spam", "cts": when(feed.seconds)}),
        put(VERIFICATION, "mine", {"subject": did(friend), "handle": f"{friend}.test", "displayName": friend}),
        put(THING, "mine", {"colour": "green", "shape": {"corners": 3}}),
    )
    feed.commit(
        name,
        put(THREAD_GATE, "mine", {"post": mine, "allow": [], "hiddenReplies": []}),
        put(POST_GATE, "mine", {"post": mine, "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}]}),
    )


def phases(first_seq):
    feed = Feed(first_seq)

    # What the previous release has applied.
    feed.phase("applied")
    for name in ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi"]:
        feed.identity(name, f"{name}.test")
        feed.account(name)
    # Two accounts claim one handle: the second has it.
    feed.identity("grace", "wanted.test")
    feed.identity("dave", "wanted.test")
    first, gated = post("alice", "first"), post("alice", "gated")
    old_profile = feed.commit("alice", put(PROFILE, "self", profile("the older alice")))
    feed.commit("alice", put(PROFILE, "self", profile("alice", pinnedPost=ref(first)), "update"))
    feed.commit("carol", put(PROFILE, "self", profile("carol", labels=self_labels("bot"))))
    feed.commit("alice", put(POST, "first", text("bob: the first", facets=mention("bob"))))
    older = feed.commit("alice", put(POST, "edited", text("before the edit")))
    feed.commit("alice", put(POST, "edited", text("after the edit"), "update"))
    feed.commit("carol", put(POST, "plain", text("without a revision")), rev=False)
    everything(feed, "bob", "alice", first)
    feed.commit("carol", put(POST, "quote", quote("look at this", first)))
    for name in ["carol", "dave", "erin", "frank", "heidi"]:
        feed.commit(name, put(LIKE, "first", {"subject": ref(first)}))
        feed.commit(name, put(FOLLOW, "alice", {"subject": did("alice")}))
    # Replies and quotes that a gate forbids.
    feed.commit("alice", put(POST, "gated", text("bob: for some", facets=mention("bob"))))
    feed.commit(
        "alice",
        put(THREAD_GATE, "gated", {"post": gated, "allow": []}),
        put(POST_GATE, "gated", {"post": gated, "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}]}),
    )
    feed.commit("bob", put(POST, "gatecrash", reply("let me in", gated)))
    feed.commit("carol", put(POST, "gatequote", quote("look what it says", gated)))
    # Deleted, so that an older create that comes late has to stay dead.
    dead_like = feed.commit("grace", put(LIKE, "first", {"subject": ref(first)}))
    feed.commit("grace", delete(LIKE, "first"))
    feed.commit("grace", put(POST, "gone", reply("soon gone", first)))
    feed.commit("grace", delete(POST, "gone"))
    # Accounts that are deactivated, or will be deleted.
    feed.account("dave", "deactivated")
    erins_post = feed.commit("erin", put(POST, "mine", text("erin was here")))
    feed.commit("erin", put(PROFILE, "self", profile("erin")))
    feed.commit("frank", put(PROFILE, "self", profile("frank")))
    feed.commit("frank", put(POST, "mine", reply("frank was here", first)))
    for number in range(3):
        feed.commit("heidi", put(POST, f"p{number}", text(f"post {number} of heidi")))
    feed.commit("heidi", put(REPOST, "first", {"subject": ref(first)}))
    # What can never be applied.
    feed.add("commit", '{"repo": "did:plc:bob", "ops": [', feed.version()[0])
    feed.commit("bob", put(LIKE, "nothing", {"createdAt": when(START_SECONDS)}))
    feed.commit("bob", put(FOLLOW, "seven", {"subject": 7}), put(LIKE, "beside", {"subject": ref(first)}))
    feed.commit("bob", {**delete(POST, "mine"), "action": "forget"})
    feed.add("account", {"did": did("bob")}, feed.version()[0])
    # What the database's constraints refuse: the last one's is still there later.
    feed.commit("bob", put(POST, "refused", reply("REFUSED at first", first)))
    feed.commit("carol", put(POST, "refused", text("REFUSED and corrected later")))
    feed.commit("dave", put(POST, "refused", text("REFUSED and deleted later")))
    feed.commit("erin", put(POST, "refused", text("REFUSED, and the account is deleted later")))
    feed.commit("bob", put(LIST, "forbidden", {"name": "FORBIDDEN", "purpose": "app.bsky.graph.defs#modlist"}))

    # Applied after that.
    feed.phase("later")
    feed.commit("carol", put(POST, "refused", text("corrected"), "update"))
    feed.commit("dave", delete(POST, "refused"))
    feed.account("erin", "deleted")

    # Applied while the account's rows cannot be removed.
    feed.phase("deletion")
    feed.account("frank", "deleted")

    # Delivered and not acknowledged, five at a time. What follows the post of `busy` in a five had no turn.
    feed.phase("pending")
    feed.commit("bob", delete(FOLLOW, "mine"))
    feed.commit("carol", put(LIKE, "bobs", {"subject": ref(post("bob", "reply"))}))
    feed.commit("busy", put(POST, "one", text("one")))
    feed.commit("alice", put(POST, "first", text("bob: the first, edited", facets=mention("bob")), "update"))
    feed.commit("alice", put(POST, "edited", text("before the edit")), at=older)

    feed.commit("carol", delete(POST, "quote"))
    feed.account("dave")
    feed.commit("busy", put(POST, "two", text("two")))
    feed.commit("erin", put(POST, "mine", text("erin was here")), at=erins_post)
    feed.identity("grace", "grace.example.test")

    feed.commit("frank", put(POST, "back", text("frank is back")))
    feed.commit("grace", put(LIKE, "first", {"subject": ref(first)}), at=dead_like)
    feed.commit("busy", put(POST, "three", text("three")))
    feed.commit(
        "alice",
        put(THREAD_GATE, "gated", {
            "post": gated, "allow": [{"$type": "app.bsky.feed.threadgate#mentionRule"}],
        }, "update"),
    )
    feed.commit("carol", put(PROFILE, "self", profile("carol, renamed"), "update"))

    # Delivered to nobody.
    feed.phase("waiting")
    everything(feed, "ivan", "bob", first)
    feed.identity("ivan", "ivan.test")
    feed.commit("dave", delete(LIKE, "first"))
    feed.commit("bob", put(POST, "reply", reply("a reply, edited", first), "update"))
    feed.commit("carol", put(POST, "plain", text("with a revision"), "update"))
    feed.commit("alice", put(PROFILE, "self", profile("the older alice")), at=old_profile)
    feed.commit("private", put(POST, "mine", text("not to be kept")))
    feed.commit("busy", delete(POST, "one"))
    feed.commit("ivan", put(LIKE, "nothing", {"subject": "no reference"}), put(LIKE, "beside", {"subject": ref(gated)}))
    feed.add("sync", {"did": did("alice"), "rev": tid(feed.seconds * 1_000_000)}, feed.version()[0])
    feed.account("heidi", "deleted")
    return feed.phases


# Redis


class Redis:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", int(port)))
        self.file = self.socket.makefile("rb")

    def __call__(self, *words):
        words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        parts = [b"*%d\r\n" % len(words)] + [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
        self.socket.sendall(b"".join(parts))
        return self.answer()

    def answer(self):
        line = self.file.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise SystemExit("Redis: " + rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        return rest.decode()


def append(port, phase, first_seq, script):
    redis = Redis(port)
    entries = phases(int(first_seq))[phase]
    cursor, relay = redis("GET", CURSOR), redis("GET", CURSOR + ":relay")
    lease = CURSOR + ":lease"
    if redis("SET", lease, "fixture", "NX", "PX", 10_000) is None:
        raise SystemExit("somebody reads the relay")
    keys = [STREAM, CURSOR, CURSOR + ":relay", CURSOR + ":acked", lease, CURSOR + ":start", CURSOR + ":watch",
            STREAM + ":trimmed"]
    position = max(seq for _, _, seq in entries)
    words = [word for entry in entries for word in entry]
    with open(script, encoding="utf-8") as file:
        redis("EVAL", file.read(), len(keys), *keys, cursor, position, relay, "fixture", 10_000, *words)
    redis("DEL", lease)
    print(len(entries))


def commands(path):
    with open(path, "rb") as file:
        while line := file.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int(file.readline()[1:])
                words.append(file.read(length + 2)[:-2].decode())
            yield words


def print_commands(path):
    found = list(commands(path))
    # Leases and the like: they have ended when anybody reads this.
    brief = {words[1] for words in found if words[0].startswith("PEXPIRE")}
    kept = [words for words in found if words[0] != "SELECT" and key_of(words) not in brief]
    # Redis writes the keys in any order, and the commands of a key in that in which they must be sent.
    for words in sorted(kept, key=key_of):
        print(json.dumps(words, ensure_ascii=False))


def key_of(words):
    return words[2] if words[0] == "XGROUP" else words[1]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["append", port, phase, first_seq, script]:
            append(port, phase, first_seq, script)
        case ["commands", path]:
            print_commands(path)
        case _:
            raise SystemExit(__doc__)
