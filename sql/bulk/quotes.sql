-- The quotes of new posts.
INSERT INTO quotes (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
SELECT u.uri, u.cid, u.uri, u.quoted_uri, u.quoted_cid, u.created_at
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamp[]) u (uri, cid, quoted_uri, quoted_cid, created_at)
