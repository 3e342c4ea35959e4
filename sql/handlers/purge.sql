-- Forgets what came of tasks long ago.
DELETE FROM standpipe.results WHERE coalesce(finished_at, started_at) < now() - $1 * interval '1 second' AND (type, id) IN (
    SELECT type, id FROM standpipe.results WHERE started_at < now() - $1 * interval '1 second'
        AND coalesce(finished_at, started_at) < now() - $1 * interval '1 second'
    LIMIT 1000)
