-- Likes and reposts, several at a time: like 20_pointers.sql, for sets.

-- Several at a time, none of them with `via`, no two of the same record, no two of one account and subject: records without a
-- row or tombstone are written in one statement, the others one by one.
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
        -- The statement sees the table as it was before: did this account already like this subject?
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
    -- Counts out accounts that have no other like of the same subject.
    all_of.deltas := ARRAY(
        SELECT ROW(p.post, -1, 0, 0, 0, 0)::standpipe.delta
        FROM (SELECT DISTINCT * FROM unnest(subjects, accounts)) AS p (post, account)
        WHERE NOT EXISTS (SELECT FROM likes x WHERE x.post_uri = p.post AND x.user_did = p.account));
    ignored := standpipe.unnotify_keys(notifications);
    RETURN all_of;
END $$;

-- Several at a time, none of them with `via`, no two of the same record, no two of one account and subject: records without a
-- row or tombstone are written in one statement, the others one by one.
CREATE OR REPLACE FUNCTION standpipe.put_reposts(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    one standpipe.op;
    e standpipe.effect;
    all_of standpipe.effects;
    written text[];
    fresh standpipe.op[] := ops;
    ignored text;
BEGIN
    WITH w AS (
        INSERT INTO reposts AS r (uri, user_did, post_uri, subject_cid, via, created_at,
                           commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.repo, o.subject, o.subject_cid, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri = o.uri)
          AND NOT EXISTS (SELECT FROM reposts r WHERE r.uri = o.uri)
        -- The statement sees the table as it was before: did this account already repost this subject?
        RETURNING r.uri, r.post_uri,
            EXISTS (SELECT FROM reposts x WHERE x.post_uri = r.post_uri AND x.user_did = r.user_did) AS another
    )
    SELECT array_agg(w.uri), array_agg(ROW(w.post_uri, 0, (NOT w.another)::integer, 0, 0, 0)::standpipe.delta)
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
                e := standpipe.put_repost(one);
                all_of.applied := all_of.applied || e.applied;
                all_of.deltas := all_of.deltas || e.deltas;
            END IF;
        END LOOP;
    END IF;
    INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    SELECT o.uri, o.subject, o.repo, 'repost', o.sort_at, o.cid, o.created_at FROM unnest(fresh) o;
    ignored := standpipe.notify_new(fresh, 'repost');
    RETURN all_of;
END $$;

-- Several at a time, no two of the same record.
CREATE OR REPLACE FUNCTION standpipe.delete_reposts(ops standpipe.op[]) RETURNS standpipe.effects LANGUAGE plpgsql AS $$
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
        DELETE FROM reposts r USING unnest(ops) o
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
    -- Counts out accounts that have no other repost of the same subject.
    all_of.deltas := ARRAY(
        SELECT ROW(p.post, 0, -1, 0, 0, 0)::standpipe.delta
        FROM (SELECT DISTINCT * FROM unnest(subjects, accounts)) AS p (post, account)
        WHERE NOT EXISTS (SELECT FROM reposts x WHERE x.post_uri = p.post AND x.user_did = p.account));
    DELETE FROM feed_items f WHERE f.uri = ANY (gone);
    ignored := standpipe.unnotify_keys(notifications);
    RETURN all_of;
END $$;
