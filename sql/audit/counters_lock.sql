-- Takes the counter rows of these posts ($1), in the order in which standpipe.apply takes them, and makes those that are
-- missing. A call that changed rows and not yet its counters waits for us now, and adds its difference to what we
-- count without its rows; one that has changed the counters already is waited for.
INSERT INTO post_aggregations AS a (post_uri)
SELECT k.key FROM unnest($1::text[]) AS k (key) ORDER BY k.key COLLATE "C"
ON CONFLICT (post_uri) DO UPDATE SET updated_at = a.updated_at
