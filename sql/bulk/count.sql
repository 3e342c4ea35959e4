-- Changes counters, in the order of their keys ($1, sorted). A counter row exists as soon as anything refers to the post.
INSERT INTO post_aggregations AS a (post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count)
SELECT unnest($1::text[]), unnest($2::integer[]), unnest($3::integer[]), unnest($4::integer[]), unnest($5::integer[]),
    unnest($6::integer[])
ON CONFLICT (post_uri) DO UPDATE SET
    like_count = a.like_count + excluded.like_count, repost_count = a.repost_count + excluded.repost_count,
    reply_count = a.reply_count + excluded.reply_count, quote_count = a.quote_count + excluded.quote_count,
    bookmark_count = a.bookmark_count + excluded.bookmark_count, updated_at = now()
WHERE excluded.like_count <> 0 OR excluded.repost_count <> 0 OR excluded.reply_count <> 0
   OR excluded.quote_count <> 0 OR excluded.bookmark_count <> 0
