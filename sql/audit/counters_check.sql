-- The posts among these ($1) whose counters disagree with the rows. A statement sees a single moment, and a call of
-- standpipe.apply changes rows and counters at the same moment: any difference here is an error.
SELECT k.key,
       CASE WHEN a.post_uri IS NOT NULL
            THEN row(a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)::text END,
       row(e.likes, e.reposts, e.replies, e.quotes, e.bookmarks)::text
FROM unnest($1::text[]) AS k (key)
LEFT JOIN post_aggregations a ON a.post_uri = k.key
CROSS JOIN LATERAL (SELECT
    (SELECT count(DISTINCT x.user_did) FROM likes x WHERE x.post_uri = k.key)::integer AS likes,
    (SELECT count(DISTINCT x.user_did) FROM reposts x WHERE x.post_uri = k.key)::integer AS reposts,
    (SELECT count(*) FROM posts x WHERE x.parent_uri = k.key)::integer AS replies,
    (SELECT count(DISTINCT x.post_uri) FROM quotes x WHERE x.quoted_uri = k.key)::integer AS quotes,
    (SELECT count(DISTINCT x.user_did) FROM bookmarks x WHERE x.post_uri = k.key)::integer AS bookmarks
) e
WHERE CASE
    WHEN a.post_uri IS NULL THEN
        -- A counter row exists as soon as anything refers to the post.
        (e.likes, e.reposts, e.replies, e.quotes, e.bookmarks) <> (0, 0, 0, 0, 0)
        OR EXISTS (SELECT FROM posts x WHERE x.uri = k.key)
    ELSE (a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)
        <> (e.likes, e.reposts, e.replies, e.quotes, e.bookmarks)
END
