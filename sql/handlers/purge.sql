-- Forgets what came of tasks long ago.
DELETE FROM standpipe.results WHERE (type, id) IN (
    SELECT type, id FROM standpipe.results
    WHERE started_at < now() - $1 * interval '1 second' AND state IN ('done', 'failed') LIMIT 1000)
