-- app.bsky.feed.repost. subject: the reposted post's URI; subject_cid: its CID; body: `via`.
-- repost_count counts distinct reposters; every live repost has a feed item.
-- Notifications: repost, repost-via-repost.

-- A delta is returned for the subject even when nothing changed, of zero then: a counter row exists as soon as
-- anything refers to the post, in whatever order the events came.
CREATE OR REPLACE FUNCTION standpipe.put_repost(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
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
        -- Before the insert, so that only others are seen: was there a repost of it by this account already?
        PERFORM FROM reposts x WHERE x.post_uri = o.subject AND x.user_did = o.repo;
        counted := CASE WHEN FOUND THEN 0 ELSE 1 END;
        INSERT INTO reposts (uri, user_did, post_uri, subject_cid, via, created_at,
                         commit_rev, commit_seq, stream_ms, stream_seq)
        VALUES (o.uri, o.repo, o.subject, o.subject_cid, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq)
        ON CONFLICT (uri) DO NOTHING;
        EXIT WHEN FOUND;
        PERFORM FROM reposts r WHERE r.uri = o.uri AND standpipe.newer(
            o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF NOT FOUND THEN
            RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
        END IF;
        removed := standpipe.remove_repost(o.uri);
        replaces := true;
    END LOOP;
    INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    VALUES (o.uri, o.subject, o.repo, 'repost', o.sort_at, o.cid, o.created_at)
    ON CONFLICT (uri) DO UPDATE SET
        post_uri = excluded.post_uri, originator_did = excluded.originator_did, type = excluded.type,
        sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at;
    ignored := standpipe.notify_pointer(o, 'repost', replaces);
    RETURN ROW(true, removed || ROW(o.subject, 0, counted, 0, 0, 0)::standpipe.delta);
END $$;

-- Deletes the row if it is older than its delete.
CREATE OR REPLACE FUNCTION standpipe.delete_repost(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    endings text[];
    ignored text;
BEGIN
    PERFORM standpipe.put_tombstone(o);
    SELECT CASE WHEN r.via IS NULL THEN ARRAY[''] ELSE ARRAY['', '/via-repost'] END INTO endings
    FROM reposts r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN ROW(false, ARRAY[]::standpipe.delta[]);
    END IF;
    ignored := standpipe.unnotify(o.uri, endings);
    RETURN ROW(true, standpipe.remove_repost(o.uri));
END $$;

-- Removes a row and counts its account out if no other repost of the same record by it is left.
CREATE OR REPLACE FUNCTION standpipe.remove_repost(gone text) RETURNS standpipe.delta[] LANGUAGE plpgsql AS $$
DECLARE
    post text;
    account text;
BEGIN
    DELETE FROM reposts r WHERE r.uri = gone RETURNING r.post_uri, r.user_did INTO post, account;
    DELETE FROM feed_items f WHERE f.uri = gone;
    PERFORM FROM reposts x WHERE x.post_uri = post AND x.user_did = account;
    RETURN CASE WHEN FOUND THEN ARRAY[]::standpipe.delta[] ELSE ARRAY[ROW(post, 0, -1, 0, 0, 0)::standpipe.delta] END;
END $$;
