-- Of these feed generators and labelers ($1: URIs) those whose copy of their counter is another.
SELECT r.key, r.like_count::text, standpipe.like_count(r.key)::text
FROM (
    SELECT g.uri::text AS key, g.like_count FROM feed_generators g WHERE g.uri = ANY ($1::text[])
    UNION ALL
    SELECT s.uri::text, s.like_count FROM labeler_services s WHERE s.uri = ANY ($1::text[])
) r
WHERE r.like_count <> standpipe.like_count(r.key)
