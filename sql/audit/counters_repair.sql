-- Counts again, in a statement after the one that took the locks: that one's snapshot is older than its wait for
-- others, so a count in it would miss their changes.
UPDATE post_aggregations a SET
    like_count = e.likes, repost_count = e.reposts, reply_count = e.replies, quote_count = e.quotes,
    bookmark_count = e.bookmarks, updated_at = now()
FROM (
    SELECT k.key,
        (SELECT count(DISTINCT x.user_did) FROM likes x WHERE x.post_uri = k.key) AS likes,
        (SELECT count(DISTINCT x.user_did) FROM reposts x WHERE x.post_uri = k.key) AS reposts,
        (SELECT count(*) FROM posts x WHERE x.parent_uri = k.key) AS replies,
        (SELECT count(DISTINCT x.post_uri) FROM quotes x WHERE x.quoted_uri = k.key) AS quotes,
        (SELECT count(DISTINCT x.user_did) FROM bookmarks x WHERE x.post_uri = k.key) AS bookmarks
    FROM unnest($1::text[]) AS k (key)
) e
WHERE a.post_uri = e.key
  AND (a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)
      <> (e.likes, e.reposts, e.replies, e.quotes, e.bookmarks)
