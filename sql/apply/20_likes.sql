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
    -- Twice at the most: what is there and older is removed, and the second time round nothing is in the way.
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
