-- The backfills, with what they have listed; and how many repositories are still to be compared.
SELECT b.what, b.listed, b.done_at IS NOT NULL, extract(epoch FROM b.started_at)::bigint,
       (SELECT count(*) FROM standpipe.repos r WHERE r.state = 'queued' AND r.class = 2),
       (SELECT count(*) FROM standpipe.repos r
        WHERE r.state <> 'queued' AND r.class = 2 AND r.updated_at > now() - interval '1 minute')
FROM standpipe.backfills b ORDER BY b.what
