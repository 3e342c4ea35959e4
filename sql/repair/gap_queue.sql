-- Queues these accounts ($1), and advances the list of those that may lack something since a gap ($2) from where it was ($3)
-- to where the next accounts begin ($4; NULL: that was all). Another process may have done the same.
WITH moved AS (
    UPDATE standpipe.backfills b SET
        cursor = $4::text, done_at = CASE WHEN $4::text IS NULL THEN now() END, listed = b.listed + cardinality($1::text[])
    WHERE b.what = $2::text AND b.cursor IS NOT DISTINCT FROM $3::text AND b.done_at IS NULL
    RETURNING 1
)
INSERT INTO standpipe.repos AS r (did, state, class, reason)
SELECT did, 'queued', 1, 'gap' FROM unnest($1::text[]) AS did WHERE EXISTS (SELECT FROM moved)
ON CONFLICT (did) DO UPDATE SET
    state = 'queued', class = least(1, CASE r.state WHEN 'queued' THEN r.class END),
    reason = CASE r.state WHEN 'queued' THEN r.reason ELSE 'gap' END,
    retry_at = CASE r.state WHEN 'queued' THEN r.retry_at ELSE greatest(now(), r.retry_at) END,
    requests = r.requests + 1, attempts = CASE r.state WHEN 'queued' THEN r.attempts ELSE 0 END
