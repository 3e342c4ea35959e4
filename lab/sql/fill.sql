-- Fills the tables with as many rows as the setting bench.rows says, all tables together, in about the proportion that
-- the events of a lively network leave: of 100 rows 36 likes, 18 notifications, 14 feed items, 11 counters, 11 follows,
-- 10 posts. The keys look like real ones and lie in no order, so that what comes later lands everywhere among them.
-- Indexes are dropped first and built last.

CREATE TEMPORARY TABLE rebuild AS
    SELECT 0 AS turn,
           format('ALTER TABLE %s DROP CONSTRAINT %I', k.conrelid::regclass, k.conname) AS undo,
           format('ALTER TABLE %s ADD CONSTRAINT %I %s', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid)) AS redo
    FROM pg_constraint k
    WHERE k.contype IN ('p', 'u') AND k.conrelid::regclass::text IN (
        'likes', 'posts', 'follows', 'feed_items', 'post_aggregations', 'notifications')
    UNION ALL
    SELECT 1, format('DROP INDEX %s', i.indexrelid::regclass), pg_get_indexdef(i.indexrelid)
    FROM pg_index i
    WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
      AND i.indrelid::regclass::text IN (
        'likes', 'posts', 'follows', 'feed_items', 'post_aggregations', 'notifications');

DO $$
DECLARE
    step record;
BEGIN
    FOR step IN SELECT undo FROM rebuild LOOP
        EXECUTE step.undo;
    END LOOP;
END $$;

-- SQL functions of one expression, which PostgreSQL inlines: but for STABLE it would not, because they ask for a setting.
CREATE FUNCTION pg_temp.did(n bigint) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT 'did:plc:' || substr(md5('account' || n % greatest(current_setting('bench.rows')::bigint / 50, 1)), 1, 24)
$$;
CREATE FUNCTION pg_temp.uri(n bigint, collection text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT 'at://' || pg_temp.did(n * 7919) || '/app.bsky.' || collection || '/3l' || substr(md5(collection || n), 1, 11)
$$;
-- The post that the n-th of something is about: the square makes a few popular.
CREATE FUNCTION pg_temp.post(n bigint) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT pg_temp.uri(
        (((n * 104729 % 1000003) / 1000003.0) ^ 2 * (current_setting('bench.rows')::bigint * 10 / 100))::bigint,
        'feed.post')
$$;
CREATE FUNCTION pg_temp.moment(n bigint) RETURNS timestamp LANGUAGE sql STABLE AS $$
    SELECT timestamp '2025-01-01' + n * interval '1 second'
$$;

INSERT INTO users (did, handle)
    SELECT pg_temp.did(n), 'user' || n || '.bsky.social'
    FROM generate_series(0, current_setting('bench.rows')::bigint / 50 - 1) n
    ON CONFLICT DO NOTHING;
INSERT INTO posts (uri, cid, author_did, text, parent_uri, root_uri, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT pg_temp.uri(n, 'feed.post'), 'bafyrei' || md5('cid' || n) || substr(md5('more' || n), 1, 20),
           pg_temp.did(n * 7919), repeat('what somebody says ', 1 + (n % 11)::integer),
           CASE WHEN n % 3 = 0 THEN pg_temp.post(n) END, CASE WHEN n % 3 = 0 THEN pg_temp.post(n) END, pg_temp.moment(n),
           '3l' || substr(md5('rev' || n), 1, 11), n::text, 1735689600000 + n, 0
    FROM generate_series(1, current_setting('bench.rows')::bigint * 10 / 100) n;
INSERT INTO post_aggregations (post_uri, like_count)
    SELECT pg_temp.uri(n, 'feed.post'), n % 7
    FROM generate_series(1, current_setting('bench.rows')::bigint * 11 / 100) n;
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    SELECT pg_temp.uri(n, 'feed.post'), pg_temp.uri(n, 'feed.post'), pg_temp.did(n * 7919),
           CASE WHEN n % 3 = 0 THEN 'reply' ELSE 'post' END, pg_temp.moment(n),
           'bafyrei' || md5('cid' || n) || substr(md5('more' || n), 1, 20), pg_temp.moment(n)
    FROM generate_series(1, current_setting('bench.rows')::bigint * 10 / 100) n
    UNION ALL
    SELECT pg_temp.uri(n, 'feed.repost'), pg_temp.post(n), pg_temp.did(n * 7919), 'repost', pg_temp.moment(n),
           'bafyrei' || md5('repost' || n) || substr(md5('more' || n), 1, 20), pg_temp.moment(n)
    FROM generate_series(1, current_setting('bench.rows')::bigint * 4 / 100) n;
INSERT INTO likes (uri, user_did, post_uri, subject_cid, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT pg_temp.uri(n, 'feed.like'), pg_temp.did(n * 7919), pg_temp.post(n),
           'bafyrei' || md5('cid' || n) || substr(md5('more' || n), 1, 20), pg_temp.moment(n),
           '3l' || substr(md5('rev' || n), 1, 11), n::text, 1735689600000 + n, 1
    FROM generate_series(1, current_setting('bench.rows')::bigint * 36 / 100) n;
INSERT INTO follows (uri, follower_did, following_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT pg_temp.uri(n, 'graph.follow'), pg_temp.did(n * 7919), pg_temp.did(n * 31), pg_temp.moment(n),
           '3l' || substr(md5('rev' || n), 1, 11), n::text, 1735689600000 + n, 2
    FROM generate_series(1, current_setting('bench.rows')::bigint * 11 / 100) n;
INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
    SELECT pg_temp.uri(n, 'feed.like') || '#notification', pg_temp.did(n * 31), pg_temp.did(n * 7919), 'like',
           pg_temp.post(n), 'bafyrei' || md5('cid' || n) || substr(md5('more' || n), 1, 20), pg_temp.moment(n)
    FROM generate_series(1, current_setting('bench.rows')::bigint * 18 / 100) n;

DO $$
DECLARE
    step record;
BEGIN
    FOR step IN SELECT redo FROM rebuild ORDER BY turn LOOP
        EXECUTE step.redo;
    END LOOP;
END $$;
