-- app.bsky.feed.post. subject: the URI of the post that it quotes, if any; subject_cid: that one's CID; body:
-- text, langs, tags, parent_uri, parent_cid, root_uri, root_cid, embed, facets, each where the record has it.
--
-- reply_count counts live posts whose parent the post is; quote_count the live posts that quote it. Every live
-- post has a feed item, and a quote has a row in quotes under the post's own URI: a post quotes at most one.

CREATE OR REPLACE FUNCTION standpipe.put_posts(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    newer standpipe.op[];
    more integer;
BEGIN
    WITH added AS (
        INSERT INTO posts AS r (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid,
                                embed, facets, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
        SELECT o.uri, o.cid, o.repo, o.body ->> 'text', o.body -> 'langs', coalesce(o.body -> 'tags', '[]'),
               o.body ->> 'parent_uri', o.body ->> 'parent_cid', o.body ->> 'root_uri', o.body ->> 'root_cid',
               o.body -> 'embed', o.body -> 'facets', o.created_at, o.rev, o.seq, o.ms, o.sq
        FROM unnest(ops) o
        WHERE NOT standpipe.is_dead(o)
        ON CONFLICT (uri) DO NOTHING
        RETURNING r.uri
    ), effects AS (
        SELECT o.*, o.body ->> 'parent_uri' AS parent_uri, (a.uri IS NOT NULL)::integer AS added
        FROM unnest(ops) o LEFT JOIN added a ON a.uri = o.uri
    ), feed AS (
        INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
        SELECT e.uri, e.uri, e.repo, CASE WHEN e.parent_uri IS NULL THEN 'post' ELSE 'reply' END,
               e.sort_at, e.cid, e.created_at
        FROM effects e WHERE e.added = 1
        ON CONFLICT (uri) DO UPDATE SET
            type = excluded.type, sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at
    ), quote AS (
        INSERT INTO quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
        SELECT e.uri, e.cid, e.uri, e.subject, e.subject_cid, e.created_at
        FROM effects e WHERE e.added = 1 AND e.subject IS NOT NULL
        ON CONFLICT (uri) DO UPDATE SET
            cid = excluded.cid, quoted_uri = excluded.quoted_uri,
            quoted_cid = excluded.quoted_cid, created_at = excluded.created_at
    ), changes AS (
        SELECT ROW(e.uri, 0, 0, 0, 0, 0)::standpipe.delta AS delta FROM effects e
        UNION ALL
        SELECT ROW(e.parent_uri, 0, 0, e.added, 0, 0)::standpipe.delta FROM effects e WHERE e.parent_uri IS NOT NULL
        UNION ALL
        SELECT ROW(e.subject, 0, 0, 0, e.added, 0)::standpipe.delta FROM effects e WHERE e.subject IS NOT NULL
    )
    SELECT (SELECT count(*) FROM added), deltas || (SELECT array_agg(c.delta) FROM changes c)
    INTO applied, deltas;

    IF applied < cardinality(ops) THEN
        SELECT array_agg(o) INTO newer
        FROM unnest(ops) o JOIN posts r ON r.uri = o.uri
        WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
        IF newer IS NOT NULL THEN
            SELECT u.deltas, u.applied INTO deltas, more FROM standpipe.update_posts(newer, deltas) u;
            applied := applied + more;
        END IF;
    END IF;
END $$;

-- Rewrites rows that are older than the operation, in place: what others keep in them (gate flags, indexed_at)
-- stays. The counters of what it referred to before go down, of what it refers to now up.
CREATE OR REPLACE FUNCTION standpipe.update_posts(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
BEGIN
    deltas := deltas || (SELECT array_agg(ROW(r.parent_uri, 0, 0, -1, 0, 0)::standpipe.delta)
        FROM unnest(ops) o JOIN posts r ON r.uri = o.uri WHERE r.parent_uri IS NOT NULL);
    WITH gone AS (
        DELETE FROM quotes q USING unnest(ops) o WHERE q.post_uri = o.uri RETURNING q.quoted_uri
    )
    SELECT deltas || array_agg(ROW(g.quoted_uri, 0, 0, 0, -1, 0)::standpipe.delta) INTO deltas FROM gone g;

    UPDATE posts r SET
        cid = o.cid, text = o.body ->> 'text', langs = o.body -> 'langs', tags = coalesce(o.body -> 'tags', '[]'),
        parent_uri = o.body ->> 'parent_uri', parent_cid = o.body ->> 'parent_cid',
        root_uri = o.body ->> 'root_uri', root_cid = o.body ->> 'root_cid',
        embed = o.body -> 'embed', facets = o.body -> 'facets', created_at = o.created_at,
        commit_rev = o.rev, commit_seq = o.seq, stream_ms = o.ms, stream_seq = o.sq
    FROM unnest(ops) o WHERE r.uri = o.uri;
    GET DIAGNOSTICS applied = ROW_COUNT;

    INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    SELECT o.uri, o.uri, o.repo, CASE WHEN o.body ->> 'parent_uri' IS NULL THEN 'post' ELSE 'reply' END,
           o.sort_at, o.cid, o.created_at
    FROM unnest(ops) o
    ON CONFLICT (uri) DO UPDATE SET
        type = excluded.type, sort_at = excluded.sort_at, cid = excluded.cid, created_at = excluded.created_at;
    INSERT INTO quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
    SELECT o.uri, o.cid, o.uri, o.subject, o.subject_cid, o.created_at
    FROM unnest(ops) o WHERE o.subject IS NOT NULL;

    deltas := deltas
        || (SELECT array_agg(ROW(o.body ->> 'parent_uri', 0, 0, 1, 0, 0)::standpipe.delta)
            FROM unnest(ops) o WHERE o.body ->> 'parent_uri' IS NOT NULL)
        || (SELECT array_agg(ROW(o.subject, 0, 0, 0, 1, 0)::standpipe.delta)
            FROM unnest(ops) o WHERE o.subject IS NOT NULL);
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_posts(ops standpipe.op[], INOUT deltas standpipe.delta[], OUT applied integer)
LANGUAGE plpgsql AS $$
DECLARE
    uris text[];
BEGIN
    SELECT array_agg(r.uri) INTO uris
    FROM unnest(ops) o JOIN posts r ON r.uri = o.uri
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    applied := coalesce(cardinality(uris), 0);
    IF applied = 0 THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM posts WHERE uri = ANY (uris) RETURNING parent_uri
    )
    SELECT deltas || array_agg(ROW(g.parent_uri, 0, 0, -1, 0, 0)::standpipe.delta) INTO deltas
    FROM gone g WHERE g.parent_uri IS NOT NULL;
    WITH gone AS (
        DELETE FROM quotes WHERE post_uri = ANY (uris) RETURNING quoted_uri
    )
    SELECT deltas || array_agg(ROW(g.quoted_uri, 0, 0, 0, -1, 0)::standpipe.delta) INTO deltas FROM gone g;
    DELETE FROM feed_items WHERE uri = ANY (uris);
END $$;
