-- app.bsky.feed.post. subject: the URI of the post that it quotes, if any; subject_cid: that one's CID; body:
-- text, langs, tags, parent_uri, parent_cid, root_uri, root_cid, embed, facets, each where the record has it.
--
-- reply_count counts live posts whose parent the post is; quote_count the live posts that quote it. Every live
-- post has a feed item, and a quote has a row in quotes under the post's own URI: a post quotes at most one.
CREATE OR REPLACE FUNCTION standpipe.put_post(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    parent text := o.body ->> 'parent_uri';
    deltas standpipe.delta[] := '{}';
    applied boolean := NOT standpipe.is_dead(o);
    before text;
BEGIN
    IF applied THEN
        INSERT INTO posts (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid,
                           embed, facets, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
        VALUES (o.uri, o.cid, o.repo, o.body ->> 'text', o.body -> 'langs', coalesce(o.body -> 'tags', '[]'),
                parent, o.body ->> 'parent_cid', o.body ->> 'root_uri', o.body ->> 'root_cid',
                o.body -> 'embed', o.body -> 'facets', o.created_at, o.rev, o.seq, o.ms, o.sq)
        ON CONFLICT (uri) DO NOTHING;
        IF NOT FOUND THEN
            -- There is a row. One that is older is rewritten in place, so that what others keep in it (gate
            -- flags, indexed_at) stays; what it referred to before is counted down.
            SELECT r.parent_uri INTO before FROM posts r WHERE r.uri = o.uri AND standpipe.newer(
                o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
            applied := FOUND;
            IF applied THEN
                UPDATE posts r SET
                    cid = o.cid, text = o.body ->> 'text', langs = o.body -> 'langs',
                    tags = coalesce(o.body -> 'tags', '[]'), parent_uri = parent,
                    parent_cid = o.body ->> 'parent_cid', root_uri = o.body ->> 'root_uri',
                    root_cid = o.body ->> 'root_cid', embed = o.body -> 'embed', facets = o.body -> 'facets',
                    created_at = o.created_at, commit_rev = o.rev, commit_seq = o.seq,
                    stream_ms = o.ms, stream_seq = o.sq
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
            type = excluded.type, sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at;
        IF o.subject IS NOT NULL THEN
            INSERT INTO quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
            VALUES (o.uri, o.cid, o.uri, o.subject, o.subject_cid, o.created_at)
            -- The old workers left rows of posts that are gone.
            ON CONFLICT (uri) DO UPDATE SET
                cid = excluded.cid, post_uri = excluded.post_uri, quoted_uri = excluded.quoted_uri,
                quoted_cid = excluded.quoted_cid, created_at = excluded.created_at;
        END IF;
    END IF;
    -- Zero where nothing changed: a counter row exists as soon as anything refers to the post.
    deltas := deltas || ROW(o.uri, 0, 0, 0, 0, 0)::standpipe.delta;
    IF parent IS NOT NULL THEN
        deltas := deltas || ROW(parent, 0, 0, applied::integer, 0, 0)::standpipe.delta;
    END IF;
    IF o.subject IS NOT NULL THEN
        deltas := deltas || ROW(o.subject, 0, 0, 0, applied::integer, 0)::standpipe.delta;
    END IF;
    RETURN ROW(applied, deltas);
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_post(o standpipe.op) RETURNS standpipe.effect LANGUAGE plpgsql AS $$
DECLARE
    deltas standpipe.delta[] := '{}';
    referred text;
BEGIN
    PERFORM standpipe.put_tombstone(o);
    DELETE FROM posts r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
    RETURNING r.parent_uri INTO referred;
    IF NOT FOUND THEN
        RETURN ROW(false, deltas);
    END IF;
    IF referred IS NOT NULL THEN
        deltas := deltas || ROW(referred, 0, 0, -1, 0, 0)::standpipe.delta;
    END IF;
    DELETE FROM quotes q WHERE q.post_uri = o.uri RETURNING q.quoted_uri INTO referred;
    IF FOUND THEN
        deltas := deltas || ROW(referred, 0, 0, 0, -1, 0)::standpipe.delta;
    END IF;
    DELETE FROM feed_items f WHERE f.uri = o.uri;
    RETURN ROW(true, deltas);
END $$;
