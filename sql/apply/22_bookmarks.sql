-- app.bsky.bookmark. subject: the bookmarked post's URI. bookmark_count counts distinct users.

-- A delta is returned for the subject even when nothing changed, of zero then: a counter row exists as soon as
-- anything refers to the post, in whatever order the events came.
CREATE OR REPLACE FUNCTION standpipe.put_bookmark(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    removed standpipe.delta[] := '{}';
    counted integer;
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
    END IF;
    -- At most twice: an older row is removed, and the second attempt finds nothing in the way.
    LOOP
        -- Before the insert, so that only others are seen: was there a bookmark of it by this account already?
        PERFORM FROM bookmarks x WHERE x.post_uri = o.subject AND x.user_did = o.repo;
        counted := CASE WHEN FOUND THEN 0 ELSE 1 END;
        INSERT INTO bookmarks (uri, user_did, post_uri, created_at,
                         commit_rev, commit_seq, stream_ms, stream_seq)
        VALUES (o.uri, o.repo, o.subject, o.created_at, o.rev, o.seq, o.ms, o.sq)
        ON CONFLICT (uri) DO NOTHING;
        EXIT WHEN FOUND;
        PERFORM FROM bookmarks r WHERE r.uri = o.uri AND standpipe.newer(
            o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF NOT FOUND THEN
            RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
        END IF;
        removed := standpipe.remove_bookmark(o.uri);
    END LOOP;
    RETURN ROW(true, removed || ROW(o.subject, 0, 0, 0, 0, counted)::standpipe.delta);
END $$;

-- Deletes the row if it is older than its delete.
CREATE OR REPLACE FUNCTION standpipe.delete_bookmark(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    PERFORM FROM bookmarks r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN ROW(false, ARRAY[]::standpipe.delta[]);
    END IF;
    RETURN ROW(true, standpipe.remove_bookmark(o.uri));
END $$;

-- Removes a row and counts its account out if no other bookmark of the same record by it is left.
CREATE OR REPLACE FUNCTION standpipe.remove_bookmark(gone text) RETURNS standpipe.delta[] LANGUAGE plpgsql AS $$
DECLARE
    post text;
    account text;
BEGIN
    DELETE FROM bookmarks r WHERE r.uri = gone RETURNING r.post_uri, r.user_did INTO post, account;
    PERFORM FROM bookmarks x WHERE x.post_uri = post AND x.user_did = account;
    RETURN CASE WHEN FOUND THEN ARRAY[]::standpipe.delta[] ELSE ARRAY[ROW(post, 0, 0, 0, 0, -1)::standpipe.delta] END;
END $$;
