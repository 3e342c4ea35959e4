-- app.bsky.feed.repost. subject: the reposted post's URI; subject_cid: its CID; body: `via`.
-- repost_count counts distinct reposters; every live repost has a feed item.

-- Inserts what is not there and not dead; what is there and older is removed first and inserted anew.
-- A delta is made for every subject, of zero where nothing changed: a counter row exists as soon as anything
-- refers to the post, in whatever order the events came.
CREATE OR REPLACE FUNCTION standpipe.put_reposts(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    newer standpipe.op[];
    more integer;
BEGIN
    WITH added AS (
        INSERT INTO reposts AS r (uri, user_did, post_uri, subject_cid, via, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.repo, o.subject, o.subject_cid, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT standpipe.is_dead(o)
        ON CONFLICT (uri) DO NOTHING
        RETURNING r.uri
    ), feed AS (
        INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
        SELECT o.uri, o.subject, o.repo, 'repost', o.sort_at, o.cid, o.created_at
        FROM unnest(ops) o JOIN added a ON a.uri = o.uri
        ON CONFLICT (uri) DO UPDATE SET
            post_uri = excluded.post_uri, sort_at = excluded.sort_at,
            cid = excluded.cid, created_at = excluded.created_at
    ), subjects AS (
        SELECT o.subject, o.repo, count(a.uri)::integer AS added
        FROM unnest(ops) o LEFT JOIN added a ON a.uri = o.uri
        GROUP BY o.subject, o.repo
    )
    -- The subquery sees the rows as they were before this statement: was there a repost by the same account?
    SELECT coalesce(sum(s.added), 0), deltas || array_agg(ROW(s.subject, 0, CASE WHEN s.added > 0 AND NOT EXISTS (SELECT FROM reposts x WHERE x.post_uri = s.subject AND x.user_did = s.repo) THEN 1 ELSE 0 END, 0, 0, 0)::standpipe.delta)
    INTO applied, deltas
    FROM subjects s;

    IF applied < cardinality(ops) THEN
        SELECT array_agg(o) INTO newer
        FROM unnest(ops) o JOIN reposts r ON r.uri = o.uri
        WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF newer IS NOT NULL THEN
            deltas := standpipe.remove_reposts((SELECT array_agg(o.uri) FROM unnest(newer) o), deltas);
            SELECT p.deltas, p.applied INTO deltas, more FROM standpipe.put_reposts(newer, deltas) p;
            applied := applied + more;
        END IF;
    END IF;
END $$;

-- Deletes the rows that are older than their delete.
CREATE OR REPLACE FUNCTION standpipe.delete_reposts(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    uris text[];
BEGIN
    SELECT array_agg(r.uri) INTO uris
    FROM unnest(ops) o JOIN reposts r ON r.uri = o.uri
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    applied := coalesce(cardinality(uris), 0);
    IF applied > 0 THEN
        deltas := standpipe.remove_reposts(uris, deltas);
    END IF;
END $$;

-- Removes rows and counts an account out where no other repost of the same post by it is left.
CREATE OR REPLACE FUNCTION standpipe.remove_reposts(uris text[], INOUT deltas standpipe.delta[])
LANGUAGE plpgsql AS $$
DECLARE
    posts text[];
    users text[];
BEGIN
    WITH gone AS (
        DELETE FROM reposts WHERE uri = ANY (uris) RETURNING post_uri, user_did
    )
    SELECT array_agg(g.post_uri), array_agg(g.user_did) INTO posts, users
    FROM (SELECT DISTINCT post_uri, user_did FROM gone) g;
    DELETE FROM feed_items WHERE uri = ANY (uris);
    -- A statement of its own, so that it sees what is left.
    deltas := deltas || (
        SELECT array_agg(ROW(g.post_uri, 0, -1, 0, 0, 0)::standpipe.delta)
        FROM unnest(posts, users) AS g (post_uri, user_did)
        WHERE NOT EXISTS (SELECT FROM reposts x WHERE x.post_uri = g.post_uri AND x.user_did = g.user_did));
END $$;
