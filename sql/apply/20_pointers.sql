-- Records that point at another one and are counted there: likes, reposts and bookmarks. For each:
--
--   subject        the URI of what it points at; subject_cid: its CID, except for a bookmark
--   body           `via`, the repost through which a like or repost came about
--
-- The counter counts distinct accounts: a repository can hold two likes of one post. A like and a repost notify (like,
-- like-via-repost, and so on), and every live repost has a feed item.
--
-- One template, instantiated for each table: each has its own functions, so that their statements are planned once.
-- Subject and account are compared and sorted as a row: then the index of both is taken, whatever the planner believes of
-- a young table, and never the one of all that an account has.
--
--   put_<kind>     applies a record, whatever rows exist
--   new_<kind>     fast path of event mode: one record about a post, without `via`, that is probably new
--   delete_<kind>  deletes the row if it is older than its delete
--   remove_<kind>  removes a row, whatever its age
--
-- These are put_like, new_like, delete_like, remove_like; put_repost, new_repost, delete_repost, remove_repost; put_bookmark,
-- delete_bookmark, remove_bookmark.
DO $do$
DECLARE
    p record;
BEGIN
    FOR p IN SELECT * FROM (VALUES
        ('like', 'likes', ', subject_cid, via', ', o.subject_cid, o.body', '', ', 0, 0, 0, 0', false),
        ('repost', 'reposts', ', subject_cid, via', ', o.subject_cid, o.body', '0, ', ', 0, 0, 0', true),
        ('bookmark', 'bookmarks', '', '', '0, 0, 0, 0, ', '', false)
    ) AS v (kind, relation, columns, fields, before, after, has_feed_item) LOOP
        -- Returns a delta for the subject even if nothing changed, which is zero then: a counter row exists as soon as
        -- anything refers to the post, in whatever order the events arrive.
        EXECUTE format($sql$
            CREATE OR REPLACE FUNCTION standpipe.put_%1$s(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
            DECLARE
                removed standpipe.delta[] := '{}';
                replaces boolean := false;
                counted integer;
                ignored text;
            BEGIN
                IF standpipe.is_dead(o) THEN
                    RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
                END IF;
                -- At most twice: an older row is removed, and the second attempt finds no conflict.
                LOOP
                    -- Before the insert, so that it sees only others: does this account already have one for this
                    -- subject?
                    PERFORM FROM %2$I x
                    WHERE (%10$s) >= (%11$s) AND (%10$s) <= (%11$s) ORDER BY %10$s LIMIT 1;
                    counted := CASE WHEN FOUND THEN 0 ELSE 1 END;
                    INSERT INTO %2$I (uri, user_did, post_uri%3$s, created_at,
                                      commit_rev, commit_seq, stream_ms, stream_seq)
                    VALUES (o.uri, o.repo, o.subject%4$s, o.created_at, o.rev, o.seq, o.ms, o.sq)
                    ON CONFLICT (uri) DO NOTHING;
                    EXIT WHEN FOUND;
                    PERFORM FROM %2$I r WHERE r.uri = o.uri AND standpipe.newer(
                        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
                    IF NOT FOUND THEN
                        RETURN ROW(false, ARRAY[ROW(o.subject, 0, 0, 0, 0, 0)::standpipe.delta]);
                    END IF;
                    removed := standpipe.remove_%1$s(o.uri);
                    replaces := true;
                END LOOP;
                %7$s
                RETURN ROW(true, removed || ROW(o.subject, %5$scounted%6$s)::standpipe.delta);
            END $$;

            CREATE OR REPLACE FUNCTION standpipe.delete_%1$s(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
            DECLARE
                endings text[];
                ignored text;
            BEGIN
                PERFORM standpipe.put_tombstone(o);
                SELECT %9$s INTO endings
                FROM %2$I r WHERE r.uri = o.uri AND standpipe.newer(
                    o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
                IF NOT FOUND THEN
                    RETURN ROW(false, ARRAY[]::standpipe.delta[]);
                END IF;
                ignored := standpipe.unnotify(o.uri, endings);
                RETURN ROW(true, standpipe.remove_%1$s(o.uri));
            END $$;

            CREATE OR REPLACE FUNCTION standpipe.remove_%1$s(gone text) RETURNS standpipe.delta[] LANGUAGE plpgsql AS $$
            DECLARE
                post text;
                account text;
            BEGIN
                DELETE FROM %2$I r WHERE r.uri = gone RETURNING r.post_uri, r.user_did INTO post, account;
                %8$s
                -- Counts its account out if it has no other one for the same subject.
                PERFORM FROM %2$I x
                WHERE (%10$s) >= (%12$s) AND (%10$s) <= (%12$s) ORDER BY %10$s LIMIT 1;
                RETURN CASE WHEN FOUND THEN ARRAY[]::standpipe.delta[]
                            ELSE ARRAY[ROW(post, %5$s-1%6$s)::standpipe.delta] END;
            END $$;
            $sql$,
            p.kind, p.relation, p.columns, p.fields, p.before, p.after,
            CASE WHEN p.has_feed_item THEN $put$
                INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
                VALUES (o.uri, o.subject, o.repo, 'repost', o.sort_at, o.cid, o.created_at)
                ON CONFLICT (uri) DO UPDATE SET
                    post_uri = excluded.post_uri, originator_did = excluded.originator_did, type = excluded.type,
                    sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at;
                $put$ ELSE '' END
            || CASE WHEN p.kind <> 'bookmark' THEN
                format('ignored := standpipe.notify_pointer(o, %L, replaces);', p.kind) ELSE '' END,
            CASE WHEN p.has_feed_item THEN 'DELETE FROM feed_items f WHERE f.uri = gone;' ELSE '' END,
            -- The endings of the notifications that the row may have caused.
            CASE WHEN p.kind = 'bookmark' THEN 'ARRAY[]::text[]'
                 ELSE $endings$CASE WHEN r.via IS NULL THEN ARRAY[''] ELSE ARRAY['', '/via-repost'] END$endings$ END,
            CASE WHEN p.kind = 'bookmark' THEN 'x.user_did, x.post_uri' ELSE 'x.post_uri, x.user_did' END,
            CASE WHEN p.kind = 'bookmark' THEN 'o.repo, o.subject' ELSE 'o.subject, o.repo' END,
            CASE WHEN p.kind = 'bookmark' THEN 'account, post' ELSE 'post, account' END);

        -- A bookmark has no fast path.
        CONTINUE WHEN p.kind = 'bookmark';

        EXECUTE format($sql$
            CREATE OR REPLACE FUNCTION standpipe.new_%1$s(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
            DECLARE
                another boolean;
                ignored text;
            BEGIN
                INSERT INTO %2$I (uri, user_did, post_uri, subject_cid, created_at,
                                  commit_rev, commit_seq, stream_ms, stream_seq)
                SELECT o.uri, o.repo, o.subject, o.subject_cid, o.created_at, o.rev, o.seq, o.ms, o.sq
                WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri IN (o.uri, o.repo))
                  AND NOT EXISTS (SELECT FROM standpipe.swept s WHERE s.did = o.repo AND s.rev > o.rev COLLATE "C")
                ON CONFLICT (uri) DO NOTHING
                -- The statement sees the table as it was before: did this account already have one for this subject?
                RETURNING coalesce((
                    SELECT true FROM %2$I x
                    WHERE (x.post_uri, x.user_did) >= (o.subject, o.repo) AND (x.post_uri, x.user_did) <= (o.subject, o.repo)
                    ORDER BY x.post_uri, x.user_did LIMIT 1), false) INTO another;
                -- There already is a row or a tombstone, and nothing was written.
                IF another IS NULL THEN
                    RETURN false;
                END IF;
                %5$s
                ignored := standpipe.notify_one(o, split_part(o.subject, '/', 3), %1$L, o.subject);
                ignored := standpipe.count_one(ROW(o.subject, %3$s(NOT another)::integer%4$s));
                RETURN true;
            END $$;
            $sql$,
            p.kind, p.relation, p.before, p.after,
            CASE WHEN p.has_feed_item THEN $new$
                INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
                VALUES (o.uri, o.subject, o.repo, 'repost', o.sort_at, o.cid, o.created_at);
                $new$ ELSE '' END);
    END LOOP;
END $do$;
