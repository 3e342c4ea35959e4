-- app.bsky.bookmark. subject: the bookmarked post's URI. bookmark_count counts distinct users.

-- Inserts what is not there and not dead; what is there and older is removed first and inserted anew.
-- A delta is made for every subject, of zero where nothing changed: a counter row exists as soon as anything
-- refers to the post, in whatever order the events came.
CREATE OR REPLACE FUNCTION standpipe.put_bookmarks(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    newer standpipe.op[];
    more integer;
BEGIN
    WITH added AS (
        INSERT INTO bookmarks AS r (uri, user_did, post_uri, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.repo, o.subject, o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT standpipe.is_dead(o)
        ON CONFLICT (uri) DO NOTHING
        RETURNING r.uri
    ), subjects AS (
        SELECT o.subject, o.repo, count(a.uri)::integer AS added
        FROM unnest(ops) o LEFT JOIN added a ON a.uri = o.uri
        GROUP BY o.subject, o.repo
    )
    -- The subquery sees the rows as they were before this statement: was there a bookmark by the same account?
    SELECT coalesce(sum(s.added), 0), deltas || array_agg(ROW(s.subject, 0, 0, 0, 0, CASE WHEN s.added > 0 AND NOT EXISTS (SELECT FROM bookmarks x WHERE x.post_uri = s.subject AND x.user_did = s.repo) THEN 1 ELSE 0 END)::standpipe.delta)
    INTO applied, deltas
    FROM subjects s;

    IF applied < cardinality(ops) THEN
        SELECT array_agg(o) INTO newer
        FROM unnest(ops) o JOIN bookmarks r ON r.uri = o.uri
        WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF newer IS NOT NULL THEN
            deltas := standpipe.remove_bookmarks((SELECT array_agg(o.uri) FROM unnest(newer) o), deltas);
            SELECT p.deltas, p.applied INTO deltas, more FROM standpipe.put_bookmarks(newer, deltas) p;
            applied := applied + more;
        END IF;
    END IF;
END $$;

-- Deletes the rows that are older than their delete.
CREATE OR REPLACE FUNCTION standpipe.delete_bookmarks(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    uris text[];
BEGIN
    SELECT array_agg(r.uri) INTO uris
    FROM unnest(ops) o JOIN bookmarks r ON r.uri = o.uri
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    applied := coalesce(cardinality(uris), 0);
    IF applied > 0 THEN
        deltas := standpipe.remove_bookmarks(uris, deltas);
    END IF;
END $$;

-- Removes rows and counts an account out where no other bookmark of the same post by it is left.
CREATE OR REPLACE FUNCTION standpipe.remove_bookmarks(uris text[], INOUT deltas standpipe.delta[])
LANGUAGE plpgsql AS $$
DECLARE
    posts text[];
    users text[];
BEGIN
    WITH gone AS (
        DELETE FROM bookmarks WHERE uri = ANY (uris) RETURNING post_uri, user_did
    )
    SELECT array_agg(g.post_uri), array_agg(g.user_did) INTO posts, users
    FROM (SELECT DISTINCT post_uri, user_did FROM gone) g;
    -- A statement of its own, so that it sees what is left.
    deltas := deltas || (
        SELECT array_agg(ROW(g.post_uri, 0, 0, 0, 0, -1)::standpipe.delta)
        FROM unnest(posts, users) AS g (post_uri, user_did)
        WHERE NOT EXISTS (SELECT FROM bookmarks x WHERE x.post_uri = g.post_uri AND x.user_did = g.user_did));
END $$;
