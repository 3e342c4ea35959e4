-- Notes that an attempt failed: another one follows, or it has failed for good.
UPDATE standpipe.results SET state = $3, error = $4, failures = failures + 1, finished_at = now()
WHERE type = $1 AND id = $2 AND state <> 'done'
