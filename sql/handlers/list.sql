-- The tasks that were begun last; in any state, and of any type, if these are empty.
SELECT type, id, state, attempts, result::text, error, by,
       extract(epoch FROM started_at)::float8, extract(epoch FROM coalesce(finished_at, now()) - started_at)::float8
FROM standpipe.results
WHERE ($1 = '' OR state = $1) AND ($2 = '' OR type = $2)
ORDER BY started_at DESC LIMIT $3
