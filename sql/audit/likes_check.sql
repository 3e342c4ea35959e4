-- The feed generators and labelers among these ($1: URIs) whose copy of their counter differs from it.
SELECT r.key, r.like_count::text, standpipe.like_count(r.key)::text
FROM (
    SELECT g.uri::text AS key, g.like_count FROM feed_generators g WHERE g.uri = ANY ($1::text[])
    UNION ALL
    SELECT s.uri::text, s.like_count FROM labeler_services s WHERE s.uri = ANY ($1::text[])
) r
WHERE r.like_count <> standpipe.like_count(r.key)
