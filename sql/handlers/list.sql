-- The tasks that were begun last, those that are not finished first; in any state, and of any type, if these are empty. A large
-- result is left out.
SELECT type, id, state, attempts, CASE WHEN length(result::text) <= 4096 THEN result::text END, left(error, 4096), by,
       extract(epoch FROM started_at)::float8, extract(epoch FROM coalesce(finished_at, now()) - started_at)::float8
FROM standpipe.results
WHERE ($1 = '' OR state = $1) AND ($2 = '' OR type = $2)
ORDER BY state IN ('running', 'retrying') DESC, started_at DESC LIMIT $3
