-- Notes that a task is being worked on, before it begins: an attempt that ends the server process, too, is counted. No row if it
-- is done already, or if this delivery of it ($4) has failed for good; another delivery of a failed one begins anew.
INSERT INTO standpipe.results AS r (type, id, state, attempts, by, entry, started_at)
VALUES ($1, $2, 'running', 1, $3, $4, now())
ON CONFLICT (type, id) DO UPDATE SET
    state = 'running', attempts = CASE r.state WHEN 'failed' THEN 1 ELSE r.attempts + 1 END,
    failures = CASE r.state WHEN 'failed' THEN 0 ELSE r.failures END,
    by = excluded.by, entry = excluded.entry, started_at = excluded.started_at, finished_at = NULL
WHERE r.state <> 'done' AND NOT (r.state = 'failed' AND r.entry = excluded.entry)
RETURNING attempts, failures
