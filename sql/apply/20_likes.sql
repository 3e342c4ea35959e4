-- app.bsky.feed.like. subject: the liked record's URI; subject_cid: its CID; body: `via`, where the like came from.
-- like_count counts distinct likers: a repository can hold two likes of one post.
-- Notifications: like, like-via-repost.

-- A delta is returned for the subject even when nothing changed, of zero then: a counter row exists as soon as
-- anything refers to the post, in whatever order the events came.
CREATE OR REPLACE FUNCTION standpipe.put_like(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    removed standpipe.delta[] := '{}';
    replaces boolean := false;
    counted integer;
    ignored text;
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
    END IF;
    -- At most twice: an older row is removed, and the second attempt finds nothing in the way.
    LOOP
        -- Before the insert, so that only others are seen: was there a like of it by this account already?
        PERFORM FROM likes x WHERE x.post_uri = o.subject AND x.user_did = o.repo;
        counted := CASE WHEN FOUND THEN 0 ELSE 1 END;
        INSERT INTO likes (uri, user_did, post_uri, subject_cid, via, created_at,
                         commit_rev, commit_seq, stream_ms, stream_seq)
        VALUES (o.uri, o.repo, o.subject, o.subject_cid, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq)
        ON CONFLICT (uri) DO NOTHING;
        EXIT WHEN FOUND;
        PERFORM FROM likes r WHERE r.uri = o.uri AND standpipe.newer(
            o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF NOT FOUND THEN
            RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
        END IF;
        removed := standpipe.remove_like(o.uri);
        replaces := true;
    END LOOP;
    ignored := standpipe.notify_pointer(o, 'like', replaces);
    RETURN ROW(true, removed || ROW(o.subject, counted, 0, 0, 0, 0)::standpipe.delta);
END $$;

-- Fast path: one record about a post, without `via`. Returns false and writes nothing if a row or tombstone already exists.
CREATE OR REPLACE FUNCTION standpipe.new_like(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    another boolean;
    ignored text;
BEGIN
    INSERT INTO likes (uri, user_did, post_uri, subject_cid, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT o.uri, o.repo, o.subject, o.subject_cid, o.created_at, o.rev, o.seq, o.ms, o.sq
    WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri IN (o.uri, o.repo))
    ON CONFLICT (uri) DO NOTHING
    -- The statement sees the table as it was before: was there a like of it by this account already?
    RETURNING EXISTS (SELECT FROM likes x WHERE x.post_uri = o.subject AND x.user_did = o.repo) INTO another;
    IF another IS NULL THEN
        RETURN false;
    END IF;
    ignored := standpipe.notify_one(o, split_part(o.subject, '/', 3), 'like', o.subject);
    ignored := standpipe.count_one(ROW(o.subject, (NOT another)::integer, 0, 0, 0, 0));
    RETURN true;
END $$;

-- Several at a time, none of them with `via`, no two of the same record, no two of one account and subject: records without a
-- row or tombstone are written at once, the others one by one.
CREATE OR REPLACE FUNCTION standpipe.put_likes(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    one standpipe.op;
    e standpipe.effect;
    all_of standpipe.effects;
    written text[];
    fresh standpipe.op[] := ops;
    ignored text;
BEGIN
    WITH w AS (
        INSERT INTO likes AS r (uri, user_did, post_uri, subject_cid, via, created_at,
                           commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.repo, o.subject, o.subject_cid, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri = o.uri)
          AND NOT EXISTS (SELECT FROM likes r WHERE r.uri = o.uri)
        -- The statement sees the table as it was before: was there a like of it by this account already?
        RETURNING r.uri, r.post_uri,
            EXISTS (SELECT FROM likes x WHERE x.post_uri = r.post_uri AND x.user_did = r.user_did) AS another
    )
    SELECT array_agg(w.uri), array_agg(ROW(w.post_uri, (NOT w.another)::integer, 0, 0, 0, 0)::standpipe.delta)
    INTO written, all_of.deltas FROM w;
    IF cardinality(written) = cardinality(ops) THEN
        all_of.applied := array_fill(true, ARRAY[cardinality(ops)]);
    ELSE
        fresh := '{}';
        FOREACH one IN ARRAY ops LOOP
            IF one.uri = ANY (written) THEN
                fresh := fresh || one;
                all_of.applied := all_of.applied || true;
            ELSE
                e := standpipe.put_like(one);
                all_of.applied := all_of.applied || e.applied;
                all_of.deltas := all_of.deltas || e.deltas;
            END IF;
        END LOOP;
    END IF;
    ignored := standpipe.notify_new(fresh, 'like');
    RETURN all_of;
END $$;

-- Deletes the row if it is older than its delete.
CREATE OR REPLACE FUNCTION standpipe.delete_like(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    endings text[];
    ignored text;
BEGIN
    PERFORM standpipe.put_tombstone(o);
    SELECT CASE WHEN r.via IS NULL THEN ARRAY[''] ELSE ARRAY['', '/via-repost'] END INTO endings
    FROM likes r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN ROW(false, ARRAY[]::standpipe.delta[]);
    END IF;
    ignored := standpipe.unnotify(o.uri, endings);
    RETURN ROW(true, standpipe.remove_like(o.uri));
END $$;

-- Several at a time, no two of the same record.
CREATE OR REPLACE FUNCTION standpipe.delete_likes(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    all_of standpipe.effects;
    gone text[];
    subjects text[];
    accounts text[];
    notifications text[];
    ignored text;
BEGIN
    ignored := standpipe.put_tombstones(ops);
    WITH d AS (
        DELETE FROM likes r USING unnest(ops) o
        WHERE r.uri = o.uri AND standpipe.newer(
            o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
        RETURNING r.uri, r.post_uri, r.user_did, r.via
    )
    SELECT array_agg(d.uri), array_agg(d.post_uri), array_agg(d.user_did),
           array_agg(d.uri || '#notification')
               || array_agg(d.uri || '#notification/via-repost') FILTER (WHERE d.via IS NOT NULL)
    INTO gone, subjects, accounts, notifications FROM d;
    IF gone IS NULL THEN
        all_of.applied := array_fill(false, ARRAY[cardinality(ops)]);
        RETURN all_of;
    END IF;
    all_of.applied := ARRAY(SELECT o.uri = ANY (gone) FROM unnest(ops) WITH ORDINALITY o ORDER BY o.ordinality);
    -- Counts out who has no other like of the same record left.
    all_of.deltas := ARRAY(
        SELECT ROW(p.post, -1, 0, 0, 0, 0)::standpipe.delta
        FROM (SELECT DISTINCT * FROM unnest(subjects, accounts)) AS p (post, account)
        WHERE NOT EXISTS (SELECT FROM likes x WHERE x.post_uri = p.post AND x.user_did = p.account));
    ignored := standpipe.unnotify_keys(notifications);
    RETURN all_of;
END $$;

-- Removes a row and counts its account out if no other like of the same record by it is left.
CREATE OR REPLACE FUNCTION standpipe.remove_like(gone text) RETURNS standpipe.delta[] LANGUAGE plpgsql AS $$
DECLARE
    post text;
    account text;
BEGIN
    DELETE FROM likes r WHERE r.uri = gone RETURNING r.post_uri, r.user_did INTO post, account;
    PERFORM FROM likes x WHERE x.post_uri = post AND x.user_did = account;
    RETURN CASE WHEN FOUND THEN ARRAY[]::standpipe.delta[] ELSE ARRAY[ROW(post, -1, 0, 0, 0, 0)::standpipe.delta] END;
END $$;
