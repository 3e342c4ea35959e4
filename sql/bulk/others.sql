-- Which of these likes ($1: subjects, $2: accounts) and reposts ($3, $4) are not the account's first of the subject: their
-- places, from 1. Rows compared as such can only be found by the index of both columns, whatever the planner believes of
-- a young table.
SELECT
    ARRAY(SELECT i::integer FROM unnest($1::text[], $2::text[]) WITH ORDINALITY x (p, u, i), LATERAL (
              SELECT FROM likes r WHERE (r.post_uri, r.user_did) >= (p, u) AND (r.post_uri, r.user_did) <= (p, u) LIMIT 1) y),
    ARRAY(SELECT i::integer FROM unnest($3::text[], $4::text[]) WITH ORDINALITY x (p, u, i), LATERAL (
              SELECT FROM reposts r WHERE (r.post_uri, r.user_did) >= (p, u) AND (r.post_uri, r.user_did) <= (p, u) LIMIT 1) y)
