-- app.bsky.feed.post. subject: the URI of the post that it quotes, if any; subject_cid: that one's CID; body:
-- text, langs, tags, parent_uri, parent_cid, root_uri, root_cid, embed, facets, each where the record has it; labels, a
-- list of the values of its self-labels, where it has some.
--
-- reply_count counts live posts whose parent the post is; quote_count the live posts that quote it. Every live
-- post has a feed item, and a quote has a row in quotes under the post's own URI: a post quotes at most one.
-- For the four flags about gates, see 31_gates.sql. Notifications: reply, quote, mention.
CREATE OR REPLACE FUNCTION standpipe.put_post(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    parent text := o.body ->> 'parent_uri';
    root text := o.body ->> 'root_uri';
    deltas standpipe.delta[] := '{}';
    applied boolean := NOT standpipe.is_dead(o);
    replaces boolean := false;
    former jsonb;
    before text;
    own_thread boolean;
    own_post boolean;
    breaks_thread boolean := false;
    breaks_post boolean := false;
    ignored text;
BEGIN
    IF applied THEN
        SELECT EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = o.uri),
               EXISTS (SELECT FROM post_gates g WHERE g.post_uri = o.uri)
        INTO own_thread, own_post;
        IF root IS NOT NULL THEN
            breaks_thread := standpipe.reply_breaks_gate(o.uri, o.repo, root);
        END IF;
        IF o.subject IS NOT NULL THEN
            breaks_post := standpipe.quote_breaks_gate(o.uri, o.repo, o.subject);
        END IF;
        INSERT INTO posts (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid,
                           embed, facets, created_at, has_thread_gate, has_post_gate, violates_thread_gate,
                           violates_embedding_rules, commit_rev, commit_seq, stream_ms, stream_seq)
        VALUES (o.uri, o.cid, o.repo, o.body ->> 'text', o.body -> 'langs', coalesce(o.body -> 'tags', '[]'),
                parent, o.body ->> 'parent_cid', root, o.body ->> 'root_cid',
                o.body -> 'embed', o.body -> 'facets', o.created_at, own_thread, own_post, breaks_thread,
                breaks_post, o.rev, o.seq, o.ms, o.sq)
        ON CONFLICT (uri) DO NOTHING;
        IF NOT FOUND THEN
            -- There is a row. An older one is rewritten in place, so that other programs' data in it (indexed_at)
            -- stays; its previous references are counted down. The row comes before its quote: see judge_quotes.
            SELECT r.parent_uri, r.facets INTO before, former FROM posts r WHERE r.uri = o.uri AND standpipe.newer(
                o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
            applied := FOUND;
            IF applied THEN
                replaces := true;
                UPDATE posts r SET
                    cid = o.cid, text = o.body ->> 'text', langs = o.body -> 'langs',
                    tags = coalesce(o.body -> 'tags', '[]'), parent_uri = parent,
                    parent_cid = o.body ->> 'parent_cid', root_uri = root,
                    root_cid = o.body ->> 'root_cid', embed = o.body -> 'embed', facets = o.body -> 'facets',
                    created_at = o.created_at, has_thread_gate = own_thread, has_post_gate = own_post,
                    violates_thread_gate = breaks_thread, violates_embedding_rules = breaks_post,
                    commit_rev = o.rev, commit_seq = o.seq, stream_ms = o.ms, stream_seq = o.sq
                WHERE r.uri = o.uri;
                IF before IS NOT NULL THEN
                    deltas := deltas || ROW(before, 0, 0, -1, 0, 0)::standpipe.delta;
                END IF;
                DELETE FROM quotes q WHERE q.post_uri = o.uri RETURNING q.quoted_uri INTO before;
                IF FOUND THEN
                    deltas := deltas || ROW(before, 0, 0, 0, -1, 0)::standpipe.delta;
                END IF;
            END IF;
        END IF;
    END IF;
    IF applied THEN
        INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
        VALUES (o.uri, o.uri, o.repo, CASE WHEN parent IS NULL THEN 'post' ELSE 'reply' END,
                o.sort_at, o.cid, o.created_at)
        ON CONFLICT (uri) DO UPDATE SET
            post_uri = excluded.post_uri, originator_did = excluded.originator_did, type = excluded.type,
            sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at;
        ignored := standpipe.put_post_parts(o, replaces, former);
        IF own_thread THEN
            -- The accounts that the root of a thread mentions may have changed.
            ignored := standpipe.judge_replies(o.uri);
        END IF;
    END IF;
    -- Zero where nothing changed: a counter row exists as soon as anything refers to the post.
    RETURN ROW(applied, deltas || standpipe.post_deltas(o, applied::integer));
END $$;

-- A post's changes of counters.
CREATE OR REPLACE FUNCTION standpipe.post_deltas(o standpipe.op, one integer) RETURNS standpipe.delta[]
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    parent text := o.body ->> 'parent_uri';
    deltas standpipe.delta[] := ARRAY[ROW(o.uri, 0, 0, 0, 0, 0)::standpipe.delta];
BEGIN
    IF parent IS NOT NULL THEN
        deltas := deltas || ROW(parent, 0, 0, one, 0, 0)::standpipe.delta;
    END IF;
    IF o.subject IS NOT NULL THEN
        deltas := deltas || ROW(o.subject, 0, 0, 0, one, 0)::standpipe.delta;
    END IF;
    RETURN deltas;
END $$;

-- Rows of a post other than those in posts and feed_items: quote, labels, notifications. former: see notify_post.
CREATE OR REPLACE FUNCTION standpipe.put_post_parts(o standpipe.op, replaces boolean, former jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    IF o.subject IS NOT NULL THEN
        INSERT INTO quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
        VALUES (o.uri, o.cid, o.uri, o.subject, o.subject_cid, o.created_at)
        -- The old workers left rows of deleted posts.
        ON CONFLICT (uri) DO UPDATE SET
            cid = excluded.cid, post_uri = excluded.post_uri, quoted_uri = excluded.quoted_uri,
            quoted_cid = excluded.quoted_cid, created_at = excluded.created_at;
    END IF;
    IF replaces OR o.subject IS NOT NULL OR o.body ?| '{parent_uri, facets}' THEN
        ignored := standpipe.notify_post(o, replaces, former);
    END IF;
    IF replaces OR o.body ? 'labels' THEN
        ignored := standpipe.label_self(o, o.body -> 'labels', replaces);
    END IF;
END $$;

-- Fast path: one post. Returns false and writes nothing if a row or tombstone already exists, or a gate is involved.
CREATE OR REPLACE FUNCTION standpipe.new_post(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    INSERT INTO posts (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid,
                       embed, facets, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT o.uri, o.cid, o.repo, o.body ->> 'text', o.body -> 'langs', coalesce(o.body -> 'tags', '[]'),
           o.body ->> 'parent_uri', o.body ->> 'parent_cid', o.body ->> 'root_uri', o.body ->> 'root_cid',
           o.body -> 'embed', o.body -> 'facets', o.created_at, o.rev, o.seq, o.ms, o.sq
    WHERE NOT EXISTS (SELECT FROM standpipe.tombstones t WHERE t.uri IN (o.uri, o.repo))
      AND NOT EXISTS (SELECT FROM standpipe.swept s WHERE s.did = o.repo AND s.rev > o.rev COLLATE "C")
      AND NOT EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = ANY (ARRAY[o.uri, o.body ->> 'root_uri']))
      AND NOT EXISTS (SELECT FROM post_gates g WHERE g.post_uri = ANY (ARRAY[o.uri, o.subject]))
    ON CONFLICT (uri) DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    VALUES (o.uri, o.uri, o.repo, CASE WHEN o.body ? 'parent_uri' THEN 'reply' ELSE 'post' END,
            o.sort_at, o.cid, o.created_at);
    IF o.subject IS NOT NULL OR o.body ?| '{parent_uri, facets, labels}' THEN
        ignored := standpipe.put_post_parts(o, false, NULL);
        ignored := standpipe.count(standpipe.post_deltas(o, 1));
    ELSE
        ignored := standpipe.count_one(ROW(o.uri, 0, 0, 0, 0, 0));
    END IF;
    RETURN true;
END $$;

-- Deletes the row if it is older than its delete.
CREATE OR REPLACE FUNCTION standpipe.delete_post(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    PERFORM FROM posts r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN ROW(false, ARRAY[]::standpipe.delta[]);
    END IF;
    RETURN ROW(true, standpipe.remove_post(o.uri));
END $$;

-- Removes a row and everything that depends on it. Gates stay: they are records of their own.
CREATE OR REPLACE FUNCTION standpipe.remove_post(gone text) RETURNS standpipe.delta[] LANGUAGE plpgsql AS $$
DECLARE
    deltas standpipe.delta[] := '{}';
    post record;
    quoted text;
BEGIN
    DELETE FROM posts r WHERE r.uri = gone RETURNING r.parent_uri, r.facets, r.has_thread_gate INTO post;
    IF post.parent_uri IS NOT NULL THEN
        deltas := deltas || ROW(post.parent_uri, 0, 0, -1, 0, 0)::standpipe.delta;
    END IF;
    DELETE FROM quotes q WHERE q.post_uri = gone RETURNING q.quoted_uri INTO quoted;
    IF FOUND THEN
        deltas := deltas || ROW(quoted, 0, 0, 0, -1, 0)::standpipe.delta;
    END IF;
    DELETE FROM feed_items f WHERE f.uri = gone;
    IF post.has_thread_gate THEN
        -- The accounts that it mentioned are no longer known.
        PERFORM standpipe.judge_replies(gone);
    END IF;
    PERFORM standpipe.unnotify(gone, ARRAY['/reply', '/quote']
        || ARRAY(SELECT '/mention/' || d FROM unnest(standpipe.mentioned(post.facets)) d));
    PERFORM standpipe.unlabel_self(gone);
    RETURN deltas;
END $$;
