-- The feed items of new posts and reposts.
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::text[]), unnest($5::timestamp[]),
    unnest($6::text[]), unnest($7::timestamp[])
