-- How many repositories a backfill has still to compare, up to a limit ($1).
SELECT count(*) FROM (SELECT FROM standpipe.repos r WHERE r.state = 'queued' AND r.class = 2 LIMIT $1) AS left_over
