-- Counters move once per call, last, and in the order of their keys: two calls that touch the same posts in the
-- order of their operations lock each other out. There is no floor at zero: a negative counter is a defect
-- that must be seen.
CREATE OR REPLACE FUNCTION standpipe.count(deltas standpipe.delta[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO post_aggregations AS a (post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count)
    SELECT d.post_uri, sum(d.likes), sum(d.reposts), sum(d.replies), sum(d.quotes), sum(d.bookmarks)
    FROM unnest(deltas) d
    GROUP BY d.post_uri
    ORDER BY d.post_uri COLLATE "C"
    ON CONFLICT (post_uri) DO UPDATE SET
        like_count = a.like_count + excluded.like_count,
        repost_count = a.repost_count + excluded.repost_count,
        reply_count = a.reply_count + excluded.reply_count,
        quote_count = a.quote_count + excluded.quote_count,
        bookmark_count = a.bookmark_count + excluded.bookmark_count,
        updated_at = now()
    WHERE (excluded.like_count, excluded.repost_count, excluded.reply_count, excluded.quote_count,
           excluded.bookmark_count) IS DISTINCT FROM (0, 0, 0, 0, 0);
END $$;

-- Applies the operations of one event, or of several, in one transaction: all of them or none.
--
--   repos     the repositories that the operations belong to
--   handles   the handles that #identity operations claim; empty otherwise
--   dids      accounts that must have a row in users, sorted
--   ops       the operations, those of one section side by side; no two of one call on the same record
--   sections  what the runs of ops are, deletes first: '<kind>' or 'delete <kind>'
--   sizes     how many operations each section has
--   deletes   how many operations, from the first, are deletes that leave a tombstone
--
-- Returns how many operations of each section changed something; the rest met something newer.
--
-- VOLATILE, and the locks come before anything is read: every statement after them sees what the holders before
-- committed. Taken inside the statement that writes they would come too late, its snapshot is older.
-- synchronous_commit is off for this transaction only; the caller flushes once per batch before it acknowledges
-- anything. A SET clause on the function would be undone before the commit.
CREATE OR REPLACE FUNCTION standpipe.apply(
    repos text[], handles text[], dids text[], ops standpipe.op[], sections text[], sizes integer[], deletes integer
) RETURNS integer[] LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    deltas standpipe.delta[] := '{}';
    counts integer[] := '{}';
    part standpipe.op[];
    applied integer;
    first integer := 1;
    ignored text;
BEGIN
    ignored := set_config('synchronous_commit', 'off', true);
    IF cardinality(handles) > 0 THEN
        handles := handles || (SELECT array_agg(a.handle) FROM standpipe.accounts a
                               WHERE a.did = ANY (repos) AND a.handle IS NOT NULL);
    END IF;
    IF cardinality(repos) = 1 AND cardinality(handles) = 0 THEN
        ignored := pg_advisory_xact_lock(hashtextextended(repos[1], 0));
    ELSE
        PERFORM pg_advisory_xact_lock(k.key) FROM (
            SELECT DISTINCT hashtextextended(name, 0) AS key
            FROM (SELECT unnest(repos) UNION ALL SELECT '@' || unnest(handles)) AS n (name)
            ORDER BY 1
        ) k;
    END IF;

    PERFORM standpipe.ensure_users(dids);
    IF deletes > 0 THEN
        PERFORM standpipe.put_tombstones(ops[1:deletes]);
    END IF;

    FOR i IN 1 .. cardinality(sections) LOOP
        part := ops[first : first + sizes[i] - 1];
        first := first + sizes[i];
        CASE sections[i]
            WHEN 'like' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.put_likes(part, deltas) f;
            WHEN 'post' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.put_posts(part, deltas) f;
            WHEN 'follow' THEN applied := standpipe.put_follows(part);
            WHEN 'repost' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.put_reposts(part, deltas) f;
            WHEN 'delete like' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.delete_likes(part, deltas) f;
            WHEN 'delete follow' THEN applied := standpipe.delete_follows(part);
            WHEN 'delete post' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.delete_posts(part, deltas) f;
            WHEN 'delete repost' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.delete_reposts(part, deltas) f;
            WHEN 'block' THEN applied := standpipe.put_blocks(part);
            WHEN 'delete block' THEN applied := standpipe.delete_blocks(part);
            WHEN 'record' THEN applied := standpipe.put_records(part);
            WHEN 'delete record' THEN applied := standpipe.delete_records(part);
            WHEN 'profile' THEN applied := standpipe.put_profiles(part);
            WHEN 'identity' THEN applied := standpipe.put_identities(part, handles);
            WHEN 'account' THEN applied := standpipe.put_accounts(part);
            WHEN 'bookmark' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.put_bookmarks(part, deltas) f;
            WHEN 'delete bookmark' THEN
                SELECT f.deltas, f.applied INTO deltas, applied FROM standpipe.delete_bookmarks(part, deltas) f;
        END CASE;
        counts := counts || applied;
    END LOOP;

    IF cardinality(deltas) > 0 THEN
        PERFORM standpipe.count(deltas);
    END IF;
    RETURN counts;
END $$;
