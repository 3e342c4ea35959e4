-- Rows like these likes ($1: subjects, $2: accounts) or reposts ($3, $4), which have the same subject and the same account:
-- the table, 0 or 1; the place of the one that it is like, from 1; its URI. Rows that are compared and sorted as such are
-- found by the index of both columns, whatever the planner believes of a young table.
SELECT 0, x.i::integer, y.uri::text FROM unnest($1::text[], $2::text[]) WITH ORDINALITY x (p, u, i), LATERAL (
    SELECT r.uri FROM likes r WHERE (r.post_uri, r.user_did) >= (x.p, x.u) AND (r.post_uri, r.user_did) <= (x.p, x.u)
    ORDER BY r.post_uri, r.user_did OFFSET 0) y
UNION ALL
SELECT 1, x.i::integer, y.uri::text FROM unnest($3::text[], $4::text[]) WITH ORDINALITY x (p, u, i), LATERAL (
    SELECT r.uri FROM reposts r WHERE (r.post_uri, r.user_did) >= (x.p, x.u) AND (r.post_uri, r.user_did) <= (x.p, x.u)
    ORDER BY r.post_uri, r.user_did OFFSET 0) y
