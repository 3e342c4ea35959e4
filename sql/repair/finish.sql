-- A repository has been compared, or there is none: it is left alone for $11 seconds. If it was asked for again meanwhile, it
-- stays queued.
UPDATE standpipe.repos r SET
    state = CASE WHEN r.requests > $10 THEN 'queued' ELSE $2 END,
    rev = coalesce(nullif($3, ''), r.rev), host = $4, records = $5, healed = $6, deleted = $7, refused = $8, message = $9,
    attempts = 0, doubted = NULL, retry_at = now() + $11 * interval '1 second', updated_at = now()
WHERE r.did = $1
