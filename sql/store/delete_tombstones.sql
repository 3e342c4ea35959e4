-- Deletes up to $2 tombstones of deletes that entered the stream before $1 (Unix milliseconds), and keeps the newest of
-- their revisions for each account, in the same transaction: standpipe.is_dead finds the one or the other. Rows that a
-- delete of the same record is moving forward just now are left for the next time.
WITH gone AS (
    DELETE FROM standpipe.tombstones WHERE uri IN (
        SELECT uri FROM standpipe.tombstones WHERE stream_ms < $1 LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING uri, commit_rev
), kept AS (
    INSERT INTO standpipe.swept AS s (did, rev)
    SELECT split_part(g.uri, '/', 3) COLLATE "C", max(g.commit_rev COLLATE "C") FROM gone g
    WHERE g.uri LIKE 'at://%' AND g.commit_rev <> ''
    GROUP BY 1 ORDER BY 1
    ON CONFLICT (did) DO UPDATE SET rev = greatest(s.rev, excluded.rev)
)
SELECT count(*) FROM gone
