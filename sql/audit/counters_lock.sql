-- Locks the counter rows of these posts ($1), in the order of standpipe.apply, and creates missing ones. A call that
-- has changed rows but not yet its counters now waits for us, and adds its difference to a count that excludes its
-- rows; we wait for one that has already changed the counters.
INSERT INTO post_aggregations AS a (post_uri)
SELECT k.key FROM unnest($1::text[]) AS k (key) ORDER BY k.key COLLATE "C"
ON CONFLICT (post_uri) DO UPDATE SET updated_at = a.updated_at
