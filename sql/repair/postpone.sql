-- It did not work this time ($6: 1), or was not tried (0).
UPDATE standpipe.repos r SET
    attempts = r.attempts + $6, retry_at = now() + $2 * interval '1 second', host = coalesce($3, r.host),
    message = $4, doubted = coalesce($5, r.doubted), updated_at = now()
WHERE r.did = $1
