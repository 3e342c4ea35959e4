-- app.bsky.graph.follow. subject: the DID of the followed account, which is notified. Nothing is counted from it, so a
-- write is one statement.

CREATE OR REPLACE FUNCTION standpipe.put_follow(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN false;
    END IF;
    INSERT INTO follows AS r (uri, follower_did, following_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (o.uri, o.repo, o.subject, o.created_at, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (uri) DO UPDATE SET
        following_did = excluded.following_did, created_at = excluded.created_at,
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    ignored := standpipe.notify(o, '', o.subject, 'follow', NULL, true);
    RETURN true;
END $$;

-- Fast path: one record. Returns false and writes nothing if a row or tombstone already exists.
CREATE OR REPLACE FUNCTION standpipe.new_follow(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    INSERT INTO follows (uri, follower_did, following_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT o.uri, o.repo, o.subject, o.created_at, o.rev, o.seq, o.ms, o.sq
    WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri IN (o.uri, o.repo))
      AND NOT EXISTS (SELECT FROM standpipe.swept s WHERE s.did = o.repo AND s.rev > o.rev COLLATE "C")
    ON CONFLICT (uri) DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    ignored := standpipe.notify_one(o, o.subject, 'follow', NULL);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_follow(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    DELETE FROM follows r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM standpipe.unnotify(o.uri, ARRAY['']);
    RETURN true;
END $$;

