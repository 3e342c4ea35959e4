-- Queues those of these accounts ($1) whose repository was never compared, and advances the backfill ($2) from where it was
-- ($3) to where the next accounts begin ($4; NULL: that was all). Another process may have done the same.
WITH new AS (
    INSERT INTO standpipe.repos (did, state, class, reason)
    SELECT did, 'queued', 2, 'backfill' FROM unnest($1::text[]) AS did
    ON CONFLICT (did) DO NOTHING RETURNING 1
)
UPDATE standpipe.backfills b SET
    cursor = $4::text, done_at = CASE WHEN $4::text IS NULL THEN now() END,
    listed = b.listed + (SELECT count(*) FROM new)
WHERE b.what = $2::text AND b.cursor IS NOT DISTINCT FROM $3::text
