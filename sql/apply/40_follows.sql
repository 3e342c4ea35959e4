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
    ON CONFLICT (uri) DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    ignored := standpipe.notify_one(o, o.subject, 'follow', NULL);
    RETURN true;
END $$;

-- Several at a time, no two of the same record: records without a row or tombstone are written at once, the others one by one.
CREATE OR REPLACE FUNCTION standpipe.put_follows(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    one standpipe.op;
    all_of standpipe.effects;
    written text[];
    fresh standpipe.op[] := ops;
    ignored text;
BEGIN
    WITH w AS (
        INSERT INTO follows AS r (uri, follower_did, following_did, created_at,
                                  commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.repo, o.subject, o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri = o.uri)
          AND NOT EXISTS (SELECT FROM follows r WHERE r.uri = o.uri)
        RETURNING r.uri
    )
    SELECT array_agg(w.uri) INTO written FROM w;
    IF cardinality(written) = cardinality(ops) THEN
        all_of.applied := array_fill(true, ARRAY[cardinality(ops)]);
    ELSE
        fresh := '{}';
        FOREACH one IN ARRAY ops LOOP
            IF one.uri = ANY (written) THEN
                fresh := fresh || one;
                all_of.applied := all_of.applied || true;
            ELSE
                all_of.applied := all_of.applied || standpipe.put_follow(one);
            END IF;
        END LOOP;
    END IF;
    ignored := standpipe.notify_new(fresh, 'follow');
    RETURN all_of;
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

-- Several at a time, no two of the same record.
CREATE OR REPLACE FUNCTION standpipe.delete_follows(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    all_of standpipe.effects;
    gone text[];
    ignored text;
BEGIN
    ignored := standpipe.put_tombstones(ops);
    WITH d AS (
        DELETE FROM follows r USING unnest(ops) o
        WHERE r.uri = o.uri AND standpipe.newer(
            o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
        RETURNING r.uri
    )
    SELECT array_agg(d.uri) INTO gone FROM d;
    all_of.applied := ARRAY(
        SELECT coalesce(o.uri = ANY (gone), false) FROM unnest(ops) WITH ORDINALITY o ORDER BY o.ordinality);
    IF gone IS NOT NULL THEN
        ignored := standpipe.unnotify_keys(ARRAY(SELECT g || '#notification' FROM unnest(gone) g));
    END IF;
    RETURN all_of;
END $$;
