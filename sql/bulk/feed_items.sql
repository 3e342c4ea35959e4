-- The feed items of new posts and reposts.
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamp[], $6::text[], $7::timestamp[])
