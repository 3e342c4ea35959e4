-- Notes that an attempt failed: waiting for another one, or failed for good.
UPDATE standpipe.results SET state = $3, error = $4, failures = failures + 1, finished_at = now()
WHERE type = $1 AND id = $2 AND state <> 'done'
