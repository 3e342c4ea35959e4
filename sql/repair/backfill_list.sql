-- The backfills, with what they have listed and for how long they have run, in seconds; and how many repositories are still
-- to be compared.
SELECT b.what, b.listed, b.done_at IS NOT NULL, extract(epoch FROM now() - b.started_at)::float8,
       (SELECT count(*) FROM standpipe.repos r WHERE r.state = 'queued' AND r.class = 2)
FROM standpipe.backfills b ORDER BY b.what
