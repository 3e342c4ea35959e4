-- What became of a task that is finished.
SELECT state, error FROM standpipe.results WHERE type = $1 AND id = $2 AND state IN ('done', 'failed')
