-- Which of these posts ($1) have a gate.
SELECT x.post_uri::text FROM unnest($1::text[]) k (uri), LATERAL (
    SELECT g.post_uri FROM thread_gates g WHERE g.post_uri = k.uri OFFSET 0) x
UNION
SELECT x.post_uri::text FROM unnest($1::text[]) k (uri), LATERAL (
    SELECT g.post_uri FROM post_gates g WHERE g.post_uri = k.uri OFFSET 0) x
